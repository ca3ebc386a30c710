//! End-to-end tests, through the binary: real processes, real repositories, real servers.
#![allow(clippy::unwrap_used, missing_docs)]

mod support;
