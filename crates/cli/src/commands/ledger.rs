//! `daybook ledger` and `daybook keys`: the ledger itself, and the keys that it is signed with.

use std::path::PathBuf;

use clap::{Args, Subcommand};
use daybook_events::with_causes;
use daybook_store::tlog::{KeyFileError, KeyRing};
use serde_json::{Value, json};

use super::gitops_key::{self, GitopsKeyCommand};
use super::{Outcome, ServerArgs};
use crate::client::Client;
use crate::exit::{Code, Failure};
use crate::node;
use crate::output;

/// The ledger itself.
#[derive(Debug, Subcommand)]
pub enum LedgerCommand {
    /// What the ledger is, how far it is signed, and whether it still is what was signed.
    Status(StatusArgs),
    /// Compare the whole log with all that was signed, and use it again if nothing is wrong.
    Recheck(super::repair::RecheckArgs),
    /// Replace a damaged log by a new one with every signed event.
    Repair(super::repair::RepairArgs),
}

/// Ask a server.
#[derive(Debug, Args)]
pub struct StatusArgs {
    #[command(flatten)]
    server: ServerArgs,
}

pub async fn run(command: LedgerCommand) -> Outcome {
    match command {
        LedgerCommand::Status(args) => status(args).await,
        LedgerCommand::Recheck(args) => super::repair::recheck_log(args).await,
        LedgerCommand::Repair(args) => super::repair::run(args).await,
    }
}

/// Ends with [`Code::Mismatch`] if the log is not what was signed.
async fn status(args: StatusArgs) -> Outcome {
    let client = Client::new(&args.server)?;
    let report: Value = client.get("/api/v1/ledger", &[]).await?;
    let condition = &report["condition"];
    let broken = condition["state"] == "broken";
    let code = if broken {
        Code::Mismatch
    } else {
        Code::Success
    };
    if output::is_json() {
        output::json(&report);
        return Ok(code);
    }
    let style = output::style();
    let text = |value: &Value| match value {
        Value::String(text) => text.clone(),
        other => other.to_string(),
    };
    if let Some(why) = report["unavailable"].as_str() {
        output::line(&format!(
            "log        {}: {why}",
            style.error("not available")
        ));
        output::line(&format!("events     {} folded", report["position"]));
    } else {
        output::line(&format!(
            "log        {} ({})",
            text(&report["backend"]),
            match report["durability"].as_str() {
                Some("synced") => "an acknowledged event survives the loss of power",
                Some("buffered") => "an acknowledged event may be lost with the power",
                _ => "the server does not say what survives the loss of power",
            }
        ));
        output::line(&format!("identity   {}", text(&report["identity"])));
        output::line(&format!(
            "events     {}, {} of them folded",
            report["head"], report["position"]
        ));
    }
    if let Some(count @ 1..) = report["set_aside"].as_u64() {
        let events = match count {
            1 => "one event cannot be read and is",
            _ => "{} events cannot be read and are",
        };
        let events = events.replace("{}", &count.to_string());
        output::line(&format!(
            "           {} set aside; GET {}/api/v1/audit?void=true says which",
            style.warn(&events),
            client.shown()
        ));
    }
    match &report["signed"] {
        Value::Null => output::line("signed     nothing yet"),
        signed => {
            output::line(&format!(
                "signed     {} events, root {}",
                signed["size"],
                text(&signed["root"])
            ));
            output::line(&format!("           at {}", text(&signed["published_at"])));
        }
    }
    match condition["state"].as_str() {
        Some("sound") => output::line(&format!(
            "condition  {}: the log begins with what was signed",
            style.good("sound")
        )),
        Some("broken") => {
            output::line(&format!(
                "condition  {}: {} ({})",
                style.error("BROKEN"),
                text(&condition["message"]),
                text(&condition["code"])
            ));
            output::line("           Nothing is appended or signed any more.");
            output::line(&format!("           {}", text(&condition["remedy"])));
        }
        Some("doubted") => output::line(&format!(
            "condition  {}: {}",
            style.warn("doubted"),
            text(&condition["reason"])
        )),
        _ => output::line(&format!(
            "condition  {}: {}",
            style.warn("not known"),
            text(&condition["reason"])
        )),
    }
    for warning in report["warnings"].as_array().into_iter().flatten() {
        output::line(&format!("{} {}", style.warn("warning:"), text(warning)));
    }
    Ok(code)
}

