//! The HTTP interface of Daybook: REST under `/api/v1`, GraphQL, streams of events and log lines,
//! and the GitOps repositories over Git's smart protocol.
//!
//! [`router`] puts a [`axum::Router`] over a [`Ledger`](daybook_projections::Ledger) and
//! a [`LineLog`](daybook_events::lines::LineLog), [`serve`] runs it on a listener until it is
//! cancelled. What requests do stands in [`commands`], which knows nothing of HTTP.

#![cfg_attr(test, allow(clippy::unwrap_used))]

pub mod access;
pub mod commands;
mod hooks;

mod answer;
pub mod catalogue;
mod compress;
mod consistency;
mod eject;
mod event_filter;
mod extract;
mod feed;
mod git;
mod graphql;
mod hosts;
mod line_filter;
mod linger;
mod metrics;
mod openapi;
mod page;
mod problem;
mod queue;
mod remembered;
mod routes;
mod server;
mod sse;
mod state;
mod tlog;
mod traced;
pub mod uploads;
mod view;
mod ws;

pub use graphql::sdl as graphql_sdl;
pub use openapi::openapi;
pub use problem::Problem;
pub use routes::router;
pub use server::{ServeError, serve, serve_operations};
pub use state::{AppState, Gateway, Part, Parts, Settings};
