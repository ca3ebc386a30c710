//! Follows what the container of one pod prints, over all its runs.

use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use daybook_events::ClusterName;
use daybook_events::lines::{LineKind, LineLog, LineSource, NewLine};
use daybook_events::log::ReadError;
use futures_util::{AsyncBufRead, AsyncBufReadExt as _};
use jiff::{SignedDuration, Timestamp};
use k8s_openapi::api::core::v1::{ContainerStatus, Pod};
use kube::api::LogParams;
use kube::{Api, Client};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

/// The longest line, in bytes, with the note that it was cut.
const MAX_LINE: usize = 16 * 1024;
const CUT: &str = " [cut: the line is longer than 16 KiB]";
/// So many lines are appended at once,
const BATCH: usize = 256;
/// and so long it is waited for more of them.
const GATHER: Duration = Duration::from_millis(20);
/// Between two tries, at first and at most.
const PAUSE_MIN: Duration = Duration::from_millis(250);
const PAUSE_MAX: Duration = Duration::from_secs(10);
/// What a pod that is gone may still have to say is waited for so long.
const LAST_WORDS: Duration = Duration::from_secs(5);
/// A page of the line log.
const PAGE: u64 = 1000;

/// The container of a pod, as far as its output goes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Container {
    /// Its name.
    name: String,
    /// Whether it runs or has run.
    has_begun: bool,
    /// How often it was restarted.
    restarts: i32,
}

impl Container {
    /// The one of the service; others may have been put beside it.
    pub(super) fn of(pod: &Pod, service: &str) -> Self {
        let statuses = pod.status.iter();
        let mut statuses = statuses.flat_map(|s| s.container_statuses.iter().flatten());
        let status = statuses.find(|s| s.name == service);
        let begun = |s: &ContainerStatus| {
            let (now, last) = (s.state.as_ref(), s.last_state.as_ref());
            now.is_some_and(|s| s.running.is_some() || s.terminated.is_some())
                || last.is_some_and(|s| s.terminated.is_some())
        };
        Self {
            name: service.to_owned(),
            has_begun: status.is_some_and(begun),
            restarts: status.map_or(0, |s| s.restart_count),
        }
    }
}

/// Carries the output of one pod.
pub(super) struct Follower {
    pub(super) client: Client,
    pub(super) lines: Arc<dyn LineLog>,
    pub(super) source: LineSource,
    pub(super) cluster: ClusterName,
    pub(super) namespace: String,
    pub(super) pod: String,
    pub(super) container: watch::Receiver<Container>,
    pub(super) cancel: CancellationToken,
}

