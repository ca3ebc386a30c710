//! When an environment is frozen.

use axum::extract::State;
use daybook_events::freeze::{Freeze, FreezeRule};
use daybook_events::{DeploymentId, EnvironmentName, FreezeName, ProjectName};
use jiff::Timestamp;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::answer::Answer;
use crate::extract::{Command, CommandBody, Named, NoParams, Params};
use crate::problem::Problem;
use crate::routes::deployments::Why;
use crate::state::AppState;
use crate::view::{FreezeView, OperationAccepted};

type Handled<T> = Result<Answer<T>, Problem>;

/// A window in which an environment is frozen.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct DefineFreeze {
    /// When.
    pub(crate) rule: FreezeRule,
    /// Why, for those who have to wait.
    pub(crate) reason: Option<String>,
}
impl CommandBody for DefineFreeze {}

/// The windows of an environment.
#[derive(Debug, Serialize, JsonSchema)]
pub(crate) struct FreezeList {
    /// By name.
    pub(crate) freezes: Vec<FreezeView>,
}

/// The windows in which an environment is frozen, by name.
#[utoipa::path(get, path = "/api/v1/projects/{project}/environments/{environment}/freezes",
    tag = "freezes",
    params(
        ("project" = String, Path, description = "The project."),
        ("environment" = String, Path, description = "The environment."),
    ),
    responses((status = 200, description = "Its windows.", body = FreezeList)))]
pub(crate) async fn list_freezes(
    State(state): State<AppState>,
    Named((project, name)): Named<(ProjectName, EnvironmentName)>,
    Params(NoParams {}): Params<NoParams>,
) -> Handled<FreezeList> {
    let environment = state.commands.environment(&project, &name)?;
    let freezes = FreezeView::all(&environment.freezes, Timestamp::now());
    Ok(Answer::ok(FreezeList { freezes }))
}

/// Gives an environment a window in which it is frozen, or another one of that name. What is
/// deployed to it while one is open waits for its end.
#[utoipa::path(put, path = "/api/v1/projects/{project}/environments/{environment}/freezes/{freeze}",
    tag = "freezes",
    params(
        ("project" = String, Path, description = "The project."),
        ("environment" = String, Path, description = "The environment."),
        ("freeze" = String, Path, description = "The window."),
    ),
    request_body = DefineFreeze,
    responses((status = 200, description = "It has the window.", body = FreezeView)))]
pub(crate) async fn set_freeze(
    State(state): State<AppState>,
    Named((project, environment, name)): Named<(ProjectName, EnvironmentName, FreezeName)>,
    Params(NoParams {}): Params<NoParams>,
    Command { caller, body }: Command<DefineFreeze>,
) -> Handled<FreezeView> {
    let freeze = Freeze {
        rule: body.rule,
        reason: body.reason,
    };
    let view = FreezeView::new(&name, &freeze, Timestamp::now());
    let done = state
        .commands
        .set_freeze(&caller, project, environment, name, freeze)
        .await?;
    Ok(Answer::done(&done, view))
}

/// Takes a window away. What waits for its end goes on.
#[utoipa::path(delete, path = "/api/v1/projects/{project}/environments/{environment}/freezes/{freeze}",
    tag = "freezes",
    params(
        ("project" = String, Path, description = "The project."),
        ("environment" = String, Path, description = "The environment."),
        ("freeze" = String, Path, description = "The window."),
    ),
    request_body = Option<Why>,
    responses((status = 200, description = "It has the window no more.", body = FreezeGone)))]
pub(crate) async fn remove_freeze(
    State(state): State<AppState>,
    Named((project, environment, name)): Named<(ProjectName, EnvironmentName, FreezeName)>,
    Params(NoParams {}): Params<NoParams>,
    Command { caller, body }: Command<Why>,
) -> Handled<FreezeGone> {
    let done = state
        .commands
        .remove_freeze(&caller, project, environment, name.clone(), body.reason)
        .await?;
    Ok(Answer::done(&done, FreezeGone { name }))
}

/// A window that an environment has no more.
#[derive(Debug, Serialize, JsonSchema)]
pub(crate) struct FreezeGone {
    /// Its name.
    pub(crate) name: FreezeName,
}

/// Lets a deployment through the freeze that holds it, because it cannot wait. Somebody else has to
/// review that later.
#[utoipa::path(post, path = "/api/v1/deployments/{id}/override-freeze", tag = "freezes",
    params(("id" = String, Path, description = "The deployment.")),
    request_body = Why,
    responses((status = 200, description = "It goes on.", body = OperationAccepted)))]
pub(crate) async fn override_freeze(
    State(state): State<AppState>,
    Named(id): Named<DeploymentId>,
    Params(NoParams {}): Params<NoParams>,
    Command { caller, body }: Command<Why>,
) -> Handled<OperationAccepted> {
    let commands = &state.commands;
    let operated = commands.override_freeze(&caller, id, body.reason).await?;
    let status = "overridden";
    Ok(Answer::done(
        &operated.done,
        OperationAccepted { id, status },
    ))
}
