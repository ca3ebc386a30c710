//! Volumes of services: made once, kept from one release to the next, and gone with the environment.

use daybook_events::spec::VolumeSpec;
use k8s_openapi::api::core::v1::PersistentVolumeClaim;
use k8s_openapi::api::storage::v1::StorageClass;

use super::*;

pub(super) const DATA: &str = "web.data";

pub(super) fn keeps(values: &mut EnvironmentValues, n: u128, volume: serde_json::Value) {
    let service = values.services.get_mut(&web()).unwrap();
    let release = service.releases.get_mut(&deployment(n)).unwrap();
    let volume: VolumeSpec = serde_json::from_value(volume).unwrap();
    release.run.volumes.insert("data".parse().unwrap(), volume);
}

pub(super) fn claims(stage: &Stage) -> Api<PersistentVolumeClaim> {
    Api::namespaced(stage.client.clone(), &stage.namespace())
}

pub(super) fn size(claim: &PersistentVolumeClaim) -> String {
    let resources = claim.spec.as_ref().unwrap().resources.as_ref().unwrap();
    resources.requests.as_ref().unwrap()["storage"].0.clone()
}

/// Waits until a claim is gone, or is on its way out: what keeps it from that is not played.
pub(super) async fn goes(stage: &Stage, name: &str) {
    let claims = claims(stage);
    super::builds::until("the claim goes", || async {
        let found = claims.get_opt(name).await.ok()?;
        let stays = found.is_some_and(|c| c.metadata.deletion_timestamp.is_none());
        (!stays).then_some(())
    })
    .await;
}

