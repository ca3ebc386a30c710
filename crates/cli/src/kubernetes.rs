//! Kubernetes clusters of a node: contexts of a kubeconfig.

use std::path::PathBuf;
use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;

use daybook_api::Parts;
use daybook_events::lines::LineLog;
use daybook_events::{ClusterName, with_causes};
use daybook_kubernetes::objects::GatewayRef;
use daybook_kubernetes::{ArgoCd, ClusterOptions, KubernetesCluster, connect};
use daybook_secrets::SecretStore;
use daybook_workers::crew::Crew;
use daybook_workers::gitops::Remotes;
use daybook_workers::ports::Repositories;
use tokio_util::sync::CancellationToken;

/// Between two tries to reach a cluster.
const AGAIN: Duration = Duration::from_secs(2);

/// A cluster: `NAME`, or `NAME=CONTEXT` where the context of the kubeconfig is called otherwise.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Context {
    /// Its name in the ledger.
    pub name: ClusterName,
    /// The context of the kubeconfig.
    pub context: String,
}

impl FromStr for Context {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        let (name, context) = text.split_once('=').unwrap_or((text, text));
        if context.is_empty() {
            return Err("the context after `=` is empty".to_owned());
        }
        Ok(Self {
            name: ClusterName::parse(name).map_err(|e| e.to_string())?,
            context: context.to_owned(),
        })
    }
}

/// The Gateway that releases' addresses are attached to: `[NAMESPACE/]NAME[:LISTENER]`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GatewayName(pub GatewayRef);

impl FromStr for GatewayName {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        let (rest, listener) = match text.split_once(':') {
            Some((rest, listener)) => (rest, Some(listener)),
            None => (text, None),
        };
        let (namespace, name) = match rest.split_once('/') {
            Some((namespace, name)) => (Some(namespace), name),
            None => (None, rest),
        };
        let parts = [Some(name), namespace, listener];
        let is_name = |part: &str| {
            let allowed =
                |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-' || b == b'.';
            !part.is_empty() && part.len() <= 253 && part.bytes().all(allowed)
        };
        if !parts.into_iter().flatten().all(is_name) {
            return Err("give it as [NAMESPACE/]NAME[:LISTENER]".to_owned());
        }
        Ok(Self(GatewayRef {
            name: name.to_owned(),
            namespace: namespace.map(str::to_owned),
            section_name: listener.map(str::to_owned),
        }))
    }
}

/// The Argo CD of the Kubernetes clusters, if it is to apply there.
#[derive(Debug, Clone, Default, clap::Args)]
pub struct ArgoCdArgs {
    /// Has Argo CD, which runs in this namespace of each Kubernetes cluster, apply there; Daybook
    /// does so itself without. The namespace is `argocd` if none is given.
    #[arg(
        long,
        env = "DAYBOOK_ARGOCD",
        value_name = "NAMESPACE",
        num_args = 0..=1,
        default_missing_value = "argocd"
    )]
    pub argocd: Option<String>,
    /// The AppProject of its Applications.
    #[arg(
        long,
        env = "DAYBOOK_ARGOCD_PROJECT",
        value_name = "NAME",
        default_value = "default"
    )]
    pub argocd_project: String,
    /// Where it fetches GitOps repositories that have no remote: the HTTP interface of this Daybook
    /// as clusters reach it, such as http://daybook.internal:7070/git.
    #[arg(long, env = "DAYBOOK_ARGOCD_REPOSITORIES", value_name = "URL")]
    pub argocd_repositories: Option<String>,
}

impl ArgoCdArgs {
    fn with(&self, remotes: Arc<dyn Remotes>) -> Option<ArgoCd> {
        Some(ArgoCd {
            namespace: self.argocd.clone()?,
            project: self.argocd_project.clone(),
            repositories: self.argocd_repositories.clone(),
            remotes,
        })
    }
}

