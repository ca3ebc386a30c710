//! Real servers and applications for tests, each in a folder of its own, on a free port of the loopback interface,
//! and gone when the test is.
//!
//! A test that needs something that is not installed calls [`left_out`], which says so and never
//! lets it look as if the test had passed unnoticed.

use std::fs::OpenOptions;
use std::io::Write as _;

mod app;
pub mod browser;
pub mod git;
pub mod judge;
#[cfg(feature = "kubernetes")]
pub mod kubernetes;
pub mod nameserver;
pub mod nats;
mod port;
pub mod registry;
pub mod website;

pub use app::{TESTAPP, TestApp};
pub use port::{free_addr, free_port};

/// Says that a test, or a part of one, is left out because something is not there.
///
/// The reason goes to standard error and, if `DAYBOOK_LEFT_OUT` names a file, as a line to its
/// end, so that a test run can count what it did not test.
///
/// # Panics
/// If `DAYBOOK_REQUIRE=all` is set: then nothing may be left out.
pub fn left_out(reason: impl AsRef<str>) {
    let thread = std::thread::current();
    let test = thread.name().unwrap_or("a test");
    let reason = reason.as_ref();
    assert!(
        std::env::var("DAYBOOK_REQUIRE").as_deref() != Ok("all"),
        "{test} would be left out, and DAYBOOK_REQUIRE=all forbids it: {reason}"
    );
    eprintln!("LEFT OUT: {test}: {reason}");
    if let Some(path) = std::env::var_os("DAYBOOK_LEFT_OUT") {
        let written = OpenOptions::new()
            .create(true)
            .append(true)
            .open(&path)
            .and_then(|mut file| file.write_all(format!("{test}: {reason}\n").as_bytes()));
        if let Err(error) = written {
            panic!(
                "cannot write to DAYBOOK_LEFT_OUT={}: {error}",
                path.display()
            );
        }
    }
}
