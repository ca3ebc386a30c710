//! What is particular to JetStream: streams that others set up, what the servers say of
//! themselves, and logs that are not what they were.

#![allow(clippy::unwrap_used)]

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use async_nats::jetstream::{self, stream};
use bytes::Bytes;
use daybook_events::log::{
    Append, AppendError, ConsumerConfig, Durability, EventLog, Expected, ReadError,
};
use daybook_events::subject::{Subject, SubjectFilter};
use daybook_events::{EventId, Position, ProjectName};
use daybook_store::jetstream::{
    BulletinOptions, ConnectError, Connection, JetStreamBulletin, JetStreamLines, JetStreamLog,
    LineOptions, LogOptions, NatsAuth, NatsOptions, OpenError,
};
use daybook_store::{LogConfig, open};
use daybook_testkit::left_out;
use daybook_testkit::nats::{NatsBinary, NatsServer, NatsSettings};
use futures_util::StreamExt;
use uuid::Uuid;

fn options(server: &NatsServer) -> NatsOptions {
    NatsOptions {
        answer_timeout: Duration::from_secs(6),
        ..NatsOptions::new(&server.url())
    }
}

/// All binaries that are there, the newest one last.
fn binaries() -> Vec<NatsBinary> {
    let mut binaries = NatsBinary::installed();
    if binaries.is_empty() {
        left_out("no nats-server is on PATH or in DAYBOOK_NATS_SERVER");
    }
    match NatsBinary::newest() {
        Some(newest) => binaries.push(newest),
        None => left_out("the newest nats-server is not there; `cargo xtask tools` builds it"),
    }
    binaries
}

async fn open_log(options: NatsOptions) -> Result<JetStreamLog, OpenError> {
    let connection = Connection::open(options).await.unwrap();
    JetStreamLog::open(connection, &LogOptions::default()).await
}

async fn raw(server: &NatsServer) -> jetstream::Context {
    jetstream::new(async_nats::connect(server.url()).await.unwrap())
}

fn ledger() -> stream::Config {
    stream::Config {
        name: "DAYBOOK".into(),
        subjects: vec!["daybook.ev.>".into()],
        deny_delete: true,
        deny_purge: true,
        allow_direct: true,
        duplicate_window: Duration::from_secs(120),
        ..Default::default()
    }
}

fn event(number: u64) -> Append {
    Append {
        subject: Subject::Project(ProjectName::parse("shop").unwrap()),
        id: EventId(Uuid::now_v7()),
        expected: Expected::Any,
        bytes: Bytes::from(format!("{{\"number\":{number}}}")),
    }
}

async fn append(log: &JetStreamLog, numbers: impl IntoIterator<Item = u64>) {
    for number in numbers {
        log.append(event(number)).await.unwrap();
    }
}

#[tokio::test]
async fn nothing_can_be_taken_out_of_a_stream_that_daybook_created() {
    for binary in binaries() {
        let server = NatsServer::start(&binary).await;
        let log = open_log(options(&server)).await.unwrap();
        append(&log, 1..=3).await;
        let stream = raw(&server).await.get_stream("DAYBOOK").await.unwrap();
        assert!(stream.purge().await.is_err());
        assert!(stream.delete_message(2).await.is_err());
        let too_large = raw(&server)
            .await
            .publish("daybook.ev.shop._.project.shop", vec![b'x'; 70_000].into())
            .await
            .unwrap()
            .await;
        assert!(too_large.is_err());
        assert_eq!(log.head().await.unwrap(), Position(3));

        let mut laxer = stream.cached_info().config.clone();
        laxer.deny_purge = false;
        assert!(raw(&server).await.update_stream(laxer).await.is_err());
    }
}

#[tokio::test]
async fn a_stream_that_would_lose_events_is_refused_with_all_reasons() {
    for binary in binaries() {
        let server = NatsServer::start(&binary).await;
        raw(&server)
            .await
            .create_stream(stream::Config {
                max_age: Duration::from_secs(3600),
                deny_purge: false,
                storage: stream::StorageType::Memory,
                ..ledger()
            })
            .await
            .unwrap();
        let error = open_log(options(&server)).await.unwrap_err();
        let OpenError::Unsuitable { stream, problems } = &error else {
            panic!("{error}");
        };
        assert_eq!(stream, "DAYBOOK");
        assert_eq!(problems.len(), 3, "{problems:?}");
        assert!(error.to_string().contains("nats stream edit DAYBOOK"));
    }
}

