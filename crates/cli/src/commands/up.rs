//! `daybook up`: everything in one process.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use clap::Args;
use daybook_events::timer::KeepFor;
use daybook_store::tlog::NotaryOptions;

use super::Outcome;
use crate::access::{AccessArgs, Made};
use crate::builds::BuildArgs;
use crate::endpoint_checks;
use crate::exit::{Code, Failure};
use crate::gitops_remotes::GitopsRemoteArgs;
use crate::kubernetes::{ArgoCdArgs, Context, GatewayName, Kubernetes};
use crate::node::{self, Node, NodeOptions};
use crate::output;
use crate::telemetry::OtlpArgs;
use crate::uploads::UploadArgs;

/// So many seconds at least output is kept.
const LINES_KEPT_MIN: u32 = 48 * 3600;

/// Options of a process that runs roles.
#[derive(Debug, Args)]
pub struct NodeArgs {
    /// Where everything is kept.
    #[arg(long, env = "DAYBOOK_DATA", value_name = "DIR")]
    pub data: Option<PathBuf>,
    /// Where the values of secrets are kept, encrypted; `secrets` in the data folder if not given.
    /// Processes that share projects need the same folder.
    #[arg(long, env = "DAYBOOK_SECRETS", value_name = "DIR")]
    pub secrets: Option<PathBuf>,
    /// The key file of the secrets, made when the first one is set; `key` in their folder if not
    /// given.
    #[arg(long, env = "DAYBOOK_SECRETS_KEY", value_name = "FILE")]
    pub secrets_key: Option<PathBuf>,
    /// Where the HTTP interface listens.
    #[arg(
        long,
        env = "DAYBOOK_LISTEN",
        value_name = "ADDR",
        default_value = "127.0.0.1:7070"
    )]
    pub listen: SocketAddr,
    /// Where `/healthz`, `/readyz` and `/metrics` are served, and nothing else: for processes without
    /// the role `api`. Elsewhere than on loopback, `/metrics` takes a token, as it does in the HTTP
    /// interface.
    #[arg(long, env = "DAYBOOK_OPERATIONS_LISTEN", value_name = "ADDR")]
    pub operations_listen: Option<SocketAddr>,
    /// Where the gateway listens, which serves the deployments by host name.
    #[arg(
        long,
        env = "DAYBOOK_GATEWAY",
        value_name = "ADDR",
        default_value = "127.0.0.1:7080"
    )]
    pub gateway: SocketAddr,
    /// A name in `Host` headers that the HTTP interface answers to, beside localhost and its
    /// addresses; may be given several times. Requests that name another host are refused, so
    /// that no web page reaches it through a name of its own.
    #[arg(long = "host", env = "DAYBOOK_HOSTS", value_name = "NAME", value_delimiter = ',', value_parser = host_name)]
    pub hosts: Vec<String>,
    /// What the deployments' host names end in.
    #[arg(
        long,
        env = "DAYBOOK_DOMAIN",
        value_name = "NAME",
        default_value = "localhost"
    )]
    pub domain: String,
    /// A cluster of processes on this machine; may be given several times. If neither this nor
    /// --kubernetes is given there are two, local-a and local-b.
    #[arg(long = "local-cluster", value_name = "NAME")]
    pub clusters: Vec<String>,
    /// A Kubernetes cluster: a context of the kubeconfig, under a name of its own or with
    /// `NAME=CONTEXT`; may be given several times.
    #[arg(
        long = "kubernetes",
        env = "DAYBOOK_KUBERNETES",
        value_name = "NAME[=CONTEXT]",
        value_delimiter = ','
    )]
    pub kubernetes: Vec<Context>,
    /// The kubeconfig; if not given, the files of $KUBECONFIG, or ~/.kube/config.
    #[arg(long, value_name = "FILE")]
    pub kubeconfig: Option<PathBuf>,
    /// The Gateway that addresses on Kubernetes clusters are attached to; none are made without.
    #[arg(
        long,
        env = "DAYBOOK_KUBERNETES_GATEWAY",
        value_name = "[NAMESPACE/]NAME[:LISTENER]"
    )]
    pub kubernetes_gateway: Option<GatewayName>,
    #[command(flatten)]
    pub access: AccessArgs,
    #[command(flatten)]
    pub argocd: ArgoCdArgs,
    #[command(flatten)]
    pub build: BuildArgs,
    /// Where images go whose services name no repository: `host[:port]/path`. Kept in the data
    /// folder if not given.
    #[arg(long, env = "DAYBOOK_IMAGE_PREFIX", value_name = "PREFIX")]
    pub image_prefix: Option<String>,
    /// How many builds run at once.
    #[arg(long, default_value_t = 2, value_name = "N", value_parser = clap::value_parser!(u8).range(1..=64))]
    pub builds: u8,
    /// How long a deployment is kept running that is no longer the main one of its service, for
    /// environments that do not say so themselves: 45s, 30m, 24h, 7d or `never` to stop it.
    #[arg(long, env = "DAYBOOK_KEEP_OLD", default_value_t = KeepFor::OLD, value_name = "TIME")]
    pub keep_old: KeepFor,
    /// How long output of builds and instances is kept: 48h to 365d, or `never` for without an end; 30d
    /// if not given. A stream on NATS that is there is only changed if this is given.
    #[arg(long, env = "DAYBOOK_LINES_KEEP", value_name = "TIME", value_parser = lines_keep)]
    pub lines_keep: Option<KeepFor>,
    /// How many MiB of output are kept; 1024 if not given. The oldest goes first.
    #[arg(long, env = "DAYBOOK_LINES_MAX_MIB", value_name = "N", value_parser = clap::value_parser!(u64).range(16..=1_048_576))]
    pub lines_max_mib: Option<u64>,
    /// A folder with templates of your own, beside those that come with Daybook. It is read at the
    /// start.
    #[arg(long, env = "DAYBOOK_TEMPLATES", value_name = "DIR")]
    pub templates: Option<PathBuf>,
    /// Where the signed tree over the ledger is published, for auditors: `tlog` in the data folder
    /// if not given. Best on another disk than the log, as it is what a damaged log is noticed by
    /// and mended from.
    #[arg(long, env = "DAYBOOK_TLOG", value_name = "DIR")]
    pub tlog: Option<PathBuf>,
    /// The signed tree as a server on another machine publishes it, such as
    /// `https://daybook.example.com/tlog`: for processes that neither run the notary nor share its
    /// folder. Without it they append whatever that notary finds, and their GitOps commits do not
    /// name the ledger.
    #[arg(
        long,
        env = "DAYBOOK_TLOG_URL",
        value_name = "URL",
        conflicts_with = "tlog"
    )]
    pub tlog_url: Option<String>,
    /// The folder with the keys that the ledger is signed with: `keys/ledger` in the data folder
    /// if not given. Made at the first start.
    #[arg(long, env = "DAYBOOK_TLOG_KEYS", value_name = "DIR")]
    pub tlog_keys: Option<PathBuf>,
    /// The ledger's name for auditors, used when its first key is made: the address under which it
    /// is published, without scheme, such as `daybook.example.com/tlog`. A name of its own under
    /// localhost if not given.
    #[arg(long, env = "DAYBOOK_ORIGIN", value_name = "NAME")]
    pub origin: Option<String>,
    /// How many old events a second the notary compares with what was signed, over and over. A
    /// changed byte in the middle of a ledger of a million events is found within 17 minutes at
    /// 1000.
    #[arg(long, env = "DAYBOOK_SWEEP_RATE", default_value_t = NotaryOptions::default().sweep_rate, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    pub sweep_rate: u32,
    /// The key that GitOps commits are signed with, in OpenSSH's form; `keys/gitops` in the data
    /// folder if not given. Processes that commit on several machines share one.
    #[arg(long, env = "DAYBOOK_GITOPS_KEY", value_name = "FILE")]
    pub gitops_key: Option<PathBuf>,
    /// How often GitOps repositories are looked over for commits that Daybook did not make.
    #[arg(long, default_value_t = 15, value_name = "SECONDS", value_parser = clap::value_parser!(u64).range(1..=3600))]
    pub gitops_watch: u64,
    #[command(flatten)]
    pub gitops_remotes: GitopsRemoteArgs,
    #[command(flatten)]
    pub uploads: UploadArgs,
    /// Which addresses are looked at from where users are, and how: a file that docs/operating.md
    /// describes. Processes that look at the same ones need the same file.
    #[arg(long, env = "DAYBOOK_ENDPOINT_CHECKS", value_name = "FILE")]
    pub endpoint_checks: Option<PathBuf>,
    #[command(flatten)]
    pub otlp: OtlpArgs,
    /// Credentials file for NATS.
    #[arg(long, env = "DAYBOOK_NATS_CREDS", value_name = "FILE")]
    pub nats_creds: Option<PathBuf>,
    /// The stream of the log on NATS. It has another name after a repair.
    #[arg(
        long,
        env = "DAYBOOK_NATS_STREAM",
        default_value = "DAYBOOK",
        value_name = "NAME"
    )]
    pub nats_stream: String,
    /// Copies of the log in a NATS cluster.
    #[arg(long, default_value_t = 1, value_name = "N", value_parser = clap::value_parser!(u8).range(1..=5))]
    pub nats_replicas: u8,
    /// Source repositories may be paths on this machine, and they and Helm charts may be at private
    /// addresses. On by default while this process listens on loopback only.
    #[arg(long, env = "DAYBOOK_ALLOW_LOCAL_SOURCES")]
    pub allow_local_sources: Option<bool>,
    /// Webhooks may go to private addresses and to loopback, and without TLS.
    #[arg(long, env = "DAYBOOK_ALLOW_PRIVATE_WEBHOOKS")]
    pub allow_private_webhooks: bool,
}

