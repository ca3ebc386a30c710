//! Durable consumers: what each has been given and has answered.
//!
//! A consumer's state is the position up to which events were handed out and the few of those
//! that are not settled yet. Every change is appended to the consumer's journal, a text file, as
//! it happens and without a sync: it survives the death of the process, so that a delivery that
//! kills its worker is counted; the loss of power may undo the latest changes, which makes some
//! deliveries again and loses none. Any beginning of a journal is a state that was.
//!
//! ```text
//! c 41      all up to 41 was looked at
//! d 42 1    42 is delivered for the first time
//! n 42 1790000000000   42 is wanted again, not before this time (milliseconds since 1970)
//! a 42      42 is settled
//! ```

use std::collections::{BTreeMap, VecDeque};
use std::fmt::Write as _;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use async_trait::async_trait;
use daybook_events::log::{
    Consumer, ConsumerConfig, Delivery, Position, ReadError, Recorded, Reply,
};
use tokio::sync::watch;
use tokio::time::Instant;

use super::{Shared, locked};

/// Matching events that are read ahead of their delivery.
const READ_AHEAD: usize = 32;
/// Events that are looked at before other tasks have a turn.
const LOOK_AT: u64 = 1_024;
/// A journal is rewritten when it is larger than this.
const JOURNAL_BYTES: u64 = 256 << 10;
/// Events without a delivery after which the journal learns that they were looked at.
const SKIP_NOTED: u64 = 4_096;
/// A journal that is larger than this is rewritten when it is opened.
const JOURNAL_BYTES_AT_OPEN: u64 = 4 << 10;
/// No delivery is put off for longer than this.
const LONGEST_DELAY: Duration = Duration::from_hours(24 * 365);

/// A consumer, as all who opened its name in this process share it.
#[derive(Debug)]
pub(super) struct Core {
    name: String,
    shared: Arc<Shared>,
    state: Mutex<State>,
    /// Sent when an answer may have changed what is to be delivered.
    changed: watch::Sender<()>,
}

#[derive(Debug)]
struct State {
    config: ConsumerConfig,
    /// All events up to here were delivered or are not wanted.
    cursor: u64,
    /// Delivered and not settled, at or below the cursor.
    pending: BTreeMap<u64, Pending>,
    /// Read and not delivered, above the cursor.
    ahead: VecDeque<Recorded>,
    /// Up to where `ahead` was read.
    read_to: u64,
    journal: Journal,
}

#[derive(Debug, Clone, Copy)]
struct Pending {
    attempts: u32,
    /// When it is delivered again.
    due: Instant,
    /// It was refused until then. Otherwise somebody has it, and whoever that is does not have it
    /// any more after a restart.
    refused: bool,
}

/// What a consumer does next.
enum Step {
    Deliver(Box<(Recorded, u32, bool)>),
    /// Nothing before this time, unless something changes.
    Wait(Option<Instant>),
    /// There is more to look at.
    Again,
}

impl Core {
    /// The consumer of this name, made if there is none. The newest configuration holds for all
    /// who share it.
    pub(super) fn open(
        shared: &Arc<Shared>,
        config: ConsumerConfig,
    ) -> Result<Arc<Self>, ReadError> {
        let valid = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-';
        if config.name.is_empty() || config.name.len() > 100 || !config.name.bytes().all(valid) {
            return Err(ReadError::Invalid(format!(
                "{:?} is not a consumer's name: 1 to 100 lowercase letters, digits and hyphens",
                config.name
            )));
        }
        if config.max_deliver == 0 || config.max_in_flight == 0 {
            return Err(ReadError::Invalid(
                "max_deliver and max_in_flight must be at least 1".into(),
            ));
        }
        let mut consumers = locked(&shared.consumers);
        if shared.queue.is_closed() {
            return Err(Shared::closed());
        }
        if let Some(core) = consumers.get(&config.name) {
            let mut state = locked(&core.state);
            if state.config.filter != config.filter {
                state.ahead.clear();
                state.read_to = state.cursor;
            }
            state.config = config;
            drop(state);
            core.changed.send_replace(());
            return Ok(Arc::clone(core));
        }
        let path = shared.dir.join("consumers").join(&config.name);
        let (journal, cursor, pending) = Journal::open(&path, shared.head().0).map_err(|e| {
            ReadError::Unavailable(format!("consumer {} cannot be opened: {e}", config.name))
        })?;
        let core = Arc::new(Self {
            name: config.name.clone(),
            shared: Arc::clone(shared),
            state: Mutex::new(State {
                config,
                cursor,
                pending,
                ahead: VecDeque::new(),
                read_to: cursor,
                journal,
            }),
            changed: watch::Sender::new(()),
        });
        consumers.insert(core.name.clone(), Arc::clone(&core));
        Ok(core)
    }

