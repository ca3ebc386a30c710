//! The table of rows: sled and sorted runs on disk behind rows that are not yet written there, or
//! rows in memory alone. Whoever reads sees no difference.
//!
//! What is folded is applied in memory, at once and as a whole. A thread of its own carries it to
//! sled, a second's worth at a time, sorted and coalesced: a live event costs no write to disk,
//! and catching up writes each row seldom. sled's batches are not used: while one is written its
//! log cannot become durable, and a page that is evicted and read again meanwhile waits for that
//! for ever (sled#1412). Instead, a row that says how far the rows will be is written before them
//! and one that says how far they are behind them; where the two differ after a crash, the store
//! is thrown away.
//!
//! A store that is filled from nothing writes large batches as sorted runs, which cost a fraction of
//! what sled takes for their rows. With the first small one it has caught up: from then on all rows go
//! to sled, above the runs, which stay as they are. What is removed and may be in a run is noted
//! beside the rows in sled.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::ops::{Bound, ControlFlow};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::{
    Arc, Condvar, Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard,
};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use sled::IVec;

use crate::keys;
use crate::run::{Cursor, Row};
use crate::runs::Runs;

/// What happens to a row.
#[derive(Debug)]
pub(crate) enum Write {
    /// It is written, whatever was there.
    Put(IVec),
    /// It is removed.
    Remove,
    /// It is removed, and was never written but once: if it is still on its way to the disk, it
    /// does not have to go there.
    Withdraw,
}

/// Rows to write at once.
pub(crate) type Batch = Vec<(IVec, Write)>;

/// Memory for the pages of sled, in bytes.
const CACHE: u64 = 16 << 20;

/// How long rows may wait to be carried to disk.
const CADENCE: Duration = Duration::from_secs(1);
/// So many bytes of waiting rows are carried at once, whatever their age.
const URGENT: usize = 16 << 20;
/// With so many bytes of waiting rows, the fold waits too.
const FULL: usize = 32 << 20;
/// Batches of at least so many bytes become runs, as long as there is nothing in sled.
const RUN: usize = 1 << 20;
/// How long it waits before it gives up.
const PATIENCE: Duration = Duration::from_secs(60);
/// How long the end of a table waits for its last rows to be on disk.
const FAREWELL: Duration = Duration::from_secs(10);

/// How many bytes and rows a scan reads at once.
const SCAN_BYTES: usize = 256 << 10;
const SCAN_ROWS: usize = 1024;

/// How often, and after which pause, a store that another process seems to have open is tried
/// again: one that was just closed may be let go a moment later.
const LOCK_TRIES: u32 = 50;
const LOCK_PAUSE: Duration = Duration::from_millis(10);

