//! Brings a gateway to the newest route table of every project, and says when it is there.
//!
//! Every gateway follows the ledger by itself. It moves forward only; addresses of instances
//! change apart from tables, as instances come and go.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::net::SocketAddr;
use std::ops::Bound;
use std::sync::Arc;
use std::time::Duration;

use daybook_events::aggregate::Decision;
use daybook_events::deployment::Deployment;
use daybook_events::routing::{
    self, Applied, Command, GatewayAddress, Ingresses, Rejected, Routing, Stickiness,
};
use daybook_events::{
    DeploymentId, EventId, Folded, Hostname, InstanceRef, ProjectName, Subject, TraceParent,
};
use daybook_projections::{Change, Executed};
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use super::traced::About;
use super::{Bench, Stop};
use crate::gateway::{ApplyError, Backend, Gateway, Route, RouteChanges, RouteTable};

const ROLE: &str = "gateway";

/// When what could not be applied is tried again.
const AGAIN: Duration = Duration::from_millis(500);

/// Keeps one gateway up to date until `cancel`. `name` identifies it in the ledger.
pub async fn run(bench: Bench, gateway: Gateway, name: String, cancel: CancellationToken) {
    let mut feed = bench.ledger.projections().feed();
    let applier = Applier {
        bench,
        gateway,
        name,
    };
    let mut dirty = Dirty {
        everything: true,
        ..Dirty::default()
    };
    loop {
        tokio::select! {
            () = cancel.cancelled() => return,
            () = applier.settle(&mut dirty) => {}
        }
        tokio::select! {
            () = cancel.cancelled() => return,
            change = feed.next() => match change {
                Some(change) => dirty.note(change),
                None => return,
            },
            () = tokio::time::sleep(AGAIN), if !dirty.is_empty() => {}
        }
        // What came meanwhile is applied together.
        while let Some(change) = feed.next_now() {
            dirty.note(change);
        }
    }
}

/// What may not be in the gateway as it is in the ledger.
#[derive(Debug, Default)]
struct Dirty {
    everything: bool,
    projects: BTreeSet<ProjectName>,
    deployments: HashSet<Subject>,
}

impl Dirty {
    fn is_empty(&self) -> bool {
        !self.everything && self.projects.is_empty() && self.deployments.is_empty()
    }

    fn note(&mut self, change: Change) {
        let Change::Of(subjects) = change else {
            self.everything = true;
            return;
        };
        for subject in subjects.iter() {
            match subject {
                Subject::Routing(project) => drop(self.projects.insert(project.clone())),
                Subject::Deployment(..) => drop(self.deployments.insert(subject.clone())),
                _ => {}
            }
        }
    }
}

struct Applier {
    bench: Bench,
    gateway: Gateway,
    name: String,
}

impl Applier {
    /// Applies what is dirty. What could not be applied stays so; so does the rest if this is
    /// dropped.
    async fn settle(&self, dirty: &mut Dirty) {
        if dirty.everything {
            match self.bench.ledger.projections().projects() {
                Ok(projects) => {
                    let names = projects.into_iter().map(|p| p.name);
                    for name in names {
                        if let Err(stop) = self.set_all_addresses(&name) {
                            return tracing::warn!(project = %name, ?stop, "routes were not applied yet");
                        }
                        dirty.projects.insert(name);
                    }
                    dirty.everything = false;
                    self.open(&dirty.projects);
                }
                Err(error) => tracing::warn!(%error, "the projects could not be listed"),
            }
        }
        dirty.deployments.retain(|subject| {
            let done = self.set_addresses_if_routed(subject);
            if let Err(stop) = &done {
                tracing::warn!(%subject, ?stop, "addresses were not applied yet");
            }
            done.is_err()
        });
        let mut next = dirty.projects.first().cloned();
        while let Some(project) = next {
            match self.apply(&project).await {
                Ok(()) | Err(Stop::Moved(_)) => drop(dirty.projects.remove(&project)),
                Err(stop) => tracing::warn!(%project, ?stop, "routes were not applied yet"),
            }
            let later = (Bound::Excluded(project), Bound::Unbounded);
            next = dirty.projects.range(later).next().cloned();
        }
    }

