//! What instances print, from files into the line log: each line once.
//!
//! A process writes to a file, so that it neither blocks nor dies with Daybook. How far a file
//! has been read is kept beside it. Before lines are appended to the line log, it is noted which
//! ones they are; if Daybook dies, or the answer gets lost, the line log itself tells whether
//! they have arrived. What was read is cut out of the file, so that a file that grows for months
//! takes no space on disk.

use std::borrow::Cow;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use daybook_events::lines::{LineKind, LineLog, LineSource, NewLine};
use daybook_events::log::ReadError;
use daybook_events::{ClusterName, ProjectName};
use daybook_secrets::{MASK, Masker, PATTERN_MAX, SecretError, SecretStore};
use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use super::state_file;

/// The longest line, in bytes, with the note that it was cut.
const MAX_LINE: usize = 16 * 1024;
const CUT: &str = " [cut: the line is longer than 16 KiB]";
/// What a secret is overwritten with, behind [`MASK`].
const FILLER: u8 = 0;
/// Read at once.
const CHUNK: usize = 256 * 1024;
/// Output that waits longer than this much more output is dropped, and a line says so.
const MAX_BACKLOG: u64 = 64 * 1024 * 1024;
/// How much is read before it is cut out of the file.
const PUNCH: u64 = 1024 * 1024;
const EAGER: Duration = Duration::from_millis(10);
const PATIENT: Duration = Duration::from_millis(250);
const RETRY: Duration = Duration::from_secs(2);

/// The file of an instance's n-th run.
pub(super) fn file(dir: &Path, run: u64) -> PathBuf {
    dir.join(format!("output-{run}.log"))
}

/// The last lines of a file, joined into one, for a message.
pub(super) fn last_lines(path: &Path, masker: &Masker) -> io::Result<String> {
    const LINES: usize = 4;
    const BYTES: u64 = 2048;
    let file = File::open(path)?;
    let length = file.metadata()?.len();
    let mut end = vec![0; usize::try_from(length.min(BYTES)).unwrap_or(0)];
    file.read_exact_at(&mut end, length.saturating_sub(BYTES))?;
    let text = String::from_utf8_lossy(&end);
    let text = without_filler(&text);
    // It may begin in the middle of a secret.
    let text = if length > BYTES {
        masker.mask_end(&text)
    } else {
        masker.mask(&text)
    };
    let lines: Vec<&str> = text
        .lines()
        .map(|l| l.trim_matches(|c: char| c.is_control() || c.is_whitespace()))
        .filter(|l| !l.is_empty())
        .collect();
    let last = &lines[lines.len().saturating_sub(LINES)..];
    let mut joined = last.join(" | ");
    if joined.len() > 500 {
        let from = joined.ceil_char_boundary(joined.len() - 500);
        joined.replace_range(..from, "…");
    }
    Ok(joined)
}

/// Which runs of an instance there are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct Runs {
    /// The number of the newest; 0 if there was none.
    pub(super) newest: u64,
    /// Whether its process and all of its children are gone.
    pub(super) ended: bool,
}

/// How far the output of an instance has been read.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, Default)]
struct Mark {
    /// The run that is being read.
    run: u64,
    /// How many bytes of its file are done.
    offset: u64,
    /// Whether the rest of a line that was cut comes next.
    #[serde(default)]
    in_cut: bool,
    /// Number of a line in the line log, after which lines of this instance are from `pending`.
    #[serde(default)]
    after: Option<u64>,
    /// What is being appended.
    #[serde(default)]
    pending: Option<Pending>,
}

/// Bytes after [`Mark::offset`] whose lines are on their way to the line log.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Pending {
    bytes: u64,
    in_cut: bool,
    lines: usize,
    /// They are not appended; a line says how many they were.
    #[serde(default)]
    dropped: bool,
}

/// Carries the output of one instance, over all its runs.
#[derive(Debug)]
pub(super) struct Output {
    pub(super) dir: PathBuf,
    pub(super) lines: Arc<dyn LineLog>,
    pub(super) secrets: Arc<dyn SecretStore>,
    pub(super) project: ProjectName,
    pub(super) source: LineSource,
    pub(super) cluster: ClusterName,
    pub(super) instance: String,
}

