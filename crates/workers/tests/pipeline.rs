//! The pipeline's logic, on the embedded log, with ports that do nothing: what is tested is who
//! appends what, in which order, and what survives a restart.
#![allow(clippy::unwrap_used)]

#[path = "pipeline/cluster_gateways.rs"]
mod cluster_gateways;

use std::collections::HashMap;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use async_trait::async_trait;
use daybook_events::deployment::{
    CancelRequested, Deployment, DeploymentEvent, OperationRequested, Requested, Status,
    SwitchMode, Version,
};
use daybook_events::domain::{self, Domain};
use daybook_events::environment::{Environment, EnvironmentEvent, EnvironmentSpec};
use daybook_events::freeze::{Freeze, FreezeRule, FreezeSet, OneOff};
use daybook_events::gitops::{Change, GitopsEvent};
use daybook_events::log::{
    Append, AppendError, Appended, Consumer, ConsumerConfig, EventStream, LogInfo, ReadError,
};
use daybook_events::project::{Project, ProjectEvent};
use daybook_events::routing::{self, Hostnames, Routing, Stickiness, Target as RouteTarget};
use daybook_events::spec::{BuildSpec, ImageReference, PinnedImage, RunSpec};
use daybook_events::tree::{Breach, PublishedTree, SignedHead, TreeCondition};
use daybook_events::{
    Actor, AggregateKind, ClusterName, Context, DeploymentId, EnvironmentName, EventId, EventLog,
    Folded, GitRef, Hostname, InstanceRef, Position, ProjectName, Recorded, Subject, SubjectFilter,
    deployment, environment, project,
};
use daybook_projections::{Ledger, Projections};
use daybook_store::embedded::{EmbeddedConfig, EmbeddedLines, EmbeddedLog, LineRetention};
use daybook_store::tlog::GuardedLog;
use daybook_workers::crew::Crew;
use daybook_workers::driver::DriverOptions;
use daybook_workers::gateway::{ClusterPolicy, Gateway, Route, RouteTable};
use daybook_workers::git_transport::{GitTransport, TransportConfig};
use daybook_workers::gitops::{GitopsRepositories, survey};
use daybook_workers::idle::{IdleImages, IdleRepositories, IdleSources, IdleTarget};
use daybook_workers::pipeline::{Bench, Settings, queue};
use daybook_workers::ports::{
    BuildInput, BuiltImage, GitopsChange, GitopsCommit, GitopsRevert, GitopsReverted, Images,
    Output, Repositories, Resolved, Sources, StepError,
};
use daybook_workers::target::{AppRef, Target};
use daybook_workers::values::EnvironmentValues;
use futures_util::StreamExt as _;
use jiff::Timestamp;
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

/// Everything of a process, with idle ports.
struct World {
    bench: Bench,
    gateway: Gateway,
    log: Arc<EmbeddedLog>,
    ledger: Ledger,
    crew: Crew,
    cancel: CancellationToken,
    runner: tokio::task::JoinHandle<()>,
}

struct Ports {
    sources: Arc<dyn Sources>,
    images: Arc<dyn Images>,
    repositories: Arc<dyn Repositories>,
    target: Arc<dyn Target>,
    tree: Arc<Breakable>,
    /// How much later than it is appended each event is folded.
    lag: Duration,
}

/// A log that the projections get late.
#[derive(Debug)]
struct Late(Arc<dyn EventLog>, Duration);

#[async_trait]
impl EventLog for Late {
    async fn append(&self, append: Append) -> Result<Appended, AppendError> {
        self.0.append(append).await
    }
    async fn head(&self) -> Result<Position, ReadError> {
        self.0.head().await
    }
    async fn get(&self, position: Position) -> Result<Option<Recorded>, ReadError> {
        self.0.get(position).await
    }
    async fn read_aggregate(&self, subject: &Subject) -> Result<Vec<Recorded>, ReadError> {
        self.0.read_aggregate(subject).await
    }
    async fn read(
        &self,
        after: Position,
        filter: &SubjectFilter,
        limit: usize,
    ) -> Result<Vec<Recorded>, ReadError> {
        self.0.read(after, filter, limit).await
    }
    async fn tail(&self, after: Position, filter: SubjectFilter) -> Result<EventStream, ReadError> {
        let (events, lag) = (self.0.tail(after, filter).await?, self.1);
        let late = events.then(move |event| async move {
            tokio::time::sleep(lag).await;
            event
        });
        Ok(late.boxed())
    }
    async fn consumer(&self, config: ConsumerConfig) -> Result<Arc<dyn Consumer>, ReadError> {
        self.0.consumer(config).await
    }
    async fn info(&self) -> Result<LogInfo, ReadError> {
        self.0.info().await
    }
}

/// A tree that says what it is told to say of the log.
#[derive(Debug, Default)]
struct Breakable {
    broken: AtomicBool,
    asked: AtomicUsize,
}

#[async_trait]
impl PublishedTree for Breakable {
    fn head(&self) -> Option<SignedHead> {
        None
    }
    fn condition(&self) -> TreeCondition {
        if !self.broken.load(SeqCst) {
            return TreeCondition::Sound;
        }
        self.asked.fetch_add(1, SeqCst);
        TreeCondition::Broken(Breach {
            code: "log_truncated",
            position: None,
            message: "the log was cut".into(),
            remedy: "repair it".into(),
        })
    }
    async fn resource(&self, _: &str) -> std::io::Result<Option<bytes::Bytes>> {
        Ok(None)
    }
}

impl Default for Ports {
    fn default() -> Self {
        Self {
            sources: Arc::new(IdleSources),
            images: Arc::new(IdleImages),
            repositories: Arc::new(IdleRepositories::default()),
            target: Arc::new(IdleTarget::new(cluster())),
            tree: Arc::default(),
            lag: Duration::ZERO,
        }
    }
}

fn cluster() -> ClusterName {
    ClusterName::parse("local-a").unwrap()
}

fn instance() -> InstanceRef {
    "shop.production.web".parse().unwrap()
}

fn of_git(git_ref: &str) -> Version {
    Version::Git {
        url: "https://example.com/shop.git".parse().unwrap(),
        git_ref: GitRef::parse(git_ref).unwrap(),
        path: String::new(),
    }
}

/// Has a gateway route a hostname for a project that the ledger knows nothing of, so that it
/// refuses to route it for any other.
fn occupy(gateway: &Gateway, project: &str, hostname: &Hostname) {
    let route = Route {
        backends: Vec::new(),
        policy: ClusterPolicy::Simple,
        internal: None,
    };
    let table = RouteTable {
        project: project.parse().unwrap(),
        revision: 1,
        routes: [(hostname.clone(), route)].into(),
    };
    gateway.apply(table).unwrap();
}

