//! `cargo xtask bench`.

use std::process::ExitCode;

use crate::Failure;
use crate::command::{cargo, exit_code, status};
use crate::left_out::LeftOut;
use crate::servers;

pub(crate) const HELP: &str = "\
Run a benchmark against its yardstick and print the ratios

Usage: cargo xtask bench <append|audit|drain|fanout|idle|kubernetes|notarise|orchestrate|package|page|past|query|rebuild|switch> [OPTIONS]

Both sides run interleaved in one run on the same machine; figures are medians. Build and run are
optimised. The figures also go to target/bench/ as JSON.

  cargo xtask bench append -- --help                 the options of one benchmark
  cargo xtask bench append --only embedded --writers 1,16
  cargo xtask bench rebuild --events 100000 --enforce    fail if a limit is missed
";

pub(crate) fn run(arguments: &[String]) -> Result<ExitCode, Failure> {
    let Some(name) = arguments.first() else {
        print!("{HELP}");
        return Ok(ExitCode::from(2));
    };
    let left_out = LeftOut::new()?;
    let mut programs = servers::nats(&left_out)?;
    if name == "notarise" {
        programs.extend(servers::tessera(&left_out)?);
    }
    if name == "page" {
        programs.extend(servers::chromium(&left_out)?);
    }
    if name == "kubernetes" {
        programs.extend(servers::kubernetes_with_registry(&left_out)?);
    }
    let of_the_program = ["switch", "idle", "fanout", "kubernetes", "page", "query"];
    if of_the_program.contains(&name.as_str()) {
        // They are measured on the program itself.
        let mut build = cargo();
        let built = status(build.args(["build", "--release", "--package", "daybook"]))?;
        if !built.success() {
            return Ok(exit_code(built));
        }
    }
    let mut bench = cargo();
    bench
        .args(["run", "--release", "--package", "daybook-testkit"])
        .args(["--features", "bench", "--bin", "daybook-bench", "--"])
        .args(["--json", &format!("target/bench/{name}.json")])
        .args(arguments.iter().filter(|a| *a != "--"))
        .envs(programs)
        .env("DAYBOOK_LEFT_OUT", left_out.file());
    let ended = status(&mut bench)?;
    left_out.report()?;
    Ok(exit_code(ended))
}
