//! What may be connected to, with which credentials, and how much may be sent and received.

use std::fmt;
use std::net::IpAddr;
use std::path::PathBuf;
use std::time::Duration;

use daybook_events::RepositoryUrl;

use super::{TransportError, is_public};

/// Where repositories may be. The default is what a server open to others needs: `https` and
/// `ssh` to public addresses, and nothing else.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct SourcePolicy {
    /// `file` URLs and absolute paths: whatever the worker's user can read on its machine.
    pub allow_local_paths: bool,
    /// Addresses that are not public: loopback, private networks, link-local (where clouds keep
    /// their metadata), carrier-grade NAT.
    pub allow_private_addresses: bool,
    /// `http` without TLS.
    pub allow_plain_http: bool,
    /// Hosts that may be at private addresses although others may not: a forge of one's own.
    pub private_hosts: Vec<String>,
}

impl SourcePolicy {
    /// All allowed: for one's own machine, where everybody who can reach Daybook could read the
    /// same things without it.
    pub fn trusting() -> Self {
        Self {
            allow_local_paths: true,
            allow_private_addresses: true,
            allow_plain_http: true,
            private_hosts: Vec::new(),
        }
    }

    /// Refuses an address of a host, unless it is public or allowed.
    pub(crate) fn check_address(&self, host: &str, address: IpAddr) -> Result<(), TransportError> {
        if self.allow_private_addresses
            || is_public(address)
            || self
                .private_hosts
                .iter()
                .any(|h| h.eq_ignore_ascii_case(host))
        {
            return Ok(());
        }
        Err(TransportError::AddressRefused {
            host: host.to_owned(),
            address: address.to_string(),
        })
    }

    /// Whether the scheme is allowed. Addresses are checked when they are known.
    pub(crate) fn check_scheme(&self, url: &str) -> Result<(), TransportError> {
        let refused = |what: &'static str, setting: &'static str| {
            Err(TransportError::NotAllowed { what, setting })
        };
        match url.split_once("://").map(|(scheme, _)| scheme) {
            Some("https" | "ssh") => Ok(()),
            Some("http") if self.allow_plain_http => Ok(()),
            Some("http") => refused("plain http", "allow_plain_http"),
            Some("file") | None if self.allow_local_paths => Ok(()),
            Some("file") | None => refused("a local path", "allow_local_paths"),
            Some(_) => refused("this kind of URL", "an https or ssh URL"),
        }
    }
}

/// The path of a local repository, if the URL names one.
pub(crate) fn local_path(url: &RepositoryUrl) -> Option<PathBuf> {
    let s = url.as_str();
    if s.starts_with('/') {
        return Some(PathBuf::from(s));
    }
    let parsed = url::Url::parse(s).ok()?;
    (parsed.scheme() == "file")
        .then(|| parsed.to_file_path().ok())
        .flatten()
}

/// A secret that no `Debug` prints.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(String);

impl Secret {
    /// Wraps a secret.
    pub fn new(value: impl Into<String>) -> Self {
        Self(value.into())
    }

    /// The secret itself.
    pub(crate) fn reveal(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret(…)")
    }
}

/// A user name and password (or token) for one host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HostCredential {
    /// The host, in lowercase.
    pub host: String,
    /// The port; none for the scheme's own.
    pub port: Option<u16>,
    /// The user name. Forges that take a token accept anything here.
    pub username: String,
    /// The password or token.
    pub password: Secret,
    /// Send it over `http` without TLS too, where anybody on the way can read it.
    pub allow_plain_http: bool,
}

/// How the system's `ssh` is run.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SshConfig {
    /// The program.
    pub program: PathBuf,
    /// The known host keys. Without them no ssh URL can be used: a host that is not listed is
    /// refused, never trusted on first use.
    pub known_hosts: Option<PathBuf>,
    /// The private key; none to ask the agent that `SSH_AUTH_SOCK` names.
    pub identity: Option<PathBuf>,
}

impl Default for SshConfig {
    fn default() -> Self {
        Self {
            program: PathBuf::from("ssh"),
            known_hosts: None,
            identity: None,
        }
    }
}

/// Bounds of one operation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TransportLimits {
    /// Most bytes received.
    pub received_bytes: u64,
    /// Most bytes of one request: they are held in memory.
    pub sent_bytes: usize,
    /// For a connection to be made.
    pub connect: Duration,
    /// For the other side to say something.
    pub idle: Duration,
    /// For the whole operation.
    pub total: Duration,
}

impl Default for TransportLimits {
    fn default() -> Self {
        Self {
            received_bytes: 4 << 30,
            sent_bytes: 256 << 20,
            connect: Duration::from_secs(10),
            idle: Duration::from_secs(60),
            total: Duration::from_secs(30 * 60),
        }
    }
}

/// Everything that the transports are made with.
#[derive(Debug, Clone, Default)]
pub struct TransportConfig {
    /// What may be connected to.
    pub policy: SourcePolicy,
    /// Credentials by host.
    pub credentials: Vec<HostCredential>,
    /// How `ssh` is run.
    pub ssh: SshConfig,
    /// Certificates (PEM) trusted besides those of the system, for a forge with a private
    /// certificate authority.
    pub extra_roots: Vec<String>,
    /// Bounds.
    pub limits: TransportLimits,
}

impl TransportConfig {
    /// A configuration with this policy and the defaults for the rest.
    pub fn with_policy(policy: SourcePolicy) -> Self {
        Self {
            policy,
            ..Self::default()
        }
    }

    /// The credential to send to a URL, if there is one and it may be sent there.
    pub(crate) fn credential_for(&self, url: &url::Url) -> Option<&HostCredential> {
        let host = url.host_str()?;
        self.credentials.iter().find(|c| {
            c.host.eq_ignore_ascii_case(host)
                && c.port == url.port()
                && (url.scheme() == "https" || c.allow_plain_http)
        })
    }
}
