//! Deploying: a git ref or an image, from the service's definition or from an older snapshot.

use std::collections::BTreeMap;

use daybook_events::chart::{ChartReference, ChartVersion};
use daybook_events::config::InstanceConfig;
use daybook_events::deployment::{
    self, Deployment, DeploymentEvent, PromotedFrom, Requested, Status, SwitchMode, Version,
};
use daybook_events::environment::Environment;
use daybook_events::resources::Resources;
use daybook_events::secret::{self, SecretRef};
use daybook_events::spec::{Autoscaling, HealthSpec, ImageReference, RunSpec, ServiceSpec};
use daybook_events::{
    ClusterName, CommitId, DeploymentId, Digest, EnvKey, EnvironmentName, GitRef, ImageRepository,
    ImageTag, InstanceRef, Refusal, RepositoryUrl, Subject,
};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{Caller, CommandError, Commands, Done, check};
use crate::access::Verb;

/// What is to be deployed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum What {
    /// The service's default ref, or its only possible image.
    Default,
    /// A branch, tag or commit of the service's source.
    GitRef(String),
    /// An image: a whole reference, or a tag or digest in the service's repository.
    Image(String),
    /// A tag in the service's image repository, and the digest that it must be, if that is known.
    Tag(String, Option<String>),
    /// A Helm chart: its reference, and its version.
    Chart(String, String),
    /// A commit that was uploaded for the service, and the service's folder in it, if that is not
    /// the one of its definition.
    Upload(CommitId, Option<String>),
    /// A git ref or an image, whichever fits: a service with a source takes it for a ref unless
    /// it has the form of an image reference or a digest; one without takes it for an image.
    Version(String),
}

/// What one deployment runs differently from its service's definition.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct RunOverrides {
    /// Another port.
    pub port: Option<u16>,
    /// Another command.
    pub command: Option<Vec<String>>,
    /// Environment variables beside or instead of the service's.
    #[serde(default)]
    pub env: BTreeMap<EnvKey, String>,
    /// Another number of instances in each cluster.
    pub replicas: Option<u32>,
    /// Another way to ask for readiness.
    pub health: Option<HealthSpec>,
    /// Amounts of cpu and memory beside or instead of the service's.
    #[serde(default)]
    pub resources: Resources,
    /// Another way in which instances come and go by themselves.
    pub autoscaling: Option<Autoscaling>,
}

/// A wish to deploy.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Deploy {
    /// What is deployed to.
    pub instance: InstanceRef,
    /// What is deployed.
    pub what: What,
    /// Where it is to run; the environment's clusters if not given.
    pub clusters: Option<Vec<ClusterName>>,
    /// Whether traffic follows by itself; as the environment says if not given.
    pub switch: Option<SwitchMode>,
    /// Whether it takes over traffic also where it is ready in some of its clusters only.
    pub allow_partial: bool,
    /// What runs differently from the service's definition.
    pub run: RunOverrides,
    /// Why.
    pub reason: Option<String>,
}

/// A wish to deploy what an older deployment was made from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Redeploy {
    /// The older deployment.
    pub of: DeploymentId,
    /// Whether traffic follows by itself; as the environment says now if not given.
    pub switch: Option<SwitchMode>,
    /// Why.
    pub reason: Option<String>,
}

/// A wish to deploy to one environment what runs in another.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Promote {
    /// The instance that has it.
    pub from: InstanceRef,
    /// The environment that gets it.
    pub to: EnvironmentName,
    /// The deployment of `from`; its main one if not given.
    pub deployment: Option<DeploymentId>,
    /// Where it is to run; the environment's clusters if not given.
    pub clusters: Option<Vec<ClusterName>>,
    /// Whether traffic follows by itself; as the environment says if not given.
    pub switch: Option<SwitchMode>,
    /// Whether it takes over traffic also where it is ready in some of its clusters only.
    pub allow_partial: bool,
    /// What runs differently from the service's definition.
    pub run: RunOverrides,
    /// Why.
    pub reason: Option<String>,
}

/// A requested deployment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Deployed {
    /// Its id.
    pub id: DeploymentId,
    /// How it was recorded.
    pub done: Done,
}

