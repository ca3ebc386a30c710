//! The log of record in a folder of this machine, without any server.
//!
//! - [`segment`]: the events themselves, in files that are only ever appended to. An append is
//!   acknowledged after an `fdatasync` that covers it, so that it survives the loss of power.
//! - [`writer`]: one thread that commits whatever waits as one group.
//! - [`index`]: ids and aggregates, derived from the segments and disposable.
//! - [`consumers`]: durable consumers with their journals.
//!
//! One process has the folder at a time. ADR `docs/adr/0003-the-embedded-log-has-files-of-its-own.md` says why the events
//! are in files of our own rather than in a key-value store.

mod consumers;
mod index;
mod lines;
mod lock;
mod record;
mod segment;
#[cfg(test)]
mod tests;
mod writer;

use std::collections::{HashMap, VecDeque};
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use daybook_events::log::{
    Append, AppendError, Appended, Consumer, ConsumerConfig, Durability, EventLog, EventStream,
    LogInfo, MAX_EVENT_BYTES, Position, ReadError, Recorded,
};
use daybook_events::subject::{Subject, SubjectFilter};
use daybook_events::with_causes;
use futures_util::stream;
use jiff::Timestamp;
use tokio::sync::watch;

pub use lines::{EmbeddedLines, LineRetention};
pub use lock::LockError;

use index::Index;
use lock::FolderLock;
use record::Record;
use segment::{Appender, Segments};
use writer::Queue;

/// Events that a tail reads ahead.
const TAIL_BATCH: usize = 256;
/// Up to so many events are read where the caller is; more go to a thread that may block.
const READ_INLINE: u64 = 64;
/// How many events are looked at in one go for few that match.
const LOOK_AT: u64 = 16_384;
/// How long a tail waits before it reads again what could not be read.
const TAIL_RETRY: Duration = Duration::from_millis(500);

/// How an embedded log is kept.
#[derive(Debug, Clone)]
pub struct EmbeddedConfig {
    /// Whether an append is synced to disk before it is acknowledged. Without it the loss of
    /// power loses acknowledged events, and [`LogInfo::durability`] says `buffered`.
    pub sync: bool,
    /// Size at which a new segment file is begun, in bytes; less than 4 GiB.
    pub segment_bytes: u64,
    /// Events whose ids and aggregates are indexed in memory before they move to the index on
    /// disk: about 200 bytes of memory each, and what a start after a crash reads again.
    pub index_round: usize,
}

impl Default for EmbeddedConfig {
    fn default() -> Self {
        Self {
            sync: true,
            segment_bytes: segment::SEGMENT_BYTES,
            index_round: index::ROUND_EVENTS,
        }
    }
}

/// Why a log could not be opened.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// Somebody else has it open, or it cannot be locked.
    #[error(transparent)]
    Lock(#[from] LockError),
    /// A file or folder could not be read or written.
    #[error("the log in {} cannot be opened", path.display())]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// Stored events are not what was written. Nothing was changed on disk.
    #[error(
        "the log in {} is damaged at {position:?}: {reason}; restore it from a backup or from its tiles",
        path.display()
    )]
    Damaged {
        /// The file or folder.
        path: PathBuf,
        /// The first event that cannot be read.
        position: Position,
        /// What was found.
        reason: String,
    },
}

impl OpenError {
    fn from_read(path: &Path, error: ReadError) -> Self {
        match error {
            ReadError::Damaged { position, reason } => Self::Damaged {
                path: path.to_owned(),
                position,
                reason,
            },
            other => Self::Io {
                path: path.to_owned(),
                source: std::io::Error::other(other.to_string()),
            },
        }
    }
}

/// The log of record in a folder. See the [module](self) for how it is kept.
///
/// Dropping it closes it: appends that wait are answered, the files are released and all tails
/// and consumers end with an error. The drop then takes about as long as a sync of the disk; use
/// [`Self::close`] where that must not hold up other tasks.
#[derive(Debug)]
pub struct EmbeddedLog {
    shared: Arc<Shared>,
    writer: Mutex<Option<JoinHandle<()>>>,
}

