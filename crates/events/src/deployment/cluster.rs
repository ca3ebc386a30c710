//! A deployment in one of its clusters: each has a state of its own, and none waits for another.
//!
//! What a cluster shows is an observation; that it will not become ready any more is a decision,
//! taken when it says so itself, or when it has said nothing in time. What nobody has seen is
//! [`ClusterState::Unknown`], and not a guess.

use jiff::Timestamp;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{Deployment, Problem, Status, WorkloadObserved};
use crate::aggregate::Refusal;
use crate::names::ClusterName;

/// Where a deployment is in one cluster.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum ClusterState {
    /// It is to come there; nothing was committed yet, or a new try was asked for.
    Pending,
    /// It is committed; nothing was seen of it there yet.
    Syncing,
    /// It was seen there, and is not ready yet.
    Starting,
    /// All that is asked for is ready there.
    Started,
    /// It ran there, and is not wholly ready now; waiting may mend it.
    Degraded,
    /// It has failed there for good.
    Failed,
    /// It is being scaled to zero there.
    Stopping,
    /// Nothing of it runs there, and it can be started again.
    Stopped,
    /// It is being removed there.
    Terminating,
    /// It was removed there.
    Terminated,
    /// It ended before it came there.
    Absent,
    /// Nobody has seen what has become of it there.
    Unknown,
}

impl ClusterState {
    /// The state as one word.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Pending => "pending",
            Self::Syncing => "syncing",
            Self::Starting => "starting",
            Self::Started => "started",
            Self::Degraded => "degraded",
            Self::Failed => "failed",
            Self::Stopping => "stopping",
            Self::Stopped => "stopped",
            Self::Terminating => "terminating",
            Self::Terminated => "terminated",
            Self::Absent => "absent",
            Self::Unknown => "unknown",
        }
    }
}

/// Why a deployment is not as it should be in a cluster, and what helps.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct ClusterCause {
    /// A stable code: `CrashLoopBackOff`, `rollout_timeout`.
    pub code: String,
    /// What happened.
    pub message: String,
    /// What helps.
    pub remedy: String,
    /// What it usually comes of, the most likely first.
    pub likely_causes: Vec<String>,
    /// All that may help, beginning with `remedy`; none where there is nothing else.
    pub remedies: Vec<String>,
}

impl From<&Problem> for ClusterCause {
    fn from(problem: &Problem) -> Self {
        Self {
            code: problem.reason.clone(),
            message: problem.message.clone(),
            remedy: problem.remedy.clone(),
            likely_causes: problem.likely_causes.clone(),
            remedies: problem.remedies.clone(),
        }
    }
}

/// It has failed in one of its clusters, in a way that the cluster itself does not show.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct ClusterFailed {
    /// The cluster.
    pub cluster: ClusterName,
    /// A stable code: `rollout_timeout`, `cluster_unavailable`, `CrashLoopBackOff`.
    pub code: String,
    /// What happened.
    pub message: String,
    /// What helps.
    pub remedy: String,
}

impl ClusterFailed {
    /// Why.
    pub fn cause(&self) -> ClusterCause {
        ClusterCause {
            code: self.code.clone(),
            message: self.message.clone(),
            remedy: self.remedy.clone(),
            likely_causes: Vec::new(),
            remedies: Vec::new(),
        }
    }
}

/// Somebody asked that clusters where it has failed try again.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct RetryRequested {
    /// The clusters.
    pub clusters: Vec<ClusterName>,
    /// Why, in the caller's words.
    pub reason: Option<String>,
}

/// A cluster has taken a new try on: what is seen of it from here on is of that try.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct ClusterRetried {
    /// The cluster.
    pub cluster: ClusterName,
}

/// What is known of a deployment in one cluster.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ClusterProgress {
    /// Where it is there.
    pub state: ClusterState,
    /// Since when.
    #[serde(with = "crate::instant")]
    pub since: Timestamp,
    /// Why it failed there, or is not ready.
    pub cause: Option<ClusterCause>,
    /// How often it was tried there, from 1.
    pub tries: u32,
    /// When the present try was asked for.
    #[serde(with = "crate::instant")]
    pub tried_at: Timestamp,
    /// Why it was given up there.
    failure: Option<ClusterCause>,
    /// A new try was asked for, and the cluster has not taken it on yet.
    asked_again: bool,
}

