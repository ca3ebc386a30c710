//! What can be done with Daybook: every use case that changes something, callable without HTTP.
//!
//! A use case validates all that it was given, asks the folded state what concerns more than one
//! aggregate, and lets exactly one aggregate decide: one command makes at most one event, so
//! nothing is ever half done. Before anything else it asks whether the caller may do it at all, and
//! so whatever surface calls it gets the same answer. With a [`RequestKey`] a command is carried out once, however often
//! it is repeated.

mod access;
mod approvals;
mod check;
mod config;
mod deploy;
mod domains;
mod freezes;
mod gitops;
mod hooks;
mod lifecycle;
mod project;
mod routes;
mod secrets;
mod templates;
mod traffic;
mod way_back;
mod webhooks;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use daybook_events::aggregate::At;
use daybook_events::log::ReadError;
use daybook_events::{
    Actor, Aggregate, Context, Decision, DeploymentId, Event, EventId, InvalidName, Payload,
    Position, ProjectName, Refusal, Subject, TraceParent, subscription,
};
use daybook_projections::{ExecuteError, Executed, Ledger, QueryError};
use daybook_secrets::{SecretError, SecretStore};
use jiff::Timestamp;
use uuid::Uuid;

use crate::access::{Denied, Over, Principal, Verb, authorise};
use crate::problem::Problem;
use crate::state::Settings;

pub use access::{MadeToken, TokenWish};
pub use approvals::Verdict;
pub(crate) use approvals::approval;
pub use config::Configure;
pub use deploy::{Deploy, Deployed, Promote, Redeploy, RunOverrides, What};
pub use hooks::{HookWish, Received};
pub use lifecycle::{Lifecycle, Operated};
pub use routes::{RoutesSet, Shares, Traffic};
pub use secrets::Verified;
pub use templates::DeployTemplate;
pub use traffic::Switched;
pub use way_back::First;
pub(crate) use webhooks::definition_tag;
pub use webhooks::{OVERLAP, WithSecret};

/// How long a command waits for its own event to be folded, so that whoever asks next sees it.
const OWN_WRITE_WAIT: Duration = Duration::from_secs(2);

/// The namespace of ids that are derived from an `Idempotency-Key`.
const KEYS: Uuid = Uuid::from_u128(0x6f0c_7d3e_52a1_5b0e_9a6b_1f8e_2c47_d901);

/// Who asks, and under which key.
#[derive(Debug, Clone)]
pub struct Caller {
    /// Who, as the events say it.
    pub actor: Actor,
    /// Who, as far as it matters for what they may do.
    pub principal: Principal,
    /// Makes repetitions of the request recognisable.
    pub key: Option<RequestKey>,
    /// The trace that the request belongs to; none for that of the work that it is done in.
    pub traceparent: Option<TraceParent>,
}

impl Caller {
    /// A caller in this process, who may do everything, without a key: each call is a request of
    /// its own.
    pub fn new(actor: Actor) -> Self {
        let principal = Principal::in_process(actor.clone());
        Self::of(actor, principal)
    }

    /// A caller from outside, without a key.
    pub fn of(actor: Actor, principal: Principal) -> Self {
        Self {
            actor,
            principal,
            key: None,
            traceparent: None,
        }
    }

    /// The same caller for a step before what is asked for: under a key of its own.
    fn step(&self, name: &str) -> Self {
        let key = self.key.as_ref().map(|key| RequestKey {
            seed: Uuid::new_v5(&key.seed, name.as_bytes()),
            digest: key.digest.clone(),
        });
        Self {
            key,
            ..self.clone()
        }
    }

    /// The id of the event that the request makes.
    fn event_id(&self) -> EventId {
        match &self.key {
            Some(key) => EventId::derived(key.seed, "event"),
            None => EventId(Uuid::now_v7()),
        }
    }

    /// The id of the deployment that the request makes.
    fn deployment_id(&self) -> DeploymentId {
        match &self.key {
            Some(key) => DeploymentId::derived(key.seed, "deployment"),
            None => DeploymentId(Uuid::now_v7()),
        }
    }

    fn context(&self, id: EventId, correlation: Uuid) -> Context {
        Context {
            id,
            time: Timestamp::now(),
            correlation,
            causation: None,
            actor: self.actor.clone(),
            traceparent: self.traceparent,
            request_digest: self.key.as_ref().map(|k| k.digest.clone()),
        }
    }
}

/// A key that a caller chose for a request. The same key of the same actor for the same operation
/// leads to the same ids, so that a repetition finds what the first request did.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RequestKey {
    seed: Uuid,
    digest: String,
}

