//! One request on its way through the gateway.

use std::convert::Infallible;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::Bytes;
use http_body_util::{Either, Full};
use hyper::body::{Body, Frame, Incoming, SizeHint};
use hyper::header::{self, HeaderValue};
use hyper::http::request::Parts;
use hyper::upgrade::OnUpgrade;
use hyper::{Method, Request, Response, StatusCode, Uri, Version};
use hyper_util::rt::TokioIo;
use tokio::time::Instant;

use super::Shared;
use super::choice::{Candidates, LiveRoute, OnCluster};
use super::counters::Counter;
use super::headers;
use super::pool::Connection;
use super::problem::GatewayProblem;

/// What a client receives: the application's body, or the gateway's own.
pub(super) type ResponseBody = Either<AnswerBody, Full<Bytes>>;

/// How many addresses are tried for one request.
const MAX_ATTEMPTS: usize = 8;

/// Answers one request.
pub(super) async fn handle(
    shared: &Arc<Shared>,
    peer: SocketAddr,
    request: Request<Incoming>,
) -> Result<Response<ResponseBody>, Infallible> {
    let response = match route(shared, peer, request).await {
        Ok(response) => response.map(Either::Left),
        Err(problem) => problem.into_response().map(Either::Right),
    };
    Ok(response)
}

async fn route(
    shared: &Arc<Shared>,
    peer: SocketAddr,
    request: Request<Incoming>,
) -> Result<Response<AnswerBody>, GatewayProblem> {
    let (mut head, body) = request.into_parts();
    if head.method == Method::CONNECT {
        return Err(GatewayProblem::new(
            StatusCode::NOT_IMPLEMENTED,
            "connect_refused",
            "this gateway opens no tunnels to other hosts",
        ));
    }
    let (written, host) = headers::host_of(&head).map_err(|error| {
        GatewayProblem::new(StatusCode::BAD_REQUEST, "bad_host", error.to_string())
    })?;
    let Some(route) = shared.hosts.load().get(&host).cloned() else {
        shared.counters.count_unrouted();
        let detail = format!("no deployment is routed to the host name {host:?}");
        return Err(GatewayProblem::new(StatusCode::NOT_FOUND, "unknown_host", detail).host(&host));
    };

    let upgrade = headers::upgrade_of(&head.headers);
    headers::remove_hop_by_hop(&mut head.headers);
    // The length is set anew from the body, and the gateway itself has answered `Expect`.
    head.headers.remove(header::CONTENT_LENGTH);
    head.headers.remove(header::EXPECT);
    headers::set_forwarded(
        &mut head.headers,
        &written,
        peer,
        shared.options.trust_forwarded,
    );
    head.headers.insert(header::HOST, written);
    head.version = Version::HTTP_11;
    head.uri = origin_form(&head.uri);
    let client = upgrade.map(|protocol| {
        head.headers
            .insert(header::CONNECTION, HeaderValue::from_static("upgrade"));
        head.headers.insert(header::UPGRADE, protocol);
        head.extensions.remove::<OnUpgrade>()
    });

    let attempt = Attempt {
        shared,
        host: &host,
        route: &route,
    };
    attempt.run(head, body, client.flatten()).await
}

/// Path and query: the host has been taken from the target already.
fn origin_form(uri: &Uri) -> Uri {
    uri.path_and_query()
        .map(|p| Uri::from(p.clone()))
        .unwrap_or_default()
}

/// Everything that is the same for all attempts at one request.
struct Attempt<'a> {
    shared: &'a Arc<Shared>,
    host: &'a str,
    route: &'a LiveRoute,
}

/// How one attempt ended.
enum Outcome {
    Answered(Response<Incoming>, super::pool::Sender),
    /// It may be sent elsewhere: the application has seen nothing of it, or does not mind.
    NotSent(Request<RequestBody>, String),
    /// The application may have seen the request.
    Broken(String),
    /// Nothing came back in time.
    Silent,
}

