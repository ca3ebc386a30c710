//! The same job on a real nats-server: in one process, and in several that share the work.

use daybook_testkit::git::SourceRepository;
use daybook_testkit::nats::{NatsBinary, NatsServer};
use reqwest::Method;
use rustix::process::Signal;
use serde_json::{Value, json};

use crate::support::{
    Process, Server, Settings, application, processes_of, replace_flags, request, until,
};

const INSTANCE: &str = "shop.production.web";
const HOST: &str = "web.shop.localhost";

/// The oldest and the newest server that there are.
fn binaries() -> Vec<NatsBinary> {
    let mut all = NatsBinary::installed();
    all.extend(NatsBinary::newest());
    if all.is_empty() {
        daybook_testkit::left_out("end to end on NATS: there is no nats-server");
    }
    all
}

fn on_each(test: impl Fn(&tokio::runtime::Runtime, NatsServer)) {
    for binary in binaries() {
        let runtime = tokio::runtime::Runtime::new().unwrap();
        let nats = runtime.block_on(NatsServer::start(&binary));
        test(&runtime, nats);
    }
}

fn count(events: &[Value], kind: &str) -> usize {
    let kind = format!("dev.daybook.{kind}");
    events.iter().filter(|e| e["event"]["type"] == kind).count()
}

#[test]
fn everything_in_one_process_survives_a_restart_of_the_server_and_a_kill_of_its_own() {
    on_each(|runtime, mut nats| {
        let mut server = Server::start(Settings::default().env("DAYBOOK_NATS", nats.url()));
        let source = application("--text one");
        server.define("shop", "web", &source, &[]);
        let first = server.deploy(INSTANCE, &[]);
        server.get_from(HOST, "/", &first);

        // The server goes away in the middle of a rollout, and comes back.
        replace_flags(&source, "--text two --slow-start 5000");
        let second = server.begin(INSTANCE, &[]);
        server.wait_for(&second, "deploying");
        nats.kill();
        assert_eq!(server.get(HOST, "/").by(), Some(first.as_str()));
        runtime.block_on(nats.start_again());
        server.wait_for(&second, "started");
        server.get_from(HOST, "/", &second);

        // Daybook itself is killed in the middle of the next one.
        replace_flags(&source, "--text three --slow-start 5000");
        let third = server.begin(INSTANCE, &[]);
        server.wait_for(&third, "deploying");
        server.kill();
        server.restart();
        server.wait_for(&third, "started");
        server.get_from(HOST, "/", &third);
        let events = server.events();
        assert_eq!(count(&events, "gitops.committed.v1"), 3);
        assert_eq!(count(&events, "deployment.succeeded.v1"), 3);
        server.check_replay();
    });
}

/// Everything but builds in one process, and a build that goes on until it is told to end.
struct Building {
    server: Server,
    env: [(String, String); 1],
    go: std::path::PathBuf,
    /// What is built; gone when it is dropped.
    _source: SourceRepository,
}

impl Building {
    fn on(nats: &NatsServer) -> Self {
        let settings = Settings {
            roles: Some("api,gateway,route,probe,package,sync"),
            ..Settings::default()
        };
        let server = Server::start(settings.env("DAYBOOK_NATS", nats.url()));
        let go = server.folder().path().join("go");
        let command = format!(
            "echo begun; while [ ! -e {} ]; do sleep 0.05; done",
            go.display()
        );
        let spec = server.folder().path().join("service.json");
        let build = json!({ "build": { "command": ["/bin/sh", "-c", command] } });
        std::fs::write(&spec, build.to_string()).unwrap();
        let source = application("--text one");
        server.define("shop", "web", &source, &["--file", spec.to_str().unwrap()]);
        Self {
            server,
            env: [("DAYBOOK_NATS".to_owned(), nats.url().to_owned())],
            go,
            _source: source,
        }
    }

    fn worker(&self) -> Process {
        Process::start(
            self.server.folder(),
            &["serve", "--role", "build"],
            &self.env,
        )
    }

    /// Begins a deployment, and waits until its builder runs: in the middle of the build.
    fn begin(&self) -> String {
        let id = self.server.begin(INSTANCE, &[]);
        until("the builder runs", || {
            (count(&self.server.events(), "build.builder_started.v1") == 1).then_some(())
        });
        id
    }

