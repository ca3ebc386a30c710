//! The project aggregate: a project and its services.

use std::collections::BTreeMap;

use jiff::Timestamp;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::aggregate::{Aggregate, At, Decision, Illegal, Refusal, events};
use crate::envelope::Payload;
use crate::names::{ProjectName, ServiceName};
use crate::spec::ServiceSpec;
use crate::subject::AggregateKind;

/// A project was created.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Created {
    /// Its name.
    pub name: ProjectName,
    /// What it is, for people.
    pub description: Option<String>,
}

/// A service was added, or its definition replaced.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct ServiceDefined {
    /// Its name.
    pub name: ServiceName,
    /// The whole definition. Deployments take a snapshot of it when they are requested.
    pub spec: ServiceSpec,
}

events! {
    /// The events of a project.
    ProjectEvent {
        /// It was created.
        Created(Created) = "project.created.v1",
        /// A service was added or redefined.
        ServiceDefined(Box<ServiceDefined>) = "project.service_defined.v1",
    }
}

/// The state of a project.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Project {
    /// Its name.
    pub name: ProjectName,
    /// What it is.
    pub description: Option<String>,
    /// When it was created.
    pub created_at: Timestamp,
    /// Its services.
    pub services: BTreeMap<ServiceName, ServiceSpec>,
}

impl Aggregate for Project {
    type Event = ProjectEvent;
    const KIND: AggregateKind = AggregateKind::Project;

    fn first(event: ProjectEvent, at: At) -> Result<Self, Illegal> {
        match event {
            ProjectEvent::Created(e) => Ok(Self {
                name: e.name,
                description: e.description,
                created_at: at.time,
                services: BTreeMap::new(),
            }),
            other => Err(Illegal::new(other.kind(), "a project that does not exist")),
        }
    }

    fn apply(&mut self, event: ProjectEvent, _: At) -> Result<(), Illegal> {
        match event {
            ProjectEvent::Created(_) => {
                return Err(Illegal::new("project.created.v1", "a project that exists"));
            }
            ProjectEvent::ServiceDefined(e) => {
                self.services.insert(e.name, e.spec);
            }
        }
        Ok(())
    }
}

/// Decides whether `event` may be appended. Creating what exists already is refused; defining a
/// service exactly as it is changes nothing.
pub fn decide(
    state: Option<&Project>,
    event: ProjectEvent,
) -> Result<Decision<ProjectEvent>, Refusal> {
    match (state, &event) {
        (None, ProjectEvent::Created(_)) => Ok(Decision::Append(event)),
        (None, _) => Err(Refusal::new(
            "project_not_found",
            "there is no such project",
            "create it with `daybook project create NAME`",
        )),
        (Some(p), ProjectEvent::Created(_)) => Err(Refusal::new(
            "project_exists",
            format!("the project {} exists already", p.name),
            "use it, or choose another name",
        )),
        (Some(p), ProjectEvent::ServiceDefined(e)) => {
            if let Some(source) = &e.spec.source {
                crate::deployment::check_folder(&source.path)?;
            }
            if let Some(dockerfile) = &e.spec.build.dockerfile {
                crate::deployment::check_folder(dockerfile)?;
            }
            if p.services.get(&e.name) == Some(&e.spec) {
                Ok(Decision::Nothing)
            } else {
                Ok(Decision::Append(event))
            }
        }
    }
}
