//! Commits of others in the GitOps repositories: found, recorded, and undone if that is wanted.
//!
//! Every process that packages also watches. What the ledger records is read from the ledger
//! itself, and the branch after it: so a commit that the ledger records must be on the branch, and
//! one that it does not record was made by somebody else, or is about to be recorded. Signatures
//! tell the two apart. Ids of findings are derived, so that however many watch, each is recorded
//! once.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

use async_trait::async_trait;
use daybook_events::deployment::Status;
use daybook_events::gitops::{
    self, ForeignSignature, ForeignStatus, Gitops, GitopsEvent, HistoryRestored, HistoryRewritten,
    RemoteStep, RevertFailed, Reverted,
};
use daybook_events::{
    Actor, AggregateKind, CommitId, Context, DeploymentId, EventId, Folded, Position, ProjectName,
    Subject, SubjectFilter,
};
use jiff::Timestamp;
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use super::package::{Package, author_of};
use super::{Bench, Stop, outcome, remote, reverted};
use crate::driver::{Activation, Outcome, Worker};
use crate::gitops::survey;
use crate::ports::{GitopsRevert, KnownHistory, Repositories, StepError};

const ROLE: &str = "package";

/// How long a commit with Daybook's own signature may be without its event. Whoever made it
/// records it within moments, or after a crash when the step is taken again.
const GRACE: Duration = Duration::from_secs(40);

/// How many commits are described at once.
const BATCH: usize = 64;

/// How many events are read at once.
const EVENTS: usize = 1000;

/// Has the repositories looked over at once.
#[derive(Debug, Clone, Default)]
pub struct Nudge(Arc<Notify>);

impl Nudge {
    /// Somebody else was seen to have committed.
    pub fn give(&self) {
        self.0.notify_one();
    }
}

/// Looks over all repositories, every so often and when nudged, until `cancel`. Where commits are
/// not signed nobody can tell who made one, and nothing is looked for.
pub async fn watch(package: Package, every: Duration, cancel: CancellationToken) {
    let nudge = package.nudge.clone();
    let mut watch = Watch {
        bench: package.bench.clone(),
        repositories: package.repositories.clone(),
        decisions: Decisions(package),
        read: Position::ZERO,
        projects: HashMap::new(),
    };
    loop {
        let more = tokio::select! {
            () = cancel.cancelled() => return,
            more = watch.look_over_all() => more,
        };
        if more {
            continue;
        }
        tokio::select! {
            () = cancel.cancelled() => return,
            () = nudge.0.notified() => {}
            () = tokio::time::sleep(every) => {}
        }
    }
}

struct Watch {
    bench: Bench,
    repositories: Arc<dyn Repositories>,
    /// Goes on with what waited for a remote.
    decisions: Decisions,
    /// How far the ledger is read.
    read: Position,
    projects: HashMap<ProjectName, Watched>,
}

/// What one repository is compared with.
#[derive(Default)]
struct Watched {
    /// What the ledger says of it.
    folded: Folded<Gitops>,
    /// Commits that the ledger records and that were not met on the branch yet.
    recorded: HashSet<CommitId>,
    /// Everything up to here is recorded.
    checked: Option<CommitId>,
    /// Commits with Daybook's signature and without an event, with when they were first seen.
    doubtful: HashMap<CommitId, Instant>,
    /// What went wrong last, so that it is said once.
    trouble: Option<String>,
}

impl Watch {
    /// Looks over every repository once; says whether there is more to be found at once.
    async fn look_over_all(&mut self) -> bool {
        match self.repositories.signer() {
            Ok(Some(_)) => {}
            Ok(None) => return false,
            Err(error) => {
                tracing::warn!(%error, "commits of others cannot be told apart");
                return false;
            }
        }
        if let Err(stop) = self.read_ledger().await {
            tracing::warn!(
                ?stop,
                "the ledger could not be compared with the repositories"
            );
            return false;
        }
        let mut more = false;
        let projects: Vec<_> = self.projects.keys().cloned().collect();
        for project in projects {
            let looked = Box::pin(self.look_over(&project)).await;
            let Some(watched) = self.projects.get_mut(&project) else {
                continue;
            };
            match looked {
                Ok(left) => {
                    more |= left;
                    watched.trouble = None;
                }
                Err(stop) => {
                    let trouble = format!("{stop:?}");
                    if watched.trouble.as_ref() != Some(&trouble) {
                        tracing::warn!(%project, ?stop, "a GitOps repository could not be looked over");
                        watched.trouble = Some(trouble);
                    }
                }
            }
        }
        more
    }

