//! Output lines as messages of a stream of their own, with a retention of its own.
//!
//! A message carries the lines of one append, and in headers the numbers of the first and the
//! last of them. A writer takes the next numbers by expecting that the message which it saw last
//! still is the last one of the source; if another writer was faster, it takes the next ones.

use std::collections::{HashMap, VecDeque};
use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use async_nats::HeaderMap;
use async_nats::jetstream::stream::{RawMessageErrorKind, Stream};
use async_trait::async_trait;
use bytes::Bytes;
use daybook_events::lines::{Line, LineLog, LineSource, NewLine};
use daybook_events::log::{Position, ReadError};
use futures_util::StreamExt;
use futures_util::stream::{self, BoxStream};
use uuid::Uuid;

use super::connection::Connection;
use super::leader;
use super::publish::{Outgoing, PublishFailure, Publisher};
use super::pull::{Broken, Pulled, Puller, Wanted};
use super::stream_setup::{self, OpenError, StreamSetup};

/// What every subject of the stream starts with.
const PREFIX: &str = "daybook.log";
const FIRST_LINE: &str = "Daybook-First-Line";
const LAST_LINE: &str = "Daybook-Last-Line";

/// A message has no more bytes of lines than this; servers take one MiB by default.
const MESSAGE_BYTES: usize = 512 * 1024;
/// For how many sources is remembered how they end.
const TIPS_KEPT: usize = 1024;
/// For how many ends of reads is remembered where they were.
const BOOKMARKS_KEPT: usize = 4096;

/// How the stream of lines is to be. How long and how much it keeps is only used when the stream is
/// created, unless these options insist on it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LineOptions {
    /// Name of the stream.
    pub stream: String,
    /// On how many servers each message is kept; 1, 3 or 5.
    pub replicas: usize,
    /// Lines older than this go. A source of which all lines have gone counts from 1 again, unless
    /// whoever wrote them still does.
    pub max_age: Duration,
    /// When all lines together have more bytes, the oldest go; 0 for no bound. JetStream sets as
    /// much aside from what the account may store.
    pub max_bytes: u64,
    /// Whether a stream that is there is changed to keep lines for so long.
    pub insists_age: bool,
    /// Whether a stream that is there is changed to keep so many of them.
    pub insists_bytes: bool,
}

impl Default for LineOptions {
    fn default() -> Self {
        Self {
            stream: "DAYBOOK_LINES".to_owned(),
            replicas: 1,
            max_age: Duration::from_secs(30 * 86_400),
            max_bytes: 1 << 30,
            insists_age: false,
            insists_bytes: false,
        }
    }
}

/// The line log on NATS JetStream.
///
/// Each append of up to 512 KiB is one message and stays together; a larger one is split into
/// several, between which another writer may come.
pub struct JetStreamLines {
    inner: Arc<Inner>,
}

struct Inner {
    connection: Connection,
    stream: Stream<()>,
    name: String,
    publisher: Publisher,
    tips: Tips,
    bookmarks: Mutex<Bookmarks>,
}

impl fmt::Debug for JetStreamLines {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("JetStreamLines")
            .field("stream", &self.inner.name)
            .finish_non_exhaustive()
    }
}

/// How a source ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
struct Tip {
    /// The stream's sequence of its last message, 0 if it has none.
    sequence: u64,
    /// The number of its last line, 0 if it has none.
    line: u64,
}

impl Tip {
    /// The same, but where the retention has removed all of the source's messages, its numbers go
    /// on after those that were known of before.
    fn or_after(self, before: Option<Self>) -> Self {
        match before {
            Some(before) if self.sequence == 0 => Self {
                sequence: 0,
                line: before.line,
            },
            _ => self,
        }
    }
}

impl JetStreamLines {
    /// Opens the line log, creating its stream if there is none.
    pub async fn open(connection: Connection, options: &LineOptions) -> Result<Self, OpenError> {
        let opened = stream_setup::open(&connection, &StreamSetup::lines(options)).await?;
        for note in &opened.notes {
            tracing::info!("{note}");
        }
        Ok(Self {
            inner: Arc::new(Inner {
                publisher: Publisher::new(connection.clone(), opened.stream.clone()),
                connection,
                stream: opened.stream,
                name: options.stream.clone(),
                tips: Tips::default(),
                bookmarks: Mutex::default(),
            }),
        })
    }
}

