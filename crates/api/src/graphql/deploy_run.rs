//! A deployment on its way: what `deploy` answers with and `deployStatus` shows.

use std::sync::Arc;

use async_graphql::{Enum, ID, Object, SimpleObject};
use daybook_events::deployment::{
    self, ClusterCause, ClusterState, Deployment, Operation, ReadinessState, Status,
    WorkloadObserved,
};
use daybook_events::{CommitId, DeploymentId, Position};
use daybook_projections::{DeploymentRow, Reached};
use jiff::Timestamp;

use super::objects::LogPosition;
use crate::commands::{CommandError, Deployed};
use crate::state::AppState;
use crate::view::Durations;

/// The phases of a deployment. An image that exists goes from QUEUED straight to DEPLOYING.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Enum)]
pub(crate) enum Phase {
    /// Waiting to start.
    Queued,
    /// Fetching source code.
    Cloning,
    /// The image is being built.
    Building,
    /// The image is being pushed.
    Pushing,
    /// It is being brought to its clusters.
    Deploying,
    /// Running. Everything is healthy.
    Succeeded,
    /// Something went wrong; `error` says what.
    Failed,
}

impl From<deployment::Phase> for Phase {
    fn from(phase: deployment::Phase) -> Self {
        match phase {
            deployment::Phase::Queued => Self::Queued,
            deployment::Phase::Cloning => Self::Cloning,
            deployment::Phase::Building => Self::Building,
            deployment::Phase::Pushing => Self::Pushing,
            deployment::Phase::Deploying => Self::Deploying,
            deployment::Phase::Succeeded => Self::Succeeded,
            deployment::Phase::Failed => Self::Failed,
        }
    }
}

/// How a deployment does where it runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Enum)]
pub(crate) enum RolloutHealth {
    /// It is coming up, and nothing is wrong yet.
    Progressing,
    /// All that is asked for is ready.
    Healthy,
    /// Something is wrong; `rolloutMessage` says what.
    Degraded,
    /// It was stopped, and can be started again.
    Suspended,
    /// It was removed, or is being removed.
    Missing,
}

/// A deployment on its way, and what became of it.
#[derive(Debug, Clone)]
pub(crate) struct DeployRun {
    pub(super) id: DeploymentId,
    pub(super) state: Arc<Deployment>,
    /// Position of the last event that is taken into account.
    pub(super) position: Position,
    /// The commit of the deployment whose image it has, where it was not built for this one.
    pub(super) inherited: Option<CommitId>,
    /// When it was first seen to get somewhere.
    pub(super) reached: Reached,
    /// Whether making it the main deployment would change nothing.
    pub(super) wholly_main: bool,
}

/// A deployment in one of its clusters.
#[derive(Debug, SimpleObject)]
pub(crate) struct ClusterRollout {
    /// The cluster.
    name: String,
    /// Where the deployment is there: `pending`, `syncing`, `starting`, `started`, `degraded`,
    /// `failed`, `stopping`, `stopped`, `terminating`, `terminated`.
    state: String,
    /// Since when.
    since: Timestamp,
    /// Instances that are asked for there; none before it was looked at.
    wanted: Option<u32>,
    /// Instances that are ready there.
    ready: u32,
    /// What is wrong there, in the field's words and in a sentence.
    problem: Option<String>,
    /// What helps against it.
    remedy: Option<String>,
    /// What it usually comes of, the most likely first; empty where that is not known.
    likely_causes: Vec<String>,
    /// All that may help, beginning with `remedy`; empty where there is nothing else.
    remedies: Vec<String>,
}

impl From<DeploymentRow> for DeployRun {
    fn from(row: DeploymentRow) -> Self {
        Self {
            id: row.id,
            state: Arc::new(row.state),
            position: row.position,
            inherited: row.source.map(|s| s.commit),
            reached: row.reached,
            wholly_main: row.wholly_main,
        }
    }
}

