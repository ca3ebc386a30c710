//! One plausible event of each kind.

// Samples are made from constants; a wrong one is to be noticed at once.
#![allow(clippy::expect_used, clippy::unwrap_used, clippy::missing_panics_doc)]

use std::collections::BTreeMap;

use uuid::Uuid;

use super::time;
use crate::access::{self, AccessEvent, Grant, Projects, Role};
use crate::approval::{
    ApprovalGranted, ApprovalRejected, ApprovalRequested, ApprovalRule, ApprovalsVoided, Approved,
    EmergencyOverride, Plan, PostReviewCompleted, ValueChange,
};
use crate::build::{self, BuildEvent, LogSeal};
use crate::chart::PinnedChart;
use crate::deployment::{self, DeploymentEvent, SourceCommit, Status, SwitchMode, Version};
use crate::domain::{self, DomainEvent};
use crate::environment::{self, EnvironmentEvent, EnvironmentSpec};
use crate::freeze::{
    Day, Freeze, FreezeOverride, FreezeRemoved, FreezeRule, FreezeSet, Held, ReleaseCause,
    Released, Weekly,
};
use crate::gitops::{self, Change, GitopsEvent};
use crate::hook::{BranchPushed, Hook, HookDefined, HookRemoved, Provider};
use crate::ledger::{self, LedgerEvent};
use crate::log::Position;
use crate::names::{
    BuildId, ClusterName, CommitId, DeploymentId, Digest, EventId, GitRef, Hostname, InstanceRef,
    ServiceName, SubscriptionId,
};
use crate::preview::{
    PullRequest, PullRequestClosed, PullRequestHeadFound, PullRequestOpened, PullRequestUpdated,
};
use crate::project::{self, ProjectEvent};
use crate::routing::{self, Backend, MainChange, RouteChange, RoutingEvent, Stickiness};
use crate::secret::{
    Commitment, SecretId, SecretRef, SecretScope, SecretSet, SecretUnset, SecretsErased,
};
use crate::spec::{BuildSpec, PinnedImage, RunSpec, ServiceSpec, SourceSpec};
use crate::subscription::{self, EndpointUrl, KindPattern, Subscription, SubscriptionEvent};
use crate::template::{Template, TemplateResolved};
use crate::timer::{KeepCause, KeepFor, StopCause, StopScheduled, StopUnscheduled};
use crate::upload::SourceUploaded;

/// The number-th commit id.
pub fn commit(number: u64) -> CommitId {
    let digest = Digest::of(format!("commit {number}").as_bytes());
    CommitId::parse(&digest.hex()[..40]).expect("forty digits")
}

/// The number-th deployment id.
pub fn deployment_id(number: u64) -> DeploymentId {
    DeploymentId::derived(Uuid::NAMESPACE_OID, &format!("deployment {number}"))
}

/// The number-th build id.
pub fn build_id(number: u64) -> BuildId {
    BuildId::derived(Uuid::NAMESPACE_OID, &format!("build {number}"))
}

/// An instance of the project `shop`.
pub fn instance(text: &str) -> InstanceRef {
    text.parse().expect("an instance")
}

/// `shop.production.api`.
pub fn shop() -> InstanceRef {
    instance("shop.production.api")
}

/// A cluster.
pub fn cluster(name: &str) -> ClusterName {
    ClusterName::parse(name).expect("a cluster name")
}

/// The number-th image.
pub fn image(number: u64) -> PinnedImage {
    PinnedImage {
        repository: "registry.example.com/shop/api"
            .parse()
            .expect("a repository"),
        tag: commit(number).short().parse().expect("a tag"),
        digest: Digest::of(&number.to_be_bytes()),
    }
}

/// The number-th chart.
pub fn chart(number: u64) -> PinnedChart {
    PinnedChart {
        chart: "https://charts.example.com/stable/web"
            .parse()
            .expect("a chart"),
        version: format!("1.4.{number}").parse().expect("a version"),
        digest: Digest::of(&number.to_be_bytes()),
    }
}

/// The number-th source commit.
pub fn source(number: u64) -> SourceCommit {
    SourceCommit {
        commit: commit(number),
        message: "Show prices with tax\n\nCustomers asked for it.".to_owned(),
        author_name: "Alice".to_owned(),
        author_email: "alice@example.com".to_owned(),
        committed_at: time(0),
        url: format!("https://git.example.com/shop/api/commit/{}", commit(number)),
    }
}

