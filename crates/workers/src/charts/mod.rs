//! Helm charts of others: fetched once, pinned by digest, and rendered to the objects that are
//! committed.
//!
//! A chart is rendered where the commit is made, and not where it is applied: what runs stands in
//! the GitOps repository word for word, whoever applies it, and neither a cluster nor Argo CD needs
//! the chart's repository (ADR 42).
//!
//! Each deployment of a chart is a release of its own, beside the one before, as those of images are.
//! What could not be beside itself is refused: see [`objects`].

mod egress;
mod helm;
pub mod objects;
mod pods;
mod program;

use std::fmt;

use async_trait::async_trait;
use daybook_events::chart::{ChartReference, ChartValues, ChartVersion, PinnedChart};
use daybook_events::{
    ClusterName, DeploymentId, Digest, EnvironmentName, ProjectName, ServiceName,
};
use serde_json::Value;

use crate::ports::StepError;

pub use helm::{HelmCharts, HelmOptions};

/// Stands in the texts of a chart's values for the name of the release. The Secret with the values
/// of the service's secrets has the same name.
pub const RELEASE_VARIABLE: &str = "$(DAYBOOK_RELEASE)";

/// For which release a chart is rendered.
#[derive(Debug, Clone)]
pub struct ChartRelease<'a> {
    /// The project.
    pub project: &'a ProjectName,
    /// The environment.
    pub environment: &'a EnvironmentName,
    /// Whether the environment goes away with its pull request.
    pub ephemeral: bool,
    /// The service.
    pub service: &'a ServiceName,
    /// The deployment.
    pub deployment: DeploymentId,
    /// What differs from the chart's own values.
    pub values: Option<&'a ChartValues>,
    /// The port that has the traffic where the chart has no Service.
    pub port: u16,
}

impl ChartRelease<'_> {
    /// What the release is called, to Helm and in the cluster.
    pub fn name(&self) -> String {
        format!("{}-{}", self.service, self.deployment.short())
    }
}

/// Charts, fetched and rendered.
#[async_trait]
pub trait Charts: fmt::Debug + Send + Sync + 'static {
    /// Whether what is made of charts can run on a cluster, as far as is known here.
    fn run_on(&self, cluster: &ClusterName) -> bool;

    /// Fetches one version of a chart, unless it is there already, and says its digest. A version that
    /// is not what is `expected` is refused (`chart_changed`), as is one that it was not before.
    async fn pin(
        &self,
        chart: &ChartReference,
        version: &ChartVersion,
        expected: Option<&Digest>,
    ) -> Result<PinnedChart, StepError>;

    /// The objects of a release of a chart, with Daybook's labels and without a namespace. What is not
    /// there any more is fetched again, and is what it was or refused.
    async fn render(
        &self,
        chart: &PinnedChart,
        release: &ChartRelease<'_>,
    ) -> Result<Vec<Value>, StepError>;
}
