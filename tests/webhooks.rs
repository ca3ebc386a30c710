//! Webhooks out, with real receivers.

use std::collections::{BTreeMap, BTreeSet};

use daybook_store::tlog::{ProofFile, parse_verifiers};
use serde_json::{Value, json};

use crate::attested::stream;
use crate::support::{Received, Receiver, Server, Settings, application, request, until};

fn start() -> Server {
    let server = Server::start(Settings::default().arg("--allow-private-webhooks"));
    server.ok(&["project", "create", "shop"]);
    server
}

/// Makes a webhook, and returns its id and its secret.
fn webhook(server: &Server, url: &str, flags: &[&str]) -> (String, String) {
    let made = server.json(&[&["webhook", "create", "shop", url], flags].concat());
    let text = |v: &Value| v.as_str().unwrap().to_owned();
    (text(&made["webhook"]["id"]), text(&made["secret"]))
}

/// Makes an event of the project, and returns its position.
fn event(server: &Server, name: &str) -> u64 {
    server.ok(&["env", "create", "shop", name]);
    let events = server.events();
    let made = events
        .iter()
        .rev()
        .find(|e| e["event"]["data"]["name"] == name);
    made.expect("the environment's event")["position"]
        .as_u64()
        .unwrap()
}

fn show(server: &Server, id: &str) -> Value {
    server.read(&format!("/api/v1/webhooks/{id}"))
}

fn deliveries(server: &Server, id: &str) -> Vec<Value> {
    let found = server.read(&format!("/api/v1/webhooks/{id}/deliveries?limit=500"));
    found["deliveries"].as_array().unwrap().clone()
}

/// The events of the project that a webhook has to get, by id, with their positions.
fn owed(server: &Server) -> BTreeMap<String, u64> {
    let events = server.events().into_iter();
    let owed = events.filter(|e| {
        let subject = e["event"]["subject"].as_str().unwrap();
        subject.starts_with("shop/") && !subject.contains("/subscription/")
    });
    owed.map(|e| {
        let id = e["event"]["id"].as_str().unwrap().to_owned();
        (id, e["position"].as_u64().unwrap())
    })
    .collect()
}

/// What a receiver took, in the order in which it came first: the position of each event, by the
/// run that it belongs to.
fn runs(taken: &[Received], owed: &BTreeMap<String, u64>) -> BTreeMap<String, Vec<u64>> {
    let mut seen = BTreeSet::new();
    let mut runs = BTreeMap::<String, Vec<u64>>::new();
    for received in taken {
        if seen.insert(received.id().to_owned())
            && let Some(position) = owed.get(received.id())
        {
            let run = received.json()["correlationid"]
                .as_str()
                .unwrap()
                .to_owned();
            runs.entry(run).or_default().push(*position);
        }
    }
    runs
}

