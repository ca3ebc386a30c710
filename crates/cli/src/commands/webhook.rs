//! `daybook webhook`: whom events are sent to.

use std::time::{Duration, Instant};

use clap::{Args, Subcommand, ValueEnum};
use reqwest::Method;
use serde_json::{Value, json};

use super::manage::{list, segment, text};
use super::{Outcome, ServerArgs};
use crate::client::Client;
use crate::confirm::confirm;
use crate::exit::{Code, Failure};
use crate::output::{self, Row, Table};

/// How long `test` waits for the delivery.
const PATIENCE: Duration = Duration::from_secs(60);

/// Send events of a project to a URL, signed, at least once, in order within a deployment.
///
/// See docs/webhooks.md for what is sent and how to verify it. Webhooks of providers of source
/// repositories, which tell Daybook of pushes, are `daybook hook`.
#[derive(Debug, Subcommand)]
pub enum WebhookCommand {
    /// Send events to a URL, and print the secret that they are signed with, which nobody can look
    /// up later.
    Create(Box<CreateArgs>),
    /// List the webhooks of a project, or all.
    List {
        #[command(flatten)]
        server: ServerArgs,
        /// The project.
        project: Option<String>,
    },
    /// Show a webhook, with what was set aside undelivered.
    Show(WebhookArgs),
    /// Define a webhook anew: what is not given stays as it is. What was sent already is not sent again.
    ///
    /// It is refused if somebody else defines it anew at the same moment.
    Change(Box<ChangeArgs>),
    /// What was sent, and what came of it, the newest first.
    Deliveries(DeliveriesArgs),
    /// Send again what was set aside: the events at these positions, or all.
    Replay {
        #[command(flatten)]
        webhook: WebhookArgs,
        /// The position of an event; may be given several times.
        #[arg(long = "position", value_name = "N")]
        positions: Vec<u64>,
    },
    /// Never send what was set aside: the events at these positions, or all.
    Discard {
        #[command(flatten)]
        webhook: WebhookArgs,
        /// The position of an event; may be given several times.
        #[arg(long = "position", value_name = "N")]
        positions: Vec<u64>,
        /// Do not ask.
        #[arg(long, short)]
        yes: bool,
    },
    /// Make a new secret, and print it. For a time each delivery is signed with both.
    Rotate {
        #[command(flatten)]
        webhook: WebhookArgs,
        /// For how many hours the old one is used too. With 0 all older ones end at once.
        #[arg(long, default_value_t = 24, value_name = "HOURS", value_parser = clap::value_parser!(u32).range(0..=168))]
        overlap: u32,
    },
    /// Send nothing any more. What comes meanwhile is sent once it is resumed.
    Pause(WebhookArgs),
    /// Send again, from where it stopped.
    Resume(WebhookArgs),
    /// Send a test event, and say what came of it.
    Test(WebhookArgs),
    /// Delete a webhook, and erase its secrets.
    Delete {
        #[command(flatten)]
        webhook: WebhookArgs,
        /// Do not ask.
        #[arg(long, short)]
        yes: bool,
    },
}

/// In which form events are sent.
#[derive(Debug, Clone, Copy, ValueEnum)]
pub enum Format {
    /// As they are stored: CloudEvents.
    Cloudevents,
    /// What they mean in the words of CDEvents.
    Cdevents,
}

impl Format {
    /// As the server calls it.
    fn name(self) -> &'static str {
        match self {
            Self::Cloudevents => "cloudevents",
            Self::Cdevents => "cdevents",
        }
    }
}

