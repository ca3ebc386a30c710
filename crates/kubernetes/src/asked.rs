//! What was asked of an environment: what is seen is held against it.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use daybook_events::{CommitId, DeploymentId, ServiceName};
use daybook_workers::charts::objects::instances;
use daybook_workers::target::Problem;
use daybook_workers::values::ReleaseValues;
use k8s_openapi::api::apps::v1::Deployment;
use serde_json::Value;

use crate::differences::differences;
use crate::names::VOLUMES;
use crate::objects::{Kind, Object};

/// What was asked of an environment and applied, or handed to Argo CD to be applied.
#[derive(Debug)]
pub struct Asked {
    revision: CommitId,
    releases: BTreeMap<DeploymentId, (ServiceName, u32)>,
    held: HashMap<DeploymentId, Problem>,
    /// What releases of charts are made of.
    charts: BTreeMap<DeploymentId, Chart>,
    by: By,
}

/// What a release of a chart is made of, as far as it is looked at.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Chart {
    /// Its workloads.
    pub(crate) workloads: Vec<Workload>,
    /// The pods that have the traffic have these labels.
    pub(crate) selector: BTreeMap<String, String>,
    /// They have it on this port: its number or its name.
    pub(crate) port: Value,
}

impl Chart {
    /// What these objects are, of which the Service of this name has the traffic.
    pub(crate) fn of(objects: &[Object], name: &str) -> Self {
        let mut services = objects.iter().filter(|o| o.kind == Kind::SERVICE);
        let spec = services.find(|o| o.name == name).map(|o| &o.body["spec"]);
        let selector = spec.and_then(|spec| spec["selector"].as_object());
        let pairs = selector.into_iter().flatten();
        let pairs =
            pairs.filter_map(|(key, value)| Some((key.clone(), value.as_str()?.to_owned())));
        let ports = spec.and_then(|spec| spec["ports"].as_array());
        let port = ports.into_iter().flatten().find(|port| port["port"] == 80);
        let port = port.map(|port| match &port["targetPort"] {
            Value::Null => port["port"].clone(),
            target => target.clone(),
        });
        Self {
            workloads: objects.iter().filter_map(Workload::of).collect(),
            selector: pairs.collect(),
            port: port.unwrap_or_default(),
        }
    }
}

/// An object as text: maps in memory take many times as much, and it is read when somebody has changed
/// something only.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Written(Box<str>);

impl Written {
    fn of(object: &Value) -> Self {
        Self(object.to_string().into())
    }

    fn read(&self) -> Value {
        // It is what was written above.
        serde_json::from_str(&self.0).unwrap_or_default()
    }
}

/// A workload of a chart.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Workload {
    /// What it is.
    pub(crate) kind: Kind,
    /// Its name.
    pub(crate) name: String,
    /// How many instances it is to have at least.
    pub(crate) instances: u32,
    /// All of it.
    body: Written,
}

impl Workload {
    /// An object, if it is a workload.
    pub(crate) fn of(object: &Object) -> Option<Self> {
        let is_workload = [Kind::DEPLOYMENT, Kind::STATEFUL_SET].contains(&object.kind);
        is_workload.then(|| Self {
            kind: object.kind,
            name: object.name.clone(),
            instances: instances(&object.body),
            body: Written::of(&object.body),
        })
    }
}

/// Who applies it.
#[derive(Debug)]
enum By {
    /// Daybook: the workloads as the API server had them right after that.
    Daybook {
        /// Deployments, by name.
        applied: HashMap<String, Applied>,
        /// The ids of StatefulSets, by name.
        sets: HashMap<String, String>,
    },
    /// Argo CD, at a time of its own.
    ArgoCd {
        /// What is to become of each release.
        wanted: BTreeMap<DeploymentId, (Box<ReleaseValues>, Written)>,
        /// Releases that were there as they are to be, at this commit or at one before.
        settled: BTreeSet<DeploymentId>,
    },
}

/// A workload that was applied. What is seen of an older generation is of the time before.
#[derive(Debug)]
struct Applied {
    uid: String,
    generation: i64,
    wanted: Written,
}

impl Asked {
    /// Nothing, at a revision.
    pub fn new(revision: CommitId) -> Self {
        Self {
            revision,
            releases: BTreeMap::new(),
            held: HashMap::new(),
            charts: BTreeMap::new(),
            by: By::Daybook {
                applied: HashMap::new(),
                sets: HashMap::new(),
            },
        }
    }

