//! A node with a kubelet that hands out what containers print, and does nothing else.
//!
//! The API server asks kubelets for output at the address that the Node object names, over TLS,
//! with `GET /containerLogs/<namespace>/<pod>/<container>`. A pod has to be bound to the node.

use std::collections::HashMap;
use std::convert::Infallible;
use std::fmt;
use std::sync::{Arc, Mutex};

use bytes::Bytes;
use futures_util::stream::{self, Stream};
use http_body_util::combinators::BoxBody;
use http_body_util::{BodyExt, Full, StreamBody};
use hyper::body::{Frame, Incoming};
use hyper::service::service_fn;
use hyper::{Request, Response};
use hyper_util::rt::TokioIo;
use k8s_openapi::api::core::v1::{Node as NodeObject, Pod};
use k8s_openapi::jiff::Timestamp;
use kube::api::{Patch, PatchParams, PostParams};
use kube::{Api, Client, ResourceExt};
use rustls::pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer};
use serde_json::json;
use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio::task::{JoinHandle, JoinSet};
use tokio_rustls::TlsAcceptor;

/// What the runs of a container printed, the newest last.
type Runs = Vec<Run>;

#[derive(Debug, Clone, Default)]
struct Run {
    lines: Vec<(Timestamp, String)>,
    ended: bool,
}

/// Whether what is asked for is the run before, from when on, and whether to wait for more.
#[derive(Debug, Clone, Copy)]
struct Asked {
    previous: bool,
    since: Option<Timestamp>,
    follow: bool,
}

/// No longer answering when it is dropped.
pub struct Node {
    name: String,
    client: Client,
    output: Arc<watch::Sender<HashMap<String, Runs>>>,
    connections: Arc<Mutex<JoinSet<()>>>,
    server: JoinHandle<()>,
}

impl fmt::Debug for Node {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut node = f.debug_struct("Node");
        node.field("name", &self.name).finish_non_exhaustive()
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        self.server.abort();
    }
}

impl Node {
    /// A node of this name.
    ///
    /// # Panics
    /// If the API server does not take it.
    pub async fn start(client: Client, name: &str) -> Self {
        let listener = TcpListener::bind(("127.0.0.1", 0)).await.expect("a port");
        let port = listener.local_addr().expect("an address").port();
        let nodes: Api<NodeObject> = Api::all(client.clone());
        let node = json!({ "metadata": { "name": name } });
        let node = serde_json::from_value(node).expect("a node");
        let created = nodes.create(&PostParams::default(), &node).await;
        created.expect("the node is taken");
        let status = json!({ "status": {
            "addresses": [{ "type": "InternalIP", "address": "127.0.0.1" }],
            "daemonEndpoints": { "kubeletEndpoint": { "Port": port } },
        }});
        let params = PatchParams::default();
        let patched = nodes
            .patch_status(name, &params, &Patch::Merge(status))
            .await;
        patched.expect("its address is taken");
        let output = Arc::new(watch::Sender::default());
        let connections = Arc::new(Mutex::new(JoinSet::new()));
        let server = serve(listener, output.clone(), connections.clone());
        Self {
            name: name.to_owned(),
            client,
            output,
            connections,
            server: tokio::spawn(server),
        }
    }

    /// Has a pod run here.
    ///
    /// # Panics
    /// If the API server does not take that.
    pub async fn bind(&self, pod: &Pod) {
        let name = pod.name_any();
        let namespace = pod.namespace().unwrap_or_default();
        let binding = json!({
            "apiVersion": "v1",
            "kind": "Binding",
            "metadata": { "name": name, "namespace": namespace },
            "target": { "apiVersion": "v1", "kind": "Node", "name": self.name },
        });
        let path = format!("/api/v1/namespaces/{namespace}/pods/{name}/binding");
        let request = Request::post(path).header("content-type", "application/json");
        let request = request.body(binding.to_string().into_bytes());
        let bound = self.client.request_text(request.expect("a request")).await;
        bound.expect("the pod is bound");
    }

    /// A pod's container prints a line.
    pub fn print(&self, pod: &str, text: &str) {
        self.print_at(pod, Timestamp::now(), text);
    }

    /// A pod's container prints a line, which the runtime takes at this time.
    pub fn print_at(&self, pod: &str, time: Timestamp, text: &str) {
        self.change(pod, |runs| {
            let last = runs.last_mut().expect("a run");
            last.lines.push((time, text.to_owned()));
        });
    }

    /// The container of that name of a pod with several prints a line.
    pub fn print_in(&self, pod: &str, container: &str, text: &str) {
        self.print(&format!("{pod}/{container}"), text);
    }

    /// It ends, and nothing comes after it.
    pub fn end(&self, pod: &str) {
        self.change(pod, |runs| runs.last_mut().expect("a run").ended = true);
    }

    /// The same of the container of that name of a pod with several.
    pub fn end_in(&self, pod: &str, container: &str) {
        self.end(&format!("{pod}/{container}"));
    }

    /// It ends, and begins again.
    pub fn restart(&self, pod: &str) {
        self.change(pod, |runs| {
            runs.last_mut().expect("a run").ended = true;
            runs.push(Run::default());
        });
    }

