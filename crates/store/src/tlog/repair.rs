//! Restoring a log from its tiles, and forgetting a breach that is none any more.

use std::collections::HashSet;
use std::str::FromStr;

use bytes::Bytes;
use daybook_events::Event;
use daybook_events::log::{Append, AppendError, EventLog, Expected, Position, ReadError};
use daybook_events::names::EventId;
use daybook_events::subject::{PREFIX, Subject};
use daybook_events::tree::{Breach, TreeHead};
use futures_util::future::join_all;
use uuid::Uuid;

use super::checkpoint::{Checkpoint, CheckpointError};
use super::compare::{
    Mismatch, compare_bundle, judge_read_error, replaced, tree_damaged, truncated, unsigned_differs,
};
use super::growth::Growth;
use super::keys::KeyRing;
use super::leaf::{event_entry, gap_entry, is_gap};
use super::ledger_state::{
    BREACH, CHECKPOINT, ClaimedHead, DOUBT, LogHistory, StateError, codes, read_breach,
    write_breach,
};
use super::path::{TILE_WIDTH, TileKind, TilePath};
use super::reader::{TreeError, TreeReader};
use super::storage::{StorageError, TileStorage};

/// What a repair did, for the event that says so.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Repaired {
    /// What was wrong, if that had been written down.
    pub breach: Option<Breach>,
    /// The signed tree that the new log has all events of.
    pub head: TreeHead,
    /// How many events were written. The others were there, from a repair that was cut off.
    pub restored: u64,
    /// How many of the signed events stand for recorded gaps.
    pub gaps: u64,
    /// The new log.
    pub identity: String,
    /// The log that it takes the place of.
    pub replaces: Option<String>,
}

