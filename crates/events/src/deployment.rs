//! The deployment aggregate: one release of one service instance, to one or more clusters, from
//! the request to its deletion.
//!
//! [`TRANSITIONS`] is the only place that says which event may follow on which state. Deciding,
//! folding, the list of possible operations and the state diagram all read it. What users see,
//! as phases or as statuses, are views of the one state ([`Status::phase`],
//! [`Status::lifecycle`]).

use std::collections::BTreeMap;
use std::fmt;

use jiff::Timestamp;
use schemars::JsonSchema;
use serde::ser::SerializeStruct as _;
use serde::{Deserialize, Serialize, Serializer};
use uuid::Uuid;

mod cluster;
mod operation;
mod plane;

pub use cluster::{
    ClusterCause, ClusterFailed, ClusterProgress, ClusterRetried, ClusterState, RetryRequested,
};
pub use operation::{Possibility, ways_to};
pub use plane::{
    EndpointPlanesChanged, Plane, PlaneChange, PlaneKnown, PlaneSeen, PlaneState, Planes,
};

use crate::admission;
use crate::aggregate::{Aggregate, At, Decision, Illegal, Refusal, events};
use crate::approval::{
    self, Approval, ApprovalGranted, ApprovalRejected, ApprovalRequested, ApprovalsVoided,
    Approved, EmergencyOverride, PostReviewCompleted,
};
use crate::chart::{ChartReference, ChartVersion, PinnedChart};
use crate::config::InstanceConfig;
use crate::envelope::Payload;
use crate::few::Few;
use crate::freeze::{self, FreezeOverride, Held, Hold, Released};
use crate::log::Position;
use crate::names::{
    BuildId, ClusterName, CommitId, DeploymentId, Digest, EnvKey, EnvironmentName, EventId, GitRef,
    Hostname, InstanceRef, RepositoryUrl,
};
use crate::secret::SecretRef;
use crate::spec::{BuildSpec, ImageReference, PinnedImage, RunSpec};
use crate::subject::AggregateKind;
use crate::timer::StopPlan;
pub use crate::timer::{StopScheduled, StopUnscheduled};
use crate::trace::TraceParent;

/// Where a deployment is in its life.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, JsonSchema,
)]
#[serde(rename_all = "snake_case")]
pub enum Status {
    /// Accepted; waits until no other pipeline of its instance runs.
    Requested,
    /// Admitted; waits for a worker.
    Queued,
    /// The source is being resolved and fetched.
    Cloning,
    /// The image is being built.
    Building,
    /// The image is being pushed.
    Pushing,
    /// The image is pinned; the GitOps commit is being made.
    Packaging,
    /// Its plan is known, and waits to be allowed.
    AwaitingApproval,
    /// Committed; its clusters converge to it.
    Deploying,
    /// Runs (or should run) in its clusters.
    Started,
    /// Runs in some of its clusters, and has failed in the others.
    PartiallyStarted,
    /// Is being scaled to zero.
    Stopping,
    /// Scaled to zero; can be started again.
    Stopped,
    /// Is being started again.
    Starting,
    /// Is being removed.
    Terminating,
    /// Removed.
    Terminated,
    /// Its record is put away.
    Deleted,
    /// It never became live.
    Failed,
    /// It was cancelled before it was live.
    Cancelled,
    /// It could not be started again.
    StartError,
    /// It could not be stopped.
    StopError,
    /// It could not be removed.
    TerminateError,
}

/// The phases of a run, in the words of a pipeline.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
#[allow(missing_docs)]
pub enum Phase {
    Queued,
    Cloning,
    Building,
    Pushing,
    Deploying,
    Succeeded,
    Failed,
}

impl Status {
    /// All states.
    pub const ALL: [Self; 21] = [
        Self::Requested,
        Self::Queued,
        Self::Cloning,
        Self::Building,
        Self::Pushing,
        Self::Packaging,
        Self::AwaitingApproval,
        Self::Deploying,
        Self::Started,
        Self::PartiallyStarted,
        Self::Stopping,
        Self::Stopped,
        Self::Starting,
        Self::Terminating,
        Self::Terminated,
        Self::Deleted,
        Self::Failed,
        Self::Cancelled,
        Self::StartError,
        Self::StopError,
        Self::TerminateError,
    ];

    /// The state as one word.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Requested => "requested",
            Self::Queued => "queued",
            Self::Cloning => "cloning",
            Self::Building => "building",
            Self::Pushing => "pushing",
            Self::Packaging => "packaging",
            Self::AwaitingApproval => "awaiting_approval",
            Self::Deploying => "deploying",
            Self::Started => "started",
            Self::PartiallyStarted => "partially_started",
            Self::Stopping => "stopping",
            Self::Stopped => "stopped",
            Self::Starting => "starting",
            Self::Terminating => "terminating",
            Self::Terminated => "terminated",
            Self::Deleted => "deleted",
            Self::Failed => "failed",
            Self::Cancelled => "cancelled",
            Self::StartError => "start_error",
            Self::StopError => "stop_error",
            Self::TerminateError => "terminate_error",
        }
    }

    /// The pipeline's view: which phase the run is in or ended with.
    pub fn phase(self) -> Phase {
        match self {
            Self::Requested | Self::Queued => Phase::Queued,
            Self::Cloning => Phase::Cloning,
            Self::Building => Phase::Building,
            Self::Pushing => Phase::Pushing,
            Self::Packaging | Self::AwaitingApproval | Self::Deploying => Phase::Deploying,
            Self::Failed | Self::Cancelled => Phase::Failed,
            _ => Phase::Succeeded,
        }
    }

    /// The operator's view: one of `queued`, `starting`, `started`, `partially_started`, `stopping`,
    /// `stopped`, `terminating`, `terminated`, `start_error`, `stop_error`, `terminate_error`, `cancelled`.
    pub fn lifecycle(self) -> &'static str {
        match self {
            Self::Requested | Self::Queued => "queued",
            Self::Cloning
            | Self::Building
            | Self::Pushing
            | Self::Packaging
            | Self::AwaitingApproval
            | Self::Deploying
            | Self::Starting => "starting",
            Self::Failed => "start_error",
            Self::Deleted => "terminated",
            other => other.as_str(),
        }
    }

    /// Whether the pipeline still has work to do before the deployment is live.
    pub fn in_pipeline(self) -> bool {
        self <= Self::Deploying
    }

    /// Whether a pipeline of this deployment occupies its instance.
    pub fn holds_instance(self) -> bool {
        self > Self::Requested && self <= Self::Deploying
    }

    /// Whether it is being brought to its clusters, or to those where it failed.
    pub fn in_rollout(self) -> bool {
        matches!(self, Self::Deploying | Self::PartiallyStarted)
    }

    /// Whether somebody following a run has seen its end.
    pub fn is_settled(self) -> bool {
        matches!(
            self,
            Self::Started
                | Self::PartiallyStarted
                | Self::Stopped
                | Self::Terminated
                | Self::Deleted
                | Self::Failed
                | Self::Cancelled
                | Self::StartError
                | Self::StopError
                | Self::TerminateError
        )
    }
}

/// One row of the transition table.
#[derive(Debug, Clone, Copy)]
pub struct Transition {
    /// The event's type.
    pub kind: &'static str,
    /// The states that it may follow on.
    pub from: &'static [Status],
    /// The state that it leads to; none if it leaves the state as it is.
    pub to: Option<Status>,
}

const PIPELINE: &[Status] = &[
    Status::Requested,
    Status::Queued,
    Status::Cloning,
    Status::Building,
    Status::Pushing,
    Status::Packaging,
    Status::AwaitingApproval,
    Status::Deploying,
];

const COMMITTED: &[Status] = &[
    Status::Deploying,
    Status::Started,
    Status::PartiallyStarted,
    Status::Stopping,
    Status::Stopped,
    Status::Starting,
    Status::StartError,
    Status::StopError,
    Status::Terminating,
    Status::TerminateError,
];

