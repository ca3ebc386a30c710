//! Operations on deployments: `stop`, `start`, `retry`, `terminate`, `cancel`, `delete`, `mark-main`,
//! `rollback`, `redeploy`.

use clap::Args;
use daybook_events::without_credentials;
use reqwest::Method;
use serde_json::{Value, json};

use super::deploy::{Follow, follow};
use super::manage::segment;
use super::{Outcome, ServerArgs};
use crate::client::Client;
use crate::exit::{Code, Failure};
use crate::output;

/// An operation on one deployment.
#[derive(Debug, Args)]
pub struct OperationArgs {
    #[command(flatten)]
    server: ServerArgs,
    /// The deployment: its id, or the end of it as `daybook status` shows it; or the main one of an
    /// instance, `project.environment.service`.
    deployment: String,
    /// Why, for the ledger.
    #[arg(long)]
    reason: Option<String>,
    /// Do not wait until it is done.
    #[arg(long)]
    detach: bool,
}

/// Keeps a deployment whose stop is scheduled.
#[derive(Debug, Args)]
pub struct KeepArgs {
    #[command(flatten)]
    server: ServerArgs,
    /// The deployment: its id, or the end of it as `daybook status` shows it; or the main one of an
    /// instance, `project.environment.service`.
    deployment: String,
    /// Why, for the ledger.
    #[arg(long)]
    reason: Option<String>,
}

/// Tries again in the clusters where a deployment has failed.
#[derive(Debug, Args)]
pub struct RetryArgs {
    #[command(flatten)]
    server: ServerArgs,
    /// The deployment: its id, or the end of it as `daybook status` shows it; or the main one of an
    /// instance, `project.environment.service`.
    deployment: String,
    /// A cluster to try again in, if not in all where it has failed; may be given several times.
    #[arg(long = "cluster", value_name = "NAME")]
    clusters: Vec<String>,
    /// Why, for the ledger.
    #[arg(long)]
    reason: Option<String>,
    /// Do not wait until it is done.
    #[arg(long)]
    detach: bool,
}

/// Gives a deployment the traffic of its service.
#[derive(Debug, Args)]
pub struct MarkMainArgs {
    #[command(flatten)]
    server: ServerArgs,
    /// The deployment: its id, or the end of it as `daybook status` shows it; or the main one of an
    /// instance, `project.environment.service`.
    deployment: String,
    /// What you take for the main deployment now; refused if it is another one by then.
    #[arg(long, value_name = "ID")]
    expect: Option<String>,
    /// Why, for the ledger.
    #[arg(long)]
    reason: Option<String>,
}

/// Goes back to an older deployment.
#[derive(Debug, Args)]
pub struct RollbackArgs {
    #[command(flatten)]
    server: ServerArgs,
    /// The project.
    #[arg(long, short, env = "DAYBOOK_PROJECT")]
    project: Option<String>,
    /// The environment.
    #[arg(long, short)]
    env: Option<String>,
    /// The service.
    #[arg(long, short)]
    service: Option<String>,
    /// The service instance in one word: `project.environment.service`; or the id of its main
    /// deployment, or the end of it.
    #[arg(conflicts_with_all = ["project", "env", "service"])]
    instance: Option<String>,
    /// The deployment to go back to; the main one before if not given.
    #[arg(long, value_name = "ID")]
    to: Option<String>,
    /// Start it first if it is stopped, and wait until it is ready.
    #[arg(long)]
    start: bool,
    /// Deploy once more what it was made from, also if it was removed, and go back to that.
    #[arg(long, conflicts_with = "start")]
    redeploy: bool,
    /// Why, for the ledger.
    #[arg(long)]
    reason: Option<String>,
}

