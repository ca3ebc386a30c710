//! Figures of this server in the Prometheus text format.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::sync::atomic::{AtomicI64, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use axum::extract::{MatchedPath, Request};
use axum::response::Response;
use daybook_events::log::Link;
use daybook_trace::figures;
use jiff::Timestamp;

/// Upper bounds of the latency buckets, in seconds.
const BOUNDS: [f64; 12] = [
    0.000_5, 0.001, 0.002_5, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1.0, 5.0, 30.0,
];

/// What is counted.
#[derive(Debug, Default)]
pub(crate) struct Metrics {
    requests: Mutex<BTreeMap<RequestKey, u64>>,
    latencies: Mutex<BTreeMap<Route, Latency>>,
    streams: AtomicI64,
    connections: AtomicI64,
    turned_away: AtomicU64,
    deliveries: Mutex<BTreeMap<(&'static str, &'static str), u64>>,
}

#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
struct Route {
    method: &'static str,
    path: String,
}

#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
struct RequestKey {
    route: Route,
    status: u16,
}

#[derive(Debug, Clone, Copy, Default)]
struct Latency {
    buckets: [u64; BOUNDS.len()],
    count: u64,
    seconds: f64,
}

/// Counts each request and how long it took until its answer began. Addresses that do not exist
/// are counted as one, so that nobody can fill the memory with them.
pub(crate) async fn count<F>(
    metrics: &Metrics,
    request: Request,
    next: impl FnOnce(Request) -> F,
) -> Response
where
    F: Future<Output = Response>,
{
    let matched = request.extensions().get::<MatchedPath>();
    let route = Route {
        method: method(request.method().as_str()),
        path: matched.map_or("other", MatchedPath::as_str).to_owned(),
    };
    let start = Instant::now();
    let response = next(request).await;
    metrics.took(route, response.status().as_u16(), start.elapsed());
    response
}

/// The name of a method, as far as there are such requests.
pub(crate) fn method(name: &str) -> &'static str {
    ["GET", "POST", "PUT", "DELETE", "HEAD"]
        .into_iter()
        .find(|m| *m == name)
        .unwrap_or("other")
}

/// Counts a connection until it is dropped.
#[derive(Debug)]
pub(crate) struct OpenConnection(Arc<Metrics>);

