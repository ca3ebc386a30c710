//! Looking over a branch for commits that the ledger does not record.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};

use daybook_events::gitops::{DiffSummary, ForeignCommitFound, ForeignSignature};
use daybook_events::{CommitId, Digest, EnvironmentName};
use git2::{DiffDelta, Oid, Repository, Sort};
use jiff::Timestamp;

use super::GitopsError;
use super::history::{self, commit_id, is_ancestor};
use super::message;
use super::repository::digest_of;
use super::signing::{self, Verdict};
use super::undone;
use crate::git_transport::printable;

/// How many paths are listed of one commit, and how many bytes they may have together.
const MAX_PATHS: usize = 200;
const MAX_PATH_BYTES: usize = 16 * 1024;
/// How many environments and parents are listed of one commit.
const MAX_LISTED: usize = 64;
/// How long a line of somebody else's may get, in bytes.
const MAX_LINE: usize = 500;

/// What is looked for.
#[derive(Debug, Clone, Default)]
pub struct Request {
    /// Everything up to this commit is known.
    pub since: Option<CommitId>,
    /// Commits beyond it that the ledger records.
    pub known: HashSet<CommitId>,
    /// The newest commit that the ledger records.
    pub expected: Option<CommitId>,
    /// Public keys of Daybook.
    pub signers: Vec<String>,
    /// How many unknown commits are described at once.
    pub limit: usize,
}

/// What was found.
#[derive(Debug, Clone)]
pub struct Survey {
    /// Where the branch is.
    pub head: CommitId,
    /// Set if the branch does not contain what was expected of it. Nothing else was looked at then.
    pub rewritten: Option<Rewritten>,
    /// Commits beyond `since` that the ledger records.
    pub recorded: Vec<CommitId>,
    /// Commits that it does not record, in the order of history.
    pub unknown: Vec<ForeignCommitFound>,
    /// There are more of them.
    pub more: bool,
}

/// A branch that lost commits.
#[derive(Debug, Clone)]
pub struct Rewritten {
    /// How many commits the history of its head has, the head included.
    pub ordinal: u64,
    /// The newest commit that both it and what was expected have in their history.
    pub common: Option<CommitId>,
}

pub(super) fn take(
    repository: &Repository,
    head: Oid,
    request: &Request,
) -> Result<Survey, GitopsError> {
    let oid = |commit: &CommitId| Oid::from_str(commit.as_str());
    let mut survey = Survey {
        head: commit_id(head)?,
        rewritten: None,
        recorded: Vec::new(),
        unknown: Vec::new(),
        more: false,
    };
    if let Some(expected) = &request.expected {
        let expected = oid(expected)?;
        if !is_ancestor(repository, expected, head)? {
            let common = repository.merge_base(expected, head).ok();
            survey.rewritten = Some(Rewritten {
                ordinal: history::ordinal_of(repository, head)?,
                common: common.map(commit_id).transpose()?,
            });
            return Ok(survey);
        }
    }
    let mut walk = repository.revwalk()?;
    walk.set_sorting(Sort::TOPOLOGICAL | Sort::REVERSE)?;
    walk.push(head)?;
    if let Some(since) = &request.since {
        let since = oid(since)?;
        if repository.find_commit(since).is_ok() {
            walk.hide(since)?;
        }
    }
    let mut ordinals = Ordinals::default();
    for id in walk {
        let id = id?;
        let commit = commit_id(id)?;
        let ordinal = ordinals.of(repository, id)?;
        if request.known.contains(&commit) {
            survey.recorded.push(commit);
        } else if survey.unknown.len() < request.limit {
            let found = describe(repository, id, ordinal, &request.signers)?;
            survey.unknown.push(found);
        } else {
            survey.more = true;
        }
    }
    Ok(survey)
}

/// How long the histories of commits are that are met in the order of history.
#[derive(Default)]
pub(super) struct Ordinals(HashMap<Oid, u64>);

impl Ordinals {
    pub(super) fn of(&mut self, repository: &Repository, id: Oid) -> Result<u64, git2::Error> {
        let commit = repository.find_commit(id)?;
        let before = match commit.parent_count() {
            0 => Some(0),
            1 => self.0.get(&commit.parent_id(0)?).copied(),
            _ => None,
        };
        let ordinal = match before {
            Some(before) => before + 1,
            None => history::ordinal_of(repository, id)?,
        };
        self.0.insert(id, ordinal);
        Ok(ordinal)
    }
}

