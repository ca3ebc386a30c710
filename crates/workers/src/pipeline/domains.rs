//! Takes hostnames that were claimed into the route tables of their projects, and those that are
//! given up out of them, before the claim ends. What cannot be taken in is given up.

use async_trait::async_trait;
use daybook_events::domain::{self, Claim, Domain};
use daybook_events::environment::Environment;
use daybook_events::routing::{self, Command, Hostnames, Routing, SetDomain};
use daybook_events::{
    AggregateKind, DeploymentId, EnvironmentName, EventId, Hostname, ProjectName, Refusal, Subject,
    SubjectFilter,
};
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
        // A claim that leads nowhere would keep the hostname from everybody else.
        let claim = match self.0.ledger.projections().shared::<Domain>(&a.subject) {
            Ok(folded) => folded.state.as_ref().and_then(|d| d.claim.clone()),
            Err(e) => return outcome(Err(e.into())),
        };
        match claim.filter(|claim| !claim.releasing) {
            Some(claim) => {
                let given_up = release(&self.0, &a.subject, &claim, claim.by, "given_up");
                outcome(given_up.await)
            }
            None => Outcome::Done,
        }
    }
}

impl Domains {
    async fn step(&self, subject: &Subject) -> Result<(), Stop> {
        let folded = self.0.ledger.projections().shared::<Domain>(subject)?;
        let Some(Domain {
            hostname,
            number,
            claim: Some(claim),
        }) = folded.state.clone()
        else {
            return Ok(());
        };
        drop(folded);
        if !claim.releasing {
            let joined = match self.addresses(&claim) {
                Ok(Some(addresses)) => self.set(&hostname, number, &claim, Some(addresses)).await,
                Ok(None) => Err(Stop::Moved(gone(&claim))),
                Err(unusable) => Err(unusable),
            };
            // Between the claim and now it has become impossible: it is given back.
            return match joined {
                Err(Stop::Moved(why)) => self.hand_back(subject, &claim, &why).await,
                other => other,
            };
        }
        self.set(&hostname, number, &claim, None).await?;
        let context = self.0.follow_up(ROLE, claim.by, claim.by.0, "released");
        self.0
            .append::<Domain>(subject, &context, |state| {
                domain::decide(state, domain::Command::Free { number })
            })
            .await
            .map(|_| ())
    }

    /// Takes a hostname into the route table of its project, or out of it.
    async fn set(
        &self,
        hostname: &Hostname,
        number: u32,
        claim: &Claim,
        attach: Option<Hostnames>,
    ) -> Result<(), Stop> {
        let step = if attach.is_some() { "joined" } else { "left" };
        let command = Command::SetDomain(SetDomain {
            hostname: hostname.clone(),
            instance: claim.instance.clone(),
            stickiness: claim.stickiness,
            claim: number,
            attach,
        });
        let routes = Subject::Routing(claim.instance.project.clone());
        let context = self.0.follow_up(ROLE, claim.by, claim.by.0, step);
        self.0
            .append::<Routing>(&routes, &context, |state| {
                routing::decide(state, command.clone())
            })
            .await
            .map(|_| ())
    }

    async fn hand_back(&self, subject: &Subject, claim: &Claim, why: &Refusal) -> Result<(), Stop> {
        tracing::warn!(%subject, instance = %claim.instance, code = why.code, %why.message,
            "a claimed hostname cannot be routed, and is given up");
        release(&self.0, subject, claim, claim.by, "refused").await
    }

    /// The addresses of the instance that it moves with; none if its environment is gone.
    fn addresses(&self, claim: &Claim) -> Result<Option<Hostnames>, Stop> {
        let instance = &claim.instance;
        let environment =
            self.0
                .ledger
                .projections()
                .shared::<Environment>(&Subject::Environment(
                    instance.project.clone(),
                    instance.environment.clone(),
                ))?;
        let environment = environment.state.as_ref();
        let Some(environment) = environment.filter(|e| e.must_be_active().is_ok()) else {
            return Ok(None);
        };
        let none = DeploymentId(Uuid::nil());
        let (domain, live) = (&self.0.settings.domain, environment.spec.live);
        let hostnames = Hostnames::under(domain, instance, none, live);
        hostnames.map(Some).map_err(|e| {
            let way_out = "use a shorter domain for this server";
            Stop::Moved(Refusal::new(e.code, e.to_string(), way_out))
        })
    }
}

/// Asks for the end of a claim.
async fn release(
    bench: &Bench,
    subject: &Subject,
    claim: &Claim,
    cause: EventId,
    step: &str,
) -> Result<(), Stop> {
    let command = domain::Command::Release {
        project: claim.instance.project.clone(),
    };
    let context = bench.follow_up(ROLE, cause, cause.0, step);
    let released = bench.append::<Domain>(subject, &context, |state| {
        domain::decide(state, command.clone())
    });
    match released.await {
        // It is no longer that project's.
        Ok(_) | Err(Stop::Moved(_)) => Ok(()),
        Err(other) => Err(other),
    }
}

/// Gives up a hostname that a gateway could not take in. `cause` is the event that says so.
pub(super) async fn refused(
    bench: &Bench,
    hostname: Hostname,
    number: u32,
    cause: EventId,
) -> Result<(), Stop> {
    let domain = bench.ledger.projections().domain(&hostname)?;
    let claim = domain.filter(|d| d.number == number).and_then(|d| d.claim);
    match claim {
        Some(claim) => release(bench, &Subject::Domain(hostname), &claim, cause, "refused").await,
        None => Ok(()),
    }
}

/// Gives up whatever hostnames the instances of an environment have that is being deleted.
/// `cause` is the event that says so.
pub(super) async fn release_all(
    bench: &Bench,
    project: &ProjectName,
    environment: &EnvironmentName,
    cause: EventId,
) -> Result<(), Stop> {
    for domain in bench.ledger.projections().domains()? {
        let Domain {
            hostname,
            number,
            claim: Some(claim),
        } = domain
        else {
            continue;
        };
        let instance = &claim.instance;
        if instance.project != *project || instance.environment != *environment {
            continue;
        }
        let step = format!("released {hostname} {number}");
        let subject = Subject::Domain(hostname);
        release(bench, &subject, &claim, cause, &step).await?;
    }
    Ok(())
}

fn gone(claim: &Claim) -> Refusal {
    Refusal::new(
        "environment_not_found",
        format!(
            "the environment {} is gone or going",
            claim.instance.environment
        ),
        "create it again, and claim the hostname then",
    )
}
