//! How Daybook talks to git repositories elsewhere: fetches of sources, and pushes of the GitOps
//! repository.
//!
//! libgit2 speaks the git protocol; the bytes travel over transports of our own, so that what it
//! may connect to is decided here:
//! - `https` (and `http`, where the policy allows it) over reqwest with rustls. Redirects are
//!   followed for the first request only, each hop is checked like the URL itself, and
//!   credentials are dropped when the host changes.
//! - `ssh` by the system's `ssh` program, without the user's configuration and with pinned host
//!   keys.
//! - `file` URLs and absolute paths by libgit2 itself, where the policy allows them.
//!
//! A host name is resolved once, the addresses are checked, and the connection goes to a checked
//! address: a name that resolves to something else a moment later gains nothing.
//!
//! # What is set for the whole process
//!
//! [`prepare_process`] registers the transports, and does two more things, once:
//! - libgit2 stops reading the machine's and the user's git configuration. An `insteadOf`, a
//!   proxy or a `core.autocrlf` there would otherwise change what is fetched, from where, and
//!   what is written.
//! - libgit2's check of a repository's owner (`safe.directory`) is switched off. It exists because
//!   `git` runs programs that a repository's configuration names (hooks, `core.fsmonitor`,
//!   `core.sshCommand`), so that a repository of somebody else is dangerous to stand in. libgit2
//!   runs none of them; but a server that reads a repository on a mounted volume, or serves one
//!   that was created by another user of the same group, would be refused without a reason.

mod address;
mod credentials_file;
mod error;
mod http;
mod policy;
mod session;
mod ssh;

pub(crate) use address::resolve;
pub use credentials_file::CredentialsFileError;
pub use daybook_events::address::is_public;
pub use error::TransportError;
pub(crate) use http::{CheckedResolver, refusal_in};
pub(crate) use policy::local_path;
pub use policy::{
    HostCredential, Secret, SourcePolicy, SshConfig, TransportConfig, TransportLimits,
};
pub(crate) use session::{Session, in_background, printable};

use std::sync::{Arc, OnceLock};

/// Where progress goes, a line at a time, without line breaks or control characters.
pub type Progress = Arc<dyn Fn(String) + Send + Sync>;

/// Progress that nobody wants to see.
pub fn no_progress() -> Progress {
    Arc::new(|_| {})
}

/// The transports with their policy, credentials and limits. Clones share one HTTP client.
#[derive(Clone)]
pub struct GitTransport {
    inner: Arc<Inner>,
}

struct Inner {
    config: TransportConfig,
    client: OnceLock<reqwest::Client>,
}

impl std::fmt::Debug for GitTransport {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("GitTransport")
            .field("config", &self.inner.config)
            .finish_non_exhaustive()
    }
}

impl GitTransport {
    /// Transports under this configuration. Nothing is connected yet.
    pub fn new(config: TransportConfig) -> Self {
        Self {
            inner: Arc::new(Inner {
                config,
                client: OnceLock::new(),
            }),
        }
    }

    /// What they were made with.
    pub fn config(&self) -> &TransportConfig {
        &self.inner.config
    }

    /// The HTTP client, made when it is first needed: a machine without certificates can still
    /// use local repositories.
    fn http_client(&self) -> Result<&reqwest::Client, TransportError> {
        if let Some(client) = self.inner.client.get() {
            return Ok(client);
        }
        let client = http::build_client(&self.inner.config)?;
        Ok(self.inner.client.get_or_init(|| client))
    }
}

/// Registers the transports with libgit2 and shields it from the machine's git configuration (see
/// the module's documentation). Idempotent; everything in this crate that uses libgit2 calls it.
///
/// These are settings of the whole process: a program that uses libgit2 elsewhere too calls this
/// first, before it starts threads.
pub fn prepare_process() -> Result<(), TransportError> {
    static DONE: OnceLock<Result<(), String>> = OnceLock::new();
    DONE.get_or_init(|| register().map_err(|e| e.message().to_owned()))
        .clone()
        .map_err(|reason| TransportError::Protocol {
            reason: format!("libgit2 could not be set up: {reason}"),
        })
}

#[allow(unsafe_code)]
fn register() -> Result<(), git2::Error> {
    use git2::ConfigLevel::{Global, ProgramData, System, XDG};
    use git2::transport::Transport;

    // SAFETY: these change globals of libgit2 without a lock. They run once, inside a
    // `OnceLock`, before any other call that this crate makes to libgit2.
    unsafe {
        for level in [System, Global, XDG, ProgramData] {
            git2::opts::set_search_path(level, "")?;
        }
        git2::opts::set_verify_owner_validation(false)?;
        for scheme in ["http", "https"] {
            git2::transport::register(scheme, |remote| {
                Transport::smart(remote, true, http::HttpTransport::of_this_thread()?)
            })?;
        }
        git2::transport::register("ssh", |remote| {
            Transport::smart(remote, false, ssh::SshTransport::of_this_thread()?)
        })?;
    }
    Ok(())
}
