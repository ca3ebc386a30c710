//! The output of a deployment: what its build, its containers and its workers say.

use std::collections::VecDeque;

use axum::extract::State;
use axum::http::{HeaderMap, HeaderName, HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use daybook_events::deployment::Status;
use daybook_events::lines::{Line, LineKind, LineLog, LineSource};
use daybook_events::log::{Position, ReadError};
use daybook_events::{ClusterName, DeploymentId};
use daybook_projections::{DeploymentRow, Projections, QueryError};
use futures_util::stream::{self, BoxStream, Stream, StreamExt};
use jiff::Timestamp;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use std::fmt;
use std::str::FromStr;
use std::sync::Arc;
use tokio::sync::watch;
use utoipa::IntoParams;

use crate::access::Principal;
use crate::extract::{Named, Params};
use crate::line_filter::{Asked, Level, LineFilter};
use crate::problem::Problem;
use crate::routes::events::{accepts, stream_response};
use crate::sse;
use crate::state::AppState;

pub(crate) const NDJSON: &str = "application/x-ndjson";
pub(crate) const LAST_EVENT_ID: HeaderName = HeaderName::from_static("last-event-id");
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
    /// At least this level: `debug`, `info`, `warn` or `error`. A line that says none is `info`.
    level: Option<String>,
    /// Printed in this cluster.
    cluster: Option<String>,
    /// Printed by this instance (pod, process).
    instance: Option<String>,
    /// Printed at this time or later (RFC 3339).
    from: Option<String>,
    /// Printed before this time (RFC 3339).
    until: Option<String>,
    /// With this text in it, as it stands; letters of ASCII may be large or small.
    q: Option<String>,
    /// The answer says that it is a file to be kept. Without `follow` it ends, as any answer, with the
    /// last line that was there when it was asked for.
    #[serde(default)]
    download: bool,
    /// Goes on as lines come, until the deployment has settled. With `type=container`, as long as
    /// it runs.
    #[serde(default)]
    follow: bool,
    /// With `follow`: goes on as long as it runs, whatever the type.
    #[serde(default)]
    running: bool,
    /// Only lines after this cursor, as it stands in a line of JSON or in the id of an event.
    after: Option<String>,
}

/// One line of output.
#[derive(Debug, Serialize, JsonSchema)]
pub(crate) struct LogLine {
    /// Lines after this one are asked for with `after`.
    pub(crate) cursor: String,
    /// Its number among the lines of its build or of its deployment.
    pub(crate) seq: u64,
    /// When it was printed.
    pub(crate) time: Timestamp,
    /// What it is.
    pub(crate) kind: LineKind,
    /// `DEBUG`, `INFO`, `WARN` or `ERROR`, as far as the text says so; `INFO` otherwise.
    pub(crate) level: &'static str,
    /// Where it was printed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) cluster: Option<ClusterName>,
    /// The instance that printed it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) instance: Option<String>,
    /// The text.
    pub(crate) text: String,
}

impl LogLine {
    fn new(cursor: LogCursor, Line { seq, line }: Line) -> Self {
        Self {
            cursor: cursor.to_string(),
            seq,
            time: line.time,
            kind: line.kind,
            level: Level::of(&line.text).as_str(),
            cluster: line.cluster,
            instance: line.instance,
            text: line.text,
        }
    }

    /// Its level and its text, in one line.
    pub(crate) fn words(&self) -> String {
        format!("[{}] {}", self.level, self.text.replace(['\r', '\n'], " "))
    }

    /// A line that was found by itself, with the cursor after which the lines that follow it in its
    /// deployment are asked for.
    pub(crate) fn standing_alone(of_build: bool, line: Line) -> Self {
        let cursor = match of_build {
            true => LogCursor {
                build: line.seq,
                deployment: 0,
            },
            // Of those of the build none is repeated.
            false => LogCursor {
                build: WHOLE,
                deployment: line.seq,
            },
        };
        Self::new(cursor, line)
    }
}

