//! Placeholder while the crate is being written.

pub mod gateway;
pub mod ports;
pub mod target;
pub mod values;
