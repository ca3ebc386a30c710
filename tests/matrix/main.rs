//! The crash matrix: the whole scenario once for each failpoint, killed there.
//!
//! An undisturbed run says which places there are and where everything ends. Then each place has a
//! run of its own, in which the process dies there of SIGKILL, is started again, and the scenario
//! goes on as an idempotent client would go on. It must end where the undisturbed run ended.
//!
//! `cargo xtask matrix` runs it: each place once. Arguments are parts of the names of places, and
//! leave the others out (`cargo xtask matrix image.push`); with `--all` each place has a run for the
//! first time that it is reached, too; with `--nats` the workers are processes of their own, on
//! JetStream, and one of them dies; with `--remote` GitOps commits are pushed to a server of their
//! own.
#![allow(clippy::unwrap_used, clippy::expect_used, missing_docs)]
#![allow(
    unreachable_pub,
    reason = "a test has no public interface; `pub` says what a module offers"
)]

mod cells;
mod outcome;
mod scenario;
mod stage;
#[path = "../support/mod.rs"]
mod support;
mod traffic;

use std::process::ExitCode;

use stage::Cast;

fn main() -> ExitCode {
    let (flags, filters): (Vec<String>, Vec<String>) =
        std::env::args().skip(1).partition(|a| a.starts_with('-'));
    let has = |flag: &str| flags.iter().any(|f| f == flag);
    let mut cast = if has("--nats") {
        match Cast::on_nats() {
            Some(cast) => cast,
            None => {
                daybook_testkit::left_out("the crash matrix on NATS: there is no nats-server");
                return ExitCode::SUCCESS;
            }
        }
    } else {
        Cast::alone()
    };
    cast.remote = has("--remote");
    cells::run(&cast, &filters, has("--all"))
}
