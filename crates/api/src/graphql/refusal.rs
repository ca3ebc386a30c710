//! Refusals as GraphQL errors: the code, the remedy and whether a retry helps are extensions.

use async_graphql::{Error, ErrorExtensions, Response, ServerError, Value};
use axum::http::StatusCode;

use crate::problem::Problem;

impl From<Problem> for Error {
    fn from(problem: Problem) -> Self {
        Self::new(problem.detail()).extend_with(|_, e| {
            e.set("code", problem.code());
            e.set("status", problem.status().as_u16());
            e.set("remedy", problem.remedy());
            e.set("retryable", problem.is_retryable());
            if let Some(seconds) = problem.waits() {
                e.set("retryAfter", seconds);
            }
        })
    }
}

/// A refusal of a whole request, before any of it is carried out.
pub(super) fn response(problem: Problem) -> Response {
    let error = Error::from(problem);
    let mut refused = ServerError::new(error.message, None);
    refused.extensions = error.extensions;
    Response::from_errors(vec![refused])
}

/// Whether a response says that nothing of the request was carried out.
pub(super) fn is_of_request(response: &Response) -> bool {
    response.data == Value::Null
        && !response.errors.is_empty()
        && response.errors.iter().all(|e| e.path.is_empty())
}

/// Gives each error a code that has none: those of the language itself.
pub(super) fn coded(mut response: Response) -> Response {
    for error in &mut response.errors {
        let extensions = error.extensions.get_or_insert_default();
        if extensions.get("code").is_some() {
            continue;
        }
        let (code, remedy) = match error.message.as_str() {
            "Query is too complex." => (
                "query_too_complex",
                "ask for less at once: fewer rows (first) or fewer lists within lists",
            ),
            "Query is nested too deep." => ("query_too_deep", "ask in several requests"),
            _ => (
                "invalid_query",
                "GET /graphql has the schema that queries must fit",
            ),
        };
        extensions.set("code", code);
        extensions.set("status", StatusCode::BAD_REQUEST.as_u16());
        extensions.set("remedy", remedy);
        extensions.set("retryable", false);
    }
    response
}
