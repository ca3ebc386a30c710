//! What answers look like.

use std::collections::BTreeMap;

use async_graphql::SimpleObject;
use daybook_events::chart::PinnedChart;
use daybook_events::config::InstanceConfig;
use daybook_events::deployment::{
    Cancelled, ClusterState, Deployment, OpenapiFound, Operation, Phase, PlaneSeen, Possibility,
    PromotedFrom, Readiness, Status, SwitchMode, Version, WorkloadObserved,
};
use daybook_events::environment::{Environment, EnvironmentSpec, EnvironmentStatus};
use daybook_events::freeze::{Freeze, FreezeRule, Freezes};
use daybook_events::project::Project;
use daybook_events::routing::{Hostnames, Routing, Stickiness};
use daybook_events::secret::{self, Commitment, Secret, SecretId, SecretRef};
use daybook_events::spec::{BuildSpec, PinnedImage, RunSpec, ServiceSpec};
use daybook_events::{
    Actor, BuildId, ClusterName, CommitId, DeploymentId, Digest, EnvKey, EnvironmentName, GitRef,
    Hostname, ImageRepository, Position, ProjectName, ServiceName,
};
use daybook_events::{FreezeName, RepositoryUrl};
use daybook_projections::{AuditRow, views};
use daybook_projections::{
    Counters, DeploymentRow, HistoryRow, Projections, QueryError, Reached, StateHash,
};
use jiff::Timestamp;
use schemars::JsonSchema;
use serde::Serialize;
use uuid::Uuid;

use crate::queue::{self, QueueView};
use crate::state::{Gateway, Part, Settings};

/// How far the projections are.
#[derive(Debug, Serialize, JsonSchema)]
pub(crate) struct ProjectionsReport {
    /// The events up to here are folded.
    pub(crate) position: Position,
    /// SHA-256 over all rows, in the order of their keys.
    pub(crate) digest: Digest,
    /// The hash over the states of all aggregates there. A replay gives the same one.
    pub(crate) state_hash: Option<StateHash>,
    /// How many events were folded, and how many changed nothing.
    pub(crate) counters: Counters,
}

/// A project.
#[derive(Debug, Serialize, JsonSchema)]
pub(crate) struct ProjectView {
    /// Its name.
    pub(crate) name: ProjectName,
    /// What it is.
    pub(crate) description: Option<String>,
    /// When it was created.
    pub(crate) created_at: Timestamp,
    /// The names of its services.
    pub(crate) services: Vec<ServiceName>,
    /// Where the commits of its GitOps repository are pushed; none if it is on the server alone.
    pub(crate) gitops_remote: Option<RepositoryUrl>,
}

impl From<&Project> for ProjectView {
    fn from(p: &Project) -> Self {
        Self {
            name: p.name.clone(),
            description: p.description.clone(),
            created_at: p.created_at,
            services: p.services.keys().cloned().collect(),
            gitops_remote: p.gitops_remote.clone(),
        }
    }
}

/// All projects.
#[derive(Debug, Serialize, JsonSchema)]
pub(crate) struct ProjectList {
    /// By name.
    pub(crate) projects: Vec<ProjectView>,
}

/// A service.
#[derive(Debug, Serialize, JsonSchema)]
pub(crate) struct ServiceView {
    /// Its project.
    pub(crate) project: ProjectName,
    /// Its name.
    pub(crate) name: ServiceName,
    /// Its definition.
    #[serde(flatten)]
    pub(crate) spec: ServiceSpec,
}

/// The services of a project.
#[derive(Debug, Serialize, JsonSchema)]
pub(crate) struct ServiceList {
    /// By name.
    pub(crate) services: Vec<ServiceView>,
}

/// An environment.
#[derive(Debug, Clone, Serialize, JsonSchema)]
pub(crate) struct EnvironmentView {
    /// Its project.
    pub(crate) project: ProjectName,
    /// Its name.
    pub(crate) name: EnvironmentName,
    /// When it was created.
    pub(crate) created_at: Timestamp,
    /// Whether it can be deployed to.
    pub(crate) status: EnvironmentStatus,
    /// The environment that it was made from.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) from: Option<EnvironmentName>,
    /// The branch whose pushes are deployed to it by themselves.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) auto_deploy: Option<GitRef>,
    /// The pull request that it is for.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) pull_request: Option<PullRequestView>,
    /// Where its services answer.
    pub(crate) urls: Vec<String>,
    /// The windows in which nothing new is brought to it.
    pub(crate) freezes: Vec<FreezeView>,
    /// What it is.
    #[serde(flatten)]
    pub(crate) spec: EnvironmentSpec,
}

