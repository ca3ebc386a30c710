//! Looks at addresses from where users are, on each plane for itself, and records what has changed.
//!
//! Only addresses of domains that an operator named are looked at ([`EndpointChecks`]). What the
//! ledger says of them (whose they are, which gateways have applied where they lead) is judged here,
//! and held against the route objects of the clusters that this process looks after; DNS, TLS and
//! HTTP are asked over the network.
//!
//! One strange answer is no news: what is not as it should be, and what is so again, is recorded once
//! it was seen twice in a row. What is known already is never recorded. So an address adds at most one
//! event for two looks at it, however it behaves.
//!
//! Addresses do not wait for each other; a nameserver or a server that is silent delays only those that
//! are asked there. What is kept in memory is what was seen once; a restart begins anew with that.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use daybook_events::deployment::{
    self, Deployment, DeploymentEvent, EndpointPlanesChanged, Plane, PlaneChange, PlaneSeen,
    PlaneState, Status,
};
use daybook_events::routing::{Route, Routing, Stickiness, SwitchReason};
use daybook_events::{
    Actor, ClusterName, Context, DeploymentId, EventId, Hostname, InstanceRef, ProjectName, Subject,
};
use daybook_projections::{Change, DeploymentRow, QueryError};
use futures_util::future::BoxFuture;
use futures_util::stream::{FuturesUnordered, StreamExt};
use jiff::Timestamp;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use super::trouble::Trouble;
use super::{Bench, Stop, cluster_gateway};
use crate::endpoint_checks::{Address, EndpointChecks, NOT_CONFIGURED, cut};
use crate::host_routes::RouteSeen;
use crate::target::Target;

const ROLE: &str = "endpoints";

/// Looks that are under way at once.
const AT_ONCE: usize = 32;

/// The longest time until something that was seen once is looked at again.
const CONFIRM: Duration = Duration::from_secs(5);

/// The route of an address was changed by somebody else than Daybook.
const ROUTE_CHANGED: &str = "RouteChanged";
/// The route of an address was taken away.
const ROUTE_MISSING: &str = "RouteMissing";

/// The clusters with a Gateway that this process looks after. More may come.
pub type Gateways = Arc<Mutex<Vec<Arc<dyn Target>>>>;

/// Looks at addresses until `cancel`.
pub async fn run(
    bench: Bench,
    checks: Arc<EndpointChecks>,
    gateways: Gateways,
    cancel: CancellationToken,
) {
    let mut feed = bench.ledger.projections().feed();
    let mut watch = Watch::new(bench, checks, gateways);
    let mut looks: FuturesUnordered<BoxFuture<'static, Looked>> = FuturesUnordered::new();
    loop {
        watch.refresh().await;
        for look in watch.due(AT_ONCE - looks.len().min(AT_ONCE)) {
            looks.push(look);
        }
        let next = watch.next(looks.len() < AT_ONCE);
        tokio::select! {
            () = cancel.cancelled() => return,
            Some(looked) = looks.next() => watch.take(looked).await,
            change = feed.next() => match change {
                Some(change) => watch.note(change),
                None => return,
            },
            () = tokio::time::sleep_until(next) => {}
        }
        while let Some(change) = feed.next_now() {
            watch.note(change);
        }
    }
}

/// What was seen of an address, and which table led it where when that was asked.
struct Looked {
    hostname: Hostname,
    table: u32,
    seen: Vec<PlaneSeen>,
}

/// An address that is looked at.
struct Watched {
    project: ProjectName,
    route: Route,
    /// When it is looked at next; none while a look is under way.
    due: Option<Instant>,
    /// What was seen once, and is not recorded.
    once: HashMap<(DeploymentId, Plane), PlaneSeen>,
}

struct Watch {
    bench: Bench,
    checks: Arc<EndpointChecks>,
    gateways: Gateways,
    addresses: BTreeMap<Hostname, Watched>,
    /// Of which something is on record: to be taken back once they are looked at no more.
    recorded: BTreeSet<(Hostname, DeploymentId)>,
    /// What may have changed in the ledger.
    everything: bool,
    projects: BTreeSet<ProjectName>,
    trouble: Trouble,
    again: Instant,
}

