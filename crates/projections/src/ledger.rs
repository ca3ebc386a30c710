//! The ledger: log and projections together, to decide on what is known and append what follows.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use daybook_events::aggregate::{Aggregate, Decision, Refusal};
use daybook_events::log::{Append, AppendError, Expected};
use daybook_events::{Context, EventLog, NewEvent, Payload as _, Position, ProjectName, Subject};
use jiff::Timestamp;

use crate::dora::Switches;
use crate::store::{Behind, Projections, QueryError, lock};

/// How often a decision is made anew because others were faster.
const DECISIONS: u32 = 16;
/// How often an append whose outcome is not known is repeated.
const APPENDS: u32 = 4;
/// How long a decision waits for the fold to catch up.
const PATIENCE: Duration = Duration::from_secs(10);
/// Own appends that are remembered before those already folded are forgotten.
const REMEMBERED: usize = 1024;

/// Log and projections of one process. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Ledger {
    log: Arc<dyn EventLog>,
    projections: Projections,
    /// The position of the last own append to a subject, until it is folded.
    own: Arc<Mutex<HashMap<Subject, Position>>>,
    /// The route switches that the measures of delivery were counted from.
    pub(crate) switches: Arc<Mutex<HashMap<ProjectName, Arc<Switches>>>>,
}

/// What came of a command.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Executed {
    /// Its event is appended.
    Appended {
        /// Where.
        position: Position,
        /// Its number among the events of its aggregate, from 1.
        revision: u32,
    },
    /// Its event was there already: the command is a repetition.
    Duplicate {
        /// Where. Without an idempotency key it may be a later position, between which and the event
        /// there are only events that do not count.
        position: Position,
    },
    /// Everything was as the command wants it.
    Nothing,
}

impl Executed {
    /// Position of the command's event, if it has one.
    pub fn position(self) -> Option<Position> {
        match self {
            Self::Appended { position, .. } | Self::Duplicate { position } => Some(position),
            Self::Nothing => None,
        }
    }
}

