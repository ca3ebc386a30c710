//! `daybook approvals`: what waits to be allowed, and who allows it.

use clap::{Args, Subcommand};
use serde_json::{Value, json};

use super::lifecycle::find;
use super::{Outcome, ServerArgs};
use crate::client::Client;
use crate::exit::{Code, Failure};
use crate::output::{self, Row, Table};

/// Look at plans that wait to be allowed, and decide about them.
#[derive(Debug, Subcommand)]
pub enum ApprovalsCommand {
    /// What waits to be allowed, and emergencies that wait to be reviewed.
    List {
        #[command(flatten)]
        server: ServerArgs,
        /// Only this project.
        #[arg(long, short, env = "DAYBOOK_PROJECT")]
        project: Option<String>,
        /// Only this environment.
        #[arg(long, short)]
        env: Option<String>,
    },
    /// Exactly what a deployment will change, and who has allowed it.
    Show {
        #[command(flatten)]
        server: ServerArgs,
        /// The deployment: its id, or the end of it as `daybook status` shows it.
        deployment: String,
    },
    /// Allow a plan. Not for who asked for the deployment or wrote its commit.
    Approve(PlanArgs),
    /// Do not allow a plan: its deployment fails.
    Reject(ReasonArgs),
    /// Go ahead in an emergency; somebody else reviews it later.
    Override(PlanArgs),
    /// Say that you have looked at what was done in an emergency.
    Review(ReasonArgs),
}

/// A decision about a plan.
#[derive(Debug, Args)]
pub struct PlanArgs {
    #[command(flatten)]
    server: ServerArgs,
    /// The deployment: its id, or the end of it as `daybook status` shows it.
    deployment: String,
    /// The plan's hash, as `daybook approvals show` prints it; what it is now if not given.
    #[arg(long, value_name = "HASH")]
    plan: Option<String>,
    /// Why, for the ledger.
    #[arg(long)]
    reason: Option<String>,
}

/// A decision with a reason.
#[derive(Debug, Args)]
pub struct ReasonArgs {
    #[command(flatten)]
    server: ServerArgs,
    /// The deployment: its id, or the end of it as `daybook status` shows it.
    deployment: String,
    /// Why, for the ledger.
    #[arg(long)]
    reason: Option<String>,
}

pub async fn run(command: ApprovalsCommand) -> Outcome {
    match command {
        ApprovalsCommand::List {
            server,
            project,
            env,
        } => list(&Client::new(&server)?, project, env).await,
        ApprovalsCommand::Show { server, deployment } => {
            let client = Client::new(&server)?;
            let id = find(&client, &deployment).await?;
            let shown = approval(&client, &id).await?;
            if output::is_json() {
                output::json(&shown);
            } else {
                print(&shown);
            }
            Ok(Code::Success)
        }
        ApprovalsCommand::Approve(args) => on_plan("approve", args).await,
        ApprovalsCommand::Override(args) => on_plan("override", args).await,
        ApprovalsCommand::Reject(args) => with_reason("reject", args).await,
        ApprovalsCommand::Review(args) => with_reason("review", args).await,
    }
}

async fn approval(client: &Client, id: &str) -> Result<Value, Failure> {
    let path = format!("/api/v1/deployments/{id}/approval");
    client.get(&path, &[]).await
}

async fn on_plan(verb: &str, args: PlanArgs) -> Outcome {
    let client = Client::new(&args.server)?;
    let id = find(&client, &args.deployment).await?;
    let hash = match args.plan {
        Some(hash) => hash,
        None => text(&approval(&client, &id).await?, "/hash"),
    };
    let body = json!({ "hash": hash, "reason": args.reason });
    let done = decide(&client, verb, &id, &body).await?;
    if !output::is_json() {
        output::line(&format!("the plan is {hash}"));
    }
    Ok(done)
}

async fn with_reason(verb: &str, args: ReasonArgs) -> Outcome {
    let client = Client::new(&args.server)?;
    let id = find(&client, &args.deployment).await?;
    decide(&client, verb, &id, &json!({ "reason": args.reason })).await
}

async fn decide(client: &Client, verb: &str, id: &str, body: &Value) -> Outcome {
    let path = format!("/api/v1/deployments/{id}/{verb}");
    let answer = client.post(&path, body).await?;
    if output::is_json() {
        output::json(&answer);
    } else {
        let word = output::style().good(&text(&answer, "/status"));
        output::line(&format!("{word} {id}"));
    }
    Ok(Code::Success)
}

