//! The port to what deployments run on. A target converges to the GitOps repository and tells
//! what it observes; it decides nothing.

use std::collections::BTreeSet;
use std::time::Duration;

use async_trait::async_trait;
use daybook_events::routing::{GatewayAddress, Ingresses};
use daybook_events::{
    ClusterName, CommitId, DeploymentId, EnvironmentName, ProjectName, ServiceName,
};
use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use tokio::sync::watch;

use crate::host_routes::{HostRoute, HostRoutes, RouteError, RouteSeen};
use crate::values::EnvironmentValues;

mod cause;

pub use cause::Cause;

/// One Application: a project's environment on one cluster.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct AppRef {
    /// The project.
    pub project: ProjectName,
    /// The environment.
    pub environment: EnvironmentName,
}

/// Why a target could not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum TargetError {
    /// Trying again may help.
    #[error("{0}")]
    Unavailable(String),
    /// It will not work however often it is tried.
    #[error("{0}")]
    Refused(String),
}

/// What is seen of one release on one cluster.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReleaseStatus {
    /// The deployment that it belongs to.
    pub deployment: DeploymentId,
    /// The service.
    pub service: ServiceName,
    /// The GitOps commit that this status is about: never an older one.
    pub revision: CommitId,
    /// What is asked for.
    pub wanted: u32,
    /// The instances that exist.
    pub instances: Vec<InstanceStatus>,
    /// Why it is not (or no longer) as asked for.
    pub problem: Option<Problem>,
    /// How long its image took to be fetched; none if it was there, or that is not known.
    #[serde(default)]
    pub image_pull: Option<Duration>,
}

impl ReleaseStatus {
    /// Instances that are ready now and run what this revision asks for.
    pub fn ready(&self) -> u32 {
        let ready = self.instances.iter().filter(|i| i.ready && !i.outdated);
        u32::try_from(ready.count()).unwrap_or(u32::MAX)
    }
}

/// One running instance: a process, or a pod.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct InstanceStatus {
    /// Its name, unique within the cluster.
    pub name: String,
    /// Where it answers: `127.0.0.1:34567`.
    pub address: String,
    /// Whether its readiness probe succeeds.
    pub ready: bool,
    /// Whether it still runs what an older revision asked for. It serves until its replacement
    /// is ready, and does not count as ready for the present revision.
    #[serde(default)]
    pub outdated: bool,
    /// How often it was restarted.
    pub restarts: u32,
    /// When it was started.
    pub started_at: Timestamp,
}

/// A typed cause, with what helps.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Problem {
    /// In the field's words: that of a [`Cause`], or what the cluster says where it is none of these.
    pub reason: String,
    /// One sentence that says what happened.
    pub message: String,
    /// What to do about it.
    pub remedy: String,
    /// Whether waiting may still mend it. When false the rollout has failed.
    pub transient: bool,
    /// What it usually comes of, the most likely first; empty where that is not known.
    #[serde(default)]
    pub likely_causes: Box<[String]>,
    /// All that may help, beginning with `remedy`.
    #[serde(default)]
    pub remedies: Vec<String>,
}

impl Problem {
    /// One whose cause is known, with what that usually comes of.
    pub fn new(
        cause: Cause,
        message: impl Into<String>,
        remedy: impl Into<String>,
        transient: bool,
    ) -> Self {
        let mut problem = Self::other(cause.as_str(), message, remedy, transient);
        let owned = |all: &[&str]| all.iter().map(|one| (*one).to_owned()).collect::<Vec<_>>();
        problem.likely_causes = owned(cause.likely_causes()).into();
        problem.remedies.extend(owned(cause.remedies()));
        problem
    }

    /// One that is none of the causes that are known.
    pub fn other(
        reason: &str,
        message: impl Into<String>,
        remedy: impl Into<String>,
        transient: bool,
    ) -> Self {
        let remedy = remedy.into();
        Self {
            reason: reason.to_owned(),
            message: message.into(),
            remedies: vec![remedy.clone()],
            remedy,
            transient,
            likely_causes: Box::default(),
        }
    }
}

