//! What was, what is, and who did it.

use std::sync::Arc;
use std::time::Duration;

use axum::extract::State;
use axum::http::StatusCode;
use daybook_events::{EnvironmentName, InstanceRef, Position, ProjectName, Refusal, ServiceName};
use daybook_projections::{
    AuditFilter, DeploymentFilter, HistoryRow, InvalidMoment, InvalidPage, Moment, Page, PageOf,
    StateHash,
};
use jiff::{SignedDuration, Timestamp};
use serde::Deserialize;
use utoipa::IntoParams;
use uuid::Uuid;

use crate::access::Principal;
use crate::answer::Answer;
use crate::extract::{Named, NoParams, Params, deployment_id};
use crate::problem::Problem;
use crate::remembered::{Asked, Of, Sent};
use crate::state::AppState;
use crate::view::{
    AuditList, HistoryList, InstanceDetail, InstanceEntry, InstanceList, Shown, StateView,
};

type Handled<T> = Result<Answer<T>, Problem>;

/// Which instances are listed.
#[derive(Debug, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
#[serde(deny_unknown_fields)]
pub(crate) struct InstanceQuery {
    /// Of this project.
    pub(crate) project: Option<String>,
    /// In this environment.
    pub(crate) environment: Option<String>,
}

/// Which rows of the history are wanted.
#[derive(Debug, Clone, Default, PartialEq, Eq, Hash, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
#[serde(deny_unknown_fields)]
pub(crate) struct HistoryQuery {
    /// Of this instance: `project.environment.service`.
    pub(crate) instance_id: Option<String>,
    /// Of this project.
    pub(crate) project: Option<String>,
    /// Of this environment.
    pub(crate) environment: Option<String>,
    /// Of this service.
    pub(crate) service: Option<String>,
    /// Of this version: a ref, image, tag, digest or (abbreviated) commit.
    pub(crate) version: Option<String>,
    /// As it was then: a position of the ledger, or a time (RFC 3339).
    pub(crate) at: Option<String>,
    /// Most rows on a page: 1 to 500, 50 if not given.
    pub(crate) limit: Option<u32>,
    /// Where the list goes on: `next` of the page before.
    pub(crate) cursor: Option<String>,
}

/// Which rows of the audit are wanted; all that is given must fit.
#[derive(Debug, Default, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
#[serde(deny_unknown_fields)]
pub(crate) struct AuditQuery {
    /// Of this project.
    pub(crate) project: Option<String>,
    /// Of this environment.
    pub(crate) environment: Option<String>,
    /// Of this service.
    pub(crate) service: Option<String>,
    /// About this deployment.
    pub(crate) deployment: Option<String>,
    /// By this actor.
    pub(crate) actor: Option<String>,
    /// Of this type (`deployment.requested.v1`), or of all types of an aggregate (`deployment`).
    pub(crate) kind: Option<String>,
    /// Of this request or run.
    pub(crate) correlation: Option<String>,
    /// Only events that changed nothing.
    #[serde(default)]
    pub(crate) void: bool,
    /// That happened at this time or later (RFC 3339).
    pub(crate) from: Option<String>,
    /// That happened before this time (RFC 3339).
    pub(crate) until: Option<String>,
    /// Most rows on a page: 1 to 500, 50 if not given.
    pub(crate) limit: Option<u32>,
    /// Where the list goes on: `next` of the page before.
    pub(crate) cursor: Option<String>,
}

/// What part of the state is wanted.
#[derive(Debug, Clone, Default, PartialEq, Eq, Hash, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
#[serde(deny_unknown_fields)]
pub(crate) struct StateQuery {
    /// Of this project.
    pub(crate) project: Option<String>,
    /// Of this environment.
    pub(crate) environment: Option<String>,
    /// Of this service.
    pub(crate) service: Option<String>,
    /// As it was then: a position of the ledger, or a time (RFC 3339).
    pub(crate) at: Option<String>,
    /// Most instances on a page: 1 to 500, 50 if not given.
    pub(crate) limit: Option<u32>,
    /// Where the list goes on: `next` of the page before.
    pub(crate) cursor: Option<String>,
}

