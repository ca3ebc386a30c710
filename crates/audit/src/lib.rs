//! Verifying a ledger without trusting who keeps it.
//!
//! [`verify()`] takes a ledger from a [`Source`] (an export, a folder, a server) and proves as much of
//! it as can be proven: signatures, every leaf and the root, continuity with the checkpoint of the
//! last time, the rules of every event, and the folds of every aggregate. What it finds has stable
//! codes and exact places ([`finding`]), and what it does *not* prove is said as well.
//!
//! Nothing in here knows HTTP or git: those come through ports.
#![cfg_attr(test, allow(clippy::unwrap_used))]

mod about;
mod archive;
mod archive_tiles;
mod consistency;
mod deliveries;
mod entry;
mod export;
pub mod finding;
mod fold;
mod gitops;
mod kept;
mod layout;
mod manifest;
mod pipeline;
pub mod receipt;
pub mod report;
mod schema;
mod shares;
mod source;
mod spares;
mod tree;
mod verify;
pub mod world;

pub use archive_tiles::ArchiveTiles;
pub use consistency::{Consistency, ConsistencyError, consistency};
pub use export::{ExportError, Exported, export};
pub use finding::{Finding, Findings, Kind, Place, Severity};
pub use gitops::{CompareRepository, Compared, Difference};
pub use kept::{KeepError, Keeper, Kept};
pub use manifest::FORMAT;
pub use source::{OpenError, ReadFiles, Repository, Source};
pub use verify::{
    Continuity, Counts, Effect, Observe, Options, Thoroughness, Trust, Verified, VerifyError,
    observe, verify,
};
