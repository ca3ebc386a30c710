//! Sends spans to an OpenTelemetry collector, by OTLP over HTTP.
//!
//! Nothing waits for it. Spans that have ended are handed over in batches by a thread of the SDK; of
//! those that wait there are at most [`QUEUE`], and further ones are dropped. What is dropped is
//! counted, and the log says so once until spans are taken again.

use std::env;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use async_trait::async_trait;
use clap::Args;
use opentelemetry::{Context, KeyValue, Value, global};
use opentelemetry_http::{Bytes, HttpClient, HttpError, Request, Response};
use opentelemetry_otlp::{
    OTEL_EXPORTER_OTLP_ENDPOINT, OTEL_EXPORTER_OTLP_PROTOCOL, OTEL_EXPORTER_OTLP_TIMEOUT,
    OTEL_EXPORTER_OTLP_TRACES_ENDPOINT, OTEL_EXPORTER_OTLP_TRACES_PROTOCOL,
    OTEL_EXPORTER_OTLP_TRACES_TIMEOUT, SpanExporter as OtlpExporter, WithExportConfig as _,
    WithHttpConfig as _,
};
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::error::OTelSdkResult;
use opentelemetry_sdk::trace::{
    BatchConfigBuilder, BatchSpanProcessor, SdkTracerProvider, Span, SpanData, SpanExporter,
    SpanProcessor,
};
use tokio::runtime::Handle;
use url::Url;
use uuid::Uuid;

use crate::exit::{Code, Failure};

/// So many spans wait or are on their way at most.
const QUEUE: u64 = 2048;
/// So many are sent at once at most.
const BATCH: usize = 512;
/// A span waits no longer than this, unless the collector is slow.
const DELAY: Duration = Duration::from_secs(2);
/// How long a collector may take to answer, unless the environment says.
const TIMEOUT: Duration = Duration::from_secs(10);
/// How long the end of a process waits for the last spans to be taken.
const LAST: Duration = Duration::from_secs(5);
/// What is read of an answer at most.
const ANSWER_MAX: usize = 64 * 1024;

/// Where spans go.
#[derive(Debug, Clone, Default, Args)]
pub struct OtlpArgs {
    /// Send spans to this OpenTelemetry collector by OTLP over HTTP (protobuf): its base address,
    /// such as http://127.0.0.1:4318. If not given, OTEL_EXPORTER_OTLP_TRACES_ENDPOINT and
    /// OTEL_EXPORTER_OTLP_ENDPOINT are asked, and without them nothing is sent. Headers such as
    /// tokens come from OTEL_EXPORTER_OTLP_HEADERS, the name of this process from
    /// OTEL_SERVICE_NAME.
    #[arg(long, value_name = "URL")]
    pub otlp: Option<String>,
}

/// Where spans are sent: the address that they are posted to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Collector(Url);

/// A variable of the environment. An empty one is as good as none, says OpenTelemetry.
fn variable(name: &str) -> Option<String> {
    env::var(name).ok().filter(|value| !value.is_empty())
}

impl OtlpArgs {
    /// Where spans are sent, if they are: as the flag says, or else the environment.
    pub fn collector(&self) -> Result<Option<Collector>, Failure> {
        collector(self.otlp.as_deref(), &variable)
    }
}

fn collector(
    flag: Option<&str>,
    variable: &dyn Fn(&str) -> Option<String>,
) -> Result<Option<Collector>, Failure> {
    let is = |name: &str, value: &str| {
        variable(name).is_some_and(|found| found.trim().eq_ignore_ascii_case(value))
    };
    let url = match flag {
        Some(base) => signal(base)?,
        None if is("OTEL_SDK_DISABLED", "true") || is("OTEL_TRACES_EXPORTER", "none") => {
            return Ok(None);
        }
        None => match (
            variable(OTEL_EXPORTER_OTLP_TRACES_ENDPOINT),
            variable(OTEL_EXPORTER_OTLP_ENDPOINT),
        ) {
            (Some(url), _) => address(&url)?,
            (None, Some(base)) => signal(&base)?,
            (None, None) => return Ok(None),
        },
    };
    let protocol = variable(OTEL_EXPORTER_OTLP_TRACES_PROTOCOL)
        .or_else(|| variable(OTEL_EXPORTER_OTLP_PROTOCOL));
    match protocol.as_deref() {
        None | Some("http/protobuf") => Ok(Some(Collector(url))),
        Some(_) => Err(Failure::new(
            Code::Usage,
            "otlp_protocol_unsupported",
            "spans are sent by OTLP over HTTP in protobuf, and the environment asks for another \
             protocol",
        )
        .hint(
            "set OTEL_EXPORTER_OTLP_TRACES_PROTOCOL=http/protobuf and name the collector's port \
             for HTTP, mostly 4318; or set OTEL_TRACES_EXPORTER=none to send nothing",
        )),
    }
}