fn host_name(text: &str) -> Result<String, String> {
    daybook_events::Hostname::parse(text)
        .map(|name| name.to_string())
        .map_err(|e| e.to_string())
}

/// Reads for how long output is kept. The records of deliveries to webhooks are among it, and it may
/// take a day until the ledger itself has what they say.
fn lines_keep(text: &str) -> Result<KeepFor, String> {
    let keep: KeepFor = text.parse().map_err(|e| format!("{e}"))?;
    match keep {
        KeepFor::Seconds(seconds) if seconds < LINES_KEPT_MIN => Err(
            "it must be 48h or more: with less, what was delivered to webhooks could be forgotten \
             before the ledger has it, and be sent again"
                .to_owned(),
        ),
        keep => Ok(keep),
    }
}

/// The data folder: the one that was named, or the usual one.
pub fn data_dir(named: Option<&PathBuf>) -> Result<PathBuf, Failure> {
    if let Some(dir) = named {
        return Ok(dir.clone());
    }
    let base = std::env::var_os("XDG_DATA_HOME")
        .map(PathBuf::from)
        .or_else(|| std::env::var_os("HOME").map(|h| PathBuf::from(h).join(".local/share")));
    base.map(|b| b.join("daybook")).ok_or_else(|| {
        Failure::new(
            Code::Usage,
            "data_missing",
            "there is no home folder to keep data in",
        )
        .hint("name a folder with --data DIR")
    })
}

