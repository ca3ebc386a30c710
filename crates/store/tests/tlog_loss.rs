//! Silent loss: whatever happens to the log behind Daybook's back, it is noticed, appends stop, and
//! the events come back from the tiles. Over the embedded log and over real nats-servers.

#![allow(clippy::unwrap_used)]

use std::fs::OpenOptions;
use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use async_nats::jetstream::{self, stream};
use async_trait::async_trait;
use bytes::Bytes;
use daybook_events::EventLog;
use daybook_events::log::{
    Append, AppendError, Appended, Consumer, ConsumerConfig, EventStream, LogInfo, MAX_EVENT_BYTES,
    Position, ReadError, Recorded,
};
use daybook_events::subject::{Subject, SubjectFilter};
use daybook_events::tree::{PublishedTree, TreeCondition};
use daybook_store::jetstream::{Connection, JetStreamLog, LogOptions, NatsOptions};
use daybook_store::tlog::{
    FolderStorage, FolderTree, Growth, GuardedLog, KeyRing, Notary, NotaryError, NotaryOptions,
    Published, ReadTiles, RecheckError, RepairError, StorageError, TileStorage, TreeReader,
    clear_breach, event_entry, gap_entry, is_repairable, recheck, repair,
};
use daybook_testkit::left_out;
use daybook_testkit::nats::{NatsBinary, NatsServer};
use futures_util::StreamExt;
use tempfile::TempDir;
use tokio_util::sync::CancellationToken;

mod tlog_support;

use tlog_support::{
    PATIENCE, Working, an_event, append, embedded, files, flip, keys, options, until,
};

/// So many events are signed before something happens to the log.
const SIGNED: u64 = 300;

fn copy(from: &Path, to: &Path) {
    let copied = Command::new("cp").arg("-a").arg(from).arg(to).status();
    assert!(copied.unwrap().success());
}

fn in_place_of(from: &Path, to: &Path) {
    std::fs::remove_dir_all(to).unwrap();
    copy(from, to);
}

/// A tree over a log, with what it takes to go on after the log was lost.
struct Ledger {
    folder: TempDir,
    keys: KeyRing,
}

impl Ledger {
    fn new() -> Self {
        Self {
            folder: tempfile::tempdir().unwrap(),
            keys: keys(),
        }
    }

