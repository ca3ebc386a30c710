//! Route tables, and the form of them that requests are routed by.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;

use daybook_events::routing::ClusterPolicy;
use daybook_events::{ClusterName, DeploymentId, Hostname, ProjectName};
use rpds::HashTrieMapSync;
use tokio::sync::watch;

use super::choice::{LiveBackend, LiveRoute, OnCluster};
use super::counters::Counters;
use super::endpoint::{Endpoint, Known};
use super::internal::Wanted;
use crate::target::{AppStatus, ReleaseStatus};

/// All routes of a project.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RouteTable {
    /// The project. No two projects route the same host name.
    pub project: ProjectName,
    /// Grows with every change; a gateway never goes back.
    pub revision: u64,
    /// Where each host name leads.
    pub routes: BTreeMap<Hostname, Route>,
}

/// What becomes of a project's routes from one revision of its table to a later one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RouteChanges {
    /// The project.
    pub project: ProjectName,
    /// The revision that has to be in force.
    pub after: u64,
    /// The revision that is in force then.
    pub revision: u64,
    /// Where each host name that changes leads from here on; none for nowhere.
    pub routes: BTreeMap<Hostname, Option<Route>>,
}

/// Where a host name leads.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Route {
    /// The deployments that share it, by weight among those that have a ready instance.
    pub backends: Vec<Backend>,
    /// How a cluster of the chosen deployment is chosen.
    pub policy: ClusterPolicy,
    /// An address on loopback that leads to it too, by itself.
    pub internal: Option<Ipv4Addr>,
}

/// A deployment on its clusters.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Backend {
    /// The deployment.
    pub deployment: DeploymentId,
    /// The clusters that it runs on.
    pub clusters: Vec<ClusterName>,
    /// Its share among the weights of the route; 0 receives nothing.
    pub weight: u32,
}

/// What applying a table has done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Applied {
    /// Requests are now routed by it.
    Switched,
    /// This revision was in force before.
    Unchanged,
}

/// Why a table was not applied. Nothing has changed then.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ApplyError {
    /// A newer table is in force.
    #[error(
        "revision {given} of the routes of {project} is older than {newest}, which is in force"
    )]
    Stale {
        /// The project.
        project: ProjectName,
        /// The revision that was given.
        given: u64,
        /// The revision that is in force.
        newest: u64,
    },
    /// The changes follow on a revision that is not in force.
    #[error(
        "the changes to the routes of {project} follow on revision {after}, which is not in force"
    )]
    Missed {
        /// The project.
        project: ProjectName,
        /// The revision that they follow on.
        after: u64,
    },
    /// Another project routes this host name.
    #[error("the host name {hostname} belongs to project {owner}")]
    HostTaken {
        /// The host name.
        hostname: Hostname,
        /// The project that has it.
        owner: ProjectName,
    },
}

/// What requests are routed by: host name to route. Copies share what they have in common.
pub(super) type Hosts = HashTrieMapSync<String, Arc<LiveRoute>>;

/// So few endpoints are not looked through for those that nobody uses.
const ENDPOINTS_MIN: usize = 64;

type EndpointKey = (DeploymentId, ClusterName);

/// The tables and endpoints from which [`Hosts`] is made. Changed by one at a time.
#[derive(Debug, Default)]
pub(super) struct Routing {
    tables: BTreeMap<ProjectName, LiveTable>,
    owners: BTreeMap<Hostname, ProjectName>,
    hosts: Hosts,
    endpoints: HashMap<EndpointKey, Arc<Endpoint>>,
    /// How many of them were in use when that was looked at last.
    endpoints_used: usize,
    tracked: Vec<Tracked>,
    internal: Wanted,
}

#[derive(Debug)]
struct LiveTable {
    revision: u64,
    hostnames: BTreeSet<Hostname>,
}

#[derive(Debug)]
struct Tracked {
    cluster: ClusterName,
    status: watch::Receiver<AppStatus>,
    seen: HashSet<DeploymentId>,
}

