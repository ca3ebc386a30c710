//! What is made of a chart's manifests: the objects of one release, with Daybook's labels, or why
//! they are not for Daybook to make.
//!
//! # What is taken
//! Objects of a namespace of the kinds in [`KINDS`]. All of them have the labels by which Daybook
//! finds, removes and observes what it made; so do the pods, and whatever selects pods selects those
//! of this deployment only, so that releases beside each other do not get each other's traffic. Beside
//! them there is a ConfigMap that says which chart it was, and a Service that has the name and the port
//! of every release's address.
//!
//! # What is refused
//! Hooks, custom resource definitions and what is there for the whole cluster; Secrets, which would
//! stand in the repository for everybody to read; claims, as the next release would begin with empty
//! ones; addresses from without, which are Daybook's to switch; names that another release would have,
//! too; pods that are not confined to their node's containers; and references to Secrets, accounts and
//! workloads that are not of this release.

use std::collections::{BTreeMap, BTreeSet};

use daybook_events::chart::PinnedChart;
use daybook_events::resources::Quantity;
use serde_json::{Map, Value, json};

use super::program::too_large;
use super::{ChartRelease, pods};
use crate::ports::StepError;

/// The kinds that a chart may make, in the order in which they are applied, by API version. Before all of
/// them comes the ConfigMap that says which chart it was.
pub const KINDS: [(&str, &str); 8] = [
    ("v1", "ServiceAccount"),
    ("v1", "ConfigMap"),
    ("networking.k8s.io/v1", "NetworkPolicy"),
    ("apps/v1", "Deployment"),
    ("apps/v1", "StatefulSet"),
    ("autoscaling/v2", "HorizontalPodAutoscaler"),
    ("policy/v1", "PodDisruptionBudget"),
    ("v1", "Service"),
];

/// The most objects of a chart.
pub(super) const OBJECTS_MAX: usize = 200;
/// The most bytes that they have as JSON. They are part of a values file.
const BYTES_MAX: usize = 512 << 10;

/// Says who looks after an object.
const MANAGED_BY: &str = "app.kubernetes.io/managed-by";
/// Who that is.
const DAYBOOK: &str = "daybook";
/// The deployment that an object is of.
const DEPLOYMENT: &str = "daybook.dev/deployment";
/// On the object that says which chart a release is of: there is more to look after than images make.
pub const CHART: &str = "daybook.dev/chart";

/// Kinds that belong to no namespace.
const OF_CLUSTERS: &[&str] = &[
    "APIService",
    "CSIDriver",
    "CertificateSigningRequest",
    "ClusterIssuer",
    "ClusterRole",
    "ClusterRoleBinding",
    "FlowSchema",
    "GatewayClass",
    "IngressClass",
    "MutatingWebhookConfiguration",
    "Namespace",
    "Node",
    "PersistentVolume",
    "PriorityClass",
    "PriorityLevelConfiguration",
    "RuntimeClass",
    "StorageClass",
    "ValidatingAdmissionPolicy",
    "ValidatingAdmissionPolicyBinding",
    "ValidatingWebhookConfiguration",
    "VolumeSnapshotClass",
];

/// Kinds that lead hostnames somewhere.
const ADDRESSES: &[&str] = &[
    "GRPCRoute",
    "Gateway",
    "HTTPRoute",
    "Ingress",
    "IngressRoute",
    "TCPRoute",
    "TLSRoute",
    "VirtualService",
];

/// The objects of a release of a chart that was rendered for a namespace, in the order in which they are
/// to be applied. They do not name it: an environment has one of its own on each cluster.
pub fn objects(
    documents: Vec<Value>,
    namespace: &str,
    chart: &PinnedChart,
    release: &ChartRelease<'_>,
) -> Result<Vec<Value>, StepError> {
    let labels = labels(release);
    let mut objects = Vec::new();
    for mut document in documents {
        strip_nulls(&mut document);
        if document.as_object().is_none_or(Map::is_empty) {
            continue;
        }
        check(&document, namespace, release)?;
        objects.push(document);
    }
    for object in &objects {
        check_pods(object, &objects, release)?;
    }
    for object in &mut objects {
        if own(object, &labels).is_none() {
            return Err(unsound(object));
        }
    }
    if !objects.iter().any(|object| instances(object) > 0) {
        return Err(StepError::fatal(
            "chart_without_workload",
            "the chart makes no Deployment or StatefulSet with an instance, so that nobody could say \
             whether it runs",
            "turn one on in `run.chart_values` of the service",
        ));
    }
    address(&mut objects, chart, release, &labels)?;
    let place = |object: &Value| KINDS.iter().position(|(_, kind)| object["kind"] == **kind);
    objects.sort_by_key(|object| (place(object), name(object).to_owned()));
    // First, as it is what says that there is more to look after: whatever happens then, what was
    // applied is found.
    objects.insert(0, inventory(chart, release, &labels));
    let mut seen = BTreeSet::new();
    if let Some(twice) = objects.iter().find(|object| !seen.insert(named(object))) {
        return Err(StepError::fatal(
            "chart_invalid",
            format!("the chart makes {} twice", named(twice)),
            "mend the chart, or change its names in `run.chart_values` of the service",
        ));
    }
    let bytes: usize = objects.iter().map(|object| object.to_string().len()).sum();
    if objects.len() > OBJECTS_MAX {
        return Err(too_large(&format!("more than {OBJECTS_MAX} objects")));
    }
    if bytes > BYTES_MAX {
        return Err(too_large(&format!(
            "{bytes} bytes of objects, of at most {BYTES_MAX}"
        )));
    }
    Ok(objects)
}

