//! `daybook replay` and `daybook projections`

use std::sync::Arc;
use std::time::Instant;

use clap::{Args, Subcommand};
use daybook_events::EventLog;
use daybook_projections::{Projections, replay};
use serde_json::{Value, json};

use super::{Outcome, ServerArgs};
use crate::client::Client;
use crate::exit::{Code, Failure};
use crate::output;
use crate::remote::RemoteLog;

/// Print the ledger, fold it anew on this machine, and compare with what the server says.
#[derive(Debug, Args)]
pub struct ReplayArgs {
    #[command(flatten)]
    server: ServerArgs,
    /// Only compare; do not print the events.
    #[arg(long, short)]
    quiet: bool,
}

/// Look after the projections.
#[derive(Debug, Subcommand)]
pub enum ProjectionsCommand {
    /// Throw the projections away and build them from the ledger. Nothing may be running on the
    /// data folder.
    Rebuild {
        #[command(flatten)]
        node: Box<super::up::NodeArgs>,
        /// Use this NATS server for the log instead of the embedded one.
        #[arg(long, env = "DAYBOOK_NATS", hide_env_values = true, value_name = "URL")]
        nats: Option<String>,
    },
    /// How far the server's projections are, and a digest over their rows.
    Show {
        #[command(flatten)]
        server: ServerArgs,
    },
}

pub async fn run(args: ReplayArgs) -> Outcome {
    compare(&Client::new(&args.server)?, !args.quiet).await
}

/// Reads all events of a server, folds them, and compares the digest over every row with the
/// server's.
pub async fn compare(client: &Client, print: bool) -> Outcome {
    let begun = Instant::now();
    let server: Value = client.get("/api/v1/projections", &[]).await?;
    let position = server
        .get("position")
        .and_then(Value::as_u64)
        .ok_or_else(|| {
            Failure::new(
                Code::Failure,
                "unexpected_answer",
                "the server does not say its position",
            )
        })?;
    let theirs = server
        .get("digest")
        .and_then(Value::as_str)
        .unwrap_or_default()
        .to_owned();

    let log: Arc<dyn EventLog> = Arc::new(RemoteLog::fetch(client, position, print).await?);
    let projections = Projections::in_memory();
    replay::fold_to(
        &projections,
        &log,
        daybook_events::Position(position),
        |_| {},
    )
    .await
    .map_err(|e| Failure::new(Code::Mismatch, "ledger_unreadable", e.to_string()))?;
    let (_, ours) = projections
        .digest()
        .map_err(|e| Failure::new(Code::Failure, "digest", e.to_string()))?;
    let counters = projections.counters();
    let same = ours.as_str() == theirs;
    if output::is_json() {
        output::json(&json!({
            "position": position, "same": same, "digest": ours.to_string(), "server_digest": theirs,
            "void": counters.void, "unknown": counters.unknown, "unreadable": counters.unreadable,
        }));
    } else {
        let style = output::style();
        output::line("");
        output::line(&format!(
            "{position} events folded anew in {:.2} s: {} void, {} unknown, {} unreadable",
            begun.elapsed().as_secs_f64(),
            counters.void,
            counters.unknown,
            counters.unreadable
        ));
        output::line(&format!("here    {ours}"));
        output::line(&format!("server  {theirs}"));
        if same {
            output::line(&style.good(
                "the same: every row that the server answers from follows from the ledger, and nothing else",
            ));
        } else {
            output::line(
                &style.error("different: what the server says does not follow from its ledger"),
            );
        }
    }
    if same {
        Ok(Code::Success)
    } else {
        Err(Failure::new(
            Code::Mismatch,
            "projections_differ",
            "the server's projections are not what its ledger folds to",
        )
        .hint("compare the versions of client and server; then run `daybook projections rebuild` on the server"))
    }
}

pub async fn projections(command: ProjectionsCommand) -> Outcome {
    match command {
        ProjectionsCommand::Show { server } => {
            let answer: Value = Client::new(&server)?
                .get("/api/v1/projections", &[])
                .await?;
            output::json(&answer);
            Ok(Code::Success)
        }
        ProjectionsCommand::Rebuild { node, nats } => {
            let mut options = node.options()?;
            options.nats = nats;
            let data = options.data.clone();
            let (log, _) = crate::node::open_log(&options, &data).await?;
            let begun = Instant::now();
            let head = log
                .head()
                .await
                .map_err(|e| Failure::new(Code::Failure, "log_unavailable", e.to_string()))?;
            let bar = progress_bar(head.0);
            let rebuilt =
                replay::rebuild(&data.join("projections"), &log, |p| bar.set_position(p.0))
                    .await
                    .map_err(|e| {
                        let mut text = e.to_string();
                        if let Some(source) = std::error::Error::source(&e) {
                            text = format!("{text}: {source}");
                        }
                        Failure::new(Code::Failure, "rebuild_failed", text).hint(
                            "stop `daybook up` first; nothing may use the data folder meanwhile",
                        )
                    })?;
            bar.finish_and_clear();
            if output::is_json() {
                output::json(&rebuilt);
            } else {
                output::line(&format!(
                    "rebuilt from {} events in {:.2} s: {}",
                    rebuilt.position,
                    begun.elapsed().as_secs_f64(),
                    rebuilt.digest
                ));
            }
            Ok(Code::Success)
        }
    }
}

fn progress_bar(length: u64) -> indicatif::ProgressBar {
    if output::is_json() {
        return indicatif::ProgressBar::hidden();
    }
    // It shows itself on a terminal only.
    let bar = indicatif::ProgressBar::new(length);
    if let Ok(style) = indicatif::ProgressStyle::with_template(
        "{bar:40} {pos}/{len} events, {per_sec}, {eta} left",
    ) {
        bar.set_style(style);
    }
    bar
}
