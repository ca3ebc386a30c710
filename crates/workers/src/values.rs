//! The values files of a GitOps repository: what the package worker writes and a target reads.
//!
//! `environments/<env>/values.yaml` is the whole desired state of an environment. Targets read it
//! at a commit, as Argo CD would, and converge to it.

use std::collections::BTreeMap;

use daybook_events::spec::{PinnedImage, RunSpec};
use daybook_events::{ClusterName, DeploymentId, EnvironmentName, ProjectName, ServiceName};
use serde::{Deserialize, Serialize};

/// One environment's values file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct EnvironmentValues {
    /// The project.
    pub project: ProjectName,
    /// The environment.
    pub environment: EnvironmentName,
    /// Whether the environment goes away with its pull request.
    #[serde(default)]
    pub ephemeral: bool,
    /// Its services.
    #[serde(default)]
    pub services: BTreeMap<ServiceName, ServiceValues>,
}

/// One service of an environment.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct ServiceValues {
    /// The image that was deployed last; a promotion copies it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub image: Option<PinnedImage>,
    /// All releases that exist side by side, by deployment.
    #[serde(default)]
    pub releases: BTreeMap<DeploymentId, ReleaseValues>,
}

/// One release: what one deployment runs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReleaseValues {
    /// What it runs.
    pub image: PinnedImage,
    /// Where it runs: a cluster that is not listed leaves it alone.
    pub clusters: Vec<ClusterName>,
    /// How it runs. `replicas: 0` is a stopped release.
    #[serde(flatten)]
    pub run: RunSpec,
}