/// What the log, its writer, its tails and its consumers have in common.
#[derive(Debug)]
struct Shared {
    dir: PathBuf,
    sync: bool,
    segments: Arc<Segments>,
    index: Index,
    queue: Queue,
    /// Position of the last event that may be read. Sent once more when the log closes.
    head: watch::Sender<Position>,
    consumers: Mutex<HashMap<String, Arc<consumers::Core>>>,
    /// Why the last group was not stored.
    trouble: Mutex<Option<String>>,
    lock: Mutex<Option<FolderLock>>,
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl EmbeddedLog {
    /// Opens the log in a folder, which is made if it does not exist.
    ///
    /// What a crash left of a write that nobody was told of is cut off. Events that had been
    /// acknowledged and cannot be read are [`OpenError::Damaged`].
    pub async fn open(dir: impl Into<PathBuf>, config: EmbeddedConfig) -> Result<Self, OpenError> {
        let dir = dir.into();
        let path = dir.clone();
        tokio::task::spawn_blocking(move || Self::open_blocking(dir, &config))
            .await
            .unwrap_or_else(|e| {
                Err(OpenError::Io {
                    path,
                    source: std::io::Error::other(e),
                })
            })
    }

    fn open_blocking(dir: PathBuf, config: &EmbeddedConfig) -> Result<Self, OpenError> {
        let io = |source| OpenError::Io {
            path: dir.clone(),
            source,
        };
        std::fs::create_dir_all(dir.join("consumers")).map_err(io)?;
        let folder_lock = FolderLock::acquire(&dir)?;
        let segments = Arc::new(Segments::open(&dir.join("segments"))?);
        let index = Index::open(&dir.join("index"), &segments, config.index_round)?;
        let segment_bytes = config.segment_bytes.min(u32::MAX.into());
        let appender =
            Appender::new(Arc::clone(&segments), config.sync, segment_bytes).map_err(io)?;
        let shared = Arc::new(Shared {
            sync: config.sync,
            head: watch::Sender::new(Position(segments.last())),
            segments,
            index,
            queue: Queue::default(),
            consumers: Mutex::default(),
            trouble: Mutex::default(),
            lock: Mutex::new(Some(folder_lock)),
            dir: dir.clone(),
        });
        let writer = writer::start(Arc::clone(&shared), appender).map_err(io)?;
        Ok(Self {
            shared,
            writer: Mutex::new(Some(writer)),
        })
    }

    /// Answers the appends that wait, releases the folder and ends all tails and consumers.
    pub async fn close(&self) {
        self.shared.queue.close();
        let writer = locked(&self.writer).take();
        if let Some(writer) = writer {
            let _ = tokio::task::spawn_blocking(move || writer.join()).await;
        }
    }
}

impl Drop for EmbeddedLog {
    fn drop(&mut self) {
        self.shared.queue.close();
        if let Some(writer) = locked(&self.writer).take() {
            let _ = writer.join();
        }
    }
}

impl Shared {
    /// Releases the folder, once nothing writes any more.
    fn release(&self) {
        locked(&self.consumers).clear();
        self.index.close();
        locked(&self.lock).take();
        self.head.send_modify(|_| {});
    }

    fn set_trouble(&self, trouble: Option<String>) {
        let mut current = locked(&self.trouble);
        if *current != trouble {
            *current = trouble;
        }
    }

    fn head(&self) -> Position {
        *self.head.borrow()
    }

    fn closed() -> ReadError {
        ReadError::Unavailable("the log is closed".into())
    }

    fn get(&self, position: Position) -> Result<Option<Recorded>, ReadError> {
        if position == Position::ZERO || position > self.head() {
            return Ok(None);
        }
        let mut found = None;
        self.segments.visit(position.0, position.0, |record| {
            found = Some(recorded(&record));
            ControlFlow::Break(())
        })?;
        match found {
            Some(recorded) => recorded.map(Some),
            None => Err(ReadError::Damaged {
                position,
                reason: "it is missing".into(),
            }),
        }
    }

