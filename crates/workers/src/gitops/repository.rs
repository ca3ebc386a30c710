//! One GitOps repository.

use std::collections::{BTreeMap, HashSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use daybook_events::gitops::{DiffSummary, LedgerAnchor};
use daybook_events::{CommitId, Digest, EnvironmentName, EventId, ProjectName};
use daybook_failpoints::reached;
use git2::{Config, ConfigLevel, ErrorCode, ObjectType, Oid, Repository, RepositoryInitOptions};
use jiff::Timestamp;
use tokio_util::sync::CancellationToken;

use super::change::Change;
use super::group::{self, Queue, Wanted};
use super::history::{self, ChangedFile, CommitRecord, Diff, EventIndex, commit_id};
use super::making::Making;
use super::message::{Author, LedgerPoint};
use super::publish::{Moved, Remote, swap};
use super::signing::{self, SigningKey};
use super::staged::Lately;
use super::{GitopsError, pack, survey};
use crate::file_lock::FileLock;
use crate::git_transport::{
    GitTransport, Session, TransportConfig, TransportError, in_background, prepare_process,
};
use crate::values::EnvironmentValues;

/// The branch that everything is on.
pub const BRANCH: &str = "main";
pub(super) const BRANCH_REF: &str = "refs/heads/main";

/// How often a change is made anew because the branch moved.
pub(super) const MAX_ATTEMPTS: u32 = 12;

/// Settings that are libgit2's alone.
const SYNCED: &str = "daybook.config";

/// After how many packs it is looked whether there are too many.
const TIDIED: usize = 16;

/// How many own commits are remembered.
const MADE: usize = 10_000;

/// How often a handle is used. It knows the packs that were there when it was opened, and keeps
/// those open that another process has replaced since.
const USES: u32 = 64;

/// The setting of the repository that names its project.
const PROJECT_SETTING: &str = "daybook.project";

/// One change, with who wants it and which event it is the effect of.
#[derive(Debug, Clone)]
pub struct CommitRequest {
    /// The environment that changes.
    pub environment: EnvironmentName,
    /// What changes.
    pub change: Change,
    /// Who asked for it.
    pub author: Author,
    /// When they did.
    pub at: Timestamp,
    /// The event that the commit is the effect of. The same event makes no second commit.
    pub event: EventId,
    /// Text for the message; what would make it another message is taken out.
    pub body: Option<String>,
    /// What the commit is to witness of the ledger.
    pub witness: Witness,
}

/// What a commit is to witness of the ledger, and what the ledger knows of the repository.
#[derive(Debug, Clone, Default)]
pub struct Witness {
    /// How far the ledger is signed.
    pub ledger: Option<LedgerPoint>,
    /// The public keys that the ledger lists for this repository. A commit that an earlier try
    /// made is known by its signature with one of them, or with the key that signs now.
    pub signers: Vec<String>,
    /// The newest commit that the ledger records. Where the branch does not contain it, nothing
    /// is committed.
    pub after: Option<CommitId>,
}

/// A commit that is to be undone.
#[derive(Debug, Clone)]
pub struct RevertRequest {
    /// The commit.
    pub commit: CommitId,
    /// Who asked for it.
    pub author: Author,
    /// When they did.
    pub at: Timestamp,
    /// The event that the new commit is the effect of. The same event makes no second commit.
    pub event: EventId,
    /// Why; what would make it another message is taken out.
    pub reason: Option<String>,
    /// What the commit is to witness of the ledger.
    pub witness: Witness,
}

/// What a request led to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Committed {
    /// The commit; if nothing was to be changed, the one that has it so already.
    pub commit: CommitId,
    /// Its first parent.
    pub parent: Option<CommitId>,
    /// Its tree.
    pub tree: String,
    /// The first line of its message. If nothing was to be changed, what it would have been.
    pub title: String,
    /// Its whole message.
    pub message: String,
    /// Its author as `Name <address>`.
    pub author: String,
    /// The files that it changes, with the SHA-256 of each new content; none for a removed file.
    pub files: BTreeMap<String, Option<Digest>>,
    /// SHA-256 over the lines `<digest or "-">  <path>\n` of `files`, sorted.
    pub files_digest: Digest,
    /// How many commits its history has, itself included.
    pub ordinal: u64,
    /// What its trailers say of the ledger.
    pub ledger: Option<LedgerAnchor>,
    /// Fingerprint of the key that it is signed with, if Daybook signs.
    pub signer: Option<String>,
    /// An earlier try had made the commit.
    pub found: bool,
    /// Everything was as it should be already; there is no commit of this request.
    pub unchanged: bool,
}

