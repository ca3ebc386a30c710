//! The servers that the command line knows, and the tokens for them: a file of the user's own.
//!
//! `~/.config/daybook/config.toml`, or what `DAYBOOK_CONFIG` names. Nobody else may read it. A flag
//! goes before the environment, and that before the file. A token goes only to the server that it
//! was kept for.

use std::collections::BTreeMap;
use std::fmt;
use std::fs;
use std::io::{ErrorKind, Write as _};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use zeroize::Zeroizing;

use crate::commands::ServerArgs;
use crate::exit::{Code, Failure};

/// The server where none is named.
pub const DEFAULT_SERVER: &str = "http://127.0.0.1:7070";
/// Has a token.
pub const TOKEN: &str = "DAYBOOK_TOKEN";

/// A token that no debug output shows.
#[derive(Clone, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Token(Zeroizing<String>);

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Token(…)")
    }
}

impl Token {
    /// Takes a text for a token.
    pub fn new(text: &str) -> Self {
        Self(Zeroizing::new(text.trim().to_owned()))
    }

    /// The text, to be sent.
    pub fn text(&self) -> &str {
        &self.0
    }
}

/// A server that one talks to.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Context {
    /// Its URL.
    pub server: String,
    /// What it is shown.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub token: Option<Token>,
    /// Whether the token may go to it in the clear.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub insecure: bool,
}

/// The file.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Contexts {
    /// The context that holds where none is named.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub current: Option<String>,
    /// All of them, by name.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub contexts: BTreeMap<String, Context>,
}

/// Which server a command talks to, and what it shows there.
#[derive(Debug, Clone)]
pub struct Target {
    /// Its URL, without a slash at the end.
    pub server: String,
    /// The token.
    pub token: Option<Token>,
    /// Whether it may go there in the clear.
    pub insecure: bool,
}

impl Target {
    /// Whether what is sent to the server leaves this machine as it is written.
    pub fn is_in_the_clear(&self) -> bool {
        url::Url::parse(&self.server)
            .is_ok_and(|url| url.scheme() == "http" && !on_this_machine(&url))
    }
}

fn on_this_machine(url: &url::Url) -> bool {
    match url.host() {
        Some(url::Host::Domain(name)) => name == "localhost" || name.ends_with(".localhost"),
        Some(url::Host::Ipv4(ip)) => ip.is_loopback(),
        Some(url::Host::Ipv6(ip)) => ip.is_loopback(),
        None => false,
    }
}

fn unusable(file: &Path, why: impl fmt::Display) -> Failure {
    Failure::new(
        Code::Usage,
        "config_unusable",
        format!("{} cannot be used: {why}", file.display()),
    )
    .hint("mend it, or put it away and use `daybook login` again")
}

/// Where the file is.
fn path() -> Result<PathBuf, Failure> {
    if let Some(named) = std::env::var_os("DAYBOOK_CONFIG") {
        return Ok(named.into());
    }
    let base = std::env::var_os("XDG_CONFIG_HOME")
        .filter(|dir| !dir.is_empty())
        .map(PathBuf::from)
        .or_else(|| std::env::var_os("HOME").map(|home| PathBuf::from(home).join(".config")));
    base.map(|dir| dir.join("daybook/config.toml"))
        .ok_or_else(|| {
            Failure::new(
                Code::Usage,
                "config_missing",
                "there is no home folder to keep the configuration in",
            )
            .hint("name a file with DAYBOOK_CONFIG")
        })
}

impl Contexts {
    /// Reads the file; empty if there is none.
    ///
    /// # Errors
    /// If others may read it, or it is not what it should be.
    pub fn load() -> Result<Self, Failure> {
        let Ok(file) = path() else {
            return Ok(Self::default());
        };
        let text = match fs::read_to_string(&file) {
            Ok(text) => Zeroizing::new(text),
            Err(e) if matches!(e.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory) => {
                return Ok(Self::default());
            }
            Err(e) => return Err(unusable(&file, e)),
        };
        #[cfg(unix)]
        {
            use std::os::unix::fs::PermissionsExt as _;
            let mode = fs::metadata(&file)
                .map_err(|e| unusable(&file, e))?
                .permissions()
                .mode();
            if mode & 0o077 != 0 {
                return Err(Failure::new(
                    Code::Usage,
                    "config_readable",
                    format!("others may read {}, which has tokens", file.display()),
                )
                .hint(format!("chmod 600 {}", file.display())));
            }
        }
        // What the parser says quotes the line, which may have a token.
        toml::from_str(&text).map_err(|e| unusable(&file, e.message()))
    }

