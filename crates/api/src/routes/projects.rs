//! Projects, services and environments.

use axum::extract::State;
use daybook_events::approval::ApprovalRule;
use daybook_events::deployment::SwitchMode;
use daybook_events::environment::{Environment, EnvironmentSpec, EnvironmentStatus};
use daybook_events::project::Project;
use daybook_events::spec::ServiceSpec;
use daybook_events::timer::KeepFor;
use daybook_events::{ClusterName, EnvironmentName, GitRef, ProjectName, ServiceName};
use schemars::JsonSchema;
use serde::Deserialize;

use crate::access::Principal;
use crate::answer::Answer;
use crate::extract::{Command, CommandBody, Named, NoParams, Params};
use crate::problem::Problem;
use crate::routes::deployments::Why;
use crate::state::AppState;
use crate::view::{
    EnvironmentList, EnvironmentView, ProjectList, ProjectView, ServiceList, ServiceView,
};

/// A project to be created.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct CreateProject {
    /// Its name: a DNS label of at most 30 characters.
    pub(crate) name: String,
    /// What it is, for people.
    pub(crate) description: Option<String>,
}
impl CommandBody for CreateProject {}

/// The definition of a service.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(transparent)]
pub(crate) struct DefineService(pub(crate) ServiceSpec);
impl CommandBody for DefineService {}

/// An environment to be created.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct CreateEnvironment {
    /// Its name: a DNS label of at most 30 characters.
    pub(crate) name: String,
    /// Clusters that deployments go to unless they name others; all that the server knows if none is named.
    #[serde(default)]
    pub(crate) clusters: Vec<ClusterName>,
    /// Whether its services answer on the project's live hostnames.
    #[serde(default)]
    pub(crate) live: bool,
    /// Whether traffic follows a new deployment by itself.
    #[serde(default)]
    pub(crate) switch: SwitchMode,
    /// Whether it goes away with its pull request.
    #[serde(default)]
    pub(crate) ephemeral: bool,
    /// How long a deployment is kept running that is no longer the main one; as the server says
    /// if not given.
    pub(crate) keep_old: Option<KeepFor>,
    /// How long a deployment is kept running that nobody asks for through the gateway; 24 hours for
    /// an ephemeral environment, and for ever for any other one, if not given.
    pub(crate) keep_idle: Option<KeepFor>,
    /// Who has to allow what is deployed to it; nobody if not given.
    pub(crate) approval: Option<ApprovalRule>,
    /// The environment that it is made from: whatever takes the traffic there is promoted.
    pub(crate) from: Option<EnvironmentName>,
    /// The branch whose pushes are deployed to it by themselves.
    pub(crate) auto_deploy: Option<GitRef>,
}
impl CommandBody for CreateEnvironment {}

/// What an environment is from now on.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(transparent)]
pub(crate) struct ChangeEnvironment(EnvironmentSpec);
impl CommandBody for ChangeEnvironment {}

/// What of an environment is to change: the fields that are given, and `null` for those that are to
/// be as if they had never been given (a JSON Merge Patch, RFC 7396). The others stay as they are.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(transparent)]
pub(crate) struct PatchEnvironment(serde_json::Map<String, serde_json::Value>);
impl CommandBody for PatchEnvironment {}

type Handled<T> = Result<Answer<T>, Problem>;

/// All projects, by name.
#[utoipa::path(get, path = "/api/v1/projects", tag = "projects",
    responses((status = 200, description = "The projects.", body = ProjectList)))]
pub(crate) async fn list_projects(
    State(state): State<AppState>,
    principal: Principal,
    Params(NoParams {}): Params<NoParams>,
) -> Handled<ProjectList> {
    let mut projects = state.projections().projects()?;
    projects.retain(|p| principal.sees(&p.name));
    Ok(Answer::ok(ProjectList {
        projects: projects.iter().map(ProjectView::from).collect(),
    }))
}

/// Creates a project.
#[utoipa::path(post, path = "/api/v1/projects", tag = "projects",
    request_body = CreateProject,
    responses((status = 201, description = "It is created.", body = ProjectView)))]
pub(crate) async fn create_project(
    State(state): State<AppState>,
    Params(NoParams {}): Params<NoParams>,
    Command { caller, body }: Command<CreateProject>,
) -> Handled<ProjectView> {
    let name = ProjectName::parse(body.name)?;
    let commands = &state.commands;
    let done = commands
        .create_project(&caller, name.clone(), body.description)
        .await?;
    let created: Project = commands.created(&done).await?;
    let location = format!("/api/v1/projects/{name}");
    Ok(Answer::done(&done, ProjectView::from(&created)).created(location))
}