/// Deploys again what an older deployment was made from.
#[derive(Debug, Args)]
pub struct RedeployArgs {
    #[command(flatten)]
    server: ServerArgs,
    /// The deployment: its id, or the end of it as `daybook status` shows it; or the main one of an
    /// instance, `project.environment.service`.
    deployment: String,
    /// Why, for the ledger.
    #[arg(long)]
    reason: Option<String>,
    /// Return as soon as it is accepted.
    #[arg(long)]
    detach: bool,
}

/// Refuses what is not the id of a deployment, nor at least four digits of one.
pub fn check_part_of_id(name: &str) -> Result<(), Failure> {
    let digits = name.bytes().all(|b| b.is_ascii_hexdigit() || b == b'-');
    if digits && name.len() >= 4 {
        return Ok(());
    }
    Err(Failure::new(
        Code::Usage,
        "invalid_deployment_id",
        format!("{:?} is not the id of a deployment", without_credentials(name)),
    )
    .hint("use the id that `daybook status` or `daybook history` shows, or at least the last four digits of it"))
}

/// The full id of a deployment that was named by its id, or by the beginning or the end of it; or of
/// the main one of an instance that was named.
pub async fn find(client: &Client, name: &str) -> Result<String, Failure> {
    if name.contains('.') {
        return main_of(client, name).await;
    }
    let name = name.to_ascii_lowercase();
    if name.parse::<daybook_events::DeploymentId>().is_ok() {
        return Ok(name);
    }
    check_part_of_id(&name)?;
    let mut found = Vec::new();
    let mut cursor: Option<String> = None;
    loop {
        let page: Value = client
            .get(
                "/api/v1/deployments",
                &[("limit", Some("500".into())), ("cursor", cursor)],
            )
            .await?;
        found.extend(
            page.get("deployments")
                .and_then(Value::as_array)
                .into_iter()
                .flatten()
                .filter_map(|d| d.get("id").and_then(Value::as_str))
                .filter(|id| id.ends_with(&name) || id.starts_with(&name))
                .map(str::to_owned),
        );
        cursor = page.get("next").and_then(Value::as_str).map(str::to_owned);
        if cursor.is_none() || found.len() > 1 {
            break;
        }
    }
    match found.len() {
        1 => Ok(found.remove(0)),
        0 => Err(Failure::new(
            Code::NotFound,
            "deployment_not_found",
            format!("no deployment has an id like {name}"),
        )
        .hint("`daybook history` lists all deployments")),
        _ => Err(Failure::new(
            Code::Usage,
            "ambiguous_deployment_id",
            format!(
                "several deployments have an id like {name}: {}",
                found.join(", ")
            ),
        )
        .hint("give more of its digits")),
    }
}

/// The main deployment of an instance.
async fn main_of(client: &Client, instance: &str) -> Result<String, Failure> {
    let path = format!("/api/v1/instances/{}", segment(instance)?);
    let detail: Value = client.get(&path, &[]).await?;
    let main = detail["main"].as_str().map(str::to_owned);
    main.ok_or_else(|| {
        Failure::new(
            Code::NotFound,
            "no_main_deployment",
            format!("no deployment has the traffic of {instance}"),
        )
        .hint("name a deployment by its id; `daybook status` and `daybook history` list them")
    })
}

/// Stops, starts, terminates or cancels, and waits until it is done.
pub async fn operate(operation: &str, args: OperationArgs) -> Outcome {
    let client = Client::new(&args.server)?;
    let id = find(&client, &args.deployment).await?;
    let path = format!("/api/v1/deployments/{id}/{operation}");
    let before = client.position();
    let answer = client
        .post(&path, &json!({ "reason": args.reason }))
        .await?;
    if args.detach {
        if output::is_json() {
            output::json(&answer);
        } else {
            let status = answer
                .get("status")
                .and_then(Value::as_str)
                .unwrap_or(operation);
            output::line(&format!("{id} is {}", output::status_word(status)));
        }
        return Ok(Code::Success);
    }
    let code = follow(&client, &id, Follow::Operation(before)).await?;
    // A deployment that was cancelled because it was asked for is what was asked for.
    Ok(match code {
        Code::DeploymentCancelled if operation == "cancel" => Code::Success,
        other => other,
    })
}

