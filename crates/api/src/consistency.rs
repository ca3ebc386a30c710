//! Reading one's own writes: answers say what position they stand on, and requests say what
//! position they need.

use axum::extract::Request;
use axum::http::{HeaderMap, HeaderValue};
use axum::response::Response;
use daybook_events::{Digest, Position};

use crate::answer::{MIN_POSITION, POSITION, STATE_HASH, TREE_ROOT, TREE_SIZE, insert_state_hash};
use crate::extract;
use crate::problem::{Problem, ahead, behind};
use crate::state::AppState;

/// A position that is so many events behind the end of the log is not reached while a request
/// waits: no answer of this ledger has named it.
const FAR: u64 = 100_000;

/// Waits for `Daybook-Min-Position`, within bounds; one that is far behind the end of the log is
/// refused at once. Whoever lets requests in does it before it looks
/// anything up for them, and once it knows who asks: strangers make nobody wait.
pub(crate) async fn wait(state: &AppState, headers: &HeaderMap) -> Result<(), Problem> {
    let Some(wanted) = headers.get(MIN_POSITION) else {
        return Ok(());
    };
    let text = wanted.to_str().unwrap_or_default();
    let wanted = extract::position("the header Daybook-Min-Position", text)?;
    let reached = state.projections().position();
    if wanted.0 > reached.0.saturating_add(FAR) {
        // Where the end is cannot always be said: then it is waited for, as all else.
        let head = state.commands.ledger().log().head().await;
        if let Ok(head) = head
            && wanted.0 > head.0.saturating_add(FAR)
        {
            return Err(ahead(head, wanted));
        }
    }
    let wait = state.settings.min_position_wait;
    let waited = state.projections().wait_for(wanted, wait).await;
    waited.map_err(|e| behind(e.to_string()))
}

/// Says in `Daybook-Position` what the
/// answer takes into account: everything up to that position, and maybe more. `Daybook-State-Hash`
/// is the hash over the states of all aggregates at exactly that position, where it is at hand. `Daybook-Tree-Size`
/// and `Daybook-Tree-Root` say what was signed by then: positions up to that size are covered.
pub(crate) async fn positions<F>(
    state: &AppState,
    request: Request,
    next: impl FnOnce(Request) -> F,
) -> Response
where
    F: Future<Output = Response>,
{
    let position = state.projections().position();
    let signed = state.tree.as_ref().and_then(|tree| tree.head());
    let mut response = next(request).await;
    let headers = response.headers_mut();
    let position = match headers.get(POSITION) {
        // An answer about the past says its hash itself.
        Some(own) => own.to_str().ok().and_then(|p| p.parse().ok()).map(Position),
        None => {
            headers.insert(POSITION, HeaderValue::from(position.0));
            Some(position)
        }
    };
    if let Some(position) = position
        && !headers.contains_key(STATE_HASH)
        && let Some(hash) = state.projections().recent_state_hash(position)
    {
        insert_state_hash(headers, hash);
    }
    if let Some(signed) = signed {
        let root = Digest::from_sha256(&signed.head.root);
        headers.insert(TREE_SIZE, HeaderValue::from(signed.head.size));
        if let Ok(root) = HeaderValue::from_str(root.hex()) {
            headers.insert(TREE_ROOT, root);
        }
    }
    response
}
