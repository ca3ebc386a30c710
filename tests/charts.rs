//! Helm charts as versions: taken, kept and shown as what they are; rendered for Kubernetes, and not
//! for clusters that run images only.

use std::path::{Path, PathBuf};
use std::process::Command;

use daybook_testkit::kubernetes::argocd::helm_program;
use serde_json::{Value, json};

use crate::kubernetes::Stage;
use crate::support::{Server, Settings, application, until};

const CHART: &str = "https://charts.example.com/stable/web";
const INSTANCE: &str = "shop.production.web";

#[test]
fn a_chart_is_a_version_that_local_clusters_refuse() {
    let server = Server::start(Settings::default());
    let source = application("--text one");
    server.define("shop", "web", &source, &[]);
    let live = server.deploy(INSTANCE, &[]);

    let flags = ["--chart", CHART, "--chart-version", "1.4.2"];
    let done = server.cli(&[&["deploy", INSTANCE][..], &flags].concat());
    assert_eq!(done.code, 6, "{done:?}");
    assert!(
        done.stdout.contains("local-a cannot render charts"),
        "{done:?}"
    );
    assert!(done.stdout.contains("deploy an image"), "{done:?}");

    let id = server.begin(INSTANCE, &flags);
    assert_eq!(server.wait_for_failure(&id), "charts_not_supported");
    let text = format!("{CHART}:1.4.2");
    let detail = server.deployment(&id);
    assert_eq!(detail["version"], text.as_str());
    let typed = json!({ "helm": { "chart": CHART, "version": "1.4.2" } });
    assert_eq!(detail["snapshot"]["version"], typed);
    assert_eq!(server.history(&id)["version"], text.as_str());
    assert!(
        server
            .ok(&["history", "--project", "shop"])
            .stdout
            .contains(&text)
    );
    let list = server.read(&format!("/api/v1/deployments?version={CHART}:1.4.2"));
    assert_eq!(list["deployments"].as_array().unwrap().len(), 2);
    // Its chart is what is deployed once more.
    let again = server.json(&["redeploy", &id, "--detach"])["id"].clone();
    let again = again.as_str().unwrap();
    assert_eq!(server.wait_for_failure(again), "charts_not_supported");
    assert_eq!(server.deployment(again)["snapshot"]["version"], typed);

    // What is no chart, or no version of one, leaves nothing behind.
    let events = server.events().len();
    for (chart, version, code, said) in [
        (
            "http://charts.example.com/web",
            "1.4.2",
            "invalid_chart",
            "must begin with https",
        ),
        (
            "https://ada:canary@example.com/web",
            "1.4.2",
            "invalid_chart",
            "credentials",
        ),
        (CHART, "^1.4", "invalid_chart_version", "one exact version"),
    ] {
        let flags = ["--chart", chart, "--chart-version", version];
        let done = server.cli(&[&["deploy", INSTANCE][..], &flags].concat());
        assert_eq!(done.code, 2);
        assert!(done.stderr.contains(said), "{done:?}");
        assert!(!done.stderr.contains("canary"), "{done:?}");
        let body = json!({ "instance_id": INSTANCE, "chart": chart, "chart_version": version });
        let answer = server.post("/api/v1/deployments", &body, None);
        assert_eq!(answer.json()["code"], code, "{answer:?}");
    }
    assert_eq!(server.cli(&["deploy", INSTANCE, "--chart", CHART]).code, 2);
    for (body, code) in [
        (json!({ "chart": CHART }), "chart_incomplete"),
        (json!({ "chart_version": "1.4.2" }), "chart_incomplete"),
        (
            json!({ "chart": CHART, "chart_version": "1.4.2", "git_ref": "main" }),
            "version_ambiguous",
        ),
    ] {
        let mut body = body;
        body["instance_id"] = INSTANCE.into();
        let answer = server.post("/api/v1/deployments", &body, None);
        assert!((400..500).contains(&answer.status), "{answer:?}");
        assert_eq!(answer.json()["code"], code);
    }
    assert_eq!(server.events().len(), events);
    assert_eq!(server.deployment(&live)["main"], true);
    server.check_replay();
}

/// A chart of somebody else: a Deployment and its Service.
const SITE: &str = r#"
apiVersion: apps/v1
kind: Deployment
metadata:
  name: {{ .Release.Name }}-site
  labels: { app.kubernetes.io/managed-by: {{ .Release.Service }} }
spec:
  replicas: {{ .Values.replicas }}
  selector: { matchLabels: { app: {{ .Release.Name }} } }
  template:
    metadata: { labels: { app: {{ .Release.Name }} } }
    spec:
      containers:
        - name: site
          image: example.com/site:{{ .Chart.Version }}
          ports: [{ name: web, containerPort: {{ .Values.port }} }]
          {{- with .Values.secret }}
          envFrom: [{ secretRef: { name: {{ . }} } }]
          {{- end }}
