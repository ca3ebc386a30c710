//! How many instances run, with which variables: changed by one event and one commit each.

use std::fs;

use daybook_testkit::git::git;
use serde_json::Value;

use crate::support::{Server, Settings, application, processes_of, until};

const INSTANCE: &str = "shop.production.web";

fn count(server: &Server, kind: &str) -> usize {
    let kind = format!("dev.daybook.{kind}.v1");
    let events = server.events();
    events
        .iter()
        .filter(|e| e["event"]["type"] == kind.as_str())
        .count()
}

fn values(server: &Server) -> String {
    let file = "main:environments/production/values.yaml";
    git(&server.gitops("shop"), &["show", file])
}

#[test]
fn a_service_is_scaled_where_it_runs_by_one_event_and_one_commit() {
    let server = Server::start(Settings::default());
    let source = application("--text one");
    server.ok(&["project", "create", "shop"]);
    let clusters = ["--cluster", "local-a", "--cluster", "local-b"];
    let create = ["env", "create", "shop", "production"];
    server.ok(&[&create[..], &clusters[..]].concat());
    server.service("shop", "web", &source, &[]);
    let refused = server.cli(&["scale", INSTANCE, "--replicas", "3"]);
    assert_eq!(refused.code, 5, "{refused:?}");
    let first = server.deploy(INSTANCE, &[]);
    let before = git(&server.gitops("shop"), &["rev-parse", "main"]);
    let one: Vec<_> = processes_of(&first);

    let mut scale = server.command(&["scale", INSTANCE, "--replicas", "3", "--reason", "sale"]);
    let scaled = crate::support::Done::of(scale.env("DAYBOOK_ACTOR", "ada@example.com"));
    assert_eq!(scaled.code, 0, "{scaled:?}");
    let detail = server.deployment(&first);
    assert_eq!(detail["replicas"], 3);
    for cluster in detail["cluster_status"].as_array().unwrap() {
        assert_eq!(cluster["wanted"], 3, "{cluster}");
        assert_eq!(cluster["instances"].as_array().unwrap().len(), 3);
    }
    let now = processes_of(&first);
    assert!(one.iter().all(|pid| now.contains(pid)), "they run on");
    assert_eq!(now.len(), 6);
    let log = ["log", "--format=%an <%ae>|%s", &format!("{before}..main")];
    assert_eq!(
        git(&server.gitops("shop"), &log),
        "ada <ada@example.com>|config(production): update replicas to 3"
    );
    assert_eq!(count(&server, "deployment.scale_requested"), 1);
    assert_eq!(count(&server, "deployment.change_committed"), 1);

    // So it is already; and what cannot be is refused.
    server.ok(&["scale", INSTANCE, "--replicas", "3"]);
    assert_eq!(count(&server, "deployment.scale_requested"), 1);
    for replicas in ["0", "101"] {
        let refused = server.cli(&["scale", INSTANCE, "--replicas", replicas]);
        assert_eq!(refused.code, 2, "{refused:?}");
    }
    // A stop and a start keep it, and so does the next deployment.
    server.ok(&["stop", &first]);
    server.ok(&["start", &first]);
    until("all are back", || {
        (processes_of(&first).len() == 6).then_some(())
    });
    let second = server.deploy(INSTANCE, &[]);
    assert_eq!(server.deployment(&second)["replicas"], 3);
    assert_eq!(
        server.deployment(&second)["snapshot"]["config"]["replicas"],
        3
    );
    server.ok(&["scale", INSTANCE, "--replicas", "1"]);
    until("there are fewer", || {
        (processes_of(&second).len() == 2).then_some(())
    });
    server.check_replay();
}

