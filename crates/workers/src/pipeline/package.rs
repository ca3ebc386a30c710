//! Makes the GitOps commits: of a new release, of stopping, starting and removing one, and of
//! taking out again what never became live.
//!
//! The commit is a fact about the outside: made first, recorded then. Its trailer names the event
//! that it follows on, so that after a crash in between the same commit is found and not made
//! again. A deployment that is held, or has ended, in that moment is no exception: its commit is
//! looked for in the repository, which knows more than the ledger then. What waits at the same time
//! is committed together.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use async_trait::async_trait;
use daybook_events::deployment::{
    self, ChangeCommitted, DeployingStarted, Deployment, DeploymentEvent, Status,
};
use daybook_events::environment::EnvironmentStatus;
use daybook_events::gitops::{
    self, Change, Committed, Gitops, GitopsEvent, RemoteStep, RepositoryCreated,
};
use daybook_events::secret::SecretRef;
use daybook_events::{
    Actor, AggregateKind, Context, Digest, EnvKey, EnvironmentName, Event, EventId, InstanceRef,
    Position, ProjectName, Subject, SubjectFilter,
};
use daybook_projections::{AuditFilter, DeploymentRow, Page};
use uuid::Uuid;

use super::foreign::Nudge;
use super::order::Order;
use super::{Bench, Stop, approvals, freeze, give_up, leave, remote, settle};
use crate::charts::{ChartRelease, Charts};
use crate::driver::{Activation, Outcome, Worker};
use crate::ports::{GitopsChange, GitopsCommit, KnownHistory, Repositories, StepError};
use crate::values::{ReleaseValues, RenderedChart};

const ROLE: &str = "package";

/// Somebody asked for another number of instances.
const SCALED: &str = "deployment.scale_requested.v1";

/// What leads to a deployment's being packaged, and is the cause of its commit.
const LEADS_TO_PACKAGING: [&str; 3] = [
    "deployment.image_pinned.v1",
    "deployment.chart_pinned.v1",
    "deployment.approved.v1",
];

/// The code of a step that meets a rewritten history.
pub(super) const REWRITTEN: &str = "gitops_history_rewritten";

/// The code of a step that meets a remote whose history is another one.
const DIVERGED: &str = "gitops_diverged";

/// The worker that writes GitOps repositories.
#[derive(Clone)]
pub struct Package {
    /// Shared.
    pub bench: Bench,
    /// The repositories.
    pub repositories: Arc<dyn Repositories>,
    /// Charts; none can be deployed without.
    pub charts: Option<Arc<dyn Charts>>,
    /// Has the branch looked over when somebody else was seen to have committed.
    pub nudge: Nudge,
    /// Has what is committed together recorded in its order.
    pub order: Order,
}

/// What a commit follows on.
#[derive(Debug, Clone, Copy)]
pub(super) struct Occasion {
    /// The event that it is made for.
    pub(super) cause: EventId,
    /// The run that it belongs to.
    pub(super) correlation: Uuid,
}

impl Occasion {
    /// What a deployment's status calls for.
    fn of(row: &DeploymentRow) -> Self {
        Self {
            cause: row.state.status_event,
            correlation: row.id.0,
        }
    }
}

/// What a commit brings into an environment.
pub(super) enum Release {
    /// An image.
    Image(Box<ReleaseValues>),
    /// A chart.
    Chart(RenderedChart),
}

impl Release {
    /// The digest of what was rendered of a chart: what is committed is what was allowed.
    fn rendered(&self) -> Option<Digest> {
        match self {
            Self::Image(_) => None,
            Self::Chart(chart) => {
                let objects = serde_json::Value::Array(chart.objects.clone());
                Some(Digest::of(objects.to_string().as_bytes()))
            }
        }
    }
}

