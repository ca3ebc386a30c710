//! The client of a Daybook server.

use std::io::Write as _;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use daybook_events::without_credentials;
use eventsource_stream::Eventsource;
use futures_util::{Stream, StreamExt};
use jiff::Timestamp;
use reqwest::{Method, Response, StatusCode};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::Value;

use crate::commands::ServerArgs;
use crate::contexts::{self, Target, Token};
use crate::exit::{Code, Failure};

/// When to try again if nobody says when.
const SOON: Duration = Duration::from_millis(500);

/// How long an upload may take, as slow as the line may be.
const UPLOAD_WITHIN: Duration = Duration::from_secs(15 * 60);

/// Talks to one server. What it reads is never older than what it has seen or written before.
#[derive(Debug, Clone)]
pub struct Client {
    http: reqwest::Client,
    base: String,
    token: Option<Token>,
    actor: Option<String>,
    /// The newest position of the ledger that an answer stood on.
    seen: Arc<AtomicU64>,
}

/// One line of output of a build or an instance, as the server sends it.
#[derive(Debug, Clone, serde::Deserialize)]
pub struct LogLine {
    /// The rest of it.
    #[serde(flatten)]
    pub line: daybook_events::lines::Line,
}

impl Client {
    /// A client of the server that the arguments name.
    pub fn new(args: &ServerArgs) -> Result<Self, Failure> {
        let target = contexts::target(args)?;
        Self::of(args, target)
    }

    /// The same, with this token and no other.
    pub fn with_token(args: &ServerArgs, token: Option<Token>) -> Result<Self, Failure> {
        let target = contexts::target(args)?;
        Self::of(args, Target { token, ..target })
    }

    fn of(args: &ServerArgs, target: Target) -> Result<Self, Failure> {
        let in_the_clear = target.is_in_the_clear();
        let base = target.server;
        if !base.starts_with("http://") && !base.starts_with("https://") {
            return Err(Failure::new(
                Code::Usage,
                "invalid_server",
                format!(
                    "{:?} is not the URL of a server",
                    without_credentials(&base)
                ),
            )
            .hint("use http://HOST:PORT or https://HOST, in --server or DAYBOOK_URL"));
        }
        if target.token.is_some() && in_the_clear && !target.insecure {
            return Err(Failure::new(
                Code::Usage,
                "token_in_the_clear",
                format!(
                    "the token would go to {} in the clear, for everybody on the way to read",
                    without_credentials(&base)
                ),
            )
            .hint("use https, or add --insecure if nobody else is on the way"));
        }
        let http = reqwest::Client::builder()
            .no_proxy()
            .connect_timeout(Duration::from_secs(5))
            .user_agent(concat!("daybook/", env!("CARGO_PKG_VERSION")))
            .build()
            .map_err(|e| Failure::new(Code::Failure, "http_client", e.to_string()))?;
        let actor = args
            .actor
            .clone()
            .or_else(|| std::env::var("USER").ok())
            .filter(|a| !a.is_empty());
        Ok(Self {
            http,
            base,
            token: target.token,
            actor,
            seen: Arc::default(),
        })
    }

    /// What is read from now on takes the events up to this position into account.
    pub fn saw(&self, position: u64) {
        self.seen.fetch_max(position, Ordering::Relaxed);
    }

    /// The newest position that an answer was as of; 0 before the first answer.
    pub fn position(&self) -> u64 {
        self.seen.load(Ordering::Relaxed)
    }

    /// The server's URL, as it may be shown.
    pub fn shown(&self) -> String {
        without_credentials(&self.base)
    }

    /// The server's URL, with what it may have of credentials.
    pub fn base(&self) -> &str {
        &self.base
    }

    async fn send(&self, request: reqwest::RequestBuilder) -> Result<Response, Failure> {
        let request = match &self.actor {
            Some(actor) => request.header("Daybook-Actor", actor),
            None => request,
        };
        let request = match &self.token {
            Some(token) => request.bearer_auth(token.text()),
            None => request,
        };
        let answer = request.send().await.map_err(|e| self.unreachable(&e))?;
        if answer.status().is_success() {
            let position = answer.headers().get("daybook-position");
            let position = position.and_then(|p| p.to_str().ok()?.parse().ok());
            self.saw(position.unwrap_or_default());
            return Ok(answer);
        }
        Err(problem(answer).await)
    }

    fn unreachable(&self, error: &reqwest::Error) -> Failure {
        let mut cause: &dyn std::error::Error = error;
        while let Some(source) = cause.source() {
            cause = source;
        }
        Failure::new(
            Code::Unreachable,
            "server_unreachable",
            format!("the server {} cannot be reached: {cause}", self.shown()),
        )
        .hint("start one with `daybook up`, or name another with --server or DAYBOOK_URL")
        .passing(SOON)
    }

