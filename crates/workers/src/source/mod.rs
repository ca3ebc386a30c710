//! Source repositories: read-only, always.
//!
//! A git ref is resolved once, to a full commit id with its message, author and time; from there
//! on the commit is what is built. Nothing is ever written to a source repository.
//!
//! - Submodules are not followed: their commits are named by the checkout, their folders are not
//!   made. A repository that needs them must bring their content itself.
//! - Git LFS is not followed either: its pointer files are checked out as they are.
//! - Repositories in git's SHA-256 object format are not supported yet.

mod browse_url;
mod cache;
mod checkout;
mod error;
mod near_names;
mod port;
mod resolve;
mod uploads;

use daybook_events::{CommitId, GitRef, RepositoryUrl};
use jiff::Timestamp;
use serde::{Deserialize, Serialize};

pub use crate::git_transport::{
    GitTransport, HostCredential, Progress, Secret, SourcePolicy, SshConfig, TransportConfig,
    TransportError, TransportLimits, no_progress,
};
pub use browse_url::commit_url;
pub use cache::SourceRepositories;
pub use checkout::{Checkout, CheckoutLimits};
pub use error::SourceError;
pub use uploads::{UploadedSources, address_of_uploads};

/// The longest commit message that is kept, in bytes. An event has room for a message of this
/// size; what is longer is cut and ends in `…`.
pub const MAX_MESSAGE_BYTES: usize = 4 * 1024;

/// What a git ref stood for when it was resolved.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ResolvedSource {
    /// The repository, as it was given.
    pub url: RepositoryUrl,
    /// The ref, as it was given.
    pub git_ref: GitRef,
    /// The branch that the ref named; none for a tag or a commit.
    pub branch: Option<GitRef>,
    /// The full id of the commit.
    pub commit: CommitId,
    /// The first line of its message.
    pub summary: String,
    /// Its whole message, up to [`MAX_MESSAGE_BYTES`].
    pub message: String,
    /// Who wrote it.
    pub author_name: String,
    /// Their address.
    pub author_email: String,
    /// When it was committed.
    pub committed_at: Timestamp,
    /// A page that shows the commit, where the forge is known.
    pub source_url: Option<String>,
}
