//! Tokens, and who one is.

use std::collections::BTreeMap;
use std::time::Duration;

use axum::extract::State;
use axum::http::{HeaderValue, header};
use axum::response::{IntoResponse as _, Response};
use daybook_events::access::{Access, AccountName, Grant, NewEnd, Projects, Token, TokenId};
use daybook_events::{Actor, Subject};
use jiff::Timestamp;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::access::{AccessMode, Principal, Verb, allowed};
use crate::answer::Answer;
use crate::commands::{MadeToken, TokenWish};
use crate::extract::{Command, CommandBody, Named, NoParams, Params, actor};
use crate::problem::Problem;
use crate::state::AppState;

/// A token to be made.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct CreateToken {
    /// What it is called: 1 to 64 letters, digits and `. _ @ -`. No other token that is taken has
    /// the same name.
    name: String,
    /// Who acts with it, as events say it; its name, if not given.
    account: Option<String>,
    /// What it may do.
    grants: Vec<Grant>,
    /// When it ends by itself.
    expires_at: Option<Timestamp>,
}
impl CommandBody for CreateToken {}

/// How a token gets another secret.
#[derive(Debug, Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct RotateToken {
    /// For how many seconds more the secret before is taken; not at all, if not given.
    #[serde(default)]
    overlap_seconds: u32,
    /// When it ends by itself: a time, or `never`; as before, if not given.
    expires_at: Option<End>,
}

/// When a token ends by itself.
#[derive(Debug, Clone, Copy, Deserialize, JsonSchema)]
#[serde(untagged, expecting = "it is a time, or \"never\"")]
pub(crate) enum End {
    /// It does not.
    Never(Never),
    /// Then.
    At(Timestamp),
}

/// At no time.
#[derive(Debug, Clone, Copy, Deserialize, JsonSchema)]
pub(crate) enum Never {
    /// At no time.
    #[serde(rename = "never")]
    Never,
}

impl RotateToken {
    fn end(&self) -> NewEnd {
        match self.expires_at {
            None => NewEnd::AsBefore,
            Some(End::Never(Never::Never)) => NewEnd::Never,
            Some(End::At(end)) => NewEnd::At(end),
        }
    }
}

impl CommandBody for RotateToken {
    fn absent() -> Option<Self> {
        Some(Self::default())
    }
}

/// Why a token is revoked.
#[derive(Debug, Deserialize, utoipa::IntoParams)]
#[into_params(parameter_in = Query)]
#[serde(deny_unknown_fields)]
pub(crate) struct RevokeQuery {
    /// Why.
    reason: Option<String>,
}

/// A revocation needs no body.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct NoBody {}
impl CommandBody for NoBody {
    fn absent() -> Option<Self> {
        Some(Self {})
    }
}

/// A token, with its secret: nobody can show it again.
#[derive(Debug, Serialize, JsonSchema)]
pub(crate) struct TokenMade {
    /// Its id.
    id: TokenId,
    /// The whole token, as it is sent in `Authorization: Bearer`.
    token: String,
}

/// A token, without its secret.
#[derive(Debug, Serialize, JsonSchema)]
pub(crate) struct TokenView {
    /// Its id.
    id: TokenId,
    /// What it is called.
    name: AccountName,
    /// Who acts with it.
    account: AccountName,
    /// What it may do.
    grants: Vec<Grant>,
    /// `taken`, `expired` or `revoked`.
    status: &'static str,
    /// When it was made.
    created_at: Timestamp,
    /// When it got its present secret.
    rotated_at: Option<Timestamp>,
    /// When it ends by itself.
    expires_at: Option<Timestamp>,
    /// When it was revoked.
    revoked_at: Option<Timestamp>,
}

impl TokenView {
    fn new(id: &TokenId, token: &Token, now: Timestamp) -> Self {
        Self {
            id: id.clone(),
            name: token.name.clone(),
            account: token.account.clone(),
            grants: token.grants.clone(),
            status: match token.revoked_at {
                Some(_) => "revoked",
                None if token.is_expired(now) => "expired",
                None => "taken",
            },
            created_at: token.created_at,
            rotated_at: token.rotated_at,
            expires_at: token.expires_at,
            revoked_at: token.revoked_at,
        }
    }
}

/// Tokens.
#[derive(Debug, Serialize, JsonSchema)]
pub(crate) struct TokenList {
    /// Those that are taken and the newest of those that were revoked, oldest first.
    tokens: Vec<TokenView>,
}

/// A token is taken no longer.
#[derive(Debug, Serialize, JsonSchema)]
pub(crate) struct TokenGone {
    /// Its id.
    id: TokenId,
    /// `revoked`.
    status: &'static str,
}

