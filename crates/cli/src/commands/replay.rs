//! `daybook replay` and `daybook projections`

use std::sync::Arc;
use std::time::{Duration, Instant};

use clap::{Args, Subcommand};
use daybook_events::tree::{PublishedTree, TreeCondition};
use daybook_events::{EventLog, Position};
use daybook_projections::replay::ReplayError;
use daybook_projections::{Moment, Projections, replay};
use daybook_store::tlog::{FolderTree, GuardedLog};
use serde_json::{Value, json};

use super::{Outcome, ServerArgs};
use crate::client::Client;
use crate::exit::{Code, Failure};
use crate::output;
use crate::remote::RemoteLog;
use crate::served_tree::ServedTree;

/// Print the ledger, fold it anew on this machine, and compare with what the server says.
#[derive(Debug, Args)]
pub struct ReplayArgs {
    #[command(flatten)]
    server: ServerArgs,
    /// Only compare; do not print the events.
    #[arg(long, short)]
    quiet: bool,
    /// Only up to there, a position of the ledger or a time such as 2024-01-15T10:30:00Z: the hash
    /// over all states is compared with what the server says it was then.
    #[arg(long, value_name = "POSITION|TIME")]
    at: Option<Moment>,
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
    let client = Client::new(&args.server)?;
    match args.at {
        None => compare(&client, !args.quiet).await,
        Some(at) => compare_past(&client, at, !args.quiet).await,
    }
}

/// How often, and after which pause, a server is asked for a state hash that it still works out.
const HASH_TRIES: u32 = 100;
const HASH_PAUSE: Duration = Duration::from_millis(100);

/// Folds the events of a server up to a moment, and compares the state hash with the server's.
async fn compare_past(client: &Client, at: Moment, print: bool) -> Outcome {
    let query = [
        ("at", Some(at.to_string())),
        ("limit", Some("1".to_owned())),
    ];
    let mut tries = 0;
    let (position, theirs) = loop {
        let state: Value = client.get("/api/v1/state", &query).await?;
        let position = state.get("position").and_then(Value::as_u64);
        let hash = state.get("state_hash").and_then(Value::as_str);
        match (position, hash) {
            (Some(position), Some(hash)) => break (position, hash.to_owned()),
            _ if tries < HASH_TRIES => tokio::time::sleep(HASH_PAUSE).await,
            _ => {
                return Err(Failure::new(
                    Code::Failure,
                    "unexpected_answer",
                    "the server does not say its state hash",
                )
                .hint("its log says why: look for `no state hash`"));
            }
        }
        tries += 1;
    };
    let projections = fold(client, position, print).await?;
    let ours = projections.state_hash().1.to_string();
    let same = ours == theirs;
    if output::is_json() {
        output::json(&json!({
            "position": position, "same": same,
            "state_hash": ours, "server_state_hash": theirs,
        }));
    } else {
        let style = output::style();
        output::line("");
        output::line(&format!("the states after event {position}"));
        output::line(&format!("here    {ours}"));
        output::line(&format!("server  {theirs}"));
        output::line(&if same {
            style.good("the same: what the server says of that moment follows from the ledger")
        } else {
            style.error(
                "different: what the server says of that moment does not follow from its ledger",
            )
        });
    }
    if same {
        return Ok(Code::Success);
    }
    Err(Failure::new(
        Code::Mismatch,
        "states_differ",
        "the server's states of that moment are not what its ledger folds to",
    )
    .hint("compare the versions of client and server; then run `daybook projections rebuild` on the server"))
}

/// Reads the events of a server up to a position, and folds them.
async fn fold(client: &Client, position: u64, print: bool) -> Result<Projections, Failure> {
    let log: Arc<dyn EventLog> = Arc::new(RemoteLog::fetch(client, position, print).await?);
    let projections = Projections::in_memory();
    replay::fold_to(&projections, &log, Position(position), |_| {})
        .await
        .map_err(|e| Failure::new(Code::Mismatch, "ledger_unreadable", e.to_string()))?;
    Ok(projections)
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

    let their_states = server.get("state_hash").and_then(Value::as_str);
    let projections = fold(client, position, print).await?;
    let our_states = projections.state_hash().1.to_string();
    let (_, ours) = projections
        .digest()
        .map_err(|e| Failure::new(Code::Failure, "digest", e.to_string()))?;
    let counters = projections.counters();
    // The digest is over the rows that the states are in, so the hash cannot differ alone.
    let same = ours.as_str() == theirs && their_states.is_none_or(|hash| hash == our_states);
    if output::is_json() {
        output::json(&json!({
            "position": position, "same": same, "digest": ours.to_string(), "server_digest": theirs,
            "state_hash": our_states, "server_state_hash": their_states,
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
        output::line(&format!("states  {our_states}"));
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
            // Where an event was lost, the tree says whether that is recorded.
            let tree: Arc<dyn PublishedTree> = match &options.tlog_url {
                Some(url) => ServedTree::open(url).await?,
                None => Arc::new(FolderTree::new(options.tlog_folder(&data))),
            };
            if options.tlog_url.is_some() && tree.head().is_none() {
                let why = match tree.condition() {
                    TreeCondition::Unknown(why) => why,
                    _ => "the server has published no checkpoint yet".to_owned(),
                };
                return Err(
                    Failure::new(Code::Unreachable, "tlog_unreachable", why).hint(
                        "--tlog-url is asked which events are recorded as lost: it must answer",
                    ),
                );
            }
            let log: Arc<dyn EventLog> = Arc::new(GuardedLog::at_rest(log, tree));
            let begun = Instant::now();
            let head = log
                .head()
                .await
                .map_err(|e| Failure::new(Code::Failure, "log_unavailable", e.to_string()))?;
            let bar = progress_bar(head.0);
            let failed = |e: ReplayError| {
                let text = daybook_events::with_causes(&e);
                Failure::new(Code::Failure, "rebuild_failed", text)
                    .hint("stop `daybook up` first; nothing may use the data folder meanwhile")
            };
            let mut folders = crate::node::projection_folders(&data);
            let first = folders.next().unwrap_or_else(|| data.join("projections"));
            let rebuilt = replay::rebuild(&first, &log, |p| bar.set_position(p.0)).await;
            let rebuilt = rebuilt.map_err(failed)?;
            // Those of further processes that shared the folder.
            let mut others = 0;
            for folder in folders.filter(|folder| folder.is_dir()) {
                let rebuilt = replay::rebuild(&folder, &log, |p| bar.set_position(p.0)).await;
                rebuilt.map_err(failed)?;
                others += 1;
            }
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
                if others > 0 {
                    output::line(&format!(
                        "and those of {others} more processes that shared the folder"
                    ));
                }
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
