//! Why something could not be done with an image.

use std::error::Error;
use std::io;

use daybook_events::Digest;

/// Why an image could not be pushed, found, fetched or unpacked.
///
/// Each has a stable [`code`](Self::code), a [`remedy`](Self::remedy) and an answer to whether
/// trying again may help.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ImageError {
    /// There is no such image.
    #[error("the image {reference} does not exist")]
    NotFound {
        /// What was asked for.
        reference: String,
    },
    /// A reference names a tag and a digest, and the tag is another image.
    #[error("{reference}: the tag is {actual}, not {expected}")]
    TagMoved {
        /// What was asked for.
        reference: String,
        /// The digest that was given.
        expected: Digest,
        /// The digest that the tag has.
        actual: Digest,
    },
    /// The registry gives no answer.
    #[error("the registry {registry} cannot be reached")]
    Unreachable {
        /// Its host and port.
        registry: String,
        /// What went wrong underneath.
        source: Box<dyn Error + Send + Sync>,
    },
    /// The registry does not let us do this.
    #[error("the registry {registry} refuses access to {reference} ({})",
        if *.with_credentials { "with the configured credentials" } else { "no credentials are configured for it" })]
    AccessRefused {
        /// Its host and port.
        registry: String,
        /// What was asked for.
        reference: String,
        /// Whether credentials were sent.
        with_credentials: bool,
    },
    /// The registry answered with something else than was asked for.
    #[error("the registry {registry} answered: {message}")]
    Registry {
        /// Its host and port.
        registry: String,
        /// What it said, shortened.
        message: String,
        /// Whether it may answer differently later.
        transient: bool,
    },
    /// Content is not what its digest says.
    #[error("the content of {digest} is damaged: {reason}")]
    Damaged {
        /// The digest that it should have.
        digest: Digest,
        /// What was found.
        reason: String,
    },
    /// A manifest or configuration is not one.
    #[error("{what} is not valid: {reason}")]
    Invalid {
        /// What was read.
        what: String,
        /// What is wrong with it.
        reason: String,
    },
    /// A layer contains what no image needs and an attacker would.
    #[error("the layer entry {path:?} is refused: {reason}")]
    UnsafeEntry {
        /// The entry's path, as the archive has it.
        path: String,
        /// The rule that it breaks.
        reason: &'static str,
    },
    /// The image is larger than the bound that is set for it.
    #[error("the unpacked image exceeds the limit of {limit} {unit}")]
    TooLarge {
        /// The bound.
        limit: u64,
        /// "bytes" or "entries".
        unit: &'static str,
    },
    /// The image is well-formed and uses something that is not supported here.
    #[error("{0}")]
    Unsupported(String),
    /// The registry's credentials cannot be read.
    #[error("the registry credentials in {path} cannot be used: {reason}")]
    Credentials {
        /// The configuration file.
        path: String,
        /// What is wrong; never a secret.
        reason: String,
    },
    /// The file system refused.
    #[error("{doing} failed")]
    Io {
        /// What was being done, with its path.
        doing: String,
        /// Why it failed.
        source: io::Error,
    },
    /// It was told to stop.
    #[error("the work on the image was cancelled")]
    Cancelled,
}

impl ImageError {
    /// A stable code for programs.
    pub fn code(&self) -> &'static str {
        match self {
            Self::NotFound { .. } => "image_not_found",
            Self::TagMoved { .. } => "image_digest_mismatch",
            Self::Unreachable { .. } => "registry_unreachable",
            Self::AccessRefused { .. } => "registry_access_refused",
            Self::Registry { .. } => "registry_error",
            Self::Damaged { .. } => "image_content_damaged",
            Self::Invalid { .. } => "image_invalid",
            Self::UnsafeEntry { .. } => "image_archive_refused",
            Self::TooLarge { .. } => "image_too_large",
            Self::Unsupported(_) => "image_unsupported",
            Self::Credentials { .. } => "registry_credentials_invalid",
            Self::Io { .. } => "image_io_failed",
            Self::Cancelled => "cancelled",
        }
    }

    /// What to do about it, in one sentence.
    pub fn remedy(&self) -> &'static str {
        match self {
            Self::NotFound { .. } => {
                "Check repository and tag for typing errors, and that the image was pushed."
            }
            Self::TagMoved { .. } => {
                "Give only the digest to get exactly that image, or only the tag to get what it is now."
            }
            Self::Unreachable { .. } => {
                "Check that the registry runs and that host, port and network are right, then try again."
            }
            Self::AccessRefused { .. } => {
                "Log in with `docker login` as the user that the server runs as, and check that the account may access the repository (some registries answer like this for a repository that does not exist)."
            }
            Self::Registry {
                transient: true, ..
            } => "Try again later.",
            Self::Registry { .. } => "See the registry's log for what it did not like.",
            Self::Damaged { .. } => {
                "Push or build the image again; if it happens again, check the disk."
            }
            Self::Invalid { .. } => "Build the image again with a tool that writes OCI images.",
            Self::UnsafeEntry { .. } => {
                "Do not run this image; if it is your own, remove the entry and build it again."
            }
            Self::TooLarge { .. } => "Make the image smaller, or raise the limit.",
            Self::Unsupported(_) => {
                "Build the image for this platform, with gzip or uncompressed layers."
            }
            Self::Credentials { .. } => "Repair the file, or log in again with `docker login`.",
            Self::Io { .. } => "Check free space and permissions of the folder, then try again.",
            Self::Cancelled => "Start it again if it is still wanted.",
        }
    }

    /// Whether the same call may succeed later without anybody changing anything.
    pub fn is_retryable(&self) -> bool {
        matches!(
            self,
            Self::Unreachable { .. }
                | Self::Registry {
                    transient: true,
                    ..
                }
                | Self::Io { .. }
        )
    }

    /// For `map_err`: what was being done when the file system refused.
    pub(crate) fn io(doing: impl Into<String>) -> impl FnOnce(io::Error) -> Self {
        let doing = doing.into();
        move |source| Self::Io { doing, source }
    }
}
