//! Brings a namespace to what is asked for, and to nothing else. What is so already is not written.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::future::Future;
use std::time::Duration;

use daybook_workers::target::{AppRef, TargetError};
use k8s_openapi::api::core::v1::Namespace;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::api::{DeleteParams, ListParams, Patch, PatchParams, Preconditions, PropagationPolicy};
use kube::core::{ApiResource, DynamicObject, GroupVersionKind};
use kube::{Api, Client, ResourceExt};
use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};

use crate::differences::differences;
use crate::error::{conflicts_in, is_denied, refusal, refusal_of_gateway_api};
use crate::names::{ADDRESS, ENVIRONMENT, EPHEMERAL, MANAGED_BY, MANAGER, PROJECT, VOLUMES};
use crate::objects::{Kind, Object};
use crate::routes::otherwise;

/// The annotation with the digest of what an object was applied as, without this annotation.
///
/// Looking at an object shows what is otherwise than it is to be, and not what is there without
/// being asked for any more: what was asked for last does.
const APPLIED: &str = "daybook.dev/applied";

/// What a namespace says of its volumes.
const KEPT: &str = "kept";

/// The field that an autoscaler sets.
const REPLICAS: &str = ".spec.replicas";

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

/// The field manager of the number of instances that an autoscaler begins with.
const BEGINS: &str = "daybook-begins";

/// An object as the API server has it now.
pub(crate) struct Applied {
    pub(crate) uid: String,
    pub(crate) generation: i64,
    replicas: u64,
}

impl Applied {
    fn of(object: &DynamicObject) -> Self {
        Self {
            uid: object.uid().unwrap_or_default(),
            generation: object.metadata.generation.unwrap_or_default(),
            replicas: object.data["spec"]["replicas"].as_u64().unwrap_or(1),
        }
    }
}

/// What Daybook has in a namespace, by kind and name.
pub(crate) type Found = HashMap<(Kind, String), DynamicObject>;