impl DeployRun {
    /// A deployment as its request made it: the same for every repetition of the request.
    pub(super) async fn requested(
        state: &AppState,
        deployed: &Deployed,
    ) -> Result<Self, CommandError> {
        let made: Deployment = state.commands.created(&deployed.done).await?;
        let promoted = made.request.promoted_from.as_ref().map(|p| p.deployment);
        let made_from = made.request.redeploy_of.or(promoted);
        Ok(Self {
            id: deployed.id,
            state: Arc::new(made),
            position: deployed.done.event.unwrap_or(deployed.done.position),
            inherited: made_from
                .and_then(|_| state.commands.deployment(deployed.id).ok())
                .and_then(|row| row.source)
                .map(|source| source.commit),
            reached: Reached::default(),
            wholly_main: false,
        })
    }

    pub(super) fn phase_of(&self) -> Phase {
        self.state.status.phase().into()
    }

    /// How it does where it runs; none before it was brought there.
    pub(super) fn health(&self) -> Option<RolloutHealth> {
        let state = &*self.state;
        let committed = state.commit.is_some();
        match state.status {
            status if status < Status::Deploying => None,
            Status::Deploying | Status::Starting if self.trouble().is_some() => {
                Some(RolloutHealth::Degraded)
            }
            Status::Deploying | Status::Starting => Some(RolloutHealth::Progressing),
            Status::Started => match state.workload_readiness.state {
                ReadinessState::Ready => Some(RolloutHealth::Healthy),
                _ => Some(RolloutHealth::Degraded),
            },
            Status::Stopping | Status::Stopped => Some(RolloutHealth::Suspended),
            Status::Terminating | Status::Terminated | Status::Deleted => {
                Some(RolloutHealth::Missing)
            }
            Status::Cancelled => committed.then_some(RolloutHealth::Missing),
            _ => committed.then_some(RolloutHealth::Degraded),
        }
    }

    /// What is wrong in the first cluster where something is: `east: ImagePullBackOff: …`.
    fn trouble(&self) -> Option<String> {
        let clusters = &self.state.request.clusters;
        clusters
            .iter()
            .find_map(|cluster| Some(format!("{cluster}: {}", self.trouble_in(cluster)?)))
    }

    fn trouble_in(&self, cluster: &daybook_events::ClusterName) -> Option<String> {
        let cause = self.wrong_in(cluster)?;
        Some(format!("{}: {}", cause.code, cause.message))
    }

    /// What is wrong in a cluster: why its state is what it is, as REST says it, or else what is seen
    /// there beside that, such as drift of what is ready.
    fn wrong_in(&self, cluster: &daybook_events::ClusterName) -> Option<ClusterCause> {
        let progress = self.state.clusters.get(cluster);
        let cause = progress.and_then(|p| p.cause.clone());
        cause.or_else(|| {
            let seen = self.state.observed.get(cluster)?;
            seen.problem.as_ref().map(ClusterCause::from)
        })
    }

    pub(super) fn message(&self) -> Option<String> {
        let health = self.health()?;
        if health == RolloutHealth::Degraded || health == RolloutHealth::Progressing {
            if let Some(trouble) = self.trouble() {
                return Some(trouble);
            }
            if let Some(failure) = &self.state.failure {
                return Some(format!("{}: {}", failure.code, failure.message));
            }
        }
        let readiness = &self.state.workload_readiness;
        let message = readiness.message.clone();
        Some(message.unwrap_or_else(|| readiness.reason.clone()))
    }
}

/// A deployment on its way, and what became of it.
#[Object]
impl DeployRun {
    /// Its id.
    async fn id(&self) -> ID {
        self.id.to_string().into()
    }

    /// The project.
    async fn project_id(&self) -> ID {
        self.state.request.instance.project.to_string().into()
    }

    /// The service.
    async fn service(&self) -> String {
        self.state.request.instance.service.to_string()
    }

    /// The environment.
    async fn environment(&self) -> String {
        self.state.request.instance.environment.to_string()
    }

    /// The pipeline's view of it.
    async fn phase(&self) -> Phase {
        self.phase_of()
    }

    /// The operator's view of it: `queued`, `starting`, `started`, `partially_started`, `stopping`,
    /// `stopped`, `terminating`, `terminated`, `start_error`, `stop_error`, `terminate_error`,
    /// `cancelled`.
    async fn status(&self) -> &str {
        self.state.status.lifecycle()
    }