    /// The same, where Argo CD applies it.
    pub(crate) fn by_argocd(revision: CommitId) -> Self {
        Self {
            by: By::ArgoCd {
                wanted: BTreeMap::new(),
                settled: BTreeSet::new(),
            },
            ..Self::new(revision)
        }
    }

    /// The commit.
    pub(crate) fn revision(&self) -> &CommitId {
        &self.revision
    }

    /// The releases with how many instances of each there are to be.
    pub(crate) fn releases(&self) -> &BTreeMap<DeploymentId, (ServiceName, u32)> {
        &self.releases
    }

    /// Whether it is Argo CD that applies it.
    pub(crate) fn is_by_argocd(&self) -> bool {
        matches!(self.by, By::ArgoCd { .. })
    }

    /// So many instances of a release.
    pub fn wants(&mut self, deployment: DeploymentId, service: ServiceName, replicas: u32) {
        self.releases.insert(deployment, (service, replicas));
    }

    /// A release of a chart is made of this.
    pub(crate) fn renders(&mut self, deployment: DeploymentId, chart: Chart) {
        self.charts.insert(deployment, chart);
    }

    /// What a release of a chart is made of; none if it is one of an image.
    pub(crate) fn chart(&self, deployment: DeploymentId) -> Option<&Chart> {
        self.charts.get(&deployment)
    }

    /// The workloads of a release of a chart; none if it is one of an image.
    pub(crate) fn workloads(&self, deployment: DeploymentId) -> Option<&[Workload]> {
        Some(self.chart(deployment)?.workloads.as_slice())
    }

    /// A StatefulSet was applied.
    pub(crate) fn applied_set(&mut self, name: &str, uid: String) {
        if let By::Daybook { sets, .. } = &mut self.by {
            sets.insert(name.to_owned(), uid);
        }
    }

    /// Whether a StatefulSet of this name and id is the one that was asked for. Where Argo CD applies,
    /// its name says so.
    pub(crate) fn covers_set(&self, name: &str, uid: &str) -> bool {
        match &self.by {
            By::Daybook { sets, .. } => sets.get(name).is_some_and(|applied| applied == uid),
            By::ArgoCd { .. } => true,
        }
    }

    /// A workload was applied, which is `wanted` to be so.
    pub fn applied(&mut self, name: &str, uid: String, generation: i64, wanted: &Value) {
        if let By::Daybook { applied, .. } = &mut self.by {
            let workload = Applied {
                uid,
                generation,
                wanted: Written::of(wanted),
            };
            applied.insert(name.to_owned(), workload);
        }
    }

    /// Argo CD is to make this workload of a release.
    pub(crate) fn handed_over(
        &mut self,
        deployment: DeploymentId,
        values: ReleaseValues,
        workload: &Value,
    ) {
        if let By::ArgoCd { wanted, .. } = &mut self.by {
            wanted.insert(deployment, (Box::new(values), Written::of(workload)));
        }
    }

    /// Releases that are the same as before are settled as they were before.
    pub(crate) fn follows(&mut self, before: &Self) {
        if let (
            By::ArgoCd { wanted, settled },
            By::ArgoCd {
                wanted: wanted_before,
                settled: settled_before,
            },
        ) = (&mut self.by, &before.by)
        {
            let same = settled_before
                .iter()
                .filter(|id| wanted.contains_key(id) && wanted.get(id) == wanted_before.get(id));
            settled.extend(same);
            let charts = self.charts.iter();
            let same = charts.filter(|(id, chart)| {
                settled_before.contains(*id) && before.charts.get(*id) == Some(*chart)
            });
            settled.extend(same.map(|(id, _)| *id));
        }
    }

    /// Something keeps a release from being applied whole.
    pub fn holds(&mut self, deployment: DeploymentId, problem: Problem) {
        self.held.insert(deployment, problem);
    }

    /// What keeps a release from being applied whole.
    pub(crate) fn held(&self, deployment: DeploymentId) -> Option<&Problem> {
        self.held.get(&deployment)
    }

    /// Why not all was applied, if it may be had by trying again.
    pub fn again(&self) -> Option<String> {
        let mut held = self.held.values().filter(|problem| problem.transient);
        held.next().map(|problem| problem.message.clone())
    }

