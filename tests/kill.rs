//! `daybook up` killed with SIGKILL in every phase, and started again on the same data.
//!
//! Each time: the run ends as if nothing had happened, every effect is there exactly once, what
//! ran before runs on in the same processes, and the ledger folds to what the server says.

use std::collections::BTreeSet;
use std::fs;
use std::io::{BufRead, BufReader};
use std::process::Stdio;
use std::thread;

use daybook_testkit::git::{SourceRepository, git};
use reqwest::Method;
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};

use crate::support::{
    PATIENCE, Server, Settings, application, processes_in, processes_of, replace_flags, request,
    until,
};

const INSTANCE: &str = "shop.production.web";
const CLUSTERS: usize = 2;

/// A server with one live deployment in two clusters.
struct Shop {
    server: Server,
    source: SourceRepository,
    /// What is to run, oldest first.
    running: Vec<String>,
}

impl Shop {
    fn new() -> Self {
        let server = Server::start(Settings::default());
        // Slow enough to be killed while it starts.
        let source = application("--slow-start 300");
        server.ok(&["project", "create", "shop"]);
        server.ok(&[
            "env",
            "create",
            "shop",
            "production",
            "--cluster",
            "local-a",
            "--cluster",
            "local-b",
        ]);
        server.service("shop", "web", &source, &[]);
        let first = server.deploy(INSTANCE, &[]);
        let mut shop = Self {
            server,
            source,
            running: Vec::new(),
        };
        shop.running.push(first);
        shop.settled();
        shop
    }

    fn head(&self) -> u64 {
        let events = self.server.events();
        events.last().unwrap()["position"].as_u64().unwrap()
    }

    /// Sends a request; kills the server as soon as it streams an event of this type; starts it
    /// again and repeats the request, as a client does that does not know what became of it.
    fn kill_at(&mut self, kind: &str, path: &str, body: &Value) -> Value {
        let head = self.head();
        let server = &mut self.server;
        let after = head.to_string();
        let mut follower = server
            .command(&["events", "--follow", "--after", &after, "--output", "json"])
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let lines = BufReader::new(follower.stdout.take().unwrap()).lines();
        let pid = Pid::from_raw(i32::try_from(server.process().pid()).unwrap()).unwrap();
        let wanted = format!("dev.daybook.{kind}.v1");
        let killer = thread::spawn(move || {
            for line in lines.map_while(Result::ok) {
                let entry: Value = serde_json::from_str(&line).unwrap();
                if entry["event"]["type"] == wanted.as_str() {
                    kill_process(pid, Signal::KILL).unwrap();
                    return true;
                }
            }
            false
        });
        let key = format!("{kind}-{head}");
        let headers = [("Idempotency-Key", key.as_str())];
        let first = request(
            Method::POST,
            &format!("{}{path}", server.url()),
            &headers,
            Some(body),
        );
        if let Ok(answer) = &first {
            assert!(answer.status < 300, "{path}: {answer:?}");
        }
        until(&format!("{kind} seen"), || {
            killer.is_finished().then_some(())
        });
        let _ = follower.kill();
        let _ = follower.wait();
        assert!(killer.join().unwrap(), "the stream ended before {kind}");
        server.kill();
        server.restart();
        let again = server.post(path, body, Some(&key));
        assert!(again.status < 300, "{path} repeated: {again:?}");
        let again = again.json();
        if let Ok(answer) = first {
            assert_eq!(answer.json()["id"], again["id"], "the same request");
        }
        again
    }

