//! A deployment to two clusters, one of which does not take it: each cluster says where it is,
//! the deployment has partially succeeded, and a new try of the one makes it whole.

use std::fs;
use std::path::{Path, PathBuf};

use daybook_testkit::git::SourceRepository;
use serde_json::{Value, json};

use crate::support::{Server, Settings, Visitor, application, processes_of, until};

const INSTANCE: &str = "shop.production.web";
const HOST: &str = "web.shop.localhost";

/// A shop in the clusters `local-a` and `local-b`, where `local-b` takes no release while there is
/// a file.
struct Shop {
    server: Server,
    source: SourceRepository,
    broken: PathBuf,
}

impl Shop {
    fn new() -> Self {
        let server = Server::start(Settings::default());
        let broken = server.folder().path().join("broken");
        let source = application("--text one");
        server.ok(&["project", "create", "shop"]);
        let mut env = vec!["env", "create", "shop", "production"];
        env.extend(["--cluster", "local-a", "--cluster", "local-b"]);
        server.ok(&env);
        server.service("shop", "web", &source, &[]);
        let shop = Self {
            server,
            source,
            broken,
        };
        shop.version("one");
        shop
    }

    /// The next version says this.
    fn version(&self, text: &str) {
        let broken = self.broken.display();
        let command = format!(
            "web: if [ \"$DAYBOOK_CLUSTER\" = local-b ] && [ -e {broken} ]; then exit 3; fi; \
             exec ./bin/app --text {text}\n"
        );
        self.source.write("Procfile", command);
        self.source.commit_all(&format!("Say {text}"));
    }

    fn breaks(&self) {
        fs::write(&self.broken, "").unwrap();
    }

    fn is_mended(&self) {
        fs::remove_file(&self.broken).unwrap();
    }

    fn states(&self, id: &str) -> Vec<String> {
        states(&self.server.deployment(id))
    }
}

fn states(detail: &Value) -> Vec<String> {
    let clusters = detail["cluster_status"].as_array().unwrap();
    let states = clusters.iter().map(|c| c["state"].as_str().unwrap());
    states.map(str::to_owned).collect()
}

fn possibility(detail: &Value, name: &str) -> Value {
    let all = detail["possibilities"].as_array().unwrap();
    all.iter().find(|p| p["name"] == name).unwrap().clone()
}

fn clusters_of(id: &str) -> Vec<String> {
    let mut clusters: Vec<_> = processes_of(id)
        .into_iter()
        .filter_map(|pid| fs::read(Path::new("/proc").join(pid.to_string()).join("environ")).ok())
        .flat_map(|environment| {
            let variables = environment.split(|b| *b == 0);
            let variables = variables.map(|v| String::from_utf8_lossy(v).into_owned());
            let clusters =
                variables.filter_map(|v| Some(v.strip_prefix("DAYBOOK_CLUSTER=")?.into()));
            clusters.collect::<Vec<String>>()
        })
        .collect();
    clusters.sort();
    clusters.dedup();
    clusters
}