    fn at(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    async fn notary(&self, log: &Arc<dyn EventLog>) -> Working {
        Working::start(log, &self.at("tlog"), &self.keys).await
    }

    async fn sign(&self, log: &Arc<dyn EventLog>, upto: u64) {
        let from = log.head().await.unwrap().0;
        let notary = self.notary(log).await;
        append(&**log, from..upto).await;
        notary.signed(upto).await;
        notary.stop().await;
    }

    /// The log is found to be broken; then it is restored into a new one, and that is signed.
    async fn is_noticed_and_repaired(
        &self,
        notary: Working,
        log: &Arc<dyn EventLog>,
        codes: &[&str],
        new: Arc<dyn EventLog>,
    ) {
        let breach = notary.breach().await;
        assert!(codes.contains(&breach.code), "{breach:?}");
        assert!(!breach.remedy.is_empty());
        // Nobody appends any more, in whatever process, and no notary starts.
        let tree = Arc::new(FolderTree::new(self.at("tlog")));
        let guarded = GuardedLog::new(log.clone(), tree);
        let refused = guarded.append(an_event(1_000_000)).await;
        assert!(
            matches!(refused, Err(AppendError::Stopped(_))),
            "{refused:?}"
        );
        assert_eq!(self.notary(log).await.breach().await, breach);

        let storage = FolderStorage::new(self.at("tlog"));
        let done = repair(&storage, &self.keys, &*new).await.unwrap();
        assert_eq!((done.restored, done.head.size), (SIGNED, SIGNED));
        assert_eq!(done.breach, Some(breach));
        clear_breach(&storage).await.unwrap();
        for number in 0..SIGNED {
            let restored = new.get(Position(number + 1)).await.unwrap().unwrap();
            let original = an_event(number);
            assert_eq!(restored.bytes, original.bytes);
            assert_eq!(restored.subject, original.subject);
        }
        self.sign(&new, SIGNED + 10).await;
        let tree = FolderTree::new(self.at("tlog"));
        assert!(!matches!(tree.condition(), TreeCondition::Broken(_)));
    }
}

#[tokio::test]
async fn an_embedded_log_whose_end_was_cut_off() {
    let ledger = Ledger::new();
    let log = embedded(&ledger.at("log")).await;
    ledger.sign(&log, SIGNED).await;
    drop(log);
    let segment = files(&ledger.at("log"), ".seg").pop().unwrap();
    let file = OpenOptions::new().write(true).open(segment).unwrap();
    file.set_len(file.metadata().unwrap().len() - 100).unwrap();
    let log = embedded(&ledger.at("log")).await;
    assert_eq!(log.head().await.unwrap(), Position(SIGNED - 1));
    let notary = ledger.notary(&log).await;
    let new = embedded(&ledger.at("new")).await;
    ledger
        .is_noticed_and_repaired(notary, &log, &["log_truncated"], new)
        .await;
}

#[tokio::test]
async fn an_embedded_log_with_a_flipped_bit_while_it_is_in_use() {
    let ledger = Ledger::new();
    let log = embedded(&ledger.at("log")).await;
    ledger.sign(&log, SIGNED).await;
    let notary = ledger.notary(&log).await;
    until(|| notary.tree.condition() == TreeCondition::Sound).await;
    let segment = files(&ledger.at("log"), ".seg").pop().unwrap();
    flip(&segment, 20_000);
    let new = embedded(&ledger.at("new")).await;
    ledger
        .is_noticed_and_repaired(notary, &log, &["log_differs"], new)
        .await;
}

#[tokio::test]
async fn an_older_copy_of_an_embedded_log() {
    let ledger = Ledger::new();
    let log = embedded(&ledger.at("log")).await;
    ledger.sign(&log, 100).await;
    drop(log);
    copy(&ledger.at("log"), &ledger.at("backup"));
    let log = embedded(&ledger.at("log")).await;
    ledger.sign(&log, SIGNED).await;
    drop(log);
    in_place_of(&ledger.at("backup"), &ledger.at("log"));
    let log = embedded(&ledger.at("log")).await;
    let notary = ledger.notary(&log).await;
    let new = embedded(&ledger.at("new")).await;
    ledger
        .is_noticed_and_repaired(notary, &log, &["log_truncated"], new)
        .await;
}

/// The worst case: before anybody compares, the older copy has got other events.
#[tokio::test]
async fn an_older_copy_that_went_another_way() {
    let ledger = Ledger::new();
    let log = embedded(&ledger.at("log")).await;
    ledger.sign(&log, 100).await;
    drop(log);
    copy(&ledger.at("log"), &ledger.at("backup"));
    let log = embedded(&ledger.at("log")).await;
    ledger.sign(&log, SIGNED).await;
    drop(log);
    in_place_of(&ledger.at("backup"), &ledger.at("log"));
    let log = embedded(&ledger.at("log")).await;
    append(&*log, 5_000..6_000).await;
    let notary = ledger.notary(&log).await;
    let new = embedded(&ledger.at("new")).await;
    ledger
        .is_noticed_and_repaired(notary, &log, &["log_differs"], new)
        .await;
}

#[tokio::test]
async fn a_new_log_in_the_place_of_the_signed_one() {
    let ledger = Ledger::new();
    let log = embedded(&ledger.at("log")).await;
    ledger.sign(&log, SIGNED).await;
    drop(log);
    std::fs::remove_dir_all(ledger.at("log")).unwrap();
    let log = embedded(&ledger.at("log")).await;
    let notary = ledger.notary(&log).await;
    let new = embedded(&ledger.at("new")).await;
    ledger
        .is_noticed_and_repaired(notary, &log, &["log_replaced"], new)
        .await;
}

/// A breach is forgotten when all is as it was signed again, and not before.
#[tokio::test]
async fn the_true_log_comes_back_from_a_backup() {
    let ledger = Ledger::new();
    let log = embedded(&ledger.at("log")).await;
    ledger.sign(&log, SIGNED).await;
    let notary = ledger.notary(&log).await;
    until(|| notary.tree.condition() == TreeCondition::Sound).await;
    let segment = files(&ledger.at("log"), ".seg").pop().unwrap();
    flip(&segment, 20_000);
    let breach = notary.breach().await;
    let storage = FolderStorage::new(ledger.at("tlog"));
    match recheck(&storage, &ledger.keys, &*log).await {
        Err(RecheckError::Breach(still)) => assert_eq!(still, breach),
        other => panic!("{other:?}"),
    }
    assert_eq!(ledger.notary(&log).await.breach().await, breach);
    flip(&segment, 20_000);
    let (head, forgotten) = recheck(&storage, &ledger.keys, &*log).await.unwrap();
    assert_eq!((head.size, forgotten), (SIGNED, Some(breach)));
    ledger.sign(&log, SIGNED + 10).await;
}

#[tokio::test]
async fn a_repair_writes_nothing_where_it_must_not() {
    let ledger = Ledger::new();
    let log = embedded(&ledger.at("log")).await;
    ledger.sign(&log, SIGNED).await;
    let storage = FolderStorage::new(ledger.at("tlog"));
    let same = repair(&storage, &ledger.keys, &*log).await;
    assert!(matches!(same, Err(RepairError::SameLog { .. })), "{same:?}");
    let other = embedded(&ledger.at("other")).await;
    append(&*other, 7..8).await;
    let differs = repair(&storage, &ledger.keys, &*other).await;
    assert!(
        matches!(
            differs,
            Err(RepairError::TargetDiffers {
                position: Position(1)
            })
        ),
        "{differs:?}"
    );
    assert_eq!(other.head().await.unwrap(), Position(1));
    // An entry that was changed is not restored.
    let new = embedded(&ledger.at("new")).await;
    flip(&ledger.at("tlog/tile/entries/000"), 1000);
    let changed = repair(&storage, &ledger.keys, &*new).await;
    assert!(
        matches!(changed, Err(RepairError::NotSigned { size: SIGNED })),
        "{changed:?}"
    );
    assert_eq!(new.head().await.unwrap(), Position::ZERO);
    flip(&ledger.at("tlog/tile/entries/000"), 1000);
    // Nor is anything where the next notary would not start.
    for tile in TILES_OF_HASHES {
        flip(&ledger.at("tlog").join(tile), 17);
        let changed = repair(&storage, &ledger.keys, &*new).await;
        match changed {
            Err(RepairError::TreeDamaged { path }) => assert_eq!(path.to_string(), tile),
            other => panic!("{other:?}"),
        }
        assert_eq!(new.head().await.unwrap(), Position::ZERO);
        flip(&ledger.at("tlog").join(tile), 17);
    }
    // One that was cut off goes on.
    append(&*new, 0..100).await;
    let done = repair(&storage, &ledger.keys, &*new).await.unwrap();
    assert_eq!(done.restored, SIGNED - 100);
}

/// Those of a tree of 300.
const TILES_OF_HASHES: [&str; 3] = ["tile/0/000", "tile/1/000.p/1", "tile/0/001.p/44"];

#[tokio::test]
async fn a_flipped_bit_in_a_tile_is_noticed() {
    for tile in ["tile/entries/000"].into_iter().chain(TILES_OF_HASHES) {
        let ledger = Ledger::new();
        let log = embedded(&ledger.at("log")).await;
        ledger.sign(&log, SIGNED).await;
        let notary = ledger.notary(&log).await;
        until(|| notary.tree.condition() == TreeCondition::Sound).await;
        flip(&ledger.at("tlog").join(tile), 17);
        let breach = notary.breach().await;
        assert_eq!(breach.code, "tree_damaged", "{tile}: {breach:?}");
        assert!(!is_repairable(&breach));
        let storage = FolderStorage::new(ledger.at("tlog"));
        match recheck(&storage, &ledger.keys, &*log).await {
            Err(RecheckError::Breach(still)) => assert_eq!(still.code, "tree_damaged"),
            other => panic!("{tile}: {other:?}"),
        }
        // Until the tile is what it was.
        flip(&ledger.at("tlog").join(tile), 17);
        recheck(&storage, &ledger.keys, &*log).await.unwrap();
        ledger.sign(&log, SIGNED + 1).await;
    }
}

/// The tiles came back, and meanwhile the log was lost: what is on record is what is wrong now.
#[tokio::test]
async fn a_breach_gives_way_to_another() {
    let ledger = Ledger::new();
    let log = embedded(&ledger.at("log")).await;
    ledger.sign(&log, SIGNED).await;
    let tile = ledger.at("tlog/tile/0/000");
    flip(&tile, 17);
    let breach = ledger.notary(&log).await.breach().await;
    assert_eq!(breach.code, "tree_damaged");
    flip(&tile, 17);
    let other = embedded(&ledger.at("other")).await;
    let storage = FolderStorage::new(ledger.at("tlog"));
    let found = match recheck(&storage, &ledger.keys, &*other).await {
        Err(RecheckError::Breach(found)) => found,
        other => panic!("{other:?}"),
    };
    assert_eq!(found.code, "log_replaced");
    let condition = || FolderTree::new(ledger.at("tlog")).condition();
    assert_eq!(condition(), TreeCondition::Broken(found));
    recheck(&storage, &ledger.keys, &*log).await.unwrap();
    assert!(!matches!(condition(), TreeCondition::Broken(_)));
    // Where nothing was wrong, nothing is said to be by whoever names the wrong log.
    let wrong = recheck(&storage, &ledger.keys, &*other).await;
    assert!(matches!(wrong, Err(RecheckError::Breach(_))), "{wrong:?}");
    assert!(!matches!(condition(), TreeCondition::Broken(_)));
}

/// A notary died before it signed, and what it was to sign is not what the log has now.
#[tokio::test]
async fn a_recheck_compares_what_was_not_signed_yet() {
    let ledger = Ledger::new();
    let log = embedded(&ledger.at("log")).await;
    ledger.sign(&log, 10).await;
    let storage = FolderStorage::new(ledger.at("tlog"));
    let store = async |events: Range<u64>| {
        let mut growth = Growth::load(&TreeReader::new(&storage, 10)).await.unwrap();
        for number in events {
            growth.push(an_event(number).bytes).unwrap();
        }
        let files = growth.files().unwrap().into_iter();
        let files = files.map(|(path, bytes)| (path.to_string(), bytes));
        storage.put(files.collect()).await.unwrap();
    };
    append(&*log, 10..15).await;
    store(10..12).await;
    recheck(&storage, &ledger.keys, &*log).await.unwrap();
    store(20..25).await;
    match recheck(&storage, &ledger.keys, &*log).await {
        Err(RecheckError::Breach(found)) => {
            assert_eq!(found.code, "log_differs");
            assert_eq!(found.position, Some(Position(11)));
        }
        other => panic!("{other:?}"),
    }
    let breach = ledger.notary(&log).await.breach().await;
    assert_eq!(breach.code, "log_differs");
}

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

async fn open(server: &NatsServer, stream: &str) -> Arc<dyn EventLog> {
    let options = NatsOptions {
        answer_timeout: Duration::from_secs(6),
        ..NatsOptions::new(&server.url())
    };
    let options_of_log = LogOptions {
        stream: stream.to_owned(),
        ..LogOptions::default()
    };
    let connection = Connection::open(options).await.unwrap();
    Arc::new(
        JetStreamLog::open(connection, &options_of_log)
            .await
            .unwrap(),
    )
}

async fn raw(server: &NatsServer) -> jetstream::Context {
    jetstream::new(async_nats::connect(server.url()).await.unwrap())
}

async fn set_aside(server: &NatsServer) {
    let connection = Connection::open(NatsOptions::new(&server.url()))
        .await
        .unwrap();
    daybook_store::jetstream::set_aside(&connection, "DAYBOOK")
        .await
        .unwrap();
}

/// The stream's files are replaced by an older copy of them; or it is made anew; or a bit of a
/// message is flipped.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stream_that_is_not_what_it_was() {
    for binary in binaries() {
        for what in ["older", "anew", "flipped"] {
            let mut server = NatsServer::start(&binary).await;
            let ledger = Ledger::new();
            let log = open(&server, "DAYBOOK").await;
            ledger.sign(&log, 100).await;
            let store = server.folder().join("store");
            server.stop().await;
            copy(&store, &ledger.at("backup"));
            server.start_again().await;
            ledger.sign(&log, SIGNED).await;
            let notary = ledger.notary(&log).await;
            until(|| notary.tree.condition() == TreeCondition::Sound).await;
            if what == "anew" {
                raw(&server).await.delete_stream("DAYBOOK").await.unwrap();
                open(&server, "DAYBOOK").await;
            } else {
                server.stop().await;
                match what {
                    "older" => in_place_of(&ledger.at("backup"), &store),
                    _ => files(&store, ".blk")
                        .iter()
                        .for_each(|block| flip(block, 5_000)),
                }
                server.start_again().await;
            }
            let codes: &[&str] = match what {
                "older" => &["log_truncated"],
                "anew" => &["log_replaced"],
                // What is left of the block depends on the version of the server.
                _ => &["log_truncated", "log_differs"],
            };
            // The old stream is kept, under other subjects.
            set_aside(&server).await;
            let new = open(&server, "DAYBOOK-2").await;
            ledger
                .is_noticed_and_repaired(notary, &log, codes, new)
                .await;
            raw(&server).await.get_stream("DAYBOOK").await.unwrap();
        }
    }
}

