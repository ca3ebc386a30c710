//! The ledger in words of others: attestations and CDEvents of a real deployment.

#[path = "../crates/projections/tests/cdevents/sdk.rs"]
mod sdk;

use std::collections::BTreeSet;
use std::fs;
use std::io::{BufRead, BufReader};

use daybook_store::tlog::Envelope;
use daybook_testkit::nats::{NatsBinary, NatsServer};
use futures_util::StreamExt;
use reqwest::Method;
use serde_json::Value;

use crate::support::{Server, Settings, application, request, until};

#[test]
fn a_deployment_that_succeeded_is_attested_and_told_in_cdevents() {
    let server = Server::start(Settings::default());
    let source = application("");
    server.define("shop", "web", &source, &[]);
    let id = server.deploy("shop.production.web", &[]);
    let state = server.deployment(&id);

    // The attestation holds with the ledger's key, offline, and says what the ledger says.
    let file = server.folder().data().join("attestation.json");
    let file = file.to_str().unwrap();
    server.ok(&["audit", "attestation", &id, "--out", file]);
    let key = request(
        Method::GET,
        &format!("{}/tlog/keys", server.url()),
        &[],
        None,
    );
    let key = key.unwrap().body.trim().to_owned();
    let checked = server.json(&["audit", "check-attestation", file, "--key", &key]);
    assert_eq!(checked["verdict"], "holds");
    let statement = &checked["statement"];
    assert_eq!(statement["_type"], "https://in-toto.io/Statement/v1");
    let subjects = statement["subject"].as_array().unwrap();
    let digest = state["image"]["digest"].as_str().unwrap();
    assert_eq!(
        subjects[0]["digest"]["sha256"],
        digest.trim_start_matches("sha256:")
    );
    assert_eq!(subjects[1]["digest"]["gitCommit"], state["commit"]);
    assert_eq!(statement["predicate"]["deployment"], id.as_str());
    let position = &statement["predicate"]["ledger"]["position"];
    let event = server.read(&format!("/api/v1/events/{position}"));
    assert_eq!(event["type"], "dev.daybook.deployment.succeeded.v1");
    assert_eq!(event["id"], statement["predicate"]["ledger"]["event"]);

    // What was changed, or is checked with another key, does not hold.
    let mut envelope: Envelope = serde_json::from_slice(&fs::read(file).unwrap()).unwrap();
    envelope.payload = envelope.payload.replacen('e', "f", 1);
    fs::write(file, serde_json::to_vec(&envelope).unwrap()).unwrap();
    let refused = server.cli(&["audit", "check-attestation", file, "--key", &key]);
    assert_eq!(refused.code, 8, "{refused:?}");
    assert!(refused.stderr.contains("does not hold"), "{refused:?}");

    // What never was live is not attested.
    server.cli(&["deploy", "shop.production.web", "--ref", "no-such-branch"]);
    let history = server.read("/api/v1/deployments?instance_id=shop.production.web");
    let failed = history["deployments"][0]["id"].as_str().unwrap().to_owned();
    let url = format!("{}/api/v1/deployments/{failed}/attestation", server.url());
    let refused = request(Method::GET, &url, &[], None).unwrap();
    assert_eq!(
        (refused.status, refused.json()["code"].clone()),
        (409, "not_succeeded".into())
    );

    // CDEvents: the run from its request to its end, and the same from a stream.
    let page = server.read(&format!("/api/v1/cdevents?deployment={id}&limit=500"));
    let told = page["cdevents"].as_array().unwrap();
    let kind = |c: &Value| {
        let kind = c["context"]["type"].as_str().unwrap();
        kind.trim_start_matches("dev.cdevents.")
            .trim_end_matches(".0.3.0")
            .to_owned()
    };
    for cdevent in told {
        sdk::takes(cdevent).unwrap();
    }
    let kinds: Vec<_> = told.iter().map(kind).collect();
    assert_eq!(kinds.first().unwrap(), "pipelinerun.queued");
    let found: BTreeSet<_> = kinds.iter().map(String::as_str).collect();
    for wanted in [
        "pipelinerun.started",
        "build.queued",
        "build.finished",
        "artifact.packaged",
        "artifact.published",
        "change.merged",
        "service.deployed",
        "pipelinerun.finished",
    ] {
        assert!(found.contains(wanted), "{wanted}: {kinds:?}");
    }
    let streamed = stream(
        &format!(
            "{}/api/v1/cdevents?deployment={id}&follow=true",
            server.url()
        ),
        "",
        told.len(),
    );
    assert_eq!(&streamed, told);
    server.check_replay();
}

