//! `daybook audit report`

use std::path::PathBuf;

use clap::{Args, ValueEnum};
use daybook_audit::report::{Collector, Report, Scope, Subject};
use daybook_events::DeploymentId;
use daybook_projections::dora::Period;
use jiff::{SignedDuration, Timestamp};

use super::ledger::{LedgerArgs, TrustArgs};
use super::verify::observed;
use crate::commands::Outcome;
use crate::exit::{Code, Failure};
use crate::output::{self, Row, Table};

/// The reports.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Name {
    /// All deployments of a period, and that they are all.
    Population,
    /// Every event about one deployment (`--deployment`).
    Evidence,
    /// Where requester, author and approver are not different people.
    SegregationOfDuties,
    /// Emergencies, and how late they were reviewed.
    Emergency,
    /// Changes that nobody approved.
    Unapproved,
    /// What failed or was cancelled, and routes that went back.
    FailuresAndRollbacks,
    /// What ran at a time (`--at`).
    WhatRan,
    /// Whether the log is whole, and goes on from the last audit.
    Integrity,
    /// Deployment frequency, lead time, change failure rate and time to restore.
    Dora,
}

/// A report from the whole ledger, which is verified for it.
#[derive(Debug, Args)]
pub struct ReportArgs {
    /// Which report.
    #[arg(value_enum)]
    name: Name,
    #[command(flatten)]
    ledger: LedgerArgs,
    /// From this time on: 2026-01-01T00:00:00Z. For `dora` thirty days before --to, if not given.
    #[arg(long, value_name = "TIME")]
    from: Option<Timestamp>,
    /// Before this time. For `dora` now, if not given.
    #[arg(long, value_name = "TIME")]
    to: Option<Timestamp>,
    /// Only this project.
    #[arg(long, short)]
    project: Option<String>,
    /// Only this environment.
    #[arg(long, short)]
    env: Option<String>,
    /// The deployment of an evidence report, by its whole id.
    #[arg(long, value_name = "ID", required_if_eq("name", "evidence"))]
    deployment: Option<DeploymentId>,
    /// The time of a report on what ran.
    #[arg(long, value_name = "TIME", required_if_eq("name", "what-ran"))]
    at: Option<Timestamp>,
    /// Also write it to this file as comma-separated values.
    #[arg(long, value_name = "FILE")]
    csv: Option<PathBuf>,
    #[command(flatten)]
    trust: TrustArgs,
}

pub async fn run(args: ReportArgs) -> Outcome {
    let missing = || {
        Failure::new(
            Code::Usage,
            "missing_argument",
            "--deployment or --at is missing",
        )
    };
    let subject = match args.name {
        Name::Population => Subject::Population,
        Name::Evidence => Subject::Evidence(args.deployment.ok_or_else(missing)?),
        Name::SegregationOfDuties => Subject::SegregationOfDuties,
        Name::Emergency => Subject::Emergency,
        Name::Unapproved => Subject::Unapproved,
        Name::FailuresAndRollbacks => Subject::FailuresAndRollbacks,
        Name::WhatRan => Subject::WhatRan(args.at.ok_or_else(missing)?),
        Name::Integrity => Subject::Integrity,
        Name::Dora => Subject::Dora(period(args.from, args.to)?),
    };
    let scope = Scope {
        from: args.from,
        to: args.to,
        project: args.project,
        environment: args.env,
    };
    let collector = Collector::new(subject, scope);
    let (verified, collector) = observed(args.ledger, args.trust, collector).await?;
    let report = collector.report(&verified);
    if let Some(path) = &args.csv {
        super::receipt::replace(path, report.to_csv().as_bytes()).map_err(|e| {
            let message = format!("{} cannot be written: {e}", path.display());
            Failure::new(Code::Failure, "not_written", message)
        })?;
    }
    if output::is_json() {
        output::json(&report);
    } else {
        print(&report);
    }
    super::verify::code_of(&verified)
}

/// The period of measures, which are by the day.
fn period(from: Option<Timestamp>, to: Option<Timestamp>) -> Result<Period, Failure> {
    let to = to.unwrap_or_else(Timestamp::now);
    let usual = SignedDuration::from_hours(30 * 24);
    let from = from.unwrap_or_else(|| to.checked_sub(usual).unwrap_or(Timestamp::MIN));
    if from >= to {
        let message = format!("there is no time between {from} and {to}");
        return Err(Failure::new(Code::Usage, "invalid_period", message)
            .hint("give a --from that is before --to"));
    }
    Ok(Period { from, to })
}

fn print(report: &Report) {
    // Tables for people have few columns; the others are in CSV and JSON.
    let shown = 8.min(report.columns.len());
    let mut table = Table::new(["", "", "", "", "", "", "", ""]);
    let upper = |c: &&str| c.to_uppercase();
    let mut head: Vec<String> = report.columns.iter().take(shown).map(upper).collect();
    head.resize(8, String::new());
    table.row(Row::new(head));
    for row in &report.rows {
        let mut cells: Vec<String> = row.iter().take(shown).cloned().collect();
        cells.resize(8, String::new());
        table.row(Row::new(cells));
    }
    table.print();
    output::line("");
    for sentence in &report.statement {
        output::line(sentence);
    }
    output::line(&format!(
        "position {}, size {}, root {}",
        report.position, report.size, report.root
    ));
}
