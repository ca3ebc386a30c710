//! The port to Gateways of clusters: where hostnames lead, as a cluster is to serve it.

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
