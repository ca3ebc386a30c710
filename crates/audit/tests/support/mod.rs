//! Ledgers to audit: a fleet's legal history, signed, in a folder.

#![allow(dead_code, missing_docs, unreachable_pub, clippy::unwrap_used)]

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use async_trait::async_trait;
use bytes::Bytes;
use daybook_audit::{Options, Source, Verified, export, verify};
use daybook_events::testing::fleet::{Fleet, Size, choices};
use daybook_store::tlog::{Checkpoint, Growth, ReadTiles, SignerKey};
use futures_util::FutureExt;
use jiff::Timestamp;
use tempfile::TempDir;

pub const ORIGIN: &str = "daybook.example.com/tlog";

/// Files of a folder, which are there at once.
#[derive(Debug)]
pub struct Files(pub PathBuf);

#[async_trait]
impl ReadTiles for Files {
    async fn get(&self, path: &str) -> std::io::Result<Option<Bytes>> {
        match fs::read(self.0.join(path)) {
            Ok(bytes) => Ok(Some(bytes.into())),
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(None),
            Err(e) => Err(e),
        }
    }
}

/// A signed ledger in a folder of its own.
pub struct Ledger {
    pub folder: TempDir,
    pub key: SignerKey,
    pub entries: Vec<Bytes>,
}

/// A legal history.
pub fn history(events: usize) -> Vec<Bytes> {
    let mut fleet = Fleet::new(Size::default());
    let mut choose = choices(7);
    (0..events).map(|_| fleet.next(&mut choose).bytes).collect()
}

/// The key with this number, the same as long as the process runs.
pub fn key(number: usize) -> SignerKey {
    static KEYS: OnceLock<Vec<SignerKey>> = OnceLock::new();
    let make = || {
        (0..3)
            .map(|_| SignerKey::generate(ORIGIN).unwrap())
            .collect()
    };
    KEYS.get_or_init(make)[number].clone()
}

impl Ledger {
    pub fn of(entries: Vec<Bytes>) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let ledger = Self {
            folder,
            key: key(1),
            entries,
        };
        ledger.write(ledger.entries.len());
        ledger
    }

    pub fn new(events: usize) -> Self {
        Self::of(history(events))
    }

    /// Publishes the tree over the first entries.
    pub fn write(&self, size: usize) {
        let mut growth = Growth::empty();
        for entry in &self.entries[..size] {
            growth.push(entry.clone()).unwrap();
        }
        for (path, bytes) in growth.files().unwrap() {
            let path = self.path().join(path.to_string());
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, bytes).unwrap();
        }
        let checkpoint = Checkpoint {
            origin: ORIGIN.into(),
            head: growth.head(),
            extensions: Vec::new(),
        };
        let note = checkpoint.sign(std::slice::from_ref(&self.key));
        fs::write(self.path().join("checkpoint"), note).unwrap();
        let keys = format!("{}\n", self.key.verifier());
        fs::write(self.path().join("keys"), keys).unwrap();
    }

    pub fn path(&self) -> &Path {
        self.folder.path()
    }

    pub fn export(&self, to: &Path) {
        let files = Files(self.path().to_owned());
        export(&files, &[], None, Timestamp::UNIX_EPOCH, to, &mut |_, _| {})
            .now_or_never()
            .unwrap()
            .unwrap();
    }

    /// An export of it.
    pub fn exported(&self) -> Vec<u8> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("export.tar");
        self.export(&path);
        fs::read(path).unwrap()
    }
}

/// Verifies with the key that every ledger here is signed with.
pub fn trusting() -> Options {
    Options {
        keys: vec![key(1).verifier().clone()],
        ..Options::default()
    }
}

pub fn verified(path: &Path, options: &Options) -> Verified {
    verify(Source::open(path).unwrap(), options, &mut |_, _| {}).unwrap()
}

/// Verifies an export; an error if it is none.
pub fn verified_bytes(bytes: Vec<u8>, options: &Options) -> Result<Verified, String> {
    let source = Source::archive("export".into(), Box::new(std::io::Cursor::new(bytes)))
        .map_err(|e| e.to_string())?;
    verify(source, options, &mut |_, _| {}).map_err(|e| e.to_string())
}
