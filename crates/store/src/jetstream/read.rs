//! Reads and tails of the event stream, without gap or repeat across whatever happens to the
//! connection, to the servers and to the consumers that serve them.

use std::time::Duration;

use daybook_events::log::{EventStream, MAX_EVENT_BYTES, Position, ReadError, Recorded};
use daybook_events::subject::{Subject, SubjectFilter};
use futures_util::{StreamExt, stream};
use jiff::Timestamp;
use tokio::time::Instant;

use super::log::EventStreamHandle;
use super::pull::{Broken, Pulled, Puller, Wanted};
use crate::tlog::event_entry;

/// A place in the log from which events are read one after the other.
#[derive(Debug)]
pub(super) struct Cursor {
    log: EventStreamHandle,
    /// Empty if everything is wanted: then positions must be contiguous.
    filter: String,
    seen: u64,
    limit: Option<usize>,
    puller: Option<Puller>,
    /// The event after `seen` was missing when this was first noticed.
    missing_since: Option<Instant>,
    pause: Duration,
}

impl Cursor {
    pub(super) fn new(
        log: EventStreamHandle,
        after: Position,
        filter: &SubjectFilter,
        limit: Option<usize>,
    ) -> Self {
        Self {
            log,
            filter: if filter.is_all() {
                String::new()
            } else {
                filter.to_nats()
            },
            seen: after.0,
            limit,
            puller: None,
            missing_since: None,
            pause: Duration::ZERO,
        }
    }

    /// The next event, whenever it comes. An error is one that no waiting mends.
    pub(super) async fn next(&mut self) -> Result<Recorded, ReadError> {
        loop {
            match self.step().await {
                Ok(recorded) => {
                    self.pause = Duration::ZERO;
                    self.missing_since = None;
                    return Ok(recorded);
                }
                Err(Stumble::Broken(Broken(reason))) => {
                    tracing::debug!(reason, after = self.seen, "reading the log again");
                    self.puller = None;
                    tokio::time::sleep(self.pause).await;
                    self.pause =
                        (self.pause * 2).clamp(Duration::from_millis(20), Duration::from_secs(1));
                }
                Err(Stumble::Fatal(error)) => return Err(error),
            }
        }
    }

    async fn step(&mut self) -> Result<Recorded, Stumble> {
        let puller = match &mut self.puller {
            Some(puller) => puller,
            None => {
                let puller = self.open().await?;
                self.puller.insert(puller)
            }
        };
        loop {
            let pulled = puller.next().await?;
            if pulled.sequence <= self.seen {
                continue;
            }
            if self.filter.is_empty() && pulled.sequence != self.seen + 1 {
                return Err(self.missing(pulled.sequence));
            }
            self.seen = pulled.sequence;
            if let Some(limit) = &mut self.limit {
                *limit = limit.saturating_sub(1);
            }
            return Ok(recorded(pulled)?);
        }
    }

    /// Opens a reader, after making sure that the log still is the one that was read so far.
    async fn open(&self) -> Result<Puller, Stumble> {
        let began = Instant::now();
        loop {
            let state = self.log.state().await.map_err(|error| match error {
                ReadError::Unavailable(reason) => Stumble::Broken(Broken(reason)),
                other => Stumble::Fatal(other),
            })?;
            if state.last_sequence >= self.seen {
                break;
            }
            if began.elapsed() > self.settling() {
                return Err(Stumble::Fatal(ReadError::Damaged {
                    position: Position(state.last_sequence),
                    reason: format!(
                        "the log ends here, although it was read up to {}",
                        self.seen
                    ),
                }));
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        let wanted = Wanted {
            after: self.seen,
            filter: self.filter.clone(),
            limit: self.limit,
            largest: MAX_EVENT_BYTES,
        };
        Ok(self.log.pull(&wanted).await?)
    }

    /// How long a log may look shorter than it was, or with a hole, before that counts as a loss: a
    /// new leader of the stream needs a moment to apply what was committed.
    fn settling(&self) -> Duration {
        2 * self.log.connection.answer_timeout()
    }

    /// An event is missing: perhaps on the way, and then another reader finds it.
    fn missing(&mut self, found: u64) -> Stumble {
        let since = *self.missing_since.get_or_insert_with(Instant::now);
        if since.elapsed() < self.settling() {
            return Stumble::Broken(Broken(format!(
                "event {found} came instead of {}",
                self.seen + 1
            )));
        }
        Stumble::Fatal(ReadError::Missing {
            position: Position(self.seen + 1),
        })
    }

    /// Everything that follows, for ever or up to an error.
    pub(super) fn into_stream(self) -> EventStream {
        // It goes from hand to hand with each event, and is large.
        stream::unfold(Some(Box::new(self)), |cursor| async move {
            let mut cursor = cursor?;
            match cursor.next().await {
                Ok(recorded) => Some((Ok(recorded), Some(cursor))),
                Err(error) => Some((Err(error), None)),
            }
        })
        .boxed()
    }
}

enum Stumble {
    /// Another reader may get further.
    Broken(Broken),
    /// None will.
    Fatal(ReadError),
}

impl From<Broken> for Stumble {
    fn from(broken: Broken) -> Self {
        Self::Broken(broken)
    }
}

impl From<ReadError> for Stumble {
    fn from(error: ReadError) -> Self {
        Self::Fatal(error)
    }
}

fn recorded(pulled: Pulled) -> Result<Recorded, ReadError> {
    recorded_from(
        pulled.sequence,
        &pulled.message.subject,
        pulled.stored_at,
        pulled.message.payload,
    )
}

/// An event from what the stream has of it. In the place of one that is too large for the tree stands
/// its leaf: nobody acts on what is not signed and would be gone after a repair.
pub(super) fn recorded_from(
    sequence: u64,
    subject: &str,
    stored_at: i128,
    bytes: bytes::Bytes,
) -> Result<Recorded, ReadError> {
    let position = Position(sequence);
    let damaged = |reason: String| ReadError::Damaged { position, reason };
    let stored_at =
        Timestamp::from_nanosecond(stored_at).map_err(|error| damaged(error.to_string()))?;
    Ok(Recorded {
        position,
        subject: Subject::of_stored(subject),
        stored_at,
        bytes: event_entry(position, &bytes),
    })
}
