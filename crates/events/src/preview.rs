//! Pull requests, and the environments that they get for as long as they are open.
//!
//! What a provider says of a pull request is a snapshot: whether it is open, what its head is, and
//! when it was changed last. Deliveries of such snapshots come late, twice and in any order, so an
//! environment follows the newest one, by the provider's own time. Only where two are of the same
//! moment it matters what was done: a close stands against everything but a reopening, and of two
//! heads the one counts that names the other as the one before it. If neither does, both are kept
//! until somebody has asked the repository.
//!
//! Every snapshot that is newer is one event, so that what comes late is known to be late even if it
//! would have changed nothing.

use std::cmp::Ordering;

use jiff::Timestamp;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::aggregate::{At, Decision, Refusal};
use crate::environment::{Environment, EnvironmentEvent, EnvironmentSpec, EnvironmentStatus};
use crate::log::Position;
use crate::names::{CommitId, EnvironmentName, EventId, HookName, ProjectName};

/// A pull request (GitLab: a merge request) as a provider's delivery shows it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct PullRequest {
    /// The webhook that it came by.
    pub hook: HookName,
    /// The repository that it is to be merged into, as [`crate::hook::repository_key`] writes it.
    pub repository: String,
    /// Its number in that repository.
    pub number: u64,
    /// Its title.
    pub title: String,
    /// Where people read it.
    pub url: String,
    /// The commit that it proposes.
    pub head: CommitId,
    /// The commit that it proposed before this one, if the delivery says so.
    pub before: Option<CommitId>,
    /// The ref of the repository that leads to the newest head, as the provider keeps it.
    pub head_ref: String,
    /// When it was changed last, by the provider's clock.
    pub updated_at: Timestamp,
}

/// A pull request was opened or reopened: its environment is to be there.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct PullRequestOpened {
    /// The project.
    pub project: ProjectName,
    /// The environment.
    pub name: EnvironmentName,
    /// What the environment is.
    pub spec: EnvironmentSpec,
    /// The environment that it is made from.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub from: Option<EnvironmentName>,
    /// The pull request.
    pub pull_request: PullRequest,
}

/// A pull request that is open has changed, perhaps its head.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct PullRequestUpdated {
    /// The pull request.
    pub pull_request: PullRequest,
    /// Other heads of the same moment: which of them is the newest one is not known yet.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub rivals: Vec<CommitId>,
}

/// A pull request was closed or merged: its environment goes, or never comes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct PullRequestClosed {
    /// The project.
    pub project: ProjectName,
    /// The environment.
    pub name: EnvironmentName,
    /// The pull request.
    pub pull_request: PullRequest,
}

/// Of several heads of the same moment the newest was found.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct PullRequestHeadFound {
    /// The head.
    pub head: CommitId,
    /// How it was found.
    pub reason: String,
}

/// What an environment knows of its pull request.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Preview {
    /// The newest snapshot of it.
    pub pull_request: PullRequest,
    /// Whether it is open.
    pub open: bool,
    /// Other heads of the same moment: nothing is deployed until it is known which one it is.
    pub rivals: Vec<CommitId>,
    /// The event that made the head what it is.
    pub head_event: EventId,
    /// Where that event is.
    pub head_position: Position,
    /// What the environment is, whenever it is made.
    pub spec: EnvironmentSpec,
    /// What it is made from.
    pub from: Option<EnvironmentName>,
    /// Somebody deleted the environment although the pull request is open: it stays so until the
    /// pull request is reopened.
    pub dismissed: bool,
}

/// What a delivery says was done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Action {
    /// It was opened.
    Opened,
    /// Its head, title or target was changed.
    Updated,
    /// It was opened again.
    Reopened,
    /// It was closed or merged.
    Closed,
}

/// A delivery about a pull request, with what its environment is to be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Seen {
    /// The project.
    pub project: ProjectName,
    /// The environment that the pull request gets.
    pub name: EnvironmentName,
    /// What that environment is, if it has to be made.
    pub spec: EnvironmentSpec,
    /// What it is made from.
    pub from: Option<EnvironmentName>,
    /// The pull request.
    pub pull_request: PullRequest,
    /// What was done.
    pub action: Action,
    /// Whether the pull request was open when the delivery was made.
    pub open: bool,
}

/// The codes of refusals that say of a delivery that there is nothing to be done for it.
pub const IGNORED: [&str; 3] = ["stale_delivery", "environment_taken", "other_pull_request"];

