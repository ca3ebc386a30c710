//! The log of record and the log of output lines: over NATS JetStream, and embedded. And the
//! transparency log over the log of record: [`tlog`].
//!
//! `tests/conformance` is what a backend has to do, and each of them runs it.

#![cfg_attr(test, allow(clippy::unwrap_used))]

pub mod embedded;
pub mod jetstream;
mod open;
pub mod tlog;

pub use open::{LogConfig, OpenError, open};
