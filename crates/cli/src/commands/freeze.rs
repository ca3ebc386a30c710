//! `daybook freeze`: when nothing new is brought to an environment.

use clap::{ArgGroup, Args, Subcommand};
use daybook_events::freeze::{Day, WindowLength};
use jiff::civil::{DateTime, Time};
use reqwest::Method;
use serde_json::{Value, json};

use super::lifecycle::find;
use super::manage::segment;
use super::{Outcome, ServerArgs};
use crate::client::Client;
use crate::exit::{Code, Failure};
use crate::output::{self, Row, Table};

/// Say when nothing new is brought to an environment.
///
/// While a window is open, what is deployed to the environment is accepted and waits for its end;
/// of several that wait for a service, the newest goes then. Changes of traffic, scale and variables
/// by hand are refused. `daybook rollback`, and a redeploy of what was live before, are always
/// possible.
#[derive(Debug, Subcommand)]
pub enum FreezeCommand {
    /// Give an environment a window, or another one of that name.
    Add(Box<AddArgs>),
    /// The windows of an environment, and which of them are open.
    List {
        #[command(flatten)]
        environment: EnvironmentArgs,
    },
    /// Take a window away: what waits for its end goes on.
    Remove {
        #[command(flatten)]
        environment: EnvironmentArgs,
        /// The window.
        name: String,
        /// Why, for the ledger.
        #[arg(long)]
        reason: Option<String>,
    },
    /// Let one deployment through in an emergency; somebody else reviews it later.
    Override {
        #[command(flatten)]
        server: ServerArgs,
        /// The deployment: its id, or the end of it as `daybook status` shows it.
        deployment: String,
        /// Why, for the ledger.
        #[arg(long)]
        reason: Option<String>,
    },
}

/// Whose windows.
#[derive(Debug, Args)]
pub struct EnvironmentArgs {
    #[command(flatten)]
    server: ServerArgs,
    /// The project.
    project: String,
    /// The environment.
    environment: String,
}

/// A window.
#[derive(Debug, Args)]
#[command(group(ArgGroup::new("when").required(true).args(["from", "weekly"])))]
pub struct AddArgs {
    #[command(flatten)]
    environment: EnvironmentArgs,
    /// The window's name: lowercase letters, digits and hyphens.
    name: String,
    /// When it begins, once: 2026-12-20T00:00.
    #[arg(long, value_name = "TIME", value_parser = date_time)]
    from: Option<DateTime>,
    /// When it ends; only by `daybook freeze remove` if not given.
    #[arg(long, value_name = "TIME", value_parser = date_time, requires = "from")]
    to: Option<DateTime>,
    /// The days on which it begins, every week: fri, or mon,tue.
    #[arg(long, value_name = "DAYS", value_delimiter = ',', requires_all = ["at", "length"])]
    weekly: Vec<Day>,
    /// When it begins on these days: 16:00.
    #[arg(long, value_name = "TIME", value_parser = time, requires = "weekly")]
    at: Option<Time>,
    /// How long it lasts on the clock on the wall: 90m, 64h, 2d.
    #[arg(long = "for", value_name = "LENGTH", requires = "weekly")]
    length: Option<WindowLength>,
    /// The time zone of these times.
    #[arg(long, value_name = "ZONE", default_value = "UTC")]
    zone: String,
    /// Why, for those who have to wait.
    #[arg(long)]
    reason: Option<String>,
}

fn date_time(text: &str) -> Result<DateTime, String> {
    let parsed = text.replace(' ', "T").parse();
    parsed.map_err(|_| "use a time such as 2026-12-20T00:00".to_owned())
}

fn time(text: &str) -> Result<Time, String> {
    text.parse()
        .map_err(|_| "use a time such as 16:00".to_owned())
}

impl EnvironmentArgs {
    fn path(&self) -> Result<String, Failure> {
        let (project, environment) = (segment(&self.project)?, segment(&self.environment)?);
        Ok(format!(
            "/api/v1/projects/{project}/environments/{environment}/freezes"
        ))
    }
}

pub async fn run(command: FreezeCommand) -> Outcome {
    match command {
        FreezeCommand::Add(args) => add(*args).await,
        FreezeCommand::List { environment } => list(environment).await,
        FreezeCommand::Remove {
            environment,
            name,
            reason,
        } => remove(environment, &name, reason).await,
        FreezeCommand::Override {
            server,
            deployment,
            reason,
        } => let_through(&server, &deployment, reason).await,
    }
}

async fn add(args: AddArgs) -> Outcome {
    let client = Client::new(&args.environment.server)?;
    let rule = match args.from {
        Some(from) => json!({ "once": { "from": from, "until": args.to, "zone": args.zone } }),
        None => json!({ "weekly": {
            "days": args.weekly,
            "at": args.at,
            "length": args.length,
            "zone": args.zone,
        } }),
    };
    let path = format!("{}/{}", args.environment.path()?, segment(&args.name)?);
    let body = json!({ "rule": rule, "reason": args.reason });
    let answer: Value = client.command(Method::PUT, &path, &body, None).await?;
    if output::is_json() {
        output::json(&answer);
        return Ok(Code::Success);
    }
    let environment = &args.environment.environment;
    let word = if answer["open"] == true {
        format!("{environment} is {}", output::style().warn("frozen"))
    } else {
        format!("{environment} will be frozen")
    };
    output::line(&format!("{word} {}", text(&answer, "when")));
    Ok(Code::Success)
}

async fn list(args: EnvironmentArgs) -> Outcome {
    let answer: Value = Client::new(&args.server)?.get(&args.path()?, &[]).await?;
    if output::is_json() {
        output::json(&answer);
        return Ok(Code::Success);
    }
    let found = answer["freezes"].as_array().cloned().unwrap_or_default();
    if found.is_empty() {
        output::line("nothing freezes this environment");
        return Ok(Code::Success);
    }
    let mut table = Table::new(["NAME", "WHEN", "OPEN", "FROM", "UNTIL", "REASON"]);
    for freeze in &found {
        table.row(Row::new([
            text(freeze, "name"),
            text(freeze, "when"),
            if freeze["open"] == true { "yes" } else { "no" }.to_owned(),
            text(freeze, "from"),
            text(freeze, "until"),
            text(freeze, "reason"),
        ]));
    }
    table.print();
    Ok(Code::Success)
}

async fn remove(args: EnvironmentArgs, name: &str, reason: Option<String>) -> Outcome {
    let client = Client::new(&args.server)?;
    let path = format!("{}/{}", args.path()?, segment(name)?);
    let body = json!({ "reason": reason });
    let answer: Value = client.command(Method::DELETE, &path, &body, None).await?;
    if output::is_json() {
        output::json(&answer);
    } else {
        let environment = &args.environment;
        output::line(&format!("{environment} is not frozen by {name} any more"));
    }
    Ok(Code::Success)
}

async fn let_through(server: &ServerArgs, deployment: &str, reason: Option<String>) -> Outcome {
    let client = Client::new(server)?;
    let id = find(&client, deployment).await?;
    let path = format!("/api/v1/deployments/{id}/override-freeze");
    let body = json!({ "reason": reason });
    let answer: Value = client.post(&path, &body).await?;
    if output::is_json() {
        output::json(&answer);
    } else {
        let word = output::style().good("overridden");
        output::line(&format!(
            "{word} {id}; once looked at by somebody else: `daybook approvals review {id}`"
        ));
    }
    Ok(Code::Success)
}

fn text(value: &Value, name: &str) -> String {
    value[name].as_str().unwrap_or_default().to_owned()
}
