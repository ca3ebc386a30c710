//! Environments from their creation to their end, and what is promoted between them.

use serde_json::Value;

use crate::support::{Server, Settings, application, processes_of, replace_flags, until};

const STAGING: &str = "shop.staging.web";
const PRODUCTION: &str = "shop.production.web";

/// A project with the environments `staging` and `production`, and one service.
fn shop(server: &Server, source: &daybook_testkit::git::SourceRepository) {
    server.define("shop", "web", source, &[]);
    server.ok(&["env", "create", "shop", "staging"]);
}

/// The code that a command is refused with.
fn refused(server: &Server, command: &[&str]) -> String {
    let done = server.cli(&[command, &["--output", "json"]].concat());
    done.error()["code"].as_str().unwrap().to_owned()
}

fn messages(server: &Server) -> Vec<String> {
    let log = daybook_testkit::git::git(
        server.gitops("shop").as_path(),
        &["log", "--format=%s", "--reverse", "main"],
    );
    log.lines().map(str::to_owned).collect()
}

/// Who made the commits about an environment, newest first.
fn authors(server: &Server, environment: &str) -> Vec<String> {
    let grep = format!("--grep={environment}");
    let log = daybook_testkit::git::git(
        server.gitops("shop").as_path(),
        &["log", "--format=%an", &grep, "main"],
    );
    log.lines().map(str::to_owned).collect()
}

fn files(server: &Server) -> String {
    daybook_testkit::git::git(
        server.gitops("shop").as_path(),
        &["ls-tree", "-r", "--name-only", "main"],
    )
}

fn of_service(server: &Server, environment: &str) -> Vec<Value> {
    let path = format!("/api/v1/deployments?project=shop&environment={environment}");
    let found = server.read(&path)["deployments"].as_array().cloned();
    found.unwrap_or_default()
}

#[test]
fn a_promotion_runs_the_same_image_and_names_where_it_comes_from() {
    let source = application("--text one");
    let server = Server::start(Settings::default());
    shop(&server, &source);

    let promote = ["promote", STAGING, "--to", "production"];
    assert_eq!(refused(&server, &promote), "nothing_to_promote");
    let first = server.deploy(STAGING, &[]);
    // What is not deployed there yet makes no difference to what is promoted.
    replace_flags(&source, "--text two");
    let done = server.ok(&[
        "promote",
        "--project",
        "shop",
        "--service",
        "web",
        "--from",
        "staging",
        "--to",
        "production",
        "--idempotency-key",
        "promotion-1",
        "--output",
        "json",
    ]);
    let promoted = done.json()["id"].as_str().unwrap().to_owned();
    assert_eq!(
        server.get_from("web.shop.localhost", "/", &promoted).body,
        "one"
    );

    let (before, after) = (server.deployment(&first), server.deployment(&promoted));
    assert_eq!(before["image"], after["image"]);
    // The commit is that of the deployment that it was built for, wherever it is asked for.
    assert!(before["source"]["commit"].is_string(), "{before}");
    assert_eq!(before["source"], after["source"]);
    let (first_row, row) = (server.history(&first), server.history(&promoted));
    for field in ["source_commit", "source_commit_message", "source_url"] {
        assert!(row[field].is_string(), "{row}");
        assert_eq!(first_row[field], row[field]);
    }
    let state = server.read("/api/v1/state?project=shop&environment=production");
    let main = &state["instances"][0]["main"];
    // How long each step took is known of what was built, wherever it is asked for.
    let took = until("all durations", || {
        let took = server.deployment(&first)["durations"].clone();
        took["endpoint_ms"].is_u64().then_some(took)
    });
    for step in [
        "queue", "clone", "build", "push", "sync", "startup", "total",
    ] {
        assert!(took[format!("{step}_ms")].is_u64(), "no {step} in {took}");
    }
    let told = server.ok(&["status", &first]).stdout;
    for step in ["clone", "push", "sync", "endpoint"] {
        assert!(told.contains(&format!("{step} ")), "no {step} in {told}");
    }
    assert_eq!(main["source_commit"], before["source"]["commit"]);
    assert_eq!(after["promoted_from"]["environment"], "staging");
    assert_eq!(after["promoted_from"]["deployment"], first.as_str());
    assert!(
        server
            .kinds(&promoted)
            .iter()
            .all(|k| !k.contains("building"))
    );
    let last = messages(&server).pop().unwrap();
    assert!(last.starts_with("promote(production): web "), "{last}");
    assert!(last.ends_with(" from staging"), "{last}");

    // Repeated under the same key it is the same promotion.
    let again = server.json(&[
        "promote",
        STAGING,
        "--to",
        "production",
        "--idempotency-key",
        "promotion-1",
        "--detach",
    ]);
    assert_eq!(again["id"], promoted.as_str());
    for (args, code) in [
        (
            vec!["promote", STAGING, "--to", "staging"],
            "same_environment",
        ),
        (
            vec!["promote", STAGING, "--to", "moon"],
            "environment_not_found",
        ),
        (
            vec![
                "promote",
                STAGING,
                "--to",
                "production",
                "--deployment",
                promoted.as_str(),
            ],
            "other_instance",
        ),
        (
            vec!["promote", "shop.staging", "--to", "production"],
            "invalid_instance_id",
        ),
    ] {
        assert_eq!(refused(&server, &args), code, "{args:?}");
    }
    server.check_replay();
}

