//! The order of what is committed for one project by one process.
//!
//! Commits that wait at the same time are made together, and are recorded in the order in which
//! they stand on the branch: so the newest commit that the ledger knows has nothing in it that the
//! ledger does not know yet. A project's commits are made side by side, but for those whose plan
//! people have allowed: between the last look at such a plan and its commit nothing else is
//! committed here.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use daybook_events::ProjectName;
use tokio::sync::{OwnedRwLockReadGuard, OwnedRwLockWriteGuard, RwLock, watch};

use crate::ports::GitopsCommit;

/// How long the record of the commit before is waited for. It is given up when that takes
/// unusually long: the ledger tells the order by the commits' places in history, too.
const PATIENCE: Duration = Duration::from_secs(5);

/// The order of what is committed, by project. Clones share it.
#[derive(Debug, Clone, Default)]
pub struct Order(Arc<Mutex<HashMap<ProjectName, Arc<Project>>>>);

#[derive(Debug)]
struct Project {
    plans: Arc<RwLock<()>>,
    /// The place in history of the newest commit that was recorded, or given up.
    recorded: watch::Sender<u64>,
}

/// The right to commit.
#[derive(Debug)]
pub(super) enum Permit {
    /// Beside others.
    Shared { _guard: OwnedRwLockReadGuard<()> },
    /// Alone.
    Alone { _guard: OwnedRwLockWriteGuard<()> },
}

/// A commit's turn to be recorded. Those on top of it are recorded after it is dropped.
#[derive(Debug)]
pub(super) struct Turn {
    project: Arc<Project>,
    ordinal: u64,
}

impl Drop for Turn {
    fn drop(&mut self) {
        let ordinal = self.ordinal;
        self.project.recorded.send_if_modified(|newest| {
            let newer = ordinal > *newest;
            *newest = ordinal.max(*newest);
            newer
        });
    }
}

impl Order {
    fn of(&self, project: &ProjectName) -> Arc<Project> {
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let project = all.entry(project.clone()).or_insert_with(|| {
            Arc::new(Project {
                plans: Arc::default(),
                recorded: watch::Sender::new(0),
            })
        });
        project.clone()
    }

    /// Waits until something may be committed; `alone` for what must not change meanwhile.
    pub(super) async fn permit(&self, project: &ProjectName, alone: bool) -> Permit {
        let plans = self.of(project).plans.clone();
        if alone {
            Permit::Alone {
                _guard: plans.write_owned().await,
            }
        } else {
            Permit::Shared {
                _guard: plans.read_owned().await,
            }
        }
    }

    /// Waits until the commit before this one is recorded, if it was made in this process.
    pub(super) async fn turn(&self, project: &ProjectName, made: &GitopsCommit) -> Turn {
        let turn = Turn {
            project: self.of(project),
            // Nothing stands on what is no commit of its own.
            ordinal: if made.unchanged { 0 } else { made.ordinal },
        };
        if made.after_own {
            let mut recorded = turn.project.recorded.subscribe();
            // What changed nothing names a commit that may not be recorded yet itself.
            let awaited = made.ordinal.saturating_sub(u64::from(!made.unchanged));
            let before = recorded.wait_for(|newest| *newest >= awaited);
            let _ = tokio::time::timeout(PATIENCE, before).await;
        }
        turn
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use daybook_events::{CommitId, Digest};

    use super::*;

    fn commit(ordinal: u64, after_own: bool) -> GitopsCommit {
        GitopsCommit {
            commit: CommitId::parse(format!("{ordinal:040}")).unwrap(),
            parent: None,
            message: String::new(),
            author: String::new(),
            files: BTreeMap::new(),
            files_digest: Digest::of(b""),
            ordinal,
            ledger: None,
            signer: None,
            unchanged: false,
            after_own,
        }
    }

    #[tokio::test]
    async fn commits_are_recorded_in_their_order_whoever_comes_first() {
        let (order, shop) = (Order::default(), ProjectName::parse("shop").unwrap());
        let (told, mut heard) = tokio::sync::mpsc::channel(4);
        let mut tasks = Vec::new();
        for ordinal in [5, 3, 4, 2] {
            let (order, shop, told) = (order.clone(), shop.clone(), told.clone());
            tasks.push(tokio::spawn(async move {
                let _turn = order.turn(&shop, &commit(ordinal, ordinal > 2)).await;
                told.send(ordinal).await.unwrap();
            }));
            tokio::task::yield_now().await;
        }
        for expected in 2..=5 {
            assert_eq!(heard.recv().await, Some(expected));
        }
        for task in tasks {
            task.await.unwrap();
        }
    }

    #[tokio::test]
    async fn what_changed_nothing_is_recorded_after_the_commit_that_it_names() {
        let (order, shop) = (Order::default(), ProjectName::parse("shop").unwrap());
        let unchanged = GitopsCommit {
            unchanged: true,
            ..commit(5, true)
        };
        let turn = order.turn(&shop, &unchanged);
        tokio::pin!(turn);
        assert!(futures_util::poll!(&mut turn).is_pending());
        drop(order.turn(&shop, &commit(5, false)).await);
        drop(turn.await);
        // It stands for no commit: what follows that one goes on without it.
        assert_eq!(*order.of(&shop).recorded.borrow(), 5);
    }

    #[tokio::test]
    async fn what_needs_to_be_alone_waits_for_the_others_and_is_waited_for() {
        let (order, shop) = (Order::default(), ProjectName::parse("shop").unwrap());
        let shared = order.permit(&shop, false).await;
        let beside = order.permit(&shop, false).await;
        let alone = order.permit(&shop, true);
        tokio::pin!(alone);
        assert!(futures_util::poll!(&mut alone).is_pending());
        drop((shared, beside));
        let alone = alone.await;
        let next = order.permit(&shop, false);
        tokio::pin!(next);
        assert!(futures_util::poll!(&mut next).is_pending());
        drop(alone);
        next.await;
    }
}
