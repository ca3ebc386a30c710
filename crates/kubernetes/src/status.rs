//! What is seen of an environment on a cluster, from the objects of its namespace.

use std::collections::{BTreeMap, HashMap, HashSet};

use daybook_events::{DeploymentId, ServiceName};
use daybook_workers::target::{AppStatus, InstanceStatus, Problem, ReleaseStatus};
use jiff::Timestamp;
use k8s_openapi::api::apps::v1::{Deployment, ReplicaSet};
use k8s_openapi::api::core::v1::Pod;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use serde_json::Value;

use crate::argocd::{Application, State};
use crate::asked::{Asked, Chart, Workload};
use crate::diagnosis::{self, Warning};
use crate::names::{self, DEPLOYMENT, SERVICE};
use crate::objects::Kind;

/// The annotation by which a ReplicaSet and its Deployment say which rollout they are of.
const ROLLOUT: &str = "deployment.kubernetes.io/revision";
/// The label that tells the pods of one rollout from those of another.
const TEMPLATE: &str = "pod-template-hash";

/// The objects of one namespace, by name. Most have one of each kind, and a map has room for more: it has
/// pointers, as the objects are large.
#[derive(Debug, Default)]
pub struct Seen {
    /// Workloads.
    pub workloads: HashMap<String, Box<Deployment>>,
    /// What they make; nothing but the metadata of each.
    pub sets: HashMap<String, Box<ReplicaSet>>,
    /// What those make.
    pub pods: HashMap<String, Box<Pod>>,
    /// The newest warning about each pod.
    pub warnings: HashMap<String, Warning>,
    /// What Argo CD says.
    pub(crate) application: Option<Application>,
}

/// Warnings may come before their pods are seen; so many are kept without.
const EARLY: usize = 64;

impl Seen {
    /// Whether there is nothing.
    pub(crate) fn is_empty(&self) -> bool {
        self.workloads.is_empty()
            && self.sets.is_empty()
            && self.pods.is_empty()
            && self.application.is_none()
    }

    fn all_pods(&self) -> impl Iterator<Item = &Pod> {
        self.pods.values().map(|pod| &**pod)
    }

    /// Keeps the newest warning about a pod. Those about pods that are gone go in time.
    pub(crate) fn warn(&mut self, pod: &str, warning: Warning) {
        self.warnings.insert(pod.to_owned(), warning);
        if self.warnings.len() > self.pods.len() + EARLY {
            let pods = &self.pods;
            self.warnings
                .retain(|name, _| name == pod || pods.contains_key(name));
        }
    }

    /// The status of the environment. What was not asked for is listed until its workload and the
    /// last of its pods are gone.
    pub fn status(&self, asked: &Asked) -> AppStatus {
        let sync = self.sync(asked);
        let mut releases: Vec<ReleaseStatus> = asked
            .releases()
            .iter()
            .map(|(deployment, (service, wanted))| {
                self.release(*deployment, service, *wanted, asked, sync.as_ref())
            })
            .collect();
        let workloads = self.workloads.values().map(|w| &w.metadata);
        let pods = self.all_pods().map(|p| &p.metadata);
        let left: BTreeMap<_, _> = workloads.chain(pods).filter_map(belongs).collect();
        for (deployment, service) in left {
            if !asked.releases().contains_key(&deployment) {
                releases.push(ReleaseStatus {
                    deployment,
                    service,
                    revision: asked.revision().clone(),
                    wanted: 0,
                    instances: self.instances(deployment, None),
                    problem: None,
                    image_pull: None,
                });
            }
        }
        releases.sort_by_key(|r| r.deployment);
        AppStatus {
            revision: Some(asked.revision().clone()),
            releases,
            is_whole: asked.again().is_none() && sync.is_none_or(|state| state == State::Synced),
        }
    }

    /// What Argo CD says of the commit, where it applies it.
    fn sync(&self, asked: &Asked) -> Option<State> {
        let by_argocd = asked.is_by_argocd() && !asked.releases().is_empty();
        by_argocd.then(|| State::of(self.application.as_ref(), asked.revision()))
    }

    /// The releases that are as they are to be now that Argo CD has synced the commit.
    pub(crate) fn settled(&self, asked: &Asked) -> Vec<DeploymentId> {
        if self.sync(asked) != Some(State::Synced) {
            return Vec::new();
        }
        let releases = asked.releases().iter();
        let settled = releases.filter(|(deployment, (service, _))| {
            let is_there = |name: &str| {
                let workload = self.workloads.get(name);
                workload.is_some_and(|w| asked.covers(**deployment, w))
            };
            match asked.workloads(**deployment) {
                None => is_there(&names::release(service, **deployment)),
                Some(of_chart) => {
                    let mut of_chart = of_chart.iter().filter(|w| w.kind == Kind::DEPLOYMENT);
                    of_chart.all(|w| is_there(&w.name))
                }
            }
        });
        settled.map(|(deployment, _)| *deployment).collect()
    }

