//! What tests of the local target share: images made of the test application, and a line log in
//! files, which a process that is killed leaves for the next.
#![allow(clippy::unwrap_used, dead_code, unreachable_pub)]

use std::collections::BTreeMap;
use std::fs::OpenOptions;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};
use std::time::Duration;

use async_trait::async_trait;
use daybook_events::lines::{Line, LineKind, LineLog, LineSource, NewLine};
use daybook_events::log::ReadError;
use daybook_events::spec::{BuildSpec, HealthSpec, PinnedImage, RunSpec};
use daybook_events::{
    BuildId, ClusterName, CommitId, DeploymentId, EnvironmentName, ImageRepository, ImageTag,
    ProjectName, RepositoryUrl, ServiceName,
};
use daybook_testkit::TESTAPP;
use daybook_workers::builder::archive::ArchiveBuilder;
use daybook_workers::builder::{BuildContext, Builder};
use daybook_workers::image::local::LayoutStore;
use daybook_workers::image::store::ImageStore;
use daybook_workers::image::unpack::UnpackLimits;
use daybook_workers::local::{LocalCluster, LocalOptions};
use daybook_workers::output::LineSender;
use daybook_workers::target::{AppRef, AppStatus, ReleaseStatus, Target};
use daybook_workers::values::{EnvironmentValues, ReleaseValues, ServiceValues};
use futures_util::stream::BoxStream;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

/// How long a test waits for a state before it fails.
pub const PATIENCE: Duration = Duration::from_secs(40);

/// The images of these tests, in a layout folder: the test application under `v1` and `v2`, and a
/// static site under `site`. Only the first to open the folder builds them.
pub struct TestImages {
    pub store: Arc<LayoutStore>,
    pinned: BTreeMap<&'static str, PinnedImage>,
}

impl TestImages {
    pub fn open(dir: &Path) -> Arc<LayoutStore> {
        let limits = UnpackLimits::default();
        Arc::new(LayoutStore::open(dir.join("layout"), limits).unwrap())
    }

    pub async fn build(dir: &Path) -> Self {
        let store = Self::open(dir);
        let mut pinned = BTreeMap::new();
        for tag in ["v1", "v2", "site"] {
            let checkout = dir.join("sources").join(tag);
            std::fs::create_dir_all(checkout.join("public")).unwrap();
            std::fs::write(checkout.join("version"), tag).unwrap();
            if tag == "site" {
                std::fs::write(checkout.join("public/index.html"), "a static site").unwrap();
            } else {
                std::fs::copy(TESTAPP, checkout.join("web")).unwrap();
            }
            let context = BuildContext {
                checkout,
                path: String::new(),
                service: ServiceName::parse("web").unwrap(),
                spec: BuildSpec::default(),
                url: RepositoryUrl::parse("/sources/web").unwrap(),
                commit: commit(0),
                committed_at: jiff::Timestamp::UNIX_EPOCH,
                build: BuildId(uuid::Uuid::nil()),
                labels: BTreeMap::new(),
                output: store.layout().clone(),
            };
            let builder = ArchiveBuilder::new(store.clone(), dir.join("scratch"));
            let progress = LineSender::discard();
            let cancel = CancellationToken::new();
            let built = builder.build(&context, &progress, &cancel).await.unwrap();
            let repository = ImageRepository::parse("local.daybook/shop/web").unwrap();
            let tag_name = ImageTag::parse(tag).unwrap();
            let push = store.push(&built, &repository, &tag_name, &progress);
            pinned.insert(tag, push.await.unwrap());
        }
        Self { store, pinned }
    }
}

/// A line log of one file for each source.
#[derive(Debug)]
pub struct FileLines {
    dir: PathBuf,
    one_at_a_time: tokio::sync::Mutex<()>,
    /// So many appends are carried out and answered with an error.
    pub lost_answers: AtomicUsize,
}

impl FileLines {
    pub fn open(dir: &Path) -> Arc<Self> {
        std::fs::create_dir_all(dir).unwrap();
        Arc::new(Self {
            dir: dir.into(),
            one_at_a_time: tokio::sync::Mutex::default(),
            lost_answers: AtomicUsize::new(0),
        })
    }

