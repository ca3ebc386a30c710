//! `git revert` of a deployment is a rollback.
//!
//! Somebody who reverts the commit of a deployment in the GitOps repository wants what ran before.
//! So it is done as `daybook rollback` does it: the routes go back to the main deployment before,
//! pinned so that no deployment takes over by itself, and only when a gateway serves them, and those
//! of its clusters do, is the commit adopted, and what it took out stopped; not where a gateway has
//! rejected the switch. A deployment that was stopped meanwhile is started
//! first; until it is ready, nothing is switched. The person who made the commit is the actor, as
//! far as the commit can be believed: nobody checked the name.

use std::time::Duration;

use daybook_events::deployment::{self, Deployment, DeploymentEvent, OperationRequested, Status};
use daybook_events::environment::Environment;
use daybook_events::gitops::{
    self, ForeignCommitAdopted, ForeignCommitFound, ForeignStatus, Gitops, GitopsEvent,
    UndoneDeployment,
};
use daybook_events::routing::{self, Command, Hostnames, Routing, RoutingEvent, Target};
use daybook_events::{
    Actor, Context, DeploymentId, EventId, InstanceRef, Position, ProjectName, Subject,
};
use daybook_projections::{DeploymentRow, Executed};
use jiff::Timestamp;

use super::timers::keep_for_traffic;
use super::{Bench, Stop, leave};
use crate::driver::{Activation, Outcome};

/// The longest name of a person that is taken over, in bytes.
const MAX_NAME: usize = 200;

/// The step that moves the routes.
const SWITCHES: &str = "revert rolls back";

/// The longest time between two looks at what is being started.
const LOOK_AGAIN: Duration = Duration::from_secs(15);

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
    match revert.carry_out().await {
        Ok(Progress::Settled) => Outcome::Done,
        Ok(Progress::NotYet) => {
            let doubled = Duration::from_millis(250 << a.attempt.saturating_sub(1).min(8));
            Outcome::Wait(doubled.min(LOOK_AGAIN))
        }
        Err(stop) => super::outcome(Err(stop)),
    }
}

/// Says that it was tried to the bound.
pub(super) async fn give_up(
    bench: &Bench,
    a: &Activation,
    project: &ProjectName,
    found: &ForeignCommitFound,
    undone: &UndoneDeployment,
    why: &str,
) -> Outcome {
    let revert = Revert {
        bench,
        a,
        project,
        found,
        undone,
    };
    super::outcome(match bench.row(undone.deployment) {
        Ok(Some(row)) => {
            revert.not_honoured(&row, why).await;
            Ok(())
        }
        Ok(None) => Ok(()),
        Err(stop) => Err(stop),
    })
}

/// How far a rollback is.
enum Progress {
    /// Nothing is left to do.
    Settled,
    /// What is gone back to is not ready yet, or not served everywhere.
    NotYet,
}

/// What came of moving the routes.
enum Moved {
    /// This switch does it.
    By(Switch),
    /// What is gone back to is not ready yet.
    NotYet,
    /// They are not moved, and it is said why.
    Never,
}

/// The switch of a rollback.
#[derive(Clone, Copy)]
struct Switch {
    table: u32,
    at: Timestamp,
}

impl Switch {
    /// Whether the routes still are as it left them. A gateway may have rejected it, or somebody
    /// decided otherwise since: then nothing is stopped for its sake.
    fn stands(self, routing: &Routing, instance: &InstanceRef, left: DeploymentId) -> bool {
        let main = routing.traffic(instance).and_then(|t| t.main);
        let is_undone = routing.recent.iter().any(|s| s.undoes == Some(self.table));
        main != Some(left) && !is_undone
    }
}

struct Revert<'a> {
    bench: &'a Bench,
    a: &'a Activation,
    project: &'a ProjectName,
    found: &'a ForeignCommitFound,
    undone: &'a UndoneDeployment,
}

