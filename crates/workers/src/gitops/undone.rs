//! Whether somebody's commit takes a deployment back: `git revert` of a commit of Daybook, and
//! nothing else.

use std::path::Path;

use daybook_events::gitops::UndoneDeployment;
use daybook_events::{CommitId, EnvironmentName};
use git2::{Oid, Repository};

use super::history;
use super::signing::{self, Verdict};
use crate::values::EnvironmentValues;

/// What a commit changes in one environment.
struct Step {
    environment: EnvironmentName,
    before: EnvironmentValues,
    after: EnvironmentValues,
}

/// The deployment that `commit`, which says that it reverts `reverted`, takes back. None unless all
/// of this holds, whatever its message says: `reverted` carries Daybook's signature and brought a
/// deployment into an environment; `commit` takes exactly that release out again, gives the service
/// back the image that it had before, and changes nothing else.
pub(super) fn deployment(
    repository: &Repository,
    commit: Oid,
    reverted: &CommitId,
    signers: &[String],
) -> Result<Option<UndoneDeployment>, git2::Error> {
    let reverted = Oid::from_str(reverted.as_str())?;
    if !matches!(
        signing::verify(repository, reverted, signers)?,
        Verdict::Good(_)
    ) {
        return Ok(None);
    }
    let made = repository.find_commit(reverted)?;
    let Some(deployment) = history::trailers_of(&made).deployment else {
        return Ok(None);
    };
    let (Some(made), Some(undone)) = (step(repository, reverted)?, step(repository, commit)?)
    else {
        return Ok(None);
    };
    if made.environment != undone.environment {
        return Ok(None);
    }
    let has = |values: &EnvironmentValues, service| {
        values
            .services
            .get(service)
            .is_some_and(|s| s.lists(&deployment))
    };
    let mut services = made.after.services.keys();
    let Some(service) = services
        .find(|s| has(&made.after, s) && !has(&made.before, s) && has(&undone.before, s))
        .cloned()
    else {
        return Ok(None);
    };
    let Some(earlier) = made.before.services.get(&service) else {
        // It was the first of its service: there is nothing to go back to.
        return Ok(None);
    };
    let mut expected = undone.before.clone();
    if let Some(left) = expected.services.get_mut(&service) {
        left.releases.remove(&deployment);
        left.charts.remove(&deployment);
        left.image = earlier.image.clone();
    }
    Ok((expected == undone.after).then_some(UndoneDeployment {
        environment: undone.environment,
        service,
        deployment,
    }))
}

/// What a commit with one parent changes, if that is the values of one environment and nothing
/// else but what Daybook keeps for itself.
fn step(repository: &Repository, commit: Oid) -> Result<Option<Step>, git2::Error> {
    let commit = repository.find_commit(commit)?;
    let mut parents = commit.parents();
    let (Some(parent), None) = (parents.next(), parents.next()) else {
        return Ok(None);
    };
    let difference =
        repository.diff_tree_to_tree(Some(&parent.tree()?), Some(&commit.tree()?), None)?;
    let mut changed = None;
    for delta in difference.deltas() {
        for path in [delta.old_file().path(), delta.new_file().path()] {
            let path = path.and_then(Path::to_str).unwrap_or_default();
            if path.starts_with(".daybook/") {
                continue;
            }
            if changed.as_deref().is_some_and(|known| known != path) {
                return Ok(None);
            }
            changed = Some(path.to_owned());
        }
    }
    let Some(path) = changed else {
        return Ok(None);
    };
    let environment = path
        .strip_prefix("environments/")
        .and_then(|rest| rest.strip_suffix("/values.yaml"))
        .and_then(|name| EnvironmentName::parse(name).ok());
    let values = |commit: &git2::Commit<'_>| -> Option<EnvironmentValues> {
        let entry = commit.tree().ok()?.get_path(Path::new(&path)).ok()?;
        let blob = repository.find_blob(entry.id()).ok()?;
        EnvironmentValues::from_yaml(std::str::from_utf8(blob.content()).ok()?).ok()
    };
    Ok(match (environment, values(&parent), values(&commit)) {
        (Some(environment), Some(before), Some(after)) => Some(Step {
            environment,
            before,
            after,
        }),
        _ => None,
    })
}
