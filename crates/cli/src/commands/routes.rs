//! `daybook routes`: what leads where, and who shares it.

use clap::{Args, Subcommand};
use daybook_events::InstanceRef;
use serde_json::{Map, Value, json};

use super::lifecycle::find;
use super::manage::segment;
use super::records::{self, RecordsArgs};
use super::{Outcome, ServerArgs};
use crate::client::Client;
use crate::exit::{Code, Failure};
use crate::output::{self, Row, Table};

/// Look at the route table of a project, and say who shares the traffic of a service.
#[derive(Debug, Subcommand)]
pub enum RoutesCommand {
    /// Where each hostname leads, since when and why.
    List(ListArgs),
    /// Spread traffic over deployments that run, by weight.
    ///
    /// The main deployment stays the main one as long as it has a share. A deployment that takes
    /// over, `mark-main` and `rollback` take the whole traffic again.
    Set(SetArgs),
    /// Say how traffic is spread over the clusters that a service runs in.
    Policy(PolicyArgs),
    /// The DNS records that lead users to the Gateways of the clusters that serve each hostname.
    ///
    /// They follow from where hostnames lead, from the policy of the service, and from where the
    /// Gateways say that they are reached. Daybook writes none: they are for external-dns, or for
    /// whoever keeps your zone. What is not known is left out, and so is said.
    Records(RecordsArgs),
}

/// Which routes.
#[derive(Debug, Args)]
pub struct ListArgs {
    #[command(flatten)]
    server: ServerArgs,
    /// The project, or one service instance as `project.environment.service`.
    project: String,
    /// Also the newest switches, with what they changed.
    #[arg(long)]
    switches: bool,
}

/// Who shares what.
#[derive(Debug, Args)]
pub struct SetArgs {
    #[command(flatten)]
    server: ServerArgs,
    /// A service instance, as `project.environment.service`: all its addresses that move with the
    /// main deployment. With --project, one hostname of that project.
    target: String,
    /// The project whose hostname is meant.
    #[arg(long, short)]
    project: Option<String>,
    /// A deployment and its weight; once for each deployment.
    #[arg(long, required = true, value_name = "ID[=WEIGHT]", value_parser = share)]
    to: Vec<(String, u32)>,
    /// The table that you decided on: refused if the hostnames were switched after it.
    #[arg(long, value_name = "TABLE")]
    expect_table: Option<u32>,
    /// Why, for the ledger.
    #[arg(long)]
    reason: Option<String>,
}

/// How traffic is spread over clusters.
#[derive(Debug, Args)]
pub struct PolicyArgs {
    #[command(flatten)]
    server: ServerArgs,
    /// The service instance, as `project.environment.service`.
    instance: String,
    #[command(subcommand)]
    policy: PolicyKind,
    /// Why, for the ledger.
    #[arg(long, global = true)]
    reason: Option<String>,
}

#[derive(Debug, Subcommand)]
enum PolicyKind {
    /// Evenly over all clusters.
    Simple,
    /// By weight; clusters without one only stand in.
    Weighted {
        /// The clusters with their weights.
        #[arg(required = true, value_name = "CLUSTER=WEIGHT", value_parser = share)]
        clusters: Vec<(String, u32)>,
    },
    /// To the first of these that has a ready instance.
    Failover {
        /// The clusters, in this order.
        #[arg(required = true, value_name = "CLUSTER")]
        clusters: Vec<String>,
    },
    /// To the one that answers fastest.
    Latency,
}

/// A name and its weight; 100, if none is given.
fn share(text: &str) -> Result<(String, u32), String> {
    match text.split_once('=') {
        None => Ok((text.to_owned(), 100)),
        Some((name, weight)) => match weight.parse() {
            Ok(weight) => Ok((name.to_owned(), weight)),
            Err(_) => Err(format!("{weight:?} is no weight, which is a whole number")),
        },
    }
}

