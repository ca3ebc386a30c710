//! Secret variables of a project. Values come in and never go out.

use axum::extract::State;
use daybook_events::secret::{Secret, SecretId, SecretScope};
use daybook_events::{EnvKey, ProjectName};
use daybook_secrets::{InvalidValue, SecretValue};
use schemars::JsonSchema;
use serde::Deserialize;
use utoipa::IntoParams;
use zeroize::Zeroizing;

use crate::answer::Answer;
use crate::commands::Done;
use crate::extract::{Command, CommandBody, Named, NoParams, Params, SecretCommand};
use crate::problem::Problem;
use crate::state::AppState;
use crate::view::{SecretChanged, SecretList, SecretVerified, SecretView, SecretsErased};

/// The value of a secret, and whom it is for.
#[derive(Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct SetSecret {
    /// The value: 6 bytes to 32 KiB of text without NUL. It is never answered or recorded.
    #[schemars(with = "String")]
    value: Zeroizing<String>,
    /// Only deployments to this environment get it.
    environment: Option<String>,
    /// Only deployments of this service get it.
    service: Option<String>,
}

/// A value to be compared with what is committed to.
#[derive(Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct VerifySecret {
    /// The value.
    #[schemars(with = "String")]
    value: Zeroizing<String>,
    /// The environment that the secret is for.
    environment: Option<String>,
    /// The service that it is for.
    service: Option<String>,
    /// The version to compare with; the newest if not given.
    version: Option<u32>,
}

/// Which secret of a name is meant.
#[derive(Debug, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
#[serde(deny_unknown_fields)]
pub(crate) struct SecretQuery {
    /// The environment that it is for.
    environment: Option<String>,
    /// The service that it is for.
    service: Option<String>,
    /// Whether its values are erased too. Deployments that still run with it cannot be started
    /// again then, and their output is no longer masked against it.
    #[serde(default)]
    erase: bool,
}

/// No body.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Nothing {}
impl CommandBody for Nothing {
    fn absent() -> Option<Self> {
        Some(Self {})
    }
}

type Handled<T> = Result<Answer<T>, Problem>;

fn secret_id(
    name: EnvKey,
    environment: Option<&String>,
    service: Option<&String>,
) -> Result<SecretId, Problem> {
    let scope = SecretScope {
        environment: environment.map(|e| e.parse()).transpose()?,
        service: service.map(|s| s.parse()).transpose()?,
    };
    Ok(SecretId { name, scope })
}

fn value(value: &Zeroizing<String>) -> Result<SecretValue, Problem> {
    SecretValue::new(value.clone()).map_err(|e: InvalidValue| {
        Problem::new(
            axum::http::StatusCode::UNPROCESSABLE_ENTITY,
            e.code,
            e.to_string(),
            "give 6 bytes to 32 KiB of text; what is shorter is better a plain variable",
        )
    })
}

async fn view(state: &AppState, secret: Secret) -> Result<SecretView, Problem> {
    let actor = state.commands.last_change(&secret).await?.actor();
    Ok(SecretView::new(secret, actor))
}

async fn changed(
    state: &AppState,
    project: &ProjectName,
    id: &SecretId,
    done: &Done,
) -> Handled<SecretChanged> {
    let secret = state.commands.secret(project, id)?;
    let body = SecretChanged {
        secret: view(state, secret).await?,
        changed: done.event.is_some() && !done.replayed,
    };
    Ok(Answer::done(done, body))
}

/// The secrets of a project that are set, without their values.
#[utoipa::path(get, path = "/api/v1/projects/{project}/secrets", tag = "secrets",
    params(("project" = String, Path, description = "The project.")),
    responses((status = 200, description = "The secrets.", body = SecretList)))]
pub(crate) async fn list_secrets(
    State(state): State<AppState>,
    Named(project): Named<ProjectName>,
    Params(NoParams {}): Params<NoParams>,
) -> Handled<SecretList> {
    let mut secrets = Vec::new();
    for secret in state.commands.secrets(&project)? {
        secrets.push(view(&state, secret).await?);
    }
    Ok(Answer::ok(SecretList { secrets }))
}

