//! Asking a person before something that cannot be undone.

use std::io::{self, BufRead, IsTerminal};

use crate::exit::{Code, Failure};

/// Has the person at the terminal type `name`. `what` says what is about to happen, as in
/// "all secrets of the project shop are erased".
///
/// # Errors
/// If something else is typed, or nobody is there to ask.
pub fn confirm(what: &str, name: &str) -> Result<(), Failure> {
    let stdin = io::stdin();
    if !stdin.is_terminal() {
        return Err(Failure::new(
            Code::Usage,
            "not_confirmed",
            format!("{what}, which cannot be undone, and there is nobody to ask"),
        )
        .hint("confirm it with --yes"));
    }
    eprint!("{what}. This cannot be undone; type {name} to go on: ");
    let mut answer = String::new();
    stdin.lock().read_line(&mut answer)?;
    if answer.trim() == name {
        return Ok(());
    }
    Err(Failure::new(
        Code::Refused,
        "not_confirmed",
        format!("nothing was done: that is not {name}"),
    ))
}
