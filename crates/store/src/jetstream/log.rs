//! The log of record as a JetStream stream.

use std::fmt;
use std::sync::Arc;

use async_nats::jetstream::stream::{DirectGetErrorKind, RawMessageErrorKind, State, Stream};
use async_trait::async_trait;
use daybook_events::log::{
    Append, AppendError, Appended, Consumer, ConsumerConfig, EventLog, EventStream, Expected, Link,
    LogInfo, MAX_EVENT_BYTES, Position, ReadError, Recorded,
};
use daybook_events::subject::{PREFIX, Subject, SubjectFilter};

use super::connection::Connection;
use super::durability;
use super::durable_consumer::DurableConsumer;
use super::leader;
use super::publish::{Outgoing, PublishFailure, Publisher};
use super::pull::{Broken, Puller, Wanted};
use super::read::{Cursor, recorded_from};
use super::stream_setup::{self, OpenError, StreamSetup};

/// Media type of what is stored.
const CLOUD_EVENT: &str = "application/cloudevents+json";

/// How the stream of events is to be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LogOptions {
    /// Name of the stream.
    pub stream: String,
    /// On how many servers each event is kept; 1, 3 or 5. Only used when the stream is created.
    pub replicas: usize,
}

impl Default for LogOptions {
    fn default() -> Self {
        Self {
            stream: "DAYBOOK".to_owned(),
            replicas: 1,
        }
    }
}

/// The log of record on NATS JetStream.
pub struct JetStreamLog {
    handle: EventStreamHandle,
    publisher: Publisher,
    replicated: bool,
    notes: Vec<String>,
}

impl fmt::Debug for JetStreamLog {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("JetStreamLog")
            .field("stream", &self.handle.name)
            .field("connection", &self.handle.connection)
            .finish_non_exhaustive()
    }
}

impl JetStreamLog {
    /// Opens the log, creating its stream if there is none.
    ///
    /// A stream that is there but set up in a way that could lose events is refused; one that is
    /// merely different is taken, and [`EventLog::info`] says what is different.
    pub async fn open(connection: Connection, options: &LogOptions) -> Result<Self, OpenError> {
        let setup = StreamSetup::events(options);
        let opened = stream_setup::open(&connection, &setup).await?;
        let handle = EventStreamHandle {
            name: options.stream.as_str().into(),
            allow_direct: opened.allow_direct,
            created: opened.created,
            stream: opened.stream,
            connection,
        };
        Ok(Self {
            publisher: Publisher::new(handle.connection.clone(), handle.stream.clone()),
            handle,
            replicated: opened.replicated,
            notes: opened.notes,
        })
    }

    /// Opens the log as [`open`](Self::open) does, if its stream is there. None is created.
    pub async fn open_existing(
        connection: Connection,
        options: &LogOptions,
    ) -> Result<Self, OpenError> {
        stream_setup::must_exist(&connection, &options.stream).await?;
        Self::open(connection, options).await
    }

    /// The last position that a filter lets through, as the stream's leader knows it.
    async fn last_match(&self, filter: &SubjectFilter) -> Result<Option<u64>, ReadError> {
        if filter.is_all() {
            let last = self.handle.state().await?.last_sequence;
            return Ok((last > 0).then_some(last));
        }
        let last = leader::ask(&self.handle.connection, || {
            let message = self.handle.stream.raw_message_builder();
            message.last_by_subject(filter.to_nats()).send()
        });
        match last.await {
            Ok(message) => Ok(Some(message.sequence)),
            Err(error) if error.kind() == RawMessageErrorKind::NoMessageFound => Ok(None),
            Err(error) => Err(ReadError::Unavailable(error.to_string())),
        }
    }

    /// An event as the stream's leader has it. The other replicas may lag behind.
    async fn get_from_leader(&self, position: Position) -> Result<Option<Recorded>, ReadError> {
        let message = leader::ask(&self.handle.connection, || {
            let message = self.handle.stream.raw_message_builder();
            message.sequence(position.0).send()
        });
        match message.await {
            Ok(message) => recorded_from(
                message.sequence,
                &message.subject,
                message.time.unix_timestamp_nanos(),
                message.payload,
            )
            .map(Some),
            Err(error) if error.kind() == RawMessageErrorKind::NoMessageFound => {
                if self.handle.state().await?.last_sequence < position.0 {
                    return Ok(None);
                }
                Err(ReadError::Missing { position })
            }
            Err(error) => Err(ReadError::Unavailable(error.to_string())),
        }
    }
}

#[async_trait]
impl EventLog for JetStreamLog {
    async fn append(&self, append: Append) -> Result<Appended, AppendError> {
        let size = append.bytes.len();
        if size > MAX_EVENT_BYTES {
            return Err(AppendError::TooLarge { bytes: size });
        }
        let message = Outgoing {
            subject: append.subject.to_string().into(),
            id: append.id.to_string(),
            expected: match append.expected {
                Expected::Any => None,
                Expected::Last(position) => Some(position.0),
            },
            content_type: CLOUD_EVENT,
            headers: Vec::new(),
            payload: append.bytes,
        };
        match self.publisher.publish(&message).await {
            Ok(stored) => Ok(Appended {
                position: Position(stored.sequence),
                duplicate: stored.duplicate,
            }),
            Err(PublishFailure::Conflict { actual }) => Err(AppendError::Conflict {
                expected: Position(message.expected.unwrap_or(0)),
                actual: actual.map(Position),
            }),
            Err(PublishFailure::TooLarge) => Err(AppendError::TooLarge { bytes: size }),
            Err(PublishFailure::Refused(reason)) => Err(AppendError::Unavailable(reason)),
            Err(PublishFailure::Unknown(reason)) => Err(AppendError::Unknown(reason)),
            Err(PublishFailure::Hopeless(reason)) => Err(AppendError::Stopped(reason)),
        }
    }

