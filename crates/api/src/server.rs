//! Running the interface on a listener, with a drain that has an end.

use std::io::{self, Write as _};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use axum::Router;
use axum::http::StatusCode;
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::{Service as _, service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::task::JoinSet;
use tokio_rustls::TlsAcceptor;
use tokio_util::sync::CancellationToken;

use crate::access::Peer;
use crate::linger;
use crate::metrics::{Metrics, OpenConnection};
use crate::problem::{self, Problem};
use crate::routes;
use crate::state::AppState;

/// How long a client may take to send the head of a request.
const HEAD_TIMEOUT: Duration = Duration::from_secs(20);
/// Heartbeats of a stream that a client's machine may leave unacknowledged, or have no room for.
const SILENT_BEATS: u32 = 4;
const SILENCE_MIN: Duration = Duration::from_secs(1);
/// How long accepting pauses when the process has no file descriptor left.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// What the rest of the process has at least of the file descriptors.
const OTHER_FILES: u64 = 256;
/// Most connections, however many file descriptors there may be.
const CONNECTIONS_MAX: u64 = 20_000;
/// Fewest, however few.
const CONNECTIONS_MIN: u64 = 16;
/// How often it is logged that there is no room.
const FULL_SAID_EVERY: Duration = Duration::from_secs(10);

/// How many connections there is room for beside the log, `git`, secrets and what else of this
/// process needs file descriptors.
pub(crate) fn room_for_connections() -> usize {
    #[cfg(unix)]
    let files = rustix::process::getrlimit(rustix::process::Resource::Nofile).current;
    #[cfg(not(unix))]
    let files = None;
    let Some(files) = files else {
        return CONNECTIONS_MAX as usize;
    };
    let room = files.saturating_sub(OTHER_FILES.max(files / 4));
    room.clamp(CONNECTIONS_MIN, CONNECTIONS_MAX) as usize
}

/// A connection in its place among those that there may be. It has the place until it is closed, as
/// what it was at first and as a socket that it was upgraded to.
struct Placed {
    stream: TcpStream,
    _place: OwnedSemaphorePermit,
    _open: OpenConnection,
}

impl AsyncRead for Placed {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        into: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(cx, into)
    }
}

impl AsyncWrite for Placed {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        parts: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(cx, parts)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }
}

/// The places of connections.
struct Places {
    most: usize,
    free: Arc<Semaphore>,
    metrics: Arc<Metrics>,
    said: Option<Instant>,
}

impl Places {
    fn new(most: usize, metrics: Arc<Metrics>) -> Self {
        Self {
            most,
            free: Arc::new(Semaphore::new(most)),
            metrics,
            said: None,
        }
    }

    /// Gives a connection a place. Where there is none it is told so and closed: it would take what
    /// the rest of the process needs.
    fn give(&mut self, stream: TcpStream, encrypted: bool) -> Option<Placed> {
        match self.free.clone().try_acquire_owned() {
            Ok(place) => Some(Placed {
                stream,
                _place: place,
                _open: self.metrics.open_connection(),
            }),
            Err(_) => {
                self.metrics.turned_away();
                if self.said.is_none_or(|at| at.elapsed() >= FULL_SAID_EVERY) {
                    self.said = Some(Instant::now());
                    // Where operators ask there may be fewer than what there are descriptors for.
                    let of_files =
                        self.most == room_for_connections() && self.most < CONNECTIONS_MAX as usize;
                    let why = match of_files {
                        true => "there are file descriptors for no more (ulimit -n)",
                        false => "this listener takes no more at once",
                    };
                    tracing::warn!(open = self.most, why, "connections are refused");
                }
                if !encrypted {
                    tell_full(stream);
                }
                None
            }
        }
    }
}

