//! The routing aggregate: the whole route table of a project, as one consistency boundary.
//!
//! A switch is a decision: recorded first as one event that names every hostname it changes, with
//! the previous and the next backends, and applied by the gateways then. Tables are numbered;
//! appliers only ever move to a newer one. A switch that cannot be applied is undone by another
//! switch, a *compensation*, that restores what it replaced.

mod address;
mod branch;
mod compensation;
mod domain;
mod ingress;
mod internal;
mod policy;
pub mod records;
mod split;

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use jiff::Timestamp;
use rpds::RedBlackTreeMapSync;
use schemars::JsonSchema;
use serde::ser::SerializeStruct as _;
use serde::{Deserialize, Serialize, Serializer};

pub use address::{ADDRESSES_MAX, GatewayAddress};
pub use branch::branch_label;
pub use domain::{DOMAINS_MAX, DomainChange, DomainRoute, SetDomain};
pub use ingress::{INGRESSES_MAX, IngressSeen, Ingresses};
pub use internal::internal_address;
pub use policy::{ClusterPolicy, PolicyChange, SetPolicy};
pub use split::{SHARES_MAX, Share, Split};

use crate::aggregate::{Aggregate, At, Decision, Illegal, Refusal, events};
use crate::deployment::Status;
use crate::envelope::Payload;
use crate::names::{DeploymentId, EventId, GitRef, Hostname, InstanceRef};
use crate::subject::AggregateKind;
use crate::trace::TraceParent;

/// What a hostname sticks to.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, JsonSchema,
)]
#[serde(rename_all = "snake_case")]
pub enum Stickiness {
    /// One deployment, for ever: its preview address.
    Deployment,
    /// The newest deployment of a branch.
    Branch,
    /// The main deployment of a service in an environment.
    Environment,
    /// The main deployment of a service in the project's live environment.
    Live,
}

/// Where a part of a hostname's traffic goes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Backend {
    /// The deployment.
    pub deployment: DeploymentId,
    /// Its share, relative to the other backends' weights.
    pub weight: u32,
}

/// One hostname's part in a switch.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct RouteChange {
    /// The hostname.
    pub hostname: Hostname,
    /// What it sticks to.
    pub stickiness: Stickiness,
    /// Where it led before; empty for a new hostname.
    pub previous: Vec<Backend>,
    /// Where it leads now; empty for a removed one.
    pub next: Vec<Backend>,
}

/// Why routes were switched.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum SwitchReason {
    /// A deployment became ready.
    Deploy,
    /// Somebody made a deployment the main one.
    MarkMain,
    /// Somebody went back to an older deployment.
    Rollback,
    /// A deployment is being removed.
    Withdraw,
    /// A switch could not be applied and is undone.
    Compensation,
    /// Somebody said which deployments share the traffic.
    Split,
    /// A deployment is being stopped, and leaves the routes that it shares with others.
    Leave,
    /// Somebody said how traffic is spread over clusters.
    Policy,
    /// The address of a branch goes to its newest ready deployment.
    Branch,
    /// A hostname that its owner brought along is taken in or out.
    Domain,
}

/// Which deployment is the main one of an instance, before and after.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct MainChange {
    /// Before.
    pub previous: Option<DeploymentId>,
    /// After.
    pub next: Option<DeploymentId>,
}

/// A set of hostnames was switched, all at once.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize, JsonSchema)]
pub struct Switched {
    /// Number of the table that this makes: 1, 2, 3, …
    pub table: u32,
    /// Why.
    pub reason: SwitchReason,
    /// The instance whose routes these are.
    pub instance: InstanceRef,
    /// The deployment that it is about.
    pub deployment: DeploymentId,
    /// The hostnames.
    pub changes: Vec<RouteChange>,
    /// The change of the main deployment, if there is one.
    pub main: Option<MainChange>,
    /// Whether the instance is rolled back from here on: then no deployment takes over traffic by
    /// itself until somebody marks one as main.
    pub rolled_back: bool,
    /// Whether it was before, for a compensation.
    pub was_rolled_back: bool,
    /// The table that this undoes, for a compensation.
    pub undoes: Option<u32>,
    /// Why, in the caller's words.
    pub note: Option<String>,
    /// The change of the instance's policy across clusters, if there is one. The hostnames that it
    /// concerns are among the changes, though they lead where they led.
    #[serde(default)]
    pub policy: Option<PolicyChange>,
    /// The hostname that is taken in or out, if there is one.
    #[serde(default)]
    pub domain: Option<DomainChange>,
}

