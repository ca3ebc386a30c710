//! Proving that a repository and a ledger tell the same story.
//!
//! For an auditor: everything is read from the repository itself and from events that were
//! verified before, and nothing else is asked. Each commit of the branch must have exactly one
//! event, and each event its commit; what the event says of the commit must be what the commit
//! says itself.
//!
//! # The recipe, for whoever wants to repeat it with other tools
//! - The files of a commit are those that differ between it and its first parent, or all of them if
//!   it has none, with `.daybook/checkpoint` and `.daybook/allowed_signers` like any other. Renames
//!   are not looked for: the old path is removed and the new one added.
//! - A file's digest is `sha256:` and the SHA-256 of its content in hexadecimal digits; `-` stands
//!   for a file that the commit removes. A symbolic link's content is its target; a submodule's is
//!   the twenty bytes of its commit id.
//! - `files_digest` is the SHA-256 over the lines `<digest or ->  <path>` (two spaces, a line break
//!   after each), sorted by their bytes.
//! - Where an event has `***` in the first line of a message or in an author, a secret was masked:
//!   what stands before it is the beginning of the commit's own text.
//! - The signature is made over the commit object without its header `gpgsig`, in namespace `git`.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use daybook_events::gitops::{ForeignSignature, GitopsEvent, HistoryRewritten, LedgerAnchor};
use daybook_events::{CommitId, DeploymentId, Digest, EventId};
use daybook_secrets::MASK;
use git2::{Oid, Repository, Sort};

use super::history::{self, commit_id};
use super::message::{CHECKPOINT, COMMITTER};
use super::repository::{BRANCH_REF, digest_of};
use super::signing::{self, Verdict};
use super::survey::{Ordinals, cut};

/// Where the two differ, or a commit is not what its event says.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Finding {
    /// The commit.
    pub commit: CommitId,
    /// What is wrong with it.
    pub problem: Problem,
}

/// What is wrong with a commit.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, thiserror::Error)]
pub enum Problem {
    /// The branch has it, and no event does.
    #[error("no event records it")]
    NotRecorded,
    /// An event records it, and the branch does not contain it.
    #[error("an event records it, and the branch does not contain it")]
    NotOnBranch,
    /// More than one event records it.
    #[error("more than one event records it")]
    RecordedTwice,
    /// The event names another parent.
    #[error("its parents are not those that its event names")]
    Parents,
    /// The event gives it another place in history.
    #[error("its history has {found} commits, and its event says {recorded}")]
    Ordinal {
        /// What the event says.
        recorded: u64,
        /// What is so.
        found: u64,
    },
    /// The event names another first line of the message.
    #[error("its message is not the one that its event names")]
    Message,
    /// The event names another author.
    #[error("its author is not the one that its event names")]
    Author,
    /// It was not committed by Daybook.
    #[error("its committer is not {COMMITTER}")]
    Committer,
    /// A trailer is missing or says something else than the event.
    #[error("its trailer {0} does not say what its event says")]
    Trailer(&'static str),
    /// These files are not those that the event lists, or have another content.
    #[error("its files are not those of its event: {}", .0.join(", "))]
    Files(Vec<String>),
    /// The digest over all files is another one.
    #[error("the digest over its files is not the one of its event")]
    FilesDigest,
    /// The checkpoint in the repository does not say what the trailers say.
    #[error("its file {CHECKPOINT} does not say what its trailers say")]
    Checkpoint,
    /// It is not signed, although the event says that it is.
    #[error("it is not signed")]
    Unsigned,
    /// The signature is not good.
    #[error("its signature is not good")]
    BadSignature,
    /// It is signed with a key that the ledger does not list.
    #[error("it is signed with {0}, which is no key of Daybook")]
    UnknownKey(String),
    /// It is signed with another key than the event says.
    #[error("it is signed with another key than its event says")]
    OtherKey,
    /// It is signed with Daybook's key, and Daybook says that it did not make it.
    #[error("it carries Daybook's signature, and its event says that Daybook did not make it")]
    UnexpectedSignature,
    /// The history was rewritten without anybody deciding about it.
    #[error("the history was rewritten, and nobody decided about it")]
    RewriteOpen,
}

/// What was compared.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Report {
    /// Commits on the branch.
    pub commits: u64,
    /// Those of them that Daybook made.
    pub own: u64,
    /// Those that others made, and that the ledger records as such.
    pub foreign: u64,
    /// Those of Daybook's that no signature protects, because they are older than its keys.
    pub unsigned: u64,
    /// Recorded commits that a rewrite took off the branch, which somebody accepted.
    pub abandoned: u64,
    /// Where repository and ledger differ, in the order of commit ids; empty if they agree.
    pub findings: Vec<Finding>,
}

