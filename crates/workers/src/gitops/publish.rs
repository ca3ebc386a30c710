//! Moving the branch: here by compare-and-swap, and on a remote by pushing.
//!
//! With a remote, the remote's branch is the one that counts. A commit is pushed first, under the
//! condition that the remote's branch is where the commit was made; only then the local branch
//! follows. A process that dies in between leaves a local branch that is behind: the next push is
//! refused for it, what is new is fetched, and the commit is found there.

use std::io::Write as _;
use std::path::Path;
use std::time::{Duration, Instant};

use daybook_events::RepositoryUrl;
use daybook_failpoints::reached;
use git2::{
    AutotagOption, Direction, ErrorCode, FetchOptions, Oid, PushOptions, RemoteCallbacks,
    Repository,
};

use super::GitopsError;
use super::history::{commit_id, is_ancestor};
use super::repository::BRANCH_REF;
use crate::git_transport::{GitTransport, Session, TransportError, local_path, printable};

/// How long a lock of somebody else on the branch is waited for. A live process holds one for
/// milliseconds; one that stays the same for this long is left over from a process that died.
const LOCK_PATIENCE: Duration = Duration::from_secs(3);

/// How much is kept of what a remote says while it is pushed to, in bytes.
const MAX_TOLD: usize = 1024;

/// Where commits are pushed to.
#[derive(Debug, Clone)]
pub struct Remote {
    /// The repository. Its branch is called as the local one. A local one must be bare.
    pub url: RepositoryUrl,
    /// How it is reached.
    pub transport: GitTransport,
}

/// What became of an attempt to move a branch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Moved {
    /// The branch is at the new commit.
    Yes,
    /// Somebody else moved it first.
    Elsewhere,
}

/// Moves the branch of a repository on this machine from one commit to the next, if it is there;
/// from nothing, if it does not exist.
pub(super) fn swap(
    repository: &Repository,
    from: Option<Oid>,
    to: Oid,
) -> Result<Moved, GitopsError> {
    let mut lock = WatchedLock::default();
    loop {
        let swapped = match from {
            Some(from) => repository.reference_matching(BRANCH_REF, to, true, from, "daybook"),
            None => repository.reference(BRANCH_REF, to, false, "daybook"),
        };
        match swapped {
            Ok(_) => return Ok(Moved::Yes),
            Err(e) => match e.code() {
                ErrorCode::Modified | ErrorCode::Exists | ErrorCode::NotFound => {
                    return Ok(Moved::Elsewhere);
                }
                ErrorCode::Locked => lock.wait(repository).map_err(|_| e)?,
                _ => return Err(e.into()),
            },
        }
    }
}

/// A lock file on the branch that somebody may have left behind.
#[derive(Default)]
struct WatchedLock {
    seen: Option<(u64, Instant)>,
}

impl WatchedLock {
    /// Waits a little; removes the lock when it has been the same one for too long. How long is
    /// watched here, and not read from its time.
    fn wait(&mut self, repository: &Repository) -> std::io::Result<()> {
        use std::os::unix::fs::MetadataExt as _;
        let path = repository.path().join(format!("{BRANCH_REF}.lock"));
        std::thread::sleep(Duration::from_millis(20));
        let inode = match std::fs::symlink_metadata(&path) {
            Ok(found) => found.ino(),
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => {
                self.seen = None;
                return Ok(());
            }
            Err(e) => return Err(e),
        };
        match self.seen {
            Some((same, since)) if same == inode => {
                if since.elapsed() > LOCK_PATIENCE {
                    tracing::warn!(path = %path.display(), "removing a lock that a dead process left");
                    self.seen = None;
                    std::fs::remove_file(&path)?;
                }
            }
            _ => self.seen = Some((inode, Instant::now())),
        }
        Ok(())
    }
}

impl Remote {
    /// Pushes a commit that was made on `from`, and moves the local branch after it.
    pub(super) fn publish(
        &self,
        repository: &Repository,
        session: &Session,
        from: Oid,
        to: Oid,
    ) -> Result<Moved, GitopsError> {
        let moved = self.push(repository, session, Some(from), to)?;
        if moved == Moved::Yes {
            // If somebody moved the local branch by hand, the next request finds the two at odds.
            swap(repository, Some(from), to)?;
        }
        Ok(moved)
    }

    /// Moves the remote's branch from `from` to a commit of ours. A branch that does not exist is
    /// made, from whatever it is thought to be at.
    pub(super) fn push(
        &self,
        repository: &Repository,
        session: &Session,
        from: Option<Oid>,
        to: Oid,
    ) -> Result<Moved, GitopsError> {
        reached("gitops.push.before");
        let moved = match local_path(&self.url) {
            Some(path) => self.push_locally(&path, repository, session, from, to),
            None => self.push_over_network(repository, session, from, to),
        };
        reached("gitops.push.after");
        moved
    }

