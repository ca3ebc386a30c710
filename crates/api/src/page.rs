//! The page at `/` for people: files of this crate's folder `page/`, compiled in.
//!
//! It is a client of the HTTP interface like any other, needs nothing from elsewhere, and its policy
//! lets a browser load nothing from elsewhere.

use std::sync::LazyLock;

use axum::extract::Path;
use axum::http::{HeaderMap, HeaderName, HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use daybook_events::Digest;

use crate::problem::Problem;

/// What the browser may do with the page: run and show its own files, and talk to this server.
const POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; \
    connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'";

struct File {
    name: &'static str,
    media_type: &'static str,
    content: &'static str,
    /// Changes with the content.
    tag: HeaderValue,
}

macro_rules! files {
    ($($name:literal: $media_type:literal),+ $(,)?) => {
        vec![$({
            let content = include_str!(concat!("../page/", $name));
            File { name: $name, media_type: $media_type, content, tag: tag(content) }
        }),+]
    };
}

static FILES: LazyLock<Vec<File>> = LazyLock::new(|| {
    files! {
        "index.html": "text/html; charset=utf-8",
        "style.css": "text/css; charset=utf-8",
        "icon.svg": "image/svg+xml",
        "main.js": "text/javascript; charset=utf-8",
        "api.js": "text/javascript; charset=utf-8",
        "dom.js": "text/javascript; charset=utf-8",
        "merkle.js": "text/javascript; charset=utf-8",
        "overview.js": "text/javascript; charset=utf-8",
        "deployment.js": "text/javascript; charset=utf-8",
        "delivery.js": "text/javascript; charset=utf-8",
        "history.js": "text/javascript; charset=utf-8",
        "environments.js": "text/javascript; charset=utf-8",
        "routes.js": "text/javascript; charset=utf-8",
        "approvals.js": "text/javascript; charset=utf-8",
        "ledger.js": "text/javascript; charset=utf-8",
        "logs.js": "text/javascript; charset=utf-8",
        "output.js": "text/javascript; charset=utf-8",
        "webhooks.js": "text/javascript; charset=utf-8",
    }
});

fn tag(content: &str) -> HeaderValue {
    let tag = format!("\"{}\"", Digest::of(content.as_bytes()).hex());
    HeaderValue::from_str(&tag).unwrap_or_else(|_| HeaderValue::from_static("\"\""))
}

/// The page itself.
pub(crate) async fn index(headers: HeaderMap) -> Response {
    serve("index.html", &headers)
}

/// One of its files.
pub(crate) async fn file(Path(name): Path<String>, headers: HeaderMap) -> Response {
    serve(&name, &headers)
}

fn serve(name: &str, headers: &HeaderMap) -> Response {
    let Some(file) = FILES.iter().find(|f| f.name == name) else {
        return Problem::new(
            StatusCode::NOT_FOUND,
            "no_such_address",
            "the page has no such file",
            "open / instead",
        )
        .into_response();
    };
    let known = headers.get_all(header::IF_NONE_MATCH).iter();
    let status = match known.into_iter().any(|tag| *tag == file.tag) {
        true => StatusCode::NOT_MODIFIED,
        false => StatusCode::OK,
    };
    let fixed = |value| HeaderValue::from_static(value);
    let about: [(HeaderName, HeaderValue); 6] = [
        (header::CONTENT_TYPE, fixed(file.media_type)),
        (header::ETAG, file.tag.clone()),
        // Asked for again each time, and sent only if it is another version's.
        (header::CACHE_CONTROL, fixed("no-cache")),
        (header::CONTENT_SECURITY_POLICY, fixed(POLICY)),
        (header::X_CONTENT_TYPE_OPTIONS, fixed("nosniff")),
        (header::REFERRER_POLICY, fixed("no-referrer")),
    ];
    let content = match status {
        StatusCode::OK => file.content,
        _ => "",
    };
    (status, about, content).into_response()
}

#[cfg(test)]
mod tests {
    use super::FILES;

    /// What a text names in double quotes behind a word.
    fn named<'a>(text: &'a str, word: &'a str) -> impl Iterator<Item = &'a str> {
        let behind = text.split(word).skip(1);
        behind.filter_map(|rest| rest.split('"').next())
    }

    #[test]
    fn the_page_needs_nothing_but_its_own_files_and_is_small() {
        let mut seen = 0;
        for file in FILES.iter() {
            let imports = named(file.content, " from \"./").collect::<Vec<_>>();
            let linked = named(file.content, "\"/page/").collect::<Vec<_>>();
            for name in imports.iter().chain(&linked) {
                assert!(
                    FILES.iter().any(|f| f.name == *name),
                    "{}: {name}",
                    file.name
                );
                seen += 1;
            }
            // Names of XML's own are no addresses to load from.
            let content = file.content.replace("http://www.w3.org/2000/svg", "");
            for elsewhere in [
                "http://",
                "https://",
                "src=\"//",
                "@import",
                "innerHTML",
                "eval(",
            ] {
                assert!(!content.contains(elsewhere), "{}: {elsewhere}", file.name);
            }
        }
        assert!(seen > 20);
        let all: usize = FILES.iter().map(|f| f.content.len()).sum();
        assert!(all < 150_000, "{all} bytes");
    }
}