/// A commit to be made.
pub(super) struct CommitWork<'a> {
    pub(super) project: &'a ProjectName,
    pub(super) environment: &'a EnvironmentName,
    pub(super) change: Change,
    /// What runs, for [`Change::Deploy`].
    pub(super) release: Option<Release>,
    /// The variables that differ, for a [`Change::Deploy`] that changes nothing else.
    pub(super) config: Vec<EnvKey>,
    /// For [`Change::EnvironmentCreated`].
    pub(super) ephemeral: bool,
    pub(super) author: String,
    pub(super) occasion: Occasion,
}

#[async_trait]
impl Worker for Package {
    fn name(&self) -> String {
        ROLE.into()
    }
    fn filter(&self) -> SubjectFilter {
        SubjectFilter::of(AggregateKind::Deployment)
    }
    fn wants(&self, kind: &str) -> bool {
        matches!(
            kind,
            "deployment.image_pinned.v1"
                | "deployment.chart_pinned.v1"
                | "deployment.approved.v1"
                | "deployment.released.v1"
                | "deployment.emergency_freeze_override.v1"
                | "deployment.stop_requested.v1"
                | "deployment.start_requested.v1"
                | "deployment.terminate_requested.v1"
                | "deployment.failed.v1"
                | "deployment.cancelled.v1"
                | "deployment.deleted.v1"
                | SCALED
        )
    }
    async fn activate(&self, a: &Activation) -> Outcome {
        let Subject::Deployment(_, _, id) = a.subject else {
            return Outcome::Done;
        };
        settle(&self.bench, ROLE, id, Box::pin(self.step(a)).await).await
    }
    async fn give_up(&self, a: &Activation, why: &str) -> Outcome {
        give_up(&self.bench, ROLE, a, why).await
    }
}

impl Package {
    async fn step(&self, a: &Activation) -> Result<(), Stop> {
        let Subject::Deployment(_, _, id) = a.subject else {
            return Ok(());
        };
        match self.bench.row(id)? {
            Some(row) if a.event.short_kind() == SCALED => self.scale(&row).await,
            Some(row) => self.carry_out(&row, Some(&a.event)).await,
            None => Ok(()),
        }
    }