/// As derived, but that JSON leaves out what there is none of, as events did before there was any.
/// Rows of projections, which are not self-describing, always have it.
impl Serialize for Switched {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let all = !serializer.is_human_readable();
        let policy = all || self.policy.is_some();
        let domain = all || self.domain.is_some();
        let fields = 10 + usize::from(policy) + usize::from(domain);
        let mut out = serializer.serialize_struct("Switched", fields)?;
        out.serialize_field("table", &self.table)?;
        out.serialize_field("reason", &self.reason)?;
        out.serialize_field("instance", &self.instance)?;
        out.serialize_field("deployment", &self.deployment)?;
        out.serialize_field("changes", &self.changes)?;
        out.serialize_field("main", &self.main)?;
        out.serialize_field("rolled_back", &self.rolled_back)?;
        out.serialize_field("was_rolled_back", &self.was_rolled_back)?;
        out.serialize_field("undoes", &self.undoes)?;
        out.serialize_field("note", &self.note)?;
        if policy {
            out.serialize_field("policy", &self.policy)?;
        }
        if domain {
            out.serialize_field("domain", &self.domain)?;
        }
        out.end()
    }
}

/// A gateway serves a table.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Applied {
    /// The gateway.
    pub gateway: String,
    /// The table.
    pub table: u32,
    /// The hostnames that it now serves differently; none where there are too many of them, or
    /// where the table before is too old to tell.
    pub hostnames: Vec<Hostname>,
    /// Where it is reached, as it says itself; none where that is not known, or as it was said
    /// before. With it, the table may be one that is known to be served.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub addresses: Option<Vec<GatewayAddress>>,
    /// The Ingresses of others that serve hostnames of the table on its cluster; none where that is
    /// not known, or as it was said before. With it, too, the table may be one that is known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ingresses: Option<Ingresses>,
}

impl Applied {
    /// How many hostnames are named at most: an event has its bounds.
    pub const NAMED: usize = 128;
}

/// A gateway could not apply a table.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Rejected {
    /// The gateway.
    pub gateway: String,
    /// The table.
    pub table: u32,
    /// A stable code.
    pub code: String,
    /// What happened.
    pub message: String,
}

events! {
    /// The events of a route table.
    RoutingEvent {
        /// Routes were switched.
        Switched(Box<Switched>) = "routing.switched.v1",
        /// A gateway serves them.
        Applied(Applied) = "routing.applied.v1",
        /// A gateway does not.
        Rejected(Rejected) = "routing.rejected.v1",
    }
}

/// A route as it is now.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Route {
    /// The instance.
    pub instance: InstanceRef,
    /// What it sticks to.
    pub stickiness: Stickiness,
    /// Where it leads.
    pub backends: Vec<Backend>,
    /// The table that made it so.
    pub table: u32,
    /// Since when.
    #[serde(with = "crate::instant")]
    #[schemars(with = "Timestamp")]
    pub since: Timestamp,
    /// Why that table was made.
    pub reason: SwitchReason,
    /// The event that made it.
    pub by: EventId,
    /// Where it led before that; empty for a new hostname.
    pub previous: Vec<Backend>,
}

/// What is known of one instance's traffic.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
pub struct InstanceTraffic {
    /// The main deployment.
    pub main: Option<DeploymentId>,
    /// The main deployments before it, newest last, at most sixteen.
    pub former: Vec<DeploymentId>,
    /// Whether it is rolled back: no deployment takes over by itself.
    pub rolled_back: bool,
    /// The deployments that were rolled back from: none of them gets traffic before somebody marks
    /// one as main. At most sixteen, newest last.
    pub pinned_out: Vec<DeploymentId>,
}

impl InstanceTraffic {
    /// Whether a deployment is the main one, or was it lately.
    pub fn was_main(&self, deployment: DeploymentId) -> bool {
        self.main == Some(deployment) || self.former.contains(&deployment)
    }

    /// Refuses a deployment that the instance was rolled back from.
    fn must_not_be_pinned_out(&self, target: &Target) -> Result<(), Refusal> {
        if !self.pinned_out.contains(&target.deployment) {
            return Ok(());
        }
        let Target {
            deployment,
            instance,
            ..
        } = target;
        Err(Refusal::new(
            "pinned_out",
            format!("{instance} was rolled back from deployment {deployment}"),
            "lift that with `daybook mark-main`, or name other deployments",
        ))
    }
}