impl ClusterProgress {
    pub(super) fn new(at: Timestamp) -> Self {
        Self {
            state: ClusterState::Pending,
            since: at,
            cause: None,
            tries: 1,
            tried_at: at,
            failure: None,
            asked_again: false,
        }
    }

    /// Whether a new try was asked for that the cluster has not taken on yet.
    pub fn is_asked_again(&self) -> bool {
        self.asked_again
    }

    pub(super) fn fail(&mut self, cause: ClusterCause) {
        self.failure = Some(cause);
        self.asked_again = false;
    }

    pub(super) fn try_again(&mut self, at: Timestamp) {
        self.failure = None;
        self.asked_again = true;
        self.tries += 1;
        self.tried_at = at;
    }

    /// The whole deployment is started again. Where it has failed, the cluster is to forget that
    /// first.
    pub(super) fn start_again(&mut self, at: Timestamp) {
        let failed = self.state == ClusterState::Failed;
        self.try_again(at);
        self.asked_again = failed;
    }

    pub(super) fn begin(&mut self) {
        self.asked_again = false;
    }

    /// What the state is, with why, as far as somebody has seen it.
    fn judge(
        &self,
        deployment: &DeploymentIn<'_>,
        seen: Option<&WorkloadObserved>,
    ) -> (ClusterState, Option<ClusterCause>) {
        use ClusterState as C;
        let gone = |o: &WorkloadObserved| o.wanted == 0 && o.instances.is_empty();
        let ended = |there: ClusterState, ending: ClusterState| match seen {
            None => C::Unknown,
            Some(o) if gone(o) => there,
            Some(_) => ending,
        };
        match deployment.status {
            Status::Deploying
            | Status::Starting
            | Status::Started
            | Status::PartiallyStarted
            | Status::StartError => self.judge_running(deployment.status, seen),
            Status::Stopping => (ended(C::Stopped, C::Stopping), None),
            Status::Stopped => (ended(C::Stopped, C::Degraded), None),
            Status::StopError => match ended(C::Stopped, C::Failed) {
                C::Stopped => (C::Stopped, None),
                other => (other, deployment.failure.cloned()),
            },
            Status::Terminating => (ended(C::Terminated, C::Terminating), None),
            Status::TerminateError => match ended(C::Terminated, C::Failed) {
                C::Terminated => (C::Terminated, None),
                other => (other, deployment.failure.cloned()),
            },
            Status::Terminated => (C::Terminated, None),
            Status::Failed | Status::Cancelled | Status::Deleted => match self.state {
                C::Pending | C::Absent => (C::Absent, None),
                C::Failed | C::Terminated => (self.state, self.cause.clone()),
                // It is taken out of the repository, and nobody looks at it any more.
                _ => (C::Unknown, None),
            },
            _ => (C::Pending, None),
        }
    }

    fn judge_running(
        &self,
        status: Status,
        seen: Option<&WorkloadObserved>,
    ) -> (ClusterState, Option<ClusterCause>) {
        use ClusterState as C;
        if seen.is_some_and(WorkloadObserved::is_ready) {
            return (C::Started, None);
        }
        if self.asked_again {
            return (C::Pending, None);
        }
        if let Some(mut cause) = self.failure.clone() {
            // Where it was given up for what is seen there, the remedy is that of what is seen. It may
            // as well have been for something else, which this says nothing about.
            let seen = seen.and_then(|o| o.problem.as_ref());
            if let Some(problem) = seen.filter(|problem| problem.remedy == cause.remedy) {
                cause.likely_causes.clone_from(&problem.likely_causes);
                cause.remedies.clone_from(&problem.remedies);
            }
            return (C::Failed, Some(cause));
        }
        let Some(seen) = seen else {
            let state = match status {
                Status::Started | Status::StartError => C::Unknown,
                _ => C::Syncing,
            };
            return (state, None);
        };
        let cause = seen.problem.as_ref().map(ClusterCause::from);
        let state = match &seen.problem {
            Some(problem) if !problem.transient => C::Failed,
            _ if seen.wanted == 0 && status == Status::Starting => C::Syncing,
            _ if matches!(self.state, C::Started | C::Degraded) => C::Degraded,
            _ => C::Starting,
        };
        (state, cause)
    }
}

