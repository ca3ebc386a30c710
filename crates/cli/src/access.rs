//! Who may use the HTTP interface of a node, and how it is encrypted: flags, and what they must add
//! up to before a port is bound.

use std::net::SocketAddr;
use std::num::NonZeroU32;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use clap::{Args, ValueEnum};
use daybook_api::access::oidc::Oidc;
use daybook_api::access::token::SecretToken;
use daybook_api::access::{AccessMode, Rate};
use daybook_api::commands::{Caller, Commands, TokenWish};
use daybook_events::access::{AccountName, Grant, Projects, Role};
use daybook_events::{Actor, with_causes};
use rustls::ServerConfig;
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};

use crate::exit::{Code, Failure};

/// Whether the HTTP interface asks who somebody is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Auth {
    /// Nobody is asked; on loopback only.
    Open,
    /// Whatever is not public takes a token.
    Required,
}

/// Who may use the HTTP interface, and how it is encrypted.
#[derive(Debug, Clone, Args)]
pub struct AccessArgs {
    /// Whether the HTTP interface asks for tokens: `open` on loopback and `required` elsewhere, if
    /// not given. The first start with tokens prints one that may do everything, once.
    #[arg(long, env = "DAYBOOK_AUTH", value_enum, value_name = "MODE")]
    pub auth: Option<Auth>,
    /// The certificate of the HTTP interface with its chain, as PEM: it is then served over TLS.
    #[arg(
        long,
        env = "DAYBOOK_TLS_CERT",
        value_name = "FILE",
        requires = "tls_key"
    )]
    pub tls_cert: Option<PathBuf>,
    /// The private key of that certificate, as PEM.
    #[arg(
        long,
        env = "DAYBOOK_TLS_KEY",
        value_name = "FILE",
        requires = "tls_cert"
    )]
    pub tls_key: Option<PathBuf>,
    /// Says that a proxy in front of the HTTP interface encrypts what goes over the network, and that
    /// nobody reaches it but through that proxy.
    #[arg(
        long,
        env = "DAYBOOK_TLS_TERMINATED_BY_PROXY",
        conflicts_with = "tls_cert"
    )]
    pub tls_terminated_by_proxy: bool,
    /// An identity provider whose users may come in, and what they may do: a file that
    /// docs/operating.md describes.
    #[arg(long, env = "DAYBOOK_OIDC", value_name = "FILE")]
    pub oidc: Option<PathBuf>,
    /// How many requests a second each token may send, in the long run; 0 for as many as it likes.
    #[arg(long, env = "DAYBOOK_RATE_LIMIT", default_value_t = 100, value_name = "N", value_parser = clap::value_parser!(u32).range(0..=1_000_000))]
    pub rate_limit: u32,
    /// Make another token that may do everything, and print it once: for when all others are lost.
    #[arg(long)]
    pub new_admin_token: bool,
}

/// The same, checked.
#[derive(Debug, Clone, Default)]
pub struct Access {
    /// Whether tokens are asked for.
    pub mode: AccessMode,
    /// The identity provider, if there is one.
    pub oidc: Option<Arc<Oidc>>,
    /// How often each token may ask.
    pub rate: Option<Rate>,
    /// How it is encrypted, if it is here.
    pub tls: Option<Arc<ServerConfig>>,
    /// Whether another token is to be made that may do everything.
    pub new_admin_token: bool,
}

