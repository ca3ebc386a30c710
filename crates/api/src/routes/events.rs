//! The ledger itself: its events as they are stored, in pages and as a stream.

use std::time::Duration;

use axum::body::Body;
use axum::extract::State;
use axum::http::{HeaderMap, HeaderName, StatusCode, header};
use axum::response::{IntoResponse, Response};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use bytes::Bytes;
use daybook_events::build::Build;
use daybook_events::envelope;
use daybook_events::gitops::{Change, GitopsEvent};
use daybook_events::log::{ReadError, Recorded};
use daybook_events::project::ProjectEvent;
use daybook_events::routing::RoutingEvent;
use daybook_events::{
    AggregateKind, DeploymentId, EnvironmentName, Event, Position, ProjectName, Refusal,
    ServiceName, Subject, SubjectFilter,
};
use daybook_projections::{Projections, QueryError};
use futures_util::{StreamExt, TryStreamExt, future};
use jiff::Timestamp;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;
use utoipa::IntoParams;

use crate::answer::Answer;
use crate::extract::{self, Named, NoParams, Params, deployment_id};
use crate::problem::Problem;
use crate::routes::history::page;
use crate::sse;
use crate::state::AppState;

const LAST_EVENT_ID: HeaderName = HeaderName::from_static("last-event-id");
/// Most events that one page looks at: a filter that little passes must not make it endless.
const SCAN_MAX: usize = 20_000;
/// Events that are read at once.
const READ: usize = 512;
/// How long a filter waits for the fold to know whose event it sees, before it asks again.
const FOLD_WAIT: Duration = Duration::from_secs(5);

/// Which events are wanted, and from where on; all that is given must fit.
#[derive(Debug, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
#[serde(deny_unknown_fields)]
pub(crate) struct EventQuery {
    /// Only events after this position; 0, the start, if not given.
    after: Option<String>,
    /// Most events on a page: 1 to 500, 50 if not given.
    limit: Option<u32>,
    /// Of this project.
    project: Option<String>,
    /// Of this environment. Builds, commits and route tables belong to none.
    environment: Option<String>,
    /// About this service.
    service: Option<String>,
    /// Of this type (`deployment.requested.v1`), or of all types of an aggregate (`deployment`).
    kind: Option<String>,
    /// Of this deployment and of the run that it began: its commits and its switches too.
    deployment: Option<String>,
    /// Goes on as events come, as server-sent events.
    #[serde(default)]
    follow: bool,
}

/// A page of events.
#[derive(Debug, Serialize, JsonSchema)]
pub(crate) struct EventPage {
    /// The events, oldest first.
    events: Vec<StoredEvent>,
    /// The next page is after this position. It may move on although no event fitted.
    next_after: Position,
    /// Position of the last event of the log.
    head: Position,
}

/// One event as it is stored.
#[derive(Debug, Serialize, JsonSchema)]
pub(crate) struct StoredEvent {
    /// Its position.
    position: Position,
    /// Its subject on the log.
    subject: String,
    /// When the log stored it.
    stored_at: Timestamp,
    /// The stored CloudEvent.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Option<serde_json::Value>")]
    event: Option<Box<RawValue>>,
    /// The stored bytes in Base64, if they are not JSON.
    #[serde(skip_serializing_if = "Option::is_none")]
    bytes: Option<String>,
}

impl From<Recorded> for StoredEvent {
    fn from(recorded: Recorded) -> Self {
        let event: Option<Box<RawValue>> = serde_json::from_slice(&recorded.bytes).ok();
        let bytes = event.is_none().then(|| BASE64.encode(&recorded.bytes));
        Self {
            position: recorded.position,
            subject: recorded.subject.to_string(),
            stored_at: recorded.stored_at,
            event,
            bytes,
        }
    }
}

/// What events must be about.
#[derive(Debug, Clone)]
struct EventFilter {
    subjects: SubjectFilter,
    kind: Option<String>,
    service: Option<ServiceName>,
    deployment: Option<DeploymentId>,
}

impl EventFilter {
    fn parse(query: EventQuery) -> Result<Self, Problem> {
        let (aggregate, kind) = query.kind.map_or(Ok((None, None)), kind)?;
        Ok(Self {
            subjects: SubjectFilter {
                project: query.project.map(ProjectName::parse).transpose()?,
                environment: query.environment.map(EnvironmentName::parse).transpose()?,
                aggregate,
                subject: None,
            },
            kind,
            service: query.service.map(ServiceName::parse).transpose()?,
            deployment: query.deployment.as_deref().map(deployment_id).transpose()?,
        })
    }

