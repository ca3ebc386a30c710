//! What a deployment costs whose build and sync do nothing: from its request to its success, with
//! every step an event on the embedded log.

use std::collections::HashMap;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use daybook_events::deployment::{
    self, Deployment, DeploymentEvent, Requested, Status, SwitchMode, Version,
};
use daybook_events::lines::LineLog;
use daybook_events::project::{self, Project, ProjectEvent};
use daybook_events::spec::{BuildSpec, RunSpec};
use daybook_events::{
    Actor, ClusterName, Context, DeploymentId, EventId, GitRef, Hostname, InstanceRef, Position,
    ProjectName, ServiceName, Subject, SubjectFilter,
};
use daybook_projections::{Ledger, Projections};
use daybook_store::embedded::{EmbeddedLines, LineRetention};
use daybook_workers::crew::Crew;
use daybook_workers::driver::DriverOptions;
use daybook_workers::gateway::Gateway;
use daybook_workers::idle::{IdleImages, IdleRepositories, IdleSources, IdleTarget};
use daybook_workers::pipeline::{Bench, Settings};
use futures_util::StreamExt;
use jiff::Timestamp;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use crate::report::{Comparison, Report};
use crate::{Failure, logs, temporary_folder};

/// From request to success, at the median, in milliseconds: what is promised with one in flight.
const PROMISED_MS: f64 = 30.0;

#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// Deployments in each round
    #[arg(long, default_value_t = 100)]
    deployments: usize,
    /// Rounds; the median of their medians counts
    #[arg(long, default_value_t = 5)]
    rounds: usize,
    /// How many are under way at once
    #[arg(long, value_delimiter = ',', default_values_t = [1, 64])]
    in_flight: Vec<usize>,
    /// Also print when each event of a deployment is appended, at the median
    #[arg(long)]
    events: bool,
    /// Where the log is kept meanwhile
    #[arg(long)]
    folder: Option<std::path::PathBuf>,
}

pub(crate) async fn run(options: Options) -> Result<Report, Failure> {
    let folder = temporary_folder(options.folder.as_deref())?;
    let world = World::start(folder.path()).await?;
    // Warm-up: files, caches, the first table of the project.
    world.round(20, 1).await?;
    let mut comparisons = Vec::new();
    for &in_flight in &options.in_flight {
        let (mut medians, mut p99s, mut rates) = (Vec::new(), Vec::new(), Vec::new());
        let before = world.ledger.projections().position();
        for _ in 0..options.rounds {
            let begun = Instant::now();
            let mut latencies = world.round(options.deployments, in_flight).await?;
            rates.push(options.deployments as f64 / begun.elapsed().as_secs_f64());
            latencies.sort_by(f64::total_cmp);
            medians.push(latencies[latencies.len() / 2]);
            p99s.push(latencies[(latencies.len() * 99 / 100).min(latencies.len() - 1)]);
        }
        if options.events {
            world.print_events(before, in_flight).await?;
        }
        let subject = format!(
            "embedded, {in_flight} in flight (p50 {:.1} ms, p99 {:.1} ms, {:.0} deployments/s)",
            middle(&medians),
            middle(&p99s),
            middle(&rates)
        );
        comparisons.push(Comparison {
            subject,
            yardstick: "30 ms a deployment",
            measured: medians.iter().map(|ms| 1000.0 / ms).collect(),
            against: medians.iter().map(|_| 1000.0 / PROMISED_MS).collect(),
            limit: (in_flight == 1).then_some(1.0),
        });
    }
    world.stop().await;
    Ok(Report {
        title: "Deployments whose build and sync do nothing: one after the other, by the time of the median one"
            .to_owned(),
        unit: "deployments/s",
        notes: Vec::new(),
        comparisons,
    })
}

fn middle(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted[sorted.len() / 2]
}

pub(crate) struct World {
    ledger: Ledger,
    crew: Crew,
    cancel: CancellationToken,
    runner: tokio::task::JoinHandle<()>,
    cluster: ClusterName,
}

impl World {
    async fn start(folder: &Path) -> Result<Self, Failure> {
        let world = Self::open(folder).await?;
        world.work().await?;
        Ok(world)
    }

    /// Everything but the workers.
    pub(crate) async fn open(folder: &Path) -> Result<Self, Failure> {
        let log = logs::embedded(&folder.join("log")).await?;
        let lines: Arc<dyn LineLog> =
            Arc::new(EmbeddedLines::open(folder.join("lines"), LineRetention::default()).await?);
        let projections = Projections::open(&folder.join("projections"))?;
        let cancel = CancellationToken::new();
        let runner = {
            let (projections, log, cancel) = (projections.clone(), log.clone(), cancel.clone());
            tokio::spawn(async move {
                if let Err(error) = daybook_projections::runner::run(projections, log, cancel).await
                {
                    eprintln!("the projections ended: {error}");
                }
            })
        };
        let ledger = Ledger::new(log, projections);
        let bench = Bench {
            ledger: ledger.clone(),
            lines,
            secrets: Arc::new(daybook_secrets::NoSecrets),
            settings: Arc::new(Settings {
                worker: "bench".into(),
                domain: Hostname::parse("localhost")?,
                image_prefix: "registry.example/daybook".into(),
                scratch: folder.join("scratch"),
                gateway_url: None,
                builds: 64,
                keep_old: daybook_events::timer::KeepFor::Never,
            }),
        };
        let crew = Crew::new(bench, DriverOptions::default(), cancel.clone());
        let cluster = ClusterName::parse("local-a")?;
        // Only the environments of projects that exist are looked after.
        let name = ProjectName::parse("bench")?;
        let created = ProjectEvent::Created(project::Created {
            name: name.clone(),
            description: None,
        });
        let context = context(Uuid::now_v7());
        ledger
            .execute::<Project>(&Subject::Project(name), &context, |s| {
                project::decide(s, created.clone())
            })
            .await?;
        Ok(Self {
            ledger,
            crew,
            cancel,
            runner,
            cluster,
        })
    }

