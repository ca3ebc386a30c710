//! GitOps repositories as the pipeline asks for them.

use std::collections::HashMap;
use std::fmt::Debug;
use std::path::PathBuf;
use std::sync::Arc;

use async_trait::async_trait;
use daybook_events::gitops::{Change as AskedChange, SignerAdded};
use daybook_events::tree::PublishedTree;
use daybook_events::{CommitId, EnvironmentName, EventId, ProjectName, RepositoryUrl};
use daybook_projections::Projections;
use jiff::Timestamp;
use tokio::sync::{Mutex, OnceCell};
use tokio_util::sync::CancellationToken;

use super::{
    Author, BRANCH, Change, CommitRequest, Committed, GitopsError, GitopsRepository, LedgerPoint,
    Remote, RevertRequest, SigningKey, Witness, survey,
};
use crate::git_transport::GitTransport;
use crate::ports::{
    GitopsChange, GitopsCommit, GitopsRevert, GitopsReverted, KnownHistory, Repositories, StepError,
};
use crate::values::EnvironmentValues;

/// Says where the commits of a project are pushed.
pub trait Remotes: Debug + Send + Sync + 'static {
    /// The remote of a project; none if its repository is on this machine alone.
    fn remote_of(&self, project: &ProjectName) -> Result<Option<RepositoryUrl>, StepError>;
}

impl Remotes for HashMap<ProjectName, RepositoryUrl> {
    fn remote_of(&self, project: &ProjectName) -> Result<Option<RepositoryUrl>, StepError> {
        Ok(self.get(project).cloned())
    }
}

/// What the ledger says.
impl Remotes for Projections {
    fn remote_of(&self, project: &ProjectName) -> Result<Option<RepositoryUrl>, StepError> {
        let found = self.project(project).map_err(|e| {
            StepError::passing(
                "projections_unreadable",
                daybook_events::with_causes(&e),
                "Start the process again; its projections can be rebuilt.",
            )
        })?;
        Ok(found.and_then(|project| project.gitops_remote))
    }
}

/// A repository that is open, or being opened, with the remote that it has.
#[derive(Debug, Clone, Default)]
struct Opening {
    remote: Option<RepositoryUrl>,
    repository: Arc<OnceCell<GitopsRepository>>,
}

/// The GitOps repositories of all projects: bare repositories `<project>.git` in one folder.
#[derive(Debug)]
pub struct GitopsRepositories {
    folder: PathBuf,
    remotes: Box<dyn Remotes>,
    transport: GitTransport,
    key: Option<Arc<SigningKey>>,
    tree: Option<Arc<dyn PublishedTree>>,
    open: Mutex<HashMap<ProjectName, Opening>>,
}

impl GitopsRepositories {
    /// The repositories in a folder. They are pushed where `remotes` says, which is asked each
    /// time, over `transport`.
    pub fn new(folder: impl Into<PathBuf>, remotes: impl Remotes, transport: GitTransport) -> Self {
        Self {
            folder: folder.into(),
            remotes: Box::new(remotes),
            transport,
            key: None,
            tree: None,
            open: Mutex::default(),
        }
    }

    /// Signs every commit with this key.
    pub fn signing(mut self, key: Arc<SigningKey>) -> Self {
        self.key = Some(key);
        self
    }

    /// Anchors the newest published head of this tree in every commit.
    pub fn anchoring(mut self, tree: Arc<dyn PublishedTree>) -> Self {
        self.tree = Some(tree);
        self
    }

    fn witness(&self, known: KnownHistory) -> Witness {
        Witness {
            ledger: self
                .tree
                .as_ref()
                .and_then(|tree| tree.head())
                .map(LedgerPoint::from),
            signers: known.signers,
            after: known.head,
        }
    }

    /// Where a project's repository is, or will be.
    pub fn path(&self, project: &ProjectName) -> PathBuf {
        self.folder.join(format!("{project}.git"))
    }

    /// A project's repository, made if it does not exist.
    pub async fn open(&self, project: &ProjectName) -> Result<GitopsRepository, StepError> {
        let remote = self.remotes.remote_of(project)?;
        let opening = {
            let mut open = self.open.lock().await;
            let opening = open.entry(project.clone()).or_default();
            // Somebody may have removed the folder, to have it made anew.
            let gone = |known: &GitopsRepository| !known.path().exists();
            if opening.remote != remote || opening.repository.get().is_some_and(gone) {
                *opening = Opening {
                    remote,
                    repository: Arc::default(),
                };
            }
            opening.clone()
        };
        let Opening { remote, repository } = opening;
        let opened = repository.get_or_try_init(|| async {
            let remote = remote.map(|url| Remote {
                url,
                transport: self.transport.clone(),
            });
            let key = self.key.clone();
            GitopsRepository::open_signing(self.path(project), project, remote, key).await
        });
        Ok(opened.await?.clone())
    }
}

impl From<GitopsError> for StepError {
    fn from(error: GitopsError) -> Self {
        Self {
            code: error.code().to_owned(),
            message: daybook_events::with_causes(&error),
            remedy: error.remedy(),
            retryable: error.is_retryable(),
        }
    }
}

#[async_trait]
impl Repositories for GitopsRepositories {
    async fn ensure(&self, project: &ProjectName) -> Result<(String, CommitId), StepError> {
        let repository = self.open(project).await?;
        let log = repository.log(None, 1).await?;
        let first = match log.into_iter().next() {
            Some(first) => first.commit,
            None => repository.head().await?,
        };
        Ok((BRANCH.to_owned(), first))
    }