    /// Matching events after a position, at most `limit`, looking at no more than `look_at`; and
    /// the position up to which all was looked at.
    fn scan(
        &self,
        after: Position,
        filter: &SubjectFilter,
        limit: usize,
        look_at: u64,
    ) -> Result<(Vec<Recorded>, Position), ReadError> {
        let head = self.head();
        if let Some(subject) = &filter.subject {
            return self.scan_subject(subject, after, head, limit);
        }
        let upto = head.0.min(after.0.saturating_add(look_at));
        let all = filter.is_all();
        let mut out = Vec::new();
        let mut seen = after;
        let mut failed = None;
        if limit > 0 && after.0 < upto {
            // No more is read from disk than is handed out.
            let upto = if all {
                upto.min(after.0.saturating_add(limit as u64))
            } else {
                upto
            };
            self.segments.visit(after.0 + 1, upto, |record| {
                let wanted = all || matches(filter, record.subject);
                if wanted {
                    match recorded(&record) {
                        Ok(recorded) => out.push(recorded),
                        Err(e) => {
                            failed = Some(e);
                            return ControlFlow::Break(());
                        }
                    }
                }
                seen = Position(record.position);
                if out.len() == limit {
                    ControlFlow::Break(())
                } else {
                    ControlFlow::Continue(())
                }
            })?;
        }
        match failed {
            // What was read before it is handed out first.
            Some(error) if out.is_empty() => Err(error),
            _ => Ok((out, seen)),
        }
    }

    fn scan_subject(
        &self,
        subject: &Subject,
        after: Position,
        head: Position,
        limit: usize,
    ) -> Result<(Vec<Recorded>, Position), ReadError> {
        let mut positions = self.index.positions_of(&subject.to_string())?;
        positions.retain(|p| *p > after.0 && *p <= head.0);
        let more = positions.len() > limit;
        positions.truncate(limit);
        let upto = match positions.last() {
            Some(last) if more => Position(*last),
            _ if limit == 0 => after,
            _ => head.max(after),
        };
        let events: Result<Vec<_>, _> = positions
            .into_iter()
            .map(|p| self.get(Position(p)))
            .collect();
        Ok((events?.into_iter().flatten().collect(), upto))
    }

    /// [`Self::scan`] without holding up other tasks.
    async fn scan_async(
        self: &Arc<Self>,
        after: Position,
        filter: &SubjectFilter,
        limit: usize,
        look_at: u64,
    ) -> Result<(Vec<Recorded>, Position), ReadError> {
        if self.head().0.saturating_sub(after.0) <= READ_INLINE {
            return self.scan(after, filter, limit, look_at);
        }
        let shared = Arc::clone(self);
        let filter = filter.clone();
        tokio::task::spawn_blocking(move || shared.scan(after, &filter, limit, look_at))
            .await
            .map_err(|e| ReadError::Unavailable(e.to_string()))?
    }
}

/// Whether a filter without a subject of its own wants this subject. Looks at the text first, as
/// most are not wanted in a filtered scan and parsing costs more.
fn matches(filter: &SubjectFilter, text: &str) -> bool {
    if let Some(kind) = filter.aggregate
        && text.split('.').nth(4) != Some(kind.as_str())
    {
        return false;
    }
    text.parse::<Subject>().is_ok_and(|s| filter.matches(&s))
}

fn recorded(record: &Record<'_>) -> Result<Recorded, ReadError> {
    let position = Position(record.position);
    let damaged = |reason: String| ReadError::Damaged { position, reason };
    Ok(Recorded {
        position,
        subject: record
            .subject
            .parse()
            .map_err(|e: daybook_events::subject::InvalidSubject| damaged(e.to_string()))?,
        stored_at: Timestamp::from_microsecond(record.stored_at)
            .map_err(|e| damaged(e.to_string()))?,
        bytes: Bytes::copy_from_slice(record.bytes),
    })
}

#[async_trait]
impl EventLog for EmbeddedLog {
    async fn append(&self, append: Append) -> Result<Appended, AppendError> {
        let bytes = append.bytes.len();
        if bytes > MAX_EVENT_BYTES {
            return Err(AppendError::TooLarge { bytes });
        }
        let looked_up = self.shared.index.look_up(append.id.0);
        let looked_up = looked_up.map_err(|e| AppendError::Unavailable(with_causes(&e)))?;
        let answered = self.shared.queue.push(append, looked_up)?;
        answered
            .await
            .unwrap_or_else(|_| Err(AppendError::Unknown("the log's writer ended".into())))
    }

