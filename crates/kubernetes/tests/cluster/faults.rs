//! What API servers and networks do to whoever relies on them.

use std::sync::atomic::{AtomicUsize, Ordering};

use daybook_testkit::kubernetes::proxy::{FaultProxy, expired, refusal};
use futures_util::TryStreamExt as _;
use jiff::Timestamp;
use jiff::fmt::rfc2822::DateTimePrinter;
use k8s_openapi::api::rbac::v1::{ClusterRole, ClusterRoleBinding};
use kube::api::{WatchEvent, WatchParams};

use super::*;

/// What passes by itself: the code, and the reason that goes with it.
pub(super) const BURSTS: [(u16, &str); 5] = [
    (409, "Conflict"),
    (429, "TooManyRequests"),
    (500, "InternalError"),
    (503, "ServiceUnavailable"),
    (504, "Timeout"),
];

/// A target that reaches the API server through the proxy; its tests reach it directly.
async fn through_proxy(environment: &str) -> Option<(Stage, FaultProxy)> {
    let plane = tokio::task::spawn_blocking(ControlPlane::shared);
    let plane = plane.await.unwrap()?;
    let proxy = FaultProxy::start(plane).await;
    let client = proxy.client();
    let stage = Stage::of(environment, |options| options.client = client).await?;
    Some((stage, proxy))
}

fn is_watch(method: &str, address: &str) -> bool {
    method == "GET" && address.contains("watch=true")
}

