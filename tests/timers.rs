//! Stops that happen by themselves: of what lost its traffic, and of what nobody asks for.

use daybook_testkit::git::SourceRepository;
use daybook_testkit::nats::{NatsBinary, NatsServer};
use jiff::Timestamp;
use serde_json::Value;

use crate::support::{Server, Settings, application, replace_flags, until};

const INSTANCE: &str = "shop.production.web";
const HOST: &str = "web.shop.localhost";

/// A service of which two versions are deployed, the second after the first.
fn two_versions(server: &Server, source: &SourceRepository) -> (String, String) {
    let first = server.deploy(INSTANCE, &[]);
    server.get_from(HOST, "/", &first);
    replace_flags(source, "--text two");
    let second = server.deploy(INSTANCE, &[]);
    server.get_from(HOST, "/", &second);
    (first, second)
}

fn start(settings: Settings) -> (Server, SourceRepository) {
    let server = Server::start(settings);
    let source = application("--text one");
    server.define("shop", "web", &source, &[]);
    (server, source)
}

fn count(server: &Server, id: &str, kind: &str) -> usize {
    server.kinds(id).iter().filter(|k| *k == kind).count()
}

/// Waits until the stop of a deployment is scheduled, and returns what is said of it.
#[track_caller]
fn scheduled(server: &Server, id: &str) -> Value {
    until("a scheduled stop", || {
        let stops = server.deployment(id)["stops"].clone();
        stops.is_object().then_some(stops)
    })
}

#[test]
fn what_was_replaced_is_stopped_after_its_time_and_says_so() {
    let (server, source) = start(Settings::default().arg("--keep-old=1s"));
    let (first, second) = two_versions(&server, &source);
    server.wait_for(&first, "stopped");
    assert_eq!(server.deployment(&second)["state"], "started");
    assert_eq!(server.deployment(&second)["stops"], Value::Null);
    server.get_from(HOST, "/", &second);
    for kind in ["stop_scheduled", "stop_requested", "stopped"] {
        let kind = format!("deployment.{kind}.v1");
        assert_eq!(count(&server, &first, &kind), 1, "{kind}");
    }

    // Who, when and why is on record; its address says what would start it.
    let audit = server.read(&format!("/api/v1/audit?deployment={first}&limit=500"));
    let rows = audit["audit"].as_array().unwrap();
    let fired = rows
        .iter()
        .find(|r| r["kind"] == "deployment.stop_requested.v1")
        .unwrap();
    let short = &second[28..];
    assert_eq!(fired["actor"]["id"], "worker/timers");
    assert_eq!(
        fired["reason"],
        format!("{short} took its traffic over, 1s ago")
    );
    let host = server.host_of(&first, "deployment");
    let told = until("the gateway knows", || {
        let answer = server.get(&host, "/");
        answer.body.contains("daybook start").then_some(answer)
    });
    assert_eq!(told.status, 503, "{told:?}");
    assert!(told.body.contains("took its traffic over"), "{told:?}");

    // Somebody starts it: it runs on. Who goes back to it has it stopped no more, but the other.
    server.ok(&["start", &first[28..]]);
    server.get_from(&host, "/", &first);
    assert_eq!(server.deployment(&first)["stops"], Value::Null);
    server.ok(&["rollback", INSTANCE]);
    server.wait_for(&second, "stopped");
    assert_eq!(server.deployment(&first)["state"], "started");
    server.get_from(HOST, "/", &first);
    server.check_replay();
}

#[test]
fn a_later_decision_calls_a_stop_off() {
    let (server, source) = start(Settings::default());
    let (first, second) = two_versions(&server, &source);
    let stop = scheduled(&server, &first);
    assert_eq!(stop["cause"], "replaced");
    assert_eq!(stop["by"], second.as_str());
    let due: Timestamp = stop["at"].as_str().unwrap().parse().unwrap();
    let in_minutes = due.duration_since(Timestamp::now()).as_mins();
    assert!((20..=30).contains(&in_minutes), "{stop}");
    let told = server.ok(&["status"]).stdout;
    assert!(
        told.contains(&format!("{} stops at", &first[28..])),
        "{told}"
    );
    assert!(told.contains("took its traffic over"), "{told}");
    let detail = server.ok(&["status", &first]).stdout;
    assert!(detail.contains("because"), "{detail}");

    // Going back to it, and forth.
    server.ok(&["rollback", INSTANCE]);
    assert_eq!(server.deployment(&first)["stops"], Value::Null);
    assert_eq!(scheduled(&server, &second)["cause"], "rolled_back");
    server.ok(&["mark-main", &second]);
    assert_eq!(server.deployment(&second)["stops"], Value::Null);
    scheduled(&server, &first);

    // Somebody wants to keep it.
    let operations = server.deployment(&first)["operations"].clone();
    assert!(operations.as_array().unwrap().contains(&"keep".into()));
    let done = server.ok(&["keep", &first, "--reason", "to compare both"]);
    assert!(done.stdout.contains("kept"), "{done:?}");
    let detail = server.deployment(&first);
    assert_eq!(
        (&detail["stops"], &detail["state"]),
        (&Value::Null, &"started".into())
    );
    let again = server.cli(&["keep", &first, "--output", "json"]);
    assert_eq!(again.code, 5, "{again:?}");
    assert_eq!(again.error()["code"], "no_stop_scheduled");
    let of_nobody = "00000000-0000-7000-8000-000000000000";
    let nobody = server.cli(&["keep", of_nobody, "--output", "json"]);
    assert_eq!(
        (nobody.code, &nobody.error()["code"]),
        (4, &"deployment_not_found".into())
    );

    // An environment has its own time, or none.
    server.ok(&["env", "set", "shop", "production", "--keep-old", "never"]);
    server.ok(&["mark-main", &first]);
    server.ok(&["stop", &second]);
    assert_eq!(count(&server, &second, "deployment.stop_scheduled.v1"), 1);
    let bad = server.cli(&["env", "set", "shop", "production", "--keep-old", "soon"]);
    assert_eq!(bad.code, 2, "{bad:?}");
    server.check_replay();
}