impl Routing {
    pub(super) fn revision(&self, project: &ProjectName) -> Option<u64> {
        self.tables.get(project).map(|t| t.revision)
    }

    pub(super) fn hostnames(&self) -> BTreeMap<Hostname, ProjectName> {
        self.owners.clone()
    }

    pub(super) fn hosts(&self) -> Hosts {
        self.hosts.clone()
    }

    pub(super) fn apply(
        &mut self,
        table: RouteTable,
        counters: &Counters,
    ) -> Result<Applied, ApplyError> {
        let in_force = self.tables.get(&table.project);
        let gone = in_force.into_iter().flat_map(|t| &t.hostnames);
        let gone = gone.filter(|h| !table.routes.contains_key(*h));
        let mut routes: BTreeMap<_, _> = gone.map(|h| (h.clone(), None)).collect();
        routes.extend(table.routes.into_iter().map(|(h, r)| (h, Some(r))));
        let changes = RouteChanges {
            after: self.revision(&table.project).unwrap_or_default(),
            project: table.project,
            revision: table.revision,
            routes,
        };
        self.change(changes, counters)
    }

    pub(super) fn change(
        &mut self,
        changes: RouteChanges,
        counters: &Counters,
    ) -> Result<Applied, ApplyError> {
        let RouteChanges {
            project,
            after,
            revision,
            routes,
        } = changes;
        let newest = self.revision(&project);
        if newest == Some(revision) {
            return Ok(Applied::Unchanged);
        }
        if let Some(newest) = newest.filter(|newest| *newest > revision) {
            return Err(ApplyError::Stale {
                project,
                given: revision,
                newest,
            });
        }
        if newest.unwrap_or_default() != after {
            return Err(ApplyError::Missed { project, after });
        }
        for (hostname, _) in routes.iter().filter(|(_, route)| route.is_some()) {
            if let Some(owner) = self.owners.get(hostname)
                && *owner != project
            {
                return Err(ApplyError::HostTaken {
                    hostname: hostname.clone(),
                    owner: owner.clone(),
                });
            }
        }
        let mut hostnames = match self.tables.remove(&project) {
            Some(table) => table.hostnames,
            None => BTreeSet::new(),
        };
        for (hostname, route) in routes {
            match route {
                Some(route) => {
                    let internal = route.internal;
                    let live = Arc::new(self.live(route, counters));
                    self.hosts.insert_mut(hostname.as_str().to_owned(), live);
                    self.lead_internal(&hostname, internal);
                    self.owners.insert(hostname.clone(), project.clone());
                    hostnames.insert(hostname);
                }
                None if hostnames.remove(&hostname) => {
                    self.hosts.remove_mut(hostname.as_str());
                    self.lead_internal(&hostname, None);
                    self.owners.remove(&hostname);
                }
                None => {}
            }
        }
        let table = LiveTable {
            revision,
            hostnames,
        };
        self.tables.insert(project, table);
        Ok(Applied::Switched)
    }

    /// Takes a host name from its project, and leaves its route for the next owner to replace.
    pub(super) fn release(&mut self, project: &ProjectName, hostname: &Hostname) {
        if let Some(table) = self.tables.get_mut(project)
            && table.hostnames.remove(hostname)
        {
            self.owners.remove(hostname);
        }
    }

    /// Has an internal address lead where a host name leads. No host name looks like one.
    fn lead_internal(&mut self, hostname: &Hostname, address: Option<Ipv4Addr>) {
        for address in self.internal.set(hostname, address) {
            let owner = self.internal.owner(address);
            let live = owner.and_then(|h| self.hosts.get(h.as_str())).cloned();
            match live {
                Some(live) => self.hosts.insert_mut(address.to_string(), live),
                None => drop(self.hosts.remove_mut(&address.to_string())),
            }
        }
    }

    /// The internal addresses that changes since the last time are about, and whether each is
    /// wanted.
    pub(super) fn take_internal(&mut self) -> Vec<(Ipv4Addr, bool)> {
        self.internal.take_touched()
    }

