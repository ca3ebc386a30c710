//! Mirrors of source repositories, kept between deployments.
//!
//! Each URL has a folder of its own with a bare repository, so that a second deployment fetches
//! only what is new. The folder is locked across processes: exclusively while something is
//! fetched, shared while something is read. A mirror is disposable. When it does not do what a
//! repository does, whatever the reason, it is thrown away and made anew, once; when a process
//! was killed while it wrote, what that left lying around is cleared first.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use daybook_events::{CommitId, GitRef, RepositoryUrl};
use git2::{AutotagOption, ErrorClass, FetchOptions, FetchPrune, Oid, RemoteCallbacks, Repository};
use sha2::Digest as _;
use tokio_util::sync::CancellationToken;

use super::checkout::{self, Checkout, CheckoutLimits};
use super::resolve::{self, Advertised};
use super::{ResolvedSource, SourceError, UploadedSources};
use crate::file_lock::FileLock;
use crate::git_transport::{
    GitTransport, Progress, Session, TransportError, in_background, prepare_process, printable,
};

/// Source repositories, with their mirrors in one folder. Clones share everything; several
/// processes may use the same folder.
#[derive(Debug, Clone)]
pub struct SourceRepositories {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    folder: PathBuf,
    transport: GitTransport,
    limits: CheckoutLimits,
    uploads: UploadedSources,
}

impl SourceRepositories {
    /// Repositories that are mirrored in `folder`, which is created when it is first needed.
    pub fn new(folder: impl Into<PathBuf>, transport: GitTransport) -> Self {
        Self::with_limits(folder, transport, CheckoutLimits::default())
    }

    /// The same with other limits on what is checked out.
    pub fn with_limits(
        folder: impl Into<PathBuf>,
        transport: GitTransport,
        limits: CheckoutLimits,
    ) -> Self {
        Self {
            inner: Arc::new(Inner {
                folder: folder.into(),
                transport,
                limits,
                uploads: UploadedSources::default(),
            }),
        }
    }

    /// The same with what was uploaded to Daybook itself.
    pub fn with_uploads(self, uploads: UploadedSources) -> Self {
        Self {
            inner: Arc::new(Inner {
                folder: self.inner.folder.clone(),
                transport: self.inner.transport.clone(),
                limits: self.inner.limits,
                uploads,
            }),
        }
    }

    /// Finds out what a ref stands for now, and fetches that commit.
    ///
    /// A name is looked for as git does when it clones: `HEAD`, a full ref (`refs/pull/7/head`),
    /// a branch, a tag (an annotated one stands for its commit), then as the beginning of a
    /// commit id, of at least four digits. The repository is asked each time; a full commit id
    /// that is already here is not.
    pub async fn resolve(
        &self,
        url: &RepositoryUrl,
        git_ref: &GitRef,
        progress: &Progress,
        cancel: &CancellationToken,
    ) -> Result<ResolvedSource, SourceError> {
        let (url, git_ref) = (url.clone(), git_ref.clone());
        let wanted = full_commit_id(&git_ref);
        self.with_mirror(url.clone(), wanted, progress, cancel, move |mirror| {
            let (id, branch) = match full_commit_id(&git_ref) {
                Some(id) if mirror.has_commit(id) => (id, None),
                _ => find_ref(mirror, &git_ref)?,
            };
            let repository = mirror.repository()?;
            resolve::describe(&repository, &url, &git_ref, branch, id)
        })
        .await
    }

