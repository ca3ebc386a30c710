//! Clusters that Argo CD brings to what the repository says; its controller is played.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};

use daybook_kubernetes::ArgoCd;
use daybook_kubernetes::objects::{Place, objects};
use daybook_testkit::kubernetes::proxy::{FaultProxy, refusal};
use daybook_testkit::kubernetes::{Crd, argocd as testkit};
use k8s_openapi::api::core::v1::ServiceAccount;
use kube::core::{ApiResource, DynamicObject, GroupVersionKind};
use serde_json::Value;

use super::charts::renamed;
use super::*;

/// What the repository holds, by commit.
#[derive(Clone, Default)]
struct Repository(Arc<Mutex<HashMap<CommitId, EnvironmentValues>>>);

impl Repository {
    fn commit(&self, n: u8, values: &EnvironmentValues) {
        self.0.lock().unwrap().insert(commit(n), values.clone());
    }

    /// What Argo CD's repo server makes of an Application.
    fn render(&self, application: &Value) -> Result<Vec<Value>, String> {
        let source = &application["spec"]["source"];
        let revision = source["targetRevision"].as_str().unwrap();
        let revision = CommitId::parse(revision).unwrap();
        let commits = self.0.lock().unwrap();
        let values = commits.get(&revision).ok_or("no such commit")?;
        let namespace = application["spec"]["destination"]["namespace"].as_str();
        let place = Place {
            cluster: &"oslo".parse().unwrap(),
            namespace: namespace.unwrap(),
            gateway: None,
        };
        let objects = objects(values, &place);
        Ok(objects.into_iter().map(|o| o.body).collect())
    }
}

struct Argo {
    stage: Stage,
    repository: Repository,
    namespace: String,
}

impl Argo {
    async fn new(environment: &str) -> Option<Self> {
        Self::of(environment, |_| {}).await
    }

    async fn of(environment: &str, set: impl FnOnce(&mut ClusterOptions)) -> Option<Self> {
        let namespace = format!("argocd-{environment}");
        let argocd = ArgoCd {
            namespace: namespace.clone(),
            project: "default".to_owned(),
            repositories: Some("http://daybook.example.com/git/".to_owned()),
            remotes: Arc::new(HashMap::new()),
        };
        let plane = tokio::task::spawn_blocking(ControlPlane::shared);
        let client = plane.await.unwrap()?.client().await;
        if !Crd::Application.install(&client).await {
            return None;
        }
        let spaces: Api<Namespace> = Api::all(client);
        let space = json!({ "metadata": { "name": namespace } });
        let space: Namespace = serde_json::from_value(space).unwrap();
        spaces.create(&PostParams::default(), &space).await.unwrap();
        let stage = Stage::of(environment, |options| {
            options.argocd = Some(argocd);
            set(options);
        });
        let stage = stage.await?;
        Some(Self {
            stage,
            repository: Repository::default(),
            namespace,
        })
    }

    fn controller(&self) -> testkit::ArgoCd {
        let repository = self.repository.clone();
        let render = move |application: &Value| repository.render(application);
        testkit::ArgoCd::start(self.stage.client.clone(), &self.namespace, render)
    }

    async fn apply(&self, n: u8, values: &EnvironmentValues) -> Result<(), TargetError> {
        self.repository.commit(n, values);
        self.stage.apply(n, values).await
    }

    fn applications(&self) -> Api<DynamicObject> {
        let kind = GroupVersionKind::gvk("argoproj.io", "v1alpha1", "Application");
        let client = self.stage.client.clone();
        Api::namespaced_with(client, &self.namespace, &ApiResource::from_gvk(&kind))
    }

    async fn application(&self) -> Value {
        let name = self.stage.namespace();
        let found = self.applications().get(&name).await.unwrap();
        serde_json::to_value(found).unwrap()
    }
}

fn problem(status: &AppStatus, n: u128) -> Option<&daybook_workers::target::Problem> {
    of(status, n)?.problem.as_ref()
}

