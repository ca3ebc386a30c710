//! Admission: one running pipeline per service instance.
//!
//! While one runs, newer requests wait; of several that wait only the newest is still wanted, and
//! supersedes the others. Cancellations are carried out here too, as the one place that ends a
//! pipeline on purpose. The consumer has one delivery in flight over all processes, so admissions
//! are decided one after the other.

use async_trait::async_trait;
use daybook_events::deployment::{Cancelled, DeploymentEvent, Queued, Status};
use daybook_events::{AggregateKind, Subject, SubjectFilter};
use daybook_projections::DeploymentRow;

use super::{Bench, Stop, freeze, give_up, settle};
use crate::driver::{Activation, Outcome, Worker};
use crate::ports::StepError;

const ROLE: &str = "queue";

/// The admission worker.
#[derive(Debug)]
pub struct Queue(pub Bench);

#[async_trait]
impl Worker for Queue {
    fn name(&self) -> String {
        ROLE.into()
    }
    fn filter(&self) -> SubjectFilter {
        SubjectFilter::of(AggregateKind::Deployment)
    }
    fn wants(&self, kind: &str) -> bool {
        matches!(
            kind,
            "deployment.requested.v1"
                | "deployment.cancel_requested.v1"
                | "deployment.released.v1"
                | "deployment.emergency_freeze_override.v1"
                | "deployment.succeeded.v1"
                | "deployment.failed.v1"
                | "deployment.cancelled.v1"
        )
    }
    fn key(&self, _: &Subject) -> String {
        ROLE.into()
    }
    fn max_in_flight(&self) -> usize {
        1
    }
    fn concurrency(&self) -> usize {
        1
    }
    async fn activate(&self, a: &Activation) -> Outcome {
        let Subject::Deployment(_, _, id) = a.subject else {
            return Outcome::Done;
        };
        settle(&self.0, ROLE, id, self.step(a).await).await
    }
    async fn give_up(&self, a: &Activation, why: &str) -> Outcome {
        give_up(&self.0, ROLE, a, why).await
    }
}

impl Queue {
    async fn step(&self, a: &Activation) -> Result<(), Stop> {
        let Subject::Deployment(_, _, id) = a.subject else {
            return Ok(());
        };
        let Some(row) = self.0.row(id)? else {
            return Ok(());
        };
        if row.state.cancel.is_some() && row.state.status.in_pipeline() {
            let reason = row.state.cancel.as_ref().and_then(|c| c.reason.clone());
            let message = reason.map_or_else(
                || "cancelled on request".to_owned(),
                |r| format!("cancelled: {r}"),
            );
            self.cancel(&row, None, message).await?;
        }
        self.admit(&row).await
    }

    async fn admit(&self, about: &DeploymentRow) -> Result<(), Stop> {
        let mut pipeline = self
            .0
            .ledger
            .projections()
            .active_of(&about.state.request.instance)?;
        pipeline.retain(|r| r.state.status.in_pipeline());
        pipeline.sort_by_key(|r| r.created);
        // What a freeze holds before its commit waits as what was not admitted yet does.
        let waits =
            |r: &DeploymentRow| r.state.status == Status::Requested || r.state.held().is_some();
        let running = pipeline
            .iter()
            .any(|r| r.state.status.holds_instance() && !waits(r));
        let mut waiting: Vec<_> = pipeline
            .into_iter()
            .filter(|r| waits(r) && r.state.cancel.is_none())
            .collect();
        let Some(newest) = waiting.pop() else {
            return Ok(());
        };
        for older in waiting {
            let message = format!("superseded by the newer deployment {}", newest.id);
            moved_is_fine(self.cancel(&older, Some(&newest), message).await)?;
        }
        if !running && newest.state.status == Status::Requested {
            if let Some(gone) = self.gone(&newest)? {
                return moved_is_fine(self.0.fail(ROLE, &newest, &gone).await);
            }
            match freeze::lets_through(&self.0, &newest).await {
                Ok(true) => {}
                Ok(false) => return Ok(()),
                Err(stop) => return moved_is_fine(Err(stop)),
            }
            let admitted = self
                .0
                .advance(ROLE, &newest, "queued", DeploymentEvent::Queued(Queued {}))
                .await;
            moved_is_fine(admitted.map(|_| ()))?;
        }
        Ok(())
    }

    /// Why it cannot be deployed to its environment any more: somebody deleted that in between.
    fn gone(&self, row: &DeploymentRow) -> Result<Option<StepError>, Stop> {
        let instance = &row.state.request.instance;
        let projections = self.0.ledger.projections();
        let environment = projections.environment(&instance.project, &instance.environment)?;
        let refused = environment.and_then(|e| e.must_be_active().err());
        Ok(refused.map(|r| StepError::fatal(r.code, r.message, r.remedy)))
    }

    async fn cancel(
        &self,
        row: &DeploymentRow,
        by: Option<&DeploymentRow>,
        message: String,
    ) -> Result<(), Stop> {
        self.0.say(row.id, None, message.clone()).await;
        let event = DeploymentEvent::Cancelled(Cancelled {
            during: row.state.status,
            superseded_by: by.map(|r| r.id),
            message,
        });
        self.0
            .advance(ROLE, row, "cancelled", event)
            .await
            .map(|_| ())
    }
}

/// Somebody else's deployment having moved on is no reason to stop with this one.
fn moved_is_fine(result: Result<(), Stop>) -> Result<(), Stop> {
    match result {
        Err(Stop::Moved(_)) => Ok(()),
        other => other,
    }
}