impl Watch {
    fn new(bench: Bench, checks: Arc<EndpointChecks>, gateways: Gateways) -> Self {
        Self {
            bench,
            checks,
            gateways,
            addresses: BTreeMap::new(),
            recorded: BTreeSet::new(),
            everything: true,
            projects: BTreeSet::new(),
            trouble: Trouble::default(),
            again: Instant::now(),
        }
    }

    fn note(&mut self, change: Change) {
        let Change::Of(subjects) = change else {
            self.everything = true;
            return;
        };
        for subject in subjects.iter() {
            if let Subject::Routing(project) = subject {
                self.projects.insert(project.clone());
            }
        }
    }

    /// Takes in what has changed in the ledger.
    async fn refresh(&mut self) {
        if !self.everything && self.projects.is_empty() {
            return;
        }
        let refreshed = async {
            if self.everything {
                self.list()?;
            }
            while let Some(project) = self.projects.first().cloned() {
                self.follow(&project)?;
                self.take_back().await?;
                self.projects.remove(&project);
            }
            Ok::<_, Stop>(())
        };
        match refreshed.await {
            Ok(()) | Err(Stop::Moved(_)) => {
                if self.trouble.over() {
                    tracing::info!("addresses are looked at again");
                }
            }
            Err(stop) => {
                let why = format!("{stop:?}");
                if self.trouble.met(&why) {
                    tracing::warn!(why, "addresses are not looked at yet");
                }
                self.again = Instant::now() + self.trouble.pause();
            }
        }
    }

    fn list(&mut self) -> Result<(), QueryError> {
        let projections = self.bench.ledger.projections();
        let projects = projections.projects()?.into_iter();
        self.projects.extend(projects.map(|project| project.name));
        for row in projections.active_deployments(None, None)? {
            let hostnames = row.state.planes.iter();
            self.recorded
                .extend(hostnames.map(|(hostname, _)| (hostname.clone(), row.id)));
        }
        self.everything = false;
        Ok(())
    }

    /// The addresses of a project as its table is now.
    fn follow(&mut self, project: &ProjectName) -> Result<(), QueryError> {
        let subject = Subject::Routing(project.clone());
        let folded = self
            .bench
            .ledger
            .projections()
            .shared::<Routing>(&subject)?;
        let routing = folded.state.as_ref();
        let led = |hostname: &Hostname| routing.and_then(|r| r.routes.get(hostname));
        self.addresses
            .retain(|hostname, watched| watched.project != *project || led(hostname).is_some());
        let routes = routing.into_iter().flat_map(|r| r.routes.iter());
        for (hostname, route) in routes.filter(|(h, _)| self.checks.of(h).is_some()) {
            match self.addresses.get_mut(hostname) {
                Some(watched) if watched.route == *route => {}
                Some(watched) => {
                    watched.route = route.clone();
                    watched.project = project.clone();
                    watched.once.clear();
                    // A look that is under way is of another time: it is thrown away.
                    watched.due = watched.due.map(|_| Instant::now());
                }
                None => {
                    let watched = Watched {
                        project: project.clone(),
                        route: route.clone(),
                        due: Some(Instant::now()),
                        once: HashMap::new(),
                    };
                    self.addresses.insert(hostname.clone(), watched);
                }
            }
        }
        Ok(())
    }

    /// Says of addresses that lead to a deployment no more, or are looked at no more, that nothing is
    /// known of them.
    async fn take_back(&mut self) -> Result<(), Stop> {
        let leads = |(hostname, id): &(Hostname, DeploymentId)| {
            let watched = self.addresses.get(hostname);
            watched.is_some_and(|w| w.route.backends.iter().any(|b| b.deployment == *id))
        };
        let gone: Vec<_> = self
            .recorded
            .iter()
            .filter(|r| !leads(r))
            .cloned()
            .collect();
        for (hostname, id) in gone {
            if let Some(row) = self.bench.row(id)? {
                let nothing = Plane::ALL.map(|plane| {
                    PlaneSeen::new(plane, PlaneState::Unknown, PlaneSeen::NOT_LOOKED_AT)
                });
                self.append(&row, &hostname, nothing.into()).await?;
            }
            self.recorded.remove(&(hostname, id));
        }
        Ok(())
    }