/// Who asks.
#[derive(Debug, Serialize, JsonSchema)]
pub(crate) struct WhoAmI {
    /// Whether this server asks everybody for a credential.
    authentication: &'static str,
    /// Who events will say it was.
    actor: Actor,
    /// The roles that were granted.
    grants: Vec<Grant>,
    /// What may be done by these roles, and where. What is missing may be done nowhere.
    may: BTreeMap<Verb, Projects>,
}

type Handled<T> = Result<Answer<T>, Problem>;

/// Who asks, and what they may do.
#[utoipa::path(get, path = "/api/v1/whoami", tag = "access",
    responses((status = 200, description = "Who asks.", body = WhoAmI)))]
pub(crate) async fn whoami(
    State(state): State<AppState>,
    principal: Principal,
    headers: axum::http::HeaderMap,
    Params(NoParams {}): Params<NoParams>,
) -> Handled<WhoAmI> {
    Ok(Answer::ok(WhoAmI {
        authentication: match state.access.mode() {
            AccessMode::Open => "open",
            AccessMode::Required => "required",
        },
        actor: actor(&principal, &headers)?,
        grants: principal.grants().to_vec(),
        may: Verb::ALL
            .into_iter()
            .filter_map(|verb| Some((verb, allowed(&principal, verb)?)))
            .collect(),
    }))
}

/// All tokens, without their secrets.
#[utoipa::path(get, path = "/api/v1/tokens", tag = "access",
    responses((status = 200, description = "The tokens.", body = TokenList)))]
pub(crate) async fn list_tokens(
    State(state): State<AppState>,
    Params(NoParams {}): Params<NoParams>,
) -> Handled<TokenList> {
    let folded = state.projections().shared::<Access>(&Subject::Access)?;
    let now = Timestamp::now();
    let tokens = folded.state.iter().flat_map(|access| &access.tokens);
    let mut tokens: Vec<_> = tokens.map(|(id, t)| TokenView::new(id, t, now)).collect();
    tokens.sort_by_key(|t| t.created_at);
    Ok(Answer::ok(TokenList { tokens }))
}

/// Makes a token. Its secret is in this answer and nowhere else: a repetition with the same
/// `Idempotency-Key` makes no other token, and is refused.
#[utoipa::path(post, path = "/api/v1/tokens", tag = "access",
    request_body = CreateToken,
    responses((status = 201, description = "It is made.", body = TokenMade)))]
pub(crate) async fn create_token(
    State(state): State<AppState>,
    Params(NoParams {}): Params<NoParams>,
    Command { caller, body }: Command<CreateToken>,
) -> Result<Response, Problem> {
    let wish = TokenWish {
        name: AccountName::parse(body.name)?,
        account: body.account.map(AccountName::parse).transpose()?,
        grants: body.grants,
        expires_at: body.expires_at,
    };
    Ok(shown_once(
        state.commands.create_token(&caller, wish).await?,
    ))
}

/// Gives a token another secret, which is in this answer and nowhere else: a repetition with the
/// same `Idempotency-Key` is refused.
#[utoipa::path(post, path = "/api/v1/tokens/{token}/rotate", tag = "access",
    params(("token" = String, Path, description = "The token's id.")),
    request_body = Option<RotateToken>,
    responses((status = 201, description = "It has another secret.", body = TokenMade)))]
pub(crate) async fn rotate_token(
    State(state): State<AppState>,
    Named(id): Named<TokenId>,
    Params(NoParams {}): Params<NoParams>,
    Command { caller, body }: Command<RotateToken>,
) -> Result<Response, Problem> {
    let overlap = Duration::from_secs(body.overlap_seconds.into());
    let commands = &state.commands;
    let made = commands.rotate_token(&caller, id, overlap, body.end());
    Ok(shown_once(made.await?))
}

/// Takes a token no longer. Streams that it opened end within a second.
#[utoipa::path(delete, path = "/api/v1/tokens/{token}", tag = "access",
    params(("token" = String, Path, description = "The token's id."), RevokeQuery),
    responses((status = 200, description = "It is revoked.", body = TokenGone)))]
pub(crate) async fn revoke_token(
    State(state): State<AppState>,
    Named(id): Named<TokenId>,
    Params(query): Params<RevokeQuery>,
    Command {
        caller,
        body: NoBody {},
    }: Command<NoBody>,
) -> Handled<TokenGone> {
    let commands = &state.commands;
    let done = commands
        .revoke_token(&caller, id.clone(), query.reason)
        .await?;
    let gone = TokenGone {
        id,
        status: "revoked",
    };
    Ok(Answer::done(&done, gone))
}

fn shown_once(made: MadeToken) -> Response {
    let body = TokenMade {
        id: made.token.id().clone(),
        token: made.token.reveal().to_string(),
    };
    let location = format!("/api/v1/tokens/{}", body.id);
    let mut response = Answer::done(&made.done, body)
        .created(location)
        .into_response();
    let never = HeaderValue::from_static("no-store");
    response.headers_mut().insert(header::CACHE_CONTROL, never);
    response
}
