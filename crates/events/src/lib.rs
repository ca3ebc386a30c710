//! The vocabulary of Daybook: validated names, typed subjects, the event envelope, the event
//! kinds of each aggregate with their pure `decide` and `apply`, and the port to the log.
//!
//! Nothing in here does I/O, reads a clock or draws a random number: everything that a decision
//! depends on is passed in, so that the same log always folds to the same state.

pub mod envelope;
pub mod lines;
pub mod log;
pub mod names;
pub mod spec;
pub mod subject;

pub use envelope::{Actor, Event, NewEvent};
pub use log::{EventLog, Position, Recorded};
pub use names::*;
pub use subject::{AggregateKind, Subject, SubjectFilter};
