//! What a proxy changes in the head of a message (RFC 9110, sections 7.6 and 7.8).

use std::net::SocketAddr;

use hyper::HeaderMap;
use hyper::header::{self, HeaderName, HeaderValue};
use hyper::http::request::Parts;

/// The deployment that answered, in every response.
pub(super) const DEPLOYMENT: HeaderName = HeaderName::from_static("x-daybook-deployment");
const FORWARDED_FOR: HeaderName = HeaderName::from_static("x-forwarded-for");
const FORWARDED_HOST: HeaderName = HeaderName::from_static("x-forwarded-host");
const FORWARDED_PROTO: HeaderName = HeaderName::from_static("x-forwarded-proto");
const KEEP_ALIVE: HeaderName = HeaderName::from_static("keep-alive");
const PROXY_CONNECTION: HeaderName = HeaderName::from_static("proxy-connection");
const HTTP2_SETTINGS: HeaderName = HeaderName::from_static("http2-settings");

/// A request that names no host, or more than one.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("the request must name one host, and {0}")]
pub(super) struct BadHost(&'static str);

/// The host that a request is for, as it was written and as it is looked up: in lowercase,
/// without port and without trailing dot.
pub(super) fn host_of(head: &Parts) -> Result<(HeaderValue, String), BadHost> {
    let mut all = head.headers.get_all(header::HOST).iter();
    let given = all.next();
    if all.next().is_some() {
        return Err(BadHost("this one has several Host headers"));
    }
    // A target in absolute form counts more than the header.
    let written = match head.uri.authority() {
        Some(authority) => HeaderValue::from_str(authority.as_str())
            .map_err(|_| BadHost("its target cannot be read"))?,
        None => given
            .cloned()
            .ok_or(BadHost("this one has no Host header"))?,
    };
    let text = written
        .to_str()
        .map_err(|_| BadHost("the Host header is not text"))?;
    let name = match text.rsplit_once(':') {
        Some((name, port)) if !port.contains(']') => {
            if !port.bytes().all(|b| b.is_ascii_digit()) {
                return Err(BadHost("the port of its Host header is not a number"));
            }
            name
        }
        _ => text,
    };
    let name = name.strip_suffix('.').unwrap_or(name).to_ascii_lowercase();
    let allowed =
        |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'.' | b'_' | b'[' | b']' | b':');
    if name.is_empty() || name.len() > 253 || !name.bytes().all(allowed) {
        return Err(BadHost("its Host header is not a host name"));
    }
    Ok((written, name))
}

/// The protocol that a message asks, or agrees, to change to. HTTP/2 is not passed on: an
/// upgrade to it would carry requests past the gateway.
pub(super) fn upgrade_of(headers: &HeaderMap) -> Option<HeaderValue> {
    let asked = connection_options(headers).any(|option| option.eq_ignore_ascii_case("upgrade"));
    let protocol = headers.get(header::UPGRADE)?;
    let text = protocol.to_str().ok()?;
    let h2 = text
        .split(',')
        .any(|p| p.trim().to_ascii_lowercase().starts_with("h2"));
    (asked && !h2).then(|| protocol.clone())
}

fn connection_options(headers: &HeaderMap) -> impl Iterator<Item = &str> {
    headers
        .get_all(header::CONNECTION)
        .iter()
        .filter_map(|v| v.to_str().ok())
        .flat_map(|v| v.split(','))
        .map(str::trim)
}

/// Removes what is meant for one connection only, and the framing, which is made anew from the
/// body itself.
pub(super) fn remove_hop_by_hop(headers: &mut HeaderMap) {
    let named: Vec<HeaderName> = connection_options(headers)
        .filter_map(|name| name.parse().ok())
        .collect();
    for name in named {
        headers.remove(name);
    }
    for name in [
        header::CONNECTION,
        header::TE,
        header::TRAILER,
        header::TRANSFER_ENCODING,
        header::UPGRADE,
        header::PROXY_AUTHENTICATE,
        header::PROXY_AUTHORIZATION,
        KEEP_ALIVE,
        PROXY_CONNECTION,
        HTTP2_SETTINGS,
    ] {
        headers.remove(name);
    }
}

