//! A server under test, with everything that it stands on.

use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use async_trait::async_trait;
use daybook_api::{AppState, Parts, Settings};
use daybook_events::deployment::{self, *};
use daybook_events::lines::{Line, LineKind, LineLog, LineSource, NewLine};
use daybook_events::log::{
    Append, AppendError, Appended, Consumer, ConsumerConfig, EventStream, Expected, LogInfo,
    ReadError, Recorded,
};
use daybook_events::memory::MemoryLog;
use daybook_events::routing::{self, Command, Hostnames, Target};
use daybook_events::spec::PinnedImage;
use daybook_events::*;
use daybook_projections::{Executed, Ledger, Projections, runner};
use daybook_secrets::SecretFolder;
use daybook_store::embedded::{EmbeddedConfig, EmbeddedLines, EmbeddedLog, LineRetention};
use futures_util::stream::BoxStream;
use jiff::Timestamp;
use reqwest::{Method, StatusCode};
use serde_json::{Value, json};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

pub const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";
pub const DIGEST: &str = "sha256:0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef";
/// Long enough for a loaded machine; nothing waits for it unless something is wrong.
pub const PATIENCE: Duration = Duration::from_secs(60);

pub struct Server {
    pub base: String,
    pub client: reqwest::Client,
    pub log: Arc<dyn EventLog>,
    pub ledger: Ledger,
    pub lines: Arc<dyn LineLog>,
    pub watched: Arc<WatchedLines>,
    pub parts: Parts,
    pub cancel: CancellationToken,
    pub folding: CancellationToken,
    pub serving: Option<JoinHandle<()>>,
    pub folder: Option<JoinHandle<()>>,
    _dir: tempfile::TempDir,
}

impl Drop for Server {
    fn drop(&mut self) {
        self.cancel.cancel();
        self.folding.cancel();
    }
}

/// What becomes of reads of a [`MoodyLog`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mood {
    Reads,
    IsUnavailable,
    Panics,
}

/// A log whose reads go wrong when it is told so. Tails that were begun before go on.
#[derive(Debug, Clone)]
pub struct MoodyLog {
    log: MemoryLog,
    mood: Arc<Mutex<Mood>>,
}

impl MoodyLog {
    pub fn new() -> Self {
        Self {
            log: MemoryLog::new(),
            mood: Arc::new(Mutex::new(Mood::Reads)),
        }
    }

    pub fn becomes(&self, mood: Mood) {
        *self.mood.lock().unwrap() = mood;
    }

    fn look(&self) -> Result<(), ReadError> {
        let mood = *self.mood.lock().unwrap();
        match mood {
            Mood::Reads => Ok(()),
            Mood::IsUnavailable => Err(ReadError::Unavailable("as it was told".to_owned())),
            Mood::Panics => panic!("as it was told"),
        }
    }
}

#[async_trait]
impl EventLog for MoodyLog {
    async fn append(&self, append: Append) -> Result<Appended, AppendError> {
        self.log.append(append).await
    }

    async fn head(&self) -> Result<Position, ReadError> {
        self.log.head().await
    }

    async fn get(&self, position: Position) -> Result<Option<Recorded>, ReadError> {
        self.look()?;
        self.log.get(position).await
    }

    async fn read_aggregate(&self, subject: &Subject) -> Result<Vec<Recorded>, ReadError> {
        self.look()?;
        self.log.read_aggregate(subject).await
    }

    async fn read(
        &self,
        after: Position,
        filter: &SubjectFilter,
        limit: usize,
    ) -> Result<Vec<Recorded>, ReadError> {
        self.look()?;
        self.log.read(after, filter, limit).await
    }

    async fn tail(&self, after: Position, filter: SubjectFilter) -> Result<EventStream, ReadError> {
        self.look()?;
        self.log.tail(after, filter).await
    }

    async fn consumer(&self, config: ConsumerConfig) -> Result<Arc<dyn Consumer>, ReadError> {
        self.log.consumer(config).await
    }

    async fn info(&self) -> Result<LogInfo, ReadError> {
        self.log.info().await
    }
}

