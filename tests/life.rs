//! The life of real web applications, each from its own git repository.

use daybook_testkit::git::{SourceRepository, git};
use daybook_testkit::left_out;
use serde_json::Value;

use crate::support::{Server, Settings, application, site, until};

const INSTANCE: &str = "shop.production.web";

/// An application in some language.
struct Application {
    program: &'static str,
    detected: &'static str,
    file: &'static str,
    source: fn(&str) -> String,
}

const PYTHON: Application = Application {
    program: "python3",
    detected: "detected Python: python3 app.py",
    file: "app.py",
    source: |text| {
        format!(
            r#"import http.server, os

class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        body = b"{text}"
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

print("serving {text}", flush=True)
http.server.ThreadingHTTPServer(("127.0.0.1", int(os.environ["PORT"])), Handler).serve_forever()
"#
        )
    },
};

const NODE: Application = Application {
    program: "node",
    detected: "detected Node.js: node server.js",
    file: "server.js",
    source: |text| {
        format!(
            r#"const http = require("http");
console.log("serving {text}");
http.createServer((request, response) => response.end("{text}"))
    .listen(process.env.PORT, "127.0.0.1");
"#
        )
    },
};

impl Application {
    fn is_runnable(&self) -> bool {
        let found = std::process::Command::new(self.program)
            .arg("--version")
            .output()
            .is_ok_and(|o| o.status.success());
        if !found {
            left_out(format!("no {} on PATH", self.program));
        }
        found
    }

    fn commit(&self, source: &SourceRepository, text: &str) -> String {
        source.commit(&format!("Say {text}"), &[(self.file, &(self.source)(text))])
    }
}

#[test]
fn a_python_application_lives_its_whole_life() {
    live(&PYTHON);
}

#[test]
fn a_node_application_lives_its_whole_life() {
    live(&NODE);
}

fn live(app: &Application) {
    if !app.is_runnable() {
        return;
    }
    let source = SourceRepository::new();
    let commit_one = app.commit(&source, "one");
    let mut server = Server::start(Settings::default());
    server.define("shop", "web", &source, &[]);

    // The first version, followed.
    let done = server.ok(&["deploy", INSTANCE, "--reason", "the first one"]);
    assert!(done.stdout.contains("it is live"), "{done:?}");
    assert!(done.stdout.contains(app.detected), "{done:?}");
    let first = main_of(&server);
    let hosts = [
        "web.shop.localhost".to_owned(),
        "web.production.shop.localhost".to_owned(),
        server.host_of(&first, "deployment"),
    ];
    for host in &hosts {
        assert_eq!(server.get_from(host, "/", &first).body, "one", "{host}");
    }

    // A change is pushed and deployed: it takes over, and the first one stays under its own name.
    let commit_two = app.commit(&source, "two");
    let done = server.ok(&["deploy", INSTANCE, "--output", "json"]);
    let second = done.json()["id"].as_str().unwrap().to_owned();
    assert_ne!(first, second);
    assert_eq!(server.get_from(&hosts[0], "/", &second).body, "two");
    assert_eq!(server.get_from(&hosts[1], "/", &second).body, "two");
    assert_eq!(server.get_from(&hosts[2], "/", &first).body, "one");

    // Back and forth.
    let back = server.json(&["rollback", INSTANCE, "--reason", "too loud"]);
    assert_eq!(back["id"], first.as_str());
    assert_eq!(back["previous_main"], second.as_str());
    assert_eq!(server.get_from(&hosts[0], "/", &first).body, "one");
    let forth = server.json(&["mark-main", &second]);
    assert_eq!(forth["previous_main"], first.as_str());
    assert_eq!(server.get_from(&hosts[0], "/", &second).body, "two");

    the_commands_agree(&server, app, (&first, &commit_one), (&second, &commit_two));

    // What is gone back to is started first, where that is asked for.
    server.ok(&["stop", &first]);
    let refused = server.cli(&["rollback", INSTANCE, "--output", "json"]);
    assert_eq!(refused.error()["code"], "target_not_running");
    server.ok(&[
        "rollback",
        INSTANCE,
        "--start",
        "--reason",
        "still too loud",
    ]);
    assert_eq!(server.get_from(&hosts[0], "/", &first).body, "one");
    server.ok(&["mark-main", &second]);
    assert_eq!(server.get_from(&hosts[0], "/", &second).body, "two");

    // The main one is not stopped under its traffic; the other is stopped and started again.
    let tail = &first[28..];
    assert_eq!(server.cli(&["terminate", tail]).code, 5);
    server.ok(&["stop", tail]);
    assert_eq!(server.deployment(&first)["state"], "stopped");
    assert_ne!(server.get(&hosts[2], "/").status, 200);
    assert_eq!(server.cli(&["mark-main", tail]).code, 5);
    server.ok(&["start", tail]);
    assert_eq!(server.get_from(&hosts[2], "/", &first).body, "one");
    server.ok(&["stop", tail]);
    server.ok(&["terminate", tail]);
    assert_eq!(server.cli(&["start", tail]).code, 5);
    until("the gateway to have heard of it", || {
        (server.get(&hosts[2], "/").status == 404).then_some(())
    });
    assert!(
        !values(&server).contains(&first),
        "it is still in the repository"
    );
    server.ok(&["delete", &first]);
    assert!(!server.ok(&["status"]).stdout.contains(tail));
    assert_eq!(server.get_from(&hosts[0], "/", &second).body, "two");

    the_repository_tells_it(&server, &commit_one, &commit_two);
    the_projections_follow_from_the_ledger(&mut server);
    assert_eq!(server.get_from(&hosts[0], "/", &second).body, "two");
}