/// Says that there is no room, as far as that can be said at once.
fn tell_full(stream: TcpStream) {
    let problem = Problem::new(
        StatusCode::SERVICE_UNAVAILABLE,
        "too_many_connections",
        "as many connections are open as this server has room for",
        "try again in a moment; close connections that are not used",
    )
    .retry_after(1);
    let body = problem.to_json();
    let answer = format!(
        "HTTP/1.1 503 Service Unavailable\r\ncontent-type: {}\r\ncontent-length: {}\r\n\
         retry-after: 1\r\nconnection: close\r\n\r\n{body}",
        problem::MEDIA_TYPE,
        body.len()
    );
    // It does not block, and there is nothing else in the way of so short an answer.
    if let Ok(mut stream) = stream.into_std() {
        let _ = stream.write_all(answer.as_bytes());
        let _ = stream.shutdown(std::net::Shutdown::Write);
    }
}

/// Why a server could not go on.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// The listener does not accept connections any more.
    #[error("the listener is broken")]
    Listener(#[source] io::Error),
}

/// Serves until `cancel` is cancelled. Then no connection is accepted any more, streams end,
/// requests that are under way get [`Settings::drain`](crate::Settings::drain) to finish, and
/// what is left after that is cut off. When this returns, nothing of the server runs any more.
pub async fn serve(
    listener: TcpListener,
    state: AppState,
    cancel: CancellationToken,
) -> Result<(), ServeError> {
    serve_routes(listener, state, cancel, routes::router).await
}

/// The same with nothing but `/healthz`, `/readyz` and `/metrics`, for a process that has no other
/// interface, or whose figures are read at an address of their own. The state is one
/// [for operations](AppState::for_operations).
pub async fn serve_operations(
    listener: TcpListener,
    state: AppState,
    cancel: CancellationToken,
) -> Result<(), ServeError> {
    serve_routes(listener, state, cancel, routes::operations_router).await
}

async fn serve_routes(
    listener: TcpListener,
    state: AppState,
    cancel: CancellationToken,
    router: fn(AppState) -> Router,
) -> Result<(), ServeError> {
    let drain = state.settings.drain;
    let tls = state.settings.tls.clone().map(TlsAcceptor::from);
    let state = state.with_cancel(cancel.child_token());
    let watch = tokio_util::task::AbortOnDropHandle::new(tokio::spawn(
        state.access.clone().watch(state.cancel.clone()),
    ));
    let tasks = state.tasks.clone();
    let silence = (state.settings.heartbeat * SILENT_BEATS).max(SILENCE_MIN);
    let mut places = Places::new(state.settings.connections_max, state.metrics.clone());
    let router = router(state);
    let mut connections = JoinSet::new();
    let ended = loop {
        tokio::select! {
            () = cancel.cancelled() => break Ok(()),
            Some(_) = connections.join_next() => {}
            accepted = listener.accept() => match accepted {
                Ok((stream, peer)) => {
                    // Small frames of a stream must not wait for more.
                    let _ = stream.set_nodelay(true);
                    give_up_after(&stream, silence);
                    let Some(stream) = places.give(stream, tls.is_some()) else {
                        continue;
                    };
                    let peer = Peer(peer.ip());
                    let (tls, router) = (tls.clone(), router.clone());
                    connections.spawn(greet(stream, peer, tls, router, cancel.clone()));
                }
                Err(e) => match pause_after(&e) {
                    Some(pause) => tokio::time::sleep(pause).await,
                    None => break Err(ServeError::Listener(e)),
                },
            },
        }
    };
    drop(listener);
    let finished = tokio::time::timeout(drain, async {
        while connections.join_next().await.is_some() {}
        tasks.close();
        tasks.wait().await;
    });
    if finished.await.is_err() {
        tracing::warn!(
            connections = connections.len(),
            "requests were cut off: they did not end within {drain:?}"
        );
    }
    connections.shutdown().await;
    drop(watch);
    ended
}

