//! `daybook dora`

use clap::Args;
use daybook_projections::dora::{Delivery, Spread};
use jiff::Timestamp;
use serde_json::Value;

use super::{Outcome, ServerArgs};
use crate::client::Client;
use crate::exit::{Code, Failure};
use crate::output::{self, Row, Table};

/// The four measures of software delivery by DORA, of each service instance: how often it is
/// deployed, how long a commit takes to get the traffic, how many deployments were rolled back, and
/// how long that took.
///
/// `--output json` names the events that were counted. `daybook audit report dora` counts the same
/// from an export, without this server.
#[derive(Debug, Args)]
pub struct DoraArgs {
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
    /// From this time on: 2026-01-01T00:00:00Z. Thirty days before --until if not given.
    #[arg(long, value_name = "TIME")]
    from: Option<Timestamp>,
    /// Before this time; now if not given.
    #[arg(long, value_name = "TIME")]
    until: Option<Timestamp>,
}

pub async fn run(args: DoraArgs) -> Outcome {
    let client = Client::new(&args.server)?;
    let query = [
        ("project", args.project),
        ("environment", args.env),
        ("service", args.service),
        ("from", args.from.map(|t| t.to_string())),
        ("until", args.until.map(|t| t.to_string())),
    ];
    let answer: Value = client.get("/api/v1/dora", &query).await?;
    if output::is_json() {
        output::json(&answer);
        return Ok(Code::Success);
    }
    let instances = answer.get("instances").cloned().unwrap_or_default();
    let instances: Vec<Delivery> = serde_json::from_value(instances)
        .map_err(|e| Failure::new(Code::Failure, "unexpected_answer", e.to_string()))?;
    let time = |name: &str| {
        answer
            .get(name)
            .and_then(Value::as_str)
            .unwrap_or_default()
            .to_owned()
    };
    output::line(&format!("from {} until {}", time("from"), time("until")));
    if instances.is_empty() {
        output::line("nothing was deployed");
        return Ok(Code::Success);
    }
    let mut table = Table::new([
        "SERVICE",
        "DEPLOYMENTS",
        "A DAY",
        "LEAD TIME",
        "FAILED",
        "RATE",
        "TO RESTORE",
        "NEVER LIVE",
    ]);
    for of in &instances {
        table.row(Row::new([
            of.instance_id.clone(),
            of.deployments.to_string(),
            of.deployments_per_day.to_string(),
            median(&of.lead_time),
            of.failed_changes.to_string(),
            of.change_failure_rate
                .map_or("-".to_owned(), |rate| format!("{:.0} %", rate * 100.0)),
            median(&of.time_to_restore),
            of.failed_before.to_string(),
        ]));
    }
    table.print();
    Ok(Code::Success)
}

/// The middle value: `12 min`.
fn median(of: &Spread) -> String {
    let Some(ms) = of.median_ms else {
        return "-".to_owned();
    };
    match ms / 1000 {
        0 => format!("{ms} ms"),
        s @ 1..120 => format!("{s} s"),
        s @ 120..7200 => format!("{} min", s / 60),
        s @ 7200..172_800 => format!("{} h", s / 3600),
        s => format!("{} d", s / 86_400),
    }
}
