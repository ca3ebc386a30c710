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
use daybook_events::spec::{HealthSpec, PinnedImage, RunSpec};
use daybook_events::{
    ClusterName, CommitId, DeploymentId, Digest, EnvironmentName, ImageRepository, ImageTag,
    ProjectName, ServiceName,
};
use daybook_testkit::TESTAPP;
use daybook_workers::local::{
    ImageUnpacker, LocalCluster, LocalOptions, PrepareError, RunnableImage,
};
use daybook_workers::target::{AppRef, AppStatus, ReleaseStatus, Target};
use daybook_workers::values::{EnvironmentValues, ReleaseValues, ServiceValues};
use futures_util::stream::BoxStream;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

/// How long a test waits for a state before it fails.
pub const PATIENCE: Duration = Duration::from_secs(40);

/// Images with the test application as `/bin/testapp`. The tag `missing` does not exist, and
/// the tag `site` is a static site.
#[derive(Debug, Default)]
pub struct TestImages {
    pub unpacked: AtomicUsize,
}

#[async_trait]
impl ImageUnpacker for TestImages {
    async fn prepare(
        &self,
        image: &PinnedImage,
        into: &Path,
    ) -> Result<RunnableImage, PrepareError> {
        if image.tag.as_str() == "missing" {
            return Err(PrepareError {
                message: "the image does not exist".into(),
                remedy: "Push it.".into(),
                transient: false,
            });
        }
        self.unpacked.fetch_add(1, SeqCst);
        let bin = into.join("bin");
        std::fs::create_dir_all(&bin).unwrap();
        std::fs::copy(TESTAPP, bin.join("testapp")).unwrap();
        std::fs::create_dir_all(into.join("public")).unwrap();
        std::fs::write(into.join("public/index.html"), "a static site").unwrap();
        let entrypoint = match image.tag.as_str() {
            "site" => vec!["daybook-static".into(), "public".into()],
            _ => vec!["testapp".into()],
        };
        Ok(RunnableImage {
            entrypoint,
            env: vec![
                ("PATH".into(), "/bin".into()),
                ("PORT".into(), "3000".into()),
            ],
            working_dir: "/".into(),
            ..RunnableImage::default()
        })
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
    pub images: Arc<TestImages>,
    pub lines: Arc<FileLines>,
}

impl Bench {
    pub fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let lines = FileLines::open(&dir.path().join("lines"));
        Self {
            dir,
            images: Arc::default(),
            lines,
        }
    }

    pub fn options(&self) -> LocalOptions {
        let mut options = LocalOptions::new(
            self.dir.path().join("cluster"),
            ClusterName::parse("one").unwrap(),
            self.images.clone(),
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

pub fn image(tag: &str) -> PinnedImage {
    PinnedImage {
        repository: ImageRepository::parse("local.daybook/shop/web").unwrap(),
        tag: ImageTag::parse(tag).unwrap(),
        digest: Digest::of(tag.as_bytes()),
    }
}

/// A release that runs the test application with these flags.
pub fn release(flags: &[&str]) -> ReleaseValues {
    let mut command = vec!["testapp".to_owned()];
    command.extend(flags.iter().map(|f| (*f).to_owned()));
    ReleaseValues {
        image: image("v1"),
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
    let entries = std::fs::read_dir("/proc").unwrap().flatten();
    entries
        .filter_map(|e| e.file_name().to_str()?.parse::<i32>().ok())
        .filter(|pid| {
            let environment = std::fs::read(format!("/proc/{pid}/environ")).unwrap_or_default();
            let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
            let zombie = stat.rsplit(')').next().is_some_and(|s| s.starts_with(" Z"));
            !zombie && environment.split(|b| *b == 0).any(|v| v == mark.as_bytes())
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
