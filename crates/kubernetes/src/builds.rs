//! Builds in a cluster: one Job a build, with BuildKit or Kaniko, which pushes the image itself.
//!
//! The Job's name comes from the build and from how often that was asked for, so that a worker that
//! takes a build over finds the Job of the one before and follows it instead of making another.
//! The source is fetched by an init container at the exact commit; the credentials of the source and
//! those of the registry are Secrets of the namespace, each of which only the container that needs it
//! sees. What is made carries labels, and nothing without them is touched.

mod follow;
mod job;
mod printer;

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use async_trait::async_trait;
use daybook_events::spec::{BuilderKind, ImageReference, PinnedImage};
use daybook_events::{BuildId, ClusterName, ImageRepository, ImageTag, RepositoryUrl};
use daybook_workers::builder::dockerfile_within;
use daybook_workers::image::store::{ImageStore, is_local};
use daybook_workers::ports::{BuildInput, BuiltImage, Images, Output, StepError};
use daybook_workers::source::address_of_uploads;
use daybook_workers::target::TargetError;
use k8s_openapi::api::batch::v1::Job;
use k8s_openapi::api::core::v1::Pod;
use kube::api::{DeleteParams, ListParams, PostParams, Preconditions, PropagationPolicy};
use kube::{Api, Client, ResourceExt};
use tokio_util::sync::CancellationToken;

use crate::apply::timely;
use crate::error::refusal;
use crate::names::{MANAGED_BY, MANAGER};

/// The build that a Job and its pods are of.
pub const BUILD: &str = "daybook.dev/build";
/// How often that build had been asked for.
pub const REQUEST: &str = "daybook.dev/build-request";

/// The image of BuildKit. It has git and a shell, which fetches the source for Kaniko as well.
pub const BUILDKIT: &str = "docker.io/moby/buildkit:v0.32.2-rootless";
/// The image of Kaniko: of the fork that is maintained since the original was archived.
pub const KANIKO: &str = "ghcr.io/osscontainertools/kaniko:v1.28.3";
/// The image of railpack: the frontend for BuildKit, and the program that makes the plan.
pub const RAILPACK: &str = "ghcr.io/railwayapp/railpack-frontend:v0.37.0";

/// How long it is waited for a Job that is being deleted to be gone.
const GONE_WITHIN: Duration = Duration::from_secs(60);
/// Between two looks at it, and between two tries to delete one.
const LOOK_AGAIN: Duration = Duration::from_millis(500);
/// So often it is tried to delete a Job; then it is left to the next sweep.
const DELETE_TRIES: u32 = 5;

/// What makes images in a cluster.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Tool {
    /// BuildKit, as another user than root. Plans builds without a Dockerfile with railpack.
    BuildKit,
    /// Kaniko: as root in its container, without any privilege.
    Kaniko,
}

impl Tool {
    /// Its name, as it is recorded.
    pub fn name(self) -> &'static str {
        match self {
            Self::BuildKit => "buildkit",
            Self::Kaniko => "kaniko",
        }
    }
}

impl fmt::Display for Tool {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::BuildKit => "BuildKit",
            Self::Kaniko => "Kaniko",
        })
    }
}

/// Where and how images are made in a cluster.
#[derive(Clone)]
pub struct BuildOptions {
    /// Its name, for people.
    pub cluster: ClusterName,
    /// How its API server is reached.
    pub client: Client,
    /// The namespace of the Jobs. It has to be there.
    pub namespace: String,
    /// What makes the images.
    pub tool: Tool,
    /// Its image.
    pub image: String,
    /// The image with git and a shell that fetches the source.
    pub source_image: String,
    /// The image of railpack.
    pub railpack_image: String,
    /// A Secret of the type `kubernetes.io/dockerconfigjson`: whom registries know it by.
    pub registry_secret: Option<String>,
    /// A Secret whose key `credentials` has lines as `git credential-store` keeps them.
    pub git_secret: Option<String>,
    /// The HTTP interface of Daybook as the cluster reaches it, for sources that were uploaded.
    pub uploads: Option<String>,
    /// The memory that a build may use, as a quantity of Kubernetes.
    pub memory: String,
    /// The CPU that a build asks for, as a quantity of Kubernetes.
    pub cpu: String,
    /// How long a build may take. Kubernetes ends it then.
    pub deadline: Duration,
    /// How long something may keep a build from beginning before it has failed of that.
    pub start_within: Duration,
    /// How long a Job that has ended is kept. Kubernetes removes it then.
    pub keep: Duration,
}

