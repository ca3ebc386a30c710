//! `cargo xtask deny`: cargo-deny at its pinned version, also where its database of advisories
//! cannot be reached.

use std::process::{Command, ExitCode};

use crate::Failure;
use crate::command::{root, run as run_command, status};
use crate::tools;

pub(crate) const HELP: &str = "\
Check licences, sources, bans and advisories of all dependencies, as deny.toml says

Usage: cargo xtask deny

cargo-deny fetches its database of advisories from a git host. Where that cannot be reached,
advisories are left out, and the last lines say so; everything else is checked.
";

pub(crate) fn run(arguments: &[String]) -> Result<ExitCode, Failure> {
    if !arguments.is_empty() {
        return Err(format!("unknown arguments {arguments:?}; see --help").into());
    }
    check()?;
    Ok(ExitCode::SUCCESS)
}

/// Checks all dependencies. `Ok(Some(…))` says that advisories were left out, and why.
pub(crate) fn check() -> Result<Option<String>, Failure> {
    let program = tools::cargo_deny()?;
    let deny = || {
        let mut command = Command::new(&program);
        command
            .current_dir(root())
            // The database comes by git, which is to give up rather than ask or wait for ever.
            .env("GIT_TERMINAL_PROMPT", "0")
            .env("GIT_HTTP_LOW_SPEED_LIMIT", "1000")
            .env("GIT_HTTP_LOW_SPEED_TIME", "30")
            .args(["--workspace", "--all-features"]);
        command
    };
    run_command(deny().args(["check", "bans", "licenses", "sources"]))?;
    if status(deny().args(["fetch", "db"]))?.success() {
        run_command(deny().args(["--offline", "check", "advisories"]))?;
        return Ok(None);
    }
    let why = "the database of advisories cannot be fetched from here (see the lines above)";
    eprintln!("\nLEFT OUT: advisories: {why}");
    Ok(Some(format!("advisories: {why}")))
}