/// Why rows could not be read or written.
#[derive(Debug, thiserror::Error)]
pub(crate) enum TableError {
    #[error("the store of the projections failed: {0}")]
    Sled(#[from] sled::Error),
    #[error("a file of the projections cannot be used: {0}")]
    Run(#[from] std::io::Error),
    #[error("the rows of the projections cannot be brought to disk: {0}")]
    Stuck(String),
    #[error("the files of the projections are damaged: {0}")]
    Broken(String),
    #[error("a row of the projections cannot be read: {0}")]
    Row(String),
}

/// Why a store on disk was not opened.
#[derive(Debug)]
pub(crate) enum Unusable {
    InUse,
    Folder(std::io::Error),
    Damaged(String),
}

/// Which way a scan goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Way {
    Up,
    Down,
}

/// Rows above those on disk; `None` hides a row below.
pub(crate) type Rows = BTreeMap<IVec, Option<IVec>>;

#[derive(Debug)]
pub(crate) struct Table {
    shared: Arc<Shared>,
    writer: Mutex<Option<JoinHandle<()>>>,
}

#[derive(Debug)]
struct Shared {
    layers: RwLock<Layers>,
    signal: Mutex<Signal>,
    changed: Condvar,
}

/// A row is what the first layer that knows its key says.
#[derive(Debug, Default)]
struct Layers {
    /// Rows that wait, with their size in bytes.
    fresh: Rows,
    bytes: usize,
    /// Rows that are being carried to disk, with their size in bytes.
    leaving: Arc<Rows>,
    leaving_bytes: usize,
    disk: Option<Disk>,
}

#[derive(Debug, Clone)]
struct Disk {
    db: sled::Db,
    /// Keys of rows that a run has and that were removed since.
    gone: sled::Tree,
    runs: Arc<Runs>,
    /// The folder of all generations, and which one is open.
    root: PathBuf,
    generation: u64,
    /// Held by whoever carries rows to it.
    carrying: Arc<Mutex<Carrying>>,
}

#[derive(Debug)]
struct Carrying {
    /// Rows of the ledger are in sled: there are no more runs.
    settled: bool,
}

/// The folder of a generation. A store that is given up is never made again in the same place:
/// what is left of it in this process may still write there.
fn place(root: &Path, generation: u64) -> PathBuf {
    root.join(generation.to_string())
}

/// Where a generation is while it is being built.
fn unfinished(root: &Path, generation: u64) -> PathBuf {
    root.join(format!("{generation}.new"))
}

/// The newest generation in a folder, 0 for none.
fn newest(root: &Path) -> std::io::Result<u64> {
    let mut newest = 0;
    for entry in std::fs::read_dir(root)? {
        let name = entry?.file_name();
        let number = name.to_str().and_then(|n| n.parse().ok());
        newest = newest.max(number.unwrap_or(0));
    }
    Ok(newest)
}

/// Removes all but one generation.
fn tidy(root: &Path, generation: u64) -> std::io::Result<()> {
    for entry in std::fs::read_dir(root)? {
        let entry = entry?;
        if entry.file_name().to_str() == Some(generation.to_string().as_str()) {
            continue;
        }
        if entry.file_type()?.is_dir() {
            std::fs::remove_dir_all(entry.path())?;
        } else {
            std::fs::remove_file(entry.path())?;
        }
    }
    Ok(())
}

/// What the thread that carries rows is told, and tells.
#[derive(Debug, Default)]
struct Signal {
    waiting: bool,
    urgent: bool,
    stop: bool,
    stopped: bool,
    failure: Option<Failure>,
}

/// Why rows were not brought to disk.
#[derive(Debug, Clone)]
struct Failure {
    why: String,
    /// No space and no permission may mend it.
    broken: bool,
}

impl Failure {
    /// Whether something outside of the store keeps it from being read or written.
    fn is_outside(e: &std::io::Error) -> bool {
        use std::io::ErrorKind::{
            PermissionDenied, QuotaExceeded, ReadOnlyFilesystem, StorageFull,
        };
        matches!(
            e.kind(),
            PermissionDenied | ReadOnlyFilesystem | StorageFull | QuotaExceeded
        )
    }
}

impl From<TableError> for Failure {
    fn from(e: TableError) -> Self {
        let outside = match &e {
            TableError::Sled(sled::Error::Io(e)) | TableError::Run(e) => Self::is_outside(e),
            _ => false,
        };
        Self {
            why: e.to_string(),
            broken: !outside,
        }
    }
}

impl Disk {
    /// What belongs to an open sled in a folder.
    fn open(
        db: sled::Db,
        root: &Path,
        generation: u64,
        dir: &Path,
        settled: bool,
    ) -> Result<Self, Unusable> {
        let gone = db.open_tree("gone");
        let runs = Runs::open(&dir.join("runs")).map_err(|e| match e {
            TableError::Run(e) if Failure::is_outside(&e) => Unusable::Folder(e),
            e => Unusable::Damaged(e.to_string()),
        })?;
        Ok(Self {
            gone: gone.map_err(|e| Unusable::Damaged(e.to_string()))?,
            db,
            runs: Arc::new(runs),
            root: root.to_owned(),
            generation,
            carrying: Arc::new(Mutex::new(Carrying { settled })),
        })
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Layers {
    fn generation(&self) -> Option<u64> {
        self.disk.as_ref().map(|d| d.generation)
    }

    /// The runs of a generation, if it is the one that is open.
    fn runs(&self, generation: u64) -> Option<Arc<Runs>> {
        let disk = self.disk.as_ref().filter(|d| d.generation == generation);
        disk.map(|d| d.runs.clone())
    }
}

impl Shared {
    fn read(&self) -> RwLockReadGuard<'_, Layers> {
        self.layers.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) -> RwLockWriteGuard<'_, Layers> {
        self.layers.write().unwrap_or_else(PoisonError::into_inner)
    }