/// The pull request of an environment.
#[derive(Debug, Clone, Serialize, JsonSchema)]
pub(crate) struct PullRequestView {
    /// Its number.
    pub(crate) number: u64,
    /// Its title.
    pub(crate) title: String,
    /// Where people read it.
    pub(crate) url: String,
    /// The repository that it is to be merged into.
    pub(crate) repository: String,
    /// Its head.
    pub(crate) head: CommitId,
    /// Whether it is open.
    pub(crate) open: bool,
    /// When it was changed last, by its provider's clock.
    pub(crate) updated_at: Timestamp,
}

impl EnvironmentView {
    /// The same with where its services answer.
    pub(crate) fn with_urls(mut self, routing: Option<&Routing>, gateway: &Gateway) -> Self {
        let routes = routing.iter().flat_map(|r| r.routes.iter());
        self.urls = routes
            .filter(|(_, route)| {
                route.instance.environment == self.name
                    && route.stickiness == Stickiness::Environment
            })
            .map(|(hostname, _)| gateway.url(hostname))
            .collect();
        self
    }
}

impl From<Environment> for EnvironmentView {
    fn from(e: Environment) -> Self {
        Self {
            project: e.project,
            name: e.name,
            created_at: e.created_at,
            status: e.status,
            from: e.from,
            auto_deploy: e.auto_deploy,
            pull_request: e.preview.map(|p| PullRequestView {
                number: p.pull_request.number,
                title: p.pull_request.title,
                url: p.pull_request.url,
                repository: p.pull_request.repository,
                head: p.pull_request.head,
                open: p.open,
                updated_at: p.pull_request.updated_at,
            }),
            urls: Vec::new(),
            freezes: FreezeView::all(&e.freezes, Timestamp::now()),
            spec: e.spec,
        }
    }
}

/// A window in which an environment is frozen.
#[derive(Debug, Clone, Serialize, JsonSchema)]
pub(crate) struct FreezeView {
    /// Its name.
    pub(crate) name: FreezeName,
    /// When, in words.
    pub(crate) when: String,
    /// When.
    pub(crate) rule: FreezeRule,
    /// Why.
    pub(crate) reason: Option<String>,
    /// Whether it is open now.
    pub(crate) open: bool,
    /// When it began, or begins next; none if it is over.
    pub(crate) from: Option<Timestamp>,
    /// When it ends then; none if it does not end by itself.
    pub(crate) until: Option<Timestamp>,
}

impl FreezeView {
    /// A window as it is at a moment.
    pub(crate) fn new(name: &FreezeName, freeze: &Freeze, now: Timestamp) -> Self {
        let next = freeze.rule.next(now);
        Self {
            name: name.clone(),
            when: freeze.rule.to_string(),
            rule: freeze.rule.clone(),
            reason: freeze.reason.clone(),
            open: next.is_some_and(|o| o.has_begun(now)),
            from: next.map(|o| o.from),
            until: next.and_then(|o| o.until),
        }
    }

    /// The windows of an environment, by name.
    pub(crate) fn all(freezes: &Freezes, now: Timestamp) -> Vec<Self> {
        let one = |(name, freeze)| Self::new(name, freeze, now);
        freezes.iter().map(one).collect()
    }
}

/// The environments of a project.
#[derive(Debug, Serialize, JsonSchema)]
pub(crate) struct EnvironmentList {
    /// By name.
    pub(crate) environments: Vec<EnvironmentView>,
}

/// One service in one environment: what is deployed to.
#[derive(Debug, Serialize, JsonSchema)]
pub(crate) struct InstanceEntry {
    /// `project.environment.service`.
    pub(crate) instance_id: String,
    /// The project.
    pub(crate) project: ProjectName,
    /// The environment.
    pub(crate) environment: EnvironmentName,
    /// The service.
    pub(crate) service: ServiceName,
    /// Its main deployment, which traffic goes to.
    pub(crate) main: Option<DeploymentId>,
    /// Whether it is rolled back: then no deployment takes over traffic by itself.
    pub(crate) rolled_back: bool,
}

/// One service in one environment, with what runs there.
#[derive(Debug, Serialize, JsonSchema)]
pub(crate) struct InstanceDetail {
    /// What lists show of it.
    #[serde(flatten)]
    pub(crate) entry: InstanceEntry,
    /// The main deployments before, newest last: what a rollback can go back to.
    pub(crate) former: Vec<DeploymentId>,
    /// The deployments that run, can run again or are on their way, newest first.
    pub(crate) deployments: Vec<DeploymentEntry>,
}

/// Everything that can be deployed to.
#[derive(Debug, Serialize, JsonSchema)]
pub(crate) struct InstanceList {
    /// By project, environment and service.
    pub(crate) instances: Vec<InstanceEntry>,
}