#[test]
fn a_stop_that_was_due_while_nothing_ran_happens_once_at_the_next_start() {
    let (mut server, source) = start(Settings::default().arg("--keep-old=15s"));
    let (first, second) = two_versions(&server, &source);
    let due: Timestamp = scheduled(&server, &first)["at"]
        .as_str()
        .unwrap()
        .parse()
        .unwrap();
    server.kill();
    until("the time is up", || (Timestamp::now() > due).then_some(()));
    server.restart();
    server.wait_for(&first, "stopped");
    server.get_from(HOST, "/", &second);
    assert_eq!(count(&server, &first, "deployment.stop_requested.v1"), 1);
    server.kill();
    server.restart();
    assert_eq!(server.deployment(&first)["state"], "stopped");
    assert_eq!(count(&server, &first, "deployment.stop_requested.v1"), 1);
    server.check_replay();
}

#[test]
fn a_preview_is_stopped_when_nobody_asks_for_it() {
    let server = Server::start(Settings::default());
    let source = application("--text one");
    server.ok(&["project", "create", "shop"]);
    server.ok(&[
        "env",
        "create",
        "shop",
        "preview",
        "--cluster",
        "local-a",
        "--keep-idle",
        "12s",
    ]);
    server.service("shop", "web", &source, &[]);
    let id = server.deploy("shop.preview.web", &[]);
    let host = "web.preview.shop.localhost";
    let first = scheduled(&server, &id);
    assert_eq!(first["cause"], "idle");

    // As long as somebody asks for it, it runs; and the ledger is told of that sparsely.
    let mut visits = 0;
    until("the stop is moved twice", || {
        server.get_from(host, "/", &id);
        visits += 1;
        (count(&server, &id, "deployment.stop_scheduled.v1") >= 3).then_some(())
    });
    let events = count(&server, &id, "deployment.stop_scheduled.v1");
    assert!(visits > events, "{visits} visits, {events} events");
    server.wait_for(&id, "stopped");
    let told = until("the gateway knows", || {
        let answer = server.get(host, "/");
        answer
            .body
            .contains("nobody has asked for it")
            .then_some(answer)
    });
    assert!(told.body.contains("daybook start"), "{told:?}");
    assert_eq!(count(&server, &id, "deployment.stop_requested.v1"), 1);

    // Started again, it is watched again.
    server.ok(&["start", &id]);
    scheduled(&server, &id);
    server.wait_for(&id, "stopped");
    server.check_replay();
}

#[test]
fn of_two_processes_that_look_one_stops_it() {
    let Some(binary) = NatsBinary::installed().into_iter().next() else {
        return daybook_testkit::left_out("two timers on NATS: there is no nats-server");
    };
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let nats = runtime.block_on(NatsServer::start(&binary));
    let settings = Settings::default()
        .arg("--keep-old=2s")
        .env("DAYBOOK_NATS", nats.url());
    let (server, source) = start(settings.clone());
    let others: Vec<_> = (0..2)
        .map(|_| {
            Server::start(Settings {
                roles: Some("timers"),
                ..settings.clone()
            })
        })
        .collect();
    let (first, second) = two_versions(&server, &source);
    server.wait_for(&first, "stopped");
    server.ok(&["rollback", INSTANCE, "--start"]);
    server.wait_for(&second, "stopped");
    for id in [&first, &second] {
        for kind in ["stop_scheduled", "stop_requested"] {
            let kind = format!("deployment.{kind}.v1");
            assert_eq!(count(&server, id, &kind), 1, "{kind} of {id}");
        }
    }
    server.check_replay();
    drop(others);
}
