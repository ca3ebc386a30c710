//! Folds of the ledger: current state, history and audit, kept in a store that can be thrown away.
//!
//! [`Projections`] is the store with its queries, [`runner::run`] keeps it up with the log, and
//! [`Ledger`] puts both together with the log, to decide and append. Every row is a function of
//! the events up to [`Projections::position`] and of nothing else: however they were batched,
//! interrupted or repeated, the same events leave the same bytes ([`Projections::digest`]).
#![cfg_attr(test, allow(clippy::unwrap_used))]

pub mod audit;
pub mod cdevents;
mod chunk;
mod concern;
pub mod dora;
mod feed;
mod fold;
mod history;
mod keys;
pub mod ledger;
pub mod page;
pub mod past;
mod query;
mod reached;
pub mod replay;
mod run;
pub mod runner;
mod runs;
mod sentence;
mod slot;
mod state_hash;
pub mod store;
mod table;
mod terms;
#[cfg(test)]
mod tests;
pub mod views;

pub use audit::{AuditFilter, AuditRow};
pub use feed::{Change, Feed};
pub use ledger::{ExecuteError, Executed, Ledger};
pub use page::{Cursor, InvalidPage, Page, PageOf};
pub use past::{InvalidMoment, Moment, PastError};
pub use query::{DeploymentFilter, DeploymentRow, EventRef};
pub use reached::Reached;
pub use state_hash::{InvalidStateHash, StateHash, StateSum};
pub use store::{Behind, Counters, OpenError, Projections, QueryError};
pub use views::HistoryRow;
