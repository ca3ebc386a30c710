//! Comparing the log with what was signed.

use std::fmt;
use std::sync::Arc;

use bytes::Bytes;
use daybook_events::log::{EventLog, ReadError, Recorded};
use daybook_events::subject::SubjectFilter;
use daybook_events::tree::Breach;
use daybook_events::with_causes;
use daybook_events::{Event, Position};

use super::hash::{Hash, complete_root, leaf_hash};
use super::leaf::{event_entry, gap_entry};
use super::ledger_state::codes;
use super::path::TILE_WIDTH;
use super::reader::{TreeError, TreeReader};
use super::repair::subject_in;

/// Why a comparison did not end well.
#[derive(Debug)]
pub(super) enum Mismatch {
    /// The log or the tree is not what was signed.
    Breach(Breach),
    /// The log looks shorter than what was signed. Whether it is shows only if that lasts.
    Short {
        /// Where it seems to end.
        head: Position,
        /// How many events were signed.
        size: u64,
    },
    /// It cannot be said now.
    Passing(String),
}

impl From<Breach> for Mismatch {
    fn from(breach: Breach) -> Self {
        Self::Breach(breach)
    }
}

fn passing(error: impl fmt::Display) -> Mismatch {
    Mismatch::Passing(error.to_string())
}

const REPAIR: &str = "stop all writers, keep the present log aside, and run `daybook ledger repair`, \
                      which restores the signed events from the tiles into a new log";

pub(super) fn truncated(head: Position, size: u64) -> Breach {
    Breach {
        code: codes::TRUNCATED,
        position: Some(head.next()),
        message: format!("the log ends at {head}, although {size} events were signed"),
        remedy: REPAIR.to_owned(),
    }
}

pub(super) fn replaced(found: &str, bound: &str) -> Breach {
    Breach {
        code: codes::REPLACED,
        position: None,
        message: format!("the log is {found}, and what was signed is of {bound}"),
        remedy: format!(
            "point Daybook at the log that was signed and run `daybook ledger recheck`; if that log \
             is lost, {REPAIR}"
        ),
    }
}

pub(super) fn differs(position: Position, what: impl fmt::Display) -> Breach {
    Breach {
        code: codes::DIFFERS,
        position: Some(position),
        message: format!("the event at {position} is not the one that was signed: {what}"),
        remedy: REPAIR.to_owned(),
    }
}

/// A tile stands for events that followed on the signed ones when it was stored.
pub(super) fn unsigned_differs(path: &str, signed: u64) -> Breach {
    let what =
        format!("{path} was written for other events than the log has now; it was not signed yet");
    differs(Position(signed + 1), what)
}

fn damaged(position: Position, what: impl fmt::Display) -> Breach {
    Breach {
        code: codes::DAMAGED,
        position: Some(position),
        message: format!("the event at {position}, which was not signed yet, is damaged: {what}"),
        remedy: "restore the log from a replica or a backup that has this event and run `daybook \
                 ledger recheck`; if there is none, `daybook ledger repair` restores those before it"
            .to_owned(),
    }
}

pub(super) fn tree_damaged(position: Option<Position>, what: impl fmt::Display) -> Breach {
    Breach {
        code: codes::TREE_DAMAGED,
        position,
        message: format!("the tiles are not what was signed: {what}"),
        remedy:
            "restore the folder of tiles from a backup and run `daybook ledger recheck`; nothing \
                 that was signed is made anew from the log"
                .to_owned(),
    }
}

/// What an error of the log means where `size` events were signed.
pub(super) fn judge_read_error(error: ReadError, size: u64) -> Mismatch {
    let (position, reason) = match error {
        ReadError::Damaged { position, reason } => (position, reason),
        ReadError::Missing { position } => (position, "it is missing".to_owned()),
        other => return passing(other),
    };
    Mismatch::Breach(match position {
        Position::ZERO => Breach {
            message: reason,
            ..replaced("another", "another")
        },
        signed if signed.0 <= size => differs(signed, reason),
        new => damaged(new, reason),
    })
}

pub(super) fn judge_tree_error(error: TreeError, position: Option<Position>) -> Mismatch {
    if error.is_damage() {
        return Mismatch::Breach(tree_damaged(position, error));
    }
    Mismatch::Passing(with_causes(&error))
}

/// Whether the log has an event under another subject than its bytes say. The subject is not
/// signed by itself, and folds go by it.
fn is_displaced(recorded: &Recorded) -> bool {
    Event::from_bytes(&recorded.bytes)
        .is_ok_and(|event| subject_in(&event).as_ref() != Some(&recorded.subject))
}

