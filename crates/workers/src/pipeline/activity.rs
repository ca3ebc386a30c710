//! Tells the ledger, sparsely, which deployments are asked for that are stopped when nobody does.
//!
//! Requests are counted in the gateway, and no event is made of one. A scheduled stop is moved when
//! it is near, or when it would be wrong by a quarter of its time otherwise: a preview that is
//! asked for all day costs a few events. A gateway that dies forgets a quarter of the time at most.

use std::collections::HashMap;
use std::time::Duration;

use daybook_events::deployment::{self, Deployment, DeploymentEvent};
use daybook_events::timer::{StopCause, StopScheduled};
use daybook_events::{Decision, DeploymentId, EventId};
use jiff::{SignedDuration, Timestamp};
use tokio_util::sync::CancellationToken;

use super::{Bench, Stop};
use crate::gateway::Gateway;

const ROLE: &str = "activity";

/// How often the gateway's counters are read.
const EVERY: Duration = Duration::from_secs(1);

/// A stop that is due within this time is moved at once.
const NEAR: SignedDuration = SignedDuration::from_secs(3);

/// What a gateway has seen of a deployment.
#[derive(Debug, Clone, Copy)]
struct Seen {
    /// Requests so far.
    requests: u64,
    /// When the last ones were noticed, if the ledger may have to be told.
    at: Option<Timestamp>,
}

/// Follows a gateway until `cancel`.
pub async fn run(bench: Bench, gateway: Gateway, cancel: CancellationToken) {
    let mut seen = HashMap::<DeploymentId, Seen>::new();
    let mut every = tokio::time::interval(EVERY);
    every.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            () = cancel.cancelled() => return,
            _ = every.tick() => {}
        }
        let now = Timestamp::now();
        for (id, traffic) in gateway.traffic() {
            let known = seen.entry(id).or_insert(Seen {
                requests: 0,
                at: None,
            });
            if traffic.requests != known.requests {
                known.requests = traffic.requests;
                known.at = Some(now);
            }
            let Some(at) = known.at else {
                continue;
            };
            match tell(&bench, id, at, now).await {
                Ok(true) => known.at = None,
                Ok(false) => {}
                Err(stop) => {
                    tracing::debug!(deployment.id = %id, ?stop, "a request is told of later");
                }
            }
        }
    }
}

/// Moves a scheduled stop away from the last request, if it is time to. Returns whether there is
/// nothing to tell any more.
async fn tell(
    bench: &Bench,
    id: DeploymentId,
    at: Timestamp,
    now: Timestamp,
) -> Result<bool, Stop> {
    let Some(row) = bench.row(id)? else {
        return Ok(true);
    };
    let Some(next) = moved(&row.state, at) else {
        return Ok(true);
    };
    let Some(pending) = &row.state.stops.pending else {
        return Ok(true);
    };
    let wrong_by = next.due.duration_since(pending.due);
    let left = pending.due.duration_since(now);
    let quarter = pending.keep.duration().unwrap_or_default() / 4;
    if wrong_by < quarter && left > NEAR {
        return Ok(false);
    }
    let context = bench.follow_up(ROLE, pending.nonce, id.0, &format!("asked for at {at}"));
    let decided = bench
        .append::<Deployment>(&row.subject, &context, |state| {
            match state.and_then(|state| moved(state, at)) {
                Some(stop) => deployment::decide(state, DeploymentEvent::StopScheduled(stop)),
                None => Ok(Decision::Nothing),
            }
        })
        .await;
    match decided {
        Ok(_) | Err(Stop::Moved(_)) => Ok(true),
        Err(other) => Err(other),
    }
}

/// The scheduled stop of a deployment that was asked for at this time; none if that changes nothing.
fn moved(state: &Deployment, at: Timestamp) -> Option<StopScheduled> {
    let pending = state.stops.pending.as_ref()?;
    let due = at.checked_add(pending.keep.duration()?).ok()?;
    (pending.cause == StopCause::Idle && due > pending.due).then(|| StopScheduled {
        due,
        nonce: EventId::derived(pending.nonce.0, &format!("moved to {due}")),
        ..pending.clone()
    })
}
