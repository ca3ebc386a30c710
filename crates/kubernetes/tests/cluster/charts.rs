//! Releases of Helm charts, against a real API server.

use daybook_events::chart::PinnedChart;
use daybook_workers::charts::{ChartRelease, objects};
use daybook_workers::values::RenderedChart;
use k8s_openapi::api::apps::v1::StatefulSet;
use k8s_openapi::api::core::v1::ServiceAccount;
use k8s_openapi::api::networking::v1::NetworkPolicy;
use serde_json::Value;

use super::*;

/// A front that has the traffic, and a store behind it. What they are called begins with `prefix`.
pub(super) fn documents(prefix: &str, front: u32) -> Vec<Value> {
    let pods = |app: &str, port: u16| {
        json!({
            "metadata": { "labels": { "app": format!("{prefix}-{app}") } },
            "spec": {
                "serviceAccountName": prefix,
                "containers": [{
                    "name": app,
                    "image": "example.com/it:1.0",
                    "ports": [{ "name": "web", "containerPort": port }],
                }],
            },
        })
    };
    let selects = |app: &str| json!({ "app": format!("{prefix}-{app}") });
    vec![
        json!({
            "apiVersion": "apps/v1",
            "kind": "StatefulSet",
            "metadata": { "name": format!("{prefix}-store") },
            "spec": {
                "replicas": 1,
                "serviceName": format!("{prefix}-store"),
                "selector": { "matchLabels": selects("store") },
                "template": pods("store", 6379),
            },
        }),
        json!({
            "apiVersion": "apps/v1",
            "kind": "Deployment",
            "metadata": { "name": format!("{prefix}-front") },
            "spec": {
                "replicas": front,
                "selector": { "matchLabels": selects("front") },
                "template": pods("front", 3000),
            },
        }),
        json!({
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": { "name": format!("{prefix}-store") },
            "spec": { "clusterIP": "None", "selector": selects("store"), "ports": [{ "port": 6379 }] },
        }),
        json!({
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": { "name": format!("{prefix}-front") },
            "spec": { "selector": selects("front"), "ports": [{ "port": 8000, "targetPort": "web" }] },
        }),
        json!({
            "apiVersion": "v1",
            "kind": "ServiceAccount",
            "metadata": { "name": prefix, "annotations": null },
        }),
        json!({
            "apiVersion": "networking.k8s.io/v1",
            "kind": "NetworkPolicy",
            "metadata": { "name": prefix },
            "spec": { "podSelector": {}, "policyTypes": ["Ingress"], "ingress": [{}] },
        }),
    ]
}

/// Lists a release of a chart that makes these documents.
pub(super) fn chart(values: &mut EnvironmentValues, n: u128, documents: Vec<Value>) {
    chart_of(values, &web(), n, documents);
}

/// The same, of a service.
fn chart_of(values: &mut EnvironmentValues, service: &ServiceName, n: u128, documents: Vec<Value>) {
    let pinned = PinnedChart {
        chart: "https://charts.example.com/stable/web".parse().unwrap(),
        version: "1.4.2".parse().unwrap(),
        digest: Digest::of(b"web"),
    };
    let (project, environment) = (values.project.clone(), values.environment.clone());
    let release = ChartRelease {
        project: &project,
        environment: &environment,
        ephemeral: false,
        service,
        deployment: deployment(n),
        values: None,
        port: 8080,
    };
    let rendered = RenderedChart {
        objects: objects::objects(documents, "x", &pinned, &release).unwrap(),
        chart: pinned,
        clusters: vec!["oslo".parse().unwrap()],
        secret_env: BTreeMap::new(),
        stopped: false,
    };
    let listed = values.services.entry(service.clone()).or_default();
    listed.charts.insert(deployment(n), rendered);
}

fn prefix(n: u128) -> String {
    names::release(&web(), deployment(n))
}