impl Revert<'_> {
    async fn carry_out(&self) -> Result<Progress, Stop> {
        let projections = self.bench.ledger.projections();
        let gitops = projections.gitops(self.project)?;
        let status = gitops
            .as_ref()
            .and_then(|g| g.foreign_commit(&self.found.commit))
            .map(|f| f.status);
        let Some(row) = self.bench.row(self.undone.deployment)? else {
            return Ok(Progress::Settled);
        };
        let switched = self.switched().await?;
        match status {
            Some(ForeignStatus::Found) => {}
            // The process may have died between the adoption and the stop.
            Some(ForeignStatus::Adopted) => {
                if let Some(switch) = switched
                    && self.routing_after(switch, &row)?.is_some()
                {
                    self.stop(&row).await?;
                }
                return Ok(Progress::Settled);
            }
            // Somebody decided otherwise.
            _ => return Ok(Progress::Settled),
        }
        let switch = match switched {
            Some(switch) => switch,
            None => match self.switch(&row).await {
                Ok(Moved::By(switch)) => switch,
                Ok(Moved::NotYet) => return Ok(Progress::NotYet),
                Ok(Moved::Never) => return Ok(Progress::Settled),
                Err(Stop::Moved(refusal)) => {
                    self.not_honoured(&row, &refusal.message).await;
                    return Ok(Progress::Settled);
                }
                Err(stop) => return Err(stop),
            },
        };
        let Some(routing) = self.routing_after(switch, &row)? else {
            self.not_honoured(&row, "the switch was undone").await;
            return Ok(Progress::Settled);
        };
        if !routing
            .applied
            .values()
            .any(|applied| *applied >= switch.table)
        {
            return Err(Stop::Retry(
                "no gateway serves the routes of the rollback yet".to_owned(),
            ));
        }
        let late = leave::behind(&routing, &row.state.request.clusters, switch.table);
        if !late.is_empty() {
            let waited = Timestamp::now().duration_since(switch.at);
            if Duration::try_from(waited).unwrap_or_default() < leave::CLUSTER_PATIENCE {
                return Ok(Progress::NotYet);
            }
            leave::not_waited_for(self.bench, &row, switch.table, &late).await;
        }
        self.adopt().await?;
        self.stop(&row).await?;
        Ok(Progress::Settled)
    }

    /// The route table, if the switch of the rollback stands.
    fn routing_after(&self, switch: Switch, row: &DeploymentRow) -> Result<Option<Routing>, Stop> {
        let routing = self.bench.ledger.projections().routing(self.project)?;
        let instance = &row.state.request.instance;
        Ok(routing.filter(|routing| switch.stands(routing, instance, row.id)))
    }

    /// Moves the routes, if what was reverted has them.
    async fn switch(&self, row: &DeploymentRow) -> Result<Moved, Stop> {
        let instance = &row.state.request.instance;
        let projections = self.bench.ledger.projections();
        let routing = projections.routing(self.project)?;
        let traffic = routing.as_ref().and_then(|r| r.traffic(instance));
        if traffic.and_then(|t| t.main) != Some(row.id) {
            self.not_honoured(row, "it is not the main deployment")
                .await;
            return Ok(Moved::Never);
        }
        let Some(to) = traffic.and_then(|t| t.former.last().copied()) else {
            self.not_honoured(row, "there was no other main deployment before it")
                .await;
            return Ok(Moved::Never);
        };
        let Some(target) = self.bench.row(to)? else {
            return Ok(Moved::Never);
        };
        match target.state.status {
            Status::Stopped | Status::StartError => return self.start(row, &target).await,
            Status::Stopping | Status::Starting => return Ok(Moved::NotYet),
            _ => {}
        }
        keep_for_traffic(self.bench, self.a.event.id, to).await?;
        let Some(target) = self.bench.row(to)? else {
            return Ok(Moved::Never);
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
            .append::<Routing>(&subject, &self.context(SWITCHES), |state| {
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
        let switched = self.switched().await?;
        Ok(switched.map_or(Moved::Never, Moved::By))
    }

    /// Starts what is gone back to, once.
    async fn start(&self, row: &DeploymentRow, target: &DeploymentRow) -> Result<Moved, Stop> {
        let event = DeploymentEvent::StartRequested(OperationRequested {
            reason: Some(format!(
                "commit {} goes back to it",
                self.found.commit.short()
            )),
        });
        let context = Context {
            correlation: target.id.0,
            ..self.context("revert starts")
        };
        let asked = self
            .bench
            .append::<Deployment>(&target.subject, &context, |state| {
                deployment::decide(state, event.clone())
            })
            .await?;
        let target = self.bench.reread(target, asked.position()).await?;
        if let Executed::Duplicate { .. } = asked
            && matches!(target.state.status, Status::Stopped | Status::StartError)
        {
            let failure = target.state.failure.as_ref();
            let why = failure.map_or("it was stopped again", |f| f.message.as_str());
            let why = format!("{} could not be started: {why}", target.id);
            self.not_honoured(row, &why).await;
            return Ok(Moved::Never);
        }
        let text = format!(
            "{} reverted its commit with {}: {} is started, and gets the traffic when it is ready",
            self.found.author,
            self.found.commit.short(),
            target.id
        );
        self.bench.say(row.id, None, text).await;
        Ok(Moved::NotYet)
    }

    fn hostnames(&self, instance: &InstanceRef, id: DeploymentId) -> Result<Hostnames, Stop> {
        let subject = Subject::Environment(instance.project.clone(), instance.environment.clone());
        let projections = self.bench.ledger.projections();
        let environment = projections.shared::<Environment>(&subject)?;
        let live = environment.state.as_ref().is_some_and(|e| e.spec.live);
        let domain = &self.bench.settings.domain;
        Hostnames::under(domain, instance, id, live).map_err(|e| Stop::Retry(e.to_string()))
    }

    /// The switch by which an earlier try has moved the routes, if one has.
    async fn switched(&self) -> Result<Option<Switch>, Stop> {
        let projections = self.bench.ledger.projections();
        let Some(known) = projections.event_by_id(self.context(SWITCHES).id)? else {
            return Ok(None);
        };
        let recorded = self.bench.ledger.log().get(known.position).await;
        let recorded = recorded.map_err(|e| Stop::Retry(e.to_string()))?;
        let event = recorded.and_then(|r| r.event().ok());
        let switched = event.and_then(|e| Some((e.time, e.payload::<RoutingEvent>().ok()?)));
        match switched {
            Some((at, RoutingEvent::Switched(switch))) => Ok(Some(Switch {
                table: switch.table,
                at,
            })),
            _ => Err(Stop::Retry(format!(
                "the switch at {} cannot be read",
                known.position
            ))),
        }
    }

    /// What the switch says.
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
            .append::<Deployment>(&row.subject, &context, |state| {
                deployment::decide(state, event.clone())
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
            // By which it is found again, however long ago it was.
            request_digest: Some(self.found.commit.to_string()),
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