/// The state of a project's route table.
///
/// It is as large as its project. What grows is in maps that share what they have in common with
/// their copies, so that a copy costs nothing and a change costs what it changes.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Routing {
    /// Number of the newest table.
    pub table: u32,
    /// The trace that the newest switch belongs to.
    pub trace: Option<TraceParent>,
    /// The routes.
    pub routes: RedBlackTreeMapSync<Hostname, Route>,
    /// Main deployments, by the text form of the instance.
    pub instances: RedBlackTreeMapSync<String, InstanceTraffic>,
    /// The hostnames that lead to each deployment.
    hostnames: RedBlackTreeMapSync<DeploymentId, BTreeSet<Hostname>>,
    /// The newest table that each gateway has applied.
    pub applied: BTreeMap<String, u32>,
    /// Where each gateway that says so is reached; empty for one that says it is nowhere.
    pub addresses: BTreeMap<String, Vec<GatewayAddress>>,
    /// What each gateway has said of the Ingresses of its cluster, when it said so last.
    pub ingresses: BTreeMap<String, Ingresses>,
    /// The newest switches, newest last, at most sixteen: what a compensation needs.
    pub recent: VecDeque<Switched>,
    /// The newest refusal of each gateway.
    pub rejected: BTreeMap<String, Rejected>,
    /// How traffic is spread over clusters, by the text form of the instance; simply, where there
    /// is none.
    policies: RedBlackTreeMapSync<String, ClusterPolicy>,
    /// The hostnames that were taken in, or were.
    domains: RedBlackTreeMapSync<Hostname, DomainRoute>,
}

const KEPT: usize = 16;

impl Routing {
    /// What is known of an instance's traffic.
    pub fn traffic(&self, instance: &InstanceRef) -> Option<&InstanceTraffic> {
        instance.with_text(|text| self.instances.get(text))
    }

    /// How an instance's traffic is spread over clusters.
    pub fn policy(&self, instance: &InstanceRef) -> &ClusterPolicy {
        let policy = instance.with_text(|text| self.policies.get(text));
        policy.unwrap_or(&ClusterPolicy::Simple)
    }

    /// How a route is spread over clusters: as its instance says, where it moves with the main
    /// deployment, and simply otherwise.
    pub fn policy_of(&self, route: &Route) -> &ClusterPolicy {
        if route.stickiness >= Stickiness::Environment {
            self.policy(&route.instance)
        } else {
            &ClusterPolicy::Simple
        }
    }

    /// The addresses of an instance that lead to whatever is its main deployment, those that were
    /// brought along included.
    pub(crate) fn moving(
        &self,
        instance: &InstanceRef,
        hostnames: &Hostnames,
    ) -> Vec<(Hostname, Stickiness)> {
        let environment = (hostnames.environment.clone(), Stickiness::Environment);
        let live = hostnames.live.clone().map(|h| (h, Stickiness::Live));
        let brought = self.domains_of(instance, live.is_some());
        let brought = brought.map(|(h, stickiness)| (h.clone(), stickiness));
        let own = [Some(environment), live].into_iter().flatten();
        own.chain(brought).collect()
    }

    /// Whether a hostname is free to be, or is, the address of a branch of this instance.
    fn is_branch_of(&self, hostname: &Hostname, instance: &InstanceRef) -> bool {
        let route = self.routes.get(hostname);
        route.is_none_or(|r| r.stickiness == Stickiness::Branch && r.instance == *instance)
    }

    /// Whether one of the addresses that move with the main deployment leads to several
    /// deployments, or two of them lead to different ones.
    pub fn is_split(&self, instance: &InstanceRef, hostnames: &Hostnames) -> bool {
        split::is_split(self, instance, hostnames)
    }

    /// Whether all that would lead to a deployment as the main one of its instance leads to it alone
    /// already. `live` says whether its environment is the live one. What the instance's own
    /// addresses are called depends on the server, so that here any of their kind is one of them.
    pub fn leads_wholly_to(
        &self,
        deployment: DeploymentId,
        instance: &InstanceRef,
        live: bool,
    ) -> bool {
        let alone = |route: &Route| match route.backends.as_slice() {
            [only] => only.deployment == deployment,
            _ => false,
        };
        let here = self.hostnames_of(deployment);
        let own = |stickiness| {
            here.iter()
                .filter(|(hostname, _)| self.domain(hostname).is_none())
                .any(|(_, route)| route.stickiness == stickiness && alone(route))
        };
        own(Stickiness::Environment)
            && (!live || own(Stickiness::Live))
            && self
                .domains_of(instance, live)
                .all(|(hostname, _)| self.routes.get(hostname).is_some_and(alone))
    }

    /// The hostnames that lead to a deployment.
    pub fn hostnames_of(&self, deployment: DeploymentId) -> Vec<(&Hostname, &Route)> {
        let hostnames = self.hostnames.get(&deployment).into_iter().flatten();
        hostnames
            .filter_map(|h| self.routes.get_key_value(h))
            .collect()
    }

