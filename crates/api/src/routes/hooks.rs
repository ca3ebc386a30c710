//! Webhooks of a project, and their deliveries.

use axum::Extension;
use axum::body::Body;
use axum::extract::State;
use axum::http::{HeaderMap, StatusCode};
use daybook_events::hook::delivery::{self, Delivered, InvalidPayload};
use daybook_events::hook::{Hook, Provider};
use daybook_events::{Actor, Digest, EnvironmentName, GitRef, HookName, Position, ProjectName};
use daybook_secrets::SecretValue;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use zeroize::Zeroizing;

use crate::access::{Peer, too_many};
use crate::answer::Answer;
use crate::commands::{Caller, CommandError, HookWish, Received, RequestKey};
use crate::extract::{Command, CommandBody, Named, NoParams, Params, SecretCommand, read_at_most};
use crate::hooks::{self, DELIVERY_MAX, Envelope};
use crate::problem::Problem;
use crate::routes::secrets::Nothing;
use crate::state::AppState;
use crate::view::EnvironmentView;

/// The fewest bytes of a webhook's secret. Whoever knows a delivery can try to guess it.
const SECRET_MIN: usize = 16;

/// What a webhook is to be.
#[derive(Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct DefineHook {
    /// Who calls it: `github`, `gitlab` or `gitea` (also for Forgejo).
    provider: String,
    /// What its deliveries are signed with, at least 16 bytes. It is never answered or recorded.
    /// A webhook that is there keeps the one that it has if none is given.
    #[schemars(with = "Option<String>")]
    secret: Option<Zeroizing<String>>,
    /// The environment that those of pull requests are made from: whatever takes the traffic
    /// there is promoted into them. Empty ones if none is named.
    base: Option<String>,
    /// What their names begin with; `pr` if not given.
    prefix: Option<String>,
    /// Whether pull requests from other repositories get one. Their code is then built and run.
    #[serde(default)]
    forks: bool,
}

/// A webhook.
#[derive(Debug, Serialize, JsonSchema)]
pub(crate) struct HookView {
    /// The project.
    project: ProjectName,
    /// Its name.
    name: HookName,
    /// Who calls it.
    provider: Provider,
    /// The path of its address on this server.
    path: String,
    /// The environment that those of pull requests are made from.
    #[serde(skip_serializing_if = "Option::is_none")]
    base: Option<EnvironmentName>,
    /// What their names begin with.
    prefix: EnvironmentName,
    /// Whether pull requests from other repositories get one.
    forks: bool,
    /// The number of its secret, from 1.
    secret_version: u32,
}

/// The webhooks of a project.
#[derive(Debug, Serialize, JsonSchema)]
pub(crate) struct HookList {
    /// By name.
    hooks: Vec<HookView>,
}

/// A webhook was removed.
#[derive(Debug, Serialize, JsonSchema)]
pub(crate) struct HookRemovedView {
    /// The project.
    project: ProjectName,
    /// Its name.
    name: HookName,
}

/// What became of a delivery.
#[derive(Debug, Serialize, JsonSchema)]
pub(crate) struct DeliveryView {
    /// `accepted`: it is recorded and is carried out. `ignored`: there is nothing to be done.
    outcome: &'static str,
    /// Why there is nothing to be done, for programs; `accepted` otherwise.
    code: &'static str,
    /// The same in words.
    message: String,
    /// The environment of the pull request.
    #[serde(skip_serializing_if = "Option::is_none")]
    environment: Option<EnvironmentName>,
    /// The position of the event that records it.
    #[serde(skip_serializing_if = "Option::is_none")]
    position: Option<Position>,
}

/// Which branch's pushes are deployed.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct SetAutoDeploy {
    /// The branch; none for no pushes.
    branch: Option<String>,
}
impl CommandBody for SetAutoDeploy {}

type Handled<T> = Result<Answer<T>, Problem>;

fn view(project: &ProjectName, hook: Hook) -> HookView {
    HookView {
        path: format!("/api/v1/projects/{project}/hooks/{}", hook.name),
        project: project.clone(),
        name: hook.name,
        provider: hook.provider,
        base: hook.base,
        prefix: hook.prefix,
        forks: hook.forks,
        secret_version: hook.secret.version,
    }
}

/// The webhooks of a project, without their secrets.
#[utoipa::path(get, path = "/api/v1/projects/{project}/hooks", tag = "hooks",
    params(("project" = String, Path, description = "The project.")),
    responses((status = 200, description = "The webhooks.", body = HookList)))]
pub(crate) async fn list_hooks(
    State(state): State<AppState>,
    Named(project): Named<ProjectName>,
    Params(NoParams {}): Params<NoParams>,
) -> Handled<HookList> {
    let hooks = state.commands.project(&project)?.hooks;
    Ok(Answer::ok(HookList {
        hooks: hooks.into_values().map(|h| view(&project, h)).collect(),
    }))
}

