//! Running the interface on a listener, with a drain that has an end.

use std::io;
use std::time::Duration;

use axum::Router;
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::{Service as _, service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;
use tokio_rustls::TlsAcceptor;
use tokio_util::sync::CancellationToken;

use crate::access::Peer;
use crate::routes;
use crate::state::AppState;

/// How long a client may take to send the head of a request.
const HEAD_TIMEOUT: Duration = Duration::from_secs(20);
/// Heartbeats of a stream that a client's machine may leave unacknowledged, or have no room for.
const SILENT_BEATS: u32 = 4;
const SILENCE_MIN: Duration = Duration::from_secs(1);
/// How long accepting pauses when the process has no file descriptor left.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

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
    mut state: AppState,
    cancel: CancellationToken,
) -> Result<(), ServeError> {
    let drain = state.settings.drain;
    let tls = state.settings.tls.clone().map(TlsAcceptor::from);
    state.cancel = cancel.child_token();
    let watch = tokio_util::task::AbortOnDropHandle::new(tokio::spawn(
        state.access.clone().watch(state.cancel.clone()),
    ));
    let tasks = state.tasks.clone();
    let silence = (state.settings.heartbeat * SILENT_BEATS).max(SILENCE_MIN);
    let router = routes::router(state);
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
    stream: TcpStream,
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
        router.call(request)
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