/// The entry that the log has for a signed position: an event, or the gap that was recorded.
async fn entry_at(log: &dyn EventLog, position: Position, size: u64) -> Result<Bytes, Mismatch> {
    match log.get(position).await {
        Ok(Some(recorded)) if is_displaced(&recorded) => {
            let what = format!("it stands under the subject {}", recorded.subject);
            Err(differs(position, what).into())
        }
        Ok(Some(recorded)) => Ok(event_entry(position, &recorded.bytes)),
        // Compared with what was signed, this is right only where a gap was.
        Ok(None) | Err(ReadError::Missing { .. }) => Ok(gap_entry(position)),
        Err(error) => Err(judge_read_error(error, size)),
    }
}

/// Compares one event with its leaf.
pub(super) async fn compare_event(
    log: &dyn EventLog,
    position: Position,
    leaf: &Hash,
    size: u64,
) -> Result<(), Mismatch> {
    let entry = entry_at(log, position, size).await?;
    if leaf_hash(&entry) == *leaf {
        return Ok(());
    }
    if entry != gap_entry(position) {
        return Err(differs(position, "its bytes hash to another leaf").into());
    }
    // Nothing is there. Perhaps nothing follows, either.
    let head = log.head().await.map_err(|e| judge_read_error(e, size))?;
    if head.0 < size {
        return Err(Mismatch::Short { head, size });
    }
    Err(differs(position, "it is missing").into())
}

/// Compares the events of one bundle with its leaves, its entries, and the tiles above.
pub(super) async fn compare_bundle(
    log: &dyn EventLog,
    tree: &TreeReader<'_>,
    index: u64,
) -> Result<(), Mismatch> {
    let before = Position(index * TILE_WIDTH);
    let first = Some(before.next());
    let of_tree = |error| judge_tree_error(error, first);
    let leaves = tree.hashes(0, index).await.map_err(of_tree)?;
    let entries = tree.entries(index).await.map_err(of_tree)?;
    for (number, (leaf, entry)) in leaves.iter().zip(&entries).enumerate() {
        if leaf_hash(entry) != *leaf {
            let position = Position(before.0 + number as u64 + 1);
            let what = format!("the entry of {position} does not hash to its leaf");
            return Err(tree_damaged(Some(position), what).into());
        }
    }
    compare_tiles(tree, index, &leaves).await?;
    compare_events(log, before, &leaves, tree.size()).await
}

/// Compares a full tile of leaves with the tile above, and each tile that ends with it with the one
/// above that: over a whole round, every full tile once.
async fn compare_tiles(
    tree: &TreeReader<'_>,
    index: u64,
    leaves: &Arc<[Hash]>,
) -> Result<(), Mismatch> {
    let first = Some(Position(index * TILE_WIDTH).next());
    let (mut level, mut index, mut hashes) = (0, index, Arc::clone(leaves));
    while hashes.len() as u64 == TILE_WIDTH
        && let Some(root) = complete_root(&hashes)
    {
        let above = tree.hashes(level + 1, index / TILE_WIDTH).await;
        let above = above.map_err(|error| judge_tree_error(error, first))?;
        let place = index % TILE_WIDTH;
        if above.get(place as usize) != Some(&root) {
            let what = format!("tile/{level} number {index} does not hash to the tile above it");
            return Err(tree_damaged(first, what).into());
        }
        if place + 1 < TILE_WIDTH {
            break;
        }
        (level, index, hashes) = (level + 1, index / TILE_WIDTH, above);
    }
    Ok(())
}

/// Compares the events after a position with their leaves.
async fn compare_events(
    log: &dyn EventLog,
    before: Position,
    leaves: &[Hash],
    size: u64,
) -> Result<(), Mismatch> {
    let all = SubjectFilter::default();
    let events = match log.read(before, &all, leaves.len()).await {
        Ok(events) => events,
        // Gaps are looked at one by one, and so is what cannot be read.
        Err(ReadError::Missing { .. } | ReadError::Damaged { .. }) => Vec::new(),
        Err(error) => return Err(judge_read_error(error, size)),
    };
    for (number, leaf) in leaves.iter().enumerate() {
        let position = Position(before.0 + number as u64 + 1);
        let same = events.get(number).is_some_and(|event| {
            event.position == position
                && !is_displaced(event)
                && leaf_hash(&event_entry(position, &event.bytes)) == *leaf
        });
        if !same {
            compare_event(log, position, leaf, size).await?;
        }
    }
    Ok(())
}