    async fn head(&self) -> Result<Position, ReadError> {
        Ok(self.shared.head())
    }

    async fn get(&self, position: Position) -> Result<Option<Recorded>, ReadError> {
        self.shared.get(position)
    }

    async fn read_aggregate(&self, subject: &Subject) -> Result<Vec<Recorded>, ReadError> {
        let filter = SubjectFilter::exactly(subject.clone());
        let shared = &self.shared;
        let (events, _) = shared
            .scan_async(Position::ZERO, &filter, usize::MAX, u64::MAX)
            .await?;
        Ok(events)
    }

    async fn read(
        &self,
        after: Position,
        filter: &SubjectFilter,
        limit: usize,
    ) -> Result<Vec<Recorded>, ReadError> {
        let shared = &self.shared;
        let (events, _) = shared.scan_async(after, filter, limit, u64::MAX).await?;
        Ok(events)
    }

    async fn tail(&self, after: Position, filter: SubjectFilter) -> Result<EventStream, ReadError> {
        let tail = Tail {
            head: self.shared.head.subscribe(),
            shared: Arc::clone(&self.shared),
            after,
            filter,
            ahead: VecDeque::new(),
            ended: false,
        };
        Ok(Box::pin(stream::unfold(tail, |mut tail| async move {
            Some((tail.next().await?, tail))
        })))
    }

    async fn consumer(&self, config: ConsumerConfig) -> Result<Arc<dyn Consumer>, ReadError> {
        let core = consumers::Core::open(&self.shared, config)?;
        Ok(Arc::new(consumers::EmbeddedConsumer::new(core)))
    }

    async fn info(&self) -> Result<LogInfo, ReadError> {
        let sync = self.shared.sync;
        let mut warnings = Vec::new();
        if !sync {
            warnings.push(
                "appends are not synced to disk: the loss of power loses acknowledged events; \
                 use this for nothing that matters"
                    .into(),
            );
        }
        if let Some(trouble) = &*locked(&self.shared.trouble) {
            warnings.push(format!(
                "the last append was not stored: {trouble}; it is tried again with every append"
            ));
        }
        Ok(LogInfo {
            backend: "embedded",
            version: env!("CARGO_PKG_VERSION").into(),
            durability: if sync {
                Durability::Synced
            } else {
                Durability::Buffered
            },
            identity: self.shared.segments.identity().to_string(),
            warnings,
        })
    }
}

/// A reader that follows the log.
struct Tail {
    shared: Arc<Shared>,
    head: watch::Receiver<Position>,
    after: Position,
    filter: SubjectFilter,
    ahead: VecDeque<Recorded>,
    ended: bool,
}

impl Tail {
    async fn next(&mut self) -> Option<Result<Recorded, ReadError>> {
        loop {
            if let Some(recorded) = self.ahead.pop_front() {
                return Some(Ok(recorded));
            }
            if self.ended {
                return None;
            }
            let head = *self.head.borrow_and_update();
            if self.shared.queue.is_closed() {
                self.ended = true;
                return Some(Err(Shared::closed()));
            }
            if self.after < head {
                let read = self
                    .shared
                    .scan_async(self.after, &self.filter, TAIL_BATCH, LOOK_AT);
                match read.await {
                    Ok((events, upto)) => {
                        self.ahead.extend(events);
                        self.after = upto;
                    }
                    Err(ReadError::Unavailable(error)) => {
                        tracing::warn!(error, after = self.after.0, "tail waits to read again");
                        tokio::time::sleep(TAIL_RETRY).await;
                    }
                    Err(error) => {
                        self.ended = true;
                        return Some(Err(error));
                    }
                }
                continue;
            }
            // The sender lives in `shared`.
            let _ = self.head.changed().await;
        }
    }
}
