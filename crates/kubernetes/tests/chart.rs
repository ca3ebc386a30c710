//! The chart in every GitOps repository and the objects that are applied directly are the same.

#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;
use std::process::Command;

use daybook_events::chart::PinnedChart;
use daybook_events::resources::Quantity;
use daybook_events::secret::{Commitment, SecretRef};
use daybook_events::spec::{Autoscaling, PinnedImage, RunSpec, VolumeSpec};
use daybook_events::{DeploymentId, Digest};
use daybook_kubernetes::objects::{GatewayRef, Place, objects};
use daybook_testkit::kubernetes::argocd::helm_program;
use daybook_workers::gitops::chart_files;
use daybook_workers::values::{EnvironmentValues, ReleaseValues, RenderedChart};
use serde_json::{Value, json};

fn release(n: u128, run: RunSpec) -> (DeploymentId, ReleaseValues) {
    let release = ReleaseValues {
        image: PinnedImage {
            repository: "registry.example.com:5000/shop/web".parse().unwrap(),
            // A tag that YAML might take for a number.
            tag: "1234567".parse().unwrap(),
            digest: Digest::of(&n.to_be_bytes()),
        },
        clusters: vec!["oslo".parse().unwrap(), "bergen".parse().unwrap()],
        secret_env: BTreeMap::new(),
        run,
    };
    let id = uuid::Uuid::from_u128(0xdb00_0000_0000_4000_8000_0000_1234_5670 + n);
    (DeploymentId(id), release)
}

fn values() -> EnvironmentValues {
    let (project, environment) = ("shop".parse().unwrap(), "production".parse().unwrap());
    let mut values = EnvironmentValues::new(project, environment, true);
    let web = values.services.entry("web".parse().unwrap()).or_default();
    let mut run = RunSpec {
        replicas: 3,
        port: 9000,
        ..RunSpec::default()
    };
    for (key, value) in [
        ("PLAIN", "text"),
        ("NUMBER", "0123"),
        ("YES", "yes"),
        ("EMPTY", ""),
        (
            "QUOTED",
            "say \"hello\" to {{ .Values.project }}\n  and \\ a tab\t",
        ),
        ("UNICODE", "grüße 🚀"),
    ] {
        run.env.insert(key.parse().unwrap(), value.to_owned());
    }
    run.command = vec!["serve".to_owned(), "--name=it's $5 $(PORT): #1".to_owned()];
    run.health.path = "/ready?x=1&y=\"2\"".to_owned();
    run.resources = serde_json::from_value(serde_json::json!({
        "requests": { "cpu": "0.25", "memory": "1024Mi" },
        "limits": { "memory": "1.5Gi" },
    }))
    .unwrap();
    run.volumes = serde_json::from_value(serde_json::json!({
        "data": { "path": "/data" },
        // As a service may be that was defined before that was looked at.
        "twin": { "path": "/data/" },
        "shared-files": {
            "path": "/srv/files", "env": "FILES", "size": "1024Mi", "storage_class": "fast.nfs",
            "many_nodes": true,
        },
    }))
    .unwrap();
    let (id, mut whole) = release(1, run);
    let reference = SecretRef {
        secret: "DATABASE_URL".parse().unwrap(),
        scope: Default::default(),
        version: 2,
        commitment: Commitment::from_hmac(&[7; 32]),
    };
    for name in ["DATABASE_URL", "VOLUME_DATA"] {
        let name = name.parse().unwrap();
        whole.secret_env.insert(name, reference.clone());
    }
    web.releases.insert(id, whole);
    let mut run = RunSpec::default();
    run.health.path = String::new();
    let (id, mut plain) = release(2, run);
    plain.run.replicas = 0;
    web.releases.insert(id, plain);
    // What is stopped is not scaled, and what runs is.
    let autoscaling = || {
        Some(Autoscaling {
            max: 8,
            cpu_percent: 70,
        })
    };
    // It shares a volume with the others, which say otherwise how large it is: as much as any does.
    let sized = |size: &str| VolumeSpec {
        path: "/else/where".to_owned(),
        many_nodes: true,
        size: Some(Quantity::new(size)),
        ..VolumeSpec::default()
    };
    for (n, replicas, size) in [(4, 0, "10Mi"), (5, 1, "1.5Gi")] {
        let run = RunSpec {
            replicas,
            autoscaling: autoscaling(),
            volumes: [("data".parse().unwrap(), sized(size))].into(),
            ..RunSpec::default()
        };
        let (id, release) = release(n, run);
        web.releases.insert(id, release);
    }
    let (id, mut elsewhere) = release(3, RunSpec::default());
    elsewhere.clusters = vec!["bergen".parse().unwrap()];
    let other = values
        .services
        .entry("worker".parse().unwrap())
        .or_default();
    other.releases.insert(id, elsewhere);
    values
}

