//! Where an auditor's ledger comes from, and what they trust: the arguments of all audits.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};

use async_trait::async_trait;
use bytes::Bytes;
use clap::Args;
use daybook_audit::{ArchiveTiles, Keeper, Kept, OpenError, ReadFiles, Source};
use daybook_store::tlog::{Checkpoint, FolderStorage, ReadTiles, VerifierKey, parse_verifiers};
use tokio::runtime::Handle;

use crate::client::Client;
use crate::commands::ServerArgs;
use crate::exit::{Code, Failure};
use crate::served_tree::LARGEST;

/// Which ledger.
#[derive(Debug, Args)]
pub struct LedgerArgs {
    /// An export, or a folder with the files of one or of a notary; the server if none is given.
    #[arg(value_name = "FILE")]
    file: Option<PathBuf>,
    #[command(flatten)]
    server: ServerArgs,
}

/// Whom an auditor trusts.
#[derive(Debug, Args)]
pub struct TrustArgs {
    /// The log's verifier key, as its operator told you by another way: `<name>+<id>+<key>`.
    #[arg(long, value_name = "KEY", env = "DAYBOOK_AUDIT_KEY")]
    key: Vec<VerifierKey>,
    /// A file with such keys, one a line.
    #[arg(long, value_name = "FILE")]
    keys: Option<PathBuf>,
    /// Where checkpoints and keys are kept from one audit to the next.
    #[arg(long, value_name = "FOLDER", env = "DAYBOOK_AUDIT_STATE")]
    state: Option<PathBuf>,
}

impl TrustArgs {
    /// The keys that were named.
    pub fn named(&self) -> Result<Vec<VerifierKey>, Failure> {
        let mut keys = self.key.clone();
        if let Some(path) = &self.keys {
            let text = std::fs::read_to_string(path).map_err(|e| unreadable(path, &e))?;
            let read = parse_verifiers(&text).map_err(|(line, e)| {
                let message = format!("line {line} of {} is no key: {e}", path.display());
                Failure::new(Code::Usage, "invalid_key", message)
            })?;
            if read.is_empty() {
                let message = format!("{} has no key", path.display());
                return Err(Failure::new(Code::Usage, "invalid_key", message));
            }
            keys.extend(read);
        }
        Ok(keys)
    }

    /// The folder of the auditor's own.
    pub fn keeper(&self) -> Result<Keeper, Failure> {
        let folder = match &self.state {
            Some(folder) => folder.clone(),
            None => std::env::var_os("XDG_STATE_HOME")
                .map(PathBuf::from)
                .filter(|p| p.is_absolute())
                .or_else(|| Some(PathBuf::from(std::env::var_os("HOME")?).join(".local/state")))
                .map(|folder| folder.join("daybook/audit"))
                .ok_or_else(|| {
                    Failure::new(
                        Code::Usage,
                        "no_state_folder",
                        "there is no folder to keep checkpoints in from one audit to the next",
                    )
                    .hint("name one with --state")
                })?,
        };
        Ok(Keeper::new(folder))
    }

    /// What was kept of a log.
    pub fn kept(&self, origin: &str) -> Result<Option<Kept>, Failure> {
        self.keeper()?
            .load(origin)
            .map_err(|e| failed("kept_unreadable", &e))
    }
}

/// An error with all that led to it.
pub fn failed(kind: &str, error: &dyn std::error::Error) -> Failure {
    Failure::new(Code::Usage, kind, daybook_events::with_causes(error))
}

pub fn unreadable(path: &Path, error: &io::Error) -> Failure {
    let message = format!("{} cannot be read: {error}", path.display());
    Failure::new(Code::Usage, "unreadable", message)
}

impl LedgerArgs {
    /// The server, if it is one.
    pub fn server(&self) -> Option<&ServerArgs> {
        self.file.is_none().then_some(&self.server)
    }

    /// Its tree, for those who read single tiles. An export is read by its index.
    pub fn tiles(&self) -> Result<Box<dyn ReadTiles>, Failure> {
        Ok(match &self.file {
            None => Box::new(ServerTiles::new(Client::new(&self.server)?)),
            Some(path) if path.is_dir() => Box::new(FolderStorage::new(path)),
            Some(path) => Box::new(ArchiveTiles::open(path).map_err(|e| unreadable(path, &e))?),
        })
    }

