//! The two ends of an environment: what takes the traffic of the environment that it is made from
//! is promoted into it; and before it goes, what runs in it is removed.
//!
//! Routes are withdrawn first and processes stopped then. Its folder leaves the GitOps repository
//! last, when nothing is left in it.

use async_trait::async_trait;
use daybook_events::deployment::{
    self, CancelRequested, Deployment, DeploymentEvent, OperationRequested, PromotedFrom,
    Requested, Status, Version,
};
use daybook_events::environment::{
    self, Deleted, Environment, EnvironmentEvent, EnvironmentStatus,
};
use daybook_events::gitops::Change;
use daybook_events::routing::{self, Routing};
use daybook_events::secret;
use daybook_events::spec::{ImageReference, RunSpec};
use daybook_events::{
    AggregateKind, DeploymentId, EnvironmentName, InstanceRef, ProjectName, Subject, SubjectFilter,
};
use daybook_projections::DeploymentRow;

use super::package::{CommitWork, Occasion, Package, author_of};
use super::previews::gets_head;
use super::{Stop, domains, outcome};
use crate::driver::{Activation, Outcome, Worker};

const ROLE: &str = "package";

/// Woken by environments.
pub struct Environments(pub Package);

/// Woken by deployments whose environment may be waiting for their end.
pub struct EnvironmentEnds(pub Package);

#[async_trait]
impl Worker for Environments {
    fn name(&self) -> String {
        "environments".into()
    }
    fn filter(&self) -> SubjectFilter {
        SubjectFilter::of(AggregateKind::Environment)
    }
    fn wants(&self, kind: &str) -> bool {
        matches!(
            kind,
            "environment.created.v1"
                | "environment.deletion_requested.v1"
                | "environment.pull_request_opened.v1"
                | "environment.pull_request_closed.v1"
        )
    }
    async fn activate(&self, a: &Activation) -> Outcome {
        let Subject::Environment(project, name) = &a.subject else {
            return Outcome::Done;
        };
        outcome(match a.event.payload::<EnvironmentEvent>() {
            Ok(EnvironmentEvent::Created(e)) => match &e.from {
                Some(from) => self.0.fill(a, project, name, from).await,
                None => Ok(()),
            },
            Ok(EnvironmentEvent::PullRequestOpened(e)) => match &e.from {
                Some(from) => self.0.fill(a, project, name, from).await,
                None => Ok(()),
            },
            Ok(EnvironmentEvent::DeletionRequested(_) | EnvironmentEvent::PullRequestClosed(_)) => {
                self.0.clear(project, name).await
            }
            _ => Ok(()),
        })
    }
    async fn give_up(&self, a: &Activation, why: &str) -> Outcome {
        tracing::error!(subject = %a.subject, kind = a.event.short_kind(), %why,
            "an environment was not brought to where it should be");
        Outcome::Done
    }
}

#[async_trait]
impl Worker for EnvironmentEnds {
    fn name(&self) -> String {
        "environment-ends".into()
    }
    fn filter(&self) -> SubjectFilter {
        SubjectFilter::of(AggregateKind::Deployment)
    }
    fn wants(&self, kind: &str) -> bool {
        matches!(
            kind,
            "deployment.succeeded.v1"
                | "deployment.failed.v1"
                | "deployment.cancelled.v1"
                | "deployment.started.v1"
                | "deployment.start_failed.v1"
                | "deployment.stopped.v1"
                | "deployment.terminated.v1"
                | "deployment.change_committed.v1"
        )
    }
    fn key(&self, subject: &Subject) -> String {
        subject
            .project()
            .map_or_else(String::new, ToString::to_string)
    }
    async fn activate(&self, a: &Activation) -> Outcome {
        let Subject::Deployment(project, environment, _) = &a.subject else {
            return Outcome::Done;
        };
        outcome(self.0.clear(project, environment).await)
    }
    async fn give_up(&self, a: &Activation, why: &str) -> Outcome {
        tracing::error!(subject = %a.subject, %why,
            "an environment waits for its end; `daybook env delete` again goes on with it");
        Outcome::Done
    }
}

impl Package {
    fn environment(
        &self,
        project: &ProjectName,
        name: &EnvironmentName,
    ) -> Result<Option<Environment>, Stop> {
        Ok(self.bench.ledger.projections().environment(project, name)?)
    }