    /// GET.
    pub async fn get<T: DeserializeOwned>(
        &self,
        path: &str,
        query: &[(&str, Option<String>)],
    ) -> Result<T, Failure> {
        let query: Vec<_> = query
            .iter()
            .filter_map(|(k, v)| v.as_ref().map(|v| (*k, v)))
            .collect();
        let request = self
            .http
            .get(format!("{}{path}", self.base))
            .query(&query)
            .header("Daybook-Min-Position", self.seen.load(Ordering::Relaxed))
            .timeout(Duration::from_secs(30));
        read(self.send(request).await?).await
    }

    /// GET of what does not depend on how far the server has folded the log, and is asked for also
    /// while it is behind.
    pub async fn get_as_it_is<T: DeserializeOwned>(&self, path: &str) -> Result<T, Failure> {
        let request = self.http.get(format!("{}{path}", self.base));
        let request = request.timeout(Duration::from_secs(30));
        read(self.send(request).await?).await
    }

    /// GET, with the time that the server had.
    pub async fn dated(&self, path: &str) -> Result<(Value, Option<Timestamp>), Failure> {
        let request = self.http.get(format!("{}{path}", self.base));
        let answer = self.send(request.timeout(Duration::from_secs(5))).await?;
        let date = answer.headers().get(reqwest::header::DATE);
        let date = date.and_then(|d| jiff::fmt::rfc2822::parse(d.to_str().ok()?).ok());
        Ok((read(answer).await?, date.map(|d| d.timestamp())))
    }

    /// GET of what a server answers with, ready or not.
    pub async fn even_if_unready(&self, path: &str) -> Result<Value, Failure> {
        let request = self.http.get(format!("{}{path}", self.base));
        let request = match &self.token {
            Some(token) => request.bearer_auth(token.text()),
            None => request,
        };
        let answer = request.timeout(Duration::from_secs(10)).send().await;
        let answer = answer.map_err(|e| self.unreachable(&e))?;
        match answer.status().as_u16() {
            200 | 503 => read(answer).await,
            _ => Err(problem(answer).await),
        }
    }

    /// GET of what is no JSON.
    pub async fn text(&self, path: &str) -> Result<String, Failure> {
        let request = self
            .http
            .get(format!("{}{path}", self.base))
            .header("Daybook-Min-Position", self.seen.load(Ordering::Relaxed))
            .timeout(Duration::from_secs(30));
        let answer = self.send(request).await?;
        answer.text().await.map_err(|e| self.unreachable(&e))
    }

    /// GET of a file that is what it is, of at most this many bytes; `None` if there is no such file.
    pub async fn resource(&self, path: &str, most: usize) -> Result<Option<bytes::Bytes>, Failure> {
        let request = self
            .http
            .get(format!("{}{path}", self.base))
            .timeout(Duration::from_secs(60));
        let answer = match self.send(request).await {
            Err(failure) if failure.code == Code::NotFound => return Ok(None),
            answer => answer?,
        };
        let mut bytes = bytes::BytesMut::new();
        let mut parts = answer.bytes_stream();
        while let Some(part) = parts.next().await {
            bytes.extend_from_slice(&part.map_err(|e| self.unreachable(&e))?);
            if bytes.len() > most {
                return Err(Failure::new(
                    Code::Failure,
                    "answer_too_large",
                    format!("{}{path} has more than {most} bytes", self.shown()),
                )
                .hint("is that a Daybook server?"));
            }
        }
        Ok(Some(bytes.freeze()))
    }

    /// GET of a file of any size, into one that is open.
    pub async fn download(&self, path: &str, into: &mut std::fs::File) -> Result<(), Failure> {
        let request = self.http.get(format!("{}{path}", self.base));
        let answer = self.send(request).await?;
        let mut bytes = answer.bytes_stream();
        while let Some(part) = bytes.next().await {
            into.write_all(&part.map_err(|e| self.unreachable(&e))?)?;
        }
        Ok(into.flush()?)
    }

    /// POST, PUT or DELETE with a body. The request has an idempotency key of its own, so that it
    /// is repeated safely when the answer is lost.
    pub async fn command<T: DeserializeOwned>(
        &self,
        method: Method,
        path: &str,
        body: &(impl Serialize + Sync),
        key: Option<&str>,
    ) -> Result<T, Failure> {
        self.command_on(method, path, body, key, None).await
    }

    /// PUT of what is to stand in the place of something that was read before. If that had an `ETag`, and
    /// has another one by now, the server refuses.
    pub async fn replace(
        &self,
        path: &str,
        body: &Value,
        etag: Option<&str>,
    ) -> Result<Value, Failure> {
        self.command_on(Method::PUT, path, body, None, etag).await
    }

