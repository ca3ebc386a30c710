//! Images and builders against real archives, registries and tools.
#![allow(clippy::unwrap_used, clippy::large_futures)]

mod archive;
mod dockerfile;
mod fixtures;
mod layout;
mod pipeline;
mod registry;
mod unpack;