    /// Gives a new environment what the one that it is made from has.
    async fn fill(
        &self,
        a: &Activation,
        project: &ProjectName,
        name: &EnvironmentName,
        from: &EnvironmentName,
    ) -> Result<(), Stop> {
        let Some(environment) = self.environment(project, name)? else {
            return Ok(());
        };
        if environment.status_event != a.event.id {
            return Ok(());
        }
        let gitops = self.bench.ledger.projections().gitops(project)?;
        if gitops.is_some_and(|g| g.environments.contains_key(from)) {
            let _permit = self.order.permit(project, false).await;
            self.commit(CommitWork {
                project,
                environment: name,
                change: Change::EnvironmentCreated {
                    from: Some(from.clone()),
                },
                release: None,
                config: Vec::new(),
                ephemeral: environment.spec.ephemeral,
                author: author_of(Some(a.event.actor())),
                occasion: Occasion {
                    cause: a.event.id,
                    correlation: a.event.correlationid,
                },
            })
            .await?;
        }
        for main in self.mains(project)? {
            if let Some(row) = self.bench.row(main)?
                && row.state.request.instance.environment == *from
            {
                self.promote_into(a, &environment, &row).await?;
            }
        }
        Ok(())
    }

    /// The main deployments of a project.
    fn mains(&self, project: &ProjectName) -> Result<Vec<DeploymentId>, Stop> {
        let routing = self.bench.ledger.projections().routing(project)?;
        let traffic = routing.iter().flat_map(|r| r.instances.values());
        Ok(traffic.filter_map(|traffic| traffic.main).collect())
    }

    /// Asks for a deployment of what another environment's main deployment is.
    async fn promote_into(
        &self,
        a: &Activation,
        environment: &Environment,
        main: &DeploymentRow,
    ) -> Result<(), Stop> {
        let version = match (main.state.image.clone(), main.state.chart.clone()) {
            (Some(image), _) => Version::Image {
                reference: ImageReference {
                    repository: image.repository,
                    tag: Some(image.tag),
                    digest: Some(image.digest),
                },
            },
            (None, Some(chart)) => Version::Helm {
                chart: chart.chart,
                version: chart.version,
            },
            (None, None) => return Ok(()),
        };
        let source = main.state.request.clone();
        let instance = InstanceRef {
            environment: environment.name.clone(),
            ..source.instance.clone()
        };
        let project = &instance.project;
        let Some(project) = self.bench.ledger.projections().project(project)? else {
            return Ok(());
        };
        if gets_head(environment, &project, &instance.service) {
            return Ok(());
        }
        let secrets = secret::applicable(&project.secrets, &instance);
        let step = format!("promoted {}", instance.service);
        let id = DeploymentId::derived(a.event.id.0, &step);
        let request = Requested {
            version,
            clusters: environment.spec.clusters.clone(),
            switch: environment.spec.switch,
            reason: Some(format!("the environment {} is made", environment.name)),
            redeploy_of: None,
            secrets,
            promoted_from: Some(PromotedFrom {
                environment: source.instance.environment.clone(),
                deployment: main.id,
            }),
            instance: instance.clone(),
            config: main.state.config(),
            run: RunSpec {
                replicas: main.state.replicas,
                ..source.run.clone()
            },
            ..*source
        };
        let subject =
            Subject::Deployment(instance.project.clone(), instance.environment.clone(), id);
        let context = self.bench.follow_up(ROLE, a.event.id, id.0, &step);
        let event = Box::new(request);
        let asked = self
            .bench
            .append::<Deployment>(&subject, &context, |state| {
                deployment::decide(state, DeploymentEvent::Requested(event.clone()))
            })
            .await;
        match asked {
            // It was asked for by an earlier try.
            Err(Stop::Moved(_)) => Ok(()),
            other => other.map(|_| ()),
        }
    }