/// The lines as a server reads them.
#[derive(Debug)]
pub struct WatchedLines {
    lines: Arc<dyn LineLog>,
    /// How often lines were read.
    pub reads: AtomicUsize,
    /// How many lines were read.
    pub read: AtomicUsize,
    /// Which sources have one more of them each time that any are read.
    pub growing: Mutex<Vec<LineSource>>,
}

#[async_trait::async_trait]
impl LineLog for WatchedLines {
    async fn append(&self, source: LineSource, lines: Vec<NewLine>) -> Result<u64, ReadError> {
        self.lines.append(source, lines).await
    }

    async fn read(
        &self,
        source: LineSource,
        after: u64,
        limit: usize,
    ) -> Result<Vec<Line>, ReadError> {
        let growing = self.growing.lock().unwrap().clone();
        for source in growing {
            let more = NewLine {
                time: Timestamp::from_second(1_700_000_100).unwrap(),
                kind: LineKind::Container,
                cluster: None,
                instance: None,
                text: "and another one".to_owned(),
            };
            self.lines.append(source, vec![more]).await?;
        }
        let lines = self.lines.read(source, after, limit).await?;
        self.reads.fetch_add(1, Ordering::Relaxed);
        self.read.fetch_add(lines.len(), Ordering::Relaxed);
        Ok(lines)
    }

    async fn follow(
        &self,
        source: LineSource,
        after: u64,
    ) -> Result<BoxStream<'static, Result<Line, ReadError>>, ReadError> {
        self.lines.follow(source, after).await
    }

    async fn last(&self, source: LineSource) -> Result<u64, ReadError> {
        self.lines.last(source).await
    }
}

/// What came back.
#[derive(Debug)]
pub struct Reply {
    pub status: StatusCode,
    pub headers: reqwest::header::HeaderMap,
    pub text: String,
}

impl Reply {
    pub fn json(&self) -> Value {
        serde_json::from_str(&self.text).unwrap_or_else(|e| panic!("{e} in {self:?}"))
    }

    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.get(name).map(|v| v.to_str().unwrap())
    }

    pub fn position(&self) -> Position {
        Position(self.header("daybook-position").unwrap().parse().unwrap())
    }

    /// A refusal with this status and code, complete as RFC 9457 and this interface have it.
    #[track_caller]
    pub fn refused(&self, status: u16, code: &str) -> Value {
        assert_eq!(self.status.as_u16(), status, "{self:?}");
        assert_eq!(
            self.header("content-type"),
            Some("application/problem+json"),
            "{self:?}"
        );
        let problem = self.json();
        assert_eq!(problem["code"], code, "{problem}");
        assert_eq!(problem["status"], status);
        for field in ["type", "title", "detail", "remedy"] {
            assert!(!problem[field].as_str().unwrap().is_empty(), "{field}");
        }
        assert!(problem["retryable"].is_boolean());
        problem
    }

    #[track_caller]
    pub fn ok(self) -> Value {
        assert!(self.status.is_success(), "{self:?}");
        self.json()
    }
}

pub async fn server() -> Server {
    server_with(|_, _| {}).await
}

/// A server on the embedded log.
pub async fn server_with(adjust: impl FnOnce(&mut Settings, &Path)) -> Server {
    let dir = tempfile::tempdir().unwrap();
    let log = EmbeddedLog::open(dir.path().join("log"), EmbeddedConfig::default())
        .await
        .unwrap();
    server_on(Arc::new(log), dir, adjust).await
}

/// A server on a log that can be told to misbehave.
pub async fn server_on_memory(log: &MemoryLog) -> Server {
    let dir = tempfile::tempdir().unwrap();
    server_on(Arc::new(log.clone()), dir, |_, _| {}).await
}

pub async fn server_on_moody(log: &MoodyLog) -> Server {
    let dir = tempfile::tempdir().unwrap();
    server_on(Arc::new(log.clone()), dir, |_, _| {}).await
}

/// Another server on the log of one, with a fold of its own.
pub async fn replica_of(server: &Server, adjust: impl FnOnce(&mut Settings, &Path)) -> Server {
    let dir = tempfile::tempdir().unwrap();
    server_on(server.log.clone(), dir, adjust).await
}

