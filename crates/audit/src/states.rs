//! The states of the aggregates that the walk over the tree keeps outlines of, for the hash over all
//! states. They are folded beside the walk, on threads of their own, each of which has its share of
//! the aggregates: it reads the payloads, keeps the states and forgets them, so that no memory goes
//! from thread to thread. What becomes of each event is for the walk to say.

use std::io;
use std::ops::Range;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread::JoinHandle;

use bytes::Bytes;
use daybook_events::aggregate::At;
use daybook_events::outline::Step;
use daybook_events::{AnyPayload, Event, Subject};
use daybook_projections::StateSum;

use crate::entry::{Payload, Read, Subject as Text};
use crate::fold::{Fold, Folds, parsed};

/// Bundles that may wait for a thread.
const WAITING: usize = 16;

/// An event that belongs to a state.
#[derive(Debug)]
struct Item {
    key: u128,
    /// Where it is in its bundle.
    place: Range<usize>,
    subject: Text,
    at: At,
    revision: u32,
    /// What it is, and where its payload stands in its bytes, where both are known.
    known: Option<(Step, Range<usize>)>,
}

/// The events of a bundle that belong to states.
#[derive(Debug)]
struct Batch {
    bytes: Bytes,
    items: Vec<Item>,
}

#[derive(Debug)]
struct Share {
    /// None once there is nothing more to fold.
    batches: Option<SyncSender<Arc<Batch>>>,
    thread: Option<JoinHandle<io::Result<StateSum>>>,
}

/// The threads that fold states.
#[derive(Debug)]
pub(crate) struct States {
    shares: Vec<Share>,
    items: Vec<Item>,
}

impl States {
    /// Starts so many threads, which together keep about so many bytes of states in memory.
    pub(crate) fn start(threads: usize, hot_bytes: usize) -> io::Result<Self> {
        let threads = threads.max(1);
        let share = |number: usize| {
            let (sender, batches) = sync_channel(WAITING);
            let folds = Folds::new(false, hot_bytes / threads)?;
            let fold = move || {
                fold(&batches, folds, |key| {
                    (key >> 64) as usize % threads == number
                })
            };
            let thread = std::thread::Builder::new().spawn(fold)?;
            Ok(Share {
                batches: Some(sender),
                thread: Some(thread),
            })
        };
        Ok(Self {
            shares: (0..threads).map(share).collect::<io::Result<_>>()?,
            items: Vec::new(),
        })
    }

    /// Takes the next event of a bundle, if it belongs to an aggregate that has an outline.
    pub(crate) fn take(&mut self, at: At, place: Range<usize>, read: &mut Read) {
        let known = match &read.payload {
            Payload::Step(step) => read.data.take().map(|data| (*step, data)),
            Payload::Whole(payload) if Step::of(payload).is_some() => None,
            Payload::Whole(_) => return,
        };
        self.items.push(Item {
            key: read.key,
            place,
            subject: read.subject.clone(),
            at,
            revision: read.revision,
            known,
        });
    }

    /// Hands over what was taken of a bundle with these bytes.
    pub(crate) fn hand_over(&mut self, bytes: &Bytes) {
        let room = self.items.len();
        let batch = Arc::new(Batch {
            bytes: bytes.clone(),
            items: std::mem::replace(&mut self.items, Vec::with_capacity(room)),
        });
        for share in &self.shares {
            if let Some(batches) = &share.batches {
                // A thread that failed has gone away, and says why in the end.
                let _ = batches.send(Arc::clone(&batch));
            }
        }
    }

    /// The sum of all states, once everything is folded.
    pub(crate) fn finish(mut self) -> io::Result<StateSum> {
        let mut sum = StateSum::default();
        for share in &mut self.shares {
            share.batches = None;
        }
        for share in &mut self.shares {
            if let Some(thread) = share.thread.take() {
                let of_share = thread
                    .join()
                    .unwrap_or_else(|panic| std::panic::resume_unwind(panic));
                sum.merge(&of_share?);
            }
        }
        Ok(sum)
    }
}

impl Drop for States {
    fn drop(&mut self) {
        for share in &mut self.shares {
            share.batches = None;
            if let Some(thread) = share.thread.take() {
                let _ = thread.join();
            }
        }
    }
}

/// Folds the events of one share.
fn fold(
    batches: &Receiver<Arc<Batch>>,
    mut folds: Folds,
    is_mine: impl Fn(u128) -> bool,
) -> io::Result<StateSum> {
    for batch in batches {
        for item in batch.items.iter().filter(|item| is_mine(item.key)) {
            let bytes = batch.bytes.get(item.place.clone()).unwrap_or_default();
            let event = Fold {
                key: item.key,
                subject: item.subject.text(bytes),
                bytes: bytes.len(),
                revision: item.revision,
                payload: Payload::Whole(Box::new(item.payload(bytes))),
            };
            folds.apply(item.at, event)?;
        }
    }
    let mut sum = StateSum::default();
    folds.add_states_to(&mut sum)?;
    Ok(sum)
}

impl Item {
    fn payload(&self, bytes: &[u8]) -> AnyPayload {
        if let Some((step, data)) = &self.known
            && let Some(Ok(data)) = bytes.get(data.clone()).map(std::str::from_utf8)
        {
            return AnyPayload::decode(Some(step.aggregate()), step.kind(), data);
        }
        let kind = parsed(self.subject.text(bytes)).and_then(|s: Subject| s.kind());
        match Event::from_bytes(bytes) {
            Ok(event) => AnyPayload::decode(kind, event.short_kind(), event.data.get()),
            Err(_) => AnyPayload::Other,
        }
    }
}

#[cfg(test)]
mod tests {
    use daybook_events::Position;

    use super::*;
    use crate::entry::Content;
    use crate::fold::at;
    use crate::fold::tests::{HOT_BYTES, checks, disturbed, fold};

    #[test]
    fn shares_add_up_to_the_states_of_all() {
        let history = disturbed(5);
        let (whole, outlined) = (checks(false), checks(true));
        let mut folds = Folds::new(false, HOT_BYTES).unwrap();
        for (number, bytes) in (1..).zip(&history) {
            fold(&whole, &mut folds, number, bytes);
        }
        let mut expected = StateSum::default();
        folds.add_states_to(&mut expected).unwrap();
        assert_ne!(expected.hash(), StateSum::default().hash());
        // With little memory, states go to the file and come back.
        for (threads, hot_bytes) in [(1, HOT_BYTES), (3, HOT_BYTES), (2, 40 << 10)] {
            let mut states = States::start(threads, hot_bytes).unwrap();
            let mut folds = Folds::new(true, hot_bytes).unwrap();
            for (number, bytes) in (1..).zip(&history) {
                let (position, place) = (Position(number), 0..bytes.len());
                let entry = outlined.read(position, bytes, place.clone());
                if let (Content::Event(mut read), Some(id)) = (entry.content, entry.id) {
                    states.take(at(position, id, &read), place, &mut read);
                }
                states.hand_over(&Bytes::copy_from_slice(bytes));
                fold(&outlined, &mut folds, number, bytes);
            }
            let mut sum = states.finish().unwrap();
            folds.add_states_to(&mut sum).unwrap();
            assert_eq!(sum.hash(), expected.hash(), "{threads}, {hot_bytes}");
        }
    }
}
