//! The objects that one environment is on a cluster: the same that `helm template` makes of the
//! chart `daybook-app` in its GitOps repository, which a test compares.

use std::collections::{BTreeMap, BTreeSet};

use daybook_events::resources::Quantity;
use daybook_events::spec::{Autoscaling, RunSpec, VolumeSpec};
use daybook_events::{ClusterName, DeploymentId, ServiceName, VolumeName};
use daybook_workers::charts::objects as rendered;
use daybook_workers::values::{EnvironmentValues, ReleaseValues, RenderedChart};
use k8s_openapi::ByteString;
use serde_json::{Map, Value, json};

use crate::names::{self, DEPLOYMENT, MANAGED_BY, MANAGER, SERVICE, VOLUME, VOLUMES};

/// A kind of object.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Kind {
    /// `apps/v1`.
    pub api_version: &'static str,
    /// `Deployment`.
    pub kind: &'static str,
    /// `deployments`, as in the address of its collection.
    pub plural: &'static str,
}

impl Kind {
    const fn new(api_version: &'static str, kind: &'static str, plural: &'static str) -> Self {
        Self {
            api_version,
            kind,
            plural,
        }
    }

    /// Whether a release runs without its object of this kind as well. The right to such objects is
    /// asked for only where some are wanted.
    pub(crate) fn is_spare(self) -> bool {
        [Self::AUTOSCALER, Self::DISRUPTION_BUDGET].contains(&self)
            || Self::OF_CHARTS.contains(&self)
    }

    /// Whether objects of this kind are made without anybody asking for them. Where an account has no
    /// right to them, or a cluster does not know them, releases go without.
    pub(crate) fn is_optional(self) -> bool {
        self == Self::DISRUPTION_BUDGET
    }

    /// A kind that a Helm chart may make.
    pub fn of_chart(api_version: &str, kind: &str) -> Option<Self> {
        let all = [
            Self::SERVICE_ACCOUNT,
            Self::CONFIG_MAP,
            Self::NETWORK_POLICY,
            Self::DEPLOYMENT,
            Self::STATEFUL_SET,
            Self::AUTOSCALER,
            Self::DISRUPTION_BUDGET,
            Self::SERVICE,
        ];
        let mut all = all.into_iter();
        all.find(|of| of.api_version == api_version && of.kind == kind)
    }

    /// What nothing but Helm charts makes. Where none is deployed, none of it is asked for.
    pub(crate) const OF_CHARTS: [Self; 3] = [
        Self::STATEFUL_SET,
        Self::NETWORK_POLICY,
        Self::SERVICE_ACCOUNT,
    ];

    /// Workloads.
    pub const DEPLOYMENT: Self = Self::new("apps/v1", "Deployment", "deployments");
    /// What adds instances to workloads and takes them away.
    pub const AUTOSCALER: Self = Self::new(
        "autoscaling/v2",
        "HorizontalPodAutoscaler",
        "horizontalpodautoscalers",
    );
    /// How many pods of a workload may be taken away at once.
    pub const DISRUPTION_BUDGET: Self =
        Self::new("policy/v1", "PodDisruptionBudget", "poddisruptionbudgets");
    /// Workloads whose pods have names of their own.
    pub const STATEFUL_SET: Self = Self::new("apps/v1", "StatefulSet", "statefulsets");
    /// Which pods may talk to each other.
    pub const NETWORK_POLICY: Self =
        Self::new("networking.k8s.io/v1", "NetworkPolicy", "networkpolicies");
    /// What pods are to the API server.
    pub const SERVICE_ACCOUNT: Self = Self::new("v1", "ServiceAccount", "serviceaccounts");
    /// Volumes, which outlive the releases that use them.
    pub const CLAIM: Self = Self::new("v1", "PersistentVolumeClaim", "persistentvolumeclaims");
    /// Plain variables.
    pub const CONFIG_MAP: Self = Self::new("v1", "ConfigMap", "configmaps");
    /// Secret variables.
    pub const SECRET: Self = Self::new("v1", "Secret", "secrets");
    /// Addresses within the cluster.
    pub const SERVICE: Self = Self::new("v1", "Service", "services");
    /// Addresses from without.
    pub const HTTP_ROUTE: Self =
        Self::new("gateway.networking.k8s.io/v1", "HTTPRoute", "httproutes");
}

