//! Starts the workers that a process takes on, and ends them together.

use std::sync::{Arc, PoisonError};
use std::time::Duration;

use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::charts::Charts;
use crate::driver::{self, DriverOptions, Worker};
use crate::endpoint_checks::EndpointChecks;
use crate::gateway::Gateway;
use crate::notify::cdevents::CdeventsWorker;
use crate::notify::{self, Bulletin, NotifyOptions, Office, Proofs};
use crate::pipeline::build::Builds;
use crate::pipeline::domains::Domains;
use crate::pipeline::endpoints::Gateways;
use crate::pipeline::environment::{EnvironmentEnds, Environments};
use crate::pipeline::follow::{FollowBuild, FollowDeployment};
use crate::pipeline::foreign::{self, Decisions, Nudge};
use crate::pipeline::freeze::Freezes;
use crate::pipeline::order::Order;
use crate::pipeline::package::Package;
use crate::pipeline::previews::{Previews, Pushes};
use crate::pipeline::probe::{Probe, ProbeDeployment, ProbeRoutes};
use crate::pipeline::retry::Retry;
use crate::pipeline::route::{Deadlines, Route, RouteApplied};
use crate::pipeline::source::Source;
use crate::pipeline::sync::Sync;
use crate::pipeline::{
    Bench, activity, approvals, cluster_gateway, endpoints, gateway, observe, queue, timers,
};
use crate::ports::{Images, Repositories, Sources};
use crate::target::Target;

/// The workers of one process.
#[derive(Debug)]
pub struct Crew {
    bench: Bench,
    options: DriverOptions,
    cancel: CancellationToken,
    tasks: TaskTracker,
    charts: Option<Arc<dyn Charts>>,
    /// The clusters with a Gateway that are looked after here.
    gateways: Gateways,
}

impl Crew {
    /// A crew without workers yet.
    pub fn new(bench: Bench, options: DriverOptions, cancel: CancellationToken) -> Self {
        Self {
            bench,
            options,
            cancel,
            tasks: TaskTracker::new(),
            charts: None,
            gateways: Gateways::default(),
        }
    }

    /// The same crew, which can deploy charts. To be said before any worker is started.
    pub fn with_charts(mut self, charts: Arc<dyn Charts>) -> Self {
        self.charts = Some(charts);
        self
    }

    /// What its workers share.
    pub fn bench(&self) -> &Bench {
        &self.bench
    }

    fn hire(&self, worker: impl Worker) {
        self.tasks.spawn(driver::run(
            Arc::new(worker),
            self.bench.ledger.log().clone(),
            self.bench.ledger.projections().clone(),
            self.options.clone(),
            self.cancel.clone(),
        ));
    }

    /// Resolves sources, runs builds, and tells deployments of them.
    pub fn build(&self, sources: Arc<dyn Sources>, images: Arc<dyn Images>) {
        self.hire(Previews {
            bench: self.bench.clone(),
            sources: sources.clone(),
        });
        self.hire(Pushes {
            bench: self.bench.clone(),
            sources: sources.clone(),
        });
        self.hire(Source {
            bench: self.bench.clone(),
            sources: sources.clone(),
            images: images.clone(),
            charts: self.charts.clone(),
        });
        self.hire(Builds {
            bench: self.bench.clone(),
            sources,
            images,
        });
        self.hire(FollowBuild(self.bench.clone()));
        self.hire(FollowDeployment(self.bench.clone()));
    }

    /// Makes GitOps commits, and looks every 15 seconds for those of others.
    pub fn package(&self, repositories: Arc<dyn Repositories>) {
        self.package_watching(repositories, Duration::from_secs(15));
    }

    /// The same, looking this often.
    pub fn package_watching(&self, repositories: Arc<dyn Repositories>, every: Duration) {
        let package = Package {
            bench: self.bench.clone(),
            repositories,
            charts: self.charts.clone(),
            nudge: Nudge::default(),
            order: Order::default(),
        };
        self.hire(Decisions(package.clone()));
        self.hire(approvals::Decisions(self.bench.clone()));
        for kind in approvals::CAUSES {
            self.hire(approvals::Plans(self.bench.clone(), kind));
        }
        self.hire(Environments(package.clone()));
        self.hire(EnvironmentEnds(package.clone()));
        self.hire(package.clone());
        self.tasks
            .spawn(foreign::watch(package, every, self.cancel.clone()));
    }

