//! The notary over a real log: what it publishes, how it goes on after a restart, and what it says
//! of a log that is not what was signed.

#![allow(clippy::unwrap_used)]

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use daybook_events::EventLog;
use daybook_events::log::{Append, AppendError, Expected, Position};
use daybook_events::names::{BuildId, EventId, ProjectName};
use daybook_events::subject::Subject;
use daybook_events::tree::{Breach, PublishedTree, TreeCondition};
use daybook_store::embedded::{EmbeddedConfig, EmbeddedLog};
use daybook_store::tlog::{
    Checkpoint, FolderStorage, FolderTree, GuardedLog, KeyRing, Notary, NotaryError, NotaryOptions,
    Published, SignerKey, TreeReader, leaf_hash, verify_inclusion,
};
use tokio_util::sync::{CancellationToken, DropGuard};
use uuid::Uuid;

const PATIENCE: Duration = Duration::from_secs(60);
const ORIGIN: &str = "daybook.example.com/tlog";

fn an_event(number: u64) -> Append {
    let id = Uuid::from_u128(number.into());
    Append {
        subject: Subject::Build(ProjectName::parse("shop").unwrap(), BuildId(id)),
        id: EventId(id),
        expected: Expected::Any,
        bytes: Bytes::from(format!("{{\"id\":\"{id}\"}}")),
    }
}

async fn append(log: &dyn EventLog, numbers: std::ops::Range<u64>) {
    let all = numbers.map(|number| log.append(an_event(number)));
    for appended in futures_util::future::join_all(all).await {
        appended.unwrap();
    }
}

async fn embedded(dir: &Path) -> Arc<dyn EventLog> {
    let log = EmbeddedLog::open(dir, EmbeddedConfig::default()).await;
    Arc::new(log.unwrap())
}

fn options() -> NotaryOptions {
    NotaryOptions {
        max_delay: Duration::from_millis(20),
        check_every: Duration::from_millis(50),
        settle: Duration::from_millis(200),
        sweep_rate: 1_000_000,
        ..NotaryOptions::default()
    }
}

fn keys() -> KeyRing {
    KeyRing::of(SignerKey::generate(ORIGIN).unwrap())
}

/// A notary at work. Dropping it cancels it.
struct Working {
    tree: Arc<dyn PublishedTree>,
    ended: tokio::task::JoinHandle<Result<(), NotaryError>>,
    cancel: DropGuard,
}

impl Working {
    async fn start(log: &Arc<dyn EventLog>, folder: &Path, keys: &KeyRing) -> Self {
        let storage = Arc::new(FolderStorage::new(folder));
        let notary = Notary::open(log.clone(), storage, keys.clone(), options());
        let notary = notary.await.unwrap();
        let cancel = CancellationToken::new();
        Self {
            tree: notary.tree(),
            ended: tokio::spawn(notary.run(cancel.clone())),
            cancel: cancel.drop_guard(),
        }
    }

    async fn signed(&self, size: u64) {
        until(|| self.tree.head().is_some_and(|h| h.head.size >= size)).await;
    }

    async fn stop(self) {
        drop(self.cancel);
        self.ended.await.unwrap().unwrap();
    }

    async fn breach(self) -> Breach {
        let ended = tokio::time::timeout(PATIENCE, self.ended).await;
        match ended.expect("it ends").unwrap() {
            Err(NotaryError::Breach(breach)) => breach,
            other => panic!("{other:?}"),
        }
    }
}

async fn until(mut condition: impl FnMut() -> bool) {
    let waited = tokio::time::timeout(PATIENCE, async {
        while !condition() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    });
    waited.await.expect("it happens in time");
}

