//! What went through the gateway.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, PoisonError};

use daybook_events::DeploymentId;

/// What a deployment has served.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Traffic {
    /// Requests that were routed to it.
    pub requests: u64,
    /// Those that got no whole answer of its own: no instance was ready or reachable, it did not
    /// answer in time, or the answer broke off. An error status of the application itself is an
    /// answer.
    pub failures: u64,
}

/// The counter of one deployment.
#[derive(Debug, Default)]
pub(super) struct Counter {
    requests: AtomicU64,
    failures: AtomicU64,
}

impl Counter {
    pub(super) fn request(&self) {
        self.requests.fetch_add(1, Relaxed);
    }
    pub(super) fn failure(&self) {
        self.failures.fetch_add(1, Relaxed);
    }
}

/// All counters.
#[derive(Debug, Default)]
pub(super) struct Counters {
    deployments: Mutex<BTreeMap<DeploymentId, Arc<Counter>>>,
    unrouted: AtomicU64,
}

impl Counters {
    pub(super) fn of(&self, deployment: DeploymentId) -> Arc<Counter> {
        let mut all = self
            .deployments
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        all.entry(deployment).or_default().clone()
    }

    pub(super) fn count_unrouted(&self) {
        self.unrouted.fetch_add(1, Relaxed);
    }

    pub(super) fn unrouted(&self) -> u64 {
        self.unrouted.load(Relaxed)
    }

    pub(super) fn read(&self) -> BTreeMap<DeploymentId, Traffic> {
        let all = self
            .deployments
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        all.iter()
            .map(|(id, counter)| {
                let traffic = Traffic {
                    requests: counter.requests.load(Relaxed),
                    failures: counter.failures.load(Relaxed),
                };
                (*id, traffic)
            })
            .collect()
    }
}