    /// Begins to look at what is due.
    fn due(&mut self, at_most: usize) -> Vec<BoxFuture<'static, Looked>> {
        let now = Instant::now();
        let mut looks: Vec<BoxFuture<'static, Looked>> = Vec::new();
        for (hostname, watched) in &mut self.addresses {
            if looks.len() == at_most {
                break;
            }
            if watched.due.is_none_or(|due| due > now) {
                continue;
            }
            let (bench, checks) = (&self.bench, self.checks.clone());
            let Some(path) = path(bench, &watched.route) else {
                // Nothing of it runs yet, or any more.
                watched.due = Some(now + self.checks.every.min(CONFIRM));
                continue;
            };
            watched.due = None;
            let backends = watched.route.backends.iter();
            let address = Address {
                hostname: hostname.clone(),
                path,
                deployments: backends.map(|b| b.deployment).collect(),
            };
            let table = watched.route.table;
            looks.push(Box::pin(async move {
                let seen = match checks.of(&address.hostname) {
                    Some(domain) => checks.look(domain, &address).await,
                    None => Vec::new(),
                };
                Looked {
                    hostname: address.hostname,
                    table,
                    seen,
                }
            }));
        }
        looks
    }

    /// When something is due next, if there is room for another look.
    fn next(&self, has_room: bool) -> Instant {
        let idle = Instant::now() + Duration::from_secs(3600);
        let behind = self.everything || !self.projects.is_empty();
        let again = behind.then_some(self.again);
        let due = self.addresses.values().filter(|_| has_room);
        let due = due.filter_map(|watched| watched.due).min();
        again.into_iter().chain(due).min().unwrap_or(idle)
    }

    /// Records what was seen.
    async fn take(&mut self, looked: Looked) {
        let Some(watched) = self.addresses.get_mut(&looked.hostname) else {
            return;
        };
        if watched.route.table != looked.table {
            watched.due = Some(Instant::now());
            return;
        }
        let mut again = self.checks.every;
        let (route, project) = (watched.route.clone(), watched.project.clone());
        for backend in &route.backends {
            let recorded = self
                .record(&looked, backend.deployment, &project, &route)
                .await;
            match recorded {
                Ok(true) | Err(Stop::Moved(_)) => {}
                Ok(false) => again = again.min(CONFIRM),
                Err(stop) => {
                    let (hostname, id) = (&looked.hostname, backend.deployment);
                    tracing::warn!(%hostname, deployment.id = %id, ?stop, "what was seen of an address is not recorded yet");
                    again = again.min(CONFIRM);
                }
            }
        }
        if let Some(watched) = self.addresses.get_mut(&looked.hostname) {
            watched.due = Some(Instant::now() + again);
        }
    }

    /// Records what of it is news to a deployment. Says whether nothing is left that was seen once
    /// only.
    async fn record(
        &mut self,
        looked: &Looked,
        id: DeploymentId,
        project: &ProjectName,
        route: &Route,
    ) -> Result<bool, Stop> {
        let Some(row) = self.bench.row(id)? else {
            return Ok(true);
        };
        if !runs(&row) {
            return Ok(true);
        }
        let hostname = &looked.hostname;
        let mut seen = self.of_the_ledger(hostname, project, route, &row)?;
        seen.extend(looked.seen.iter().cloned());
        let known = row.state.planes.get(hostname);
        let Some(watched) = self.addresses.get_mut(hostname) else {
            return Ok(true);
        };
        let mut news = Vec::new();
        let mut settled = true;
        for seen in seen {
            let key = (id, seen.plane);
            let known = known.and_then(|k| k.get(seen.plane)).map(|k| &k.seen);
            if !seen.is_news_after(known) {
                watched.once.remove(&key);
                continue;
            }
            let plain = seen.state == PlaneState::Ok || seen.reason == NOT_CONFIGURED;
            let at_once = known.is_none() && plain;
            let twice = watched.once.get(&key);
            if at_once || twice.is_some_and(|before| !seen.is_news_after(Some(before))) {
                watched.once.remove(&key);
                news.push(seen);
            } else {
                watched.once.insert(key, seen);
                settled = false;
            }
        }
        if !news.is_empty() {
            let hostname = hostname.clone();
            self.append(&row, &hostname, news).await?;
            self.recorded.insert((hostname, id));
        }
        Ok(settled)
    }

    async fn append(
        &self,
        row: &DeploymentRow,
        hostname: &Hostname,
        seen: Vec<PlaneSeen>,
    ) -> Result<(), Stop> {
        let changes = seen
            .into_iter()
            .map(|now| PlaneChange { before: None, now });
        let event = DeploymentEvent::EndpointPlanesChanged(EndpointPlanesChanged {
            hostname: hostname.clone(),
            changes: changes.collect(),
        });
        let event = self.bench.masked(&row.subject, event);
        let context = Context {
            id: EventId(Uuid::now_v7()),
            time: Timestamp::now(),
            correlation: row.id.0,
            causation: Some(row.state.status_event),
            actor: Actor::system(&format!("worker/{ROLE}")),
            traceparent: None,
            request_digest: None,
        };
        let appended = self
            .bench
            .append::<Deployment>(&row.subject, &context, |state| {
                deployment::decide(state, event.clone())
            })
            .await;
        match appended {
            Ok(done) => match done.position() {
                // The next look compares with what was recorded.
                Some(position) => self.bench.folded(position).await,
                None => Ok(()),
            },
            // It is in a state by now in which nobody looks at it.
            Err(Stop::Moved(_)) => Ok(()),
            Err(stop) => Err(stop),
        }
    }

    /// What the ledger says of an address: the planes of metadata and of the route.
    fn of_the_ledger(
        &self,
        hostname: &Hostname,
        project: &ProjectName,
        route: &Route,
        row: &DeploymentRow,
    ) -> Result<Vec<PlaneSeen>, Stop> {
        let projections = self.bench.ledger.projections();
        let subject = Subject::Routing(project.clone());
        let folded = projections.shared::<Routing>(&subject)?;
        let Some(routing) = &folded.state else {
            return Ok(Vec::new());
        };
        let owner = match routing.domain(hostname) {
            None => None,
            Some(_) => {
                let claim = projections
                    .domain(hostname)?
                    .and_then(|domain| domain.claim);
                Some(claim.map(|claim| claim.instance))
            }
        };
        let mut of_route = applied(routing, hostname, route, row);
        if of_route.state == PlaneState::Ok {
            let seen = self.of_the_clusters(hostname, project, routing, route, row)?;
            of_route = seen.unwrap_or(of_route);
        }
        Ok(vec![metadata(routing, route, owner), of_route])
    }

    /// What is not as it should be with the route objects of the clusters that a deployment is on. A
    /// cluster that has not applied the table yet is not asked.
    fn of_the_clusters(
        &self,
        hostname: &Hostname,
        project: &ProjectName,
        routing: &Routing,
        route: &Route,
        row: &DeploymentRow,
    ) -> Result<Option<PlaneSeen>, Stop> {
        let gateways = self.gateways.lock();
        let gateways = gateways.unwrap_or_else(PoisonError::into_inner).clone();
        let known = row.state.planes.get(hostname);
        let known = known.and_then(|k| k.get(Plane::Route)).map(|k| &k.seen);
        let known = known.filter(|k| [ROUTE_CHANGED, ROUTE_MISSING].contains(&k.reason.as_str()));
        let (mut unseen, mut found) = (Vec::new(), None);
        for cluster in &row.state.request.clusters {
            let at = routing.applied.get(cluster.as_str());
            if at.is_none_or(|at| *at < route.table) {
                unseen.push(cluster);
                continue;
            }
            let wanted = cluster_gateway::host_route(&self.bench, cluster, hostname, route)?;
            let Some(wanted) = wanted else { continue };
            let target = gateways.iter().find(|t| t.cluster() == cluster);
            let seen = target.map(|target| target.route_seen(project, &wanted));
            let (reason, expected, actual, message) = match seen {
                Some(RouteSeen::AsAsked) => continue,
                Some(RouteSeen::Unseen) | None => {
                    unseen.push(cluster);
                    continue;
                }
                Some(RouteSeen::Missing { expected }) => (
                    ROUTE_MISSING,
                    expected,
                    "no route".to_owned(),
                    format!("cluster {cluster} has no route for it any more"),
                ),
                Some(RouteSeen::Changed {
                    expected,
                    actual,
                    fields,
                }) => {
                    let fields = fields.join(", ");
                    let message = format!("its route on cluster {cluster} was changed: {fields}");
                    (ROUTE_CHANGED, expected, actual, message)
                }
            };
            found.get_or_insert(PlaneSeen {
                expected: Some(cut(&expected)),
                actual: Some(cut(&actual)),
                message: Some(cut(&message)),
                ..PlaneSeen::new(Plane::Route, PlaneState::Drifted, reason)
            });
        }
        Ok(with_others(known, &unseen, found))
    }
}

