//! `daybook scale` and `daybook config`: how a service instance runs.

use std::time::Duration;

use clap::{Args, Subcommand};
use daybook_events::without_credentials;
use serde_json::{Map, Value, json};

use super::deploy::{Follow, follow};
use super::manage::segment;
use super::{Outcome, ServerArgs};
use crate::client::Client;
use crate::exit::{Code, Failure};
use crate::output::{self, Row, Table};

/// How often it is asked how many instances there are.
const ASK_EVERY: Duration = Duration::from_millis(200);

/// Runs another number of instances.
///
/// The main deployment is scaled where it runs, by one GitOps commit; later deployments of the
/// service in this environment have as many.
#[derive(Debug, Args)]
pub struct ScaleArgs {
    #[command(flatten)]
    server: ServerArgs,
    /// The service instance: `project.environment.service`.
    instance: String,
    /// Instances in each cluster: 1 to 100.
    #[arg(long, value_name = "N")]
    replicas: u32,
    /// Why, for the ledger.
    #[arg(long)]
    reason: Option<String>,
    /// Return as soon as it is accepted.
    #[arg(long)]
    detach: bool,
}

/// Change the environment variables of a service instance.
///
/// A change deploys what runs already once more, with the same image: `daybook rollback` goes back
/// to the variables before. Later deployments have them too. Values are in the ledger and in the
/// GitOps repository; what is secret belongs into `daybook secret set`.
#[derive(Debug, Subcommand)]
pub enum ConfigCommand {
    /// Give variables a value.
    Set {
        #[command(flatten)]
        change: ChangeArgs,
        /// The variables.
        #[arg(required = true, value_name = "KEY=VALUE")]
        variables: Vec<String>,
    },
    /// Take variables away.
    Unset {
        #[command(flatten)]
        change: ChangeArgs,
        /// The variables.
        #[arg(required = true, value_name = "KEY")]
        variables: Vec<String>,
    },
    /// List the variables of what runs.
    List {
        #[command(flatten)]
        server: ServerArgs,
        /// The service instance: `project.environment.service`.
        instance: String,
    },
}

/// What is changed, and how it is waited for.
#[derive(Debug, Args)]
pub struct ChangeArgs {
    #[command(flatten)]
    server: ServerArgs,
    /// The service instance: `project.environment.service`.
    instance: String,
    /// Why, for the ledger.
    #[arg(long)]
    reason: Option<String>,
    /// Return as soon as it is accepted.
    #[arg(long)]
    detach: bool,
}

pub async fn scale(args: ScaleArgs) -> Outcome {
    let client = Client::new(&args.server)?;
    let body = json!({
        "instance_id": args.instance,
        "replicas": args.replicas,
        "reason": args.reason,
    });
    let answer = client.post("/api/v1/scale", &body).await?;
    let id = answer["id"].as_str().unwrap_or_default().to_owned();
    if args.detach {
        print(
            &answer,
            &format!("{id} is being scaled to {}", args.replicas),
        );
        return Ok(Code::Success);
    }
    let path = format!("/api/v1/deployments/{id}");
    loop {
        let detail: Value = client.get(&path, &[]).await?;
        let clusters = detail["cluster_status"].as_array().cloned();
        let clusters = clusters.unwrap_or_default();
        let wanted = |c: &Value| c["wanted"].as_u64() == Some(args.replicas.into());
        if detail["state"] != "started" {
            let state = detail["state"].as_str().unwrap_or_default();
            return Err(Failure::new(
                Code::Refused,
                "not_scaled",
                format!("{id} is {state} meanwhile"),
            )
            .hint(format!("look at it with `daybook status {id}`")));
        }
        if clusters.iter().all(|c| wanted(c) && c["ready"] == true) {
            let style = output::style();
            print(
                &detail,
                &format!(
                    "{} {id} runs {} instances in each of its clusters",
                    style.good("scaled"),
                    args.replicas
                ),
            );
            return Ok(Code::Success);
        }
        let problem = clusters
            .iter()
            .filter(|c| wanted(c))
            .find(|c| c["problem"]["transient"] == false);
        if let Some(cluster) = problem {
            let text = |key: &str| cluster["problem"][key].as_str().unwrap_or_default();
            return Err(Failure::new(
                Code::DeploymentFailed,
                "not_scaled",
                format!(
                    "{}: {}",
                    cluster["cluster"].as_str().unwrap_or_default(),
                    text("message")
                ),
            )
            .hint(text("remedy").to_owned()));
        }
        tokio::time::sleep(ASK_EVERY).await;
    }
}

pub async fn run(command: ConfigCommand) -> Outcome {
    match command {
        ConfigCommand::Set { change, variables } => {
            let mut set = Map::new();
            for variable in &variables {
                let Some((key, value)) = variable.split_once('=') else {
                    return Err(Failure::new(
                        Code::Usage,
                        "invalid_variable",
                        format!("{:?} is not KEY=VALUE", without_credentials(variable)),
                    ));
                };
                set.insert(key.to_owned(), value.into());
            }
            change_config(change, json!({ "set": set })).await
        }
        ConfigCommand::Unset { change, variables } => {
            change_config(change, json!({ "unset": variables })).await
        }
        ConfigCommand::List { server, instance } => list(&server, &instance).await,
    }
}

async fn change_config(args: ChangeArgs, mut body: Value) -> Outcome {
    let client = Client::new(&args.server)?;
    body["instance_id"] = args.instance.into();
    body["reason"] = args.reason.into();
    let answer = client.post("/api/v1/config", &body).await?;
    let id = answer["id"].as_str().unwrap_or_default();
    if answer["status"] == "unchanged" {
        print(&answer, &format!("{id} has it so already"));
        return Ok(Code::Success);
    }
    if args.detach {
        print(&answer, &format!("{id} is being deployed"));
        return Ok(Code::Success);
    }
    follow(&client, id, Follow::Deployment).await
}

async fn list(server: &ServerArgs, instance: &str) -> Outcome {
    let client = Client::new(server)?;
    let path = format!("/api/v1/instances/{}", segment(instance)?);
    let found: Value = client.get(&path, &[]).await?;
    let Some(main) = found["main"].as_str() else {
        return Err(Failure::new(
            Code::Refused,
            "nothing_runs",
            format!("{instance} has no main deployment"),
        )
        .hint("deploy it first with `daybook deploy`"));
    };
    let path = format!("/api/v1/deployments/{main}");
    let detail: Value = client.get(&path, &[]).await?;
    let run = &detail["snapshot"]["run"];
    if output::is_json() {
        output::json(&json!({ "deployment": main, "env": run["env"] }));
        return Ok(Code::Success);
    }
    let mut table = Table::new(["VARIABLE", "VALUE"]);
    for (key, value) in run["env"].as_object().into_iter().flatten() {
        let value = value.as_str().unwrap_or_default();
        table.row(Row::new([key.clone(), value.to_owned()]));
    }
    table.print();
    Ok(Code::Success)
}

/// Prints an answer, or says it in words.
fn print(answer: &Value, words: &str) {
    if output::is_json() {
        output::json(answer);
    } else {
        output::line(words);
    }
}
