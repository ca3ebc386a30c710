//! What Argo CD's application controller does with Applications, without Argo CD.
//!
//! The shapes are those that Argo CD 3.5 writes: the status with `sync`, `operationState`,
//! `conditions`, `resources` (without the health of each, as by default) and the `health` of all,
//! the tracking annotation on what it applies, the refresh annotation and the operation that it
//! takes away, the finalizer. The health stays what it is right after a sync.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use k8s_openapi::jiff::Timestamp;
use kube::api::{DeleteParams, ListParams, Patch, PatchParams};
use kube::core::{ApiResource, DynamicObject, GroupVersionKind};
use kube::{Api, Client, ResourceExt};
use serde_json::{Value, json};
use tokio::task::JoinHandle;

use crate::nats::tools_folder;

const TRACKING: &str = "argocd.argoproj.io/tracking-id";
const REFRESH: &str = "argocd.argoproj.io/refresh";
const SYNC_OPTIONS: &str = "argocd.argoproj.io/sync-options";
/// Between two looks at the Applications.
const EVERY: Duration = Duration::from_millis(100);

/// Makes the objects of an Application, or says why that is not possible.
type Render = dyn Fn(&Value) -> Result<Vec<Value>, String> + Send + Sync;

/// Stands in for Argo CD in one namespace, until it is dropped.
#[derive(Debug)]
pub struct ArgoCd(JoinHandle<()>);

impl Drop for ArgoCd {
    fn drop(&mut self) {
        self.0.abort();
    }
}

impl ArgoCd {
    /// Syncs the Applications of a namespace: those that are new, have changed, or are asked to be
    /// refreshed or synced. `render` makes their objects.
    pub fn start(
        client: Client,
        namespace: &str,
        render: impl Fn(&Value) -> Result<Vec<Value>, String> + Send + Sync + 'static,
    ) -> Self {
        Self::with(client, namespace, render, false)
    }

    /// The same, which also sets back what others change of what it applied, where an Application
    /// asks for that (`selfHeal`).
    pub fn start_healing(
        client: Client,
        namespace: &str,
        render: impl Fn(&Value) -> Result<Vec<Value>, String> + Send + Sync + 'static,
    ) -> Self {
        Self::with(client, namespace, render, true)
    }

    fn with(
        client: Client,
        namespace: &str,
        render: impl Fn(&Value) -> Result<Vec<Value>, String> + Send + Sync + 'static,
        heals: bool,
    ) -> Self {
        let controller = Controller {
            applications: Api::namespaced_with(
                client.clone(),
                namespace,
                &resource("argoproj.io/v1alpha1", "Application"),
            ),
            client,
            render: Arc::new(render),
            heals,
            rendered: Mutex::default(),
        };
        Self(tokio::spawn(async move {
            loop {
                let all = controller.applications.list(&ListParams::default()).await;
                for application in all.into_iter().flatten() {
                    // What could not be done is done at the next look.
                    let _ = controller.reconcile(&application).await;
                }
                tokio::time::sleep(EVERY).await;
            }
        }))
    }
}

struct Controller {
    client: Client,
    applications: Api<DynamicObject>,
    render: Arc<Render>,
    heals: bool,
    /// By the name of the Application: of which source, and what it made.
    rendered: Mutex<HashMap<String, (Value, Vec<Value>)>>,
}

