//! The port to the log: what Daybook asks of a backend, and nothing more.
//!
//! One message is one event. A backend gives every stored event a [`Position`], contiguous from 1
//! in the order of storage, and never changes, reorders or forgets one. `daybook-store` has the
//! backends and the conformance suite that each of them passes.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use futures_util::stream::BoxStream;
use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use crate::envelope::{DecodeError, Event};
use crate::names::EventId;
use crate::subject::{Subject, SubjectFilter};

/// The largest event, in bytes, that fits an entry bundle of the transparency log (C2SP
/// tlog-tiles: a big-endian uint16 length).
pub const MAX_EVENT_BYTES: usize = 65_535;

/// Where an event stands in the log: 1 for the first. [`Position::ZERO`] is before the first.
#[derive(
    Clone,
    Copy,
    PartialEq,
    Eq,
    PartialOrd,
    Ord,
    Hash,
    Default,
    Serialize,
    Deserialize,
    schemars::JsonSchema,
)]
#[serde(transparent)]
pub struct Position(pub u64);

impl Position {
    /// Before the first event: as an expectation, "this aggregate has no event yet".
    pub const ZERO: Self = Self(0);

    /// The position after this one; the last one there can be has none, and is its own.
    pub fn next(self) -> Self {
        Self(self.0.saturating_add(1))
    }
}
impl fmt::Display for Position {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}
impl fmt::Debug for Position {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "#{}", self.0)
    }
}

/// An event as it is stored: exact bytes, with the place that the log gave it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Recorded {
    /// Its place in the log.
    pub position: Position,
    /// The aggregate that it belongs to.
    pub subject: Subject,
    /// When the log stored it, by the log's clock. For display; nothing is decided by it.
    pub stored_at: Timestamp,
    /// The exact stored bytes: a CloudEvent in JSON, structured mode.
    pub bytes: Bytes,
}

impl Recorded {
    /// Reads the envelope. The payload is decoded by the aggregate that it belongs to.
    pub fn event(&self) -> Result<Event, DecodeError> {
        Event::from_bytes(&self.bytes)
    }
}

/// What the writer believes about the aggregate that it appends to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Expected {
    /// Append whatever is there. For facts that stand on their own.
    Any,
    /// The last event of this subject is at this position; [`Position::ZERO`] for none.
    Last(Position),
}

/// One event on its way into the log.
#[derive(Debug, Clone)]
pub struct Append {
    /// The aggregate.
    pub subject: Subject,
    /// The event's id, by which the log recognises a repetition.
    pub id: EventId,
    /// What must be true for the append to be accepted.
    pub expected: Expected,
    /// The bytes to store, unchanged.
    pub bytes: Bytes,
}

/// The answer to an accepted append. When it arrives the event is as durable as
/// [`LogInfo::durability`] says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Appended {
    /// Where the event stands.
    pub position: Position,
    /// The same id had been stored before, at `position`; nothing was added.
    pub duplicate: bool,
}

/// Why an append was not done.
#[derive(Debug, thiserror::Error)]
pub enum AppendError {
    /// Somebody else appended to this aggregate first. Fold what is new and decide again.
    #[error(
        "the aggregate has moved on: expected its last event at {expected:?}, found {actual:?}"
    )]
    Conflict {
        /// What the writer believed.
        expected: Position,
        /// What is true, where the backend could say so.
        actual: Option<Position>,
    },
    /// The event is larger than [`MAX_EVENT_BYTES`]. Put large things behind a digest.
    #[error("the event has {bytes} bytes; at most {MAX_EVENT_BYTES} fit an entry of the ledger")]
    TooLarge {
        /// Its size.
        bytes: usize,
    },
    /// The event is certainly not stored; trying again later may help.
    #[error("the log is not available: {0}")]
    Unavailable(String),
    /// It is not known whether the event is stored. Append the same id again to find out: a
    /// stored event is then answered as a duplicate.
    #[error("it is not known whether the event was stored: {0}")]
    Unknown(String),
    /// Appends were stopped on purpose, because the log is not what it was. No retry helps.
    #[error("appends are stopped: {0}")]
    Stopped(String),
}

impl AppendError {
    /// Whether the same append may succeed later without anybody deciding anew.
    pub fn is_retryable(&self) -> bool {
        matches!(self, Self::Unavailable(_) | Self::Unknown(_))
    }
}

/// Why the log could not be read.
#[derive(Debug, thiserror::Error)]
pub enum ReadError {
    /// Trying again later may help.
    #[error("the log is not available: {0}")]
    Unavailable(String),
    /// What was read is not what was written. No retry helps.
    #[error("the log is damaged at {position:?}: {reason}")]
    Damaged {
        /// Where.
        position: Position,
        /// What was found.
        reason: String,
    },
    /// Nothing is there, although the log has gone past it. No retry helps.
    #[error("the log has no event at {position:?}, although it has later ones")]
    Missing {
        /// Where.
        position: Position,
    },
    /// The call cannot be served as it was made.
    #[error("{0}")]
    Invalid(String),
}

/// What an acknowledgement of this log is worth.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Durability {
    /// It survives the loss of power: synced to disk before it is acknowledged.
    Synced,
    /// It survives the death of the process, but not of the machine.
    Buffered,
    /// The backend does not say.
    Unknown,
}