    /// The newest table that was made for a deployment.
    pub fn table_of(&self, deployment: DeploymentId) -> Option<u32> {
        let routes = self.hostnames_of(deployment).into_iter();
        routes.map(|(_, route)| route.table).max()
    }

    /// The hostnames that were switched after one table and up to another, also those that lead
    /// nowhere now; none if that is too long ago to be known.
    pub fn switched(&self, after: u32, upto: u32) -> Option<BTreeSet<&Hostname>> {
        let known = self.recent.front().map_or(self.table, |s| s.table - 1);
        (after >= known).then(|| {
            let within = |s: &&Switched| after < s.table && s.table <= upto;
            let changes = self.recent.iter().filter(within).flat_map(|s| &s.changes);
            changes.map(|c| &c.hostname).collect()
        })
    }

    /// The newest table that led a hostname away from a deployment, as far as switches are kept.
    pub fn left_by(&self, deployment: DeploymentId) -> Option<u32> {
        let has = |backends: &[Backend]| backends.iter().any(|b| b.deployment == deployment);
        let left = |s: &&Switched| {
            let mut changes = s.changes.iter();
            changes.any(|c| has(&c.previous) && !has(&c.next))
        };
        self.recent.iter().rev().find(left).map(|s| s.table)
    }

    /// What a gateway that serves a table says of it.
    pub fn report(&self, gateway: &str, table: u32) -> Applied {
        let before = self.applied.get(gateway).copied().unwrap_or_default();
        let hostnames = self.switched(before, table).unwrap_or_default();
        let named = hostnames.len() <= Applied::NAMED;
        let named = hostnames.into_iter().filter(|_| named);
        Applied {
            gateway: gateway.to_owned(),
            table,
            hostnames: named.cloned().collect(),
            addresses: None,
            ingresses: None,
        }
    }

    /// Whether a report of a gateway says where it is reached, and that is not known yet.
    fn moves(&self, report: &Applied) -> bool {
        let known = self.addresses.get(&report.gateway);
        report.addresses.is_some() && known != report.addresses.as_ref()
    }

    /// Whether a report of a gateway says what Ingresses there are, and that is not known yet.
    fn meets(&self, report: &Applied) -> bool {
        let none = Ingresses::default();
        let known = self.ingresses.get(&report.gateway).unwrap_or(&none);
        report.ingresses.as_ref().is_some_and(|now| now != known)
    }

    /// Whether a report of a gateway says anything that is not known yet, but for its table.
    pub fn is_news(&self, report: &Applied) -> bool {
        self.moves(report) || self.meets(report)
    }

    /// The Ingresses of others that serve a hostname as well, with the gateways of their clusters.
    pub fn also_served<'a>(
        &'a self,
        hostname: &'a Hostname,
    ) -> impl Iterator<Item = (&'a str, &'a IngressSeen)> {
        self.ingresses.iter().flat_map(move |(gateway, ingresses)| {
            let seen = match ingresses {
                Ingresses::Seen(seen) => seen.as_slice(),
                Ingresses::Unread(_) => &[],
            };
            let of_it = seen.iter().filter(move |i| i.hostname == *hostname);
            of_it.map(move |ingress| (gateway.as_str(), ingress))
        })
    }

    /// Leads a hostname somewhere else, or nowhere.
    fn lead(&mut self, hostname: &Hostname, route: Option<Route>) {
        let before = self.routes.get(hostname).map(|r| r.backends.clone());
        for backend in before.into_iter().flatten() {
            if let Some(mut left) = self.hostnames.get(&backend.deployment).cloned() {
                left.remove(hostname);
                if left.is_empty() {
                    self.hostnames.remove_mut(&backend.deployment);
                } else {
                    self.hostnames.insert_mut(backend.deployment, left);
                }
            }
        }
        let Some(route) = route else {
            self.routes.remove_mut(hostname);
            return;
        };
        for backend in &route.backends {
            let known = self.hostnames.get(&backend.deployment);
            let mut hostnames = known.cloned().unwrap_or_default();
            hostnames.insert(hostname.clone());
            self.hostnames.insert_mut(backend.deployment, hostnames);
        }
        self.routes.insert_mut(hostname.clone(), route);
    }

    fn take(&mut self, e: Switched, at: At) {
        self.table = e.table;
        self.trace = at.trace;
        for c in &e.changes {
            let route = (!c.next.is_empty()).then(|| Route {
                instance: e.instance.clone(),
                stickiness: c.stickiness,
                backends: c.next.clone(),
                table: e.table,
                since: at.time,
                reason: e.reason,
                by: at.id,
                previous: c.previous.clone(),
            });
            self.lead(&c.hostname, route);
        }
        let mut traffic = self.traffic(&e.instance).cloned().unwrap_or_default();
        traffic.rolled_back = e.rolled_back;
        if e.reason == SwitchReason::Rollback {
            pin_out(&mut traffic, &e);
        } else if !e.rolled_back {
            traffic.pinned_out.clear();
        }
        if let Some(domain) = &e.domain {
            self.domains
                .insert_mut(domain.hostname.clone(), domain.next.clone());
        }
        if let Some(policy) = &e.policy {
            let instance = e.instance.to_string();
            if policy.next == ClusterPolicy::Simple {
                self.policies.remove_mut(&instance);
            } else {
                self.policies.insert_mut(instance, policy.next.clone());
            }
        }
        if let Some(main) = &e.main {
            if e.reason == SwitchReason::Compensation {
                traffic.former.retain(|d| Some(*d) != main.next);
            } else if e.reason == SwitchReason::Rollback {
                // What was rolled back from is no version to go back to: a second rollback goes
                // further back, and never forward again.
                traffic.former.retain(|d| Some(*d) != main.next);
            } else if let Some(previous) = main.previous {
                traffic.former.retain(|d| *d != previous);
                traffic.former.push(previous);
                if traffic.former.len() > KEPT {
                    traffic.former.remove(0);
                }
            }
            traffic.main = main.next;
        }
        self.instances.insert_mut(e.instance.to_string(), traffic);
        self.recent.push_back(e);
        if self.recent.len() > KEPT {
            self.recent.pop_front();
        }
    }
}

