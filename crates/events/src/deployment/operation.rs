//! Which operations are possible, and for those that are not: why, and what would make them so.
//!
//! Both follow from [`TRANSITIONS`]: an operation is possible where its event may follow, and the
//! way to where it is possible is the shortest one through the table.

use std::collections::VecDeque;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{Deployment, Operation, Status, TRANSITIONS, Transition};
use crate::aggregate::Refusal;

/// An operation, and whether it is possible now.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Possibility {
    /// The operation.
    pub name: Operation,
    /// Whether it is possible now.
    pub possible: bool,
    /// Why it is not.
    pub reason: Option<String>,
    /// What would make it possible.
    pub remedy: Option<String>,
}

impl Operation {
    /// The operation as the command that asks for it.
    pub fn command(self) -> &'static str {
        match self {
            Self::Cancel => "cancel",
            Self::Stop => "stop",
            Self::Start => "start",
            Self::Retry => "retry",
            Self::Terminate => "terminate",
            Self::Delete => "delete",
            Self::MarkMain => "mark-main",
            Self::Redeploy => "redeploy",
            Self::Keep => "keep",
            Self::Approve => "approvals approve",
            Self::Reject => "approvals reject",
            Self::Override => "approvals override",
            Self::OverrideFreeze => "freeze override",
            Self::Review => "approvals review",
        }
    }

    /// The operation that an event asks for.
    fn of(kind: &str) -> Option<Self> {
        Some(match kind {
            "deployment.cancel_requested.v1" => Self::Cancel,
            "deployment.stop_requested.v1" => Self::Stop,
            "deployment.start_requested.v1" => Self::Start,
            "deployment.retry_requested.v1" => Self::Retry,
            "deployment.terminate_requested.v1" => Self::Terminate,
            "deployment.deleted.v1" => Self::Delete,
            "deployment.stop_unscheduled.v1" => Self::Keep,
            _ => return None,
        })
    }

    /// What to do where no way leads to it.
    fn instead(self) -> &'static str {
        match self {
            Self::Cancel => {
                "it is possible only before a deployment is live; `daybook stop` ends what runs"
            }
            Self::Retry => "it is possible only after a partial success",
            Self::Delete => "its record is put away already",
            _ => "it has ended; `daybook redeploy` makes a new deployment of the same",
        }
    }
}

impl Deployment {
    /// Each operation, with whether it is possible now, and if not, why and what would make it so.
    pub fn possibilities(&self) -> Vec<Possibility> {
        let all = Operation::ALL.into_iter();
        // Where nobody was asked, nobody is told how to be.
        let all = all.filter(|o| match o {
            Operation::Approve | Operation::Reject | Operation::Override => self.approval.is_some(),
            Operation::OverrideFreeze => self.hold.is_some(),
            Operation::Review => self.approval.is_some() || self.hold.is_some(),
            _ => true,
        });
        let all = all.map(|name| {
            let refusal = self.refusal_of(name);
            Possibility {
                name,
                possible: refusal.is_none(),
                reason: refusal.as_ref().map(|r| r.message.clone()),
                remedy: refusal.map(|r| r.remedy),
            }
        });
        all.collect()
    }

    /// Why an operation is not possible now.
    pub fn refusal_of(&self, operation: Operation) -> Option<Refusal> {
        if !operation.allowed_in().contains(&self.status) {
            return Some(refusal(operation, self.status));
        }
        match operation {
            Operation::Redeploy if !self.is_pinned() && self.source.is_none() => {
                Some(Refusal::new(
                    "nothing_to_redeploy",
                    "it is not known yet what it runs, or it ended before that was known",
                    "deploy the version that you want by name",
                ))
            }
            Operation::MarkMain if !self.serves() => Some(Refusal::new(
                "target_not_ready",
                "it runs, but is not ready",
                "look at `daybook status` for the cause",
            )),
            Operation::Keep if self.stops.pending.is_none() => Some(Refusal::new(
                "no_stop_scheduled",
                "nothing would stop the deployment by itself",
                "wait until a stop is scheduled; `daybook status` shows it",
            )),
            Operation::OverrideFreeze if self.held().is_none() => Some(crate::freeze::not_held()),
            Operation::Review if !self.needs_review() => Some(crate::approval::no_review()),
            Operation::Retry if self.failed_clusters().is_empty() => Some(Refusal::new(
                "nothing_to_retry",
                "no cluster of the deployment has failed",
                "wait for those that are being tried again; `daybook status` shows them",
            )),
            _ => None,
        }
    }
}