fn main_of(server: &Server) -> String {
    let state = server.json(&["status"]);
    let id = &state["instances"][0]["main"]["id"];
    id.as_str()
        .unwrap_or_else(|| panic!("no main in {state}"))
        .to_owned()
}

/// What the newest commit of the GitOps repository wants.
fn values(server: &Server) -> String {
    git(
        &server.gitops("shop"),
        &["show", "HEAD:environments/production/values.yaml"],
    )
}

fn the_commands_agree(
    server: &Server,
    app: &Application,
    first: (&str, &str),
    second: (&str, &str),
) {
    let history = server.json(&["history", "--project", "shop"]);
    let rows = history["history"].as_array().unwrap();
    assert_eq!(rows.len(), 2, "{history}");
    for (row, (id, commit)) in rows.iter().zip([second, first]) {
        let detail = server.json(&["status", id]);
        assert_eq!(row["deployment"], id);
        assert_eq!(row["active"], detail["main"]);
        assert_eq!(row["active"], id == second.0);
        assert_eq!(row["source_commit"], commit);
        assert_eq!(detail["source"]["commit"], commit);
        assert_eq!(row["digest"], detail["image"]["digest"]);
        assert_eq!(row["status"], "started");
        assert_eq!(row["actor"]["id"], "tester");
        assert_eq!(row["revision"], detail["revision"]);
    }
    assert_eq!(main_of(server), second.0);
    let text = server.ok(&["history"]).stdout;
    let status = server.ok(&["status"]).stdout;
    for (id, commit) in [first, second] {
        assert!(
            text.contains(&id[28..]) && text.contains(&commit[..7]),
            "{text}"
        );
        assert!(
            status.contains(&id[28..]) && status.contains(&commit[..7]),
            "{status}"
        );
    }

    // Output: of the build and of the process, as text and as lines of JSON.
    let build = server.ok(&["logs", second.0, "--type", "build"]).stdout;
    assert!(build.contains(app.detected), "{build}");
    until("the output of the application", || {
        let output = server.ok(&["logs", second.0, "--type", "container"]).stdout;
        output.contains("serving two").then_some(())
    });
    let lines = server
        .ok(&["logs", second.0, "--output", "json"])
        .json_lines();
    assert!(lines.iter().any(|l| l["text"] == app.detected), "{lines:?}");

    // The ledger: each event once, in order; and everything follows from it.
    let events = server.events();
    let positions: Vec<_> = events
        .iter()
        .map(|e| e["position"].as_u64().unwrap())
        .collect();
    let all: Vec<_> = (1..=positions.len() as u64).collect();
    assert_eq!(positions, all);
    let kinds = server.kinds(second.0);
    for kind in [
        "deployment.requested.v1",
        "deployment.queued.v1",
        "deployment.cloning_started.v1",
        "deployment.building_started.v1",
        "deployment.pushing_started.v1",
        "deployment.image_pinned.v1",
        "deployment.deploying_started.v1",
        "deployment.succeeded.v1",
    ] {
        assert_eq!(
            kinds.iter().filter(|k| *k == kind).count(),
            1,
            "{kind} in {kinds:?}"
        );
    }
    server.check_replay();
    let told = server.ok(&["replay"]).stdout;
    assert!(
        told.contains("deployment.succeeded.v1") && told.contains("the same:"),
        "{told}"
    );
}

