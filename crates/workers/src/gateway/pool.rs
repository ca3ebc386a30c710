//! Connections to instances, kept for the next request.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use hyper::client::conn::http1::{self, SendRequest};
use hyper_util::rt::TokioIo;
use tokio::net::TcpStream;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::proxy::RequestBody;

/// Shorter than what common servers keep idle connections for (Node: 5 s), so that a request
/// seldom meets a connection that is just being closed.
const IDLE: Duration = Duration::from_secs(3);
/// Idle connections kept for one address.
const KEPT: usize = 64;

pub(super) type Sender = SendRequest<RequestBody>;

/// Idle connections by address.
#[derive(Debug, Clone)]
pub(super) struct Pool {
    idle: Arc<Mutex<HashMap<SocketAddr, Vec<Idle>>>>,
    connect_timeout: Duration,
    tasks: TaskTracker,
    stop: CancellationToken,
}

#[derive(Debug)]
struct Idle {
    sender: Sender,
    since: Instant,
}

/// A connection that is ready for a request.
#[derive(Debug)]
pub(super) struct Connection {
    pub(super) sender: Sender,
    /// It has served before, so the other side may just be closing it.
    pub(super) reused: bool,
}

impl Pool {
    pub(super) fn new(
        connect_timeout: Duration,
        tasks: TaskTracker,
        stop: CancellationToken,
    ) -> Self {
        Self {
            idle: Arc::default(),
            connect_timeout,
            tasks,
            stop,
        }
    }

    /// A connection to this address, an idle one if there is one.
    pub(super) async fn get(&self, addr: SocketAddr) -> std::io::Result<Connection> {
        if let Some(sender) = self.take(addr) {
            return Ok(Connection {
                sender,
                reused: true,
            });
        }
        self.connect(addr).await
    }

    /// A new connection.
    pub(super) async fn connect(&self, addr: SocketAddr) -> std::io::Result<Connection> {
        let stream = tokio::time::timeout(self.connect_timeout, TcpStream::connect(addr)).await??;
        let _ = stream.set_nodelay(true);
        let (sender, connection) = http1::handshake(TokioIo::new(stream))
            .await
            .map_err(std::io::Error::other)?;
        let stop = self.stop.clone();
        self.tasks.spawn(async move {
            tokio::select! {
                () = stop.cancelled() => {}
                _ = connection.with_upgrades() => {}
            }
        });
        Ok(Connection {
            sender,
            reused: false,
        })
    }

    fn take(&self, addr: SocketAddr) -> Option<Sender> {
        let mut idle = self.lock();
        let list = idle.get_mut(&addr)?;
        while let Some(candidate) = list.pop() {
            if candidate.since.elapsed() > IDLE {
                // The newest is too old, so all are.
                list.clear();
                break;
            }
            if candidate.sender.is_ready() {
                return Some(candidate.sender);
            }
        }
        None
    }

    /// Takes a connection back once the answer on it was read to its end.
    pub(super) fn put_back(&self, addr: SocketAddr, mut sender: Sender) {
        let pool = self.clone();
        self.tasks.spawn(async move {
            let ready = tokio::select! {
                () = pool.stop.cancelled() => return,
                ready = sender.ready() => ready,
            };
            if ready.is_err() || pool.tasks.is_closed() {
                return;
            }
            let mut idle = pool.lock();
            let list = idle.entry(addr).or_default();
            let since = Instant::now();
            list.retain(|i| since.duration_since(i.since) < IDLE && !i.sender.is_closed());
            if list.len() < KEPT {
                list.push(Idle { sender, since });
            }
        });
    }

    /// Closes connections that nobody has used for a while, until the gateway stops.
    pub(super) async fn close_stale(self) {
        let mut tick = tokio::time::interval(IDLE / 2);
        loop {
            tokio::select! {
                () = self.stop.cancelled() => return,
                _ = tick.tick() => {}
            }
            self.lock().retain(|_, list| {
                list.retain(|i| i.since.elapsed() < IDLE && !i.sender.is_closed());
                !list.is_empty()
            });
        }
    }

    /// Closes idle connections to an address.
    pub(super) fn forget(&self, addr: SocketAddr) {
        self.lock().remove(&addr);
    }

    /// Closes all idle connections.
    pub(super) fn clear(&self) {
        self.lock().clear();
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, HashMap<SocketAddr, Vec<Idle>>> {
        self.idle.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
