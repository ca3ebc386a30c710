//! The file server of static sites, as a process of its own.
//!
//! It serves files below one folder, never anything outside it whatever a path or a symbolic
//! link says, and no file whose name starts with a dot, other than below `.well-known`.

use std::convert::Infallible;
use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, UNIX_EPOCH};

use bytes::Bytes;
use futures_util::TryStreamExt;
use http_body_util::{BodyExt, Empty, Full, StreamBody, combinators::BoxBody};
use hyper::body::{Frame, Incoming};
use hyper::header::{
    ALLOW, CACHE_CONTROL, CONTENT_LENGTH, CONTENT_TYPE, ETAG, HeaderValue, IF_NONE_MATCH, LOCATION,
    X_CONTENT_TYPE_OPTIONS,
};
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::fs::File;
use tokio::net::TcpListener;
use tokio_util::io::ReaderStream;

type Body = BoxBody<Bytes, io::Error>;

/// Serves the files of a folder on a port of the loopback interface, until the process ends.
/// Fails if the folder does not exist or the port is taken.
pub async fn run(dir: &Path, port: u16) -> io::Result<()> {
    let root: Arc<Path> = dir.canonicalize()?.into();
    if !root.is_dir() {
        return Err(io::ErrorKind::NotADirectory.into());
    }
    let listener = TcpListener::bind(SocketAddr::from((Ipv4Addr::LOCALHOST, port))).await?;
    loop {
        let Ok((stream, _)) = listener.accept().await else {
            // Too many open files: wait until some are closed.
            tokio::time::sleep(Duration::from_millis(50)).await;
            continue;
        };
        let root = root.clone();
        tokio::spawn(async move {
            let service = hyper::service::service_fn(|request| {
                let root = root.clone();
                async move { Ok::<_, Infallible>(answer(&root, &request).await) }
            });
            // A client that goes away early is no event.
            let _ = hyper::server::conn::http1::Builder::new()
                .timer(TokioTimer::new())
                .serve_connection(TokioIo::new(stream), service)
                .await;
        });
    }
}

async fn answer(root: &Path, request: &Request<Incoming>) -> Response<Body> {
    if !matches!(*request.method(), Method::GET | Method::HEAD) {
        let mut response = text(StatusCode::METHOD_NOT_ALLOWED, "only GET and HEAD");
        let allowed = HeaderValue::from_static("GET, HEAD");
        response.headers_mut().insert(ALLOW, allowed);
        return response;
    }
    let path = request.uri().path();
    let found = match relative(path) {
        Some(relative) => find(root, &relative, path.ends_with('/')).await,
        None => Found::Nothing,
    };
    let sent = match found {
        Found::File(path) => send(&path, StatusCode::OK, request).await,
        Found::Folder => return to_folder(request),
        Found::Nothing => match within(root, &root.join("404.html")).await {
            Some(path) => send(&path, StatusCode::NOT_FOUND, request).await,
            None => return text(StatusCode::NOT_FOUND, "no such file"),
        },
    };
    sent.unwrap_or_else(|error| match error.kind() {
        io::ErrorKind::NotFound => text(StatusCode::NOT_FOUND, "no such file"),
        _ => text(StatusCode::INTERNAL_SERVER_ERROR, "the file cannot be read"),
    })
}

enum Found {
    File(PathBuf),
    /// A folder, asked for without the slash that makes its links work.
    Folder,
    Nothing,
}

async fn find(root: &Path, relative: &Path, slash: bool) -> Found {
    let path = root.join(relative);
    match tokio::fs::metadata(&path).await {
        Ok(meta) if meta.is_dir() && !slash => match within(root, &path.join("index.html")).await {
            Some(_) => Found::Folder,
            None => Found::Nothing,
        },
        Ok(meta) if meta.is_dir() => match within(root, &path.join("index.html")).await {
            Some(file) => Found::File(file),
            None => Found::Nothing,
        },
        Ok(_) if !slash => match within(root, &path).await {
            Some(file) => Found::File(file),
            None => Found::Nothing,
        },
        _ => Found::Nothing,
    }
}