#[test]
fn an_environment_made_from_another_runs_what_runs_there_and_leaves_nothing_behind() {
    let source = application("--text one");
    let server = Server::start(Settings::default());
    shop(&server, &source);
    let main = server.deploy(STAGING, &[]);
    // Beside it, and not the main one: it is not copied.
    replace_flags(&source, "--text two");
    server.deploy(STAGING, &["--no-switch"]);

    server.ok(&["env", "create", "shop", "pr-142", "--from", "staging"]);
    let copy = until("the new environment runs something", || {
        let found = of_service(&server, "pr-142");
        found.first().map(|d| d["id"].as_str().unwrap().to_owned())
    });
    server.wait_for(&copy, "started");
    assert_eq!(of_service(&server, "pr-142").len(), 1);
    let host = "web.pr-142.shop.localhost";
    assert_eq!(server.get_from(host, "/", &copy).body, "one");
    assert_eq!(
        server.deployment(&copy)["promoted_from"]["deployment"],
        main.as_str()
    );
    assert!(messages(&server).contains(&"env(create): pr-142 from staging".to_owned()));

    let delete = ["env", "delete", "shop", "pr-142"];
    assert_eq!(refused(&server, &delete), "not_confirmed");
    server.ok(&[
        "env", "delete", "shop", "pr-142", "--yes", "--reason", "merged",
    ]);
    assert_eq!(server.deployment(&copy)["state"], "terminated");
    until("the gateway to have heard of it", || {
        (server.get(host, "/").status == 404).then_some(())
    });
    assert!(processes_of(&copy).is_empty());
    assert_eq!(messages(&server).pop().unwrap(), "env(delete): pr-142");
    // Stopped, removed, deleted: all of it is what one person asked for.
    assert_eq!(authors(&server, "pr-142")[..3], ["tester"; 3]);
    assert!(
        !files(&server).contains("environments/pr-142"),
        "{}",
        files(&server)
    );
    for late in [
        vec!["deploy", "shop.pr-142.web"],
        vec!["env", "delete", "shop", "pr-142", "--yes"],
    ] {
        assert_eq!(refused(&server, &late), "environment_not_found");
    }
    // The other environments are as they were.
    assert_eq!(
        server.get("web.staging.shop.localhost", "/").by(),
        Some(main.as_str())
    );

    // Its name can be used again.
    server.ok(&["env", "create", "shop", "pr-142"]);
    let next = server.deploy("shop.pr-142.web", &[]);
    assert_eq!(server.get_from(host, "/", &next).body, "two");
    server.check_replay();
}

#[test]
fn an_environment_is_deleted_in_the_middle_of_a_build() {
    let source = application("--text one");
    let server = Server::start(Settings::default());
    let spec = server.folder().path().join("service.json");
    let build = serde_json::json!({ "build": { "command": ["/bin/sh", "-c", "sleep 600"] } });
    std::fs::write(&spec, build.to_string()).unwrap();
    server.define("shop", "web", &source, &["--file", spec.to_str().unwrap()]);
    let id = server.begin(PRODUCTION, &[]);
    until("it is being built", || {
        (server.deployment(&id)["state"] == "building").then_some(())
    });
    let accepted = server.delete("/api/v1/projects/shop/environments/production");
    assert_eq!(accepted.status, 202);
    assert_eq!(accepted.json()["status"], "deleting");
    until("it is gone", || {
        let listed = server.ok(&["env", "list", "shop"]).stdout;
        (listed == "no environments\n").then_some(())
    });
    assert_eq!(server.deployment(&id)["state"], "cancelled");
    server.check_replay();
}