    /// Writes the file, whole or not at all, for nobody else to read.
    pub fn save(&self) -> Result<PathBuf, Failure> {
        let file = path()?;
        let folder = file.parent().unwrap_or(Path::new("."));
        fs::create_dir_all(folder).map_err(|e| unusable(&file, e))?;
        let text = toml::to_string_pretty(self).map_err(|e| unusable(&file, e))?;
        let text = Zeroizing::new(text);
        // Such a file is made with the mode 0600.
        let mut new = tempfile::NamedTempFile::new_in(folder).map_err(|e| unusable(&file, e))?;
        new.write_all(text.as_bytes())
            .and_then(|()| new.as_file().sync_all())
            .map_err(|e| unusable(&file, e))?;
        new.persist(&file).map_err(|e| unusable(&file, e.error))?;
        Ok(file)
    }

    /// A context that must exist.
    pub fn find(&self, name: &str) -> Result<&Context, Failure> {
        self.contexts.get(name).ok_or_else(|| {
            let names: Vec<_> = self.contexts.keys().map(String::as_str).collect();
            let failure = Failure::new(
                Code::NotFound,
                "context_not_found",
                format!("there is no context {name}"),
            );
            match names.as_slice() {
                [] => failure.hint("make one with `daybook login`"),
                names => failure.hint(format!("use one of: {}", names.join(", "))),
            }
        })
    }
}

/// Which server the arguments, the environment and the file name, in this order.
pub fn target(args: &ServerArgs) -> Result<Target, Failure> {
    let file = Contexts::load()?;
    let (url, name) = match (&args.server, &args.context) {
        (None, None) => match variable("DAYBOOK_URL") {
            Some(url) => (Some(url), None),
            None => (None, variable("DAYBOOK_CONTEXT")),
        },
        (url, name) => (url.clone(), name.clone()),
    };
    let current = file.current.as_ref().and_then(|n| file.contexts.get(n));
    let chosen = match (&name, &url) {
        (Some(name), _) => Some(file.find(name)?),
        (None, Some(_)) => None,
        (None, None) => current,
    };
    let server = url.as_deref().or(chosen.map(|c| c.server.as_str()));
    let server = server
        .unwrap_or(DEFAULT_SERVER)
        .trim_end_matches('/')
        .to_owned();
    // Of several contexts of the server, the one that commands go to anyway.
    let fits = |c: &&Context| c.server.trim_end_matches('/') == server;
    let context = chosen
        .or_else(|| current.filter(fits))
        .or_else(|| file.contexts.values().find(fits));
    let kept = || context.and_then(|c| c.token.clone());
    let token = match (&args.token_file, &args.context) {
        // Whoever names a context means its token: another one would go to a server it is not for.
        (None, Some(_)) if kept().is_some() => kept(),
        _ => match (token_file(args), variable(TOKEN)) {
            (Some(file), _) => Some(read_token(&file)?),
            (None, Some(token)) => Some(Token::new(&token)),
            (None, None) => kept(),
        },
    };
    Ok(Target {
        server,
        token,
        insecure: args.insecure || context.is_some_and(|c| c.insecure),
    })
}

/// The file with the token, if the arguments or the environment name one.
pub fn token_file(args: &ServerArgs) -> Option<PathBuf> {
    let named = || variable("DAYBOOK_TOKEN_FILE").map(PathBuf::from);
    args.token_file.clone().or_else(named)
}

fn variable(name: &str) -> Option<String> {
    std::env::var(name).ok().filter(|v| !v.trim().is_empty())
}

fn read_token(file: &Path) -> Result<Token, Failure> {
    let text = fs::read_to_string(file).map(Zeroizing::new).map_err(|e| {
        Failure::new(
            Code::Usage,
            "token_unreadable",
            format!("the token file {} cannot be read: {e}", file.display()),
        )
    })?;
    Ok(Token::new(&text))
}
