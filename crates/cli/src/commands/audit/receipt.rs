//! `daybook audit receipt` and `daybook audit check-receipt`

use std::collections::BTreeSet;
use std::io::Write;
use std::path::{Path, PathBuf};

use clap::Args;
use daybook_audit::Trust;
use daybook_audit::receipt::{Look, ReceiptError, Statement, check_receipt, named, receipt};
use daybook_events::{DeploymentId, Position};
use serde::Deserialize;
use serde_json::{Value, json};

use super::ledger::{LedgerArgs, TrustArgs, failed, progress_bar, unreadable};
use crate::client::Client;
use crate::commands::{Outcome, lifecycle};
use crate::exit::{Code, Failure};
use crate::output::{self, Row, Table};

/// Write one file that proves what the signed ledger says of a deployment.
#[derive(Debug, Args)]
pub struct ReceiptArgs {
    /// The deployment: its id, or at least the first or last four digits of it.
    deployment: String,
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
    let mut progress = |done, size| {
        bar.set_length(size);
        bar.set_position(done);
    };
    let (deployment, look) = match args.ledger.server() {
        Some(server) => {
            let client = Client::new(server)?;
            let id = lifecycle::find(&client, &args.deployment).await?;
            let positions = positions_about(&client, &id).await?;
            (parsed(&id)?, Look::At(positions))
        }
        None => {
            lifecycle::check_part_of_id(&args.deployment)?;
            let id = named(tiles.as_ref(), &args.deployment, &mut progress).await;
            (id.map_err(|e| not_made(&e))?, Look::Everywhere)
        }
    };
    let made = receipt(tiles.as_ref(), deployment, &look, &mut progress).await;
    bar.finish_and_clear();
    let (statement, bytes) = made.map_err(|e| not_made(&e))?;
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

fn not_made(error: &ReceiptError) -> Failure {
    let (code, kind) = match error {
        ReceiptError::NotFound { .. } => (Code::NotFound, "deployment_not_found"),
        ReceiptError::Ambiguous { .. } => (Code::Usage, "ambiguous_deployment_id"),
        ReceiptError::NothingSigned => (Code::Refused, "nothing_signed"),
        _ => (Code::Usage, "ledger_unreadable"),
    };
    let failure = Failure {
        code,
        ..failed(kind, error)
    };
    match error {
        ReceiptError::Ambiguous { .. } => failure.hint("give more of its digits"),
        ReceiptError::NotFound { .. } => failure.hint(
            "what happened a moment ago is signed within a second; `daybook history` lists all deployments",
        ),
        _ => failure,
    }
}

fn parsed(id: &str) -> Result<DeploymentId, Failure> {
    id.parse().map_err(|_| {
        let message = format!("{id:?} is not the id of a deployment");
        Failure::new(Code::Usage, "invalid_deployment_id", message)
    })
}

/// Where events about a deployment can be, as the server's projections know it. Whether they are
/// about it is seen in the events themselves.
async fn positions_about(client: &Client, id: &str) -> Result<BTreeSet<Position>, Failure> {
    let detail: Value = client
        .get(&format!("/api/v1/deployments/{id}"), &[])
        .await?;
    let text = |name: &str| detail[name].as_str().unwrap_or_default();
    let (project, service) = (text("project"), text("service"));
    let mut positions = BTreeSet::new();
    let mut begun = false;
    let build = text("build_id");
    for filter in [
        &[("deployment", id)][..],
        &[("correlation", id)],
        // Traffic that went to others instead.
        &[
            ("kind", "routing"),
            ("project", project),
            ("service", service),
            ("from", text("created_at")),
        ],
    ] {
        for row in audit_rows(client, filter).await? {
            begun |= row.begins(build);
            positions.insert(row.position);
        }
    }
    // Another deployment began the build, and this one shares it.
    if !build.is_empty() && !begun {
        let filter = [
            ("kind", "build"),
            ("project", project),
            ("service", service),
        ];
        let rows = audit_rows(client, &filter).await?.into_iter();
        let of_build = rows.filter(|row| row.subject.ends_with(build));
        positions.extend(of_build.map(|row| row.position));
    }
    Ok(positions)
}

/// What is looked at of a row of the audit.
#[derive(Debug, Deserialize)]
struct AuditRow {
    position: Position,
    subject: String,
    revision: u32,
}

impl AuditRow {
    fn begins(&self, build: &str) -> bool {
        self.revision == 1 && !build.is_empty() && self.subject.ends_with(build)
    }
}

/// All rows of the audit that pass a filter.
async fn audit_rows(client: &Client, filter: &[(&str, &str)]) -> Result<Vec<AuditRow>, Failure> {
    #[derive(Deserialize)]
    struct Page {
        audit: Vec<AuditRow>,
        next: Option<String>,
    }
    let mut rows = Vec::new();
    let mut cursor = None;
    loop {
        let mut query: Vec<_> = filter
            .iter()
            .map(|(name, value)| (*name, Some((*value).to_owned())))
            .collect();
        query.extend([("limit", Some("500".to_owned())), ("cursor", cursor)]);
        let page: Page = client.get("/api/v1/audit", &query).await?;
        rows.extend(page.audit);
        cursor = page.next;
        if cursor.is_none() {
            return Ok(rows);
        }
    }
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