/// How far a reader is: the last lines that it has of the build and of the deployment. Written as
/// `<build>-<deployment>`, with `all` for a build of which nothing is wanted any more.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct LogCursor {
    build: u64,
    deployment: u64,
}

/// The place of a reader that has all lines of a build, however many come.
const WHOLE: u64 = u64::MAX;

impl fmt::Display for LogCursor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.build {
            WHOLE => write!(f, "all-{}", self.deployment),
            build => write!(f, "{build}-{}", self.deployment),
        }
    }
}

/// A cursor as a client gives it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum GivenCursor {
    /// One that was made here.
    Both(LogCursor),
    /// A single number, which counts for the build and the deployment alike: enough where lines of
    /// one of them are asked for.
    Either(u64),
}

impl Default for GivenCursor {
    fn default() -> Self {
        Self::Both(LogCursor::default())
    }
}

impl FromStr for GivenCursor {
    type Err = Problem;
    fn from_str(text: &str) -> Result<Self, Problem> {
        let number = |t: &str| {
            let digits = !t.is_empty() && t.bytes().all(|b| b.is_ascii_digit());
            t.parse::<u64>().ok().filter(|n| digits && *n != WHOLE)
        };
        let of_build = |t: &str| match t {
            "all" => Some(WHOLE),
            t => number(t),
        };
        let parsed = match text.split_once('-') {
            Some((build, deployment)) => of_build(build)
                .zip(number(deployment))
                .map(|(build, deployment)| Self::Both(LogCursor { build, deployment })),
            None => number(text).map(Self::Either),
        };
        parsed.ok_or_else(|| {
            Problem::new(
                StatusCode::BAD_REQUEST,
                "invalid_cursor",
                "after is not a cursor of log lines",
                "use the cursor of the last line that you have, or leave it out",
            )
        })
    }
}

impl GivenCursor {
    fn cursor(self) -> LogCursor {
        match self {
            Self::Both(cursor) => cursor,
            Self::Either(n) => LogCursor {
                build: n,
                deployment: n,
            },
        }
    }

    /// Whether it is of lines that there are not, where these are the last ones of the sources that
    /// are wanted.
    fn is_ahead(self, build: Option<u64>, deployment: Option<u64>) -> bool {
        match self {
            Self::Both(cursor) => {
                let in_build = build.filter(|_| cursor.build != WHOLE);
                in_build.is_some_and(|last| cursor.build > last)
                    || deployment.is_some_and(|last| cursor.deployment > last)
            }
            Self::Either(n) => build.max(deployment).is_some_and(|last| n > last),
        }
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
    principal: Principal,
    Named(id): Named<DeploymentId>,
    Params(query): Params<LogQuery>,
    headers: HeaderMap,
) -> Result<Response, Problem> {
    let filter = LineFilter::new(Asked {
        kind: query.kind,
        level: query.level,
        cluster: query.cluster,
        instance: query.instance,
        from: query.from,
        until: query.until,
        text: query.q,
    })?;
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
        .map_or(Ok(GivenCursor::default()), str::parse)?;
    let until = match (query.follow, query.running || filter.is_of_containers()) {
        (false, _) => Until::Now,
        (true, false) => Until::Settled,
        (true, true) => Until::Ended,
    };
    let batches = lines(&state, id, filter, until, cursor).await?;
    let frames = batches.flat_map(move |lines| {
        let frames = lines.into_iter().map(move |line| write_line(&line, format));
        stream::iter(frames)
    });
    let mut response = match format {
        Format::Events => {
            let end = stream::once(async { Bytes::from_static(sse::END) });
            stream_response(&state, &principal, frames.chain(end))
        }
        Format::Json => plain_response(&state, &principal, NDJSON, query.download, frames),
        Format::Text => {
            let media_type = "text/plain; charset=utf-8";
            plain_response(&state, &principal, media_type, query.download, frames)
        }
    };
    if query.download {
        let named = HeaderValue::from_str(&format!("attachment; filename=\"{id}.log\""));
        // An id has no character that a header cannot have.
        response
            .headers_mut()
            .extend(named.ok().map(|n| (header::CONTENT_DISPOSITION, n)));
    }
    Ok(response)
}

/// How long lines are followed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Until {
    /// What there is when it is asked for, and nothing more.
    Now,
    /// Until the deployment has settled.
    Settled,
    /// Until it has settled and does not run.
    Ended,
}