impl Controller {
    async fn reconcile(&self, application: &DynamicObject) -> kube::Result<()> {
        let name = application.name_any();
        let data = &application.data;
        let namespace = data["spec"]["destination"]["namespace"].as_str();
        let namespace = namespace.unwrap_or_default();
        if application.metadata.deletion_timestamp.is_some() {
            self.prune(&name, namespace, &[]).await?;
            return self
                .write(&name, json!({ "metadata": { "finalizers": null } }))
                .await;
        }
        let revision = &data["spec"]["source"]["targetRevision"];
        let compared = &data["status"]["sync"]["comparedTo"]["source"];
        let asked = application.annotations().contains_key(REFRESH) || !data["operation"].is_null();
        if *compared == data["spec"]["source"] && !asked {
            return self.heal(&name, data).await;
        }
        self.write(
            &name,
            json!({ "metadata": { "annotations": { REFRESH: null } }, "operation": null }),
        )
        .await?;
        let (render, whole) = (self.render.clone(), data.clone());
        let rendered = tokio::task::spawn_blocking(move || render(&whole)).await;
        let sync = |status: &str| {
            json!({
                "status": status,
                "revision": revision,
                "comparedTo": {
                    "source": data["spec"]["source"],
                    "destination": data["spec"]["destination"],
                },
            })
        };
        let objects = match rendered.expect("it does not panic") {
            Ok(objects) => objects,
            Err(why) => {
                let condition = json!({
                    "type": "ComparisonError",
                    "message": format!("Failed to load target state: {why}"),
                    "lastTransitionTime": now(),
                });
                let status = json!({ "sync": sync("Unknown"), "conditions": [condition] });
                return self.write(&name, json!({ "status": status })).await;
            }
        };
        let begun = now();
        let operation = |phase: &str, message: &str, results: &[Value]| {
            json!({
                "operation": { "sync": { "revision": revision, "prune": true } },
                "phase": phase,
                "message": message,
                "startedAt": begun,
                "syncResult": {
                    "revision": revision,
                    "source": data["spec"]["source"],
                    "resources": results,
                },
            })
        };
        let running = json!({
            "sync": sync("OutOfSync"),
            "conditions": null,
            "operationState": operation("Running", "", &[]),
        });
        self.write(&name, json!({ "status": running })).await?;
        let made = (data["spec"]["source"].clone(), objects.clone());
        self.rendered
            .lock()
            .expect("no panic")
            .insert(name.clone(), made);
        let mut results = Vec::new();
        for object in &objects {
            results.push(self.apply(&name, &data["spec"], object).await);
        }
        self.prune(&name, namespace, &objects).await?;
        let failed = results.iter().any(|r| r["status"] == "SyncFailed");
        let resources = objects.iter().zip(&results).map(|(object, result)| {
            let api_version = object["apiVersion"].as_str().unwrap_or_default();
            let (group, version) = api_version.split_once('/').unwrap_or(("", api_version));
            let synced = result["status"] == "Synced";
            json!({
                "group": group,
                "version": version,
                "kind": object["kind"],
                "namespace": object["metadata"]["namespace"].as_str().unwrap_or(namespace),
                "name": object["metadata"]["name"],
                "status": if synced { "Synced" } else { "OutOfSync" },
            })
        });
        let resources: Vec<Value> = resources.collect();
        let mut status = if failed {
            let message = "one or more objects failed to apply";
            json!({
                "sync": sync("OutOfSync"),
                "operationState": operation("Failed", message, &results),
            })
        } else {
            json!({
                "sync": sync("Synced"),
                "operationState": operation("Succeeded", "successfully synced", &results),
                "health": { "status": "Progressing", "lastTransitionTime": now() },
            })
        };
        status["resources"] = json!(resources);
        status["resourceHealthSource"] = json!("appTree");
        self.write(&name, json!({ "status": status })).await
    }

    /// Sets back what others have changed or taken away since an Application was synced.
    async fn heal(&self, name: &str, data: &Value) -> kube::Result<()> {
        let is_asked = data["spec"]["syncPolicy"]["automated"]["selfHeal"] == true;
        if !self.heals || !is_asked || data["status"]["sync"]["status"] != "Synced" {
            return Ok(());
        }
        let made = self.rendered.lock().expect("no panic").get(name).cloned();
        let made = made.filter(|(source, _)| *source == data["spec"]["source"]);
        for object in made.into_iter().flat_map(|(_, objects)| objects) {
            let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
            let resource = resource(&text(&object["apiVersion"]), &text(&object["kind"]));
            let namespace = text(&object["metadata"]["namespace"]);
            let api: Api<DynamicObject> =
                Api::namespaced_with(self.client.clone(), &namespace, &resource);
            let live = api.get_opt(&text(&object["metadata"]["name"])).await?;
            let is_so = live.is_some_and(|live| {
                let mut fields = ["spec", "data"].into_iter();
                fields.all(|field| is_in(&object[field], &live.data[field]))
            });
            if !is_so {
                self.apply(name, &data["spec"], &object).await;
            }
        }
        Ok(())
    }

