//! Values of secret variables: where they are kept, and how they are kept out of everything else.
//!
//! The ledger, the GitOps repositories and the projections know secrets by name, version and
//! commitment (see [`daybook_events::secret`]). Their values are in a [`SecretStore`] and in the
//! environment of the processes that run with them, and nowhere else. What such a process prints,
//! and what is reported about it, passes through the [`Masker`] of its project before anybody
//! keeps it: [`MaskedLines`] does that for output, as it streams.

#![cfg_attr(test, allow(clippy::unwrap_used))]

mod cipher;
mod folder;
mod forms;
mod masked_lines;
mod masker;
mod project_file;
mod signature;
mod store;
mod value;

pub use folder::SecretFolder;
pub use forms::PATTERN_MAX;
pub use masked_lines::{MaskedLines, ProjectOf};
pub use masker::{MASK, Masker};
pub use store::{Committed, NoSecrets, SecretError, SecretStore};
pub use value::{InvalidValue, SecretValue, VALUE_MAX, VALUE_MIN};
