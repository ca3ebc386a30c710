//! Frozen environments: what is deployed to them waits, and goes when they are frozen no more.

use daybook_testkit::git::SourceRepository;
use jiff::Timestamp;
use serde_json::{Value, json};

use crate::support::{Done, Server, Settings, application, replace_flags, until};

const INSTANCE: &str = "shop.production.web";
const HOST: &str = "web.shop.localhost";

fn start(settings: Settings) -> (Server, SourceRepository) {
    let server = Server::start(settings);
    let source = application("--text one");
    server.define("shop", "web", &source, &[]);
    (server, source)
}

/// Freezes production until somebody takes that away.
fn freeze(server: &Server, name: &str) {
    let add = ["freeze", "add", "shop", "production", name];
    let when = ["--from", "2020-01-01T00:00", "--reason", "the sale"];
    server.ok(&[&add[..], &when[..]].concat());
}

fn thaw(server: &Server, name: &str) {
    server.ok(&["freeze", "remove", "shop", "production", name]);
}

/// Waits until a deployment is held, and returns by what.
#[track_caller]
fn held(server: &Server, id: &str) -> Value {
    until("it is held", || {
        let hold = server.deployment(id)["hold"].clone();
        (hold["waits"] == true).then_some(hold)
    })
}

fn count(server: &Server, id: &str, kind: &str) -> usize {
    let kind = format!("deployment.{kind}.v1");
    server.kinds(id).iter().filter(|k| **k == kind).count()
}

/// What an auditor's report says about a deployment, once the signed ledger has it.
fn reported(server: &Server, name: &str, id: &str) -> String {
    let data = server.folder().data();
    let keys = server.ok(&["keys", "show", "--data", data.to_str().unwrap()]);
    let file = server.folder().path().join("keys.txt");
    std::fs::write(&file, keys.stdout).unwrap();
    let (keys, state) = (
        file.to_str().unwrap(),
        server.folder().path().join("auditor"),
    );
    let state = state.to_str().unwrap();
    let args = [
        "audit", "report", name, "--keys", keys, "--state", state, "--output", "json",
    ];
    until("the report", || {
        let done = server.cli(&args);
        (done.code == 0 && done.stdout.contains(id)).then_some(done.stdout)
    })
}

#[track_caller]
fn refused(done: &Done, code: &str) {
    assert_eq!(done.error()["code"], code, "{done:?}");
}

#[test]
fn what_is_deployed_waits_and_the_newest_goes_when_it_ends() {
    let (mut server, source) = start(Settings::default());
    let main = server.deploy(INSTANCE, &[]);
    freeze(&server, "sale");
    let listed = server.json(&["freeze", "list", "shop", "production"]);
    assert_eq!(listed["freezes"][0]["open"], true, "{listed}");
    let environments = server.ok(&["env", "list", "shop"]).stdout;
    assert!(environments.contains("sale"), "{environments}");

    let older = server.begin(INSTANCE, &[]);
    let hold = held(&server, &older);
    assert_eq!(
        (&hold["freeze"], &hold["until"]),
        (&"sale".into(), &Value::Null)
    );
    assert_eq!(server.deployment(&older)["state"], "requested");
    let told = server.ok(&["status"]).stdout;
    assert!(told.contains("frozen by sale"), "{told}");
    replace_flags(&source, "--text two");
    let newer = server.begin(INSTANCE, &[]);
    held(&server, &newer);
    server.wait_until_cancelled(&older);

    // What cannot wait is refused, with what would make it possible.
    let json = ["--output", "json"];
    for args in [
        vec!["scale", INSTANCE, "--replicas", "2"],
        vec!["config", "set", INSTANCE, "LEVEL=debug"],
        vec!["mark-main", &main],
    ] {
        let done = server.cli(&[&args[..], &json[..]].concat());
        assert_eq!(done.code, 5, "{done:?}");
        refused(&done, "environment_frozen");
        let error = done.error().to_string();
        assert!(
            error.contains("sale") && error.contains("the sale"),
            "{error}"
        );
        assert!(
            error.contains("daybook freeze remove shop production sale"),
            "{error}"
        );
    }
    // What an environment is can be changed, and freezes it no less.
    server.ok(&["env", "set", "shop", "production", "--keep-old", "never"]);

    server.kill();
    server.restart();
    held(&server, &newer);
    server.get_from(HOST, "/", &main);
    thaw(&server, "sale");
    server.wait_for(&newer, "started");
    server.get_from(HOST, "/", &newer);
    assert_eq!(count(&server, &newer, "held"), 1);
    assert_eq!(count(&server, &newer, "released"), 1);
    server.ok(&["scale", INSTANCE, "--replicas", "2"]);

    let gone = ["freeze", "remove", "shop", "production", "sale"];
    refused(
        &server.cli(&[&gone[..], &json[..]].concat()),
        "freeze_not_found",
    );
    let nowhere = [
        "freeze",
        "add",
        "shop",
        "production",
        "weekend",
        "--weekly",
        "fri",
    ];
    let nowhere = [
        &nowhere[..],
        &["--at", "16:00", "--for", "64h", "--zone", "Moon"],
    ]
    .concat();
    refused(
        &server.cli(&[&nowhere[..], &json[..]].concat()),
        "unknown_time_zone",
    );
    server.ok(&[&nowhere[..11], &["--zone", "Europe/Berlin"]].concat());
    let listed = server.ok(&["freeze", "list", "shop", "production"]).stdout;
    assert!(
        listed.contains("every fri at 16:00 for 64h Europe/Berlin"),
        "{listed}"
    );
    server.check_replay();
}

