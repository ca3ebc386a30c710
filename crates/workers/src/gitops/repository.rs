//! One GitOps repository.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use daybook_events::gitops::{DiffSummary, LedgerAnchor};
use daybook_events::spec::PinnedImage;
use daybook_events::{CommitId, Digest, EnvironmentName, EventId, ProjectName, ServiceName};
use daybook_failpoints::reached;
use git2::build::TreeUpdateBuilder;
use git2::{
    Config, ConfigLevel, ErrorCode, FileMode, ObjectType, Oid, Repository, RepositoryInitOptions,
    Signature,
};
use jiff::Timestamp;
use tokio_util::sync::CancellationToken;

use super::change::{self, After, CannotChange, Change};
use super::history::{self, ChangedFile, CommitRecord, Diff, EventIndex, commit_id};
use super::message::{
    self, ALLOWED_SIGNERS, Author, CHECKPOINT, COMMITTER, COMMITTER_ADDRESS, LedgerPoint,
};
use super::publish::{Moved, Remote, swap};
use super::signing::{self, SigningKey, allowed_signers};
use super::{GitopsError, survey, template};
use crate::file_lock::FileLock;
use crate::git_transport::{
    GitTransport, Session, TransportConfig, TransportError, in_background, prepare_process,
    printable,
};
use crate::values::EnvironmentValues;

/// The branch that everything is on.
pub const BRANCH: &str = "main";
pub(super) const BRANCH_REF: &str = "refs/heads/main";

/// How often a change is made anew because the branch moved.
const MAX_ATTEMPTS: u32 = 12;

/// Settings that are libgit2's alone.
const SYNCED: &str = "daybook.config";

/// How many commits are looked through for the image that a service had before.
const IMAGE_MEMORY: usize = 500;

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

struct Inner {
    path: PathBuf,
    project: ProjectName,
    remote: Option<Remote>,
    key: Option<Arc<SigningKey>>,
    /// For sessions that need no network.
    no_network: GitTransport,
    /// Open handles. One is used by one thread at a time.
    handles: Mutex<Vec<Repository>>,
    index: Mutex<EventIndex>,
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
                index: Mutex::default(),
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

    /// Makes a change, or finds that it was made, or that there is nothing to change.
    pub async fn commit(
        &self,
        request: CommitRequest,
        cancel: &CancellationToken,
    ) -> Result<Committed, GitopsError> {
        let inner = self.inner.clone();
        in_background(cancel, move |cancel| {
            let session = inner.session(&cancel);
            let _lock = inner.lock(&session)?;
            inner.with(|repository| {
                let tried = Tried {
                    event: request.event,
                    author: request.author.to_string(),
                    witness: &request.witness,
                };
                inner.commit(repository, &session, &tried, |base| {
                    inner.prepare(repository, base, &request)
                })
            })
        })
        .await
    }

