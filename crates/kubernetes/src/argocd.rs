//! Clusters that Argo CD brings to what the GitOps repository says.
//!
//! An environment is one Application, which points at the repository and is pinned to a commit:
//! what runs is what the ledger has, and what Argo CD says is about exactly that commit. A
//! rollback is a further commit, so that automatic syncing never needs to be off.

mod application;
mod kept;
mod state;

use std::fmt;
use std::sync::Arc;

use daybook_events::{ClusterName, CommitId, ProjectName};
use daybook_workers::gitops::Remotes;
use daybook_workers::target::{AppRef, TargetError};
use kube::api::{DeleteParams, Patch, PatchParams};
use kube::core::{ApiResource, DynamicObject};
use kube::{Api, Client, ResourceExt};
use serde_json::{Value, json};

pub(crate) use application::Application;
pub(crate) use kept::{KINDS, keep, kept, let_go};
pub(crate) use state::State;

use crate::apply::{is_marked, marked, timely};
use crate::differences::differences;
use crate::error::{is_missing, refusal};
use crate::names::{self, ENVIRONMENT, EPHEMERAL, MANAGED_BY, MANAGER, PROJECT};
use crate::objects::{GatewayRef, Object};

/// Asks Argo CD to look at an Application now. It removes the annotation when it does.
const REFRESH: &str = "argocd.argoproj.io/refresh";
/// Has what an Application made go with it.
const FINALIZER: &str = "resources-finalizer.argocd.argoproj.io";
/// The cluster that Argo CD runs in.
const IN_CLUSTER: &str = "https://kubernetes.default.svc";

/// The Argo CD of a cluster.
#[derive(Clone)]
pub struct ArgoCd {
    /// The namespace that it runs in.
    pub namespace: String,
    /// The AppProject that Applications belong to.
    pub project: String,
    /// Where it fetches repositories that have no remote: the address of Daybook's HTTP interface
    /// with `/git`, as it is reached from the cluster. Without, those are refused.
    pub repositories: Option<String>,
    /// The remotes of those that have one.
    pub remotes: Arc<dyn Remotes>,
}

impl fmt::Debug for ArgoCd {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ArgoCd")
            .field("namespace", &self.namespace)
            .finish_non_exhaustive()
    }
}

/// One environment, for Argo CD.
pub(crate) struct Wanted<'a> {
    pub(crate) app: &'a AppRef,
    pub(crate) revision: &'a CommitId,
    pub(crate) cluster: &'a ClusterName,
    pub(crate) gateway: Option<(&'a GatewayRef, &'a str)>,
    pub(crate) ephemeral: bool,
    /// The claims of volumes, which are left as they are once they are made.
    pub(crate) claims: &'a [Object],
}

impl ArgoCd {
    /// Applies the Application of an environment, unless it is so already. One that belongs to
    /// somebody else is refused.
    pub(crate) async fn apply(
        &self,
        client: &Client,
        wanted: &Wanted<'_>,
    ) -> Result<(), TargetError> {
        let name = names::namespace(&wanted.app.project, &wanted.app.environment);
        let what = format!("Application {name}");
        let api = self.objects(client);
        let found = timely(&what, api.get_opt(&name)).await?;
        let found = found.map_err(|e| self.refusal(&what, &e))?;
        if let Some(found) = &found
            && found.metadata.deletion_timestamp.is_some()
        {
            return Err(TargetError::Unavailable(format!(
                "{what} is still being deleted"
            )));
        }
        if found
            .as_ref()
            .is_some_and(|found| !is_ours(found, wanted.app))
        {
            return Err(TargetError::Refused(format!(
                "{what} in namespace {} exists and is not Daybook's. To hand it over, label it: \
                 kubectl label application {name} --namespace {} {PROJECT}={} {ENVIRONMENT}={}",
                self.namespace, self.namespace, wanted.app.project, wanted.app.environment
            )));
        }
        let url = self.url(&wanted.app.project)?;
        let body = self.body(&name, &url, wanted);
        let now = match found.filter(|found| is_so(&body, found)) {
            Some(found) => found,
            None => {
                let patch = Patch::Apply(marked(&body));
                let params = PatchParams::apply(MANAGER);
                let applied = timely(&what, api.patch(&name, &params, &patch)).await?;
                applied.map_err(|e| self.refusal(&what, &e))?
            }
        };
        // By what it says now: nothing may have been seen of it yet.
        let said = now.data.get("status").cloned().unwrap_or_default();
        let said = Application {
            status: serde_json::from_value(said).unwrap_or_default(),
            ..Application::default()
        };
        let is_synced = State::of(Some(&said), wanted.revision) == State::Synced;
        if is_synced || now.annotations().contains_key(REFRESH) {
            return Ok(());
        }
        let refresh = json!({ "metadata": { "annotations": { REFRESH: "normal" } } });
        self.ask(client, &name, refresh).await
    }

