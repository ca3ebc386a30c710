//! Hands GitOps commits to a cluster: one worker for each cluster that this process looks after.
//!
//! A commit replaces all before it, so what is applied is always the newest one that the ledger
//! knows of an environment, never the one that happened to wake the worker.
//!
//! A release that somebody took out of the repository by hand is kept while its deployment is the
//! main one: routes are moved first, and what runs is stopped last.

use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use daybook_events::deployment::Status;
use daybook_events::gitops::{Change, Gitops, GitopsEvent};
use daybook_events::routing::Routing;
use daybook_events::{
    AggregateKind, CommitId, DeploymentId, EnvironmentName, InstanceRef, ProjectName, ServiceName,
    Subject, SubjectFilter,
};

use super::rollout::settle_in;
use super::{Bench, Stop, deployment_of, outcome, said, traced};
use crate::driver::{Activation, Outcome, Worker};
use crate::ports::{Repositories, StepError};
use crate::target::{AppRef, Target, TargetError};
use crate::values::{EnvironmentValues, ReleaseValues, RenderedChart};

const ROLE: &str = "sync";

/// The sync worker of one cluster.
#[derive(Clone)]
pub struct Sync {
    /// Shared.
    pub bench: Bench,
    /// The repositories.
    pub repositories: Arc<dyn Repositories>,
    /// The cluster.
    pub target: Arc<dyn Target>,
    turns: Turns,
    kept: Kept,
}

/// What is kept of each environment although its newest commit does not list it.
type Kept = Arc<Mutex<HashMap<AppRef, Releases>>>;

/// Releases with their services.
type Releases = BTreeMap<DeploymentId, (ServiceName, Release)>;

/// A release of an image or of a chart.
#[derive(Clone)]
enum Release {
    Image(Box<ReleaseValues>),
    Chart(Box<RenderedChart>),
}

impl Release {
    /// What an environment lists of a deployment.
    fn of(values: &EnvironmentValues, service: &ServiceName, id: &DeploymentId) -> Option<Self> {
        let service = values.services.get(service)?;
        let image = service.releases.get(id).cloned();
        let image = image.map(|release| Self::Image(Box::new(release)));
        let chart = || service.charts.get(id).cloned().map(Box::new);
        image.or_else(|| chart().map(Self::Chart))
    }
}

/// One change of an environment on a cluster at a time. Whoever has waited for its turn reads what
/// is newest then: otherwise an older commit, that was read first, could be applied last.
type Turns = Arc<Mutex<HashMap<AppRef, Arc<tokio::sync::Mutex<()>>>>>;

#[async_trait]
impl Worker for Sync {
    fn name(&self) -> String {
        format!("{ROLE}-{}", self.target.cluster())
    }
    fn unit(&self) -> Cow<'static, str> {
        ROLE.into()
    }
    fn filter(&self) -> SubjectFilter {
        SubjectFilter::of(AggregateKind::Gitops)
    }
    fn wants(&self, kind: &str) -> bool {
        matches!(
            kind,
            "gitops.committed.v1"
                | "gitops.reverted.v1"
                | "gitops.foreign_commit_adopted.v1"
                | "gitops.rewrite_accepted.v1"
        )
    }
    async fn activate(&self, a: &Activation) -> Outcome {
        let Some(project) = a.subject.project() else {
            return Outcome::Done;
        };
        traced::in_cluster(self.target.cluster());
        let id = DeploymentId(a.event.correlationid);
        if let Ok(GitopsEvent::Committed(e)) = a.event.payload()
            && e.change == (Change::EnvironmentDeleted {})
        {
            return outcome(self.leave(project, &e.environment, &e.commit).await);
        }
        let about = self.bench.row(id).ok().flatten();
        let about = about.map(|row| (id, row.state.request.instance.environment));
        outcome(match self.converge_project(project, about).await {
            Err(Stop::Fail(error)) => self.fail(id, error).await,
            other => other,
        })
    }
    async fn give_up(&self, a: &Activation, why: &str) -> Outcome {
        match deployment_of(&a.subject, &a.event) {
            Some(id) => outcome(self.fail(id, said(a, why)).await),
            None => Outcome::Done,
        }
    }
}

impl Sync {
    /// The sync worker of a cluster.
    pub fn new(bench: Bench, repositories: Arc<dyn Repositories>, target: Arc<dyn Target>) -> Self {
        Self {
            bench,
            repositories,
            target,
            turns: Turns::default(),
            kept: Kept::default(),
        }
    }

    fn turn(&self, app: &AppRef) -> Arc<tokio::sync::Mutex<()>> {
        let mut turns = self.turns.lock().unwrap_or_else(PoisonError::into_inner);
        turns.entry(app.clone()).or_default().clone()
    }

    /// A deployment that this cluster does not take has failed in this cluster.
    async fn fail(&self, id: DeploymentId, error: StepError) -> Result<(), Stop> {
        settle_in(&self.bench, ROLE, id, self.target.cluster(), error).await
    }