#[test]
fn the_end_of_a_window_lets_go_once_however_late_it_is_noticed() {
    let (mut server, _source) = start(Settings::default());
    server.deploy(INSTANCE, &[]);
    // Short, and long enough for a deployment to be held by it however busy this machine is.
    let mut seconds = 4;
    let (id, end) = loop {
        let end = Timestamp::from_second(Timestamp::now().as_second() + seconds).unwrap();
        seconds *= 2;
        let to = end.strftime("%Y-%m-%dT%H:%M:%S").to_string();
        let add = ["freeze", "add", "shop", "production", "short"];
        let add = [&add[..], &["--from", "2020-01-01T00:00", "--to", &to]].concat();
        if server.cli(&add).code != 0 {
            continue;
        }
        let id = server.begin(INSTANCE, &[]);
        let hold = until("it is held or let through", || {
            let seen = server.deployment(&id);
            let decided = seen["hold"]["waits"] == true || seen["state"] == "started";
            decided.then(|| seen["hold"].clone())
        });
        if hold["waits"] == true {
            assert_eq!(hold["until"], end.to_string());
            break (id, end);
        }
    };
    server.kill();
    until("it has ended", || (Timestamp::now() > end).then_some(()));
    server.restart();
    server.wait_for(&id, "started");
    assert_eq!(count(&server, &id, "released"), 1);
    server.kill();
    server.restart();
    assert_eq!(count(&server, &id, "released"), 1);
    assert_eq!(server.deployment(&id)["state"], "started");
    let late = ["freeze", "add", "shop", "production", "short"];
    let late = [&late[..], &["--from", "2020-01-01", "--to", "2021-01-01"]].concat();
    refused(
        &server.cli(&[&late[..], &["--output", "json"]].concat()),
        "freeze_over",
    );
    server.check_replay();
}

