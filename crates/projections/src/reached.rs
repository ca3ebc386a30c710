//! When a deployment was first seen to get somewhere, beyond what its states say.

use daybook_events::deployment::{ClusterState, Deployment, ReadinessState};
use jiff::Timestamp;
use serde::{Deserialize, Serialize};

/// When a deployment was first seen to get somewhere, each in milliseconds since 1970; none for what it
/// has not reached yet.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Reached {
    /// It was seen in all of its clusters.
    pub synced: Option<i64>,
    /// All that is asked for was ready in all of its clusters.
    pub ready: Option<i64>,
    /// It was reached at its address.
    pub answered: Option<i64>,
}

impl Reached {
    /// Notes how it is since a time. Times are to be given in the order of the ledger.
    pub fn note(&mut self, state: &Deployment, since: Timestamp) {
        if state.commit.is_none() {
            return;
        }
        let clusters = &state.request.clusters;
        let synced = clusters.iter().all(|cluster| {
            let there = state.clusters.get(cluster).map(|progress| progress.state);
            matches!(
                there,
                Some(ClusterState::Starting | ClusterState::Started | ClusterState::Degraded)
            )
        });
        let ready = state.workload_readiness.state == ReadinessState::Ready;
        let answered = state.endpoint_readiness.state == ReadinessState::Ready;
        for (reached, is_so) in [
            (&mut self.synced, synced && !clusters.is_empty()),
            (&mut self.ready, ready),
            (&mut self.answered, answered),
        ] {
            if is_so && reached.is_none() {
                *reached = Some(since.as_millisecond());
            }
        }
    }
}
