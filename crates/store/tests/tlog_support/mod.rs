//! What the tests of the transparency log have in common.

#![allow(clippy::unwrap_used, dead_code, unreachable_pub)]

use std::fs::OpenOptions;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use daybook_events::EventLog;
use daybook_events::log::{Append, Expected};
use daybook_events::names::{BuildId, EventId, ProjectName};
use daybook_events::subject::Subject;
use daybook_events::tree::{Breach, PublishedTree};
use daybook_store::embedded::{EmbeddedConfig, EmbeddedLog};
use daybook_store::tlog::{
    FolderStorage, KeyRing, Notary, NotaryError, NotaryOptions, SignerKey, TileStorage,
};
use tokio_util::sync::{CancellationToken, DropGuard};
use uuid::Uuid;

pub const PATIENCE: Duration = Duration::from_secs(60);
pub const ORIGIN: &str = "daybook.example.com/tlog";

/// The event of a number: a whole envelope, so that it can be told from its bytes where it belongs.
pub fn an_event(number: u64) -> Append {
    let id = Uuid::from_u128(u128::from(number) << 64 | 7);
    let build = BuildId(id);
    let bytes = serde_json::json!({
        "specversion": "1.0",
        "id": id,
        "source": "/projects/shop",
        "type": "dev.daybook.build.noted.v1",
        "subject": format!("shop/_/build/{build}"),
        "time": "2026-01-02T03:04:05Z",
        "recordedtime": "2026-01-02T03:04:05Z",
        "datacontenttype": "application/json",
        "revision": 1,
        "correlationid": id,
        "authtype": "system",
        "authid": "test",
        "data": { "number": number },
    });
    Append {
        subject: Subject::Build(ProjectName::parse("shop").unwrap(), build),
        id: EventId(id),
        expected: Expected::Any,
        bytes: bytes.to_string().into(),
    }
}

pub async fn append(log: &dyn EventLog, numbers: std::ops::Range<u64>) {
    // One after the other: only then the order is sure.
    for number in numbers {
        log.append(an_event(number)).await.unwrap();
    }
}

pub async fn embedded(dir: &Path) -> Arc<dyn EventLog> {
    let log = EmbeddedLog::open(dir, EmbeddedConfig::default()).await;
    Arc::new(log.unwrap())
}

/// A log that need not survive anything.
pub async fn unsynced(dir: &Path) -> Arc<dyn EventLog> {
    let config = EmbeddedConfig {
        sync: false,
        ..EmbeddedConfig::default()
    };
    Arc::new(EmbeddedLog::open(dir, config).await.unwrap())
}

/// The files below a folder whose name ends so.
pub fn files(folder: &Path, ending: &str) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            found.extend(files(&path, ending));
        } else if path.to_string_lossy().ends_with(ending) {
            found.push(path);
        }
    }
    found
}

/// Changes one bit of a file.
pub fn flip(file: &Path, offset: u64) {
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .open(file)
        .unwrap();
    let mut byte = [0];
    file.read_exact_at(&mut byte, offset).unwrap();
    file.write_all_at(&[byte[0] ^ 1], offset).unwrap();
}

pub fn options() -> NotaryOptions {
    NotaryOptions {
        max_delay: Duration::from_millis(20),
        check_every: Duration::from_millis(50),
        settle: Duration::from_millis(200),
        sweep_rate: 1_000_000,
        ..NotaryOptions::default()
    }
}

pub fn keys() -> KeyRing {
    KeyRing::of(SignerKey::generate(ORIGIN).unwrap())
}

/// A notary at work. Dropping it cancels it.
pub struct Working {
    pub tree: Arc<dyn PublishedTree>,
    ended: tokio::task::JoinHandle<Result<(), NotaryError>>,
    cancel: DropGuard,
}

impl Working {
    pub async fn start(log: &Arc<dyn EventLog>, folder: &Path, keys: &KeyRing) -> Self {
        Self::start_with(log, folder, keys, options()).await
    }

    pub async fn start_with(
        log: &Arc<dyn EventLog>,
        folder: &Path,
        keys: &KeyRing,
        options: NotaryOptions,
    ) -> Self {
        let storage = Arc::new(FolderStorage::new(folder));
        Self::start_in(log, storage, keys, options).await
    }

    pub async fn start_in(
        log: &Arc<dyn EventLog>,
        storage: Arc<dyn TileStorage>,
        keys: &KeyRing,
        options: NotaryOptions,
    ) -> Self {
        let notary = Notary::open(log.clone(), storage, keys.clone(), options);
        let notary = notary.await.unwrap();
        let cancel = CancellationToken::new();
        Self {
            tree: notary.tree(),
            ended: tokio::spawn(notary.run(cancel.clone())),
            cancel: cancel.drop_guard(),
        }
    }

    pub async fn signed(&self, size: u64) {
        until(|| self.tree.head().is_some_and(|h| h.head.size >= size)).await;
    }

    pub async fn stop(self) {
        drop(self.cancel);
        self.ended.await.unwrap().unwrap();
    }

    pub async fn breach(self) -> Breach {
        let ended = tokio::time::timeout(PATIENCE, self.ended).await;
        match ended.expect("it ends").unwrap() {
            Err(NotaryError::Breach(breach)) => breach,
            other => panic!("{other:?}"),
        }
    }
}

pub async fn until(mut condition: impl FnMut() -> bool) {
    let waited = tokio::time::timeout(PATIENCE, async {
        while !condition() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    });
    waited.await.expect("it happens in time");
}