/// Notes what was rolled back from: whatever had a part of the traffic.
fn pin_out(traffic: &mut InstanceTraffic, e: &Switched) {
    let routes = e.changes.iter();
    let moved = routes.filter(|c| c.stickiness >= Stickiness::Environment);
    let backends = moved.flat_map(|c| &c.previous).map(|b| b.deployment);
    let main = e.main.as_ref().and_then(|m| m.previous);
    for left in backends.chain(main) {
        traffic.pinned_out.retain(|d| *d != left);
        traffic.pinned_out.push(left);
    }
    traffic.pinned_out.retain(|d| *d != e.deployment);
    let excess = traffic.pinned_out.len().saturating_sub(KEPT);
    traffic.pinned_out.drain(..excess);
}

impl Aggregate for Routing {
    type Event = RoutingEvent;
    const KIND: AggregateKind = AggregateKind::Routing;

    fn first(event: RoutingEvent, at: At) -> Result<Self, Illegal> {
        let mut state = Self::default();
        state.apply(event, at)?;
        Ok(state)
    }

    fn apply(&mut self, event: RoutingEvent, at: At) -> Result<(), Illegal> {
        match event {
            RoutingEvent::Switched(e) => {
                if e.table != self.table + 1 {
                    return Err(Illegal::new(
                        "routing.switched.v1",
                        format!("table {}", self.table),
                    ));
                }
                self.take(*e, at);
            }
            RoutingEvent::Applied(e) => {
                let newest = self.applied.get(&e.gateway).copied().unwrap_or_default();
                let is_new = e.table > newest || (e.table == newest && self.is_news(&e));
                if !is_new || e.table == 0 || e.table > self.table {
                    return Err(Illegal::new(
                        "routing.applied.v1",
                        format!("table {newest} applied"),
                    ));
                }
                if let Some(addresses) = e.addresses {
                    self.addresses.insert(e.gateway.clone(), addresses);
                }
                if let Some(ingresses) = e.ingresses {
                    self.ingresses.insert(e.gateway.clone(), ingresses);
                }
                self.applied.insert(e.gateway, e.table);
            }
            RoutingEvent::Rejected(e) => {
                if e.table == 0 || e.table > self.table {
                    let kind = RoutingEvent::Rejected(e).kind();
                    return Err(Illegal::new(kind, format!("table {}", self.table)));
                }
                self.rejected.insert(e.gateway.clone(), e);
            }
        }
        Ok(())
    }
}

/// What is known of the deployment that a switch is about, from its own aggregate.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Target {
    /// The deployment.
    pub deployment: DeploymentId,
    /// Its instance.
    pub instance: InstanceRef,
    /// Where it is in its life.
    pub status: Status,
    /// Whether its workload is ready.
    pub ready: bool,
}

/// The hostnames that an instance or a deployment answers on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Hostnames {
    /// The deployment's own.
    pub preview: Hostname,
    /// The instance's.
    pub environment: Hostname,
    /// The live one, where the environment is the live one.
    pub live: Option<Hostname>,
    /// That of its branch, where it is the newest ready deployment of one.
    pub branch: Option<Hostname>,
}

