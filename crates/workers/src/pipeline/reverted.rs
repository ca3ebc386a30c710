//! `git revert` of a deployment is a rollback.
//!
//! Somebody who reverts the commit of a deployment in the GitOps repository wants what ran before.
//! So it is done as `daybook rollback` does it: the routes go back to the main deployment before,
//! pinned so that no deployment takes over by itself, and only when a gateway serves them is the
//! commit adopted, and what it took out stopped. The person who made the commit is the actor, as
//! far as the commit can be believed: nobody checked the name.

use daybook_events::deployment::{DeploymentEvent, OperationRequested, Status};
use daybook_events::environment::Environment;
use daybook_events::gitops::{
    self, ForeignCommitAdopted, ForeignCommitFound, ForeignStatus, Gitops, GitopsEvent,
    UndoneDeployment,
};
use daybook_events::routing::{self, Command, Hostnames, Routing, SwitchReason, Target};
use daybook_events::{
    Actor, Context, DeploymentId, EventId, InstanceRef, Position, ProjectName, Subject,
};
use daybook_projections::DeploymentRow;
use jiff::Timestamp;

use super::{Bench, Stop};
use crate::driver::{Activation, Outcome};

/// The longest name of a person that is taken over, in bytes.
const MAX_NAME: usize = 200;

/// Rolls back what a commit takes back.
pub(super) async fn honour(
    bench: &Bench,
    a: &Activation,
    project: &ProjectName,
    found: &ForeignCommitFound,
    undone: &UndoneDeployment,
) -> Outcome {
    let revert = Revert {
        bench,
        a,
        project,
        found,
        undone,
    };
    super::outcome(revert.carry_out().await)
}

struct Revert<'a> {
    bench: &'a Bench,
    a: &'a Activation,
    project: &'a ProjectName,
    found: &'a ForeignCommitFound,
    undone: &'a UndoneDeployment,
}

