//! A git server over HTTP on a loopback port: the real `git http-backend`, run as the CGI program
//! that it is.

use std::convert::Infallible;
use std::net::SocketAddr;
use std::path::Path;
use std::process::Stdio;
use std::sync::{Arc, Mutex, PoisonError};

use base64::Engine as _;
use bytes::Bytes;
use http_body_util::{BodyExt as _, Full};
use hyper::body::Incoming;
use hyper::header::{AUTHORIZATION, CONTENT_TYPE, HeaderName, HeaderValue, WWW_AUTHENTICATE};
use hyper::service::service_fn;
use hyper::{Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt as _};
use tokio::net::TcpListener;
use tokio::process::Command;
use tokio::task::JoinSet;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::rustls::ServerConfig;
use tokio_rustls::rustls::pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer};

/// A request that the server saw.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Seen {
    /// Method and path with query: `GET /repository.git/info/refs?service=git-upload-pack`.
    pub line: String,
    /// The `Authorization` header.
    pub authorization: Option<String>,
}

/// What is answered to paths that start with a prefix, instead of git.
#[derive(Debug, Clone)]
enum Answer {
    Fixed {
        status: u16,
        headers: Vec<(String, String)>,
        body: String,
    },
    /// A redirect that keeps the rest of the path and the query.
    Redirect(String),
    /// Nothing, ever.
    Silence,
    /// The first bytes of what git answers, and then the end of the connection's body.
    CutAfter(usize),
}

#[derive(Debug, Default)]
struct Rules {
    answers: Vec<(String, Answer)>,
    authorization: Option<String>,
    seen: Vec<Seen>,
}

/// The server. It stops, with all its connections and processes, when dropped.
#[derive(Debug)]
pub struct GitHttpServer {
    address: SocketAddr,
    certificate: Option<String>,
    rules: Arc<Mutex<Rules>>,
    task: tokio::task::JoinHandle<()>,
}

impl Drop for GitHttpServer {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl GitHttpServer {
    /// Serves all repositories in a folder over plain HTTP.
    pub async fn start(root: &Path) -> Self {
        Self::listen(root, None).await
    }

    /// Serves all repositories in a folder over HTTPS, for the name `localhost`, with a
    /// certificate that [`Self::certificate`] tells.
    pub async fn start_tls(root: &Path) -> Self {
        let made = rcgen::generate_simple_self_signed(vec!["localhost".to_owned()])
            .expect("a certificate can be made");
        let key = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(made.signing_key.serialize_der()));
        let provider = tokio_rustls::rustls::crypto::ring::default_provider();
        let config = ServerConfig::builder_with_provider(Arc::new(provider))
            .with_safe_default_protocol_versions()
            .expect("TLS versions")
            .with_no_client_auth()
            .with_single_cert(vec![made.cert.der().clone()], key)
            .expect("a usable certificate");
        Self::listen(root, Some((Arc::new(config), made.cert.pem()))).await
    }

    async fn listen(root: &Path, tls: Option<(Arc<ServerConfig>, String)>) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let address = listener.local_addr().expect("an address");
        let rules = Arc::new(Mutex::new(Rules::default()));
        let (config, certificate) = tls.unzip();
        let task = tokio::spawn(accept(
            listener,
            config.map(TlsAcceptor::from),
            Arc::from(root),
            rules.clone(),
        ));
        Self {
            address,
            certificate,
            rules,
            task,
        }
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// The certificate to trust, in PEM.
    pub fn certificate(&self) -> Option<&str> {
        self.certificate.as_deref()
    }

    /// The URL of a path.
    pub fn url(&self, path: &str) -> String {
        let port = self.address.port();
        match self.certificate {
            Some(_) => format!("https://localhost:{port}/{path}"),
            None => format!("http://127.0.0.1:{port}/{path}"),
        }
    }

    /// From now on asks for this user and password.
    pub fn require(&self, user: &str, password: &str) {
        self.rules().authorization = Some(format!(
            "Basic {}",
            base64::engine::general_purpose::STANDARD.encode(format!("{user}:{password}"))
        ));
    }

