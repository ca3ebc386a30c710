//! The gitops aggregate: the commits in a project's GitOps repository.
//!
//! A commit is a fact about the outside: it is made first and recorded then. Both carry the id of
//! the event that caused the commit (as the trailer `Daybook-Event`, and as `cause`), so that a
//! commit whose record was lost in a crash is found again.

use std::collections::{BTreeMap, VecDeque};

use jiff::Timestamp;
use rpds::RedBlackTreeMapSync;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::aggregate::{Aggregate, At, Decision, Illegal, Refusal, events};
use crate::envelope::Payload;
use crate::names::{CommitId, DeploymentId, Digest, EnvironmentName, EventId, ServiceName};
use crate::subject::AggregateKind;

/// The repository was made.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct RepositoryCreated {
    /// Its first commit.
    pub commit: CommitId,
    /// Its branch.
    pub branch: String,
}

/// What a commit changes, as data.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Change {
    /// A release was added, or its image changed.
    Deploy {
        /// The service.
        service: ServiceName,
        /// The deployment.
        deployment: DeploymentId,
        /// The environment that its image was promoted from.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        from: Option<EnvironmentName>,
    },
    /// A release was scaled; 0 stops it.
    Scale {
        /// The service.
        service: ServiceName,
        /// The deployment.
        deployment: DeploymentId,
        /// The replicas that are asked for now.
        replicas: u32,
    },
    /// A release was removed.
    Remove {
        /// The service.
        service: ServiceName,
        /// The deployment.
        deployment: DeploymentId,
    },
    /// An environment was added.
    EnvironmentCreated {
        /// The environment whose services it began with.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        from: Option<EnvironmentName>,
    },
    /// An environment was removed.
    EnvironmentDeleted {},
}

/// How far the ledger was signed when a commit was made: what its trailers `Daybook-Ledger-Size`
/// and `Daybook-Ledger-Root` say, and the file `.daybook/checkpoint` proves.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct LedgerAnchor {
    /// How many events the signed tree covered.
    pub size: u64,
    /// Its root hash in base64, as the third line of a checkpoint has it.
    pub root: String,
}

/// A commit was made by Daybook.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Committed {
    /// The commit.
    pub commit: CommitId,
    /// Its parent.
    pub parent: Option<CommitId>,
    /// How many commits its history has, itself included.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ordinal: Option<u64>,
    /// The environment that it changes.
    pub environment: EnvironmentName,
    /// What it changes.
    pub change: Change,
    /// First line of its message: `deploy(production): api a1b2c3d`.
    pub message: String,
    /// Author as `Name <address>`.
    pub author: String,
    /// The event that caused it; the commit's trailer `Daybook-Event` says the same.
    pub cause: EventId,
    /// Files that it changes, with the SHA-256 of each new content; none for a removed file.
    pub files: BTreeMap<String, Option<Digest>>,
    /// SHA-256 over the sorted lines `<digest or "-">  <path>\n` of `files`.
    pub files_digest: Digest,
    /// The ledger's tree when it was made, if one was published.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ledger: Option<LedgerAnchor>,
    /// Fingerprint of the key that it is signed with: `SHA256:…`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub signer: Option<String>,
    /// Nothing was to be changed: `commit` is an older one, which has it so already.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub unchanged: bool,
}

/// A key that Daybook signs the project's commits with from here on. What the ledger lists here is
/// what `allowed_signers` is made of, so that who may push to the repository cannot add one.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct SignerAdded {
    /// The public key in OpenSSH's form, without a comment: `ssh-ed25519 AAAA…`.
    pub public_key: String,
    /// Its fingerprint: `SHA256:…`.
    pub fingerprint: String,
}

/// Whose signature a commit carries that no event records.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum ForeignSignature {
    /// It was not looked at, or there is none.
    #[default]
    None,
    /// Of somebody else, or not valid.
    Other,
    /// Daybook's own, although no event records the commit: the record was lost, or the key is in
    /// the wrong hands.
    Daybook,
}

