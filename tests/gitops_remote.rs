//! GitOps repositories that are pushed elsewhere: over http with a token and over ssh with a pinned
//! host key; remotes that refuse, are away, or have another history; and a server that is killed
//! around a push.

use std::fs;
use std::path::PathBuf;

use daybook_testkit::git::{BareRemote, GitHttpServer, SshServer, git};
use serde_json::Value;
use tempfile::TempDir;
use tokio::runtime::Runtime;

use crate::support::{Server, Settings, application, processes_of, replace_flags, site, until};

const INSTANCE: &str = "shop.production.web";
const TOKEN: &str = "canary-token-8c1f";

/// A remote over http that asks for a token, with the file that has it.
struct Forge {
    remote: BareRemote,
    http: GitHttpServer,
    folder: TempDir,
    _runtime: Runtime,
}

impl Forge {
    fn new() -> Self {
        let runtime = Runtime::new().unwrap();
        let remote = BareRemote::new();
        let http = runtime.block_on(GitHttpServer::start(remote.root()));
        http.require("daybook", TOKEN);
        let folder = TempDir::new().unwrap();
        let forge = Self {
            remote,
            http,
            folder,
            _runtime: runtime,
        };
        let line = format!("http://daybook:{TOKEN}@{}\n", forge.http.address());
        fs::write(forge.credentials(), line).unwrap();
        forge
    }

    fn credentials(&self) -> PathBuf {
        self.folder.path().join("credentials")
    }

    fn url(&self) -> String {
        self.http.url(BareRemote::NAME)
    }

    fn settings(&self) -> Settings {
        Settings::default()
            .arg("--gitops-watch")
            .arg("1")
            .arg("--gitops-credentials")
            .arg(self.credentials().to_str().unwrap())
    }

    fn head(&self) -> String {
        self.remote.git(&["rev-parse", "main"])
    }

    /// What was committed for events, oldest first: each event once.
    fn titles(&self) -> Vec<String> {
        let log = self.remote.git(&[
            "log",
            "--reverse",
            "--format=%(trailers:key=Daybook-Event,valueonly,separator=)|%s",
            "main",
        ]);
        let mut events = Vec::new();
        let mut titles = Vec::new();
        for line in log.lines() {
            let (event, title) = line.split_once('|').unwrap();
            if !event.is_empty() {
                assert!(!events.contains(&event), "two commits of one event: {log}");
                events.push(event);
            }
            titles.push(title.to_owned());
        }
        titles
    }
}

fn show(server: &Server) -> Value {
    server.json(&["gitops", "show", "shop"])
}

fn kinds(server: &Server) -> Vec<String> {
    let events = server.events();
    let kinds = events.iter().filter_map(|e| e["event"]["type"].as_str());
    kinds.map(|k| k.replace("dev.daybook.", "")).collect()
}

#[test]
fn commits_are_pushed_to_a_remote_with_a_token_and_others_pushes_are_built_upon() {
    let forge = Forge::new();
    let server = Server::start(forge.settings());
    let source = site("one");
    server.define("shop", "web", &source, &[]);
    let url = forge.url();
    let set = server.ok(&["gitops", "remote", "shop", &url]).stdout;
    assert!(set.contains(&url), "{set}");
    server.deploy(INSTANCE, &[]);
    let shown = show(&server);
    assert_eq!(shown["remote"], url.as_str());
    assert_eq!(shown["head"], forge.head().as_str());
    assert!(
        forge
            .titles()
            .iter()
            .any(|t| t.starts_with("deploy(production): web "))
    );

    // Somebody pushes: the next commit of Daybook is on top of it, and theirs is an event.
    let foreign = forge.remote.foreign_commit("by hand", &[("NOTES", "x")]);
    source.commit("Two", &[("index.html", "two")]);
    server.deploy(INSTANCE, &[]);
    assert_eq!(forge.remote.git(&["rev-parse", "main^"]), foreign);
    until("the commit by hand is found", || {
        let shown = show(&server);
        (shown["foreign"][0]["commit"] == foreign.as_str()
            && shown["head"] == forge.head().as_str())
        .then_some(())
    });

    // The token is nowhere but in its file and on the way.
    let told = serde_json::to_string(&server.events()).unwrap();
    assert!(!told.contains(TOKEN));
    let config = fs::read_to_string(server.gitops("shop").join("config")).unwrap();
    assert!(
        !config.contains(TOKEN) && !config.contains("remote"),
        "{config}"
    );
    for wrong in [
        "http://daybook:hunter2@127.0.0.1/x.git",
        "ftp://host/x.git",
        "",
    ] {
        let refused = server.cli(&["gitops", "remote", "shop", wrong]);
        assert_eq!(refused.code, 2, "{refused:?}");
        assert!(!refused.stderr.contains("hunter2"), "{refused:?}");
    }
    assert_eq!(server.cli(&["gitops", "remote", "nothing", &url]).code, 4);

    // Without it, commits stay here.
    let before = forge.head();
    server.ok(&["gitops", "remote", "shop", "--clear"]);
    source.commit("Three", &[("index.html", "three")]);
    server.deploy(INSTANCE, &[]);
    assert_eq!(forge.head(), before);
    assert_eq!(show(&server)["remote"], Value::Null);
    // Set again, what is here already goes there without a further commit.
    server.ok(&["gitops", "remote", "shop", &url]);
    until("what was committed meanwhile is pushed", || {
        (show(&server)["head"] == forge.head().as_str()).then_some(())
    });
    forge.titles();
    git(&forge.remote.path(), &["fsck", "--strict"]);
    server.check_replay();
}

