//! Which names this server answers to.
//!
//! A server on loopback trusts whoever reaches it, so a web page must not reach it: neither
//! through a name of its own that it lets point to 127.0.0.1 (DNS rebinding), nor by a form that
//! it makes the browser send.

use axum::extract::Request;
use axum::http::{HeaderMap, StatusCode, Uri, header};
use axum::response::{IntoResponse, Response};

use crate::problem::Problem;
use crate::ws;

const OWN: [&str; 3] = ["localhost", "127.0.0.1", "[::1]"];

/// Refuses requests for other hosts, and commands that a page of another origin sends. A socket
/// counts as a command: commands may be sent over it, and browsers let every page open one.
pub(crate) async fn check<F>(
    hosts: &[String],
    request: Request,
    next: impl FnOnce(Request) -> F,
) -> Response
where
    F: Future<Output = Response>,
{
    match examine(request.uri(), request.headers(), hosts) {
        Ok(()) if request.method().is_safe() && !ws::is_asked_for(request.headers()) => {
            next(request).await
        }
        Ok(()) => match same_origin(request.headers(), hosts) {
            true => next(request).await,
            false => Problem::new(
                StatusCode::FORBIDDEN,
                "cross_origin",
                "the request comes from a page of another origin",
                "send commands from a program, or from a page of this server",
            )
            .into_response(),
        },
        Err(problem) => problem.into_response(),
    }
}

fn examine(uri: &Uri, headers: &HeaderMap, more: &[String]) -> Result<(), Problem> {
    let mut hosts = headers.get_all(header::HOST).iter();
    let named = hosts.next().and_then(|h| h.to_str().ok());
    let one = hosts.next().is_none();
    // A request to a proxy names the host in its first line too.
    let asked = uri.authority().map(|a| a.as_str());
    let fits =
        one && named.is_some_and(|h| allowed(h, more)) && asked.is_none_or(|a| allowed(a, more));
    if fits {
        return Ok(());
    }
    Err(Problem::new(
        StatusCode::FORBIDDEN,
        "host_not_allowed",
        "this server does not answer to the host that the request names",
        "use localhost or 127.0.0.1, or start the server with --host NAME (DAYBOOK_HOSTS)",
    ))
}

fn allowed(authority: &str, more: &[String]) -> bool {
    let host = match authority.rsplit_once(':') {
        Some((host, port)) if port.bytes().all(|b| b.is_ascii_digit()) => host,
        _ => authority,
    };
    OWN.iter().any(|own| own.eq_ignore_ascii_case(host))
        || more.iter().any(|name| name.eq_ignore_ascii_case(host))
}

/// Whether a request that a browser may have sent comes from one of this server's own pages.
fn same_origin(headers: &HeaderMap, more: &[String]) -> bool {
    let Some(origin) = headers.get(header::ORIGIN) else {
        return true;
    };
    let origin = origin.to_str().unwrap_or_default();
    let authority = origin
        .strip_prefix("http://")
        .or_else(|| origin.strip_prefix("https://"));
    let host = headers.get(header::HOST).and_then(|h| h.to_str().ok());
    // The port counts too: another server on this machine is another origin.
    authority.is_some_and(|a| allowed(a, more) && Some(a) == host)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_own_names_are_answered_to() {
        let more = vec!["daybook.example".to_owned()];
        for host in [
            "localhost",
            "LOCALHOST:7070",
            "127.0.0.1:1",
            "[::1]:7070",
            "[::1]",
            "daybook.example:80",
        ] {
            assert!(allowed(host, &more), "{host}");
        }
        for host in [
            "evil.example",
            "localhost.evil.example",
            "evil.example:7070",
            "127.0.0.1.evil.example",
            "",
            ":7070",
            "[::2]",
        ] {
            assert!(!allowed(host, &more), "{host}");
        }
    }

    #[test]
    fn another_port_is_another_origin() {
        let mut headers = HeaderMap::new();
        headers.insert(header::HOST, "localhost:7070".parse().unwrap());
        assert!(same_origin(&headers, &[]));
        for (origin, same) in [
            ("http://localhost:7070", true),
            ("http://localhost:8080", false),
            ("http://evil.example", false),
            ("null", false),
        ] {
            headers.insert(header::ORIGIN, origin.parse().unwrap());
            assert_eq!(same_origin(&headers, &[]), same, "{origin}");
        }
    }
}
