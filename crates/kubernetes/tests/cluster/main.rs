//! The target against a real API server, with a kubelet that is played.

#![allow(clippy::unwrap_used)]

mod argocd;
mod builds;
mod causes;
mod charts;
mod credentials;
mod faults;
mod install;
mod limits;
mod logs;
mod resources;
mod traffic;
mod volumes;

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use daybook_events::secret::{SecretId, SecretRef, SecretScope};
use daybook_events::{CommitId, DeploymentId, Digest, EnvironmentName, ProjectName, ServiceName};
use daybook_kubernetes::names;
use daybook_kubernetes::{ClusterOptions, KubernetesCluster};
use daybook_secrets::{NoSecrets, SecretFolder, SecretStore, SecretValue};
use daybook_testkit::kubernetes::{ControlPlane, Fate, Kubelet};
use daybook_workers::target::{AppRef, AppStatus, ReleaseStatus, Target, TargetError};
use daybook_workers::values::{EnvironmentValues, ReleaseValues};
use k8s_openapi::api::apps::v1::Deployment;
use k8s_openapi::api::core::v1::{ConfigMap, Namespace, Pod, Secret, Service};
use kube::api::{ListParams, Patch, PatchParams, PostParams};
use kube::{Api, Client, ResourceExt};
use serde_json::json;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

const PATIENCE: Duration = Duration::from_secs(60);

struct Stage {
    client: Client,
    target: KubernetesCluster,
    app: AppRef,
}

impl Stage {
    async fn new(environment: &str) -> Option<Self> {
        Self::with(environment, Arc::new(NoSecrets)).await
    }

    async fn with(environment: &str, secrets: Arc<dyn SecretStore>) -> Option<Self> {
        Self::of(environment, |options| options.secrets = secrets).await
    }

    async fn of(environment: &str, set: impl FnOnce(&mut ClusterOptions)) -> Option<Self> {
        let plane = tokio::task::spawn_blocking(ControlPlane::shared)
            .await
            .unwrap()?;
        let client = plane.client().await;
        let mut options = options(client.clone());
        set(&mut options);
        let target = KubernetesCluster::open(options).await.unwrap();
        Some(Self {
            client,
            target,
            app: app(environment),
        })
    }

    fn namespace(&self) -> String {
        names::namespace(&self.app.project, &self.app.environment)
    }

    fn kubelet(&self, fate: Fate) -> Kubelet {
        Kubelet::start(self.client.clone(), Some(&self.namespace()), move |_| {
            fate.clone()
        })
    }

    fn values(&self) -> EnvironmentValues {
        EnvironmentValues::new(
            self.app.project.clone(),
            self.app.environment.clone(),
            false,
        )
    }

    async fn apply(&self, n: u8, values: &EnvironmentValues) -> Result<(), TargetError> {
        self.target.apply(&self.app, &commit(n), values).await
    }

    /// Waits until the status is as `is` asks.
    async fn until(&self, what: &str, is: impl Fn(&AppStatus) -> bool) -> AppStatus {
        let mut watch = self.target.watch(&self.app);
        let found = wait(&mut watch, &is).await;
        found.unwrap_or_else(|| panic!("{what}: {:#?}", watch.borrow()))
    }
}

async fn wait(
    watch: &mut watch::Receiver<AppStatus>,
    is: impl Fn(&AppStatus) -> bool,
) -> Option<AppStatus> {
    let found = tokio::time::timeout(PATIENCE, watch.wait_for(|s| is(s))).await;
    Some(found.ok()?.ok()?.clone())
}

fn app(environment: &str) -> AppRef {
    AppRef {
        project: "shop".parse::<ProjectName>().unwrap(),
        environment: environment.parse::<EnvironmentName>().unwrap(),
    }
}

fn options(client: Client) -> ClusterOptions {
    ClusterOptions {
        name: "oslo".parse().unwrap(),
        client,
        secrets: Arc::new(NoSecrets),
        gateway: None,
        argocd: None,
        lines: None,
        cancel: CancellationToken::new(),
    }
}

