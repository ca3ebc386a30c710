//! What was asked of an environment: what is seen is held against it.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use daybook_events::{CommitId, DeploymentId, ServiceName};
use daybook_workers::target::Problem;
use daybook_workers::values::ReleaseValues;
use k8s_openapi::api::apps::v1::Deployment;
use serde_json::Value;

use crate::differences::differences;

/// What was asked of an environment and applied, or handed to Argo CD to be applied.
#[derive(Debug)]
pub struct Asked {
    revision: CommitId,
    releases: BTreeMap<DeploymentId, (ServiceName, u32)>,
    held: HashMap<DeploymentId, Problem>,
    by: By,
}

/// Who applies it.
#[derive(Debug)]
enum By {
    /// Daybook: the workloads as the API server had them right after that.
    Daybook(HashMap<String, Applied>),
    /// Argo CD, at a time of its own.
    ArgoCd {
        /// What is to become of each release.
        wanted: BTreeMap<DeploymentId, (ReleaseValues, Value)>,
        /// Releases that were there as they are to be, at this commit or at one before.
        settled: BTreeSet<DeploymentId>,
    },
}

/// A workload that was applied. What is seen of an older generation is of the time before.
#[derive(Debug)]
struct Applied {
    uid: String,
    generation: i64,
    wanted: Value,
}

impl Asked {
    /// Nothing, at a revision.
    pub fn new(revision: CommitId) -> Self {
        Self {
            revision,
            releases: BTreeMap::new(),
            held: HashMap::new(),
            by: By::Daybook(HashMap::new()),
        }
    }

    /// The same, where Argo CD applies it.
    pub(crate) fn by_argocd(revision: CommitId) -> Self {
        Self {
            by: By::ArgoCd {
                wanted: BTreeMap::new(),
                settled: BTreeSet::new(),
            },
            ..Self::new(revision)
        }
    }

    /// The commit.
    pub(crate) fn revision(&self) -> &CommitId {
        &self.revision
    }

    /// The releases with how many instances of each there are to be.
    pub(crate) fn releases(&self) -> &BTreeMap<DeploymentId, (ServiceName, u32)> {
        &self.releases
    }

    /// Whether it is Argo CD that applies it.
    pub(crate) fn is_by_argocd(&self) -> bool {
        matches!(self.by, By::ArgoCd { .. })
    }

    /// So many instances of a release.
    pub fn wants(&mut self, deployment: DeploymentId, service: ServiceName, replicas: u32) {
        self.releases.insert(deployment, (service, replicas));
    }

    /// A workload was applied, which is `wanted` to be so.
    pub fn applied(&mut self, name: &str, uid: String, generation: i64, wanted: Value) {
        if let By::Daybook(applied) = &mut self.by {
            let workload = Applied {
                uid,
                generation,
                wanted,
            };
            applied.insert(name.to_owned(), workload);
        }
    }

    /// Argo CD is to make this workload of a release.
    pub(crate) fn handed_over(
        &mut self,
        deployment: DeploymentId,
        values: ReleaseValues,
        workload: Value,
    ) {
        if let By::ArgoCd { wanted, .. } = &mut self.by {
            wanted.insert(deployment, (values, workload));
        }
    }

    /// Releases that are the same as before are settled as they were before.
    pub(crate) fn follows(&mut self, before: &Self) {
        if let (
            By::ArgoCd { wanted, settled },
            By::ArgoCd {
                wanted: wanted_before,
                settled: settled_before,
            },
        ) = (&mut self.by, &before.by)
        {
            let same = settled_before
                .iter()
                .filter(|id| wanted.contains_key(id) && wanted.get(id) == wanted_before.get(id));
            settled.extend(same);
        }
    }

    /// Something keeps a release from being applied whole.
    pub fn holds(&mut self, deployment: DeploymentId, problem: Problem) {
        self.held.insert(deployment, problem);
    }

    /// What keeps a release from being applied whole.
    pub(crate) fn held(&self, deployment: DeploymentId) -> Option<&Problem> {
        self.held.get(&deployment)
    }

    /// Why not all was applied, if it may be had by trying again.
    pub fn again(&self) -> Option<String> {
        let mut held = self.held.values().filter(|problem| problem.transient);
        held.next().map(|problem| problem.message.clone())
    }

    /// Whether a workload is as it was asked for, as far as can be seen of it.
    pub(crate) fn covers(&self, deployment: DeploymentId, workload: &Deployment) -> bool {
        let metadata = &workload.metadata;
        match &self.by {
            By::Daybook(applied) => {
                let applied = metadata.name.as_ref().and_then(|name| applied.get(name));
                applied.is_some_and(|applied| {
                    metadata.uid.as_ref() == Some(&applied.uid)
                        && metadata.generation >= Some(applied.generation)
                })
            }
            // What has drifted since is still this release.
            By::ArgoCd { wanted, settled } => {
                settled.contains(&deployment)
                    || wanted.contains_key(&deployment)
                        && self.drift(deployment, workload).is_empty()
            }
        }
    }

    /// The fields of a workload that somebody has set otherwise.
    pub(crate) fn drift(&self, deployment: DeploymentId, workload: &Deployment) -> Vec<String> {
        let metadata = &workload.metadata;
        let (wanted, by_argocd) = match &self.by {
            By::Daybook(applied) => {
                let applied = metadata.name.as_ref().and_then(|name| applied.get(name));
                // As it was applied: there is nothing to look for.
                let applied = applied.filter(|a| metadata.generation != Some(a.generation));
                (applied.map(|applied| &applied.wanted), false)
            }
            By::ArgoCd { wanted, .. } => (wanted.get(&deployment).map(|(_, w)| w), true),
        };
        let Some(wanted) = wanted else {
            return Vec::new();
        };
        let live = serde_json::to_value(workload).unwrap_or_default();
        let mut found = differences(wanted, &live);
        // The chart may have an autoscaler made.
        found.retain(|field| !(by_argocd && is_autoscaled(field, wanted, &live)));
        found
    }

    /// Whether Argo CD's word about this commit no longer matters for a release: it is there as it
    /// is to be. Where Daybook applies, there is no such word.
    pub(crate) fn is_settled(&self, deployment: DeploymentId) -> bool {
        match &self.by {
            By::Daybook(_) => true,
            By::ArgoCd { settled, .. } => settled.contains(&deployment),
        }
    }

    /// A release is there as it is to be.
    pub(crate) fn settles(&mut self, deployment: DeploymentId) {
        if let By::ArgoCd { settled, .. } = &mut self.by {
            settled.insert(deployment);
        }
    }
}

/// Whether a field is the number of instances, and an autoscaler has added some.
fn is_autoscaled(field: &str, wanted: &Value, live: &Value) -> bool {
    let replicas = |of: &Value| of["spec"]["replicas"].as_u64();
    let (least, now) = (replicas(wanted), replicas(live));
    field == ".spec.replicas" && least > Some(0) && now > least
}
