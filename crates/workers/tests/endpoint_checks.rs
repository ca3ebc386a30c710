//! What is seen of an address from where users are, against a real nameserver and real web servers
//! with certificates.
#![allow(clippy::unwrap_used)]

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use daybook_events::DeploymentId;
use daybook_events::deployment::{Plane, PlaneSeen, PlaneState};
use daybook_testkit::nameserver::{Answer, Nameserver};
use daybook_testkit::website::{Certificate, Conduct, Issuer, Website};
use daybook_workers::endpoint_checks::{
    Address, DnsCheck, DomainChecks, EndpointChecks, TlsCheck, WebCheck,
};
use jiff::{SignedDuration, Timestamp};
use rustls::RootCertStore;
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject as _;
use uuid::Uuid;

const HOST: &str = "web.shop.example.com";
const DAY: Duration = Duration::from_secs(24 * 60 * 60);

/// Year, month and day some days from now.
fn in_days(days: i64) -> (i32, u8, u8) {
    let then = Timestamp::now() + SignedDuration::from_hours(24 * days);
    let then = then.to_zoned(jiff::tz::TimeZone::UTC).date();
    let part = |n: i8| u8::try_from(n).unwrap();
    (then.year().into(), part(then.month()), part(then.day()))
}

/// A nameserver, and a web server with a certificate that is right.
struct Stage {
    nameserver: Nameserver,
    issuer: Issuer,
    website: Website,
    checks: EndpointChecks,
    id: DeploymentId,
}

impl Stage {
    fn start() -> Self {
        let nameserver = Nameserver::start();
        nameserver.point(HOST, "127.0.0.1");
        let id = DeploymentId(Uuid::from_u128(7));
        let issuer = Issuer::new();
        let right = issuer.issue(&[HOST], in_days(90));
        let website = Website::start(Some(right), answered_by(id));
        let mut stage = Self {
            checks: EndpointChecks {
                every: Duration::from_secs(60),
                timeout: Duration::from_secs(20),
                domains: Vec::new(),
            },
            nameserver,
            issuer,
            website,
            id,
        };
        let domain = DomainChecks {
            domain: "example.com".parse().unwrap(),
            dns: Some(DnsCheck {
                nameservers: vec![stage.nameserver.addr],
                addresses: BTreeSet::from(["127.0.0.1".parse().unwrap()]),
                cname: None,
            }),
            web: Some(WebCheck {
                port: stage.website.addr.port(),
                connect: Vec::new(),
                tls: Some(TlsCheck {
                    roots: roots(&stage.issuer),
                    warn: DAY * 21,
                }),
            }),
        };
        stage.checks.domains.push(domain);
        stage
    }

    fn certificate(&self, names: &[&str], days: i64) -> Certificate {
        self.issuer.issue(names, in_days(days))
    }

    fn dns(&mut self) -> &mut DnsCheck {
        self.checks.domains[0].dns.as_mut().unwrap()
    }

    fn web(&mut self) -> &mut WebCheck {
        self.checks.domains[0].web.as_mut().unwrap()
    }

    /// DNS, TLS and HTTP.
    async fn look(&self) -> [PlaneSeen; 3] {
        let address = Address {
            hostname: HOST.parse().unwrap(),
            path: "/".to_owned(),
            deployments: vec![self.id],
        };
        let domain = self.checks.of(&address.hostname).unwrap();
        let seen = self.checks.look(domain, &address).await;
        let planes: Vec<_> = seen.iter().map(|seen| seen.plane).collect();
        assert_eq!(planes, [Plane::Dns, Plane::Tls, Plane::Http]);
        seen.try_into().unwrap()
    }

    /// Their states with the reasons.
    async fn states(&self) -> [(PlaneState, String); 3] {
        let seen = self.look().await;
        seen.map(|seen| (seen.state, seen.reason))
    }
}

fn answered_by(id: DeploymentId) -> Conduct {
    Conduct::Answer(200, Some(id.to_string()))
}

fn roots(issuer: &Issuer) -> Arc<RootCertStore> {
    let mut roots = RootCertStore::empty();
    let own = CertificateDer::from_pem_slice(issuer.pem().as_bytes()).unwrap();
    roots.add(own).unwrap();
    Arc::new(roots)
}

use PlaneState::{Drifted, Failing, Ok, Unknown};

