//! A node: one process that runs some roles. The only place where adapters are put together.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use daybook_api::access::AccessMode;
use daybook_api::catalogue::Catalogue;
use daybook_api::{AppState, Gateway as PublicGateway, Parts, Settings as ApiSettings};
use daybook_events::lines::{LineLog, LineSource};
use daybook_events::timer::KeepFor;
use daybook_events::tree::{PublishedTree, TreeCondition};
use daybook_events::with_causes;
use daybook_events::{ClusterName, EventLog, Hostname, ImageRepository};
use daybook_projections::runner::{self, RunError};
use daybook_projections::{Ledger, OpenError, Projections};
use daybook_secrets::{MaskedLines, SecretFolder, SecretStore};
use daybook_store::embedded::{EmbeddedConfig, LineRetention};
use daybook_store::jetstream::{
    BulletinOptions, Connection, JetStreamBulletin, LineOptions, LogOptions, NatsAuth, NatsOptions,
};
use daybook_store::tlog::{
    FolderStorage, FolderTree, GuardedLog, KeyFileError, KeyRing, Notary, NotaryError,
    NotaryOptions,
};
use daybook_workers::builder::AnyBuilder;
use daybook_workers::builder::archive::ArchiveBuilder;
use daybook_workers::builder::dockerfile::DockerfileBuilder;
use daybook_workers::builder::port::BuiltImages;
use daybook_workers::charts::{HelmCharts, HelmOptions};
use daybook_workers::crew::Crew;
use daybook_workers::driver::DriverOptions;
use daybook_workers::endpoint_checks::EndpointChecks;
use daybook_workers::gateway::{Gateway, GatewayOptions};
use daybook_workers::gitops::{GitopsRepositories, SigningKey};
use daybook_workers::image::layout::Layout;
use daybook_workers::image::local::LayoutStore;
use daybook_workers::image::registry::{RegistryOptions, RegistryStore};
use daybook_workers::image::store::Images;
use daybook_workers::image::unpack::UnpackLimits;
use daybook_workers::local::{LocalCluster, LocalOptions, Workloads};
use daybook_workers::notify::NotifyOptions;
use daybook_workers::pipeline::{Bench, Settings};
use daybook_workers::ports;
use daybook_workers::source::{GitTransport, SourcePolicy, SourceRepositories, TransportConfig};
use serde_json::{Value, json};
use tokio::net::TcpListener;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use crate::access::{Access, Made};
use crate::attestor::LedgerKeys;
use crate::builds::{self, BuildArgs};
use crate::bulletin::NatsBulletin;
use crate::commands::keys_unusable as unusable;
use crate::exit::{Code, Failure};
use crate::gitops_remotes::GitopsRemoteArgs;
use crate::kubernetes::{Carer, Kubernetes};
use crate::proofs::TreeProofs;
use crate::roles::Role;
use crate::scratch::Scratch;
use crate::served_tree::ServedTree;
use crate::telemetry::{Collector, Telemetry};
use crate::uploads::UploadArgs;

/// The key that GitOps commits are signed with, in the data folder.
pub const GITOPS_KEY: &str = "keys/gitops";

/// What a node is to be. Parsed and checked before anything is opened.
#[derive(Debug, Clone)]
pub struct NodeOptions {
    /// What it does.
    pub roles: BTreeSet<Role>,
    /// Where it keeps things.
    pub data: PathBuf,
    /// Where the values of secrets are kept; in the data folder if not given.
    pub secrets: Option<PathBuf>,
    /// The key file of the secrets; in their folder if not given.
    pub secrets_key: Option<PathBuf>,
    /// Where the HTTP interface listens.
    pub listen: SocketAddr,
    /// Who may use it, and how it is encrypted.
    pub access: Access,
    /// Where operators ask how the process does, beside the HTTP interface, and who may.
    pub operations: Option<(SocketAddr, Access)>,
    /// Names in `Host` headers that the HTTP interface answers to, beside localhost.
    pub hosts: Vec<String>,
    /// Where the gateway listens.
    pub gateway: SocketAddr,
    /// Where a gateway in another process answers from here.
    pub gateway_url: Option<String>,
    /// The NATS server; none for the embedded log.
    pub nats: Option<String>,
    /// Credentials for it.
    pub nats_creds: Option<PathBuf>,
    /// The stream of the log there.
    pub nats_stream: String,
    /// Copies of the log there.
    pub nats_replicas: usize,
    /// What host names end in.
    pub domain: String,
    /// Clusters of processes on this machine.
    pub clusters: Vec<String>,
    /// Kubernetes clusters.
    pub kubernetes: Kubernetes,
    /// Where images go.
    pub image_prefix: Option<String>,
    /// Builds at once.
    pub builds: usize,
    /// Where images are made.
    pub build: BuildArgs,
    /// How long a deployment is kept running that is no longer the main one.
    pub keep_old: KeepFor,
    /// A folder with templates of the operator's own.
    pub templates: Option<PathBuf>,
    /// Where the signed tree is published; below the data folder if not named.
    pub tlog: Option<PathBuf>,
    /// Where a server on another machine publishes it, for a node without the notary.
    pub tlog_url: Option<String>,
    /// Where its keys are; below the data folder if not named.
    pub tlog_keys: Option<PathBuf>,
    /// The ledger's name for auditors, for when its first key is made.
    pub origin: Option<String>,
    /// How many old events a second the notary compares with what was signed.
    pub sweep_rate: u32,
    /// The key that GitOps commits are signed with, if not the one in the data folder.
    pub gitops_key: Option<PathBuf>,
    /// How often GitOps repositories are looked over for commits of others.
    pub gitops_watch: Duration,
    /// How the remotes of GitOps repositories are reached.
    pub gitops_remotes: GitopsRemoteArgs,
    /// Where sources are that were uploaded, and how large they may be.
    pub uploads: UploadArgs,
    /// How long output is kept, if somebody says so.
    pub lines_keep: Option<KeepFor>,
    /// How many bytes of output are kept, if somebody says so.
    pub lines_max: Option<u64>,
    /// Which addresses are looked at from where users are.
    pub endpoint_checks: Option<Arc<EndpointChecks>>,
    /// Where spans are sent, if they are.
    pub collector: Option<Collector>,
    /// Whether sources may be paths of this machine and private addresses.
    pub allow_local_sources: bool,
    /// Whether webhooks may go to private addresses, and without TLS.
    pub allow_private_webhooks: bool,
}

