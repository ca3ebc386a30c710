//! The claims of volumes: made where they are not there yet, made larger where more is asked for, and
//! left alone otherwise, also when the releases that use them go.

use std::collections::HashMap;

use daybook_events::resources::Quantity;
use daybook_events::spec::VolumeSpec;
use daybook_workers::target::{Cause, Problem, TargetError};
use k8s_openapi::api::core::v1::Namespace;
use kube::api::{DeleteParams, ListParams, Patch, PatchParams, PostParams};
use kube::core::DynamicObject;
use kube::{Api, ResourceExt};
use serde_json::json;

use crate::apply::{Space, says_volumes, timely};
use crate::error::refusal;
use crate::names::{ENVIRONMENT, EPHEMERAL, MANAGED_BY, MANAGER, PROJECT, VOLUME};
use crate::objects::{Kind, Object};

/// How large the claims are that are there, as they were asked for, by name.
pub(crate) type Sizes = HashMap<String, Quantity>;

impl Space<'_> {
    /// Makes the claims that are not there yet, if it is not for Argo CD to do so, and refuses those that
    /// are somebody else's. A right to claims is asked for only where there are volumes.
    pub(crate) async fn claim(&self, wanted: &[Object], makes: bool) -> Result<Sizes, TargetError> {
        if wanted.is_empty() {
            return Ok(Sizes::new());
        }
        let mut sizes = Sizes::new();
        for found in self.claims().await? {
            let name = found.name_any();
            let is_wanted = wanted.iter().any(|claim| claim.name == name);
            if is_wanted && found.metadata.deletion_timestamp.is_some() {
                return Err(TargetError::Unavailable(format!(
                    "PersistentVolumeClaim {name} is still being deleted"
                )));
            }
            sizes.insert(name, size_asked(&found));
        }
        for claim in wanted {
            if sizes.contains_key(&claim.name) {
                continue;
            }
            if !makes {
                // Argo CD would take it over by its name, labels and all.
                match self.is_theirs(&claim.name).await? {
                    true => return Err(self.not_ours(&claim.name)),
                    false => continue,
                }
            }
            let what = format!("PersistentVolumeClaim {}", claim.name);
            let body: DynamicObject = serde_json::from_value(claim.body.clone())
                .map_err(|e| TargetError::Refused(format!("{what}: {e}")))?;
            let params = PostParams {
                field_manager: Some(MANAGER.to_owned()),
                ..PostParams::default()
            };
            let api = self.objects(Kind::CLAIM);
            match timely(&what, api.create(&params, &body)).await? {
                Ok(made) => {
                    sizes.insert(claim.name.clone(), size_asked(&made));
                }
                Err(kube::Error::Api(status)) if status.reason == "AlreadyExists" => {
                    // Another process of Daybook may have been first.
                    let now = self.claims().await?;
                    if let Some(found) = now.iter().find(|found| found.name_any() == claim.name) {
                        sizes.insert(claim.name.clone(), size_asked(found));
                        continue;
                    }
                    return Err(self.not_ours(&claim.name));
                }
                Err(e) => return Err(refusal(&what, &e)),
            }
        }
        Ok(sizes)
    }

    /// Whether a claim of this name is there that is somebody else's.
    async fn is_theirs(&self, name: &str) -> Result<bool, TargetError> {
        let list = ListParams::default().fields(&format!("metadata.name={name}"));
        let what = format!("PersistentVolumeClaim {name}");
        let found = timely(&what, self.objects(Kind::CLAIM).list_metadata(&list)).await?;
        let found = found.map_err(|e| refusal(&what, &e))?;
        let ours = [
            (MANAGED_BY, MANAGER),
            (PROJECT, self.app.project.as_str()),
            (ENVIRONMENT, self.app.environment.as_str()),
        ];
        Ok(found.items.iter().any(|found| {
            let labels = found.labels();
            let says = |(key, value): (&str, &str)| labels.get(key).is_some_and(|l| l == value);
            !labels.contains_key(VOLUME) || !ours.into_iter().all(says)
        }))
    }

    fn not_ours(&self, name: &str) -> TargetError {
        TargetError::Refused(format!(
            "PersistentVolumeClaim {name} exists and is not Daybook's. Give the volume another name, \
             or hand the claim over, with its data: kubectl label persistentvolumeclaim {name} \
             --namespace {} {MANAGED_BY}={MANAGER} {PROJECT}={} {ENVIRONMENT}={} {VOLUME}={}",
            self.namespace,
            self.app.project,
            self.app.environment,
            name.split('.').next_back().unwrap_or_default()
        ))
    }

    /// Makes a claim larger that is there and is to be larger. If its storage cannot grow, that is
    /// what keeps the release from running that asks for it.
    pub(crate) async fn enlarge(
        &self,
        name: &str,
        given: &VolumeSpec,
        sizes: &mut Sizes,
    ) -> Result<Option<Problem>, TargetError> {
        let wanted = given.size();
        let Some(there) = sizes.get_mut(name) else {
            return Ok(None);
        };
        // One that says its size in a way that is not read is left as it is.
        if !wanted.exceeds(there) {
            return Ok(None);
        }
        let what = format!("PersistentVolumeClaim {name}");
        // Not the manager of what is applied: Argo CD may be that.
        let params = PatchParams {
            field_manager: Some(format!("{MANAGER}-enlarge")),
            ..PatchParams::default()
        };
        let requests = json!({ "requests": { "storage": wanted } });
        let patch = Patch::Merge(json!({ "spec": { "resources": requests } }));
        let api = self.objects(Kind::CLAIM);
        let grown = match timely(&what, api.patch(name, &params, &patch)).await? {
            Ok(_) => {
                *there = wanted;
                return Ok(None);
            }
            Err(e) => refusal(&what, &e),
        };
        match grown {
            TargetError::Refused(why) => Ok(Some(Problem::new(
                Cause::VolumeNotEnlarged,
                format!("the volume has {there} and is to have {wanted}: {why}"),
                "Ask for the size that it has, or use a StorageClass with allowVolumeExpansion, \
                 and deploy again.",
                false,
            ))),
            unavailable => Err(unavailable),
        }
    }

    /// Whether anything is kept here.
    pub(crate) async fn has_claims(&self) -> Result<bool, TargetError> {
        Ok(self.kept_claims().await?.iter().any(|found| {
            // What is on its way out is kept no more.
            found.metadata.deletion_timestamp.is_none()
        }))
    }

    /// Removes the claims, and the namespace of an environment of a pull request with them, which is
    /// kept as long as they are.
    pub(crate) async fn remove_claims(&self) -> Result<(), TargetError> {
        for found in self.kept_claims().await? {
            let name = found.name_any();
            let what = format!("PersistentVolumeClaim {name}");
            let api = self.objects(Kind::CLAIM);
            match timely(&what, api.delete(&name, &DeleteParams::default())).await? {
                Ok(_) => {}
                Err(kube::Error::Api(status)) if status.code == 404 => {}
                Err(e) => return Err(refusal(&what, &e)),
            }
        }
        let what = format!("namespace {}", self.namespace);
        let api: Api<Namespace> = Api::all(self.client.clone());
        let found = timely(&what, api.get_opt(self.namespace)).await?;
        let found = found.map_err(|e| refusal(&what, &e))?;
        let is_ephemeral =
            |found: Namespace| found.labels().get(EPHEMERAL).is_some_and(|e| e == "true");
        match found.is_some_and(is_ephemeral) {
            true => self.remove().await,
            false => Ok(()),
        }
    }

    /// The claims that are there. An account that may not list them has made none, unless the namespace
    /// says that it has: a right that was taken away since is no reason to let go of what is kept.
    async fn kept_claims(&self) -> Result<Vec<DynamicObject>, TargetError> {
        let found = self.list_claims().await?;
        let denied = match &found {
            Err(kube::Error::Api(status)) if status.code == 403 => Some(status.message.clone()),
            _ => None,
        };
        if let Some(why) = denied
            && !self.has_had_claims().await?
        {
            tracing::warn!(
                namespace = self.namespace,
                "volumes are not looked for: {why}"
            );
            return Ok(Vec::new());
        }
        found.map_err(|e| refusal("the volumes of the environment", &e))
    }

    async fn has_had_claims(&self) -> Result<bool, TargetError> {
        let what = format!("namespace {}", self.namespace);
        let api: Api<Namespace> = Api::all(self.client.clone());
        let found = timely(&what, api.get_opt(self.namespace)).await?;
        let found = found.map_err(|e| refusal(&what, &e))?;
        Ok(found.as_ref().is_some_and(says_volumes))
    }

    async fn claims(&self) -> Result<Vec<DynamicObject>, TargetError> {
        let found = self.list_claims().await?;
        found.map_err(|e| refusal(&format!("the volumes of namespace {}", self.namespace), &e))
    }

    async fn list_claims(&self) -> Result<kube::Result<Vec<DynamicObject>>, TargetError> {
        let ours = format!(
            "{MANAGED_BY}={MANAGER},{PROJECT}={},{ENVIRONMENT}={},{VOLUME}",
            self.app.project, self.app.environment
        );
        let list = ListParams::default().labels(&ours);
        let what = format!("the volumes of namespace {}", self.namespace);
        let found = timely(&what, self.objects(Kind::CLAIM).list(&list)).await?;
        Ok(found.map(|found| found.items))
    }
}

/// How large a claim is to be, as it was asked for.
fn size_asked(claim: &DynamicObject) -> Quantity {
    let size = &claim.data["spec"]["resources"]["requests"]["storage"];
    Quantity::new(size.as_str().unwrap_or_default())
}
