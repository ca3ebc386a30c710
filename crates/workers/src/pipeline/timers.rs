//! Timers: stops that happen by themselves when their time has come, freezes that end and approvals
//! that expire.
//!
//! What is scheduled is decided by events: [`Replaced`] follows the switches of routes, [`Idle`]
//! the deployments of environments where what nobody asks for is stopped. What is due is fired by
//! [`run`], in any number of processes, and counts once: the stop is appended under the nonce that it
//! was scheduled with. So a process that dies, or a clock that is late, delays a stop and neither
//! loses nor repeats it.

use std::time::Duration;

use async_trait::async_trait;
use daybook_events::deployment::{self, Deployment, DeploymentEvent, Status};
use daybook_events::environment::Environment;
use daybook_events::routing::{Backend, Routing, RoutingEvent, SwitchReason, Switched};
use daybook_events::timer::{
    self, KeepCause, KeepFor, StopCause, StopScheduled, has_traffic, is_service_address,
};
use daybook_events::{
    Actor, AggregateKind, Context, DeploymentId, EventId, InstanceRef, Subject, SubjectFilter,
};
use daybook_projections::DeploymentRow;
use jiff::Timestamp;
use tokio_util::sync::CancellationToken;

use super::traced::About;
use super::{Bench, Stop, freeze, outcome};
use crate::driver::{Activation, Outcome, Worker};

const ROLE: &str = "timers";

/// So many that are due are fired before it is looked again.
const AT_ONCE: usize = 256;

/// It is slept no longer than this: a clock may be set.
const LOOK_AGAIN: Duration = Duration::from_secs(30);

/// When what could not be fired is tried again.
const AGAIN: Duration = Duration::from_millis(500);

/// Schedules the stop of deployments that lose the traffic of their service, and calls it off for
/// those that get it back. Woken by switches.
#[derive(Debug)]
pub struct Replaced(pub Bench);

/// Schedules the stop of deployments that nobody asks for. Woken by their start.
#[derive(Debug)]
pub struct Idle(pub Bench);

#[async_trait]
impl Worker for Replaced {
    fn name(&self) -> String {
        "timers-replaced".into()
    }
    fn filter(&self) -> SubjectFilter {
        SubjectFilter::of(AggregateKind::Routing)
    }
    fn wants(&self, kind: &str) -> bool {
        kind == "routing.switched.v1"
    }
    async fn activate(&self, a: &Activation) -> Outcome {
        let (Subject::Routing(_), Ok(RoutingEvent::Switched(switch))) =
            (&a.subject, a.event.payload())
        else {
            return Outcome::Done;
        };
        outcome(self.follow(a, &switch).await)
    }
    async fn give_up(&self, a: &Activation, why: &str) -> Outcome {
        tracing::error!(subject = %a.subject, %why, "the stop of what lost its traffic was not scheduled");
        Outcome::Done
    }
}

impl Replaced {
    async fn follow(&self, a: &Activation, switch: &Switched) -> Result<(), Stop> {
        for id in concerned(switch) {
            let Some(row) = self.0.row(id)? else {
                continue;
            };
            if let Some((step, plan)) = self.decide(a, switch, &row)? {
                self.record(a, &row, step, plan).await?;
            }
        }
        Ok(())
    }