impl Output {
    /// Carries lines until all runs have ended and the sender of `runs` is gone, or until `leave`
    /// is cancelled. What is just being appended then is waited for, so that it is known where
    /// the next one goes on. `done` tells the newest run whose lines have all arrived.
    pub(super) async fn carry(
        self,
        mut runs: watch::Receiver<Runs>,
        done: watch::Sender<u64>,
        leave: CancellationToken,
    ) {
        let mut mark = self.read_mark();
        let mut pause = EAGER;
        let mut open = true;
        while !leave.is_cancelled() {
            // Looked at before the file is, so that nothing printed before the end is missed.
            let known = *runs.borrow_and_update();
            if mark.run == 0 && known.newest > 0 {
                mark.run = 1;
            }
            let complete = mark.run < known.newest || known.ended;
            match self.forward(&mut mark, complete).await {
                Ok(true) => {
                    pause = EAGER;
                    tokio::task::yield_now().await;
                    continue;
                }
                Ok(false) => {}
                Err(error) => {
                    let instance = &self.instance;
                    tracing::warn!(instance, %error, "output cannot be carried; trying again");
                    leave.run_until_cancelled(tokio::time::sleep(RETRY)).await;
                    continue;
                }
            }
            if mark.run < known.newest {
                self.next_run(&mut mark);
            } else if complete {
                done.send_replace(mark.run);
                if !open {
                    return;
                }
                let changed = leave.run_until_cancelled(runs.changed()).await;
                open = changed.is_some_and(|c| c.is_ok());
            } else {
                pause = (pause * 2).min(PATIENT);
                tokio::select! {
                    () = leave.cancelled() => {}
                    () = tokio::time::sleep(pause) => {}
                    changed = runs.changed(), if open => open = changed.is_ok(),
                }
            }
        }
    }

    /// All of a run has been carried, and another one has begun.
    fn next_run(&self, mark: &mut Mark) {
        let done = mark.run;
        *mark = Mark {
            run: done + 1,
            after: mark.after,
            ..Mark::default()
        };
        self.save(mark);
        if let Err(error) = state_file::remove(&file(&self.dir, done)) {
            tracing::warn!(%error, "a file of old output stays behind");
        }
    }

    /// Appends the next lines, if there are any. `complete` says that nothing more will be
    /// written to the file, so that a last line needs no end.
    async fn forward(&self, mark: &mut Mark, complete: bool) -> Result<bool, Forward> {
        let path = file(&self.dir, mark.run);
        let file = match File::options().read(true).write(true).open(&path) {
            Ok(file) => file,
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(false),
            Err(e) => return Err(e.into()),
        };
        let mut first_try = false;
        if mark.pending.is_none() {
            let waiting = file.metadata()?.len().saturating_sub(mark.offset);
            let pending = if waiting > MAX_BACKLOG {
                Pending {
                    bytes: waiting - MAX_BACKLOG / 2,
                    in_cut: true,
                    lines: 1,
                    dropped: true,
                }
            } else {
                self.overwrite_secrets(&file, mark.offset)?;
                let chunk = read_chunk(&file, mark.offset, CHUNK)?;
                let at_end = chunk.len() < CHUNK;
                let parsed = parse(&chunk, mark.in_cut, complete && at_end);
                if parsed.bytes == 0 {
                    return Ok(false);
                }
                Pending {
                    bytes: parsed.bytes as u64,
                    in_cut: parsed.in_cut,
                    lines: parsed.lines.len(),
                    dropped: false,
                }
            };
            if mark.after.is_none() {
                mark.after = Some(self.lines.last(self.source).await?);
            }
            mark.pending = Some(pending);
            self.save(mark);
            first_try = true;
        }
        let (Some(pending), Some(after)) = (mark.pending.clone(), mark.after) else {
            return Ok(false);
        };
        let arrived = if first_try {
            0
        } else {
            self.count_after(after).await?
        };
        if arrived < pending.lines {
            let texts = self.texts(&file, mark, &pending)?;
            let new = texts
                .into_iter()
                .skip(arrived)
                .map(|t| self.line(t))
                .collect();
            let last = self.lines.append(self.source, new).await?;
            mark.after = Some(last);
        } else {
            mark.after = Some(self.lines.last(self.source).await?);
        }
        let before = mark.offset;
        mark.offset += pending.bytes;
        mark.in_cut = pending.in_cut;
        mark.pending = None;
        self.save(mark);
        if before / PUNCH != mark.offset / PUNCH {
            cut_out(&file, mark.offset);
        }
        Ok(true)
    }

