//! Output of builds and containers in files: one folder a source, in it files of JSON lines, each
//! named by the number of its first line, so that a line's number is the file's plus its place.
//!
//! Nothing is synced: the loss of power may cost the latest lines, never the numbering of those
//! that are left. Old files go when there are too many bytes or a source has been silent too long.

use std::collections::HashMap;
use std::fs::{self, File, OpenOptions};
use std::io::{self, BufRead, BufReader, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime};

use async_trait::async_trait;
use daybook_events::lines::{Line, LineKind, LineLog, LineSource, NewLine};
use daybook_events::log::ReadError;
use futures_util::stream::{self, BoxStream};
use jiff::Timestamp;
use tokio::sync::{Semaphore, watch};

use super::lock::FolderLock;
use super::{OpenError, locked};

/// A new file is begun when one is larger than this.
const FILE_BYTES: u64 = 1 << 20;
/// Longest text of a line; what is longer is cut.
const TEXT_BYTES: usize = 16 << 10;
/// What ends a line that was cut.
const CUT: &str = " [cut by Daybook]";
/// Lines that a follower reads at a time.
const FOLLOW_BATCH: usize = 512;
/// Sources that are kept open without anybody using them.
const SOURCES_KEPT: usize = 256;
/// After so many written bytes the retention is applied again.
const SWEEP_EVERY: u64 = 16 << 20;
/// Threads that read and write at once. Each of hundreds of sources would have one of its own
/// otherwise when a server starts, and a thread is memory that stays.
const AT_ONCE: usize = 8;

/// How long output is kept.
#[derive(Debug, Clone)]
pub struct LineRetention {
    /// A source that printed nothing for this long is removed.
    pub max_age: Duration,
    /// When there are more bytes than this in all, the oldest files go, whole sources or the
    /// beginnings of long ones. The newest file of each source that is in use stays.
    pub max_bytes: u64,
}

impl Default for LineRetention {
    fn default() -> Self {
        Self {
            max_age: Duration::from_hours(24 * 30),
            max_bytes: 1 << 30,
        }
    }
}

/// The output of builds and containers, in a folder of this machine.
///
/// Where the beginning of a source was removed, reading begins with the first line that is left;
/// a source that was removed whole begins with 1 again.
///
/// Dropping it releases the folder and ends all followers with an error.
#[derive(Debug)]
pub struct EmbeddedLines {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    dir: PathBuf,
    retention: LineRetention,
    sources: Mutex<HashMap<LineSource, Arc<Source>>>,
    written: AtomicU64,
    turns: Arc<Semaphore>,
    /// `None` once closed.
    lock: Mutex<Option<FolderLock>>,
}

#[derive(Debug)]
struct Source {
    dir: PathBuf,
    files: Mutex<Files>,
    last: watch::Sender<u64>,
}

#[derive(Debug)]
struct Files {
    /// Numbers of the first lines of the files, in order.
    firsts: Vec<u64>,
    /// Number of the next line.
    next: u64,
    /// The newest file, once something was written to it, and its length.
    open: Option<(File, u64)>,
}

impl EmbeddedLines {
    /// Opens the folder, which is made if it does not exist, and removes what is too old.
    pub async fn open(
        dir: impl Into<PathBuf>,
        retention: LineRetention,
    ) -> Result<Self, OpenError> {
        let dir = dir.into();
        let path = dir.clone();
        let failed = move |source| OpenError::Io { path, source };
        let opened = tokio::task::spawn_blocking(move || {
            fs::create_dir_all(&dir).map_err(|source| OpenError::Io {
                path: dir.clone(),
                source,
            })?;
            let lock = FolderLock::acquire(&dir)?;
            let lines = Self {
                inner: Arc::new(Inner {
                    dir,
                    retention,
                    sources: Mutex::default(),
                    written: AtomicU64::new(0),
                    turns: Arc::new(Semaphore::new(AT_ONCE)),
                    lock: Mutex::new(Some(lock)),
                }),
            };
            lines.sweep(SystemTime::now());
            Ok(lines)
        });
        opened
            .await
            .unwrap_or_else(|e| Err(failed(io::Error::other(e))))
    }

    /// Applies the retention, as it is also done at the opening and now and then while lines are
    /// written. Blocks for as long as looking through the folder takes.
    pub fn sweep(&self, now: SystemTime) {
        if let Err(error) = self.inner.sweep(now) {
            tracing::warn!(dir = %self.inner.dir.display(), %error, "old output not removed");
        }
    }

