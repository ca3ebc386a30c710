//! Errors as problem documents (RFC 9457).
//!
//! Every refusal of the interface has the same form: a stable `code` for programs, a sentence for
//! people, what helps, and whether the same request may succeed later. What goes wrong inside is
//! logged with its chain and answered without it.

use std::error::Error;

use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use daybook_events::log::{AppendError, ReadError};
use daybook_events::{InvalidName, Position, Refusal, with_causes};
use daybook_projections::{ExecuteError, PastError, QueryError};
use schemars::JsonSchema;
use serde::Serialize;

use crate::access::Denied;
use crate::commands::CommandError;

/// The media type of a problem document.
pub(crate) const MEDIA_TYPE: &str = "application/problem+json";

/// A refused or failed request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Problem {
    status: StatusCode,
    code: &'static str,
    detail: String,
    remedy: String,
    retry_after: Option<u32>,
    challenge: Option<&'static str>,
}

/// How a [`Problem`] is written (RFC 9457, with `code`, `remedy` and `retryable` beside).
#[derive(Serialize, JsonSchema)]
#[schemars(rename = "Problem")]
pub(crate) struct ProblemDocument<'a> {
    /// `https://daybook.dev/problems/<code>`
    #[serde(rename = "type")]
    kind: String,
    /// The code in words.
    title: String,
    /// The HTTP status.
    status: u16,
    /// What is wrong with this very request, in one sentence.
    detail: &'a str,
    /// A stable code for programs.
    code: &'a str,
    /// What would make it possible.
    remedy: &'a str,
    /// Whether the same request may succeed later without any change.
    retryable: bool,
}

impl Problem {
    /// A problem that no repetition of the same request solves.
    pub fn new(
        status: StatusCode,
        code: &'static str,
        detail: impl Into<String>,
        remedy: impl Into<String>,
    ) -> Self {
        Self {
            status,
            code,
            detail: detail.into(),
            remedy: remedy.into(),
            retry_after: None,
            challenge: None,
        }
    }

    /// The same problem, which may be gone after this many seconds.
    pub fn retry_after(mut self, seconds: u32) -> Self {
        self.retry_after = Some(seconds);
        self
    }

    /// The same problem, with what the caller can show to be let in (`WWW-Authenticate`).
    pub(crate) fn challenge(mut self, challenge: &'static str) -> Self {
        self.challenge = Some(challenge);
        self
    }

    /// Something that should not happen. The chain of the cause goes to the log, not to the
    /// caller.
    pub fn internal(cause: &(dyn Error + 'static)) -> Self {
        tracing::error!(error = with_causes(cause), "a request failed inside");
        Self::new(
            StatusCode::INTERNAL_SERVER_ERROR,
            "internal",
            "the server could not handle the request",
            "look at the server's log, and report it if it happens again",
        )
    }

    /// The HTTP status.
    pub fn status(&self) -> StatusCode {
        self.status
    }

    /// The stable code.
    pub fn code(&self) -> &'static str {
        self.code
    }

    /// What is wrong, in one sentence.
    pub(crate) fn detail(&self) -> &str {
        &self.detail
    }

    /// What would make it possible.
    pub(crate) fn remedy(&self) -> &str {
        &self.remedy
    }

    /// Whether the same request may succeed later without any change.
    /// Seconds after which it may be otherwise.
    pub(crate) fn waits(&self) -> Option<u32> {
        self.retry_after
    }

    pub(crate) fn is_retryable(&self) -> bool {
        self.retry_after.is_some()
    }

    /// The problem as one line of text, for clients that show nothing else.
    pub(crate) fn to_text(&self) -> String {
        format!("{} ({}): {}\n", self.detail, self.code, self.remedy)
    }

    /// The problem as a document.
    pub(crate) fn to_json(&self) -> String {
        let document = ProblemDocument {
            kind: format!("https://daybook.dev/problems/{}", self.code),
            title: title(self.code),
            status: self.status.as_u16(),
            detail: &self.detail,
            code: self.code,
            remedy: &self.remedy,
            retryable: self.retry_after.is_some(),
        };
        // Serialising strings and numbers cannot fail.
        serde_json::to_string(&document).unwrap_or_default()
    }
}

