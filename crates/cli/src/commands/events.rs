//! `daybook events`

use std::time::Duration;

use clap::Args;
use futures_util::StreamExt;
use serde_json::Value;

use super::{Outcome, ServerArgs};
use crate::client::Client;
use crate::exit::{Code, Failure};
use crate::output;

/// The events of the ledger, as they are or as they come.
///
/// Every event has a position. A subscriber that keeps the last position that it has seen goes on
/// from there with `--after`, and misses and repeats nothing.
#[derive(Debug, Args)]
pub struct EventsArgs {
    #[command(flatten)]
    server: ServerArgs,
    /// Go on as events come.
    #[arg(long, short)]
    follow: bool,
    /// Only events after this position.
    #[arg(long, default_value_t = 0, value_name = "POSITION")]
    after: u64,
    /// Only this project.
    #[arg(long, short, env = "DAYBOOK_PROJECT")]
    project: Option<String>,
    /// Only this environment.
    #[arg(long, short)]
    env: Option<String>,
    /// Only this service.
    #[arg(long, short)]
    service: Option<String>,
    /// Only events of this type: `deployment.succeeded.v1`.
    #[arg(long, short)]
    kind: Option<String>,
    /// Only events about this deployment.
    #[arg(long, short)]
    deployment: Option<String>,
}

pub async fn run(args: EventsArgs) -> Outcome {
    let client = Client::new(&args.server)?;
    let deployment = match &args.deployment {
        Some(name) => Some(super::lifecycle::find(&client, name).await?),
        None => None,
    };
    let filters = [
        ("project", args.project.clone()),
        ("environment", args.env.clone()),
        ("service", args.service.clone()),
        ("kind", args.kind.clone()),
        ("deployment", deployment),
    ];
    if !args.follow {
        return pages(&client, args.after, &filters).await;
    }
    let mut query = filters.to_vec();
    query.push(("after", Some(args.after.to_string())));
    query.push(("follow", Some("true".into())));
    let mut last: Option<String> = None;
    let mut failures = 0_u32;
    loop {
        match client
            .stream("/api/v1/events", &query, last.as_deref())
            .await
        {
            Ok(stream) => {
                let mut stream = std::pin::pin!(stream);
                while let Some(Ok(event)) = stream.next().await {
                    failures = 0;
                    let data: Value = serde_json::from_str(&event.data).unwrap_or_default();
                    print(event.id.parse().unwrap_or_default(), &data);
                    last = Some(event.id);
                }
            }
            Err(failure)
                if last.is_none() || failure.code != Code::Unreachable || failures > 60 =>
            {
                return Err(failure);
            }
            Err(_) => failures += 1,
        }
        // The connection broke: go on after the last event that was seen.
        tokio::time::sleep(Duration::from_millis(500)).await;
    }
}

async fn pages(client: &Client, mut after: u64, filters: &[(&str, Option<String>)]) -> Outcome {
    loop {
        let mut query = filters.to_vec();
        query.push(("after", Some(after.to_string())));
        query.push(("limit", Some("500".into())));
        let page: Value = client.get("/api/v1/events", &query).await?;
        let events = page
            .get("events")
            .and_then(Value::as_array)
            .ok_or_else(|| {
                Failure::new(
                    Code::Failure,
                    "unexpected_answer",
                    "the answer has no events",
                )
            })?;
        for entry in events {
            let position = entry
                .get("position")
                .and_then(Value::as_u64)
                .unwrap_or_default();
            print(position, entry.get("event").unwrap_or(&Value::Null));
        }
        let number = |key| page.get(key).and_then(Value::as_u64).unwrap_or_default();
        let (next, head) = (number("next_after"), number("head"));
        if next <= after || next >= head {
            return Ok(Code::Success);
        }
        after = next;
    }
}

/// Prints one event.
pub fn print(position: u64, event: &Value) {
    if output::is_json() {
        output::json(&serde_json::json!({ "position": position, "event": event }));
        return;
    }
    let style = output::style();
    let text = |key: &str| event.get(key).and_then(Value::as_str).unwrap_or_default();
    let at = text("time").parse().map(output::time).unwrap_or_default();
    let subject = text("subject");
    // The id of a deployment is known well enough by its end.
    let subject = match subject.rsplit_once('/') {
        Some((head, id)) if id.len() == 36 => format!("{head}/…{}", &id[28..]),
        _ => subject.to_owned(),
    };
    output::line(&format!(
        "{} {} {:<36} {subject} {}",
        style.dim(&format!("{position:>6}")),
        style.dim(&at),
        text("type").trim_start_matches("dev.daybook."),
        style.dim(text("authid")),
    ));
}