impl Revert<'_> {
    async fn carry_out(&self) -> Result<(), Stop> {
        let projections = self.bench.ledger.projections();
        let gitops = projections.gitops(self.project)?;
        let status = gitops
            .as_ref()
            .and_then(|g| g.foreign_commit(&self.found.commit))
            .map(|f| f.status);
        let Some(row) = self.bench.row(self.undone.deployment)? else {
            return Ok(());
        };
        match status {
            Some(ForeignStatus::Found) => {}
            // The process may have died between the adoption and the stop.
            Some(ForeignStatus::Adopted) if self.is_rolled_back()? => {
                return self.stop(&row).await;
            }
            // Somebody decided otherwise.
            _ => return Ok(()),
        }
        let table = if self.is_rolled_back()? {
            self.table()?
        } else {
            match self.switch(&row).await {
                Ok(Some(table)) => table,
                Ok(None) => return Ok(()),
                Err(Stop::Moved(refusal)) => {
                    self.not_honoured(&row, &refusal.message).await;
                    return Ok(());
                }
                Err(stop) => return Err(stop),
            }
        };
        let routing = projections.routing(self.project)?;
        if !routing.is_some_and(|r| r.applied.values().any(|applied| *applied >= table)) {
            return Err(Stop::Retry(
                "no gateway serves the routes of the rollback yet".to_owned(),
            ));
        }
        self.adopt().await?;
        self.stop(&row).await
    }

    /// Moves the routes, if what was reverted has them. Returns the table that does it.
    async fn switch(&self, row: &DeploymentRow) -> Result<Option<u32>, Stop> {
        let instance = &row.state.request.instance;
        let projections = self.bench.ledger.projections();
        let routing = projections.routing(self.project)?;
        let traffic = routing.as_ref().and_then(|r| r.traffic(instance));
        if traffic.and_then(|t| t.main) != Some(row.id) {
            self.not_honoured(row, "it is not the main deployment")
                .await;
            return Ok(None);
        }
        let Some(to) = traffic.and_then(|t| t.former.last().copied()) else {
            self.not_honoured(row, "there was no other main deployment before it")
                .await;
            return Ok(None);
        };
        let Some(target) = self.bench.row(to)? else {
            return Ok(None);
        };
        let command = Command::Rollback {
            hostnames: self.hostnames(instance, to)?,
            target: Target {
                deployment: to,
                instance: instance.clone(),
                status: target.state.status,
                ready: target.state.workload_is_ready(),
            },
            note: Some(self.note()),
        };
        let subject = Subject::Routing(self.project.clone());
        let executed = self
            .bench
            .append::<Routing>(&subject, &self.context("revert rolls back"), |state| {
                routing::decide(state, command.clone())
            })
            .await?;
        self.folded(executed.position()).await?;
        let text = format!(
            "{} reverted its commit with {}: the traffic goes back to {to}",
            self.found.author,
            self.found.commit.short()
        );
        self.bench.say(row.id, None, text).await;
        self.table().map(Some)
    }

    fn hostnames(&self, instance: &InstanceRef, id: DeploymentId) -> Result<Hostnames, Stop> {
        let subject = Subject::Environment(instance.project.clone(), instance.environment.clone());
        let projections = self.bench.ledger.projections();
        let environment = projections.shared::<Environment>(&subject)?;
        let live = environment.state.as_ref().is_some_and(|e| e.spec.live);
        let domain = &self.bench.settings.domain;
        Hostnames::under(domain, instance, id, live).map_err(|e| Stop::Retry(e.to_string()))
    }

    /// The newest table of the project.
    fn table(&self) -> Result<u32, Stop> {
        let routing = self.bench.ledger.projections().routing(self.project)?;
        Ok(routing.map_or(0, |r| r.table))
    }

    /// Whether an earlier try has moved the routes.
    fn is_rolled_back(&self) -> Result<bool, Stop> {
        let routing = self.bench.ledger.projections().routing(self.project)?;
        let note = Some(self.note());
        Ok(routing.is_some_and(|r| {
            let mut recent = r.recent.iter();
            recent.any(|s| s.reason == SwitchReason::Rollback && s.note == note)
        }))
    }

    /// What the switch says, by which it is known again.
    fn note(&self) -> String {
        format!(
            "git revert in commit {}: {}",
            self.found.commit, self.found.message
        )
    }

    /// What the commit changes is what shall be.
    async fn adopt(&self) -> Result<(), Stop> {
        let event = GitopsEvent::ForeignCommitAdopted(ForeignCommitAdopted {
            commit: self.found.commit.clone(),
            reason: Some("a git revert of a deployment is a rollback".to_owned()),
        });
        let subject = Subject::Gitops(self.project.clone());
        let executed = self
            .bench
            .append::<Gitops>(&subject, &self.context("revert adopted"), |state| {
                gitops::decide(state, event.clone())
            })
            .await?;
        self.folded(executed.position()).await
    }

    /// What the repository does not list any more is to run no more.
    async fn stop(&self, row: &DeploymentRow) -> Result<(), Stop> {
        if !matches!(row.state.status, Status::Started | Status::PartiallyStarted) {
            return Ok(());
        }
        let event = DeploymentEvent::StopRequested(OperationRequested {
            reason: Some(format!("reverted by commit {}", self.found.commit.short())),
        });
        let context = Context {
            correlation: row.id.0,
            ..self.context("revert stops")
        };
        let asked = self
            .bench
            .append::<daybook_events::deployment::Deployment>(&row.subject, &context, |state| {
                daybook_events::deployment::decide(state, event.clone())
            })
            .await;
        match asked {
            // Somebody else asked for its end.
            Ok(_) | Err(Stop::Moved(_)) => Ok(()),
            Err(stop) => Err(stop),
        }
    }

    async fn not_honoured(&self, row: &DeploymentRow, why: &str) {
        let commit = self.found.commit.short();
        tracing::warn!(project = %self.project, deployment.id = %row.id, %commit, why,
            "a git revert of a deployment rolls nothing back");
        let text = format!(
            "commit {commit} reverts it, and rolls nothing back: {why}; it waits for `daybook \
             gitops adopt` or `revert`"
        );
        self.bench.say(row.id, None, text).await;
    }

    async fn folded(&self, position: Option<Position>) -> Result<(), Stop> {
        match position {
            Some(position) => self.bench.folded(position).await,
            None => Ok(()),
        }
    }

    fn context(&self, step: &str) -> Context {
        let event = &self.a.event;
        Context {
            id: EventId::derived(event.id.0, step),
            time: Timestamp::now(),
            correlation: self.undone.deployment.0,
            causation: Some(event.id),
            actor: person(&self.found.author),
            traceparent: None,
            request_digest: None,
        }
    }
}

/// Who a commit says made it: the address of `Name <address>`.
fn person(author: &str) -> Actor {
    let address = author
        .rsplit_once('<')
        .map_or(author, |(_, rest)| rest.trim_end_matches('>'));
    Actor::unauthenticated(&address[..address.floor_char_boundary(MAX_NAME)])
}

#[cfg(test)]
mod tests {
    use super::person;

    #[test]
    fn the_person_is_the_address_of_the_author() {
        assert_eq!(person("Ada <ada@example.com>").id, "ada@example.com");
        assert_eq!(person("nobody").id, "nobody");
        assert_eq!(person(&"é".repeat(300)).id.len(), 200);
    }
}
