//! Brings the Gateway of a cluster to the newest route table of every project, and says when it is
//! there: under the cluster's name, as Daybook's own gateways do under theirs.

use std::collections::{BTreeMap, HashSet};
use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use daybook_events::deployment::Deployment;
use daybook_events::environment::Environment;
use daybook_events::routing::{self, GatewayAddress, Rejected, Routing, Stickiness};
use daybook_events::{ClusterName, Hostname, ProjectName, Subject};
use daybook_projections::{Change, Executed, QueryError};
use tokio::sync::{Semaphore, watch};
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

/// How long a look at what others have on a cluster may take.
const MET_WITHIN: Duration = Duration::from_secs(5);

/// Keeps the Gateway of a cluster up to date until `cancel`, if it has one. Projects do not wait
/// for each other.
pub async fn run(bench: Bench, target: Arc<dyn Target>, cancel: CancellationToken) {
    if !target.has_gateway() {
        return;
    }
    let tasks = TaskTracker::new();
    let looks = Arc::new(Semaphore::new(1));
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
                    looks: looks.clone(),
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
    /// Whether this process has tried to lead any hostname there.
    has_led: bool,
    /// What this process has led there, and the table that it is of.
    led: Option<(u32, HostRoutes)>,
    /// The table with which Ingresses were looked at.
    looked: u32,
    /// Where the Gateway is reached.
    addresses: Option<watch::Receiver<Option<Vec<GatewayAddress>>>>,
    /// Where it was reached when this process said so last.
    said: Option<Vec<GatewayAddress>>,
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

    /// Where the Gateway is reached, unless this process has said so. Another one may see it
    /// elsewhere, and has said that: two that took each other's word back would never end.
    fn unsaid(&mut self) -> Option<Vec<GatewayAddress>> {
        let now = self.addresses.as_mut()?.borrow_and_update().clone()?;
        (self.said.as_ref() != Some(&now)).then_some(now)
    }

    fn is_led(&self, table: u32, routes: &HostRoutes) -> bool {
        let led = self.led.as_ref();
        led.is_some_and(|(t, r)| *t == table && r == routes)
    }

    /// What is led there, if Ingresses were not looked at with it.
    fn to_meet(&self) -> Option<(u32, HostRoutes)> {
        let unmet = self.led.as_ref().filter(|(t, _)| *t != self.looked);
        unmet.cloned()
    }
}

/// Applies the tables of one project.
struct Applier {
    bench: Bench,
    target: Arc<dyn Target>,
    project: ProjectName,
    /// One look at a time at what others have on the cluster, for all projects.
    looks: Arc<Semaphore>,
}

