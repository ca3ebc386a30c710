//! The queries. Each is answered from rows that belong to one position.

use std::collections::{BTreeMap, HashMap};
use std::ops::ControlFlow;
use std::sync::Arc;

use daybook_events::access::Projects;
use daybook_events::build::Build;
use daybook_events::deployment::{Deployment, Operation, Possibility, SourceCommit, Status};
use daybook_events::domain::Domain;
use daybook_events::environment::Environment;
use daybook_events::gitops::Gitops;
use daybook_events::project::Project;
use daybook_events::routing::Routing;
use daybook_events::subscription::Subscription;
use daybook_events::{
    Aggregate, AggregateKind, BuildId, DeploymentId, EnvironmentName, EventId, Folded, Hostname,
    InstanceRef, Position, ProjectName, ServiceName, Subject, SubscriptionId,
};
use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::audit::{AuditFilter, AuditRow};
use crate::chunk;
use crate::fold::deployment_of;
use crate::keys::{self, Scope};
use crate::page::{Cursor, Page, PageOf};
use crate::reached::Reached;
use crate::slot;
use crate::store::{Projections, QueryError};
use crate::table::{Way, decode, decode_part};
use crate::terms;
use crate::views::{DeploymentView, HistoryRow, InstanceView, Overview, version_text};

/// A deployment with its place in the ledger and in traffic.
#[derive(Debug, Clone)]
pub struct DeploymentRow {
    /// Its id.
    pub id: DeploymentId,
    /// Its subject.
    pub subject: Subject,
    /// Its state.
    pub state: Deployment,
    /// Its revision.
    pub revision: u32,
    /// Position of its last event.
    pub position: Position,
    /// Position of its request, by which deployments are ordered.
    pub created: Position,
    /// Whether it is the main deployment of its instance.
    pub main: bool,
    /// Whether it has all that making it the main deployment would give it.
    pub wholly_main: bool,
    /// The hostnames that lead to it.
    pub hostnames: Vec<Hostname>,
    /// The commit that it was made from: its own, or that of the deployment that it was promoted
    /// from or repeats. None if that is not known, or not yet.
    pub source: Option<SourceCommit>,
    /// When it was first seen to get somewhere; of a past state nothing is said.
    pub reached: Reached,
}

impl DeploymentRow {
    /// A deployment with its revision, the positions of its last event and of its request, what
    /// its project's route table says of it, whether its environment is the live one, and the
    /// commit of the deployment whose image it has. Only of the main deployment it matters what
    /// the environment is.
    pub(crate) fn new(
        id: DeploymentId,
        subject: Subject,
        state: Deployment,
        (revision, position, created): (u32, Position, Position),
        routing: Option<&Routing>,
        live: bool,
        inherited: Option<SourceCommit>,
    ) -> Self {
        let source = state.source.clone().or(inherited);
        let traffic = routing.and_then(|r| r.traffic(&state.request.instance));
        let main = traffic.is_some_and(|t| t.main == Some(id));
        let wholly_main = main
            && !traffic.is_some_and(|t| t.rolled_back)
            && routing.is_some_and(|r| r.leads_wholly_to(id, &state.request.instance, live));
        let hostnames = routing.map_or_else(Vec::new, |r| {
            let found = r.hostnames_of(id).into_iter();
            found.map(|(hostname, _)| hostname.clone()).collect()
        });
        Self {
            id,
            subject,
            state,
            revision,
            position,
            created,
            main,
            wholly_main,
            hostnames,
            source,
            reached: Reached::default(),
        }
    }

    /// What can be done to it now and would change something.
    pub fn operations(&self) -> Vec<Operation> {
        let mut all = self.state.operations();
        all.retain(|operation| !(self.wholly_main && *operation == Operation::MarkMain));
        all
    }

    /// Each operation, with whether it is possible now, and if not, why and what would make it so.
    pub fn possibilities(&self) -> Vec<Possibility> {
        let mut all = self.state.possibilities();
        for p in &mut all {
            if self.wholly_main && p.possible && p.name == Operation::MarkMain {
                p.possible = false;
                p.reason = Some("it is the main deployment already".to_owned());
                p.remedy = Some("nothing is left to be done: the traffic goes to it".to_owned());
            }
        }
        all
    }