#[test]
fn one_cluster_fails_and_a_new_try_makes_the_deployment_whole() {
    let shop = Shop::new();
    let server = &shop.server;
    let first = server.deploy(INSTANCE, &[]);
    server.get_from(HOST, "/", &first);
    let visitor = Visitor::of(server, HOST, "one");

    shop.breaks();
    shop.version("two");
    let followed = server.cli(&["deploy", INSTANCE]);
    assert_eq!(followed.code, 9, "{followed:?}");
    let told = &followed.stdout;
    for part in [
        "partially succeeded ready in local-a; failed in local-b",
        "local-a started 1/1",
        "local-b failed",
        "CrashLoopBackOff",
        "retry",
    ] {
        assert!(told.contains(part), "{part:?} is not in {told}");
    }
    let all = server.read("/api/v1/deployments?status=partially_started");
    let second = all["deployments"][0]["id"].as_str().unwrap().to_owned();
    let detail = server.deployment(&second);
    assert_eq!(detail["state"], "partially_started");
    assert_eq!(detail["phase"], "SUCCEEDED");
    assert_eq!(states(&detail), ["started", "failed"]);
    assert_eq!(
        detail["cluster_status"][1]["problem"]["code"],
        "CrashLoopBackOff"
    );
    assert_eq!(detail["failure"]["code"], "CrashLoopBackOff");
    for name in ["retry", "stop", "terminate", "mark_main", "redeploy"] {
        assert_eq!(possibility(&detail, name)["possible"], true, "{name}");
    }
    let cancel = possibility(&detail, "cancel");
    assert_eq!(cancel["possible"], false);
    assert!(
        cancel["reason"]
            .as_str()
            .unwrap()
            .contains("partially_started")
    );
    assert!(cancel["remedy"].as_str().unwrap().contains("daybook stop"));
    // It does not take over by itself, and is reached at its own address in the one cluster.
    assert_eq!(detail["main"], false);
    let preview = server.host_of(&second, "deployment");
    for _ in 0..20 {
        assert_eq!(server.get_from(&preview, "/", &second).body.trim(), "two");
    }
    assert_eq!(server.get(HOST, "/").by(), Some(first.as_str()));
    assert_eq!(server.history(&second)["status"], "partially_started");

    // A try that fails again, and one of a cluster that has not failed.
    let refused = server.cli(&["retry", &second, "--cluster", "local-a", "--output", "json"]);
    assert_eq!(refused.code, 5);
    assert_eq!(refused.error()["code"], "cluster_not_failed");
    let running = processes_of(&second);
    let again = server.cli(&["retry", &second, "--reason", "once more"]);
    assert_eq!(again.code, 9, "{again:?}");
    assert_eq!(shop.states(&second), ["started", "failed"]);
    assert_eq!(server.deployment(&second)["cluster_status"][1]["tries"], 2);

    // One that works: the ready cluster's process is still the same one.
    shop.is_mended();
    visitor.was_always_served();
    let mended = server.ok(&["retry", &second, "--cluster", "local-b"]);
    assert!(mended.stdout.contains("succeeded"), "{mended:?}");
    let detail = server.wait_for(&second, "started");
    assert_eq!(states(&detail), ["started", "started"]);
    assert_eq!(detail["failure"], Value::Null);
    assert_eq!(clusters_of(&second), ["local-a", "local-b"]);
    assert!(
        running
            .iter()
            .any(|pid| processes_of(&second).contains(pid))
    );
    // It takes over as it would have done in the first place.
    server.get_from(HOST, "/", &second);
    let kinds = server.kinds(&second);
    for kind in [
        "deployment.partially_succeeded.v1",
        "deployment.retry_requested.v1",
        "deployment.cluster_retried.v1",
        "deployment.succeeded.v1",
    ] {
        assert!(
            kinds.iter().any(|k| k == kind),
            "{kind} is not in {kinds:?}"
        );
    }
    server.check_replay();
}

#[test]
fn a_partial_success_takes_over_only_when_it_may_and_a_start_can_be_partial_too() {
    let shop = Shop::new();
    let server = &shop.server;
    let first = server.deploy(INSTANCE, &[]);
    shop.breaks();
    shop.version("two");
    let second = server.begin(INSTANCE, &["--allow-partial"]);
    server.wait_for(&second, "partially_started");
    server.get_from(HOST, "/", &second);
    assert_eq!(server.deployment(&second)["main"], true);

    // Whoever says so may have the other one back, and the partial one again.
    server.ok(&["mark-main", &first]);
    server.get_from(HOST, "/", &first);
    server.ok(&["mark-main", &second]);
    for _ in 0..20 {
        assert_eq!(server.get_from(HOST, "/", &second).body.trim(), "two");
    }
    server.ok(&["mark-main", &first]);
    server.ok(&["stop", &second]);
    assert_eq!(shop.states(&second), ["stopped", "stopped"]);
    assert_eq!(server.cli(&["start", &second]).code, 9);
    assert_eq!(shop.states(&second), ["started", "failed"]);
    server.ok(&["terminate", &second]);
    assert_eq!(shop.states(&second), ["terminated", "terminated"]);
    until("nothing of it runs", || {
        processes_of(&second).is_empty().then_some(())
    });

    // Where it fails everywhere it has failed.
    let command = json!({ "run": { "command": ["/bin/sh", "-c", "exit 4"] } });
    let spec = server.folder().path().join("service.json");
    fs::write(&spec, command.to_string()).unwrap();
    server.service(
        "shop",
        "web",
        &shop.source,
        &["--file", spec.to_str().unwrap()],
    );
    let third = server.begin(INSTANCE, &[]);
    assert_eq!(server.wait_for_failure(&third), "CrashLoopBackOff");
    let message = server.deployment(&third)["failure"]["message"].to_string();
    assert!(message.contains("local-a: ") && message.contains("local-b: "));
    assert_eq!(shop.states(&third), ["failed", "failed"]);
    server.check_replay();
}
