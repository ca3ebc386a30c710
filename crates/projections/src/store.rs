//! The store of the projections: opening it, how far it is, waiting for it, and its digest.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::fmt;
use std::ops::ControlFlow;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};
use std::time::Duration;

use daybook_events::{Aggregate, Digest, Folded, Position, ProjectName, Recorded, Subject};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use sha2::Digest as _;
use tokio::sync::watch;

use crate::feed::{Feed, Feeds};
use crate::fold::{Changed, Fold, FoldError};
use crate::keys;
use crate::slot::Shared;
use crate::state_hash::StateHash;
use crate::table::{Table, TableError, Unusable, Way, Write, decode};

/// The version of rows and keys. A store of another one is thrown away and rebuilt.
const FORMAT: &[u8] = b"29";

/// With more events than this in a batch, the fold catches up, and states are not shared with
/// readers: they would be copied at the next batch.
const SHARED: u64 = 256;

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
    /// The aggregates that the fold keeps decoded, as their rows have them.
    live: RwLock<HashMap<Subject, Shared>>,
    feeds: Feeds,
    position: watch::Sender<Position>,
    counters: Mutex<Counters>,
    /// The state hashes at the newest positions that were reached, newest last.
    hashes: Mutex<VecDeque<(Position, StateHash)>>,
    /// State hashes at past positions that were asked for.
    pub(crate) past_hashes: Mutex<BTreeMap<Position, StateHash>>,
    /// Held while the position changes, so that the two fit together.
    touched: Mutex<Touched>,
}

/// Since when projects are as they are.
#[derive(Default)]
struct Touched {
    /// Those to which something happened after `before`: when it last did.
    last: HashMap<ProjectName, Position>,
    /// To the others nothing did after this.
    before: Position,
}

/// How many positions that were reached keep their state hash at hand.
const HASHES: usize = 1024;

impl Inner {
    fn write_live(&self) -> RwLockWriteGuard<'_, HashMap<Subject, Shared>> {
        self.live.write().unwrap_or_else(PoisonError::into_inner)
    }

    fn share(&self, changed: &Changed) {
        let mut live = self.write_live();
        for (subject, shared) in &changed.states {
            match shared {
                Some(shared) => drop(live.insert(subject.clone(), shared.clone())),
                None => drop(live.remove(subject)),
            }
        }
        for subject in &changed.forgotten {
            live.remove(subject);
        }
    }
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

impl From<Unusable> for OpenError {
    fn from(unusable: Unusable) -> Self {
        match unusable {
            Unusable::InUse => Self::InUse,
            Unusable::Folder(e) => Self::Folder(e),
            Unusable::Damaged(why) => Self::Store(why),
        }
    }
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
            TableError::Run(e) => Self::Store(e.to_string()),
            TableError::Stuck(why) => Self::Store(why),
            TableError::Row(what) | TableError::Broken(what) => Self::Damaged(what),
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

impl Projections {
    /// Opens the store in a folder, or makes it. A store of another version, or one that is
    /// damaged, is thrown away: it is filled again from the log.
    pub fn open(dir: &Path) -> Result<Self, OpenError> {
        let found = match Self::open_table(|| Table::open(dir, FORMAT)) {
            Err(Unusable::Damaged(why)) => why,
            other => return other.map_err(OpenError::from),
        };
        tracing::warn!(why = %found, "the projections are thrown away and built anew");
        Ok(Self::open_table(|| Table::replace(dir, FORMAT))?)
    }

    /// An empty store beside the one in a folder.
    pub(crate) fn begin(dir: &Path) -> Result<Self, OpenError> {
        Ok(Self::open_table(|| Table::begin(dir, FORMAT))?)
    }

    /// A store in memory, for tests and for replays.
    pub fn in_memory() -> Self {
        Self::new(Table::memory(), Fold::default())
    }

    fn open_table(open: impl FnOnce() -> Result<Table, Unusable>) -> Result<Self, Unusable> {
        // sled may panic on files that are not as it left them.
        catch_unwind(AssertUnwindSafe(|| {
            let table = open()?;
            let fold = Fold::load(&table).map_err(|e| Unusable::Damaged(e.to_string()))?;
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
                live: RwLock::default(),
                feeds: Feeds::default(),
                position: watch::Sender::new(checkpoint.position),
                counters: Mutex::new(checkpoint.counters),
                hashes: Mutex::new([(checkpoint.position, fold.state_hash())].into()),
                past_hashes: Mutex::default(),
                touched: Mutex::new(Touched {
                    before: checkpoint.position,
                    ..Touched::default()
                }),
                fold: Mutex::new(fold),
            }),
        }
    }

    /// The events up to this position are folded.
    pub fn position(&self) -> Position {
        *self.inner.position.borrow()
    }

    /// A position since which nothing in a project's aggregates has changed, and [`Self::position`]
    /// at the same moment. It is the last event's that did, or a later one: nobody remembers back to
    /// before the store was opened.
    pub fn unchanged_since(&self, project: &ProjectName) -> (Position, Position) {
        let touched = lock(&self.inner.touched);
        let since = touched.last.get(project).copied();
        (since.unwrap_or(touched.before), self.position())
    }

    /// Changes after each batch of events.
    pub fn changes(&self) -> watch::Receiver<Position> {
        self.inner.position.subscribe()
    }

    /// Tells which aggregates change from here on, so that whoever acts on them need not look at
    /// all the others.
    pub fn feed(&self) -> Feed {
        self.inner.feeds.follow()
    }