#[test]
fn everything_is_sent_signed_and_in_order_though_the_receiver_fails_and_the_server_is_killed() {
    let mut server = Server::start(Settings::default().arg("--allow-private-webhooks"));
    let source = application("");
    server.define("shop", "web", &source, &[]);
    server.service("shop", "api", &source, &[]);
    // The first two tries of every third event fail.
    let receiver = Receiver::start(|r, before| {
        let digits = u32::from_str_radix(&r.id()[30..], 16).unwrap();
        let tries = before.iter().filter(|b| b.id() == r.id()).count();
        match digits % 3 == 0 && tries < 2 {
            true => (500, Vec::new()),
            false => (200, Vec::new()),
        }
    });
    let (id, secret) = webhook(&server, &receiver.url(), &["--after", "0"]);
    let first = server.begin("shop.production.web", &[]);
    let second = server.begin("shop.production.api", &[]);
    let before = receiver.taken().len();
    until("some deliveries", || {
        (receiver.taken().len() > before + 10).then_some(())
    });
    server.kill();
    server.restart();
    server.wait_for(&first, "started");
    server.wait_for(&second, "started");

    until("everything is sent", || {
        let owed = owed(&server);
        let taken = receiver.taken();
        let ids: BTreeSet<_> = taken.iter().map(Received::id).collect();
        owed.keys()
            .all(|id| ids.contains(id.as_str()))
            .then_some(())
    });
    let owed = owed(&server);
    for received in receiver.all() {
        assert_eq!(received.signed_by(&secret), 1, "{received:?}");
        assert_eq!(
            received.headers["content-type"],
            "application/cloudevents+json"
        );
    }
    let runs = runs(&receiver.taken(), &owed);
    for run in [&first, &second] {
        let positions = &runs[run];
        assert!(
            positions.len() > 10 && positions.is_sorted(),
            "{run}: {positions:?}"
        );
    }
    // What came is what is stored, byte for byte.
    let taken = receiver.taken();
    let received = taken.iter().find(|r| owed.contains_key(r.id())).unwrap();
    let position = owed[received.id()];
    let url = format!("{}/api/v1/events/{position}", server.url());
    let stored = request(reqwest::Method::GET, &url, &[], None).unwrap();
    assert_eq!(stored.body.as_bytes(), received.body);

    let told = deliveries(&server, &id);
    assert!(
        told.iter()
            .any(|d| d["outcome"] == "failed" && d["status"] == 500)
    );
    assert!(told.iter().all(|d| d["outcome"] != "dead_lettered"));
    // Nothing of the receiver's webhook itself is sent to it, and no secret is in the ledger.
    let key = secret.strip_prefix("whsec_").unwrap();
    for event in server.events() {
        assert!(!event.to_string().contains(key), "{event}");
    }
    assert_eq!(show(&server, &id)["dead_letters"], json!([]));
    server.check_replay();
}

#[test]
fn what_is_refused_again_and_again_is_set_aside_and_sent_later() {
    let server = start();
    let bad = Receiver::start(|r, before| {
        let broken = r.json()["data"]["name"] == "broken";
        let tries = before.iter().filter(|b| b.id() == r.id()).count();
        match broken && tries < 2 {
            true => (503, vec![("Retry-After", "1".into())]),
            false => (204, Vec::new()),
        }
    });
    let (id, secret) = webhook(
        &server,
        &bad.url(),
        &["--tries", "2", "--kind", "environment"],
    );
    let broken = event(&server, "broken");
    event(&server, "whole");
    until("it is set aside", || {
        let dead = show(&server, &id)["dead_letters"].clone();
        (dead[0]["position"] == broken).then_some(())
    });
    until("others are sent", || {
        bad.taken()
            .iter()
            .any(|r| r.json()["data"]["name"] == "whole")
            .then_some(())
    });
    let told = server.ok(&["webhook", "show", &id[24..]]).stdout;
    assert!(told.contains("status_503"), "{told}");
    // It is set aside first, and then written down.
    let tries = until("both tries are written down", || {
        let all = deliveries(&server, &id).into_iter();
        let tries: Vec<_> = all.filter(|d| d["position"] == broken).collect();
        (tries.len() == 2).then_some(tries)
    });
    assert_eq!(tries[0]["outcome"], "dead_lettered");
    assert_eq!(tries[1]["outcome"], "failed");
    let told = |name: &str| tries.iter().map(|t| t[name].as_u64().unwrap()).collect();
    let (numbers, lines): (Vec<u64>, Vec<u64>) = (told("number"), told("seq"));
    assert_eq!(numbers, [2, 1]);
    assert!(lines[0] > lines[1], "{lines:?}");
    let message = tries[1]["message"].as_str().unwrap();
    assert!(
        message.contains("503") && message.contains("no :("),
        "{message}"
    );

    let figures = [
        format!("daybook_webhook_dead_letters{{project=\"shop\",webhook=\"{id}\"}} 1"),
        format!("daybook_webhook_waiting_events{{webhook=\"{id}\"}} 0"),
        format!("daybook_webhook_lag_seconds{{webhook=\"{id}\"}} 0"),
        "daybook_webhook_tries_total{outcome=\"dead_lettered\"} 1".to_owned(),
        "daybook_webhook_tries_total{outcome=\"failed\"} 1".to_owned(),
        "daybook_webhooks{state=\"active\"} 1".to_owned(),
    ];
    until("the figures say so", || {
        let url = format!("{}/metrics", server.url());
        let text = request(reqwest::Method::GET, &url, &[], None).ok()?.body;
        let told = |wanted: &String| text.lines().any(|line| line == wanted);
        figures.iter().all(told).then_some(())
    });

    server.ok(&["webhook", "replay", &id]);
    until("it is sent after all", || {
        let gone = show(&server, &id)["dead_letters"] == json!([]);
        gone.then_some(())
    });
    assert_eq!(show(&server, &id)["retrying"], json!([]));
    let last = bad.taken().pop().unwrap();
    assert_eq!(last.json()["data"]["name"], "broken");
    assert_eq!(last.signed_by(&secret), 1);
    let kinds: Vec<_> = server
        .events()
        .iter()
        .map(|e| e["event"]["type"].clone())
        .collect();
    for kind in ["event_dead_lettered", "replay_requested", "event_replayed"] {
        let kind = format!("dev.daybook.subscription.{kind}.v1");
        assert_eq!(kinds.iter().filter(|k| **k == kind).count(), 1, "{kind}");
    }
    let refused = server.post(
        &format!("/api/v1/webhooks/{id}/replay"),
        &json!({ "positions": [1] }),
        None,
    );
    assert_eq!(
        (refused.status, refused.json()["code"].clone()),
        (409, "not_dead_lettered".into())
    );
}

