//! The local target: clusters on this machine, which run releases as processes.
//!
//! A [`LocalCluster`] takes over the desired state of Applications and converges to it as a
//! kubelet would: it unpacks images, starts processes, probes their readiness, restarts what
//! ends, and tells what it observes. What it is told is kept on disk, and so is what it starts:
//! when Daybook is killed its instances go on, and the next Daybook takes them over, never
//! starting a second of one.
//!
//! **It isolates nothing.** Instances are processes of the user that Daybook runs as. They see
//! that user's files, the network and each other, and nothing bounds the memory or the processor
//! time that they use. An image is a folder of files, not a root file system: a command that it
//! lacks is taken from this machine, and absolute paths within programs and scripts mean this
//! machine's files. All instances of an image share that folder. Whoever may deploy to a local
//! cluster may do on this machine whatever its user may. What it does keep apart: instances get
//! their own port, and nothing of Daybook's own environment beyond `PATH` and the like.

mod board;
mod claim;
mod command;
mod image;
mod instance;
mod output;
mod ports;
mod probe;
mod problems;
mod process;
mod processes;
mod record;
mod release;
mod state_file;
pub mod static_server;
mod volumes;

use std::collections::{BTreeMap, HashMap, HashSet};
use std::ffi::OsString;
use std::fmt;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use daybook_events::lines::LineLog;
use daybook_events::{ClusterName, CommitId, DeploymentId};
use daybook_secrets::{NoSecrets, SecretStore};
use serde::{Deserialize, Serialize};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio_util::sync::{CancellationToken, DropGuard};
use tokio_util::task::TaskTracker;

use crate::image::store::ImageStore;
use crate::target::{AppRef, AppStatus, Target, TargetError};
use crate::values::EnvironmentValues;
use board::Board;
use claim::{Claim, Claimed};
use image::Images;
use process::Process;
use record::Record;
use release::{Goal, Release};
use volumes::Volumes;

/// How long opening a cluster waits for what is taken over to be asked whether it is ready, so that
/// nobody sees it as not ready meanwhile, and takes its traffic away.
const FIRST_LOOK: Duration = Duration::from_secs(3);
/// Between two tries to get hold of a folder.
const CLAIM_RETRY: Duration = Duration::from_millis(100);

/// What a local cluster is made of.
#[derive(Debug, Clone)]
pub struct LocalOptions {
    /// Its folder. One process at a time runs a cluster on it.
    pub dir: PathBuf,
    /// Its name.
    pub name: ClusterName,
    /// Where images come from.
    pub images: Arc<dyn ImageStore>,
    /// Where the output of instances goes. Whoever keeps it masks it.
    pub lines: Arc<dyn LineLog>,
    /// Where the values of secrets are; by default there are none.
    pub secrets: Arc<dyn SecretStore>,
    /// Ends the looking after instances, which keep running. See [`LocalCluster::shutdown`] for
    /// how to end them too.
    pub cancel: CancellationToken,
    /// The command that serves static files: the folder is appended, the port is in `PORT`. By
    /// default this executable with the argument `static-server`.
    pub static_server: Vec<OsString>,
    /// How long a process may take to end by itself before it is killed.
    pub grace: Duration,
}

impl LocalOptions {
    /// A cluster with default settings.
    pub fn new(
        dir: impl Into<PathBuf>,
        name: ClusterName,
        images: Arc<dyn ImageStore>,
        lines: Arc<dyn LineLog>,
        cancel: CancellationToken,
    ) -> Self {
        let this = std::env::current_exe().unwrap_or_else(|_| "daybook".into());
        Self {
            dir: dir.into(),
            name,
            images,
            lines,
            secrets: Arc::new(NoSecrets),
            cancel,
            static_server: vec![this.into(), "static-server".into()],
            grace: Duration::from_secs(10),
        }
    }
}

/// Why a cluster could not be opened.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// Another process runs a cluster on this folder.
    #[error("{} is in use by {}", .dir.display(), Holder(*.pid))]
    Held {
        /// The folder.
        dir: PathBuf,
        /// The process that holds it, if it could be read.
        pid: Option<u32>,
    },
    /// The folder belongs to a cluster of another name.
    #[error("{} belongs to cluster {found}, not to {asked}", .dir.display())]
    OtherCluster {
        /// The folder.
        dir: PathBuf,
        /// Whose it is.
        found: ClusterName,
        /// Whose it was taken for.
        asked: ClusterName,
    },
    /// The folder cannot be read or written, or what is in it is damaged. Nothing was started or
    /// stopped.
    #[error("{} cannot be used", .path.display())]
    Unusable {
        /// The file or folder.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// Waiting for the folder was cancelled.
    #[error("opening the cluster was cancelled")]
    Cancelled,
}

