//! The gateway: an HTTP/1.1 reverse proxy in this process that sends each request to the
//! deployment that its host name is routed to.
//!
//! A project's routes are one table with a revision. [`Gateway::apply`] replaces a project's
//! table as a whole, never by an older one, and returns when every later request uses it.
//! Requests that are already on their way finish where they started; connections that clients
//! keep alive are routed anew for each request. Where instances answer is not part of a table:
//! [`Gateway::track`] follows what a target observes, so that an instance that restarts on
//! another port needs no new revision.
//!
//! Beside its own address a gateway listens on those on loopback that routes name: who asks there
//! is routed by the address alone.

mod choice;
mod counters;
mod endpoint;
mod headers;
mod internal;
mod pool;
mod problem;
mod proxy;
mod table;

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use arc_swap::ArcSwap;
use daybook_events::{ClusterName, DeploymentId, Hostname, ProjectName};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, watch};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

pub use counters::Traffic;
pub use daybook_events::routing::ClusterPolicy;
pub use table::{Applied, ApplyError, Backend, Route, RouteChanges, RouteTable};

use crate::target::AppStatus;
use counters::Counters;
use internal::Listeners;
use pool::Pool;
use table::{Hosts, Routing};

/// Limits of a gateway. The defaults suit a machine that serves people and their programs.
#[derive(Debug, Clone)]
pub struct GatewayOptions {
    /// How long a client may take to send the head of a request, and how long a connection may
    /// idle between two requests.
    pub head_timeout: Duration,
    /// How long a connection to an instance may take.
    pub connect_timeout: Duration,
    /// How long nothing may happen between a request and the head of its answer. A request body
    /// that keeps arriving counts as something.
    pub response_timeout: Duration,
    /// How many client connections may be open; further ones wait to be accepted.
    pub max_connections: usize,
    /// The most headers that a request may have.
    pub max_headers: usize,
    /// The largest head of a request, in bytes; at least 8192.
    pub max_head_bytes: usize,
    /// Whether another proxy that can be trusted stands in front: `X-Forwarded-*` of requests
    /// is then kept and extended. Otherwise it is replaced by what the gateway itself sees.
    pub trust_forwarded: bool,
    /// Whether connections are accepted only after [`Gateway::open`]. Until then the system keeps
    /// them waiting.
    pub begins_closed: bool,
}

impl Default for GatewayOptions {
    fn default() -> Self {
        Self {
            head_timeout: Duration::from_secs(30),
            connect_timeout: Duration::from_secs(2),
            response_timeout: Duration::from_secs(60),
            max_connections: 8192,
            max_headers: 128,
            max_head_bytes: 64 * 1024,
            trust_forwarded: false,
            begins_closed: false,
        }
    }
}

/// The gateway could not listen.
#[derive(Debug, thiserror::Error)]
#[error("the gateway cannot listen on {addr}")]
pub struct BindError {
    /// Where it was to listen.
    pub addr: SocketAddr,
    /// Why it cannot.
    #[source]
    pub source: std::io::Error,
}

/// A running gateway. Clones are handles to the same one. It ends with [`Gateway::shutdown`], or
/// at once when the last handle is dropped.
#[derive(Debug, Clone)]
pub struct Gateway {
    shared: Arc<Shared>,
    _stop: Arc<tokio_util::sync::DropGuard>,
}

/// What connections and handles share.
#[derive(Debug)]
struct Shared {
    addr: SocketAddr,
    options: GatewayOptions,
    /// What requests look at: swapped as a whole.
    hosts: ArcSwap<Hosts>,
    /// What changes are made to, one at a time.
    routing: Mutex<Routing>,
    /// Beside its own address.
    listeners: Mutex<Listeners>,
    /// One for each client connection that may be open.
    slots: Arc<Semaphore>,
    counters: Counters,
    pool: Pool,
    tasks: TaskTracker,
    /// No new connections, no further requests on open ones.
    drain: CancellationToken,
    /// Whatever is still open is cut.
    stop: CancellationToken,
    /// Connections are accepted from here on.
    open: CancellationToken,
}

impl Gateway {
    /// Listens with default limits. Port 0 takes a free one; see [`Gateway::addr`].
    pub async fn bind(addr: SocketAddr) -> Result<Self, BindError> {
        Self::bind_with(addr, GatewayOptions::default()).await
    }