pub async fn run(command: RoutesCommand) -> Outcome {
    match command {
        RoutesCommand::List(args) => list(args).await,
        RoutesCommand::Set(args) => set(args).await,
        RoutesCommand::Policy(args) => policy(args).await,
        RoutesCommand::Records(args) => records::run(args).await,
    }
}

/// Reads `project.environment.service`.
pub fn instance(text: &str) -> Result<InstanceRef, Failure> {
    text.parse().map_err(|e: daybook_events::InvalidName| {
        Failure::new(Code::Usage, e.code, e.to_string())
            .hint("write it as project.environment.service")
    })
}

async fn list(args: ListArgs) -> Outcome {
    let client = Client::new(&args.server)?;
    let (project, only) = match args.project.contains('.') {
        true => {
            let instance = instance(&args.project)?;
            (instance.project.to_string(), Some(instance.to_string()))
        }
        false => (args.project.clone(), None),
    };
    let path = format!("/api/v1/projects/{}/routes", segment(&project)?);
    let found: Value = client.get(&path, &[("instance_id", only)]).await?;
    if output::is_json() {
        output::json(&found);
        return Ok(Code::Success);
    }
    let mut table = Table::new([
        "HOSTNAME",
        "STICKS TO",
        "POLICY",
        "LEADS TO",
        "BEFORE",
        "TABLE",
        "SINCE",
        "WHY",
    ]);
    for route in list_of(&found, "routes") {
        let since = text(route, "since");
        table.row(Row::new([
            text(route, "hostname").to_owned(),
            text(route, "stickiness").to_owned(),
            policy_word(&route["policy"]),
            backends(&route["backends"]),
            backends(&route["previous"]),
            route["table"].to_string(),
            since
                .parse()
                .map_or_else(|_| since.to_owned(), output::time),
            text(route, "reason").replace('_', "-"),
        ]));
    }
    table.print();
    let gateways: Vec<_> = found["gateways"]
        .as_object()
        .into_iter()
        .flatten()
        .map(|(name, table)| format!("{name} serves {table}"))
        .collect();
    output::line(&format!(
        "table {}{}{}",
        found["table"],
        if gateways.is_empty() { "" } else { "; " },
        gateways.join(", ")
    ));
    for route in list_of(&found, "routes") {
        for ingress in list_of(route, "also_served") {
            let backends = list_of(ingress, "backends").filter_map(Value::as_str);
            output::line(&format!(
                "note: Ingress {}/{} of {} serves {} as well, to {}",
                text(ingress, "namespace"),
                text(ingress, "name"),
                text(ingress, "cluster"),
                text(route, "hostname"),
                backends.collect::<Vec<_>>().join(", "),
            ));
        }
    }
    let unread = found["ingresses_unread"].as_object().into_iter().flatten();
    for (cluster, why) in unread {
        let why = why.as_str().unwrap_or_default();
        output::line(&format!("note: Ingresses of {cluster} are not read: {why}"));
    }
    if args.switches {
        for switch in list_of(&found, "switches") {
            print_switch(switch);
        }
    }
    Ok(Code::Success)
}

fn list_of<'a>(value: &'a Value, name: &str) -> impl Iterator<Item = &'a Value> {
    value[name].as_array().into_iter().flatten()
}

fn text<'a>(value: &'a Value, name: &str) -> &'a str {
    value[name].as_str().unwrap_or_default()
}

fn short(id: &str) -> &str {
    id.get(id.len().saturating_sub(8)..).unwrap_or(id)
}

/// The deployments that share a route; their weights too, where there are several.
fn backends(backends: &Value) -> String {
    let backends: Vec<_> = backends.as_array().into_iter().flatten().collect();
    let one = backends.len() == 1;
    let backends = backends.into_iter().map(|b| {
        let id = short(text(b, "deployment"));
        let stopped = match text(b, "status") {
            "" | "started" | "deploying" => String::new(),
            status => format!(" ({})", output::status_word(status)),
        };
        match one {
            true => format!("{id}{stopped}"),
            false => format!("{id}={}{stopped}", b["weight"]),
        }
    });
    backends.collect::<Vec<_>>().join(" ")
}

