//! Folding the aggregates beside the walk over the tree, on threads of their own.
//!
//! Each thread has its share of the aggregates: it reads their payloads, keeps their states and
//! forgets them, so that no memory goes from thread to thread. What becomes of the events it tells
//! the walk, bundle by bundle, which puts it in order.

use std::collections::VecDeque;
use std::io;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread::JoinHandle;

use bytes::Bytes;
use daybook_events::AggregateKind;
use daybook_projections::StateSum;
use jiff::Timestamp;

use crate::entry::{Checks, Content, Entry};
use crate::fold::{Fold, Folds, Outcome, at};

/// Bundles that may be handed over before the walk asks what became of the first of them.
pub(crate) const AHEAD: usize = 32;
/// So many of them go to the threads at once: waking somebody costs as much as folding a few events.
const GROUP: usize = 8;
/// Fewer, if they have so many bytes: others are to be there before the threads are done with them.
const GROUP_BYTES: usize = 2 << 20;

/// The entries of a bundle, as they were skimmed.
#[derive(Debug, Default)]
pub(crate) struct Skimmed {
    pub(crate) entries: Vec<Entry>,
    /// The bytes that they are in.
    pub(crate) bytes: Bytes,
    /// What they come to, if all of them are events about which there is nothing to be said.
    pub(crate) plain: Option<Plain>,
}

/// What the events of a bundle come to: whoever wants to know no more need not go through them
/// again, which were last seen by another core.
#[derive(Debug, Default)]
pub(crate) struct Plain {
    /// How many bytes they have.
    pub(crate) bytes: u64,
    /// When the first and the last of them happened.
    pub(crate) period: Option<(Timestamp, Timestamp)>,
    /// Those of GitOps repositories, by their places in the bundle.
    pub(crate) gitops: Vec<usize>,
}

impl Skimmed {
    pub(crate) fn new(entries: Vec<Entry>, bytes: Bytes) -> Self {
        Self {
            plain: Plain::of(&entries),
            entries,
            bytes,
        }
    }
}

impl Plain {
    fn of(entries: &[Entry]) -> Option<Self> {
        let mut all = Self::default();
        for (number, entry) in entries.iter().enumerate() {
            let Content::Event(read) = &entry.content else {
                return None;
            };
            if !entry.broken.is_empty() || entry.id.is_none() {
                return None;
            }
            all.bytes += entry.place.len() as u64;
            all.period = including(all.period, read.time);
            if read.of == Some(AggregateKind::Gitops) {
                all.gitops.push(number);
            }
        }
        Some(all)
    }
}

/// A period that includes a time, too.
pub(crate) fn including(
    period: Option<(Timestamp, Timestamp)>,
    time: Timestamp,
) -> Option<(Timestamp, Timestamp)> {
    let (first, last) = period.unwrap_or((time, time));
    Some((first.min(time), last.max(time)))
}

/// What there is to be said about an entry, beside that its event counts.
#[derive(Debug)]
pub(crate) struct Remark {
    /// Which entry of its bundle it is.
    pub(crate) number: usize,
    /// The entry, if it had to be read again; without its payload.
    pub(crate) again: Option<Entry>,
    /// What became of it; none if it is no event after all.
    pub(crate) outcome: Option<Outcome>,
}

/// All that was folded.
#[derive(Debug, Default)]
pub(crate) struct Folded {
    /// How many aggregates there are.
    pub(crate) aggregates: u64,
    /// The sum over those of which more than an outline was kept.
    pub(crate) sum: StateSum,
}

/// Bundles that go to a thread at once.
type Group = Arc<[Arc<Skimmed>]>;

#[derive(Debug)]
struct Share {
    /// None once there is nothing more to fold.
    groups: Option<SyncSender<Group>>,
    /// What there is to be said about each bundle of a group.
    remarks: Receiver<Vec<Vec<Remark>>>,
    thread: Option<JoinHandle<io::Result<Folded>>>,
}

/// The threads that fold.
#[derive(Debug)]
pub(crate) struct Shares {
    threads: Vec<Share>,
    /// Bundles that no thread has been given yet.
    group: Vec<Arc<Skimmed>>,
    /// What was said about bundles that nobody asked about yet.
    said: VecDeque<Vec<Remark>>,
    /// How many groups the threads have not answered for.
    unanswered: usize,
}

impl Shares {
    /// Starts so many threads, which together keep about so many bytes of states in memory.
    pub(crate) fn start(threads: usize, checks: &Checks, hot_bytes: usize) -> io::Result<Self> {
        let threads = threads.max(1);
        let share = |number: usize| {
            let (groups, waiting) = sync_channel::<Group>(AHEAD);
            let (tell, remarks) = sync_channel(AHEAD);
            let mut folding = Folding {
                number,
                threads,
                checks: checks.clone(),
                folds: Folds::new(checks.outlines, hot_bytes / threads)?,
            };
            let thread = std::thread::Builder::new().spawn(move || {
                for group in waiting {
                    let remarks = group.iter().map(|bundle| folding.fold(bundle));
                    let remarks = remarks.collect::<io::Result<Vec<_>>>()?;
                    drop(group);
                    // Whoever asked may be gone.
                    let _ = tell.send(remarks);
                }
                folding.finish()
            })?;
            Ok(Share {
                groups: Some(groups),
                remarks,
                thread: Some(thread),
            })
        };
        Ok(Self {
            threads: (0..threads).map(share).collect::<io::Result<_>>()?,
            group: Vec::new(),
            said: VecDeque::new(),
            unanswered: 0,
        })
    }

