//! What can be done to one deployment.

use daybook_events::deployment::{
    self, CancelRequested, Deleted, Deployment, DeploymentEvent, OperationRequested, RetryRequested,
};
use daybook_events::timer::{self, KeepCause};
use daybook_events::{ClusterName, Decision, DeploymentId, Refusal};

use super::{Caller, CommandError, Commands, Done, check};
use crate::access::Verb;

/// An operation on one deployment that its own state decides about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Lifecycle {
    /// Give it up before it is live.
    Cancel,
    /// Scale it to zero.
    Stop,
    /// Scale it up again.
    Start,
    /// Remove what it runs.
    Terminate,
    /// Put its record away.
    Delete,
    /// Call off its scheduled stop.
    Keep,
}

impl Lifecycle {
    /// The status that a deployment is in right after the operation was accepted.
    pub fn leads_to(self) -> &'static str {
        match self {
            Self::Cancel => "cancelling",
            Self::Stop => "stopping",
            Self::Start => "starting",
            Self::Terminate => "terminating",
            Self::Delete => "deleted",
            Self::Keep => "kept",
        }
    }

    /// Decides on a deployment. `table` is the newest route table of its project.
    fn decide(
        self,
        state: Option<&Deployment>,
        table: Option<u32>,
        reason: Option<String>,
    ) -> Result<Decision<DeploymentEvent>, Refusal> {
        let requested = |reason| OperationRequested { reason };
        let event = match self {
            Self::Cancel => DeploymentEvent::CancelRequested(CancelRequested { reason }),
            Self::Stop => DeploymentEvent::StopRequested(requested(reason)),
            Self::Keep => return timer::keep(state, KeepCause::Asked, table, reason),
            // What runs and is to go on running is not to be stopped by itself.
            Self::Start if state.is_some_and(|s| s.due().is_some()) => {
                return timer::keep(state, KeepCause::Asked, table, reason);
            }
            Self::Start => DeploymentEvent::StartRequested(requested(reason)),
            Self::Terminate => DeploymentEvent::TerminateRequested(requested(reason)),
            Self::Delete => DeploymentEvent::Deleted(Deleted { reason }),
        };
        deployment::decide(state, event)
    }
}

/// An accepted operation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Operated {
    /// The deployment.
    pub id: DeploymentId,
    /// How it was recorded.
    pub done: Done,
}

impl Commands {
    /// Asks for an operation. It is accepted where the deployment's state allows it, and carried
    /// out by the workers then; an operation that is under way already is accepted and changes
    /// nothing.
    pub async fn operate(
        &self,
        caller: &Caller,
        id: DeploymentId,
        operation: Lifecycle,
        reason: Option<String>,
    ) -> Result<Operated, CommandError> {
        self.admit_to(caller, Verb::Deploy, id)?;
        check::text("reason", reason.as_deref())?;
        let row = self.deployment(id)?;
        let table = self.newest_table(&row.state.request.instance)?;
        let done = self
            .run(caller, &row.subject, Some(id.0), |state| {
                operation.decide(state, table, reason.clone())
            })
            .await?;
        Ok(Operated { id, done })
    }

    /// Asks that clusters where a deployment has failed try again: those that are named, or else
    /// all of them. Those where it is ready are left alone.
    pub async fn retry(
        &self,
        caller: &Caller,
        id: DeploymentId,
        clusters: Option<Vec<ClusterName>>,
        reason: Option<String>,
    ) -> Result<Operated, CommandError> {
        self.admit_to(caller, Verb::Deploy, id)?;
        check::text("reason", reason.as_deref())?;
        let subject = self.deployment(id)?.subject;
        let done = self
            .run(
                caller,
                &subject,
                Some(id.0),
                |state: Option<&Deployment>| {
                    let failed = || {
                        let failed = state.map(Deployment::failed_clusters).into_iter().flatten();
                        failed.map(|f| f.cluster).collect()
                    };
                    let event = RetryRequested {
                        clusters: clusters.clone().unwrap_or_else(failed),
                        reason: reason.clone(),
                    };
                    deployment::decide(state, DeploymentEvent::RetryRequested(event))
                },
            )
            .await?;
        Ok(Operated { id, done })
    }
}
