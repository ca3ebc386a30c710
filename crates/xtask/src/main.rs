//! Development tasks: one command for each habit. CI calls the same ones.

mod bench;
mod ci;
mod command;
mod deny;
mod fuzz;
mod left_out;
mod matrix;
mod rooms;
mod schemas;
mod servers;
mod test;
mod tools;

use std::process::ExitCode;

/// Whatever went wrong, in a sentence for the person at the terminal; nobody branches on it.
type Failure = Box<dyn std::error::Error + Send + Sync>;

/// A task: what follows its name goes in.
type Task = fn(&[String]) -> Result<ExitCode, Failure>;

const HELP: &str = "\
Development tasks of Daybook

Usage: cargo xtask <TASK> [ARGUMENTS]

Tasks:
  test     Run all tests, after finding or installing the servers that they need
  matrix   Kill the binary at each failpoint, and check what is left
  ci       Run everything that must be green before a merge, with the time of each step
  tools    Build the pinned servers and tools into a cache outside the checkout
  deny     Check licences, sources, bans and advisories of all dependencies
  rooms    Check that no crate knows what it must not know
  schemas  Generate schemas/, or check that it is up to date
  bench    Run a benchmark against its yardstick and print the ratios
  fuzz     Fuzz what reads bytes from strangers

`cargo xtask <TASK> --help` says more about each.
";

fn main() -> ExitCode {
    let mut arguments = std::env::args().skip(1);
    let task = arguments.next();
    let arguments: Vec<String> = arguments.collect();
    let (help, run): (&str, Task) = match task.as_deref() {
        Some("test") => (test::HELP, test::run),
        Some("matrix") => (matrix::HELP, matrix::run),
        Some("ci") => (ci::HELP, ci::run),
        Some("tools") => (tools::HELP, tools::run),
        Some("deny") => (deny::HELP, deny::run),
        Some("rooms") => (rooms::HELP, rooms::run),
        Some("schemas") => (schemas::HELP, schemas::run),
        Some("bench") => (bench::HELP, bench::run),
        Some("fuzz") => (fuzz::HELP, fuzz::run),
        None | Some("help" | "--help" | "-h") => {
            print!("{HELP}");
            return ExitCode::SUCCESS;
        }
        Some(other) => {
            eprintln!("error: there is no task {other:?}\n\n{HELP}");
            return ExitCode::from(2);
        }
    };
    let own = arguments.iter().take_while(|a| *a != "--");
    if own.into_iter().any(|a| a == "--help" || a == "-h") {
        print!("{help}");
        return ExitCode::SUCCESS;
    }
    run(&arguments).unwrap_or_else(|failure| {
        eprintln!("error: {failure}");
        ExitCode::FAILURE
    })
}