    async fn next(self: &Arc<Self>) -> Result<Delivery, ReadError> {
        let mut head = self.shared.head.subscribe();
        let mut changed = self.changed.subscribe();
        loop {
            head.borrow_and_update();
            changed.borrow_and_update();
            if self.shared.queue.is_closed() {
                return Err(Shared::closed());
            }
            // Nothing is awaited between a delivery's being noted and its being returned, so that
            // cancelling this future loses none.
            match self.step()? {
                Step::Deliver(delivery) => {
                    let (recorded, attempt, is_last) = *delivery;
                    return Ok(Delivery {
                        reply: Box::new(EmbeddedReply {
                            core: Arc::clone(self),
                            position: recorded.position.0,
                            attempt,
                        }),
                        recorded,
                        attempt,
                        is_last,
                    });
                }
                Step::Again => tokio::task::yield_now().await,
                Step::Wait(until) => {
                    let timer = async {
                        match until {
                            Some(until) => tokio::time::sleep_until(until).await,
                            None => std::future::pending().await,
                        }
                    };
                    // The senders live as long as `self`.
                    tokio::select! {
                        _ = head.changed() => {}
                        _ = changed.changed() => {}
                        () = timer => {}
                    }
                }
            }
        }
    }

    fn step(&self) -> Result<Step, ReadError> {
        let state = &mut *locked(&self.state);
        let now = Instant::now();
        let max_deliver = state.config.max_deliver;
        while let Some((&position, &found)) = state.pending.iter().find(|(_, p)| p.due <= now) {
            if found.attempts >= max_deliver {
                tracing::warn!(
                    consumer = self.name,
                    position,
                    attempts = found.attempts,
                    "event given up: delivered as often as allowed"
                );
                state.settle(position);
                continue;
            }
            // Counted before it is read: what cannot be read is given up, too, in the end.
            let attempt = state.deliver(position, found.attempts + 1, now);
            let recorded = self.shared.get(Position(position))?.ok_or_else(|| {
                // The journal is checked against the head when it is opened.
                ReadError::Unavailable(format!("event {position} is gone"))
            })?;
            let delivery = (recorded, attempt, attempt >= max_deliver);
            return Ok(Step::Deliver(Box::new(delivery)));
        }
        let due = state.pending.values().map(|p| p.due).min();
        if state.pending.len() >= state.config.max_in_flight {
            return Ok(Step::Wait(due));
        }
        if state.ahead.is_empty() {
            let head = self.shared.head();
            if state.read_to >= head.0 {
                state.skip_to(state.read_to, SKIP_NOTED);
                return Ok(Step::Wait(due));
            }
            let after = Position(state.read_to);
            let filter = &state.config.filter;
            let (events, upto) = self.shared.scan(after, filter, READ_AHEAD, LOOK_AT)?;
            state.read_to = upto.0;
            state.ahead.extend(events);
        }
        match state.ahead.pop_front() {
            Some(recorded) => {
                let attempt = state.deliver(recorded.position.0, 1, now);
                let delivery = (recorded, attempt, attempt >= max_deliver);
                Ok(Step::Deliver(Box::new(delivery)))
            }
            None => {
                state.skip_to(state.read_to, SKIP_NOTED);
                Ok(Step::Again)
            }
        }
    }

    /// Changes what is pending, if it is, and lets all look again.
    fn answer(&self, position: u64, change: impl FnOnce(&mut State, Pending)) {
        let mut state = locked(&self.state);
        if let Some(&pending) = state.pending.get(&position) {
            change(&mut state, pending);
            drop(state);
            self.changed.send_replace(());
        }
    }

    fn check_open(&self) -> Result<(), ReadError> {
        if self.shared.queue.is_closed() {
            return Err(Shared::closed());
        }
        Ok(())
    }
}