    fn release(
        &self,
        deployment: DeploymentId,
        service: &ServiceName,
        wanted: u32,
        asked: &Asked,
        sync: Option<&State>,
    ) -> ReleaseStatus {
        if let Some(chart) = asked.chart(deployment) {
            return self.of_chart(deployment, service, chart, asked, sync);
        }
        let name = names::release(service, deployment);
        let seen = self.workloads.get(&name);
        let workload = seen.filter(|w| asked.covers(deployment, w));
        let unsynced = sync.filter(|_| !asked.is_settled(deployment));
        let unsynced = unsynced.and_then(|state| state.problem_of(&name, workload.is_some()));
        let workload = workload.filter(|_| unsynced.is_none());
        let template = workload.and_then(|w| self.template(w));
        let instances = self.instances(deployment, template.as_deref());
        let ready = instances.iter().filter(|i| i.ready && !i.outdated).count();
        let held = asked.held(deployment).or(unsynced).cloned();
        let held = held.or_else(|| {
            let changed = seen.filter(|_| workload.is_none() && sync.is_some())?;
            let fields = asked.drift(deployment, changed);
            (!fields.is_empty()).then(|| diagnosis::otherwise(&name, &fields))
        });
        let problem = held.or_else(|| {
            let workload = workload?;
            let missing = u32::try_from(ready).unwrap_or(u32::MAX) < wanted;
            let found = missing.then(|| self.problem(workload, deployment, template.as_deref()));
            found.flatten().or_else(|| {
                let fields = asked.drift(deployment, workload);
                (!fields.is_empty()).then(|| diagnosis::drift(&name, &fields))
            })
        });
        ReleaseStatus {
            deployment,
            service: service.clone(),
            revision: asked.revision().clone(),
            wanted,
            instances,
            problem,
            image_pull: None,
        }
    }

    /// The status of a release of a chart: it is ready where each of its workloads is.
    fn of_chart(
        &self,
        deployment: DeploymentId,
        service: &ServiceName,
        chart: &Chart,
        asked: &Asked,
        sync: Option<&State>,
    ) -> ReleaseStatus {
        let mut looked = Looked::default();
        for workload in &chart.workloads {
            let unsynced = sync.filter(|_| !asked.is_settled(deployment));
            match workload.kind {
                Kind::DEPLOYMENT => self.look(deployment, workload, asked, unsynced, &mut looked),
                _ => self.look_at_set(deployment, workload, asked, unsynced, &mut looked),
            }
        }
        let pods = self.all_pods().filter(|pod| {
            let is_its = belongs(&pod.metadata).is_some_and(|(id, _)| id == deployment);
            is_its && !has_ended(pod)
        });
        let instance = |pod: &Pod| {
            let name = pod.metadata.name.as_ref();
            let current = name.is_some_and(|name| looked.current.contains(name));
            InstanceStatus {
                // Only those that have the traffic are led to.
                address: address(pod, target_port(pod, chart)),
                ..instance(pod, current)
            }
        };
        let mut instances: Vec<_> = pods.map(instance).collect();
        instances.sort_by(|a, b| a.name.cmp(&b.name));
        // What one workload has too many makes up for nothing that another one lacks.
        let surplus = if looked.is_missing { looked.surplus } else { 0 };
        ReleaseStatus {
            deployment,
            service: service.clone(),
            revision: asked.revision().clone(),
            wanted: looked.wanted.saturating_add(surplus),
            instances,
            problem: asked.held(deployment).cloned().or(looked.problem),
            image_pull: None,
        }
    }

    /// Looks at a Deployment of a chart.
    fn look(
        &self,
        deployment: DeploymentId,
        workload: &Workload,
        asked: &Asked,
        unsynced: Option<&State>,
        looked: &mut Looked,
    ) {
        let seen = self.workloads.get(&workload.name);
        let present = seen.filter(|w| asked.covers(deployment, w));
        let held = unsynced.and_then(|s| s.problem_of(&workload.name, present.is_some()));
        let present = present.filter(|_| held.is_none());
        let template = present.and_then(|w| self.template(w));
        let current = self.all_pods().filter(|pod| {
            let is_its = belongs(&pod.metadata).is_some_and(|(id, _)| id == deployment);
            is_its && template.is_some() && label(&pod.metadata, TEMPLATE) == template.as_deref()
        });
        let is_missing = looked.count(workload.instances, current);
        let found = held.cloned().or_else(|| {
            let present = present?;
            let found = is_missing.then(|| self.problem(present, deployment, template.as_deref()));
            found.flatten().or_else(|| {
                let fields = asked.drift(deployment, present);
                (!fields.is_empty()).then(|| diagnosis::drift(&workload.name, &fields))
            })
        });
        looked.problem = looked.problem.take().or(found);
    }