/// Every subject of the stream.
pub(super) fn all_subjects() -> String {
    format!("{PREFIX}.>")
}

fn subject_of(source: LineSource) -> String {
    format!("{PREFIX}.{source}")
}

impl Inner {
    /// How a source ends, as the stream's leader knows it.
    async fn tip(&self, source: LineSource) -> Result<Tip, ReadError> {
        let last = leader::ask(&self.connection, || {
            let message = self.stream.raw_message_builder();
            message.last_by_subject(subject_of(source)).send()
        });
        match last.await {
            Ok(message) => Ok(Tip {
                sequence: message.sequence,
                line: line_number(&message.headers, LAST_LINE, message.sequence)?,
            }),
            Err(error) if error.kind() == RawMessageErrorKind::NoMessageFound => Ok(Tip::default()),
            Err(error) => Err(ReadError::Unavailable(error.to_string())),
        }
    }

    /// Appends lines that fit into one message.
    async fn append_message(
        &self,
        source: LineSource,
        lines: &EncodedLines,
        known: &mut Option<Tip>,
    ) -> Result<(), ReadError> {
        let id = Uuid::now_v7().to_string();
        // What is known of the source will not be for sure until the append has succeeded.
        let mut known_before = known.take();
        let mut next = known_before;
        loop {
            let tip = match next.take() {
                Some(tip) => tip,
                None => self.tip(source).await?.or_after(known_before),
            };
            known_before = Some(tip);
            let last = tip.line + lines.count;
            let message = Outgoing {
                subject: subject_of(source).into(),
                id: id.clone(),
                expected: Some(tip.sequence),
                content_type: "application/json",
                headers: vec![
                    (FIRST_LINE, (tip.line + 1).to_string()),
                    (LAST_LINE, last.to_string()),
                ],
                payload: lines.json.clone(),
            };
            match self.publisher.publish(&message).await {
                Ok(stored) => {
                    *known = Some(Tip {
                        sequence: stored.sequence,
                        line: last,
                    });
                    return Ok(());
                }
                // Whenever this happens, another writer has got further.
                Err(PublishFailure::Conflict { .. }) => {}
                Err(PublishFailure::TooLarge) => {
                    return Err(ReadError::Invalid(format!(
                        "the NATS servers do not take a message with {} bytes of lines",
                        lines.json.len()
                    )));
                }
                Err(PublishFailure::Hopeless(reason)) => return Err(ReadError::Invalid(reason)),
                Err(PublishFailure::Refused(reason) | PublishFailure::Unknown(reason)) => {
                    return Err(ReadError::Unavailable(reason));
                }
            }
        }
    }
}

#[async_trait]
impl LineLog for JetStreamLines {
    async fn append(&self, source: LineSource, lines: Vec<NewLine>) -> Result<u64, ReadError> {
        let tip = self.inner.tips.of(source);
        // One append after the other here saves conflicts; other processes are found out.
        let mut tip = tip.lock().await;
        for message in encode(&lines)? {
            self.inner
                .append_message(source, &message, &mut tip)
                .await?;
        }
        match *tip {
            Some(tip) => Ok(tip.line),
            None => Ok(self.inner.tip(source).await?.line),
        }
    }

    async fn read(
        &self,
        source: LineSource,
        after: u64,
        limit: usize,
    ) -> Result<Vec<Line>, ReadError> {
        let end = self.inner.tip(source).await?.line;
        if after >= end || limit == 0 {
            return Ok(Vec::new());
        }
        let mut cursor = LineCursor::new(self.inner.clone(), source, after);
        let mut lines = Vec::new();
        loop {
            let next =
                tokio::time::timeout(3 * self.inner.connection.answer_timeout(), cursor.next());
            let line = next.await.map_err(|_| {
                ReadError::Unavailable("NATS does not deliver the lines that it has".to_owned())
            })??;
            let number = line.seq;
            lines.push(line);
            if lines.len() >= limit || number >= end {
                break;
            }
        }
        cursor.remember();
        Ok(lines)
    }

