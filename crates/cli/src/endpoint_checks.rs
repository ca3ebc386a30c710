//! The file that says which addresses are looked at from where users are. All of it is checked
//! before a port is bound.

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use daybook_events::Hostname;
use daybook_workers::endpoint_checks::{
    DnsCheck, DomainChecks, EndpointChecks, TlsCheck, WebCheck,
};
use rustls::RootCertStore;
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject as _;
use serde::Deserialize;

use crate::exit::{Code, Failure};

/// A day, in seconds.
const DAY: u64 = 24 * 60 * 60;

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    /// Seconds between two looks at the same address.
    #[serde(default = "usual_every")]
    every: u64,
    /// Seconds that each step may take.
    #[serde(default = "usual_timeout")]
    timeout: u64,
    #[serde(default)]
    domain: Vec<Domain>,
}

fn usual_every() -> u64 {
    60
}

fn usual_timeout() -> u64 {
    5
}

fn usual_warn_days() -> u64 {
    21
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Domain {
    name: Hostname,
    #[serde(default)]
    nameservers: Vec<NameServer>,
    #[serde(default)]
    addresses: BTreeSet<IpAddr>,
    cname: Option<Hostname>,
    scheme: Option<Scheme>,
    port: Option<u16>,
    #[serde(default)]
    connect: Vec<IpAddr>,
    roots: Option<PathBuf>,
    warn_days: Option<u64>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Scheme {
    Http,
    Https,
}

/// An address, with the usual port if none is given.
#[derive(Debug, Clone, Copy, Deserialize)]
#[serde(untagged)]
enum NameServer {
    WithPort(SocketAddr),
    Usual(IpAddr),
}

impl NameServer {
    fn addr(self) -> SocketAddr {
        match self {
            Self::WithPort(addr) => addr,
            Self::Usual(ip) => SocketAddr::new(ip, 53),
        }
    }
}

/// Reads the file. Roots that it names are found from where it is.
///
/// # Errors
/// If it cannot be read, or does not say what is to be looked at.
pub fn read(path: &Path) -> Result<Arc<EndpointChecks>, Failure> {
    let unusable = |why: String| {
        Failure::new(
            Code::Usage,
            "endpoint_checks_unusable",
            format!("{}: {why}", path.display()),
        )
        .hint("docs/operating.md describes the file")
    };
    let text = std::fs::read_to_string(path).map_err(|e| unusable(e.to_string()))?;
    let folder = path.parent().unwrap_or(Path::new("."));
    let checks = parse(&text, folder).map_err(unusable)?;
    Ok(Arc::new(checks))
}

fn parse(text: &str, folder: &Path) -> Result<EndpointChecks, String> {
    let file: File = toml::from_str(text).map_err(|e| e.to_string())?;
    if !(1..=DAY).contains(&file.every) {
        return Err("`every` is a number of seconds from 1 to 86400".to_owned());
    }
    if !(1..=60).contains(&file.timeout) {
        return Err("`timeout` is a number of seconds from 1 to 60".to_owned());
    }
    let mut names = BTreeSet::new();
    let mut domains = Vec::new();
    for domain in file.domain {
        let name = domain.name.clone();
        if !names.insert(name.clone()) {
            return Err(format!("the domain {name} is there twice"));
        }
        let checks = domain
            .checks(folder)
            .map_err(|why| format!("{name}: {why}"))?;
        domains.push(checks);
    }
    Ok(EndpointChecks {
        every: Duration::from_secs(file.every),
        timeout: Duration::from_secs(file.timeout),
        domains,
    })
}

impl Domain {
    fn checks(self, folder: &Path) -> Result<DomainChecks, String> {
        let must = |holds: bool, why: &str| if holds { Ok(()) } else { Err(why.to_owned()) };
        let asks_dns = !self.nameservers.is_empty();
        let (web, tls) = (self.scheme.is_some(), self.scheme == Some(Scheme::Https));
        must(
            asks_dns || web,
            "nothing is looked at: name `nameservers`, a `scheme`, or both",
        )?;
        must(
            asks_dns || (self.addresses.is_empty() && self.cname.is_none()),
            "`addresses` and `cname` are compared with what `nameservers` answer: name some",
        )?;
        must(
            asks_dns || !self.connect.is_empty(),
            "without `nameservers` it has to be said where to `connect` to",
        )?;
        must(
            web || (self.port.is_none() && self.connect.is_empty()),
            "`port` and `connect` are of no use without a `scheme`",
        )?;
        must(
            tls || (self.roots.is_none() && self.warn_days.is_none()),
            "`roots` and `warn_days` are about certificates: they need `scheme = \"https\"`",
        )?;
        must(self.port != Some(0), "`port` is a number from 1 to 65535")?;
        let warn_days = self.warn_days.unwrap_or_else(usual_warn_days);
        must(warn_days <= 3650, "`warn_days` is a number up to 3650")?;
        let of_the_machine =
            self.name.as_str() == "localhost" || self.name.as_str().ends_with(".localhost");
        must(
            !(asks_dns && of_the_machine),
            "names below localhost are each machine's own, and no nameserver is asked for them",
        )?;
        let usual_port = if tls { 443 } else { 80 };
        let tls = match tls {
            false => None,
            true => Some(TlsCheck {
                roots: Arc::new(roots(self.roots.as_deref(), folder)?),
                warn: Duration::from_secs(warn_days * DAY),
            }),
        };
        let dns = asks_dns.then(|| DnsCheck {
            nameservers: self.nameservers.iter().map(|n| n.addr()).collect(),
            addresses: self.addresses,
            cname: self.cname,
        });
        let web = web.then_some(WebCheck {
            port: self.port.unwrap_or(usual_port),
            connect: self.connect,
            tls,
        });
        Ok(DomainChecks {
            domain: self.name,
            dns,
            web,
        })
    }
}

/// Who may have issued certificates: those of a file, or those that this machine trusts.
fn roots(file: Option<&Path>, folder: &Path) -> Result<RootCertStore, String> {
    let mut store = RootCertStore::empty();
    let Some(file) = file else {
        let found = rustls_native_certs::load_native_certs();
        store.add_parsable_certificates(found.certs);
        return match store.is_empty() {
            false => Ok(store),
            true => Err("this machine trusts no issuer of certificates: name `roots`".to_owned()),
        };
    };
    let file = folder.join(file);
    let shown = file.display();
    let found = CertificateDer::pem_file_iter(&file).map_err(|e| format!("{shown}: {e}"))?;
    for certificate in found {
        let certificate = certificate.map_err(|e| format!("{shown}: {e}"))?;
        store
            .add(certificate)
            .map_err(|e| format!("{shown}: {e}"))?;
    }
    match store.is_empty() {
        false => Ok(store),
        true => Err(format!("there is no certificate in {shown}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Result<EndpointChecks, String> {
        parse(text, Path::new("/nowhere"))
    }

    #[test]
    fn a_file_says_what_is_looked_at() {
        let checks = read(
            r#"
            every = 30
            [[domain]]
            name = "example.com"
            nameservers = ["192.0.2.53", "[2001:db8::53]:5353"]
            addresses = ["203.0.113.10"]
            cname = "edge.example.net"
            scheme = "http"
            "#,
        )
        .unwrap();
        assert_eq!(checks.every, Duration::from_secs(30));
        assert_eq!(checks.timeout, Duration::from_secs(5));
        let domain = checks.of(&"www.example.com".parse().unwrap()).unwrap();
        let dns = domain.dns.as_ref().unwrap();
        let servers: Vec<_> = dns.nameservers.iter().map(ToString::to_string).collect();
        assert_eq!(servers, ["192.0.2.53:53", "[2001:db8::53]:5353"]);
        assert_eq!(domain.web.as_ref().unwrap().port, 80);
        assert!(domain.web.as_ref().unwrap().tls.is_none());
        assert!(read("").unwrap().domains.is_empty());
    }

    #[test]
    fn what_makes_no_sense_is_refused_with_what_would() {
        let domain = |more: &str| format!("[[domain]]\nname = \"example.com\"\n{more}\n");
        for (text, says) in [
            ("every = 0".to_owned(), "`every`"),
            ("timeout = 61".to_owned(), "`timeout`"),
            ("often = 3".to_owned(), "unknown field `often`"),
            (domain(""), "nothing is looked at"),
            (
                domain(
                    "addresses = [\"203.0.113.10\"]\nscheme = \"http\"\nconnect = [\"203.0.113.10\"]",
                ),
                "`nameservers`",
            ),
            (domain("scheme = \"https\""), "`connect`"),
            (
                domain("nameservers = [\"192.0.2.53\"]\nport = 80"),
                "`scheme`",
            ),
            (
                domain("nameservers = [\"192.0.2.53\"]\nscheme = \"http\"\nwarn_days = 3"),
                "https",
            ),
            (domain("nameservers = [\"ns.example.com\"]"), "nameservers"),
            (
                domain("nameservers = [\"192.0.2.53\"]\nscheme = \"https\"\nroots = \"no.pem\""),
                "/nowhere/no.pem",
            ),
            (domain("nameservers = [\"192.0.2.53\"]").repeat(2), "twice"),
            (
                domain("nameservers = [\"192.0.2.53\"]").replace("example.com", "shop.localhost"),
                "each machine's own",
            ),
        ] {
            let why = read(&text).unwrap_err();
            assert!(why.contains(says), "{text}: {why}");
        }
    }
}
