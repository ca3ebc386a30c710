//! The notary is cut off at every step, killed for real, and refused by its disk: what it leaves is
//! something from which the next start goes on, and nothing that was published is ever taken back.

#![allow(clippy::unwrap_used)]

use std::io;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use async_trait::async_trait;
use bytes::Bytes;
use daybook_events::EventLog;
use daybook_events::log::Position;
use daybook_events::tree::{PublishedTree, TreeCondition, TreeHead};
use daybook_store::tlog::{
    Checkpoint, FolderStorage, FolderTree, Growth, KeyRing, Notary, ReadTiles, StorageError,
    TileStorage, TreeReader, clear_breach, repair, verify_consistency,
};
use daybook_testkit::left_out;
use futures_util::{StreamExt, stream};
use tokio_util::sync::CancellationToken;

mod tlog_support;

use tlog_support::{ORIGIN, PATIENCE, Working, append, embedded, keys, options, unsynced, until};

/// A storage whose process dies: at one step, before or after it was done, and from then on nothing
/// works any more.
#[derive(Debug)]
struct Mortal {
    storage: FolderStorage,
    /// Steps that are still done.
    left: AtomicUsize,
    /// Whether the last step is done without the notary being told.
    last_is_done: bool,
}

impl Mortal {
    fn is_dead(&self) -> bool {
        self.left.load(Ordering::SeqCst) == 0
    }

    async fn step<T>(
        &self,
        work: impl Future<Output = Result<T, StorageError>>,
    ) -> Result<T, StorageError> {
        let died = || StorageError::Io {
            action: "dying",
            path: PathBuf::new(),
            source: io::Error::other("the process died"),
        };
        let take = |left: usize| left.checked_sub(1);
        let Ok(before) = self
            .left
            .fetch_update(Ordering::SeqCst, Ordering::SeqCst, take)
        else {
            return Err(died());
        };
        if before > 1 {
            return work.await;
        }
        if self.last_is_done {
            work.await?;
        }
        Err(died())
    }
}

#[async_trait]
impl ReadTiles for Mortal {
    async fn get(&self, path: &str) -> io::Result<Option<Bytes>> {
        self.storage.get(path).await
    }
}

#[async_trait]
impl TileStorage for Mortal {
    async fn put(&self, files: Vec<(String, Bytes)>) -> Result<(), StorageError> {
        for file in files {
            self.step(self.storage.put(vec![file])).await?;
        }
        Ok(())
    }

    async fn create(&self, path: &str, bytes: Bytes) -> Result<bool, StorageError> {
        self.step(self.storage.create(path, bytes)).await
    }

    async fn replace(&self, path: &str, bytes: Bytes) -> Result<(), StorageError> {
        self.step(self.storage.replace(path, bytes)).await
    }

    async fn list(&self, folder: &str) -> Result<Vec<String>, StorageError> {
        self.storage.list(folder).await
    }

    async fn remove(&self, paths: Vec<String>) -> Result<(), StorageError> {
        for path in paths {
            self.step(self.storage.remove(vec![path])).await?;
        }
        Ok(())
    }

    async fn tidy(&self) -> Result<(), StorageError> {
        self.storage.tidy().await
    }
}

/// The tree that a log should have.
async fn expected(log: &dyn EventLog, size: u64) -> TreeHead {
    let mut growth = Growth::empty();
    let all = daybook_events::SubjectFilter::default();
    for event in log.read(Position::ZERO, &all, size as usize).await.unwrap() {
        growth.push(event.bytes).unwrap();
    }
    growth.head()
}

/// What is published, if anything is.
fn published(tiles: &Path, keys: &KeyRing) -> Option<TreeHead> {
    let note = std::fs::read(tiles.join("checkpoint")).ok()?;
    Some(
        Checkpoint::open(&note, ORIGIN, keys.verifiers())
            .unwrap()
            .head,
    )
}

/// The tree goes on from what is there, up to the end of the log, and extends what was published.
async fn goes_on(log: &Arc<dyn EventLog>, tiles: &Path, keys: &KeyRing) {
    let before = published(tiles, keys);
    let notary = Working::start(log, tiles, keys).await;
    let size = log.head().await.unwrap().0;
    notary.signed(size).await;
    notary.stop().await;
    let after = published(tiles, keys).unwrap();
    assert_eq!(after, expected(&**log, size).await);
    let storage = FolderStorage::new(tiles);
    let reader = TreeReader::new(&storage, size);
    assert_eq!(reader.head().await.unwrap(), after);
    if let Some(before) = before {
        let proof = reader.consistency(before.size).await.unwrap();
        verify_consistency(&before, &after, &proof).unwrap();
    }
}

