//! What a release is given of a cluster: cpu and memory.

use daybook_events::resources::Resources;

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
