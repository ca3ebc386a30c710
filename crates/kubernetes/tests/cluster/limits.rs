//! What looking after a cluster asks of its API server, counted at a proxy in front of it.

use std::collections::BTreeSet;

use daybook_kubernetes::objects::GatewayRef;
use daybook_testkit::kubernetes::proxy::{Asked, FaultProxy};
use daybook_testkit::kubernetes::{Crd, argocd as testkit};

use super::*;

/// A target that reaches the API server through the proxy; its tests reach it directly.
async fn counted(
    environment: &str,
    set: impl FnOnce(&mut ClusterOptions),
) -> Option<(Stage, FaultProxy)> {
    let plane = tokio::task::spawn_blocking(ControlPlane::shared);
    let plane = plane.await.unwrap()?;
    let proxy = FaultProxy::start(plane).await;
    let through = proxy.client();
    let mut stage = Stage::of(environment, |options| {
        options.client = through;
        set(options);
    })
    .await?;
    stage.client = plane.client().await;
    Some((stage, proxy))
}

const NONE: [Asked; 0] = [];

fn writes(proxy: &FaultProxy) -> Vec<Asked> {
    let mut asked = proxy.take_asked();
    asked.retain(Asked::is_write);
    asked
}

/// Waits until there is one watch of each of these kinds and none of any other.
async fn one_watch_each(proxy: &FaultProxy, kinds: &[&str]) {
    let one = kinds.iter().map(|kind| ((*kind).to_owned(), 1));
    let expected: BTreeMap<String, usize> = one.collect();
    let is_so = tokio::time::timeout(PATIENCE, async {
        while proxy.open_watches() != expected {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    });
    assert!(is_so.await.is_ok(), "{:?}", proxy.open_watches());
}

#[tokio::test(flavor = "multi_thread")]
async fn an_environment_that_is_as_it_is_to_be_is_not_written_to() {
    let folder = tempfile::tempdir().unwrap();
    let secrets = SecretFolder::new(folder.path(), None);
    let store: Arc<dyn SecretStore> = Arc::new(secrets.clone());
    let of_stage = store.clone();
    let counted = counted("unwritten", |options| options.secrets = of_stage).await;
    let Some((stage, proxy)) = counted else {
        return;
    };
    let _kubelet = stage.kubelet(Fate::Ready {
        ip: "10.1.2.3".to_owned(),
    });
    let id = SecretId {
        name: "DATABASE_URL".parse().unwrap(),
        scope: SecretScope::default(),
    };
    let value = SecretValue::new("postgres://shop".to_owned().into()).unwrap();
    let committed = secrets.put(&stage.app.project, &id, &value).await.unwrap();
    let reference = SecretRef {
        secret: id.name.clone(),
        scope: id.scope.clone(),
        version: 1,
        commitment: committed.commitment,
    };
    let mut values = stage.values();
    release(&mut values, 1, 1);
    release(&mut values, 2, 2);
    let service = values.services.get_mut(&web()).unwrap();
    let first = service.releases.get_mut(&deployment(1)).unwrap();
    first.secret_env.insert(id.name.clone(), reference);
    stage.apply(1, &values).await.unwrap();
    // The namespace, and of each release its variables, its workload and its address; a secret, and
    // how many of two may be taken away at once.
    assert_eq!(writes(&proxy).len(), 9);
    let is_ready = |s: &AppStatus| ready(s, 1) == 1 && ready(s, 2) == 2;
    stage.until("both are ready", is_ready).await;

    stage.apply(2, &values).await.unwrap();
    assert_eq!(writes(&proxy), NONE);
    let told = |s: &AppStatus| s.revision == Some(commit(2)) && is_ready(s);
    stage.until("the new revision is told", told).await;

    // Nor does a process that has applied nothing yet.
    let mut of_other = options(proxy.client());
    of_other.secrets = store;
    let other = KubernetesCluster::open(of_other).await.unwrap();
    other.apply(&stage.app, &commit(2), &values).await.unwrap();
    assert_eq!(writes(&proxy), NONE);
    let mut seen = other.watch(&stage.app);
    assert!(wait(&mut seen, told).await.is_some());
    drop(other);

    // What somebody has changed or taken away is written, and nothing else is.
    let name = names::release(&web(), deployment(2));
    let services: Api<Service> = Api::namespaced(stage.client.clone(), &stage.namespace());
    let maps: Api<ConfigMap> = Api::namespaced(stage.client.clone(), &stage.namespace());
    services.delete(&name, &Default::default()).await.unwrap();
    let unlabelled = Patch::Merge(json!({ "metadata": { "labels": {
        "app.kubernetes.io/name": null,
    }}}));
    let params = PatchParams::default();
    maps.patch(&name, &params, &unlabelled).await.unwrap();
    stage.apply(3, &values).await.unwrap();
    let written: BTreeSet<String> = writes(&proxy)
        .iter()
        .map(|asked| asked.path().to_owned())
        .collect();
    let at = |plural: &str| {
        let namespace = stage.namespace();
        format!("/api/v1/namespaces/{namespace}/{plural}/{name}")
    };
    assert_eq!(written, [at("configmaps"), at("services")].into());
    assert!(services.get_opt(&name).await.unwrap().is_some());

    // What is not asked for any more goes from an object that otherwise stays as it is.
    let service = values.services.get_mut(&web()).unwrap();
    let second = service.releases.get_mut(&deployment(2)).unwrap();
    let more = "MORE".parse::<daybook_events::EnvKey>().unwrap();
    second.run.env.insert(more.clone(), "x".to_owned());
    stage.apply(4, &values).await.unwrap();
    let service = values.services.get_mut(&web()).unwrap();
    let second = service.releases.get_mut(&deployment(2)).unwrap();
    second.run.env.remove(&more);
    writes(&proxy);
    stage.apply(5, &values).await.unwrap();
    let written = writes(&proxy);
    assert_eq!(written.len(), 1, "{written:?}");
    let kept = maps.get(&name).await.unwrap().data.unwrap_or_default();
    assert_eq!(kept.keys().collect::<Vec<_>>(), ["GREETING"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn many_environments_take_one_watch_a_kind_and_are_followed_without_a_request() {
    const MANY: usize = 12;
    let Some((mut stage, proxy)) = counted("watched-0", |_| {}).await else {
        return;
    };
    stage.app.project = "shop-of-many".parse().unwrap();
    let fate = || Fate::Ready {
        ip: "10.1.2.3".to_owned(),
    };
    let mut apps = Vec::new();
    let mut kubelets = Vec::new();
    for n in 0..MANY {
        stage.app.environment = format!("watched-{n}").parse().unwrap();
        kubelets.push(stage.kubelet(fate()));
        let mut values = stage.values();
        release(&mut values, 1, 1);
        stage.apply(1, &values).await.unwrap();
        apps.push(stage.app.clone());
    }
    for app in &apps {
        stage.app = app.clone();
        stage.until("it is ready", |s| ready(s, 1) == 1).await;
    }
    let kinds = ["deployments", "events", "pods", "replicasets"];
    one_watch_each(&proxy, &kinds).await;

    // What changes in any of them is seen, and nothing is asked for.
    proxy.take_asked();
    let no_image = || Fate::NoImage("manifest unknown".to_owned());
    for (n, app) in apps.iter().enumerate() {
        stage.app = app.clone();
        let pods: Api<Pod> = Api::namespaced(stage.client.clone(), &stage.namespace());
        let pods = pods.list(&ListParams::default()).await.unwrap();
        let pod = pods.items.first().unwrap();
        Kubelet::play(&stage.client, pod, &no_image()).await;
        let has_problem = |s: &AppStatus| of(s, 1).is_some_and(|r| r.problem.is_some());
        stage.until(&format!("the cause in {n}"), has_problem).await;
        Kubelet::play(&stage.client, pod, &fate()).await;
        let recovered = |s: &AppStatus| !has_problem(s) && ready(s, 1) == 1;
        stage
            .until(&format!("the recovery in {n}"), recovered)
            .await;
    }
    let mut asked = proxy.take_asked();
    // One that the API server ends, as it does after minutes, is begun again.
    asked.retain(|asked| !asked.is_watch());
    assert_eq!(asked, NONE);
    one_watch_each(&proxy, &kinds).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn applications_and_routes_take_one_watch_each_as_well() {
    const MANY: usize = 12;
    let plane = tokio::task::spawn_blocking(ControlPlane::shared);
    let Some(plane) = plane.await.unwrap() else {
        return;
    };
    let client = plane.client().await;
    for crd in [Crd::Application, Crd::Gateway, Crd::HttpRoute] {
        if !crd.install(&client).await {
            return;
        }
    }
    let namespace = "argocd-of-many";
    let spaces: Api<Namespace> = Api::all(client.clone());
    let space = json!({ "metadata": { "name": namespace } });
    let space: Namespace = serde_json::from_value(space).unwrap();
    spaces.create(&PostParams::default(), &space).await.unwrap();
    let argocd = daybook_kubernetes::ArgoCd {
        namespace: namespace.to_owned(),
        project: "default".to_owned(),
        repositories: Some("http://daybook.example.com/git".to_owned()),
        remotes: Arc::new(std::collections::HashMap::new()),
    };
    let gateway = GatewayRef {
        name: "public".to_owned(),
        namespace: Some(namespace.to_owned()),
        section_name: None,
    };
    let counted = counted("synced-0", |options| {
        options.argocd = Some(argocd);
        options.gateway = Some((gateway, "example.com".to_owned()));
    });
    let Some((mut stage, proxy)) = counted.await else {
        return;
    };
    stage.app.project = "shop-of-many-synced".parse().unwrap();
    let mut apps = Vec::new();
    for n in 0..MANY {
        stage.app.environment = format!("synced-{n}").parse().unwrap();
        let mut values = stage.values();
        release(&mut values, 1, 1);
        stage.apply(1, &values).await.unwrap();
        apps.push(stage.app.clone());
    }
    // Its word on each is heard, and nothing is asked for.
    proxy.take_asked();
    let _controller = testkit::ArgoCd::start(client, namespace, |_| Err("no such path".to_owned()));
    for app in &apps {
        stage.app = app.clone();
        let said = |s: &AppStatus| {
            let problem = of(s, 1).and_then(|r| r.problem.as_ref());
            problem.is_some_and(|p| p.message.contains("no such path"))
        };
        stage.until("what Argo CD says", said).await;
    }
    let mut asked = proxy.take_asked();
    asked.retain(|asked| !asked.is_watch());
    assert_eq!(asked, NONE);
    let kinds = [
        "applications",
        "deployments",
        "events",
        "gateways",
        "httproutes",
        "pods",
        "replicasets",
    ];
    one_watch_each(&proxy, &kinds).await;
}
