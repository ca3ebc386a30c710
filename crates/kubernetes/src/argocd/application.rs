//! Argo CD's Application, as far as it is read here.

use std::borrow::Cow;

use daybook_workers::target::{Cause, Problem};
use k8s_openapi::NamespaceResourceScope;
use k8s_openapi::api::apps::v1::Deployment;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use serde::Deserialize;
use serde_json::Value;

use super::state::short;

/// `applications.argoproj.io`.
#[derive(Debug, Clone, Default, Deserialize)]
pub(crate) struct Application {
    #[serde(default)]
    pub(crate) metadata: ObjectMeta,
    /// A sync that was asked for and is not begun yet.
    #[serde(default)]
    pub(crate) operation: Option<Value>,
    #[serde(default)]
    pub(crate) status: ApplicationStatus,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(crate) struct ApplicationStatus {
    pub(crate) sync: Sync,
    pub(crate) operation_state: Option<OperationState>,
    pub(crate) conditions: Vec<Condition>,
    pub(crate) resources: Vec<Resource>,
    /// The worst of all its objects.
    pub(crate) health: Option<Health>,
}

/// How the cluster compares to the repository.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(crate) struct Sync {
    /// `Synced`, `OutOfSync` or `Unknown`.
    pub(crate) status: String,
    /// The commit that was compared.
    pub(crate) revision: String,
    pub(crate) compared_to: ComparedTo,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub(crate) struct ComparedTo {
    pub(crate) source: Source,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(crate) struct Source {
    pub(crate) target_revision: String,
}

/// The last sync, or the one that goes on.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(crate) struct OperationState {
    /// `Running`, `Terminating`, `Failed`, `Error` or `Succeeded`.
    pub(crate) phase: String,
    pub(crate) message: String,
    pub(crate) operation: Operation,
    pub(crate) sync_result: Option<SyncResult>,
}

impl OperationState {
    /// The commit that it is about.
    pub(crate) fn revision(&self) -> &str {
        let asked = self.operation.sync.as_ref().map(|s| s.revision.as_str());
        let done = self.sync_result.as_ref().map(|s| s.revision.as_str());
        let known = [done, asked].into_iter().flatten();
        known.into_iter().find(|r| !r.is_empty()).unwrap_or("")
    }
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub(crate) struct Operation {
    pub(crate) sync: Option<AskedSync>,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub(crate) struct AskedSync {
    pub(crate) revision: String,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub(crate) struct SyncResult {
    pub(crate) revision: String,
    pub(crate) resources: Vec<ResourceResult>,
}

/// What became of one object in a sync.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub(crate) struct ResourceResult {
    pub(crate) kind: String,
    pub(crate) name: String,
    /// `Synced`, `SyncFailed`, `Pruned` or `PruneSkipped`.
    pub(crate) status: String,
    pub(crate) message: String,
}

/// Something is the matter: `ComparisonError`, `InvalidSpecError`, `SyncError`, …
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub(crate) struct Condition {
    #[serde(rename = "type")]
    pub(crate) kind: String,
    pub(crate) message: String,
}

/// One object of the Application, as Argo CD sees it.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub(crate) struct Resource {
    pub(crate) kind: String,
    pub(crate) name: String,
    /// None where Argo CD keeps it to itself, as it does by default from version 3.0 on
    /// (`controller.resource.health.persist`).
    pub(crate) health: Option<Health>,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub(crate) struct Health {
    /// `Healthy`, `Progressing`, `Degraded`, `Suspended`, `Missing` or `Unknown`.
    pub(crate) status: String,
    pub(crate) message: String,
}

impl Application {
    /// What Argo CD finds wrong with a workload or, where it does not keep what is wrong with each
    /// object, with all of them together.
    pub(crate) fn unhealthy(&self, workload: &Deployment) -> Option<Problem> {
        let resources = &self.status.resources;
        let is_degraded = |health: &&Health| health.status == "Degraded";
        let (message, remedy) = if resources.iter().any(|r| r.health.is_some()) {
            let mut resources = resources.iter();
            let found = resources.find(|r| {
                r.kind == "Deployment" && Some(&r.name) == workload.metadata.name.as_ref()
            })?;
            let health = found.health.as_ref().filter(is_degraded)?;
            let message = format!(
                "Argo CD says of Deployment {}: {}",
                found.name,
                short(&health.message)
            );
            (message, "Look at the Application in Argo CD.")
        } else {
            self.status.health.as_ref().filter(is_degraded)?;
            let name = self.metadata.name.as_deref().unwrap_or_default();
            (
                format!("Argo CD says that an object of Application {name} is degraded"),
                "Look at the Application in Argo CD: it shows which object that is, which it keeps \
                 only with controller.resource.health.persist=true in argocd-cmd-params-cm.",
            )
        };
        Some(Problem::new(Cause::Degraded, message, remedy, true))
    }
}

impl kube::Resource for Application {
    type DynamicType = ();
    type Scope = NamespaceResourceScope;

    fn kind((): &()) -> Cow<'_, str> {
        "Application".into()
    }
    fn group((): &()) -> Cow<'_, str> {
        "argoproj.io".into()
    }
    fn version((): &()) -> Cow<'_, str> {
        "v1alpha1".into()
    }
    fn plural((): &()) -> Cow<'_, str> {
        "applications".into()
    }
    fn meta(&self) -> &ObjectMeta {
        &self.metadata
    }
    fn meta_mut(&mut self) -> &mut ObjectMeta {
        &mut self.metadata
    }
}