/// Keys that the ledger is signed with.
#[derive(Debug, Subcommand)]
pub enum KeysCommand {
    /// Make the first key of a ledger.
    Generate(GenerateArgs),
    /// Print the public keys of all times, as auditors need them.
    Show(KeysArgs),
    /// Add a new key: from the next start on, old and new ones both sign.
    Rotate(KeysArgs),
    /// End a rotation: only the newest key signs from the next start on. Public keys stay.
    Retire(KeysArgs),
    /// The key that GitOps commits are signed with.
    #[command(subcommand)]
    Gitops(GitopsKeyCommand),
}

/// Where keys are.
#[derive(Debug, Args)]
pub struct KeysArgs {
    /// The folder with the keys: `keys/ledger` in the data folder, if not given.
    #[arg(long, env = "DAYBOOK_TLOG_KEYS", value_name = "DIR")]
    keys: Option<PathBuf>,
    /// The data folder.
    #[arg(long, env = "DAYBOOK_DATA", value_name = "DIR")]
    data: Option<PathBuf>,
}

/// A new ledger's key.
#[derive(Debug, Args)]
pub struct GenerateArgs {
    /// The ledger's name for auditors, the same for ever: the address under which it is published,
    /// without scheme, such as `daybook.example.com/tlog`.
    #[arg(long, env = "DAYBOOK_ORIGIN")]
    origin: String,
    #[command(flatten)]
    place: KeysArgs,
}

impl KeysArgs {
    fn folder(&self) -> Result<PathBuf, Failure> {
        match &self.keys {
            Some(folder) => Ok(folder.clone()),
            None => Ok(super::up::data_dir(self.data.as_ref())?.join(node::LEDGER_KEYS)),
        }
    }
}

pub fn keys(command: KeysCommand) -> Outcome {
    let (ring, said) = match &command {
        KeysCommand::Generate(args) => (
            KeyRing::generate(&args.place.folder()?, &args.origin),
            "A key was made. Keep the private one secret and safe: whoever has it can sign a ledger \
             of this name, and without it this one cannot go on.",
        ),
        KeysCommand::Show(args) => (KeyRing::open(&args.folder()?), ""),
        KeysCommand::Rotate(args) => (
            KeyRing::rotate(&args.folder()?),
            "A key was added. Restart the notary; give the new public key to auditors, and retire \
             the old one when they have it.",
        ),
        KeysCommand::Retire(args) => (
            KeyRing::retire(&args.folder()?),
            "Only the newest key signs from the next start of the notary on.",
        ),
        KeysCommand::Gitops(command) => return gitops_key::run(command),
    };
    let ring = ring.map_err(|e| unusable(&e))?;
    let signing: Vec<String> = ring
        .signers()
        .iter()
        .map(|s| s.verifier().to_string())
        .collect();
    if output::is_json() {
        let all: Vec<String> = ring.verifiers().iter().map(ToString::to_string).collect();
        output::json(&json!({ "origin": ring.origin(), "keys": all, "signing": signing }));
        return Ok(Code::Success);
    }
    for verifier in ring.verifiers() {
        output::line(&verifier.to_string());
    }
    if !said.is_empty() {
        eprintln!("{said}");
    }
    Ok(Code::Success)
}

/// What is wrong with a folder of keys.
pub fn unusable(error: &KeyFileError) -> Failure {
    let (code, hint) = match error {
        KeyFileError::Missing { .. } => (
            "keys_missing",
            "`daybook keys generate --origin NAME` makes them, and so does the first start",
        ),
        KeyFileError::Exists { .. } => (
            "keys_exist",
            "a ledger keeps its name; `daybook keys rotate` adds a key",
        ),
        KeyFileError::Exposed { .. } => ("keys_exposed", "chmod 600 the file with private keys"),
        _ => ("keys_unusable", "name the folder with --keys DIR"),
    };
    Failure::new(Code::Failure, code, with_causes(error)).hint(hint)
}