/// Adds a webhook, or defines it anew. With a secret, the one before is void at once.
#[utoipa::path(put, path = "/api/v1/projects/{project}/hooks/{hook}", tag = "hooks",
    params(
        ("project" = String, Path, description = "The project."),
        ("hook" = String, Path, description = "The webhook."),
    ),
    request_body = DefineHook,
    responses((status = 200, description = "It is defined.", body = HookView)))]
pub(crate) async fn define_hook(
    State(state): State<AppState>,
    Named((project, name)): Named<(ProjectName, HookName)>,
    Params(NoParams {}): Params<NoParams>,
    command: SecretCommand<DefineHook>,
) -> Handled<HookView> {
    let commands = &state.commands;
    // The digest of the request is made with a key of the project, which has to be one.
    commands.project(&project)?;
    let caller = command
        .caller(&project, &**commands.secret_store()?)
        .await?;
    let body = &command.body;
    let wish = HookWish {
        name: name.clone(),
        provider: body.provider.parse()?,
        secret: body.secret.as_ref().map(secret).transpose()?,
        base: body.base.as_deref().map(str::parse).transpose()?,
        prefix: body.prefix.as_deref().unwrap_or("pr").parse()?,
        forks: body.forks,
    };
    let done = commands.define_hook(&caller, project.clone(), wish).await?;
    let hook = commands.hook(&project, &name)?;
    Ok(Answer::done(&done, view(&project, hook)))
}

fn secret(text: &Zeroizing<String>) -> Result<SecretValue, Problem> {
    let invalid = |code, message: String| {
        Problem::new(
            StatusCode::UNPROCESSABLE_ENTITY,
            code,
            message,
            format!("give {SECRET_MIN} random bytes or more; `daybook hook add` makes some"),
        )
    };
    let printable = text.bytes().all(|b| b.is_ascii_graphic());
    if text.len() < SECRET_MIN || !printable {
        return Err(invalid(
            "invalid_hook_secret",
            format!("the secret does not have {SECRET_MIN} visible ASCII characters or more"),
        ));
    }
    SecretValue::new(text.clone()).map_err(|e| invalid(e.code, e.to_string()))
}

/// Removes a webhook, and erases its secret. Environments of pull requests stay.
#[utoipa::path(delete, path = "/api/v1/projects/{project}/hooks/{hook}", tag = "hooks",
    params(
        ("project" = String, Path, description = "The project."),
        ("hook" = String, Path, description = "The webhook."),
    ),
    responses((status = 200, description = "It is removed.", body = HookRemovedView)))]
pub(crate) async fn remove_hook(
    State(state): State<AppState>,
    Named((project, name)): Named<(ProjectName, HookName)>,
    Params(NoParams {}): Params<NoParams>,
    Command { caller, .. }: Command<Nothing>,
) -> Handled<HookRemovedView> {
    let done = state
        .commands
        .remove_hook(&caller, project.clone(), name.clone())
        .await?;
    Ok(Answer::done(&done, HookRemovedView { project, name }))
}

/// Takes a delivery of the webhook's provider. It is answered when it is recorded, with 202, or
/// with 200 and a reason where there is nothing to be done.
#[utoipa::path(post, path = "/api/v1/projects/{project}/hooks/{hook}", tag = "hooks",
    params(
        ("project" = String, Path, description = "The project."),
        ("hook" = String, Path, description = "The webhook."),
    ),
    responses(
        (status = 202, description = "It is recorded and is carried out.", body = DeliveryView),
        (status = 200, description = "There is nothing to be done for it.", body = DeliveryView)))]
pub(crate) async fn deliver(
    State(state): State<AppState>,
    Named((project, name)): Named<(ProjectName, HookName)>,
    peer: Option<Extension<Peer>>,
    headers: HeaderMap,
    body: Body,
) -> Handled<DeliveryView> {
    let mut answered = receive(&state, &project, &name, &headers, body).await;
    if let Err((_, problem)) = &mut answered
        && problem.status() == StatusCode::UNAUTHORIZED
        && let Err(wait) = state
            .access
            .count_failure(peer.map(|Extension(peer)| peer.0))
    {
        *problem = too_many(wait);
    }
    let (provider, outcome) = match &answered {
        Ok((provider, Received::Accepted { .. })) => (Some(*provider), "accepted"),
        Ok((provider, Received::Ignored { code, .. })) => (Some(*provider), *code),
        Err((provider, problem)) => (*provider, problem.code()),
    };
    let provider = provider.map_or("unknown", Provider::as_str);
    state.metrics.delivered(provider, outcome);
    let (_, received) = answered.map_err(|(_, problem)| problem)?;
    Ok(match received {
        Received::Accepted {
            done,
            message,
            environment,
        } => {
            let body = DeliveryView {
                outcome: "accepted",
                code: "accepted",
                message,
                environment,
                position: done.event,
            };
            Answer::done(&done, body).accepted()
        }
        Received::Ignored { code, message } => Answer::ok(DeliveryView {
            outcome: "ignored",
            code,
            message,
            environment: None,
            position: None,
        }),
    })
}

