//! Charts by the real helm, from a real registry.

#![allow(clippy::unwrap_used)]

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use daybook_events::chart::{ChartReference, ChartValues, ChartVersion, PinnedChart};
use daybook_events::{DeploymentId, Digest, EnvironmentName, ProjectName, ServiceName};
use daybook_testkit::registry::{Registry, RegistryConfig};
use daybook_workers::charts::{ChartRelease, Charts, HelmCharts, HelmOptions};
use daybook_workers::ports::StepError;
use daybook_workers::source::SourcePolicy;
use serde_json::{Value, json};
use tempfile::TempDir;

/// What the chart makes unless a test has it make something else.
const WEB: &str = r#"
apiVersion: apps/v1
kind: Deployment
metadata:
  name: {{ .Release.Name }}-web
  annotations:
spec:
  replicas: {{ .Values.replicas }}
  selector: { matchLabels: { app: {{ .Release.Name }} } }
  template:
    metadata: { labels: { app: {{ .Release.Name }} } }
    spec:
      hostNetwork: {{ .Values.host }}
      containers:
        - name: web
          image: example.com/web:{{ .Chart.Version }}
          envFrom: [{ secretRef: { name: {{ .Values.secret | default .Release.Name | quote }} } }]
          ports: [{ name: http, containerPort: 8080 }]
      volumes:
        - name: files
          configMap: { name: {{ .Release.Name }}-files, defaultMode: 0644 }
---
apiVersion: v1
kind: ConfigMap
metadata: { name: {{ .Release.Name }}-files }
data:
  where: {{ printf "%s.%s" .Values.global.daybook.project .Release.Namespace }}
  document: |
    one
    ---
    two
"#;

struct Stage {
    helm: PathBuf,
    registry: Registry,
    folder: TempDir,
}

impl Stage {
    fn start() -> Option<Self> {
        let Some(helm) = std::env::var_os("DAYBOOK_HELM").map(PathBuf::from) else {
            daybook_testkit::left_out("no helm: DAYBOOK_HELM names none");
            return None;
        };
        Some(Self {
            helm,
            registry: Registry::start(RegistryConfig::default())?,
            folder: tempfile::tempdir().unwrap(),
        })
    }

    fn chart(&self) -> ChartReference {
        let text = format!("oci://{}/charts/web", self.registry.host());
        text.parse().unwrap()
    }

    /// Packs a chart of these files and publishes it. Returns the digest of its archive.
    fn publish(&self, version: &str, files: &[(&str, &str)]) -> Digest {
        let chart = self.folder.path().join("web");
        let _ = fs::remove_dir_all(&chart);
        let about = format!("apiVersion: v2\nname: web\nversion: {version}\n");
        let values = "replicas: 1\nsecret: \"\"\nhost: false\n";
        let own = [("Chart.yaml", about.as_str()), ("values.yaml", values)];
        for (path, content) in own.iter().chain(files) {
            let path = chart.join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, content).unwrap();
        }
        self.run(&["package", "web"]);
        let archive = format!("web-{version}.tgz");
        let repository = format!("oci://{}/charts", self.registry.host());
        self.run(&["push", &archive, &repository, "--plain-http"]);
        Digest::of(&fs::read(self.folder.path().join(archive)).unwrap())
    }

    fn run(&self, arguments: &[&str]) {
        let mut helm = Command::new(&self.helm);
        helm.args(arguments).current_dir(self.folder.path());
        for folder in ["CACHE", "CONFIG", "DATA"] {
            helm.env(
                format!("HELM_{folder}_HOME"),
                self.folder.path().join(folder),
            );
        }
        let done = helm.output().unwrap();
        let said = String::from_utf8_lossy(&done.stderr);
        assert!(done.status.success(), "{arguments:?}: {said}");
    }

    /// Charts with a folder of this name.
    fn charts(&self, folder: &str) -> HelmCharts {
        HelmCharts::new(HelmOptions {
            program: Some(self.helm.clone()),
            folder: self.folder.path().join(folder),
            never_on: ["local-a".parse().unwrap()].into(),
            namespace: |project, environment| format!("{project}--{environment}"),
            policy: SourcePolicy::trusting(),
        })
    }
}

