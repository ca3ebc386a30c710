//! The pipeline: the workers that carry a deployment from its request to live, and through the
//! rest of its life.
//!
//! ```text
//! queue    requested → queued; supersedes what waits, carries out cancellations
//! source   queued → cloning → commit known, build asked for (or: image checked and pinned)
//! build    runs a build: clone, build, push
//! follow   mirrors a build's steps to the deployments that wait for it
//! freeze   holds what is deployed to a frozen environment until that is none any more
//! approvals  waits, where an environment asks for it, until people have allowed the plan
//! package  makes the GitOps commit → deploying; later: stop, start, remove, clean up
//! previews deploys what webhooks tell of: heads of pull requests, and pushes to branches
//! environment  fills a new environment from another, and empties one that is deleted
//! foreign  finds commits of others in the GitOps repositories, and undoes those that are not wanted
//! sync     hands a commit to a cluster
//! observe  records what a cluster shows
//! domains  takes claimed hostnames into the routes, and those that are given up out of them
//! route    ready → routes switched → applied → succeeded; stopped, started, terminated, failed
//! retry    has a cluster try again what has failed there
//! probe    asks the public addresses
//! endpoints  looks at them from where users are: DNS, TLS and who answers
//! timers   schedules stops, and carries out those that are due
//! activity tells, beside a gateway, which previews are asked for
//! ```
//!
//! Every event that a step appends has an id derived from the event that led to the deployment's
//! present status and the step's name. Whoever takes the step, however often: it is one event.

pub mod activity;
pub mod approvals;
mod branch;
pub mod build;
pub mod cluster_gateway;
pub mod domains;
pub mod endpoints;
pub mod environment;
pub mod follow;
pub mod foreign;
pub mod freeze;
pub mod gateway;
mod leave;
pub mod observe;
pub mod order;
pub mod package;
pub mod previews;
pub mod probe;
pub mod queue;
mod remote;
pub mod retry;
mod reverted;
mod rollout;
pub mod route;
pub mod source;
pub mod sync;
mod texts;
pub mod timers;
pub(crate) mod traced;
mod trouble;

use std::borrow::Cow;
use std::path::PathBuf;
use std::sync::Arc;

use daybook_events::aggregate::{Aggregate, Decision, Refusal};
use daybook_events::deployment::{self, Deployment, DeploymentEvent, Failed};
use daybook_events::lines::{LineKind, LineLog, LineSource, NewLine};
use daybook_events::timer::KeepFor;
use daybook_events::with_causes;
use daybook_events::{
    Actor, ClusterName, Context, DeploymentId, Event, EventId, Hostname, ImageRepository, Position,
    Subject,
};
use daybook_projections::{DeploymentRow, QueryError};
use daybook_projections::{ExecuteError, Executed, Ledger};
use daybook_secrets::SecretStore;
use jiff::Timestamp;
use uuid::Uuid;

use crate::driver::{Activation, Outcome};
use crate::ports::StepError;
use texts::Texts;

/// What all steps share.
#[derive(Debug, Clone)]
pub struct Bench {
    /// The ledger.
    pub ledger: Ledger,
    /// Where output goes. Whoever keeps it masks it.
    pub lines: Arc<dyn LineLog>,
    /// Where the values of secrets are.
    pub secrets: Arc<dyn SecretStore>,
    /// Settings.
    pub settings: Arc<Settings>,
}

/// What an operator can set.
#[derive(Debug, Clone)]
pub struct Settings {
    /// Names this process among the workers: `host/pid`.
    pub worker: String,
    /// The domain under which deployments get their addresses.
    pub domain: Hostname,
    /// Where images go whose service names no repository, before `/<project>/<service>`.
    pub image_prefix: String,
    /// Folder for checkouts and other work in progress. Everything in it may be deleted while no
    /// worker runs.
    pub scratch: PathBuf,
    /// Where the gateway answers from here: `http://127.0.0.1:8080`.
    pub gateway_url: Option<String>,
    /// How many builds run at once in this process.
    pub builds: usize,
    /// How long a deployment is kept running that is no longer the main one, unless its
    /// environment says so itself.
    pub keep_old: KeepFor,
}