type Refused = (Option<Provider>, Problem);

async fn receive(
    state: &AppState,
    project: &ProjectName,
    name: &HookName,
    headers: &HeaderMap,
    body: Body,
) -> Result<(Provider, Received), Refused> {
    let commands = &state.commands;
    let unknown = |e: Problem| (None, e);
    let body = read_at_most(body, DELIVERY_MAX).await.map_err(unknown)?;
    let hook = commands.hook(project, name).map_err(|e| match e {
        CommandError::Refused(_) => unknown(hooks::not_signed()),
        e => unknown(e.into()),
    })?;
    let provider = hook.provider;
    let refused = |e: Problem| (Some(provider), e);
    let secret = commands.hook_secret(project, &hook).await;
    let secret = secret.map_err(|e| match e {
        CommandError::Refused(refusal) => {
            tracing::warn!(%project, hook = %name, code = refusal.code, "{}", refusal.message);
            refused(hooks::not_signed())
        }
        e => refused(e.into()),
    })?;
    hooks::verify(provider, &secret, headers, &body).map_err(refused)?;
    let envelope = Envelope::of(provider, headers).map_err(refused)?;
    let delivered = delivery::parse(provider, &envelope.event, &body)
        .map_err(|e| refused(unreadable(headers, &e)))?;
    let digest = Digest::of(&body).to_string();
    let id = envelope.id.as_deref().unwrap_or(&digest);
    let same = Actor {
        kind: "webhook".into(),
        id: name.to_string(),
    };
    let operation = format!("POST /api/v1/projects/{project}/hooks/{name}");
    let caller = Caller {
        key: Some(RequestKey::new(&same, &operation, id, digest.clone())),
        ..Caller::new(actor(&delivered, name))
    };
    let received = commands.receive(&caller, project, &hook, delivered).await;
    Ok((provider, received.map_err(|e| refused(e.into()))?))
}

/// The account that a delivery names: its provider knows who that is.
fn actor(delivered: &Delivered, hook: &HookName) -> Actor {
    let sender = match delivered {
        Delivered::PullRequest(delivery) => delivery.sender.as_deref(),
        Delivered::Push(push) => push.sender.as_deref(),
        Delivered::Other { .. } => None,
    };
    let plain = |c: char| match c {
        c if c.is_ascii_alphanumeric() || "._-".contains(c) => c,
        _ => '-',
    };
    let id: String = sender
        .unwrap_or_default()
        .chars()
        .take(64)
        .map(plain)
        .collect();
    Actor {
        kind: "webhook".into(),
        id: if id.is_empty() { hook.to_string() } else { id },
    }
}

fn unreadable(headers: &HeaderMap, error: &InvalidPayload) -> Problem {
    let form = headers
        .get("content-type")
        .and_then(|v| v.to_str().ok())
        .is_some_and(|v| v.starts_with("application/x-www-form-urlencoded"));
    match error {
        _ if form => Problem::new(
            StatusCode::UNSUPPORTED_MEDIA_TYPE,
            "unsupported_media_type",
            "the delivery is a form",
            "choose the content type application/json at the provider",
        ),
        InvalidPayload::Malformed(_) => Problem::new(
            StatusCode::BAD_REQUEST,
            "malformed_json",
            error.to_string(),
            "send one JSON object",
        ),
        InvalidPayload::Unfit(_) => Problem::new(
            StatusCode::UNPROCESSABLE_ENTITY,
            "invalid_payload",
            error.to_string(),
            "send the event as its provider documents it",
        ),
    }
}

/// From now on pushes to a branch are deployed to the environment by themselves, or no longer.
/// A deployment that was rolled back to stays: what is pushed then runs beside it.
#[utoipa::path(put, path = "/api/v1/projects/{project}/environments/{environment}/auto-deploy",
    tag = "hooks",
    params(
        ("project" = String, Path, description = "The project."),
        ("environment" = String, Path, description = "The environment."),
    ),
    request_body = SetAutoDeploy,
    responses((status = 200, description = "It is set.", body = EnvironmentView)))]
pub(crate) async fn set_auto_deploy(
    State(state): State<AppState>,
    Named((project, name)): Named<(ProjectName, EnvironmentName)>,
    Params(NoParams {}): Params<NoParams>,
    Command { caller, body }: Command<SetAutoDeploy>,
) -> Handled<EnvironmentView> {
    let branch = body.branch.map(GitRef::parse).transpose()?;
    let commands = &state.commands;
    let done = commands
        .set_auto_deploy(&caller, project.clone(), name.clone(), branch)
        .await?;
    let environment = commands.environment(&project, &name)?;
    Ok(Answer::done(&done, environment.into()))
}