    /// Hands over a bundle. There must not be more than [`AHEAD`] of them on their way.
    pub(crate) fn hand_over(&mut self, bundle: &Arc<Skimmed>) {
        self.group.push(Arc::clone(bundle));
        let bytes: usize = self.group.iter().map(|b| b.bytes.len()).sum();
        if self.group.len() == GROUP || bytes >= GROUP_BYTES {
            self.send();
        }
    }

    fn send(&mut self) {
        let group: Group = std::mem::take(&mut self.group).into();
        for groups in self.threads.iter().filter_map(|t| t.groups.as_ref()) {
            // A thread that failed has gone away, and says why when it is asked.
            let _ = groups.send(Arc::clone(&group));
        }
        self.unanswered += 1;
    }

    /// What there is to be said about the bundle that was handed over first of those that were not
    /// asked about, in the order of its entries.
    pub(crate) fn remarks(&mut self) -> io::Result<Vec<Remark>> {
        if self.said.is_empty() {
            if self.unanswered == 0 {
                self.send();
            }
            self.unanswered -= 1;
            for share in &mut self.threads {
                let Ok(remarks) = share.remarks.recv() else {
                    let gone = || io::Error::other("a thread that folds has ended early");
                    return Err(share.end().err().unwrap_or_else(gone));
                };
                self.said.resize_with(remarks.len(), Vec::new);
                for (all, remarks) in self.said.iter_mut().zip(remarks) {
                    all.extend(remarks);
                }
            }
        }
        let mut all = self.said.pop_front().unwrap_or_default();
        all.sort_unstable_by_key(|remark| remark.number);
        Ok(all)
    }

    /// All that was folded.
    pub(crate) fn finish(mut self) -> io::Result<Folded> {
        let mut all = Folded::default();
        self.send();
        for share in &mut self.threads {
            share.groups = None;
        }
        for share in &mut self.threads {
            let folded = share.end()?;
            all.aggregates += folded.aggregates;
            all.sum.merge(&folded.sum);
        }
        Ok(all)
    }
}

impl Share {
    fn end(&mut self) -> io::Result<Folded> {
        self.groups = None;
        match self.thread.take().map(JoinHandle::join) {
            Some(Ok(folded)) => folded,
            Some(Err(panic)) => std::panic::resume_unwind(panic),
            None => Ok(Folded::default()),
        }
    }
}

impl Drop for Shares {
    fn drop(&mut self) {
        for share in &mut self.threads {
            share.groups = None;
            if let Some(thread) = share.thread.take() {
                // It may wait for somebody who asks.
                while share.remarks.recv().is_ok() {}
                let _ = thread.join();
            }
        }
    }
}

/// One thread's share.
struct Folding {
    number: usize,
    threads: usize,
    checks: Checks,
    folds: Folds,
}

impl Folding {
    fn is_mine(&self, key: u128) -> bool {
        (key >> 64) as usize % self.threads == self.number
    }

    fn fold(&mut self, bundle: &Skimmed) -> io::Result<Vec<Remark>> {
        for entry in &bundle.entries {
            if let Content::Event(read) = &entry.content
                && self.is_mine(read.key)
                && let Some(bytes) = bundle.bytes.get(entry.place.clone())
            {
                come_near(bytes);
            }
        }
        let mut remarks = Vec::new();
        for (number, entry) in bundle.entries.iter().enumerate() {
            let (Content::Event(read), Some(id)) = (&entry.content, entry.id) else {
                continue;
            };
            if !self.is_mine(read.key) {
                continue;
            }
            let bytes = bundle.bytes.get(entry.place.clone()).unwrap_or_default();
            let Some(payload) = self.checks.plain_payload(read, bytes) else {
                remarks.extend(self.fold_again(number, entry, &bundle.bytes)?);
                continue;
            };
            let event = Fold {
                key: read.key,
                subject: &read.subject,
                bytes,
                revision: read.revision,
                payload,
            };
            let outcome = self.folds.apply(at(entry.position, id, read), event)?;
            if outcome != Outcome::Counted {
                remarks.push(Remark {
                    number,
                    again: None,
                    outcome: Some(outcome),
                });
            }
        }
        Ok(remarks)
    }