pub async fn keep(args: KeepArgs) -> Outcome {
    let client = Client::new(&args.server)?;
    let id = find(&client, &args.deployment).await?;
    let path = format!("/api/v1/deployments/{id}/keep");
    let body = json!({ "reason": args.reason });
    let answer = client.post(&path, &body).await?;
    if output::is_json() {
        output::json(&answer);
    } else {
        let kept = output::style().good("kept");
        output::line(&format!("{kept} {id}: it is not stopped by itself"));
    }
    Ok(Code::Success)
}

pub async fn retry(args: RetryArgs) -> Outcome {
    let client = Client::new(&args.server)?;
    let id = find(&client, &args.deployment).await?;
    let mut body = json!({ "reason": args.reason });
    if !args.clusters.is_empty() {
        body["clusters"] = args.clusters.into();
    }
    let path = format!("/api/v1/deployments/{id}/retry");
    let before = client.position();
    let answer = client.post(&path, &body).await?;
    if args.detach {
        if output::is_json() {
            output::json(&answer);
        } else {
            output::line(&format!("{id} is being tried again"));
        }
        return Ok(Code::Success);
    }
    follow(&client, &id, Follow::Retry(before)).await
}

pub async fn delete(args: OperationArgs) -> Outcome {
    let client = Client::new(&args.server)?;
    let id = find(&client, &args.deployment).await?;
    let body = json!({ "reason": args.reason });
    let answer: Value = client
        .command(
            Method::DELETE,
            &format!("/api/v1/deployments/{id}"),
            &body,
            None,
        )
        .await?;
    if output::is_json() {
        output::json(&answer);
    } else {
        output::line(&format!(
            "{} {id}; its events stay in the ledger",
            output::style().dim("deleted")
        ));
    }
    Ok(Code::Success)
}

pub async fn mark_main(args: MarkMainArgs) -> Outcome {
    let client = Client::new(&args.server)?;
    let id = find(&client, &args.deployment).await?;
    let expected = match &args.expect {
        Some(name) => Some(find(&client, name).await?),
        None => None,
    };
    let mut body = json!({ "reason": args.reason });
    if let Some(expected) = expected {
        body["expected_main"] = expected.into();
    }
    let answer = client
        .post(&format!("/api/v1/deployments/{id}/mark-main"), &body)
        .await?;
    switched(&answer, &id)
}

pub async fn rollback(args: RollbackArgs) -> Outcome {
    let client = Client::new(&args.server)?;
    let mut body = json!({ "reason": args.reason });
    match (&args.instance, &args.project, &args.env, &args.service) {
        (Some(id), ..) if !id.contains('.') => {
            body["instance_id"] = instance_with_main(&client, id).await?.into();
        }
        (Some(instance), ..) => body["instance_id"] = instance.clone().into(),
        (None, Some(project), Some(env), Some(service)) => {
            body["project"] = project.clone().into();
            body["environment"] = env.clone().into();
            body["service"] = service.clone().into();
        }
        _ => {
            return Err(Failure::new(
                Code::Usage,
                "instance_missing",
                "it is not said what to roll back",
            )
            .hint("give project.environment.service, or --project, --env and --service"));
        }
    }
    if let Some(to) = &args.to {
        body["to"] = find(&client, to).await?.into();
    }
    if args.start || args.redeploy {
        let to = match body["to"].as_str() {
            Some(to) => Some(to.to_owned()),
            None => former_main(&client, &body).await?,
        };
        if let Some(to) = to {
            let reason = args.reason.as_deref();
            let (to, ready) = if args.redeploy {
                deploy_again(&client, &to, reason).await?
            } else {
                let started = start_if_stopped(&client, &to, reason).await?;
                (to, started)
            };
            if ready != Code::Success {
                return Ok(ready);
            }
            // What was started is what is gone back to, whatever was switched meanwhile.
            body["to"] = to.into();
        }
    }
    let answer = client.post("/api/v1/rollback", &body).await?;
    let id = answer
        .get("id")
        .and_then(Value::as_str)
        .unwrap_or_default()
        .to_owned();
    switched(&answer, &id)
}