/// A deployment request from a git ref.
pub fn request(instance: InstanceRef) -> deployment::Requested {
    deployment::Requested {
        instance,
        version: Version::Git {
            url: "https://git.example.com/shop/api.git"
                .parse()
                .expect("a URL"),
            git_ref: "main".parse().expect("a ref"),
            path: String::new(),
        },
        clusters: vec![cluster("berlin"), cluster("oslo")],
        build: BuildSpec::default(),
        image_repository: None,
        run: RunSpec {
            env: BTreeMap::from([("LOG_LEVEL".parse().expect("a key"), "info".to_owned())]),
            ..RunSpec::default()
        },
        switch: SwitchMode::Automatic,
        reason: Some("the spring sale begins".to_owned()),
        redeploy_of: None,
        secrets: BTreeMap::new(),
        promoted_from: None,
        allow_partial: false,
        config: Default::default(),
    }
}

/// The secret `DATABASE_URL` of the service `api` in production.
pub fn secret() -> SecretId {
    SecretId {
        name: "DATABASE_URL".parse().expect("a name"),
        scope: SecretScope {
            environment: Some("production".parse().expect("an environment")),
            service: Some("api".parse().expect("a service")),
        },
    }
}

/// The number-th commitment.
pub fn commitment(number: u8) -> Commitment {
    Commitment::from_hmac(&[number; 32])
}

/// The events of a project.
pub fn project_events() -> Vec<ProjectEvent> {
    vec![
        ProjectEvent::Created(project::Created {
            name: "shop".parse().unwrap(),
            description: Some("The web shop".to_owned()),
        }),
        ProjectEvent::ServiceDefined(Box::new(project::ServiceDefined {
            name: "api".parse().unwrap(),
            spec: ServiceSpec {
                source: Some(SourceSpec {
                    url: "https://git.example.com/shop/api.git".parse().unwrap(),
                    default_ref: "main".parse().unwrap(),
                    path: "services/api".to_owned(),
                }),
                ..ServiceSpec::default()
            },
        })),
        ProjectEvent::SecretSet(SecretSet {
            secret: secret(),
            version: 1,
            commitment: commitment(1),
            key: uuid::Uuid::from_u128(1),
        }),
        ProjectEvent::SecretUnset(SecretUnset {
            secret: secret(),
            version: 1,
        }),
        ProjectEvent::SecretsErased(SecretsErased {
            keys: [uuid::Uuid::from_u128(1)].into(),
        }),
        ProjectEvent::GitopsRemoteChanged(project::GitopsRemoteChanged {
            url: Some("https://git.example.com/shop/gitops.git".parse().unwrap()),
        }),
        ProjectEvent::HookDefined(Box::new(HookDefined {
            hook: Hook {
                name: "github".parse().unwrap(),
                provider: Provider::Github,
                secret: SecretRef {
                    secret: "DAYBOOK_HOOK_GITHUB_V1".parse().unwrap(),
                    scope: SecretScope::default(),
                    version: 1,
                    commitment: commitment(2),
                },
                base: Some("staging".parse().unwrap()),
                prefix: "pr".parse().unwrap(),
                forks: false,
            },
        })),
        ProjectEvent::BranchPushed(BranchPushed {
            hook: "github".parse().unwrap(),
            repository: "git.example.com/shop/api".to_owned(),
            branch: "main".parse().unwrap(),
            head: commit(4),
        }),
        ProjectEvent::HookRemoved(HookRemoved {
            name: "github".parse().unwrap(),
        }),
        ProjectEvent::TemplateResolved(Box::new(resolved())),
        ProjectEvent::SourceUploaded(SourceUploaded {
            service: "api".parse().unwrap(),
            commit: commit(6),
            tree: commit(7),
            bytes: 20_480,
        }),
    ]
}

/// A pull request with its n-th head, at its n-th change.
pub fn pull_request(number: u64, head: u64) -> PullRequest {
    PullRequest {
        hook: "github".parse().expect("a name"),
        repository: "git.example.com/shop/api".to_owned(),
        number,
        title: "Show prices with tax".to_owned(),
        url: format!("https://git.example.com/shop/api/pull/{number}"),
        head: commit(head),
        before: None,
        head_ref: format!("refs/pull/{number}/head"),
        updated_at: time(head),
    }
}