/// Where spans go at a base address.
fn signal(base: &str) -> Result<Url, Failure> {
    let mut url = address(base)?;
    let path = format!("{}/v1/traces", url.path().trim_end_matches('/'));
    url.set_path(&path);
    Ok(url)
}

fn address(text: &str) -> Result<Url, Failure> {
    let unusable = |why: &str, hint: &str| {
        Failure::new(
            Code::Usage,
            "otlp_url_unusable",
            format!("spans cannot be sent to {}: {why}", shown(text)),
        )
        .hint(hint)
    };
    let form = "give the base address of a collector, such as http://127.0.0.1:4318";
    let url = Url::parse(text.trim()).map_err(|e| unusable(&e.to_string(), form))?;
    if !matches!(url.scheme(), "http" | "https") || url.host_str().is_none() {
        return Err(unusable("it is no http or https address", form));
    }
    if !url.username().is_empty() || url.password().is_some() || url.query().is_some() {
        return Err(unusable(
            "it has credentials or a query in it, which others would read in logs",
            "put a token into OTEL_EXPORTER_OTLP_HEADERS: Authorization=Bearer%20…",
        ));
    }
    Ok(url)
}

/// An address as it may be shown.
fn shown(text: &str) -> String {
    let text = daybook_events::without_credentials(text);
    let end = text.find(['?', '#']).unwrap_or(text.len());
    text[..end].to_owned()
}

/// Spans are recorded and sent as long as this is there.
#[derive(Debug)]
pub struct Telemetry {
    provider: SdkTracerProvider,
}

impl Telemetry {
    /// Begins to record spans, and to send them.
    pub fn start(collector: &Collector, roles: &str) -> Result<Self, Failure> {
        let unusable = |e: &dyn std::error::Error| {
            Failure::new(Code::Usage, "otlp_unusable", daybook_events::with_causes(e))
                .hint("check --otlp and the variables OTEL_* of the environment")
        };
        let timeout = variable(OTEL_EXPORTER_OTLP_TRACES_TIMEOUT)
            .or_else(|| variable(OTEL_EXPORTER_OTLP_TIMEOUT))
            .and_then(|millis| millis.parse().ok())
            .map_or(TIMEOUT, Duration::from_millis);
        let client = reqwest::Client::builder()
            .user_agent(concat!("daybook/", env!("CARGO_PKG_VERSION")))
            .redirect(reqwest::redirect::Policy::none())
            .referer(false)
            .no_proxy()
            .connect_timeout(timeout.min(Duration::from_secs(5)))
            .timeout(timeout)
            .build()
            .map_err(|e| unusable(&e))?;
        let exporter = OtlpExporter::builder()
            .with_http()
            .with_http_client(Courier {
                client,
                runtime: Handle::current(),
            })
            .with_endpoint(collector.0.as_str())
            .with_timeout(timeout)
            .build()
            .map_err(|e| unusable(&e))?;
        let counted = Counted {
            exporter,
            to: shown(collector.0.as_str()),
            refused: AtomicBool::new(false),
        };
        let config = BatchConfigBuilder::default()
            .with_max_queue_size(usize::try_from(QUEUE).unwrap_or(usize::MAX))
            .with_max_export_batch_size(BATCH)
            .with_scheduled_delay(DELAY)
            .build();
        let batches = BatchSpanProcessor::builder(counted)
            .with_batch_config(config)
            .build();
        let provider = SdkTracerProvider::builder()
            .with_resource(resource(roles))
            .with_span_processor(Gate {
                batches,
                overflowed: AtomicBool::new(false),
            })
            .build();
        global::set_tracer_provider(provider.clone());
        daybook_trace::record(env!("CARGO_PKG_VERSION"));
        tracing::info!(collector = %shown(collector.0.as_str()), "spans are sent by OTLP");
        Ok(Self { provider })
    }