    /// Whether a workload is the release that was asked for, as far as can be seen of it.
    pub(crate) fn covers(&self, deployment: DeploymentId, workload: &Deployment) -> bool {
        let metadata = &workload.metadata;
        match &self.by {
            By::Daybook { applied, .. } => {
                let applied = metadata.name.as_ref().and_then(|name| applied.get(name));
                applied.is_some_and(|applied| {
                    metadata.uid.as_ref() == Some(&applied.uid)
                        && metadata.generation >= Some(applied.generation)
                })
            }
            // What has drifted since is still this release, and so is what the chart does not make.
            By::ArgoCd { wanted, settled } => {
                let is_same = |(values, _): &(Box<ReleaseValues>, Written)| {
                    let drift = self.drift(deployment, workload);
                    drift.iter().all(|field| is_spare(field, values))
                };
                settled.contains(&deployment)
                    // What is not synced yet is nothing yet, whatever is there.
                    || self.is_of_chart(deployment, workload)
                    || wanted.get(&deployment).is_some_and(is_same)
            }
        }
    }

    /// Whether a release of a chart has a Deployment of this name.
    fn is_of_chart(&self, deployment: DeploymentId, workload: &Deployment) -> bool {
        let name = workload.metadata.name.as_ref();
        let workloads = self.workloads(deployment).unwrap_or_default();
        let mut workloads = workloads.iter().filter(|w| w.kind == Kind::DEPLOYMENT);
        workloads.any(|w| Some(&w.name) == name)
    }

    /// The fields of a workload that somebody has set otherwise.
    pub(crate) fn drift(&self, deployment: DeploymentId, workload: &Deployment) -> Vec<String> {
        let metadata = &workload.metadata;
        let (wanted, by_argocd) = match &self.by {
            By::Daybook { applied, .. } => {
                let applied = metadata.name.as_ref().and_then(|name| applied.get(name));
                // As it was applied: there is nothing to look for.
                let applied = applied.filter(|a| metadata.generation != Some(a.generation));
                (applied.map(|applied| &applied.wanted), false)
            }
            By::ArgoCd { wanted, .. } => {
                let of_chart = self.workloads(deployment).unwrap_or_default();
                let mut of_chart = of_chart.iter().filter(|w| w.kind == Kind::DEPLOYMENT);
                let of_chart = of_chart.find(|w| Some(&w.name) == metadata.name.as_ref());
                let of_image = || wanted.get(&deployment).map(|(_, w)| w);
                (of_chart.map(|w| &w.body).or_else(of_image), true)
            }
        };
        let Some(wanted) = wanted.map(Written::read) else {
            return Vec::new();
        };
        let live = serde_json::to_value(workload).unwrap_or_default();
        let mut found = differences(&wanted, &live);
        // The chart may have an autoscaler made. One that is older says nothing of where the last
        // words of a program come from, which is nothing that the commit asks for.
        let is_of_chart = |field: &str| {
            is_autoscaled(field, &wanted, &live) || field.ends_with("].terminationMessagePolicy")
        };
        found.retain(|field| !(by_argocd && is_of_chart(field)));
        found
    }

    /// Whether Argo CD's word about this commit no longer matters for a release: it is there as it
    /// is to be. Where Daybook applies, there is no such word.
    pub(crate) fn is_settled(&self, deployment: DeploymentId) -> bool {
        match &self.by {
            By::Daybook { .. } => true,
            By::ArgoCd { settled, .. } => settled.contains(&deployment),
        }
    }

    /// A release is there as it is to be.
    pub(crate) fn settles(&mut self, deployment: DeploymentId) {
        if let By::ArgoCd { settled, .. } = &mut self.by {
            settled.insert(deployment);
        }
    }
}

/// Whether a field is the number of instances, and an autoscaler has added some.
fn is_autoscaled(field: &str, wanted: &Value, live: &Value) -> bool {
    let replicas = |of: &Value| of["spec"]["replicas"].as_u64();
    let (least, now) = (replicas(wanted), replicas(live));
    field == ".spec.replicas" && least > Some(0) && now > least
}

/// Whether a workload is the same release without this field, which charts do not make that are of
/// before, or somebody's own: what it is given of a cluster, and what it keeps there.
fn is_spare(field: &str, values: &ReleaseValues) -> bool {
    let is_of = |field: &str, all: &[&str]| {
        let mut rests = all.iter().filter_map(|of| field.strip_prefix(*of));
        rests.any(|rest| rest.is_empty() || rest.starts_with(['.', '[']))
    };
    let Some(field) = field.strip_prefix(".spec.template.") else {
        return false;
    };
    if let Some(container) = field.strip_prefix("spec.containers[") {
        let Some((_, field)) = container.split_once("].") else {
            return false;
        };
        let variable = field.strip_prefix("env[").and_then(|of| of.split_once(']'));
        return match variable {
            Some((variable, _)) => values.run.volume_of(variable).is_some(),
            None => is_of(field, &["resources", "volumeMounts"]),
        };
    }
    if field.strip_prefix("metadata.labels.") == Some(VOLUMES) {
        return true;
    }
    let of_pod = [
        "spec.affinity",
        "spec.securityContext.fsGroup",
        "spec.securityContext.fsGroupChangePolicy",
        "spec.volumes",
    ];
    is_of(field, &of_pod)
}

