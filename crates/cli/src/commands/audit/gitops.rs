//! Git for auditors: what compares the repositories of an export with its events.

use std::path::Path;
use std::process::{Command, Stdio};

use daybook_audit::{CompareRepository, Compared, Difference, Kind, Repository};
use daybook_events::gitops::GitopsEvent;
use daybook_events::with_causes;
use daybook_workers::gitops::BRANCH;
use daybook_workers::gitops::witness::{Problem, verify_repository};

/// Compares with `git` and what Daybook knows of its repositories.
#[derive(Debug)]
pub struct ByGit;

impl CompareRepository for ByGit {
    fn compare(
        &self,
        repository: &Repository,
        events: &mut dyn Iterator<Item = GitopsEvent>,
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
        let mut events: Vec<GitopsEvent> = events.collect();
        let newer = newer_than_head(&bare, &mut events)?;
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

/// Takes away the events after the one that records the head of the branch: they are about what
/// happened after the repository was copied. Returns how many commits they record.
fn newer_than_head(bare: &Path, events: &mut Vec<GitopsEvent>) -> Result<u64, String> {
    let repository = git2::Repository::open_bare(bare).map_err(|e| e.message().to_owned())?;
    let head = repository
        .refname_to_id(&format!("refs/heads/{BRANCH}"))
        .map_err(|e| e.message().to_owned())?
        .to_string();
    let Some(last) = events
        .iter()
        .rposition(|e| commit_of(e) == Some(head.as_str()))
    else {
        return Ok(0);
    };
    let newer = events[last + 1..].iter();
    let count = newer.filter(|e| commit_of(e).is_some()).count();
    if count > 0 {
        events.truncate(last + 1);
    }
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