impl Commands {
    /// Requests a deployment. It carries a snapshot of all that it is made from: later changes of
    /// the service or the environment do not concern it.
    pub async fn deploy(&self, caller: &Caller, wish: Deploy) -> Result<Deployed, CommandError> {
        self.admit(caller, Verb::Deploy, &wish.instance.project)?;
        let id = caller.deployment_id();
        if let Some((done, _)) = self.earlier(caller).await? {
            return Ok(Deployed { id, done });
        }
        let made_from = self.deployable(&wish.instance)?;
        if let What::Upload(commit, _) = &wish.what {
            self.uploaded(&wish.instance, commit).await?;
        }
        self.deploy_as(caller, id, wish, made_from).await
    }

    /// Requests a deployment of what a service is defined as, to an environment as it was read.
    pub(super) async fn deploy_as(
        &self,
        caller: &Caller,
        id: DeploymentId,
        wish: Deploy,
        made_from: (ServiceSpec, Environment),
    ) -> Result<Deployed, CommandError> {
        let version = self.version(&wish.instance, &made_from.0, wish.what.clone())?;
        self.release(caller, id, wish, made_from, version, None)
            .await
    }

    /// Requests a deployment of the image, by its digest, that a deployment of another environment
    /// runs. How it runs is for the service's definition to say, and for the wish: what belongs to
    /// the other environment stays there.
    pub async fn promote(&self, caller: &Caller, wish: Promote) -> Result<Deployed, CommandError> {
        self.admit(caller, Verb::Deploy, &wish.from.project)?;
        if let Some(source) = wish.deployment {
            self.admit_to(caller, Verb::Read, source)?;
        }
        let id = caller.deployment_id();
        if let Some((done, _)) = self.earlier(caller).await? {
            return Ok(Deployed { id, done });
        }
        let source = match wish.deployment {
            Some(source) => source,
            None => self.main_deployment(&wish.from)?,
        };
        let row = self.deployment(source)?;
        let of = &row.state.request.instance;
        if *of != wish.from {
            return Err(Refusal::new(
                "other_instance",
                format!("deployment {source} belongs to {of}, not to {}", wish.from),
                "name a deployment of this instance; `daybook history` lists them",
            )
            .into());
        }
        if wish.to == wish.from.environment {
            return Err(Refusal::new(
                "same_environment",
                format!("it is in {} already", wish.to),
                "name another environment; `daybook redeploy` repeats a deployment in its own",
            )
            .into());
        }
        if !matches!(row.state.status, Status::Started | Status::Stopped) {
            return Err(Refusal::new(
                "not_promotable",
                format!(
                    "deployment {source} is {}: only what has been live is promoted",
                    row.state.status.as_str()
                ),
                "wait until it is started, or name another one with `--deployment`",
            )
            .into());
        }
        let version = pinned_version(source, &row.state)?;
        let promoted_from = PromotedFrom {
            environment: wish.from.environment.clone(),
            deployment: source,
        };
        let wish = Deploy {
            instance: InstanceRef {
                environment: wish.to,
                ..wish.from
            },
            what: What::Default,
            clusters: wish.clusters,
            switch: wish.switch,
            allow_partial: wish.allow_partial,
            run: wish.run,
            reason: wish.reason,
        };
        let made_from = self.deployable(&wish.instance)?;
        self.release(caller, id, wish, made_from, version, Some(promoted_from))
            .await
    }

    /// Refuses what was not uploaded for this service.
    async fn uploaded(
        &self,
        instance: &InstanceRef,
        commit: &CommitId,
    ) -> Result<(), CommandError> {
        let InstanceRef {
            project, service, ..
        } = instance;
        let is_here = match &self.settings.uploads {
            Some(uploads) => uploads.of(project, service).has(commit).await,
            None => Ok(false),
        };
        if is_here.map_err(|e| CommandError::Uploads(Box::new(e)))? {
            return Ok(());
        }
        Err(Refusal::new(
            "upload_not_found",
            format!(
                "commit {} was not uploaded for {service} of {project}",
                commit.short()
            ),
            "upload it first; `daybook deploy --from DIR` does both",
        )
        .into())
    }

    fn main_deployment(&self, instance: &InstanceRef) -> Result<DeploymentId, CommandError> {
        self.instance(instance)?;
        Ok(self.main_of(instance)?.ok_or_else(|| {
            Refusal::new(
                "nothing_to_promote",
                format!("{instance} has no main deployment"),
                "deploy to that environment first, or name a deployment with `--deployment`",
            )
        })?)
    }