/// Gives a secret a value. Deployments that are asked for from now on get it; those that run keep
/// what they have.
#[utoipa::path(put, path = "/api/v1/projects/{project}/secrets/{name}", tag = "secrets",
    params(
        ("project" = String, Path, description = "The project."),
        ("name" = String, Path, description = "The variable that it becomes."),
    ),
    request_body = SetSecret,
    responses((status = 200, description = "It is set.", body = SecretChanged)))]
pub(crate) async fn set_secret(
    State(state): State<AppState>,
    Named((project, name)): Named<(ProjectName, EnvKey)>,
    Params(NoParams {}): Params<NoParams>,
    command: SecretCommand<SetSecret>,
) -> Handled<SecretChanged> {
    let body = &command.body;
    let id = secret_id(name, body.environment.as_ref(), body.service.as_ref())?;
    let value = value(&body.value)?;
    let commands = &state.commands;
    commands.project(&project)?;
    let store = commands.secret_store()?;
    let caller = command.caller(&project, &**store).await?;
    let done = commands
        .set_secret(&caller, project.clone(), id.clone(), &value)
        .await?;
    changed(&state, &project, &id, &done).await
}

/// Takes a secret away: deployments that are asked for from now on do not get it.
#[utoipa::path(delete, path = "/api/v1/projects/{project}/secrets/{name}", tag = "secrets",
    params(
        ("project" = String, Path, description = "The project."),
        ("name" = String, Path, description = "The variable that it becomes."),
        SecretQuery,
    ),
    responses((status = 200, description = "It is taken away.", body = SecretChanged)))]
pub(crate) async fn unset_secret(
    State(state): State<AppState>,
    Named((project, name)): Named<(ProjectName, EnvKey)>,
    Params(query): Params<SecretQuery>,
    Command { caller, .. }: Command<Nothing>,
) -> Handled<SecretChanged> {
    let id = secret_id(name, query.environment.as_ref(), query.service.as_ref())?;
    let done = state
        .commands
        .unset_secret(&caller, project.clone(), id.clone(), query.erase)
        .await?;
    changed(&state, &project, &id, &done).await
}

/// Takes all secrets of a project away and erases their values, of all versions, with the key of
/// their commitments. Nothing brings them back, and nobody can say any more whether a value is the
/// one that was committed to. Deployments that run with them cannot be started again.
#[utoipa::path(delete, path = "/api/v1/projects/{project}/secrets", tag = "secrets",
    params(("project" = String, Path, description = "The project.")),
    responses((status = 200, description = "They are erased.", body = SecretsErased)))]
pub(crate) async fn erase_secrets(
    State(state): State<AppState>,
    Named(project): Named<ProjectName>,
    Params(NoParams {}): Params<NoParams>,
    Command { caller, .. }: Command<Nothing>,
) -> Handled<SecretsErased> {
    let commands = &state.commands;
    let done = commands.erase_secrets(&caller, project.clone()).await?;
    Ok(Answer::done(&done, SecretsErased { project }))
}

/// Says whether a value is the one that a version of a secret is committed to.
#[utoipa::path(post, path = "/api/v1/projects/{project}/secrets/{name}/verify", tag = "secrets",
    params(
        ("project" = String, Path, description = "The project."),
        ("name" = String, Path, description = "The variable that it becomes."),
    ),
    request_body = VerifySecret,
    responses((status = 200, description = "The comparison.", body = SecretVerified)))]
pub(crate) async fn verify_secret(
    State(state): State<AppState>,
    Named((project, name)): Named<(ProjectName, EnvKey)>,
    Params(NoParams {}): Params<NoParams>,
    command: SecretCommand<VerifySecret>,
) -> Handled<SecretVerified> {
    let body = &command.body;
    let id = secret_id(
        name.clone(),
        body.environment.as_ref(),
        body.service.as_ref(),
    )?;
    let value = value(&body.value)?;
    let verified = state
        .commands
        .verify_secret(command.asker(), &project, &id, body.version, &value)
        .await?;
    Ok(Answer::ok(SecretVerified {
        name,
        version: verified.version,
        matches: verified.matches,
    }))
}