    /// Cuts all connections.
    pub fn cut(&self) {
        self.connections.lock().expect("no panic").abort_all();
    }

    fn change(&self, pod: &str, how: impl FnOnce(&mut Runs)) {
        self.output.send_modify(|all| {
            let runs = all.entry(pod.to_owned()).or_default();
            if runs.is_empty() {
                runs.push(Run::default());
            }
            how(runs);
        });
    }
}

async fn serve(
    listener: TcpListener,
    output: Arc<watch::Sender<HashMap<String, Runs>>>,
    connections: Arc<Mutex<JoinSet<()>>>,
) {
    let tls = acceptor();
    loop {
        let Ok((stream, _)) = listener.accept().await else {
            continue;
        };
        let (tls, output) = (tls.clone(), output.clone());
        let connection = async move {
            let Ok(stream) = tls.accept(stream).await else {
                return;
            };
            let service = service_fn(move |request| {
                let answer = answer(&request, output.subscribe());
                async move { Ok::<_, Infallible>(answer) }
            });
            let _ = hyper::server::conn::http1::Builder::new()
                .serve_connection(TokioIo::new(stream), service)
                .await;
        };
        connections.lock().expect("no panic").spawn(connection);
    }
}

fn answer(
    request: &Request<Incoming>,
    output: watch::Receiver<HashMap<String, Runs>>,
) -> Response<BoxBody<Bytes, Infallible>> {
    let mut path = request.uri().path().split('/').skip(3);
    let (pod, container) = (path.next().unwrap_or_default(), path.next());
    // Of a pod with several containers, what was printed in this one.
    let one = container.map(|container| format!("{pod}/{container}"));
    let one = one.filter(|one| {
        let of_several = format!("{pod}/");
        let all = output.borrow();
        all.contains_key(one) || all.keys().any(|key| key.starts_with(&of_several))
    });
    let pod = one.as_deref().unwrap_or(pod);
    let query = request.uri().query().unwrap_or_default();
    let value = |name: &str| {
        let mut pairs = query.split('&').filter_map(|pair| pair.split_once('='));
        pairs.find(|(key, _)| *key == name).map(|(_, value)| value)
    };
    let asked = Asked {
        previous: value("previous") == Some("true"),
        since: value("sinceTime").and_then(|time| time.replace("%3A", ":").parse().ok()),
        follow: value("follow") == Some("true"),
    };
    let runs = output.borrow().get(pod).map_or(1, Vec::len);
    let Some(run) = runs.checked_sub(1 + usize::from(asked.previous)) else {
        let said = Full::new(Bytes::from_static(
            b"previous terminated container not found",
        ));
        let mut refused = Response::new(said.boxed());
        *refused.status_mut() = hyper::StatusCode::BAD_REQUEST;
        return refused;
    };
    let reader = Reader {
        pod: pod.to_owned(),
        run,
        asked,
        output,
        sent: 0,
    };
    let frames = stream::unfold(reader, |mut reader| async move {
        let text = reader.next().await?;
        Some((Ok(Frame::data(Bytes::from(text))), reader))
    });
    Response::new(BodyExt::boxed(StreamBody::new(SendStream(Mutex::new(
        Box::pin(frames),
    )))))
}

/// A stream of frames; the type of bodies wants them to be shared, which they never are.
struct SendStream(Mutex<stream::BoxStream<'static, Result<Frame<Bytes>, Infallible>>>);

impl Stream for SendStream {
    type Item = Result<Frame<Bytes>, Infallible>;

    fn poll_next(
        self: std::pin::Pin<&mut Self>,
        context: &mut std::task::Context<'_>,
    ) -> std::task::Poll<Option<Self::Item>> {
        let mut frames = self.0.lock().expect("no panic");
        frames.as_mut().poll_next(context)
    }
}

struct Reader {
    pod: String,
    run: usize,
    asked: Asked,
    output: watch::Receiver<HashMap<String, Runs>>,
    sent: usize,
}

impl Reader {
    /// What is new, with the time of each line in front of it.
    async fn next(&mut self) -> Option<String> {
        loop {
            let (text, ended) = {
                let all = self.output.borrow_and_update();
                let run = all.get(&self.pod).and_then(|runs| runs.get(self.run));
                let run = run.cloned().unwrap_or_default();
                let new = run.lines.iter().skip(self.sent);
                // A kubelet knows whole seconds only.
                let since = self.asked.since.map_or(i64::MIN, Timestamp::as_second);
                let new = new.filter(|(time, _)| time.as_second() >= since);
                let text: String = new.map(|(time, text)| format!("{time} {text}\n")).collect();
                self.sent = run.lines.len();
                (text, run.ended)
            };
            if !text.is_empty() {
                return Some(text);
            }
            if ended || !self.asked.follow || self.output.changed().await.is_err() {
                return None;
            }
        }
    }
}

fn acceptor() -> TlsAcceptor {
    let names = vec!["127.0.0.1".to_owned()];
    let own = rcgen::generate_simple_self_signed(names).expect("a certificate");
    let key = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(own.signing_key.serialize_der()));
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = rustls::ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .expect("versions")
        .with_no_client_auth()
        .with_single_cert(vec![own.cert.der().clone()], key)
        .expect("a server's configuration");
    TlsAcceptor::from(Arc::new(config))
}