impl NodeArgs {
    /// The options of the node.
    pub fn options(&self) -> Result<NodeOptions, Failure> {
        let mut options = NodeOptions::everything(data_dir(self.data.as_ref())?);
        options.secrets = self.secrets.clone();
        options.secrets_key = self.secrets_key.clone();
        options.listen = self.listen;
        options.gateway = self.gateway;
        options.access = self.access.check(self.listen)?;
        options.operations = match self.operations_listen {
            Some(listen) => Some((listen, self.access.check_operations(listen)?)),
            None => None,
        };
        options.hosts = self.hosts.clone();
        options.domain = self.domain.clone();
        if !(self.clusters.is_empty() && self.kubernetes.is_empty()) {
            options.clusters = self.clusters.clone();
        }
        options.kubernetes = Kubernetes {
            contexts: self.kubernetes.clone(),
            kubeconfig: self.kubeconfig.clone(),
            gateway: self.kubernetes_gateway.clone(),
            argocd: self.argocd.clone(),
        };
        options.image_prefix = self.image_prefix.clone();
        options.builds = self.builds.into();
        options.build = self.build.clone();
        options.keep_old = self.keep_old;
        options.lines_keep = self.lines_keep;
        options.lines_max = self.lines_max_mib.map(|mib| mib << 20);
        options.templates = self.templates.clone();
        options.tlog = self.tlog.clone();
        options.tlog_url = self.tlog_url.clone();
        options.tlog_keys = self.tlog_keys.clone();
        options.origin = self.origin.clone();
        options.sweep_rate = self.sweep_rate;
        options.gitops_key = self.gitops_key.clone();
        options.gitops_watch = Duration::from_secs(self.gitops_watch);
        options.gitops_remotes = self.gitops_remotes.clone();
        options.uploads = self.uploads.clone();
        let checks = self.endpoint_checks.as_deref();
        options.endpoint_checks = checks.map(endpoint_checks::read).transpose()?;
        options.collector = self.otlp.collector()?;
        options.nats_creds = self.nats_creds.clone();
        options.nats_stream = self.nats_stream.clone();
        options.nats_replicas = self.nats_replicas.into();
        options.allow_local_sources = self
            .allow_local_sources
            .unwrap_or_else(|| self.is_on_loopback());
        options.allow_private_webhooks = self.allow_private_webhooks;
        Ok(options)
    }