/// Where the keys of the ledger are in a data folder.
pub const LEDGER_KEYS: &str = "keys/ledger";

impl NodeOptions {
    /// All roles on loopback, with the embedded log.
    pub fn everything(data: PathBuf) -> Self {
        Self {
            roles: Role::all(),
            data,
            secrets: None,
            secrets_key: None,
            listen: SocketAddr::from(([127, 0, 0, 1], 7070)),
            access: Access::default(),
            operations: None,
            hosts: Vec::new(),
            gateway: SocketAddr::from(([127, 0, 0, 1], 7080)),
            gateway_url: None,
            nats: None,
            nats_creds: None,
            nats_stream: LogOptions::default().stream,
            nats_replicas: 1,
            domain: "localhost".into(),
            clusters: vec!["local-a".into(), "local-b".into()],
            kubernetes: Kubernetes::default(),
            image_prefix: None,
            builds: 2,
            build: BuildArgs::default(),
            keep_old: KeepFor::OLD,
            templates: None,
            tlog: None,
            tlog_url: None,
            tlog_keys: None,
            origin: None,
            sweep_rate: NotaryOptions::default().sweep_rate,
            gitops_key: None,
            gitops_watch: Duration::from_secs(15),
            gitops_remotes: GitopsRemoteArgs::default(),
            uploads: UploadArgs::default(),
            lines_keep: None,
            lines_max: None,
            endpoint_checks: None,
            collector: None,
            allow_local_sources: true,
            allow_private_webhooks: false,
        }
    }
}

impl NodeOptions {
    /// Where the signed tree is published.
    pub fn tlog_folder(&self, data: &Path) -> PathBuf {
        self.tlog.clone().unwrap_or_else(|| data.join("tlog"))
    }

    /// Where the keys of the ledger are.
    pub fn ledger_keys_folder(&self, data: &Path) -> PathBuf {
        self.tlog_keys
            .clone()
            .unwrap_or_else(|| data.join(LEDGER_KEYS))
    }
}

/// How the NATS server of a node is reached, if it has one.
pub fn nats_options(options: &NodeOptions) -> Option<NatsOptions> {
    let mut nats = NatsOptions::new(options.nats.as_ref()?);
    if let Some(file) = &options.nats_creds {
        nats.auth = NatsAuth::CredentialsFile(file.clone());
    }
    Some(nats)
}

/// A running node.
pub struct Node {
    options: NodeOptions,
    listening: Option<SocketAddr>,
    /// Where operators ask how the process does, with the scheme.
    operations: Option<String>,
    made_token: Option<Made>,
    gateway: Option<Gateway>,
    warnings: Vec<String>,
    log_line: String,
    tree: Arc<dyn PublishedTree>,
    origin: Option<String>,
    crew: Arc<Crew>,
    clusters: Arc<std::sync::Mutex<Vec<Arc<LocalCluster>>>>,
    projections: Projections,
    tasks: Vec<JoinHandle<()>>,
    /// Ends workers and interfaces.
    cancel: CancellationToken,
    /// Ends what they stand on.
    foundations: CancellationToken,
    failed: tokio::sync::watch::Receiver<Option<String>>,
    telemetry: Option<Telemetry>,
    /// Held as long as anything may work in it.
    _scratch: Scratch,
}

fn wrong(code: &str, message: impl Into<String>, hint: &str) -> Failure {
    Failure::new(Code::Usage, code, message).hint(hint)
}

