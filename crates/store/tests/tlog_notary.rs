//! The notary over a real log: what it publishes, how it goes on after a restart, and what it says
//! of a log that is not what was signed.

#![allow(clippy::unwrap_used)]

use std::sync::Arc;

use daybook_events::EventLog;
use daybook_events::log::{AppendError, Position};
use daybook_events::tree::{PublishedTree, TreeCondition};
use daybook_store::tlog::{
    Checkpoint, FolderTree, GuardedLog, Published, TreeReader, leaf_hash, verify_inclusion,
};

mod tlog_support;

use tlog_support::{ORIGIN, Working, an_event, append, embedded, keys, until};

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