#[test]
fn a_remote_that_refuses_is_shown_and_everything_goes_on_when_it_is_back() {
    let forge = Forge::new();
    let mut server = Server::start(forge.settings());
    let source = site("one");
    server.define("shop", "web", &source, &[]);
    server.ok(&["gitops", "remote", "shop", &forge.url()]);
    let first = server.deploy(INSTANCE, &[]);
    let before = forge.head();

    // It takes nothing: the deployment waits, says why, and what runs stays.
    forge.remote.refuse_pushes("the branch is protected");
    source.commit("Two", &[("index.html", "two")]);
    let second = server.begin(INSTANCE, &[]);
    let trouble = until("it is said what the remote does", || {
        let trouble = show(&server)["remote_trouble"].clone();
        trouble["code"].is_string().then_some(trouble)
    });
    assert_eq!(trouble["code"], "gitops_push_refused");
    assert_eq!(trouble["during"], "push");
    assert!(trouble["message"].as_str().unwrap().contains("protected"));
    let status = server.ok(&["status"]).stdout;
    assert!(status.contains("wait for its remote since"), "{status}");
    until("the deployment says it too", || {
        let lines = server.ok(&["logs", &second]).stdout;
        lines
            .contains("not committed yet, and tried again")
            .then_some(())
    });
    assert_eq!(server.get("web.shop.localhost", "/").body, "one");
    assert_eq!(forge.head(), before);
    forge.remote.accept_pushes();
    server.wait_for(&second, "started");
    until("it is well again", || {
        show(&server)["remote_trouble"].is_null().then_some(())
    });

    // It is away, and a stop is asked for: a server that starts meanwhile runs what ran.
    forge.http.answer("/", 503, "text/plain", "");
    let trouble = until("it is said that it is away", || {
        let trouble = show(&server)["remote_trouble"].clone();
        (trouble["during"] == "fetch").then_some(trouble)
    });
    assert_eq!(trouble["code"], "gitops_remote_unavailable");
    server.stop();
    server.restart();
    server.get_from("web.shop.localhost", "/", &second);
    server.ok(&["stop", &first, "--detach"]);
    forge.http.behave();
    server.wait_for(&first, "stopped");
    until("both branches are the same", || {
        let shown = show(&server);
        (shown["remote_trouble"].is_null() && shown["head"] == forge.head().as_str()).then_some(())
    });
    let kinds = kinds(&server);
    let count = |kind: &str| kinds.iter().filter(|k| *k == kind).count();
    // The stop is tried once before the remote is back, or not: then it is a push that failed, too.
    let failing = count("gitops.remote_failing.v1");
    assert!((2..=3).contains(&failing), "{kinds:?}");
    assert_eq!(count("gitops.remote_recovered.v1"), 2, "{kinds:?}");
    forge.titles();
    server.check_replay();
}

