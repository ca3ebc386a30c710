//! Which ids and which aggregates stand where: derived from the segments, and never more than a
//! help. It can be deleted at any time; the next start makes it again.
//!
//! What was appended lately is indexed in memory. In rounds of [`ROUND`] events it moves to tables
//! on disk (fjall), written in one sorted run, so that an append never waits for an index.

use std::collections::{BTreeSet, HashMap};
use std::fs;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use daybook_events::log::ReadError;
use fjall::{Database, Keyspace, KeyspaceCreateOptions, PersistMode};
use uuid::Uuid;

use super::OpenError;
use super::segment::Segments;

/// Events a round: what a start reads again at most, and what memory holds twice at most.
pub(super) const ROUND: usize = 65_536;
/// How many aggregates' last positions are kept in memory.
const LAST_KEPT: usize = 200_000;

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

/// What a span of the log says about ids and aggregates.
#[derive(Debug, Default)]
pub(super) struct Span {
    upto: u64,
    ids: HashMap<Uuid, u64>,
    subjects: HashMap<Arc<str>, Vec<u64>>,
}

impl Span {
    fn insert(&mut self, position: u64, id: Uuid, subject: &Arc<str>) {
        self.upto = position;
        self.ids.entry(id).or_insert(position);
        match self.subjects.get_mut(subject) {
            Some(positions) => positions.push(position),
            None => {
                self.subjects.insert(Arc::clone(subject), vec![position]);
            }
        }
    }
}