impl Drop for OpenConnection {
    fn drop(&mut self) {
        self.0.connections.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Counts an open stream until it is dropped.
#[derive(Debug)]
pub(crate) struct OpenStream(Arc<Metrics>);

impl Drop for OpenStream {
    fn drop(&mut self) {
        self.0.streams.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Metrics {
    /// Counts a stream as open.
    pub(crate) fn open_stream(self: &Arc<Self>) -> OpenStream {
        self.streams.fetch_add(1, Ordering::Relaxed);
        OpenStream(self.clone())
    }

    /// Counts a connection as open.
    pub(crate) fn open_connection(self: &Arc<Self>) -> OpenConnection {
        self.connections.fetch_add(1, Ordering::Relaxed);
        OpenConnection(self.clone())
    }

    /// Counts a connection that there was no room for.
    pub(crate) fn turned_away(&self) {
        self.turned_away.fetch_add(1, Ordering::Relaxed);
    }

    /// Counts a delivery of a webhook.
    pub(crate) fn delivered(&self, provider: &'static str, outcome: &'static str) {
        let mut deliveries = self
            .deliveries
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        *deliveries.entry((provider, outcome)).or_default() += 1;
    }

    fn took(&self, route: Route, status: u16, time: Duration) {
        let seconds = time.as_secs_f64();
        {
            let mut latencies = self
                .latencies
                .lock()
                .unwrap_or_else(PoisonError::into_inner);
            let latency = latencies.entry(route.clone()).or_default();
            latency.count += 1;
            latency.seconds += seconds;
            if let Some(i) = BOUNDS.iter().position(|b| seconds <= *b) {
                latency.buckets[i] += 1;
            }
        }
        let mut requests = self.requests.lock().unwrap_or_else(PoisonError::into_inner);
        *requests.entry(RequestKey { route, status }).or_default() += 1;
    }

    /// Writes the figures about HTTP.
    pub(crate) fn write(&self, page: &mut Exposition) {
        page.head(
            "daybook_http_requests_total",
            "counter",
            "Requests by route and status.",
        );
        let requests = self.requests.lock().unwrap_or_else(PoisonError::into_inner);
        for (key, count) in requests.iter() {
            let status = key.status.to_string();
            let labels = [
                ("method", key.route.method),
                ("route", key.route.path.as_str()),
                ("status", status.as_str()),
            ];
            page.sample("daybook_http_requests_total", &labels, *count as f64);
        }
        drop(requests);
        let name = "daybook_http_request_duration_seconds";
        page.head(
            name,
            "histogram",
            "Time from a request to its answer's head.",
        );
        let latencies = self
            .latencies
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        for (route, latency) in latencies.iter() {
            let labels = [("method", route.method), ("route", route.path.as_str())];
            let mut below = 0;
            for (bound, count) in BOUNDS.iter().zip(latency.buckets) {
                below += count;
                let bound = bound.to_string();
                let labels = [labels[0], labels[1], ("le", bound.as_str())];
                page.sample(&format!("{name}_bucket"), &labels, below as f64);
            }
            let all = [labels[0], labels[1], ("le", "+Inf")];
            page.sample(&format!("{name}_bucket"), &all, latency.count as f64);
            page.sample(&format!("{name}_sum"), &labels, latency.seconds);
            page.sample(&format!("{name}_count"), &labels, latency.count as f64);
        }
        drop(latencies);
        let name = "daybook_hook_deliveries_total";
        page.head(
            name,
            "counter",
            "Deliveries of webhooks by provider and what became of them.",
        );
        let deliveries = self
            .deliveries
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        for ((provider, outcome), count) in deliveries.iter() {
            let labels = [("provider", *provider), ("outcome", *outcome)];
            page.sample(name, &labels, *count as f64);
        }
        drop(deliveries);
        page.gauge(
            "daybook_http_connections",
            "Connections to the HTTP interface that are open.",
            self.connections.load(Ordering::Relaxed) as f64,
        );
        page.counter(
            "daybook_http_connections_refused_total",
            "Connections that there was no room for beside those that were open.",
            self.turned_away.load(Ordering::Relaxed) as f64,
        );
        page.gauge(
            "daybook_http_streams",
            "Streams of events and log lines that are open.",
            self.streams.load(Ordering::Relaxed) as f64,
        );
        write_spans(page);
    }
}

/// Writes what this process counts of its work beside requests.
pub(crate) fn write_work(page: &mut Exposition, now: Timestamp) {
    let builds = figures::builds();
    page.gauge(
        "daybook_builds_running",
        "Builds that this process runs now.",
        builds.running.load(Ordering::Relaxed) as f64,
    );
    let name = "daybook_builds_total";
    page.head(
        name,
        "counter",
        "Builds of this process by what they came to.",
    );
    let outcomes = [
        ("succeeded", &builds.succeeded),
        ("failed", &builds.failed),
        ("cancelled", &builds.cancelled),
    ];
    for (outcome, count) in outcomes {
        let count = count.load(Ordering::Relaxed) as f64;
        page.sample(name, &[("outcome", outcome)], count);
    }
    let webhooks = figures::webhooks();
    let name = "daybook_webhook_tries_total";
    page.head(
        name,
        "counter",
        "Tries of this process to deliver an event to a webhook, by what they came to.",
    );
    let mut tries = 0;
    for (outcome, count) in webhooks.tries() {
        tries += count;
        page.sample(name, &[("outcome", outcome.as_str())], count as f64);
    }
    let name = "daybook_webhook_try_duration_seconds";
    page.head(name, "summary", "How long those tries took.");
    let took = webhooks.took().as_secs_f64();
    page.sample(&format!("{name}_sum"), &[], took);
    page.sample(&format!("{name}_count"), &[], tries as f64);
    let waiting = webhooks.waiting();
    let name = "daybook_webhook_waiting_events";
    page.head(
        name,
        "gauge",
        "Events that a webhook which this process looks after has still to get.",
    );
    for (id, waits) in &waiting {
        let id = id.to_string();
        page.sample(name, &[("webhook", id.as_str())], waits.events as f64);
    }
    let name = "daybook_webhook_lag_seconds";
    page.head(
        name,
        "gauge",
        "How long ago became due what has waited for a webhook for longest: when it happened, or was \
         asked for again; 0 if nothing waits.",
    );
    for (id, waits) in &waiting {
        let id = id.to_string();
        let lag = waits.oldest.map_or(0.0, |at| since(at, now));
        page.sample(name, &[("webhook", id.as_str())], lag);
    }
}

/// Seconds between two times; 0 if the clocks of two machines make it less.
pub(crate) fn since(then: Timestamp, now: Timestamp) -> f64 {
    now.duration_since(then).as_secs_f64().max(0.0)
}

/// Writes how the connection to the log's server does.
pub(crate) fn write_link(page: &mut Exposition, link: Link) {
    page.gauge(
        "daybook_nats_up",
        "Whether the connection to NATS stands.",
        f64::from(u8::from(link.is_up)),
    );
    page.counter(
        "daybook_nats_connects_total",
        "How often the connection to NATS was made.",
        link.connects as f64,
    );
    let name = "daybook_nats_messages_total";
    page.head(name, "counter", "Messages from and to NATS.");
    page.sample(name, &[("direction", "in")], link.messages_in as f64);
    page.sample(name, &[("direction", "out")], link.messages_out as f64);
    let name = "daybook_nats_bytes_total";
    page.head(
        name,
        "counter",
        "Bytes of the messages from and to NATS, without what the protocol adds.",
    );
    page.sample(name, &[("direction", "in")], link.bytes_in as f64);
    page.sample(name, &[("direction", "out")], link.bytes_out as f64);
}

/// Writes what became of the spans of this process, if it sends them anywhere.
fn write_spans(page: &mut Exposition) {
    if !daybook_trace::is_recording() {
        return;
    }
    let figures = daybook_trace::figures();
    let name = "daybook_otlp_spans_total";
    page.head(
        name,
        "counter",
        "Spans by what became of them: sent, or dropped because too many waited (overflowed) or \
         the collector did not take them (refused).",
    );
    let outcomes = [
        ("sent", &figures.sent),
        ("overflowed", &figures.overflowed),
        ("refused", &figures.refused),
    ];
    for (outcome, count) in outcomes {
        let count = count.load(Ordering::Relaxed) as f64;
        page.sample(name, &[("outcome", outcome)], count);
    }
    page.gauge(
        "daybook_otlp_spans_waiting",
        "Spans that are to be sent, or are on their way.",
        figures.waiting.load(Ordering::Relaxed) as f64,
    );
}

/// A page in the Prometheus text format.
#[derive(Debug, Default)]
pub(crate) struct Exposition(String);

impl Exposition {
    /// The media type of the format.
    pub(crate) const MEDIA_TYPE: &str = "text/plain; version=0.0.4; charset=utf-8";

    /// Begins a metric.
    pub(crate) fn head(&mut self, name: &str, kind: &str, help: &str) {
        let _ = writeln!(self.0, "# HELP {name} {help}\n# TYPE {name} {kind}");
    }

    /// Writes one value of the metric that was begun.
    pub(crate) fn sample(&mut self, name: &str, labels: &[(&str, &str)], value: f64) {
        let labels: Vec<String> = labels
            .iter()
            .map(|(k, v)| {
                let v = v
                    .replace('\\', "\\\\")
                    .replace('"', "\\\"")
                    .replace('\n', "\\n");
                format!("{k}=\"{v}\"")
            })
            .collect();
        let _ = match labels.is_empty() {
            true => writeln!(self.0, "{name} {value}"),
            false => writeln!(self.0, "{name}{{{}}} {value}", labels.join(",")),
        };
    }

    /// A metric with one value that goes up and down.
    pub(crate) fn gauge(&mut self, name: &str, help: &str, value: f64) {
        self.head(name, "gauge", help);
        self.sample(name, &[], value);
    }

    /// A metric with one value that only goes up.
    pub(crate) fn counter(&mut self, name: &str, help: &str, value: f64) {
        self.head(name, "counter", help);
        self.sample(name, &[], value);
    }

    /// The page.
    pub(crate) fn into_text(self) -> String {
        self.0
    }
}
