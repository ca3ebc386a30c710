//! Which addresses may be connected to.

use std::net::SocketAddr;

use super::{SourcePolicy, TransportError};

/// The addresses of a host that may be connected to; at least one.
pub(crate) async fn resolve(
    policy: &SourcePolicy,
    host: &str,
    port: u16,
) -> Result<Vec<SocketAddr>, TransportError> {
    let unavailable = |reason: String| TransportError::Unavailable {
        host: host.to_owned(),
        reason,
    };
    let bare = host.trim_start_matches('[').trim_end_matches(']');
    let found: Vec<SocketAddr> = tokio::net::lookup_host((bare, port))
        .await
        .map_err(|e| unavailable(format!("its name cannot be resolved ({e})")))?
        .collect();
    let Some(first) = found.first() else {
        return Err(unavailable("its name has no address".into()));
    };
    let refused = policy.check_address(host, first.ip());
    let allowed: Vec<SocketAddr> = found
        .into_iter()
        .filter(|a| policy.check_address(host, a.ip()).is_ok())
        .collect();
    if allowed.is_empty() {
        refused?;
    }
    Ok(allowed)
}
