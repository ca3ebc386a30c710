//! What the handlers stand on.

use std::collections::BTreeMap;
use std::num::{NonZeroU32, NonZeroUsize};
use std::ops::Deref;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use daybook_events::attestation::Attestor;
use daybook_events::lines::LineLog;
use daybook_events::routing::internal_address;
use daybook_events::{ClusterName, Hostname, ImageRepository, InstanceRef, PublishedTree};
use daybook_projections::{Ledger, Projections};
use daybook_secrets::SecretStore;
use jiff::Timestamp;
use schemars::JsonSchema;
use serde::Serialize;
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::access::{AccessControl, AccessMode};
use crate::catalogue::Catalogue;
use crate::commands::Commands;
use crate::feed::Feed;
use crate::graphql::DaybookSchema;
use crate::metrics::Metrics;
use crate::remembered::Answers;
use crate::routes::operations::Rows;
use crate::uploads::UploadSettings;

/// State hashes of the past that are worked out at once.
const PAST_AT_ONCE: usize = 2;

/// Connections of operators at once, at a listener of their own.
const OPERATORS_MAX: usize = 64;

/// How often an address may ask for what is public and takes work.
const STRANGERS: NonZeroU32 = NonZeroU32::new(200).unwrap();

/// Where workloads answer: the address of the gateway as people reach it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Gateway {
    /// `http` or `https`.
    pub scheme: String,
    /// The port; the scheme's own one is left out of URLs.
    pub port: u16,
}

impl Gateway {
    /// The URL of a hostname.
    pub fn url(&self, hostname: &Hostname) -> String {
        match (self.scheme.as_str(), self.port) {
            ("http", 80) | ("https", 443) => format!("{}://{hostname}", self.scheme),
            (scheme, port) => format!("{scheme}://{hostname}:{port}"),
        }
    }

    /// Where it answers for an instance, for others on its machine.
    pub fn internal_url(&self, instance: &InstanceRef) -> String {
        format!("http://{}:{}", internal_address(instance), self.port)
    }
}

/// How this server is set up. Parsed and checked by whoever starts it.
#[derive(Debug, Clone)]
pub struct Settings {
    /// What workloads' hostnames end in: `localhost`.
    pub domain: Hostname,
    /// Where workloads answer.
    pub gateway: Gateway,
    /// The folder with the GitOps repositories, `<project>.git`; none if they are elsewhere.
    pub git_root: Option<PathBuf>,
    /// Where sources that are uploaded are kept; they are refused without.
    pub uploads: Option<UploadSettings>,
    /// The clusters that deployments can name; any, if it is empty.
    pub known_clusters: Vec<ClusterName>,
    /// What `<project>/<service>` is appended to where a service names no image repository.
    pub image_prefix: Option<ImageRepository>,
    /// Names in `Host` headers that are accepted beside `localhost`, `127.0.0.1` and `[::1]`.
    /// Others are refused, so that no web page can reach this server through a name of its own.
    pub hosts: Vec<String>,
    /// Whether requests must say, with a credential, who asks.
    pub access: AccessMode,
    /// The identity provider whose tokens are taken too.
    pub oidc: Option<Arc<crate::access::oidc::Oidc>>,
    /// How often each caller with a credential may ask; as often as they like, if not given.
    pub rate: Option<crate::access::Rate>,
    /// How often each address may ask, without a credential, for what is public and takes work.
    pub stranger_rate: crate::access::Rate,
    /// How many streams each caller with a credential may have open; as many as they like, if not
    /// given.
    pub streams_max: Option<NonZeroUsize>,
    /// How many connections there may be at once. They share file descriptors with everything else in
    /// the process.
    pub connections_max: usize,
    /// How what goes over the network is encrypted; not at all without.
    pub tls: Option<Arc<rustls::ServerConfig>>,
    /// The longest that a request waits for `Daybook-Min-Position`.
    pub min_position_wait: Duration,
    /// How long a request that is no stream may take.
    pub request_timeout: Duration,
    /// How often an idle stream says that it is alive.
    pub heartbeat: Duration,
    /// The templates that services can be made from.
    pub catalogue: Arc<Catalogue>,
    /// Whether webhooks may be called without TLS, and at addresses that are not public. What names
    /// stand for is looked at when they are called.
    pub allow_private_webhooks: bool,
    /// How long open requests may go on once the server is to end.
    pub drain: Duration,
}