/// A project's GitOps repository. Clones share it; several processes may use the same one.
#[derive(Debug, Clone)]
pub struct GitopsRepository {
    inner: Arc<Inner>,
}

pub(super) struct Inner {
    path: PathBuf,
    pub(super) project: ProjectName,
    pub(super) remote: Option<Remote>,
    pub(super) key: Option<Arc<SigningKey>>,
    /// For sessions that need no network.
    no_network: GitTransport,
    /// Open handles. One is used by one thread at a time.
    handles: Mutex<Vec<Open>>,
    /// How often packs were replaced.
    replaced: AtomicU64,
    /// How many packs were written since it was looked whether there are too many.
    packs_written: AtomicUsize,
    index: Mutex<EventIndex>,
    lately: Mutex<Lately>,
    /// Commits that this process made, as far as they are remembered.
    made: Mutex<HashSet<Oid>>,
    pub(super) queue: Queue,
}

/// A handle that is kept.
struct Open {
    repository: Repository,
    /// What [`Inner::replaced`] was when it was opened.
    replaced: u64,
    uses: u32,
}

impl std::fmt::Debug for Inner {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("GitopsRepository")
            .field("path", &self.path)
            .field("project", &self.project)
            .field("remote", &self.remote)
            .finish_non_exhaustive()
    }
}

impl GitopsRepository {
    /// Opens a project's repository, or makes it with a first commit. A new one with a remote takes
    /// over what the remote has, or gives an empty remote its first commit; for one that is here
    /// already the remote is not asked. Commits are not signed.
    pub async fn open_or_create(
        path: impl Into<PathBuf>,
        project: &ProjectName,
        remote: Option<Remote>,
    ) -> Result<Self, GitopsError> {
        Self::open_signing(path, project, remote, None).await
    }

    /// The same, with every commit signed with this key.
    pub async fn open_signing(
        path: impl Into<PathBuf>,
        project: &ProjectName,
        remote: Option<Remote>,
        key: Option<Arc<SigningKey>>,
    ) -> Result<Self, GitopsError> {
        let this = Self {
            inner: Arc::new(Inner {
                path: path.into(),
                project: project.clone(),
                remote,
                key,
                no_network: GitTransport::new(TransportConfig::default()),
                handles: Mutex::default(),
                replaced: AtomicU64::new(0),
                // Somebody may have died at it.
                packs_written: AtomicUsize::new(TIDIED),
                index: Mutex::default(),
                lately: Mutex::default(),
                made: Mutex::default(),
                queue: Queue::default(),
            }),
        };
        let inner = this.inner.clone();
        in_background(&CancellationToken::new(), move |cancel| {
            prepare_process()?;
            inner.create_or_check(&inner.session(&cancel))
        })
        .await?;
        Ok(this)
    }

    /// Where it is: a bare repository that `git` can clone.
    pub fn path(&self) -> &Path {
        &self.inner.path
    }

    /// The project.
    pub fn project(&self) -> &ProjectName {
        &self.inner.project
    }

    /// Whether this process made a commit. It is not remembered for ever.
    pub fn has_made(&self, commit: &CommitId) -> bool {
        Oid::from_str(commit.as_str()).is_ok_and(|id| self.inner.made().contains(&id))
    }

    /// Makes a change, or finds that it was made, or that there is nothing to change. Commits that
    /// are asked for at the same time are written together.
    pub async fn commit(
        &self,
        request: CommitRequest,
        cancel: &CancellationToken,
    ) -> Result<Committed, GitopsError> {
        group::submit(&self.inner, Wanted::Change(Box::new(request)), cancel).await
    }

    /// Undoes a commit by a further one, or finds that it was undone for the same event.
    pub async fn revert(
        &self,
        request: RevertRequest,
        cancel: &CancellationToken,
    ) -> Result<Committed, GitopsError> {
        group::submit(&self.inner, Wanted::Revert(Box::new(request)), cancel).await
    }