    async fn follow(
        &self,
        source: LineSource,
        after: u64,
    ) -> Result<BoxStream<'static, Result<Line, ReadError>>, ReadError> {
        let cursor = LineCursor::new(self.inner.clone(), source, after);
        let lines = stream::unfold(Some(cursor), |cursor| async move {
            let mut cursor = cursor?;
            match cursor.next().await {
                Ok(line) => Some((Ok(line), Some(cursor))),
                Err(error) => Some((Err(error), None)),
            }
        });
        Ok(lines.boxed())
    }

    async fn last(&self, source: LineSource) -> Result<u64, ReadError> {
        Ok(self.inner.tip(source).await?.line)
    }
}

/// Lines on their way into one message.
struct EncodedLines {
    json: Bytes,
    count: u64,
}

/// Encodes lines as JSON arrays, none of which is larger than a message may be.
fn encode(lines: &[NewLine]) -> Result<Vec<EncodedLines>, ReadError> {
    let mut messages = Vec::new();
    let mut json = Vec::new();
    let mut count = 0;
    let mut finish = |json: &mut Vec<u8>, count: &mut u64| {
        if *count > 0 {
            json.push(b']');
            messages.push(EncodedLines {
                json: Bytes::from(std::mem::take(json)),
                count: std::mem::take(count),
            });
        }
    };
    for line in lines {
        let line = serde_json::to_vec(line)
            .map_err(|error| ReadError::Invalid(format!("a line cannot be encoded: {error}")))?;
        if json.len() + line.len() + 2 > MESSAGE_BYTES {
            finish(&mut json, &mut count);
        }
        json.push(if count == 0 { b'[' } else { b',' });
        json.extend_from_slice(&line);
        count += 1;
    }
    finish(&mut json, &mut count);
    Ok(messages)
}

/// The lines of one message, numbered.
fn decode(pulled: &Pulled) -> Result<Vec<Line>, ReadError> {
    let headers = pulled.message.headers.as_ref();
    let first = headers
        .ok_or_else(|| damaged(pulled.sequence, "it has no headers"))
        .and_then(|headers| line_number(headers, FIRST_LINE, pulled.sequence))?;
    let lines: Vec<NewLine> = serde_json::from_slice(&pulled.message.payload)
        .map_err(|error| damaged(pulled.sequence, &error.to_string()))?;
    let numbered = (first..).zip(lines);
    Ok(numbered.map(|(seq, line)| Line { seq, line }).collect())
}

fn line_number(headers: &HeaderMap, name: &str, sequence: u64) -> Result<u64, ReadError> {
    headers
        .get(name)
        .and_then(|value| value.as_str().parse().ok())
        .ok_or_else(|| damaged(sequence, &format!("it has no header {name}")))
}

fn damaged(sequence: u64, reason: &str) -> ReadError {
    ReadError::Damaged {
        position: Position(sequence),
        reason: format!("a message of output lines cannot be read: {reason}"),
    }
}

/// A place in a source from which lines are read one after the other.
struct LineCursor {
    log: Arc<Inner>,
    source: LineSource,
    /// The last line that was handed out.
    line: u64,
    /// The last message that was taken from the stream, or one before everything wanted.
    sequence: u64,
    /// Lines of that message that were not handed out yet.
    ready: VecDeque<Line>,
    puller: Option<Puller>,
    pause: Duration,
}

impl LineCursor {
    fn new(log: Arc<Inner>, source: LineSource, after: u64) -> Self {
        let sequence = lock(&log.bookmarks).find(source, after);
        Self {
            log,
            source,
            line: after,
            sequence,
            ready: VecDeque::new(),
            puller: None,
            pause: Duration::ZERO,
        }
    }

    /// The next line, whenever it comes.
    async fn next(&mut self) -> Result<Line, ReadError> {
        loop {
            while let Some(line) = self.ready.pop_front() {
                if line.seq > self.line {
                    self.line = line.seq;
                    return Ok(line);
                }
            }
            match self.pull().await {
                Ok(pulled) => {
                    self.pause = Duration::ZERO;
                    self.sequence = pulled.sequence;
                    self.ready = decode(&pulled)?.into();
                }
                Err(Broken(reason)) => {
                    tracing::debug!(reason, source = %self.source, "reading lines again");
                    self.puller = None;
                    tokio::time::sleep(self.pause).await;
                    self.pause =
                        (self.pause * 2).clamp(Duration::from_millis(20), Duration::from_secs(1));
                }
            }
        }
    }

