//! A log in memory, complete but for durability: for tests of whatever stands on the port.
//!
//! It can be told to misbehave as brokers do, see [`Fault`].

// The log is the outside here: it has a clock, and is another one each time.
#![allow(clippy::disallowed_methods)]

use std::collections::{BTreeMap, VecDeque};
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use futures_util::StreamExt;
use jiff::Timestamp;
use tokio::sync::{Notify, watch};
use tokio::time::Instant;

use crate::log::{
    Append, AppendError, Appended, Consumer, ConsumerConfig, Delivery, Durability, EventLog,
    EventStream, Expected, LogInfo, MAX_EVENT_BYTES, Position, ReadError, Recorded, Reply,
};
use crate::names::EventId;
use crate::subject::{Subject, SubjectFilter};

/// What goes wrong with one append.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// The event is not stored, and the writer is told so.
    Unavailable,
    /// The event is stored, and the writer does not learn of it.
    LostAck,
    /// The writer's expectation is not looked at, as when two leaders accept at once.
    Unchecked,
}

/// A log in memory. Clones are the same log.
#[derive(Clone)]
pub struct MemoryLog {
    shared: Arc<Shared>,
}

struct Shared {
    data: Mutex<Data>,
    head: watch::Sender<Position>,
}

#[derive(Default)]
struct Data {
    events: Vec<Recorded>,
    last: BTreeMap<Subject, Position>,
    ids: BTreeMap<EventId, Position>,
    consumers: BTreeMap<String, Arc<Durable>>,
    faults: VecDeque<Fault>,
    identity: String,
}

impl Default for MemoryLog {
    fn default() -> Self {
        Self::new()
    }
}

impl fmt::Debug for MemoryLog {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("MemoryLog")
            .field("head", &*self.shared.head.borrow())
            .finish()
    }
}

impl MemoryLog {
    /// An empty log.
    pub fn new() -> Self {
        Self {
            shared: Arc::new(Shared {
                data: Mutex::new(Data {
                    identity: uuid::Uuid::new_v4().to_string(),
                    ..Data::default()
                }),
                head: watch::Sender::new(Position::ZERO),
            }),
        }
    }

    /// Lets the next append go wrong. Faults that are injected before it is made queue up.
    pub fn inject(&self, fault: Fault) {
        self.data().faults.push_back(fault);
    }

    /// Appends, and lets that go wrong. An event that is there already is no occasion for a fault.
    pub(crate) fn append_with(
        &self,
        append: Append,
        fault: Option<Fault>,
    ) -> Result<Appended, AppendError> {
        let bytes = append.bytes.len();
        if bytes > MAX_EVENT_BYTES {
            return Err(AppendError::TooLarge { bytes });
        }
        let mut data = self.data();
        if let Some(position) = data.ids.get(&append.id) {
            return Ok(Appended {
                position: *position,
                duplicate: true,
            });
        }
        if fault == Some(Fault::Unavailable) {
            return Err(AppendError::Unavailable("as it was told".to_owned()));
        }
        if let (Expected::Last(expected), true) = (append.expected, fault != Some(Fault::Unchecked))
        {
            let actual = data.last.get(&append.subject).copied().unwrap_or_default();
            if actual != expected {
                return Err(AppendError::Conflict {
                    expected,
                    actual: Some(actual),
                });
            }
        }
        let position = data.push(append.subject, Some(append.id), append.bytes);
        // Told while nobody else can append: a head that stands behind an event that was read, or goes
        // back, is a log that lost its tail.
        self.shared.head.send_replace(position);
        drop(data);
        if fault == Some(Fault::LostAck) {
            return Err(AppendError::Unknown("as it was told".to_owned()));
        }
        Ok(Appended {
            position,
            duplicate: false,
        })
    }

    /// Stores bytes as they are, whatever they are: poison, or an event of another version.
    pub fn store(&self, subject: Subject, bytes: impl Into<bytes::Bytes>) -> Position {
        let mut data = self.data();
        let position = data.push(subject, None, bytes.into());
        self.shared.head.send_replace(position);
        position
    }

    /// Forgets all events after a position, as a broker does that lost its tail.
    pub fn truncate(&self, position: Position) {
        let mut data = self.data();
        data.events.truncate(index(position));
        data.ids.retain(|_, p| *p <= position);
        data.last = BTreeMap::new();
        for event in std::mem::take(&mut data.events) {
            data.last.insert(event.subject.clone(), event.position);
            data.events.push(event);
        }
        self.shared.head.send_replace(position);
    }