fn version(text: &str) -> ChartVersion {
    text.parse().unwrap()
}

async fn render(
    charts: &HelmCharts,
    chart: &PinnedChart,
    values: Value,
) -> Result<Vec<Value>, StepError> {
    let project: ProjectName = "shop".parse().unwrap();
    let environment: EnvironmentName = "production".parse().unwrap();
    let service: ServiceName = "api".parse().unwrap();
    let values = ChartValues::new(values.as_object().unwrap());
    let release = ChartRelease {
        project: &project,
        environment: &environment,
        ephemeral: false,
        service: &service,
        deployment: DeploymentId(uuid::Uuid::from_u128(0x1234_5678)),
        values: Some(&values),
        port: 8080,
    };
    charts.render(chart, &release).await
}

fn only_file(folder: &Path, extension: &str) -> PathBuf {
    let entries = fs::read_dir(folder).unwrap().map(|e| e.unwrap().path());
    let mut files = entries.filter(|path| path.extension().is_some_and(|e| e == extension));
    let first = files.next().unwrap();
    assert_eq!(files.next(), None);
    first
}

#[tokio::test]
async fn a_chart_is_fetched_once_and_rendered_as_helm_would() {
    let Some(stage) = Stage::start() else {
        return;
    };
    let digest = stage.publish("1.4.2", &[("templates/web.yaml", WEB)]);
    let charts = stage.charts("charts");
    assert!(charts.run_on(&"oslo".parse().unwrap()));
    assert!(!charts.run_on(&"local-a".parse().unwrap()));
    let pinned = charts.pin(&stage.chart(), &version("1.4.2"), None).await;
    let pinned = pinned.unwrap();
    assert_eq!(pinned.digest, digest);
    assert_eq!(pinned.version, version("1.4.2"));

    let values = json!({ "replicas": 3, "secret": "$(DAYBOOK_RELEASE)" });
    let objects = render(&charts, &pinned, values.clone()).await.unwrap();
    let find = |kind: &str, name: &str| {
        let mut objects = objects.iter();
        let found = objects.find(|o| o["kind"] == kind && o["metadata"]["name"] == name);
        found.unwrap_or_else(|| panic!("{kind} {name}"))
    };
    let workload = find("Deployment", "api-12345678-web");
    assert_eq!(workload["spec"]["replicas"], 3);
    let pod = &workload["spec"]["template"]["spec"];
    assert_eq!(pod["volumes"][0]["configMap"]["defaultMode"], 0o644);
    let secret = &pod["containers"][0]["envFrom"][0]["secretRef"]["name"];
    assert_eq!(secret, "api-12345678");
    let data = &find("ConfigMap", "api-12345678-files")["data"];
    assert_eq!(data["where"], "shop.shop--production");
    assert_eq!(data["document"], "one\n---\ntwo\n");
    let about = &find("ConfigMap", "api-12345678-chart")["data"];
    assert_eq!(about["digest"], digest.as_str());
    assert_eq!(
        find("Service", "api-12345678")["spec"]["ports"][0]["port"],
        80
    );
    // The same each time.
    assert_eq!(render(&charts, &pinned, values).await.unwrap(), objects);
    let left = fs::read_dir(stage.folder.path().join("charts")).unwrap();
    let left = left.filter(|e| {
        let name = e.as_ref().unwrap().file_name();
        name.to_str().unwrap().starts_with("call-")
    });
    assert_eq!(left.count(), 0, "what a call needs goes with it");
}