async fn server_on(
    log: Arc<dyn EventLog>,
    dir: tempfile::TempDir,
    adjust: impl FnOnce(&mut Settings, &Path),
) -> Server {
    let _ = rustls::crypto::ring::default_provider().install_default();
    let projections = Projections::open(&dir.path().join("projections")).unwrap();
    let folding = CancellationToken::new();
    let folder = tokio::spawn({
        let (projections, folding) = (projections.clone(), folding.clone());
        let log = log.clone();
        async move { runner::run(projections, log, folding).await.unwrap() }
    });
    let ledger = Ledger::new(log.clone(), projections);
    let lines = EmbeddedLines::open(dir.path().join("lines"), LineRetention::default());
    let lines: Arc<dyn LineLog> = Arc::new(lines.await.unwrap());
    let mut settings = Settings::loopback(7080);
    settings.known_clusters = ["east", "west"].map(|c| c.parse().unwrap()).to_vec();
    settings.image_prefix = Some("registry.local:5000/daybook".parse().unwrap());
    adjust(&mut settings, dir.path());
    let parts = Parts::default();
    let secrets = SecretFolder::new(dir.path().join("secrets"), None);
    let watched = Arc::new(WatchedLines {
        lines: lines.clone(),
        reads: AtomicUsize::new(0),
        read: AtomicUsize::new(0),
        growing: Mutex::default(),
    });
    let state = AppState::new(ledger.clone(), watched.clone(), settings, parts.clone())
        .with_secrets(Arc::new(secrets));
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let base = format!("http://{}", listener.local_addr().unwrap());
    let cancel = CancellationToken::new();
    let serving = tokio::spawn({
        let cancel = cancel.clone();
        async move { daybook_api::serve(listener, state, cancel).await.unwrap() }
    });
    Server {
        base,
        client: reqwest::Client::new(),
        log,
        ledger,
        lines,
        watched,
        parts,
        cancel,
        folding,
        serving: Some(serving),
        folder: Some(folder),
        _dir: dir,
    }
}

impl Server {
    pub fn request(&self, method: Method, path: &str) -> reqwest::RequestBuilder {
        self.client.request(method, format!("{}{path}", self.base))
    }

    pub async fn send(&self, request: reqwest::RequestBuilder) -> Reply {
        let response = request.send().await.unwrap();
        Reply {
            status: response.status(),
            headers: response.headers().clone(),
            text: response.text().await.unwrap(),
        }
    }

    pub async fn get(&self, path: &str) -> Reply {
        self.send(self.request(Method::GET, path)).await
    }

    pub async fn post(&self, path: &str, body: Value) -> Reply {
        self.send(self.request(Method::POST, path).json(&body))
            .await
    }

    pub async fn put(&self, path: &str, body: Value) -> Reply {
        self.send(self.request(Method::PUT, path).json(&body)).await
    }

    pub async fn patch(&self, path: &str, body: Value) -> Reply {
        let request = self.request(Method::PATCH, path);
        self.send(request.json(&body)).await
    }

    pub async fn post_with_key(&self, path: &str, key: &str, body: Value) -> Reply {
        let request = self.request(Method::POST, path).json(&body);
        self.send(request.header("Idempotency-Key", key)).await
    }

    /// A project `shop` with the service `api` from a repository and `cache` from images, and
    /// the environments `production` (live, on both clusters) and `staging`.
    pub async fn shop(&self) {
        self.post("/api/v1/projects", json!({ "name": "shop" }))
            .await
            .ok();
        let api = json!({
            "source": { "url": "https://git.example/shop.git", "default_ref": "main" },
            "run": { "port": 3000, "env": { "MODE": "live" } }
        });
        self.put("/api/v1/projects/shop/services/api", api)
            .await
            .ok();
        let cache = json!({ "image_repository": "registry.example/cache" });
        self.put("/api/v1/projects/shop/services/cache", cache)
            .await
            .ok();
        let environments = "/api/v1/projects/shop/environments";
        let production =
            json!({ "name": "production", "clusters": ["east", "west"], "live": true });
        self.post(environments, production).await.ok();
        let staging = json!({ "name": "staging", "clusters": ["east"] });
        self.post(environments, staging).await.ok();
    }