    /// Brings the cluster to the newest known commit of the environment of an instance.
    pub(super) async fn converge_environment(
        &self,
        instance: &InstanceRef,
        about: DeploymentId,
    ) -> Result<(), Stop> {
        self.converge(&instance.project, &instance.environment, Some(about))
            .await
    }

    /// Brings the cluster to the newest known commit of every environment of a project. What is
    /// wrong with one of them does not keep the others; it is for the deployment that this is
    /// about only if it is the environment of that.
    async fn converge_project(
        &self,
        project: &ProjectName,
        about: Option<(DeploymentId, EnvironmentName)>,
    ) -> Result<(), Stop> {
        let gitops = self
            .bench
            .ledger
            .projections()
            .shared::<Gitops>(&Subject::Gitops(project.clone()))?;
        let Some(gitops) = &gitops.state else {
            return Ok(());
        };
        let mut result = Ok(());
        for environment in gitops.environments.keys() {
            let its_own = about.as_ref().is_some_and(|(_, of)| of == environment);
            let id = about.as_ref().map(|(id, _)| *id);
            match self.converge(project, environment, id).await {
                Ok(()) | Err(Stop::Moved(_)) => {}
                Err(Stop::Fail(error)) if !its_own => {
                    let cluster = self.target.cluster();
                    tracing::warn!(%cluster, %project, %environment, code = error.code,
                        "the environment was not taken over: {}", error.message);
                }
                Err(stop) if its_own || result.is_ok() => result = Err(stop),
                Err(_) => {}
            }
        }
        result
    }

    /// Runs nothing any more for an environment that is out of the repository.
    async fn leave(
        &self,
        project: &ProjectName,
        environment: &EnvironmentName,
        commit: &CommitId,
    ) -> Result<(), Stop> {
        let app = AppRef {
            project: project.clone(),
            environment: environment.clone(),
        };
        let turn = self.turn(&app);
        let _turn = turn.lock().await;
        let gitops = self.bench.ledger.projections().gitops(project)?;
        // It may be there again by now.
        if gitops.is_some_and(|g| g.environments.contains_key(environment)) {
            return Ok(());
        }
        let nothing = EnvironmentValues {
            project: project.clone(),
            environment: environment.clone(),
            ephemeral: false,
            services: BTreeMap::new(),
        };
        self.apply(&app, commit, &nothing, &BTreeSet::new()).await?;
        let removed = self.target.remove_volumes(&app).await;
        removed.map_err(|e| Stop::Retry(e.to_string()))
    }

    /// Brings the cluster to the newest known commit of an environment, if it has one.
    async fn converge(
        &self,
        project: &ProjectName,
        environment: &EnvironmentName,
        about: Option<DeploymentId>,
    ) -> Result<(), Stop> {
        let app = AppRef {
            project: project.clone(),
            environment: environment.clone(),
        };
        let turn = self.turn(&app);
        let _turn = turn.lock().await;
        // Read before the commit: what is the main one by then is in what is read of the commits,
        // unless somebody took it out.
        let main = self.main_of(&app)?;
        let subject = Subject::Gitops(project.clone());
        let gitops = self.bench.ledger.projections().shared::<Gitops>(&subject)?;
        let newest = gitops.state.as_ref();
        let Some(commit) = newest.and_then(|g| g.environments.get(environment)) else {
            return Ok(());
        };
        let applied = {
            let watched = self.target.watch(&app);
            let now = watched.borrow();
            if now.is_whole
                && now.revision.as_ref() == Some(commit)
                && !self.all_kept().contains_key(&app)
            {
                return Ok(());
            }
            now.revision.clone()
        };
        let mut desired = self.repositories.read(project, environment, commit).await?;
        let kept = self.taken_out(&app, &main, &desired, applied).await?;
        let keeps: BTreeSet<_> = kept.keys().copied().collect();
        if !keeps.is_empty() {
            self.all_kept().insert(app.clone(), kept.clone());
        }
        for (id, (service, release)) in kept {
            let service = desired.services.entry(service).or_default();
            match release {
                Release::Image(release) => drop(service.releases.insert(id, *release)),
                Release::Chart(chart) => drop(service.charts.insert(id, *chart)),
            }
        }
        let cluster = self.target.cluster();
        let runs_charts = self.target.runs_charts();
        let mut not_run = BTreeSet::new();
        for service in desired.services.values_mut() {
            service.releases.retain(|_, r| r.clusters.contains(cluster));
            service.charts.retain(|_, c| c.clusters.contains(cluster));
            if !runs_charts {
                not_run.extend(std::mem::take(&mut service.charts).into_keys());
            }
        }
        desired.services.retain(|_, s| !s.is_bare());
        if let Some(id) = about
            && desired.services.values().any(|s| s.lists(&id))
        {
            let text = format!("syncing {} to {cluster}", commit.short());
            self.bench.say(id, Some(cluster.clone()), text).await;
        }
        self.apply(&app, commit, &desired, &keeps).await?;
        // Not before: what was kept is gone only now.
        if keeps.is_empty() {
            self.all_kept().remove(&app);
        }
        match about.filter(|id| not_run.contains(id)) {
            Some(_) => Err(Stop::Fail(StepError::fatal(
                "charts_not_supported",
                format!("{cluster} cannot run what is rendered of a Helm chart"),
                "deploy an image to it, or the chart to Kubernetes clusters",
            ))),
            None => Ok(()),
        }
    }