    fn live(&mut self, route: Route, counters: &Counters) -> LiveRoute {
        let mut backends = Vec::with_capacity(route.backends.len());
        for backend in route.backends {
            let on = |cluster: &ClusterName| OnCluster {
                deployment: backend.deployment,
                cluster: cluster.clone(),
                endpoint: self.endpoint(backend.deployment, cluster),
                counter: counters.of(backend.deployment),
            };
            let clusters = backend.clusters.iter().map(on).collect();
            backends.push(LiveBackend::new(clusters, backend.weight, &route.policy));
        }
        LiveRoute::new(backends)
    }

    fn endpoint(&mut self, deployment: DeploymentId, cluster: &ClusterName) -> Arc<Endpoint> {
        self.endpoints
            .entry((deployment, cluster.clone()))
            .or_default()
            .clone()
    }

    /// Returns the addresses at which nothing is expected any more. What is tracked is not
    /// touched: the target itself knows better.
    pub(super) fn set_addresses(
        &mut self,
        deployment: DeploymentId,
        cluster: &ClusterName,
        addresses: Vec<SocketAddr>,
        why: Option<String>,
    ) -> Vec<SocketAddr> {
        let is_tracked = |t: &Tracked| t.cluster == *cluster && t.seen.contains(&deployment);
        if self.tracked.iter().any(is_tracked) {
            return Vec::new();
        }
        self.update(deployment, cluster, addresses, why)
    }

    fn update(
        &mut self,
        deployment: DeploymentId,
        cluster: &ClusterName,
        addresses: Vec<SocketAddr>,
        why: Option<String>,
    ) -> Vec<SocketAddr> {
        let endpoint = self.endpoint(deployment, cluster);
        let new = Known {
            addresses,
            why_none: why.unwrap_or_else(|| "no instance is ready".into()),
        };
        endpoint.set(new)
    }

    /// Whether this channel was not tracked before.
    pub(super) fn track(
        &mut self,
        cluster: ClusterName,
        status: watch::Receiver<AppStatus>,
    ) -> bool {
        if self.tracked.iter().any(|t| t.status.same_channel(&status)) {
            return false;
        }
        self.tracked.push(Tracked {
            cluster,
            status,
            seen: HashSet::new(),
        });
        true
    }

    pub(super) fn untrack(&mut self, status: &watch::Receiver<AppStatus>) {
        self.tracked.retain(|t| !t.status.same_channel(status));
    }

    /// Takes over what tracked targets say now. Returns the addresses at which nothing is
    /// expected any more.
    pub(super) fn absorb(&mut self) -> Vec<SocketAddr> {
        if self.endpoints.len() > 2 * self.endpoints_used {
            self.endpoints
                .retain(|_, endpoint| Arc::strong_count(endpoint) > 1 || endpoint.is_ready());
            self.endpoints_used = self.endpoints.len().max(ENDPOINTS_MIN);
        }
        let mut tracked = std::mem::take(&mut self.tracked);
        let mut gone = Vec::new();
        for t in &mut tracked {
            let status = t.status.borrow().clone();
            let present: HashSet<DeploymentId> =
                status.releases.iter().map(|r| r.deployment).collect();
            for removed in t.seen.difference(&present) {
                let why = Some("the deployment was removed from this cluster".to_owned());
                gone.extend(self.update(*removed, &t.cluster, Vec::new(), why));
            }
            for release in &status.releases {
                let addresses = ready_addresses(release);
                let why = Some(why_none(release));
                gone.extend(self.update(release.deployment, &t.cluster, addresses, why));
            }
            t.seen = present;
        }
        self.tracked = tracked;
        gone
    }
}

fn ready_addresses(release: &ReleaseStatus) -> Vec<SocketAddr> {
    release
        .instances
        .iter()
        .filter(|i| i.ready)
        .filter_map(|i| i.address.parse().ok())
        .collect()
}

fn why_none(release: &ReleaseStatus) -> String {
    match &release.problem {
        Some(problem) => format!("{}: {}", problem.reason, problem.message),
        None if release.wanted == 0 => "it is stopped".into(),
        None => "its instances are starting".into(),
    }
}