/// Says to the application who asked, and for what.
pub(super) fn set_forwarded(
    headers: &mut HeaderMap,
    host: &HeaderValue,
    peer: SocketAddr,
    trust: bool,
) {
    let peer = peer.ip().to_canonical().to_string();
    if !trust {
        for name in [
            FORWARDED_FOR,
            FORWARDED_HOST,
            FORWARDED_PROTO,
            header::FORWARDED,
        ] {
            headers.remove(name);
        }
    }
    let chain: Vec<&str> = headers
        .get_all(FORWARDED_FOR)
        .iter()
        .filter_map(|v| v.to_str().ok())
        .chain(std::iter::once(peer.as_str()))
        .collect();
    if let Ok(chain) = HeaderValue::from_str(&chain.join(", ")) {
        headers.insert(FORWARDED_FOR, chain);
    }
    headers
        .entry(FORWARDED_HOST)
        .or_insert_with(|| host.clone());
    headers
        .entry(FORWARDED_PROTO)
        .or_insert(HeaderValue::from_static("http"));
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use hyper::Request;

    fn host(request: hyper::http::request::Builder) -> Result<String, BadHost> {
        host_of(&request.body(()).unwrap().into_parts().0).map(|(_, name)| name)
    }

    #[test]
    fn a_host_is_found_whatever_its_case_port_and_trailing_dot() {
        for (written, name) in [
            ("shop.localhost", "shop.localhost"),
            ("Shop.LocalHost:7080", "shop.localhost"),
            ("shop.localhost.", "shop.localhost"),
            ("shop.localhost.:80", "shop.localhost"),
            ("[::1]:80", "[::1]"),
            ("127.0.0.1:80", "127.0.0.1"),
        ] {
            let request = Request::get("/").header("host", written);
            assert_eq!(host(request), Ok(name.to_owned()), "{written}");
        }
        let absolute = Request::get("http://Other.localhost:1/x").header("host", "shop.localhost");
        assert_eq!(host(absolute), Ok("other.localhost".into()));
    }

    #[test]
    fn a_request_without_exactly_one_sane_host_is_refused() {
        assert!(host(Request::get("/")).is_err());
        for bad in [
            "", "a b", "a/b", "a@b", "a:b", "a:80:x", "a\\b", "a,b", "a;b",
        ] {
            let request = Request::get("/").header("host", bad);
            assert!(host(request).is_err(), "{bad:?}");
        }
        let twice = Request::get("/").header("host", "a").header("host", "a");
        assert!(host(twice).is_err());
    }

    #[test]
    fn what_is_meant_for_one_hop_goes_no_further() {
        let mut headers = HeaderMap::new();
        for (name, value) in [
            ("connection", "close, x-mine"),
            ("connection", "keep-alive"),
            ("keep-alive", "timeout=5"),
            ("x-mine", "1"),
            ("te", "trailers"),
            ("transfer-encoding", "chunked"),
            ("upgrade", "websocket"),
            ("proxy-authorization", "secret"),
            ("accept", "*/*"),
        ] {
            headers.append(
                HeaderName::from_static(name),
                HeaderValue::from_static(value),
            );
        }
        remove_hop_by_hop(&mut headers);
        assert_eq!(headers.keys().collect::<Vec<_>>(), [&header::ACCEPT]);
    }

    #[test]
    fn forwarded_headers_of_strangers_are_not_believed() {
        let peer = "10.1.2.3:99".parse().unwrap();
        let host = HeaderValue::from_static("shop.localhost");
        let made_up = |trust| {
            let mut headers = HeaderMap::new();
            headers.insert(FORWARDED_FOR, HeaderValue::from_static("6.6.6.6"));
            headers.insert(FORWARDED_PROTO, HeaderValue::from_static("https"));
            set_forwarded(&mut headers, &host, peer, trust);
            headers
        };
        assert_eq!(made_up(false)[FORWARDED_FOR], "10.1.2.3");
        assert_eq!(made_up(false)[FORWARDED_PROTO], "http");
        assert_eq!(made_up(true)[FORWARDED_FOR], "6.6.6.6, 10.1.2.3");
        assert_eq!(made_up(true)[FORWARDED_PROTO], "https");
    }

    #[test]
    fn upgrades_to_http2_are_not_passed_on() {
        let asking = |protocol| {
            let mut headers = HeaderMap::new();
            headers.insert("connection", HeaderValue::from_static("Upgrade"));
            headers.insert("upgrade", HeaderValue::from_static(protocol));
            upgrade_of(&headers)
        };
        assert!(asking("websocket").is_some());
        assert!(asking("h2c").is_none());
        assert!(asking("websocket, H2C").is_none());
    }
}
