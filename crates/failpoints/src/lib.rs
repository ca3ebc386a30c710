//! Failpoints: places at which a process can be made to die.
//!
//! A crate that does something whose crash matters says so where it is done:
//!
//! ```
//! daybook_failpoints::reached("image.push.before");
//! // … the push …
//! daybook_failpoints::reached("image.push.after");
//! ```
//!
//! Without the feature `armed`, which only the crash matrix asks for, this is no code at all: the
//! functions are empty and inlined, and what they are given is not evaluated. With it, two
//! variables of the environment say what happens:
//!
//! - `DAYBOOK_FAILPOINT=image.push.after#2` kills the process with SIGKILL when it gets there for
//!   the second time (`#1` may be left out). Nothing is unwound, flushed or released.
//! - `DAYBOOK_FAILPOINTS_TRACE=<file>` appends a line to the file for each place that is reached,
//!   from which the matrix learns what there is to kill.
//!
//! A place that is reached for many reasons says which: `append.after(build.started)`. The names of
//! places are no interface, and change as the code does.

/// Whether failpoints can kill this process.
pub const ARMED: bool = cfg!(feature = "armed");

/// Dies here, if that was asked for.
#[cfg(not(feature = "armed"))]
#[inline(always)]
pub fn reached(_place: &str) {}

/// Dies here, if that was asked for; `reason` tells this time from others. It is only called where
/// failpoints are armed.
#[cfg(not(feature = "armed"))]
#[inline(always)]
pub fn reached_for(_place: &str, _reason: impl FnOnce() -> String) {}

#[cfg(feature = "armed")]
pub use armed::{reached, reached_for};

#[cfg(feature = "armed")]
mod armed;
