//! Concludes rollouts, starts and new tries, from what each cluster has come to.
//!
//! Clusters do not wait for each other: one that is ready is ready, and one that has failed for
//! good, or has not become ready by its deadline, has failed alone. Once there is nothing left to
//! wait for, a deployment that is ready in all of its clusters has succeeded, in some of them has
//! partially succeeded, and in none has failed.

use std::time::Duration;

use daybook_events::deployment::{
    ClusterFailed, ClusterState, Deployment, DeploymentEvent, OperationFailed, PartiallySucceeded,
    Status, Succeeded, SwitchMode,
};
use daybook_events::routing::Routing;
use daybook_events::{ClusterName, Subject};
use daybook_projections::DeploymentRow;
use jiff::Timestamp;

use super::route::{assign, done, replicas, routed, withdraw};
use super::{Bench, Stop, branch};
use crate::ports::StepError;

const ROLE: &str = "route";

/// How long after the workload's own deadline a rollout is given up, when nobody reports on it.
const MARGIN: Duration = Duration::from_secs(15);

/// How long clusters may take to show that nothing of a deployment runs any more.
const GONE: Duration = Duration::from_secs(180);

fn passed(since: Timestamp) -> Duration {
    Duration::try_from(Timestamp::now().duration_since(since)).unwrap_or_default()
}

/// How long a deployment may be in its status, or in a new try.
fn deadline(state: &Deployment) -> Duration {
    match state.status {
        Status::Stopping | Status::Terminating => GONE,
        _ => Duration::from_secs(state.request.run.health.deadline_seconds.into()) + MARGIN,
    }
}

/// When what a deployment is about is given up, from now on; none if it is about nothing.
pub(super) fn until_deadline(state: &Deployment) -> Option<Duration> {
    let since = match state.status {
        Status::Deploying | Status::Starting | Status::Stopping | Status::Terminating => {
            state.status_since
        }
        Status::PartiallyStarted => {
            let under_way = under_way(state).filter_map(|c| state.clusters.get(c));
            under_way.map(|p| p.tried_at).max()?
        }
        _ => return None,
    };
    let left = deadline(state).saturating_sub(passed(since));
    Some(left.max(Duration::from_millis(100)))
}

/// The clusters that are neither ready nor known to have failed.
fn under_way(state: &Deployment) -> impl Iterator<Item = &ClusterName> {
    let clusters = state.request.clusters.iter();
    clusters.filter(|c| {
        matches!(
            state.cluster_state(c),
            Some(ClusterState::Pending | ClusterState::Syncing | ClusterState::Starting)
        )
    })
}

/// Records that what is overdue has failed, in each cluster by itself.
async fn give_up_overdue(bench: &Bench, mut row: DeploymentRow) -> Result<DeploymentRow, Stop> {
    let allowed = deadline(&row.state);
    let of_all = row.state.status != Status::PartiallyStarted;
    let overdue: Vec<_> = under_way(&row.state)
        .filter_map(|cluster| Some((cluster.clone(), row.state.clusters.get(cluster)?)))
        .filter(|(_, progress)| {
            let since = match of_all {
                true => row.state.status_since,
                false => progress.tried_at,
            };
            passed(since) >= allowed
        })
        .map(|(cluster, progress)| (cluster, progress.tries))
        .collect();
    for (cluster, tries) in overdue {
        let seen = row.state.observed.get(&cluster);
        let late = format!("it was not seen ready in time in {cluster}");
        let (message, remedy) = match seen.and_then(|o| o.problem.as_ref()) {
            Some(p) => (
                format!("{late}: {} ({})", p.message, p.reason),
                p.remedy.clone(),
            ),
            None => {
                let remedy = "check that a worker looks after the cluster, and `daybook logs`";
                (late, remedy.to_owned())
            }
        };
        let event = ClusterFailed {
            cluster: cluster.clone(),
            code: "rollout_timeout".into(),
            message,
            remedy,
        };
        let failed = fail_in(bench, ROLE, &row, event, tries).await;
        row = match failed {
            Err(Stop::Moved(_)) => bench.reread(&row, None).await?,
            other => other?,
        };
    }
    Ok(row)
}

