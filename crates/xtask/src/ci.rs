//! `cargo xtask ci`: what `.ci/run` runs.

use std::process::{Command, ExitCode};
use std::time::{Duration, Instant};

use crate::Failure;
use crate::command::{cargo, output, run as run_command};
use crate::{deny, fuzz, matrix, rooms, schemas, test};

pub(crate) const HELP: &str = "\
Run everything that must be green before a merge, with the time of each step

Usage: cargo xtask ci

In order: cargo fmt --check, clippy with warnings as errors, rooms, deny, test, schemas --check,
matrix, and fuzz for a short while.
All steps run, even after one has failed; what failed is told again at the end. Nothing may be left out (DAYBOOK_REQUIRE=all), except
advisories where their database cannot be reached, and fuzzing where there is no nightly toolchain
and none can be installed.
";

type Step = fn() -> Result<Option<String>, Failure>;

const STEPS: [(&str, Step); 8] = [
    ("fmt", fmt),
    ("clippy", clippy),
    ("rooms", || rooms::check().map(|()| None)),
    ("deny", deny::check),
    ("test", || test::all().map(|()| None)),
    ("schemas", || schemas::check().map(|()| None)),
    ("matrix", || matrix::all().map(|()| None)),
    ("fuzz", fuzz::shortly),
];

pub(crate) fn run(arguments: &[String]) -> Result<ExitCode, Failure> {
    if !arguments.is_empty() {
        return Err(format!("unknown arguments {arguments:?}; see --help").into());
    }
    let start = Instant::now();
    warn_of_little_room();
    let mut results = Vec::new();
    for (name, step) in STEPS {
        eprintln!("\n=== {name}");
        let since = Instant::now();
        let result = step();
        if let Err(failure) = &result {
            let failure = failure.to_string();
            eprintln!("error: {}", failure.lines().next().unwrap_or_default());
        }
        results.push((name, since.elapsed(), result));
    }
    for (name, _, result) in &results {
        if let Err(failure) = result
            && let Some((_, details)) = failure.to_string().split_once('\n')
        {
            eprintln!("\n=== what failed in {name}\n{}", details.trim_end());
        }
    }
    eprintln!("\n=== summary");
    for (name, took, result) in &results {
        let said = match result {
            Ok(None) => "ok".to_owned(),
            Ok(Some(left_out)) => format!("ok, but LEFT OUT {left_out}"),
            Err(failure) => {
                let failure = failure.to_string();
                format!("FAILED: {}", failure.lines().next().unwrap_or_default())
            }
        };
        eprintln!("{name:<8} {:>7}  {said}", seconds(*took));
    }
    eprintln!("{:<8} {:>7}", "total", seconds(start.elapsed()));
    let failed = results.iter().any(|(_, _, result)| result.is_err());
    Ok(ExitCode::from(u8::from(failed)))
}

/// What a clean clone needs on disk: what clippy, tests and fuzzing compile, measured, and a reserve.
const NEEDED_GIB: u64 = 25;

/// A disk that fills up fails tests and compilers in ways that name anything but the disk.
fn warn_of_little_room() {
    let Some(free) = free_gib() else { return };
    eprintln!("{free} GiB are free here; a clean clone takes up to {NEEDED_GIB} GiB");
    if free < NEEDED_GIB && !crate::command::root().join("target/debug").exists() {
        eprintln!(
            "warning: this may not be enough; other checkouts' target folders can be deleted"
        );
    }
}

/// Free GiB on the disk of the checkout, as the POSIX form of `df` says; none where it does not.
fn free_gib() -> Option<u64> {
    let root = crate::command::root();
    let text = output(Command::new("df").arg("-Pk").arg(root)).ok()?;
    let kib: u64 = text
        .lines()
        .nth(1)?
        .split_whitespace()
        .nth(3)?
        .parse()
        .ok()?;
    Some(kib / (1024 * 1024))
}

fn seconds(took: Duration) -> String {
    format!("{:.1} s", took.as_secs_f64())
}

fn fmt() -> Result<Option<String>, Failure> {
    component("fmt", "rustfmt")?;
    run_command(cargo().args(["fmt", "--all", "--check"]))?;
    no_conflicts()?;
    Ok(None)
}

/// Documents have no compiler that would notice what a merge left in them.
fn no_conflicts() -> Result<(), Failure> {
    let marks = "^(<<<<<<<|>>>>>>>) ";
    let found = Command::new("git").args(["grep", "-lE", marks]).output()?;
    match String::from_utf8_lossy(&found.stdout).trim() {
        "" => Ok(()),
        files => Err(format!("a merge was not ended in {}", files.replace('\n', ", ")).into()),
    }
}

fn clippy() -> Result<Option<String>, Failure> {
    component("clippy", "clippy")?;
    run_command(
        cargo()
            .args(["clippy", "--workspace", "--all-targets", "--all-features"])
            .args(["--", "-D", "warnings"]),
    )?;
    Ok(None)
}

/// Whether a component of the toolchain is there. It is never installed behind somebody's back.
fn component(subcommand: &str, name: &str) -> Result<(), Failure> {
    match output(cargo().args([subcommand, "--version"])) {
        Ok(_) => Ok(()),
        Err(_) => Err(format!(
            "this toolchain has no {name}; `rustup component add {name}` installs it"
        )
        .into()),
    }
}