/// A stream with a hole, as old servers leave one when an account is full: nobody was told that the
/// event was stored.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_gap_is_recorded_and_readers_go_past_it() {
    for binary in binaries() {
        let server = NatsServer::start(&binary).await;
        open(&server, "DAYBOOK").await;
        let context = raw(&server).await;
        let config = context
            .get_stream("DAYBOOK")
            .await
            .unwrap()
            .cached_info()
            .config
            .clone();
        context.delete_stream("DAYBOOK").await.unwrap();
        let lax = stream::Config {
            deny_delete: false,
            ..config.clone()
        };
        let stream = context.create_stream(lax).await.unwrap();
        for number in 0..5 {
            let event = an_event(number);
            let published = context
                .publish(event.subject.to_string(), event.bytes)
                .await;
            published.unwrap().await.unwrap();
        }
        stream.delete_message(3).await.unwrap();
        context.update_stream(config).await.unwrap();

        let ledger = Ledger::new();
        let log = open(&server, "DAYBOOK").await;
        let notary = ledger.notary(&log).await;
        let guarded = GuardedLog::new(log.clone(), notary.tree.clone());
        let all = SubjectFilter::default();
        let events = guarded.tail(Position::ZERO, all.clone()).await.unwrap();
        let positions = events.take(5).map(|event| event.unwrap().position.0);
        let positions = tokio::time::timeout(PATIENCE, positions.collect::<Vec<_>>());
        assert_eq!(positions.await.unwrap(), [1, 2, 3, 4, 5]);
        notary.signed(5).await;
        let published = Published(notary.tree.clone());
        let entry = TreeReader::new(&published, 5).entry(2).await.unwrap();
        assert_eq!(entry, gap_entry(Position(3)));
        let read = guarded.read(Position::ZERO, &all, 3).await.unwrap();
        assert_eq!(
            read.iter().map(|e| e.position.0).collect::<Vec<_>>(),
            [1, 2, 3]
        );
        let rest = guarded.read(Position(2), &all, 9).await.unwrap();
        assert_eq!(
            rest.iter().map(|e| e.position.0).collect::<Vec<_>>(),
            [3, 4, 5]
        );
        // Of no aggregate, and nothing that can be read as an event.
        let instead = guarded.get(Position(3)).await.unwrap().unwrap();
        assert_eq!(instead, read[2]);
        assert_eq!(instead.subject.kind(), None);
        assert!(instead.event().is_err());
        let builds = SubjectFilter {
            aggregate: Some(daybook_events::AggregateKind::Build),
            ..all.clone()
        };
        let builds = guarded.read(Position::ZERO, &builds, 9).await.unwrap();
        assert_eq!(builds.len(), 4);
        // A restart and the comparisons find nothing wrong with it.
        notary.stop().await;
        let notary = ledger.notary(&log).await;
        append(&*log, 5..6).await;
        notary.signed(6).await;
        notary.stop().await;

        // And a new log gets it back at the same position.
        set_aside(&server).await;
        let new = open(&server, "DAYBOOK-2").await;
        let storage = FolderStorage::new(ledger.at("tlog"));
        let done = repair(&storage, &ledger.keys, &*new).await.unwrap();
        assert_eq!((done.restored, done.gaps), (6, 1));
        let gap = new.get(Position(3)).await.unwrap().unwrap();
        assert_eq!(
            (&gap.subject, &gap.bytes),
            (&instead.subject, &instead.bytes)
        );
        assert_eq!(gap.subject.kind(), None);
        ledger.sign(&new, 10).await;
    }
}