    /// Commits what a deployment's status calls for. `event` is what led to it, where it is at
    /// hand.
    pub(super) async fn carry_out(
        &self,
        row: &DeploymentRow,
        event: Option<&Event>,
    ) -> Result<(), Stop> {
        let id = row.id;
        let service = row.state.request.instance.service.clone();
        let promoted_from = row.state.request.promoted_from.clone();
        if !row.state.is_pinned() {
            return Ok(());
        }
        let remove = Change::Remove {
            service: service.clone(),
            deployment: id,
        };
        let (change, replicas) = match row.state.status {
            Status::Packaging => (
                Change::Deploy {
                    service,
                    deployment: id,
                    from: promoted_from.map(|p| p.environment),
                },
                Some(row.state.request.run.replicas),
            ),
            Status::Stopping => (
                Change::Scale {
                    service,
                    deployment: id,
                    replicas: 0,
                },
                Some(0),
            ),
            Status::Starting => {
                let replicas = row.state.replicas;
                (
                    Change::Scale {
                        service,
                        deployment: id,
                        replicas,
                    },
                    Some(replicas),
                )
            }
            Status::Terminating | Status::Failed | Status::Cancelled | Status::Deleted => {
                (remove, None)
            }
            _ => return Ok(()),
        };
        // Before anybody is asked: what cannot be rendered needs no approval.
        let release = match row.state.status {
            Status::Packaging => self.release(row).await?,
            _ => None,
        };
        let instance = &row.state.request.instance;
        let is_planned = row.state.status == Status::Packaging && self.is_planned(row)?;
        let _permit = self.order.permit(&instance.project, is_planned).await;
        // It may have been committed although no event says so: whoever made the commit died, or
        // its record was not accepted any more.
        if has_ended(row) && !self.is_listed(row)? {
            match self.record_lost(row).await {
                Ok(true) => {}
                Ok(false) => return Ok(()),
                // It is not known whether there is one: it has ended, and cannot fail any more.
                Err(Stop::Fail(e)) => {
                    return Err(Stop::Retry(format!("{}: {}", e.code, e.message)));
                }
                Err(stop) => return Err(stop),
            }
        }
        if row.state.status == Status::Packaging {
            // What was committed already, in a try that died, was allowed then.
            if !self.is_listed(row)? && !self.was_let_through(row).await? {
                let rendered = release.as_ref().and_then(Release::rendered);
                if !approvals::is_allowed(&self.bench, row, rendered.as_ref()).await? {
                    return Ok(());
                }
                if !freeze::lets_through(&self.bench, row).await? {
                    return Ok(());
                }
            }
            self.check_secrets(row).await?;
        }
        if row.state.status == Status::Stopping {
            leave::shared_routes(&self.bench, row).await?;
        }
        let author = self.author(event, row).await?;
        let work = CommitWork {
            project: &instance.project,
            environment: &instance.environment,
            change,
            release,
            config: self.changed_variables(row)?,
            ephemeral: false,
            author,
            occasion: Occasion::of(row),
        };
        let made = self.commit(work).await;
        match &made {
            Ok(made) => {
                let text = format!("committed {}: {}", made.commit.short(), made.message);
                self.bench.say(row.id, None, text).await;
            }
            Err(Stop::Retry(why)) => {
                let text = format!("not committed yet, and tried again: {why}");
                self.bench.say(row.id, None, text).await;
            }
            Err(_) => {}
        }
        let commit = match made.map(|made| made.commit) {
            // Only a deployment can fail. The rest of its life waits for somebody's decision.
            Err(Stop::Fail(e))
                if [REWRITTEN, DIVERGED].contains(&e.code.as_str())
                    && row.state.status != Status::Packaging =>
            {
                return Err(Stop::Retry(format!("{}: {}", e.code, e.message)));
            }
            other => other?,
        };
        let event = if row.state.status == Status::Packaging {
            DeploymentEvent::DeployingStarted(DeployingStarted {
                commit: commit.clone(),
            })
        } else {
            DeploymentEvent::ChangeCommitted(ChangeCommitted {
                commit: commit.clone(),
                replicas,
            })
        };
        match self.bench.advance(ROLE, row, "committed", event).await {
            // It was cancelled while the commit was made. Whoever is woken by that, here or
            // elsewhere, may have looked before the commit was there.
            Err(Stop::Moved(_)) if row.state.status == Status::Packaging => {
                drop(_permit);
                match self.bench.row(row.id)? {
                    Some(now) if has_ended(&now) => Box::pin(self.carry_out(&now, None)).await,
                    _ => Ok(()),
                }
            }
            Err(Stop::Moved(_)) => Ok(()),
            other => other.map(|_| ()),
        }
    }

    /// What is to be committed of a deployment that is packaged.
    async fn release(&self, row: &DeploymentRow) -> Result<Option<Release>, Stop> {
        let request = &row.state.request;
        let clusters = request.clusters.clone();
        let secret_env = request.secrets.clone();
        if let Some(image) = row.state.image.clone() {
            return Ok(Some(Release::Image(Box::new(ReleaseValues {
                image,
                clusters,
                secret_env,
                run: request.run.clone(),
            }))));
        }
        let Some(chart) = row.state.chart.clone() else {
            return Ok(None);
        };
        let charts = self.charts.as_deref().ok_or_else(|| {
            StepError::fatal(
                "charts_not_supported",
                format!("{chart} is a Helm chart, and none can be rendered here"),
                "deploy an image (`--image`) or a git ref (`--ref`) of the service",
            )
        })?;
        let InstanceRef {
            project,
            environment,
            service,
        } = &request.instance;
        let found = self.bench.ledger.projections();
        let found = found.environment(project, environment)?;
        let release = ChartRelease {
            project,
            environment,
            ephemeral: found.is_some_and(|e| e.spec.ephemeral),
            service,
            deployment: row.id,
            values: request.run.chart_values.as_ref(),
            port: request.run.port,
        };
        let objects = charts.render(&chart, &release).await?;
        Ok(Some(Release::Chart(RenderedChart {
            chart,
            clusters,
            secret_env,
            stopped: false,
            objects,
        })))
    }

