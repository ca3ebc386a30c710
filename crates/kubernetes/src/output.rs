//! What pods print, and what kubelets warn of, on its way to the line log.
//!
//! Each pod has a follower, which reads from where the line log ends: lines carry the time at which
//! the container runtime took them, and that is how they are told from those that are there
//! already, after a cut connection as after a restart of Daybook.

mod pod;

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;

use daybook_events::ClusterName;
use daybook_events::lines::{LineKind, LineLog, LineSource, NewLine};
use jiff::Timestamp;
use k8s_openapi::api::core::v1::Pod;
use kube::{Client, ResourceExt};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::diagnosis::Warning;
use crate::status::belongs;
use crate::watches::Change;
use pod::{Container, Follower};

/// Warnings that come before their pods are seen are kept for them, so many at most.
const EARLY: usize = 256;

/// Where the watches tell what they see.
#[derive(Debug, Clone)]
pub(crate) struct Output(mpsc::UnboundedSender<Told>);

#[derive(Debug)]
enum Told {
    All(Vec<Pod>),
    Seen(Box<Pod>),
    Gone(String),
    Warned(Warned),
}

#[derive(Debug)]
struct Warned {
    namespace: String,
    pod: String,
    warning: Warning,
}

impl Output {
    /// Carries output until `cancel`.
    pub(crate) fn start(
        client: Client,
        cluster: ClusterName,
        lines: Arc<dyn LineLog>,
        tasks: &TaskTracker,
        cancel: CancellationToken,
    ) -> Self {
        let (sender, told) = mpsc::unbounded_channel();
        let carrier = Carrier {
            client,
            cluster,
            lines,
            cancel,
            tasks: tasks.clone(),
            followed: HashMap::new(),
            said: HashMap::new(),
            early: VecDeque::new(),
        };
        tasks.spawn(carrier.run(told));
        Self(sender)
    }

    /// What became of pods.
    pub(crate) fn pods(&self, change: &Change<Pod>) {
        let told = match change {
            Change::All(pods) => Told::All(pods.clone()),
            Change::Applied(pod) => Told::Seen(pod.clone()),
            Change::Deleted(pod) => Told::Gone(pod.uid().unwrap_or_default()),
        };
        // It only ends with the process.
        let _ = self.0.send(told);
    }

    /// A warning about a pod.
    pub(crate) fn warned(&self, namespace: &str, pod: &str, warning: &Warning) {
        let _ = self.0.send(Told::Warned(Warned {
            namespace: namespace.to_owned(),
            pod: pod.to_owned(),
            warning: warning.clone(),
        }));
    }
}

struct Carrier {
    client: Client,
    cluster: ClusterName,
    lines: Arc<dyn LineLog>,
    cancel: CancellationToken,
    tasks: TaskTracker,
    /// By the pods' uids.
    followed: HashMap<String, Followed>,
    /// The newest warning about each of them that was passed on.
    said: HashMap<String, Warning>,
    /// Warnings about pods that are not seen yet.
    early: VecDeque<Warned>,
}

struct Followed {
    namespace: String,
    name: String,
    source: LineSource,
    container: tokio::sync::watch::Sender<Container>,
}

impl Carrier {
    async fn run(mut self, mut told: mpsc::UnboundedReceiver<Told>) {
        loop {
            let next = tokio::select! {
                () = self.cancel.cancelled() => return,
                next = told.recv() => next,
            };
            match next {
                None => return,
                Some(Told::All(pods)) => {
                    let listed: Vec<_> = pods.iter().filter_map(ResourceExt::uid).collect();
                    self.followed.retain(|uid, _| listed.contains(uid));
                    for pod in &pods {
                        self.seen(pod).await;
                    }
                }
                Some(Told::Seen(pod)) => self.seen(&pod).await,
                Some(Told::Gone(uid)) => {
                    // Its follower reads what is left, and ends.
                    self.followed.remove(&uid);
                    self.said.remove(&uid);
                }
                Some(Told::Warned(warned)) => self.warn(warned).await,
            }
        }
    }

    async fn seen(&mut self, pod: &Pod) {
        let (Some(uid), Some((deployment, service))) = (pod.uid(), belongs(&pod.metadata)) else {
            return;
        };
        let container = Container::of(pod, service.as_str());
        if let Some(followed) = self.followed.get(&uid) {
            followed.container.send_if_modified(|before| {
                let differs = *before != container;
                *before = container;
                differs
            });
            return;
        }
        let (namespace, name) = (pod.namespace().unwrap_or_default(), pod.name_any());
        let source = LineSource::Deployment(deployment);
        let (sender, container) = tokio::sync::watch::channel(container);
        let follower = Follower {
            client: self.client.clone(),
            lines: self.lines.clone(),
            source,
            cluster: self.cluster.clone(),
            namespace: namespace.clone(),
            pod: name.clone(),
            container,
            cancel: self.cancel.clone(),
        };
        self.tasks.spawn(follower.run());
        let followed = Followed {
            namespace,
            name,
            source,
            container: sender,
        };
        self.followed.insert(uid, followed);
        for warned in std::mem::take(&mut self.early) {
            self.warn(warned).await;
        }
    }

    /// Passes a warning on, unless it is the same as before: kubelets repeat themselves.
    async fn warn(&mut self, warned: Warned) {
        let mut all = self.followed.iter();
        let about = all.find(|(_, f)| f.name == warned.pod && f.namespace == warned.namespace);
        let Some((uid, followed)) = about else {
            self.early.push_back(warned);
            if self.early.len() > EARLY {
                self.early.pop_front();
            }
            return;
        };
        let Warned { warning, .. } = warned;
        if self.said.get(uid) == Some(&warning) {
            return;
        }
        let line = NewLine {
            time: Timestamp::now(),
            kind: LineKind::Platform,
            cluster: Some(self.cluster.clone()),
            instance: Some(followed.name.clone()),
            text: pod::cut(format!("{}: {}", warning.reason, warning.message.trim())),
        };
        if let Err(error) = self.lines.append(followed.source, vec![line]).await {
            tracing::warn!(pod = followed.name, %error, "a warning about a pod is not kept");
        }
        self.said.insert(uid.clone(), warning);
    }
}