/// The events of an environment.
pub fn environment_events() -> Vec<EnvironmentEvent> {
    let spec = EnvironmentSpec {
        clusters: vec![cluster("berlin"), cluster("oslo")],
        live: true,
        ..EnvironmentSpec::default()
    };
    vec![
        EnvironmentEvent::Created(environment::Created {
            project: "shop".parse().unwrap(),
            name: "production".parse().unwrap(),
            spec: spec.clone(),
            from: None,
            auto_deploy: None,
        }),
        EnvironmentEvent::Changed(environment::Changed {
            spec: EnvironmentSpec {
                switch: SwitchMode::Manual,
                ..spec
            },
        }),
        EnvironmentEvent::DeletionRequested(environment::DeletionRequested {
            reason: Some("its pull request was closed".to_owned()),
        }),
        EnvironmentEvent::Deleted(environment::Deleted {
            commit: Some(commit(3)),
        }),
        EnvironmentEvent::AutoDeploySet(environment::AutoDeploySet {
            branch: Some("main".parse().unwrap()),
        }),
        EnvironmentEvent::FreezeSet(FreezeSet {
            name: "weekend".parse().unwrap(),
            freeze: weekend(),
        }),
        EnvironmentEvent::FreezeRemoved(FreezeRemoved {
            name: "weekend".parse().unwrap(),
            reason: Some("the release is on a Saturday".to_owned()),
        }),
        EnvironmentEvent::PullRequestOpened(Box::new(PullRequestOpened {
            project: "shop".parse().unwrap(),
            name: "production".parse().unwrap(),
            spec: EnvironmentSpec {
                clusters: vec![cluster("berlin")],
                ephemeral: true,
                ..EnvironmentSpec::default()
            },
            from: Some("staging".parse().unwrap()),
            pull_request: pull_request(142, 1),
        })),
        EnvironmentEvent::PullRequestUpdated(Box::new(PullRequestUpdated {
            pull_request: pull_request(142, 2),
            rivals: vec![commit(1)],
        })),
        EnvironmentEvent::PullRequestHeadFound(PullRequestHeadFound {
            head: commit(2),
            reason: "refs/pull/142/head leads to it".to_owned(),
        }),
        EnvironmentEvent::PullRequestClosed(Box::new(PullRequestClosed {
            project: "shop".parse().unwrap(),
            name: "production".parse().unwrap(),
            pull_request: pull_request(142, 3),
        })),
    ]
}

/// A service as an entry of a catalogue made it.
pub fn resolved() -> TemplateResolved {
    let template: Template = serde_json::from_value(serde_json::json!({
        "name": "cache",
        "version": "1.2.0",
        "description": "A cache that keeps what it has.",
        "parameters": { "tag": { "description": "The version.", "default": "7" } },
        "secrets": { "PASSWORD": { "description": "Who may use it.", "generate": 32 } },
        "service": {
            "image": "registry.example.com/cache:${tag}",
            "run": { "volumes": { "data": { "path": "/data", "env": "DATA_DIR" } } },
        },
    }))
    .expect("a template");
    let service = "cache".parse().expect("a name");
    template
        .resolve(service, &BTreeMap::new())
        .expect("it can be resolved")
}

/// From Friday at four to Monday at eight.
pub fn weekend() -> Freeze {
    Freeze {
        rule: FreezeRule::Weekly(Weekly {
            days: [Day::Fri].into(),
            at: "16:00".parse().unwrap(),
            length: "64h".parse().unwrap(),
            zone: "Europe/Berlin".parse().unwrap(),
        }),
        reason: Some("nobody is there to help".to_owned()),
    }
}

/// The events of a build, each as it would follow in attempt 1.
pub fn build_events(number: u64) -> Vec<BuildEvent> {
    let log = LogSeal {
        lines: 42,
        digest: Some(Digest::of(b"output")),
    };
    vec![
        BuildEvent::Requested(Box::new(build::Requested {
            project: "shop".parse().unwrap(),
            service: "api".parse().unwrap(),
            url: "https://git.example.com/shop/api.git".parse().unwrap(),
            commit: source(number),
            path: String::new(),
            spec: BuildSpec::default(),
            repository: image(number).repository,
            tag: image(number).tag,
        })),
        BuildEvent::Started(build::Started {
            attempt: 1,
            worker: "build-1".to_owned(),
        }),
        BuildEvent::BuilderStarted(build::BuilderStarted {
            attempt: 1,
            commit: commit(number),
        }),
        BuildEvent::PushStarted(build::PushStarted {
            attempt: 1,
            digest: image(number).digest,
            builder: "archive".to_owned(),
            detected: "python".to_owned(),
            size_bytes: 12_345_678,
        }),
        BuildEvent::Succeeded(build::Succeeded {
            attempt: 1,
            image: image(number),
            log: log.clone(),
        }),
        BuildEvent::Failed(build::Failed {
            attempt: 1,
            code: "build_command_failed".to_owned(),
            message: "`npm ci` ended with exit code 1".to_owned(),
            remedy: "look at the build's output with `daybook logs`".to_owned(),
            log: log.clone(),
        }),
        BuildEvent::Cancelled(build::Cancelled {
            attempt: 1,
            message: "no deployment waits for it".to_owned(),
            log,
        }),
    ]
}