    /// Puts marks in the place of secrets in what is read next. The file keeps its length, so that
    /// lines stay where they are.
    fn overwrite_secrets(&self, file: &File, offset: u64) -> Result<(), Forward> {
        let masker = self.secrets.masker(Some(&self.project))?;
        // A secret may begin in one chunk and end in the next.
        let chunk = read_chunk(file, offset, CHUNK + PATTERN_MAX)?;
        let found = masker.find(&chunk).ok_or(Forward::Unchecked)?;
        for range in found {
            let mut mark = vec![FILLER; range.len()];
            mark[..MASK.len()].copy_from_slice(MASK.as_bytes());
            file.write_all_at(&mark, offset + range.start as u64)?;
        }
        Ok(())
    }

    /// The lines of `pending`, the same each time.
    fn texts(&self, file: &File, mark: &Mark, pending: &Pending) -> io::Result<Vec<String>> {
        if pending.dropped {
            let bytes = pending.bytes;
            return Ok(vec![format!(
                "[{bytes} bytes of output were dropped: they came faster than they could be kept]"
            )]);
        }
        let length = usize::try_from(pending.bytes).unwrap_or(CHUNK);
        let chunk = read_chunk(file, mark.offset, length)?;
        Ok(parse(&chunk, mark.in_cut, !pending.in_cut).lines)
    }

    /// How many lines of this instance stand in the line log after a number.
    async fn count_after(&self, mut after: u64) -> Result<usize, ReadError> {
        const PAGE: usize = 1000;
        let mut count = 0;
        loop {
            let page = self.lines.read(self.source, after, PAGE).await?;
            count += page
                .iter()
                .filter(|l| {
                    l.line.kind == LineKind::Container
                        && l.line.cluster.as_ref() == Some(&self.cluster)
                        && l.line.instance.as_deref() == Some(&self.instance)
                })
                .count();
            match page.last() {
                Some(last) if page.len() == PAGE => after = last.seq,
                _ => return Ok(count),
            }
        }
    }

    fn line(&self, text: String) -> NewLine {
        NewLine {
            time: Timestamp::now(),
            kind: LineKind::Container,
            cluster: Some(self.cluster.clone()),
            instance: Some(self.instance.clone()),
            text,
        }
    }

    fn read_mark(&self) -> Mark {
        match state_file::read(&self.mark_path()) {
            Ok(mark) => mark.unwrap_or_default(),
            Err(error) => {
                let instance = &self.instance;
                tracing::error!(instance, %error, "it is unknown which output was carried; all is carried again");
                Mark::default()
            }
        }
    }

    fn save(&self, mark: &Mark) {
        if let Err(error) = state_file::write_lazily(&self.mark_path(), mark) {
            let instance = &self.instance;
            tracing::warn!(instance, %error, "lines may be repeated after a restart");
        }
    }

    fn mark_path(&self) -> PathBuf {
        self.dir.join("tail.json")
    }
}