struct Holder(Option<u32>);

impl fmt::Display for Holder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            Some(pid) => write!(f, "process {pid}"),
            None => f.write_str("another process"),
        }
    }
}

/// How long ending a failed instance may take, beyond what its process is given.
const RETRY_TAKES: Duration = Duration::from_secs(10);

/// What becomes of running instances when a cluster is shut down.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Workloads {
    /// They are stopped; the next start of the cluster starts them again.
    Stop,
    /// They keep running, and the next start of the cluster takes them over.
    Leave,
}

/// A running cluster on this machine. See the module.
#[derive(Debug)]
pub struct LocalCluster {
    cluster: Arc<Cluster>,
    apps_dir: PathBuf,
    /// One change at a time; `false` once the cluster is shut down.
    open: tokio::sync::Mutex<bool>,
    claim: Mutex<Option<Claim>>,
    _leave: DropGuard,
}

/// What the tasks of a cluster share.
#[derive(Debug)]
struct Cluster {
    name: ClusterName,
    /// Starts the mark of each process, so that none is ever taken for another cluster's.
    id: String,
    /// What is kept from one deployment to the next.
    volumes: Volumes,
    /// The folder of all releases' files.
    releases: PathBuf,
    images: Images,
    lines: Arc<dyn LineLog>,
    secrets: Arc<dyn SecretStore>,
    static_server: Vec<OsString>,
    grace: Duration,
    leave: CancellationToken,
    tasks: TaskTracker,
    apps: Mutex<HashMap<AppRef, App>>,
}

#[derive(Debug, Default)]
struct App {
    board: Arc<Board>,
    releases: HashMap<DeploymentId, watch::Sender<Goal>>,
}

/// An Application as it is kept on disk.
#[derive(Debug, Serialize, Deserialize)]
struct SavedApp {
    revision: CommitId,
    desired: EnvironmentValues,
}

/// What identifies a folder.
#[derive(Debug, Serialize, Deserialize)]
struct Identity {
    id: String,
    cluster: ClusterName,
}