    fn all(&self, source: LineSource) -> Vec<Line> {
        let text = std::fs::read_to_string(self.dir.join(source.to_string())).unwrap_or_default();
        // A line that was being written when its writer was killed has no end.
        let end = text.rfind('\n').map_or(0, |i| i + 1);
        text[..end]
            .lines()
            .zip(1..)
            .map(|(text, seq)| Line {
                seq,
                line: serde_json::from_str(text).unwrap(),
            })
            .collect()
    }

    /// What the instances of a deployment have printed.
    pub fn printed(&self, deployment: DeploymentId) -> Vec<String> {
        let all = self.all(LineSource::Deployment(deployment));
        all.into_iter()
            .filter(|l| l.line.kind == LineKind::Container)
            .map(|l| l.line.text)
            .collect()
    }
}

#[async_trait]
impl LineLog for FileLines {
    async fn append(&self, source: LineSource, lines: Vec<NewLine>) -> Result<u64, ReadError> {
        let _one = self.one_at_a_time.lock().await;
        let mut text = String::new();
        for line in &lines {
            text.push_str(&serde_json::to_string(line).unwrap());
            text.push('\n');
        }
        let path = self.dir.join(source.to_string());
        let mut file = OpenOptions::new()
            .create(true)
            .append(true)
            .open(path)
            .unwrap();
        // One call, so that a batch is written as a whole or not at all.
        file.write_all(text.as_bytes()).unwrap();
        let lost = |n: usize| n.checked_sub(1);
        if self.lost_answers.fetch_update(SeqCst, SeqCst, lost).is_ok() {
            return Err(ReadError::Unavailable("the answer got lost".into()));
        }
        Ok(self.all(source).len() as u64)
    }

    async fn read(
        &self,
        source: LineSource,
        after: u64,
        limit: usize,
    ) -> Result<Vec<Line>, ReadError> {
        let all = self.all(source).into_iter();
        Ok(all.filter(|l| l.seq > after).take(limit).collect())
    }

    async fn follow(
        &self,
        _: LineSource,
        _: u64,
    ) -> Result<BoxStream<'static, Result<Line, ReadError>>, ReadError> {
        Err(ReadError::Invalid("not needed here".into()))
    }

    async fn last(&self, source: LineSource) -> Result<u64, ReadError> {
        Ok(self.all(source).len() as u64)
    }
}

/// One Application on one cluster, with a folder of its own.
pub struct Bench {
    pub dir: tempfile::TempDir,
    pub images: TestImages,
    pub lines: Arc<FileLines>,
}

impl Bench {
    pub async fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let lines = FileLines::open(&dir.path().join("lines"));
        let images = TestImages::build(dir.path()).await;
        Self { dir, images, lines }
    }

    /// A release that runs the test application with these flags.
    pub fn release(&self, flags: &[&str]) -> ReleaseValues {
        let mut command = vec!["./web".to_owned()];
        command.extend(flags.iter().map(|f| (*f).to_owned()));
        ReleaseValues {
            secret_env: std::collections::BTreeMap::new(),
            image: self.image("v1"),
            clusters: vec![ClusterName::parse("one").unwrap()],
            run: RunSpec {
                command,
                health: HealthSpec {
                    path: "/".into(),
                    deadline_seconds: 30,
                },
                ..RunSpec::default()
            },
        }
    }

    pub fn image(&self, tag: &str) -> PinnedImage {
        self.images.pinned[tag].clone()
    }

    pub fn options(&self) -> LocalOptions {
        let mut options = LocalOptions::new(
            self.dir.path().join("cluster"),
            ClusterName::parse("one").unwrap(),
            self.images.store.clone(),
            self.lines.clone(),
            CancellationToken::new(),
        );
        options.grace = Duration::from_secs(1);
        options
    }

    pub async fn cluster(&self) -> LocalCluster {
        LocalCluster::open(self.options()).await.unwrap()
    }
}

/// Ends what a failed test has left running.
impl Drop for Bench {
    fn drop(&mut self) {
        let identity = std::fs::read(self.dir.path().join("cluster/cluster.json"));
        let Ok(identity) = identity else { return };
        let identity: serde_json::Value = serde_json::from_slice(&identity).unwrap();
        let mark = format!("DAYBOOK_RUN={}/", identity["id"].as_str().unwrap());
        for pid in processes_with(|variable| variable.starts_with(mark.as_bytes())) {
            let pid = rustix::process::Pid::from_raw(pid).unwrap();
            let _ = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
        }
    }
}