/// The states of what may have had a plan.
const PLANNED: &[Status] = &[
    Status::Packaging,
    Status::AwaitingApproval,
    Status::Deploying,
    Status::Started,
    Status::PartiallyStarted,
    Status::Stopping,
    Status::Stopped,
    Status::Starting,
    Status::Terminating,
    Status::Terminated,
    Status::Deleted,
    Status::Failed,
    Status::Cancelled,
    Status::StartError,
    Status::StopError,
    Status::TerminateError,
];

/// Which event may follow on which state, and where it leads.
pub const TRANSITIONS: &[Transition] = &{
    use Status::*;
    const fn t(kind: &'static str, from: &'static [Status], to: Option<Status>) -> Transition {
        Transition { kind, from, to }
    }
    [
        t("deployment.queued.v1", &[Requested], Some(Queued)),
        t("deployment.held.v1", &[Requested, Packaging], None),
        t("deployment.released.v1", &[Requested, Packaging], None),
        t(
            "deployment.emergency_freeze_override.v1",
            &[Requested, Packaging],
            None,
        ),
        t("deployment.cloning_started.v1", &[Queued], Some(Cloning)),
        t("deployment.source_resolved.v1", &[Cloning], None),
        t("deployment.building_started.v1", &[Cloning], Some(Building)),
        t(
            "deployment.pushing_started.v1",
            &[Cloning, Building],
            Some(Pushing),
        ),
        t(
            "deployment.image_pinned.v1",
            &[Queued, Cloning, Building, Pushing],
            Some(Packaging),
        ),
        t("deployment.chart_pinned.v1", &[Queued], Some(Packaging)),
        t(
            "deployment.approval_requested.v1",
            &[Packaging],
            Some(AwaitingApproval),
        ),
        t(
            "deployment.approvals_voided.v1",
            &[Packaging, AwaitingApproval],
            Some(AwaitingApproval),
        ),
        t("deployment.approval_granted.v1", &[AwaitingApproval], None),
        t("deployment.approval_rejected.v1", &[AwaitingApproval], None),
        t(
            "deployment.emergency_override.v1",
            &[AwaitingApproval],
            None,
        ),
        t(
            "deployment.approved.v1",
            &[AwaitingApproval],
            Some(Packaging),
        ),
        t("deployment.post_review_completed.v1", PLANNED, None),
        t(
            "deployment.deploying_started.v1",
            &[Packaging],
            Some(Deploying),
        ),
        t("deployment.workload_observed.v1", COMMITTED, None),
        t(
            "deployment.endpoint_observed.v1",
            &[
                Deploying,
                Started,
                PartiallyStarted,
                Stopping,
                Stopped,
                Starting,
            ],
            None,
        ),
        t(
            "deployment.endpoint_planes_changed.v1",
            &[
                Deploying,
                Started,
                PartiallyStarted,
                Stopping,
                Stopped,
                Starting,
            ],
            None,
        ),
        t("deployment.image_pulled.v1", COMMITTED, None),
        t(
            "deployment.openapi_found.v1",
            &[Deploying, Started, PartiallyStarted],
            None,
        ),
        t(
            "deployment.succeeded.v1",
            &[Deploying, PartiallyStarted],
            Some(Started),
        ),
        t(
            "deployment.partially_succeeded.v1",
            &[Deploying, Starting],
            Some(PartiallyStarted),
        ),
        t(
            "deployment.cluster_failed.v1",
            &[Deploying, Starting, PartiallyStarted],
            None,
        ),
        t("deployment.retry_requested.v1", &[PartiallyStarted], None),
        t(
            "deployment.cluster_retried.v1",
            &[PartiallyStarted, Starting],
            None,
        ),
        t("deployment.overtaken.v1", &[Requested], None),
        t("deployment.failed.v1", PIPELINE, Some(Failed)),
        t("deployment.cancel_requested.v1", PIPELINE, None),
        t("deployment.cancelled.v1", PIPELINE, Some(Cancelled)),
        t(
            "deployment.stop_requested.v1",
            &[Started, PartiallyStarted, StopError, StartError],
            Some(Stopping),
        ),
        t(
            "deployment.stop_scheduled.v1",
            &[Deploying, Started, PartiallyStarted],
            None,
        ),
        t(
            "deployment.stop_unscheduled.v1",
            &[Deploying, Started, PartiallyStarted],
            None,
        ),
        t("deployment.stopped.v1", &[Stopping], Some(Stopped)),
        t("deployment.stop_failed.v1", &[Stopping], Some(StopError)),
        t(
            "deployment.start_requested.v1",
            &[Stopped, StartError],
            Some(Starting),
        ),
        t("deployment.started.v1", &[Starting], Some(Started)),
        t("deployment.start_failed.v1", &[Starting], Some(StartError)),
        t(
            "deployment.terminate_requested.v1",
            &[
                PartiallyStarted,
                Stopped,
                StopError,
                StartError,
                TerminateError,
            ],
            Some(Terminating),
        ),
        t("deployment.terminated.v1", &[Terminating], Some(Terminated)),
        t(
            "deployment.terminate_failed.v1",
            &[Terminating],
            Some(TerminateError),
        ),
        t(
            "deployment.deleted.v1",
            &[Terminated, Failed, Cancelled],
            Some(Deleted),
        ),
        t(
            "deployment.change_committed.v1",
            &[
                Started,
                Stopping,
                Starting,
                Terminating,
                Failed,
                Cancelled,
                Deleted,
            ],
            None,
        ),
        t("deployment.scale_requested.v1", &[Started], None),
    ]
};

/// The row of an event type.
pub fn transition(kind: &str) -> Option<&'static Transition> {
    TRANSITIONS.iter().find(|t| t.kind == kind)
}

/// An event of a deployment, as far as the table knows it.
#[derive(Debug, Clone, Copy)]
pub struct Step {
    kind: &'static str,
    row: Option<&'static Transition>,
}

impl PartialEq for Step {
    fn eq(&self, other: &Self) -> bool {
        self.kind == other.kind
    }
}
impl Eq for Step {}

impl From<&DeploymentEvent> for Step {
    fn from(event: &DeploymentEvent) -> Self {
        let kind = event.kind();
        Self {
            kind,
            row: transition(kind),
        }
    }
}

impl Step {
    /// For the compiler, to which time is no matter.
    pub(crate) const fn of(kind: &'static str) -> Self {
        let mut row = 0;
        while row < TRANSITIONS.len() {
            if same(TRANSITIONS[row].kind, kind) {
                return Self {
                    kind,
                    row: Some(&TRANSITIONS[row]),
                };
            }
            row += 1;
        }
        Self { kind, row: None }
    }

    /// The event's type.
    pub fn kind(self) -> &'static str {
        self.kind
    }

    /// The status that it leads to from another one, or from none.
    pub fn follow(self, status: Option<Status>) -> Result<Status, Illegal> {
        match (status, self.row) {
            (None, _) if self.kind == REQUESTED => Ok(Status::Requested),
            (None, _) => Err(Illegal::new(self.kind, "a deployment that does not exist")),
            (Some(status), Some(row)) if row.from.contains(&status) => Ok(row.to.unwrap_or(status)),
            (Some(status), _) => Err(Illegal::new(self.kind, status.as_str())),
        }
    }
}

/// The type of the only event that a deployment can begin with.
const REQUESTED: &str = "deployment.requested.v1";

/// Whether two texts are the same, for the compiler.
const fn same(one: &str, other: &str) -> bool {
    let (one, other) = (one.as_bytes(), other.as_bytes());
    if one.len() != other.len() {
        return false;
    }
    let mut at = 0;
    while at < one.len() {
        if one[at] != other[at] {
            return false;
        }
        at += 1;
    }
    true
}