/// A deployment, as lists show it.
#[derive(Debug, Serialize, JsonSchema)]
pub(crate) struct DeploymentEntry {
    /// Its id.
    pub(crate) id: DeploymentId,
    /// `project.environment.service`.
    pub(crate) instance_id: String,
    /// The project.
    pub(crate) project: ProjectName,
    /// The environment.
    pub(crate) environment: EnvironmentName,
    /// The service.
    pub(crate) service: ServiceName,
    /// What was asked for: a branch, tag, commit or image.
    pub(crate) version: String,
    /// The operator's view: `queued`, `starting`, `started`, `partially_started`, `stopping`,
    /// `stopped`, `terminating`, `terminated`, `start_error`, `stop_error`, `terminate_error`, `cancelled`.
    pub(crate) status: String,
    /// Exactly where it is.
    pub(crate) state: Status,
    /// The pipeline's view.
    pub(crate) phase: Phase,
    /// Whether traffic goes to it.
    pub(crate) main: bool,
    /// When it was asked for.
    pub(crate) created_at: Timestamp,
    /// The clusters that it runs in.
    pub(crate) clusters: Vec<ClusterName>,
    /// Where it answers: at its main address, or else at its preview address.
    pub(crate) url: Option<String>,
}

/// Deployments, newest first.
#[derive(Debug, Serialize, JsonSchema)]
pub(crate) struct DeploymentList {
    /// The deployments.
    pub(crate) deployments: Vec<DeploymentEntry>,
    /// Where the list goes on; none at its end.
    pub(crate) next: Option<String>,
}

/// Everything that is known of a deployment.
#[derive(Debug, Serialize, JsonSchema)]
pub(crate) struct DeploymentDetail {
    /// What lists show of it.
    #[serde(flatten)]
    pub(crate) entry: DeploymentEntry,
    /// Since when it is in its state.
    pub(crate) state_since: Timestamp,
    /// Is it up? Three separate answers.
    pub(crate) readiness: ReadinessAnswers,
    /// What its addresses are like from where users are: those that are looked at from there.
    pub(crate) endpoints: Vec<EndpointView>,
    /// What was last seen in each cluster.
    pub(crate) cluster_status: Vec<ClusterStatus>,
    /// How long its steps took.
    pub(crate) durations: Durations,
    /// When each state was first entered.
    pub(crate) entered: BTreeMap<Status, Timestamp>,
    /// When it will be stopped by itself, if nothing is decided before.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) stops: Option<views::StopView>,
    /// Who has allowed it, while that is asked for; and an emergency that is to be reviewed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) approval: Option<views::ApprovalView>,
    /// The freeze that it waits for, or was let through in an emergency that is to be reviewed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) hold: Option<views::HoldView>,
    /// What can be done to it now.
    pub(crate) operations: Vec<Operation>,
    /// All operations; for those that are not possible now, why, and what would make them so.
    pub(crate) possibilities: Vec<Possibility>,
    /// The commit of its source, once the ref is resolved.
    pub(crate) source: Option<SourceView>,
    /// The build that makes its image.
    pub(crate) build_id: Option<BuildId>,
    /// Its image, once it is pinned.
    pub(crate) image: Option<PinnedImage>,
    /// Its chart, once it is pinned.
    pub(crate) chart: Option<PinnedChart>,
    /// The GitOps commit that introduced it.
    pub(crate) commit: Option<CommitId>,
    /// The newest GitOps commit about it.
    pub(crate) revision: Option<CommitId>,
    /// The OpenAPI document that it serves, if it was found to serve one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) openapi: Option<OpenapiFound>,
    /// Instances in each cluster that are asked for while it runs.
    pub(crate) replicas: u32,
    /// The addresses that lead to it.
    pub(crate) hostnames: Vec<HostnameView>,
    /// The same, by what they are for, with those that need no name.
    pub(crate) access: AccessUrls,
    /// Why it, or the last operation on it, failed.
    pub(crate) failure: Option<FailureView>,
    /// Why it was cancelled.
    pub(crate) cancelled: Option<CancelledView>,
    /// Where it stands, while it waits to be admitted.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) queue: Option<QueueView>,
    /// The later deployments that were admitted before it.
    pub(crate) overtaken_by: Vec<DeploymentId>,
    /// Whether somebody asked to cancel it.
    pub(crate) cancel_requested: bool,
    /// Whether traffic follows it by itself.
    pub(crate) switch: SwitchMode,
    /// Why it was asked for.
    pub(crate) reason: Option<String>,
    /// The deployment whose snapshot it repeats.
    pub(crate) redeploy_of: Option<DeploymentId>,
    /// The deployment of another environment whose image it runs.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) promoted_from: Option<PromotedFrom>,
    /// What it is made from, as it was when it was asked for.
    pub(crate) snapshot: Snapshot,
    /// The number of the event that this shows, among those of its aggregate.
    pub(crate) event_revision: u32,
}

