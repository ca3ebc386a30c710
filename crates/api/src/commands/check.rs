//! What is checked before an aggregate is asked: bounds of texts, and names that must exist.

use daybook_events::environment::{Environment, EnvironmentStatus};
use daybook_events::project::Project;
use daybook_events::spec::{RunSpec, ServiceSpec};
use daybook_events::{
    ClusterName, DeploymentId, EnvironmentName, InstanceRef, ProjectName, Refusal, ServiceName,
};
use daybook_projections::DeploymentRow;

use super::{CommandError, Commands, denied_project};
use crate::access::{Over, Principal, Verb, authorise};

/// Most characters of a description or a reason.
const TEXT_MAX: usize = 1000;
/// Longest readiness deadline, in seconds.
const DEADLINE_MAX: u32 = 3600;

/// A reason that has to be given.
pub(super) fn given(reason: Option<String>) -> Result<String, Refusal> {
    let given = reason.filter(|r| !r.trim().is_empty());
    given.ok_or_else(|| {
        Refusal::new(
            "reason_required",
            "it is not said why",
            "give a reason: it stays on record",
        )
    })
}

impl Commands {
    pub(crate) fn project(&self, name: &ProjectName) -> Result<Project, CommandError> {
        let found = self.ledger.projections().project(name)?;
        Ok(found.ok_or_else(|| project_not_found(name))?)
    }

    /// A project that a principal may see.
    pub(crate) fn project_seen(
        &self,
        principal: &Principal,
        name: &ProjectName,
    ) -> Result<Project, CommandError> {
        authorise(principal, Verb::Read, Over::Project(name))
            .map_err(|d| denied_project(d, name))?;
        self.project(name)
    }

    pub(crate) fn environment(
        &self,
        project: &ProjectName,
        name: &EnvironmentName,
    ) -> Result<Environment, CommandError> {
        let found = self.ledger.projections().environment(project, name)?;
        let found = found.filter(|e| e.status != EnvironmentStatus::Deleted);
        Ok(found.ok_or_else(|| environment_not_found(project, name))?)
    }

    pub(crate) fn service(
        &self,
        project: &ProjectName,
        name: &ServiceName,
    ) -> Result<ServiceSpec, CommandError> {
        let found = self.project(project)?.services.remove(name);
        Ok(found.ok_or_else(|| service_not_found(project, name))?)
    }

    /// The service's definition and the environment of an instance.
    pub(crate) fn instance(
        &self,
        instance: &InstanceRef,
    ) -> Result<(ServiceSpec, Environment), CommandError> {
        let service = self.service(&instance.project, &instance.service)?;
        let environment = self.environment(&instance.project, &instance.environment)?;
        Ok((service, environment))
    }

    /// The same of an instance that can be deployed to.
    pub(super) fn deployable(
        &self,
        instance: &InstanceRef,
    ) -> Result<(ServiceSpec, Environment), CommandError> {
        let (service, environment) = self.instance(instance)?;
        environment.must_be_active()?;
        Ok((service, environment))
    }

    pub(crate) fn deployment(&self, id: DeploymentId) -> Result<DeploymentRow, CommandError> {
        let found = self.ledger.projections().deployment(id)?;
        Ok(found.ok_or_else(|| deployment_not_found(id))?)
    }

    /// Refuses clusters that are named twice or are none of this installation's.
    pub(super) fn clusters(&self, clusters: &[ClusterName]) -> Result<(), Refusal> {
        let known = &self.settings.known_clusters;
        for (i, cluster) in clusters.iter().enumerate() {
            if clusters[..i].contains(cluster) {
                return Err(Refusal::new(
                    "duplicate_cluster",
                    format!("the cluster {cluster} is named twice"),
                    "name each cluster once",
                ));
            }
            if !known.is_empty() && !known.contains(cluster) {
                let names: Vec<_> = known.iter().map(ClusterName::as_str).collect();
                return Err(Refusal::new(
                    "unknown_cluster",
                    format!("there is no cluster {cluster}"),
                    format!("use one of: {}", names.join(", ")),
                ));
            }
        }
        Ok(())
    }
}