/// Decides what a delivery changes. What comes too late is refused with `stale_delivery`.
pub fn decide(
    state: Option<&Environment>,
    seen: Seen,
) -> Result<Decision<EnvironmentEvent>, Refusal> {
    let last = state.and_then(|e| e.preview.as_ref());
    let Some(last) = last else {
        return match state {
            Some(e) if e.status != EnvironmentStatus::Deleted => Err(taken(&seen.name)),
            _ if seen.open => Ok(Decision::Append(opened(seen))),
            _ => Ok(Decision::Append(closed(seen))),
        };
    };
    let known = &last.pull_request;
    let new = &seen.pull_request;
    if known.repository != new.repository || known.number != new.number {
        return Err(Refusal::new(
            "other_pull_request",
            format!(
                "the environment {} belongs to pull request {} of {}",
                seen.name, known.number, known.repository
            ),
            "give the webhook of each repository a prefix of its own with `daybook hook add --prefix`",
        ));
    }
    let active = state.is_some_and(|e| e.status == EnvironmentStatus::Active);
    if active && !last.open {
        return Err(taken(&seen.name));
    }
    match new.updated_at.cmp(&known.updated_at) {
        Ordering::Less => Err(stale(known)),
        Ordering::Greater => Ok(Decision::Append(match (last.open, seen.open) {
            (false, true) => opened(seen),
            (true, true) => updated(seen, Vec::new()),
            (_, false) => closed(seen),
        })),
        Ordering::Equal => match (last.open, seen.open) {
            (true, false) => Ok(Decision::Append(closed(seen))),
            (false, true) if seen.action == Action::Reopened => Ok(Decision::Append(opened(seen))),
            (false, true) => Err(stale(known)),
            (false, false) => Ok(Decision::Nothing),
            (true, true) => same_moment(last, seen),
        },
    }
}

/// Two snapshots of the same moment of a pull request that is open in both.
fn same_moment(last: &Preview, seen: Seen) -> Result<Decision<EnvironmentEvent>, Refusal> {
    let known = &last.pull_request;
    let new = &seen.pull_request;
    if new.head == known.head || last.rivals.contains(&new.head) {
        return Ok(Decision::Nothing);
    }
    if last.rivals.is_empty() {
        if new.before.as_ref() == Some(&known.head) {
            return Ok(Decision::Append(updated(seen, Vec::new())));
        }
        if known.before.as_ref() == Some(&new.head) {
            return Err(stale(known));
        }
    }
    let mut rivals = last.rivals.clone();
    rivals.push(known.head.clone());
    rivals.sort();
    Ok(Decision::Append(updated(seen, rivals)))
}

fn opened(seen: Seen) -> EnvironmentEvent {
    EnvironmentEvent::PullRequestOpened(Box::new(PullRequestOpened {
        project: seen.project,
        name: seen.name,
        spec: seen.spec,
        from: seen.from,
        pull_request: seen.pull_request,
    }))
}

fn updated(seen: Seen, rivals: Vec<CommitId>) -> EnvironmentEvent {
    EnvironmentEvent::PullRequestUpdated(Box::new(PullRequestUpdated {
        pull_request: seen.pull_request,
        rivals,
    }))
}

fn closed(seen: Seen) -> EnvironmentEvent {
    EnvironmentEvent::PullRequestClosed(Box::new(PullRequestClosed {
        project: seen.project,
        name: seen.name,
        pull_request: seen.pull_request,
    }))
}

fn stale(known: &PullRequest) -> Refusal {
    Refusal::new(
        "stale_delivery",
        format!(
            "pull request {} is known as it was at {} already",
            known.number, known.updated_at
        ),
        "nothing has to be done: a newer delivery came first",
    )
}

fn taken(name: &EnvironmentName) -> Refusal {
    Refusal::new(
        "environment_taken",
        format!("the environment {name} was not made for a pull request"),
        "delete it, or choose other names with `daybook hook add --prefix`",
    )
}

impl Preview {
    /// The preview that the first event about a pull request makes.
    pub(crate) fn opened(e: PullRequestOpened, at: At) -> Self {
        Self {
            pull_request: e.pull_request,
            open: true,
            rivals: Vec::new(),
            head_event: at.id,
            head_position: at.position,
            spec: e.spec,
            from: e.from,
            dismissed: false,
        }
    }

    /// The preview of a pull request of which nothing is known but that it is closed.
    pub(crate) fn closed(e: PullRequestClosed, at: At) -> Self {
        Self {
            pull_request: e.pull_request,
            open: false,
            rivals: Vec::new(),
            head_event: at.id,
            head_position: at.position,
            spec: EnvironmentSpec::default(),
            from: None,
            dismissed: false,
        }
    }

    pub(crate) fn update(&mut self, e: PullRequestUpdated, at: At) {
        if self.pull_request.head != e.pull_request.head || !self.rivals.is_empty() {
            self.lead(at);
        }
        self.pull_request = e.pull_request;
        self.rivals = e.rivals;
    }

    pub(crate) fn find_head(&mut self, e: PullRequestHeadFound, at: At) {
        self.lead(at);
        self.pull_request.head = e.head;
        self.rivals.clear();
    }

    fn lead(&mut self, at: At) {
        self.head_event = at.id;
        self.head_position = at.position;
    }
}
