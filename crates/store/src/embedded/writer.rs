//! Group commit: one thread takes all appends that wait, decides on each, writes what is accepted
//! in one go, syncs once, and answers all.
//!
//! The thread is the only one that writes events, so that an expectation is checked and met
//! without any lock over the disk. After a group it lingers for a moment: writers that append one
//! event after another come back within microseconds, and waiting for them costs less than a sync
//! for each.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use daybook_events::log::{Append, AppendError, Appended, Expected, Position};
use daybook_events::with_causes;
use jiff::Timestamp;
use tokio::sync::oneshot;

use super::Shared;
use super::index::{Decision, LookedUp, Round};
use super::segment::{Appender, CommitError};

/// The thread waits for the writers of the last group to come back until none came for this long.
const LINGER: Duration = Duration::from_micros(50);
/// It waits no longer than this part of what the last commit took.
const LINGER_PART: u32 = 2;
/// How long a failed round of indexing waits before it is tried again.
const INDEX_RETRY: Duration = Duration::from_secs(5);

type Answer = Result<Appended, AppendError>;

/// An append that waits.
struct Waiting {
    append: Append,
    subject: String,
    looked_up: LookedUp,
    answer: oneshot::Sender<Answer>,
}

/// Where appends wait for the writer.
#[derive(Default)]
pub(super) struct Queue {
    waiting: Mutex<Vec<Waiting>>,
    /// Length of `waiting`, to be looked at without the lock.
    len: AtomicUsize,
    /// The writer sleeps, and is to be woken.
    asleep: AtomicBool,
    wake: Condvar,
    closed: AtomicBool,
}

impl std::fmt::Debug for Queue {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Queue")
            .field("len", &self.len)
            .field("closed", &self.closed)
            .finish_non_exhaustive()
    }
}

impl Queue {
    /// Hands an append to the writer. The receiver fails if the writer died.
    pub(super) fn push(
        &self,
        append: Append,
        looked_up: LookedUp,
    ) -> Result<oneshot::Receiver<Answer>, AppendError> {
        let subject = append.subject.to_string();
        let (answer, answered) = oneshot::channel();
        let asleep = {
            let mut waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
            // Looked at under the lock: what gets in before the writer's last look is answered.
            if self.closed.load(Ordering::SeqCst) {
                return Err(AppendError::Unavailable("the log is closed".into()));
            }
            waiting.push(Waiting {
                append,
                subject,
                looked_up,
                answer,
            });
            self.len.store(waiting.len(), Ordering::Release);
            self.asleep.load(Ordering::SeqCst)
        };
        if asleep {
            self.wake.notify_one();
        }
        Ok(answered)
    }

    /// Refuses further appends and lets the writer end after those that wait.
    pub(super) fn close(&self) {
        let _waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        self.closed.store(true, Ordering::SeqCst);
        self.wake.notify_one();
    }

    pub(super) fn is_closed(&self) -> bool {
        self.closed.load(Ordering::SeqCst)
    }

    /// Takes all that waits; sleeps until something does. `false` once closed and empty.
    fn take(&self, group: &mut Vec<Waiting>, comes_back: usize, at_most: Duration) -> bool {
        let start = Instant::now();
        let (mut seen, mut since) = (0, start);
        loop {
            let len = self.len.load(Ordering::Acquire);
            let now = Instant::now();
            if len > seen {
                (seen, since) = (len, now);
            }
            if len >= comes_back || now - since > LINGER || now - start > at_most {
                break;
            }
            thread::yield_now();
        }
        let mut waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        while waiting.is_empty() {
            if self.closed.load(Ordering::SeqCst) {
                return false;
            }
            self.asleep.store(true, Ordering::SeqCst);
            waiting = self
                .wake
                .wait(waiting)
                .unwrap_or_else(PoisonError::into_inner);
            self.asleep.store(false, Ordering::SeqCst);
        }
        std::mem::swap(&mut *waiting, group);
        self.len.store(0, Ordering::Release);
        true
    }
}

/// Starts the writer. It ends when the queue is closed, and leaves everything closed behind it.
pub(super) fn start(shared: Arc<Shared>, appender: Appender) -> std::io::Result<JoinHandle<()>> {
    let (rounds, to_index) = sync_channel(1);
    let indexer = thread::Builder::new().name("log-indexer".into()).spawn({
        let shared = Arc::clone(&shared);
        move || index_rounds(&shared, &to_index)
    })?;
    thread::Builder::new()
        .name("log-writer".into())
        .spawn(move || {
            // Whatever ends this thread, nobody may wait for it in vain.
            let _closing = CloseOnDrop(Arc::clone(&shared));
            Writer {
                shared,
                appender,
                rounds,
            }
            .run();
            let _ = indexer.join();
        })
}

struct CloseOnDrop(Arc<Shared>);

impl Drop for CloseOnDrop {
    fn drop(&mut self) {
        self.0.queue.close();
        let mut waiting = self
            .0
            .queue
            .waiting
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        waiting.clear();
        drop(waiting);
        self.0.release();
    }
}

