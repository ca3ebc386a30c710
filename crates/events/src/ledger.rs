//! The ledger aggregate: what was done to the ledger itself. There is one.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::aggregate::{Aggregate, At, Decision, Illegal, Refusal, events};
use crate::envelope::Payload;
use crate::log::Position;
use crate::names::Digest;
use crate::subject::AggregateKind;

/// A damaged log was replaced by a new one, which was written from what had been signed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Repaired {
    /// What was wrong with the old log, if that had been written down.
    pub breach: Option<FoundBreach>,
    /// How many events had been signed; all of them are in the new log, where they were.
    pub size: u64,
    /// The signed root of the tree over them, as RFC 6962 hashes it.
    pub root: Digest,
    /// How many of them stand for positions that had been lost before they were signed.
    pub gaps: u64,
    /// Identity of the new log.
    pub identity: String,
    /// Identity of the old one, if it was known. What it had beyond `size` is in it only.
    pub replaces: Option<String>,
}

/// What was wrong with a log.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct FoundBreach {
    /// A stable code, such as `log_truncated`.
    pub code: String,
    /// The first position concerned, where one could be named.
    pub position: Option<Position>,
    /// What was found.
    pub message: String,
}

events! {
    /// The events of the ledger itself.
    LedgerEvent {
        /// It was restored from its tiles.
        Repaired(Repaired) = "ledger.repaired.v1",
    }
}

/// What was done to the ledger so far.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LedgerRecord {
    /// How often it was restored.
    pub repairs: u32,
    /// The last time.
    pub last: Repaired,
}

impl Aggregate for LedgerRecord {
    type Event = LedgerEvent;
    const KIND: AggregateKind = AggregateKind::Ledger;

    fn first(event: LedgerEvent, _: At) -> Result<Self, Illegal> {
        let LedgerEvent::Repaired(last) = event;
        Ok(Self { repairs: 1, last })
    }

    fn apply(&mut self, event: LedgerEvent, _: At) -> Result<(), Illegal> {
        let LedgerEvent::Repaired(last) = event;
        if last.identity == self.last.identity {
            return Err(Illegal::new(
                LedgerEvent::Repaired(last).kind(),
                "a log that is said to be restored",
            ));
        }
        self.repairs = self.repairs.saturating_add(1);
        self.last = last;
        Ok(())
    }
}

/// Decides whether `event` may be appended. That a log was restored is said once.
pub fn decide(
    state: Option<&LedgerRecord>,
    event: LedgerEvent,
) -> Result<Decision<LedgerEvent>, Refusal> {
    let LedgerEvent::Repaired(repaired) = &event;
    Ok(match state {
        Some(record) if record.last.identity == repaired.identity => Decision::Nothing,
        _ => Decision::Append(event),
    })
}