impl BuildOptions {
    /// With the images that are known to work, one hour for a build, 4 GiB of memory for it, and five
    /// minutes for it to begin.
    pub fn new(cluster: ClusterName, client: Client, namespace: &str, tool: Tool) -> Self {
        Self {
            cluster,
            client,
            namespace: namespace.to_owned(),
            tool,
            image: match tool {
                Tool::BuildKit => BUILDKIT.to_owned(),
                Tool::Kaniko => KANIKO.to_owned(),
            },
            source_image: BUILDKIT.to_owned(),
            railpack_image: RAILPACK.to_owned(),
            registry_secret: None,
            git_secret: None,
            uploads: None,
            memory: "4Gi".to_owned(),
            cpu: "500m".to_owned(),
            deadline: Duration::from_secs(3600),
            start_within: Duration::from_secs(300),
            keep: Duration::from_secs(3600),
        }
    }
}

/// Makes images in a cluster, and on this machine what is asked for in the archive builder's terms.
pub struct ClusterBuilds {
    options: BuildOptions,
    here: Arc<dyn Images>,
    store: Arc<dyn ImageStore>,
}

impl fmt::Debug for ClusterBuilds {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ClusterBuilds")
            .field("cluster", &self.options.cluster)
            .field("namespace", &self.options.namespace)
            .field("tool", &self.options.tool)
            .finish_non_exhaustive()
    }
}

/// A Job that exists.
struct Made {
    name: String,
    uid: String,
}

impl ClusterBuilds {
    /// Builds in a cluster. `here` makes what needs no cluster; `store` is asked about images.
    pub fn new(options: BuildOptions, here: Arc<dyn Images>, store: Arc<dyn ImageStore>) -> Self {
        Self {
            options,
            here,
            store,
        }
    }

    /// Deletes Jobs whose builds are over although they still run: their worker was lost before it
    /// could. `is_over` says so of a build and of how often it had been asked for; what it does not
    /// know is not over. Jobs of others are left alone. Returns the names of the deleted ones.
    ///
    /// # Errors
    /// If the API server does not answer, or refuses.
    pub async fn sweep(
        &self,
        is_over: &(dyn Fn(BuildId, u32) -> bool + Send + Sync),
    ) -> Result<Vec<String>, TargetError> {
        let what = format!("the Jobs of namespace {}", self.options.namespace);
        let ours = ListParams::default().labels(&format!("{MANAGED_BY}={MANAGER},{BUILD}"));
        let found = timely(&what, self.jobs().list(&ours)).await?;
        let found = found.map_err(|e| refusal(&what, &e))?;
        let mut swept = Vec::new();
        for job in found {
            let label = |name: &str| job.labels().get(name).map(String::as_str);
            let id: Option<BuildId> = label(BUILD).and_then(|text| text.parse().ok());
            let request: Option<u32> = label(REQUEST).and_then(|text| text.parse().ok());
            let (Some(id), Some(request), Some(uid)) = (id, request, job.uid()) else {
                continue;
            };
            let is_going = job.metadata.deletion_timestamp.is_some();
            if is_going || follow::finished(&job).is_some() || !is_over(id, request) {
                continue;
            }
            let name = job.name_any();
            self.delete(&Made {
                name: name.clone(),
                uid,
            })
            .await?;
            swept.push(name);
        }
        Ok(swept)
    }

    /// The Job that a build is handed to the API server as.
    ///
    /// # Errors
    /// If it cannot be built in a cluster.
    pub fn job(&self, input: &BuildInput<'_>) -> Result<Job, StepError> {
        self.wanted(input).map(|(job, _)| job)
    }

    fn jobs(&self) -> Api<Job> {
        Api::namespaced(self.options.client.clone(), &self.options.namespace)
    }

    fn pods(&self) -> Api<Pod> {
        Api::namespaced(self.options.client.clone(), &self.options.namespace)
    }

    /// Makes the Job, or finds the one that was made for the same request.
    async fn ensure(&self, wanted: &Job, output: &Output) -> Result<Made, StepError> {
        let name = wanted.name_any();
        let what = format!("Job {name} in namespace {}", self.options.namespace);
        let since = Instant::now();
        let is_ours = |found: &Job| {
            [MANAGED_BY, BUILD, REQUEST]
                .iter()
                .all(|label| found.labels().get(*label) == wanted.labels().get(*label))
        };
        loop {
            let params = PostParams {
                field_manager: Some(MANAGER.to_owned()),
                ..PostParams::default()
            };
            let made = timely(&what, self.jobs().create(&params, wanted)).await;
            let text = match made.map_err(unavailable)? {
                Ok(made) => {
                    let uid = made.uid().unwrap_or_default();
                    say(output, format!("made {what}")).await;
                    return Ok(Made { name, uid });
                }
                Err(kube::Error::Api(status)) if status.reason == "AlreadyExists" => {
                    format!("{what} is still being deleted")
                }
                Err(error) => return Err(refused(&what, &error)),
            };
            let found = timely(&what, self.jobs().get_opt(&name)).await;
            match found
                .map_err(unavailable)?
                .map_err(|e| refused(&what, &e))?
            {
                Some(found) if !is_ours(&found) => {
                    return Err(StepError::fatal(
                        "build_job_foreign",
                        format!("{what} exists and is not Daybook's"),
                        "Delete it, or give builds a namespace of their own: --build-namespace.",
                    ));
                }
                Some(found) if found.metadata.deletion_timestamp.is_none() => {
                    let said =
                        format!("{what} is there already; what it printed, from the beginning:");
                    say(output, said).await;
                    let uid = found.uid().unwrap_or_default();
                    return Ok(Made { name, uid });
                }
                Some(_) if since.elapsed() > GONE_WITHIN => {
                    return Err(unavailable(TargetError::Unavailable(text)));
                }
                _ => tokio::time::sleep(LOOK_AGAIN).await,
            }
        }
    }

