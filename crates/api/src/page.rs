//! The page at `/` for people: files of this crate's folder `page/`, compiled in.
//!
//! It is a client of the HTTP interface like any other, needs nothing from elsewhere, and its policy
//! lets a browser load nothing from elsewhere.

use std::sync::LazyLock;

use axum::extract::Path;
use axum::http::{HeaderMap, HeaderName, HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use daybook_events::Digest;
use flate2::Compression;

use crate::compress;
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
    /// The content in gzip with a tag of its own, where that is worth it.
    compressed: Option<(Bytes, HeaderValue)>,
}

impl File {
    fn new(name: &'static str, media_type: &'static str, content: &'static str) -> Self {
        let hash = Digest::of(content.as_bytes());
        let is_long = content.len() >= compress::LENGTH_MIN;
        let compressed = is_long.then(|| compress::gzip(content.as_bytes(), Compression::best()));
        Self {
            name,
            media_type,
            content,
            tag: tag(hash.hex()),
            compressed: compressed
                .and_then(Result::ok)
                .map(|bytes| (bytes.into(), tag(&format!("{}-gzip", hash.hex())))),
        }
    }
}

macro_rules! files {
    ($($name:literal: $media_type:literal),+ $(,)?) => {
        vec![$(File::new($name, $media_type, include_str!(concat!("../page/", $name)))),+]
    };
}

/// Compressed once, when the first of them is asked for.
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

fn tag(of: &str) -> HeaderValue {
    let tag = format!("\"{of}\"");
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
    let compressed = file.compressed.as_ref();
    let compressed = compressed.filter(|_| compress::takes_gzip(headers));
    let tag = compressed.map_or(&file.tag, |(_, tag)| tag);
    let known = headers.get_all(header::IF_NONE_MATCH).iter();
    let status = match known.into_iter().any(|known| known == tag) {
        true => StatusCode::NOT_MODIFIED,
        false => StatusCode::OK,
    };
    let fixed = |value| HeaderValue::from_static(value);
    let about: [(HeaderName, HeaderValue); 7] = [
        (header::CONTENT_TYPE, fixed(file.media_type)),
        (header::ETAG, tag.clone()),
        (header::VARY, fixed(compress::DECIDES)),
        // Asked for again each time, and sent only if it is another version's.
        (header::CACHE_CONTROL, fixed("no-cache")),
        (header::CONTENT_SECURITY_POLICY, fixed(POLICY)),
        (header::X_CONTENT_TYPE_OPTIONS, fixed("nosniff")),
        (header::REFERRER_POLICY, fixed("no-referrer")),
    ];
    if status == StatusCode::NOT_MODIFIED {
        return (status, about).into_response();
    }
    match compressed {
        Some((bytes, _)) => {
            let coding = [(header::CONTENT_ENCODING, fixed(compress::GZIP))];
            (status, about, coding, bytes.clone()).into_response()
        }
        None => (status, about, file.content).into_response(),
    }
}

#[cfg(test)]
mod tests {
    use super::{FILES, File};

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
        let sent = |f: &File| f.compressed.as_ref().map_or(f.content.len(), |c| c.0.len());
        let all: usize = FILES.iter().map(sent).sum();
        // Of the 150 KB that a view may take, most is left to what the ledger answers.
        assert!(all < 50_000, "{all} bytes");
    }
}
