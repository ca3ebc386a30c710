//! The interface as its clients see it: over TCP, on a ledger whose workers are played by the
//! tests.

#![allow(clippy::unwrap_used, missing_docs, unreachable_pub)]

mod document;
mod git;
mod hostile;
mod idempotency;
mod lifecycle;
mod lines;
mod projects;
mod reads;
mod repeatable;
mod shutdown;
mod streams;
mod support;
