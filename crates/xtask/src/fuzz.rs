//! `cargo xtask fuzz`: what reads bytes from strangers, under cargo-fuzz.

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
const TARGETS: [&str; 4] = ["formats", "receipt", "export", "event"];
/// What a target may take of memory, in MiB. The sanitizer alone takes a good part of it.
const MEMORY: &str = "-rss_limit_mb=2048";

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
    let program = tools::cargo_fuzz()?;
    let nightly = output(Command::new("rustup").args(["which", "--toolchain", "nightly", "cargo"]))
        .map_err(
            |_| "there is no nightly toolchain; `rustup toolchain install nightly` installs it",
        )?;
    let toolchain = std::path::Path::new(nightly.trim())
        .parent()
        .ok_or("rustup names no folder of the nightly toolchain")?;
    let path = std::env::var_os("PATH").unwrap_or_default();
    let folders = std::iter::once(toolchain.to_owned()).chain(std::env::split_paths(&path));
    let path = std::env::join_paths(folders).map_err(|e| e.to_string())?;
    for target in chosen {
        eprintln!("\n=== {target}");
        run_command(
            Command::new(&program)
                .current_dir(root())
                .env("PATH", &path)
                .env_remove("RUSTUP_TOOLCHAIN")
                .env_remove("CARGO")
                .args(["fuzz", "run", "--fuzz-dir", "fuzz", target, "--"])
                .arg(format!("-max_total_time={seconds}"))
                .args([MEMORY, "-timeout=20", "-max_len=65536"]),
        )?;
    }
    Ok(ExitCode::SUCCESS)
}
