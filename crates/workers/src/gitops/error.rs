//! Why a GitOps repository could not be read or changed.

use std::path::PathBuf;

use daybook_events::{CommitId, DeploymentId, EnvironmentName, ProjectName, ServiceName};
use git2::ErrorClass;

use super::signing::KeyError;
use crate::git_transport::TransportError;

/// Why a GitOps repository could not be read or changed.
#[derive(Debug, thiserror::Error)]
pub enum GitopsError {
    /// There is no such environment in the repository.
    #[error("environment {environment} is not in the GitOps repository")]
    EnvironmentMissing {
        /// The environment.
        environment: EnvironmentName,
    },
    /// There is no such release in the environment.
    #[error("{environment} has no release {deployment} of {service}")]
    ReleaseMissing {
        /// The environment.
        environment: EnvironmentName,
        /// The service.
        service: ServiceName,
        /// The deployment.
        deployment: DeploymentId,
    },
    /// The environment to promote from does not have the image that is to be promoted.
    #[error("{from} does not have that image of {service}")]
    NothingToPromote {
        /// Where it should come from.
        from: EnvironmentName,
        /// The service.
        service: ServiceName,
    },
    /// The chart in the repository is one that somebody changed, and is from before there were releases
    /// of charts.
    #[error(
        "base/charts/daybook-app does not make what is committed of a Helm chart: it has no {path}"
    )]
    ChartOutdated {
        /// The file that is missing.
        path: &'static str,
    },
    /// A values file is not what it should be, most likely after a commit by hand.
    #[error("{path} at {commit} is not a values file of this environment: {reason}")]
    InvalidValues {
        /// The file.
        path: String,
        /// Where it was read.
        commit: CommitId,
        /// What is wrong.
        reason: String,
    },
    /// There is no such commit.
    #[error("the GitOps repository has no commit {commit}")]
    CommitMissing {
        /// The commit.
        commit: CommitId,
    },
    /// The folder holds the repository of another project.
    #[error("{} belongs to project {found}", .path.display())]
    OtherProject {
        /// The folder.
        path: PathBuf,
        /// Its project.
        found: ProjectName,
    },
    /// The folder holds something that is no GitOps repository.
    #[error("{} is not a GitOps repository: {reason}", .path.display())]
    NotARepository {
        /// The folder.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// The branch moved under every try.
    #[error("the branch moved {attempts} times while a commit was made")]
    Contended {
        /// How often it was tried.
        attempts: u32,
    },
    /// The remote's branch and the local one have gone different ways.
    #[error("the remote's branch is at {remote}, which does not contain {local}")]
    Diverged {
        /// The local head.
        local: CommitId,
        /// The remote's.
        remote: CommitId,
    },
    /// The branch does not contain what the ledger records.
    #[error(
        "the branch is at {found}, which does not contain {expected}, which the ledger records"
    )]
    HistoryRewritten {
        /// The newest commit that the ledger records.
        expected: CommitId,
        /// Where the branch is.
        found: CommitId,
    },
    /// A commit cannot be undone on what came after it.
    #[error("{commit} cannot be undone: later commits changed the same lines of {}", .paths.join(", "))]
    RevertConflicts {
        /// The commit.
        commit: CommitId,
        /// Where.
        paths: Vec<String>,
    },
    /// A commit is a merge, and there is no saying which side of it is to stay.
    #[error("{commit} is a merge, which cannot be undone as a whole")]
    RevertOfMerge {
        /// The commit.
        commit: CommitId,
    },
    /// Undoing a commit would change nothing.
    #[error("what {commit} changed is undone already")]
    NothingToRevert {
        /// The commit.
        commit: CommitId,
    },
    /// The key that commits are signed with cannot be used.
    #[error("the commit could not be signed")]
    Key(#[from] KeyError),
    /// A signature could not be made.
    #[error("the commit could not be signed")]
    Signing(#[source] ssh_key::Error),
    /// The remote understood the push and refuses it.
    #[error("the GitOps remote refuses the push: {reason}")]
    PushRefused {
        /// What it says.
        reason: String,
    },
    /// The remote cannot be read or written.
    #[error("the GitOps remote")]
    Remote(#[from] TransportError),
    /// The local repository does not do what a repository does.
    #[error("the GitOps repository")]
    Damaged(#[from] git2::Error),
    /// The machine's own disk did not do what it was asked.
    #[error("{}", .path.display())]
    Disk {
        /// Where.
        path: PathBuf,
        /// What happened.
        source: std::io::Error,
    },
    /// Somebody asked to stop.
    #[error("cancelled")]
    Cancelled,
    /// Whoever made the commit ended without an answer. It may have been made.
    #[error("the commit was interrupted")]
    Interrupted,
    /// What kept all commits from being made that were to be made together.
    #[error(transparent)]
    Shared(std::sync::Arc<GitopsError>),
}

impl GitopsError {
    pub(super) fn disk(path: impl Into<PathBuf>) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.into();
        move |source| Self::Disk { path, source }
    }

    /// A stable code for programs.
    pub fn code(&self) -> &'static str {
        match self {
            Self::EnvironmentMissing { .. } => "environment_missing",
            Self::ReleaseMissing { .. } => "release_missing",
            Self::NothingToPromote { .. } => "nothing_to_promote",
            Self::ChartOutdated { .. } => "repository_chart_outdated",
            Self::InvalidValues { .. } => "invalid_values",
            Self::CommitMissing { .. } => "commit_not_found",
            Self::OtherProject { .. } => "gitops_other_project",
            Self::NotARepository { .. } => "gitops_not_a_repository",
            Self::Contended { .. } => "gitops_contended",
            Self::Diverged { .. } => "gitops_diverged",
            Self::HistoryRewritten { .. } => "gitops_history_rewritten",
            Self::RevertConflicts { .. } => "revert_conflicts",
            Self::RevertOfMerge { .. } => "revert_of_merge",
            Self::NothingToRevert { .. } => "nothing_to_revert",
            Self::Key(e) => e.code(),
            Self::Signing(_) => "gitops_signing_failed",
            Self::PushRefused { .. } => "gitops_push_refused",
            Self::Remote(e) => match e {
                TransportError::NotAllowed { .. }
                | TransportError::AddressRefused { .. }
                | TransportError::RedirectRefused { .. } => "gitops_remote_not_allowed",
                TransportError::NotARepository { .. } => "gitops_remote_not_a_repository",
                TransportError::AuthenticationRequired { .. }
                | TransportError::Forbidden { .. }
                | TransportError::HostKey { .. } => "gitops_remote_auth",
                TransportError::Unavailable { .. } | TransportError::Protocol { .. } => {
                    "gitops_remote_unavailable"
                }
                TransportError::TooLarge { .. } => "gitops_remote_too_large",
                TransportError::Cancelled => "cancelled",
            },
            Self::Damaged(_) => "gitops_damaged",
            Self::Disk { .. } => "worker_disk",
            Self::Cancelled => "cancelled",
            Self::Interrupted => "gitops_interrupted",
            Self::Shared(error) => error.code(),
        }
    }

    /// Whether the same request may succeed later. A remote that refuses may be told otherwise by
    /// its operator at any time, so waiting for it makes sense.
    pub fn is_retryable(&self) -> bool {
        match self {
            Self::Contended { .. }
            | Self::PushRefused { .. }
            | Self::Key(_)
            | Self::Interrupted
            | Self::Disk { .. } => true,
            // The machine, and not the repository: no space, no more files that may be open.
            Self::Damaged(e) => [ErrorClass::Os, ErrorClass::Filesystem].contains(&e.class()),
            Self::Shared(error) => error.is_retryable(),
            Self::Remote(e) => matches!(
                e,
                TransportError::Unavailable { .. }
                    | TransportError::Protocol { .. }
                    | TransportError::AuthenticationRequired { .. }
                    | TransportError::Forbidden { .. }
                    | TransportError::HostKey { .. }
            ),
            _ => false,
        }
    }

    /// Whether somebody asked to stop, which is no failure.
    pub fn is_cancelled(&self) -> bool {
        self.code() == "cancelled"
    }

    /// What to do about it, in one sentence.
    pub fn remedy(&self) -> String {
        match self {
            Self::EnvironmentMissing { environment } => {
                format!("Create environment {environment} first.")
            }
            Self::ReleaseMissing { .. } => {
                "Deploy it again; it was terminated, or removed by hand.".into()
            }
            Self::NothingToPromote { from, service } => {
                format!("Deploy {service} to {from} first, or deploy the image directly.")
            }
            Self::ChartOutdated { path } => format!(
                "Somebody changed that folder, which Daybook leaves as it is then. Put it back to what \
                 Daybook committed, and it is renewed, or add {path} to it as the repository of a new \
                 project has it; then deploy again."
            ),
            Self::InvalidValues { path, .. } => {
                format!("Look at `git log -p -- {path}` and revert the commit that broke it.")
            }
            Self::CommitMissing { .. } => {
                "Restore the repository from its remote or a backup.".into()
            }
            Self::OtherProject { .. } | Self::NotARepository { .. } => {
                "Move the folder away, or use another data folder.".into()
            }
            Self::Contended { .. } => "It is tried again; see who else pushes so often.".into(),
            Self::Diverged { local, .. } => format!(
                "Somebody rewrote the remote's history. Push {local} back to it, or remove the \
                 local repository to accept the remote's."
            ),
            Self::HistoryRewritten { expected, .. } => format!(
                "Put {expected} back onto the branch, or accept what it is now with `daybook \
                 gitops adopt`; then deploy again."
            ),
            Self::RevertConflicts { .. } | Self::RevertOfMerge { .. } => {
                "Undo it by hand in a clone, push that, and adopt the result.".into()
            }
            Self::NothingToRevert { .. } => "Adopt it: nothing of it is left.".into(),
            Self::Key(e) => e.remedy(),
            Self::Signing(_) => "Make a new key with `daybook keys gitops rotate`.".into(),
            Self::PushRefused { .. } => {
                "Allow Daybook to push to the branch (protected branch, hook, quota).".into()
            }
            Self::Remote(e) => e.remedy(),
            Self::Damaged(_) => {
                "Run `git fsck` in the repository; restore it from its remote or a backup.".into()
            }
            Self::Disk { .. } => "Check the worker's disk: free space, permissions.".into(),
            Self::Cancelled => "Start it again if it is still wanted.".into(),
            Self::Interrupted => "It is tried again; report it if it comes back.".into(),
            Self::Shared(error) => error.remedy(),
        }
    }
}
