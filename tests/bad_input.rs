//! Bad input and faults: each ends in a state that says what happened and why, nothing is
//! half-applied, and what ran before keeps running and serving.

use daybook_testkit::git::{SourceRepository, git};
use daybook_testkit::registry::{Registry, RegistryConfig};
use serde_json::json;

use crate::support::{
    Process, Server, Settings, Visitor, application, processes_of, replace_flags, site, until,
};

const INSTANCE: &str = "shop.production.web";
const HOST: &str = "web.shop.localhost";

/// A server with an application that serves `one`, somebody who uses it, and its source.
struct Running {
    visitor: Visitor,
    id: String,
    source: SourceRepository,
    server: Server,
}

impl Running {
    fn start() -> Self {
        Self::on(Server::start(Settings::default()))
    }

    fn on(server: Server) -> Self {
        let source = application("--text one");
        server.define("shop", "web", &source, &[]);
        let id = server.deploy(INSTANCE, &[]);
        server.get_from(HOST, "/", &id);
        let visitor = Visitor::of(&server, HOST, "one");
        Self {
            visitor,
            id,
            source,
            server,
        }
    }

    /// Deploys these flags of the test application, which must fail, and returns the code.
    fn fails_with(&self, flags: &str) -> String {
        replace_flags(&self.source, flags);
        let done = self.server.cli(&["deploy", INSTANCE, "--output", "json"]);
        assert_eq!(done.code, 6, "{done:?}");
        let id = done.json()["id"].as_str().unwrap().to_owned();
        self.server.wait_for_failure(&id)
    }

    /// What ran before still does, in the same process, and nobody noticed anything.
    fn goes_on(self) -> Server {
        assert_eq!(self.server.get(HOST, "/").by(), Some(self.id.as_str()));
        assert_eq!(self.server.deployment(&self.id)["state"], "started");
        assert_eq!(processes_of(&self.id).len(), 1);
        self.visitor.was_always_served();
        self.server.check_replay();
        self.server
    }
}

#[test]
fn a_ref_that_does_not_exist_or_no_repository_fails_with_the_cause() {
    let running = Running::start();
    let server = &running.server;
    let id = server.begin(INSTANCE, &["--ref", "no-such-branch"]);
    assert_eq!(server.wait_for_failure(&id), "ref_not_found");
    // A folder without a repository in it.
    let folder = server.folder().path().display().to_string();
    server.ok(&["service", "create", "shop", "other", "--repo", &folder]);
    let id = server.begin("shop.production.other", &[]);
    assert_eq!(server.wait_for_failure(&id), "not_a_repository");
    // A repository without a commit.
    let empty = SourceRepository::new();
    server.service("shop", "empty", &empty, &[]);
    let id = server.begin("shop.production.empty", &[]);
    server.wait_for_failure(&id);
    running.goes_on();
}

#[test]
fn a_build_that_fails_says_so_with_its_output() {
    let running = Running::start();
    let server = &running.server;
    // Nothing that could be started.
    let source = SourceRepository::new();
    source.commit("Words", &[("README.md", "nothing to run\n")]);
    server.service("shop", "words", &source, &[]);
    let id = server.begin("shop.production.words", &[]);
    assert_eq!(server.wait_for_failure(&id), "no_start_command");
    // A build command that fails after it has said why.
    let spec = server.folder().path().join("service.json");
    let command = json!({ "build": { "command": ["/bin/sh", "-c", "echo the compiler is unhappy; exit 7"] } });
    std::fs::write(&spec, command.to_string()).unwrap();
    let source = site("page");
    server.service(
        "shop",
        "broken",
        &source,
        &["--file", spec.to_str().unwrap()],
    );
    let id = server.begin("shop.production.broken", &[]);
    assert_eq!(server.wait_for_failure(&id), "build_command_failed");
    let output = server.ok(&["logs", &id, "--type", "build"]).stdout;
    assert!(output.contains("the compiler is unhappy"), "{output}");
    running.goes_on();
}

#[test]
fn an_application_that_exits_at_once_fails_with_its_last_words() {
    let running = Running::start();
    assert_eq!(running.fails_with("--exit 3"), "CrashLoopBackOff");
    running.goes_on();
}

#[test]
fn an_application_that_never_becomes_ready_fails_at_its_deadline() {
    let running = Running::start();
    let deadline = ["--health-deadline", "3"];
    let server = &running.server;
    server.service("shop", "web", &running.source, &deadline);
    assert_eq!(running.fails_with("--silent"), "ReadinessProbeFailed");
    assert_eq!(running.fails_with("--unhealthy"), "ReadinessProbeFailed");
    running.goes_on();
}

#[test]
fn an_application_that_insists_on_a_port_that_is_taken_is_told_so() {
    let running = Running::start();
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = taken.local_addr().unwrap().port();
    assert_eq!(running.fails_with(&format!("--port {port}")), "PortInUse");
    running.goes_on();
}