/// Why a step stops here.
#[derive(Debug)]
pub enum Stop {
    /// The world has moved on: somebody else took the step, or it is no longer wanted.
    Moved(Refusal),
    /// It may work later.
    Retry(String),
    /// It will not work: recorded as the deployment's failure.
    Fail(StepError),
    /// The process is shutting down.
    Interrupted,
}

impl From<QueryError> for Stop {
    fn from(e: QueryError) -> Self {
        Self::Retry(with_causes(&e))
    }
}

impl From<StepError> for Stop {
    fn from(e: StepError) -> Self {
        if e.retryable {
            Self::Retry(format!("{}: {}", e.code, e.message))
        } else {
            Self::Fail(e)
        }
    }
}

impl From<ExecuteError> for Stop {
    fn from(e: ExecuteError) -> Self {
        match e {
            ExecuteError::Refused(refusal) => Self::Moved(refusal),
            other => Self::Retry(with_causes(&other)),
        }
    }
}

impl Bench {
    /// The context of an event that follows on `cause`, as its step `step`.
    pub fn follow_up(&self, role: &str, cause: EventId, correlation: Uuid, step: &str) -> Context {
        Context {
            id: EventId::derived(cause.0, step),
            time: Timestamp::now(),
            correlation,
            causation: Some(cause),
            actor: Actor::system(&format!("worker/{role}")),
            traceparent: None,
            request_digest: None,
        }
    }

    /// Appends to an aggregate what `decide` says.
    pub async fn append<A: Aggregate>(
        &self,
        subject: &Subject,
        context: &Context,
        decide: impl Fn(Option<&A>) -> Result<Decision<A::Event>, Refusal> + Send + Sync,
    ) -> Result<Executed, Stop> {
        Ok(self.ledger.execute::<A>(subject, context, decide).await?)
    }

    /// Appends a deployment's next step and returns the row as it is with that folded.
    pub async fn advance(
        &self,
        role: &str,
        row: &DeploymentRow,
        step: &str,
        event: DeploymentEvent,
    ) -> Result<DeploymentRow, Stop> {
        let event = self.masked(&row.subject, event);
        let context = self.follow_up(role, row.state.status_event, row.id.0, step);
        let executed = self
            .append::<Deployment>(&row.subject, &context, |state| {
                deployment::decide(state, event.clone())
            })
            .await?;
        self.reread(row, executed.position()).await
    }

    /// An event with the secrets of its project masked in whatever was not written by Daybook
    /// itself. To be done before it is decided on: what is compared with the state is then what
    /// the state can be.
    pub(crate) fn masked<E: Texts>(&self, subject: &Subject, mut event: E) -> E {
        let masker = self.secrets.masker_or_withhold(subject.project());
        event.texts(&mut |text| {
            if let Cow::Owned(masked) = masker.mask(text) {
                *text = masked;
            }
        });
        event
    }

    /// The row with at least this position folded.
    pub async fn reread(
        &self,
        row: &DeploymentRow,
        position: Option<Position>,
    ) -> Result<DeploymentRow, Stop> {
        if let Some(position) = position {
            self.folded(position).await?;
        }
        self.row(row.id)?
            .ok_or_else(|| Stop::Retry("the deployment is not folded yet".into()))
    }

    /// Waits until the events up to here are folded.
    pub async fn folded(&self, position: Position) -> Result<(), Stop> {
        self.ledger
            .projections()
            .wait_for(position, std::time::Duration::from_secs(30))
            .await
            .map_err(|e| Stop::Retry(e.to_string()))
    }

    /// A deployment as it is now.
    pub fn row(&self, id: DeploymentId) -> Result<Option<DeploymentRow>, Stop> {
        Ok(self.ledger.projections().deployment(id)?)
    }

    /// Ends a deployment as failed. What is already settled stays as it is.
    pub async fn fail(
        &self,
        role: &str,
        row: &DeploymentRow,
        error: &StepError,
    ) -> Result<(), Stop> {
        let event = DeploymentEvent::Failed(Failed {
            during: row.state.status,
            code: error.code.clone(),
            message: error.message.clone(),
            remedy: error.remedy.clone(),
        });
        daybook_trace::failed(&error.code);
        self.say(
            row.id,
            None,
            format!("failed: {} ({})", error.message, error.code),
        )
        .await;
        self.advance(role, row, "failed", event).await.map(|_| ())
    }

