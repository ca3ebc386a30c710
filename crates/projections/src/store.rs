//! The store of the projections: opening it, how far it is, waiting for it, and its digest.

use std::fmt;
use std::ops::ControlFlow;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard};
use std::time::Duration;

use daybook_events::{Digest, Position, Recorded};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use sha2::Digest as _;
use tokio::sync::watch;

use crate::decode::decode as decode_event;
use crate::fold::{Fold, FoldError};
use crate::keys;
use crate::table::{Table, TableError, Way};

/// The version of rows and keys. A store of another one is thrown away and rebuilt.
const FORMAT: &[u8] = b"1";

/// Memory for the pages of the store, in bytes. What is read often is hot in the fold.
const CACHE: u64 = 8 << 20;

/// How often written rows are synced, in milliseconds. What is lost with the power is folded
/// again from the log.
const FLUSH_EVERY_MS: u64 = 10_000;

/// How often, and after which pause, a store that another process seems to have open is tried
/// again.
const LOCK_TRIES: u32 = 50;
const LOCK_PAUSE: Duration = Duration::from_millis(10);

/// Folds of the ledger with their queries. Cheap to clone: all clones are the same store.
#[derive(Clone)]
pub struct Projections {
    pub(crate) inner: Arc<Inner>,
}

pub(crate) struct Inner {
    pub(crate) table: Table,
    /// Held to write rows; whoever reads several rows that must fit together holds it to read.
    gate: RwLock<()>,
    fold: Mutex<Fold>,
    position: watch::Sender<Position>,
    counters: Mutex<Counters>,
}

impl fmt::Debug for Projections {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Projections")
            .field("position", &self.position())
            .finish_non_exhaustive()
    }
}

/// How many events were folded, and how many of them changed nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
pub struct Counters {
    /// All events.
    pub events: u64,
    /// Events that were overtaken by another one, or that do not follow on what was there.
    pub void: u64,
    /// Events of a newer version.
    pub unknown: u64,
    /// Events that cannot be read.
    pub unreadable: u64,
}

/// Why the store could not be opened.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// Another process has it open.
    #[error("the projections are in use by another process; stop it, or choose another folder")]
    InUse,
    /// The folder cannot be read or written.
    #[error("the folder of the projections cannot be used")]
    Folder(#[source] std::io::Error),
    /// Even a fresh store could not be made.
    #[error("the store of the projections cannot be made: {0}")]
    Store(String),
}

/// Why a query could not be answered.
#[derive(Debug, thiserror::Error)]
pub enum QueryError {
    /// The store failed: its disk may be full or broken.
    #[error("the store of the projections failed: {0}")]
    Store(String),
    /// A row is not what was written. Rebuilding the projections mends it.
    #[error("a row of the projections is damaged: {0}; run `daybook projections rebuild`")]
    Damaged(String),
    /// The subject is of another kind than the aggregate that was asked for.
    #[error("{0} is not a subject of that aggregate")]
    WrongSubject(String),
}

impl From<TableError> for QueryError {
    fn from(e: TableError) -> Self {
        match e {
            TableError::Sled(e) => Self::Store(e.to_string()),
            TableError::Row(what) => Self::Damaged(what),
        }
    }
}

/// The projections did not reach a position in time.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the projections are at {reached}, and did not reach {wanted} in time")]
pub struct Behind {
    /// The position that was waited for.
    pub wanted: Position,
    /// The position that was reached.
    pub reached: Position,
}

/// What is wrong with a store that was found.
enum Unusable {
    InUse,
    Folder(std::io::Error),
    Damaged(String),
}

impl Projections {
    /// Opens the store in a folder, or makes it. A store of another version, or one that is
    /// damaged, is thrown away: it is filled again from the log.
    pub fn open(dir: &Path) -> Result<Self, OpenError> {
        std::fs::create_dir_all(dir).map_err(OpenError::Folder)?;
        let mut tries = 0;
        let found = loop {
            match Self::open_found(dir) {
                Ok(projections) => return Ok(projections),
                // A store that was just closed may be let go a moment later.
                Err(Unusable::InUse) if tries < LOCK_TRIES => {
                    tries += 1;
                    std::thread::sleep(LOCK_PAUSE);
                }
                Err(Unusable::InUse) => return Err(OpenError::InUse),
                Err(Unusable::Folder(e)) => return Err(OpenError::Folder(e)),
                Err(Unusable::Damaged(why)) => break why,
            }
        };
        tracing::warn!(why = %found, "the projections are thrown away and built anew");
        std::fs::remove_dir_all(dir).map_err(OpenError::Folder)?;
        std::fs::create_dir_all(dir).map_err(OpenError::Folder)?;
        Self::open_found(dir).map_err(|e| match e {
            Unusable::InUse => OpenError::InUse,
            Unusable::Folder(e) => OpenError::Folder(e),
            Unusable::Damaged(why) => OpenError::Store(why),
        })
    }

    /// A store in memory, for tests and for replays.
    pub fn in_memory() -> Self {
        Self::new(Table::memory(), Fold::default())
    }

    fn open_found(dir: &Path) -> Result<Self, Unusable> {
        // sled may panic on files that are not as it left them.
        catch_unwind(AssertUnwindSafe(|| {
            let db = sled::Config::new()
                .path(dir)
                .cache_capacity(CACHE)
                .flush_every_ms(Some(FLUSH_EVERY_MS))
                .open()
                .map_err(unusable)?;
            let fresh = !db.was_recovered();
            let table = Table::Sled(db);
            let damaged = |e: TableError| Unusable::Damaged(e.to_string());
            if fresh {
                let format = (keys::FORMAT.to_vec(), Some(FORMAT.to_vec()));
                table.apply(vec![format]).map_err(damaged)?;
            } else if table.get(keys::FORMAT).map_err(damaged)?.as_deref() != Some(FORMAT) {
                return Err(Unusable::Damaged("it is of another version".to_owned()));
            }
            let fold = Fold::load(&table).map_err(damaged)?;
            Ok(Self::new(table, fold))
        }))
        .unwrap_or_else(|_| Err(Unusable::Damaged("its files are damaged".to_owned())))
    }