/// How much a commit changes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct DiffSummary {
    /// How many files.
    pub files: u64,
    /// Lines that it adds.
    pub insertions: u64,
    /// Lines that it takes away.
    pub deletions: u64,
    /// SHA-256 over the sorted lines `<digest or "-">  <path>\n` of all its files.
    pub files_digest: Digest,
}

/// A commit that somebody else made was found. It is never overwritten.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct ForeignCommitFound {
    /// The commit.
    pub commit: CommitId,
    /// Author as `Name <address>`.
    pub author: String,
    /// First line of its message.
    pub message: String,
    /// Files that it changes; the first ones where `diff.files` says that there are more.
    pub files: Vec<String>,
    /// Its parents: more than one for a merge.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub parents: Vec<CommitId>,
    /// How many commits its history has, itself included.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ordinal: Option<u64>,
    /// Committer as `Name <address>`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub committer: Option<String>,
    /// When it says that it was committed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub committed_at: Option<Timestamp>,
    /// Whose signature it carries.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub signature: Option<ForeignSignature>,
    /// How much it changes. The change itself is in the repository.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub diff: Option<DiffSummary>,
    /// Environments whose files it changes.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub environments: Vec<EnvironmentName>,
    /// The commit that it says it reverts, if that is in the repository.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reverts: Option<CommitId>,
    /// The deployment that it takes back, if `reverts` is the commit of one and the values really
    /// are those from before it. It is rolled back then.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub undoes: Option<UndoneDeployment>,
}

/// A deployment that a commit of somebody else takes back.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct UndoneDeployment {
    /// The environment.
    pub environment: EnvironmentName,
    /// The service.
    pub service: ServiceName,
    /// The deployment.
    pub deployment: DeploymentId,
}

/// Somebody accepts a commit that Daybook did not make. What it changes is synced from here on.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct ForeignCommitAdopted {
    /// The commit.
    pub commit: CommitId,
    /// Why.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
}

/// Somebody wants a commit that Daybook did not make undone.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct RevertRequested {
    /// The commit.
    pub commit: CommitId,
    /// Why.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
}

/// A commit was undone by a further one, which Daybook made.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Reverted {
    /// The commit that is undone.
    pub reverts: CommitId,
    /// The commit that undoes it.
    pub commit: CommitId,
    /// Its parent.
    pub parent: Option<CommitId>,
    /// How many commits its history has, itself included.
    pub ordinal: u64,
    /// First line of its message: `revert(production): a1b2c3d raise replicas`.
    pub message: String,
    /// Author as `Name <address>`.
    pub author: String,
    /// The event that caused it; the commit's trailer `Daybook-Event` says the same.
    pub cause: EventId,
    /// How much it changes.
    pub diff: DiffSummary,
    /// Environments whose files it changes.
    pub environments: Vec<EnvironmentName>,
    /// The ledger's tree when it was made, if one was published.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ledger: Option<LedgerAnchor>,
    /// Fingerprint of the key that it is signed with.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub signer: Option<String>,
}

/// A commit could not be undone. It is as it was.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct RevertFailed {
    /// The commit.
    pub commit: CommitId,
    /// A stable code.
    pub code: String,
    /// What happened, in one sentence.
    pub message: String,
    /// What helps.
    pub remedy: String,
}

/// The branch no longer contains a commit that the ledger records. Nothing is committed any more
/// until somebody puts the branch back, or accepts what it is now.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct HistoryRewritten {
    /// The newest commit that the ledger records.
    pub expected: CommitId,
    /// Where the branch is.
    pub found: CommitId,
    /// How many commits the history of `found` has, itself included.
    pub found_ordinal: u64,
    /// The newest commit that both have in their history.
    pub common: Option<CommitId>,
}

