//! Reaching a cluster through a context of a kubeconfig.

use std::path::Path;

use kube::config::{KubeConfigOptions, Kubeconfig};
use kube::{Client, Config};

use crate::error::ConnectError;

/// A client for a context. The kubeconfig is the one named, or `$KUBECONFIG`, or
/// `~/.kube/config`.
///
/// # Errors
/// If there is none, it has no such context, or it cannot be used. The server is not asked.
pub async fn connect(kubeconfig: Option<&Path>, context: &str) -> Result<Client, ConnectError> {
    let config = match kubeconfig {
        Some(path) => Kubeconfig::read_from(path),
        None => Kubeconfig::read(),
    };
    let options = KubeConfigOptions {
        context: Some(context.to_owned()),
        ..KubeConfigOptions::default()
    };
    let config = config.map_err(ConnectError::of_kubeconfig)?;
    let config = Config::from_custom_kubeconfig(config, &options).await;
    let mut config = config.map_err(ConnectError::of_kubeconfig)?;
    // Whoever asks tries again, and says why: not silently, for minutes.
    config.default_retry = false;
    Client::try_from(config).map_err(ConnectError::of_client)
}

#[cfg(test)]
mod tests {
    use daybook_events::with_causes;
    use serde_json::{Value, json};

    use super::*;

    /// What is said of a kubeconfig whose user is this one.
    async fn said_of(user: &Value) -> (ConnectError, String) {
        let config = json!({
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{ "name": "test", "cluster": { "server": "http://127.0.0.1:1" } }],
            "users": [{ "name": "test", "user": user }],
            "contexts": [{ "name": "test", "context": { "cluster": "test", "user": "test" } }],
        });
        refused(&config.to_string()).await
    }

    async fn refused(kubeconfig: &str) -> (ConnectError, String) {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("kubeconfig");
        std::fs::write(&file, kubeconfig).unwrap();
        let error = connect(Some(&file), "test").await.err().unwrap();
        let shown = format!("{} {error:?}", with_causes(&error));
        (error, shown)
    }

    #[tokio::test]
    async fn nothing_that_a_credential_plugin_is_given_or_prints_as_one_is_said() {
        let given = |expires: &str| {
            json!({
                "apiVersion": "client.authentication.k8s.io/v1",
                "kind": "ExecCredential",
                "status": { "token": "printed-token", "expirationTimestamp": expires },
            })
        };
        let no_time = format!("echo '{}'", given("printed-token"));
        let cases = [
            (
                "echo printed-token; echo 'log in again' >&2; exit 3",
                "the credential plugin failed (exit status: 3): log in again. Renew what",
            ),
            (
                "echo printed-token; exit 3",
                "the credential plugin failed (exit status: 3). Renew what",
            ),
            (
                "echo 'token: [printed-token'",
                "the credential plugin printed no ExecCredential. Renew what",
            ),
            (no_time.as_str(), "their expiry is no time. Renew what"),
        ];
        for (script, said) in cases {
            let user = json!({ "exec": {
                "apiVersion": "client.authentication.k8s.io/v1",
                "command": "sh",
                "args": ["-c", script],
                "env": [{ "name": "PLUGIN_KEY", "value": "key-of-the-plugin" }],
                "interactiveMode": "Never",
            }});
            let (error, shown) = said_of(&user).await;
            assert!(matches!(error, ConnectError::Unauthenticated(_)), "{shown}");
            assert!(shown.contains(said), "{shown}");
            for secret in ["printed-token", "PLUGIN_KEY", "key-of-the-plugin"] {
                assert!(!shown.contains(secret), "{shown}");
            }
        }
    }

    #[tokio::test]
    async fn a_kubeconfig_that_cannot_be_read_is_not_quoted() {
        let broken = "users:\n- name: test\n  user:\n    token: secret-token\n    exec: [\n";
        let (error, shown) = refused(broken).await;
        assert!(matches!(error, ConnectError::Config(_)), "{shown}");
        assert!(shown.contains("it is no kubeconfig"), "{shown}");
        assert!(!shown.contains("secret-token"), "{shown}");
    }
}
