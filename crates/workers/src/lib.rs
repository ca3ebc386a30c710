//! The workers of Daybook and what they use: the driver, the pipeline's steps, git sources, image
//! builders and stores, GitOps repositories, the local target and the gateway.
//!
//! [`crew::Crew`] starts the workers that a process takes on. Each step of the [`pipeline`] is one
//! worker on the one [`driver`], and asks the outside through the [`ports`] and the [`target`].
#![cfg_attr(test, allow(clippy::unwrap_used))]

pub mod builder;
pub mod charts;
pub mod crew;
pub mod driver;
pub mod endpoint_checks;
mod file_lock;
pub mod gateway;
pub mod git_transport;
pub mod gitops;
pub mod host_routes;
pub mod idle;
pub mod image;
pub mod local;
pub mod notify;
pub mod output;
pub mod pipeline;
pub mod ports;
pub mod source;
pub mod target;
pub mod values;