    /// The row as it is sent.
    pub fn view(&self) -> DeploymentView {
        DeploymentView {
            source_commit: self.source.as_ref().map(|s| s.commit.clone()),
            operations: self.operations(),
            ..DeploymentView::new(self.id, self.created, &self.state, self.hostnames.clone())
        }
    }
}

/// Which deployments are wanted; all that is given must fit.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct DeploymentFilter {
    /// Only of projects that whoever asks may see.
    pub visible: Projects,
    /// Of this project.
    pub project: Option<ProjectName>,
    /// Of this environment.
    pub environment: Option<EnvironmentName>,
    /// Of this service.
    pub service: Option<ServiceName>,
    /// In one of these states; empty for all.
    pub statuses: Vec<Status>,
    /// Of this version: the ref or image that was asked for, the image's tag or digest, or the
    /// source's commit, also abbreviated to at least seven digits.
    pub version: Option<String>,
}

impl DeploymentFilter {
    /// All deployments of one instance.
    pub fn of(instance: &InstanceRef) -> Self {
        Self {
            project: Some(instance.project.clone()),
            environment: Some(instance.environment.clone()),
            service: Some(instance.service.clone()),
            ..Self::default()
        }
    }

    fn instance(&self) -> Option<InstanceRef> {
        Some(InstanceRef {
            project: self.project.clone()?,
            environment: self.environment.clone()?,
            service: self.service.clone()?,
        })
    }

    /// The narrowest index that lists all that may fit.
    fn scope<'a>(&'a self, instance: Option<&'a InstanceRef>) -> Scope<'a> {
        match (instance, &self.project, &self.environment) {
            (Some(i), _, _) => Scope::Instance(i),
            (None, Some(p), Some(e)) => Scope::Environment(p, e),
            (None, Some(p), None) => Scope::Project(p),
            (None, None, _) => Scope::All,
        }
    }

    fn fits_instance(&self, i: &InstanceRef) -> bool {
        self.visible.contains(&i.project)
            && self.project.as_ref().is_none_or(|p| *p == i.project)
            && self
                .environment
                .as_ref()
                .is_none_or(|e| *e == i.environment)
            && self.service.as_ref().is_none_or(|s| *s == i.service)
    }

    fn fits(&self, status: Status, version: &str, found: Versions<'_>) -> bool {
        (self.statuses.is_empty() || self.statuses.contains(&status))
            && self.version.as_ref().is_none_or(|v| {
                v == version
                    || Some(v.as_str()) == found.tag
                    || Some(v.as_str()) == found.digest
                    || found
                        .commit
                        .is_some_and(|c| v.len() >= 7 && c.starts_with(v.as_str()))
            })
    }

    fn fits_deployment(&self, row: &DeploymentRow) -> bool {
        let state = &row.state;
        let found = Versions {
            tag: state.image.as_ref().map(|i| i.tag.as_str()),
            digest: state.digest().map(|d| d.as_str()),
            commit: row.source.as_ref().map(|s| s.commit.as_str()),
        };
        self.fits(state.status, &version_text(state), found)
    }

    pub(crate) fn fits_history(&self, row: &HistoryRow) -> bool {
        let found = Versions {
            tag: row.image_tag.as_ref().map(|t| t.as_str()),
            digest: row.digest.as_ref().map(|d| d.as_str()),
            commit: row.source_commit.as_ref().map(|c| c.as_str()),
        };
        self.fits(row.status, &row.version, found)
    }
}

/// What a deployment's version may be called.
struct Versions<'a> {
    tag: Option<&'a str>,
    digest: Option<&'a str>,
    commit: Option<&'a str>,
}

/// An event that carried an idempotency key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EventRef {
    /// Where it stands.
    pub position: Position,
    /// The aggregate that it belongs to.
    pub subject: Subject,
    /// Digest of the request that it was made for.
    pub request_digest: String,
    /// The request or run that it began.
    pub correlation: Uuid,
}