    /// Brings the waiting rows to the disk.
    fn carry(&self) -> Result<(), TableError> {
        let Some(disk) = self.read().disk.clone() else {
            return Ok(());
        };
        let mut carrying = lock(&disk.carrying);
        let (rows, bytes, runs) = {
            let mut layers = self.write();
            let Some(runs) = layers.runs(disk.generation) else {
                return Ok(());
            };
            // Rows are still leaving if the last attempt failed.
            if layers.leaving.is_empty() {
                layers.leaving = Arc::new(std::mem::take(&mut layers.fresh));
                layers.leaving_bytes = std::mem::take(&mut layers.bytes);
            }
            (layers.leaving.clone(), layers.leaving_bytes, runs)
        };
        daybook_failpoints::reached("projections.before");
        if !rows.is_empty() {
            let checkpoint = rows.contains_key(keys::CHECKPOINT);
            let runs = if checkpoint && !carrying.settled && bytes >= RUN {
                Arc::new(runs.with(&rows)?)
            } else {
                carrying.settled |= checkpoint;
                put(&disk, &runs, &rows)?;
                runs
            };
            daybook_failpoints::reached("projections.written");
            self.carried(disk.generation, &runs);
            let mut merged = runs.merged()?;
            while let Some(runs) = merged {
                merged = runs.merged()?;
                self.carried(disk.generation, &Arc::new(runs));
            }
        }
        disk.db.flush()?;
        daybook_failpoints::reached("projections.after");
        Ok(())
    }

    /// Reads what was carried from the disk.
    fn carried(&self, generation: u64, runs: &Arc<Runs>) {
        let mut layers = self.write();
        if let Some(disk) = layers.disk.as_mut().filter(|d| d.generation == generation) {
            disk.runs = runs.clone();
            layers.leaving = Arc::default();
        }
    }

    /// Carries rows to one generation until it is told to stop, or the generation is given up.
    fn keep_carrying(&self, generation: u64) {
        loop {
            let mut signal = lock(&self.signal);
            while !signal.waiting && !signal.stop {
                signal = self.wait(signal, None);
            }
            let began = Instant::now();
            while !signal.urgent && !signal.stop && began.elapsed() < CADENCE {
                signal = self.wait(signal, Some(CADENCE.saturating_sub(began.elapsed())));
            }
            let stop = signal.stop;
            (signal.waiting, signal.urgent) = (false, false);
            drop(signal);
            // sled may panic on files that are not as it left them.
            let carried = catch_unwind(AssertUnwindSafe(|| self.carry()));
            let carried =
                carried.unwrap_or_else(|_| Err(TableError::Broken("sled panicked".to_owned())));
            let failure = carried.err().map(Failure::from);
            if let Some(Failure { why, .. }) = &failure {
                tracing::error!(%why, "the projections cannot be brought to disk");
            }
            let current = self.read().generation() == Some(generation);
            let mut signal = lock(&self.signal);
            if !current {
                signal.waiting = true;
                self.changed.notify_all();
                return;
            }
            signal.waiting |= failure.is_some();
            signal.failure = failure;
            signal.stopped = stop;
            self.changed.notify_all();
            if stop {
                return;
            }
        }
    }

    /// Starts the thread that carries rows to a generation.
    fn start_carrying(self: &Arc<Self>, generation: u64) -> std::io::Result<JoinHandle<()>> {
        let shared = self.clone();
        let writer = std::thread::Builder::new().name("projections".to_owned());
        writer.spawn(move || shared.keep_carrying(generation))
    }

    fn wait<'a>(
        &self,
        signal: MutexGuard<'a, Signal>,
        at_most: Option<Duration>,
    ) -> MutexGuard<'a, Signal> {
        match at_most {
            None => self
                .changed
                .wait(signal)
                .unwrap_or_else(PoisonError::into_inner),
            Some(time) => {
                self.changed
                    .wait_timeout(signal, time)
                    .unwrap_or_else(PoisonError::into_inner)
                    .0
            }
        }
    }
}

/// Writes rows to sled, between the marks by which a torn store is known.
fn put(Disk { db, gone, .. }: &Disk, runs: &Runs, rows: &Rows) -> Result<(), TableError> {
    let checkpoint = rows.get(keys::CHECKPOINT).and_then(Option::as_ref);
    if let Some(checkpoint) = checkpoint {
        db.insert(keys::BEGUN, checkpoint)?;
    }
    for (key, value) in rows {
        match value {
            _ if *key == keys::CHECKPOINT => {}
            Some(value) => drop(db.insert(key, value)?),
            None => {
                if runs.may_hold(key) {
                    gone.insert(key, &[])?;
                }
                db.remove(key)?;
            }
        }
    }
    if let Some(checkpoint) = checkpoint {
        db.insert(keys::CHECKPOINT, checkpoint)?;
    }
    Ok(())
}