/// What a person can do to a deployment.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
#[allow(missing_docs)]
pub enum Operation {
    Cancel,
    Stop,
    Start,
    Retry,
    Terminate,
    Delete,
    MarkMain,
    Redeploy,
    Keep,
    Approve,
    Reject,
    Override,
    OverrideFreeze,
    Review,
}

impl Operation {
    /// All operations.
    pub const ALL: [Self; 14] = [
        Self::Cancel,
        Self::Stop,
        Self::Start,
        Self::Retry,
        Self::Terminate,
        Self::Delete,
        Self::MarkMain,
        Self::Redeploy,
        Self::Keep,
        Self::Approve,
        Self::Reject,
        Self::Override,
        Self::OverrideFreeze,
        Self::Review,
    ];

    /// The states that allow it.
    pub fn allowed_in(self) -> &'static [Status] {
        let kind = match self {
            Self::Cancel => "deployment.cancel_requested.v1",
            Self::Stop => "deployment.stop_requested.v1",
            Self::Start => "deployment.start_requested.v1",
            Self::Retry => "deployment.retry_requested.v1",
            Self::Terminate => "deployment.terminate_requested.v1",
            Self::Delete => "deployment.deleted.v1",
            Self::Keep => "deployment.stop_unscheduled.v1",
            Self::Approve => "deployment.approval_granted.v1",
            Self::Reject => "deployment.approval_rejected.v1",
            Self::Override => "deployment.emergency_override.v1",
            Self::OverrideFreeze => "deployment.emergency_freeze_override.v1",
            Self::Review => "deployment.post_review_completed.v1",
            Self::MarkMain => return &[Status::Started, Status::PartiallyStarted],
            Self::Redeploy => return &Status::ALL,
        };
        transition(kind).map_or(&[], |t| t.from)
    }
}

/// What was asked to be deployed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Version {
    /// A ref of the service's source repository.
    Git {
        /// The repository.
        url: RepositoryUrl,
        /// What the caller wrote: a branch, tag or commit.
        git_ref: GitRef,
        /// Folder of the service within the repository.
        path: String,
    },
    /// An existing image.
    Image {
        /// What the caller wrote.
        reference: ImageReference,
    },
    /// A Helm chart, for clusters that render charts.
    Helm {
        /// The chart in its repository.
        chart: ChartReference,
        /// Its version.
        version: ChartVersion,
    },
}

impl fmt::Display for Version {
    /// What was asked for, in the caller's words.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Git { git_ref, .. } => git_ref.fmt(f),
            Self::Image { reference } => reference.fmt(f),
            Self::Helm { chart, version } => write!(f, "{chart}:{version}"),
        }
    }
}

/// Whether traffic follows a deployment by itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum SwitchMode {
    /// It becomes the main deployment as soon as it is ready.
    #[default]
    Automatic,
    /// It runs beside the main one until somebody marks it as main.
    Manual,
}

/// Where the image of a promotion was taken from.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct PromotedFrom {
    /// The environment.
    pub environment: EnvironmentName,
    /// The deployment there.
    pub deployment: DeploymentId,
}

/// Somebody asked for a deployment. Carries the snapshot of everything that it will be made from.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize, JsonSchema)]
pub struct Requested {
    /// What is deployed to.
    pub instance: InstanceRef,
    /// What is deployed.
    pub version: Version,
    /// Where it is to run.
    pub clusters: Vec<ClusterName>,
    /// How it is built.
    pub build: BuildSpec,
    /// Where its image goes, if the service says so.
    pub image_repository: Option<crate::names::ImageRepository>,
    /// How it is to run.
    pub run: RunSpec,
    /// Whether traffic follows by itself.
    pub switch: SwitchMode,
    /// Why, in the caller's words.
    pub reason: Option<String>,
    /// The deployment whose snapshot this repeats.
    pub redeploy_of: Option<DeploymentId>,
    /// The secrets that it runs with, by variable: the newest versions when it was asked for.
    #[serde(default)]
    pub secrets: BTreeMap<EnvKey, SecretRef>,
    /// The deployment of another environment whose image, by its digest, this one runs.
    #[serde(default)]
    pub promoted_from: Option<PromotedFrom>,
    /// Whether it takes over traffic also where it is ready in some of its clusters only.
    #[serde(default)]
    pub allow_partial: bool,
    /// What of `run` was changed for this service instance, beside its service's definition.
    #[serde(default)]
    pub config: InstanceConfig,
}

/// As derived, but that JSON leaves out `secrets`, `promoted_from`, `allow_partial` and `config`
/// where they say nothing, as events did before there were any. Rows of projections, which are not
/// self-describing, always have them.
impl Serialize for Requested {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let json = serializer.is_human_readable();
        let secrets = !(json && self.secrets.is_empty());
        let promoted_from = !(json && self.promoted_from.is_none());
        let allow_partial = !json || self.allow_partial;
        let config = !(json && self.config.is_empty());
        let sometimes = [secrets, promoted_from, allow_partial, config];
        let fields = 9 + sometimes.map(usize::from).iter().sum::<usize>();
        let mut out = serializer.serialize_struct("Requested", fields)?;
        out.serialize_field("instance", &self.instance)?;
        out.serialize_field("version", &self.version)?;
        out.serialize_field("clusters", &self.clusters)?;
        out.serialize_field("build", &self.build)?;
        out.serialize_field("image_repository", &self.image_repository)?;
        out.serialize_field("run", &self.run)?;
        out.serialize_field("switch", &self.switch)?;
        out.serialize_field("reason", &self.reason)?;
        out.serialize_field("redeploy_of", &self.redeploy_of)?;
        if secrets {
            out.serialize_field("secrets", &self.secrets)?;
        }
        if promoted_from {
            out.serialize_field("promoted_from", &self.promoted_from)?;
        }
        if allow_partial {
            out.serialize_field("allow_partial", &self.allow_partial)?;
        }
        if config {
            out.serialize_field("config", &self.config)?;
        }
        out.end()
    }
}

/// It was admitted to the pipeline: no other one of its instance runs.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
pub struct Queued {}

/// A worker began to resolve and fetch the source.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct CloningStarted {
    /// The worker.
    pub worker: String,
}

/// A commit of the source repository, as it was found when the ref was resolved.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct SourceCommit {
    /// The full commit id.
    pub commit: CommitId,
    /// The whole commit message, cut to 4 KiB.
    pub message: String,
    /// The author's name.
    pub author_name: String,
    /// The author's address.
    pub author_email: String,
    /// When it was committed.
    #[serde(with = "crate::instant")]
    #[schemars(with = "Timestamp")]
    pub committed_at: Timestamp,
    /// A link to the commit, or the repository's URL where none is known.
    pub url: String,
}

/// The ref was resolved, once and for all, to a commit.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct SourceResolved {
    /// The commit.
    pub source: SourceCommit,
    /// The build that makes its image, shared with every deployment of the same commit and
    /// configuration.
    pub build: BuildId,
    /// The branch that the ref named; none for a tag or a commit.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub branch: Option<GitRef>,
}

/// Its build began to build.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct BuildingStarted {
    /// The build.
    pub build: BuildId,
}

/// Its build began to push.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct PushingStarted {
    /// The build.
    pub build: BuildId,
}

/// Its image exists, and is known by its digest from here on.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct ImagePinned {
    /// The image.
    pub image: PinnedImage,
    /// The build that made it; none for an image that was given.
    pub build: Option<BuildId>,
    /// The build had been made for another deployment before.
    pub shared: bool,
}

/// Its chart was fetched, and is known by its digest from here on.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct ChartPinned {
    /// The chart.
    pub chart: PinnedChart,
}

