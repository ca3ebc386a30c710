//! Exit codes, and the one way in which errors reach a person.

use std::process::ExitCode;
use std::time::Duration;

use serde_json::json;

use crate::output;

/// What an exit code says. They are part of the interface and are listed in `daybook help`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Code {
    /// Done.
    Success = 0,
    /// Something failed that has no code of its own.
    Failure = 1,
    /// The command line is wrong.
    Usage = 2,
    /// The server cannot be reached.
    Unreachable = 3,
    /// There is no such thing.
    NotFound = 4,
    /// It is not possible in this state.
    Refused = 5,
    /// The deployment ended, but not well.
    DeploymentFailed = 6,
    /// The deployment was cancelled or superseded.
    DeploymentCancelled = 7,
    /// The ledger and what was derived from it differ.
    Mismatch = 8,
    /// The deployment runs in some of its clusters only.
    DeploymentPartial = 9,
}

impl From<Code> for ExitCode {
    fn from(code: Code) -> Self {
        Self::from(code as u8)
    }
}

/// An error as a person sees it: what, why, and the way out.
#[derive(Debug)]
pub struct Failure {
    /// The exit code.
    pub code: Code,
    /// A stable code for programs.
    pub kind: String,
    /// What happened.
    pub message: String,
    /// The way out, if there is one.
    pub hint: Option<String>,
    /// It may pass by itself, after this time.
    pub passes: Option<Duration>,
}

impl Failure {
    /// An error.
    pub fn new(code: Code, kind: &str, message: impl Into<String>) -> Self {
        Self {
            code,
            kind: kind.to_owned(),
            message: message.into(),
            hint: None,
            passes: None,
        }
    }

    /// The same, which may pass by itself after this time.
    pub fn passing(mut self, after: Duration) -> Self {
        self.passes = Some(after);
        self
    }

    /// The same with a way out.
    pub fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }

    /// Prints it to standard error, in the form that was asked for.
    pub fn print(&self) {
        if output::is_json() {
            eprintln!(
                "{}",
                json!({ "error": { "code": self.kind, "message": self.message, "hint": self.hint } })
            );
            return;
        }
        let style = output::style();
        eprintln!("{} {}", style.error("error:"), self.message);
        if let Some(hint) = &self.hint {
            eprintln!("{} {hint}", style.dim("hint: "));
        }
    }
}

impl From<std::io::Error> for Failure {
    fn from(e: std::io::Error) -> Self {
        Self::new(Code::Failure, "io", e.to_string())
    }
}