impl RequestKey {
    /// A key. `operation` says what is asked for, such as `POST /api/v1/deployments`, and
    /// `digest` is that of the whole request: another one under the same key is refused.
    pub fn new(actor: &Actor, operation: &str, key: &str, digest: impl Into<String>) -> Self {
        let name = format!("{}/{}\n{operation}\n{key}", actor.kind, actor.id);
        Self {
            seed: Uuid::new_v5(&KEYS, name.as_bytes()),
            digest: digest.into(),
        }
    }
}

/// What came of a command.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Done {
    /// A position whose state has the effect of the command.
    pub position: Position,
    /// Where the command's event stands; none if everything was as asked for already.
    pub event: Option<Position>,
    /// An earlier request with the same key had done it; nothing was done now.
    pub replayed: bool,
}

/// Why a command was not carried out.
#[derive(Debug, thiserror::Error)]
pub enum CommandError {
    /// It is not possible (now).
    #[error(transparent)]
    Refused(#[from] Refusal),
    /// It contains a name that is none.
    #[error(transparent)]
    Invalid(#[from] InvalidName),
    /// Its key stands for another request.
    #[error("the Idempotency-Key was used for another request before")]
    KeyReused,
    /// The caller may not do it.
    #[error(transparent)]
    Denied(#[from] Denied),
    /// No secret could be made for a token.
    #[error(transparent)]
    NoRandomness(#[from] crate::access::token::NoRandomness),
    /// It could not be recorded.
    #[error(transparent)]
    Execute(ExecuteError),
    /// The folded state could not be read.
    #[error(transparent)]
    Query(#[from] QueryError),
    /// The log could not be read.
    #[error(transparent)]
    Read(#[from] ReadError),
    /// The repository of uploads cannot be used now.
    #[error("the repository of uploads cannot be used")]
    Uploads(Box<Problem>),
    /// The secret store cannot be used now.
    #[error("the secret store cannot be used")]
    Secrets(#[source] SecretError),
}

impl From<ExecuteError> for CommandError {
    fn from(e: ExecuteError) -> Self {
        match e {
            ExecuteError::Refused(r) => Self::Refused(r),
            other => Self::Execute(other),
        }
    }
}

/// A denial as it is told about a project: one that may not be seen looks missing.
pub(crate) fn denied_project(denied: Denied, project: &ProjectName) -> CommandError {
    match denied {
        Denied::Unseen => check::project_not_found(project).into(),
        lacking => lacking.into(),
    }
}

/// A denial as it is told about a deployment.
pub(crate) fn denied_deployment(denied: Denied, id: DeploymentId) -> CommandError {
    match denied {
        Denied::Unseen => check::deployment_not_found(id).into(),
        lacking => lacking.into(),
    }
}

/// A denial as it is told about a webhook.
pub(crate) fn denied_webhook(denied: Denied) -> CommandError {
    match denied {
        Denied::Unseen => subscription::not_found().into(),
        lacking => lacking.into(),
    }
}

/// The use cases over a ledger. Cheap to clone.
#[derive(Clone)]
pub struct Commands {
    ledger: Ledger,
    settings: Arc<Settings>,
    secrets: Option<Arc<dyn SecretStore>>,
    appended: Arc<AtomicU64>,
}

impl std::fmt::Debug for Commands {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Commands").finish_non_exhaustive()
    }
}

impl Commands {
    /// The use cases over this ledger.
    pub fn new(ledger: Ledger, settings: Arc<Settings>) -> Self {
        Self {
            ledger,
            settings,
            secrets: None,
            appended: Arc::default(),
        }
    }

    /// The same with a place to keep the values of secrets.
    pub fn with_secrets(mut self, secrets: Arc<dyn SecretStore>) -> Self {
        self.secrets = Some(secrets);
        self
    }

    /// The ledger underneath.
    pub fn ledger(&self) -> &Ledger {
        &self.ledger
    }

    /// Whether the caller may do this in a project.
    fn admit(
        &self,
        caller: &Caller,
        verb: Verb,
        project: &ProjectName,
    ) -> Result<(), CommandError> {
        authorise(&caller.principal, verb, Over::Project(project))
            .map_err(|denied| denied_project(denied, project))
    }

    /// Whether the caller may do this to a deployment, which must exist.
    fn admit_to(&self, caller: &Caller, verb: Verb, id: DeploymentId) -> Result<(), CommandError> {
        let project = self.deployment(id)?.state.request.instance.project;
        authorise(&caller.principal, verb, Over::Project(&project))
            .map_err(|denied| denied_deployment(denied, id))
    }

    /// Events that these commands have appended.
    pub fn appended(&self) -> u64 {
        self.appended.load(Ordering::Relaxed)
    }

    /// What an earlier request with the same key did, with the aggregate that it changed.
    async fn earlier(&self, caller: &Caller) -> Result<Option<(Done, Subject)>, CommandError> {
        let Some(key) = &caller.key else {
            return Ok(None);
        };
        let projections = self.ledger.projections();
        let Some(event) = projections.event_by_id(caller.event_id())? else {
            return Ok(None);
        };
        if event.request_digest != key.digest {
            return Err(CommandError::KeyReused);
        }
        let done = Done {
            position: projections.position().max(event.position),
            event: Some(event.position),
            replayed: true,
        };
        Ok(Some((done, event.subject)))
    }

    /// Decides and records one command. `correlation` is the run that it belongs to; none for a
    /// command that stands on its own.
    async fn run<A: Aggregate>(
        &self,
        caller: &Caller,
        subject: &Subject,
        correlation: Option<Uuid>,
        decide: impl Fn(Option<&A>) -> Result<Decision<A::Event>, Refusal> + Send + Sync,
    ) -> Result<Done, CommandError> {
        if let Some((done, _)) = self.earlier(caller).await? {
            return Ok(done);
        }
        let id = caller.event_id();
        let context = caller.context(id, correlation.unwrap_or(id.0));
        let decide = |state: Option<&A>| {
            let decision = decide(state)?;
            if let Decision::Append(event) = &decision {
                self.refuse_secrets(subject, event)?;
            }
            Ok(decision)
        };
        let executed = self.ledger.execute(subject, &context, decide).await;
        let projections = self.ledger.projections();
        match executed {
            Ok(Executed::Appended { position, .. }) => {
                self.appended.fetch_add(1, Ordering::Relaxed);
                daybook_trace::say(|| daybook_trace::about(subject));
                // The event is stored. If folding takes longer, the caller still has the
                // position to wait for.
                let _ = projections.wait_for(position, OWN_WRITE_WAIT).await;
                Ok(Done {
                    position,
                    event: Some(position),
                    replayed: false,
                })
            }
            Ok(Executed::Duplicate { position }) => {
                // The first request is not folded yet; the log itself has its digest.
                let event = self.event(position).await?;
                let key = caller.key.as_ref();
                if event.requestdigest.as_ref() != key.map(|k| &k.digest) {
                    return Err(CommandError::KeyReused);
                }
                Ok(Done {
                    position,
                    event: Some(position),
                    replayed: true,
                })
            }
            // A request with the same key may have come in between: then its effect is what was
            // met here.
            Ok(Executed::Nothing) => match self.earlier(caller).await? {
                Some((done, _)) => Ok(done),
                None => Ok(Done {
                    position: projections.position(),
                    event: None,
                    replayed: false,
                }),
            },
            Err(ExecuteError::Refused(refusal)) => match self.earlier(caller).await? {
                Some((done, _)) => Ok(done),
                None => Err(refusal.into()),
            },
            Err(e) => Err(e.into()),
        }
    }

    /// Refuses to record what contains the value of a secret of the project.
    fn refuse_secrets(&self, subject: &Subject, event: &impl Payload) -> Result<(), Refusal> {
        let (Some(store), Some(project)) = (&self.secrets, subject.project()) else {
            return Ok(());
        };
        // Where the values cannot be read, nothing can be said against it.
        let found = store
            .masker(Some(project))
            .ok()
            .zip(event.encode().ok())
            .and_then(|(masker, payload)| masker.find(payload.get().as_bytes()));
        match found {
            Some(found) if !found.is_empty() => Err(Refusal::new(
                "contains_secret",
                "the request contains the value of a secret, which would stay in the ledger for ever",
                "leave it out; a value that is an ordinary word or number is better no secret",
            )),
            _ => Ok(()),
        }
    }

    /// What a command that makes an aggregate made: the same for every repetition of it, whatever
    /// has become of the aggregate since.
    pub(crate) async fn created<A: Aggregate>(&self, done: &Done) -> Result<A, CommandError> {
        let position = done.event.unwrap_or(done.position);
        let event = self.event(position).await?;
        let damaged = |reason: String| ReadError::Damaged { position, reason };
        let payload = event.payload().map_err(|e| damaged(e.to_string()))?;
        let at = At {
            position,
            id: event.id,
            time: event.time,
            trace: event.trace(),
        };
        Ok(A::first(payload, at).map_err(|e| damaged(e.to_string()))?)
    }

    /// The event at a position that is known to hold one.
    async fn event(&self, position: Position) -> Result<Event, CommandError> {
        let damaged = |reason: String| ReadError::Damaged { position, reason };
        let recorded = self.ledger.log().get(position).await?;
        let recorded = recorded.ok_or_else(|| damaged("the event is missing".into()))?;
        Ok(recorded.event().map_err(|e| damaged(e.to_string()))?)
    }
}
