//! Reading one's own writes: answers say what position they stand on, and requests say what
//! position they need.

use axum::extract::{Request, State};
use axum::http::HeaderValue;
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};

use crate::answer::{MIN_POSITION, POSITION};
use crate::extract;
use crate::problem::behind;
use crate::state::AppState;

/// Waits for `Daybook-Min-Position`, within bounds, and says in `Daybook-Position` what the
/// answer takes into account: everything up to that position, and maybe more.
pub(crate) async fn positions(
    State(state): State<AppState>,
    request: Request,
    next: Next,
) -> Response {
    if let Some(wanted) = request.headers().get(MIN_POSITION) {
        let text = wanted.to_str().unwrap_or_default();
        let wanted = match extract::position("the header Daybook-Min-Position", text) {
            Ok(position) => position,
            Err(problem) => return problem.into_response(),
        };
        let wait = state.settings.min_position_wait;
        if let Err(e) = state.projections().wait_for(wanted, wait).await {
            return behind(e.to_string()).into_response();
        }
    }
    let position = state.projections().position();
    let mut response = next.run(request).await;
    response
        .headers_mut()
        .entry(POSITION)
        .or_insert(HeaderValue::from(position.0));
    response
}