/// What there is to say of a route on all clusters, given what is known, which clusters were not seen,
/// and what was found on the others.
///
/// Whoever does not see a cluster neither takes back what somebody has seen there, nor puts something
/// else in its place: two who see one cluster each would take turns for ever.
fn with_others(
    known: Option<&PlaneSeen>,
    unseen: &[&ClusterName],
    found: Option<PlaneSeen>,
) -> Option<PlaneSeen> {
    let of_others = known.filter(|known| unseen.iter().any(|cluster| is_about(known, cluster)));
    of_others.cloned().or(found)
}

/// Whether what was seen of a route was seen on this cluster.
fn is_about(seen: &PlaneSeen, cluster: &ClusterName) -> bool {
    let message = seen.message.as_deref().unwrap_or_default();
    message.contains(&format!("cluster {cluster} "))
}

fn runs(row: &DeploymentRow) -> bool {
    matches!(row.state.status, Status::Started | Status::PartiallyStarted)
}

/// What an address is asked for: what its first running deployment answers when it is ready.
fn path(bench: &Bench, route: &Route) -> Option<String> {
    let mut rows = route.backends.iter().filter_map(|backend| {
        let row = bench.row(backend.deployment).ok().flatten()?;
        runs(&row).then_some(row)
    });
    let row = rows.next()?;
    Some(match row.state.request.run.health.path.as_str() {
        path if path.starts_with('/') => path.to_owned(),
        _ => "/".to_owned(),
    })
}