/// Is there an image? Does it run? Is it reached?
#[derive(Debug, Serialize, JsonSchema)]
pub(crate) struct ReadinessAnswers {
    /// Is there an image?
    pub(crate) build: Readiness,
    /// Does it run?
    pub(crate) workload: Readiness,
    /// Is it reached?
    pub(crate) endpoint: Readiness,
}

/// What an address is like from where users are, on each plane for itself.
#[derive(Debug, Serialize, JsonSchema)]
pub(crate) struct EndpointView {
    /// The hostname.
    pub(crate) hostname: Hostname,
    /// The planes, in the order in which a request meets them.
    pub(crate) planes: Vec<PlaneView>,
}

/// What was last seen of a plane.
#[derive(Debug, Serialize, JsonSchema)]
pub(crate) struct PlaneView {
    /// What was seen.
    #[serde(flatten)]
    pub(crate) seen: PlaneSeen,
    /// Since when it is in this state.
    pub(crate) since: Timestamp,
}

impl EndpointView {
    fn all(state: &Deployment) -> Vec<Self> {
        let planes = state.planes.iter().map(|(hostname, planes)| Self {
            hostname: hostname.clone(),
            planes: planes
                .iter()
                .map(|known| PlaneView {
                    seen: known.seen.clone(),
                    since: known.since,
                })
                .collect(),
        });
        planes.collect()
    }
}

/// What was last seen in a cluster.
#[derive(Debug, Serialize, JsonSchema)]
pub(crate) struct ClusterStatus {
    /// The cluster.
    pub(crate) cluster: ClusterName,
    /// Where the deployment is there.
    pub(crate) state: ClusterState,
    /// Since when.
    pub(crate) since: Timestamp,
    /// How often it was tried there.
    pub(crate) tries: u32,
    /// Whether all that is asked for is ready there.
    pub(crate) ready: bool,
    /// The GitOps commit that the cluster had applied; none before it was looked at.
    pub(crate) revision: Option<CommitId>,
    /// Instances that are asked for there.
    pub(crate) wanted: Option<u32>,
    /// The instances that were seen.
    pub(crate) instances: Vec<InstanceSeen>,
    /// What is wrong there.
    pub(crate) problem: Option<FailureView>,
}

/// A running instance.
#[derive(Debug, Serialize, JsonSchema)]
pub(crate) struct InstanceSeen {
    /// Its name.
    pub(crate) name: String,
    /// Where it answers.
    pub(crate) address: String,
    /// Whether its readiness probe succeeds.
    pub(crate) ready: bool,
    /// How often it was restarted.
    pub(crate) restarts: u32,
}

/// How long the steps of a deployment took, in milliseconds; none for what has not ended.
#[derive(Debug, Default, Serialize, JsonSchema, SimpleObject)]
#[graphql(name = "StepDurations")]
pub(crate) struct Durations {
    /// From the request until a worker took it on.
    pub(crate) queue_ms: Option<i64>,
    /// For its source to be resolved and fetched; none for an image that exists.
    pub(crate) clone_ms: Option<i64>,
    /// For its image to be made, or waited for where another deployment's build makes it.
    pub(crate) build_ms: Option<i64>,
    /// For its image to be pushed.
    pub(crate) push_ms: Option<i64>,
    /// For its image to be fetched, in the cluster where that took longest; none if it was there.
    pub(crate) image_pull_ms: Option<u64>,
    /// From its GitOps commit until it was seen in all of its clusters.
    pub(crate) sync_ms: Option<i64>,
    /// From its GitOps commit until it was live.
    pub(crate) startup_ms: Option<i64>,
    /// From when all that is asked for was ready until it answered at its address.
    pub(crate) endpoint_ms: Option<i64>,
    /// From the request until it was live, failed or was cancelled.
    pub(crate) total_ms: Option<i64>,
}

/// A commit of a source repository.
#[derive(Debug, Serialize, JsonSchema)]
pub(crate) struct SourceView {
    /// Its full id.
    pub(crate) commit: CommitId,
    /// Its message.
    pub(crate) message: String,
    /// Who wrote it.
    pub(crate) author: String,
    /// When.
    pub(crate) committed_at: Timestamp,
    /// Where to see it.
    pub(crate) url: String,
}

/// An address that leads to a deployment.
#[derive(Debug, Serialize, JsonSchema)]
pub(crate) struct HostnameView {
    /// The hostname.
    pub(crate) hostname: Hostname,
    /// What it sticks to.
    pub(crate) stickiness: Stickiness,
    /// Where to open it.
    pub(crate) url: String,
    /// Number of the route table that made it so.
    pub(crate) table: u32,
    /// Since when.
    pub(crate) since: Timestamp,
}

