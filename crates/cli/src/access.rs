//! Who may use the HTTP interface of a node, and how it is encrypted: flags, and what they must add
//! up to before a port is bound.

use std::io::Write as _;
use std::net::SocketAddr;
use std::num::{NonZeroU32, NonZeroUsize};
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
    /// Whether the HTTP interface asks for tokens. If not given, it is `open` on loopback, and
    /// `required` elsewhere and wherever a proxy, a certificate or an identity provider is named. The
    /// first start with tokens prints one that may do everything, once.
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
    /// How many streams (events, lines, sockets, clones) each token may have open; 0 for as many as it
    /// likes.
    #[arg(long, env = "DAYBOOK_STREAM_LIMIT", default_value_t = 100, value_name = "N", value_parser = clap::value_parser!(u32).range(0..=1_000_000))]
    pub stream_limit: u32,
    /// Make another token that may do everything, and print it once: for when all others are lost.
    #[arg(long)]
    pub new_admin_token: bool,
    /// Write a token that this start makes to this file, for nobody else to read, instead of printing
    /// it: what is printed may be kept as a log.
    #[arg(long, env = "DAYBOOK_ADMIN_TOKEN_FILE", value_name = "FILE")]
    pub admin_token_file: Option<PathBuf>,
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
    /// How many streams each token may have open.
    pub streams_max: Option<NonZeroUsize>,
    /// How it is encrypted, if it is here.
    pub tls: Option<Arc<ServerConfig>>,
    /// Whether another token is to be made that may do everything.
    pub new_admin_token: bool,
    /// Where a token that is made goes instead of being shown.
    pub admin_token_file: Option<PathBuf>,
}

impl AccessArgs {
    /// Checks what is wanted on an address.
    ///
    /// # Errors
    /// If others than this machine could reach it without saying who they are, or their tokens would
    /// go over the network in the clear; if the certificate cannot be used.
    pub fn check(&self, listen: SocketAddr) -> Result<Access, Failure> {
        let loopback = listen.ip().is_loopback();
        // Whoever sets one of these up means others than this machine's users to come in.
        let for_others =
            self.tls_terminated_by_proxy || self.tls_cert.is_some() || self.oidc.is_some();
        let mode = match self.auth {
            Some(Auth::Open) => AccessMode::Open,
            Some(Auth::Required) => AccessMode::Required,
            None if loopback && !for_others => AccessMode::Open,
            None => AccessMode::Required,
        };
        if mode == AccessMode::Open && !loopback {
            return Err(usage(
                "open_to_network",
                format!("without authentication, whoever reaches {listen} could deploy"),
                "use --auth required, or listen on loopback: --listen 127.0.0.1:7070",
            ));
        }
        if mode == AccessMode::Open && self.tls_terminated_by_proxy {
            return Err(usage(
                "open_behind_proxy",
                "without authentication, whoever reaches the proxy could deploy: it comes from \
                 loopback, as everybody does that it lets through",
                "leave --auth open out; tokens are then asked for",
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
            streams_max: NonZeroUsize::new(self.stream_limit as usize),
            tls,
            new_admin_token: self.new_admin_token,
            admin_token_file: self.admin_token_file.clone(),
        })
    }
}

impl AccessArgs {
    /// Checks the address at which nothing is served but how the process does.
    ///
    /// # Errors
    /// As [`check`](Self::check).
    pub fn check_operations(&self, listen: SocketAddr) -> Result<Access, Failure> {
        let loopback = listen.ip().is_loopback();
        if !loopback && self.auth == Some(Auth::Open) {
            return Err(usage(
                "open_to_network",
                format!("without authentication, whoever reaches {listen} could read the metrics"),
                "use --auth required, or an address on loopback: --operations-listen 127.0.0.1:7071",
            ));
        }
        if !loopback && self.tls_cert.is_none() && !self.tls_terminated_by_proxy {
            return Err(usage(
                "tls_missing",
                format!("tokens to read the metrics with would go to {listen} in the clear"),
                "give --tls-cert and --tls-key, or --tls-terminated-by-proxy if what goes there is \
                 encrypted on its way",
            ));
        }
        self.check(listen)
    }
}

/// A token that a start has made.
#[derive(Debug)]
pub enum Made {
    /// To be shown once.
    Shown(SecretToken),
    /// It is in this file.
    Written(PathBuf),
}

impl Access {
    /// The token that this start makes, if it makes one. It is shown or written down once.
    pub async fn make_tokens(&self, commands: &Commands) -> Result<Option<Made>, Failure> {
        if self.mode == AccessMode::Open {
            return Ok(None);
        }
        let Some(file) = &self.admin_token_file else {
            return Ok(self.make(commands).await?.map(Made::Shown));
        };
        let unusable = |e: std::io::Error| {
            usage(
                "token_file_unusable",
                format!("{} cannot be written: {e}", file.display()),
                "name a file in a folder that exists",
            )
        };
        let folder = file.parent().filter(|f| !f.as_os_str().is_empty());
        // Such a file is made with the mode 0600, and before the token: nobody could show that again.
        let mut new =
            tempfile::NamedTempFile::new_in(folder.unwrap_or(Path::new("."))).map_err(unusable)?;
        let Some(token) = self.make(commands).await? else {
            return Ok(None);
        };
        writeln!(new, "{}", token.reveal().as_str())
            .and_then(|()| new.as_file().sync_all())
            .map_err(unusable)?;
        new.persist(file).map_err(|e| unusable(e.error))?;
        Ok(Some(Made::Written(file.clone())))
    }

