//! Projects, their services and their environments.

use daybook_events::environment::{self, Environment, EnvironmentEvent, EnvironmentSpec};
use daybook_events::project::{self, ProjectEvent};
use daybook_events::spec::ServiceSpec;
use daybook_events::{EnvironmentName, GitRef, ProjectName, RepositoryUrl, ServiceName, Subject};

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

    /// Says where the commits of a project's GitOps repository are pushed from here on; nowhere
    /// without a URL.
    pub async fn change_gitops_remote(
        &self,
        caller: &Caller,
        project: ProjectName,
        url: Option<RepositoryUrl>,
    ) -> Result<Done, CommandError> {
        let event = project::GitopsRemoteChanged { url };
        self.run(caller, &Subject::Project(project), None, |state| {
            project::decide(state, ProjectEvent::GitopsRemoteChanged(event.clone()))
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

    /// Creates an environment. If it is made from another one, the workers promote into it what
    /// takes the traffic there.
    pub async fn create_environment(
        &self,
        caller: &Caller,
        project: ProjectName,
        name: EnvironmentName,
        spec: EnvironmentSpec,
        from: Option<EnvironmentName>,
        auto_deploy: Option<GitRef>,
    ) -> Result<Done, CommandError> {
        if let Some((done, _)) = self.earlier(caller).await? {
            return Ok(done);
        }
        self.clusters(&spec.clusters)?;
        self.project(&project)?;
        if let Some(from) = &from {
            self.environment(&project, from)?.must_be_active()?;
        }
        let subject = Subject::Environment(project.clone(), name.clone());
        let event = environment::Created {
            project,
            name,
            spec,
            from,
            auto_deploy,
        };
        self.run(caller, &subject, None, |state| {
            environment::decide(state, EnvironmentEvent::Created(event.clone()))
        })
        .await
    }

    /// Asks for the end of an environment. The workers remove what runs in it, and its folder in
    /// the GitOps repository then. Its history stays in the ledger.
    pub async fn delete_environment(
        &self,
        caller: &Caller,
        project: ProjectName,
        name: EnvironmentName,
        reason: Option<String>,
    ) -> Result<(Done, Environment), CommandError> {
        let done = match self.earlier(caller).await? {
            Some((done, _)) => done,
            None => {
                check::text("reason", reason.as_deref())?;
                self.environment(&project, &name)?;
                let event = environment::DeletionRequested { reason };
                let subject = Subject::Environment(project.clone(), name.clone());
                self.run(caller, &subject, None, |state| {
                    environment::decide(state, EnvironmentEvent::DeletionRequested(event.clone()))
                })
                .await?
            }
        };
        let found = self.ledger.projections().environment(&project, &name)?;
        let found = found.ok_or_else(|| check::environment_not_found(&project, &name))?;
        Ok((done, found))
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