    /// Listens with these limits.
    pub async fn bind_with(addr: SocketAddr, options: GatewayOptions) -> Result<Self, BindError> {
        let failed = |source| BindError { addr, source };
        let listener = TcpListener::bind(addr).await.map_err(failed)?;
        let addr = listener.local_addr().map_err(failed)?;
        let stop = CancellationToken::new();
        let open = CancellationToken::new();
        if !options.begins_closed {
            open.cancel();
        }
        let tasks = TaskTracker::new();
        let shared = Arc::new(Shared {
            addr,
            hosts: ArcSwap::default(),
            routing: Mutex::default(),
            listeners: Mutex::default(),
            slots: Arc::new(Semaphore::new(options.max_connections)),
            counters: Counters::default(),
            pool: Pool::new(options.connect_timeout, tasks.clone(), stop.clone()),
            options,
            tasks,
            drain: stop.child_token(),
            stop: stop.clone(),
            open: open.clone(),
        });
        let drain = shared.drain.clone();
        let accepting = accept(shared.clone(), listener, drain.clone());
        shared.tasks.spawn(async move {
            if drain.run_until_cancelled(open.cancelled()).await.is_some() {
                accepting.await;
            }
        });
        let drain = shared.drain.clone();
        let stale = shared.pool.clone().close_stale();
        shared.tasks.spawn(async move {
            drain.run_until_cancelled(stale).await;
        });
        Ok(Self {
            shared,
            _stop: Arc::new(stop.drop_guard()),
        })
    }

    /// Accepts connections from now on, if it began closed. Those that came before are kept waiting
    /// by the system until then, and not refused.
    pub fn open(&self) {
        self.shared.open.cancel();
    }

    /// Where it listens.
    pub fn addr(&self) -> SocketAddr {
        self.shared.addr
    }

    /// Replaces the route table of a project.
    ///
    /// When this returns, every request that arrives from then on is routed by the new table.
    /// The same revision again changes nothing; an older one is refused, as is a host name that
    /// another project has. Must be called within a Tokio runtime.
    pub fn apply(&self, table: RouteTable) -> Result<Applied, ApplyError> {
        let mut routing = self.shared.lock();
        let applied = routing.apply(table, &self.shared.counters)?;
        self.shared.serve_by(&mut routing);
        Ok(applied)
    }

    /// Changes some routes of a project, all at once: what [`Gateway::apply`] does with a whole
    /// table, at the cost of what changes.
    ///
    /// The changes must follow on the revision that is in force (0 for a project without routes);
    /// otherwise they are refused as missed, and the whole table is to be applied.
    pub fn change(&self, changes: RouteChanges) -> Result<Applied, ApplyError> {
        let mut routing = self.shared.lock();
        let applied = routing.change(changes, &self.shared.counters)?;
        self.shared.serve_by(&mut routing);
        Ok(applied)
    }

    /// Lets another project route a host name that this one has given up in a table which is not
    /// in force yet. Until one does it leads where it led.
    ///
    /// The tables of projects are applied one by one: without this, two that take host names over
    /// from each other would each wait for the other one.
    pub fn release(&self, project: &ProjectName, hostname: &Hostname) {
        self.shared.lock().release(project, hostname);
    }

    /// The revision of a project's table that requests are routed by.
    pub fn revision(&self, project: &ProjectName) -> Option<u64> {
        self.shared.lock().revision(project)
    }

    /// The host names that are routed, with their projects.
    pub fn hostnames(&self) -> BTreeMap<Hostname, ProjectName> {
        self.shared.lock().hostnames()
    }

    /// Says where the instances of a deployment answer on a cluster. `why` is what a client is
    /// told when there are none.
    ///
    /// For deployments that are followed with [`Gateway::track`] this does nothing: what the
    /// target itself says is newer.
    pub fn set_addresses(
        &self,
        deployment: DeploymentId,
        cluster: &ClusterName,
        addresses: Vec<SocketAddr>,
        why: Option<String>,
    ) {
        let mut routing = self.shared.lock();
        for gone in routing.set_addresses(deployment, cluster, addresses, why) {
            self.shared.pool.forget(gone);
        }
    }

