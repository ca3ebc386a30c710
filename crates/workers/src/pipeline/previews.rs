//! What follows from deliveries of webhooks: environments of pull requests get the newest head of
//! theirs, and environments that ask for a branch what was pushed to it.
//!
//! A delivery is recorded before it is answered, and carried out here: whatever is killed in
//! between, what was accepted is carried out. A deployment's id is derived from the event that
//! made its commit the newest one, so that it is asked for once.

use std::sync::Arc;

use async_trait::async_trait;
use daybook_events::aggregate::Decision;
use daybook_events::config::InstanceConfig;
use daybook_events::deployment::{
    self, CancelRequested, Deployment, DeploymentEvent, Requested, Version,
};
use daybook_events::environment::{
    self, Created, Environment, EnvironmentEvent, EnvironmentStatus,
};
use daybook_events::hook::{BranchPushed, repository_key};
use daybook_events::preview::{Preview, PullRequestHeadFound};
use daybook_events::project::{Project, ProjectEvent};
use daybook_events::spec::{ServiceSpec, SourceSpec};
use daybook_events::{
    Actor, AggregateKind, CommitId, DeploymentId, EnvironmentName, EventId, GitRef, InstanceRef,
    ProjectName, ServiceName, Subject, SubjectFilter, secret,
};
use daybook_projections::{DeploymentFilter, Page};

use super::{Bench, Stop, actor_at, outcome};
use crate::driver::{Activation, Outcome, Worker};
use crate::ports::Sources;

const ROLE: &str = "preview";

/// Woken by what is known of pull requests.
pub struct Previews {
    /// Shared.
    pub bench: Bench,
    /// Source repositories.
    pub sources: Arc<dyn Sources>,
}

/// Woken by pushes to branches.
pub struct Pushes {
    /// Shared.
    pub bench: Bench,
    /// Source repositories.
    pub sources: Arc<dyn Sources>,
}

#[async_trait]
impl Worker for Previews {
    fn name(&self) -> String {
        "previews".into()
    }
    fn filter(&self) -> SubjectFilter {
        SubjectFilter::of(AggregateKind::Environment)
    }
    fn wants(&self, kind: &str) -> bool {
        matches!(
            kind,
            "environment.pull_request_opened.v1"
                | "environment.pull_request_updated.v1"
                | "environment.pull_request_head_found.v1"
                | "environment.created.v1"
                | "environment.deleted.v1"
        )
    }
    async fn activate(&self, a: &Activation) -> Outcome {
        let Subject::Environment(project, name) = &a.subject else {
            return Outcome::Done;
        };
        let step = async {
            self.step(a, project, name).await?;
            self.cancel_outdated(a, project, name).await
        };
        outcome(tokio::select! {
            result = step => result,
            () = a.cancel.cancelled() => Err(Stop::Interrupted),
        })
    }
    async fn give_up(&self, a: &Activation, why: &str) -> Outcome {
        let Subject::Environment(project, name) = &a.subject else {
            return Outcome::Done;
        };
        tracing::error!(subject = %a.subject, kind = a.event.short_kind(), %why,
            "the preview of a pull request was not brought to where it should be");
        // What nobody can be asked about has to be decided all the same.
        match self.environment(project, name) {
            Ok(Some(environment)) if is_undecided(&environment) => {
                outcome(self.settle_head(&environment, why).await)
            }
            Ok(_) => Outcome::Done,
            Err(e) => outcome(Err(e)),
        }
    }
}

fn is_undecided(environment: &Environment) -> bool {
    environment
        .preview
        .as_ref()
        .is_some_and(|p| p.open && !p.rivals.is_empty())
}

/// The services of a project whose source is in a repository.
pub(super) fn services_of<'a>(
    project: &'a Project,
    repository: &'a str,
) -> impl Iterator<Item = (&'a ServiceName, &'a ServiceSpec, &'a SourceSpec)> {
    project.services.iter().filter_map(move |(name, spec)| {
        let source = spec.source.as_ref()?;
        (repository_key(source.url.as_str()) == repository).then_some((name, spec, source))
    })
}

/// Whether a service of a new environment gets the head of its pull request, and no promotion.
pub(super) fn gets_head(
    environment: &Environment,
    project: &Project,
    service: &ServiceName,
) -> bool {
    environment.preview.as_ref().is_some_and(|p| {
        p.open && services_of(project, &p.pull_request.repository).any(|(name, ..)| name == service)
    })
}

