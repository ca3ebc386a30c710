//! The interface as its clients see it: over TCP, on a ledger whose workers are played by the
//! tests.

#![allow(clippy::unwrap_used, missing_docs, unreachable_pub)]

mod access;
mod document;
mod git;
mod graphql;
mod hostile;
mod idempotency;
mod lifecycle;
mod lines;
mod oidc;
mod projects;
mod reads;
mod repeatable;
mod shutdown;
mod sockets;
mod streams;
mod support;
mod webhooks;
