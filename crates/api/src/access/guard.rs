//! The layer around all routes that lets requests in.

use std::net::IpAddr;
use std::time::Duration;

use axum::extract::{FromRequestParts as _, MatchedPath, RawPathParams, Request};
use axum::http::request::Parts;
use axum::http::{HeaderMap, HeaderValue, StatusCode, header};
use axum::response::{IntoResponse as _, Response};
use daybook_events::access::Projects;
use daybook_events::{DeploymentId, InstanceRef, ProjectName, SubscriptionId, with_causes};

use super::authorise::{Denied, Over, Verb, authorise};
use super::control::{AccessMode, Refused, for_git};
use super::limits::Peer;
use super::oidc::KeysError;
use super::principal::Principal;
use super::rules::{Found, Of, Rule, rule};
use crate::commands::{denied_deployment, denied_project, denied_webhook};
use crate::consistency;
use crate::extract::deployment_id;
use crate::problem::Problem;
use crate::state::AppState;
use crate::ws;

/// Finds out who asks, and refuses what they may not do. Handlers run only behind it.
pub(crate) async fn guard<F>(
    state: &AppState,
    request: Request,
    next: impl FnOnce(Request) -> F,
) -> Response
where
    F: Future<Output = Response>,
{
    let (mut parts, body) = request.into_parts();
    match admit(state, &mut parts).await {
        Ok(principal) => {
            parts.extensions.insert(principal);
            next(Request::from_parts(parts, body)).await
        }
        Err(refusal) => *refusal,
    }
}

fn refuse(problem: impl Into<Problem>) -> Box<Response> {
    Box::new(problem.into().into_response())
}

async fn admit(state: &AppState, parts: &mut Parts) -> Result<Principal, Box<Response>> {
    let Some(path) = parts.extensions.get::<MatchedPath>().cloned() else {
        // Nothing is served here, which is no secret.
        return Ok(Principal::nobody());
    };
    let found = rule(parts.method.as_str(), path.as_str());
    let (verb, of) = match found {
        Found::Rule(Rule::Public) => return public(state, parts).await,
        Found::Rule(Rule::Counted) => {
            let peer = parts.extensions.get::<Peer>().map(|peer| peer.0);
            state
                .access
                .count_stranger(peer)
                .map_err(|wait| refuse(too_many(wait)))?;
            return public(state, parts).await;
        }
        Found::Rule(Rule::Asks(verb, of)) => (verb, of),
        Found::OtherMethods(methods) => return Err(Box::new(other_methods(parts, &methods))),
        Found::Nothing => return unruled(state, parts).await,
    };
    if of == Of::Tile && !names_entries(path_parameter(parts, state, 0).await.as_deref()) {
        return public(state, parts).await;
    }
    // A browser cannot say who asks when it opens a socket. It does with the first message, and
    // until then there is nobody to be served.
    if of == Of::Socket
        && state.access.mode() == AccessMode::Required
        && ws::is_asked_for(&parts.headers)
        && !parts.headers.contains_key(header::AUTHORIZATION)
    {
        return Ok(Principal::nobody());
    }
    let git = matches!(of, Of::Repository | Of::Uploads);
    let principal = recognise(state, parts, git).await?;
    // What is looked up to decide is as new as what the answer is made of.
    consistency::wait(state, &parts.headers)
        .await
        .map_err(refuse)?;
    let allowed = match of {
        Of::Visible | Of::Body | Of::Socket => {
            authorise(&principal, verb, Over::Some).map_err(refuse)
        }
        Of::Everything | Of::Tile => authorise(&principal, verb, Over::Everything).map_err(refuse),
        Of::Project | Of::Repository | Of::Uploads | Of::Instance => {
            let text = path_parameter(parts, state, 0).await;
            match text.as_deref().and_then(|text| project(of, text)) {
                Some(project) => {
                    authorise(&principal, verb, Over::Project(&project)).map_err(|e| match of {
                        Of::Repository => {
                            Box::new(crate::git::missing_repository(&project).into_response())
                        }
                        Of::Uploads if matches!(e, Denied::Unseen) => {
                            Box::new(crate::git::missing_uploads(&project).into_response())
                        }
                        _ => refuse(denied_project(e, &project)),
                    })
                }
                // What is no name is refused as such by the handler.
                None => authorise(&principal, verb, Over::Some).map_err(refuse),
            }
        }
        Of::Deployment => {
            let text = path_parameter(parts, state, 0).await.unwrap_or_default();
            match deployment_id(&text) {
                Ok(id) => deployment(state, &principal, verb, id),
                // What is no id is refused as such by the handler.
                Err(_) => Ok(()),
            }
        }
        Of::Webhook => {
            let text = path_parameter(parts, state, 0).await.unwrap_or_default();
            match text.parse() {
                Ok(id) => webhook(state, &principal, verb, id),
                // What is no id is refused as such by the handler.
                Err(_) => Ok(()),
            }
        }
    };
    allowed.map(|()| principal)
}

/// Lets in whoever asks for what is public. They wait for no position where callers are told apart,
/// as these are strangers.
async fn public(state: &AppState, parts: &Parts) -> Result<Principal, Box<Response>> {
    if state.access.mode() == AccessMode::Open {
        consistency::wait(state, &parts.headers)
            .await
            .map_err(refuse)?;
    }
    Ok(Principal::nobody())
}