impl Settings {
    /// The settings of a server on loopback, with these names under `localhost`.
    pub fn loopback(gateway_port: u16) -> Self {
        Self {
            domain: Hostname::parse("localhost").expect("localhost is a hostname"),
            gateway: Gateway {
                scheme: "http".into(),
                port: gateway_port,
            },
            git_root: None,
            uploads: None,
            known_clusters: Vec::new(),
            image_prefix: None,
            hosts: Vec::new(),
            access: AccessMode::Open,
            oidc: None,
            rate: None,
            stranger_rate: crate::access::Rate::per_second(STRANGERS),
            streams_max: None,
            connections_max: crate::server::room_for_connections(),
            tls: None,
            min_position_wait: Duration::from_secs(5),
            request_timeout: Duration::from_secs(30),
            heartbeat: Duration::from_secs(15),
            catalogue: Arc::default(),
            allow_private_webhooks: false,
            drain: Duration::from_secs(10),
        }
    }
}

/// One part of the process, as `/readyz` shows it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, JsonSchema)]
pub struct Part {
    /// Its name.
    pub name: String,
    /// Whether it does its work.
    pub ready: bool,
    /// Why not.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// Since when this is so.
    pub since: Timestamp,
}

/// The parts of this process and whether each is ready. Parts register themselves and report;
/// `/readyz` asks. Cheap to clone; all clones are the same registry.
#[derive(Debug, Clone, Default)]
pub struct Parts(Arc<Mutex<BTreeMap<String, Part>>>);

impl Parts {
    /// Reports that a part does its work, registering it if it is new.
    pub fn ready(&self, name: &str) {
        self.report(name, None);
    }

    /// Reports that a part does not (yet) do its work, registering it if it is new.
    pub fn not_ready(&self, name: &str, reason: impl Into<String>) {
        self.report(name, Some(reason.into()));
    }

    /// All parts, by name.
    pub fn all(&self) -> Vec<Part> {
        let parts = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        parts.values().cloned().collect()
    }

    fn report(&self, name: &str, reason: Option<String>) {
        let mut parts = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let ready = reason.is_none();
        let since = parts
            .get(name)
            .filter(|p| p.ready == ready)
            .map_or_else(Timestamp::now, |p| p.since);
        let part = Part {
            name: name.to_owned(),
            ready,
            reason,
            since,
        };
        parts.insert(name.to_owned(), part);
    }
}

/// What the handlers stand on. Cheap to clone, as each layer around them has one for each request.
#[derive(Clone)]
pub struct AppState(Arc<Inner>);

/// What it is made of.
#[derive(Clone)]
#[doc(hidden)]
pub struct Inner {
    pub(crate) commands: Commands,
    pub(crate) lines: Arc<dyn LineLog>,
    pub(crate) settings: Arc<Settings>,
    pub(crate) parts: Parts,
    pub(crate) access: AccessControl,
    pub(crate) metrics: Arc<Metrics>,
    /// The signed tree over the ledger, if this server publishes one.
    pub(crate) tree: Option<Arc<dyn PublishedTree>>,
    /// Who may work out a state hash of the past: it takes all cores, and memory for the events
    /// since the nearest one that is kept.
    pub(crate) past: Arc<Semaphore>,
    /// The answers that were given lately.
    pub(crate) answers: Arc<Answers>,
    /// The digest over all rows of the projections.
    pub(crate) rows: Arc<Rows>,
    /// New events, for all who subscribe.
    pub(crate) feed: Feed,
    /// What GraphQL can be asked.
    pub(crate) graphql: DaybookSchema,
    /// What runs beside the connections: sockets, and what fills the feed.
    pub(crate) tasks: TaskTracker,
    /// Signs in the name of the ledger, if this server can.
    pub(crate) attestor: Option<Arc<dyn Attestor>>,
    /// Ends the streams.
    pub(crate) cancel: CancellationToken,
}