#[test]
fn addresses_and_folders_that_are_taken_are_named_before_anything_is_touched() {
    let running = Running::start();
    let taken = |url: &str| url.trim_start_matches("http://").to_owned();
    let (listen, gateway) = (
        taken(&running.server.url()),
        taken(&running.server.gateway()),
    );
    let free = "127.0.0.1:0";
    for (listen, gateway, flag) in [(&*listen, free, "--listen"), (free, &*gateway, "--gateway")] {
        let folder = crate::support::Folder::new();
        let args = ["up", "--listen", listen, "--gateway", gateway];
        let refused = Process::try_start(&folder, &args, &[]).unwrap_err();
        assert_eq!(refused.code, 2, "{refused:?}");
        assert!(refused.stderr.contains("address_unusable"), "{refused:?}");
        assert!(refused.stderr.contains(flag), "{refused:?}");
        let left = std::fs::read_dir(folder.data()).map_or(0, Iterator::count);
        assert_eq!(left, 0, "it has touched the data folder");
    }
    let args = ["up", "--listen", free, "--gateway", free];
    let refused = Process::try_start(running.server.folder(), &args, &[]).unwrap_err();
    assert_eq!(refused.code, 1, "{refused:?}");
    assert!(refused.stderr.contains("log_unavailable"), "{refused:?}");
    assert!(refused.stderr.contains("--data"), "{refused:?}");
    running.goes_on();
}

#[test]
fn git_does_not_see_a_data_folder_and_goes_on_seeing_what_somebody_has() {
    let server = Server::start(Settings::default());
    let ignore = server.folder().data().join(".gitignore");
    assert_eq!(std::fs::read_to_string(ignore).unwrap(), "*\n");
    // A work tree that was named as data folder, as with `--data .`
    let folder = crate::support::Folder::new();
    std::fs::create_dir_all(folder.data()).unwrap();
    std::fs::write(folder.data().join("main.go"), "package main\n").unwrap();
    let free = "127.0.0.1:0";
    let args = ["up", "--listen", free, "--gateway", free];
    let _running = Process::start(&folder, &args, &[]);
    assert!(!folder.data().join(".gitignore").exists());
}

#[test]
fn a_registry_that_is_down_is_waited_for() {
    let Some(mut registry) = Registry::start(RegistryConfig::default()) else {
        return;
    };
    let prefix = format!("{}/daybook", registry.host());
    let settings = Settings::default().arg("--image-prefix").arg(prefix);
    let running = Running::on(Server::start(settings));
    registry.kill();
    replace_flags(&running.source, "--text one --print 1");
    let id = running.server.begin(INSTANCE, &[]);
    until("a second attempt at the build", || {
        let attempts = running.server.events();
        let second = attempts.iter().any(|e| {
            e["event"]["type"] == "dev.daybook.build.started.v1"
                && e["event"]["data"]["attempt"].as_u64() >= Some(2)
        });
        second.then_some(())
    });
    let detail = running.server.deployment(&id);
    assert_ne!(detail["state"], "failed", "{detail}");
    registry.restart();
    running.server.wait_for(&id, "started");
    running.server.get_from(HOST, "/", &id);
    running.visitor.was_always_served();
    running.server.check_replay();
}

#[test]
fn a_commit_pushed_by_hand_is_built_on_and_never_overwritten() {
    let running = Running::start();
    let server = &running.server;
    let clone = server.folder().path().join("by-hand");
    let bare = server.gitops("shop").display().to_string();
    git(
        server.folder().path(),
        &["clone", "--quiet", &bare, "by-hand"],
    );
    std::fs::write(clone.join("NOTES.md"), "by hand\n").unwrap();
    git(&clone, &["add", "--all"]);
    git(&clone, &["commit", "--quiet", "-m", "A note by hand"]);
    git(&clone, &["push", "--quiet", "origin", "HEAD"]);
    let by_hand = git(&clone, &["rev-parse", "HEAD"]);

    replace_flags(&running.source, "--text one --print 1");
    let id = server.deploy(INSTANCE, &[]);
    let bare = server.gitops("shop");
    let detail = server.deployment(&id);
    let commit = detail["commit"].as_str().unwrap();
    assert_eq!(git(&bare, &["rev-parse", &format!("{commit}^")]), by_hand);
    assert_eq!(git(&bare, &["show", "HEAD:NOTES.md"]), "by hand");
    // One line of history, with nothing lost.
    assert_eq!(git(&bare, &["log", "--merges", "--format=%h"]), "");
    server.get_from(HOST, "/", &id);
    // And a deployment that is taken out again keeps it too.
    replace_flags(&running.source, "--exit 1");
    let id = server.begin(INSTANCE, &[]);
    server.wait_for_failure(&id);
    assert_eq!(git(&bare, &["show", "HEAD:NOTES.md"]), "by hand");
    running.visitor.was_always_served();
    server.check_replay();
}