    /// Requests a deployment of a version, made from the service's definition and the wish.
    async fn release(
        &self,
        caller: &Caller,
        id: DeploymentId,
        wish: Deploy,
        (service, environment): (ServiceSpec, Environment),
        version: Version,
        promoted_from: Option<PromotedFrom>,
    ) -> Result<Deployed, CommandError> {
        check::text("reason", wish.reason.as_deref())?;
        let clusters = wish.clusters.unwrap_or(environment.spec.clusters);
        self.clusters(&clusters)?;
        let mut run = service.run;
        let RunOverrides {
            port,
            command,
            env,
            replicas,
            health,
            resources,
            autoscaling,
        } = wish.run;
        let secrets = self.applicable_secrets(&wish.instance).await?;
        if let Some(name) = env.keys().find(|name| secrets.contains_key(name)) {
            return Err(Refusal::new(
                "variable_is_secret",
                format!("{name} is a secret of this deployment; its value does not belong here"),
                "leave the variable out, or change it with `daybook secret set`",
            )
            .into());
        }
        // What was changed for this instance stays, until the wish says otherwise.
        let config = match self.main_of(&wish.instance)? {
            Some(main) => self.deployment(main)?.state.config(),
            None => InstanceConfig::default(),
        };
        config.apply(&mut run);
        run.port = port.unwrap_or(run.port);
        run.command = command.unwrap_or(run.command);
        run.env.extend(env);
        run.replicas = replicas.unwrap_or(run.replicas);
        run.health = health.unwrap_or(run.health);
        run.resources.set(resources);
        run.autoscaling = autoscaling.or(run.autoscaling);
        check::run(&run)?;
        let request = Requested {
            instance: wish.instance,
            version,
            clusters,
            build: service.build,
            image_repository: service.image_repository,
            run,
            switch: wish.switch.unwrap_or(environment.spec.switch),
            reason: wish.reason,
            redeploy_of: None,
            secrets,
            promoted_from,
            allow_partial: wish.allow_partial,
            config,
        };
        self.request(caller, id, request).await
    }

    /// Requests a deployment of exactly what an older one was made from: its image where it had
    /// one, else its commit, with its configuration and its clusters. Only its secrets are those
    /// of now: an older password does not come back with older code.
    pub async fn redeploy(
        &self,
        caller: &Caller,
        wish: Redeploy,
    ) -> Result<Deployed, CommandError> {
        self.admit_to(caller, Verb::Deploy, wish.of)?;
        let id = caller.deployment_id();
        if let Some((done, _)) = self.earlier(caller).await? {
            return Ok(Deployed { id, done });
        }
        check::text("reason", wish.reason.as_deref())?;
        let old = self.deployment(wish.of)?.state;
        let (_, environment) = self.deployable(&old.request.instance)?;
        self.clusters(&old.request.clusters)?;
        let version = pinned_version(wish.of, &old)?;
        let request = Requested {
            version,
            switch: wish.switch.unwrap_or(environment.spec.switch),
            reason: wish.reason,
            redeploy_of: Some(wish.of),
            promoted_from: None,
            config: old.config(),
            run: RunSpec {
                replicas: old.replicas,
                ..old.request.run.clone()
            },
            secrets: self.applicable_secrets(&old.request.instance).await?,
            ..*old.request
        };
        self.request(caller, id, request).await
    }

    /// The newest versions of the secrets that a deployment of an instance gets, all of which can
    /// be found.
    pub(super) async fn applicable_secrets(
        &self,
        instance: &InstanceRef,
    ) -> Result<BTreeMap<EnvKey, SecretRef>, CommandError> {
        let project = self.project(&instance.project)?;
        let secrets = secret::applicable(&project.secrets, instance);
        if !secrets.is_empty() {
            let store = self.secret_store()?;
            store.resolve(&instance.project, &secrets).await?;
        }
        Ok(secrets)
    }

    pub(super) async fn request(
        &self,
        caller: &Caller,
        id: DeploymentId,
        request: Requested,
    ) -> Result<Deployed, CommandError> {
        let InstanceRef {
            project,
            environment,
            ..
        } = request.instance.clone();
        let subject = Subject::Deployment(project, environment, id);
        let event = Box::new(request);
        let done = self
            .run(caller, &subject, Some(id.0), |state| {
                deployment::decide(state, DeploymentEvent::Requested(event.clone()))
            })
            .await?;
        Ok(Deployed { id, done })
    }