/// Events that somebody wrote past Daybook, and that no entry can hold: their digests are signed.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn events_that_are_too_large_for_the_tree_are_signed_by_their_digest() {
    for binary in binaries() {
        let server = NatsServer::start(&binary).await;
        let ledger = Ledger::new();
        let log = open(&server, "DAYBOOK").await;
        append(&*log, 0..2).await;
        let context = raw(&server).await;
        let mut written = Vec::new();
        // The first size that is too large, and the last that the stream takes.
        for (number, more) in [(2, 1), (3, 1000)] {
            let event = large_event(number, MAX_EVENT_BYTES + more);
            let subject = event.subject.to_string();
            let published = context.publish(subject, event.bytes.clone()).await;
            let position = Position(published.unwrap().await.unwrap().sequence);
            written.push((position, event_entry(position, &event.bytes)));
        }
        append(&*log, 4..SIGNED).await;
        let notary = ledger.notary(&log).await;
        notary.signed(SIGNED).await;
        let published = Published(notary.tree.clone());
        let tree = TreeReader::new(&published, SIGNED);
        for (position, entry) in &written {
            assert!(entry.starts_with(b"daybook.dev/too-large/v1\n"));
            assert_eq!(tree.entry(position.0 - 1).await.unwrap(), entry);
            // Readers get what auditors have, and a fold comes to the same.
            let stored = log.get(*position).await.unwrap().unwrap();
            assert_eq!(stored.bytes, entry);
            let before = Position(position.0 - 1);
            let read = log.read(before, &SubjectFilter::default(), 1).await;
            assert_eq!(read.unwrap(), [stored]);
        }
        // Neither a start nor the comparison of all finds anything wrong with it.
        notary.stop().await;
        let notary = ledger.notary(&log).await;
        until(|| notary.tree.condition() == TreeCondition::Sound).await;
        notary.stop().await;
        let storage = FolderStorage::new(ledger.at("tlog"));
        let (head, breach) = recheck(&storage, &ledger.keys, &*log).await.unwrap();
        assert_eq!((head.size, breach), (SIGNED, None));

        // Their bytes are in the old stream only: a new log gets what was signed.
        set_aside(&server).await;
        let new = open(&server, "DAYBOOK-2").await;
        let done = repair(&storage, &ledger.keys, &*new).await.unwrap();
        assert_eq!(done.restored, SIGNED);
        for (position, entry) in &written {
            let instead = new.get(*position).await.unwrap().unwrap();
            assert_eq!(instead.bytes, entry);
            assert_eq!(instead.subject.kind(), None);
        }
        ledger.sign(&new, SIGNED + 10).await;
        let (head, _) = recheck(&storage, &ledger.keys, &*new).await.unwrap();
        assert_eq!(head.size, SIGNED + 10);
    }
}

