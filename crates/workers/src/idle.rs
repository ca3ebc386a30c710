//! Ports that do nothing, at once: what orchestration costs by itself is measured with them
//! (`cargo xtask bench orchestrate`), and the pipeline's own logic is tested with them.
//!
//! They keep the ports' promises (a commit has its mark, a status is about its revision), so that
//! the steps cannot tell them from the real ones. No configuration of a server can select them.

use std::collections::{BTreeMap, HashMap};
use std::path::Path;
use std::sync::{Mutex, PoisonError};

use async_trait::async_trait;
use daybook_events::deployment::SourceCommit;
use daybook_events::gitops::{Change, SignerAdded};
use daybook_events::spec::{ImageReference, PinnedImage};
use daybook_events::{
    ClusterName, CommitId, DeploymentId, Digest, EnvironmentName, EventId, GitRef, ImageRepository,
    ImageTag, ProjectName, RepositoryUrl,
};
use jiff::Timestamp;
use sha2::Digest as _;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::gitops::survey;
use crate::ports::{
    BuildInput, BuiltImage, GitopsChange, GitopsCommit, GitopsRevert, GitopsReverted, Images,
    Output, Repositories, Resolved, Sources, StepError,
};
use crate::target::{AppRef, AppStatus, InstanceStatus, ReleaseStatus, Target, TargetError};
use crate::values::EnvironmentValues;

fn commit_id(seed: &str) -> CommitId {
    let hash = sha2::Sha256::digest(seed);
    let digits: String = hash.iter().take(20).map(|b| format!("{b:02x}")).collect();
    CommitId::parse(digits).expect("forty hexadecimal digits")
}

/// Every ref is a commit of its own; checkouts are empty.
#[derive(Debug, Default)]
pub struct IdleSources;

#[async_trait]
impl Sources for IdleSources {
    async fn resolve(&self, url: &RepositoryUrl, git_ref: &GitRef) -> Result<Resolved, StepError> {
        let commit = SourceCommit {
            commit: commit_id(&format!("{url} {git_ref}")),
            message: format!("Commit of {git_ref}"),
            author_name: "Ada".into(),
            author_email: "ada@example.com".into(),
            committed_at: Timestamp::UNIX_EPOCH,
            url: url.to_string(),
        };
        Ok(Resolved {
            commit,
            branch: None,
        })
    }

    async fn checkout(
        &self,
        _: &RepositoryUrl,
        _: &CommitId,
        _: &Path,
        _: &Output,
        _: &CancellationToken,
    ) -> Result<(), StepError> {
        Ok(())
    }
}

/// Every build makes the empty image; every image exists.
#[derive(Debug, Default)]
pub struct IdleImages;

#[async_trait]
impl Images for IdleImages {
    async fn build(
        &self,
        input: BuildInput<'_>,
        _: &Output,
        _: &CancellationToken,
    ) -> Result<BuiltImage, StepError> {
        Ok(BuiltImage {
            digest: Digest::of(input.commit.commit.as_str().as_bytes()),
            builder: "idle".into(),
            detected: "nothing".into(),
            size_bytes: 0,
        })
    }

    async fn push(
        &self,
        image: &BuiltImage,
        _: &Path,
        repository: &ImageRepository,
        tag: &ImageTag,
        _: &Output,
    ) -> Result<PinnedImage, StepError> {
        Ok(PinnedImage {
            repository: repository.clone(),
            tag: tag.clone(),
            digest: image.digest.clone(),
        })
    }

    async fn resolve(&self, reference: &ImageReference) -> Result<PinnedImage, StepError> {
        let tag = ImageTag::parse("given").expect("a valid tag");
        Ok(PinnedImage {
            repository: reference.repository.clone(),
            tag: reference.tag.clone().unwrap_or(tag),
            digest: reference
                .digest
                .clone()
                .unwrap_or_else(|| Digest::of(reference.to_string().as_bytes())),
        })
    }
}

/// Repositories in memory.
#[derive(Debug, Default)]
pub struct IdleRepositories(Mutex<HashMap<ProjectName, IdleRepository>>);

#[derive(Debug, Default)]
struct IdleRepository {
    head: Option<CommitId>,
    by_cause: HashMap<EventId, GitopsCommit>,
    environments: BTreeMap<EnvironmentName, EnvironmentValues>,
}

#[async_trait]
impl Repositories for IdleRepositories {
    async fn ensure(&self, project: &ProjectName) -> Result<(String, CommitId), StepError> {
        let first = commit_id(project.as_str());
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let repository = all.entry(project.clone()).or_default();
        repository.head.get_or_insert(first.clone());
        Ok(("main".into(), first))
    }

