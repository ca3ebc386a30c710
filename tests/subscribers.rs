//! Who subscribes to NATS directly has an account that can read one project, and nothing else: the
//! configuration of docs/subscribing.md, on real servers. Who follows with `daybook events` goes on
//! after a restart.

use std::time::Duration;

use async_nats::jetstream::{self, consumer};
use async_nats::{Client, ConnectOptions};
use daybook_testkit::nats::{NatsBinary, NatsServer, NatsSettings};
use futures_util::StreamExt;
use reqwest::Method;
use serde_json::Value;

use crate::support::{PATIENCE, Server, Settings, application, request, site, until};

const GUIDE: &str = include_str!("../docs/subscribing.md");

/// The part of the server's configuration that the guide shows.
fn accounts() -> String {
    let (_, rest) = GUIDE.split_once("```conf\n").expect("the guide has it");
    rest.split_once("```").expect("and it ends").0.to_owned()
}

async fn connect(nats: &NatsServer, user: &str, password: &str) -> Client {
    ConnectOptions::with_user_and_password(user.into(), password.into())
        .custom_inbox_prefix("_INBOX_shop")
        .connect(nats.url())
        .await
        .unwrap()
}

/// What comes to a consumer until there is `wanted` of it, or no more comes for `patience`.
async fn read(
    client: &Client,
    name: &str,
    subjects: &str,
    wanted: usize,
    patience: Duration,
) -> Option<Vec<Value>> {
    let mut context = jetstream::new(client.clone());
    context.set_timeout(patience);
    let stream = context.get_stream_no_info("DAYBOOK").await.unwrap();
    let config = consumer::pull::Config {
        durable_name: Some(name.to_owned()),
        filter_subject: subjects.to_owned(),
        ack_policy: consumer::AckPolicy::Explicit,
        ..consumer::pull::Config::default()
    };
    let consumer = stream.create_consumer(config).await.ok()?;
    let mut messages = consumer
        .batch()
        .max_messages(wanted)
        .expires(patience)
        .messages()
        .await
        .ok()?;
    let mut events = Vec::new();
    while let Some(message) = messages.next().await {
        let message = message.unwrap();
        let position = message.info().unwrap().stream_sequence;
        let event: Value = serde_json::from_slice(&message.payload).unwrap();
        events.push(serde_json::json!({ "position": position, "event": event }));
        message.ack().await.unwrap();
    }
    Some(events)
}

#[test]
fn a_subscribers_account_reads_its_project_and_does_nothing_else() {
    let mut binaries = NatsBinary::installed();
    binaries.extend(NatsBinary::newest());
    if binaries.is_empty() {
        daybook_testkit::left_out("accounts of subscribers: there is no nats-server");
    }
    let runtime = tokio::runtime::Runtime::new().unwrap();
    for binary in binaries {
        let settings = NatsSettings {
            extra: accounts(),
            user: Some(("daybook".into(), "change-me".into())),
            ..NatsSettings::default()
        };
        let nats = runtime.block_on(NatsServer::start_with(&binary, settings));
        let url = nats.url().replace("nats://", "nats://daybook:change-me@");
        let server = Server::start(Settings::default().env("DAYBOOK_NATS", url));
        let source = site("hello");
        server.define("shop", "web", &source, &[]);
        server.ok(&["project", "create", "blog"]);
        let wanted = server.ok(&["events", "--project", "shop", "-o", "json"]);
        let wanted = wanted.json_lines();

        runtime.block_on(async {
            let subscriber = connect(&nats, "shop-reader", "change-me-too").await;
            let read = async |name: &str, subjects: &str, wanted, seconds| {
                let patience = Duration::from_secs(seconds);
                read(&subscriber, name, subjects, wanted, patience).await
            };
            let subjects = "daybook.ev.shop.>";
            let found = read("shop-reader", subjects, wanted.len(), 30).await;
            assert_eq!(found.unwrap(), wanted, "{binary}");
            // What it has acknowledged does not come again.
            let again = read("shop-reader", subjects, 100, 3).await;
            assert_eq!(again.unwrap(), Vec::<Value>::new());
            // Not another project, nor all, nor with a consumer of Daybook's own.
            for (name, subjects) in [
                ("shop-reader", "daybook.ev.blog.>"),
                ("shop-reader", "daybook.ev.>"),
                ("shop-reader", ""),
                ("other", "daybook.ev.shop.>"),
            ] {
                let found = read(name, subjects, 100, 1).await;
                assert_eq!(found, None, "{name} on {subjects:?} of {binary}");
            }
            // Nor can it write, purge or delete.
            let head = server.events().len();
            let mut context = jetstream::new(subscriber.clone());
            context.set_timeout(Duration::from_secs(1));
            let subject = "daybook.ev.shop._.project.shop";
            let published = async { context.publish(subject, "x".into()).await?.await };
            let published = tokio::time::timeout(PATIENCE, published).await.unwrap();
            assert!(published.is_err(), "{binary}");
            let stream = context.get_stream_no_info("DAYBOOK").await.unwrap();
            assert!(stream.purge().await.is_err());
            assert!(stream.delete_message(1).await.is_err());
            assert!(context.delete_stream("DAYBOOK").await.is_err());
            assert!(stream.delete_consumer("shop-reader").await.is_err());
            assert_eq!(server.events().len(), head, "{binary}");
            drop(subscriber);
            let wrong = ConnectOptions::with_user_and_password("shop-reader".into(), "x".into())
                .connect(nats.url());
            assert!(wrong.await.is_err());
        });
    }
}