/// The event of a number, with so many bytes.
fn large_event(number: u64, bytes: usize) -> Append {
    let event = an_event(number);
    let mut envelope: serde_json::Value = serde_json::from_slice(&event.bytes).unwrap();
    envelope["data"]["filler"] = "".into();
    let rest = bytes - envelope.to_string().len();
    envelope["data"]["filler"] = "x".repeat(rest).into();
    Append {
        bytes: envelope.to_string().into(),
        ..event
    }
}

/// Somebody who writes past Daybook may store the same bytes twice, and an event too, when the server
/// has forgotten its id.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_there_twice_is_restored_twice() {
    for binary in binaries() {
        let server = NatsServer::start(&binary).await;
        let ledger = Ledger::new();
        let log = open(&server, "DAYBOOK").await;
        let context = raw(&server).await;
        let event = an_event(1_000);
        let (subject, of_event) = ("daybook.ev.shop._.note.a", event.subject.to_string());
        for (subject, bytes) in [
            (subject, "no event".into()),
            (&of_event, event.bytes.clone()),
            (subject, "no event".into()),
            (&of_event, event.bytes.clone()),
            (subject, "no event".into()),
        ] {
            let published = context.publish(subject.to_owned(), bytes).await;
            published.unwrap().await.unwrap();
        }
        ledger.sign(&log, 10).await;
        let all = SubjectFilter::default();
        let originals = log.read(Position::ZERO, &all, 10).await.unwrap();
        set_aside(&server).await;
        let storage = FolderStorage::new(ledger.at("tlog"));
        let (stream, folder) = (open(&server, "DAYBOOK-2").await, ledger.at("new"));
        for new in [stream, embedded(&folder).await] {
            let done = repair(&storage, &ledger.keys, &*new).await.unwrap();
            assert_eq!(done.restored, 10);
            let restored = new.read(Position::ZERO, &all, 11).await.unwrap();
            let bytes = |events: &[Recorded]| -> Vec<_> {
                events.iter().map(|event| event.bytes.clone()).collect()
            };
            assert_eq!(bytes(&restored), bytes(&originals));
            assert_eq!(restored[3].subject, event.subject);
        }
    }
}