/// An object, as it is to be.
#[derive(Debug, Clone, PartialEq)]
pub struct Object {
    /// What it is.
    pub kind: Kind,
    /// Its name.
    pub name: String,
    /// All of it.
    pub body: Value,
}

/// A Gateway that routes are attached to.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct GatewayRef {
    /// Its name.
    pub name: String,
    /// Its namespace, if it is another one than the routes'.
    pub namespace: Option<String>,
    /// The listener; all that fit if none is named.
    pub section_name: Option<String>,
}

/// Where an environment is made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Place<'a> {
    /// The cluster: releases that do not list it are left out.
    pub cluster: &'a ClusterName,
    /// The namespace.
    pub namespace: &'a str,
    /// Where addresses are attached, and what they end in; none are made without.
    pub gateway: Option<(&'a GatewayRef, &'a str)>,
}

/// All objects of an environment.
pub fn objects(values: &EnvironmentValues, place: &Place<'_>) -> Vec<Object> {
    let mut objects = claims(values, place);
    for (service, of_service) in &values.services {
        for (deployment, release) in &of_service.releases {
            if release.clusters.contains(place.cluster) {
                let release = Release {
                    values,
                    place,
                    service,
                    deployment: *deployment,
                    release,
                };
                objects.extend(release.objects());
            }
        }
        for (deployment, chart) in &of_service.charts {
            if chart.clusters.contains(place.cluster) {
                let release = Release {
                    values,
                    place,
                    service,
                    deployment: *deployment,
                    release: chart,
                };
                objects.extend(release.rendered());
            }
        }
    }
    objects
}

/// What was rendered of a chart, as it is to be in a namespace: without what is no object that a
/// chart may make, which nobody but somebody's own commit puts there.
pub(crate) fn rendered_in(chart: &RenderedChart, namespace: &str) -> Vec<Object> {
    let objects = chart
        .objects
        .iter()
        .filter_map(|object| match chart.stopped {
            true => rendered::stopped(object),
            false => Some(object.clone()),
        });
    let objects = objects.filter_map(|mut body| {
        let of = |key: &str| body[key].as_str();
        let kind = Kind::of_chart(of("apiVersion")?, of("kind")?)?;
        if !rendered::is_sound(&body) {
            return None;
        }
        body["metadata"]["namespace"] = json!(namespace);
        Some(Object {
            kind,
            name: rendered::name(&body).to_owned(),
            body,
        })
    });
    objects.collect()
}

/// The claims of the volumes of all services, as they are made where they are not there yet: as the
/// oldest release says, and as large as any of them asks for.
fn claims(values: &EnvironmentValues, place: &Place<'_>) -> Vec<Object> {
    let mut claims: Vec<Object> = Vec::new();
    for (service, of_service) in &values.services {
        let releases = of_service.releases.values();
        let here = releases.filter(|release| release.clusters.contains(place.cluster));
        for (volume, given) in here.flat_map(|release| mounted(&release.run)) {
            let name = names::claim(service, volume);
            if let Some(claim) = claims.iter_mut().find(|claim| claim.name == name) {
                let size = &mut claim.body["spec"]["resources"]["requests"]["storage"];
                let there = Quantity::new(size.as_str().unwrap_or_default());
                if given.size().exceeds(&there) {
                    *size = json!(given.size());
                }
            } else {
                let mut labels = values.labels();
                for (key, value) in [
                    (MANAGED_BY, MANAGER),
                    ("app.kubernetes.io/name", service.as_str()),
                    (SERVICE, service.as_str()),
                    (VOLUME, volume.as_str()),
                ] {
                    labels.insert(key.to_owned(), value.to_owned());
                }
                claims.push(claim(name, place.namespace, &labels, given));
            }
        }
    }
    claims
}