/// The real path of a file, if it is one and below the root.
async fn within(root: &Path, path: &Path) -> Option<PathBuf> {
    let real = tokio::fs::canonicalize(path).await.ok()?;
    let is_file = tokio::fs::metadata(&real).await.ok()?.is_file();
    (is_file && real.starts_with(root)).then_some(real)
}

/// The path of a request as a path below the root; `None` if it is none that is served.
fn relative(path: &str) -> Option<PathBuf> {
    let decoded = decode(path)?;
    let mut relative = PathBuf::new();
    for part in decoded.split('/').filter(|p| !p.is_empty()) {
        let hidden = part.starts_with('.') && part != ".well-known";
        if hidden || part.contains(['\\', '\0']) {
            return None;
        }
        relative.push(part);
    }
    Some(relative)
}

fn decode(path: &str) -> Option<String> {
    let mut bytes = Vec::with_capacity(path.len());
    let mut rest = path.bytes();
    while let Some(byte) = rest.next() {
        if byte == b'%' {
            let digits = [rest.next()?, rest.next()?];
            let digits = std::str::from_utf8(&digits).ok()?;
            bytes.push(u8::from_str_radix(digits, 16).ok()?);
        } else {
            bytes.push(byte);
        }
    }
    String::from_utf8(bytes).ok()
}

/// Sends the browser to the same path with a slash. Only a path: never to another host.
fn to_folder(request: &Request<Incoming>) -> Response<Body> {
    let path = request.uri().path().trim_start_matches('/');
    let mut response = text(StatusCode::MOVED_PERMANENTLY, "see the folder");
    match HeaderValue::from_str(&format!("/{path}/")) {
        Ok(location) => {
            response.headers_mut().insert(LOCATION, location);
            response
        }
        Err(_) => text(StatusCode::NOT_FOUND, "no such file"),
    }
}