/// What can be asked of a route table.
#[derive(Debug, Clone)]
pub enum Command {
    /// A deployment became ready: give it its preview address, and the instance's traffic too if
    /// `take_over` and the instance is not rolled back.
    Assign {
        /// The deployment.
        target: Target,
        /// Its addresses.
        hostnames: Hostnames,
        /// Whether it becomes the main one. The first of an instance always does.
        take_over: bool,
    },
    /// Make a deployment the main one, because somebody says so.
    MarkMain {
        /// The deployment.
        target: Target,
        /// Its addresses.
        hostnames: Hostnames,
        /// What the caller takes for the main one now; checked if given.
        expected_main: Option<DeploymentId>,
        /// Why.
        note: Option<String>,
    },
    /// Go back to a deployment, and let none take over by itself from here on.
    Rollback {
        /// The deployment to go back to.
        target: Target,
        /// Its addresses.
        hostnames: Hostnames,
        /// Why.
        note: Option<String>,
    },
    /// Spread the traffic of an instance, or of one of its hostnames, over deployments.
    Split(Split),
    /// Say how traffic is spread over clusters.
    SetPolicy(SetPolicy),
    /// Take a hostname in or out that its owner brought along.
    SetDomain(SetDomain),
    /// A deployment is being stopped: take it out of the routes that it shares with others. Those
    /// that lead to it alone stay, so that it has them when it is started again.
    Leave {
        /// The deployment.
        deployment: DeploymentId,
        /// Its instance.
        instance: InstanceRef,
        /// The newest other deployment of its branch that is ready: it gets the branch's address.
        heir: Option<Target>,
    },
    /// A deployment runs again, and is the newest ready one of its branch.
    FollowBranch {
        /// The deployment.
        target: Target,
        /// Its addresses.
        hostnames: Hostnames,
    },
    /// Take a deployment out of every route.
    Withdraw {
        /// The deployment.
        deployment: DeploymentId,
        /// Its instance.
        instance: InstanceRef,
        /// The newest other deployment of its branch that is ready: it gets the branch's address.
        heir: Option<Target>,
    },
    /// Undo a switch that could not be applied.
    Compensate {
        /// Its table.
        table: u32,
        /// Why.
        note: String,
    },
    /// A gateway applied a table.
    ReportApplied(Applied),
    /// A gateway could not.
    ReportRejected(Rejected),
}

/// Decides on a route table. A switch that changes nothing is not made.
pub fn decide(
    state: Option<&Routing>,
    command: Command,
) -> Result<Decision<RoutingEvent>, Refusal> {
    let empty = Routing::default();
    let state = state.unwrap_or(&empty);
    match command {
        Command::Assign {
            target,
            hostnames,
            take_over,
        } => {
            must_run(&target)?;
            let traffic = state.traffic(&target.instance);
            let rolled_back = traffic.is_some_and(|t| t.rolled_back);
            let first = traffic.is_none_or(|t| t.main.is_none());
            let main = (take_over && !rolled_back) || first;
            Ok(switch(
                state,
                SwitchReason::Deploy,
                &target,
                &hostnames,
                main,
                rolled_back,
                None,
            ))
        }
        Command::MarkMain {
            target,
            hostnames,
            expected_main,
            note,
        } => {
            must_run(&target)?;
            let main = state.traffic(&target.instance).and_then(|t| t.main);
            if expected_main.is_some() && expected_main != main {
                return Err(Refusal::new(
                    "main_changed",
                    match main {
                        Some(m) => format!("the main deployment is {m} by now"),
                        None => "there is no main deployment".to_owned(),
                    },
                    "look at `daybook status` and decide again",
                ));
            }
            Ok(switch(
                state,
                SwitchReason::MarkMain,
                &target,
                &hostnames,
                true,
                false,
                note,
            ))
        }
        Command::Rollback {
            target,
            hostnames,
            note,
        } => {
            must_run(&target)?;
            let traffic = state.traffic(&target.instance);
            if let Some(traffic) = traffic {
                traffic.must_not_be_pinned_out(&target)?;
            }
            match traffic.and_then(|t| t.main) {
                None => Err(Refusal::new(
                    "nothing_to_roll_back",
                    "the service has no main deployment in this environment",
                    "deploy something first",
                )),
                Some(m)
                    if m == target.deployment && !state.is_split(&target.instance, &hostnames) =>
                {
                    Err(Refusal::new(
                        "already_main",
                        "the deployment to go back to is the main one already",
                        "name an older one with `daybook rollback --to ID`; `daybook history` lists them",
                    ))
                }
                Some(_) => Ok(switch(
                    state,
                    SwitchReason::Rollback,
                    &target,
                    &hostnames,
                    true,
                    true,
                    note,
                )),
            }
        }
        Command::Split(split) => split::decide(state, split),
        Command::SetDomain(set) => domain::decide(state, set),
        Command::SetPolicy(set) => policy::decide(state, set),
        Command::Leave {
            deployment,
            instance,
            heir,
        } => {
            let reason = SwitchReason::Leave;
            Ok(take_out(state, deployment, instance, heir, reason))
        }
        Command::FollowBranch { target, hostnames } => {
            must_run(&target)?;
            Ok(follow_branch(state, target, hostnames))
        }
        Command::Withdraw {
            deployment,
            instance,
            heir,
        } => {
            let reason = SwitchReason::Withdraw;
            Ok(take_out(state, deployment, instance, heir, reason))
        }
        Command::Compensate { table, note } => compensation::decide(state, table, note),
        Command::ReportApplied(mut e) => {
            let newest = state.applied.get(&e.gateway).copied().unwrap_or_default();
            if !state.moves(&e) {
                e.addresses = None;
            }
            if !state.meets(&e) {
                e.ingresses = None;
            }
            if e.table < newest || (e.table == newest && !state.is_news(&e)) {
                Ok(Decision::Nothing)
            } else {
                known(state, e.table)?;
                Ok(Decision::Append(RoutingEvent::Applied(e)))
            }
        }
        Command::ReportRejected(e) => {
            if state.rejected.get(&e.gateway) == Some(&e) {
                Ok(Decision::Nothing)
            } else {
                known(state, e.table)?;
                Ok(Decision::Append(RoutingEvent::Rejected(e)))
            }
        }
    }
}