    /// Undoes a commit by a further one, or finds that it was undone for the same event.
    pub async fn revert(
        &self,
        request: RevertRequest,
        cancel: &CancellationToken,
    ) -> Result<Committed, GitopsError> {
        let inner = self.inner.clone();
        in_background(cancel, move |cancel| {
            let session = inner.session(&cancel);
            let _lock = inner.lock(&session)?;
            inner.with(|repository| {
                let tried = Tried {
                    event: request.event,
                    author: request.author.to_string(),
                    witness: &request.witness,
                };
                inner.commit(repository, &session, &tried, |base| {
                    inner.prepare_revert(repository, base, &request)
                })
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
                    let _lock = inner.lock(&session)?;
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
                    let _lock = inner.lock(&session)?;
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
            let id = find(repository, &commit)?;
            inner
                .values(repository, id, &environment)?
                .map(|(values, _)| values)
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
    fn with<T>(
        &self,
        work: impl FnOnce(&Repository) -> Result<T, GitopsError>,
    ) -> Result<T, GitopsError> {
        let kept = self.handles().pop();
        let repository = match kept {
            Some(repository) => repository,
            None => open(&self.path)?,
        };
        let done = work(&repository)?;
        self.handles().push(repository);
        Ok(done)
    }

    fn handles(&self) -> std::sync::MutexGuard<'_, Vec<Repository>> {
        self.handles.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn session(&self, cancel: &CancellationToken) -> Session {
        let transport = self
            .remote
            .as_ref()
            .map_or(&self.no_network, |r| &r.transport);
        Session::new(transport, cancel)
    }

    /// The right to write, among all processes. It lies beside the repository, so that it is there
    /// before the repository is.
    fn lock(&self, session: &Session) -> Result<FileLock, GitopsError> {
        let path = beside(&self.path, ".lock");
        FileLock::acquire(
            &path,
            true,
            |e| GitopsError::disk(&path)(e),
            || Ok(session.check_cancelled()?),
        )
    }

    fn create_or_check(&self, session: &Session) -> Result<(), GitopsError> {
        let parent = self.path.parent().unwrap_or(Path::new("/"));
        fs::create_dir_all(parent).map_err(GitopsError::disk(parent))?;
        let _lock = self.lock(session)?;
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
        let empty = repository.find_tree(repository.treebuilder(None)?.write()?)?;
        let mut update = TreeUpdateBuilder::new();
        for (path, content) in template::files(&self.project) {
            update.upsert(&*path, repository.blob(content.as_bytes())?, FileMode::Blob);
        }
        if let Some(key) = &self.key {
            let text = allowed_signers([key.signer()?.public_key.as_str()]);
            let blob = repository.blob(text.as_bytes())?;
            update.upsert(ALLOWED_SIGNERS, blob, FileMode::Blob);
        }
        let tree = update.create_updated(repository, &empty)?;
        let message = format!("init: {}\n", self.project);
        let daybook = committer(Timestamp::now())?;
        self.write_commit(repository, &daybook, &daybook, &message, tree, None)
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

    fn head(&self, repository: &Repository) -> Result<Oid, GitopsError> {
        Ok(repository.refname_to_id(BRANCH_REF)?)
    }

    fn commit(
        &self,
        repository: &Repository,
        session: &Session,
        tried: &Tried<'_>,
        prepare: impl Fn(Oid) -> Result<Prepared, GitopsError>,
    ) -> Result<Committed, GitopsError> {
        let signers = self.signers(tried.witness)?;
        for attempt in 0..MAX_ATTEMPTS {
            session.check_cancelled()?;
            let base = self.head(repository)?;
            if let Some(expected) = &tried.witness.after
                && !contains(repository, base, expected)?
            {
                // Another machine may have recorded what it pushed before it is known here.
                match &self.remote {
                    Some(remote) if attempt == 0 => {
                        match remote.follow(repository, session) {
                            // Somebody accepted that the remote's history is another one.
                            Err(GitopsError::Diverged { remote, .. })
                                if contains(repository, find(repository, &remote)?, expected)? =>
                            {
                                swap(repository, Some(base), find(repository, &remote)?)?;
                            }
                            other => drop(other?),
                        }
                        continue;
                    }
                    _ => {
                        return Err(GitopsError::HistoryRewritten {
                            expected: expected.clone(),
                            found: commit_id(base)?,
                        });
                    }
                }
            }
            let (made, ordinal) = {
                let mut index = self.index();
                (
                    index.find(repository, base, tried.event, signers.as_deref())?,
                    index.ordinal(repository, base)?,
                )
            };
            if let Some(made) = made {
                let ordinal = history::ordinal_of(repository, made)?;
                return Ok(Committed {
                    found: true,
                    ..self.committed(repository, made, ordinal)?
                });
            }
            reached("gitops.commit.before");
            let next = match prepare(base)? {
                Prepared::Commit(next) => next,
                Prepared::Nothing { title } => {
                    let head = self.committed(repository, base, ordinal)?;
                    return Ok(Committed {
                        message: title.clone(),
                        title,
                        author: tried.author.clone(),
                        files: BTreeMap::new(),
                        files_digest: digest_of(&BTreeMap::new()),
                        unchanged: true,
                        ..head
                    });
                }
            };
            reached("gitops.commit.written");
            let moved = match &self.remote {
                None => swap(repository, Some(base), next)?,
                Some(remote) => remote.publish(repository, session, base, next)?,
            };
            reached("gitops.commit.after");
            if moved == Moved::Yes {
                return self.committed(repository, next, ordinal + 1);
            }
            if let Some(remote) = &self.remote {
                if attempt > 0 {
                    pause(attempt, session)?;
                }
                remote.follow(repository, session)?;
            }
        }
        Err(GitopsError::Contended {
            attempts: MAX_ATTEMPTS,
        })
    }

    /// The keys whose signatures count; none if nothing is signed here.
    fn signers(&self, witness: &Witness) -> Result<Option<Vec<String>>, GitopsError> {
        let Some(key) = &self.key else {
            return Ok(None);
        };
        let mut signers = witness.signers.clone();
        let own = key.signer()?.public_key;
        if !signers.contains(&own) {
            signers.push(own);
        }
        Ok(Some(signers))
    }

    /// Puts in what every repository begins with, where a remote brought a history of its own that
    /// has nothing of it: a README and a licence, as forges make them.
    fn furnish(
        &self,
        repository: &Repository,
        base: &git2::Commit<'_>,
        update: &mut TreeUpdateBuilder,
    ) -> Result<(), GitopsError> {
        let tree = base.tree()?;
        let has = |path: &str| tree.get_path(Path::new(path)).is_ok();
        if has("base") || has("environments") {
            return Ok(());
        }
        for (path, content) in template::files(&self.project) {
            if !has(&path) {
                update.upsert(&*path, repository.blob(content.as_bytes())?, FileMode::Blob);
            }
        }
        Ok(())
    }

    /// Puts in what the commit witnesses of the ledger.
    fn witness(
        &self,
        repository: &Repository,
        base: &git2::Commit<'_>,
        witness: &Witness,
        update: &mut TreeUpdateBuilder,
    ) -> Result<(), GitopsError> {
        if let Some(ledger) = &witness.ledger {
            let blob = repository.blob(&ledger.checkpoint)?;
            update.upsert(CHECKPOINT, blob, FileMode::Blob);
        }
        if let Some(signers) = self.signers(witness)? {
            let text = allowed_signers(signers.iter().map(String::as_str));
            let there = base.tree()?.get_path(Path::new(ALLOWED_SIGNERS)).ok();
            let same = there.is_some_and(|entry| {
                repository
                    .find_blob(entry.id())
                    .is_ok_and(|blob| blob.content() == text.as_bytes())
            });
            if !same {
                let blob = repository.blob(text.as_bytes())?;
                update.upsert(ALLOWED_SIGNERS, blob, FileMode::Blob);
            }
        }
        Ok(())
    }

    /// Makes the commit that undoes another one on a base, without moving the branch.
    fn prepare_revert(
        &self,
        repository: &Repository,
        base: Oid,
        request: &RevertRequest,
    ) -> Result<Prepared, GitopsError> {
        let commit = request.commit.clone();
        let undone = repository.find_commit(find(repository, &commit)?)?;
        if undone.parent_count() > 1 {
            return Err(GitopsError::RevertOfMerge { commit });
        }
        let base = repository.find_commit(base)?;
        let mut index = repository.revert_commit(&undone, &base, 0, None)?;
        if index.has_conflicts() {
            let paths = conflicts(&index)?;
            return Err(GitopsError::RevertConflicts { commit, paths });
        }
        let reverted = repository.find_tree(index.write_tree_to(repository)?)?;
        if reverted.id() == base.tree_id() {
            return Err(GitopsError::NothingToRevert { commit });
        }
        let difference =
            repository.diff_tree_to_tree(Some(&base.tree()?), Some(&reverted), None)?;
        let environments = survey::environments(difference.deltas());
        let mut update = TreeUpdateBuilder::new();
        self.witness(repository, &base, &request.witness, &mut update)?;
        let tree = update.create_updated(repository, &reverted)?;
        let line = message::revert_line(&commit);
        let body = match request.reason.as_deref().map(str::trim) {
            None | Some("") => line,
            Some(reason) => format!("{reason}\n\n{line}"),
        };
        let undone = format!("{} {}", commit.short(), history::title_of(&undone));
        let text = message::compose(
            &message::revert_title(&environments, undone.trim_end()),
            Some(&body),
            request.event,
            None,
            request.witness.ledger.as_ref().map(|l| &l.anchor),
        );
        let author = signature(&request.author, request.at)?;
        let committer = committer(Timestamp::now())?;
        let next = self.write_commit(repository, &author, &committer, &text, tree, Some(&base))?;
        Ok(Prepared::Commit(next))
    }

    /// Makes the commit of a change on a base, without moving the branch.
    fn prepare(
        &self,
        repository: &Repository,
        base: Oid,
        request: &CommitRequest,
    ) -> Result<Prepared, GitopsError> {
        let environment = &request.environment;
        let current = self.values(repository, base, environment)?;
        let other = match request.change.reads() {
            Some(name) => self.values(repository, base, name)?,
            None => None,
        };
        let mut changed = change::make(
            &request.change,
            EnvironmentValues::new(self.project.clone(), environment.clone(), false),
            current.as_ref().map(|(values, _)| values),
            other.as_ref().map(|(values, _)| values),
        )
        .map_err(|why| cannot(why, request))?;
        if let (Change::Remove { service, .. }, After::Values(values)) =
            (&request.change, &mut changed.after)
        {
            self.settle_image(repository, base, environment, service, values)?;
        }
        let tag = changed.image.as_ref().map(|i| i.tag.as_str());
        let title = message::title(environment, &request.change, tag);
        let base_commit = repository.find_commit(base)?;
        let path = values_path(environment);
        let mut update = TreeUpdateBuilder::new();
        self.furnish(repository, &base_commit, &mut update)?;
        match (&changed.after, &current) {
            (After::AsBefore, _) => return Ok(Prepared::Nothing { title }),
            (After::Values(values), Some((before, _))) if before == values => {
                return Ok(Prepared::Nothing { title });
            }
            (After::Values(values), current) => {
                let text = match current {
                    Some((_, previous)) => values.to_yaml_over(previous),
                    None => values.to_yaml(),
                };
                let at = commit_id(base)?;
                let text = text.map_err(|e| GitopsError::InvalidValues {
                    path: path.clone(),
                    commit: at,
                    reason: e.to_string(),
                })?;
                update.upsert(path, repository.blob(text.as_bytes())?, FileMode::Blob);
            }
            (After::Deleted, _) => {
                let folder = format!("environments/{environment}");
                if base_commit.tree()?.get_path(Path::new(&folder)).is_err() {
                    return Ok(Prepared::Nothing { title });
                }
                update.remove(folder);
            }
        }
        self.witness(repository, &base_commit, &request.witness, &mut update)?;
        let tree = update.create_updated(repository, &base_commit.tree()?)?;
        let body = request.body.clone().or(message::body(&request.change, tag));
        let text = message::compose(
            &title,
            body.as_deref(),
            request.event,
            request.change.deployment(),
            request.witness.ledger.as_ref().map(|l| &l.anchor),
        );
        let author = signature(&request.author, request.at)?;
        let committer = committer(Timestamp::now())?;
        let next = self.write_commit(
            repository,
            &author,
            &committer,
            &text,
            tree,
            Some(&base_commit),
        )?;
        Ok(Prepared::Commit(next))
    }

    /// What a service was deployed with last, after a release was removed: if none that is left has
    /// that image, the newest one before that one of them has. A deployment that failed so leaves
    /// nothing behind that could be promoted.
    fn settle_image(
        &self,
        repository: &Repository,
        base: Oid,
        environment: &EnvironmentName,
        service: &ServiceName,
        values: &mut EnvironmentValues,
    ) -> Result<(), GitopsError> {
        let Some(left) = values.services.get_mut(service) else {
            return Ok(());
        };
        let runs = |image: &PinnedImage| left.releases.values().any(|r| r.image == *image);
        if left.image.as_ref().is_none_or(runs) {
            return Ok(());
        }
        let mut found = None;
        let mut at = (!left.releases.is_empty()).then_some(base);
        let mut seen = None;
        for _ in 0..IMAGE_MEMORY {
            let Some(commit) = at else { break };
            let commit = repository.find_commit(commit)?;
            at = commit.parent_ids().next();
            let blob = commit
                .tree()?
                .get_path(Path::new(&values_path(environment)))
                .map(|entry| entry.id())
                .ok();
            if blob == seen {
                continue;
            }
            seen = blob;
            // Somebody may have broken it then.
            if let Ok(Some((then, _))) = self.values(repository, commit.id(), environment)
                && let Some(image) = then.services.get(service).and_then(|s| s.image.clone())
                && runs(&image)
            {
                found = Some(image);
                break;
            }
        }
        left.image = found.or_else(|| left.releases.values().next().map(|r| r.image.clone()));
        Ok(())
    }

    /// An environment's values at a commit, with their text; none if it is not there.
    fn values(
        &self,
        repository: &Repository,
        commit: Oid,
        environment: &EnvironmentName,
    ) -> Result<Option<(EnvironmentValues, String)>, GitopsError> {
        let path = values_path(environment);
        let tree = repository.find_commit(commit)?.tree()?;
        let entry = match tree.get_path(Path::new(&path)) {
            Ok(entry) => entry,
            Err(e) if e.code() == ErrorCode::NotFound => return Ok(None),
            Err(e) => return Err(e.into()),
        };
        let at = commit_id(commit)?;
        let invalid = |reason: String| GitopsError::InvalidValues {
            path: path.clone(),
            commit: at.clone(),
            reason,
        };
        let blob = repository
            .find_blob(entry.id())
            .map_err(|_| invalid("it is no file".into()))?;
        let text = std::str::from_utf8(blob.content())
            .map_err(|_| invalid("it is not UTF-8".into()))?
            .to_owned();
        let values = EnvironmentValues::from_yaml(&text).map_err(|e| invalid(e.to_string()))?;
        if values.project != self.project || values.environment != *environment {
            return Err(invalid(format!(
                "it says that it is {}/{}",
                values.project, values.environment
            )));
        }
        Ok(Some((values, text)))
    }

    /// Writes a commit object, signed if there is a key.
    fn write_commit(
        &self,
        repository: &Repository,
        author: &Signature<'_>,
        committer: &Signature<'_>,
        message: &str,
        tree: Oid,
        parent: Option<&git2::Commit<'_>>,
    ) -> Result<Oid, GitopsError> {
        let parents: Vec<_> = parent.into_iter().collect();
        let tree = repository.find_tree(tree)?;
        let text = repository.commit_create_buffer(author, committer, message, &tree, &parents)?;
        let Some(key) = &self.key else {
            return Ok(repository.odb()?.write(ObjectType::Commit, &text)?);
        };
        let text = std::str::from_utf8(&text)
            .map_err(|_| git2::Error::from_str("the text of a commit is not UTF-8"))?;
        let signature = key.load()?.sign(text).map_err(GitopsError::Signing)?;
        Ok(repository.commit_signed(text, &signature, None)?)
    }

    /// What is reported of a commit, read from the repository: the same for the one who made it
    /// and for the one who finds it.
    fn committed(
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

    fn index(&self) -> std::sync::MutexGuard<'_, EventIndex> {
        self.index.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What a request is known by.
struct Tried<'a> {
    event: EventId,
    author: String,
    witness: &'a Witness,
}

enum Prepared {
    Commit(Oid),
    Nothing { title: String },
}

fn committer(at: Timestamp) -> Result<Signature<'static>, GitopsError> {
    let time = git2::Time::new(at.as_second(), 0);
    Ok(Signature::new(COMMITTER, COMMITTER_ADDRESS, &time)?)
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

fn signature(author: &Author, at: Timestamp) -> Result<Signature<'static>, GitopsError> {
    let time = git2::Time::new(at.as_second(), 0);
    Ok(Signature::new(author.name(), author.email(), &time)?)
}

/// Whether a commit is in the history of another one.
fn contains(repository: &Repository, head: Oid, commit: &CommitId) -> Result<bool, GitopsError> {
    let commit = Oid::from_str(commit.as_str())?;
    Ok(history::is_ancestor(repository, commit, head)?)
}

fn conflicts(index: &git2::Index) -> Result<Vec<String>, GitopsError> {
    let mut paths = Vec::new();
    for conflict in index.conflicts()? {
        let conflict = conflict?;
        let entry = conflict.our.or(conflict.their).or(conflict.ancestor);
        if let Some(entry) = entry {
            paths.push(printable(&String::from_utf8_lossy(&entry.path)));
        }
    }
    paths.dedup();
    Ok(paths)
}

fn cannot(why: CannotChange, request: &CommitRequest) -> GitopsError {
    let environment = request.environment.clone();
    match (why, &request.change) {
        (
            CannotChange::ReleaseMissing,
            Change::Scale {
                service,
                deployment,
                ..
            }
            | Change::Configure {
                service,
                deployment,
                ..
            },
        ) => GitopsError::ReleaseMissing {
            environment,
            service: service.clone(),
            deployment: *deployment,
        },
        (CannotChange::NothingToPromote, Change::Promote { from, service, .. }) => {
            GitopsError::NothingToPromote {
                from: from.clone(),
                service: service.clone(),
            }
        }
        (
            CannotChange::EnvironmentMissing,
            Change::CreateEnvironment {
                from: Some(from), ..
            },
        ) => GitopsError::EnvironmentMissing {
            environment: from.clone(),
        },
        _ => GitopsError::EnvironmentMissing { environment },
    }
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

fn values_path(environment: &EnvironmentName) -> String {
    format!("environments/{environment}/values.yaml")
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

/// A path beside another one: `shop.git` and `shop.git.lock`.
fn beside(path: &Path, suffix: &str) -> PathBuf {
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(suffix);
    path.with_file_name(name)
}

/// Waits before another try, longer each time and never as long as somebody else.
fn pause(attempt: u32, session: &Session) -> Result<(), TransportError> {
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