    /// Writes the files of a commit into a folder that is empty or does not exist.
    ///
    /// Either all of it is there in the end, or nothing. See [`Checkout`] for what is left out.
    pub async fn checkout(
        &self,
        url: &RepositoryUrl,
        commit: &CommitId,
        into: &Path,
        progress: &Progress,
        cancel: &CancellationToken,
    ) -> Result<Checkout, SourceError> {
        let (commit, into) = (commit.clone(), into.to_owned());
        let (limits, lines) = (self.inner.limits, progress.clone());
        let wanted = Oid::from_str(commit.as_str()).ok();
        self.with_mirror(url.clone(), wanted, progress, cancel, move |mirror| {
            let id = Oid::from_str(commit.as_str()).map_err(|_| SourceError::CommitGone {
                commit: commit.clone(),
            })?;
            if !mirror.has_commit(id) && !mirror.fetch_commit(id)? {
                return Err(SourceError::CommitGone {
                    commit: commit.clone(),
                }
                .into());
            }
            let repository = mirror.repository()?;
            checkout::check_out(&repository, id, &into, limits, &lines, &mirror.session)
        })
        .await
    }

    /// Runs work on the mirror of a URL; when the mirror turns out to be broken, once more on a
    /// new one.
    async fn with_mirror<T: Send + 'static>(
        &self,
        url: RepositoryUrl,
        wanted: Option<Oid>,
        progress: &Progress,
        cancel: &CancellationToken,
        work: impl Fn(&mut Mirror) -> Result<T, Trouble> + Send + 'static,
    ) -> Result<T, SourceError> {
        let (inner, progress) = (self.inner.clone(), progress.clone());
        // Made here, where the runtime is: the work runs on a thread of its own.
        in_background(cancel, move |cancel| {
            prepare_process()?;
            let folder = inner.folder.join(key_of(&url));
            let (from, transport) = match inner.uploads.locate(&url, wanted)? {
                Some(uploaded) => uploaded,
                None => (url.clone(), inner.transport.clone()),
            };
            let session = Session::new(&transport, &cancel);
            transport.config().policy.check_scheme(from.as_str())?;
            let mut mirror = Mirror {
                folder,
                name: url,
                url: from,
                session,
                progress,
                lock: None,
            };
            mirror.lock_shared()?;
            match work(&mut mirror) {
                Ok(done) => return Ok(done),
                Err(Trouble::Source(e)) => return Err(e),
                Err(Trouble::Mirror(e)) => {
                    mirror.session.check_cancelled()?;
                    (mirror.progress)(format!(
                        "the local mirror is unusable ({}); making a new one",
                        printable(e.message())
                    ));
                }
            }
            mirror.throw_away()?;
            work(&mut mirror).map_err(|trouble| match trouble {
                Trouble::Source(e) => e,
                Trouble::Mirror(e) => unusable(&mirror, &e),
            })
        })
        .await
    }
}

/// What went wrong: something that a caller can be told, or the mirror.
pub(super) enum Trouble {
    /// For the caller.
    Source(SourceError),
    /// The mirror does not work; a new one may.
    Mirror(git2::Error),
}

impl From<SourceError> for Trouble {
    fn from(e: SourceError) -> Self {
        Self::Source(e)
    }
}
impl From<TransportError> for Trouble {
    fn from(e: TransportError) -> Self {
        Self::Source(e.into())
    }
}
impl From<git2::Error> for Trouble {
    fn from(e: git2::Error) -> Self {
        Self::Mirror(e)
    }
}

/// The mirror of one URL, locked.
pub(super) struct Mirror {
    folder: PathBuf,
    /// What stands for the repository in the ledger.
    name: RepositoryUrl,
    /// Where it is read.
    url: RepositoryUrl,
    pub(super) session: Session,
    progress: Progress,
    lock: Option<Lock>,
}

struct Lock {
    _file: FileLock,
    exclusive: bool,
}

impl Mirror {
    fn repository_folder(&self) -> PathBuf {
        self.folder.join("repository.git")
    }

    /// Marks that somebody is writing; found by whoever comes after them when they were killed.
    fn busy_mark(&self) -> PathBuf {
        self.folder.join("busy")
    }

    pub(super) fn repository(&self) -> Result<Repository, git2::Error> {
        Repository::open_bare(self.repository_folder())
    }

