//! The feed of events for all who subscribe over HTTP.
//!
//! New events are read from the log once, whoever waits for them, kept for a while, and written
//! down once in each form in which they are sent. A subscriber is a position: what it has not had
//! yet it takes from what is kept, or, if it is too slow for that or comes from the past, from the
//! log. So nobody misses anything, however slow, and nobody waits for anybody else.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use daybook_events::feed::leaf_hash;
use daybook_events::log::{EventLog, ReadError, Recorded};
use daybook_events::{Event, Position, SubjectFilter};
use daybook_projections::Projections;
use futures_util::{Stream, StreamExt, stream};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::event_filter::EventFilter;
use crate::sse;

/// Most events, and most of their bytes, that are kept for subscribers.
const KEPT: usize = 2048;
const KEPT_BYTES: usize = 8 * 1024 * 1024;
/// Most events that a subscriber is given at once.
const BATCH: usize = 64;
/// Events that are read from the log at once.
const READ: usize = 512;
/// How long new events are gathered for each subscriber there is, before all are told of them. The first
/// event after a pause is passed on at once; those that follow close on it are written together: a
/// thousand subscribers are told of them 33 times a second at most. What that costs is in ADR 32.
const GATHER_EACH: Duration = Duration::from_micros(30);
/// The longest, however many there are, and the shortest: what a timer can tell apart.
const GATHER_MOST: Duration = Duration::from_millis(30);
const GATHER_LEAST: Duration = Duration::from_millis(1);

/// How long events are gathered for so many subscribers.
fn gather(subscribers: usize) -> Duration {
    let subscribers = u32::try_from(subscribers).unwrap_or(u32::MAX);
    let all = GATHER_EACH.saturating_mul(subscribers);
    all.clamp(GATHER_LEAST, GATHER_MOST)
}

/// An event with the forms in which it is sent, each made once.
#[derive(Debug)]
pub(crate) struct FeedEvent {
    pub(crate) recorded: Recorded,
    event: OnceLock<Option<Event>>,
    leaf: OnceLock<[u8; 32]>,
    frame: OnceLock<Bytes>,
}

impl FeedEvent {
    pub(crate) fn new(recorded: Recorded) -> Arc<Self> {
        Arc::new(Self {
            recorded,
            event: OnceLock::new(),
            leaf: OnceLock::new(),
            frame: OnceLock::new(),
        })
    }

    /// Its envelope, if it can be read.
    pub(crate) fn event(&self) -> Option<&Event> {
        self.event
            .get_or_init(|| self.recorded.event().ok())
            .as_ref()
    }

    /// Its leaf hash in the transparency log.
    pub(crate) fn leaf(&self) -> &[u8; 32] {
        self.leaf.get_or_init(|| leaf_hash(&self.recorded.bytes))
    }

    /// As a server-sent event.
    pub(crate) fn frame(&self) -> Bytes {
        let frame = self.frame.get_or_init(|| {
            sse::frame(
                &self.recorded.position.to_string(),
                self.event().map(|e| e.kind.as_str()),
                &self.recorded.bytes,
            )
        });
        frame.clone()
    }

    async fn fits(&self, filter: &EventFilter, projections: &Projections) -> bool {
        let Recorded {
            subject, position, ..
        } = &self.recorded;
        // An envelope is read only for those whom its subject does not tell enough.
        if !filter.subjects.matches(subject) {
            return false;
        }
        filter
            .wants(projections, subject, *position, self.event())
            .await
    }
}

/// How far new events have come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Reached {
    /// Nobody reads them yet.
    Nothing,
    /// All up to here are kept, or were.
    Position(Position),
    /// The log cannot be read any more.
    Broken,
}

#[derive(Debug, Default)]
struct Kept {
    /// Who reads from it.
    subscribers: usize,
    /// Stops the task that fills it; each one has a number of its own.
    filling: Option<(u64, CancellationToken)>,
    last_number: u64,
    /// All events after this position are in `events`.
    after: Position,
    events: VecDeque<Arc<FeedEvent>>,
    bytes: usize,
}

#[derive(Debug)]
struct Shared {
    log: Arc<dyn EventLog>,
    projections: Projections,
    tasks: TaskTracker,
    kept: Mutex<Kept>,
    reached: watch::Sender<Reached>,
}

