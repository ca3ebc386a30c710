//! Group commit: one thread takes all appends that wait, decides on each, writes what is accepted
//! in one go, syncs once, and answers all.
//!
//! The thread is the only one that writes events, so that an expectation is checked and met
//! without any lock over the disk. After a group it lingers for a moment: writers that append one
//! event after another come back within microseconds, and waiting for them costs less than a sync
//! for each.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use daybook_events::log::{Append, AppendError, Appended, Expected, Position};
use jiff::Timestamp;
use tokio::sync::oneshot;
use uuid::Uuid;

use super::Shared;
use super::segment::{Appender, CommitError};

/// How long the thread waits for writers of the last group to come back before it goes on
/// without them.
const LINGER: Duration = Duration::from_micros(50);
/// How long a failed round of indexing waits before it is tried again.
const INDEX_RETRY: Duration = Duration::from_secs(5);

type Answer = Result<Appended, AppendError>;

/// An append that waits.
struct Waiting {
    append: Append,
    subject: Arc<str>,
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
    pub(super) fn push(&self, append: Append) -> Result<oneshot::Receiver<Answer>, AppendError> {
        let subject = append.subject.to_string().into();
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
    fn take(&self, group: &mut Vec<Waiting>, comes_back: usize) -> bool {
        if comes_back > 0 {
            let start = Instant::now();
            while self.len.load(Ordering::Acquire) < comes_back && start.elapsed() < LINGER {
                thread::yield_now();
            }
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
    let (rounds, due) = sync_channel(1);
    let indexer = thread::Builder::new().name("log-indexer".into()).spawn({
        let shared = Arc::clone(&shared);
        move || index_rounds(&shared, &due)
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
                ids: HashMap::new(),
                lasts: HashMap::new(),
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

fn index_rounds(shared: &Shared, due: &Receiver<()>) {
    while due.recv().is_ok() {
        while let Some(span) = shared.index.start_round() {
            let Err(error) = shared
                .index
                .finish_round(&span, shared.segments.identity())
            else {
                continue;
            };
            tracing::warn!(
                error = &error as &dyn std::error::Error,
                "index round failed; trying again later"
            );
            let until = Instant::now() + INDEX_RETRY;
            loop {
                let left = until.saturating_duration_since(Instant::now());
                match due.recv_timeout(left) {
                    Ok(()) => {}
                    Err(RecvTimeoutError::Timeout) => break,
                    Err(RecvTimeoutError::Disconnected) => return,
                }
            }
        }
    }
}

struct Writer {
    shared: Arc<Shared>,
    appender: Appender,
    /// Tells the indexer that there is enough for a round.
    rounds: SyncSender<()>,
    /// What the group being made adds to the index.
    ids: HashMap<Uuid, u64>,
    lasts: HashMap<Arc<str>, u64>,
}

impl Writer {
    fn run(mut self) {
        let mut group = Vec::new();
        let mut size = 0;
        while self.shared.queue.take(&mut group, size) {
            size = group.len();
            self.commit(&mut group);
        }
        self.appender.close();
    }

    fn commit(&mut self, group: &mut Vec<Waiting>) {
        let now = Timestamp::now().as_microsecond();
        let synced = self.appender.next() - 1;
        let answers: Vec<Answer> = group.iter().map(|w| self.decide(w, now)).collect();
        let accepted = self.appender.next() - 1 - synced;
        let result = if accepted > 0 {
            self.appender.commit()
        } else {
            Ok(())
        };
        self.ids.clear();
        self.lasts.clear();
        match result {
            Ok(()) => {
                if accepted > 0 {
                    self.publish(group, &answers);
                }
                for (waiting, answer) in group.drain(..).zip(answers) {
                    let _ = waiting.answer.send(answer);
                }
            }
            Err(error) => {
                tracing::error!(
                    error = &error as &dyn std::error::Error,
                    accepted,
                    "events not stored"
                );
                self.shared.set_trouble(Some(error.to_string()));
                for (waiting, answer) in group.drain(..).zip(answers) {
                    let _ = waiting.answer.send(after_failure(answer, &error, synced));
                }
            }
        }
    }

    /// Decides on one append, as if those before it in the group were stored already.
    fn decide(&mut self, waiting: &Waiting, now: i64) -> Answer {
        let Append {
            id,
            expected,
            bytes,
            ..
        } = &waiting.append;
        let index = &self.shared.index;
        let unavailable =
            |e: super::index::IndexError| AppendError::Unavailable(super::chain(&e));
        let first = match self.ids.get(&id.0) {
            Some(&position) => Some(position),
            None => index.position_of(id.0).map_err(unavailable)?,
        };
        if let Some(position) = first {
            return Ok(Appended {
                position: Position(position),
                duplicate: true,
            });
        }
        if let Expected::Last(expected) = *expected {
            let actual = match self.lasts.get(&waiting.subject) {
                Some(&last) => last,
                None => index.last_of(&waiting.subject).map_err(unavailable)?,
            };
            if actual != expected.0 {
                return Err(AppendError::Conflict {
                    expected,
                    actual: Some(Position(actual)),
                });
            }
        }
        let position = self.appender.push(now, id.0, &waiting.subject, bytes);
        self.ids.insert(id.0, position);
        self.lasts.insert(Arc::clone(&waiting.subject), position);
        Ok(Appended {
            position: Position(position),
            duplicate: false,
        })
    }

    /// Makes a stored group visible to readers.
    fn publish(&self, group: &[Waiting], answers: &[Answer]) {
        let mut head = Position::ZERO;
        let stored = group.iter().zip(answers).filter_map(|(waiting, answer)| {
            let Ok(Appended {
                position,
                duplicate: false,
            }) = answer
            else {
                return None;
            };
            head = *position;
            Some((position.0, waiting.append.id.0, &waiting.subject))
        });
        if self.shared.index.insert(stored) {
            // Full means that the indexer has been told already.
            let _ = self.rounds.try_send(());
        }
        self.shared.set_trouble(None);
        self.shared.head.send_replace(head);
    }
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