/// What is seen of an Application.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct AppStatus {
    /// The GitOps commit that the target has applied: everything below is about it.
    pub revision: Option<CommitId>,
    /// Its releases.
    pub releases: Vec<ReleaseStatus>,
    /// Whether the commit was applied whole. If not, applying it again may do so.
    pub is_whole: bool,
}

/// A cluster that deployments run on.
#[async_trait]
pub trait Target: Send + Sync + std::fmt::Debug {
    /// Its name.
    fn cluster(&self) -> &ClusterName;

    /// Takes over a desired state, read from the GitOps repository at `revision`. Returns once it
    /// is accepted; what becomes of it is seen in [`Target::watch`]. Applying the same revision
    /// again changes nothing. Releases that are no longer listed are stopped and removed;
    /// `replicas: 0` stops their instances and keeps the release.
    async fn apply(
        &self,
        app: &AppRef,
        revision: &CommitId,
        desired: &EnvironmentValues,
    ) -> Result<(), TargetError>;

    /// The same, where the repository does not list some of the releases of `desired` any more, and
    /// they are to stay all the same. To a target that brings about what it is given, that is no
    /// different.
    async fn apply_keeping(
        &self,
        app: &AppRef,
        revision: &CommitId,
        desired: &EnvironmentValues,
        kept: &BTreeSet<DeploymentId>,
    ) -> Result<(), TargetError> {
        let _ = kept;
        self.apply(app, revision, desired).await
    }

    /// Tries again, at once and from the start, what is not ready of a release; what is ready is
    /// left alone. Returns once [`Target::watch`] no longer shows the failure of the try before.
    async fn retry(&self, app: &AppRef, deployment: DeploymentId) -> Result<(), TargetError> {
        let _ = (app, deployment);
        Err(TargetError::Refused(
            "this kind of cluster cannot be asked to".into(),
        ))
    }

    /// Removes what the releases of an Application kept from one to the next: its environment is
    /// gone. Targets that keep nothing of that kind have nothing to do.
    async fn remove_volumes(&self, app: &AppRef) -> Result<(), TargetError> {
        let _ = app;
        Ok(())
    }

    /// Whether it makes the objects of Helm charts.
    fn runs_charts(&self) -> bool {
        false
    }

    /// Whether it has a Gateway of its own, which is to serve hostnames.
    fn has_gateway(&self) -> bool {
        false
    }

    /// Leads the hostnames of a project where they are to lead, and none of its others anywhere.
    /// Returns once the cluster's Gateway has taken that. Applying the same again changes nothing.
    async fn route(&self, routes: &HostRoutes) -> Result<(), RouteError> {
        let _ = routes;
        Err(RouteError::Unavailable(
            "this kind of cluster has no Gateway".into(),
        ))
    }

    /// Where its Gateway is reached, as that says itself, now and at each change: in order, each
    /// once, not more than are kept of one. Nothing as long as that is not known.
    fn gateway_addresses(&self) -> Option<watch::Receiver<Option<Vec<GatewayAddress>>>> {
        None
    }

    /// The Ingresses of others that serve hostnames of a project there as well, as they are now:
    /// ordered, and not more than are reported. Nothing where that is not known. They are read, and
    /// never written.
    async fn ingresses(&self, routes: &HostRoutes) -> Option<Ingresses> {
        let _ = routes;
        None
    }

    /// How a hostname of a project is led there, held against how it is to be led. Asks for nothing:
    /// only what is seen already counts.
    fn route_seen(&self, project: &ProjectName, host: &HostRoute) -> RouteSeen {
        let _ = (project, host);
        RouteSeen::Unseen
    }

    /// What is seen of an Application, now and at each change.
    fn watch(&self, app: &AppRef) -> watch::Receiver<AppStatus>;
}