#[test]
fn a_changed_variable_is_a_new_deployment_of_the_same_image() {
    let server = Server::start(Settings::default());
    let source = application("--text one");
    server.define("shop", "web", &source, &["--env", "MODE=plain"]);
    let first = server.deploy(INSTANCE, &[]);
    let image = server.deployment(&first)["image"].clone();
    let before = git(&server.gitops("shop"), &["rev-parse", "main"]);

    server.ok(&[
        "config",
        "set",
        INSTANCE,
        "GREETING=hello=you",
        "LEVEL=debug",
    ]);
    let second = server.json(&["config", "list", INSTANCE]);
    assert_eq!(second["env"]["GREETING"], "hello=you");
    assert_eq!(second["env"]["MODE"], "plain");
    let second = second["deployment"].as_str().unwrap().to_owned();
    assert_ne!(second, first);
    let detail = server.deployment(&second);
    assert_eq!(detail["image"], image);
    assert_eq!(detail["redeploy_of"], first.as_str());
    assert_eq!(count(&server, "build.requested"), 1, "nothing was built");
    let log = ["log", "--format=%s", &format!("{before}..main")];
    assert_eq!(
        git(&server.gitops("shop"), &log),
        "config(production): update GREETING, LEVEL"
    );
    let environ = |id: &str| {
        let pid = processes_of(id)[0];
        fs::read(format!("/proc/{pid}/environ")).unwrap()
    };
    let has = |id: &str, text: &str| {
        environ(id)
            .split(|b| *b == 0)
            .any(|variable| variable == text.as_bytes())
    };
    assert!(has(&second, "GREETING=hello=you"));

    // So it is already.
    let same = server
        .ok(&["config", "set", INSTANCE, "LEVEL=debug"])
        .stdout;
    assert!(same.contains("has it so already"), "{same}");
    // One is taken away, also one of the service's definition; the next deployment has the rest.
    server.ok(&["config", "unset", INSTANCE, "LEVEL", "MODE"]);
    let next = server.deploy(INSTANCE, &[]);
    assert!(has(&next, "GREETING=hello=you"));
    assert!(!has(&next, "LEVEL=debug") && !has(&next, "MODE=plain"));
    // Going back is going back to the variables, too.
    server.ok(&["rollback", INSTANCE, "--to", &first]);
    let back = server.json(&["config", "list", INSTANCE]);
    assert_eq!(back["deployment"], first.as_str());
    assert_eq!(back["env"]["GREETING"], Value::Null);

    for wrong in [
        &["set", "=x"][..],
        &["set", "NO"],
        &["set", "A B=1"],
        &["unset", "1A"],
    ] {
        let args = [&["config", wrong[0], INSTANCE], &wrong[1..]].concat();
        assert_eq!(server.cli(&args).code, 2, "{args:?}");
    }
    server.check_replay();
}

#[test]
fn what_people_write_into_a_values_file_survives_every_commit() {
    let server = Server::start(Settings::default().arg("--gitops-watch").arg("1"));
    let source = application("--text one");
    server.define("shop", "web", &source, &[]);
    let first = server.deploy(INSTANCE, &[]);
    let clone = tempfile::tempdir().unwrap();
    let at = clone.path();
    let repository = server.gitops("shop");
    git(at, &["clone", "--quiet", repository.to_str().unwrap(), "."]);
    let file = at.join("environments/production/values.yaml");
    let text = fs::read_to_string(&file).unwrap();
    let edited = text.replace(
        "  environment: production\n",
        "  # Ask the shop team before you touch this.\n  environment: production  # live\n",
    );
    let edited =
        format!("{edited}# for the ingress chart\ningress:\n  class: internal\n# the end\n");
    assert_ne!(edited, text);
    fs::write(&file, &edited).unwrap();
    git(at, &["commit", "--quiet", "--all", "-m", "add an ingress"]);
    git(at, &["push", "--quiet", "origin", "HEAD:main"]);
    let commit = git(at, &["rev-parse", "HEAD"]);
    until("it is found", || {
        let shown = server.json(&["gitops", "show", "shop"]);
        (shown["undecided"].as_u64() == Some(1)).then_some(())
    });
    server.ok(&["gitops", "adopt", "shop", &commit]);
    let kept = [
        "  # Ask the shop team before you touch this.\n  environment: production  # live\n",
        "# for the ingress chart\ningress:\n  class: internal\n# the end",
    ];
    let check = |what: &str| {
        let now = values(&server);
        for part in kept {
            assert!(now.contains(part), "after {what}: {now}");
        }
    };
    server.ok(&["scale", INSTANCE, "--replicas", "2"]);
    check("scale");
    server.ok(&["config", "set", INSTANCE, "A=1"]);
    check("config");
    server.ok(&["stop", &first]);
    server.ok(&["terminate", &first]);
    check("terminate");
    server.check_replay();
}