#[test]
fn a_first_deployment_whose_token_is_refused_says_so() {
    let forge = Forge::new();
    fs::write(forge.credentials(), "https://a:b@example.invalid\n").unwrap();
    let server = Server::start(forge.settings());
    let source = site("one");
    server.define("shop", "web", &source, &[]);
    server.ok(&["gitops", "remote", "shop", &forge.url()]);
    let id = server.begin(INSTANCE, &[]);
    until("the deployment says why it waits", || {
        let lines = server.ok(&["logs", &id]).stdout;
        lines.contains("gitops_remote_auth").then_some(())
    });
    let unusable = forge.folder.path().join("unusable");
    fs::write(&unusable, "https://daybook@host\n").unwrap();
    let mut stopped = Server::stopped(
        Settings::default()
            .arg("--gitops-credentials")
            .arg(unusable.to_str().unwrap()),
    );
    let refused = stopped
        .try_restart_with(&["--listen", "127.0.0.1:0", "--gateway", "127.0.0.1:0"])
        .unwrap_err();
    assert!(format!("{refused:?}").contains("line 1"), "{refused:?}");
    let _ = stopped.folder();
}

#[test]
fn commits_are_pushed_over_ssh_to_a_host_whose_key_is_pinned() {
    let Some(ssh) = SshServer::start() else {
        daybook_testkit::left_out("sshd is not installed");
        return;
    };
    let remote = BareRemote::new();
    let arg = |settings: Settings, name: &str, value: PathBuf| {
        settings.arg(name).arg(value.to_str().unwrap())
    };
    let settings = Settings::default().arg("--gitops-watch").arg("1");
    let settings = arg(settings, "--gitops-known-hosts", ssh.known_hosts());
    let settings = arg(settings, "--gitops-identity", ssh.identity());
    let server = Server::start(settings);
    let source = site("one");
    server.define("shop", "web", &source, &[]);
    server.ok(&["gitops", "remote", "shop", &ssh.url(&remote.path())]);
    server.deploy(INSTANCE, &[]);
    assert_eq!(
        show(&server)["head"],
        remote.git(&["rev-parse", "main"]).as_str()
    );
}

#[test]
fn a_remote_with_another_history_stops_commits_until_somebody_decides() {
    let forge = Forge::new();
    let server = Server::start(forge.settings());
    let source = site("one");
    server.define("shop", "web", &source, &[]);
    server.deploy(INSTANCE, &[]);
    let other = forge
        .remote
        .foreign_commit("begin", &[("README.md", "theirs\n")]);
    server.ok(&["gitops", "remote", "shop", &forge.url()]);
    let shown = until("it is seen", || {
        let shown = show(&server);
        (!shown["rewritten"].is_null()).then_some(shown)
    });
    assert_eq!(shown["rewritten"]["found"], other.as_str());
    assert_eq!(forge.head(), other);
    server.ok(&["gitops", "adopt", "shop", &other[..9], "--reason", "moved"]);
    source.commit("Two", &[("index.html", "two")]);
    server.deploy(INSTANCE, &[]);
    assert_eq!(forge.remote.git(&["rev-parse", "main^"]), other);
    // What every repository begins with is there, and nothing of theirs is lost.
    let files = forge.remote.git(&["ls-tree", "-r", "--name-only", "main"]);
    assert!(files.contains("base/Chart.yaml"), "{files}");
    assert_eq!(forge.remote.git(&["show", "main:README.md"]), "theirs");
}

#[test]
fn what_is_deleted_while_its_remote_refuses_is_taken_out_when_that_is_back() {
    let forge = Forge::new();
    let server = Server::start(forge.settings());
    let source = application("--text one");
    server.define("shop", "web", &source, &[]);
    server.ok(&["gitops", "remote", "shop", &forge.url()]);
    let first = server.deploy(INSTANCE, &[]);
    replace_flags(&source, "--text two --slow-start 600000");
    let second = server.begin(INSTANCE, &[]);
    server.wait_for(&second, "deploying");
    until("it runs", || {
        (!processes_of(&second).is_empty()).then_some(())
    });

    forge.remote.refuse_pushes("the branch is protected");
    server.ok(&["cancel", &second]);
    server.wait_for(&second, "cancelled");
    server.ok(&["delete", &second]);
    assert_eq!(server.deployment(&second)["state"], "deleted");
    until("its removal waits for the remote", || {
        let trouble = show(&server)["remote_trouble"].clone();
        (trouble["during"] == "push").then_some(())
    });
    assert!(!processes_of(&second).is_empty());
    forge.remote.accept_pushes();
    server.check_undone(&second);
    let last = forge.titles().pop().unwrap();
    assert!(
        last.starts_with("config(production): remove web "),
        "{last}"
    );
    // Whoever cancelled it is who took it out.
    let author = forge.remote.git(&["log", "-1", "--format=%an", "main"]);
    assert_eq!(author, "tester");
    server.get_from("web.shop.localhost", "/", &first);
    server.ok(&["env", "delete", "shop", "production", "--yes"]);
    server.check_replay();
}