#[tokio::test]
async fn a_version_that_is_published_anew_is_not_what_it_was() {
    let Some(mut stage) = Stage::start() else {
        return;
    };
    let chart = stage.chart();
    let asked = version("1.0.0");
    let before = stage.publish("1.0.0", &[("templates/web.yaml", WEB)]);
    let charts = stage.charts("charts");
    let pinned = charts.pin(&chart, &asked, None).await.unwrap();
    let other = WEB.replace("name: web", "name: other");
    let after = stage.publish("1.0.0", &[("templates/web.yaml", other.as_str())]);
    assert_ne!(before, after);

    // What is there stays what it was.
    let again = charts.pin(&chart, &asked, None).await.unwrap();
    assert_eq!(again, pinned);
    // Elsewhere it is another one, unless it is known what it was.
    let elsewhere = stage.charts("elsewhere");
    let refused = elsewhere
        .pin(&chart, &asked, Some(&before))
        .await
        .unwrap_err();
    assert_eq!(refused.code, "chart_changed");
    assert!(!refused.retryable);
    let refused = render(&elsewhere, &pinned, json!({})).await.unwrap_err();
    assert_eq!(refused.code, "chart_changed");
    let new = elsewhere.pin(&chart, &asked, None).await.unwrap();
    assert_eq!(new.digest, after);
    // What was broken on disk is fetched again, and is not what it was either.
    let folder = stage.folder.path().join("charts");
    fs::write(only_file(&folder, "tgz"), b"broken").unwrap();
    let refused = charts.pin(&chart, &asked, None).await.unwrap_err();
    assert_eq!(refused.code, "chart_changed");

    let missing = charts
        .pin(&chart, &version("9.9.9"), None)
        .await
        .unwrap_err();
    assert_eq!(missing.code, "chart_not_found", "{missing:?}");
    stage.registry.kill();
    let silent = charts
        .pin(&chart, &version("2.0.0"), None)
        .await
        .unwrap_err();
    assert_eq!(silent.code, "chart_unreachable", "{silent:?}");
    assert!(silent.retryable);
}

#[tokio::test]
async fn what_a_chart_makes_that_is_not_for_daybook_is_refused() {
    let Some(stage) = Stage::start() else {
        return;
    };
    let hook = "apiVersion: batch/v1\nkind: Job\nmetadata:\n  name: migrate\n  annotations:\n    \
                helm.sh/hook: pre-install\n";
    let test = hook.replace("pre-install", "test");
    let role =
        "apiVersion: rbac.authorization.k8s.io/v1\nkind: ClusterRole\nmetadata: { name: x }\n";
    let crd = "apiVersion: apiextensions.k8s.io/v1\nkind: CustomResourceDefinition\n\
               metadata: { name: things.example.com }\n";
    let asks = "{{ required \"a password is needed\" .Values.password }}\n";
    let web = ("templates/web.yaml", WEB);
    for (number, further, code) in [
        (1, ("templates/hook.yaml", hook), "chart_hooks"),
        (2, ("templates/role.yaml", role), "chart_cluster_scoped"),
        (3, ("crds/things.yaml", crd), "chart_crds"),
        (4, ("templates/asks.yaml", asks), "chart_render_failed"),
        (5, ("templates/test.yaml", test.as_str()), ""),
    ] {
        let name = format!("1.0.{number}");
        stage.publish(&name, &[web, further]);
        let charts = stage.charts("charts");
        let pinned = charts
            .pin(&stage.chart(), &version(&name), None)
            .await
            .unwrap();
        match render(&charts, &pinned, json!({})).await {
            Ok(_) => assert_eq!(code, "", "{further:?} is taken"),
            Err(error) => {
                assert_eq!(error.code, code, "{error:?}");
                assert!(!error.retryable && !error.remedy.is_empty());
            }
        }
    }
    let charts = stage.charts("charts");
    let pinned = charts.pin(&stage.chart(), &version("1.0.5"), None).await;
    let pinned = pinned.unwrap();
    for (values, code) in [
        (json!({ "host": true }), "chart_privileged"),
        (
            json!({ "secret": "api-1234abcd" }),
            "chart_foreign_reference",
        ),
    ] {
        let refused = render(&charts, &pinned, values).await.unwrap_err();
        assert_eq!(refused.code, code, "{refused:?}");
    }
    let nowhere = HelmCharts::new(HelmOptions {
        program: Some(stage.folder.path().join("no-helm")),
        folder: stage.folder.path().join("nowhere"),
        never_on: Default::default(),
        namespace: |_, _| String::new(),
        policy: SourcePolicy::trusting(),
    });
    let asked = version("1.0.5");
    let missing = nowhere.pin(&stage.chart(), &asked, None).await.unwrap_err();
    assert_eq!(missing.code, "helm_missing");
    assert!(missing.remedy.contains("DAYBOOK_HELM"), "{missing:?}");
}
