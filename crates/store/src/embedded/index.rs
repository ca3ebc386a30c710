//! Which ids and which aggregates stand where: derived from the segments, and never more than a
//! help. It can be deleted at any time; the next start makes it again.
//!
//! What was appended lately is indexed in memory. In rounds of [`ROUND_EVENTS`] events it moves to tables
//! on disk (fjall), written in one sorted run, so that an append never waits for an index.

use std::collections::hash_map::Entry;
use std::collections::{BTreeSet, HashMap};
use std::fs;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use daybook_events::log::ReadError;
use fjall::{Database, Keyspace, KeyspaceCreateOptions, PersistMode};
use uuid::Uuid;

use super::OpenError;
use super::segment::Segments;

/// Events a round: what a start reads again at most, and what memory holds twice at most.
pub(super) const ROUND_EVENTS: usize = 65_536;
/// Aggregates that memory knows when a round ends and forgets if they are more.
const SUBJECTS_KEPT: usize = 100_000;

/// Keys of the tables, in the order in which a round writes them.
const KEY_UPTO: &[u8] = b"a";
const KEY_IDENTITY: &[u8] = b"b";
const PREFIX_ID: u8 = b'i';
const PREFIX_SUBJECT: u8 = b's';

/// What the index could not answer.
#[derive(Debug, thiserror::Error)]
pub(super) enum IndexError {
    /// The tables failed.
    #[error("the index of the log cannot be read or written")]
    Tables(#[from] fjall::Error),
    /// The log was closed meanwhile.
    #[error("the log is closed")]
    Closed,
    /// An entry has another shape than was written.
    #[error("the index of the log is damaged; stop Daybook and delete its folder `index`")]
    Damaged,
}

impl From<IndexError> for ReadError {
    fn from(error: IndexError) -> Self {
        let source = std::error::Error::source(&error);
        Self::Unavailable(source.map_or_else(|| error.to_string(), |s| format!("{error}: {s}")))
    }
}

/// What is indexed in memory.
#[derive(Debug, Default)]
struct Recent {
    /// Ids of events that are in no round yet.
    ids: HashMap<Uuid, u64>,
    /// The round that is on its way to the tables.
    moving: Option<Arc<Round>>,
    subjects: HashMap<Arc<str>, Known>,
}

/// What memory knows of an aggregate.
#[derive(Debug, Default)]
struct Known {
    /// Position of its last event; 0 if it has none.
    last: u64,
    /// Positions of those of its events that are not in the tables.
    recent: Vec<u64>,
}

/// Events on their way to the tables.
#[derive(Debug)]
pub(super) struct Round {
    upto: u64,
    ids: HashMap<Uuid, u64>,
    subjects: Vec<(Arc<str>, Vec<u64>)>,
}

/// The tables on disk.
#[derive(Clone)]
struct Tables {
    /// Keeps the tables' own threads alive.
    _db: Database,
    keys: Keyspace,
}

/// The index of one log.
pub(super) struct Index {
    path: PathBuf,
    /// Events a round.
    round: usize,
    recent: RwLock<Recent>,
    tables: RwLock<Option<Tables>>,
    /// Up to where the tables reach; 0 if they are empty.
    upto: AtomicU64,
}

impl std::fmt::Debug for Index {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Index")
            .field("path", &self.path)
            .finish_non_exhaustive()
    }
}

