//! How GitOps remotes are reached: the files with tokens, keys and known hosts that an operator
//! names. What is in them is never in the ledger, in a URL, or in a message.

use std::path::PathBuf;

use clap::Args;
use daybook_events::with_causes;
use daybook_workers::git_transport::{
    GitTransport, HostCredential, SourcePolicy, SshConfig, TransportConfig,
};

use crate::exit::{Code, Failure};

/// Options for GitOps remotes.
#[derive(Debug, Clone, Default, Args)]
pub struct GitopsRemoteArgs {
    /// Tokens for GitOps remotes: a file with a line `https://USER:TOKEN@HOST` for each host, as
    /// `git credential-store` keeps them. They are sent to these hosts only, and only for GitOps
    /// repositories.
    #[arg(long, env = "DAYBOOK_GITOPS_CREDENTIALS", value_name = "FILE")]
    pub gitops_credentials: Option<PathBuf>,
    /// The ssh hosts that GitOps remotes may be on, with their keys, in the form of `known_hosts`.
    /// A host that is not listed is refused.
    #[arg(long, env = "DAYBOOK_GITOPS_KNOWN_HOSTS", value_name = "FILE")]
    pub gitops_known_hosts: Option<PathBuf>,
    /// The private key for GitOps remotes over ssh; the agent's if not given.
    #[arg(long, env = "DAYBOOK_GITOPS_IDENTITY", value_name = "FILE")]
    pub gitops_identity: Option<PathBuf>,
    /// A host of GitOps remotes that may be at a private address, as a forge of one's own is; may
    /// be given several times. Those with a token may be so anyway.
    #[arg(
        long = "gitops-host",
        env = "DAYBOOK_GITOPS_HOSTS",
        value_name = "HOST",
        value_delimiter = ','
    )]
    pub gitops_hosts: Vec<String>,
}

impl GitopsRemoteArgs {
    /// The transport, with every file read. `trusting` allows paths of this machine, private
    /// addresses and plain http.
    pub fn transport(&self, trusting: bool) -> Result<GitTransport, Failure> {
        let credentials = match &self.gitops_credentials {
            None => Vec::new(),
            Some(path) => HostCredential::read_file(path).map_err(|e| {
                Failure::new(Code::Usage, "gitops_credentials_unusable", with_causes(&e))
                    .hint("write a line https://USER:TOKEN@HOST for each host into it")
            })?,
        };
        let mut policy = if trusting {
            SourcePolicy::trusting()
        } else {
            SourcePolicy::default()
        };
        let with_token = credentials.iter().map(|c| c.host.clone());
        policy.private_hosts = with_token
            .chain(self.gitops_hosts.iter().cloned())
            .collect();
        policy.allow_plain_http |= credentials.iter().any(|c| c.allow_plain_http);
        for (flag, path) in [
            ("--gitops-known-hosts", &self.gitops_known_hosts),
            ("--gitops-identity", &self.gitops_identity),
        ] {
            if let Some(path) = path
                && let Err(e) = std::fs::File::open(path)
            {
                return Err(Failure::new(
                    Code::Usage,
                    "gitops_ssh_unusable",
                    format!("{} cannot be read: {e}", path.display()),
                )
                .hint(format!("name a file that is there with {flag} FILE")));
            }
        }
        let mut config = TransportConfig::with_policy(policy);
        config.credentials = credentials;
        config.ssh = SshConfig {
            known_hosts: self.gitops_known_hosts.clone(),
            identity: self.gitops_identity.clone(),
            ..SshConfig::default()
        };
        Ok(GitTransport::new(config))
    }
}