    /// Answers requests for paths that start with `prefix` with this.
    pub fn answer(&self, prefix: &str, status: u16, content_type: &str, body: &str) {
        self.add(
            prefix,
            Answer::Fixed {
                status,
                headers: vec![("content-type".into(), content_type.into())],
                body: body.into(),
            },
        );
    }

    /// Redirects paths that start with `prefix` to `target` and the rest of the path.
    pub fn redirect(&self, prefix: &str, target: &str) {
        self.add(prefix, Answer::Redirect(target.into()));
    }

    /// Never answers requests for paths that start with `prefix`.
    pub fn stay_silent(&self, prefix: &str) {
        self.add(prefix, Answer::Silence);
    }

    /// Cuts the answers for paths that start with `prefix` after some bytes.
    pub fn cut_after(&self, prefix: &str, bytes: usize) {
        self.add(prefix, Answer::CutAfter(bytes));
    }

    /// Forgets all special answers.
    pub fn behave(&self) {
        self.rules().answers.clear();
    }

    /// What was asked so far.
    pub fn seen(&self) -> Vec<Seen> {
        self.rules().seen.clone()
    }

    fn add(&self, prefix: &str, answer: Answer) {
        self.rules().answers.push((prefix.to_owned(), answer));
    }

    fn rules(&self) -> std::sync::MutexGuard<'_, Rules> {
        self.rules.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

async fn accept(
    listener: TcpListener,
    tls: Option<TlsAcceptor>,
    root: Arc<Path>,
    rules: Arc<Mutex<Rules>>,
) {
    let mut connections = JoinSet::new();
    while let Ok((socket, _)) = listener.accept().await {
        let (tls, root, rules) = (tls.clone(), root.clone(), rules.clone());
        connections.spawn(async move {
            match tls {
                None => serve(socket, root, rules).await,
                Some(tls) => {
                    if let Ok(socket) = tls.accept(socket).await {
                        serve(socket, root, rules).await;
                    }
                }
            }
        });
        while connections.try_join_next().is_some() {}
    }
}

async fn serve<S>(socket: S, root: Arc<Path>, rules: Arc<Mutex<Rules>>)
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let service = service_fn(move |request| {
        let (root, rules) = (root.clone(), rules.clone());
        async move { Ok::<_, Infallible>(respond(request, &root, &rules).await) }
    });
    // A client that goes away is no concern of the server.
    let _ = hyper::server::conn::http1::Builder::new()
        .serve_connection(TokioIo::new(socket), service)
        .await;
}

async fn respond(
    request: Request<Incoming>,
    root: &Path,
    rules: &Mutex<Rules>,
) -> Response<Full<Bytes>> {
    let authorization = request
        .headers()
        .get(AUTHORIZATION)
        .and_then(|v| v.to_str().ok())
        .map(str::to_owned);
    let whole_path = request
        .uri()
        .path_and_query()
        .map_or_else(String::new, |p| p.to_string());
    let answer = {
        let mut rules = rules.lock().unwrap_or_else(PoisonError::into_inner);
        rules.seen.push(Seen {
            line: format!("{} {whole_path}", request.method()),
            authorization: authorization.clone(),
        });
        if rules.authorization.is_some() && rules.authorization != authorization {
            let mut response = plain(StatusCode::UNAUTHORIZED, "who are you?");
            response.headers_mut().insert(
                WWW_AUTHENTICATE,
                HeaderValue::from_static("Basic realm=\"git\""),
            );
            return response;
        }
        rules
            .answers
            .iter()
            .find(|(prefix, _)| whole_path.starts_with(prefix.as_str()))
            .cloned()
    };
    match answer {
        None => git_http_backend(request, root).await,
        Some((_, Answer::Silence)) => std::future::pending().await,
        Some((_, Answer::CutAfter(bytes))) => git_http_backend(request, root)
            .await
            .map(|body| cut(body, bytes)),
        Some((prefix, Answer::Redirect(target))) => {
            let rest = whole_path.strip_prefix(&prefix).unwrap_or_default();
            let mut response = plain(StatusCode::MOVED_PERMANENTLY, "elsewhere");
            if let Ok(location) = HeaderValue::from_str(&format!("{target}{rest}")) {
                response.headers_mut().insert("location", location);
            }
            response
        }
        Some((
            _,
            Answer::Fixed {
                status,
                headers,
                body,
            },
        )) => {
            let mut response = plain(
                StatusCode::from_u16(status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR),
                &body,
            );
            for (name, value) in headers {
                if let (Ok(n), Ok(v)) = (
                    HeaderName::try_from(name.as_str()),
                    HeaderValue::from_str(&value),
                ) {
                    response.headers_mut().insert(n, v);
                }
            }
            response
        }
    }
}

