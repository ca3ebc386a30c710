//! `daybook template`: services from a catalogue.

use clap::{Args, Subcommand};
use daybook_events::without_credentials;
use serde_json::{Map, Value, json};

use super::deploy::{Follow, follow};
use super::manage::segment;
use super::{Outcome, ServerArgs};
use crate::client::Client;
use crate::exit::{Code, Failure};
use crate::output::{self, Row, Table};

/// Make services from a catalogue.
///
/// A template is a service's definition with parameters. Deploying one resolves it first: what it
/// was resolved to is the definition of the service from then on, and is deployed like any other.
/// Beside the templates that come with Daybook there are those of the server's `--templates DIR`.
#[derive(Debug, Subcommand)]
pub enum TemplateCommand {
    /// The catalogue.
    List {
        #[command(flatten)]
        server: ServerArgs,
    },
    /// What a template makes, and what can be said about it.
    Show {
        #[command(flatten)]
        server: ServerArgs,
        /// The template.
        name: String,
    },
    /// Make a service of a template, and deploy it.
    Deploy(DeployArgs),
}

/// What becomes of a template.
#[derive(Debug, Args)]
pub struct DeployArgs {
    #[command(flatten)]
    server: ServerArgs,
    /// The template.
    name: String,
    /// What it becomes: `project.environment.service`.
    instance: String,
    /// The value of a parameter; may be given several times.
    #[arg(long = "set", value_name = "NAME=VALUE")]
    parameters: Vec<String>,
    /// Why, for the ledger.
    #[arg(long)]
    reason: Option<String>,
    /// Return as soon as it is accepted.
    #[arg(long)]
    detach: bool,
}

pub async fn run(command: TemplateCommand) -> Outcome {
    match command {
        TemplateCommand::List { server } => list(&Client::new(&server)?).await,
        TemplateCommand::Show { server, name } => show(&Client::new(&server)?, &name).await,
        TemplateCommand::Deploy(args) => deploy(args).await,
    }
}

fn text(value: &Value, name: &str) -> String {
    value[name].as_str().unwrap_or_default().to_owned()
}

async fn list(client: &Client) -> Outcome {
    let answer: Value = client.get("/api/v1/templates", &[]).await?;
    if output::is_json() {
        output::json(&answer);
        return Ok(Code::Success);
    }
    let mut table = Table::new(["NAME", "VERSION", "FROM", "DESCRIPTION"]);
    for entry in answer["templates"].as_array().into_iter().flatten() {
        let from = match entry["shelf"].as_str() {
            Some("folder") => "this server",
            _ => "Daybook",
        };
        table.row(Row::new([
            text(entry, "name"),
            text(entry, "version"),
            from.to_owned(),
            text(entry, "description"),
        ]));
    }
    table.print();
    Ok(Code::Success)
}

async fn show(client: &Client, name: &str) -> Outcome {
    let path = format!("/api/v1/templates/{}", segment(name)?);
    let shown: Value = client.get(&path, &[]).await?;
    if output::is_json() {
        output::json(&shown);
        return Ok(Code::Success);
    }
    let style = output::style();
    output::line(&format!(
        "{} {} {}",
        style.bold(&text(&shown, "name")),
        text(&shown, "version"),
        style.dim(&text(&shown, "digest"))
    ));
    output::line(&text(&shown, "description"));
    let field = |label: &str, value: String| {
        output::line(&format!("  {} {value}", style.dim(&format!("{label:<10}"))));
    };
    for (name, parameter) in shown["parameters"].as_object().into_iter().flatten() {
        let default = match parameter["default"].as_str() {
            Some("") => " (empty if not given)".to_owned(),
            Some(default) => format!(" ({default} if not given)"),
            None => " (has to be given)".to_owned(),
        };
        field(
            "parameter",
            format!("{name}: {}{default}", text(parameter, "description")),
        );
    }
    for (name, secret) in shown["secrets"].as_object().into_iter().flatten() {
        let made = match secret["generate"].as_u64() {
            Some(_) => "made at random if not set",
            None => "to be set before",
        };
        field(
            "secret",
            format!("{name}: {} ({made})", text(secret, "description")),
        );
    }
    let volumes = shown.pointer("/service/run/volumes");
    for (name, volume) in volumes.and_then(Value::as_object).into_iter().flatten() {
        field("volume", format!("{name}: {}", text(volume, "path")));
    }
    Ok(Code::Success)
}

async fn deploy(args: DeployArgs) -> Outcome {
    let client = Client::new(&args.server)?;
    let mut parameters = Map::new();
    for given in &args.parameters {
        let Some((name, value)) = given.split_once('=') else {
            return Err(Failure::new(
                Code::Usage,
                "invalid_parameter",
                format!("{:?} is not NAME=VALUE", without_credentials(given)),
            ));
        };
        parameters.insert(name.to_owned(), value.into());
    }
    let path = format!("/api/v1/templates/{}/deploy", segment(&args.name)?);
    let body = json!({
        "instance_id": args.instance,
        "parameters": parameters,
        "reason": args.reason,
    });
    let answer: Value = client.post(&path, &body).await?;
    let id = text(&answer, "id");
    if args.detach {
        if output::is_json() {
            output::json(&answer);
        } else {
            output::line(&format!("{id} is being deployed"));
        }
        return Ok(Code::Success);
    }
    follow(&client, &id, Follow::Deployment).await
}