/// A new webhook.
#[derive(Debug, Args)]
pub struct CreateArgs {
    #[command(flatten)]
    server: ServerArgs,
    /// The project.
    project: String,
    /// Where events are sent: an https URL without user, query and fragment. It is kept in the
    /// ledger for ever: put no secret into it.
    url: String,
    /// The form.
    #[arg(long, value_enum, default_value = "cloudevents")]
    format: Format,
    /// Only events of this environment.
    #[arg(long, value_name = "ENVIRONMENT")]
    env: Option<String>,
    /// Only events about this service.
    #[arg(long)]
    service: Option<String>,
    /// Only events of this type (`deployment.succeeded.v1`) or aggregate (`deployment`); may be
    /// given several times.
    #[arg(long = "kind", value_name = "TYPE")]
    kinds: Vec<String>,
    /// Only events of this deployment and of the run that it began.
    #[arg(long, value_name = "ID")]
    deployment: Option<String>,
    /// Each event carries the proof that it is in the signed ledger.
    #[arg(long)]
    proof: bool,
    /// How often each event is tried before it is set aside.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=20))]
    tries: Option<u32>,
    /// Only events after this position: 0 for all. Those to come if not given.
    #[arg(long, value_name = "POSITION")]
    after: Option<u64>,
}

/// What is to be otherwise.
#[derive(Debug, Args)]
pub struct ChangeArgs {
    #[command(flatten)]
    webhook: WebhookArgs,
    #[command(flatten)]
    changes: Changes,
}

/// At least one of them.
#[derive(Debug, Args)]
#[group(required = true, multiple = true)]
pub struct Changes {
    /// Where events are sent: an https URL without user, query and fragment. It is kept in the
    /// ledger for ever: put no secret into it.
    #[arg(long)]
    url: Option<String>,
    /// The form.
    #[arg(long, value_enum)]
    format: Option<Format>,
    /// Only events of this environment; of all if it is empty.
    #[arg(long, value_name = "ENVIRONMENT")]
    env: Option<String>,
    /// Only events about this service; about all if it is empty.
    #[arg(long)]
    service: Option<String>,
    /// Only events of this type (`deployment.succeeded.v1`) or aggregate (`deployment`); may be
    /// given several times, instead of those before. Of all if it is empty.
    #[arg(long = "kind", value_name = "TYPE")]
    kinds: Option<Vec<String>>,
    /// Only events of this deployment and of the run that it began; of all if it is empty.
    #[arg(long, value_name = "ID")]
    deployment: Option<String>,
    /// Whether each event carries the proof that it is in the signed ledger.
    #[arg(long, value_name = "true|false")]
    proof: Option<bool>,
    /// How often each event is tried before it is set aside.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=20))]
    tries: Option<u32>,
}

impl Changes {
    /// What a webhook is to be, that is so now.
    fn of(self, webhook: &Value) -> Value {
        let named = |name: &str, given: Option<String>| match given {
            None => webhook[name].clone(),
            Some(given) if given.is_empty() => Value::Null,
            Some(given) => given.into(),
        };
        let given =
            |name: &str, given: Option<Value>| given.unwrap_or_else(|| webhook[name].clone());
        let kinds = self.kinds.map(|kinds| {
            let kinds = kinds.into_iter().filter(|k| !k.is_empty());
            kinds.map(Value::from).collect()
        });
        json!({
            "url": given("url", self.url.map(Value::from)),
            "format": given("format", self.format.map(|f| f.name().into())),
            "environment": named("environment", self.env),
            "service": named("service", self.service),
            "kinds": given("kinds", kinds),
            "deployment": named("deployment", self.deployment),
            "proof": given("proof", self.proof.map(Value::from)),
            "tries": given("tries", self.tries.map(Value::from)),
        })
    }
}

/// Which webhook.
#[derive(Debug, Args)]
pub struct WebhookArgs {
    #[command(flatten)]
    server: ServerArgs,
    /// Its id, or enough of the end of it.
    id: String,
}

/// Which tries.
#[derive(Debug, Args)]
pub struct DeliveriesArgs {
    #[command(flatten)]
    webhook: WebhookArgs,
    /// Only those that did not work.
    #[arg(long)]
    failed: bool,
    /// At most so many.
    #[arg(long, default_value_t = 20, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=500))]
    limit: u32,
}