/// How a deployment is reached.
#[derive(Debug, Serialize, JsonSchema)]
pub(crate) struct AccessUrls {
    /// At the main address of its service, and at hostnames that were brought along for it.
    pub(crate) main: Vec<String>,
    /// At the address of its service in its environment, and at hostnames that were brought along
    /// for that.
    pub(crate) environment: Vec<String>,
    /// At the address of its branch.
    pub(crate) branch: Vec<String>,
    /// At its own address, which never leads to anything else.
    pub(crate) preview: Vec<String>,
    /// For other services on the machine of the gateway: leads where the address of its
    /// environment leads, and needs no resolver and no `Host`. None where that does not lead to it.
    pub(crate) internal: Option<String>,
    /// Its ready instances as they listen, by cluster, past the gateway.
    pub(crate) instances: BTreeMap<ClusterName, Vec<String>>,
    /// The gateway, which asks for the hostname in `Host`.
    pub(crate) load_balancer: String,
}

impl AccessUrls {
    fn of(
        row: &DeploymentRow,
        hostnames: &[HostnameView],
        gateway: &Gateway,
        domain: &Hostname,
    ) -> Self {
        let (state, instance) = (&row.state, &row.state.request.instance);
        let sticking = |stickiness| {
            let of = hostnames.iter().filter(|h| h.stickiness == stickiness);
            of.map(|h| h.url.clone()).collect()
        };
        let own = Hostnames::under(domain, instance, row.id, false);
        let leads_here = |own: &Hostnames| hostnames.iter().any(|h| h.hostname == own.environment);
        let internal = own.is_ok_and(|own| leads_here(&own));
        let internal = internal.then(|| gateway.internal_url(instance));
        let instances = state.observed.iter().map(|(cluster, seen)| {
            let ready = seen.instances.iter().filter(|i| i.ready);
            (cluster.clone(), ready.map(|i| i.address.clone()).collect())
        });
        Self {
            main: sticking(Stickiness::Live),
            environment: sticking(Stickiness::Environment),
            branch: sticking(Stickiness::Branch),
            preview: sticking(Stickiness::Deployment),
            internal,
            instances: instances.collect(),
            load_balancer: gateway.url(domain),
        }
    }
}

/// A cause with a remedy.
#[derive(Debug, Serialize, JsonSchema)]
pub(crate) struct FailureView {
    /// Where in its life it happened; none for what was seen in a cluster.
    pub(crate) during: Option<Status>,
    /// A stable code.
    pub(crate) code: String,
    /// What happened.
    pub(crate) message: String,
    /// What helps.
    pub(crate) remedy: String,
    /// What it usually comes of, the most likely first; left out where that is not known.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(crate) likely_causes: Vec<String>,
    /// All that may help, beginning with `remedy`; left out where there is nothing else.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(crate) remedies: Vec<String>,
}

/// Why a deployment was cancelled.
#[derive(Debug, Serialize, JsonSchema)]
pub(crate) struct CancelledView {
    /// Where in its life.
    pub(crate) during: Status,
    /// The newer deployment that took its place, if that is why.
    pub(crate) superseded_by: Option<DeploymentId>,
    /// Why.
    pub(crate) message: String,
}

impl From<&Cancelled> for CancelledView {
    fn from(c: &Cancelled) -> Self {
        Self {
            during: c.during,
            superseded_by: c.superseded_by,
            message: c.message.clone(),
        }
    }
}

/// What a deployment is made from.
#[derive(Debug, Serialize, JsonSchema)]
pub(crate) struct Snapshot {
    /// The source or the image, as it was asked for.
    pub(crate) version: Version,
    /// The image that this led to, by its digest; none before it is pinned.
    pub(crate) image: Option<PinnedImage>,
    /// How it is built.
    pub(crate) build: BuildSpec,
    /// Where its image goes, if its service says so.
    pub(crate) image_repository: Option<ImageRepository>,
    /// How it runs.
    pub(crate) run: RunSpec,
    /// What of that was changed for this service instance, beside its service's definition.
    pub(crate) config: InstanceConfig,
    /// The secrets that it runs with, by variable, and whether they have changed since.
    pub(crate) secrets: BTreeMap<EnvKey, SecretUse>,
}

/// The version of a secret that a deployment runs with.
#[derive(Debug, Serialize, JsonSchema)]
pub(crate) struct SecretUse {
    /// The version.
    #[serde(flatten)]
    pub(crate) reference: SecretRef,
    /// The version that a deployment gets now; none if the secret is no longer set.
    pub(crate) newest_version: Option<u32>,
}