/// Writes each round to the index's tables, again and again if it fails: what waits for it stays
/// in memory.
fn index_rounds(shared: &Shared, rounds: &Receiver<Arc<Round>>) {
    while let Ok(round) = rounds.recv() {
        let identity = shared.segments.identity();
        while let Err(error) = shared.index.finish_round(&round, identity) {
            tracing::warn!(
                error = &error as &dyn std::error::Error,
                "index not written; trying again later"
            );
            if let Err(RecvTimeoutError::Disconnected) = rounds.recv_timeout(INDEX_RETRY) {
                return;
            }
        }
    }
}

struct Writer {
    shared: Arc<Shared>,
    appender: Appender,
    /// To the indexer, which has one round at a time.
    rounds: SyncSender<Arc<Round>>,
}

impl Writer {
    fn run(mut self) {
        let mut group = Vec::new();
        let (mut size, mut took) = (0, Duration::ZERO);
        let queue = Arc::clone(&self.shared);
        while queue.queue.take(&mut group, size, took / LINGER_PART) {
            size = group.len();
            let start = Instant::now();
            self.commit(&mut group);
            took = start.elapsed();
        }
        self.appender.close();
    }

    fn commit(&mut self, group: &mut Vec<Waiting>) {
        let synced = self.appender.next() - 1;
        let answers = self.decide(group);
        let last = self.appender.next() - 1;
        let result = if last > synced {
            daybook_failpoints::reached("log.sync.before");
            let result = self.appender.commit();
            daybook_failpoints::reached("log.sync.after");
            result
        } else {
            Ok(())
        };
        match result {
            Ok(()) => {
                if last > synced {
                    self.shared.set_trouble(None);
                    self.shared.head.send_replace(Position(last));
                }
                for (waiting, answer) in group.drain(..).zip(answers) {
                    let _ = waiting.answer.send(answer);
                }
                if let Some(round) = self.shared.index.start_round() {
                    let _ = self.rounds.send(round);
                }
            }
            Err(error) => {
                tracing::error!(
                    error = &error as &dyn std::error::Error,
                    events = last - synced,
                    "events not stored"
                );
                self.shared.set_trouble(Some(error.to_string()));
                let accepted = group.iter().zip(&answers).filter(|(_, a)| is_accepted(a));
                let accepted = accepted.map(|(w, _)| (w.append.id.0, w.subject.as_str()));
                self.shared.index.forget(synced, accepted);
                for (waiting, answer) in group.drain(..).zip(answers) {
                    let _ = waiting.answer.send(after_failure(answer, &error, synced));
                }
            }
        }
    }

    /// Decides on each append as if those before it were stored already. Those that are accepted
    /// wait in the appender, and stand in the index; readers see them when the head moves.
    fn decide(&mut self, group: &[Waiting]) -> Vec<Answer> {
        let now = Timestamp::now().as_microsecond();
        let appender = &mut self.appender;
        let mut index = self.shared.index.group();
        let decide = |waiting: &Waiting| {
            let append = &waiting.append;
            let expected = match append.expected {
                Expected::Any => None,
                Expected::Last(position) => Some(position),
            };
            let (id, subject) = (append.id.0, waiting.subject.as_str());
            let position = appender.next();
            let looked_up = waiting.looked_up;
            match index.decide(position, id, looked_up, subject, expected.map(|p| p.0)) {
                Ok(Decision::Accepted) => {
                    appender.push(now, id, subject, &append.bytes);
                    Ok(Appended {
                        position: Position(position),
                        duplicate: false,
                    })
                }
                Ok(Decision::Duplicate(position)) => Ok(Appended {
                    position: Position(position),
                    duplicate: true,
                }),
                Ok(Decision::Conflict(actual)) => Err(AppendError::Conflict {
                    expected: expected.unwrap_or_default(),
                    actual: Some(Position(actual)),
                }),
                Err(e) => Err(AppendError::Unavailable(with_causes(&e))),
            }
        };
        group.iter().map(decide).collect()
    }
}

fn is_accepted(answer: &Answer) -> bool {
    matches!(answer, Ok(appended) if !appended.duplicate)
}

/// What is left of an answer when the group's commit failed: only what rests on events that were
/// stored before.
fn after_failure(answer: Answer, error: &CommitError, synced: u64) -> Answer {
    match answer {
        Ok(Appended {
            position,
            duplicate: true,
        }) if position.0 <= synced => answer,
        Err(AppendError::Conflict {
            actual: Some(actual),
            ..
        }) if actual.0 > synced => Err(AppendError::Unavailable(error.to_string())),
        Err(_) => answer,
        Ok(_) => Err(match error {
            CommitError::NotWritten { .. } => AppendError::Unavailable(error.to_string()),
            CommitError::MaybeWritten { .. } => AppendError::Unknown(error.to_string()),
        }),
    }
}