/// Records that a deployment has failed in one of its clusters, in this try.
pub(super) async fn fail_in(
    bench: &Bench,
    role: &str,
    row: &DeploymentRow,
    failed: ClusterFailed,
    tries: u32,
) -> Result<DeploymentRow, Stop> {
    let step = format!("cluster_failed {} {tries}", failed.cluster);
    let text = format!("failed: {} ({})", failed.message, failed.code);
    bench.say(row.id, Some(failed.cluster.clone()), text).await;
    let event = DeploymentEvent::ClusterFailed(failed);
    bench.advance(role, row, &step, event).await
}

/// Records that a step for one cluster will not work: in that cluster only. A deployment that is
/// not on its way there has nothing to do with it.
pub(super) async fn settle_in(
    bench: &Bench,
    role: &str,
    id: daybook_events::DeploymentId,
    cluster: &ClusterName,
    error: StepError,
) -> Result<(), Stop> {
    let Some(row) = bench.row(id)? else {
        return Ok(());
    };
    let Some(progress) = row.state.clusters.get(cluster) else {
        return Ok(());
    };
    let concerned = matches!(
        row.state.status,
        Status::Deploying | Status::Starting | Status::PartiallyStarted
    );
    if !concerned || progress.state == ClusterState::Started {
        return Ok(());
    }
    let tries = progress.tries;
    let failed = ClusterFailed {
        cluster: cluster.clone(),
        code: error.code,
        message: error.message,
        remedy: error.remedy,
    };
    fail_in(bench, role, &row, failed, tries).await.map(|_| ())
}

/// Why a deployment has failed that has failed in all of its clusters; none if it has not.
fn failed_everywhere(state: &Deployment) -> Option<StepError> {
    let failed = state.failed_clusters();
    let first = failed.first()?;
    if failed.len() < state.request.clusters.len() {
        return None;
    }
    let all: Vec<_> = failed
        .iter()
        .map(|f| format!("{}: {}", f.cluster, f.message))
        .collect();
    Some(StepError::fatal(
        &first.code,
        all.join("; "),
        first.remedy.clone(),
    ))
}

/// A deployment that is being deployed.
pub(super) async fn deploying(bench: &Bench, row: DeploymentRow) -> Result<(), Stop> {
    let row = give_up_overdue(bench, row).await?;
    let state = &row.state;
    if let Some(error) = failed_everywhere(state) {
        return Err(Stop::Fail(error));
    }
    let whole = state.workload_is_ready();
    if !whole && !state.may_end_partially() {
        return Ok(());
    }
    let Some(commit) = state.commit.clone() else {
        return Ok(());
    };
    let automatic = state.request.switch == SwitchMode::Automatic;
    let take_over = automatic && (whole || state.request.allow_partial);
    assign(bench, &row, take_over).await?;
    // Another process may have ended it before that, and found no route to withdraw.
    let row = bench.reread(&row, None).await?;
    if matches!(row.state.status, Status::Failed | Status::Cancelled) {
        return withdraw(bench, &row).await;
    }
    let (table, applied, main) = routed(bench, &row)?;
    if !applied {
        if passed(row.state.status_since) >= deadline(&row.state) {
            return Err(Stop::Fail(StepError::fatal(
                "routes_not_applied",
                "it is ready, but no gateway has applied its routes in time",
                "check that a process with the gateway role runs",
            )));
        }
        return Ok(());
    }
    let takes = if main {
        "it takes the traffic of its service"
    } else {
        "it runs beside the main deployment"
    };
    if whole {
        let event = DeploymentEvent::Succeeded(Succeeded {
            revision: commit,
            table,
        });
        bench.say(row.id, None, format!("succeeded: {takes}")).await;
        bench.advance(ROLE, &row, "succeeded", event).await?;
        return Ok(());
    }
    partially(bench, &row, table, takes).await
}

