//! The output of a deployment: what its build, its containers and its workers say.

use std::collections::VecDeque;

use axum::extract::State;
use axum::http::{HeaderMap, HeaderName, StatusCode, header};
use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use daybook_events::deployment::Status;
use daybook_events::lines::{Line, LineKind, LineLog, LineSource};
use daybook_events::log::{Position, ReadError};
use daybook_events::{ClusterName, DeploymentId, Refusal};
use daybook_projections::{Projections, QueryError};
use futures_util::stream::{self, BoxStream, StreamExt};
use jiff::Timestamp;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use std::fmt;
use std::str::FromStr;
use std::sync::Arc;
use tokio::sync::watch;
use utoipa::IntoParams;

use crate::extract::{Named, Params};
use crate::problem::Problem;
use crate::routes::events::{accepts, stream_response};
use crate::sse;
use crate::state::AppState;

const NDJSON: &str = "application/x-ndjson";
const LAST_EVENT_ID: HeaderName = HeaderName::from_static("last-event-id");
/// Lines that are read at once.
const READ: usize = 500;

/// Which lines are wanted, and from where on.
#[derive(Debug, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
#[serde(deny_unknown_fields)]
pub(crate) struct LogQuery {
    /// `build`, `container`, `status` or `platform`; all if not given.
    #[serde(rename = "type")]
    #[param(rename = "type")]
    kind: Option<String>,
    /// Goes on as lines come, until the deployment has settled. With `type=container`, as long as
    /// it runs.
    #[serde(default)]
    follow: bool,
    /// Only lines after this cursor, as it stands in a line of JSON or in the id of an event.
    after: Option<String>,
}

/// One line of output.
#[derive(Debug, Serialize, JsonSchema)]
pub(crate) struct LogLine {
    /// Lines after this one are asked for with `after`.
    cursor: String,
    /// Its number among the lines of its build or of its deployment.
    seq: u64,
    /// When it was printed.
    time: Timestamp,
    /// What it is.
    kind: LineKind,
    /// `DEBUG`, `INFO`, `WARN` or `ERROR`, as far as the text says so; `INFO` otherwise.
    level: &'static str,
    /// Where it was printed.
    #[serde(skip_serializing_if = "Option::is_none")]
    cluster: Option<ClusterName>,
    /// The instance that printed it.
    #[serde(skip_serializing_if = "Option::is_none")]
    instance: Option<String>,
    /// The text.
    text: String,
}

/// How far a reader is: the last lines that it has of the build and of the deployment. Written as
/// `<build>-<deployment>`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
struct LogCursor {
    build: u64,
    deployment: u64,
}

impl fmt::Display for LogCursor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}-{}", self.build, self.deployment)
    }
}

impl FromStr for LogCursor {
    type Err = Problem;
    /// Reads a cursor; a single number counts for the build and the deployment alike, which is
    /// enough where lines of one of them are asked for.
    fn from_str(text: &str) -> Result<Self, Problem> {
        let number = |t: &str| {
            let digits = !t.is_empty() && t.bytes().all(|b| b.is_ascii_digit());
            t.parse::<u64>().ok().filter(|_| digits)
        };
        let parsed = match text.split_once('-') {
            Some((build, deployment)) => number(build).zip(number(deployment)),
            None => number(text).map(|n| (n, n)),
        };
        let (build, deployment) = parsed.ok_or_else(|| {
            Problem::new(
                StatusCode::BAD_REQUEST,
                "invalid_cursor",
                "after is not a cursor of log lines",
                "use the cursor of the last line that you have, or leave it out",
            )
        })?;
        Ok(Self { build, deployment })
    }
}

/// How lines are written.
#[derive(Debug, Clone, Copy)]
enum Format {
    Text,
    Json,
    Events,
}

/// The output of a deployment: of its build, of its containers, and of the workers that carry it
/// out. As text, as JSON with a line each (`Accept: application/x-ndjson`) or as server-sent
/// events (`Accept: text/event-stream`); the last two carry the cursor that resumes after a line.
#[utoipa::path(get, path = "/api/v1/deployments/{id}/logs", tag = "deployments",
    params(("id" = String, Path, description = "The deployment."), LogQuery,
        ("Last-Event-ID" = Option<String>, Header,
            description = "Resumes a stream of events; goes before `after`.")),
    responses((status = 200, description = "The lines.", content(
        (String = "text/plain"), (LogLine = "application/x-ndjson"),
        (String = "text/event-stream")))))]