    /// The commit that was made for an event, if it is on the branch: on the remote's, where there
    /// is one. `signers` are the public keys that the ledger lists for this repository; as for a
    /// commit, only one that is signed with one of them, or with the key that signs now, counts.
    pub async fn find(
        &self,
        event: EventId,
        signers: Vec<String>,
        cancel: &CancellationToken,
    ) -> Result<Option<Committed>, GitopsError> {
        let witness = Witness {
            signers,
            ..Witness::default()
        };
        let inner = self.inner.clone();
        in_background(cancel, move |cancel| {
            let session = inner.session(&cancel);
            inner.with(|repository| {
                let here = inner.made_for(repository, inner.head(repository)?, event, &witness)?;
                let (None, Some(remote)) = (&here, &inner.remote) else {
                    return Ok(here);
                };
                let _lock = inner.lock_for(&session)?;
                remote.follow(repository, &session)?;
                inner.made_for(repository, inner.head(repository)?, event, &witness)
            })
        })
        .await
    }

    /// What is on the branch that `known` does not list, in the order of history, and whether the
    /// branch still contains `expected`. What is in the history of `since` is not looked at. With
    /// a remote, what others pushed there is taken over first.
    pub async fn survey(
        &self,
        request: survey::Request,
        cancel: &CancellationToken,
    ) -> Result<survey::Survey, GitopsError> {
        let inner = self.inner.clone();
        in_background(cancel, move |cancel| {
            let session = inner.session(&cancel);
            inner.with(|repository| {
                let mut head = None;
                if let Some(remote) = &inner.remote {
                    let _lock = inner.lock_for(&session)?;
                    head = match remote.follow(repository, &session) {
                        // Where the remote is, and not where the branch was left here.
                        Err(GitopsError::Diverged { remote, .. }) => {
                            Some(find(repository, &remote)?)
                        }
                        // It is a new one: it is given what is here.
                        Ok(None) => {
                            let here = inner.head(repository)?;
                            match remote.push(repository, &session, None, here)? {
                                Moved::Yes => Some(here),
                                Moved::Elsewhere => {
                                    return Err(GitopsError::Contended { attempts: 1 });
                                }
                            }
                        }
                        other => other?,
                    };
                }
                let head = match head {
                    Some(head) => head,
                    None => inner.head(repository)?,
                };
                survey::take(repository, head, &request)
            })
        })
        .await
    }

    /// The newest commit of the branch.
    pub async fn head(&self) -> Result<CommitId, GitopsError> {
        self.read(|inner, repository| Ok(commit_id(inner.head(repository)?)?))
            .await
    }

    /// Takes over what others pushed to the remote, and returns the newest commit. Without a
    /// remote there is nothing to take over.
    pub async fn refresh(&self, cancel: &CancellationToken) -> Result<CommitId, GitopsError> {
        let inner = self.inner.clone();
        in_background(cancel, move |cancel| {
            let session = inner.session(&cancel);
            inner.with(|repository| {
                if let Some(remote) = &inner.remote {
                    let _lock = inner.lock_for(&session)?;
                    remote.follow(repository, &session)?;
                }
                Ok(commit_id(inner.head(repository)?)?)
            })
        })
        .await
    }

    /// The desired state of an environment at a commit.
    pub async fn read_environment(
        &self,
        commit: &CommitId,
        environment: &EnvironmentName,
    ) -> Result<EnvironmentValues, GitopsError> {
        let (commit, environment) = (commit.clone(), environment.clone());
        self.read(move |inner, repository| {
            let base = Some((find(repository, &commit)?, 0));
            let mut at = Making::on(base, repository, &inner.project, None, Lately::default())?;
            at.read_environment(&environment)?
                .ok_or(GitopsError::EnvironmentMissing { environment })
        })
        .await
    }

    /// The environments that are in the repository at a commit. Folders whose names are no
    /// environment's are somebody else's.
    pub async fn environments(
        &self,
        commit: &CommitId,
    ) -> Result<Vec<EnvironmentName>, GitopsError> {
        let commit = commit.clone();
        self.read(move |_, repository| {
            let tree = repository.find_commit(find(repository, &commit)?)?.tree()?;
            let Some(entry) = tree.get_name("environments") else {
                return Ok(Vec::new());
            };
            let Ok(folder) = repository.find_tree(entry.id()) else {
                return Ok(Vec::new());
            };
            let mut names: Vec<EnvironmentName> = folder
                .iter()
                .filter(|e| e.kind() == Some(ObjectType::Tree))
                .filter_map(|e| EnvironmentName::parse(e.name().ok()?).ok())
                .collect();
            names.sort();
            Ok(names)
        })
        .await
    }

