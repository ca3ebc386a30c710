//! The vocabulary of Daybook: validated names, typed subjects, the event envelope, the event
//! kinds of each aggregate with their pure `decide` and `apply`, and the port to the log.
//!
//! Nothing in here does I/O, reads a clock or draws a random number: everything that a decision
//! depends on is passed in, so that the same log always folds to the same state.

pub mod access;
pub mod address;
pub mod admission;
pub mod aggregate;
pub mod any;
pub mod approval;
pub mod asyncapi;
pub mod attestation;
pub mod build;
pub mod catalog;
pub mod causes;
pub mod chart;
pub mod check;
pub mod config;
pub mod deployment;
pub mod domain;
pub mod envelope;
pub mod environment;
pub mod feed;
pub mod few;
pub mod freeze;
pub mod gitops;
pub mod hook;
mod instant;
pub mod ledger;
pub mod lines;
pub mod log;
#[cfg(any(test, feature = "testing"))]
pub mod memory;
pub mod names;
pub mod outline;
pub mod preview;
pub mod project;
pub mod resources;
pub mod routing;
pub mod secret;
#[cfg(any(test, feature = "testing"))]
pub mod simulated;
pub mod spec;
pub mod subject;
pub mod subscription;
pub mod template;
#[cfg(any(test, feature = "testing"))]
pub mod testing;
pub mod timer;
pub mod trace;
pub mod tree;
pub mod upload;

pub use aggregate::{Aggregate, Decision, Folded, Refusal};
pub use any::{AnyFolded, AnyPayload};
pub use causes::with_causes;
pub use envelope::{Actor, Context, Event, EventView, NewEvent, Payload};
pub use log::{EventLog, Position, Recorded};
pub use names::*;
pub use outline::Outline;
pub use subject::{AggregateKind, Subject, SubjectFilter};
pub use trace::TraceParent;
pub use tree::{PublishedTree, TreeHead};
