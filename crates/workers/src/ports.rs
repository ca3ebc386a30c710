//! What the pipeline's steps ask of the outside. Each port has its real implementation in this
//! crate; the steps themselves know only these.

use std::path::Path;

use async_trait::async_trait;
use daybook_events::deployment::SourceCommit;
use daybook_events::gitops::{Change, DiffSummary, LedgerAnchor, SignerAdded};
use daybook_events::spec::{BuildSpec, ImageReference, PinnedImage};
use daybook_events::{
    BuildId, CommitId, Digest, EnvKey, EnvironmentName, EventId, GitRef, ImageRepository, ImageTag,
    ProjectName, RepositoryUrl, ServiceName,
};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use crate::gitops::survey;
use crate::values::{EnvironmentValues, ReleaseValues, RenderedChart};

/// Why a step did not succeed, in the form in which it is recorded and shown.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct StepError {
    /// A stable code.
    pub code: String,
    /// What happened, in one sentence.
    pub message: String,
    /// What helps.
    pub remedy: String,
    /// Whether the same step may succeed later by itself.
    pub retryable: bool,
}

impl StepError {
    /// A failure that no retry mends.
    pub fn fatal(code: &str, message: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self {
            code: code.to_owned(),
            message: message.into(),
            remedy: remedy.into(),
            retryable: false,
        }
    }

    /// A failure that waiting may mend.
    pub fn passing(code: &str, message: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self {
            retryable: true,
            ..Self::fatal(code, message, remedy)
        }
    }
}

/// Where a step's output goes, a line a message, while it happens.
pub type Output = mpsc::Sender<String>;

/// What a ref stands for.
#[derive(Debug, Clone)]
pub struct Resolved {
    /// The commit.
    pub commit: SourceCommit,
    /// The branch that the ref named; none for a tag or a commit.
    pub branch: Option<GitRef>,
}

/// Source repositories, read-only.
#[async_trait]
pub trait Sources: Send + Sync + 'static {
    /// Resolves a ref to a commit.
    async fn resolve(&self, url: &RepositoryUrl, git_ref: &GitRef) -> Result<Resolved, StepError>;

    /// Puts the tree of a commit into an empty folder.
    async fn checkout(
        &self,
        url: &RepositoryUrl,
        commit: &CommitId,
        into: &Path,
        output: &Output,
        cancel: &CancellationToken,
    ) -> Result<(), StepError>;
}

/// What is to be built.
#[derive(Debug)]
pub struct BuildInput<'a> {
    /// The build.
    pub build: BuildId,
    /// How often it was asked for. Attempts of the same request share what they start elsewhere.
    pub request: u32,
    /// The project that pays for it.
    pub project: &'a ProjectName,
    /// The service.
    pub service: &'a ServiceName,
    /// The root of a checkout of the commit.
    pub checkout: &'a Path,
    /// The service's folder within it; empty for the root.
    pub path: &'a str,
    /// How it is built.
    pub spec: &'a BuildSpec,
    /// The commit.
    pub commit: &'a SourceCommit,
    /// The repository.
    pub url: &'a RepositoryUrl,
    /// A folder of this attempt's own, removed after it.
    pub scratch: &'a Path,
    /// Where the image is to go, for builders that push it themselves.
    pub repository: &'a ImageRepository,
    /// Its tag there.
    pub tag: &'a ImageTag,
    /// Cancelled when only this attempt is to end, because its process does or another attempt has
    /// taken the build over: what runs elsewhere is left to that one. The token that ends the build
    /// itself is a child of this one.
    pub handed_over: &'a CancellationToken,
}

/// An image that is made, but not yet pushed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BuiltImage {
    /// Digest of its manifest.
    pub digest: Digest,
    /// Which builder made it.
    pub builder: String,
    /// What the source was taken for.
    pub detected: String,
    /// Size of its compressed layers in bytes.
    pub size_bytes: u64,
}

/// Makes images and keeps them.
#[async_trait]
pub trait Images: Send + Sync + 'static {
    /// Makes an image.
    async fn build(
        &self,
        input: BuildInput<'_>,
        output: &Output,
        cancel: &CancellationToken,
    ) -> Result<BuiltImage, StepError>;

    /// Pushes an image made by this process. Pushing what is there already changes nothing.
    async fn push(
        &self,
        image: &BuiltImage,
        scratch: &Path,
        repository: &ImageRepository,
        tag: &ImageTag,
        output: &Output,
    ) -> Result<PinnedImage, StepError>;

    /// Checks that an image exists, and pins it by its digest.
    async fn resolve(&self, reference: &ImageReference) -> Result<PinnedImage, StepError>;
}