/// Reads which page is wanted.
pub(crate) fn page(limit: Option<u32>, cursor: Option<&str>) -> Result<Page, Problem> {
    Page::new(limit, cursor).map_err(invalid_page)
}

fn invalid_page(e: InvalidPage) -> Problem {
    let remedy = match e {
        InvalidPage::Limit => "give another limit, or none",
        InvalidPage::Cursor => "use `next` of the page before, as it is",
    };
    Problem::new(StatusCode::BAD_REQUEST, e.code(), e.to_string(), remedy)
}

/// Reads which deployments are wanted.
pub(crate) fn filter(
    instance_id: Option<String>,
    project: Option<String>,
    environment: Option<String>,
    service: Option<String>,
) -> Result<DeploymentFilter, Problem> {
    if let Some(id) = instance_id {
        if project.is_some() || environment.is_some() || service.is_some() {
            return Err(Refusal::new(
                "instance_ambiguous",
                "instance_id says already which project, environment and service",
                "give instance_id, or the parts, but not both",
            )
            .into());
        }
        return Ok(DeploymentFilter::of(&id.parse::<InstanceRef>()?));
    }
    Ok(DeploymentFilter {
        project: project.map(ProjectName::parse).transpose()?,
        environment: environment.map(EnvironmentName::parse).transpose()?,
        service: service.map(ServiceName::parse).transpose()?,
        ..DeploymentFilter::default()
    })
}

/// The longest that an answer about the past waits for the state hash there. That takes some tens of
/// milliseconds at a million events; only where the log hardly answers is there none.
const HASH_WAIT: Duration = Duration::from_secs(2);

/// How far ahead the clock of whoever asks may be of this server's.
const CLOCKS_DIFFER: SignedDuration = SignedDuration::from_secs(60);

/// The position that a moment of the past means. One that has not come is refused.
pub(crate) fn moment(state: &AppState, text: Option<String>) -> Result<Option<Position>, Problem> {
    let Some(text) = text else {
        return Ok(None);
    };
    let moment: Moment = text.parse().map_err(|e: InvalidMoment| {
        Problem::new(
            StatusCode::BAD_REQUEST,
            "invalid_at",
            e.to_string(),
            "give a position, as Daybook-Position says it, or a time as 2024-01-15T10:30:00Z",
        )
    })?;
    // What was at a time that has not come is not known: the answer would be another one by then.
    if let Moment::Time(time) = moment
        && time.duration_since(Timestamp::now()) > CLOCKS_DIFFER
    {
        return Err(Problem::new(
            StatusCode::CONFLICT,
            "position_ahead",
            format!("the ledger has no position at {time} yet: that time has not come"),
            "give a time that has passed, or none for what is now",
        ));
    }
    Ok(Some(state.commands.ledger().position_of(moment)?))
}

/// The state hash at a position of the past, if it is known in time. What was begun is worked out
/// all the same, and is at hand when it is asked for again; of what waits for its turn longer than
/// anybody asks for it, nothing is begun.
async fn past_state_hash(state: &AppState, at: Position) -> Option<StateHash> {
    let until = tokio::time::Instant::now() + HASH_WAIT;
    let turn = Arc::clone(&state.past).acquire_owned();
    let turn = tokio::time::timeout_at(until, turn).await.ok()?.ok()?;
    let ledger = state.commands.ledger().clone();
    let cancel = state.cancel.clone();
    let work = tokio::spawn(async move {
        let _turn = turn;
        tokio::select! {
            () = cancel.cancelled() => None,
            hash = ledger.state_hash_at(at) => match hash {
                Ok(hash) => Some(hash),
                Err(e) => {
                    tracing::warn!(error = &e as &dyn std::error::Error, %at, "no state hash");
                    None
                }
            },
        }
    });
    tokio::time::timeout_at(until, work).await.ok()?.ok()?
}