    fn push_over_network(
        &self,
        repository: &Repository,
        session: &Session,
        from: Option<Oid>,
        to: Oid,
    ) -> Result<Moved, GitopsError> {
        let mut elsewhere = false;
        let mut refused: Option<String> = None;
        let mut told = Vec::new();
        let mut callbacks = RemoteCallbacks::new();
        // What a hook, or the rule of a forge, says to people.
        callbacks.sideband_progress(|text| {
            let room = MAX_TOLD.saturating_sub(told.len());
            told.extend_from_slice(&text[..text.len().min(room)]);
            true
        });
        callbacks.push_negotiation(|updates| {
            let at = updates
                .first()
                .map_or(Oid::ZERO_SHA1, git2::PushUpdate::src);
            if at.is_zero() || Some(at) == from {
                return Ok(());
            }
            elsewhere = true;
            Err(git2::Error::from_str("the branch is elsewhere"))
        });
        callbacks.push_update_reference(|_, status| {
            refused = status.map(printable);
            Ok(())
        });
        let mut options = PushOptions::new();
        options.remote_callbacks(callbacks);
        let refspec = format!("{to}:{BRANCH_REF}");
        let mut remote = repository.remote_anonymous(self.url.as_str())?;
        let pushed = session.run(&self.url, || {
            match remote.push(&[refspec.as_str()], Some(&mut options)) {
                // The remote's branch is at a commit that is not here.
                Err(e) if e.code() == ErrorCode::NotFastForward => Ok(Moved::Elsewhere),
                other => other.map(|()| Moved::Yes),
            }
        });
        drop(options);
        match (pushed, refused) {
            (_, _) if elsewhere => Ok(Moved::Elsewhere),
            (Err(e), _) => Err(e.into()),
            (Ok(moved), None) => Ok(moved),
            (Ok(_), Some(reason)) if means_elsewhere(&reason) => Ok(Moved::Elsewhere),
            (Ok(_), Some(reason)) => Err(GitopsError::PushRefused {
                reason: match printable(&String::from_utf8_lossy(&told)) {
                    told if told.is_empty() => reason,
                    told => format!("{reason} ({told})"),
                },
            }),
        }
    }

    /// libgit2 moves the branch of a local remote without looking where it is. So the objects are
    /// handed over, and the branch is moved as the local one is.
    fn push_locally(
        &self,
        path: &Path,
        repository: &Repository,
        session: &Session,
        from: Option<Oid>,
        to: Oid,
    ) -> Result<Moved, GitopsError> {
        let there = session.run(&self.url, || Repository::open_bare(path))?;
        let at = match there.refname_to_id(BRANCH_REF) {
            Ok(at) if at == to => return Ok(Moved::Yes),
            Ok(at) if Some(at) != from => return Ok(Moved::Elsewhere),
            Ok(at) => Some(at),
            Err(e) if e.code() == ErrorCode::NotFound => None,
            Err(e) => return Err(e.into()),
        };
        let mut walk = repository.revwalk()?;
        walk.push(to)?;
        if let Some(at) = at {
            walk.hide(at)?;
        }
        let mut pack = repository.packbuilder()?;
        pack.insert_walk(&mut walk)?;
        let mut bytes = git2::Buf::new();
        pack.write_buf(&mut bytes)?;
        let objects = there.odb()?;
        let mut writer = objects.packwriter()?;
        writer.write_all(&bytes).map_err(GitopsError::disk(path))?;
        writer.commit()?;
        session.check_cancelled()?;
        swap(&there, at, to)
    }

    /// Fetches the remote's branch and moves the local one to it. Returns where it is then; none
    /// if the remote has no such branch.
    pub(super) fn follow(
        &self,
        repository: &Repository,
        session: &Session,
    ) -> Result<Option<Oid>, GitopsError> {
        let Some(there) = self.fetch(repository, session)? else {
            return Ok(None);
        };
        let here = match repository.refname_to_id(BRANCH_REF) {
            Ok(here) => here,
            Err(e) if e.code() == ErrorCode::NotFound => {
                swap(repository, None, there)?;
                return Ok(Some(there));
            }
            Err(e) => return Err(e.into()),
        };
        if here == there {
            return Ok(Some(here));
        }
        if is_ancestor(repository, here, there)? {
            swap(repository, Some(here), there)?;
            return Ok(Some(there));
        }
        // The local branch is ahead: it had commits before it had a remote, or the remote lost
        // some. Both are mended by pushing what is here.
        if is_ancestor(repository, there, here)? {
            return match self.push(repository, session, Some(there), here)? {
                Moved::Yes => Ok(Some(here)),
                Moved::Elsewhere => Err(GitopsError::Contended { attempts: 1 }),
            };
        }
        Err(GitopsError::Diverged {
            local: commit_id(here)?,
            remote: commit_id(there)?,
        })
    }

    /// Fetches the remote's branch, and returns where it is.
    fn fetch(
        &self,
        repository: &Repository,
        session: &Session,
    ) -> Result<Option<Oid>, GitopsError> {
        let mut callbacks = RemoteCallbacks::new();
        callbacks.transfer_progress(|p| {
            if let Err(e) = session.check_received(p.received_bytes() as u64) {
                session.fail(e);
                return false;
            }
            !session.is_cancelled() && !session.is_overdue()
        });
        let mut options = FetchOptions::new();
        options
            .remote_callbacks(callbacks)
            .download_tags(AutotagOption::None)
            .update_fetchhead(false);
        let mut remote = repository.remote_anonymous(self.url.as_str())?;
        let there = session.run(&self.url, || {
            let mut connection = remote.connect_auth(Direction::Fetch, None, None)?;
            let at = connection
                .list()?
                .iter()
                .find(|h| h.name() == BRANCH_REF)
                .map(git2::RemoteHead::oid);
            if at.is_some() {
                connection
                    .remote()
                    .download(&[BRANCH_REF], Some(&mut options))?;
            }
            Ok(at)
        })?;
        match there {
            Some(at) if repository.find_commit(at).is_err() => Err(TransportError::Protocol {
                reason: format!("the remote did not send commit {at} of its branch"),
            }
            .into()),
            there => Ok(there),
        }
    }
}

/// Whether a server's refusal means that its branch is not where we thought.
fn means_elsewhere(reason: &str) -> bool {
    let reason = reason.to_lowercase();
    [
        "non-fast-forward",
        "fetch first",
        "stale info",
        "failed to update ref",
        "cannot lock ref",
        "incorrect old value",
        "reference already exists",
    ]
    .iter()
    .any(|known| reason.contains(known))
}
