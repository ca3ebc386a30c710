//! `cargo xtask test`.

use std::process::{ExitCode, ExitStatus};

use crate::Failure;
use crate::command::{cargo, exit_code, status};
use crate::left_out::{LeftOut, everything_is_required};
use crate::servers;

pub(crate) const HELP: &str = "\
Run all tests, after finding or installing the servers that they need

Usage: cargo xtask test [FILTER] [ARGUMENTS OF cargo test]

  cargo xtask test                       everything
  cargo xtask test conflict              tests with `conflict` in their name
  cargo xtask test -p daybook-store      one crate
  cargo xtask test -- --nocapture        with output

What is on PATH is used; what is not is installed from the system's packages (as root, or where
sudo does not ask), or built by Go at the version pinned in tools/. What cannot be had is left out,
and the last lines say so. With DAYBOOK_REQUIRE=all or CI=true that is a failure.

Environment: DAYBOOK_NATS_SERVER, DAYBOOK_NATS_SERVER_NEW, DAYBOOK_REGISTRY, DAYBOOK_SSHD,
DAYBOOK_BUILDAH and DAYBOOK_TLOG_JUDGE name the programs to use, DAYBOOK_JUDGES_PYTHON an
interpreter and DAYBOOK_JUDGES_NODE a folder with what judges interfaces, DAYBOOK_TOOLS the cache,
DAYBOOK_LEFT_OUT the file for what is left out.
";

pub(crate) fn run(arguments: &[String]) -> Result<ExitCode, Failure> {
    test(arguments, everything_is_required()).map(exit_code)
}

/// Runs tests. Where everything is required, it is an error to leave anything out.
pub(crate) fn test(
    arguments: &[String],
    everything_is_required: bool,
) -> Result<ExitStatus, Failure> {
    let left_out = LeftOut::new()?;
    let servers = servers::find_all(&left_out)?;
    let mut test = cargo();
    test.args(["test", "--no-fail-fast"]);
    if !names_a_package(arguments) {
        // The benchmarks have tests of their own.
        test.args(["--workspace", "--features", "daybook-testkit/bench"]);
    }
    test.args(arguments)
        .envs(servers)
        .env("DAYBOOK_LEFT_OUT", left_out.file());
    if everything_is_required {
        test.env("DAYBOOK_REQUIRE", "all");
    }
    let tested = status(&mut test)?;
    let nothing_left_out = left_out.report()?;
    if tested.success() && !nothing_left_out && everything_is_required {
        return Err("nothing may be left out here (DAYBOOK_REQUIRE=all, or CI=true)".into());
    }
    Ok(tested)
}

fn names_a_package(arguments: &[String]) -> bool {
    arguments
        .iter()
        .take_while(|a| *a != "--")
        .any(|a| a.starts_with("-p") || a.starts_with("--package") || a == "--workspace")
}

#[cfg(test)]
mod tests {
    use super::names_a_package;

    fn names(arguments: &[&str]) -> bool {
        names_a_package(
            &arguments
                .iter()
                .map(|a| (*a).to_owned())
                .collect::<Vec<_>>(),
        )
    }

    #[test]
    fn the_whole_workspace_is_tested_unless_a_package_is_named() {
        assert!(!names(&["conflict"]));
        assert!(!names(&["--", "-p"]));
        assert!(names(&["-p", "daybook-store"]));
        assert!(names(&["--package=daybook-store"]));
    }
}