pub(crate) async fn deployment_logs(
    State(state): State<AppState>,
    Named(id): Named<DeploymentId>,
    Params(query): Params<LogQuery>,
    headers: HeaderMap,
) -> Result<Response, Problem> {
    let kind = query.kind.as_deref().map(line_kind).transpose()?;
    let format = if accepts(&headers, sse::MEDIA_TYPE) {
        Format::Events
    } else if accepts(&headers, NDJSON) {
        Format::Json
    } else {
        Format::Text
    };
    let last_id = headers
        .get(LAST_EVENT_ID)
        .filter(|_| matches!(format, Format::Events))
        .and_then(|id| id.to_str().ok().map(str::to_owned));
    let cursor = last_id.or(query.after);
    let cursor = cursor
        .as_deref()
        .map_or(Ok(LogCursor::default()), str::parse)?;
    state.commands.deployment(id)?;
    let projections = state.projections().clone();
    let reader = LogReader {
        lines: state.lines.clone(),
        changes: projections.changes(),
        projections,
        id,
        kind,
        follow: query.follow,
        last_round: false,
        cursor,
        build: Source::new(cursor.build),
        deployment: Source::new(cursor.deployment),
    };
    let batches = stream::unfold(reader, move |mut reader| async move {
        match reader.next().await {
            Ok(Some(lines)) => Some((lines, reader)),
            Ok(None) => None,
            Err(e) => {
                tracing::error!(deployment.id = %id, error = %e, "a stream of lines broke off");
                None
            }
        }
    });
    let frames = batches.flat_map(move |lines| {
        let frames = lines.into_iter().map(move |line| write_line(&line, format));
        stream::iter(frames)
    });
    Ok(match format {
        Format::Events => {
            // Without it a browser would connect again for ever.
            let end = Bytes::from_static(b"event: end\ndata: {}\n\n");
            let end = stream::once(async move { end });
            stream_response(&state, frames.chain(end))
        }
        Format::Json => plain_response(&state, NDJSON, frames),
        Format::Text => plain_response(&state, "text/plain; charset=utf-8", frames),
    })
}

fn plain_response(
    state: &AppState,
    media_type: &'static str,
    frames: impl futures_util::Stream<Item = Bytes> + Send + 'static,
) -> Response {
    let upkeep = sse::Upkeep {
        cancel: state.cancel.clone(),
        heartbeat: None,
        _open: state.metrics.open_stream(),
    };
    let headers = [
        (header::CONTENT_TYPE, media_type),
        (header::CACHE_CONTROL, "no-store"),
        (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
    ];
    (headers, sse::body(frames, Bytes::new(), upkeep)).into_response()
}

fn line_kind(word: &str) -> Result<LineKind, Problem> {
    Ok(match word {
        "build" => LineKind::Build,
        "container" => LineKind::Container,
        "status" => LineKind::Status,
        "platform" => LineKind::Platform,
        _ => {
            return Err(Refusal::new(
                "unknown_log_type",
                "there is no such type of log lines",
                "use one of: build, container, status, platform",
            )
            .into());
        }
    })
}

fn write_line(line: &LogLine, format: Format) -> Bytes {
    match format {
        Format::Text => {
            let text: String = line
                .text
                .chars()
                .map(|c| if matches!(c, '\r' | '\n') { ' ' } else { c })
                .collect();
            format!("{} [{}] {text}\n", line.time, line.level).into()
        }
        Format::Json | Format::Events => {
            // A line of texts and numbers can always be written.
            let mut json = serde_json::to_vec(line).unwrap_or_default();
            match format {
                Format::Events => sse::frame(&line.cursor, None, &json),
                _ => {
                    json.push(b'\n');
                    json.into()
                }
            }
        }
    }
}

/// The level that a line names among its first words.
fn level(text: &str) -> &'static str {
    let words = text
        .split(|c: char| !c.is_ascii_alphabetic())
        .filter(|w| !w.is_empty())
        .take(4);
    for word in words {
        match word {
            "ERROR" | "FATAL" | "CRITICAL" | "error" | "Error" => return "ERROR",
            "WARN" | "WARNING" | "warn" | "warning" | "Warning" => return "WARN",
            "DEBUG" | "TRACE" | "debug" | "trace" => return "DEBUG",
            "INFO" | "info" => return "INFO",
            _ => {}
        }
    }
    "INFO"
}

/// The lines of a build or of a deployment on their way to a reader.
struct Source {
    /// The last line that was read.
    read: u64,
    waiting: VecDeque<Line>,
    live: Option<BoxStream<'static, Result<Line, ReadError>>>,
}

impl Source {
    fn new(read: u64) -> Self {
        Self {
            read,
            waiting: VecDeque::new(),
            live: None,
        }
    }

    async fn refill(&mut self, lines: &dyn LineLog, source: LineSource) -> Result<(), ReadError> {
        if self.waiting.is_empty() {
            for line in lines.read(source, self.read, READ).await? {
                self.take(line);
            }
        }
        Ok(())
    }

    /// Takes a line unless it was read already.
    fn take(&mut self, line: Line) {
        if line.seq > self.read {
            self.read = line.seq;
            self.waiting.push_back(line);
        }
    }

    /// Waits for a line to come.
    async fn wait(
        &mut self,
        lines: &dyn LineLog,
        source: Option<LineSource>,
    ) -> Result<(), ReadError> {
        let Some(source) = source else {
            return std::future::pending().await;
        };
        let live = match &mut self.live {
            Some(live) => live,
            none => none.insert(lines.follow(source, self.read).await?),
        };
        match live.next().await {
            Some(line) => self.take(line?),
            None => self.live = None,
        }
        Ok(())
    }
}