/// How many instances an object runs, if it is one that runs any.
pub fn instances(object: &Value) -> u32 {
    let replicas = &object["spec"]["replicas"];
    match runs_pods(object) {
        true => match replicas.as_u64() {
            Some(replicas) => u32::try_from(replicas).unwrap_or(u32::MAX),
            None => 1,
        },
        false => 0,
    }
}

/// An object of a release that is stopped: workloads have no instances, and autoscalers are not there.
pub fn stopped(object: &Value) -> Option<Value> {
    if object["kind"] == "HorizontalPodAutoscaler" {
        return None;
    }
    let mut object = object.clone();
    if runs_pods(&object) {
        let spec = map_at(&mut object, &["spec"])?;
        spec.insert("replicas".to_owned(), json!(0));
    }
    Some(object)
}

/// Whether what stands where every object has something is what stands there: nothing that comes
/// from a chart or out of a repository is taken for granted.
pub fn is_sound(object: &Value) -> bool {
    let metadata = &object["metadata"];
    let may_be = |value: &Value| value.is_object() || value.is_null();
    metadata.is_object()
        && !name(object).is_empty()
        && [
            &metadata["labels"],
            &metadata["annotations"],
            &object["spec"],
        ]
        .into_iter()
        .all(may_be)
}

/// Whether an object is a workload, whose pods come and go.
pub fn runs_pods(object: &Value) -> bool {
    object["kind"] == "Deployment" || object["kind"] == "StatefulSet"
}

/// What an object is called.
pub fn name(object: &Value) -> &str {
    object["metadata"]["name"].as_str().unwrap_or_default()
}

/// `Service web`.
fn named(object: &Value) -> String {
    let kind = object["kind"]
        .as_str()
        .unwrap_or("something without a kind");
    format!("{kind} {}", name(object))
}

/// Takes away what is there to say that it is not.
fn strip_nulls(value: &mut Value) {
    match value {
        Value::Object(map) => {
            map.retain(|_, value| !value.is_null());
            map.values_mut().for_each(strip_nulls);
        }
        Value::Array(list) => list.iter_mut().for_each(strip_nulls),
        _ => {}
    }
}

/// The map at a place in a value, made if nothing is there; none if something else is.
fn map_at<'a>(value: &'a mut Value, path: &[&str]) -> Option<&'a mut Map<String, Value>> {
    let mut map = value.as_object_mut()?;
    for key in path {
        let next = map.entry(*key).or_insert_with(|| json!({}));
        map = next.as_object_mut()?;
    }
    Some(map)
}

/// Why something is no object.
fn unsound(object: &Value) -> StepError {
    StepError::fatal(
        "chart_invalid",
        format!(
            "the chart makes {}, which is not written as such an object is",
            named(object)
        ),
        "mend the chart, or change `run.chart_values` of the service",
    )
}

