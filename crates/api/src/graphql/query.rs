//! What can be asked.

use async_graphql::{Context, ID, InputObject, Object, Result};
use axum::extract::State as Held;
use daybook_events::ProjectName;

use super::asked::{Asked, asked};
use super::deploy_run::DeployRun;
use super::objects::{
    AuditEntry, AuditPage, Deployment, Environment, Event, EventPage, HistoryPage, Ledger,
    LogPosition, Route, RouteTable, SignedHead, State, Switch,
};
use super::project::{Project, is_after, most};
use crate::event_filter::{EventFilter, WantedEvents};
use crate::extract::{Named, NoParams, Params, deployment_id};
use crate::problem::Problem;
use crate::routes::history::{self, AuditQuery, HistoryQuery, StateQuery};
use crate::routes::traffic::RouteQuery;
use crate::routes::{events, projects, traffic};
use crate::state::AppState;
use crate::tlog;

/// Which events are wanted; all that is given must fit.
#[derive(Debug, Default, InputObject)]
pub(crate) struct EventsWanted {
    /// Of this project.
    project_id: Option<ID>,
    /// Of this environment.
    environment: Option<String>,
    /// About this service.
    service: Option<String>,
    /// Of this type (`deployment.requested.v1`), or of all types of an aggregate (`deployment`).
    kind: Option<String>,
    /// Of this deployment and of the run that it began.
    deployment: Option<ID>,
}

impl EventsWanted {
    pub(super) fn filter(self, asked: &Asked) -> Result<EventFilter, Problem> {
        let wanted = WantedEvents {
            project: self.project_id.map(String::from),
            environment: self.environment,
            service: self.service,
            kind: self.kind,
            deployment: self.deployment.map(String::from),
        };
        EventFilter::parse(wanted, &asked.principal)
    }
}

/// Which rows of the audit are wanted; all that is given must fit.
#[derive(Debug, Default, InputObject)]
pub(crate) struct AuditWanted {
    /// Of this project.
    project_id: Option<ID>,
    /// Of this environment.
    environment: Option<String>,
    /// Of this service.
    service: Option<String>,
    /// About this deployment.
    deployment: Option<ID>,
    /// By this actor.
    actor: Option<String>,
    /// Of this type, or of all types of an aggregate.
    kind: Option<String>,
    /// Of this request or run.
    correlation: Option<ID>,
    /// Only events that changed nothing.
    #[graphql(default)]
    void: bool,
    /// That happened at this time or later (RFC 3339).
    from: Option<String>,
    /// That happened before this time (RFC 3339).
    until: Option<String>,
}

/// The route table of a project, or the part of it that is about one instance or hostname.
pub(super) async fn route_table(
    asked: &Asked,
    project: ProjectName,
    instance_id: Option<String>,
    hostname: Option<String>,
) -> Result<RouteTable> {
    asked.may_read(&project)?;
    let query = RouteQuery {
        instance_id,
        hostname,
    };
    let state = &asked.state;
    let listed = traffic::list_routes(Held(state.clone()), Named(project), Params(query)).await?;
    let list = listed.into_body();
    asked.lists(list.routes.len() + list.switches.len())?;
    Ok(RouteTable {
        table: list.table,
        routes: list.routes.into_iter().map(Route::from).collect(),
        switches: list.switches.into_iter().map(Switch::from).collect(),
    })
}

pub(super) fn project_name(id: ID) -> Result<ProjectName, Problem> {
    Ok(ProjectName::parse(String::from(id))?)
}

/// The newest signed head.
fn signed(state: &AppState) -> Option<daybook_events::tree::SignedHead> {
    state.tree.as_ref().and_then(|tree| tree.head())
}

/// What can be asked of projects and of the ledger.
#[derive(Debug, Default)]
pub(crate) struct Reading;

/// What can be asked of projects and of the ledger.
#[Object]
impl Reading {
    /// A project.
    async fn project(&self, ctx: &Context<'_>, id: ID) -> Result<Option<Project>> {
        let Asked {
            state, principal, ..
        } = asked(ctx);
        let project = state.commands.project_seen(principal, &project_name(id)?);
        Ok(Some(Project(project.map_err(Problem::from)?)))
    }

    /// Projects, by name: all, or the `first` of them `after` a name.
    #[graphql(complexity = "super::limits::list(first, 10, child_complexity)")]
    async fn projects(
        &self,
        ctx: &Context<'_>,
        first: Option<u32>,
        after: Option<String>,
    ) -> Result<Vec<Project>> {
        let asked = asked(ctx);
        let projects = asked.state.projections().projects();
        let seen = projects.map_err(Problem::from)?.into_iter().filter(|p| {
            asked.principal.sees(&p.name) && is_after(p.name.as_str(), after.as_deref())
        });
        let projects: Vec<_> = seen.take(most(first)).map(Project).collect();
        asked.lists(projects.len())?;
        Ok(projects)
    }

    /// How a deployment does.
    async fn deploy_status(&self, ctx: &Context<'_>, id: ID) -> Result<Option<DeployRun>> {
        let row = asked(ctx).deployment(deployment_id(&id)?)?;
        Ok(Some(row.into()))
    }

    /// The environments of a project, by name.
    #[graphql(complexity = "super::limits::many(5, child_complexity)")]
    async fn environments(&self, ctx: &Context<'_>, project_id: ID) -> Result<Vec<Environment>> {
        let asked = asked(ctx);
        let project = project_name(project_id)?;
        asked.may_read(&project)?;
        let state = Held(asked.state.clone());
        let project = Named(project);
        let listed = projects::list_environments(state, project, Params(NoParams {})).await?;
        let environments = listed.into_body().environments;
        asked.lists(environments.len())?;
        Ok(environments.into_iter().map(Environment::from).collect())
    }