/// The lines of a deployment after a cursor, in batches.
pub(crate) async fn lines(
    state: &AppState,
    id: DeploymentId,
    filter: LineFilter,
    until: Until,
    cursor: GivenCursor,
) -> Result<impl Stream<Item = Vec<LogLine>> + Send + use<>, Problem> {
    let row = state.commands.deployment(id)?;
    let whole = cursor == GivenCursor::default();
    let (mut build, mut deployment) = (u64::MAX, u64::MAX);
    if until == Until::Now || !whole {
        let last = last_lines(state, &row, &filter).await?;
        reached(last, &filter, cursor)?;
        if until == Until::Now {
            (build, deployment) = last;
        }
    }
    let cursor = cursor.cursor();
    let projections = state.projections().clone();
    let reader = LogReader {
        lines: state.lines.clone(),
        changes: projections.changes(),
        projections,
        id,
        filter,
        until,
        last_round: false,
        cursor,
        build: Source::new(cursor.build, build),
        deployment: Source::new(cursor.deployment, deployment),
    };
    Ok(stream::unfold(reader, move |mut reader| async move {
        match reader.next().await {
            Ok(Some(lines)) => Some((lines, reader)),
            Ok(None) => None,
            Err(e) => {
                tracing::error!(deployment.id = %id, error = %e, "a stream of lines broke off");
                None
            }
        }
    }))
}

/// The last lines that there are of the build and of the deployment, as far as they are wanted; 0 where
/// there are none.
async fn last_lines(
    state: &AppState,
    row: &DeploymentRow,
    filter: &LineFilter,
) -> Result<(u64, u64), Problem> {
    let (of_build, of_deployment) = filter.sources();
    let build = match row.state.build.filter(|_| of_build) {
        Some(build) => state.lines.last(LineSource::Build(build)).await?,
        None => 0,
    };
    let deployment = match of_deployment {
        true => state.lines.last(LineSource::Deployment(row.id)).await?,
        false => 0,
    };
    Ok((build, deployment))
}

/// Refuses a cursor of lines that there are not: whoever has it would miss what is printed until its
/// number comes.
fn reached(
    (build, deployment): (u64, u64),
    filter: &LineFilter,
    cursor: GivenCursor,
) -> Result<(), Problem> {
    let (of_build, of_deployment) = filter.sources();
    let wanted = |wanted: bool, last: u64| wanted.then_some(last);
    if cursor.is_ahead(wanted(of_build, build), wanted(of_deployment, deployment)) {
        return Err(Problem::new(
            StatusCode::CONFLICT,
            "position_ahead",
            format!("the output ends at {build}-{deployment}, before the cursor"),
            "the cursor is of another deployment, or its lines are no longer kept: start from the \
             beginning, without a cursor",
        ));
    }
    Ok(())
}