impl Space<'_> {
    /// The namespace, made if it is not there. One that belongs to somebody else is refused. From when
    /// it has volumes on, it says so for good.
    pub(crate) async fn ensure(&self, has_volumes: bool) -> Result<(), TargetError> {
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
        let mut labels = json!({
            MANAGED_BY: MANAGER,
            PROJECT: self.app.project,
            ENVIRONMENT: self.app.environment,
            EPHEMERAL: self.ephemeral.to_string(),
        });
        if has_volumes || found.as_ref().is_some_and(says_volumes) {
            labels[VOLUMES] = json!(KEPT);
        }
        if found.is_some_and(|found| differences(&labels, &json!(found.labels())).is_empty()) {
            return Ok(());
        }
        let body = json!({
            "apiVersion": "v1",
            "kind": "Namespace",
            "metadata": { "name": self.namespace, "labels": labels },
        });
        let params = PatchParams::apply(MANAGER);
        let patch = Patch::Apply(body);
        let applied = timely(&what, api.patch(self.namespace, &params, &patch)).await?;
        applied.map(|_| ()).map_err(|e| refusal(&what, &e))
    }

    /// What of these kinds Daybook has here, as the API server has it now. Of those that releases go
    /// without, only what is `needed` has to be had.
    pub(crate) async fn found(
        &self,
        kinds: &[Kind],
        needed: &BTreeSet<Kind>,
    ) -> Result<Found, TargetError> {
        let is_spare =
            |kind: Kind| kind.is_optional() || kind.is_spare() && !needed.contains(&kind);
        let ours = format!(
            "{MANAGED_BY}={MANAGER},{PROJECT}={},{ENVIRONMENT}={},!{ADDRESS}",
            self.app.project, self.app.environment
        );
        let list = ListParams::default().labels(&ours);
        let mut all = Found::new();
        for kind in kinds {
            let what = format!("the {} of namespace {}", kind.plural, self.namespace);
            let found = match timely(&what, self.objects(*kind).list(&list)).await? {
                // A cluster that does not know the kind has none of it.
                Err(kube::Error::Api(status)) if status.code == 404 => continue,
                Err(kube::Error::Api(status)) if status.code == 403 && is_spare(*kind) => continue,
                found => found.map_err(|e| refusal(&what, &e))?,
            };
            all.extend(found.into_iter().map(|o| ((*kind, o.name_any()), o)));
        }
        Ok(all)
    }

    /// The object of this kind and name, whosever it is, unless it is going.
    pub(crate) async fn there(&self, object: &Object) -> Result<Option<ObjectMeta>, TargetError> {
        let what = format!("{} {}", object.kind.kind, object.name);
        let api = self.objects(object.kind);
        // Listed, as everything that is looked at is: no other right is asked for.
        let list = ListParams::default().fields(&format!("metadata.name={}", object.name));
        match timely(&what, api.list_metadata(&list)).await? {
            Ok(there) => {
                let mut there = there.items.into_iter().map(|there| there.metadata);
                Ok(there.find(|there| there.deletion_timestamp.is_none()))
            }
            // The release goes without.
            Err(e) if object.kind.is_optional() && is_denied(&e) => Ok(None),
            Err(e) if object.kind == Kind::HTTP_ROUTE => Err(refusal_of_gateway_api(&what, &e)),
            Err(e) => Err(refusal(&what, &e)),
        }
    }

    /// Applies an object server-side, unless what was found shows that it is so already. Where an
    /// autoscaler belongs to a workload, its number of instances may be taken back from it. None if
    /// the release goes without the object.
    pub(crate) async fn apply(
        &self,
        object: &Object,
        found: &Found,
        is_autoscaled: bool,
    ) -> Result<Option<Applied>, TargetError> {
        if let Some(found) = as_found(object, found) {
            return Ok(Some(found));
        }
        let what = format!("{} {}", object.kind.kind, object.name);
        let params = PatchParams::apply(MANAGER);
        let api = self.objects(object.kind);
        let patch = Patch::Apply(match object.kind {
            // No digest of values is put anywhere.
            Kind::SECRET => object.body.clone(),
            _ => marked(&object.body),
        });
        let mut applied = timely(&what, api.patch(&object.name, &params, &patch)).await?;
        let mut autoscalers = found
            .iter()
            .filter(|((kind, _), _)| *kind == Kind::AUTOSCALER);
        // Also where somebody has taken the autoscaler away, and its number is still there.
        let was_autoscaled = [Kind::DEPLOYMENT, Kind::STATEFUL_SET].contains(&object.kind)
            && (is_autoscaled
                || autoscalers.any(|(_, autoscaler)| scales(&autoscaler.data, object)));
        if was_autoscaled && applied.as_ref().is_err_and(|e| conflicts_in(e, REPLICAS)) {
            // The autoscaler's number, which is not its to set any more.
            let params = params.force();
            applied = timely(&what, api.patch(&object.name, &params, &patch)).await?;
        }
        match applied {
            Ok(applied) => Ok(Some(Applied::of(&applied))),
            Err(e) if object.kind.is_optional() && is_denied(&e) => {
                tracing::warn!(namespace = self.namespace, "{what} is not made: {e}");
                Ok(None)
            }
            Err(e) if object.kind == Kind::HTTP_ROUTE => Err(refusal_of_gateway_api(&what, &e)),
            Err(e) => Err(refusal(&what, &e)),
        }
    }

    /// Has a workload begin with the least number of instances that its autoscaler is to keep,
    /// rather than with one until the autoscaler looks at it for the first time.
    pub(crate) async fn at_least(
        &self,
        object: &Object,
        applied: Applied,
        least: u32,
    ) -> Result<Applied, TargetError> {
        if applied.replicas >= least.into() {
            return Ok(applied);
        }
        let what = format!("{} {}", object.kind.kind, object.name);
        let params = PatchParams {
            field_manager: Some(BEGINS.to_owned()),
            ..PatchParams::default()
        };
        let patch = Patch::Merge(json!({ "spec": { "replicas": least } }));
        let api = self.objects(object.kind);
        let begun = timely(&what, api.patch(&object.name, &params, &patch)).await?;
        let begun = begun.map_err(|e| refusal(&what, &e))?;
        Ok(Applied::of(&begun))
    }

    /// Removes what was found here and is not in `wanted`, by kind and name, in the order of `kinds`.
    pub(crate) async fn prune(
        &self,
        kinds: &[Kind],
        found: &Found,
        wanted: &HashSet<(Kind, &str)>,
    ) -> Result<(), TargetError> {
        let delete = DeleteParams {
            propagation_policy: Some(PropagationPolicy::Background),
            ..DeleteParams::default()
        };
        let mut in_order: Vec<_> = found.iter().collect();
        in_order.sort_by_key(|((kind, _), _)| kinds.iter().position(|k| k == kind));
        for ((kind, name), object) in in_order {
            let is_going = object.metadata.deletion_timestamp.is_some();
            if is_going || wanted.contains(&(*kind, name.as_str())) {
                continue;
            }
            let what = format!("{} {name}", kind.kind);
            match timely(&what, self.objects(*kind).delete(name, &delete)).await? {
                Ok(_) => {}
                Err(kube::Error::Api(status)) if status.code == 404 => {}
                Err(e) => return Err(refusal(&what, &e)),
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

/// An object as it was found, if it is what it is to be.
pub(crate) fn as_found(object: &Object, found: &Found) -> Option<Applied> {
    let found = found.get(&(object.kind, object.name.clone()))?;
    is_so(object, found).then(|| Applied::of(found))
}

/// Whether Daybook has applied an object, whatever its labels say by now.
pub(crate) fn was_applied(there: &ObjectMeta) -> bool {
    let mut managers = there.managed_fields.iter().flatten();
    managers.any(|by| {
        by.manager.as_deref() == Some(MANAGER) && by.operation.as_deref() == Some("Apply")
    })
}

/// Whether an autoscaler is for a workload.
pub(crate) fn scales(autoscaler: &Value, workload: &Object) -> bool {
    let target = &autoscaler["spec"]["scaleTargetRef"];
    target["kind"] == workload.kind.kind && target["name"] == *workload.name
}

/// Whether a namespace says that it has or had volumes.
pub(crate) fn says_volumes(found: &Namespace) -> bool {
    found.labels().get(VOLUMES).is_some_and(|said| said == KEPT)
}

/// An object that is to be so, with the digest of that.
pub(crate) fn marked(body: &Value) -> Value {
    let mut marked = body.clone();
    marked["metadata"]["annotations"][APPLIED] = json!(digest(body));
    marked
}

/// Whether an object was applied last as it is to be now.
pub(crate) fn is_marked(body: &Value, found: &DynamicObject) -> bool {
    found.annotations().get(APPLIED) == Some(&digest(body))
}

fn digest(body: &Value) -> String {
    hex::encode(Sha256::digest(body.to_string()))
}

/// Whether an object is what it is to be, and nothing that it was to be before.
fn is_so(object: &Object, found: &DynamicObject) -> bool {
    if found.metadata.deletion_timestamp.is_some() {
        return false;
    }
    let of_last_time = match object.kind {
        // The values are all that there is.
        Kind::SECRET => found.data["data"] == object.body["data"],
        _ => is_marked(&object.body, found),
    };
    if !of_last_time {
        return false;
    }
    let mut live = serde_json::to_value(found).unwrap_or_default();
    // The items of a list do not say what they are.
    live["apiVersion"] = json!(object.kind.api_version);
    live["kind"] = json!(object.kind.kind);
    // What somebody has set beside what a route is to be may lead elsewhere. Applying it says whose
    // that is.
    let leads_elsewhere = object.kind == Kind::HTTP_ROUTE
        && !otherwise(&object.body["spec"], &live["spec"]).is_empty();
    !leads_elsewhere && differences(&object.body, &live).is_empty()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_route_that_somebody_has_added_to_is_not_as_it_is_to_be() {
        let body = json!({
            "apiVersion": Kind::HTTP_ROUTE.api_version,
            "kind": Kind::HTTP_ROUTE.kind,
            "metadata": { "name": "web-1", "namespace": "shop--production" },
            "spec": {
                "hostnames": ["web.example.com"],
                "rules": [{
                    "matches": [{ "path": { "type": "PathPrefix", "value": "/" } }],
                    "backendRefs": [{
                        "group": "", "kind": "Service", "name": "web-1", "port": 80, "weight": 1,
                    }],
                }],
            },
        });
        let object = Object {
            kind: Kind::HTTP_ROUTE,
            name: "web-1".to_owned(),
            body,
        };
        let is_so = |change: &dyn Fn(&mut Value)| {
            let mut live = marked(&object.body);
            live["metadata"]["uid"] = json!("1");
            live["status"] = json!({ "parents": [] });
            change(&mut live);
            super::is_so(&object, &serde_json::from_value(live).unwrap())
        };
        assert!(is_so(&|_| {}));
        assert!(is_so(
            &|live| live["metadata"]["labels"]["theirs"] = json!("x")
        ));
        assert!(!is_so(
            &|live| live["spec"]["hostnames"] = json!(["theirs.example.com"])
        ));
        let redirect = json!([{ "type": "RequestRedirect", "requestRedirect": { "port": 1 } }]);
        assert!(!is_so(
            &|live| live["spec"]["rules"][0]["filters"] = redirect.clone()
        ));
        let header = json!([{ "name": "x-beta", "value": "1" }]);
        assert!(!is_so(&|live| {
            live["spec"]["rules"][0]["matches"][0]["headers"] = header.clone();
        }));
    }
}