#[cfg(test)]
mod tests {
    use daybook_events::spec::PinnedImage;
    use daybook_events::{Digest, ImageRepository, ImageTag};
    use serde_json::json;

    use super::*;

    #[test]
    fn what_a_chart_does_not_make_is_drift_of_the_same_release() {
        let run = json!({ "volumes": {
            "data": { "path": "/data" },
            "files": { "path": "/files", "env": "FILES" },
        }});
        let values = ReleaseValues {
            image: PinnedImage {
                repository: ImageRepository::parse("registry.example.com/shop/web").unwrap(),
                tag: ImageTag::parse("a1b2c3d").unwrap(),
                digest: Digest::of(b"web"),
            },
            clusters: Vec::new(),
            secret_env: BTreeMap::new(),
            run: serde_json::from_value(run).unwrap(),
        };
        let plain = json!({ "spec": {
            "replicas": 1,
            "selector": {},
            "template": {
                "metadata": { "labels": { "daybook.dev/service": "web" } },
                "spec": {
                    "securityContext": { "seccompProfile": { "type": "RuntimeDefault" } },
                    "containers": [{
                        "name": "web",
                        "image": "a",
                        "env": [{ "name": "PORT", "value": "8080" }],
                        // As the API server defaults it.
                        "terminationMessagePolicy": "File",
                    }],
                },
            },
        }});
        let mut whole = plain.clone();
        let template = &mut whole["spec"]["template"];
        template["metadata"]["labels"][VOLUMES] = json!("one-node");
        let pod = &mut template["spec"];
        pod["securityContext"]["fsGroup"] = json!(1000);
        pod["securityContext"]["fsGroupChangePolicy"] = json!("OnRootMismatch");
        pod["affinity"] = json!({ "podAffinity": {} });
        pod["affinity"]["podAffinity"]["of"] = json!("x");
        let claim = json!({ "claimName": "web.data" });
        pod["volumes"] = json!([{ "name": "data", "persistentVolumeClaim": claim }]);
        let container = &mut pod["containers"][0];
        container["resources"] = json!({ "requests": { "cpu": "250m" } });
        container["volumeMounts"] = json!([{ "name": "data", "mountPath": "/data" }]);
        container["terminationMessagePolicy"] = json!("FallbackToLogsOnError");
        container["env"] = json!([
            { "name": "PORT", "value": "8080" },
            { "name": "VOLUME_DATA", "value": "/data" },
            { "name": "FILES", "value": "/files" },
        ]);
        let deployment = DeploymentId(uuid::Uuid::from_u128(1));
        let revision = CommitId::parse("01".repeat(20)).unwrap();
        let mut asked = Asked::by_argocd(revision);
        asked.handed_over(deployment, values, &whole);
        let seen = |change: &dyn Fn(&mut Value)| {
            let mut live = plain.clone();
            change(&mut live);
            let live: Deployment = serde_json::from_value(live).unwrap();
            let drift = asked.drift(deployment, &live);
            (asked.covers(deployment, &live), drift.len())
        };
        assert_eq!(seen(&|_| {}), (true, 9));
        let amount = json!({ "requests": { "cpu": "1" } });
        let containers = "/spec/template/spec/containers/0";
        let of_another = |live: &mut Value| {
            live.pointer_mut(containers).unwrap()["resources"] = amount.clone();
        };
        assert_eq!(seen(&of_another), (true, 9));
        // Another image, number or variable is another release.
        let image = |live: &mut Value| {
            live.pointer_mut(containers).unwrap()["image"] = json!("b");
        };
        assert_eq!(seen(&image), (false, 10));
        let port = |live: &mut Value| {
            let env = json!([{ "name": "PORT", "value": "9090" }]);
            live.pointer_mut(containers).unwrap()["env"] = env;
        };
        assert_eq!(seen(&port), (false, 10));
        assert!(!seen(&|live| live["spec"]["replicas"] = json!(0)).0);
    }
}