    /// Whether nothing of this process can be reached from another machine, but for the gateway.
    fn is_on_loopback(&self) -> bool {
        let mut listens = [Some(self.listen), self.operations_listen]
            .into_iter()
            .flatten();
        listens.all(|address| address.ip().is_loopback())
    }
}

/// Run everything in one process: the HTTP interface, all workers, two clusters of processes on
/// this machine, and the gateway.
///
/// The log is embedded, in the data folder, unless --nats names a server. It listens on loopback
/// and asks nobody for a token, unless --auth or --listen says otherwise: whoever can reach it can
/// deploy. The clusters isolate
/// nothing: deployments run as ordinary processes of the user who runs this.
#[derive(Debug, Args)]
pub struct UpArgs {
    #[command(flatten)]
    node: NodeArgs,
    /// Use this NATS server for the log instead of the embedded one.
    #[arg(long, env = "DAYBOOK_NATS", hide_env_values = true, value_name = "URL")]
    nats: Option<String>,
    /// Leave the deployments' processes running at the end; the next `up` takes them over.
    #[arg(long)]
    leave_running: bool,
}

pub async fn run(args: UpArgs) -> Outcome {
    let mut options = args.node.options()?;
    options.nats = args.nats.clone();
    let node = Node::start(options).await?;
    announce(&node);
    let ended = node::until_signal(&node).await;
    if !output::is_json() {
        output::line("stopping …");
    }
    node.shutdown(!args.leave_running).await;
    ended.map(|()| Code::Success)
}

/// Says what runs and where, once it is ready.
pub fn announce(node: &Node) {
    if output::is_json() {
        output::json(&node.facts());
        return;
    }
    let style = output::style();
    output::line(&format!(
        "{} {}",
        style.bold("Daybook is up"),
        style.dim(&format!("(roles: {})", node.roles()))
    ));
    if let Some(url) = node.listening() {
        output::line(&format!(
            "  HTTP interface  {url}  ({})",
            node.access_line()
        ));
    }
    if let Some(url) = node.operations() {
        output::line(&format!("  operations      {url}/readyz, {url}/metrics"));
    }
    match node.made_token() {
        None => {}
        Some(Made::Shown(token)) => output::line(&format!(
            "  admin token     {}  (may do everything; shown this once: keep it with `daybook login`)",
            *token.reveal()
        )),
        Some(Made::Written(file)) => output::line(&format!(
            "  admin token     in {}  (may do everything: keep it with `daybook login`)",
            file.display()
        )),
    }
    if let Some(url) = node.gateway_url() {
        output::line(&format!(
            "  gateway         {url}  (by host name: http://SERVICE.PROJECT.{}:…)",
            node.domain()
        ));
    }
    output::line(&format!("  log             {}", node.log_line()));
    if let Some(ledger) = node.ledger_line() {
        output::line(&format!("  ledger          {ledger}"));
    }
    output::line(&format!("  data            {}", node.data().display()));
    if !node.clusters().is_empty() {
        output::line(&format!(
            "  clusters        {}  (processes of this user; nothing isolates them)",
            node.clusters().join(", ")
        ));
    }
    if !node.kubernetes().is_empty() {
        output::line(&format!(
            "  Kubernetes      {}",
            node.kubernetes().join(", ")
        ));
    }
    for warning in node.warnings() {
        output::line(&format!("  {} {warning}", style.warn("warning:")));
    }
}

/// What is served.
#[derive(Debug, Args)]
pub struct StaticServerArgs {
    /// The folder.
    dir: PathBuf,
    /// The port; $PORT if not given.
    #[arg(long, env = "PORT")]
    port: u16,
}

pub async fn static_server(args: StaticServerArgs) -> Outcome {
    daybook_workers::local::static_server::run(&args.dir, args.port).await?;
    Ok(Code::Success)
}