/// Records a partial success, unless what it is about has changed meanwhile.
async fn partially(
    bench: &Bench,
    row: &DeploymentRow,
    table: u32,
    takes: &str,
) -> Result<(), Stop> {
    let state = &row.state;
    let revision = state.change.as_ref().map(|c| &c.commit);
    let Some(revision) = revision.or(state.commit.as_ref()).cloned() else {
        return Ok(());
    };
    if !state.may_end_partially() {
        return Ok(());
    }
    let ready: Vec<_> = state.clusters_in(ClusterState::Started).cloned().collect();
    let failed = state.failed_clusters();
    let names = |names: &mut dyn Iterator<Item = &ClusterName>| {
        let names: Vec<_> = names.map(ToString::to_string).collect();
        names.join(", ")
    };
    let text = format!(
        "partially succeeded: ready in {}, failed in {}; {takes}",
        names(&mut ready.iter()),
        names(&mut failed.iter().map(|f| &f.cluster)),
    );
    bench.say(row.id, None, text).await;
    let event = DeploymentEvent::PartiallySucceeded(PartiallySucceeded {
        revision,
        table,
        ready,
        failed,
    });
    let step = "partially_succeeded";
    bench.advance(ROLE, row, step, event).await.map(|_| ())
}

/// A deployment that runs in some of its clusters: once it runs in all of them it is whole, and
/// takes over traffic as it would have done in the first place.
pub(super) async fn partially_started(bench: &Bench, row: DeploymentRow) -> Result<(), Stop> {
    let row = give_up_overdue(bench, row).await?;
    let Some(commit) = row.state.commit.clone() else {
        return Ok(());
    };
    if !row.state.workload_is_ready() {
        return Ok(());
    }
    let automatic = row.state.request.switch == SwitchMode::Automatic;
    let take_over = automatic && !is_outdated(bench, &row)?;
    assign(bench, &row, take_over).await?;
    let row = bench.reread(&row, None).await?;
    let (table, applied, main) = routed(bench, &row)?;
    if !applied {
        return Ok(());
    }
    let takes = if main {
        "it takes the traffic of its service"
    } else {
        "it runs beside the main deployment"
    };
    let text = format!("succeeded in all of its clusters: {takes}");
    bench.say(row.id, None, text).await;
    let event = DeploymentEvent::Succeeded(Succeeded {
        revision: commit,
        table,
    });
    bench.advance(ROLE, &row, "whole", event).await.map(|_| ())
}

/// Whether a deployment that was asked for later is the main one by now.
fn is_outdated(bench: &Bench, row: &DeploymentRow) -> Result<bool, Stop> {
    let instance = &row.state.request.instance;
    let subject = Subject::Routing(instance.project.clone());
    let folded = bench.ledger.projections().shared::<Routing>(&subject)?;
    let main = folded
        .state
        .as_ref()
        .and_then(|r| r.traffic(instance)?.main);
    let main = main.map(|id| bench.row(id)).transpose()?.flatten();
    Ok(main.is_some_and(|main| main.created > row.created))
}

/// A deployment that is being started again.
pub(super) async fn starting(bench: &Bench, row: DeploymentRow) -> Result<(), Stop> {
    if replicas(&row.state) == Some(0) && passed(row.state.status_since) < deadline(&row.state) {
        // The commit that starts it is still to come.
        return Ok(());
    }
    let row = give_up_overdue(bench, row).await?;
    if let Some(error) = failed_everywhere(&row.state) {
        let event = DeploymentEvent::StartFailed(OperationFailed {
            code: error.code,
            message: error.message,
            remedy: error.remedy,
        });
        return bench
            .advance(ROLE, &row, "start_failed", event)
            .await
            .map(|_| ());
    }
    if row.state.workload_is_ready() {
        done(bench, &row, "started", DeploymentEvent::RestartDone).await?;
        return branch::follow(bench, &bench.reread(&row, None).await?).await;
    }
    let (table, ..) = routed(bench, &row)?;
    partially(bench, &row, table, "its routes stay as they are").await
}

/// Why a deployment could not be stopped or removed, once that has taken too long.
pub(super) fn not_gone(state: &Deployment) -> Option<OperationFailed> {
    if passed(state.status_since) < deadline(state) {
        return None;
    }
    let there = state.request.clusters.iter().filter(|c| {
        !matches!(
            state.cluster_state(c),
            Some(ClusterState::Stopped | ClusterState::Terminated)
        )
    });
    let there: Vec<_> = there.map(ToString::to_string).collect();
    Some(OperationFailed {
        code: "still_running".into(),
        message: format!(
            "it was not seen to be gone in time from: {}",
            there.join(", ")
        ),
        remedy: "check that a worker looks after each of these clusters, and ask again".into(),
    })
}