    fn new(table: Table, fold: Fold) -> Self {
        let checkpoint = fold.checkpoint();
        Self {
            inner: Arc::new(Inner {
                table,
                gate: RwLock::new(()),
                fold: Mutex::new(fold),
                position: watch::Sender::new(checkpoint.position),
                counters: Mutex::new(checkpoint.counters),
            }),
        }
    }

    /// The events up to this position are folded.
    pub fn position(&self) -> Position {
        *self.inner.position.borrow()
    }

    /// Changes after each batch of events.
    pub fn changes(&self) -> watch::Receiver<Position> {
        self.inner.position.subscribe()
    }

    /// How many events were folded, and how many changed nothing.
    pub fn counters(&self) -> Counters {
        *lock(&self.inner.counters)
    }

    /// Waits until the events up to `position` are folded.
    pub async fn wait_for(&self, position: Position, timeout: Duration) -> Result<(), Behind> {
        let mut changes = self.changes();
        let reached = changes.wait_for(|p| *p >= position);
        match tokio::time::timeout(timeout, reached).await {
            Ok(Ok(_)) => Ok(()),
            _ => Err(Behind {
                wanted: position,
                reached: self.position(),
            }),
        }
    }

    /// A digest over all rows, in the order of their keys. Two stores that folded the same events
    /// have the same one.
    pub fn digest(&self) -> Result<(Position, Digest), QueryError> {
        let _gate = self.gate();
        Ok((self.position(), self.digest_of_rows()?))
    }

    /// The digest, for a caller who keeps rows from being written.
    pub(crate) fn digest_of_rows(&self) -> Result<Digest, QueryError> {
        let mut hash = sha2::Sha256::new();
        self.inner
            .table
            .scan::<()>(b"", None, Way::Up, |key, value| {
                if !keys::is_local(key) {
                    hash.update((key.len() as u64).to_be_bytes());
                    hash.update(key);
                    hash.update((value.len() as u64).to_be_bytes());
                    hash.update(value);
                }
                ControlFlow::Continue(())
            })?;
        Ok(Digest::from_sha256(&hash.finalize().into()))
    }

    /// Keeps rows from being written while several are read.
    pub(crate) fn gate(&self) -> RwLockReadGuard<'_, ()> {
        self.inner
            .gate
            .read()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// Folds events that follow on [`Self::position`], and writes their rows at once. Events
    /// before it are passed over. After an error nothing of the batch is folded.
    pub(crate) fn take(&self, events: Vec<Recorded>) -> Result<(), FoldError> {
        let inner = &*self.inner;
        let mut fold = lock(&inner.fold);
        let result = Self::fold(inner, &mut fold, events);
        if result.is_err() {
            *fold = Fold::load(&inner.table)?;
        }
        result
    }

    fn fold(inner: &Inner, fold: &mut Fold, events: Vec<Recorded>) -> Result<(), FoldError> {
        let before = fold.checkpoint().position;
        for event in events {
            fold.apply(&inner.table, decode_event(event))?;
        }
        let checkpoint = fold.checkpoint();
        if checkpoint.position == before {
            return Ok(());
        }
        let rows = fold.rows(&inner.table)?;
        let gate = inner.gate.write().unwrap_or_else(PoisonError::into_inner);
        inner.table.apply(rows)?;
        *lock(&inner.counters) = checkpoint.counters;
        inner.position.send_replace(checkpoint.position);
        drop(gate);
        Ok(())
    }

    /// Removes all rows and starts from the first event, for the log with this identity.
    pub(crate) fn restart(&self, identity: &str) -> Result<(), TableError> {
        let inner = &*self.inner;
        let mut fold = lock(&inner.fold);
        let _gate = inner.gate.write().unwrap_or_else(PoisonError::into_inner);
        inner.table.clear()?;
        inner.table.apply(vec![
            (keys::FORMAT.to_vec(), Some(FORMAT.to_vec())),
            (keys::IDENTITY.to_vec(), Some(identity.as_bytes().to_vec())),
        ])?;
        *fold = Fold::default();
        *lock(&inner.counters) = Counters::default();
        inner.position.send_replace(Position::ZERO);
        Ok(())
    }

    /// The identity of the log that this was folded from; none before the first run.
    pub(crate) fn identity(&self) -> Result<Option<String>, TableError> {
        let row = self.inner.table.get(keys::IDENTITY)?;
        Ok(row.map(|r| String::from_utf8_lossy(&r).into_owned()))
    }

    /// Writes everything to disk. For a clean end; nothing depends on it.
    pub fn flush(&self) -> Result<(), QueryError> {
        Ok(self.inner.table.flush()?)
    }
}

fn unusable(e: sled::Error) -> Unusable {
    match e {
        sled::Error::Io(e) if e.to_string().contains("could not acquire lock") => Unusable::InUse,
        sled::Error::Io(e)
            if matches!(
                e.kind(),
                std::io::ErrorKind::PermissionDenied
                    | std::io::ErrorKind::StorageFull
                    | std::io::ErrorKind::ReadOnlyFilesystem
            ) =>
        {
            Unusable::Folder(e)
        }
        e => Unusable::Damaged(e.to_string()),
    }
}

pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
