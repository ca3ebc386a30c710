//! Why a source could not be resolved or checked out.

use std::path::PathBuf;

use daybook_events::{CommitId, RepositoryUrl};

use crate::git_transport::TransportError;

/// Why a source could not be resolved or checked out.
#[derive(Debug, thiserror::Error)]
pub enum SourceError {
    /// The repository has no such branch, tag or commit.
    #[error("{git_ref:?} is no branch, tag or commit of the repository")]
    RefNotFound {
        /// What was asked for.
        git_ref: String,
        /// Names that may have been meant.
        near: Vec<String>,
    },
    /// An abbreviated commit id that fits several commits.
    #[error("{git_ref:?} is the beginning of several commit ids")]
    AmbiguousCommit {
        /// What was asked for.
        git_ref: String,
    },
    /// The ref stands for something else than a commit, such as a tagged file.
    #[error("{git_ref:?} stands for a {kind}, not for a commit")]
    NotACommit {
        /// What was asked for.
        git_ref: String,
        /// What it stands for.
        kind: String,
    },
    /// There is no commit in the repository yet.
    #[error("the repository is empty")]
    EmptyRepository,
    /// The repository does not have the commit that was resolved earlier, or does not give it out.
    #[error("the repository no longer has commit {commit}")]
    CommitGone {
        /// The commit.
        commit: CommitId,
    },
    /// It was uploaded to a server that this worker cannot read from.
    #[error("the source was uploaded to Daybook ({url}), and this worker does not have it")]
    UploadOutOfReach {
        /// What stands for it in the ledger.
        url: RepositoryUrl,
    },
    /// The commit's tree has a path that no honest client could have committed.
    #[error("the commit contains the path {path:?}: {rule}")]
    UnsafeTree {
        /// The path.
        path: String,
        /// What is wrong with it.
        rule: &'static str,
    },
    /// The tree is larger than the limits allow.
    #[error("the checkout is too large: at most {limit} {unit}")]
    CheckoutTooLarge {
        /// The limit.
        limit: u64,
        /// Of what.
        unit: &'static str,
    },
    /// The folder to check out into has something in it.
    #[error("{} is not an empty folder", .path.display())]
    FolderInUse {
        /// The folder.
        path: PathBuf,
    },
    /// The machine's own disk did not do what it was asked.
    #[error("{}", .path.display())]
    Disk {
        /// Where.
        path: PathBuf,
        /// What happened.
        source: std::io::Error,
    },
    /// The repository elsewhere.
    #[error(transparent)]
    Transport(#[from] TransportError),
}

impl SourceError {
    pub(super) fn disk(path: impl Into<PathBuf>) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.into();
        move |source| Self::Disk { path, source }
    }

    /// A stable code for programs.
    pub fn code(&self) -> &'static str {
        match self {
            Self::RefNotFound { .. } => "ref_not_found",
            Self::AmbiguousCommit { .. } => "ref_ambiguous",
            Self::NotACommit { .. } => "ref_not_a_commit",
            Self::EmptyRepository => "repository_empty",
            Self::CommitGone { .. } => "commit_not_found",
            Self::UploadOutOfReach { .. } => "upload_out_of_reach",
            Self::UnsafeTree { .. } => "source_unsafe_path",
            Self::CheckoutTooLarge { .. } => "source_too_large",
            Self::FolderInUse { .. } => "folder_in_use",
            Self::Disk { .. } => "worker_disk",
            Self::Transport(e) => e.code(),
        }
    }

    /// Whether the same operation may succeed later without anybody changing anything.
    pub fn is_retryable(&self) -> bool {
        match self {
            Self::Disk { .. } => true,
            Self::Transport(e) => e.is_retryable(),
            _ => false,
        }
    }

    /// Whether somebody asked to stop, which is no failure.
    pub fn is_cancelled(&self) -> bool {
        matches!(self, Self::Transport(TransportError::Cancelled))
    }

    /// What to do about it, in one sentence.
    pub fn remedy(&self) -> String {
        match self {
            Self::RefNotFound { near, .. } if near.is_empty() => {
                "Push the branch or tag first, or name one that exists (`git ls-remote <url>` \
                 lists them)."
                    .into()
            }
            Self::RefNotFound { near, .. } => format!("Did you mean {}?", near.join(", ")),
            Self::AmbiguousCommit { .. } => "Give more digits of the commit id.".into(),
            Self::NotACommit { .. } => "Name a branch, a commit, or a tag of a commit.".into(),
            Self::EmptyRepository => "Push a first commit.".into(),
            Self::CommitGone { .. } => {
                "It was probably removed by a forced push; deploy the branch again.".into()
            }
            Self::UploadOutOfReach { .. } => {
                "Start the worker with --uploads-url, the address of the server that took the upload, \
                 or have both share the folder `uploads` of the data folder; or upload again."
                    .into()
            }
            Self::UnsafeTree { .. } => "Remove the path from the repository's history.".into(),
            Self::CheckoutTooLarge { .. } => {
                "Remove large files from the repository, or raise the checkout's limits.".into()
            }
            Self::FolderInUse { .. } => "Name a folder that is empty or does not exist.".into(),
            Self::Disk { .. } => "Check the worker's disk: free space, permissions.".into(),
            Self::Transport(e) => e.remedy(),
        }
    }
}