    fn finish(&self, id: &str) {
        std::fs::write(&self.go, "").unwrap();
        self.server.wait_for(id, "started");
        self.server.get_from(HOST, "/", id);
    }

    /// Two attempts, and each effect once.
    fn was_built_once(&self) {
        let events = self.server.events();
        assert_eq!(count(&events, "build.started.v1"), 2);
        assert_eq!(count(&events, "build.succeeded.v1"), 1);
        assert_eq!(count(&events, "build.failed.v1"), 0);
        assert_eq!(count(&events, "deployment.building_started.v1"), 1);
        assert_eq!(count(&events, "deployment.succeeded.v1"), 1);
        assert_eq!(count(&events, "gitops.committed.v1"), 1);
        self.server.check_replay();
    }
}

#[test]
fn a_build_worker_killed_in_the_middle_of_a_build_is_replaced_by_another() {
    on_each(|_, nats| {
        let building = Building::on(&nats);
        let first = building.worker();
        let id = building.begin();
        let second = building.worker();
        first.kill();
        building.finish(&id);
        building.was_built_once();
        assert!(second.stop().success());
    });
}

#[test]
fn a_worker_that_slept_past_its_deadline_changes_nothing_when_it_wakes_up() {
    let Some(binary) = binaries().pop() else {
        return;
    };
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let nats = runtime.block_on(NatsServer::start(&binary));
    let building = Building::on(&nats);
    let sleeper = building.worker();
    let id = building.begin();
    sleeper.signal(Signal::STOP);
    let second = building.worker();
    until("another one takes the build over", || {
        (count(&building.server.events(), "build.started.v1") == 2).then_some(())
    });
    building.finish(&id);

    // The first one finds that its own build has just ended well, and is refused.
    sleeper.signal(Signal::CONT);
    until("the first one finds that it is too late", || {
        sleeper.log().contains("came too late").then_some(())
    });
    building.was_built_once();
    assert!(sleeper.stop().success());
    assert!(second.stop().success());
}

#[test]
fn clusters_are_taken_over_with_what_runs_in_them() {
    on_each(|_, nats| {
        let settings = Settings {
            roles: Some("api,gateway,route,probe,package,build"),
            ..Settings::default()
        };
        let server = Server::start(settings.env("DAYBOOK_NATS", nats.url()));
        let env = [("DAYBOOK_NATS".to_owned(), nats.url().to_owned())];
        let worker = || Process::start(server.folder(), &["serve", "--role", "sync"], &env);
        let first = worker();
        let source = application("--text one");
        server.define("shop", "web", &source, &[]);
        let id = server.deploy(INSTANCE, &[]);
        server.get_from(HOST, "/", &id);
        let before = processes_of(&id);
        assert!(!before.is_empty());

        let second = worker();
        first.kill();
        // What runs goes on answering, in the same processes, and is looked after again.
        assert_eq!(server.get(HOST, "/").by(), Some(id.as_str()));
        replace_flags(&source, "--text two");
        let next = server.deploy(INSTANCE, &[]);
        server.get_from(HOST, "/", &next);
        assert_eq!(processes_of(&id), before);
        server.ok(&["stop", &id]);
        server.wait_for(&id, "stopped");
        assert!(processes_of(&id).is_empty());
        server.check_replay();
        assert!(second.stop().success());
    });
}

/// What somebody with access to NATS may put there, by mistake or on purpose.
const POISON: [(&str, &[u8]); 4] = [
    (
        "daybook.ev.shop.production.environment.production",
        b"\xff\xfe no JSON",
    ),
    (
        "daybook.ev.shop._.project.shop",
        b"{\"specversion\":\"1.0\"}",
    ),
    ("daybook.ev.shop._.routing.shop", b""),
    // On a subject that is no aggregate's.
    ("daybook.ev.Not.A.subject", b"{}"),
];