    /// Lets the gateway accept connections once it has every table. What cannot be applied is
    /// reported later, and does not keep the others from being served.
    fn open(&self, projects: &BTreeSet<ProjectName>) {
        for project in projects {
            let subject = Subject::Routing(project.clone());
            if let Ok(folded) = self.bench.ledger.projections().shared::<Routing>(&subject)
                && let Some(routing) = &folded.state
            {
                let _ = self.bring_up(project, routing);
            }
        }
        self.gateway.open();
    }

    /// Brings the gateway to a project's newest table, and reports that it is there.
    async fn apply(&self, project: &ProjectName) -> Result<(), Stop> {
        let subject = Subject::Routing(project.clone());
        let projections = self.bench.ledger.projections();
        let folded = projections.shared::<Routing>(&subject)?;
        let about = folded.state.as_ref().and_then(newest_switch);
        let Some((id, instance, trace)) = about else {
            return self.apply_newest(project, folded).await;
        };
        let about = About::of_instance(id, &instance, trace);
        let applied = self.apply_newest(project, folded);
        self.bench.work(ROLE, about, applied).await
    }

    async fn apply_newest(
        &self,
        project: &ProjectName,
        folded: Arc<Folded<Routing>>,
    ) -> Result<(), Stop> {
        let Some(routing) = &folded.state else {
            return Ok(());
        };
        daybook_failpoints::reached("route.before");
        let mut applied = self.bring_up(project, routing)?;
        // The owner before has given it up, or it could not have been claimed: its table says so,
        // and was not applied yet, perhaps as it waits for a host name itself.
        while let Err(ApplyError::HostTaken { hostname, owner }) = &applied
            && self.has_given_up(owner, hostname)?
        {
            self.gateway.release(owner, hostname);
            applied = self.bring_up(project, routing)?;
        }
        daybook_failpoints::reached("route.after");
        let table = routing.table;
        let rejected = match applied {
            Ok(_) => None,
            // Somebody applied a newer one in between; that one is reported.
            Err(ApplyError::Stale { .. }) => return Ok(()),
            Err(error @ ApplyError::Missed { .. }) => return Err(Stop::Retry(error.to_string())),
            Err(error @ ApplyError::HostTaken { .. }) => {
                let rejected = Rejected {
                    gateway: self.name.clone(),
                    table,
                    code: "hostname_taken".into(),
                    message: error.to_string(),
                };
                Some(rejected)
            }
        };
        // The fold need not copy the table for the sake of this reader.
        drop(folded);
        let outcome = rejected.map_or(Report::Applied(Said::default()), Report::Rejected);
        let reported = report(&self.bench, project, &self.name, table, outcome).await;
        reported.map(|_| ())
    }

    /// Whether a project's newest table leads a host name nowhere.
    fn has_given_up(&self, owner: &ProjectName, hostname: &Hostname) -> Result<bool, Stop> {
        let subject = Subject::Routing(owner.clone());
        let folded = self
            .bench
            .ledger
            .projections()
            .shared::<Routing>(&subject)?;
        let routing = folded.state.as_ref();
        Ok(routing.is_some_and(|r| !r.routes.contains_key(hostname)))
    }

    /// Applies a project's newest table, whatever the gateway has.
    fn bring_up(
        &self,
        project: &ProjectName,
        routing: &Routing,
    ) -> Result<Result<(), ApplyError>, Stop> {
        match self.switch(project, routing)? {
            Err(ApplyError::Missed { .. }) => self.replace(project, routing),
            other => Ok(other),
        }
    }