/// Refuses what is not for Daybook to make.
fn check(object: &Value, namespace: &str, release: &ChartRelease<'_>) -> Result<(), StepError> {
    let (version, kind) = (&object["apiVersion"], &object["kind"]);
    let (Some(version), Some(kind)) = (version.as_str(), kind.as_str()) else {
        return Err(StepError::fatal(
            "chart_invalid",
            "the chart makes something that is no object of Kubernetes: it has no apiVersion or no kind",
            "mend the chart, or change `run.chart_values` of the service",
        ));
    };
    let what = named(object);
    let refused = |code: &str, why: &str, remedy: &str| {
        Err(StepError::fatal(
            code,
            format!("the chart makes {what}, {why}"),
            remedy,
        ))
    };
    if !is_sound(object) {
        return Err(unsound(object));
    }
    if kind == "CustomResourceDefinition" {
        return refused(
            "chart_crds",
            "which the whole cluster has once",
            "install the custom resource definitions by hand (helm show crds), and deploy a chart \
             without them",
        );
    }
    if OF_CLUSTERS.contains(&kind) {
        return refused(
            "chart_cluster_scoped",
            "which is there for the whole cluster, and Daybook makes what belongs to one environment",
            "turn it off in `run.chart_values` of the service, often as `rbac.create: false`, and make \
             it by hand if it is needed",
        );
    }
    if !object["metadata"]["annotations"]["helm.sh/hook"].is_null() {
        return refused(
            "chart_hooks",
            "a hook, which only Helm itself would run",
            "turn it off in `run.chart_values` of the service; do by hand what it is for",
        );
    }
    let of = &object["metadata"]["namespace"];
    if !of.is_null() && of != namespace {
        return refused(
            "chart_other_namespace",
            "which is of another namespace than that of the environment",
            "have the chart leave its namespace out, in `run.chart_values` of the service, or make it \
             by hand",
        );
    }
    if ADDRESSES.contains(&kind) {
        return refused(
            "chart_routes",
            "an address from without, which Daybook switches itself",
            "turn it off in `run.chart_values` of the service, often as `ingress.enabled: false`",
        );
    }
    if kind == "Service"
        && let Some(field) = leads_outside(&object["spec"])
    {
        return refused(
            "chart_routes",
            &format!(
                "an address from without by its `spec.{field}`, which Daybook switches itself"
            ),
            "have it be a ClusterIP without addresses of its own in `run.chart_values` of the service, \
             often as `service.type: ClusterIP`",
        );
    }
    if kind == "Secret" {
        return refused(
            "chart_secrets",
            "which would stand in the GitOps repository for everybody to read",
            "give the chart an existing Secret in `run.chart_values` of the service: \
             `$(DAYBOOK_RELEASE)` is the name of the one with the secrets of the service \
             (`daybook secret set`)",
        );
    }
    let templates = &object["spec"]["volumeClaimTemplates"];
    if kind == "PersistentVolumeClaim" || templates.as_array().is_some_and(|t| !t.is_empty()) {
        return refused(
            "chart_keeps_data",
            "which keeps data of its own, and each deployment is a release beside the one before: it \
             would begin with nothing",
            "turn persistence off in `run.chart_values` of the service, or give it an existing claim",
        );
    }
    if !KINDS.contains(&(version, kind)) {
        let kinds: Vec<_> = KINDS.iter().map(|(_, kind)| *kind).collect();
        return refused(
            "chart_kind_unsupported",
            &format!("of {version}, which Daybook does not look after"),
            &format!(
                "turn it off in `run.chart_values` of the service; what a chart may make is: {}",
                kinds.join(", ")
            ),
        );
    }
    let own = release.name();
    if ![own.as_str(), &release.deployment.short()]
        .iter()
        .any(|own| name(object).contains(own))
    {
        return refused(
            "chart_name_shared",
            &format!(
                "whose name does not have that of its release ({own}) in it, and releases stand beside \
                 each other"
            ),
            "have the chart name what it makes by its release, in `run.chart_values` of the service, \
             often with `fullnameOverride: $(DAYBOOK_RELEASE)`",
        );
    }
    Ok(())
}

/// The field by which a Service leads elsewhere than from within the cluster to pods.
fn leads_outside(spec: &Value) -> Option<&'static str> {
    let is_inner = |kind: &Value| kind.is_null() || kind == "ClusterIP";
    let is_unset = |value: &Value| match value {
        Value::Null => true,
        Value::String(text) => text.is_empty(),
        Value::Array(list) => list.is_empty(),
        _ => false,
    };
    if !is_inner(&spec["type"]) {
        return Some("type");
    }
    let fields = ["externalIPs", "externalName", "loadBalancerIP"];
    fields.into_iter().find(|field| !is_unset(&spec[*field]))
}

/// Refuses what asks more of a node than every pod may, and what refers to what is not of this release.
fn check_pods(object: &Value, all: &[Value], release: &ChartRelease<'_>) -> Result<(), StepError> {
    let what = named(object);
    let foreign = |refers: String, remedy: &str| {
        Err(StepError::fatal(
            "chart_foreign_reference",
            format!("the chart makes {what}, which {refers}"),
            remedy,
        ))
    };
    let template = &object["spec"]["template"];
    let refers = match object["kind"].as_str() {
        Some("Deployment" | "StatefulSet") => &template["spec"],
        Some("ServiceAccount") => object,
        Some("HorizontalPodAutoscaler") => {
            let target = &object["spec"]["scaleTargetRef"];
            let is_own = |of: &Value| {
                runs_pods(of) && of["kind"] == target["kind"] && target["name"] == *name(of)
            };
            if !all.iter().any(is_own) {
                return foreign(
                    format!(
                        "scales {}, which is none of its own workloads",
                        target["name"]
                    ),
                    "have the chart scale what it makes, or turn its autoscaler off, in \
                     `run.chart_values` of the service",
                );
            }
            return Ok(());
        }
        _ => return Ok(()),
    };
    if let Some(field) = pods::privileged(template) {
        return Err(StepError::fatal(
            "chart_privileged",
            format!(
                "the chart makes {what}, whose pods ask by `{field}` for more than a container may have \
                 of its node (the profile \"baseline\" of the Pod Security Standards)"
            ),
            "turn it off in `run.chart_values` of the service; run by hand what needs the node itself",
        ));
    }
    let own = release.name();
    if let Some(secret) = pods::secrets(refers).into_iter().find(|name| *name != own) {
        return foreign(
            format!("refers to the Secret {secret}, which is not that of this release ({own})"),
            "have it refer to `$(DAYBOOK_RELEASE)` in `run.chart_values` of the service, and give that \
             its values with `daybook secret set`; what images are pulled with belongs to the account \
             `default` of the namespace",
        );
    }
    let is_made = |account: &str| {
        let mut all = all.iter();
        all.any(|of| of["kind"] == "ServiceAccount" && name(of) == account)
    };
    let mut accounts = pods::accounts(template);
    if let Some(account) = accounts.find(|account| *account != "default" && !is_made(account)) {
        return foreign(
            format!("runs as the account {account}, which the chart does not make"),
            "have the chart make its account (often `serviceAccount.create: true`), or none, in \
             `run.chart_values` of the service",
        );
    }
    Ok(())
}

