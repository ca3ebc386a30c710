//! Holds what is deployed to a frozen environment, and lets it go on.
//!
//! Two doors ask here: admission, and the GitOps commit for what was admitted before the window
//! began. What they hold is let go on by the timers when the window ends, and by [`Freezes`] when
//! somebody takes the window away.

use async_trait::async_trait;
use daybook_events::deployment::{Deployment, DeploymentEvent};
use daybook_events::freeze::{self, Freezes as Windows, Held, Verdict, judge};
use daybook_events::{
    Actor, AggregateKind, Context, DeploymentId, EventId, InstanceRef, Subject, SubjectFilter,
};
use daybook_projections::DeploymentRow;
use jiff::Timestamp;

use super::{Bench, Stop, outcome};
use crate::driver::{Activation, Outcome, Worker};

const ROLE: &str = "freeze";

/// Judges what waits once more when the windows of its environment have changed.
#[derive(Debug)]
pub struct Freezes(pub Bench);

#[async_trait]
impl Worker for Freezes {
    fn name(&self) -> String {
        "freezes".into()
    }
    fn filter(&self) -> SubjectFilter {
        SubjectFilter::of(AggregateKind::Environment)
    }
    fn wants(&self, kind: &str) -> bool {
        matches!(
            kind,
            "environment.freeze_set.v1" | "environment.freeze_removed.v1"
        )
    }
    async fn activate(&self, a: &Activation) -> Outcome {
        outcome(self.look_again(a).await)
    }
    async fn give_up(&self, a: &Activation, why: &str) -> Outcome {
        tracing::error!(subject = %a.subject, %why,
            "what waits for a freeze was not judged once more; if that has no end, `daybook freeze override` lets it go on");
        Outcome::Done
    }
}

impl Freezes {
    async fn look_again(&self, a: &Activation) -> Result<(), Stop> {
        let Subject::Environment(project, name) = &a.subject else {
            return Ok(());
        };
        let projections = self.0.ledger.projections();
        for row in projections.active_deployments(Some(project), Some(name))? {
            if row.state.held().is_none() {
                continue;
            }
            match lets_through(&self.0, &row).await {
                Ok(_) | Err(Stop::Moved(_)) => {}
                Err(other) => return Err(other),
            }
        }
        Ok(())
    }
}

/// Whether a deployment that waits to be admitted, or to be committed, goes on now. That it waits,
/// or waits no more, is recorded first; what is recorded wakes whoever asked.
///
/// Once that is recorded it is judged again: a window that was taken away meanwhile has woken only
/// what was held by then.
pub(super) async fn lets_through(bench: &Bench, row: &DeploymentRow) -> Result<bool, Stop> {
    let mut row = row.clone();
    let mut recorded = false;
    loop {
        let windows = bench.windows(&row.state.request.instance)?;
        let is_free =
            row.state.held().is_none() && (windows.is_empty() || is_way_back(bench, &row.state)?);
        if is_free {
            return Ok(!recorded);
        }
        let event = match judge(&row.state, &windows, Timestamp::now()) {
            Verdict::Goes => return Ok(!recorded),
            Verdict::Waits => return Ok(false),
            Verdict::Record(event) => *event,
        };
        let step = match &event {
            DeploymentEvent::Held(e) => {
                bench.say(row.id, None, waits(e, &windows)).await;
                format!("held {}", e.nonce)
            }
            DeploymentEvent::Released(e) => {
                let text = format!("is not held by {} any more", e.freeze);
                bench.say(row.id, None, text).await;
                format!("released {}", e.nonce)
            }
            _ => return Ok(false),
        };
        row = bench.advance(ROLE, &row, &step, event).await?;
        recorded = true;
    }
}

fn waits(held: &Held, windows: &Windows) -> String {
    let end = match (held.until, windows.get(&held.freeze)) {
        (Some(until), Some(freeze)) => {
            format!("until {}", freeze::clock(until, freeze.rule.zone()))
        }
        (Some(until), None) => format!("until {until:.0}"),
        (None, _) => "until somebody takes that away".to_owned(),
    };
    format!("waits: its environment is frozen by {} {end}", held.freeze)
}

/// Whether a deployment repeats one that was the main one of its instance before, and changes
/// nothing of it: then it is a way back, which no freeze bars.
fn is_way_back(bench: &Bench, state: &Deployment) -> Result<bool, Stop> {
    let Some(of) = state.request.redeploy_of else {
        return Ok(false);
    };
    let Some(before) = bench.row(of)? else {
        return Ok(false);
    };
    if !state.runs_as(&before.state) {
        return Ok(false);
    }
    let instance = &state.request.instance;
    let routing = bench.ledger.projections().routing(&instance.project)?;
    let traffic = routing.as_ref().and_then(|r| r.traffic(instance));
    Ok(traffic.is_some_and(|t| t.main != Some(of) && t.former.contains(&of)))
}

/// Lets a deployment go on whose freeze has ended, if no other one is open then. Returns whether
/// that changed anything.
pub(super) async fn fire(
    bench: &Bench,
    row: &DeploymentRow,
    nonce: EventId,
    now: Timestamp,
) -> Result<bool, Stop> {
    let windows = bench.windows(&row.state.request.instance)?;
    let context = ended(row.id, nonce);
    let decided = bench.append::<Deployment>(&row.subject, &context, |state| {
        freeze::fire(state, &windows, nonce, now)
    });
    match decided.await {
        Ok(executed) => {
            let Some(position) = executed.position() else {
                return Ok(false);
            };
            bench.folded(position).await?;
            // Another window may hold it now, and may have been taken away meanwhile.
            if let Some(row) = bench.row(row.id)?.filter(|r| r.state.held().is_some()) {
                match lets_through(bench, &row).await {
                    Ok(_) | Err(Stop::Moved(_)) => {}
                    Err(other) => return Err(other),
                }
            }
            Ok(true)
        }
        Err(Stop::Moved(_)) => Ok(false),
        Err(other) => Err(other),
    }
}

/// The context of the end of a freeze: it happens once, under the nonce that it was announced with.
fn ended(id: DeploymentId, nonce: EventId) -> Context {
    Context {
        id: nonce,
        time: Timestamp::now(),
        correlation: id.0,
        causation: None,
        actor: Actor::system(&format!("worker/{ROLE}")),
        traceparent: None,
        request_digest: None,
    }
}

impl Bench {
    /// The windows of an instance's environment.
    fn windows(&self, instance: &InstanceRef) -> Result<Windows, Stop> {
        let projections = self.ledger.projections();
        let environment = projections.environment(&instance.project, &instance.environment)?;
        Ok(environment.map(|e| e.freezes).unwrap_or_default())
    }
}