    async fn blocking<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Inner) -> io::Result<T> + Send + 'static,
    ) -> Result<T, ReadError> {
        let inner = Arc::clone(&self.inner);
        self.inner.blocking(move || work(&inner)).await
    }
}

impl Drop for EmbeddedLines {
    fn drop(&mut self) {
        locked(&self.inner.lock).take();
        for (_, source) in locked(&self.inner.sources).drain() {
            source.last.send_modify(|_| {});
        }
    }
}

impl Inner {
    /// Does work with files when it is its turn. That does not depend on whoever waits for it: a follower
    /// whose client reads nothing is not polled, and would keep its turn.
    async fn blocking<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> io::Result<T> + Send + 'static,
    ) -> Result<T, ReadError> {
        let turns = Arc::clone(&self.turns);
        let work = tokio::spawn(async move {
            // Nobody closes the semaphore.
            let _turn = turns.acquire().await;
            tokio::task::spawn_blocking(work).await
        });
        work.await
            .and_then(|done| done)
            .map_err(|e| ReadError::Unavailable(e.to_string()))?
            .map_err(|e| ReadError::Unavailable(format!("output cannot be kept or read: {e}")))
    }

    fn is_closed(&self) -> bool {
        locked(&self.lock).is_none()
    }

    fn source(&self, source: LineSource) -> io::Result<Arc<Source>> {
        let mut sources = locked(&self.sources);
        if let Some(found) = sources.get(&source) {
            return Ok(Arc::clone(found));
        }
        if sources.len() >= SOURCES_KEPT {
            sources.retain(|_, s| Arc::strong_count(s) > 1);
        }
        let opened = Arc::new(Source::open(self.dir.join(source.to_string()))?);
        sources.insert(source, Arc::clone(&opened));
        Ok(opened)
    }

    fn append(&self, source: LineSource, lines: Vec<NewLine>) -> io::Result<u64> {
        let source = self.source(source)?;
        let (last, written) = source.append(lines)?;
        let before = self.written.fetch_add(written, Ordering::Relaxed);
        if before / SWEEP_EVERY != (before + written) / SWEEP_EVERY {
            self.sweep(SystemTime::now())?;
        }
        Ok(last)
    }

    fn sweep(&self, now: SystemTime) -> io::Result<()> {
        struct Old {
            time: SystemTime,
            bytes: u64,
            path: PathBuf,
        }
        let mut files = Vec::new();
        for folder in fs::read_dir(&self.dir)? {
            let folder = folder?;
            if !folder.file_type()?.is_dir() {
                continue;
            }
            let mut own = Vec::new();
            for file in fs::read_dir(folder.path())? {
                let file = file?;
                let meta = file.metadata()?;
                own.push(Old {
                    time: meta.modified()?,
                    bytes: meta.len(),
                    path: file.path(),
                });
            }
            let newest = own.iter().map(|f| f.time).max().unwrap_or(now);
            let silent = now.duration_since(newest).unwrap_or_default();
            if silent > self.retention.max_age {
                for old in own {
                    self.remove(&old.path)?;
                }
            } else {
                files.extend(own);
            }
        }
        files.sort_by(|a, b| (a.time, &a.path).cmp(&(b.time, &b.path)));
        let mut total: u64 = files.iter().map(|f| f.bytes).sum();
        for old in files {
            if total <= self.retention.max_bytes {
                break;
            }
            if self.remove(&old.path)? {
                total -= old.bytes;
            }
        }
        Ok(())
    }

    /// Removes one file, unless it is the newest of a source that is in use, and the source's
    /// folder with its last file.
    fn remove(&self, path: &Path) -> io::Result<bool> {
        let (Some(folder), Some(first)) = (path.parent(), first_of(path)) else {
            return Ok(false);
        };
        let mut sources = locked(&self.sources);
        let open = sources.iter().find(|(_, s)| s.dir == folder);
        if let Some((key, source)) = open.map(|(k, s)| (*k, Arc::clone(s))) {
            let mut files = locked(&source.files);
            if files.firsts.last() == Some(&first) {
                // Two: the map's and this one.
                if Arc::strong_count(&source) > 2 || source.last.receiver_count() > 0 {
                    return Ok(false);
                }
                sources.remove(&key);
            }
            files.firsts.retain(|f| *f != first);
        }
        fs::remove_file(path)?;
        // Fails while there are others.
        let _ = fs::remove_dir(folder);
        Ok(true)
    }
}

