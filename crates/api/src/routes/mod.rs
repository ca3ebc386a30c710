//! The addresses of the interface.

pub(crate) mod approvals;
pub(crate) mod attestation;
pub(crate) mod cdevents;
pub(crate) mod config;
pub(crate) mod deliveries;
pub(crate) mod deployments;
pub(crate) mod domains;
pub(crate) mod dora;
pub(crate) mod events;
pub(crate) mod freezes;
pub(crate) mod gitops;
pub(crate) mod history;
pub(crate) mod hooks;
pub(crate) mod logs;
pub(crate) mod operations;
pub(crate) mod projects;
pub(crate) mod records;
pub(crate) mod search;
pub(crate) mod secrets;
pub(crate) mod templates;
pub(crate) mod tokens;
pub(crate) mod traffic;
pub(crate) mod uploads;
pub(crate) mod webhooks;

use std::any::Any;
use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::time::Duration;

use axum::extract::{DefaultBodyLimit, MatchedPath, Request, State};
use axum::http::{Method, StatusCode, Uri, header};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use axum::{Router, routing};
use futures_util::FutureExt as _;
use utoipa::openapi::OpenApi;
use utoipa_axum::router::{OpenApiRouter, UtoipaMethodRouter};
use utoipa_axum::routes;

use crate::access::{AccessMode, guard};
use crate::extract::not_found;
use crate::problem::Problem;
use crate::state::AppState;
use crate::uploads::RECEIVE_WITHIN;
use crate::{compress, consistency, git, graphql, hosts, metrics, openapi, page, tlog, traced};

