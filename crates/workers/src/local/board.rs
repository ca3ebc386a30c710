//! What is seen of an Application, put together from what its instances report.
//!
//! Only the board knows which revision is in force, and it takes over a new one together with
//! what that asks for. So a report about an older revision can come late, but never be taken for
//! one about the new revision.

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use daybook_events::{CommitId, DeploymentId, ServiceName};
use jiff::Timestamp;
use tokio::sync::watch;

use crate::target::{AppStatus, InstanceStatus, Problem, ReleaseStatus};

/// What is asked for, of one release.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Wanted {
    pub(super) service: ServiceName,
    pub(super) replicas: u32,
    /// Which instances are of the present specification.
    pub(super) generation: String,
}

/// What an instance reports.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Report {
    pub(super) generation: String,
    pub(super) address: String,
    pub(super) ready: bool,
    pub(super) restarts: u32,
    pub(super) started_at: Timestamp,
    pub(super) problem: Option<Problem>,
    /// How long the image took to be fetched, if this instance had to wait for that.
    pub(super) image_pull: Option<Duration>,
}

/// See the module.
#[derive(Debug, Default)]
pub(super) struct Board {
    state: Mutex<State>,
    status: watch::Sender<AppStatus>,
}

#[derive(Debug, Default)]
struct State {
    revision: Option<CommitId>,
    releases: BTreeMap<DeploymentId, Release>,
}

#[derive(Debug)]
struct Release {
    wanted: Wanted,
    /// By name.
    instances: BTreeMap<String, Report>,
}

impl Board {
    pub(super) fn watch(&self) -> watch::Receiver<AppStatus> {
        self.status.subscribe()
    }

    /// Takes over a revision. Releases that it does not list are wanted no more, and stay on the
    /// board until they are gone.
    pub(super) fn take_over(&self, revision: &CommitId, wanted: BTreeMap<DeploymentId, Wanted>) {
        self.change(|state| {
            state.revision = Some(revision.clone());
            for (id, release) in &mut state.releases {
                if !wanted.contains_key(id) {
                    release.wanted.replicas = 0;
                }
            }
            for (id, wanted) in wanted {
                state
                    .releases
                    .entry(id)
                    .and_modify(|r| r.wanted = wanted.clone())
                    .or_insert_with(|| Release {
                        wanted,
                        instances: BTreeMap::new(),
                    });
            }
        });
    }

    /// Puts a release on the board that is there, and that no revision asks for.
    pub(super) fn add_leftover(&self, deployment: DeploymentId, wanted: Wanted) {
        self.change(|state| {
            state.releases.entry(deployment).or_insert_with(|| Release {
                wanted,
                instances: BTreeMap::new(),
            });
        });
    }

    /// Takes a report. One about a release that is no longer there is ignored.
    pub(super) fn report(&self, deployment: DeploymentId, instance: &str, report: Report) {
        self.change(|state| {
            if let Some(release) = state.releases.get_mut(&deployment) {
                release.instances.insert(instance.to_owned(), report);
            }
        });
    }

    /// The instance is gone.
    pub(super) fn forget_instance(&self, deployment: DeploymentId, instance: &str) {
        self.change(|state| {
            if let Some(release) = state.releases.get_mut(&deployment) {
                release.instances.remove(instance);
            }
        });
    }

    /// The release is gone.
    pub(super) fn forget_release(&self, deployment: DeploymentId) {
        self.change(|state| {
            state.releases.remove(&deployment);
        });
    }

    /// Whether as many instances of the present specification are ready as are wanted.
    pub(super) fn is_complete(&self, deployment: DeploymentId) -> bool {
        let state = self.lock();
        state.releases.get(&deployment).is_some_and(|release| {
            let current = |r: &&Report| r.ready && r.generation == release.wanted.generation;
            let ready = release.instances.values().filter(current).count();
            ready >= release.wanted.replicas as usize
        })
    }

    /// Whether an instance has said that it is ready.
    pub(super) fn is_ready(&self, deployment: DeploymentId, instance: &str) -> bool {
        let state = self.lock();
        let release = state.releases.get(&deployment);
        release.is_some_and(|r| r.instances.get(instance).is_some_and(|i| i.ready))
    }