/// Why a command was not carried out.
#[derive(Debug, thiserror::Error)]
pub enum ExecuteError {
    /// The state does not allow it.
    #[error("the command was refused")]
    Refused(#[source] Refusal),
    /// The log did not take the event.
    #[error("the event could not be appended")]
    Append(#[source] AppendError),
    /// Others were faster, again and again. Trying again later helps.
    #[error("the aggregate changes too fast to decide on it")]
    Contended,
    /// The state could not be read.
    #[error("the state could not be read")]
    Query(#[from] QueryError),
    /// The fold is too far behind to decide. Trying again later helps.
    #[error("the state is not up to date")]
    Behind(#[from] Behind),
    /// The event could not be written as JSON.
    #[error("the event could not be encoded")]
    Encode(#[source] serde_json::Error),
}

impl ExecuteError {
    /// Whether the same command may succeed later without anybody deciding anew.
    pub fn is_retryable(&self) -> bool {
        match self {
            Self::Append(e) => e.is_retryable(),
            Self::Contended | Self::Behind(_) => true,
            Self::Refused(_) | Self::Query(_) | Self::Encode(_) => false,
        }
    }
}

impl Ledger {
    /// The ledger of a log and the projections that follow it.
    pub fn new(log: Arc<dyn EventLog>, projections: Projections) -> Self {
        Self {
            log,
            projections,
            own: Arc::default(),
            switches: Arc::default(),
        }
    }

    /// The log.
    pub fn log(&self) -> &Arc<dyn EventLog> {
        &self.log
    }

    /// The projections.
    pub fn projections(&self) -> &Projections {
        &self.projections
    }

    /// Decides on the folded state of an aggregate and appends what was decided, with the
    /// aggregate's last position as expectation. If somebody else was faster, it waits until the
    /// fold has caught up and decides again, a bounded number of times.
    ///
    /// The state is never older than what this process itself appended to the subject. The
    /// context's id makes a repetition recognisable: the same command may be executed again after
    /// any error. Nothing is waited for after the append; to read one's own write, wait for its
    /// position with [`Projections::wait_for`]. Only where the log may accept two appends on one
    /// expectation is it waited whether this one counts; if it does not, it is decided again, and
    /// appended under the id that stands [in its stead](daybook_events::EventId::in_its_stead).
    ///
    /// Unless the context names a trace, the event belongs to that of the
    /// [unit of work](daybook_trace::Work) that this is a part of.
    pub async fn execute<A: Aggregate>(
        &self,
        subject: &Subject,
        context: &Context,
        decide: impl Fn(Option<&A>) -> Result<Decision<A::Event>, Refusal> + Send + Sync,
    ) -> Result<Executed, ExecuteError> {
        let mut tried = false;
        let mut id = context.id;
        let traceparent = context.traceparent.or_else(daybook_trace::current);
        for _ in 0..DECISIONS {
            if let Some(position) = self.own_append(subject) {
                self.projections.wait_for(position, PATIENCE).await?;
            }
            let folded = self.projections.shared::<A>(subject)?;
            if context.request_digest.is_some()
                && let Some(known) = self.projections.event_by_id(id)?
                && known.subject == *subject
            {
                let position = known.position;
                return Ok(Executed::Duplicate { position });
            }
            if tried && folded.last_id == Some(id) {
                let position = folded.position;
                return Ok(Executed::Duplicate { position });
            }
            let payload = match decide(folded.state.as_ref()).map_err(ExecuteError::Refused)? {
                Decision::Append(payload) => payload,
                Decision::Nothing => return Ok(Executed::Nothing),
            };
            let revision = folded.revision + 1;
            let kind = payload.kind();
            let event = NewEvent {
                subject: subject.clone(),
                revision,
                context: Context {
                    id,
                    traceparent,
                    ..context.clone()
                },
                payload,
            };
            let append = Append {
                subject: subject.clone(),
                id,
                expected: Expected::Last(folded.position),
                bytes: event
                    .to_bytes(Timestamp::now())
                    .map_err(ExecuteError::Encode)?,
            };
            tried = true;
            match self.append(append).await {
                Ok(done) => {
                    let position = done.position;
                    self.remember(subject, position);
                    if self.log.may_accept_two() && self.is_void(position).await? {
                        // The log will never take this id again.
                        id = id.in_its_stead();
                        continue;
                    }
                    if done.duplicate {
                        return Ok(Executed::Duplicate { position });
                    }
                    daybook_trace::appended(kind, position.0);
                    return Ok(Executed::Appended { position, revision });
                }
                Err(AppendError::Conflict { actual, .. }) => {
                    let newest = match actual {
                        Some(position) => position,
                        None => self.log.head().await.map_err(|e| {
                            ExecuteError::Append(AppendError::Unavailable(e.to_string()))
                        })?,
                    };
                    self.projections.wait_for(newest, PATIENCE).await?;
                }
                Err(e) => return Err(ExecuteError::Append(e)),
            }
        }
        Err(ExecuteError::Contended)
    }

    /// Appends, and where it is not known whether it was stored, finds out by appending again.
    async fn append(&self, append: Append) -> Result<daybook_events::log::Appended, AppendError> {
        let mut pause = Duration::from_millis(20);
        for _ in 1..APPENDS {
            match self.log.append(append.clone()).await {
                Err(AppendError::Unknown(_)) => {
                    tokio::time::sleep(pause).await;
                    pause *= 4;
                }
                answer => return answer,
            }
        }
        self.log.append(append).await
    }

    /// Whether an event that was accepted does not count, because another one was accepted on the
    /// same expectation and came first.
    async fn is_void(&self, position: Position) -> Result<bool, ExecuteError> {
        self.projections.wait_for(position, PATIENCE).await?;
        Ok(self.projections.is_void(position)?)
    }

    fn own_append(&self, subject: &Subject) -> Option<Position> {
        let own = lock(&self.own);
        own.get(subject).copied()
    }

    fn remember(&self, subject: &Subject, position: Position) {
        let folded = self.projections.position();
        let mut own = lock(&self.own);
        if own.len() >= REMEMBERED {
            own.retain(|_, p| *p > folded);
        }
        let last = own.entry(subject.clone()).or_default();
        *last = position.max(*last);
    }
}