/// A folder that does not take the news of a breach for as long as it is full.
#[derive(Debug)]
struct Filling {
    storage: FolderStorage,
    is_full: AtomicBool,
    /// How often it was not taken.
    refused: AtomicU64,
}

#[async_trait]
impl ReadTiles for Filling {
    async fn get(&self, path: &str) -> io::Result<Option<Bytes>> {
        self.storage.get(path).await
    }
}

#[async_trait]
impl TileStorage for Filling {
    async fn put(&self, files: Vec<(String, Bytes)>) -> Result<(), StorageError> {
        self.storage.put(files).await
    }

    async fn create(&self, path: &str, bytes: Bytes) -> Result<bool, StorageError> {
        self.storage.create(path, bytes).await
    }

    async fn replace(&self, path: &str, bytes: Bytes) -> Result<(), StorageError> {
        if path == "breach.json" && self.is_full.load(Ordering::SeqCst) {
            self.refused.fetch_add(1, Ordering::SeqCst);
            return Err(StorageError::Io {
                action: "replacing",
                path: path.into(),
                source: io::ErrorKind::StorageFull.into(),
            });
        }
        self.storage.replace(path, bytes).await
    }

    async fn list(&self, folder: &str) -> Result<Vec<String>, StorageError> {
        self.storage.list(folder).await
    }