    fn version(
        &self,
        instance: &InstanceRef,
        service: &ServiceSpec,
        what: What,
    ) -> Result<Version, CommandError> {
        let has_source = service.source.is_some();
        match what {
            What::GitRef(text) => git_version(instance, service, Some(text)),
            What::Image(text) => self.image_version(instance, service, &text),
            What::Tag(tag, digest) => Ok(Version::Image {
                reference: ImageReference {
                    repository: self.repository(instance, service)?,
                    tag: Some(ImageTag::parse(tag)?),
                    digest: digest.map(Digest::parse).transpose()?,
                },
            }),
            What::Upload(commit, path) => {
                let of_service = service.source.as_ref().map(|source| source.path.clone());
                Ok(Version::Git {
                    url: RepositoryUrl::of_uploads(&instance.project, &instance.service),
                    git_ref: GitRef::parse(commit.as_str())?,
                    path: path.or(of_service).unwrap_or_default(),
                })
            }
            What::Chart(chart, version) => Ok(Version::Helm {
                chart: ChartReference::parse(chart)?,
                version: ChartVersion::parse(version)?,
            }),
            // No git ref contains a colon, and every image reference with a tag or digest does.
            What::Version(text) if has_source && !text.contains(':') => {
                git_version(instance, service, Some(text))
            }
            What::Version(text) => self.image_version(instance, service, &text),
            What::Default if has_source => git_version(instance, service, None),
            What::Default => Err(Refusal::new(
                "version_required",
                format!(
                    "the service {} has no source to deploy from",
                    instance.service
                ),
                "name an image, give the service a source, or upload a folder: `daybook deploy --from DIR`",
            )
            .into()),
        }
    }

    fn image_version(
        &self,
        instance: &InstanceRef,
        service: &ServiceSpec,
        text: &str,
    ) -> Result<Version, CommandError> {
        let digest = Digest::parse(text).ok();
        let tag = ImageTag::parse(text).ok();
        let reference = if digest.is_some() || tag.is_some() {
            ImageReference {
                repository: self.repository(instance, service)?,
                tag,
                digest,
            }
        } else {
            text.parse()?
        };
        Ok(Version::Image { reference })
    }

    /// The repository that a bare tag or digest of a service is looked up in.
    fn repository(
        &self,
        instance: &InstanceRef,
        service: &ServiceSpec,
    ) -> Result<ImageRepository, CommandError> {
        if let Some(repository) = &service.image_repository {
            return Ok(repository.clone());
        }
        let Some(prefix) = &self.settings.image_prefix else {
            return Err(Refusal::new(
                "image_repository_unknown",
                format!("the service {} names no image repository", instance.service),
                "give a whole image reference, or set the service's image_repository",
            )
            .into());
        };
        let InstanceRef {
            project, service, ..
        } = instance;
        Ok(ImageRepository::parse(format!(
            "{prefix}/{project}/{service}"
        ))?)
    }
}

fn git_version(
    instance: &InstanceRef,
    service: &ServiceSpec,
    text: Option<String>,
) -> Result<Version, CommandError> {
    let git_ref = text.map(GitRef::parse).transpose()?;
    let Some(source) = &service.source else {
        return Err(Refusal::new(
            "no_source",
            format!("the service {} has no source repository", instance.service),
            "deploy an image, or give the service a source",
        )
        .into());
    };
    Ok(Version::Git {
        url: source.url.clone(),
        git_ref: git_ref.unwrap_or_else(|| source.default_ref.clone()),
        path: source.path.clone(),
    })
}

/// What a deployment turned out to be made from, which no branch or tag that moved since can
/// change.
pub(super) fn pinned_version(id: DeploymentId, old: &Deployment) -> Result<Version, CommandError> {
    if let Some(image) = &old.image {
        let reference = ImageReference {
            repository: image.repository.clone(),
            tag: Some(image.tag.clone()),
            digest: Some(image.digest.clone()),
        };
        return Ok(Version::Image { reference });
    }
    match (&old.request.version, &old.source) {
        (chart @ Version::Helm { .. }, _) => Ok(chart.clone()),
        (Version::Git { url, path, .. }, Some(source)) => Ok(Version::Git {
            url: url.clone(),
            git_ref: GitRef::parse(source.commit.as_str())?,
            path: path.clone(),
        }),
        _ => Err(Refusal::new(
            "nothing_to_redeploy",
            format!("it is not known what {id} would have run: it ended before that was resolved"),
            "deploy the version that you want by name",
        )
        .into()),
    }
}
