//! What a kubelet writes about pods, without running them.
//!
//! The shapes are those of the API reference (`PodStatus`), as kubelets of Kubernetes 1.33 to 1.36
//! fill them in.

use std::collections::HashSet;
use std::sync::Arc;

use futures_util::TryStreamExt as _;
use k8s_openapi::api::core::v1::{Event, Pod};
use k8s_openapi::jiff::Timestamp;
use kube::api::{Patch, PatchParams, PostParams};
use kube::runtime::watcher;
use kube::runtime::{WatchStreamExt as _, watcher::Event as Seen};
use kube::{Api, Client, ResourceExt};
use serde_json::{Value, json};
use tokio::task::JoinHandle;

/// What becomes of a pod.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Fate {
    /// It becomes ready and answers at this address.
    Ready {
        /// Its address.
        ip: String,
    },
    /// Its container is being made; nothing is the matter.
    Creating,
    /// It starts and never becomes ready; the probe says why.
    Unready(String),
    /// It runs and does not start; the startup probe says why.
    Unstarted(String),
    /// The container runtime cannot begin its program, and says why.
    Unstartable(String),
    /// Its image cannot be pulled.
    NoImage(String),
    /// It ends again and again with this exit code, and prints this. What of it the status says is
    /// for the policy of its container to say.
    Crashes(i32, String),
    /// It uses too much memory.
    OutOfMemory,
    /// No node takes it.
    Unschedulable(String),
    /// A ConfigMap or secret that it names is not there.
    NoConfig(String),
    /// It runs, as pods of Jobs do: nothing asks whether it is ready.
    Runs,
    /// It runs to an end, with an exit code, its reason, and a message.
    Ends {
        /// The exit code.
        code: i32,
        /// `Completed`, `Error`, `OOMKilled`.
        reason: &'static str,
        /// The termination message.
        message: String,
    },
    /// Its first container, which prepares, ends with this exit code and message.
    Unprepared(i32, String),
    /// A volume of it cannot be mounted.
    Unmounted(String),
    /// It was evicted from its node.
    Evicted(String),
    /// Nothing happens at all.
    Ignored,
}

/// Stands in for the kubelets and the scheduler of a cluster, until it is dropped.
#[derive(Debug)]
pub struct Kubelet(JoinHandle<()>);

impl Drop for Kubelet {
    fn drop(&mut self) {
        self.0.abort();
    }
}

impl Kubelet {
    /// Gives each pod of a namespace (or of all) its fate, once.
    pub fn start(
        client: Client,
        namespace: Option<&str>,
        fate: impl Fn(&Pod) -> Fate + Send + Sync + 'static,
    ) -> Self {
        let pods: Api<Pod> = match namespace {
            Some(namespace) => Api::namespaced(client.clone(), namespace),
            None => Api::all(client.clone()),
        };
        let fate: Arc<dyn Fn(&Pod) -> Fate + Send + Sync> = Arc::new(fate);
        Self(tokio::spawn(async move {
            let stream = watcher(pods, watcher::Config::default()).default_backoff();
            let mut stream = std::pin::pin!(stream);
            let mut met = HashSet::new();
            loop {
                let pod: Pod = match stream.try_next().await {
                    Ok(Some(Seen::Apply(pod) | Seen::InitApply(pod))) => pod,
                    Ok(Some(_)) => continue,
                    Ok(None) => return,
                    Err(_) => continue,
                };
                let new = pod.uid().is_some_and(|uid| met.insert(uid));
                if new && pod.metadata.deletion_timestamp.is_none() {
                    let fate = fate(&pod);
                    Self::play(&client, &pod, &fate).await;
                }
            }
        }))
    }

