//! The log of record and the log of output lines: over NATS JetStream, and embedded.
//!
//! `tests/conformance` is what a backend has to do, and each of them runs it.

#![cfg_attr(test, allow(clippy::unwrap_used))]

pub mod embedded;
pub mod jetstream;
mod open;

pub use open::{LogConfig, OpenError, open};