    /// Opens it. May block, and must be called where that is allowed.
    pub fn open(&self, runtime: &Handle) -> Result<Source, Failure> {
        let opened = match &self.file {
            Some(path) => Source::open(path),
            None => {
                let client = Client::new(&self.server)?;
                let name = client.shown();
                let files = Online {
                    tiles: ServerTiles::new(client),
                    runtime: runtime.clone(),
                };
                Source::files(name, Box::new(files))
            }
        };
        opened.map_err(|e| {
            let kind = match &e {
                OpenError::NoLedger { .. } => "no_ledger",
                OpenError::Io { .. } => "unreadable",
            };
            let mut failure = failed(kind, &e);
            if let (None, OpenError::Io { .. }) = (&self.file, &e) {
                failure.code = Code::Unreachable;
            }
            failure
        })
    }
}

/// The origin of a checkpoint, as it says itself.
pub fn origin_of(note: &[u8]) -> Option<String> {
    Checkpoint::parse_unverified(note)
        .ok()
        .map(|(c, _)| c.origin)
}

/// The tree that a server publishes.
#[derive(Debug, Clone)]
pub struct ServerTiles {
    client: Client,
    checkpoint: Arc<OnceLock<Option<Bytes>>>,
}

#[async_trait]
impl ReadTiles for ServerTiles {
    async fn get(&self, path: &str) -> io::Result<Option<Bytes>> {
        let failed = |failure: Failure| io::Error::other(failure.message);
        if path == "state_hash" {
            return self.state_hash().await.map_err(failed);
        }
        let found = self
            .client
            .resource(&format!("/tlog/{path}"), LARGEST)
            .await;
        let mut found = found.map_err(failed)?;
        if path == "checkpoint" {
            // A newer one may be published while the older one is still being looked at.
            let first = self.checkpoint.get_or_init(|| found.clone());
            found.clone_from(first);
        }
        Ok(found)
    }
}

impl ServerTiles {
    /// The tree of a server, at the checkpoint that it has when it is first asked.
    pub fn new(client: Client) -> Self {
        Self {
            client,
            checkpoint: Arc::default(),
        }
    }

    /// What the server says of the states at the checkpoint; none if it does not say it.
    async fn state_hash(&self) -> Result<Option<Bytes>, Failure> {
        let size = self.checkpoint.get().and_then(Option::as_ref);
        let size = size.and_then(|note| Checkpoint::parse_unverified(note).ok());
        let Some(size) = size.map(|(checkpoint, _)| checkpoint.head.size) else {
            return Ok(None);
        };
        let at = [("at", Some(size.to_string()))];
        let state: serde_json::Value = self.client.get("/api/v1/state", &at).await?;
        let hash = state.get("state_hash").and_then(serde_json::Value::as_str);
        Ok(hash.map(|hash| format!("{size} {hash}\n").into()))
    }
}

/// The same for those who wait.
struct Online {
    tiles: ServerTiles,
    runtime: Handle,
}

impl ReadFiles for Online {
    fn get(&mut self, name: &str, most: u64) -> io::Result<Option<Bytes>> {
        let found = self.runtime.block_on(self.tiles.get(name))?;
        match found {
            Some(bytes) if bytes.len() as u64 > most => {
                let message = format!("{name} has more than {most} bytes");
                Err(io::Error::new(io::ErrorKind::FileTooLarge, message))
            }
            found => Ok(found),
        }
    }

    fn list(&mut self, _: &str) -> io::Result<Vec<String>> {
        Ok(Vec::new())
    }

    fn path(&self, _: &str) -> Option<PathBuf> {
        None
    }

    fn is_live(&self) -> bool {
        true
    }
}

/// Runs an audit where it may block. An interrupt ends it, and what it had begun is removed.
pub async fn blocking<T: Send + 'static>(
    work: impl FnOnce(&Handle, Arc<AtomicBool>) -> Result<T, Failure> + Send + 'static,
) -> Result<T, Failure> {
    let stop = Arc::new(AtomicBool::new(false));
    let seen = Arc::clone(&stop);
    let runtime = Handle::current();
    let mut working = tokio::task::spawn_blocking(move || work(&runtime, seen));
    let ended = tokio::select! {
        ended = &mut working => ended,
        _ = tokio::signal::ctrl_c() => {
            stop.store(true, Ordering::Relaxed);
            working.await
        }
    };
    ended.unwrap_or_else(|e| Err(Failure::new(Code::Failure, "audit_failed", e.to_string())))
}

/// A bar on a terminal, for so many of something.
pub fn progress_bar(length: u64, of: &'static str) -> indicatif::ProgressBar {
    if crate::output::is_json() {
        return indicatif::ProgressBar::hidden();
    }
    let bar = indicatif::ProgressBar::new(length);
    let template = format!("{{bar:40}} {{pos}}/{{len}} {of}, {{per_sec}}, {{eta}} left");
    if let Ok(style) = indicatif::ProgressStyle::with_template(&template) {
        bar.set_style(style);
    }
    bar
}