impl World {
    async fn start(dir: &Path, ports: &Ports) -> Self {
        let embedded = EmbeddedLog::open(dir.join("log"), EmbeddedConfig::default());
        let embedded = Arc::new(embedded.await.unwrap());
        let log: Arc<dyn EventLog> =
            Arc::new(GuardedLog::new(embedded.clone(), ports.tree.clone()));
        let lines = Arc::new(
            EmbeddedLines::open(dir.join("lines"), LineRetention::default())
                .await
                .unwrap(),
        );
        let cancel = CancellationToken::new();
        let projections = Projections::open(&dir.join("projections")).unwrap();
        let runner = {
            let (projections, cancel) = (projections.clone(), cancel.clone());
            let log: Arc<dyn EventLog> = match ports.lag.is_zero() {
                true => log.clone(),
                false => Arc::new(Late(log.clone(), ports.lag)),
            };
            tokio::spawn(async move {
                daybook_projections::runner::run(projections, log, cancel)
                    .await
                    .unwrap();
            })
        };
        let ledger = Ledger::new(log, projections);
        let bench = Bench {
            ledger: ledger.clone(),
            lines,
            secrets: Arc::new(daybook_secrets::NoSecrets),
            settings: Arc::new(Settings {
                worker: "test".into(),
                domain: Hostname::parse("localhost").unwrap(),
                image_prefix: "registry.example/daybook".into(),
                scratch: dir.join("scratch"),
                gateway_url: None,
                builds: 2,
                keep_old: daybook_events::timer::KeepFor::Never,
            }),
        };
        let options = DriverOptions {
            ack_wait: Duration::from_secs(2),
            ..DriverOptions::default()
        };
        let crew = Crew::new(bench.clone(), options, cancel.clone());
        crew.build(ports.sources.clone(), ports.images.clone());
        crew.package(ports.repositories.clone());
        crew.sync(ports.repositories.clone(), ports.target.clone());
        crew.route();
        let gateway = Gateway::bind(([127, 0, 0, 1], 0).into()).await.unwrap();
        crew.gateway(gateway.clone(), "local");
        Self {
            bench,
            gateway,
            log: embedded,
            ledger,
            crew,
            cancel,
            runner,
        }
    }

    async fn stop(self) {
        self.cancel.cancel();
        self.crew.ended().await;
        self.runner.await.unwrap();
        self.log.close().await;
    }

    fn context(&self) -> Context {
        Context {
            id: EventId(Uuid::now_v7()),
            time: Timestamp::now(),
            correlation: Uuid::now_v7(),
            causation: None,
            actor: Actor::unauthenticated("ada"),
            traceparent: None,
            request_digest: None,
        }
    }

    async fn prepare(&self) {
        self.prepare_for(&instance()).await;
    }

    async fn prepare_for(&self, i: &InstanceRef) {
        let created = ProjectEvent::Created(project::Created {
            name: i.project.clone(),
            description: None,
        });
        self.ledger
            .execute::<Project>(&Subject::Project(i.project.clone()), &self.context(), |s| {
                project::decide(s, created.clone())
            })
            .await
            .unwrap();
        let created = EnvironmentEvent::Created(environment::Created {
            project: i.project.clone(),
            name: i.environment.clone(),
            spec: EnvironmentSpec {
                clusters: vec![cluster()],
                live: true,
                ..EnvironmentSpec::default()
            },
            from: None,
            auto_deploy: None,
        });
        let subject = Subject::Environment(i.project.clone(), i.environment.clone());
        self.ledger
            .execute::<Environment>(&subject, &self.context(), |s| {
                environment::decide(s, created.clone())
            })
            .await
            .unwrap();
    }

    async fn request(&self, git_ref: &str, switch: SwitchMode) -> DeploymentId {
        self.request_version(of_git(git_ref), switch).await
    }

    async fn claim(&self, hostname: &Hostname) {
        let command = domain::Command::Claim {
            hostname: hostname.clone(),
            instance: instance(),
            stickiness: Stickiness::Live,
        };
        let subject = Subject::Domain(hostname.clone());
        let context = self.context();
        let claimed = self
            .ledger
            .execute::<Domain>(&subject, &context, |s| domain::decide(s, command.clone()));
        claimed.await.unwrap();
    }

    /// Waits until the route table of the project is so.
    async fn routes(&self, what: &str, is_so: impl Fn(&Routing) -> bool) -> Routing {
        self.routes_of(&instance().project, what, is_so).await
    }

    async fn routes_of(
        &self,
        project: &ProjectName,
        what: &str,
        is_so: impl Fn(&Routing) -> bool,
    ) -> Routing {
        let mut changes = self.ledger.projections().changes();
        let projections = self.ledger.projections();
        let waited = tokio::time::timeout(Duration::from_secs(60), async {
            loop {
                if let Some(routing) = projections.routing(project).unwrap()
                    && is_so(&routing)
                {
                    return routing;
                }
                changes.changed().await.unwrap();
            }
        });
        let waited = waited.await;
        waited.unwrap_or_else(|_| panic!("{what}: {:#?}", projections.routing(project)))
    }

    async fn request_version(&self, version: Version, switch: SwitchMode) -> DeploymentId {
        self.request_of(instance(), version, switch).await
    }

    async fn request_of(
        &self,
        instance: InstanceRef,
        version: Version,
        switch: SwitchMode,
    ) -> DeploymentId {
        let id = DeploymentId(Uuid::now_v7());
        self.request_as(id, instance, version, switch).await;
        id
    }

    async fn request_as(
        &self,
        id: DeploymentId,
        instance: InstanceRef,
        version: Version,
        switch: SwitchMode,
    ) {
        let subject =
            Subject::Deployment(instance.project.clone(), instance.environment.clone(), id);
        let event = DeploymentEvent::Requested(Box::new(Requested {
            instance,
            version,
            clusters: vec![cluster()],
            build: BuildSpec::default(),
            image_repository: None,
            run: RunSpec::default(),
            switch,
            reason: None,
            redeploy_of: None,
            promoted_from: None,
            allow_partial: false,
            config: Default::default(),
            secrets: std::collections::BTreeMap::new(),
        }));
        self.append(&subject, id, event).await;
    }

    async fn apply(&self, id: DeploymentId, event: DeploymentEvent) {
        let i = instance();
        let subject = Subject::Deployment(i.project, i.environment, id);
        self.append(&subject, id, event).await;
    }