/// What a cluster's state follows from, beside what is seen there.
struct DeploymentIn<'a> {
    status: Status,
    failure: Option<&'a ClusterCause>,
}

impl Deployment {
    /// Where it is in a cluster; none if it is not to run there.
    pub fn cluster_state(&self, cluster: &ClusterName) -> Option<ClusterState> {
        self.clusters.get(cluster).map(|p| p.state)
    }

    /// Its clusters in this state, in the order in which they were asked for.
    pub fn clusters_in(&self, state: ClusterState) -> impl Iterator<Item = &ClusterName> {
        let clusters = self.request.clusters.iter();
        clusters.filter(move |c| self.cluster_state(c) == Some(state))
    }

    /// The clusters where it has failed for good, with why.
    pub fn failed_clusters(&self) -> Vec<ClusterFailed> {
        let failed = self.clusters_in(ClusterState::Failed);
        let with_cause = failed.filter_map(|cluster| {
            let cause = self.clusters.get(cluster)?.cause.clone()?;
            Some(ClusterFailed {
                cluster: cluster.clone(),
                code: cause.code,
                message: cause.message,
                remedy: cause.remedy,
            })
        });
        with_cause.collect()
    }

    /// Whether it can take traffic: all of it is ready, or, for one that is known to run in some
    /// of its clusters only, one of them is.
    pub fn serves(&self) -> bool {
        let partial = self.status == Status::PartiallyStarted || self.may_end_partially();
        self.workload_is_ready()
            || (partial && self.clusters_in(ClusterState::Started).next().is_some())
    }

    /// Whether every cluster is either ready or has failed for good, and there are both.
    pub fn may_end_partially(&self) -> bool {
        let ready = self.clusters_in(ClusterState::Started).count();
        let failed = self.clusters_in(ClusterState::Failed).count();
        ready > 0 && failed > 0 && ready + failed == self.request.clusters.len()
    }

    pub(super) fn progress(
        &mut self,
        cluster: &ClusterName,
        change: impl FnOnce(&mut ClusterProgress),
    ) {
        if let Some(progress) = self.clusters.get_mut(cluster) {
            change(progress);
        }
    }

    /// Brings the state of each cluster up to what is known.
    pub(super) fn judge_clusters(&mut self, at: Timestamp) {
        let failure = match self.status {
            Status::StopError | Status::TerminateError => {
                self.failure.as_ref().map(|f| ClusterCause {
                    code: f.code.clone(),
                    message: f.message.clone(),
                    remedy: f.remedy.clone(),
                    likely_causes: Vec::new(),
                    remedies: Vec::new(),
                })
            }
            _ => None,
        };
        let deployment = DeploymentIn {
            status: self.status,
            failure: failure.as_ref(),
        };
        for (cluster, progress) in self.clusters.iter_mut() {
            let (state, cause) = progress.judge(&deployment, self.observed.get(cluster));
            if state == ClusterState::Started {
                progress.begin();
                progress.failure = None;
            }
            if progress.state != state {
                progress.state = state;
                progress.since = at;
            }
            progress.cause = cause;
        }
    }
}

/// Refuses to try clusters again where there is nothing to be mended.
pub(super) fn check_retry(state: &Deployment, retry: &RetryRequested) -> Result<(), Refusal> {
    if retry.clusters.is_empty() {
        return Err(Refusal::new(
            "nothing_to_retry",
            "no cluster of the deployment has failed",
            "wait for those that are being tried again; `daybook status` shows them",
        ));
    }
    for cluster in &retry.clusters {
        let Some(state) = state.cluster_state(cluster) else {
            return Err(Refusal::new(
                "not_its_cluster",
                format!("the deployment does not run in {cluster}"),
                "name one of its own clusters; `daybook status` lists them",
            ));
        };
        if state != ClusterState::Failed {
            return Err(Refusal::new(
                "cluster_not_failed",
                format!("the deployment is {} in {cluster}", state.as_str()),
                "name a cluster where it has failed; `daybook status` shows which",
            ));
        }
    }
    Ok(())
}