    /// Whether an event fits that the log's own filter let through.
    async fn wants(&self, projections: &Projections, recorded: &Recorded) -> bool {
        if self.kind.is_none() && self.service.is_none() && self.deployment.is_none() {
            return true;
        }
        let Ok(event) = recorded.event() else {
            return false;
        };
        if self
            .kind
            .as_deref()
            .is_some_and(|k| k != event.short_kind())
        {
            return false;
        }
        if let Some(id) = self.deployment {
            let own = matches!(&recorded.subject, Subject::Deployment(_, _, d) if *d == id);
            if !own && event.correlationid != id.0 {
                return false;
            }
        }
        let Some(service) = &self.service else {
            return true;
        };
        // Whose event it is may be known only once it is folded.
        let position = recorded.position;
        while projections.wait_for(position, FOLD_WAIT).await.is_err() {
            tracing::debug!(%position, "a stream waits for the projections");
        }
        match service_of(projections, &recorded.subject, &event) {
            Ok(found) => found.as_ref() == Some(service),
            Err(e) => {
                tracing::error!(error = %e, "the service of an event could not be found");
                false
            }
        }
    }
}

/// The service that an event is about, if it is about one.
fn service_of(
    projections: &Projections,
    subject: &Subject,
    event: &Event,
) -> Result<Option<ServiceName>, QueryError> {
    Ok(match subject {
        Subject::Deployment(_, _, id) => projections
            .deployment(*id)?
            .map(|row| row.state.request.instance.service),
        Subject::Build(..) => projections
            .folded::<Build>(subject)?
            .state
            .map(|build| build.request.service),
        Subject::Project(_) => match event.payload() {
            Ok(ProjectEvent::ServiceDefined(e)) => Some(e.name),
            _ => None,
        },
        Subject::Routing(_) => match event.payload() {
            Ok(RoutingEvent::Switched(e)) => Some(e.instance.service),
            _ => None,
        },
        Subject::Gitops(_) => match event.payload() {
            Ok(GitopsEvent::Committed(e)) => match e.change {
                Change::Deploy { service, .. }
                | Change::Scale { service, .. }
                | Change::Remove { service, .. } => Some(service),
                Change::EnvironmentCreated { .. } | Change::EnvironmentDeleted {} => None,
            },
            _ => None,
        },
        Subject::Environment(..) | Subject::Domain(_) | Subject::Ledger | Subject::Other(_) => None,
    })
}

/// Reads an event type or the name of an aggregate.
fn kind(text: String) -> Result<(Option<AggregateKind>, Option<String>), Problem> {
    let short = text.strip_prefix(envelope::TYPE_PREFIX).unwrap_or(&text);
    let (family, exact) = match short.split_once('.') {
        Some((family, _)) => (family, Some(short.to_owned())),
        None => (short, None),
    };
    match family.parse() {
        Ok(aggregate) => Ok((Some(aggregate), exact)),
        Err(_) => {
            let known: Vec<_> = AggregateKind::ALL.iter().map(|k| k.as_str()).collect();
            Err(Refusal::new(
                "unknown_kind",
                "there is no such kind of event",
                format!(
                    "use an event type such as deployment.requested.v1, or one of: {}",
                    known.join(", ")
                ),
            )
            .into())
        }
    }
}

/// The events of the ledger, exactly as they are stored, oldest first: as pages of JSON, or, with
/// `Accept: text/event-stream` or `follow`, as a stream that goes on. The id of a streamed event
/// is its position, so that `Last-Event-ID` resumes without gap or repeat.
#[utoipa::path(get, path = "/api/v1/events", tag = "events",
    params(EventQuery,
        ("Last-Event-ID" = Option<u64>, Header,
            description = "Resumes a stream after this position; goes before `after`.")),
    responses((status = 200, description = "The events.", content(
        (EventPage = "application/json"), (String = "text/event-stream")))))]
pub(crate) async fn list_events(
    State(state): State<AppState>,
    Params(query): Params<EventQuery>,
    headers: HeaderMap,
) -> Result<Response, Problem> {
    let stream = query.follow || accepts(&headers, sse::MEDIA_TYPE);
    let last_id = headers
        .get(LAST_EVENT_ID)
        .filter(|_| stream)
        .map(|id| extract::position("Last-Event-ID", id.to_str().unwrap_or_default()));
    let after = query.after.as_deref().unwrap_or("0");
    let after = last_id.unwrap_or_else(|| extract::position("after", after))?;
    let limit = page(query.limit, None)?.limit();
    let filter = EventFilter::parse(query)?;
    let head = state.commands.ledger().log().head().await?;
    if after > head {
        return Err(Problem::new(
            StatusCode::CONFLICT,
            "position_ahead",
            format!("the log ends at {head}, before {after}"),
            "this is not the log that the position is from, or it was set back: look at \
             `daybook events`, and start from a position that exists",
        ));
    }
    if stream {
        follow(state, after, filter).await
    } else {
        let page = events(&state, after, filter, limit, head).await?;
        Ok(Answer::ok(page).into_response())
    }
}