impl Node {
    /// Starts a node. When this returns everything listens and the projections are up to date.
    pub async fn start(options: NodeOptions) -> Result<Self, Failure> {
        crate::output::hold_on();
        let has = |role| options.roles.contains(&role);
        let domain = Hostname::parse(options.domain.clone()).map_err(|e| {
            wrong(
                e.code,
                e.to_string(),
                "give --domain a host name, such as localhost",
            )
        })?;
        let clusters: Vec<ClusterName> = options
            .clusters
            .iter()
            .map(|c| ClusterName::parse(c.clone()))
            .collect::<Result<_, _>>()
            .map_err(|e| {
                wrong(
                    e.code,
                    e.to_string(),
                    "give --local-cluster a name such as local-a",
                )
            })?;
        let image_prefix = options
            .image_prefix
            .clone()
            .unwrap_or_else(|| format!("{}/daybook", daybook_workers::image::LOCAL_HOST));
        let image_prefix = ImageRepository::parse(image_prefix).map_err(|e| {
            wrong(
                e.code,
                e.to_string(),
                "give --image-prefix the form host[:port]/path",
            )
        })?;
        if has(Role::Endpoints) && options.endpoint_checks.is_none() {
            return Err(wrong(
                "endpoint_checks_missing",
                "the role `endpoints` looks at what a file says, and none is named",
                "name it with --endpoint-checks FILE",
            ));
        }
        let known_clusters = all_clusters(&clusters, &options.kubernetes)?;
        let catalogue = Catalogue::load(options.templates.as_deref()).map_err(|e| {
            wrong(
                "templates_unusable",
                with_causes(&e),
                "mend the folder, or name another one with --templates DIR",
            )
        })?;
        std::fs::create_dir_all(&options.data).map_err(|e| {
            wrong(
                "data_unusable",
                format!(
                    "the data folder {} cannot be made: {e}",
                    options.data.display()
                ),
                "name another one with --data DIR",
            )
        })?;
        let data = std::path::absolute(&options.data)?;
        let remotes = options
            .gitops_remotes
            .transport(options.allow_local_sources)?;

        // Ports first: if one is taken, nothing else is touched.
        let listener = if has(Role::Api) {
            Some(
                TcpListener::bind(options.listen)
                    .await
                    .map_err(|e| taken("HTTP interface", options.listen, &e, "--listen"))?,
            )
        } else {
            None
        };
        let for_operators = match &options.operations {
            Some((listen, access)) => {
                let listener = TcpListener::bind(*listen).await.map_err(|e| {
                    taken("listener for operators", *listen, &e, "--operations-listen")
                })?;
                Some((listener, access.clone()))
            }
            None => None,
        };
        // Whoever comes before the routes are there waits for them.
        let closed = GatewayOptions {
            begins_closed: true,
            ..GatewayOptions::default()
        };
        let gateway = if has(Role::Gateway) {
            Some(
                Gateway::bind_with(options.gateway, closed)
                    .await
                    .map_err(|e| taken("gateway", options.gateway, &e.source, "--gateway"))?,
            )
        } else {
            None
        };

        // Where it lies in a folder that is deployed, keys and secrets are not uploaded with it. A folder
        // that holds something already may be a work tree of somebody, whose files git is to see.
        let is_new = std::fs::read_dir(&options.data).is_ok_and(|mut held| held.next().is_none());
        if is_new {
            let _ = std::fs::write(options.data.join(".gitignore"), "*\n");
        }

        let roles: Vec<_> = options.roles.iter().map(|r| r.name()).collect();
        let telemetry = options.collector.as_ref();
        let telemetry = telemetry
            .map(|collector| Telemetry::start(collector, &roles.join(",")))
            .transpose()?;
        let (log, lines) = open_log(&options, &data).await?;
        let info = log
            .info()
            .await
            .map_err(|e| Failure::new(Code::Failure, "log_unavailable", e.to_string()))?;
        let log_line = format!(
            "{} {} ({})",
            info.backend,
            info.version,
            match info.durability {
                daybook_events::log::Durability::Synced =>
                    "an acknowledged event survives the loss of power",
                daybook_events::log::Durability::Buffered =>
                    "an acknowledged event may be lost with the power",
                daybook_events::log::Durability::Unknown =>
                    "the server does not say what survives the loss of power",
            }
        );

        let cancel = CancellationToken::new();
        let foundations = CancellationToken::new();
        let (fail, failed) = tokio::sync::watch::channel(None);
        let mut tasks = Vec::new();
        let parts = Parts::default();
        let mut warnings = info.warnings;
        // Before anything is appended the log is compared with what was signed.
        let tlog = options.tlog_folder(&data);
        if has(Role::Notary) && options.tlog_url.is_some() {
            return Err(wrong(
                "notary_elsewhere",
                "this process runs the notary, which publishes in a folder of its own",
                "leave --tlog-url out, or the role `notary`",
            ));
        }
        let (tree, origin): (Arc<dyn PublishedTree>, _) = if has(Role::Notary) {
            let keys = ledger_keys(&options, &data)?;
            let origin = keys.origin().to_owned();
            let storage = Arc::new(FolderStorage::new(tlog));
            let how = NotaryOptions {
                sweep_rate: options.sweep_rate,
                ..NotaryOptions::default()
            };
            let notary = Notary::open(log.clone(), storage, keys, how)
                .await
                .map_err(|e| notary_unusable(&e))?;
            let tree = notary.tree();
            tasks.push(tokio::spawn(sign_log(
                notary,
                foundations.clone(),
                parts.clone(),
            )));
            (tree, Some(origin))
        } else if let Some(url) = &options.tlog_url {
            let served = ServedTree::open(url).await?;
            tasks.push(tokio::spawn(served.clone().follow(foundations.clone())));
            (served, None)
        } else {
            let folder = tlog.display().to_string();
            let tree = FolderTree::new(tlog);
            if tree.head().is_none() {
                warnings.push(format!(
                    "no notary has published anything in {folder} yet. If it runs on another \
                     machine, name its tree with --tlog-url: until then nothing is said of the \
                     ledger here, and appends go on whatever the notary finds"
                ));
            }
            (Arc::new(tree), None)
        };
        if let TreeCondition::Broken(breach) = tree.condition() {
            warnings.push(format!(
                "THE LOG IS NOT WHAT WAS SIGNED: {} ({}). Nothing is appended any more. {}",
                breach.message, breach.code, breach.remedy
            ));
        }
        let log: Arc<dyn EventLog> = Arc::new(GuardedLog::new(log, tree.clone()));
        let projections = open_projections(&data, &options)?;
        tasks.push(tokio::spawn(follow_log(
            projections.clone(),
            log.clone(),
            foundations.clone(),
            parts.clone(),
            fail.clone(),
        )));
        let ledger = Ledger::new(log.clone(), projections.clone());
        let secrets = open_secrets(&options, &data);
        crate::output::mask(secrets.clone());
        let lines = masked(lines, &secrets, &projections);

        let gateway_url = gateway
            .as_ref()
            .map(|g| format!("http://{}", g.addr()))
            .or_else(|| options.gateway_url.clone())
            .or_else(|| Some(format!("http://{}", options.gateway)));
        let scratch = Scratch::claim(&data.join("scratch")).map_err(|e| {
            Failure::new(
                Code::Failure,
                "scratch_unusable",
                format!("no folder for work in progress can be made: {e}"),
            )
            .hint("make the folder `scratch` in the data folder writable")
        })?;
        let bench = Bench {
            ledger: ledger.clone(),
            lines: lines.clone(),
            secrets: secrets.clone(),
            settings: Arc::new(Settings {
                worker: format!("{}/{}", host(), std::process::id()),
                domain: domain.clone(),
                image_prefix: image_prefix.to_string(),
                scratch: scratch.path().to_owned(),
                gateway_url: gateway_url.clone(),
                builds: options.builds,
                keep_old: options.keep_old,
            }),
        };
        let charts = HelmCharts::new(HelmOptions {
            program: None,
            folder: data.join("charts"),
            never_on: clusters.iter().cloned().collect(),
            namespace: daybook_kubernetes::names::namespace,
            policy: policy(&options),
        });
        let crew = Crew::new(bench, DriverOptions::default(), cancel.clone());
        let crew = Arc::new(crew.with_charts(Arc::new(charts)));
        let held = Arc::new(std::sync::Mutex::new(Vec::new()));

        // Commands are answered as soon as the fold has seen what there is.
        let head = log
            .head()
            .await
            .map_err(|e| Failure::new(Code::Failure, "log_unavailable", e.to_string()))?;
        projections
            .wait_for(head, Duration::from_secs(600))
            .await
            .map_err(|e| Failure::new(Code::Failure, "projections_behind", e.to_string()))?;

        let images = open_images(&data)?;
        if has(Role::Build) {
            let sources = SourceRepositories::new(data.join("sources"), transport(&options))
                .with_uploads(options.uploads.read(&data)?);
            let here = Arc::new(builder(scratch.path(), &images));
            let in_cluster = options
                .build
                .in_cluster(
                    &options.kubernetes,
                    options.uploads.uploads_url.as_deref(),
                    here.clone(),
                    images.clone(),
                )
                .await?;
            let builder: Arc<dyn ports::Images> = match in_cluster {
                Some(builds) => {
                    tasks.push(tokio::spawn(builds::sweep(
                        builds.clone(),
                        projections.clone(),
                        parts.clone(),
                        cancel.clone(),
                    )));
                    builds
                }
                None => here,
            };
            crew.build(Arc::new(sources), builder);
        }
        let mut repositories =
            GitopsRepositories::new(data.join("git"), projections.clone(), remotes)
                .anchoring(tree.clone());
        if has(Role::Package) || has(Role::Sync) {
            repositories = repositories.signing(Arc::new(gitops_key(&data, &options)?));
        }
        let repositories: Arc<dyn ports::Repositories> = Arc::new(repositories);
        if has(Role::Package) {
            crew.package_watching(repositories.clone(), options.gitops_watch);
        }
        if has(Role::Route) {
            crew.route();
        }
        if has(Role::Timers) {
            crew.timers();
        }
        if has(Role::Notify) {
            let notify = NotifyOptions {
                allow_private: options.allow_private_webhooks,
                ..NotifyOptions::default()
            };
            crew.notify(Some(Arc::new(TreeProofs(tree.clone()))), notify)
                .map_err(|e| Failure::new(Code::Failure, "notify", with_causes(&e)))?;
            if let Some(nats) = nats_options(&options) {
                crew.publish_cdevents(Arc::new(open_bulletin(nats, options.nats_replicas).await?));
            }
        }
        if let Some(gateway) = &gateway {
            crew.gateway(gateway.clone(), "local");
        }
        if let (true, Some(url)) = (has(Role::Probe), &gateway_url) {
            crew.probe(url)
                .map_err(|e| Failure::new(Code::Failure, "probe", e.to_string()))?;
        }
        if let (true, Some(checks)) = (
            has(Role::Probe) || has(Role::Endpoints),
            &options.endpoint_checks,
        ) {
            crew.endpoints(checks.clone());
        }
        if has(Role::Sync) {
            for cluster in &clusters {
                tasks.push(tokio::spawn(look_after(
                    data.join("clusters"),
                    cluster.clone(),
                    images.clone(),
                    lines.clone(),
                    secrets.clone(),
                    crew.clone(),
                    repositories.clone(),
                    held.clone(),
                    parts.clone(),
                    cancel.clone(),
                    foundations.clone(),
                )));
            }
        }

        if has(Role::Sync) {
            for context in &options.kubernetes.contexts {
                let carer = Carer {
                    secrets: secrets.clone(),
                    lines: lines.clone(),
                    crew: crew.clone(),
                    repositories: repositories.clone(),
                    remotes: Arc::new(projections.clone()),
                    domain: domain.to_string(),
                    parts: parts.clone(),
                    cancel: cancel.clone(),
                    foundations: foundations.clone(),
                };
                let kubernetes = options.kubernetes.clone();
                tasks.push(tokio::spawn(carer.look_after(kubernetes, context.clone())));
            }
        }

        let (mut listening, mut operations, mut made_token) = (None, None, None);
        if listener.is_some() || for_operators.is_some() {
            let public = gateway.as_ref().map_or(options.gateway, Gateway::addr);
            let mut settings = ApiSettings::loopback(public.port());
            settings.domain = domain;
            settings.hosts = options.hosts.clone();
            settings.access = options.access.mode;
            settings.oidc = options.access.oidc.clone();
            settings.rate = options.access.rate;
            settings.streams_max = options.access.streams_max;
            settings.tls = options.access.tls.clone();
            settings.allow_private_webhooks = options.allow_private_webhooks;
            settings.gateway = PublicGateway {
                scheme: "http".into(),
                port: public.port(),
            };
            settings.git_root = Some(data.join("git"));
            settings.uploads = Some(options.uploads.kept(&data));
            settings.known_clusters = known_clusters;
            settings.catalogue = Arc::new(catalogue);
            settings.image_prefix = Some(image_prefix);
            let mut state = AppState::new(ledger, lines, settings, parts)
                .with_tree(tree.clone())
                .with_secrets(secrets);
            if let Some(keys) = LedgerKeys::open(&options.ledger_keys_folder(&data)) {
                state = state.with_attestor(Arc::new(keys));
            }
            if let Some((listener, access)) = for_operators {
                let addr = listener.local_addr()?;
                operations = Some(format!("{}://{addr}", scheme(&access)));
                let state = state.for_operations(access.mode, access.tls);
                let serving = daybook_api::serve_operations(listener, state, cancel.clone());
                tasks.push(tokio::spawn(or_say(
                    "the listener for operators",
                    serving,
                    fail.clone(),
                )));
            }
            if let Some(listener) = listener {
                listening = Some(listener.local_addr()?);
                made_token = options.access.make_tokens(state.commands()).await?;
                let serving = daybook_api::serve(listener, state, cancel.clone());
                tasks.push(tokio::spawn(or_say(
                    "the HTTP interface",
                    serving,
                    fail.clone(),
                )));
            }
        }
        Ok(Self {
            options: NodeOptions { data, ..options },
            listening,
            operations,
            made_token,
            gateway,
            warnings,
            log_line,
            tree,
            origin,
            crew,
            clusters: held,
            projections,
            tasks,
            cancel,
            foundations,
            failed,
            telemetry,
            _scratch: scratch,
        })
    }