/// That an operation is not possible in a state, and how it becomes so.
fn refusal(operation: Operation, status: Status) -> Refusal {
    Refusal::new(
        "illegal_state",
        format!(
            "`{}` is not possible while the deployment is {}",
            operation.command(),
            status.as_str()
        ),
        ways_to(operation, status),
    )
}

/// That an event may not follow on a state.
pub(super) fn not_in_this_state(row: &Transition, state: &Deployment) -> Refusal {
    if let Some(operation) = Operation::of(row.kind) {
        return refusal(operation, state.status);
    }
    let states: Vec<_> = row.from.iter().map(|s| s.as_str()).collect();
    let what = row.kind.trim_start_matches("deployment.");
    let what = what.trim_end_matches(".v1").replace('_', " ");
    Refusal::new(
        "illegal_state",
        format!(
            "`{what}` is not possible while the deployment is {}",
            state.status.as_str()
        ),
        format!("it is possible in: {}", states.join(", ")),
    )
}

/// What leads from a state to one in which an operation is possible, in words.
pub fn ways_to(operation: Operation, status: Status) -> String {
    let goal = operation.allowed_in();
    let Some(way) = shortest(status, goal) else {
        return operation.instead().to_owned();
    };
    let mut words: Vec<String> = Vec::new();
    let mut waits_for = None;
    for (command, to) in way {
        match command {
            Some(command) => {
                // What a command leads to is waited for without being told.
                if words.is_empty()
                    && let Some(state) = waits_for.take()
                {
                    words.push(waiting(state));
                }
                words.push(format!("`daybook {command}` it"));
                waits_for = None;
            }
            None => waits_for = Some(to),
        }
    }
    if words.is_empty()
        && let Some(state) = waits_for
    {
        return waiting(state);
    }
    format!("first {}", words.join(", then "))
}

fn waiting(state: Status) -> String {
    format!("wait until it is {}", state.as_str())
}

/// The shortest way through the table: each step with the command that begins it, if somebody has
/// to give one, and where it leads. What goes wrong is no way to anywhere.
fn shortest(from: Status, goal: &[Status]) -> Option<Vec<(Option<&'static str>, Status)>> {
    let mut came_by: Vec<(Status, Status, Option<&'static str>)> = Vec::new();
    let mut next = VecDeque::from([from]);
    while let Some(at) = next.pop_front() {
        for row in TRANSITIONS.iter().filter(|row| row.from.contains(&at)) {
            let Some(to) = row.to else { continue };
            let command = match row.kind {
                "deployment.cancelled.v1" => Some(Operation::Cancel.command()),
                kind => Operation::of(kind).map(Operation::command),
            };
            let wrong = matches!(
                to,
                Status::Failed
                    | Status::StartError
                    | Status::StopError
                    | Status::TerminateError
                    | Status::PartiallyStarted
            );
            if wrong || to == from || came_by.iter().any(|(known, ..)| *known == to) {
                continue;
            }
            came_by.push((to, at, command));
            if goal.contains(&to) {
                let mut way = Vec::new();
                let mut end = to;
                while end != from {
                    let (to, at, command) = came_by.iter().find(|(to, ..)| *to == end)?;
                    way.push((*command, *to));
                    end = *at;
                }
                way.reverse();
                return Some(way);
            }
            next.push_back(to);
        }
    }
    None
}