/// The instance that a deployment is the main one of.
async fn instance_with_main(client: &Client, name: &str) -> Result<String, Failure> {
    let id = find(client, name).await?;
    let detail: Value = client
        .get(&format!("/api/v1/deployments/{id}"), &[])
        .await?;
    let instance = detail["instance_id"].as_str().unwrap_or_default();
    if detail["main"] == true {
        return Ok(instance.to_owned());
    }
    // It could as well be meant as what to go back to.
    Err(Failure::new(
        Code::Usage,
        "not_the_main_deployment",
        format!("{id} has not the traffic of {instance}, and cannot be rolled back"),
    )
    .hint(format!(
        "`daybook rollback {instance} --to {name}` goes back to it"
    )))
}

/// The main deployment before; none if there is none, which the server says better.
async fn former_main(client: &Client, wish: &Value) -> Result<Option<String>, Failure> {
    let text = |key: &str| wish[key].as_str().unwrap_or_default().to_owned();
    let instance = match wish["instance_id"].as_str() {
        Some(instance) => instance.to_owned(),
        None => [text("project"), text("environment"), text("service")].join("."),
    };
    let path = format!("/api/v1/instances/{}", segment(&instance)?);
    let detail: Value = client.get(&path, &[]).await?;
    let former = detail["former"].as_array().and_then(|f| f.last());
    Ok(former.and_then(Value::as_str).map(str::to_owned))
}

/// Deploys beside what runs what an older deployment was made from. Returns the new one, and how
/// that ended.
async fn deploy_again(
    client: &Client,
    id: &str,
    reason: Option<&str>,
) -> Result<(String, Code), Failure> {
    let path = format!("/api/v1/deployments/{id}/redeploy");
    let body = json!({ "switch": "manual", "reason": reason });
    let answer: Value = client.post(&path, &body).await?;
    let new = answer["id"].as_str().unwrap_or_default().to_owned();
    let code = follow(client, &new, Follow::Deployment).await?;
    Ok((new, code))
}

async fn start_if_stopped(client: &Client, id: &str, reason: Option<&str>) -> Outcome {
    let path = format!("/api/v1/deployments/{id}");
    let detail: Value = client.get(&path, &[]).await?;
    if !matches!(detail["state"].as_str(), Some("stopped" | "start_error")) {
        return Ok(Code::Success);
    }
    let before = client.position();
    client
        .post(&format!("{path}/start"), &json!({ "reason": reason }))
        .await?;
    follow(client, id, Follow::Operation(before)).await
}

fn switched(answer: &Value, id: &str) -> Outcome {
    if output::is_json() {
        output::json(answer);
        return Ok(Code::Success);
    }
    let style = output::style();
    match answer.get("previous_main").and_then(Value::as_str) {
        Some(previous) if previous != id => output::line(&format!(
            "{} {id} is the main deployment; {previous} was",
            style.good("switched")
        )),
        _ => output::line(&format!("{id} is the main deployment")),
    }
    Ok(Code::Success)
}

pub async fn redeploy(args: RedeployArgs) -> Outcome {
    let client = Client::new(&args.server)?;
    let id = find(&client, &args.deployment).await?;
    let answer = client
        .post(
            &format!("/api/v1/deployments/{id}/redeploy"),
            &json!({ "reason": args.reason }),
        )
        .await?;
    let new = answer
        .get("id")
        .and_then(Value::as_str)
        .unwrap_or_default()
        .to_owned();
    if args.detach {
        output::json(&answer);
        return Ok(Code::Success);
    }
    follow(&client, &new, Follow::Deployment).await
}