impl AccessArgs {
    /// Checks what is wanted on an address.
    ///
    /// # Errors
    /// If others than this machine could reach it without saying who they are, or their tokens would
    /// go over the network in the clear; if the certificate cannot be used.
    pub fn check(&self, listen: SocketAddr) -> Result<Access, Failure> {
        let loopback = listen.ip().is_loopback();
        let mode = match self.auth {
            Some(Auth::Open) => AccessMode::Open,
            Some(Auth::Required) => AccessMode::Required,
            None if loopback => AccessMode::Open,
            None => AccessMode::Required,
        };
        if mode == AccessMode::Open && !loopback {
            return Err(usage(
                "open_to_network",
                format!("without authentication, whoever reaches {listen} could deploy"),
                "use --auth required, or listen on loopback: --listen 127.0.0.1:7070",
            ));
        }
        if mode == AccessMode::Open && self.new_admin_token {
            return Err(usage(
                "tokens_not_asked_for",
                "a token to administer with is of use where tokens are asked for",
                "add --auth required",
            ));
        }
        let tls = match (&self.tls_cert, &self.tls_key) {
            (Some(cert), Some(key)) => Some(Arc::new(server_config(cert, key)?)),
            _ => None,
        };
        if !loopback && tls.is_none() && !self.tls_terminated_by_proxy {
            return Err(usage(
                "tls_missing",
                format!("tokens would go to {listen} in the clear"),
                "give --tls-cert and --tls-key, or --tls-terminated-by-proxy if a proxy in front \
                 of it encrypts",
            ));
        }
        let oidc = self.oidc.as_deref().map(identity_provider).transpose()?;
        Ok(Access {
            mode,
            oidc: oidc.map(Arc::new),
            rate: NonZeroU32::new(self.rate_limit).map(Rate::per_second),
            tls,
            new_admin_token: self.new_admin_token,
        })
    }
}

impl Access {
    /// The tokens that this start makes: to be shown once.
    pub async fn make_tokens(&self, commands: &Commands) -> Result<Option<SecretToken>, Failure> {
        if self.mode == AccessMode::Open {
            return Ok(None);
        }
        let failed =
            |e: &dyn std::error::Error| Failure::new(Code::Failure, "no_token", with_causes(e));
        let first = commands.first_token().await.map_err(|e| failed(&e))?;
        if first.is_some() || !self.new_admin_token {
            return Ok(first);
        }
        let name = format!("admin-{:08x}", uuid::Uuid::new_v4().as_fields().0);
        let wish = TokenWish {
            name: AccountName::parse(name).map_err(|e| failed(&e))?,
            account: None,
            grants: vec![Grant {
                role: Role::Admin,
                projects: Projects::All,
            }],
            expires_at: None,
        };
        let operator = Caller::new(Actor::system("access"));
        let made = commands.create_token(&operator, wish).await;
        Ok(Some(made.map_err(|e| failed(&e))?.token))
    }
}

fn usage(code: &str, message: impl Into<String>, hint: &str) -> Failure {
    Failure::new(Code::Usage, code, message).hint(hint)
}

fn identity_provider(file: &Path) -> Result<Oidc, Failure> {
    let unusable = |why: String| {
        usage(
            "oidc_unusable",
            format!("{} cannot be used: {why}", file.display()),
            "docs/operating.md says what stands in it",
        )
    };
    let text = std::fs::read_to_string(file).map_err(|e| unusable(e.to_string()))?;
    let config = toml::from_str(&text).map_err(|e| unusable(e.to_string()))?;
    Oidc::new(config).map_err(|e| unusable(with_causes(&e)))
}

fn server_config(cert: &Path, key: &Path) -> Result<ServerConfig, Failure> {
    let unusable = |file: &Path, why: String| {
        usage(
            "tls_unusable",
            format!("{} cannot be used: {why}", file.display()),
            "give the certificate with its chain and its private key, both as PEM",
        )
    };
    let chain: Vec<_> = CertificateDer::pem_file_iter(cert)
        .and_then(Iterator::collect::<Result<Vec<_>, _>>)
        .map_err(|e| unusable(cert, e.to_string()))?;
    if chain.is_empty() {
        return Err(unusable(cert, "there is no certificate in it".into()));
    }
    let private = PrivateKeyDer::from_pem_file(key).map_err(|e| unusable(key, e.to_string()))?;
    let mut config = ServerConfig::builder()
        .with_no_client_auth()
        .with_single_cert(chain, private)
        .map_err(|e| unusable(cert, e.to_string()))?;
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    Ok(config)
}