    /// Removes the Application of an environment, and with it what it made.
    pub(crate) async fn remove(&self, client: &Client, app: &AppRef) -> Result<(), TargetError> {
        let name = names::namespace(&app.project, &app.environment);
        let what = format!("Application {name}");
        let api = self.api(client);
        let found = match timely(&what, api.get_opt(&name)).await? {
            Ok(found) => found,
            Err(e) => return Err(self.refusal(&what, &e)),
        };
        if !found.is_some_and(|found| is_ours(&found, app)) {
            return Ok(());
        }
        match timely(&what, api.delete(&name, &DeleteParams::default())).await? {
            Ok(_) => Ok(()),
            Err(kube::Error::Api(status)) if status.code == 404 => Ok(()),
            Err(e) => Err(refusal(&what, &e)),
        }
    }

    /// Has Argo CD sync a commit once more. After a sync that failed it does not by itself.
    pub(crate) async fn sync_again(
        &self,
        client: &Client,
        app: &AppRef,
        revision: &CommitId,
    ) -> Result<(), TargetError> {
        let name = names::namespace(&app.project, &app.environment);
        let sync = json!({
            "metadata": { "annotations": { REFRESH: "hard" } },
            "operation": {
                "initiatedBy": { "username": MANAGER },
                "sync": { "revision": revision, "prune": true },
            },
        });
        self.ask(client, &name, sync).await
    }

    /// Asks Argo CD for something once.
    async fn ask(&self, client: &Client, name: &str, what_for: Value) -> Result<(), TargetError> {
        let what = format!("Application {name}");
        // Not the manager that applies it: Argo CD takes away what it was asked for.
        let params = PatchParams {
            field_manager: Some(format!("{MANAGER}-retry")),
            ..PatchParams::default()
        };
        let patch = Patch::Merge(what_for);
        let patched = timely(&what, self.api(client).patch(name, &params, &patch)).await?;
        patched.map(|_| ()).map_err(|e| self.refusal(&what, &e))
    }

    pub(crate) fn api(&self, client: &Client) -> Api<Application> {
        Api::namespaced(client.clone(), &self.namespace)
    }

    /// The same objects, whole.
    fn objects(&self, client: &Client) -> Api<DynamicObject> {
        let kind = ApiResource::erase::<Application>(&());
        Api::namespaced_with(client.clone(), &self.namespace, &kind)
    }

    /// Where Argo CD fetches the repository of a project.
    fn url(&self, project: &ProjectName) -> Result<String, TargetError> {
        let remote = self.remotes.remote_of(project);
        let remote = remote.map_err(|e| TargetError::Unavailable(e.to_string()))?;
        match (remote, &self.repositories) {
            (Some(url), _) => Ok(url.to_string()),
            (None, Some(base)) => Ok(format!("{}/{project}.git", base.trim_end_matches('/'))),
            (None, None) => Err(TargetError::Refused(format!(
                "Argo CD has nowhere to fetch the GitOps repository of {project} from. Give the \
                 project a remote (daybook gitops remote {project} URL), or start \
                 Daybook with --argocd-repositories URL, where clusters reach its HTTP interface"
            ))),
        }
    }

