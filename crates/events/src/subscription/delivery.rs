//! The delivery log of a subscription: one line for each try, in which stands also how far the
//! deliveries are.
//!
//! The lines are kept beside the ledger, in the [`LineLog`](crate::lines::LineLog), and for as
//! long as output is. Losing them loses no delivery: what they do not say is sent once more.

use jiff::Timestamp;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::log::Position;
use crate::names::{DeploymentId, EventId};

/// What came of a try.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Outcome {
    /// The receiver took it.
    Delivered,
    /// It did not. It is tried again.
    Failed,
    /// It did not, and it was the last try: the event was set aside.
    DeadLettered,
    /// It answered 410: the subscription was paused.
    Gone,
    /// It did not, and meanwhile somebody said that the event is not wanted any more.
    Discarded,
}

impl Outcome {
    /// Whether the event is dealt with.
    pub fn is_final(self) -> bool {
        matches!(self, Self::Delivered | Self::DeadLettered | Self::Discarded)
    }
}

/// One try to deliver an event.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Try {
    /// Position of the event.
    pub position: Position,
    /// Where in the ledger it became due: its own position, or that of the demand to send it
    /// again.
    pub due_by: Position,
    /// Its id, which the receiver finds in `webhook-id`.
    pub event: EventId,
    /// Its type, without the common prefix.
    pub kind: String,
    /// The deployment that it is about.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub deployment: Option<DeploymentId>,
    /// Which try it was, from 1.
    pub number: u32,
    /// What came of it.
    pub outcome: Outcome,
    /// The status of the answer, if there was one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub status: Option<u16>,
    /// What was wrong, as a stable code.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub code: Option<String>,
    /// The same in words, with the beginning of the answer.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub message: Option<String>,
    /// How long it took, in milliseconds.
    pub millis: u64,
    /// When it is tried again.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub next_at: Option<Timestamp>,
}

/// A line of the delivery log.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Entry {
    /// The try; none if the line only says how far the deliveries are.
    #[serde(default, rename = "try", skip_serializing_if = "Option::is_none")]
    pub attempt: Option<Try>,
    /// All that became due up to here is dealt with.
    pub mark: Position,
    /// The first line that says something of what became due later; 0 for this one.
    pub since: u64,
}

impl Entry {
    /// The line as text. It is JSON without line breaks.
    pub fn to_text(&self) -> Result<String, serde_json::Error> {
        serde_json::to_string(self)
    }

    /// Reads a line. What is none was cut, or masked: it says nothing.
    pub fn from_text(text: &str) -> Option<Self> {
        serde_json::from_str(text).ok()
    }
}
