//! What Daybook publishes is judged by programs of others.

#![allow(clippy::unwrap_used)]

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use base64::Engine;
use base64::engine::general_purpose::STANDARD as BASE64;
use daybook_events::EventLog;
use daybook_events::testing::fleet::choices;
use daybook_store::embedded::{EmbeddedConfig, EmbeddedLog};
use daybook_store::tlog::{FolderStorage, KeyRing, SignedNote, TreeReader};
use daybook_testkit::judge::{TlogJudge, Verdict};
use daybook_testkit::left_out;
use tempfile::TempDir;

mod tlog_support;

use tlog_support::{ORIGIN, Working, an_event, keys};

fn judge(keys: &KeyRing) -> Option<TlogJudge> {
    let found = TlogJudge::find(ORIGIN, &keys.verifiers()[0].to_string());
    if found.is_none() {
        left_out("tlog-judge is not there; `cargo xtask tools judge` builds it");
    }
    found
}

/// A log that need not survive anything, and a notary over it.
async fn ledger(folder: &TempDir, keys: &KeyRing) -> (Arc<dyn EventLog>, Working) {
    let config = EmbeddedConfig {
        sync: false,
        ..EmbeddedConfig::default()
    };
    let log = EmbeddedLog::open(folder.path().join("log"), config).await;
    let log: Arc<dyn EventLog> = Arc::new(log.unwrap());
    let notary = Working::start(&log, &folder.path().join("tlog"), keys).await;
    (log, notary)
}

async fn grow(log: &dyn EventLog, notary: &Working, size: u64) {
    let from = log.head().await.unwrap().0;
    // The order does not matter here.
    for start in (from..size).step_by(1000) {
        let events = (start..size.min(start + 1000)).map(|n| log.append(an_event(n)));
        for appended in futures_util::future::join_all(events).await {
            appended.unwrap();
        }
    }
    notary.signed(size).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn honest_logs_pass_at_every_size_at_which_something_changes() {
    let (folder, keys) = (tempfile::tempdir().unwrap(), keys());
    let Some(judge) = judge(&keys) else { return };
    let tiles = folder.path().join("tlog");
    let file = |name: &str| folder.path().join(name);
    let storage = FolderStorage::new(&tiles);
    let (log, notary) = ledger(&folder, &keys).await;
    let mut before: Option<u64> = None;
    for size in [0, 1, 255, 256, 257, 65_536, 65_537] {
        grow(&*log, &notary, size).await;
        let said = judge.log(tiles.to_str().unwrap());
        assert_eq!(said, Ok(format!("a log of {size} entries")));
        let note = std::fs::read(tiles.join("checkpoint")).unwrap();
        std::fs::write(file(&format!("checkpoint-{size}")), &note).unwrap();
        if [257, 65_537].contains(&size) {
            // The notary would stop if it saw what becomes of its folder.
            let copy = file(&format!("copy-{size}"));
            let copied = Command::new("cp").arg("-a").arg(&tiles).arg(&copy).status();
            assert!(copied.unwrap().success());
            no_draw_goes_unnoticed(&judge, &copy, size);
        }
        let reader = TreeReader::new(&storage, size);
        for index in [0, size / 2, size.saturating_sub(1)] {
            if size == 0 {
                break;
            }
            let proof = reader.proof_file(index, note.clone().into()).await.unwrap();
            std::fs::write(file("proof"), proof.to_string()).unwrap();
            std::fs::write(file("entry"), reader.entry(index).await.unwrap()).unwrap();
            let said = judge.inclusion(&file("proof"), &file("entry"));
            assert_eq!(said, Ok(format!("entry {index} of {size}")));
            let inclusion = || judge.inclusion(&file("proof"), &file("entry"));
            no_byte_of_it_can_be_changed(&file("proof"), &inclusion);
            no_byte_of_it_can_be_changed(&file("entry"), &inclusion);
        }
        if let Some(old) = before.filter(|old| *old > 0) {
            let proof = reader.consistency(old).await.unwrap();
            let proof: String = proof.iter().map(|h| BASE64.encode(h) + "\n").collect();
            std::fs::write(file("consistency"), &proof).unwrap();
            let checkpoint = |size| file(&format!("checkpoint-{size}"));
            let said = judge.consistency(&checkpoint(old), &checkpoint(size), &file("consistency"));
            assert_eq!(said, Ok(format!("{size} entries extend {old}")));
            no_byte_of_it_can_be_changed(&file("consistency"), &|| {
                judge.consistency(&checkpoint(old), &checkpoint(size), &file("consistency"))
            });
        }
        before = Some(size);
    }
    notary.stop().await;
}

fn flip(file: &Path, offset: usize) {
    change(file, offset, 1);
}

fn change(file: &Path, offset: usize, mask: u8) {
    let mut bytes = std::fs::read(file).unwrap();
    bytes[offset] ^= mask;
    std::fs::write(file, bytes).unwrap();
}

/// In text, changes letters by more than the bits of base64 that mean nothing, and line ends to
/// something else than white space.
const IN_TEXT: u8 = 0x20;

/// Some bytes all over a proof or an entry.
fn no_byte_of_it_can_be_changed(file: &Path, judged: &dyn Fn() -> Verdict) {
    let len = std::fs::read(file).unwrap().len();
    for offset in (0..len).step_by(len.div_ceil(24).max(1)) {
        change(file, offset, IN_TEXT);
        let said = judged();
        let name = file.display();
        assert!(said.is_err(), "{name} at {offset} of {len}: {said:?}");
        change(file, offset, IN_TEXT);
    }
    assert!(judged().is_ok());
}

/// All files of a published tree.
fn published(folder: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut folders = vec![folder.join("tile")];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
            } else {
                found.push(path);
            }
        }
    }
    found.sort();
    found.push(folder.join("checkpoint"));
    found
}