/// `project_not_found` as "Project not found".
fn title(code: &str) -> String {
    let mut words = code.replace('_', " ");
    if let Some(first) = words.get_mut(..1) {
        first.make_ascii_uppercase();
    }
    words
}

impl IntoResponse for Problem {
    fn into_response(self) -> Response {
        let headers = [(header::CONTENT_TYPE, MEDIA_TYPE)];
        let mut response = (self.status, headers, self.to_json()).into_response();
        if let Some(seconds) = self.retry_after {
            response
                .headers_mut()
                .insert(header::RETRY_AFTER, HeaderValue::from(seconds));
        }
        if let Some(challenge) = self.challenge {
            response.headers_mut().insert(
                header::WWW_AUTHENTICATE,
                HeaderValue::from_static(challenge),
            );
        }
        response
    }
}

impl From<Denied> for Problem {
    fn from(e: Denied) -> Self {
        match e {
            // Where it is known of what, it looks like that missing.
            Denied::Unseen => Self::new(
                StatusCode::NOT_FOUND,
                "not_found",
                "there is nothing here to be seen with this token",
                "GET /api/v1/whoami says what the token may see",
            ),
            Denied::Lacking { .. } => Self::new(
                StatusCode::FORBIDDEN,
                "role_missing",
                e.to_string(),
                "ask an administrator for a token with that role; GET /api/v1/whoami says which \
                 roles this one has",
            ),
        }
    }
}

/// The status that belongs to the code of a refusal.
fn status_of(code: &str) -> StatusCode {
    match code {
        "illegal_state"
        | "cluster_not_failed"
        | "nothing_to_retry"
        | "cancel_requested"
        | "main_changed"
        | "nothing_runs"
        | "repository_contains_secret"
        | "already_main"
        | "hostname_taken"
        | "nothing_routed"
        | "pinned_out"
        | "too_many_domains"
        | "routes_changed"
        | "nothing_to_roll_back"
        | "nothing_to_promote"
        | "not_promotable"
        | "environment_deleting"
        | "target_not_running"
        | "target_not_ready"
        | "no_stop_scheduled"
        | "no_approval_asked_for"
        | "no_review_open"
        | "environment_frozen"
        | "approval_required"
        | "freeze_changed"
        | "not_held"
        | "webhook_paused"
        | "not_dead_lettered"
        | "position_ahead"
        | "own_change"
        | "not_an_approver"
        | "plan_changed"
        | "approval_rejected"
        | "foreign_commit_decided"
        | "not_rewritten"
        | "last_admin"
        | "secret_shown_once"
        | "token_revoked"
        | "too_many_tokens"
        | "stale_attempt" => StatusCode::CONFLICT,
        // What was read is not so any more.
        "webhook_changed" => StatusCode::PRECONDITION_FAILED,
        c if c.ends_with("_exists") => StatusCode::CONFLICT,
        c if c.ends_with("_not_found") => StatusCode::NOT_FOUND,
        _ => StatusCode::UNPROCESSABLE_ENTITY,
    }
}

impl From<Refusal> for Problem {
    fn from(r: Refusal) -> Self {
        Self::new(status_of(r.code), r.code, r.message, r.remedy)
    }
}

impl From<InvalidName> for Problem {
    fn from(e: InvalidName) -> Self {
        Self::new(
            StatusCode::UNPROCESSABLE_ENTITY,
            e.code,
            e.to_string(),
            format!("give a valid {}", e.what),
        )
    }
}

