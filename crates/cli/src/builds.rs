//! Where a node makes images: on its machine, or in a Kubernetes cluster.

use std::sync::Arc;
use std::time::Duration;

use daybook_api::Parts;
use daybook_events::{BuildId, with_causes};
use daybook_kubernetes::builds::{BuildOptions, ClusterBuilds, Tool};
use daybook_kubernetes::connect;
use daybook_projections::Projections;
use daybook_workers::image::store::ImageStore;
use daybook_workers::ports::Images;
use tokio_util::sync::CancellationToken;

use crate::exit::{Code, Failure};
use crate::kubernetes::{Context, Kubernetes};

/// How often it is looked for Jobs whose builds are over.
const SWEEP: Duration = Duration::from_secs(30);

/// What makes images.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, clap::ValueEnum)]
pub enum BuilderName {
    /// This machine: archives, and Dockerfiles with buildah, podman or docker.
    #[default]
    Local,
    /// Jobs in a cluster with BuildKit, not as root.
    Buildkit,
    /// Jobs in a cluster with Kaniko.
    Kaniko,
}

/// Where and how images are made.
#[derive(Debug, Clone, Default, clap::Args)]
pub struct BuildArgs {
    /// What makes images: this machine, or a Job a build in a Kubernetes cluster, which fetches the
    /// commit and pushes the image itself. What a service asks of the archive builder is made on
    /// this machine in any case.
    #[arg(long, env = "DAYBOOK_BUILDER", value_enum, default_value_t)]
    pub builder: BuilderName,
    /// The cluster of the builds: one of --kubernetes, or a context of the kubeconfig. The one of
    /// --kubernetes if there is only one.
    #[arg(long, env = "DAYBOOK_BUILD_CLUSTER", value_name = "NAME[=CONTEXT]")]
    pub build_cluster: Option<Context>,
    /// The namespace of the builds there, which has to exist: `daybook-builds` if not given.
    #[arg(long, env = "DAYBOOK_BUILD_NAMESPACE", value_name = "NAME")]
    pub build_namespace: Option<String>,
    /// A Secret there of the type kubernetes.io/dockerconfigjson: whom registries know builds by.
    #[arg(long, env = "DAYBOOK_BUILD_REGISTRY_SECRET", value_name = "NAME")]
    pub build_registry_secret: Option<String>,
    /// A Secret there whose key `credentials` has lines such as `https://user:token@host`, for
    /// sources that ask for them. Only the container that fetches the source sees it.
    #[arg(long, env = "DAYBOOK_BUILD_GIT_SECRET", value_name = "NAME")]
    pub build_git_secret: Option<String>,
    /// The image of BuildKit or Kaniko.
    #[arg(long, env = "DAYBOOK_BUILD_IMAGE", value_name = "IMAGE")]
    pub build_image: Option<String>,
    /// An image with git and a shell that fetches the source; BuildKit's if not given.
    #[arg(long, env = "DAYBOOK_BUILD_SOURCE_IMAGE", value_name = "IMAGE")]
    pub build_source_image: Option<String>,
    /// The image of railpack, which plans builds without a Dockerfile for BuildKit.
    #[arg(long, env = "DAYBOOK_BUILD_RAILPACK_IMAGE", value_name = "IMAGE")]
    pub build_railpack_image: Option<String>,
    /// The memory that a build in a cluster may use: 4Gi if not given.
    #[arg(long, env = "DAYBOOK_BUILD_MEMORY", value_name = "QUANTITY")]
    pub build_memory: Option<String>,
    /// The CPU that a build in a cluster asks for: 500m if not given.
    #[arg(long, env = "DAYBOOK_BUILD_CPU", value_name = "QUANTITY")]
    pub build_cpu: Option<String>,
    /// How long a build in a cluster may take, in seconds: an hour if not given.
    #[arg(long, env = "DAYBOOK_BUILD_DEADLINE", value_name = "SECONDS", value_parser = clap::value_parser!(u64).range(1..=86_400))]
    pub build_deadline: Option<u64>,
    /// How long something, such as an image that cannot be pulled, may keep a build in a cluster
    /// from beginning before it has failed, in seconds: five minutes if not given.
    #[arg(long, env = "DAYBOOK_BUILD_START_WITHIN", value_name = "SECONDS", value_parser = clap::value_parser!(u64).range(1..=86_400))]
    pub build_start_within: Option<u64>,
}

