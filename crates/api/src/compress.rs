//! Answers in gzip, for those who ask for it.
//!
//! What is compressed is a list, not what is left of one: questions that are answered with a whole
//! JSON document. Not compressed, for a reason each:
//! - streams (SSE, JSON lines, sockets): an event must leave when it happens, and a compressor holds back;
//! - packs of git and tiles of the transparency log, which have their own form, byte for byte;
//! - answers to commands: they may have a token or a signing secret beside a name that the caller chose;
//! - output as such: whoever is served by what runs may write into it, as often as they like, beside what it printed
//!   that nobody was to know, and could tell from the lengths of the answers what that was;
//! - what has an entity tag that changes depend on: a strong tag stands for these bytes and no others.
//!
//! Output is not kept out altogether: what a program printed last before it ended is in the message of what is wrong with
//! its deployment, and so in `/api/v1/deployments/{id}`, `/api/v1/state`, the events and the audit, which are compressed.
//! Somebody who writes into that learns of one length each time that the program ends, and of a few lines at most. That is
//! taken into account, and not prevented.
//!
//! tower-http's layer compresses whatever is not excepted, and brings three more crates; flate2 is here anyway.
//!
//! The files of the page bring their compressed form along, see [`crate::page`].

use std::io::{self, Write as _};

use axum::body::{Body, Bytes, HttpBody as _};
use axum::extract::{MatchedPath, Request};
use axum::http::{HeaderMap, HeaderValue, Method, StatusCode, header};
use axum::response::{IntoResponse as _, Response};
use flate2::Compression;
use flate2::write::GzEncoder;

use crate::problem::Problem;

/// Shorter answers go into one packet anyway.
pub(crate) const LENGTH_MIN: usize = 1024;
/// Longer ones are compressed where they keep nobody else waiting.
const LENGTH_AT_ONCE: usize = 32 * 1024;

/// Documents beside those below `/api/v1/`.
const DOCUMENTS: [&str; 2] = ["/openapi.json", "/asyncapi.json"];
/// The last part of the addresses of output.
const OUTPUT: &str = "/logs";

/// The name of the only coding there is.
pub(crate) const GZIP: &str = "gzip";
/// The header of a request that decides in which coding it is answered.
pub(crate) const DECIDES: &str = "accept-encoding";

/// Compresses what is to be compressed, if whoever asks takes it.
pub(crate) async fn compress<F>(request: Request, next: impl FnOnce(Request) -> F) -> Response
where
    F: Future<Output = Response>,
{
    let path = request.extensions().get::<MatchedPath>();
    let may_be =
        request.method() == Method::GET && path.is_some_and(|path| is_compressible(path.as_str()));
    if !may_be {
        return next(request).await;
    }
    let is_taken = takes_gzip(request.headers());
    let mut response = next(request).await;
    let length = response.body().size_hint().exact();
    let headers = response.headers_mut();
    let is_whole_document = headers
        .get(header::CONTENT_TYPE)
        .is_some_and(|kind| kind == "application/json")
        && !headers.contains_key(header::ETAG)
        && !headers.contains_key(header::CONTENT_ENCODING)
        && length.is_some_and(|length| length >= LENGTH_MIN as u64);
    if !is_whole_document || response.status() != StatusCode::OK {
        return response;
    }
    let decides = HeaderValue::from_static(DECIDES);
    response.headers_mut().append(header::VARY, decides);
    if !is_taken {
        return response;
    }
    let (mut parts, body) = response.into_parts();
    match compressed(body).await {
        Ok(bytes) => {
            // Who serves it counts the new length.
            parts.headers.remove(header::CONTENT_LENGTH);
            let coding = HeaderValue::from_static(GZIP);
            parts.headers.insert(header::CONTENT_ENCODING, coding);
            Response::from_parts(parts, Body::from(bytes))
        }
        Err(e) => Problem::internal(&e).into_response(),
    }
}

/// Whether what is served at an address may be compressed.
fn is_compressible(path: &str) -> bool {
    DOCUMENTS.contains(&path) || (path.starts_with("/api/v1/") && !path.ends_with(OUTPUT))
}

async fn compressed(body: Body) -> io::Result<Vec<u8>> {
    // It is in memory already: this copies nothing.
    let bytes = axum::body::to_bytes(body, usize::MAX).await;
    let bytes: Bytes = bytes.map_err(io::Error::other)?;
    if bytes.len() <= LENGTH_AT_ONCE {
        return gzip(&bytes, Compression::fast());
    }
    let work = move || gzip(&bytes, Compression::fast());
    let done = tokio::task::spawn_blocking(work).await;
    done.map_err(io::Error::other)?
}

/// Bytes in gzip. It writes to memory, which does not fail.
pub(crate) fn gzip(bytes: &[u8], level: Compression) -> io::Result<Vec<u8>> {
    let mut encoder = GzEncoder::new(Vec::new(), level);
    encoder.write_all(bytes)?;
    encoder.finish()
}

/// Whether whoever sent this takes an answer in gzip (RFC 9110, 12.5.3).
pub(crate) fn takes_gzip(headers: &HeaderMap) -> bool {
    let mut any = false;
    let values = headers.get_all(header::ACCEPT_ENCODING).into_iter();
    let texts = values.filter_map(|value| value.to_str().ok());
    for coding in texts.flat_map(|text| text.split(',')) {
        let mut parts = coding.split(';').map(str::trim);
        let name = parts.next().unwrap_or_default();
        let is_wanted = parts.all(|parameter| {
            let weight = match parameter.split_once('=') {
                Some((name, weight)) if name.trim().eq_ignore_ascii_case("q") => weight.trim(),
                _ => return true,
            };
            weight.parse::<f32>().is_ok_and(|weight| weight > 0.0)
        });
        if name.eq_ignore_ascii_case("gzip") || name.eq_ignore_ascii_case("x-gzip") {
            return is_wanted;
        }
        any |= name == "*" && is_wanted;
    }
    any
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gzip_is_for_those_who_take_it() {
        let takes = |values: &[&'static str]| {
            let mut headers = HeaderMap::new();
            for value in values {
                headers.append(header::ACCEPT_ENCODING, HeaderValue::from_static(value));
            }
            takes_gzip(&headers)
        };
        for values in [
            &["gzip, deflate, br, zstd"][..],
            &["br", "GZIP;q=0.5"],
            &["br;q=1.0, *;q=0.1"],
            &["*;q=0, gzip"],
            &["x-gzip"],
        ] {
            assert!(takes(values), "{values:?}");
        }
        for values in [
            &[""][..],
            &[],
            &["identity"],
            &["br, gzip;q=0"],
            &["gzip; q=0.000, *"],
            &["gzip;q=x"],
            &["*;q=0"],
        ] {
            assert!(!takes(values), "{values:?}");
        }
    }

    #[test]
    fn output_and_what_is_no_document_stay_as_they_are() {
        for path in [
            "/openapi.json",
            "/api/v1/history",
            "/api/v1/deployments/{id}",
        ] {
            assert!(is_compressible(path), "{path}");
        }
        for path in [
            "/api/v1/deployments/{id}/logs",
            "/api/v1/projects/{project}/logs",
            "/tlog/tile/{*rest}",
            "/graphql",
            "/metrics",
        ] {
            assert!(!is_compressible(path), "{path}");
        }
    }
}