    /// Gives one pod a fate, now. A pod that is gone meanwhile is left alone.
    pub async fn play(client: &Client, pod: &Pod, fate: &Fate) {
        let (Some(namespace), name) = (pod.namespace(), pod.name_any()) else {
            return;
        };
        let Some(status) = status(pod, fate) else {
            return;
        };
        let api: Api<Pod> = Api::namespaced(client.clone(), &namespace);
        let patch = Patch::Merge(json!({ "status": status }));
        let _ = api
            .patch_status(&name, &PatchParams::default(), &patch)
            .await;
        if let Fate::Unmounted(why) = fate {
            warn(client, pod, "FailedMount", why).await;
        }
        let unhealthy = match fate {
            Fate::Unready(why) => format!("Readiness probe failed: {why}"),
            Fate::Unstarted(why) => format!("Startup probe failed: {why}"),
            _ => return,
        };
        warn(client, pod, "Unhealthy", &unhealthy).await;
    }
}

/// Says something about a pod as a kubelet does.
async fn warn(client: &Client, pod: &Pod, reason: &str, message: &str) {
    let namespace = pod.namespace().unwrap_or_default();
    let now = Timestamp::now().to_string();
    let event = json!({
        "metadata": {
            "generateName": format!("{}.", pod.name_any()),
            "namespace": namespace,
        },
        "involvedObject": {
            "apiVersion": "v1",
            "kind": "Pod",
            "name": pod.name_any(),
            "namespace": namespace,
            "uid": pod.uid(),
        },
        "type": "Warning",
        "reason": reason,
        "message": message,
        "source": { "component": "kubelet", "host": "node-1" },
        "firstTimestamp": whole_seconds(&now),
        "lastTimestamp": whole_seconds(&now),
        "count": 1,
    });
    let event: Event = serde_json::from_value(event).expect("an event");
    let api: Api<Event> = Api::namespaced(client.clone(), &namespace);
    let _ = api.create(&PostParams::default(), &event).await;
}

fn whole_seconds(time: &str) -> String {
    let seconds = time.split(['.', 'Z']).next().unwrap_or_default();
    format!("{seconds}Z")
}

/// What a kubelet takes of an output where nothing is in `/dev/termination-log`: the last 80 lines,
/// and of these the last 2048 bytes.
fn last_of(printed: &str) -> &str {
    let mut ends = printed.trim_end().rmatch_indices('\n').skip(79);
    let from = ends.next().map_or(0, |(at, _)| at + 1);
    let mut from = from.max(printed.len().saturating_sub(2048));
    while !printed.is_char_boundary(from) {
        from += 1;
    }
    &printed[from..]
}

fn condition(kind: &str, yes: bool, reason: &str, message: &str) -> Value {
    json!({
        "type": kind,
        "status": if yes { "True" } else { "False" },
        "lastTransitionTime": whole_seconds(&Timestamp::now().to_string()),
        "reason": reason,
        "message": message,
    })
}