/// A secret, without its value.
#[derive(Debug, Serialize, JsonSchema)]
pub(crate) struct SecretView {
    /// The variable that it becomes.
    pub(crate) name: EnvKey,
    /// Only deployments to this environment get it.
    pub(crate) environment: Option<EnvironmentName>,
    /// Only deployments of this service get it.
    pub(crate) service: Option<ServiceName>,
    /// Its version: one more with each change.
    pub(crate) version: u32,
    /// What the ledger holds of its value.
    pub(crate) commitment: Commitment,
    /// The key of the commitment.
    pub(crate) key: Uuid,
    /// When it was changed last.
    pub(crate) changed_at: Timestamp,
    /// By whom.
    pub(crate) changed_by: Actor,
}

impl SecretView {
    pub(crate) fn new(secret: Secret, changed_by: Actor) -> Self {
        let SecretId { name, scope } = secret.id;
        Self {
            name,
            environment: scope.environment,
            service: scope.service,
            version: secret.version,
            commitment: secret.commitment,
            key: secret.key,
            changed_at: secret.changed_at,
            changed_by,
        }
    }
}

/// The secrets of a project.
#[derive(Debug, Serialize, JsonSchema)]
pub(crate) struct SecretList {
    /// By name and scope.
    pub(crate) secrets: Vec<SecretView>,
}

/// What setting or unsetting a secret came to.
#[derive(Debug, Serialize, JsonSchema)]
pub(crate) struct SecretChanged {
    /// The secret as it is now, or as it was last.
    #[serde(flatten)]
    pub(crate) secret: SecretView,
    /// Whether anything changed. Deployments that run keep what they have.
    pub(crate) changed: bool,
}

/// The secrets of a project were erased.
#[derive(Debug, Serialize, JsonSchema)]
pub(crate) struct SecretsErased {
    /// The project.
    pub(crate) project: ProjectName,
}

/// What a comparison with a committed value came to.
#[derive(Debug, Serialize, JsonSchema)]
pub(crate) struct SecretVerified {
    /// The variable.
    pub(crate) name: EnvKey,
    /// The version that the value was compared with.
    pub(crate) version: u32,
    /// Whether it is that version's value.
    pub(crate) matches: bool,
}

/// A deployment was accepted.
#[derive(Debug, Serialize, JsonSchema)]
pub(crate) struct DeploymentAccepted {
    /// Its id.
    pub(crate) id: DeploymentId,
    /// `queued`; `unchanged` where everything was so already and this is the deployment that runs.
    pub(crate) status: &'static str,
    /// `project.environment.service`.
    pub(crate) instance_id: String,
}

/// An operation was accepted.
#[derive(Debug, Serialize, JsonSchema)]
pub(crate) struct OperationAccepted {
    /// The deployment.
    pub(crate) id: DeploymentId,
    /// `stopping`, `starting`, `retrying`, `scaling`, `terminating`, `cancelling`, `kept` or
    /// `deleted`.
    /// `stopping`, `starting`, `retrying`, `terminating`, `cancelling`, `kept`, `deleted`, `approved`,
    /// `rejected`, `overridden` or `reviewed`.
    pub(crate) status: &'static str,
}

/// A deployment is the main one.
#[derive(Debug, Serialize, JsonSchema)]
pub(crate) struct MainSwitched {
    /// The deployment that traffic goes to.
    pub(crate) id: DeploymentId,
    /// `project.environment.service`.
    pub(crate) instance_id: String,
    /// `true`
    pub(crate) main: bool,
    /// The main deployment before.
    pub(crate) previous_main: Option<DeploymentId>,
}

/// The history of deployments, newest first.
#[derive(Debug, Serialize, JsonSchema)]
pub(crate) struct HistoryList {
    /// One row for each deployment.
    pub(crate) history: Vec<HistoryRow>,
    /// Where the list goes on; none at its end.
    pub(crate) next: Option<String>,
    /// The list shows the ledger up to here.
    pub(crate) position: Position,
}

/// Who did what, when, why and because of what, newest first.
#[derive(Debug, Serialize, JsonSchema)]
pub(crate) struct AuditList {
    /// One row for each event.
    pub(crate) audit: Vec<AuditRow>,
    /// Where the list goes on; none at its end.
    pub(crate) next: Option<String>,
    /// The list shows the ledger up to here.
    pub(crate) position: Position,
}

