//! `daybook audit consistency`

use std::path::PathBuf;

use bytes::Bytes;
use clap::Args;
use daybook_audit::{Consistency, consistency};
use daybook_store::tlog::{ReadTiles, parse_verifiers};

use super::ledger::{LedgerArgs, TrustArgs, failed, origin_of, unreadable};
use crate::commands::Outcome;
use crate::exit::{Code, Failure};
use crate::output;

/// Whether one checkpoint of a ledger is the beginning of another.
#[derive(Debug, Args)]
pub struct ConsistencyArgs {
    /// A file with a checkpoint.
    old: PathBuf,
    /// Another one; without it, the one that the ledger has now.
    #[arg(long, value_name = "FILE")]
    new: Option<PathBuf>,
    #[command(flatten)]
    ledger: LedgerArgs,
    #[command(flatten)]
    trust: TrustArgs,
}

pub async fn run(args: ConsistencyArgs) -> Outcome {
    let read = |path: &PathBuf| {
        std::fs::read(path)
            .map(Bytes::from)
            .map_err(|e| unreadable(path, &e))
    };
    let old = read(&args.old)?;
    let tiles = args.ledger.tiles()?;
    let get = async |name: &str| {
        let read = tiles.get(name).await;
        read.map_err(|e| Failure::new(Code::Unreachable, "ledger_unreadable", e.to_string()))
    };
    let new = match &args.new {
        Some(path) => read(path)?,
        None => get("checkpoint").await?.ok_or_else(|| {
            Failure::new(Code::Usage, "no_ledger", "the ledger has no checkpoint")
        })?,
    };
    let origin = origin_of(&old).ok_or_else(|| {
        let message = format!("{} is no checkpoint", args.old.display());
        Failure::new(Code::Usage, "invalid_checkpoint", message)
    })?;
    let mut keys = args.trust.named()?;
    let mut first_use = false;
    if keys.is_empty() {
        keys = args
            .trust
            .kept(&origin)?
            .map(|k| k.keys)
            .unwrap_or_default();
    }
    if keys.is_empty() {
        first_use = true;
        let came = get("keys").await?.unwrap_or_default();
        keys = parse_verifiers(&String::from_utf8_lossy(&came)).unwrap_or_default();
    }
    let found = consistency(&old, &new, &origin, &keys, tiles.as_ref() as &dyn ReadTiles)
        .await
        .map_err(|e| Failure {
            code: Code::Mismatch,
            ..failed("checkpoints_not_compared", &e)
        })?;
    if output::is_json() {
        output::json(&found);
    } else {
        let style = output::style();
        output::line(&match &found {
            Consistency::Same { size } => style.good(&format!("both are of the same tree of {size} entries")),
            Consistency::Extends { old, new, proof } => style.good(&format!(
                "consistent: the {old} entries then are the first of the {new} entries now (proof of {} hashes)",
                proof.len()
            )),
            Consistency::SplitView { old, new } => style.error(&format!(
                "SPLIT VIEW: the log signed a tree of {old} entries and one of {new} that does not go on from it. \
                 Keep both checkpoints: together they prove that history was rewritten."
            )),
            Consistency::TilesDiffer { size } => style.error(&format!(
                "the tiles do not lead to the root that was signed for {size} entries: nothing can be said of the checkpoints"
            )),
        });
        if first_use {
            output::line(&style.warn("the key came with the ledger: trusted on first use"));
        }
    }
    Ok(match found {
        Consistency::Same { .. } | Consistency::Extends { .. } => Code::Success,
        _ => Code::Mismatch,
    })
}
