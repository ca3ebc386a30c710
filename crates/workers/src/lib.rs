//! Placeholder while the crate is being written.
#![cfg_attr(test, allow(clippy::unwrap_used))]

pub mod gateway;
pub mod git_transport;
pub mod ports;
pub mod source;
pub mod target;
pub mod values;