/// The events of a deployment, in the order of [`deployment::TRANSITIONS`] after the request.
pub fn deployment_events(instance: InstanceRef, number: u64) -> Vec<DeploymentEvent> {
    use DeploymentEvent as E;
    let operation = || deployment::OperationRequested {
        reason: Some("night shift".to_owned()),
    };
    let done = || deployment::OperationDone {
        revision: commit(number),
    };
    let failed = || deployment::OperationFailed {
        code: "timeout".to_owned(),
        message: "the cluster oslo did not answer in time".to_owned(),
        remedy: "try again once it does".to_owned(),
    };
    vec![
        E::Requested(Box::new(request(instance.clone()))),
        E::Queued(deployment::Queued {}),
        E::CloningStarted(deployment::CloningStarted {
            worker: "build-1".to_owned(),
        }),
        E::SourceResolved(deployment::SourceResolved {
            source: source(number),
            build: build_id(number),
            branch: number
                .is_multiple_of(3)
                .then(|| GitRef::parse("main").expect("a ref")),
        }),
        E::BuildingStarted(deployment::BuildingStarted {
            build: build_id(number),
        }),
        E::PushingStarted(deployment::PushingStarted {
            build: build_id(number),
        }),
        E::ImagePinned(deployment::ImagePinned {
            image: image(number),
            build: Some(build_id(number)),
            shared: false,
        }),
        E::DeployingStarted(deployment::DeployingStarted {
            commit: commit(number),
        }),
        observed("berlin", number, 1, true),
        E::EndpointObserved(deployment::EndpointObserved {
            hostname: "api.shop.localhost".parse().unwrap(),
            url: "http://api.shop.localhost:7071/".to_owned(),
            ready: true,
            http_status: Some(200),
            message: None,
        }),
        E::EndpointPlanesChanged(deployment::EndpointPlanesChanged {
            hostname: "api.shop.localhost".parse().unwrap(),
            changes: vec![
                deployment::PlaneChange {
                    before: Some(deployment::PlaneState::Ok),
                    now: deployment::PlaneSeen {
                        message: Some("it resolves to 198.51.100.7".to_owned()),
                        expected: Some("203.0.113.10".to_owned()),
                        actual: Some("198.51.100.7".to_owned()),
                        ..deployment::PlaneSeen::new(
                            deployment::Plane::Dns,
                            deployment::PlaneState::Drifted,
                            "WrongAddress",
                        )
                    },
                },
                deployment::PlaneChange {
                    before: None,
                    now: deployment::PlaneSeen {
                        expires: Some("2026-09-01T00:00:00Z".parse().unwrap()),
                        ..deployment::PlaneSeen::new(
                            deployment::Plane::Tls,
                            deployment::PlaneState::Ok,
                            "Valid",
                        )
                    },
                },
            ],
        }),
        E::ImagePulled(deployment::ImagePulled {
            cluster: cluster("berlin"),
            took_ms: 1_250,
        }),
        E::OpenapiFound(deployment::OpenapiFound {
            path: "/openapi.json".to_owned(),
            digest: Digest::of(b"openapi"),
            title: Some("Shop".to_owned()),
            version: Some("1.2.3".to_owned()),
        }),
        E::Succeeded(deployment::Succeeded {
            revision: commit(number),
            table: 1,
        }),
        E::PartiallySucceeded(deployment::PartiallySucceeded {
            revision: commit(number),
            table: 1,
            ready: vec![cluster("berlin")],
            failed: vec![failed_in("oslo")],
        }),
        E::ClusterFailed(failed_in("oslo")),
        E::RetryRequested(deployment::RetryRequested {
            clusters: vec![cluster("oslo")],
            reason: Some("the cluster is back".to_owned()),
        }),
        E::ClusterRetried(deployment::ClusterRetried {
            cluster: cluster("oslo"),
        }),
        E::Overtaken(deployment::Overtaken {
            by: deployment_id(number + 1),
            reason: "it goes to production".to_owned(),
        }),
        E::Failed(deployment::Failed {
            during: Status::Building,
            code: "build_command_failed".to_owned(),
            message: "`npm ci` ended with exit code 1".to_owned(),
            remedy: "look at the build's output with `daybook logs`".to_owned(),
        }),
        E::CancelRequested(deployment::CancelRequested {
            reason: Some("wrong branch".to_owned()),
        }),
        E::Cancelled(deployment::Cancelled {
            during: Status::Building,
            superseded_by: Some(deployment_id(number + 1)),
            message: "a newer deployment took its place".to_owned(),
        }),
        E::StopRequested(operation()),
        E::Stopped(done()),
        E::StopFailed(failed()),
        E::StartRequested(operation()),
        E::RestartDone(done()),
        E::StartFailed(failed()),
        E::TerminateRequested(operation()),
        E::Terminated(done()),
        E::TerminateFailed(failed()),
        E::Deleted(deployment::Deleted {
            reason: Some("tidying up".to_owned()),
        }),
        E::ChangeCommitted(deployment::ChangeCommitted {
            commit: commit(number),
            replicas: Some(0),
        }),
        E::ApprovalRequested(Box::new(ApprovalRequested {
            plan: plan(&instance, number),
            hash: plan(&instance, number).hash(),
            requester: "alice".to_owned(),
            author: Some("alice@example.com".to_owned()),
            expires: Some(time(86_400)),
            nonce: nonce(number),
        })),
        E::ApprovalsVoided(Box::new(ApprovalsVoided {
            plan: plan(&instance, number + 1),
            hash: plan(&instance, number + 1).hash(),
            was: plan(&instance, number).hash(),
            voided: vec!["bob".to_owned()],
        })),
        E::ApprovalGranted(ApprovalGranted {
            hash: plan(&instance, number).hash(),
            approver: "bob".to_owned(),
            reason: Some("as discussed".to_owned()),
        }),
        E::ApprovalRejected(ApprovalRejected {
            approver: "bob".to_owned(),
            reason: "not before the sale".to_owned(),
        }),
        E::EmergencyOverride(EmergencyOverride {
            hash: plan(&instance, number).hash(),
            by: "carol".to_owned(),
            reason: "the shop is down".to_owned(),
        }),
        E::Approved(Approved {
            hash: plan(&instance, number).hash(),
            approvers: vec!["bob".to_owned()],
            emergency: false,
        }),
        E::PostReviewCompleted(PostReviewCompleted {
            reviewer: "bob".to_owned(),
            reason: Some("it was one".to_owned()),
        }),
        E::Held(Held {
            freeze: "weekend".parse().unwrap(),
            until: Some(time(1800)),
            nonce: nonce(number),
        }),
        E::Released(Released {
            freeze: "weekend".parse().unwrap(),
            nonce: nonce(number),
            cause: ReleaseCause::Ended,
        }),
        E::FreezeOverride(FreezeOverride {
            freeze: "weekend".parse().unwrap(),
            by: "carol".to_owned(),
            reason: "the shop is down".to_owned(),
        }),
        E::StopScheduled(StopScheduled {
            due: time(1800),
            cause: StopCause::Replaced,
            keep: KeepFor::OLD,
            by: Some(deployment_id(number + 1)),
            table: Some(2),
            nonce: nonce(number),
        }),
        E::StopUnscheduled(StopUnscheduled {
            nonce: nonce(number),
            cause: KeepCause::Asked,
            table: Some(2),
            reason: Some("to compare both".to_owned()),
        }),
        E::ScaleRequested(deployment::ScaleRequested {
            replicas: 3,
            reason: Some("the spring sale begins".to_owned()),
        }),
        E::ChartPinned(deployment::ChartPinned {
            chart: chart(number),
        }),
    ]
}