impl BuildArgs {
    /// The builds in a cluster, if images are made in one. Its API server is not asked yet.
    pub async fn in_cluster(
        &self,
        kubernetes: &Kubernetes,
        uploads: Option<&str>,
        here: Arc<dyn Images>,
        store: Arc<dyn ImageStore>,
    ) -> Result<Option<Arc<ClusterBuilds>>, Failure> {
        let tool = match self.builder {
            BuilderName::Local => return Ok(None),
            BuilderName::Buildkit => Tool::BuildKit,
            BuilderName::Kaniko => Tool::Kaniko,
        };
        let context = self.context(kubernetes)?;
        let client = connect(kubernetes.kubeconfig.as_deref(), &context.context).await;
        let client = client.map_err(|e| {
            Failure::new(Code::Failure, "build_cluster_unusable", with_causes(&e)).hint(format!(
                "check the context {} of the kubeconfig, or name another with --build-cluster",
                context.context
            ))
        })?;
        let namespace = self.build_namespace.as_deref().unwrap_or("daybook-builds");
        let mut options = BuildOptions::new(context.name, client, namespace, tool);
        options.registry_secret = self.build_registry_secret.clone();
        options.git_secret = self.build_git_secret.clone();
        options.uploads = uploads.map(str::to_owned);
        let given = [
            (&self.build_image, &mut options.image),
            (&self.build_source_image, &mut options.source_image),
            (&self.build_railpack_image, &mut options.railpack_image),
            (&self.build_memory, &mut options.memory),
            (&self.build_cpu, &mut options.cpu),
        ];
        for (given, option) in given {
            if let Some(given) = given {
                option.clone_from(given);
            }
        }
        if let Some(seconds) = self.build_deadline {
            options.deadline = Duration::from_secs(seconds);
        }
        if let Some(seconds) = self.build_start_within {
            options.start_within = Duration::from_secs(seconds);
        }
        Ok(Some(Arc::new(ClusterBuilds::new(options, here, store))))
    }

    /// The cluster of the builds.
    fn context(&self, kubernetes: &Kubernetes) -> Result<Context, Failure> {
        let clusters = &kubernetes.contexts;
        match (&self.build_cluster, clusters.as_slice()) {
            (Some(named), _) => {
                let of_that_name = clusters.iter().find(|c| c.name == named.name);
                let is_bare = named.context == named.name.as_str();
                Ok(of_that_name.filter(|_| is_bare).unwrap_or(named).clone())
            }
            (None, [only]) => Ok(only.clone()),
            (None, _) => Err(Failure::new(
                Code::Usage,
                "build_cluster_missing",
                "it is not said in which cluster images are made",
            )
            .hint("name it with --build-cluster NAME[=CONTEXT]")),
        }
    }
}

/// Deletes Jobs whose builds are over, again and again, and says in `/readyz` when that cannot be.
pub async fn sweep(
    builds: Arc<ClusterBuilds>,
    projections: Projections,
    parts: Parts,
    cancel: CancellationToken,
) {
    // What is not known, or cannot be read now, may be somebody else's.
    let is_over = move |id: BuildId, request: u32| {
        let build = projections.build(id).ok().flatten();
        build.is_some_and(|(_, build)| build.status.is_final() || build.requests > request)
    };
    loop {
        match builds.sweep(&is_over).await {
            Ok(swept) => {
                for job in swept {
                    tracing::info!(job, "deleted the Job of a build that was over");
                }
                parts.ready("builds in a cluster");
            }
            Err(error) => parts.not_ready("builds in a cluster", with_causes(&error)),
        }
        tokio::select! {
            () = cancel.cancelled() => return,
            () = tokio::time::sleep(SWEEP) => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_cluster_of_builds_is_one_of_the_targets_or_a_context_of_its_own() {
        let of = |named: Option<&str>, clusters: &[&str]| {
            let args = BuildArgs {
                build_cluster: named.map(|text| text.parse().unwrap()),
                ..BuildArgs::default()
            };
            let kubernetes = Kubernetes {
                contexts: clusters.iter().map(|c| c.parse().unwrap()).collect(),
                ..Kubernetes::default()
            };
            args.context(&kubernetes)
                .map(|c| c.context)
                .map_err(|e| e.kind)
        };
        let targets = ["oslo=admin@oslo", "bergen"];
        assert_eq!(of(None, &targets[..1]).unwrap(), "admin@oslo");
        assert_eq!(of(Some("oslo"), &targets).unwrap(), "admin@oslo");
        assert_eq!(of(Some("oslo=robot@oslo"), &targets).unwrap(), "robot@oslo");
        assert_eq!(of(Some("builders"), &targets).unwrap(), "builders");
        assert!(of(None, &targets).is_err());
        assert!(of(None, &[]).is_err());
    }
}