    /// Applies an object, and says what came of it.
    async fn apply(&self, application: &str, spec: &Value, object: &Value) -> Value {
        let kind = object["kind"].as_str().unwrap_or_default();
        let name = object["metadata"]["name"].as_str().unwrap_or_default();
        let namespace = object["metadata"]["namespace"].as_str().unwrap_or_default();
        let api_version = object["apiVersion"].as_str().unwrap_or_default();
        let mut tracked = object.clone();
        tracked["metadata"]["annotations"][TRACKING] =
            json!(format!("{application}:{kind}:{namespace}/{name}"));
        let resource = resource(api_version, kind);
        let api: Api<DynamicObject> =
            Api::namespaced_with(self.client.clone(), namespace, &resource);
        let ignored = spec["ignoreDifferences"].as_array().into_iter().flatten();
        let is_of = |of: &&Value| of["name"].is_null() || of["name"] == name;
        let mut ignored = ignored.filter(|of| of["kind"] == kind).filter(is_of);
        let options = spec["syncPolicy"]["syncOptions"].as_array();
        let respects = options.is_some_and(|o| o.contains(&json!("RespectIgnoreDifferences=true")));
        if respects
            && ignored.any(|of| of["jsonPointers"] == json!(["/spec"]))
            && let Ok(Some(live)) = api.get_opt(name).await
        {
            tracked["spec"] = live.data["spec"].clone();
        }
        let params = PatchParams::apply("argocd-controller").force();
        let (status, message) = match api.patch(name, &params, &Patch::Apply(tracked)).await {
            Ok(_) => ("Synced", format!("{kind}/{name} configured")),
            Err(error) => ("SyncFailed", error.to_string()),
        };
        json!({
            "group": resource.group,
            "version": resource.version,
            "kind": kind,
            "namespace": namespace,
            "name": name,
            "status": status,
            "message": message,
            "syncPhase": "Sync",
        })
    }

    /// Removes what the Application made and no longer lists; with the Application, also what is
    /// otherwise not to be removed.
    async fn prune(&self, application: &str, space: &str, kept: &[Value]) -> kube::Result<()> {
        for (api_version, kind) in [
            ("apps/v1", "Deployment"),
            ("apps/v1", "StatefulSet"),
            ("v1", "ServiceAccount"),
            ("v1", "Service"),
            ("v1", "ConfigMap"),
            ("v1", "PersistentVolumeClaim"),
            ("autoscaling/v2", "HorizontalPodAutoscaler"),
            ("policy/v1", "PodDisruptionBudget"),
        ] {
            let resource = resource(api_version, kind);
            let api: Api<DynamicObject> =
                Api::namespaced_with(self.client.clone(), space, &resource);
            for object in api.list_metadata(&ListParams::default()).await? {
                let name = object.name_any();
                let tracked = object.annotations().get(TRACKING);
                let ours = tracked.is_some_and(|id| id.starts_with(&format!("{application}:")));
                let is_kept = kept
                    .iter()
                    .any(|k| k["kind"] == kind && k["metadata"]["name"] == name.as_str());
                let options = object.annotations().get(SYNC_OPTIONS);
                let never = match kept.is_empty() {
                    true => "Delete=false",
                    false => "Prune=false",
                };
                let stays = options.is_some_and(|o| o.split(',').any(|o| o == never));
                if ours && !is_kept && !stays {
                    api.delete(&name, &DeleteParams::background()).await?;
                }
            }
        }
        Ok(())
    }

