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
    let unusable = |e: kube::config::KubeconfigError| ConnectError::Config(Box::new(e));
    let config = match kubeconfig {
        Some(path) => Kubeconfig::read_from(path),
        None => Kubeconfig::read(),
    };
    let options = KubeConfigOptions {
        context: Some(context.to_owned()),
        ..KubeConfigOptions::default()
    };
    let config = Config::from_custom_kubeconfig(config.map_err(unusable)?, &options).await;
    let mut config = config.map_err(unusable)?;
    // Whoever asks tries again, and says why: not silently, for minutes.
    config.default_retry = false;
    Client::try_from(config).map_err(|e| ConnectError::Config(Box::new(e)))
}
