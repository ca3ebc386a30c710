//! Brings a cluster to what an environment is to be: by applying its objects, or by handing it to
//! Argo CD.

use std::collections::{BTreeMap, BTreeSet, HashSet};

use daybook_events::secret::SecretRef;
use daybook_events::{CommitId, DeploymentId, EnvKey, ServiceName};
use daybook_workers::charts::objects::{CHART, stopped};
use daybook_workers::image::LOCAL_HOST;
use daybook_workers::target::{AppRef, Cause, Problem, TargetError};
use daybook_workers::values::{EnvironmentValues, ReleaseValues, RenderedChart};
use k8s_openapi::ByteString;
use kube::ResourceExt as _;
use kube::core::DynamicObject;
use serde_json::Value;

use crate::apply::{Space, as_found, scales};
use crate::argocd::{self, Wanted};
use crate::asked::{Asked, Chart};
use crate::cluster::KubernetesCluster;
use crate::names;
use crate::objects::{self, Kind, Object, Place};
use crate::owners;

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
            }
            for (deployment, chart) in &values.charts {
                if chart.clusters.contains(&options.name) {
                    want_chart(&mut asked, service, *deployment, chart, namespace);
                }
            }
            let of_images = values.releases.iter();
            let of_images = of_images.map(|(id, r)| (*id, &r.clusters, &r.secret_env));
            let of_charts = values.charts.iter();
            let of_charts = of_charts.map(|(id, c)| (*id, &c.clusters, &c.secret_env));
            for (deployment, clusters, secret_env) in of_images.chain(of_charts) {
                if !clusters.contains(&options.name) {
                    continue;
                }
                let secret = self.secret(app, &place, desired, deployment, secret_env);
                match secret.await {
                    Ok(Some(secret)) => wanted.insert(0, secret),
                    Ok(None) => {}
                    Err(problem) => {
                        asked.holds(deployment, problem);
                        // What it has of them keeps it running.
                        untouched.push(names::release(service, deployment));
                    }
                }
            }
        }
        let has_charts = desired.services.values().any(|s| !s.charts.is_empty());
        if argocd.is_some() {
            if has_charts {
                // It is looked at and no more: what Argo CD makes is not Daybook's to remove.
                let kinds = [argocd::KINDS.as_slice(), &Kind::OF_CHARTS].concat();
                let there = space.found(&kinds, &BTreeSet::new()).await?;
                let withheld = owners::withheld(&space, &wanted, &there, &asked).await?;
                for object in withheld.into_iter().rev() {
                    asked.holds(object.deployment, object.problem);
                }
            }
            for (deployment, values, workload) in workloads(desired, &wanted) {
                asked.handed_over(deployment, values, workload);
            }
            // The values of secrets are in no repository.
            wanted.retain(|object| object.kind == Kind::SECRET);
        }
        // Routes also where none are made any more.
        let mut kinds = match argocd {
            Some(_) => vec![Kind::SECRET],
            None => vec![
                Kind::HTTP_ROUTE,
                Kind::SERVICE,
                Kind::DEPLOYMENT,
                Kind::AUTOSCALER,
                Kind::DISRUPTION_BUDGET,
                Kind::CONFIG_MAP,
                Kind::SECRET,
            ],
        };
        // A right that only charts need is missed by their releases, and by no other.
        let of_images = wanted
            .iter()
            .filter(|object| owners::chart_of(object, &asked).is_none());
        let needed = of_images.map(|object| object.kind).collect();
        let mut found = space.found(&kinds, &needed).await?;
        // What only charts make is looked for where there is one, or was: that goes last.
        let is_of_chart = |object: &DynamicObject| object.labels().contains_key(CHART);
        if argocd.is_none() && (has_charts || found.values().any(is_of_chart)) {
            found.extend(space.found(&Kind::OF_CHARTS, &needed).await?);
            drop(kinds.splice(3..3, Kind::OF_CHARTS));
        }
        let kinds = kinds.as_slice();
        // Releases of charts that do not get all that they are to have, and what is left out of them.
        let mut held = BTreeSet::new();
        let mut left_out = Vec::new();
        if argocd.is_none() && has_charts {
            let withheld = owners::withheld(&space, &wanted, &found, &asked).await?;
            let live = owners::live(&found);
            held.extend(withheld.iter().map(|object| object.deployment));
            // Nothing is made of one that is not there yet. One that is goes on with the rest.
            let is_out = |object: &Object| {
                let release = owners::release_of(object);
                release.is_some_and(|id| held.contains(&id) && !live.contains(&id))
                    || withheld.iter().any(|withheld| withheld.is(object))
            };
            (left_out, wanted) = wanted.into_iter().partition(is_out);
            // The first one is what is said.
            for object in withheld.into_iter().rev() {
                asked.holds(object.deployment, object.problem);
            }
        }
        let mut refused = BTreeSet::new();
        for object in &wanted {
            let least = least(desired, &object.name);
            let is_autoscaled = least.is_some() || has_autoscaler(desired, object);
            let chart = owners::chart_of(object, &asked);
            let applied = match chart.is_some_and(|release| refused.contains(&release)) {
                // Nothing is written of it any more. What is so already is still seen as it is.
                true => Ok(as_found(object, &found)),
                false => space.apply(object, &found, is_autoscaled).await,
            };
            let applied = match (applied, chart) {
                // What others make is none of the other releases' concern.
                (Err(TargetError::Refused(why)), Some(release)) => {
                    asked.holds(release, owners::refused(&why));
                    refused.insert(release);
                    None
                }
                (applied, _) => applied?,
            };
            let Some(mut applied) = applied else {
                continue;
            };
            if object.kind == Kind::DEPLOYMENT {
                if let Some(least) = least {
                    applied = space.at_least(object, applied, least).await?;
                }
                let body = &object.body;
                asked.applied(&object.name, applied.uid, applied.generation, body);
            } else if object.kind == Kind::STATEFUL_SET {
                asked.applied_set(&object.name, applied.uid);
            }
        }
        held.extend(refused);
        let mut keep: HashSet<_> = wanted.iter().map(|o| (o.kind, o.name.as_str())).collect();
        keep.extend(untouched.iter().map(|name| (Kind::SECRET, name.as_str())));
        // What is there of a release that does not get all stays, also where it says no more whose it is.
        keep.extend(found.iter().filter_map(|((kind, name), there)| {
            let stays = match owners::says(there) {
                Some(release) => held.contains(&release),
                None => left_out
                    .iter()
                    .any(|object| object.kind == *kind && object.name == *name),
            };
            stays.then_some((*kind, name.as_str()))
        }));
        if let Some(argocd) = argocd
            && !asked.releases().is_empty()
        {
            let before = argocd::kept(&space, has_charts).await?;
            let kept = names_of(desired, namespace, |id| kept.contains(&id));
            argocd::keep(&space, &kept).await?;
            let wanted = names_of(desired, namespace, |_| true);
            let (mut again, gone): (Vec<_>, Vec<_>) = before
                .into_iter()
                .partition(|object| wanted.contains(object));
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
            again.retain(|object| !kept.contains(object));
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
        secret_env: &BTreeMap<EnvKey, SecretRef>,
    ) -> Result<Option<Object>, Problem> {
        if secret_env.is_empty() {
            return Ok(None);
        }
        let values = self
            .options()
            .secrets
            .resolve(&app.project, secret_env)
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

/// Says what is asked for of a release of a chart.
fn want_chart(
    asked: &mut Asked,
    service: &ServiceName,
    deployment: DeploymentId,
    chart: &RenderedChart,
    namespace: &str,
) {
    let objects = objects::rendered_in(chart, namespace);
    let made_of = Chart::of(&objects, &names::release(service, deployment));
    let workloads = made_of.workloads.iter();
    let instances = workloads.map(|w| u64::from(w.instances)).sum::<u64>();
    let instances = u32::try_from(instances).unwrap_or(u32::MAX);
    asked.wants(deployment, service.clone(), instances);
    asked.renders(deployment, made_of);
    let is_to_be = |object: &&Value| !chart.stopped || stopped(object).is_some();
    if objects.len() < chart.objects.iter().filter(is_to_be).count() {
        asked.holds(deployment, not_of_a_chart());
    }
}

/// The objects that Argo CD makes of releases, by kind and name.
fn names_of(
    desired: &EnvironmentValues,
    namespace: &str,
    which: impl Fn(DeploymentId) -> bool,
) -> HashSet<(Kind, String)> {
    let mut names = HashSet::new();
    for (service, values) in &desired.services {
        for id in values.releases.keys().filter(|id| which(**id)) {
            let name = names::release(service, *id);
            names.extend(argocd::KINDS.map(|kind| (kind, name.clone())));
        }
        for (id, chart) in values.charts.iter().filter(|(id, _)| which(**id)) {
            names.insert((Kind::HTTP_ROUTE, names::release(service, *id)));
            let objects = objects::rendered_in(chart, namespace);
            names.extend(objects.into_iter().map(|object| (object.kind, object.name)));
        }
    }
    names
}

/// Something in the repository that Daybook did not put there.
fn not_of_a_chart() -> Problem {
    Problem::other(
        "ObjectUnsupported",
        "the release of the chart has an object in the GitOps repository that no chart may make",
        "Take it out of the environment's values file, or deploy the chart again.",
        false,
    )
}

/// Each release with the workload that is made of it.
fn workloads<'a>(
    desired: &'a EnvironmentValues,
    objects: &'a [Object],
) -> impl Iterator<Item = (DeploymentId, ReleaseValues, &'a Value)> + 'a {
    let releases = desired.services.iter();
    let releases = releases.flat_map(|(service, values)| {
        let of_service = values.releases.iter();
        of_service.map(move |(id, release)| (service, *id, release))
    });
    releases.filter_map(|(service, id, release)| {
        let name = names::release(service, id);
        let mut objects = objects.iter();
        let workload = objects.find(|o| o.kind == Kind::DEPLOYMENT && o.name == name)?;
        Some((id, release.clone(), &workload.body))
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

/// Whether a chart has an autoscaler for a workload, also while its release is stopped.
fn has_autoscaler(desired: &EnvironmentValues, workload: &Object) -> bool {
    let charts = desired.services.values().flat_map(|s| s.charts.values());
    let mut objects = charts.flat_map(|chart| &chart.objects);
    objects.any(|object| scales(object, workload))
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
