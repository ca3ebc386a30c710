//! Decides what follows from what was observed: routes for a deployment that is ready, success
//! once a gateway has applied them, failure with its cause, and the ends of stopping, starting
//! and removing.
//!
//! A switch is recorded first and applied then. What fails after the switch restores the routes
//! first; the release is taken out after that.

use std::collections::BTreeSet;

use async_trait::async_trait;
use daybook_events::deployment::{
    Deployment, DeploymentEvent, OperationDone, OperationFailed, Status,
};
use daybook_events::environment::Environment;
use daybook_events::routing::{
    self, Command, DomainChange, Hostnames, Routing, RoutingEvent, SwitchReason,
};
use daybook_events::{
    AggregateKind, DeploymentId, Event, EventId, Hostname, ProjectName, Subject, SubjectFilter,
};
use daybook_projections::DeploymentRow;
use futures_util::StreamExt;

use super::timers::keep_for_traffic;
use super::{Bench, Stop, branch, domains, give_up, outcome, rollout, settle};
use crate::driver::{Activation, Outcome, Worker};
use crate::ports::StepError;

const ROLE: &str = "route";

/// So many rollouts are concluded at once.
const AT_ONCE: usize = 16;

/// Woken by deployments.
#[derive(Debug)]
pub struct Route(pub Bench);

/// Keeps the deadlines of rollouts and of operations: the event that began one is handed over again when its time is
/// up, to whichever process is there then.
#[derive(Debug)]
pub struct Deadlines(pub Bench);

/// Woken by gateways.
#[derive(Debug)]
pub struct RouteApplied(pub Bench);

#[async_trait]
impl Worker for Route {
    fn name(&self) -> String {
        ROLE.into()
    }
    fn filter(&self) -> SubjectFilter {
        SubjectFilter::of(AggregateKind::Deployment)
    }
    fn wants(&self, kind: &str) -> bool {
        matches!(
            kind,
            "deployment.deploying_started.v1"
                | "deployment.workload_observed.v1"
                | "deployment.cluster_failed.v1"
                | "deployment.cluster_retried.v1"
                | "deployment.change_committed.v1"
                | "deployment.failed.v1"
                | "deployment.cancelled.v1"
                | "deployment.deleted.v1"
                | "deployment.terminate_requested.v1"
        )
    }
    fn key(&self, subject: &Subject) -> String {
        subject
            .project()
            .map_or_else(String::new, ToString::to_string)
    }
    async fn activate(&self, a: &Activation) -> Outcome {
        let Subject::Deployment(_, _, id) = a.subject else {
            return Outcome::Done;
        };
        settle(&self.0, ROLE, id, Box::pin(step(&self.0, id)).await).await
    }
    async fn give_up(&self, a: &Activation, why: &str) -> Outcome {
        give_up(&self.0, ROLE, a, why).await
    }
}

#[async_trait]
impl Worker for Deadlines {
    fn name(&self) -> String {
        "route-deadline".into()
    }
    fn filter(&self) -> SubjectFilter {
        SubjectFilter::of(AggregateKind::Deployment)
    }
    fn wants(&self, kind: &str) -> bool {
        matches!(
            kind,
            "deployment.deploying_started.v1"
                | "deployment.retry_requested.v1"
                | "deployment.start_requested.v1"
                | "deployment.stop_requested.v1"
                | "deployment.terminate_requested.v1"
        )
    }
    /// Every rollout that is under way holds a delivery open.
    fn max_in_flight(&self) -> usize {
        50_000
    }
    async fn activate(&self, a: &Activation) -> Outcome {
        let Subject::Deployment(_, _, id) = a.subject else {
            return Outcome::Done;
        };
        let outcome = settle(&self.0, ROLE, id, Box::pin(step(&self.0, id)).await).await;
        match (outcome, self.0.row(id)) {
            (Outcome::Done, Ok(Some(row))) => {
                rollout::until_deadline(&row.state).map_or(Outcome::Done, Outcome::Wait)
            }
            (outcome, _) => outcome,
        }
    }
    async fn give_up(&self, a: &Activation, why: &str) -> Outcome {
        give_up(&self.0, ROLE, a, why).await
    }
}