#[tokio::test(flavor = "multi_thread")]
async fn argocd_brings_an_environment_to_the_commit_and_takes_away_what_is_gone() {
    let Some(argo) = Argo::new("gitops").await else {
        return;
    };
    let stage = &argo.stage;
    let _controller = argo.controller();
    let _kubelet = stage.kubelet(Fate::Ready {
        ip: "10.1.2.3".to_owned(),
    });
    let mut values = stage.values();
    release(&mut values, 1, 2);
    argo.apply(1, &values).await.unwrap();
    let whole = |n| move |s: &AppStatus| s.revision == Some(commit(n)) && s.is_whole;
    let status = stage.until("two are ready", |s| ready(s, 1) == 2).await;
    assert!(whole(1)(&status));

    let spec = argo.application().await["spec"].take();
    assert_eq!(
        spec["source"]["repoURL"],
        "http://daybook.example.com/git/shop.git"
    );
    assert_eq!(spec["source"]["targetRevision"], json!(commit(1)));
    assert_eq!(
        spec["source"]["helm"]["valueFiles"],
        json!(["../environments/gitops/values.yaml"])
    );
    assert_eq!(
        spec["source"]["helm"]["parameters"][0]["name"],
        "daybook-app.cluster"
    );
    assert_eq!(spec["syncPolicy"]["automated"]["prune"], true);
    assert_eq!(spec["syncPolicy"]["automated"]["selfHeal"], true);

    // A further commit leaves what it does not change ready all the time.
    let mut seen = stage.target.watch(&stage.app);
    let always = tokio::spawn(async move {
        let unready = seen.wait_for(|s| ready(s, 1) < 2).await;
        unready.map(|s| s.clone()).ok()
    });
    release(&mut values, 2, 1);
    argo.apply(2, &values).await.unwrap();
    stage
        .until("the second is ready", |s| whole(2)(s) && ready(s, 2) == 1)
        .await;
    assert!(!always.is_finished(), "{:?}", always.await);
    always.abort();

    // The same again writes nothing.
    let version = |o: Value| o["metadata"]["resourceVersion"].clone();
    let same = async {
        // Argo CD may still be at what it was asked to look at.
        loop {
            let before = version(argo.application().await);
            argo.apply(2, &values).await.unwrap();
            if version(argo.application().await) == before {
                break;
            }
        }
    };
    let same = tokio::time::timeout(PATIENCE, same).await;
    assert!(same.is_ok(), "it is written each time");

    let service = values.services.get_mut(&web()).unwrap();
    service.releases.remove(&deployment(1));
    argo.apply(3, &values).await.unwrap();
    stage
        .until("the first is gone", |s| of(s, 1).is_none() && whole(3)(s))
        .await;
    let nothing = stage.values();
    argo.apply(4, &nothing).await.unwrap();
    stage
        .until("all is gone", |s| s.releases.is_empty() && whole(4)(s))
        .await;
    let name = stage.namespace();
    let gone = kube::runtime::wait::await_condition(
        argo.applications(),
        &name,
        |found: Option<&DynamicObject>| found.is_none(),
    );
    tokio::time::timeout(PATIENCE, gone).await.unwrap().unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_is_claimed_before_argocd_has_synced_this_commit() {
    let Some(argo) = Argo::new("stale").await else {
        return;
    };
    let stage = &argo.stage;
    let _kubelet = stage.kubelet(Fate::Ready {
        ip: "10.1.2.3".to_owned(),
    });
    let mut values = stage.values();
    release(&mut values, 1, 1);
    argo.apply(1, &values).await.unwrap();
    let is = |said: &'static str| {
        move |s: &AppStatus| problem(s, 1).is_some_and(|p| p.transient && p.message.contains(said))
    };
    stage.until("it waits", is("it has not looked at it")).await;

    // The result of another commit is none of this one.
    let source = json!({ "repoURL": "x", "targetRevision": commit(9) });
    let stale = json!({ "status": { "sync": {
        "status": "Synced",
        "revision": commit(9),
        "comparedTo": { "source": source, "destination": {} },
    }}});
    let (api, name) = (argo.applications(), stage.namespace());
    let params = PatchParams::default();
    api.patch(&name, &params, &Patch::Merge(stale))
        .await
        .unwrap();
    // What is said of this one comes after it.
    let source = json!({ "repoURL": "x", "targetRevision": commit(1) });
    let unknown = json!({ "status": {
        "sync": { "status": "Unknown", "comparedTo": { "source": source } },
        "conditions": [{ "type": "ComparisonError", "message": "repository not accessible" }],
    }});
    api.patch(&name, &params, &Patch::Merge(unknown))
        .await
        .unwrap();
    let seen = stage
        .until("why it cannot", is("repository not accessible"))
        .await;
    assert_eq!((ready(&seen, 1), seen.is_whole), (0, false));
    let _controller = argo.controller();
    stage
        .until("it is ready", |s| ready(s, 1) == 1 && s.is_whole)
        .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_sync_that_fails_keeps_only_what_it_could_not_apply_and_is_tried_again() {
    let Some(argo) = Argo::new("refused").await else {
        return;
    };
    let stage = &argo.stage;
    let broken = Arc::new(Mutex::new(None));
    let render = {
        let (repository, broken) = (argo.repository.clone(), broken.clone());
        move |application: &Value| {
            let mut objects = repository.render(application)?;
            let name: Option<String> = broken.lock().unwrap().clone();
            for object in &mut objects {
                if object["kind"] == "Service"
                    && Some(object["metadata"]["name"].as_str().unwrap()) == name.as_deref()
                {
                    object["spec"]["type"] = json!("Bogus");
                }
            }
            Ok(objects)
        }
    };
    let _controller = testkit::ArgoCd::start(stage.client.clone(), &argo.namespace, render);
    let _kubelet = stage.kubelet(Fate::Ready {
        ip: "10.1.2.3".to_owned(),
    });
    let mut values = stage.values();
    release(&mut values, 1, 1);
    argo.apply(1, &values).await.unwrap();
    stage
        .until("the first is ready", |s| ready(s, 1) == 1)
        .await;

    *broken.lock().unwrap() = Some(names::release(&web(), deployment(2)));
    release(&mut values, 2, 1);
    argo.apply(2, &values).await.unwrap();
    let failed = |s: &AppStatus| problem(s, 2).is_some_and(|p| !p.transient);
    let status = stage.until("the second has failed", failed).await;
    let why = problem(&status, 2).unwrap();
    assert_eq!(why.reason, "SyncFailed");
    assert!(
        why.message.contains("Unsupported value: \"Bogus\""),
        "{why:?}"
    );
    assert_eq!((ready(&status, 1), problem(&status, 1)), (1, None));

    *broken.lock().unwrap() = None;
    stage.target.retry(&stage.app, deployment(2)).await.unwrap();
    let both = |s: &AppStatus| ready(s, 1) == 1 && ready(s, 2) == 1 && s.is_whole;
    stage.until("both are ready", both).await;
}

/// The same release as another one, of another service.
fn release_of(values: &mut EnvironmentValues, service: &ServiceName, n: u128) {
    release(values, n, 1);
    let releases = &mut values.services.get_mut(&web()).unwrap().releases;
    let mut moved = releases.remove(&deployment(n)).unwrap();
    moved.run.health.deadline_seconds = 3600;
    let service = values.services.entry(service.clone()).or_default();
    service.releases.insert(deployment(n), moved);
}

#[tokio::test(flavor = "multi_thread")]
async fn two_services_of_one_application_are_told_apart() {
    let Some(argo) = Argo::new("two-services").await else {
        return;
    };
    let stage = &argo.stage;
    // The name of one begins with that of the other.
    let (first, second) = (web(), "web-worker".parse::<ServiceName>().unwrap());
    let broken = Arc::new(Mutex::new(None));
    let render = {
        let (repository, broken) = (argo.repository.clone(), broken.clone());
        move |application: &Value| {
            let mut objects = repository.render(application)?;
            let name: Option<String> = broken.lock().unwrap().clone();
            for object in &mut objects {
                let is_one = object["kind"] == "Service" && name.is_some();
                if is_one && object["metadata"]["name"].as_str() == name.as_deref() {
                    object["spec"]["type"] = json!("Bogus");
                }
            }
            Ok(objects)
        }
    };
    let _controller = testkit::ArgoCd::start(stage.client.clone(), &argo.namespace, render);
    let second_runs = |pod: &Pod| match pod.labels()["daybook.dev/service"].as_str() {
        "web" => Fate::NoImage("manifest unknown".to_owned()),
        _ => Fate::Ready {
            ip: "10.1.2.3".to_owned(),
        },
    };
    let _kubelet = Kubelet::start(stage.client.clone(), Some(&stage.namespace()), second_runs);
    let mut values = stage.values();
    release_of(&mut values, &first, 1);
    release_of(&mut values, &second, 2);
    argo.apply(1, &values).await.unwrap();
    let apart = |s: &AppStatus| {
        let reason = problem(s, 1).map(|p| p.reason.as_str());
        reason == Some("ImagePullBackOff") && ready(s, 2) == 1
    };
    let status = stage.until("one runs and the other does not", apart).await;
    assert_eq!((ready(&status, 1), problem(&status, 2)), (0, None));
    for (n, service) in [(1, &first), (2, &second)] {
        let release = of(&status, n).unwrap();
        assert_eq!(release.service, *service);
        let begin = format!("{}-", names::release(service, deployment(n)));
        let names: Vec<_> = release.instances.iter().map(|i| &i.name).collect();
        assert!(
            names.len() == 1 && names[0].starts_with(&begin),
            "{names:?}"
        );
    }

    // What cannot be applied of one is nothing of the other.
    *broken.lock().unwrap() = Some(names::release(&second, deployment(3)));
    release_of(&mut values, &second, 3);
    argo.apply(2, &values).await.unwrap();
    let failed = |s: &AppStatus| problem(s, 3).is_some_and(|p| !p.transient);
    let status = stage.until("the third has failed", failed).await;
    assert_eq!(problem(&status, 3).unwrap().reason, "SyncFailed");
    assert_eq!(problem(&status, 1).unwrap().reason, "ImagePullBackOff");
    assert_eq!((ready(&status, 2), problem(&status, 2)), (1, None));
}

#[tokio::test(flavor = "multi_thread")]
async fn what_argocd_finds_degraded_is_said_where_the_pods_say_nothing() {
    let Some(argo) = Argo::new("degraded").await else {
        return;
    };
    let stage = &argo.stage;
    let controller = argo.controller();
    let _kubelet = stage.kubelet(Fate::Creating);
    let mut values = stage.values();
    release(&mut values, 1, 1);
    let service = values.services.get_mut(&web()).unwrap();
    let first = service.releases.get_mut(&deployment(1)).unwrap();
    first.run.health.deadline_seconds = 3600;
    argo.apply(1, &values).await.unwrap();
    let well = |s: &AppStatus| {
        let has_pod = of(s, 1).is_some_and(|r| r.instances.iter().any(|i| !i.outdated));
        s.is_whole && has_pod && problem(s, 1).is_none()
    };
    stage.until("its pod is being made", well).await;
    let status = argo.application().await["status"].take();
    assert_eq!(status["resourceHealthSource"], "appTree");
    let resources = status["resources"].as_array().unwrap();
    assert!(resources.iter().all(|r| r["health"].is_null()));

    // What it says from here on is said in its place. By default only the health of all is kept.
    drop(controller);
    let (api, name) = (argo.applications(), stage.namespace());
    let says = |status: Value| {
        let (api, name) = (api.clone(), name.clone());
        async move {
            let patch = Patch::Merge(json!({ "status": status }));
            let params = PatchParams::default();
            api.patch(&name, &params, &patch).await.unwrap();
        }
    };
    says(json!({ "health": { "status": "Degraded" } })).await;
    let degraded = |said: String| {
        move |s: &AppStatus| {
            problem(s, 1)
                .is_some_and(|p| p.reason == "Degraded" && p.transient && p.message.contains(&said))
        }
    };
    stage
        .until("all of it", degraded(format!("Application {name} ")))
        .await;

    // Where that of each is kept, another's is no concern of this one.
    let workload = names::release(&web(), deployment(1));
    let of_each = |workload_is: &str, other_is: &str| {
        let of = |kind: &str, name: &str, status: &str| {
            let message = format!("{name} is not well");
            let health = json!({ "status": status, "message": message });
            json!({ "kind": kind, "version": "v1", "name": name, "health": health })
        };
        json!({ "resources": [
            of("Deployment", &workload, workload_is),
            of("PersistentVolumeClaim", "other", other_is),
        ]})
    };
    says(of_each("Progressing", "Degraded")).await;
    stage.until("nothing of this one", well).await;
    says(of_each("Degraded", "Healthy")).await;
    let said = format!("Deployment {workload}: {workload} is not well");
    stage.until("in its own words", degraded(said)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_the_commit_does_not_list_and_is_kept_stays_until_it_is_let_go() {
    let Some(argo) = Argo::new("kept").await else {
        return;
    };
    let stage = &argo.stage;
    let _controller = argo.controller();
    let _kubelet = stage.kubelet(Fate::Ready {
        ip: "10.1.2.3".to_owned(),
    });
    let (mut first, mut second, mut both) = (stage.values(), stage.values(), stage.values());
    for values in [&mut first, &mut both] {
        release(values, 1, 1);
    }
    for values in [&mut second, &mut both] {
        release(values, 2, 1);
    }
    argo.apply(1, &first).await.unwrap();
    let whole = |n| move |s: &AppStatus| s.revision == Some(commit(n)) && s.is_whole;
    stage
        .until("the first is ready", |s| whole(1)(s) && ready(s, 1) == 1)
        .await;

    // Somebody takes it out of the repository.
    argo.repository.commit(2, &second);
    let (newest, kept) = (commit(2), [deployment(1)].into());
    let target = &stage.target;
    let keeping = target.apply_keeping(&stage.app, &newest, &both, &kept);
    keeping.await.unwrap();
    let both_run = |s: &AppStatus| ready(s, 1) == 1 && ready(s, 2) == 1;
    stage
        .until("both run", |s| whole(2)(s) && both_run(s))
        .await;
    let objects = |name: String| {
        let (client, namespace) = (stage.client.clone(), stage.namespace());
        async move {
            let workloads: Api<Deployment> = Api::namespaced(client.clone(), &namespace);
            let services: Api<Service> = Api::namespaced(client.clone(), &namespace);
            let maps: Api<ConfigMap> = Api::namespaced(client, &namespace);
            [
                workloads.get_opt(&name).await.unwrap().is_some(),
                services.get_opt(&name).await.unwrap().is_some(),
                maps.get_opt(&name).await.unwrap().is_some(),
            ]
        }
    };
    let name = names::release(&web(), deployment(1));
    assert_eq!(objects(name.clone()).await, [true; 3]);

    // Listed again, it is Argo CD's as before, and goes when it is not listed.
    argo.apply(3, &both).await.unwrap();
    stage
        .until("both run on", |s| whole(3)(s) && both_run(s))
        .await;
    argo.apply(4, &second).await.unwrap();
    stage
        .until("the first is gone", |s| whole(4)(s) && of(s, 1).is_none())
        .await;
    assert_eq!(objects(name).await, [false; 3]);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_application_that_is_being_deleted_is_waited_for_and_one_that_is_gone_is_made_again() {
    let Some(argo) = Argo::new("leaving").await else {
        return;
    };
    let stage = &argo.stage;
    let mut values = stage.values();
    release(&mut values, 1, 1);
    argo.apply(1, &values).await.unwrap();
    argo.apply(2, &stage.values()).await.unwrap();
    let waits = argo.apply(3, &values).await;
    assert!(
        matches!(&waits, Err(TargetError::Unavailable(why)) if why.contains("still being deleted")),
        "{waits:?}"
    );
    let (api, name) = (argo.applications(), stage.namespace());
    let controller = argo.controller();
    let gone = |found: Option<&DynamicObject>| found.is_none();
    let gone = kube::runtime::wait::await_condition(api.clone(), &name, gone);
    tokio::time::timeout(PATIENCE, gone).await.unwrap().unwrap();
    drop(controller);
    argo.apply(3, &values).await.unwrap();
    let is_asked = |s: &AppStatus| of(s, 1).is_some() && s.revision == Some(commit(3));
    stage.until("it is asked for", is_asked).await;

    // Somebody deletes it altogether.
    let free = Patch::Merge(json!({ "metadata": { "finalizers": null } }));
    let params = PatchParams::default();
    api.patch(&name, &params, &free).await.unwrap();
    api.delete(&name, &Default::default()).await.unwrap();
    let again = stage.target.retry(&stage.app, deployment(1)).await;
    assert!(
        matches!(&again, Err(TargetError::Unavailable(why)) if why.contains("made again")),
        "{again:?}"
    );
    argo.apply(3, &values).await.unwrap();
    argo.application().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_retry_asked_argocd_for_is_no_conflict_for_the_next_commit() {
    let Some(argo) = Argo::new("asked-twice").await else {
        return;
    };
    let stage = &argo.stage;
    let mut values = stage.values();
    release(&mut values, 1, 1);
    argo.apply(1, &values).await.unwrap();
    let refresh = || async {
        let mut found = argo.application().await;
        found["metadata"]["annotations"]["argocd.argoproj.io/refresh"].take()
    };
    assert_eq!(refresh().await, "normal");
    stage.until("it is asked for", |s| of(s, 1).is_some()).await;
    stage.target.retry(&stage.app, deployment(1)).await.unwrap();
    assert_eq!(refresh().await, "hard");
    argo.apply(2, &values).await.unwrap();
    assert_eq!(refresh().await, "hard");
    let spec = argo.application().await["spec"].take();
    assert_eq!(spec["source"]["targetRevision"], json!(commit(2)));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_workload_that_is_synced_and_otherwise_says_which_fields() {
    let Some(argo) = Argo::new("mutated").await else {
        return;
    };
    let stage = &argo.stage;
    let repository = argo.repository.clone();
    let mutated = move |application: &Value| {
        let mut objects = repository.render(application)?;
        let workload = objects.iter_mut().find(|o| o["kind"] == "Deployment");
        workload.unwrap()["spec"]["progressDeadlineSeconds"] = json!(7);
        Ok(objects)
    };
    let _controller = testkit::ArgoCd::start(stage.client.clone(), &argo.namespace, mutated);
    let _kubelet = stage.kubelet(Fate::Ready {
        ip: "10.1.2.3".to_owned(),
    });
    let mut values = stage.values();
    release(&mut values, 1, 1);
    argo.apply(1, &values).await.unwrap();
    let said = |s: &AppStatus| problem(s, 1).is_some_and(|p| p.reason == "Drift");
    let status = stage.until("it says why", said).await;
    let why = problem(&status, 1).unwrap();
    assert!(why.transient && why.message.contains(".spec.progressDeadlineSeconds"));
    assert_eq!(ready(&status, 1), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_release_runs_without_what_its_chart_does_not_make_and_that_is_drift() {
    let Some(argo) = Argo::new("customised").await else {
        return;
    };
    let stage = &argo.stage;
    let repository = argo.repository.clone();
    let without = move |application: &Value| {
        let mut objects = repository.render(application)?;
        let mut all = objects.iter_mut();
        let workload = all.find(|o| o["kind"] == "Deployment").unwrap();
        let container = &mut workload["spec"]["template"]["spec"]["containers"][0];
        container.as_object_mut().unwrap().remove("resources");
        Ok(objects)
    };
    let _controller = testkit::ArgoCd::start(stage.client.clone(), &argo.namespace, without);
    let _kubelet = stage.kubelet(Fate::Ready {
        ip: "10.1.2.3".to_owned(),
    });
    let mut values = stage.values();
    release(&mut values, 1, 1);
    let service = values.services.get_mut(&web()).unwrap();
    let asks = service.releases.get_mut(&deployment(1)).unwrap();
    let amounts = json!({ "requests": { "cpu": "250m" } });
    asks.run.resources = serde_json::from_value(amounts).unwrap();
    argo.apply(1, &values).await.unwrap();
    let runs =
        |s: &AppStatus| ready(s, 1) == 1 && problem(s, 1).is_some_and(|p| p.reason == "Drift");
    let status = stage
        .until("it runs, and what is missing is said", runs)
        .await;
    assert!(problem(&status, 1).unwrap().message.contains(".resources"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_chart_that_is_after_what_another_release_or_somebody_has_is_said_to_be() {
    let Some(argo) = Argo::new("shared-names").await else {
        return;
    };
    let stage = &argo.stage;
    let _controller = argo.controller();
    let _kubelet = stage.kubelet(Fate::Ready {
        ip: "10.1.2.3".to_owned(),
    });
    let mut values = stage.values();
    renamed(&mut values, 2, "fixed");
    argo.apply(1, &values).await.unwrap();
    stage.until("it runs", |s| ready(s, 2) == 2).await;

    // Not the one that was there, although the other one comes first.
    let is_taken = |s: &AppStatus, n| problem(s, n).is_some_and(|p| p.reason == "NameTaken");
    renamed(&mut values, 1, "fixed");
    argo.apply(2, &values).await.unwrap();
    let status = stage
        .until("the other one is named", |s| is_taken(s, 1))
        .await;
    assert!(!is_taken(&status, 2), "{status:#?}");

    values.services.clear();
    let accounts: Api<ServiceAccount> = Api::namespaced(stage.client.clone(), &stage.namespace());
    let theirs = json!({ "metadata": { "name": "theirs" } });
    let theirs: ServiceAccount = serde_json::from_value(theirs).unwrap();
    accounts
        .create(&PostParams::default(), &theirs)
        .await
        .unwrap();
    renamed(&mut values, 4, "theirs");
    argo.apply(3, &values).await.unwrap();
    stage
        .until("somebody else's is named", |s| is_taken(s, 4))
        .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_application_of_somebody_else_is_not_taken() {
    let Some(argo) = Argo::new("theirs").await else {
        return;
    };
    let stage = &argo.stage;
    let theirs = json!({
        "apiVersion": "argoproj.io/v1alpha1",
        "kind": "Application",
        "metadata": { "name": stage.namespace() },
        "spec": {
            "project": "default",
            "destination": {},
            "source": { "repoURL": "https://example.com/theirs.git" },
        },
    });
    let theirs: DynamicObject = serde_json::from_value(theirs).unwrap();
    let (api, params) = (argo.applications(), PostParams::default());
    api.create(&params, &theirs).await.unwrap();
    let mut values = stage.values();
    release(&mut values, 1, 1);
    let refused = argo.apply(1, &values).await;
    assert!(
        matches!(&refused, Err(TargetError::Refused(why)) if why.contains("is not Daybook's")),
        "{refused:?}"
    );
    let spec = argo.application().await["spec"].take();
    assert_eq!(spec["source"]["repoURL"], "https://example.com/theirs.git");
    // Nor is it taken away with an environment of that name.
    argo.apply(2, &stage.values()).await.unwrap();
    argo.application().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cluster_without_argocd_says_how_to_install_it() {
    let plane = tokio::task::spawn_blocking(ControlPlane::start);
    let Some(plane) = plane.await.unwrap() else {
        return;
    };
    let client = plane.client().await;
    let argocd = ArgoCd {
        namespace: "argocd".to_owned(),
        project: "default".to_owned(),
        repositories: Some("http://daybook.example.com/git".to_owned()),
        remotes: Arc::new(HashMap::new()),
    };
    let mut options = options(client.clone());
    options.argocd = Some(argocd);
    let target = KubernetesCluster::open(options).await.unwrap();
    let stage = Stage {
        client,
        target,
        app: app("none"),
    };
    let mut values = stage.values();
    release(&mut values, 1, 1);
    let refused = stage.apply(1, &values).await;
    assert!(
        matches!(&refused, Err(TargetError::Refused(why)) if why.contains("manifests/install.yaml")),
        "{refused:?}"
    );
    let trouble = tokio::time::timeout(PATIENCE, async {
        loop {
            match stage.target.trouble() {
                Some(trouble) => break trouble,
                None => tokio::time::sleep(Duration::from_millis(20)).await,
            }
        }
    });
    let trouble = trouble.await.unwrap();
    assert!(trouble.contains("manifests/install.yaml"), "{trouble}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_volume_that_argocd_made_grows_and_stays() {
    let Some(argo) = Argo::new("kept-data").await else {
        return;
    };
    let stage = &argo.stage;
    let _controller = argo.controller();
    let _kubelet = stage.kubelet(Fate::Ready {
        ip: "10.1.2.3".to_owned(),
    });
    let mut values = stage.values();
    let mut next = |n: u8, size: &str| {
        release(&mut values, n.into(), 1);
        let service = values.services.get_mut(&web()).unwrap();
        let release = service.releases.get_mut(&deployment(n.into())).unwrap();
        let volume = json!({ "path": "/data", "size": size, "storage_class": "argo-grows" });
        let volume = serde_json::from_value(volume).unwrap();
        release.run.volumes.insert("data".parse().unwrap(), volume);
        values.clone()
    };
    argo.apply(1, &next(1, "1Gi")).await.unwrap();
    // That one alone: what is written into the values file by hand is for Argo CD to make larger.
    let ignored = json!([{
        "kind": "PersistentVolumeClaim", "name": volumes::DATA, "jsonPointers": ["/spec"],
    }]);
    let application = argo.application().await;
    assert_eq!(application["spec"]["ignoreDifferences"], ignored);
    let whole = |n: u8| move |s: &AppStatus| s.revision == Some(commit(n)) && s.is_whole;
    stage.until("it is synced", whole(1)).await;
    let claims = volumes::claims(stage);
    let made = claims.get(volumes::DATA).await.unwrap();
    volumes::bind(stage, "argo-grows", volumes::DATA).await;
    argo.apply(2, &next(2, "2Gi")).await.unwrap();
    stage.until("it is synced again", whole(2)).await;
    let grown = claims.get(volumes::DATA).await.unwrap();
    assert_eq!(volumes::size(&grown), "2Gi");
    // The first release still says how large it was, and nobody makes it smaller.
    argo.apply(3, &next(3, "1Gi")).await.unwrap();
    stage.until("it is synced once more", whole(3)).await;
    let nothing = stage.values();
    argo.apply(4, &nothing).await.unwrap();
    stage.until("nothing runs", |s| s.releases.is_empty()).await;
    let kept = claims.get(volumes::DATA).await.unwrap();
    assert_eq!(kept.metadata.uid, made.metadata.uid);
    assert_eq!(kept.metadata.deletion_timestamp, None);
    assert_eq!(volumes::size(&kept), "2Gi");
    stage.target.remove_volumes(&stage.app).await.unwrap();
    volumes::goes(stage, volumes::DATA).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_claim_of_somebody_else_is_not_handed_to_argocd() {
    let Some(argo) = Argo::new("their-data").await else {
        return;
    };
    let stage = &argo.stage;
    let _controller = argo.controller();
    let mut values = stage.values();
    release(&mut values, 1, 1);
    argo.apply(1, &values).await.unwrap();
    let claims = volumes::claims(stage);
    let theirs = json!({
        "metadata": { "name": volumes::DATA },
        "spec": {
            "accessModes": ["ReadWriteOnce"],
            "resources": { "requests": { "storage": "1Gi" } },
        },
    });
    let theirs = serde_json::from_value(theirs).unwrap();
    claims
        .create(&PostParams::default(), &theirs)
        .await
        .unwrap();
    volumes::keeps(&mut values, 1, json!({ "path": "/data" }));
    let refused = argo.apply(2, &values).await;
    assert!(
        matches!(&refused, Err(TargetError::Refused(why)) if why.contains("is not Daybook's")),
        "{refused:?}"
    );
    let spec = argo.application().await["spec"].take();
    assert_eq!(spec["source"]["targetRevision"], json!(commit(1)));
    let kept = claims.get(volumes::DATA).await.unwrap();
    assert!(!kept.labels().contains_key(names::VOLUME));
}

#[tokio::test(flavor = "multi_thread")]
async fn self_healing_sets_back_what_somebody_changes_and_not_what_a_commit_does() {
    let Some(argo) = Argo::new("healed").await else {
        return;
    };
    let stage = &argo.stage;
    let repository = argo.repository.clone();
    let render = move |application: &Value| repository.render(application);
    let _controller = testkit::ArgoCd::start_healing(stage.client.clone(), &argo.namespace, render);
    let _kubelet = stage.kubelet(Fate::Ready {
        ip: "10.1.2.3".to_owned(),
    });
    let mut values = stage.values();
    release(&mut values, 1, 2);
    argo.apply(1, &values).await.unwrap();
    let whole = |s: &AppStatus| s.is_whole && ready(s, 1) == 2 && problem(s, 1).is_none();
    stage.until("two are ready", whole).await;

    let workloads: Api<Deployment> = Api::namespaced(stage.client.clone(), &stage.namespace());
    let name = names::release(&web(), deployment(1));
    let replicas = |workload: &Deployment| workload.spec.as_ref().and_then(|spec| spec.replicas);
    let patch = Patch::Merge(json!({ "spec": { "replicas": 5 } }));
    let params = PatchParams::default();
    workloads.patch(&name, &params, &patch).await.unwrap();
    super::builds::until("it is set back", || async {
        let now = workloads.get(&name).await.unwrap();
        (replicas(&now) == Some(2)).then_some(())
    })
    .await;
    stage.until("two are ready again", whole).await;

    // What goes back or is stopped does so by a commit, which is what is healed to from then on.
    release(&mut values, 1, 0);
    argo.apply(2, &values).await.unwrap();
    let stopped = |s: &AppStatus| {
        let none = |r: &ReleaseStatus| r.wanted == 0 && r.instances.is_empty();
        s.is_whole && s.revision == Some(commit(2)) && of(s, 1).is_some_and(none)
    };
    stage.until("it is stopped", stopped).await;
    release(&mut values, 1, 2);
    argo.apply(3, &values).await.unwrap();
    let back = |s: &AppStatus| s.revision == Some(commit(3)) && whole(s);
    stage.until("it runs again", back).await;
    let policy = argo.application().await["spec"]["syncPolicy"]["automated"].take();
    assert_eq!(policy, json!({ "prune": true, "selfHeal": true }));
}

#[tokio::test(flavor = "multi_thread")]
async fn bursts_of_refusals_of_an_application_are_no_reason_to_give_up() {
    let plane = tokio::task::spawn_blocking(ControlPlane::shared);
    let Some(plane) = plane.await.unwrap() else {
        return;
    };
    let proxy = FaultProxy::start(plane).await;
    let client = proxy.client();
    let argo = Argo::of("bursts-of-argocd", |options| options.client = client).await;
    let Some(argo) = argo else {
        return;
    };
    let mut values = argo.stage.values();
    release(&mut values, 1, 1);
    for (code, reason) in super::faults::BURSTS {
        proxy.answer(move |method, address| {
            let write = method == "PATCH" && address.contains("/applications/");
            write.then(|| refusal(code, reason))
        });
        let refused = argo.apply(1, &values).await;
        let Err(TargetError::Unavailable(why)) = refused else {
            panic!("{code}: {refused:?}");
        };
        let name = argo.stage.namespace();
        assert!(why.contains(&format!("Application {name}")), "{why}");
        assert!(why.contains(&code.to_string()), "{why}");
    }
    proxy.behave();
    argo.apply(1, &values).await.unwrap();
    let source = argo.application().await["spec"]["source"].take();
    assert_eq!(source["targetRevision"], json!(commit(1)));
}
