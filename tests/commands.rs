//! What the command line itself promises: exit codes, errors in both forms, completion.

use std::path::Path;
use std::time::{Duration, SystemTime};

use reqwest::Method;
use serde_json::json;

use crate::support::{Done, Server, Settings, daybook, request, site, until};

fn run(args: &[&str]) -> Done {
    Done::of(daybook().args(args))
}

#[test]
fn without_a_server_the_command_line_says_what_is_wrong() {
    let address = daybook_testkit::free_addr();
    let server = format!("http://{address}");
    let done = run(&["status", "--server", &server, "--output", "json"]);
    assert_eq!(done.code, 3, "{done:?}");
    assert_eq!(done.error()["code"], "server_unreachable");
    assert!(
        done.error()["hint"]
            .as_str()
            .unwrap()
            .contains("daybook up")
    );
    assert_eq!(done.stdout, "");

    let done = run(&["status", "--server", "nonsense"]);
    assert_eq!(done.code, 2);
    assert!(done.stderr.starts_with("error: "), "{done:?}");
    assert_eq!(run(&["no-such-command"]).code, 2);
    assert_eq!(run(&["deploy"]).code, 2);
    assert_eq!(
        run(&["deploy", "a.b.c", "--ref", "x", "--image", "y"]).code,
        2
    );
    assert_eq!(run(&["deploy", "shop.web", "--server", &server]).code, 2);
    let help = run(&["--help"]);
    assert_eq!(help.code, 0);
    assert!(help.stdout.contains("Exit codes:"), "{}", help.stdout);
}

#[test]
fn completion_scripts_and_schemas_are_printed() {
    for shell in ["bash", "zsh", "fish"] {
        let done = run(&["completion", shell]);
        assert_eq!(done.code, 0, "{shell}");
        assert!(done.stdout.contains("mark-main"), "{shell}");
    }
    let folder = tempfile::tempdir().unwrap();
    let pages = folder.path().join("man1");
    assert_eq!(run(&["man", pages.to_str().unwrap()]).code, 0);
    let page = std::fs::read_to_string(pages.join("daybook-deploy.1")).unwrap();
    assert!(page.contains("Deploy a git ref or an image"), "{page}");
    // What is for programs only has no page.
    assert!(!pages.join("daybook-static-server.1").exists());
    let listed = run(&["schema"]).stdout;
    assert!(
        listed.lines().any(|l| l == "deployment.requested.v1"),
        "{listed}"
    );
    let schema = run(&["schema", "deployment.requested.v1"]).json_document();
    assert_eq!(schema["type"], json!("object"));
    assert_eq!(run(&["schema", "nothing.v1"]).code, 4);
}

#[test]
fn the_doctor_says_what_is_well_and_what_is_not() {
    let server = Server::start(Settings::default());
    let seen = server.json(&["doctor"]);
    let checks = seen["checks"].as_array().unwrap();
    let verdict = |name: &str| {
        let found = checks.iter().find(|c| c["name"] == name);
        found.unwrap_or_else(|| panic!("nothing about {name}: {seen}"))["verdict"].clone()
    };
    for name in [
        "server",
        "version",
        "clock",
        "log",
        "projections",
        "durability",
    ] {
        assert_eq!(verdict(name), "ok", "{seen}");
    }
    assert!(
        server
            .ok(&["doctor"])
            .stdout
            .contains("survives the loss of power")
    );
    let nowhere = format!("http://{}", daybook_testkit::free_addr());
    let done = run(&["doctor", "--server", &nowhere, "--output", "json"]);
    assert_eq!(done.code, 3, "{done:?}");
    let seen = done.json_document();
    assert_eq!(seen["checks"][0]["verdict"], "wrong");
    assert!(
        seen["checks"][0]["remedy"]
            .as_str()
            .unwrap()
            .contains("daybook up")
    );
}

/// Makes all files below a folder look as if they were three days old.
fn make_old(folder: &Path) {
    let then = SystemTime::now() - Duration::from_hours(72);
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            make_old(&path);
        } else {
            let file = std::fs::File::options().append(true).open(&path).unwrap();
            file.set_modified(then).unwrap();
        }
    }
}

