//! The ledger in the words of CDEvents, in pages and as a stream.

use std::time::Duration;

use axum::extract::State;
use axum::http::{HeaderMap, StatusCode};
use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use daybook_events::access::Projects;
use daybook_events::log::Recorded;
use daybook_events::subscription::Filter;
use daybook_events::{EnvironmentName, Position, ProjectName, ServiceName, SubjectFilter};
use daybook_projections::{Projections, QueryError};
use futures_util::{StreamExt, TryStreamExt, future};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use utoipa::IntoParams;

use crate::access::Principal;
use crate::answer::Answer;
use crate::extract::{self, Params, deployment_id};
use crate::problem::{self, Problem};
use crate::routes::events::{accepts, stream_response};
use crate::routes::history::page;
use crate::sse;
use crate::state::AppState;

/// Most events that one page looks at: few of them mean something in CDEvents.
const SCAN_MAX: usize = 20_000;
/// Events that are read at once.
const READ: usize = 512;
/// How long a stream waits for the fold, before it asks again.
const FOLD_WAIT: Duration = Duration::from_secs(5);

/// Which events are wanted, and from where on; all that is given must fit.
#[derive(Debug, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
#[serde(deny_unknown_fields)]
pub(crate) struct CdeventQuery {
    /// Only events after this position; 0, the start, if not given.
    after: Option<String>,
    /// Most events on a page: 1 to 500, 50 if not given.
    limit: Option<u32>,
    /// Of this project.
    project: Option<String>,
    /// Of this environment. Builds, commits and switches belong to none.
    environment: Option<String>,
    /// About this service.
    service: Option<String>,
    /// Of this deployment and of the run that it began: its commits and its switches too.
    deployment: Option<String>,
    /// Goes on as events come, as server-sent events.
    #[serde(default)]
    follow: bool,
}

/// A page of CDEvents.
#[derive(Debug, Serialize, JsonSchema)]
pub(crate) struct CdeventPage {
    /// The CDEvents, oldest first. `customData.position` says which event of the ledger each is.
    #[schemars(with = "Vec<serde_json::Map<String, Value>>")]
    cdevents: Vec<Value>,
    /// The next page is after this position. It may move on although no event fitted.
    next_after: Position,
    /// Position of the last event of the log.
    head: Position,
}

/// The event in the words of CDEvents, if it is wanted, may be seen and means something there. It
/// must be folded. It is an error if that cannot be found out: then nobody may go on behind it.
fn translated(
    projections: &Projections,
    visible: &Projects,
    filter: &Filter,
    recorded: &Recorded,
) -> Result<Option<Value>, QueryError> {
    if !visible.sees(recorded.subject.project()) {
        return Ok(None);
    }
    let Ok(event) = recorded.event() else {
        return Ok(None);
    };
    if !projections.passes(filter, &recorded.subject, &event)? {
        return Ok(None);
    }
    projections.cdevent(recorded, &event)
}

/// Waits until an event is folded, which a stream does for as long as its reader.
async fn folded(projections: &Projections, position: Position) {
    while projections.wait_for(position, FOLD_WAIT).await.is_err() {
        tracing::debug!(%position, "a stream of CDEvents waits for the projections");
    }
}

/// The events of the ledger in the words of CDEvents 0.5.1, oldest first: as pages of JSON, or,
/// with `Accept: text/event-stream` or `follow`, as a stream that goes on. The id of a streamed
/// event is its position in the ledger, so that `Last-Event-ID` resumes without gap or repeat.
#[utoipa::path(get, path = "/api/v1/cdevents", tag = "events",
    params(CdeventQuery,
        ("Last-Event-ID" = Option<u64>, Header,
            description = "Goes on after this position; goes before `after`.")),
    responses((status = 200, description = "The CDEvents.", content(
        (CdeventPage = "application/json"), (String = "text/event-stream")))))]