fn commit(n: u8) -> CommitId {
    CommitId::parse(format!("{n:02x}").repeat(20)).unwrap()
}

fn deployment(n: u128) -> DeploymentId {
    DeploymentId(uuid(n))
}

fn uuid(n: u128) -> uuid::Uuid {
    uuid::Uuid::from_u128(0xdb00_0000_0000_4000_8000_0000_0000_0000 + n)
}

fn web() -> ServiceName {
    "web".parse().unwrap()
}

fn release(values: &mut EnvironmentValues, n: u128, replicas: u32) {
    let mut run = daybook_events::spec::RunSpec {
        replicas,
        ..Default::default()
    };
    run.env
        .insert("GREETING".parse().unwrap(), "good \"morning\"\n".to_owned());
    let release = ReleaseValues {
        image: daybook_events::spec::PinnedImage {
            repository: "registry.example.com/shop/web".parse().unwrap(),
            tag: "a1b2c3d".parse().unwrap(),
            digest: Digest::of(&n.to_be_bytes()),
        },
        clusters: vec!["oslo".parse().unwrap()],
        secret_env: BTreeMap::new(),
        run,
    };
    let service = values.services.entry(web()).or_default();
    service.releases.insert(deployment(n), release);
}

fn of(status: &AppStatus, n: u128) -> Option<&ReleaseStatus> {
    status
        .releases
        .iter()
        .find(|r| r.deployment == deployment(n))
}