/// The events up to a position that pages have with a filter.
fn pages(server: &Server, filter: &str, head: u64) -> Vec<Value> {
    let page = server.read(&format!("/api/v1/events?limit=500&{filter}"));
    let events = page["events"].as_array().unwrap().iter();
    let events = events.filter(|e| e["position"].as_u64().unwrap() <= head);
    events
        .map(|e| serde_json::json!({ "position": e["position"], "event": e["event"] }))
        .collect()
}

#[test]
fn nats_delivers_what_pages_do_with_the_filters_of_the_guide() {
    let Some(binary) = NatsBinary::newest().or_else(|| NatsBinary::installed().pop()) else {
        return daybook_testkit::left_out("filters on NATS: there is no nats-server");
    };
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let nats = runtime.block_on(NatsServer::start(&binary));
    let server = Server::start(Settings::default().env("DAYBOOK_NATS", nats.url()));
    let source = site("hello");
    server.define("shop", "web", &source, &[]);
    server.ok(&["project", "create", "blog"]);
    let id = server.deploy("shop.production.web", &[]);
    let head = server.events().len() as u64;
    let client = runtime.block_on(async_nats::connect(nats.url())).unwrap();

    let all: &dyn Fn(&Value) -> bool = &|_: &Value| true;
    let of_kind: &dyn Fn(&Value) -> bool =
        &|event: &Value| event["type"] == "dev.daybook.deployment.succeeded.v1";
    let of_run: &dyn Fn(&Value) -> bool = &|event: &Value| {
        let subject = event["subject"].as_str().unwrap();
        event["correlationid"] == id.as_str() || subject.ends_with(&format!("/deployment/{id}"))
    };
    let run = format!("deployment={id}");
    // Subjects, what pages have of them, what a subscriber then picks, and what pages have of that.
    for (n, (subjects, wide, picks, narrow)) in [
        ("daybook.ev.shop.>", "project=shop", all, "project=shop"),
        (
            "daybook.ev.shop.production.>",
            "project=shop&environment=production",
            all,
            "project=shop&environment=production",
        ),
        (
            "daybook.ev.*.*.deployment.*",
            "kind=deployment",
            all,
            "kind=deployment",
        ),
        (
            "daybook.ev.*.*.deployment.*",
            "kind=deployment",
            of_kind,
            "kind=deployment.succeeded.v1",
        ),
        ("daybook.ev.>", "", of_run, run.as_str()),
    ]
    .into_iter()
    .enumerate()
    {
        let wanted = pages(&server, wide, head).len();
        let name = format!("reader-{n}");
        let patience = Duration::from_secs(30);
        let found = runtime.block_on(read(&client, &name, subjects, wanted, patience));
        let mut found = found.unwrap();
        assert_eq!(found.len(), wanted, "{subjects}");
        found.retain(|message| picks(&message["event"]));
        assert!(!found.is_empty(), "{subjects}, {narrow}");
        assert_eq!(found, pages(&server, narrow, head), "{subjects}, {narrow}");
    }
}

#[test]
fn a_follower_for_whom_nothing_came_yet_outlives_a_restart() {
    let mut server = Server::start(Settings::default());
    let repository = application("--text one");
    server.define("shop", "web", &repository, &[]);
    let head = server.read("/api/v1/events?limit=1")["head"].to_string();
    let file = server.folder().path().join("followed");
    let said = server.folder().path().join("said");
    let mut follower = server
        .command(&["events", "--follow", "--after", &head, "--output", "json"])
        .env("DAYBOOK_LOG", "info")
        .stdout(std::fs::File::create(&file).unwrap())
        .stderr(std::fs::File::create(&said).unwrap())
        .spawn()
        .unwrap();
    let metrics = format!("{}/metrics", server.url());
    until("the follower", || {
        let metrics = request(Method::GET, &metrics, &[], None).ok()?.body;
        metrics.contains("daybook_http_streams 1\n").then_some(())
    });
    let address = server.url().replace("http://", "");
    server.stop();
    until("the follower finds nobody there", || {
        let said = std::fs::read_to_string(&said).unwrap();
        said.contains("the server is not reached").then_some(())
    });
    server.restart_with(&["--listen", &address, "--gateway", "127.0.0.1:0"]);
    let another = application("--text two");
    server.service("shop", "other", &another, &[]);
    until("the event", || {
        let followed = std::fs::read_to_string(&file).unwrap();
        followed.contains("\"other\"").then_some(())
    });
    assert!(follower.try_wait().unwrap().is_none(), "it has given up");
    follower.kill().unwrap();
    follower.wait().unwrap();
}