async fn list(client: &Client, project: Option<String>, env: Option<String>) -> Outcome {
    let query = [("project", project), ("environment", env)];
    let answer: Value = client.get("/api/v1/approvals", &query).await?;
    if output::is_json() {
        output::json(&answer);
        return Ok(Code::Success);
    }
    let found = answer["approvals"].as_array().cloned().unwrap_or_default();
    let let_through = answer["let_through"].as_array();
    let let_through = let_through.cloned().unwrap_or_default();
    if found.is_empty() && let_through.is_empty() {
        output::line("nothing waits to be allowed or reviewed");
        return Ok(Code::Success);
    }
    let mut table = Table::new(["DEPLOYMENT", "SERVICE", "BY", "WAITS FOR", "PLAN", "UNTIL"]);
    for one in &found {
        let waits = if one["waits"] == true {
            format!(
                "{} of {} approvals",
                grants(one).len(),
                text(one, "/plan/rule/required")
            )
        } else {
            "a review".to_owned()
        };
        let id = text(one, "/id");
        table.row(Row::new([
            id.get(28..).unwrap_or(&id).to_owned(),
            text(one, "/instance_id"),
            text(one, "/requester"),
            waits,
            text(one, "/hash").chars().take(19).collect(),
            time(&text(one, "/expires")),
        ]));
    }
    for one in &let_through {
        let id = text(one, "/id");
        table.row(Row::new([
            id.get(28..).unwrap_or(&id).to_owned(),
            text(one, "/instance_id"),
            text(one, "/emergency/by"),
            format!("a review: through the freeze {}", text(one, "/freeze")),
            String::new(),
            String::new(),
        ]));
    }
    table.print();
    Ok(Code::Success)
}

fn grants(approval: &Value) -> Vec<String> {
    let grants = approval["grants"].as_array();
    let grants = grants.into_iter().flatten();
    grants.map(|g| text(g, "/approver")).collect()
}

fn print(shown: &Value) {
    let style = output::style();
    let field = |label: &str, value: String| {
        if !value.is_empty() {
            output::line(&format!("  {} {value}", style.dim(&format!("{label:<10}"))));
        }
    };
    output::line(&format!(
        "{} {}",
        style.bold(&text(shown, "/instance_id")),
        text(shown, "/id")
    ));
    field("plan", text(shown, "/hash"));
    field("requester", text(shown, "/requester"));
    field("author", text(shown, "/author"));
    field("source", text(shown, "/plan/source"));
    field("image", text(shown, "/plan/image/digest"));
    field("follows on", text(shown, "/plan/base"));
    let object = |pointer: &str| shown.pointer(pointer).and_then(Value::as_object).cloned();
    for (name, change) in object("/plan/values").unwrap_or_default() {
        let value = |side: &str| match change.get(side) {
            Some(Value::String(value)) => format!("{value:?}"),
            _ => "nothing".to_owned(),
        };
        let line = format!("{name}: {} becomes {}", value("before"), value("after"));
        field("value", line);
    }
    for (hostname, from) in object("/plan/routes").unwrap_or_default() {
        let from: Vec<_> = from
            .as_array()
            .into_iter()
            .flatten()
            .filter_map(Value::as_str)
            .collect();
        let now = match from.is_empty() {
            true => "new".to_owned(),
            false => format!("leads to {} now", from.join(", ")),
        };
        field("route", format!("{hostname}: {now}"));
    }
    let required = text(shown, "/plan/rule/required");
    let granted = grants(shown);
    let names = if granted.is_empty() {
        String::new()
    } else {
        format!(": {}", granted.join(", "))
    };
    field(
        "approvals",
        format!("{} of {required}{names}", granted.len()),
    );
    field("until", time(&text(shown, "/expires")));
    if !text(shown, "/rejected/approver").is_empty() {
        let line = format!(
            "by {}: {}",
            text(shown, "/rejected/approver"),
            text(shown, "/rejected/reason")
        );
        field("rejected", line);
    }
    if !text(shown, "/emergency/by").is_empty() {
        let line = format!(
            "by {}: {}",
            text(shown, "/emergency/by"),
            text(shown, "/emergency/reason")
        );
        field("emergency", line);
        let reviewer = text(shown, "/emergency/review/approver");
        field(
            "reviewed",
            if reviewer.is_empty() {
                "not yet".into()
            } else {
                format!("by {reviewer}")
            },
        );
    }
}

fn text(value: &Value, pointer: &str) -> String {
    match value.pointer(pointer) {
        Some(Value::String(text)) => text.clone(),
        Some(Value::Null) | None => String::new(),
        Some(other) => other.to_string(),
    }
}

/// A time as it is shown; what is no time stays as it is.
fn time(text: &str) -> String {
    text.parse().map_or_else(|_| text.to_owned(), output::time)
}