/// What `helm template` makes of the chart with a values file; none without helm.
fn by_helm(values: &str) -> Option<Vec<Value>> {
    let helm = helm_program()?;
    let dir = tempfile::tempdir().unwrap();
    for (path, content) in chart_files() {
        let file = dir.path().join("base/charts/daybook-app").join(path);
        std::fs::create_dir_all(file.parent().unwrap()).unwrap();
        std::fs::write(file, content).unwrap();
    }
    let base = dir.path().join("base");
    std::fs::write(
        base.join("Chart.yaml"),
        "apiVersion: v2\nname: shop\nversion: 0.1.0\ndependencies:\n  - name: daybook-app\n    \
         version: \">=0.1.0-0\"\n    repository: \"\"\n",
    )
    .unwrap();
    let file = dir.path().join("values.yaml");
    std::fs::write(&file, values).unwrap();
    let output = Command::new(helm)
        .args(["template", "shop", "--namespace", "shop--production"])
        .args(["--set", "daybook-app.cluster=oslo"])
        .args(["--set", "daybook-app.gateway.name=public"])
        .args(["--set", "daybook-app.gateway.namespace=edge"])
        .args(["--set", "daybook-app.domain=example.com"])
        .arg("--values")
        .arg(&file)
        .arg(&base)
        .env("HELM_CACHE_HOME", dir.path().join("cache"))
        .env("HELM_CONFIG_HOME", dir.path().join("config"))
        .env("HELM_DATA_HOME", dir.path().join("data"))
        .output()
        .unwrap();
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    let text = String::from_utf8(output.stdout).unwrap();
    let rendered = text
        .split("\n---\n")
        .filter(|part| {
            part.lines()
                .any(|l| !l.starts_with('#') && !l.trim().is_empty() && l != "---")
        })
        .map(|part| serde_saphyr::from_str(part).unwrap_or_else(|e| panic!("{e}:\n{part}")));
    Some(rendered.collect())
}

/// The objects of an environment by kind and name, of which helm makes the same; none without helm.
fn by_both(values: &EnvironmentValues) -> Option<BTreeMap<String, Value>> {
    let rendered = by_helm(&values.to_yaml().unwrap())?;
    let gateway = GatewayRef {
        name: "public".to_owned(),
        namespace: Some("edge".to_owned()),
        section_name: None,
    };
    let place = Place {
        cluster: &"oslo".parse().unwrap(),
        namespace: "shop--production",
        gateway: Some((&gateway, "example.com")),
    };
    let by_name = |objects: Vec<Value>| -> BTreeMap<String, Value> {
        let named = objects.into_iter().map(|o| {
            let name = format!("{} {}", o["kind"], o["metadata"]["name"]);
            (name, o)
        });
        named.collect()
    };
    let ours = objects(values, &place)
        .into_iter()
        .map(|o| o.body)
        .collect();
    let (ours, theirs) = (by_name(ours), by_name(rendered));
    let names = |of: &BTreeMap<String, Value>| of.keys().cloned().collect::<Vec<_>>();
    assert_eq!(names(&ours), names(&theirs));
    for (name, object) in &ours {
        assert_eq!(object, &theirs[name], "{name}");
    }
    Some(ours)
}

#[test]
fn helm_makes_the_same_of_the_chart_as_is_applied_directly() {
    let Some(ours) = by_both(&values()) else {
        return;
    };
    let of = |kind: &str| {
        let kind = format!("\"{kind}\"");
        ours.keys().filter(|name| name.starts_with(&kind)).count()
    };
    assert_eq!([of("Deployment"), of("Service"), of("HTTPRoute")], [4; 3]);
    assert_eq!([of("ConfigMap"), of("HorizontalPodAutoscaler")], [1; 2]);
    assert_eq!(
        of("PodDisruptionBudget"),
        1,
        "with up to eight, and not with three that a volume keeps on one node"
    );
    assert_eq!(of("PersistentVolumeClaim"), 2, "one a volume of a service");
    let data = &ours["\"PersistentVolumeClaim\" \"web.data\""];
    let size = &data["spec"]["resources"]["requests"]["storage"];
    assert_eq!(size, "1536Mi", "as the largest asks for");
    let all = 4 * 3 + 2 + 1 + 2;
    assert_eq!(ours.len(), all);
}