/// The routes with their description, which still lacks its schemas.
pub(crate) fn described() -> (Router<AppState>, OpenApi) {
    let (router, mut document) = OpenApiRouter::with_openapi(openapi::frame())
        .routes(routes!(projects::list_projects, projects::create_project))
        .routes(routes!(projects::get_project))
        .routes(routes!(projects::list_services))
        .routes(routes!(projects::get_service, projects::define_service))
        .routes(routes!(
            projects::list_environments,
            projects::create_environment
        ))
        .routes(routes!(
            projects::get_environment,
            projects::change_environment,
            projects::patch_environment,
            projects::delete_environment
        ))
        .routes(routes!(hooks::list_hooks))
        .routes(routes!(
            hooks::define_hook,
            hooks::remove_hook,
            hooks::deliver
        ))
        .routes(routes!(hooks::set_auto_deploy))
        .routes(routes!(webhooks::list_webhooks, webhooks::create_webhook))
        .routes(routes!(
            webhooks::get_webhook,
            webhooks::change_webhook,
            webhooks::delete_webhook
        ))
        .routes(routes!(webhooks::rotate_webhook))
        .routes(routes!(webhooks::pause_webhook))
        .routes(routes!(webhooks::resume_webhook))
        .routes(routes!(webhooks::test_webhook))
        .routes(routes!(webhooks::replay_webhook))
        .routes(routes!(webhooks::discard_webhook))
        .routes(routes!(deliveries::list_deliveries))
        .routes(routes!(secrets::list_secrets, secrets::erase_secrets))
        .routes(routes!(secrets::set_secret, secrets::unset_secret))
        .routes(routes!(secrets::verify_secret))
        .routes(routes!(history::list_instances))
        .routes(routes!(history::get_instance))
        .routes(routes!(
            deployments::list_deployments,
            deployments::create_deployment
        ))
        .routes(routes!(
            deployments::get_deployment,
            deployments::delete_deployment
        ))
        .routes(routes!(attestation::get_attestation))
        .routes(routes!(deployments::stop_deployment))
        .routes(routes!(deployments::start_deployment))
        .routes(routes!(deployments::retry_deployment))
        .routes(routes!(deployments::terminate_deployment))
        .routes(routes!(deployments::cancel_deployment))
        .routes(routes!(deployments::keep_deployment))
        .routes(routes!(approvals::list_approvals))
        .routes(routes!(approvals::get_approval))
        .routes(routes!(approvals::approve_deployment))
        .routes(routes!(approvals::reject_deployment))
        .routes(routes!(approvals::override_deployment))
        .routes(routes!(approvals::review_deployment))
        .routes(routes!(templates::list_templates))
        .routes(routes!(templates::get_template))
        .routes(routes!(templates::deploy_template))
        .routes(routes!(freezes::list_freezes))
        .routes(routes!(freezes::set_freeze, freezes::remove_freeze))
        .routes(routes!(freezes::override_freeze))
        .routes(routes!(deployments::mark_main))
        .routes(routes!(deployments::redeploy))
        .routes(routes!(deployments::rollback))
        .routes(routes!(deployments::promote))
        .routes(routes!(traffic::list_routes, traffic::set_routes))
        .routes(routes!(traffic::set_policy))
        .routes(routes!(records::list_records))
        .routes(routes!(config::scale))
        .routes(routes!(config::change_config))
        .routes(routes!(domains::list_domains, domains::claim_domain))
        .routes(routes!(domains::release_domain))
        .routes(routes!(logs::deployment_logs))
        .routes(routes!(search::search_logs))
        .routes(routes!(history::list_history))
        .routes(routes!(history::list_audit))
        .routes(routes!(history::get_state))
        .routes(routes!(dora::get_dora))
        .routes(routes!(events::list_events))
        .routes(routes!(events::events_chain))
        .routes(routes!(events::get_event))
        .routes(routes!(cdevents::list_cdevents))
        .routes(routes!(operations::healthz))
        .routes(routes!(operations::readyz))
        .routes(routes!(operations::projections))
        .routes(routes!(operations::metrics))
        .routes(routes!(tlog::ledger))
        .routes(routes!(tlog::checkpoint))
        .routes(routes!(tlog::keys))
        .routes(routes!(gitops::get_gitops))
        .routes(routes!(gitops::set_remote, gitops::clear_remote))
        .routes(routes!(gitops::eject_gitops))
        .routes(routes!(gitops::commit_diff))
        .routes(routes!(gitops::adopt_commit))
        .routes(routes!(gitops::revert_commit))
        .routes(routes!(tokens::whoami))
        .routes(routes!(tokens::list_tokens, tokens::create_token))
        .routes(routes!(tokens::rotate_token))
        .routes(routes!(tokens::revoke_token))
        .routes(routes!(git::advertise))
        .routes(routes!(git::upload_pack))
        .routes(routes!(uploads::create_upload))
        .routes(routes!(uploads::missing_objects))
        .routes(routes!(uploads::get_upload))
        .routes(routes!(git::advertise_uploads))
        .routes(routes!(git::fetch_uploads))
        .split_for_parts();
    // Its address has slashes, which OpenAPI has no way to say: it is described here, and routed
    // below.
    let (_, tiles, _): UtoipaMethodRouter<AppState> = routes!(tlog::tile);
    document.paths.paths.extend(tiles.paths);
    (router, document)
}

/// The whole interface over a state.
pub fn router(state: AppState) -> Router {
    let (router, document) = described();
    let document: Arc<str> = openapi::complete(document).to_string().into();
    let serve_document = move || {
        let document = document.clone();
        async move {
            (
                [(header::CONTENT_TYPE, "application/json")],
                document.to_string(),
            )
        }
    };
    router
        .route("/openapi.json", routing::get(serve_document))
        .route("/graphql", routing::get(graphql::get).post(graphql::post))
        .route("/asyncapi.json", routing::get(asyncapi))
        .route("/", routing::get(page::index))
        .route("/page/{file}", routing::get(page::file))
        .route("/tlog/tile/{*rest}", routing::get(tlog::tile))
        .fallback(async || not_found())
        .method_not_allowed_fallback(method_not_allowed)
        .layer(middleware::from_fn_with_state(state.clone(), around))
        .layer(DefaultBodyLimit::disable())
        .with_state(state)
}

/// What operators and their tools ask, and nothing else.
pub(crate) fn operations_router(state: AppState) -> Router {
    Router::new()
        .route("/healthz", routing::get(operations::healthz))
        .route("/readyz", routing::get(operations::readyz))
        .route("/metrics", routing::get(operations::metrics))
        .fallback(async || not_found())
        .method_not_allowed_fallback(method_not_allowed)
        .layer(middleware::from_fn_with_state(
            state.clone(),
            around_operations,
        ))
        .layer(DefaultBodyLimit::disable())
        .with_state(state)
}

