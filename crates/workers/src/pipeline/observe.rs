//! Records what a cluster shows: instances coming and going, readiness, problems.
//!
//! Observations are events of their own, apart from intents, and are appended only when they
//! differ from the last one. They carry the GitOps commit that they are about.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use daybook_events::deployment::{
    self, Deployment, DeploymentEvent, Instance, Problem, Status, WorkloadObserved,
};
use daybook_events::gitops::Gitops;
use daybook_events::{Actor, Context, EventId, Subject};
use daybook_projections::DeploymentRow;
use jiff::Timestamp;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use uuid::Uuid;

use super::{Bench, Stop};
use crate::target::{AppRef, AppStatus, ReleaseStatus, Target};

/// Watches all Applications of one cluster until `cancel`.
pub async fn run(bench: Bench, target: Arc<dyn Target>, cancel: CancellationToken) {
    let tasks = TaskTracker::new();
    let mut watched = BTreeSet::new();
    let mut changes = bench.ledger.projections().changes();
    while !cancel.is_cancelled() {
        match apps(&bench) {
            Ok(apps) => {
                for app in apps {
                    if watched.insert(app.clone()) {
                        let (bench, target, cancel) =
                            (bench.clone(), target.clone(), cancel.clone());
                        tasks.spawn(async move { watch(bench, target, app, cancel).await });
                    }
                }
            }
            Err(error) => tracing::warn!(%error, "the environments could not be listed"),
        }
        tokio::select! {
            () = cancel.cancelled() => {}
            changed = changes.changed() => {
                if changed.is_err() {
                    break;
                }
            }
        }
    }
    tasks.close();
    tasks.wait().await;
}

fn apps(bench: &Bench) -> Result<Vec<AppRef>, daybook_projections::QueryError> {
    let mut all = Vec::new();
    for project in bench.ledger.projections().projects()? {
        let gitops = bench
            .ledger
            .projections()
            .folded::<Gitops>(&Subject::Gitops(project.name.clone()))?;
        for environment in gitops
            .state
            .into_iter()
            .flat_map(|g| g.environments.into_keys())
        {
            all.push(AppRef {
                project: project.name.clone(),
                environment,
            });
        }
    }
    Ok(all)
}

async fn watch(bench: Bench, target: Arc<dyn Target>, app: AppRef, cancel: CancellationToken) {
    let mut status = target.watch(&app);
    let mut changes = bench.ledger.projections().changes();
    loop {
        let seen = status.borrow_and_update().clone();
        let (waiting, again) = match record(&bench, &*target, &app, &seen).await {
            Ok(waiting) => (waiting, false),
            Err(stop) => {
                if let Stop::Retry(why) = &stop {
                    tracing::warn!(cluster = %target.cluster(), project = %app.project, %why,
                        "an observation was not recorded yet");
                }
                (false, true)
            }
        };
        tokio::select! {
            () = cancel.cancelled() => return,
            changed = status.changed() => if changed.is_err() { return },
            // What was seen may be ahead of what the ledger has.
            changed = changes.changed(), if waiting => if changed.is_err() { return },
            () = tokio::time::sleep(Duration::from_millis(500)), if again => {}
        }
    }
}

/// Records what is new, and says whether something can only be recorded once the ledger has moved
/// on: a release whose deployment is not yet said to be deploying, or one that is gone before the
/// ledger has the commit that removes it.
async fn record(
    bench: &Bench,
    target: &dyn Target,
    app: &AppRef,
    status: &AppStatus,
) -> Result<bool, Stop> {
    let Some(revision) = &status.revision else {
        return Ok(false);
    };
    let mut waiting = false;
    let gitops = bench
        .ledger
        .projections()
        .folded::<Gitops>(&Subject::Gitops(app.project.clone()))?;
    let newest = gitops
        .state
        .and_then(|g| g.environments.get(&app.environment).cloned());
    let listed: BTreeMap<_, _> = status.releases.iter().map(|r| (r.deployment, r)).collect();
    for row in bench
        .ledger
        .projections()
        .active_deployments(Some(&app.project), Some(&app.environment))?
    {
        if !row.state.request.clusters.contains(target.cluster()) {
            continue;
        }
        let observed = match listed.get(&row.id) {
            Some(release) => observation(target, release),
            None if newest.as_ref() == Some(revision) && !row.state.in_repository() => {
                WorkloadObserved {
                    cluster: target.cluster().clone(),
                    revision: revision.clone(),
                    wanted: 0,
                    instances: Vec::new(),
                    problem: None,
                }
            }
            None => {
                waiting |= row
                    .state
                    .observed
                    .get(target.cluster())
                    .is_some_and(|o| o.wanted > 0 || !o.instances.is_empty());
                continue;
            }
        };
        if row.state.status < Status::Deploying {
            waiting = true;
            continue;
        }
        match append(bench, &row, observed).await {
            Ok(()) | Err(Stop::Moved(_)) => {}
            Err(other) => return Err(other),
        }
    }
    Ok(waiting)
}

fn observation(target: &dyn Target, release: &ReleaseStatus) -> WorkloadObserved {
    WorkloadObserved {
        cluster: target.cluster().clone(),
        revision: release.revision.clone(),
        wanted: release.wanted,
        instances: release
            .instances
            .iter()
            .map(|i| Instance {
                name: i.name.clone(),
                address: i.address.clone(),
                // What an older revision asked for is no success of this one.
                ready: i.ready && !i.outdated,
                restarts: i.restarts,
            })
            .collect(),
        problem: release.problem.as_ref().map(|p| Problem {
            reason: p.reason.clone(),
            message: p.message.clone(),
            remedy: p.remedy.clone(),
            transient: p.transient,
        }),
    }
}

async fn append(
    bench: &Bench,
    row: &DeploymentRow,
    observed: WorkloadObserved,
) -> Result<(), Stop> {
    let event = DeploymentEvent::WorkloadObserved(observed);
    let event = bench.masked(&row.subject, event);
    let DeploymentEvent::WorkloadObserved(observed) = &event else {
        return Ok(());
    };
    let before = row.state.observed.get(&observed.cluster);
    let unchanged = before.is_some_and(|o| {
        o.wanted == observed.wanted
            && o.instances == observed.instances
            && o.problem == observed.problem
    });
    if unchanged {
        return Ok(());
    }
    let cluster = observed.cluster.clone();
    let text = describe(observed);
    // The same thing may be seen again later, so an observation's id says nothing but that it is
    // this one.
    let context = Context {
        id: EventId(Uuid::now_v7()),
        time: Timestamp::now(),
        correlation: row.id.0,
        causation: Some(row.state.status_event),
        actor: Actor::system("worker/observe"),
        traceparent: None,
        request_digest: None,
    };
    let done = bench
        .append::<Deployment>(&row.subject, &context, |state| {
            deployment::decide(state, event.clone())
        })
        .await?;
    if done.position().is_some() {
        bench.say(row.id, Some(cluster), text).await;
    }
    bench.reread(row, done.position()).await.map(|_| ())
}

fn describe(o: &WorkloadObserved) -> String {
    match &o.problem {
        Some(p) => format!("{}: {}", p.reason, p.message),
        None if o.wanted == 0 && o.instances.is_empty() => "stopped".to_owned(),
        None => format!("{} of {} instances ready", o.ready(), o.wanted),
    }
}
