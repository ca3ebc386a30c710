//! Which events may follow on which, without the states.
//!
//! What a verifier asks of a history is whether every event was allowed where it stands. For the
//! aggregates that there are many of, deployments and builds, that depends on little of their
//! state; this is that little. The rules are those of the aggregates themselves.

use crate::aggregate::{Void, count};
use crate::any::AnyPayload;
use crate::build;
use crate::check;
use crate::deployment;
use crate::envelope::DecodeError;
use crate::subject::AggregateKind;

/// An event, as far as it matters for which events may follow.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    /// Of a deployment.
    Deployment(deployment::Step),
    /// Of a build.
    Build(build::Step),
}

impl Step {
    /// Checks a payload of a type (without the common prefix) that is written as Daybook writes
    /// it. `None` says nothing about it, and [`AnyPayload::decode`] is to be asked; what is
    /// accepted here is accepted there, and is the same step.
    pub fn check(aggregate: AggregateKind, kind: &str, data: &str) -> Option<Self> {
        let step = check::check(kind, data)?;
        (step.aggregate() == aggregate).then_some(step)
    }

    /// The kind of aggregate that it belongs to.
    pub fn aggregate(self) -> AggregateKind {
        match self {
            Self::Deployment(_) => AggregateKind::Deployment,
            Self::Build(_) => AggregateKind::Build,
        }
    }

    /// The event's type (without the common prefix).
    pub fn kind(self) -> &'static str {
        match self {
            Self::Deployment(step) => step.kind(),
            Self::Build(step) => step.kind(),
        }
    }

    /// The step that a payload is, or why it could not be read; none if it belongs to an
    /// aggregate that has no outline.
    pub fn of(payload: &AnyPayload) -> Option<Result<Self, DecodeError>> {
        Some(match payload {
            AnyPayload::Deployment(Ok(event)) => Ok(Self::Deployment(event.into())),
            AnyPayload::Build(Ok(event)) => Ok(Self::Build(event.into())),
            AnyPayload::Deployment(Err(e)) | AnyPayload::Build(Err(e)) => Err(e.clone()),
            _ => return None,
        })
    }
}

/// An aggregate, as far as it decides which events count.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Outline {
    /// Revision of the last event that counted; 0 for none.
    revision: u32,
    standing: Standing,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Standing {
    Deployment(Option<deployment::Status>),
    Build(Option<build::Standing>),
}

impl Outline {
    /// An aggregate before its first event; none for a kind that has no outline.
    pub fn new(kind: AggregateKind) -> Option<Self> {
        let standing = match kind {
            AggregateKind::Deployment => Standing::Deployment(None),
            AggregateKind::Build => Standing::Build(None),
            _ => return None,
        };
        Some(Self {
            revision: 0,
            standing,
        })
    }

    /// Takes an event. It counts, or is void, exactly where
    /// [`AnyFolded::step`](crate::AnyFolded::step) says so.
    pub fn step(&mut self, revision: u32, step: Result<Step, DecodeError>) -> Result<(), Void> {
        let step = count(&mut self.revision, revision, step)?;
        match (&mut self.standing, step) {
            (Standing::Deployment(status), Step::Deployment(step)) => {
                *status = Some(step.follow(*status)?);
            }
            (Standing::Build(standing), Step::Build(step)) => {
                *standing = Some(step.follow(*standing)?);
            }
            (_, step) => return Err(Void::Unknown(step.kind().to_owned())),
        }
        Ok(())
    }
}