    fn body(&self, name: &str, url: &str, wanted: &Wanted<'_>) -> Value {
        let app = wanted.app;
        let mut parameters = vec![("cluster", wanted.cluster.to_string())];
        if let Some((gateway, domain)) = wanted.gateway {
            parameters.push(("domain", domain.to_owned()));
            parameters.push(("gateway.name", gateway.name.clone()));
            let namespace = gateway.namespace.iter();
            parameters.extend(namespace.map(|n| ("gateway.namespace", n.clone())));
            let section = gateway.section_name.iter();
            parameters.extend(section.map(|n| ("gateway.sectionName", n.clone())));
        }
        let parameters = parameters.into_iter().map(|(key, value)| {
            json!({ "name": format!("daybook-app.{key}"), "value": value, "forceString": true })
        });
        let metadata = json!({
            "name": name,
            "namespace": self.namespace,
            "labels": {
                MANAGED_BY: MANAGER,
                PROJECT: app.project,
                ENVIRONMENT: app.environment,
                EPHEMERAL: wanted.ephemeral.to_string(),
            },
            "finalizers": [FINALIZER],
        });
        let mut body = json!({
            "apiVersion": "argoproj.io/v1alpha1",
            "kind": "Application",
            "metadata": metadata,
            "spec": {
                "project": self.project,
                "destination": {
                    "server": IN_CLUSTER,
                    "namespace": names::namespace(&app.project, &app.environment),
                },
                "source": {
                    "repoURL": url,
                    "targetRevision": wanted.revision,
                    "path": "base",
                    "helm": {
                        "releaseName": app.project,
                        "valueFiles": [format!("../environments/{}/values.yaml", app.environment)],
                        "parameters": parameters.collect::<Vec<_>>(),
                    },
                },
                "syncPolicy": {
                    "automated": { "prune": true, "selfHeal": true },
                    "syncOptions": ["RespectIgnoreDifferences=true"],
                    "retry": {
                        "limit": 2,
                        "backoff": { "duration": "5s", "factor": 2, "maxDuration": "1m" },
                    },
                },
            },
        });
        // What is kept is made larger by Daybook, and cannot be changed otherwise. Claims that are
        // written by hand are made larger where they are written.
        if !wanted.claims.is_empty() {
            let ignored = wanted.claims.iter().map(|claim| {
                json!({ "kind": claim.kind.kind, "name": claim.name, "jsonPointers": ["/spec"] })
            });
            body["spec"]["ignoreDifferences"] = ignored.collect();
        }
        body
    }

    /// As for any other object, but that a cluster without Argo CD is told apart.
    fn refusal(&self, what: &str, error: &kube::Error) -> TargetError {
        match error {
            kube::Error::Api(status) if is_missing(status) => {
                TargetError::Unavailable(format!("{what} is gone; it is made again"))
            }
            kube::Error::Api(status) if status.code == 404 => TargetError::Refused(format!(
                "{what}: {}",
                missing(&self.namespace, "the cluster has no Argo CD")
            )),
            other => refusal(what, other),
        }
    }
}

/// Whether an Application is what it is to be, and nothing that it was to be before. Of its
/// specification nothing is filled in by others.
fn is_so(body: &Value, found: &DynamicObject) -> bool {
    let meta = json!({ "labels": found.labels(), "finalizers": found.finalizers() });
    let wanted = json!({
        "labels": body["metadata"]["labels"],
        "finalizers": body["metadata"]["finalizers"],
    });
    is_marked(body, found)
        && found.data["spec"] == body["spec"]
        && differences(&wanted, &meta).is_empty()
}

/// What helps where there are no Applications.
pub(crate) fn missing(namespace: &str, what: &str) -> String {
    format!(
        "{what} in namespace {namespace}. Install it (kubectl create namespace {namespace}; kubectl \
         apply --server-side --namespace {namespace} --filename \
         https://raw.githubusercontent.com/argoproj/argo-cd/stable/manifests/install.yaml), or start \
         Daybook without --argocd to have it apply directly"
    )
}

/// Whether an Application says that it is for this environment.
fn is_ours(found: &impl ResourceExt, app: &AppRef) -> bool {
    let label = |key| found.labels().get(key).map(String::as_str);
    label(PROJECT) == Some(app.project.as_str())
        && label(ENVIRONMENT) == Some(app.environment.as_str())
}
