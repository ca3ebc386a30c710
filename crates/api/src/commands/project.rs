//! Projects, their services and their environments.

use daybook_events::environment::{self, Environment, EnvironmentEvent, EnvironmentSpec};
use daybook_events::project::{self, ProjectEvent};
use daybook_events::spec::ServiceSpec;
use daybook_events::upload::SourceUploaded;
use daybook_events::{
    EnvironmentName, GitRef, ProjectName, Refusal, RepositoryUrl, ServiceName, Subject,
};
use serde_json::Value;

use super::{Caller, CommandError, Commands, Done, check};
use crate::access::Verb;

impl Commands {
    /// Creates a project.
    pub async fn create_project(
        &self,
        caller: &Caller,
        name: ProjectName,
        description: Option<String>,
    ) -> Result<Done, CommandError> {
        self.admit(caller, Verb::Administer, &name)?;
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
        self.admit(caller, Verb::Configure, &project)?;
        let event = project::GitopsRemoteChanged { url };
        self.run(caller, &Subject::Project(project), None, |state| {
            project::decide(state, ProjectEvent::GitopsRemoteChanged(event.clone()))
        })
        .await
    }

    /// Records that the content of a folder was uploaded for a service.
    pub(crate) async fn record_upload(
        &self,
        caller: &Caller,
        project: &ProjectName,
        event: SourceUploaded,
    ) -> Result<Done, CommandError> {
        self.admit(caller, Verb::Deploy, project)?;
        self.run(caller, &Subject::Project(project.clone()), None, |state| {
            project::decide(state, ProjectEvent::SourceUploaded(event.clone()))
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
        self.admit(caller, Verb::Deploy, &project)?;
        check::service(&spec)?;
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
        self.admit(caller, Verb::Configure, &project)?;
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
        self.admit(caller, Verb::Configure, &project)?;
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
        self.admit(caller, Verb::Configure, &project)?;
        self.clusters(&spec.clusters)?;
        self.environment(&project, &name)?;
        let event = environment::Changed { spec };
        let subject = Subject::Environment(project, name);
        self.run(caller, &subject, None, |state| {
            environment::decide(state, EnvironmentEvent::Changed(event.clone()))
        })
        .await
    }
    /// Changes some of what an environment is, and leaves the rest as it is when this is decided: a
    /// JSON Merge Patch (RFC 7396).
    pub async fn patch_environment(
        &self,
        caller: &Caller,
        project: &ProjectName,
        name: &EnvironmentName,
        patch: &Fields,
    ) -> Result<(Done, Environment), CommandError> {
        self.admit(caller, Verb::Configure, project)?;
        let found = self.environment(project, name)?;
        self.clusters(&patched(&found.spec, patch)?.clusters)?;
        let subject = Subject::Environment(project.clone(), name.clone());
        let done = self
            .run(caller, &subject, None, |state: Option<&Environment>| {
                let before = state.map(|s| s.spec.clone()).unwrap_or_default();
                let spec = patched(&before, patch)?;
                environment::decide(
                    state,
                    EnvironmentEvent::Changed(environment::Changed { spec }),
                )
            })
            .await?;
        Ok((done, self.environment(project, name)?))
    }
}

type Fields = serde_json::Map<String, Value>;

fn patched(spec: &EnvironmentSpec, patch: &Fields) -> Result<EnvironmentSpec, Refusal> {
    let refused = |e: serde_json::Error| {
        Refusal::new(
            "invalid_environment",
            format!("the environment cannot be changed so: {e}"),
            "GET /openapi.json says what an environment consists of",
        )
    };
    let mut whole = serde_json::to_value(spec).map_err(refused)?;
    merge(&mut whole, patch);
    serde_json::from_value(whole).map_err(refused)
}

/// RFC 7396, section 2.
fn merge(target: &mut Value, patch: &Fields) {
    if !target.is_object() {
        *target = Value::Object(Fields::new());
    }
    let Some(target) = target.as_object_mut() else {
        return;
    };
    for (key, value) in patch {
        match value {
            Value::Null => drop(target.remove(key)),
            Value::Object(patch) => merge(target.entry(key.clone()).or_insert(Value::Null), patch),
            value => drop(target.insert(key.clone(), value.clone())),
        }
    }
}
