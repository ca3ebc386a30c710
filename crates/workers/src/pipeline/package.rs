//! Makes the GitOps commits: of a new release, of stopping, starting and removing one, and of
//! taking out again what never became live.
//!
//! The commit is a fact about the outside: made first, recorded then. Its trailer names the event
//! that it follows on, so that after a crash in between the same commit is found and not made
//! again. All commits of a project are made one after the other.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use async_trait::async_trait;
use daybook_events::deployment::{ChangeCommitted, DeployingStarted, DeploymentEvent, Status};
use daybook_events::gitops::{self, Change, Committed, Gitops, GitopsEvent, RepositoryCreated};
use daybook_events::secret::SecretRef;
use daybook_events::spec::PinnedImage;
use daybook_events::{AggregateKind, CommitId, EnvKey, ProjectName, Subject, SubjectFilter};
use daybook_projections::DeploymentRow;

use super::{Bench, Stop, give_up, settle};
use crate::driver::{Activation, Outcome, Worker};
use crate::ports::{GitopsChange, Repositories, StepError};
use crate::values::ReleaseValues;

const ROLE: &str = "package";

/// The worker that writes GitOps repositories.
pub struct Package {
    /// Shared.
    pub bench: Bench,
    /// The repositories.
    pub repositories: Arc<dyn Repositories>,
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
                | "deployment.stop_requested.v1"
                | "deployment.start_requested.v1"
                | "deployment.terminate_requested.v1"
                | "deployment.failed.v1"
                | "deployment.cancelled.v1"
        )
    }
    fn key(&self, subject: &Subject) -> String {
        subject
            .project()
            .map_or_else(String::new, ToString::to_string)
    }
    async fn activate(&self, a: &Activation) -> Outcome {
        let Subject::Deployment(_, _, id) = a.subject else {
            return Outcome::Done;
        };
        settle(&self.bench, ROLE, id, self.step(a).await).await
    }
    async fn give_up(&self, a: &Activation, why: &str) {
        give_up(&self.bench, ROLE, a, why).await;
    }
}

impl Package {
    async fn step(&self, a: &Activation) -> Result<(), Stop> {
        let Subject::Deployment(_, _, id) = a.subject else {
            return Ok(());
        };
        let Some(row) = self.bench.row(id)? else {
            return Ok(());
        };
        let service = row.state.request.instance.service.clone();
        let Some(image) = row.state.image.clone() else {
            return Ok(());
        };
        let remove = Change::Remove {
            service: service.clone(),
            deployment: id,
        };
        let (change, replicas) = match row.state.status {
            Status::Packaging => (
                Change::Deploy {
                    service,
                    deployment: id,
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
                let replicas = row.state.request.run.replicas;
                (
                    Change::Scale {
                        service,
                        deployment: id,
                        replicas,
                    },
                    Some(replicas),
                )
            }
            Status::Terminating => (remove, None),
            // It may have been committed although the event that says so was never accepted.
            Status::Failed | Status::Cancelled if self.is_listed(&row)? => (remove, None),
            _ => return Ok(()),
        };
        if row.state.status == Status::Packaging {
            self.check_secrets(&row).await?;
        }
        let author = self.author(a, &row).await?;
        let commit = self.commit(&row, change, &image, author).await?;
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
        match self.bench.advance(ROLE, &row, "committed", event).await {
            // It was cancelled while the commit was made: its ending event wakes this worker
            // again, which then takes the release out.
            Err(Stop::Moved(_)) => Ok(()),
            other => other.map(|_| ()),
        }
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
        let project = &row.state.request.instance.project;
        let gitops = self
            .bench
            .ledger
            .projections()
            .folded::<Gitops>(&Subject::Gitops(project.clone()))?;
        Ok(gitops
            .state
            .is_some_and(|g| g.releases.contains_key(&row.id)))
    }

    /// Makes the commit and records it.
    async fn commit(
        &self,
        row: &DeploymentRow,
        change: Change,
        image: &PinnedImage,
        author: String,
    ) -> Result<CommitId, Stop> {
        let instance = &row.state.request.instance;
        let subject = Subject::Gitops(instance.project.clone());
        self.ensure_repository(&instance.project, &subject, row)
            .await?;
        let release = matches!(change, Change::Deploy { .. }).then(|| ReleaseValues {
            image: image.clone(),
            clusters: row.state.request.clusters.clone(),
            secret_env: row.state.request.secrets.clone(),
            run: row.state.request.run.clone(),
        });
        let made = self
            .repositories
            .commit(
                &instance.project,
                GitopsChange {
                    environment: instance.environment.clone(),
                    change: change.clone(),
                    release,
                    tag: image.tag.clone(),
                    author,
                    cause: row.state.status_event,
                    deployment: row.id,
                },
            )
            .await?;
        self.bench
            .say(
                row.id,
                None,
                format!("committed {}: {}", made.commit.short(), made.message),
            )
            .await;
        let event = GitopsEvent::Committed(Box::new(Committed {
            commit: made.commit.clone(),
            parent: made.parent,
            environment: instance.environment.clone(),
            change,
            message: made.message,
            author: made.author,
            cause: row.state.status_event,
            files: made.files,
            files_digest: made.files_digest,
        }));
        let context =
            self.bench
                .follow_up(ROLE, row.state.status_event, row.id.0, "gitops_committed");
        self.bench
            .append::<Gitops>(&subject, &context, |state| {
                gitops::decide(state, event.clone())
            })
            .await?;
        Ok(made.commit)
    }

    async fn ensure_repository(
        &self,
        project: &ProjectName,
        subject: &Subject,
        row: &DeploymentRow,
    ) -> Result<(), Stop> {
        if self
            .bench
            .ledger
            .projections()
            .folded::<Gitops>(subject)?
            .state
            .is_some()
        {
            return Ok(());
        }
        let (branch, commit) = self.repositories.ensure(project).await?;
        let event = GitopsEvent::RepositoryCreated(RepositoryCreated { commit, branch });
        let context =
            self.bench
                .follow_up(ROLE, row.state.status_event, row.id.0, "repository_created");
        self.bench
            .append::<Gitops>(subject, &context, |state| {
                gitops::decide(state, event.clone())
            })
            .await?;
        Ok(())
    }

    /// The person behind a commit: who asked for the operation, or for the deployment.
    async fn author(&self, a: &Activation, row: &DeploymentRow) -> Result<String, Stop> {
        let actor = match row.state.status {
            Status::Stopping | Status::Starting | Status::Terminating
                if a.event.id == row.state.status_event =>
            {
                Some(a.event.actor())
            }
            Status::Packaging => self
                .bench
                .ledger
                .log()
                .get(row.created)
                .await
                .map_err(|e| Stop::Retry(e.to_string()))?
                .and_then(|r| r.event().ok())
                .map(|e| e.actor()),
            _ => None,
        };
        let id = actor.map_or_else(|| "daybook".to_owned(), |a| a.id);
        Ok(match id.split_once('@') {
            Some((name, _)) => format!("{name} <{id}>"),
            None => format!("{id} <{id}@users.noreply.daybook.dev>"),
        })
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