/// As a provisioner does it whose storage can grow.
pub(super) async fn bind(stage: &Stage, class: &str, name: &str) {
    let classes: Api<StorageClass> = Api::all(stage.client.clone());
    let body = json!({
        "metadata": { "name": class },
        "provisioner": "example.com/disks",
        "allowVolumeExpansion": true,
    });
    let body: StorageClass = serde_json::from_value(body).unwrap();
    classes.create(&PostParams::default(), &body).await.unwrap();
    let bound = json!({ "status": { "phase": "Bound", "capacity": { "storage": "1Gi" } } });
    let params = PatchParams::default();
    let bound = Patch::Merge(bound);
    claims(stage)
        .patch_status(name, &params, &bound)
        .await
        .unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_volume_outlives_the_releases_that_use_it() {
    let Some(stage) = Stage::new("volumes").await else {
        return;
    };
    let _kubelet = stage.kubelet(Fate::Ready {
        ip: "10.1.2.3".to_owned(),
    });
    let mut values = stage.values();
    release(&mut values, 1, 2);
    keeps(&mut values, 1, json!({ "path": "/data" }));
    stage.apply(1, &values).await.unwrap();
    let is_ready = |s: &AppStatus| ready(s, 1) == 2 && of(s, 1).unwrap().problem.is_none();
    stage.until("both are ready", is_ready).await;
    let first = claims(&stage).get(DATA).await.unwrap();
    assert_eq!(size(&first), "1Gi");
    let modes = first.spec.as_ref().unwrap().access_modes.clone();
    assert_eq!(modes, Some(vec!["ReadWriteOnce".to_owned()]));

    let pods: Api<Pod> = Api::namespaced(stage.client.clone(), &stage.namespace());
    let pod = pods.list(&ListParams::default()).await.unwrap().items[0].clone();
    let pod = serde_json::to_value(pod.spec.unwrap()).unwrap();
    let container = &pod["containers"][0];
    let mount = &container["volumeMounts"][0];
    assert_eq!(
        (&mount["name"], &mount["mountPath"]),
        (&json!("data"), &json!("/data"))
    );
    let env = container["env"].as_array().unwrap();
    let says = json!({ "name": "VOLUME_DATA", "value": "/data" });
    assert!(env.contains(&says), "{env:?}");
    assert_eq!(
        pod["volumes"][0]["persistentVolumeClaim"]["claimName"],
        DATA
    );
    let affinity = &pod["affinity"]["podAffinity"];
    let affinity = &affinity["requiredDuringSchedulingIgnoredDuringExecution"][0];
    assert_eq!(affinity["topologyKey"], "kubernetes.io/hostname");

    // Another release takes it over, whatever it says of it, and so does one without any other.
    release(&mut values, 2, 1);
    let other = json!({ "path": "/elsewhere", "size": "10M", "many_nodes": true });
    keeps(&mut values, 2, other);
    stage.apply(2, &values).await.unwrap();
    let service = values.services.get_mut(&web()).unwrap();
    service.releases.remove(&deployment(1));
    stage.apply(3, &values).await.unwrap();
    stage
        .until("the first is gone", |s| {
            of(s, 1).is_none() && ready(s, 2) == 1
        })
        .await;
    let nothing = stage.values();
    stage.apply(4, &nothing).await.unwrap();
    stage.until("nothing runs", |s| s.releases.is_empty()).await;
    let kept = claims(&stage).get(DATA).await.unwrap();
    assert_eq!(kept.metadata.uid, first.metadata.uid);
    assert_eq!(kept.metadata.deletion_timestamp, None);
    assert_eq!(kept.spec, first.spec);

    // It is there for whoever comes later, and goes with the environment.
    release(&mut values, 3, 1);
    keeps(&mut values, 3, json!({ "path": "/data" }));
    stage.apply(5, &values).await.unwrap();
    let again = claims(&stage).get(DATA).await.unwrap();
    assert_eq!(again.metadata.uid, first.metadata.uid);
    stage.apply(6, &nothing).await.unwrap();
    let theirs = json!({
        "metadata": { "name": "theirs" },
        "spec": {
            "accessModes": ["ReadWriteOnce"],
            "resources": { "requests": { "storage": "1Gi" } },
        },
    });
    let theirs: PersistentVolumeClaim = serde_json::from_value(theirs).unwrap();
    let params = PostParams::default();
    claims(&stage).create(&params, &theirs).await.unwrap();
    stage.target.remove_volumes(&stage.app).await.unwrap();
    goes(&stage, DATA).await;
    let theirs = claims(&stage).get("theirs").await.unwrap();
    assert_eq!(theirs.metadata.deletion_timestamp, None);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_volume_grows_where_its_storage_can_and_is_said_not_to_where_not() {
    let Some(stage) = Stage::new("growing").await else {
        return;
    };
    let _kubelet = stage.kubelet(Fate::Ready {
        ip: "10.1.2.3".to_owned(),
    });
    let of_size = |size: &str| json!({ "path": "/data", "size": size, "storage_class": "grows" });
    let mut values = stage.values();
    release(&mut values, 1, 1);
    keeps(&mut values, 1, of_size("1024Mi"));
    stage.apply(1, &values).await.unwrap();
    release(&mut values, 2, 1);
    keeps(&mut values, 2, of_size("2Gi"));
    stage.apply(2, &values).await.unwrap();
    let held = |s: &AppStatus| of(s, 2).is_some_and(|r| r.problem.is_some());
    let status = stage.until("it is said", held).await;
    let problem = of(&status, 2).unwrap().problem.clone().unwrap();
    assert_eq!(problem.reason, "VolumeNotEnlarged");
    assert!(
        !problem.transient && problem.message.contains("has 1Gi"),
        "{problem:?}"
    );
    assert_eq!(of(&status, 1).unwrap().problem, None);

    bind(&stage, "grows", DATA).await;
    stage.apply(3, &values).await.unwrap();
    assert_eq!(size(&claims(&stage).get(DATA).await.unwrap()), "2Gi");
    let is_ready = |s: &AppStatus| ready(s, 2) == 1 && of(s, 2).unwrap().problem.is_none();
    stage.until("it runs", is_ready).await;
    // Whoever goes back finds it as large as it is.
    let service = values.services.get_mut(&web()).unwrap();
    service.releases.remove(&deployment(2));
    stage.apply(4, &values).await.unwrap();
    assert_eq!(size(&claims(&stage).get(DATA).await.unwrap()), "2Gi");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_claim_that_is_larger_than_could_be_asked_for_is_left_as_it_is() {
    for (environment, there) in [("huge", "100Ti"), ("exponent", "5e9")] {
        let Some(stage) = Stage::new(environment).await else {
            return;
        };
        let mut values = stage.values();
        release(&mut values, 1, 1);
        stage.apply(1, &values).await.unwrap();
        let ours = json!({
            "metadata": { "name": DATA, "labels": {
                names::MANAGED_BY: names::MANAGER,
                names::PROJECT: stage.app.project,
                names::ENVIRONMENT: stage.app.environment,
                names::VOLUME: "data",
            }},
            "spec": {
                "accessModes": ["ReadWriteOnce"],
                "resources": { "requests": { "storage": there } },
            },
        });
        let ours: PersistentVolumeClaim = serde_json::from_value(ours).unwrap();
        let params = PostParams::default();
        claims(&stage).create(&params, &ours).await.unwrap();
        keeps(&mut values, 1, json!({ "path": "/data", "size": "2Gi" }));
        stage.apply(2, &values).await.unwrap();
        assert_eq!(size(&claims(&stage).get(DATA).await.unwrap()), there);
        let is = |s: &AppStatus| s.revision == Some(commit(2)) && of(s, 1).is_some();
        let status = stage.until("it is told", is).await;
        let problem = of(&status, 1).unwrap().problem.as_ref();
        assert!(problem.is_none_or(|p| p.reason != "VolumeNotEnlarged"));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_claim_of_somebody_else_is_not_taken() {
    let Some(stage) = Stage::new("foreign-claim").await else {
        return;
    };
    let mut values = stage.values();
    release(&mut values, 1, 1);
    stage.apply(1, &values).await.unwrap();
    let theirs = json!({
        "metadata": { "name": DATA },
        "spec": {
            "accessModes": ["ReadWriteOnce"],
            "resources": { "requests": { "storage": "1Gi" } },
        },
    });
    let theirs: PersistentVolumeClaim = serde_json::from_value(theirs).unwrap();
    let params = PostParams::default();
    claims(&stage).create(&params, &theirs).await.unwrap();
    keeps(&mut values, 1, json!({ "path": "/data" }));
    let refused = stage.apply(2, &values).await;
    let Err(TargetError::Refused(why)) = refused else {
        panic!("{refused:?}");
    };
    assert!(why.contains("exists and is not Daybook's"), "{why}");
    stage.target.remove_volumes(&stage.app).await.unwrap();
    let theirs = claims(&stage).get(DATA).await.unwrap();
    assert_eq!(theirs.metadata.deletion_timestamp, None);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_volume_of_a_pull_request_goes_with_its_environment_and_not_with_its_last_release() {
    let Some(stage) = Stage::new("pr-7").await else {
        return;
    };
    let mut values = stage.values();
    values.ephemeral = true;
    let nothing = values.clone();
    release(&mut values, 1, 1);
    keeps(&mut values, 1, json!({ "path": "/data" }));
    stage.apply(1, &values).await.unwrap();
    stage.apply(2, &nothing).await.unwrap();
    let spaces: Api<Namespace> = Api::all(stage.client.clone());
    let there = spaces.get(&stage.namespace()).await.unwrap();
    assert_eq!(there.metadata.deletion_timestamp, None);
    let kept = claims(&stage).get(DATA).await.unwrap();
    assert_eq!(kept.metadata.deletion_timestamp, None);
    let gone = stage.values();
    stage.apply(3, &gone).await.unwrap();
    stage.target.remove_volumes(&stage.app).await.unwrap();
    super::builds::until("the namespace goes", || async {
        let found = spaces.get_opt(&stage.namespace()).await.ok()?;
        let stays = found.is_some_and(|s| s.metadata.deletion_timestamp.is_none());
        (!stays).then_some(())
    })
    .await;
}