    /// Whether people have to allow the plan of what is packaged.
    fn is_planned(&self, row: &DeploymentRow) -> Result<bool, Stop> {
        let instance = &row.state.request.instance;
        let projections = self.bench.ledger.projections();
        let environment = projections.environment(&instance.project, &instance.environment)?;
        let asks = environment.is_some_and(|e| e.spec.approval.is_some());
        Ok(asks || row.state.approval.is_some())
    }

    /// Whether what is packaged was committed in a try that died before it was recorded. Where
    /// nothing could hold it now this is not asked: whoever commits finds it.
    async fn was_let_through(&self, row: &DeploymentRow) -> Result<bool, Stop> {
        let instance = &row.state.request.instance;
        let projections = self.bench.ledger.projections();
        let environment = projections.environment(&instance.project, &instance.environment)?;
        let is_frozen = environment.is_some_and(|e| !e.freezes.is_empty());
        if !is_frozen && row.state.hold.is_none() && !self.is_planned(row)? {
            return Ok(false);
        }
        let made = self.find(&instance.project, row.state.status_event);
        Ok(made.await?.is_some())
    }

    /// Records the commit of a deployment that has ended, if there is one that nobody recorded.
    async fn record_lost(&self, row: &DeploymentRow) -> Result<bool, Stop> {
        let entered = &row.state.milestones.entered;
        if !entered.contains_key(&Status::Packaging) || entered.contains_key(&Status::Deploying) {
            return Ok(false);
        }
        let instance = &row.state.request.instance;
        let events = self.bench.ledger.log().read_aggregate(&row.subject).await;
        let events = events.map_err(|e| Stop::Retry(e.to_string()))?;
        for event in events.iter().rev().filter_map(|r| r.event().ok()) {
            if !LEADS_TO_PACKAGING.contains(&event.short_kind()) {
                continue;
            }
            let Some(made) = self.find(&instance.project, event.id).await? else {
                continue;
            };
            let promoted_from = row.state.request.promoted_from.clone();
            let change = Change::Deploy {
                service: instance.service.clone(),
                deployment: row.id,
                from: promoted_from.map(|p| p.environment),
            };
            let occasion = Occasion {
                cause: event.id,
                correlation: row.id.0,
            };
            let (project, environment) = (&instance.project, &instance.environment);
            self.record_commit(project, environment, change, occasion, &made)
                .await?;
            return Ok(true);
        }
        Ok(false)
    }

    /// The commit that was made for an event, recorded or not.
    async fn find(
        &self,
        project: &ProjectName,
        cause: EventId,
    ) -> Result<Option<GitopsCommit>, Stop> {
        // The repository is recorded before the first commit is made.
        let Some(gitops) = self.gitops(project)? else {
            return Ok(None);
        };
        let found = self.repositories.find(project, cause, gitops.signers).await;
        Ok(found?)
    }

