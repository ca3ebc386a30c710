//! GitOps repositories as the pipeline asks for them.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::Arc;

use async_trait::async_trait;
use daybook_events::gitops::Change as AskedChange;
use daybook_events::{CommitId, EnvironmentName, ProjectName, RepositoryUrl};
use jiff::Timestamp;
use tokio::sync::{Mutex, OnceCell};
use tokio_util::sync::CancellationToken;

use super::{Author, BRANCH, Change, CommitRequest, GitopsError, GitopsRepository, Remote};
use crate::git_transport::GitTransport;
use crate::ports::{GitopsChange, GitopsCommit, Repositories, StepError};
use crate::values::EnvironmentValues;

/// The GitOps repositories of all projects: bare repositories `<project>.git` in one folder.
#[derive(Debug)]
pub struct GitopsRepositories {
    folder: PathBuf,
    remotes: HashMap<ProjectName, RepositoryUrl>,
    transport: GitTransport,
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
            open: Mutex::default(),
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
            GitopsRepository::open_or_create(self.path(project), project, remote).await
        })
        .await
        .cloned()
    }
}

impl From<GitopsError> for StepError {
    fn from(error: GitopsError) -> Self {
        let mut message = error.to_string();
        let mut cause = std::error::Error::source(&error);
        while let Some(c) = cause {
            message = format!("{message}: {c}");
            cause = c.source();
        }
        Self {
            code: error.code().to_owned(),
            message,
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
            ledger: None,
            change: as_change(change)?,
        };
        // Dropping the future stops the work.
        let done = repository
            .commit(request, &CancellationToken::new())
            .await?;
        Ok(GitopsCommit {
            commit: done.commit,
            parent: done.parent,
            message: done.title,
            author: done.author,
            files: done.files,
            files_digest: done.files_digest,
        })
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

fn as_change(asked: GitopsChange) -> Result<Change, StepError> {
    Ok(match asked.change {
        AskedChange::Deploy {
            service,
            deployment,
        } => Change::Deploy {
            service,
            deployment,
            release: asked.release.ok_or_else(|| {
                StepError::fatal(
                    "release_missing",
                    "a deployment's commit needs the values of its release",
                    "Report this; it is a fault of Daybook.",
                )
            })?,
        },
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
        AskedChange::EnvironmentCreated {} => Change::CreateEnvironment {
            from: None,
            ephemeral: false,
        },
        AskedChange::EnvironmentDeleted {} => Change::DeleteEnvironment,
    })
}