/// The labels of everything that is made of a release.
type Labels = BTreeMap<&'static str, String>;

fn labels(release: &ChartRelease<'_>) -> Labels {
    [
        (MANAGED_BY, DAYBOOK.to_owned()),
        ("daybook.dev/project", release.project.to_string()),
        ("daybook.dev/environment", release.environment.to_string()),
        ("daybook.dev/ephemeral", release.ephemeral.to_string()),
        ("daybook.dev/service", release.service.to_string()),
        (DEPLOYMENT, release.deployment.to_string()),
    ]
    .into()
}

/// Gives an object these labels, and its pods, and what selects pods; none if it is none.
fn own(object: &mut Value, labels: &Labels) -> Option<()> {
    // What it comes to is for the cluster to say.
    object.as_object_mut()?.remove("status");
    keep_description(map_at(object, &["metadata"])?)?;
    add(map_at(object, &["metadata", "labels"])?, labels);
    let kind = object["kind"].as_str().unwrap_or_default().to_owned();
    match kind.as_str() {
        "Deployment" | "StatefulSet" => {
            write_amounts(&mut object["spec"]);
            keep_description(map_at(object, &["spec", "template", "metadata"])?)?;
            let template = ["spec", "template", "metadata", "labels"];
            add(map_at(object, &template)?, labels);
            narrow(
                map_at(object, &["spec", "selector", "matchLabels"])?,
                labels,
            );
        }
        "PodDisruptionBudget" => {
            narrow(
                map_at(object, &["spec", "selector", "matchLabels"])?,
                labels,
            );
        }
        "NetworkPolicy" => {
            narrow(
                map_at(object, &["spec", "podSelector", "matchLabels"])?,
                labels,
            );
        }
        "Service" if !object["spec"]["selector"].is_null() => {
            narrow(map_at(object, &["spec", "selector"])?, labels);
        }
        _ => {}
    }
    Some(())
}

/// Leaves of an object's metadata its name, labels and annotations: the rest is for the cluster to say, or
/// would hold the object, or have it go with another one. None if they are not what they are to be.
fn keep_description(metadata: &mut Map<String, Value>) -> Option<()> {
    metadata.retain(|key, _| ["name", "labels", "annotations"].contains(&key.as_str()));
    for described in ["labels", "annotations"] {
        let Some(of) = metadata.get_mut(described) else {
            continue;
        };
        let of = of.as_object_mut()?;
        of.retain(|key, _| !is_order(key));
        if !of.values().all(Value::is_string) {
            return None;
        }
        if of.is_empty() {
            metadata.remove(described);
        }
    }
    Some(())
}

/// Whether a label or an annotation tells Argo CD, Helm or Daybook what to do with an object, which
/// is not for a chart to say.
fn is_order(key: &str) -> bool {
    let domain = key.split_once('/').map_or("", |(domain, _)| domain);
    let is_of = |owner: &str| {
        let within = domain.strip_suffix(owner);
        within.is_some_and(|within| within.is_empty() || within.ends_with('.'))
    };
    // It only says where an object is from, and there are selectors that have it.
    let is_origin = key == "helm.sh/chart";
    !is_origin
        && ["argoproj.io", "daybook.dev", "helm.sh"]
            .into_iter()
            .any(is_of)
        || key == "kubectl.kubernetes.io/last-applied-configuration"
}

/// Writes amounts as an API server keeps them, so that what is there is as it was committed.
fn write_amounts(value: &mut Value) {
    let write = |amount: &mut Value| {
        let text = match &*amount {
            Value::String(text) => text.clone(),
            Value::Number(number) => number.to_string(),
            _ => return,
        };
        *amount = json!(Quantity::new(&text));
    };
    match value {
        Value::Object(map) => {
            for (key, value) in map {
                match (key.as_str(), value) {
                    ("limits" | "requests", Value::Object(amounts)) => {
                        amounts.values_mut().for_each(write);
                    }
                    ("sizeLimit", amount) => write(amount),
                    (_, value) => write_amounts(value),
                }
            }
        }
        Value::Array(list) => list.iter_mut().for_each(write_amounts),
        _ => {}
    }
}

/// Puts labels in place of others.
fn add(to: &mut Map<String, Value>, labels: &Labels) {
    for (key, value) in labels {
        to.insert((*key).to_owned(), json!(value));
    }
}

/// Narrows a selector of pods to those of this deployment, and leads it to them where it goes by a
/// label that is another one now.
fn narrow(selector: &mut Map<String, Value>, labels: &Labels) {
    selector.retain(|key, _| labels.contains_key(key.as_str()) || !is_order(key));
    for (key, value) in labels {
        if *key == DEPLOYMENT || selector.contains_key(*key) {
            selector.insert((*key).to_owned(), json!(value));
        }
    }
}