impl Applier {
    async fn run(self) {
        let mut feed = self.bench.ledger.projections().feed();
        let mut trouble = Trouble::default();
        let mut known = Known {
            has_led: false,
            led: None,
            looked: 0,
            addresses: self.target.gateway_addresses(),
            said: None,
        };
        loop {
            let applied = self.in_trace(Box::pin(self.apply(&mut known))).await;
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
            // Nobody who waits for a table waits for that, nor does the next one.
            let to_meet = known.to_meet().filter(|_| !failed);
            let mut meets = to_meet.is_some();
            let mut meeting = Box::pin(self.meet(to_meet));
            loop {
                let change = tokio::select! {
                    // What it has reported comes by the feed as well, and is no reason to begin anew.
                    biased;
                    looked = &mut meeting, if meets => {
                        meets = false;
                        known.looked = looked.unwrap_or(known.looked);
                        continue;
                    }
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

    /// Does what a switch asks for, in the trace of the newest one.
    async fn in_trace(&self, work: impl Future<Output = Result<(), Stop>>) -> Result<(), Stop> {
        let subject = Subject::Routing(self.project.clone());
        let projections = self.bench.ledger.projections();
        let folded = projections.shared::<Routing>(&subject)?;
        let about = folded.state.as_ref().and_then(gateway::newest_switch);
        // The fold need not copy the table for the sake of this reader.
        drop(folded);
        let Some((id, instance, trace)) = about else {
            return work.await;
        };
        let about = About::of_instance(id, &instance, trace).in_cluster(self.target.cluster());
        self.bench.work(ROLE, about, work).await
    }

    /// Brings the cluster to the newest table, and reports that it is there, and where its Gateway
    /// is reached. What this process has led already is not looked at again before the next switch.
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
        let is_served = routing.applied.get(&name) == Some(&table);
        drop(folded);
        // A Gateway that is gone takes no routes, and where it is reached is said all the same.
        let said = match is_served {
            true => self.serves(table, known).await,
            false => Ok(()),
        };
        if !known.is_led(table, &routes) {
            known.led = None;
            let done = self.target.route(&routes).await;
            match done {
                Ok(()) => known.led = Some((table, routes)),
                Err(RouteError::Unavailable(why)) => return Err(Stop::Retry(why)),
                Err(error @ RouteError::Refused(_)) => {
                    let why = error.to_string();
                    if let RouteError::Refused(refused) = error {
                        self.reject(table, refused).await?;
                    }
                    return Err(Stop::Retry(why));
                }
            }
        }
        match is_served {
            true => said,
            false => self.serves(table, known).await,
        }
    }

    /// Reports what others have on the cluster for the hostnames that are led there, and says with
    /// which table it has looked. What goes wrong with it concerns nothing else.
    async fn meet(&self, led: Option<(u32, HostRoutes)>) -> Option<u32> {
        let (table, routes) = led?;
        let looked = {
            let _turn = self.looks.acquire().await;
            tokio::time::timeout(MET_WITHIN, self.target.ingresses(&routes)).await
        };
        let Ok(Some(ingresses)) = looked else {
            return Some(table);
        };
        let said = Said {
            addresses: None,
            ingresses: Some(ingresses),
        };
        match self.in_trace(Box::pin(self.says(table, said))).await {
            Ok(()) => Some(table),
            Err(stop) => {
                let (cluster, project) = (self.target.cluster(), &self.project);
                tracing::warn!(%cluster, %project, ?stop, "Ingresses of others were not reported");
                None
            }
        }
    }

    /// Reports that the cluster serves a table, and where its Gateway is reached if this process has
    /// not said so.
    async fn serves(&self, table: u32, known: &mut Known) -> Result<(), Stop> {
        let addresses = known.unsaid();
        let said = Said {
            addresses: addresses.clone(),
            ingresses: None,
        };
        self.says(table, said).await?;
        let subject = Subject::Routing(self.project.clone());
        let projections = self.bench.ledger.projections();
        let folded = projections.shared::<Routing>(&subject)?;
        let name = self.target.cluster().as_str();
        let there = folded.state.as_ref().and_then(|r| r.addresses.get(name));
        // A report of a table that others have left behind says nothing.
        if addresses.is_some() && there == addresses.as_ref() {
            known.said = addresses;
        }
        Ok(())
    }

    /// Reports that the cluster serves a table, with what its Gateway says besides, and waits until
    /// that is known here.
    async fn says(&self, table: u32, said: Said) -> Result<(), Stop> {
        let name = self.target.cluster().as_str();
        for _ in 0..2 {
            let report = Report::Applied(said.clone());
            let done = gateway::report(&self.bench, &self.project, name, table, report).await?;
            // The next report is told from this one by what is known.
            if let Some(position) = done.position() {
                self.bench.folded(position).await?;
            }
            if !matches!(done, Executed::Duplicate { .. }) {
                break;
            }
        }
        Ok(())
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
    if backends.is_empty() {
        return Ok(None);
    }
    let (project, environment) = (&instance.project, &instance.environment);
    let subject = Subject::Environment(project.clone(), environment.clone());
    let folded = bench.ledger.projections().shared::<Environment>(&subject)?;
    Ok(Some(HostRoute {
        hostname: hostname.clone(),
        environment: environment.clone(),
        ephemeral: folded.state.as_ref().is_some_and(|e| e.spec.ephemeral),
        backends,
    }))
}
