//! What is to be sent next: a queue for each deployment, of which only the first is under way.
//!
//! A queue whose first event has to wait holds back nothing but itself. Events are kept as their
//! positions: one that is stuck for hours costs some bytes for each that comes after it.

use std::collections::{BTreeSet, HashMap, VecDeque};

use daybook_events::{DeploymentId, EventId, Position};
use tokio::time::Instant;

/// An event that is to be sent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Item {
    /// Where it became due: its own position, or that of the demand to send it again.
    pub(super) due_by: Position,
    /// Its position.
    pub(super) position: Position,
    /// Its id.
    pub(super) event: EventId,
    /// Its type.
    pub(super) kind: String,
    /// The deployment that it is about.
    pub(super) deployment: Option<DeploymentId>,
}

impl Item {
    /// Whether somebody asked for it to be sent again.
    pub(super) fn is_replay(&self) -> bool {
        self.due_by != self.position
    }
}

#[derive(Debug, Default)]
struct Queue {
    items: VecDeque<Item>,
    /// Its first event is under way, or waits for a time.
    held: bool,
}

/// The queues.
#[derive(Debug, Default)]
pub(super) struct Desk {
    queues: HashMap<String, Queue>,
    ready: VecDeque<String>,
    waiting: BTreeSet<(Instant, String)>,
}

impl Desk {
    /// Puts an event at the end of a queue.
    pub(super) fn push(&mut self, key: String, item: Item) {
        let queue = self.queues.entry(key.clone()).or_default();
        if queue.items.is_empty() && !queue.held {
            self.ready.push_back(key);
        }
        queue.items.push_back(item);
    }

    /// The next event that may be sent now, with the key of its queue, which is held from then on.
    pub(super) fn take(&mut self, now: Instant) -> Option<(String, Item)> {
        while let Some((at, key)) = self.waiting.first().cloned()
            && at <= now
        {
            self.waiting.pop_first();
            self.ready.push_back(key);
        }
        loop {
            let key = self.ready.pop_front()?;
            let Some(queue) = self.queues.get_mut(&key) else {
                continue;
            };
            if let Some(item) = queue.items.front().cloned() {
                queue.held = true;
                return Some((key, item));
            }
        }
    }

    /// The first event of a queue is dealt with.
    pub(super) fn finish(&mut self, key: String) {
        let Some(queue) = self.queues.get_mut(&key) else {
            return;
        };
        queue.items.pop_front();
        queue.held = false;
        if queue.items.is_empty() {
            self.queues.remove(&key);
        } else {
            self.ready.push_back(key);
        }
    }

    /// The first event of a queue is to be sent at a time.
    pub(super) fn put_off(&mut self, key: String, until: Instant) {
        self.waiting.insert((until, key));
    }

    /// When the next event that waits is to be sent.
    pub(super) fn next_at(&self) -> Option<Instant> {
        self.waiting.first().map(|(at, _)| *at)
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn item(position: u64) -> Item {
        Item {
            due_by: Position(position),
            position: Position(position),
            event: EventId(uuid::Uuid::from_u128(position.into())),
            kind: "deployment.queued.v1".into(),
            deployment: None,
        }
    }

    #[test]
    fn a_queue_that_waits_holds_back_only_itself() {
        let now = Instant::now();
        let mut desk = Desk::default();
        desk.push("a".into(), item(1));
        desk.push("a".into(), item(2));
        desk.push("b".into(), item(3));
        let (key, first) = desk.take(now).unwrap();
        assert_eq!((key.as_str(), first.position), ("a", Position(1)));
        desk.put_off(key, now + Duration::from_secs(5));
        let (key, other) = desk.take(now).unwrap();
        assert_eq!((key.as_str(), other.position), ("b", Position(3)));
        desk.finish(key);
        assert_eq!(desk.take(now), None);
        assert_eq!(desk.next_at(), Some(now + Duration::from_secs(5)));

        let later = now + Duration::from_secs(6);
        let (key, again) = desk.take(later).unwrap();
        assert_eq!(again.position, Position(1));
        assert_eq!(desk.take(later), None, "the second waits for the first");
        desk.finish(key);
        let (key, second) = desk.take(later).unwrap();
        assert_eq!(second.position, Position(2));
        desk.finish(key);
        assert!(desk.queues.is_empty() && desk.next_at().is_none());
    }

    #[test]
    fn what_comes_while_a_queue_is_under_way_is_not_sent_beside_it() {
        let now = Instant::now();
        let mut desk = Desk::default();
        desk.push("a".into(), item(1));
        let (key, _) = desk.take(now).unwrap();
        desk.push("a".into(), item(2));
        assert_eq!(desk.take(now), None);
        desk.finish(key);
        assert_eq!(desk.take(now).unwrap().1.position, Position(2));
    }
}