#[test]
fn output_is_kept_for_as_long_as_somebody_says() {
    let mut server = Server::start(Settings::default());
    let source = site("hello");
    server.define("shop", "web", &source, &[]);
    let id = server.deploy("shop.production.web", &[]);
    let printed = |server: &Server| server.ok(&["logs", &id]).stdout;
    assert!(printed(&server).contains("cloning"), "{}", printed(&server));
    let lines = server.folder().data().join("log/lines");
    let restart = |server: &mut Server, flags: &[&str]| {
        server.stop();
        make_old(&lines);
        server.settings().args = flags.iter().map(|&flag| flag.to_owned()).collect();
        server.restart();
    };
    restart(&mut server, &["--lines-keep", "4d"]);
    assert!(printed(&server).contains("cloning"), "{}", printed(&server));
    restart(&mut server, &["--lines-keep", "48h"]);
    assert!(
        !printed(&server).contains("cloning"),
        "{}",
        printed(&server)
    );

    server.stop();
    let listen = ["--listen", "127.0.0.1:0"];
    for (flags, why) in [
        (["--lines-keep", "47h"], "48h or more"),
        (["--lines-keep", "long"], "no time to keep something for"),
        (["--lines-max-mib", "1"], "16..="),
    ] {
        server.settings().args = flags.map(str::to_owned).to_vec();
        let refused = server.try_restart_with(&listen).unwrap_err();
        assert_eq!(refused.code, 2, "{refused:?}");
        assert!(refused.stderr.contains(why), "{refused:?}");
    }
}

#[test]
fn the_dashboard_shows_what_is_served() {
    let dashboard = include_str!("../docs/grafana/daybook.json");
    let mut shown: Vec<&str> = dashboard
        .split(|c: char| !c.is_ascii_lowercase() && c != '_')
        .filter(|word| word.starts_with("daybook_"))
        .map(|word| word.trim_end_matches("_bucket"))
        // They are there where the log is on NATS.
        .filter(|word| !word.starts_with("daybook_nats_"))
        .collect();
    shown.sort_unstable();
    shown.dedup();
    assert!(shown.len() > 8, "{shown:?}");
    let server = Server::start(Settings::default());
    // What is signed is known once something is, and requests are counted once there are some.
    server.ok(&["project", "create", "shop"]);
    until("all of it", || {
        let metrics = format!("{}/metrics", server.url());
        let text = request(Method::GET, &metrics, &[], None).ok()?.body;
        let missing = |name: &&&str| !text.contains(&format!("# TYPE {name} "));
        let missing: Vec<_> = shown.iter().filter(missing).collect();
        missing.is_empty().then_some(())
    });
}

#[test]
fn what_does_not_exist_or_cannot_be_is_refused_with_a_way_out() {
    let server = Server::start(Settings::default());
    let refused = |args: &[&str], exit: i32, code: &str| {
        let mut all = args.to_vec();
        all.extend(["--output", "json"]);
        let done = server.cli(&all);
        assert_eq!(done.code, exit, "{args:?}: {done:?}");
        assert_eq!(done.error()["code"], code, "{args:?}: {done:?}");
        assert_eq!(done.stdout, "", "{args:?}");
        let hint = done.error()["hint"].as_str().unwrap_or_default().to_owned();
        assert!(!hint.is_empty(), "{args:?} has no way out: {done:?}");
        // The same for people.
        let told = server.cli(args);
        assert_eq!(told.code, exit);
        assert!(
            told.stderr.starts_with("error: ") && told.stderr.contains("hint: "),
            "{told:?}"
        );
    };
    refused(&["deploy", "shop.production.web"], 4, "project_not_found");
    let source = site("hello");
    server.define("shop", "web", &source, &[]);
    let head = server.events().len();
    refused(&["project", "create", "shop"], 5, "project_exists");
    refused(&["deploy", "other.production.web"], 4, "project_not_found");
    refused(&["deploy", "shop.production.api"], 4, "service_not_found");
    refused(&["deploy", "shop.staging.web"], 4, "environment_not_found");
    refused(
        &["rollback", "shop.production.web"],
        5,
        "nothing_to_roll_back",
    );
    refused(
        &["status", "00000000-0000-7000-8000-000000000000"],
        4,
        "deployment_not_found",
    );
    refused(&["stop", "abcd"], 4, "deployment_not_found");
    // What was refused is not in the ledger.
    assert_eq!(server.events().len(), head);
}