impl State {
    fn deliver(&mut self, position: u64, attempt: u32, now: Instant) -> u32 {
        let due = now + self.config.ack_wait.min(LONGEST_DELAY);
        let pending = Pending {
            attempts: attempt,
            due,
            refused: false,
        };
        self.pending.insert(position, pending);
        self.cursor = self.cursor.max(position);
        self.note(format_args!("d {position} {attempt}"));
        attempt
    }

    fn settle(&mut self, position: u64) {
        self.pending.remove(&position);
        self.note(format_args!("a {position}"));
    }

    /// Nothing up to `to` is wanted. The journal learns it if it is at least `noted` events more.
    fn skip_to(&mut self, to: u64, noted: u64) {
        if to >= self.journal.cursor + noted {
            self.cursor = to;
            self.note(format_args!("c {to}"));
        }
        self.cursor = self.cursor.max(to);
    }

    fn note(&mut self, change: std::fmt::Arguments<'_>) {
        self.journal.note(change, self.cursor);
        if self.journal.len > JOURNAL_BYTES {
            self.journal.rewrite(self.cursor, &self.pending);
        }
    }
}

/// The file that a consumer's state is read from again.
#[derive(Debug)]
struct Journal {
    path: PathBuf,
    file: File,
    len: u64,
    /// The cursor that the file holds.
    cursor: u64,
    failing: bool,
}

impl Journal {
    /// Opens a journal and reads the state that it holds. What it says of events beyond the head,
    /// which the loss of power may have taken back, does not count.
    fn open(path: &Path, head: u64) -> io::Result<(Self, u64, BTreeMap<u64, Pending>)> {
        let bytes = match fs::read(path) {
            Ok(bytes) => bytes,
            Err(e) if e.kind() == io::ErrorKind::NotFound => Vec::new(),
            Err(e) => return Err(e),
        };
        let now = Instant::now();
        let mut cursor = 0;
        let mut pending = BTreeMap::new();
        let mut good = 0;
        for line in bytes.split_inclusive(|b| *b == b'\n') {
            let Some(change) = Change::parse(line) else {
                break;
            };
            good += line.len() as u64;
            match change {
                Change::Cursor(to) => cursor = cursor.max(to),
                Change::Delivered(position, attempts) => {
                    cursor = cursor.max(position);
                    let delivered = Pending {
                        attempts,
                        due: now,
                        refused: false,
                    };
                    pending.insert(position, delivered);
                }
                Change::Later(position, millis) => {
                    if let Some(p) = pending.get_mut(&position) {
                        p.due = now + until(millis);
                        p.refused = true;
                    }
                }
                Change::Settled(position) => {
                    pending.remove(&position);
                }
            }
        }
        cursor = cursor.min(head);
        pending.retain(|position, _| *position <= cursor);
        let file = OpenOptions::new().create(true).append(true).open(path)?;
        if good < bytes.len() as u64 {
            tracing::warn!(path = %path.display(), "torn end of a consumer's journal cut off");
            file.set_len(good)?;
        }
        let mut journal = Self {
            path: path.to_owned(),
            file,
            len: good,
            cursor,
            failing: false,
        };
        if good > JOURNAL_BYTES_AT_OPEN {
            journal.rewrite(cursor, &pending);
        }
        Ok((journal, cursor, pending))
    }

    fn note(&mut self, change: std::fmt::Arguments<'_>, cursor: u64) {
        let line = format!("{change}\n");
        // Not written means that some deliveries may be made again after a restart, no more.
        match self.file.write_all(line.as_bytes()) {
            Ok(()) => {
                self.len += line.len() as u64;
                self.cursor = cursor;
                self.failing = false;
            }
            Err(error) => {
                // A part of a line would hide those after it.
                let _ = self.file.set_len(self.len);
                if !std::mem::replace(&mut self.failing, true) {
                    tracing::warn!(path = %self.path.display(), %error, "consumer not saved");
                }
            }
        }
    }