    /// Ends the node: requests and activations get a little time to finish. With
    /// `stop_workloads`, the processes of its clusters are stopped too; the next start runs them
    /// again.
    pub async fn shutdown(self, stop_workloads: bool) {
        self.cancel.cancel();
        if tokio::time::timeout(Duration::from_secs(15), self.crew.ended())
            .await
            .is_err()
        {
            tracing::warn!("some workers did not end in time");
        }
        if let Some(gateway) = &self.gateway {
            gateway.shutdown(Duration::from_secs(2)).await;
        }
        let clusters = match self.clusters.lock() {
            Ok(mut held) => std::mem::take(&mut *held),
            Err(poisoned) => std::mem::take(&mut *poisoned.into_inner()),
        };
        let workloads = if stop_workloads {
            Workloads::Stop
        } else {
            Workloads::Leave
        };
        for cluster in clusters {
            cluster.shutdown(workloads).await;
        }
        self.foundations.cancel();
        for task in self.tasks {
            if tokio::time::timeout(Duration::from_secs(12), task)
                .await
                .is_err()
            {
                tracing::warn!("a part of the process did not end in time");
            }
        }
        if let Err(error) = self.projections.flush() {
            tracing::debug!(%error, "the projections were not flushed; they will catch up");
        }
        // Last, with the spans of all that has ended before.
        if let Some(telemetry) = self.telemetry {
            telemetry.end().await;
        }
    }

