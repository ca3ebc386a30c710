//! What queries answer with, in the form in which it is sent.

use daybook_events::FreezeName;
use daybook_events::deployment::{ClusterState, Deployment, Operation, Phase, Readiness, Status};
use daybook_events::timer::StopCause;
use daybook_events::{
    Actor, ClusterName, CommitId, DeploymentId, Digest, EnvironmentName, Hostname, ImageTag,
    InstanceRef, Position, ProjectName, ServiceName,
};
use jiff::Timestamp;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::page::Cursor;

/// One deployment in the history of a service instance.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct HistoryRow {
    /// The deployment.
    pub deployment: DeploymentId,
    /// Position of its request: it orders the history.
    pub position: Position,
    /// The project.
    pub project: ProjectName,
    /// The environment.
    pub environment: EnvironmentName,
    /// The service.
    pub service: ServiceName,
    /// Tag of its image, once it is known.
    pub image_tag: Option<ImageTag>,
    /// Digest of its image, once it is known.
    pub digest: Option<Digest>,
    /// Whether it is the main deployment of its instance, the one that traffic goes to.
    pub active: bool,
    /// When it was asked for.
    pub timestamp: Timestamp,
    /// The GitOps commit that introduced it.
    pub revision: Option<CommitId>,
    /// First line of that commit's message.
    pub message: Option<String>,
    /// The ref or image that was asked for.
    pub version: String,
    /// The commit of the source.
    pub source_commit: Option<CommitId>,
    /// That commit's message.
    pub source_commit_message: Option<String>,
    /// A link to that commit.
    pub source_url: Option<String>,
    /// Where it is in its life.
    pub status: Status,
    /// Since when.
    pub status_since: Timestamp,
    /// The pipeline's view of it.
    pub phase: Phase,
    /// Who asked for it.
    pub actor: Actor,
    /// Why, in the caller's words.
    pub reason: Option<String>,
    /// How it ended, if it did not become or stay live: one sentence.
    pub outcome: Option<String>,
    /// A stable code for that.
    pub outcome_code: Option<String>,
    /// The deployment whose snapshot it repeats.
    pub redeploy_of: Option<DeploymentId>,
}

impl HistoryRow {
    /// Where a list goes on after it.
    pub fn cursor(&self) -> Cursor {
        Cursor(self.position)
    }
}

/// What runs where: the service instances with their deployments.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Overview {
    /// The instances, ordered by project, environment and service.
    pub instances: Vec<InstanceView>,
    /// The ledger up to here.
    pub position: Position,
}

/// One service in one environment.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct InstanceView {
    /// `project.environment.service`.
    pub id: String,
    /// Its parts.
    #[serde(flatten)]
    pub instance: InstanceRef,
    /// Whether it is rolled back: then no deployment takes over traffic by itself.
    pub rolled_back: bool,
    /// The deployment that its traffic goes to.
    pub main: Option<DeploymentView>,
    /// The other deployments that run, can run again or are on their way, newest first.
    pub others: Vec<DeploymentView>,
}

/// A deployment, as far as an overview shows it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct DeploymentView {
    /// Its id.
    pub id: DeploymentId,
    /// Position of its request.
    pub position: Position,
    /// The ref or image that was asked for.
    pub version: String,
    /// Tag of its image.
    pub image_tag: Option<ImageTag>,
    /// Digest of its image.
    pub digest: Option<Digest>,
    /// The commit of the source.
    pub source_commit: Option<CommitId>,
    /// The newest GitOps commit about it.
    pub revision: Option<CommitId>,
    /// Where it is in its life.
    pub status: Status,
    /// Since when.
    pub since: Timestamp,
    /// The pipeline's view of it.
    pub phase: Phase,
    /// The operator's view of it.
    pub lifecycle: String,
    /// Is there an image?
    pub build: Readiness,
    /// Does it run?
    pub workload: Readiness,
    /// Is it reached?
    pub endpoint: Readiness,
    /// The hostnames that lead to it.
    pub hostnames: Vec<Hostname>,
    /// Where it is to run, and what was seen there.
    pub clusters: Vec<ClusterView>,
    /// Why it failed, or the last operation on it did.
    pub problem: Option<ProblemView>,
    /// When it will be stopped by itself, if nothing is decided before.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stops: Option<StopView>,
    /// Who has allowed it, while that is asked for; and an emergency that is to be reviewed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub approval: Option<ApprovalView>,
    /// The freeze that it waits for, or was let through in an emergency that is to be reviewed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hold: Option<HoldView>,
    /// What can be done to it now.
    pub operations: Vec<Operation>,
    /// When it was asked for.
    pub created_at: Timestamp,
}

/// A deployment's approvals in short.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct ApprovalView {
    /// The hash that names its plan.
    pub hash: Digest,
    /// Who has allowed it.
    pub granted: Vec<String>,
    /// How many have to.
    pub required: u32,
    /// When it is too late.
    pub expires: Option<Timestamp>,
    /// Whether it waits.
    pub waits: bool,
    /// Who went ahead in an emergency that nobody has reviewed yet.
    pub to_review: Option<String>,
}

