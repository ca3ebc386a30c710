//! WebSockets, as all that are served here behave: what a client is sent next is made only when it
//! has taken what came before, one that takes nothing or is silently gone is let go, and all end
//! when the server does.

use std::future::Future;
use std::time::Duration;

use axum::extract::FromRequestParts;
use axum::extract::ws::{CloseFrame, Message, Utf8Bytes, WebSocket, WebSocketUpgrade};
use axum::http::request::Parts;
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::{IntoResponse as _, Response};
use futures_util::SinkExt;
use tokio::time::{Instant, Interval, MissedTickBehavior};

use crate::access::{Lease, Principal};
use crate::metrics::OpenStream;
use crate::problem::Problem;
use crate::state::AppState;

/// Bytes that are gathered before they are written: what a client holds in this process's memory
/// is this, and one message.
const WRITE_BUFFER: usize = 16 * 1024;
const READ_BUFFER: usize = 4 * 1024;
/// Heartbeats that a client may leave unanswered, or take nothing for.
const PATIENCE: u32 = 3;

/// Why a socket is closed, as RFC 6455 numbers it, and applications above 4000.
pub(crate) mod code {
    /// The server ends, or this process does.
    pub(crate) const AWAY: u16 = 1001;
    /// The client sent what it should not.
    pub(crate) const UNSUPPORTED: u16 = 1003;
    /// Something failed inside.
    pub(crate) const INTERNAL: u16 = 1011;
    /// Not now; later perhaps.
    pub(crate) const TRY_AGAIN: u16 = 1013;
}

/// The upgrade to a WebSocket, if a request asks for one.
pub(crate) struct Upgrade(pub(crate) Option<WebSocketUpgrade>);

/// Whether a request asks for a WebSocket.
pub(crate) fn is_asked_for(headers: &HeaderMap) -> bool {
    headers
        .get_all(header::UPGRADE)
        .iter()
        .any(|v| v.as_bytes().eq_ignore_ascii_case(b"websocket"))
}

impl<S: Send + Sync> FromRequestParts<S> for Upgrade {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, Problem> {
        if !is_asked_for(&parts.headers) {
            return Ok(Self(None));
        }
        match WebSocketUpgrade::from_request_parts(parts, state).await {
            Ok(upgrade) => Ok(Self(Some(upgrade))),
            Err(rejection) => Err(Problem::new(
                StatusCode::BAD_REQUEST,
                "invalid_upgrade",
                rejection.body_text(),
                "send the headers that RFC 6455 asks for, with Sec-WebSocket-Version: 13",
            )),
        }
    }
}

/// Answers with a socket, which is served by what `serve` makes of it. The largest message that a
/// client may send has `most` bytes.
pub(crate) fn answer<F>(
    state: &AppState,
    principal: &Principal,
    upgrade: WebSocketUpgrade,
    most: usize,
    serve: impl FnOnce(Socket) -> F + Send + 'static,
) -> Response
where
    F: Future<Output = ()> + Send,
{
    let heartbeat = state.settings.heartbeat;
    let lease = match state.access.stream(principal, &state.cancel) {
        Ok(lease) => lease,
        Err(e) => return Problem::from(e).into_response(),
    };
    let open = state.metrics.open_stream();
    // The server waits for all of them when it ends.
    let counted = state.tasks.token();
    upgrade
        .max_message_size(most)
        .max_frame_size(most)
        .write_buffer_size(WRITE_BUFFER)
        .read_buffer_size(READ_BUFFER)
        .on_upgrade(move |inner| async move {
            let mut beats = tokio::time::interval_at(Instant::now() + heartbeat, heartbeat);
            beats.set_missed_tick_behavior(MissedTickBehavior::Delay);
            let socket = Socket {
                inner,
                beats,
                patience: heartbeat * PATIENCE,
                unanswered: None,
                lease,
                _open: open,
            };
            serve(socket).await;
            drop(counted);
        })
}

/// What a client did.
pub(crate) enum Received {
    /// It sent a text.
    Text(Utf8Bytes),
    /// It sent what is no text.
    Other,
    /// It is gone, or must go: nothing more is to be sent.
    Gone,
    /// The server ends, or the credential that the socket was opened with.
    ServerEnds,
}

/// The client is gone, or did not take what it was sent in time.
#[derive(Debug)]
pub(crate) struct Gone;

/// A socket that is open.
pub(crate) struct Socket {
    inner: WebSocket,
    beats: Interval,
    patience: Duration,
    /// Since when a ping has no answer.
    unanswered: Option<Instant>,
    /// Ends it, with the server or with the credential that it was opened with.
    lease: Lease,
    _open: OpenStream,
}

impl Socket {
    /// From now on the socket ends with this, such as the credential that came over it.
    pub(crate) fn depends_on(&mut self, lease: Lease) {
        self.lease = lease;
    }

    /// The next that the client does; asks it meanwhile whether it is there. Nothing is lost if
    /// this is not waited for to its end.
    pub(crate) async fn receive(&mut self) -> Received {
        loop {
            tokio::select! {
                biased;
                () = self.lease.ended().cancelled() => return Received::ServerEnds,
                message = self.inner.recv() => {
                    self.unanswered = None;
                    match message {
                        Some(Ok(Message::Text(text))) => return Received::Text(text),
                        Some(Ok(Message::Binary(_))) => return Received::Other,
                        Some(Ok(Message::Ping(_) | Message::Pong(_))) => {}
                        Some(Ok(Message::Close(_)) | Err(_)) | None => return Received::Gone,
                    }
                }
                _ = self.beats.tick() => {
                    if self.unanswered.is_some_and(|since| since.elapsed() >= self.patience) {
                        tracing::debug!("a client of a socket does not answer any more");
                        return Received::Gone;
                    }
                    if self.unanswered.is_none() {
                        self.unanswered = Some(Instant::now());
                    }
                    if self.write([Message::Ping(Default::default())]).await.is_err() {
                        return Received::Gone;
                    }
                }
            }
        }
    }

    /// Sends texts, in order, and waits until the client's side has taken them.
    pub(crate) async fn send(
        &mut self,
        texts: impl IntoIterator<Item = String>,
    ) -> Result<(), Gone> {
        self.write(texts.into_iter().map(|t| Message::Text(t.into())))
            .await
    }

    async fn write(&mut self, messages: impl IntoIterator<Item = Message>) -> Result<(), Gone> {
        let inner = &mut self.inner;
        let write = async {
            for message in messages {
                inner.feed(message).await?;
            }
            inner.flush().await
        };
        tokio::select! {
            biased;
            written = tokio::time::timeout(self.patience, write) => match written {
                Ok(Ok(())) => Ok(()),
                Ok(Err(_)) => Err(Gone),
                Err(_) => {
                    tracing::debug!("a client of a socket takes nothing any more");
                    Err(Gone)
                }
            },
            // A client that takes nothing does not hold up the end of the server.
            () = self.lease.ended().cancelled() => Err(Gone),
        }
    }

    /// Says why this is the end. Whether the client still hears it is up to it.
    pub(crate) async fn close(mut self, code: u16, reason: &str) {
        let frame = CloseFrame {
            code,
            reason: reason.into(),
        };
        let close = async {
            self.inner.send(Message::Close(Some(frame))).await?;
            // What the client has sent meanwhile is read, so that the end is not taken for a reset.
            while let Some(Ok(_)) = self.inner.recv().await {}
            Ok::<_, axum::Error>(())
        };
        let _ = tokio::time::timeout(CLOSING, close).await;
    }
}

/// How long the end of a socket may take.
const CLOSING: Duration = Duration::from_secs(1);