#[async_trait]
impl Worker for RouteApplied {
    fn name(&self) -> String {
        "route-applied".into()
    }
    fn filter(&self) -> SubjectFilter {
        SubjectFilter::of(AggregateKind::Routing)
    }
    fn wants(&self, kind: &str) -> bool {
        matches!(kind, "routing.applied.v1" | "routing.rejected.v1")
    }
    async fn activate(&self, a: &Activation) -> Outcome {
        let Subject::Routing(project) = &a.subject else {
            return Outcome::Done;
        };
        outcome(Box::pin(self.applied(project, a)).await)
    }
    async fn give_up(&self, a: &Activation, why: &str) -> Outcome {
        tracing::error!(subject = %a.subject, %why, "the end of a switch was not recorded");
        Outcome::Done
    }
}

impl RouteApplied {
    async fn applied(&self, project: &ProjectName, a: &Activation) -> Result<(), Stop> {
        let projections = self.0.ledger.projections();
        let subject = Subject::Routing(project.clone());
        let folded = projections.shared::<Routing>(&subject)?;
        let Some(routing) = &folded.state else {
            return Ok(());
        };
        match a.event.payload::<RoutingEvent>() {
            Ok(RoutingEvent::Rejected(rejected)) => {
                let mut switches = routing.recent.iter();
                let switch = switches.find(|s| s.table == rejected.table);
                let previous = switch.and_then(|s| s.main.as_ref()?.previous);
                // Only what was to get its first routes by it has failed; the others have theirs.
                let about = switch.filter(|s| s.reason == SwitchReason::Deploy);
                let about = about.map(|s| s.deployment);
                let domain = switch.and_then(|s| s.domain.clone());
                drop(folded);
                Box::pin(self.rejected(&subject, a, rejected, about, previous)).await?;
                match domain {
                    Some(DomainChange { hostname, next }) if next.attached => {
                        domains::refused(&self.0, hostname, next.claim, a.event.id).await
                    }
                    _ => Ok(()),
                }
            }
            Ok(RoutingEvent::Applied(applied)) => {
                let waiting = self.waiting(project, routing, &applied.hostnames)?;
                drop(folded);
                self.conclude(waiting, &a.event).await
            }
            _ => Ok(()),
        }
    }

    /// A switch that a gateway cannot serve is undone, and its deployment has failed.
    async fn rejected(
        &self,
        subject: &Subject,
        a: &Activation,
        rejected: routing::Rejected,
        about: Option<DeploymentId>,
        previous: Option<DeploymentId>,
    ) -> Result<(), Stop> {
        if let Some(previous) = previous {
            keep_for_traffic(&self.0, a.event.id, previous).await?;
        }
        if self.may_serve(previous)? {
            let context = self
                .0
                .follow_up(ROLE, a.event.id, a.event.correlationid, "compensated");
            self.0
                .append::<Routing>(subject, &context, |state| {
                    routing::decide(
                        state,
                        Command::Compensate {
                            table: rejected.table,
                            note: rejected.message.clone(),
                        },
                    )
                })
                .await?;
        } else {
            tracing::warn!(%subject, table = rejected.table, gateway = rejected.gateway,
                "a switch was rejected and stands: what was the main deployment before it does not run");
        }
        if let Some(id) = about
            && let Some(row) = self.0.row(id)?
            && row.state.is_active()
        {
            let error = StepError::fatal(
                &rejected.code,
                format!("its routes could not be applied: {}", rejected.message),
                "the routes before it were restored; mend the gateway and deploy again",
            );
            let failed = self.0.fail(ROLE, &row, &error);
            self.0.in_its_own_trace(ROLE, id, &a.event, failed).await?;
        }
        Ok(())
    }

    /// Whether traffic can be led back to what was the main deployment before: another gateway may
    /// have served the switch for long, and what it replaced been stopped. Where there was none,
    /// hostnames are led nowhere, as before.
    fn may_serve(&self, previous: Option<DeploymentId>) -> Result<bool, Stop> {
        let Some(previous) = previous else {
            return Ok(true);
        };
        let runs = [Status::Deploying, Status::Started, Status::PartiallyStarted];
        let row = self.0.row(previous)?;
        Ok(row.is_some_and(|row| runs.contains(&row.state.status)))
    }