/// The row of an [`EventRef`].
#[derive(Serialize, Deserialize)]
pub(crate) struct EventRefRow(Position, String, String, Uuid);

impl EventRef {
    pub(crate) fn row(
        position: Position,
        subject: &Subject,
        digest: &str,
        correlation: Uuid,
    ) -> EventRefRow {
        EventRefRow(
            position,
            subject.to_string(),
            digest.to_owned(),
            correlation,
        )
    }
}

fn damaged(what: impl Into<String>) -> QueryError {
    QueryError::Damaged(what.into())
}

/// Reads the value of an index row.
pub(crate) fn listed(value: &[u8]) -> Result<(DeploymentId, InstanceRef), QueryError> {
    let bad = || damaged("an index of deployments");
    let (id, instance) = value.split_at_checked(16).ok_or_else(bad)?;
    let id = Uuid::from_slice(id).map_err(|_| bad())?;
    let text = std::str::from_utf8(instance).map_err(|_| bad())?;
    Ok((DeploymentId(id), text.parse().map_err(|_| bad())?))
}

impl Projections {
    /// The state of an aggregate, with its revision and its last position: what a decision and
    /// the append after it need. An aggregate without events has no state and revision 0.
    ///
    /// This is a copy; [`Self::shared`] is the same without one.
    pub fn folded<A: Aggregate>(&self, subject: &Subject) -> Result<Folded<A>, QueryError> {
        Ok(Arc::unwrap_or_clone(self.shared(subject)?))
    }

    fn row(
        &self,
        id: DeploymentId,
        instance: &InstanceRef,
        routing: Option<&Routing>,
    ) -> Result<Option<DeploymentRow>, QueryError> {
        let subject = deployment_of(instance, id);
        let (folded, created, source, reached) = match self.live(&subject) {
            Some(live) => {
                let folded = live.folded::<Deployment>();
                (folded, live.created, live.source, live.reached)
            }
            None => {
                let row = keys::state(&subject).map(|k| self.inner.table.get(&k));
                let Some(row) = row.transpose()?.flatten() else {
                    return Ok(None);
                };
                let mut rest = &row[..];
                let folded: Arc<Folded<Deployment>> = decode_part(&mut rest)?;
                let origin: Option<slot::Origin> = decode_part(&mut rest)?;
                match origin {
                    Some(o) => (Some(folded), Some(o.created), o.source, o.reached),
                    None => (Some(folded), None, None, Reached::default()),
                }
            }
        };
        let (Some(folded), Some(created)) = (folded, created) else {
            return Ok(None);
        };
        let Some(state) = folded.state.clone() else {
            return Ok(None);
        };
        let place = (folded.revision, folded.position, created);
        let traffic = routing.and_then(|r| r.traffic(instance));
        let live = traffic.is_some_and(|t| t.main == Some(id)) && self.is_live(instance)?;
        let mut row = DeploymentRow::new(id, subject, state, place, routing, live, source);
        row.reached = reached;
        Ok(Some(row))
    }

    /// Whether an instance's environment is the live one of its project.
    fn is_live(&self, instance: &InstanceRef) -> Result<bool, QueryError> {
        let (project, environment) = (instance.project.clone(), instance.environment.clone());
        let folded = self.shared::<Environment>(&Subject::Environment(project, environment))?;
        Ok(folded.state.as_ref().is_some_and(|e| e.spec.live))
    }

    fn routing_of(&self, project: &ProjectName) -> Result<Arc<Folded<Routing>>, QueryError> {
        self.shared(&Subject::Routing(project.clone()))
    }

    /// A deployment by its id.
    pub fn deployment(&self, id: DeploymentId) -> Result<Option<DeploymentRow>, QueryError> {
        let _gate = self.gate();
        let Some(place) = self.inner.table.get(&keys::deployment(id))? else {
            return Ok(None);
        };
        let (_, instance): (Position, String) = decode(&place)?;
        let instance: InstanceRef = instance
            .parse()
            .map_err(|_| damaged("the place of a deployment"))?;
        let routing = self.routing_of(&instance.project)?;
        self.row(id, &instance, routing.state.as_ref())
    }