/// Lists a release of a chart whose objects are called otherwise, as by somebody who changes the
/// repository by hand: a chart may not make them.
pub(super) fn renamed(values: &mut EnvironmentValues, n: u128, to: &str) {
    let own = prefix(n);
    chart(values, n, documents(&own, 1));
    let service = values.services.get_mut(&web()).unwrap();
    let chart = service.charts.get_mut(&deployment(n)).unwrap();
    for object in &mut chart.objects {
        let kind = object["kind"].as_str().unwrap();
        let name = object["metadata"]["name"].clone();
        let is_daybooks = kind == "ConfigMap" || kind == "Service" && name == own.as_str();
        let other = object.to_string().replace(&own, to);
        *object = serde_json::from_str(&other).unwrap();
        if is_daybooks {
            object["metadata"]["name"] = name;
        }
    }
}

/// How many of Daybook's objects there are, of each kind that a chart makes.
async fn left(stage: &Stage) -> usize {
    async fn count<K>(stage: &Stage) -> usize
    where
        K: kube::Resource<Scope = k8s_openapi::NamespaceResourceScope, DynamicType = ()>
            + Clone
            + std::fmt::Debug
            + serde::de::DeserializeOwned,
    {
        let api: Api<K> = Api::namespaced(stage.client.clone(), &stage.namespace());
        let list = ListParams::default().labels("app.kubernetes.io/managed-by=daybook");
        api.list(&list).await.unwrap().items.len()
    }
    count::<Deployment>(stage).await
        + count::<StatefulSet>(stage).await
        + count::<Service>(stage).await
        + count::<ServiceAccount>(stage).await
        + count::<NetworkPolicy>(stage).await
        + count::<ConfigMap>(stage).await
}