/// The plan for the number-th image.
pub fn plan(instance: &InstanceRef, number: u64) -> Plan {
    let change = |before: &str, after: &str| ValueChange {
        before: Some(before.to_owned()),
        after: Some(after.to_owned()),
    };
    Plan {
        instance: instance.clone(),
        source: Some(commit(number)),
        image: Some(image(number)),
        base: Some(commit(number + 100)),
        main: Some(deployment_id(number + 100)),
        values: BTreeMap::from([("run.replicas".to_owned(), change("1", "2"))]),
        routes: BTreeMap::from([(
            "api.shop.localhost".parse().unwrap(),
            vec![deployment_id(number + 100)],
        )]),
        rule: ApprovalRule {
            required: 1,
            approvers: ["bob".to_owned()].into(),
            expires: KeepFor::IDLE,
        },
    }
}

/// The nonce of the number-th timer.
pub fn nonce(number: u64) -> EventId {
    EventId::derived(Uuid::NAMESPACE_OID, &format!("timer {number}"))
}

/// That it has failed in a cluster.
pub fn failed_in(name: &str) -> deployment::ClusterFailed {
    deployment::ClusterFailed {
        cluster: cluster(name),
        code: "rollout_timeout".to_owned(),
        message: "it was not seen ready in time".to_owned(),
        remedy: "check that a worker looks after the cluster".to_owned(),
    }
}

