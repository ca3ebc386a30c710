//! Webhooks out: whom events are sent to.

use std::time::Duration;

use axum::extract::State;
use daybook_events::subscription::{
    DEFAULT_TRIES, Endpoint, EndpointUrl, Filter, Format, KindPattern, Pause, Subscription,
};
use daybook_events::{
    DeploymentId, EnvironmentName, EventId, Position, ProjectName, ServiceName, SubscriptionId,
};
use futures_util::stream::{self, StreamExt, TryStreamExt};
use jiff::Timestamp;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use utoipa::IntoParams;

use crate::access::Principal;
use crate::answer::Answer;
use crate::commands::{Done, OVERLAP, WithSecret, definition_tag};
use crate::extract::{Command, CommandBody, IfMatch, Named, NoParams, Params, deployment_id};
use crate::problem::Problem;
use crate::routes::deliveries::{RetryView, retrying};
use crate::routes::secrets::Nothing;
use crate::state::AppState;

/// How many webhooks' delivery logs one answer looks at, at once.
const AT_ONCE: usize = 8;

type Handled<T> = Result<Answer<T>, Problem>;

/// A webhook to be.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct CreateWebhook {
    /// Whose events are sent.
    project: String,
    /// What is sent where.
    #[serde(flatten)]
    endpoint: DefineWebhook,
    /// Only events after this position are sent: 0 for all, those to come if not given.
    after: Option<u64>,
}
impl CommandBody for CreateWebhook {}

/// What a webhook is to be.
#[derive(Debug, Deserialize, JsonSchema)]
pub(crate) struct DefineWebhook {
    /// Where events are sent: an https URL without user, query and fragment. It is kept in the
    /// ledger for ever: put no secret into it.
    url: String,
    /// As they are stored, or as CDEvents.
    #[serde(default)]
    format: Format,
    /// Only events of this environment.
    environment: Option<String>,
    /// Only events about this service.
    service: Option<String>,
    /// Only events of these types (`deployment.succeeded.v1`) or aggregates (`deployment`).
    #[serde(default)]
    kinds: Vec<String>,
    /// Only events of this deployment and of the run that it began.
    deployment: Option<String>,
    /// Whether each event carries the proof that it is in the signed ledger.
    #[serde(default)]
    proof: bool,
    /// How often each is tried before it is set aside: 1 to 20, 16 if not given.
    tries: Option<u32>,
}

/// What a webhook is to be instead.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct ChangeWebhook {
    /// What is sent where.
    #[serde(flatten)]
    endpoint: DefineWebhook,
}
impl CommandBody for ChangeWebhook {}

impl DefineWebhook {
    fn parse(self) -> Result<Endpoint, Problem> {
        let kinds = self.kinds.into_iter().map(|kind| {
            let prefix = daybook_events::envelope::TYPE_PREFIX;
            KindPattern::parse(kind.strip_prefix(prefix).unwrap_or(&kind))
        });
        Ok(Endpoint {
            url: EndpointUrl::parse(self.url)?,
            format: self.format,
            filter: Filter {
                environment: self.environment.map(EnvironmentName::parse).transpose()?,
                service: self.service.map(ServiceName::parse).transpose()?,
                kinds: kinds.collect::<Result<_, _>>()?,
                deployment: self.deployment.as_deref().map(deployment_id).transpose()?,
            },
            proof: self.proof,
            tries: self.tries.unwrap_or(DEFAULT_TRIES),
        })
    }
}

/// How a secret is exchanged.
#[derive(Debug, Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct RotateWebhook {
    /// For how many seconds deliveries are signed with the old one too: a day if not given.
    overlap_seconds: Option<u32>,
}
impl CommandBody for RotateWebhook {
    fn absent() -> Option<Self> {
        Some(Self::default())
    }
}

/// Which of the events that were set aside.
#[derive(Debug, Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct DeadLetterChoice {
    /// The positions of the events; all that were set aside if not given.
    positions: Option<Vec<u64>>,
}
impl CommandBody for DeadLetterChoice {
    fn absent() -> Option<Self> {
        Some(Self::default())
    }
}