/// The GitOps commit is made; the clusters converge to it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct DeployingStarted {
    /// The commit in the GitOps repository.
    pub commit: CommitId,
}

/// A later change of this deployment (stop, start, removal) was committed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct ChangeCommitted {
    /// The commit in the GitOps repository.
    pub commit: CommitId,
    /// Replicas that it asks for; none if it removes the release.
    pub replicas: Option<u32>,
}

/// One running instance, as it was seen.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Instance {
    /// Its name, unique within the cluster.
    pub name: String,
    /// Where it answers: `host:port`.
    pub address: String,
    /// Whether its readiness probe succeeds.
    pub ready: bool,
    /// How often it was restarted.
    pub restarts: u32,
}

/// A cause with a remedy.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize, JsonSchema)]
pub struct Problem {
    /// In the field's words: `CrashLoopBackOff`, `ImagePullBackOff`.
    pub reason: String,
    /// What happened.
    pub message: String,
    /// What helps.
    pub remedy: String,
    /// Whether waiting may still mend it.
    pub transient: bool,
    /// What it usually comes of, the most likely first.
    #[serde(default)]
    pub likely_causes: Vec<String>,
    /// All that may help, beginning with `remedy`.
    #[serde(default)]
    pub remedies: Vec<String>,
}

/// As derived, but that JSON leaves out the lists where they are empty, as it was before there were
/// any. Rows of projections, which are not self-describing, always have them.
impl Serialize for Problem {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let all = !serializer.is_human_readable();
        let likely_causes = all || !self.likely_causes.is_empty();
        let remedies = all || !self.remedies.is_empty();
        let newer = usize::from(likely_causes) + usize::from(remedies);
        let mut out = serializer.serialize_struct("Problem", 4 + newer)?;
        out.serialize_field("reason", &self.reason)?;
        out.serialize_field("message", &self.message)?;
        out.serialize_field("remedy", &self.remedy)?;
        out.serialize_field("transient", &self.transient)?;
        if likely_causes {
            out.serialize_field("likely_causes", &self.likely_causes)?;
        }
        if remedies {
            out.serialize_field("remedies", &self.remedies)?;
        }
        out.end()
    }
}

/// What was seen of the workload in one cluster. An observation, not an intent.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct WorkloadObserved {
    /// Where.
    pub cluster: ClusterName,
    /// The GitOps commit that the cluster had applied when this was seen.
    pub revision: CommitId,
    /// Instances that the commit asks for.
    pub wanted: u32,
    /// Instances that were there.
    pub instances: Vec<Instance>,
    /// What is wrong, if anything.
    pub problem: Option<Problem>,
}

impl WorkloadObserved {
    /// Instances that were ready.
    pub fn ready(&self) -> u32 {
        u32::try_from(self.instances.iter().filter(|i| i.ready).count()).unwrap_or(u32::MAX)
    }

    /// Whether all that is asked for is ready.
    pub fn is_ready(&self) -> bool {
        self.wanted > 0 && self.ready() >= self.wanted
    }
}

/// What was seen when the public address was asked, as a user would.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct EndpointObserved {
    /// The hostname that was asked.
    pub hostname: Hostname,
    /// The URL that was asked.
    pub url: String,
    /// Whether this deployment answered.
    pub ready: bool,
    /// The HTTP status, if there was an answer.
    pub http_status: Option<u16>,
    /// What is wrong, if anything.
    pub message: Option<String>,
}

/// A cluster had not had the image, and has fetched it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct ImagePulled {
    /// Where.
    pub cluster: ClusterName,
    /// How long that took, in milliseconds.
    pub took_ms: u64,
}

/// The workload serves an OpenAPI document.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct OpenapiFound {
    /// Where it is served.
    pub path: String,
    /// Digest of its bytes.
    pub digest: crate::names::Digest,
    /// Its title, if it has one.
    pub title: Option<String>,
    /// Its version, if it has one.
    pub version: Option<String>,
}

/// This revision runs in all clusters, and its routes are applied.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Succeeded {
    /// The GitOps commit that runs.
    pub revision: CommitId,
    /// The route table that was applied for it.
    pub table: u32,
}

/// This revision runs in some of its clusters and is routed there, and has failed in the others.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct PartiallySucceeded {
    /// The GitOps commit that runs.
    pub revision: CommitId,
    /// The route table that was applied for it.
    pub table: u32,
    /// The clusters where it is ready.
    pub ready: Vec<ClusterName>,
    /// The clusters where it has failed, with why.
    pub failed: Vec<ClusterFailed>,
}

/// It ended before it was live.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Failed {
    /// Where in the pipeline.
    pub during: Status,
    /// A stable code: `ref_not_found`, `build_command_failed`, `CrashLoopBackOff`.
    pub code: String,
    /// What happened.
    pub message: String,
    /// What helps.
    pub remedy: String,
}

/// Somebody asked to cancel it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct CancelRequested {
    /// Why, in the caller's words.
    pub reason: Option<String>,
}

/// It was cancelled.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Cancelled {
    /// Where in the pipeline.
    pub during: Status,
    /// The newer deployment of the same instance that took its place, if that is why.
    pub superseded_by: Option<DeploymentId>,
    /// Why, for people.
    pub message: String,
}

/// Somebody asked for an operation on it.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
pub struct OperationRequested {
    /// Why, in the caller's words.
    pub reason: Option<String>,
}

/// Somebody asked for another number of instances, where it runs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct ScaleRequested {
    /// Instances in each cluster: 1 to 100.
    pub replicas: u32,
    /// Why, in the caller's words.
    pub reason: Option<String>,
}

/// An operation was carried out and seen to be.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct OperationDone {
    /// The GitOps commit that the clusters had applied.
    pub revision: CommitId,
}

/// An operation could not be carried out.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct OperationFailed {
    /// A stable code.
    pub code: String,
    /// What happened.
    pub message: String,
    /// What helps.
    pub remedy: String,
}

/// While it waited for build capacity, it was decided to admit a later one before it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Overtaken {
    /// The one that went first.
    pub by: DeploymentId,
    /// Why.
    pub reason: String,
}

/// Its record was put away.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
pub struct Deleted {
    /// Why, in the caller's words.
    pub reason: Option<String>,
}