/// Sees to it that a Service with the release's name answers on port 80, as that of every release does.
fn address(
    objects: &mut Vec<Value>,
    chart: &PinnedChart,
    release: &ChartRelease<'_>,
    labels: &Labels,
) -> Result<(), StepError> {
    let own = release.name();
    let in_repository = chart.chart.as_str().rsplit('/').next().unwrap_or_default();
    let by_helm = format!("{own}-{in_repository}");
    let leads_to_pods = |object: &Value| {
        let spec = &object["spec"];
        object["kind"] == "Service"
            && spec["selector"].is_object()
            && spec["clusterIP"] != "None"
            && spec["ports"]
                .as_array()
                .is_some_and(|ports| !ports.is_empty() && ports.iter().all(Value::is_object))
    };
    let services: Vec<usize> = (0..objects.len())
        .filter(|at| leads_to_pods(&objects[*at]))
        .collect();
    let called = |wanted: &str| {
        let mut services = services.iter().copied();
        services.find(|at| name(&objects[*at]) == wanted)
    };
    let main = match services.as_slice() {
        [] => None,
        [one] => Some(*one),
        _ => Some(called(&own).or_else(|| called(&by_helm)).ok_or_else(|| {
            let names: Vec<_> = services.iter().map(|at| name(&objects[*at])).collect();
            StepError::fatal(
                "chart_address_unclear",
                format!(
                    "the chart makes several Services ({}), and it is not clear which one has the \
                     traffic of the service",
                    names.join(", ")
                ),
                format!(
                    "have the one that has it called {own} or {by_helm} in `run.chart_values` of the \
                     service, often with `fullnameOverride: $(DAYBOOK_RELEASE)`"
                ),
            )
        })?),
    };
    let (selector, target) = match main {
        Some(main) => {
            let spec = &objects[main]["spec"];
            let ports = spec["ports"]
                .as_array()
                .map(Vec::as_slice)
                .unwrap_or_default();
            let by_name = ports.iter().find(|port| port["name"] == "http");
            let by_number = ports.iter().find(|port| port["port"] == 80);
            let port = by_number.or(by_name).or(ports.first());
            let port = port.cloned().unwrap_or_default();
            if name(&objects[main]) == own {
                if port["port"] != 80 {
                    lead_from_80(&mut objects[main]["spec"]["ports"], &port);
                }
                return Ok(());
            }
            let target = match &port["targetPort"] {
                Value::Null => port["port"].clone(),
                target => target.clone(),
            };
            (spec["selector"].clone(), target)
        }
        None => (
            json!({ DEPLOYMENT: release.deployment }),
            json!(release.port),
        ),
    };
    let service = json!({
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": { "name": own, "labels": labels },
        "spec": {
            "type": "ClusterIP",
            "selector": selector,
            "ports": [{ "name": "http", "port": 80, "targetPort": target, "protocol": "TCP" }],
        },
    });
    objects.push(service);
    Ok(())
}

/// Has a Service answer on port 80 as it does on another one.
fn lead_from_80(ports: &mut Value, like: &Value) {
    let Some(ports) = ports.as_array_mut() else {
        return;
    };
    let mut further = like.clone();
    further["name"] = json!("daybook");
    further["port"] = json!(80);
    if further["targetPort"].is_null() {
        further["targetPort"] = like["port"].clone();
    }
    if let Some(further) = further.as_object_mut() {
        further.remove("nodePort");
    }
    // Where there are several, each has a name.
    if let [one] = ports.as_mut_slice()
        && one["name"].is_null()
    {
        one["name"] = json!("main");
    }
    ports.push(further);
}

/// What says, on the cluster and in the repository, which chart a release is of.
fn inventory(chart: &PinnedChart, release: &ChartRelease<'_>, labels: &Labels) -> Value {
    let mut object = json!({
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": { "name": format!("{}-chart", release.name()), "labels": labels },
        "data": { "chart": chart.chart, "version": chart.version, "digest": chart.digest },
    });
    object["metadata"]["labels"][CHART] = json!("true");
    object
}

#[cfg(test)]
mod tests {
    use daybook_events::{DeploymentId, Digest, EnvironmentName, ProjectName, ServiceName};

    use super::*;

    const ID: u128 = 0xdb00_0000_0000_4000_8000_0000_1234_5678;

    fn chart() -> PinnedChart {
        PinnedChart {
            chart: "https://charts.example.com/stable/web".parse().unwrap(),
            version: "1.4.2".parse().unwrap(),
            digest: Digest::of(b"web"),
        }
    }

    fn made(documents: Vec<Value>) -> Result<Vec<Value>, StepError> {
        let project: ProjectName = "shop".parse().unwrap();
        let environment: EnvironmentName = "production".parse().unwrap();
        let service: ServiceName = "api".parse().unwrap();
        let release = ChartRelease {
            project: &project,
            environment: &environment,
            ephemeral: false,
            service: &service,
            deployment: DeploymentId(uuid::Uuid::from_u128(ID)),
            values: None,
            port: 9000,
        };
        assert_eq!(release.name(), "api-12345678");
        objects(documents, "shop--production", &chart(), &release)
    }

