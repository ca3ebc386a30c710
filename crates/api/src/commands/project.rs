//! Projects, their services and their environments.

use daybook_events::environment::{self, EnvironmentEvent, EnvironmentSpec};
use daybook_events::project::{self, ProjectEvent};
use daybook_events::spec::ServiceSpec;
use daybook_events::{EnvironmentName, ProjectName, ServiceName, Subject};

use super::{Caller, CommandError, Commands, Done, check};

impl Commands {
    /// Creates a project.
    pub async fn create_project(
        &self,
        caller: &Caller,
        name: ProjectName,
        description: Option<String>,
    ) -> Result<Done, CommandError> {
        check::text("description", description.as_deref())?;
        let event = project::Created {
            name: name.clone(),
            description,
        };
        self.run(caller, &Subject::Project(name), None, |state| {
            project::decide(state, ProjectEvent::Created(event.clone()))
        })
        .await
    }

    /// Adds a service to a project, or replaces its definition. Deployments keep the definition
    /// that they were requested with.
    pub async fn define_service(
        &self,
        caller: &Caller,
        project: ProjectName,
        name: ServiceName,
        spec: ServiceSpec,
    ) -> Result<Done, CommandError> {
        check::run(&spec.run)?;
        check::arguments("build command", &spec.build.command)?;
        self.project(&project)?;
        let event = project::ServiceDefined { name, spec };
        self.run(caller, &Subject::Project(project), None, |state| {
            project::decide(state, ProjectEvent::ServiceDefined(Box::new(event.clone())))
        })
        .await
    }

    /// Creates an environment.
    pub async fn create_environment(
        &self,
        caller: &Caller,
        project: ProjectName,
        name: EnvironmentName,
        spec: EnvironmentSpec,
    ) -> Result<Done, CommandError> {
        self.clusters(&spec.clusters)?;
        self.project(&project)?;
        let subject = Subject::Environment(project.clone(), name.clone());
        let event = environment::Created {
            project,
            name,
            spec,
        };
        self.run(caller, &subject, None, |state| {
            environment::decide(state, EnvironmentEvent::Created(event.clone()))
        })
        .await
    }

    /// Replaces what an environment is. Deployments stay where they are.
    pub async fn change_environment(
        &self,
        caller: &Caller,
        project: ProjectName,
        name: EnvironmentName,
        spec: EnvironmentSpec,
    ) -> Result<Done, CommandError> {
        self.clusters(&spec.clusters)?;
        self.environment(&project, &name)?;
        let event = environment::Changed { spec };
        let subject = Subject::Environment(project, name);
        self.run(caller, &subject, None, |state| {
            environment::decide(state, EnvironmentEvent::Changed(event.clone()))
        })
        .await
    }
}