impl Index {
    /// Opens the index of a log and brings it up to the log's end. One that belongs to another
    /// log, or that cannot be opened, is made anew.
    pub(super) fn open(path: &Path, segments: &Segments, round: usize) -> Result<Self, OpenError> {
        let last = segments.last();
        let (tables, mut upto) = match Tables::open(path, segments.identity(), last) {
            Ok(opened) => opened,
            Err(error) => {
                if path.exists() {
                    tracing::warn!(path = %path.display(), %error, "index is made anew");
                }
                let failed = |source| OpenError::Io {
                    path: path.to_owned(),
                    source,
                };
                match fs::remove_dir_all(path) {
                    Err(e) if e.kind() != std::io::ErrorKind::NotFound => return Err(failed(e)),
                    _ => {}
                }
                Tables::open(path, segments.identity(), last)
                    .map_err(|e| failed(std::io::Error::other(e)))?
            }
        };
        let index = Self {
            path: path.to_owned(),
            round: round.max(1),
            recent: RwLock::default(),
            tables: RwLock::new(Some(tables)),
            upto: AtomicU64::new(upto),
        };
        while upto < last {
            upto = index.load(segments, upto + 1)?;
            if let Some(round) = index.start_round() {
                index
                    .finish_round(&round, segments.identity())
                    .map_err(|e| OpenError::Io {
                        path: path.to_owned(),
                        source: std::io::Error::other(e),
                    })?;
            }
        }
        Ok(index)
    }

    /// Indexes at most a round of stored events in memory, and returns the last one's position.
    fn load(&self, segments: &Segments, from: u64) -> Result<u64, OpenError> {
        let mut recent = self.recent_mut();
        let upto = from + self.round as u64 - 1;
        let mut last = 0;
        segments
            .visit(from, upto, |record| {
                last = record.position;
                recent.ids.entry(record.id).or_insert(last);
                recent.known(record.subject).push(last);
                ControlFlow::Continue(())
            })
            .map_err(|e| OpenError::from_read(segments.dir(), e))?;
        // The tables may know more events of these aggregates, but none that is later.
        Ok(last)
    }

