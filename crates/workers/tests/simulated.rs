//! The real driver and the real pipeline in two processes, on a log that misbehaves as brokers do,
//! with ports that do nothing, while requests come in and processes are killed: everything ends, and
//! everything counts once.
//!
//! A case is drawn by proptest. CI draws a few dozen;
//! `PROPTEST_CASES=5000 cargo test -p daybook-workers --test simulated` draws more.
#![allow(clippy::unwrap_used)]

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::Arc;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use daybook_events::deployment::{
    self, CancelRequested, Deployment, DeploymentEvent, OperationRequested, Requested, Status,
    SwitchMode, Version,
};
use daybook_events::environment::{self, Environment, EnvironmentEvent, EnvironmentSpec};
use daybook_events::gitops::GitopsEvent;
use daybook_events::project::{self, Project, ProjectEvent};
use daybook_events::simulated::{SimulatedLog, Weather};
use daybook_events::spec::{BuildSpec, RunSpec};
use daybook_events::{
    Actor, Aggregate, ClusterName, Context, Decision, DeploymentId, EventId, EventLog, Folded,
    GitRef, Hostname, InstanceRef, Position, Recorded, Refusal, Subject, SubjectFilter,
};
use daybook_projections::{Ledger, Projections, replay, runner};
use daybook_store::embedded::{EmbeddedLines, LineRetention};
use daybook_workers::crew::Crew;
use daybook_workers::driver::DriverOptions;
use daybook_workers::gateway::Gateway;
use daybook_workers::idle::{IdleImages, IdleRepositories, IdleSources, IdleTarget};
use daybook_workers::pipeline::{Bench, Settings};
use jiff::Timestamp;
use proptest::prelude::*;
use proptest::strategy::ValueTree;
use proptest::test_runner::TestRunner;
use tokio::runtime::Runtime;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

/// How many cases there are, unless the environment says otherwise.
const CASES: u32 = 96;
/// So many at once: they mostly wait.
const AT_ONCE: usize = 8;
const PATIENCE: Duration = Duration::from_secs(60);

/// What somebody does next.
#[derive(Debug, Clone)]
enum Op {
    Deploy(u8),
    Cancel(u8),
    Stop(u8),
    Start(u8),
    Terminate(u8),
    /// A process dies, and another one is started in its place.
    Kill(bool),
    Rest(u8),
}

#[derive(Debug, Clone)]
struct Case {
    seed: u64,
    ops: Vec<Op>,
}

fn cases() -> impl Strategy<Value = Case> {
    let op = prop_oneof![
        4 => any::<u8>().prop_map(Op::Deploy),
        1 => any::<u8>().prop_map(Op::Cancel),
        1 => any::<u8>().prop_map(Op::Stop),
        1 => any::<u8>().prop_map(Op::Start),
        1 => any::<u8>().prop_map(Op::Terminate),
        1 => any::<bool>().prop_map(Op::Kill),
        4 => any::<u8>().prop_map(Op::Rest),
    ];
    let ops = prop::collection::vec(op, 6..18);
    (any::<u64>(), ops).prop_map(|(seed, ops)| Case { seed, ops })
}

fn instance(number: u8) -> InstanceRef {
    let service = number % 2;
    format!("shop.production.web-{service}").parse().unwrap()
}

/// What outlives every process.
struct Outside {
    log: SimulatedLog,
    repositories: Arc<IdleRepositories>,
    target: Arc<IdleTarget>,
    dir: tempfile::TempDir,
}

/// One process: a runtime of its own, so that dropping it ends everything in the middle.
struct Process {
    runtime: Option<Runtime>,
    ledger: Ledger,
}

impl Process {
    fn start(outside: &Outside, worker: Option<&str>) -> Self {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
            .unwrap();
        let log: Arc<dyn EventLog> = Arc::new(outside.log.clone());
        let projections = Projections::in_memory();
        let cancel = CancellationToken::new();
        runtime.spawn(runner::run(
            projections.clone(),
            log.clone(),
            cancel.clone(),
        ));
        let ledger = Ledger::new(log, projections);
        if let Some(name) = worker {
            let lines = outside.dir.path().join(Uuid::now_v7().to_string());
            runtime.block_on(hire(outside, &ledger, name, &lines, cancel));
        }
        Self {
            runtime: Some(runtime),
            ledger,
        }
    }

