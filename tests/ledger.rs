//! The signed ledger of a running server, and what happens when the log under it is not what was
//! signed.

use std::fs;
use std::path::Path;

use reqwest::Method;
use serde_json::{Value, json};

use crate::support::{Answer, Server, Settings, request, site, until};

const INSTANCE: &str = "shop.production.web";

fn get(server: &Server, path: &str) -> Answer {
    request(Method::GET, &format!("{}{path}", server.url()), &[], None).unwrap()
}

/// Waits until everything is signed, and says for how many events that is.
fn signed(server: &Server) -> u64 {
    until("everything is signed", || {
        let report = server.read("/api/v1/ledger");
        let size = report["signed"]["size"].as_u64()?;
        (report["head"] == size && report["condition"]["state"] == "sound").then_some(size)
    })
}

fn copy(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        let target = to.join(entry.file_name());
        if entry.file_type().unwrap().is_dir() {
            copy(&entry.path(), &target);
        } else {
            fs::copy(entry.path(), target).unwrap();
        }
    }
}

#[test]
fn every_event_is_signed_and_served_to_auditors() {
    let server = Server::start(Settings::default());
    let site = site("one");
    server.define("shop", "web", &site, &[]);
    server.deploy(INSTANCE, &[]);
    let size = signed(&server);

    let checkpoint = get(&server, "/tlog/checkpoint");
    assert_eq!(checkpoint.status, 200);
    assert_eq!(
        checkpoint.headers["content-type"],
        "text/plain; charset=utf-8"
    );
    assert_eq!(checkpoint.headers["cache-control"], "public, max-age=1");
    let lines: Vec<_> = checkpoint.body.lines().collect();
    assert!(lines[0].starts_with("localhost/"), "{}", lines[0]);
    assert_eq!(lines[1], size.to_string());
    assert!(lines[4].starts_with(&format!("— {} ", lines[0])));
    // The key that signed is served, and is the one that the operator shows.
    let keys = get(&server, "/tlog/keys").body;
    let data = server.folder().data();
    let shown = server.ok(&["keys", "show", "--data", data.to_str().unwrap()]);
    assert_eq!(keys, shown.stdout);
    assert!(keys.starts_with(&format!("{}+", lines[0])));

    for path in ["0/000", "entries/000"] {
        let tile = get(&server, &format!("/tlog/tile/{path}.p/{size}"));
        assert_eq!(tile.status, 200, "{path}");
        assert_eq!(tile.headers["content-type"], "application/octet-stream");
        assert!(tile.headers["cache-control"].contains("immutable"));
    }
    // The bundle holds the very bytes of the events.
    let bundle = get(&server, &format!("/tlog/tile/entries/000.p/{size}")).body;
    for event in server.events() {
        let id = event["event"]["id"].as_str().unwrap();
        assert!(bundle.contains(id));
    }
    for path in [
        "0/000",
        "0/000.p/0",
        "0/001",
        "0/%2F..%2F..%2Fcheckpoint",
        "0/x000/000",
        "9/000",
        "",
    ] {
        let missing = get(&server, &format!("/tlog/tile/{path}"));
        assert_eq!(missing.status, 404, "{path}");
    }
    // Answers say what was signed by then.
    let history = get(&server, "/api/v1/history");
    assert_eq!(history.headers["daybook-tree-size"], size.to_string());
    assert_eq!(history.headers["daybook-tree-root"].len(), 64);
    let status = server.ok(&["ledger", "status"]);
    assert!(status.stdout.contains("sound"), "{}", status.stdout);
}

#[test]
fn an_older_backup_under_the_server_is_noticed_and_stops_appends() {
    let mut server = Server::start(Settings::default());
    let site = site("one");
    server.define("shop", "web", &site, &[]);
    let first = server.deploy(INSTANCE, &[]);
    signed(&server);
    server.stop();
    let log = server.folder().data().join("log");
    let backup = server.folder().path().join("backup");
    copy(&log, &backup);

    server.restart();
    server.deploy(INSTANCE, &[]);
    let size = signed(&server);
    server.stop();
    fs::remove_dir_all(&log).unwrap();
    copy(&backup, &log);

    // It starts, so that people can look at it, and does no more work.
    server.restart();
    let ready = get(&server, "/readyz");
    assert_eq!(ready.status, 503, "{}", ready.body);
    assert!(ready.body.contains("log_truncated"), "{}", ready.body);
    let report = server.read("/api/v1/ledger");
    assert_eq!(report["condition"]["state"], "broken", "{report}");
    let head = report["head"].as_u64().unwrap();
    assert!(head < size);
    assert_eq!(report["signed"]["size"], size);
    assert_eq!(report["condition"]["position"], head + 1);
    let status = server.cli(&["ledger", "status"]);
    assert_eq!(status.code, 8);
    assert!(status.stdout.contains("BROKEN"), "{}", status.stdout);

    let body = json!({ "instance_id": INSTANCE });
    let refused = server.post("/api/v1/deployments", &body, None);
    assert_eq!(refused.status, 503, "{}", refused.body);
    assert_eq!(refused.json()["code"], "appends_stopped");
    assert_eq!(server.read("/api/v1/ledger")["head"], head);
    let shown: Value = server.read("/api/v1/history");
    assert!(shown.to_string().contains(&first), "{shown}");
}
