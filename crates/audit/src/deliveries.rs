//! The measures of software delivery, counted from the events of a verified ledger.

use std::collections::HashMap;

use daybook_events::deployment::DeploymentEvent;
use daybook_events::routing::RoutingEvent;
use daybook_events::{DeploymentId, Event, InstanceRef, Position};
use daybook_projections::dora::{Change, Counter, Delivery, MOST_STEPS, Period, before};

/// What the rows have.
pub(crate) const COLUMNS: &[&str] = &[
    "instance",
    "deployments",
    "per_day",
    "lead_time_median_ms",
    "failed_changes",
    "change_failure_rate",
    "time_to_restore_median_ms",
    "failed_before",
    "lead_time_p90_ms",
    "time_to_restore_p90_ms",
    "counted_positions",
];

/// Collects what is counted.
#[derive(Debug)]
pub(crate) struct Deliveries {
    counter: Counter,
    known: HashMap<DeploymentId, Known>,
}

#[derive(Debug)]
struct Known {
    instance: InstanceRef,
    change: Option<Change>,
    before: Option<DeploymentId>,
}

impl Deliveries {
    pub(crate) fn new(period: Period) -> Self {
        Self {
            counter: Counter::new(period),
            known: HashMap::new(),
        }
    }

    /// Takes an event that counts in the folds. Returns whether it could be read.
    pub(crate) fn take(&mut self, position: Position, event: &Event) -> bool {
        let mut tokens = event.subject.split('/').skip(2);
        let (aggregate, id) = (tokens.next(), tokens.next().unwrap_or_default());
        match aggregate {
            Some("deployment") => {
                let (Ok(payload), Ok(id)) = (event.payload::<DeploymentEvent>(), id.parse()) else {
                    return false;
                };
                self.deployment(position, event, id, payload);
                true
            }
            Some("routing") => match event.payload::<RoutingEvent>() {
                Ok(RoutingEvent::Switched(e)) => {
                    let known = &self.known;
                    self.counter
                        .switched(position, event.id, event.time, &e, |id| {
                            change_of(known, id)
                        });
                    true
                }
                other => other.is_ok(),
            },
            _ => true,
        }
    }

    fn deployment(
        &mut self,
        position: Position,
        event: &Event,
        id: DeploymentId,
        payload: DeploymentEvent,
    ) {
        match payload {
            DeploymentEvent::Requested(e) => {
                let known = Known {
                    before: before(&e),
                    instance: e.instance,
                    change: None,
                };
                self.known.insert(id, known);
            }
            DeploymentEvent::SourceResolved(e) => {
                if let Some(known) = self.known.get_mut(&id) {
                    known.change = Some(Change {
                        commit: e.source.commit,
                        committed_at: e.source.committed_at,
                    });
                }
            }
            DeploymentEvent::Failed(_) => {
                if let Some(known) = self.known.get(&id) {
                    let of = (&known.instance, id);
                    self.counter.failed(position, event.id, event.time, of);
                }
            }
            _ => {}
        }
    }

    pub(crate) fn measures(&self) -> Vec<Delivery> {
        self.counter.measures()
    }
}

/// What a deployment was made from: its own source, or that of the one whose image it has.
fn change_of(known: &HashMap<DeploymentId, Known>, id: DeploymentId) -> Option<Change> {
    let mut id = id;
    for _ in 0..MOST_STEPS {
        let found = known.get(&id)?;
        if found.change.is_some() {
            return found.change.clone();
        }
        id = found.before?;
    }
    None
}

/// One line of the report.
pub(crate) fn row(measured: &Delivery) -> Vec<String> {
    let ms = |ms: Option<i64>| ms.map(|ms| ms.to_string()).unwrap_or_default();
    let rate = measured.change_failure_rate;
    let counted = measured.counted.deployments.iter();
    let counted: Vec<String> = counted.map(|c| c.position.to_string()).collect();
    vec![
        measured.instance_id.clone(),
        measured.deployments.to_string(),
        measured.deployments_per_day.to_string(),
        ms(measured.lead_time.median_ms),
        measured.failed_changes.to_string(),
        rate.map(|rate| rate.to_string()).unwrap_or_default(),
        ms(measured.time_to_restore.median_ms),
        measured.failed_before.to_string(),
        ms(measured.lead_time.p90_ms),
        ms(measured.time_to_restore.p90_ms),
        counted.join(" "),
    ]
}

/// What was counted, in sentences.
pub(crate) fn statement(period: Period) -> Vec<String> {
    vec![
        format!(
            "Counted from {} and before {}, by the times that the events say.",
            period.from, period.to
        ),
        "A deployment counts once it gets the traffic for the first time. Its lead time runs from \
         its commit to there; only the first deployment of a commit has one. It is a failed change \
         if a rollback takes the traffic from it before the period ends, and the time to restore \
         runs from one switch to the other. What failed before it got the traffic is counted \
         beside this."
            .to_owned(),
    ]
}