/// What runs where.
#[derive(Debug, Serialize, JsonSchema)]
pub(crate) struct StateView {
    /// The service instances with their deployments.
    pub(crate) instances: Vec<views::InstanceView>,
    /// Where the list goes on; none at its end.
    pub(crate) next: Option<String>,
    /// It is so at this position of the ledger.
    pub(crate) position: Position,
    /// The hash over the states of all aggregates there. A replay to that position gives the same
    /// one. Missing while it is being worked out: then ask again.
    pub(crate) state_hash: Option<StateHash>,
    /// Events of the ledger that cannot be read and are set aside; the audit lists them.
    pub(crate) set_aside: u64,
}

/// Whether this server can do its work.
#[derive(Debug, Serialize, JsonSchema)]
pub(crate) struct ReadinessReport {
    /// Whether every part is ready.
    pub(crate) ready: bool,
    /// The parts.
    pub(crate) parts: Vec<Part>,
}

/// The server runs.
#[derive(Debug, Serialize, JsonSchema)]
pub(crate) struct Health {
    /// `ok`
    pub(crate) status: &'static str,
    /// The version of Daybook.
    pub(crate) version: &'static str,
}

/// Shows deployments, with the route tables of their projects.
pub(crate) struct Shown<'a> {
    projections: &'a Projections,
    gateway: &'a Gateway,
    domain: &'a Hostname,
    tables: BTreeMap<ProjectName, Option<Routing>>,
}

impl<'a> Shown<'a> {
    pub(crate) fn new(projections: &'a Projections, settings: &'a Settings) -> Self {
        Self {
            projections,
            gateway: &settings.gateway,
            domain: &settings.domain,
            tables: BTreeMap::new(),
        }
    }

    /// A deployment as lists show it.
    pub(crate) fn entry(&mut self, row: &DeploymentRow) -> Result<DeploymentEntry, QueryError> {
        let hostnames = self.hostnames(row)?;
        Ok(entry(row, &hostnames))
    }

    /// A deployment with everything that is known of it.
    pub(crate) fn detail(&mut self, row: &DeploymentRow) -> Result<DeploymentDetail, QueryError> {
        let hostnames = self.hostnames(row)?;
        let state = &row.state;
        let newest = state.change.as_ref().map(|c| c.commit.clone());
        let secrets = self.secrets(row)?;
        Ok(DeploymentDetail {
            entry: entry(row, &hostnames),
            state_since: state.status_since,
            readiness: ReadinessAnswers {
                build: state.build_readiness.clone(),
                workload: state.workload_readiness.clone(),
                endpoint: state.endpoint_readiness.clone(),
            },
            endpoints: EndpointView::all(state),
            cluster_status: cluster_status(state),
            durations: Durations::of(state, row.reached),
            entered: state.milestones.entered.clone(),
            stops: views::StopView::of(state),
            approval: views::ApprovalView::of(state),
            hold: views::HoldView::of(state),
            operations: row.operations(),
            possibilities: row.possibilities(),
            source: row.source.as_ref().map(|s| SourceView {
                commit: s.commit.clone(),
                message: s.message.clone(),
                author: s.author_name.clone(),
                committed_at: s.committed_at,
                url: s.url.clone(),
            }),
            build_id: state.build,
            image: state.image.clone(),
            chart: state.chart.clone(),
            commit: state.commit.clone(),
            revision: newest.or_else(|| state.commit.clone()),
            openapi: state.openapi.clone(),
            access: AccessUrls::of(row, &hostnames, self.gateway, self.domain),
            hostnames,
            failure: state.failure.as_ref().map(|f| FailureView {
                during: Some(f.during),
                code: f.code.clone(),
                message: f.message.clone(),
                remedy: f.remedy.clone(),
                likely_causes: Vec::new(),
                remedies: Vec::new(),
            }),
            cancelled: state.cancelled.as_ref().map(CancelledView::from),
            queue: queue::of(self.projections, row)?,
            overtaken_by: state.overtaken.clone(),
            cancel_requested: state.cancel.is_some(),
            switch: state.request.switch,
            reason: state.request.reason.clone(),
            redeploy_of: state.request.redeploy_of,
            promoted_from: state.request.promoted_from.clone(),
            replicas: state.replicas,
            snapshot: Snapshot {
                version: state.request.version.clone(),
                image: state.image.clone(),
                build: state.request.build.clone(),
                image_repository: state.request.image_repository.clone(),
                run: state.request.run.clone(),
                config: state.request.config.clone(),
                secrets,
            },
            event_revision: row.revision,
        })
    }

    /// The secrets that a deployment runs with, beside what it would get now.
    fn secrets(&self, row: &DeploymentRow) -> Result<BTreeMap<EnvKey, SecretUse>, QueryError> {
        let request = &row.state.request;
        if request.secrets.is_empty() {
            return Ok(BTreeMap::new());
        }
        let project = self.projections.project(&request.instance.project)?;
        let secrets = project.map_or_else(Vec::new, |p| p.secrets);
        let now = secret::applicable(&secrets, &request.instance);
        let uses = request.secrets.iter().map(|(variable, reference)| {
            let newest = now.get(variable);
            let seen = SecretUse {
                reference: reference.clone(),
                newest_version: newest.map(|n| n.version),
            };
            (variable.clone(), seen)
        });
        Ok(uses.collect())
    }