---
apiVersion: v1
kind: Service
metadata: { name: {{ .Release.Name }}-site }
spec:
  selector: { app: {{ .Release.Name }} }
  ports: [{ port: 8080, targetPort: web }]
{{- if .Values.ingress }}
---
apiVersion: networking.k8s.io/v1
kind: Ingress
metadata: { name: {{ .Release.Name }}-site }
spec: { defaultBackend: { service: { name: site, port: { number: 80 } } } }
{{- end }}
{{- if .Values.random }}
---
apiVersion: v1
kind: ConfigMap
metadata: { name: {{ .Release.Name }}-random }
data: { word: {{ randAlphaNum 16 | quote }} }
{{- end }}
"#;

/// Packs a version of the chart and pushes it to a registry.
fn publish(helm: &Path, registry: &str, version: &str) {
    let folder = tempfile::tempdir().unwrap();
    let chart = folder.path().join("site");
    std::fs::create_dir_all(chart.join("templates")).unwrap();
    for (path, content) in [
        (
            "Chart.yaml",
            format!("apiVersion: v2\nname: site\nversion: {version}\n"),
        ),
        (
            "values.yaml",
            "replicas: 1\nport: 80\nsecret: \"\"\ningress: false\nrandom: false\n".to_owned(),
        ),
        ("templates/site.yaml", SITE.to_owned()),
    ] {
        std::fs::write(chart.join(path), content).unwrap();
    }
    let archive = format!("site-{version}.tgz");
    let to = format!("oci://{registry}/charts");
    for arguments in [
        &["package", "site"][..],
        &["push", archive.as_str(), to.as_str(), "--plain-http"],
    ] {
        let mut command = Command::new(helm);
        command.args(arguments).current_dir(folder.path());
        for kind in ["CACHE", "CONFIG", "DATA"] {
            command.env(format!("HELM_{kind}_HOME"), folder.path().join(kind));
        }
        let done = command.output().unwrap();
        let said = String::from_utf8_lossy(&done.stderr);
        assert!(done.status.success(), "{arguments:?}: {said}");
    }
}

/// A server with a Kubernetes cluster, and the chart in a registry.
fn with_chart(project: &str) -> Option<(Stage, PathBuf, String)> {
    let stage = Stage::start(project)?;
    let helm = helm_program()?;
    let chart = format!("oci://{}/charts/site", stage.registry.host());
    Some((stage, helm, chart))
}

/// Defines the service with what its chart is rendered with.
fn define(server: &Server, project: &str, values: &Value) {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("service.json");
    let spec = json!({ "run": { "health": { "deadline_seconds": 20 }, "chart_values": values } });
    std::fs::write(&file, spec.to_string()).unwrap();
    let file = file.to_str().unwrap();
    server.ok(&["service", "create", project, "site", "--file", file]);
}

