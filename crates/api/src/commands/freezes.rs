//! When an environment is frozen, and what goes through all the same.

use daybook_events::deployment::{self, Deployment, DeploymentEvent};
use daybook_events::environment::{self, Environment, EnvironmentEvent};
use daybook_events::freeze::{self, Freeze, FreezeOverride, FreezeRemoved, FreezeSet};
use daybook_events::{DeploymentId, EnvironmentName, FreezeName, ProjectName, Refusal, Subject};
use jiff::Timestamp;

use super::{Caller, CommandError, Commands, Done, Operated, check};
use crate::access::Verb;

impl Commands {
    /// Gives an environment a window in which it is frozen, or another one of that name.
    pub async fn set_freeze(
        &self,
        caller: &Caller,
        project: ProjectName,
        environment: EnvironmentName,
        name: FreezeName,
        freeze: Freeze,
    ) -> Result<Done, CommandError> {
        self.admit(caller, Verb::Configure, &project)?;
        check::text("reason", freeze.reason.as_deref())?;
        self.environment(&project, &environment)?;
        let now = Timestamp::now();
        let event = FreezeSet { name, freeze };
        let subject = Subject::Environment(project, environment);
        self.run::<Environment>(caller, &subject, None, |state| {
            freeze::set(state, event.clone(), now)
        })
        .await
    }

    /// Takes a window away. What waits for its end goes on.
    pub async fn remove_freeze(
        &self,
        caller: &Caller,
        project: ProjectName,
        environment: EnvironmentName,
        name: FreezeName,
        reason: Option<String>,
    ) -> Result<Done, CommandError> {
        self.admit(caller, Verb::Configure, &project)?;
        check::text("reason", reason.as_deref())?;
        self.environment(&project, &environment)?;
        let event = FreezeRemoved { name, reason };
        let subject = Subject::Environment(project, environment);
        self.run::<Environment>(caller, &subject, None, |state| {
            environment::decide(state, EnvironmentEvent::FreezeRemoved(event.clone()))
        })
        .await
    }

    /// Lets one deployment through the freeze that holds it, in an emergency. Somebody else has to
    /// review that later.
    pub async fn override_freeze(
        &self,
        caller: &Caller,
        id: DeploymentId,
        reason: Option<String>,
    ) -> Result<Operated, CommandError> {
        self.admit_to(caller, Verb::Override, id)?;
        check::text("reason", reason.as_deref())?;
        let reason = check::given(reason)?;
        let row = self.deployment(id)?;
        let by = caller.actor.id.clone();
        let run = Some(id.0);
        let done = self
            .run::<Deployment>(caller, &row.subject, run, |state| {
                let hold = state.and_then(|s| s.hold.as_ref());
                let event = FreezeOverride {
                    freeze: hold.ok_or_else(freeze::not_held)?.freeze.clone(),
                    by: by.clone(),
                    reason: reason.clone(),
                };
                deployment::decide(state, DeploymentEvent::FreezeOverride(event))
            })
            .await?;
        Ok(Operated { id, done })
    }

    /// Refuses what changes how an environment runs and cannot wait, while that is frozen.
    pub(super) fn not_frozen(&self, environment: &Environment) -> Result<(), Refusal> {
        freeze::refusal(environment, Timestamp::now()).map_or(Ok(()), Err)
    }

    /// The same for traffic that is to go to a deployment: one that was let through in an emergency
    /// gets it all the same.
    pub(super) fn may_get_traffic(&self, id: DeploymentId) -> Result<(), CommandError> {
        let state = self.deployment(id)?.state;
        if state.goes_through_freezes() {
            return Ok(());
        }
        let instance = &state.request.instance;
        let environment = self.environment(&instance.project, &instance.environment)?;
        Ok(self.not_frozen(&environment)?)
    }
}