/// One project.
#[utoipa::path(get, path = "/api/v1/projects/{project}", tag = "projects",
    params(("project" = String, Path, description = "The project.")),
    responses((status = 200, description = "The project.", body = ProjectView)))]
pub(crate) async fn get_project(
    State(state): State<AppState>,
    Named(name): Named<ProjectName>,
    Params(NoParams {}): Params<NoParams>,
) -> Handled<ProjectView> {
    let project = state.commands.project(&name)?;
    Ok(Answer::ok(ProjectView::from(&project)))
}

/// The services of a project, by name.
#[utoipa::path(get, path = "/api/v1/projects/{project}/services", tag = "projects",
    params(("project" = String, Path, description = "The project.")),
    responses((status = 200, description = "The services.", body = ServiceList)))]
pub(crate) async fn list_services(
    State(state): State<AppState>,
    Named(project): Named<ProjectName>,
    Params(NoParams {}): Params<NoParams>,
) -> Handled<ServiceList> {
    let services = state.commands.project(&project)?.services.into_iter();
    let view = |(name, spec)| ServiceView {
        project: project.clone(),
        name,
        spec,
    };
    Ok(Answer::ok(ServiceList {
        services: services.map(view).collect(),
    }))
}

/// One service.
#[utoipa::path(get, path = "/api/v1/projects/{project}/services/{service}", tag = "projects",
    params(
        ("project" = String, Path, description = "The project."),
        ("service" = String, Path, description = "The service."),
    ),
    responses((status = 200, description = "The service.", body = ServiceView)))]
pub(crate) async fn get_service(
    State(state): State<AppState>,
    Named((project, name)): Named<(ProjectName, ServiceName)>,
    Params(NoParams {}): Params<NoParams>,
) -> Handled<ServiceView> {
    let spec = state.commands.service(&project, &name)?;
    Ok(Answer::ok(ServiceView {
        project,
        name,
        spec,
    }))
}

/// Adds a service, or replaces its definition. Deployments that exist keep the one that they were
/// made with.
#[utoipa::path(put, path = "/api/v1/projects/{project}/services/{service}", tag = "projects",
    params(
        ("project" = String, Path, description = "The project."),
        ("service" = String, Path, description = "The service."),
    ),
    request_body = DefineService,
    responses((status = 200, description = "It is defined.", body = ServiceView)))]
pub(crate) async fn define_service(
    State(state): State<AppState>,
    Named((project, name)): Named<(ProjectName, ServiceName)>,
    Params(NoParams {}): Params<NoParams>,
    Command { caller, body }: Command<DefineService>,
) -> Handled<ServiceView> {
    let spec = body.0;
    let done = state
        .commands
        .define_service(&caller, project.clone(), name.clone(), spec.clone())
        .await?;
    let view = ServiceView {
        project,
        name,
        spec,
    };
    Ok(Answer::done(&done, view))
}

/// The environments of a project, by name.
#[utoipa::path(get, path = "/api/v1/projects/{project}/environments", tag = "projects",
    params(("project" = String, Path, description = "The project.")),
    responses((status = 200, description = "The environments.", body = EnvironmentList)))]
pub(crate) async fn list_environments(
    State(state): State<AppState>,
    Named(project): Named<ProjectName>,
    Params(NoParams {}): Params<NoParams>,
) -> Handled<EnvironmentList> {
    state.commands.project(&project)?;
    let environments = state.projections().environments(&project)?;
    let routing = state.projections().routing(&project)?;
    let gateway = &state.settings.gateway;
    let view = |e| EnvironmentView::from(e).with_urls(routing.as_ref(), gateway);
    Ok(Answer::ok(EnvironmentList {
        environments: environments
            .into_iter()
            .filter(|e| e.status != EnvironmentStatus::Deleted)
            .map(view)
            .collect(),
    }))
}

/// Creates an environment.
#[utoipa::path(post, path = "/api/v1/projects/{project}/environments", tag = "projects",
    params(("project" = String, Path, description = "The project.")),
    request_body = CreateEnvironment,
    responses((status = 201, description = "It is created.", body = EnvironmentView)))]