    /// Exactly where it is: `requested`, `awaiting_approval`, `deploying`, …
    async fn state(&self) -> &str {
        self.state.status.as_str()
    }

    /// Since when it is in that state.
    async fn since(&self) -> Timestamp {
        self.state.status_since
    }

    /// When it was asked for.
    async fn created_at(&self) -> Timestamp {
        self.state.created_at
    }

    /// How it does where it runs; null before it was brought there.
    async fn rollout_health(&self) -> Option<RolloutHealth> {
        self.health()
    }

    /// The same in words: what is wrong, such as `east: ImagePullBackOff: …`, or how it is.
    async fn rollout_message(&self) -> Option<String> {
        self.message()
    }

    /// Why it failed, or the last operation on it did.
    async fn error(&self) -> Option<&str> {
        self.state.failure.as_ref().map(|f| f.message.as_str())
    }

    /// A stable code for that.
    async fn error_code(&self) -> Option<&str> {
        self.state.failure.as_ref().map(|f| f.code.as_str())
    }

    /// What helps against that.
    async fn remedy(&self) -> Option<&str> {
        self.state.failure.as_ref().map(|f| f.remedy.as_str())
    }

    /// What was asked for: a branch, tag, commit or image.
    async fn version(&self) -> String {
        self.state.request.version.to_string()
    }

    /// The commit of the source, once it is known.
    async fn source_commit(&self) -> Option<&str> {
        let own = self.state.source.as_ref().map(|s| &s.commit);
        own.or(self.inherited.as_ref())
            .map(|commit| commit.as_str())
    }

    /// How long its steps took.
    async fn durations(&self) -> Durations {
        Durations::of(&self.state, self.reached)
    }

    /// Tag of its image, once it is known.
    async fn image_tag(&self) -> Option<&str> {
        self.state.image.as_ref().map(|i| i.tag.as_str())
    }

    /// Digest of its image, once it is known.
    async fn digest(&self) -> Option<&str> {
        self.state.digest().map(|digest| digest.as_str())
    }

    /// The newest GitOps commit about it.
    async fn revision(&self) -> Option<&str> {
        let newest = self.state.change.as_ref().map(|c| &c.commit);
        newest.or(self.state.commit.as_ref()).map(|c| c.as_str())
    }

    /// It in each of its clusters.
    #[graphql(complexity = "super::limits::many(3, child_complexity)")]
    async fn clusters(&self) -> Vec<ClusterRollout> {
        let state = &*self.state;
        let rollout = |cluster| {
            let progress = state.clusters.get(cluster);
            let seen = state.observed.get(cluster);
            let problem = self.trouble_in(cluster);
            let (remedy, likely_causes, remedies) = match self.wrong_in(cluster) {
                Some(cause) => (Some(cause.remedy), cause.likely_causes, cause.remedies),
                None => (None, Vec::new(), Vec::new()),
            };
            ClusterRollout {
                name: cluster.to_string(),
                state: word(progress.map_or(ClusterState::Unknown, |p| p.state)),
                since: progress.map_or(state.status_since, |p| p.since),
                wanted: seen.map(|o| o.wanted),
                ready: seen.map_or(0, WorkloadObserved::ready),
                problem,
                remedy,
                likely_causes,
                remedies,
            }
        };
        state.request.clusters.iter().map(rollout).collect()
    }

    /// What can be done to it now: `stop`, `start`, `cancel`, …
    async fn operations(&self) -> Vec<String> {
        let all = self.state.operations().into_iter();
        all.filter(|operation| !(self.wholly_main && *operation == Operation::MarkMain))
            .map(word)
            .collect()
    }

    /// Position of the last event that is taken into account: a subscription goes on after it.
    async fn position(&self) -> LogPosition {
        self.position.into()
    }
}

/// How a unit variant is written elsewhere.
pub(super) fn word(value: impl serde::Serialize) -> String {
    match serde_json::to_value(value) {
        Ok(serde_json::Value::String(word)) => word,
        _ => String::new(),
    }
}