#[tokio::test]
async fn a_stream_that_is_merely_different_is_used_and_mentioned() {
    for binary in binaries() {
        let server = NatsServer::start(&binary).await;
        raw(&server)
            .await
            .create_stream(stream::Config {
                description: Some("made by hand".into()),
                allow_direct: false,
                ..ledger()
            })
            .await
            .unwrap();
        let log = open_log(options(&server)).await.unwrap();
        append(&log, 1..=2).await;
        let got = log.get(Position(2)).await.unwrap().unwrap();
        assert_eq!(got.bytes, &br#"{"number":2}"#[..]);
        let warnings = log.info().await.unwrap().warnings.join("\n");
        assert!(warnings.contains("direct get"), "{warnings}");
    }
}

#[tokio::test]
async fn a_stream_that_has_our_subjects_already_is_named_as_the_obstacle() {
    for binary in binaries() {
        let server = NatsServer::start(&binary).await;
        raw(&server)
            .await
            .create_stream(stream::Config {
                name: "OTHER".into(),
                ..ledger()
            })
            .await
            .unwrap();
        let error = open_log(options(&server)).await.unwrap_err();
        assert!(matches!(error, OpenError::NotCreated { .. }), "{error}");
        assert!(error.to_string().contains("overlap"), "{error}");
        assert!(error.to_string().contains("OTHER"), "{error}");
    }
}

/// How often processes start together in the test.
const ROUNDS_TOGETHER: u32 = 20;

#[tokio::test]
async fn processes_that_start_together_open_the_same_log() {
    for binary in binaries() {
        let server = NatsServer::start(&binary).await;
        // Many streams, because each can be made at one moment only.
        for _ in 0..ROUNDS_TOGETHER {
            let logs = (0..8).map(|_| open_log(options(&server)));
            let mut identities = Vec::new();
            for log in futures_util::future::join_all(logs).await {
                identities.push(log.unwrap().info().await.unwrap().identity);
            }
            identities.dedup();
            assert_eq!(identities.len(), 1, "{identities:?}");
            raw(&server).await.delete_stream("DAYBOOK").await.unwrap();
        }
    }
}

const SYSTEM_ACCOUNT: &str = r#"
accounts {
    APP { jetstream: enabled, users: [{ user: app, password: secret }] }
    SYS { users: [{ user: system, password: secret }] }
}
system_account: SYS
"#;

fn user(name: &str, password: &str) -> NatsAuth {
    NatsAuth::UserPassword {
        user: name.into(),
        password: password.into(),
    }
}

async fn with_accounts(binary: &NatsBinary, sync_always: bool) -> NatsServer {
    let settings = NatsSettings {
        sync_always,
        extra: SYSTEM_ACCOUNT.into(),
        user: Some(("app".into(), "secret".into())),
    };
    NatsServer::start_with(binary, settings).await
}

#[tokio::test]
async fn the_stream_of_lines_keeps_what_somebody_insists_on_and_stays_so() {
    for binary in binaries() {
        let server = NatsServer::start(&binary).await;
        let open = async |wanted: LineOptions| {
            let connection = Connection::open(options(&server)).await.unwrap();
            JetStreamLines::open(connection, &wanted).await.unwrap();
            let stream = raw(&server).await.get_stream("DAYBOOK_LINES").await;
            let config = stream.unwrap().cached_info().config.clone();
            (config.max_age, config.max_bytes)
        };
        let usual = (Duration::from_hours(30 * 24), 1 << 30);
        assert_eq!(open(LineOptions::default()).await, usual);
        let other = LineOptions {
            max_age: Duration::from_hours(1),
            max_bytes: 16 << 20,
            ..LineOptions::default()
        };
        assert_eq!(open(other.clone()).await, usual);
        // Whoever insists on the one leaves the other as it is.
        let age = LineOptions {
            insists_age: true,
            max_bytes: 32 << 20,
            ..other.clone()
        };
        let changed = (Duration::from_hours(1), 1 << 30);
        assert_eq!(open(age).await, changed);
        assert_eq!(open(LineOptions::default()).await, changed);
        let bytes = LineOptions {
            insists_bytes: true,
            max_age: Duration::from_hours(2),
            ..other.clone()
        };
        let changed = (Duration::from_hours(1), 16 << 20);
        assert_eq!(open(bytes).await, changed);
        let both = LineOptions {
            insists_age: true,
            insists_bytes: true,
            max_age: Duration::from_hours(3),
            max_bytes: 64 << 20,
            ..other
        };
        let changed = (Duration::from_hours(3), 64 << 20);
        assert_eq!(open(both).await, changed);
        assert_eq!(open(LineOptions::default()).await, changed);
    }
}

#[tokio::test]
async fn durability_is_what_the_servers_say_and_otherwise_unknown() {
    let Some(binary) = NatsBinary::newest() else {
        return left_out("the newest nats-server is not there; `cargo xtask tools` builds it");
    };
    for (sync_always, system_auth, expected) in [
        (true, Some(user("system", "secret")), Durability::Synced),
        (false, Some(user("system", "secret")), Durability::Buffered),
        (true, Some(user("system", "wrong")), Durability::Unknown),
        (true, None, Durability::Unknown),
    ] {
        let server = with_accounts(&binary, sync_always).await;
        let log = open_log(NatsOptions {
            auth: user("app", "secret"),
            system_auth,
            ..options(&server)
        })
        .await
        .unwrap();
        let info = log.info().await.unwrap();
        assert_eq!(info.durability, expected, "{:?}", info.warnings);
        assert_eq!(
            info.warnings.is_empty(),
            expected == Durability::Synced,
            "{:?}",
            info.warnings
        );
        for warning in &info.warnings {
            assert!(warning.contains("sync_interval: always"), "{warning}");
        }
    }
}

#[tokio::test]
async fn an_old_server_is_said_to_acknowledge_before_it_stores() {
    let old = |binary: &NatsBinary| !binary.at_least(2, 10, 0);
    let Some(binary) = NatsBinary::installed().into_iter().find(old) else {
        return left_out("no nats-server before 2.10 is installed");
    };
    let server = NatsServer::start(&binary).await;
    let info = open_log(options(&server))
        .await
        .unwrap()
        .info()
        .await
        .unwrap();
    assert_eq!(info.durability, Durability::Buffered);
    assert!(info.warnings[0].contains("2.10"), "{:?}", info.warnings);
    let (major, minor, patch) = binary.version;
    assert_eq!(info.version, format!("{major}.{minor}.{patch}"));
}

#[tokio::test]
async fn a_wrong_password_is_given_up_at_once() {
    for binary in binaries() {
        let server = with_accounts(&binary, false).await;
        let wrong = NatsOptions {
            auth: user("app", "wrong"),
            connect_timeout: Duration::from_secs(3600),
            ..options(&server)
        };
        let error = Connection::open(wrong).await.unwrap_err();
        assert!(matches!(error, ConnectError::Unreachable(_)), "{error}");
    }
}

#[tokio::test]
async fn a_configuration_opens_both_logs() {
    for binary in binaries() {
        let server = with_accounts(&binary, false).await;
        let config = LogConfig::nats(NatsOptions {
            auth: user("app", "secret"),
            ..options(&server)
        });
        let (log, lines) = open(config).await.unwrap();
        assert_eq!(log.head().await.unwrap(), Position::ZERO);
        let source =
            daybook_events::lines::LineSource::Build(daybook_events::BuildId(Uuid::now_v7()));
        assert_eq!(lines.last(source).await.unwrap(), 0);
    }
}

#[tokio::test]
async fn a_consumer_has_a_plain_name() {
    for binary in binaries() {
        let server = NatsServer::start(&binary).await;
        let log = open_log(options(&server)).await.unwrap();
        for name in ["", "a.b", "a b", "*", ">", "Build", &"x".repeat(65)] {
            let config = ConsumerConfig::new(name, SubjectFilter::default());
            let refused = log.consumer(config).await;
            assert!(matches!(refused, Err(ReadError::Invalid(_))), "{name:?}");
        }
    }
}

#[tokio::test]
async fn servers_that_take_small_messages_only_are_refused() {
    for binary in binaries() {
        let settings = NatsSettings {
            extra: "max_payload: 32768".into(),
            ..NatsSettings::default()
        };
        let server = NatsServer::start_with(&binary, settings).await;
        let error = open_log(options(&server)).await.unwrap_err();
        assert!(error.to_string().contains("max_payload"), "{error}");
    }
}

#[tokio::test]
async fn a_full_account_refuses_and_stores_nothing_more() {
    for binary in binaries() {
        let settings = NatsSettings {
            extra: "accounts { APP { jetstream: { max_store: 200000 }, \
                    users: [{ user: app, password: secret }] } }"
                .into(),
            user: Some(("app".into(), "secret".into())),
            ..NatsSettings::default()
        };
        let server = NatsServer::start_with(&binary, settings).await;
        let log = open_log(NatsOptions {
            auth: user("app", "secret"),
            ..options(&server)
        })
        .await
        .unwrap();
        let leaves_holes = !binary.at_least(2, 10, 12);
        let warnings = log.info().await.unwrap().warnings.join("\n");
        assert_eq!(warnings.contains("lift the limit"), leaves_holes);
        let large = |number: u64| Append {
            bytes: Bytes::from(vec![b'x'; 50_000]),
            ..event(number)
        };
        let mut stored = 0;
        let error = loop {
            match log.append(large(stored)).await {
                Ok(appended) => {
                    stored += 1;
                    assert_eq!(appended.position, Position(stored));
                }
                Err(error) => break error,
            }
        };
        assert!(matches!(error, AppendError::Unavailable(_)), "{error:?}");
        assert!((2..10).contains(&stored));
        let all = SubjectFilter::default();
        if leaves_holes {
            let warnings = log.info().await.unwrap().warnings.join("\n");
            assert!(warnings.contains("has lost events"), "{warnings}");
            continue;
        }
        assert_eq!(log.head().await.unwrap(), Position(stored));
        let read = log.read(Position::ZERO, &all, 100).await.unwrap();
        assert_eq!(read.len() as u64, stored);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_hole_in_the_log_is_noticed_by_everybody_who_comes_across_it() {
    for binary in binaries() {
        let server = NatsServer::start(&binary).await;
        let context = raw(&server).await;
        let lax = stream::Config {
            deny_delete: false,
            ..ledger()
        };
        let stream = context.create_stream(lax).await.unwrap();
        for number in 1..=5 {
            let subject = event(number).subject.to_string();
            let published = context.publish(subject, "{}".into()).await.unwrap();
            published.await.unwrap();
        }
        stream.delete_message(3).await.unwrap();
        context.update_stream(ledger()).await.unwrap();

        let log = open_log(options(&server)).await.unwrap();
        let is_noticed = |error: ReadError| match error {
            ReadError::Missing { position } => assert_eq!(position, Position(3)),
            other => panic!("{other}"),
        };
        let all = SubjectFilter::default();
        let mut tail = log.tail(Position::ZERO, all.clone()).await.unwrap();
        for number in 1..=2 {
            let recorded = tail.next().await.unwrap().unwrap();
            assert_eq!(recorded.position, Position(number));
        }
        is_noticed(tail.next().await.unwrap().unwrap_err());
        is_noticed(log.get(Position(3)).await.unwrap_err());
        is_noticed(log.read(Position::ZERO, &all, 5).await.unwrap_err());
        assert_eq!(log.read(Position(3), &all, 5).await.unwrap().len(), 2);
        let warnings = log.info().await.unwrap().warnings.join("\n");
        assert!(warnings.contains("lost events"), "{warnings}");
    }
}

fn copy(from: &Path, to: &Path) {
    let copied = Command::new("cp").arg("-a").arg(from).arg(to).status();
    assert!(copied.unwrap().success());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_tail_notices_that_its_log_was_replaced_by_an_older_copy() {
    for binary in binaries() {
        let mut server = NatsServer::start(&binary).await;
        let log = open_log(options(&server)).await.unwrap();
        append(&log, 1..=3).await;
        let (store, backup) = (
            server.folder().join("store"),
            server.folder().join("backup"),
        );
        server.stop().await;
        copy(&store, &backup);
        server.start_again().await;
        let all = SubjectFilter::default();
        let mut tail = log.tail(Position::ZERO, all.clone()).await.unwrap();
        for number in 4..=6 {
            let event = event(number);
            while log.append(event.clone()).await.is_err() {}
        }
        for number in 1..=6 {
            let recorded = tail.next().await.unwrap().unwrap();
            assert_eq!(recorded.position, Position(number));
        }
        server.stop().await;
        std::fs::remove_dir_all(&store).unwrap();
        copy(&backup, &store);
        server.start_again().await;
        let noticed = tokio::time::timeout(Duration::from_secs(60), tail.next());
        match noticed.await.unwrap() {
            Some(Err(ReadError::Damaged { position, .. })) => assert_eq!(position, Position(3)),
            other => panic!("not noticed: {other:?}"),
        }
        assert!(tail.next().await.is_none());
        // And so does one who comes back later.
        let mut later = log.tail(Position(6), all).await.unwrap();
        assert!(matches!(
            later.next().await,
            Some(Err(ReadError::Damaged { .. }))
        ));
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_log_that_was_made_anew_is_another_log() {
    for binary in binaries() {
        let mut server = NatsServer::start(&binary).await;
        let log = open_log(options(&server)).await.unwrap();
        append(&log, 1..=2).await;
        let mut tail = log
            .tail(Position(2), SubjectFilter::default())
            .await
            .unwrap();
        let context = raw(&server).await;
        context.delete_stream("DAYBOOK").await.unwrap();
        let other = open_log(options(&server)).await.unwrap();
        append(&other, 1..=5).await;
        server.stop().await;
        server.start_again().await;
        let noticed = tokio::time::timeout(Duration::from_secs(60), tail.next());
        assert!(matches!(
            noticed.await.unwrap(),
            Some(Err(ReadError::Damaged { .. }))
        ));
        assert!(matches!(log.head().await, Err(ReadError::Damaged { .. })));
        assert_ne!(
            log.info().await.unwrap().identity,
            other.info().await.unwrap().identity
        );
    }
}

#[tokio::test]
async fn what_is_published_again_is_not_stored_twice_however_late() {
    for binary in binaries() {
        let server = NatsServer::start(&binary).await;
        let options = BulletinOptions {
            stream: "BOARD".into(),
            prefix: "board".into(),
            ..BulletinOptions::cdevents(1)
        };
        let connection = Connection::open(self::options(&server)).await.unwrap();
        let board = JetStreamBulletin::open(connection, &options).await.unwrap();
        // As if two minutes had passed before the second one.
        let context = raw(&server).await;
        let mut stream = context.get_stream("BOARD").await.unwrap();
        let mut config = stream.info().await.unwrap().config.clone();
        config.duplicate_window = Duration::from_millis(100);
        context.update_stream(config).await.unwrap();

        let event = Bytes::from("{}");
        let publish = async |id: &str, again| {
            board
                .publish("shop._.run", id, event.clone(), again)
                .await
                .unwrap();
        };
        // Nothing is there yet.
        publish("one", true).await;
        publish("two", false).await;
        forgotten(&context, "one").await;
        publish("two", true).await;
        assert_eq!(stream.info().await.unwrap().state.messages, 2);
        publish("three", true).await;
        assert_eq!(stream.info().await.unwrap().state.messages, 3);
    }
}

/// Waits until the stream would take an id again, on a stream beside it with the same window.
async fn forgotten(context: &jetstream::Context, id: &str) {
    let config = stream::Config {
        name: "CLOCK".into(),
        subjects: vec!["clock".into()],
        duplicate_window: Duration::from_millis(100),
        ..Default::default()
    };
    context.create_stream(config).await.unwrap();
    let begun = std::time::Instant::now();
    let mut stored = 0;
    while stored < 2 {
        let message = jetstream::message::PublishMessage::build()
            .message_id(id)
            .payload(Bytes::new());
        let ack = context.send_publish("clock", message).await.unwrap();
        stored += u32::from(!ack.await.unwrap().duplicate);
        assert!(begun.elapsed() < Duration::from_secs(60));
    }
}