pub(super) fn project_not_found(name: &ProjectName) -> Refusal {
    Refusal::new(
        "project_not_found",
        format!("there is no project {name}"),
        format!("create it with `daybook project create {name}`, or POST /api/v1/projects"),
    )
}

pub(super) fn environment_not_found(project: &ProjectName, name: &EnvironmentName) -> Refusal {
    Refusal::new(
        "environment_not_found",
        format!("the project {project} has no environment {name}"),
        format!(
            "create it with `daybook env create {project} {name}`, or POST \
             /api/v1/projects/{project}/environments"
        ),
    )
}

fn service_not_found(project: &ProjectName, name: &ServiceName) -> Refusal {
    Refusal::new(
        "service_not_found",
        format!("the project {project} has no service {name}"),
        format!(
            "define it with `daybook service create {project} {name}`, or PUT \
             /api/v1/projects/{project}/services/{name}"
        ),
    )
}

pub(super) fn deployment_not_found(id: DeploymentId) -> Refusal {
    Refusal::new(
        "deployment_not_found",
        format!("there is no deployment {id}"),
        "list deployments with `daybook status` or GET /api/v1/deployments",
    )
}

/// Refuses texts that are empty, too long or contain control characters other than line breaks.
pub(super) fn text(what: &str, value: Option<&str>) -> Result<(), Refusal> {
    let Some(value) = value else { return Ok(()) };
    let fault = if value.trim().is_empty() {
        "is empty"
    } else if value.chars().count() > TEXT_MAX {
        "is too long"
    } else if value
        .chars()
        .any(|c| c.is_control() && !matches!(c, '\n' | '\t'))
    {
        "contains control characters"
    } else {
        return Ok(());
    };
    Err(Refusal::new(
        "invalid_text",
        format!("the {what} {fault}"),
        format!("give 1 to {TEXT_MAX} characters of text, or leave the {what} out"),
    ))
}

/// What a service is defined as, by hand or by a template.
pub(super) fn service(spec: &ServiceSpec) -> Result<(), Refusal> {
    run(&spec.run)?;
    arguments("build command", &spec.build.command)
}

/// Refuses a definition that nothing could run.
pub(super) fn run(run: &RunSpec) -> Result<(), Refusal> {
    if run.replicas == 0 || run.replicas > 100 {
        return Err(Refusal::new(
            "invalid_replicas",
            format!("{} replicas are not possible", run.replicas),
            "ask for 1 to 100; use `daybook stop` to run none",
        ));
    }
    if run.port == 0 {
        return Err(Refusal::new(
            "invalid_port",
            "port 0 cannot be listened on",
            "use a port from 1 to 65535",
        ));
    }
    let health = &run.health;
    if !(health.path.is_empty() || health.path.starts_with('/'))
        || health.path.len() > 1024
        || !health.path.bytes().all(|b| b.is_ascii_graphic())
    {
        return Err(Refusal::new(
            "invalid_health_path",
            format!("{:?} is not a path to ask for readiness", health.path),
            "start it with a slash and percent-encode it, or leave it empty to ask for a \
             connection only",
        ));
    }
    if health.deadline_seconds == 0 || health.deadline_seconds > DEADLINE_MAX {
        return Err(Refusal::new(
            "invalid_health_deadline",
            format!(
                "{} seconds are no deadline for readiness",
                health.deadline_seconds
            ),
            format!("give 1 to {DEADLINE_MAX} seconds"),
        ));
    }
    arguments("command", &run.command)?;
    run.check_capacity()?;
    match run.env.iter().find(|(_, v)| v.contains('\0')) {
        Some((key, _)) => Err(Refusal::new(
            "invalid_env_value",
            format!("the value of {key} contains a NUL character"),
            "remove it; no process could be given it",
        )),
        None => Ok(()),
    }
}

/// Refuses a command line that no process could be started with.
fn arguments(what: &str, command: &[String]) -> Result<(), Refusal> {
    let fault = if command.first().is_some_and(|c| c.trim().is_empty()) {
        "starts with an empty program name"
    } else if command.iter().any(|a| a.contains('\0')) {
        "contains a NUL character"
    } else {
        return Ok(());
    };
    Err(Refusal::new(
        "invalid_command",
        format!("the {what} {fault}"),
        "give the program and its arguments, each as one text",
    ))
}
