//! `cargo xtask fuzz`: what reads bytes from strangers, under cargo-fuzz.

use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

use crate::Failure;
use crate::command::{output, root, run as run_command};
use crate::tools;

pub(crate) const HELP: &str = "\
Fuzz what reads bytes from strangers

Usage: cargo xtask fuzz [TARGET] [--seconds N]

Runs each target of fuzz/, or the one that is named, for N seconds (60 if not given). Findings are in
fuzz/artifacts. A nightly toolchain is needed (`rustup toolchain install nightly`); cargo-fuzz is
installed into the cache of tools.
";

/// The targets, as fuzz/Cargo.toml declares them.
const TARGETS: [&str; 5] = ["formats", "receipt", "export", "event", "hook"];
/// What a target may take of memory, in MiB. The sanitizer alone takes a good part of it.
const MEMORY: &str = "-rss_limit_mb=2048";

/// How long CI fuzzes each target, in seconds.
const IN_CI: u32 = 20;

/// How CI compiles the targets: for so short a run it takes longer to optimise them than it gains.
const BRIEFLY: [(&str, &str); 1] = [("CARGO_PROFILE_RELEASE_OPT_LEVEL", "1")];

pub(crate) fn run(arguments: &[String]) -> Result<ExitCode, Failure> {
    let (mut seconds, mut chosen) = (60_u32, Vec::new());
    let mut rest = arguments.iter();
    while let Some(argument) = rest.next() {
        if argument == "--seconds" {
            let number = rest.next().and_then(|n| n.parse().ok());
            seconds = number.ok_or("--seconds wants a number")?;
        } else if TARGETS.contains(&argument.as_str()) {
            chosen.push(argument.as_str());
        } else {
            let known = TARGETS.join(", ");
            return Err(format!("there is no target {argument:?}; there are {known}").into());
        }
    }
    if chosen.is_empty() {
        chosen.extend(TARGETS);
    }
    fuzz(&chosen, seconds, &[])?;
    Ok(ExitCode::SUCCESS)
}

/// Fuzzes every target for a short while. `Ok(Some(…))` says that it was left out, and why.
pub(crate) fn shortly() -> Result<Option<String>, Failure> {
    if nightly().is_err() {
        let install = Command::new("rustup")
            .args(["toolchain", "install", "nightly", "--profile", "minimal"])
            .status();
        if !install.is_ok_and(|status| status.success()) {
            let why = "there is no nightly toolchain, and it cannot be installed from here";
            eprintln!("\nLEFT OUT: fuzzing: {why}");
            return Ok(Some(format!("fuzzing: {why}")));
        }
    }
    fuzz(&TARGETS, IN_CI, &BRIEFLY).map(|()| None)
}

/// The folder with the programs of the nightly toolchain.
fn nightly() -> Result<PathBuf, Failure> {
    let which = ["which", "--toolchain", "nightly", "cargo"];
    let cargo = output(Command::new("rustup").args(which)).map_err(
        |_| "there is no nightly toolchain; `rustup toolchain install nightly` installs it",
    )?;
    let folder = Path::new(cargo.trim()).parent();
    Ok(folder
        .ok_or("rustup names no folder of the nightly toolchain")?
        .to_owned())
}

/// What a target starts from, beside what was found before in fuzz/corpus: whole inputs, as a mutation
/// rarely makes an envelope or an archive.
fn seeds(target: &str) -> Option<PathBuf> {
    let seeds = match target {
        "event" => root().join("crates/events/tests/golden"),
        other => root().join("fuzz/seeds").join(other),
    };
    seeds.is_dir().then_some(seeds)
}

fn fuzz(targets: &[&str], seconds: u32, briefly: &[(&str, &str)]) -> Result<(), Failure> {
    let program = tools::cargo_fuzz()?;
    let path = std::env::var_os("PATH").unwrap_or_default();
    let folders = std::iter::once(nightly()?).chain(std::env::split_paths(&path));
    let path = std::env::join_paths(folders).map_err(|e| e.to_string())?;
    for target in targets {
        eprintln!("\n=== {target}");
        // What is found goes into the first folder; the seeds are only read.
        let corpus = root().join("fuzz/corpus").join(target);
        std::fs::create_dir_all(&corpus)?;
        run_command(
            Command::new(&program)
                .current_dir(root())
                .env("PATH", &path)
                .envs(briefly.iter().copied())
                .env_remove("RUSTUP_TOOLCHAIN")
                .env_remove("CARGO")
                .args(["fuzz", "run", "--fuzz-dir", "fuzz", target])
                .args([Some(corpus), seeds(target)].into_iter().flatten())
                .arg("--")
                .arg(format!("-max_total_time={seconds}"))
                .args([MEMORY, "-timeout=20", "-max_len=65536"])
                // Each step forward is of interest to somebody who watches.
                .arg(format!("-verbosity={}", u8::from(briefly.is_empty()))),
        )?;
        eprintln!("{target}: {seconds} s without a finding");
    }
    Ok(())
}