impl From<AppendError> for Problem {
    fn from(e: AppendError) -> Self {
        match e {
            AppendError::Conflict { .. } => contended(),
            AppendError::TooLarge { .. } => Self::new(
                StatusCode::UNPROCESSABLE_ENTITY,
                "event_too_large",
                e.to_string(),
                "make the request smaller; large values do not belong into the ledger",
            ),
            AppendError::Unavailable(_) => Self::new(
                StatusCode::SERVICE_UNAVAILABLE,
                "log_unavailable",
                e.to_string(),
                "nothing was stored; try again",
            )
            .retry_after(1),
            AppendError::Unknown(_) => Self::new(
                StatusCode::SERVICE_UNAVAILABLE,
                "outcome_unknown",
                e.to_string(),
                "repeat the request with the same Idempotency-Key: it is carried out once",
            )
            .retry_after(1),
            AppendError::Stopped(_) => Self::new(
                StatusCode::SERVICE_UNAVAILABLE,
                "appends_stopped",
                e.to_string(),
                "an operator has to look at the log first; waiting does not help",
            ),
        }
    }
}

fn contended() -> Problem {
    Problem::new(
        StatusCode::CONFLICT,
        "contended",
        "others changed the same thing at the same moment, again and again",
        "try again",
    )
    .retry_after(1)
}

/// The log ends before a position that a request names.
pub(crate) fn ahead(head: Position, named: Position) -> Problem {
    Problem::new(
        StatusCode::CONFLICT,
        "position_ahead",
        format!("the log ends at {head}, before {named}"),
        "this is not the log that the position is from, or it was set back: look at \
         `daybook events`, and start from a position that exists",
    )
}

/// The folded state is behind what the request needs.
pub(crate) fn behind(detail: impl Into<String>) -> Problem {
    Problem::new(
        StatusCode::SERVICE_UNAVAILABLE,
        "behind",
        detail,
        "try again in a moment; /readyz says how far behind this server is",
    )
    .retry_after(1)
}

impl From<ReadError> for Problem {
    fn from(e: ReadError) -> Self {
        match e {
            ReadError::Unavailable(_) => Self::new(
                StatusCode::SERVICE_UNAVAILABLE,
                "log_unavailable",
                e.to_string(),
                "try again",
            )
            .retry_after(1),
            ReadError::Damaged { .. } | ReadError::Missing { .. } | ReadError::Invalid(_) => {
                Self::internal(&e)
            }
        }
    }
}

impl From<QueryError> for Problem {
    fn from(e: QueryError) -> Self {
        Self::internal(&e)
    }
}

impl From<PastError> for Problem {
    fn from(e: PastError) -> Self {
        match e {
            PastError::NotYet { .. } => Self::new(
                StatusCode::CONFLICT,
                "position_ahead",
                e.to_string(),
                "ask for an earlier position, or wait for it with Daybook-Min-Position",
            ),
            PastError::Query(e) => e.into(),
            PastError::Read(e) => e.into(),
            PastError::Lost(_) => Self::new(
                StatusCode::SERVICE_UNAVAILABLE,
                "event_lost",
                e.to_string(),
                "an operator has to look at the log first; waiting does not help",
            ),
        }
    }
}

impl From<ExecuteError> for Problem {
    fn from(e: ExecuteError) -> Self {
        match e {
            ExecuteError::Refused(r) => r.into(),
            ExecuteError::Append(e) => e.into(),
            ExecuteError::Contended => contended(),
            ExecuteError::Behind(e) => behind(e.to_string()),
            other => Self::internal(&other),
        }
    }
}

impl From<CommandError> for Problem {
    fn from(e: CommandError) -> Self {
        match e {
            CommandError::Refused(r) => r.into(),
            CommandError::Invalid(e) => e.into(),
            CommandError::KeyReused => Self::new(
                StatusCode::UNPROCESSABLE_ENTITY,
                "idempotency_key_reused",
                e.to_string(),
                "use a new Idempotency-Key for another request",
            ),
            CommandError::Denied(e) => e.into(),
            CommandError::NoRandomness(e) => Self::internal(&e),
            CommandError::Execute(e) => e.into(),
            CommandError::Query(e) => e.into(),
            CommandError::Read(e) => e.into(),
            CommandError::Uploads(problem) => *problem,
            CommandError::Secrets(e) => {
                tracing::error!(error = e.to_line(), "the secret store cannot be used");
                Self::new(
                    StatusCode::SERVICE_UNAVAILABLE,
                    e.code(),
                    "the secret store cannot be used now",
                    e.remedy(),
                )
                .retry_after(5)
            }
        }
    }
}
