//! `daybook audit diff`

use clap::Args;
use daybook_audit::world::{Snapshots, differences};
use daybook_events::Position;
use serde_json::json;

use super::ledger::{LedgerArgs, TrustArgs};
use super::verify::observed;
use crate::commands::Outcome;
use crate::exit::{Code, Failure};
use crate::output::{self, Row, Table};

/// What changed between two positions: what runs where, routes, settings.
#[derive(Debug, Args)]
pub struct DiffArgs {
    /// A position of the ledger; 0 is before the first event.
    before: u64,
    /// A later one.
    after: u64,
    #[command(flatten)]
    ledger: LedgerArgs,
    #[command(flatten)]
    trust: TrustArgs,
}

pub async fn run(args: DiffArgs) -> Outcome {
    let (before, after) = (Position(args.before), Position(args.after));
    if before > after {
        let message = format!("{after} is before {before}");
        return Err(Failure::new(Code::Usage, "invalid_range", message)
            .hint("name the earlier position first"));
    }
    let snapshots = Snapshots::new([before, after]);
    let (verified, snapshots) = observed(args.ledger, args.trust, snapshots).await?;
    if after.0 > verified.size {
        let message = format!(
            "the ledger is signed up to {}, not to {after}",
            verified.size
        );
        return Err(Failure::new(Code::NotFound, "not_signed_yet", message));
    }
    let changes = differences(&snapshots.facts(before), &snapshots.facts(after));
    if output::is_json() {
        output::json(&json!({
            "before": before, "after": after, "changes": changes, "origin": verified.origin,
            "size": verified.size, "root": verified.root_text(), "ledger_holds": verified.holds(),
        }));
    } else {
        let mut table = Table::new(["WHAT", "BEFORE", "AFTER"]);
        let text = |value: &Option<String>| value.clone().unwrap_or_else(|| "-".into());
        for change in &changes {
            table.row(Row::new([
                change.what.clone(),
                text(&change.before),
                text(&change.after),
            ]));
        }
        table.print();
        output::line("");
        output::line(&format!(
            "{} differences between positions {before} and {after}, folded from the events of a ledger of {} entries with root {}",
            changes.len(),
            verified.size,
            verified.root_text()
        ));
    }
    super::verify::code_of(&verified)
}