    /// Tells a deployment's followers something, as a line of its output. It is not worth failing
    /// for if that does not work.
    pub async fn say(
        &self,
        deployment: DeploymentId,
        cluster: Option<ClusterName>,
        text: impl Into<String>,
    ) {
        let line = NewLine {
            time: Timestamp::now(),
            kind: LineKind::Status,
            cluster,
            instance: None,
            text: text.into(),
        };
        if let Err(error) = self
            .lines
            .append(LineSource::Deployment(deployment), vec![line])
            .await
        {
            tracing::warn!(deployment.id = %deployment, %error, "a status line was lost");
        }
    }

    /// Where the images of a service go, unless it says so itself.
    pub fn image_repository(&self, row: &DeploymentRow) -> Result<ImageRepository, StepError> {
        let request = &row.state.request;
        match &request.image_repository {
            Some(r) => Ok(r.clone()),
            None => ImageRepository::parse(format!(
                "{}/{}/{}",
                self.settings.image_prefix, request.instance.project, request.instance.service
            ))
            .map_err(|e| {
                StepError::fatal(
                    e.code,
                    e.to_string(),
                    "set the server's image prefix to `host[:port]/path`",
                )
            }),
        }
    }
}

/// Turns what a step came to into the driver's outcome, where there is no deployment that could
/// fail for it.
pub(crate) fn outcome(result: Result<(), Stop>) -> Outcome {
    match result {
        Ok(()) | Err(Stop::Moved(_)) => Outcome::Done,
        Err(Stop::Retry(why)) => Outcome::Retry(why),
        Err(Stop::Fail(e)) => Outcome::Retry(format!("{}: {}", e.code, e.message)),
        Err(Stop::Interrupted) => Outcome::Interrupted,
    }
}

/// Turns what a deployment's step came to into the driver's outcome, recording a failure.
pub async fn settle(
    bench: &Bench,
    role: &str,
    id: DeploymentId,
    result: Result<(), Stop>,
) -> Outcome {
    let Err(Stop::Fail(error)) = result else {
        return outcome(result);
    };
    outcome(match bench.row(id) {
        Ok(Some(row)) if row.state.status.in_pipeline() => bench.fail(role, &row, &error).await,
        Ok(_) => Ok(()),
        Err(e) => Err(e),
    })
}

/// Records that a step was tried to the bound and given up.
pub async fn give_up(bench: &Bench, role: &str, activation: &Activation, why: &str) -> Outcome {
    let Some(id) = deployment_of(&activation.subject, &activation.event) else {
        return Outcome::Done;
    };
    settle(bench, role, id, Err(Stop::Fail(said(activation, why)))).await
}

/// Why a step was given up, as an error. What begins with a code has that code.
pub(crate) fn said(activation: &Activation, why: &str) -> StepError {
    let (code, message) = why.split_once(": ").unwrap_or(("gave_up", why));
    let code = if code.contains(' ') { "gave_up" } else { code };
    StepError::fatal(
        code,
        format!("{message} (given up after {} tries)", activation.attempt),
        "mend the cause and deploy again with `daybook deploy`",
    )
}

/// Who did what an event says. An event that cannot be read is tried again: nobody did nothing.
pub(crate) async fn actor_at(bench: &Bench, position: Position) -> Result<Actor, Stop> {
    let recorded = bench.ledger.log().get(position).await;
    let recorded = recorded.map_err(|e| Stop::Retry(e.to_string()))?;
    recorded
        .and_then(|r| r.event().ok())
        .map(|e| e.actor())
        .ok_or_else(|| Stop::Retry(format!("the event at {position} cannot be read")))
}

/// The deployment that an event is about: its own, or the one that it is correlated with.
pub fn deployment_of(subject: &Subject, event: &Event) -> Option<DeploymentId> {
    match subject {
        Subject::Deployment(_, _, id) => Some(*id),
        Subject::Build(..) | Subject::Gitops(_) | Subject::Routing(_) => {
            Some(DeploymentId(event.correlationid))
        }
        _ => None,
    }
}