/// The branch contains again what the ledger records.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct HistoryRestored {
    /// Where the branch is.
    pub found: CommitId,
}

/// Somebody accepts a history that was rewritten. The ledger keeps the commits that are gone.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct RewriteAccepted {
    /// Where the branch is: what [`HistoryRewritten::found`] said.
    pub commit: CommitId,
    /// Why.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
}

/// What was asked of a remote.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum RemoteStep {
    /// Where its branch is, and what is new there.
    Fetch,
    /// To take a commit.
    Push,
}

/// The remote of the repository does not do what it is asked. Commits wait, and are tried again;
/// what runs stays as it is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct RemoteFailing {
    /// What it was asked.
    pub during: RemoteStep,
    /// A stable code.
    pub code: String,
    /// What happened, in one sentence.
    pub message: String,
    /// What helps.
    pub remedy: String,
}

/// The remote does what it is asked again, or there is none any more.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct RemoteRecovered {}

events! {
    /// The events of a GitOps repository.
    GitopsEvent {
        /// The repository was made.
        RepositoryCreated(RepositoryCreated) = "gitops.repository_created.v1",
        /// A commit was made.
        Committed(Box<Committed>) = "gitops.committed.v1",
        /// A key signs from here on.
        SignerAdded(SignerAdded) = "gitops.signer_added.v1",
        /// Somebody else's commit was found.
        ForeignCommitFound(Box<ForeignCommitFound>) = "gitops.foreign_commit_found.v1",
        /// Somebody accepts it.
        ForeignCommitAdopted(ForeignCommitAdopted) = "gitops.foreign_commit_adopted.v1",
        /// Somebody wants it undone.
        RevertRequested(RevertRequested) = "gitops.revert_requested.v1",
        /// It was undone.
        Reverted(Box<Reverted>) = "gitops.reverted.v1",
        /// It could not be undone.
        RevertFailed(RevertFailed) = "gitops.revert_failed.v1",
        /// Recorded commits are gone from the branch.
        HistoryRewritten(HistoryRewritten) = "gitops.history_rewritten.v1",
        /// They are back.
        HistoryRestored(HistoryRestored) = "gitops.history_restored.v1",
        /// Somebody accepts that they are gone.
        RewriteAccepted(RewriteAccepted) = "gitops.rewrite_accepted.v1",
        /// Its remote refuses, or cannot be reached.
        RemoteFailing(RemoteFailing) = "gitops.remote_failing.v1",
        /// Its remote is as it should be again.
        RemoteRecovered(RemoteRecovered) = "gitops.remote_recovered.v1",
    }
}

/// The state of a GitOps repository, as far as the ledger knows it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Gitops {
    /// Its branch.
    pub branch: String,
    /// Its newest commit.
    pub head: CommitId,
    /// How many commits the head's history has, itself included, where its event says so.
    pub head_ordinal: Option<u64>,
    /// How many commits the ledger knows.
    pub commits: u64,
    /// The newest commit of each environment.
    pub environments: BTreeMap<EnvironmentName, CommitId>,
    /// The place of these commits in history, where their events say so.
    pub environment_ordinals: BTreeMap<EnvironmentName, u64>,
    /// The releases that are in the repository, with the replicas that were last asked for
    /// (none: as deployed).
    pub releases: RedBlackTreeMapSync<DeploymentId, Option<u32>>,
    /// The newest 64 commits in the order of their events: what a retry looks up.
    pub recent: VecDeque<RecentCommit>,
    /// Public keys that commits were or are signed with, oldest first.
    pub signers: Vec<String>,
    /// Commits of others, at most 256: those that were decided on are forgotten first.
    pub foreign: Vec<ForeignCommit>,
    /// Set while the branch does not contain what the ledger records.
    pub rewritten: Option<HistoryRewritten>,
    /// Set while its remote does not do what it is asked.
    pub remote_trouble: Option<RemoteTrouble>,
}