/// A change of a project's GitOps repository.
#[derive(Debug, Clone)]
pub struct GitopsChange {
    /// The environment.
    pub environment: EnvironmentName,
    /// What changes.
    pub change: Change,
    /// The release's values, for [`Change::Deploy`] of an image.
    pub release: Option<ReleaseValues>,
    /// The release's values, for [`Change::Deploy`] of a Helm chart.
    pub chart: Option<RenderedChart>,
    /// The variables that differ, where a release is deployed for nothing else.
    pub config: Vec<EnvKey>,
    /// Who asked for it.
    pub author: String,
    /// Whether it goes away with its pull request, for [`Change::EnvironmentCreated`].
    pub ephemeral: bool,
    /// The event that causes the commit: its mark.
    pub cause: EventId,
    /// What the ledger knows of the repository.
    pub known: KnownHistory,
}

/// What the ledger knows of a GitOps repository, for whoever commits to it.
#[derive(Debug, Clone, Default)]
pub struct KnownHistory {
    /// The newest commit that it records. A branch that does not contain it is left alone.
    pub head: Option<CommitId>,
    /// The public keys that commits were and are signed with.
    pub signers: Vec<String>,
}

/// A commit that is to be undone by a further one.
#[derive(Debug, Clone)]
pub struct GitopsRevert {
    /// The commit.
    pub commit: CommitId,
    /// Who asked for it.
    pub author: String,
    /// Why.
    pub reason: Option<String>,
    /// The event that causes the new commit: its mark.
    pub cause: EventId,
    /// What the ledger knows of the repository.
    pub known: KnownHistory,
}

/// A commit that was made, or found to have been made by an earlier try.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GitopsCommit {
    /// The commit.
    pub commit: CommitId,
    /// Its parent.
    pub parent: Option<CommitId>,
    /// First line of its message.
    pub message: String,
    /// Its author as `Name <address>`.
    pub author: String,
    /// Files with the digests of their new contents.
    pub files: std::collections::BTreeMap<String, Option<Digest>>,
    /// Digest over `files`, as [`daybook_events::gitops::Committed`] defines it.
    pub files_digest: Digest,
    /// How many commits its history has, itself included.
    pub ordinal: u64,
    /// The ledger's tree when it was made.
    pub ledger: Option<LedgerAnchor>,
    /// Fingerprint of the key that it is signed with.
    pub signer: Option<String>,
    /// Nothing was to be changed, and this is an older commit that has it so already.
    pub unchanged: bool,
    /// Its parent was made by this process, too, which records it.
    pub after_own: bool,
}

/// A commit that undoes another one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GitopsReverted {
    /// The commit.
    pub made: GitopsCommit,
    /// How much it changes.
    pub diff: DiffSummary,
    /// Environments whose files it changes.
    pub environments: Vec<EnvironmentName>,
}

/// The projects' GitOps repositories.
#[async_trait]
pub trait Repositories: Send + Sync + 'static {
    /// Makes the repository unless it exists, and returns its branch and first commit.
    async fn ensure(&self, project: &ProjectName) -> Result<(String, CommitId), StepError>;

    /// Makes one commit. A change whose `cause` has its commit already returns that one.
    async fn commit(
        &self,
        project: &ProjectName,
        change: GitopsChange,
    ) -> Result<GitopsCommit, StepError>;

    /// The commit that was made for an event, if the branch has it: the remote's, where there is
    /// one. `signers` are the public keys that commits were signed with. Makes no repository.
    async fn find(
        &self,
        project: &ProjectName,
        cause: EventId,
        signers: Vec<String>,
    ) -> Result<Option<GitopsCommit>, StepError>;

    /// The key that commits are signed with now; none if they are not signed, and then nothing is
    /// known of who else commits either.
    fn signer(&self) -> Result<Option<SignerAdded>, StepError>;

    /// Undoes a commit. One whose `cause` has its commit already returns that one.
    async fn revert(
        &self,
        project: &ProjectName,
        revert: GitopsRevert,
    ) -> Result<GitopsReverted, StepError>;

    /// Looks over the branch for commits that are not known. Makes no repository.
    async fn survey(
        &self,
        project: &ProjectName,
        request: survey::Request,
    ) -> Result<survey::Survey, StepError>;

    /// The desired state of an environment at a commit.
    async fn read(
        &self,
        project: &ProjectName,
        environment: &EnvironmentName,
        commit: &CommitId,
    ) -> Result<EnvironmentValues, StepError>;

    /// Whether its commits are pushed elsewhere.
    async fn has_remote(&self, project: &ProjectName) -> Result<bool, StepError>;
}
