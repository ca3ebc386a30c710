//! The yardstick of the embedded log: a plain file that does nothing but get bytes onto the disk.
//! All events that wait are written at once, and one `fdatasync` serves them all.

use std::fs::File;
use std::io::Write as _;
use std::path::Path;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::JoinHandle;

use bytes::Bytes;
use daybook_events::{EventId, Position, Subject};
use tokio::sync::oneshot;

use crate::Failure;
use crate::writers::Side;

/// How much is allocated at once, where space is allocated ahead.
const ALLOCATION: u64 = 64 << 20;

/// A file, and the thread that writes it.
pub(crate) struct GroupCommitFile {
    queue: Arc<Queue>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Default)]
struct Queue {
    waiting: Mutex<Waiting>,
    wake: Condvar,
}

#[derive(Default)]
struct Waiting {
    events: Vec<(Bytes, oneshot::Sender<Position>)>,
    closed: bool,
}

impl GroupCommitFile {
    /// Creates the file. Where space is allocated ahead, most syncs have no size of the file to
    /// write.
    pub(crate) fn create(path: &Path, allocate_ahead: bool) -> Result<Self, Failure> {
        let file = PlainFile {
            file: File::create_new(path)?,
            written: 0,
            allocated: if allocate_ahead { 0 } else { u64::MAX },
        };
        let queue = Arc::new(Queue::default());
        let theirs = Arc::clone(&queue);
        let thread = std::thread::Builder::new()
            .name("group-commit".into())
            .spawn(move || theirs.write_all_to(file))?;
        Ok(Self {
            queue,
            thread: Some(thread),
        })
    }
}

impl Drop for GroupCommitFile {
    fn drop(&mut self) {
        self.queue.lock().closed = true;
        self.queue.wake.notify_one();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

struct PlainFile {
    file: File,
    written: u64,
    /// So far space is allocated, or nobody cares.
    allocated: u64,
}

impl PlainFile {
    /// Returns once the bytes are on the disk.
    fn append(&mut self, bytes: &[u8]) -> std::io::Result<()> {
        let end = self.written + bytes.len() as u64;
        if end > self.allocated {
            let flags = rustix::fs::FallocateFlags::empty();
            rustix::fs::fallocate(&self.file, flags, self.allocated, ALLOCATION)?;
            self.allocated += ALLOCATION;
        }
        self.file.write_all(bytes)?;
        self.written = end;
        self.file.sync_data()
    }
}

impl Queue {
    fn lock(&self) -> std::sync::MutexGuard<'_, Waiting> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Writes group after group until the queue is closed. After an error the writers learn that
    /// nobody answers any more.
    fn write_all_to(&self, mut file: PlainFile) {
        let mut position = Position::ZERO;
        let (mut group, mut buffer) = (Vec::new(), Vec::new());
        loop {
            let mut waiting = self.lock();
            while waiting.events.is_empty() && !waiting.closed {
                waiting = self
                    .wake
                    .wait(waiting)
                    .unwrap_or_else(PoisonError::into_inner);
            }
            if waiting.events.is_empty() {
                return;
            }
            std::mem::swap(&mut group, &mut waiting.events);
            drop(waiting);
            buffer.clear();
            for (bytes, _) in &group {
                buffer.extend_from_slice(&(bytes.len() as u32).to_le_bytes());
                buffer.extend_from_slice(bytes);
            }
            if let Err(error) = file.append(&buffer) {
                eprintln!("the plain file cannot be written: {error}");
                self.lock().closed = true;
                group.clear();
                return;
            }
            for (_, answer) in group.drain(..) {
                position = position.next();
                let _ = answer.send(position);
            }
        }
    }
}

impl Side for GroupCommitFile {
    type Aggregate = ();

    fn aggregate(&self, _: &Subject) {}

    async fn append(
        &self,
        (): &(),
        _: EventId,
        _: Position,
        bytes: Bytes,
    ) -> Result<Position, Failure> {
        let (answer, answered) = oneshot::channel();
        {
            let mut waiting = self.queue.lock();
            if waiting.closed {
                return Err("the plain file is closed".into());
            }
            waiting.events.push((bytes, answer));
        }
        self.queue.wake.notify_one();
        Ok(answered.await?)
    }
}