    /// Deployments, newest first.
    pub fn deployments(
        &self,
        filter: &DeploymentFilter,
        page: Page,
    ) -> Result<PageOf<DeploymentRow>, QueryError> {
        let _gate = self.gate();
        let mut routing = Routings::default();
        self.list(filter, page, |id, instance, _| {
            let routing = routing.of(self, &instance.project)?;
            let row = self.row(id, instance, routing)?;
            Ok(row.filter(|r| filter.fits_deployment(r)))
        })
    }

    /// The history, newest first.
    pub fn history(
        &self,
        filter: &DeploymentFilter,
        page: Page,
    ) -> Result<PageOf<HistoryRow>, QueryError> {
        let _gate = self.gate();
        self.list(filter, page, |_, _, created| {
            let Some(json) = self.inner.table.get(&keys::history(created))? else {
                return Ok(None);
            };
            let row: HistoryRow =
                serde_json::from_slice(&json).map_err(|e| damaged(e.to_string()))?;
            Ok(Some(row).filter(|r| filter.fits_history(r)))
        })
    }

    /// Deployments of the instances that a filter names, requested before a position, newest first.
    pub(crate) fn listed_below(
        &self,
        below: Position,
        filter: &DeploymentFilter,
        most: usize,
    ) -> Result<Vec<(DeploymentId, InstanceRef, Position)>, QueryError> {
        let instance = filter.instance();
        let scope = filter.scope(instance.as_ref());
        let from = keys::listed(scope, below);
        let mut found = Vec::new();
        let mut visit = |key: &[u8], value: &[u8]| -> Result<bool, QueryError> {
            let (id, instance) = listed(value)?;
            if filter.fits_instance(&instance) {
                let created =
                    keys::position_of(key).ok_or_else(|| damaged("an index of deployments"))?;
                found.push((id, instance, created));
            }
            Ok(found.len() == most)
        };
        let ended = self.inner.table.scan(
            &scope.listed(),
            Some(&from),
            Way::Down,
            |key, value| match visit(key, value) {
                Ok(false) => ControlFlow::Continue(()),
                Ok(true) => ControlFlow::Break(Ok(())),
                Err(e) => ControlFlow::Break(Err(e)),
            },
        )?;
        ended.transpose()?;
        Ok(found)
    }

    /// Walks the narrowest index for a filter from a page's cursor on.
    fn list<T>(
        &self,
        filter: &DeploymentFilter,
        page: Page,
        mut make: impl FnMut(DeploymentId, &InstanceRef, Position) -> Result<Option<T>, QueryError>,
    ) -> Result<PageOf<T>, QueryError> {
        let instance = filter.instance();
        let scope = filter.scope(instance.as_ref());
        let only_active =
            !filter.statuses.is_empty() && filter.statuses.iter().all(|s| slot::is_active(*s));
        let prefix = if only_active {
            scope.active()
        } else {
            scope.listed()
        };
        let from = page.after.map(|p| {
            let mut key = prefix.clone();
            key.extend_from_slice(&p.0.to_be_bytes());
            key
        });
        let mut items = Vec::new();
        let mut next = None;
        let mut last = Position::ZERO;
        let failed = self
            .inner
            .table
            .scan(&prefix, from.as_deref(), Way::Down, |key, value| {
                let mut visit = || {
                    let (id, instance) = listed(value)?;
                    let created =
                        keys::position_of(key).ok_or_else(|| damaged("an index of deployments"))?;
                    if filter.fits_instance(&instance)
                        && let Some(item) = make(id, &instance, created)?
                    {
                        if items.len() == page.limit() {
                            next = Some(Cursor(last));
                            return Ok(true);
                        }
                        last = created;
                        items.push(item);
                    }
                    Ok(false)
                };
                match visit() {
                    Ok(false) => ControlFlow::Continue(()),
                    Ok(true) => ControlFlow::Break(None),
                    Err(e) => ControlFlow::Break(Some(e)),
                }
            })?;
        match failed.flatten() {
            Some(e) => Err(e),
            None => Ok(PageOf {
                items,
                next,
                position: self.position(),
            }),
        }
    }

