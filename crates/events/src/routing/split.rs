//! Several deployments share the traffic of an instance: a canary, or a slow switch.

use std::collections::BTreeSet;

use super::{
    Backend, Hostnames, MainChange, RouteChange, Routing, RoutingEvent, Stickiness, SwitchReason,
    Switched, Target, must_run,
};
use crate::aggregate::{Decision, Refusal};
use crate::names::{DeploymentId, Hostname, InstanceRef};

/// The largest weight of a share.
const WEIGHT_MAX: u32 = 10_000;
/// The most deployments that share an instance's traffic.
pub const SHARES_MAX: usize = 16;

/// A deployment's part of the traffic.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Share {
    /// The deployment.
    pub target: Target,
    /// Its weight, relative to those of the others: 1 to 10,000.
    pub weight: u32,
}

/// Which deployments are to share the traffic of an instance.
#[derive(Debug, Clone)]
pub struct Split {
    /// The instance.
    pub instance: InstanceRef,
    /// Its addresses.
    pub hostnames: Hostnames,
    /// Only this one of them; all that move with the main deployment if none is named.
    pub only: Option<Hostname>,
    /// The deployments.
    pub shares: Vec<Share>,
    /// The table that the caller decided on: if one of the hostnames was switched after it,
    /// nothing is done.
    pub expected_table: Option<u32>,
    /// Why.
    pub note: Option<String>,
}

/// Decides on a split. It leaves the pin of a rollback as it is, and a deployment that was rolled
/// back from gets nothing.
pub(super) fn decide(state: &Routing, split: Split) -> Result<Decision<RoutingEvent>, Refusal> {
    let Split {
        instance,
        hostnames,
        only,
        shares,
        expected_table,
        note,
    } = split;
    check_weights(&shares)?;
    let traffic = state.traffic(&instance).cloned().unwrap_or_default();
    for Share { target, .. } in &shares {
        if target.instance != instance {
            return Err(Refusal::new(
                "other_instance",
                format!(
                    "deployment {} belongs to {}, not to {instance}",
                    target.deployment, target.instance
                ),
                "name deployments of this instance; `daybook status` lists them",
            ));
        }
        must_run(target)?;
        traffic.must_not_be_pinned_out(target)?;
    }
    let routes = match only {
        Some(hostname) => vec![one(state, &instance, hostname)?],
        None => moving(state, &instance, &hostnames),
    };
    if routes.is_empty() {
        return Err(Refusal::new(
            "nothing_routed",
            format!("{instance} has no address that moves yet"),
            "deploy something first, or make a deployment the main one with `daybook mark-main`",
        ));
    }
    if let Some(expected) = expected_table {
        unchanged_since(state, &routes, expected)?;
    }
    let next: Vec<_> = shares
        .iter()
        .map(|share| Backend {
            deployment: share.target.deployment,
            weight: share.weight,
        })
        .collect();
    let whole = routes.len() == moving(state, &instance, &hostnames).len();
    let changes: Vec<_> = routes
        .into_iter()
        .filter_map(|(hostname, stickiness)| {
            let previous = state.routes.get(&hostname).map(|r| r.backends.clone());
            let previous = previous.unwrap_or_default();
            (previous != next).then(|| RouteChange {
                hostname,
                stickiness,
                previous,
                next: next.clone(),
            })
        })
        .collect();
    if changes.is_empty() {
        return Ok(Decision::Nothing);
    }
    let heir = largest(&next);
    let stays = traffic
        .main
        .is_some_and(|main| next.iter().any(|b| b.deployment == main));
    let main = (whole && !stays).then_some(MainChange {
        previous: traffic.main,
        next: heir,
    });
    let Some(deployment) = heir else {
        return Ok(Decision::Nothing);
    };
    Ok(Decision::Append(RoutingEvent::Switched(Box::new(
        Switched {
            table: state.table + 1,
            reason: SwitchReason::Split,
            instance,
            deployment,
            changes,
            main,
            rolled_back: traffic.rolled_back,
            was_rolled_back: traffic.rolled_back,
            undoes: None,
            note,
            policy: None,
            domain: None,
        },
    ))))
}

