//! The embedded backend passes the suite.

#![allow(clippy::unwrap_used)]

use std::path::{Path, PathBuf};
use std::sync::Arc;

use async_trait::async_trait;
use daybook_events::EventLog;
use daybook_events::lines::LineLog;
use daybook_store::embedded::{EmbeddedConfig, EmbeddedLines, EmbeddedLog, LineRetention};
use tempfile::TempDir;
use tokio::sync::Mutex;

#[macro_use]
mod conformance;

use conformance::{Abilities, Backend};

struct Embedded {
    dir: TempDir,
    open: Mutex<Open>,
}

struct Open {
    folder: PathBuf,
    log: Arc<EmbeddedLog>,
    lines: Arc<EmbeddedLines>,
}

impl Open {
    async fn new(folder: PathBuf) -> Self {
        let log = EmbeddedLog::open(folder.join("log"), EmbeddedConfig::default());
        let lines = EmbeddedLines::open(folder.join("lines"), LineRetention::default());
        Self {
            log: Arc::new(log.await.unwrap()),
            lines: Arc::new(lines.await.unwrap()),
            folder,
        }
    }
}

fn copy(from: &Path, to: &Path) {
    std::fs::create_dir(to).unwrap();
    for entry in std::fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        let target = to.join(entry.file_name());
        if entry.file_type().unwrap().is_dir() {
            copy(&entry.path(), &target);
        } else {
            std::fs::copy(entry.path(), target).unwrap();
        }
    }
}

#[async_trait]
impl Backend for Embedded {
    async fn log(&self) -> Arc<dyn EventLog> {
        self.open.lock().await.log.clone()
    }

    async fn lines(&self) -> Arc<dyn LineLog> {
        self.open.lock().await.lines.clone()
    }

    fn abilities(&self) -> Abilities {
        Abilities {
            handles_survive: false,
            pauses: false,
            may_accept_twice: false,
        }
    }

    async fn restart(&self) {
        let mut open = self.open.lock().await;
        let folder = open.folder.clone();
        // Moved away first, so that the old one is gone before the new one opens.
        let nowhere = Open::new(self.dir.path().join("nowhere")).await;
        drop(std::mem::replace(&mut *open, nowhere));
        let nowhere = std::mem::replace(&mut *open, Open::new(folder).await);
        let unused = nowhere.folder.clone();
        drop(nowhere);
        std::fs::remove_dir_all(unused).unwrap();
    }

    /// What the files hold while the log is open is what the death of the process leaves.
    async fn crash(&self) {
        let mut open = self.open.lock().await;
        let left = open.folder.with_extension("left");
        copy(&open.folder, &left);
        *open = Open::new(left).await;
    }
}

async fn embedded() -> Vec<Embedded> {
    let dir = tempfile::tempdir().unwrap();
    let open = Mutex::new(Open::new(dir.path().join("data")).await);
    vec![Embedded { dir, open }]
}

conformance_suite!(embedded);