pub async fn run(command: WebhookCommand) -> Outcome {
    match command {
        WebhookCommand::Create(args) => create(*args).await,
        WebhookCommand::List { server, project } => list_all(server, project).await,
        WebhookCommand::Show(args) => {
            let (client, path) = find(&args).await?;
            let webhook: Value = client.get(&path, &[]).await?;
            shown(&webhook, print)
        }
        WebhookCommand::Change(args) => define(*args).await,
        WebhookCommand::Deliveries(args) => deliveries(args).await,
        WebhookCommand::Replay { webhook, positions } => replay(webhook, positions).await,
        WebhookCommand::Discard {
            webhook,
            positions,
            yes,
        } => discard(webhook, positions, yes).await,
        WebhookCommand::Rotate { webhook, overlap } => {
            let (client, path) = find(&webhook).await?;
            let body = json!({ "overlap_seconds": overlap * 3600 });
            let answer = client.post(&format!("{path}/rotate"), &body).await?;
            made("rotated", &answer)
        }
        WebhookCommand::Pause(args) => change(args, "pause", "paused").await,
        WebhookCommand::Resume(args) => change(args, "resume", "resumed").await,
        WebhookCommand::Test(args) => test(args).await,
        WebhookCommand::Delete { webhook, yes } => delete(webhook, yes).await,
    }
}

fn shown(value: &Value, print: impl Fn(&Value)) -> Outcome {
    if output::is_json() {
        output::json(value);
    } else {
        print(value);
    }
    Ok(Code::Success)
}

/// The path of a webhook that is named by its id or the end of it.
async fn find(args: &WebhookArgs) -> Result<(Client, String), Failure> {
    let client = Client::new(&args.server)?;
    let wanted = segment(&args.id)?;
    let all: Value = client.get("/api/v1/webhooks", &[]).await?;
    let all = all["webhooks"].as_array().cloned().unwrap_or_default();
    let mut found = all
        .iter()
        .filter_map(|w| w["id"].as_str())
        .filter(|id| id.ends_with(wanted));
    let fail = |code: &'static str, message: String| {
        Failure::new(Code::NotFound, code, message).hint("`daybook webhook list` shows all")
    };
    match (found.next(), found.next()) {
        (Some(id), None) => Ok((client, format!("/api/v1/webhooks/{id}"))),
        (None, _) => Err(fail(
            "webhook_not_found",
            format!("there is no webhook {wanted}"),
        )),
        (Some(_), Some(_)) => Err(fail(
            "webhook_ambiguous",
            format!("several webhooks have an id that ends in {wanted}"),
        )),
    }
}

async fn create(args: CreateArgs) -> Outcome {
    let client = Client::new(&args.server)?;
    let mut body = json!({
        "project": args.project,
        "url": args.url,
        "format": args.format.name(),
        "kinds": args.kinds,
        "proof": args.proof,
    });
    let optional = [
        ("environment", args.env.map(Value::from)),
        ("service", args.service.map(Value::from)),
        ("deployment", args.deployment.map(Value::from)),
        ("tries", args.tries.map(Value::from)),
        ("after", args.after.map(Value::from)),
    ];
    for (name, value) in optional {
        if let Some(value) = value {
            body[name] = value;
        }
    }
    let answer = client.post("/api/v1/webhooks", &body).await?;
    made("created", &answer)
}

/// Prints a webhook with its new secret.
fn made(word: &str, answer: &Value) -> Outcome {
    shown(answer, |answer| {
        output::line(output::style().good(word).as_str());
        print(&answer["webhook"]);
        output::line(&format!("  secret       {}", text(answer, "secret")));
        output::line("  the secret is shown this once");
    })
}