    async fn commit(
        &self,
        project: &ProjectName,
        change: GitopsChange,
    ) -> Result<GitopsCommit, StepError> {
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let repository = all.entry(project.clone()).or_default();
        if let Some(made) = repository.by_cause.get(&change.cause) {
            return Ok(made.clone());
        }
        let environment = repository
            .environments
            .entry(change.environment.clone())
            .or_insert_with(|| EnvironmentValues {
                project: project.clone(),
                environment: change.environment.clone(),
                ephemeral: false,
                services: BTreeMap::new(),
            });
        match (&change.change, change.release) {
            (
                Change::Deploy {
                    service,
                    deployment,
                    ..
                },
                Some(release),
            ) => {
                let values = environment.services.entry(service.clone()).or_default();
                values.image = Some(release.image.clone());
                values.releases.insert(*deployment, release);
            }
            (
                Change::Scale {
                    service,
                    deployment,
                    replicas,
                },
                _,
            ) => {
                let values = environment.services.entry(service.clone()).or_default();
                if let Some(release) = values.releases.get_mut(deployment) {
                    release.run.replicas = *replicas;
                }
            }
            (
                Change::Remove {
                    service,
                    deployment,
                },
                _,
            ) => {
                let values = environment.services.entry(service.clone()).or_default();
                values.releases.remove(deployment);
                values.charts.remove(deployment);
            }
            _ => {}
        }
        let made = GitopsCommit {
            commit: commit_id(&change.cause.to_string()),
            parent: repository.head.clone(),
            message: format!("change of {}", change.environment),
            author: change.author,
            files: BTreeMap::new(),
            files_digest: Digest::of(b""),
            ordinal: repository.by_cause.len() as u64 + 2,
            ledger: None,
            signer: None,
            unchanged: false,
            after_own: !repository.by_cause.is_empty(),
        };
        repository.head = Some(made.commit.clone());
        repository.by_cause.insert(change.cause, made.clone());
        Ok(made)
    }

    async fn find(
        &self,
        project: &ProjectName,
        cause: EventId,
        _: Vec<String>,
    ) -> Result<Option<GitopsCommit>, StepError> {
        let all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let repository = all.get(project);
        Ok(repository.and_then(|r| r.by_cause.get(&cause)).cloned())
    }

    fn signer(&self) -> Result<Option<SignerAdded>, StepError> {
        Ok(None)
    }

    async fn revert(&self, _: &ProjectName, _: GitopsRevert) -> Result<GitopsReverted, StepError> {
        Err(StepError::fatal(
            "nothing_to_revert",
            "nobody else commits to a repository in memory",
            "",
        ))
    }

    async fn has_remote(&self, _: &ProjectName) -> Result<bool, StepError> {
        Ok(false)
    }

    async fn survey(
        &self,
        project: &ProjectName,
        _: survey::Request,
    ) -> Result<survey::Survey, StepError> {
        let (_, first) = self.ensure(project).await?;
        let all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        Ok(survey::Survey {
            head: all
                .get(project)
                .and_then(|r| r.head.clone())
                .unwrap_or(first),
            rewritten: None,
            recorded: Vec::new(),
            unknown: Vec::new(),
            more: false,
        })
    }

    async fn read(
        &self,
        project: &ProjectName,
        environment: &EnvironmentName,
        _: &CommitId,
    ) -> Result<EnvironmentValues, StepError> {
        let all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        all.get(project)
            .and_then(|r| r.environments.get(environment))
            .cloned()
            .ok_or_else(|| {
                StepError::fatal("environment_missing", "it is not in the repository", "")
            })
    }
}

/// A cluster where everything is ready as soon as it is applied.
#[derive(Debug)]
pub struct IdleTarget {
    cluster: ClusterName,
    apps: Mutex<HashMap<AppRef, watch::Sender<AppStatus>>>,
}

impl IdleTarget {
    /// A cluster of this name.
    pub fn new(cluster: ClusterName) -> Self {
        Self {
            cluster,
            apps: Mutex::default(),
        }
    }

    fn app<T>(&self, app: &AppRef, with: impl FnOnce(&watch::Sender<AppStatus>) -> T) -> T {
        let mut apps = self.apps.lock().unwrap_or_else(PoisonError::into_inner);
        with(
            apps.entry(app.clone())
                .or_insert_with(|| watch::channel(AppStatus::default()).0),
        )
    }
}

#[async_trait]
impl Target for IdleTarget {
    fn cluster(&self) -> &ClusterName {
        &self.cluster
    }

    async fn apply(
        &self,
        app: &AppRef,
        revision: &CommitId,
        desired: &EnvironmentValues,
    ) -> Result<(), TargetError> {
        let releases = desired
            .services
            .iter()
            .flat_map(|(service, values)| {
                values.releases.iter().map(move |(id, r)| (service, id, r))
            })
            .map(|(service, id, release)| ReleaseStatus {
                deployment: *id,
                service: service.clone(),
                revision: revision.clone(),
                wanted: release.run.replicas,
                instances: (0..release.run.replicas)
                    .map(|n| instance(*id, n))
                    .collect(),
                problem: None,
                image_pull: None,
            })
            .collect();
        self.app(app, |status| {
            status.send_replace(AppStatus {
                revision: Some(revision.clone()),
                releases,
                is_whole: true,
            })
        });
        Ok(())
    }

    async fn retry(&self, _: &AppRef, _: DeploymentId) -> Result<(), TargetError> {
        Ok(())
    }

    fn watch(&self, app: &AppRef) -> watch::Receiver<AppStatus> {
        self.app(app, watch::Sender::subscribe)
    }
}

fn instance(deployment: DeploymentId, number: u32) -> InstanceStatus {
    InstanceStatus {
        name: format!("{}-{number}", deployment.short()),
        address: "127.0.0.1:9".into(),
        ready: true,
        outdated: false,
        restarts: 0,
        started_at: Timestamp::UNIX_EPOCH,
    }
}