impl ApprovalView {
    /// What there is to say about a deployment; nothing once it is allowed and reviewed.
    pub fn of(state: &Deployment) -> Option<Self> {
        let approval = state.approval.as_ref()?;
        let waits = state.status == Status::AwaitingApproval;
        let emergency = approval.emergency.as_ref();
        let to_review = emergency.filter(|_| approval.needs_review());
        (waits || to_review.is_some()).then(|| Self {
            hash: approval.hash.clone(),
            granted: approval.approved().approvers,
            required: approval.plan.rule.required,
            expires: approval.expires,
            waits,
            to_review: to_review.map(|e| e.by.clone()),
        })
    }
}

/// What a freeze does to a deployment.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct HoldView {
    /// The window.
    pub freeze: FreezeName,
    /// When it ends; none if it does not end by itself.
    pub until: Option<Timestamp>,
    /// Since when the deployment waits.
    pub since: Timestamp,
    /// Whether it waits.
    pub waits: bool,
    /// Who let it through in an emergency that nobody has reviewed yet.
    pub to_review: Option<String>,
}

impl HoldView {
    /// What there is to say about a deployment; nothing once it goes on and is reviewed.
    pub fn of(state: &Deployment) -> Option<Self> {
        let hold = state.hold.as_ref()?;
        let waits = state.held().is_some();
        let emergency = hold.emergency.as_ref();
        let to_review = emergency.filter(|_| hold.needs_review());
        (waits || to_review.is_some()).then(|| Self {
            freeze: hold.freeze.clone(),
            until: hold.until,
            since: hold.since,
            waits,
            to_review: to_review.map(|e| e.by.clone()),
        })
    }
}

/// A scheduled stop.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct StopView {
    /// When.
    pub at: Timestamp,
    /// Why.
    pub cause: StopCause,
    /// The same in words: `1a2b3c4d took its traffic over`.
    pub because: String,
    /// The deployment that has its traffic now, if that is why.
    pub by: Option<DeploymentId>,
}

impl StopView {
    /// The stop that is scheduled for a deployment.
    pub fn of(state: &Deployment) -> Option<Self> {
        state.stops.pending.as_ref().map(|stop| Self {
            at: stop.due,
            cause: stop.cause,
            because: stop.because(),
            by: stop.by,
        })
    }
}

/// A deployment in one cluster.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct ClusterView {
    /// The cluster.
    pub name: ClusterName,
    /// Where the deployment is there.
    pub state: ClusterState,
    /// Since when.
    pub since: Timestamp,
    /// Instances that are asked for there; none before it was looked at.
    pub wanted: Option<u32>,
    /// Instances that are ready there.
    pub ready: u32,
    /// What is wrong there.
    pub problem: Option<ProblemView>,
}

/// A cause with a remedy.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct ProblemView {
    /// A stable code.
    pub code: String,
    /// What happened.
    pub message: String,
    /// What helps.
    pub remedy: String,
    /// What it usually comes of, the most likely first; left out where that is not known.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub likely_causes: Vec<String>,
    /// All that may help, beginning with `remedy`; left out where there is nothing else.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub remedies: Vec<String>,
}

impl DeploymentView {
    /// The view of a deployment.
    pub fn new(
        id: DeploymentId,
        created: Position,
        state: &Deployment,
        hostnames: Vec<Hostname>,
    ) -> Self {
        let clusters = state.request.clusters.iter().map(|c| {
            let seen = state.observed.get(c);
            let progress = state.clusters.get(c);
            ClusterView {
                name: c.clone(),
                state: progress.map_or(ClusterState::Unknown, |p| p.state),
                since: progress.map_or(state.status_since, |p| p.since),
                wanted: seen.map(|o| o.wanted),
                ready: seen.map_or(0, daybook_events::deployment::WorkloadObserved::ready),
                problem: progress
                    .and_then(|p| p.cause.as_ref())
                    .map(|p| ProblemView {
                        code: p.code.clone(),
                        message: p.message.clone(),
                        remedy: p.remedy.clone(),
                        likely_causes: p.likely_causes.clone(),
                        remedies: p.remedies.clone(),
                    }),
            }
        });
        Self {
            id,
            position: created,
            version: version_text(state),
            image_tag: state.image.as_ref().map(|i| i.tag.clone()),
            digest: state.digest().cloned(),
            source_commit: state.source.as_ref().map(|s| s.commit.clone()),
            revision: state
                .change
                .as_ref()
                .map(|c| c.commit.clone())
                .or_else(|| state.commit.clone()),
            status: state.status,
            since: state.status_since,
            phase: state.status.phase(),
            lifecycle: state.status.lifecycle().to_owned(),
            build: state.build_readiness.clone(),
            workload: state.workload_readiness.clone(),
            endpoint: state.endpoint_readiness.clone(),
            hostnames,
            clusters: clusters.collect(),
            problem: state.failure.as_ref().map(|f| ProblemView {
                code: f.code.clone(),
                message: f.message.clone(),
                remedy: f.remedy.clone(),
                likely_causes: Vec::new(),
                remedies: Vec::new(),
            }),
            stops: StopView::of(state),
            approval: ApprovalView::of(state),
            hold: HoldView::of(state),
            operations: state.operations(),
            created_at: state.created_at,
        }
    }
}

/// What was asked to be deployed, as the caller wrote it.
pub fn version_text(state: &Deployment) -> String {
    state.request.version.to_string()
}