impl DeadLetterChoice {
    fn positions(self) -> Option<Vec<Position>> {
        let named = self.positions?;
        Some(named.into_iter().map(Position).collect())
    }
}

/// An event that was set aside undelivered.
#[derive(Debug, Serialize, JsonSchema)]
pub(crate) struct DeadLetterView {
    /// Its position.
    position: Position,
    /// Its id.
    event: EventId,
    /// How often it was tried.
    tries: u32,
    /// What was wrong the last time.
    code: String,
    /// Since when it is set aside.
    since: Timestamp,
    /// Whether it is being sent again.
    replaying: bool,
}

/// A webhook. Its secret is never shown again.
#[derive(Debug, Serialize, JsonSchema)]
pub(crate) struct WebhookView {
    /// Its id.
    id: SubscriptionId,
    /// Whose events are sent.
    project: ProjectName,
    /// What is sent where.
    #[serde(flatten)]
    endpoint: EndpointView,
    /// Whether nothing is sent, and why.
    pause: Option<Pause>,
    /// The number of its secret, from 1.
    secret_version: u32,
    /// Until when deliveries are signed with the secret before, too.
    overlap_until: Option<Timestamp>,
    /// Only events after this position are sent.
    after: Position,
    /// When it was made.
    created_at: Timestamp,
    /// What was set aside undelivered, by position.
    dead_letters: Vec<DeadLetterView>,
    /// The entity tag of what is sent where: a change with it as `If-Match` is refused if that was
    /// defined anew meanwhile.
    etag: String,
}

/// What is sent where.
#[derive(Debug, Serialize, JsonSchema)]
pub(crate) struct EndpointView {
    /// Where events are sent.
    url: EndpointUrl,
    /// In which form.
    format: Format,
    /// Only events of this environment.
    environment: Option<EnvironmentName>,
    /// Only events about this service.
    service: Option<ServiceName>,
    /// Only events of these types or aggregates.
    kinds: Vec<KindPattern>,
    /// Only events of this deployment and of its run.
    deployment: Option<DeploymentId>,
    /// Whether each carries its proof.
    proof: bool,
    /// How often each is tried.
    tries: u32,
}

impl From<Endpoint> for EndpointView {
    fn from(e: Endpoint) -> Self {
        Self {
            url: e.url,
            format: e.format,
            environment: e.filter.environment,
            service: e.filter.service,
            kinds: e.filter.kinds,
            deployment: e.filter.deployment,
            proof: e.proof,
            tries: e.tries,
        }
    }
}

/// A webhook with a secret that was just made.
#[derive(Serialize, JsonSchema)]
pub(crate) struct WebhookSecretView {
    /// The webhook.
    webhook: WebhookView,
    /// What deliveries are signed with, in the form of Standard Webhooks. It is shown this once.
    secret: String,
}

/// A webhook, and how its deliveries are.
#[derive(Debug, Serialize, JsonSchema)]
pub(crate) struct WebhookStatus {
    /// The webhook.
    #[serde(flatten)]
    webhook: WebhookView,
    /// Events that the receiver did not take, and that are tried again, by position. Deliveries that
    /// stand further back than the newest 2,000 lines of the delivery log are not looked at.
    retrying: Vec<RetryView>,
}

/// Webhooks.
#[derive(Debug, Serialize, JsonSchema)]
pub(crate) struct WebhookList {
    /// The oldest first.
    webhooks: Vec<WebhookStatus>,
}

/// Whose webhooks are wanted.
#[derive(Debug, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
#[serde(deny_unknown_fields)]
pub(crate) struct WebhookQuery {
    /// Of this project.
    project: Option<String>,
}

