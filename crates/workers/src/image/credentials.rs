//! Registry credentials as `docker login` leaves them.
//!
//! They are read from `config.json` in the folder that `DOCKER_CONFIG` names, else in `~/.docker`,
//! anew for each use, so that a login needs no restart. A credential helper that the file names
//! (`credHelpers`, `credsStore`) is asked. No secret is ever part of an error, a log line or a
//! `Debug` output.

use std::collections::HashMap;
use std::ffi::OsString;
use std::fmt;
use std::io;
use std::path::PathBuf;
use std::process::Stdio;
use std::time::Duration;

use base64::Engine as _;
use oci_client::secrets::RegistryAuth;
use serde::Deserialize;
use tokio::io::AsyncWriteExt as _;
use tokio::process::Command;

use super::ImageError;

/// How long a credential helper may take. Some ask a keychain.
const HELPER_TIMEOUT: Duration = Duration::from_secs(20);

/// What the official tools call Docker Hub in their configuration.
const DOCKER_HUB_KEY: &str = "https://index.docker.io/v1/";

/// What a helper answers as user name when the secret is an identity token.
const TOKEN_USER: &str = "<token>";

/// Where registry credentials are looked up.
#[derive(Clone, Default)]
pub struct Credentials {
    config: Option<PathBuf>,
    helper_path: Option<OsString>,
}

impl fmt::Debug for Credentials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Credentials")
            .field("config", &self.config)
            .finish_non_exhaustive()
    }
}

impl Credentials {
    /// No credentials for any registry.
    pub fn none() -> Self {
        Self::default()
    }

    /// The configuration of the user that this process runs as.
    pub fn from_environment() -> Self {
        let folder = std::env::var_os("DOCKER_CONFIG")
            .filter(|v| !v.is_empty())
            .map(PathBuf::from)
            .or_else(|| std::env::home_dir().map(|home| home.join(".docker")));
        Self {
            config: folder.map(|f| f.join("config.json")),
            helper_path: None,
        }
    }

    /// A configuration file of this name. It need not exist.
    pub fn from_file(config: impl Into<PathBuf>) -> Self {
        Self {
            config: Some(config.into()),
            helper_path: None,
        }
    }

    /// The credentials for a registry, given as `host[:port]`; anonymous if there are none.
    pub(crate) async fn of(&self, registry: &str) -> Result<RegistryAuth, ImageError> {
        let Some(path) = &self.config else {
            return Ok(RegistryAuth::Anonymous);
        };
        let bytes = match tokio::fs::read(path).await {
            Ok(bytes) => bytes,
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(RegistryAuth::Anonymous),
            Err(e) => return Err(self.invalid(e)),
        };
        // The parser's message may quote the text, so only the place is told.
        let config: ConfigFile = serde_json::from_slice(&bytes)
            .map_err(|e| self.invalid(format!("line {} is not as expected", e.line())))?;

        let helper = config
            .helpers
            .iter()
            .find(|(key, _)| host_of(key) == registry)
            .map(|(_, helper)| helper)
            .or(config.store.as_ref())
            .filter(|h| !h.is_empty());
        if let Some(helper) = helper
            && let Some(auth) = self.ask_helper(helper, registry).await?
        {
            return Ok(auth);
        }
        match config
            .auths
            .into_iter()
            .find(|(key, _)| host_of(key) == registry)
        {
            Some((_, entry)) => self.auth_of(entry),
            None => Ok(RegistryAuth::Anonymous),
        }
    }

    fn auth_of(&self, entry: Entry) -> Result<RegistryAuth, ImageError> {
        if let Some(token) = entry.registry_token.filter(|t| !t.is_empty()) {
            return Ok(RegistryAuth::Bearer(token));
        }
        if entry
            .identity_token
            .as_deref()
            .is_some_and(|t| !t.is_empty())
        {
            return Err(self.identity_tokens_unsupported());
        }
        if let (Some(user), Some(password)) = (entry.username, entry.password) {
            return Ok(RegistryAuth::Basic(user, password));
        }
        let Some(encoded) = entry.auth.filter(|a| !a.is_empty()) else {
            return Ok(RegistryAuth::Anonymous);
        };
        let decoded = base64::engine::general_purpose::STANDARD
            .decode(encoded.trim())
            .ok()
            .and_then(|bytes| String::from_utf8(bytes).ok())
            .ok_or_else(|| self.invalid("an `auth` entry is not base64"))?;
        let (user, password) = decoded
            .split_once(':')
            .ok_or_else(|| self.invalid("an `auth` entry is not user:password"))?;
        // Docker pads the password with zero bytes.
        Ok(RegistryAuth::Basic(
            user.to_owned(),
            password.trim_end_matches('\0').to_owned(),
        ))
    }

    /// Asks `docker-credential-<helper>`; `None` if it knows nothing of this registry.
    async fn ask_helper(
        &self,
        helper: &str,
        registry: &str,
    ) -> Result<Option<RegistryAuth>, ImageError> {
        if !helper
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_'))
        {
            return Err(self.invalid("the name of a credential helper is not valid"));
        }
        let program = format!("docker-credential-{helper}");
        let mut command = Command::new(&program);
        if let Some(path) = &self.helper_path {
            command.env("PATH", path);
        }
        let asking = async {
            let mut child = command
                .arg("get")
                .stdin(Stdio::piped())
                .stdout(Stdio::piped())
                .stderr(Stdio::null())
                .kill_on_drop(true)
                .spawn()?;
            if let Some(mut stdin) = child.stdin.take() {
                let key = if registry == host_of(DOCKER_HUB_KEY) {
                    DOCKER_HUB_KEY
                } else {
                    registry
                };
                stdin.write_all(key.as_bytes()).await?;
            }
            child.wait_with_output().await
        };
        let output = match tokio::time::timeout(HELPER_TIMEOUT, asking).await {
            Ok(Ok(output)) => output,
            Ok(Err(e)) => return Err(self.invalid(format!("{program} cannot be run: {e}"))),
            Err(_) => return Err(self.invalid(format!("{program} does not answer"))),
        };
        if !output.status.success() {
            // That is how a helper says that it has none.
            return Ok(None);
        }
        let answer: HelperAnswer = serde_json::from_slice(&output.stdout)
            .map_err(|_| self.invalid(format!("{program} gave an answer that is not valid")))?;
        if answer.username == TOKEN_USER {
            return Err(self.identity_tokens_unsupported());
        }
        Ok(Some(RegistryAuth::Basic(answer.username, answer.secret)))
    }