fn are(all: [(PlaneState, &str); 3]) -> [(PlaneState, String); 3] {
    all.map(|(state, reason)| (state, reason.to_owned()))
}

const WELL: [(PlaneState, &str); 3] = [(Ok, "Resolves"), (Ok, "Valid"), (Ok, "Answers")];

#[tokio::test]
async fn an_address_that_is_right_is_right_on_every_plane() {
    let stage = Stage::start();
    assert_eq!(stage.states().await, are(WELL));
    let [dns, tls, http] = stage.look().await;
    assert_eq!(dns.expected.as_deref(), Some("127.0.0.1"));
    assert_eq!(dns.actual, dns.expected);
    assert_eq!(tls.actual.as_deref(), Some(HOST));
    let end = tls.expires.unwrap().duration_since(Timestamp::now());
    assert!((88..=90).contains(&(end.as_hours() / 24)), "{end}");
    assert_eq!(http.expected, Some(stage.id.to_string()));
    assert_eq!(http.actual, http.expected);
}

#[tokio::test]
async fn what_a_name_resolves_to_is_told_apart_from_what_is_there() {
    let mut stage = Stage::start();
    let asked = |dns: (PlaneState, &str)| are([dns, (Unknown, "NotAsked"), (Unknown, "NotAsked")]);
    // Nobody answers at the wrong address.
    stage.nameserver.point(HOST, "127.0.0.2");
    let [dns, tls, http] = stage.look().await;
    assert_eq!((dns.state, dns.reason.as_str()), (Drifted, "WrongAddress"));
    assert_eq!(dns.expected.as_deref(), Some("127.0.0.1"));
    assert_eq!(dns.actual.as_deref(), Some("127.0.0.2"));
    assert_eq!((tls.state, tls.reason.as_str()), (Failing, "Refused"));
    assert_eq!(http.state, Unknown);
    // One address too many is one that some users are led to.
    let both = ["127.0.0.1", "127.0.0.2"].map(|ip| ip.parse::<IpAddr>().unwrap());
    stage.nameserver.set(HOST, Answer::Addresses(both.into()));
    let states = stage.states().await;
    assert_eq!(states[0], (Drifted, "WrongAddress".to_owned()));
    assert_eq!(states[1], (Failing, "Refused".to_owned()));

    stage.nameserver.forget(HOST);
    assert_eq!(stage.states().await, asked((Failing, "NxDomain")));
    stage.nameserver.set(HOST, Answer::Nothing);
    assert_eq!(stage.states().await, asked((Failing, "NoAddress")));
    stage.nameserver.set(HOST, Answer::Failure);
    assert_eq!(stage.states().await, asked((Failing, "ServerFailure")));
    stage.checks.timeout = Duration::from_secs(2);
    stage.nameserver.set(HOST, Answer::Silence);
    assert_eq!(stage.states().await, asked((Failing, "Timeout")));
    stage.checks.timeout = Duration::from_secs(20);

    // An alias, of the right name and of another one.
    let right = Answer::Alias("edge.example.net".to_owned());
    stage.nameserver.set(HOST, right);
    stage.nameserver.point("edge.example.net", "127.0.0.1");
    stage.dns().cname = Some("edge.example.net".parse().unwrap());
    assert_eq!(stage.states().await, are(WELL));
    let [dns, ..] = stage.look().await;
    let expected = Some("edge.example.net, 127.0.0.1");
    assert_eq!(dns.expected.as_deref(), expected);
    assert_eq!(dns.actual.as_deref(), expected);
    let other = Answer::Alias("old.example.net".to_owned());
    stage.nameserver.set(HOST, other);
    stage.nameserver.point("old.example.net", "127.0.0.1");
    let [dns, ..] = stage.look().await;
    assert_eq!((dns.state, dns.reason.as_str()), (Drifted, "WrongName"));
    assert_eq!(dns.actual.as_deref(), Some("old.example.net, 127.0.0.1"));

    // And back: nothing is remembered.
    stage.dns().cname = None;
    stage.nameserver.point(HOST, "127.0.0.1");
    assert_eq!(stage.states().await, are(WELL));
}

