//! What can go wrong with an instance, in the words that people see.

use std::collections::BTreeSet;
use std::io;
use std::path::Path;
use std::time::Duration;

use daybook_events::spec::PinnedImage;
use daybook_secrets::SecretError;

use super::command::NoCommand;
use super::probe::NotReady;
use super::process::Exit;
use crate::image::ImageError;
use crate::target::{Cause, Problem};

/// With what the cause usually comes of and what helps where instances are processes of this machine:
/// there are no nodes, limits, pull secrets or service accounts.
fn problem(cause: Cause, message: String, remedy: impl Into<String>, transient: bool) -> Problem {
    let mut problem = match cause {
        // Nothing in them is of containers.
        Cause::CrashLoopBackOff
        | Cause::SecretMissing
        | Cause::SecretsUnusable
        | Cause::PortInUse => return Problem::new(cause, message, remedy, transient),
        _ => Problem::other(cause.as_str(), message, remedy, transient),
    };
    // Of the others the message says all that there is to be known.
    if cause == Cause::ReadinessProbeFailed {
        problem.likely_causes = LIKELY_UNREADY.map(str::to_owned).into();
    }
    problem
}

/// What it usually comes of that a process does not become ready, or no longer is.
const LIKELY_UNREADY: [&str; 3] = [
    "The application listens on another port than that in its variable PORT.",
    "The health path does not exist, or answers with an error.",
    "The application still waits for something that it needs, such as a database.",
];

pub(super) fn image(image: &PinnedImage, error: &ImageError, hopeless: bool) -> Problem {
    let why = daybook_events::with_causes(error);
    let message = format!("the image {image} cannot be prepared: {why}");
    let transient = error.is_retryable() && !hopeless;
    problem(Cause::ImagePullBackOff, message, error.remedy(), transient)
}

pub(super) fn secrets(error: &SecretError, hopeless: bool) -> Problem {
    let transient = error.is_retryable() && !hopeless;
    let mut remedy = error.remedy().to_owned();
    remedy[..1].make_ascii_uppercase();
    let reason = match error {
        SecretError::Missing { .. } => Cause::SecretMissing,
        _ => Cause::SecretsUnusable,
    };
    problem(reason, error.to_line(), format!("{remedy}."), transient)
}

pub(super) fn start(error: &NoCommand) -> Problem {
    let remedy = match error {
        NoCommand::Empty => "Name a command in the service or an entrypoint in the image.",
        NoCommand::NotFound(_) => {
            "Correct the command, put the program into the image, or install it on this machine: \
             a local cluster runs commands without a container."
        }
        NoCommand::NotExecutable(_) => "Make the file executable and build the image again.",
        NoCommand::Folder { .. } => "Correct the working folder of the image.",
    };
    problem(Cause::StartError, error.to_string(), remedy, false)
}

pub(super) fn spawn(program: &Path, error: &io::Error) -> Problem {
    let program = program.display();
    let (hint, remedy) = match error.kind() {
        io::ErrorKind::NotFound => (
            " (the interpreter in its first line, or its loader, does not exist)",
            "Install what its first line names, or build a static binary.",
        ),
        io::ErrorKind::PermissionDenied => ("", "Check its permissions and those of its folder."),
        _ => ("", "Check that it is a program for this machine."),
    };
    let message = format!("{program} cannot be started: {error}{hint}");
    problem(Cause::StartError, message, remedy, false)
}

pub(super) fn folder(dir: &Path, error: &io::Error) -> Problem {
    problem(
        Cause::StartError,
        format!("{} cannot be written: {error}", dir.display()),
        "Check free space and permissions of the folder.",
        true,
    )
}

pub(super) fn no_port() -> Problem {
    problem(
        Cause::PortInUse,
        "there is no free port left for an instance".into(),
        "Stop something that listens on ports 20000 to 29999.",
        true,
    )
}

pub(super) fn no_port_number(value: &str) -> Problem {
    problem(
        Cause::StartError,
        format!("PORT is set to {value:?}, which is no port"),
        "Remove PORT from the service's variables, or set it to a number from 1 to 65535.",
        false,
    )
}

pub(super) fn port_in_use(port: u16, hopeless: bool) -> Problem {
    problem(
        Cause::PortInUse,
        format!("the service insists on port {port}, which another process has"),
        "Remove PORT from the service's variables so that each instance gets a port of its own, \
         or stop the other process.",
        !hopeless,
    )
}

pub(super) fn fixed_port_in_use(exit: Exit, last: &str, hopeless: bool) -> Problem {
    problem(
        Cause::PortInUse,
        format!("the process {exit} because the port that it insists on is taken: {last}"),
        "Let the application listen on the port in its PORT variable: on a local cluster each \
         instance has one of its own.",
        !hopeless,
    )
}

pub(super) fn crashed(exit: Exit, last: &str, pause: Duration, hopeless: bool) -> Problem {
    let said = if last.is_empty() {
        "it printed nothing".to_owned()
    } else {
        format!("its last output: {last}")
    };
    let seconds = pause.as_secs_f32();
    let remedy = match exit {
        Exit::Code(0) => "The command must keep running; a service that ends is started again.",
        Exit::Code(126 | 127) => "The command, or one that it calls, cannot be run: check it.",
        Exit::Signal(9) => {
            "It was killed from outside, perhaps because memory ran out: check the system's log."
        }
        _ => "Read the log, correct the application or its variables, and deploy again.",
    };
    problem(
        Cause::CrashLoopBackOff,
        format!("the process {exit}, next start in {seconds} s; {said}"),
        remedy,
        !hopeless,
    )
}

pub(super) fn no_longer_ready(why: &NotReady) -> Problem {
    problem(
        Cause::ReadinessProbeFailed,
        format!("it was ready and no longer is: {why}"),
        "Read its log; it receives requests again as soon as it answers.",
        true,
    )
}

pub(super) fn never_ready(
    seconds: u32,
    why: Option<&NotReady>,
    port: u16,
    listening: &BTreeSet<u16>,
) -> Problem {
    let why = why.map_or_else(|| "it was not asked yet".to_owned(), ToString::to_string);
    let mut message = format!("it did not become ready within {seconds} s: {why}");
    let mut remedy = "Read its log; correct the application or the health path, or raise the \
                      deadline, and deploy again.";
    if !listening.is_empty() && !listening.contains(&port) {
        let ports: Vec<String> = listening.iter().map(u16::to_string).collect();
        let ports = ports.join(", ");
        message = format!("{message}; it listens on port {ports}, not on {port} as PORT says");
        remedy = "Let the application listen on the port in its PORT variable.";
    }
    problem(Cause::ReadinessProbeFailed, message, remedy, false)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_is_said_of_what_only_clusters_of_containers_have() {
        let said = |cause| {
            let problem = problem(cause, "It is so.".to_owned(), "Do this.", true);
            assert_eq!(problem.reason, cause.as_str());
            assert_eq!(problem.remedies[0], problem.remedy);
            let all = problem.likely_causes.iter().chain(&problem.remedies);
            all.cloned().collect::<Vec<_>>().join(" ")
        };
        for cause in Cause::ALL {
            let said = said(cause);
            for word in ["service account", "pull secret", "node", "limit", "kubectl"] {
                assert!(!said.contains(word), "{cause}: {said}");
            }
        }
        assert!(said(Cause::ReadinessProbeFailed).contains("PORT"));
        assert!(said(Cause::CrashLoopBackOff).contains("daybook logs"));
        assert_eq!(said(Cause::ImagePullBackOff), "Do this.");
    }
}