    /// What a switch means for one deployment, as the world is now.
    fn decide(
        &self,
        a: &Activation,
        switch: &Switched,
        row: &DeploymentRow,
    ) -> Result<Option<(&'static str, Plan)>, Stop> {
        if !matches!(row.state.status, Status::Deploying | Status::Started) {
            return Ok(None);
        }
        let pending = row.state.stops.pending.as_ref();
        let for_traffic = pending.is_some_and(|p| p.cause != StopCause::Idle);
        let instance = &row.state.request.instance;
        let routing = self.0.routing(instance)?;
        let Some(routing) = &routing.state else {
            return Ok(None);
        };
        if has_traffic(routing, instance, row.id) {
            return Ok(for_traffic.then_some(("stop_unscheduled", Plan::Keep(routing.table))));
        }
        if for_traffic || !lost_traffic(switch, row.id) {
            return Ok(None);
        }
        let keep = self.0.keep_old(instance)?;
        let Some(due) = after(a.event.time, keep) else {
            return Ok(None);
        };
        // What would be stopped sooner anyway, because nobody asks for it, is left to that.
        if pending.is_some_and(|p| p.due <= due) {
            return Ok(None);
        }
        let cause = match switch.reason {
            SwitchReason::Rollback | SwitchReason::Compensation => StopCause::RolledBack,
            _ => StopCause::Replaced,
        };
        let by = switch.main.as_ref().and_then(|m| m.next);
        Ok(Some((
            "stop_scheduled",
            Plan::Stop(StopScheduled {
                due,
                cause,
                keep,
                by: by.or(Some(switch.deployment)).filter(|by| *by != row.id),
                table: Some(switch.table),
                nonce: nonce(a.event.id, row.id),
            }),
        )))
    }

    async fn record(
        &self,
        a: &Activation,
        row: &DeploymentRow,
        step: &str,
        plan: Plan,
    ) -> Result<(), Stop> {
        let step = format!("{step} {}", row.id);
        let context = self.0.follow_up(ROLE, a.event.id, row.id.0, &step);
        let decided = self
            .0
            .append::<Deployment>(&row.subject, &context, |state| match &plan {
                Plan::Stop(stop) => {
                    deployment::decide(state, DeploymentEvent::StopScheduled(stop.clone()))
                }
                Plan::Keep(table) => timer::keep(state, KeepCause::Traffic, Some(*table), None),
            });
        moved_is_fine(decided.await)
    }
}

/// What is decided about a deployment.
enum Plan {
    Stop(StopScheduled),
    /// As of this route table.
    Keep(u32),
}

/// The deployments whose traffic a switch changes.
fn concerned(switch: &Switched) -> Vec<DeploymentId> {
    let backends = switch.changes.iter();
    let backends = backends.flat_map(|c| c.previous.iter().chain(&c.next));
    let main = switch.main.iter().flat_map(|m| [m.previous, m.next]);
    let mut all: Vec<_> = backends
        .map(|b| b.deployment)
        .chain(main.flatten())
        .collect();
    all.sort();
    all.dedup();
    all
}

/// Whether a switch took traffic of its service from a deployment.
fn lost_traffic(switch: &Switched, id: DeploymentId) -> bool {
    let has = |backends: &[Backend]| backends.iter().any(|b| b.deployment == id && b.weight > 0);
    let main = switch.main.as_ref();
    main.is_some_and(|m| m.previous == Some(id))
        || switch.changes.iter().any(|change| {
            is_service_address(change.stickiness) && has(&change.previous) && !has(&change.next)
        })
}

/// The nonce of a stop that an event leads to.
fn nonce(event: EventId, id: DeploymentId) -> EventId {
    EventId::derived(event.0, &format!("stop {id}"))
}

/// A time after another; none for never.
fn after(time: Timestamp, keep: KeepFor) -> Option<Timestamp> {
    time.checked_add(keep.duration()?).ok()
}

/// Whoever decided meanwhile, decided.
fn moved_is_fine<T>(result: Result<T, Stop>) -> Result<(), Stop> {
    match result {
        Ok(_) | Err(Stop::Moved(_)) => Ok(()),
        Err(other) => Err(other),
    }
}