events! {
    /// The events of a deployment.
    DeploymentEvent {
        /// It was asked for.
        Requested(Box<Requested>) = "deployment.requested.v1",
        /// It was admitted.
        Queued(Queued) = "deployment.queued.v1",
        /// Its source is being fetched.
        CloningStarted(CloningStarted) = "deployment.cloning_started.v1",
        /// Its ref was resolved.
        SourceResolved(SourceResolved) = "deployment.source_resolved.v1",
        /// Its image is being built.
        BuildingStarted(BuildingStarted) = "deployment.building_started.v1",
        /// Its image is being pushed.
        PushingStarted(PushingStarted) = "deployment.pushing_started.v1",
        /// Its image is pinned.
        ImagePinned(ImagePinned) = "deployment.image_pinned.v1",
        /// Its chart is pinned.
        ChartPinned(ChartPinned) = "deployment.chart_pinned.v1",
        /// It is committed.
        DeployingStarted(DeployingStarted) = "deployment.deploying_started.v1",
        /// A cluster was looked at.
        WorkloadObserved(WorkloadObserved) = "deployment.workload_observed.v1",
        /// Its public address was looked at.
        EndpointObserved(EndpointObserved) = "deployment.endpoint_observed.v1",
        /// Its public address was looked at from where users are, and has changed.
        EndpointPlanesChanged(EndpointPlanesChanged) = "deployment.endpoint_planes_changed.v1",
        /// A cluster has fetched its image.
        ImagePulled(ImagePulled) = "deployment.image_pulled.v1",
        /// It serves an OpenAPI document.
        OpenapiFound(OpenapiFound) = "deployment.openapi_found.v1",
        /// It is live.
        Succeeded(Succeeded) = "deployment.succeeded.v1",
        /// It is live in some of its clusters.
        PartiallySucceeded(PartiallySucceeded) = "deployment.partially_succeeded.v1",
        /// It has failed in one of its clusters.
        ClusterFailed(ClusterFailed) = "deployment.cluster_failed.v1",
        /// Clusters where it failed are to try again.
        RetryRequested(RetryRequested) = "deployment.retry_requested.v1",
        /// One of them does.
        ClusterRetried(ClusterRetried) = "deployment.cluster_retried.v1",
        /// Another one was admitted before it.
        Overtaken(Overtaken) = "deployment.overtaken.v1",
        /// It failed.
        Failed(Failed) = "deployment.failed.v1",
        /// It is to be cancelled.
        CancelRequested(CancelRequested) = "deployment.cancel_requested.v1",
        /// It was cancelled.
        Cancelled(Cancelled) = "deployment.cancelled.v1",
        /// It is to be stopped.
        StopRequested(OperationRequested) = "deployment.stop_requested.v1",
        /// It is stopped.
        Stopped(OperationDone) = "deployment.stopped.v1",
        /// It could not be stopped.
        StopFailed(OperationFailed) = "deployment.stop_failed.v1",
        /// It is to be started.
        StartRequested(OperationRequested) = "deployment.start_requested.v1",
        /// It is started.
        RestartDone(OperationDone) = "deployment.started.v1",
        /// It could not be started.
        StartFailed(OperationFailed) = "deployment.start_failed.v1",
        /// It is to be removed.
        TerminateRequested(OperationRequested) = "deployment.terminate_requested.v1",
        /// It is removed.
        Terminated(OperationDone) = "deployment.terminated.v1",
        /// It could not be removed.
        TerminateFailed(OperationFailed) = "deployment.terminate_failed.v1",
        /// Its record is put away.
        Deleted(Deleted) = "deployment.deleted.v1",
        /// Its plan waits to be allowed.
        ApprovalRequested(Box<ApprovalRequested>) = "deployment.approval_requested.v1",
        /// Its plan became another one.
        ApprovalsVoided(Box<ApprovalsVoided>) = "deployment.approvals_voided.v1",
        /// Somebody allowed it.
        ApprovalGranted(ApprovalGranted) = "deployment.approval_granted.v1",
        /// Somebody does not allow it.
        ApprovalRejected(ApprovalRejected) = "deployment.approval_rejected.v1",
        /// Somebody went ahead.
        EmergencyOverride(EmergencyOverride) = "deployment.emergency_override.v1",
        /// It goes on.
        Approved(Approved) = "deployment.approved.v1",
        /// An emergency was looked at.
        PostReviewCompleted(PostReviewCompleted) = "deployment.post_review_completed.v1",
        /// It waits for the end of a freeze.
        Held(Held) = "deployment.held.v1",
        /// It waits no more.
        Released(Released) = "deployment.released.v1",
        /// Somebody let it through a freeze.
        FreezeOverride(FreezeOverride) = "deployment.emergency_freeze_override.v1",
        /// It will be stopped by itself.
        StopScheduled(StopScheduled) = "deployment.stop_scheduled.v1",
        /// It will not.
        StopUnscheduled(StopUnscheduled) = "deployment.stop_unscheduled.v1",
        /// A later change of it is committed.
        ChangeCommitted(ChangeCommitted) = "deployment.change_committed.v1",
        /// It is to have another number of instances.
        ScaleRequested(ScaleRequested) = "deployment.scale_requested.v1",
    }
}

/// One of the three answers to "is it up?".
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Readiness {
    /// The answer.
    pub state: ReadinessState,
    /// Why, in one word of the field: `Built`, `CrashLoopBackOff`, `Stopped`.
    pub reason: String,
    /// A sentence, if there is more to say.
    pub message: Option<String>,
    /// Since when the state is this.
    #[serde(with = "crate::instant")]
    #[schemars(with = "Timestamp")]
    pub since: Timestamp,
    /// What it was true for: a digest, a GitOps commit, a hostname.
    pub revision: Option<String>,
}

/// The answers that there are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum ReadinessState {
    /// Not yet.
    Pending,
    /// Yes.
    Ready,
    /// No, but it may become so by itself.
    NotReady,
    /// No, and it will not.
    Failed,
}

/// When each step was reached, for durations.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
pub struct Milestones {
    /// Each state with the time at which it was first entered.
    #[serde(with = "crate::instant::values")]
    #[schemars(with = "BTreeMap<Status, Timestamp>")]
    pub entered: BTreeMap<Status, Timestamp>,
}

/// Which event asked for another number of instances.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Scaling {
    /// The event.
    pub event: EventId,
    /// Where it is.
    pub position: Position,
}

/// The state of a deployment.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Deployment {
    /// Everything that was asked for: the snapshot.
    pub request: Box<Requested>,
    /// The request's event.
    pub requested_by_event: EventId,
    /// When it was asked for.
    #[serde(with = "crate::instant")]
    pub created_at: Timestamp,
    /// Where it is in its life.
    pub status: Status,
    /// The event that led to this status.
    pub status_event: EventId,
    /// Since when.
    #[serde(with = "crate::instant")]
    pub status_since: Timestamp,
    /// The trace that the event belongs to which led to this status.
    pub trace: Option<TraceParent>,
    /// When each state was first entered.
    pub milestones: Milestones,
    /// The event with which the run that deploys it ended first: what follows, such as another try
    /// in a cluster or a start after a stop, is no longer part of that run.
    pub ended: Option<Position>,
    /// The resolved source.
    pub source: Option<SourceCommit>,
    /// The branch that it was deployed from.
    pub branch: Option<GitRef>,
    /// The build.
    pub build: Option<BuildId>,
    /// The image.
    pub image: Option<PinnedImage>,
    /// The chart.
    pub chart: Option<PinnedChart>,
    /// The GitOps commit that introduced it.
    pub commit: Option<CommitId>,
    /// The newest GitOps commit about it, with the replicas that it asks for; no replicas once
    /// it is removed from the repository.
    pub change: Option<ChangeCommitted>,
    /// Instances in each cluster that are asked for while it runs: the request's, until somebody
    /// scales it.
    pub replicas: u32,
    /// The event that asked for another number, until it is committed.
    pub scaling: Option<Scaling>,
    /// What was last seen, by cluster.
    pub observed: Few<ClusterName, WorkloadObserved>,
    /// Where it is in each of its clusters.
    pub clusters: Few<ClusterName, ClusterProgress>,
    /// The later ones that were admitted before it.
    pub overtaken: Vec<DeploymentId>,
    /// What was last seen of its addresses.
    pub endpoints: Few<Hostname, EndpointObserved>,
    /// The address that was asked last.
    pub last_asked: Option<Hostname>,
    /// What was last seen of its addresses from where users are, where that is looked at.
    pub planes: Few<Hostname, Planes>,
    /// How long clusters took to fetch its image first, in milliseconds: those that did not have
    /// it.
    pub image_pulls: Few<ClusterName, u64>,
    /// Its API description.
    pub openapi: Option<OpenapiFound>,
    /// Somebody asked to cancel it.
    pub cancel: Option<CancelRequested>,
    /// Why it failed, or an operation on it did.
    pub failure: Option<Failed>,
    /// Why it was cancelled.
    pub cancelled: Option<Cancelled>,
    /// When it is to be stopped by itself.
    pub stops: StopPlan,
    /// Who allowed it, where that is asked for.
    pub approval: Option<Box<Approval>>,
    /// The freeze that it waits for, or waited for last.
    pub hold: Option<Box<Hold>>,
    /// Is there an image?
    pub build_readiness: Readiness,
    /// Does it run?
    pub workload_readiness: Readiness,
    /// Is it reached?
    pub endpoint_readiness: Readiness,
}