/// What is wrong with a remote.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct RemoteTrouble {
    /// Since when it does not do what it is asked, whatever the reasons were.
    pub since: Timestamp,
    /// The newest reason.
    pub failing: RemoteFailing,
}

/// A commit that the ledger knows, and what it is needed for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RecentCommit {
    /// The event that caused it.
    pub cause: EventId,
    /// The commit.
    pub commit: CommitId,
    /// Its parent.
    pub parent: Option<CommitId>,
}

/// What became of a commit of somebody else.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum ForeignStatus {
    /// Nobody decided yet.
    Found,
    /// Somebody accepted it.
    Adopted,
    /// Somebody wants it undone.
    Reverting,
    /// It is undone.
    Reverted,
}

/// A commit of somebody else, as the state keeps it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ForeignCommit {
    /// The commit.
    pub commit: CommitId,
    /// Its place in history, where its event says so.
    pub ordinal: Option<u64>,
    /// Author as `Name <address>`.
    pub author: String,
    /// First line of its message.
    pub message: String,
    /// Environments whose files it changes.
    pub environments: Vec<EnvironmentName>,
    /// The commit that it says it reverts.
    pub reverts: Option<CommitId>,
    /// The deployment that it takes back.
    pub undoes: Option<UndoneDeployment>,
    /// Whose signature it carries.
    pub signature: ForeignSignature,
    /// When it was found.
    pub found: Timestamp,
    /// What became of it.
    pub status: ForeignStatus,
    /// Why it could not be undone, when that was tried last.
    pub problem: Option<String>,
}

/// How many causes a retry is looked up in.
const RECENT: usize = 64;
/// How many commits of others are kept.
const FOREIGN: usize = 256;

impl Gitops {
    /// The commit that this event caused, if it is among the newest ones.
    pub fn commit_of(&self, cause: EventId) -> Option<&CommitId> {
        self.recent
            .iter()
            .rev()
            .find(|r| r.cause == cause)
            .map(|r| &r.commit)
    }

    /// A commit of somebody else, if it is among those that are kept.
    pub fn foreign_commit(&self, commit: &CommitId) -> Option<&ForeignCommit> {
        self.foreign.iter().find(|f| f.commit == *commit)
    }

    /// The newest commit about an environment, whoever made it: also one of somebody else on which
    /// nobody has decided, and which the next commit follows on all the same.
    pub fn newest_about(&self, environment: &EnvironmentName) -> Option<&CommitId> {
        let known = self.environments.get(environment);
        let ordinal = self.environment_ordinals.get(environment).copied();
        let open = [ForeignStatus::Found, ForeignStatus::Reverting];
        let foreign = self.foreign.iter().rev().filter(|f| {
            open.contains(&f.status) && f.environments.contains(environment) && f.ordinal > ordinal
        });
        foreign
            .max_by_key(|f| f.ordinal)
            .map(|f| &f.commit)
            .or(known)
    }

    /// The commits of others that wait for somebody's decision.
    pub fn undecided(&self) -> impl Iterator<Item = &ForeignCommit> {
        self.foreign
            .iter()
            .filter(|f| f.status == ForeignStatus::Found)
    }

    /// Whether a commit is an ancestor of another one, as far as the newest commits say so.
    fn is_before(&self, commit: &CommitId, other: &CommitId) -> bool {
        // Most commits are new, and nobody's parent yet.
        let is_parent = |r: &RecentCommit| r.parent.as_ref() == Some(commit);
        if !self.recent.iter().any(is_parent) {
            return false;
        }
        let mut at = other;
        for _ in 0..self.recent.len() {
            match self
                .recent
                .iter()
                .find(|r| r.commit == *at)
                .map(|r| &r.parent)
            {
                Some(Some(parent)) if parent == commit => return true,
                Some(Some(parent)) => at = parent,
                _ => return false,
            }
        }
        false
    }