    /// An aggregate that the fold keeps decoded.
    pub(crate) fn live(&self, subject: &Subject) -> Option<Shared> {
        let live = self.inner.live.read();
        let live = live.unwrap_or_else(PoisonError::into_inner);
        live.get(subject).cloned()
    }

    /// The state of an aggregate as the fold has it, shared with it: what costs nothing, however
    /// large the aggregate is, as long as it is in use. Whoever keeps it for long makes the fold
    /// copy it at the next change.
    pub fn shared<A: Aggregate>(&self, subject: &Subject) -> Result<Arc<Folded<A>>, QueryError> {
        if subject.kind() != Some(A::KIND) {
            return Err(QueryError::WrongSubject(subject.to_string()));
        }
        if let Some(folded) = self.live(subject).and_then(|shared| shared.folded()) {
            return Ok(folded);
        }
        let row = keys::state(subject).map(|k| self.inner.table.get(&k));
        Ok(match row.transpose()?.flatten() {
            Some(row) => Arc::new(decode(&row)?),
            None => Arc::default(),
        })
    }

    /// How many events were folded, and how many changed nothing.
    pub fn counters(&self) -> Counters {
        *lock(&self.inner.counters)
    }

    /// The state hash at [`Self::position`], with that position.
    pub fn state_hash(&self) -> (Position, StateHash) {
        let hashes = lock(&self.inner.hashes);
        // There is one from the beginning.
        hashes.back().copied().expect("a position has been reached")
    }

    /// The state hash at a position at which these projections stood lately, without any work. A
    /// position in the middle of what was folded at once is not one of them.
    pub fn recent_state_hash(&self, position: Position) -> Option<StateHash> {
        let hashes = lock(&self.inner.hashes);
        let place = hashes.binary_search_by_key(&position, |(p, _)| *p).ok()?;
        Some(hashes[place].1)
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

    /// Folds events that follow on [`Self::position`], and commits them.
    #[cfg(test)]
    pub(crate) fn take(&self, events: &[Recorded]) -> Result<(), FoldError> {
        self.fold(events)?;
        self.commit()
    }

    /// Folds events that follow on those that were folded before. Events that came already are
    /// passed over. Nothing of it is seen before [`Self::commit`]; after an error, nothing since the
    /// last one is folded.
    pub(crate) fn fold(&self, events: &[Recorded]) -> Result<(), FoldError> {
        let inner = &*self.inner;
        let mut fold = lock(&inner.fold);
        let mut events = events.iter();
        let result = events.try_for_each(|event| fold.apply(&inner.table, event));
        self.or_reload(&mut fold, result)
    }

    /// Applies the rows of all that was folded at once.
    pub(crate) fn commit(&self) -> Result<(), FoldError> {
        let mut fold = lock(&self.inner.fold);
        let result = self.apply(&mut fold);
        self.or_reload(&mut fold, result)
    }

    /// After an error, goes back to what the rows say.
    fn or_reload(&self, fold: &mut Fold, result: Result<(), FoldError>) -> Result<(), FoldError> {
        if result.is_err() {
            self.inner.write_live().clear();
            *fold = Fold::load(&self.inner.table)?;
        }
        result
    }

    fn apply(&self, fold: &mut Fold) -> Result<(), FoldError> {
        let inner = &*self.inner;
        let checkpoint = fold.checkpoint();
        let folded = checkpoint.position.0 - self.position().0;
        if folded == 0 {
            return Ok(());
        }
        let (rows, changed) = fold.finish(&inner.table, folded <= SHARED)?;
        let hash = fold.state_hash();
        inner.table.make_room()?;
        let gate = inner.gate.write().unwrap_or_else(PoisonError::into_inner);
        inner.table.apply(rows);
        inner.share(&changed);
        *lock(&inner.counters) = checkpoint.counters;
        let mut hashes = lock(&inner.hashes);
        if hashes.len() == HASHES {
            hashes.pop_front();
        }
        hashes.push_back((checkpoint.position, hash));
        drop(hashes);
        let mut touched = lock(&inner.touched);
        if folded <= SHARED {
            for project in changed.states.iter().filter_map(|(s, _)| s.project()) {
                touched.last.insert(project.clone(), checkpoint.position);
            }
        } else {
            touched.last.clear();
            touched.before = checkpoint.position;
        }
        inner.position.send_replace(checkpoint.position);
        drop(touched);
        drop(gate);
        inner.feeds.tell(changed.states.iter().map(|(s, _)| s));
        Ok(())
    }

    /// Removes all rows and starts from the first event, for the log with this identity.
    pub(crate) fn restart(&self, identity: &str) -> Result<(), TableError> {
        let inner = &*self.inner;
        let mut fold = lock(&inner.fold);
        let _gate = inner.gate.write().unwrap_or_else(PoisonError::into_inner);
        inner.table.clear()?;
        let format = (keys::FORMAT.into(), Write::Put(FORMAT.into()));
        inner.table.apply(vec![format]);
        self.identify(identity);
        inner.write_live().clear();
        *fold = Fold::default();
        *lock(&inner.counters) = Counters::default();
        *lock(&inner.hashes) = [(Position::ZERO, fold.state_hash())].into();
        lock(&inner.past_hashes).clear();
        let mut touched = lock(&inner.touched);
        *touched = Touched::default();
        inner.position.send_replace(Position::ZERO);
        drop(touched);
        inner.feeds.tell_any();
        Ok(())
    }

    /// Notes the identity of the log that this is folded from.
    pub(crate) fn identify(&self, identity: &str) {
        let row = (
            keys::IDENTITY.into(),
            Write::Put(identity.as_bytes().into()),
        );
        self.inner.table.apply(vec![row]);
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

pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
