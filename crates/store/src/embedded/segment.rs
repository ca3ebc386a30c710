//! The segment files: where the events are.
//!
//! A segment holds consecutive records ([`super::record`]) and is named by the position of its
//! first. Only the last one grows. It is allocated ahead in steps, so that a full disk shows
//! before anything is written, and so that a sync has no file size to write.
//!
//! A segment ends where the next one begins. After a write that failed, the next one goes to a
//! new segment, and whatever the failed one left behind in the old segment does not count.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::ops::ControlFlow;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, PoisonError, RwLock};

use daybook_events::log::{Position, ReadError};
use uuid::Uuid;

use super::OpenError;
use super::record::{HEADER_LEN, Header, Parsed, Record};

/// A segment is closed when it would grow beyond this.
pub(super) const SEGMENT_BYTES: u64 = 64 << 20;
/// Steps of allocation: about as much as there is already, within these bounds.
const ALLOCATE_MIN: u64 = 1 << 20;
const ALLOCATE_MAX: u64 = 16 << 20;
/// The offset of one record in so many is kept in memory; between them records are walked.
const MARK_EVERY: u64 = 8;
/// How much is read at a time.
const CHUNK: usize = 256 << 10;

/// One segment file.
#[derive(Debug)]
struct Segment {
    first: u64,
    path: PathBuf,
    file: File,
    extent: RwLock<Extent>,
}

/// What of a segment counts.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Extent {
    /// Number of records.
    count: u64,
    /// Where the last one ends.
    end: u64,
    /// Offsets of the records 0, 8, 16, …
    marks: Vec<u32>,
}

impl Extent {
    fn empty() -> Self {
        Self {
            count: 0,
            end: HEADER_LEN,
            marks: Vec::new(),
        }
    }

    fn push(&mut self, offset: u64, len: u64) {
        if self.count.is_multiple_of(MARK_EVERY) {
            self.marks.push(offset as u32);
        }
        self.count += 1;
        self.end = offset + len;
    }
}

/// How a walk over records ended.
enum Walk {
    /// At the end that it was given.
    Done,
    /// The visitor had enough.
    Enough,
    /// What stands here is not the expected record.
    Bad {
        offset: u64,
        position: u64,
        reason: &'static str,
    },
}

impl Segment {
    fn create(dir: &Path, identity: Uuid, first: u64) -> io::Result<Self> {
        let path = dir.join(format!("{first:020}.seg"));
        let created = OpenOptions::new()
            .read(true)
            .write(true)
            .create_new(true)
            .open(&path)
            .and_then(|file| {
                allocate(&file, 0, ALLOCATE_MIN)?;
                file.write_all_at(&Header { identity, first }.encode(), 0)?;
                file.sync_all()?;
                sync_dir(dir)?;
                Ok(file)
            });
        match created {
            Ok(file) => Ok(Self {
                first,
                path,
                file,
                extent: RwLock::new(Extent::empty()),
            }),
            Err(e) => {
                if e.kind() != io::ErrorKind::AlreadyExists {
                    let _ = fs::remove_file(&path);
                }
                Err(e)
            }
        }
    }