fn view(project: ProjectName, state: Subscription) -> WebhookView {
    let overlap_until = state.previous.map(|p| p.until);
    WebhookView {
        etag: definition_tag(&state.endpoint),
        id: state.id,
        project,
        endpoint: state.endpoint.into(),
        pause: state.pause,
        secret_version: state.secret.version,
        overlap_until: overlap_until.filter(|until| *until > Timestamp::now()),
        after: state.after,
        created_at: state.created_at,
        dead_letters: state
            .dead
            .into_iter()
            .map(|(position, letter)| DeadLetterView {
                position,
                event: letter.event,
                tries: letter.tries,
                code: letter.code,
                since: letter.since,
                replaying: letter.replaying,
            })
            .collect(),
    }
}

async fn status(
    state: &AppState,
    project: ProjectName,
    subscription: Subscription,
) -> Result<WebhookStatus, Problem> {
    let retrying = retrying(state, subscription.id).await?;
    let webhook = view(project, subscription);
    Ok(WebhookStatus { webhook, retrying })
}

fn with_secret(state: &AppState, made: WithSecret) -> Result<(Done, WebhookSecretView), Problem> {
    let (project, webhook) = state.commands.webhook(made.id)?;
    let shown = WebhookSecretView {
        webhook: view(project, webhook),
        secret: made.secret.expose().to_owned(),
    };
    Ok((made.done, shown))
}

fn accepted(state: &AppState, id: SubscriptionId, done: &Done) -> Handled<WebhookView> {
    let (project, webhook) = state.commands.webhook(id)?;
    Ok(Answer::done(done, view(project, webhook)))
}

/// The webhooks that events are sent to, without their secrets.
#[utoipa::path(get, path = "/api/v1/webhooks", tag = "webhooks", params(WebhookQuery),
    responses((status = 200, description = "The webhooks.", body = WebhookList)))]
pub(crate) async fn list_webhooks(
    State(state): State<AppState>,
    principal: Principal,
    Params(query): Params<WebhookQuery>,
) -> Handled<WebhookList> {
    let project = query.project.map(ProjectName::parse).transpose()?;
    if let Some(project) = &project {
        state.commands.project_seen(&principal, project)?;
    }
    let all = state.projections().subscriptions(project.as_ref())?;
    let seen = |project: &ProjectName| principal.sees(project);
    let all = all.into_iter().filter(|(p, s)| !s.deleted && seen(p));
    let mut all: Vec<_> = all.collect();
    all.sort_by_key(|(_, s)| (s.created_at, s.id));
    let looked_at = all
        .into_iter()
        .map(|(project, subscription)| status(&state, project, subscription));
    let webhooks = stream::iter(looked_at).buffered(AT_ONCE).try_collect();
    Ok(Answer::ok(WebhookList {
        webhooks: webhooks.await?,
    }))
}

/// Sends events of a project to a URL from here on, or from a position. The answer has the secret
/// that deliveries are signed with, which nobody can look up later.
#[utoipa::path(post, path = "/api/v1/webhooks", tag = "webhooks", request_body = CreateWebhook,
    responses((status = 201, description = "It is made.", body = WebhookSecretView)))]
pub(crate) async fn create_webhook(
    State(state): State<AppState>,
    Params(NoParams {}): Params<NoParams>,
    Command { caller, body }: Command<CreateWebhook>,
) -> Handled<WebhookSecretView> {
    let project = ProjectName::parse(body.project)?;
    let endpoint = body.endpoint.parse()?;
    let after = body.after.map(Position);
    let commands = &state.commands;
    let made = commands
        .create_webhook(&caller, project, endpoint, after)
        .await?;
    let (done, shown) = with_secret(&state, made)?;
    let location = format!("/api/v1/webhooks/{}", shown.webhook.id);
    Ok(Answer::done(&done, shown).created(location))
}

/// A webhook, with what is tried again and what was set aside undelivered.
#[utoipa::path(get, path = "/api/v1/webhooks/{webhook}", tag = "webhooks",
    params(("webhook" = String, Path, description = "The webhook.")),
    responses((status = 200, description = "The webhook.", body = WebhookStatus,
        headers(("ETag" = String, description = "What is sent where, as one opaque text.")))))]