#[test]
fn poisonous_events_are_set_aside_and_reported_and_stop_nothing() {
    on_each(|runtime, nats| {
        let mut server = Server::start(Settings::default().env("DAYBOOK_NATS", nats.url()));
        let source = application("--text one");
        server.define("shop", "web", &source, &[]);
        let first = server.deploy(INSTANCE, &[]);
        let ready = server.read("/readyz").to_string();
        assert!(!ready.contains("set aside"), "{ready}");
        runtime.block_on(async {
            let client = async_nats::connect(nats.url()).await.unwrap();
            let jetstream = async_nats::jetstream::new(client);
            for (subject, bytes) in POISON {
                let sent = jetstream.publish(subject, bytes.into()).await.unwrap();
                sent.await.unwrap();
            }
        });

        // Everything goes on, also after a new start.
        replace_flags(&source, "--text two");
        let second = server.deploy(INSTANCE, &[]);
        server.get_from(HOST, "/", &second);
        reports_the_poison(&server);
        server.stop();
        server.restart();
        server.get_from(HOST, "/", &second);
        until("the older one is ready again", || {
            let done = server.cli(&["rollback", INSTANCE, "--reason", "the poison"]);
            (done.code == 0).then_some(())
        });
        server.get_from(HOST, "/", &first);
        reports_the_poison(&server);
        let replayed = server.json(&["replay", "--quiet"]);
        assert_eq!(replayed["same"], json!(true), "{replayed}");
        assert_eq!(replayed["unreadable"], json!(POISON.len()), "{replayed}");
    });
}

#[track_caller]
fn reports_the_poison(server: &Server) {
    let count = POISON.len();
    let ready = server.read("/readyz");
    assert_eq!(ready["ready"], json!(true));
    let told = format!("{count} events cannot be read and are set aside");
    for (place, text) in [
        ("readyz", ready.to_string()),
        (
            "status",
            server.ok(&["status"]).stdout.replace(" of the ledger", ""),
        ),
        ("ledger status", server.ok(&["ledger", "status"]).stdout),
    ] {
        assert!(text.contains(&told), "{place}: {text}");
    }
    let audit = server.read("/api/v1/audit?void=true");
    let rows = audit["audit"].as_array().unwrap();
    let unreadable = rows.iter().filter(|r| r["void"]["code"] == "unreadable");
    assert_eq!(unreadable.count(), count, "{audit}");
    let page = server.read("/api/v1/events?limit=500");
    let first = page["events"]
        .as_array()
        .unwrap()
        .iter()
        .find(|e| e["bytes"].is_string());
    assert!(first.is_some(), "{page}");
}

/// An envelope of a kind that only a later version knows.
fn of_a_later_version() -> (String, Vec<u8>) {
    let id = "01890a5d-ac96-774b-bcce-b302099a8057";
    let event = json!({
        "specversion": "1.0",
        "id": "01890a5d-ac96-774b-bcce-b302099a8058",
        "source": "/projects/shop",
        "type": "dev.daybook.build.noted.v9",
        "subject": format!("shop/_/build/{id}"),
        "time": "2026-01-02T03:04:05Z",
        "recordedtime": "2026-01-02T03:04:05Z",
        "datacontenttype": "application/json",
        "revision": 1,
        "correlationid": id,
        "authtype": "system",
        "authid": "later",
        "data": { "what": "nobody knows yet" },
    });
    let subject = format!("daybook.ev.shop._.build.{id}");
    (subject, event.to_string().into_bytes())
}

