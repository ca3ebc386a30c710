//! Publishes what happens in the words of CDEvents, for subscribers on NATS.
//!
//! One event after the other, over all processes: the durable consumer hands out the next one only
//! when the one before is published. So they are in the order of the ledger. One that is handed out
//! again is published only if it is not the last one that the stream has; besides, the stream
//! leaves out what has the id of one of the last two minutes.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use daybook_events::{Event, Subject, SubjectFilter};
use daybook_projections::Projections;

use crate::driver::{Activation, Outcome, Worker};

/// After how long one that was not published is tried again.
const AGAIN: Duration = Duration::from_secs(1);
/// How long the fold is waited for at once.
const FOLD_WAIT: Duration = Duration::from_secs(5);

/// Where CDEvents are published.
#[async_trait]
pub trait Bulletin: fmt::Debug + Send + Sync {
    /// Publishes a CloudEvent at a place below the bulletin's own. With `again` it may have been
    /// published already, as the last one: then nothing is done, however long ago that was. The
    /// error says why not, and may pass.
    async fn publish(&self, place: &str, id: &str, event: Bytes, again: bool)
    -> Result<(), String>;
}

/// Woken by every event.
#[derive(Debug)]
pub(crate) struct CdeventsWorker {
    pub(crate) projections: Projections,
    pub(crate) log: Arc<dyn daybook_events::EventLog>,
    pub(crate) bulletin: Arc<dyn Bulletin>,
}

#[async_trait]
impl Worker for CdeventsWorker {
    fn name(&self) -> String {
        "notify-cdevents".into()
    }
    fn filter(&self) -> SubjectFilter {
        SubjectFilter::default()
    }
    fn wants(&self, kind: &str) -> bool {
        let family = kind.split('.').next().unwrap_or_default();
        matches!(
            family,
            "deployment" | "build" | "gitops" | "routing" | "environment"
        )
    }
    fn key(&self, _: &Subject) -> String {
        "all".into()
    }
    fn concurrency(&self) -> usize {
        1
    }
    fn max_in_flight(&self) -> usize {
        1
    }
    async fn activate(&self, a: &Activation) -> Outcome {
        self.try_it(a).await
    }
    /// However long NATS is away, or the fold behind, none is left out: what the driver would give
    /// up is tried on.
    async fn give_up(&self, a: &Activation, _: &str) -> Outcome {
        self.try_it(a).await
    }
}

impl CdeventsWorker {
    async fn try_it(&self, a: &Activation) -> Outcome {
        match self.publish(a).await {
            Ok(()) => Outcome::Done,
            Err(why) => {
                tracing::warn!(position = %a.position, attempt = a.attempt, %why,
                    "a CDEvent was not published; trying again");
                Outcome::Wait(AGAIN)
            }
        }
    }

    async fn publish(&self, a: &Activation) -> Result<(), String> {
        // Before it is folded nobody can say what it means.
        let folded = self.projections.wait_for(a.position, FOLD_WAIT).await;
        folded.map_err(|behind| behind.to_string())?;
        let found = self.log.get(a.position).await;
        let Some(recorded) = found.map_err(|e| e.to_string())? else {
            return Err(format!("there is no event at {}", a.position));
        };
        let message = self
            .projections
            .cdevent_message(&recorded, &a.event)
            .map_err(|e| e.to_string())?;
        match message {
            Some(message) => {
                let id = a.event.id.to_string();
                let place = place(&a.subject, &a.event);
                let again = a.attempt > 1;
                self.bulletin
                    .publish(&place, &id, message.into(), again)
                    .await
            }
            None => Ok(()),
        }
    }
}

/// `<project>.<environment or _>.<run>`
fn place(subject: &Subject, event: &Event) -> String {
    let project = subject.project().map_or("_", |p| p.as_str());
    let environment = subject.environment().map_or("_", |e| e.as_str());
    let run = match subject {
        Subject::Deployment(_, _, id) => id.0,
        _ => event.correlationid,
    };
    format!("{project}.{environment}.{run}")
}
