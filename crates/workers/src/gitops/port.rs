//! GitOps repositories as the pipeline asks for them.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::Arc;

use async_trait::async_trait;
use daybook_events::gitops::{Change as AskedChange, SignerAdded};
use daybook_events::tree::PublishedTree;
use daybook_events::{CommitId, EnvironmentName, ProjectName, RepositoryUrl};
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

/// The GitOps repositories of all projects: bare repositories `<project>.git` in one folder.
#[derive(Debug)]
pub struct GitopsRepositories {
    folder: PathBuf,
    remotes: HashMap<ProjectName, RepositoryUrl>,
    transport: GitTransport,
    key: Option<Arc<SigningKey>>,
    tree: Option<Arc<dyn PublishedTree>>,
    open: Mutex<HashMap<ProjectName, Arc<OnceCell<GitopsRepository>>>>,
}

impl GitopsRepositories {
    /// The repositories in a folder. Those of the projects in `remotes` are pushed there.
    pub fn new(
        folder: impl Into<PathBuf>,
        remotes: HashMap<ProjectName, RepositoryUrl>,
        transport: GitTransport,
    ) -> Self {
        Self {
            folder: folder.into(),
            remotes,
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
    pub async fn open(&self, project: &ProjectName) -> Result<GitopsRepository, GitopsError> {
        let cell = {
            let mut open = self.open.lock().await;
            // Somebody may have removed the folder, to have it made anew.
            if open
                .get(project)
                .and_then(|cell| cell.get())
                .is_some_and(|known| !known.path().exists())
            {
                open.remove(project);
            }
            open.entry(project.clone()).or_default().clone()
        };
        cell.get_or_try_init(|| async {
            let remote = self.remotes.get(project).map(|url| Remote {
                url: url.clone(),
                transport: self.transport.clone(),
            });
            let key = self.key.clone();
            GitopsRepository::open_signing(self.path(project), project, remote, key).await
        })
        .await
        .cloned()
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
        Ok(done.into())
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
            made: done.into(),
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
        if !path.exists() && !self.remotes.contains_key(project) {
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
        Ok(repository.read_environment(commit, environment).await?)
    }
}

impl From<Committed> for GitopsCommit {
    fn from(done: Committed) -> Self {
        Self {
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
        }
    }
}

fn as_change(asked: GitopsChange) -> Result<Change, StepError> {
    Ok(match asked.change {
        AskedChange::Deploy {
            service,
            deployment,
            from,
        } => {
            let release = asked.release.ok_or_else(|| {
                StepError::fatal(
                    "release_missing",
                    "a deployment's commit needs the values of its release",
                    "Report this; it is a fault of Daybook.",
                )
            })?;
            match from {
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