fn problem(status: &AppStatus, n: u128) -> &str {
    let problem = of(status, n).and_then(|r| r.problem.as_ref());
    problem.map_or("", |problem| &problem.reason)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_chart_runs_where_all_of_it_does_and_leaves_nothing() {
    let Some(stage) = Stage::new("charts").await else {
        return;
    };
    let mut values = stage.values();
    chart(&mut values, 1, documents(&prefix(1), 2));
    stage.apply(1, &values).await.unwrap();
    // The front is ready, and the store cannot be: that is not ready, and is said.
    let fate = |pod: &Pod| match pod.name_any().contains("-store-") {
        true => Fate::NoImage("manifest unknown".to_owned()),
        false => Fate::Ready {
            ip: "10.1.2.3".to_owned(),
        },
    };
    let kubelet = Kubelet::start(stage.client.clone(), Some(&stage.namespace()), fate);
    let status = stage.until("the store has no image", |s| {
        ready(s, 1) == 2 && problem(s, 1) == "ImagePullBackOff"
    });
    let status = status.await;
    assert_eq!(of(&status, 1).unwrap().wanted, 3);
    drop(kubelet);

    // A release beside it that runs: only its front has the traffic.
    chart(&mut values, 2, documents(&prefix(2), 2));
    let _kubelet = stage.kubelet(Fate::Ready {
        ip: "10.1.2.3".to_owned(),
    });
    stage.apply(2, &values).await.unwrap();
    let status = stage
        .until("all of it is ready", |s| ready(s, 2) == 3)
        .await;
    let release = of(&status, 2).unwrap();
    assert_eq!((release.wanted, release.problem.as_ref()), (3, None));
    let mut addresses: Vec<_> = release
        .instances
        .iter()
        .map(|i| i.address.as_str())
        .collect();
    addresses.sort_unstable();
    assert_eq!(addresses, ["", "10.1.2.3:3000", "10.1.2.3:3000"]);
    let services: Api<Service> = Api::namespaced(stage.client.clone(), &stage.namespace());
    let address = services.get(&prefix(2)).await.unwrap();
    let selector = address.spec.unwrap().selector.unwrap();
    assert_eq!(selector["app"], format!("{}-front", prefix(2)));
    assert_eq!(
        selector["daybook.dev/deployment"],
        deployment(2).to_string()
    );

    // It is stopped and started again, and the first one is removed.
    let set = |values: &mut EnvironmentValues, stopped| {
        let service = values.services.get_mut(&web()).unwrap();
        service.charts.get_mut(&deployment(2)).unwrap().stopped = stopped;
        service.charts.remove(&deployment(1));
    };
    set(&mut values, true);
    stage.apply(3, &values).await.unwrap();
    let stopped = |s: &AppStatus| of(s, 2).is_some_and(|r| r.wanted == 0 && r.instances.is_empty());
    stage.until("it is stopped", stopped).await;
    stage
        .until("the first is gone", |s| of(s, 1).is_none())
        .await;
    set(&mut values, false);
    stage.apply(4, &values).await.unwrap();
    stage.until("it runs again", |s| ready(s, 2) == 3).await;
    // One of each, and a Service and a ConfigMap of Daybook's.
    assert_eq!(left(&stage).await, 8);

    values.services.clear();
    stage.apply(5, &values).await.unwrap();
    stage.until("it is gone", |s| s.releases.is_empty()).await;
    assert_eq!(left(&stage).await, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_named_as_somebody_elses_is_refused_and_nothing_is_touched() {
    let Some(stage) = Stage::new("names").await else {
        return;
    };
    let _kubelet = stage.kubelet(Fate::Ready {
        ip: "10.1.2.3".to_owned(),
    });
    let mut values = stage.values();
    renamed(&mut values, 2, "fixed");
    stage.apply(1, &values).await.unwrap();
    stage.until("it runs", |s| ready(s, 2) == 2).await;

    // Another release of the same names, whichever comes first by its id.
    renamed(&mut values, 1, "fixed");
    renamed(&mut values, 3, "fixed");
    stage.apply(2, &values).await.unwrap();
    let status = stage.until("both are refused", |s| {
        problem(s, 1) == "NameTaken" && problem(s, 3) == "NameTaken"
    });
    let status = status.await;
    assert_eq!(ready(&status, 2), 2);
    let said = of(&status, 3).unwrap().problem.as_ref().unwrap();
    assert!(!said.transient && said.remedy.contains("fullnameOverride"));

    // What somebody has made there by hand stays as it is, too.
    values.services.get_mut(&web()).unwrap().charts.clear();
    let accounts: Api<ServiceAccount> = Api::namespaced(stage.client.clone(), &stage.namespace());
    let theirs = json!({ "metadata": { "name": "theirs", "labels": { "app": "x" } } });
    let theirs: ServiceAccount = serde_json::from_value(theirs).unwrap();
    accounts
        .create(&PostParams::default(), &theirs)
        .await
        .unwrap();
    renamed(&mut values, 4, "theirs");
    stage.apply(3, &values).await.unwrap();
    stage
        .until("it is refused", |s| problem(s, 4) == "NameTaken")
        .await;
    values.services.clear();
    stage.apply(4, &values).await.unwrap();
    stage.until("all is gone", |s| s.releases.is_empty()).await;
    let kept = accounts.get("theirs").await.unwrap();
    assert_eq!(kept.labels().len(), 1, "{kept:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_of_a_release_that_runs_goes_when_one_of_its_objects_is_relabelled() {
    let Some(stage) = Stage::new("relabelled").await else {
        return;
    };
    let _kubelet = stage.kubelet(Fate::Ready {
        ip: "10.1.2.3".to_owned(),
    });
    let mut values = stage.values();
    chart(&mut values, 1, documents(&prefix(1), 2));
    stage.apply(1, &values).await.unwrap();
    let whole = |n| {
        move |s: &AppStatus| {
            s.revision == Some(commit(n)) && ready(s, 1) == 3 && problem(s, 1).is_empty()
        }
    };
    stage.until("all of it runs", whole(1)).await;
    assert_eq!(left(&stage).await, 8);

    let accounts: Api<ServiceAccount> = Api::namespaced(stage.client.clone(), &stage.namespace());
    let label = |value: Option<&str>| {
        let labels = json!({ "app.kubernetes.io/managed-by": value });
        Patch::Merge(json!({ "metadata": { "labels": labels } }))
    };
    let by_somebody = PatchParams {
        field_manager: Some("somebody".to_owned()),
        ..PatchParams::default()
    };
    let lost = accounts.patch(&prefix(1), &by_somebody, &label(None)).await;
    lost.unwrap();
    assert_eq!(left(&stage).await, 7);
    stage.apply(2, &values).await.unwrap();
    stage.until("it has its label again", whole(2)).await;
    assert_eq!(left(&stage).await, 8);

    // A label that somebody has set is not taken from them, and nothing goes because of it.
    let policies: Api<NetworkPolicy> = Api::namespaced(stage.client.clone(), &stage.namespace());
    let set = label(Some("somebody"));
    let set = policies.patch(&prefix(1), &by_somebody, &set).await;
    set.unwrap();
    stage.apply(3, &values).await.unwrap();
    let status = stage
        .until("whose it is is said", |s| problem(s, 1) == "ObjectRefused")
        .await;
    let said = of(&status, 1).unwrap().problem.as_ref().unwrap();
    assert!(said.message.contains("(somebody)"), "{said:?}");
    assert_eq!(ready(&status, 1), 3);
    assert!(policies.get_opt(&prefix(1)).await.unwrap().is_some());
    assert_eq!(left(&stage).await, 7);
    let unset = policies.patch(&prefix(1), &by_somebody, &label(None)).await;
    unset.unwrap();
    stage.apply(4, &values).await.unwrap();
    stage.until("all of it is as it was", whole(4)).await;
    assert_eq!(left(&stage).await, 8);

    // What somebody has made under a name that it is to have stays theirs, and the rest as it is.
    let name = format!("{}-theirs", prefix(1));
    let mut more = documents(&prefix(1), 2);
    more.push(json!({
        "apiVersion": "v1",
        "kind": "ServiceAccount",
        "metadata": { "name": name },
    }));
    let theirs = json!({ "metadata": { "name": name, "labels": { "app": "x" } } });
    let theirs: ServiceAccount = serde_json::from_value(theirs).unwrap();
    accounts
        .create(&PostParams::default(), &theirs)
        .await
        .unwrap();
    chart(&mut values, 1, more);
    stage.apply(5, &values).await.unwrap();
    let status = stage
        .until("it is said", |s| problem(s, 1) == "NameTaken")
        .await;
    assert_eq!(ready(&status, 1), 3);
    assert_eq!(left(&stage).await, 8);
    let kept = accounts.get(&name).await.unwrap();
    assert_eq!(kept.labels().len(), 1, "{kept:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_refused_of_one_chart_keeps_no_other_release() {
    let Some(stage) = Stage::new("refused-chart").await else {
        return;
    };
    let _kubelet = stage.kubelet(Fate::Ready {
        ip: "10.1.2.3".to_owned(),
    });
    // It comes before the others.
    let api: ServiceName = "api".parse().unwrap();
    let own = names::release(&api, deployment(1));
    let mut broken = documents(&own, 1);
    let front = broken.iter_mut().find(|o| o["kind"] == "Deployment");
    front.unwrap()["spec"]["template"]["spec"]["restartPolicy"] = json!("Never");
    let mut values = stage.values();
    chart_of(&mut values, &api, 1, broken.clone());
    chart(&mut values, 2, documents(&prefix(2), 1));
    release(&mut values, 3, 1);
    stage.apply(1, &values).await.unwrap();
    let others_run = |s: &AppStatus| ready(s, 2) == 2 && ready(s, 3) == 1;
    let status = stage.until("one is refused, and the others run", |s| {
        problem(s, 1) == "ObjectRefused" && others_run(s)
    });
    let status = status.await;
    let said = of(&status, 1).unwrap().problem.as_ref().unwrap();
    assert!(said.message.contains("restartPolicy"), "{said:?}");
    assert!(!said.transient && !said.remedy.is_empty());
    let sets: Api<StatefulSet> = Api::namespaced(stage.client.clone(), &stage.namespace());
    let set = format!("{own}-store");
    assert!(sets.get_opt(&set).await.unwrap().is_none());

    // As the API server takes it, it is whole.
    chart_of(&mut values, &api, 1, documents(&own, 1));
    stage.apply(2, &values).await.unwrap();
    let whole = |s: &AppStatus| ready(s, 1) == 2 && problem(s, 1).is_empty() && others_run(s);
    stage.until("all of them run", whole).await;
    let before = left(&stage).await;

    // Refused while it runs, it stays as it is.
    chart_of(&mut values, &api, 1, broken);
    stage.apply(3, &values).await.unwrap();
    let refused = |s: &AppStatus| problem(s, 1) == "ObjectRefused" && others_run(s);
    stage
        .until("it is refused, and the others run on", refused)
        .await;
    assert_eq!(left(&stage).await, before);
}