/// What is known of a log.
#[derive(Debug, Clone, Serialize)]
pub struct LogInfo {
    /// "embedded" or "jetstream".
    pub backend: &'static str,
    /// Version of the server or store.
    pub version: String,
    /// What an acknowledgement means here.
    pub durability: Durability,
    /// Identifies this very log, and changes when it is made anew.
    pub identity: String,
    /// What an operator should know, each with a way out; empty when all is well.
    pub warnings: Vec<String>,
}

/// How the connection to a log's server does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Link {
    /// Whether it stands.
    pub is_up: bool,
    /// How often it was made.
    pub connects: u64,
    /// Messages that came in.
    pub messages_in: u64,
    /// Messages that went out.
    pub messages_out: u64,
    /// Bytes that came in, without what the protocol adds.
    pub bytes_in: u64,
    /// Bytes that went out, without what the protocol adds.
    pub bytes_out: u64,
}

/// Events in log order.
pub type EventStream = BoxStream<'static, Result<Recorded, ReadError>>;

/// The log of record.
#[async_trait]
pub trait EventLog: Send + Sync + fmt::Debug + 'static {
    /// Appends one event.
    ///
    /// Repeating an append with the same id is answered with the first position and
    /// `duplicate: true` as long as the backend remembers ids (at least two minutes), and also
    /// when the last event of the subject carries that id, whatever `expected` says.
    async fn append(&self, append: Append) -> Result<Appended, AppendError>;

    /// Whether two appends with the same expectation may both be accepted, as the leader of a
    /// cluster of brokers may do. The first one in log order counts then, and the other is void: so
    /// whoever appends has to look, once it is folded, whether its event counted.
    fn may_accept_two(&self) -> bool {
        false
    }

    /// Position of the last event; [`Position::ZERO`] for an empty log.
    async fn head(&self) -> Result<Position, ReadError>;

    /// The event at a position, or `None` if there is none (yet).
    async fn get(&self, position: Position) -> Result<Option<Recorded>, ReadError>;

    /// All events of one aggregate, in order. May cost tens of milliseconds on a broker; for
    /// hot paths use the folded state that a projection keeps.
    async fn read_aggregate(&self, subject: &Subject) -> Result<Vec<Recorded>, ReadError>;

    /// At most `limit` events after a position, in order, without waiting for new ones. Fewer
    /// than `limit` means that the end was reached when the call was answered.
    async fn read(
        &self,
        after: Position,
        filter: &SubjectFilter,
        limit: usize,
    ) -> Result<Vec<Recorded>, ReadError>;

    /// All events after a position, and then those to come: without gap, without repeat, across
    /// reconnects. It ends only with an error that no waiting would mend.
    async fn tail(&self, after: Position, filter: SubjectFilter) -> Result<EventStream, ReadError>;

    /// Opens the durable consumer of this name, creating it if there is none. All who open the
    /// same name, in any process, share its deliveries.
    async fn consumer(&self, config: ConsumerConfig) -> Result<Arc<dyn Consumer>, ReadError>;

    /// What is known of this log.
    async fn info(&self) -> Result<LogInfo, ReadError>;

    /// How the connection to its server does; none for a log that has no server. It is known
    /// without asking anybody.
    fn link(&self) -> Option<Link> {
        None
    }
}

/// How a durable consumer delivers.
#[derive(Debug, Clone)]
pub struct ConsumerConfig {
    /// Its name: lowercase letters, digits, hyphens.
    pub name: String,
    /// What it delivers.
    pub filter: SubjectFilter,
    /// A delivery that is neither acknowledged nor in progress for this long is made again.
    pub ack_wait: Duration,
    /// A delivery is made at most this often. The last one has [`Delivery::is_last`].
    pub max_deliver: u32,
    /// How many deliveries may be unacknowledged at once, over all who share the consumer.
    pub max_in_flight: usize,
}

impl ConsumerConfig {
    /// A consumer with the settings that suit a worker.
    pub fn new(name: impl Into<String>, filter: SubjectFilter) -> Self {
        Self {
            name: name.into(),
            filter,
            ack_wait: Duration::from_secs(15),
            max_deliver: 20,
            max_in_flight: 256,
        }
    }
}

/// A durable consumer. Deliveries are in log order, except for those made again.
#[async_trait]
pub trait Consumer: Send + Sync + fmt::Debug {
    /// The next delivery; waits until there is one. Cancel-safe: a delivery that was not
    /// returned is made again.
    async fn next(&self) -> Result<Delivery, ReadError>;
}

/// One event handed to a worker, to be answered by exactly one of `ack`, `nak`, `term`. Dropping
/// it unanswered leads to another delivery after the consumer's `ack_wait`.
#[derive(Debug)]
pub struct Delivery {
    /// The event.
    pub recorded: Recorded,
    /// 1 for the first delivery of this event.
    pub attempt: u32,
    /// No delivery will follow this one, whatever the answer.
    pub is_last: bool,
    /// How to answer.
    pub reply: Box<dyn Reply>,
}

/// How a delivery is answered. Errors mean that the answer may not have arrived: the event may be
/// delivered again, and the worker's step, being idempotent, will find nothing to do.
#[async_trait]
pub trait Reply: Send + Sync + fmt::Debug {
    /// Done with it.
    async fn ack(&self) -> Result<(), ReadError>;
    /// Deliver it again after this long.
    async fn nak(&self, delay: Duration) -> Result<(), ReadError>;
    /// Still at it: the `ack_wait` starts anew.
    async fn progress(&self) -> Result<(), ReadError>;
    /// Never deliver it again.
    async fn term(&self) -> Result<(), ReadError>;
}