    fn data(&self) -> MutexGuard<'_, Data> {
        lock(&self.shared.data)
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Where the event after a position stands in memory.
fn index(after: Position) -> usize {
    usize::try_from(after.0).unwrap_or(usize::MAX)
}

impl Data {
    fn push(&mut self, subject: Subject, id: Option<EventId>, bytes: bytes::Bytes) -> Position {
        let position = Position(self.events.len() as u64 + 1);
        self.last.insert(subject.clone(), position);
        if let Some(id) = id {
            self.ids.insert(id, position);
        }
        self.events.push(Recorded {
            position,
            subject,
            stored_at: Timestamp::now(),
            bytes,
        });
        position
    }

    fn after(&self, after: Position) -> impl Iterator<Item = &Recorded> {
        self.events.iter().skip(index(after))
    }
}

#[async_trait]
impl EventLog for MemoryLog {
    async fn append(&self, append: Append) -> Result<Appended, AppendError> {
        let fault = {
            let mut data = self.data();
            match data.ids.contains_key(&append.id) {
                true => None,
                false => data.faults.pop_front(),
            }
        };
        self.append_with(append, fault)
    }

    async fn head(&self) -> Result<Position, ReadError> {
        Ok(*self.shared.head.borrow())
    }

    async fn get(&self, position: Position) -> Result<Option<Recorded>, ReadError> {
        let Some(before) = position.0.checked_sub(1) else {
            return Ok(None);
        };
        Ok(self.data().after(Position(before)).next().cloned())
    }

    async fn read_aggregate(&self, subject: &Subject) -> Result<Vec<Recorded>, ReadError> {
        let data = self.data();
        let events = data.events.iter().filter(|e| e.subject == *subject);
        Ok(events.cloned().collect())
    }

    async fn read(
        &self,
        after: Position,
        filter: &SubjectFilter,
        limit: usize,
    ) -> Result<Vec<Recorded>, ReadError> {
        let data = self.data();
        let events = data.after(after).filter(|e| filter.matches(&e.subject));
        Ok(events.take(limit).cloned().collect())
    }

    async fn tail(&self, after: Position, filter: SubjectFilter) -> Result<EventStream, ReadError> {
        struct Reader {
            log: MemoryLog,
            after: Position,
            filter: SubjectFilter,
            head: watch::Receiver<Position>,
        }
        let reader = Reader {
            log: self.clone(),
            after,
            filter,
            head: self.shared.head.subscribe(),
        };
        let chunks = futures_util::stream::unfold(reader, |mut r| async move {
            loop {
                let head = *r.head.borrow_and_update();
                let chunk: Vec<_> = {
                    let data = r.log.data();
                    let events = data.after(r.after).take(1024);
                    events.cloned().collect()
                };
                if let Some(last) = chunk.last() {
                    r.after = last.position;
                    let wanted = chunk
                        .into_iter()
                        .filter(|e| r.filter.matches(&e.subject))
                        .map(Ok);
                    let wanted: Vec<_> = wanted.collect();
                    return Some((futures_util::stream::iter(wanted), r));
                }
                if r.after > head {
                    let failed = ReadError::Damaged {
                        position: r.after,
                        reason: "the log lost its tail".to_owned(),
                    };
                    let end = vec![Err(failed)];
                    return Some((futures_util::stream::iter(end), r));
                }
                if r.head.changed().await.is_err() {
                    return None;
                }
            }
        });
        Ok(chunks.flatten().boxed())
    }

    async fn consumer(&self, config: ConsumerConfig) -> Result<Arc<dyn Consumer>, ReadError> {
        let mut data = self.data();
        let durable = data
            .consumers
            .entry(config.name.clone())
            .or_insert_with(|| Arc::new(Durable::new(config)));
        Ok(Arc::new(MemoryConsumer {
            log: self.clone(),
            durable: durable.clone(),
        }))
    }