    /// Takes a commit for the head, unless the head is newer: of two workers, the one that
    /// committed first may record it last.
    fn advance(&mut self, commit: &CommitId, ordinal: Option<u64>) {
        let late = match (ordinal, self.head_ordinal) {
            (Some(new), Some(head)) => new <= head,
            _ => self.is_before(commit, &self.head),
        };
        if !late {
            self.head = commit.clone();
            self.head_ordinal = ordinal;
        }
    }

    /// The same for one environment.
    fn advance_environment(
        &mut self,
        environment: EnvironmentName,
        commit: &CommitId,
        ordinal: Option<u64>,
    ) {
        let late = match (ordinal, self.environment_ordinals.get(&environment)) {
            (Some(new), Some(newest)) => new < *newest,
            _ => self
                .environments
                .get(&environment)
                .is_some_and(|newest| self.is_before(commit, newest)),
        };
        if late {
            return;
        }
        match ordinal {
            Some(ordinal) => {
                self.environment_ordinals
                    .insert(environment.clone(), ordinal);
            }
            None => {
                self.environment_ordinals.remove(&environment);
            }
        }
        self.environments.insert(environment, commit.clone());
    }

    fn remember(&mut self, cause: EventId, commit: CommitId, parent: Option<CommitId>) {
        self.recent.push_back(RecentCommit {
            cause,
            commit,
            parent,
        });
        if self.recent.len() > RECENT {
            self.recent.pop_front();
        }
    }

    fn found(&mut self, e: ForeignCommitFound, at: At) {
        self.foreign.push(ForeignCommit {
            commit: e.commit,
            ordinal: e.ordinal,
            author: e.author,
            message: e.message,
            environments: e.environments,
            reverts: e.reverts,
            undoes: e.undoes,
            signature: e.signature.unwrap_or_default(),
            found: at.time,
            status: ForeignStatus::Found,
            problem: None,
        });
        if self.foreign.len() > FOREIGN {
            let settled = |f: &ForeignCommit| {
                matches!(f.status, ForeignStatus::Adopted | ForeignStatus::Reverted)
            };
            let oldest = self.foreign.iter().position(settled).unwrap_or(0);
            self.foreign.remove(oldest);
        }
    }

    /// What became of a commit of somebody else, if it may become that.
    fn decide_on(&mut self, commit: &CommitId, status: ForeignStatus) -> Option<&ForeignCommit> {
        let known = self.foreign.iter_mut().find(|f| f.commit == *commit)?;
        known.status = status;
        known.problem = None;
        Some(known)
    }

    fn commit(&mut self, e: Committed) -> Result<(), Illegal> {
        if self.recent.iter().any(|r| r.cause == e.cause) {
            return Err(Illegal::new(
                "gitops.committed.v1",
                "a cause that has its commit",
            ));
        }
        self.commits += 1;
        self.advance(&e.commit, e.ordinal);
        match e.change {
            Change::Deploy { deployment, .. } => {
                self.releases.insert_mut(deployment, None);
            }
            Change::Scale {
                deployment,
                replicas,
                ..
            } => {
                self.releases.insert_mut(deployment, Some(replicas));
            }
            Change::Remove { deployment, .. } => {
                self.releases.remove_mut(&deployment);
            }
            Change::EnvironmentCreated { .. } | Change::EnvironmentDeleted {} => {}
        }
        if matches!(e.change, Change::EnvironmentDeleted {}) {
            self.environments.remove(&e.environment);
            self.environment_ordinals.remove(&e.environment);
        } else {
            self.advance_environment(e.environment, &e.commit, e.ordinal);
        }
        // Its record was late, and meanwhile it was taken for somebody else's. One that changed
        // nothing names the commit that has it so, which may well be somebody else's.
        if !e.unchanged {
            self.foreign.retain(|f| f.commit != e.commit);
        }
        self.remember(e.cause, e.commit, e.parent);
        Ok(())
    }