    /// The addresses of a deployment, those that mean the most to people first.
    fn hostnames(&mut self, row: &DeploymentRow) -> Result<Vec<HostnameView>, QueryError> {
        let project = &row.state.request.instance.project;
        if !self.tables.contains_key(project) {
            let table = self.projections.routing(project)?;
            self.tables.insert(project.clone(), table);
        }
        let Some(Some(routing)) = self.tables.get(project) else {
            return Ok(Vec::new());
        };
        let mut views: Vec<_> = routing
            .hostnames_of(row.id)
            .into_iter()
            .map(|(hostname, route)| HostnameView {
                hostname: hostname.clone(),
                stickiness: route.stickiness,
                url: self.gateway.url(hostname),
                table: route.table,
                since: route.since,
            })
            .collect();
        views.sort_by_key(|v| std::cmp::Reverse(v.stickiness));
        Ok(views)
    }
}

fn entry(row: &DeploymentRow, hostnames: &[HostnameView]) -> DeploymentEntry {
    let state = &row.state;
    let instance = &state.request.instance;
    DeploymentEntry {
        id: row.id,
        instance_id: instance.to_string(),
        project: instance.project.clone(),
        environment: instance.environment.clone(),
        service: instance.service.clone(),
        version: state.request.version.to_string(),
        status: state.status.lifecycle().to_owned(),
        state: state.status,
        phase: state.status.phase(),
        main: row.main,
        created_at: state.created_at,
        clusters: state.request.clusters.clone(),
        url: hostnames.first().map(|h| h.url.clone()),
    }
}

fn cluster_status(state: &Deployment) -> Vec<ClusterStatus> {
    let statuses = state.request.clusters.iter().map(|cluster| {
        let seen = state.observed.get(cluster);
        let progress = state.clusters.get(cluster);
        ClusterStatus {
            cluster: cluster.clone(),
            state: progress.map_or(ClusterState::Unknown, |p| p.state),
            since: progress.map_or(state.status_since, |p| p.since),
            tries: progress.map_or(0, |p| p.tries),
            ready: seen.is_some_and(WorkloadObserved::is_ready),
            revision: seen.map(|o| o.revision.clone()),
            wanted: seen.map(|o| o.wanted),
            instances: seen
                .map(|o| o.instances.as_slice())
                .unwrap_or_default()
                .iter()
                .map(|i| InstanceSeen {
                    name: i.name.clone(),
                    address: i.address.clone(),
                    ready: i.ready,
                    restarts: i.restarts,
                })
                .collect(),
            problem: progress
                .and_then(|p| p.cause.as_ref())
                .map(|p| FailureView {
                    during: None,
                    code: p.code.clone(),
                    message: p.message.clone(),
                    remedy: p.remedy.clone(),
                    likely_causes: p.likely_causes.clone(),
                    remedies: p.remedies.clone(),
                }),
        }
    });
    statuses.collect()
}

impl Durations {
    /// How long a deployment took, from the times of its states and of what it reached.
    pub(crate) fn of(state: &Deployment, reached: Reached) -> Self {
        let entered = &state.milestones.entered;
        let first = |states: &[Status]| {
            let times = states.iter().filter_map(|s| entered.get(s)).min();
            times.map(|time| time.as_millisecond())
        };
        let between =
            |from: Option<i64>, to: Option<i64>| Some(to? - from?).map(|ms: i64| ms.max(0));
        let requested = first(&[Status::Requested]);
        let building = first(&[Status::Building]);
        let pushing = first(&[Status::Pushing]);
        let pinned = first(&[Status::Packaging]);
        let deploying = first(&[Status::Deploying]);
        let live = first(&[Status::Started, Status::PartiallyStarted]);
        let ended = live.or_else(|| first(&[Status::Failed, Status::Cancelled]));
        Self {
            queue_ms: between(requested, first(&[Status::Cloning, Status::Packaging])),
            clone_ms: between(first(&[Status::Cloning]), building.or(pushing).or(pinned)),
            build_ms: between(building, pushing.or(pinned)),
            push_ms: between(pushing, pinned),
            image_pull_ms: state.image_pulls.values().max().copied(),
            sync_ms: between(deploying, reached.synced),
            startup_ms: between(deploying, live),
            endpoint_ms: between(reached.ready, reached.answered),
            total_ms: between(requested, ended),
        }
    }
}