pub(crate) fn time(what: &str, text: Option<String>) -> Result<Option<Timestamp>, Problem> {
    let parsed = text.map(|t| t.parse::<Timestamp>()).transpose();
    parsed.map_err(|_| {
        Problem::new(
            StatusCode::BAD_REQUEST,
            "invalid_time",
            format!("{what} is not a time"),
            "write it as 2024-01-15T10:30:00Z",
        )
    })
}

/// Every service in every environment of its project: what can be deployed to.
#[utoipa::path(get, path = "/api/v1/instances", tag = "history", params(InstanceQuery),
    responses((status = 200, description = "The instances.", body = InstanceList)))]
pub(crate) async fn list_instances(
    State(state): State<AppState>,
    principal: Principal,
    Params(query): Params<InstanceQuery>,
) -> Handled<InstanceList> {
    let wanted = query.environment.map(EnvironmentName::parse).transpose()?;
    let projections = state.projections();
    let projects = match query.project.map(ProjectName::parse).transpose()? {
        Some(name) => vec![state.commands.project_seen(&principal, &name)?],
        None => projections.projects()?,
    };
    let projects = projects.into_iter().filter(|p| principal.sees(&p.name));
    let mut instances = Vec::new();
    for project in projects {
        let routing = projections.routing(&project.name)?;
        for environment in projections.environments(&project.name)? {
            if wanted.as_ref().is_some_and(|w| *w != environment.name) {
                continue;
            }
            for service in project.services.keys() {
                let instance = InstanceRef {
                    project: project.name.clone(),
                    environment: environment.name.clone(),
                    service: service.clone(),
                };
                let traffic = routing.as_ref().and_then(|r| r.traffic(&instance));
                instances.push(InstanceEntry {
                    instance_id: instance.to_string(),
                    main: traffic.and_then(|t| t.main),
                    rolled_back: traffic.is_some_and(|t| t.rolled_back),
                    project: instance.project,
                    environment: instance.environment,
                    service: instance.service,
                });
            }
        }
    }
    Ok(Answer::ok(InstanceList { instances }))
}

/// One instance, with the deployments that run there or may run again.
#[utoipa::path(get, path = "/api/v1/instances/{instance_id}", tag = "history",
    params(("instance_id" = String, Path, description = "`project.environment.service`")),
    responses((status = 200, description = "The instance.", body = InstanceDetail)))]
pub(crate) async fn get_instance(
    State(state): State<AppState>,
    Named(instance): Named<InstanceRef>,
    Params(NoParams {}): Params<NoParams>,
) -> Handled<InstanceDetail> {
    state.commands.instance(&instance)?;
    let projections = state.projections();
    let routing = projections.routing(&instance.project)?;
    let traffic = routing.as_ref().and_then(|r| r.traffic(&instance));
    let rows = projections.active_of(&instance)?;
    let mut shown = Shown::new(projections, &state.settings);
    let deployments: Result<_, _> = rows.iter().map(|row| shown.entry(row)).collect();
    Ok(Answer::ok(InstanceDetail {
        entry: InstanceEntry {
            instance_id: instance.to_string(),
            main: traffic.and_then(|t| t.main),
            rolled_back: traffic.is_some_and(|t| t.rolled_back),
            project: instance.project,
            environment: instance.environment,
            service: instance.service,
        },
        former: traffic.map_or_else(Vec::new, |t| t.former.clone()),
        deployments: deployments?,
    }))
}

/// What was deployed, newest first: one row for each deployment, with its image, its commits and
/// how it ended. With `at`, as that was then.
#[utoipa::path(get, path = "/api/v1/history", tag = "history", params(HistoryQuery),
    responses((status = 200, description = "The history.", body = HistoryList)))]
