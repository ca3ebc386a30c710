//! The notary over a real log: what it publishes, how it goes on after a restart, and what it says
//! of a log that is not what was signed.

#![allow(clippy::unwrap_used)]

use std::fs;
use std::path::PathBuf;
use std::process::Command;
use std::sync::Arc;

use daybook_events::EventLog;
use daybook_events::log::{AppendError, Position};
use daybook_events::tree::{PublishedTree, TreeCondition};
use daybook_store::tlog::{
    Checkpoint, FolderStorage, FolderTree, GuardedLog, KeyRing, Notary, NotaryError, Published,
    TreeReader, leaf_hash, verify_inclusion,
};

mod tlog_support;

use tlog_support::{ORIGIN, Working, an_event, append, embedded, keys, options, until};

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

/// A ledger whose keys are in a folder of their own.
struct Kept {
    folder: tempfile::TempDir,
    keys: KeyRing,
}

impl Kept {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let keys = KeyRing::generate(&folder.path().join("keys"), ORIGIN).unwrap();
        Self { folder, keys }
    }

    fn at(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    async fn sign(&self, log: &Arc<dyn EventLog>, tiles: &str, upto: u64) {
        let notary = Working::start(log, &self.at(tiles), &self.keys).await;
        append(&**log, log.head().await.unwrap().0..upto).await;
        notary.signed(upto).await;
        notary.stop().await;
    }

    async fn open(&self, log: &Arc<dyn EventLog>, keys: &KeyRing) -> Result<Notary, NotaryError> {
        let storage = Arc::new(FolderStorage::new(self.at("tlog")));
        Notary::open(log.clone(), storage, keys.clone(), options()).await
    }
}

#[tokio::test]
async fn a_lost_folder_of_tiles_is_not_made_anew_from_the_log() {
    let ledger = Kept::new();
    let log = embedded(&ledger.at("log")).await;
    // Nobody has an empty tree to compare with.
    Working::start(&log, &ledger.at("tlog"), &ledger.keys)
        .await
        .stop()
        .await;
    fs::remove_dir_all(ledger.at("tlog")).unwrap();
    ledger.sign(&log, "tlog", 10).await;
    fs::rename(ledger.at("tlog"), ledger.at("elsewhere")).unwrap();
    let known = KeyRing::open(&ledger.at("keys")).unwrap();
    match ledger.open(&log, &known).await {
        Err(NotaryError::TreeMissing {
            origin,
            size: 1..=10,
        }) => assert_eq!(origin, ORIGIN),
        other => panic!("{other:?}"),
    }
    // As below a file system that is not mounted.
    assert!(!ledger.at("tlog").exists());
    // A rotation does not change what was signed.
    KeyRing::rotate(&ledger.at("keys")).unwrap();
    let known = KeyRing::retire(&ledger.at("keys")).unwrap();
    let lost = ledger.open(&log, &known).await;
    assert!(
        matches!(lost, Err(NotaryError::TreeMissing { .. })),
        "{lost:?}"
    );
    fs::rename(ledger.at("elsewhere"), ledger.at("tlog")).unwrap();
    ledger.sign(&log, "tlog", 20).await;

    // What another key signs is another ledger.
    let other = KeyRing::generate(&ledger.at("other"), "daybook.example.com/second").unwrap();
    let notary = Working::start(&log, &ledger.at("new"), &other).await;
    notary.signed(20).await;
    notary.stop().await;
}

#[tokio::test]
async fn tiles_of_another_tree_of_the_same_keys_are_refused() {
    let ledger = Kept::new();
    let log = embedded(&ledger.at("log")).await;
    ledger.sign(&log, "tlog", 10).await;
    let other = embedded(&ledger.at("other")).await;
    append(&*other, 100..110).await;
    // A copy of the keys that does not know of it.
    fs::create_dir(ledger.at("copy")).unwrap();
    let copy = ledger.at("copy/notary.key");
    fs::copy(ledger.at("keys/notary.key"), copy).unwrap();
    let unaware = KeyRing::open(&ledger.at("copy")).unwrap();
    let notary = Working::start(&other, &ledger.at("forked"), &unaware).await;
    notary.signed(10).await;
    notary.stop().await;
    let breach = Working::start(&other, &ledger.at("forked"), &ledger.keys)
        .await
        .breach()
        .await;
    assert_eq!(breach.code, "tree_damaged", "{breach:?}");
    assert!(
        breach.message.contains("these keys signed another"),
        "{breach:?}"
    );
}

/// An older copy of the tiles goes on if the log has what was signed since, and not otherwise.
#[tokio::test]
async fn an_older_copy_of_the_tiles_does_not_go_another_way() {
    for changed in [false, true] {
        let ledger = Kept::new();
        let log = embedded(&ledger.at("log")).await;
        ledger.sign(&log, "tlog", 10).await;
        drop(log);
        for folder in ["tlog", "log"] {
            let to = ledger.at(&format!("older-{folder}"));
            let copied = Command::new("cp")
                .arg("-a")
                .arg(ledger.at(folder))
                .arg(to)
                .status();
            assert!(copied.unwrap().success());
        }
        let log = embedded(&ledger.at("log")).await;
        ledger.sign(&log, "tlog", 20).await;
        ledger.sign(&log, "tlog", 20).await;
        let log = match changed {
            false => log,
            true => embedded(&ledger.at("older-log")).await,
        };
        let from = if changed { 100 } else { 20 };
        append(&*log, from..from + 15).await;
        let known = KeyRing::open(&ledger.at("keys")).unwrap();
        let notary = Working::start(&log, &ledger.at("older-tlog"), &known).await;
        if changed {
            let breach = notary.breach().await;
            assert_eq!(breach.code, "tree_damaged", "{breach:?}");
        } else {
            notary.signed(35).await;
            notary.stop().await;
        }
    }
}

#[tokio::test]
async fn keys_in_a_folder_that_takes_no_files_sign_all_the_same() {
    let ledger = Kept::new();
    let log = embedded(&ledger.at("log")).await;
    // Permissions do not keep root from writing.
    fs::remove_dir_all(ledger.at("keys")).unwrap();
    ledger.sign(&log, "tlog", 10).await;
    ledger.sign(&log, "tlog", 20).await;
}

#[tokio::test]
async fn what_the_keys_signed_has_to_be_signed_by_them() {
    let ledger = Kept::new();
    let log = embedded(&ledger.at("log")).await;
    ledger.sign(&log, "tlog", 10).await;
    // Each start keeps the newest head.
    ledger.sign(&log, "tlog", 10).await;
    let kept = ledger.at("keys/notary.signed");
    let note = fs::read_to_string(&kept).unwrap();
    assert_eq!(
        note,
        fs::read_to_string(ledger.at("tlog/checkpoint")).unwrap()
    );
    fs::write(&kept, note.replace("\n10\n", "\n11\n")).unwrap();
    let opened = ledger.open(&log, &ledger.keys).await;
    assert!(
        matches!(opened, Err(NotaryError::Signed { .. })),
        "{opened:?}"
    );
    // A key that is made in the place of one that is gone has signed nothing.
    fs::remove_file(ledger.at("keys/notary.key")).unwrap();
    let new = KeyRing::generate(&ledger.at("keys"), ORIGIN).unwrap();
    fs::remove_dir_all(ledger.at("tlog")).unwrap();
    ledger.open(&log, &new).await.unwrap();
}