    /// Looks at a StatefulSet of a chart, of which only the pods are seen.
    fn look_at_set(
        &self,
        deployment: DeploymentId,
        workload: &Workload,
        asked: &Asked,
        unsynced: Option<&State>,
        looked: &mut Looked,
    ) {
        let held = unsynced.and_then(|s| s.problem_of(&workload.name, true));
        let is_current = |pod: &&Pod| {
            let is_its = belongs(&pod.metadata).is_some_and(|(id, _)| id == deployment);
            let mut owners = pod.metadata.owner_references.iter().flatten();
            is_its
                && owners.any(|owner| {
                    owner.kind == Kind::STATEFUL_SET.kind
                        && owner.name == workload.name
                        && asked.covers_set(&owner.name, &owner.uid)
                })
        };
        let current = || self.all_pods().filter(is_current);
        let is_missing = looked.count(workload.instances, current());
        let found = held.cloned().or_else(|| {
            let pods = current().map(|pod| {
                let name = pod.metadata.name.as_deref().unwrap_or_default();
                (pod, self.warnings.get(name))
            });
            is_missing.then(|| diagnosis::pods(pods)).flatten()
        });
        looked.problem = looked.problem.take().or(found);
    }

    fn problem(
        &self,
        workload: &Deployment,
        deployment: DeploymentId,
        template: Option<&str>,
    ) -> Option<Problem> {
        let current = self.all_pods().filter(|pod| {
            belongs(&pod.metadata).is_some_and(|(id, _)| id == deployment)
                && pod.metadata.deletion_timestamp.is_none()
                && template.is_some()
                && label(&pod.metadata, TEMPLATE) == template
        });
        let current = current.map(|pod| {
            let name = pod.metadata.name.as_deref().unwrap_or_default();
            (pod, self.warnings.get(name))
        });
        let found = diagnosis::release(workload, current, is_over(workload));
        found.or_else(|| self.application.as_ref()?.unhealthy(workload))
    }

    /// The `pod-template-hash` of the workload's present specification; none while the controller
    /// has not seen it yet, so that pods of an older one are never taken for its own.
    fn template(&self, workload: &Deployment) -> Option<String> {
        let observed = workload.status.as_ref().and_then(|s| s.observed_generation);
        if observed < workload.metadata.generation {
            return None;
        }
        let rollout = annotation(&workload.metadata, ROLLOUT)?;
        let uid = workload.metadata.uid.as_deref()?;
        let newest = self.sets.values().find(|set| {
            let owners = set.metadata.owner_references.iter().flatten();
            let mut owners = owners.filter(|o| o.controller == Some(true));
            owners.any(|o| o.uid == uid) && annotation(&set.metadata, ROLLOUT) == Some(rollout)
        })?;
        label(&newest.metadata, TEMPLATE).map(str::to_owned)
    }

    /// The pods of a release. `template` tells the present ones; without one none is known to be.
    fn instances(&self, deployment: DeploymentId, template: Option<&str>) -> Vec<InstanceStatus> {
        let pods = self.all_pods().filter(|pod| {
            !has_ended(pod) && belongs(&pod.metadata).is_some_and(|(id, _)| id == deployment)
        });
        let mut instances: Vec<_> = pods
            .map(|pod| {
                let of_template = label(&pod.metadata, TEMPLATE);
                instance(pod, template.is_some() && of_template == template)
            })
            .collect();
        instances.sort_by(|a, b| a.name.cmp(&b.name));
        instances
    }
}

/// What was seen of the workloads of a chart.
#[derive(Default)]
struct Looked {
    wanted: u32,
    /// Whether one of them has fewer instances that are ready than it is to have.
    is_missing: bool,
    /// How many are ready of others beyond what they are to have.
    surplus: u32,
    /// The names of the pods that are of what is asked for now.
    current: HashSet<String>,
    /// What is the matter with the first one with which anything is.
    problem: Option<Problem>,
}