#[test]
fn what_is_set_aside_can_be_discarded() {
    let server = start();
    let receiver = Receiver::start(|_, _| (400, Vec::new()));
    let flags = ["--tries", "1", "--kind", "environment"];
    let (id, _) = webhook(&server, &receiver.url(), &flags);
    let (first, second) = (event(&server, "first"), event(&server, "second"));
    until("both are set aside", || {
        let dead = show(&server, &id)["dead_letters"].clone();
        (dead.as_array()?.len() == 2).then_some(())
    });
    let asked = server.cli(&["webhook", "discard", &id]);
    assert!(asked.stderr.contains("--yes"), "{asked:?}");
    let position = first.to_string();
    let one = ["webhook", "discard", &id, "--yes", "--position", &position];
    let told = server.ok(&one).stdout;
    assert!(told.contains("1 events were discarded"), "{told}");
    assert_eq!(show(&server, &id)["dead_letters"][0]["position"], second);
    server.ok(&["webhook", "discard", &id, "--yes"]);
    assert_eq!(show(&server, &id)["dead_letters"], json!([]));
    assert_eq!(receiver.all().len(), 2);
}

#[test]
fn a_receiver_that_is_gone_is_not_asked_again_until_somebody_wants_it() {
    let server = start();
    let receiver = Receiver::start(|_, before| match before.is_empty() {
        true => (410, Vec::new()),
        false => (204, Vec::new()),
    });
    let (id, _) = webhook(&server, &receiver.url(), &["--kind", "environment"]);
    event(&server, "first");
    until("it is paused", || {
        (show(&server, &id)["pause"]["reason"] == "gone").then_some(())
    });
    event(&server, "second");
    assert_eq!(receiver.all().len(), 1);
    let test = server.cli(&["webhook", "test", &id]);
    assert!(test.stderr.contains("paused"), "{test:?}");
    server.ok(&["webhook", "resume", &id]);
    until("both are sent", || {
        (receiver.taken().len() == 2).then_some(())
    });
    // Nothing is said of the order of two environments.
    let taken = receiver.taken();
    let names: BTreeSet<_> = taken
        .iter()
        .map(|r| r.json()["data"]["name"].to_string())
        .collect();
    assert_eq!(names, ["\"first\"", "\"second\""].map(str::to_owned).into());

    server.ok(&["webhook", "pause", &id]);
    event(&server, "third");
    server.ok(&["webhook", "resume", &id]);
    until("what came meanwhile is sent", || {
        (receiver.taken().len() == 3).then_some(())
    });
    server.ok(&["webhook", "delete", &id, "--yes"]);
    let gone = server.cli(&["webhook", "show", &id]);
    assert!(gone.stderr.contains("no webhook"), "{gone:?}");
}