impl Table {
    pub(crate) fn memory() -> Self {
        Self {
            shared: Arc::new(Shared {
                layers: RwLock::default(),
                signal: Mutex::default(),
                changed: Condvar::new(),
            }),
            writer: Mutex::default(),
        }
    }

    /// Opens the newest store in a folder, or makes one, and removes what older ones left.
    pub(crate) fn open(root: &Path, format: &[u8]) -> Result<Self, Unusable> {
        std::fs::create_dir_all(root).map_err(Unusable::Folder)?;
        let generation = newest(root).map_err(Unusable::Folder)?.max(1);
        let table = Self::open_at(root, generation, &place(root, generation), format)?;
        tidy(root, generation).map_err(Unusable::Folder)?;
        Ok(table)
    }

    /// Makes a new store beside the newest one, to be put in its place by [`finish`].
    pub(crate) fn begin(root: &Path, format: &[u8]) -> Result<Self, Unusable> {
        let generation = newest(root).map_err(Unusable::Folder)? + 1;
        let dir = unfinished(root, generation);
        match std::fs::remove_dir_all(&dir) {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => Err(Unusable::Folder(e)),
            _ => Self::open_at(root, generation, &dir, format),
        }
    }

    /// Gives a damaged store up, and makes a new one.
    pub(crate) fn replace(root: &Path, format: &[u8]) -> Result<Self, Unusable> {
        let generation = newest(root).map_err(Unusable::Folder)? + 1;
        let table = Self::open_at(root, generation, &place(root, generation), format)?;
        tidy(root, generation).map_err(Unusable::Folder)?;
        Ok(table)
    }

    fn open_at(root: &Path, generation: u64, dir: &Path, format: &[u8]) -> Result<Self, Unusable> {
        let db = open_db(dir)?;
        let damaged = |e: sled::Error| Unusable::Damaged(e.to_string());
        let mut settled = false;
        if !db.was_recovered() {
            db.insert(keys::FORMAT, format).map_err(damaged)?;
        } else if db.get(keys::FORMAT).map_err(damaged)?.as_deref() != Some(format) {
            return Err(Unusable::Damaged("it is of another version".to_owned()));
        } else {
            let checkpoint = db.get(keys::CHECKPOINT).map_err(damaged)?;
            if db.get(keys::BEGUN).map_err(damaged)? != checkpoint {
                return Err(Unusable::Damaged("writing it was interrupted".to_owned()));
            }
            settled = checkpoint.is_some();
        }
        let disk = Disk::open(db, root, generation, dir, settled)?;
        let table = Self::memory();
        table.shared.write().disk = Some(disk);
        let writer = table.shared.start_carrying(generation);
        *lock(&table.writer) = Some(writer.map_err(Unusable::Folder)?);
        Ok(table)
    }

    pub(crate) fn get(&self, key: &[u8]) -> Result<Option<IVec>, TableError> {
        let disk = {
            let layers = self.shared.read();
            let above = layers.fresh.get(key).or_else(|| layers.leaving.get(key));
            if let Some(value) = above {
                return Ok(value.clone());
            }
            layers.disk.clone()
        };
        let Some(disk) = disk else {
            return Ok(None);
        };
        match disk.db.get(key)? {
            Some(row) => Ok(Some(row)),
            None => match disk.runs.get(key)? {
                Some(_) if disk.gone.contains_key(key)? => Ok(None),
                row => Ok(row),
            },
        }
    }

    /// Waits while too many rows wait for the disk. It is an error if they will never get there.
    pub(crate) fn make_room(&self) -> Result<(), TableError> {
        let began = Instant::now();
        loop {
            let full = {
                let layers = self.shared.read();
                layers.disk.is_some() && layers.bytes > FULL
            };
            let mut signal = lock(&self.shared.signal);
            match &signal.failure {
                Some(f) if f.broken => return Err(TableError::Broken(f.why.clone())),
                _ if !full => return Ok(()),
                failure if began.elapsed() > PATIENCE => {
                    let why = failure.as_ref().map(|f| f.why.clone());
                    return Err(TableError::Stuck(
                        why.unwrap_or_else(|| "sled does not answer".to_owned()),
                    ));
                }
                _ => {}
            }
            (signal.waiting, signal.urgent) = (true, true);
            self.shared.changed.notify_all();
            drop(self.shared.wait(signal, Some(Duration::from_millis(100))));
        }
    }