    fn may_accept_two(&self) -> bool {
        // The leader looks at expectations before the others have agreed on what came before.
        self.replicated
    }

    fn link(&self) -> Option<Link> {
        Some(self.handle.connection.link())
    }

    async fn head(&self) -> Result<Position, ReadError> {
        Ok(Position(self.handle.state().await?.last_sequence))
    }

    async fn get(&self, position: Position) -> Result<Option<Recorded>, ReadError> {
        if position == Position::ZERO {
            return Ok(None);
        }
        if self.handle.allow_direct {
            match self.handle.stream.direct_get(position.0).await {
                Ok(message) => {
                    return recorded_from(
                        message.sequence,
                        &message.subject,
                        message.time.unix_timestamp_nanos(),
                        message.payload,
                    )
                    .map(Some);
                }
                Err(error) if error.kind() == DirectGetErrorKind::NotFound => {}
                Err(error) => tracing::debug!(%error, "asking the leader instead"),
            }
        }
        self.get_from_leader(position).await
    }

    async fn read_aggregate(&self, subject: &Subject) -> Result<Vec<Recorded>, ReadError> {
        let filter = SubjectFilter::exactly(subject.clone());
        self.read(Position::ZERO, &filter, usize::MAX).await
    }

    async fn read(
        &self,
        after: Position,
        filter: &SubjectFilter,
        limit: usize,
    ) -> Result<Vec<Recorded>, ReadError> {
        // Reading up to what the leader has keeps a lagging replica from cutting the answer off.
        let end = match self.last_match(filter).await? {
            Some(end) if end > after.0 && limit > 0 => end,
            _ => return Ok(Vec::new()),
        };
        let at_most = limit.min(usize::try_from(end - after.0).unwrap_or(usize::MAX));
        let mut events = Vec::with_capacity(at_most.min(1024));
        let mut cursor = Cursor::new(self.handle.clone(), after, filter, Some(at_most));
        while events.len() < at_most {
            let next =
                tokio::time::timeout(3 * self.handle.connection.answer_timeout(), cursor.next());
            let recorded = next.await.map_err(|_| {
                ReadError::Unavailable("NATS does not deliver what is in the log".to_owned())
            })??;
            let position = recorded.position.0;
            if position <= end {
                events.push(recorded);
            }
            if position >= end {
                break;
            }
        }
        Ok(events)
    }

    async fn tail(&self, after: Position, filter: SubjectFilter) -> Result<EventStream, ReadError> {
        Ok(Cursor::new(self.handle.clone(), after, &filter, None).into_stream())
    }

    async fn consumer(&self, config: ConsumerConfig) -> Result<Arc<dyn Consumer>, ReadError> {
        let consumer = DurableConsumer::open(self.handle.clone(), config).await?;
        Ok(Arc::new(consumer))
    }

    async fn info(&self) -> Result<LogInfo, ReadError> {
        let info = self
            .handle
            .stream
            .get_info()
            .await
            .map_err(|error| ReadError::Unavailable(error.to_string()))?;
        let mut warnings = self.notes.clone();
        let durability = durability::judge(&self.handle.connection, &info, &mut warnings).await;
        Ok(LogInfo {
            backend: "jetstream",
            version: self.handle.connection.client().server_info().version,
            durability,
            identity: self.handle.identity(),
            warnings,
        })
    }
}

/// The stream of events, for those who read it. Clones are cheap.
#[derive(Clone)]
pub(super) struct EventStreamHandle {
    pub(super) connection: Connection,
    pub(super) stream: Stream<()>,
    pub(super) name: Arc<str>,
    /// When it was created, in nanoseconds since 1970: another value is another stream.
    created: i128,
    allow_direct: bool,
}

impl fmt::Debug for EventStreamHandle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("EventStreamHandle")
            .field(&self.name)
            .finish()
    }
}

impl EventStreamHandle {
    /// What the stream holds, provided that it still is the same stream.
    pub(super) async fn state(&self) -> Result<State, ReadError> {
        let info = leader::ask(&self.connection, || self.stream.get_info())
            .await
            .map_err(|error| ReadError::Unavailable(error.to_string()))?;
        if info.created.unix_timestamp_nanos() != self.created {
            return Err(ReadError::Damaged {
                position: Position::ZERO,
                reason: format!(
                    "the stream {} was made anew at {}; it is not the log that was opened",
                    self.name, info.created
                ),
            });
        }
        Ok(info.state)
    }

    pub(super) async fn pull(&self, wanted: &Wanted) -> Result<Puller, Broken> {
        Puller::open(&self.connection, &self.stream, &self.name, wanted).await
    }

    fn identity(&self) -> String {
        format!("{}@{}", self.name, self.created)
    }
}

/// Every subject of the log.
pub(super) fn all_subjects() -> String {
    format!("{PREFIX}.>")
}
