//! What the fold tells those who act on it: which aggregates have changed.

use std::sync::Arc;

use daybook_events::Subject;
use tokio::sync::broadcast;
use tokio::sync::broadcast::error::{RecvError, TryRecvError};

/// How many batches a follower may be behind before it is told to look at everything.
const BEHIND: usize = 1024;

/// What has changed since a follower was told last. By then it is folded: queries show it.
#[derive(Debug, Clone)]
pub enum Change {
    /// These aggregates, each named once. Their events may have changed nothing.
    Of(Arc<[Subject]>),
    /// Any aggregate: the follower was too slow, or everything is folded anew.
    Any,
}

/// Follows the changes of the projections from the moment on at which it was made.
#[derive(Debug)]
pub struct Feed(broadcast::Receiver<Option<Arc<[Subject]>>>);

impl Feed {
    /// The next change; none once the projections are gone. Nothing is lost when the future is
    /// dropped.
    pub async fn next(&mut self) -> Option<Change> {
        match self.0.recv().await {
            Ok(Some(subjects)) => Some(Change::Of(subjects)),
            Ok(None) | Err(RecvError::Lagged(_)) => Some(Change::Any),
            Err(RecvError::Closed) => None,
        }
    }

    /// A change that has come already.
    pub fn next_now(&mut self) -> Option<Change> {
        match self.0.try_recv() {
            Ok(Some(subjects)) => Some(Change::Of(subjects)),
            Ok(None) | Err(TryRecvError::Lagged(_)) => Some(Change::Any),
            Err(TryRecvError::Empty | TryRecvError::Closed) => None,
        }
    }
}

/// Where the fold tells of changes.
#[derive(Debug)]
pub(crate) struct Feeds(broadcast::Sender<Option<Arc<[Subject]>>>);

impl Default for Feeds {
    fn default() -> Self {
        Self(broadcast::Sender::new(BEHIND))
    }
}

impl Feeds {
    pub(crate) fn follow(&self) -> Feed {
        Feed(self.0.subscribe())
    }

    pub(crate) fn tell<'a>(&self, subjects: impl Iterator<Item = &'a Subject>) {
        if self.0.receiver_count() > 0 {
            // Nobody may be left by now.
            let _ = self.0.send(Some(subjects.cloned().collect()));
        }
    }

    pub(crate) fn tell_any(&self) {
        let _ = self.0.send(None);
    }
}
