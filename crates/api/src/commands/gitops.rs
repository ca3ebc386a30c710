//! What people decide about commits that Daybook did not make.

use daybook_events::gitops::{
    self, ForeignCommitAdopted, GitopsEvent, RevertRequested, RewriteAccepted,
};
use daybook_events::{CommitId, ProjectName, Subject};

use super::{Caller, CommandError, Commands, Done, check};
use crate::access::Verb;

impl Commands {
    /// Accepts a commit of somebody else, or a rewritten history that ends with it.
    pub async fn adopt_commit(
        &self,
        caller: &Caller,
        project: &ProjectName,
        commit: &CommitId,
        reason: Option<String>,
    ) -> Result<Done, CommandError> {
        self.admit(caller, Verb::Deploy, project)?;
        check::text("reason", reason.as_deref())?;
        self.project(project)?;
        let subject = Subject::Gitops(project.clone());
        self.run(caller, &subject, None, |state: Option<&gitops::Gitops>| {
            let rewritten = state.and_then(|s| s.rewritten.as_ref());
            let (commit, reason) = (commit.clone(), reason.clone());
            let event = if rewritten.is_some_and(|r| r.found == commit) {
                GitopsEvent::RewriteAccepted(RewriteAccepted { commit, reason })
            } else {
                GitopsEvent::ForeignCommitAdopted(ForeignCommitAdopted { commit, reason })
            };
            gitops::decide(state, event)
        })
        .await
    }

    /// Asks for a commit of somebody else to be undone.
    pub async fn revert_commit(
        &self,
        caller: &Caller,
        project: &ProjectName,
        commit: &CommitId,
        reason: Option<String>,
    ) -> Result<Done, CommandError> {
        self.admit(caller, Verb::Deploy, project)?;
        check::text("reason", reason.as_deref())?;
        self.project(project)?;
        let event = RevertRequested {
            commit: commit.clone(),
            reason,
        };
        self.run(caller, &Subject::Gitops(project.clone()), None, |state| {
            gitops::decide(state, GitopsEvent::RevertRequested(event.clone()))
        })
        .await
    }
}
