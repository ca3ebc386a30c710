//! Brings a gateway to the newest route table of every project, and says when it is there.
//!
//! Every gateway follows the ledger by itself. It moves forward only; addresses of instances
//! change apart from tables, as instances come and go.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::time::Duration;

use daybook_events::routing::{self, Applied, Command, Rejected, Routing};
use daybook_events::{Position, ProjectName, Recorded, Subject, SubjectFilter};
use daybook_projections::DeploymentRow;
use futures_util::StreamExt;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use super::{Bench, Stop};
use crate::gateway::{ApplyError, Backend, Gateway, Policy, Route, RouteTable};

const ROLE: &str = "gateway";

/// Keeps one gateway up to date until `cancel`. `name` identifies it in the ledger.
pub async fn run(bench: Bench, gateway: Gateway, name: String, cancel: CancellationToken) {
    let mut applier = Applier {
        bench,
        gateway,
        name,
        served: BTreeMap::new(),
    };
    while !cancel.is_cancelled() {
        let after = applier.bench.ledger.projections().position();
        let mut dirty = match applier.bench.ledger.projections().projects() {
            Ok(projects) => projects.into_iter().map(|p| p.name).collect(),
            Err(error) => {
                tracing::warn!(%error, "the projects could not be listed");
                BTreeSet::new()
            }
        };
        applier.apply_all(&mut dirty).await;
        tokio::select! {
            () = cancel.cancelled() => return,
            () = applier.follow(after, dirty) => {}
        }
        tokio::select! {
            () = cancel.cancelled() => return,
            () = tokio::time::sleep(Duration::from_millis(500)) => {}
        }
    }
}

struct Applier {
    bench: Bench,
    gateway: Gateway,
    name: String,
    /// What each host name of a project led to when it was applied last.
    served: BTreeMap<ProjectName, (u32, Vec<daybook_events::Hostname>)>,
}

impl Applier {
    /// Follows the log until it breaks off.
    async fn follow(&mut self, after: Position, mut dirty: BTreeSet<ProjectName>) {
        let log = self.bench.ledger.log().clone();
        let mut tail = match log.tail(after, SubjectFilter::default()).await {
            Ok(tail) => tail.ready_chunks(64),
            Err(error) => {
                tracing::warn!(%error, "the gateway cannot follow the log; trying again");
                return;
            }
        };
        loop {
            let chunk = tokio::select! {
                chunk = tail.next() => match chunk {
                    Some(chunk) => chunk,
                    None => return,
                },
                // What could not be applied is tried again.
                () = tokio::time::sleep(Duration::from_millis(500)), if !dirty.is_empty() => Vec::new(),
            };
            let mut newest = Position::ZERO;
            for recorded in chunk {
                match recorded {
                    Ok(recorded) => {
                        newest = recorded.position;
                        if concerns_routes(&recorded) {
                            dirty.extend(recorded.subject.project().cloned());
                        }
                    }
                    Err(error) => {
                        tracing::warn!(%error, "the gateway lost the log; following it anew");
                        return;
                    }
                }
            }
            if dirty.is_empty() {
                continue;
            }
            let projections = self.bench.ledger.projections().clone();
            if projections
                .wait_for(newest, Duration::from_secs(30))
                .await
                .is_ok()
            {
                self.apply_all(&mut dirty).await;
            }
        }
    }

    async fn apply_all(&mut self, dirty: &mut BTreeSet<ProjectName>) {
        let mut left = BTreeSet::new();
        for project in std::mem::take(dirty) {
            match self.apply(&project).await {
                Ok(()) | Err(Stop::Moved(_)) => {}
                Err(stop) => {
                    tracing::warn!(%project, ?stop, "routes were not applied yet");
                    left.insert(project);
                }
            }
        }
        *dirty = left;
    }