    fn active_in(&self, scope: Scope<'_>) -> Result<Vec<DeploymentRow>, QueryError> {
        self.active_if(scope, |_, _| Ok(true))
    }

    fn active_if(
        &self,
        scope: Scope<'_>,
        wanted: impl Fn(DeploymentId, &InstanceRef) -> Result<bool, QueryError>,
    ) -> Result<Vec<DeploymentRow>, QueryError> {
        let mut found = Vec::new();
        self.inner
            .table
            .scan::<()>(&scope.active(), None, Way::Down, |_, value| {
                found.push(value.clone());
                ControlFlow::Continue(())
            })?;
        let mut routing = Routings::default();
        let mut rows = Vec::with_capacity(found.len());
        for value in found {
            let (id, instance) = listed(&value)?;
            if wanted(id, &instance)? {
                let routing = routing.of(self, &instance.project)?;
                rows.extend(self.row(id, &instance, routing)?);
            }
        }
        Ok(rows)
    }

    /// The deployments that run, can run again or are on their way to run, newest first: all, or
    /// those of a project, or of one of its environments.
    pub fn active_deployments(
        &self,
        project: Option<&ProjectName>,
        environment: Option<&EnvironmentName>,
    ) -> Result<Vec<DeploymentRow>, QueryError> {
        let _gate = self.gate();
        self.active_where(project, environment)
    }

    /// The deployments whose pipeline still has work to do, newest first.
    pub fn pipeline(&self) -> Result<Vec<DeploymentRow>, QueryError> {
        let _gate = self.gate();
        self.active_if(Scope::All, |id, instance| {
            let folded = self.shared::<Deployment>(&deployment_of(instance, id))?;
            Ok(folded
                .state
                .as_ref()
                .is_some_and(|s| s.status.in_pipeline()))
        })
    }

    fn active_where(
        &self,
        project: Option<&ProjectName>,
        environment: Option<&EnvironmentName>,
    ) -> Result<Vec<DeploymentRow>, QueryError> {
        let mut rows = self.active_in(match (project, environment) {
            (None, _) => Scope::All,
            (Some(p), None) => Scope::Project(p),
            (Some(p), Some(e)) => Scope::Environment(p, e),
        })?;
        if let Some(e) = environment {
            rows.retain(|r| r.state.request.instance.environment == *e);
        }
        Ok(rows)
    }

    /// The deployments that run, can run again or are on their way to run, of one instance.
    pub fn active_of(&self, instance: &InstanceRef) -> Result<Vec<DeploymentRow>, QueryError> {
        let _gate = self.gate();
        self.active_in(Scope::Instance(instance))
    }

    /// The deployments in the pipeline that wait for a build.
    pub fn deployments_of_build(&self, id: BuildId) -> Result<Vec<DeploymentId>, QueryError> {
        let mut found = Vec::new();
        self.inner
            .table
            .scan::<()>(&keys::waiting_for(id), None, Way::Up, |key, _| {
                found.extend(key.get(17..).and_then(|k| Uuid::from_slice(k).ok()));
                ControlFlow::Continue(())
            })?;
        Ok(found.into_iter().map(DeploymentId).collect())
    }

    /// The deployments of a project whose plans wait to be allowed.
    pub fn undecided(&self, project: &ProjectName) -> Result<Vec<DeploymentId>, QueryError> {
        let prefix = keys::undecided_of(project);
        let mut found = Vec::new();
        self.inner
            .table
            .scan::<()>(&prefix, None, Way::Up, |key, _| {
                let id = key.strip_prefix(prefix.as_slice());
                found.extend(id.and_then(|id| Uuid::from_slice(id).ok()));
                ControlFlow::Continue(())
            })?;
        Ok(found.into_iter().map(DeploymentId).collect())
    }