    /// Sends what waits, and no more after that. It takes a few seconds at most.
    pub async fn end(self) {
        let ended =
            tokio::task::spawn_blocking(move || self.provider.shutdown_with_timeout(LAST)).await;
        let waiting = daybook_trace::figures().waiting.load(Ordering::Relaxed);
        if !matches!(ended, Ok(Ok(()))) && waiting > 0 {
            tracing::warn!(spans = waiting, "the last spans were not taken in time");
        }
    }
}

/// What all spans of this process have in common.
fn resource(roles: &str) -> Resource {
    // The variables OTEL_SERVICE_NAME and OTEL_RESOURCE_ATTRIBUTES are read here.
    let found = Resource::builder().build();
    let has = |key: &'static str| found.get(&key.into());
    let mut own = vec![
        KeyValue::new("service.version", env!("CARGO_PKG_VERSION")),
        KeyValue::new("process.pid", i64::from(std::process::id())),
        KeyValue::new("daybook.roles", roles.to_owned()),
    ];
    let unnamed = |name: &Value| name.as_str().starts_with("unknown_service");
    if has("service.name").is_none_or(|name| unnamed(&name)) {
        own.push(KeyValue::new("service.name", "daybook"));
    }
    if has("service.instance.id").is_none() {
        let id = Uuid::new_v4().to_string();
        own.push(KeyValue::new("service.instance.id", id));
    }
    Resource::builder().with_attributes(own).build()
}

/// Posts what the exporter has written. The exporter runs on a thread of its own, outside of the
/// runtime that the client needs.
#[derive(Debug)]
struct Courier {
    client: reqwest::Client,
    runtime: Handle,
}

#[async_trait]
impl HttpClient for Courier {
    async fn send_bytes(&self, request: Request<Bytes>) -> Result<Response<Bytes>, HttpError> {
        let request = reqwest::Request::try_from(request)?;
        let client = self.client.clone();
        let posted = self.runtime.spawn(async move {
            let mut answer = client.execute(request).await?;
            let mut said = Vec::new();
            while let Some(part) = answer.chunk().await? {
                let room = ANSWER_MAX - said.len();
                said.extend_from_slice(&part[..part.len().min(room)]);
                if said.len() == ANSWER_MAX {
                    break;
                }
            }
            Ok((answer.status(), said))
        });
        let answered: Result<_, reqwest::Error> = posted.await?;
        let (status, said) = answered.map_err(reqwest::Error::without_url)?;
        Ok(Response::builder().status(status).body(said.into())?)
    }
}

/// Lets so many spans through as there is room for, and leaves out those that came to nothing.
#[derive(Debug)]
struct Gate {
    batches: BatchSpanProcessor,
    /// Whether it was said that there was no room.
    overflowed: AtomicBool,
}

impl SpanProcessor for Gate {
    fn on_start(&self, span: &mut Span, context: &Context) {
        self.batches.on_start(span, context);
    }

    fn on_end(&self, span: SpanData) {
        let idle = |a: &KeyValue| a.key.as_str() == daybook_trace::IDLE;
        if !span.span_context.is_sampled() || span.attributes.iter().any(idle) {
            return;
        }
        let figures = daybook_trace::figures();
        if figures.waiting.fetch_add(1, Ordering::Relaxed) < QUEUE {
            self.overflowed.store(false, Ordering::Relaxed);
            return self.batches.on_end(span);
        }
        figures.waiting.fetch_sub(1, Ordering::Relaxed);
        figures.overflowed.fetch_add(1, Ordering::Relaxed);
        if !self.overflowed.swap(true, Ordering::Relaxed) {
            tracing::warn!(
                waiting = QUEUE,
                "spans are dropped: the collector does not take them as fast as they come"
            );
        }
    }