    /// Takes an environment that is to be deleted a step further: what is not live yet is
    /// cancelled, what runs is stopped and then removed, and when nothing is left it is deleted.
    async fn clear(&self, project: &ProjectName, name: &EnvironmentName) -> Result<(), Stop> {
        let Some(environment) = self.environment(project, name)? else {
            return Ok(());
        };
        if environment.status != EnvironmentStatus::Deleting {
            return Ok(());
        }
        let projections = self.bench.ledger.projections();
        let rows = projections.active_deployments(Some(project), Some(name))?;
        for row in &rows {
            match self.end(&environment, row).await {
                Ok(()) | Err(Stop::Moved(_)) => {}
                Err(stop) => return Err(stop),
            }
        }
        if rows.is_empty() && !self.has_releases(project, name)? {
            domains::release_all(&self.bench, project, name, environment.status_event).await?;
            self.delete(&environment).await?;
        }
        Ok(())
    }

    /// Takes one deployment of it a step further towards its end. What is under way already, and
    /// what could not be stopped or removed, is waited for.
    async fn end(&self, environment: &Environment, row: &DeploymentRow) -> Result<(), Stop> {
        let reason = || Some(format!("the environment {} is deleted", environment.name));
        let (step, event) = match row.state.status {
            status if status.in_pipeline() => {
                if row.state.cancel.is_some() {
                    return Ok(());
                }
                let event = DeploymentEvent::CancelRequested(CancelRequested { reason: reason() });
                ("environment_cancels", event)
            }
            Status::Started | Status::PartiallyStarted | Status::StartError => {
                self.withdraw(row).await?;
                let event = DeploymentEvent::StopRequested(OperationRequested { reason: reason() });
                ("environment_stops", event)
            }
            Status::Stopped => {
                let event =
                    DeploymentEvent::TerminateRequested(OperationRequested { reason: reason() });
                ("environment_terminates", event)
            }
            _ => return Ok(()),
        };
        self.bench.advance(ROLE, row, step, event).await.map(|_| ())
    }

    async fn withdraw(&self, row: &DeploymentRow) -> Result<(), Stop> {
        let instance = &row.state.request.instance;
        let subject = Subject::Routing(instance.project.clone());
        let context = self.bench.follow_up(
            ROLE,
            row.state.status_event,
            row.id.0,
            "environment_withdraws",
        );
        let command = routing::Command::Withdraw {
            deployment: row.id,
            instance: instance.clone(),
            // Its siblings go too.
            heir: None,
        };
        self.bench
            .append::<Routing>(&subject, &context, |state| {
                routing::decide(state, command.clone())
            })
            .await?;
        Ok(())
    }

    /// Whether its values still list anything: what failed or was cancelled is taken out by a
    /// commit of its own.
    fn has_releases(&self, project: &ProjectName, name: &EnvironmentName) -> Result<bool, Stop> {
        let Some(gitops) = self.bench.ledger.projections().gitops(project)? else {
            return Ok(false);
        };
        for id in gitops.releases.keys() {
            if let Some(row) = self.bench.row(*id)?
                && row.state.request.instance.environment == *name
            {
                return Ok(true);
            }
        }
        Ok(false)
    }

    async fn delete(&self, environment: &Environment) -> Result<(), Stop> {
        let Environment { project, name, .. } = environment;
        let subject = Subject::Environment(project.clone(), name.clone());
        let cause = environment.status_event;
        let projections = self.bench.ledger.projections();
        let asked = self.bench.ledger.log().get(environment.status_position);
        let asked = asked
            .await
            .map_err(|e| Stop::Retry(e.to_string()))?
            .and_then(|recorded| recorded.event().ok())
            .ok_or_else(|| Stop::Retry("the request to delete it cannot be read".into()))?;
        let occasion = Occasion {
            cause,
            correlation: asked.correlationid,
        };
        let gitops = projections.gitops(project)?;
        let commit = if gitops.is_some_and(|g| g.environments.contains_key(name)) {
            let _permit = self.order.permit(project, false).await;
            let made = self
                .commit(CommitWork {
                    project,
                    environment: name,
                    change: Change::EnvironmentDeleted {},
                    release: None,
                    config: Vec::new(),
                    ephemeral: environment.spec.ephemeral,
                    author: author_of(Some(asked.actor())),
                    occasion,
                })
                .await?;
            Some(made.commit)
        } else {
            None
        };
        let context =
            self.bench
                .follow_up(ROLE, cause, occasion.correlation, "environment_deleted");
        let event = EnvironmentEvent::Deleted(Deleted { commit });
        self.bench
            .append::<Environment>(&subject, &context, |state| {
                environment::decide(state, event.clone())
            })
            .await?;
        Ok(())
    }
}
