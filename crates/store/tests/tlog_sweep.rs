//! The comparison of old events in the background: it comes to all of them, whatever goes wrong
//! meanwhile, and to every tile.

#![allow(clippy::unwrap_used)]

use std::io;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use daybook_events::EventLog;
use daybook_events::log::{
    Append, AppendError, Appended, Consumer, ConsumerConfig, EventStream, LogInfo, Position,
    ReadError, Recorded,
};
use daybook_events::subject::{Subject, SubjectFilter};
use daybook_events::tree::TreeCondition;
use daybook_store::tlog::{FolderStorage, NotaryOptions, ReadTiles, StorageError, TileStorage};
use futures_util::future::join_all;
use futures_util::stream;

mod tlog_support;

use tlog_support::{Working, an_event, append, files, flip, keys, options, unsynced, until};

/// Appends to an embedded log, which gives positions in the order in which it was called.
async fn append_at_once(log: &dyn EventLog, upto: u64) {
    for first in (0..upto).step_by(512) {
        let numbers = first..upto.min(first + 512);
        for appended in join_all(numbers.map(|number| log.append(an_event(number)))).await {
            appended.unwrap();
        }
    }
}

/// Changes one event of an embedded log.
fn change(log: &Path, number: u64) {
    let segment = files(log, ".seg").pop().unwrap();
    let bytes = std::fs::read(&segment).unwrap();
    let wanted = format!("\"number\":{number}}}");
    let found = bytes
        .windows(wanted.len())
        .position(|w| w == wanted.as_bytes());
    flip(&segment, found.unwrap() as u64);
}

/// A log whose tail breaks off again and again, as over a connection that does not hold.
#[derive(Debug)]
struct BreakingOff(Arc<dyn EventLog>);

#[async_trait]
impl EventLog for BreakingOff {
    async fn append(&self, append: Append) -> Result<Appended, AppendError> {
        self.0.append(append).await
    }

    async fn head(&self) -> Result<Position, ReadError> {
        self.0.head().await
    }

    async fn get(&self, position: Position) -> Result<Option<Recorded>, ReadError> {
        self.0.get(position).await
    }

    async fn read_aggregate(&self, subject: &Subject) -> Result<Vec<Recorded>, ReadError> {
        self.0.read_aggregate(subject).await
    }

    async fn read(
        &self,
        after: Position,
        filter: &SubjectFilter,
        limit: usize,
    ) -> Result<Vec<Recorded>, ReadError> {
        self.0.read(after, filter, limit).await
    }

    async fn tail(&self, _: Position, _: SubjectFilter) -> Result<EventStream, ReadError> {
        Ok(Box::pin(stream::once(async {
            tokio::time::sleep(Duration::from_millis(50)).await;
            Err(ReadError::Unavailable("the connection broke".to_owned()))
        })))
    }

    async fn consumer(&self, config: ConsumerConfig) -> Result<Arc<dyn Consumer>, ReadError> {
        self.0.consumer(config).await
    }

    async fn info(&self) -> Result<LogInfo, ReadError> {
        self.0.info().await
    }
}

#[tokio::test]
async fn it_goes_on_where_it_was_when_signing_was_interrupted() {
    let folder = tempfile::tempdir().unwrap();
    let (tiles, keys) = (folder.path().join("tlog"), keys());
    let log = unsynced(&folder.path().join("log")).await;
    append_at_once(&*log, 8 * 256).await;
    let notary = Working::start(&log, &tiles, &keys).await;
    notary.signed(8 * 256).await;
    notary.stop().await;

    let breaking_off: Arc<dyn EventLog> = Arc::new(BreakingOff(log));
    // The tail breaks off before the second bundle is compared.
    let options = NotaryOptions {
        sweep_rate: 256 * 5,
        ..options()
    };
    let notary = Working::start_with(&breaking_off, &tiles, &keys, options).await;
    until(|| matches!(notary.tree.condition(), TreeCondition::Unknown(_))).await;
    change(&folder.path().join("log"), 1000);
    assert_eq!(notary.breach().await.code, "log_differs");
}

/// A storage on a disk that cannot read one file any more.
#[derive(Debug)]
struct Worn {
    storage: FolderStorage,
    unreadable: &'static str,
}

#[async_trait]
impl ReadTiles for Worn {
    async fn get(&self, path: &str) -> io::Result<Option<Bytes>> {
        if path == self.unreadable {
            // EIO
            return Err(io::Error::from_raw_os_error(5));
        }
        self.storage.get(path).await
    }
}

#[async_trait]
impl TileStorage for Worn {
    async fn put(&self, files: Vec<(String, Bytes)>) -> Result<(), StorageError> {
        self.storage.put(files).await
    }

    async fn create(&self, path: &str, bytes: Bytes) -> Result<bool, StorageError> {
        self.storage.create(path, bytes).await
    }

    async fn replace(&self, path: &str, bytes: Bytes) -> Result<(), StorageError> {
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
async fn what_cannot_be_read_does_not_keep_it_from_the_rest() {
    let folder = tempfile::tempdir().unwrap();
    let (tiles, keys) = (folder.path().join("tlog"), keys());
    let log = unsynced(&folder.path().join("log")).await;
    append(&*log, 0..1000).await;
    let storage = Arc::new(Worn {
        storage: FolderStorage::new(&tiles),
        unreadable: "tile/entries/000",
    });
    let notary = Working::start_in(&log, storage, &keys, options()).await;
    notary.signed(1000).await;
    until(|| notary.tree.condition() == TreeCondition::Sound).await;
    change(&folder.path().join("log"), 600);
    assert_eq!(notary.breach().await.code, "log_differs");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_flipped_bit_in_a_tile_of_a_higher_level_is_noticed() {
    let size = 256 * 256 + 300;
    let folder = tempfile::tempdir().unwrap();
    let (tiles, keys) = (folder.path().join("tlog"), keys());
    let log = unsynced(&folder.path().join("log")).await;
    append_at_once(&*log, size).await;
    let options = NotaryOptions {
        max_events: 16 * 1024,
        ..options()
    };
    let notary = Working::start_with(&log, &tiles, &keys, options).await;
    notary.signed(size).await;
    until(|| notary.tree.condition() == TreeCondition::Sound).await;
    flip(&tiles.join("tile/2/000.p/1"), 17);
    let breach = notary.breach().await;
    assert_eq!(breach.code, "tree_damaged", "{breach:?}");
    assert!(breach.message.contains("tile/1"), "{breach:?}");
}
