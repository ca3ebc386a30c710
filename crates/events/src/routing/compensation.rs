//! A switch that could not be applied is undone by another one.

use super::{
    DomainChange, MainChange, PolicyChange, RouteChange, Routing, RoutingEvent, Stickiness,
    SwitchReason, Switched,
};
use crate::aggregate::{Decision, Refusal};
use crate::names::Hostname;

impl Routing {
    /// The table to undo where a gateway refuses a hostname: the newest that led it somewhere else,
    /// unless this gateway has applied that one already, or it is none that can be undone. What
    /// else was switched has nothing to do with the refusal.
    pub fn undoable(&self, gateway: &str, hostname: &Hostname) -> Option<u32> {
        let led = |s: &&Switched| {
            let mut changes = s.changes.iter();
            changes.any(|c| c.hostname == *hostname && c.previous != c.next)
        };
        let switch = self.recent.iter().rev().find(led)?;
        let applied = self.applied.get(gateway).copied().unwrap_or_default();
        (switch.table > applied && can_be_undone(switch)).then_some(switch.table)
    }
}

/// Whether a switch can be undone. One that restores what was before cannot: the two would undo
/// each other for as long as the gateway refuses. Nor can one that takes out what is going: traffic
/// would be led to what stops.
fn can_be_undone(switch: &Switched) -> bool {
    !matches!(
        switch.reason,
        SwitchReason::Compensation | SwitchReason::Withdraw | SwitchReason::Leave
    )
}

/// Decides on undoing the switch that made `table`, if it can be undone. Only what still is as that
/// switch left it is restored: what was decided later stands.
pub(super) fn decide(
    state: &Routing,
    table: u32,
    note: String,
) -> Result<Decision<RoutingEvent>, Refusal> {
    let Some(bad) = state.recent.iter().find(|s| s.table == table) else {
        return Err(Refusal::new(
            "switch_unknown",
            format!("table {table} is not among the newest switches"),
            "switch explicitly with `daybook mark-main`",
        ));
    };
    let is_undone = state.recent.iter().any(|s| s.undoes == Some(table));
    if is_undone || !can_be_undone(bad) {
        return Ok(Decision::Nothing);
    }
    let domain = domain(state, bad);
    let changes = changes(state, bad, domain.as_ref());
    let traffic = state.traffic(&bad.instance).cloned().unwrap_or_default();
    let main = bad.main.as_ref().filter(|m| m.next == traffic.main);
    let main = main.map(|m| MainChange {
        previous: m.next,
        next: m.previous,
    });
    let policy = bad.policy.as_ref();
    let policy = policy.filter(|p| p.next == *state.policy(&bad.instance));
    if changes.is_empty() && main.is_none() && domain.is_none() && policy.is_none() {
        return Ok(Decision::Nothing);
    }
    let decided_since = |s: &Switched| s.table > table && s.instance == bad.instance;
    let decided_since = state.recent.iter().any(decided_since);
    let undo = Switched {
        table: state.table + 1,
        reason: SwitchReason::Compensation,
        instance: bad.instance.clone(),
        deployment: bad.deployment,
        changes,
        main,
        rolled_back: if decided_since {
            traffic.rolled_back
        } else {
            bad.was_rolled_back
        },
        was_rolled_back: traffic.rolled_back,
        undoes: Some(table),
        note: Some(note),
        policy: policy.map(PolicyChange::reversed),
        domain,
    };
    Ok(Decision::Append(RoutingEvent::Switched(Box::new(undo))))
}

/// A hostname that the bad switch took in is taken out, unless it is another claim's by now.
fn domain(state: &Routing, bad: &Switched) -> Option<DomainChange> {
    let taken_in = bad.domain.as_ref()?;
    let known = state.domains.get(&taken_in.hostname);
    let still = known == Some(&taken_in.next);
    still.then(|| taken_in.undone())?
}

fn changes(state: &Routing, bad: &Switched, domain: Option<&DomainChange>) -> Vec<RouteChange> {
    let leads_to = |hostname: &Hostname| {
        let route = state.routes.get(hostname);
        route.map_or(&[][..], |r| &r.backends[..])
    };
    // The hostname that the bad switch took in or out is looked at apart: it may be another
    // claim's by now.
    let is_out = |hostname: &Hostname| {
        let taken = bad.domain.as_ref();
        taken.is_some_and(|d| d.hostname == *hostname)
    };
    let stands = bad
        .changes
        .iter()
        .filter(|c| leads_to(&c.hostname) == c.next);
    let mut changes: Vec<_> = stands
        .filter(|c| !is_out(&c.hostname))
        .map(|c| RouteChange {
            hostname: c.hostname.clone(),
            stickiness: c.stickiness,
            previous: c.next.clone(),
            next: c.previous.clone(),
        })
        .collect();
    // What joined since, and follows an address that goes back, goes back with it.
    let live = bad.changes.iter().any(|c| c.stickiness == Stickiness::Live);
    for (hostname, stickiness) in state.domains_of(&bad.instance, live) {
        let leader = changes.iter().find(|c| {
            c.stickiness == stickiness
                && c.previous == leads_to(hostname)
                && state.domain(&c.hostname).is_none()
        });
        let known = bad.changes.iter().any(|c| c.hostname == *hostname);
        if let (Some(leader), false, false) = (leader, known, is_out(hostname)) {
            let joined = RouteChange {
                hostname: hostname.clone(),
                ..leader.clone()
            };
            changes.push(joined);
        }
    }
    // What is taken out leads nowhere, wherever later switches have led it.
    if let Some(domain) = domain
        && let Some(route) = state.routes.get(&domain.hostname)
    {
        changes.push(RouteChange {
            hostname: domain.hostname.clone(),
            stickiness: route.stickiness,
            previous: route.backends.clone(),
            next: Vec::new(),
        });
    }
    changes
}