/// Calls off the scheduled stop of a deployment that is about to get its traffic back.
pub(super) async fn keep_for_traffic(
    bench: &Bench,
    cause: EventId,
    id: DeploymentId,
) -> Result<(), Stop> {
    let Some(row) = bench.row(id)? else {
        return Ok(());
    };
    if row.state.stops.pending.is_none() {
        return Ok(());
    }
    let routing = bench.routing(&row.state.request.instance)?;
    let table = routing.state.as_ref().map(|r| r.table);
    let context = bench.follow_up(ROLE, cause, id.0, &format!("kept {id}"));
    let kept = bench.append::<Deployment>(&row.subject, &context, |state| {
        timer::keep(state, KeepCause::Traffic, table, None)
    });
    moved_is_fine(kept.await)
}

impl Bench {
    /// The route table of an instance's project.
    fn routing(
        &self,
        instance: &InstanceRef,
    ) -> Result<std::sync::Arc<daybook_events::Folded<Routing>>, Stop> {
        let subject = Subject::Routing(instance.project.clone());
        Ok(self.ledger.projections().shared::<Routing>(&subject)?)
    }

    fn environment(&self, instance: &InstanceRef) -> Result<Option<Environment>, Stop> {
        let projections = self.ledger.projections();
        Ok(projections.environment(&instance.project, &instance.environment)?)
    }

    /// How long a deployment of an instance is kept that lost its traffic.
    fn keep_old(&self, instance: &InstanceRef) -> Result<KeepFor, Stop> {
        let set = self.environment(instance)?.and_then(|e| e.spec.keep_old);
        Ok(set.unwrap_or(self.settings.keep_old))
    }

    /// How long a deployment of an instance is kept that nobody asks for.
    pub(super) fn keep_idle(&self, instance: &InstanceRef) -> Result<KeepFor, Stop> {
        let environment = self.environment(instance)?;
        Ok(environment.map_or(KeepFor::Never, |e| e.spec.idle()))
    }
}

#[async_trait]
impl Worker for Idle {
    fn name(&self) -> String {
        "timers-idle".into()
    }
    fn filter(&self) -> SubjectFilter {
        SubjectFilter::of(AggregateKind::Deployment)
    }
    fn wants(&self, kind: &str) -> bool {
        matches!(
            kind,
            "deployment.succeeded.v1" | "deployment.started.v1" | "deployment.stop_unscheduled.v1"
        )
    }
    async fn activate(&self, a: &Activation) -> Outcome {
        let Subject::Deployment(_, _, id) = a.subject else {
            return Outcome::Done;
        };
        outcome(self.watch(a, id).await)
    }
    async fn give_up(&self, a: &Activation, why: &str) -> Outcome {
        tracing::error!(subject = %a.subject, %why, "a stop when nobody asks for it was not scheduled");
        Outcome::Done
    }
}

impl Idle {
    /// From its start on, a deployment of an environment that asks for it is stopped when nobody
    /// asks for it: also one that was to be stopped for another reason, and has traffic again.
    async fn watch(&self, a: &Activation, id: DeploymentId) -> Result<(), Stop> {
        if let Ok(DeploymentEvent::StopUnscheduled(e)) = a.event.payload()
            && e.cause == KeepCause::Asked
        {
            return Ok(());
        }
        let Some(row) = self.0.row(id)? else {
            return Ok(());
        };
        let keep = self.0.keep_idle(&row.state.request.instance)?;
        let Some(due) = after(a.event.time, keep) else {
            return Ok(());
        };
        let stop = StopScheduled {
            due,
            cause: StopCause::Idle,
            keep,
            by: None,
            table: None,
            nonce: nonce(a.event.id, id),
        };
        let context = self.0.follow_up(ROLE, a.event.id, id.0, "idle stop");
        let decided = self
            .0
            .append::<Deployment>(&row.subject, &context, |state| {
                if state.is_some_and(|s| s.stops.pending.is_some()) {
                    return Ok(daybook_events::Decision::Nothing);
                }
                deployment::decide(state, DeploymentEvent::StopScheduled(stop.clone()))
            });
        moved_is_fine(decided.await)
    }
}

