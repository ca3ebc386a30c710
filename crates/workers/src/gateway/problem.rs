//! Answers of the gateway itself: problem details (RFC 9457).

use bytes::Bytes;
use http_body_util::Full;
use hyper::header::{CONTENT_TYPE, HeaderValue};
use hyper::{Response, StatusCode};
use serde_json::json;

/// Why the gateway answers instead of an application.
#[derive(Debug)]
pub(super) struct GatewayProblem {
    status: StatusCode,
    /// Stable, for programs.
    code: &'static str,
    detail: String,
    host: Option<String>,
    deployment: Option<String>,
}

/// What helps, for each code of this gateway.
fn remedy(code: &str) -> &'static str {
    match code {
        "connect_refused" => "send requests to the deployment itself; this is no forward proxy",
        "bad_host" => "send one Host header with a host name, as HTTP/1.1 asks for",
        "unknown_host" => {
            "check the name; `daybook status` lists the addresses that lead to deployments"
        }
        "no_backend" => "`daybook status` says what the deployment is and what would start it",
        _ => {
            "`daybook logs --type container` shows what the deployment said; trying again may help"
        }
    }
}

impl GatewayProblem {
    pub(super) fn new(status: StatusCode, code: &'static str, detail: impl Into<String>) -> Self {
        Self {
            status,
            code,
            detail: detail.into(),
            host: None,
            deployment: None,
        }
    }

    pub(super) fn host(mut self, host: &str) -> Self {
        self.host = Some(host.to_owned());
        self
    }

    pub(super) fn deployment(mut self, deployment: impl ToString) -> Self {
        self.deployment = Some(deployment.to_string());
        self
    }

    pub(super) fn into_response(self) -> Response<Full<Bytes>> {
        let body = json!({
            "type": "about:blank",
            "title": self.status.canonical_reason(),
            "status": self.status.as_u16(),
            "code": self.code,
            "detail": self.detail,
            "remedy": remedy(self.code),
            "host": self.host,
            "deployment": self.deployment,
        });
        let mut response = Response::new(Full::new(Bytes::from(body.to_string())));
        *response.status_mut() = self.status;
        response.headers_mut().insert(
            CONTENT_TYPE,
            HeaderValue::from_static("application/problem+json"),
        );
        if let Some(Ok(id)) = self.deployment.as_deref().map(HeaderValue::from_str) {
            response
                .headers_mut()
                .insert(super::headers::DEPLOYMENT, id);
        }
        response
    }
}