    /// Commits the number of instances that is asked for now, if it is not committed yet.
    pub(super) async fn scale(&self, row: &DeploymentRow) -> Result<(), Stop> {
        let (Some(scaling), Status::Started) = (row.state.scaling, row.state.status) else {
            return Ok(());
        };
        let cause = scaling.event;
        let instance = &row.state.request.instance;
        let _permit = self.order.permit(&instance.project, false).await;
        let replicas = row.state.replicas;
        let made = self
            .commit(CommitWork {
                project: &instance.project,
                environment: &instance.environment,
                change: Change::Scale {
                    service: instance.service.clone(),
                    deployment: row.id,
                    replicas,
                },
                release: None,
                config: Vec::new(),
                ephemeral: false,
                author: author_of(self.actor_at(scaling.position).await?),
                occasion: Occasion {
                    cause,
                    correlation: row.id.0,
                },
            })
            .await;
        let made = match made {
            Ok(made) => made,
            Err(stop) => {
                let why = match stop {
                    Stop::Fail(e) => format!("{}: {}", e.code, e.message),
                    Stop::Retry(why) => why,
                    other => return Err(other),
                };
                let text = format!("not scaled yet, and tried again: {why}");
                self.bench.say(row.id, None, text).await;
                return Err(Stop::Retry(why));
            }
        };
        let text = format!("committed {}: {}", made.commit.short(), made.message);
        self.bench.say(row.id, None, text).await;
        let event = DeploymentEvent::ChangeCommitted(ChangeCommitted {
            commit: made.commit,
            replicas: Some(replicas),
        });
        let context = self.bench.follow_up(ROLE, cause, row.id.0, "committed");
        let recorded = self
            .bench
            .append::<Deployment>(&row.subject, &context, |state| {
                deployment::decide(state, event.clone())
            })
            .await;
        match recorded {
            // It is being stopped meanwhile.
            Ok(_) | Err(Stop::Moved(_)) => Ok(()),
            Err(stop) => Err(stop),
        }
    }

    /// The variables that a deployment has otherwise than the one whose snapshot it repeats.
    fn changed_variables(&self, row: &DeploymentRow) -> Result<Vec<EnvKey>, Stop> {
        let Some(of) = row.state.request.redeploy_of else {
            return Ok(Vec::new());
        };
        let Some(before) = self.bench.row(of)? else {
            return Ok(Vec::new());
        };
        let (before, now) = (&before.state.request.run.env, &row.state.request.run.env);
        let names: BTreeSet<&EnvKey> = before.keys().chain(now.keys()).collect();
        let differs = |name: &&EnvKey| before.get(*name) != now.get(*name);
        Ok(names.into_iter().filter(differs).cloned().collect())
    }

    /// Whoever the event at a position says did it.
    async fn actor_at(&self, position: Position) -> Result<Option<Actor>, Stop> {
        let recorded = self.bench.ledger.log().get(position).await;
        let recorded = recorded.map_err(|e| Stop::Retry(e.to_string()))?;
        Ok(recorded.and_then(|r| r.event().ok()).map(|e| e.actor()))
    }

    fn gitops(&self, project: &ProjectName) -> Result<Option<Gitops>, Stop> {
        Ok(self.bench.ledger.projections().gitops(project)?)
    }

    /// Makes sure that all secrets can be found before anything is changed, and says which of them
    /// the main deployment does not have like that.
    async fn check_secrets(&self, row: &DeploymentRow) -> Result<(), Stop> {
        let request = &row.state.request;
        let project = &request.instance.project;
        let found = self.bench.secrets.resolve(project, &request.secrets).await;
        found.map_err(|e| StepError {
            code: e.code().to_owned(),
            message: e.to_line(),
            remedy: e.remedy().to_owned(),
            retryable: e.is_retryable(),
        })?;
        let routing = self.bench.ledger.projections().routing(project)?;
        let main = routing
            .and_then(|r| r.traffic(&request.instance)?.main)
            .filter(|main| *main != row.id);
        let Some(main) = main.map(|id| self.bench.row(id)).transpose()?.flatten() else {
            return Ok(());
        };
        let before = &main.state.request.secrets;
        let changes = changed_secrets(before, &request.secrets);
        if !changes.is_empty() {
            let text = format!(
                "secrets changed since the main deployment: {}",
                changes.join(", ")
            );
            self.bench.say(row.id, None, text).await;
        }
        Ok(())
    }

    fn is_listed(&self, row: &DeploymentRow) -> Result<bool, Stop> {
        let gitops = self.gitops(&row.state.request.instance.project)?;
        Ok(gitops.is_some_and(|g| g.releases.contains_key(&row.id)))
    }