impl Shared {
    fn kept(&self) -> MutexGuard<'_, Kept> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The feed. Cheap to clone; all clones are the same.
#[derive(Debug, Clone)]
pub(crate) struct Feed(Arc<Shared>);

impl Feed {
    /// The feed of a log. Its task, which runs while there are subscribers, is one of `tasks`.
    pub(crate) fn new(
        log: Arc<dyn EventLog>,
        projections: Projections,
        tasks: TaskTracker,
    ) -> Self {
        Self(Arc::new(Shared {
            log,
            projections,
            tasks,
            kept: Mutex::default(),
            reached: watch::Sender::new(Reached::Nothing),
        }))
    }

    /// All events after a position that fit, and then those to come: without gap, without repeat,
    /// in batches. It ends with an error that no waiting would mend.
    pub(crate) fn subscribe(
        &self,
        after: Position,
        filter: EventFilter,
    ) -> impl Stream<Item = Result<Vec<Arc<FeedEvent>>, ReadError>> + Send + use<> {
        let subscriber = Subscriber {
            reached: self.0.reached.subscribe(),
            _place: self.take_place(),
            shared: self.0.clone(),
            after,
            filter,
        };
        stream::unfold(Some(subscriber), |subscriber| async move {
            let mut subscriber = subscriber?;
            Some(match subscriber.next().await {
                Ok(events) => (Ok(events), Some(subscriber)),
                Err(e) => (Err(e), None),
            })
        })
    }

    /// The events of a feed up to a position, with its chain: at most about `most` events of the
    /// log are looked at. Answers with the position that was come to.
    pub(crate) async fn walk(
        &self,
        after: Position,
        to: Position,
        filter: &EventFilter,
        most: usize,
        mut visit: impl FnMut(&FeedEvent),
    ) -> Result<Position, ReadError> {
        let Shared {
            log, projections, ..
        } = &*self.0;
        let mut at = after;
        let mut seen = 0;
        while at < to && seen < most {
            let batch = log.read(at, &filter.subjects, READ).await?;
            let ended = batch.len() < READ;
            seen += batch.len();
            for recorded in batch {
                if recorded.position > to {
                    return Ok(to);
                }
                at = recorded.position;
                let event = FeedEvent::new(recorded);
                if event.fits(filter, projections).await {
                    visit(&event);
                }
            }
            if ended {
                return Ok(to);
            }
        }
        Ok(at)
    }

    fn take_place(&self) -> Place {
        let mut kept = self.0.kept();
        kept.subscribers += 1;
        if kept.filling.is_none() {
            kept.last_number += 1;
            let number = kept.last_number;
            let stop = CancellationToken::new();
            kept.filling = Some((number, stop.clone()));
            self.0.reached.send_replace(Reached::Nothing);
            let shared = self.0.clone();
            self.0.tasks.spawn(async move {
                let filled = tokio::select! {
                    () = stop.cancelled() => return,
                    filled = fill(&shared, number) => filled,
                };
                let why = match filled {
                    Ok(()) => "the log has no more events".to_owned(),
                    Err(e) => e.to_string(),
                };
                tracing::error!(error = why, "the feed of events broke off");
                shared.broke_off(number);
            });
        }
        Place(self.0.clone())
    }
}

/// Reads new events for all subscribers, until the log ends.
async fn fill(shared: &Shared, number: u64) -> Result<(), ReadError> {
    let head = shared.log.head().await?;
    let events = shared.log.tail(head, SubjectFilter::default()).await?;
    let mut events = std::pin::pin!(events.ready_chunks(READ));
    shared.keep(number, |kept| {
        kept.after = head;
        head
    });
    while let Some(batch) = events.next().await {
        let mut read = Vec::with_capacity(batch.len());
        let mut failed = None;
        for recorded in batch {
            match recorded {
                Ok(recorded) => read.push(FeedEvent::new(recorded)),
                Err(e) => {
                    failed = Some(e);
                    break;
                }
            }
        }
        if let Some(last) = read.last().map(|e| e.recorded.position) {
            shared.keep(number, |kept| {
                kept.extend(read);
                last
            });
        }
        if let Some(e) = failed {
            return Err(e);
        }
        let subscribers = shared.kept().subscribers;
        tokio::time::sleep(gather(subscribers)).await;
    }
    Ok(())
}

impl Kept {
    fn clear(&mut self) {
        self.events.clear();
        self.bytes = 0;
    }

    fn extend(&mut self, events: Vec<Arc<FeedEvent>>) {
        for event in events {
            self.bytes += event.recorded.bytes.len();
            self.events.push_back(event);
        }
        while self.events.len() > KEPT || self.bytes > KEPT_BYTES {
            let Some(oldest) = self.events.pop_front() else {
                break;
            };
            self.bytes -= oldest.recorded.bytes.len();
            self.after = oldest.recorded.position;
        }
    }