/// What was seen of a workload with as many instances.
pub fn observed(name: &str, number: u64, wanted: u32, ready: bool) -> DeploymentEvent {
    DeploymentEvent::WorkloadObserved(deployment::WorkloadObserved {
        cluster: cluster(name),
        revision: commit(number),
        wanted,
        instances: (0..wanted)
            .map(|i| deployment::Instance {
                name: format!("api-{i}"),
                address: format!("127.0.0.1:{}", 30_000 + i),
                ready,
                restarts: 0,
            })
            .collect(),
        problem: (!ready).then(|| deployment::Problem {
            reason: "CrashLoopBackOff".to_owned(),
            message: "the process ended with exit code 1".to_owned(),
            remedy: "look at its output with `daybook logs`".to_owned(),
            transient: true,
            likely_causes: Vec::new(),
            remedies: Vec::new(),
        }),
    })
}

/// A commit to a GitOps repository.
pub fn committed(
    instance: &InstanceRef,
    deployment: DeploymentId,
    number: u64,
    change: Change,
) -> gitops::Committed {
    let content = Digest::of(&number.to_be_bytes());
    let path = format!("environments/{}/values.yaml", instance.environment);
    gitops::Committed {
        commit: commit(number),
        parent: number.checked_sub(1).map(commit),
        environment: instance.environment.clone(),
        change,
        message: format!(
            "deploy({}): {} {}",
            instance.environment,
            instance.service,
            image(number).tag
        ),
        author: "Alice <alice@example.com>".to_owned(),
        cause: EventId::derived(deployment.0, &number.to_string()),
        files_digest: Digest::of(format!("{content}  {path}\n").as_bytes()),
        files: BTreeMap::from([(path, Some(content))]),
        ordinal: None,
        ledger: None,
        signer: None,
        unchanged: false,
    }
}

/// The number-th commit of somebody else.
pub fn foreign_commit(number: u64) -> gitops::ForeignCommitFound {
    gitops::ForeignCommitFound {
        commit: commit(number),
        author: "Bob <bob@example.com>".to_owned(),
        message: "try something".to_owned(),
        files: vec!["base/values.yaml".to_owned()],
        parents: Vec::new(),
        ordinal: None,
        committer: None,
        committed_at: None,
        signature: None,
        diff: None,
        environments: Vec::new(),
        reverts: None,
        undoes: None,
    }
}

