//! `daybook events`

use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use clap::Args;
use daybook_events::feed::{FeedChain, FeedFilter, leaf_hash};
use daybook_events::log::MAX_EVENT_BYTES;
use daybook_events::{Position, envelope};
use futures_util::StreamExt;
use serde::Deserialize;
use serde_json::Value;
use serde_json::value::RawValue;

use super::{Outcome, ServerArgs};
use crate::client::Client;
use crate::exit::{Code, Failure};
use crate::output;

/// The events of the ledger, as they are or as they come.
///
/// Every event has a position. A subscriber that keeps the last position that it has seen goes on
/// from there with `--after`, and misses and repeats nothing. That this is so is checked as events
/// come, by a hash chain over them that the server works out from its log as well.
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
    let checked = Checked::new(filters, args.after);
    if args.follow {
        follow(&client, checked).await
    } else {
        pages(&client, checked).await
    }
}

/// Events after which the chain is compared at the latest.
const COMPARE_EVERY: u64 = 1000;
/// How long nothing comes before it is compared.
const QUIET: Duration = Duration::from_secs(5);

type Filters = [(&'static str, Option<String>); 5];

/// A feed as this subscriber has received it, with its hash chain.
struct Checked {
    filters: Filters,
    /// None if the filters are not what a filter consists of: the server then says so.
    chain: Option<FeedChain>,
    /// The last event.
    last: u64,
    /// Up to here it was compared, and how the chain was there.
    compared: (u64, Option<FeedChain>),
    /// Events since then.
    since: u64,
}

impl Checked {
    fn new(filters: Filters, after: u64) -> Self {
        let chain = feed(&filters).map(|f| FeedChain::begin(&f, Position(after)));
        Self {
            filters,
            chain,
            last: after,
            compared: (after, chain),
            since: 0,
        }
    }

    fn take(&mut self, position: u64, bytes: &[u8]) {
        self.chain = self.chain.map(|c| c.then(&leaf_hash(bytes)));
        self.last = position;
        self.since += 1;
    }

    /// Compares what was received with what the server has in its log.
    async fn compare(&mut self, client: &Client) -> Result<(), Failure> {
        let (Some(own), (mut after, Some(mut chain))) = (self.chain, self.compared) else {
            return Ok(());
        };
        if self.since == 0 {
            return Ok(());
        }
        while after < self.last {
            let mut query = self.filters.to_vec();
            query.push(("after", Some(after.to_string())));
            query.push(("to", Some(self.last.to_string())));
            query.push(("chain", Some(chain.to_string())));
            let report: Report = client.get("/api/v1/events/chain", &query).await?;
            if report.to <= after {
                break;
            }
            after = report.to;
            chain = report.chain.parse().map_err(|_| differs(self.last))?;
        }
        if chain != own {
            return Err(differs(self.last));
        }
        self.compared = (self.last, self.chain);
        self.since = 0;
        Ok(())
    }
}

/// The filter in the form that the chain begins with.
fn feed(filters: &Filters) -> Option<FeedFilter> {
    let [project, environment, service, kind, deployment] = filters.each_ref();
    let kind = kind.1.as_deref();
    Some(FeedFilter {
        project: project.1.as_deref().map(str::parse).transpose().ok()?,
        environment: environment.1.as_deref().map(str::parse).transpose().ok()?,
        service: service.1.as_deref().map(str::parse).transpose().ok()?,
        kind: kind.map(|k| {
            k.strip_prefix(envelope::TYPE_PREFIX)
                .unwrap_or(k)
                .to_owned()
        }),
        deployment: deployment.1.as_deref().map(str::parse).transpose().ok()?,
    })
}

/// What the server says of the chain.
#[derive(Deserialize)]
struct Report {
    to: u64,
    chain: String,
}

fn differs(position: u64) -> Failure {
    Failure::new(
        Code::Failure,
        "feed_differs",
        format!("what came up to position {position} is not what the server has in its log"),
    )
    .hint(
        "an event is missing, changed or was sent twice on its way: read again from the last \
         position that you trust, and compare with `daybook audit verify`",
    )
}

async fn follow(client: &Client, mut checked: Checked) -> Outcome {
    let mut query = checked.filters.to_vec();
    query.push(("after", Some(checked.last.to_string())));
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
                loop {
                    let next = tokio::time::timeout(QUIET, stream.next()).await;
                    if next.is_err() || checked.since >= COMPARE_EVERY {
                        unless_gone(checked.compare(client).await)?;
                    }
                    let Ok(next) = next else {
                        continue;
                    };
                    let Some(Ok(event)) = next else {
                        break;
                    };
                    failures = 0;
                    let position = event.id.parse().unwrap_or_default();
                    let data = match serde_json::from_str(&event.data) {
                        Ok(data) => {
                            checked.take(position, event.data.as_bytes());
                            data
                        }
                        // What is no JSON does not come through a text stream as it is.
                        Err(_) => {
                            let path = format!("/api/v1/events/{position}");
                            let bytes = client
                                .resource(&path, MAX_EVENT_BYTES)
                                .await?
                                .unwrap_or_default();
                            checked.take(position, &bytes);
                            Value::Null
                        }
                    };
                    print(position, &data);
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

/// A server that is gone now is asked again later.
fn unless_gone(compared: Result<(), Failure>) -> Result<(), Failure> {
    match compared {
        Err(failure) if failure.code == Code::Unreachable => Ok(()),
        other => other,
    }
}

/// A page of events.
#[derive(Deserialize)]
struct Page {
    events: Vec<Entry>,
    next_after: u64,
    head: u64,
}

/// An event, byte for byte.
#[derive(Deserialize)]
struct Entry {
    position: u64,
    event: Option<Box<RawValue>>,
    bytes: Option<String>,
}

async fn pages(client: &Client, mut checked: Checked) -> Outcome {
    let mut after = checked.last;
    loop {
        let mut query = checked.filters.to_vec();
        query.push(("after", Some(after.to_string())));
        query.push(("limit", Some("500".into())));
        let page: Page = client.get("/api/v1/events", &query).await?;
        for entry in &page.events {
            let text = entry.event.as_deref().map_or("null", RawValue::get);
            match &entry.bytes {
                Some(bytes) => {
                    let bytes = BASE64.decode(bytes).unwrap_or_default();
                    checked.take(entry.position, &bytes);
                }
                None => checked.take(entry.position, text.as_bytes()),
            }
            print(
                entry.position,
                &serde_json::from_str(text).unwrap_or_default(),
            );
        }
        if page.next_after <= after || page.next_after >= page.head {
            checked.compare(client).await?;
            return Ok(Code::Success);
        }
        after = page.next_after;
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
