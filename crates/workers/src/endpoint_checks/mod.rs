//! Looks at an address as a user would: asks a nameserver for it, shakes hands with what is there,
//! and asks for a page. Each is a plane of its own ([`Plane`]), and says for itself what it found.
//!
//! Nothing of the system is asked: which nameserver, which addresses are right, and which
//! certificates are trusted is what an operator says, for the domains that they name. Of other
//! hostnames nothing is asked at all.

mod dns;
mod web;

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use daybook_events::deployment::{Plane, PlaneSeen, PlaneState};
use daybook_events::{DeploymentId, Hostname};
use rustls::RootCertStore;

/// The header by which a gateway says which deployment has answered.
pub const DEPLOYMENT_HEADER: &str = "x-daybook-deployment";

/// The reason of a plane that nobody has asked to look at.
pub const NOT_CONFIGURED: &str = "NotConfigured";

/// Texts that come from outside are cut to so many characters.
const TEXT_MAX: usize = 300;

/// Which addresses are looked at, how, and how often.
#[derive(Debug, Clone)]
pub struct EndpointChecks {
    /// Between two looks at the same address.
    pub every: Duration,
    /// How long each step of a look may take: a question to a nameserver, a connection, a
    /// handshake, an answer.
    pub timeout: Duration,
    /// The domains. Of two that a hostname is below, the longer one counts.
    pub domains: Vec<DomainChecks>,
}

/// How the addresses of a domain are looked at.
#[derive(Debug, Clone)]
pub struct DomainChecks {
    /// The hostname itself, and all below it.
    pub domain: Hostname,
    /// What its names should resolve to, if that is looked at.
    pub dns: Option<DnsCheck>,
    /// What should answer there, if that is looked at.
    pub web: Option<WebCheck>,
}

/// What names should resolve to.
#[derive(Debug, Clone)]
pub struct DnsCheck {
    /// The nameservers that are asked; never none.
    pub nameservers: Vec<SocketAddr>,
    /// The addresses that are right; any if there is none.
    pub addresses: BTreeSet<IpAddr>,
    /// The name that they should be an alias of, in one step or several.
    pub cname: Option<Hostname>,
}

/// What should answer.
#[derive(Debug, Clone)]
pub struct WebCheck {
    /// Its port.
    pub port: u16,
    /// The addresses to connect to; those that the name resolves to if there is none.
    pub connect: Vec<IpAddr>,
    /// Which certificates are right; none for plain HTTP.
    pub tls: Option<TlsCheck>,
}

/// Which certificates are right.
#[derive(Debug, Clone)]
pub struct TlsCheck {
    /// Who may have issued them.
    pub roots: Arc<RootCertStore>,
    /// How long before its end a certificate is said to end soon.
    pub warn: Duration,
}

/// An address, and who should answer there.
#[derive(Debug, Clone)]
pub struct Address {
    /// The hostname.
    pub hostname: Hostname,
    /// The path that is asked for.
    pub path: String,
    /// The deployments that it leads to.
    pub deployments: Vec<DeploymentId>,
}

impl Address {
    /// Who should answer, as a text.
    pub fn expected(&self) -> String {
        let all: Vec<_> = self.deployments.iter().map(ToString::to_string).collect();
        cut(&all.join(", "))
    }
}

impl EndpointChecks {
    /// How an address is looked at, if it is.
    pub fn of(&self, hostname: &Hostname) -> Option<&DomainChecks> {
        let covers = |checks: &&DomainChecks| {
            let rest = hostname.as_str().strip_suffix(checks.domain.as_str());
            rest.is_some_and(|rest| rest.is_empty() || rest.ends_with('.'))
        };
        let covering = self.domains.iter().filter(covers);
        covering.max_by_key(|checks| checks.domain.as_str().len())
    }

    /// Looks at an address on the planes that take a network: DNS, TLS and HTTP, in this order.
    /// Takes as long as the steps may take, at most.
    pub async fn look(&self, checks: &DomainChecks, address: &Address) -> Vec<PlaneSeen> {
        let (dns, resolved) = match &checks.dns {
            Some(check) => dns::look(check, &address.hostname, self.timeout).await,
            None => (not_configured(Plane::Dns), Vec::new()),
        };
        let Some(web) = &checks.web else {
            return vec![dns, not_configured(Plane::Tls), not_configured(Plane::Http)];
        };
        let to = match web.connect.is_empty() {
            true => resolved,
            false => web.connect.clone(),
        };
        let (tls, http) = web::look(web, address, &to, self.timeout).await;
        vec![dns, tls, http]
    }
}

fn not_configured(plane: Plane) -> PlaneSeen {
    PlaneSeen::new(plane, PlaneState::Unknown, NOT_CONFIGURED)
}

/// A plane that could not be asked, because another one is in the way.
fn not_asked(plane: Plane, why: &str) -> PlaneSeen {
    PlaneSeen {
        message: Some(why.to_owned()),
        ..PlaneSeen::new(plane, PlaneState::Unknown, "NotAsked")
    }
}

fn failing(plane: Plane, reason: &str, message: impl Into<String>) -> PlaneSeen {
    PlaneSeen {
        message: Some(cut(&message.into())),
        ..PlaneSeen::new(plane, PlaneState::Failing, reason)
    }
}

/// A text from outside, made fit to be kept: without control characters, and not too long.
pub(crate) fn cut(text: &str) -> String {
    let printable = text.chars().filter(|c| !c.is_control());
    printable.take(TEXT_MAX).collect()
}

/// Several things in one text, each once, in order.
fn listed<T: ToString>(all: impl IntoIterator<Item = T>) -> String {
    let all: BTreeSet<String> = all.into_iter().map(|one| one.to_string()).collect();
    cut(&all.into_iter().collect::<Vec<_>>().join(", "))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_longest_domain_counts_and_no_name_that_only_ends_alike() {
        let domain = |name: &str| DomainChecks {
            domain: name.parse().unwrap(),
            dns: None,
            web: None,
        };
        let checks = EndpointChecks {
            every: Duration::from_secs(1),
            timeout: Duration::from_secs(1),
            domains: vec![domain("example.com"), domain("shop.example.com")],
        };
        let of = |name: &str| {
            let found = checks.of(&name.parse().unwrap());
            found.map(|checks| checks.domain.to_string())
        };
        assert_eq!(of("example.com").as_deref(), Some("example.com"));
        assert_eq!(of("www.example.com").as_deref(), Some("example.com"));
        let shop = Some("shop.example.com");
        assert_eq!(of("shop.example.com").as_deref(), shop);
        assert_eq!(of("a.b.shop.example.com").as_deref(), shop);
        assert_eq!(of("workshop.example.com").as_deref(), Some("example.com"));
        assert_eq!(of("anexample.com"), None);
        assert_eq!(of("com"), None);
    }

    #[test]
    fn what_comes_from_outside_is_short_and_printable() {
        assert_eq!(cut("a\u{1b}[31mb\n"), "a[31mb");
        assert_eq!(cut(&"x".repeat(9999)).len(), TEXT_MAX);
        assert_eq!(listed(["b", "a", "b"]), "a, b");
    }
}
