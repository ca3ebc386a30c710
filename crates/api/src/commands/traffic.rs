//! Where traffic goes: making a deployment the main one, and going back.

use daybook_events::routing::{self, Command, Hostnames, RoutingEvent, Target};
use daybook_events::timer::{self, KeepCause};
use daybook_events::{Context, Decision, DeploymentId, EventId, InstanceRef, Refusal, Subject};

use super::{Caller, CommandError, Commands, Done, OWN_WRITE_WAIT, check};
use crate::access::Verb;

/// A switch of the main deployment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Switched {
    /// The instance.
    pub instance: InstanceRef,
    /// Its main deployment from here on.
    pub main: DeploymentId,
    /// The one before.
    pub previous_main: Option<DeploymentId>,
    /// How it was recorded.
    pub done: Done,
}

impl Commands {
    /// Makes a running deployment the main one of its instance, and lets later ones take over by
    /// themselves again. `expected_main` guards against a switch that somebody else made.
    pub async fn mark_main(
        &self,
        caller: &Caller,
        id: DeploymentId,
        expected_main: Option<DeploymentId>,
        note: Option<String>,
    ) -> Result<Switched, CommandError> {
        self.admit_to(caller, Verb::Deploy, id)?;
        if self.earlier(caller).await?.is_none() {
            self.may_get_traffic(id)?;
        }
        check::text("reason", note.as_deref())?;
        let command = |(target, hostnames)| Command::MarkMain {
            target,
            hostnames,
            expected_main,
            note: note.clone(),
        };
        self.keep_for(caller, id, command(self.target(id)?)).await?;
        let (target, hostnames) = self.target(id)?;
        let command = command((target.clone(), hostnames));
        self.switch(caller, target, command).await
    }

    /// Goes back to a deployment that still runs: to `to`, or else to the main one before. No
    /// deployment takes over by itself from here on, until one is marked as main.
    pub async fn rollback(
        &self,
        caller: &Caller,
        instance: InstanceRef,
        to: Option<DeploymentId>,
        note: Option<String>,
    ) -> Result<Switched, CommandError> {
        self.admit(caller, Verb::Deploy, &instance.project)?;
        if let Some(to) = to {
            self.admit_to(caller, Verb::Deploy, to)?;
        }
        if let Some((done, _)) = self.earlier(caller).await? {
            return self.switched(instance, done).await;
        }
        check::text("reason", note.as_deref())?;
        self.deployable(&instance)?;
        let to = self.way_back(&instance, to)?;
        if !self.was_live(&instance, to)? {
            self.may_get_traffic(to)?;
        }
        let command = |(target, hostnames)| Command::Rollback {
            target,
            hostnames,
            note: note.clone(),
        };
        self.keep_for(caller, to, command(self.target(to)?)).await?;
        let (target, hostnames) = self.target(to)?;
        let command = command((target.clone(), hostnames));
        let rolled_back = self.switch(caller, target, command).await;
        rolled_back.map_err(|e| match e {
            CommandError::Refused(mut r) if r.code == "target_not_running" => {
                r.remedy = format!(
                    "{}; or deploy it once more with `daybook rollback --redeploy --to {to}`, or name \
                     another one that runs",
                    r.remedy
                );
                r.into()
            }
            other => other,
        })
    }

    /// Whether a deployment had the traffic of its instance lately, or is one that had, deployed once
    /// more and not changed: nobody has to allow that it gets it back.
    fn was_live(&self, instance: &InstanceRef, id: DeploymentId) -> Result<bool, CommandError> {
        let routing = self.ledger.projections().routing(&instance.project)?;
        let traffic = routing.as_ref().and_then(|r| r.traffic(instance));
        let was_main = |id| traffic.is_some_and(|t| t.was_main(id));
        if was_main(id) {
            return Ok(true);
        }
        let again = self.deployment(id)?.state;
        Ok(match again.request.redeploy_of.filter(|of| was_main(*of)) {
            Some(of) => again.runs_as(&self.deployment(of)?.state),
            None => false,
        })
    }

    /// The deployment that a rollback goes back to, if `to` does not say which.
    pub(super) fn way_back(
        &self,
        instance: &InstanceRef,
        to: Option<DeploymentId>,
    ) -> Result<DeploymentId, CommandError> {
        let to = match to {
            Some(to) => to,
            None => self.former_main(instance)?,
        };
        let (target, _) = self.target(to)?;
        if target.instance != *instance {
            return Err(Refusal::new(
                "other_instance",
                format!(
                    "deployment {to} belongs to {}, not to {instance}",
                    target.instance
                ),
                "name a deployment of this instance; `daybook history` lists them",
            )
            .into());
        }
        Ok(to)
    }

