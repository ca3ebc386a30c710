//! Stands between a client and a real API server, counts what it is asked for, and misbehaves when
//! it is told to.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::fs;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use bytes::Bytes;
use http_body_util::combinators::BoxBody;
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper::header::{AUTHORIZATION, DATE, HOST, HeaderValue};
use hyper::service::service_fn;
use hyper::{Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use rustls::pki_types::ServerName;
use serde_json::{Value, json};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::{JoinHandle, JoinSet};
use tokio_rustls::TlsConnector;

use super::{ControlPlane, TOKEN};

type Body = BoxBody<Bytes, hyper::Error>;
/// What is answered in place of the API server: asked with the method and the address with its query.
type Fault = dyn Fn(&str, &str) -> Option<(u16, String)> + Send + Sync;

/// The proxy. It ends when this is dropped.
pub struct FaultProxy {
    port: u16,
    shared: Arc<Shared>,
    server: JoinHandle<()>,
}

struct Shared {
    upstream: u16,
    tls: TlsConnector,
    fault: Mutex<Option<Box<Fault>>>,
    date: Mutex<Option<HeaderValue>>,
    hangs: AtomicBool,
    asked: Mutex<Vec<Asked>>,
    watches: Mutex<BTreeMap<String, usize>>,
    connections: Mutex<JoinSet<()>>,
}

/// A request that came through.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Asked {
    /// `GET`, `PATCH`, …
    pub method: String,
    /// Its path with its query.
    pub address: String,
}

impl Asked {
    /// Whether it asks to be told of changes, for as long as it is open.
    pub fn is_watch(&self) -> bool {
        self.method == "GET" && self.address.contains("watch=true")
    }

    /// Whether it asks for a change of the cluster, and not only for what would come of one.
    pub fn is_write(&self) -> bool {
        let reads = matches!(self.method.as_str(), "GET" | "HEAD" | "OPTIONS");
        !reads && !self.address.contains("dryRun=All")
    }

    /// The path without its query.
    pub fn path(&self) -> &str {
        self.address.split('?').next().unwrap_or_default()
    }
}

impl Drop for FaultProxy {
    fn drop(&mut self) {
        self.server.abort();
    }
}

impl FaultProxy {
    /// One in front of a control plane, which behaves.
    ///
    /// # Panics
    /// If it has no port.
    pub async fn start(plane: &ControlPlane) -> Self {
        let listener = TcpListener::bind(("127.0.0.1", 0)).await.expect("a port");
        let port = listener.local_addr().expect("an address").port();
        let shared = Arc::new(Shared {
            upstream: plane.port,
            tls: connector(plane),
            fault: Mutex::new(None),
            date: Mutex::new(None),
            hangs: AtomicBool::new(false),
            asked: Mutex::default(),
            watches: Mutex::default(),
            connections: Mutex::new(JoinSet::new()),
        });
        Self {
            port,
            shared: shared.clone(),
            server: tokio::spawn(serve(listener, shared)),
        }
    }

    /// A client of the administrator, through the proxy.
    ///
    /// # Panics
    /// If there cannot be one.
    pub fn client(&self) -> kube::Client {
        let _ = rustls::crypto::ring::default_provider().install_default();
        let url = format!("http://127.0.0.1:{}", self.port);
        let mut config = kube::Config::new(url.parse().expect("an address"));
        config.default_retry = false;
        kube::Client::try_from(config).expect("a client")
    }

    /// A kubeconfig for the same, with one context, `test`.
    ///
    /// # Panics
    /// If it cannot be written.
    pub fn write_kubeconfig(&self, file: &Path) {
        let config = json!({
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{ "name": "test", "cluster": {
                "server": format!("http://127.0.0.1:{}", self.port),
            }}],
            "users": [{ "name": "test", "user": {} }],
            "contexts": [{ "name": "test", "context": { "cluster": "test", "user": "test" } }],
            "current-context": "test",
        });
        // JSON is YAML.
        fs::write(file, config.to_string()).expect("the kubeconfig can be written");
    }

    /// What was asked for since this was called last.
    ///
    /// # Panics
    /// Never.
    pub fn take_asked(&self) -> Vec<Asked> {
        std::mem::take(&mut self.shared.asked.lock().expect("no panic"))
    }

    /// How many watches are open, by the collection that they are of, as the last part of its
    /// address names it: `pods`.
    ///
    /// # Panics
    /// Never.
    pub fn open_watches(&self) -> BTreeMap<String, usize> {
        let mut watches = self.shared.watches.lock().expect("no panic").clone();
        watches.retain(|_, open| *open > 0);
        watches
    }

    /// From now on answers in place of the API server what this does not leave to it.
    pub fn answer(
        &self,
        fault: impl Fn(&str, &str) -> Option<(u16, String)> + Send + Sync + 'static,
    ) {
        *self.shared.fault.lock().expect("no panic") = Some(Box::new(fault));
    }

    /// From now on says that it is this time, as a `Date` says it, in what it passes on.
    ///
    /// # Panics
    /// If it can be in no header.
    pub fn date(&self, date: &str) {
        let date = HeaderValue::from_str(date).expect("a date");
        *self.shared.date.lock().expect("no panic") = Some(date);
    }

    /// From now on takes every request and answers none. Who waits for an answer waits until
    /// [`FaultProxy::cut`], also once it behaves again.
    pub fn hang(&self) {
        self.shared.hangs.store(true, Ordering::SeqCst);
    }

    /// Behaves again.
    pub fn behave(&self) {
        *self.shared.fault.lock().expect("no panic") = None;
        *self.shared.date.lock().expect("no panic") = None;
        self.shared.hangs.store(false, Ordering::SeqCst);
    }

    /// Cuts all connections.
    pub fn cut(&self) {
        self.shared
            .connections
            .lock()
            .expect("no panic")
            .abort_all();
    }
}