    fn has_commit(&self, id: Oid) -> bool {
        self.repository()
            .is_ok_and(|r| r.find_commit(id).is_ok_and(|c| c.tree().is_ok()))
    }

    /// What the repository itself has now.
    pub(super) fn advertised(&self) -> Result<Advertised, SourceError> {
        let list = self.session.run(&self.url, || {
            let mut remote = git2::Remote::create_detached(self.url.as_str())?;
            let connection = remote.connect_auth(git2::Direction::Fetch, None, None)?;
            Ok(Advertised::from_heads(connection.list()?))
        })?;
        Ok(list)
    }

    /// Fetches what these refspecs say.
    pub(super) fn fetch(&mut self, refspecs: &[String], prune: bool) -> Result<(), Trouble> {
        self.lock_exclusive()?;
        fs::write(self.busy_mark(), "").map_err(SourceError::disk(self.busy_mark()))?;
        let repository = self.open_or_create()?;
        let session = self.session.clone();
        let progress = self.progress.clone();
        let mut shown = Shown::default();
        let mut callbacks = RemoteCallbacks::new();
        callbacks.transfer_progress(|p| {
            let received = session.check_received(p.received_bytes() as u64);
            if session.is_cancelled() {
                return false;
            }
            if let Err(e) = received {
                session.fail(e);
                return false;
            }
            if session.is_overdue() {
                session.fail(TransportError::Unavailable {
                    host: self.url.to_string(),
                    reason: "the fetch takes too long".into(),
                });
                return false;
            }
            shown.show(&progress, &p);
            true
        });
        let mut options = FetchOptions::new();
        options
            .remote_callbacks(callbacks)
            .download_tags(AutotagOption::None)
            .update_fetchhead(false)
            .prune(if prune {
                FetchPrune::On
            } else {
                FetchPrune::Off
            });
        // Opening the remote is the mirror's business, what happens on the way is the remote's.
        let mut remote = repository.remote_anonymous(self.url.as_str())?;
        let mut ours = None;
        let fetched = self.session.run(&self.url, || {
            remote
                .fetch(refspecs, Some(&mut options), None)
                .inspect_err(|e| {
                    if !is_from_elsewhere(e.class()) {
                        ours = Some(git2::Error::new(e.code(), e.class(), e.message()));
                    }
                })
        });
        match (fetched, ours) {
            (Ok(()), _) => {}
            (Err(TransportError::Protocol { .. }), Some(ours)) => return Err(ours.into()),
            (Err(e), _) => return Err(e.into()),
        }
        fs::remove_file(self.busy_mark()).map_err(SourceError::disk(self.busy_mark()))?;
        Ok(())
    }

    /// Fetches all branches and tags.
    pub(super) fn fetch_all(&mut self) -> Result<(), Trouble> {
        self.fetch(
            &[
                "+refs/heads/*:refs/heads/*".to_owned(),
                "+refs/tags/*:refs/tags/*".to_owned(),
            ],
            true,
        )
    }

    /// Fetches one ref. It is kept under a name of its own, so that `a` and `a/b`, one after the
    /// other, do not stand in each other's way.
    pub(super) fn fetch_ref(&mut self, name: &str) -> Result<(), Trouble> {
        let kept_as = format!("refs/daybook/{}", hash_of(name));
        self.fetch(&[format!("+{name}:{kept_as}")], false)
    }

    /// Fetches a commit by its id: with all branches and tags or, where it is on none of them and
    /// the server allows it, alone.
    pub(super) fn fetch_commit(&mut self, id: Oid) -> Result<bool, Trouble> {
        let advertised = self.advertised()?;
        if let Some(name) = advertised.ref_at(id) {
            self.fetch_ref(&name)?;
        }
        if !self.has_commit(id) {
            self.fetch_all()?;
        }
        if !self.has_commit(id) {
            match self.fetch(&[format!("+{id}:refs/daybook/{id}")], false) {
                Ok(()) => {}
                Err(Trouble::Source(e)) if e.is_retryable() || e.is_cancelled() => {
                    return Err(e.into());
                }
                // Servers refuse it in many words.
                Err(_) => return Ok(false),
            }
        }
        Ok(self.has_commit(id))
    }