    async fn append(&self, subject: &Subject, id: DeploymentId, event: DeploymentEvent) {
        let context = Context {
            correlation: id.0,
            ..self.context()
        };
        self.ledger
            .execute::<Deployment>(subject, &context, |s| deployment::decide(s, event.clone()))
            .await
            .unwrap();
    }

    /// Waits until a deployment is in a state.
    async fn reach(&self, id: DeploymentId, status: Status) -> Deployment {
        let mut changes = self.ledger.projections().changes();
        let waited = tokio::time::timeout(Duration::from_secs(60), async {
            loop {
                if let Some(row) = self.ledger.projections().deployment(id).unwrap()
                    && row.state.status == status
                {
                    return row.state;
                }
                changes.changed().await.unwrap();
            }
        });
        match waited.await {
            Ok(state) => state,
            Err(_) => panic!(
                "{id} never became {status:?}: {:#?}",
                self.ledger
                    .projections()
                    .deployment(id)
                    .unwrap()
                    .map(|r| r.state.status)
            ),
        }
    }

    /// Waits until a deployment is live or superseded.
    async fn reach_any(&self, id: DeploymentId) {
        let mut changes = self.ledger.projections().changes();
        let waited = tokio::time::timeout(Duration::from_secs(60), async {
            loop {
                let row = self.ledger.projections().deployment(id).unwrap();
                match row.map(|r| r.state.status) {
                    Some(Status::Started | Status::Cancelled) => return,
                    Some(Status::Failed) => panic!("{id} failed"),
                    _ => changes.changed().await.unwrap(),
                }
            }
        });
        waited.await.unwrap();
    }

    async fn kinds_of(&self, id: DeploymentId) -> Vec<String> {
        let i = instance();
        let subject = Subject::Deployment(i.project, i.environment, id);
        let events = self.ledger.log().read_aggregate(&subject).await.unwrap();
        events
            .iter()
            .map(|r| r.event().unwrap().short_kind().to_owned())
            .collect()
    }

    /// What another process on the same log decides with: projections of its own.
    fn another_process(&self, folder: &Path) -> Bench {
        let projections = Projections::open(folder).unwrap();
        let log = self.ledger.log().clone();
        let (runs, cancel) = (projections.clone(), self.cancel.clone());
        let fold = log.clone();
        tokio::spawn(async move { daybook_projections::runner::run(runs, fold, cancel).await });
        Bench {
            ledger: Ledger::new(log, projections),
            ..self.bench.clone()
        }
    }

