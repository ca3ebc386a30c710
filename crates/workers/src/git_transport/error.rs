//! Why a repository elsewhere could not be read or written.

/// Why an operation on a repository elsewhere did not succeed. No variant ever holds a credential.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TransportError {
    /// The policy does not allow such a URL.
    #[error("{what} is not allowed as a repository here")]
    NotAllowed {
        /// What was asked for.
        what: &'static str,
        /// The setting that would allow it, or what to use instead.
        setting: &'static str,
    },
    /// The host resolves to addresses that may not be connected to.
    #[error("{host} is at {address}, which is not a public address")]
    AddressRefused {
        /// The host.
        host: String,
        /// The refused address.
        address: String,
    },
    /// A redirect that is not followed.
    #[error("the repository's server redirects to {target}, which is not followed: {reason}")]
    RedirectRefused {
        /// Where to, without its query.
        target: String,
        /// Why not.
        reason: String,
    },
    /// There is something, but no git repository; or nothing.
    #[error("{url} is not a git repository: {reason}")]
    NotARepository {
        /// The URL as given.
        url: String,
        /// What was found instead.
        reason: String,
    },
    /// The server wants to know who is asking, or does not accept who is.
    #[error("{host} asks for credentials, {}", if *.sent { "and refuses those it was given" } else { "and none are configured for it" })]
    AuthenticationRequired {
        /// The host.
        host: String,
        /// Whether credentials were sent.
        sent: bool,
    },
    /// The server knows who is asking and says no.
    #[error("{host} refuses access to the repository: {reason}")]
    Forbidden {
        /// The host.
        host: String,
        /// What it says.
        reason: String,
    },
    /// The ssh host's key is not the known one, or none is known.
    #[error("the key of ssh host {host} cannot be verified: {reason}")]
    HostKey {
        /// The host.
        host: String,
        /// What `ssh` says.
        reason: String,
    },
    /// It cannot be reached, or answers that it cannot serve now.
    #[error("{host} cannot be reached: {reason}")]
    Unavailable {
        /// The host, or the path.
        host: String,
        /// What happened.
        reason: String,
    },
    /// More was sent or received than the limits allow.
    #[error("the repository is too large: {what} is limited to {limit} bytes")]
    TooLarge {
        /// What is limited.
        what: &'static str,
        /// The limit.
        limit: u64,
    },
    /// What was received makes no sense, or does not verify.
    #[error("git protocol: {reason}")]
    Protocol {
        /// What is wrong.
        reason: String,
    },
    /// Somebody asked to stop.
    #[error("cancelled")]
    Cancelled,
}

impl TransportError {
    /// A stable code for programs.
    pub fn code(&self) -> &'static str {
        match self {
            Self::NotAllowed { .. } => "source_not_allowed",
            Self::AddressRefused { .. } => "source_address_refused",
            Self::RedirectRefused { .. } => "source_redirect_refused",
            Self::NotARepository { .. } => "not_a_repository",
            Self::AuthenticationRequired { .. } => "source_auth_required",
            Self::Forbidden { .. } => "source_forbidden",
            Self::HostKey { .. } => "source_host_key",
            Self::Unavailable { .. } => "source_unavailable",
            Self::TooLarge { .. } => "source_too_large",
            Self::Protocol { .. } => "source_protocol",
            Self::Cancelled => "cancelled",
        }
    }

    /// Whether the same operation may succeed later without anybody changing anything.
    pub fn is_retryable(&self) -> bool {
        matches!(self, Self::Unavailable { .. } | Self::Protocol { .. })
    }

    /// What to do about it, in one sentence.
    pub fn remedy(&self) -> String {
        match self {
            Self::NotAllowed { setting, .. } => match *setting {
                "an https or ssh URL" => "Use an https or ssh URL.".into(),
                s => format!("Use an https or ssh URL, or allow it with `{s}`."),
            },
            Self::AddressRefused { .. } => {
                "Use a public host, or allow private addresses with `allow_private_addresses`."
                    .into()
            }
            Self::RedirectRefused { .. } => "Use the repository's final URL.".into(),
            Self::NotARepository { .. } => {
                "Check the URL; `git ls-remote <url>` must list its branches.".into()
            }
            Self::AuthenticationRequired { host, .. } => format!(
                "Check the URL (a forge says the same of a repository that does not exist), then \
                 configure a credential for {host}."
            ),
            Self::Forbidden { .. } => {
                "Give the configured credential access to the repository.".into()
            }
            Self::HostKey { host, .. } => format!(
                "Compare the host's key with what its operator publishes, and add it to the \
                 configured known_hosts (`ssh-keyscan {host}` prints it)."
            ),
            Self::Unavailable { .. } => "It is tried again; check the host and the network.".into(),
            Self::TooLarge { .. } => {
                "Make the repository smaller, or raise the transport's limits.".into()
            }
            Self::Protocol { .. } => {
                "Check with `git fsck` on the server that the repository is whole.".into()
            }
            Self::Cancelled => "Start it again if it is still wanted.".into(),
        }
    }

    /// An error of libgit2 for which no transport of ours noted a cause.
    pub(crate) fn from_git(error: &git2::Error) -> Self {
        let reason = super::printable(error.message());
        match error.code() {
            git2::ErrorCode::User => Self::Cancelled,
            _ => Self::Protocol { reason },
        }
    }
}
