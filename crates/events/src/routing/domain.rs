//! Hostnames that their owners brought along, in the route table of a project.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{Hostnames, RouteChange, Routing, RoutingEvent, Stickiness, SwitchReason, Switched};
use crate::aggregate::Decision;
use crate::names::{DeploymentId, Hostname, InstanceRef};

/// A hostname that was taken in, or was.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct DomainRoute {
    /// The instance.
    pub instance: InstanceRef,
    /// Whether it moves with the main deployment of the instance (`environment`), or with that of
    /// the service in the live environment (`live`).
    pub stickiness: Stickiness,
    /// The number of its claim.
    pub claim: u32,
    /// Whether it is in the table. A claim whose hostname was taken out never comes back.
    pub attached: bool,
}

/// A hostname is taken in or out.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct DomainChange {
    /// The hostname.
    pub hostname: Hostname,
    /// What it is from here on.
    pub next: DomainRoute,
}

impl DomainChange {
    /// What undoes it: a hostname that could not be taken in stays out.
    pub(super) fn undone(&self) -> Option<Self> {
        let undone = Self {
            hostname: self.hostname.clone(),
            next: DomainRoute {
                attached: false,
                ..self.next.clone()
            },
        };
        self.next.attached.then_some(undone)
    }
}

/// A hostname to be taken in or out.
#[derive(Debug, Clone)]
pub struct SetDomain {
    /// The hostname.
    pub hostname: Hostname,
    /// Its instance.
    pub instance: InstanceRef,
    /// What it sticks to.
    pub stickiness: Stickiness,
    /// The number of its claim.
    pub claim: u32,
    /// The addresses of the instance; none takes it out.
    pub attach: Option<Hostnames>,
}

/// Decides on a hostname, by the number of its claim: what belongs to a claim that was taken out
/// before, or to an older one, changes nothing.
pub(super) fn decide(state: &Routing, set: SetDomain) -> Decision<RoutingEvent> {
    let known = state.domains.get(&set.hostname);
    let stale = known.is_some_and(|d| {
        set.claim < d.claim || (set.claim == d.claim && (!d.attached || set.attach.is_some()))
    });
    if stale {
        return Decision::Nothing;
    }
    let traffic = state.traffic(&set.instance).cloned().unwrap_or_default();
    let leads_to = |h: &Hostname| state.routes.get(h).map(|r| r.backends.clone());
    let previous = leads_to(&set.hostname).unwrap_or_default();
    // It joins the traffic as that is now.
    let next = set.attach.as_ref().and_then(|names| match set.stickiness {
        Stickiness::Live => leads_to(names.live.as_ref()?),
        _ => leads_to(&names.environment),
    });
    let next = next.unwrap_or_default();
    let changes = (previous != next).then(|| RouteChange {
        hostname: set.hostname.clone(),
        stickiness: set.stickiness,
        previous,
        next,
    });
    let domain = DomainChange {
        hostname: set.hostname,
        next: DomainRoute {
            instance: set.instance.clone(),
            stickiness: set.stickiness,
            claim: set.claim,
            attached: set.attach.is_some(),
        },
    };
    Decision::Append(RoutingEvent::Switched(Box::new(Switched {
        table: state.table + 1,
        reason: SwitchReason::Domain,
        deployment: traffic.main.unwrap_or(DeploymentId(uuid::Uuid::nil())),
        instance: set.instance,
        changes: changes.into_iter().collect(),
        main: None,
        rolled_back: traffic.rolled_back,
        was_rolled_back: traffic.rolled_back,
        undoes: None,
        note: None,
        policy: None,
        domain: Some(domain),
    })))
}

impl Routing {
    /// The hostnames that were taken in, of an instance and, if it is in the live environment, of
    /// its service there.
    pub(super) fn domains_of<'a>(
        &'a self,
        instance: &'a InstanceRef,
        live: bool,
    ) -> impl Iterator<Item = (&'a Hostname, Stickiness)> {
        let wanted = move |d: &DomainRoute| match d.stickiness {
            Stickiness::Live => live && d.instance.service == instance.service,
            _ => d.instance == *instance,
        };
        let domains = self
            .domains
            .iter()
            .filter(move |(_, d)| d.attached && wanted(d));
        domains.map(|(hostname, d)| (hostname, d.stickiness))
    }

    /// A hostname that was taken in.
    pub fn domain(&self, hostname: &Hostname) -> Option<&DomainRoute> {
        self.domains.get(hostname).filter(|d| d.attached)
    }
}