#[test]
fn a_chart_is_deployed_switched_and_rolled_back_on_kubernetes() {
    let Some((stage, helm, chart)) = with_chart("charted") else {
        return;
    };
    publish(&helm, &stage.registry.host(), "1.0.0");
    publish(&helm, &stage.registry.host(), "1.1.0");
    let settings = stage.settings();
    let settings = settings.env("DAYBOOK_HELM", helm.to_str().unwrap());
    let server = Server::start(settings);
    server.ok(&["project", "create", "charted"]);
    let env = ["env", "create", "charted", "production", "--live"];
    server.ok(&[&env[..], &["--cluster", "oslo"]].concat());
    let port = stage.app.addr.port();
    define(&server, "charted", &json!({ "port": port }));
    let (instance, host) = ("charted.production.site", "site.charted.localhost");
    let version =
        |version: &'static str| ["--chart", &chart, "--chart-version", version].map(str::to_owned);
    let deploy = |of: &'static str| {
        let flags = version(of);
        let flags: Vec<_> = flags.iter().map(String::as_str).collect();
        server.deploy(instance, &flags)
    };

    let first = deploy("1.0.0");
    assert_eq!(server.get_from(host, "/", &first).body, "from-a-pod");
    let detail = server.deployment(&first);
    let digest = detail["chart"]["digest"].as_str().unwrap().to_owned();
    assert!(digest.starts_with("sha256:"), "{detail}");
    assert_eq!(detail["image"], Value::Null);
    assert_eq!(
        detail["readiness"]["build"]["reason"], "ChartGiven",
        "{detail}"
    );
    assert!(server.ok(&["status", &first]).stdout.contains(&digest));
    let kinds = server.kinds(&first);
    assert!(
        kinds.contains(&"deployment.chart_pinned.v1".to_owned()),
        "{kinds:?}"
    );
    // How many run is for the chart to say.
    let scaled = server.cli(&["scale", instance, "--replicas", "3"]);
    assert_ne!(scaled.code, 0, "{scaled:?}");

    // The next version runs beside it and takes the traffic; the way back is the other one's.
    let second = deploy("1.1.0");
    server.get_from(host, "/", &second);
    assert_ne!(
        server.deployment(&second)["chart"]["digest"],
        digest.as_str()
    );
    assert_eq!(server.deployment(&first)["state"], "started");
    server.ok(&["rollback", instance]);
    server.get_from(host, "/", &first);

    // What was stopped runs nothing and can be started; what is repeated is the same archive.
    server.ok(&["stop", &second]);
    server.wait_for(&second, "stopped");
    server.ok(&["start", &second]);
    server.wait_for(&second, "started");
    let again = server.json(&["redeploy", &first, "--detach"])["id"].clone();
    let again = again.as_str().unwrap().to_owned();
    server.wait_for(&again, "started");
    // It was rolled back: nothing takes over by itself.
    server.ok(&["mark-main", &again]);
    assert_eq!(
        server.deployment(&again)["chart"]["digest"],
        digest.as_str()
    );
    server.get_from(host, "/", &again);

    // A version whose objects are refused leaves nothing, and what was live stays so.
    define(
        &server,
        "charted",
        &json!({ "port": port, "ingress": true }),
    );
    let flags = version("1.1.0");
    let flags: Vec<_> = flags.iter().map(String::as_str).collect();
    let refused = server.begin(instance, &flags);
    assert_eq!(server.wait_for_failure(&refused), "chart_routes");
    server.get_from(host, "/", &again);

    for id in [&first, &second, &again] {
        server.ok(&["stop", id]);
        server.wait_for(id, "stopped");
        server.ok(&["terminate", id]);
        server.wait_for(id, "terminated");
    }
    until("nothing is left", || {
        let left = stage
            .cluster
            .count::<k8s_openapi::api::apps::v1::Deployment>("charted--production")
            + stage
                .cluster
                .count::<k8s_openapi::api::core::v1::Service>("charted--production");
        (left == 0).then_some(())
    });
    server.check_replay();
}

#[test]
fn what_people_allow_of_a_chart_is_what_was_rendered() {
    let Some((stage, helm, chart)) = with_chart("allowed") else {
        return;
    };
    publish(&helm, &stage.registry.host(), "1.0.0");
    let settings = stage.settings();
    let settings = settings.env("DAYBOOK_HELM", helm.to_str().unwrap());
    let server = Server::start(settings);
    server.ok(&["project", "create", "allowed"]);
    let env = ["env", "create", "allowed", "production", "--approvals", "1"];
    server.ok(&[&env[..], &["--cluster", "oslo"]].concat());
    let port = stage.app.addr.port();
    let flags = ["--chart", &chart, "--chart-version", "1.0.0"];
    let allowed = |values: &Value| {
        define(&server, "allowed", values);
        let id = server.begin("allowed.production.site", &flags);
        server.wait_for(&id, "awaiting_approval");
        let approval = server.read(&format!("/api/v1/deployments/{id}/approval"));
        let rendered = approval["plan"]["values"]["chart.objects"]["after"].as_str();
        assert!(
            rendered.is_some_and(|d| d.starts_with("sha256:")),
            "{approval}"
        );
        let done = server.cli(&["approvals", "approve", &id, "--actor", "bob"]);
        assert_eq!(done.code, 0, "{done:?}");
        id
    };
    // What makes up a word of its own is never what somebody has looked at.
    let other = allowed(&json!({ "port": port, "random": true }));
    assert_eq!(server.wait_for_failure(&other), "chart_not_deterministic");
    let same = allowed(&json!({ "port": port }));
    server.wait_for(&same, "started");
    server.check_replay();
}

#[test]
fn a_chart_without_helm_says_what_helps() {
    let Some((stage, helm, chart)) = with_chart("helmless") else {
        return;
    };
    publish(&helm, &stage.registry.host(), "1.0.0");
    let settings = stage.settings().env("DAYBOOK_HELM", "/nonexistent/helm");
    let server = Server::start(settings);
    server.ok(&["project", "create", "helmless"]);
    server.ok(&[
        "env",
        "create",
        "helmless",
        "production",
        "--cluster",
        "oslo",
    ]);
    define(&server, "helmless", &json!({}));
    let flags = ["--chart", &chart, "--chart-version", "1.0.0"];
    let id = server.begin("helmless.production.site", &flags);
    assert_eq!(server.wait_for_failure(&id), "helm_missing");
    let told = server.ok(&["status", &id]).stdout;
    assert!(told.contains("DAYBOOK_HELM"), "{told}");
    server.check_replay();
}
