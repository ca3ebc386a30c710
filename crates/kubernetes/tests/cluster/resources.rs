//! What a release is given of a cluster: cpu and memory, and how many instances.

use daybook_events::resources::Resources;
use daybook_events::spec::Autoscaling;
use k8s_openapi::api::autoscaling::v2::HorizontalPodAutoscaler;
use k8s_openapi::api::policy::v1::PodDisruptionBudget;
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;

use super::*;

fn asks(values: &mut EnvironmentValues, n: u128, resources: serde_json::Value) {
    let service = values.services.get_mut(&web()).unwrap();
    let release = service.releases.get_mut(&deployment(n)).unwrap();
    release.run.resources = serde_json::from_value::<Resources>(resources).unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn each_release_has_the_amounts_of_its_own_definition() {
    let Some(stage) = Stage::new("amounts").await else {
        return;
    };
    let _kubelet = stage.kubelet(Fate::Ready {
        ip: "10.1.2.3".to_owned(),
    });
    let mut values = stage.values();
    release(&mut values, 1, 1);
    let amounts = json!({
        "requests": { "cpu": 0.25, "memory": "1024Mi" },
        "limits": { "cpu": "1000m", "memory": "1.5Gi" },
    });
    asks(&mut values, 1, amounts);
    release(&mut values, 2, 1);
    asks(&mut values, 2, json!({ "limits": { "memory": "64M" } }));
    release(&mut values, 3, 1);
    stage.apply(1, &values).await.unwrap();
    let are_ready = |s: &AppStatus| (1..=3).all(|n| ready(s, n) == 1);
    let status = stage.until("they are ready", are_ready).await;
    // An API server keeps amounts in a form of its own, which is no drift.
    assert!(status.releases.iter().all(|r| r.problem.is_none()));

    let pods: Api<Pod> = Api::namespaced(stage.client.clone(), &stage.namespace());
    let of = |n: u128| {
        let pods = pods.clone();
        async move {
            let list = ListParams::default().labels(&format!("daybook.dev/deployment={}", uuid(n)));
            let found = pods.list(&list).await.unwrap().items;
            let container = found[0].spec.as_ref().unwrap().containers[0].clone();
            serde_json::to_value(container.resources.unwrap_or_default()).unwrap()
        }
    };
    let whole = json!({
        "requests": { "cpu": "250m", "memory": "1Gi" },
        "limits": { "cpu": "1", "memory": "1536Mi" },
    });
    assert_eq!(of(1).await, whole);
    // What has a limit and no request requests its limit.
    let one = json!({ "memory": "64M" });
    assert_eq!(of(2).await, json!({ "requests": one, "limits": one }));
    assert_eq!(of(3).await, json!({}));

    // So they are already.
    let workloads: Api<Deployment> = Api::namespaced(stage.client.clone(), &stage.namespace());
    let name = names::release(&web(), deployment(1));
    let before = workloads.get(&name).await.unwrap().metadata.generation;
    stage.apply(2, &values).await.unwrap();
    let told = |s: &AppStatus| s.revision == Some(commit(2)) && are_ready(s);
    stage.until("the new revision is told", told).await;
    let after = workloads.get(&name).await.unwrap().metadata.generation;
    assert_eq!(after, before);
}

/// The number of instances that a workload is to have now, and whose it is to set.
async fn replicas(stage: &Stage, n: u128) -> (Option<i32>, Vec<String>) {
    let workloads: Api<Deployment> = Api::namespaced(stage.client.clone(), &stage.namespace());
    let name = names::release(&web(), deployment(n));
    let found = workloads.get(&name).await.unwrap();
    let managers = found.metadata.managed_fields.into_iter().flatten();
    let sets = |fields: &serde_json::Value| fields["f:spec"].get("f:replicas").is_some();
    let managers = managers.filter(|m| m.fields_v1.as_ref().is_some_and(|f| sets(&f.0)));
    let managers = managers.filter_map(|m| m.manager).collect();
    (found.spec.unwrap().replicas, managers)
}

async fn autoscalers(stage: &Stage) -> Vec<HorizontalPodAutoscaler> {
    let api: Api<HorizontalPodAutoscaler> =
        Api::namespaced(stage.client.clone(), &stage.namespace());
    api.list(&ListParams::default()).await.unwrap().items
}

#[tokio::test(flavor = "multi_thread")]
async fn an_autoscaler_sets_the_number_of_instances_until_the_release_is_stopped() {
    let Some(stage) = Stage::new("autoscaled").await else {
        return;
    };
    let _kubelet = stage.kubelet(Fate::Ready {
        ip: "10.1.2.3".to_owned(),
    });
    let scaled = |replicas: u32| {
        let mut values = stage.values();
        release(&mut values, 1, replicas);
        asks(&mut values, 1, json!({ "requests": { "cpu": "100m" } }));
        let service = values.services.get_mut(&web()).unwrap();
        let release = service.releases.get_mut(&deployment(1)).unwrap();
        release.run.autoscaling = Some(Autoscaling {
            max: 6,
            cpu_percent: 70,
        });
        values
    };
    stage.apply(1, &scaled(2)).await.unwrap();
    // At once, and not when the autoscaler first looks.
    stage.until("two are ready", |s| ready(s, 1) == 2).await;
    let made = autoscalers(&stage).await.remove(0).spec.unwrap();
    assert_eq!((made.min_replicas, made.max_replicas), (Some(2), 6));
    let (two, managers) = replicas(&stage, 1).await;
    assert_eq!(two, Some(2));
    assert!(
        !managers.contains(&names::MANAGER.to_owned()),
        "{managers:?}"
    );

    // As the controller does it, through the scale of the workload.
    let workloads: Api<Deployment> = Api::namespaced(stage.client.clone(), &stage.namespace());
    let name = names::release(&web(), deployment(1));
    let more = Patch::Merge(json!({ "spec": { "replicas": 5 } }));
    let params = PatchParams {
        field_manager: Some("kube-controller-manager".to_owned()),
        ..PatchParams::default()
    };
    workloads.patch_scale(&name, &params, &more).await.unwrap();
    let status = stage.until("five are ready", |s| ready(s, 1) == 5).await;
    assert_eq!(of(&status, 1).unwrap().problem, None, "it is no drift");
    stage.apply(2, &scaled(2)).await.unwrap();
    assert_eq!(
        replicas(&stage, 1).await.0,
        Some(5),
        "nobody takes them away"
    );

    stage.apply(3, &scaled(0)).await.unwrap();
    let gone = |s: &AppStatus| of(s, 1).is_some_and(|r| r.wanted == 0 && r.instances.is_empty());
    stage.until("it is stopped", gone).await;
    assert!(autoscalers(&stage).await.is_empty());
    stage.apply(4, &scaled(3)).await.unwrap();
    stage.until("three are ready", |s| ready(s, 1) == 3).await;
    assert_eq!(autoscalers(&stage).await.len(), 1);

    // Also when somebody has taken the autoscaler away, and its number stays behind.
    workloads.patch_scale(&name, &params, &more).await.unwrap();
    stage.until("five are ready", |s| ready(s, 1) == 5).await;
    let api: Api<HorizontalPodAutoscaler> =
        Api::namespaced(stage.client.clone(), &stage.namespace());
    api.delete(&name, &Default::default()).await.unwrap();
    stage.apply(5, &scaled(0)).await.unwrap();
    stage.until("it is stopped again", gone).await;
    stage.apply(6, &scaled(3)).await.unwrap();
    stage.until("three are ready", |s| ready(s, 1) == 3).await;

    // What somebody else sets beside that is theirs, as ever.
    let deadline = Patch::Merge(json!({ "spec": { "progressDeadlineSeconds": 999 } }));
    let params = PatchParams {
        field_manager: Some("somebody".to_owned()),
        ..PatchParams::default()
    };
    workloads.patch(&name, &params, &deadline).await.unwrap();
    let refused = stage.apply(7, &scaled(0)).await;
    let Err(TargetError::Refused(why)) = refused else {
        panic!("{refused:?}");
    };
    assert!(
        why.contains(".spec.progressDeadlineSeconds (somebody)"),
        "{why}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn where_several_run_one_at_a_time_may_be_taken_away() {
    let Some(stage) = Stage::new("disrupted").await else {
        return;
    };
    let budgets: Api<PodDisruptionBudget> =
        Api::namespaced(stage.client.clone(), &stage.namespace());
    let all = || async {
        let found = budgets.list(&ListParams::default()).await.unwrap().items;
        found.iter().map(|b| b.name_any()).collect::<Vec<_>>()
    };
    let mut values = stage.values();
    release(&mut values, 1, 1);
    release(&mut values, 2, 2);
    stage.apply(1, &values).await.unwrap();
    let name = names::release(&web(), deployment(2));
    assert_eq!(all().await, std::slice::from_ref(&name));
    let spec = budgets.get(&name).await.unwrap().spec.unwrap();
    assert_eq!(spec.max_unavailable, Some(IntOrString::Int(1)));
    // What one node has to run can only go from it all at once.
    super::volumes::keeps(&mut values, 2, json!({ "path": "/data" }));
    stage.apply(2, &values).await.unwrap();
    assert!(all().await.is_empty());
    super::volumes::keeps(
        &mut values,
        2,
        json!({ "path": "/data", "many_nodes": true }),
    );
    stage.apply(3, &values).await.unwrap();
    assert_eq!(all().await, [name]);
    release(&mut values, 2, 1);
    stage.apply(4, &values).await.unwrap();
    assert!(all().await.is_empty());
}
