//! Has a cluster try again what has failed there: one worker for each cluster that this process
//! looks after.
//!
//! The wish is recorded first. The cluster forgets its failure, and only then is it recorded that
//! it has taken the new try on: what was seen before that counts for nothing.

use std::borrow::Cow;

use async_trait::async_trait;
use daybook_events::deployment::{ClusterProgress, ClusterRetried, DeploymentEvent};
use daybook_events::{AggregateKind, DeploymentId, Subject, SubjectFilter};

use super::rollout::settle_in;
use super::sync::Sync;
use super::{Stop, outcome, said, traced};
use crate::driver::{Activation, Outcome, Worker};
use crate::ports::StepError;
use crate::target::{AppRef, TargetError};

const ROLE: &str = "retry";

/// The worker of one cluster.
pub struct Retry(pub Sync);

#[async_trait]
impl Worker for Retry {
    fn name(&self) -> String {
        format!("{ROLE}-{}", self.0.target.cluster())
    }
    fn unit(&self) -> Cow<'static, str> {
        ROLE.into()
    }
    fn filter(&self) -> SubjectFilter {
        SubjectFilter::of(AggregateKind::Deployment)
    }
    fn wants(&self, kind: &str) -> bool {
        matches!(
            kind,
            "deployment.retry_requested.v1" | "deployment.start_requested.v1"
        )
    }
    async fn activate(&self, a: &Activation) -> Outcome {
        let Subject::Deployment(_, _, id) = a.subject else {
            return Outcome::Done;
        };
        traced::in_cluster(self.0.target.cluster());
        let step = tokio::select! {
            step = self.step(id) => step,
            () = a.cancel.cancelled() => Err(Stop::Interrupted),
        };
        outcome(match step {
            Err(Stop::Fail(error)) => self.fail(id, error).await,
            other => other,
        })
    }
    async fn give_up(&self, a: &Activation, why: &str) -> Outcome {
        let Subject::Deployment(_, _, id) = a.subject else {
            return Outcome::Done;
        };
        outcome(self.fail(id, said(a, why)).await)
    }
}

impl Retry {
    async fn step(&self, id: DeploymentId) -> Result<(), Stop> {
        let Sync { bench, target, .. } = &self.0;
        let cluster = target.cluster();
        let Some(row) = bench.row(id)? else {
            return Ok(());
        };
        let asked = row.state.clusters.get(cluster);
        let Some(tries) = asked.filter(|p| p.is_asked_again()).map(|p| p.tries) else {
            return Ok(());
        };
        let instance = &row.state.request.instance;
        self.0.converge_environment(instance, id).await?;
        let text = format!("trying again in {cluster} (try {tries})");
        bench.say(id, Some(cluster.clone()), text).await;
        let app = AppRef {
            project: instance.project.clone(),
            environment: instance.environment.clone(),
        };
        target.retry(&app, id).await.map_err(|e| match e {
            TargetError::Unavailable(why) => {
                Stop::Retry(format!("cluster_unavailable: {cluster}: {why}"))
            }
            TargetError::Refused(why) => Stop::Fail(StepError::fatal(
                "retry_refused",
                format!("{cluster} does not try again: {why}"),
                "deploy again with `daybook redeploy`",
            )),
        })?;
        let event = DeploymentEvent::ClusterRetried(ClusterRetried {
            cluster: cluster.clone(),
        });
        let step = format!("cluster_retried {cluster} {tries}");
        bench.advance(ROLE, &row, &step, event).await.map(|_| ())
    }

    async fn fail(&self, id: DeploymentId, error: StepError) -> Result<(), Stop> {
        let Sync { bench, target, .. } = &self.0;
        let row = bench.row(id)?;
        let progress = row
            .as_ref()
            .and_then(|r| r.state.clusters.get(target.cluster()));
        if !progress.is_some_and(ClusterProgress::is_asked_again) {
            return Ok(());
        }
        settle_in(bench, ROLE, id, target.cluster(), error).await
    }
}
