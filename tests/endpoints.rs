//! Addresses as they are from where users are: a nameserver, a certificate and a web server at the
//! edge that are real, and go wrong one after the other.

use std::net::SocketAddr;

use daybook_testkit::nameserver::{Answer, Nameserver};
use daybook_testkit::website::{Conduct, Issuer, Website};
use serde_json::Value;

use crate::support::{PATIENCE, Server, Settings, application, replace_flags, until};

const INSTANCE: &str = "shop.production.web";
pub(crate) const HOST: &str = "www.example.com";

/// What surrounds the address.
pub(crate) struct Edge {
    pub(crate) nameserver: Nameserver,
    issuer: Issuer,
    pub(crate) website: Website,
    folder: tempfile::TempDir,
}

impl Edge {
    pub(crate) fn start() -> Self {
        let issuer = Issuer::new();
        let certificate = issuer.issue(&[HOST], (2040, 1, 1));
        // Where it leads is known once the gateway runs.
        let website = Website::start(Some(certificate), Conduct::Silence);
        let nameserver = Nameserver::start();
        nameserver.point(HOST, "127.0.0.1");
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("issuer.pem"), issuer.pem()).unwrap();
        let checks = format!(
            r#"
            every = 1
            timeout = 10

            [[domain]]
            name = "example.com"
            nameservers = ["{}"]
            addresses = ["127.0.0.1"]
            scheme = "https"
            port = {}
            roots = "issuer.pem"
            "#,
            nameserver.addr,
            website.addr.port(),
        );
        std::fs::write(folder.path().join("checks.toml"), checks).unwrap();
        Self {
            nameserver,
            issuer,
            website,
            folder,
        }
    }

    pub(crate) fn settings(&self) -> Settings {
        let file = self.folder.path().join("checks.toml");
        Settings::default()
            .arg("--endpoint-checks")
            .arg(file.to_str().unwrap())
    }
}

/// What is known of a plane of the address.
fn plane(detail: &Value, plane: &str) -> Value {
    let endpoints = detail["endpoints"].as_array().unwrap();
    let endpoint = endpoints.iter().find(|e| e["hostname"] == HOST);
    let planes = endpoint.and_then(|e| e["planes"].as_array());
    let found = planes.and_then(|all| all.iter().find(|p| p["plane"] == plane));
    found.cloned().unwrap_or_default()
}

/// Waits until a plane is in a state for a reason, and returns what is known of the deployment.
#[track_caller]
pub(crate) fn wait_for(server: &Server, id: &str, of: &str, state: &str, reason: &str) -> Value {
    until(
        &format!("{of} {state} ({reason}) within {PATIENCE:?}"),
        || {
            let detail = server.deployment(id);
            let seen = plane(&detail, of);
            (seen["state"] == state && seen["reason"] == reason).then_some(detail)
        },
    )
}

fn changes(server: &Server, id: &str) -> usize {
    let kinds = server.kinds(id);
    let changes = kinds
        .iter()
        .filter(|kind| *kind == "deployment.endpoint_planes_changed.v1");
    changes.count()
}