#[test]
fn the_same_request_twice_is_one_deployment() {
    let server = Server::start(Settings::default());
    let source = site("hello");
    server.define("shop", "web", &source, &[]);
    let key = ["--idempotency-key", "release-42"];
    let one = server.begin("shop.production.web", &key);
    let two = server.begin("shop.production.web", &key);
    assert_eq!(one, two);
    server.wait_for(&one, "started");
    // Also after it is done.
    assert_eq!(server.begin("shop.production.web", &key), one);
    let requests = server.events();
    let requests = requests.iter().filter(|e| {
        let kind = e["event"]["type"].as_str().unwrap();
        kind.ends_with("deployment.requested.v1")
    });
    assert_eq!(requests.count(), 1);
    // The key of one request does not do for another.
    let other = server.cli(&[
        "deploy",
        "shop.production.web",
        "--ref",
        "main",
        "--detach",
        "--idempotency-key",
        "release-42",
        "--output",
        "json",
    ]);
    assert_eq!(other.code, 2, "{other:?}");
    assert_eq!(other.error()["code"], "idempotency_key_reused");
}

#[test]
fn a_deployment_is_named_by_its_id_or_by_its_instance() {
    const WEB: &str = "shop.production.web";
    let server = Server::start(Settings::default());
    let repository = site("one");
    server.define("shop", "web", &repository, &[]);
    server.ok(&["env", "create", "shop", "staging", "--cluster", "local-a"]);
    let none = server.cli(&["logs", WEB, "--output", "json"]);
    assert_eq!(none.code, 4, "{none:?}");
    assert_eq!(none.error()["code"], "no_main_deployment");
    let one = server.deploy(WEB, &[]);
    until("its traffic", || {
        (server.deployment(&one)["main"] == true).then_some(())
    });
    server.ok(&["logs", WEB]);
    // What is the main deployment already is not offered to become it.
    let offered = |id: &str| {
        let detail = server.deployment(id);
        let mut listed = detail["operations"].as_array().unwrap().iter();
        let listed = listed.any(|o| *o == "mark_main");
        let possible = detail["possibilities"].as_array().unwrap().iter();
        let mut possible = possible.filter(|p| p["name"] == "mark_main");
        assert_eq!(possible.next().unwrap()["possible"], listed, "{detail}");
        listed
    };
    assert!(!offered(&one));
    let two = server.deploy(WEB, &["--no-switch"]);
    until("it is ready", || offered(&two).then_some(()));
    // The name of an operation is a command as well.
    server.ok(&["mark_main", &two]);
    assert!(!offered(&two));
    let refused = server.cli(&["rollback", &one, "--output", "json"]);
    assert_eq!(refused.code, 2, "{refused:?}");
    assert_eq!(refused.error()["code"], "not_the_main_deployment");
    let back = server.json(&["rollback", &two[28..]]);
    assert_eq!(back["id"], one.as_str());
    // Rolled back, it is: new deployments take over again once somebody says so.
    assert!(offered(&one));
    server.ok(&["mark-main", WEB]);
    assert!(!offered(&one));
    let again = server.json(&["redeploy", WEB, "--detach"]);
    let again = server.deployment(again["id"].as_str().unwrap());
    assert_eq!(again["redeploy_of"], one.as_str());
    assert_eq!(again["source"], server.deployment(&one)["source"]);
    let promoted = server.json(&["promote", &one[28..], "--to", "staging", "--detach"]);
    let promoted = server.deployment(promoted["id"].as_str().unwrap());
    assert_eq!(promoted["promoted_from"]["deployment"], one.as_str());
}