/// Why a repository could not be compared at all.
#[derive(Debug, thiserror::Error)]
pub enum WitnessError {
    /// It cannot be opened or read, or an object of it is missing or damaged.
    #[error("the repository cannot be read")]
    Repository(#[from] git2::Error),
    /// The ledger knows of no repository.
    #[error("the ledger records no repository of this project")]
    NoLedger,
}

/// What an event says of a commit, in one form for all kinds.
#[derive(Debug, Default)]
struct Fact {
    parents: Option<Vec<CommitId>>,
    ordinal: Option<u64>,
    message: Option<String>,
    author: Option<String>,
    event: Option<EventId>,
    deployment: Option<DeploymentId>,
    files: Option<BTreeMap<String, Option<Digest>>>,
    files_digest: Option<Digest>,
    ledger: Option<LedgerAnchor>,
    signer: Option<String>,
    by: By,
}

/// Who made a commit.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
enum By {
    /// The first commit, which no event caused.
    #[default]
    Creation,
    Daybook,
    Other {
        daybooks_signature: bool,
    },
}

/// What the events of one repository say.
#[derive(Debug, Default)]
struct Story {
    facts: BTreeMap<CommitId, Fact>,
    twice: BTreeSet<CommitId>,
    signers: Vec<String>,
    /// Rewrites that somebody accepted.
    accepted: Vec<HistoryRewritten>,
    open: Option<HistoryRewritten>,
}

impl Story {
    fn tell(&mut self, event: GitopsEvent) {
        match event {
            GitopsEvent::RepositoryCreated(e) => self.add(e.commit, Fact::default()),
            GitopsEvent::Committed(e) if e.unchanged => {}
            GitopsEvent::Committed(e) => {
                use daybook_events::gitops::Change;
                let deployment = match e.change {
                    Change::Deploy { deployment, .. }
                    | Change::Scale { deployment, .. }
                    | Change::Remove { deployment, .. } => Some(deployment),
                    Change::EnvironmentCreated { .. } | Change::EnvironmentDeleted {} => None,
                };
                let fact = Fact {
                    parents: Some(e.parent.into_iter().collect()),
                    ordinal: e.ordinal,
                    message: Some(e.message),
                    author: Some(e.author),
                    event: Some(e.cause),
                    deployment,
                    files: Some(e.files),
                    files_digest: Some(e.files_digest),
                    ledger: e.ledger,
                    signer: e.signer,
                    by: By::Daybook,
                };
                // A record that came late: meanwhile the commit was taken for somebody else's.
                if let Some(known) = self.facts.get(&e.commit)
                    && known.by
                        == (By::Other {
                            daybooks_signature: true,
                        })
                {
                    self.facts.remove(&e.commit);
                }
                self.add(e.commit, fact);
            }
            GitopsEvent::Reverted(e) => {
                let fact = Fact {
                    parents: Some(e.parent.into_iter().collect()),
                    ordinal: Some(e.ordinal),
                    message: Some(e.message),
                    author: Some(e.author),
                    event: Some(e.cause),
                    files_digest: Some(e.diff.files_digest),
                    ledger: e.ledger,
                    signer: e.signer,
                    by: By::Daybook,
                    ..Fact::default()
                };
                self.add(e.commit, fact);
            }
            GitopsEvent::ForeignCommitFound(e) => {
                let fact = Fact {
                    // Older events do not name them.
                    parents: Some(e.parents).filter(|p| !p.is_empty()),
                    ordinal: e.ordinal,
                    message: Some(e.message),
                    author: Some(e.author),
                    files_digest: e.diff.map(|d| d.files_digest),
                    by: By::Other {
                        daybooks_signature: e.signature == Some(ForeignSignature::Daybook),
                    },
                    ..Fact::default()
                };
                self.add(e.commit, fact);
            }
            GitopsEvent::SignerAdded(e) => self.signers.push(e.public_key),
            GitopsEvent::HistoryRewritten(e) => self.open = Some(e),
            GitopsEvent::HistoryRestored(_) => self.open = None,
            GitopsEvent::RewriteAccepted(e) => {
                let rewritten = self.open.take();
                self.accepted
                    .extend(rewritten.filter(|r| r.found == e.commit));
            }
            GitopsEvent::ForeignCommitAdopted(_)
            | GitopsEvent::RevertRequested(_)
            | GitopsEvent::RevertFailed(_)
            | GitopsEvent::RemoteFailing(_)
            | GitopsEvent::RemoteRecovered(_) => {}
        }
    }