/// An answer of lines. If it is wanted `whole`, what cuts it off is an error of the body.
pub(crate) fn plain_response(
    state: &AppState,
    principal: &Principal,
    media_type: &'static str,
    whole: bool,
    frames: impl futures_util::Stream<Item = Bytes> + Send + 'static,
) -> Response {
    let lease = match state.access.stream(principal, &state.cancel) {
        Ok(lease) => lease,
        Err(e) => return Problem::from(e).into_response(),
    };
    let upkeep = sse::Upkeep {
        lease,
        heartbeat: None,
        whole,
        _open: state.metrics.open_stream(),
    };
    let headers = [
        (header::CONTENT_TYPE, media_type),
        (header::CACHE_CONTROL, "no-store"),
        (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
    ];
    (headers, sse::body(frames, Bytes::new(), upkeep)).into_response()
}

fn write_line(line: &LogLine, format: Format) -> Bytes {
    match format {
        Format::Text => format!("{} {}\n", line.time, line.words()).into(),
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

/// The lines of a build or of a deployment on their way to a reader.
struct Source {
    /// The last line that was read.
    read: u64,
    /// The last line that is wanted.
    end: u64,
    waiting: VecDeque<Line>,
    live: Option<BoxStream<'static, Result<Line, ReadError>>>,
}

impl Source {
    fn new(read: u64, end: u64) -> Self {
        Self {
            read,
            end,
            waiting: VecDeque::new(),
            live: None,
        }
    }

    async fn refill(&mut self, lines: &dyn LineLog, source: LineSource) -> Result<(), ReadError> {
        if self.waiting.is_empty() && self.read < self.end {
            for line in lines.read(source, self.read, READ).await? {
                self.take(line);
            }
        }
        Ok(())
    }

    /// Takes a line unless it was read already, or came too late.
    fn take(&mut self, line: Line) {
        if line.seq > self.read {
            self.read = line.seq;
            if line.seq <= self.end {
                self.waiting.push_back(line);
            }
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

/// Whether a deployment of this status has more to say. Whatever still has instances can print.
pub(crate) fn can_print(status: Status) -> bool {
    let runs = matches!(
        status,
        Status::Started | Status::PartiallyStarted | Status::StopError | Status::TerminateError
    );
    runs || !status.is_settled()
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
    filter: LineFilter,
    until: Until,
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
            let (of_build, of_deployment) = self.filter.sources();
            let of_build = of_build && self.cursor.build != WHOLE;
            let build = build.map(LineSource::Build).filter(|_| of_build);
            let deployment = LineSource::Deployment(self.id);
            let deployment = Some(deployment).filter(|_| of_deployment);
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
            if self.until == Until::Now || self.last_round {
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

    fn is_settled(&self, status: Status) -> bool {
        match self.until {
            Until::Ended => !can_print(status),
            Until::Now | Until::Settled => status.is_settled(),
        }
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
            if self.filter.wants(from_build, &line) {
                merged.push(LogLine::new(self.cursor, Line { seq, line }));
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
        for text in ["12-40", "0-0", "all-40"] {
            let read: GivenCursor = text.parse().unwrap();
            assert_eq!(read.cursor().to_string(), text);
        }
        let both: GivenCursor = "7".parse().unwrap();
        assert_eq!(both.cursor().to_string(), "7-7");
        for bad in [
            "",
            "-",
            "a",
            "all",
            "1-",
            "-1",
            "1-all",
            "+1",
            "1-2-3",
            "18446744073709551615",
            "99999999999999999999",
        ] {
            assert!(bad.parse::<GivenCursor>().is_err(), "{bad:?}");
        }
    }

    #[test]
    fn a_cursor_is_ahead_of_the_sources_that_are_wanted() {
        let ahead = |text: &str, build, deployment| {
            let given: GivenCursor = text.parse().unwrap();
            given.is_ahead(build, deployment)
        };
        assert!(!ahead("3-5", Some(3), Some(5)));
        assert!(ahead("4-5", Some(3), Some(5)) && ahead("3-6", Some(3), Some(5)));
        assert!(!ahead("4-5", None, Some(5)) && !ahead("3-6", Some(3), None));
        assert!(!ahead("all-5", Some(3), Some(5)) && ahead("all-6", Some(3), Some(5)));
        // One number is enough for the longer of two.
        assert!(!ahead("5", Some(3), Some(5)) && ahead("6", Some(3), Some(5)));
        assert!(ahead("5", Some(3), None));
    }
}
