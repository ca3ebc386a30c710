//! Images: content kept by digest in an OCI layout folder, and the port to where images are
//! pushed to and run from.
//!
//! - [`layout`]: the content store, a folder that any OCI tool can read.
//! - [`manifest`]: what an image says about itself.
//! - [`unpack`]: layers to a folder, with no trust in what the archives say.
//! - [`store`]: the port [`store::ImageStore`] and [`store::Images`], which chooses between
//!   [`local`] (repositories whose host is [`LOCAL_HOST`]) and [`registry`] (all others).
//! - [`credentials`]: what `docker login` left behind.

pub mod credentials;
mod error;
mod json;
pub mod layout;
pub mod local;
pub mod manifest;
pub mod registry;
pub mod store;
pub mod unpack;

pub use error::ImageError;
pub(crate) use json::canonical_json;

/// The host part of repositories that are kept in this machine's layout folder and in no
/// registry: `local.daybook/<project>/<service>`. No request is ever made to it.
pub const LOCAL_HOST: &str = "local.daybook";