    async fn remove(&self, paths: Vec<String>) -> Result<(), StorageError> {
        self.storage.remove(paths).await
    }

    async fn tidy(&self) -> Result<(), StorageError> {
        self.storage.tidy().await
    }
}

#[tokio::test]
async fn a_breach_is_told_as_soon_as_the_folder_takes_it() {
    for is_at_start in [false, true] {
        let ledger = Ledger::new();
        let log = embedded(&ledger.at("log")).await;
        ledger.sign(&log, SIGNED).await;
        let log = match is_at_start {
            true => embedded(&ledger.at("other")).await,
            false => log,
        };
        let storage = Arc::new(Filling {
            storage: FolderStorage::new(ledger.at("tlog")),
            is_full: AtomicBool::new(true),
            refused: AtomicU64::new(0),
        });
        let keys = ledger.keys.clone();
        let notary = Notary::open(log.clone(), storage.clone(), keys, options());
        let notary = notary.await.unwrap();
        let (tree, cancel) = (notary.tree(), CancellationToken::new());
        let running = tokio::spawn(notary.run(cancel.clone()));
        if !is_at_start {
            until(|| tree.condition() == TreeCondition::Sound).await;
            flip(&files(&ledger.at("log"), ".seg").pop().unwrap(), 20_000);
        }
        until(|| matches!(tree.condition(), TreeCondition::Broken(_))).await;
        // It was tried when it was opened, and since.
        let tries = if is_at_start { 2 } else { 1 };
        until(|| storage.refused.load(Ordering::SeqCst) >= tries || running.is_finished()).await;
        assert!(!running.is_finished());
        let folder = FolderTree::new(ledger.at("tlog"));
        assert!(!matches!(folder.condition(), TreeCondition::Broken(_)));
        storage.is_full.store(false, Ordering::SeqCst);
        until(|| matches!(folder.condition(), TreeCondition::Broken(_))).await;
        let ended = tokio::time::timeout(PATIENCE, running).await.unwrap();
        assert!(matches!(ended.unwrap(), Err(NotaryError::Breach(_))));

        if !is_at_start {
            continue;
        }
        // One that cannot tell it ends when it is asked to.
        std::fs::remove_file(ledger.at("tlog/breach.json")).unwrap();
        storage.is_full.store(true, Ordering::SeqCst);
        let keys = ledger.keys.clone();
        let notary = Notary::open(log, storage, keys, options()).await.unwrap();
        let running = tokio::spawn(notary.run(cancel.clone()));
        cancel.cancel();
        let ended = tokio::time::timeout(PATIENCE, running).await.unwrap();
        assert!(matches!(ended.unwrap(), Err(NotaryError::Breach(_))));
    }
}

/// Whatever else is wrong with the folder: what says that the log is broken is looked at first.
#[tokio::test]
async fn a_breach_counts_where_the_checkpoint_cannot_be_read() {
    let ledger = Ledger::new();
    let log = embedded(&ledger.at("log")).await;
    ledger.sign(&log, 10).await;
    drop(log);
    std::fs::remove_dir_all(ledger.at("log")).unwrap();
    let log = embedded(&ledger.at("log")).await;
    let breach = ledger.notary(&log).await.breach().await;
    let checkpoint = ledger.at("tlog/checkpoint");
    std::fs::write(&checkpoint, "none").unwrap();
    let condition = || FolderTree::new(ledger.at("tlog")).condition();
    assert_eq!(condition(), TreeCondition::Broken(breach));
    std::fs::remove_file(&checkpoint).unwrap();
    std::fs::create_dir(&checkpoint).unwrap();
    assert!(matches!(condition(), TreeCondition::Broken(_)));
    // That it is there is what counts.
    std::fs::write(ledger.at("tlog/breach.json"), "{").unwrap();
    match condition() {
        TreeCondition::Broken(breach) => assert_eq!(breach.code, "log_broken"),
        other => panic!("{other:?}"),
    }
}

/// A log that says for a while that it ends earlier than it does, as a new leader of a cluster may.
#[derive(Debug)]
struct Lagging {
    log: Arc<dyn EventLog>,
    /// Where it says that it ends.
    end: AtomicU64,
    /// How many events were to be appended to it meanwhile.
    appended: AtomicU64,
}

impl Lagging {
    fn has(&self, position: Position) -> bool {
        position.0 <= self.end.load(Ordering::SeqCst)
    }
}