    fn add(&mut self, commit: CommitId, fact: Fact) {
        if self.facts.insert(commit.clone(), fact).is_some() {
            self.twice.insert(commit);
        }
    }
}

/// Compares a repository with what the ledger says of it.
///
/// `events` are the events of the project's `gitops` aggregate that counted (void ones left out),
/// in the order of the ledger, whose authenticity is for the caller to check: they also say which
/// keys may sign. `trusted` are further public keys, in OpenSSH's form, that an auditor was given
/// by other means; with `None` those that the ledger lists count, and with `Some` only these do.
///
/// The repository's own configuration, hooks and `allowed_signers` are not looked at. Memory grows
/// with the number of commits, not with their size.
pub fn verify_repository(
    repository: &Path,
    events: impl IntoIterator<Item = GitopsEvent>,
    trusted: Option<&[String]>,
) -> Result<Report, WitnessError> {
    let repository = Repository::open_bare(repository)?;
    let mut story = Story::default();
    for event in events {
        story.tell(event);
    }
    if story.facts.is_empty() {
        return Err(WitnessError::NoLedger);
    }
    let keys = trusted.map_or_else(|| story.signers.clone(), <[String]>::to_vec);
    let mut report = Report::default();
    let mut walk = repository.revwalk()?;
    walk.set_sorting(Sort::TOPOLOGICAL | Sort::REVERSE)?;
    walk.push(repository.refname_to_id(BRANCH_REF)?)?;
    let mut ordinals = Ordinals::default();
    for id in walk {
        let id = id?;
        let commit = commit_id(id)?;
        let ordinal = ordinals.of(&repository, id)?;
        report.commits += 1;
        let Some(fact) = story.facts.remove(&commit) else {
            report.find(&commit, Problem::NotRecorded);
            continue;
        };
        if story.twice.contains(&commit) {
            report.find(&commit, Problem::RecordedTwice);
        }
        for problem in compare(&repository, id, ordinal, &fact, &keys, &mut report)? {
            report.find(&commit, problem);
        }
    }
    let abandoned = abandoned(&repository, &story)?;
    for commit in story.facts.into_keys() {
        if abandoned.contains(&commit) {
            report.abandoned += 1;
        } else {
            report.find(&commit, Problem::NotOnBranch);
        }
    }
    if let Some(rewritten) = story.open {
        report.find(&rewritten.found, Problem::RewriteOpen);
    }
    report.findings.sort();
    Ok(report)
}

impl Report {
    /// Whether repository and ledger agree.
    pub fn is_sound(&self) -> bool {
        self.findings.is_empty()
    }