    async fn info(&self) -> Result<LogInfo, ReadError> {
        Ok(LogInfo {
            backend: "memory",
            version: env!("CARGO_PKG_VERSION").to_owned(),
            durability: Durability::Unknown,
            identity: self.data().identity.clone(),
            warnings: vec!["nothing is kept after the end of the process".to_owned()],
        })
    }
}

/// What all who open a consumer share.
struct Durable {
    config: ConsumerConfig,
    progress: Mutex<Progress>,
    changed: Notify,
}

#[derive(Default)]
struct Progress {
    /// All up to here were delivered at least once.
    delivered: Position,
    pending: BTreeMap<Position, Pending>,
}

struct Pending {
    attempt: u32,
    due: Instant,
}

impl Durable {
    fn new(config: ConsumerConfig) -> Self {
        Self {
            config,
            progress: Mutex::default(),
            changed: Notify::new(),
        }
    }

    fn answer(&self, position: Position, attempt: u32, due: Option<Duration>) {
        let mut progress = lock(&self.progress);
        match due {
            None => {
                progress.pending.remove(&position);
            }
            Some(delay) => {
                if let Some(p) = progress.pending.get_mut(&position)
                    && p.attempt == attempt
                {
                    p.due = Instant::now() + delay;
                }
            }
        }
        drop(progress);
        self.changed.notify_waiters();
    }
}

struct MemoryConsumer {
    log: MemoryLog,
    durable: Arc<Durable>,
}

impl fmt::Debug for MemoryConsumer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("MemoryConsumer")
            .field("name", &self.durable.config.name)
            .finish_non_exhaustive()
    }
}

impl MemoryConsumer {
    /// A delivery that is to be made now, or when there will be one at the latest.
    fn try_next(&self) -> Result<Delivery, Option<Instant>> {
        let config = &self.durable.config;
        let data = self.log.data();
        let mut progress = lock(&self.durable.progress);
        let now = Instant::now();
        progress
            .pending
            .retain(|_, p| p.due > now || p.attempt < config.max_deliver);
        let due = progress.pending.iter().find(|(_, p)| p.due <= now);
        let position = match due.map(|(position, _)| *position) {
            Some(position) => position,
            None => {
                let free = progress.pending.len() < config.max_in_flight;
                let next = data
                    .after(progress.delivered)
                    .filter(|_| free)
                    .find(|e| config.filter.matches(&e.subject));
                let Some(next) = next else {
                    return Err(progress.pending.values().map(|p| p.due).min());
                };
                progress.delivered = next.position;
                next.position
            }
        };
        let pending = progress.pending.entry(position).or_insert(Pending {
            attempt: 0,
            due: now,
        });
        pending.attempt += 1;
        pending.due = now + config.ack_wait;
        let attempt = pending.attempt;
        let Some(recorded) = data.events.get(index(position) - 1).cloned() else {
            progress.pending.remove(&position);
            return Err(Some(now));
        };
        Ok(Delivery {
            recorded,
            attempt,
            is_last: attempt >= config.max_deliver,
            reply: Box::new(MemoryReply {
                durable: self.durable.clone(),
                position,
                attempt,
            }),
        })
    }
}

#[async_trait]
impl Consumer for MemoryConsumer {
    async fn next(&self) -> Result<Delivery, ReadError> {
        let mut head = self.log.shared.head.subscribe();
        loop {
            head.borrow_and_update();
            let mut changed = std::pin::pin!(self.durable.changed.notified());
            changed.as_mut().enable();
            let due = match self.try_next() {
                Ok(delivery) => return Ok(delivery),
                Err(due) => due,
            };
            let wait = async {
                match due {
                    Some(due) => tokio::time::sleep_until(due).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                _ = head.changed() => {}
                () = &mut changed => {}
                () = wait => {}
            }
        }
    }
}

struct MemoryReply {
    durable: Arc<Durable>,
    position: Position,
    attempt: u32,
}

impl fmt::Debug for MemoryReply {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "MemoryReply({:?})", self.position)
    }
}

#[async_trait]
impl Reply for MemoryReply {
    async fn ack(&self) -> Result<(), ReadError> {
        self.durable.answer(self.position, self.attempt, None);
        Ok(())
    }
    async fn nak(&self, delay: Duration) -> Result<(), ReadError> {
        self.durable
            .answer(self.position, self.attempt, Some(delay));
        Ok(())
    }
    async fn progress(&self) -> Result<(), ReadError> {
        let wait = self.durable.config.ack_wait;
        self.durable.answer(self.position, self.attempt, Some(wait));
        Ok(())
    }
    async fn term(&self) -> Result<(), ReadError> {
        self.durable.answer(self.position, self.attempt, None);
        Ok(())
    }
}
