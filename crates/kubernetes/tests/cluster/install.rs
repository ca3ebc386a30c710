//! The chart of Daybook itself: what it renders, that an API server takes it, and that the rights
//! that it asks for are enough.

use std::process::Command;

use daybook_events::spec::Autoscaling;
use daybook_kubernetes::builds::{BuildOptions, Tool};
use daybook_testkit::kubernetes::argocd::helm_program;
use kube::core::{ApiResource, DynamicObject, GroupVersionKind};
use serde_json::Value;

use super::*;

const NAMESPACE: &str = "daybook-install";

/// With everything that can be asked for.
const ALL: [&str; 11] = [
    "image.repository=registry.example.com/daybook",
    "image.tag=0.1.0",
    "nats.server.enabled=true",
    "cluster.gateway=edge/public",
    "cluster.argocd.namespace=argocd-install",
    "kubeconfigSecret=clusters",
    "imagePrefix=registry.example.com/team",
    "builds.builder=buildkit",
    "builds.namespace=builds-install",
    "builds.registrySecret=push",
    "builds.gitSecret=fetch",
];

fn template(values: &[&str]) -> Option<Result<String, String>> {
    let helm = helm_program()?;
    let dir = tempfile::tempdir().unwrap();
    let mut command = Command::new(helm);
    command.args(["template", "daybook", "--namespace", NAMESPACE]);
    for value in values {
        command.args(["--set", value]);
    }
    command.arg(concat!(env!("CARGO_MANIFEST_DIR"), "/../../charts/daybook"));
    for folder in ["CACHE", "CONFIG", "DATA"] {
        command.env(format!("HELM_{folder}_HOME"), dir.path().join(folder));
    }
    let output = command.output().unwrap();
    let text = |bytes| String::from_utf8(bytes).unwrap();
    Some(match output.status.success() {
        true => Ok(text(output.stdout)),
        false => Err(text(output.stderr)),
    })
}

fn objects_of(rendered: &str) -> Vec<Value> {
    let parts = rendered.split("---\n").filter(|part| {
        let mut lines = part.lines();
        lines.any(|line| !line.is_empty() && !line.starts_with('#'))
    });
    let parsed =
        parts.map(|part| serde_saphyr::from_str(part).unwrap_or_else(|e| panic!("{e}:\n{part}")));
    parsed.collect()
}

#[test]
fn the_chart_renders_what_it_did() {
    let Some(rendered) = template(&ALL) else {
        return;
    };
    let golden = concat!(
        env!("CARGO_MANIFEST_DIR"),
        "/tests/golden/daybook-chart.yaml"
    );
    let expected = std::fs::read_to_string(golden).unwrap_or_default();
    let rendered = rendered.unwrap();
    if rendered != expected {
        let new = std::path::Path::new(golden).with_extension("yaml.new");
        std::fs::write(&new, rendered).unwrap();
        panic!("the chart renders otherwise; what it renders is in {new:?}: look, and rename it");
    }
}

#[test]
fn what_the_chart_cannot_do_without_is_asked_for() {
    let needed = [
        (vec![], "where is the image of Daybook?"),
        (vec![ALL[0]], "give a NATS of your own"),
        (
            vec![ALL[0], ALL[2], "cluster.enabled=false"],
            "set cluster.enabled, or name clusters",
        ),
        (
            vec![ALL[0], ALL[2], ALL[7]],
            "give imagePrefix, a registry that the builds can push to",
        ),
        (
            vec![
                ALL[0],
                ALL[2],
                ALL[6],
                ALL[7],
                "builds.namespace=daybook-install",
            ],
            "one of their own",
        ),
    ];
    for (values, said) in needed {
        let Some(rendered) = template(&values) else {
            return;
        };
        let why = rendered.unwrap_err();
        assert!(why.contains(said), "{why}");
    }
}

#[test]
fn rights_for_builds_are_given_only_where_there_are_some() {
    let Some(rendered) = template(&[ALL[0], ALL[2], ALL[6]]) else {
        return;
    };
    let rendered = rendered.unwrap();
    assert!(!rendered.contains("jobs") && !rendered.contains("DAYBOOK_BUILD"));
    // Those of another cluster are made there.
    let there = [
        ALL[0],
        ALL[2],
        ALL[5],
        ALL[6],
        ALL[7],
        "clusters={oslo}",
        "builds.cluster=oslo",
    ];
    let rendered = template(&there).unwrap().unwrap();
    assert!(!rendered.contains("jobs") && rendered.contains("DAYBOOK_BUILD_CLUSTER"));
}