impl Attempt<'_> {
    async fn run(
        &self,
        head: Parts,
        body: Incoming,
        client: Option<OnUpgrade>,
    ) -> Result<Response<AnswerBody>, GatewayProblem> {
        let progress = Progress::default();
        // A request without a body, whose method promises that twice is as good as once, may be
        // sent again even if the first try got lost on the way (RFC 9110, section 9.2.2).
        let again = (body.is_end_stream() && head.method.is_idempotent() && client.is_none())
            .then(|| head.clone());
        let body = if body.is_end_stream() {
            RequestBody::Empty
        } else {
            RequestBody::Streamed(body, progress.clone())
        };
        let mut request = Request::from_parts(head, body);
        let mut tried: Vec<SocketAddr> = Vec::new();
        let mut last_error = None;
        let Candidates {
            chosen,
            addresses: mut list,
        } = self.candidates()?;
        chosen.counter.request();
        let mut serving = chosen;
        // Where an instance answers may change while the old addresses are being tried, so they
        // are looked up once more before giving up.
        for round in 0..2 {
            if round > 0 {
                list = self.candidates()?.addresses;
                list.retain(|(_, addr)| !tried.contains(addr));
            }
            for &(backend, addr) in list.iter().take(MAX_ATTEMPTS) {
                serving = backend;
                tried.push(addr);
                let sent = Instant::now();
                match self.send(addr, request, again.as_ref(), &progress).await {
                    Outcome::Answered(response, sender) => {
                        backend.endpoint.answered_after(sent.elapsed());
                        let answer = Answer {
                            backend,
                            addr,
                            sender,
                            client,
                        };
                        return Ok(self.deliver(response, answer));
                    }
                    Outcome::NotSent(back, error) => {
                        // Whoever refuses at once must not look fast.
                        let slow = self.shared.options.connect_timeout;
                        backend.endpoint.answered_after(slow);
                        request = back;
                        last_error = Some(error);
                    }
                    Outcome::Broken(error) => {
                        return Err(self.failed(
                            backend,
                            StatusCode::BAD_GATEWAY,
                            "broken_answer",
                            format!("it closed the connection without an answer ({error})"),
                        ));
                    }
                    Outcome::Silent => {
                        let after = self.shared.options.response_timeout;
                        return Err(self.failed(
                            backend,
                            StatusCode::GATEWAY_TIMEOUT,
                            "no_answer_in_time",
                            format!("it did not answer within {} s", after.as_secs_f32()),
                        ));
                    }
                }
            }
        }
        let why = match last_error {
            Some(error) => format!("no instance can be reached ({error})"),
            None => format!("no instance is ready: {}", chosen.endpoint.why_none()),
        };
        Err(self.failed(serving, StatusCode::SERVICE_UNAVAILABLE, "not_ready", why))
    }

    fn candidates(&self) -> Result<Candidates<'_>, GatewayProblem> {
        self.route.candidates().ok_or_else(|| {
            let detail = format!("the host name {:?} has no deployment", self.host);
            GatewayProblem::new(StatusCode::SERVICE_UNAVAILABLE, "no_backend", detail)
                .host(self.host)
        })
    }

    fn failed(
        &self,
        backend: &OnCluster,
        status: StatusCode,
        code: &'static str,
        why: String,
    ) -> GatewayProblem {
        backend.counter.failure();
        let detail = format!(
            "deployment {} on cluster {} cannot answer: {why}",
            backend.deployment, backend.cluster
        );
        GatewayProblem::new(status, code, detail)
            .host(self.host)
            .deployment(backend.deployment)
    }

    /// Sends a request to one address, over an idle connection first, and over a new one if the
    /// idle one turns out to be closed.
    async fn send(
        &self,
        addr: SocketAddr,
        mut request: Request<RequestBody>,
        again: Option<&Parts>,
        progress: &Progress,
    ) -> Outcome {
        let pool = &self.shared.pool;
        let mut connection = pool.get(addr).await;
        loop {
            let Connection { mut sender, reused } = match connection {
                Ok(connection) => connection,
                Err(error) => return Outcome::NotSent(request, format!("{addr}: {error}")),
            };
            let answer = sender.try_send_request(request);
            match progress
                .watch(self.shared.options.response_timeout, answer)
                .await
            {
                None => return Outcome::Silent,
                Some(Ok(response)) => return Outcome::Answered(response, sender),
                Some(Err(mut failure)) => {
                    let error = failure.error().to_string();
                    let back = failure.take_message().or_else(|| {
                        let head = again?.clone();
                        Some(Request::from_parts(head, RequestBody::Empty))
                    });
                    match back {
                        None => return Outcome::Broken(error),
                        // A fresh connection that breaks is no accident of timing.
                        Some(back) if !reused => return Outcome::NotSent(back, error),
                        Some(back) => request = back,
                    }
                }
            }
            connection = pool.connect(addr).await;
        }
    }

    /// Turns the application's answer into the client's.
    fn deliver(&self, response: Response<Incoming>, answer: Answer<'_>) -> Response<AnswerBody> {
        let Answer {
            backend,
            addr,
            sender,
            client,
        } = answer;
        let (mut head, body) = response.into_parts();
        let upgrade = headers::upgrade_of(&head.headers);
        headers::remove_hop_by_hop(&mut head.headers);
        if head.status == StatusCode::SWITCHING_PROTOCOLS {
            let application = head.extensions.remove::<OnUpgrade>();
            match (client, application, upgrade) {
                (Some(client), Some(application), Some(protocol)) => {
                    head.headers
                        .insert(header::CONNECTION, HeaderValue::from_static("upgrade"));
                    head.headers.insert(header::UPGRADE, protocol);
                    self.tunnel(client, application);
                }
                // Nobody asked for it.
                _ => head.status = StatusCode::BAD_GATEWAY,
            }
        } else {
            self.shared.pool.put_back(addr, sender);
        }
        if let Ok(id) = HeaderValue::from_str(&backend.deployment.to_string()) {
            head.headers.insert(headers::DEPLOYMENT, id);
        }
        head.version = Version::HTTP_11;
        let body = AnswerBody {
            body,
            counter: backend.counter.clone(),
        };
        Response::from_parts(head, body)
    }

    /// Carries bytes both ways until one side ends, or the gateway stops.
    fn tunnel(&self, client: OnUpgrade, application: OnUpgrade) {
        let stop = self.shared.stop.clone();
        self.shared.tasks.spawn(async move {
            let carry = async {
                let (client, application) = tokio::try_join!(client, application).ok()?;
                let mut client = TokioIo::new(client);
                let mut application = TokioIo::new(application);
                tokio::io::copy_bidirectional(&mut client, &mut application)
                    .await
                    .ok()
            };
            tokio::select! {
                () = stop.cancelled() => {}
                _ = carry => {}
            }
        });
    }
}