#[test]
fn a_webhook_is_changed_in_what_is_given_and_stays_as_it_is_in_the_rest() {
    let server = start();
    let receiver = Receiver::willing();
    let flags = ["--kind", "environment", "--env", "first", "--tries", "3"];
    let (id, _) = webhook(&server, &receiver.url(), &flags);
    let changed = server.json(&["webhook", "change", &id, "--env", "", "--tries", "4"]);
    let now = show(&server, &id);
    assert_eq!(changed["etag"], now["etag"]);
    assert_eq!(now["environment"], Value::Null);
    assert_eq!(now["tries"], 4);
    assert_eq!(now["kinds"], json!(["environment"]));
    event(&server, "second");
    until("it is sent", || {
        let taken = receiver.taken();
        let names: Vec<_> = taken
            .iter()
            .map(|r| r.json()["data"]["name"].clone())
            .collect();
        (names == ["second"]).then_some(())
    });
    let nothing = server.cli(&["webhook", "change", &id]);
    assert!(nothing.stderr.contains("--url"), "{nothing:?}");
    let all = [
        "webhook", "change", &id, "--kind", "", "--format", "cdevents",
    ];
    server.ok(&all);
    let now = show(&server, &id);
    assert_eq!(now["kinds"], json!([]));
    assert_eq!(now["format"], "cdevents");
}

#[test]
fn redirects_are_not_followed() {
    let server = start();
    let other = Receiver::willing();
    let elsewhere = other.url();
    let receiver = Receiver::start(move |_, _| (307, vec![("Location", elsewhere.clone())]));
    let (id, _) = webhook(&server, &receiver.url(), &["--tries", "1"]);
    let test = server.cli(&["webhook", "test", &id]);
    assert_ne!(test.code, 0, "{test:?}");
    let told = deliveries(&server, &id);
    assert_eq!(told[0]["code"], "redirect_refused", "{told:?}");
    assert!(other.all().is_empty());
}

#[test]
fn private_addresses_are_refused_unless_they_are_allowed() {
    let free = ["--listen", "127.0.0.1:0", "--gateway", "127.0.0.1:0"];
    let mut server = Server::start(Settings::default());
    server.ok(&["project", "create", "shop"]);
    let receiver = Receiver::willing();
    let refused = server.cli(&["webhook", "create", "shop", &receiver.url()]);
    assert!(refused.stderr.contains("not an https URL"), "{refused:?}");
    let port = receiver.url().rsplit(':').next().unwrap().to_owned();
    let hosts = [
        "127.0.0.1",
        "localhost",
        "[::1]",
        "169.254.169.254",
        "10.0.0.1",
    ];
    let url = |host: &str| format!("https://{host}:{port}");
    for host in hosts {
        let made = server.cli(&["webhook", "create", "shop", &url(host), "-o", "json"]);
        assert_eq!(made.error()["code"], "webhook_address_refused", "{made:?}");
    }
    // What was made while they were allowed is not called once they are not; nor is a name that
    // stands for such an address.
    server.stop();
    let allowing = [free.as_slice(), &["--allow-private-webhooks"]].concat();
    server.restart_with(&allowing);
    let made = hosts.map(|host| webhook(&server, &url(host), &["--tries", "1"]).0);
    server.stop();
    server.restart_with(&free);
    for (host, id) in hosts.iter().zip(made) {
        let test = server.cli(&["webhook", "test", &id]);
        assert_ne!(test.code, 0, "{test:?}");
        let told = deliveries(&server, &id);
        assert_eq!(told[0]["code"], "address_refused", "{host}: {told:?}");
    }
    assert!(receiver.all().is_empty());
}

