//! `daybook logs`

use clap::{Args, ValueEnum};
use futures_util::StreamExt;
use jiff::Timestamp;
use serde_json::Value;

use super::deploy::print_line;
use super::manage;
use super::{Outcome, ServerArgs};
use crate::client::{Client, LogLine};
use crate::exit::{Code, Failure};
use crate::output;

/// Which output.
#[derive(Debug, Clone, Copy, ValueEnum)]
pub enum LogType {
    /// Of the build.
    Build,
    /// Of the running instances.
    Container,
    /// What workers report.
    Status,
    /// What the platform underneath says, such as warnings of Kubernetes.
    Platform,
}

/// How bad it is.
#[derive(Debug, Clone, Copy, ValueEnum)]
pub enum LogLevel {
    /// Everything.
    Debug,
    /// What says nothing of its level, too.
    Info,
    /// Warnings and errors.
    Warn,
    /// Errors alone.
    Error,
}

/// Output of a build and of running instances, of one deployment or of all of a project.
#[derive(Debug, Args)]
pub struct LogsArgs {
    #[command(flatten)]
    server: ServerArgs,
    /// The deployment: its id, or the end of it as `daybook status` shows it; or the main one of an
    /// instance, `project.environment.service`.
    #[arg(required_unless_present = "project")]
    deployment: Option<String>,
    /// Look in all deployments of this project, newest first.
    #[arg(long, short, conflicts_with_all = ["deployment", "follow", "after"])]
    project: Option<String>,
    /// Only of this environment.
    #[arg(long, short, requires = "project")]
    env: Option<String>,
    /// Only of this service.
    #[arg(long, short, requires = "project")]
    service: Option<String>,
    /// Only lines with this text in them; letters of ASCII may be large or small.
    #[arg(long, short, value_name = "TEXT")]
    grep: Option<String>,
    /// Only output of one type.
    #[arg(long = "type", value_enum)]
    kind: Option<LogType>,
    /// Only lines of at least this level.
    #[arg(long, value_enum)]
    level: Option<LogLevel>,
    /// Only what was printed in this cluster.
    #[arg(long)]
    cluster: Option<String>,
    /// Only what this instance (pod, process) printed.
    #[arg(long)]
    instance: Option<String>,
    /// Only what was printed at this time or later: 2026-01-01T00:00:00Z.
    #[arg(long, value_name = "TIME")]
    from: Option<Timestamp>,
    /// Only what was printed before this time.
    #[arg(long, value_name = "TIME")]
    until: Option<Timestamp>,
    /// Go on as lines come.
    #[arg(long, short)]
    follow: bool,
    /// Go on after this cursor.
    #[arg(long, value_name = "CURSOR")]
    after: Option<String>,
}

/// A word as the server knows it.
fn word(value: impl ValueEnum) -> Option<String> {
    value.to_possible_value().map(|v| v.get_name().to_owned())
}

pub async fn run(args: LogsArgs) -> Outcome {
    let client = Client::new(&args.server)?;
    let mut query = vec![
        ("type", args.kind.and_then(word)),
        ("level", args.level.and_then(word)),
        ("cluster", args.cluster),
        ("instance", args.instance),
        ("from", args.from.map(|t| t.to_string())),
        ("until", args.until.map(|t| t.to_string())),
        ("q", args.grep),
    ];
    let Some(deployment) = args.deployment else {
        query.extend([("environment", args.env), ("service", args.service)]);
        return search(&client, &args.project.unwrap_or_default(), query).await;
    };
    let id = super::lifecycle::find(&client, &deployment).await?;
    query.extend([
        ("follow", args.follow.then(|| "true".to_owned())),
        ("after", args.after),
    ]);
    let stream = client
        .stream(&format!("/api/v1/deployments/{id}/logs"), &query, None)
        .await?;
    let mut stream = std::pin::pin!(stream);
    while let Some(event) = stream.next().await {
        if let Ok(line) = serde_json::from_str::<LogLine>(&event?.data) {
            print_line(&line);
        }
    }
    Ok(Code::Success)
}

/// Prints all lines that are found, page by page. A deployment is named before its first line.
async fn search(client: &Client, project: &str, mut query: Vec<(&str, Option<String>)>) -> Outcome {
    let path = format!("/api/v1/projects/{}/logs", manage::segment(project)?);
    query.push(("limit", Some("500".to_owned())));
    query.push(("cursor", None));
    let mut shown = None;
    loop {
        let mut page: Value = client.get(&path, &query).await?;
        let lines = page.get_mut("lines").and_then(Value::as_array_mut);
        for found in lines.map(std::mem::take).unwrap_or_default() {
            if output::is_json() {
                output::json(&found);
                continue;
            }
            let text = |name: &str| found.get(name).and_then(Value::as_str).unwrap_or_default();
            let deployment = text("deployment").to_owned();
            if shown.as_ref() != Some(&deployment) {
                let of = format!("{project}.{}.{}", text("environment"), text("service"));
                output::line(&output::style().bold(&format!("{of} {deployment}")));
                shown = Some(deployment);
            }
            let line: LogLine = serde_json::from_value(found)
                .map_err(|e| Failure::new(Code::Failure, "unexpected_answer", e.to_string()))?;
            print_line(&line);
        }
        let Some(next) = page.get("next").and_then(Value::as_str) else {
            break;
        };
        if let Some(cursor) = query.last_mut() {
            cursor.1 = Some(next.to_owned());
        }
    }
    Ok(Code::Success)
}