/// The number of the first line of a file.
fn first_of(path: &Path) -> Option<u64> {
    path.file_name()?
        .to_str()?
        .strip_suffix(".jsonl")?
        .parse()
        .ok()
}

impl Source {
    fn open(dir: PathBuf) -> io::Result<Self> {
        let mut firsts = Vec::new();
        match fs::read_dir(&dir) {
            Ok(entries) => {
                for entry in entries {
                    firsts.extend(first_of(&entry?.path()));
                }
            }
            Err(e) if e.kind() == io::ErrorKind::NotFound => {}
            Err(e) => return Err(e),
        }
        firsts.sort_unstable();
        let mut next = 1;
        if let Some(&first) = firsts.last() {
            let path = dir.join(file_name(first));
            let bytes = fs::read(&path)?;
            let end = bytes.iter().rposition(|b| *b == b'\n').map_or(0, |i| i + 1);
            if end < bytes.len() {
                // A line that was being written when the process or the power went.
                OpenOptions::new()
                    .write(true)
                    .open(&path)?
                    .set_len(end as u64)?;
            }
            let lines = bytes[..end].iter().filter(|b| **b == b'\n').count();
            next = first + lines as u64;
        }
        Ok(Self {
            dir,
            files: Mutex::new(Files {
                firsts,
                next,
                open: None,
            }),
            last: watch::Sender::new(next - 1),
        })
    }

    fn append(&self, lines: Vec<NewLine>) -> io::Result<(u64, u64)> {
        let mut text = Vec::new();
        let count = lines.len() as u64;
        for mut line in lines {
            cut(&mut line.text);
            serde_json::to_writer(&mut text, &line)?;
            text.push(b'\n');
        }
        let mut files = locked(&self.files);
        if count == 0 {
            return Ok((files.next - 1, 0));
        }
        let (mut file, len) = match files.open.take() {
            Some((file, len)) if len < FILE_BYTES => (file, len),
            _ => self.newest(&mut files)?,
        };
        if let Err(error) = file.write_all(&text) {
            // A part of the batch must not stay, as its lines would be counted.
            file.set_len(len)?;
            return Err(error);
        }
        files.open = Some((file, len + text.len() as u64));
        files.next += count;
        let last = files.next - 1;
        self.last.send_replace(last);
        Ok((last, text.len() as u64))
    }

    /// Opens the file that the next line goes to.
    fn newest(&self, files: &mut Files) -> io::Result<(File, u64)> {
        if let Some(&first) = files.firsts.last() {
            let file = OpenOptions::new()
                .append(true)
                .open(self.dir.join(file_name(first)))?;
            let len = file.metadata()?.len();
            if len < FILE_BYTES {
                return Ok((file, len));
            }
        }
        fs::create_dir_all(&self.dir)?;
        let file = OpenOptions::new()
            .append(true)
            .create(true)
            .open(self.dir.join(file_name(files.next)))?;
        files.firsts.push(files.next);
        Ok((file, 0))
    }

    fn read(&self, after: u64, limit: usize, mut from: Place) -> io::Result<(Vec<Line>, Place)> {
        let (firsts, next) = {
            let files = locked(&self.files);
            (files.firsts.clone(), files.next)
        };
        let mut out = Vec::new();
        let mut wanted = after.saturating_add(1);
        while out.len() < limit && wanted < next {
            let at = firsts.partition_point(|f| *f <= wanted).saturating_sub(1);
            let Some(&first) = firsts.get(at) else {
                break;
            };
            wanted = wanted.max(first);
            if from.first != first || from.seq > wanted {
                from = Place {
                    first,
                    offset: 0,
                    seq: first,
                };
            }
            let file = match File::open(self.dir.join(file_name(first))) {
                Ok(file) => file,
                // Removed by the retention just now: go on with the next one.
                Err(e) if e.kind() == io::ErrorKind::NotFound => {
                    match firsts.get(at + 1) {
                        Some(&later) => wanted = later,
                        None => break,
                    }
                    continue;
                }
                Err(e) => return Err(e),
            };
            let mut reader = BufReader::new(file);
            reader.seek(SeekFrom::Start(from.offset))?;
            let end = firsts.get(at + 1).copied().unwrap_or(next);
            let mut text = Vec::new();
            while out.len() < limit && from.seq < end {
                text.clear();
                let read = reader.read_until(b'\n', &mut text)?;
                if read == 0 {
                    break;
                }
                if from.seq >= wanted {
                    out.push(line(from.seq, &text));
                }
                from.offset += read as u64;
                from.seq += 1;
            }
            if from.seq <= wanted && out.len() < limit {
                // The file is shorter than it was: what is gone is passed over.
                wanted = end;
            } else {
                wanted = wanted.max(from.seq);
            }
        }
        Ok((out, from))
    }
}