/// Why lines could not be read.
#[derive(Debug, thiserror::Error)]
enum LogReadError {
    #[error(transparent)]
    Lines(#[from] ReadError),
    #[error(transparent)]
    State(#[from] QueryError),
}

/// Merges the lines of a deployment and of its build, by time.
struct LogReader {
    lines: Arc<dyn LineLog>,
    projections: Projections,
    changes: watch::Receiver<Position>,
    id: DeploymentId,
    kind: Option<LineKind>,
    follow: bool,
    /// The deployment has settled: what is there now is all there will be.
    last_round: bool,
    cursor: LogCursor,
    build: Source,
    deployment: Source,
}

impl LogReader {
    /// The next lines; none at the end.
    async fn next(&mut self) -> Result<Option<Vec<LogLine>>, LogReadError> {
        loop {
            // Changes from here on are noticed in the wait below.
            self.changes.borrow_and_update();
            let row = self.projections.deployment(self.id)?;
            let build = row.as_ref().and_then(|r| r.state.build);
            let build = build.map(LineSource::Build).filter(|_| self.of_build());
            let deployment = LineSource::Deployment(self.id);
            let deployment = Some(deployment).filter(|_| self.kind != Some(LineKind::Build));
            if let Some(source) = build {
                self.build.refill(&*self.lines, source).await?;
            }
            if let Some(source) = deployment {
                self.deployment.refill(&*self.lines, source).await?;
            }
            let before = self.cursor;
            let lines = self.merge();
            if !lines.is_empty() {
                return Ok(Some(lines));
            }
            if self.cursor != before {
                continue;
            }
            if !self.follow || self.last_round {
                return Ok(None);
            }
            let status = row.map_or(Status::Deleted, |r| r.state.status);
            if self.is_settled(status) {
                self.last_round = true;
                continue;
            }
            tokio::select! {
                changed = self.changes.changed() => {
                    // The projections are gone: nothing will settle any more.
                    self.last_round |= changed.is_err();
                }
                waited = self.build.wait(&*self.lines, build) => waited?,
                waited = self.deployment.wait(&*self.lines, deployment) => waited?,
            }
        }
    }

    fn of_build(&self) -> bool {
        matches!(self.kind, None | Some(LineKind::Build))
    }

    fn is_settled(&self, status: Status) -> bool {
        let runs = status == Status::Started && self.kind == Some(LineKind::Container);
        status.is_settled() && !runs
    }

    /// Takes waiting lines in the order of time, as long as it is known which comes next: once
    /// one of the two has run out, it must be asked for more first.
    fn merge(&mut self) -> Vec<LogLine> {
        let no_build = self.build.waiting.is_empty();
        let no_deployment = self.deployment.waiting.is_empty();
        let mut merged = Vec::new();
        loop {
            let build = self.build.waiting.front().map(|l| l.line.time);
            let deployment = self.deployment.waiting.front().map(|l| l.line.time);
            let from_build = match (build, deployment) {
                (Some(build), Some(deployment)) => build <= deployment,
                (Some(_), None) if no_deployment => true,
                (None, Some(_)) if no_build => false,
                _ => break,
            };
            let source = match from_build {
                true => &mut self.build,
                false => &mut self.deployment,
            };
            let Some(Line { seq, line }) = source.waiting.pop_front() else {
                break;
            };
            match from_build {
                true => self.cursor.build = seq,
                false => self.cursor.deployment = seq,
            }
            let wanted = from_build || self.kind.is_none_or(|k| k == line.kind);
            if wanted {
                merged.push(LogLine {
                    cursor: self.cursor.to_string(),
                    seq,
                    time: line.time,
                    kind: line.kind,
                    level: level(&line.text),
                    cluster: line.cluster,
                    instance: line.instance,
                    text: line.text,
                });
            }
        }
        merged
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cursors_are_read_as_they_are_written() {
        let cursor = LogCursor {
            build: 12,
            deployment: 40,
        };
        assert_eq!(cursor.to_string().parse::<LogCursor>().unwrap(), cursor);
        let both: LogCursor = "7".parse().unwrap();
        assert_eq!((both.build, both.deployment), (7, 7));
        for bad in [
            "",
            "-",
            "a",
            "1-",
            "-1",
            "+1",
            "1-2-3",
            "99999999999999999999",
        ] {
            assert!(bad.parse::<LogCursor>().is_err(), "{bad:?}");
        }
    }

    #[test]
    fn the_level_is_taken_from_the_text() {
        assert_eq!(level("Listening on 8080"), "INFO");
        assert_eq!(level("2024-01-15 WARNING: disk"), "WARN");
        assert_eq!(level("[ERROR] no database"), "ERROR");
        assert_eq!(level("debug: x"), "DEBUG");
    }
}
