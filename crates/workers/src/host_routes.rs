//! The port to Gateways of clusters: where hostnames lead, as a cluster is to serve it.

use std::collections::BTreeMap;

use daybook_events::{DeploymentId, EnvironmentName, Hostname, ProjectName, ServiceName};

/// All hostnames of a project that lead to releases on one cluster.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HostRoutes {
    /// The project.
    pub project: ProjectName,
    /// The hostnames; every other one of the project is served there no more.
    pub hosts: Vec<HostRoute>,
}

/// Where one hostname leads.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HostRoute {
    /// The hostname.
    pub hostname: Hostname,
    /// The environment that the releases are in.
    pub environment: EnvironmentName,
    /// Whether that goes away with its pull request.
    pub ephemeral: bool,
    /// The releases that share its traffic.
    pub backends: Vec<HostBackend>,
}

/// One release's part in a hostname's traffic.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HostBackend {
    /// The service.
    pub service: ServiceName,
    /// The deployment that the release is of.
    pub deployment: DeploymentId,
    /// Its share, relative to the others' weights.
    pub weight: u32,
}

/// How a hostname is led on a cluster, as far as is seen of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum RouteSeen {
    /// Nothing can be said of it now.
    Unseen,
    /// As it is to be.
    AsAsked,
    /// There is nothing that leads it.
    Missing {
        /// Where it is to lead.
        expected: String,
    },
    /// Somebody has changed what leads it.
    Changed {
        /// Where it is to lead.
        expected: String,
        /// Where it leads.
        actual: String,
        /// In which fields that differs.
        fields: Vec<String>,
    },
}

/// Why a cluster does not lead all hostnames where they are to lead.
#[derive(Debug, thiserror::Error)]
pub enum RouteError {
    /// Trying again may help.
    #[error("{0}")]
    Unavailable(String),
    /// These hostnames are refused, for these reasons, and go on being refused. The others are led
    /// where they are to lead.
    #[error("{}", reasons(.0))]
    Refused(BTreeMap<Hostname, String>),
}

fn reasons(refused: &BTreeMap<Hostname, String>) -> String {
    let reasons: Vec<_> = refused.values().map(String::as_str).collect();
    reasons.join("; ")
}