impl Deployment {
    /// Whether every cluster reports all that is asked for as ready.
    pub fn workload_is_ready(&self) -> bool {
        self.request
            .clusters
            .iter()
            .all(|c| self.observed.get(c).is_some_and(WorkloadObserved::is_ready))
    }

    /// Whether no cluster reports a running instance any more.
    pub fn workload_is_gone(&self) -> bool {
        self.request.clusters.iter().all(|c| {
            self.observed
                .get(c)
                .is_some_and(|o| o.wanted == 0 && o.instances.is_empty())
        })
    }

    /// Whether it is known by a digest what it runs.
    pub fn is_pinned(&self) -> bool {
        self.image.is_some() || self.chart.is_some()
    }

    /// The digest of what it runs: of its image, or of its chart.
    pub fn digest(&self) -> Option<&Digest> {
        let image = self.image.as_ref().map(|image| &image.digest);
        image.or_else(|| self.chart.as_ref().map(|chart| &chart.digest))
    }

    /// Whether it runs, can run again, or is on its way to run.
    pub fn is_active(&self) -> bool {
        !matches!(
            self.status,
            Status::Terminated | Status::Deleted | Status::Failed | Status::Cancelled
        )
    }

    /// What it runs differently from its service's definition: what was asked for, and how it was
    /// scaled since.
    pub fn config(&self) -> InstanceConfig {
        let mut config = self.request.config.clone();
        if self.replicas != self.request.run.replicas {
            config.replicas = Some(self.replicas);
        }
        config
    }

    /// Whether it runs as another one does, in whatever number.
    pub fn runs_as(&self, other: &Self) -> bool {
        let other = &other.request.run;
        let run = RunSpec {
            replicas: other.replicas,
            ..self.request.run.clone()
        };
        run == *other
    }

    /// Whether the GitOps repository still lists it.
    pub fn in_repository(&self) -> bool {
        self.commit.is_some() && self.change.as_ref().is_none_or(|c| c.replicas.is_some())
    }

    /// When something is to happen to it by itself, if nothing is decided before.
    pub fn due(&self) -> Option<Timestamp> {
        match self.status {
            Status::Started => self.stops.pending.as_ref().map(|p| p.due),
            Status::AwaitingApproval => self.approval.as_ref().and_then(|a| a.expires),
            Status::Requested | Status::Packaging => self.held().and_then(|hold| hold.until),
            _ => None,
        }
    }

    /// The operations that are possible now.
    pub fn operations(&self) -> Vec<Operation> {
        Operation::ALL
            .into_iter()
            .filter(|o| self.refusal_of(*o).is_none())
            .collect()
    }

    /// A pipeline has ended before its success: what is still pending will not come any more.
    fn answer_what_never_came(&mut self, reason: &str, at: Timestamp) {
        for readiness in [&mut self.workload_readiness, &mut self.endpoint_readiness] {
            if readiness.state == ReadinessState::Pending {
                let message = Some("the deployment ended before it came to this".to_owned());
                let revision = readiness.revision.clone();
                set(
                    readiness,
                    ReadinessState::Failed,
                    reason,
                    message,
                    at,
                    revision,
                );
            }
        }
    }

    fn set_workload(
        &mut self,
        state: ReadinessState,
        reason: &str,
        message: Option<String>,
        at: Timestamp,
    ) {
        let revision = self
            .change
            .as_ref()
            .map(|c| &c.commit)
            .or(self.commit.as_ref())
            .map(ToString::to_string);
        set(
            &mut self.workload_readiness,
            state,
            reason,
            message,
            at,
            revision,
        );
    }

    fn judge_workload(&mut self, at: Timestamp) {
        let wanted: u32 = self.observed.values().map(|o| o.wanted).sum();
        let ready: u32 = self.observed.values().map(WorkloadObserved::ready).sum();
        let problem = self
            .observed
            .iter()
            .find_map(|(c, o)| o.problem.as_ref().map(|p| (c.clone(), p.clone())));
        if let Some((cluster, p)) = problem {
            let state = if p.transient {
                ReadinessState::NotReady
            } else {
                ReadinessState::Failed
            };
            self.set_workload(
                state,
                &p.reason,
                Some(format!("{cluster}: {}", p.message)),
                at,
            );
        } else if self.workload_is_ready() {
            let text = format!("{ready} of {wanted} instances are ready");
            self.set_workload(ReadinessState::Ready, "Ready", Some(text), at);
        } else if self.workload_is_gone() {
            self.set_workload(ReadinessState::NotReady, "Stopped", None, at);
        } else {
            let state = if self.status == Status::Started {
                ReadinessState::NotReady
            } else {
                ReadinessState::Pending
            };
            let text = format!("{ready} of {wanted} instances are ready");
            self.set_workload(state, "Progressing", Some(text), at);
        }
    }
}

/// What a partial success is short of, as the deployment's failure.
fn partial(failed: &ClusterFailed) -> Failed {
    Failed {
        during: Status::Deploying,
        code: failed.code.clone(),
        message: format!("{}: {}", failed.cluster, failed.message),
        remedy: format!(
            "{}; then `daybook retry`",
            failed.remedy.trim_end_matches('.')
        ),
    }
}

fn set(
    r: &mut Readiness,
    state: ReadinessState,
    reason: &str,
    message: Option<String>,
    at: Timestamp,
    revision: Option<String>,
) {
    if r.state != state || r.revision != revision {
        r.since = at;
    }
    r.state = state;
    r.reason = reason.to_owned();
    r.message = message;
    r.revision = revision;
}

impl Aggregate for Deployment {
    type Event = DeploymentEvent;
    const KIND: AggregateKind = AggregateKind::Deployment;

    fn first(event: DeploymentEvent, at: At) -> Result<Self, Illegal> {
        let status = Step::from(&event).follow(None)?;
        let DeploymentEvent::Requested(request) = event else {
            return Err(Illegal::new(event.kind(), status.as_str()));
        };
        let pending = || Readiness {
            state: ReadinessState::Pending,
            reason: "Requested".into(),
            message: None,
            since: at.time,
            revision: None,
        };
        let clusters = request.clusters.iter().cloned();
        let clusters = clusters.map(|c| (c, ClusterProgress::new(at.time)));
        Ok(Self {
            clusters: clusters.collect(),
            overtaken: Vec::new(),
            replicas: request.run.replicas,
            scaling: None,
            request,
            requested_by_event: at.id,
            created_at: at.time,
            status,
            status_event: at.id,
            status_since: at.time,
            trace: at.trace,
            milestones: Milestones {
                entered: BTreeMap::from([(Status::Requested, at.time)]),
            },
            ended: None,
            source: None,
            branch: None,
            build: None,
            image: None,
            chart: None,
            commit: None,
            change: None,
            observed: Few::default(),
            endpoints: Few::default(),
            last_asked: None,
            planes: Few::default(),
            image_pulls: Few::default(),
            openapi: None,
            cancel: None,
            failure: None,
            cancelled: None,
            stops: StopPlan::default(),
            approval: None,
            hold: None,
            build_readiness: pending(),
            workload_readiness: pending(),
            endpoint_readiness: pending(),
        })
    }