    /// Applies all rows at once.
    pub(crate) fn apply(&self, rows: Batch) {
        let mut layers = self.shared.write();
        let layers = &mut *layers;
        let on_disk = layers.disk.is_some();
        for (key, value) in rows {
            let added = key.len()
                + if let Write::Put(v) = &value {
                    v.len()
                } else {
                    0
                };
            layers.bytes += added;
            match value {
                Write::Put(value) => drop(layers.fresh.insert(key, Some(value))),
                Write::Remove if !on_disk => drop(layers.fresh.remove(&key)),
                Write::Withdraw if layers.fresh.remove(&key).is_some() || !on_disk => {}
                Write::Remove | Write::Withdraw => drop(layers.fresh.insert(key, None)),
            }
        }
        if on_disk {
            let mut signal = lock(&self.shared.signal);
            let urgent = layers.bytes > URGENT;
            if !signal.waiting || (urgent && !signal.urgent) {
                signal.waiting = true;
                signal.urgent |= urgent;
                self.shared.changed.notify_all();
            }
        }
    }

    /// Removes all rows. A store on disk is given up, with the thread that carries rows to it,
    /// and made anew beside it.
    pub(crate) fn clear(&self) -> Result<(), TableError> {
        let mut layers = self.shared.write();
        layers.fresh.clear();
        layers.bytes = 0;
        layers.leaving = Arc::default();
        let Some(Disk {
            root, generation, ..
        }) = layers.disk.clone()
        else {
            return Ok(());
        };
        let stuck = |e: std::io::Error| TableError::Stuck(format!("no new store can be made: {e}"));
        let generation = generation + 1;
        let dir = place(&root, generation);
        let disk = open_db(&dir)
            .and_then(|db| Disk::open(db, &root, generation, &dir, false))
            .map_err(|e| TableError::Stuck(format!("no new store can be made: {e:?}")))?;
        layers.disk = Some(disk);
        drop(layers);
        {
            let mut signal = lock(&self.shared.signal);
            signal.failure = None;
            signal.waiting = true;
        }
        // The one before ends by itself as soon as it sees that its store was given up.
        let writer = self.shared.start_carrying(generation).map_err(stuck)?;
        *lock(&self.writer) = Some(writer);
        self.shared.changed.notify_all();
        tidy(&root, generation).map_err(stuck)
    }

    /// Brings everything to disk.
    pub(crate) fn flush(&self) -> Result<(), TableError> {
        // The first turn may find rows that an earlier one left.
        self.shared.carry()?;
        self.shared.carry()
    }

    /// Visits the rows whose keys start with `prefix`, beginning strictly beyond `from` if it is
    /// given, until the visitor breaks. The visitor may read the table.
    pub(crate) fn scan<B>(
        &self,
        prefix: &[u8],
        from: Option<&[u8]>,
        way: Way,
        mut visit: impl FnMut(&[u8], &IVec) -> ControlFlow<B>,
    ) -> Result<Option<B>, TableError> {
        let (mut low, mut high) = bounds(prefix, from, way);
        let mut rows = 16;
        loop {
            let found = self.read_some(&low, &high, way, rows)?;
            let Some((last, _)) = found.last() else {
                return Ok(None);
            };
            match way {
                Way::Up => low = Bound::Excluded(last.to_vec()),
                Way::Down => high = Bound::Excluded(last.to_vec()),
            }
            for (key, value) in &found {
                if let ControlFlow::Break(b) = visit(key, value) {
                    return Ok(Some(b));
                }
            }
            rows = (rows * 4).min(SCAN_ROWS);
        }
    }

    /// The row that is nearest to a key, which is left out itself, among those with a prefix.
    pub(crate) fn nearest(
        &self,
        prefix: &[u8],
        from: &[u8],
        way: Way,
    ) -> Result<Option<(IVec, IVec)>, TableError> {
        let (low, high) = bounds(prefix, Some(from), way);
        Ok(self.read_some(&low, &high, way, 1)?.pop())
    }