    /// Makes a commit and records it.
    pub(super) async fn commit(&self, work: CommitWork<'_>) -> Result<GitopsCommit, Stop> {
        let CommitWork {
            project, occasion, ..
        } = work;
        let known = self.known(project, occasion).await?;
        let head = known.head.clone();
        let (release, chart) = match work.release {
            Some(Release::Image(release)) => (Some(*release), None),
            Some(Release::Chart(chart)) => (None, Some(chart)),
            None => (None, None),
        };
        let made = self
            .repositories
            .commit(
                project,
                GitopsChange {
                    environment: work.environment.clone(),
                    change: work.change.clone(),
                    release,
                    chart,
                    config: work.config,
                    author: work.author,
                    ephemeral: work.ephemeral,
                    cause: occasion.cause,
                    known,
                },
            )
            .await;
        let made = match made {
            Ok(made) => made,
            Err(e) => {
                if [REWRITTEN, DIVERGED].contains(&e.code.as_str()) {
                    self.nudge.give();
                }
                remote::failed(&self.bench, project, RemoteStep::Push, &e).await?;
                return Err(e.into());
            }
        };
        remote::worked(&self.bench, project, self.gitops(project)?.as_ref()).await?;
        // Somebody else committed in between, or a process whose record is still to come.
        if made.parent != head && !made.after_own {
            self.nudge.give();
        }
        self.record_commit(project, work.environment, work.change, occasion, &made)
            .await?;
        Ok(made)
    }

    /// Records a commit, after those that it was made on.
    async fn record_commit(
        &self,
        project: &ProjectName,
        environment: &EnvironmentName,
        change: Change,
        occasion: Occasion,
        made: &GitopsCommit,
    ) -> Result<(), Stop> {
        let _turn = self.order.turn(project, made).await;
        let event = GitopsEvent::Committed(Box::new(Committed {
            commit: made.commit.clone(),
            parent: made.parent.clone(),
            ordinal: Some(made.ordinal),
            environment: environment.clone(),
            change,
            message: made.message.clone(),
            author: made.author.clone(),
            cause: occasion.cause,
            files: made.files.clone(),
            files_digest: made.files_digest.clone(),
            ledger: made.ledger.clone(),
            signer: made.signer.clone(),
            unchanged: made.unchanged,
        }));
        let context = self.context(occasion, "gitops_committed");
        let subject = Subject::Gitops(project.clone());
        self.record(&subject, &context, event).await
    }

    fn context(&self, occasion: Occasion, step: &str) -> Context {
        let Occasion { cause, correlation } = occasion;
        self.bench.follow_up(ROLE, cause, correlation, step)
    }

    /// What the ledger knows of a project's repository, which is made if need be. The key that
    /// signs is recorded before it signs.
    async fn known(&self, project: &ProjectName, occasion: Occasion) -> Result<KnownHistory, Stop> {
        let subject = Subject::Gitops(project.clone());
        let found = self.gitops(project)?;
        let (head, mut signers) = match found {
            Some(gitops) => {
                if let Some(rewritten) = gitops.rewritten {
                    return Err(Stop::Fail(StepError::fatal(
                        REWRITTEN,
                        format!(
                            "the GitOps history was rewritten: the branch is at {} and no longer \
                             contains {}",
                            rewritten.found.short(),
                            rewritten.expected.short()
                        ),
                        "put the branch back, or accept what it is with `daybook gitops adopt`; \
                         then deploy again",
                    )));
                }
                (Some(gitops.head), gitops.signers)
            }
            None => {
                let (branch, commit) = self.repositories.ensure(project).await?;
                let event = GitopsEvent::RepositoryCreated(RepositoryCreated {
                    commit: commit.clone(),
                    branch,
                });
                let context = self.context(occasion, "repository_created");
                self.record(&subject, &context, event).await?;
                (Some(commit), Vec::new())
            }
        };
        if let Some(signer) = self.repositories.signer()?
            && !signers.contains(&signer.public_key)
        {
            let seed = Uuid::new_v5(&Uuid::NAMESPACE_OID, project.as_str().as_bytes());
            let mut context = self.context(occasion, "signer_added");
            context.id = EventId::derived(seed, &format!("signer {}", signer.fingerprint));
            signers.push(signer.public_key.clone());
            self.record(&subject, &context, GitopsEvent::SignerAdded(signer))
                .await?;
        }
        Ok(KnownHistory { head, signers })
    }