    fn revert(&mut self, e: Reverted) -> Result<(), Illegal> {
        if self.recent.iter().any(|r| r.cause == e.cause) {
            return Err(Illegal::new(
                "gitops.reverted.v1",
                "a cause that has its commit",
            ));
        }
        self.commits += 1;
        self.advance(&e.commit, Some(e.ordinal));
        for environment in e.environments {
            self.advance_environment(environment, &e.commit, Some(e.ordinal));
        }
        self.decide_on(&e.reverts, ForeignStatus::Reverted);
        self.remember(e.cause, e.commit, e.parent);
        Ok(())
    }
}

impl Aggregate for Gitops {
    type Event = GitopsEvent;
    const KIND: AggregateKind = AggregateKind::Gitops;

    fn first(event: GitopsEvent, _: At) -> Result<Self, Illegal> {
        match event {
            GitopsEvent::RepositoryCreated(e) => Ok(Self {
                branch: e.branch,
                head: e.commit,
                head_ordinal: Some(1),
                commits: 1,
                environments: BTreeMap::new(),
                environment_ordinals: BTreeMap::new(),
                releases: RedBlackTreeMapSync::default(),
                recent: VecDeque::new(),
                signers: Vec::new(),
                foreign: Vec::new(),
                rewritten: None,
                remote_trouble: None,
            }),
            other => Err(Illegal::new(
                other.kind(),
                "a repository that does not exist",
            )),
        }
    }

    fn apply(&mut self, event: GitopsEvent, at: At) -> Result<(), Illegal> {
        let kind = event.kind();
        let unknown = || Illegal::new(kind, "a commit that nobody found");
        match event {
            GitopsEvent::RepositoryCreated(_) => {
                return Err(Illegal::new(kind, "a repository that exists"));
            }
            GitopsEvent::Committed(e) => self.commit(*e)?,
            GitopsEvent::Reverted(e) => self.revert(*e)?,
            GitopsEvent::SignerAdded(e) => {
                self.signers.push(e.public_key);
            }
            GitopsEvent::ForeignCommitFound(e) => {
                if self.foreign_commit(&e.commit).is_some() {
                    return Err(Illegal::new(kind, "a commit that was found before"));
                }
                self.commits += 1;
                self.advance(&e.commit, e.ordinal);
                self.found(*e, at);
            }
            GitopsEvent::ForeignCommitAdopted(e) => {
                let adopted = self
                    .decide_on(&e.commit, ForeignStatus::Adopted)
                    .ok_or_else(unknown)?;
                let (environments, ordinal) = (adopted.environments.clone(), adopted.ordinal);
                for environment in environments {
                    self.advance_environment(environment, &e.commit, ordinal);
                }
            }
            GitopsEvent::RevertRequested(e) => {
                self.decide_on(&e.commit, ForeignStatus::Reverting)
                    .ok_or_else(unknown)?;
            }
            GitopsEvent::RevertFailed(e) => {
                self.decide_on(&e.commit, ForeignStatus::Found)
                    .ok_or_else(unknown)?;
                if let Some(known) = self.foreign.iter_mut().find(|f| f.commit == e.commit) {
                    known.problem = Some(e.message);
                }
            }
            GitopsEvent::RemoteFailing(e) => {
                let since = self.remote_trouble.as_ref().map_or(at.time, |t| t.since);
                self.remote_trouble = Some(RemoteTrouble { since, failing: e });
            }
            GitopsEvent::RemoteRecovered(_) => self.remote_trouble = None,
            GitopsEvent::HistoryRewritten(e) => self.rewritten = Some(e),
            GitopsEvent::HistoryRestored(_) => self.rewritten = None,
            GitopsEvent::RewriteAccepted(e) => match self.rewritten.take() {
                Some(rewritten) if rewritten.found == e.commit => {
                    self.head = rewritten.found;
                    self.head_ordinal = Some(rewritten.found_ordinal);
                    for (environment, commit) in &mut self.environments {
                        *commit = self.head.clone();
                        self.environment_ordinals
                            .insert(environment.clone(), rewritten.found_ordinal);
                    }
                }
                other => {
                    self.rewritten = other;
                    return Err(Illegal::new(kind, "a history that was not rewritten so"));
                }
            },
        }
        Ok(())
    }
}

