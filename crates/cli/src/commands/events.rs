//! `daybook events`

use std::time::{Duration, Instant};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use clap::Args;
use daybook_events::feed::{FeedChain, FeedFilter, leaf_hash};
use daybook_events::log::MAX_EVENT_BYTES;
use daybook_events::{Position, envelope};
use futures_util::{Stream, StreamExt};
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
/// How long events come, however few, before it is compared.
const COMPARE_AFTER: Duration = Duration::from_secs(10);
/// When a connection that broke is made anew, and how long after another failure at most unless the
/// server says when.
pub(super) const RECONNECT: Duration = Duration::from_millis(500);
const RECONNECT_MAX: Duration = Duration::from_secs(5);
/// How long a server may be gone.
const GONE: Duration = Duration::from_secs(15 * 60);

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
    /// Events since then, and when the first of them came.
    since: u64,
    waiting: Option<Instant>,
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
            waiting: None,
        }
    }

    /// Whether what came is to be compared before more is waited for.
    fn is_due(&self, now: Instant) -> bool {
        let waiting = self.waiting.map(|since| now.duration_since(since));
        self.since >= COMPARE_EVERY || waiting.is_some_and(|waiting| waiting >= COMPARE_AFTER)
    }

    fn take(&mut self, position: u64, bytes: &[u8]) {
        self.chain = self.chain.map(|c| c.then(&leaf_hash(bytes)));
        self.last = position;
        self.since += 1;
        self.waiting.get_or_insert_with(Instant::now);
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
        self.waiting = None;
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
    let mut lost = Lost::default();
    loop {
        let wait = match client
            .stream("/api/v1/events", &query, last.as_deref())
            .await
        {
            Ok(stream) => {
                lost.is_over();
                receive(client, &mut checked, stream, &mut last).await?;
                // What came until it broke is not left until something comes again.
                unless_passing(checked.compare(client).await)?;
                RECONNECT
            }
            Err(failure) => {
                let why = failure.message.clone();
                let wait = lost.wait(failure, Instant::now())?;
                tracing::info!(%why, ?wait, "the server is not reached; trying again");
                wait
            }
        };
        // The connection broke: go on after the last event that was seen.
        tokio::time::sleep(wait).await;
    }
}

/// Prints what comes until the stream breaks off.
async fn receive(
    client: &Client,
    checked: &mut Checked,
    stream: impl Stream<Item = Result<eventsource_stream::Event, Failure>>,
    last: &mut Option<String>,
) -> Result<(), Failure> {
    let mut stream = std::pin::pin!(stream);
    loop {
        let next = tokio::time::timeout(QUIET, stream.next()).await;
        if next.is_err() || checked.is_due(Instant::now()) {
            unless_passing(checked.compare(client).await)?;
        }
        let Ok(next) = next else {
            continue;
        };
        let Some(Ok(event)) = next else {
            return Ok(());
        };
        let position = event.id.parse().unwrap_or_default();
        let data = match serde_json::from_str(&event.data) {
            Ok(data) => {
                checked.take(position, event.data.as_bytes());
                data
            }
            // What is no JSON does not come through a text stream as it is.
            Err(_) => {
                let path = format!("/api/v1/events/{position}");
                let bytes = match client.resource(&path, MAX_EVENT_BYTES).await {
                    Ok(bytes) => bytes.unwrap_or_default(),
                    // It comes again with the next connection.
                    Err(failure) if failure.passes.is_some() => return Ok(()),
                    Err(failure) => return Err(failure),
                };
                checked.take(position, &bytes);
                Value::Null
            }
        };
        print(position, &data);
        *last = Some(event.id);
    }
}

/// A server that a subscriber cannot reach.
#[derive(Debug, Default)]
pub(super) struct Lost {
    /// It was reached before.
    known: bool,
    since: Option<Instant>,
    times: u32,
}

impl Lost {
    pub(super) fn is_over(&mut self) {
        *self = Self {
            known: true,
            ..Self::default()
        };
    }

    /// How long to wait until the next try; the failure, if there is to be none: it is one that does
    /// not pass, the server was never there, or it has been gone for too long.
    pub(super) fn wait(&mut self, failure: Failure, now: Instant) -> Result<Duration, Failure> {
        let Some(passes) = failure.passes.filter(|_| self.known) else {
            return Err(failure);
        };
        if now.duration_since(*self.since.get_or_insert(now)) > GONE {
            return Err(failure);
        }
        let longer = RECONNECT * 2_u32.saturating_pow(self.times);
        self.times = (self.times + 1).min(8);
        Ok(longer.min(RECONNECT_MAX).max(passes.min(GONE)))
    }
}

/// A server that cannot say it now is asked again later.
fn unless_passing(compared: Result<(), Failure>) -> Result<(), Failure> {
    match compared {
        Err(failure) if failure.passes.is_some() => Ok(()),
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

#[cfg(test)]
mod tests {
    use super::*;

    fn failure(passes: Option<u64>) -> Failure {
        let failure = Failure::new(Code::Failure, "any", "any");
        match passes {
            Some(seconds) => failure.passing(Duration::from_secs(seconds)),
            None => failure,
        }
    }

    #[test]
    fn a_server_that_was_there_is_waited_for_and_each_absence_counts_for_itself() {
        let start = Instant::now();
        let mut lost = Lost::default();
        // One that was never there is none to wait for.
        assert!(lost.wait(failure(Some(0)), start).is_err());
        lost.is_over();
        assert!(lost.wait(failure(None), start).is_err());
        let waits: Vec<_> = (0..6)
            .map(|_| lost.wait(failure(Some(0)), start).unwrap().as_millis())
            .collect();
        assert_eq!(waits, [500, 1000, 2000, 4000, 5000, 5000]);
        // As long as it says itself.
        let wait = lost.wait(failure(Some(20)), start).unwrap();
        assert_eq!(wait, Duration::from_secs(20));
        let late = start + GONE + Duration::from_secs(1);
        assert!(lost.wait(failure(Some(0)), late).is_err());
        lost.is_over();
        assert_eq!(lost.wait(failure(Some(0)), late).unwrap(), RECONNECT);
    }

    #[test]
    fn what_came_is_compared_also_while_events_go_on_coming_slowly() {
        let filters = ["project", "environment", "service", "kind", "deployment"];
        let mut checked = Checked::new(filters.map(|f| (f, None)), 0);
        let now = Instant::now();
        assert!(!checked.is_due(now + COMPARE_AFTER));
        checked.take(1, b"{}");
        assert!(!checked.is_due(now));
        assert!(checked.is_due(now + COMPARE_AFTER + Duration::from_secs(1)));
    }
}