    /// Folds an event about which there may be more to be said than what was seen at first.
    fn fold_again(
        &mut self,
        number: usize,
        entry: &Entry,
        bundle: &[u8],
    ) -> io::Result<Option<Remark>> {
        let mut entry = self
            .checks
            .read(entry.position, bundle, entry.place.clone());
        let bytes = bundle.get(entry.place.clone()).unwrap_or_default();
        let mut outcome = None;
        if let (Content::Event(read), Some(id)) = (&mut entry.content, entry.id)
            && let Some(payload) = read.payload.take()
        {
            let at = at(entry.position, id, read);
            let event = Fold {
                key: read.key,
                subject: &read.subject,
                bytes,
                revision: read.revision,
                payload: *payload,
            };
            outcome = Some(self.folds.apply(at, event)?);
        }
        if outcome == Some(Outcome::Counted) && entry.broken.is_empty() {
            return Ok(None);
        }
        Ok(Some(Remark {
            number,
            again: Some(entry),
            outcome,
        }))
    }

    fn finish(self) -> io::Result<Folded> {
        let mut sum = StateSum::default();
        self.folds.add_states_to(&mut sum)?;
        Ok(Folded {
            aggregates: self.folds.aggregates(),
            sum,
        })
    }
}

/// Has bytes brought from the core that read them last. Looked at one after the other, as here, they
/// come many at a time; where each event is first looked at when it is its turn, each is waited for.
fn come_near(bytes: &[u8]) {
    /// How much comes at once: a line of the cache.
    const LINE: usize = 64;
    let all = bytes.iter().step_by(LINE).fold(0, |all, byte| all ^ byte);
    std::hint::black_box(all);
}

#[cfg(test)]
mod tests {
    use daybook_events::Position;

    use super::*;
    use crate::fold::tests::{HOT_BYTES, checks, disturbed, fold};

    /// A history in bundles of so many events, as the walk gets them.
    fn bundles(checks: &Checks, history: &[Vec<u8>], width: usize) -> Vec<Arc<Skimmed>> {
        let mut position = 0;
        let bundle = |events: &[Vec<u8>]| {
            let mut entries = Vec::new();
            let bytes = Bytes::from(events.concat());
            let mut start = 0;
            for event in events {
                position += 1;
                let place = start..start + event.len();
                start = place.end;
                entries.push(checks.skim(Position(position), &bytes, place));
            }
            Arc::new(Skimmed::new(entries, bytes))
        };
        history.chunks(width).map(bundle).collect()
    }

    #[test]
    fn shares_come_to_the_same_as_one_fold_of_all() {
        let history = disturbed(5);
        let whole = checks(false);
        let mut folds = Folds::new(false, HOT_BYTES).unwrap();
        let expected: Vec<_> = (1..)
            .zip(&history)
            .map(|(number, bytes)| fold(&whole, &mut folds, number, bytes))
            .collect();
        let mut sum = StateSum::default();
        folds.add_states_to(&mut sum).unwrap();
        assert_ne!(sum.hash(), StateSum::default().hash());
        let broken = |number: u64, bytes: &Vec<u8>| {
            let entry = whole.read(Position(number), bytes, 0..bytes.len());
            entry.broken
        };
        // With little memory, states go to the file and come back.
        for (threads, hot_bytes, outlines, ahead) in [
            (1, HOT_BYTES, false, 0),
            (3, HOT_BYTES, false, AHEAD - 1),
            (2, 40 << 10, false, 3),
            (2, HOT_BYTES, true, GROUP),
        ] {
            let checks = checks(outlines);
            let mut shares = Shares::start(threads, &checks, hot_bytes).unwrap();
            let all = bundles(&checks, &history, 7);
            assert!(all.len() > 2 * AHEAD);
            let mut number = 0;
            let mut handed_over = all.iter();
            for (asked, bundle) in all.iter().enumerate() {
                let due = asked + ahead + 1 - (all.len() - handed_over.len());
                handed_over
                    .by_ref()
                    .take(due)
                    .for_each(|bundle| shares.hand_over(bundle));
                let mut remarks = shares.remarks().unwrap().into_iter().peekable();
                for (place, entry) in bundle.entries.iter().enumerate() {
                    let remark = remarks.next_if(|r| r.number == place);
                    let (again, outcome) =
                        remark.map_or((None, Some(Outcome::Counted)), |r| (r.again, r.outcome));
                    assert_eq!(outcome.as_ref(), Some(&expected[number]));
                    let found = &again.as_ref().unwrap_or(entry).broken;
                    number += 1;
                    assert_eq!(*found, broken(number as u64, &history[number - 1]));
                }
                assert_eq!(remarks.next().map(|r| r.number), None);
            }
            assert_eq!(number, history.len());
            let folded = shares.finish().unwrap();
            assert_eq!(folded.aggregates, folds.aggregates());
            let same = folded.sum.hash() == sum.hash();
            assert_eq!(same, !outlines, "{threads}, {hot_bytes}");
        }
    }

    #[test]
    fn whoever_stops_early_waits_for_nobody() {
        let checks = checks(false);
        let mut shares = Shares::start(2, &checks, HOT_BYTES).unwrap();
        for bundle in bundles(&checks, &disturbed(3), 100).iter().take(AHEAD) {
            shares.hand_over(bundle);
        }
        drop(shares);
    }
}