    /// Requests a deployment and returns its id.
    pub async fn deploy(&self, instance: &str, version: &str) -> DeploymentId {
        let body = json!({ "instance_id": instance, "version": version });
        let accepted = self.post("/api/v1/deployments", body).await.ok();
        accepted["id"].as_str().unwrap().parse().unwrap()
    }

    /// What a worker does: appends an event of a deployment.
    pub async fn happens(&self, id: DeploymentId, event: DeploymentEvent) {
        let row = self.ledger.projections().deployment(id).unwrap().unwrap();
        let executed = self
            .ledger
            .execute(&row.subject, &context(id), |state| {
                deployment::decide(state, event.clone())
            })
            .await
            .unwrap();
        self.folded(executed).await;
    }

    /// Folds nothing any more, from what it has folded by now on.
    pub async fn stop_folding(&mut self) {
        self.folding.cancel();
        self.folder.take().unwrap().await.unwrap();
    }

    /// Folds again what is in the log.
    pub fn go_on_folding(&mut self) {
        self.folding = CancellationToken::new();
        let (projections, log) = (self.ledger.projections().clone(), self.log.clone());
        let folding = self.folding.clone();
        self.folder = Some(tokio::spawn(async move {
            runner::run(projections, log, folding).await.unwrap();
        }));
    }

    pub async fn folded(&self, executed: Executed) {
        if let Some(position) = executed.position() {
            let projections = self.ledger.projections();
            projections.wait_for(position, PATIENCE).await.unwrap();
        }
    }

    /// What the workers do for a deployment until it is live.
    pub async fn make_live(&self, id: DeploymentId) {
        self.make_live_to_building(id).await;
        self.finish_live(id).await;
    }

    /// The first half of it: until the build, if there is one, runs.
    pub async fn make_live_to_building(&self, id: DeploymentId) {
        let row = self.ledger.projections().deployment(id).unwrap().unwrap();
        let commit = CommitId::parse(COMMIT).unwrap();
        self.happens(id, DeploymentEvent::Queued(Queued {})).await;
        if let Version::Git { url, .. } = &row.state.request.version {
            let worker = "builder-1".to_owned();
            let cloning = CloningStarted { worker };
            self.happens(id, DeploymentEvent::CloningStarted(cloning))
                .await;
            let source = SourceCommit {
                commit: commit.clone(),
                message: "Faster carts\n".into(),
                author_name: "A. Uthor".into(),
                author_email: "author@example.com".into(),
                committed_at: Timestamp::from_second(1_700_000_000).unwrap(),
                url: url.to_string(),
            };
            let build = build_of(id);
            let resolved = SourceResolved {
                source,
                build,
                branch: None,
            };
            self.happens(id, DeploymentEvent::SourceResolved(resolved))
                .await;
            self.happens(
                id,
                DeploymentEvent::BuildingStarted(BuildingStarted { build }),
            )
            .await;
        }
    }

    /// The second half: from the image to traffic.
    pub async fn finish_live(&self, id: DeploymentId) {
        let row = self.ledger.projections().deployment(id).unwrap().unwrap();
        let commit = self.make_deploying(id).await;
        for cluster in &row.state.request.clusters {
            let seen = WorkloadObserved {
                cluster: cluster.clone(),
                revision: commit.clone(),
                wanted: 1,
                instances: vec![Instance {
                    name: format!("{cluster}-0"),
                    address: "127.0.0.1:4000".into(),
                    ready: true,
                    restarts: 0,
                }],
                problem: None,
            };
            self.happens(id, DeploymentEvent::WorkloadObserved(seen))
                .await;
        }
        let table = self.assign(id).await;
        let succeeded = Succeeded {
            revision: commit,
            table,
        };
        self.happens(id, DeploymentEvent::Succeeded(succeeded))
            .await;
    }