/// Draws places in a log: in every file of a small one, in some of a large one.
fn no_draw_goes_unnoticed(judge: &TlogJudge, folder: &Path, size: u64) {
    let seed = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
    let seed = seed.as_nanos() as u64;
    let mut choose = choices(seed);
    let files = published(folder);
    let drawn: Vec<&PathBuf> = match size {
        257 => files.iter().cycle().take(4 * files.len()).collect(),
        _ => {
            let count = u32::try_from(files.len()).unwrap();
            (0..24).map(|_| &files[choose(count) as usize]).collect()
        }
    };
    for file in drawn {
        let len = std::fs::read(file).unwrap().len();
        let offset = choose(u32::try_from(len).unwrap()) as usize;
        let mask = match file.ends_with("checkpoint") {
            true => IN_TEXT,
            false => 1 << choose(8),
        };
        change(file, offset, mask);
        let said = judge.log(folder.to_str().unwrap());
        let name = file.display();
        assert!(
            said.is_err(),
            "{name} at {offset}, drawn with {seed}: {said:?}"
        );
        change(file, offset, mask);
    }
    let said = judge.log(folder.to_str().unwrap());
    assert_eq!(said, Ok(format!("a log of {size} entries")));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_changed_byte_anywhere_is_found() {
    let (folder, keys) = (tempfile::tempdir().unwrap(), keys());
    let Some(judge) = judge(&keys) else { return };
    let (log, notary) = ledger(&folder, &keys).await;
    grow(&*log, &notary, 600).await;
    notary.stop().await;
    let tiles = folder.path().join("tlog");
    let at = tiles.to_str().unwrap();
    assert_eq!(judge.log(at), Ok("a log of 600 entries".to_owned()));
    for name in [
        "checkpoint",
        "tile/0/000",
        "tile/0/002.p/88",
        "tile/1/000.p/2",
        "tile/entries/000",
        "tile/entries/001",
        "tile/entries/002.p/88",
    ] {
        let file = tiles.join(name);
        let len = std::fs::read(&file).unwrap().len();
        // The length of an entry, its bytes, and the last byte.
        for offset in [0, 1, 2, len / 2, len - 1] {
            flip(&file, offset);
            let said = judge.log(at);
            assert!(said.is_err(), "{name} at {offset}: {said:?}");
            flip(&file, offset);
        }
    }
    assert!(judge.log(at).is_ok());
    // And with another key, or for another log.
    let other = tlog_support::keys();
    let stranger = TlogJudge::find(ORIGIN, &other.verifiers()[0].to_string()).unwrap();
    assert!(stranger.log(at).is_err());
}

/// While keys are rotated, those who have the old key and those who have the new one both believe.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn both_keys_of_a_rotation_are_believed() {
    let folder = tempfile::tempdir().unwrap();
    let key_folder = folder.path().join("keys");
    let first = KeyRing::generate(&key_folder, ORIGIN).unwrap();
    let (log, notary) = ledger(&folder, &first).await;
    grow(&*log, &notary, 5).await;
    notary.stop().await;
    let both = KeyRing::rotate(&key_folder).unwrap();
    // Without anything new, the newest head is signed with the new key as well.
    let notary = Working::start(&log, &folder.path().join("tlog"), &both).await;
    let note = SignedNote::parse(&notary.tree.head().unwrap().note).unwrap();
    assert_eq!(note.verify(both.verifiers()).unwrap().len(), 2);
    let tiles = folder.path().join("tlog");
    for key in both.verifiers() {
        let Some(judge) = TlogJudge::find(ORIGIN, &key.to_string()) else {
            judge(&both);
            return;
        };
        let said = judge.log(tiles.to_str().unwrap());
        assert_eq!(said, Ok("a log of 5 entries".to_owned()));
    }
    notary.stop().await;
    let second = KeyRing::retire(&key_folder).unwrap();
    let notary = Working::start(&log, &tiles, &second).await;
    grow(&*log, &notary, 6).await;
    let note = SignedNote::parse(&notary.tree.head().unwrap().note).unwrap();
    assert_eq!(
        note.verify(both.verifiers()).unwrap(),
        [&both.verifiers()[1]]
    );
    notary.stop().await;
}