    async fn command_on<T: DeserializeOwned>(
        &self,
        method: Method,
        path: &str,
        body: &(impl Serialize + Sync),
        key: Option<&str>,
        etag: Option<&str>,
    ) -> Result<T, Failure> {
        let key = key.map_or_else(|| uuid::Uuid::now_v7().to_string(), str::to_owned);
        let mut last = None;
        for attempt in 0..3_u32 {
            if attempt > 0 {
                tokio::time::sleep(Duration::from_millis(200 << attempt)).await;
            }
            let mut request = self
                .http
                .request(method.clone(), format!("{}{path}", self.base))
                .header("Idempotency-Key", &key)
                .header("Daybook-Min-Position", self.position())
                .timeout(Duration::from_secs(30))
                .json(body);
            if let Some(etag) = etag {
                request = request.header(reqwest::header::IF_MATCH, etag);
            }
            match self.send(request).await {
                Ok(answer) => return read(answer).await,
                // Only when the connection was made and broke is it unknown what became of it.
                Err(f) if f.code == Code::Unreachable && attempt > 0 => last = Some(f),
                Err(f) if f.code == Code::Unreachable => last = Some(f),
                Err(f) => return Err(f),
            }
        }
        Err(last
            .unwrap_or_else(|| Failure::new(Code::Unreachable, "server_unreachable", "no answer")))
    }

    /// POST of a pack. The server finds out by itself whether it has it already.
    pub async fn upload(
        &self,
        path: &str,
        pack: &std::path::Path,
        bytes: u64,
    ) -> Result<Value, Failure> {
        let file = tokio::fs::File::open(pack).await?;
        let request = self
            .http
            .post(format!("{}{path}", self.base))
            .header("Daybook-Min-Position", self.position())
            .header("Content-Type", "application/x-git-packed-objects")
            .header("Content-Length", bytes)
            .timeout(UPLOAD_WITHIN)
            .body(file);
        read(self.send(request).await?).await
    }

    /// POST without a body worth mentioning.
    pub async fn post(&self, path: &str, body: &Value) -> Result<Value, Failure> {
        self.command(Method::POST, path, body, None).await
    }

    /// A stream of server-sent events: id, type and data of each.
    pub async fn stream(
        &self,
        path: &str,
        query: &[(&str, Option<String>)],
        last_id: Option<&str>,
    ) -> Result<impl Stream<Item = Result<eventsource_stream::Event, Failure>> + use<>, Failure>
    {
        let query: Vec<_> = query
            .iter()
            .filter_map(|(k, v)| v.as_ref().map(|v| (*k, v)))
            .collect();
        let mut request = self
            .http
            .get(format!("{}{path}", self.base))
            .query(&query)
            .header("Accept", "text/event-stream")
            .header("Daybook-Min-Position", self.position());
        if let Some(id) = last_id {
            request = request.header("Last-Event-ID", id);
        }
        let answer = self.send(request).await?;
        let this = self.clone();
        Ok(answer.bytes_stream().eventsource().map(move |event| {
            event.map_err(|e| match e {
                eventsource_stream::EventStreamError::Transport(e) => this.unreachable(&e),
                other => Failure::new(Code::Failure, "stream", other.to_string()),
            })
        }))
    }
}

async fn read<T: DeserializeOwned>(answer: Response) -> Result<T, Failure> {
    let bytes = answer.bytes().await.map_err(|e| {
        Failure::new(Code::Unreachable, "server_unreachable", e.to_string()).passing(SOON)
    })?;
    let bytes = if bytes.is_empty() {
        &b"null"[..]
    } else {
        &bytes[..]
    };
    serde_json::from_slice(bytes).map_err(|e| {
        Failure::new(
            Code::Failure,
            "unexpected_answer",
            format!("the server's answer is not understood: {e}"),
        )
        .hint("compare the versions: `daybook --version`, and GET /openapi.json of the server")
    })
}

/// A problem document (RFC 9457) as a failure.
async fn problem(answer: Response) -> Failure {
    let status = answer.status();
    let wait = answer.headers().get(reqwest::header::RETRY_AFTER);
    let wait = wait.and_then(|seconds| seconds.to_str().ok()?.parse().ok());
    let body: Value = answer.json().await.unwrap_or_default();
    let text = |key: &str| body.get(key).and_then(Value::as_str).map(str::to_owned);
    let code = match status {
        StatusCode::NOT_FOUND => Code::NotFound,
        StatusCode::CONFLICT | StatusCode::PRECONDITION_FAILED => Code::Refused,
        StatusCode::BAD_REQUEST | StatusCode::UNPROCESSABLE_ENTITY => Code::Usage,
        _ => Code::Failure,
    };
    let message = text("detail")
        .or_else(|| text("title"))
        .unwrap_or_else(|| format!("the server answered with HTTP status {status}"));
    let mut failure = Failure::new(
        code,
        &text("code").unwrap_or_else(|| "http".into()),
        message,
    );
    failure.hint = text("remedy");
    // A server says which problems pass; a proxy that has lost its server says 502 to 504.
    let retryable = body.get("retryable").and_then(Value::as_bool);
    let passes = retryable.unwrap_or(status.is_server_error());
    if passes || status == StatusCode::TOO_MANY_REQUESTS {
        failure = failure.passing(wait.map_or(SOON, Duration::from_secs));
    }
    failure
}
