//! Who shares the traffic of an instance, and how it is spread over clusters.

use daybook_events::routing::{
    self, ClusterPolicy, Command, Hostnames, Routing, RoutingEvent, SetPolicy, Share, Split,
    Switched,
};
use daybook_events::{DeploymentId, Hostname, InstanceRef, ProjectName, Refusal, Subject};

use super::{Caller, CommandError, Commands, Done, check};
use crate::access::Verb;

/// What traffic is to be shared: all of an instance's, or that of one hostname.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Traffic {
    /// On every address that moves with the main deployment.
    Of(InstanceRef),
    /// On one of them.
    On(Hostname),
}

/// Which deployments are to share it.
#[derive(Debug, Clone)]
pub struct Shares {
    /// The project.
    pub project: ProjectName,
    /// What they share.
    pub traffic: Traffic,
    /// The deployments with their weights.
    pub to: Vec<(DeploymentId, u32)>,
    /// The table that the caller decided on; checked if given.
    pub expected_table: Option<u32>,
    /// Why.
    pub note: Option<String>,
}

/// Routes that were set.
#[derive(Debug, Clone)]
pub struct RoutesSet {
    /// The instance.
    pub instance: InstanceRef,
    /// The switch; none if everything was as asked for already.
    pub switched: Option<Box<Switched>>,
    /// How it was recorded.
    pub done: Done,
}

impl Commands {
    /// Spreads the traffic of an instance, or of one of its hostnames, over deployments that run.
    pub async fn share_traffic(
        &self,
        caller: &Caller,
        wish: Shares,
    ) -> Result<RoutesSet, CommandError> {
        self.admit(caller, Verb::Deploy, &wish.project)?;
        for (id, _) in &wish.to {
            self.admit_to(caller, Verb::Deploy, *id)?;
        }
        check::text("reason", wish.note.as_deref())?;
        self.project(&wish.project)?;
        let (instance, only) = match wish.traffic {
            Traffic::Of(instance) => (instance, None),
            Traffic::On(hostname) => {
                let instance = self.instance_of(&wish.project, &hostname)?;
                (instance, Some(hostname))
            }
        };
        self.owned(&wish.project, &instance)?;
        if self.earlier(caller).await?.is_none() {
            for (id, _) in &wish.to {
                self.may_get_traffic(*id)?;
            }
        }
        let mut shares = Vec::with_capacity(wish.to.len());
        for (id, weight) in wish.to.into_iter().take(routing::SHARES_MAX + 1) {
            let (target, _) = self.target(id)?;
            shares.push(Share { target, weight });
        }
        let command = Command::Split(Split {
            hostnames: self.addresses(&instance)?,
            instance: instance.clone(),
            only,
            shares: shares.clone(),
            expected_table: wish.expected_table,
            note: wish.note,
        });
        for Share { target, .. } in &shares {
            let id = target.deployment;
            self.keep_for(caller, id, command.clone()).await?;
        }
        self.set_routes(caller, instance, command).await
    }

    /// Says how the traffic of an instance is spread over the clusters that it runs in.
    pub async fn set_policy(
        &self,
        caller: &Caller,
        project: &ProjectName,
        instance: InstanceRef,
        policy: ClusterPolicy,
        note: Option<String>,
    ) -> Result<RoutesSet, CommandError> {
        self.admit(caller, Verb::Deploy, project)?;
        check::text("reason", note.as_deref())?;
        self.owned(project, &instance)?;
        policy.check()?;
        if self.earlier(caller).await?.is_none() {
            let environment = self.environment(&instance.project, &instance.environment)?;
            self.not_frozen(&environment)?;
        }
        match &policy {
            ClusterPolicy::Failover(order) => self.clusters(order)?,
            ClusterPolicy::Weighted(weights) => {
                self.clusters(&weights.keys().cloned().collect::<Vec<_>>())?;
            }
            ClusterPolicy::Simple | ClusterPolicy::Latency => {}
        }
        let command = Command::SetPolicy(SetPolicy {
            hostnames: self.addresses(&instance)?,
            instance: instance.clone(),
            policy,
            note,
        });
        self.set_routes(caller, instance, command).await
    }

    async fn set_routes(
        &self,
        caller: &Caller,
        instance: InstanceRef,
        command: Command,
    ) -> Result<RoutesSet, CommandError> {
        let subject = Subject::Routing(instance.project.clone());
        let done = self
            .run(caller, &subject, None, |state| {
                routing::decide(state, command.clone())
            })
            .await?;
        let switched = match done.event {
            None => None,
            Some(position) => match self.event(position).await?.payload() {
                Ok(RoutingEvent::Switched(switched)) => Some(switched),
                _ => return Err(CommandError::KeyReused),
            },
        };
        Ok(RoutesSet {
            instance,
            switched,
            done,
        })
    }

    /// The route table of a project; an empty one, if nothing was routed yet.
    pub(crate) fn routing(&self, project: &ProjectName) -> Result<Routing, CommandError> {
        self.project(project)?;
        let routing = self.ledger.projections().routing(project)?;
        Ok(routing.unwrap_or_default())
    }

    /// The instance that a hostname of the project leads to.
    fn instance_of(
        &self,
        project: &ProjectName,
        hostname: &Hostname,
    ) -> Result<InstanceRef, CommandError> {
        let routing = self.routing(project)?;
        let route = routing.routes.get(hostname);
        Ok(route.map(|r| r.instance.clone()).ok_or_else(|| {
            Refusal::new(
                "hostname_not_found",
                format!("the project {project} has no address {hostname}"),
                "`daybook routes list` shows the addresses of a project",
            )
        })?)
    }

    /// Refuses an instance that does not exist, or that is another project's.
    fn owned(&self, project: &ProjectName, instance: &InstanceRef) -> Result<(), CommandError> {
        if instance.project != *project {
            return Err(Refusal::new(
                "other_project",
                format!("{instance} does not belong to the project {project}"),
                "name the instance's own project",
            )
            .into());
        }
        self.instance(instance).map(|_| ())
    }

    /// The addresses of an instance that lead to whatever is its main deployment.
    pub(crate) fn addresses(&self, instance: &InstanceRef) -> Result<Hostnames, CommandError> {
        let environment = self.environment(&instance.project, &instance.environment)?;
        // The preview address is a deployment's own, and not looked at here.
        let none = DeploymentId(uuid::Uuid::nil());
        let live = environment.spec.live;
        let domain = &self.settings.domain;
        Ok(Hostnames::under(domain, instance, none, live)?)
    }
}
