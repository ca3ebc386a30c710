//! Successful answers: JSON, with the position that they stand on.

use axum::http::{HeaderMap, HeaderName, HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use daybook_events::Position;
use daybook_projections::StateHash;
use serde::Serialize;

use crate::commands::Done;
use crate::problem::Problem;

/// Says which position of the log an answer takes into account, at least.
pub(crate) const POSITION: HeaderName = HeaderName::from_static("daybook-position");
/// The hash over the states of all aggregates at that position.
pub(crate) const STATE_HASH: HeaderName = HeaderName::from_static("daybook-state-hash");
/// How many events the newest signed head covers.
pub(crate) const TREE_SIZE: HeaderName = HeaderName::from_static("daybook-tree-size");
/// The root of the newest signed head, in hexadecimal digits.
pub(crate) const TREE_ROOT: HeaderName = HeaderName::from_static("daybook-tree-root");
/// Asks for an answer that takes at least this position into account.
pub(crate) const MIN_POSITION: HeaderName = HeaderName::from_static("daybook-min-position");
/// Says that an answer repeats that of an earlier request with the same key.
pub(crate) const REPLAYED: HeaderName = HeaderName::from_static("idempotency-replayed");

/// A JSON answer.
#[derive(Debug)]
pub(crate) struct Answer<T> {
    status: StatusCode,
    body: T,
    position: Option<Position>,
    replayed: bool,
    location: Option<String>,
    tag: Option<String>,
}

impl<T> Answer<T> {
    /// The answer to a question. Its position is the one that the request started at.
    pub(crate) fn ok(body: T) -> Self {
        Self {
            status: StatusCode::OK,
            body,
            position: None,
            replayed: false,
            location: None,
            tag: None,
        }
    }

    /// What it says, for callers in the same process.
    pub(crate) fn into_body(self) -> T {
        self.body
    }

    /// The answer to a command.
    pub(crate) fn done(done: &Done, body: T) -> Self {
        Self {
            position: Some(done.position),
            replayed: done.replayed,
            ..Self::ok(body)
        }
    }

    /// The same with the entity tag of what it says, which a change can be made to depend on.
    pub(crate) fn tagged(mut self, tag: String) -> Self {
        self.tag = Some(tag);
        self
    }

    /// The same as `202 Accepted`: it is under way.
    pub(crate) fn accepted(mut self) -> Self {
        self.status = StatusCode::ACCEPTED;
        self
    }

    /// The same as `201 Created`, with the address of what was made.
    pub(crate) fn created(mut self, location: String) -> Self {
        self.status = StatusCode::CREATED;
        self.location = Some(location);
        self
    }
}

impl<T: Serialize> IntoResponse for Answer<T> {
    fn into_response(self) -> Response {
        let body = match serde_json::to_vec(&self.body) {
            Ok(body) => body,
            Err(e) => return Problem::internal(&e).into_response(),
        };
        let mut response = (
            self.status,
            [(header::CONTENT_TYPE, "application/json")],
            body,
        )
            .into_response();
        let headers = response.headers_mut();
        if let Some(position) = self.position {
            headers.insert(POSITION, HeaderValue::from(position.0));
        }
        if self.replayed {
            headers.insert(REPLAYED, HeaderValue::from_static("true"));
        }
        if let Some(location) = self.location.and_then(|l| l.try_into().ok()) {
            headers.insert(header::LOCATION, location);
        }
        if let Some(tag) = self.tag.and_then(|t| t.try_into().ok()) {
            headers.insert(header::ETAG, tag);
            // It says which change may be made, and not whether what was kept is still good; and whoever
            // compresses it on the way would make it weak.
            let kept = HeaderValue::from_static("no-store, no-transform");
            headers.insert(header::CACHE_CONTROL, kept);
        }
        response
    }
}

/// Says which hash the states have at the position that the answer stands on.
pub(crate) fn insert_state_hash(headers: &mut HeaderMap, hash: StateHash) {
    if let Ok(value) = HeaderValue::try_from(hash.to_string()) {
        headers.insert(STATE_HASH, value);
    }
}
