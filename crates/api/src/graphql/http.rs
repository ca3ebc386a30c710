//! GraphQL over HTTP: one request in, one answer out. `GET` has the schema, or becomes a socket.

use async_graphql::{Request, Response as Answer};
use axum::body::Body;
use axum::extract::State;
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::{IntoResponse, Response};

use super::asked::Asked;
use super::{limits, refusal, sdl, socket};
use crate::access::Principal;
use crate::extract;
use crate::problem::Problem;
use crate::routes::events::accepts;
use crate::state::AppState;
use crate::ws::Upgrade;

/// The media type that says more with its status than `application/json` may.
const GRAPHQL_RESPONSE: &str = "application/graphql-response+json";

/// `POST /graphql`: a query or a mutation.
pub(crate) async fn post(
    State(state): State<AppState>,
    principal: Principal,
    headers: HeaderMap,
    body: Body,
) -> Response {
    let own_type = accepts(&headers, GRAPHQL_RESPONSE);
    let (answer, status) = match prepare(&state, principal, &headers, body).await {
        Err((status, refused)) => (refused, status),
        Ok(request) => {
            let answer = refusal::coded(state.graphql.execute(request).await);
            // With the older media type a request that was understood is answered with 200,
            // whatever came of it: so says GraphQL over HTTP.
            let refused = own_type && refusal::is_of_request(&answer);
            let status = if refused {
                StatusCode::BAD_REQUEST
            } else {
                StatusCode::OK
            };
            (answer, status)
        }
    };
    let media_type = if own_type {
        GRAPHQL_RESPONSE
    } else {
        "application/json"
    };
    match serde_json::to_vec(&answer) {
        Ok(body) => (status, [(header::CONTENT_TYPE, media_type)], body).into_response(),
        Err(e) => Problem::internal(&e).into_response(),
    }
}

async fn prepare(
    state: &AppState,
    principal: Principal,
    headers: &HeaderMap,
    body: Body,
) -> Result<Request, (StatusCode, Answer)> {
    let refuse = |problem: Problem| (problem.status(), refusal::response(problem));
    let asked = Asked::new(state.clone(), principal, headers).map_err(refuse)?;
    extract::check_media_type(headers).map_err(refuse)?;
    let bytes = extract::read_body(headers, body).await.map_err(refuse)?;
    let mut request = read(&bytes).map_err(refuse)?;
    limits::parse(&mut request).map_err(|refused| (StatusCode::BAD_REQUEST, *refused))?;
    Ok(request.data(asked))
}

/// Reads a request. A list of several is none: each is sent by itself.
pub(super) fn read(bytes: &[u8]) -> Result<Request, Problem> {
    let remedy = "send a JSON object with a GraphQL document as \"query\", and \"variables\" and \
                  \"operationName\" as needed";
    let unfit = |code, detail| Problem::new(StatusCode::BAD_REQUEST, code, detail, remedy);
    let value: serde_json::Value = serde_json::from_slice(bytes)
        .map_err(|e| unfit("malformed_json", format!("the body is not JSON: {e}")))?;
    if !value.is_object() {
        let detail = "the body is not a JSON object".to_owned();
        return Err(unfit("invalid_body", detail));
    }
    serde_json::from_value(value)
        .map_err(|e| unfit("invalid_body", format!("the body does not fit: {e}")))
}

/// `GET /graphql`: the schema, or, with the upgrade of RFC 6455, a socket for subscriptions.
pub(crate) async fn get(
    State(state): State<AppState>,
    principal: Principal,
    headers: HeaderMap,
    Upgrade(upgrade): Upgrade,
) -> Result<Response, Problem> {
    let Some(upgrade) = upgrade else {
        let hint = "# POST a document here as JSON ({\"query\": …}); subscribe over a WebSocket with \
                    the subprotocol graphql-transport-ws.\n\n";
        let headers = [(header::CONTENT_TYPE, "text/plain; charset=utf-8")];
        return Ok((headers, format!("{hint}{}", sdl())).into_response());
    };
    let asked = Asked::new(state.clone(), principal, &headers)?.without_key();
    socket::answer(&state, upgrade, asked)
}