    /// The next events after a position; none if they are not kept any more.
    fn after(&self, after: Position) -> Option<Vec<Arc<FeedEvent>>> {
        if after < self.after {
            return None;
        }
        let first = self
            .events
            .partition_point(|e| e.recorded.position <= after);
        Some(self.events.range(first..).take(BATCH).cloned().collect())
    }
}

impl Shared {
    /// Changes what is kept, and says how far it goes now; unless somebody else fills it.
    fn keep(&self, number: u64, change: impl FnOnce(&mut Kept) -> Position) {
        let mut kept = self.kept();
        if kept.filling.as_ref().is_some_and(|(n, _)| *n == number) {
            let reached = change(&mut kept);
            self.reached.send_replace(Reached::Position(reached));
        }
    }

    fn broke_off(&self, number: u64) {
        let mut kept = self.kept();
        if kept.filling.as_ref().is_some_and(|(n, _)| *n == number) {
            kept.filling = None;
            kept.clear();
            self.reached.send_replace(Reached::Broken);
        }
    }
}

/// A subscriber's place: what is kept is let go with the last.
#[derive(Debug)]
struct Place(Arc<Shared>);

impl Drop for Place {
    fn drop(&mut self) {
        let mut kept = self.0.kept();
        kept.subscribers -= 1;
        if kept.subscribers > 0 {
            return;
        }
        // In one step with the count: whoever comes next starts it anew.
        if let Some((_, stop)) = kept.filling.take() {
            stop.cancel();
            kept.clear();
            self.0.reached.send_replace(Reached::Nothing);
        }
    }
}

#[derive(Debug)]
struct Subscriber {
    reached: watch::Receiver<Reached>,
    _place: Place,
    shared: Arc<Shared>,
    /// It has had all up to here.
    after: Position,
    filter: EventFilter,
}

impl Subscriber {
    async fn next(&mut self) -> Result<Vec<Arc<FeedEvent>>, ReadError> {
        loop {
            // What comes from here on is noticed in the wait below.
            let reached = *self.reached.borrow_and_update();
            let newest = match reached {
                Reached::Position(newest) => newest,
                Reached::Nothing => {
                    self.changed().await?;
                    continue;
                }
                Reached::Broken => return Err(broken()),
            };
            if self.after >= newest {
                self.changed().await?;
                continue;
            }
            let kept = self.shared.kept().after(self.after);
            let (events, upto) = match kept {
                // It was let go since; the next look says so.
                Some(events) if events.is_empty() => {
                    self.changed().await?;
                    continue;
                }
                Some(events) => {
                    let last = events.last().map(|e| e.recorded.position);
                    (events, last.unwrap_or(self.after))
                }
                None => self.read_past(newest).await?,
            };
            let mut wanted = Vec::with_capacity(events.len());
            for event in events {
                if event.fits(&self.filter, &self.shared.projections).await {
                    wanted.push(event);
                }
            }
            self.after = upto;
            if !wanted.is_empty() {
                return Ok(wanted);
            }
        }
    }

    /// What is not kept any more, from the log, with the position up to which that is all.
    async fn read_past(
        &self,
        newest: Position,
    ) -> Result<(Vec<Arc<FeedEvent>>, Position), ReadError> {
        let Shared { log, .. } = &*self.shared;
        let batch = log.read(self.after, &self.filter.subjects, READ).await?;
        let last = batch.last().map_or(self.after, |r| r.position);
        // The end was reached when this was answered, so nothing that fits is missing up to what
        // was the newest event before.
        let upto = if batch.len() < READ {
            last.max(newest)
        } else {
            last
        };
        Ok((batch.into_iter().map(FeedEvent::new).collect(), upto))
    }

    async fn changed(&mut self) -> Result<(), ReadError> {
        // The sender lives as long as this subscriber.
        self.reached.changed().await.map_err(|_| broken())
    }
}

fn broken() -> ReadError {
    ReadError::Unavailable("the feed of events broke off".to_owned())
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::gather;

    #[test]
    fn few_subscribers_hardly_wait_and_many_wait_no_longer_than_a_bound() {
        assert_eq!(gather(0), Duration::from_millis(1));
        assert_eq!(gather(1), Duration::from_millis(1));
        assert_eq!(gather(500), Duration::from_millis(15));
        assert_eq!(gather(1000), Duration::from_millis(30));
        assert_eq!(gather(usize::MAX), Duration::from_millis(30));
    }
}
