//! How the traffic of an instance is spread over the clusters that it runs in.

use std::collections::{BTreeMap, BTreeSet};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{Hostnames, RouteChange, Routing, RoutingEvent, SwitchReason, Switched};
use crate::aggregate::{Decision, Refusal};
use crate::names::{ClusterName, InstanceRef};

/// How the clusters that a deployment runs in share its traffic. A cluster without a ready
/// instance never gets any.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum ClusterPolicy {
    /// All alike.
    #[default]
    Simple,
    /// By weight. A cluster that has none here is used only while no other has a ready instance.
    Weighted(BTreeMap<ClusterName, u32>),
    /// The first of them that has a ready instance; those that are not named come last.
    Failover(Vec<ClusterName>),
    /// The one that answers fastest, as the gateway measures it.
    Latency,
}

/// The largest weight of a cluster.
const WEIGHT_MAX: u32 = 10_000;
/// The most clusters that a policy names.
const CLUSTERS_MAX: usize = 64;

impl ClusterPolicy {
    /// The policy in a word.
    pub fn as_str(&self) -> &'static str {
        match self {
            Self::Simple => "simple",
            Self::Weighted(_) => "weighted",
            Self::Failover(_) => "failover",
            Self::Latency => "latency",
        }
    }

    /// Refuses a policy that says nothing, or something twice.
    pub fn check(&self) -> Result<(), Refusal> {
        let invalid = |message: &str| {
            Err(Refusal::new(
                "invalid_policy",
                message.to_owned(),
                "`daybook routes policy --help` shows how each policy is written",
            ))
        };
        match self {
            Self::Simple | Self::Latency => Ok(()),
            Self::Weighted(weights) if weights.len() > CLUSTERS_MAX => {
                invalid("a policy names at most 64 clusters")
            }
            Self::Weighted(weights) if weights.values().any(|w| *w > WEIGHT_MAX) => {
                invalid("the weight of a cluster is at most 10000")
            }
            Self::Weighted(weights) if weights.values().all(|w| *w == 0) => {
                invalid("no cluster has a weight")
            }
            Self::Failover(order) if order.is_empty() => invalid("no cluster is named"),
            Self::Failover(order) if order.len() > CLUSTERS_MAX => {
                invalid("a policy names at most 64 clusters")
            }
            Self::Failover(order) if order.iter().collect::<BTreeSet<_>>().len() != order.len() => {
                invalid("a cluster is named twice")
            }
            Self::Weighted(_) | Self::Failover(_) => Ok(()),
        }
    }
}

/// A policy and the one before it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct PolicyChange {
    /// Before.
    pub previous: ClusterPolicy,
    /// After.
    pub next: ClusterPolicy,
}

impl PolicyChange {
    pub(super) fn reversed(&self) -> Self {
        Self {
            previous: self.next.clone(),
            next: self.previous.clone(),
        }
    }
}

/// How traffic is to be spread over clusters.
#[derive(Debug, Clone)]
pub struct SetPolicy {
    /// The instance.
    pub instance: InstanceRef,
    /// Its addresses.
    pub hostnames: Hostnames,
    /// The policy.
    pub policy: ClusterPolicy,
    /// Why.
    pub note: Option<String>,
}

/// Decides on a policy.
pub(super) fn decide(state: &Routing, set: SetPolicy) -> Result<Decision<RoutingEvent>, Refusal> {
    set.policy.check()?;
    let previous = state.policy(&set.instance).clone();
    if previous == set.policy {
        return Ok(Decision::Nothing);
    }
    let traffic = state.traffic(&set.instance).cloned().unwrap_or_default();
    let Some(main) = traffic.main else {
        return Err(Refusal::new(
            "nothing_routed",
            format!("{} has no main deployment yet", set.instance),
            "deploy something first",
        ));
    };
    // The gateways look at the routes that a switch names.
    let moving = state.moving(&set.instance, &set.hostnames).into_iter();
    let changes = moving.filter_map(|(hostname, stickiness)| {
        let backends = state.routes.get(&hostname)?.backends.clone();
        Some(RouteChange {
            hostname,
            stickiness,
            previous: backends.clone(),
            next: backends,
        })
    });
    Ok(Decision::Append(RoutingEvent::Switched(Box::new(
        Switched {
            table: state.table + 1,
            reason: SwitchReason::Policy,
            changes: changes.collect(),
            deployment: main,
            main: None,
            rolled_back: traffic.rolled_back,
            was_rolled_back: traffic.rolled_back,
            undoes: None,
            note: set.note,
            policy: Some(PolicyChange {
                previous,
                next: set.policy,
            }),
            domain: None,
            instance: set.instance,
        },
    ))))
}
