//! Placeholder while the crate is being written.

pub mod target;
pub mod values;