/// All that is around a handler, from the outside in. It is one layer because a router copies for each
/// request, layer for layer, all that is inside.
async fn around(State(state): State<AppState>, request: Request, next: Next) -> Response {
    let state = &state;
    let answered = move |request| next.run(request);
    let compressed = move |request| compress::compress(request, answered);
    let placed = move |request| consistency::positions(state, request, compressed);
    let guarded = move |request| guard(state, request, placed);
    let in_time = move |request| time_out(state.settings.request_timeout, request, guarded);
    let at_home = move |request| hosts::check(&state.settings.hosts, request, in_time);
    let unbroken = move |request| unbroken(at_home(request));
    let counted = move |request| metrics::count(&state.metrics, request, unbroken);
    traced::traced(request, counted).await
}

/// The same for what operators ask.
async fn around_operations(
    State(state): State<AppState>,
    request: Request,
    next: Next,
) -> Response {
    let state = &state;
    let answered = move |request| next.run(request);
    let guarded = move |request| guard(state, request, answered);
    let in_time = move |request| time_out(state.settings.request_timeout, request, guarded);
    // Where tokens are asked for, no page of a browser has one; and whoever collects figures knows
    // processes by their addresses.
    match state.settings.access {
        AccessMode::Open => unbroken(hosts::check(&state.settings.hosts, request, in_time)).await,
        AccessMode::Required => unbroken(in_time(request)).await,
    }
}

/// Which events there are, and where they are to be had.
async fn asyncapi() -> Response {
    let document = daybook_events::asyncapi::asyncapi(env!("CARGO_PKG_VERSION"));
    let headers = [(header::CONTENT_TYPE, "application/json")];
    (headers, document.to_string()).into_response()
}

async fn method_not_allowed(uri: Uri) -> Problem {
    method_not_allowed_at(&uri)
}

pub(crate) fn method_not_allowed_at(uri: &Uri) -> Problem {
    Problem::new(
        StatusCode::METHOD_NOT_ALLOWED,
        "method_not_allowed",
        format!("{} does not have this method", uri.path()),
        "use a method that the Allow header names",
    )
}

/// Ends a request that takes too long. Streams are not concerned: their answer begins at once.
async fn time_out<F>(limit: Duration, request: Request, next: impl FnOnce(Request) -> F) -> Response
where
    F: Future<Output = Response>,
{
    // What is large is received as fast as the line is.
    let path = request.extensions().get::<MatchedPath>();
    let receives = request.method() == Method::POST
        && path.is_some_and(|path| path.as_str() == uploads::RECEIVES);
    let limit = match receives {
        true => limit.max(RECEIVE_WITHIN),
        false => limit,
    };
    match tokio::time::timeout(limit, next(request)).await {
        Ok(response) => response,
        Err(_) => Problem::new(
            StatusCode::GATEWAY_TIMEOUT,
            "timeout",
            format!("the request was not done within {} s", limit.as_secs_f32()),
            "repeat it with an Idempotency-Key: it is then carried out once at most",
        )
        .retry_after(1)
        .into_response(),
    }
}

/// An answer also where a handler panics.
async fn unbroken(answer: impl Future<Output = Response>) -> Response {
    match AssertUnwindSafe(answer).catch_unwind().await {
        Ok(response) => response,
        Err(panic) => panicked(&*panic),
    }
}

fn panicked(panic: &(dyn Any + Send)) -> Response {
    let text = panic
        .downcast_ref::<String>()
        .map(String::as_str)
        .or_else(|| panic.downcast_ref::<&str>().copied())
        .unwrap_or("no message");
    tracing::error!(panic = text, "a handler panicked");
    Problem::new(
        StatusCode::INTERNAL_SERVER_ERROR,
        "internal",
        "the server could not handle the request",
        "look at the server's log, and report it: this is a defect of Daybook",
    )
    .into_response()
}
