//! The audit: one row for each event of the ledger, void ones included.
//!
//! Rows are kept singly until 32 of them make a chunk, and 32 chunks make a block. Beside each
//! block stands a row of its *terms*, hashes of what its events are about, so that a search passes
//! over blocks that cannot hold what it looks for.

use std::hash::Hasher;

use daybook_events::aggregate::Void;
use daybook_events::envelope::DecodeError;
use daybook_events::{
    Actor, DeploymentId, EnvironmentName, EventId, Position, ProjectName, ServiceName,
};
use jiff::Timestamp;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

/// Who did what, when, why, and what led to it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct AuditRow {
    /// Position of the event.
    pub position: Position,
    /// Id of the event; none if it could not be read.
    pub id: Option<EventId>,
    /// When it happened.
    pub time: Timestamp,
    /// When the writer handed it to the log.
    pub recorded: Timestamp,
    /// Who did it.
    pub actor: Actor,
    /// The event's type, without the common prefix.
    pub kind: String,
    /// The aggregate: `shop/production/deployment/<id>`.
    pub subject: String,
    /// Revision of the aggregate that the event claims.
    pub revision: u32,
    /// The project.
    pub project: Option<ProjectName>,
    /// The environment.
    pub environment: Option<EnvironmentName>,
    /// The service.
    pub service: Option<ServiceName>,
    /// The deployment.
    pub deployment: Option<DeploymentId>,
    /// What happened, in one sentence.
    pub summary: String,
    /// Why, in the words of whoever did it.
    pub reason: Option<String>,
    /// The event that directly led to it.
    pub cause: Option<EventId>,
    /// The request or run that it belongs to.
    pub correlation: Option<Uuid>,
    /// Why it changed nothing, if so.
    pub void: Option<VoidView>,
}

/// Why an event changed nothing.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct VoidView {
    /// `overtaken`, `gap`, `unknown`, `unreadable` or `illegal`.
    pub code: String,
    /// A sentence.
    pub message: String,
}

impl From<&Void> for VoidView {
    fn from(void: &Void) -> Self {
        let code = match void {
            Void::Overtaken { .. } => "overtaken",
            Void::Gap { .. } => "gap",
            Void::Unknown(_) => "unknown",
            Void::Unreadable(_) => "unreadable",
            Void::Illegal(_) => "illegal",
        };
        Self {
            code: code.to_owned(),
            message: void.to_string(),
        }
    }
}

impl From<&DecodeError> for VoidView {
    fn from(error: &DecodeError) -> Self {
        Self {
            code: "unreadable".to_owned(),
            message: error.to_string(),
        }
    }
}

/// Which rows of the audit are wanted; all that is given must fit.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct AuditFilter {
    /// Of this project.
    pub project: Option<ProjectName>,
    /// Of this environment.
    pub environment: Option<EnvironmentName>,
    /// Of this service.
    pub service: Option<ServiceName>,
    /// About this deployment.
    pub deployment: Option<DeploymentId>,
    /// By the actor with this id.
    pub actor: Option<String>,
    /// Of this type, without the common prefix; `deployment` stands for all types of that
    /// aggregate.
    pub kind: Option<String>,
    /// Of this request or run.
    pub correlation: Option<Uuid>,
    /// Only those that changed nothing.
    pub void_only: bool,
    /// That happened at this time or later.
    pub from: Option<Timestamp>,
    /// That happened before this time.
    pub until: Option<Timestamp>,
}

impl AuditFilter {
    /// Whether a row fits.
    pub fn matches(&self, row: &AuditRow) -> bool {
        fn fits<T: PartialEq>(wanted: Option<&T>, found: Option<&T>) -> bool {
            wanted.is_none_or(|w| Some(w) == found)
        }
        fits(self.project.as_ref(), row.project.as_ref())
            && fits(self.environment.as_ref(), row.environment.as_ref())
            && fits(self.service.as_ref(), row.service.as_ref())
            && fits(self.deployment.as_ref(), row.deployment.as_ref())
            && fits(self.correlation.as_ref(), row.correlation.as_ref())
            && fits(self.actor.as_ref(), Some(&row.actor.id))
            && self
                .kind
                .as_ref()
                .is_none_or(|k| *k == row.kind || *k == family(&row.kind))
            && (!self.void_only || row.void.is_some())
            && self.from.is_none_or(|t| row.time >= t)
            && self.until.is_none_or(|t| row.time < t)
    }

    /// The terms that a block must hold to be worth reading.
    pub(crate) fn terms(&self) -> Vec<u32> {
        let mut terms = Vec::new();
        let mut add = |letter: u8, text: Option<&str>| {
            if let Some(text) = text {
                terms.push(term(letter, text.as_bytes()));
            }
        };
        add(b'p', self.project.as_ref().map(ProjectName::as_str));
        add(b'e', self.environment.as_ref().map(EnvironmentName::as_str));
        add(b's', self.service.as_ref().map(ServiceName::as_str));
        add(b'a', self.actor.as_deref());
        add(b'k', self.kind.as_deref());
        add(b'v', self.void_only.then_some(""));
        if let Some(d) = &self.deployment {
            terms.push(term(b'd', d.0.as_bytes()));
        }
        if let Some(c) = &self.correlation {
            terms.push(term(b'c', c.as_bytes()));
        }
        terms
    }
}

/// `deployment` of `deployment.requested.v1`.
fn family(kind: &str) -> &str {
    kind.split('.').next().unwrap_or(kind)
}

/// FNV-1a, which never changes between versions as the standard library's hash may.
struct Fnv(u64);

impl Hasher for Fnv {
    fn finish(&self) -> u64 {
        self.0
    }
    fn write(&mut self, bytes: &[u8]) {
        for b in bytes {
            self.0 = (self.0 ^ u64::from(*b)).wrapping_mul(0x0100_0000_01b3);
        }
    }
}

fn term(letter: u8, text: &[u8]) -> u32 {
    let mut hash = Fnv(0xcbf2_9ce4_8422_2325);
    hash.write(&[letter]);
    hash.write(text);
    let h = hash.finish();
    (h ^ (h >> 32)) as u32
}

/// Adds the terms of some rows.
pub(crate) fn add_terms(terms: &mut Vec<u32>, rows: &[AuditRow]) {
    for row in rows {
        let mut add = |letter: u8, text: &[u8]| terms.push(term(letter, text));
        if let Some(p) = &row.project {
            add(b'p', p.as_str().as_bytes());
        }
        if let Some(e) = &row.environment {
            add(b'e', e.as_str().as_bytes());
        }
        if let Some(s) = &row.service {
            add(b's', s.as_str().as_bytes());
        }
        if let Some(d) = &row.deployment {
            add(b'd', d.0.as_bytes());
        }
        if let Some(c) = &row.correlation {
            add(b'c', c.as_bytes());
        }
        add(b'a', row.actor.id.as_bytes());
        add(b'k', row.kind.as_bytes());
        add(b'k', family(&row.kind).as_bytes());
        if row.void.is_some() {
            add(b'v', b"");
        }
    }
    terms.sort_unstable();
    terms.dedup();
}

/// The row of a block's terms.
pub(crate) fn terms_row(terms: &[u32]) -> Vec<u8> {
    terms.iter().flat_map(|t| t.to_be_bytes()).collect()
}

/// Whether a row of terms holds all of `wanted`.
pub(crate) fn holds(terms: &[u8], wanted: &[u32]) -> bool {
    let (terms, _) = terms.as_chunks::<4>();
    wanted
        .iter()
        .all(|w| terms.binary_search(&w.to_be_bytes()).is_ok())
}
