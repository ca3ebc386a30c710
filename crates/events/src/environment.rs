//! The environment aggregate: where a project's services run.

use jiff::Timestamp;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::aggregate::{Aggregate, At, Decision, Illegal, Refusal, events};
use crate::deployment::SwitchMode;
use crate::envelope::Payload;
use crate::names::{ClusterName, EnvironmentName, ProjectName};
use crate::subject::AggregateKind;

/// What an environment is.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct EnvironmentSpec {
    /// Clusters that deployments go to unless they name others.
    #[serde(default)]
    pub clusters: Vec<ClusterName>,
    /// Whether its services answer on the project's live hostnames. One environment of a project
    /// usually does: production.
    #[serde(default)]
    pub live: bool,
    /// Whether traffic follows a new deployment by itself.
    #[serde(default)]
    pub switch: SwitchMode,
    /// Whether it goes away with its pull request.
    #[serde(default)]
    pub ephemeral: bool,
}

/// An environment was created.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Created {
    /// The project.
    pub project: ProjectName,
    /// Its name.
    pub name: EnvironmentName,
    /// What it is.
    pub spec: EnvironmentSpec,
}

/// Its definition was replaced.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Changed {
    /// What it is now.
    pub spec: EnvironmentSpec,
}

events! {
    /// The events of an environment.
    EnvironmentEvent {
        /// It was created.
        Created(Created) = "environment.created.v1",
        /// It was redefined.
        Changed(Changed) = "environment.changed.v1",
    }
}

/// The state of an environment.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Environment {
    /// The project.
    pub project: ProjectName,
    /// Its name.
    pub name: EnvironmentName,
    /// What it is.
    pub spec: EnvironmentSpec,
    /// When it was created.
    pub created_at: Timestamp,
}

impl Aggregate for Environment {
    type Event = EnvironmentEvent;
    const KIND: AggregateKind = AggregateKind::Environment;

    fn first(event: EnvironmentEvent, at: At) -> Result<Self, Illegal> {
        match event {
            EnvironmentEvent::Created(e) => Ok(Self {
                project: e.project,
                name: e.name,
                spec: e.spec,
                created_at: at.time,
            }),
            other => Err(Illegal::new(
                other.kind(),
                "an environment that does not exist",
            )),
        }
    }

    fn apply(&mut self, event: EnvironmentEvent, _: At) -> Result<(), Illegal> {
        match event {
            EnvironmentEvent::Created(_) => Err(Illegal::new(
                "environment.created.v1",
                "an environment that exists",
            )),
            EnvironmentEvent::Changed(e) => {
                self.spec = e.spec;
                Ok(())
            }
        }
    }
}

/// Decides whether `event` may be appended.
pub fn decide(
    state: Option<&Environment>,
    event: EnvironmentEvent,
) -> Result<Decision<EnvironmentEvent>, Refusal> {
    match (state, &event) {
        (None, EnvironmentEvent::Created(_)) => Ok(Decision::Append(event)),
        (None, _) => Err(Refusal::new(
            "environment_not_found",
            "there is no such environment",
            "create it with `daybook env create PROJECT NAME`",
        )),
        (Some(e), EnvironmentEvent::Created(_)) => Err(Refusal::new(
            "environment_exists",
            format!("the environment {} exists already", e.name),
            "use it, or choose another name",
        )),
        (Some(s), EnvironmentEvent::Changed(e)) if s.spec == e.spec => Ok(Decision::Nothing),
        (Some(_), _) => Ok(Decision::Append(event)),
    }
}