    /// Carries out a command, again and again until it is known what came of it.
    fn execute<A: Aggregate>(
        &self,
        subject: &Subject,
        correlation: Uuid,
        decide: impl Fn(Option<&A>) -> Result<Decision<A::Event>, Refusal> + Send + Sync,
    ) {
        let context = Context {
            id: EventId(Uuid::now_v7()),
            time: Timestamp::now(),
            correlation,
            causation: None,
            actor: Actor::system("test"),
            traceparent: None,
            request_digest: None,
        };
        let until = Instant::now() + PATIENCE;
        let runtime = self.runtime.as_ref().unwrap();
        while let Err(error) =
            runtime.block_on(self.ledger.execute::<A>(subject, &context, &decide))
        {
            if !error.is_retryable() {
                return;
            }
            assert!(Instant::now() < until, "{error:?}");
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

async fn hire(
    outside: &Outside,
    ledger: &Ledger,
    name: &str,
    lines: &Path,
    cancel: CancellationToken,
) {
    let lines = EmbeddedLines::open(lines, LineRetention::default());
    let bench = Bench {
        ledger: ledger.clone(),
        lines: Arc::new(lines.await.unwrap()),
        secrets: Arc::new(daybook_secrets::NoSecrets),
        settings: Arc::new(Settings {
            worker: name.to_owned(),
            domain: Hostname::parse("localhost").unwrap(),
            image_prefix: "registry.example/daybook".into(),
            scratch: outside.dir.path().join(format!("scratch-{name}")),
            gateway_url: None,
            builds: 2,
            keep_old: daybook_events::timer::KeepFor::Never,
        }),
    };
    let options = DriverOptions {
        ack_wait: Duration::from_millis(300),
        ..DriverOptions::default()
    };
    let crew = Crew::new(bench, options, cancel);
    crew.build(Arc::new(IdleSources), Arc::new(IdleImages));
    crew.package(outside.repositories.clone());
    crew.route();
    if name == "one" {
        crew.sync(outside.repositories.clone(), outside.target.clone());
        let gateway = Gateway::bind(([127, 0, 0, 1], 0).into()).await.unwrap();
        crew.gateway(gateway, "local");
    }
}

fn prepare(client: &Process) {
    let of = instance(0);
    let created = ProjectEvent::Created(project::Created {
        name: of.project.clone(),
        description: None,
    });
    let subject = Subject::Project(of.project.clone());
    client.execute::<Project>(&subject, Uuid::now_v7(), |s| {
        project::decide(s, created.clone())
    });
    let created = EnvironmentEvent::Created(environment::Created {
        project: of.project.clone(),
        name: of.environment.clone(),
        spec: EnvironmentSpec {
            clusters: vec![ClusterName::parse("local-a").unwrap()],
            live: true,
            ..EnvironmentSpec::default()
        },
        from: None,
        auto_deploy: None,
    });
    let subject = Subject::Environment(of.project.clone(), of.environment);
    client.execute::<Environment>(&subject, Uuid::now_v7(), |s| {
        environment::decide(s, created.clone())
    });
}

fn request(client: &Process, id: DeploymentId, event: &DeploymentEvent) {
    let of = instance(0);
    let subject = Subject::Deployment(of.project, of.environment, id);
    client.execute::<Deployment>(&subject, id.0, |s| deployment::decide(s, event.clone()));
}

fn deploy(client: &Process, number: u8) -> DeploymentId {
    let id = DeploymentId(Uuid::now_v7());
    let requested = Requested {
        instance: instance(number),
        version: Version::Git {
            url: "https://example.com/shop.git".parse().unwrap(),
            git_ref: GitRef::parse(format!("v{}", number % 5)).unwrap(),
            path: String::new(),
        },
        clusters: vec![ClusterName::parse("local-a").unwrap()],
        build: BuildSpec::default(),
        image_repository: None,
        run: RunSpec::default(),
        switch: SwitchMode::Automatic,
        reason: None,
        redeploy_of: None,
        secrets: BTreeMap::new(),
        promoted_from: None,
        allow_partial: false,
        config: Default::default(),
    };
    request(client, id, &DeploymentEvent::Requested(Box::new(requested)));
    id
}

fn asked() -> OperationRequested {
    OperationRequested::default()
}

fn carry_out(case: &Case) -> Result<(), String> {
    let outside = Outside {
        log: SimulatedLog::new(case.seed, Weather::STORM),
        repositories: Arc::default(),
        target: Arc::new(IdleTarget::new(ClusterName::parse("local-a").unwrap())),
        dir: tempfile::tempdir().unwrap(),
    };
    let client = Process::start(&outside, None);
    let start = |one: bool| Process::start(&outside, Some(if one { "one" } else { "two" }));
    let mut workers = BTreeMap::from([(true, start(true)), (false, start(false))]);
    prepare(&client);
    let mut made = Vec::new();
    for op in &case.ops {
        let (number, event) = match op {
            Op::Deploy(number) => {
                made.push(deploy(&client, *number));
                continue;
            }
            Op::Rest(number) => {
                std::thread::sleep(Duration::from_millis(u64::from(*number)));
                continue;
            }
            Op::Kill(one) => {
                workers.remove(one);
                workers.insert(*one, start(*one));
                continue;
            }
            Op::Cancel(number) => {
                let asked = CancelRequested { reason: None };
                (number, DeploymentEvent::CancelRequested(asked))
            }
            Op::Stop(number) => (number, DeploymentEvent::StopRequested(asked())),
            Op::Start(number) => (number, DeploymentEvent::StartRequested(asked())),
            Op::Terminate(number) => (number, DeploymentEvent::TerminateRequested(asked())),
        };
        if let Some(id) = made.get(usize::from(*number) % made.len().max(1)) {
            request(&client, *id, &event);
        }
    }
    outside.log.set_weather(Weather::CALM);
    settle(&client, &made)?;
    judge(&outside, &client, &made)
}

/// Waits until nothing is under way any more.
fn settle(client: &Process, made: &[DeploymentId]) -> Result<(), String> {
    let until = Instant::now() + PATIENCE;
    let at_rest = |status: Status| {
        use Status::{Cancelled, Deleted, Failed, Started, Stopped, Terminated};
        [Started, Stopped, Terminated, Failed, Cancelled, Deleted].contains(&status)
    };
    loop {
        let rows = made.iter().map(|id| {
            let row = client.ledger.projections().deployment(*id).unwrap();
            (*id, row.map(|row| row.state.status))
        });
        let under_way: Vec<_> = rows.filter(|(_, s)| !s.is_some_and(at_rest)).collect();
        // A route is withdrawn after its deployment has ended.
        let misled = misled(client);
        if under_way.is_empty() && misled.is_none() {
            return Ok(());
        }
        if Instant::now() > until {
            return Err(format!("these never end: {under_way:?}, {misled:?}"));
        }
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// A deployment that has the traffic and is not there.
fn misled(client: &Process) -> Option<(DeploymentId, Status)> {
    let projections = client.ledger.projections();
    let routing = projections.routing(&instance(0).project).unwrap()?;
    let mut mains = (0..2).filter_map(|number| routing.traffic(&instance(number))?.main);
    mains.find_map(|main| {
        let status = projections.deployment(main).unwrap().unwrap().state.status;
        (!matches!(status, Status::Started | Status::Stopped)).then_some((main, status))
    })
}

/// At no position of the log are two deployments of an instance in the pipeline.
fn one_at_a_time(all: &[Recorded]) -> Result<(), String> {
    let mut folds = BTreeMap::<DeploymentId, Folded<Deployment>>::new();
    let mut running = BTreeMap::<InstanceRef, DeploymentId>::new();
    for recorded in all {
        let Subject::Deployment(_, _, id) = recorded.subject else {
            continue;
        };
        let folded = folds.entry(id).or_default();
        // What does not count changes nothing.
        let _ = folded.apply(recorded.position, &recorded.event().unwrap());
        let Some(state) = &folded.state else { continue };
        let instance = &state.request.instance;
        match running.get(instance) {
            Some(holder) if *holder != id && state.status.holds_instance() => {
                return Err(format!("{holder} and {id} of {instance} run at once"));
            }
            Some(holder) if *holder == id && !state.status.holds_instance() => {
                running.remove(instance);
            }
            None if state.status.holds_instance() => {
                running.insert(instance.clone(), id);
            }
            _ => {}
        }
    }
    Ok(())
}

fn judge(outside: &Outside, client: &Process, made: &[DeploymentId]) -> Result<(), String> {
    let runtime = client.runtime.as_ref().unwrap();
    let everything = SubjectFilter::default();
    let read = outside.log.read(Position::ZERO, &everything, usize::MAX);
    let all = runtime.block_on(read).unwrap();
    // Every commit of the repository is recorded once, and so is every cause of one.
    let subject = Subject::Gitops(instance(0).project);
    let mut gitops = Folded::<daybook_events::gitops::Gitops>::default();
    let (mut causes, mut commits) = (BTreeSet::new(), BTreeSet::new());
    for recorded in all.iter().filter(|r| r.subject == subject) {
        let event = recorded.event().unwrap();
        if gitops.apply(recorded.position, &event).is_err() {
            continue;
        }
        if let Ok(GitopsEvent::Committed(made)) = event.payload::<GitopsEvent>()
            && !(causes.insert(made.cause) && commits.insert(made.commit.clone()))
        {
            return Err(format!("{} was recorded twice", made.commit));
        }
    }
    one_at_a_time(&all)?;
    let projections = client.ledger.projections();
    for id in made {
        let subject = Subject::Deployment(instance(0).project, instance(0).environment, *id);
        let mut folded = Folded::<Deployment>::default();
        let mut once = BTreeSet::new();
        for recorded in all.iter().filter(|r| r.subject == subject) {
            let event = recorded.event().unwrap();
            let counted = folded.apply(recorded.position, &event).is_ok();
            let step = event.short_kind().to_owned();
            let single = ["queued", "image_pinned", "deploying_started", "succeeded"];
            if counted
                && single.iter().any(|s| step == format!("deployment.{s}.v1"))
                && !once.insert(step.clone())
            {
                return Err(format!("{step} of {id} counts twice"));
            }
        }
    }
    let port: Arc<dyn EventLog> = Arc::new(outside.log.clone());
    let at = projections.position();
    let expected = runtime.block_on(replay::state_at(&port, at)).unwrap();
    if projections.position() == at && projections.digest().unwrap() != expected.digest().unwrap() {
        return Err("the projections are not what the log folds to".to_owned());
    }
    Ok(())
}

#[test]
fn everything_ends_and_counts_once_whatever_the_log_does() {
    let config = ProptestConfig::default();
    let asked = std::env::var_os("PROPTEST_CASES").is_some();
    let number = if asked { config.cases } else { CASES };
    let mut runner = TestRunner::new(config);
    let drawn = (0..number).map(|_| cases().new_tree(&mut runner).unwrap().current());
    let left = Mutex::new(drawn.collect::<Vec<Case>>());
    let wrong = Mutex::new(Vec::new());
    std::thread::scope(|scope| {
        for _ in 0..AT_ONCE {
            scope.spawn(|| {
                loop {
                    let Some(case) = left.lock().unwrap().pop() else {
                        return;
                    };
                    if let Err(why) = carry_out(&case) {
                        wrong.lock().unwrap().push(format!("{why}: {case:?}"));
                    }
                }
            });
        }
    });
    let wrong = wrong.into_inner().unwrap();
    assert!(wrong.is_empty(), "{} of {number}: {wrong:#?}", wrong.len());
}