pub(crate) async fn get_webhook(
    State(state): State<AppState>,
    Named(id): Named<SubscriptionId>,
    Params(NoParams {}): Params<NoParams>,
) -> Handled<WebhookStatus> {
    let (project, webhook) = state.commands.webhook(id)?;
    let shown = status(&state, project, webhook).await?;
    let tag = shown.webhook.etag.clone();
    Ok(Answer::ok(shown).tagged(tag))
}

/// Defines a webhook anew. What was sent already is not sent again. With `If-Match`, a definition that
/// somebody else made meanwhile is not replaced: the answer is 412 with the code `webhook_changed`.
#[utoipa::path(put, path = "/api/v1/webhooks/{webhook}", tag = "webhooks",
    params(("webhook" = String, Path, description = "The webhook."),
        ("If-Match" = Option<String>, Header,
            description = "The `ETag` of the webhook as it was read.")),
    request_body = ChangeWebhook,
    responses((status = 200, description = "It is defined anew.", body = WebhookView,
        headers(("ETag" = String, description = "What is sent where, as one opaque text.")))))]
pub(crate) async fn change_webhook(
    State(state): State<AppState>,
    Named(id): Named<SubscriptionId>,
    Params(NoParams {}): Params<NoParams>,
    if_match: IfMatch,
    Command { caller, body }: Command<ChangeWebhook>,
) -> Handled<WebhookView> {
    let endpoint = body.endpoint.parse()?;
    let sent = definition_tag(&endpoint);
    let commands = &state.commands;
    let done = commands
        .change_webhook(&caller, id, endpoint, if_match.tags())
        .await?;
    let (project, webhook) = commands.webhook(id)?;
    let shown = view(project, webhook);
    let is_so = shown.etag == sent;
    let answer = Answer::done(&done, shown);
    // Whoever has what somebody else made of it meanwhile has not read it (RFC 9110, 9.3.4).
    Ok(match is_so {
        true => answer.tagged(sent),
        false => answer,
    })
}

/// Deletes a webhook, and erases its secrets. With `If-Match`, one that somebody else has defined anew
/// meanwhile is kept: the answer is 412 with the code `webhook_changed`.
#[utoipa::path(delete, path = "/api/v1/webhooks/{webhook}", tag = "webhooks",
    params(("webhook" = String, Path, description = "The webhook."),
        ("If-Match" = Option<String>, Header,
            description = "The `ETag` of the webhook as it was read.")),
    responses((status = 200, description = "It is deleted.", body = WebhookGone)))]
pub(crate) async fn delete_webhook(
    State(state): State<AppState>,
    Named(id): Named<SubscriptionId>,
    Params(NoParams {}): Params<NoParams>,
    if_match: IfMatch,
    Command { caller, .. }: Command<Nothing>,
) -> Handled<WebhookGone> {
    let commands = &state.commands;
    let done = commands
        .delete_webhook(&caller, id, if_match.tags())
        .await?;
    Ok(Answer::done(&done, WebhookGone { id }))
}

/// A webhook was deleted.
#[derive(Debug, Serialize, JsonSchema)]
pub(crate) struct WebhookGone {
    /// Its id.
    id: SubscriptionId,
}

/// Gives a webhook another secret. Until the overlap ends, each delivery has two signatures.
#[utoipa::path(post, path = "/api/v1/webhooks/{webhook}/rotate", tag = "webhooks",
    params(("webhook" = String, Path, description = "The webhook.")),
    request_body = RotateWebhook,
    responses((status = 200, description = "The new secret.", body = WebhookSecretView)))]
pub(crate) async fn rotate_webhook(
    State(state): State<AppState>,
    Named(id): Named<SubscriptionId>,
    Params(NoParams {}): Params<NoParams>,
    Command { caller, body }: Command<RotateWebhook>,
) -> Handled<WebhookSecretView> {
    let overlap = body
        .overlap_seconds
        .map_or(OVERLAP, |s| Duration::from_secs(s.into()));
    let made = state.commands.rotate_webhook(&caller, id, overlap).await?;
    let (done, shown) = with_secret(&state, made)?;
    Ok(Answer::done(&done, shown))
}