    /// The commits after `since` (all, if none is given), oldest first, at most `limit`.
    pub async fn log(
        &self,
        since: Option<&CommitId>,
        limit: usize,
    ) -> Result<Vec<CommitRecord>, GitopsError> {
        let since = since.cloned();
        self.read(move |inner, repository| {
            let since = match since {
                Some(since) => Some(find(repository, &since)?),
                None => None,
            };
            let head = inner.head(repository)?;
            Ok(history::list(repository, head, since, limit)?)
        })
        .await
    }

    /// What differs between two commits; from nothing, if there is no first one.
    pub async fn diff(&self, from: Option<&CommitId>, to: &CommitId) -> Result<Diff, GitopsError> {
        let (from, to) = (from.cloned(), to.clone());
        self.read(move |_, repository| {
            let from = match from {
                Some(from) => Some(find(repository, &from)?),
                None => None,
            };
            Ok(history::diff(repository, from, find(repository, &to)?)?)
        })
        .await
    }

    /// How much a commit changes against its first parent, and in which environments.
    pub async fn summary(
        &self,
        commit: &CommitId,
    ) -> Result<(DiffSummary, Vec<EnvironmentName>), GitopsError> {
        let commit = commit.clone();
        self.read(move |_, repository| {
            Ok(survey::summarise(repository, find(repository, &commit)?)?)
        })
        .await
    }

    async fn read<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Inner, &Repository) -> Result<T, GitopsError> + Send + 'static,
    ) -> Result<T, GitopsError> {
        let inner = self.inner.clone();
        in_background(&CancellationToken::new(), move |_| {
            inner.with(|repository| work(&inner, repository))
        })
        .await
    }
}

impl Inner {
    /// Works with an open handle, which is kept for the next one unless the work failed.
    pub(super) fn with<T>(
        &self,
        work: impl FnOnce(&Repository) -> Result<T, GitopsError>,
    ) -> Result<T, GitopsError> {
        let replaced = self.replaced.load(Ordering::Acquire);
        let kept = self.handles().pop();
        let mut open = match kept {
            Some(open) if open.replaced == replaced && open.uses < USES => open,
            _ => Open {
                repository: open(&self.path)?,
                replaced,
                uses: 0,
            },
        };
        let done = work(&open.repository)?;
        open.uses += 1;
        self.handles().push(open);
        Ok(done)
    }

    fn handles(&self) -> MutexGuard<'_, Vec<Open>> {
        self.handles.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn index(&self) -> MutexGuard<'_, EventIndex> {
        self.index.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn lately(&self) -> MutexGuard<'_, Lately> {
        self.lately.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn made(&self) -> MutexGuard<'_, HashSet<Oid>> {
        self.made.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Remembers commits as made by this process.
    pub(super) fn remember(&self, commits: impl Iterator<Item = Oid>) {
        let mut made = self.made();
        if made.len() > MADE {
            made.clear();
        }
        made.extend(commits);
    }

    pub(super) fn session(&self, cancel: &CancellationToken) -> Session {
        let transport = self
            .remote
            .as_ref()
            .map_or(&self.no_network, |r| &r.transport);
        Session::new(transport, cancel)
    }

    /// The right to write, among all processes; `waiting` is asked now and then whether to go on.
    /// It lies beside the repository, so that it is there before the repository is.
    pub(super) fn lock(
        &self,
        waiting: impl FnMut() -> Result<(), GitopsError>,
    ) -> Result<FileLock, GitopsError> {
        let path = beside(&self.path, ".lock");
        FileLock::acquire(&path, true, |e| GitopsError::disk(&path)(e), waiting)
    }

    fn lock_for(&self, session: &Session) -> Result<FileLock, GitopsError> {
        self.lock(|| Ok(session.check_cancelled()?))
    }

    /// Where packs are.
    pub(super) fn packs(&self) -> PathBuf {
        packs_of(&self.path)
    }

    pub(super) fn count_pack(&self) {
        self.packs_written.fetch_add(1, Ordering::Relaxed);
    }

    /// Joins packs now and then. Nothing depends on it.
    pub(super) fn tidy(&self) {
        if self.packs_written.load(Ordering::Relaxed) < TIDIED {
            return;
        }
        self.packs_written.store(0, Ordering::Relaxed);
        match pack::tidy(&self.packs()) {
            Ok(true) => {
                self.replaced.fetch_add(1, Ordering::Release);
                self.handles().clear();
            }
            Ok(false) => {}
            Err(error) => {
                tracing::warn!(project = %self.project, %error, "packs could not be joined");
            }
        }
    }