    async fn make(&self, commands: &Commands) -> Result<Option<SecretToken>, Failure> {
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

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Started {
        #[command(flatten)]
        access: AccessArgs,
    }

    fn mode(listen: &str, args: &[&str]) -> Result<AccessMode, String> {
        let args = [&["daybook"][..], args].concat();
        let started = Started::try_parse_from(args).map_err(|e| e.to_string())?;
        let access = started.access.check(listen.parse().unwrap());
        access.map(|a| a.mode).map_err(|f| f.kind)
    }

    #[test]
    fn whoever_lets_others_in_is_asked_for_tokens() {
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
        let (cert, key, oidc) = (path("cert.pem"), path("key.pem"), path("oidc.toml"));
        let made = rcgen::generate_simple_self_signed(vec!["localhost".to_owned()]).unwrap();
        std::fs::write(&cert, made.cert.pem()).unwrap();
        std::fs::write(&key, made.signing_key.serialize_pem()).unwrap();
        let provider = "issuer = \"https://id.example\"\naudience = [\"daybook\"]\n";
        std::fs::write(&oidc, provider).unwrap();
        let _ = rustls::crypto::ring::default_provider().install_default();

        let loopback = "127.0.0.1:7070";
        assert_eq!(mode(loopback, &[]), Ok(AccessMode::Open));
        let tls = ["--tls-cert", cert.as_str(), "--tls-key", key.as_str()];
        let proxy = ["--tls-terminated-by-proxy"];
        let provider = ["--oidc", oidc.as_str()];
        for args in [&tls[..], &proxy, &provider] {
            assert_eq!(mode(loopback, args), Ok(AccessMode::Required), "{args:?}");
        }
        // Who says so may be asked nobody on their own machine, but not behind a proxy: whoever
        // comes through it comes from loopback.
        for args in [&tls[..], &provider] {
            let open = [args, &["--auth", "open"]].concat();
            assert_eq!(mode(loopback, &open), Ok(AccessMode::Open), "{args:?}");
        }
        let open = [&proxy[..], &["--auth", "open"]].concat();
        for listen in [loopback, "[::1]:7070"] {
            assert_eq!(mode(listen, &open), Err("open_behind_proxy".to_owned()));
        }
        assert_eq!(
            mode("0.0.0.0:7070", &open),
            Err("open_to_network".to_owned())
        );
        assert_eq!(mode("0.0.0.0:7070", &proxy), Ok(AccessMode::Required));
    }
}