/// Why nothing was carried. Waiting may help.
#[derive(Debug, thiserror::Error)]
enum Forward {
    #[error("the file cannot be read: {0}")]
    File(#[from] io::Error),
    #[error(transparent)]
    Lines(#[from] ReadError),
    #[error("secrets in it cannot be masked: {}", .0.to_line())]
    Secrets(#[from] SecretError),
    #[error("secrets in it cannot be masked: there are too many")]
    Unchecked,
}

fn read_chunk(file: &File, offset: u64, length: usize) -> io::Result<Vec<u8>> {
    let mut chunk = vec![0; length];
    let mut filled = 0;
    while filled < length {
        match file.read_at(&mut chunk[filled..], offset + filled as u64)? {
            0 => break,
            n => filled += n,
        }
    }
    chunk.truncate(filled);
    Ok(chunk)
}

#[derive(Debug, PartialEq, Eq)]
struct Parsed {
    lines: Vec<String>,
    /// How many bytes they took, with their ends.
    bytes: usize,
    /// Whether the rest of a cut line is still to come.
    in_cut: bool,
}

/// Splits a chunk into lines. An unfinished last line is left for later unless `complete`, or
/// unless it is too long already.
fn parse(chunk: &[u8], mut in_cut: bool, complete: bool) -> Parsed {
    let mut lines = Vec::new();
    let mut bytes = 0;
    while bytes < chunk.len() {
        let rest = &chunk[bytes..];
        let (line, length, ended) = match rest.iter().position(|b| *b == b'\n') {
            Some(end) => (&rest[..end], end + 1, true),
            None => (rest, rest.len(), false),
        };
        let too_long = line.len() > MAX_LINE;
        if !ended && !complete && !too_long && !in_cut {
            break;
        }
        if !in_cut {
            lines.push(text_of(line));
        }
        in_cut = !ended && (in_cut || !complete);
        bytes += length;
    }
    Parsed {
        lines,
        bytes,
        in_cut,
    }
}

fn text_of(line: &[u8]) -> String {
    let line = line.strip_suffix(b"\r").unwrap_or(line);
    // Enough to know that it is too long, however it is written.
    let shown = &line[..line.len().min(MAX_LINE + 4)];
    let mut text = String::from_utf8_lossy(shown).into_owned();
    if text.len() > MAX_LINE {
        text.truncate(text.floor_char_boundary(MAX_LINE - CUT.len()));
        text.push_str(CUT);
    }
    match without_filler(&text) {
        Cow::Owned(without) => without,
        Cow::Borrowed(_) => text,
    }
}

/// A text without what fills up the place of a secret behind its mark.
fn without_filler(text: &str) -> Cow<'_, str> {
    const FILLED: &str = "***\0";
    if !text.contains(FILLED) {
        return Cow::Borrowed(text);
    }
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(at) = rest.find(FILLED) {
        let (shown, filled) = rest.split_at(at + MASK.len());
        out.push_str(shown);
        rest = filled.trim_start_matches(char::from(FILLER));
    }
    out.push_str(rest);
    Cow::Owned(out)
}

/// Gives the space of what was read back to the file system, where it can do that.
fn cut_out(file: &File, until: u64) {
    #[cfg(target_os = "linux")]
    {
        use rustix::fs::{FallocateFlags, fallocate};
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        // A file system that cannot do it keeps the bytes until the run ends.
        let _ = fallocate(file, flags, 0, until & !4095);
    }
    #[cfg(not(target_os = "linux"))]
    let _ = (file, until);
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn lines(chunk: &[u8], in_cut: bool, complete: bool) -> (Vec<String>, usize, bool) {
        let parsed = parse(chunk, in_cut, complete);
        (parsed.lines, parsed.bytes, parsed.in_cut)
    }

    #[test]
    fn a_secret_leaves_a_mark_that_does_not_tell_its_length() {
        for (line, text) in [
            ("a ***\0\0\0 b ***\0", "a *** b ***"),
            ("***\0\0", "***"),
            ("*** \0 ****", "*** \0 ****"),
        ] {
            assert_eq!(text_of(line.as_bytes()), text);
        }
    }

    #[test]
    fn an_unfinished_line_waits_for_its_end() {
        let two = |a: &str, b: &str| vec![a.to_owned(), b.to_owned()];
        assert_eq!(lines(b"a\r\nb\nc", false, false), (two("a", "b"), 5, false));
        assert_eq!(lines(b"\nc", false, true), (two("", "c"), 2, false));
        assert_eq!(
            lines(b"\xff", false, true),
            (vec!["\u{fffd}".into()], 1, false)
        );
    }

    #[test]
    fn a_line_that_is_too_long_is_cut_once() {
        let long = vec![b'x'; MAX_LINE + 1];
        let (cut, bytes, in_cut) = lines(&long, false, false);
        assert_eq!((cut.len(), bytes, in_cut), (1, MAX_LINE + 1, true));
        assert!(cut[0].ends_with(CUT));
        assert_eq!(cut[0].len(), MAX_LINE);
        assert_eq!(lines(b"xxx", true, false), (vec![], 3, true));
        assert_eq!(
            lines(b"xx\nnext\n", true, false),
            (vec!["next".into()], 8, false)
        );
        let broad = "ä".repeat(MAX_LINE);
        assert!(text_of(broad.as_bytes()).len() <= MAX_LINE);
    }

    #[test]
    fn what_was_parsed_once_is_parsed_again_alike() {
        let mut text = b"one\ntwo\n".to_vec();
        text.extend(vec![b'y'; 3 * MAX_LINE]);
        for complete in [false, true] {
            let first = parse(&text, false, complete);
            let again = parse(&text[..first.bytes], false, !first.in_cut);
            assert_eq!(first, again);
        }
    }

    #[test]
    fn the_last_lines_fit_a_message() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x");
        std::fs::write(&path, "a\n\nb\nc\nd\r\ne\n").unwrap();
        assert_eq!(
            last_lines(&path, &Masker::default()).unwrap(),
            "b | c | d | e"
        );
        std::fs::write(&path, "ä".repeat(5000)).unwrap();
        let cut = last_lines(&path, &Masker::default()).unwrap();
        assert!(cut.starts_with('…') && cut.len() <= 504);
    }

    /// More output than can be kept: the oldest is dropped, a line says so, and what was read
    /// takes no space on disk.
    #[tokio::test]
    async fn output_without_end_is_bounded() {
        use std::os::unix::fs::MetadataExt;

        let dir = tempfile::tempdir().unwrap();
        let lines = daybook_store::embedded::EmbeddedLines::open(
            dir.path().join("lines"),
            daybook_store::embedded::LineRetention::default(),
        );
        let lines: Arc<dyn LineLog> = Arc::new(lines.await.unwrap());
        let written = File::create(file(dir.path(), 1)).unwrap();
        let line = format!("{}\n", "x".repeat(8191));
        let length = MAX_BACKLOG + (16 << 20);
        for n in 0..length / line.len() as u64 {
            written
                .write_all_at(line.as_bytes(), n * line.len() as u64)
                .unwrap();
        }
        written.write_all_at(b"last\n", length).unwrap();
        let id = daybook_events::DeploymentId(uuid::Uuid::now_v7());
        let output = Output {
            dir: dir.path().into(),
            lines: lines.clone(),
            secrets: Arc::new(daybook_secrets::NoSecrets),
            project: ProjectName::parse("shop").unwrap(),
            source: LineSource::Deployment(id),
            cluster: ClusterName::parse("one").unwrap(),
            instance: "web-0".into(),
        };
        let (runs, known) = watch::channel(Runs {
            newest: 1,
            ended: false,
        });
        let (done, mut carried) = watch::channel(0);
        let leave = CancellationToken::new();
        let task = tokio::spawn(output.carry(known, done, leave));
        runs.send_replace(Runs {
            newest: 1,
            ended: true,
        });
        carried.wait_for(|n| *n == 1).await.unwrap();
        let all = lines
            .read(LineSource::Deployment(id), 0, 100_000)
            .await
            .unwrap();
        assert!(all[0].line.text.contains("bytes of output were dropped"));
        assert_eq!(all.last().unwrap().line.text, "last");
        let kept = MAX_BACKLOG / 2 / line.len() as u64;
        assert!(
            (kept - 2..=kept + 2).contains(&(all.len() as u64 - 2)),
            "{}",
            all.len()
        );
        let blocks = written.metadata().unwrap().blocks() * 512;
        assert!(blocks < 2 * PUNCH, "{blocks} bytes on disk");
        drop(runs);
        task.await.unwrap();
    }
}