/// Why a log could not be restored.
#[derive(Debug, thiserror::Error)]
pub enum RepairError {
    /// There is no signed tree to restore from.
    #[error("there is no published checkpoint, so there is nothing to restore")]
    NothingSigned,
    /// The checkpoint cannot be believed.
    #[error("what is published cannot be restored from")]
    Checkpoint(#[from] CheckpointError),
    /// The tiles cannot be read, or are damaged. Nothing was written.
    #[error("the tiles cannot be restored from")]
    Tree(#[from] TreeError),
    /// The entries are not those that were signed. Nothing was written.
    #[error(
        "the entries do not lead to the signed root of {size} events; restore the folder of tiles from a backup"
    )]
    NotSigned {
        /// Size of the signed tree.
        size: u64,
    },
    /// A tile of hashes is not what was signed, so that the next notary would not start. Nothing was
    /// written.
    #[error(
        "{path} does not follow from the signed entries; restore the folder of tiles from a backup"
    )]
    TreeDamaged {
        /// The first that does not.
        path: TilePath,
    },
    /// The new log is the one that was signed, which is kept as it is. One that a repair wrote and
    /// that has all signed events is taken, for a repair that was cut off goes on.
    #[error("{identity} is the log that is to be replaced; give a new, empty one")]
    SameLog {
        /// It.
        identity: String,
    },
    /// The new log has other events.
    #[error("the new log has another event at {position}; give a new, empty one")]
    TargetDiffers {
        /// The first that is another.
        position: Position,
    },
    /// Somebody else writes to the new log, or it does not give positions in order.
    #[error(
        "the event of {wanted} was given {found} by the new log: somebody else writes to it; start again with a new one"
    )]
    Displaced {
        /// Where it belongs.
        wanted: Position,
        /// Where it is.
        found: Position,
    },
    /// The new log cannot be read.
    #[error("the new log cannot be read")]
    Read(#[from] ReadError),
    /// The new log takes no events. Run the repair again to go on from here.
    #[error("the new log takes no events")]
    Append(#[from] AppendError),
    /// The folder of tiles cannot be used.
    #[error(transparent)]
    State(#[from] StateError),
}

impl From<StorageError> for RepairError {
    fn from(error: StorageError) -> Self {
        Self::State(error.into())
    }
}

/// Writes every signed event into a new log, at the position that it had, and makes that log the
/// one that the tree is of. What was cut off goes on where it stopped, when it is called again.
///
/// No notary may run. All is read and checked against the signed root before anything is written.
/// Events that the old log has beyond the signed ones are not taken over: nobody can say whether
/// they are what they were. Recorded gaps become events of no aggregate, which folds skip.
///
/// The breach still stands when this has returned. Append an event that says what was done, and do
/// what else is to be done before the new log may be used; [`clear_breach`] comes last.
pub async fn repair(
    storage: &dyn TileStorage,
    keys: &KeyRing,
    target: &dyn EventLog,
) -> Result<Repaired, RepairError> {
    let (head, published) = signed_heads(storage, keys).await?;
    let history = LogHistory::read(storage).await?;
    let info = target.info().await?;
    let breach = read_breach(storage).await?;
    // By a repair that was cut off afterwards, or when it was made.
    let is_bound = history.identity() == Some(&*info.identity);
    let same_log = || RepairError::SameLog {
        identity: info.identity.clone(),
    };
    if is_bound && !history.is_restored() {
        return Err(same_log());
    }
    let tree = TreeReader::new(storage, head.size);
    check_entries(&tree, &head, &published).await?;
    // Only the embedded log promises positions in the order in which it was called.
    let at_once = if info.backend == "embedded" { 256 } else { 1 };
    let replaces = if is_bound {
        history.before()
    } else {
        history.identity()
    };
    let mut done = Repaired {
        breach,
        head,
        restored: 0,
        gaps: 0,
        replaces: replaces.map(str::to_owned),
        identity: info.identity.clone(),
    };
    let there = target.head().await?;
    if is_bound && there.0 < head.size {
        return Err(same_log());
    }
    if !is_bound && there.0 > head.size {
        return Err(RepairError::TargetDiffers {
            position: Position(head.size + 1),
        });
    }
    let mut ids = HashSet::new();
    for bundle in 0..head.size.div_ceil(TILE_WIDTH) {
        let before = bundle * TILE_WIDTH;
        let entries = tree.entries(bundle).await?;
        let placed: Vec<_> = entries
            .into_iter()
            .zip(before + 1..)
            .map(|(entry, position)| Placed::new(Position(position), entry, &mut ids))
            .collect();
        let gaps = placed.iter().filter(|p| is_gap(p.position, &p.entry));
        done.gaps += gaps.count() as u64;
        let (old, new) = placed.split_at(placed.partition_point(|p| p.position <= there));
        match compare(target, old).await {
            // It was damaged since it was restored.
            Err(
                RepairError::TargetDiffers { .. }
                | RepairError::Read(ReadError::Damaged { .. } | ReadError::Missing { .. }),
            ) if is_bound => return Err(same_log()),
            compared => compared?,
        }
        for chunk in new.chunks(at_once) {
            write(target, chunk).await?;
            done.restored += chunk.len() as u64;
        }
    }
    if !is_bound {
        let beyond = tiles_beyond(storage, head.size).await?;
        let beyond = beyond.iter().map(TilePath::to_string).collect();
        storage.remove(beyond).await?;
        history.bind_restored(storage, &done.identity).await?;
    }
    Ok(done)
}

/// Forgets the breach, so that the log may be used: the last step of a repair.
pub async fn clear_breach(storage: &dyn TileStorage) -> Result<(), StateError> {
    Ok(storage
        .remove(vec![DOUBT.to_owned(), BREACH.to_owned()])
        .await?)
}

/// Why a breach stands.
#[derive(Debug, thiserror::Error)]
pub enum RecheckError {
    /// Something is wrong still.
    #[error("{} ({})", .0.message, .0.code)]
    Breach(Breach),
    /// It cannot be said now; trying again later may help.
    #[error("the log cannot be compared now: {0}")]
    Unavailable(String),
    /// The tiles cannot be used.
    #[error(transparent)]
    Tiles(RepairError),
}

impl From<Mismatch> for RecheckError {
    fn from(mismatch: Mismatch) -> Self {
        match mismatch {
            Mismatch::Breach(breach) => Self::Breach(breach),
            Mismatch::Short { head, size } => Self::Breach(truncated(head, size)),
            Mismatch::Passing(reason) => Self::Unavailable(reason),
        }
    }
}

impl From<RepairError> for RecheckError {
    fn from(error: RepairError) -> Self {
        let what = match &error {
            RepairError::Tree(error) if error.is_damage() => error.to_string(),
            RepairError::NotSigned { size } => {
                format!("the entries do not lead to the signed root of {size} events")
            }
            RepairError::TreeDamaged { path } => {
                format!("{path} does not follow from the signed entries")
            }
            _ => return Self::Tiles(error),
        };
        Self::Breach(tree_damaged(None, what))
    }
}

impl From<StateError> for RecheckError {
    fn from(error: StateError) -> Self {
        Self::Tiles(error.into())
    }
}

/// Compares all of the log with all that was signed, and changes nothing. Returns the signed tree.
///
/// What is not signed yet has to be readable, and to be what a notary may have stored of it before it
/// died: the next one goes on from there. It takes as long as reading the whole log.
pub async fn compare_log(
    storage: &dyn TileStorage,
    keys: &KeyRing,
    log: &dyn EventLog,
) -> Result<TreeHead, RecheckError> {
    let (head, published) = signed_heads(storage, keys).await?;
    let tree = TreeReader::new(storage, head.size);
    let growth = check_entries(&tree, &head, &published).await?;
    let of_log = |error| judge_read_error(error, head.size);
    let identity = log.info().await.map_err(of_log)?.identity;
    let history = LogHistory::read(storage).await?;
    if let Some(bound) = history.identity().filter(|bound| *bound != identity) {
        return Err(RecheckError::Breach(replaced(&identity, bound)));
    }
    let there = log.head().await.map_err(of_log)?;
    if there.0 < head.size {
        return Err(RecheckError::Breach(truncated(there, head.size)));
    }
    for bundle in 0..head.size.div_ceil(TILE_WIDTH) {
        compare_bundle(log, &tree, bundle).await?;
    }
    compare_unsigned(storage, growth, log, there).await?;
    Ok(head)
}

/// Compares as [`compare_log`] does, and forgets a breach if nothing is wrong: for when the true log,
/// or the folder of tiles, was brought back. Returns the signed tree and the breach that was
/// forgotten, if there was one. Where something else is wrong by now, that takes its place.
///
/// No notary may run.
pub async fn recheck(
    storage: &dyn TileStorage,
    keys: &KeyRing,
    log: &dyn EventLog,
) -> Result<(TreeHead, Option<Breach>), RecheckError> {
    let breach = read_breach(storage).await?;
    let compared = compare_log(storage, keys, log).await;
    if let (Some(known), Err(RecheckError::Breach(found))) = (&breach, &compared)
        && known != found
    {
        // Where it is not taken, what was known still stops appends.
        let _ = write_breach(storage, found).await;
    }
    let head = compared?;
    clear_breach(storage).await?;
    Ok((head, breach))
}

/// Compares what the log has behind the signed events with what was stored of it.
async fn compare_unsigned(
    storage: &dyn TileStorage,
    mut growth: Growth,
    log: &dyn EventLog,
    there: Position,
) -> Result<(), RecheckError> {
    let size = growth.size();
    let stored = tiles_beyond(storage, size).await?;
    for position in (size + 1..=there.0).map(Position) {
        let entry = match log.get(position).await {
            Ok(Some(recorded)) => event_entry(position, &recorded.bytes),
            Ok(None) | Err(ReadError::Missing { .. }) => gap_entry(position),
            Err(error) => return Err(judge_read_error(error, size).into()),
        };
        let grown = growth.push(entry).and_then(|()| growth.files());
        // An entry is as small as an event may be.
        let grown = grown.unwrap_or_default();
        growth.stored();
        for (path, bytes) in grown.into_iter().filter(|(path, _)| stored.contains(path)) {
            let path = path.to_string();
            let found = storage.get(&path).await;
            let found = found.map_err(|error| RecheckError::Unavailable(error.to_string()))?;
            if found.is_some_and(|found| found != bytes) {
                return Err(RecheckError::Breach(unsigned_differs(&path, size)));
            }
        }
    }
    Ok(())
}

/// The newest head that may have been signed, and the one that is published.
async fn signed_heads(
    storage: &dyn TileStorage,
    keys: &KeyRing,
) -> Result<(TreeHead, TreeHead), RepairError> {
    let read = storage.get(CHECKPOINT).await;
    let note = read.map_err(|source| StateError::Io {
        path: CHECKPOINT.to_owned(),
        source,
    })?;
    let note = note.ok_or(RepairError::NothingSigned)?;
    let published = Checkpoint::open(&note, keys.origin(), keys.verifiers())?.head;
    let claimed = ClaimedHead::newest(storage).await?;
    Ok((claimed.map_or(published, |claimed| claimed.head), published))
}

/// That all entries together have the signed roots, and that all hashes are theirs. Returns the tree
/// that they lead to.
async fn check_entries(
    tree: &TreeReader<'_>,
    head: &TreeHead,
    published: &TreeHead,
) -> Result<Growth, RepairError> {
    let mut growth = Growth::empty();
    let mut seen = growth.head() == *published;
    let mut damaged = None;
    for bundle in 0..head.size.div_ceil(TILE_WIDTH) {
        for entry in tree.entries(bundle).await? {
            // What was read from a bundle fits into one.
            let _ = growth.push(entry);
            seen |= growth.size() == published.size && growth.head() == *published;
        }
        for (path, bytes) in growth.files().unwrap_or_default() {
            // Narrower ones are not there any more, but for those at the end.
            let is_there = path.is_full() || growth.size() == head.size;
            if let (TileKind::Hashes { level }, true) = (path.kind, is_there)
                && tree.hashes(level, path.index).await?.as_flattened() != bytes
            {
                damaged.get_or_insert(path);
            }
        }
        growth.stored();
    }
    if !seen || growth.head() != *head {
        return Err(RepairError::NotSigned { size: head.size });
    }
    match damaged {
        Some(path) => Err(RepairError::TreeDamaged { path }),
        None => Ok(growth),
    }
}

/// An entry, and how it is stored.
struct Placed {
    position: Position,
    entry: Bytes,
    subject: Subject,
    id: EventId,
}

impl Placed {
    /// A log takes an id for the same event once. One that had it twice all the same, as it forgot
    /// the first or was written to past Daybook, gets the second under an id of its position: what
    /// is stored are the same bytes.
    fn new(position: Position, entry: Bytes, ids: &mut HashSet<EventId>) -> Self {
        let (subject, mut id) = address(position, &entry);
        if !ids.insert(id) {
            id = id_at(position, &entry);
        }
        Self {
            position,
            entry,
            subject,
            id,
        }
    }
}

/// That a repair that was cut off wrote these.
async fn compare(target: &dyn EventLog, events: &[Placed]) -> Result<(), RepairError> {
    for Placed {
        position, entry, ..
    } in events
    {
        let found = target.get(*position).await?;
        if found.is_none_or(|found| event_entry(*position, &found.bytes) != *entry) {
            let position = *position;
            return Err(RepairError::TargetDiffers { position });
        }
    }
    Ok(())
}

async fn write(target: &dyn EventLog, events: &[Placed]) -> Result<(), RepairError> {
    let appended = join_all(events.iter().map(|placed| {
        target.append(Append {
            subject: placed.subject.clone(),
            id: placed.id,
            expected: Expected::Any,
            bytes: placed.entry.clone(),
        })
    }));
    for (appended, placed) in appended.await.into_iter().zip(events) {
        let (wanted, found) = (placed.position, appended?.position);
        if found != wanted {
            return Err(RepairError::Displaced { wanted, found });
        }
    }
    Ok(())
}

/// The subject and id of an event are in its bytes. What is no event gets some of its own.
pub(super) fn address(position: Position, entry: &[u8]) -> (Subject, EventId) {
    let of_event = || -> Option<_> {
        let event = Event::from_bytes(entry).ok()?;
        let subject = subject_in(&event)?;
        Some((subject, event.id))
    };
    of_event().unwrap_or_else(|| {
        let subject = format!("{PREFIX}.ledger._.entry.{position}");
        (Subject::Other(subject), id_at(position, entry))
    })
}

/// An id that an entry has at this position only.
fn id_at(position: Position, entry: &[u8]) -> EventId {
    let name = [position.to_string().as_bytes(), b"\n", entry].concat();
    EventId(Uuid::new_v5(&Uuid::NAMESPACE_OID, &name))
}

/// The subject that an event says it has.
pub(super) fn subject_in(event: &Event) -> Option<Subject> {
    let text = format!("{PREFIX}.{}", event.subject.replace('/', "."));
    Subject::from_str(&text).ok()
}

/// Tiles that a notary wrote for events that it did not come to sign.
async fn tiles_beyond(
    storage: &dyn TileStorage,
    size: u64,
) -> Result<HashSet<TilePath>, StateError> {
    let mut beyond = HashSet::new();
    for kind in storage.list("tile").await? {
        let mut folders = vec![format!("tile/{kind}")];
        while let Some(folder) = folders.pop() {
            for name in storage.list(&folder).await? {
                let path = format!("{folder}/{name}");
                match path.parse::<TilePath>() {
                    Ok(tile) if is_beyond(tile, size) => {
                        beyond.insert(tile);
                    }
                    Ok(_) => {}
                    Err(_) => folders.push(path),
                }
            }
        }
    }
    Ok(beyond)
}

fn is_beyond(tile: TilePath, size: u64) -> bool {
    TilePath::in_tree(tile.kind, tile.index, size)
        .is_none_or(|signed| signed.width() < tile.width())
}

/// Whether a breach is one that [`repair`] is for: the tiles themselves must be sound.
pub fn is_repairable(breach: &Breach) -> bool {
    breach.code != codes::TREE_DAMAGED
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_tiles_beyond_the_signed_size_are_discarded() {
        let entries = TileKind::Entries;
        let tile = |index, size| TilePath::in_tree(entries, index, size).unwrap();
        assert!(!is_beyond(tile(0, 256), 300) && !is_beyond(tile(1, 300), 300));
        assert!(is_beyond(tile(1, 301), 300) && is_beyond(tile(2, 600), 300));
        assert!(is_beyond(tile(1, 512), 300) && !is_beyond(tile(1, 257), 300));
    }

    #[test]
    fn what_is_no_event_belongs_to_no_aggregate() {
        let (subject, id) = address(Position(7), b"daybook.dev/gap/v1\n7\n");
        assert_eq!(subject.to_string(), "daybook.ev.ledger._.entry.7");
        assert_eq!(subject.to_string().parse(), Ok(subject));
        assert_eq!(id, address(Position(7), b"daybook.dev/gap/v1\n7\n").1);
        assert_ne!(id, address(Position(8), b"daybook.dev/gap/v1\n7\n").1);
    }
}