impl Previews {
    fn environment(
        &self,
        project: &ProjectName,
        name: &EnvironmentName,
    ) -> Result<Option<Environment>, Stop> {
        let projections = self.bench.ledger.projections();
        Ok(projections.environment(project, name)?)
    }

    async fn step(
        &self,
        a: &Activation,
        project: &ProjectName,
        name: &EnvironmentName,
    ) -> Result<(), Stop> {
        let Some(environment) = self.environment(project, name)? else {
            return Ok(());
        };
        let Some(preview) = environment.preview.as_ref().filter(|p| p.open) else {
            return Ok(());
        };
        match environment.status {
            // It was reopened while its environment was being deleted.
            EnvironmentStatus::Deleted if !preview.dismissed => {
                self.make_again(a, &environment, preview).await
            }
            EnvironmentStatus::Active if is_undecided(&environment) => {
                self.ask_for_head(&environment, preview).await
            }
            EnvironmentStatus::Active => self.deploy(project, name, preview).await,
            _ => Ok(()),
        }
    }

    async fn make_again(
        &self,
        a: &Activation,
        environment: &Environment,
        preview: &Preview,
    ) -> Result<(), Stop> {
        let subject = subject_of(environment);
        let context = self.bench.follow_up(
            ROLE,
            environment.status_event,
            a.event.correlationid,
            "preview_made_again",
        );
        let event = EnvironmentEvent::Created(Created {
            project: environment.project.clone(),
            name: environment.name.clone(),
            spec: preview.spec.clone(),
            from: preview.from.clone(),
            auto_deploy: None,
        });
        self.bench
            .append::<Environment>(&subject, &context, |state| {
                environment::decide(state, event.clone())
            })
            .await?;
        Ok(())
    }

    /// Asks the repository which of several heads of the same moment is the newest.
    async fn ask_for_head(&self, environment: &Environment, preview: &Preview) -> Result<(), Stop> {
        let pull_request = &preview.pull_request;
        let Some(project) = self
            .bench
            .ledger
            .projections()
            .project(&environment.project)?
        else {
            return Ok(());
        };
        let source = services_of(&project, &pull_request.repository).next();
        let Some((.., source)) = source else {
            return self
                .settle_head(environment, "no service has this source any more")
                .await;
        };
        let name = &pull_request.head_ref;
        let git_ref = GitRef::parse(name.clone()).map_err(|e| Stop::Retry(e.to_string()))?;
        match self.sources.resolve(&source.url, &git_ref).await {
            Ok(found) => {
                let reason = format!("{name} leads to it");
                self.head_found(environment, found.commit.commit, reason)
                    .await
            }
            Err(e) if e.retryable => Err(e.into()),
            Err(e) => self.settle_head(environment, &e.message).await,
        }
    }

    /// Takes the head that was delivered last, as nobody can say which is the newest.
    async fn settle_head(&self, environment: &Environment, why: &str) -> Result<(), Stop> {
        let Some(preview) = &environment.preview else {
            return Ok(());
        };
        let reason = format!("it was delivered last, and the repository cannot be asked: {why}");
        let head = preview.pull_request.head.clone();
        self.head_found(environment, head, reason).await
    }

    async fn head_found(
        &self,
        environment: &Environment,
        head: CommitId,
        reason: String,
    ) -> Result<(), Stop> {
        let Some(preview) = &environment.preview else {
            return Ok(());
        };
        let subject = subject_of(environment);
        let masker = self.bench.secrets.masker_or_withhold(subject.project());
        let event = EnvironmentEvent::PullRequestHeadFound(PullRequestHeadFound {
            head,
            reason: masker.mask(&reason).into_owned(),
        });
        let cause = preview.head_event;
        let context = self.bench.follow_up(ROLE, cause, cause.0, "head_found");
        self.bench
            .append::<Environment>(&subject, &context, |state| {
                // A head that was delivered since is to be asked about, too: its event does so.
                let known = state.and_then(|s| s.preview.as_ref());
                if known.is_some_and(|p| p.head_event != cause) {
                    return Ok(Decision::Nothing);
                }
                environment::decide(state, event.clone())
            })
            .await?;
        Ok(())
    }

