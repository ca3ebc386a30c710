//! Running the interface on a listener, with a drain that has an end.

use std::io;
use std::time::Duration;

use axum::Router;
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use tokio::net::TcpListener;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use crate::routes;
use crate::state::AppState;

/// How long a client may take to send the head of a request.
const HEAD_TIMEOUT: Duration = Duration::from_secs(20);
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
    state.cancel = cancel.child_token();
    let router = routes::router(state);
    let mut connections = JoinSet::new();
    let ended = loop {
        tokio::select! {
            () = cancel.cancelled() => break Ok(()),
            Some(_) = connections.join_next() => {}
            accepted = listener.accept() => match accepted {
                Ok((stream, _)) => {
                    // Small frames of a stream must not wait for more.
                    let _ = stream.set_nodelay(true);
                    let io = TokioIo::new(stream);
                    connections.spawn(connection(io, router.clone(), cancel.clone()));
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
    });
    if finished.await.is_err() {
        tracing::warn!(
            connections = connections.len(),
            "requests were cut off: they did not end within {drain:?}"
        );
    }
    connections.shutdown().await;
    ended
}

async fn connection(io: TokioIo<tokio::net::TcpStream>, router: Router, cancel: CancellationToken) {
    let service = TowerToHyperService::new(router);
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD_TIMEOUT)
        .serve_connection(io, service);
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