#[tokio::test(flavor = "multi_thread")]
async fn a_watch_that_is_cut_or_too_old_is_begun_anew() {
    let Some((stage, proxy)) = through_proxy("cut").await else {
        return;
    };
    let mut values = stage.values();
    release(&mut values, 1, 1);
    stage.apply(1, &values).await.unwrap();
    let kubelet = stage.kubelet(Fate::Ready {
        ip: "10.1.2.3".to_owned(),
    });
    stage.until("it is ready", |s| ready(s, 1) == 1).await;

    // Nothing gets through, and meanwhile the pod changes.
    proxy.answer(|_, _| Some(refusal(503, "ServiceUnavailable")));
    proxy.cut();
    drop(kubelet);
    let pods: Api<Pod> = Api::namespaced(stage.client.clone(), &stage.namespace());
    let pod = pods
        .list(&ListParams::default())
        .await
        .unwrap()
        .items
        .remove(0);
    Kubelet::play(&stage.client, &pod, &Fate::OutOfMemory).await;
    let troubled = tokio::time::timeout(PATIENCE, async {
        while stage.target.trouble().is_none() {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    });
    troubled.await.unwrap();
    proxy.behave();
    let out_of_memory = |s: &AppStatus| {
        let problem = of(s, 1).and_then(|r| r.problem.as_ref());
        problem.is_some_and(|p| p.reason == "OOMKilled")
    };
    stage
        .until("what happened meanwhile is seen", out_of_memory)
        .await;

    // Each watch is told once that it is too old.
    let told = Arc::new(AtomicUsize::new(0));
    let count = told.clone();
    proxy.answer(move |method, address| {
        let too_old = is_watch(method, address) && count.fetch_add(1, Ordering::SeqCst) < 8;
        too_old.then(expired)
    });
    proxy.cut();
    let running = Fate::Ready {
        ip: "10.1.2.3".to_owned(),
    };
    Kubelet::play(&stage.client, &pod, &running).await;
    stage.until("it is ready again", |s| ready(s, 1) == 1).await;
    // It may be seen by a list, or by a watch that is not cut yet.
    let was_told = tokio::time::timeout(PATIENCE, async {
        while told.load(Ordering::SeqCst) == 0 {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    });
    was_told.await.unwrap();
    let well = tokio::time::timeout(PATIENCE, async {
        while stage.target.trouble().is_some() {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    });
    well.await.unwrap();
}

/// A warning about a pod as kubelets write it, which happened last so many seconds from now.
async fn warn(client: &Client, pod: &Pod, message: &str, seconds: i64, is_series: bool) {
    use k8s_openapi::jiff::{SignedDuration, Timestamp};
    let at = Timestamp::now() + SignedDuration::from_secs(seconds);
    let namespace = pod.namespace().unwrap();
    let mut event = json!({
        "metadata": { "generateName": format!("{}.", pod.name_any()), "namespace": namespace },
        "involvedObject": {
            "apiVersion": "v1",
            "kind": "Pod",
            "name": pod.name_any(),
            "namespace": namespace,
            "uid": pod.uid(),
        },
        "type": "Warning",
        "reason": "Unhealthy",
        "message": message,
    });
    let more = match is_series {
        true => json!({
            "action": "Probe",
            "reportingComponent": "kubelet",
            "reportingInstance": "node-1",
            "eventTime": "2026-01-01T00:00:00.000000Z",
            "series": { "count": 7, "lastObservedTime": format!("{at:.6}") },
        }),
        false => json!({
            "source": { "component": "kubelet", "host": "node-1" },
            "firstTimestamp": "2026-01-01T00:00:00Z",
            "lastTimestamp": format!("{at:.0}"),
            "count": 7,
        }),
    };
    for (key, value) in more.as_object().unwrap() {
        event[key] = value.clone();
    }
    let event: k8s_openapi::api::core::v1::Event = serde_json::from_value(event).unwrap();
    let api = Api::namespaced(client.clone(), &namespace);
    api.create(&PostParams::default(), &event).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn after_a_cut_and_after_a_restart_the_newest_warning_is_the_one_that_counts() {
    let Some((stage, proxy)) = through_proxy("warned").await else {
        return;
    };
    let mut values = stage.values();
    release(&mut values, 1, 1);
    let service = values.services.get_mut(&web()).unwrap();
    let first = service.releases.get_mut(&deployment(1)).unwrap();
    first.run.health.deadline_seconds = 3600;
    stage.apply(1, &values).await.unwrap();
    let kubelet = stage.kubelet(Fate::Unready("at first".to_owned()));
    let says = |said: &'static str| {
        move |s: &AppStatus| {
            let problem = of(s, 1).and_then(|r| r.problem.as_ref());
            problem.is_some_and(|p| p.message.contains(said))
        }
    };
    stage.until("why it is not ready", says("at first")).await;
    drop(kubelet);

    // What happens while nothing gets through, in another order than it is written down in.
    proxy.answer(|_, _| Some(refusal(503, "ServiceUnavailable")));
    proxy.cut();
    let pods: Api<Pod> = Api::namespaced(stage.client.clone(), &stage.namespace());
    let found = pods.list(&ListParams::default()).await.unwrap();
    let pod = &found.items[0];
    for (message, seconds, is_series) in [
        ("the third", 30, false),
        ("the seventh", 70, true),
        ("the first", 10, false),
        ("the newest", 80, true),
        ("the second", 20, true),
        ("the sixth", 60, false),
        ("the fourth", 40, false),
        ("the fifth", 50, true),
    ] {
        warn(&stage.client, pod, message, seconds, is_series).await;
    }
    proxy.behave();
    stage.until("the newest", says("the newest")).await;
    // It is watched again once all that were listed have been told.
    let watched = tokio::time::timeout(PATIENCE, async {
        while !proxy.open_watches().contains_key("events") {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    });
    watched.await.unwrap();
    let now = stage.target.watch(&stage.app).borrow().clone();
    assert!(says("the newest")(&now), "{now:#?}");

    // Whatever is listed first: it is not forgotten before its namespace is seen.
    proxy.take_asked();
    let other = KubernetesCluster::open(options(proxy.client()))
        .await
        .unwrap();
    let listed = tokio::time::timeout(PATIENCE, async {
        loop {
            let asked = proxy.take_asked();
            let mut watches = asked.iter().filter(|a| a.is_watch());
            if watches.any(|a| a.path().ends_with("/events")) {
                break;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    });
    listed.await.unwrap();
    other.apply(&stage.app, &commit(1), &values).await.unwrap();
    let mut watch = other.watch(&stage.app);
    let seen = wait(&mut watch, says("the newest")).await;
    assert!(seen.is_some(), "{:#?}", watch.borrow());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_rollout_goes_on_when_the_api_server_was_killed_in_the_middle_of_it() {
    let plane = tokio::task::spawn_blocking(ControlPlane::start);
    let Some(mut plane) = plane.await.unwrap() else {
        return;
    };
    let proxy = FaultProxy::start(&plane).await;
    let target = KubernetesCluster::open(options(proxy.client())).await;
    let stage = Stage {
        client: plane.client().await,
        target: target.unwrap(),
        app: app("restarted"),
    };
    let kubelet = stage.kubelet(Fate::Creating);
    let mut values = stage.values();
    release(&mut values, 1, 2);
    stage.apply(1, &values).await.unwrap();
    let two = |s: &AppStatus| of(s, 1).is_some_and(|r| r.instances.len() == 2);
    stage.until("two are being made", two).await;

    drop(kubelet);
    tokio::task::block_in_place(|| plane.kill_api_server());
    let troubled = tokio::time::timeout(PATIENCE, async {
        while stage.target.trouble().is_none() {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    });
    troubled.await.unwrap();
    let mut more = values.clone();
    release(&mut more, 2, 1);
    let refused = stage.apply(2, &more).await;
    assert!(
        matches!(refused, Err(TargetError::Unavailable(_))),
        "{refused:?}"
    );
    // What was seen last is neither gone nor failed.
    let seen = stage.target.watch(&stage.app).borrow().clone();
    assert!(
        two(&seen) && of(&seen, 1).unwrap().problem.is_none(),
        "{seen:?}"
    );

    proxy.take_asked();
    tokio::task::block_in_place(|| plane.restart_api_server());
    let _kubelet = stage.kubelet(Fate::Ready {
        ip: "10.1.2.3".to_owned(),
    });
    stage.until("both are ready", |s| ready(s, 1) == 2).await;
    let well = tokio::time::timeout(PATIENCE, async {
        while stage.target.trouble().is_some() {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    });
    well.await.unwrap();
    stage.apply(1, &values).await.unwrap();
    let mut written = proxy.take_asked();
    written.retain(daybook_testkit::kubernetes::proxy::Asked::is_write);
    assert!(written.is_empty(), "{written:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn bursts_of_refusals_are_no_reason_to_give_up() {
    let Some((stage, proxy)) = through_proxy("bursts").await else {
        return;
    };
    let mut values = stage.values();
    release(&mut values, 1, 1);
    for (code, reason) in BURSTS {
        proxy.answer(move |method, address| {
            let write = method == "PATCH" && address.contains("/deployments/");
            write.then(|| refusal(code, reason))
        });
        let refused = stage.apply(1, &values).await;
        let Err(TargetError::Unavailable(why)) = refused else {
            panic!("{code}: {refused:?}");
        };
        let name = names::release(&web(), deployment(1));
        assert!(why.contains(&format!("Deployment {name}")), "{why}");
        assert!(why.contains(&code.to_string()), "{why}");
    }
    proxy.behave();
    stage.apply(1, &values).await.unwrap();
    stage
        .until("it is applied", |s| {
            s.revision == Some(commit(1)) && of(s, 1).is_some()
        })
        .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn without_the_right_to_disruption_budgets_there_are_none_and_releases_run() {
    let Some((stage, proxy)) = through_proxy("no-budgets").await else {
        return;
    };
    let _kubelet = stage.kubelet(Fate::Ready {
        ip: "10.1.2.3".to_owned(),
    });
    let mut values = stage.values();
    release(&mut values, 1, 2);
    // An account of before; one that may list them, and no more; a cluster that knows none.
    for (n, code, reason, of_lists) in [
        (1, 403, "Forbidden", true),
        (2, 403, "Forbidden", false),
        (3, 404, "NotFound", true),
    ] {
        proxy.answer(move |method, address| {
            let is_one = address.contains("/poddisruptionbudgets");
            (is_one && (of_lists || method != "GET")).then(|| refusal(code, reason))
        });
        stage.apply(n, &values).await.unwrap();
        let told = |s: &AppStatus| s.revision == Some(commit(n)) && ready(s, 1) == 2;
        stage.until("both are ready", told).await;
    }
    // What was asked for is not left out without a word.
    let service = values.services.get_mut(&web()).unwrap();
    let scaled = service.releases.get_mut(&deployment(1)).unwrap();
    scaled.run.autoscaling = Some(daybook_events::spec::Autoscaling {
        max: 6,
        cpu_percent: 70,
    });
    proxy.answer(|_, address| {
        let is_one = address.contains("/horizontalpodautoscalers");
        is_one.then(|| refusal(403, "Forbidden"))
    });
    let refused = stage.apply(4, &values).await;
    let Err(TargetError::Refused(why)) = refused else {
        panic!("{refused:?}");
    };
    assert!(why.contains("horizontalpodautoscalers"), "{why}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_right_to_volumes_that_was_taken_away_does_not_take_what_is_kept() {
    for (environment, has_volume) in [("pr-8", true), ("pr-9", false)] {
        let Some((stage, proxy)) = through_proxy(environment).await else {
            return;
        };
        let mut values = stage.values();
        values.ephemeral = true;
        let nothing = values.clone();
        release(&mut values, 1, 1);
        if has_volume {
            super::volumes::keeps(&mut values, 1, json!({ "path": "/data" }));
        }
        stage.apply(1, &values).await.unwrap();
        proxy.answer(|_, address| {
            let is_one = address.contains("/persistentvolumeclaims");
            is_one.then(|| refusal(403, "Forbidden"))
        });
        let applied = stage.apply(2, &nothing).await;
        let spaces: Api<Namespace> = Api::all(stage.client.clone());
        let found = spaces.get_opt(&stage.namespace()).await.unwrap();
        let stays = found.is_some_and(|s| s.metadata.deletion_timestamp.is_none());
        assert_eq!(stays, has_volume);
        match (has_volume, applied) {
            (false, Ok(())) => {}
            (true, Err(TargetError::Refused(why))) => {
                assert!(why.contains("the volumes of the environment"), "{why}");
            }
            (_, other) => panic!("{other:?}"),
        }
        if has_volume {
            let removed = stage.target.remove_volumes(&stage.app).await;
            assert!(removed.is_err(), "{removed:?}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_right_that_is_missing_is_named() {
    let plane = tokio::task::spawn_blocking(ControlPlane::shared);
    let Some(plane) = plane.await.unwrap() else {
        return;
    };
    let admin = plane.client().await;
    // All that is needed but one verb on one kind.
    let role = json!({
        "metadata": { "name": "almost-daybook" },
        "rules": [
            { "apiGroups": [""], "resources": ["namespaces", "configmaps", "secrets", "services"],
              "verbs": ["get", "list", "watch", "create", "patch", "delete"] },
            { "apiGroups": ["apps"], "resources": ["deployments", "replicasets"],
              "verbs": ["get", "list", "watch", "create", "delete"] },
            { "apiGroups": [""], "resources": ["pods", "events"], "verbs": ["list", "watch"] },
            // Asked for if another test has installed them here.
            { "apiGroups": ["gateway.networking.k8s.io"], "resources": ["httproutes"],
              "verbs": ["list", "create", "patch", "delete"] },
        ],
    });
    let binding = json!({
        "metadata": { "name": "almost-daybook" },
        "roleRef": { "apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole",
                     "name": "almost-daybook" },
        "subjects": [{ "apiGroup": "rbac.authorization.k8s.io", "kind": "User",
                       "name": "almost-daybook" }],
    });
    let (roles, bindings): (Api<ClusterRole>, Api<ClusterRoleBinding>) =
        (Api::all(admin.clone()), Api::all(admin.clone()));
    let params = PostParams::default();
    let role = serde_json::from_value(role).unwrap();
    roles.create(&params, &role).await.unwrap();
    let binding = serde_json::from_value(binding).unwrap();
    bindings.create(&params, &binding).await.unwrap();
    let config = kube::config::Kubeconfig::read_from(plane.kubeconfig()).unwrap();
    let all = kube::config::KubeConfigOptions::default();
    let mut config = kube::Config::from_custom_kubeconfig(config, &all)
        .await
        .unwrap();
    config.auth_info.impersonate = Some("almost-daybook".to_owned());
    let limited = Client::try_from(config).unwrap();
    // Rights count a moment after they were given.
    let namespaces: Api<Namespace> = Api::all(limited.clone());
    super::builds::until("its rights count", || async {
        namespaces.list(&ListParams::default()).await.ok()
    })
    .await;
    let stage = Stage::of("limited", |options| options.client = limited)
        .await
        .unwrap();
    let mut values = stage.values();
    release(&mut values, 1, 1);
    let refused = stage.apply(1, &values).await;
    let Err(TargetError::Refused(why)) = refused else {
        panic!("{refused:?}");
    };
    assert!(
        why.contains("cannot patch resource \"deployments\""),
        "{why}"
    );
    assert!(
        why.contains("Give the account that Daybook uses there this right"),
        "{why}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_namespace_that_is_being_deleted_is_waited_for() {
    let Some(stage) = Stage::new("going").await else {
        return;
    };
    let mut values = stage.values();
    release(&mut values, 1, 1);
    stage.apply(1, &values).await.unwrap();
    let maps: Api<ConfigMap> = Api::namespaced(stage.client.clone(), &stage.namespace());
    let holds = json!({ "metadata": { "name": "holds", "finalizers": ["example.com/test"] } });
    let holds: ConfigMap = serde_json::from_value(holds).unwrap();
    maps.create(&PostParams::default(), &holds).await.unwrap();
    let spaces: Api<Namespace> = Api::all(stage.client.clone());
    let name = stage.namespace();
    spaces.delete(&name, &Default::default()).await.unwrap();
    let refused = stage.apply(2, &values).await;
    assert!(
        matches!(&refused, Err(TargetError::Unavailable(why)) if why.contains("still being deleted")),
        "{refused:?}"
    );
    let release = Patch::Merge(json!({ "metadata": { "finalizers": null } }));
    maps.patch("holds", &PatchParams::default(), &release)
        .await
        .unwrap();
    let again = tokio::time::timeout(PATIENCE, async {
        while let Err(error) = stage.apply(2, &values).await {
            assert!(matches!(error, TargetError::Unavailable(_)), "{error}");
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    });
    again.await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_new_try_counts_from_the_time_of_the_cluster_whatever_the_clock_here_says() {
    let Some((stage, proxy)) = through_proxy("skewed").await else {
        return;
    };
    let _kubelet = stage.kubelet(Fate::NoImage("denied".to_owned()));
    let mut values = stage.values();
    release(&mut values, 1, 1);
    let service = values.services.get_mut(&web()).unwrap();
    let first = service.releases.get_mut(&deployment(1)).unwrap();
    first.run.health.deadline_seconds = 2;
    stage.apply(1, &values).await.unwrap();
    let over = |s: &AppStatus| {
        let problem = of(s, 1).and_then(|r| r.problem.as_ref());
        problem.is_some_and(|p| !p.transient)
    };
    stage.until("it has failed", over).await;

    // There it is an hour later than here.
    let there = Timestamp::now().as_second() + 3600;
    let there = Timestamp::from_second(there).unwrap();
    let printer = DateTimePrinter::new();
    proxy.date(&printer.timestamp_to_rfc9110_string(&there).unwrap());
    let workloads: Api<Deployment> = Api::namespaced(stage.client.clone(), &stage.namespace());
    let name = names::release(&web(), deployment(1));
    let before = workloads.get(&name).await.unwrap().resource_version();
    stage.target.retry(&stage.app, deployment(1)).await.unwrap();
    let params = WatchParams::default().fields(&format!("metadata.name={name}"));
    let changes = workloads.watch(&params, &before.unwrap()).await.unwrap();
    let mut changes = std::pin::pin!(changes);
    let written = tokio::time::timeout(PATIENCE, async {
        loop {
            let change = changes.try_next().await.unwrap();
            let WatchEvent::Modified(seen) = change.expect("the watch goes on") else {
                continue;
            };
            let conditions = seen.status.and_then(|status| status.conditions);
            let mut conditions = conditions.into_iter().flatten();
            let again = conditions.find(|c| c.reason.as_deref() == Some("TriedAgain"));
            if let Some(again) = again {
                return again.last_update_time.unwrap().0;
            }
        }
    });
    assert_eq!(written.await.unwrap(), there);
}
