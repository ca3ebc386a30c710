//! What a process has counted of the work that it does beside requests, for its `/metrics`. Counting
//! costs next to nothing, and goes on where nobody asks for it.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, OnceLock, PoisonError};
use std::time::Duration;

use daybook_events::SubscriptionId;
use daybook_events::subscription::delivery::Outcome;
use jiff::Timestamp;

/// What became of the tries to deliver events to webhooks.
#[derive(Debug, Default)]
pub struct Webhooks {
    tries: [AtomicU64; Outcome::ALL.len()],
    micros: AtomicU64,
    waiting: Mutex<BTreeMap<SubscriptionId, Waiting>>,
}

/// What a webhook has still to get from the process that looks after it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Waiting {
    /// How many events became due and are not dealt with: they are sent, or tried again.
    pub events: u64,
    /// When the one became due that waits for longest: when it happened, or was asked for again.
    pub oldest: Option<Timestamp>,
}

/// Figures of the webhooks that this process looks after.
pub fn webhooks() -> &'static Webhooks {
    static WEBHOOKS: OnceLock<Webhooks> = OnceLock::new();
    WEBHOOKS.get_or_init(Webhooks::default)
}

impl Webhooks {
    /// Counts a try and the time that it took.
    pub fn tried(&self, outcome: Outcome, took: Duration) {
        let micros = u64::try_from(took.as_micros()).unwrap_or(u64::MAX);
        self.micros.fetch_add(micros, Ordering::Relaxed);
        if let Some(i) = Outcome::ALL.iter().position(|o| *o == outcome) {
            self.tries[i].fetch_add(1, Ordering::Relaxed);
        }
    }

    /// How many tries came to what.
    pub fn tries(&self) -> impl Iterator<Item = (Outcome, u64)> {
        let counts = self.tries.iter().map(|n| n.load(Ordering::Relaxed));
        Outcome::ALL.into_iter().zip(counts)
    }

    /// How long all tries took together.
    pub fn took(&self) -> Duration {
        Duration::from_micros(self.micros.load(Ordering::Relaxed))
    }

    /// What each webhook has still to get that this process looks after now.
    pub fn waiting(&self) -> BTreeMap<SubscriptionId, Waiting> {
        let waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        waiting.clone()
    }

    /// A webhook is looked after by this process from here on.
    pub fn look_after(&'static self, id: SubscriptionId) -> LookedAfter {
        let looked_after = LookedAfter { all: self, id };
        looked_after.waits(Waiting::default());
        looked_after
    }
}

/// A webhook that this process looks after until this is dropped.
#[derive(Debug)]
pub struct LookedAfter {
    all: &'static Webhooks,
    id: SubscriptionId,
}

impl LookedAfter {
    /// Says what it has still to get.
    pub fn waits(&self, now: Waiting) {
        let waiting = &self.all.waiting;
        let mut waiting = waiting.lock().unwrap_or_else(PoisonError::into_inner);
        waiting.insert(self.id, now);
    }
}

impl Drop for LookedAfter {
    fn drop(&mut self) {
        let waiting = &self.all.waiting;
        let mut waiting = waiting.lock().unwrap_or_else(PoisonError::into_inner);
        waiting.remove(&self.id);
    }
}

/// What became of the builds of this process.
#[derive(Debug, Default)]
pub struct Builds {
    /// Attempts that are under way.
    pub running: AtomicU64,
    /// Builds that gave an image.
    pub succeeded: AtomicU64,
    /// Builds that failed.
    pub failed: AtomicU64,
    /// Builds that nobody waited for any more.
    pub cancelled: AtomicU64,
}

/// Figures of the builds of this process.
pub fn builds() -> &'static Builds {
    static BUILDS: OnceLock<Builds> = OnceLock::new();
    BUILDS.get_or_init(Builds::default)
}

impl Builds {
    /// Counts an attempt as under way until what is returned is dropped.
    pub fn begin(&'static self) -> Running {
        self.running.fetch_add(1, Ordering::Relaxed);
        Running(self)
    }
}

/// An attempt that is under way.
#[derive(Debug)]
pub struct Running(&'static Builds);

impl Drop for Running {
    fn drop(&mut self) {
        self.0.running.fetch_sub(1, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_webhook_is_shown_while_it_is_looked_after() {
        let all: &'static Webhooks = Box::leak(Box::new(Webhooks::default()));
        let id = SubscriptionId(uuid::Uuid::from_u128(7));
        let looked_after = all.look_after(id);
        assert_eq!(all.waiting()[&id], Waiting::default());
        let now = Waiting {
            events: 3,
            oldest: Some(Timestamp::UNIX_EPOCH),
        };
        looked_after.waits(now);
        assert_eq!(all.waiting()[&id], now);
        drop(looked_after);
        assert!(all.waiting().is_empty());
    }

    #[test]
    fn tries_are_counted_by_what_they_came_to() {
        let all = Webhooks::default();
        all.tried(Outcome::Failed, Duration::from_millis(2));
        all.tried(Outcome::Delivered, Duration::from_millis(1));
        all.tried(Outcome::Failed, Duration::ZERO);
        let counted: BTreeMap<_, _> = all.tries().map(|(o, n)| (o.as_str(), n)).collect();
        assert_eq!(counted["failed"], 2);
        assert_eq!(counted["delivered"], 1);
        assert_eq!(counted["dead_lettered"], 0);
        assert_eq!(all.took(), Duration::from_millis(3));
    }
}