    fn workload() -> Value {
        json!({
            "apiVersion": "apps/v1",
            "kind": "Deployment",
            "metadata": {
                "name": "api-12345678-web",
                "labels": { MANAGED_BY: "Helm", "helm.sh/chart": "web-1.4.2" },
                "annotations": null,
            },
            "spec": {
                "replicas": 2,
                "selector": { "matchLabels": { "app": "web", MANAGED_BY: "Helm" } },
                "template": {
                    "metadata": { "labels": { "app": "web", MANAGED_BY: "Helm" } },
                    "spec": { "containers": [{ "name": "web", "image": "web:1" }] },
                },
            },
        })
    }

    fn service(name: &str, port: u16) -> Value {
        json!({
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": { "name": name },
            "spec": {
                "selector": { "app": "web" },
                "ports": [{ "port": port, "targetPort": "web" }],
            },
        })
    }

    fn find<'a>(objects: &'a [Value], what: &str) -> &'a Value {
        objects.iter().find(|object| named(object) == what).unwrap()
    }

    #[test]
    fn everything_has_the_labels_and_selects_its_own_pods_only() {
        let policy = json!({
            "apiVersion": "networking.k8s.io/v1",
            "kind": "NetworkPolicy",
            "metadata": { "name": "api-12345678" },
            "spec": { "podSelector": {}, "policyTypes": ["Ingress"] },
        });
        // Many charts say where they are rendered for.
        let mut front = service("api-12345678-web", 8080);
        front["metadata"]["namespace"] = json!("shop--production");
        let made = made(vec![json!({}), front, workload(), policy]);
        let made = made.unwrap();
        let id = DeploymentId(uuid::Uuid::from_u128(ID)).to_string();
        for object in &made {
            let labels = &object["metadata"]["labels"];
            assert_eq!(labels[MANAGED_BY], "daybook", "{object}");
            assert_eq!(labels["daybook.dev/project"], "shop");
            assert_eq!(labels["daybook.dev/environment"], "production");
            assert_eq!(labels["daybook.dev/service"], "api");
            assert_eq!(labels[DEPLOYMENT], *id);
        }
        let workload = find(&made, "Deployment api-12345678-web");
        assert_eq!(workload["metadata"]["labels"]["helm.sh/chart"], "web-1.4.2");
        assert_eq!(workload["metadata"].get("annotations"), None);
        let selector = json!({ "app": "web", MANAGED_BY: "daybook", DEPLOYMENT: id });
        assert_eq!(workload["spec"]["selector"]["matchLabels"], selector);
        let of_pods = &workload["spec"]["template"]["metadata"]["labels"];
        for (key, value) in selector.as_object().unwrap() {
            assert_eq!(&of_pods[key], value);
        }
        let front = find(&made, "Service api-12345678-web");
        assert_eq!(front["metadata"].get("namespace"), None);
        let policy = find(&made, "NetworkPolicy api-12345678");
        let only = json!({ "matchLabels": { DEPLOYMENT: id } });
        assert_eq!(policy["spec"]["podSelector"], only);
        let address = find(&made, "Service api-12345678");
        let selector = json!({ "app": "web", DEPLOYMENT: id });
        assert_eq!(address["spec"]["selector"], selector);
        let port = json!({ "name": "http", "port": 80, "targetPort": "web", "protocol": "TCP" });
        assert_eq!(address["spec"]["ports"], json!([port]));
        let inventory = find(&made, "ConfigMap api-12345678-chart");
        assert_eq!(inventory["data"]["version"], "1.4.2");
        assert_eq!(inventory["data"]["digest"], chart().digest.as_str());
        let kinds: Vec<_> = made.iter().map(|o| o["kind"].as_str().unwrap()).collect();
        let order = [
            "ConfigMap",
            "NetworkPolicy",
            "Deployment",
            "Service",
            "Service",
        ];
        assert_eq!(kinds, order);
    }

    #[test]
    fn a_service_of_the_releases_name_answers_on_port_80() {
        let made_of = |services: Vec<Value>| made([vec![workload()], services].concat());
        let ports = |made: &[Value]| {
            let ports = &find(made, "Service api-12345678")["spec"]["ports"];
            let ports = ports.as_array().unwrap().iter();
            ports
                .map(|p| (p["port"].clone(), p["targetPort"].clone()))
                .collect::<Vec<_>>()
        };
        let (http, web) = (json!(80), json!("web"));
        let none = made_of(Vec::new()).unwrap();
        assert_eq!(ports(&none), [(http.clone(), json!(9000))]);
        let right = made_of(vec![service("api-12345678", 80)]).unwrap();
        assert_eq!(ports(&right), [(http.clone(), web.clone())]);
        let other = made_of(vec![service("api-12345678", 8080)]).unwrap();
        assert_eq!(
            ports(&other),
            [(json!(8080), web.clone()), (http.clone(), web.clone())]
        );
        let of_helm = made_of(vec![
            service("api-12345678-web", 80),
            service("api-12345678-metrics", 80),
        ]);
        assert_eq!(ports(&of_helm.unwrap()), [(http, web)]);
        let several = ["api-12345678-one", "two-12345678"].map(|name| service(name, 80));
        let unclear = made_of(several.into()).unwrap_err();
        assert_eq!(unclear.code, "chart_address_unclear");
        assert!(unclear.remedy.contains("fullnameOverride"), "{unclear:?}");
    }

    #[test]
    fn what_is_not_for_daybook_to_make_is_refused() {
        let of = |version: &str, kind: &str| json!({ "apiVersion": version, "kind": kind, "metadata": { "name": "x-12345678" } });
        let with = |mut object: Value, pointer: &[&str], value: Value| {
            let mut at = &mut object;
            for key in pointer {
                at = &mut at[*key];
            }
            *at = value;
            object
        };
        let hook = ["metadata", "annotations", "helm.sh/hook"];
        let keeps = json!([{ "metadata": { "name": "data" } }]);
        for (object, code) in [
            (
                of("rbac.authorization.k8s.io/v1", "ClusterRole"),
                "chart_cluster_scoped",
            ),
            (of("v1", "Namespace"), "chart_cluster_scoped"),
            (
                of("apiextensions.k8s.io/v1", "CustomResourceDefinition"),
                "chart_crds",
            ),
            (
                with(of("batch/v1", "Job"), &hook, json!("pre-install")),
                "chart_hooks",
            ),
            (of("batch/v1", "Job"), "chart_kind_unsupported"),
            (of("apps/v1beta1", "Deployment"), "chart_kind_unsupported"),
            (of("v1", "Secret"), "chart_secrets"),
            (of("networking.k8s.io/v1", "Ingress"), "chart_routes"),
            (of("v1", "PersistentVolumeClaim"), "chart_keeps_data"),
            (
                with(
                    of("apps/v1", "StatefulSet"),
                    &["spec", "volumeClaimTemplates"],
                    keeps,
                ),
                "chart_keeps_data",
            ),
            (
                with(
                    of("v1", "ConfigMap"),
                    &["metadata", "namespace"],
                    json!("kube-system"),
                ),
                "chart_other_namespace",
            ),
            (
                with(
                    of("v1", "ConfigMap"),
                    &["metadata", "name"],
                    json!("settings"),
                ),
                "chart_name_shared",
            ),
            (
                with(of("v1", "Service"), &["spec", "type"], json!("NodePort")),
                "chart_routes",
            ),
            (
                with(
                    of("v1", "Service"),
                    &["spec", "externalIPs"],
                    json!(["192.0.2.1"]),
                ),
                "chart_routes",
            ),
            (
                with(
                    of("v1", "Service"),
                    &["spec", "loadBalancerIP"],
                    json!("192.0.2.1"),
                ),
                "chart_routes",
            ),
            (
                with(
                    of("v1", "ConfigMap"),
                    &["metadata", "annotations", "checksum"],
                    json!(7),
                ),
                "chart_invalid",
            ),
            (json!({ "Error": "yaml: line 3" }), "chart_invalid"),
            (json!("text"), "chart_invalid"),
            (
                with(of("v1", "ConfigMap"), &["metadata", "name"], json!("")),
                "chart_invalid",
            ),
        ] {
            let error = match made(vec![workload(), object.clone()]) {
                Err(error) => error,
                // What is no map is no document.
                Ok(_) => {
                    assert!(object.is_string(), "{object} is taken");
                    continue;
                }
            };
            assert_eq!(error.code, code, "{object}");
            assert!(!error.retryable && !error.remedy.is_empty());
        }
        assert_eq!(
            made(vec![workload(), workload()]).unwrap_err().code,
            "chart_invalid"
        );
        let idle = with(workload(), &["spec", "replicas"], json!(0));
        let error = made(vec![idle]).unwrap_err();
        assert_eq!(error.code, "chart_without_workload");
        let large = with(
            of("v1", "ConfigMap"),
            &["data"],
            json!({ "x": "x".repeat(BYTES_MAX) }),
        );
        let error = made(vec![workload(), large]).unwrap_err();
        assert_eq!(error.code, "chart_too_large");
    }

    #[test]
    fn pods_are_confined_and_refer_to_what_is_of_their_release() {
        let refused = |pod: Value, further: Vec<Value>| {
            let mut object = workload();
            object["spec"]["template"]["spec"]
                .as_object_mut()
                .unwrap()
                .extend(pod.as_object().unwrap().clone());
            let result = made([vec![object], further].concat());
            result.err().map(|e| (e.code, e.message))
        };
        let (code, message) = refused(json!({ "hostPID": true }), Vec::new()).unwrap();
        assert_eq!(code, "chart_privileged");
        assert!(
            message.contains("Deployment api-12345678-web") && message.contains("`hostPID`"),
            "{message}"
        );
        let pulls = |name: &str| json!({ "imagePullSecrets": [{ "name": name }] });
        assert_eq!(refused(pulls("api-12345678"), Vec::new()), None);
        // That of another release of the same service.
        let (code, message) = refused(pulls("api-87654321"), Vec::new()).unwrap();
        assert_eq!(code, "chart_foreign_reference");
        assert!(message.contains("api-87654321"), "{message}");

        let account = |secrets: Value| {
            json!({
                "apiVersion": "v1",
                "kind": "ServiceAccount",
                "metadata": { "name": "api-12345678" },
                "imagePullSecrets": secrets,
            })
        };
        let runs_as = |name: &str| json!({ "serviceAccountName": name });
        let own = || vec![account(json!([]))];
        assert_eq!(refused(runs_as("api-12345678"), own()), None);
        assert_eq!(refused(runs_as("default"), own()), None);
        let (code, _) = refused(runs_as("api-12345678"), Vec::new()).unwrap();
        assert_eq!(code, "chart_foreign_reference");
        let pulling = vec![account(json!([{ "name": "other" }]))];
        let (code, _) = refused(json!({}), pulling).unwrap();
        assert_eq!(code, "chart_foreign_reference");

        let scales = |kind: &str, name: &str| {
            let autoscaler = json!({
                "apiVersion": "autoscaling/v2",
                "kind": "HorizontalPodAutoscaler",
                "metadata": { "name": "api-12345678" },
                "spec": { "scaleTargetRef": { "kind": kind, "name": name } },
            });
            refused(json!({}), vec![autoscaler]).map(|(code, _)| code)
        };
        assert_eq!(scales("Deployment", "api-12345678-web"), None);
        let foreign = Some("chart_foreign_reference".to_owned());
        assert_eq!(scales("StatefulSet", "api-12345678-web"), foreign);
        assert_eq!(scales("Deployment", "web-87654321"), foreign);
    }

    #[test]
    fn metadata_is_a_name_and_a_description() {
        let mut object = workload();
        object["status"] = json!({ "replicas": 2 });
        let metadata = json!({
            "name": "api-12345678-web",
            "labels": { "argocd.argoproj.io/instance": "x", "daybook.dev/chart": "true", "app": "web" },
            "annotations": {
                "argocd.argoproj.io/sync-options": "Prune=false",
                "daybook.dev/kept": "true",
                "helm.sh/resource-policy": "keep",
                "example.com/argoproj.io": "stays",
            },
            "finalizers": ["example.com/never"],
            "ownerReferences": [{ "kind": "Deployment", "name": "other", "uid": "x" }],
            "resourceVersion": "7",
            "managedFields": [],
        });
        object["metadata"] = metadata;
        let pod = &mut object["spec"]["template"]["metadata"];
        pod["finalizers"] = json!(["example.com/never"]);
        pod["annotations"] = json!({ "argocd.argoproj.io/hook": "PreSync" });
        for of in ["template/metadata/labels", "selector/matchLabels"] {
            let labels = object.pointer_mut(&format!("/spec/{of}")).unwrap();
            labels["daybook.dev/chart"] = json!("true");
        }
        let made = made(vec![object]).unwrap();
        // Whatever else, what was applied is found by this.
        assert_eq!(named(&made[0]), "ConfigMap api-12345678-chart");
        let object = find(&made, "Deployment api-12345678-web");
        assert_eq!(object.get("status"), None);
        let metadata = object["metadata"].as_object().unwrap();
        let keys: Vec<_> = metadata.keys().collect();
        assert_eq!(keys, ["annotations", "labels", "name"]);
        let annotations = json!({ "example.com/argoproj.io": "stays" });
        assert_eq!(metadata["annotations"], annotations);
        let labels = metadata["labels"].as_object().unwrap();
        assert!(labels.contains_key("app"), "{labels:?}");
        let pod = &object["spec"]["template"]["metadata"];
        let keys: Vec<_> = pod.as_object().unwrap().keys().collect();
        assert_eq!(keys, ["labels"]);
        for labels in [
            &metadata["labels"],
            &pod["labels"],
            &object["spec"]["selector"]["matchLabels"],
        ] {
            assert!(labels.get(CHART).is_none(), "{labels}");
            assert!(labels.get("argocd.argoproj.io/instance").is_none());
        }
    }

    #[test]
    fn amounts_are_written_as_an_api_server_keeps_them() {
        let mut object = workload();
        let pod = &mut object["spec"]["template"]["spec"];
        pod["containers"][0]["resources"] = json!({
            "limits": { "cpu": 0.5, "memory": "1024Mi", "example.com/gpu": 1 },
            "requests": { "memory": "1.5Gi" },
        });
        pod["volumes"] = json!([{ "name": "tmp", "emptyDir": { "sizeLimit": "1000M" } }]);
        pod["containers"][0]["env"] = json!([{ "name": "SIZE", "value": "1024Mi" }]);
        let made = made(vec![object]).unwrap();
        let pod = &find(&made, "Deployment api-12345678-web")["spec"]["template"]["spec"];
        let amounts = json!({
            "limits": { "cpu": "500m", "memory": "1Gi", "example.com/gpu": "1" },
            "requests": { "memory": "1536Mi" },
        });
        assert_eq!(pod["containers"][0]["resources"], amounts);
        assert_eq!(pod["volumes"][0]["emptyDir"]["sizeLimit"], "1G");
        assert_eq!(pod["containers"][0]["env"][0]["value"], "1024Mi");
    }

    #[test]
    fn a_release_that_is_stopped_runs_nothing() {
        let none = stopped(&workload()).unwrap();
        assert_eq!(instances(&none), 0);
        assert_eq!(instances(&workload()), 2);
        let autoscaler = json!({ "kind": "HorizontalPodAutoscaler" });
        assert_eq!(stopped(&autoscaler), None);
        let service = service("api", 80);
        assert_eq!(stopped(&service), Some(service));
    }
}
