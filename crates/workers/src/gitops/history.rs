//! Reading a GitOps repository's history.

use std::collections::{BTreeMap, HashMap, HashSet, VecDeque};
use std::path::Path;

use daybook_events::{CommitId, DeploymentId, Digest, EventId};
use git2::{DiffOptions, Oid, Repository, Sort};
use jiff::Timestamp;

use super::message::{self, COMMITTER};
use super::signing::{self, Verdict};
use crate::git_transport::printable;

/// How many commits a request looks back over for the one that it made earlier.
pub const MEMORY: usize = 5_000;

/// The longest text of a diff, in bytes.
const MAX_PATCH: usize = 1 << 20;

/// A file that differs between two commits.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ChangedFile {
    /// SHA-256 of its content before; none if it was not there.
    pub before: Option<Digest>,
    /// SHA-256 of its content after; none if it is there no more.
    pub after: Option<Digest>,
}

/// What differs between two commits.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Diff {
    /// The files, by path.
    pub files: BTreeMap<String, ChangedFile>,
    /// The difference as text, as `git diff` prints it; cut at one mebibyte.
    pub patch: String,
}

/// A commit, as it is listed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CommitRecord {
    /// The commit.
    pub commit: CommitId,
    /// Its first parent.
    pub parent: Option<CommitId>,
    /// Its author as `Name <address>`.
    pub author: String,
    /// When it was committed.
    pub committed_at: Timestamp,
    /// The first line of its message.
    pub message: String,
    /// The files that it changes, against its first parent.
    pub files: Vec<String>,
    /// The event that caused it, if it says so and `daybook` committed it. Without one it was
    /// made by somebody else.
    pub event: Option<EventId>,
    /// The deployment that it is about.
    pub deployment: Option<DeploymentId>,
}

/// The commits that events caused, up to a head. Kept between requests, so that each looks only at
/// the commits that are new since the last one.
#[derive(Debug, Default)]
pub(super) struct EventIndex {
    head: Option<Oid>,
    /// How many commits the head's history has, itself included.
    ordinal: u64,
    /// Oldest last.
    commits: HashMap<EventId, Vec<Oid>>,
    /// Commits of that history, oldest first, with the events that caused them. The newest are all
    /// there.
    newest: VecDeque<(Oid, Option<EventId>)>,
    ids: HashSet<Oid>,
}

impl EventIndex {
    /// The commit in the history of `head` that an event caused. With `signers`, only one that is
    /// signed with one of these keys counts: anybody who may push can write a trailer.
    pub(super) fn find(
        &mut self,
        repository: &Repository,
        head: Oid,
        event: EventId,
        signers: Option<&[String]>,
    ) -> Result<Option<Oid>, git2::Error> {
        self.bring_to(repository, head)?;
        // Of two the older one is the effect, the newer one a copy.
        for commit in self.commits.get(&event).into_iter().flatten().rev() {
            let counts = match signers {
                None => true,
                Some(keys) => matches!(
                    signing::verify(repository, *commit, keys)?,
                    Verdict::Good(_)
                ),
            };
            if counts {
                return Ok(Some(*commit));
            }
        }
        Ok(None)
    }

    /// How many commits the history of `head` has, itself included.
    pub(super) fn ordinal(
        &mut self,
        repository: &Repository,
        head: Oid,
    ) -> Result<u64, git2::Error> {
        self.bring_to(repository, head)?;
        Ok(self.ordinal)
    }

    /// Whether a commit is among the newest in the history of `head`.
    pub(super) fn has(
        &mut self,
        repository: &Repository,
        head: Oid,
        commit: Oid,
    ) -> Result<bool, git2::Error> {
        self.bring_to(repository, head)?;
        Ok(self.ids.contains(&commit))
    }

    /// Takes in commits that were made on top of `head`, oldest first.
    pub(super) fn extend(&mut self, head: Oid, made: &[(EventId, Oid)]) {
        if self.head != Some(head) {
            return;
        }
        for (event, commit) in made {
            self.commits.entry(*event).or_default().insert(0, *commit);
            self.note(*commit, Some(*event));
            self.ordinal += 1;
            self.head = Some(*commit);
        }
        self.forget();
    }