#[tokio::test(flavor = "multi_thread")]
async fn an_api_server_takes_the_chart_and_its_rights_are_enough() {
    let (Some(rendered), Some(plane)) = (
        template(&ALL),
        tokio::task::spawn_blocking(ControlPlane::shared)
            .await
            .unwrap(),
    ) else {
        return;
    };
    let admin = plane.client().await;
    let spaces: Api<Namespace> = Api::all(admin.clone());
    for name in [NAMESPACE, "argocd-install"] {
        let space = json!({ "metadata": { "name": name } });
        let space: Namespace = serde_json::from_value(space).unwrap();
        spaces.create(&PostParams::default(), &space).await.unwrap();
    }
    for object in objects_of(&rendered.unwrap()) {
        let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        let (api_version, kind) = (text(&object["apiVersion"]), text(&object["kind"]));
        let (group, version) = api_version.split_once('/').unwrap_or(("", &api_version));
        let resource = ApiResource::from_gvk(&GroupVersionKind::gvk(group, version, &kind));
        let api: Api<DynamicObject> = match &object["metadata"]["namespace"] {
            Value::String(space) => Api::namespaced_with(admin.clone(), space, &resource),
            _ => Api::all_with(admin.clone(), &resource),
        };
        let name = text(&object["metadata"]["name"]);
        let params = PatchParams::apply("helm").validation_strict();
        let patch = Patch::Apply(&object);
        // Only what gives rights is needed for more than being looked at.
        let gives = kind.contains("Role") || kind == "Namespace";
        let params = match gives {
            true => params,
            false => params.dry_run(),
        };
        let taken = api.patch(&name, &params, &patch).await;
        taken.unwrap_or_else(|e| panic!("{kind} {name}: {e}"));
    }

    let config = kube::config::Kubeconfig::read_from(plane.kubeconfig()).unwrap();
    let all = kube::config::KubeConfigOptions::default();
    let config = kube::Config::from_custom_kubeconfig(config, &all).await;
    let mut config = config.unwrap();
    config.auth_info.impersonate = Some(format!("system:serviceaccount:{NAMESPACE}:daybook"));
    let limited = Client::try_from(config).unwrap();
    // Rights count a moment after they were given.
    let jobs: Api<k8s_openapi::api::batch::v1::Job> =
        Api::namespaced(limited.clone(), "builds-install");
    let namespaces: Api<Namespace> = Api::all(limited.clone());
    builds::until("its rights count", || async {
        jobs.list(&ListParams::default()).await.ok()?;
        namespaces.get_opt(NAMESPACE).await.ok()
    })
    .await;
    let mut builds = BuildOptions::new(
        "oslo".parse().unwrap(),
        limited.clone(),
        "builds-install",
        Tool::BuildKit,
    );
    builds.start_within = Duration::from_secs(1);
    builds::a_build_with_the_rights_of_an_installation(builds, admin.clone()).await;
    let stage = Stage::of("installed", |options| options.client = limited).await;
    let stage = stage.unwrap();
    let unready = Fate::Unready("HTTP probe failed with statuscode: 500".to_owned());
    let kubelet = Kubelet::start(admin.clone(), Some(&stage.namespace()), move |_| {
        unready.clone()
    });
    let mut values = stage.values();
    release(&mut values, 1, 1);
    let service = values.services.get_mut(&web()).unwrap();
    let first = service.releases.get_mut(&deployment(1)).unwrap();
    first.run.autoscaling = Some(Autoscaling {
        max: 2,
        cpu_percent: 80,
    });
    let volume = serde_json::from_value(json!({ "path": "/data" })).unwrap();
    first.run.volumes.insert("data".parse().unwrap(), volume);
    stage.apply(1, &values).await.unwrap();
    let warned = |s: &AppStatus| of(s, 1).is_some_and(|r| r.problem.is_some());
    stage.until("it is seen not to be ready", warned).await;
    drop(kubelet);
    stage.target.retry(&stage.app, deployment(1)).await.unwrap();
    let _kubelet = Kubelet::start(admin, Some(&stage.namespace()), |_| Fate::Ready {
        ip: "10.1.2.3".to_owned(),
    });
    stage.until("it is ready", |s| ready(s, 1) == 1).await;
    stage.apply(2, &stage.values()).await.unwrap();
    stage.until("it is gone", |s| s.releases.is_empty()).await;
    stage.target.remove_volumes(&stage.app).await.unwrap();
    volumes::goes(&stage, volumes::DATA).await;
    assert_eq!(stage.target.trouble(), None);
}