    /// The next rows of a range: none only if there are none.
    fn read_some(
        &self,
        low: &Bound<Vec<u8>>,
        high: &Bound<Vec<u8>>,
        way: Way,
        limit: usize,
    ) -> Result<Vec<(IVec, IVec)>, TableError> {
        let range = (
            low.as_ref().map(Vec::as_slice),
            high.as_ref().map(Vec::as_slice),
        );
        if is_empty(range) {
            return Ok(Vec::new());
        }
        let layers = self.shared.read();
        let (mut fresh, mut leaving) = (
            layers.fresh.range::<[u8], _>(range),
            layers.leaving.range::<[u8], _>(range),
        );
        let disk = layers.disk.as_ref();
        let mut sled = disk.map(|d| d.db.range::<&[u8], _>(range));
        let mut gone = disk.map(|d| d.gone.range::<&[u8], _>(range));
        let runs = disk.into_iter().flat_map(|d| d.runs.ranges(range, way));
        let mut runs: Vec<Cursor<'_>> = runs.collect();
        let step = |rows: &mut Option<sled::Iter>| {
            let row = rows.as_mut().and_then(|rows| match way {
                Way::Up => rows.next(),
                Way::Down => rows.next_back(),
            });
            row.transpose()
        };
        let all = 4 + runs.len();
        let mut next = |layer: usize| -> Result<Option<Row>, TableError> {
            let above = match (layer, way) {
                (0, Way::Up) => fresh.next(),
                (0, Way::Down) => fresh.next_back(),
                (1, Way::Up) => leaving.next(),
                (1, Way::Down) => leaving.next_back(),
                (2, _) => return Ok(step(&mut sled)?.map(|(key, value)| (key, Some(value)))),
                (3, _) => return Ok(step(&mut gone)?.map(|(key, _)| (key, None))),
                (run, _) => return runs[run - 4].next(),
            };
            Ok(above.map(|(k, v)| (k.clone(), v.clone())))
        };
        let mut heads = (0..all).map(&mut next).collect::<Result<Vec<_>, _>>()?;
        let mut found = Vec::new();
        let mut bytes = 0;
        while found.len() < limit && bytes < SCAN_BYTES {
            let all = heads.iter().flatten().map(|(key, _)| key);
            let nearest = match way {
                Way::Up => all.min(),
                Way::Down => all.max(),
            };
            let Some(key) = nearest.cloned() else {
                break;
            };
            let mut value = None;
            for layer in (0..heads.len()).rev() {
                if heads[layer].as_ref().is_some_and(|(k, _)| *k == key) {
                    value = heads[layer].take().and_then(|(_, v)| v);
                    heads[layer] = next(layer)?;
                }
            }
            if let Some(value) = value {
                bytes += key.len() + value.len();
                found.push((key, value));
            }
        }
        Ok(found)
    }
}

impl Drop for Table {
    fn drop(&mut self) {
        let Some(writer) = lock(&self.writer).take() else {
            return;
        };
        let began = Instant::now();
        let mut signal = lock(&self.shared.signal);
        signal.stop = true;
        self.shared.changed.notify_all();
        while !signal.stopped && began.elapsed() < FAREWELL {
            signal = self.shared.wait(signal, Some(Duration::from_millis(100)));
        }
        let stopped = signal.stopped;
        drop(signal);
        if stopped {
            let _ = writer.join();
        } else {
            tracing::error!("the projections could not be brought to disk in time");
        }
    }
}

/// Puts the store that [`Table::begin`] made in the place of the one before it. Neither is open.
pub(crate) fn finish(root: &Path) -> std::io::Result<()> {
    let generation = newest(root)? + 1;
    std::fs::rename(unfinished(root, generation), place(root, generation))?;
    tidy(root, generation)
}

/// Opens a store. One that was closed a moment ago may still be written to, by threads of sled's own,
/// which keep its lock: that is waited for.
pub(crate) fn open_db(dir: &Path) -> Result<sled::Db, Unusable> {
    let mut tries = 0;
    loop {
        let opened = sled::Config::new()
            .path(dir)
            .cache_capacity(CACHE)
            .flush_every_ms(None)
            .open();
        let e = match opened {
            Ok(db) => return Ok(db),
            Err(sled::Error::Io(e)) => e,
            Err(e) => return Err(Unusable::Damaged(e.to_string())),
        };
        use std::io::ErrorKind::{PermissionDenied, ReadOnlyFilesystem, StorageFull};
        if e.to_string().contains("could not acquire lock") {
            if tries == LOCK_TRIES {
                return Err(Unusable::InUse);
            }
            tries += 1;
            std::thread::sleep(LOCK_PAUSE);
        } else if matches!(
            e.kind(),
            PermissionDenied | ReadOnlyFilesystem | StorageFull
        ) {
            return Err(Unusable::Folder(e));
        } else {
            return Err(Unusable::Damaged(e.to_string()));
        }
    }
}