/// A `Status` as API servers answer with it.
pub fn refusal(code: u16, reason: &str) -> (u16, String) {
    (code, status(code, reason).to_string())
}

/// The end of a watch that has become too old.
pub fn expired() -> (u16, String) {
    let event = json!({ "type": "ERROR", "object": status(410, "Expired") });
    (200, format!("{event}\n"))
}

fn status(code: u16, reason: &str) -> Value {
    json!({
        "apiVersion": "v1",
        "kind": "Status",
        "metadata": {},
        "status": "Failure",
        "message": format!("{reason} by order of a test"),
        "reason": reason,
        "code": code,
    })
}

async fn serve(listener: TcpListener, shared: Arc<Shared>) {
    loop {
        let Ok((stream, _)) = listener.accept().await else {
            continue;
        };
        let of_connection = shared.clone();
        let connection = async move {
            let service =
                service_fn(move |request| {
                    let shared = of_connection.clone();
                    async move {
                        let answer = shared.pass(request).await;
                        Ok::<_, Infallible>(answer.unwrap_or_else(|| {
                            plain(502, "the API server does not answer".to_owned())
                        }))
                    }
                });
            let _ = hyper::server::conn::http1::Builder::new()
                .serve_connection(TokioIo::new(stream), service)
                .await;
        };
        shared
            .connections
            .lock()
            .expect("no panic")
            .spawn(connection);
    }
}

impl Shared {
    /// Passes a request on, over a connection of its own.
    async fn pass(self: &Arc<Self>, mut request: Request<Incoming>) -> Option<Response<Body>> {
        let asked = Asked {
            method: request.method().to_string(),
            address: request.uri().to_string(),
        };
        let watch = asked.is_watch().then(|| OpenWatch::new(self, &asked));
        self.asked.lock().expect("no panic").push(asked);
        if self.hangs.load(Ordering::SeqCst) {
            std::future::pending::<()>().await;
        }
        let fault = {
            let fault = self.fault.lock().expect("no panic");
            let address = request.uri().to_string();
            fault
                .as_ref()
                .and_then(|fault| fault(request.method().as_str(), &address))
        };
        if let Some((code, text)) = fault {
            return Some(plain(code, text));
        }
        let stream = TcpStream::connect(("127.0.0.1", self.upstream))
            .await
            .ok()?;
        let name = ServerName::try_from("localhost").ok()?;
        let stream = self.tls.connect(name, stream).await.ok()?;
        let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream))
            .await
            .ok()?;
        tokio::spawn(connection);
        let token = HeaderValue::from_str(&format!("Bearer {TOKEN}")).ok()?;
        request.headers_mut().insert(AUTHORIZATION, token);
        request
            .headers_mut()
            .insert(HOST, HeaderValue::from_static("localhost"));
        let mut answer = sender.send_request(request).await.ok()?;
        if let Some(date) = self.date.lock().expect("no panic").clone() {
            answer.headers_mut().insert(DATE, date);
        }
        let is_open = watch.filter(|_| answer.status().is_success());
        Some(answer.map(|body| {
            match is_open {
                // It is open as long as somebody has its body.
                Some(open) => body
                    .map_frame(move |frame| {
                        let _ = &open;
                        frame
                    })
                    .boxed(),
                None => body.boxed(),
            }
        }))
    }
}

/// Counts a watch while it is open.
struct OpenWatch {
    shared: Arc<Shared>,
    of: String,
}

impl OpenWatch {
    fn new(shared: &Arc<Shared>, asked: &Asked) -> Self {
        let of = asked.path().rsplit('/').next().unwrap_or_default();
        let mut watches = shared.watches.lock().expect("no panic");
        *watches.entry(of.to_owned()).or_default() += 1;
        Self {
            shared: shared.clone(),
            of: of.to_owned(),
        }
    }
}

impl Drop for OpenWatch {
    fn drop(&mut self) {
        if let Ok(mut watches) = self.shared.watches.lock()
            && let Some(open) = watches.get_mut(&self.of)
        {
            *open -= 1;
        }
    }
}

fn plain(code: u16, text: String) -> Response<Body> {
    let body = Full::new(Bytes::from(text)).map_err(|never| match never {});
    let mut answer = Response::new(body.boxed());
    *answer.status_mut() = StatusCode::from_u16(code).expect("a status");
    let json = HeaderValue::from_static("application/json");
    answer.headers_mut().insert("content-type", json);
    answer
}

fn connector(plane: &ControlPlane) -> TlsConnector {
    let ca = fs::read(plane.dir.path().join("ca.crt")).expect("a certificate");
    let mut roots = rustls::RootCertStore::empty();
    for certificate in certificates(&ca) {
        roots.add(certificate).expect("a certificate");
    }
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = rustls::ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .expect("versions")
        .with_root_certificates(roots)
        .with_no_client_auth();
    TlsConnector::from(Arc::new(config))
}

fn certificates(pem: &[u8]) -> Vec<rustls::pki_types::CertificateDer<'static>> {
    use rustls::pki_types::pem::PemObject as _;
    rustls::pki_types::CertificateDer::pem_slice_iter(pem)
        .map(|certificate| certificate.expect("a certificate"))
        .collect()
}