pub(crate) async fn list_history(
    State(state): State<AppState>,
    principal: Principal,
    Params(mut query): Params<HistoryQuery>,
) -> Result<Sent, Problem> {
    let at = moment(&state, query.at.take())?;
    query.at = at.map(|at| at.to_string());
    let project = query.project.clone();
    let of = Of::History(query.clone());
    let work = async {
        let (list, at) = listed(&state, &principal, query).await?;
        let hash = match at {
            Some(at) => past_state_hash(&state, at).await,
            None => state.projections().recent_state_hash(list.position),
        };
        Sent::new(&list, list.position, hash)
    };
    remembered(&state, &principal, at, project, of, work).await
}

/// The answer to a question about the past, or about now, which is worked out if it is not remembered.
async fn remembered(
    state: &AppState,
    principal: &Principal,
    at: Option<Position>,
    project: Option<String>,
    of: Of,
    work: impl Future<Output = Result<Sent, Problem>>,
) -> Result<Sent, Problem> {
    let projections = state.projections();
    let asked = |position| Asked {
        of,
        visible: principal.visible().clone(),
        position,
    };
    if let Some(at) = at {
        return state.answers.to(asked(at), work).await;
    }
    // What is no name is refused below.
    let Some(project) = project.and_then(|name| ProjectName::parse(name).ok()) else {
        return state.answers.to(asked(projections.position()), work).await;
    };
    let (since, now) = projections.unchanged_since(&project);
    let work = async {
        let sent = work.await?;
        let (since, _) = projections.unchanged_since(&project);
        Ok(sent.unchanged_since(since))
    };
    let hash = |position| projections.recent_state_hash(position);
    state.answers.to_now(asked(since), now, hash, work).await
}

/// The page of the history that a query asks for, and the position that it is of, if that is one of
/// the past.
pub(crate) async fn listed(
    state: &AppState,
    principal: &Principal,
    query: HistoryQuery,
) -> Result<(HistoryList, Option<Position>), Problem> {
    let filter = DeploymentFilter {
        visible: principal.visible().clone(),
        version: query.version,
        ..filter(
            query.instance_id,
            query.project,
            query.environment,
            query.service,
        )?
    };
    let page = page(query.limit, query.cursor.as_deref())?;
    let at = moment(state, query.at)?;
    let found: PageOf<HistoryRow> = match at {
        Some(at) => {
            let ledger = state.commands.ledger();
            ledger.history_at(at, &filter, page).await?
        }
        None => {
            // Where few of many fit, looking takes its time: others are not held up by it.
            let projections = state.projections().clone();
            let look = move || projections.history(&filter, page);
            let looked = tokio::task::spawn_blocking(look).await;
            looked.map_err(|e| Problem::internal(&e))??
        }
    };
    let list = HistoryList {
        history: found.items,
        next: found.next.map(|c| c.to_string()),
        position: found.position,
    };
    Ok((list, at))
}

/// Rows of the audit that one answer looks at, about: what it did not get to comes with the next
/// page. One may have few rows, or none, and still not be the last.
const AUDIT_LOOK: usize = 20_000;

/// Who did what, when, why, and what led to it, newest first: one row for each event.
#[utoipa::path(get, path = "/api/v1/audit", tag = "history", params(AuditQuery),
    responses((status = 200, description = "The audit.", body = AuditList)))]
