//! Sends one request, to where it may go, and says what came of it.

use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use daybook_events::subscription::EndpointUrl;
use daybook_events::{TraceParent, with_causes};
use jiff::Timestamp;
use reqwest::header::{CONTENT_TYPE, LOCATION, RETRY_AFTER};
use url::{Host, Url};

use super::pace::retry_after;
use crate::git_transport::{CheckedResolver, SourcePolicy, TransportError, printable, refusal_in};

/// At most so many bytes of an answer are read.
const ANSWER_MAX: usize = 16 << 10;
/// At most so many characters of it are kept.
const EXCERPT: usize = 200;

/// What came of a request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Sent {
    /// The receiver took it.
    Taken {
        /// The status of its answer.
        status: u16,
    },
    /// It did not.
    Refused {
        /// The status of its answer, if there was one.
        status: Option<u16>,
        /// A stable code.
        code: String,
        /// What happened, in words.
        message: String,
        /// When it wants to be asked again.
        retry_after: Option<Duration>,
    },
    /// Nothing was sent: something here is missing that is needed for it.
    Withheld {
        /// A stable code.
        code: &'static str,
        /// What is missing.
        message: String,
    },
}

/// A request.
#[derive(Debug)]
pub(super) struct Message {
    pub(super) url: EndpointUrl,
    pub(super) content_type: &'static str,
    pub(super) id: String,
    pub(super) timestamp: String,
    /// Signatures in the form of Standard Webhooks, with spaces between them.
    pub(super) signature: String,
    pub(super) body: Bytes,
    /// The place in a trace that this is sent from.
    pub(super) traceparent: Option<TraceParent>,
}

/// An HTTP client that follows no redirect, uses no proxy, and connects to checked addresses only.
#[derive(Debug, Clone)]
pub(super) struct Sender {
    client: reqwest::Client,
    policy: SourcePolicy,
}

impl Sender {
    /// A client. With `trusting`, `http` and addresses that are not public are allowed.
    pub(super) fn new(trusting: bool, timeout: Duration) -> Result<Self, reqwest::Error> {
        let policy = if trusting {
            SourcePolicy::trusting()
        } else {
            SourcePolicy::default()
        };
        // Another part of the process may have chosen its provider already; that is as good.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let client = reqwest::Client::builder()
            .user_agent(concat!("daybook-webhooks/", env!("CARGO_PKG_VERSION")))
            .redirect(reqwest::redirect::Policy::none())
            .referer(false)
            .no_proxy()
            .connect_timeout(timeout.min(Duration::from_secs(5)))
            .timeout(timeout)
            .pool_idle_timeout(Duration::from_secs(30))
            .dns_resolver(CheckedResolver(Arc::new(policy.clone())))
            .build()?;
        Ok(Self { client, policy })
    }

    /// Sends a request. Never fails: what goes wrong is what came of it.
    pub(super) async fn send(&self, message: Message) -> Sent {
        let url = match self.checked(&message.url) {
            Ok(url) => url,
            Err(refused) => return not_allowed(&refused),
        };
        let mut request = self
            .client
            .post(url)
            .header(CONTENT_TYPE, message.content_type)
            .header("webhook-id", message.id)
            .header("webhook-timestamp", message.timestamp)
            .header("webhook-signature", message.signature)
            .body(message.body);
        if let Some(place) = message.traceparent {
            request = request.header("traceparent", place.to_string());
        }
        match request.send().await {
            Ok(response) => judge(response).await,
            Err(error) => failed(error),
        }
    }

    /// The URL, if its scheme and the address in it are allowed. Names are checked when they are
    /// resolved.
    fn checked(&self, url: &EndpointUrl) -> Result<Url, TransportError> {
        let invalid = |reason: String| TransportError::Protocol { reason };
        let parsed = Url::parse(url.as_str()).map_err(|e| invalid(e.to_string()))?;
        self.policy.check_scheme(parsed.as_str())?;
        let address: Option<IpAddr> = match parsed.host() {
            Some(Host::Ipv4(a)) => Some(a.into()),
            Some(Host::Ipv6(a)) => Some(a.into()),
            Some(Host::Domain(_)) | None => None,
        };
        if let (Some(address), Some(host)) = (address, parsed.host_str()) {
            self.policy.check_address(host, address)?;
        }
        Ok(parsed)
    }
}

fn refused(code: &str, message: String) -> Sent {
    Sent::Refused {
        status: None,
        code: code.to_owned(),
        message,
        retry_after: None,
    }
}

fn not_allowed(error: &TransportError) -> Sent {
    match error {
        TransportError::NotAllowed { what, .. } => {
            refused("scheme_refused", format!("{what} is not allowed here"))
        }
        TransportError::AddressRefused { .. } => refused("address_refused", error.to_string()),
        TransportError::Unavailable { .. } => refused("unreachable", error.to_string()),
        other => refused("invalid_url", other.to_string()),
    }
}

fn failed(error: reqwest::Error) -> Sent {
    let error = error.without_url();
    if let Some(known) = refusal_in(&error) {
        return not_allowed(&known);
    }
    let code = if error.is_timeout() {
        "timeout"
    } else if error.is_connect() {
        "unreachable"
    } else {
        "connection_failed"
    };
    refused(code, printable(&with_causes(&error)))
}

async fn judge(mut response: reqwest::Response) -> Sent {
    let status = response.status();
    let number = status.as_u16();
    if status.is_success() {
        return Sent::Taken { status: number };
    }
    let header = |name| response.headers().get(name).and_then(|v| v.to_str().ok());
    if status.is_redirection() {
        let to = header(LOCATION).map(printable).unwrap_or_default();
        return Sent::Refused {
            status: Some(number),
            code: "redirect_refused".into(),
            message: format!("it redirects to {to:?}, which is not followed"),
            retry_after: None,
        };
    }
    let retry_after = header(RETRY_AFTER).and_then(|v| retry_after(v, Timestamp::now()));
    let excerpt = excerpt(&mut response).await;
    Sent::Refused {
        status: Some(number),
        code: format!("status_{number}"),
        message: match excerpt.is_empty() {
            true => format!("it answers {status}"),
            false => format!("it answers {status}: {excerpt}"),
        },
        retry_after,
    }
}

/// The beginning of an answer, on one line.
async fn excerpt(response: &mut reqwest::Response) -> String {
    let mut read = Vec::new();
    while read.len() < ANSWER_MAX
        && let Ok(Some(chunk)) = response.chunk().await
    {
        read.extend_from_slice(&chunk);
    }
    let text = String::from_utf8_lossy(&read);
    printable(&text).trim().chars().take(EXCERPT).collect()
}