/// Signs three times, over the edge of a tile, with a storage that dies after so many steps. Says
/// whether it died.
async fn sign_and_die(log: &Arc<dyn EventLog>, storage: Arc<Mortal>, keys: &KeyRing) -> bool {
    let notary = Notary::open(log.clone(), storage.clone(), keys.clone(), options());
    let notary = notary.await.unwrap();
    let (tree, cancel) = (notary.tree(), CancellationToken::new());
    let running = tokio::spawn(notary.run(cancel.clone()));
    for (from, upto) in [(0, 3), (3, 258), (258, 300)] {
        append(&**log, from..upto).await;
        until(|| storage.is_dead() || tree.head().is_some_and(|h| h.head.size >= upto)).await;
    }
    // It also dies while it tidies up after the last one.
    let heard = tokio::time::timeout(Duration::from_millis(100), async {
        while !storage.is_dead() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    });
    let died = heard.await.is_ok();
    assert!(!matches!(tree.condition(), TreeCondition::Broken(_)));
    cancel.cancel();
    let _ = running.await.unwrap();
    died
}

/// A repair dies at each of its steps, before or after it was done: the next one does the rest.
#[tokio::test]
async fn a_repair_that_is_cut_off_goes_on() {
    let mut finished = 0;
    for (steps, last_is_done) in (1..=5).flat_map(|steps| [(steps, false), (steps, true)]) {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        let (tiles, keys) = (at("tlog"), keys());
        let log = unsynced(&at("log")).await;
        append(&*log, 0..10).await;
        let notary = Working::start(&log, &tiles, &keys).await;
        notary.signed(10).await;
        notary.stop().await;
        let lost = log.info().await.unwrap().identity;
        let log = unsynced(&at("empty")).await;
        let breach = Working::start(&log, &tiles, &keys).await.breach().await;

        let target = unsynced(&at("new")).await;
        let storage = Mortal {
            storage: FolderStorage::new(&tiles),
            left: AtomicUsize::new(steps),
            last_is_done,
        };
        let mut is_cleared = false;
        if repair(&storage, &keys, &*target).await.is_ok() {
            // What says what was done is there by now.
            append(&*target, 10..11).await;
            is_cleared = clear_breach(&storage).await.is_ok();
        }
        finished += u32::from(is_cleared);
        if !is_cleared {
            let done = repair(&storage.storage, &keys, &*target).await.unwrap();
            assert_eq!((done.restored, done.head.size), (0, 10));
            assert_eq!(done.replaces, Some(lost));
            // It may have been the very last step that was done, and nobody was told.
            if done.breach.is_some() {
                assert_eq!(done.breach, Some(breach.clone()));
                let tree = FolderTree::new(&tiles);
                assert_eq!(tree.condition(), TreeCondition::Broken(breach));
            }
            clear_breach(&storage.storage).await.unwrap();
        }
        goes_on(&target, &tiles, &keys).await;
    }
    // Three steps are to be done: it is bound to the new log, and a doubt and the breach are removed.
    assert_eq!(finished, 4);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whatever_step_is_the_last_one_the_next_start_goes_on() {
    // Three rounds and the preparations take fewer steps than that, heartbeats apart.
    let cases = (1..=48).flat_map(|steps| [(steps, false), (steps, true)]);
    stream::iter(cases)
        .for_each_concurrent(12, |(steps, last_is_done)| async move {
            let folder = tempfile::tempdir().unwrap();
            let log = unsynced(&folder.path().join("log")).await;
            let (tiles, keys) = (folder.path().join("tlog"), keys());
            let storage = Arc::new(Mortal {
                storage: FolderStorage::new(&tiles),
                left: AtomicUsize::new(steps),
                last_is_done,
            });
            let died = sign_and_die(&log, storage, &keys).await;
            assert!(died || steps > 20, "{steps} steps were not reached");
            goes_on(&log, &tiles, &keys).await;
        })
        .await;
}

const FOLDER: &str = "DAYBOOK_TEST_TLOG";

/// The process that is killed: appends and signs until then.
#[test]
fn child() {
    let Some(folder) = std::env::var_os(FOLDER).map(PathBuf::from) else {
        return;
    };
    let runtime = tokio::runtime::Runtime::new().unwrap();
    runtime.block_on(async {
        let keys = KeyRing::open(&folder.join("keys")).unwrap();
        let log = embedded(&folder.join("log")).await;
        let notary = Working::start(&log, &folder.join("tlog"), &keys).await;
        loop {
            let next = log.head().await.unwrap().0;
            append(&*log, next..next + 20).await;
            assert!(!matches!(notary.tree.condition(), TreeCondition::Broken(_)));
        }
    });
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_killed_notary_leaves_a_tree_that_goes_on() {
    let folder = tempfile::tempdir().unwrap();
    let keys = KeyRing::generate(&folder.path().join("keys"), ORIGIN).unwrap();
    let tiles = folder.path().join("tlog");
    let tree = FolderTree::new(&tiles);
    let mut size = 0;
    for round in 0_u64..12 {
        let mut process = Command::new(std::env::current_exe().unwrap())
            .args(["child", "--exact", "--nocapture"])
            .env(FOLDER, folder.path())
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        let began = Instant::now();
        while tree.head().is_none_or(|head| head.head.size < size + 40) {
            assert!(began.elapsed() < PATIENCE && process.try_wait().unwrap().is_none());
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        // At another moment of its round each time.
        tokio::time::sleep(Duration::from_millis(round * 7)).await;
        process.kill().unwrap();
        process.wait().unwrap();
        let log = embedded(&folder.path().join("log")).await;
        goes_on(&log, &tiles, &keys).await;
        size = published(&tiles, &keys).unwrap().size;
    }
    assert!(size > 400, "{size}");
}

/// A file system of its own, unmounted when dropped.
struct Mounted(PathBuf);

impl Mounted {
    fn tmpfs(at: &Path, size: &str) -> Option<Self> {
        std::fs::create_dir_all(at).unwrap();
        let mounted = Command::new("mount")
            .args(["-t", "tmpfs", "-o", &format!("size={size}"), "tmpfs"])
            .arg(at)
            .output();
        mounted
            .is_ok_and(|m| m.status.success())
            .then(|| Self(at.to_owned()))
    }

    fn remount(&self, options: &str) {
        let options = format!("remount,{options}");
        let done = Command::new("mount")
            .args(["-o", &options])
            .arg(&self.0)
            .status();
        assert!(done.unwrap().success());
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(&self.0).status();
    }
}

/// Full, and later read-only: nothing is signed, it is said why, events are still taken, and when the
/// disk takes files again, it goes on.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_disk_that_is_full_or_read_only_is_waited_for() {
    let folder = tempfile::tempdir().unwrap();
    let (tiles, keys) = (folder.path().join("tlog"), keys());
    let Some(disk) = Mounted::tmpfs(&tiles, "300k") else {
        left_out("a small file system has to be mounted, as root");
        return;
    };
    let log = embedded(&folder.path().join("log")).await;
    let notary = Working::start(&log, &tiles, &keys).await;
    let mut size = 0;
    while !matches!(notary.tree.condition(), TreeCondition::Unknown(_)) {
        append(&*log, size..size + 50).await;
        size += 50;
        assert!(size < 50_000, "it never gets full");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let TreeCondition::Unknown(why) = notary.tree.condition() else {
        panic!("it went on without space");
    };
    assert!(why.contains("No space left"), "{why}");
    disk.remount("size=20m");
    notary.signed(size).await;
    until(|| notary.tree.condition() == TreeCondition::Sound).await;

    disk.remount("ro");
    append(&*log, size..size + 1).await;
    until(|| matches!(notary.tree.condition(), TreeCondition::Unknown(_))).await;
    disk.remount("rw");
    notary.signed(size + 1).await;
    notary.stop().await;
    goes_on(&log, &tiles, &keys).await;
    drop(disk);
}

/// What a power cut may leave: files without a name, and tiles that nobody signed.
#[tokio::test]
async fn leftovers_do_not_matter() {
    let folder = tempfile::tempdir().unwrap();
    let log = embedded(&folder.path().join("log")).await;
    let (tiles, keys) = (folder.path().join("tlog"), keys());
    let notary = Working::start(&log, &tiles, &keys).await;
    append(&*log, 0..10).await;
    notary.signed(10).await;
    notary.stop().await;
    std::fs::write(tiles.join("notary/unfinished/1-2-3"), b"half").unwrap();
    append(&*log, 10..20).await;
    let storage = FolderStorage::new(&tiles);
    let mut growth = Growth::load(&TreeReader::new(&storage, 10)).await.unwrap();
    for position in 11..=15 {
        let event = log.get(Position(position)).await.unwrap().unwrap();
        growth.push(event.bytes).unwrap();
    }
    let files = growth.files().unwrap().into_iter();
    let files = files.map(|(path, bytes)| (path.to_string(), bytes));
    storage.put(files.collect()).await.unwrap();
    // Nobody is served what is not signed.
    let tree = FolderTree::new(&tiles);
    assert!(tiles.join("tile/0/000.p/15").exists());
    assert_eq!(tree.resource("tile/0/000.p/15").await.unwrap(), None);
    assert!(tree.resource("tile/0/000.p/10").await.unwrap().is_some());
    assert_eq!(tree.resource("notary/heads").await.unwrap(), None);
    assert_eq!(tree.resource("../log/lock").await.unwrap(), None);
    goes_on(&log, &tiles, &keys).await;
}