    /// Where the HTTP interface is, for a client on this machine.
    pub fn api_url(&self) -> String {
        let addr = self.listening.unwrap_or(self.options.listen);
        format!("{}://{addr}", self.scheme())
    }

    /// Where the HTTP interface is, if this node runs it.
    pub fn listening(&self) -> Option<String> {
        self.listening.map(|a| format!("{}://{a}", self.scheme()))
    }

    fn scheme(&self) -> &'static str {
        scheme(&self.options.access)
    }

    /// Where operators ask how the process does, if not only in the HTTP interface.
    pub fn operations(&self) -> Option<&str> {
        self.operations.as_deref()
    }

    /// Whom the HTTP interface lets in.
    pub fn access_line(&self) -> &'static str {
        match self.options.access.mode {
            AccessMode::Open => "open: asks nobody for a token",
            AccessMode::Required => "asks for tokens",
        }
    }

    /// The token that this start has made.
    pub fn made_token(&self) -> Option<&Made> {
        self.made_token.as_ref()
    }

    /// Where the gateway is, if this node runs it.
    pub fn gateway_url(&self) -> Option<String> {
        self.gateway
            .as_ref()
            .map(|g| format!("http://{}", g.addr()))
    }

    /// Its roles in words.
    pub fn roles(&self) -> String {
        let names: Vec<_> = self.options.roles.iter().map(|r| r.name()).collect();
        names.join(", ")
    }

    /// What the log is, and what it promises.
    pub fn log_line(&self) -> &str {
        &self.log_line
    }

    /// What signs the ledger, if this node does.
    pub fn ledger_line(&self) -> Option<String> {
        let origin = self.origin.as_ref()?;
        Some(match (self.tree.condition(), self.tree.head()) {
            (TreeCondition::Broken(_), _) => format!("{origin} is BROKEN"),
            (_, Some(signed)) => format!("{origin}, {} events signed", signed.head.size),
            (_, None) => format!("{origin}, signed from the first event on"),
        })
    }

    /// What an operator should know.
    pub fn warnings(&self) -> &[String] {
        &self.warnings
    }

    /// Where it keeps things.
    pub fn data(&self) -> &Path {
        &self.options.data
    }

    /// What host names end in.
    pub fn domain(&self) -> &str {
        &self.options.domain
    }

    /// The clusters that it looks after, or would.
    pub fn clusters(&self) -> &[String] {
        if self.options.roles.contains(&Role::Sync) {
            &self.options.clusters
        } else {
            &[]
        }
    }

    /// The Kubernetes clusters that it looks after, or would.
    pub fn kubernetes(&self) -> Vec<String> {
        let contexts = self.options.kubernetes.contexts.iter();
        let here = self.options.roles.contains(&Role::Sync);
        contexts
            .filter(|_| here)
            .map(|c| c.name.to_string())
            .collect()
    }

    /// All of this for a program.
    pub fn facts(&self) -> Value {
        json!({
            "roles": self.options.roles.iter().map(|r| r.name()).collect::<Vec<_>>(),
            "url": self.listening(),
            "operations": self.operations,
            "authentication": match self.options.access.mode {
                AccessMode::Open => "open",
                AccessMode::Required => "required",
            },
            "admin_token": match &self.made_token {
                Some(Made::Shown(token)) => Some(token.reveal().to_string()),
                _ => None,
            },
            "admin_token_file": match &self.made_token {
                Some(Made::Written(file)) => Some(file),
                _ => None,
            },
            "gateway": self.gateway_url(),
            "log": self.log_line,
            "origin": self.origin,
            "data": self.options.data,
            "clusters": self.clusters(),
            "kubernetes": self.kubernetes(),
            "warnings": self.warnings,
            "pid": std::process::id(),
        })
    }
}