pub fn app() -> AppRef {
    AppRef {
        project: ProjectName::parse("shop").unwrap(),
        environment: EnvironmentName::parse("production").unwrap(),
    }
}

pub fn commit(number: u32) -> CommitId {
    CommitId::parse(format!("{number:040x}")).unwrap()
}

pub fn deployment() -> DeploymentId {
    DeploymentId(uuid::Uuid::now_v7())
}

pub fn desired(releases: &[(DeploymentId, &ReleaseValues)]) -> EnvironmentValues {
    let releases = releases.iter().map(|(id, r)| (*id, (*r).clone())).collect();
    let service = ServiceValues {
        releases,
        ..ServiceValues::default()
    };
    EnvironmentValues {
        project: app().project,
        environment: app().environment,
        ephemeral: false,
        services: BTreeMap::from([(ServiceName::parse("web").unwrap(), service)]),
    }
}

/// Waits until the status of a release is as it should be.
pub async fn wait(
    status: &mut watch::Receiver<AppStatus>,
    id: DeploymentId,
    what: &str,
    wanted: impl Fn(&ReleaseStatus) -> bool,
) -> ReleaseStatus {
    let find = |s: &AppStatus| s.releases.iter().find(|r| r.deployment == id).cloned();
    let until = tokio::time::Instant::now() + PATIENCE;
    loop {
        let seen = find(&status.borrow_and_update());
        if let Some(release) = seen.as_ref().filter(|r| wanted(r)) {
            return release.clone();
        }
        let changed = tokio::time::timeout_at(until, status.changed()).await;
        match changed {
            Ok(changed) => changed.unwrap(),
            Err(_) => panic!("not {what} in time: {seen:#?}"),
        }
    }
}

pub async fn wait_ready(
    status: &mut watch::Receiver<AppStatus>,
    id: DeploymentId,
    count: u32,
) -> ReleaseStatus {
    wait(status, id, "ready", |r| {
        r.ready() == count && r.instances.len() == count as usize
    })
    .await
}

/// Waits until a release is gone.
pub async fn wait_gone(status: &mut watch::Receiver<AppStatus>, id: DeploymentId) {
    let gone = |s: &AppStatus| s.releases.iter().all(|r| r.deployment != id);
    let waiting = status.wait_for(gone);
    let result = tokio::time::timeout(PATIENCE, waiting).await;
    result.expect("the release is gone in time").unwrap();
}

/// Waits for anything else.
pub async fn eventually(what: &str, condition: impl Fn() -> bool) {
    let until = std::time::Instant::now() + PATIENCE;
    while !condition() {
        assert!(std::time::Instant::now() < until, "not in time: {what}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

/// Asks an instance.
pub async fn get(address: &str, path: &str) -> Option<String> {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let mut stream = tokio::net::TcpStream::connect(address).await.ok()?;
    let request = format!("GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).await.ok()?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.ok()?;
    Some(answer.split_once("\r\n\r\n")?.1.to_owned())
}

/// The ids of running processes whose environment names a deployment: all that belong to it.
pub fn processes_of(deployment: DeploymentId) -> Vec<i32> {
    let mark = format!("DAYBOOK_DEPLOYMENT={deployment}");
    processes_with(|variable| variable == mark.as_bytes())
}

fn processes_with(wanted: impl Fn(&[u8]) -> bool) -> Vec<i32> {
    let entries = std::fs::read_dir("/proc").unwrap().flatten();
    entries
        .filter_map(|e| e.file_name().to_str()?.parse::<i32>().ok())
        .filter(|pid| {
            let environment = std::fs::read(format!("/proc/{pid}/environ")).unwrap_or_default();
            let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
            let zombie = stat.rsplit(')').next().is_some_and(|s| s.starts_with(" Z"));
            !zombie && environment.split(|b| *b == 0).any(&wanted)
        })
        .collect()
}

/// Applies, and gives the channel on which to see what becomes of it.
pub async fn apply(
    cluster: &LocalCluster,
    revision: u32,
    releases: &[(DeploymentId, &ReleaseValues)],
) -> watch::Receiver<AppStatus> {
    cluster
        .apply(&app(), &commit(revision), &desired(releases))
        .await
        .unwrap();
    let status = cluster.watch(&app());
    assert_eq!(status.borrow().revision, Some(commit(revision)));
    status
}
