//! What others have on a cluster for hostnames that lead there.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::names::Hostname;

/// The most Ingresses that a report names.
pub const INGRESSES_MAX: usize = 32;

/// An Ingress (`networking.k8s.io/v1`) of somebody else that serves a hostname which leads to a
/// release on its cluster. It is never written.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, JsonSchema)]
pub struct IngressSeen {
    /// The hostname.
    pub hostname: Hostname,
    /// Its namespace.
    pub namespace: String,
    /// Its name.
    pub name: String,
    /// Where it leads, at most eight of them: `web:80` is a port of a Service.
    pub backends: Vec<String>,
}

/// What is known of the Ingresses of a cluster.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Ingresses {
    /// These serve hostnames that lead there as well; the first of them, where there are too many.
    Seen(Vec<IngressSeen>),
    /// They cannot be read, for this reason.
    Unread(String),
}

impl Default for Ingresses {
    fn default() -> Self {
        Self::Seen(Vec::new())
    }
}
