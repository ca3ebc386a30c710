//! What the driver makes of the outcomes of its workers.
#![allow(clippy::unwrap_used)]

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use daybook_events::deployment::{self, Deployment, DeploymentEvent};
use daybook_events::memory::MemoryLog;
use daybook_events::testing::{context, samples};
use daybook_events::{EventLog, Subject, SubjectFilter};
use daybook_projections::{Ledger, Projections, runner};
use daybook_workers::driver::{self, Activation, DriverOptions, Outcome, Worker};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

/// Finds somebody else at work the first time, who does not come to an end.
struct Overtaken(mpsc::Sender<u32>);

#[async_trait]
impl Worker for Overtaken {
    fn name(&self) -> String {
        "overtaken".into()
    }
    fn filter(&self) -> SubjectFilter {
        SubjectFilter::default()
    }
    fn wants(&self, _: &str) -> bool {
        true
    }
    async fn activate(&self, activation: &Activation) -> Outcome {
        self.0.send(activation.attempt).await.unwrap();
        match activation.attempt {
            1 => Outcome::Overtaken,
            _ => Outcome::Done,
        }
    }
    async fn give_up(&self, _: &Activation, _: &str) -> Outcome {
        Outcome::Done
    }
}

#[tokio::test]
async fn what_somebody_else_works_on_comes_again_if_they_never_answer() {
    let log: Arc<dyn EventLog> = Arc::new(MemoryLog::new());
    let projections = Projections::in_memory();
    let cancel = CancellationToken::new();
    let runner = tokio::spawn(runner::run(
        projections.clone(),
        log.clone(),
        cancel.clone(),
    ));
    let (sender, mut attempts) = mpsc::channel(16);
    let options = DriverOptions {
        ack_wait: Duration::from_millis(200),
        ..DriverOptions::default()
    };
    let worker = tokio::spawn(driver::run(
        Arc::new(Overtaken(sender)),
        log.clone(),
        projections.clone(),
        options,
        cancel.clone(),
    ));

    let of = samples::shop();
    let subject = Subject::Deployment(of.project, of.environment, samples::deployment_id(1));
    let requested = DeploymentEvent::Requested(Box::new(samples::request(samples::shop())));
    Ledger::new(log, projections)
        .execute::<Deployment>(&subject, &context(1), |state| {
            deployment::decide(state, requested.clone())
        })
        .await
        .unwrap();
    for expected in [1, 2] {
        let attempt = tokio::time::timeout(Duration::from_secs(30), attempts.recv());
        assert_eq!(attempt.await.unwrap(), Some(expected));
    }
    cancel.cancel();
    worker.await.unwrap();
    runner.await.unwrap().unwrap();
}