fn print(webhook: &Value) {
    output::line(&format!("webhook {}", text(webhook, "id")));
    let mut facts = vec![
        ("project", text(webhook, "project")),
        ("URL", text(webhook, "url")),
        ("state", state(webhook)),
        ("sends", sends(webhook)),
        ("format", text(webhook, "format")),
        ("tries", text(webhook, "tries")),
        ("after", text(webhook, "after")),
    ];
    if webhook["overlap_until"].is_string() {
        facts.push((
            "two secrets",
            format!("until {}", when(webhook, "overlap_until")),
        ));
    }
    for (name, value) in facts {
        output::line(&format!("  {name:<13}{value}"));
    }
    let dead = webhook["dead_letters"]
        .as_array()
        .cloned()
        .unwrap_or_default();
    if !dead.is_empty() {
        let mut table = Table::new(["SET ASIDE", "TRIES", "WHY", "SINCE", ""]);
        for letter in &dead {
            let again = match letter["replaying"].as_bool() {
                Some(true) => "being sent again",
                _ => "",
            };
            table.row(Row::new([
                text(letter, "position"),
                text(letter, "tries"),
                text(letter, "code"),
                when(letter, "since"),
                again.to_owned(),
            ]));
        }
        table.print();
    }
}

/// A time for people.
fn when(value: &Value, name: &str) -> String {
    let text = text(value, name);
    text.parse().map_or(text, output::time)
}

fn state(webhook: &Value) -> String {
    match webhook["pause"]["reason"].as_str() {
        None => match webhook["retrying"].as_array().map_or(0, Vec::len) {
            0 => "active".into(),
            1 => "active, one event is tried again".into(),
            n => format!("active, {n} events are tried again"),
        },
        Some("gone") => "paused: the receiver answered 410".into(),
        Some("failing") => "paused: too much was set aside".into(),
        Some(_) => "paused".into(),
    }
}

/// Which events are sent, in words.
fn sends(webhook: &Value) -> String {
    let kinds: Vec<_> = webhook["kinds"]
        .as_array()
        .into_iter()
        .flatten()
        .filter_map(Value::as_str)
        .collect();
    let mut words = match kinds.is_empty() {
        true => "all events".to_owned(),
        false => kinds.join(", "),
    };
    for name in ["environment", "service", "deployment"] {
        if let Some(value) = webhook[name].as_str() {
            words += &format!(" of {name} {value}");
        }
    }
    if webhook["proof"].as_bool() == Some(true) {
        words += ", with proof";
    }
    words
}

async fn define(args: ChangeArgs) -> Outcome {
    let (client, path) = find(&args.webhook).await?;
    let before: Value = client.get(&path, &[]).await?;
    let wanted = args.changes.of(&before);
    let etag = before["etag"].as_str();
    let webhook = client.replace(&path, &wanted, etag).await?;
    shown(&webhook, |webhook| {
        output::line(output::style().good("changed").as_str());
        print(webhook);
    })
}

async fn list_all(server: ServerArgs, project: Option<String>) -> Outcome {
    let path = match &project {
        Some(project) => format!("/api/v1/webhooks?project={}", segment(project)?),
        None => "/api/v1/webhooks".to_owned(),
    };
    list(
        &server,
        &path,
        "webhooks",
        ["ID", "PROJECT", "URL", "STATE", "SENDS", "SET ASIDE"],
        |w| {
            let dead = w["dead_letters"].as_array().map_or(0, Vec::len);
            vec![
                text(w, "id"),
                text(w, "project"),
                text(w, "url"),
                state(w),
                sends(w),
                dead.to_string(),
            ]
        },
    )
    .await
}

async fn deliveries(args: DeliveriesArgs) -> Outcome {
    let (client, path) = find(&args.webhook).await?;
    let path = format!("{path}/deliveries?limit={}", args.limit);
    let mut found: Value = client.get(&path, &[]).await?;
    if args.failed
        && let Some(all) = found["deliveries"].as_array_mut()
    {
        all.retain(|d| d["outcome"] != "delivered");
    }
    shown(&found, |found| {
        let all = found["deliveries"].as_array().cloned().unwrap_or_default();
        if all.is_empty() {
            return output::line("no deliveries");
        }
        let mut table = Table::new([
            "TIME", "EVENT", "TYPE", "TRY", "OUTCOME", "STATUS", "MS", "WHY",
        ]);
        for d in &all {
            table.row(Row::new([
                when(d, "time"),
                text(d, "position"),
                text(d, "kind"),
                text(d, "number"),
                text(d, "outcome"),
                text(d, "status"),
                text(d, "millis"),
                text(d, "message"),
            ]));
        }
        table.print();
    })
}