    /// The deployments that wait for a time, the earliest first, at most so many. The times are
    /// exact to the microsecond.
    pub fn timers(&self, most: usize) -> Result<Vec<(Timestamp, DeploymentId)>, QueryError> {
        let mut found = Vec::new();
        let timer = |key: &[u8]| {
            let (due, id) = key.strip_prefix(keys::TIMERS)?.split_first_chunk::<8>()?;
            let due = i64::try_from(u64::from_be_bytes(*due)).ok()?;
            let due = Timestamp::from_microsecond(due).ok()?;
            Some((due, DeploymentId(Uuid::from_slice(id).ok()?)))
        };
        self.inner
            .table
            .scan::<()>(keys::TIMERS, None, Way::Up, |key, _| {
                found.extend(timer(key));
                if found.len() < most {
                    ControlFlow::Continue(())
                } else {
                    ControlFlow::Break(())
                }
            })?;
        Ok(found)
    }

    fn states<A: Aggregate>(
        &self,
        kind: AggregateKind,
        project: Option<&ProjectName>,
    ) -> Result<Vec<A>, QueryError> {
        let mut rows = Vec::new();
        self.inner
            .table
            .scan::<()>(&keys::states(kind, project), None, Way::Up, |_, value| {
                rows.push(value.clone());
                ControlFlow::Continue(())
            })?;
        let mut states = Vec::with_capacity(rows.len());
        for row in rows {
            states.extend(decode::<Folded<A>>(&row)?.state);
        }
        Ok(states)
    }

    /// All projects, by name.
    pub fn projects(&self) -> Result<Vec<Project>, QueryError> {
        self.states(AggregateKind::Project, None)
    }

    /// A project.
    pub fn project(&self, name: &ProjectName) -> Result<Option<Project>, QueryError> {
        let subject = Subject::Project(name.clone());
        Ok(self.folded::<Project>(&subject)?.state)
    }

    /// The environments of a project, by name.
    pub fn environments(&self, project: &ProjectName) -> Result<Vec<Environment>, QueryError> {
        self.states(AggregateKind::Environment, Some(project))
    }

    /// The environments of all projects, by project and name.
    pub fn all_environments(&self) -> Result<Vec<Environment>, QueryError> {
        self.states(AggregateKind::Environment, None)
    }

    /// An environment.
    pub fn environment(
        &self,
        project: &ProjectName,
        name: &EnvironmentName,
    ) -> Result<Option<Environment>, QueryError> {
        let subject = Subject::Environment(project.clone(), name.clone());
        Ok(self.folded::<Environment>(&subject)?.state)
    }

    /// A build with its project. Where several projects build the same for themselves, it is the
    /// first by name; use [`Self::folded`] for a certain one.
    pub fn build(&self, id: BuildId) -> Result<Option<(ProjectName, Build)>, QueryError> {
        let project = self
            .inner
            .table
            .scan(&keys::builds(id), None, Way::Up, |key, _| {
                ControlFlow::Break(String::from_utf8_lossy(&key[17..]).into_owned())
            })?;
        let Some(project) = project else {
            return Ok(None);
        };
        let project = ProjectName::parse(project).map_err(|e| damaged(e.to_string()))?;
        let subject = Subject::Build(project.clone(), id);
        let build = self.folded::<Build>(&subject)?.state;
        Ok(build.map(|b| (project, b)))
    }

    /// The GitOps repository of a project, as the ledger knows it.
    pub fn gitops(&self, project: &ProjectName) -> Result<Option<Gitops>, QueryError> {
        let subject = Subject::Gitops(project.clone());
        Ok(self.folded::<Gitops>(&subject)?.state)
    }

    /// The hostnames that owners brought along, by name, also those that are free again.
    pub fn domains(&self) -> Result<Vec<Domain>, QueryError> {
        self.states(AggregateKind::Domain, None)
    }

    /// Whose a hostname is.
    pub fn domain(&self, hostname: &Hostname) -> Result<Option<Domain>, QueryError> {
        let subject = Subject::Domain(hostname.clone());
        Ok(self.folded::<Domain>(&subject)?.state)
    }

