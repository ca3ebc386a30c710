//! Whose trouble something is, and trouble that the API server and its controllers make.

use std::sync::atomic::{AtomicBool, Ordering};

use daybook_workers::target::Problem;
use k8s_openapi::api::core::v1::ResourceQuota;

use super::builds::until;
use super::*;

fn problem(status: &AppStatus, n: u128) -> Option<&Problem> {
    of(status, n)?.problem.as_ref()
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_program_printed_last_is_said_without_the_secrets_of_its_project() {
    let folder = tempfile::tempdir().unwrap();
    let secrets = SecretFolder::new(folder.path(), None);
    let Some(stage) = Stage::with("discreet", Arc::new(secrets.clone())).await else {
        return;
    };
    let id = SecretId {
        name: "PASSPHRASE".parse().unwrap(),
        scope: SecretScope::default(),
    };
    let key = "correct horse battery\nstaple of a key";
    let value = SecretValue::new(key.to_owned().into()).unwrap();
    secrets.put(&stage.app.project, &id, &value).await.unwrap();
    // As much of it is quoted as begins within the secret.
    let printed = format!("it cannot log in with {key} {}", "y".repeat(390));
    let _kubelet = stage.kubelet(Fate::Crashes(3, printed));
    let mut values = stage.values();
    release(&mut values, 1, 1);
    stage.apply(1, &values).await.unwrap();
    let status = stage.until("why", |s| problem(s, 1).is_some()).await;
    let why = problem(&status, 1).unwrap();
    assert_eq!(why.reason, "CrashLoopBackOff", "{why:?}");
    assert!(why.message.contains("*** yyy"), "{why:?}");
    assert!(!why.message.contains("key"), "{why:?}");
}

/// No rollout is over while a slow machine looks at it.
fn patient(values: &mut EnvironmentValues) {
    for service in values.services.values_mut() {
        for release in service.releases.values_mut() {
            release.run.health.deadline_seconds = 3600;
        }
    }
}

fn pods(stage: &Stage) -> Api<Pod> {
    Api::namespaced(stage.client.clone(), &stage.namespace())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_quota_that_is_used_up_is_said() {
    let Some(stage) = Stage::new("no-room").await else {
        return;
    };
    let _kubelet = stage.kubelet(Fate::Ready {
        ip: "10.1.2.3".to_owned(),
    });
    let mut values = stage.values();
    release(&mut values, 1, 1);
    patient(&mut values);
    stage.apply(1, &values).await.unwrap();
    stage.until("it is ready", |s| ready(s, 1) == 1).await;
    let quotas: Api<ResourceQuota> = Api::namespaced(stage.client.clone(), &stage.namespace());
    let one = json!({ "metadata": { "name": "one" }, "spec": { "hard": { "pods": "1" } } });
    let one: ResourceQuota = serde_json::from_value(one).unwrap();
    quotas.create(&PostParams::default(), &one).await.unwrap();
    until("the quota counts", || async {
        let quota = quotas.get("one").await.unwrap();
        quota.status.and_then(|status| status.used).map(|_| ())
    })
    .await;

    release(&mut values, 2, 1);
    patient(&mut values);
    stage.apply(2, &values).await.unwrap();
    let status = stage.until("why", |s| problem(s, 2).is_some()).await;
    let why = problem(&status, 2).unwrap();
    assert_eq!(why.reason, "QuotaExceeded", "{why:?}");
    assert!(why.message.contains("exceeded quota: one"), "{why:?}");
    assert!(why.transient && !why.likely_causes.is_empty(), "{why:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_policy_that_refuses_pods_is_said() {
    let Some(stage) = Stage::new("no-pods").await else {
        return;
    };
    let mut values = stage.values();
    release(&mut values, 1, 0);
    patient(&mut values);
    stage.apply(1, &values).await.unwrap();
    // Images may run as whom they like, which this standard forbids.
    let spaces: Api<Namespace> = Api::all(stage.client.clone());
    let labels = json!({ "pod-security.kubernetes.io/enforce": "restricted" });
    let patch = Patch::Merge(json!({ "metadata": { "labels": labels } }));
    let params = PatchParams::default();
    spaces
        .patch(&stage.namespace(), &params, &patch)
        .await
        .unwrap();
    let bare = json!({
        "metadata": { "name": "bare" },
        "spec": { "containers": [{ "name": "bare", "image": "bare" }] },
    });
    let bare: Pod = serde_json::from_value(bare).unwrap();
    let api = pods(&stage);
    until("the policy counts", || async {
        let dry = PostParams {
            dry_run: true,
            ..PostParams::default()
        };
        let refused = api.create(&dry, &bare).await.err()?;
        format!("{refused:?}").contains("PodSecurity").then_some(())
    })
    .await;

    release(&mut values, 2, 1);
    patient(&mut values);
    stage.apply(2, &values).await.unwrap();
    let status = stage.until("why", |s| problem(s, 2).is_some()).await;
    let why = problem(&status, 2).unwrap();
    assert_eq!(why.reason, "FailedCreate", "{why:?}");
    assert!(why.message.contains("violates PodSecurity"), "{why:?}");
    assert!(why.transient && !why.likely_causes.is_empty(), "{why:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pod_that_was_evicted_is_said_until_another_is_ready_in_its_place() {
    let Some(stage) = Stage::new("evicted").await else {
        return;
    };
    let was_one = AtomicBool::new(false);
    let first_goes = move |_: &Pod| match was_one.swap(true, Ordering::SeqCst) {
        false => Fate::Evicted("The node was low on resource: memory.".to_owned()),
        true => Fate::Creating,
    };
    let kubelet = Kubelet::start(stage.client.clone(), Some(&stage.namespace()), first_goes);
    let mut values = stage.values();
    release(&mut values, 1, 1);
    patient(&mut values);
    stage.apply(1, &values).await.unwrap();
    let status = stage.until("why", |s| problem(s, 1).is_some()).await;
    let why = problem(&status, 1).unwrap();
    assert_eq!(why.reason, "Evicted", "{why:?}");
    assert!(why.message.contains("low on resource"), "{why:?}");
    // What has ended is no instance.
    let one = |s: &AppStatus| of(s, 1).is_some_and(|r| r.instances.len() == 1);
    stage.until("there is one in its place", one).await;
    drop(kubelet);
    for pod in pods(&stage).list(&ListParams::default()).await.unwrap() {
        let phase = pod.status.as_ref().and_then(|s| s.phase.as_deref());
        if phase != Some("Failed") {
            let ready = Fate::Ready {
                ip: "10.1.2.3".to_owned(),
            };
            Kubelet::play(&stage.client, &pod, &ready).await;
        }
    }
    let well = |s: &AppStatus| ready(s, 1) == 1 && problem(s, 1).is_none();
    stage.until("it is ready", well).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn pods_of_an_older_template_neither_count_nor_have_a_say() {
    let Some(stage) = Stage::new("older").await else {
        return;
    };
    let is_newer = |pod: &Pod| {
        let spec = pod.spec.as_ref().unwrap();
        spec.containers[0].command.is_some()
    };
    let running = || Fate::Ready {
        ip: "10.1.2.3".to_owned(),
    };
    let fate = move |pod: &Pod| match is_newer(pod) {
        true => Fate::Creating,
        false => running(),
    };
    let _kubelet = Kubelet::start(stage.client.clone(), Some(&stage.namespace()), fate);
    let mut values = stage.values();
    release(&mut values, 1, 1);
    patient(&mut values);
    stage.apply(1, &values).await.unwrap();
    stage.until("it is ready", |s| ready(s, 1) == 1).await;

    let service = values.services.get_mut(&web()).unwrap();
    let first = service.releases.get_mut(&deployment(1)).unwrap();
    first.run.command = vec!["serve".to_owned()];
    stage.apply(2, &values).await.unwrap();
    let instances =
        |s: &AppStatus, is: &dyn Fn(&daybook_workers::target::InstanceStatus) -> bool| {
            let all = of(s, 1).into_iter().flat_map(|r| &r.instances);
            all.filter(|i| is(i)).count()
        };
    let both = |s: &AppStatus| {
        let older = instances(s, &|i| i.outdated && i.ready);
        s.revision == Some(commit(2)) && older == 1 && instances(s, &|i| !i.outdated) == 1
    };
    let status = stage.until("the older one serves on", both).await;
    // That it is ready is no success of what it is to be now.
    assert_eq!((ready(&status, 1), problem(&status, 1)), (0, None));

    let all = pods(&stage).list(&ListParams::default()).await.unwrap();
    let (newer, older): (Vec<_>, Vec<_>) = all.items.into_iter().partition(is_newer);
    Kubelet::play(&stage.client, &older[0], &Fate::OutOfMemory).await;
    let none_is_ready =
        |s: &AppStatus| instances(s, &|_| true) == 2 && instances(s, &|i| i.ready) == 0;
    let status = stage.until("the older one has ended", none_is_ready).await;
    assert_eq!(problem(&status, 1), None, "it is the older one's");

    let no_image = Fate::NoImage("manifest unknown".to_owned());
    Kubelet::play(&stage.client, &newer[0], &no_image).await;
    let status = stage.until("why", |s| problem(s, 1).is_some()).await;
    let why = problem(&status, 1).unwrap();
    assert_eq!(why.reason, "ImagePullBackOff", "{why:?}");
    assert!(why.message.contains(&newer[0].name_any()), "{why:?}");
    Kubelet::play(&stage.client, &newer[0], &running()).await;
    let well = |s: &AppStatus| ready(s, 1) == 1 && problem(s, 1).is_none();
    stage.until("it is ready", well).await;
}