impl Deref for AppState {
    type Target = Inner;
    fn deref(&self) -> &Inner {
        &self.0
    }
}

impl std::fmt::Debug for AppState {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("AppState")
            .field("settings", &self.settings)
            .finish_non_exhaustive()
    }
}

impl AppState {
    /// Puts the parts together.
    pub fn new(ledger: Ledger, lines: Arc<dyn LineLog>, settings: Settings, parts: Parts) -> Self {
        let settings = Arc::new(settings);
        let access = AccessControl::new(
            settings.access,
            settings.oidc.clone(),
            settings.rate,
            settings.stranger_rate,
            settings.streams_max,
            ledger.projections().clone(),
        );
        let tasks = TaskTracker::new();
        let feed = Feed::new(
            ledger.log().clone(),
            ledger.projections().clone(),
            tasks.clone(),
        );
        Self(Arc::new(Inner {
            access,
            commands: Commands::new(ledger, settings.clone()),
            lines,
            settings,
            parts,
            metrics: Arc::default(),
            tree: None,
            past: Arc::new(Semaphore::new(PAST_AT_ONCE)),
            answers: Arc::default(),
            rows: Arc::default(),
            feed,
            graphql: crate::graphql::schema(),
            tasks,
            attestor: None,
            cancel: CancellationToken::new(),
        }))
    }

    fn inner(&mut self) -> &mut Inner {
        Arc::make_mut(&mut self.0)
    }

    /// The same, ended with this.
    pub(crate) fn with_cancel(mut self, cancel: CancellationToken) -> Self {
        self.inner().cancel = cancel;
        self
    }

    /// The same, publishing this transparency log under `/tlog/`.
    pub fn with_tree(mut self, tree: Arc<dyn PublishedTree>) -> Self {
        self.inner().tree = Some(tree);
        self
    }

    /// The same, signing statements about deployments with this.
    pub fn with_attestor(mut self, attestor: Arc<dyn Attestor>) -> Self {
        self.inner().attestor = Some(attestor);
        self
    }

    /// The same with a place to keep the values of secrets. Without one, secrets are refused.
    pub fn with_secrets(mut self, secrets: Arc<dyn SecretStore>) -> Self {
        self.inner().commands = self.commands.clone().with_secrets(secrets);
        self
    }

    /// The same process at another listener, where only operators ask how it does: who may, and how
    /// it is encrypted there.
    pub fn for_operations(
        &self,
        access: AccessMode,
        tls: Option<Arc<rustls::ServerConfig>>,
    ) -> Self {
        let settings = Settings {
            access,
            tls,
            connections_max: OPERATORS_MAX.min(self.settings.connections_max),
            ..Settings::clone(&self.settings)
        };
        let access = AccessControl::new(
            settings.access,
            settings.oidc.clone(),
            settings.rate,
            settings.stranger_rate,
            settings.streams_max,
            self.projections().clone(),
        );
        Self(Arc::new(Inner {
            access,
            settings: Arc::new(settings),
            tasks: TaskTracker::new(),
            ..Inner::clone(&self.0)
        }))
    }

    /// The use cases, for callers in the same process.
    pub fn commands(&self) -> &Commands {
        &self.commands
    }

    /// Who may come in, for surfaces of their own.
    pub fn access(&self) -> &AccessControl {
        &self.access
    }

    pub(crate) fn projections(&self) -> &Projections {
        self.commands.ledger().projections()
    }
}