    /// The deployments that have the traffic of an environment's services.
    fn main_of(&self, app: &AppRef) -> Result<Vec<(ServiceName, DeploymentId)>, Stop> {
        let subject = Subject::Routing(app.project.clone());
        let projections = self.bench.ledger.projections();
        let routing = projections.shared::<Routing>(&subject)?;
        let Some(routing) = &routing.state else {
            return Ok(Vec::new());
        };
        let prefix = format!("{}.{}.", app.project, app.environment);
        let instances = routing.instances.range(prefix.clone()..);
        let instances = instances.map_while(|(name, traffic)| {
            let service = name.strip_prefix(&prefix)?;
            Some((ServiceName::parse(service).ok(), traffic.main))
        });
        Ok(instances
            .filter_map(|(service, main)| service.zip(main))
            .collect())
    }

    fn all_kept(&self) -> MutexGuard<'_, HashMap<AppRef, Releases>> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The releases of main deployments that run and that a commit does not list any more: as they
    /// were applied last, or else as the ledger has them.
    async fn taken_out(
        &self,
        app: &AppRef,
        main: &[(ServiceName, DeploymentId)],
        desired: &EnvironmentValues,
        applied: Option<CommitId>,
    ) -> Result<Releases, Stop> {
        let listed = |service, id| {
            let service = desired.services.get(service);
            service.is_some_and(|s| s.lists(id))
        };
        let mut before = self.all_kept().get(app).cloned().unwrap_or_default();
        let mut releases = Releases::new();
        let mut last = None;
        for (service, id) in main.iter().filter(|(service, id)| !listed(service, id)) {
            let Some(row) = self.bench.row(*id)? else {
                continue;
            };
            let runs = matches!(row.state.status, Status::Started | Status::PartiallyStarted);
            if !runs || !row.state.is_pinned() {
                continue;
            }
            if last.is_none()
                && let Some(commit) = &applied
            {
                let (project, environment) = (&app.project, &app.environment);
                last = self
                    .repositories
                    .read(project, environment, commit)
                    .await
                    .ok();
            }
            let known = before.remove(id).or_else(|| {
                let release = Release::of(last.as_ref()?, service, id)?;
                Some((service.clone(), release))
            });
            let of_ledger = || {
                let request = &row.state.request;
                let mut run = request.run.clone();
                run.replicas = row.state.replicas;
                let release = ReleaseValues {
                    image: row.state.image.clone()?,
                    clusters: request.clusters.clone(),
                    secret_env: request.secrets.clone(),
                    run,
                };
                Some((service.clone(), Release::Image(Box::new(release))))
            };
            // What was rendered of a chart is in commits only.
            let Some(release) = known.or_else(of_ledger) else {
                continue;
            };
            tracing::warn!(project = %app.project, environment = %app.environment, deployment.id = %id,
                "a release is not in the repository any more, and kept while its deployment is the main one");
            releases.insert(*id, release);
        }
        Ok(releases)
    }

    async fn apply(
        &self,
        app: &AppRef,
        commit: &CommitId,
        desired: &EnvironmentValues,
        kept: &BTreeSet<DeploymentId>,
    ) -> Result<(), Stop> {
        let cluster = self.target.cluster();
        daybook_failpoints::reached("sync.before");
        let target = &self.target;
        let applied = target.apply_keeping(app, commit, desired, kept).await;
        daybook_failpoints::reached("sync.after");
        // What is applied leaves no event: the cluster is observed.
        daybook_trace::touch();
        applied.map_err(|e| match e {
            TargetError::Unavailable(why) => {
                Stop::Retry(format!("cluster_unavailable: {cluster}: {why}"))
            }
            TargetError::Refused(why) => Stop::Fail(StepError::fatal(
                "sync_refused",
                format!("{cluster} refused the commit {}: {why}", commit.short()),
                "look at the environment's values file in the GitOps repository",
            )),
        })
    }

    /// Brings the cluster to where the ledger says it should be. Called once when a process takes
    /// the cluster over: what was applied before may be gone.
    pub async fn converge_all(&self) {
        loop {
            let mut failed = None;
            match self.bench.ledger.projections().projects() {
                Ok(projects) => {
                    for project in projects {
                        if let Err(Stop::Retry(why)) =
                            self.converge_project(&project.name, None).await
                        {
                            failed = Some(why);
                        }
                    }
                }
                Err(e) => failed = Some(e.to_string()),
            }
            let Some(why) = failed else {
                return;
            };
            tracing::warn!(cluster = %self.target.cluster(), %why, "not all environments could be restored; trying again");
            tokio::time::sleep(Duration::from_secs(2)).await;
        }
    }
}
