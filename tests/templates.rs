//! Services from a catalogue: resolved first, then deployed like any other.

use std::fs;
use std::path::{Path, PathBuf};

use daybook_testkit::git::git;
use serde_json::Value;

use crate::support::{Done, Server, Settings, application, processes_of, site, until};

const INSTANCE: &str = "shop.production.web";
const HOST: &str = "web.shop.localhost";

/// A template of one's own: a program that counts in its volume how often it was started, and
/// answers with that and with what it knows of its secret.
const COUNTER: &str = r#"
name: counter
version: 2.0.0
description: Counts its starts.
parameters:
  repository:
    description: Its source.
  greeting:
    description: What it says.
    default: hello
secrets:
  TOKEN:
    description: Nobody knows it.
    generate: 32
service:
  source:
    url: ${repository}
  build:
    builder: archive
  run:
    command:
      - /bin/sh
      - -c
      - 'echo start >> "$COUNT_DIR/starts"; exec ./bin/app --text "${greeting} $(wc -l < "$COUNT_DIR/starts") $${#TOKEN}"'
    volumes:
      count:
        path: /count
        env: COUNT_DIR
"#;

/// A variable of the process that runs a deployment.
fn variable(deployment: &str, name: &str) -> String {
    let process = until("its process", || processes_of(deployment).first().copied());
    let all = fs::read(format!("/proc/{process}/environ")).unwrap();
    let prefix = format!("{name}=");
    let all = String::from_utf8(all).unwrap();
    let value = all.split('\0').find_map(|v| v.strip_prefix(&prefix));
    value.unwrap_or_else(|| panic!("no {name}")).to_owned()
}

fn start(settings: Settings) -> Server {
    let server = Server::start(settings);
    server.ok(&["project", "create", "shop"]);
    let create = [
        "env",
        "create",
        "shop",
        "production",
        "--cluster",
        "local-a",
    ];
    server.ok(&create);
    server
}

#[track_caller]
fn refused(done: &Done, code: &str) {
    assert_eq!(done.error()["code"], code, "{done:?}");
}

fn event(server: &Server, kind: &str) -> Vec<Value> {
    let kind = format!("dev.daybook.{kind}.v1");
    let all = server
        .events()
        .into_iter()
        .map(|line| line["event"].clone());
    all.filter(|event| event["type"] == kind.as_str()).collect()
}

/// The folders of volumes below a folder.
fn volumes(below: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir(below).into_iter().flatten().flatten() {
        let path = entry.path();
        if path.ends_with("volumes/shop.production") {
            found.push(path);
        } else if path.is_dir() {
            found.extend(volumes(&path));
        }
    }
    found
}

#[test]
fn an_entry_becomes_a_service_like_any_other() {
    let server = start(Settings::default());
    let listed = server.ok(&["template", "list"]).stdout;
    assert!(
        listed.contains("static-site") && listed.contains("web-app"),
        "{listed}"
    );
    let shown = server.ok(&["template", "show", "static-site"]).stdout;
    assert!(
        shown.contains("repository") && shown.contains("has to be given"),
        "{shown}"
    );
    let source = site("from a template");
    let set = format!("repository={}", source.url());
    let deploy = ["template", "deploy", "static-site", INSTANCE, "--detach"];
    let answer = server.json(&[&deploy[..], &["--set", &set]].concat());
    let id = answer["id"].as_str().unwrap().to_owned();
    server.wait_for(&id, "started");
    assert!(
        server
            .get_from(HOST, "/", &id)
            .body
            .contains("from a template")
    );

    // What is recorded is what it was resolved to, and where it came from.
    let recorded = event(&server, "project.template_resolved");
    assert_eq!(recorded.len(), 1);
    let data = &recorded[0]["data"];
    let shown = server.json(&["template", "show", "static-site"]);
    assert_eq!(data["template"]["digest"], shown["digest"]);
    assert_eq!(data["template"]["version"], "1.0.0");
    assert_eq!(data["spec"]["source"]["url"], source.url());
    // From here on it is a service: it is deployed by its name, and scaled, and gone back from.
    let second = server.deploy(INSTANCE, &[]);
    server.get_from(HOST, "/", &second);
    server.ok(&["rollback", INSTANCE]);
    server.get_from(HOST, "/", &id);

    let json = ["--output", "json"];
    refused(
        &server.cli(&[&deploy[..], &json[..]].concat()),
        "parameter_missing",
    );
    let colour = ["--set", "colour=red"];
    refused(
        &server.cli(&[&deploy[..], &colour[..], &json[..]].concat()),
        "unknown_parameter",
    );
    let nothing = ["template", "deploy", "nothing", INSTANCE];
    refused(
        &server.cli(&[&nothing[..], &json[..]].concat()),
        "template_not_found",
    );
    assert_eq!(event(&server, "project.template_resolved").len(), 1);
    server.check_replay();
}