    /// The workers begin.
    pub(crate) async fn work(&self) -> Result<(), Failure> {
        let repositories = Arc::new(IdleRepositories::default());
        let target = Arc::new(IdleTarget::new(self.cluster.clone()));
        self.crew.build(Arc::new(IdleSources), Arc::new(IdleImages));
        self.crew.package(repositories.clone());
        self.crew.sync(repositories, target);
        self.crew.route();
        let gateway = Gateway::bind(([127, 0, 0, 1], 0).into()).await?;
        self.crew.gateway(gateway, "local");
        Ok(())
    }

    pub(crate) async fn stop(self) {
        self.cancel.cancel();
        self.crew.ended().await;
        let _ = self.runner.await;
    }

    /// Deploys so many, each to an instance of its own, and returns what each took in milliseconds.
    async fn round(&self, deployments: usize, in_flight: usize) -> Result<Vec<f64>, Failure> {
        let mut taken = Vec::with_capacity(deployments);
        let mut running = futures_util::stream::iter(0..deployments)
            .map(|_| self.deploy())
            .buffer_unordered(in_flight);
        while let Some(one) = running.next().await {
            taken.push(one?.as_secs_f64() * 1000.0);
        }
        Ok(taken)
    }

    /// Prints how long after its request each event of a deployment is stored, at the median.
    async fn print_events(&self, after: Position, in_flight: usize) -> Result<(), Failure> {
        let all = SubjectFilter::default();
        let events = self.ledger.log().read(after, &all, usize::MAX).await?;
        let mut requested = HashMap::new();
        let mut delays = HashMap::<String, Vec<f64>>::new();
        for recorded in &events {
            let event = recorded.event()?;
            let kind = event.short_kind().to_owned();
            if kind == "deployment.requested.v1" {
                requested.insert(event.correlationid, recorded.stored_at);
            }
            if let Some(begun) = requested.get(&event.correlationid) {
                let delay = recorded.stored_at.duration_since(*begun).as_secs_f64();
                delays.entry(kind).or_default().push(delay * 1000.0);
            }
        }
        let mut delays: Vec<_> = delays
            .iter()
            .map(|(kind, all)| (middle(all), kind))
            .collect();
        delays.sort_by(|a, b| a.0.total_cmp(&b.0));
        eprintln!("{in_flight} in flight, ms after the request:");
        for (delay, kind) in delays {
            eprintln!("{delay:8.1}  {kind}");
        }
        Ok(())
    }

    async fn deploy(&self) -> Result<Duration, Failure> {
        let begun = Instant::now();
        let service = format!("s{}", &Uuid::new_v4().simple().to_string()[..8]);
        let subject = self.request(&service, 1).await?;
        match self.settled(&subject).await? {
            Status::Started => Ok(begun.elapsed()),
            other => Err(format!("{subject} is {}", other.as_str()).into()),
        }
    }

    /// Asks for a deployment of a service, with a commit of its own.
    pub(crate) async fn request(&self, service: &str, replicas: u32) -> Result<Subject, Failure> {
        let id = DeploymentId(Uuid::now_v7());
        let mut instance: InstanceRef = "bench.production.service".parse()?;
        instance.service = ServiceName::parse(service)?;
        let subject =
            Subject::Deployment(instance.project.clone(), instance.environment.clone(), id);
        let event = DeploymentEvent::Requested(Box::new(Requested {
            instance,
            version: Version::Git {
                url: "https://example.com/service.git".parse()?,
                git_ref: GitRef::parse(id.to_string())?,
                path: String::new(),
            },
            clusters: vec![self.cluster.clone()],
            build: BuildSpec::default(),
            image_repository: None,
            run: RunSpec {
                replicas,
                ..RunSpec::default()
            },
            switch: SwitchMode::Automatic,
            reason: None,
            redeploy_of: None,
            promoted_from: None,
            allow_partial: false,
            config: Default::default(),
            secrets: std::collections::BTreeMap::new(),
        }));
        let context = context(id.0);
        self.ledger
            .execute::<Deployment>(&subject, &context, |s| deployment::decide(s, event.clone()))
            .await?;
        Ok(subject)
    }

    /// Waits until a deployment has come to an end, and says to which.
    pub(crate) async fn settled(&self, subject: &Subject) -> Result<Status, Failure> {
        let mut changes = self.ledger.projections().changes();
        loop {
            let status = self
                .ledger
                .projections()
                .shared::<Deployment>(subject)?
                .state
                .as_ref()
                .map(|s| s.status);
            match status {
                Some(status) if status.is_settled() => return Ok(status),
                _ => changes.changed().await?,
            }
        }
    }
}

fn context(correlation: Uuid) -> Context {
    Context {
        id: EventId(Uuid::now_v7()),
        time: Timestamp::now(),
        correlation,
        causation: None,
        actor: Actor::system("bench"),
        traceparent: None,
        request_digest: None,
    }
}
