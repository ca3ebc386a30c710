//! End-to-end tests, through the binary: real processes, real repositories, real servers.
#![allow(clippy::unwrap_used, clippy::expect_used, missing_docs)]
#![allow(
    unreachable_pub,
    reason = "a test has no public interface; `pub` says what a module offers"
)]

mod access;
mod approvals;
mod attested;
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
mod descriptions;
mod domains;
mod dora;
mod endpoints;
mod environments;
mod failover;
mod freeze;
mod gitops;
mod gitops_remote;
mod graphql;
mod images;
mod judged;
mod kill;
mod kubernetes;
mod ledger;
mod life;
mod memory;
mod nats;
mod own_image;
mod page;
mod partial;
mod previews;
mod queue;
mod readers;
mod records;
mod routes;
mod secrets;
mod subscribers;
mod support;
mod templates;
mod terminal;
mod timers;
mod traces;
mod under_load;
mod uploads;
mod webhooks;