/// Runs one request through `git http-backend`.
async fn git_http_backend(request: Request<Incoming>, root: &Path) -> Response<Full<Bytes>> {
    let (head, body) = request.into_parts();
    let Ok(body) = body.collect().await.map(|b| b.to_bytes()) else {
        return plain(StatusCode::BAD_REQUEST, "the request broke off");
    };
    let header = |name: HeaderName| {
        head.headers
            .get(name)
            .and_then(|v| v.to_str().ok())
            .unwrap_or_default()
            .to_owned()
    };
    let mut child = Command::new("git")
        .arg("http-backend")
        .env("GIT_PROJECT_ROOT", root)
        .env("GIT_HTTP_EXPORT_ALL", "1")
        .env("GIT_CONFIG_NOSYSTEM", "1")
        .env("GIT_CONFIG_GLOBAL", "/dev/null")
        .env("PATH_INFO", head.uri.path())
        .env("QUERY_STRING", head.uri.query().unwrap_or_default())
        .env("REQUEST_METHOD", head.method.as_str())
        .env("CONTENT_TYPE", header(CONTENT_TYPE))
        .env("CONTENT_LENGTH", body.len().to_string())
        .env("REMOTE_ADDR", "127.0.0.1")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .kill_on_drop(true)
        .spawn()
        .expect("git is on PATH");
    let mut input = child.stdin.take().expect("a pipe");
    let (_, output) = tokio::join!(
        async move {
            // git may answer and go without reading all of it.
            let _ = input.write_all(&body).await;
        },
        child.wait_with_output()
    );
    let output = output.expect("git http-backend ends").stdout;
    cgi_response(&output)
}

fn cgi_response(output: &[u8]) -> Response<Full<Bytes>> {
    let end = output
        .windows(4)
        .position(|w| w == b"\r\n\r\n")
        .unwrap_or(output.len());
    let mut response = plain(StatusCode::OK, "");
    for line in String::from_utf8_lossy(&output[..end]).lines() {
        let Some((name, value)) = line.split_once(':') else {
            continue;
        };
        let value = value.trim();
        if name.eq_ignore_ascii_case("status") {
            let code = value.split(' ').next().and_then(|c| c.parse().ok());
            *response.status_mut() = code
                .and_then(|c: u16| StatusCode::from_u16(c).ok())
                .unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        } else if let (Ok(n), Ok(v)) = (HeaderName::try_from(name), HeaderValue::from_str(value)) {
            response.headers_mut().insert(n, v);
        }
    }
    let body = output.get(end + 4..).unwrap_or_default().to_vec();
    *response.body_mut() = Full::from(body);
    response
}

fn cut(body: Full<Bytes>, bytes: usize) -> Full<Bytes> {
    // `Full` gives its one frame at once.
    let waker = std::task::Waker::noop();
    let mut context = std::task::Context::from_waker(waker);
    let mut body = body;
    match hyper::body::Body::poll_frame(std::pin::Pin::new(&mut body), &mut context) {
        std::task::Poll::Ready(Some(Ok(frame))) => match frame.into_data() {
            Ok(data) => Full::from(data.slice(..bytes.min(data.len()))),
            Err(_) => Full::default(),
        },
        _ => Full::default(),
    }
}

fn plain(status: StatusCode, text: &str) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::from(text.to_owned()));
    *response.status_mut() = status;
    response
}