    async fn record(
        &self,
        subject: &Subject,
        context: &Context,
        event: GitopsEvent,
    ) -> Result<(), Stop> {
        self.bench
            .append::<Gitops>(subject, context, |state| {
                gitops::decide(state, event.clone())
            })
            .await?;
        Ok(())
    }

    /// The person behind a commit: who asked for the operation, or for the deployment. What a worker
    /// does because an environment is deleted is done by who deleted that.
    async fn author(&self, event: Option<&Event>, row: &DeploymentRow) -> Result<String, Stop> {
        let asked = |kind| self.asked_by(row, kind);
        let actor = match row.state.status {
            Status::Stopping | Status::Starting | Status::Terminating => event
                .filter(|event| event.id == row.state.status_event)
                .map(Event::actor),
            Status::Packaging => self.actor_at(row.created).await?,
            Status::Cancelled | Status::Deleted => asked("deployment.cancel_requested.v1")?,
            _ => None,
        };
        let person = actor.as_ref().is_some_and(|a| !a.is_system());
        let deleted_by = if person {
            None
        } else {
            self.deleted_by(row).await?
        };
        Ok(author_of(deleted_by.or(actor)))
    }

    /// Who last did something of this kind to a deployment.
    fn asked_by(&self, row: &DeploymentRow, kind: &str) -> Result<Option<Actor>, Stop> {
        let filter = AuditFilter {
            deployment: Some(row.id),
            kind: Some(kind.to_owned()),
            ..AuditFilter::default()
        };
        let newest = Page::new(Some(1), None).map_err(|e| Stop::Retry(e.to_string()))?;
        let found = self.bench.ledger.projections().audit(&filter, newest)?;
        Ok(found.items.into_iter().next().map(|asked| asked.actor))
    }

    /// Who deletes the environment of a deployment, if somebody does.
    async fn deleted_by(&self, row: &DeploymentRow) -> Result<Option<Actor>, Stop> {
        let instance = &row.state.request.instance;
        let projections = self.bench.ledger.projections();
        let environment = projections.environment(&instance.project, &instance.environment)?;
        match environment {
            Some(e) if e.status == EnvironmentStatus::Deleting => {
                self.actor_at(e.status_position).await
            }
            _ => Ok(None),
        }
    }
}

/// Whether nothing of a deployment is to be in the repository, whatever became of its commit.
fn has_ended(row: &DeploymentRow) -> bool {
    matches!(
        row.state.status,
        Status::Failed | Status::Cancelled | Status::Deleted
    )
}

/// An actor as the author of a commit; Daybook itself, if there is none.
pub(super) fn author_of(actor: Option<Actor>) -> String {
    let id = actor.map_or_else(|| "daybook".to_owned(), |a| a.id);
    match id.split_once('@') {
        Some((name, _)) => format!("{name} <{id}>"),
        None => format!("{id} <{id}@users.noreply.daybook.dev>"),
    }
}

/// How the secrets of one deployment differ from those of another, in words.
fn changed_secrets(
    before: &BTreeMap<EnvKey, SecretRef>,
    now: &BTreeMap<EnvKey, SecretRef>,
) -> Vec<String> {
    let names: BTreeSet<&EnvKey> = before.keys().chain(now.keys()).collect();
    let change = |name: &EnvKey| match (before.get(name), now.get(name)) {
        (Some(old), Some(new)) if old == new => None,
        (Some(old), Some(new)) => Some(format!(
            "{name} version {} (was {})",
            new.version, old.version
        )),
        (None, Some(new)) => Some(format!("{name} version {} (new)", new.version)),
        (Some(_), None) => Some(format!("{name} (taken away)")),
        (None, None) => None,
    };
    names.into_iter().filter_map(change).collect()
}
