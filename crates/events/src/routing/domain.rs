//! Hostnames that their owners brought along, in the route table of a project.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{Hostnames, RouteChange, Routing, RoutingEvent, Stickiness, SwitchReason, Switched};
use crate::aggregate::{Decision, Refusal};
use crate::names::{DeploymentId, Hostname, InstanceRef};

/// The most hostnames that move with one main deployment beside its own addresses. A switch names
/// them all in one event, each with up to sixteen deployments before and after.
pub const DOMAINS_MAX: usize = 16;

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
/// before, or to an older one, changes nothing. An address that Daybook gave itself stays what it
/// is.
pub(super) fn decide(state: &Routing, set: SetDomain) -> Result<Decision<RoutingEvent>, Refusal> {
    let known = state.domains.get(&set.hostname);
    let stale = known.is_some_and(|d| {
        set.claim < d.claim || (set.claim == d.claim && (!d.attached || set.attach.is_some()))
    });
    if stale {
        return Ok(Decision::Nothing);
    }
    if set.attach.is_some() {
        must_fit(state, &set)?;
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
    Ok(Decision::Append(RoutingEvent::Switched(Box::new(
        Switched {
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
        },
    ))))
}

fn must_fit(state: &Routing, set: &SetDomain) -> Result<(), Refusal> {
    let SetDomain {
        hostname, instance, ..
    } = set;
    if state.domain(hostname).is_none()
        && let Some(route) = state.routes.get(hostname)
    {
        return Err(Refusal::new(
            "hostname_reserved",
            format!(
                "{hostname} is an address that Daybook gave to {}",
                route.instance
            ),
            "bring a hostname of a domain of yours, such as www.example.com",
        ));
    }
    let live = set.stickiness == Stickiness::Live;
    let others = state.domains_of(instance, live);
    if others.filter(|(h, _)| *h != hostname).count() >= DOMAINS_MAX {
        return Err(Refusal::new(
            "too_many_domains",
            format!("{instance} has {DOMAINS_MAX} hostnames of its own already"),
            "remove one with `daybook domain remove`, or put a proxy in front of the gateway",
        ));
    }
    Ok(())
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