    fn apply(&mut self, event: DeploymentEvent, at: At) -> Result<(), Illegal> {
        let step = Step::from(&event);
        let to = step.follow(Some(self.status))?;
        if step.row.is_some_and(|row| row.to.is_some()) {
            self.status = to;
            self.status_event = at.id;
            self.status_since = at.time;
            self.trace = at.trace;
            self.milestones.entered.entry(to).or_insert(at.time);
            self.stops.entered(to, at.id);
        }
        if let DeploymentEvent::Succeeded(_)
        | DeploymentEvent::PartiallySucceeded(_)
        | DeploymentEvent::Failed(_)
        | DeploymentEvent::Cancelled(_) = &event
        {
            self.ended.get_or_insert(at.position);
        }
        use ReadinessState::{Failed as No, NotReady, Pending, Ready};
        match event {
            DeploymentEvent::Requested(_) => {}
            DeploymentEvent::Queued(_) => {}
            DeploymentEvent::CloningStarted(_) => {
                set(
                    &mut self.build_readiness,
                    Pending,
                    "Cloning",
                    None,
                    at.time,
                    None,
                );
            }
            DeploymentEvent::SourceResolved(e) => {
                self.source = Some(e.source);
                self.branch = e.branch;
                self.build = Some(e.build);
            }
            DeploymentEvent::BuildingStarted(e) => {
                self.build = Some(e.build);
                set(
                    &mut self.build_readiness,
                    Pending,
                    "Building",
                    None,
                    at.time,
                    None,
                );
            }
            DeploymentEvent::PushingStarted(e) => {
                self.build = Some(e.build);
                set(
                    &mut self.build_readiness,
                    Pending,
                    "Pushing",
                    None,
                    at.time,
                    None,
                );
            }
            DeploymentEvent::ImagePinned(e) => {
                let reason = match (e.build, e.shared) {
                    (None, _) => "ImageGiven",
                    (_, true) => "BuildShared",
                    _ => "Built",
                };
                let digest = Some(e.image.digest.to_string());
                set(
                    &mut self.build_readiness,
                    Ready,
                    reason,
                    None,
                    at.time,
                    digest,
                );
                self.image = Some(e.image);
            }
            DeploymentEvent::ChartPinned(e) => {
                let digest = Some(e.chart.digest.to_string());
                let build = &mut self.build_readiness;
                set(build, Ready, "ChartGiven", None, at.time, digest);
                self.chart = Some(e.chart);
            }
            DeploymentEvent::DeployingStarted(e) => {
                self.commit = Some(e.commit.clone());
                self.change = Some(ChangeCommitted {
                    commit: e.commit,
                    replicas: Some(self.request.run.replicas),
                });
                self.set_workload(Pending, "Progressing", None, at.time);
            }
            DeploymentEvent::ScaleRequested(e) => {
                self.replicas = e.replicas;
                self.scaling = Some(Scaling {
                    event: at.id,
                    position: at.position,
                });
            }
            DeploymentEvent::ChangeCommitted(e) => {
                if e.replicas == Some(self.replicas) {
                    self.scaling = None;
                }
                self.commit.get_or_insert_with(|| e.commit.clone());
                self.change = Some(e);
            }
            DeploymentEvent::WorkloadObserved(e) => {
                self.observed.insert(e.cluster.clone(), e);
                self.judge_workload(at.time);
            }
            DeploymentEvent::EndpointObserved(e) => {
                self.last_asked = Some(e.hostname.clone());
                self.endpoints.insert(e.hostname.clone(), e);
                plane::judge(self, at.time);
            }
            DeploymentEvent::EndpointPlanesChanged(e) => plane::fold(self, e, at.time),
            DeploymentEvent::ImagePulled(e) => {
                if self.image_pulls.get(&e.cluster).is_none() {
                    self.image_pulls.insert(e.cluster, e.took_ms);
                }
            }
            DeploymentEvent::OpenapiFound(e) => self.openapi = Some(e),
            DeploymentEvent::Succeeded(_) | DeploymentEvent::RestartDone(_) => {
                self.failure = None;
            }
            DeploymentEvent::PartiallySucceeded(e) => {
                for failed in &e.failed {
                    self.progress(&failed.cluster, |p| p.fail(failed.cause()));
                }
                self.failure = e.failed.first().map(partial);
            }
            DeploymentEvent::ClusterFailed(e) => {
                let cause = e.cause();
                self.progress(&e.cluster, |p| p.fail(cause));
            }
            DeploymentEvent::RetryRequested(e) => {
                for cluster in &e.clusters {
                    self.progress(cluster, |p| p.try_again(at.time));
                }
            }
            DeploymentEvent::ClusterRetried(e) => {
                // What was seen before that says nothing about this try.
                self.observed.remove(&e.cluster);
                self.progress(&e.cluster, ClusterProgress::begin);
                self.judge_workload(at.time);
            }
            DeploymentEvent::Overtaken(e) => self.overtaken.push(e.by),
            DeploymentEvent::Failed(e) => {
                let message = Some(e.message.clone());
                if !self.is_pinned() {
                    set(
                        &mut self.build_readiness,
                        No,
                        &e.code,
                        message,
                        at.time,
                        None,
                    );
                } else if e.during == Status::Deploying && self.workload_is_ready() {
                    set(
                        &mut self.endpoint_readiness,
                        No,
                        &e.code,
                        message,
                        at.time,
                        None,
                    );
                } else {
                    self.set_workload(No, &e.code, message, at.time);
                }
                self.answer_what_never_came("PipelineFailed", at.time);
                self.failure = Some(e);
            }
            DeploymentEvent::CancelRequested(e) => self.cancel = Some(e),
            DeploymentEvent::Cancelled(e) => {
                let message = Some(e.message.clone());
                if !self.is_pinned() {
                    set(
                        &mut self.build_readiness,
                        No,
                        "Cancelled",
                        message.clone(),
                        at.time,
                        None,
                    );
                }
                self.set_workload(No, "Cancelled", message, at.time);
                self.answer_what_never_came("Cancelled", at.time);
                self.cancelled = Some(e);
            }
            DeploymentEvent::StopRequested(_) => self.failure = None,
            DeploymentEvent::StartRequested(_) => {
                self.failure = None;
                for progress in self.clusters.values_mut() {
                    progress.start_again(at.time);
                }
            }
            DeploymentEvent::TerminateRequested(_) => self.failure = None,
            DeploymentEvent::Stopped(_) => {
                self.planes.clear();
                self.set_workload(NotReady, "Stopped", None, at.time);
                set(
                    &mut self.endpoint_readiness,
                    NotReady,
                    "Stopped",
                    None,
                    at.time,
                    None,
                );
            }
            DeploymentEvent::Terminated(_) => {
                self.observed.clear();
                self.planes.clear();
                self.set_workload(NotReady, "Terminated", None, at.time);
                set(
                    &mut self.endpoint_readiness,
                    NotReady,
                    "Terminated",
                    None,
                    at.time,
                    None,
                );
            }
            DeploymentEvent::StopFailed(e)
            | DeploymentEvent::StartFailed(e)
            | DeploymentEvent::TerminateFailed(e) => {
                self.failure = Some(Failed {
                    during: self.status,
                    code: e.code,
                    message: e.message,
                    remedy: e.remedy,
                });
            }
            DeploymentEvent::Deleted(_) => {}
            DeploymentEvent::StopScheduled(e) => self.stops.schedule(e),
            DeploymentEvent::StopUnscheduled(e) => self.stops.unschedule(&e),
            event @ (DeploymentEvent::Held(_)
            | DeploymentEvent::Released(_)
            | DeploymentEvent::FreezeOverride(_)) => freeze::fold(&mut self.hold, event, at),
            event @ (DeploymentEvent::ApprovalRequested(_)
            | DeploymentEvent::ApprovalsVoided(_)
            | DeploymentEvent::ApprovalGranted(_)
            | DeploymentEvent::ApprovalRejected(_)
            | DeploymentEvent::EmergencyOverride(_)
            | DeploymentEvent::Approved(_)
            | DeploymentEvent::PostReviewCompleted(_)) => {
                if let DeploymentEvent::PostReviewCompleted(e) = &event {
                    freeze::review(&mut self.hold, e, at);
                }
                approval::fold(&mut self.approval, event, at);
            }
        }
        self.judge_clusters(at.time);
        Ok(())
    }
}