    fn change(&self, act: impl FnOnce(&mut State)) {
        let mut state = self.lock();
        act(&mut state);
        // Sent under the lock, so that an older status never follows a newer one.
        let status = state.status();
        self.status.send_if_modified(|shown| {
            let changed = *shown != status;
            *shown = status;
            changed
        });
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn status(&self) -> AppStatus {
        // Before the first revision there is nothing that a status could be about.
        let Some(revision) = &self.revision else {
            return AppStatus::default();
        };
        let releases = self
            .releases
            .iter()
            .map(|(id, release)| ReleaseStatus {
                deployment: *id,
                service: release.wanted.service.clone(),
                revision: revision.clone(),
                wanted: release.wanted.replicas,
                instances: release.instances(),
                problem: release.problem(),
                image_pull: release.instances.values().find_map(|i| i.image_pull),
            })
            .collect();
        AppStatus {
            revision: Some(revision.clone()),
            releases,
            is_whole: true,
        }
    }
}

impl Release {
    fn instances(&self) -> Vec<InstanceStatus> {
        self.instances
            .iter()
            .map(|(name, report)| InstanceStatus {
                name: name.clone(),
                address: report.address.clone(),
                ready: report.ready,
                outdated: report.generation != self.wanted.generation,
                restarts: report.restarts,
                started_at: report.started_at,
            })
            .collect()
    }

    /// The worst of what the present instances report.
    fn problem(&self) -> Option<Problem> {
        if self.wanted.replicas == 0 {
            return None;
        }
        self.instances
            .values()
            .filter(|r| r.generation == self.wanted.generation)
            .filter_map(|r| r.problem.as_ref())
            .min_by_key(|p| p.transient)
            .cloned()
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn commit(digit: &str) -> CommitId {
        CommitId::parse(digit.repeat(40)).unwrap()
    }

    fn wanted(generation: &str) -> Wanted {
        Wanted {
            service: ServiceName::parse("web").unwrap(),
            replicas: 1,
            generation: generation.into(),
        }
    }

    fn report(generation: &str) -> Report {
        Report {
            generation: generation.into(),
            address: "127.0.0.1:1".into(),
            ready: true,
            restarts: 0,
            started_at: Timestamp::UNIX_EPOCH,
            problem: None,
            image_pull: None,
        }
    }

    /// An instance of the old specification is ready when a revision with a new one comes: it
    /// still serves, but it is no success of the new revision.
    #[test]
    fn what_an_older_revision_asked_for_is_no_success_of_a_newer_one() {
        let board = Board::default();
        let id = DeploymentId(uuid::Uuid::new_v4());
        board.take_over(&commit("a"), BTreeMap::from([(id, wanted("one"))]));
        board.report(id, "web-1", report("one"));
        let status = board.watch();
        assert_eq!(status.borrow().releases[0].ready(), 1);
        assert!(board.is_complete(id));

        board.take_over(&commit("b"), BTreeMap::from([(id, wanted("two"))]));
        board.report(id, "web-1", report("one"));
        let shown = status.borrow().clone();
        assert_eq!(shown.revision, Some(commit("b")));
        assert_eq!(shown.releases[0].revision, commit("b"));
        assert_eq!(shown.releases[0].ready(), 0);
        assert!(shown.releases[0].instances[0].outdated);
        assert!(!board.is_complete(id));

        board.report(id, "web-2", report("two"));
        assert_eq!(status.borrow().releases[0].ready(), 1);
    }

    #[test]
    fn a_problem_that_waiting_does_not_mend_is_shown_first() {
        let board = Board::default();
        let id = DeploymentId(uuid::Uuid::new_v4());
        board.take_over(&commit("a"), BTreeMap::from([(id, wanted("one"))]));
        for (name, transient) in [("web-1", true), ("web-2", false)] {
            let problem = Problem::other(name, "", "", transient);
            let report = Report {
                problem: Some(problem),
                ..report("one")
            };
            board.report(id, name, report);
        }
        let status = board.watch().borrow().clone();
        assert_eq!(status.releases[0].problem.as_ref().unwrap().reason, "web-2");
    }
}