    /// Deletes a Job with its pods. That it is gone already is as good.
    async fn delete(&self, made: &Made) -> Result<(), TargetError> {
        let what = format!("Job {}", made.name);
        let params = DeleteParams {
            propagation_policy: Some(PropagationPolicy::Foreground),
            // This one, and not one that was made under its name since.
            preconditions: Some(Preconditions {
                uid: Some(made.uid.clone()),
                resource_version: None,
            }),
            ..DeleteParams::default()
        };
        match timely(&what, self.jobs().delete(&made.name, &params)).await? {
            Ok(_) => Ok(()),
            Err(kube::Error::Api(status)) if matches!(status.code, 404 | 409) => Ok(()),
            Err(error) => Err(refusal(&what, &error)),
        }
    }

    /// Deletes a Job however often that takes; if it cannot be done, the next sweep does.
    async fn end(&self, made: &Made, output: &Output) {
        for _ in 0..DELETE_TRIES {
            match self.delete(made).await {
                Ok(()) => {
                    say(output, format!("deleted Job {}", made.name)).await;
                    return;
                }
                Err(TargetError::Refused(why)) => {
                    tracing::warn!(job = made.name, why, "the Job of a build cannot be deleted");
                    say(output, format!("the Job stays: {why}")).await;
                    return;
                }
                Err(TargetError::Unavailable(why)) => {
                    tracing::warn!(
                        job = made.name,
                        why,
                        "the Job of a build is not deleted yet"
                    );
                }
            }
            tokio::time::sleep(LOOK_AGAIN).await;
        }
    }

    /// What the Job is to be, or why there cannot be one.
    fn wanted(&self, input: &BuildInput<'_>) -> Result<(Job, &'static str), StepError> {
        let source = dockerfile_within(input.checkout, input.path, input.spec)?;
        let dockerfile = match source {
            Some(dockerfile) => Some(dockerfile),
            None if input.spec.builder == BuilderKind::Dockerfile => {
                return Err(no_dockerfile(
                    "Add the Dockerfile, or correct its path in the service.",
                ));
            }
            None if self.options.tool == Tool::Kaniko => {
                return Err(no_dockerfile(
                    "Add a Dockerfile, choose the archive builder for the service, or start Daybook \
                     with --builder buildkit, which plans such builds with railpack.",
                ));
            }
            None => None,
        };
        if is_local(input.repository) {
            return Err(StepError::fatal(
                "image_not_pushable",
                format!("no cluster can push to {}", input.repository),
                "Start Daybook with --image-prefix HOST/PATH, a registry that the cluster reaches, \
                 or give the service a repository there.",
            ));
        }
        let source = self.source(input.url)?;
        let url = source.as_str();
        if !(url.starts_with("https://") || url.starts_with("http://")) {
            return Err(StepError::fatal(
                "source_not_in_reach",
                format!("a build in a cluster cannot fetch its source from {url}"),
                "Give the service an https:// URL that the cluster reaches; credentials for it go \
                 into the Secret that --build-git-secret names.",
            ));
        }
        let detected = match &dockerfile {
            Some(_) => "Dockerfile",
            None => "railpack plan",
        };
        Ok((
            job::of(&self.options, input, url, dockerfile.as_deref()),
            detected,
        ))
    }

    /// Where a cluster fetches a source.
    fn source(&self, url: &RepositoryUrl) -> Result<String, StepError> {
        if !url.is_on_uploads() {
            return Ok(url.to_string());
        }
        let server = self.options.uploads.as_deref();
        let found = server.and_then(|server| address_of_uploads(server, url));
        found.ok_or_else(|| {
            StepError::fatal(
                "upload_out_of_reach",
                format!("the source was uploaded to Daybook ({url}), and the cluster does not know where that is"),
                "Start Daybook with --uploads-url, its HTTP interface as the cluster reaches it; a token \
                 for it goes into the Secret that --build-git-secret names.",
            )
        })
    }
}