/// Refuses a table that was never made.
fn known(state: &Routing, table: u32) -> Result<(), Refusal> {
    if (1..=state.table).contains(&table) {
        return Ok(());
    }
    Err(Refusal::new(
        "table_unknown",
        format!("table {table} does not exist"),
        "this is a defect of Daybook; please report it",
    ))
}

/// Leads the address of a branch to a deployment.
fn follow_branch(state: &Routing, target: Target, hostnames: Hostnames) -> Decision<RoutingEvent> {
    let next = vec![Backend {
        deployment: target.deployment,
        weight: 100,
    }];
    let branch = hostnames.branch;
    let Some(hostname) = branch.filter(|h| state.is_branch_of(h, &target.instance)) else {
        return Decision::Nothing;
    };
    let route = state.routes.get(&hostname);
    let previous = route.map_or_else(Vec::new, |r| r.backends.clone());
    if previous == next {
        return Decision::Nothing;
    }
    let traffic = state.traffic(&target.instance);
    let rolled_back = traffic.is_some_and(|t| t.rolled_back);
    Decision::Append(RoutingEvent::Switched(Box::new(Switched {
        table: state.table + 1,
        reason: SwitchReason::Branch,
        instance: target.instance,
        deployment: target.deployment,
        changes: vec![RouteChange {
            hostname,
            stickiness: Stickiness::Branch,
            previous,
            next,
        }],
        main: None,
        rolled_back,
        was_rolled_back: rolled_back,
        undoes: None,
        note: None,
        policy: None,
        domain: None,
    })))
}

/// Takes a deployment out of all routes, or only out of those that it shares with others. If it
/// was the main one and others are left, the one with the largest share is the main one then.
fn take_out(
    state: &Routing,
    deployment: DeploymentId,
    instance: InstanceRef,
    heir: Option<Target>,
    reason: SwitchReason,
) -> Decision<RoutingEvent> {
    let heir = heir
        .filter(|h| h.deployment != deployment && h.instance == instance && must_run(h).is_ok());
    let traffic = state.traffic(&instance).cloned().unwrap_or_default();
    let routes = state.hostnames_of(deployment).into_iter();
    let changes = routes.map(|(hostname, route)| {
        let others = route.backends.iter();
        let others = others.filter(|b| b.deployment != deployment);
        let mut next: Vec<_> = others.cloned().collect();
        if let (Stickiness::Branch, true, Some(heir)) = (route.stickiness, next.is_empty(), &heir) {
            next.push(Backend {
                deployment: heir.deployment,
                weight: 100,
            });
        }
        RouteChange {
            hostname: hostname.clone(),
            stickiness: route.stickiness,
            previous: route.backends.clone(),
            next,
        }
    });
    let changes: Vec<_> = changes
        .filter(|c| reason == SwitchReason::Withdraw || !c.next.is_empty())
        .collect();
    let heir = changes
        .iter()
        .filter(|c| c.stickiness >= Stickiness::Environment)
        .find_map(|c| split::largest(&c.next));
    let leaves = reason == SwitchReason::Withdraw || heir.is_some();
    let was_main = traffic.main == Some(deployment) && leaves;
    if changes.is_empty() && !was_main {
        return Decision::Nothing;
    }
    Decision::Append(RoutingEvent::Switched(Box::new(Switched {
        table: state.table + 1,
        reason,
        instance,
        deployment,
        changes,
        main: was_main.then_some(MainChange {
            previous: traffic.main,
            next: heir,
        }),
        rolled_back: traffic.rolled_back && !(was_main && heir.is_none()),
        was_rolled_back: traffic.rolled_back,
        undoes: None,
        note: None,
        policy: None,
        domain: None,
    })))
}