/// Decides whether `event` may be appended to a deployment in this state.
///
/// Commands of a deployment are its events in the imperative: what may happen is the same table
/// either way, and all that differs is that an event which would change nothing is not appended.
/// The refusal names the state, and what would make the step possible.
pub fn decide(
    state: Option<&Deployment>,
    event: DeploymentEvent,
) -> Result<Decision<DeploymentEvent>, Refusal> {
    let kind = event.kind();
    let Some(state) = state else {
        return match event {
            DeploymentEvent::Requested(ref r) => {
                check_request(r)?;
                Ok(Decision::Append(event))
            }
            _ => Err(not_found()),
        };
    };
    if let DeploymentEvent::Requested(_) = event {
        return Err(Refusal::new(
            "deployment_exists",
            "a deployment with this id exists already",
            "use another Idempotency-Key for another deployment",
        ));
    }
    let unchanged = match &event {
        DeploymentEvent::WorkloadObserved(e) => state.observed.get(&e.cluster).is_some_and(|o| {
            // A newer GitOps commit that changes nothing about this release is no news.
            o.wanted == e.wanted && o.instances == e.instances && o.problem == e.problem
        }),
        DeploymentEvent::EndpointObserved(e) => state.endpoints.get(&e.hostname) == Some(e),
        DeploymentEvent::ImagePulled(e) => state.image_pulls.get(&e.cluster).is_some(),
        DeploymentEvent::OpenapiFound(e) => state.openapi.as_ref() == Some(e),
        DeploymentEvent::CancelRequested(_) => {
            state.cancel.is_some() || state.status == Status::Cancelled
        }
        DeploymentEvent::SourceResolved(e) => state.source.as_ref() == Some(&e.source),
        DeploymentEvent::ChangeCommitted(e) => state.change.as_ref() == Some(e),
        DeploymentEvent::StopScheduled(e) => state.stops.knows(e),
        DeploymentEvent::StopUnscheduled(e) => !state.stops.waits_for(e.nonce),
        DeploymentEvent::ClusterFailed(e) => {
            let progress = state.clusters.get(&e.cluster);
            progress.is_none_or(|p| p.state == ClusterState::Failed)
        }
        DeploymentEvent::ClusterRetried(e) => {
            let progress = state.clusters.get(&e.cluster);
            !progress.is_some_and(ClusterProgress::is_asked_again)
        }
        DeploymentEvent::RetryRequested(e) => {
            let progress = |c| state.clusters.get(c);
            let asked = |c| progress(c).is_some_and(ClusterProgress::is_asked_again);
            !e.clusters.is_empty() && e.clusters.iter().all(asked)
        }
        DeploymentEvent::Overtaken(e) => state.overtaken.contains(&e.by),
        DeploymentEvent::ScaleRequested(e) => {
            state.status == Status::Started && state.replicas == e.replicas
        }
        _ => false,
    };
    if unchanged {
        return Ok(Decision::Nothing);
    }
    let event = match event {
        DeploymentEvent::EndpointPlanesChanged(e) => match plane::news(state, e) {
            Some(news) => DeploymentEvent::EndpointPlanesChanged(news),
            None => return Ok(Decision::Nothing),
        },
        event => event,
    };
    if let DeploymentEvent::ScaleRequested(e) = &event {
        if state.chart.is_some() {
            return Err(Refusal::new(
                "chart_not_scaled",
                "how many instances a chart runs is for its values to say",
                "change `run.chart_values` of the service and deploy the chart again",
            ));
        }
        check_replicas(e.replicas)?;
        let run = RunSpec {
            replicas: e.replicas,
            ..state.request.run.clone()
        };
        run.check_capacity()?;
    }
    let row = transition(kind).ok_or_else(|| {
        Refusal::new(
            "unknown_step",
            format!("{kind} is not a step of a deployment"),
            "this is a defect of Daybook; please report it",
        )
    })?;
    if !row.from.contains(&state.status) {
        if row.to == Some(state.status) {
            return Ok(Decision::Nothing);
        }
        return Err(operation::not_in_this_state(row, state));
    }
    match &event {
        DeploymentEvent::RetryRequested(e) => cluster::check_retry(state, e)?,
        DeploymentEvent::Overtaken(_) => admission::check_overtaken(state.overtaken.len())?,
        _ => {}
    }
    if !approval::changes(state, &event)? || !freeze::changes(state, &event)? {
        return Ok(Decision::Nothing);
    }
    if state.cancel.is_some()
        && (row.to.is_some_and(Status::in_pipeline)
            || matches!(event, DeploymentEvent::Succeeded(_)))
    {
        return Err(Refusal::new(
            "cancel_requested",
            "the deployment is being cancelled",
            "wait until it is cancelled, then deploy again",
        ));
    }
    Ok(Decision::Append(event))
}

/// Refuses whatever is asked of a deployment that does not exist.
pub(crate) fn not_found() -> Refusal {
    Refusal::new(
        "deployment_not_found",
        "there is no such deployment",
        "list deployments with `daybook status` or GET /api/v1/deployments",
    )
}

fn check_replicas(replicas: u32) -> Result<(), Refusal> {
    if (1..=100).contains(&replicas) {
        return Ok(());
    }
    Err(Refusal::new(
        "invalid_replicas",
        format!("{replicas} replicas are not possible"),
        "ask for 1 to 100; use `daybook stop` to run none",
    ))
}

fn check_request(r: &Requested) -> Result<(), Refusal> {
    if r.clusters.is_empty() {
        return Err(Refusal::new(
            "no_clusters",
            "the deployment names no cluster, and its environment has none",
            "name clusters in the request, or give the environment some",
        ));
    }
    let mut seen = std::collections::BTreeSet::new();
    if let Some(c) = r.clusters.iter().find(|c| !seen.insert(*c)) {
        return Err(Refusal::new(
            "duplicate_cluster",
            format!("the cluster {c} is named twice"),
            "name each cluster once",
        ));
    }
    check_replicas(r.run.replicas)?;
    r.run.check_capacity()?;
    r.run.check_volumes()?;
    let mut secrets = r.secrets.keys();
    let taken = secrets.find_map(|key| Some((key, r.run.volume_of(key.as_str())?)));
    if let Some((key, volume)) = taken {
        return Err(Refusal::new(
            "volume_variable_taken",
            format!("{key} is a secret, and says where the volume {volume} is"),
            "name another variable in the volume's `env`, or the secret otherwise",
        ));
    }
    if r.run.port == 0 {
        return Err(Refusal::new(
            "invalid_port",
            "port 0 cannot be listened on",
            "use a port from 1 to 65535",
        ));
    }
    if let Version::Git { url, path, .. } = &r.version {
        check_folder(path)?;
        crate::upload::check_owner(url, &r.instance.project, &r.instance.service)?;
    }
    Ok(())
}

/// Refuses a folder that would leave the source repository.
pub fn check_folder(path: &str) -> Result<(), Refusal> {
    let bad = path.starts_with('/')
        || path.contains('\\')
        || path.chars().any(char::is_control)
        || path.split('/').any(|p| p == ".." || p == ".git");
    if bad {
        return Err(Refusal::new(
            "invalid_source_path",
            format!("{path:?} is not a folder within a repository"),
            "use a relative path without `..`",
        ));
    }
    Ok(())
}

/// The build that makes the image of a commit with a configuration. Everything that changes the
/// image is part of it, and nothing else.
pub fn build_id(
    url: &RepositoryUrl,
    commit: &CommitId,
    path: &str,
    build: &BuildSpec,
    repository: &crate::names::ImageRepository,
) -> BuildId {
    let config = serde_json::to_string(build).unwrap_or_default();
    BuildId::derived(
        Uuid::NAMESPACE_URL,
        &format!("{url}\n{commit}\n{path}\n{config}\n{repository}"),
    )
}