/// The first events of a stream that is asked for with these headers, each ended by a line break.
pub(crate) fn stream(url: &str, headers: &str, count: usize) -> Vec<Value> {
    let address = url.strip_prefix("http://").unwrap();
    let (host, path) = address.split_once('/').unwrap();
    let mut stream = std::net::TcpStream::connect(host).unwrap();
    let ask = format!(
        "GET /{path} HTTP/1.1\r\nHost: {host}\r\nAccept: text/event-stream\r\n{headers}\r\n"
    );
    std::io::Write::write_all(&mut stream, ask.as_bytes()).unwrap();
    let lines = BufReader::new(stream).lines();
    let data = lines.filter_map(|line| {
        let line = line.unwrap();
        line.strip_prefix("data: ")
            .map(|d| serde_json::from_str(d).unwrap())
    });
    data.take(count).collect()
}

#[test]
fn cdevents_are_published_on_nats_once_and_in_order() {
    let Some(binary) = NatsBinary::newest().or_else(|| NatsBinary::installed().pop()) else {
        return daybook_testkit::left_out("CDEvents on NATS: there is no nats-server");
    };
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let nats = runtime.block_on(NatsServer::start(&binary));
    let mut server = Server::start(Settings::default().env("DAYBOOK_NATS", nats.url()));
    let source = application("--slow-start 5000");
    server.define("shop", "web", &source, &[]);
    let id = server.begin("shop.production.web", &[]);
    server.wait_for(&id, "deploying");
    server.kill();
    server.restart();
    server.wait_for(&id, "started");
    let published = || runtime.block_on(published(&nats.url()));
    let told = until("the run is published to its end", || {
        let told = published();
        let ended = |m: &Value| m["type"] == "dev.cdevents.pipelinerun.finished.0.3.0";
        told.iter().any(ended).then_some(told)
    });
    let ids: BTreeSet<_> = told.iter().map(|m| m["id"].as_str().unwrap()).collect();
    assert_eq!(ids.len(), told.len(), "one is there twice");
    let positions: Vec<_> = told
        .iter()
        .map(|m| m["data"]["customData"]["position"].as_u64().unwrap())
        .collect();
    assert!(positions.is_sorted(), "{positions:?}");
    let page = server.read("/api/v1/cdevents?limit=500");
    let all = page["cdevents"].as_array().unwrap();
    let published: Vec<_> = told.iter().map(|m| &m["data"]).collect();
    for cdevent in &published {
        sdk::takes(cdevent).unwrap();
    }
    assert_eq!(published, all.iter().take(told.len()).collect::<Vec<_>>());
}

/// All messages below `daybook.cdevents`.
async fn published(url: &str) -> Vec<Value> {
    let context = async_nats::jetstream::new(async_nats::connect(url).await.unwrap());
    let stream = context.get_stream("DAYBOOK_CDEVENTS").await.unwrap();
    let count = stream.cached_info().state.messages;
    let config = async_nats::jetstream::consumer::pull::Config::default();
    let consumer = stream.create_consumer(config).await.unwrap();
    let messages = consumer.messages().await.unwrap();
    let count = usize::try_from(count).unwrap();
    let messages: Vec<_> = messages.take(count).collect().await;
    let read = |m: &async_nats::jetstream::Message| serde_json::from_slice(&m.payload).unwrap();
    messages.iter().map(|m| read(m.as_ref().unwrap())).collect()
}