    fn create_or_check(&self, session: &Session) -> Result<(), GitopsError> {
        let parent = self.path.parent().unwrap_or(Path::new("/"));
        fs::create_dir_all(parent).map_err(GitopsError::disk(parent))?;
        let _lock = self.lock_for(session)?;
        if !self.path.exists() {
            self.create(session)?;
        }
        // The remote of one that is here already is not asked: what it has must be readable while
        // the remote is away. Whoever commits meets it soon enough.
        self.with(|repository| self.check(repository))
    }

    /// Makes the repository in a folder beside, which takes its name when all is there.
    fn create(&self, session: &Session) -> Result<(), GitopsError> {
        let fresh = beside(&self.path, ".new");
        if fresh.exists() {
            fs::remove_dir_all(&fresh).map_err(GitopsError::disk(&fresh))?;
        }
        let mut options = RepositoryInitOptions::new();
        options
            .bare(true)
            .no_reinit(true)
            .external_template(false)
            .initial_head(BRANCH);
        let repository = Repository::init_opts(&fresh, &options)?;
        let mut config = repository.config()?;
        // Whoever pushes here by hand can add to the history, and not rewrite it.
        config.set_bool("receive.denyNonFastForwards", true)?;
        config.set_bool("receive.denyDeletes", true)?;
        config.set_str(PROJECT_SETTING, self.project.as_str())?;
        drop(repository);

        let repository = open(&fresh)?;
        match &self.remote {
            None => {
                let first = self.first_commit(&repository)?;
                swap(&repository, None, first)?;
            }
            Some(remote) => self.begin_with(remote, &repository, session)?,
        }
        drop(repository);
        // What libgit2 begins a repository with, it does not sync.
        sync_all(&fresh).map_err(GitopsError::disk(&fresh))?;
        reached("gitops.create.before");
        fs::rename(&fresh, &self.path).map_err(GitopsError::disk(&self.path))?;
        let parent = self.path.parent().unwrap_or(Path::new("/"));
        reached("gitops.create.renamed");
        fs::File::open(parent)
            .and_then(|folder| folder.sync_all())
            .map_err(GitopsError::disk(parent))?;
        reached("gitops.create.after");
        Ok(())
    }

    /// Gives an empty repository the history of its remote or, where that is empty too, both of
    /// them the first commit. Of several that do so at once, one makes it and the others take it.
    fn begin_with(
        &self,
        remote: &Remote,
        repository: &Repository,
        session: &Session,
    ) -> Result<(), GitopsError> {
        for _ in 0..MAX_ATTEMPTS {
            if remote.follow(repository, session)?.is_some() {
                return Ok(());
            }
            let first = self.first_commit(repository)?;
            if remote.push(repository, session, None, first)? == Moved::Yes {
                swap(repository, None, first)?;
                return Ok(());
            }
        }
        Err(GitopsError::Contended {
            attempts: MAX_ATTEMPTS,
        })
    }

    fn first_commit(&self, repository: &Repository) -> Result<Oid, GitopsError> {
        let key = self.key.as_deref();
        let mut making = Making::on(None, repository, &self.project, key, Lately::default())?;
        making.begin()?;
        let first = making.tip();
        let packs = packs_of(repository.path());
        let (objects, _) = making.into_staged().into_parts();
        pack::write(&packs, &objects).map_err(GitopsError::disk(&packs))?;
        first.ok_or_else(|| git2::Error::from_str("no first commit").into())
    }

    /// Refuses what is no GitOps repository, or another project's.
    fn check(&self, repository: &Repository) -> Result<(), GitopsError> {
        let not_one = |reason: &str| GitopsError::NotARepository {
            path: self.path.clone(),
            reason: reason.to_owned(),
        };
        let mut config = repository.config()?;
        // Repositories of older versions have it where git warns about it.
        let mut local = config.open_level(ConfigLevel::Local)?;
        if local.get_bool("core.fsyncobjectfiles").is_ok() {
            local.remove("core.fsyncobjectfiles")?;
        }
        let config = config.snapshot()?;
        let project = config
            .get_str(PROJECT_SETTING)
            .map_err(|_| not_one("it was not made by Daybook"))?;
        if project != self.project.as_str() {
            let found = ProjectName::parse(project)
                .map_err(|_| not_one("its project has no valid name"))?;
            return Err(GitopsError::OtherProject {
                path: self.path.clone(),
                found,
            });
        }
        if repository
            .find_reference("HEAD")?
            .symbolic_target()
            .ok()
            .flatten()
            != Some(BRANCH_REF)
        {
            return Err(not_one("its HEAD is not the branch main"));
        }
        Ok(())
    }