/// Sends nothing any more. What comes meanwhile is sent once it is resumed.
#[utoipa::path(post, path = "/api/v1/webhooks/{webhook}/pause", tag = "webhooks",
    params(("webhook" = String, Path, description = "The webhook.")),
    responses((status = 200, description = "It is paused.", body = WebhookView)))]
pub(crate) async fn pause_webhook(
    State(state): State<AppState>,
    Named(id): Named<SubscriptionId>,
    Params(NoParams {}): Params<NoParams>,
    Command { caller, .. }: Command<Nothing>,
) -> Handled<WebhookView> {
    let done = state.commands.pause_webhook(&caller, id).await?;
    accepted(&state, id, &done)
}

/// Sends again, from where it stopped.
#[utoipa::path(post, path = "/api/v1/webhooks/{webhook}/resume", tag = "webhooks",
    params(("webhook" = String, Path, description = "The webhook.")),
    responses((status = 200, description = "It is sent again.", body = WebhookView)))]
pub(crate) async fn resume_webhook(
    State(state): State<AppState>,
    Named(id): Named<SubscriptionId>,
    Params(NoParams {}): Params<NoParams>,
    Command { caller, .. }: Command<Nothing>,
) -> Handled<WebhookView> {
    let done = state.commands.resume_webhook(&caller, id).await?;
    accepted(&state, id, &done)
}

/// Sends a `subscription.test_requested` event, whatever the filter says. The deliveries show what
/// came of it.
#[utoipa::path(post, path = "/api/v1/webhooks/{webhook}/test", tag = "webhooks",
    params(("webhook" = String, Path, description = "The webhook.")),
    responses((status = 202, description = "It is being sent.", body = WebhookTest)))]
pub(crate) async fn test_webhook(
    State(state): State<AppState>,
    Named(id): Named<SubscriptionId>,
    Params(NoParams {}): Params<NoParams>,
    Command { caller, .. }: Command<Nothing>,
) -> Handled<WebhookTest> {
    let done = state.commands.test_webhook(&caller, id).await?;
    let position = done.event.unwrap_or(done.position);
    Ok(Answer::done(&done, WebhookTest { id, position }).accepted())
}

/// A test that is being sent.
#[derive(Debug, Serialize, JsonSchema)]
pub(crate) struct WebhookTest {
    /// The webhook.
    id: SubscriptionId,
    /// The position of the event that is sent.
    position: Position,
}

/// Sends again what was set aside.
#[utoipa::path(post, path = "/api/v1/webhooks/{webhook}/replay", tag = "webhooks",
    params(("webhook" = String, Path, description = "The webhook.")),
    request_body = DeadLetterChoice,
    responses((status = 202, description = "It is being sent.", body = WebhookView)))]
pub(crate) async fn replay_webhook(
    State(state): State<AppState>,
    Named(id): Named<SubscriptionId>,
    Params(NoParams {}): Params<NoParams>,
    Command { caller, body }: Command<DeadLetterChoice>,
) -> Handled<WebhookView> {
    let commands = &state.commands;
    let done = commands
        .replay_webhook(&caller, id, body.positions())
        .await?;
    Ok(accepted(&state, id, &done)?.accepted())
}

/// Takes events that were set aside off the list: they are never sent. What was set aside stays in
/// the ledger, with who discarded it.
#[utoipa::path(post, path = "/api/v1/webhooks/{webhook}/discard", tag = "webhooks",
    params(("webhook" = String, Path, description = "The webhook.")),
    request_body = DeadLetterChoice,
    responses((status = 200, description = "They are discarded.", body = WebhookView)))]
pub(crate) async fn discard_webhook(
    State(state): State<AppState>,
    Named(id): Named<SubscriptionId>,
    Params(NoParams {}): Params<NoParams>,
    Command { caller, body }: Command<DeadLetterChoice>,
) -> Handled<WebhookView> {
    let commands = &state.commands;
    let done = commands
        .discard_webhook(&caller, id, body.positions())
        .await?;
    accepted(&state, id, &done)
}