/// Lets the system end a connection whose other end is silently gone, or takes nothing of what it is
/// sent, for so long. Streams without an answer of the client would be kept for hours otherwise, and
/// those on which nothing is sent for ever: there the system asks whether anybody is there.
#[cfg(target_os = "linux")]
fn give_up_after(stream: &tokio::net::TcpStream, silence: Duration) {
    use rustix::net::sockopt;
    let millis = u32::try_from(silence.as_millis()).unwrap_or(u32::MAX);
    // The system counts these in whole seconds.
    let part = |of: u32| (silence / of).max(SILENCE_MIN);
    let set = sockopt::set_tcp_user_timeout(stream, millis)
        .and_then(|()| sockopt::set_tcp_keepidle(stream, part(2)))
        .and_then(|()| sockopt::set_tcp_keepintvl(stream, part(SILENT_BEATS)))
        .and_then(|()| sockopt::set_tcp_keepcnt(stream, SILENT_BEATS - 1))
        .and_then(|()| sockopt::set_socket_keepalive(stream, true));
    if let Err(e) = set {
        tracing::debug!(error = %e, "silent clients are kept as long as the system keeps them");
    }
}

#[cfg(not(target_os = "linux"))]
fn give_up_after(_: &tokio::net::TcpStream, _: Duration) {}

/// Serves a connection, after it has agreed on TLS if that is spoken here.
async fn greet(
    stream: Placed,
    peer: Peer,
    tls: Option<TlsAcceptor>,
    router: Router,
    cancel: CancellationToken,
) {
    let Some(tls) = tls else {
        return connection(TokioIo::new(stream), peer, router, cancel).await;
    };
    let shaken = tokio::select! {
        shaken = tokio::time::timeout(HEAD_TIMEOUT, tls.accept(stream)) => shaken,
        () = cancel.cancelled() => return,
    };
    match shaken {
        Ok(Ok(stream)) => connection(TokioIo::new(stream), peer, router, cancel).await,
        Ok(Err(e)) => tracing::debug!(error = %e, "a client did not agree on TLS"),
        Err(_) => tracing::debug!("a client began TLS and did not go on"),
    }
}

async fn connection(
    io: impl hyper::rt::Read + hyper::rt::Write + Unpin + Send + 'static,
    peer: Peer,
    router: Router,
    cancel: CancellationToken,
) {
    let router = TowerToHyperService::new(router);
    let service = service_fn(move |mut request: hyper::Request<Incoming>| {
        request.extensions_mut().insert(peer);
        let (request, rest) = linger::lend(request);
        let answer = router.call(request);
        async move {
            let response = answer.await;
            rest.read().await;
            response
        }
    });
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD_TIMEOUT)
        .serve_connection(io, service)
        .with_upgrades();
    let mut connection = std::pin::pin!(connection);
    let served = tokio::select! {
        served = connection.as_mut() => served,
        () = cancel.cancelled() => {
            connection.as_mut().graceful_shutdown();
            connection.await
        }
    };
    if let Err(e) = served {
        // A client that goes away is nothing to worry about.
        tracing::debug!(error = %e, "a connection broke off");
    }
}

/// How long to wait after a failed accept; none if no waiting helps.
fn pause_after(e: &io::Error) -> Option<Duration> {
    match e.kind() {
        io::ErrorKind::ConnectionAborted
        | io::ErrorKind::ConnectionReset
        | io::ErrorKind::ConnectionRefused
        | io::ErrorKind::Interrupted => Some(Duration::ZERO),
        io::ErrorKind::InvalidInput => None,
        // Mostly EMFILE or ENFILE: connections that end make room.
        _ => Some(ACCEPT_PAUSE),
    }
}

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use rustix::net::sockopt;

    use super::*;

    /// Whether the system also does it cannot be tried without a network that loses packets.
    #[tokio::test]
    async fn the_system_asks_whether_a_silent_client_is_there() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (client, accepted) = tokio::join!(TcpStream::connect(address), listener.accept());
        let (stream, _) = accepted.unwrap();
        give_up_after(&stream, Duration::from_secs(60));
        assert!(sockopt::socket_keepalive(&stream).unwrap());
        let seconds = Duration::from_secs;
        assert_eq!(sockopt::tcp_keepidle(&stream).unwrap(), seconds(30));
        assert_eq!(sockopt::tcp_keepintvl(&stream).unwrap(), seconds(15));
        assert_eq!(sockopt::tcp_keepcnt(&stream).unwrap(), 3);
        assert_eq!(sockopt::tcp_user_timeout(&stream).unwrap(), 60_000);
        drop(client);
    }
}