/// The first key that does not start with `prefix` and is greater than all that do.
fn after(prefix: &[u8]) -> Option<Vec<u8>> {
    let mut key = prefix.to_vec();
    while let Some(last) = key.pop() {
        if last < u8::MAX {
            key.push(last + 1);
            return Some(key);
        }
    }
    None
}

/// Whether no key can be in a range; a map panics when it is asked for such a one.
fn is_empty((low, high): (Bound<&[u8]>, Bound<&[u8]>)) -> bool {
    match (low, high) {
        (Bound::Included(l), Bound::Excluded(h)) => l >= h,
        (Bound::Excluded(l), Bound::Excluded(h)) => l >= h,
        _ => false,
    }
}

thread_local! {
    /// Where rows are encoded, before they are copied out at their size.
    static SCRATCH: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
}

/// Makes a row in a buffer that is used again and again.
pub(crate) fn through_scratch(
    write: impl FnOnce(&mut Vec<u8>) -> Result<(), TableError>,
) -> Result<IVec, TableError> {
    through_scratch_to(|scratch| {
        write(scratch)?;
        Ok(IVec::from(scratch.as_slice()))
    })
}

/// Makes something of a buffer that is used again and again.
pub(crate) fn through_scratch_to<T>(
    make: impl FnOnce(&mut Vec<u8>) -> Result<T, TableError>,
) -> Result<T, TableError> {
    SCRATCH.with_borrow_mut(|scratch| {
        scratch.clear();
        make(scratch)
    })
}

/// Takes what bincode writes, piece by tiny piece.
struct Appending<'a>(&'a mut Vec<u8>);

impl bincode::enc::write::Writer for Appending<'_> {
    #[inline]
    fn write(&mut self, bytes: &[u8]) -> Result<(), bincode::error::EncodeError> {
        match bytes {
            // Most of it is single bytes, which are not worth a call to copy them.
            [byte] => self.0.push(*byte),
            _ => self.0.extend_from_slice(bytes),
        }
        Ok(())
    }
}

/// Appends a value to a row.
pub(crate) fn append<T: serde::Serialize>(row: &mut Vec<u8>, value: &T) -> Result<(), TableError> {
    bincode::serde::encode_into_writer(value, Appending(row), bincode::config::standard())
        .map_err(|e| TableError::Row(e.to_string()))
}

/// A row as bytes.
pub(crate) fn encode<T: serde::Serialize>(value: &T) -> Result<IVec, TableError> {
    through_scratch(|scratch| append(scratch, value))
}

/// A row as JSON, for what is sent as it is kept.
pub(crate) fn encode_json<T: serde::Serialize>(value: &T) -> Result<IVec, TableError> {
    through_scratch(|scratch| {
        serde_json::to_writer(scratch, value).map_err(|e| TableError::Row(e.to_string()))
    })
}

/// The keys with a prefix; with `from`, those that come after it that way.
fn bounds(prefix: &[u8], from: Option<&[u8]>, way: Way) -> (Bound<Vec<u8>>, Bound<Vec<u8>>) {
    let mut low = Bound::Included(prefix.to_vec());
    let mut high = after(prefix).map_or(Bound::Unbounded, Bound::Excluded);
    match (way, from) {
        (Way::Up, Some(from)) => low = Bound::Excluded(from.to_vec()),
        (Way::Down, Some(from)) => high = Bound::Excluded(from.to_vec()),
        (_, None) => {}
    }
    (low, high)
}

/// The value at the start of a row.
pub(crate) fn decode<T: serde::de::DeserializeOwned>(row: &[u8]) -> Result<T, TableError> {
    decode_part(&mut &*row)
}

/// The value at the start of what is left of a row, which is then shorter by it.
pub(crate) fn decode_part<T: serde::de::DeserializeOwned>(
    rest: &mut &[u8],
) -> Result<T, TableError> {
    let (value, length) = bincode::serde::decode_from_slice(rest, bincode::config::standard())
        .map_err(|e| TableError::Row(e.to_string()))?;
    *rest = &rest[length..];
    Ok(value)
}
