//! Git for auditors: what compares the repositories of an export with its events.

use std::path::Path;
use std::process::{Command, Stdio};

use daybook_audit::{CompareRepository, Compared, Difference, Kind, Repository};
use daybook_events::gitops::GitopsEvent;
use daybook_events::{Position, with_causes};
use daybook_workers::gitops::BRANCH;
use daybook_workers::gitops::witness::{Problem, verify_repository};

/// Compares with `git` and what Daybook knows of its repositories.
#[derive(Debug)]
pub struct ByGit;

impl CompareRepository for ByGit {
    fn compare(
        &self,
        repository: &Repository,
        copied_at: Option<u64>,
        events: &mut dyn Iterator<Item = (Position, GitopsEvent)>,
    ) -> Result<Compared, String> {
        let folder = tempfile::tempdir().map_err(|e| e.to_string())?;
        let bare = folder.path().join("repository.git");
        let arguments = [
            "-c",
            "transfer.fsckObjects=true",
            "clone",
            "--quiet",
            "--mirror",
        ];
        git(&arguments, &[&repository.bundle, &bare])?;
        let mut events: Vec<(Position, GitopsEvent)> = events.collect();
        let newer = newer_than_head(&bare, copied_at, &mut events)?;
        let events = events.into_iter().map(|(_, event)| event);
        let report = verify_repository(&bare, events, None).map_err(|e| with_causes(&e))?;
        let difference = |finding: daybook_workers::gitops::witness::Finding| Difference {
            kind: kind_of(&finding.problem),
            commit: finding.commit.to_string(),
            message: finding.problem.to_string(),
        };
        Ok(Compared {
            project: repository.project.clone(),
            commits: report.commits,
            own: report.own,
            foreign: report.foreign,
            unsigned: report.unsigned,
            newer,
            differences: report.findings.into_iter().map(difference).collect(),
        })
    }
}

fn kind_of(problem: &Problem) -> Kind {
    match problem {
        Problem::NotRecorded => Kind::CommitUnrecorded,
        Problem::NotOnBranch => Kind::CommitMissing,
        Problem::Unsigned
        | Problem::BadSignature
        | Problem::UnknownKey(_)
        | Problem::OtherKey
        | Problem::UnexpectedSignature => Kind::CommitUnsigned,
        _ => Kind::CommitDiffers,
    }
}

/// The commit that an event records.
fn commit_of(event: &GitopsEvent) -> Option<&str> {
    Some(match event {
        GitopsEvent::RepositoryCreated(e) => e.commit.as_str(),
        GitopsEvent::Committed(e) if !e.unchanged => e.commit.as_str(),
        GitopsEvent::Reverted(e) => e.commit.as_str(),
        GitopsEvent::ForeignCommitFound(e) => e.commit.as_str(),
        _ => return None,
    })
}

/// Takes away the events that may be about what happened after the repository was copied: those after
/// the one that records the head of its branch, unless they were recorded before it was copied. Where
/// that is not known, a history that was rewritten in them keeps them all: then the head is one of
/// long ago. Returns how many commits they record.
fn newer_than_head(
    bare: &Path,
    copied_at: Option<u64>,
    events: &mut Vec<(Position, GitopsEvent)>,
) -> Result<u64, String> {
    let repository = git2::Repository::open_bare(bare).map_err(|e| e.message().to_owned())?;
    let head = repository
        .refname_to_id(&format!("refs/heads/{BRANCH}"))
        .map_err(|e| e.message().to_owned())?
        .to_string();
    let Some(last) = events
        .iter()
        .rposition(|(_, event)| commit_of(event) == Some(head.as_str()))
    else {
        return Ok(0);
    };
    let known = copied_at.map_or(0, |size| events.partition_point(|(at, _)| at.0 <= size));
    let first = known.max(last + 1);
    let newer = &events[first..];
    let is_rewrite = |event: &GitopsEvent| matches!(event, GitopsEvent::HistoryRewritten(_));
    let rewritten = copied_at.is_none() && newer.iter().any(|(_, event)| is_rewrite(event));
    let count = newer.iter().filter(|(_, e)| commit_of(e).is_some()).count();
    if count == 0 || rewritten {
        return Ok(0);
    }
    events.truncate(first);
    Ok(count as u64)
}