    fn force_flush(&self) -> OTelSdkResult {
        self.batches.force_flush()
    }

    fn shutdown_with_timeout(&self, timeout: Duration) -> OTelSdkResult {
        self.batches.shutdown_with_timeout(timeout)
    }

    fn set_resource(&mut self, resource: &Resource) {
        self.batches.set_resource(resource);
    }
}

/// Counts what is taken, and what is not.
#[derive(Debug)]
struct Counted {
    exporter: OtlpExporter,
    to: String,
    /// Whether the last ones were refused, which was said then.
    refused: AtomicBool,
}

impl SpanExporter for Counted {
    async fn export(&self, batch: Vec<SpanData>) -> OTelSdkResult {
        let spans = batch.len() as u64;
        let result = self.exporter.export(batch).await;
        let figures = daybook_trace::figures();
        figures.waiting.fetch_sub(spans, Ordering::Relaxed);
        match &result {
            Ok(()) => {
                figures.sent.fetch_add(spans, Ordering::Relaxed);
                if self.refused.swap(false, Ordering::Relaxed) {
                    tracing::info!(collector = %self.to, "spans are taken again");
                }
            }
            Err(error) => {
                figures.refused.fetch_add(spans, Ordering::Relaxed);
                if !self.refused.swap(true, Ordering::Relaxed) {
                    tracing::warn!(collector = %self.to, %error,
                        "spans are dropped: the collector does not take them");
                }
            }
        }
        result
    }

    fn shutdown_with_timeout(&self, timeout: Duration) -> OTelSdkResult {
        self.exporter.shutdown_with_timeout(timeout)
    }

    fn force_flush(&self) -> OTelSdkResult {
        self.exporter.force_flush()
    }

    fn set_resource(&mut self, resource: &Resource) {
        self.exporter.set_resource(resource);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(flag: Option<&str>, environment: &[(&str, &str)]) -> Result<Option<String>, String> {
        let variable = |name: &str| {
            let found = environment.iter().find(|(known, _)| *known == name);
            found.map(|(_, value)| (*value).to_owned())
        };
        match collector(flag, &variable) {
            Ok(collector) => Ok(collector.map(|c| c.0.to_string())),
            Err(failure) => Err(failure.kind),
        }
    }

    #[test]
    fn the_flag_goes_before_the_environment() {
        let base = ("OTEL_EXPORTER_OTLP_ENDPOINT", "http://base:4318");
        let exact = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "https://exact/here");
        let at = |url: &str| Ok(Some(url.to_owned()));
        assert_eq!(found(None, &[]), Ok(None));
        assert_eq!(found(None, &[base]), at("http://base:4318/v1/traces"));
        assert_eq!(found(None, &[base, exact]), at("https://exact/here"));
        assert_eq!(
            found(Some("http://flag:4318/otlp/"), &[base, exact]),
            at("http://flag:4318/otlp/v1/traces")
        );
        for off in [
            ("OTEL_SDK_DISABLED", "true"),
            ("OTEL_TRACES_EXPORTER", "none"),
        ] {
            assert_eq!(found(None, &[base, off]), Ok(None));
            assert_eq!(
                found(Some("http://flag:4318"), &[base, off]),
                at("http://flag:4318/v1/traces")
            );
        }
    }

    #[test]
    fn what_spans_cannot_be_sent_to_is_refused() {
        for url in [
            "",
            "127.0.0.1:4318",
            "grpc://127.0.0.1:4317",
            "http://",
            "http://ada:secret@host:4318",
            "http://host:4318?token=secret",
        ] {
            assert_eq!(
                found(Some(url), &[]),
                Err("otlp_url_unusable".into()),
                "{url}"
            );
        }
        let grpc = ("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc");
        let protobuf = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "http/protobuf");
        let url = Some("http://host:4318");
        assert_eq!(found(url, &[grpc]), Err("otlp_protocol_unsupported".into()));
        assert!(found(url, &[grpc, protobuf]).is_ok());
    }
}