fn must_run(target: &Target) -> Result<(), Refusal> {
    let runs = [Status::Deploying, Status::Started, Status::PartiallyStarted];
    if !runs.contains(&target.status) {
        let remedy = match target.status {
            Status::Stopped => "start it first with `daybook start`",
            s if s.in_pipeline() => "wait until it is started",
            _ => "deploy that version again; `daybook history` lists what can be deployed",
        };
        return Err(Refusal::new(
            "target_not_running",
            format!(
                "deployment {} is {}, so it cannot take traffic",
                target.deployment,
                target.status.as_str()
            ),
            remedy,
        ));
    }
    if !target.ready {
        return Err(Refusal::new(
            "target_not_ready",
            format!("deployment {} runs, but is not ready", target.deployment),
            "look at `daybook status` for the cause",
        ));
    }
    Ok(())
}

fn switch(
    state: &Routing,
    reason: SwitchReason,
    target: &Target,
    hostnames: &Hostnames,
    main: bool,
    rolled_back: bool,
    note: Option<String>,
) -> Decision<RoutingEvent> {
    let next = vec![Backend {
        deployment: target.deployment,
        weight: 100,
    }];
    let mut wanted = vec![(hostnames.preview.clone(), Stickiness::Deployment)];
    if main {
        wanted.extend(state.moving(&target.instance, hostnames));
    }
    if let Some(branch) = &hostnames.branch
        && state.is_branch_of(branch, &target.instance)
    {
        wanted.push((branch.clone(), Stickiness::Branch));
    }
    let changes: Vec<_> = wanted
        .into_iter()
        .filter_map(|(hostname, stickiness)| {
            let previous = state
                .routes
                .get(&hostname)
                .map(|r| r.backends.clone())
                .unwrap_or_default();
            (previous != next).then(|| RouteChange {
                hostname,
                stickiness,
                previous,
                next: next.clone(),
            })
        })
        .collect();
    let traffic = state.traffic(&target.instance).cloned().unwrap_or_default();
    let main = (main && traffic.main != Some(target.deployment)).then_some(MainChange {
        previous: traffic.main,
        next: Some(target.deployment),
    });
    if changes.is_empty() && main.is_none() && traffic.rolled_back == rolled_back {
        return Decision::Nothing;
    }
    Decision::Append(RoutingEvent::Switched(Box::new(Switched {
        table: state.table + 1,
        reason,
        instance: target.instance.clone(),
        deployment: target.deployment,
        changes,
        main,
        rolled_back,
        was_rolled_back: traffic.rolled_back,
        undoes: None,
        note,
        policy: None,
        domain: None,
    })))
}

impl Hostnames {
    /// The addresses of a deployment under a domain, such as `localhost`.
    ///
    /// Every name is a label of its own, so that different instances never share an address:
    /// `<service>.<project>.<domain>` is live, `<service>.<environment>.<project>.<domain>` is an
    /// environment's, and `<short id>.<service>.<environment>.<project>.<domain>` a preview.
    pub fn under(
        domain: &Hostname,
        instance: &InstanceRef,
        deployment: DeploymentId,
        live: bool,
    ) -> Result<Self, crate::names::InvalidName> {
        let InstanceRef {
            project,
            environment,
            service,
        } = instance;
        let short = deployment.short();
        Ok(Self {
            preview: Hostname::parse(format!(
                "{short}.{service}.{environment}.{project}.{domain}"
            ))?,
            environment: Hostname::parse(format!("{service}.{environment}.{project}.{domain}"))?,
            live: live
                .then(|| Hostname::parse(format!("{service}.{project}.{domain}")))
                .transpose()?,
            branch: None,
        })
    }

    /// The same with the address of a branch, `<branch>.<service>.<environment>.<project>.<domain>`.
    ///
    /// It is a sibling of the preview addresses, and never one of them: see [`branch_label`].
    pub fn with_branch(self, branch: &GitRef) -> Result<Self, crate::names::InvalidName> {
        let label = branch_label(branch);
        let branch = Some(Hostname::parse(format!("{label}.{}", self.environment))?);
        Ok(Self { branch, ..self })
    }
}
