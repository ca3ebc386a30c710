//! Who shares the traffic of a service, and where it goes.

use std::collections::BTreeMap;

use serde_json::{Value, json};

use crate::support::{Server, Settings, Visitor, application, replace_flags, until};

const INSTANCE: &str = "shop.production.web";
const LIVE: &str = "web.shop.localhost";
const ENVIRONMENT: &str = "web.production.shop.localhost";

/// A service with two deployments, the first of which is the main one.
fn two_versions(server: &Server) -> (String, String) {
    let source = application("--text one");
    server.define("shop", "web", &source, &[]);
    let first = server.deploy(INSTANCE, &[]);
    replace_flags(&source, "--text two");
    let second = server.deploy(INSTANCE, &["--no-switch"]);
    (first, second)
}

/// How often each text is answered.
fn answers(server: &Server, host: &str, times: usize) -> BTreeMap<String, usize> {
    let mut seen = BTreeMap::new();
    for _ in 0..times {
        let answer = server.get(host, "/");
        assert_eq!(answer.status, 200, "{answer:?}");
        *seen.entry(answer.body).or_default() += 1;
    }
    seen
}

/// Waits until a gateway has applied the newest table.
fn applied(server: &Server) -> Value {
    until("the newest table to be applied", || {
        let routes = server.read("/api/v1/projects/shop/routes");
        let table = &routes["table"];
        let mut gateways = routes["gateways"].as_object()?.values();
        gateways.any(|applied| applied == table).then_some(routes)
    })
}

fn route<'a>(routes: &'a Value, hostname: &str) -> &'a Value {
    let mut all = routes["routes"].as_array().unwrap().iter();
    all.find(|r| r["hostname"] == hostname)
        .unwrap_or_else(|| panic!("no route {hostname}: {routes}"))
}

/// The code that a command is refused with.
fn refused(server: &Server, command: &[&str]) -> String {
    let done = server.cli(&[command, &["--output", "json"]].concat());
    assert!(matches!(done.code, 1 | 2 | 4 | 5), "{done:?}");
    done.error()["code"].as_str().unwrap().to_owned()
}

#[test]
fn deployments_share_traffic_by_weight_until_one_takes_it_all_again() {
    let server = Server::start(Settings::default());
    let (first, second) = two_versions(&server);
    let before = applied(&server);
    let table = before["table"].to_string();
    assert_eq!(route(&before, LIVE)["previous"], json!([]));

    let to = [format!("{first}=90"), format!("{second}=10")];
    let set = ["routes", "set", INSTANCE, "--to", &to[0], "--to", &to[1]];
    let canary = [
        &set[..],
        &["--expect-table", &table, "--reason", "a canary"],
    ]
    .concat();
    let done = server.ok(&canary);
    assert!(done.stdout.contains("split"), "{done:?}");
    let routes = applied(&server);
    for host in [LIVE, ENVIRONMENT] {
        let seen = answers(&server, host, 100);
        assert!((8..=12).contains(&seen["two"]), "{host}: {seen:?}");
        let route = route(&routes, host);
        assert_eq!(route["reason"], "split");
        assert_eq!(route["backends"][1]["weight"], 10);
        assert_eq!(route["previous"][0]["deployment"], first.as_str());
        assert_eq!(route["table"], routes["table"]);
    }
    let list = server.ok(&["routes", "list", "shop", "--switches"]).stdout;
    let shares = format!("{}=90 {}=10", &first[28..], &second[28..]);
    assert!(list.contains(&shares), "{list}");
    assert!(list.contains("a canary"), "{list}");
    // The main deployment stays the main one.
    assert_eq!(server.deployment(&first)["main"], true);
    assert_eq!(server.deployment(&second)["main"], false);

    // What was decided on an older table, or makes no sense, is refused and changes nothing.
    assert_eq!(refused(&server, &canary), "routes_changed");
    let unknown = format!("{}=5", uuid::Uuid::nil());
    for (args, code) in [
        (vec!["--to", &unknown], "deployment_not_found"),
        (vec!["--to", &to[0], "--to", &to[0]], "invalid_weights"),
        (
            vec!["--to", &to[0], "--to", "zzzz=1"],
            "invalid_deployment_id",
        ),
    ] {
        let command = [&["routes", "set", INSTANCE], &args[..]].concat();
        assert_eq!(refused(&server, &command), code, "{args:?}");
    }
    let preview = server.host_of(&first, "deployment");
    let one = format!("--to={second}");
    let of_host = |host| ["routes", "set", host, "--project", "shop", &one];
    assert_eq!(refused(&server, &of_host(&preview)), "route_fixed");
    assert_eq!(
        refused(&server, &of_host("elsewhere.localhost")),
        "hostname_not_found"
    );
    assert_eq!(applied(&server)["table"], routes["table"]);

    // One address alone.
    server.ok(&of_host(LIVE));
    applied(&server);
    assert_eq!(answers(&server, LIVE, 20)["two"], 20);
    let seen = answers(&server, ENVIRONMENT, 20);
    assert!(seen["one"] > 10, "{seen:?}");

    // Going back: to the main deployment alone, on every address; and the canary stays out.
    server.ok(&["rollback", INSTANCE, "--reason", "it is ill"]);
    applied(&server);
    for host in [LIVE, ENVIRONMENT] {
        assert_eq!(answers(&server, host, 20)["one"], 20);
    }
    assert_eq!(refused(&server, &set), "pinned_out");
    assert_eq!(server.deployment(&first)["main"], true);
    server.ok(&["mark-main", &second]);
    server.ok(&set);
    server.check_replay();
}