    fn note(&mut self, commit: Oid, event: Option<EventId>) {
        if self.ids.insert(commit) {
            self.newest.push_back((commit, event));
        }
    }

    /// Forgets what is older than promised.
    fn forget(&mut self) {
        while self.newest.len() > 2 * MEMORY {
            let Some((commit, event)) = self.newest.pop_front() else {
                return;
            };
            self.ids.remove(&commit);
            let Some(event) = event else { continue };
            if let Some(all) = self.commits.get_mut(&event) {
                all.retain(|known| *known != commit);
                if all.is_empty() {
                    self.commits.remove(&event);
                }
            }
        }
    }

    fn bring_to(&mut self, repository: &Repository, head: Oid) -> Result<(), git2::Error> {
        if self.head == Some(head) {
            return Ok(());
        }
        let known = match self.head {
            Some(known) if is_ancestor(repository, known, head)? => Some(known),
            // The first time, or the branch was set to something else.
            _ => {
                *self = Self::default();
                None
            }
        };
        self.head = None;
        let mut walk = repository.revwalk()?;
        walk.set_sorting(Sort::TOPOLOGICAL)?;
        walk.push(head)?;
        if let Some(known) = known {
            walk.hide(known)?;
        }
        let (mut found, mut walked) = (Vec::new(), 0);
        for id in walk {
            let id = id?;
            walked += 1;
            if walked <= MEMORY {
                found.push((id, trailers_of(&repository.find_commit(id)?).event));
            }
        }
        for (id, event) in found.into_iter().rev() {
            if let Some(event) = event {
                let all = self.commits.entry(event).or_default();
                if !all.contains(&id) {
                    all.insert(0, id);
                }
            }
            self.note(id, event);
        }
        self.forget();
        self.ordinal += walked as u64;
        self.head = Some(head);
        Ok(())
    }
}

/// How many commits the history of a commit has, itself included.
pub(super) fn ordinal_of(repository: &Repository, commit: Oid) -> Result<u64, git2::Error> {
    let mut walk = repository.revwalk()?;
    walk.push(commit)?;
    let mut count = 0;
    for id in walk {
        id?;
        count += 1;
    }
    Ok(count)
}

/// Whether `old` is `new` or in its history.
pub(super) fn is_ancestor(
    repository: &Repository,
    old: Oid,
    new: Oid,
) -> Result<bool, git2::Error> {
    if old == new {
        return Ok(true);
    }
    // What was removed from the repository is in nobody's history.
    if repository.find_commit(old).is_err() {
        return Ok(false);
    }
    repository.graph_descendant_of(new, old)
}

/// What a commit of ours says about where it comes from; nothing for a commit of somebody else,
/// such as a cherry-pick, which keeps the message and has another committer.
pub(super) fn trailers_of(commit: &git2::Commit<'_>) -> message::Trailers {
    if commit.committer().name_bytes() != COMMITTER.as_bytes() {
        return message::Trailers::default();
    }
    commit.message().map(message::trailers).unwrap_or_default()
}

/// The commits in the history of `head` and not in that of `since`, oldest first, at most `limit`
/// of them.
pub(super) fn list(
    repository: &Repository,
    head: Oid,
    since: Option<Oid>,
    limit: usize,
) -> Result<Vec<CommitRecord>, git2::Error> {
    let mut walk = repository.revwalk()?;
    walk.set_sorting(Sort::TOPOLOGICAL | Sort::REVERSE)?;
    walk.push(head)?;
    if let Some(since) = since {
        walk.hide(since)?;
    }
    walk.take(limit)
        .map(|id| record(repository, &repository.find_commit(id?)?))
        .collect()
}

fn record(repository: &Repository, commit: &git2::Commit<'_>) -> Result<CommitRecord, git2::Error> {
    let parent = commit.parent_ids().next();
    let trailers = trailers_of(commit);
    Ok(CommitRecord {
        commit: commit_id(commit.id())?,
        parent: parent.map(commit_id).transpose()?,
        author: author_of(commit),
        committed_at: Timestamp::from_second(commit.time().seconds())
            .unwrap_or(Timestamp::UNIX_EPOCH),
        message: title_of(commit),
        files: paths(&tree_diff(repository, parent, commit.id())?),
        event: trailers.event,
        deployment: trailers.deployment,
    })
}