    /// A new version, the server killed at an event of this type.
    fn deploy_killed_at(&mut self, kind: &str) {
        let before = self.workloads();
        let old = self.running.clone();
        replace_flags(&self.source, &format!("--slow-start 300 --text {kind}"));
        let head = self.head();
        let body = json!({"project": "shop", "environment": "production", "service": "web"});
        let answer = self.kill_at(kind, "/api/v1/deployments", &body);
        let id = answer["id"].as_str().unwrap().to_owned();
        self.server.wait_for(&id, "started");
        self.server.get_from("web.shop.localhost", "/", &id);
        self.running.push(id.clone());
        self.settled();

        let mut kinds = self.kinds_after(head);
        kinds.retain(|k| !k.ends_with("observed"));
        for once in [
            "deployment.requested",
            "build.requested",
            "build.succeeded",
            "deployment.image_pinned",
            "gitops.committed",
            "routing.switched",
            "deployment.succeeded",
        ] {
            let count = kinds.iter().filter(|k| *k == once).count();
            assert_eq!(count, 1, "{once} after a kill at {kind}: {kinds:?}");
        }
        assert!(
            before.is_subset(&self.workloads()),
            "killed at {kind}: what ran before was replaced"
        );
        for older in old {
            let host = self.server.host_of(&older, "deployment");
            self.server.get_from(&host, "/", &older);
        }
    }

    /// An operation, the server killed at an event of this type.
    fn operate_killed_at(&mut self, kind: &str, id: &str, operation: &str, state: &str) {
        let head = self.head();
        let path = format!("/api/v1/deployments/{id}/{operation}");
        self.kill_at(kind, &path, &json!({}));
        self.server.wait_for_state(id, state);
        self.running.retain(|r| r != id);
        if state == "started" {
            self.running.push(id.to_owned());
        }
        self.settled();
        let kinds = self.kinds_after(head);
        for once in ["gitops.committed", "deployment.change_committed"] {
            let count = kinds.iter().filter(|k| *k == once).count();
            assert_eq!(count, 1, "{once}, {operation} killed at {kind}: {kinds:?}");
        }
    }

    fn kinds_after(&self, position: u64) -> Vec<String> {
        let events = self.server.events().into_iter();
        let events = events.filter(|e| e["position"].as_u64().unwrap() > position);
        let kinds = events.map(|e| {
            let kind = e["event"]["type"].as_str().unwrap();
            let kind = kind.trim_start_matches("dev.daybook.");
            kind.trim_end_matches(".v1").to_owned()
        });
        kinds.collect()
    }

    fn workloads(&self) -> BTreeSet<i32> {
        let clusters = self.server.folder().data().join("clusters");
        processes_in(&clusters).into_iter().collect()
    }

    /// One process for each deployment and cluster, a commit for each that is recorded, nothing
    /// left of attempts, and projections that follow from the ledger.
    fn settled(&self) {
        let wanted = self.running.len() * CLUSTERS;
        until(&format!("{wanted} processes"), || {
            (self.workloads().len() == wanted).then_some(())
        });
        until("no checkouts left", || {
            let left = self.server.folder().work_in_progress();
            (left == 0).then_some(())
        });
        let recorded = self.kinds_after(0);
        let recorded = recorded.iter().filter(|k| *k == "gitops.committed").count();
        let made = git(
            &self.server.gitops("shop"),
            &["rev-list", "--count", "HEAD"],
        );
        // The first one creates the repository.
        assert_eq!(made.trim(), (recorded + 1).to_string(), "commits made");
        self.server.check_replay();
    }
}

/// Waits for states that `Server::wait_for` takes for failures.
trait WaitForState {
    fn wait_for_state(&self, id: &str, state: &str);
}

impl WaitForState for Server {
    fn wait_for_state(&self, id: &str, state: &str) {
        until(&format!("{id} {state} within {PATIENCE:?}"), || {
            (self.deployment(id)["state"] == state).then_some(())
        });
    }
}

#[test]
fn killed_while_it_is_queued_and_cloned() {
    let mut shop = Shop::new();
    for kind in [
        "deployment.requested",
        "deployment.queued",
        "deployment.cloning_started",
        "deployment.source_resolved",
    ] {
        shop.deploy_killed_at(kind);
    }
}

