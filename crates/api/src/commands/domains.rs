//! Hostnames that their owners bring along.

use daybook_events::domain::{self, Domain};
use daybook_events::routing::{self, SetDomain, Stickiness};
use daybook_events::{Hostname, InstanceRef, ProjectName, Refusal, Subject};

use super::{Caller, CommandError, Commands, Done};
use crate::access::Verb;

impl Commands {
    /// Claims a hostname for an instance. In the live environment it moves with the live
    /// address of the service, and with that of the environment elsewhere. The workers route it.
    pub async fn claim_domain(
        &self,
        caller: &Caller,
        hostname: Hostname,
        instance: InstanceRef,
    ) -> Result<Done, CommandError> {
        self.admit(caller, Verb::Configure, &instance.project)?;
        let (_, environment) = self.deployable(&instance)?;
        self.bring_along(&hostname)?;
        let stickiness = match environment.spec.live {
            true => Stickiness::Live,
            false => Stickiness::Environment,
        };
        if self.earlier(caller).await?.is_none() {
            self.fits(&hostname, &instance, stickiness)?;
        }
        let command = domain::Command::Claim {
            hostname: hostname.clone(),
            instance,
            stickiness,
        };
        self.run::<Domain>(caller, &Subject::Domain(hostname), None, |state| {
            domain::decide(state, command.clone())
        })
        .await
    }

    /// Gives a hostname up: it is taken out of the routes, and free then.
    pub async fn release_domain(
        &self,
        caller: &Caller,
        project: &ProjectName,
        hostname: Hostname,
    ) -> Result<Done, CommandError> {
        self.admit(caller, Verb::Configure, project)?;
        self.project(project)?;
        let command = domain::Command::Release {
            project: project.clone(),
        };
        self.run::<Domain>(caller, &Subject::Domain(hostname), None, |state| {
            domain::decide(state, command.clone())
        })
        .await
    }

    /// Refuses what the route table would refuse, before anything is claimed. The worker that
    /// routes the hostname asks it again.
    fn fits(
        &self,
        hostname: &Hostname,
        instance: &InstanceRef,
        stickiness: Stickiness,
    ) -> Result<(), CommandError> {
        let projections = self.ledger.projections();
        let command = routing::Command::SetDomain(SetDomain {
            hostname: hostname.clone(),
            instance: instance.clone(),
            stickiness,
            claim: u32::MAX,
            attach: Some(self.addresses(instance)?),
        });
        let routing = projections.routing(&instance.project)?;
        routing::decide(routing.as_ref(), command)?;
        Ok(())
    }

    /// Refuses names that Daybook itself gives.
    fn bring_along(&self, hostname: &Hostname) -> Result<(), Refusal> {
        let own = self.settings.domain.as_str();
        let below = hostname.as_str().strip_suffix(own);
        if below.is_none_or(|rest| !rest.is_empty() && !rest.ends_with('.')) {
            return Ok(());
        }
        Err(Refusal::new(
            "hostname_reserved",
            format!("names under {own} are Daybook's own to give"),
            "bring a hostname of a domain of yours, such as www.example.com",
        ))
    }
}