/// Fires what is due, until `cancel`.
pub async fn run(bench: Bench, cancel: CancellationToken) {
    let mut changes = bench.ledger.projections().changes();
    loop {
        changes.mark_unchanged();
        let rest = tokio::select! {
            () = cancel.cancelled() => return,
            rest = fire_due(&bench) => rest,
        };
        let rest = rest.unwrap_or_else(|stop| {
            tracing::warn!(?stop, "what is due could not be fired yet");
            AGAIN
        });
        let until = tokio::time::Instant::now() + rest;
        // Only what is due earlier than what is waited for is a reason to wake up.
        loop {
            tokio::select! {
                () = cancel.cancelled() => return,
                () = tokio::time::sleep_until(until) => break,
                changed = changes.changed() => {
                    if changed.is_err() {
                        return;
                    }
                    if next(&bench).is_ok_and(|next| tokio::time::Instant::now() + next < until) {
                        break;
                    }
                }
            }
        }
    }
}

/// How long it is until the next timer is due, at most [`LOOK_AGAIN`].
fn next(bench: &Bench) -> Result<Duration, Stop> {
    let first = bench.ledger.projections().timers(1)?;
    let rest = first.first().map_or(LOOK_AGAIN, |(due, _)| {
        Duration::try_from(due.duration_since(Timestamp::now())).unwrap_or_default()
    });
    // The index has microseconds, and the event what is left of one.
    Ok((rest + Duration::from_micros(1)).min(LOOK_AGAIN))
}

/// Fires all that is due. Returns how long nothing else is.
async fn fire_due(bench: &Bench) -> Result<Duration, Stop> {
    loop {
        let now = Timestamp::now();
        let timers = bench.ledger.projections().timers(AT_ONCE)?;
        let due: Vec<_> = timers.into_iter().filter(|(due, _)| *due < now).collect();
        if due.is_empty() {
            return next(bench);
        }
        let (mut fired, mut result) = (false, Ok(()));
        for (_, id) in due {
            match fire(bench, id, now).await {
                Ok(one) => fired |= one,
                Err(stop) => result = Err(stop),
            }
        }
        result?;
        if !fired {
            return Ok(AGAIN);
        }
    }
}

/// Fires a deployment's timer, if it still is due. Returns whether that changed anything.
async fn fire(bench: &Bench, id: DeploymentId, now: Timestamp) -> Result<bool, Stop> {
    let Some(row) = bench.row(id)? else {
        return Ok(false);
    };
    let Some(nonce) = timer::nonce_of(&row.state) else {
        return Ok(false);
    };
    // Its time has come, however long ago it was set.
    let about = About::of(&row).apart();
    let fired = fire_nonce(bench, &row, nonce, now);
    bench.work(ROLE, about, Box::pin(fired)).await
}

async fn fire_nonce(
    bench: &Bench,
    row: &DeploymentRow,
    nonce: EventId,
    now: Timestamp,
) -> Result<bool, Stop> {
    if row.state.held().is_some() {
        return freeze::fire(bench, row, nonce, now).await;
    }
    let id = row.id;
    let instance = &row.state.request.instance;
    let context = Context {
        id: nonce,
        time: Timestamp::now(),
        correlation: id.0,
        causation: None,
        actor: Actor::system(&format!("worker/{ROLE}")),
        traceparent: None,
        request_digest: None,
    };
    let decided = bench.append::<Deployment>(&row.subject, &context, |state| {
        let routing = bench.ledger.projections().routing(&instance.project);
        // Where it cannot be known, it is kept until it can.
        let traffic = routing.map_or(true, |r| r.is_some_and(|r| has_traffic(&r, instance, id)));
        timer::fire(state, nonce, now, traffic)
    });
    match decided.await {
        Ok(executed) => match executed.position() {
            Some(position) => bench.folded(position).await.map(|()| true),
            None => Ok(false),
        },
        Err(Stop::Moved(_)) => Ok(false),
        Err(other) => Err(other),
    }
}