    /// Looks after a cluster.
    pub fn sync(&self, repositories: Arc<dyn Repositories>, target: Arc<dyn Target>) {
        if target.has_gateway() {
            let mut gateways = self.gateways.lock().unwrap_or_else(PoisonError::into_inner);
            gateways.push(target.clone());
        }
        let sync = Sync::new(self.bench.clone(), repositories, target.clone());
        let cancel = self.cancel.clone();
        let restore = sync.clone();
        self.tasks.spawn(async move {
            tokio::select! {
                () = restore.converge_all() => {}
                () = cancel.cancelled() => {}
            }
        });
        self.hire(Retry(sync.clone()));
        self.hire(sync);
        self.tasks.spawn(observe::run(
            self.bench.clone(),
            target.clone(),
            self.cancel.clone(),
        ));
        self.tasks.spawn(cluster_gateway::run(
            self.bench.clone(),
            target,
            self.cancel.clone(),
        ));
    }

    /// Admits deployments, decides on routes, and concludes rollouts.
    pub fn route(&self) {
        self.tasks
            .spawn(queue::run(self.bench.clone(), self.cancel.clone()));
        self.hire(Freezes(self.bench.clone()));
        self.hire(Route(self.bench.clone()));
        self.hire(RouteApplied(self.bench.clone()));
        self.hire(Domains(self.bench.clone()));
        self.hire(Deadlines(self.bench.clone()));
    }

    /// Schedules stops, and carries out those that are due.
    pub fn timers(&self) {
        self.hire(timers::Replaced(self.bench.clone()));
        self.hire(timers::Idle(self.bench.clone()));
        self.tasks
            .spawn(timers::run(self.bench.clone(), self.cancel.clone()));
    }

    /// Sends events to those who subscribed to them, with proofs from `proofs` where they want them.
    pub fn notify(
        &self,
        proofs: Option<Arc<dyn Proofs>>,
        options: NotifyOptions,
    ) -> Result<(), reqwest::Error> {
        let office = Office::new(self.bench.clone(), proofs, options)?;
        self.tasks.spawn(notify::run(office, self.cancel.clone()));
        Ok(())
    }

    /// Publishes what happens in the words of CDEvents.
    pub fn publish_cdevents(&self, bulletin: Arc<dyn Bulletin>) {
        self.hire(CdeventsWorker {
            projections: self.bench.ledger.projections().clone(),
            log: self.bench.ledger.log().clone(),
            bulletin,
        });
    }

    /// Keeps a gateway at the newest routes, and tells what is asked for through it. `name`
    /// identifies it in the ledger.
    pub fn gateway(&self, gateway: Gateway, name: &str) {
        self.tasks.spawn(activity::run(
            self.bench.clone(),
            gateway.clone(),
            self.cancel.clone(),
        ));
        self.tasks.spawn(gateway::run(
            self.bench.clone(),
            gateway,
            name.to_owned(),
            self.cancel.clone(),
        ));
    }

    /// Asks the public addresses through the gateway at this URL.
    pub fn probe(&self, gateway_url: &str) -> Result<(), reqwest::Error> {
        let probe = Probe::new(self.bench.clone(), gateway_url.to_owned())?;
        self.hire(ProbeRoutes(probe.clone()));
        self.hire(ProbeDeployment(probe));
        Ok(())
    }

    /// Looks at addresses from where users are, and at the routes of the clusters that this crew
    /// looks after.
    pub fn endpoints(&self, checks: Arc<EndpointChecks>) {
        self.tasks.spawn(endpoints::run(
            self.bench.clone(),
            checks,
            self.gateways.clone(),
            self.cancel.clone(),
        ));
    }

    /// Waits until all workers have ended. They end after the crew's token is cancelled.
    pub async fn ended(&self) {
        self.tasks.close();
        self.tasks.wait().await;
    }
}