pub(crate) async fn list_cdevents(
    State(state): State<AppState>,
    principal: Principal,
    Params(query): Params<CdeventQuery>,
    headers: HeaderMap,
) -> Result<Response, Problem> {
    let stream = query.follow || accepts(&headers, sse::MEDIA_TYPE);
    let last_id = headers
        .get("last-event-id")
        .map(|id| extract::position("Last-Event-ID", id.to_str().unwrap_or_default()));
    let after = query.after.as_deref().unwrap_or("0");
    let after = extract::position("after", after)?;
    let after = last_id.transpose()?.unwrap_or(after);
    let limit = page(query.limit, None)?.limit();
    let subjects = SubjectFilter {
        project: query.project.map(ProjectName::parse).transpose()?,
        ..SubjectFilter::default()
    };
    let filter = Filter {
        environment: query.environment.map(EnvironmentName::parse).transpose()?,
        service: query.service.map(ServiceName::parse).transpose()?,
        kinds: Vec::new(),
        deployment: query.deployment.as_deref().map(deployment_id).transpose()?,
    };
    let head = state.commands.ledger().log().head().await?;
    if after > head {
        return Err(Problem::new(
            StatusCode::CONFLICT,
            "position_ahead",
            format!("the log ends at {head}, before {after}"),
            "start from a position that exists",
        ));
    }
    if stream {
        follow(state, &principal, after, subjects, filter).await
    } else {
        let visible = principal.visible();
        let page = pages(&state, visible, after, &subjects, &filter, limit, head).await?;
        Ok(Answer::ok(page).into_response())
    }
}

async fn pages(
    state: &AppState,
    visible: &Projects,
    after: Position,
    subjects: &SubjectFilter,
    filter: &Filter,
    limit: usize,
    head: Position,
) -> Result<CdeventPage, Problem> {
    let log = state.commands.ledger().log();
    let projections = state.projections();
    let mut cdevents = Vec::new();
    let (mut next_after, mut scanned) = (after, 0);
    while cdevents.len() < limit && scanned < SCAN_MAX {
        let batch = log.read(next_after, subjects, READ).await?;
        let ended = batch.len() < READ;
        scanned += batch.len();
        for recorded in batch {
            if cdevents.len() == limit {
                break;
            }
            // A page has an end: who asks for it would wait for nothing else.
            let waited = projections.wait_for(recorded.position, FOLD_WAIT).await;
            waited.map_err(|behind| problem::behind(behind.to_string()))?;
            cdevents.extend(translated(projections, visible, filter, &recorded)?);
            next_after = recorded.position;
        }
        if ended {
            if cdevents.len() < limit {
                next_after = next_after.max(head);
            }
            break;
        }
    }
    Ok(CdeventPage {
        cdevents,
        next_after,
        head,
    })
}

async fn follow(
    state: AppState,
    principal: &Principal,
    after: Position,
    subjects: SubjectFilter,
    filter: Filter,
) -> Result<Response, Problem> {
    let log = state.commands.ledger().log();
    let events = log.tail(after, subjects).await?;
    let projections = state.projections().clone();
    // An error is the last that a log gives, as no waiting would mend it.
    let events = events
        .inspect_err(|e| tracing::error!(error = %e, "a stream of CDEvents broke off"))
        .scan((), |(), recorded| future::ready(recorded.ok()));
    let visible = principal.visible().clone();
    let frames = events
        .then(move |recorded| {
            let (filter, projections) = (filter.clone(), projections.clone());
            let visible = visible.clone();
            async move {
                folded(&projections, recorded.position).await;
                let found = translated(&projections, &visible, &filter, &recorded);
                found.map(|cdevent| cdevent.map(|cdevent| frame(&recorded, &cdevent)))
            }
        })
        // An event that was left out would never come: the reader resumes before it.
        .inspect_err(|error| tracing::error!(%error, "a stream of CDEvents broke off"))
        .scan((), |(), frame| future::ready(frame.ok()))
        .filter_map(future::ready);
    Ok(stream_response(&state, principal, frames))
}

fn frame(recorded: &Recorded, cdevent: &Value) -> Bytes {
    sse::frame(
        &recorded.position.to_string(),
        cdevent["context"]["type"].as_str(),
        cdevent.to_string().as_bytes(),
    )
}
