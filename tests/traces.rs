//! A trace from a request through the workers, at a collector that is a real HTTP server, and in
//! the log of the program.

use std::collections::{BTreeMap, BTreeSet};
use std::net::TcpListener;

use daybook_testkit::nats::{NatsBinary, NatsServer};
use opentelemetry_proto::tonic::collector::trace::v1::ExportTraceServiceRequest;
use opentelemetry_proto::tonic::common::v1::KeyValue;
use opentelemetry_proto::tonic::common::v1::any_value::Value as Said;
use prost::Message as _;
use reqwest::Method;
use serde_json::{Value, json};

use crate::support::{Process, Receiver, Server, Settings, application, request, until};

const TRACE: &str = "0af7651916cd43dd8448eb211c80319c";
const PARENT: &str = "b7ad6b7169203331";
/// A token of the collector's, which belongs into no log and no span.
const TOKEN: &str = "canary-of-the-collector";
/// A token that somebody has put where it does not belong.
const MISPLACED: &str = "canary-in-a-query";

/// A span as it was sent.
#[derive(Debug, Clone)]
struct Sent {
    name: String,
    id: String,
    parent: String,
    trace: String,
    attributes: BTreeMap<String, String>,
    events: Vec<String>,
    error: bool,
    /// `service.name` and `service.instance.id` of its process.
    process: (String, String),
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

fn attributes(all: &[KeyValue]) -> BTreeMap<String, String> {
    let text = |value: &Said| match value {
        Said::StringValue(text) => text.clone(),
        Said::IntValue(number) => number.to_string(),
        Said::BoolValue(is) => is.to_string(),
        other => panic!("an attribute of another kind: {other:?}"),
    };
    let all = all.iter().map(|attribute| {
        let value = attribute.value.as_ref().and_then(|v| v.value.as_ref());
        (attribute.key.clone(), text(value.expect("a value")))
    });
    all.collect()
}

/// All spans that a collector has taken.
fn spans(collector: &Receiver) -> Vec<Sent> {
    let mut all = Vec::new();
    for received in collector.taken() {
        assert_eq!(received.path, "/hook/v1/traces");
        assert_eq!(received.headers["content-type"], "application/x-protobuf");
        let request = ExportTraceServiceRequest::decode(received.body.as_slice()).unwrap();
        for of_process in request.resource_spans {
            let resource = attributes(&of_process.resource.unwrap().attributes);
            let process = (
                resource["service.name"].clone(),
                resource["service.instance.id"].clone(),
            );
            for span in of_process.scope_spans.into_iter().flat_map(|s| s.spans) {
                all.push(Sent {
                    id: hex(&span.span_id),
                    parent: hex(&span.parent_span_id),
                    trace: hex(&span.trace_id),
                    attributes: attributes(&span.attributes),
                    events: span.events.into_iter().map(|e| e.name).collect(),
                    error: span.status.is_some_and(|s| s.code == 2),
                    name: span.name,
                    process: process.clone(),
                });
            }
        }
    }
    all
}

/// The spans of the trace that a collector has taken.
fn of_the_trace(collector: &Receiver) -> Vec<Sent> {
    let mut all = spans(collector);
    all.retain(|span| span.trace == TRACE);
    all
}

/// A span of the trace, and the one that it follows on: each is sent when it ends, by whichever
/// came first.
#[track_caller]
fn with_its_cause(collector: &Receiver, name: &str) -> (Sent, Sent) {
    until(&format!("{name}, and what it follows on"), || {
        let all = of_the_trace(collector);
        let span = all.iter().find(|span| span.name == name)?;
        let cause = all.iter().find(|cause| cause.id == span.parent)?;
        Some((span.clone(), cause.clone()))
    })
}

/// The spans of the trace, once all of these are among them.
#[track_caller]
fn trace(collector: &Receiver, names: &[&str]) -> Vec<Sent> {
    until(&format!("spans called {names:?}"), || {
        let all = of_the_trace(collector);
        let there: BTreeSet<_> = all.iter().map(|span| span.name.as_str()).collect();
        names.iter().all(|name| there.contains(name)).then_some(all)
    })
}

/// Each span follows on another one of the trace, or on whoever began it.
fn check_connected(trace: &[Sent]) {
    let ids: BTreeSet<_> = trace.iter().map(|span| span.id.as_str()).collect();
    assert_eq!(ids.len(), trace.len(), "each has an id of its own");
    for span in trace {
        assert!(
            span.parent == PARENT || ids.contains(span.parent.as_str()),
            "{span:?} follows on nothing in {trace:#?}"
        );
    }
    let first: Vec<_> = trace.iter().filter(|s| s.parent == PARENT).collect();
    assert_eq!(first.len(), 1, "{first:?}");
    assert_eq!(first[0].name, "POST /api/v1/deployments");
}

fn header() -> String {
    format!("00-{TRACE}-{PARENT}-01")
}

/// Asks for a deployment in the trace, and returns its id.
fn deploy(server: &Server) -> String {
    ask(
        server,
        &json!({ "project": "shop", "service": "web", "environment": "production" }),
    )
}

fn ask(server: &Server, body: &Value) -> String {
    let url = format!("{}/api/v1/deployments", server.url());
    let traceparent = header();
    let headers = [("traceparent", traceparent.as_str())];
    let answer = request(Method::POST, &url, &headers, Some(body)).unwrap();
    assert!(answer.status < 300, "{answer:?}");
    answer.json()["id"].as_str().unwrap().to_owned()
}

/// The traces that the events about a deployment belong to, and those of the same run on other
/// aggregates.
fn traces_of_events(server: &Server, id: &str) -> BTreeMap<String, Vec<String>> {
    let mut found = BTreeMap::<_, Vec<_>>::new();
    for line in server.events() {
        let event = &line["event"];
        if event["correlationid"] == id {
            let trace = event["traceparent"].as_str().unwrap_or("none");
            let trace = trace.get(3..35).unwrap_or(trace).to_owned();
            let kind = event["type"].as_str().unwrap().to_owned();
            found.entry(trace).or_default().push(kind);
        }
    }
    found
}

/// What the trace of every deployment of a commit is made of.
const STEPS: &[&str] = &[
    "POST /api/v1/deployments",
    "queue",
    "source",
    "build",
    "clone",
    "build image",
    "push",
    "follow-build",
    "package",
    "sync",
    "observe",
    "route",
    "gateway",
];

#[test]
fn a_request_and_all_that_follows_on_it_are_one_trace() {
    let collector = Receiver::willing();
    let settings = Settings::default()
        .arg("--otlp")
        .arg(collector.url())
        .arg("--log-json")
        .env("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:1")
        .env(
            "OTEL_EXPORTER_OTLP_HEADERS",
            format!("authorization=Bearer%20{TOKEN}"),
        )
        .env("OTEL_SERVICE_NAME", "ledger")
        .env("DAYBOOK_LOG", "debug");
    let mut server = Server::start(settings);
    let source = application("");
    server.define("shop", "web", &source, &[]);
    let id = deploy(&server);
    server.wait_for(&id, "started");
    let trace = trace(&collector, STEPS);
    check_connected(&trace);
    for span in &trace {
        assert_eq!(span.process.0, "ledger");
        assert!(!span.error, "{span:?}");
        let whole = ["clone", "build image", "push"].contains(&span.name.as_str());
        if !whole {
            let about = span.attributes.get("daybook.deployment.id");
            assert_eq!(about, Some(&id), "{span:?}");
            assert_eq!(span.attributes["daybook.project"], "shop");
            assert_eq!(span.attributes["daybook.environment"], "production");
        }
    }
    let one = |name: &str| trace.iter().find(|span| span.name == name).unwrap();
    let asked = one("POST /api/v1/deployments");
    assert_eq!(asked.attributes["http.response.status_code"], "201");
    assert_eq!(asked.attributes["http.route"], "/api/v1/deployments");
    assert_eq!(asked.events, ["deployment.requested.v1"]);
    assert_eq!(one("queue").parent, asked.id);
    assert_eq!(one("queue").events, ["deployment.queued.v1"]);
    let cluster = one("sync").attributes["daybook.cluster"].as_str();
    assert!(["local-a", "local-b"].contains(&cluster), "{cluster}");
    assert_eq!(one("package").attributes["daybook.service"], "web");
    assert_eq!(one("clone").parent, one("build").id);

    // So say the events, of whatever aggregate.
    let events = traces_of_events(&server, &id);
    assert_eq!(events.keys().collect::<Vec<_>>(), [TRACE], "{events:#?}");

    // So says the log.
    until("a record of the log in a span of the trace", || {
        let log = server.process().log();
        let records = log
            .lines()
            .filter_map(|line| serde_json::from_str::<Value>(line).ok());
        let mut in_trace = records.filter(|record| record["trace_id"] == TRACE);
        let spans = spans(&collector);
        in_trace
            .any(|record| spans.iter().any(|s| record["span_id"] == s.id))
            .then_some(())
    });

    // What comes back is counted, and nothing else is told.
    let url = format!("{}/api/v1/deployments?token={MISPLACED}", server.url());
    assert_eq!(request(Method::GET, &url, &[], None).unwrap().status, 400);
    let figures = format!("{}/metrics", server.url());
    let figures = request(Method::GET, &figures, &[], None).unwrap().body;
    let sent = r#"daybook_otlp_spans_total{outcome="sent"} "#;
    let sent = figures.lines().find_map(|line| line.strip_prefix(sent));
    assert!(sent.is_some_and(|n| n != "0"), "{figures}");
    for dropped in ["overflowed", "refused"] {
        let none = format!(r#"daybook_otlp_spans_total{{outcome="{dropped}"}} 0"#);
        assert!(figures.contains(&none), "{figures}");
    }
    let log = server.process().log();
    assert!(server.stop().success());
    let refused = |span: &Sent| {
        let status = span.attributes.get("http.response.status_code");
        span.name == "GET /api/v1/deployments" && status.is_some_and(|s| s == "400")
    };
    // The last ones were sent before it ended.
    assert!(spans(&collector).iter().any(refused));
    assert!(!log.contains(TOKEN), "{log}");
    for received in collector.taken() {
        assert_eq!(received.headers["authorization"], format!("Bearer {TOKEN}"));
        let body = String::from_utf8_lossy(&received.body).into_owned();
        assert!(!body.contains(MISPLACED) && !body.contains(TOKEN));
    }
}

#[test]
fn two_deployments_that_share_a_build_keep_their_traces() {
    let collector = Receiver::willing();
    let settings = Settings::default().arg("--otlp").arg(collector.url());
    let server = Server::start(settings);
    let source = application("");
    server.define("shop", "web", &source, &[]);
    let other = ["env", "create", "shop", "staging", "--cluster", "local-a"];
    server.ok(&other);
    let second = server.begin("shop.staging.web", &[]);
    let first = deploy(&server);
    server.wait_for(&first, "started");
    server.wait_for(&second, "started");
    let trace = trace(
        &collector,
        &["POST /api/v1/deployments", "package", "route"],
    );
    let about = |span: &Sent| span.attributes.get("daybook.deployment.id").cloned();
    let steps = trace
        .iter()
        .filter(|s| s.name == "package" || s.name == "route");
    for step in steps {
        assert_eq!(about(step).as_deref(), Some(first.as_str()), "{step:?}");
    }
    for (id, named) in [(&first, true), (&second, false)] {
        let traces = traces_of_events(&server, id);
        let own: Vec<_> = server
            .ok(&["events", "--deployment", id, "--output", "json"])
            .json_lines()
            .into_iter()
            .map(|line| line["event"]["traceparent"].as_str().unwrap()[3..35].to_owned())
            .collect();
        let all: BTreeSet<_> = own.iter().collect();
        assert_eq!(all.len(), 1, "{traces:#?}");
        assert_eq!(own[0] == TRACE, named, "{traces:#?}");
    }
}

#[test]
fn deliveries_of_webhooks_are_in_the_trace_of_what_they_tell() {
    let (collector, receiver) = (Receiver::willing(), Receiver::willing());
    let settings = Settings::default()
        .arg("--allow-private-webhooks")
        .arg("--otlp")
        .arg(collector.url());
    let server = Server::start(settings);
    let source = application("");
    server.define("shop", "web", &source, &[]);
    let url = receiver.url();
    let kind = "deployment.succeeded.v1";
    server.ok(&["webhook", "create", "shop", &url, "--kind", kind]);
    let id = deploy(&server);
    server.wait_for(&id, "started");
    let (span, cause) = with_its_cause(&collector, "deliver");
    let event = "deployment.succeeded.v1".to_owned();
    assert!(cause.events.contains(&event), "{cause:?}");
    assert!(!span.error, "{span:?}");
    let said = |name: &str| span.attributes.get(name).map(String::as_str);
    assert_eq!(said("daybook.deployment.id"), Some(id.as_str()));
    assert_eq!(said("daybook.event.type"), Some("deployment.succeeded.v1"));
    assert_eq!(said("http.response.status_code"), Some("204"));
    assert_eq!(said("server.address"), Some("127.0.0.1"));
    assert!(said("daybook.webhook.id").is_some(), "{span:?}");
    // Whoever takes it goes on from there.
    let header = format!("00-{TRACE}-{}-01", span.id);
    let taken = receiver.taken();
    assert_eq!(taken[0].headers["traceparent"], header, "{taken:?}");
}

#[test]
fn a_request_to_a_host_that_fails_says_so() {
    let collector = Receiver::willing();
    let settings = Settings::default().arg("--otlp").arg(collector.url());
    let server = Server::start(settings);
    let source = application("");
    server.define("shop", "web", &source, &[]);
    // Nobody listens there.
    let image = "127.0.0.1:1/shop/web:1";
    ask(
        &server,
        &json!({ "project": "shop", "service": "web", "environment": "production", "image": image }),
    );
    let (span, cause) = with_its_cause(&collector, "registry resolve");
    assert!(span.error, "{span:?}");
    assert_eq!(span.attributes["error.type"], "registry_unreachable");
    assert_eq!(span.attributes["server.address"], "127.0.0.1:1");
    assert_eq!(cause.name, "source", "{cause:?}");
}

#[test]
fn a_trace_is_passed_on_where_no_spans_are_sent() {
    let server = Server::start(Settings::default());
    let source = application("");
    server.define("shop", "web", &source, &[]);
    let id = deploy(&server);
    server.wait_for(&id, "started");
    let parents: BTreeSet<_> = server
        .ok(&["events", "--deployment", &id, "--output", "json"])
        .json_lines()
        .into_iter()
        .map(|line| line["event"]["traceparent"].as_str().map(str::to_owned))
        .collect();
    assert_eq!(parents, BTreeSet::from([Some(header())]));
    let untraced = server.deploy("shop.production.web", &[]);
    let traces = traces_of_events(&server, &untraced);
    assert_eq!(traces.keys().collect::<Vec<_>>(), ["none"], "{traces:#?}");
}

#[test]
fn a_collector_that_is_away_or_does_not_answer_holds_nothing_up() {
    // It accepts, and never answers.
    let silent = TcpListener::bind("127.0.0.1:0").unwrap();
    let silent = format!("http://{}", silent.local_addr().unwrap());
    for (collector, millis) in [("http://127.0.0.1:1", "10000"), (silent.as_str(), "500")] {
        let settings = Settings::default()
            .arg("--otlp")
            .arg(collector)
            .env("OTEL_EXPORTER_OTLP_TIMEOUT", millis);
        let mut server = Server::start(settings);
        let source = application("");
        server.define("shop", "web", &source, &[]);
        let id = deploy(&server);
        server.wait_for(&id, "started");
        until("dropped spans are counted", || {
            let figures = format!("{}/metrics", server.url());
            let figures = request(Method::GET, &figures, &[], None).unwrap().body;
            let refused = r#"daybook_otlp_spans_total{outcome="refused"} "#;
            let refused = figures.lines().find_map(|line| line.strip_prefix(refused));
            (refused? != "0").then_some(())
        });
        let said = server.process().log();
        let said: Vec<_> = said
            .lines()
            .filter(|l| l.contains("spans are dropped"))
            .collect();
        assert_eq!(said.len(), 1, "once: {said:?}");
        assert!(server.stop().success());
    }
}

#[test]
fn one_trace_goes_through_processes_on_nats() {
    let Some(binary) = NatsBinary::installed().into_iter().next() else {
        return daybook_testkit::left_out("a trace through processes: there is no nats-server");
    };
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let nats = runtime.block_on(NatsServer::start(&binary));
    let collector = Receiver::willing();
    let settings = Settings {
        roles: Some("api,gateway,probe,notary"),
        ..Settings::default()
    };
    let settings = settings
        .arg("--otlp")
        .arg(collector.url())
        .env("DAYBOOK_NATS", nats.url());
    let server = Server::start(settings);
    let env = [
        ("DAYBOOK_NATS".to_owned(), nats.url().to_owned()),
        (
            "OTEL_EXPORTER_OTLP_ENDPOINT".to_owned(),
            collector.url().clone(),
        ),
    ];
    let start = |roles: &'static str| {
        let listen = ["--operations-listen", "127.0.0.1:0"];
        let args = [&["serve", "--role", roles], &listen[..]].concat();
        Process::start(server.folder(), &args, &env)
    };
    let workers = [start("build,package"), start("sync,route")];
    let source = application("");
    server.define("shop", "web", &source, &[]);
    let id = deploy(&server);
    server.wait_for(&id, "started");
    let trace = trace(&collector, STEPS);
    check_connected(&trace);
    let process = |name: &str| {
        let span = trace.iter().find(|span| span.name == name).unwrap();
        span.process.1.clone()
    };
    let processes: BTreeSet<_> = trace.iter().map(|span| &span.process.1).collect();
    assert_eq!(processes.len(), 3, "{trace:#?}");
    assert_ne!(process("POST /api/v1/deployments"), process("build"));
    assert_ne!(process("build"), process("sync"));
    assert_eq!(process("POST /api/v1/deployments"), process("gateway"));

    // A process without the HTTP interface says how it does, and nothing else.
    let ask = |worker: &Process, path: &str| {
        let url = format!("{}{path}", worker.fact("operations"));
        request(Method::GET, &url, &[], None).unwrap()
    };
    for worker in &workers {
        assert_eq!(worker.facts()["url"], Value::Null);
        assert_eq!(ask(worker, "/healthz").status, 200);
        until("it is ready", || {
            (ask(worker, "/readyz").status == 200).then_some(())
        });
        let refused = ask(worker, "/api/v1/projects");
        assert_eq!(refused.status, 404, "{refused:?}");
    }
    let parts = ask(&workers[1], "/readyz").json();
    let is_cluster = |part: &Value| part["name"] == "cluster local-a";
    assert!(
        parts["parts"].as_array().unwrap().iter().any(is_cluster),
        "{parts}"
    );
    let figures = workers.each_ref().map(|w| ask(w, "/metrics").body);
    let built = "daybook_builds_total{outcome=\"succeeded\"} ";
    for (figures, count) in figures.iter().zip(["1", "0"]) {
        let found = figures.lines().find_map(|line| line.strip_prefix(built));
        assert_eq!(found, Some(count), "{figures}");
        assert!(figures.contains("\ndaybook_nats_up 1\n"), "{figures}");
        let sent = "daybook_otlp_spans_total{outcome=\"sent\"}";
        assert!(figures.contains(sent), "{figures}");
    }
}

#[test]
fn where_spans_cannot_be_sent_to_is_said_at_the_start() {
    let mut server = Server::stopped(Settings::default());
    for (url, code) in [
        ("http://ada:secret@127.0.0.1:4318", "otlp_url_unusable"),
        ("grpc://127.0.0.1:4317", "otlp_url_unusable"),
    ] {
        server.settings().args = vec!["--otlp".into(), url.into()];
        let refused = server
            .try_restart_with(&["--listen", "127.0.0.1:0"])
            .unwrap_err();
        assert_eq!(refused.code, 2, "{refused:?}");
        assert!(refused.stderr.contains(code), "{refused:?}");
        assert!(!refused.stderr.contains("secret"), "{refused:?}");
    }
}