struct Answer<'a> {
    backend: &'a OnCluster,
    addr: SocketAddr,
    sender: super::pool::Sender,
    client: Option<OnUpgrade>,
}

/// When a request body last moved, so that a long upload is not taken for silence.
#[derive(Debug, Clone)]
pub(super) struct Progress {
    start: Instant,
    last_ms: Arc<AtomicU64>,
}

impl Default for Progress {
    fn default() -> Self {
        Self {
            start: Instant::now(),
            last_ms: Arc::default(),
        }
    }
}

impl Progress {
    fn note(&self) {
        let now = u64::try_from(self.start.elapsed().as_millis()).unwrap_or(u64::MAX);
        self.last_ms.store(now, Relaxed);
    }

    /// Waits for an answer; `None` once nothing has moved for `limit`.
    async fn watch<F: Future>(&self, limit: Duration, answer: F) -> Option<F::Output> {
        self.note();
        let mut answer = std::pin::pin!(answer);
        loop {
            let last = Duration::from_millis(self.last_ms.load(Relaxed));
            let until = self.start + last + limit;
            match tokio::time::timeout_at(until, answer.as_mut()).await {
                Ok(output) => return Some(output),
                Err(_) if self.last_ms.load(Relaxed) == last.as_millis() as u64 => return None,
                Err(_) => {}
            }
        }
    }
}

/// What is sent to an application.
#[derive(Debug)]
pub(super) enum RequestBody {
    Empty,
    Streamed(Incoming, Progress),
}

impl Body for RequestBody {
    type Data = Bytes;
    type Error = hyper::Error;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, hyper::Error>>> {
        match self.get_mut() {
            Self::Empty => Poll::Ready(None),
            Self::Streamed(body, progress) => {
                let frame = ready!(Pin::new(body).poll_frame(cx));
                progress.note();
                Poll::Ready(frame)
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        match self {
            Self::Empty => true,
            Self::Streamed(body, _) => body.is_end_stream(),
        }
    }

    fn size_hint(&self) -> SizeHint {
        match self {
            Self::Empty => SizeHint::with_exact(0),
            Self::Streamed(body, _) => body.size_hint(),
        }
    }
}

/// An application's answer, which counts as a failure if it breaks off.
#[derive(Debug)]
pub(super) struct AnswerBody {
    body: Incoming,
    counter: Arc<Counter>,
}

impl Body for AnswerBody {
    type Data = Bytes;
    type Error = hyper::Error;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, hyper::Error>>> {
        let this = self.get_mut();
        let frame = ready!(Pin::new(&mut this.body).poll_frame(cx));
        if let Some(Err(_)) = &frame {
            this.counter.failure();
        }
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}