fn ready(status: &AppStatus, n: u128) -> u32 {
    of(status, n).map_or(0, ReleaseStatus::ready)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_release_runs_and_goes_and_nothing_else_is_touched() {
    let Some(stage) = Stage::new("whole-life").await else {
        return;
    };
    let _kubelet = stage.kubelet(Fate::Ready {
        ip: "10.1.2.3".to_owned(),
    });
    let mut values = stage.values();
    release(&mut values, 1, 2);
    stage.apply(1, &values).await.unwrap();
    let status = stage.until("two are ready", |s| ready(s, 1) == 2).await;
    assert_eq!(status.revision, Some(commit(1)));
    let first = &of(&status, 1).unwrap().instances[0];
    assert_eq!(first.address, "10.1.2.3:8080");

    // Somebody else's things in the same namespace.
    let maps: Api<ConfigMap> = Api::namespaced(stage.client.clone(), &stage.namespace());
    let theirs = json!({ "metadata": { "name": "theirs", "labels": { "app": "x" } } });
    let theirs: ConfigMap = serde_json::from_value(theirs).unwrap();
    maps.create(&PostParams::default(), &theirs).await.unwrap();

    // A second release beside it, and the first one is scaled.
    release(&mut values, 2, 1);
    release(&mut values, 1, 3);
    stage.apply(2, &values).await.unwrap();
    let is = |s: &AppStatus| s.revision == Some(commit(2)) && ready(s, 1) == 3 && ready(s, 2) == 1;
    stage.until("both are ready", is).await;

    // The first one is stopped, and then removed.
    release(&mut values, 1, 0);
    stage.apply(3, &values).await.unwrap();
    let is = |s: &AppStatus| of(s, 1).is_some_and(|r| r.wanted == 0 && r.instances.is_empty());
    stage.until("it is stopped", is).await;
    values
        .services
        .get_mut(&web())
        .unwrap()
        .releases
        .remove(&deployment(1));
    stage.apply(4, &values).await.unwrap();
    stage
        .until("it is gone", |s| of(s, 1).is_none() && ready(s, 2) == 1)
        .await;
    let workloads: Api<Deployment> = Api::namespaced(stage.client.clone(), &stage.namespace());
    let services: Api<Service> = Api::namespaced(stage.client.clone(), &stage.namespace());
    let list = ListParams::default();
    assert_eq!(workloads.list(&list).await.unwrap().items.len(), 1);
    assert_eq!(services.list(&list).await.unwrap().items.len(), 1);
    assert!(maps.get_opt("theirs").await.unwrap().is_some());
}

#[tokio::test(flavor = "multi_thread")]
async fn applying_the_same_again_writes_nothing() {
    let Some(stage) = Stage::new("unchanged").await else {
        return;
    };
    let mut values = stage.values();
    release(&mut values, 1, 1);
    stage.apply(1, &values).await.unwrap();
    let versions = || async {
        let mut all = BTreeMap::new();
        let namespace = stage.namespace();
        let list = ListParams::default().labels("app.kubernetes.io/managed-by=daybook");
        let workloads: Api<Deployment> = Api::namespaced(stage.client.clone(), &namespace);
        for o in workloads.list(&list).await.unwrap() {
            // The controller writes the status; a new generation is a new specification.
            all.insert(o.name_any(), format!("{:?}", o.metadata.generation));
        }
        let services: Api<Service> = Api::namespaced(stage.client.clone(), &namespace);
        for o in services.list(&list).await.unwrap() {
            all.insert(
                format!("service {}", o.name_any()),
                o.resource_version().unwrap(),
            );
        }
        let maps: Api<ConfigMap> = Api::namespaced(stage.client.clone(), &namespace);
        for o in maps.list(&list).await.unwrap() {
            all.insert(
                format!("map {}", o.name_any()),
                o.resource_version().unwrap(),
            );
        }
        let spaces: Api<Namespace> = Api::all(stage.client.clone());
        let space = spaces.get(&namespace).await.unwrap();
        all.insert("namespace".to_owned(), space.resource_version().unwrap());
        all
    };
    let before = versions().await;
    assert_eq!(before.len(), 4);
    stage.apply(2, &values).await.unwrap();
    assert_eq!(versions().await, before);
    stage
        .until("the new revision is told", |s| {
            s.revision == Some(commit(2))
        })
        .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_keeps_a_release_from_being_ready_is_said_while_it_does() {
    let cases = [
        (
            "no-image",
            Fate::NoImage("manifest unknown".to_owned()),
            "ImagePullBackOff",
            "manifest unknown",
        ),
        (
            "crash",
            Fate::Crashes(3, "no database".to_owned()),
            "CrashLoopBackOff",
            "exit code 3, 3 restarts so far; its last words: no database",
        ),
        ("memory", Fate::OutOfMemory, "OOMKilled", "more memory"),
        (
            "no-node",
            Fate::Unschedulable("0/3 nodes are available: 3 Insufficient memory.".to_owned()),
            "Unschedulable",
            "Insufficient memory",
        ),
        (
            "unready",
            Fate::Unready("HTTP probe failed with statuscode: 500".to_owned()),
            "ReadinessProbeFailed",
            "statuscode: 500",
        ),
        (
            "no-config",
            Fate::NoConfig("secret \"db\" not found".to_owned()),
            "CreateContainerConfigError",
            "secret \"db\" not found",
        ),
        (
            "unstarted",
            Fate::Unstarted("dial tcp: connection refused".to_owned()),
            "StartupProbeFailed",
            "connection refused",
        ),
        (
            "no-program",
            Fate::Unstartable("exec: \"serve\": executable file not found in $PATH".to_owned()),
            "StartError",
            "\"serve\": executable file not found",
        ),
        (
            "no-mount",
            Fate::Unmounted("MountVolume.SetUp failed: secret \"key\" not found".to_owned()),
            "FailedMount",
            "secret \"key\" not found",
        ),
    ];
    for (environment, fate, reason, said) in cases {
        let Some(stage) = Stage::new(environment).await else {
            return;
        };
        let _kubelet = stage.kubelet(fate);
        let mut values = stage.values();
        release(&mut values, 1, 1);
        stage.apply(1, &values).await.unwrap();
        let is = |s: &AppStatus| of(s, 1).is_some_and(|r| r.problem.is_some());
        let status = stage.until(reason, is).await;
        let problem = of(&status, 1).unwrap().problem.clone().unwrap();
        assert_eq!(problem.reason, reason);
        assert!(problem.message.contains(said), "{problem:?}");
        assert!(problem.transient && !problem.remedy.is_empty());
        assert!(!problem.likely_causes.is_empty(), "{problem:?}");
        assert_eq!(problem.remedies[0], problem.remedy);
        assert!(problem.remedies.len() > 1, "{problem:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn of_a_program_that_ends_again_and_again_what_it_printed_last_is_said() {
    let Some(stage) = Stage::new("last-words").await else {
        return;
    };
    let printed = format!("{}panicked:\n  no database\n", "starting\n".repeat(200));
    let _kubelet = stage.kubelet(Fate::Crashes(101, printed));
    let mut values = stage.values();
    release(&mut values, 1, 1);
    stage.apply(1, &values).await.unwrap();
    let is = |s: &AppStatus| of(s, 1).is_some_and(|r| r.problem.is_some());
    let status = stage.until("it crashes", is).await;
    let problem = of(&status, 1).unwrap().problem.clone().unwrap();
    assert_eq!(problem.reason, "CrashLoopBackOff");
    assert!(
        problem.message.contains("; its last words: …starting | "),
        "{problem:?}"
    );
    assert!(
        problem.message.ends_with("| panicked: | no database"),
        "{problem:?}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_rollout_past_its_deadline_has_failed_with_its_cause() {
    let Some(stage) = Stage::new("deadline").await else {
        return;
    };
    let _kubelet = stage.kubelet(Fate::NoImage("denied".to_owned()));
    let mut values = stage.values();
    release(&mut values, 1, 1);
    let service = values.services.get_mut(&web()).unwrap();
    let release = service.releases.get_mut(&deployment(1)).unwrap();
    release.run.health.deadline_seconds = 2;
    stage.apply(1, &values).await.unwrap();
    let over = |s: &AppStatus| {
        let problem = of(s, 1).and_then(|r| r.problem.as_ref());
        problem.is_some_and(|p| !p.transient && p.reason == "ImagePullBackOff")
    };
    stage.until("it has failed", over).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_has_failed_is_tried_again_and_what_is_ready_is_left_alone() {
    let Some(stage) = Stage::new("retried").await else {
        return;
    };
    // One of two finds its image.
    let pulled = std::sync::atomic::AtomicBool::new(false);
    let ready_one = move |_: &Pod| match pulled.swap(true, std::sync::atomic::Ordering::SeqCst) {
        false => Fate::Ready {
            ip: "10.1.2.3".to_owned(),
        },
        true => Fate::NoImage("denied".to_owned()),
    };
    let kubelet = Kubelet::start(stage.client.clone(), Some(&stage.namespace()), ready_one);
    let mut values = stage.values();
    release(&mut values, 1, 2);
    let service = values.services.get_mut(&web()).unwrap();
    let first = service.releases.get_mut(&deployment(1)).unwrap();
    first.run.health.deadline_seconds = 2;
    stage.apply(1, &values).await.unwrap();
    let is_ready = |s: &AppStatus| {
        let instances = of(s, 1).into_iter().flat_map(|r| &r.instances);
        let ready = instances.filter(|i| i.ready);
        ready.map(|i| i.name.clone()).collect::<Vec<_>>()
    };
    // Its deadline may pass before the one instance is seen to be ready.
    let over = |s: &AppStatus| {
        let problem = of(s, 1).and_then(|r| r.problem.as_ref());
        problem.is_some_and(|p| !p.transient) && is_ready(s).len() == 1
    };
    let failed = stage.until("it has failed", over).await;
    let before = is_ready(&failed);
    assert_eq!(before.len(), 1);

    drop(kubelet);
    let retried = stage.target.retry(&stage.app, deployment(1)).await;
    retried.unwrap();
    let _kubelet = stage.kubelet(Fate::Ready {
        ip: "10.1.2.4".to_owned(),
    });
    let whole = stage.until("both are ready", |s| ready(s, 1) == 2).await;
    assert!(is_ready(&whole).contains(&before[0]));

    // What Daybook itself keeps from running is not tried in vain.
    release(&mut values, 2, 1);
    let service = values.services.get_mut(&web()).unwrap();
    let second = service.releases.get_mut(&deployment(2)).unwrap();
    second.image.repository = "local.daybook/shop/web".parse().unwrap();
    stage.apply(2, &values).await.unwrap();
    stage
        .until("it is not pullable", |s| of(s, 2).is_some())
        .await;
    let refused = stage.target.retry(&stage.app, deployment(2)).await;
    assert!(
        matches!(&refused, Err(TargetError::Refused(why)) if why.contains("is in no registry")),
        "{refused:?}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn fields_that_somebody_else_set_are_named_with_who_did() {
    let Some(stage) = Stage::new("conflict").await else {
        return;
    };
    let mut values = stage.values();
    release(&mut values, 1, 1);
    stage.apply(1, &values).await.unwrap();
    let workloads: Api<Deployment> = Api::namespaced(stage.client.clone(), &stage.namespace());
    let name = names::release(&web(), deployment(1));
    let params = PatchParams {
        field_manager: Some("somebody".to_owned()),
        ..PatchParams::default()
    };
    let patch = Patch::Merge(json!({ "spec": { "replicas": 5 } }));
    workloads.patch(&name, &params, &patch).await.unwrap();
    let refused = stage.apply(2, &values).await;
    let Err(TargetError::Refused(why)) = refused else {
        panic!("{refused:?}");
    };
    assert!(why.contains(".spec.replicas (somebody)"), "{why}");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_somebody_changes_is_said_field_by_field_and_defaults_are_not() {
    let Some(stage) = Stage::new("drift").await else {
        return;
    };
    let _kubelet = stage.kubelet(Fate::Ready {
        ip: "10.1.2.3".to_owned(),
    });
    let mut values = stage.values();
    release(&mut values, 1, 1);
    stage.apply(1, &values).await.unwrap();
    let whole = |s: &AppStatus| ready(s, 1) == 1 && of(s, 1).unwrap().problem.is_none();
    stage
        .until("it is ready, and nothing has drifted", whole)
        .await;
    let workloads: Api<Deployment> = Api::namespaced(stage.client.clone(), &stage.namespace());
    let name = names::release(&web(), deployment(1));
    let set = |deadline: i32, limit: i32| {
        let spec = json!({ "progressDeadlineSeconds": deadline, "minReadySeconds": limit });
        let (workloads, name) = (workloads.clone(), name.clone());
        async move {
            let patch = Patch::Merge(json!({ "spec": spec }));
            let params = PatchParams::default();
            workloads.patch(&name, &params, &patch).await.unwrap()
        }
    };
    let before = workloads.get(&name).await.unwrap().spec.unwrap();
    let deadline = before.progress_deadline_seconds.unwrap();
    set(deadline + 1, 1).await;
    let drifted = |s: &AppStatus| of(s, 1).is_some_and(|r| r.problem.is_some());
    let status = stage.until("it has drifted", drifted).await;
    let problem = of(&status, 1).unwrap().problem.clone().unwrap();
    assert_eq!(problem.reason, "Drift");
    // How long it has to be ready is nothing that was asked for.
    assert!(
        problem.message.ends_with(": .spec.progressDeadlineSeconds"),
        "{problem:?}"
    );
    set(deadline, 1).await;
    stage.until("it is as it is to be", whole).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_namespace_of_somebody_else_is_not_taken() {
    let Some(stage) = Stage::new("foreign").await else {
        return;
    };
    let spaces: Api<Namespace> = Api::all(stage.client.clone());
    let space = json!({ "metadata": { "name": stage.namespace() } });
    let space: Namespace = serde_json::from_value(space).unwrap();
    spaces.create(&PostParams::default(), &space).await.unwrap();
    let mut values = stage.values();
    release(&mut values, 1, 1);
    let refused = stage.apply(1, &values).await;
    let Err(TargetError::Refused(why)) = refused else {
        panic!("{refused:?}");
    };
    assert!(why.contains("is not Daybook's"), "{why}");
    let pods: Api<Pod> = Api::namespaced(stage.client.clone(), &stage.namespace());
    assert!(
        pods.list(&ListParams::default())
            .await
            .unwrap()
            .items
            .is_empty()
    );

    // Nor is it taken away with an environment of that name.
    let nothing = EnvironmentValues {
        ephemeral: true,
        ..stage.values()
    };
    stage.apply(2, &nothing).await.unwrap();
    let there = spaces.get(&stage.namespace()).await.unwrap();
    assert!(there.metadata.deletion_timestamp.is_none());
}

#[tokio::test(flavor = "multi_thread")]
async fn secrets_that_cannot_be_read_for_a_while_stay_in_the_cluster() {
    let folder = tempfile::tempdir().unwrap();
    let secrets = SecretFolder::new(folder.path(), None);
    let Some(stage) = Stage::with("secretive", Arc::new(secrets.clone())).await else {
        return;
    };
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
    let service = values.services.get_mut(&web()).unwrap();
    let first = service.releases.get_mut(&deployment(1)).unwrap();
    first.secret_env.insert(id.name.clone(), reference);
    stage.apply(1, &values).await.unwrap();
    let kept: Api<Secret> = Api::namespaced(stage.client.clone(), &stage.namespace());
    let name = names::release(&web(), deployment(1));
    let before = kept.get(&name).await.unwrap();

    // The store cannot be read: each of its files is a folder.
    let files = std::fs::read_dir(folder.path()).unwrap();
    let files: Vec<_> = files.map(|f| f.unwrap().path()).collect();
    let away = |path: &Path| path.with_extension("away");
    for file in &files {
        std::fs::rename(file, away(file)).unwrap();
        std::fs::create_dir(file).unwrap();
    }
    release(&mut values, 2, 1);
    let refused = stage.apply(2, &values).await;
    assert!(
        matches!(refused, Err(TargetError::Unavailable(_))),
        "{refused:?}"
    );
    assert_eq!(kept.get(&name).await.unwrap().data, before.data);
    let status = stage.until("the rest is applied", |s| of(s, 2).is_some());
    let status = status.await;
    assert!(!status.is_whole);
    let problem = of(&status, 1).unwrap().problem.as_ref().unwrap();
    assert_eq!(problem.reason, "SecretMissing");

    for file in &files {
        std::fs::remove_dir(file).unwrap();
        std::fs::rename(away(file), file).unwrap();
    }
    stage.apply(2, &values).await.unwrap();
    let whole = stage.until("all is applied", |s| s.is_whole).await;
    assert_eq!(whole.revision, Some(commit(2)));
}

#[tokio::test(flavor = "multi_thread")]
async fn another_process_sees_what_the_first_one_left() {
    let Some(stage) = Stage::new("taken-over").await else {
        return;
    };
    let _kubelet = stage.kubelet(Fate::Ready {
        ip: "10.1.2.3".to_owned(),
    });
    let mut values = stage.values();
    release(&mut values, 1, 1);
    stage.apply(1, &values).await.unwrap();
    stage.until("it is ready", |s| ready(s, 1) == 1).await;
    let other = KubernetesCluster::open(options(stage.client.clone()))
        .await
        .unwrap();
    let mut watch = other.watch(&stage.app);
    // Before it was told what is asked for it claims nothing.
    assert_eq!(watch.borrow().revision, None);
    other.apply(&stage.app, &commit(1), &values).await.unwrap();
    let is = |s: &AppStatus| s.revision == Some(commit(1)) && ready(s, 1) == 1;
    assert!(wait(&mut watch, is).await.is_some());
}