    /// The deployment that a rollback goes back to: the main one, if others share its traffic, and
    /// the one that was the main one before otherwise.
    fn former_main(&self, instance: &InstanceRef) -> Result<DeploymentId, CommandError> {
        let routing = self.ledger.projections().routing(&instance.project)?;
        let traffic = routing.as_ref().and_then(|r| r.traffic(instance));
        let hostnames = self.addresses(instance)?;
        let shared = routing
            .as_ref()
            .is_some_and(|r| r.is_split(instance, &hostnames));
        let main = traffic.and_then(|t| t.main).filter(|_| shared);
        let former = main.or_else(|| traffic?.former.last().copied());
        Ok(former.ok_or_else(|| {
            Refusal::new(
                "nothing_to_roll_back",
                format!("{instance} has had no other main deployment before"),
                "deploy something first, or name the deployment to go back to",
            )
        })?)
    }

    /// Calls off the scheduled stop of a deployment that is about to get traffic by this command,
    /// if that is possible. Whichever of the stop and this comes first, the state of the target
    /// then says so: traffic never meets a stop that nobody knew of.
    pub(super) async fn keep_for(
        &self,
        caller: &Caller,
        id: DeploymentId,
        command: Command,
    ) -> Result<(), CommandError> {
        let row = self.deployment(id)?;
        if row.state.stops.pending.is_none() || self.earlier(caller).await?.is_some() {
            return Ok(());
        }
        let instance = &row.state.request.instance;
        let routing = self.ledger.projections().routing(&instance.project)?;
        if !matches!(
            routing::decide(routing.as_ref(), command),
            Ok(Decision::Append(_))
        ) {
            return Ok(());
        }
        let table = routing.map(|r| r.table);
        let request = caller.event_id();
        let context = Context {
            request_digest: None,
            ..caller.context(EventId::derived(request.0, "kept"), id.0)
        };
        let kept = self.ledger.execute(&row.subject, &context, |state| {
            timer::keep(state, KeepCause::Traffic, table, None)
        });
        if let Some(position) = kept.await?.position() {
            let projections = self.ledger.projections();
            let folded = projections.wait_for(position, OWN_WRITE_WAIT).await;
            folded.map_err(|behind| CommandError::Execute(behind.into()))?;
        }
        Ok(())
    }

    /// The newest route table of an instance's project.
    pub(super) fn newest_table(&self, instance: &InstanceRef) -> Result<Option<u32>, CommandError> {
        let routing = self.ledger.projections().routing(&instance.project)?;
        Ok(routing.map(|r| r.table))
    }

    pub(super) fn target(&self, id: DeploymentId) -> Result<(Target, Hostnames), CommandError> {
        let deployment = self.deployment(id)?.state;
        let instance = deployment.request.instance.clone();
        let environment = self.environment(&instance.project, &instance.environment)?;
        let live = environment.spec.live;
        let hostnames = Hostnames::under(&self.settings.domain, &instance, id, live)?;
        let target = Target {
            deployment: id,
            instance,
            status: deployment.status,
            ready: deployment.serves(),
        };
        Ok((target, hostnames))
    }

    async fn switch(
        &self,
        caller: &Caller,
        target: Target,
        command: Command,
    ) -> Result<Switched, CommandError> {
        let subject = Subject::Routing(target.instance.project.clone());
        let run = Some(target.deployment.0);
        let done = self
            .run(caller, &subject, run, |state| {
                routing::decide(state, command.clone())
            })
            .await?;
        if done.event.is_none() {
            return Ok(Switched {
                instance: target.instance,
                main: target.deployment,
                previous_main: Some(target.deployment),
                done,
            });
        }
        self.switched(target.instance, done).await
    }

    /// What a recorded switch did: the same answer now and for every repetition.
    async fn switched(&self, instance: InstanceRef, done: Done) -> Result<Switched, CommandError> {
        let event = self.event(done.event.unwrap_or(done.position)).await?;
        match event.payload() {
            Ok(RoutingEvent::Switched(e)) => Ok(Switched {
                instance,
                main: e.deployment,
                previous_main: match e.main {
                    Some(change) => change.previous,
                    None => Some(e.deployment),
                },
                done,
            }),
            _ => Err(CommandError::KeyReused),
        }
    }
}
