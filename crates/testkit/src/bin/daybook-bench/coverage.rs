//! Which acknowledged events are covered by the published checkpoint, and how long that took.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use daybook_events::Position;
use daybook_events::tree::PublishedTree;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

/// What is known of the events of one run, for those who append and for the one who watches.
#[derive(Debug, Default)]
pub(crate) struct Coverage(Mutex<Events>);

#[derive(Debug, Default)]
struct Events {
    /// The size of what is published.
    published: u64,
    /// Acknowledged, and not published yet.
    waiting: Vec<Acknowledged>,
    delays: Delays,
}

/// An event that the log has taken.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Acknowledged {
    pub(crate) position: Position,
    /// When the log was asked to take it.
    pub(crate) called_at: Instant,
    pub(crate) acknowledged_at: Instant,
}

/// How long it took until events were published.
#[derive(Debug, Default)]
pub(crate) struct Delays {
    pub(crate) since_called: Sample,
    pub(crate) since_acknowledged: Sample,
}

/// Durations of which percentiles are wanted.
#[derive(Debug, Default)]
pub(crate) struct Sample(Vec<Duration>);

impl Coverage {
    fn lock(&self) -> MutexGuard<'_, Events> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Forgets all events so far.
    pub(crate) fn begin(&self) {
        *self.lock() = Events::default();
    }

    /// Notes an event that was acknowledged just now. It may be published already.
    pub(crate) fn acknowledge(&self, event: Acknowledged) {
        let mut events = self.lock();
        if event.position.0 <= events.published {
            events.delays.add(&event, Instant::now());
        } else {
            events.waiting.push(event);
        }
    }

    /// Notes that a checkpoint of this size was published just now.
    pub(crate) fn publish(&self, size: u64) {
        let mut events = self.lock();
        let events = &mut *events;
        if size <= events.published {
            return;
        }
        events.published = size;
        let now = Instant::now();
        events.waiting.retain(|event| {
            let is_covered = event.position.0 <= size;
            if is_covered {
                events.delays.add(event, now);
            }
            !is_covered
        });
    }

    /// Looks each millisecond at what is published, until that is cancelled.
    pub(crate) async fn watch(
        self: Arc<Self>,
        tree: Arc<dyn PublishedTree>,
        cancel: CancellationToken,
    ) {
        while !cancel.is_cancelled() {
            tokio::time::sleep(Duration::from_millis(1)).await;
            self.publish(tree.head().map_or(0, |signed| signed.head.size));
        }
    }

    /// The delays of all events that are published.
    pub(crate) fn take_delays(&self) -> Delays {
        std::mem::take(&mut self.lock().delays).sorted()
    }
}

impl Delays {
    fn add(&mut self, event: &Acknowledged, now: Instant) {
        let since = |then| now.saturating_duration_since(then);
        self.since_called.0.push(since(event.called_at));
        self.since_acknowledged.0.push(since(event.acknowledged_at));
    }

    fn sorted(mut self) -> Self {
        self.since_called.0.sort_unstable();
        self.since_acknowledged.0.sort_unstable();
        self
    }
}

impl Sample {
    /// What so many of a thousand do not exceed, in milliseconds.
    pub(crate) fn ms(&self, per_thousand: usize) -> f64 {
        let at = (self.0.len() * per_thousand / 1000).min(self.0.len().saturating_sub(1));
        self.0
            .get(at)
            .map_or(f64::NAN, |d| d.as_secs_f64() * 1000.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn acknowledged(position: u64, called_at: Instant) -> Acknowledged {
        Acknowledged {
            position: Position(position),
            called_at,
            acknowledged_at: Instant::now(),
        }
    }

    #[tokio::test]
    async fn an_event_counts_once_whether_it_is_published_before_or_after_its_acknowledgement() {
        let coverage = Coverage::default();
        let now = Instant::now();
        coverage.acknowledge(acknowledged(1, now));
        coverage.acknowledge(acknowledged(3, now));
        coverage.publish(2);
        coverage.acknowledge(acknowledged(2, now));
        assert_eq!(coverage.take_delays().since_called.0.len(), 2);
        coverage.publish(1);
        coverage.publish(3);
        assert_eq!(coverage.take_delays().since_acknowledged.0.len(), 1);
    }
}