#[test]
fn a_new_secret_signs_beside_the_old_one_for_a_while() {
    let server = start();
    let receiver = Receiver::willing();
    let (id, old) = webhook(&server, &receiver.url(), &[]);
    server.ok(&["webhook", "test", &id]);
    let new = server.json(&["webhook", "rotate", &id])["secret"]
        .as_str()
        .unwrap()
        .to_owned();
    assert_ne!(old, new);
    server.ok(&["webhook", "test", &id]);
    // A third one would cut short what receivers were promised.
    let refused = server.cli(&["webhook", "rotate", &id]);
    assert!(refused.stderr.contains("--overlap 0"), "{refused:?}");
    let last = server.json(&["webhook", "rotate", &id, "--overlap", "0"])["secret"]
        .as_str()
        .unwrap()
        .to_owned();
    server.ok(&["webhook", "test", &id]);
    let signed: Vec<_> = receiver
        .taken()
        .iter()
        .map(|r| [&old, &new, &last].map(|s| r.signed_by(s)))
        .collect();
    assert_eq!(signed, [[1, 0, 0], [1, 1, 0], [0, 0, 1]]);
    assert_eq!(show(&server, &id)["secret_version"], 3);
}

#[test]
fn an_event_carries_the_proof_that_it_is_in_the_signed_ledger() {
    let server = start();
    let receiver = Receiver::willing();
    webhook(
        &server,
        &receiver.url(),
        &["--proof", "--kind", "environment"],
    );
    let position = event(&server, "proven");
    let received = until("it is sent", || receiver.taken().pop());
    // What was signed is the body without its first member.
    let body = String::from_utf8(received.body.clone()).unwrap();
    let proof = received.json()["ledgerproof"].as_str().unwrap().to_owned();
    let (_, rest) = body.split_once("\",").unwrap();
    let stored = format!("{{{rest}");
    let url = format!("{}/api/v1/events/{position}", server.url());
    assert_eq!(
        stored,
        request(reqwest::Method::GET, &url, &[], None).unwrap().body
    );

    let url = format!("{}/tlog/keys", server.url());
    let keys = request(reqwest::Method::GET, &url, &[], None).unwrap().body;
    let keys = parse_verifiers(&keys).unwrap();
    let proof = ProofFile::parse(proof.as_bytes()).unwrap();
    assert_eq!(proof.index, position - 1);
    let origin = keys[0].name().to_owned();
    proof.verify(stored.as_bytes(), &origin, &keys).unwrap();
    let changed = stored.replace("proven", "forged");
    proof
        .verify(changed.as_bytes(), &origin, &keys)
        .unwrap_err();
}

#[test]
fn what_is_tried_again_is_shown_and_tries_are_streamed_as_they_are_made() {
    let server = start();
    let receiver = Receiver::start(|r, _| match r.json()["data"]["name"] == "slow" {
        true => (503, vec![("Retry-After", "3600".into())]),
        false => (204, Vec::new()),
    });
    let (id, _) = webhook(&server, &receiver.url(), &["--kind", "environment"]);
    let quick = event(&server, "quick");
    until("it is delivered", || {
        (deliveries(&server, &id).len() == 1).then_some(())
    });
    let before = deliveries(&server, &id)[0]["seq"].clone();
    let slow = event(&server, "slow");
    let url = format!(
        "{}/api/v1/webhooks/{id}/deliveries?outcome=failed",
        server.url()
    );
    let tried = stream(&url, &format!("Last-Event-ID: {before}\r\n"), 1).remove(0);
    assert_eq!(tried["position"], slow);
    assert_eq!(tried["outcome"], "failed");
    assert!(quick < slow && before.as_u64() < tried["seq"].as_u64());
    let retrying = show(&server, &id)["retrying"].clone();
    assert_eq!(retrying.as_array().unwrap().len(), 1);
    assert_eq!(retrying[0]["position"], slow);
    assert_eq!(
        (&retrying[0]["tries"], &retrying[0]["code"]),
        (&json!(1), &json!("status_503"))
    );
    assert!(retrying[0]["next_at"].is_string());
    let listed = server.ok(&["webhook", "list"]).stdout;
    assert!(listed.contains("one event is tried again"), "{listed}");
}