/// What was rendered of a chart of somebody else.
fn rendered(n: u128, stopped: bool) -> (DeploymentId, RenderedChart) {
    let (id, release) = release(n, RunSpec::default());
    let labels = json!({ "app": "theirs", "daybook.dev/deployment": id });
    let workload = |kind: &str, replicas: Option<u32>| {
        let mut object = json!({
            "apiVersion": "apps/v1",
            "kind": kind,
            "metadata": { "name": format!("{}-{n}", kind.to_lowercase()), "labels": labels },
            "spec": {
                "selector": { "matchLabels": labels },
                "template": {
                    "metadata": { "labels": labels },
                    "spec": { "containers": [{
                        "name": "it",
                        "image": "example.com/it:1.0",
                        "args": ["on", "0644", "1e3", "a: b\n# no", "$(HOME) {{ .Values.x }}"],
                        "resources": { "limits": { "cpu": 0.5, "memory": 1_000_000_000_u64 } },
                    }] },
                },
            },
        });
        if let Some(replicas) = replicas {
            object["spec"]["replicas"] = json!(replicas);
        }
        object
    };
    let map = json!({
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": { "name": format!("map-{n}"), "labels": labels },
        "data": { "yes": "no", "file.conf": "a\n  b\n", "empty": "" },
    });
    let autoscaler = json!({
        "apiVersion": "autoscaling/v2",
        "kind": "HorizontalPodAutoscaler",
        "metadata": { "name": format!("scaler-{n}"), "labels": labels },
        "spec": { "minReplicas": 2, "maxReplicas": 4 },
    });
    let chart = RenderedChart {
        chart: PinnedChart {
            chart: "https://charts.example.com/stable/web".parse().unwrap(),
            version: "1.4.2".parse().unwrap(),
            digest: Digest::of(b"web"),
        },
        clusters: release.clusters,
        secret_env: BTreeMap::new(),
        stopped,
        objects: vec![
            map,
            workload("Deployment", None),
            workload("StatefulSet", Some(3)),
            autoscaler,
        ],
    };
    (id, chart)
}

#[test]
fn helm_makes_the_same_of_what_was_rendered_of_a_chart() {
    let mut values = values();
    let web = values.services.entry("web".parse().unwrap()).or_default();
    web.charts.extend([rendered(6, false), rendered(7, true)]);
    let (id, mut elsewhere) = rendered(8, false);
    elsewhere.clusters = vec!["bergen".parse().unwrap()];
    web.charts.insert(id, elsewhere);
    let Some(ours) = by_both(&values) else {
        return;
    };
    let replicas = |name: &str| ours[name]["spec"]["replicas"].clone();
    assert_eq!(replicas("\"Deployment\" \"deployment-6\""), Value::Null);
    assert_eq!(replicas("\"StatefulSet\" \"statefulset-6\""), 3);
    assert_eq!(replicas("\"Deployment\" \"deployment-7\""), 0);
    assert_eq!(replicas("\"StatefulSet\" \"statefulset-7\""), 0);
    let has = |name: &str| ours.keys().any(|found| found.contains(name));
    assert!(has("scaler-6") && !has("scaler-7") && has("map-7") && !has("map-8"));
    let routes = ours.keys().filter(|name| name.contains("HTTPRoute"));
    assert_eq!(routes.count(), 4 + 2, "one a release that is here");
}

#[test]
fn a_volume_that_is_written_by_hand_counts_instead_of_that_of_the_definition() {
    let mut values = values();
    for service in values.services.values_mut() {
        service.releases.retain(|_, r| r.run.volumes.len() > 1);
    }
    let text = values.to_yaml().unwrap();
    let mut lines = text.lines();
    let line = lines.find(|l| l.trim_start().starts_with("replicas:"));
    let line = line.unwrap();
    let indent = " ".repeat(line.len() - line.trim_start().len());
    let by_hand = serde_json::json!({ "volumes": [
        { "name": "data", "path": "/theirs", "size": "5Gi" },
        { "name": "theirs", "path": "/srv/files/", "size": "5Gi" },
    ]});
    let text = text.replacen(line, &format!("{line}\n{indent}kubernetes: {by_hand}"), 1);
    let Some(rendered) = by_helm(&text) else {
        return;
    };
    let named = |kind: &'static str| rendered.iter().filter(move |o| o["kind"] == kind);
    let claims = named("PersistentVolumeClaim");
    let mut claims: Vec<_> = claims.map(|o| o["metadata"]["name"].as_str()).collect();
    claims.sort_unstable();
    let expected = ["web-data", "web-theirs", "web.twin"].map(Some);
    assert_eq!(claims, expected);
    let workload = named("Deployment").next().unwrap();
    let container = &workload["spec"]["template"]["spec"]["containers"][0];
    // The second one at a path is mounted where the first one is not.
    let mounts = serde_json::json!([
        { "name": "twin", "mountPath": "/data/" },
        { "name": "data", "mountPath": "/theirs" },
        { "name": "theirs", "mountPath": "/srv/files/" },
    ]);
    assert_eq!(container["volumeMounts"], mounts);
}