async fn replay(args: WebhookArgs, positions: Vec<u64>) -> Outcome {
    let (client, path) = find(&args).await?;
    let body = choice(&positions);
    let webhook = client.post(&format!("{path}/replay"), &body).await?;
    shown(&webhook, |webhook| {
        let dead = webhook["dead_letters"]
            .as_array()
            .cloned()
            .unwrap_or_default();
        let again = dead.iter().filter(|d| d["replaying"] == true).count();
        output::line(&format!("{again} events are being sent again"));
    })
}

/// Some of what was set aside, or all.
fn choice(positions: &[u64]) -> Value {
    match positions.is_empty() {
        true => json!({}),
        false => json!({ "positions": positions }),
    }
}

async fn discard(args: WebhookArgs, positions: Vec<u64>, yes: bool) -> Outcome {
    let (client, path) = find(&args).await?;
    let before: Value = client.get(&path, &[]).await?;
    let count = |webhook: &Value| webhook["dead_letters"].as_array().map_or(0, Vec::len);
    if !yes {
        let number = match positions.len() {
            0 => count(&before),
            named => named,
        };
        let what = format!("{number} events that were set aside are never sent");
        confirm(&what, &args.id)?;
    }
    let body = choice(&positions);
    let webhook = client.post(&format!("{path}/discard"), &body).await?;
    shown(&webhook, |webhook| {
        let gone = count(&before).saturating_sub(count(webhook));
        output::line(&format!("{gone} events were discarded"));
        if webhook["pause"]["reason"] == "failing" {
            output::line("it is still paused: `daybook webhook resume` goes on");
        }
    })
}

async fn change(args: WebhookArgs, verb: &str, word: &str) -> Outcome {
    let (client, path) = find(&args).await?;
    let webhook = client.post(&format!("{path}/{verb}"), &json!({})).await?;
    shown(&webhook, |webhook| {
        let style = output::style();
        output::line(&format!(
            "{} webhook {}",
            style.good(word),
            text(webhook, "id")
        ));
    })
}

async fn test(args: WebhookArgs) -> Outcome {
    let (client, path) = find(&args).await?;
    let asked = client.post(&format!("{path}/test"), &json!({})).await?;
    let position = text(&asked, "position");
    let look = format!("{path}/deliveries?position={position}&limit=1");
    let begun = Instant::now();
    loop {
        let found: Value = client.get(&look, &[]).await?;
        if let Some(attempt) = found["deliveries"].get(0) {
            shown(attempt, |a| {
                output::line(&format!(
                    "{} event {position}: {} {}",
                    text(a, "outcome"),
                    text(a, "status"),
                    text(a, "message")
                ));
            })?;
            return Ok(match attempt["outcome"].as_str() {
                Some("delivered") => Code::Success,
                _ => Code::Failure,
            });
        }
        if begun.elapsed() > PATIENCE {
            return Err(Failure::new(
                Code::Failure,
                "not_sent",
                "the test event was not sent within a minute",
            )
            .hint("check that a process with the role `notify` runs"));
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

async fn delete(args: WebhookArgs, yes: bool) -> Outcome {
    let (client, path) = find(&args).await?;
    if !yes {
        let webhook: Value = client.get(&path, &[]).await?;
        let what = format!("the webhook to {} is deleted", text(&webhook, "url"));
        confirm(&what, &args.id)?;
    }
    let answer: Value = client
        .command(Method::DELETE, &path, &json!({}), None)
        .await?;
    shown(&answer, |a| {
        output::line(&format!(
            "deleted webhook {}; its secrets are erased",
            text(a, "id")
        ));
    })
}