    fn find(&mut self, commit: &CommitId, problem: Problem) {
        let commit = commit.clone();
        self.findings.push(Finding { commit, problem });
    }
}

/// The commits that accepted rewrites took off the branch, back to what was left of it. A clone has
/// none of their objects: there the parents are those that the events name.
fn abandoned(repository: &Repository, story: &Story) -> Result<BTreeSet<CommitId>, git2::Error> {
    let mut all = BTreeSet::new();
    for HistoryRewritten {
        expected, common, ..
    } in &story.accepted
    {
        let mut gone = BTreeSet::new();
        let mut due = vec![expected.clone()];
        while let Some(commit) = due.pop() {
            if common.as_ref() == Some(&commit) || !gone.insert(commit.clone()) {
                continue;
            }
            if let Ok(kept) = repository.find_commit(Oid::from_str(commit.as_str())?) {
                for parent in kept.parent_ids() {
                    due.push(commit_id(parent)?);
                }
            } else if let Some(fact) = story.facts.get(&commit) {
                due.extend(fact.parents.iter().flatten().cloned());
            }
        }
        all.append(&mut gone);
    }
    Ok(all)
}

fn compare(
    repository: &Repository,
    id: Oid,
    ordinal: u64,
    fact: &Fact,
    keys: &[String],
    report: &mut Report,
) -> Result<Vec<Problem>, git2::Error> {
    let commit = repository.find_commit(id)?;
    let mut problems = Vec::new();
    let parents: Vec<CommitId> = commit
        .parent_ids()
        .map(commit_id)
        .collect::<Result<_, _>>()?;
    let expected = match fact.by {
        By::Creation => Some(Vec::new()),
        _ => fact.parents.clone(),
    };
    if expected.is_some_and(|expected| expected != parents) {
        problems.push(Problem::Parents);
    }
    if let Some(recorded) = fact.ordinal
        && recorded != ordinal
    {
        let found = ordinal;
        problems.push(Problem::Ordinal { recorded, found });
    }
    let differs = |recorded: &Option<String>, found: String| {
        recorded
            .as_ref()
            .is_some_and(|recorded| !says(recorded, found))
    };
    if differs(&fact.message, history::title_of(&commit)) {
        problems.push(Problem::Message);
    }
    if differs(&fact.author, history::author_of(&commit)) {
        problems.push(Problem::Author);
    }
    let parent = commit.parent_ids().next();
    let files: BTreeMap<String, Option<Digest>> = history::files_between(repository, parent, id)?
        .into_iter()
        .map(|(path, file)| (path, file.after))
        .collect();
    if let Some(recorded) = &fact.files
        && *recorded != files
    {
        problems.push(Problem::Files(differing(recorded, &files)));
    }
    if let Some(recorded) = &fact.files_digest
        && *recorded != digest_of(&files)
    {
        problems.push(Problem::FilesDigest);
    }
    let verdict = signing::verify(repository, id, keys)?;
    if let By::Other { daybooks_signature } = fact.by {
        report.foreign += 1;
        if matches!(verdict, Verdict::Good(_)) && !daybooks_signature {
            problems.push(Problem::UnexpectedSignature);
        }
        return Ok(problems);
    }
    report.own += 1;
    if commit.committer().name_bytes() != COMMITTER.as_bytes() {
        problems.push(Problem::Committer);
    }
    match (verdict, &fact.signer) {
        (Verdict::Good(key), Some(recorded)) if key != *recorded => {
            problems.push(Problem::OtherKey);
        }
        (Verdict::Good(_), _) => {}
        (Verdict::UnknownKey(key), _) => problems.push(Problem::UnknownKey(key)),
        (Verdict::Bad, _) => problems.push(Problem::BadSignature),
        (Verdict::Unsigned, Some(_)) => problems.push(Problem::Unsigned),
        // Before there were keys, or by a Daybook that signs nothing.
        (Verdict::Unsigned, None) => report.unsigned += 1,
    }
    if fact.by == By::Daybook {
        problems.extend(trailers(repository, &commit, fact)?);
    }
    Ok(problems)
}

fn trailers(
    repository: &Repository,
    commit: &git2::Commit<'_>,
    fact: &Fact,
) -> Result<Vec<Problem>, git2::Error> {
    let mut problems = Vec::new();
    let says = history::trailers_of(commit);
    if says.event != fact.event {
        problems.push(Problem::Trailer("Daybook-Event"));
    }
    if says.deployment != fact.deployment {
        problems.push(Problem::Trailer("Daybook-Deployment"));
    }
    let size = |ledger: &Option<LedgerAnchor>| ledger.as_ref().map(|l| l.size);
    if size(&says.ledger) != size(&fact.ledger) {
        problems.push(Problem::Trailer("Daybook-Ledger-Size"));
    } else if says.ledger != fact.ledger {
        problems.push(Problem::Trailer("Daybook-Ledger-Root"));
    }
    if let Some(anchor) = &says.ledger {
        // An unchanged checkpoint is no changed file: what counts is what the tree has.
        let checkpoint = match commit.tree()?.get_path(Path::new(CHECKPOINT)) {
            Ok(entry) => repository.find_blob(entry.id()).ok(),
            Err(_) => None,
        };
        if checkpoint
            .and_then(|blob| anchor_of(blob.content()))
            .as_ref()
            != Some(anchor)
        {
            problems.push(Problem::Checkpoint);
        }
    }
    Ok(problems)
}

/// Size and root as a checkpoint has them.
fn anchor_of(checkpoint: &[u8]) -> Option<LedgerAnchor> {
    let mut lines = std::str::from_utf8(checkpoint).ok()?.lines().skip(1);
    Some(LedgerAnchor {
        size: lines.next()?.parse().ok()?,
        root: lines.next()?.to_owned(),
    })
}

/// The paths in which two lists differ; the first twenty.
fn differing(
    a: &BTreeMap<String, Option<Digest>>,
    b: &BTreeMap<String, Option<Digest>>,
) -> Vec<String> {
    let paths: BTreeSet<&String> = a.keys().chain(b.keys()).collect();
    paths
        .into_iter()
        .filter(|path| a.get(*path) != b.get(*path))
        .take(20)
        .cloned()
        .collect()
}

/// Whether a text of a commit is what was recorded of it. What is recorded is bounded, and has
/// marks in the place of secrets: only what stands before the first mark is compared then.
fn says(recorded: &str, found: String) -> bool {
    match recorded.split_once(MASK) {
        None => cut(recorded.to_owned()) == cut(found),
        Some((start, _)) => found.starts_with(start),
    }
}