pub(crate) async fn create_environment(
    State(state): State<AppState>,
    Named(project): Named<ProjectName>,
    Params(NoParams {}): Params<NoParams>,
    Command { caller, body }: Command<CreateEnvironment>,
) -> Handled<EnvironmentView> {
    let name = EnvironmentName::parse(body.name)?;
    // An environment that names no cluster has all that this server knows.
    let clusters = if body.clusters.is_empty() {
        state.settings.known_clusters.clone()
    } else {
        body.clusters
    };
    let spec = EnvironmentSpec {
        clusters,
        live: body.live,
        switch: body.switch,
        ephemeral: body.ephemeral,
        keep_old: body.keep_old,
        keep_idle: body.keep_idle,
        approval: body.approval,
    };
    let commands = &state.commands;
    let done = commands
        .create_environment(
            &caller,
            project.clone(),
            name.clone(),
            spec,
            body.from,
            body.auto_deploy,
        )
        .await?;
    let created: Environment = commands.created(&done).await?;
    let location = format!("/api/v1/projects/{project}/environments/{name}");
    Ok(Answer::done(&done, EnvironmentView::from(created)).created(location))
}

/// One environment.
#[utoipa::path(get, path = "/api/v1/projects/{project}/environments/{environment}",
    tag = "projects",
    params(
        ("project" = String, Path, description = "The project."),
        ("environment" = String, Path, description = "The environment."),
    ),
    responses((status = 200, description = "The environment.", body = EnvironmentView)))]
pub(crate) async fn get_environment(
    State(state): State<AppState>,
    Named((project, name)): Named<(ProjectName, EnvironmentName)>,
    Params(NoParams {}): Params<NoParams>,
) -> Handled<EnvironmentView> {
    let environment = state.commands.environment(&project, &name)?;
    let routing = state.projections().routing(&project)?;
    let view = EnvironmentView::from(environment);
    let view = view.with_urls(routing.as_ref(), &state.settings.gateway);
    Ok(Answer::ok(view))
}

/// Replaces what an environment is. Deployments stay where they are.
#[utoipa::path(put, path = "/api/v1/projects/{project}/environments/{environment}",
    tag = "projects",
    params(
        ("project" = String, Path, description = "The project."),
        ("environment" = String, Path, description = "The environment."),
    ),
    request_body = ChangeEnvironment,
    responses((status = 200, description = "It is changed.", body = EnvironmentView)))]
pub(crate) async fn change_environment(
    State(state): State<AppState>,
    Named((project, name)): Named<(ProjectName, EnvironmentName)>,
    Params(NoParams {}): Params<NoParams>,
    Command { caller, body }: Command<ChangeEnvironment>,
) -> Handled<EnvironmentView> {
    let spec = body.0;
    let commands = &state.commands;
    let done = commands
        .change_environment(&caller, project.clone(), name.clone(), spec.clone())
        .await?;
    let changed = Environment {
        spec,
        ..commands.environment(&project, &name)?
    };
    Ok(Answer::done(&done, changed.into()))
}

/// Changes some of what an environment is. What is not named stays as it is, whoever changes it at
/// the same time.
#[utoipa::path(patch, path = "/api/v1/projects/{project}/environments/{environment}",
    tag = "projects",
    params(
        ("project" = String, Path, description = "The project."),
        ("environment" = String, Path, description = "The environment."),
    ),
    request_body = PatchEnvironment,
    responses((status = 200, description = "It is changed.", body = EnvironmentView)))]
pub(crate) async fn patch_environment(
    State(state): State<AppState>,
    Named((project, name)): Named<(ProjectName, EnvironmentName)>,
    Params(NoParams {}): Params<NoParams>,
    Command { caller, body }: Command<PatchEnvironment>,
) -> Handled<EnvironmentView> {
    let commands = &state.commands;
    let (done, changed) = commands
        .patch_environment(&caller, &project, &name, &body.0)
        .await?;
    Ok(Answer::done(&done, changed.into()))
}

/// Deletes an environment, with all that runs in it: routes first, processes then, and its folder
/// in the GitOps repository last. It is gone when it is not found any more; its history stays.
#[utoipa::path(delete, path = "/api/v1/projects/{project}/environments/{environment}",
    tag = "projects",
    params(
        ("project" = String, Path, description = "The project."),
        ("environment" = String, Path, description = "The environment."),
    ),
    request_body = Why,
    responses((status = 202, description = "It is being deleted.", body = EnvironmentView)))]
pub(crate) async fn delete_environment(
    State(state): State<AppState>,
    Named((project, name)): Named<(ProjectName, EnvironmentName)>,
    Params(NoParams {}): Params<NoParams>,
    Command { caller, body }: Command<Why>,
) -> Handled<EnvironmentView> {
    let (done, environment) = state
        .commands
        .delete_environment(&caller, project, name, body.reason)
        .await?;
    Ok(Answer::done(&done, environment.into()).accepted())
}
