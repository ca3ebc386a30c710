//! The signed ledger of a running server, and what happens when the log under it is not what was
//! signed.

use std::fs;
use std::path::Path;

use reqwest::Method;
use serde_json::{Value, json};

use daybook_store::embedded::{EmbeddedConfig, EmbeddedLog};
use daybook_store::jetstream::{Connection, JetStreamLog, LogOptions, NatsOptions, set_aside};
use daybook_store::tlog::{FolderStorage, KeyRing, repair};
use daybook_testkit::nats::{NatsBinary, NatsServer};

use crate::support::{Answer, Done, Process, Server, Settings, daybook, request, site, until};

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

/// Runs a command that needs no server.
fn offline(args: &[&str]) -> Done {
    Done::of(daybook().args(args))
}

/// The exit code and the error's code of a command that was run with `--output json`.
fn refusal(done: &Done) -> (i32, String) {
    let error = done.error();
    (done.code, error["code"].as_str().unwrap().to_owned())
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

/// Waits until all addresses of a deployment were asked, which is recorded after it has started.
fn asked(server: &Server, id: &str) {
    let hosts = server.deployment(id)["hostnames"].as_array().unwrap().len();
    until("its addresses were asked", || {
        let kinds = server.kinds(id);
        let seen = kinds
            .iter()
            .filter(|k| *k == "deployment.endpoint_observed.v1");
        (seen.count() >= hosts).then_some(())
    });
}

#[test]
fn every_event_is_signed_and_served_to_auditors() {
    let server = Server::start(Settings::default());
    let site = site("one");
    server.define("shop", "web", &site, &[]);
    let id = server.deploy(INSTANCE, &[]);
    asked(&server, &id);
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
    signed(&server);
    server.stop();
    // What followed until it stopped was signed, too.
    let size = size_of_checkpoint(&server.folder().data());
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

    // While it runs nothing is repaired.
    let data = server.folder().data();
    let repair = ["ledger", "repair", "--data", data.to_str().unwrap()];
    let refused = server.cli(&repair);
    assert_eq!(refused.code, 5, "{refused:?}");
    server.stop();
    let done = offline(&repair);
    assert!(done.stdout.contains("restored"), "{}", done.stdout);
    // Again, it has nothing to do.
    assert_eq!(offline(&repair).code, 5);

    // Every signed event is back, and the first one after them says what was done.
    server.restart();
    let events = server.events();
    assert_eq!(
        events[size as usize]["event"]["type"],
        "dev.daybook.ledger.repaired.v1"
    );
    let repaired = &events[size as usize]["event"]["data"];
    assert_eq!(repaired["breach"]["code"], "log_truncated");
    assert_eq!(repaired["size"], size);
    let third = server.deploy(INSTANCE, &[]);
    assert!(signed(&server) > size);
    server.get_from("web.shop.localhost", "/", &third);
    server.check_replay();
    assert!(data.join("log.damaged-1").is_dir());
}

/// What was signed, in a data folder that nobody uses.
fn tiles_and_keys(data: &Path) -> (FolderStorage, KeyRing) {
    let keys = KeyRing::open(&data.join("keys/ledger")).unwrap();
    (FolderStorage::new(data.join("tlog")), keys)
}

/// For how many events something was signed last.
fn size_of_checkpoint(data: &Path) -> u64 {
    let checkpoint = fs::read_to_string(data.join("tlog/checkpoint")).unwrap();
    checkpoint.lines().nth(1).unwrap().parse().unwrap()
}

/// Starts the server, which finds that the ledger is broken, and stops it.
fn is_broken(server: &mut Server, code: &str) {
    server.restart();
    let condition = server.read("/api/v1/ledger")["condition"].clone();
    assert_eq!(condition["code"], code, "{condition}");
    server.stop();
}

fn flip(file: &Path) {
    let mut bytes = fs::read(file).unwrap();
    bytes[17] ^= 1;
    fs::write(file, bytes).unwrap();
}

#[test]
fn a_repair_that_was_cut_off_near_its_end_goes_on() {
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let mut server = Server::start(Settings::default());
    let data = server.folder().data();
    let again = ["ledger", "repair", "--data", data.to_str().unwrap()];
    server.ok(&["project", "create", "shop"]);
    for (number, is_moved) in [(1, false), (2, true)] {
        signed(&server);
        server.stop();
        let size = size_of_checkpoint(&data);
        fs::remove_dir_all(data.join("log")).unwrap();
        is_broken(&mut server, "log_replaced");

        // Everything is in the new log, which is the one that is signed from now on.
        runtime.block_on(async {
            let (storage, keys) = tiles_and_keys(&data);
            let new = EmbeddedLog::open(data.join("log.restored"), EmbeddedConfig::default());
            let new = new.await.unwrap();
            repair(&storage, &keys, &new).await.unwrap();
            new.close().await;
        });
        let aside = data.join(format!("log.damaged-{number}"));
        if is_moved {
            fs::rename(data.join("log"), &aside).unwrap();
        }
        let done = offline(&again);
        assert_eq!(done.code, 0, "{done:?}");
        assert!(aside.is_dir() && !data.join("log.restored").exists());
        // Again, it has nothing to do.
        assert_eq!(offline(&again).code, 5);
        server.restart();
        let event = &server.events()[size as usize]["event"];
        assert_eq!(event["type"], "dev.daybook.ledger.repaired.v1");
        assert_eq!(event["data"]["breach"]["code"], "log_replaced");
        assert!(event["data"]["replaces"].is_string(), "{event}");
    }
    server.ok(&["project", "create", "blog"]);
    signed(&server);
}

#[test]
fn a_ledger_whose_log_or_tiles_came_back_is_used_again() {
    let mut server = Server::start(Settings::default());
    let data = server.folder().data();
    let to = ["--data", data.to_str().unwrap(), "--output", "json"];
    let command = |verb| offline(&[&["ledger", verb], &to[..]].concat());
    server.ok(&["project", "create", "shop"]);
    signed(&server);
    let running = command("recheck");
    assert_eq!(refusal(&running), (5, "log_in_use".into()));
    server.stop();

    // Tiles are not restored from the log, nor a log from damaged tiles.
    let tile = data.join(format!("tlog/tile/0/000.p/{}", size_of_checkpoint(&data)));
    flip(&tile);
    is_broken(&mut server, "tree_damaged");
    let refused = command("repair");
    assert_eq!(refusal(&refused), (5, "not_repairable".into()));
    assert!(refused.stderr.contains("ledger recheck"), "{refused:?}");
    let refused = command("recheck");
    assert_eq!(refusal(&refused), (8, "tree_damaged".into()));
    flip(&tile);
    let done = command("recheck");
    assert_eq!(done.json()["cleared"]["code"], "tree_damaged", "{done:?}");
    server.restart();
    server.ok(&["project", "create", "blog"]);
    let size = signed(&server);
    server.stop();

    // The log is not there for a moment, and then it is again.
    let elsewhere = server.folder().path().join("elsewhere");
    fs::rename(data.join("log"), &elsewhere).unwrap();
    assert_eq!(command("recheck").error()["code"], "log_missing");
    assert!(!data.join("log").exists());
    is_broken(&mut server, "log_replaced");
    let refused = command("recheck");
    assert_eq!(refusal(&refused), (8, "log_replaced".into()));
    assert!(refused.stderr.contains("ledger recheck"), "{refused:?}");
    fs::remove_dir_all(data.join("log")).unwrap();
    fs::rename(&elsewhere, data.join("log")).unwrap();
    is_broken(&mut server, "log_replaced");
    let refused = command("repair");
    assert_eq!(refusal(&refused), (5, "log_is_sound".into()));
    let done = command("recheck").json();
    assert_eq!(done["cleared"]["code"], "log_replaced", "{done}");
    assert!(done["size"].as_u64().unwrap() >= size);
    // Nothing is wrong with asking again.
    assert!(command("recheck").json()["cleared"].is_null());
    assert_eq!(command("repair").error()["code"], "nothing_to_repair");
    server.restart();
    server.ok(&["project", "create", "cart"]);
    signed(&server);
    assert!(!data.join("log.damaged-1").exists());
}

#[test]
fn whoever_named_the_wrong_nats_server_goes_back_to_the_right_one() {
    let Some(binary) = NatsBinary::installed().pop().or_else(NatsBinary::newest) else {
        daybook_testkit::left_out("the wrong NATS server: there is no nats-server");
        return;
    };
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let [right, wrong] = [(); 2].map(|()| runtime.block_on(NatsServer::start(&binary)));
    let mut server = Server::start(Settings::default().env("DAYBOOK_NATS", right.url()));
    let data = server.folder().data();
    server.ok(&["project", "create", "shop"]);
    signed(&server);
    server.stop();
    server.settings().env = vec![("DAYBOOK_NATS".into(), wrong.url())];
    is_broken(&mut server, "log_replaced");
    server.settings().env = vec![("DAYBOOK_NATS".into(), right.url())];

    let command = |verb, more: &[&str]| {
        let url = right.url();
        let to = ["--nats", &url, "--data", data.to_str().unwrap()];
        offline(&[&["ledger", verb], &to[..], more].concat())
    };
    // Neither is the right log put aside, nor another one made.
    let refused = command("repair", &["--output", "json"]);
    assert_eq!(refusal(&refused), (5, "log_is_sound".into()));
    let refused = command("recheck", &["--nats-stream", "DAYBOOK-9"]);
    assert_eq!(refused.code, 1, "{refused:?}");
    assert!(
        refused.stderr.contains("no stream DAYBOOK-9"),
        "{refused:?}"
    );
    let done = command("recheck", &[]);
    assert!(done.stdout.contains("log_replaced"), "{done:?}");
    server.restart();
    server.ok(&["project", "create", "blog"]);
    signed(&server);
}

#[test]
fn a_lost_folder_of_tiles_is_not_made_anew() {
    let mut server = Server::start(Settings::default());
    server.define("shop", "web", &site("one"), &[]);
    let size = signed(&server);
    server.stop();
    let data = server.folder().data();
    let (tiles, elsewhere) = (data.join("tlog"), data.join("elsewhere"));
    fs::rename(&tiles, &elsewhere).unwrap();
    let free = ["--listen", "127.0.0.1:0", "--gateway", "127.0.0.1:0"];
    let refused = server.try_restart_with(&free).unwrap_err();
    assert!(refused.stderr.contains("tree_missing"), "{refused:?}");
    assert!(!tiles.exists());
    fs::rename(&elsewhere, &tiles).unwrap();
    server.restart();
    assert!(signed(&server) >= size);
}

#[test]
fn a_stream_made_anew_on_nats_is_noticed_by_every_process_and_repaired() {
    let Some(binary) = NatsBinary::installed().pop().or_else(NatsBinary::newest) else {
        daybook_testkit::left_out("a stream made anew: there is no nats-server");
        return;
    };
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let nats = runtime.block_on(NatsServer::start(&binary));
    let settings = Settings {
        roles: Some("api,gateway,worker"),
        ..Settings::default()
    };
    let mut server = Server::start(settings.env("DAYBOOK_NATS", nats.url()));
    let env = [("DAYBOOK_NATS".to_owned(), nats.url().to_owned())];
    let notary = |server: &Server, stream: &str| {
        let args = ["serve", "--role", "notary", "--nats-stream", stream];
        Process::start(server.folder(), &args, &env)
    };
    let running = notary(&server, "DAYBOOK");
    let site = site("one");
    server.define("shop", "web", &site, &[]);
    server.deploy(INSTANCE, &[]);
    signed(&server);

    runtime.block_on(async {
        let client = async_nats::connect(nats.url()).await.unwrap();
        let streams = async_nats::jetstream::new(client);
        let config = streams.get_stream("DAYBOOK").await.unwrap();
        let config = config.cached_info().config.clone();
        streams.delete_stream("DAYBOOK").await.unwrap();
        streams.create_stream(config).await.unwrap();
    });
    // The process with the interface learns it from the notary.
    until("it is noticed", || {
        let report = server.read("/api/v1/ledger");
        (report["condition"]["state"] == "broken").then_some(())
    });
    let report = server.read("/api/v1/ledger");
    assert_eq!(report["condition"]["code"], "log_replaced", "{report}");
    let size = report["signed"]["size"].as_u64().unwrap();
    let body = json!({ "instance_id": INSTANCE });
    let refused = server.post("/api/v1/deployments", &body, None);
    assert_eq!(refused.json()["code"], "appends_stopped");
    running.stop();
    server.stop();

    let data = server.folder().data();
    // It is killed before it has said what was done, and goes on from there.
    runtime.block_on(async {
        let (storage, keys) = tiles_and_keys(&data);
        let connection = Connection::open(NatsOptions::new(&nats.url()))
            .await
            .unwrap();
        set_aside(&connection, "DAYBOOK").await.unwrap();
        let stream = LogOptions {
            stream: "DAYBOOK-2".into(),
            ..LogOptions::default()
        };
        let new = JetStreamLog::open(connection, &stream).await.unwrap();
        repair(&storage, &keys, &new).await.unwrap();
    });
    let done = offline(&[
        "ledger",
        "repair",
        "--nats",
        &nats.url(),
        "--data",
        data.to_str().unwrap(),
    ]);
    assert!(
        done.stdout.contains("--nats-stream DAYBOOK-2"),
        "{}",
        done.stdout
    );
    let running = notary(&server, "DAYBOOK-2");
    server
        .settings()
        .args
        .extend(["--nats-stream".into(), "DAYBOOK-2".into()]);
    server.restart();
    assert_eq!(
        server.events()[size as usize]["event"]["type"],
        "dev.daybook.ledger.repaired.v1"
    );
    server.deploy(INSTANCE, &[]);
    assert!(signed(&server) > size);
    server.check_replay();
    running.stop();
}

/// An older copy of NATS's files looks at first as a new leader of a cluster may, which has not caught
/// up: that lasts two seconds, and nobody appends meanwhile.
#[test]
fn an_older_copy_of_a_stream_takes_no_more_events() {
    let Some(binary) = NatsBinary::installed().pop().or_else(NatsBinary::newest) else {
        daybook_testkit::left_out("an older copy of a stream: there is no nats-server");
        return;
    };
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let mut nats = runtime.block_on(NatsServer::start(&binary));
    let server = Server::start(Settings::default().env("DAYBOOK_NATS", nats.url()));
    let elsewhere = Settings {
        roles: Some("api"),
        ..Settings::default()
    };
    let other = Server::start(
        elsewhere
            .env("DAYBOOK_NATS", nats.url())
            .arg("--tlog-url")
            .arg(format!("{}/tlog", server.url())),
    );
    server.ok(&["project", "create", "shop"]);
    let before = signed(&server);
    let store = nats.folder().join("store");
    let backup = server.folder().path().join("backup");
    runtime.block_on(nats.stop());
    copy(&store, &backup);
    runtime.block_on(nats.start_again());
    for name in ["blog", "cart", "desk"] {
        server.ok(&["project", "create", name]);
    }
    assert!(signed(&server) > before);

    runtime.block_on(nats.stop());
    fs::remove_dir_all(&store).unwrap();
    copy(&backup, &store);
    runtime.block_on(nats.start_again());
    for (server, name) in [(&server, "early"), (&other, "late")] {
        until("it is doubted", || {
            let report = server.read("/api/v1/ledger");
            let state = report["condition"]["state"].as_str().unwrap().to_owned();
            matches!(&*state, "doubted" | "broken").then_some(())
        });
        assert_eq!(get(server, "/readyz").status, 503);
        let refused = server.post("/api/v1/projects", &json!({ "name": name }), None);
        assert_eq!(refused.status, 503, "{}", refused.body);
        assert_eq!(
            refused.json()["code"],
            "appends_stopped",
            "{}",
            refused.body
        );
    }
    let end = runtime.block_on(async {
        let client = async_nats::connect(nats.url()).await.unwrap();
        let streams = async_nats::jetstream::new(client);
        let stream = streams.get_stream("DAYBOOK").await.unwrap();
        stream.cached_info().state.last_sequence
    });
    assert_eq!(end, before);
    let condition = &server.read("/api/v1/ledger")["condition"];
    assert_eq!(condition["code"], "log_truncated", "{condition}");
    assert_eq!(condition["position"], before + 1);
}

/// A process that shares nothing with the notary but the network.
#[test]
fn a_process_on_another_machine_is_told_over_http() {
    let Some(binary) = NatsBinary::installed().pop().or_else(NatsBinary::newest) else {
        daybook_testkit::left_out("a tree over HTTP: there is no nats-server");
        return;
    };
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let nats = runtime.block_on(NatsServer::start(&binary));
    let server = Server::start(Settings::default().env("DAYBOOK_NATS", nats.url()));
    server.ok(&["project", "create", "shop"]);
    let size = signed(&server);

    let elsewhere = Settings {
        roles: Some("api"),
        ..Settings::default()
    };
    let elsewhere = elsewhere
        .env("DAYBOOK_NATS", nats.url())
        .arg("--tlog-url")
        .arg(format!("{}/tlog", server.url()));
    let other = Server::start(elsewhere);
    assert!(signed(&other) >= size);
    // What it answers says so too, and it serves the same tree.
    let projects = get(&other, "/api/v1/projects");
    assert!(projects.headers.contains_key("daybook-tree-root"));
    let keys = get(&server, "/tlog/keys");
    assert_eq!(get(&other, "/tlog/keys").body, keys.body);
    let body = json!({ "name": "blog" });
    assert_eq!(other.post("/api/v1/projects", &body, None).status, 201);

    runtime.block_on(async {
        let client = async_nats::connect(nats.url()).await.unwrap();
        let streams = async_nats::jetstream::new(client);
        let config = streams.get_stream("DAYBOOK").await.unwrap();
        let config = config.cached_info().config.clone();
        streams.delete_stream("DAYBOOK").await.unwrap();
        streams.create_stream(config).await.unwrap();
    });
    until("the other process is told", || {
        let report = other.read("/api/v1/ledger");
        (report["condition"]["code"] == "log_replaced").then_some(())
    });
    let body = json!({ "name": "cart" });
    let refused = other.post("/api/v1/projects", &body, None);
    assert_eq!(
        refused.json()["code"],
        "appends_stopped",
        "{}",
        refused.body
    );
    // The server that said so is gone: what was broken is still broken.
    drop(server);
    let ready = get(&other, "/readyz");
    assert_eq!(ready.status, 503, "{}", ready.body);
    assert!(ready.body.contains("log_replaced"), "{}", ready.body);
}