/// Waits until somebody asks the process to end, or a part of it cannot go on.
pub async fn until_signal(node: &Node) -> Result<(), Failure> {
    let mut failed = node.failed.clone();
    let broken = async {
        loop {
            if let Some(why) = failed.borrow_and_update().clone() {
                return why;
            }
            if failed.changed().await.is_err() {
                std::future::pending::<()>().await;
            }
        }
    };
    #[cfg(unix)]
    let terminated = async {
        match tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate()) {
            Ok(mut signal) => {
                signal.recv().await;
            }
            Err(_) => std::future::pending().await,
        }
    };
    #[cfg(not(unix))]
    let terminated = std::future::pending::<()>();
    tokio::select! {
        _ = tokio::signal::ctrl_c() => Ok(()),
        () = terminated => Ok(()),
        why = broken => Err(Failure::new(Code::Failure, "part_ended", why)),
    }
}

/// The names of all clusters, each of which must be one.
fn all_clusters(
    local: &[ClusterName],
    kubernetes: &Kubernetes,
) -> Result<Vec<ClusterName>, Failure> {
    let mut all: Vec<ClusterName> = Vec::new();
    let contexts = kubernetes.contexts.iter().map(|c| &c.name);
    for name in local.iter().chain(contexts) {
        if all.contains(name) {
            return Err(wrong(
                "cluster_twice",
                format!("two clusters are called {name}"),
                "give each a name of its own: --kubernetes NAME=CONTEXT",
            ));
        }
        all.push(name.clone());
    }
    Ok(all)
}

fn scheme(access: &Access) -> &'static str {
    match access.tls {
        Some(_) => "https",
        None => "http",
    }
}

/// Serves, and ends the process if that cannot go on.
async fn or_say(
    what: &'static str,
    serving: impl Future<Output = Result<(), daybook_api::ServeError>>,
    fail: tokio::sync::watch::Sender<Option<String>>,
) {
    if let Err(error) = serving.await {
        let _ = fail.send(Some(format!("{what} ended: {}", with_causes(&error))));
    }
}

fn taken(what: &str, addr: SocketAddr, error: &std::io::Error, flag: &str) -> Failure {
    wrong(
        "address_unusable",
        format!("the {what} cannot listen on {addr}: {error}"),
        &format!(
            "end what uses it, or name another address with {flag} ADDR (port 0 takes a free one)"
        ),
    )
}