#[test]
fn ways_back_are_open_and_an_emergency_goes_through() {
    let (server, source) = start(Settings::default());
    let first = server.deploy(INSTANCE, &[]);
    replace_flags(&source, "--text two");
    let second = server.deploy(INSTANCE, &[]);
    freeze(&server, "sale");
    // What was live before can be deployed once more, and be gone back from.
    let back = server.json(&["redeploy", &first, "--detach"]);
    let back = back["id"].as_str().unwrap().to_owned();
    server.wait_for(&back, "started");
    assert_eq!(count(&server, &back, "held"), 0);
    server.get_from(HOST, "/", &back);
    server.ok(&["rollback", INSTANCE]);
    server.get_from(HOST, "/", &second);

    let urgent = server.begin(INSTANCE, &[]);
    held(&server, &urgent);
    let json = ["--actor", "tester", "--output", "json"];
    let plain = ["freeze", "override", &urgent];
    refused(
        &server.cli(&[&plain[..], &json[..]].concat()),
        "reason_required",
    );
    server.ok(&[&plain[..], &["--reason", "the shop is down"], &json[..]].concat());
    server.wait_for(&urgent, "started");
    assert_eq!(count(&server, &urgent, "emergency_freeze_override"), 1);
    let told = server.ok(&["status"]).stdout;
    assert!(told.contains("tester let"), "{told}");
    let listed = server.json(&["approvals", "list"]);
    assert_eq!(listed["let_through"][0]["id"], urgent.as_str(), "{listed}");
    let report = reported(&server, "emergency", &urgent);
    assert!(report.contains("not reviewed"), "{report}");
    // The pin of the rollback stands; lifting it for this one is part of the emergency.
    server.ok(&["mark-main", &urgent]);
    server.get_from(HOST, "/", &urgent);
    let review = ["approvals", "review", &urgent];
    refused(
        &server.cli(&[&review[..], &json[..]].concat()),
        "own_change",
    );
    server.ok(&[&review[..], &["--actor", "bob", "--reason", "it was one"]].concat());
    assert_eq!(server.deployment(&urgent)["hold"], Value::Null);
    let again = server.cli(&[&plain[..], &["--reason", "once more"], &json[..]].concat());
    refused(&again, "illegal_state");
    server.check_replay();
}

#[test]
fn what_waits_for_its_approval_waits_for_the_freeze_too() {
    let (server, _source) = start(Settings::default());
    server.ok(&["env", "set", "shop", "production", "--approvals", "1"]);
    let id = server.begin(INSTANCE, &[]);
    server.wait_for(&id, "awaiting_approval");
    freeze(&server, "sale");
    server.ok(&["approvals", "approve", &id, "--actor", "bob"]);
    held(&server, &id);
    assert_eq!(server.deployment(&id)["state"], "packaging");
    // A newer one takes its place.
    let newer = server.begin(INSTANCE, &[]);
    held(&server, &newer);
    server.wait_for(&id, "cancelled");
    server.ok(&["freeze", "override", &newer, "--reason", "it is urgent"]);
    server.wait_for(&newer, "awaiting_approval");
    server.ok(&["approvals", "approve", &newer, "--actor", "bob"]);
    server.wait_for(&newer, "started");
    server.check_replay();
}

#[test]
fn freezes_are_told_over_the_interface() {
    let (server, _source) = start(Settings::default());
    freeze(&server, "sale");
    let base = "/api/v1/projects/shop/environments/production";
    let environment = server.read(base);
    assert_eq!(environment["freezes"][0]["name"], "sale");
    let body = json!({ "instance_id": INSTANCE, "replicas": 2 });
    let answer = server.post("/api/v1/scale", &body, None);
    assert_eq!(answer.status, 409, "{answer:?}");
    let unknown = server.read(&format!("{base}/freezes"));
    assert_eq!(unknown["freezes"].as_array().unwrap().len(), 1);
    let answer = server.delete(&format!("{base}/freezes/sale"));
    assert_eq!(answer.status, 200, "{answer:?}");
    assert_eq!(server.read(base)["freezes"], json!([]));
}

#[test]
fn a_way_back_leads_to_what_was_live() {
    let (server, source) = start(Settings::default());
    let first = server.deploy(INSTANCE, &[]);
    replace_flags(&source, "--text two");
    let beside = server.deploy(INSTANCE, &["--no-switch"]);
    replace_flags(&source, "--text three");
    let main = server.deploy(INSTANCE, &[]);
    freeze(&server, "sale");
    // What never had the traffic is none, by whichever name it is asked for.
    for to in [
        vec!["mark-main", &beside],
        vec!["rollback", INSTANCE, "--to", &beside],
    ] {
        let done = server.cli(&[&to[..], &["--output", "json"]].concat());
        refused(&done, "environment_frozen");
    }
    server.get_from(HOST, "/", &main);
    server.ok(&["rollback", INSTANCE, "--to", &first]);
    server.get_from(HOST, "/", &first);
    thaw(&server, "sale");
    server.ok(&["rollback", INSTANCE, "--to", &beside]);
    server.get_from(HOST, "/", &beside);
}
