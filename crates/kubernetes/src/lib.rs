//! Kubernetes clusters as a target: the port [`daybook_workers::target::Target`] over the `kube`
//! crate.
//!
//! A [`KubernetesCluster`] makes the objects of an environment's values, applies them server-side
//! with the field manager `daybook`, removes what it made and is no longer asked for, and follows
//! workloads and pods with one watch a kind, whatever the number of environments. What keeps a
//! release from being ready is said in Kubernetes' own words while the rollout still goes on.
//!
//! [`builds::ClusterBuilds`] makes images there, in Jobs, behind the port
//! [`daybook_workers::ports::Images`].

#![cfg_attr(test, allow(clippy::unwrap_used))]

mod apply;
mod argocd;
mod asked;
mod bring;
pub mod builds;
mod claims;
mod cluster;
mod connect;
pub mod diagnosis;
pub mod differences;
mod error;
pub mod names;
pub mod objects;
mod output;
mod owners;
mod retry;
mod routes;
pub mod status;
mod watches;

pub use argocd::ArgoCd;
pub use asked::Asked;
pub use cluster::{ClusterOptions, KubernetesCluster};
pub use connect::connect;
pub use error::ConnectError;