/// Asks for a claim until it is given, for half a second at most. A process that another one is just
/// starting has a copy of its parent's open files from `fork` to `exec`, and with it the claim of a
/// parent that was killed in between.
async fn claim(path: &Path) -> std::io::Result<Claimed> {
    let deadline = tokio::time::Instant::now() + Duration::from_millis(500);
    loop {
        match Claim::take(path)? {
            Claimed::Held(_) if tokio::time::Instant::now() < deadline => {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
            answer => return Ok(answer),
        }
    }
}

impl LocalCluster {
    /// Opens the cluster, or says who has it. Instances that still run are taken over, those that
    /// ended are started again, and what is no longer wanted is stopped.
    pub async fn open(options: LocalOptions) -> Result<Self, OpenError> {
        let dir = &options.dir;
        let unusable = |path: &Path| {
            let path = path.to_owned();
            move |source| OpenError::Unusable { path, source }
        };
        let apps_dir = dir.join("apps");
        let releases = dir.join("releases");
        let images = dir.join("images");
        for folder in [dir, &apps_dir, &releases, &images] {
            make_private(folder).map_err(unusable(folder))?;
        }
        let dir = dir.canonicalize().map_err(unusable(dir))?;
        let claim = match claim(&dir.join("owner")).await.map_err(unusable(&dir))? {
            Claimed::Ours(claim) => claim,
            Claimed::Held(pid) => return Err(OpenError::Held { dir, pid }),
        };
        let identity = identify(&dir, &options.name)?;
        let leave = options.cancel.child_token();
        let cluster = Arc::new(Cluster {
            name: options.name,
            id: identity.id,
            releases: dir.join("releases"),
            volumes: Volumes::of(&dir),
            images: Images::new(dir.join("images"), options.images),
            lines: options.lines,
            secrets: options.secrets,
            static_server: options.static_server,
            grace: options.grace,
            leave: leave.clone(),
            tasks: TaskTracker::new(),
            apps: Mutex::default(),
        });
        let this = Self {
            cluster,
            apps_dir: dir.join("apps"),
            open: tokio::sync::Mutex::new(true),
            claim: Mutex::new(Some(claim)),
            _leave: leave.drop_guard(),
        };
        this.resume().await?;
        Ok(this)
    }

    /// Opens the cluster as soon as no other process has it, however long that takes.
    pub async fn open_when_free(options: LocalOptions) -> Result<Self, OpenError> {
        loop {
            match Self::open(options.clone()).await {
                Err(OpenError::Held { .. }) => {}
                other => return other,
            }
            tokio::select! {
                () = options.cancel.cancelled() => return Err(OpenError::Cancelled),
                () = tokio::time::sleep(CLAIM_RETRY) => {}
            }
        }
    }

    /// Ends this cluster's tasks and frees its folder, after stopping all instances if that is
    /// wanted. When this returns, no task of the cluster is left, and after [`Workloads::Stop`]
    /// no process either. Later calls of [`Target::apply`] are refused.
    pub async fn shutdown(&self, workloads: Workloads) {
        let mut open = self.open.lock().await;
        if !std::mem::take(&mut *open) {
            return;
        }
        self.cluster.leave.cancel();
        self.cluster.tasks.close();
        self.cluster.tasks.wait().await;
        if workloads == Workloads::Stop {
            let mut ending = JoinSet::new();
            for record in self.cluster.all_records() {
                let cluster = self.cluster.clone();
                let dir = record.spec.dir(&cluster.releases);
                ending.spawn(async move { instance::end(&cluster, dir, record).await });
            }
            while ending.join_next().await.is_some() {}
        }
        *self.claim.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }

    /// Goes on where the last Daybook ended.
    async fn resume(&self) -> Result<(), OpenError> {
        let unusable = |path: &Path, source| OpenError::Unusable {
            path: path.to_owned(),
            source,
        };
        let mut saved: Vec<SavedApp> = Vec::new();
        let entries = std::fs::read_dir(&self.apps_dir);
        for entry in entries.map_err(|e| unusable(&self.apps_dir, e))?.flatten() {
            let path = entry.path();
            if path.extension().is_some_and(|e| e == "json") {
                // What cannot be read must not look as if nothing were wanted: that would stop
                // what runs.
                let app = state_file::read(&path).map_err(|e| unusable(&path, e))?;
                saved.extend(app);
            }
        }
        let records = self.cluster.all_records();
        let of_desired = saved
            .iter()
            .flat_map(|s| s.desired.services.values())
            .flat_map(|s| s.releases.values())
            .map(|r| &r.image.digest);
        let used: HashSet<_> = of_desired
            .chain(records.iter().map(|r| &r.spec.image.digest))
            .cloned()
            .collect();
        let images = &self.cluster.images;
        images
            .keep_only(&used)
            .map_err(|e| unusable(&self.cluster.releases, e))?;
        self.cluster.end_strangers(&records).await;
        let surviving = self.surviving(&saved, &records);
        for app in saved {
            let (revision, desired) = (app.revision, app.desired);
            let app = AppRef {
                project: desired.project.clone(),
                environment: desired.environment.clone(),
            };
            self.cluster.take_over(&app, &revision, &desired);
        }
        for record in records {
            self.cluster.end_leftover(&record);
        }
        self.cluster.remove_empty_folders();
        let seen = surviving.into_iter().map(Surviving::shown);
        let _ = tokio::time::timeout(FIRST_LOOK, futures_util::future::join_all(seen)).await;
        Ok(())
    }

    /// The instances that are wanted, and whose processes have outlived the last Daybook.
    fn surviving(&self, saved: &[SavedApp], records: &[Record]) -> Vec<Surviving> {
        let services = saved.iter().flat_map(|app| app.desired.services.values());
        let wanted: HashSet<_> = services.flat_map(|s| s.releases.keys()).collect();
        let records = records.iter().filter(|record| {
            let process = record.process.as_ref();
            wanted.contains(&record.spec.deployment)
                && process.is_some_and(|id| Process::adopt(id, &record.mark).is_some())
        });
        let surviving = records.map(|record| Surviving {
            deployment: record.spec.deployment,
            name: record.spec.name(),
            status: self.watch(&record.spec.app),
        });
        surviving.collect()
    }
}

/// An instance that is being taken over.
struct Surviving {
    deployment: DeploymentId,
    name: String,
    status: watch::Receiver<AppStatus>,
}

impl Surviving {
    /// Waits until it has reported.
    async fn shown(mut self) {
        let reported = |status: &AppStatus| {
            let mut releases = status.releases.iter();
            let release = releases.find(|r| r.deployment == self.deployment);
            release.is_some_and(|r| r.instances.iter().any(|i| i.name == self.name))
        };
        let _ = self.status.wait_for(reported).await;
    }
}

#[async_trait]
impl Target for LocalCluster {
    fn cluster(&self) -> &ClusterName {
        &self.cluster.name
    }

    async fn apply(
        &self,
        app: &AppRef,
        revision: &CommitId,
        desired: &EnvironmentValues,
    ) -> Result<(), TargetError> {
        let open = self.open.lock().await;
        if !*open {
            let name = &self.cluster.name;
            let message = format!("cluster {name} is shut down");
            return Err(TargetError::Unavailable(message));
        }
        check(app, desired)?;
        let path = self
            .apps_dir
            .join(format!("{}.{}.json", app.project, app.environment));
        let saved = SavedApp {
            revision: revision.clone(),
            desired: desired.clone(),
        };
        let written = tokio::task::spawn_blocking(move || state_file::write(&path, &saved)).await;
        let written = written.unwrap_or_else(|e| Err(io::Error::other(e)));
        written.map_err(|e| {
            TargetError::Unavailable(format!("the desired state cannot be kept on disk: {e}"))
        })?;
        self.cluster.take_over(app, revision, desired);
        Ok(())
    }

    async fn retry(&self, app: &AppRef, deployment: DeploymentId) -> Result<(), TargetError> {
        {
            let apps = self.cluster.lock();
            let release = apps.get(app).and_then(|a| a.releases.get(&deployment));
            let Some(goal) = release else {
                let message = format!("it has no release of deployment {deployment} yet");
                return Err(TargetError::Unavailable(message));
            };
            goal.send_modify(Goal::try_again);
        }
        let forgotten = |status: &AppStatus| {
            let mut releases = status.releases.iter();
            let release = releases.find(|r| r.deployment == deployment);
            let problem = release.and_then(|r| r.problem.as_ref());
            problem.is_none_or(|p| p.transient)
        };
        let mut status = self.watch(app);
        let within = self.cluster.grace + RETRY_TAKES;
        match tokio::time::timeout(within, status.wait_for(forgotten)).await {
            Ok(Ok(_)) => Ok(()),
            _ => Err(TargetError::Unavailable(
                "what has failed could not be ended in time".into(),
            )),
        }
    }

    async fn remove_volumes(&self, app: &AppRef) -> Result<(), TargetError> {
        let (volumes, app) = (self.cluster.volumes.clone(), app.clone());
        let removed = tokio::task::spawn_blocking(move || volumes.remove(&app)).await;
        let removed = removed.unwrap_or_else(|e| Err(io::Error::other(e)));
        removed.map_err(|e| TargetError::Unavailable(format!("volumes stay behind: {e}")))
    }

    fn watch(&self, app: &AppRef) -> watch::Receiver<AppStatus> {
        let mut apps = self.cluster.lock();
        apps.entry(app.clone()).or_default().board.watch()
    }
}

/// Refuses values that are not the Application's, or that name a deployment twice.
fn check(app: &AppRef, desired: &EnvironmentValues) -> Result<(), TargetError> {
    if (&desired.project, &desired.environment) != (&app.project, &app.environment) {
        return Err(TargetError::Refused(format!(
            "the values of {} in {} are not those of {} in {}",
            desired.environment, desired.project, app.environment, app.project
        )));
    }
    let mut seen = HashSet::new();
    for deployment in desired.services.values().flat_map(|s| s.releases.keys()) {
        if !seen.insert(deployment) {
            return Err(TargetError::Refused(format!(
                "two services have a release of deployment {deployment}"
            )));
        }
    }
    Ok(())
}

impl Cluster {
    fn lock(&self) -> MutexGuard<'_, HashMap<AppRef, App>> {
        self.apps.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Makes a desired state the goal of the releases' tasks.
    fn take_over(self: &Arc<Self>, app: &AppRef, revision: &CommitId, desired: &EnvironmentValues) {
        let goals: BTreeMap<DeploymentId, Goal> = desired
            .services
            .iter()
            .flat_map(|(name, service)| service.releases.iter().map(move |r| (name, r)))
            .filter(|(_, (_, values))| values.clusters.contains(&self.name))
            .map(|(name, (id, values))| (*id, Goal::new(name.clone(), values, revision.clone())))
            .collect();
        let mut apps = self.lock();
        let entry = apps.entry(app.clone()).or_default();
        let wanted = goals
            .iter()
            .map(|(id, goal)| (*id, goal.wanted()))
            .collect();
        entry.board.take_over(revision, wanted);
        for (id, goal) in &entry.releases {
            if !goals.contains_key(id) {
                goal.send_modify(Goal::remove);
            }
        }
        for (id, goal) in goals {
            self.pursue(app, entry, id, goal);
        }
    }

    /// Gives a release a goal, and a task if it has none.
    fn pursue(self: &Arc<Self>, app: &AppRef, entry: &mut App, id: DeploymentId, goal: Goal) {
        match entry.releases.get(&id) {
            Some(sender) => sender.send_modify(|now| now.replace(goal)),
            None => {
                let (sender, receiver) = watch::channel(goal);
                let release = Release::new(self.clone(), entry.board.clone(), app.clone(), id);
                self.tasks.spawn(release.converge(receiver));
                entry.releases.insert(id, sender);
            }
        }
    }

    /// Sees to it that a release which nothing asks for goes away.
    fn end_leftover(self: &Arc<Self>, record: &Record) {
        let (app, id) = (&record.spec.app, record.spec.deployment);
        let mut apps = self.lock();
        let entry = apps.entry(app.clone()).or_default();
        if !entry.releases.contains_key(&id) {
            let goal = Goal::leftover(record);
            entry.board.add_leftover(id, goal.wanted());
            self.pursue(app, entry, id, goal);
        }
    }

    /// Ends processes that carry this cluster's mark and stand in no record.
    async fn end_strangers(&self, records: &[Record]) {
        let known: HashSet<String> = records.iter().map(|r| r.mark.clone()).collect();
        let prefix = format!("{}/", self.id);
        let found = tokio::task::spawn_blocking(move || {
            processes::marked(|mark| mark.starts_with(&prefix) && !known.contains(mark))
        });
        for stranger in found.await.unwrap_or_default() {
            tracing::warn!(
                pid = stranger.id.pid,
                "ending a process that no record names"
            );
            process::kill_leftovers(stranger.id, stranger.run).await;
        }
    }

    /// Takes a release off the list if `remove` agrees, while nobody can give it a new goal.
    fn forget(&self, app: &AppRef, id: DeploymentId, remove: impl FnOnce() -> bool) -> bool {
        let mut apps = self.lock();
        let removed = remove();
        if removed && let Some(entry) = apps.get_mut(app) {
            entry.releases.remove(&id);
        }
        removed
    }

    /// The records of a release's instances.
    fn records(&self, deployment: DeploymentId) -> Vec<Record> {
        let folder = self.releases.join(deployment.to_string());
        let Ok(entries) = std::fs::read_dir(folder) else {
            return Vec::new();
        };
        entries
            .flatten()
            .filter_map(|entry| match Record::read(&entry.path()) {
                Ok(record) => record,
                Err(error) => {
                    let path = entry.path();
                    tracing::error!(path = %path.display(), %error, "a record cannot be read");
                    None
                }
            })
            .collect()
    }

    fn all_records(&self) -> Vec<Record> {
        let Ok(entries) = std::fs::read_dir(&self.releases) else {
            return Vec::new();
        };
        entries
            .flatten()
            .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
            .flat_map(|deployment| self.records(deployment))
            .collect()
    }

    /// Removes folders of releases that no task looks after.
    fn remove_empty_folders(&self) {
        let known: HashSet<String> = {
            let apps = self.lock();
            let all = apps.values().flat_map(|a| a.releases.keys());
            all.map(DeploymentId::to_string).collect()
        };
        let Ok(entries) = std::fs::read_dir(&self.releases) else {
            return;
        };
        for entry in entries.flatten() {
            if !known.contains(&*entry.file_name().to_string_lossy())
                && let Err(error) = state_file::remove(&entry.path())
            {
                tracing::warn!(path = %entry.path().display(), %error, "a folder stays behind");
            }
        }
    }
}

fn make_private(folder: &Path) -> io::Result<()> {
    use std::os::unix::fs::DirBuilderExt;
    std::fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(folder)
}

/// The identity of a folder, given to it when it is first used.
fn identify(dir: &Path, name: &ClusterName) -> Result<Identity, OpenError> {
    let path = dir.join("cluster.json");
    let unusable = |source| OpenError::Unusable {
        path: path.clone(),
        source,
    };
    match state_file::read::<Identity>(&path).map_err(unusable)? {
        Some(identity) if identity.cluster == *name => Ok(identity),
        Some(identity) => Err(OpenError::OtherCluster {
            dir: dir.to_owned(),
            found: identity.cluster,
            asked: name.clone(),
        }),
        None => {
            let identity = Identity {
                id: uuid::Uuid::new_v4().to_string(),
                cluster: name.clone(),
            };
            state_file::write(&path, &identity).map_err(unusable)?;
            Ok(identity)
        }
    }
}