fn status(pod: &Pod, fate: &Fate) -> Option<Value> {
    let container = pod.spec.as_ref()?.containers.first()?;
    let policy = container.termination_message_policy.as_deref();
    let falls_back = policy == Some("FallbackToLogsOnError");
    let now = whole_seconds(&Timestamp::now().to_string());
    let image = container.image.clone().unwrap_or_default();
    let container = |ready: bool, restarts: u32, state: Value, last: Value| {
        json!({
            "name": container.name,
            "image": image,
            "imageID": image,
            "containerID": "containerd://0123456789abcdef",
            "ready": ready,
            "started": ready,
            "restartCount": restarts,
            "state": state,
            "lastState": last,
        })
    };
    let waiting = |reason: &str, message: &str| json!({ "waiting": { "reason": reason, "message": message } });
    let terminated = |code: i32, reason: &str, message: &str| {
        json!({ "terminated": {
            "exitCode": code,
            "reason": reason,
            "message": message,
            "startedAt": now,
            "finishedAt": now,
            "containerID": "containerd://0123456789abcdef",
        }})
    };
    let running = json!({ "running": { "startedAt": now } });
    let (containers, ready) = match fate {
        Fate::Ready { .. } => (container(true, 0, running, json!({})), true),
        Fate::Creating => (
            container(false, 0, waiting("ContainerCreating", ""), json!({})),
            false,
        ),
        Fate::Unstarted(_) => (container(false, 0, running, json!({})), false),
        Fate::Unready(_) => {
            let mut unready = container(false, 0, running, json!({}));
            // Other probes are asked once that for the start has succeeded.
            unready["started"] = json!(true);
            (unready, false)
        }
        Fate::Unstartable(why) => {
            let back_off = "back-off 40s restarting failed container";
            let state = waiting("CrashLoopBackOff", back_off);
            let last = terminated(128, "StartError", why);
            (container(false, 3, state, last), false)
        }
        Fate::NoImage(why) => (
            container(false, 0, waiting("ImagePullBackOff", why), json!({})),
            false,
        ),
        Fate::NoConfig(why) => (
            container(
                false,
                0,
                waiting("CreateContainerConfigError", why),
                json!({}),
            ),
            false,
        ),
        Fate::Crashes(code, printed) => {
            let said = if falls_back { last_of(printed) } else { "" };
            let back_off = "back-off 40s restarting failed container";
            let state = waiting("CrashLoopBackOff", back_off);
            let last = terminated(*code, "Error", said);
            (container(false, 3, state, last), false)
        }
        Fate::OutOfMemory => {
            let back_off = "back-off 20s restarting failed container";
            let state = waiting("CrashLoopBackOff", back_off);
            (
                container(false, 2, state, terminated(137, "OOMKilled", "")),
                false,
            )
        }
        Fate::Runs => (container(true, 0, running, json!({})), true),
        Fate::Ends {
            code,
            reason,
            message,
        } => {
            let state = terminated(*code, reason, message);
            (container(false, 0, state, json!({})), false)
        }
        Fate::Unprepared(..) | Fate::Unmounted(_) => {
            let state = waiting("PodInitializing", "");
            (container(false, 0, state, json!({})), false)
        }
        Fate::Evicted(why) => {
            return Some(json!({
                "phase": "Failed",
                "reason": "Evicted",
                "message": why,
                "conditions": [condition("DisruptionTarget", true, "TerminationByKubelet", why)],
            }));
        }
        Fate::Unschedulable(why) => {
            return Some(json!({
                "phase": "Pending",
                "conditions": [condition("PodScheduled", false, "Unschedulable", why)],
            }));
        }
        Fate::Ignored => return None,
    };
    let first = pod.spec.as_ref()?.init_containers.iter().flatten();
    let first = first.map(|init| {
        let state = match fate {
            Fate::Unprepared(code, said) => terminated(*code, "Error", said),
            Fate::Unmounted(_) => waiting("PodInitializing", ""),
            _ => terminated(0, "Completed", ""),
        };
        json!({
            "name": init.name,
            "image": init.image,
            "imageID": init.image,
            "ready": !matches!(fate, Fate::Unprepared(..) | Fate::Unmounted(_)),
            "started": false,
            "restartCount": 0,
            "state": state,
            "lastState": {},
        })
    });
    let first: Vec<Value> = first.collect();
    let phase = match fate {
        Fate::Ends { code: 0, .. } => "Succeeded",
        Fate::Ends { .. } | Fate::Unprepared(..) => "Failed",
        _ if containers["state"].get("running").is_some() => "Running",
        _ => "Pending",
    };
    let unready = if ready { "" } else { "ContainersNotReady" };
    let mut status = json!({
        "phase": phase,
        "startTime": now,
        "hostIP": "127.0.0.1",
        "conditions": [
            condition("PodScheduled", true, "", ""),
            condition("Initialized", true, "", ""),
            condition("ContainersReady", ready, unready, ""),
            condition("Ready", ready, unready, ""),
        ],
        "containerStatuses": [containers],
    });
    if !first.is_empty() {
        status["initContainerStatuses"] = json!(first);
    }
    if let Fate::Ready { ip } = fate {
        status["podIP"] = json!(ip);
        status["podIPs"] = json!([{ "ip": ip }]);
    }
    Some(status)
}