    fn open_or_create(&self) -> Result<Repository, Trouble> {
        let folder = self.repository_folder();
        if folder.exists() {
            return Ok(Repository::open_bare(&folder)?);
        }
        let fresh = self.folder.join("new.git");
        remove_folder(&fresh)?;
        Repository::init_bare(&fresh)?;
        fs::rename(&fresh, &folder).map_err(SourceError::disk(&folder))?;
        // For people who look around.
        let note = self.folder.join("url");
        fs::write(&note, self.name.as_str()).map_err(SourceError::disk(note))?;
        Ok(Repository::open_bare(&folder)?)
    }

    fn throw_away(&mut self) -> Result<(), SourceError> {
        self.lock_exclusive()?;
        let (folder, trash) = (self.repository_folder(), self.folder.join("trash"));
        remove_folder(&trash)?;
        match fs::rename(&folder, &trash) {
            Ok(()) => remove_folder(&trash),
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(()),
            Err(e) => Err(SourceError::disk(folder)(e)),
        }
    }

    fn lock_shared(&mut self) -> Result<(), SourceError> {
        self.lock(false)
    }

    /// Locks for writing; until the mirror is dropped. What a killed process left is cleared.
    fn lock_exclusive(&mut self) -> Result<(), SourceError> {
        if self.lock.as_ref().is_some_and(|l| l.exclusive) {
            return Ok(());
        }
        self.lock = None;
        self.lock(true)?;
        if self.busy_mark().exists() {
            clear_leftovers(&self.repository_folder())
                .map_err(SourceError::disk(self.repository_folder()))?;
        }
        Ok(())
    }

    fn lock(&mut self, exclusive: bool) -> Result<(), SourceError> {
        fs::create_dir_all(&self.folder).map_err(SourceError::disk(&self.folder))?;
        let path = self.folder.join("lock");
        let mut told = false;
        let file = FileLock::acquire(
            &path,
            exclusive,
            |e| SourceError::disk(&path)(e),
            || {
                self.session.check_cancelled()?;
                if !told {
                    (self.progress)("waiting for another worker that fetches this".into());
                    told = true;
                }
                Ok(())
            },
        )?;
        self.lock = Some(Lock {
            _file: file,
            exclusive,
        });
        Ok(())
    }
}

/// Whether an error of this class is about what was received. The others are about what is here.
fn is_from_elsewhere(class: ErrorClass) -> bool {
    matches!(
        class,
        ErrorClass::Net
            | ErrorClass::Http
            | ErrorClass::Ssl
            | ErrorClass::Ssh
            | ErrorClass::Indexer
            | ErrorClass::Zlib
            | ErrorClass::Callback
    )
}

/// Why a mirror does not work even when it is new.
fn unusable(mirror: &Mirror, error: &git2::Error) -> SourceError {
    if error.class() == ErrorClass::Os {
        let why = std::io::Error::other(printable(error.message()));
        return SourceError::disk(mirror.repository_folder())(why);
    }
    TransportError::from_git(error).into()
}