    /// Applies what was switched since the table that the gateway has.
    fn switch(
        &self,
        project: &ProjectName,
        routing: &Routing,
    ) -> Result<Result<(), ApplyError>, Stop> {
        let after = self.gateway.revision(project).unwrap_or_default();
        let missed = ApplyError::Missed {
            project: project.clone(),
            after,
        };
        let known = u32::try_from(after).ok();
        let Some(hostnames) = known.and_then(|after| routing.switched(after, routing.table)) else {
            return Ok(Err(missed));
        };
        let mut routes = BTreeMap::new();
        for hostname in hostnames {
            let route = routing.routes.get(hostname);
            let route = route.map(|r| self.route(routing, hostname, r));
            let route = route.transpose()?;
            routes.insert(hostname.clone(), route);
        }
        let changes = RouteChanges {
            project: project.clone(),
            after,
            revision: routing.table.into(),
            routes,
        };
        Ok(self.gateway.change(changes).map(drop))
    }

    /// Applies the whole table.
    fn replace(
        &self,
        project: &ProjectName,
        routing: &Routing,
    ) -> Result<Result<(), ApplyError>, Stop> {
        let mut routes = BTreeMap::new();
        for (hostname, route) in &routing.routes {
            routes.insert(hostname.clone(), self.route(routing, hostname, route)?);
        }
        let table = RouteTable {
            project: project.clone(),
            revision: routing.table.into(),
            routes,
        };
        Ok(self.gateway.apply(table).map(drop))
    }

    /// A route as the gateway has it. Where its backends answer is set before it is used.
    fn route(
        &self,
        routing: &Routing,
        hostname: &Hostname,
        route: &routing::Route,
    ) -> Result<Route, Stop> {
        let mut backends = Vec::new();
        for backend in &route.backends {
            let subject = Subject::Deployment(
                route.instance.project.clone(),
                route.instance.environment.clone(),
                backend.deployment,
            );
            let folded = self.bench.ledger.projections().shared(&subject)?;
            let Some(state) = &folded.state else {
                continue;
            };
            self.set_addresses(backend.deployment, state);
            backends.push(Backend {
                deployment: backend.deployment,
                clusters: state.request.clusters.clone(),
                weight: backend.weight,
            });
        }
        let policy = routing.policy_of(route).clone();
        // That of the environment, which Daybook gave, and no other that moves like it.
        let own = route.stickiness == Stickiness::Environment && routing.domain(hostname).is_none();
        let internal = own.then(|| routing::internal_address(&route.instance));
        Ok(Route {
            backends,
            policy,
            internal,
        })
    }

    fn set_all_addresses(&self, project: &ProjectName) -> Result<(), Stop> {
        let projections = self.bench.ledger.projections();
        let folded = projections.shared::<Routing>(&Subject::Routing(project.clone()))?;
        if let Some(routing) = &folded.state {
            for (hostname, route) in &routing.routes {
                self.route(routing, hostname, route)?;
            }
        }
        Ok(())
    }

    fn set_addresses_if_routed(&self, subject: &Subject) -> Result<(), Stop> {
        let Subject::Deployment(project, _, id) = subject else {
            return Ok(());
        };
        let projections = self.bench.ledger.projections();
        let routing = projections.shared::<Routing>(&Subject::Routing(project.clone()))?;
        if let Some(routing) = &routing.state
            && !routing.hostnames_of(*id).is_empty()
            && let Some(state) = &projections.shared::<Deployment>(subject)?.state
        {
            self.set_addresses(*id, state);
        }
        Ok(())
    }

    fn set_addresses(&self, id: DeploymentId, state: &Deployment) {
        for cluster in &state.request.clusters {
            let observed = state.observed.get(cluster);
            let addresses: Vec<SocketAddr> = observed
                .iter()
                .flat_map(|o| &o.instances)
                .filter(|i| i.ready)
                .filter_map(|i| i.address.parse().ok())
                .collect();
            let why = match observed.and_then(|o| o.problem.as_ref()) {
                Some(problem) => format!("{}: {}", problem.reason, problem.message),
                None => why_it_does_not_run(id, state),
            };
            let why = addresses.is_empty().then_some(why);
            self.gateway.set_addresses(id, cluster, addresses, why);
        }
    }
}

