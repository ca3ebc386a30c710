//! What pods print, and what kubelets warn of, on its way to the line log.
//!
//! Each pod has a follower, which reads from where the line log ends: lines carry the time at which
//! the container runtime took them, and that is how they are told from those that are there
//! already, after a cut connection as after a restart of Daybook.

pub(crate) mod pod;

use std::collections::{HashMap, HashSet, VecDeque};
use std::sync::{Arc, Mutex, PoisonError};

use daybook_events::ClusterName;
use daybook_events::lines::{LineKind, LineLog, LineSource, NewLine};
use jiff::Timestamp;
use k8s_openapi::api::core::v1::Pod;
use kube::{Client, ResourceExt};
use tokio::sync::{mpsc, watch};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::diagnosis::Warning;
use crate::status::belongs;
use crate::watches::Change;
use pod::{Container, Follower};

/// Warnings that come before their pods are seen are kept for them, so many at most.
const EARLY: usize = 256;
/// So many warnings about one pod may wait for the line log; more are dropped.
const WAITING: usize = 16;

/// Carries output until it is cancelled. The watches tell it what they see.
pub(crate) struct Output {
    pub(crate) client: Client,
    pub(crate) cluster: ClusterName,
    pub(crate) lines: Arc<dyn LineLog>,
    pub(crate) tasks: TaskTracker,
    pub(crate) cancel: CancellationToken,
    pub(crate) known: Mutex<Known>,
}

/// The pods that are followed.
#[derive(Default)]
pub(crate) struct Known {
    /// By their uids.
    followed: HashMap<String, Followed>,
    /// Warnings about pods that are not seen yet.
    early: VecDeque<Warned>,
}

struct Followed {
    namespace: String,
    name: String,
    container: watch::Sender<Container>,
    warnings: mpsc::Sender<Warning>,
    /// The newest warning that was passed on.
    said: Option<Warning>,
}

struct Warned {
    namespace: String,
    pod: String,
    warning: Warning,
}

impl Output {
    /// What became of pods.
    pub(crate) fn pods(&self, change: &Change<Pod>) {
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        match change {
            Change::All(pods) => {
                let listed: HashSet<_> = pods.iter().filter_map(ResourceExt::uid).collect();
                known.followed.retain(|uid, _| listed.contains(uid));
                for pod in pods {
                    self.seen(&mut known, pod);
                }
            }
            Change::Applied(pod) => self.seen(&mut known, pod),
            // Its follower reads what is left, and ends.
            Change::Deleted(pod) => {
                known.followed.remove(&pod.uid().unwrap_or_default());
            }
        }
    }

    /// A warning about a pod.
    pub(crate) fn warned(&self, namespace: &str, pod: &str, warning: &Warning) {
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        known.warn(Warned {
            namespace: namespace.to_owned(),
            pod: pod.to_owned(),
            warning: warning.clone(),
        });
    }

    fn seen(&self, known: &mut Known, pod: &Pod) {
        let (Some(uid), Some((deployment, service))) = (pod.uid(), belongs(&pod.metadata)) else {
            return;
        };
        let container = Container::of(pod, service.as_str());
        if let Some(followed) = known.followed.get(&uid) {
            followed.container.send_if_modified(|before| {
                let differs = *before != container;
                *before = container;
                differs
            });
            return;
        }
        let source = LineSource::Deployment(deployment);
        let (namespace, name) = (pod.namespace().unwrap_or_default(), pod.name_any());
        let (sender, container) = watch::channel(container);
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
        let (warnings, waiting) = mpsc::channel(WAITING);
        let warner = Warner {
            lines: self.lines.clone(),
            source,
            cluster: self.cluster.clone(),
            pod: name.clone(),
        };
        let cancel = self.cancel.clone();
        self.tasks.spawn(async move {
            cancel.run_until_cancelled(warner.run(waiting)).await;
        });
        let followed = Followed {
            namespace,
            name,
            container: sender,
            warnings,
            said: None,
        };
        known.followed.insert(uid, followed);
        for warned in std::mem::take(&mut known.early) {
            known.warn(warned);
        }
    }
}

impl Known {
    /// Passes a warning on, unless it is the same as before: kubelets repeat themselves.
    fn warn(&mut self, warned: Warned) {
        let mut all = self.followed.values_mut();
        let about = all.find(|f| f.name == warned.pod && f.namespace == warned.namespace);
        let Some(followed) = about else {
            self.early.push_back(warned);
            if self.early.len() > EARLY {
                self.early.pop_front();
            }
            return;
        };
        let Warned { warning, .. } = warned;
        let news = followed.said.as_ref() != Some(&warning);
        if news && followed.warnings.try_send(warning.clone()).is_ok() {
            followed.said = Some(warning);
        }
    }
}

/// Writes down the warnings about one pod.
struct Warner {
    lines: Arc<dyn LineLog>,
    source: LineSource,
    cluster: ClusterName,
    pod: String,
}

impl Warner {
    async fn run(self, mut waiting: mpsc::Receiver<Warning>) {
        while let Some(warning) = waiting.recv().await {
            let line = NewLine {
                time: Timestamp::now(),
                kind: LineKind::Platform,
                cluster: Some(self.cluster.clone()),
                instance: Some(self.pod.clone()),
                text: pod::cut(format!("{}: {}", warning.reason, warning.message.trim())),
            };
            if let Err(error) = self.lines.append(self.source, vec![line]).await {
                tracing::warn!(pod = self.pod, %error, "a warning about a pod is not kept");
            }
        }
    }
}
