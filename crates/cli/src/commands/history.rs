//! `daybook history`

use clap::Args;
use daybook_projections::{HistoryRow, Moment};
use serde_json::Value;

use super::{Outcome, ServerArgs};
use crate::client::Client;
use crate::exit::{Code, Failure};
use crate::output::{self, Row, Table};

/// What was deployed when, by whom, and what became of it. Newest first.
#[derive(Debug, Args)]
pub struct HistoryArgs {
    #[command(flatten)]
    server: ServerArgs,
    /// Only this project.
    #[arg(long, short, env = "DAYBOOK_PROJECT")]
    project: Option<String>,
    /// Only this environment.
    #[arg(long, short)]
    env: Option<String>,
    /// Only this service.
    #[arg(long, short)]
    service: Option<String>,
    /// As it was then: a position of the ledger, or a time such as 2024-01-15T10:30:00Z.
    #[arg(long, value_name = "POSITION|TIME")]
    at: Option<Moment>,
    /// At most so many rows.
    #[arg(long, default_value_t = 20, value_parser = clap::value_parser!(u32).range(1..=500))]
    limit: u32,
    /// Go on where an earlier page ended.
    #[arg(long)]
    cursor: Option<String>,
}

pub async fn run(args: HistoryArgs) -> Outcome {
    let client = Client::new(&args.server)?;
    let query = [
        ("project", args.project),
        ("environment", args.env),
        ("service", args.service),
        ("at", args.at.map(|at| at.to_string())),
        ("limit", Some(args.limit.to_string())),
        ("cursor", args.cursor),
    ];
    page(&client, &query).await?;
    Ok(Code::Success)
}

/// Asks for a page of the history, and prints it.
pub async fn page(client: &Client, query: &[(&str, Option<String>)]) -> Result<(), Failure> {
    let page: Value = client.get("/api/v1/history", query).await?;
    if output::is_json() {
        output::json(&page);
        return Ok(());
    }
    let next = page.get("next").and_then(Value::as_str).map(str::to_owned);
    let rows = page.get("history").cloned().unwrap_or_default();
    let rows: Vec<HistoryRow> = serde_json::from_value(rows)
        .map_err(|e| Failure::new(Code::Failure, "unexpected_answer", e.to_string()))?;
    if rows.is_empty() {
        output::line("no deployments");
        return Ok(());
    }
    let mut table = Table::new([
        "TIME",
        "SERVICE",
        "DEPLOYMENT",
        "VERSION",
        "IMAGE",
        "GITOPS",
        "STATUS",
        "BY",
        "MESSAGE",
    ]);
    for row in &rows {
        let mark = if row.active { " *" } else { "" };
        let message = row
            .outcome
            .clone()
            .or_else(|| row.source_commit_message.clone())
            .or_else(|| row.reason.clone())
            .unwrap_or_default();
        let first: String = message
            .lines()
            .next()
            .unwrap_or_default()
            .chars()
            .take(60)
            .collect();
        table.row(Row::new([
            output::time(row.timestamp),
            format!("{}.{}.{}{mark}", row.project, row.environment, row.service),
            row.deployment.short(),
            output::version(&row.version),
            row.image_tag
                .as_ref()
                .map(ToString::to_string)
                .unwrap_or_default(),
            row.revision
                .as_ref()
                .map(|r| r.short().to_owned())
                .unwrap_or_default(),
            output::status_word(row.status.as_str()),
            row.actor.id.clone(),
            first,
        ]));
    }
    table.print();
    if let Some(next) = next {
        output::line(&output::style().dim(&format!("more with --cursor {next}")));
    }
    Ok(())
}
