//! `cargo xtask test`.

use std::process::{Command, ExitCode, ExitStatus};

use crate::Failure;
use crate::command::{WHOLE, cargo, exit_code, status, status_and_lines};
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
interpreter and DAYBOOK_JUDGES_NODE a folder with what judges interfaces, DAYBOOK_ASYNCAPI_SCHEMA a
file, DAYBOOK_TOOLS the cache, DAYBOOK_LEFT_OUT the file for what is left out.
";

/// Most lines of what one failed test said that are told again.
const SAID_MAX: usize = 60;

pub(crate) fn run(arguments: &[String]) -> Result<ExitCode, Failure> {
    test(arguments, everything_is_required(), status).map(exit_code)
}

/// Runs all tests, with nothing left out. The error names those that failed, in its first line, and
/// then tells what they said: a log of CI is long, and often only its end is kept.
pub(crate) fn all() -> Result<(), Failure> {
    let mut lines = Vec::new();
    let tested = test(&[], true, |command| {
        let (status, said) = status_and_lines(command)?;
        lines = said;
        Ok(status)
    })?;
    if tested.success() {
        return Ok(());
    }
    Err(failures(&lines).into())
}

/// What there is to say of the tests that failed, given all that `cargo test` printed.
fn failures(lines: &[String]) -> String {
    let mut names: Vec<&str> = Vec::new();
    let mut told: Vec<String> = Vec::new();
    // Of each program with failures: blocks of what they said, and then a list of their names.
    let mut rest = lines.iter().map(String::as_str);
    while let Some(line) = rest.next() {
        if line != "failures:" {
            continue;
        }
        let mut block: Vec<&str> = Vec::new();
        let mut said = false;
        for line in rest.by_ref().take_while(|l| !l.starts_with("test result:")) {
            if line.starts_with("---- ") || line == "failures:" {
                told.extend(shortened(&block));
                block.clear();
                said |= line == "failures:";
            }
            match line.strip_prefix("    ") {
                Some(name) if said => names.push(name),
                _ if said => (),
                _ => block.push(line),
            }
        }
        told.extend(shortened(&block));
    }
    let named = match names.as_slice() {
        [] => "tests failed, or could not be compiled".to_owned(),
        names => format!("{} failed: {}", names.len(), names.join(", ")),
    };
    format!("{named}\n{}", told.join("\n"))
}

/// The first and the last lines of a block that is too long.
fn shortened(block: &[&str]) -> Vec<String> {
    let owned = |lines: &[&str]| lines.iter().map(|l| (*l).to_owned()).collect::<Vec<_>>();
    if block.len() <= SAID_MAX {
        return owned(block);
    }
    let (first, rest) = block.split_at(SAID_MAX / 2);
    let last = rest.get(rest.len() - SAID_MAX / 2..).unwrap_or(rest);
    let mut short = owned(first);
    short.push(format!("[{} lines]", rest.len() - last.len()));
    short.extend(owned(last));
    short
}

/// Runs tests, as `ran` runs a command. Where everything is required, it is an error to leave
/// anything out.
fn test(
    arguments: &[String],
    everything_is_required: bool,
    ran: impl FnOnce(&mut Command) -> Result<ExitStatus, Failure>,
) -> Result<ExitStatus, Failure> {
    let left_out = LeftOut::new()?;
    let servers = servers::find_all(&left_out)?;
    let mut test = cargo();
    test.args(["test", "--no-fail-fast"]);
    if !names_a_package(arguments) {
        // The benchmarks have tests of their own.
        test.args(WHOLE);
    }
    test.args(arguments)
        .envs(servers)
        .env("DAYBOOK_LEFT_OUT", left_out.file());
    if everything_is_required {
        test.env("DAYBOOK_REQUIRE", "all");
    }
    let tested = ran(&mut test)?;
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
    use super::{failures, names_a_package};

    fn names(arguments: &[&str]) -> bool {
        names_a_package(
            &arguments
                .iter()
                .map(|a| (*a).to_owned())
                .collect::<Vec<_>>(),
        )
    }

    #[test]
    fn failures_are_named_first_and_then_told() {
        let said = "\
running 3 tests
test one ... ok
test two ... FAILED

failures:

---- two stdout ----

thread 'two' panicked at src/lib.rs:1:2:
failures: none, it says

failures:
    two

test result: FAILED. 1 passed; 1 failed
running 1 test
test three::four ... FAILED

failures:

---- three::four stdout ----
too long

failures:
    three::four

test result: FAILED. 0 passed; 1 failed";
        let lines: Vec<String> = said.lines().map(str::to_owned).collect();
        let told = failures(&lines);
        assert!(told.starts_with("2 failed: two, three::four\n"), "{told}");
        assert!(told.contains("failures: none, it says"), "{told}");
        assert!(told.contains("too long"), "{told}");
        assert!(!told.contains("test one"), "{told}");
        assert!(failures(&[]).starts_with("tests failed, or"));
    }

    #[test]
    fn the_whole_workspace_is_tested_unless_a_package_is_named() {
        assert!(!names(&["conflict"]));
        assert!(!names(&["--", "-p"]));
        assert!(names(&["-p", "daybook-store"]));
        assert!(names(&["--package=daybook-store"]));
    }
}