/// Decides whether `event` may be appended.
pub fn decide(
    state: Option<&Gitops>,
    event: GitopsEvent,
) -> Result<Decision<GitopsEvent>, Refusal> {
    let Some(state) = state else {
        return match event {
            GitopsEvent::RepositoryCreated(_) => Ok(Decision::Append(event)),
            _ => Err(Refusal::new(
                "repository_not_found",
                "the project has no GitOps repository yet",
                "deploy something, which makes it",
            )),
        };
    };
    let needed = match &event {
        GitopsEvent::RepositoryCreated(_) => false,
        GitopsEvent::Committed(e) => state.commit_of(e.cause).is_none(),
        GitopsEvent::Reverted(e) => state.commit_of(e.cause).is_none(),
        GitopsEvent::SignerAdded(e) => !state.signers.contains(&e.public_key),
        GitopsEvent::ForeignCommitFound(e) => {
            state.foreign_commit(&e.commit).is_none()
                && state.recent.iter().all(|r| r.commit != e.commit)
        }
        GitopsEvent::ForeignCommitAdopted(e) => match found(state, &e.commit)?.status {
            ForeignStatus::Found => true,
            ForeignStatus::Adopted => false,
            status => return Err(decided(&e.commit, status)),
        },
        GitopsEvent::RevertRequested(e) => match found(state, &e.commit)?.status {
            ForeignStatus::Found | ForeignStatus::Adopted => true,
            ForeignStatus::Reverting | ForeignStatus::Reverted => false,
        },
        GitopsEvent::RevertFailed(e) => found(state, &e.commit)?.status == ForeignStatus::Reverting,
        GitopsEvent::HistoryRewritten(e) => state
            .rewritten
            .as_ref()
            .is_none_or(|known| known.found != e.found),
        GitopsEvent::HistoryRestored(_) => state.rewritten.is_some(),
        // A reason is told once; what a server says of it may differ each time.
        GitopsEvent::RemoteFailing(e) => state
            .remote_trouble
            .as_ref()
            .is_none_or(|known| known.failing.code != e.code || known.failing.during != e.during),
        GitopsEvent::RemoteRecovered(_) => state.remote_trouble.is_some(),
        GitopsEvent::RewriteAccepted(e) => match &state.rewritten {
            Some(rewritten) if rewritten.found == e.commit => true,
            None if state.head == e.commit => false,
            _ => {
                return Err(Refusal::new(
                    "not_rewritten",
                    format!("the history was not rewritten to {}", e.commit.short()),
                    "look at it with `daybook gitops show`",
                ));
            }
        },
    };
    Ok(if needed {
        Decision::Append(event)
    } else {
        Decision::Nothing
    })
}

fn found<'a>(state: &'a Gitops, commit: &CommitId) -> Result<&'a ForeignCommit, Refusal> {
    state.foreign_commit(commit).ok_or_else(|| {
        Refusal::new(
            "foreign_commit_not_found",
            format!(
                "{} is no commit of somebody else that was found in the GitOps repository",
                commit.short()
            ),
            "`daybook gitops show` lists them; one that was just pushed is found within a minute",
        )
    })
}

fn decided(commit: &CommitId, status: ForeignStatus) -> Refusal {
    let what = match status {
        ForeignStatus::Reverting => "is being undone",
        _ => "is undone",
    };
    Refusal::new(
        "foreign_commit_decided",
        format!("commit {} {what}", commit.short()),
        "push the change again if it is wanted after all",
    )
}