    fn extent(&self) -> std::sync::RwLockReadGuard<'_, Extent> {
        self.extent.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// Reads records from an offset on, of which the first must have this position, until the
    /// visitor has enough or `end` is reached.
    fn walk(
        &self,
        mut offset: u64,
        mut position: u64,
        end: u64,
        mut visit: impl FnMut(u64, usize, Record<'_>) -> ControlFlow<()>,
    ) -> io::Result<Walk> {
        let mut buf = Vec::new();
        let mut want = CHUNK;
        while offset < end {
            buf.resize(want.min((end - offset) as usize), 0);
            let got = read_at_most(&self.file, &mut buf, offset)?;
            let mut at = 0;
            loop {
                let bad = |reason| Walk::Bad {
                    offset: offset + at as u64,
                    position,
                    reason,
                };
                match Record::parse(&buf[at..got]) {
                    Parsed::Record(record, len) => {
                        if record.position != position {
                            return Ok(bad("a record of another position stands there"));
                        }
                        if visit(offset + at as u64, len, record).is_break() {
                            return Ok(Walk::Enough);
                        }
                        at += len;
                        position += 1;
                    }
                    Parsed::Partial(needed) => {
                        if offset + at as u64 + needed as u64 > end || got < buf.len() {
                            if at == got && offset + at as u64 >= end {
                                return Ok(Walk::Done);
                            }
                            return Ok(bad("it is cut short"));
                        }
                        want = needed.max(CHUNK);
                        break;
                    }
                    Parsed::Invalid(reason) => return Ok(bad(reason)),
                }
            }
            offset += at as u64;
        }
        Ok(Walk::Done)
    }

    /// Where to walk to see the records from `from` to `upto`, as far as they are in this segment:
    /// the offset to begin at, the position that stands there, and the offset to end at. `None` if
    /// `from` is beyond the segment's end.
    fn stretch(&self, from: u64, upto: u64) -> Option<(u64, u64, u64)> {
        let extent = self.extent();
        if from >= self.first + extent.count {
            return None;
        }
        let index = (from - self.first) / MARK_EVERY;
        let begin = extent.marks.get(index as usize).copied();
        let behind = (upto - self.first) / MARK_EVERY + 1;
        let end = extent.marks.get(behind as usize).copied();
        Some((
            begin.map_or(HEADER_LEN, u64::from),
            self.first + index * MARK_EVERY,
            end.map_or(extent.end, u64::from),
        ))
    }
}

/// Reads until the buffer is full or the file ends.
fn read_at_most(file: &File, buf: &mut [u8], offset: u64) -> io::Result<usize> {
    let mut got = 0;
    while got < buf.len() {
        match file.read_at(&mut buf[got..], offset + got as u64) {
            Ok(0) => break,
            Ok(n) => got += n,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
    Ok(got)
}

/// Makes sure that the file has this much space; its length then includes it.
fn allocate(file: &File, from: u64, len: u64) -> io::Result<()> {
    loop {
        match rustix::fs::fallocate(file, rustix::fs::FallocateFlags::empty(), from, len) {
            Ok(()) => return Ok(()),
            Err(rustix::io::Errno::INTR) => {}
            // A file system that cannot allocate: a full disk then shows on writing.
            Err(rustix::io::Errno::OPNOTSUPP | rustix::io::Errno::NOSYS) => {
                return file.set_len(from + len);
            }
            Err(e) => return Err(e.into()),
        }
    }
}

/// Makes creations and removals in a folder durable.
fn sync_dir(dir: &Path) -> io::Result<()> {
    File::open(dir)?.sync_all()
}

/// All segments of a log, for reading.
#[derive(Debug)]
pub(super) struct Segments {
    dir: PathBuf,
    identity: Uuid,
    list: RwLock<Vec<Arc<Segment>>>,
}

impl Segments {
    /// Opens the segments of a folder, or makes the folder a new log. The torn end of a write
    /// that was never acknowledged is cut off; anything else that does not fit is an error.
    pub(super) fn open(dir: &Path) -> Result<Self, OpenError> {
        let io = |source| OpenError::Io {
            path: dir.to_owned(),
            source,
        };
        fs::create_dir_all(dir).map_err(io)?;
        let mut firsts = Vec::new();
        for entry in fs::read_dir(dir).map_err(io)? {
            let name = entry.map_err(io)?.file_name();
            let first = name
                .to_str()
                .and_then(|n| n.strip_suffix(".seg"))
                .and_then(|n| n.parse::<u64>().ok());
            firsts.extend(first);
        }
        firsts.sort_unstable();
        let mut identity = None;
        let mut list = Vec::with_capacity(firsts.len() + 1);
        for (i, &first) in firsts.iter().enumerate() {
            let next = firsts.get(i + 1).copied();
            if let Some(segment) = recover(dir, first, next, &mut identity)? {
                list.push(Arc::new(segment));
            }
        }
        let identity = identity.unwrap_or_else(Uuid::new_v4);
        if list.is_empty() {
            list.push(Arc::new(Segment::create(dir, identity, 1).map_err(io)?));
            // The folders are as new as the segment.
            let dir = dir.canonicalize().map_err(io)?;
            for parent in dir.ancestors().skip(1).take(2) {
                sync_dir(parent).map_err(io)?;
            }
        }
        if list[0].first != 1 {
            return Err(OpenError::Damaged {
                path: dir.to_owned(),
                position: Position(1),
                reason: "the first segment is missing".into(),
            });
        }
        Ok(Self {
            dir: dir.to_owned(),
            identity,
            list: RwLock::new(list),
        })
    }

    /// Where the files are.
    pub(super) fn dir(&self) -> &Path {
        &self.dir
    }

    /// Identifies this log.
    pub(super) fn identity(&self) -> Uuid {
        self.identity
    }

    fn list(&self) -> std::sync::RwLockReadGuard<'_, Vec<Arc<Segment>>> {
        self.list.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// Position of the last record that counts; 0 if there is none.
    pub(super) fn last(&self) -> u64 {
        self.list()
            .last()
            .map_or(0, |s| s.first + s.extent().count - 1)
    }

    /// Visits the records from `from` to `upto`, both included, in order, until the visitor has
    /// enough.
    pub(super) fn visit(
        &self,
        from: u64,
        upto: u64,
        mut visit: impl FnMut(Record<'_>) -> ControlFlow<()>,
    ) -> Result<(), ReadError> {
        let mut next = from.max(1);
        while next <= upto {
            let segment = {
                let list = self.list();
                let after = list.partition_point(|s| s.first <= next);
                match after.checked_sub(1).and_then(|i| list.get(i)) {
                    Some(segment) => Arc::clone(segment),
                    None => return Ok(()),
                }
            };
            let Some((offset, position, end)) = segment.stretch(next, upto) else {
                return Ok(());
            };
            let mut enough = false;
            let walked = segment.walk(offset, position, end, |_, _, record| {
                if record.position < next {
                    return ControlFlow::Continue(());
                }
                next = record.position + 1;
                let flow = visit(record);
                enough = flow.is_break() || next > upto;
                if enough {
                    ControlFlow::Break(())
                } else {
                    ControlFlow::Continue(())
                }
            });
            match walked {
                Ok(Walk::Done | Walk::Enough) => {}
                Ok(Walk::Bad {
                    position, reason, ..
                }) => {
                    return Err(ReadError::Damaged {
                        position: Position(position),
                        reason: format!("{} in {}", reason, segment.path.display()),
                    });
                }
                Err(e) => {
                    return Err(ReadError::Unavailable(format!(
                        "{} cannot be read: {e}",
                        segment.path.display()
                    )));
                }
            }
            if enough {
                return Ok(());
            }
        }
        Ok(())
    }
}

/// Opens one segment. `None` if it was never finished being made.
fn recover(
    dir: &Path,
    first: u64,
    next: Option<u64>,
    identity: &mut Option<Uuid>,
) -> Result<Option<Segment>, OpenError> {
    let path = dir.join(format!("{first:020}.seg"));
    let io = |source| OpenError::Io {
        path: path.clone(),
        source,
    };
    let damaged = |position, reason: &str| OpenError::Damaged {
        path: path.clone(),
        position: Position(position),
        reason: reason.to_owned(),
    };
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .open(&path)
        .map_err(io)?;
    let len = file.metadata().map_err(io)?.len();
    let mut head = [0; HEADER_LEN as usize];
    let got = read_at_most(&file, &mut head, 0).map_err(io)?;
    let segment = Segment {
        first,
        path: path.clone(),
        file,
        extent: RwLock::new(Extent::empty()),
    };
    let Some(header) = Header::decode(&head[..got]) else {
        // A header is synced before the first record is written.
        if next.is_some() || finds_acknowledged(&segment.file, HEADER_LEN, len, 0).map_err(io)? {
            return Err(damaged(first, "the header of its segment is unreadable"));
        }
        fs::remove_file(&path).map_err(io)?;
        return Ok(None);
    };
    if header.first != first || identity.is_some_and(|i| i != header.identity) {
        return Err(damaged(first, "its segment belongs to another log"));
    }
    *identity = Some(header.identity);

    if let Some(next) = next
        && let Some(extent) = read_index(&path, first)
        && extent.count == next - first
        && extent.end <= len
    {
        return Ok(Some(Segment {
            extent: RwLock::new(extent),
            ..segment
        }));
    }
    let mut extent = Extent::empty();
    let walked = segment
        .walk(HEADER_LEN, first, len, |offset, len, record| {
            if next.is_some_and(|next| record.position >= next) {
                return ControlFlow::Break(());
            }
            extent.push(offset, len as u64);
            ControlFlow::Continue(())
        })
        .map_err(io)?;
    if let Some(next) = next {
        if first + extent.count != next {
            let reason = match walked {
                Walk::Bad { reason, .. } => reason,
                _ => "its segment ends before the next one begins",
            };
            return Err(damaged(first + extent.count, reason));
        }
        write_index(&path, first, &extent);
    } else if let Walk::Bad {
        offset,
        position,
        reason,
    } = walked
    {
        if finds_acknowledged(&segment.file, offset, len, position).map_err(io)? {
            return Err(damaged(position, reason));
        }
        segment.file.set_len(offset).map_err(io)?;
    }
    if next.is_none() {
        // A killed process may have written more than it synced. What is read from here on must
        // not be taken back by the loss of power.
        segment.file.sync_all().map_err(io)?;
    }
    Ok(Some(Segment {
        extent: RwLock::new(extent),
        ..segment
    }))
}

/// Whether a record behind the unreadable one at `offset` says that `position` was on disk when
/// it was written itself.
fn finds_acknowledged(file: &File, offset: u64, len: u64, position: u64) -> io::Result<bool> {
    let mut rest = vec![0; len.saturating_sub(offset) as usize];
    let got = read_at_most(file, &mut rest, offset)?;
    let rest = &rest[..got];
    Ok(rest.iter().any(|b| *b != 0)
        && (0..rest.len()).any(|at| {
            matches!(Record::parse(&rest[at..]), Parsed::Record(record, _)
            if record.position > position && record.synced >= position)
        }))
}

const INDEX_MAGIC: &[u8; 8] = b"DAYBKIX\x01";

/// Keeps the extent of a finished segment beside it, so that opening need not read the segment.
/// It can be made again at any time; failing to write it costs time at the next start.
fn write_index(segment: &Path, first: u64, extent: &Extent) {
    let mut out = Vec::with_capacity(36 + extent.marks.len() * 4);
    out.extend_from_slice(INDEX_MAGIC);
    out.extend_from_slice(&first.to_le_bytes());
    out.extend_from_slice(&extent.count.to_le_bytes());
    out.extend_from_slice(&extent.end.to_le_bytes());
    for mark in &extent.marks {
        out.extend_from_slice(&mark.to_le_bytes());
    }
    out.extend_from_slice(&crc32fast::hash(&out).to_le_bytes());
    let path = segment.with_extension("idx");
    if let Err(error) = fs::write(&path, out) {
        tracing::warn!(path = %path.display(), %error, "segment index not written");
        let _ = fs::remove_file(&path);
    }
}

fn read_index(segment: &Path, first: u64) -> Option<Extent> {
    let bytes = fs::read(segment.with_extension("idx")).ok()?;
    let (content, crc) = bytes.split_last_chunk::<4>()?;
    if crc32fast::hash(content) != u32::from_le_bytes(*crc) {
        return None;
    }
    let rest = content.strip_prefix(INDEX_MAGIC)?;
    let (found, rest) = rest.split_first_chunk()?;
    let (count, rest) = rest.split_first_chunk()?;
    let (end, rest) = rest.split_first_chunk()?;
    let (marks, []) = rest.as_chunks::<4>() else {
        return None;
    };
    (u64::from_le_bytes(*found) == first).then(|| Extent {
        count: u64::from_le_bytes(*count),
        end: u64::from_le_bytes(*end),
        marks: marks.iter().map(|m| u32::from_le_bytes(*m)).collect(),
    })
}

/// Why a group of records was not committed.
#[derive(Debug, thiserror::Error)]
pub(super) enum CommitError {
    /// Nothing of the group reached the disk.
    #[error("{what}: {source}")]
    NotWritten {
        what: &'static str,
        source: io::Error,
    },
    /// Some or all of the group may have reached the disk, and may be found there after a crash.
    #[error("{what}: {source}")]
    MaybeWritten {
        what: &'static str,
        source: io::Error,
    },
}

/// The one writer of a log. A group is made with [`Self::push`] and written with
/// [`Self::commit`], or given up with [`Self::clear`].
#[derive(Debug)]
pub(super) struct Appender {
    segments: Arc<Segments>,
    /// `None` after a failed write: the next group goes to a new segment.
    active: Option<Arc<Segment>>,
    allocated: u64,
    /// Last position that is on disk.
    last: u64,
    sync: bool,
    segment_bytes: u64,
    group: Vec<u8>,
    lens: Vec<u32>,
}

impl Appender {
    /// Takes over writing at the end of a log. With `sync` off, a commit is not made durable.
    pub(super) fn new(segments: Arc<Segments>, sync: bool, segment_bytes: u64) -> io::Result<Self> {
        let active = segments.list().last().cloned();
        let allocated = match &active {
            Some(segment) => segment.file.metadata()?.len(),
            None => 0,
        };
        Ok(Self {
            last: segments.last(),
            segments,
            active,
            allocated,
            sync,
            segment_bytes,
            group: Vec::new(),
            lens: Vec::new(),
        })
    }

    /// The position that the next record of the group must have.
    pub(super) fn next(&self) -> u64 {
        self.last + 1 + self.lens.len() as u64
    }

    /// Adds a record to the group; its position is [`Self::next`].
    pub(super) fn push(&mut self, stored_at: i64, id: Uuid, subject: &str, bytes: &[u8]) {
        let position = self.next();
        let before = self.group.len();
        let record = Record {
            position,
            synced: if self.sync { self.last } else { 0 },
            stored_at,
            id,
            subject,
            bytes,
        };
        record.encode(&mut self.group);
        self.lens.push((self.group.len() - before) as u32);
    }

    /// Writes the group and syncs it. Without an error, its records can be read and are on disk.
    /// With one, none of them can be read, and their positions are given to the next group.
    pub(super) fn commit(&mut self) -> Result<(), CommitError> {
        let result = self.try_commit();
        if matches!(result, Err(CommitError::MaybeWritten { .. })) {
            self.active = None;
        }
        self.clear();
        result
    }

    /// Gives the group up.
    pub(super) fn clear(&mut self) {
        self.group.clear();
        self.lens.clear();
        // One huge group must not keep its memory for ever.
        self.group.shrink_to(4 << 20);
    }

    fn try_commit(&mut self) -> Result<(), CommitError> {
        let len = self.group.len() as u64;
        let (segment, end) = self.space_for(len)?;
        let failed = |what| move |source| CommitError::MaybeWritten { what, source };
        segment
            .file
            .write_all_at(&self.group, end)
            .map_err(failed("the log could not be written"))?;
        if self.sync {
            segment
                .file
                .sync_data()
                .map_err(failed("the log could not be synced to disk"))?;
        }
        let mut extent = segment
            .extent
            .write()
            .unwrap_or_else(PoisonError::into_inner);
        let mut offset = end;
        for &len in &self.lens {
            extent.push(offset, len.into());
            offset += u64::from(len);
        }
        self.last += self.lens.len() as u64;
        Ok(())
    }

    /// A segment with room for so many bytes, and where they go.
    fn space_for(&mut self, len: u64) -> Result<(Arc<Segment>, u64), CommitError> {
        let failed = |what| move |source| CommitError::NotWritten { what, source };
        let segment = match &self.active {
            Some(s) if s.extent().count == 0 || s.extent().end + len <= self.segment_bytes => {
                Arc::clone(s)
            }
            _ => self
                .start_segment()
                .map_err(failed("no new segment of the log could be made"))?,
        };
        let end = segment.extent().end;
        if end + len > self.allocated {
            let missing = end + len - self.allocated;
            let step = end.clamp(ALLOCATE_MIN, ALLOCATE_MAX).max(missing);
            let step = match allocate(&segment.file, self.allocated, step) {
                Ok(()) => step,
                Err(_) => {
                    allocate(&segment.file, self.allocated, missing)
                        .map_err(failed("there is no room for the log to grow"))?;
                    missing
                }
            };
            self.allocated += step;
        }
        Ok((segment, end))
    }

    fn start_segment(&mut self) -> io::Result<Arc<Segment>> {
        let first = self.last + 1;
        let old = self.segments.list().last().cloned();
        if let Some(old) = old {
            if old.first == first {
                // Nothing in it counts. A crash from here on finds the log without it.
                self.active = None;
                fs::remove_file(&old.path)?;
                sync_dir(&self.segments.dir)?;
                let mut list = self
                    .segments
                    .list
                    .write()
                    .unwrap_or_else(PoisonError::into_inner);
                list.pop();
            } else {
                finish(&old);
            }
        }
        let dir = &self.segments.dir;
        let path = dir.join(format!("{first:020}.seg"));
        // A leftover of an attempt that failed half-way and could not be cleaned up then.
        if path.exists() {
            fs::remove_file(&path)?;
        }
        let segment = Arc::new(Segment::create(dir, self.segments.identity, first)?);
        let mut list = self
            .segments
            .list
            .write()
            .unwrap_or_else(PoisonError::into_inner);
        list.push(Arc::clone(&segment));
        drop(list);
        self.allocated = ALLOCATE_MIN;
        self.active = Some(Arc::clone(&segment));
        Ok(segment)
    }

    /// Gives back the space that was allocated ahead.
    pub(super) fn close(&mut self) {
        if let Some(segment) = self.active.take() {
            let _ = segment.file.set_len(segment.extent().end);
        }
    }
}

/// Gives back a finished segment's unused space and writes its index.
fn finish(segment: &Segment) {
    let extent = segment.extent();
    if let Err(error) = segment.file.set_len(extent.end) {
        tracing::warn!(path = %segment.path.display(), %error, "segment not cut to its length");
    }
    write_index(&segment.path, segment.first, &extent);
}