    /// The webhooks of a project, or of all, also those that were deleted, with their project.
    pub fn subscriptions(
        &self,
        project: Option<&ProjectName>,
    ) -> Result<Vec<(ProjectName, Subscription)>, QueryError> {
        let mut found = Vec::new();
        let kind = AggregateKind::Subscription;
        self.inner.table.scan::<()>(
            &keys::states(kind, project),
            None,
            Way::Up,
            |key, value| {
                found.push((key.to_vec(), value.clone()));
                ControlFlow::Continue(())
            },
        )?;
        let mut rows = Vec::with_capacity(found.len());
        for (key, value) in found {
            let name = key.get(2..).and_then(|k| k.split(|b| *b == b'.').next());
            let name = String::from_utf8_lossy(name.unwrap_or_default());
            let project = ProjectName::parse(name).map_err(|e| damaged(e.to_string()))?;
            let state = decode_part::<Folded<Subscription>>(&mut &value[..])?.state;
            rows.extend(state.map(|s| (project, s)));
        }
        Ok(rows)
    }

    /// A webhook with its project; also one that was deleted.
    pub fn subscription(
        &self,
        id: SubscriptionId,
    ) -> Result<Option<(ProjectName, Subscription)>, QueryError> {
        let Some(project) = self.project_of(id)? else {
            return Ok(None);
        };
        let subject = Subject::Subscription(project.clone(), id);
        let state = self.folded::<Subscription>(&subject)?.state;
        Ok(state.map(|s| (project, s)))
    }

    /// Whose a webhook is.
    pub fn project_of(&self, id: SubscriptionId) -> Result<Option<ProjectName>, QueryError> {
        let Some(name) = self.inner.table.get(&keys::subscription(id))? else {
            return Ok(None);
        };
        let name = String::from_utf8_lossy(&name).into_owned();
        let project = ProjectName::parse(name).map_err(|e| damaged(e.to_string()))?;
        Ok(Some(project))
    }

    /// The route table of a project.
    pub fn routing(&self, project: &ProjectName) -> Result<Option<Routing>, QueryError> {
        Ok(self.routing_of(project)?.state.clone())
    }

    /// The event with this id, if it carried an idempotency key; or, if that one is void, the one
    /// that was appended in its stead, if there is one yet.
    pub fn event_by_id(&self, mut id: EventId) -> Result<Option<EventRef>, QueryError> {
        while let Some(row) = self.inner.table.get(&keys::request(id))? {
            let EventRefRow(position, subject, request_digest, correlation) = decode(&row)?;
            if self.is_void(position)? {
                id = id.in_its_stead();
                continue;
            }
            return Ok(Some(EventRef {
                position,
                subject: subject
                    .parse()
                    .map_err(|_| damaged("the subject of a request"))?,
                request_digest,
                correlation,
            }));
        }
        Ok(None)
    }

    /// Whether the event at a position changed nothing. Events that are not folded yet are not void.
    pub fn is_void(&self, position: Position) -> Result<bool, QueryError> {
        let page = self.audit(&AuditFilter::default(), Page::just(position))?;
        let row = page.items.first();
        Ok(row.is_some_and(|row| row.position == position && row.void.is_some()))
    }

    /// What runs where: all instances, or those of a project, or of one of its environments.
    /// Instances without any active deployment are not listed.
    pub fn overview(
        &self,
        project: Option<&ProjectName>,
        environment: Option<&EnvironmentName>,
    ) -> Result<Overview, QueryError> {
        let _gate = self.gate();
        let rows = self.active_where(project, environment)?;
        let position = self.position();
        let mut routing = Routings::default();
        for row in &rows {
            routing.of(self, &row.state.request.instance.project)?;
        }
        Ok(overview_of(rows, |p| routing.known(p), position))
    }

    /// The audit, newest first.
    pub fn audit(&self, filter: &AuditFilter, page: Page) -> Result<PageOf<AuditRow>, QueryError> {
        self.audit_within(filter, page, usize::MAX)
    }