    /// The deployments that wait for these hostnames to be served. Where none are named, any of
    /// the project may.
    fn waiting(
        &self,
        project: &ProjectName,
        routing: &Routing,
        hostnames: &[Hostname],
    ) -> Result<BTreeSet<DeploymentId>, Stop> {
        if hostnames.is_empty() {
            let rows = self
                .0
                .ledger
                .projections()
                .active_deployments(Some(project), None)?;
            return Ok(rows.into_iter().map(|row| row.id).collect());
        }
        let routes = hostnames.iter().filter_map(|h| routing.routes.get(h));
        let backends = routes.flat_map(|route| &route.backends);
        Ok(backends.map(|backend| backend.deployment).collect())
    }

    /// Takes each of these a step further, if it is being deployed. They share the log's syncs.
    async fn conclude(&self, waiting: BTreeSet<DeploymentId>, event: &Event) -> Result<(), Stop> {
        let mut steps = futures_util::stream::iter(waiting)
            .map(|id| async move {
                match self.0.row(id)? {
                    Some(row) if row.state.status.in_rollout() => {
                        let step = Box::pin(step(&self.0, id));
                        self.0.in_its_own_trace(ROLE, id, event, step).await
                    }
                    _ => Ok(()),
                }
            })
            .buffer_unordered(AT_ONCE);
        let mut result = Ok(());
        while let Some(done) = steps.next().await {
            match done {
                Ok(()) | Err(Stop::Moved(_)) => {}
                Err(other) => result = Err(other),
            }
        }
        result
    }
}

async fn step(bench: &Bench, id: DeploymentId) -> Result<(), Stop> {
    let Some(row) = bench.row(id)? else {
        return Ok(());
    };
    match row.state.status {
        Status::Deploying => Box::pin(rollout::deploying(bench, row)).await,
        Status::PartiallyStarted => Box::pin(rollout::partially_started(bench, row)).await,
        Status::Starting => Box::pin(rollout::starting(bench, row)).await,
        Status::Stopping => {
            if replicas(&row.state) == Some(0) && row.state.workload_is_gone() {
                return done(bench, &row, "stopped", DeploymentEvent::Stopped).await;
            }
            overdue(bench, &row, "stop_failed", DeploymentEvent::StopFailed).await
        }
        Status::Terminating => {
            withdraw(bench, &row).await?;
            if !row.state.in_repository() && row.state.workload_is_gone() {
                return done(bench, &row, "terminated", DeploymentEvent::Terminated).await;
            }
            let event = DeploymentEvent::TerminateFailed;
            overdue(bench, &row, "terminate_failed", event).await
        }
        Status::Failed | Status::Cancelled | Status::Deleted => withdraw(bench, &row).await,
        _ => Ok(()),
    }
}

/// Ends an operation that clusters do not carry out.
async fn overdue(
    bench: &Bench,
    row: &DeploymentRow,
    step: &str,
    event: fn(OperationFailed) -> DeploymentEvent,
) -> Result<(), Stop> {
    let Some(failed) = rollout::not_gone(&row.state) else {
        return Ok(());
    };
    let text = format!("failed: {} ({})", failed.message, failed.code);
    bench.say(row.id, None, text).await;
    bench
        .advance(ROLE, row, step, event(failed))
        .await
        .map(|_| ())
}

/// The replicas that the newest recorded commit after its success asks for. What was observed before
/// that commit is of the time before, and nothing can be recorded of it once the step has ended.
pub(super) fn replicas(state: &Deployment) -> Option<u32> {
    state.change.as_ref().and_then(|change| change.replicas)
}

pub(super) async fn done(
    bench: &Bench,
    row: &DeploymentRow,
    step: &str,
    event: fn(OperationDone) -> DeploymentEvent,
) -> Result<(), Stop> {
    let revision = row
        .state
        .change
        .as_ref()
        .map(|c| c.commit.clone())
        .or_else(|| row.state.commit.clone());
    let Some(revision) = revision else {
        return Ok(());
    };
    bench.say(row.id, None, step).await;
    bench
        .advance(ROLE, row, step, event(OperationDone { revision }))
        .await
        .map(|_| ())
}

