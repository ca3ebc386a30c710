//! End-to-end tests, through the binary: real processes, real repositories, real servers.
#![allow(clippy::unwrap_used, clippy::expect_used, missing_docs)]
#![allow(
    unreachable_pub,
    reason = "a test has no public interface; `pub` says what a module offers"
)]

mod approvals;
mod audit;
mod bad_input;
mod branches;
mod cancelling;
mod charts;
mod clusters;
mod commands;
mod concurrent;
mod config;
mod credentials;
mod demo;
mod domains;
mod environments;
mod freeze;
mod gitops;
mod gitops_remote;
mod images;
mod kill;
mod kubernetes;
mod ledger;
mod life;
mod nats;
mod page;
mod partial;
mod previews;
mod queue;
mod routes;
mod secrets;
mod support;
mod templates;
mod timers;
mod under_load;