/// Whether a build is asked for in terms that only the archive builder knows.
fn is_archive(input: &BuildInput<'_>) -> bool {
    let spec = input.spec;
    match spec.builder {
        BuilderKind::Archive => true,
        BuilderKind::Auto => spec.base_image.is_some() || !spec.command.is_empty(),
        BuilderKind::Dockerfile => false,
    }
}

#[async_trait]
impl Images for ClusterBuilds {
    async fn build(
        &self,
        input: BuildInput<'_>,
        output: &Output,
        cancel: &CancellationToken,
    ) -> Result<BuiltImage, StepError> {
        if is_archive(&input) {
            return self.here.build(input, output, cancel).await;
        }
        let (wanted, detected) = self.wanted(&input)?;
        let (tool, cluster) = (self.options.tool, &self.options.cluster);
        say(
            output,
            format!("building a {detected} with {tool} in {cluster}"),
        )
        .await;
        // Never dropped half-way: what is made is known.
        let made = self.ensure(&wanted, output).await?;
        let ended = self.follow(&made, output, input.handed_over, cancel).await;
        let digest = match ended {
            Ok(digest) => digest,
            Err(ending) => {
                if ending.delete {
                    self.end(&made, output).await;
                }
                return Err(ending.error);
            }
        };
        let digest = match digest {
            Some(digest) => digest,
            None => {
                say(
                    output,
                    "the Job does not say what it has pushed; asking the registry".into(),
                )
                .await;
                let reference = ImageReference {
                    repository: input.repository.clone(),
                    tag: Some(input.tag.clone()),
                    digest: None,
                };
                self.store.resolve(&reference).await?.digest
            }
        };
        let image = PinnedImage {
            repository: input.repository.clone(),
            tag: input.tag.clone(),
            digest,
        };
        let size_bytes = self.store.size(&image).await?;
        Ok(BuiltImage {
            digest: image.digest,
            builder: tool.name().to_owned(),
            detected: detected.to_owned(),
            size_bytes,
        })
    }

    async fn push(
        &self,
        image: &BuiltImage,
        scratch: &std::path::Path,
        repository: &ImageRepository,
        tag: &ImageTag,
        output: &Output,
    ) -> Result<PinnedImage, StepError> {
        if Tool::from_str(&image.builder).is_err() {
            return self
                .here
                .push(image, scratch, repository, tag, output)
                .await;
        }
        // The builder has pushed it; the registry says that it has it. The tag may have moved on,
        // and what is deployed goes by the digest.
        let reference = ImageReference {
            repository: repository.clone(),
            tag: None,
            digest: Some(image.digest.clone()),
        };
        let pinned = PinnedImage {
            tag: tag.clone(),
            ..self.store.resolve(&reference).await?
        };
        say(output, format!("the registry has {pinned}")).await;
        Ok(pinned)
    }

    async fn resolve(&self, reference: &ImageReference) -> Result<PinnedImage, StepError> {
        self.here.resolve(reference).await
    }
}

impl FromStr for Tool {
    type Err = &'static str;
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text {
            "buildkit" => Ok(Self::BuildKit),
            "kaniko" => Ok(Self::Kaniko),
            _ => Err("it is buildkit or kaniko"),
        }
    }
}

async fn say(output: &Output, text: String) {
    // A reader that has gone away is no reason to stop the work.
    let _ = output.send(text).await;
}

fn no_dockerfile(remedy: &str) -> StepError {
    StepError::fatal("dockerfile_missing", "the source has no Dockerfile", remedy)
}

fn unavailable(error: TargetError) -> StepError {
    StepError::passing(
        "build_cluster_unavailable",
        error.to_string(),
        "See that the API server of the cluster answers; it is tried again.",
    )
}

/// What an API server's refusal means for a build.
fn refused(what: &str, error: &kube::Error) -> StepError {
    let text = match refusal(what, error) {
        unavailable_now @ TargetError::Unavailable(_) => return unavailable(unavailable_now),
        TargetError::Refused(text) => text,
    };
    let kube::Error::Api(status) = error else {
        return StepError::fatal("build_job_refused", text, "");
    };
    match status.code {
        403 if status.message.contains("exceeded quota") => StepError::passing(
            "build_quota_exceeded",
            text,
            "End something else in the namespace, or have its ResourceQuota raised.",
        ),
        403 => StepError::fatal(
            "build_forbidden",
            text,
            "Give the account the right that the message names; docs/kubernetes.md lists all that \
             builds need.",
        ),
        404 => StepError::fatal(
            "build_namespace_missing",
            text,
            "Make the namespace of the builds, or name another one with --build-namespace.",
        ),
        _ => StepError::fatal(
            "build_job_refused",
            text,
            "Mend what the message names: an option of the builds, or an admission policy.",
        ),
    }
}