    async fn apply(&mut self, project: &ProjectName) -> Result<(), Stop> {
        let subject = Subject::Routing(project.clone());
        let folded = self
            .bench
            .ledger
            .projections()
            .folded::<Routing>(&subject)?;
        let Some(routing) = folded.state else {
            return Ok(());
        };
        let mut rows = BTreeMap::new();
        for backend in routing.routes.values().flat_map(|r| &r.backends) {
            if let std::collections::btree_map::Entry::Vacant(entry) =
                rows.entry(backend.deployment)
                && let Some(row) = self.bench.row(backend.deployment)?
            {
                entry.insert(row);
            }
        }
        for row in rows.values() {
            self.set_addresses(row);
        }
        let table = RouteTable {
            project: project.clone(),
            revision: routing.table.into(),
            routes: routing
                .routes
                .iter()
                .map(|(hostname, route)| {
                    let backends = route
                        .backends
                        .iter()
                        .filter_map(|b| rows.get(&b.deployment).map(|row| (b, row)))
                        .flat_map(|(b, row)| {
                            row.state.request.clusters.iter().map(|cluster| Backend {
                                deployment: b.deployment,
                                cluster: cluster.clone(),
                                weight: b.weight,
                            })
                        })
                        .collect();
                    let policy = Policy::Simple;
                    (hostname.clone(), Route { backends, policy })
                })
                .collect(),
        };
        let command = match self.gateway.apply(table) {
            Ok(_) => {
                let (before, known) = self.served.entry(project.clone()).or_default();
                let hostnames: Vec<_> = routing
                    .routes
                    .iter()
                    .filter(|(h, r)| r.table > *before || !known.contains(h))
                    .map(|(h, _)| h.clone())
                    .collect();
                *before = routing.table;
                *known = routing.routes.keys().cloned().collect();
                Command::ReportApplied(Applied {
                    gateway: self.name.clone(),
                    table: routing.table,
                    hostnames,
                })
            }
            // Somebody applied a newer one in between; that one is reported.
            Err(ApplyError::Stale { .. }) => return Ok(()),
            Err(error @ ApplyError::HostTaken { .. }) => {
                let rejected = Rejected {
                    gateway: self.name.clone(),
                    table: routing.table,
                    code: "hostname_taken".into(),
                    message: error.to_string(),
                };
                Command::ReportRejected(self.bench.masked(&subject, rejected))
            }
        };
        if routing.table == 0 || routing.applied.get(&self.name) == Some(&routing.table) {
            return Ok(());
        }
        let cause = folded
            .last_id
            .unwrap_or(daybook_events::EventId(Uuid::nil()));
        let about = routing
            .recent
            .last()
            .map_or(Uuid::nil(), |s| s.deployment.0);
        let step = format!("table-{}-{}", routing.table, self.name);
        let mut context = self.bench.follow_up(ROLE, cause, about, &step);
        context.id = daybook_events::EventId::derived(
            about,
            &format!(
                "{project}/{step}/{}",
                matches!(command, Command::ReportApplied(_))
            ),
        );
        self.bench
            .append::<Routing>(&subject, &context, |state| {
                routing::decide(state, command.clone())
            })
            .await
            .map(|_| ())
    }

    fn set_addresses(&self, row: &DeploymentRow) {
        for cluster in &row.state.request.clusters {
            let observed = row.state.observed.get(cluster);
            let addresses: Vec<SocketAddr> = observed
                .iter()
                .flat_map(|o| &o.instances)
                .filter(|i| i.ready)
                .filter_map(|i| i.address.parse().ok())
                .collect();
            let why = match observed.and_then(|o| o.problem.as_ref()) {
                Some(problem) => format!("{}: {}", problem.reason, problem.message),
                None => format!("it is {}", row.state.status.as_str()),
            };
            let why = addresses.is_empty().then_some(why);
            self.gateway.set_addresses(row.id, cluster, addresses, why);
        }
    }
}

/// Whether an event can change where requests go.
fn concerns_routes(recorded: &Recorded) -> bool {
    match &recorded.subject {
        Subject::Routing(_) => true,
        Subject::Deployment(..) => recorded.event().is_ok_and(|e| {
            matches!(
                e.short_kind(),
                "deployment.workload_observed.v1"
                    | "deployment.stopped.v1"
                    | "deployment.terminated.v1"
            )
        }),
        _ => false,
    }
}