    /// Asks for the newest head to be deployed, of each service that comes from its repository.
    async fn deploy(
        &self,
        project: &ProjectName,
        name: &EnvironmentName,
        preview: &Preview,
    ) -> Result<(), Stop> {
        let Some(known) = self.bench.ledger.projections().project(project)? else {
            return Ok(());
        };
        let Some(environment) = self.environment(project, name)? else {
            return Ok(());
        };
        let pull_request = &preview.pull_request;
        let wish = Wish {
            environment: &environment,
            commit: &pull_request.head,
            cause: preview.head_event,
            actor: actor_at(&self.bench, preview.head_position).await?,
            reason: format!("pull request {}", pull_request.number),
        };
        for (service, spec, source) in services_of(&known, &pull_request.repository) {
            request(&self.bench, &known, &wish, service, spec, source).await?;
        }
        Ok(())
    }

    /// Cancels what an overtaken worker asked for: a head that is not the newest one any more, or
    /// for an environment that is to go.
    async fn cancel_outdated(
        &self,
        a: &Activation,
        project: &ProjectName,
        name: &EnvironmentName,
    ) -> Result<(), Stop> {
        let projections = self.bench.ledger.projections();
        let Some(environment) = self.environment(project, name)? else {
            return Ok(());
        };
        let wanted = environment.status == EnvironmentStatus::Active
            && environment
                .preview
                .as_ref()
                .is_some_and(|p| p.head_event == a.event.id);
        if wanted {
            return Ok(());
        }
        let Some(known) = projections.project(project)? else {
            return Ok(());
        };
        for service in known.services.keys() {
            let id = deployment_of(a.event.id, name, service);
            let Some(row) = self.bench.row(id)? else {
                continue;
            };
            if row.state.status.in_pipeline() && row.state.cancel.is_none() {
                let event = DeploymentEvent::CancelRequested(CancelRequested {
                    reason: Some("its pull request has moved on".to_owned()),
                });
                match self
                    .bench
                    .advance(ROLE, &row, "preview_outdated", event)
                    .await
                {
                    Ok(_) | Err(Stop::Moved(_)) => {}
                    Err(stop) => return Err(stop),
                }
            }
        }
        Ok(())
    }
}

#[async_trait]
impl Worker for Pushes {
    fn name(&self) -> String {
        "pushes".into()
    }
    fn filter(&self) -> SubjectFilter {
        SubjectFilter::of(AggregateKind::Project)
    }
    fn wants(&self, kind: &str) -> bool {
        kind == "project.branch_pushed.v1"
    }
    async fn activate(&self, a: &Activation) -> Outcome {
        let Ok(ProjectEvent::BranchPushed(pushed)) = a.event.payload::<ProjectEvent>() else {
            return Outcome::Done;
        };
        outcome(tokio::select! {
            result = self.step(a, &pushed) => result,
            () = a.cancel.cancelled() => Err(Stop::Interrupted),
        })
    }
    async fn give_up(&self, a: &Activation, why: &str) -> Outcome {
        tracing::error!(subject = %a.subject, position = %a.position, %why,
            "a push was not deployed; `daybook deploy` does it by hand");
        Outcome::Done
    }
}

impl Pushes {
    /// Deploys what the branch has now: that is never older than what was pushed, in whichever
    /// order one hears of pushes.
    async fn step(&self, a: &Activation, pushed: &BranchPushed) -> Result<(), Stop> {
        let Subject::Project(name) = &a.subject else {
            return Ok(());
        };
        let projections = self.bench.ledger.projections();
        let Some(project) = projections.project(name)? else {
            return Ok(());
        };
        let mut asking = projections.environments(name)?;
        asking.retain(|e| {
            e.status == EnvironmentStatus::Active && e.auto_deploy.as_ref() == Some(&pushed.branch)
        });
        if asking.is_empty() {
            return Ok(());
        }
        let tip = GitRef::parse(format!("refs/heads/{}", pushed.branch))
            .map_err(|e| Stop::Retry(e.to_string()))?;
        for (service, spec, source) in services_of(&project, &pushed.repository) {
            let found = self.sources.resolve(&source.url, &tip).await;
            let commit = match found {
                Ok(found) => found.commit.commit,
                Err(e) if e.retryable => return Err(e.into()),
                // The branch is gone again, say: there is nothing to be deployed.
                Err(e) => {
                    tracing::warn!(project = %name, %service, branch = %pushed.branch, error = %e,
                        "a push cannot be deployed");
                    continue;
                }
            };
            for environment in &asking {
                let instance = instance_of(environment, service);
                if self.has(&instance, &commit)? {
                    continue;
                }
                let wish = Wish {
                    environment,
                    commit: &commit,
                    cause: a.event.id,
                    actor: a.event.actor(),
                    reason: format!("push to {}", pushed.branch),
                };
                request(&self.bench, &project, &wish, service, spec, source).await?;
            }
        }
        Ok(())
    }