#[test]
fn a_volume_and_a_secret_stay_from_one_deployment_to_the_next() {
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("counter.yaml"), COUNTER).unwrap();
    let own = format!("--templates={}", folder.path().display());
    let mut server = start(Settings::default().arg(own));
    let source = application("");
    let set = format!("repository={}", source.url());
    let deploy = |server: &Server, greeting: &str| {
        let greeting = format!("greeting={greeting}");
        let deploy = ["template", "deploy", "counter", INSTANCE, "--detach"];
        let answer = server.json(&[&deploy[..], &["--set", &set, "--set", &greeting]].concat());
        let id = answer["id"].as_str().unwrap().to_owned();
        server.wait_for(&id, "started");
        let body = server.get_from(HOST, "/", &id).body;
        (id, body)
    };
    let (first, body) = deploy(&server, "hello");
    assert_eq!(body, "hello 1 32");
    let (second, body) = deploy(&server, "bye");
    assert_eq!(body, "bye 2 32");
    // The secret was made once, and its value is nowhere but in the secret store and its process.
    let secrets = event(&server, "project.secret_set");
    assert_eq!(secrets.len(), 1, "{secrets:?}");
    let value = variable(&second, "TOKEN");
    assert_eq!(value.len(), 32);
    let shown = [
        server.ok(&["events", "--output", "json"]).stdout,
        server.ok(&["logs", &first]).stdout,
        server.ok(&["logs", &second]).stdout,
        server.ok(&["status", &second, "--output", "json"]).stdout,
        git(&server.gitops("shop"), &["grep", "-h", "", "main"]),
    ];
    for text in shown {
        assert!(!text.is_empty() && !text.contains(&value), "{text}");
    }

    // Nothing needs the catalogue any more.
    server.kill();
    server.settings().args.clear();
    server.restart();
    let again = server.deploy(INSTANCE, &[]);
    let body = server.get_from(HOST, "/", &again).body;
    let count = body
        .strip_prefix("bye ")
        .and_then(|rest| rest.strip_suffix(" 32"));
    let count: u32 = count.unwrap_or_else(|| panic!("{body}")).parse().unwrap();
    assert!(count >= 3, "{body}");
    server.check_replay();

    let data = server.folder().data();
    assert_eq!(volumes(&data).len(), 1);
    server.ok(&["env", "delete", "shop", "production", "--yes"]);
    until("the volume is gone", || {
        volumes(&data).is_empty().then_some(())
    });
}

#[test]
fn a_folder_of_templates_that_cannot_be_used_is_told_at_the_start() {
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("bad.yaml"), "name: bad").unwrap();
    let own = format!("--templates={}", folder.path().display());
    let mut server = Server::stopped(Settings::default().arg(own));
    let free = ["--listen", "127.0.0.1:0", "--gateway", "127.0.0.1:0"];
    let refused = server.try_restart_with(&free).unwrap_err();
    assert!(
        refused.stderr.contains("bad.yaml is no template"),
        "{refused:?}"
    );
    assert!(refused.stderr.contains("--templates DIR"), "{refused:?}");
}