/// The volumes of a release. Of two at one path only the first is mounted: a workload with both would
/// be refused, and with it all of the environment. Requests are looked at, and there are some of before
/// that was so.
fn mounted(run: &RunSpec) -> impl Iterator<Item = (&VolumeName, &VolumeSpec)> {
    let mut paths = BTreeSet::new();
    let volumes = run.volumes.iter();
    volumes.filter(move |(_, volume)| paths.insert(volume.path.trim_end_matches('/')))
}

fn claim(
    name: String,
    namespace: &str,
    labels: &BTreeMap<String, String>,
    given: &VolumeSpec,
) -> Object {
    let mode = match given.many_nodes {
        true => "ReadWriteMany",
        false => "ReadWriteOnce",
    };
    let mut spec = json!({
        "accessModes": [mode],
        "resources": { "requests": { "storage": given.size() } },
    });
    if let Some(class) = &given.storage_class {
        spec["storageClassName"] = json!(class);
    }
    let body = json!({
        "apiVersion": Kind::CLAIM.api_version,
        "kind": Kind::CLAIM.kind,
        "metadata": {
            "name": name,
            "namespace": namespace,
            "labels": labels,
            // For whoever applies the chart: it stays when its releases go.
            "annotations": {
                "argocd.argoproj.io/compare-options": "IgnoreExtraneous",
                "argocd.argoproj.io/sync-options": "Prune=false,Delete=false",
                "helm.sh/resource-policy": "keep",
            },
        },
        "spec": spec,
    });
    Object {
        kind: Kind::CLAIM,
        name,
        body,
    }
}

/// The object with the values of a release's secrets, in Base64. They are in no repository, so it
/// is not in the chart.
pub fn secret(
    values: &EnvironmentValues,
    place: &Place<'_>,
    deployment: DeploymentId,
    data: BTreeMap<&str, ByteString>,
) -> Option<Object> {
    let mut services = values.services.iter();
    let (service, _) = services.find(|(_, service)| service.lists(&deployment))?;
    let release = Release {
        values,
        place,
        service,
        deployment,
        release: &(),
    };
    Some(release.object(Kind::SECRET, json!({ "type": "Opaque", "data": data })))
}

/// A Gateway, as routes refer to it.
pub(crate) fn parent(gateway: &GatewayRef) -> Value {
    let mut parent = json!({
        "group": "gateway.networking.k8s.io",
        "kind": "Gateway",
        "name": gateway.name,
    });
    if let Some(namespace) = &gateway.namespace {
        parent["namespace"] = json!(namespace);
    }
    if let Some(section) = &gateway.section_name {
        parent["sectionName"] = json!(section);
    }
    parent
}

/// A release, of an image or of a chart.
struct Release<'a, R> {
    values: &'a EnvironmentValues,
    place: &'a Place<'a>,
    service: &'a ServiceName,
    deployment: DeploymentId,
    release: &'a R,
}

impl<R> Release<'_, R> {
    fn name(&self) -> String {
        names::release(self.service, self.deployment)
    }

    fn labels(&self) -> BTreeMap<String, String> {
        let mut labels = self.values.labels();
        for (key, value) in [
            ("app.kubernetes.io/instance", self.name()),
            (MANAGED_BY, MANAGER.to_owned()),
            ("app.kubernetes.io/name", self.service.to_string()),
            (DEPLOYMENT, self.deployment.to_string()),
            (SERVICE, self.service.to_string()),
        ] {
            labels.insert(key.to_owned(), value);
        }
        labels
    }

    fn object(&self, kind: Kind, body: Value) -> Object {
        let mut whole = json!({
            "apiVersion": kind.api_version,
            "kind": kind.kind,
            "metadata": {
                "name": self.name(),
                "namespace": self.place.namespace,
                "labels": self.labels(),
            },
        });
        if let (Value::Object(whole), Value::Object(body)) = (&mut whole, body) {
            whole.extend(body);
        }
        Object {
            kind,
            name: self.name(),
            body: whole,
        }
    }

    /// The address that always leads to this release.
    fn route(&self, gateway: &GatewayRef, domain: &str) -> Value {
        let short = self.deployment.short();
        let (project, environment) = (&self.values.project, &self.values.environment);
        let hostname = format!("{short}.{}.{environment}.{project}.{domain}", self.service);
        let backend = json!({
            "group": "",
            "kind": "Service",
            "name": self.name(),
            "port": 80,
            "weight": 1,
        });
        json!({
            "parentRefs": [parent(gateway)],
            "hostnames": [hostname],
            "rules": [{
                "matches": [{ "path": { "type": "PathPrefix", "value": "/" } }],
                "backendRefs": [backend],
            }],
        })
    }
}