#[test]
fn what_stops_leaves_the_routes_that_it_shares_before_it_stops() {
    let server = Server::start(Settings::default());
    let (first, second) = two_versions(&server);
    let halves = [format!("{first}=50"), format!("{second}=50")];
    server.ok(&[
        "routes", "set", INSTANCE, "--to", &halves[0], "--to", &halves[1],
    ]);
    applied(&server);
    assert_eq!(answers(&server, LIVE, 20).len(), 2);

    let visitor = Visitor::of_any(&server, LIVE, &["one", "two"]);
    server.ok(&["stop", &first, "--reason", "half is enough"]);
    visitor.was_always_served();
    let routes = applied(&server);
    let leads_to = &route(&routes, LIVE)["backends"];
    assert_eq!(leads_to.as_array().unwrap().len(), 1);
    assert_eq!(leads_to[0]["deployment"], second.as_str());
    assert_eq!(routes["switches"][0]["reason"], "leave");
    assert_eq!(answers(&server, LIVE, 20)["two"], 20);
    // Whatever is left is the main deployment; what stopped gets nothing by starting again.
    assert_eq!(server.deployment(&second)["main"], true);
    let share = format!("--to={first}");
    let set = ["routes", "set", INSTANCE, &share];
    assert_eq!(refused(&server, &set), "target_not_running");
    server.ok(&["start", &first]);
    assert_eq!(answers(&server, LIVE, 20)["two"], 20);
}

#[test]
fn a_rollback_by_deploying_once_more_is_pinned_as_any_other() {
    let server = Server::start(Settings::default());
    let source = application("--text one");
    server.define("shop", "web", &source, &[]);
    let first = server.deploy(INSTANCE, &[]);
    replace_flags(&source, "--text two");
    let second = server.deploy(INSTANCE, &[]);
    server.ok(&["stop", &first]);
    server.ok(&["terminate", &first]);
    let plain = ["rollback", INSTANCE, "--to", &first];
    assert_eq!(refused(&server, &plain), "target_not_running");

    let done = server.json(&["rollback", INSTANCE, "--redeploy", "--reason", "too loud"]);
    let again = done["id"].as_str().unwrap();
    assert_eq!(done["previous_main"], second.as_str());
    assert_eq!(server.get_from(LIVE, "/", again).body, "one");
    let detail = server.deployment(again);
    assert_eq!(detail["redeploy_of"], first.as_str(), "{detail}");
    // Nothing takes over by itself until somebody says so.
    replace_flags(&source, "--text three");
    let third = server.deploy(INSTANCE, &[]);
    assert_eq!(server.deployment(&third)["main"], false);
    assert_eq!(server.get_from(LIVE, "/", again).body, "one");
    server.ok(&["mark-main", &third]);
    server.get_from(LIVE, "/", &third);

    // Over the interface in one request, however often that is sent.
    server.ok(&["stop", again]);
    let body = json!({ "instance_id": INSTANCE, "to": again, "start": true });
    let answer = server.post("/api/v1/rollback", &body, Some("back-1"));
    assert_eq!(answer.status, 200, "{answer:?}");
    assert_eq!(answer.json()["previous_main"], third.as_str());
    assert_eq!(server.get_from(LIVE, "/", again).body, "one");
    let repeated = server.post("/api/v1/rollback", &body, Some("back-1"));
    assert_eq!(repeated.json(), answer.json());
    let body = json!({ "instance_id": INSTANCE, "to": first, "redeploy": true });
    let answer = server.post("/api/v1/rollback", &body, Some("back-2"));
    assert_eq!(answer.status, 200, "{answer:?}");
    let anew = answer.json()["id"].as_str().unwrap().to_owned();
    assert!(anew != first && anew != again);
    assert_eq!(server.get_from(LIVE, "/", &anew).body, "one");
    let repeated = server.post("/api/v1/rollback", &body, Some("back-2"));
    assert_eq!(repeated.json(), answer.json());
    let both = json!({ "instance_id": INSTANCE, "start": true, "redeploy": true });
    let answer = server.post("/api/v1/rollback", &both, None);
    assert_eq!(answer.json()["code"], "rollback_ambiguous");
    server.check_replay();
}