    fn recent(&self) -> RwLockReadGuard<'_, Recent> {
        self.recent.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn recent_mut(&self) -> RwLockWriteGuard<'_, Recent> {
        self.recent.write().unwrap_or_else(PoisonError::into_inner)
    }

    fn tables(&self) -> Result<Tables, IndexError> {
        let tables = self.tables.read().unwrap_or_else(PoisonError::into_inner);
        tables.clone().ok_or(IndexError::Closed)
    }

    /// Looks an id up in the tables, for [`Group::decide`]. This is the part of an append that
    /// may read from disk, so that each writer does it for itself.
    pub(super) fn look_up(&self, id: Uuid) -> Result<LookedUp, IndexError> {
        let upto = self.upto.load(Ordering::Acquire);
        let position = match upto {
            0 => None,
            _ => match self.tables()?.keys.get(id_key(id))? {
                Some(value) => Some(number(&value)?),
                None => None,
            },
        };
        Ok(LookedUp { upto, position })
    }

    /// The position of the last event of an aggregate that memory does not know.
    fn last_in_tables(&self, subject: &str) -> Result<u64, IndexError> {
        if self.upto.load(Ordering::Acquire) == 0 {
            return Ok(0);
        }
        let keys = self.tables()?.keys;
        match keys.prefix(subject_prefix(subject)).next_back() {
            Some(entry) => entry
                .key()?
                .last_chunk()
                .map(|b| u64::from_be_bytes(*b))
                .ok_or(IndexError::Damaged),
            None => Ok(0),
        }
    }

    /// The positions of all events of an aggregate, in order, perhaps with some that are not
    /// stored yet.
    pub(super) fn positions_of(&self, subject: &str) -> Result<Vec<u64>, IndexError> {
        // What is in memory is read first, so that a round that ends meanwhile is seen twice
        // rather than not at all.
        let recent = {
            let recent = self.recent();
            recent.subjects.get(subject).map(|k| k.recent.clone())
        };
        let mut positions = BTreeSet::from_iter(recent.into_iter().flatten());
        if self.upto.load(Ordering::Acquire) > 0 {
            for entry in self.tables()?.keys.prefix(subject_prefix(subject)) {
                let value = entry.value()?;
                let (numbers, []) = value.as_chunks::<8>() else {
                    return Err(IndexError::Damaged);
                };
                positions.extend(numbers.iter().map(|b| u64::from_be_bytes(*b)));
            }
        }
        Ok(positions.into_iter().collect())
    }

    /// Begins a group of appends. Others wait for it to be decided, so that it must be short.
    pub(super) fn group(&self) -> Group<'_> {
        Group {
            index: self,
            recent: self.recent_mut(),
        }
    }

    /// Forgets what was accepted and could not be stored: all after a position.
    pub(super) fn forget<'a>(
        &self,
        after: u64,
        accepted: impl IntoIterator<Item = (Uuid, &'a str)>,
    ) {
        let mut recent = self.recent_mut();
        for (id, subject) in accepted {
            recent.ids.remove(&id);
            // What the aggregate's last event is now may be in the tables only.
            if let Some(known) = recent.subjects.get_mut(subject) {
                known.recent.retain(|p| *p <= after);
                if let Some(last) = known.recent.last() {
                    known.last = *last;
                } else {
                    recent.subjects.remove(subject);
                }
            }
        }
    }

    /// Takes what is in memory for a round, unless there is too little or a round is under way.
    /// All that is in memory must be stored.
    pub(super) fn start_round(&self) -> Option<Arc<Round>> {
        let mut recent = self.recent_mut();
        if recent.moving.is_some() || recent.ids.len() < self.round {
            return None;
        }
        let ids = std::mem::take(&mut recent.ids);
        let subjects: Vec<_> = recent
            .subjects
            .iter()
            .filter(|(_, known)| !known.recent.is_empty())
            .map(|(subject, known)| (Arc::clone(subject), known.recent.clone()))
            .collect();
        let round = Arc::new(Round {
            upto: ids.values().copied().max().unwrap_or_default(),
            ids,
            subjects,
        });
        recent.moving = Some(Arc::clone(&round));
        Some(round)
    }

    /// Writes a round to the tables. After an error the same round can be tried again.
    pub(super) fn finish_round(&self, round: &Round, identity: Uuid) -> Result<(), IndexError> {
        let tables = self.tables()?;
        let mut run = tables.keys.start_ingestion()?;
        run.write(KEY_UPTO, round.upto.to_be_bytes())?;
        run.write(KEY_IDENTITY, identity.into_bytes())?;
        let mut ids: Vec<_> = round.ids.iter().collect();
        ids.sort_unstable();
        for (id, position) in ids {
            run.write(id_key(*id), position.to_be_bytes())?;
        }
        let mut subjects: Vec<_> = round
            .subjects
            .iter()
            .filter_map(|(subject, positions)| {
                let mut key = subject_prefix(subject);
                key.extend_from_slice(&positions.last()?.to_be_bytes());
                Some((key, positions))
            })
            .collect();
        subjects.sort_unstable();
        for (key, positions) in subjects {
            let value: Vec<u8> = positions.iter().flat_map(|p| p.to_be_bytes()).collect();
            run.write(key, value)?;
        }
        run.finish()?;
        let mut recent = self.recent_mut();
        self.upto.store(round.upto, Ordering::Release);
        recent.moving = None;
        let full = recent.subjects.len() > SUBJECTS_KEPT;
        recent.subjects.retain(|_, known| {
            known.recent.retain(|p| *p > round.upto);
            !(full && known.recent.is_empty())
        });
        Ok(())
    }

    /// Lets go of the files.
    pub(super) fn close(&self) {
        let mut tables = self.tables.write().unwrap_or_else(PoisonError::into_inner);
        *tables = None;
    }
}

impl Recent {
    fn known(&mut self, subject: &str) -> &mut Known {
        // Not `entry`: that would copy the subject each time.
        if !self.subjects.contains_key(subject) {
            self.subjects.insert(subject.into(), Known::default());
        }
        match self.subjects.get_mut(subject) {
            Some(known) => known,
            None => unreachable!("it was inserted just now"),
        }
    }
}

