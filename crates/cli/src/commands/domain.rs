//! `daybook domain`: hostnames that their owners bring along.

use std::time::{Duration, Instant};

use clap::{Args, Subcommand};
use reqwest::Method;
use serde_json::{Value, json};

use super::manage::segment;
use super::routes::instance;
use super::{Outcome, ServerArgs};
use crate::client::Client;
use crate::exit::{Code, Failure};
use crate::output::{self, Row, Table};

/// How long a command waits for the workers to route a hostname, or to take it out.
const PATIENCE: Duration = Duration::from_secs(15);

/// Bring hostnames of your own along, such as `www.example.com`.
#[derive(Debug, Subcommand)]
pub enum DomainCommand {
    /// Claim a hostname for a service: it leads to whatever is its main deployment.
    ///
    /// No other service, and no other project, can have it then. In the live environment it moves
    /// with the service's live address, elsewhere with the environment's, in the same switch: also
    /// when traffic is shared, or rolled back. To let requests arrive, point the name at the
    /// gateway in your DNS. A hostname that is claimed before the first deployment waits for it.
    Add(DomainArgs),
    /// Give a hostname up: it leads nowhere then, and anybody may claim it.
    ///
    /// Deleting an environment gives up the hostnames of its services.
    Remove(DomainArgs),
    /// The hostnames of a project: claimed, routed, or being given up (releasing).
    List(ListArgs),
}

/// Which hostname.
#[derive(Debug, Args)]
pub struct DomainArgs {
    #[command(flatten)]
    server: ServerArgs,
    /// The service instance, as `project.environment.service`.
    instance: String,
    /// The hostname, such as `www.example.com`; a name with other letters as DNS has it (`xn--…`).
    hostname: String,
    /// Do not wait until the workers have done it.
    #[arg(long)]
    detach: bool,
}

/// Whose hostnames.
#[derive(Debug, Args)]
pub struct ListArgs {
    #[command(flatten)]
    server: ServerArgs,
    /// The project.
    project: String,
}

pub async fn run(command: DomainCommand) -> Outcome {
    match command {
        DomainCommand::Add(args) => add(args).await,
        DomainCommand::Remove(args) => remove(args).await,
        DomainCommand::List(args) => list(args).await,
    }
}

fn text<'a>(value: &'a Value, name: &str) -> &'a str {
    value[name].as_str().unwrap_or_default()
}

async fn domains(client: &Client, project: &str) -> Result<Vec<Value>, Failure> {
    let path = format!("/api/v1/projects/{}/domains", segment(project)?);
    let found: Value = client.get(&path, &[]).await?;
    Ok(found["domains"].as_array().cloned().unwrap_or_default())
}

/// Waits until a hostname has this status, or is gone, as long as that is worth it; the last that
/// was seen of it.
async fn wait(
    client: &Client,
    project: &str,
    hostname: &str,
    status: Option<&str>,
) -> Result<Option<Value>, Failure> {
    let begun = Instant::now();
    loop {
        let all = domains(client, project).await?;
        let found = all.into_iter().find(|d| text(d, "hostname") == hostname);
        let seen = found.as_ref().map(|d| text(d, "status"));
        if seen.is_none() || seen == status || begun.elapsed() > PATIENCE {
            return Ok(found);
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

async fn add(args: DomainArgs) -> Outcome {
    let client = Client::new(&args.server)?;
    let instance = instance(&args.instance)?;
    let project = instance.project.as_str();
    let body = json!({ "hostname": args.hostname, "instance_id": instance.to_string() });
    let mut domain = client
        .post(&format!("/api/v1/projects/{project}/domains"), &body)
        .await?;
    if !args.detach {
        let hostname = text(&domain, "hostname").to_owned();
        let seen = wait(&client, project, &hostname, Some("routed")).await?;
        domain = seen
            .filter(|d| text(d, "status") != "releasing")
            .ok_or_else(|| {
                Failure::new(
                    Code::Refused,
                    "domain_given_up",
                    format!("{hostname} could not be routed, and was given up"),
                )
                .hint("`daybook audit` says why; claim it again then")
            })?;
    }
    if output::is_json() {
        output::json(&domain);
    } else {
        output::line(&format!(
            "{} {} belongs to {instance} ({}); let its name lead to the gateway",
            output::style().good(text(&domain, "status")),
            text(&domain, "hostname"),
            text(&domain, "stickiness"),
        ));
    }
    Ok(Code::Success)
}

async fn remove(args: DomainArgs) -> Outcome {
    let client = Client::new(&args.server)?;
    let instance = instance(&args.instance)?;
    let project = instance.project.as_str();
    let hostname = args.hostname.to_ascii_lowercase();
    let mut known = domains(&client, project).await?.into_iter();
    if let Some(known) = known.find(|d| text(d, "hostname") == hostname)
        && text(&known, "instance_id") != instance.to_string()
    {
        let owner = text(&known, "instance_id");
        let message = format!("{hostname} belongs to {owner}, not to {instance}");
        return Err(
            Failure::new(Code::Refused, "other_instance", message).hint(format!(
                "give it up with `daybook domain remove {owner} {hostname}`"
            )),
        );
    }
    let path = format!("/api/v1/projects/{project}/domains/{}", segment(&hostname)?);
    let answer: Value = client
        .command(Method::DELETE, &path, &json!({}), None)
        .await?;
    let left = match args.detach {
        true => None,
        false => wait(&client, project, &hostname, None).await?,
    };
    if output::is_json() {
        output::json(&answer);
    } else if left.is_some() || args.detach {
        output::line(&format!("{hostname} is being given up"));
    } else {
        output::line(&format!("{hostname} is free"));
    }
    Ok(Code::Success)
}

async fn list(args: ListArgs) -> Outcome {
    let client = Client::new(&args.server)?;
    let found = domains(&client, &args.project).await?;
    if output::is_json() {
        output::json(&json!({ "domains": found }));
        return Ok(Code::Success);
    }
    let mut table = Table::new(["HOSTNAME", "SERVICE", "STICKS TO", "STATUS", "SINCE"]);
    for domain in &found {
        let since = text(domain, "since");
        table.row(Row::new([
            text(domain, "hostname").to_owned(),
            text(domain, "instance_id").to_owned(),
            text(domain, "stickiness").to_owned(),
            text(domain, "status").to_owned(),
            since
                .parse()
                .map_or_else(|_| since.to_owned(), output::time),
        ]));
    }
    table.print();
    Ok(Code::Success)
}