/// The events of a GitOps repository.
pub fn gitops_events(instance: &InstanceRef, deployment: DeploymentId) -> Vec<GitopsEvent> {
    let service = instance.service.clone();
    vec![
        GitopsEvent::RepositoryCreated(gitops::RepositoryCreated {
            commit: commit(0),
            branch: "main".to_owned(),
        }),
        GitopsEvent::Committed(Box::new(committed(
            instance,
            deployment,
            1,
            Change::Deploy {
                service,
                deployment,
                from: None,
            },
        ))),
        GitopsEvent::ForeignCommitFound(Box::new(foreign_commit(2))),
        GitopsEvent::ForeignCommitAdopted(gitops::ForeignCommitAdopted {
            commit: commit(2),
            reason: Some("it was urgent".to_owned()),
        }),
        GitopsEvent::RevertRequested(gitops::RevertRequested {
            commit: commit(2),
            reason: Some("it was wrong".to_owned()),
        }),
        GitopsEvent::RevertFailed(gitops::RevertFailed {
            commit: commit(2),
            code: "revert_conflicts".to_owned(),
            message: "later commits changed the same lines".to_owned(),
            remedy: "undo it by hand".to_owned(),
        }),
        GitopsEvent::Reverted(Box::new(gitops::Reverted {
            reverts: commit(2),
            commit: commit(3),
            parent: Some(commit(2)),
            ordinal: 4,
            message: "revert(production): try something".to_owned(),
            author: "Alice <alice@example.com>".to_owned(),
            cause: EventId::derived(deployment.0, "revert"),
            diff: gitops::DiffSummary {
                files: 1,
                insertions: 1,
                deletions: 2,
                files_digest: Digest::of(b"files"),
            },
            environments: vec![instance.environment.clone()],
            ledger: None,
            signer: None,
        })),
        GitopsEvent::SignerAdded(gitops::SignerAdded {
            public_key:
                "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIGPKSUTyz1HwHReFVvD5obVsALAgJRNarH4TRpNePnAS"
                    .to_owned(),
            fingerprint: "SHA256:UCUiLr7Pjs9wFFJMDByLgc3NrtdU344OgUM45wZPcIQ".to_owned(),
        }),
        GitopsEvent::HistoryRestored(gitops::HistoryRestored { found: commit(3) }),
        GitopsEvent::HistoryRewritten(gitops::HistoryRewritten {
            expected: commit(3),
            found: commit(9),
            found_ordinal: 3,
            common: Some(commit(1)),
        }),
        GitopsEvent::RewriteAccepted(gitops::RewriteAccepted {
            commit: commit(9),
            reason: Some("the history had a secret".to_owned()),
        }),
        GitopsEvent::RemoteFailing(gitops::RemoteFailing {
            during: gitops::RemoteStep::Push,
            code: "gitops_remote_auth".to_owned(),
            message: "git.example.com asks for credentials, and none are configured for it"
                .to_owned(),
            remedy: "Configure a credential for git.example.com.".to_owned(),
        }),
        GitopsEvent::RemoteRecovered(gitops::RemoteRecovered {}),
    ]
}

/// The addresses of a deployment.
pub fn hostnames(instance: &InstanceRef, deployment: DeploymentId) -> routing::Hostnames {
    let InstanceRef {
        project,
        environment,
        service,
    } = instance;
    let host = |text: String| Hostname::parse(text).expect("a hostname");
    routing::Hostnames {
        preview: host(format!(
            "{}.{service}.{project}.localhost",
            deployment.short()
        )),
        environment: host(format!("{service}.{environment}.{project}.localhost")),
        live: (environment.as_str() == "production")
            .then(|| host(format!("{service}.{project}.localhost"))),
        branch: None,
    }
}

/// The events of a route table.
pub fn routing_events(instance: &InstanceRef, deployment: DeploymentId) -> Vec<RoutingEvent> {
    let names = hostnames(instance, deployment);
    vec![
        RoutingEvent::Switched(Box::new(routing::Switched {
            table: 1,
            reason: routing::SwitchReason::Deploy,
            instance: instance.clone(),
            deployment,
            changes: vec![RouteChange {
                hostname: names.preview.clone(),
                stickiness: Stickiness::Deployment,
                previous: Vec::new(),
                next: vec![Backend {
                    deployment,
                    weight: 100,
                }],
            }],
            main: Some(MainChange {
                previous: None,
                next: Some(deployment),
            }),
            rolled_back: false,
            was_rolled_back: false,
            undoes: None,
            note: Some("the first one".to_owned()),
            policy: None,
            domain: None,
        })),
        RoutingEvent::Applied(routing::Applied {
            gateway: "berlin".to_owned(),
            table: 1,
            hostnames: vec![names.preview],
            addresses: None,
            ingresses: None,
        }),
        RoutingEvent::Rejected(routing::Rejected {
            gateway: "oslo".to_owned(),
            table: 1,
            code: "port_in_use".to_owned(),
            message: "port 7071 is taken".to_owned(),
        }),
    ]
}

/// The events of a hostname that its owner brought along.
pub fn domain_events(instance: &InstanceRef) -> Vec<DomainEvent> {
    vec![
        DomainEvent::Claimed(domain::Claimed {
            hostname: Hostname::parse("www.example.com").expect("a hostname"),
            number: 1,
            instance: instance.clone(),
            stickiness: Stickiness::Live,
        }),
        DomainEvent::ReleaseRequested(domain::ReleaseRequested { number: 1 }),
        DomainEvent::Released(domain::Released { number: 1 }),
    ]
}