/// The author as `Name <address>`.
pub(super) fn author_of(commit: &git2::Commit<'_>) -> String {
    person(&commit.author())
}

/// A person as `Name <address>`.
pub(super) fn person(author: &git2::Signature<'_>) -> String {
    printable(&format!(
        "{} <{}>",
        String::from_utf8_lossy(author.name_bytes()),
        String::from_utf8_lossy(author.email_bytes())
    ))
}

/// The first line of the message.
pub(super) fn title_of(commit: &git2::Commit<'_>) -> String {
    printable(&String::from_utf8_lossy(
        commit.summary_bytes().unwrap_or_default(),
    ))
}

/// What differs between two commits; from nothing, if there is no first one.
pub(super) fn diff(
    repository: &Repository,
    from: Option<Oid>,
    to: Oid,
) -> Result<Diff, git2::Error> {
    let difference = tree_diff(repository, from, to)?;
    let mut patch = Vec::new();
    difference
        .print(git2::DiffFormat::Patch, |_, _, line| {
            if matches!(line.origin(), '+' | '-' | ' ') {
                patch.push(line.origin() as u8);
            }
            patch.extend_from_slice(line.content());
            patch.len() < MAX_PATCH
        })
        // An early end is an error for libgit2, and none for us.
        .or_else(|e| match e.code() {
            git2::ErrorCode::User => Ok(()),
            _ => Err(e),
        })?;
    Ok(Diff {
        files: changed_files(repository, &difference)?,
        patch: String::from_utf8_lossy(&patch).into_owned(),
    })
}

/// The files that differ between two commits.
pub(super) fn files_between(
    repository: &Repository,
    from: Option<Oid>,
    to: Oid,
) -> Result<BTreeMap<String, ChangedFile>, git2::Error> {
    changed_files(repository, &tree_diff(repository, from, to)?)
}

pub(super) fn tree_diff(
    repository: &Repository,
    from: Option<Oid>,
    to: Oid,
) -> Result<git2::Diff<'_>, git2::Error> {
    let from = match from {
        Some(from) => Some(repository.find_commit(from)?.tree()?),
        None => None,
    };
    let to = repository.find_commit(to)?.tree()?;
    let mut options = DiffOptions::new();
    options.skip_binary_check(true);
    repository.diff_tree_to_tree(from.as_ref(), Some(&to), Some(&mut options))
}

fn paths(difference: &git2::Diff<'_>) -> Vec<String> {
    difference.deltas().map(|d| path_of(&d)).collect()
}

fn path_of(delta: &git2::DiffDelta<'_>) -> String {
    let path = delta.new_file().path().or_else(|| delta.old_file().path());
    printable(&path.unwrap_or(Path::new("")).to_string_lossy())
}

pub(super) fn changed_files(
    repository: &Repository,
    difference: &git2::Diff<'_>,
) -> Result<BTreeMap<String, ChangedFile>, git2::Error> {
    let digest = |file: git2::DiffFile<'_>| -> Result<Option<Digest>, git2::Error> {
        if !file.exists() {
            return Ok(None);
        }
        match repository.find_blob(file.id()) {
            Ok(blob) => Ok(Some(Digest::of(blob.content()))),
            // A submodule, which only somebody else can have put there, has no content here.
            Err(_) if file.mode() == git2::FileMode::Commit => {
                Ok(Some(Digest::of(file.id().as_bytes())))
            }
            Err(e) => Err(e),
        }
    };
    difference
        .deltas()
        .map(|delta| {
            let file = ChangedFile {
                before: digest(delta.old_file())?,
                after: digest(delta.new_file())?,
            };
            Ok((path_of(&delta), file))
        })
        .collect()
}

/// An object id of a commit, as ours.
pub(super) fn commit_id(id: Oid) -> Result<CommitId, git2::Error> {
    CommitId::parse(id.to_string()).map_err(|e| git2::Error::from_str(&e.to_string()))
}
