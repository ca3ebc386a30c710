//! `daybook audit receipt` and `daybook audit check-receipt`

use std::io::Write;
use std::path::{Path, PathBuf};

use clap::Args;
use daybook_audit::Trust;
use daybook_audit::receipt::{ReceiptError, Statement, check_receipt, receipt};
use daybook_events::DeploymentId;
use serde_json::json;

use super::ledger::{LedgerArgs, TrustArgs, failed, progress_bar, unreadable};
use crate::commands::Outcome;
use crate::exit::{Code, Failure};
use crate::output::{self, Row, Table};

/// Write one file that proves what the signed ledger says of a deployment.
#[derive(Debug, Args)]
pub struct ReceiptArgs {
    /// The deployment, by its whole id.
    deployment: DeploymentId,
    /// The file; one that is there is replaced when the new one is complete.
    #[arg(long, value_name = "FILE")]
    out: PathBuf,
    #[command(flatten)]
    ledger: LedgerArgs,
}

/// Check a receipt, with nothing but the receipt and a key.
#[derive(Debug, Args)]
pub struct CheckReceiptArgs {
    /// The receipt.
    file: PathBuf,
    #[command(flatten)]
    trust: TrustArgs,
}

pub async fn make(args: ReceiptArgs) -> Outcome {
    let tiles = args.ledger.tiles()?;
    let bar = progress_bar(0, "events");
    let made = receipt(tiles.as_ref(), args.deployment, &mut |done, size| {
        bar.set_length(size);
        bar.set_position(done);
    })
    .await;
    bar.finish_and_clear();
    let (statement, bytes) = made.map_err(|e| {
        let (code, kind) = match &e {
            ReceiptError::NotFound { .. } => (Code::NotFound, "deployment_not_found"),
            ReceiptError::NothingSigned => (Code::Refused, "nothing_signed"),
            _ => (Code::Usage, "ledger_unreadable"),
        };
        Failure {
            code,
            ..failed(kind, &e)
        }
    })?;
    replace(&args.out, &bytes).map_err(|e| {
        let message = format!("{} cannot be written: {e}", args.out.display());
        Failure::new(Code::Failure, "not_written", message)
    })?;
    if output::is_json() {
        output::json(&statement);
    } else {
        print(&statement);
        output::line(&format!(
            "check it with `daybook audit check-receipt {}`",
            args.out.display()
        ));
    }
    Ok(Code::Success)
}

pub async fn check(args: CheckReceiptArgs) -> Outcome {
    let bytes = std::fs::read(&args.file).map_err(|e| unreadable(&args.file, &e))?;
    let named = args.trust.named()?;
    let mut trouble = None;
    let checked = check_receipt(&bytes, &named, |origin| match args.trust.kept(origin) {
        Ok(kept) => kept.map(|k| k.keys).unwrap_or_default(),
        Err(e) => {
            trouble = Some(e);
            Vec::new()
        }
    });
    if let Some(failure) = trouble {
        return Err(failure);
    }
    let checked = checked.map_err(|broken| {
        Failure::new(Code::Mismatch, "receipt_broken", format!("the receipt does not hold: {broken}"))
            .hint("ask for the receipt again, and compare the key with what the operator tells you by another way")
    })?;
    if output::is_json() {
        output::json(&json!({ "verdict": "holds", "receipt": checked }));
        return Ok(Code::Success);
    }
    print(&checked.statement);
    let style = output::style();
    output::line(&style.good(&format!(
        "the receipt holds: {} signed a ledger of {} entries that has these {} events, byte for byte",
        checked.signed_by.join(" and "),
        checked.statement.size,
        checked.statement.events.len()
    )));
    if checked.trust == Trust::FirstUse {
        output::line(&style.warn(
            "the key came with the receipt: compare it with what the operator tells you by another way, or name it with --key",
        ));
    }
    output::line(&checked.statement.caveat);
    Ok(Code::Success)
}

fn print(statement: &Statement) {
    let line = |name: &str, value: &str| output::line(&format!("{name:<13} {value}"));
    line("deployment", &statement.deployment.to_string());
    line("instance", &statement.instance);
    line("requested by", &statement.requested_by);
    line("image", statement.image.as_deref().unwrap_or("-"));
    line("commit", statement.commit.as_deref().unwrap_or("-"));
    line("last event", &statement.last_event);
    output::line("");
    let mut table = Table::new(["POSITION", "EVENT", "ID"]);
    for event in &statement.events {
        table.row(Row::new([
            event.position.to_string(),
            event.kind.clone(),
            event.id.to_string(),
        ]));
    }
    table.print();
    output::line("");
}

/// Puts a file in the place of another in one step.
pub fn replace(path: &Path, bytes: &[u8]) -> std::io::Result<()> {
    let folder = path.parent().filter(|p| !p.as_os_str().is_empty());
    let folder = folder.unwrap_or(Path::new("."));
    let mut file = tempfile::Builder::new()
        .permissions(std::os::unix::fs::PermissionsExt::from_mode(0o644))
        .tempfile_in(folder)?;
    file.write_all(bytes)?;
    file.as_file().sync_all()?;
    file.persist(path).map_err(|e| e.error)?;
    std::fs::File::open(folder)?.sync_all()
}
