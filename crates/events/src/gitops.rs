//! The gitops aggregate: the commits in a project's GitOps repository.
//!
//! A commit is a fact about the outside: it is made first and recorded then. Both carry the id of
//! the event that caused the commit (as the trailer `Daybook-Event`, and as `cause`), so that a
//! commit whose record was lost in a crash is found again.

use std::collections::BTreeMap;

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
    EnvironmentCreated {},
    /// An environment was removed.
    EnvironmentDeleted {},
}

/// A commit was made by Daybook.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Committed {
    /// The commit.
    pub commit: CommitId,
    /// Its parent.
    pub parent: Option<CommitId>,
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
    /// Files that it changes.
    pub files: Vec<String>,
}

events! {
    /// The events of a GitOps repository.
    GitopsEvent {
        /// The repository was made.
        RepositoryCreated(RepositoryCreated) = "gitops.repository_created.v1",
        /// A commit was made.
        Committed(Box<Committed>) = "gitops.committed.v1",
        /// Somebody else's commit was found.
        ForeignCommitFound(ForeignCommitFound) = "gitops.foreign_commit_found.v1",
    }
}

/// The state of a GitOps repository, as far as the ledger knows it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Gitops {
    /// Its branch.
    pub branch: String,
    /// Its newest commit.
    pub head: CommitId,
    /// How many commits the ledger knows.
    pub commits: u64,
    /// The newest commit of each environment.
    pub environments: BTreeMap<EnvironmentName, CommitId>,
    /// The releases that are in the repository, with the replicas that were last asked for
    /// (none: as deployed).
    pub releases: RedBlackTreeMapSync<DeploymentId, Option<u32>>,
    /// The newest 64 commits in the order of their events: what a retry looks up.
    pub recent: Vec<RecentCommit>,
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

/// How many causes a retry is looked up in.
const RECENT: usize = 64;

impl Gitops {
    /// The commit that this event caused, if it is among the newest ones.
    pub fn commit_of(&self, cause: EventId) -> Option<&CommitId> {
        self.recent
            .iter()
            .rev()
            .find(|r| r.cause == cause)
            .map(|r| &r.commit)
    }

    /// Whether a commit is an ancestor of another one, as far as the newest commits say so.
    fn is_before(&self, commit: &CommitId, other: &CommitId) -> bool {
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
}

impl Aggregate for Gitops {
    type Event = GitopsEvent;
    const KIND: AggregateKind = AggregateKind::Gitops;

    fn first(event: GitopsEvent, _: At) -> Result<Self, Illegal> {
        match event {
            GitopsEvent::RepositoryCreated(e) => Ok(Self {
                branch: e.branch,
                head: e.commit,
                commits: 1,
                environments: BTreeMap::new(),
                releases: RedBlackTreeMapSync::default(),
                recent: Vec::new(),
            }),
            other => Err(Illegal::new(
                other.kind(),
                "a repository that does not exist",
            )),
        }
    }

    fn apply(&mut self, event: GitopsEvent, _: At) -> Result<(), Illegal> {
        match event {
            GitopsEvent::RepositoryCreated(e) => {
                return Err(Illegal::new(
                    GitopsEvent::RepositoryCreated(e).kind(),
                    "a repository that exists",
                ));
            }
            GitopsEvent::Committed(e) => {
                if self.recent.iter().any(|r| r.cause == e.cause) {
                    return Err(Illegal::new(
                        "gitops.committed.v1",
                        "a cause that has its commit",
                    ));
                }
                self.commits += 1;
                // Of two workers, the one that committed first may record it last.
                let late = self.is_before(&e.commit, &self.head);
                if !late {
                    self.head = e.commit.clone();
                }
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
                    Change::EnvironmentCreated {} | Change::EnvironmentDeleted {} => {}
                }
                if matches!(e.change, Change::EnvironmentDeleted {}) {
                    self.environments.remove(&e.environment);
                } else if !self
                    .environments
                    .get(&e.environment)
                    .is_some_and(|newest| self.is_before(&e.commit, newest))
                {
                    self.environments.insert(e.environment, e.commit.clone());
                }
                self.recent.push(RecentCommit {
                    cause: e.cause,
                    commit: e.commit,
                    parent: e.parent,
                });
                if self.recent.len() > RECENT {
                    self.recent.remove(0);
                }
            }
            GitopsEvent::ForeignCommitFound(e) => {
                self.commits += 1;
                self.head = e.commit;
            }
        }
        Ok(())
    }
}

/// Decides whether `event` may be appended.
pub fn decide(
    state: Option<&Gitops>,
    event: GitopsEvent,
) -> Result<Decision<GitopsEvent>, Refusal> {
    match (state, &event) {
        (None, GitopsEvent::RepositoryCreated(_)) => Ok(Decision::Append(event)),
        (Some(_), GitopsEvent::RepositoryCreated(_)) => Ok(Decision::Nothing),
        (None, _) => Err(Refusal::new(
            "repository_not_found",
            "the project has no GitOps repository yet",
            "deploy something, which makes it",
        )),
        (Some(s), GitopsEvent::Committed(e)) if s.commit_of(e.cause).is_some() => {
            Ok(Decision::Nothing)
        }
        (Some(s), GitopsEvent::ForeignCommitFound(e)) if s.head == e.commit => {
            Ok(Decision::Nothing)
        }
        (Some(_), _) => Ok(Decision::Append(event)),
    }
}