    fn identity_tokens_unsupported(&self) -> ImageError {
        self.invalid(
            "identity tokens are not supported; log in with a user name and an access token",
        )
    }

    fn invalid(&self, reason: impl ToString) -> ImageError {
        ImageError::Credentials {
            path: self
                .config
                .as_ref()
                .map_or_else(String::new, |p| p.display().to_string()),
            reason: reason.to_string(),
        }
    }
}

#[derive(Deserialize)]
struct ConfigFile {
    #[serde(default)]
    auths: HashMap<String, Entry>,
    #[serde(default, rename = "credHelpers")]
    helpers: HashMap<String, String>,
    #[serde(default, rename = "credsStore")]
    store: Option<String>,
}

#[derive(Deserialize)]
struct Entry {
    auth: Option<String>,
    username: Option<String>,
    password: Option<String>,
    #[serde(rename = "identitytoken")]
    identity_token: Option<String>,
    #[serde(rename = "registrytoken")]
    registry_token: Option<String>,
}

#[derive(Deserialize)]
struct HelperAnswer {
    #[serde(rename = "Username")]
    username: String,
    #[serde(rename = "Secret")]
    secret: String,
}

/// The `host[:port]` of a key in the configuration, which may be a URL.
fn host_of(key: &str) -> &str {
    let rest = key
        .strip_prefix("https://")
        .or_else(|| key.strip_prefix("http://"))
        .unwrap_or(key);
    rest.split('/').next().unwrap_or(rest)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    fn configured(json: &str) -> (tempfile::TempDir, Credentials) {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("config.json");
        std::fs::write(&file, json).unwrap();
        (dir, Credentials::from_file(file))
    }

    #[tokio::test]
    async fn the_entry_of_the_registry_is_found() {
        let (_dir, credentials) = configured(
            r#"{"auths": {
                "127.0.0.1:5000": {"auth": "YWxpY2U6b3BlbiBzZXNhbWU6MQ=="},
                "https://index.docker.io/v1/": {"username": "bob", "password": "p"}
            }}"#,
        );
        let basic = |u: &str, p: &str| RegistryAuth::Basic(u.into(), p.into());
        let local = credentials.of("127.0.0.1:5000").await.unwrap();
        assert!(local == basic("alice", "open sesame:1"));
        assert!(credentials.of("index.docker.io").await.unwrap() == basic("bob", "p"));
        assert!(credentials.of("ghcr.io").await.unwrap() == RegistryAuth::Anonymous);
    }

    #[tokio::test]
    async fn no_file_means_anonymous() {
        let credentials = Credentials::from_file("/nonexistent/config.json");
        assert!(credentials.of("ghcr.io").await.unwrap() == RegistryAuth::Anonymous);
    }

    #[tokio::test]
    async fn errors_do_not_quote_secrets() {
        for broken in [
            r#"{"auths": {"r.example": {"auth": "c2VjcmV0LWNhbmFyeQ=="}}}"#,
            r#"{"auths": {"r.example": {"auth": "canary!canary"}}}"#,
            r#"{"auths": {"r.example": {"auth": canary}}}"#,
            r#"{"auths": {"r.example": "canary"}}"#,
            r#"{"auths": {"r.example": {"identitytoken": "canary"}}}"#,
        ] {
            let (_dir, credentials) = configured(broken);
            let error = credentials.of("r.example").await.unwrap_err();
            assert_eq!(error.code(), "registry_credentials_invalid");
            assert!(!format!("{error} {error:?}").contains("canary"), "{error}");
        }
    }

    #[tokio::test]
    async fn a_helper_is_asked() {
        let (dir, mut credentials) = configured(
            r#"{"credHelpers": {"r.example": "test", "other.example": "test"}, "credsStore": "test"}"#,
        );
        let helper = dir.path().join("docker-credential-test");
        std::fs::write(
            &helper,
            "#!/bin/sh\nread -r key\n[ \"$1 $key\" = \"get r.example\" ] || exit 1\n\
             echo '{\"ServerURL\":\"\",\"Username\":\"carol\",\"Secret\":\"s\"}'\n",
        )
        .unwrap();
        std::fs::set_permissions(&helper, std::fs::Permissions::from_mode(0o755)).unwrap();
        credentials.helper_path = Some(dir.path().as_os_str().to_owned());

        let carol = RegistryAuth::Basic("carol".into(), "s".into());
        assert!(credentials.of("r.example").await.unwrap() == carol);
        assert!(credentials.of("other.example").await.unwrap() == RegistryAuth::Anonymous);
    }

    #[tokio::test]
    async fn a_helper_is_named_and_not_a_path() {
        let (_dir, credentials) = configured(r#"{"credsStore": "x/../../bin/sh"}"#);
        let error = credentials.of("r.example").await.unwrap_err();
        assert_eq!(error.code(), "registry_credentials_invalid");
    }
}