/// The Kubernetes clusters of a node.
#[derive(Debug, Clone, Default)]
pub struct Kubernetes {
    /// The clusters.
    pub contexts: Vec<Context>,
    /// The kubeconfig; `$KUBECONFIG` or `~/.kube/config` if not named.
    pub kubeconfig: Option<PathBuf>,
    /// Where addresses are attached.
    pub gateway: Option<GatewayName>,
    /// The Argo CD that applies there.
    pub argocd: ArgoCdArgs,
}

/// What looking after a cluster needs.
pub struct Carer {
    pub secrets: Arc<dyn SecretStore>,
    pub lines: Arc<dyn LineLog>,
    pub crew: Arc<Crew>,
    pub repositories: Arc<dyn Repositories>,
    pub remotes: Arc<dyn Remotes>,
    pub domain: String,
    pub parts: Parts,
    pub cancel: CancellationToken,
    pub foundations: CancellationToken,
}

impl Carer {
    /// Looks after a cluster as soon as its API server answers, and says what is the matter while
    /// it does not.
    pub async fn look_after(self, options: Kubernetes, context: Context) {
        let part = format!("cluster {}", context.name);
        let gateway = options.gateway.map(|g| (g.0, self.domain.clone()));
        let argocd = options.argocd.with(self.remotes.clone());
        let cluster = loop {
            let opened = async {
                let client = connect(options.kubeconfig.as_deref(), &context.context).await?;
                KubernetesCluster::open(ClusterOptions {
                    name: context.name.clone(),
                    client,
                    secrets: self.secrets.clone(),
                    gateway: gateway.clone(),
                    argocd: argocd.clone(),
                    lines: Some(self.lines.clone()),
                    cancel: self.foundations.clone(),
                })
                .await
            };
            match opened.await {
                Ok(cluster) => break Arc::new(cluster),
                Err(error) => {
                    let why = with_causes(&error);
                    tracing::warn!(cluster = %context.name, why, "a cluster cannot be reached");
                    self.parts.not_ready(&part, why);
                }
            }
            tokio::select! {
                () = self.cancel.cancelled() => return,
                () = tokio::time::sleep(AGAIN) => {}
            }
        };
        self.crew.sync(self.repositories, cluster.clone());
        self.parts.ready(&part);
        // What keeps it from being seen shows in `/readyz`.
        let mut shown = None;
        loop {
            tokio::select! {
                () = self.cancel.cancelled() => return,
                () = tokio::time::sleep(AGAIN) => {}
            }
            let trouble = cluster.trouble();
            if trouble != shown {
                match &trouble {
                    Some(why) => self.parts.not_ready(&part, why.clone()),
                    None => self.parts.ready(&part),
                }
                shown = trouble;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cluster_is_named_and_its_context_may_be_called_otherwise() {
        let context = |text: &str| text.parse::<Context>();
        let oslo = context("oslo").unwrap();
        assert_eq!(
            (oslo.name.as_str(), oslo.context.as_str()),
            ("oslo", "oslo")
        );
        let oslo = context("oslo=admin@oslo.example.com").unwrap();
        assert_eq!(oslo.context, "admin@oslo.example.com");
        assert!(context("oslo=").is_err());
        assert!(context("Oslo").is_err());
    }

    #[test]
    fn a_gateway_may_be_in_another_namespace_and_have_listeners() {
        let gateway = |text: &str| text.parse::<GatewayName>().map(|g| g.0);
        let whole = gateway("edge/public:https").unwrap();
        assert_eq!(whole.name, "public");
        assert_eq!(whole.namespace.as_deref(), Some("edge"));
        assert_eq!(whole.section_name.as_deref(), Some("https"));
        assert_eq!(gateway("public").unwrap().namespace, None);
        for bad in ["", "/public", "edge/", "public:", "a b", "x/y/z"] {
            assert!(gateway(bad).is_err(), "{bad:?}");
        }
    }
}