/// Whether a principal may do something to a deployment. Who does not see all projects is told of a
/// missing one right here, as of one that is not to be seen: no handler says more of it.
fn deployment(
    state: &AppState,
    principal: &Principal,
    verb: Verb,
    id: DeploymentId,
) -> Result<(), Box<Response>> {
    let row = state.projections().deployment(id).map_err(refuse)?;
    let authorised = match row {
        Some(row) => {
            let project = &row.state.request.instance.project;
            authorise(principal, verb, Over::Project(project))
        }
        None if *principal.visible() == Projects::All => Ok(()),
        None => Err(Denied::Unseen),
    };
    authorised.map_err(|e| refuse(denied_deployment(e, id)))
}

/// Whether a principal may do something to a webhook, in the manner of [`deployment`].
fn webhook(
    state: &AppState,
    principal: &Principal,
    verb: Verb,
    id: SubscriptionId,
) -> Result<(), Box<Response>> {
    let found = state.projections().subscription(id).map_err(refuse)?;
    let authorised = match found {
        Some((project, _)) => authorise(principal, verb, Over::Project(&project)),
        None if *principal.visible() == Projects::All => Ok(()),
        None => Err(Denied::Unseen),
    };
    authorised.map_err(|e| refuse(denied_webhook(e)))
}

async fn recognise(state: &AppState, parts: &Parts, git: bool) -> Result<Principal, Box<Response>> {
    let recognised = state.access.recognise(&parts.headers, git).await;
    if let Err(Refused::Unauthenticated(_)) = &recognised {
        let peer = parts.extensions.get::<Peer>().map(|peer| peer.0);
        let counted = state.access.count_failure(peer);
        counted.map_err(|wait| refuse(too_many(wait)))?;
    }
    match recognised {
        Ok(principal) => {
            let counted = state.access.count(&principal);
            counted.map_err(|wait| refuse(too_many(wait)))?;
            Ok(principal)
        }
        Err(Refused::Unauthenticated(e)) if git => Err(Box::new(for_git(e))),
        Err(Refused::Unauthenticated(e)) => Err(refuse(e)),
        Err(Refused::Query(e)) => Err(refuse(e)),
        Err(Refused::Keys(e)) => Err(refuse(no_keys(&e))),
    }
}

/// What a caller who asks too often is told.
pub(crate) fn too_many(wait: Duration) -> Problem {
    let seconds = wait.as_secs_f64().ceil().max(1.0);
    Problem::new(
        StatusCode::TOO_MANY_REQUESTS,
        "rate_limited",
        "these are more requests than one caller may send",
        "wait as long as Retry-After says; for news, follow GET /api/v1/events instead of asking",
    )
    .retry_after(seconds as u32)
}

/// Counts what a principal asks for behind the door: one of several operations over a socket, or
/// of several in a request.
pub(crate) fn charge(
    state: &AppState,
    principal: &Principal,
    requests: usize,
) -> Result<(), Problem> {
    for _ in 0..requests {
        state.access.count(principal).map_err(too_many)?;
    }
    Ok(())
}

/// Who asks with a credential that is not in the head of a request, but in what came over a socket
/// from this address.
pub(crate) async fn recognise_later(
    state: &AppState,
    peer: Option<IpAddr>,
    headers: &HeaderMap,
) -> Result<Principal, Problem> {
    let principal = match state.access.recognise(headers, false).await {
        Ok(principal) => principal,
        Err(Refused::Unauthenticated(e)) => {
            let counted = state.access.count_failure(peer);
            return Err(counted.map_or_else(too_many, |()| e.into()));
        }
        Err(Refused::Query(e)) => return Err(e.into()),
        Err(Refused::Keys(e)) => return Err(no_keys(&e)),
    };
    charge(state, &principal, 1)?;
    authorise(&principal, Verb::Read, Over::Some)?;
    Ok(principal)
}

fn no_keys(e: &KeysError) -> Problem {
    tracing::error!(error = with_causes(e), "tokens cannot be verified");
    Problem::new(
        StatusCode::SERVICE_UNAVAILABLE,
        "identity_provider_unavailable",
        e.to_string(),
        "try again in a moment",
    )
    .retry_after(5)
}

/// An address that nobody has written a rule for.
async fn unruled(state: &AppState, parts: &Parts) -> Result<Principal, Box<Response>> {
    let principal = recognise(state, parts, false).await?;
    if state.access.mode() == AccessMode::Open {
        return Ok(principal);
    }
    tracing::error!(path = parts.uri.path(), "an address has no rule of access");
    Err(refuse(Problem::new(
        StatusCode::FORBIDDEN,
        "no_access_rule",
        "nobody may use this address, as no rule says who may",
        "report it: this is a defect of Daybook",
    )))
}

fn other_methods(parts: &Parts, methods: &str) -> Response {
    let mut response = crate::routes::method_not_allowed_at(&parts.uri).into_response();
    if let Ok(value) = HeaderValue::from_str(methods) {
        response.headers_mut().insert(header::ALLOW, value);
    }
    response
}

async fn path_parameter(parts: &mut Parts, state: &AppState, number: usize) -> Option<String> {
    let parameters = RawPathParams::from_request_parts(parts, state).await.ok()?;
    parameters
        .iter()
        .nth(number)
        .map(|(_, value)| value.to_owned())
}

fn project(of: Of, text: &str) -> Option<ProjectName> {
    match of {
        Of::Repository => ProjectName::parse(text.strip_suffix(".git")?).ok(),
        Of::Instance => Some(text.parse::<InstanceRef>().ok()?.project),
        _ => ProjectName::parse(text).ok(),
    }
}

/// Whether a path below `tile/` may name anything but hashes.
fn names_entries(rest: Option<&str>) -> bool {
    let level = rest.and_then(|rest| rest.split('/').next());
    !level.is_some_and(|l| !l.is_empty() && l.bytes().all(|b| b.is_ascii_digit()))
}
