//! Takes hostnames that were claimed into the route tables of their projects, and those that are
//! given up out of them, before the claim ends.

use async_trait::async_trait;
use daybook_events::domain::{self, Claim, Domain};
use daybook_events::environment::Environment;
use daybook_events::routing::{self, Command, Hostnames, Routing, SetDomain};
use daybook_events::{AggregateKind, DeploymentId, Subject, SubjectFilter};
use uuid::Uuid;

use super::{Bench, Stop, outcome};
use crate::driver::{Activation, Outcome, Worker};

const ROLE: &str = "route";

/// Woken by claims.
#[derive(Debug)]
pub struct Domains(pub Bench);

#[async_trait]
impl Worker for Domains {
    fn name(&self) -> String {
        "route-domains".into()
    }
    fn filter(&self) -> SubjectFilter {
        SubjectFilter::of(AggregateKind::Domain)
    }
    fn wants(&self, kind: &str) -> bool {
        matches!(kind, "domain.claimed.v1" | "domain.release_requested.v1")
    }
    async fn activate(&self, a: &Activation) -> Outcome {
        outcome(self.step(&a.subject).await)
    }
    async fn give_up(&self, a: &Activation, why: &str) -> Outcome {
        tracing::error!(subject = %a.subject, %why, "a claimed hostname was not routed");
        Outcome::Done
    }
}

impl Domains {
    async fn step(&self, subject: &Subject) -> Result<(), Stop> {
        let folded = self.0.ledger.projections().shared::<Domain>(subject)?;
        let Some(state) = &folded.state else {
            return Ok(());
        };
        let (number, Some(claim)) = (state.number, state.claim.clone()) else {
            return Ok(());
        };
        let attach = match claim.releasing {
            true => None,
            false => Some(self.addresses(&claim)?),
        };
        let command = Command::SetDomain(SetDomain {
            hostname: state.hostname.clone(),
            instance: claim.instance.clone(),
            stickiness: claim.stickiness,
            claim: number,
            attach,
        });
        drop(folded);
        let routes = Subject::Routing(claim.instance.project.clone());
        let step = if claim.releasing { "left" } else { "joined" };
        let context = self.0.follow_up(ROLE, claim.by, claim.by.0, step);
        self.0
            .append::<Routing>(&routes, &context, |state| {
                routing::decide(state, command.clone())
            })
            .await?;
        if !claim.releasing {
            return Ok(());
        }
        let context = self.0.follow_up(ROLE, claim.by, claim.by.0, "released");
        self.0
            .append::<Domain>(subject, &context, |state| {
                domain::decide(state, domain::Command::Free { number })
            })
            .await
            .map(|_| ())
    }

    /// The addresses of the instance that it moves with.
    fn addresses(&self, claim: &Claim) -> Result<Hostnames, Stop> {
        let instance = &claim.instance;
        let environment =
            self.0
                .ledger
                .projections()
                .shared::<Environment>(&Subject::Environment(
                    instance.project.clone(),
                    instance.environment.clone(),
                ))?;
        let live = environment.state.as_ref().is_some_and(|e| e.spec.live);
        let none = DeploymentId(Uuid::nil());
        let domain = &self.0.settings.domain;
        Hostnames::under(domain, instance, none, live).map_err(|e| Stop::Retry(e.to_string()))
    }
}