/// The id of the sample's subscription.
pub fn subscription_id() -> SubscriptionId {
    SubscriptionId(Uuid::from_u128(0x0190_0000_0000_7000_8000_0000_0000_0077))
}

/// The events of a subscription.
pub fn subscription_events() -> Vec<SubscriptionEvent> {
    let id = subscription_id();
    let secret = |version| {
        let id = Subscription::secret_id(id, version).expect("a secret's name");
        SecretRef {
            secret: id.name,
            scope: id.scope,
            version,
            commitment: Commitment::from_hmac(&[7; 32]),
        }
    };
    let endpoint = |tries| subscription::Endpoint {
        url: EndpointUrl::parse("https://hooks.example.com/daybook").expect("a URL"),
        format: subscription::Format::Cloudevents,
        filter: subscription::Filter {
            environment: None,
            service: Some(ServiceName::parse("web").expect("a name")),
            kinds: vec![KindPattern::parse("deployment").expect("a kind")],
            deployment: None,
        },
        proof: true,
        tries,
    };
    let event = EventId(Uuid::from_u128(5));
    let position = Position(5);
    vec![
        SubscriptionEvent::Created(Box::new(subscription::Created {
            id,
            endpoint: endpoint(16),
            after: Position(3),
            secret: secret(1),
        })),
        SubscriptionEvent::Changed(Box::new(subscription::Changed {
            endpoint: endpoint(5),
        })),
        SubscriptionEvent::SecretRotated(Box::new(subscription::SecretRotated {
            secret: secret(2),
            overlap_until: super::time(86_400),
        })),
        SubscriptionEvent::TestRequested(subscription::TestRequested {}),
        SubscriptionEvent::EventDeadLettered(subscription::EventDeadLettered {
            position,
            event,
            tries: 5,
            code: "status_500".into(),
        }),
        SubscriptionEvent::Paused(subscription::Paused {
            reason: subscription::PauseReason::Gone,
        }),
        SubscriptionEvent::Resumed(subscription::Resumed {}),
        SubscriptionEvent::ReplayRequested(subscription::ReplayRequested {
            positions: vec![position],
        }),
        SubscriptionEvent::EventReplayed(subscription::EventReplayed { position, event }),
        SubscriptionEvent::Progressed(subscription::Progressed {
            position: Position(9),
        }),
        SubscriptionEvent::Deleted(subscription::Deleted {}),
        SubscriptionEvent::DeadLettersDiscarded(subscription::DeadLettersDiscarded {
            positions: vec![position],
        }),
    ]
}

/// The events of the ledger itself.
pub fn ledger_events() -> Vec<LedgerEvent> {
    vec![LedgerEvent::Repaired(ledger::Repaired {
        breach: Some(ledger::FoundBreach {
            code: "log_truncated".into(),
            position: Some(Position(31)),
            message: "the log ends at 30, although 61 events were signed".into(),
        }),
        size: 61,
        root: Digest::of(b"a root"),
        gaps: 0,
        identity: "00000000-0000-4000-8000-000000000002".into(),
        replaces: Some("00000000-0000-4000-8000-000000000001".into()),
    })]
}

/// The events of access.
pub fn access_events(instance: &InstanceRef) -> Vec<AccessEvent> {
    let token: access::TokenId = "0f3a9c5d7e21".parse().expect("a token id");
    let projects = Projects::Named([instance.project.clone()].into());
    vec![
        AccessEvent::TokenCreated(access::TokenCreated {
            token: token.clone(),
            name: "ci".parse().expect("a name"),
            account: "release-robot".parse().expect("an account"),
            digest: Digest::of(b"a secret"),
            grants: vec![
                Grant {
                    role: Role::Deployer,
                    projects,
                },
                Grant {
                    role: Role::Viewer,
                    projects: Projects::All,
                },
            ],
            expires_at: Some(time(10_000)),
        }),
        AccessEvent::TokenRotated(access::TokenRotated {
            token: token.clone(),
            digest: Digest::of(b"another secret"),
            old_until: Some(time(500)),
            expires_at: Some(time(20_000)),
        }),
        AccessEvent::TokenRevoked(access::TokenRevoked {
            token,
            reason: Some("it was in a public repository".into()),
        }),
    ]
}
