//! What can be done to one deployment.

use daybook_events::DeploymentId;
use daybook_events::deployment::{
    self, CancelRequested, Deleted, DeploymentEvent, OperationRequested,
};

use super::{Caller, CommandError, Commands, Done, check};

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
        }
    }

    fn event(self, reason: Option<String>) -> DeploymentEvent {
        match self {
            Self::Cancel => DeploymentEvent::CancelRequested(CancelRequested { reason }),
            Self::Stop => DeploymentEvent::StopRequested(OperationRequested { reason }),
            Self::Start => DeploymentEvent::StartRequested(OperationRequested { reason }),
            Self::Terminate => DeploymentEvent::TerminateRequested(OperationRequested { reason }),
            Self::Delete => DeploymentEvent::Deleted(Deleted { reason }),
        }
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
        check::text("reason", reason.as_deref())?;
        let subject = self.deployment(id)?.subject;
        let event = operation.event(reason);
        let done = self
            .run(caller, &subject, Some(id.0), |state| {
                deployment::decide(state, event.clone())
            })
            .await?;
        Ok(Operated { id, done })
    }
}