    /// Replaces the file by a short one that holds the same state.
    fn rewrite(&mut self, cursor: u64, pending: &BTreeMap<u64, Pending>) {
        let now = Instant::now();
        let mut text = format!("c {cursor}\n");
        for (position, p) in pending {
            let _ = writeln!(text, "d {position} {}", p.attempts);
            if p.refused {
                let due = millis_now() + (p.due.saturating_duration_since(now)).as_millis() as u64;
                let _ = writeln!(text, "n {position} {due}");
            }
        }
        let new = self.path.with_extension("new");
        let replaced = fs::write(&new, &text)
            .and_then(|()| OpenOptions::new().append(true).open(&new))
            .and_then(|file| {
                // Renaming a file whose content is not on disk can leave an empty one behind.
                file.sync_data()?;
                fs::rename(&new, &self.path)?;
                Ok(file)
            });
        match replaced {
            Ok(file) => {
                self.file = file;
                self.cursor = cursor;
                self.len = text.len() as u64;
            }
            Err(error) => {
                tracing::warn!(path = %self.path.display(), %error, "consumer not rewritten");
                let _ = fs::remove_file(&new);
            }
        }
    }
}

/// One line of a journal.
#[derive(Debug, PartialEq, Eq)]
enum Change {
    Cursor(u64),
    Delivered(u64, u32),
    Later(u64, u64),
    Settled(u64),
}

impl Change {
    /// Reads a line with its end; a line without one was not written to the end.
    fn parse(line: &[u8]) -> Option<Self> {
        let line = std::str::from_utf8(line).ok()?.strip_suffix('\n')?;
        let mut words = line.split(' ');
        let kind = words.next()?;
        let position = words.next()?.parse().ok()?;
        let change = match kind {
            "c" => Self::Cursor(position),
            "d" => Self::Delivered(position, words.next()?.parse().ok()?),
            "n" => Self::Later(position, words.next()?.parse().ok()?),
            "a" => Self::Settled(position),
            _ => return None,
        };
        words.next().is_none().then_some(change)
    }
}

fn millis_now() -> u64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |d| d.as_millis() as u64)
}

fn until(millis: u64) -> Duration {
    Duration::from_millis(millis.saturating_sub(millis_now())).min(LONGEST_DELAY)
}

/// A handle on a consumer.
#[derive(Debug)]
pub(super) struct EmbeddedConsumer {
    core: Arc<Core>,
}

impl EmbeddedConsumer {
    pub(super) fn new(core: Arc<Core>) -> Self {
        Self { core }
    }
}

#[async_trait]
impl Consumer for EmbeddedConsumer {
    async fn next(&self) -> Result<Delivery, ReadError> {
        self.core.next().await
    }
}

#[derive(Debug)]
struct EmbeddedReply {
    core: Arc<Core>,
    position: u64,
    attempt: u32,
}

#[async_trait]
impl Reply for EmbeddedReply {
    async fn ack(&self) -> Result<(), ReadError> {
        self.core.check_open()?;
        // Also from a delivery that was made again meanwhile: what is done is done.
        let position = self.position;
        self.core
            .answer(position, |state, _| state.settle(position));
        Ok(())
    }

    async fn nak(&self, delay: Duration) -> Result<(), ReadError> {
        self.core.check_open()?;
        let position = self.position;
        self.core.answer(position, |state, pending| {
            if pending.attempts != self.attempt {
                return;
            }
            if pending.attempts >= state.config.max_deliver {
                return state.settle(position);
            }
            let delay = delay.min(LONGEST_DELAY);
            let due = Instant::now() + delay;
            let refused = Pending {
                due,
                refused: true,
                ..pending
            };
            state.pending.insert(position, refused);
            let millis = millis_now() + delay.as_millis() as u64;
            state.note(format_args!("n {position} {millis}"));
        });
        Ok(())
    }

    async fn progress(&self) -> Result<(), ReadError> {
        self.core.check_open()?;
        let position = self.position;
        self.core.answer(position, |state, pending| {
            if pending.attempts == self.attempt {
                let pending = Pending {
                    due: Instant::now() + state.config.ack_wait.min(LONGEST_DELAY),
                    ..pending
                };
                state.pending.insert(position, pending);
            }
        });
        Ok(())
    }

    async fn term(&self) -> Result<(), ReadError> {
        self.core.check_open()?;
        let position = self.position;
        self.core
            .answer(position, |state, _| state.settle(position));
        Ok(())
    }
}
