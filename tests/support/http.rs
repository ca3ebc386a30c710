//! Requests to servers and through gateways, from tests that are not asynchronous.

use std::collections::BTreeMap;
use std::sync::OnceLock;
use std::time::Duration;

use reqwest::Method;
use serde_json::Value;

/// An answer.
#[derive(Debug, Clone)]
pub struct Answer {
    /// Its status.
    pub status: u16,
    /// Its headers, in lower case; the last of each name.
    pub headers: BTreeMap<String, String>,
    /// Its body as text.
    pub body: String,
}

impl Answer {
    /// The body as JSON.
    pub fn json(&self) -> Value {
        serde_json::from_str(&self.body)
            .unwrap_or_else(|e| panic!("{e}: the answer is not JSON: {self:?}"))
    }

    /// The deployment that answered, if a gateway says so.
    pub fn by(&self) -> Option<&str> {
        self.headers.get("x-daybook-deployment").map(String::as_str)
    }
}

/// Sends a request. A server that cannot be reached is an error, in words.
pub fn request(
    method: Method,
    url: &str,
    headers: &[(&str, &str)],
    body: Option<&Value>,
) -> Result<Answer, String> {
    let text = body.map(Value::to_string);
    let json = text.as_ref().map(|_| ("Content-Type", "application/json"));
    let headers: Vec<_> = headers.iter().copied().chain(json).collect();
    request_with(method, url, &headers, text.unwrap_or_default())
}

/// Sends a request with a body of which each byte counts.
pub fn request_with(
    method: Method,
    url: &str,
    headers: &[(&str, &str)],
    body: impl Into<Vec<u8>>,
) -> Result<Answer, String> {
    let (runtime, client) = shared();
    let mut request = client.request(method, url);
    for (name, value) in headers {
        request = request.header(*name, *value);
    }
    let body = body.into();
    if !body.is_empty() {
        request = request.body(body);
    }
    runtime.block_on(async {
        let answer = request.send().await.map_err(|e| format!("{e:?}"))?;
        let status = answer.status().as_u16();
        let headers = answer
            .headers()
            .iter()
            .filter_map(|(k, v)| Some((k.to_string(), v.to_str().ok()?.to_owned())))
            .collect();
        let body = answer.text().await.map_err(|e| format!("{e:?}"))?;
        Ok(Answer {
            status,
            headers,
            body,
        })
    })
}

fn shared() -> &'static (tokio::runtime::Runtime, reqwest::Client) {
    static SHARED: OnceLock<(tokio::runtime::Runtime, reqwest::Client)> = OnceLock::new();
    SHARED.get_or_init(|| {
        let _ = rustls::crypto::ring::default_provider().install_default();
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
            .unwrap();
        // Servers come and go: a connection that is kept may be one to a server that is gone.
        let client = reqwest::Client::builder()
            .no_proxy()
            .pool_max_idle_per_host(0)
            .redirect(reqwest::redirect::Policy::none())
            .timeout(Duration::from_secs(30))
            .build()
            .unwrap();
        (runtime, client)
    })
}