fn the_repository_tells_it(server: &Server, one: &str, two: &str) {
    let clone = server.folder().path().join("clone");
    let url = format!("{}/git/shop.git", server.url());
    git(server.folder().path(), &["clone", "--quiet", &url, "clone"]);
    let log = git(&clone, &["log", "--reverse", "--format=%an: %s"]);
    let lines: Vec<_> = log.lines().collect();
    let (one, two) = (&one[..7], &two[..7]);
    assert_eq!(lines[1], format!("tester: deploy(production): web {one}"));
    assert_eq!(lines[2], format!("tester: deploy(production): web {two}"));
    let later = &lines[3..];
    assert!(!later.is_empty(), "{log}");
    for line in later {
        assert!(line.starts_with("tester: config(production): "), "{line}");
    }
    for file in [
        "base/Chart.yaml",
        "base/values.yaml",
        "environments/production/values.yaml",
    ] {
        assert!(clone.join(file).is_file(), "{file}");
    }
}

/// Rebuilt from nothing, the projections are what the server's were, to the same digest.
fn the_projections_follow_from_the_ledger(server: &mut Server) {
    let data = server.folder().data();
    until("a moment in which nothing happens", || {
        let before: Value = server.json(&["projections", "show"]);
        server.kill();
        let mut rebuild = crate::support::daybook();
        rebuild
            .args(["projections", "rebuild", "--output", "json", "--data"])
            .arg(&data);
        let done = crate::support::Done::of(&mut rebuild);
        assert_eq!(done.code, 0, "{done:?}");
        let rebuilt = done.json();
        server.restart();
        if rebuilt["position"] != before["position"] {
            return None;
        }
        assert_eq!(rebuilt["digest"], before["digest"]);
        Some(())
    });
}

#[test]
fn a_static_site_and_a_binary_with_a_procfile_live_side_by_side_on_two_clusters() {
    let server = Server::start(Settings::default());
    let page = site("<h1>a page</h1>");
    server.ok(&["project", "create", "shop"]);
    server.ok(&[
        "env",
        "create",
        "shop",
        "staging",
        "--cluster",
        "local-a",
        "--cluster",
        "local-b",
    ]);
    server.service("shop", "page", &page, &[]);
    let app = application("--text from-a-binary");
    server.service(
        "shop",
        "app",
        &app,
        &["--replicas", "2", "--env", "GREETING=hello"],
    );
    let page = server.begin("shop.staging.page", &[]);
    let app = server.begin("shop.staging.app", &[]);
    server.wait_for(&page, "started");
    let detail = server.wait_for(&app, "started");
    let clusters = detail["cluster_status"].as_array().unwrap();
    assert_eq!(clusters.len(), 2);
    for cluster in clusters {
        assert_eq!(cluster["wanted"], 2, "{cluster}");
        assert_eq!(
            cluster["instances"].as_array().unwrap().len(),
            2,
            "{cluster}"
        );
    }
    let answer = server.get_from("page.staging.shop.localhost", "/", &page);
    assert_eq!(answer.body, "<h1>a page</h1>");
    let answer = server.get_from("app.staging.shop.localhost", "/env", &app);
    assert!(answer.body.contains("GREETING=hello\n"), "{answer:?}");
    // No environment but the live one answers on the project's live names.
    assert_eq!(server.get("app.shop.localhost", "/").status, 404);
}