/// Resolves anything but a full commit id that is already here.
/// What a ref stands for, and the branch that it is, if it is one.
fn find_ref(mirror: &mut Mirror, git_ref: &GitRef) -> Result<(Oid, Option<GitRef>), Trouble> {
    let advertised = mirror.advertised()?;
    if let Some((name, id)) = advertised.find(git_ref.as_str())? {
        if !mirror
            .repository()
            .is_ok_and(|r| r.find_object(id, None).is_ok_and(is_complete))
        {
            mirror.fetch_ref(&name)?;
        }
        return Ok((id, advertised.branch(&name)));
    }
    let not_found = || SourceError::RefNotFound {
        git_ref: git_ref.to_string(),
        near: advertised.near(git_ref.as_str()),
    };
    let Some(prefix) = commit_prefix(git_ref) else {
        return Err(not_found().into());
    };
    if let Some(id) = full_commit_id(git_ref) {
        return match mirror.fetch_commit(id)? {
            true => Ok((id, None)),
            false => Err(not_found().into()),
        };
    }
    mirror.fetch_all()?;
    let repository = mirror.repository()?;
    match repository.find_commit_by_prefix(&prefix) {
        Ok(commit) => Ok((commit.id(), None)),
        Err(e) if e.code() == git2::ErrorCode::Ambiguous => Err(SourceError::AmbiguousCommit {
            git_ref: git_ref.to_string(),
        }
        .into()),
        Err(e) if e.code() == git2::ErrorCode::NotFound => Err(not_found().into()),
        Err(e) => Err(e.into()),
    }
}

/// Whether what an object stands for is here, with its tree.
fn is_complete(object: git2::Object<'_>) -> bool {
    resolve::without_tags(object).is_ok_and(|o| o.as_commit().is_none_or(|c| c.tree().is_ok()))
}

fn commit_prefix(git_ref: &GitRef) -> Option<String> {
    let s = git_ref.as_str();
    ((4..=40).contains(&s.len()) && s.bytes().all(|b| b.is_ascii_hexdigit()))
        .then(|| s.to_ascii_lowercase())
}

fn full_commit_id(git_ref: &GitRef) -> Option<Oid> {
    commit_prefix(git_ref)
        .filter(|p| p.len() == 40)
        .and_then(|p| Oid::from_str(&p).ok())
}

/// What a process that was killed in the middle of a fetch may have left: lock files, which would
/// block every fetch from then on, and parts of packs.
fn clear_leftovers(repository: &Path) -> std::io::Result<()> {
    let mut folders = vec![repository.to_owned()];
    while let Some(folder) = folders.pop() {
        let entries = match fs::read_dir(&folder) {
            Ok(entries) => entries,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => continue,
            Err(e) => return Err(e),
        };
        for entry in entries {
            let entry = entry?;
            let name = entry.file_name();
            let name = name.to_string_lossy();
            if entry.file_type()?.is_dir() {
                if folder.ends_with("objects") && name != "pack" {
                    continue;
                }
                folders.push(entry.path());
            } else if name.ends_with(".lock")
                || folder.ends_with("pack") && !name.starts_with("pack-")
                || folder.ends_with("pack") && name.contains("_git2_")
            {
                fs::remove_file(entry.path())?;
            }
        }
    }
    Ok(())
}

/// Removes a folder, or whatever is in its place.
fn remove_folder(path: &Path) -> Result<(), SourceError> {
    let removed = match fs::remove_dir_all(path) {
        Err(e) if e.kind() == std::io::ErrorKind::NotADirectory => fs::remove_file(path),
        other => other,
    };
    match removed {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => Err(SourceError::disk(path)(e)),
        _ => Ok(()),
    }
}

fn key_of(url: &RepositoryUrl) -> String {
    hash_of(url.as_str())
}

fn hash_of(text: &str) -> String {
    hex::encode(&sha2::Sha256::digest(text)[..16])
}

/// What was last shown of a transfer, so that a line comes at each hundredth and not at each
/// object.
#[derive(Default)]
struct Shown {
    last: Option<(&'static str, usize)>,
}

impl Shown {
    fn show(&mut self, progress: &Progress, p: &git2::Progress<'_>) {
        let (what, done, of) = if p.received_objects() < p.total_objects() || p.total_deltas() == 0
        {
            ("receiving objects", p.received_objects(), p.total_objects())
        } else {
            ("resolving deltas", p.indexed_deltas(), p.total_deltas())
        };
        if of == 0 {
            return;
        }
        let step = (what, done * 100 / of);
        if self.last != Some(step) {
            self.last = Some(step);
            progress(format!("{what} {done}/{of}"));
        }
    }
}