#[test]
fn an_address_is_looked_at_from_where_users_are_and_what_drifts_is_an_event() {
    let edge = Edge::start();
    let mut server = Server::start(edge.settings());
    let gateway: SocketAddr = server.gateway().replace("http://", "").parse().unwrap();
    edge.website.conduct(Conduct::Forward(gateway));
    let source = application("--text one");
    server.define("shop", "web", &source, &[]);
    let first = server.deploy(INSTANCE, &[]);
    server.ok(&["domain", "add", INSTANCE, HOST]);

    // All five planes, each for itself.
    let detail = wait_for(&server, &first, "http", "ok", "Answers");
    for (name, reason) in [
        ("metadata", "Recorded"),
        ("route", "Applied"),
        ("dns", "Resolves"),
        ("tls", "Valid"),
    ] {
        let detail = wait_for(&server, &first, name, "ok", reason);
        assert!(plane(&detail, name)["since"].is_string(), "{detail}");
    }
    assert_eq!(detail["readiness"]["endpoint"]["state"], "ready");
    // Nothing is looked at where nobody asked for it.
    assert_eq!(detail["endpoints"].as_array().unwrap().len(), 1);
    let metrics = crate::support::request(
        reqwest::Method::GET,
        &format!("{}/metrics", server.url()),
        &[],
        None,
    );
    let metrics = metrics.unwrap().body;
    let expiry =
        "daybook_endpoint_certificate_expiry_seconds{hostname=\"www.example.com\"} 2208988800";
    assert!(metrics.contains(expiry), "{metrics}");

    // DNS leads elsewhere, and then nowhere, and back.
    edge.nameserver.point(HOST, "127.0.0.2");
    let detail = wait_for(&server, &first, "dns", "drifted", "WrongAddress");
    assert_eq!(plane(&detail, "dns")["expected"], "127.0.0.1");
    assert_eq!(plane(&detail, "dns")["actual"], "127.0.0.2");
    let endpoint = &detail["readiness"]["endpoint"];
    assert_eq!(endpoint["state"], "not_ready");
    assert_eq!(endpoint["reason"], "DnsDrifted");
    assert_eq!(detail["state"], "started", "it still runs");
    let shown = server.ok(&["status", &first]).stdout;
    assert!(
        shown.contains("expected 127.0.0.1, actual 127.0.0.2"),
        "{shown}"
    );
    edge.nameserver.set(HOST, Answer::Silence);
    wait_for(&server, &first, "dns", "failing", "Timeout");
    edge.nameserver.point(HOST, "127.0.0.1");
    wait_for(&server, &first, "dns", "ok", "Resolves");
    let detail = wait_for(&server, &first, "http", "ok", "Answers");
    assert_eq!(detail["readiness"]["endpoint"]["state"], "ready");

    // A certificate for another name, one that has ended, one that ends soon, and a right one.
    let issue = |names: &[&str], end| edge.website.show(edge.issuer.issue(names, end));
    issue(&["example.org"], (2040, 1, 1));
    let detail = wait_for(&server, &first, "tls", "drifted", "WrongName");
    assert_eq!(plane(&detail, "tls")["actual"], "example.org");
    issue(&[HOST], (2020, 1, 1));
    let detail = wait_for(&server, &first, "tls", "failing", "CertificateExpired");
    assert_eq!(detail["readiness"]["endpoint"]["reason"], "TlsFailing");
    issue(&[HOST], (2041, 1, 1));
    let detail = wait_for(&server, &first, "tls", "ok", "Valid");
    assert_eq!(plane(&detail, "tls")["expires"], "2041-01-01T00:00:00Z");

    // Something else answers in the place of the gateway.
    wait_for(&server, &first, "http", "ok", "Answers");
    let stranger = "00000000-0000-7000-8000-000000000000";
    let stranger_answers = Conduct::Answer(200, Some(stranger.to_owned()));
    edge.website.conduct(stranger_answers);
    let detail = wait_for(&server, &first, "http", "drifted", "AnotherDeployment");
    assert_eq!(plane(&detail, "http")["expected"], first.as_str());
    assert_eq!(plane(&detail, "http")["actual"], stranger);
    edge.website.conduct(Conduct::Forward(gateway));
    wait_for(&server, &first, "http", "ok", "Answers");

    // What is so is recorded once, however often it is looked at, also by the next process.
    let recorded = changes(&server, &first);
    server.kill();
    let same = gateway.to_string();
    server.restart_with(&["--listen", "127.0.0.1:0", "--gateway", &same]);
    server.get_from(HOST, "/", &first);
    edge.nameserver.point(HOST, "127.0.0.2");
    wait_for(&server, &first, "dns", "drifted", "WrongAddress");
    edge.nameserver.point(HOST, "127.0.0.1");
    wait_for(&server, &first, "dns", "ok", "Resolves");
    wait_for(&server, &first, "http", "ok", "Answers");
    let more = changes(&server, &first) - recorded;
    assert!(
        (2..=4).contains(&more),
        "{more} more: {:?}",
        server.kinds(&first)
    );

    // The next deployment takes the address over, and nothing is said of the first any more.
    replace_flags(&source, "--text two");
    let second = server.deploy(INSTANCE, &[]);
    let detail = wait_for(&server, &second, "http", "ok", "Answers");
    assert_eq!(plane(&detail, "http")["actual"], second.as_str());
    until("nothing to be said of the first", || {
        let detail = server.deployment(&first);
        (detail["endpoints"] == serde_json::json!([])).then_some(())
    });
    let audit = server.read("/api/v1/audit?limit=500").to_string();
    assert!(audit.contains("DNS has drifted (WrongAddress)"), "{audit}");
    assert!(audit.contains("DNS is as it should be again"), "{audit}");
    server.check_replay();
}

#[test]
fn a_file_that_says_nothing_useful_is_refused_before_anything_starts() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("checks.toml");
    std::fs::write(&file, "[[domain]]\nname = \"example.com\"\n").unwrap();
    let settings = Settings::default()
        .arg("--endpoint-checks")
        .arg(file.to_str().unwrap());
    let mut server = Server::stopped(settings);
    let refused = server.try_restart_with(&["--listen", "127.0.0.1:0"]);
    let refused = format!("{:?}", refused.unwrap_err());
    assert!(refused.contains("endpoint_checks_unusable"), "{refused}");
    assert!(refused.contains("nothing is looked at"), "{refused}");
}