/// What the ledger records of a commit of somebody else: bounded, whatever it changes.
pub(super) fn describe(
    repository: &Repository,
    id: Oid,
    ordinal: u64,
    signers: &[String],
) -> Result<ForeignCommitFound, GitopsError> {
    let commit = repository.find_commit(id)?;
    let parent = commit.parent_ids().next();
    let difference = history::tree_diff(repository, parent, id)?;
    let changed = files(repository, &difference)?;
    let mut listed = Vec::new();
    let mut bytes = 0;
    for path in changed.keys() {
        bytes += path.len();
        if listed.len() == MAX_PATHS || bytes > MAX_PATH_BYTES {
            break;
        }
        listed.push(path.clone());
    }
    let text = String::from_utf8_lossy(commit.message_bytes());
    let reverts = message::reverts(&text).filter(|undone| {
        Oid::from_str(undone.as_str()).is_ok_and(|undone| repository.find_commit(undone).is_ok())
    });
    let undoes = match &reverts {
        Some(reverted) => undone::deployment(repository, id, reverted, signers)?,
        None => None,
    };
    let signature = match signing::verify(repository, id, signers)? {
        Verdict::Unsigned => ForeignSignature::None,
        Verdict::Good(_) => ForeignSignature::Daybook,
        Verdict::UnknownKey(_) | Verdict::Bad => ForeignSignature::Other,
    };
    Ok(ForeignCommitFound {
        commit: commit_id(id)?,
        author: cut(history::author_of(&commit)),
        message: cut(history::title_of(&commit)),
        files: listed,
        parents: commit
            .parent_ids()
            .take(MAX_LISTED)
            .map(commit_id)
            .collect::<Result<_, _>>()?,
        ordinal: Some(ordinal),
        committer: Some(cut(history::person(&commit.committer()))),
        committed_at: Timestamp::from_second(commit.time().seconds()).ok(),
        signature: Some(signature),
        diff: Some(summary(&difference, &changed)?),
        environments: environments(difference.deltas()),
        reverts,
        undoes,
    })
}

/// How much a commit changes against its first parent.
pub(super) fn summarise(
    repository: &Repository,
    id: Oid,
) -> Result<(DiffSummary, Vec<EnvironmentName>), git2::Error> {
    let parent = repository.find_commit(id)?.parent_ids().next();
    let difference = history::tree_diff(repository, parent, id)?;
    let changed = files(repository, &difference)?;
    let environments = environments(difference.deltas());
    Ok((summary(&difference, &changed)?, environments))
}

fn files(
    repository: &Repository,
    difference: &git2::Diff<'_>,
) -> Result<BTreeMap<String, Option<Digest>>, git2::Error> {
    let changed = history::changed_files(repository, difference)?;
    Ok(changed.into_iter().map(|(p, f)| (p, f.after)).collect())
}

fn summary(
    difference: &git2::Diff<'_>,
    changed: &BTreeMap<String, Option<Digest>>,
) -> Result<DiffSummary, git2::Error> {
    let stats = difference.stats()?;
    Ok(DiffSummary {
        files: changed.len() as u64,
        insertions: stats.insertions() as u64,
        deletions: stats.deletions() as u64,
        files_digest: digest_of(changed),
    })
}

/// The environments whose files differ.
pub(super) fn environments<'a>(
    deltas: impl Iterator<Item = DiffDelta<'a>>,
) -> Vec<EnvironmentName> {
    let names: BTreeSet<EnvironmentName> = deltas
        .filter_map(|delta| {
            let path = delta
                .new_file()
                .path()
                .or_else(|| delta.old_file().path())?;
            let mut parts = path.to_str()?.strip_prefix("environments/")?.splitn(2, '/');
            let name = EnvironmentName::parse(parts.next()?).ok()?;
            parts.next().map(|_| name)
        })
        .collect();
    names.into_iter().take(MAX_LISTED).collect()
}

/// A line of somebody else's, bounded.
pub(super) fn cut(line: String) -> String {
    let line = printable(&line);
    line[..line.floor_char_boundary(MAX_LINE)].to_owned()
}