    /// Takes in what the ledger recorded since the last time.
    async fn read_ledger(&mut self) -> Result<(), Stop> {
        let filter = SubjectFilter::of(AggregateKind::Gitops);
        loop {
            let log = self.bench.ledger.log();
            let events = log
                .read(self.read, &filter, EVENTS)
                .await
                .map_err(|e| Stop::Retry(e.to_string()))?;
            for recorded in &events {
                self.read = recorded.position;
                if let (Subject::Gitops(project), Ok(event)) = (&recorded.subject, recorded.event())
                {
                    let watched = self.projects.entry(project.clone()).or_default();
                    // What is void records nothing.
                    if watched.folded.apply(recorded.position, &event).is_ok()
                        && let Ok(payload) = event.payload::<GitopsEvent>()
                    {
                        watched.recorded.extend(recorded_by(payload));
                    }
                }
            }
            if events.len() < EVENTS {
                return Ok(());
            }
        }
    }

    async fn look_over(&mut self, project: &ProjectName) -> Result<bool, Stop> {
        let bench = self.bench.clone();
        let Some(watched) = self.projects.get_mut(project) else {
            return Ok(false);
        };
        let Some(state) = &watched.folded.state else {
            return Ok(false);
        };
        let mut signers = state.signers.clone();
        if let Some(own) = self.repositories.signer()? {
            signers.push(own.public_key);
        }
        let request = survey::Request {
            since: watched.checked.clone(),
            known: watched.recorded.clone(),
            expected: Some(state.head.clone()),
            signers,
            limit: BATCH,
        };
        let survey = match self.repositories.survey(project, request).await {
            Ok(survey) => survey,
            Err(e) => {
                remote::failed(&bench, project, RemoteStep::Fetch, &e).await?;
                return Err(e.into());
            }
        };
        match state.remote_trouble.as_ref().map(|t| t.failing.during) {
            None => {}
            // Nobody but a commit can tell whether it takes one.
            Some(RemoteStep::Push) if self.repositories.has_remote(project).await? => {
                Box::pin(self.decisions.go_on(project)).await?;
            }
            Some(_) => remote::worked(&bench, project, Some(state)).await?,
        }
        let revision = watched.folded.revision;
        if let Some(rewritten) = survey.rewritten {
            if state
                .rewritten
                .as_ref()
                .is_some_and(|known| known.found == survey.head)
            {
                return Ok(false);
            }
            tracing::error!(%project, expected = %state.head, found = %survey.head,
                "the GitOps history was rewritten; nothing is committed until somebody decides");
            let event = GitopsEvent::HistoryRewritten(HistoryRewritten {
                expected: state.head.clone(),
                found: survey.head,
                found_ordinal: rewritten.ordinal,
                common: rewritten.common,
            });
            let step = format!("rewritten {revision}");
            record(&bench, project, &step, event).await?;
            return Ok(false);
        }
        if state.rewritten.is_some() {
            let event = GitopsEvent::HistoryRestored(HistoryRestored {
                found: survey.head.clone(),
            });
            let step = format!("restored {revision}");
            record(&bench, project, &step, event).await?;
        }
        for commit in &survey.recorded {
            watched.recorded.remove(commit);
            watched.doubtful.remove(commit);
        }
        let mut doubtful = HashMap::new();
        let mut foreign = Vec::new();
        for found in survey.unknown {
            if found.signature == Some(ForeignSignature::Daybook) {
                let seen = watched.doubtful.remove(&found.commit);
                let seen = seen.unwrap_or_else(Instant::now);
                if seen.elapsed() < GRACE {
                    doubtful.insert(found.commit, seen);
                    continue;
                }
            }
            foreign.push(found);
        }
        let settled = doubtful.is_empty() && foreign.is_empty() && !survey.more;
        if settled {
            watched.checked = Some(survey.head);
        } else {
            // They are met again, until everything before them is recorded.
            watched.recorded.extend(survey.recorded);
        }
        watched.doubtful = doubtful;
        let found_some = !foreign.is_empty();
        for found in foreign {
            tracing::warn!(%project, commit = %found.commit, author = %found.author,
                message = %found.message, "a commit that Daybook did not make");
            let step = format!("foreign {}", found.commit);
            let event = GitopsEvent::ForeignCommitFound(Box::new(found));
            record(&bench, project, &step, event).await?;
        }
        Ok(found_some && survey.more)
    }
}