    async fn write(&self, name: &str, patch: Value) -> kube::Result<()> {
        let params = PatchParams::default();
        let patch = Patch::Merge(patch);
        let patched = self.applications.patch(name, &params, &patch).await;
        patched.map(|_| ())
    }
}

/// Whether a value is as it is wanted, whatever else it has.
fn is_in(wanted: &Value, live: &Value) -> bool {
    match (wanted, live) {
        (Value::Object(wanted), live) => wanted.iter().all(|(key, value)| is_in(value, &live[key])),
        (Value::Array(wanted), Value::Array(live)) => {
            let mut pairs = wanted.iter().zip(live);
            wanted.len() == live.len() && pairs.all(|(wanted, live)| is_in(wanted, live))
        }
        (wanted, live) => wanted.is_null() || wanted == live,
    }
}

fn now() -> String {
    format!("{:.0}", Timestamp::now())
}

fn resource(api_version: &str, kind: &str) -> ApiResource {
    let (group, version) = api_version.split_once('/').unwrap_or(("", api_version));
    ApiResource::from_gvk(&GroupVersionKind::gvk(group, version, kind))
}

/// The helm that `DAYBOOK_HELM` names or `cargo xtask tools helm` built; none after saying so with
/// [`crate::left_out`].
pub fn helm_program() -> Option<PathBuf> {
    let set = std::env::var_os("DAYBOOK_HELM").map(PathBuf::from);
    let built = tools_folder().map(|folder| folder.join("bin/helm"));
    let found = set.or(built).filter(|path| path.is_file());
    if found.is_none() {
        crate::left_out("no helm: neither DAYBOOK_HELM nor `cargo xtask tools helm`");
    }
    found
}

/// Makes an Application's objects as Argo CD's repo server does: the repository is cloned from
/// where the Application says, at the commit that it says, and `helm template` is run in the path
/// that it says, with its value files and parameters.
pub fn helm(helm: PathBuf) -> impl Fn(&Value) -> Result<Vec<Value>, String> + Send + Sync {
    move |application| {
        let dir = tempfile::tempdir().map_err(|e| e.to_string())?;
        let source = &application["spec"]["source"];
        let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        let git = |arguments: &[&str]| run(Command::new("git").args(arguments), dir.path());
        git(&["clone", "--quiet", &text(&source["repoURL"]), "checkout"])?;
        let revision = text(&source["targetRevision"]);
        git(&["-C", "checkout", "checkout", "--quiet", &revision])?;
        let path = dir.path().join("checkout").join(text(&source["path"]));
        let mut command = Command::new(&helm);
        command
            .args(["template", &text(&source["helm"]["releaseName"]), "."])
            .arg("--namespace")
            .arg(text(&application["spec"]["destination"]["namespace"]));
        for file in source["helm"]["valueFiles"]
            .as_array()
            .into_iter()
            .flatten()
        {
            command.arg("--values").arg(text(file));
        }
        for set in source["helm"]["parameters"]
            .as_array()
            .into_iter()
            .flatten()
        {
            let set = format!("{}={}", text(&set["name"]), text(&set["value"]));
            command.arg("--set-string").arg(set);
        }
        for folder in ["cache", "config", "data"] {
            let name = format!("HELM_{}_HOME", folder.to_uppercase());
            command.env(name, dir.path().join(folder));
        }
        let rendered = run(&mut command, &path)?;
        let parts = rendered.split("\n---\n").filter(|part| {
            let mut lines = part.lines().map(str::trim);
            lines.any(|line| !line.is_empty() && !line.starts_with('#') && line != "---")
        });
        parts
            .map(|part| serde_saphyr::from_str(part).map_err(|e| format!("{e}: {part}")))
            .collect()
    }
}

fn run(command: &mut Command, dir: &Path) -> Result<String, String> {
    let output = command.current_dir(dir).output();
    let output = output.map_err(|e| e.to_string())?;
    if !output.status.success() {
        return Err(String::from_utf8_lossy(&output.stderr).into_owned());
    }
    String::from_utf8(output.stdout).map_err(|e| e.to_string())
}
