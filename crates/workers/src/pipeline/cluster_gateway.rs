//! Brings the Gateway of a cluster to the newest route table of every project, and says when it is
//! there: under the cluster's name, as Daybook's own gateways do under theirs.

use std::collections::{BTreeMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use daybook_events::deployment::Deployment;
use daybook_events::routing::{self, GatewayAddress, Rejected, Routing, Stickiness};
use daybook_events::{ClusterName, Hostname, ProjectName, Subject};
use daybook_projections::{Change, QueryError};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::gateway::{Report, Said};
use super::traced::About;
use super::trouble::Trouble;
use super::{Bench, Stop, gateway};
use crate::host_routes::{HostBackend, HostRoute, HostRoutes, RouteError};
use crate::target::Target;

const ROLE: &str = "gateway";

/// When the projects are listed again if that was not possible.
const AGAIN: Duration = Duration::from_millis(500);

/// How long a look at what others have on a cluster may take. The next switch waits for it.
const MET_WITHIN: Duration = Duration::from_secs(5);

/// Keeps the Gateway of a cluster up to date until `cancel`, if it has one. Projects do not wait
/// for each other.
pub async fn run(bench: Bench, target: Arc<dyn Target>, cancel: CancellationToken) {
    if !target.has_gateway() {
        return;
    }
    let tasks = TaskTracker::new();
    let mut known = HashSet::new();
    let mut feed = bench.ledger.projections().feed();
    let mut change = Some(Change::Any);
    while let Some(found) = change {
        let projects = match projects(&bench, &found) {
            Ok(projects) => projects,
            Err(error) => {
                tracing::warn!(%error, "the projects could not be listed; trying again");
                change = tokio::select! {
                    () = cancel.cancelled() => None,
                    () = tokio::time::sleep(AGAIN) => Some(Change::Any),
                };
                continue;
            }
        };
        for project in projects {
            if known.insert(project.clone()) {
                let applier = Applier {
                    bench: bench.clone(),
                    target: target.clone(),
                    project,
                };
                let cancel = cancel.clone();
                tasks.spawn(async move {
                    tokio::select! {
                        () = applier.run() => {}
                        () = cancel.cancelled() => {}
                    }
                });
            }
        }
        change = tokio::select! {
            () = cancel.cancelled() => None,
            change = feed.next() => change,
        };
    }
    tasks.close();
    tasks.wait().await;
}

/// The projects whose routes may have changed.
fn projects(bench: &Bench, change: &Change) -> Result<Vec<ProjectName>, QueryError> {
    Ok(match change {
        Change::Any => {
            let all = bench.ledger.projections().projects()?;
            all.into_iter().map(|project| project.name).collect()
        }
        Change::Of(subjects) => {
            let subjects = subjects.iter().filter_map(|subject| match subject {
                Subject::Routing(project) => Some(project.clone()),
                _ => None,
            });
            subjects.collect()
        }
    })
}

/// What is known from one application of a table to the next.
struct Known {
    /// Whether this process has led any hostname there.
    has_led: bool,
    /// The table with which Ingresses were looked at.
    looked: u32,
    /// Where the Gateway is reached.
    addresses: Option<watch::Receiver<Option<Vec<GatewayAddress>>>>,
}

impl Known {
    /// Waits until the Gateway is reached elsewhere.
    async fn moved(&mut self) {
        if let Some(addresses) = &mut self.addresses
            && addresses.changed().await.is_ok()
        {
            return;
        }
        std::future::pending().await
    }

    fn addresses(&mut self) -> Option<Vec<GatewayAddress>> {
        let addresses = self.addresses.as_mut()?;
        addresses.borrow_and_update().clone()
    }
}

/// Applies the tables of one project.
struct Applier {
    bench: Bench,
    target: Arc<dyn Target>,
    project: ProjectName,
}

impl Applier {
    async fn run(self) {
        let mut feed = self.bench.ledger.projections().feed();
        let mut trouble = Trouble::default();
        let mut known = Known {
            has_led: false,
            looked: 0,
            addresses: self.target.gateway_addresses(),
        };
        loop {
            let applied = self.apply_in_trace(&mut known).await;
            let (cluster, project) = (self.target.cluster(), &self.project);
            let failed = match applied {
                Ok(()) | Err(Stop::Moved(_)) => {
                    if trouble.over() {
                        tracing::info!(%cluster, %project, "routes are applied again");
                    }
                    false
                }
                Err(stop) => {
                    let why = match stop {
                        Stop::Retry(why) => why,
                        other => format!("{other:?}"),
                    };
                    if trouble.met(&why) {
                        tracing::warn!(%cluster, %project, why, "routes are not applied yet");
                    }
                    true
                }
            };
            loop {
                let change = tokio::select! {
                    change = feed.next() => change,
                    () = known.moved() => break,
                    () = tokio::time::sleep(trouble.pause()), if failed => break,
                };
                match change {
                    None => return,
                    Some(Change::Any) => break,
                    Some(Change::Of(subjects)) => {
                        let own = |s: &Subject| matches!(s, Subject::Routing(p) if p == project);
                        if subjects.iter().any(own) {
                            break;
                        }
                    }
                }
            }
            // What came meanwhile is applied together.
            while feed.next_now().is_some() {}
        }
    }

    /// Brings the cluster to the newest table, in the trace of the switch that made it.
    async fn apply_in_trace(&self, known: &mut Known) -> Result<(), Stop> {
        let subject = Subject::Routing(self.project.clone());
        let projections = self.bench.ledger.projections();
        let folded = projections.shared::<Routing>(&subject)?;
        let about = folded.state.as_ref().and_then(gateway::newest_switch);
        // The fold need not copy the table for the sake of this reader.
        drop(folded);
        let Some((id, instance, trace)) = about else {
            return self.apply(known).await;
        };
        let about = About::of_instance(id, &instance, trace).in_cluster(self.target.cluster());
        self.bench.work(ROLE, about, self.apply(known)).await
    }

    /// Brings the cluster to the newest table, and reports that it is there, and where its Gateway
    /// is reached.
    async fn apply(&self, known: &mut Known) -> Result<(), Stop> {
        let subject = Subject::Routing(self.project.clone());
        let projections = self.bench.ledger.projections();
        let folded = projections.shared::<Routing>(&subject)?;
        let Some(routing) = &folded.state else {
            return Ok(());
        };
        let table = routing.table;
        let name = self.target.cluster().to_string();
        if table == 0 {
            return Ok(());
        }
        let routes = self.routes(routing)?;
        // A project that never had anything here is none of this cluster's.
        let is_known = known.has_led
            || routing.applied.contains_key(&name)
            || routing.rejected.contains_key(&name);
        if routes.hosts.is_empty() && !is_known {
            return Ok(());
        }
        known.has_led = true;
        drop(folded);
        match self.target.route(&routes).await {
            Ok(()) => {
                let said = Said {
                    addresses: known.addresses(),
                    ingresses: None,
                };
                self.says(table, said).await?;
                self.meet(table, &routes, known).await
            }
            Err(RouteError::Unavailable(why)) => Err(Stop::Retry(why)),
            Err(error @ RouteError::Refused(_)) => {
                let why = error.to_string();
                if let RouteError::Refused(refused) = error {
                    self.reject(table, refused).await?;
                }
                Err(Stop::Retry(why))
            }
        }
    }

    /// Reports what others have on the cluster for the hostnames of a table that it serves: nobody
    /// who waits for the table waits for that.
    async fn meet(&self, table: u32, routes: &HostRoutes, known: &mut Known) -> Result<(), Stop> {
        if known.looked == table {
            return Ok(());
        }
        let looked = tokio::time::timeout(MET_WITHIN, self.target.ingresses(routes)).await;
        let Ok(Some(ingresses)) = looked else {
            return Ok(());
        };
        let said = Said {
            addresses: None,
            ingresses: Some(ingresses),
        };
        self.says(table, said).await?;
        known.looked = table;
        Ok(())
    }

    /// Reports that the cluster serves a table, with what its Gateway says besides.
    async fn says(&self, table: u32, said: Said) -> Result<(), Stop> {
        let name = self.target.cluster().as_str();
        let report = Report::Applied(said);
        gateway::report(&self.bench, &self.project, name, table, report).await
    }

    /// Reports the switches that have led hostnames to where this cluster refuses to lead them. A
    /// refusal that no switch is to blame for undoes none: it is tried again, and the log says so.
    async fn reject(&self, table: u32, refused: BTreeMap<Hostname, String>) -> Result<(), Stop> {
        let name = self.target.cluster().to_string();
        let subject = Subject::Routing(self.project.clone());
        let projections = self.bench.ledger.projections();
        let mut tables = BTreeMap::new();
        if let Some(routing) = &projections.shared::<Routing>(&subject)?.state {
            for (hostname, message) in refused {
                // What was led elsewhere meanwhile was not refused there.
                let to_blame = routing.undoable(&name, &hostname).filter(|t| *t <= table);
                tables.extend(to_blame.map(|table| (table, message)));
            }
        }
        for (table, message) in tables {
            let rejected = Rejected {
                gateway: name.clone(),
                table,
                code: "route_refused".into(),
                message,
            };
            let rejected = Report::Rejected(rejected);
            gateway::report(&self.bench, &self.project, &name, table, rejected).await?;
        }
        Ok(())
    }

    /// The part of the table that leads to this cluster.
    fn routes(&self, routing: &Routing) -> Result<HostRoutes, Stop> {
        let mut hosts = Vec::new();
        for (hostname, route) in &routing.routes {
            hosts.extend(host_route(
                &self.bench,
                self.target.cluster(),
                hostname,
                route,
            )?);
        }
        Ok(HostRoutes {
            project: self.project.clone(),
            hosts,
        })
    }
}

/// Where a hostname that moves is to lead on a cluster, if it leads anywhere there.
pub(super) fn host_route(
    bench: &Bench,
    cluster: &ClusterName,
    hostname: &Hostname,
    route: &routing::Route,
) -> Result<Option<HostRoute>, Stop> {
    // An address that never moves comes with its release.
    if route.stickiness == Stickiness::Deployment {
        return Ok(None);
    }
    let instance = &route.instance;
    let mut backends = Vec::new();
    for backend in &route.backends {
        let (project, environment) = (&instance.project, &instance.environment);
        let subject = Subject::Deployment(project.clone(), environment.clone(), backend.deployment);
        let folded = bench.ledger.projections().shared::<Deployment>(&subject)?;
        let here = folded
            .state
            .as_ref()
            .is_some_and(|state| state.request.clusters.contains(cluster) && state.in_repository());
        if here {
            backends.push(HostBackend {
                service: instance.service.clone(),
                deployment: backend.deployment,
                weight: backend.weight,
            });
        }
    }
    Ok((!backends.is_empty()).then(|| HostRoute {
        hostname: hostname.clone(),
        environment: instance.environment.clone(),
        backends,
    }))
}
