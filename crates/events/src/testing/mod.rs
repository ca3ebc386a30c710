//! For tests: given/when/then for aggregates, samples of all events, and legal histories.

pub mod fleet;
mod given;
pub mod samples;

pub use given::{Given, When, given};

use jiff::Timestamp;

use crate::envelope::{Actor, Context};
use crate::names::EventId;

/// A context whose id, correlation and time follow from a number.
#[must_use]
pub fn context(number: u64) -> Context {
    let id = EventId::derived(uuid::Uuid::NAMESPACE_OID, &number.to_string());
    Context {
        id,
        time: time(number),
        correlation: id.0,
        causation: None,
        actor: Actor::system("test"),
        traceparent: None,
        request_digest: None,
    }
}

/// The number-th second of a fixed day.
#[must_use]
pub fn time(number: u64) -> Timestamp {
    let second = i64::try_from(number).unwrap_or(i64::MAX / 4);
    Timestamp::from_second(1_767_225_600 + second).unwrap_or(Timestamp::MAX)
}