#[test]
fn events_of_a_later_version_are_kept_shown_counted_and_skipped() {
    on_each(|runtime, nats| {
        let server = Server::start(Settings::default().env("DAYBOOK_NATS", nats.url()));
        let source = application("--text one");
        server.define("shop", "web", &source, &[]);
        let (subject, bytes) = of_a_later_version();
        runtime.block_on(async {
            let client = async_nats::connect(nats.url()).await.unwrap();
            let jetstream = async_nats::jetstream::new(client);
            let sent = jetstream.publish(subject, bytes.into()).await.unwrap();
            sent.await.unwrap();
        });
        let id = server.deploy(INSTANCE, &[]);
        server.get_from(HOST, "/", &id);

        let ready = server.read("/readyz");
        assert_eq!(ready["ready"], json!(true), "{ready}");
        let metrics = format!("{}/metrics", server.url());
        let metrics = request(Method::GET, &metrics, &[], None).unwrap().body;
        let counted = "daybook_events_folded_total{outcome=\"unknown\"} 1\n";
        assert!(metrics.contains(counted), "{metrics}");
        let dashboard = include_str!("../docs/grafana/daybook.json");
        for name in ["up", "connects_total", "messages_total"] {
            let name = format!("daybook_nats_{name}");
            assert!(dashboard.contains(&name), "{name}");
            assert!(metrics.contains(&format!("# TYPE {name} ")), "{metrics}");
        }
        for line in [
            "daybook_nats_up 1",
            "daybook_builds_total{outcome=\"succeeded\"} 1",
        ] {
            assert!(metrics.lines().any(|l| l == line), "{line}\n{metrics}");
        }
        let replayed = server.json(&["replay", "--quiet"]);
        assert_eq!(replayed["same"], json!(true), "{replayed}");
        assert_eq!(replayed["unknown"], json!(1), "{replayed}");
        assert_eq!(replayed["unreadable"], json!(0), "{replayed}");
        let audit = server.read("/api/v1/audit?kind=build.noted.v9");
        let rows = audit["audit"].as_array().unwrap();
        assert_eq!(rows.len(), 1, "{audit}");
        assert_eq!(rows[0]["void"]["code"], "unknown", "{audit}");
        let events = server.events();
        let kept = events
            .iter()
            .find(|e| e["event"]["type"] == "dev.daybook.build.noted.v9");
        assert_eq!(kept.unwrap()["event"]["data"]["what"], "nobody knows yet");
    });
}

/// A stream with an event that is gone, as old servers leave one when an account is full: nobody
/// was told that it was stored.
#[test]
fn projections_are_rebuilt_past_an_event_that_was_lost() {
    let Some(binary) = binaries().pop() else {
        return;
    };
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let nats = runtime.block_on(NatsServer::start(&binary));
    let rebuild = |data: &std::path::Path| {
        let mut command = crate::support::daybook();
        command
            .args(["projections", "rebuild", "--output", "json", "--nats"])
            .arg(nats.url())
            .arg("--data")
            .arg(data);
        crate::support::Done::of(&mut command)
    };
    // Makes the stream.
    let empty = tempfile::tempdir().unwrap();
    assert_eq!(rebuild(empty.path()).json()["position"], 0);
    runtime.block_on(async {
        let client = async_nats::connect(nats.url()).await.unwrap();
        let jetstream = async_nats::jetstream::new(client);
        let stream = jetstream.get_stream("DAYBOOK").await.unwrap();
        let config = stream.cached_info().config.clone();
        jetstream.delete_stream("DAYBOOK").await.unwrap();
        let lax = async_nats::jetstream::stream::Config {
            deny_delete: false,
            ..config.clone()
        };
        let stream = jetstream.create_stream(lax).await.unwrap();
        for _ in 0..5 {
            let (subject, bytes) = of_a_later_version();
            let sent = jetstream.publish(subject, bytes.into()).await.unwrap();
            sent.await.unwrap();
        }
        stream.delete_message(3).await.unwrap();
        jetstream.update_stream(config).await.unwrap();
    });
    // Without a notary that records it, nobody knows that it is only a gap.
    let refused = rebuild(empty.path());
    assert_eq!(refused.code, 1, "{refused:?}");
    assert!(
        format!("{refused:?}").contains("rebuild_failed"),
        "{refused:?}"
    );

    let env = [("DAYBOOK_NATS".to_owned(), nats.url().to_owned())];
    let mut server = Server::start(Settings::default().env("DAYBOOK_NATS", nats.url()));
    let second = Process::start(server.folder(), &["serve", "--role", "build"], &env);
    server.ok(&["project", "create", "shop"]);
    until("everything is signed", || {
        let report = server.read("/api/v1/ledger");
        (report["head"] == report["signed"]["size"]).then_some(())
    });
    let before = server.json(&["projections", "show"]);
    assert!(second.stop().success());
    server.stop();
    let data = server.folder().data();
    assert!(data.join("projections-2").is_dir());
    let done = rebuild(&data);
    assert_eq!(done.code, 0, "{done:?}");
    let rebuilt = done.json();
    assert_eq!(rebuilt["digest"], before["digest"], "{rebuilt} {before}");
}
