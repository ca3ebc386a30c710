//! Reading payloads for the folds, each once and by the aggregate that its subject names.

use daybook_events::build::BuildEvent;
use daybook_events::deployment::DeploymentEvent;
use daybook_events::envelope::DecodeError;
use daybook_events::environment::EnvironmentEvent;
use daybook_events::gitops::GitopsEvent;
use daybook_events::ledger::LedgerEvent;
use daybook_events::project::ProjectEvent;
use daybook_events::routing::RoutingEvent;
use daybook_events::{AggregateKind, EventView, Subject};

/// A payload, or the reason why it could not be read.
pub(crate) enum Payload {
    Project(Result<ProjectEvent, DecodeError>),
    Environment(Result<EnvironmentEvent, DecodeError>),
    Build(Result<BuildEvent, DecodeError>),
    Deployment(Result<DeploymentEvent, DecodeError>),
    Gitops(Result<GitopsEvent, DecodeError>),
    Routing(Result<RoutingEvent, DecodeError>),
    Ledger(Result<LedgerEvent, DecodeError>),
    /// The aggregate is of a newer version.
    Other,
}

/// Reads the payload of an event on a subject.
pub(crate) fn payload(subject: &Subject, event: &EventView<'_>) -> Payload {
    match subject.kind() {
        Some(AggregateKind::Project) => Payload::Project(event.payload()),
        Some(AggregateKind::Environment) => Payload::Environment(event.payload()),
        Some(AggregateKind::Build) => Payload::Build(event.payload()),
        Some(AggregateKind::Deployment) => Payload::Deployment(event.payload()),
        Some(AggregateKind::Gitops) => Payload::Gitops(event.payload()),
        Some(AggregateKind::Routing) => Payload::Routing(event.payload()),
        Some(AggregateKind::Ledger) => Payload::Ledger(event.payload()),
        None => Payload::Other,
    }
}
