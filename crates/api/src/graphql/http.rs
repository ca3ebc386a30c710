//! GraphQL over HTTP: one request in, one answer out. `GET` has the schema, or becomes a socket.

use async_graphql::{Request, Response as Answer};
use axum::Extension;
use axum::body::Body;
use axum::extract::State;
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::{IntoResponse, Response};

use super::asked::Asked;
use super::loads::loader;
use super::{limits, refusal, sdl, socket};
use crate::access::{Peer, Principal, charge};
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
    let mut waits = None;
    let (answer, status) = match prepare(&state, principal, &headers, body).await {
        Err(refused) => {
            waits = refused.waits;
            (refused.answer, refused.status)
        }
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
        Ok(body) => {
            let waits = waits.map(|seconds| [(header::RETRY_AFTER, seconds.to_string())]);
            let media_type = [(header::CONTENT_TYPE, media_type)];
            match waits {
                Some(waits) => (status, media_type, waits, body).into_response(),
                None => (status, media_type, body).into_response(),
            }
        }
        Err(e) => Problem::internal(&e).into_response(),
    }
}

/// A request of which nothing is carried out.
struct Refused {
    status: StatusCode,
    answer: Answer,
    /// Seconds until it may be repeated.
    waits: Option<u32>,
}

impl From<Problem> for Refused {
    fn from(problem: Problem) -> Self {
        Self {
            status: problem.status(),
            waits: problem.waits(),
            answer: refusal::response(problem),
        }
    }
}

async fn prepare(
    state: &AppState,
    principal: Principal,
    headers: &HeaderMap,
    body: Body,
) -> Result<Request, Refused> {
    let asked = Asked::new(state.clone(), principal, headers)?;
    extract::check_media_type(headers)?;
    let bytes = extract::read_body(headers, body).await?;
    let mut request = read(&bytes)?;
    let operation = limits::parse(&mut request).map_err(|refused| Refused {
        status: StatusCode::BAD_REQUEST,
        answer: *refused,
        waits: None,
    })?;
    // One was counted at the door.
    charge(state, &asked.principal, operation.requests() - 1)?;
    Ok(request.data(loader(asked.clone())).data(asked))
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
    peer: Option<Extension<Peer>>,
    headers: HeaderMap,
    Upgrade(upgrade): Upgrade,
) -> Result<Response, Problem> {
    let Some(upgrade) = upgrade else {
        let hint = "# POST a document here as JSON ({\"query\": …}); subscribe over a WebSocket with \
                    the subprotocol graphql-transport-ws.\n\n";
        let headers = [(header::CONTENT_TYPE, "text/plain; charset=utf-8")];
        return Ok((headers, format!("{hint}{}", sdl())).into_response());
    };
    let peer = peer.map(|Extension(peer)| peer.0);
    let asked = Asked::new(state.clone(), principal, &headers)?.without_key();
    socket::answer(upgrade, socket::Opened::new(asked, peer, headers))
}