#[derive(Debug, Default)]
struct Recent {
    /// Being filled.
    active: Span,
    /// Full, and on its way to the tables.
    moving: Option<Arc<Span>>,
    /// Last position of aggregates that were appended to or asked for.
    last: HashMap<Arc<str>, u64>,
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
    recent: RwLock<Recent>,
    tables: RwLock<Option<Tables>>,
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
    pub(super) fn open(path: &Path, segments: &Segments) -> Result<Self, OpenError> {
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
            recent: RwLock::default(),
            tables: RwLock::new(Some(tables)),
        };
        while upto < last {
            index.load(segments, upto + 1)?;
            upto = index.recent().active.upto;
            if let Some(span) = index.start_round() {
                index
                    .finish_round(&span, segments.identity())
                    .map_err(|e| OpenError::Io {
                        path: path.to_owned(),
                        source: std::io::Error::other(e),
                    })?;
            }
        }
        Ok(index)
    }

    /// Indexes at most a round of events in memory.
    fn load(&self, segments: &Segments, from: u64) -> Result<(), OpenError> {
        let mut recent = self.recent_mut();
        let mut names: HashMap<String, Arc<str>> = HashMap::new();
        let mut count = 0;
        segments
            .visit(from, u64::MAX, ROUND, |record| {
                let subject = match names.get(record.subject) {
                    Some(name) => Arc::clone(name),
                    None => {
                        let name: Arc<str> = record.subject.into();
                        names.insert(record.subject.to_owned(), Arc::clone(&name));
                        name
                    }
                };
                recent
                    .active
                    .insert(record.position, record.id, &subject);
                count += 1;
                if count < ROUND {
                    ControlFlow::Continue(())
                } else {
                    ControlFlow::Break(())
                }
            })
            .map_err(|e| OpenError::from_read(&self.path, e))
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

    /// Where an id was stored first.
    pub(super) fn position_of(&self, id: Uuid) -> Result<Option<u64>, IndexError> {
        {
            let recent = self.recent();
            let moving = recent.moving.as_ref().and_then(|s| s.ids.get(&id));
            if let Some(&position) = recent.active.ids.get(&id).or(moving) {
                return Ok(Some(position));
            }
        }
        let found = self.tables()?.keys.get(id_key(id))?;
        found.map(|value| number(&value)).transpose()
    }

    /// The position of an aggregate's last event; 0 if it has none.
    pub(super) fn last_of(&self, subject: &str) -> Result<u64, IndexError> {
        if let Some(&last) = self.recent().last.get(subject) {
            return Ok(last);
        }
        let newest = |span: &Span| span.subjects.get(subject).and_then(|p| p.last().copied());
        let found = {
            let recent = self.recent();
            newest(&recent.active).or_else(|| recent.moving.as_deref().and_then(newest))
        };
        let last = match found {
            Some(position) => position,
            None => {
                let keys = self.tables()?.keys;
                match keys.prefix(subject_prefix(subject)).next_back() {
                    Some(entry) => entry
                        .key()?
                        .last_chunk()
                        .map(|b| u64::from_be_bytes(*b))
                        .ok_or(IndexError::Damaged)?,
                    None => 0,
                }
            }
        };
        if last > 0 {
            self.recent_mut().remember(subject.into(), last);
        }
        Ok(last)
    }

    /// The positions of all events of an aggregate, in order.
    pub(super) fn positions_of(&self, subject: &str) -> Result<Vec<u64>, IndexError> {
        // What is in memory is read first, so that a round that ends meanwhile is seen twice
        // rather than not at all.
        let mut positions = BTreeSet::new();
        {
            let recent = self.recent();
            let spans = [Some(&recent.active), recent.moving.as_deref()];
            for span in spans.into_iter().flatten() {
                positions.extend(span.subjects.get(subject).into_iter().flatten());
            }
        }
        for entry in self.tables()?.keys.prefix(subject_prefix(subject)) {
            let value = entry.value()?;
            let (numbers, []) = value.as_chunks::<8>() else {
                return Err(IndexError::Damaged);
            };
            positions.extend(numbers.iter().map(|b| u64::from_be_bytes(*b)));
        }
        Ok(positions.into_iter().collect())
    }

    /// Records appended events, in order. `true` if there is enough for a round.
    pub(super) fn insert<'a>(
        &self,
        events: impl IntoIterator<Item = (u64, Uuid, &'a Arc<str>)>,
    ) -> bool {
        let mut recent = self.recent_mut();
        for (position, id, subject) in events {
            recent.active.insert(position, id, subject);
            recent.remember(Arc::clone(subject), position);
        }
        recent.active.ids.len() >= ROUND
    }

    /// Takes what is in memory for a round, unless there is too little. A round that was started
    /// and not finished comes first.
    pub(super) fn start_round(&self) -> Option<Arc<Span>> {
        let mut recent = self.recent_mut();
        if recent.moving.is_some() {
            return recent.moving.clone();
        }
        if recent.active.ids.len() < ROUND {
            return None;
        }
        let span = Arc::new(std::mem::take(&mut recent.active));
        recent.moving = Some(Arc::clone(&span));
        Some(span)
    }

    /// Writes a round to the tables. After an error the same round can be tried again.
    pub(super) fn finish_round(&self, span: &Span, identity: Uuid) -> Result<(), IndexError> {
        let tables = self.tables()?;
        let mut run = tables.keys.start_ingestion()?;
        run.write(KEY_UPTO, span.upto.to_be_bytes())?;
        run.write(KEY_IDENTITY, identity.into_bytes())?;
        let mut ids: Vec<_> = span.ids.iter().collect();
        ids.sort_unstable();
        for (id, position) in ids {
            run.write(id_key(*id), position.to_be_bytes())?;
        }
        let mut subjects: Vec<_> = span
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
        self.recent_mut().moving = None;
        Ok(())
    }

    /// Lets go of the files.
    pub(super) fn close(&self) {
        let mut tables = self.tables.write().unwrap_or_else(PoisonError::into_inner);
        *tables = None;
    }
}

impl Recent {
    fn remember(&mut self, subject: Arc<str>, position: u64) {
        if self.last.len() >= LAST_KEPT && !self.last.contains_key(&subject) {
            self.last.clear();
        }
        let last = self.last.entry(subject).or_default();
        *last = position.max(*last);
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