    async fn pull(&mut self) -> Result<Pulled, Broken> {
        let puller = match &mut self.puller {
            Some(puller) => puller,
            None => {
                let wanted = Wanted {
                    after: self.sequence,
                    filter: subject_of(self.source),
                    limit: None,
                    largest: MESSAGE_BYTES,
                };
                let log = &self.log;
                let puller = Puller::open(&log.connection, &log.stream, &log.name, &wanted).await?;
                self.puller.insert(puller)
            }
        };
        puller.next().await
    }

    /// Remembers where this reader stopped, for one that goes on from there.
    fn remember(&self) {
        let sequence = if self.ready.is_empty() {
            self.sequence
        } else {
            // The rest of this message is still wanted.
            self.sequence - 1
        };
        lock(&self.log.bookmarks).keep(self.source, self.line, sequence);
    }
}

/// For sources that were written to here, how they end.
#[derive(Default)]
struct Tips {
    known: Mutex<HashMap<LineSource, SharedTip>>,
}

/// `None` if it has to be looked up.
type SharedTip = Arc<tokio::sync::Mutex<Option<Tip>>>;

impl Tips {
    fn of(&self, source: LineSource) -> SharedTip {
        let mut known = lock(&self.known);
        if known.len() >= TIPS_KEPT && !known.contains_key(&source) {
            known.retain(|_, tip| Arc::strong_count(tip) > 1);
        }
        known.entry(source).or_default().clone()
    }
}

/// Where recent reads ended, so that the next page need not be searched from the beginning.
#[derive(Default)]
struct Bookmarks {
    places: HashMap<(LineSource, u64), u64>,
    oldest_first: VecDeque<(LineSource, u64)>,
}

impl Bookmarks {
    /// A sequence of the stream after which the lines after this one are.
    fn find(&self, source: LineSource, line: u64) -> u64 {
        self.places.get(&(source, line)).copied().unwrap_or(0)
    }

    fn keep(&mut self, source: LineSource, line: u64, sequence: u64) {
        let key = (source, line);
        if self.places.insert(key, sequence).is_none() {
            self.oldest_first.push_back(key);
        }
        while self.oldest_first.len() > BOOKMARKS_KEPT {
            if let Some(oldest) = self.oldest_first.pop_front() {
                self.places.remove(&oldest);
            }
        }
    }
}

/// Nothing in here can be left half-changed by a panic.
fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;
    use daybook_events::lines::LineKind;
    use daybook_events::names::BuildId;

    fn line(text: String) -> NewLine {
        NewLine {
            time: jiff::Timestamp::UNIX_EPOCH,
            kind: LineKind::Build,
            cluster: None,
            instance: None,
            text,
        }
    }

    #[test]
    fn lines_are_split_into_messages_that_servers_take() {
        let lines: Vec<NewLine> = (0..100)
            .map(|n| line(format!("{n} {}", "x".repeat(16_000))))
            .collect();
        let messages = encode(&lines).unwrap();
        assert!(messages.len() > 1);
        let mut decoded: Vec<NewLine> = Vec::new();
        for message in &messages {
            assert!(message.json.len() <= MESSAGE_BYTES);
            let lines: Vec<NewLine> = serde_json::from_slice(&message.json).unwrap();
            assert_eq!(lines.len() as u64, message.count);
            decoded.extend(lines);
        }
        assert_eq!(decoded, lines);
        assert!(encode(&[]).unwrap().is_empty());
    }

    #[test]
    fn what_is_remembered_is_bounded() {
        let source = LineSource::Build(BuildId(Uuid::nil()));
        let mut bookmarks = Bookmarks::default();
        for line in 0..3 * BOOKMARKS_KEPT as u64 {
            bookmarks.keep(source, line, line + 1);
        }
        assert_eq!(bookmarks.places.len(), BOOKMARKS_KEPT);
        assert_eq!(bookmarks.find(source, 0), 0);
        let newest = 3 * BOOKMARKS_KEPT as u64 - 1;
        assert_eq!(bookmarks.find(source, newest), newest + 1);

        let tips = Tips::default();
        let held = tips.of(source);
        for _ in 0..3 * TIPS_KEPT {
            tips.of(LineSource::Build(BuildId(Uuid::now_v7())));
        }
        assert!(lock(&tips.known).len() <= TIPS_KEPT);
        assert!(Arc::ptr_eq(&held, &tips.of(source)));
    }
}