/// Runs git with no configuration but its own defaults.
fn git(arguments: &[&str], paths: &[&Path]) -> Result<(), String> {
    let ended = Command::new("git")
        .args(arguments)
        .args(paths)
        .env("GIT_CONFIG_NOSYSTEM", "1")
        .env("GIT_CONFIG_GLOBAL", "/dev/null")
        .env("GIT_TERMINAL_PROMPT", "0")
        .stdin(Stdio::null())
        .output()
        .map_err(|e| format!("git cannot be run: {e}"))?;
    if ended.status.success() {
        return Ok(());
    }
    Err(String::from_utf8_lossy(&ended.stderr).trim().to_owned())
}

#[cfg(test)]
mod tests {
    use daybook_events::Event;
    use serde_json::{Value, json};

    use super::*;

    /// An event as the golden files have it, with fields replaced.
    fn golden(kind: &str, fields: &[(&str, &str)]) -> GitopsEvent {
        let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/../events/tests/golden");
        let text = std::fs::read_to_string(format!("{folder}/{kind}.json")).unwrap();
        let mut event: Value = serde_json::from_str(&text).unwrap();
        for (field, value) in fields {
            event["data"][field] = json!(value);
        }
        let event = Event::from_bytes(event.to_string().as_bytes()).unwrap();
        event.payload().unwrap()
    }

    /// A repository with so many commits on its branch, oldest first.
    fn repository(folder: &Path, commits: usize) -> Vec<String> {
        let repository = git2::Repository::init_bare(folder).unwrap();
        let who = git2::Signature::new("a", "a@example.com", &git2::Time::new(0, 0)).unwrap();
        let tree = repository.treebuilder(None).unwrap().write().unwrap();
        let tree = repository.find_tree(tree).unwrap();
        let mut all: Vec<git2::Oid> = Vec::new();
        for number in 0..commits {
            let parents = all.last().map(|id| repository.find_commit(*id).unwrap());
            let parents: Vec<&git2::Commit<'_>> = parents.iter().collect();
            let branch = Some("refs/heads/main");
            let message = number.to_string();
            let commit = repository.commit(branch, &who, &who, &message, &tree, &parents);
            all.push(commit.unwrap());
        }
        all.iter().map(ToString::to_string).collect()
    }

    #[test]
    fn only_what_may_be_newer_than_the_copy_is_not_compared() {
        let folder = tempfile::tempdir().unwrap();
        let head = repository(folder.path(), 2).remove(1);
        let committed = |commit: &str| golden("gitops.committed.v1", &[("commit", commit)]);
        let (later, last) = ("1".repeat(40), "2".repeat(40));
        let story = || {
            vec![
                (Position(3), committed(&head)),
                (Position(5), committed(&later)),
                (Position(9), committed(&last)),
            ]
        };
        let rewritten = || {
            let mut events = story();
            events.push((Position(11), golden("gitops.history_rewritten.v1", &[])));
            events
        };
        for (mut events, copied_at, newer, left) in [
            (story(), None, 2, 1),
            (story(), Some(2), 2, 1),
            (story(), Some(5), 1, 2),
            (story(), Some(9), 0, 3),
            // Who knows no position sees that the head is one of long ago.
            (rewritten(), None, 0, 4),
            (rewritten(), Some(5), 1, 2),
            (rewritten(), Some(12), 0, 4),
        ] {
            let what = format!("{} events, {copied_at:?}", events.len());
            let found = newer_than_head(folder.path(), copied_at, &mut events).unwrap();
            assert_eq!((found, events.len()), (newer, left), "{what}");
        }
    }
}
