//! Who allows what is deployed.
//!
//! On a server that asks for tokens the actor is the token's account, or the user of the identity
//! provider. On an open one it is who the caller says they are: approvals document a practice there,
//! and do not enforce it.

use daybook_events::approval::{
    Approval, ApprovalGranted, ApprovalRejected, EmergencyOverride, PostReviewCompleted,
};
use daybook_events::deployment::{self, Deployment, DeploymentEvent};
use daybook_events::{Decision, DeploymentId, Digest, Refusal};

use crate::access::Verb;

use super::{Caller, CommandError, Commands, Operated, check};

/// What somebody decides about a plan.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Verdict {
    /// It is allowed: the plan with this hash.
    Approve(Digest),
    /// It is not, and its deployment fails.
    Reject,
    /// It goes ahead without approvals, and is reviewed later.
    Override(Digest),
    /// What was done in an emergency was looked at.
    Review,
}

impl Verdict {
    /// A word for what has become of the deployment.
    pub fn leads_to(&self) -> &'static str {
        match self {
            Self::Approve(_) => "approved",
            Self::Reject => "rejected",
            Self::Override(_) => "overridden",
            Self::Review => "reviewed",
        }
    }

    /// What has to be allowed to whoever says so.
    fn verb(&self) -> Verb {
        match self {
            Self::Approve(_) | Self::Reject | Self::Review => Verb::Approve,
            Self::Override(_) => Verb::Override,
        }
    }

    fn event(self, who: String, reason: Option<String>) -> Result<DeploymentEvent, Refusal> {
        Ok(match self {
            Self::Approve(hash) => DeploymentEvent::ApprovalGranted(ApprovalGranted {
                hash,
                approver: who,
                reason,
            }),
            Self::Reject => DeploymentEvent::ApprovalRejected(ApprovalRejected {
                approver: who,
                reason: check::given(reason)?,
            }),
            Self::Override(hash) => DeploymentEvent::EmergencyOverride(EmergencyOverride {
                hash,
                by: who,
                reason: check::given(reason)?,
            }),
            Self::Review => DeploymentEvent::PostReviewCompleted(PostReviewCompleted {
                reviewer: who,
                reason,
            }),
        })
    }
}

/// A deployment whose plan was asked to be allowed.
pub(crate) fn approval(state: &Deployment) -> Result<&Approval, Refusal> {
    state.approval.as_deref().ok_or_else(|| {
        Refusal::new(
            "no_approval_asked_for",
            "nobody has to allow this deployment, or its plan is not known yet",
            "`daybook approvals list` shows what waits to be allowed",
        )
    })
}

impl Commands {
    /// Records what somebody decides about a deployment's plan.
    pub async fn decide_approval(
        &self,
        caller: &Caller,
        id: DeploymentId,
        verdict: Verdict,
        reason: Option<String>,
    ) -> Result<Operated, CommandError> {
        self.admit_to(caller, verdict.verb(), id)?;
        check::text("reason", reason.as_deref())?;
        let row = self.deployment(id)?;
        if row.state.emergencies().next().is_none() {
            approval(&row.state)?;
        }
        let event = verdict.event(caller.actor.id.clone(), reason)?;
        let done = self
            .run(
                caller,
                &row.subject,
                Some(id.0),
                |state: Option<&Deployment>| {
                    let decided = deployment::decide(state, event.clone())?;
                    Ok::<Decision<DeploymentEvent>, Refusal>(decided)
                },
            )
            .await?;
        Ok(Operated { id, done })
    }
}