/// The table that routes a deployment, whether a gateway has applied it, and whether it is the
/// main one.
pub(super) fn routed(bench: &Bench, row: &DeploymentRow) -> Result<(u32, bool, bool), Stop> {
    let instance = &row.state.request.instance;
    let subject = Subject::Routing(instance.project.clone());
    let folded = bench.ledger.projections().shared::<Routing>(&subject)?;
    let Some(routing) = &folded.state else {
        return Ok((0, false, false));
    };
    // A deployment that is routed already needs no new table.
    let table = routing.table_of(row.id).unwrap_or(routing.table);
    let applied = routing.applied.values().any(|applied| *applied >= table);
    let main = routing
        .traffic(instance)
        .is_some_and(|t| t.main == Some(row.id));
    Ok((table, applied, main))
}

/// Gives a ready deployment its routes, and the traffic of its service if it is to take that over.
pub(super) async fn assign(
    bench: &Bench,
    row: &DeploymentRow,
    take_over: bool,
) -> Result<(), Stop> {
    let instance = &row.state.request.instance;
    let projections = bench.ledger.projections();
    let environment = projections.shared::<Environment>(&Subject::Environment(
        instance.project.clone(),
        instance.environment.clone(),
    ))?;
    let live = environment.state.as_ref().is_some_and(|e| e.spec.live);
    let hostnames =
        Hostnames::under(&bench.settings.domain, instance, row.id, live).map_err(|e| {
            Stop::Fail(StepError::fatal(
                e.code,
                e.to_string(),
                "use a shorter domain for this server",
            ))
        })?;
    let subject = Subject::Routing(instance.project.clone());
    let command = Command::Assign {
        target: branch::target(row),
        hostnames: branch::with_address(bench, row, hostnames)?,
        take_over,
    };
    let context = bench.follow_up(ROLE, row.state.status_event, row.id.0, "routes_assigned");
    let executed = bench
        .append::<Routing>(&subject, &context, |state| {
            routing::decide(state, command.clone())
        })
        .await?;
    match executed.position() {
        Some(position) => bench.folded(position).await,
        None => Ok(()),
    }
}

/// Takes a deployment out of all routes. If it had taken over the traffic of its service while it
/// was being deployed, the switch is undone, so that the one before it serves again.
pub(super) async fn withdraw(bench: &Bench, row: &DeploymentRow) -> Result<(), Stop> {
    let instance = &row.state.request.instance;
    let subject = Subject::Routing(instance.project.clone());
    let folded = bench.ledger.projections().shared::<Routing>(&subject)?;
    let Some(routing) = &folded.state else {
        return Ok(());
    };
    let is_main = routing
        .traffic(instance)
        .is_some_and(|t| t.main == Some(row.id));
    let took_over =
        routing.recent.iter().rev().find(|s| {
            s.deployment == row.id && s.main.as_ref().is_some_and(|m| m.previous.is_some())
        });
    let ended = [Status::Failed, Status::Cancelled, Status::Deleted].contains(&row.state.status);
    if let (true, true, Some(switch)) = (is_main, ended, took_over) {
        if let Some(previous) = switch.main.as_ref().and_then(|m| m.previous) {
            keep_for_traffic(bench, row.state.status_event, previous).await?;
        }
        let command = Command::Compensate {
            table: switch.table,
            note: format!("deployment {} is {}", row.id, row.state.status.as_str()),
        };
        append_routing(
            bench,
            &subject,
            row.state.status_event,
            row,
            "compensated",
            command,
        )
        .await?;
    }
    let command = Command::Withdraw {
        deployment: row.id,
        instance: instance.clone(),
        heir: branch::heir(bench, row)?,
    };
    append_routing(
        bench,
        &subject,
        row.state.status_event,
        row,
        "withdrawn",
        command,
    )
    .await
}

async fn append_routing(
    bench: &Bench,
    subject: &Subject,
    cause: EventId,
    row: &DeploymentRow,
    step: &str,
    command: Command,
) -> Result<(), Stop> {
    let context = bench.follow_up(ROLE, cause, row.id.0, step);
    let executed = bench
        .append::<Routing>(subject, &context, |state| {
            routing::decide(state, command.clone())
        })
        .await?;
    bench.reread(row, executed.position()).await.map(|_| ())
}