#[test]
fn a_deployment_keeps_its_amounts_of_cpu_and_memory_and_so_does_a_way_back_to_it() {
    let server = Server::start(Settings::default());
    let source = application("--text one");
    let amounts = ["--cpu", "0.25", "--memory", "256Mi"];
    let limits = ["--cpu-limit", "1", "--memory-limit", "0.5Gi"];
    server.define("shop", "web", &source, &[amounts, limits].concat());
    let first = server.deploy(INSTANCE, &[]);
    let asked = |id: &str| server.deployment(id)["snapshot"]["run"]["resources"].clone();
    let whole = serde_json::json!({
        "requests": { "cpu": "250m", "memory": "256Mi" },
        "limits": { "cpu": "1", "memory": "512Mi" },
    });
    assert_eq!(asked(&first), whole);
    let shown = server.ok(&["status", &first]);
    let line = "cpu 250m to 1, memory 256Mi to 512Mi";
    assert!(shown.stdout.contains(line), "{shown:?}");
    assert!(
        values(&server).contains("memory: 512Mi"),
        "{}",
        values(&server)
    );

    // The service gets others, and one deployment of it others again.
    server.service("shop", "web", &source, &["--cpu", "2"]);
    assert_eq!(asked(&first), whole, "what was deployed stays so");
    source.commit("Another", &[("another", "file")]);
    let second = server.deploy(INSTANCE, &["--memory-limit", "1Gi"]);
    let other = serde_json::json!({
        "requests": { "cpu": "2" },
        "limits": { "memory": "1Gi" },
    });
    assert_eq!(asked(&second), other);
    source.commit("A third", &[("third", "file")]);
    let third = server.deploy(INSTANCE, &[]);
    let of_service = serde_json::json!({ "requests": { "cpu": "2" } });
    assert_eq!(asked(&third), of_service);
    let back = ["rollback", INSTANCE, "--redeploy", "--to", &first];
    server.ok(&back);
    let now = server.json(&["config", "list", INSTANCE]);
    assert_eq!(asked(now["deployment"].as_str().unwrap()), whole);

    let deploy = ["deploy", INSTANCE];
    let create = ["service", "create", "shop", "other"];
    let refused = |command: &[&str], flags: &[&str], code: &str| {
        let json = ["--output", "json"];
        let refused = server.cli(&[command, flags, &json].concat());
        assert_ne!(refused.code, 0, "{refused:?}");
        assert_eq!(refused.error()["code"], code, "{refused:?}");
    };
    refused(&deploy, &["--cpu", "much"], "invalid_quantity");
    refused(&deploy, &["--memory", "512"], "invalid_quantity");
    let above = "request_above_limit";
    refused(&deploy, &["--cpu-limit", "1500m"], above);
    refused(&create, &["--cpu", "512Mi"], "invalid_quantity");
    let amounts = ["--memory", "2G", "--memory-limit", "1Gi"];
    refused(&create, &amounts, above);
    let scaled = ["--max-replicas", "5"];
    refused(&create, &scaled, "autoscaling_without_cpu");
    let fewer = ["--cpu", "1", "--replicas", "6", "--max-replicas", "5"];
    refused(&create, &fewer, "invalid_autoscaling");
    server.check_replay();
}