/// Where reading goes on in the files of a source.
#[derive(Debug, Clone, Copy, Default)]
struct Place {
    /// The file.
    first: u64,
    /// Where in it.
    offset: u64,
    /// The number of the line that begins there.
    seq: u64,
}

fn file_name(first: u64) -> String {
    format!("{first:020}.jsonl")
}

fn line(seq: u64, text: &[u8]) -> Line {
    let line = serde_json::from_slice(text).unwrap_or_else(|_| NewLine {
        time: Timestamp::UNIX_EPOCH,
        kind: LineKind::Status,
        cluster: None,
        instance: None,
        text: "[this line was damaged on disk]".into(),
    });
    Line { seq, line }
}

fn cut(text: &mut String) {
    if text.len() > TEXT_BYTES {
        let end = text.floor_char_boundary(TEXT_BYTES - CUT.len());
        text.truncate(end);
        text.push_str(CUT);
    }
}

#[async_trait]
impl LineLog for EmbeddedLines {
    async fn append(&self, source: LineSource, lines: Vec<NewLine>) -> Result<u64, ReadError> {
        self.blocking(move |inner| inner.append(source, lines))
            .await
    }

    async fn read(
        &self,
        source: LineSource,
        after: u64,
        limit: usize,
    ) -> Result<Vec<Line>, ReadError> {
        self.blocking(move |inner| {
            let read = inner.source(source)?.read(after, limit, Place::default());
            read.map(|(lines, _)| lines)
        })
        .await
    }

    async fn follow(
        &self,
        source: LineSource,
        after: u64,
    ) -> Result<BoxStream<'static, Result<Line, ReadError>>, ReadError> {
        let (source, last) = self
            .blocking(move |inner| {
                let source = inner.source(source)?;
                let last = source.last.subscribe();
                Ok((source, last))
            })
            .await?;
        let follower = Follower {
            lines: Arc::clone(&self.inner),
            source,
            last,
            after,
            place: Place::default(),
            ahead: Vec::new().into_iter(),
            ended: false,
        };
        Ok(Box::pin(stream::unfold(follower, |mut f| async move {
            Some((f.next().await?, f))
        })))
    }

    async fn last(&self, source: LineSource) -> Result<u64, ReadError> {
        self.blocking(move |inner| Ok(*inner.source(source)?.last.borrow()))
            .await
    }
}

struct Follower {
    lines: Arc<Inner>,
    source: Arc<Source>,
    last: watch::Receiver<u64>,
    after: u64,
    place: Place,
    ahead: std::vec::IntoIter<Line>,
    ended: bool,
}

impl Follower {
    async fn next(&mut self) -> Option<Result<Line, ReadError>> {
        loop {
            if let Some(line) = self.ahead.next() {
                self.after = line.seq;
                return Some(Ok(line));
            }
            if self.ended {
                return None;
            }
            let last = *self.last.borrow_and_update();
            if self.lines.is_closed() {
                self.ended = true;
                let closed = "the folder of output is closed".into();
                return Some(Err(ReadError::Unavailable(closed)));
            }
            if last <= self.after {
                // The sender lives in `source`.
                let _ = self.last.changed().await;
                continue;
            }
            let (source, after, place) = (Arc::clone(&self.source), self.after, self.place);
            let read = move || source.read(after, FOLLOW_BATCH, place);
            match self.lines.blocking(read).await {
                Ok((lines, place)) => {
                    self.place = place;
                    // Nothing to be read any more: what is missing was removed.
                    if lines.is_empty() {
                        self.after = last;
                    }
                    self.ahead = lines.into_iter();
                }
                Err(error) => {
                    self.ended = true;
                    return Some(Err(error));
                }
            }
        }
    }
}
