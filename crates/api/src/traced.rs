//! A request in its trace.

use axum::extract::{MatchedPath, Request};
use axum::response::Response;
use daybook_trace::{KeyValue, Kind, Work};

use crate::extract::trace_of;
use crate::metrics::method;

/// What is asked every few seconds by those who look after the server is in no trace.
const LOOKED_AFTER: [&str; 3] = ["/healthz", "/readyz", "/metrics"];

/// Goes on with the trace that a request names, or begins one where spans are recorded. The span
/// ends when the answer begins. It has the form of the address, and nothing of what was filled in:
/// neither names nor a query.
pub(crate) async fn traced<F>(request: Request, next: impl FnOnce(Request) -> F) -> Response
where
    F: Future<Output = Response>,
{
    let trace = trace_of(request.headers());
    let path = request.extensions().get::<MatchedPath>();
    let is_recorded = daybook_trace::is_recording()
        && path.is_none_or(|path| !LOOKED_AFTER.contains(&path.as_str()));
    if !is_recorded {
        return match trace {
            None => next(request).await,
            Some(_) => Work::pass_on(trace).run(next(request)).await,
        };
    }
    let method = match method(request.method().as_str()) {
        "other" => "_OTHER",
        known => known,
    };
    let route = path.map(|path| path.as_str().to_owned());
    let name = match &route {
        Some(route) => format!("{method} {route}"),
        None => method.to_owned(),
    };
    let work = Work::begin(name, Kind::Server, trace, || {
        let mut all = vec![KeyValue::new("http.request.method", method)];
        all.extend(route.map(|route| KeyValue::new("http.route", route)));
        all
    });
    let response = work.run(next(request)).await;
    let status = response.status();
    let code = i64::from(status.as_u16());
    work.say(KeyValue::new("http.response.status_code", code));
    if status.is_server_error() {
        work.fail(status.as_str().to_owned());
    }
    response
}