    pub(super) fn head(&self, repository: &Repository) -> Result<Oid, GitopsError> {
        Ok(repository.refname_to_id(BRANCH_REF)?)
    }

    /// What is reported of a commit, read from the repository: the same for the one who made it
    /// and for the one who finds it.
    pub(super) fn committed(
        &self,
        repository: &Repository,
        id: Oid,
        ordinal: u64,
    ) -> Result<Committed, GitopsError> {
        let commit = repository.find_commit(id)?;
        let parent = commit.parent_ids().next();
        let files: BTreeMap<String, Option<Digest>> =
            history::files_between(repository, parent, id)?
                .into_iter()
                .map(|(path, ChangedFile { after, .. })| (path, after))
                .collect();
        Ok(Committed {
            commit: commit_id(id)?,
            parent: parent.map(commit_id).transpose()?,
            tree: commit.tree_id().to_string(),
            title: history::title_of(&commit),
            message: String::from_utf8_lossy(commit.message_bytes()).into_owned(),
            author: history::author_of(&commit),
            files_digest: digest_of(&files),
            files,
            ordinal,
            ledger: history::trailers_of(&commit).ledger,
            signer: match &self.key {
                None => None,
                Some(_) => signing::signer_of(repository, id)?,
            },
            found: false,
            unchanged: false,
        })
    }
}

pub(super) fn digest_of(files: &BTreeMap<String, Option<Digest>>) -> Digest {
    let mut lines: Vec<String> = files
        .iter()
        .map(|(path, digest)| {
            let digest = digest.as_ref().map_or("-", Digest::as_str);
            format!("{digest}  {path}\n")
        })
        .collect();
    lines.sort();
    Digest::of(lines.concat().as_bytes())
}

pub(super) fn find(repository: &Repository, commit: &CommitId) -> Result<Oid, GitopsError> {
    let missing = || GitopsError::CommitMissing {
        commit: commit.clone(),
    };
    let id = Oid::from_str(commit.as_str()).map_err(|_| missing())?;
    match repository.find_commit(id) {
        Ok(_) => Ok(id),
        Err(e) if e.code() == ErrorCode::NotFound => Err(missing()),
        Err(e) => Err(e.into()),
    }
}

fn packs_of(repository: &Path) -> PathBuf {
    repository.join("objects/pack")
}

/// Opens a repository so that objects and refs are synced before they are reported as written.
/// libgit2's setting for that is one that git warns about wherever it meets it, so it stands in a
/// file of its own, which git does not read.
fn open(path: &Path) -> Result<Repository, GitopsError> {
    let repository = Repository::open_bare(path)?;
    if repository.config()?.get_entry(PROJECT_SETTING).is_err() {
        // It is not ours, and is left as it is.
        return Ok(repository);
    }
    let synced = path.join(SYNCED);
    if !synced.exists() {
        fs::write(&synced, "[core]\n\tfsyncObjectFiles = true\n")
            .map_err(GitopsError::disk(&synced))?;
    }
    let mut config = Config::new()?;
    config.add_file(&path.join("config"), ConfigLevel::Local, false)?;
    config.add_file(&synced, ConfigLevel::App, false)?;
    repository.set_config(&config)?;
    Ok(repository)
}

/// Syncs a folder and all that is in it.
fn sync_all(folder: &Path) -> std::io::Result<()> {
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        match entry.file_type()? {
            kind if kind.is_dir() => sync_all(&entry.path())?,
            kind if kind.is_file() => fs::File::open(entry.path())?.sync_all()?,
            _ => {}
        }
    }
    fs::File::open(folder)?.sync_all()
}

/// A path beside another one: `shop.git` and `shop.git.lock`.
fn beside(path: &Path, suffix: &str) -> PathBuf {
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(suffix);
    path.with_file_name(name)
}

/// Waits before another try, longer each time and never as long as somebody else.
pub(super) fn pause(attempt: u32, session: &Session) -> Result<(), TransportError> {
    let most = 25u64 << attempt.min(6);
    let random = uuid::Uuid::now_v7().as_u128() as u64 % most;
    let mut left = Duration::from_millis(most / 2 + random);
    while !left.is_zero() {
        session.check_cancelled()?;
        let step = left.min(Duration::from_millis(50));
        std::thread::sleep(step);
        left -= step;
    }
    Ok(())
}