async fn send(
    path: &Path,
    status: StatusCode,
    request: &Request<Incoming>,
) -> io::Result<Response<Body>> {
    let file = File::open(path).await?;
    let meta = file.metadata().await?;
    let changed = meta.modified()?.duration_since(UNIX_EPOCH);
    let tag = format!(
        "\"{:x}-{:x}\"",
        changed.unwrap_or_default().as_nanos(),
        meta.len()
    );
    let same = request
        .headers()
        .get(IF_NONE_MATCH)
        .is_some_and(|known| known.as_bytes() == tag.as_bytes());
    let mut response = Response::new(Empty::new().map_err(never).boxed());
    let headers = response.headers_mut();
    headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-cache"));
    if let Ok(tag) = HeaderValue::from_str(&tag) {
        headers.insert(ETAG, tag);
    }
    if same && status == StatusCode::OK {
        *response.status_mut() = StatusCode::NOT_MODIFIED;
        return Ok(response);
    }
    headers.insert(CONTENT_TYPE, HeaderValue::from_static(media_type(path)));
    headers.insert(X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
    headers.insert(CONTENT_LENGTH, meta.len().into());
    *response.status_mut() = status;
    if request.method() == Method::GET {
        let chunks = ReaderStream::with_capacity(file, 64 * 1024).map_ok(Frame::data);
        *response.body_mut() = BodyExt::boxed(StreamBody::new(chunks));
    }
    Ok(response)
}

fn text(status: StatusCode, text: &'static str) -> Response<Body> {
    let mut response = Response::new(Full::from(text).map_err(never).boxed());
    *response.status_mut() = status;
    let plain = HeaderValue::from_static("text/plain; charset=utf-8");
    response.headers_mut().insert(CONTENT_TYPE, plain);
    response
}

fn never(never: Infallible) -> io::Error {
    match never {}
}

fn media_type(path: &Path) -> &'static str {
    let extension = path.extension().and_then(|e| e.to_str()).unwrap_or("");
    match extension.to_ascii_lowercase().as_str() {
        "html" | "htm" => "text/html; charset=utf-8",
        "css" => "text/css; charset=utf-8",
        "js" | "mjs" => "text/javascript; charset=utf-8",
        "json" | "map" => "application/json",
        "webmanifest" => "application/manifest+json",
        "txt" | "md" => "text/plain; charset=utf-8",
        "xml" => "application/xml",
        "csv" => "text/csv; charset=utf-8",
        "svg" => "image/svg+xml",
        "png" => "image/png",
        "jpg" | "jpeg" => "image/jpeg",
        "gif" => "image/gif",
        "webp" => "image/webp",
        "avif" => "image/avif",
        "ico" => "image/x-icon",
        "woff" => "font/woff",
        "woff2" => "font/woff2",
        "ttf" => "font/ttf",
        "otf" => "font/otf",
        "wasm" => "application/wasm",
        "pdf" => "application/pdf",
        "mp3" => "audio/mpeg",
        "mp4" => "video/mp4",
        "webm" => "video/webm",
        _ => "application/octet-stream",
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    async fn get(port: u16, path: &str, extra: &str) -> String {
        let mut stream = tokio::net::TcpStream::connect(("127.0.0.1", port))
            .await
            .unwrap();
        let request = format!("GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n{extra}\r\n");
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        answer
    }

    #[tokio::test]
    async fn files_below_the_folder_are_served_and_no_others() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("secret.txt"), "secret").unwrap();
        let site = dir.path().join("site");
        std::fs::create_dir_all(site.join("sub")).unwrap();
        std::fs::create_dir_all(site.join(".git")).unwrap();
        std::fs::write(site.join("index.html"), "home").unwrap();
        std::fs::write(site.join("sub/index.html"), "below").unwrap();
        std::fs::write(site.join("a b.css"), "style").unwrap();
        std::fs::write(site.join(".git/config"), "hidden").unwrap();
        std::os::unix::fs::symlink("../secret.txt", site.join("link.txt")).unwrap();
        let port = daybook_testkit::free_addr().port();
        let server = tokio::spawn({
            let site = site.clone();
            async move { run(&site, port).await }
        });
        while tokio::net::TcpStream::connect(("127.0.0.1", port))
            .await
            .is_err()
        {
            assert!(!server.is_finished());
            tokio::task::yield_now().await;
        }
        for (path, status, content) in [
            ("/", "200", "home"),
            ("/sub/", "200", "below"),
            ("/sub", "301", "location: /sub/"),
            ("//evil.example/../sub", "404", ""),
            ("/a%20b.css", "200", "text/css"),
            ("/none", "404", "no such file"),
            ("/index.html/", "404", ""),
            ("/../secret.txt", "404", ""),
            ("/%2e%2e/secret.txt", "404", ""),
            ("/..%2fsecret.txt", "404", ""),
            ("/link.txt", "404", ""),
            ("/.git/config", "404", ""),
            ("/%00", "404", ""),
            ("/%zz", "404", ""),
        ] {
            let answer = get(port, path, "").await;
            assert!(
                answer.starts_with(&format!("HTTP/1.1 {status}")),
                "{path}: {answer}"
            );
            assert!(answer.contains(content), "{path}: {answer}");
            assert!(
                !answer.contains("secret") && !answer.contains("hidden"),
                "{path}"
            );
        }
        let first = get(port, "/", "").await;
        let tag = first
            .lines()
            .find_map(|l| l.strip_prefix("etag: "))
            .unwrap();
        let again = get(port, "/", &format!("If-None-Match: {tag}\r\n")).await;
        assert!(again.starts_with("HTTP/1.1 304"), "{again}");
        std::fs::write(site.join("404.html"), "lost").unwrap();
        assert!(get(port, "/none", "").await.ends_with("lost"));
        server.abort();
    }
}