    fn main(&self) -> Option<DeploymentId> {
        let routing = self
            .ledger
            .projections()
            .routing(&instance().project)
            .unwrap();
        routing.and_then(|r| r.traffic(&instance()).and_then(|t| t.main))
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_deployment_passes_through_every_phase_and_takes_over_the_traffic() {
    let dir = tempfile::tempdir().unwrap();
    let world = World::start(dir.path(), &Ports::default()).await;
    world.prepare().await;
    let id = world.request("main", SwitchMode::Automatic).await;
    let state = world.reach(id, Status::Started).await;
    assert_eq!(
        world.kinds_of(id).await,
        [
            "deployment.requested.v1",
            "deployment.queued.v1",
            "deployment.cloning_started.v1",
            "deployment.source_resolved.v1",
            "deployment.building_started.v1",
            "deployment.pushing_started.v1",
            "deployment.image_pinned.v1",
            "deployment.deploying_started.v1",
            "deployment.workload_observed.v1",
            "deployment.succeeded.v1",
        ]
    );
    assert!(state.workload_is_ready());
    assert_eq!(world.main(), Some(id));
    world.stop().await;
}

/// More services at once than the route table remembers switches: whoever applies or concludes
/// them meets several in one go, and none is forgotten.
#[tokio::test(flavor = "multi_thread")]
async fn many_services_of_one_project_all_succeed_and_are_routed() {
    let dir = tempfile::tempdir().unwrap();
    let ports = Ports::default();
    let world = World::start(dir.path(), &ports).await;
    world.prepare().await;
    let mut ids = Vec::new();
    for n in 0..40 {
        let service = InstanceRef {
            service: format!("web-{n}").parse().unwrap(),
            ..instance()
        };
        let reference = format!("registry.example/shop/web-{n}:v1");
        let version = Version::Image {
            reference: reference.parse().unwrap(),
        };
        let id = world.request_of(service, version, SwitchMode::Automatic);
        ids.push(id.await);
    }
    for id in &ids {
        world.reach(*id, Status::Started).await;
    }
    world.stop().await;

    // A new gateway takes over the table as it is.
    let world = World::start(dir.path(), &ports).await;
    for id in &ids {
        let routing = world.ledger.projections().routing(&instance().project);
        let routing = routing.unwrap().unwrap();
        assert_eq!(routing.hostnames_of(*id).len(), 3);
        for (hostname, _) in routing.hostnames_of(*id) {
            let mut routed = false;
            for _ in 0..3_000 {
                routed = world.gateway.hostnames().contains_key(hostname);
                if routed {
                    break;
                }
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
            assert!(routed, "{hostname} is not routed");
        }
    }
    world.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_image_is_pinned_and_neither_cloned_nor_built() {
    let dir = tempfile::tempdir().unwrap();
    let world = World::start(dir.path(), &Ports::default()).await;
    world.prepare().await;
    let version = Version::Image {
        reference: "registry.example/shop/web:v1"
            .parse::<ImageReference>()
            .unwrap(),
    };
    let id = world.request_version(version, SwitchMode::Automatic).await;
    let state = world.reach(id, Status::Started).await;
    let kinds = world.kinds_of(id).await;
    assert!(kinds.contains(&"deployment.image_pinned.v1".to_owned()));
    assert!(
        !kinds
            .iter()
            .any(|k| k.contains("cloning") || k.contains("building"))
    );
    assert_eq!(state.image.unwrap().tag.as_str(), "v1");
    world.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_build_is_shared_by_deployments_of_one_commit() {
    let dir = tempfile::tempdir().unwrap();
    let world = World::start(dir.path(), &Ports::default()).await;
    world.prepare().await;
    let first = world.request("main", SwitchMode::Automatic).await;
    let first = world.reach(first, Status::Started).await;
    let second = world.request("main", SwitchMode::Automatic).await;
    let second = world.reach(second, Status::Started).await;
    assert_eq!(first.build, second.build);
    assert_eq!(first.image, second.image);
    assert_eq!(second.build_readiness.reason, "BuildShared");
    let subject = Subject::Build(instance().project, first.build.unwrap());
    let events = world.ledger.log().read_aggregate(&subject).await.unwrap();
    let started = events
        .iter()
        .filter(|r| r.event().unwrap().short_kind() == "build.started.v1");
    assert_eq!(started.count(), 1);
    world.stop().await;
}

/// Builds that wait until they are let go, and fail if told to.
struct SlowImages {
    gate: Arc<Semaphore>,
    fail: bool,
}

#[async_trait]
impl Images for SlowImages {
    async fn build(
        &self,
        input: BuildInput<'_>,
        output: &Output,
        cancel: &CancellationToken,
    ) -> Result<BuiltImage, StepError> {
        output.send("compiling".into()).await.unwrap();
        tokio::select! {
            permit = self.gate.acquire() => permit.unwrap().forget(),
            () = cancel.cancelled() => return Err(StepError::fatal("cancelled", "it was cancelled", "")),
        }
        if self.fail {
            return Err(StepError::fatal(
                "build_command_failed",
                "the command ended with 1",
                "mend it",
            ));
        }
        IdleImages.build(input, output, cancel).await
    }
    async fn push(
        &self,
        image: &BuiltImage,
        scratch: &Path,
        repository: &daybook_events::ImageRepository,
        tag: &daybook_events::ImageTag,
        output: &Output,
    ) -> Result<PinnedImage, StepError> {
        IdleImages
            .push(image, scratch, repository, tag, output)
            .await
    }
    async fn resolve(&self, reference: &ImageReference) -> Result<PinnedImage, StepError> {
        IdleImages.resolve(reference).await
    }
}

fn slow(fail: bool) -> (Ports, Arc<Semaphore>) {
    let gate = Arc::new(Semaphore::new(0));
    let ports = Ports {
        images: Arc::new(SlowImages {
            gate: gate.clone(),
            fail,
        }),
        ..Ports::default()
    };
    (ports, gate)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_build_that_fails_fails_its_deployment_with_the_cause() {
    let dir = tempfile::tempdir().unwrap();
    let (ports, gate) = slow(true);
    let world = World::start(dir.path(), &ports).await;
    world.prepare().await;
    let id = world.request("main", SwitchMode::Automatic).await;
    world.reach(id, Status::Building).await;
    gate.add_permits(1);
    let state = world.reach(id, Status::Failed).await;
    let failure = state.failure.unwrap();
    assert_eq!(failure.code, "build_command_failed");
    assert_eq!(failure.during, Status::Building);
    assert_eq!(failure.remedy, "mend it");
    assert!(world.main().is_none());
    world.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn of_several_that_wait_only_the_newest_is_deployed() {
    let dir = tempfile::tempdir().unwrap();
    let (ports, gate) = slow(false);
    let world = World::start(dir.path(), &ports).await;
    world.prepare().await;
    let first = world.request("one", SwitchMode::Automatic).await;
    world.reach(first, Status::Building).await;
    let second = world.request("two", SwitchMode::Automatic).await;
    let third = world.request("three", SwitchMode::Automatic).await;
    let state = world.reach(second, Status::Cancelled).await;
    assert_eq!(state.cancelled.unwrap().superseded_by, Some(third));
    let waiting = world
        .ledger
        .projections()
        .deployment(third)
        .unwrap()
        .unwrap();
    assert_eq!(waiting.state.status, Status::Requested);
    gate.add_permits(2);
    world.reach(first, Status::Started).await;
    world.reach(third, Status::Started).await;
    assert_eq!(world.main(), Some(third));
    world.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn cancelling_ends_the_deployment_and_the_build_that_nobody_waits_for() {
    let dir = tempfile::tempdir().unwrap();
    let (ports, _gate) = slow(false);
    let world = World::start(dir.path(), &ports).await;
    world.prepare().await;
    let id = world.request("main", SwitchMode::Automatic).await;
    let state = world.reach(id, Status::Building).await;
    world
        .apply(
            id,
            DeploymentEvent::CancelRequested(CancelRequested { reason: None }),
        )
        .await;
    world.reach(id, Status::Cancelled).await;
    let build = state.build.unwrap();
    let mut changes = world.ledger.projections().changes();
    tokio::time::timeout(Duration::from_secs(60), async {
        loop {
            let (_, state) = world.ledger.projections().build(build).unwrap().unwrap();
            if state.status == daybook_events::build::BuildStatus::Cancelled {
                return;
            }
            changes.changed().await.unwrap();
        }
    })
    .await
    .expect("the build is given up");
    world.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_restart_in_the_middle_of_a_build_goes_on_with_the_next_attempt() {
    let dir = tempfile::tempdir().unwrap();
    let (ports, gate) = slow(false);
    let world = World::start(dir.path(), &ports).await;
    world.prepare().await;
    let id = world.request("main", SwitchMode::Automatic).await;
    world.reach(id, Status::Building).await;
    world.stop().await;

    gate.add_permits(1);
    let world = World::start(dir.path(), &ports).await;
    let state = world.reach(id, Status::Started).await;
    let (_, build) = world
        .ledger
        .projections()
        .build(state.build.unwrap())
        .unwrap()
        .unwrap();
    assert_eq!(build.attempt, 2);
    let kinds = world.kinds_of(id).await;
    for once in [
        "deployment.building_started.v1",
        "deployment.deploying_started.v1",
        "deployment.succeeded.v1",
    ] {
        assert_eq!(
            kinds.iter().filter(|k| *k == once).count(),
            1,
            "{once} in {kinds:?}"
        );
    }
    world.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn blue_green_rollback_and_the_end_of_a_life() {
    let dir = tempfile::tempdir().unwrap();
    let world = World::start(dir.path(), &Ports::default()).await;
    world.prepare().await;
    let one = world.request("one", SwitchMode::Automatic).await;
    world.reach(one, Status::Started).await;
    let two = world.request("two", SwitchMode::Manual).await;
    world.reach(two, Status::Started).await;
    assert_eq!(
        world.main(),
        Some(one),
        "a manual switch waits for somebody"
    );

    let target = |id| RouteTarget {
        deployment: id,
        instance: instance(),
        status: Status::Started,
        ready: true,
    };
    let domain = Hostname::parse("localhost").unwrap();
    let hostnames = |id| Hostnames::under(&domain, &instance(), id, true).unwrap();
    let switch = async |command: routing::Command| {
        let done = world
            .ledger
            .execute::<Routing>(
                &Subject::Routing(instance().project),
                &world.context(),
                |s| routing::decide(s, command.clone()),
            )
            .await
            .unwrap();
        let position = done.position().unwrap();
        let patience = Duration::from_secs(60);
        world
            .ledger
            .projections()
            .wait_for(position, patience)
            .await
            .unwrap();
    };
    switch(routing::Command::MarkMain {
        target: target(two),
        hostnames: hostnames(two),
        expected_main: Some(one),
        note: None,
    })
    .await;
    assert_eq!(world.main(), Some(two));
    switch(routing::Command::Rollback {
        target: target(one),
        hostnames: hostnames(one),
        note: None,
    })
    .await;
    assert_eq!(world.main(), Some(one));

    // Rolled back: a deployment that would take over by itself does not.
    let three = world.request("three", SwitchMode::Automatic).await;
    world.reach(three, Status::Started).await;
    assert_eq!(world.main(), Some(one));

    let asked = || OperationRequested { reason: None };
    world
        .apply(two, DeploymentEvent::StopRequested(asked()))
        .await;
    world.reach(two, Status::Stopped).await;
    world
        .apply(two, DeploymentEvent::StartRequested(asked()))
        .await;
    world.reach(two, Status::Started).await;
    world
        .apply(two, DeploymentEvent::StopRequested(asked()))
        .await;
    world.reach(two, Status::Stopped).await;
    world
        .apply(two, DeploymentEvent::TerminateRequested(asked()))
        .await;
    world.reach(two, Status::Terminated).await;
    let routing = world
        .ledger
        .projections()
        .routing(&instance().project)
        .unwrap()
        .unwrap();
    assert!(routing.hostnames_of(two).is_empty());
    world.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn every_event_of_a_run_says_what_led_to_it() {
    let dir = tempfile::tempdir().unwrap();
    let world = World::start(dir.path(), &Ports::default()).await;
    world.prepare().await;
    let id = world.request("main", SwitchMode::Automatic).await;
    world.reach(id, Status::Started).await;
    let all = world
        .ledger
        .log()
        .read(Position::ZERO, &SubjectFilter::default(), 1000)
        .await
        .unwrap();
    let mut known = std::collections::BTreeSet::new();
    for recorded in &all {
        let event = recorded.event().unwrap();
        if event.correlationid == id.0 {
            match event.causationid {
                Some(cause) => assert!(
                    known.contains(&cause),
                    "{} has an unknown cause",
                    event.kind
                ),
                None => assert_eq!(event.short_kind(), "deployment.requested.v1"),
            }
        }
        known.insert(event.id);
    }
    world.stop().await;
}

/// What is logged on this thread.
#[derive(Clone, Default)]
struct Told(Arc<Mutex<Vec<String>>>);

impl Told {
    fn times(&self, text: &str) -> usize {
        let told = self.0.lock().unwrap();
        told.iter().filter(|t| t.contains(text)).count()
    }
}

impl tracing::Subscriber for Told {
    fn enabled(&self, _: &tracing::Metadata<'_>) -> bool {
        true
    }
    fn new_span(&self, _: &tracing::span::Attributes<'_>) -> tracing::span::Id {
        tracing::span::Id::from_u64(1)
    }
    fn record(&self, _: &tracing::span::Id, _: &tracing::span::Record<'_>) {}
    fn record_follows_from(&self, _: &tracing::span::Id, _: &tracing::span::Id) {}
    fn event(&self, event: &tracing::Event<'_>) {
        let mut text = String::new();
        event.record(
            &mut |field: &tracing::field::Field, value: &dyn std::fmt::Debug| {
                text += &format!("{field}={value:?} ");
            },
        );
        self.0.lock().unwrap().push(text);
    }
    fn enter(&self, _: &tracing::span::Id) {}
    fn exit(&self, _: &tracing::span::Id) {}
}

#[tokio::test]
async fn an_observation_that_is_refused_is_told_once_and_recorded_in_the_end() {
    let told = Told::default();
    let _guard = tracing::subscriber::set_default(told.clone());
    let dir = tempfile::tempdir().unwrap();
    let ports = Ports::default();
    let world = World::start(dir.path(), &ports).await;
    world.prepare().await;
    let id = world.request("main", SwitchMode::Automatic).await;
    let started = world.reach(id, Status::Started).await;
    let observed = started.observed.get(&cluster()).unwrap().clone();
    assert_eq!(observed.wanted, 1);

    // The ledger is stopped, and then the cluster shows something else.
    ports.tree.broken.store(true, SeqCst);
    let app = AppRef {
        project: instance().project,
        environment: instance().environment,
    };
    let read = ports
        .repositories
        .read(&app.project, &app.environment, &observed.revision);
    let mut values = read.await.unwrap();
    let service = values.services.get_mut(&instance().service).unwrap();
    service.releases.get_mut(&id).unwrap().run.replicas = 3;
    ports
        .target
        .apply(&app, &observed.revision, &values)
        .await
        .unwrap();
    tokio::time::timeout(Duration::from_secs(60), async {
        while ports.tree.asked.load(SeqCst) < 3 {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    })
    .await
    .unwrap();
    assert_eq!(told.times("observations are not recorded yet"), 1);
    assert_eq!(told.times("the log was cut"), 1);
    assert_eq!(told.times("observations are recorded again"), 0);

    ports.tree.broken.store(false, SeqCst);
    let mut changes = world.ledger.projections().changes();
    tokio::time::timeout(Duration::from_secs(60), async {
        loop {
            let row = world.ledger.projections().deployment(id).unwrap().unwrap();
            if row.state.observed.get(&cluster()).unwrap().wanted == 3 {
                break;
            }
            changes.changed().await.unwrap();
        }
        while told.times("observations are recorded again") == 0 {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    })
    .await
    .unwrap();
    assert_eq!(told.times("observations are not recorded yet"), 1);
    world.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_switch_that_a_gateway_cannot_apply_is_undone_and_its_deployment_fails() {
    let dir = tempfile::tempdir().unwrap();
    let world = World::start(dir.path(), &Ports::default()).await;
    world.prepare().await;
    let first = world.request("main", SwitchMode::Automatic).await;
    world.reach(first, Status::Started).await;
    let served = |r: &Routing| r.applied.get("local") == Some(&r.table);
    let before = world.routes("the first table is served", served).await;

    let second = DeploymentId(Uuid::now_v7());
    let domain = Hostname::parse("localhost").unwrap();
    let names = Hostnames::under(&domain, &instance(), second, true).unwrap();
    occupy(&world.gateway, "thief", &names.preview);
    world
        .request_as(second, instance(), of_git("main"), SwitchMode::Automatic)
        .await;
    let failed = world.reach(second, Status::Failed).await;
    assert_eq!(failed.failure.unwrap().code, "hostname_taken");
    let after = world.routes("the table before is served", |r| {
        served(r) && r.recent.iter().any(|s| s.undoes.is_some())
    });
    let after = after.await;
    let undone: Vec<_> = after.recent.iter().filter_map(|s| s.undoes).collect();
    assert_eq!(undone, [before.table + 1]);
    assert_eq!(world.main(), Some(first));
    let leads_to = |routing: &Routing| -> Vec<_> {
        let routes = routing.routes.iter();
        routes
            .map(|(h, r)| (h.clone(), r.backends.clone()))
            .collect()
    };
    assert_eq!(leads_to(&after), leads_to(&before));
    let of_gateway = world.gateway.hostnames();
    let own = of_gateway.iter().filter(|(_, p)| p.as_str() == "shop");
    assert!(own.map(|(h, _)| h).eq(before.routes.keys()));
    assert_eq!(
        world.kinds_of(first).await.last().unwrap(),
        "deployment.succeeded.v1"
    );
    world.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_hostname_that_a_gateway_cannot_take_in_is_given_up_and_stops_nothing_else() {
    let dir = tempfile::tempdir().unwrap();
    let world = World::start(dir.path(), &Ports::default()).await;
    world.prepare().await;
    let first = world.request("main", SwitchMode::Automatic).await;
    world.reach(first, Status::Started).await;
    let www = Hostname::parse("www.example.com").unwrap();
    occupy(&world.gateway, "thief", &www);
    world.claim(&www).await;
    let undone = world.routes("taking it in is undone", |r| {
        r.recent.iter().any(|s| s.undoes.is_some())
    });
    assert!(undone.await.domain(&www).is_none());
    let mut changes = world.ledger.projections().changes();
    let claim = || {
        world
            .ledger
            .projections()
            .domain(&www)
            .unwrap()
            .unwrap()
            .claim
    };
    while claim().is_some() {
        let changed = tokio::time::timeout(Duration::from_secs(60), changes.changed());
        changed.await.expect("the claim was not given up").unwrap();
    }
    // Whatever is switched later is served.
    let second = world.request("main", SwitchMode::Automatic).await;
    world.reach(second, Status::Started).await;
    assert_eq!(world.main(), Some(second));
    let routing = world.ledger.projections().routing(&instance().project);
    assert!(!routing.unwrap().unwrap().routes.contains_key(&www));
    assert_eq!(
        world
            .ledger
            .projections()
            .deployment(first)
            .unwrap()
            .unwrap()
            .state
            .status,
        Status::Started
    );
    world.stop().await;
}

/// A gateway that lags behind still leads a hostname for the project that gave it up.
#[tokio::test(flavor = "multi_thread")]
async fn a_hostname_is_taken_in_from_a_project_that_has_given_it_up() {
    let dir = tempfile::tempdir().unwrap();
    let world = World::start(dir.path(), &Ports::default()).await;
    let books: InstanceRef = "books.production.web".parse().unwrap();
    let www = Hostname::parse("www.example.com").unwrap();
    // What the gateway has of that project is older than what the ledger has.
    occupy(&world.gateway, "books", &www);
    for instance in [&books, &instance()] {
        world.prepare_for(instance).await;
        world
            .request_of(instance.clone(), of_git("main"), SwitchMode::Automatic)
            .await;
    }
    let served = |r: &Routing| r.table > 0 && r.applied.get("local") == Some(&r.table);
    world
        .routes_of(&books.project, "books are served", served)
        .await;
    world.routes("the shop is served", served).await;
    world.claim(&www).await;
    let claimed = world.routes("the hostname is served", |r| {
        served(r) && r.routes.contains_key(&www)
    });
    assert!(claimed.await.recent.iter().all(|s| s.undoes.is_none()));
    assert_eq!(world.gateway.hostnames()[&www].as_str(), "shop");
    world.stop().await;
}

/// More deployments than there is capacity to build: those to production are built first, and who
/// is overtaken hears of it.
#[tokio::test(flavor = "multi_thread")]
async fn production_is_built_first_and_who_is_overtaken_is_told() {
    let dir = tempfile::tempdir().unwrap();
    let (ports, gate) = slow(false);
    let world = World::start(dir.path(), &ports).await;
    world.prepare().await;
    let of = |environment: &str, number: usize| InstanceRef {
        environment: environment.parse().unwrap(),
        service: format!("web-{number}").parse().unwrap(),
        ..instance()
    };
    let version = |number: usize| Version::Git {
        url: "https://example.com/shop.git".parse().unwrap(),
        git_ref: GitRef::parse(format!("v{number}")).unwrap(),
        path: String::new(),
    };
    let mut staging = Vec::new();
    for number in 0..16 {
        let instance = of("staging", number);
        staging.push(
            world
                .request_of(instance, version(number), SwitchMode::Automatic)
                .await,
        );
    }
    // Both builders are busy, and four builds wait that nobody has taken on.
    let ahead = |status: Status| {
        let rows = world.ledger.projections().active_deployments(None, None);
        rows.unwrap()
            .iter()
            .filter(|r| r.state.status == status)
            .count()
    };
    let mut changes = world.ledger.projections().changes();
    tokio::time::timeout(Duration::from_secs(60), async {
        while ahead(Status::Building) < 2 || ahead(Status::Requested) > 10 {
            changes.changed().await.unwrap();
        }
    })
    .await
    .unwrap();
    let first_waiting = staging[6];
    let production = world
        .request_of(of("production", 99), version(99), SwitchMode::Automatic)
        .await;
    // One that needs no build waits for nobody.
    let image = Version::Image {
        reference: "registry.example/shop/web:v1".parse().unwrap(),
    };
    let given = world
        .request_of(of("staging", 100), image, SwitchMode::Automatic)
        .await;
    world.reach(given, Status::Started).await;
    assert_eq!(ahead(Status::Requested), 11);
    // One build ends, and production's is asked for; once those ahead have ended it is built.
    gate.add_permits(1);
    let mut changes = world.ledger.projections().changes();
    tokio::time::timeout(Duration::from_secs(60), async {
        let asked_for = || {
            let row = world.ledger.projections().deployment(production).unwrap();
            row.unwrap().state.build.is_some()
        };
        while !asked_for() {
            changes.changed().await.unwrap();
        }
    })
    .await
    .unwrap();
    assert_eq!(ahead(Status::Requested), 10);
    gate.add_permits(6);
    let done = world.reach(production, Status::Started).await;
    assert!(done.overtaken.is_empty());
    let overtaken = world.ledger.projections().deployment(first_waiting);
    assert_eq!(overtaken.unwrap().unwrap().state.overtaken, [production]);
    assert!(ahead(Status::Requested) > 0);
    gate.add_permits(100);
    for id in staging {
        world.reach(id, Status::Started).await;
    }
    world.stop().await;
}

/// A source that never answers for one service.
struct StuckSources;

#[async_trait]
impl Sources for StuckSources {
    async fn resolve(
        &self,
        url: &daybook_events::RepositoryUrl,
        git_ref: &GitRef,
    ) -> Result<Resolved, StepError> {
        if git_ref.as_str() == "stuck" {
            std::future::pending::<()>().await;
        }
        IdleSources.resolve(url, git_ref).await
    }
    async fn checkout(
        &self,
        url: &daybook_events::RepositoryUrl,
        commit: &daybook_events::CommitId,
        folder: &Path,
        output: &Output,
        cancel: &CancellationToken,
    ) -> Result<(), StepError> {
        IdleSources
            .checkout(url, commit, folder, output, cancel)
            .await
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn trouble_with_one_service_delays_no_other_one() {
    let dir = tempfile::tempdir().unwrap();
    let ports = Ports {
        sources: Arc::new(StuckSources),
        ..Ports::default()
    };
    let world = World::start(dir.path(), &ports).await;
    world.prepare().await;
    let stuck = world.request("stuck", SwitchMode::Automatic).await;
    world.reach(stuck, Status::Cloning).await;
    let behind = world.request("main", SwitchMode::Automatic).await;
    let mut others = Vec::new();
    for number in 0..8 {
        let other = InstanceRef {
            service: format!("other-{number}").parse().unwrap(),
            ..instance()
        };
        let version = Version::Git {
            url: "https://example.com/other.git".parse().unwrap(),
            git_ref: GitRef::parse(format!("v{number}")).unwrap(),
            path: String::new(),
        };
        others.push(
            world
                .request_of(other, version, SwitchMode::Automatic)
                .await,
        );
    }
    for id in others {
        world.reach(id, Status::Started).await;
    }
    let behind = world
        .ledger
        .projections()
        .deployment(behind)
        .unwrap()
        .unwrap();
    assert_eq!(behind.state.status, Status::Requested);
    world.stop().await;
}

/// However many processes admit, with projections of their own, which lag behind the log each in
/// its own way: the ledger has at no moment two of an instance in the pipeline.
#[tokio::test(flavor = "multi_thread")]
async fn several_processes_admit_one_of_an_instance_at_a_time() {
    let dir = tempfile::tempdir().unwrap();
    let world = World::start(dir.path(), &Ports::default()).await;
    world.prepare().await;
    let mut queues = Vec::new();
    for number in 0..3 {
        let bench = world.another_process(&dir.path().join(format!("projections-{number}")));
        queues.push(tokio::spawn(queue::run(bench, world.cancel.clone())));
    }
    let mut all = Vec::new();
    for number in 0..60 {
        let instance = InstanceRef {
            service: format!("web-{}", number % 4).parse().unwrap(),
            ..instance()
        };
        let version = Version::Git {
            url: "https://example.com/shop.git".parse().unwrap(),
            git_ref: GitRef::parse(format!("v{number}")).unwrap(),
            path: String::new(),
        };
        let id = world
            .request_of(instance, version, SwitchMode::Automatic)
            .await;
        all.push(id);
        if number % 7 == 0 {
            world.reach_any(id).await;
        }
    }
    for id in &all {
        world.reach_any(*id).await;
    }
    // The newest of each is live.
    for id in &all[56..] {
        world.reach(*id, Status::Started).await;
    }
    let of = SubjectFilter::of(AggregateKind::Deployment);
    let log = world.ledger.log();
    let events = log.read(Position::ZERO, &of, 100_000).await.unwrap();
    let mut states = HashMap::<DeploymentId, Folded<Deployment>>::new();
    let mut running = HashMap::<InstanceRef, DeploymentId>::new();
    for recorded in events {
        let event = recorded.event().unwrap();
        let Subject::Deployment(_, _, id) = recorded.subject else {
            continue;
        };
        let folded = states.entry(id).or_default();
        let before = folded.state.as_ref().map(|s| s.status);
        folded.apply(recorded.position, &event).unwrap();
        let state = folded.state.as_ref().unwrap();
        if state.status == Status::Cancelled {
            assert_eq!(
                before,
                Some(Status::Requested),
                "{id} was superseded while it ran"
            );
        }
        let instance = state.request.instance.clone();
        if state.status.holds_instance() {
            let holder = *running.entry(instance).or_insert(id);
            assert_eq!(holder, id, "two of an instance are in the pipeline");
        } else if running.get(&instance) == Some(&id) {
            running.remove(&instance);
        }
    }
    assert_eq!(states.len(), all.len());
    world.stop().await;
    for queue in queues {
        queue.await.unwrap();
    }
}

/// Real repositories. A deployment's commit is made, and the answer is lost: as if whoever made it
/// had died before recording it. What comes next waits until it is let go on.
#[derive(Debug)]
struct LostAnswer {
    real: GitopsRepositories,
    is_lost: AtomicBool,
    made: Semaphore,
    goes_on: Semaphore,
}

#[async_trait]
impl Repositories for LostAnswer {
    async fn commit(
        &self,
        project: &ProjectName,
        change: GitopsChange,
    ) -> Result<GitopsCommit, StepError> {
        let is_deploy = matches!(change.change, Change::Deploy { .. });
        let done = self.real.commit(project, change).await?;
        if is_deploy && !self.is_lost.swap(true, SeqCst) {
            self.made.add_permits(1);
            self.goes_on.acquire().await.unwrap().forget();
            return Err(StepError::passing("lost", "the answer was lost", ""));
        }
        Ok(done)
    }
    async fn ensure(
        &self,
        project: &ProjectName,
    ) -> Result<(String, daybook_events::CommitId), StepError> {
        self.real.ensure(project).await
    }
    async fn find(
        &self,
        project: &ProjectName,
        cause: EventId,
        signers: Vec<String>,
    ) -> Result<Option<GitopsCommit>, StepError> {
        self.real.find(project, cause, signers).await
    }
    fn signer(&self) -> Result<Option<daybook_events::gitops::SignerAdded>, StepError> {
        self.real.signer()
    }
    async fn revert(
        &self,
        project: &ProjectName,
        revert: GitopsRevert,
    ) -> Result<GitopsReverted, StepError> {
        self.real.revert(project, revert).await
    }
    async fn survey(
        &self,
        project: &ProjectName,
        request: survey::Request,
    ) -> Result<survey::Survey, StepError> {
        self.real.survey(project, request).await
    }
    async fn read(
        &self,
        project: &ProjectName,
        environment: &EnvironmentName,
        commit: &daybook_events::CommitId,
    ) -> Result<EnvironmentValues, StepError> {
        self.real.read(project, environment, commit).await
    }
    async fn has_remote(&self, project: &ProjectName) -> Result<bool, StepError> {
        self.real.has_remote(project).await
    }
}

fn losing_an_answer(folder: &Path) -> (Ports, Arc<LostAnswer>) {
    let repositories = Arc::new(LostAnswer {
        real: GitopsRepositories::new(
            folder.join("gitops"),
            HashMap::new(),
            GitTransport::new(TransportConfig::default()),
        ),
        is_lost: AtomicBool::new(false),
        made: Semaphore::new(0),
        goes_on: Semaphore::new(0),
    });
    let ports = Ports {
        repositories: repositories.clone(),
        ..Ports::default()
    };
    (ports, repositories)
}

/// What the ledger says of the repository, oldest first.
async fn commits(world: &World) -> Vec<(daybook_events::CommitId, Change)> {
    let subject = Subject::Gitops(instance().project);
    let events = world.ledger.log().read_aggregate(&subject).await.unwrap();
    let payloads = events
        .iter()
        .map(|r| r.event().unwrap().payload::<GitopsEvent>().unwrap());
    payloads
        .filter_map(|e| match e {
            GitopsEvent::Committed(e) => Some((e.commit, e.change)),
            _ => None,
        })
        .collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_commit_that_nobody_recorded_is_taken_out_when_its_deployment_is_cancelled() {
    let dir = tempfile::tempdir().unwrap();
    let (ports, repositories) = losing_an_answer(dir.path());
    let world = World::start(dir.path(), &ports).await;
    world.prepare().await;
    let id = world.request("main", SwitchMode::Automatic).await;
    repositories.made.acquire().await.unwrap().forget();
    let cancel = DeploymentEvent::CancelRequested(CancelRequested { reason: None });
    world.apply(id, cancel).await;
    world.reach(id, Status::Cancelled).await;
    assert_eq!(commits(&world).await, []);
    repositories.goes_on.add_permits(1);

    let project = instance().project;
    let projections = world.ledger.projections();
    let mut changes = projections.changes();
    let taken_out = async {
        loop {
            let state = projections.gitops(&project).unwrap().unwrap();
            if state.commits == 3 {
                return state;
            }
            changes.changed().await.unwrap();
        }
    };
    let state = tokio::time::timeout(Duration::from_secs(60), taken_out).await;
    let state = state.expect("the release is taken out again");
    assert!(!state.releases.contains_key(&id));
    let recorded = commits(&world).await;
    assert!(matches!(recorded[0].1, Change::Deploy { deployment, .. } if deployment == id));
    assert!(matches!(recorded[1].1, Change::Remove { deployment, .. } if deployment == id));
    // The repository says the same, and each thing once.
    let real = repositories.real.open(&project).await.unwrap();
    let log = real.log(None, 9).await.unwrap();
    let listed: Vec<_> = log.iter().skip(1).map(|c| c.commit.clone()).collect();
    let expected: Vec<_> = recorded.into_iter().map(|(commit, _)| commit).collect();
    assert_eq!(listed, expected);
    let head = real.head().await.unwrap();
    let values = real.read_environment(&head, &instance().environment).await;
    assert!(
        values.unwrap().services[&instance().service]
            .releases
            .is_empty()
    );
    world.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_commit_that_nobody_recorded_goes_on_when_its_environment_is_frozen() {
    let dir = tempfile::tempdir().unwrap();
    let (ports, repositories) = losing_an_answer(dir.path());
    let world = World::start(dir.path(), &ports).await;
    world.prepare().await;
    let id = world.request("main", SwitchMode::Automatic).await;
    repositories.made.acquire().await.unwrap().forget();
    // It was allowed when it was committed.
    let set = EnvironmentEvent::FreezeSet(FreezeSet {
        name: "stop".parse().unwrap(),
        freeze: Freeze {
            rule: FreezeRule::Once(OneOff {
                from: "2020-01-01T00:00".parse().unwrap(),
                until: None,
                zone: Default::default(),
            }),
            reason: None,
        },
    });
    let i = instance();
    let subject = Subject::Environment(i.project.clone(), i.environment);
    let context = world.context();
    let frozen = world
        .ledger
        .execute::<Environment>(&subject, &context, |s| environment::decide(s, set.clone()))
        .await
        .unwrap();
    let frozen = frozen.position().unwrap();
    let projections = world.ledger.projections();
    projections
        .wait_for(frozen, Duration::from_secs(60))
        .await
        .unwrap();
    repositories.goes_on.add_permits(1);
    world.reach(id, Status::Started).await;
    let kinds = world.kinds_of(id).await;
    assert!(
        !kinds.iter().any(|k| k == "deployment.held.v1"),
        "{kinds:?}"
    );
    assert_eq!(commits(&world).await.len(), 1);
    // The next one waits.
    let next = world.request("next", SwitchMode::Automatic).await;
    let mut changes = projections.changes();
    let held = async {
        while projections
            .deployment(next)
            .unwrap()
            .is_none_or(|row| row.state.held().is_none())
        {
            changes.changed().await.unwrap();
        }
    };
    tokio::time::timeout(Duration::from_secs(60), held)
        .await
        .expect("the next one is held");
    world.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn deployments_of_one_project_are_committed_side_by_side_and_recorded_in_order() {
    const SERVICES: usize = 12;
    let dir = tempfile::tempdir().unwrap();
    let repositories = Arc::new(GitopsRepositories::new(
        dir.path().join("gitops"),
        HashMap::new(),
        GitTransport::new(TransportConfig::default()),
    ));
    let ports = Ports {
        repositories: repositories.clone(),
        ..Ports::default()
    };
    let world = World::start(dir.path(), &ports).await;
    world.prepare().await;
    let mut all = Vec::new();
    for n in 0..SERVICES {
        let instance = InstanceRef {
            service: format!("web-{n}").parse().unwrap(),
            ..instance()
        };
        let version = of_git(&format!("v{n}"));
        all.push(
            world
                .request_of(instance, version, SwitchMode::Automatic)
                .await,
        );
    }
    for id in &all {
        world.reach(*id, Status::Started).await;
    }
    let recorded: Vec<_> = commits(&world).await.into_iter().map(|(c, _)| c).collect();
    let real = repositories.open(&instance().project).await.unwrap();
    let log = real.log(None, 99).await.unwrap();
    let listed: Vec<_> = log.into_iter().skip(1).map(|c| c.commit).collect();
    assert_eq!(recorded, listed);
    assert_eq!(listed.len(), SERVICES);
    world.stop().await;
}