/// Records a finding, once.
async fn record(
    bench: &Bench,
    project: &ProjectName,
    step: &str,
    event: GitopsEvent,
) -> Result<(), Stop> {
    let subject = Subject::Gitops(project.clone());
    let event = bench.masked(&subject, event);
    let seed = Uuid::new_v5(&Uuid::NAMESPACE_OID, project.as_str().as_bytes());
    let id = EventId::derived(seed, step);
    let context = Context {
        id,
        time: Timestamp::now(),
        correlation: id.0,
        causation: None,
        actor: Actor::system(&format!("worker/{ROLE}")),
        traceparent: None,
        request_digest: None,
    };
    bench
        .append::<Gitops>(&subject, &context, |state| {
            gitops::decide(state, event.clone())
        })
        .await?;
    Ok(())
}

/// The commits that an event records.
fn recorded_by(event: GitopsEvent) -> Option<CommitId> {
    match event {
        GitopsEvent::RepositoryCreated(e) => Some(e.commit),
        GitopsEvent::Committed(e) if !e.unchanged => Some(e.commit),
        GitopsEvent::Reverted(e) => Some(e.commit),
        GitopsEvent::ForeignCommitFound(e) => Some(e.commit),
        _ => None,
    }
}

/// Carries out what people decide about a repository: undoes a commit, rolls back what somebody
/// reverted, and goes on with what had to wait while the history was in doubt or the remote away.
pub struct Decisions(pub Package);

#[async_trait]
impl Worker for Decisions {
    fn name(&self) -> String {
        "gitops-decisions".into()
    }
    fn filter(&self) -> SubjectFilter {
        SubjectFilter::of(AggregateKind::Gitops)
    }
    fn wants(&self, kind: &str) -> bool {
        matches!(
            kind,
            "gitops.foreign_commit_found.v1"
                | "gitops.revert_requested.v1"
                | "gitops.history_restored.v1"
                | "gitops.rewrite_accepted.v1"
                | "gitops.remote_recovered.v1"
        )
    }
    fn key(&self, subject: &Subject) -> String {
        subject.to_string()
    }
    async fn activate(&self, a: &Activation) -> Outcome {
        let Subject::Gitops(project) = &a.subject else {
            return Outcome::Done;
        };
        let done = match a.event.payload::<GitopsEvent>() {
            Ok(GitopsEvent::RevertRequested(e)) => {
                self.revert(a, project, e.commit, e.reason).await
            }
            Ok(GitopsEvent::ForeignCommitFound(e)) => {
                return match &e.undoes {
                    Some(undone) => reverted::honour(&self.0.bench, a, project, &e, undone).await,
                    None => Outcome::Done,
                };
            }
            Ok(_) => Box::pin(self.go_on(project)).await,
            Err(_) => Ok(()),
        };
        outcome(done)
    }
    async fn give_up(&self, a: &Activation, why: &str) -> Outcome {
        let Subject::Gitops(project) = &a.subject else {
            return Outcome::Done;
        };
        let e = match a.event.payload::<GitopsEvent>() {
            Ok(GitopsEvent::RevertRequested(e)) => e,
            Ok(GitopsEvent::ForeignCommitFound(e)) => {
                let bench = &self.0.bench;
                return match &e.undoes {
                    Some(undone) => reverted::give_up(bench, a, project, &e, undone, why).await,
                    None => Outcome::Done,
                };
            }
            _ => return Outcome::Done,
        };
        let error = StepError::fatal(
            "gave_up",
            format!("{why} (given up after {} tries)", a.attempt),
            "mend the cause and ask for it again",
        );
        outcome(self.failed(a, project, e.commit, error).await)
    }
}