fn policy_word(policy: &Value) -> String {
    match policy {
        Value::String(word) => word.clone(),
        Value::Object(detail) => {
            let words = detail.iter().map(|(word, clusters)| match clusters {
                Value::Array(order) => {
                    let order: Vec<_> = order.iter().filter_map(Value::as_str).collect();
                    format!("{word} {}", order.join(" "))
                }
                Value::Object(weights) => {
                    let weights = weights.iter().map(|(name, w)| format!("{name}={w}"));
                    format!("{word} {}", weights.collect::<Vec<_>>().join(" "))
                }
                _ => word.clone(),
            });
            words.collect()
        }
        _ => String::new(),
    }
}

fn print_switch(switch: &Value) {
    let style = output::style();
    let note = match text(switch, "note") {
        "" => String::new(),
        note => format!(": {note}"),
    };
    output::line(&format!(
        "{} {} {}{note}",
        style.bold(&format!("table {}", switch["table"])),
        text(switch, "reason").replace('_', "-"),
        text(switch, "instance_id"),
    ));
    for change in list_of(switch, "changes") {
        let nowhere = |leads: String| {
            if leads.is_empty() {
                "nowhere".to_owned()
            } else {
                leads
            }
        };
        output::line(&format!(
            "  {}  {} to {}",
            text(change, "hostname"),
            nowhere(backends(&change["previous"])),
            nowhere(backends(&change["next"])),
        ));
    }
    if let Some(policy) = switch.get("policy") {
        output::line(&format!(
            "  {} to {}",
            policy_word(&policy["previous"]),
            policy_word(&policy["next"])
        ));
    }
}

async fn set(args: SetArgs) -> Outcome {
    let client = Client::new(&args.server)?;
    let mut to = Vec::with_capacity(args.to.len());
    for (name, weight) in &args.to {
        let id = find(&client, name).await?;
        to.push(json!({ "deployment": id, "weight": weight }));
    }
    let mut body = json!({
        "to": to,
        "expected_table": args.expect_table,
        "reason": args.reason,
    });
    let project = match args.project {
        Some(project) => {
            body["hostname"] = args.target.into();
            project
        }
        None => {
            let instance = instance(&args.target).map_err(|failure| {
                failure.hint("name an instance, or the project of the hostname with --project")
            })?;
            body["instance_id"] = instance.to_string().into();
            instance.project.to_string()
        }
    };
    let path = format!("/api/v1/projects/{}/routes", segment(&project)?);
    print_set(&client.post(&path, &body).await?)
}

async fn policy(args: PolicyArgs) -> Outcome {
    let client = Client::new(&args.server)?;
    let instance = instance(&args.instance)?;
    let policy = match args.policy {
        PolicyKind::Simple => json!("simple"),
        PolicyKind::Latency => json!("latency"),
        PolicyKind::Failover { clusters } => json!({ "failover": clusters }),
        PolicyKind::Weighted { clusters } => {
            let weights = clusters.into_iter().map(|(name, w)| (name, w.into()));
            json!({ "weighted": weights.collect::<Map<_, _>>() })
        }
    };
    let body = json!({
        "instance_id": instance.to_string(),
        "policy": policy,
        "reason": args.reason,
    });
    let path = format!("/api/v1/projects/{}/routes/policy", instance.project);
    print_set(&client.post(&path, &body).await?)
}

fn print_set(answer: &Value) -> Outcome {
    if output::is_json() {
        output::json(answer);
        return Ok(Code::Success);
    }
    match &answer["switch"] {
        Value::Null => output::line("nothing changes: the routes are so already"),
        switch => print_switch(switch),
    }
    Ok(Code::Success)
}