/// Whether the ledger is of one mind about an address: who has it, and what is the main deployment
/// there. `owner` is who has claimed it, if it is one that has to be claimed.
fn metadata(routing: &Routing, route: &Route, owner: Option<Option<InstanceRef>>) -> PlaneSeen {
    let drifted = |reason, expected: String, actual: String, message: String| PlaneSeen {
        message: Some(message),
        expected: Some(expected),
        actual: Some(actual),
        ..PlaneSeen::new(Plane::Metadata, PlaneState::Drifted, reason)
    };
    let instance = route.instance.to_string();
    match owner {
        Some(Some(owner)) if owner != route.instance => {
            let message = format!("it is claimed for {owner}, and leads to {instance}");
            return drifted("ClaimedForAnother", owner.to_string(), instance, message);
        }
        Some(None) => {
            let message = format!("nobody claims it, and it leads to {instance}");
            return drifted("NotClaimed", "nobody".to_owned(), instance, message);
        }
        _ => {}
    }
    let moves = route.stickiness >= Stickiness::Environment && route.reason != SwitchReason::Split;
    let main = routing.traffic(&route.instance).and_then(|t| t.main);
    if let (true, Some(main), [only]) = (moves, main, route.backends.as_slice())
        && only.deployment != main
    {
        let message = format!("the main deployment of {instance} is another one");
        let (main, only) = (main.to_string(), only.deployment.to_string());
        return drifted("NotMain", main, only, message);
    }
    PlaneSeen {
        expected: Some(instance.clone()),
        actual: Some(instance),
        ..PlaneSeen::new(Plane::Metadata, PlaneState::Ok, "Recorded")
    }
}