pub async fn open_log(
    options: &NodeOptions,
    data: &Path,
) -> Result<(Arc<dyn EventLog>, Arc<dyn LineLog>), Failure> {
    let config = match nats_options(options) {
        None => {
            let mut lines = LineRetention::default();
            if let Some(keep) = options.lines_keep {
                lines.max_age = as_long(keep).unwrap_or(Duration::MAX);
            }
            lines.max_bytes = options.lines_max.unwrap_or(lines.max_bytes);
            daybook_store::LogConfig::Embedded {
                dir: data.join("log"),
                log: EmbeddedConfig::default(),
                lines,
            }
        }
        Some(nats) => {
            let (mut log, mut lines) = (LogOptions::default(), LineOptions::default());
            log.stream = options.nats_stream.clone();
            log.replicas = options.nats_replicas;
            lines.replicas = options.nats_replicas;
            if let Some(keep) = options.lines_keep {
                // None is what NATS calls no time: they never go.
                lines.max_age = as_long(keep).unwrap_or_default();
            }
            lines.max_bytes = options.lines_max.unwrap_or(lines.max_bytes);
            // Without its flag, what somebody has set up with NATS' own tools stays.
            lines.insists_age = options.lines_keep.is_some();
            lines.insists_bytes = options.lines_max.is_some();
            daybook_store::LogConfig::Nats {
                nats: Box::new(nats),
                log,
                lines,
            }
        }
    };
    daybook_store::open(config).await.map_err(|e| {
        let failure = Failure::new(Code::Failure, "log_unavailable", with_causes(&e));
        match &options.nats {
            Some(url) => failure.hint(format!(
                "check that a nats-server with JetStream answers at {}",
                daybook_events::without_credentials(url)
            )),
            None => failure.hint(
                "another `daybook up` may have this data folder; name another with --data DIR",
            ),
        }
    })
}

/// None for without an end.
fn as_long(keep: KeepFor) -> Option<Duration> {
    keep.duration().and_then(|d| Duration::try_from(d).ok())
}

/// The stream of CDEvents on NATS.
async fn open_bulletin(nats: NatsOptions, replicas: usize) -> Result<NatsBulletin, Failure> {
    let unavailable = |why| Failure::new(Code::Failure, "cdevents_unavailable", why);
    let connection = Connection::open(nats).await;
    let connection = connection.map_err(|e| unavailable(with_causes(&e)))?;
    let how = BulletinOptions::cdevents(replicas);
    let opened = JetStreamBulletin::open(connection, &how).await;
    opened
        .map(NatsBulletin)
        .map_err(|e| unavailable(with_causes(&e)))
}

/// The folder with the values of secrets. Nothing is made before there is one to keep.
fn open_secrets(options: &NodeOptions, data: &Path) -> Arc<dyn SecretStore> {
    let dir = options.secrets.clone();
    let dir = dir.unwrap_or_else(|| data.join("secrets"));
    Arc::new(SecretFolder::new(dir, options.secrets_key.clone()))
}

/// Output is masked against the secrets of the project that it belongs to.
fn masked(
    lines: Arc<dyn LineLog>,
    secrets: &Arc<dyn SecretStore>,
    projections: &Projections,
) -> Arc<dyn LineLog> {
    let projections = projections.clone();
    let project_of = Arc::new(move |source: LineSource| match source {
        LineSource::Build(id) => Some(projections.build(id).ok()??.0),
        LineSource::Deployment(id) => {
            let row = projections.deployment(id).ok()??;
            Some(row.state.request.instance.project)
        }
        // The record of whoever delivers, in which what is masked could not be read again.
        LineSource::Subscription(_) => None,
    });
    Arc::new(MaskedLines::new(lines, secrets.clone(), project_of))
}

/// Where the processes that share a data folder have their projections: the first one that is not
/// in use is the next one's.
pub fn projection_folders(data: &Path) -> impl Iterator<Item = PathBuf> {
    (1..=64).map(|n| match n {
        1 => data.join("projections"),
        n => data.join(format!("projections-{n}")),
    })
}

/// Projections are this process's own; several processes may share a data folder.
fn open_projections(data: &Path, options: &NodeOptions) -> Result<Projections, Failure> {
    let unusable = |e: &OpenError| {
        Failure::new(Code::Failure, "projections_unusable", with_causes(e))
            .hint("they can be rebuilt: delete the folder `projections` in the data folder")
    };
    if options.nats.is_none() {
        return Projections::open(&data.join("projections")).map_err(|e| unusable(&e));
    }
    let mut last = None;
    for folder in projection_folders(data) {
        match Projections::open(&folder) {
            Ok(p) => return Ok(p),
            Err(e @ OpenError::InUse) => last = Some(e),
            Err(e) => return Err(unusable(&e)),
        }
    }
    Err(unusable(&last.unwrap_or(OpenError::InUse)))
}

/// The keys of the ledger, which are made at the first start.
fn ledger_keys(options: &NodeOptions, data: &Path) -> Result<KeyRing, Failure> {
    let folder = options.ledger_keys_folder(data);
    let keys = match KeyRing::open(&folder) {
        Err(KeyFileError::Missing { .. }) => {
            let origin = options
                .origin
                .clone()
                .unwrap_or_else(|| format!("localhost/{:08x}", uuid::Uuid::new_v4().as_fields().0));
            KeyRing::generate(&folder, &origin)
        }
        opened => opened,
    };
    let keys = keys.map_err(|e| unusable(&e))?;
    match &options.origin {
        Some(origin) if origin != keys.origin() => Err(wrong(
            "origin_differs",
            format!(
                "the keys in {} are of the ledger {}, not of {}",
                folder.display(),
                keys.origin(),
                daybook_events::without_credentials(origin)
            ),
            "a ledger keeps its name: leave --origin out, or name another folder with --tlog-keys",
        )),
        _ => Ok(keys),
    }
}