    /// Where the hostnames of a project lead, or of one of its instances, or one hostname.
    async fn routes(
        &self,
        ctx: &Context<'_>,
        project_id: ID,
        instance_id: Option<ID>,
        hostname: Option<String>,
    ) -> Result<Option<RouteTable>> {
        let project = project_name(project_id)?;
        let instance = instance_id.map(String::from);
        let table = route_table(asked(ctx), project, instance, hostname);
        Ok(Some(table.await?))
    }

    /// What runs where, now or, with `at` (a position or a time), as it was then.
    #[graphql(complexity = "super::limits::past(at.as_ref(), first, child_complexity)")]
    #[allow(clippy::too_many_arguments)]
    async fn state(
        &self,
        ctx: &Context<'_>,
        project_id: Option<ID>,
        environment: Option<String>,
        service: Option<String>,
        at: Option<String>,
        first: Option<u32>,
        after: Option<String>,
    ) -> Result<Option<State>> {
        let query = StateQuery {
            project: project_id.map(String::from),
            environment,
            service,
            at,
            limit: Some(first.unwrap_or(super::limits::FIRST)),
            cursor: after,
        };
        let asked = asked(ctx);
        if query.at.is_some() {
            asked.looks_back()?;
        }
        let set_aside = asked.state.projections().counters().unreadable;
        let view = history::stated(&asked.state, &asked.principal, query, set_aside).await?;
        asked.lists(view.instances.iter().map(|i| 1 + i.others.len()).sum())?;
        Ok(Some(State {
            instances: view.instances.into_iter().map(Into::into).collect(),
            next: view.next,
            position: view.position.into(),
            state_hash: view.state_hash.map(|h| h.to_string()),
        }))
    }

    /// What was deployed, newest first; with `at` (a position or a time), as that was then.
    #[graphql(complexity = "super::limits::past(at.as_ref(), first, child_complexity)")]
    #[allow(clippy::too_many_arguments)]
    async fn history(
        &self,
        ctx: &Context<'_>,
        project_id: Option<ID>,
        environment: Option<String>,
        service: Option<String>,
        version: Option<String>,
        at: Option<String>,
        first: Option<u32>,
        after: Option<String>,
    ) -> Result<Option<HistoryPage>> {
        let query = HistoryQuery {
            project: project_id.map(String::from),
            environment,
            service,
            version,
            at,
            limit: Some(first.unwrap_or(super::limits::FIRST)),
            cursor: after,
            ..HistoryQuery::default()
        };
        let asked = asked(ctx);
        if query.at.is_some() {
            asked.looks_back()?;
        }
        let (list, _) = history::listed(&asked.state, &asked.principal, query).await?;
        asked.lists(list.history.len())?;
        Ok(Some(HistoryPage {
            deployments: list.history.into_iter().map(Deployment::from).collect(),
            next: list.next,
            position: list.position.into(),
        }))
    }

    /// Who did what, when, why, and what led to it, newest first.
    #[graphql(complexity = "super::limits::search(first, child_complexity)")]
    async fn audit(
        &self,
        ctx: &Context<'_>,
        #[graphql(default)] filter: AuditWanted,
        first: Option<u32>,
        after: Option<String>,
    ) -> Result<Option<AuditPage>> {
        let Asked {
            state, principal, ..
        } = asked(ctx);
        let query = AuditQuery {
            project: filter.project_id.map(String::from),
            environment: filter.environment,
            service: filter.service,
            deployment: filter.deployment.map(String::from),
            actor: filter.actor,
            kind: filter.kind,
            correlation: filter.correlation.map(String::from),
            void: filter.void,
            from: filter.from,
            until: filter.until,
            limit: Some(first.unwrap_or(super::limits::FIRST)),
            cursor: after,
        };
        let signed = signed(state);
        let size = signed.as_ref().map_or(0, |s| s.head.size);
        let listed =
            history::list_audit(Held(state.clone()), principal.clone(), Params(query)).await?;
        let list = listed.into_body();
        asked(ctx).lists(list.audit.len())?;
        let entries = list.audit.into_iter();
        Ok(Some(AuditPage {
            entries: entries.map(|row| AuditEntry::new(row, size)).collect(),
            next: list.next,
            position: list.position.into(),
            signed: signed.map(|s| SignedHead {
                size: daybook_events::Position(s.head.size).into(),
                root: daybook_events::Digest::from_sha256(&s.head.root).to_string(),
                published_at: s.published_at,
            }),
        }))
    }

    /// The events of the ledger after a position, oldest first.
    #[graphql(complexity = "super::limits::search(first, child_complexity)")]
    async fn events(
        &self,
        ctx: &Context<'_>,
        #[graphql(default)] filter: EventsWanted,
        after: Option<LogPosition>,
        first: Option<u32>,
    ) -> Result<Option<EventPage>> {
        let asked = asked(ctx);
        let state = &asked.state;
        let after = after.map_or(daybook_events::Position::ZERO, |p| p.0);
        let limit = history::page(Some(first.unwrap_or(super::limits::FIRST)), None)?.limit();
        let filter = filter.filter(asked)?;
        let head = events::reached(state, after).await?;
        let page = events::events(state, after, filter, limit, head).await;
        let page = page.map_err(Problem::from)?;
        asked.lists(page.events.len())?;
        Ok(Some(EventPage {
            events: page.events.into_iter().map(Event::from).collect(),
            next_after: page.next_after.into(),
            head: page.head.into(),
        }))
    }

    /// What the ledger is, and how far it is signed.
    async fn ledger(&self, ctx: &Context<'_>) -> Ledger {
        let state = Held(asked(ctx).state.clone());
        let report = tlog::ledger(state, Params(NoParams {})).await;
        report.into_body().into()
    }
}
