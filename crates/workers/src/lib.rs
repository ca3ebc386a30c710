//! Placeholder while the crate is being written.

pub mod gateway;
pub mod git_transport;
pub mod ports;
pub mod source;
pub mod target;
pub mod values;
