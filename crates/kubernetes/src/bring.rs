//! Brings a cluster to what an environment is to be: by applying its objects, or by handing it to
//! Argo CD.

use std::collections::{BTreeMap, BTreeSet, HashSet};

use daybook_events::{CommitId, DeploymentId};
use daybook_workers::image::LOCAL_HOST;
use daybook_workers::target::{AppRef, Cause, Problem, TargetError};
use daybook_workers::values::{EnvironmentValues, ReleaseValues};
use k8s_openapi::ByteString;
use serde_json::Value;

use crate::apply::Space;
use crate::argocd::{self, Wanted};
use crate::asked::Asked;
use crate::cluster::KubernetesCluster;
use crate::names;
use crate::objects::{self, Kind, Object, Place};

impl KubernetesCluster {
    /// Does what is asked for, as far as it can be done now. `kept` is what is asked for although the
    /// commit does not list it any more.
    pub(crate) async fn bring(
        &self,
        app: &AppRef,
        namespace: &str,
        revision: &CommitId,
        desired: &EnvironmentValues,
        kept: &BTreeSet<DeploymentId>,
    ) -> Result<Asked, TargetError> {
        let options = self.options();
        let gateway = options.gateway.as_ref();
        let place = Place {
            cluster: &options.name,
            namespace,
            gateway: gateway.map(|(gateway, domain)| (gateway, domain.as_str())),
        };
        let space = Space {
            client: &options.client,
            app,
            namespace,
            ephemeral: desired.ephemeral,
        };
        let argocd = options.argocd.as_ref();
        let mut asked = match argocd {
            Some(_) => Asked::by_argocd(revision.clone()),
            None => Asked::new(revision.clone()),
        };
        let mut untouched = Vec::new();
        let all = objects::objects(desired, &place);
        let (claims, mut wanted): (Vec<_>, Vec<_>) = all
            .into_iter()
            .partition(|object| object.kind == Kind::CLAIM);
        if wanted.is_empty() {
            if let Some(argocd) = argocd {
                argocd.remove(&options.client, app).await?;
            }
            // What is kept goes with the environment, and not with its last release.
            if desired.ephemeral && !space.has_claims().await? {
                space.remove().await?;
                return Ok(asked);
            }
        }
        if !wanted.is_empty() {
            space.ensure(!claims.is_empty()).await?;
        }
        let mut sizes = space.claim(&claims, argocd.is_none()).await?;
        for (service, values) in &desired.services {
            for (deployment, release) in &values.releases {
                if !release.clusters.contains(&options.name) {
                    continue;
                }
                for (volume, given) in &release.run.volumes {
                    let claim = names::claim(service, volume);
                    if let Some(problem) = space.enlarge(&claim, given, &mut sizes).await? {
                        asked.holds(*deployment, problem);
                    }
                }
                asked.wants(*deployment, service.clone(), release.run.replicas);
                if let Some(problem) = not_pullable(release) {
                    asked.holds(*deployment, problem);
                }
                let name = names::release(service, *deployment);
                match self
                    .secret(app, &place, desired, *deployment, release)
                    .await
                {
                    Ok(Some(secret)) => wanted.insert(0, secret),
                    Ok(None) => {}
                    Err(problem) => {
                        asked.holds(*deployment, problem);
                        // What it has of them keeps it running.
                        untouched.push(name);
                    }
                }
            }
        }
        if argocd.is_some() {
            for (deployment, values, workload) in workloads(desired, &wanted) {
                asked.handed_over(deployment, values, workload);
            }
            // The values of secrets are in no repository.
            wanted.retain(|object| object.kind == Kind::SECRET);
        }
        // Routes also where none are made any more.
        let all = [
            Kind::HTTP_ROUTE,
            Kind::SERVICE,
            Kind::DEPLOYMENT,
            Kind::AUTOSCALER,
            Kind::DISRUPTION_BUDGET,
            Kind::CONFIG_MAP,
            Kind::SECRET,
        ];
        let kinds = match argocd {
            Some(_) => &[Kind::SECRET],
            None => &all[..],
        };
        let found = space.found(kinds, &wanted).await?;
        for object in &wanted {
            let least = least(desired, &object.name);
            let applied = space.apply(object, &found, least.is_some()).await?;
            let Some(mut applied) = applied else {
                continue;
            };
            if object.kind == Kind::DEPLOYMENT {
                if let Some(least) = least {
                    applied = space.at_least(object, applied, least).await?;
                }
                let body = object.body.clone();
                asked.applied(&object.name, applied.uid, applied.generation, body);
            }
        }
        let mut keep: HashSet<_> = wanted.iter().map(|o| (o.kind, o.name.as_str())).collect();
        keep.extend(untouched.iter().map(|name| (Kind::SECRET, name.as_str())));
        if let Some(argocd) = argocd
            && !asked.releases().is_empty()
        {
            let before = argocd::kept(&space).await?;
            let kept = names_of(desired, |id| kept.contains(&id));
            argocd::keep(&space, &kept).await?;
            let wanted = names_of(desired, |_| true);
            let (mut again, gone): (Vec<_>, Vec<_>) = before
                .into_iter()
                .partition(|(_, name)| wanted.contains(name));
            argocd::let_go(&space, &gone).await?;
            let wanted = Wanted {
                app,
                revision,
                cluster: &options.name,
                gateway: place.gateway,
                ephemeral: desired.ephemeral,
                claims: &claims,
            };
            argocd.apply(&options.client, &wanted).await?;
            // Not before: at the commit before, what is listed again would be removed.
            again.retain(|(_, name)| !kept.contains(name));
            argocd::let_go(&space, &again).await?;
        }
        space.prune(kinds, &found, &keep).await?;
        Ok(asked)
    }