/// Whether a client asks for this media type.
pub(crate) fn accepts(headers: &HeaderMap, media_type: &str) -> bool {
    headers
        .get_all(header::ACCEPT)
        .iter()
        .filter_map(|v| v.to_str().ok())
        .flat_map(|v| v.split(','))
        .filter_map(|v| v.split(';').next())
        .any(|v| v.trim().eq_ignore_ascii_case(media_type))
}

async fn events(
    state: &AppState,
    after: Position,
    filter: EventFilter,
    limit: usize,
    head: Position,
) -> Result<EventPage, ReadError> {
    let log = state.commands.ledger().log();
    let mut events = Vec::new();
    let mut next_after = after;
    let mut scanned = 0;
    while events.len() < limit && scanned < SCAN_MAX {
        let batch = log.read(next_after, &filter.subjects, READ).await?;
        let ended = batch.len() < READ;
        scanned += batch.len();
        for recorded in batch {
            if events.len() == limit {
                break;
            }
            next_after = recorded.position;
            if filter.wants(state.projections(), &recorded).await {
                events.push(recorded.into());
            }
        }
        if ended {
            // Nothing that fits stands between the last event that fitted and the head.
            if events.len() < limit {
                next_after = next_after.max(head);
            }
            break;
        }
    }
    Ok(EventPage {
        events,
        next_after,
        head,
    })
}

async fn follow(
    state: AppState,
    after: Position,
    filter: EventFilter,
) -> Result<Response, Problem> {
    let log = state.commands.ledger().log();
    let events = log.tail(after, filter.subjects.clone()).await?;
    let projections = state.projections().clone();
    // An error is the last that a log gives, as no waiting would mend it.
    let events = events
        .inspect_err(|e| tracing::error!(error = %e, "a stream of events broke off"))
        .scan((), |(), recorded| future::ready(recorded.ok()));
    let frames = events.filter_map(move |recorded| {
        let filter = filter.clone();
        let projections = projections.clone();
        async move {
            let wanted = filter.wants(&projections, &recorded).await;
            wanted.then(|| event_frame(&recorded))
        }
    });
    Ok(stream_response(&state, frames))
}

fn event_frame(recorded: &Recorded) -> Bytes {
    let event = recorded.event().ok();
    sse::frame(
        &recorded.position.to_string(),
        event.as_ref().map(|e| e.kind.as_str()),
        &recorded.bytes,
    )
}

/// An answer of server-sent events.
pub(crate) fn stream_response(
    state: &AppState,
    frames: impl futures_util::Stream<Item = Bytes> + Send + 'static,
) -> Response {
    let heartbeat = Bytes::from_static(b": still here\n\n");
    let upkeep = sse::Upkeep {
        cancel: state.cancel.clone(),
        heartbeat: Some((state.settings.heartbeat, heartbeat)),
        _open: state.metrics.open_stream(),
    };
    // Sent at once, so that the client knows that it is connected.
    let first = Bytes::from_static(b"retry: 1000\n\n");
    let headers = [
        (header::CONTENT_TYPE, sse::MEDIA_TYPE),
        (header::CACHE_CONTROL, "no-store"),
    ];
    (headers, sse::body(frames, first, upkeep)).into_response()
}

/// One event: its exact stored bytes.
#[utoipa::path(get, path = "/api/v1/events/{position}", tag = "events",
    params(("position" = u64, Path, description = "Its position.")),
    responses((status = 200, description = "The stored CloudEvent.", body = String,
        content_type = "application/cloudevents+json")))]
pub(crate) async fn get_event(
    State(state): State<AppState>,
    Named(position): Named<Position>,
    Params(NoParams {}): Params<NoParams>,
) -> Result<Response, Problem> {
    let log = state.commands.ledger().log();
    let found = match position {
        Position::ZERO => None,
        position => log.get(position).await?,
    };
    let recorded = found.ok_or_else(|| {
        Problem::new(
            StatusCode::NOT_FOUND,
            "event_not_found",
            format!("there is no event at position {position}"),
            "positions start at 1; GET /api/v1/events says where the log ends",
        )
    })?;
    let headers = [(header::CONTENT_TYPE, envelope::MEDIA_TYPE)];
    Ok((headers, Body::from(recorded.bytes)).into_response())
}