impl Known {
    fn push(&mut self, position: u64) {
        self.last = position;
        self.recent.push(position);
    }
}

/// What the tables said about an id.
#[derive(Debug, Clone, Copy)]
pub(super) struct LookedUp {
    /// Up to where they reached then.
    upto: u64,
    position: Option<u64>,
}

/// What an append may do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Decision {
    /// It is to be stored.
    Accepted,
    /// Its id stands at this position already.
    Duplicate(u64),
    /// The aggregate's last event is at this position and not where it was expected.
    Conflict(u64),
}

/// A group of appends that is being decided on.
pub(super) struct Group<'a> {
    index: &'a Index,
    recent: RwLockWriteGuard<'a, Recent>,
}

impl Group<'_> {
    /// Decides on an append that would get `position`, and remembers it if it is accepted.
    pub(super) fn decide(
        &mut self,
        position: u64,
        id: Uuid,
        looked_up: LookedUp,
        subject: &str,
        expected: Option<u64>,
    ) -> Result<Decision, IndexError> {
        let looked_up = match looked_up.upto == self.index.upto.load(Ordering::Acquire) {
            true => looked_up.position,
            // A round ended in between, and the id may have been in it.
            false => self.index.look_up(id)?.position,
        };
        let recent = &mut *self.recent;
        let moving = || recent.moving.as_ref()?.ids.get(&id).copied();
        if let Some(first) = looked_up.or_else(moving) {
            return Ok(Decision::Duplicate(first));
        }
        let free = match recent.ids.entry(id) {
            Entry::Occupied(first) => return Ok(Decision::Duplicate(*first.get())),
            Entry::Vacant(free) => free,
        };
        if let Some(known) = recent.subjects.get_mut(subject) {
            if expected.is_some_and(|e| e != known.last) {
                return Ok(Decision::Conflict(known.last));
            }
            known.push(position);
        } else {
            let last = self.index.last_in_tables(subject)?;
            let mut known = Known {
                last,
                recent: Vec::new(),
            };
            let conflict = expected.is_some_and(|e| e != last);
            if !conflict {
                known.push(position);
            }
            recent.subjects.insert(subject.into(), known);
            if conflict {
                return Ok(Decision::Conflict(last));
            }
        }
        free.insert(position);
        Ok(Decision::Accepted)
    }
}

impl Tables {
    /// Opens the tables and says up to where they reach.
    fn open(path: &Path, identity: Uuid, last: u64) -> Result<(Self, u64), IndexError> {
        let db = Database::builder(path)
            .worker_threads(2)
            .cache_size(8 << 20)
            .open()?;
        let keys = db.keyspace("index", KeyspaceCreateOptions::default)?;
        db.persist(PersistMode::SyncAll)?;
        let upto = match keys.get(KEY_UPTO)? {
            Some(value) => number(&value)?,
            None => 0,
        };
        let owner = keys.get(KEY_IDENTITY)?;
        if upto > last || owner.is_some_and(|o| *o != *identity.as_bytes()) {
            return Err(IndexError::Damaged);
        }
        Ok((Self { _db: db, keys }, upto))
    }
}

fn id_key(id: Uuid) -> [u8; 17] {
    let mut key = [PREFIX_ID; 17];
    key[1..].copy_from_slice(id.as_bytes());
    key
}

/// No subject is the beginning of another one with a zero byte behind it.
fn subject_prefix(subject: &str) -> Vec<u8> {
    let mut key = Vec::with_capacity(subject.len() + 10);
    key.push(PREFIX_SUBJECT);
    key.extend_from_slice(subject.as_bytes());
    key.push(0);
    key
}

fn number(value: &[u8]) -> Result<u64, IndexError> {
    match value.try_into() {
        Ok(bytes) => Ok(u64::from_be_bytes(bytes)),
        Err(_) => Err(IndexError::Damaged),
    }
}