#[tokio::test]
async fn what_is_appended_is_signed_and_proven() {
    let folder = tempfile::tempdir().unwrap();
    let log = embedded(&folder.path().join("log")).await;
    let (tiles, keys) = (folder.path().join("tlog"), keys());
    let notary = Working::start(&log, &tiles, &keys).await;
    assert_eq!(notary.tree.head().unwrap().head.size, 0);
    append(&*log, 0..300).await;
    notary.signed(300).await;
    let head = notary.tree.head().unwrap();
    let opened = Checkpoint::open(&head.note, ORIGIN, keys.verifiers()).unwrap();
    assert_eq!(opened.head, head.head);
    assert_eq!(notary.tree.condition(), TreeCondition::Sound);

    // What others see through the folder, and through the notary, is the same.
    let other = Arc::new(FolderTree::new(&tiles));
    assert_eq!(other.head().unwrap().note, head.note);
    until(|| other.condition() == TreeCondition::Sound).await;
    let published = Published(other);
    let reader = TreeReader::new(&published, 300);
    for position in [1, 256, 257, 300] {
        let event = log.get(Position(position)).await.unwrap().unwrap();
        assert_eq!(reader.entry(position - 1).await.unwrap(), event.bytes);
        let proof = reader.inclusion(position - 1).await.unwrap();
        let leaf = leaf_hash(&event.bytes);
        verify_inclusion(&leaf, position - 1, &head.head, &proof).unwrap();
        let file = reader
            .proof_file(position - 1, head.note.clone())
            .await
            .unwrap();
        file.verify(&event.bytes, ORIGIN, keys.verifiers()).unwrap();
    }
    notary.stop().await;
}

#[tokio::test]
async fn nothing_is_signed_when_nothing_is_new_and_a_restart_goes_on() {
    let folder = tempfile::tempdir().unwrap();
    let log = embedded(&folder.path().join("log")).await;
    let (tiles, keys) = (folder.path().join("tlog"), keys());
    let notary = Working::start(&log, &tiles, &keys).await;
    append(&*log, 0..10).await;
    notary.signed(10).await;
    notary.stop().await;
    let heads = || {
        std::fs::read_dir(tiles.join("notary/heads"))
            .unwrap()
            .count()
    };
    let (before, note) = (heads(), std::fs::read(tiles.join("checkpoint")).unwrap());

    let notary = Working::start(&log, &tiles, &keys).await;
    until(|| notary.tree.condition() == TreeCondition::Sound).await;
    assert_eq!(notary.tree.head().unwrap().note, note);
    assert_eq!(heads(), before);
    append(&*log, 10..600).await;
    notary.signed(600).await;
    notary.stop().await;
}

#[tokio::test]
async fn two_notaries_at_once_make_one_tree() {
    let folder = tempfile::tempdir().unwrap();
    let log = embedded(&folder.path().join("log")).await;
    let (tiles, keys) = (folder.path().join("tlog"), keys());
    let one = Working::start(&log, &tiles, &keys).await;
    let two = Working::start(&log, &tiles, &keys).await;
    for round in 0..20 {
        append(&*log, round * 50..round * 50 + 50).await;
        one.signed(round * 50 + 1).await;
    }
    let folder = FolderTree::new(&tiles);
    until(|| folder.head().is_some_and(|h| h.head.size == 1000)).await;
    for notary in [one, two] {
        notary.signed(1000).await;
        assert_eq!(notary.tree.condition(), TreeCondition::Sound);
        notary.stop().await;
    }
    // And a third finds all of it in order.
    Working::start(&log, &tiles, &keys).await.stop().await;
}

#[tokio::test]
async fn another_log_is_a_breach_that_everybody_sees_and_that_stops_appends() {
    let folder = tempfile::tempdir().unwrap();
    let log = embedded(&folder.path().join("log")).await;
    let (tiles, keys) = (folder.path().join("tlog"), keys());
    let notary = Working::start(&log, &tiles, &keys).await;
    append(&*log, 0..10).await;
    notary.signed(10).await;
    notary.stop().await;

    let other = embedded(&folder.path().join("other")).await;
    append(&*other, 0..10).await;
    let notary = Working::start(&other, &tiles, &keys).await;
    let (seen_here, seen_there) = (notary.tree.clone(), FolderTree::new(&tiles));
    assert_eq!(notary.breach().await.code, "log_replaced");
    for tree in [seen_here, Arc::new(seen_there)] {
        assert!(matches!(tree.condition(), TreeCondition::Broken(b) if b.code == "log_replaced"));
        let guarded = GuardedLog::new(other.clone(), tree);
        match guarded.append(an_event(11)).await {
            Err(AppendError::Stopped(why)) => assert!(why.contains("log_replaced"), "{why}"),
            appended => panic!("{appended:?}"),
        }
    }
    assert_eq!(other.head().await.unwrap(), Position(10));
}