#[tokio::test]
async fn certificates_are_judged_as_browsers_do_and_their_end_is_seen_coming() {
    let mut stage = Stage::start();
    let tls = |tls: (PlaneState, &str)| are([WELL[0], tls, (Unknown, "NotAsked")]);
    let another = stage.certificate(&["other.example.com", "shop.example.com"], 90);
    stage.website.show(another);
    let [_, seen, _] = stage.look().await;
    assert_eq!((seen.state, seen.reason.as_str()), (Drifted, "WrongName"));
    assert_eq!(seen.expected.as_deref(), Some(HOST));
    let names = "other.example.com, shop.example.com";
    assert_eq!(seen.actual.as_deref(), Some(names));

    stage.website.show(stage.certificate(&[HOST], -1));
    assert_eq!(stage.states().await, tls((Failing, "CertificateExpired")));
    let [_, seen, _] = stage.look().await;
    assert!(seen.expires.unwrap() < Timestamp::now(), "{seen:?}");

    stage.website.show(stage.certificate(&[HOST], 5));
    let soon = are([WELL[0], (Ok, "ExpiresSoon"), WELL[2]]);
    assert_eq!(stage.states().await, soon);

    let stranger = Issuer::named("a stranger");
    stage.website.show(stranger.issue(&[HOST], in_days(90)));
    assert_eq!(stage.states().await, tls((Failing, "UnknownIssuer")));

    let any = stage.certificate(&["*.shop.example.com"], 90);
    stage.website.show(any);
    assert_eq!(stage.states().await, are(WELL));

    // Something else listens on the port.
    let plain = Website::start(None, answered_by(stage.id));
    stage.web().port = plain.addr.port();
    let states = stage.states().await;
    assert_eq!(states, tls((Failing, "HandshakeFailed")));
}

#[tokio::test]
async fn who_answers_is_who_should() {
    let mut stage = Stage::start();
    let http = |http: (PlaneState, &str)| are([WELL[0], WELL[1], http]);
    let other = DeploymentId(Uuid::from_u128(8));
    stage.website.conduct(answered_by(other));
    let [.., seen] = stage.look().await;
    assert_eq!(
        (seen.state, seen.reason.as_str()),
        (Drifted, "AnotherDeployment")
    );
    assert_eq!(seen.expected, Some(stage.id.to_string()));
    assert_eq!(seen.actual, Some(other.to_string()));
    let id = Some(stage.id.to_string());
    for (status, by, is) in [
        (503, id.clone(), (Failing, "ServerError")),
        (404, id, (Ok, "Answers")),
        (200, None, (Ok, "NotIdentified")),
        (302, None, (Ok, "NotIdentified")),
        (404, None, (Failing, "NobodyAnswers")),
        (502, None, (Failing, "NobodyAnswers")),
    ] {
        stage.website.conduct(Conduct::Answer(status, by));
        assert_eq!(stage.states().await, http(is), "{status}");
    }
    stage.checks.timeout = Duration::from_secs(2);
    stage.website.conduct(Conduct::Silence);
    let silent = are([WELL[0], (Failing, "Timeout"), (Unknown, "NotAsked")]);
    assert_eq!(stage.states().await, silent);
    stage.checks.timeout = Duration::from_secs(20);
    stage.website.conduct(answered_by(stage.id));
    assert_eq!(stage.states().await, are(WELL));
}

#[tokio::test]
async fn only_what_was_asked_for_is_looked_at() {
    let mut stage = Stage::start();
    let none = (Unknown, "NotConfigured");
    // Plain HTTP, at an address that was named, whatever the name resolves to.
    let plain = Website::start(None, answered_by(stage.id));
    let SocketAddr::V4(at) = plain.addr else {
        panic!("an address of IPv4");
    };
    stage.web().tls = None;
    stage.web().port = at.port();
    stage.web().connect = vec![(*at.ip()).into()];
    let dns = stage.checks.domains[0].dns.take();
    assert_eq!(stage.states().await, are([none, none, WELL[2]]));
    plain.conduct(Conduct::Silence);
    stage.checks.timeout = Duration::from_secs(2);
    assert_eq!(
        stage.states().await,
        are([none, none, (Failing, "Timeout")])
    );
    stage.checks.timeout = Duration::from_secs(20);
    stage.checks.domains[0].dns = dns;
    stage.checks.domains[0].web = None;
    assert_eq!(stage.states().await, are([WELL[0], none, none]));
    // Any address will do where none is named.
    stage.dns().addresses.clear();
    stage.nameserver.point(HOST, "192.0.2.1");
    assert_eq!(stage.states().await, are([WELL[0], none, none]));
    assert!(
        stage
            .checks
            .of(&"shop.localhost".parse().unwrap())
            .is_none()
    );
}