#[async_trait]
impl EventLog for Lagging {
    async fn append(&self, append: Append) -> Result<Appended, AppendError> {
        if self.end.load(Ordering::SeqCst) != u64::MAX {
            self.appended.fetch_add(1, Ordering::SeqCst);
        }
        self.log.append(append).await
    }

    async fn head(&self) -> Result<Position, ReadError> {
        let head = self.log.head().await?.0;
        Ok(Position(head.min(self.end.load(Ordering::SeqCst))))
    }

    async fn get(&self, position: Position) -> Result<Option<Recorded>, ReadError> {
        let event = self.log.get(position).await?;
        Ok(event.filter(|_| self.has(position)))
    }

    async fn read_aggregate(&self, subject: &Subject) -> Result<Vec<Recorded>, ReadError> {
        self.log.read_aggregate(subject).await
    }

    async fn read(
        &self,
        after: Position,
        filter: &SubjectFilter,
        limit: usize,
    ) -> Result<Vec<Recorded>, ReadError> {
        let mut events = self.log.read(after, filter, limit).await?;
        events.retain(|event| self.has(event.position));
        Ok(events)
    }

    async fn tail(&self, after: Position, filter: SubjectFilter) -> Result<EventStream, ReadError> {
        self.log.tail(after, filter).await
    }

    async fn consumer(&self, config: ConsumerConfig) -> Result<Arc<dyn Consumer>, ReadError> {
        self.log.consumer(config).await
    }

    async fn info(&self) -> Result<LogInfo, ReadError> {
        self.log.info().await
    }
}

/// A notary over a log that begins to lag, until this and those who see the folder doubt it.
async fn doubted(ledger: &Ledger, settle: Duration) -> (Arc<Lagging>, Working, [GuardedLog; 2]) {
    let lagging = Arc::new(Lagging {
        log: embedded(&ledger.at("log")).await,
        end: AtomicU64::new(u64::MAX),
        appended: AtomicU64::new(0),
    });
    let log: Arc<dyn EventLog> = lagging.clone();
    let options = NotaryOptions {
        settle,
        ..options()
    };
    let tiles = ledger.at("tlog");
    let notary = Working::start_with(&log, &tiles, &ledger.keys, options).await;
    append(&*log, 0..10).await;
    notary.signed(10).await;
    let trees: [Arc<dyn PublishedTree>; 2] =
        [notary.tree.clone(), Arc::new(FolderTree::new(tiles))];
    lagging.end.store(8, Ordering::SeqCst);
    for tree in &trees {
        until(|| match tree.condition() {
            TreeCondition::Doubted(why) => why.contains("ended at 8") && why.contains("10 events"),
            other => {
                let sound = matches!(other, TreeCondition::Sound | TreeCondition::Unknown(_));
                assert!(sound, "{other:?}");
                false
            }
        })
        .await;
    }
    (
        lagging,
        notary,
        trees.map(|tree| GuardedLog::new(log.clone(), tree)),
    )
}

#[tokio::test]
async fn a_log_that_lags_for_a_moment_only_lets_appends_wait() {
    let ledger = Ledger::new();
    let (lagging, notary, guarded) = doubted(&ledger, PATIENCE).await;
    let [here, there] = &guarded;
    let caught_up = async {
        // Both appends were asked for before.
        assert_eq!(lagging.appended.load(Ordering::SeqCst), 0);
        lagging.end.store(u64::MAX, Ordering::SeqCst);
    };
    let appends = async { tokio::join!(here.append(an_event(10)), there.append(an_event(11))) };
    let ((here, there), ()) = tokio::join!(biased; appends, caught_up);
    here.unwrap();
    there.unwrap();
    notary.signed(12).await;
    until(|| notary.tree.condition() == TreeCondition::Sound).await;
    let folder = FolderTree::new(ledger.at("tlog"));
    until(|| folder.condition() == TreeCondition::Sound).await;
    notary.stop().await;
}

#[tokio::test]
async fn nothing_is_appended_to_a_log_that_lost_its_end_while_it_is_doubted() {
    let ledger = Ledger::new();
    let settle = Duration::from_secs(8);
    let (lagging, notary, [here, there]) = doubted(&ledger, settle).await;
    let (here, there) = tokio::join!(here.append(an_event(10)), there.append(an_event(11)));
    for refused in [here, there] {
        match refused {
            Err(AppendError::Stopped(why)) => assert!(why.contains("log_truncated"), "{why}"),
            other => panic!("{other:?}"),
        }
    }
    assert_eq!(notary.breach().await.position, Some(Position(9)));
    assert_eq!(lagging.appended.load(Ordering::SeqCst), 0);
    assert_eq!(lagging.log.head().await.unwrap(), Position(10));
}