    /// Whether the newest deployment of an instance is of this commit.
    fn has(&self, instance: &InstanceRef, commit: &CommitId) -> Result<bool, Stop> {
        let filter = DeploymentFilter::of(instance);
        let projections = self.bench.ledger.projections();
        let page = Page::new(Some(1), None).unwrap_or_default();
        let newest = projections.deployments(&filter, page)?;
        Ok(newest.items.first().is_some_and(|row| {
            let of_commit = row
                .state
                .source
                .as_ref()
                .map(|s| s.commit.as_str() == commit.as_str());
            of_commit.unwrap_or_else(|| {
                matches!(&row.state.request.version,
                    Version::Git { git_ref, .. } if git_ref.as_str() == commit.as_str())
            })
        }))
    }
}

/// A commit that is to be deployed to an environment.
struct Wish<'a> {
    environment: &'a Environment,
    commit: &'a CommitId,
    /// The event that made it the newest one.
    cause: EventId,
    actor: Actor,
    reason: String,
}

fn subject_of(environment: &Environment) -> Subject {
    Subject::Environment(environment.project.clone(), environment.name.clone())
}

fn instance_of(environment: &Environment, service: &ServiceName) -> InstanceRef {
    InstanceRef {
        project: environment.project.clone(),
        environment: environment.name.clone(),
        service: service.clone(),
    }
}

fn deployment_of(
    cause: EventId,
    environment: &EnvironmentName,
    service: &ServiceName,
) -> DeploymentId {
    DeploymentId::derived(cause.0, &format!("delivered {environment}.{service}"))
}

/// What an instance's main deployment runs differently from its service's definition.
fn config_of(bench: &Bench, instance: &InstanceRef) -> Result<InstanceConfig, Stop> {
    let routing = bench.ledger.projections().routing(&instance.project)?;
    let main = routing.and_then(|r| r.traffic(instance)?.main);
    let main = main.map(|id| bench.row(id)).transpose()?.flatten();
    Ok(main.map_or_else(InstanceConfig::default, |row| row.state.config()))
}

/// Asks for a deployment, as somebody would who deploys this commit.
async fn request(
    bench: &Bench,
    project: &Project,
    wish: &Wish<'_>,
    service: &ServiceName,
    spec: &ServiceSpec,
    source: &SourceSpec,
) -> Result<(), Stop> {
    let instance = instance_of(wish.environment, service);
    let git_ref = GitRef::parse(wish.commit.as_str()).map_err(|e| Stop::Retry(e.to_string()))?;
    let environment = &wish.environment.spec;
    // What somebody changed for this instance stays, as with a deployment by hand.
    let config = config_of(bench, &instance)?;
    let mut run = spec.run.clone();
    config.apply(&mut run);
    let event = Box::new(Requested {
        version: Version::Git {
            url: source.url.clone(),
            git_ref,
            path: source.path.clone(),
        },
        clusters: environment.clusters.clone(),
        build: spec.build.clone(),
        image_repository: spec.image_repository.clone(),
        run,
        config,
        switch: environment.switch,
        reason: Some(wish.reason.clone()),
        redeploy_of: None,
        secrets: secret::applicable(&project.secrets, &instance),
        promoted_from: None,
        allow_partial: false,
        instance,
    });
    let id = deployment_of(wish.cause, &wish.environment.name, service);
    let subject = Subject::Deployment(
        wish.environment.project.clone(),
        wish.environment.name.clone(),
        id,
    );
    let mut context = bench.follow_up(
        ROLE,
        wish.cause,
        id.0,
        &format!("delivered {} {service}", wish.environment.name),
    );
    context.actor = wish.actor.clone();
    let asked = bench
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
