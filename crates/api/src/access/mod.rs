//! Who may do what: the same answer on every surface.
//!
//! A request comes with a credential or without one. [`AccessControl`] makes a [`Principal`] of it
//! or refuses it at the door; [`authorise`] says, from one table, whether a principal may do
//! something. A layer around all routes asks it before a handler runs, and denies what no rule is
//! written for; the use cases in [`commands`](crate::commands) ask it again, for whatever surface
//! calls them. Handlers that list ask [`Principal::visible`] what may be in the list.
//!
//! What somebody may not see looks like what does not exist.

mod authorise;
mod control;
mod guard;
mod lease;
mod limits;
pub mod oidc;
mod principal;
pub(crate) mod rules;
pub mod token;

pub use authorise::{Denied, Over, Place, Verb, allowed, authorise};
pub use control::{AccessControl, AccessMode, Unauthenticated};
pub(crate) use guard::{charge, guard, recognise_later, too_many};
pub use lease::{Lease, TooManyStreams};
pub(crate) use limits::Peer;
pub use limits::Rate;
pub use principal::Principal;
