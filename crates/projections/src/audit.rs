//! The audit: one row for each event of the ledger, void ones included.
//!
//! Rows are kept singly until 32 of them make a [chunk](crate::chunk), and 32 chunks make a block.
//! Beside each block stands a row of its [terms](crate::terms), so that a search passes over blocks
//! that cannot hold what it looks for.

use daybook_events::access::Projects;
use daybook_events::aggregate::Void;
use daybook_events::envelope::DecodeError;
use daybook_events::{
    Actor, DeploymentId, EnvironmentName, EventId, Position, ProjectName, ServiceName,
};
use jiff::Timestamp;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::terms;

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
    /// Only of projects that whoever asks may see.
    pub visible: Projects,
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
        self.visible.sees(row.project.as_ref())
            && fits(self.project.as_ref(), row.project.as_ref())
            && fits(self.environment.as_ref(), row.environment.as_ref())
            && fits(self.service.as_ref(), row.service.as_ref())
            && fits(self.deployment.as_ref(), row.deployment.as_ref())
            && fits(self.correlation.as_ref(), row.correlation.as_ref())
            && fits(self.actor.as_ref(), Some(&row.actor.id))
            && self
                .kind
                .as_ref()
                .is_none_or(|k| *k == row.kind || *k == terms::family(&row.kind))
            && (!self.void_only || row.void.is_some())
            && self.from.is_none_or(|t| row.time >= t)
            && self.until.is_none_or(|t| row.time < t)
    }
}
