//! Keeps the address of a branch at the newest ready deployment of that branch.

use daybook_events::Subject;
use daybook_events::deployment::Status;
use daybook_events::routing::{self, Command, Hostnames, Routing, Target};
use daybook_projections::DeploymentRow;

use super::{Bench, Stop};
use crate::ports::StepError;

const ROLE: &str = "route";

/// A deployment as the route table is told of it.
pub(super) fn target(row: &DeploymentRow) -> Target {
    Target {
        deployment: row.id,
        instance: row.state.request.instance.clone(),
        status: row.state.status,
        ready: row.state.serves(),
    }
}

/// The other deployments of its branch that run and are ready, newest first.
fn siblings(bench: &Bench, row: &DeploymentRow) -> Result<Vec<DeploymentRow>, Stop> {
    if row.state.branch.is_none() {
        return Ok(Vec::new());
    }
    let projections = bench.ledger.projections();
    let mut rows = projections.active_of(&row.state.request.instance)?;
    rows.retain(|other| {
        other.id != row.id
            && other.state.branch == row.state.branch
            && matches!(
                other.state.status,
                Status::Started | Status::PartiallyStarted
            )
            && other.state.serves()
    });
    Ok(rows)
}

/// The deployment that gets the address of the branch when this one goes.
pub(super) fn heir(bench: &Bench, row: &DeploymentRow) -> Result<Option<Target>, Stop> {
    Ok(siblings(bench, row)?.first().map(target))
}

/// The same addresses, with that of the branch if this is the newest deployment of it.
pub(super) fn with_address(
    bench: &Bench,
    row: &DeploymentRow,
    hostnames: Hostnames,
) -> Result<Hostnames, Stop> {
    let Some(branch) = &row.state.branch else {
        return Ok(hostnames);
    };
    let newer = |other: &DeploymentRow| other.created > row.created;
    if siblings(bench, row)?.iter().any(newer) {
        return Ok(hostnames);
    }
    hostnames.with_branch(branch).map_err(|e| {
        Stop::Fail(StepError::fatal(
            e.code,
            e.to_string(),
            "use a shorter domain for this server",
        ))
    })
}

/// Leads the address of the branch to a deployment that runs again, if it is the newest.
pub(super) async fn follow(bench: &Bench, row: &DeploymentRow) -> Result<(), Stop> {
    if row.state.branch.is_none() {
        return Ok(());
    }
    let instance = &row.state.request.instance;
    let hostnames = Hostnames::under(&bench.settings.domain, instance, row.id, false);
    let Ok(hostnames) = hostnames else {
        return Ok(());
    };
    let command = Command::FollowBranch {
        target: target(row),
        hostnames: with_address(bench, row, hostnames)?,
    };
    let subject = Subject::Routing(instance.project.clone());
    let context = bench.follow_up(ROLE, row.state.status_event, row.id.0, "branch_followed");
    let followed = bench
        .append::<Routing>(&subject, &context, |state| {
            routing::decide(state, command.clone())
        })
        .await;
    match followed {
        // It has stopped meanwhile.
        Err(Stop::Moved(_)) => Ok(()),
        other => other.map(|_| ()),
    }
}