/// Why a notary does not start.
fn notary_unusable(error: &NotaryError) -> Failure {
    let (code, hint) = match error {
        NotaryError::TreeMissing { .. } => (
            "tree_missing",
            "mount the folder of --tlog, or restore it from a backup. If it is lost for good, begin a \
             ledger of another name over the same log: `daybook keys generate --keys DIR --origin NAME`, \
             and --tlog-keys DIR",
        ),
        NotaryError::Signed { .. } => (
            "signed_unusable",
            "restore it with the keys that it is of; it says that they have signed, so remove it only \
             if the folder of --tlog is the one that they signed",
        ),
        _ => (
            "notary_unusable",
            "check the folders of --tlog and --tlog-keys",
        ),
    };
    Failure::new(Code::Failure, code, with_causes(error)).hint(hint)
}

/// Signs the log until the node ends. Without it nothing is lost: what is not signed yet is signed
/// by the next notary.
async fn sign_log(notary: Notary, cancel: CancellationToken, parts: Parts) {
    if let Err(error) = notary.run(cancel).await {
        // A breach is shown as the state of the ledger.
        if !matches!(error, NotaryError::Breach(_)) {
            parts.not_ready("notary", with_causes(&error));
        }
        tracing::error!(error = with_causes(&error), "the notary ended");
    }
}

async fn follow_log(
    projections: Projections,
    log: Arc<dyn EventLog>,
    cancel: CancellationToken,
    parts: Parts,
    fail: tokio::sync::watch::Sender<Option<String>>,
) {
    if let Err(error) = runner::run(projections, log, cancel).await {
        let why = format!("the projections ended: {}", with_causes(&error));
        parts.not_ready("projection runner", why.clone());
        // A log that is not what it was leaves what was folded for people to look at.
        if matches!(&error, RunError::Read(_) | RunError::Incomplete { .. }) {
            tracing::error!(why, "what is shown stays as it was");
        } else {
            let _ = fail.send(Some(why));
        }
    }
}

/// Where sources and charts may be.
fn policy(options: &NodeOptions) -> SourcePolicy {
    if options.allow_local_sources {
        SourcePolicy::trusting()
    } else {
        SourcePolicy::default()
    }
}

fn transport(options: &NodeOptions) -> GitTransport {
    GitTransport::new(TransportConfig::with_policy(policy(options)))
}

/// The key that GitOps commits are signed with.
fn gitops_key(data: &Path, options: &NodeOptions) -> Result<SigningKey, Failure> {
    let path = options
        .gitops_key
        .clone()
        .unwrap_or_else(|| data.join(GITOPS_KEY));
    SigningKey::open_or_create(path)
        .map_err(|e| Failure::new(Code::Failure, e.code(), with_causes(&e)).hint(e.remedy()))
}

/// Builders for whatever a service asks for.
fn builder(scratch: &Path, images: &Arc<Images>) -> BuiltImages {
    BuiltImages::new(
        Arc::new(AnyBuilder::new(
            ArchiveBuilder::new(images.clone(), scratch.to_owned()),
            DockerfileBuilder::new(scratch.to_owned()),
        )),
        images.clone(),
    )
}

fn open_images(data: &Path) -> Result<Arc<Images>, Failure> {
    let unusable = |e: daybook_workers::image::ImageError| {
        Failure::new(Code::Failure, "images_unusable", with_causes(&e))
            .hint("check the folder `images` in the data folder")
    };
    let local =
        LayoutStore::open(data.join("images"), UnpackLimits::default()).map_err(unusable)?;
    let cache = Layout::open(data.join("image-cache")).map_err(unusable)?;
    let registries = RegistryStore::new(cache, RegistryOptions::default());
    Ok(Arc::new(Images::new(local, registries)))
}

/// Looks after a cluster as soon as no other process does.
#[allow(clippy::too_many_arguments)]
async fn look_after(
    root: PathBuf,
    name: ClusterName,
    images: Arc<Images>,
    lines: Arc<dyn LineLog>,
    secrets: Arc<dyn SecretStore>,
    crew: Arc<Crew>,
    repositories: Arc<dyn ports::Repositories>,
    held: Arc<std::sync::Mutex<Vec<Arc<LocalCluster>>>>,
    parts: Parts,
    cancel: CancellationToken,
    foundations: CancellationToken,
) {
    let part = format!("cluster {name}");
    loop {
        let mut options = LocalOptions::new(
            root.join(name.as_str()),
            name.clone(),
            images.clone(),
            lines.clone(),
            foundations.clone(),
        );
        options.secrets = secrets.clone();
        match LocalCluster::open(options).await {
            Ok(cluster) => {
                let cluster = Arc::new(cluster);
                if let Ok(mut held) = held.lock() {
                    held.push(cluster.clone());
                }
                crew.sync(repositories, cluster);
                parts.ready(&part);
                return;
            }
            Err(error) => {
                tracing::debug!(cluster = %name, %error, "not looked after by this process");
                parts.not_ready(&part, with_causes(&error));
            }
        }
        tokio::select! {
            () = cancel.cancelled() => return,
            () = tokio::time::sleep(Duration::from_millis(500)) => {}
        }
    }
}

fn host() -> String {
    rustix::system::uname()
        .nodename()
        .to_str()
        .unwrap_or("localhost")
        .to_owned()
}