impl Decisions {
    async fn revert(
        &self,
        a: &Activation,
        project: &ProjectName,
        commit: CommitId,
        reason: Option<String>,
    ) -> Result<(), Stop> {
        let Package {
            bench,
            repositories,
            ..
        } = &self.0;
        let Some(state) = bench.ledger.projections().gitops(project)? else {
            return Ok(());
        };
        if state.foreign_commit(&commit).map(|f| f.status) != Some(ForeignStatus::Reverting) {
            return Ok(());
        }
        let revert = GitopsRevert {
            commit: commit.clone(),
            author: author_of(Some(a.event.actor())),
            reason,
            cause: a.event.id,
            known: KnownHistory {
                head: Some(state.head.clone()),
                signers: state.signers,
            },
        };
        let _permit = self.0.order.permit(project, false).await;
        let reverted = match repositories.revert(project, revert).await {
            Ok(reverted) => reverted,
            Err(e) if e.retryable => {
                remote::failed(bench, project, RemoteStep::Push, &e).await?;
                return Err(e.into());
            }
            Err(e) => return self.failed(a, project, commit, e).await,
        };
        let made = reverted.made;
        if made.parent.as_ref() != Some(&state.head) && !made.after_own {
            self.0.nudge.give();
        }
        let _turn = self.0.order.turn(project, &made).await;
        let event = GitopsEvent::Reverted(Box::new(Reverted {
            reverts: commit,
            commit: made.commit,
            parent: made.parent,
            ordinal: made.ordinal,
            message: made.message,
            author: made.author,
            cause: a.event.id,
            diff: reverted.diff,
            environments: reverted.environments,
            ledger: made.ledger,
            signer: made.signer,
        }));
        self.append(a, project, "reverted", event).await
    }

    async fn failed(
        &self,
        a: &Activation,
        project: &ProjectName,
        commit: CommitId,
        error: StepError,
    ) -> Result<(), Stop> {
        let event = GitopsEvent::RevertFailed(RevertFailed {
            commit,
            code: error.code,
            message: error.message,
            remedy: error.remedy,
        });
        self.append(a, project, "revert_failed", event).await
    }

    async fn append(
        &self,
        a: &Activation,
        project: &ProjectName,
        step: &str,
        event: GitopsEvent,
    ) -> Result<(), Stop> {
        let bench = &self.0.bench;
        let subject = Subject::Gitops(project.clone());
        let event = bench.masked(&subject, event);
        let context = bench.follow_up(ROLE, a.event.id, a.event.correlationid, step);
        bench
            .append::<Gitops>(&subject, &context, |state| {
                gitops::decide(state, event.clone())
            })
            .await?;
        Ok(())
    }

    /// Stops, starts and removals could not be committed while the history was in doubt, or the
    /// remote away. Removals are also those of what ended before it was live.
    async fn go_on(&self, project: &ProjectName) -> Result<(), Stop> {
        let waiting: Vec<DeploymentId> = self
            .0
            .bench
            .ledger
            .projections()
            .active_deployments(Some(project), None)?
            .into_iter()
            .filter(|row| {
                matches!(
                    row.state.status,
                    Status::Stopping | Status::Starting | Status::Terminating
                ) || row.state.scaling.is_some()
            })
            .map(|row| row.id)
            .collect();
        for id in waiting.into_iter().chain(self.listed(project)?) {
            if let Some(row) = self.0.bench.row(id)? {
                let done = match row.state.status {
                    Status::Started => self.0.scale(&row).await,
                    _ => self.0.carry_out(&row, None).await,
                };
                match done {
                    Ok(()) | Err(Stop::Moved(_)) => {}
                    Err(stop) => return Err(stop),
                }
            }
        }
        Ok(())
    }

    /// What the repository still lists although it ended before it was live.
    fn listed(&self, project: &ProjectName) -> Result<Vec<DeploymentId>, Stop> {
        let bench = &self.0.bench;
        let gitops = bench.ledger.projections().gitops(project)?;
        let mut ended = Vec::new();
        for id in gitops.iter().flat_map(|g| g.releases.keys()) {
            let row = bench.row(*id)?.filter(|row| {
                let status = row.state.status;
                [Status::Failed, Status::Cancelled, Status::Deleted].contains(&status)
            });
            ended.extend(row.map(|row| row.id));
        }
        Ok(ended)
    }
}