/// What the newest table is about, and the trace that its switch belongs to.
pub(super) fn newest_switch(
    routing: &Routing,
) -> Option<(DeploymentId, InstanceRef, Option<TraceParent>)> {
    let newest = routing.recent.back()?;
    Some((newest.deployment, newest.instance.clone(), routing.trace))
}

/// What a gateway that serves a table says besides, as far as that is known.
#[derive(Clone, Default)]
pub(super) struct Said {
    /// Where it is reached.
    pub(super) addresses: Option<Vec<GatewayAddress>>,
    /// The Ingresses of others that serve hostnames of the table on its cluster.
    pub(super) ingresses: Option<Ingresses>,
}

/// What became of a table at a gateway.
pub(super) enum Report {
    /// It serves it.
    Applied(Said),
    /// It does not.
    Rejected(Rejected),
}

/// Reports that a gateway has applied a table and what it says besides, or why it has not, unless
/// that is known. A duplicate may be a report of the same table that says less, which was not folded
/// yet when this one was made.
pub(super) async fn report(
    bench: &Bench,
    project: &ProjectName,
    name: &str,
    table: u32,
    report: Report,
) -> Result<Executed, Stop> {
    let subject = Subject::Routing(project.clone());
    let folded = bench.ledger.projections().shared::<Routing>(&subject)?;
    let Some(routing) = &folded.state else {
        return Ok(Executed::Nothing);
    };
    let is_known = routing.applied.get(name) == Some(&table);
    let report = match report {
        Report::Rejected(rejected) => Command::ReportRejected(bench.masked(&subject, rejected)),
        Report::Applied(said) => Command::ReportApplied(bench.masked(
            &subject,
            Applied {
                gateway: name.to_owned(),
                table,
                hostnames: Vec::new(),
                addresses: said.addresses,
                ingresses: said.ingresses,
            },
        )),
    };
    let is_news = matches!(&report, Command::ReportApplied(now) if routing.is_news(now));
    if table == 0 || (is_known && !is_news) {
        return Ok(Executed::Nothing);
    }
    let cause = folded.last_id.unwrap_or(EventId(Uuid::nil()));
    let about = routing
        .recent
        .back()
        .map_or(Uuid::nil(), |s| s.deployment.0);
    let step = format!("table-{table}-{name}");
    let mut context = bench.follow_up(ROLE, cause, about, &step);
    context.id = match &report {
        // It may come back to what it said once: that is told apart by what was before.
        Command::ReportApplied(now) if is_known => {
            let said = format!("{:?} {:?}", now.addresses, now.ingresses);
            EventId::derived(cause.0, &format!("{project}/{name}/{said}"))
        }
        _ => {
            let is_applied = matches!(report, Command::ReportApplied(_));
            EventId::derived(about, &format!("{project}/{step}/{is_applied}"))
        }
    };
    drop(folded);
    bench
        .append::<Routing>(&subject, &context, |state| {
            let command = match (&report, state) {
                (Command::ReportApplied(_), None) => return Ok(Decision::Nothing),
                (Command::ReportApplied(now), Some(state)) => Command::ReportApplied(Applied {
                    hostnames: state.report(name, table).hostnames,
                    ..now.clone()
                }),
                (report, _) => report.clone(),
            };
            routing::decide(state, command)
        })
        .await
}

/// What a visitor is told of a deployment that answers nowhere.
fn why_it_does_not_run(id: DeploymentId, state: &Deployment) -> String {
    let status = state.status.as_str();
    match state.stops.stopped_by() {
        Some(stop) => format!(
            "it is {status} since {:.0}, because {}; `daybook start {}` starts it again",
            state.status_since,
            stop.because(),
            id.short()
        ),
        None => format!("it is {status}"),
    }
}
