//! What Argo CD says of one commit. What it says of any other is of no interest.

use std::collections::BTreeSet;

use daybook_events::CommitId;
use daybook_workers::target::{Cause, Problem};

use super::Application;
use super::application::OperationState;

/// How far Argo CD has come with a commit.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum State {
    /// The cluster is as the commit says.
    Synced,
    /// It is not there yet, or not any more.
    Waiting(Problem),
    /// It will not get there by itself.
    Failed {
        /// Why.
        problem: Problem,
        /// The names of the objects that it could not apply; none if it tried none.
        refused: BTreeSet<String>,
    },
}

impl State {
    /// What an Application says about a commit.
    pub(crate) fn of(application: Option<&Application>, commit: &CommitId) -> Self {
        let Some(application) = application else {
            return waiting(commit, "it has not seen the Application yet");
        };
        let status = &application.status;
        let sync = &status.sync;
        let compared = sync.compared_to.source.target_revision == commit.as_str();
        // A spec that is not valid is compared with nothing.
        let error = status
            .conditions
            .iter()
            .find(|c| c.kind == "InvalidSpecError" || compared && c.kind.ends_with("Error"));
        let last = status.operation_state.as_ref();
        let last = last.filter(|o| o.revision() == commit.as_str());
        let asked_again = application.operation.is_some();
        if sync.status == "Synced" && sync.revision == commit.as_str() && error.is_none() {
            return Self::Synced;
        }
        match last.map(|o| (o.phase.as_str(), o)) {
            Some(("Failed" | "Error", last)) if !asked_again => return failed(commit, last),
            Some(("Running", last)) if !last.message.is_empty() => {
                return waiting(commit, &format!("it syncs: {}", short(&last.message)));
            }
            _ => {}
        }
        match error {
            Some(error) => waiting(
                commit,
                &format!("{}: {}", error.kind, short(&error.message)),
            ),
            None if compared => waiting(commit, &format!("it says {}", sync.status)),
            None => waiting(commit, "it has not looked at it"),
        }
    }

    /// What keeps a release from being what the commit says. A sync that has failed keeps only
    /// those releases whose objects it could not apply, and those that are not yet as they are to
    /// be: `fits` says whether this one is.
    pub(crate) fn problem_of(&self, release: &str, fits: bool) -> Option<&Problem> {
        match self {
            Self::Synced => None,
            Self::Waiting(problem) => Some(problem),
            Self::Failed { problem, refused } => {
                let concerned = !fits || refused.contains(release);
                concerned.then_some(problem)
            }
        }
    }
}

fn waiting(commit: &CommitId, why: &str) -> State {
    State::Waiting(Problem::new(
        Cause::SyncPending,
        format!(
            "Argo CD has not synced commit {} yet: {why}",
            commit.short()
        ),
        "If this lasts: check that Argo CD's application controller and repo server run, and that \
         they reach the GitOps repository.",
        true,
    ))
}

fn failed(commit: &CommitId, last: &OperationState) -> State {
    let results = last.sync_result.iter().flat_map(|r| &r.resources);
    let refused: Vec<_> = results.filter(|r| r.status == "SyncFailed").collect();
    let said = refused.iter().take(3);
    let said = said.map(|r| format!("{} {}: {}", r.kind, r.name, short(&r.message)));
    let why = if refused.is_empty() {
        short(&last.message)
    } else {
        said.collect::<Vec<_>>().join("; ")
    };
    let problem = Problem::new(
        Cause::SyncFailed,
        format!("Argo CD could not sync commit {}: {why}", commit.short()),
        "Mend what it names and ask again with `daybook retry`, or deploy again.",
        false,
    );
    State::Failed {
        problem,
        refused: refused.iter().map(|r| r.name.clone()).collect(),
    }
}

/// The beginning of a message, as much of it as is quoted.
pub(super) fn short(text: &str) -> String {
    const MOST: usize = 400;
    let text = text.trim();
    let mut short: String = text.chars().take(MOST).collect();
    if short.len() < text.len() {
        short.push('…');
    }
    short
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn commit(digit: &str) -> CommitId {
        CommitId::parse(digit.repeat(40)).unwrap()
    }

    fn state(status: Value) -> State {
        let application = json!({ "metadata": { "name": "x" }, "status": status });
        let application: Application = serde_json::from_value(application).unwrap();
        State::of(Some(&application), &commit("a"))
    }

    fn sync(status: &str, digit: &str) -> Value {
        json!({
            "status": status,
            "revision": commit(digit),
            "comparedTo": { "source": { "targetRevision": commit(digit), "repoURL": "x" } },
        })
    }

    fn operation(phase: &str, digit: &str) -> Value {
        json!({
            "phase": phase,
            "message": "one or more objects failed to apply",
            "startedAt": "2026-01-01T00:00:00Z",
            "operation": { "sync": { "revision": commit(digit) } },
            "syncResult": { "revision": commit(digit), "resources": [{
                "kind": "Deployment",
                "name": "web-1",
                "status": "SyncFailed",
                "message": "admission webhook denied it",
            }]},
        })
    }

    fn message(state: &State) -> &str {
        state
            .problem_of("web-1", true)
            .map_or("", |problem| &problem.message)
    }

    #[test]
    fn only_what_is_said_of_this_commit_counts() {
        assert_eq!(state(json!({ "sync": sync("Synced", "a") })), State::Synced);
        for stale in [
            json!({}),
            json!({ "sync": sync("Synced", "b") }),
            json!({ "sync": sync("OutOfSync", "b"), "operationState": operation("Failed", "b") }),
            json!({ "sync": sync("Synced", "b"), "operationState": operation("Succeeded", "b") }),
            json!({ "sync": sync("Unknown", "b"), "conditions": [
                { "type": "ComparisonError", "message": "of before" }
            ]}),
        ] {
            let state = state(stale.clone());
            assert!(
                message(&state).contains("has not looked"),
                "{stale}: {state:?}"
            );
        }
        assert!(matches!(State::of(None, &commit("a")), State::Waiting(_)));
    }

    #[test]
    fn a_sync_that_failed_says_which_object_and_why() {
        let status = json!({
            "sync": sync("OutOfSync", "a"),
            "operationState": operation("Failed", "a"),
        });
        let failed = state(status.clone());
        // Of what it could apply nothing is said.
        assert_eq!(failed.problem_of("web-2", true), None);
        assert!(failed.problem_of("web-2", false).is_some());
        assert!(message(&failed).contains("Deployment web-1: admission webhook denied it"));

        // Once it is asked for again, that is over.
        let application = json!({
            "metadata": { "name": "x" },
            "operation": { "sync": {} },
            "status": status,
        });
        let application: Application = serde_json::from_value(application).unwrap();
        let again = State::of(Some(&application), &commit("a"));
        assert!(matches!(again, State::Waiting(_)), "{again:?}");
    }

    #[test]
    fn what_keeps_it_from_being_compared_is_said() {
        let status = json!({ "sync": sync("Unknown", "a"), "conditions": [
            { "type": "ComparisonError", "message": "repository not accessible" },
            { "type": "SharedResourceWarning", "message": "of no interest" },
        ]});
        assert!(message(&state(status)).contains("ComparisonError: repository not accessible"));
        let status = json!({ "conditions": [
            { "type": "InvalidSpecError", "message": "project shop does not exist" },
        ]});
        assert!(message(&state(status)).contains("project shop does not exist"));
        let status = json!({ "sync": sync("OutOfSync", "a") });
        assert!(message(&state(status)).contains("it says OutOfSync"));
    }
}
