//! Changing how a service instance runs, without another version of it.

use std::collections::{BTreeMap, BTreeSet};

use daybook_events::deployment::{
    self, Deployment, DeploymentEvent, Requested, ScaleRequested, SwitchMode,
};
use daybook_events::environment::Environment;
use daybook_events::{DeploymentId, EnvKey, InstanceRef, Refusal, Subject};

use super::deploy::pinned_version;
use super::{Caller, CommandError, Commands, Deployed, Done, Operated, check};
use crate::access::Verb;

/// A wish for other environment variables.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Configure {
    /// The instance.
    pub instance: InstanceRef,
    /// Variables with their new values.
    pub set: BTreeMap<EnvKey, String>,
    /// Variables to be taken away.
    pub unset: BTreeSet<EnvKey>,
    /// Whether traffic follows by itself; as the environment says if not given.
    pub switch: Option<SwitchMode>,
    /// Why.
    pub reason: Option<String>,
}

impl Commands {
    /// Asks for another number of instances of an instance's main deployment, in each cluster. It
    /// is scaled in place, and later deployments of the instance have as many.
    pub async fn scale(
        &self,
        caller: &Caller,
        instance: &InstanceRef,
        replicas: u32,
        reason: Option<String>,
    ) -> Result<Operated, CommandError> {
        self.admit(caller, Verb::Deploy, &instance.project)?;
        if let Some((done, Subject::Deployment(_, _, id))) = self.earlier(caller).await? {
            return Ok(Operated { id, done });
        }
        check::text("reason", reason.as_deref())?;
        let (_, environment) = self.deployable(instance)?;
        self.not_frozen(&environment)?;
        needs_no_approval(&environment)?;
        let (id, subject, _) = self.running(instance)?;
        let event = ScaleRequested { replicas, reason };
        let done = self
            .run(caller, &subject, Some(id.0), |state| {
                deployment::decide(state, DeploymentEvent::ScaleRequested(event.clone()))
            })
            .await?;
        Ok(Operated { id, done })
    }

    /// Requests a deployment of what an instance's main deployment runs, by its digest, with other
    /// environment variables. Later deployments of the instance have them too, until somebody
    /// changes them again or goes back to an older deployment. If all of it is so already, nothing
    /// is requested, and the main deployment is what is returned.
    pub async fn configure(
        &self,
        caller: &Caller,
        wish: Configure,
    ) -> Result<Deployed, CommandError> {
        self.admit(caller, Verb::Deploy, &wish.instance.project)?;
        let id = caller.deployment_id();
        if let Some((done, _)) = self.earlier(caller).await? {
            return Ok(Deployed { id, done });
        }
        check::text("reason", wish.reason.as_deref())?;
        if let Some(key) = wish.set.keys().find(|key| wish.unset.contains(*key)) {
            return Err(Refusal::new(
                "variable_ambiguous",
                format!("{key} is to be set and to be taken away"),
                "name it once",
            )
            .into());
        }
        let (main, _, old) = self.running(&wish.instance)?;
        let (_, environment) = self.deployable(&wish.instance)?;
        self.not_frozen(&environment)?;
        self.clusters(&old.request.clusters)?;
        let secrets = self.applicable_secrets(&wish.instance).await?;
        let mut named = wish.set.keys().chain(&wish.unset);
        if let Some(name) = named.find(|name| secrets.contains_key(*name)) {
            return Err(Refusal::new(
                "variable_is_secret",
                format!("{name} is a secret of this deployment; its value does not belong here"),
                "change it with `daybook secret set` or `unset`, and deploy again",
            )
            .into());
        }
        let mut config = old.config();
        let set = wish.set.into_iter().map(|(key, value)| (key, Some(value)));
        let unset = wish.unset.into_iter().map(|key| (key, None));
        config.env.extend(set.chain(unset));
        let mut run = old.request.run.clone();
        run.replicas = old.replicas;
        let before = run.clone();
        config.apply(&mut run);
        if run == before {
            let done = Done {
                position: self.ledger.projections().position(),
                event: None,
                replayed: false,
            };
            return Ok(Deployed { id: main, done });
        }
        check::run(&run)?;
        let version = pinned_version(main, &old)?;
        let request = Requested {
            version,
            run,
            config,
            switch: wish.switch.unwrap_or(environment.spec.switch),
            reason: wish.reason,
            redeploy_of: Some(main),
            promoted_from: None,
            secrets,
            ..*old.request
        };
        self.request(caller, id, request).await
    }

    /// The main deployment of an instance, if there is one.
    pub(super) fn main_of(
        &self,
        instance: &InstanceRef,
    ) -> Result<Option<DeploymentId>, CommandError> {
        let routing = self.ledger.projections().routing(&instance.project)?;
        let traffic = routing.as_ref().and_then(|r| r.traffic(instance));
        Ok(traffic.and_then(|t| t.main))
    }

    /// The main deployment of an instance with its state.
    fn running(
        &self,
        instance: &InstanceRef,
    ) -> Result<(DeploymentId, Subject, Deployment), CommandError> {
        self.deployable(instance)?;
        let Some(main) = self.main_of(instance)? else {
            return Err(Refusal::new(
                "nothing_runs",
                format!("{instance} has no main deployment"),
                "deploy it first with `daybook deploy`",
            )
            .into());
        };
        let row = self.deployment(main)?;
        Ok((main, row.subject, row.state))
    }
}

/// Refuses what is done in place, where people have to allow what changes: they allow deployments.
fn needs_no_approval(environment: &Environment) -> Result<(), Refusal> {
    if environment.spec.approval.is_none() {
        return Ok(());
    }
    Err(Refusal::new(
        "approval_required",
        format!(
            "{} asks for approvals, and nobody can allow a change in place",
            environment.name
        ),
        "deploy with the number that you want, `daybook deploy --replicas`, and have that allowed",
    ))
}
