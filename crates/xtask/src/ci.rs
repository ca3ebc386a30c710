//! `cargo xtask ci`: what `.ci/run` runs.

use std::process::{Command, ExitCode};
use std::time::{Duration, Instant};

use crate::Failure;
use crate::command::{cargo, output, run as run_command};
use crate::{deny, fuzz, matrix, rooms, schemas, test};

pub(crate) const HELP: &str = "\
Run everything that must be green before a merge, with the time of each step

Usage: cargo xtask ci

In order: cargo fmt --check, clippy with warnings as errors, rooms, deny, schemas --check, test,
matrix, and fuzz for a short while.
All steps run, even after one has failed. Nothing may be left out (DAYBOOK_REQUIRE=all), except
advisories where their database cannot be reached, and fuzzing where there is no nightly toolchain
and none can be installed.
";

type Step = fn() -> Result<Option<String>, Failure>;

const STEPS: [(&str, Step); 8] = [
    ("fmt", fmt),
    ("clippy", clippy),
    ("rooms", || rooms::check().map(|()| None)),
    ("deny", deny::check),
    ("schemas", || schemas::check().map(|()| None)),
    ("test", all_tests),
    ("matrix", || matrix::all().map(|()| None)),
    ("fuzz", fuzz::shortly),
];

pub(crate) fn run(arguments: &[String]) -> Result<ExitCode, Failure> {
    if !arguments.is_empty() {
        return Err(format!("unknown arguments {arguments:?}; see --help").into());
    }
    let start = Instant::now();
    let mut results = Vec::new();
    for (name, step) in STEPS {
        eprintln!("\n=== {name}");
        let since = Instant::now();
        let result = step();
        if let Err(failure) = &result {
            eprintln!("error: {failure}");
        }
        results.push((name, since.elapsed(), result));
    }
    eprintln!("\n=== summary");
    for (name, took, result) in &results {
        let said = match result {
            Ok(None) => "ok".to_owned(),
            Ok(Some(left_out)) => format!("ok, but LEFT OUT {left_out}"),
            Err(failure) => format!("FAILED: {failure}"),
        };
        eprintln!("{name:<8} {:>7}  {said}", seconds(*took));
    }
    eprintln!("{:<8} {:>7}", "total", seconds(start.elapsed()));
    let failed = results.iter().any(|(_, _, result)| result.is_err());
    Ok(ExitCode::from(u8::from(failed)))
}

fn seconds(took: Duration) -> String {
    format!("{:.1} s", took.as_secs_f64())
}

fn all_tests() -> Result<Option<String>, Failure> {
    match test::test(&[], true)? {
        tests if tests.success() => Ok(None),
        _ => Err("tests failed".into()),
    }
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