pub(crate) async fn list_audit(
    State(state): State<AppState>,
    principal: Principal,
    Params(query): Params<AuditQuery>,
) -> Handled<AuditList> {
    let correlation = query.correlation.map(|c| c.parse::<Uuid>()).transpose();
    let filter = AuditFilter {
        visible: principal.visible().clone(),
        project: query.project.map(ProjectName::parse).transpose()?,
        environment: query.environment.map(EnvironmentName::parse).transpose()?,
        service: query.service.map(ServiceName::parse).transpose()?,
        deployment: query.deployment.as_deref().map(deployment_id).transpose()?,
        actor: query.actor,
        kind: query.kind,
        correlation: correlation.map_err(|_| {
            Problem::new(
                StatusCode::BAD_REQUEST,
                "invalid_correlation",
                "correlation is not a UUID",
                "use the correlation of a row of the audit",
            )
        })?,
        void_only: query.void,
        from: time("from", query.from)?,
        until: time("until", query.until)?,
    };
    let page = page(query.limit, query.cursor.as_deref())?;
    // Reading takes its time where little fits: others are not held up by it.
    let projections = state.projections().clone();
    let look = move || projections.audit_within(&filter, page, AUDIT_LOOK);
    let looked = tokio::task::spawn_blocking(look).await;
    let found = looked.map_err(|e| Problem::internal(&e))??;
    Ok(Answer::ok(AuditList {
        audit: found.items,
        next: found.next.map(|c| c.to_string()),
        position: found.position,
    }))
}

/// What runs where, now or at a moment of the past, with the three answers to "is it up?" for each
/// deployment.
#[utoipa::path(get, path = "/api/v1/state", tag = "history", params(StateQuery),
    responses((status = 200, description = "The state.", body = StateView)))]
pub(crate) async fn get_state(
    State(state): State<AppState>,
    principal: Principal,
    Params(mut query): Params<StateQuery>,
) -> Result<Sent, Problem> {
    let at = moment(&state, query.at.take())?;
    query.at = at.map(|at| at.to_string());
    let project = query.project.clone();
    let set_aside = state.projections().counters().unreadable;
    let of = Of::State {
        query: query.clone(),
        set_aside,
    };
    let work = async {
        let view = stated(&state, &principal, query, set_aside).await?;
        Sent::new(&view, view.position, view.state_hash)
    };
    remembered(&state, &principal, at, project, of, work).await
}

/// The part of the state that a query asks for, where so many events are set aside.
pub(crate) async fn stated(
    state: &AppState,
    principal: &Principal,
    query: StateQuery,
    set_aside: u64,
) -> Result<StateView, Problem> {
    let project = query.project.map(ProjectName::parse).transpose()?;
    let environment = query.environment.map(EnvironmentName::parse).transpose()?;
    let service = query.service.map(ServiceName::parse).transpose()?;
    let limit = page(query.limit, None)?.limit();
    // Instances are ordered by name, so the last one shown says where the list goes on, whatever
    // is deployed meanwhile.
    let after: Option<InstanceRef> = query
        .cursor
        .map(|c| c.parse().map_err(|_| invalid_page(InvalidPage::Cursor)))
        .transpose()?;
    let at = moment(state, query.at)?;
    let (overview, hash) = match at {
        None => {
            let projections = state.projections();
            let overview = projections.overview(project.as_ref(), environment.as_ref())?;
            let hash = projections.recent_state_hash(overview.position);
            (overview, hash)
        }
        Some(at) => {
            let ledger = state.commands.ledger();
            let overview = ledger.overview_at(at, project.as_ref(), environment.as_ref());
            let (overview, hash) = tokio::join!(overview, past_state_hash(state, at));
            (overview?, hash)
        }
    };
    let mut wanted = overview
        .instances
        .into_iter()
        .filter(|i| principal.sees(&i.instance.project))
        .filter(|i| {
            environment
                .as_ref()
                .is_none_or(|e| *e == i.instance.environment)
        })
        .filter(|i| service.as_ref().is_none_or(|s| *s == i.instance.service))
        .filter(|i| after.as_ref().is_none_or(|a| i.instance > *a));
    let instances: Vec<_> = wanted.by_ref().take(limit).collect();
    let next = match wanted.next() {
        Some(_) => instances.last().map(|i| i.id.clone()),
        None => None,
    };
    Ok(StateView {
        instances,
        next,
        position: overview.position,
        state_hash: hash,
        set_aside,
    })
}