impl Release<'_, RenderedChart> {
    fn rendered(&self) -> Vec<Object> {
        let mut objects = rendered_in(self.release, self.place.namespace);
        if let Some((gateway, domain)) = self.place.gateway {
            let spec = self.route(gateway, domain);
            objects.push(self.object(Kind::HTTP_ROUTE, json!({ "spec": spec })));
        }
        objects
    }
}

impl Release<'_, ReleaseValues> {
    fn objects(&self) -> Vec<Object> {
        let mut objects = Vec::new();
        // What a pod needs comes before the pod.
        if !self.release.run.env.is_empty() {
            let body = json!({ "data": self.release.run.env });
            objects.push(self.object(Kind::CONFIG_MAP, body));
        }
        // Before the workload, whose number of instances is its own to set from then on.
        if let Some(autoscaling) = self.autoscaling() {
            let spec = self.autoscaler(autoscaling);
            objects.push(self.object(Kind::AUTOSCALER, json!({ "spec": spec })));
        }
        objects.push(self.object(Kind::DEPLOYMENT, json!({ "spec": self.workload() })));
        if self.moves_one_by_one() {
            let spec = json!({
                "maxUnavailable": 1,
                // What is broken is in nobody's way.
                "unhealthyPodEvictionPolicy": "AlwaysAllow",
                "selector": { "matchLabels": self.selector() },
            });
            objects.push(self.object(Kind::DISRUPTION_BUDGET, json!({ "spec": spec })));
        }
        objects.push(self.object(Kind::SERVICE, json!({ "spec": self.address() })));
        if let Some((gateway, domain)) = self.place.gateway {
            let spec = self.route(gateway, domain);
            objects.push(self.object(Kind::HTTP_ROUTE, json!({ "spec": spec })));
        }
        objects
    }

    fn selector(&self) -> Value {
        json!({ DEPLOYMENT: self.deployment.to_string() })
    }

    /// How instances come and go by themselves, while any are to run.
    fn autoscaling(&self) -> Option<&Autoscaling> {
        let run = &self.release.run;
        run.autoscaling.as_ref().filter(|_| run.replicas > 0)
    }

    fn autoscaler(&self, autoscaling: &Autoscaling) -> Value {
        let target =
            json!({ "type": "Utilization", "averageUtilization": autoscaling.cpu_percent });
        json!({
            "scaleTargetRef": {
                "apiVersion": Kind::DEPLOYMENT.api_version,
                "kind": Kind::DEPLOYMENT.kind,
                "name": self.name(),
            },
            "minReplicas": self.release.run.replicas,
            "maxReplicas": autoscaling.max,
            "metrics": [{
                "type": "Resource",
                "resource": { "name": "cpu", "target": target },
            }],
        })
    }

    /// Whether there are several instances, and one that goes from a node can come back on another
    /// before the next one goes. Where a volume keeps them all on one node, none can, and a budget
    /// would keep that node from ever being drained.
    fn moves_one_by_one(&self) -> bool {
        (self.release.run.replicas > 1 || self.autoscaling().is_some()) && !self.on_one_node()
    }

    /// Whether a volume is one that only a single node can use at a time.
    fn on_one_node(&self) -> bool {
        mounted(&self.release.run).any(|(_, volume)| !volume.many_nodes)
    }

    /// What pods have of volumes, beside what they have without.
    fn use_volumes(&self, template: &mut Value) {
        if self.release.run.volumes.is_empty() {
            return;
        }
        let spec = &mut template["spec"];
        // So that an image can write there whoever it runs as.
        spec["securityContext"]["fsGroup"] = json!(1000);
        spec["securityContext"]["fsGroupChangePolicy"] = json!("OnRootMismatch");
        let of_claim = |(name, _)| {
            let claim = names::claim(self.service, name);
            json!({ "name": name, "persistentVolumeClaim": { "claimName": claim } })
        };
        spec["volumes"] = mounted(&self.release.run).map(of_claim).collect();
        if self.on_one_node() {
            let labels = json!({ SERVICE: self.service, VOLUMES: "one-node" });
            spec["affinity"]["podAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"] = json!([{
                "labelSelector": { "matchLabels": labels },
                "topologyKey": "kubernetes.io/hostname",
            }]);
            template["metadata"]["labels"][VOLUMES] = json!("one-node");
        }
    }

    fn workload(&self) -> Value {
        let run = &self.release.run;
        let mut workload = json!({
            "revisionHistoryLimit": 1,
            "progressDeadlineSeconds": run.health.deadline_seconds,
            "selector": { "matchLabels": self.selector() },
            "strategy": {
                "type": "RollingUpdate",
                "rollingUpdate": { "maxSurge": 1, "maxUnavailable": 0 },
            },
            "template": {
                "metadata": { "labels": self.labels() },
                "spec": {
                    "automountServiceAccountToken": false,
                    "securityContext": { "seccompProfile": { "type": "RuntimeDefault" } },
                    "containers": [self.container()],
                },
            },
        });
        self.use_volumes(&mut workload["template"]);
        if self.autoscaling().is_none() {
            workload["replicas"] = json!(run.replicas);
        }
        workload
    }

    fn container(&self) -> Value {
        let run = &self.release.run;
        let mut env = vec![json!({ "name": "PORT", "value": run.port.to_string() })];
        // As for paths: one that is there twice would be refused.
        let mut named = BTreeSet::from(["PORT".to_owned()]);
        for (name, volume) in mounted(run) {
            let variable = volume.variable(name);
            if named.insert(variable.clone()) {
                env.push(json!({ "name": variable, "value": volume.path }));
            }
        }
        let secrets = self.release.secret_env.keys();
        for key in secrets.filter(|key| !named.contains(key.as_str())) {
            let reference = json!({ "name": self.name(), "key": key });
            env.push(json!({ "name": key, "valueFrom": { "secretKeyRef": reference } }));
        }
        let mut container = json!({
            "name": self.service,
            "image": self.release.image.to_string(),
            "ports": [{ "name": "http", "containerPort": run.port, "protocol": "TCP" }],
            "env": env,
            "readinessProbe": self.probe(2, 3),
            "startupProbe": self.probe(1, run.health.deadline_seconds),
            "securityContext": {
                "allowPrivilegeEscalation": false,
                "capabilities": { "drop": ["ALL"] },
            },
            // What it printed last is why it ended, where it writes nothing to /dev/termination-log.
            "terminationMessagePolicy": "FallbackToLogsOnError",
        });
        if !run.command.is_empty() {
            // `$` begins a reference to a variable there, and is nothing special here.
            let words = run.command.iter().map(|word| word.replace('$', "$$"));
            container["command"] = words.collect();
        }
        if !run.volumes.is_empty() {
            let mounts = mounted(run);
            let mounts =
                mounts.map(|(name, volume)| json!({ "name": name, "mountPath": volume.path }));
            container["volumeMounts"] = mounts.collect();
        }
        if !run.resources.is_empty() {
            container["resources"] = json!(run.resources);
        }
        if !run.env.is_empty() {
            container["envFrom"] = json!([{ "configMapRef": { "name": self.name() } }]);
        }
        container
    }

    fn probe(&self, period: u32, failures: u32) -> Value {
        let path = &self.release.run.health.path;
        let mut probe = Map::new();
        if path.is_empty() {
            probe.insert("tcpSocket".into(), json!({ "port": "http" }));
        } else {
            probe.insert("httpGet".into(), json!({ "path": path, "port": "http" }));
        }
        probe.insert("periodSeconds".into(), json!(period));
        probe.insert("timeoutSeconds".into(), json!(2));
        probe.insert("failureThreshold".into(), json!(failures));
        Value::Object(probe)
    }

    fn address(&self) -> Value {
        json!({
            "type": "ClusterIP",
            "selector": self.selector(),
            "ports": [{ "name": "http", "port": 80, "targetPort": "http", "protocol": "TCP" }],
        })
    }
}