#[test]
fn killed_while_it_is_built() {
    let mut shop = Shop::new();
    for kind in [
        "build.requested",
        "build.started",
        "build.builder_started",
        "build.push_started",
        "build.succeeded",
    ] {
        shop.deploy_killed_at(kind);
    }
}

#[test]
fn killed_while_it_is_packaged_and_started() {
    let mut shop = Shop::new();
    for kind in [
        "deployment.image_pinned",
        "gitops.committed",
        "deployment.deploying_started",
        "deployment.workload_observed",
    ] {
        shop.deploy_killed_at(kind);
    }
}

#[test]
fn killed_while_traffic_is_switched() {
    let mut shop = Shop::new();
    for kind in [
        "routing.switched",
        "routing.applied",
        "deployment.succeeded",
    ] {
        shop.deploy_killed_at(kind);
    }
}

#[test]
fn killed_during_operations() {
    let mut shop = Shop::new();
    shop.deploy_killed_at("deployment.succeeded");
    let first = shop.running[0].clone();
    let second = shop.running[1].clone();
    for kind in [
        "deployment.stop_requested",
        "gitops.committed",
        "deployment.change_committed",
    ] {
        shop.operate_killed_at(kind, &first, "stop", "stopped");
        let started = if kind == "gitops.committed" {
            kind
        } else {
            "deployment.start_requested"
        };
        shop.operate_killed_at(started, &first, "start", "started");
    }
    let head = shop.head();
    shop.kill_at(
        "routing.switched",
        "/api/v1/rollback",
        &json!({"project": "shop", "environment": "production", "service": "web"}),
    );
    shop.server.get_from("web.shop.localhost", "/", &first);
    shop.settled();
    let switches = shop.kinds_after(head);
    let switches = switches.iter().filter(|k| *k == "routing.switched");
    assert_eq!(switches.count(), 1, "a rollback is one switch");
    shop.operate_killed_at("deployment.stopped", &second, "stop", "stopped");
    shop.operate_killed_at("gitops.committed", &second, "terminate", "terminated");
    shop.server.get_from("web.shop.localhost", "/", &first);
}

#[test]
fn a_build_command_ends_with_its_worker_and_instances_do_not() {
    let mut server = Server::start(Settings::default());
    let source = application("--text one");
    server.define("shop", "web", &source, &[]);
    let first = server.deploy(INSTANCE, &[]);
    let instances = processes_of(&first);
    assert!(!instances.is_empty());

    // A command that would take for ever, with a child that would too; the second time it does not.
    let folder = server.folder().path();
    let (pids, definition) = (folder.join("pids"), folder.join("service.json"));
    let script = format!(
        "[ -e {0} ] && exit 0; sleep 1000 & echo $$ $! > {0}; wait",
        pids.display()
    );
    let definition_of = json!({ "build": { "command": ["sh", "-c", script] } });
    fs::write(&definition, definition_of.to_string()).unwrap();
    let definition = definition.display().to_string();
    server.service("shop", "web", &source, &["--file", &definition]);
    let second = server.begin(INSTANCE, &[]);
    let building: Vec<i32> = until("the build command runs", || {
        let text = fs::read_to_string(&pids).ok()?;
        let pids: Vec<_> = text
            .split_whitespace()
            .map(|p| p.parse().unwrap())
            .collect();
        (pids.len() == 2).then_some(pids)
    });
    server.kill();
    until("the build command is gone", || {
        building.iter().all(|pid| !runs(*pid)).then_some(())
    });
    assert!(instances.iter().all(|pid| runs(*pid)));

    server.restart();
    server.wait_for(&second, "started");
    assert_eq!(processes_of(&first), instances);
}

/// Whether a process is there and does not only wait to be reaped.
fn runs(pid: i32) -> bool {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    let state = stat.rsplit(')').next().unwrap_or_default();
    !matches!(state.trim_start().chars().next(), None | Some('Z' | 'X'))
}