    /// Follows what a cluster observes of an Application: ready instances receive requests,
    /// others do not. Following the same channel twice is following it once.
    pub fn track(&self, cluster: ClusterName, status: watch::Receiver<AppStatus>) {
        let Some(mut changes) = ({
            let mut routing = self.shared.lock();
            let new = routing.track(cluster, status.clone());
            self.shared.absorb_all(&mut routing);
            new.then_some(status)
        }) else {
            return;
        };
        let shared = self.shared.clone();
        let stop = self.shared.stop.clone();
        self.shared.tasks.spawn(async move {
            loop {
                tokio::select! {
                    () = stop.cancelled() => return,
                    changed = changes.changed() => {
                        let mut routing = shared.lock();
                        if changed.is_err() {
                            return routing.untrack(&changes);
                        }
                        shared.absorb_all(&mut routing);
                    }
                }
            }
        });
    }

    /// What each deployment has served so far. Deployments that are no longer routed keep their
    /// figures as long as the gateway runs.
    pub fn traffic(&self) -> BTreeMap<DeploymentId, Traffic> {
        self.shared.counters.read()
    }

    /// Requests for host names that nobody has routed.
    pub fn unrouted(&self) -> u64 {
        self.shared.counters.unrouted()
    }

    /// Stops accepting, lets requests that are on their way finish for at most `grace`, and then
    /// cuts what is left. When this returns, no task and no connection of the gateway is left.
    pub async fn shutdown(&self, grace: Duration) {
        self.shared.drain.cancel();
        self.shared.tasks.close();
        self.shared.pool.clear();
        if tokio::time::timeout(grace, self.shared.tasks.wait())
            .await
            .is_err()
        {
            tracing::info!("cutting gateway connections that did not end in time");
        }
        self.shared.stop.cancel();
        self.shared.tasks.wait().await;
    }
}

impl Shared {
    fn lock(&self) -> std::sync::MutexGuard<'_, Routing> {
        self.routing.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Has requests routed as the tables say from now on.
    fn serve_by(self: &Arc<Self>, routing: &mut Routing) {
        self.absorb_all(routing);
        self.hosts.store(Arc::new(routing.hosts()));
        let touched = routing.take_internal();
        let listeners = self.listeners.lock();
        let mut listeners = listeners.unwrap_or_else(PoisonError::into_inner);
        listeners.settle(self, touched);
    }

    /// Takes over what tracked targets say now.
    fn absorb_all(&self, routing: &mut Routing) {
        for gone in routing.absorb() {
            self.pool.forget(gone);
        }
    }
}

/// Accepts connections until `ended`.
async fn accept(shared: Arc<Shared>, listener: TcpListener, ended: CancellationToken) {
    loop {
        let next = async {
            let slot = shared.slots.clone().acquire_owned().await;
            (slot, listener.accept().await)
        };
        let (slot, accepted) = tokio::select! {
            () = ended.cancelled() => return,
            next = next => next,
        };
        match accepted {
            Ok((stream, peer)) => {
                let shared = shared.clone();
                shared.tasks.clone().spawn(async move {
                    serve(&shared, stream, peer).await;
                    drop(slot);
                });
            }
            Err(error) => {
                // Out of file descriptors, or a client that gave up: neither ends the gateway.
                tracing::warn!(%error, "the gateway could not accept a connection");
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        }
    }
}

async fn serve(shared: &Arc<Shared>, stream: TcpStream, peer: SocketAddr) {
    let _ = stream.set_nodelay(true);
    let service = hyper::service::service_fn(|request| proxy::handle(shared, peer, request));
    let connection = hyper::server::conn::http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(shared.options.head_timeout)
        .max_headers(shared.options.max_headers)
        .max_buf_size(shared.options.max_head_bytes.max(8192))
        .serve_connection(TokioIo::new(stream), service)
        .with_upgrades();
    let mut connection = std::pin::pin!(connection);
    let mut draining = false;
    loop {
        tokio::select! {
            biased;
            () = shared.stop.cancelled() => return,
            () = shared.drain.cancelled(), if !draining => {
                draining = true;
                connection.as_mut().graceful_shutdown();
            }
            done = connection.as_mut() => {
                if let Err(error) = done {
                    tracing::debug!(%peer, %error, "a gateway connection ended early");
                }
                return;
            }
        }
    }
}