impl Looked {
    /// Counts the pods of a workload, and says whether some are missing.
    fn count<'a>(&mut self, wanted: u32, pods: impl Iterator<Item = &'a Pod>) -> bool {
        let mut ready: u32 = 0;
        for pod in pods.filter(|pod| !has_ended(pod)) {
            ready = ready.saturating_add(u32::from(instance(pod, true).ready));
            self.current.extend(pod.metadata.name.clone());
        }
        self.wanted = self.wanted.saturating_add(wanted);
        self.surplus = self.surplus.saturating_add(ready.saturating_sub(wanted));
        self.is_missing |= ready < wanted;
        ready < wanted
    }
}

/// Whether a pod runs no more, and will not again.
fn has_ended(pod: &Pod) -> bool {
    let phase = pod.status.as_ref().and_then(|s| s.phase.as_deref());
    matches!(phase, Some("Succeeded" | "Failed"))
}

fn instance(pod: &Pod, current: bool) -> InstanceStatus {
    let status = pod.status.as_ref();
    let conditions = status.iter().flat_map(|s| s.conditions.iter().flatten());
    let ready = conditions
        .clone()
        .any(|c| c.type_ == "Ready" && c.status == "True");
    let going = pod.metadata.deletion_timestamp.is_some();
    let restarts = status
        .iter()
        .flat_map(|s| s.container_statuses.iter().flatten())
        .map(|c| u32::try_from(c.restart_count).unwrap_or(0))
        .sum();
    let started = status.and_then(|s| s.start_time.as_ref());
    let created = pod.metadata.creation_timestamp.as_ref();
    InstanceStatus {
        name: pod.metadata.name.clone().unwrap_or_default(),
        address: address(pod, port_called(pod, "http")),
        ready: ready && !going,
        outdated: !current,
        restarts,
        started_at: started
            .or(created)
            .map_or(Timestamp::UNIX_EPOCH, |time| time.0),
    }
}

/// Where a pod answers on a port; nothing where it has none, or no address yet.
fn address(pod: &Pod, port: Option<i32>) -> String {
    let status = pod.status.as_ref();
    let ip = status.and_then(|s| s.pod_ip.as_deref()).unwrap_or_default();
    match port {
        Some(port) if ip.contains(':') => format!("[{ip}]:{port}"),
        Some(port) if !ip.is_empty() => format!("{ip}:{port}"),
        _ => String::new(),
    }
}

/// The port of a pod that has this name.
fn port_called(pod: &Pod, name: &str) -> Option<i32> {
    let containers = pod.spec.iter().flat_map(|s| &s.containers);
    let mut ports = containers.flat_map(|c| c.ports.iter().flatten());
    let port = ports.find(|p| p.name.as_deref() == Some(name))?;
    Some(port.container_port)
}

/// The port on which a pod of a chart has the traffic, if it has any.
fn target_port(pod: &Pod, chart: &Chart) -> Option<i32> {
    let has = |(key, value): (&String, &String)| {
        label(&pod.metadata, key).is_some_and(|its| its == value)
    };
    if chart.selector.is_empty() || !chart.selector.iter().all(has) {
        return None;
    }
    match &chart.port {
        Value::String(name) => port_called(pod, name),
        number => number
            .as_i64()
            .and_then(|number| i32::try_from(number).ok()),
    }
}

/// Whether Kubernetes gave up waiting for the rollout.
fn is_over(workload: &Deployment) -> bool {
    let status = workload.status.as_ref();
    let conditions = status.iter().flat_map(|s| s.conditions.iter().flatten());
    let current = status.and_then(|s| s.observed_generation) >= workload.metadata.generation;
    current
        && conditions.into_iter().any(|c| {
            c.type_ == "Progressing" && c.reason.as_deref() == Some("ProgressDeadlineExceeded")
        })
}

/// Which release an object is of.
pub fn belongs(metadata: &ObjectMeta) -> Option<(DeploymentId, ServiceName)> {
    let deployment = label(metadata, DEPLOYMENT)?.parse().ok()?;
    let service = label(metadata, SERVICE)?.parse().ok()?;
    Some((deployment, service))
}

/// A label of an object.
pub fn label<'a>(metadata: &'a ObjectMeta, key: &str) -> Option<&'a str> {
    let labels = metadata.labels.as_ref()?;
    labels.get(key).map(String::as_str)
}

/// An annotation of an object.
pub fn annotation<'a>(metadata: &'a ObjectMeta, key: &str) -> Option<&'a str> {
    let annotations = metadata.annotations.as_ref()?;
    annotations.get(key).map(String::as_str)
}
