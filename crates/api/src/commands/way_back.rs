//! Going back to what does not run: it is started first, or deployed once more.

use std::time::Duration;

use daybook_events::deployment::{Deployment, Status, SwitchMode};
use daybook_events::{DeploymentId, InstanceRef, Refusal, Subject};

use super::{Caller, CommandError, Commands, Lifecycle, Redeploy, Switched};
use crate::access::Verb;

/// What an answer needs beside the waiting: the request itself ends a little later.
const MARGIN: Duration = Duration::from_secs(5);

/// What is done first, so that there is something to go back to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum First {
    /// Nothing: it must run.
    Nothing,
    /// It is started, if it is stopped.
    Start,
    /// What it was made from is deployed once more, beside what runs; that is gone back to.
    Redeploy,
}

impl Commands {
    /// As [`Self::rollback`], once there is something to go back to. Each step is an event of its
    /// own, and takes time. It is waited for as long as a request may take; what is not ready by then
    /// is refused as `target_not_ready`, with its id, and goes on getting ready. With a
    /// [`super::RequestKey`], a repetition goes on where the first request was interrupted, or had to
    /// give up.
    pub async fn roll_back_after(
        &self,
        caller: &Caller,
        instance: InstanceRef,
        to: Option<DeploymentId>,
        first: First,
        note: Option<String>,
    ) -> Result<Switched, CommandError> {
        self.admit(caller, Verb::Deploy, &instance.project)?;
        if let Some(to) = to {
            self.admit_to(caller, Verb::Deploy, to)?;
        }
        if first == First::Nothing || self.earlier(caller).await?.is_some() {
            return self.rollback(caller, instance, to, note).await;
        }
        let limit = self.settings.request_timeout;
        let patience = limit.saturating_sub(MARGIN).max(limit / 2);
        let deadline = tokio::time::Instant::now() + patience;
        let to = self.way_back(&instance, to)?;
        let done = match first {
            First::Redeploy => {
                let wish = Redeploy {
                    of: to,
                    switch: Some(SwitchMode::Manual),
                    reason: note.clone(),
                };
                let deployed = self.redeploy(&caller.step("redeploy"), wish).await?;
                Some((deployed.id, deployed.done))
            }
            _ => match self.deployment(to)?.state.status {
                Status::Stopped | Status::StartError => {
                    let (caller, start) = (caller.step("start"), Lifecycle::Start);
                    let operated = self.operate(&caller, to, start, note.clone()).await?;
                    Some((to, operated.done))
                }
                _ => None,
            },
        };
        let to = match done {
            Some((to, done)) => {
                let projections = self.ledger.projections();
                let left = deadline.saturating_duration_since(tokio::time::Instant::now());
                let folded = projections.wait_for(done.position, left).await;
                folded.map_err(|behind| CommandError::Execute(behind.into()))?;
                to
            }
            None => to,
        };
        self.until_ready(to, deadline).await?;
        self.rollback(caller, instance, Some(to), note).await
    }

    /// Waits until a deployment can get traffic, or is known not to get there soon.
    async fn until_ready(
        &self,
        id: DeploymentId,
        deadline: tokio::time::Instant,
    ) -> Result<(), CommandError> {
        let projections = self.ledger.projections();
        let subject: Subject = self.deployment(id)?.subject;
        let mut changes = projections.changes();
        loop {
            changes.mark_unchanged();
            let folded = projections.shared::<Deployment>(&subject)?;
            // Its subject was found, so it has a state.
            let Some(state) = folded.state.as_ref() else {
                return Ok(());
            };
            match state.status {
                Status::Started if state.serves() => return Ok(()),
                Status::Started => {}
                status if status.is_settled() => return Err(ended(id, state).into()),
                // That may take days.
                Status::AwaitingApproval => return Err(not_yet(id, state).into()),
                _ if state.held().is_some() => return Err(not_yet(id, state).into()),
                _ => {}
            }
            let changed = tokio::time::timeout_at(deadline, changes.changed());
            if changed.await.is_err() {
                return Err(not_yet(id, state).into());
            }
        }
    }
}

fn ended(id: DeploymentId, state: &Deployment) -> Refusal {
    let status = state.status.as_str();
    let why = state.failure.as_ref();
    let why = why.map_or_else(String::new, |f| format!(": {}", f.message));
    Refusal::new(
        "target_not_running",
        format!("deployment {id}, to go back to, is {status}{why}"),
        "mend the cause, or name another deployment; `daybook history` lists them",
    )
}

fn not_yet(id: DeploymentId, state: &Deployment) -> Refusal {
    let status = state.status.as_str();
    Refusal::new(
        "target_not_ready",
        format!("deployment {id}, to go back to, is {status}, and not ready yet"),
        format!(
            "repeat the request with the same Idempotency-Key, or go back to it when it is ready: \
             `daybook rollback --to {id}`"
        ),
    )
}