/// Whether a gateway has applied where an address leads: Daybook's own, or that of one of the
/// clusters.
fn applied(
    routing: &Routing,
    hostname: &Hostname,
    route: &Route,
    row: &DeploymentRow,
) -> PlaneSeen {
    let serves = |gateway: &str| {
        let clusters = &row.state.request.clusters;
        gateway == "local" || clusters.iter().any(|c| c.as_str() == gateway)
    };
    let table = route.table;
    let at = routing.applied.iter().filter(|(name, _)| serves(name));
    let (there, behind): (Vec<_>, Vec<_>) = at.partition(|(_, at)| **at >= table);
    let refused = routing.rejected.values().find(|rejected| {
        let later = routing.applied.get(&rejected.gateway).copied();
        serves(&rejected.gateway)
            && rejected.table == table
            && later.unwrap_or_default() < rejected.table
    });
    let expected = Some(format!("table {table}"));
    let led = route.backends.iter().map(|b| b.deployment.to_string());
    let led = Some(led.collect::<Vec<_>>().join(", "));
    if let Some(refused) = refused {
        let (gateway, why) = (&refused.gateway, &refused.message);
        return PlaneSeen {
            expected,
            message: Some(format!("the gateway {gateway} refuses it: {why}")),
            ..PlaneSeen::new(Plane::Route, PlaneState::Failing, "Refused")
        };
    }
    let named = |gateways: &[(&String, &u32)]| {
        let all: Vec<_> = gateways
            .iter()
            .map(|(name, table)| format!("table {table} ({name})"))
            .collect();
        all.join(", ")
    };
    match (there.is_empty(), behind.is_empty()) {
        (false, _) => {
            let also = routing.also_served(hostname).find(|(name, _)| serves(name));
            let also = also.map(|(cluster, ingress)| {
                let (namespace, name) = (&ingress.namespace, &ingress.name);
                let to = ingress.backends.join(", ");
                cut(&format!(
                    "Ingress {namespace}/{name} of cluster {cluster} serves it as well, to {to}"
                ))
            });
            let reason = match also {
                Some(_) => "AlsoIngress",
                None => "Applied",
            };
            PlaneSeen {
                expected: led.clone(),
                actual: led,
                message: also,
                ..PlaneSeen::new(Plane::Route, PlaneState::Ok, reason)
            }
        }
        (true, false) => PlaneSeen {
            expected,
            actual: Some(named(&behind)),
            message: Some("no gateway has applied where it leads now".to_owned()),
            ..PlaneSeen::new(Plane::Route, PlaneState::Drifted, "Behind")
        },
        (true, true) => PlaneSeen {
            expected,
            message: Some("no gateway that serves it has reported".to_owned()),
            ..PlaneSeen::new(Plane::Route, PlaneState::Unknown, "NoGateway")
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_others_have_seen_is_left_to_them() {
        let [oslo, bergen] = ["oslo", "bergen"].map(|name| ClusterName::parse(name).unwrap());
        let on = |cluster: &ClusterName| PlaneSeen {
            message: Some(format!("its route on cluster {cluster} was changed: rules")),
            ..PlaneSeen::new(Plane::Route, PlaneState::Drifted, ROUTE_CHANGED)
        };
        let known = on(&oslo);
        let seen = |unseen: &[&ClusterName], found| with_others(Some(&known), unseen, found);
        assert_eq!(seen(&[&oslo], None).as_ref(), Some(&known));
        assert_eq!(seen(&[&oslo], Some(on(&bergen))).as_ref(), Some(&known));
        // Whoever sees that cluster says what is so there now.
        assert_eq!(seen(&[&bergen], None), None);
        assert_eq!(seen(&[], Some(on(&bergen))), Some(on(&bergen)));
        assert_eq!(
            with_others(None, &[&oslo], Some(on(&bergen))),
            Some(on(&bergen))
        );
        assert!(!is_about(&known, &ClusterName::parse("slo").unwrap()));
    }
}
