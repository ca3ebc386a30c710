//! `cargo xtask matrix`: the whole scenario once for each failpoint, killed there.

use std::process::{Command, ExitCode};

use crate::Failure;
use crate::command::{WHOLE, cargo, exit_code, run as run_command, status, status_and_lines};

pub(crate) const HELP: &str = "\
Kill the binary at each failpoint, and check that nothing is lost, doubled or left behind

Usage: cargo xtask matrix [--all] [--nats] [--remote] [PLACE]...

  cargo xtask matrix               each place once, when there is traffic to disturb; CI runs this,
                                   and --remote with gitops.push and gitops.commit
  cargo xtask matrix --all         each place also when it is reached for the first time
  cargo xtask matrix --nats        on JetStream, with the workers in processes of their own
  cargo xtask matrix --remote gitops.push    with a GitOps remote: before and after each push
  cargo xtask matrix image.push    places with `image.push` in their name

An undisturbed run of the scenario (two deployments, a switch, the way back, a stop, a termination)
finds the places; ARCHITECTURE.md says how to add one. The table of places with what came of each is
printed; it is a failure if one run does not end where the undisturbed one ended.
";

pub(crate) fn run(arguments: &[String]) -> Result<ExitCode, Failure> {
    let unknown = arguments
        .iter()
        .find(|a| a.starts_with('-') && !["--all", "--nats", "--remote"].contains(&a.as_str()));
    if let Some(unknown) = unknown {
        return Err(format!("unknown argument {unknown:?}; see --help").into());
    }
    let ended = status(&mut play(arguments));
    restore()?;
    ended.map(exit_code)
}

/// All places once, and with a GitOps remote those of pushes and of what is pushed; it is an error
/// if one run fails, and the error tells which ones.
pub(crate) fn all() -> Result<(), Failure> {
    let with_remote = ["--remote", "gitops.push", "gitops.commit"].map(str::to_owned);
    let ended = [&[] as &[_], &with_remote].map(|a| status_and_lines(&mut play(a)));
    restore()?;
    for ended in ended {
        let (status, lines) = ended?;
        if !status.success() {
            // What went wrong is told after the table, in blocks of which each names its place.
            let table = |l: &String| l.contains(" ok ") || l.starts_with("undisturbed:");
            let told = lines.into_iter().filter(|l| !table(l)).collect::<Vec<_>>();
            return Err(format!("a crash was not survived\n{}", told.join("\n")).into());
        }
    }
    Ok(())
}

fn play(arguments: &[String]) -> Command {
    let mut test = cargo();
    test.arg("test")
        .args(WHOLE)
        .args(["--features", "daybook/failpoints"])
        .args(["--test", "matrix", "--"])
        .args(arguments);
    test
}

/// Where everybody looks for the binary is one again that cannot be made to die.
fn restore() -> Result<(), Failure> {
    run_command(
        cargo()
            .arg("test")
            .args(WHOLE)
            .args(["--no-run", "--test", "e2e"]),
    )
}
