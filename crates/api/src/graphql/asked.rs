//! Who asks, and what it is answered from.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use async_graphql::{Context, Value};
use axum::http::{HeaderMap, StatusCode};
use daybook_events::{Actor, DeploymentId, Digest, ProjectName, TraceParent};
use daybook_projections::DeploymentRow;

use super::limits;
use crate::access::{Over, Principal, Verb, authorise};
use crate::commands::{Caller, RequestKey, denied_deployment, denied_project};
use crate::extract;
use crate::problem::Problem;
use crate::state::AppState;

/// One request: what every resolver has at hand.
#[derive(Debug, Clone)]
pub(super) struct Asked {
    pub(super) state: AppState,
    pub(super) principal: Principal,
    pub(super) actor: Actor,
    /// The `Idempotency-Key` of the request.
    key: Option<String>,
    trace: Option<TraceParent>,
    spent: Arc<Spent>,
}

/// What answering a request has come to so far.
#[derive(Debug, Default)]
struct Spent {
    /// Items of lists.
    items: AtomicUsize,
    /// States of the past that were worked out.
    looks_back: AtomicUsize,
}

impl Asked {
    /// A request with these headers.
    pub(super) fn new(
        state: AppState,
        principal: Principal,
        headers: &HeaderMap,
    ) -> Result<Self, Problem> {
        Ok(Self {
            state,
            actor: extract::actor(&principal, headers)?,
            principal,
            key: extract::idempotency_key(headers)?.map(str::to_owned),
            trace: extract::trace_of(headers),
            spent: Arc::default(),
        })
    }

    /// The same without a key: one operation of several over a socket, which name theirs as
    /// arguments.
    pub(super) fn without_key(mut self) -> Self {
        self.key = None;
        self
    }

    /// The same for another operation, of which nothing is answered yet.
    pub(super) fn afresh(&self) -> Self {
        Self {
            spent: Arc::default(),
            ..self.clone()
        }
    }

    /// Counts items of a list that are to be answered with. What a document costs is worked out
    /// with lists of a usual length: here it is seen how long they are.
    pub(super) fn lists(&self, items: usize) -> Result<(), Problem> {
        let before = self.spent.items.fetch_add(items, Ordering::Relaxed);
        if before.saturating_add(items) <= limits::ITEMS {
            return Ok(());
        }
        Err(Problem::new(
            StatusCode::BAD_REQUEST,
            "query_too_complex",
            format!("the answer would have more than {} items", limits::ITEMS),
            "ask for less at once: fewer rows (first) or fewer lists within lists",
        ))
    }

    /// Counts a state of the past that has to be worked out.
    pub(super) fn looks_back(&self) -> Result<(), Problem> {
        let before = self.spent.looks_back.fetch_add(1, Ordering::Relaxed);
        if before < limits::LOOKS_BACK {
            return Ok(());
        }
        Err(Problem::new(
            StatusCode::BAD_REQUEST,
            "query_too_complex",
            format!(
                "the request looks back more than {} times",
                limits::LOOKS_BACK
            ),
            "ask for the past of fewer instances at once; `history` and `state` look back once",
        ))
    }

    /// Refuses to show a project to whom may not see it, as one that does not exist.
    pub(super) fn may_read(&self, project: &ProjectName) -> Result<(), Problem> {
        let allowed = authorise(&self.principal, Verb::Read, Over::Project(project));
        Ok(allowed.map_err(|denied| denied_project(denied, project))?)
    }

    /// Refuses what nobody may do who may not do it in any project, as the door does for an address:
    /// before anything is looked up.
    pub(super) fn may_somewhere(&self, verb: Verb) -> Result<(), Problem> {
        Ok(authorise(&self.principal, verb, Over::Some)?)
    }

    /// A deployment that may be seen; others look like one that does not exist.
    pub(super) fn deployment(&self, id: DeploymentId) -> Result<DeploymentRow, Problem> {
        let row = self.state.commands.deployment(id)?;
        let project = &row.state.request.instance.project;
        let allowed = authorise(&self.principal, Verb::Read, Over::Project(project));
        allowed.map_err(|denied| denied_deployment(denied, id))?;
        Ok(row)
    }
}

/// The request that a resolver answers a part of.
pub(super) fn asked<'a>(ctx: &Context<'a>) -> &'a Asked {
    ctx.data_unchecked::<Asked>()
}

/// The caller of a mutation. Its key is the argument's, or else the request's: a field of a
/// document that has several is then told apart by the name that its answer has.
pub(super) fn caller(ctx: &Context<'_>, key: Option<&str>) -> Result<Caller, Problem> {
    let asked = asked(ctx);
    let field = ctx.field();
    let (name, alias) = (field.name(), field.alias());
    let found = match (key, &asked.key) {
        (Some(key), _) => Some((key, name.to_owned())),
        (None, Some(key)) => Some((key.as_str(), format!("{name} {}", alias.unwrap_or(name)))),
        (None, None) => None,
    };
    let key = match found {
        None => None,
        Some((key, _)) if !is_key(key) => {
            return Err(Problem::new(
                StatusCode::BAD_REQUEST,
                "invalid_idempotency_key",
                "idempotencyKey is not a key",
                "give 1 to 255 visible ASCII characters, such as a UUID",
            ));
        }
        Some((key, operation)) => {
            let digest = Digest::of(arguments(ctx)?.as_bytes());
            let operation = format!("graphql {operation}");
            Some(RequestKey::new(
                &asked.actor,
                &operation,
                key,
                digest.to_string(),
            ))
        }
    };
    Ok(Caller {
        actor: asked.actor.clone(),
        principal: asked.principal.clone(),
        key,
        // An operation of a socket is no part of the request that opened it.
        traceparent: daybook_trace::current().or(asked.trace),
    })
}

fn is_key(key: &str) -> bool {
    (1..=extract::KEY_MAX).contains(&key.len()) && key.bytes().all(|b| (b' '..=b'~').contains(&b))
}

/// The arguments of a field in one form, whatever their order was and whether they came as
/// variables; without the key itself.
fn arguments(ctx: &Context<'_>) -> Result<String, Problem> {
    let field = ctx.field();
    let arguments = field.arguments().map_err(|e| {
        Problem::new(
            StatusCode::BAD_REQUEST,
            "invalid_query",
            e.message,
            "give every variable that the document names",
        )
    })?;
    let without_key = |value: Value| match value {
        Value::Object(mut fields) => {
            fields.shift_remove("idempotencyKey");
            Value::Object(fields)
        }
        other => other,
    };
    let arguments: BTreeMap<String, serde_json::Value> = arguments
        .into_iter()
        .filter(|(name, _)| name != "idempotencyKey")
        .filter_map(|(name, value)| Some((name.to_string(), without_key(value).into_json().ok()?)))
        .collect();
    let arguments = serde_json::to_value(arguments).unwrap_or_default();
    Ok(extract::canonical(&arguments))
}
