//! Brings a namespace to what is asked for, and to nothing else.

use std::collections::HashSet;
use std::future::Future;
use std::time::Duration;

use daybook_workers::target::{AppRef, TargetError};
use k8s_openapi::api::core::v1::Namespace;
use kube::api::{DeleteParams, ListParams, Patch, PatchParams, Preconditions, PropagationPolicy};
use kube::core::{ApiResource, DynamicObject, GroupVersionKind};
use kube::{Api, Client, ResourceExt};
use serde_json::json;

use crate::error::refusal;
use crate::names::{ADDRESS, ENVIRONMENT, EPHEMERAL, MANAGED_BY, MANAGER, PROJECT};
use crate::objects::{Kind, Object};

/// An API server that takes longer for an answer is taken for one that does not answer.
pub(crate) const ANSWER_WITHIN: Duration = Duration::from_secs(30);

/// The answer to a request about `what`, if it comes in time.
pub(crate) async fn timely<T>(
    what: &str,
    request: impl Future<Output = kube::Result<T>>,
) -> Result<kube::Result<T>, TargetError> {
    let answer = tokio::time::timeout(ANSWER_WITHIN, request).await;
    answer.map_err(|_| {
        let seconds = ANSWER_WITHIN.as_secs();
        TargetError::Unavailable(format!(
            "{what}: the API server gave no answer within {seconds} s"
        ))
    })
}

/// A namespace, as far as it is Daybook's.
pub(crate) struct Space<'a> {
    pub(crate) client: &'a Client,
    pub(crate) app: &'a AppRef,
    pub(crate) namespace: &'a str,
    pub(crate) ephemeral: bool,
}

/// An object as the API server has it now.
pub(crate) struct Applied {
    pub(crate) uid: String,
    pub(crate) generation: i64,
}

impl Space<'_> {
    /// The namespace, made if it is not there. One that belongs to somebody else is refused.
    pub(crate) async fn ensure(&self) -> Result<(), TargetError> {
        let what = format!("namespace {}", self.namespace);
        let api: Api<Namespace> = Api::all(self.client.clone());
        let found = timely(&what, api.get_opt(self.namespace)).await?;
        let found = found.map_err(|e| refusal(&what, &e))?;
        if let Some(found) = &found {
            if found.metadata.deletion_timestamp.is_some() {
                return Err(TargetError::Unavailable(format!(
                    "{what} is still being deleted"
                )));
            }
            if !self.is_ours(found) {
                return Err(TargetError::Refused(format!(
                    "{what} exists and is not Daybook's. To hand it over, label it: kubectl label \
                     namespace {} {PROJECT}={} {ENVIRONMENT}={}",
                    self.namespace, self.app.project, self.app.environment
                )));
            }
        }
        let body = json!({
            "apiVersion": "v1",
            "kind": "Namespace",
            "metadata": {
                "name": self.namespace,
                "labels": {
                    MANAGED_BY: MANAGER,
                    PROJECT: self.app.project,
                    ENVIRONMENT: self.app.environment,
                    EPHEMERAL: self.ephemeral.to_string(),
                },
            },
        });
        let params = PatchParams::apply(MANAGER);
        let patch = Patch::Apply(body);
        let applied = timely(&what, api.patch(self.namespace, &params, &patch)).await?;
        applied.map(|_| ()).map_err(|e| refusal(&what, &e))
    }

    /// Applies an object server-side. If it is that already, nothing is written.
    pub(crate) async fn apply(&self, object: &Object) -> Result<Applied, TargetError> {
        let what = format!("{} {}", object.kind.kind, object.name);
        let params = PatchParams::apply(MANAGER);
        let api = self.objects(object.kind);
        let patch = Patch::Apply(&object.body);
        let applied = timely(&what, api.patch(&object.name, &params, &patch)).await?;
        let applied = applied.map_err(|e| refusal(&what, &e))?;
        Ok(Applied {
            uid: applied.uid().unwrap_or_default(),
            generation: applied.metadata.generation.unwrap_or_default(),
        })
    }

    /// Removes what Daybook made here and is not in `wanted`, by kind and name.
    pub(crate) async fn prune(
        &self,
        kinds: &[Kind],
        wanted: &HashSet<(Kind, &str)>,
    ) -> Result<(), TargetError> {
        let ours = format!(
            "{MANAGED_BY}={MANAGER},{PROJECT}={},{ENVIRONMENT}={},!{ADDRESS}",
            self.app.project, self.app.environment
        );
        let list = ListParams::default().labels(&ours);
        let delete = DeleteParams {
            propagation_policy: Some(PropagationPolicy::Background),
            ..DeleteParams::default()
        };
        for kind in kinds {
            let what = format!("the {} of namespace {}", kind.plural, self.namespace);
            let api = self.objects(*kind);
            let found = match timely(&what, api.list_metadata(&list)).await? {
                // A cluster that does not know the kind has none of it.
                Err(kube::Error::Api(status)) if status.code == 404 => continue,
                found => found.map_err(|e| refusal(&what, &e))?,
            };
            for object in found {
                let name = object.name_any();
                let is_going = object.metadata.deletion_timestamp.is_some();
                if is_going || wanted.contains(&(*kind, name.as_str())) {
                    continue;
                }
                let what = format!("{} {name}", kind.kind);
                match timely(&what, api.delete(&name, &delete)).await? {
                    Ok(_) => {}
                    Err(kube::Error::Api(status)) if status.code == 404 => {}
                    Err(e) => return Err(refusal(&what, &e)),
                }
            }
        }
        Ok(())
    }

    /// Takes the namespace away, with everything in it; not one that belongs to somebody else.
    pub(crate) async fn remove(&self) -> Result<(), TargetError> {
        let what = format!("namespace {}", self.namespace);
        let api: Api<Namespace> = Api::all(self.client.clone());
        let found = timely(&what, api.get_opt(self.namespace)).await?;
        let found = found.map_err(|e| refusal(&what, &e))?;
        let Some(found) = found.filter(|found| self.is_ours(found)) else {
            return Ok(());
        };
        // The one that was looked at, and not one that was made under its name since.
        let delete = DeleteParams {
            preconditions: Some(Preconditions {
                uid: found.uid(),
                resource_version: None,
            }),
            ..DeleteParams::default()
        };
        match timely(&what, api.delete(self.namespace, &delete)).await? {
            Ok(_) => Ok(()),
            Err(kube::Error::Api(status)) if status.code == 404 => Ok(()),
            Err(e) => Err(refusal(&what, &e)),
        }
    }

    /// Whether a namespace says that it is for this environment.
    fn is_ours(&self, found: &Namespace) -> bool {
        let label = |key| found.labels().get(key).map(String::as_str);
        label(PROJECT) == Some(self.app.project.as_str())
            && label(ENVIRONMENT) == Some(self.app.environment.as_str())
    }

    pub(crate) fn objects(&self, kind: Kind) -> Api<DynamicObject> {
        let (group, version) = match kind.api_version.split_once('/') {
            Some((group, version)) => (group, version),
            None => ("", kind.api_version),
        };
        let gvk = GroupVersionKind::gvk(group, version, kind.kind);
        let resource = ApiResource::from_gvk_with_plural(&gvk, kind.plural);
        Api::namespaced_with(self.client.clone(), self.namespace, &resource)
    }
}
