//! `daybook keys gitops`: the key that GitOps commits are signed with.

use std::path::PathBuf;

use clap::{Args, Subcommand};
use daybook_events::with_causes;
use daybook_workers::gitops::SigningKey;
use serde_json::json;

use super::Outcome;
use super::up::data_dir;
use crate::exit::{Code, Failure};
use crate::node::GITOPS_KEY;
use crate::output;

/// The key that GitOps commits are signed with.
#[derive(Debug, Subcommand)]
pub enum GitopsKeyCommand {
    /// Print the public key; makes the key if there is none.
    Show(KeyArgs),
    /// Replace the key. Commits that it signed stay good: the ledger keeps its public half.
    Rotate(KeyArgs),
}

/// Where the key is.
#[derive(Debug, Args)]
pub struct KeyArgs {
    /// The data folder.
    #[arg(long, env = "DAYBOOK_DATA", value_name = "DIR")]
    data: Option<PathBuf>,
    /// The key's file, if it is not in the data folder.
    #[arg(long, env = "DAYBOOK_GITOPS_KEY", value_name = "FILE")]
    gitops_key: Option<PathBuf>,
}

impl KeyArgs {
    fn path(&self) -> Result<PathBuf, Failure> {
        match &self.gitops_key {
            Some(file) => Ok(file.clone()),
            None => Ok(data_dir(self.data.as_ref())?.join(GITOPS_KEY)),
        }
    }
}

pub fn run(command: &GitopsKeyCommand) -> Outcome {
    let (path, signer) = match command {
        GitopsKeyCommand::Show(args) => {
            let path = args.path()?;
            let key = SigningKey::open_or_create(&path).and_then(|key| key.signer());
            (path, key)
        }
        GitopsKeyCommand::Rotate(args) => {
            let path = args.path()?;
            let key = SigningKey::rotate(&path);
            (path, key)
        }
    };
    let signer = signer
        .map_err(|e| Failure::new(Code::Failure, e.code(), with_causes(&e)).hint(e.remedy()))?;
    if output::is_json() {
        output::json(&json!({
            "file": path,
            "public_key": signer.public_key,
            "fingerprint": signer.fingerprint,
        }));
    } else {
        output::line(&format!("{} {}", signer.public_key, signer.fingerprint));
    }
    Ok(Code::Success)
}