/// Why output is not carried for now.
#[derive(Debug, thiserror::Error)]
enum Interrupted {
    #[error("the API server does not hand it out")]
    Api(#[from] kube::Error),
    #[error("the connection was cut")]
    Connection(#[from] std::io::Error),
    #[error("it cannot be kept")]
    Lines(#[from] ReadError),
}

impl Follower {
    /// Carries lines until the pod is gone and all of them are there, or until it is cancelled.
    pub(super) async fn run(mut self) {
        let cancel = self.cancel.clone();
        tokio::select! {
            () = cancel.cancelled() => {}
            () = self.carry() => {}
        }
    }

    async fn carry(&mut self) {
        if self.container.wait_for(|c| c.has_begun).await.is_err() {
            return;
        }
        let mut pause = PAUSE_MIN;
        let mut after = loop {
            match self.last_carried().await {
                Ok(after) => break after,
                Err(error) => self.hold(&error.into(), &mut pause).await,
            }
        };
        // The run before is asked for its last lines whenever they may be missing: at the beginning,
        // after a cut, when it is known to have ended.
        let mut read_until = None;
        loop {
            let restarts = self.container.borrow_and_update().restarts;
            let before = after;
            let outcome = self.read(read_until != Some(restarts), &mut after).await;
            let is_gone = self.container.has_changed().is_err();
            match outcome {
                Ok(()) => read_until = Some(restarts),
                Err(error) if is_gone => {
                    tracing::debug!(pod = self.pod, %error, "the last output of a pod is lost");
                }
                Err(error) => {
                    read_until = None;
                    self.hold(&error, &mut pause).await;
                }
            }
            if is_gone {
                return;
            }
            if after > before {
                pause = PAUSE_MIN;
            }
            // It has ended, or the API server ended the stream: the next run may have begun.
            tokio::select! {
                changed = self.container.changed() => {
                    if changed.is_err() {
                        tracing::debug!(pod = self.pod, "all output of a pod is carried");
                        return;
                    }
                }
                () = tokio::time::sleep(pause) => {}
            }
            pause = (pause * 2).min(PAUSE_MAX);
        }
    }

    async fn hold(&self, error: &Interrupted, pause: &mut Duration) {
        let why = crate::error::said(error);
        tracing::debug!(pod = self.pod, why, "output is not carried; trying again");
        tokio::time::sleep(*pause).await;
        *pause = (*pause * 2).min(PAUSE_MAX);
    }

    /// Reads what was printed after a time, and what comes, until the run ends.
    async fn read(
        &mut self,
        with_previous: bool,
        after: &mut Option<Timestamp>,
    ) -> Result<(), Interrupted> {
        if with_previous {
            match self.stream(true, after).await {
                // It is not kept for ever.
                Err(Interrupted::Api(kube::Error::Api(status))) if status.code < 500 => {}
                other => other?,
            }
        }
        let mut container = self.container.clone();
        let gone = async {
            while container.changed().await.is_ok() {}
            tokio::time::sleep(LAST_WORDS).await;
        };
        tokio::select! {
            read = self.stream(false, after) => read,
            () = gone => Ok(()),
        }
    }

    async fn stream(
        &self,
        previous: bool,
        after: &mut Option<Timestamp>,
    ) -> Result<(), Interrupted> {
        let api: Api<Pod> = Api::namespaced(self.client.clone(), &self.namespace);
        let name = self.container.borrow().name.clone();
        let params = LogParams {
            container: Some(name),
            follow: !previous,
            previous,
            since_time: after.map(since),
            timestamps: true,
            ..LogParams::default()
        };
        // What comes later in the same stream is new, whatever its time: two lines may have the same.
        let carried = *after;
        let mut stream = Box::pin(api.log_stream(&self.pod, &params).await?);
        let mut batch = Vec::new();
        loop {
            let next = read_line(&mut stream);
            let line = if batch.is_empty() {
                next.await?
            } else if batch.len() >= BATCH {
                self.append(&mut batch, after).await?;
                continue;
            } else {
                let mut next = std::pin::pin!(next);
                match tokio::time::timeout(GATHER, &mut next).await {
                    Ok(line) => line?,
                    Err(_) => {
                        self.append(&mut batch, after).await?;
                        // Never dropped half-read.
                        next.await?
                    }
                }
            };
            let Some(line) = line else {
                return self.append(&mut batch, after).await;
            };
            if let Some((time, text)) = parse(&line)
                && carried.is_none_or(|carried| time > carried)
            {
                batch.push(NewLine {
                    time,
                    kind: LineKind::Container,
                    cluster: Some(self.cluster.clone()),
                    instance: Some(self.pod.clone()),
                    text,
                });
            }
        }
    }

    async fn append(
        &self,
        batch: &mut Vec<NewLine>,
        after: &mut Option<Timestamp>,
    ) -> Result<(), Interrupted> {
        if let Some(newest) = batch.iter().map(|line| line.time).max() {
            self.lines
                .append(self.source, std::mem::take(batch))
                .await?;
            *after = (*after).max(Some(newest));
        }
        Ok(())
    }

    /// The time of the newest line of this pod that is in the line log.
    async fn last_carried(&self) -> Result<Option<Timestamp>, ReadError> {
        let mut end = self.lines.last(self.source).await?;
        while end > 0 {
            let begin = end.saturating_sub(PAGE);
            let limit = usize::try_from(end - begin).unwrap_or(usize::MAX);
            let page = self.lines.read(self.source, begin, limit).await?;
            let of_pod = page.iter().rev().map(|l| &l.line).find(|line| {
                line.kind == LineKind::Container
                    && line.instance.as_deref() == Some(&self.pod)
                    && line.cluster.as_ref() == Some(&self.cluster)
            });
            if let Some(line) = of_pod {
                return Ok(Some(line.time));
            }
            end = begin;
        }
        Ok(None)
    }
}

/// The time from which on to ask for what comes after a line: only whole seconds are asked for, and
/// the client rounds to the nearest. What is there already is told by its time.
pub(crate) fn since(after: Timestamp) -> Timestamp {
    after
        .checked_sub(SignedDuration::from_secs(1))
        .unwrap_or(after)
}

/// The next line without its end, cut if it is too long; none at the end.
pub(crate) async fn read_line<S>(stream: &mut Pin<Box<S>>) -> std::io::Result<Option<Vec<u8>>>
where
    S: AsyncBufRead + ?Sized,
{
    // Room for the time in front of it, and for knowing that it is too long.
    const ENOUGH: usize = MAX_LINE + 64;
    let mut line = Vec::new();
    let mut read = false;
    loop {
        let chunk = stream.fill_buf().await?;
        if chunk.is_empty() {
            return Ok(read.then_some(line));
        }
        read = true;
        let end = chunk.iter().position(|byte| *byte == b'\n');
        let text = &chunk[..end.unwrap_or(chunk.len())];
        let room = ENOUGH.saturating_sub(line.len());
        line.extend_from_slice(&text[..text.len().min(room)]);
        let taken = end.map_or(chunk.len(), |end| end + 1);
        stream.as_mut().consume(taken);
        if end.is_some() {
            return Ok(Some(line));
        }
    }
}

/// The time and the text of `2026-01-02T03:04:05.123456789Z text`.
pub(crate) fn parse(line: &[u8]) -> Option<(Timestamp, String)> {
    let line = String::from_utf8_lossy(line);
    let (time, text) = line.split_once(' ').unwrap_or((&*line, ""));
    let text = text.strip_suffix('\r').unwrap_or(text);
    Some((time.parse().ok()?, cut(text.to_owned())))
}

/// A text as it is kept: cut where it is too long.
pub(super) fn cut(mut text: String) -> String {
    if text.len() > MAX_LINE {
        text.truncate(text.floor_char_boundary(MAX_LINE - CUT.len()));
        text.push_str(CUT);
    }
    text
}

#[cfg(test)]
mod tests {
    use futures_util::io::Cursor;

    use super::*;

    #[tokio::test]
    async fn lines_are_taken_one_by_one_and_are_never_too_long() {
        let long = "ä".repeat(MAX_LINE);
        let text = format!(
            "2026-01-02T03:04:05.123456789Z a b\r\nnonsense\n2026-01-02T03:04:06Z {long}\n2026-01-02T03:04:07Z"
        );
        let mut stream = Box::pin(Cursor::new(text.into_bytes()));
        let mut lines = Vec::new();
        while let Some(line) = read_line(&mut stream).await.unwrap() {
            lines.push(parse(&line));
        }
        assert_eq!(lines.len(), 4);
        let (time, first) = lines[0].clone().unwrap();
        assert_eq!(
            (time.subsec_nanosecond(), first.as_str()),
            (123_456_789, "a b")
        );
        assert_eq!(lines[1], None);
        let (_, long) = lines[2].clone().unwrap();
        assert!(long.len() <= MAX_LINE && long.ends_with(CUT));
        assert_eq!(lines[3].clone().unwrap().1, "");
    }
}