    /// One that is built comes to its first cluster, where this keeps it from being ready.
    pub async fn make_stuck(&self, id: DeploymentId, problem: deployment::Problem) {
        let row = self.ledger.projections().deployment(id).unwrap().unwrap();
        let seen = WorkloadObserved {
            cluster: row.state.request.clusters[0].clone(),
            revision: self.make_deploying(id).await,
            wanted: 1,
            instances: Vec::new(),
            problem: Some(problem),
        };
        self.happens(id, DeploymentEvent::WorkloadObserved(seen))
            .await;
    }

    /// From the image to the commit.
    async fn make_deploying(&self, id: DeploymentId) -> CommitId {
        let commit = CommitId::parse(COMMIT).unwrap();
        let image = PinnedImage {
            repository: "registry.local:5000/daybook/shop/api".parse().unwrap(),
            tag: "0123456".parse().unwrap(),
            digest: DIGEST.parse().unwrap(),
        };
        let pinned = ImagePinned {
            image,
            build: None,
            shared: false,
        };
        self.happens(id, DeploymentEvent::ImagePinned(pinned)).await;
        let deploying = DeployingStarted {
            commit: commit.clone(),
        };
        self.happens(id, DeploymentEvent::DeployingStarted(deploying))
            .await;
        commit
    }

    /// What the route worker does once a deployment is ready.
    pub async fn assign(&self, id: DeploymentId) -> u32 {
        let projections = self.ledger.projections();
        let state = projections.deployment(id).unwrap().unwrap().state;
        let instance = state.request.instance.clone();
        let live = instance.environment.as_str() == "production";
        let domain = Hostname::parse("localhost").unwrap();
        let command = Command::Assign {
            target: Target {
                deployment: id,
                instance: instance.clone(),
                status: state.status,
                ready: state.serves(),
            },
            hostnames: Hostnames::under(&domain, &instance, id, live).unwrap(),
            take_over: state.request.switch == SwitchMode::Automatic,
        };
        let subject = Subject::Routing(instance.project.clone());
        let executed = self
            .ledger
            .execute(&subject, &context(id), |state| {
                routing::decide(state, command.clone())
            })
            .await
            .unwrap();
        self.folded(executed).await;
        projections
            .routing(&instance.project)
            .unwrap()
            .unwrap()
            .table
    }

    /// What a worker does once a deployment is scaled to zero.
    pub async fn finish_stop(&self, id: DeploymentId) {
        let done = OperationDone {
            revision: CommitId::parse(COMMIT).unwrap(),
        };
        self.happens(id, DeploymentEvent::Stopped(done)).await;
    }

    /// What a worker does once a deployment is removed.
    pub async fn finish_terminate(&self, id: DeploymentId) {
        let done = OperationDone {
            revision: CommitId::parse(COMMIT).unwrap(),
        };
        self.happens(id, DeploymentEvent::Terminated(done)).await;
    }

    /// Stores bytes as they are, whatever they are, and waits until they are folded.
    pub async fn store(&self, bytes: impl Into<bytes::Bytes>) -> Position {
        let append = Append {
            subject: "daybook.ev.shop._.project.shop".parse().unwrap(),
            id: EventId(Uuid::now_v7()),
            expected: Expected::Any,
            bytes: bytes.into(),
        };
        let position = self.log.append(append).await.unwrap().position;
        let projections = self.ledger.projections();
        projections.wait_for(position, PATIENCE).await.unwrap();
        position
    }

    pub async fn print(&self, source: LineSource, kind: LineKind, second: i64, text: &str) {
        let line = NewLine {
            time: Timestamp::from_second(1_700_000_000 + second).unwrap(),
            kind,
            cluster: None,
            instance: None,
            text: text.to_owned(),
        };
        self.lines.append(source, vec![line]).await.unwrap();
    }
}

/// The build that [`Server::make_live`] lets a deployment have.
pub fn build_of(id: DeploymentId) -> BuildId {
    BuildId::derived(id.0, "build")
}

pub fn context(id: DeploymentId) -> Context {
    Context {
        id: EventId(Uuid::now_v7()),
        time: Timestamp::now(),
        correlation: id.0,
        causation: None,
        actor: Actor::system("worker/test"),
        traceparent: None,
        request_digest: None,
    }
}
