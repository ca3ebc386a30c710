//! The delivery log of a subscription: one line for each try, in which stands also how far the
//! deliveries are.
//!
//! The lines are kept beside the ledger, in the [`LineLog`](crate::lines::LineLog), and for as
//! long as output is. Losing them loses no delivery: what they do not say is sent once more.

use std::collections::BTreeMap;

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
    /// All of them.
    pub const ALL: [Self; 5] = [
        Self::Delivered,
        Self::Failed,
        Self::DeadLettered,
        Self::Gone,
        Self::Discarded,
    ];

    /// Its name.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Delivered => "delivered",
            Self::Failed => "failed",
            Self::DeadLettered => "dead_lettered",
            Self::Gone => "gone",
            Self::Discarded => "discarded",
        }
    }

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

/// The last try of everything that was tried, not taken, and is to be tried again, by the event's
/// position. The entries are those at the end of a delivery log, in their order; what was tried only
/// before them is not known.
pub fn retrying(entries: impl IntoIterator<Item = Entry>) -> Vec<Try> {
    let mut open = BTreeMap::new();
    let mut mark = Position::ZERO;
    for entry in entries {
        mark = mark.max(entry.mark);
        let Some(attempt) = entry.attempt else {
            continue;
        };
        let due = (attempt.position, attempt.due_by);
        match attempt.outcome {
            Outcome::Failed | Outcome::Gone => open.insert(due, attempt),
            Outcome::Delivered | Outcome::DeadLettered | Outcome::Discarded => open.remove(&due),
        };
    }
    open.into_values().filter(|t| t.due_by > mark).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(position: u64, number: u32, outcome: Outcome, mark: u64) -> Entry {
        let attempt = Try {
            position: Position(position),
            due_by: Position(position),
            event: EventId(uuid::Uuid::nil()),
            kind: "environment.created.v1".into(),
            deployment: None,
            number,
            outcome,
            status: None,
            code: None,
            message: None,
            millis: 1,
            next_at: None,
        };
        Entry {
            attempt: Some(attempt),
            mark: Position(mark),
            since: 0,
        }
    }

    #[test]
    fn what_is_tried_again_is_what_failed_last_and_is_not_dealt_with() {
        let found = retrying([
            entry(5, 1, Outcome::Failed, 4),
            entry(6, 1, Outcome::Failed, 4),
            entry(7, 1, Outcome::Failed, 4),
            entry(8, 1, Outcome::Delivered, 4),
            entry(6, 2, Outcome::Delivered, 4),
            entry(7, 2, Outcome::Failed, 4),
            entry(5, 2, Outcome::DeadLettered, 6),
        ]);
        let found: Vec<_> = found.iter().map(|t| (t.position.0, t.number)).collect();
        assert_eq!(found, [(7, 2)]);
        // What the mark has passed is dealt with, whatever became of the line that said how.
        let lost = [
            entry(3, 1, Outcome::Failed, 2),
            entry(9, 1, Outcome::Failed, 8),
        ];
        let found: Vec<_> = retrying(lost).iter().map(|t| t.position.0).collect();
        assert_eq!(found, [9]);
    }
}