    /// The audit, newest first, looking at about `most` rows at most: a page may then have few
    /// rows, or none, and still not be the last.
    pub fn audit_within(
        &self,
        filter: &AuditFilter,
        page: Page,
        most: usize,
    ) -> Result<PageOf<AuditRow>, QueryError> {
        let mut found = Found {
            items: Vec::new(),
            next: None,
            limit: page.limit(),
        };
        let position = self.position();
        // Rows of full chunks never change, and what comes after this position is passed over.
        let below = page.after.unwrap_or(position.next()).min(position.next());
        let mut number = if below.0 <= 1 {
            0
        } else {
            keys::chunk_of(Position(below.0 - 1)) + 1
        };
        let terms = terms::wanted(filter);
        let mut looked_at = None;
        let mut done = false;
        let mut looked = 0_usize;
        while !done && number > 0 {
            if looked >= most {
                found.next = Some(Cursor(keys::first_of(number)));
                break;
            }
            number -= 1;
            let block = number / keys::BLOCK;
            if !terms.is_anything() && looked_at != Some(block) {
                looked_at = Some(block);
                let held = self.inner.table.get(&keys::terms(block))?;
                if held.is_some_and(|held| !terms.is_held_by(&held)) {
                    number = block * keys::BLOCK;
                    looked = looked.saturating_add(PASSED_OVER);
                    continue;
                }
            }
            let Some(row) = self.inner.table.get(&keys::chunk(number))? else {
                continue;
            };
            let mut reader = chunk::Reader::new(&row, keys::first_of(number))?;
            let mut rows = Vec::new();
            while let Some(row) = reader.next()? {
                if row.position < below {
                    rows.push(row);
                }
            }
            looked = looked.saturating_add(rows.len());
            for row in rows.into_iter().rev() {
                done = found.take(filter, row);
                if done {
                    break;
                }
            }
        }
        Ok(PageOf {
            items: found.items,
            next: found.next,
            position,
        })
    }
}

/// What runs where, from the active deployments, newest first, and the route tables of their
/// projects.
pub(crate) fn overview_of<'a>(
    rows: impl IntoIterator<Item = DeploymentRow>,
    routing: impl Fn(&ProjectName) -> Option<&'a Routing>,
    position: Position,
) -> Overview {
    let mut by_instance = BTreeMap::<InstanceRef, InstanceView>::new();
    for row in rows {
        let instance = row.state.request.instance.clone();
        let entry = by_instance
            .entry(instance.clone())
            .or_insert_with(|| InstanceView {
                id: instance.to_string(),
                rolled_back: routing(&instance.project)
                    .and_then(|r| r.traffic(&instance))
                    .is_some_and(|t| t.rolled_back),
                instance,
                main: None,
                others: Vec::new(),
            });
        let view = row.view();
        if row.main {
            entry.main = Some(view);
        } else {
            entry.others.push(view);
        }
    }
    Overview {
        instances: by_instance.into_values().collect(),
        position,
    }
}

/// What it costs to pass over a block by its terms, in rows that are read.
const PASSED_OVER: usize = 8;

/// The rows of a page so far.
struct Found {
    items: Vec<AuditRow>,
    next: Option<Cursor>,
    limit: usize,
}

impl Found {
    /// Takes a row that fits; true once the page is full and it is known that more follow.
    fn take(&mut self, filter: &AuditFilter, row: AuditRow) -> bool {
        if !filter.matches(&row) {
            return false;
        }
        if self.items.len() == self.limit {
            self.next = self.items.last().map(|r| Cursor(r.position));
            return true;
        }
        self.items.push(row);
        false
    }
}

/// Route tables that a listing has read.
#[derive(Default)]
struct Routings(HashMap<ProjectName, Arc<Folded<Routing>>>);

impl Routings {
    fn of(
        &mut self,
        projections: &Projections,
        project: &ProjectName,
    ) -> Result<Option<&Routing>, QueryError> {
        if !self.0.contains_key(project) {
            let routing = projections.routing_of(project)?;
            self.0.insert(project.clone(), routing);
        }
        Ok(self.known(project))
    }

    fn known(&self, project: &ProjectName) -> Option<&Routing> {
        self.0.get(project).and_then(|r| r.state.as_ref())
    }
}