    /// The object with the values of a release's secrets. Values that are not to be had keep only
    /// this release from running.
    async fn secret(
        &self,
        app: &AppRef,
        place: &Place<'_>,
        desired: &EnvironmentValues,
        deployment: DeploymentId,
        release: &ReleaseValues,
    ) -> Result<Option<Object>, Problem> {
        if release.secret_env.is_empty() {
            return Ok(None);
        }
        let values = self
            .options()
            .secrets
            .resolve(&app.project, &release.secret_env)
            .await
            .map_err(|e| {
                let (message, remedy) = (e.to_line(), e.remedy());
                Problem::new(Cause::SecretMissing, message, remedy, e.is_retryable())
            })?;
        let data = values
            .iter()
            .map(|(key, value)| (key.as_str(), ByteString(value.expose().as_bytes().to_vec())));
        Ok(objects::secret(
            desired,
            place,
            deployment,
            data.collect::<BTreeMap<_, _>>(),
        ))
    }
}

/// How the objects of releases are called.
fn names_of(
    desired: &EnvironmentValues,
    which: impl Fn(DeploymentId) -> bool + Copy,
) -> HashSet<String> {
    let releases = desired.services.iter().flat_map(|(service, values)| {
        let ids = values.releases.keys().filter(move |id| which(**id));
        ids.map(move |id| names::release(service, *id))
    });
    releases.collect()
}

/// Each release with the workload that is made of it.
fn workloads<'a>(
    desired: &'a EnvironmentValues,
    objects: &'a [Object],
) -> impl Iterator<Item = (DeploymentId, ReleaseValues, Value)> + 'a {
    let releases = desired.services.iter();
    let releases = releases.flat_map(|(service, values)| {
        let of_service = values.releases.iter();
        of_service.map(move |(id, release)| (service, *id, release))
    });
    releases.filter_map(|(service, id, release)| {
        let name = names::release(service, id);
        let mut objects = objects.iter();
        let workload = objects.find(|o| o.kind == Kind::DEPLOYMENT && o.name == name)?;
        Some((id, release.clone(), workload.body.clone()))
    })
}

/// How many instances an autoscaler keeps of a release at least, if it has one.
fn least(desired: &EnvironmentValues, name: &str) -> Option<u32> {
    let releases = desired.services.iter().flat_map(|(service, values)| {
        let of_service = values.releases.iter();
        of_service.map(move |(id, release)| (names::release(service, *id), &release.run))
    });
    let run = releases.into_iter().find(|(of, _)| of == name)?.1;
    run.autoscaling.as_ref().map(|_| run.replicas)
}

/// An image that only Daybook's own machine has.
fn not_pullable(release: &ReleaseValues) -> Option<Problem> {
    let image = release.image.to_string();
    let local = image.split('/').next() == Some(LOCAL_HOST);
    (local && release.run.replicas > 0).then(|| {
        Problem::new(
            Cause::ImagePullBackOff,
            format!("the image {image} is in no registry, so that no cluster can pull it"),
            "Start Daybook with --image-prefix HOST/PATH, a registry that the cluster reaches, and \
             deploy again.",
            false,
        )
    })
}