    async fn commit(
        &self,
        project: &ProjectName,
        change: GitopsChange,
    ) -> Result<GitopsCommit, StepError> {
        let repository = self.open(project).await?;
        let request = CommitRequest {
            environment: change.environment.clone(),
            author: Author::parse(&change.author),
            at: Timestamp::now(),
            event: change.cause,
            body: None,
            witness: self.witness(change.known.clone()),
            change: as_change(change)?,
        };
        // Dropping the future stops the work.
        let done = repository
            .commit(request, &CancellationToken::new())
            .await?;
        Ok(as_made(&repository, done))
    }

    async fn find(
        &self,
        project: &ProjectName,
        cause: EventId,
        signers: Vec<String>,
    ) -> Result<Option<GitopsCommit>, StepError> {
        if !self.path(project).exists() && self.remotes.remote_of(project)?.is_none() {
            return Ok(None);
        }
        let repository = self.open(project).await?;
        let found = repository
            .find(cause, signers, &CancellationToken::new())
            .await?;
        Ok(found.map(|done| as_made(&repository, done)))
    }

    fn signer(&self) -> Result<Option<SignerAdded>, StepError> {
        let Some(key) = &self.key else {
            return Ok(None);
        };
        let signer = key.signer().map_err(GitopsError::from)?;
        Ok(Some(SignerAdded {
            public_key: signer.public_key,
            fingerprint: signer.fingerprint,
        }))
    }

    async fn revert(
        &self,
        project: &ProjectName,
        revert: GitopsRevert,
    ) -> Result<GitopsReverted, StepError> {
        let repository = self.open(project).await?;
        let request = RevertRequest {
            commit: revert.commit,
            author: Author::parse(&revert.author),
            at: Timestamp::now(),
            event: revert.cause,
            reason: revert.reason,
            witness: self.witness(revert.known),
        };
        let done = repository
            .revert(request, &CancellationToken::new())
            .await?;
        let (diff, environments) = repository.summary(&done.commit).await?;
        Ok(GitopsReverted {
            made: as_made(&repository, done),
            diff,
            environments,
        })
    }

    async fn survey(
        &self,
        project: &ProjectName,
        request: survey::Request,
    ) -> Result<survey::Survey, StepError> {
        let path = self.path(project);
        if !path.exists() && self.remotes.remote_of(project)?.is_none() {
            return Err(StepError::passing(
                "gitops_missing",
                format!("the GitOps repository {} is not there", path.display()),
                "Restore it from a clone or a backup.",
            ));
        }
        let repository = self.open(project).await?;
        Ok(repository
            .survey(request, &CancellationToken::new())
            .await?)
    }

    async fn read(
        &self,
        project: &ProjectName,
        environment: &EnvironmentName,
        commit: &CommitId,
    ) -> Result<EnvironmentValues, StepError> {
        let repository = self.open(project).await?;
        match repository.read_environment(commit, environment).await {
            // Another machine pushed it.
            Err(GitopsError::CommitMissing { .. }) => {
                repository.refresh(&CancellationToken::new()).await?;
                Ok(repository.read_environment(commit, environment).await?)
            }
            read => Ok(read?),
        }
    }

    async fn has_remote(&self, project: &ProjectName) -> Result<bool, StepError> {
        Ok(self.remotes.remote_of(project)?.is_some())
    }
}

/// A commit, and whether its turn to be recorded comes after another one of this process.
fn as_made(repository: &GitopsRepository, done: Committed) -> GitopsCommit {
    // What changes nothing names the commit that it found, and is recorded after that one.
    let before = if done.unchanged {
        Some(&done.commit)
    } else {
        done.parent.as_ref()
    };
    let after_own = before.is_some_and(|commit| repository.has_made(commit));
    GitopsCommit {
        commit: done.commit,
        parent: done.parent,
        message: done.title,
        author: done.author,
        files: done.files,
        files_digest: done.files_digest,
        ordinal: done.ordinal,
        ledger: done.ledger,
        signer: done.signer,
        unchanged: done.unchanged,
        after_own,
    }
}

fn as_change(asked: GitopsChange) -> Result<Change, StepError> {
    Ok(match asked.change {
        AskedChange::Deploy {
            service,
            deployment,
            from,
        } => {
            if let Some(chart) = asked.chart {
                return Ok(Change::DeployChart {
                    service,
                    deployment,
                    chart,
                });
            }
            let release = asked.release.ok_or_else(|| {
                StepError::fatal(
                    "release_missing",
                    "a deployment's commit needs the values of its release",
                    "Report this; it is a fault of Daybook.",
                )
            })?;
            match from {
                None if !asked.config.is_empty() => Change::Reconfigure {
                    service,
                    deployment,
                    release,
                    keys: asked.config,
                },
                Some(from) => Change::Promote {
                    from,
                    service,
                    deployment,
                    release,
                },
                None => Change::Deploy {
                    service,
                    deployment,
                    release,
                },
            }
        }
        AskedChange::Scale {
            service,
            deployment,
            replicas,
        } => Change::Scale {
            service,
            deployment,
            replicas,
        },
        AskedChange::Remove {
            service,
            deployment,
        } => Change::Remove {
            service,
            deployment,
        },
        AskedChange::EnvironmentCreated { from } => Change::CreateEnvironment {
            from,
            ephemeral: asked.ephemeral,
        },
        AskedChange::EnvironmentDeleted {} => Change::DeleteEnvironment,
    })
}