fn check_weights(shares: &[Share]) -> Result<(), Refusal> {
    let invalid = |message: String| {
        Refusal::new(
            "invalid_weights",
            message,
            "give each deployment once, with a weight from 1 to 10000: `--to ID=90 --to ID=10`",
        )
    };
    if shares.is_empty() {
        return Err(invalid("no deployment is named to take the traffic".into()));
    }
    if shares.len() > SHARES_MAX {
        return Err(invalid(format!(
            "{} deployments are named, and at most {SHARES_MAX} can share traffic",
            shares.len()
        )));
    }
    let mut seen = BTreeSet::new();
    for Share { target, weight } in shares {
        let id = target.deployment;
        if !seen.insert(id) {
            return Err(invalid(format!("deployment {id} is named twice")));
        }
        if !(1..=WEIGHT_MAX).contains(weight) {
            return Err(invalid(format!(
                "the weight of deployment {id} is {weight}"
            )));
        }
    }
    Ok(())
}

/// The routes that exist and move with the main deployment.
fn moving(
    state: &Routing,
    instance: &InstanceRef,
    hostnames: &Hostnames,
) -> Vec<(Hostname, Stickiness)> {
    let routed = |(hostname, stickiness): (Hostname, _)| {
        let routed = state.routes.contains_key(&hostname);
        routed.then_some((hostname, stickiness))
    };
    let moving = state.moving(instance, hostnames).into_iter();
    moving.filter_map(routed).collect()
}

fn one(
    state: &Routing,
    instance: &InstanceRef,
    hostname: Hostname,
) -> Result<(Hostname, Stickiness), Refusal> {
    let Some(route) = state.routes.get(&hostname) else {
        return Err(Refusal::new(
            "hostname_not_routed",
            format!("{instance} has no address {hostname}"),
            "`daybook routes list` shows the addresses of a project",
        ));
    };
    if route.instance != *instance {
        return Err(Refusal::new(
            "other_instance",
            format!("{hostname} is an address of {}", route.instance),
            "name an address of this instance; `daybook routes list` shows them",
        ));
    }
    let what = match route.stickiness {
        Stickiness::Environment | Stickiness::Live => return Ok((hostname, route.stickiness)),
        Stickiness::Deployment => "always leads to one deployment",
        Stickiness::Branch => "leads to the newest deployment of its branch",
    };
    Err(Refusal::new(
        "route_fixed",
        format!("{hostname} {what}"),
        "name an address of the service itself, or the instance",
    ))
}

fn unchanged_since(
    state: &Routing,
    routes: &[(Hostname, Stickiness)],
    expected: u32,
) -> Result<(), Refusal> {
    for (hostname, _) in routes {
        let table = state.routes.get(hostname).map_or(0, |r| r.table);
        if table > expected {
            return Err(Refusal::new(
                "routes_changed",
                format!("{hostname} was switched by table {table}, after table {expected}"),
                "look at `daybook routes list` and decide again",
            ));
        }
    }
    Ok(())
}

/// Whether an address that moves with the main deployment leads to anything but one deployment.
pub(super) fn is_split(state: &Routing, instance: &InstanceRef, hostnames: &Hostnames) -> bool {
    let traffic = moving(state, instance, hostnames);
    let mut routes = traffic.iter().filter_map(|(h, _)| state.routes.get(h));
    let Some(first) = routes.next() else {
        return false;
    };
    first.backends.len() > 1 || routes.any(|r| r.backends != first.backends)
}

/// The deployment with the largest share; the first of them, if there are several.
pub(super) fn largest(backends: &[Backend]) -> Option<DeploymentId> {
    let most = backends.iter().map(|b| b.weight).max()?;
    let largest = backends.iter().find(|b| b.weight == most);
    largest.map(|b| b.deployment)
}
