//! Reading an event for the folds: the envelope once, the payload once.

use daybook_events::build::BuildEvent;
use daybook_events::deployment::DeploymentEvent;
use daybook_events::envelope::DecodeError;
use daybook_events::environment::EnvironmentEvent;
use daybook_events::gitops::GitopsEvent;
use daybook_events::project::ProjectEvent;
use daybook_events::routing::RoutingEvent;
use daybook_events::{AggregateKind, Event, Position, Recorded, Subject};
use jiff::Timestamp;

/// An event with its payload decoded, or with the reason why it could not be.
pub(crate) struct Decoded {
    pub(crate) position: Position,
    pub(crate) subject: Subject,
    pub(crate) stored_at: Timestamp,
    pub(crate) content: Result<Content, DecodeError>,
}

pub(crate) struct Content {
    pub(crate) event: Event,
    pub(crate) payload: Payload,
}

/// The payload, by the aggregate that its subject names.
pub(crate) enum Payload {
    Project(Result<ProjectEvent, DecodeError>),
    Environment(Result<EnvironmentEvent, DecodeError>),
    Build(Result<BuildEvent, DecodeError>),
    Deployment(Result<DeploymentEvent, DecodeError>),
    Gitops(Result<GitopsEvent, DecodeError>),
    Routing(Result<RoutingEvent, DecodeError>),
    /// The aggregate is of a newer version.
    Other,
}

pub(crate) fn decode(recorded: Recorded) -> Decoded {
    let content = recorded.event().map(|event| Content {
        payload: match recorded.subject.kind() {
            Some(AggregateKind::Project) => Payload::Project(event.payload()),
            Some(AggregateKind::Environment) => Payload::Environment(event.payload()),
            Some(AggregateKind::Build) => Payload::Build(event.payload()),
            Some(AggregateKind::Deployment) => Payload::Deployment(event.payload()),
            Some(AggregateKind::Gitops) => Payload::Gitops(event.payload()),
            Some(AggregateKind::Routing) => Payload::Routing(event.payload()),
            None => Payload::Other,
        },
        event,
    });
    Decoded {
        position: recorded.position,
        subject: recorded.subject,
        stored_at: recorded.stored_at,
        content,
    }
}
