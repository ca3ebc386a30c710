//! What a run had to leave out on this machine, and why. Tests add to the same list, by appending
//! lines to the file that `DAYBOOK_LEFT_OUT` names.

use std::fs::{self, OpenOptions};
use std::io::Write as _;
use std::path::{Path, PathBuf};

use crate::Failure;
use crate::command::root;

/// The list of one run.
pub(crate) struct LeftOut {
    file: PathBuf,
}

impl LeftOut {
    /// An empty list: in the file that `DAYBOOK_LEFT_OUT` names, or else in the target folder.
    pub(crate) fn new() -> Result<Self, Failure> {
        let file = std::env::var_os("DAYBOOK_LEFT_OUT")
            .map_or_else(|| root().join("target/xtask/left-out.txt"), PathBuf::from);
        if let Some(folder) = file.parent() {
            fs::create_dir_all(folder)?;
        }
        fs::write(&file, "")?;
        Ok(Self { file })
    }

    /// The file, for `DAYBOOK_LEFT_OUT` of a child.
    pub(crate) fn file(&self) -> &Path {
        &self.file
    }

    /// Adds one thing, with the reason.
    pub(crate) fn add(&self, what: &str, why: &str) -> Result<(), Failure> {
        let mut file = OpenOptions::new().append(true).open(&self.file)?;
        file.write_all(format!("{what}: {why}\n").as_bytes())?;
        Ok(())
    }

    /// Everything that was left out, each thing once.
    pub(crate) fn all(&self) -> Result<Vec<String>, Failure> {
        let mut all: Vec<String> = fs::read_to_string(&self.file)?
            .lines()
            .filter(|line| !line.trim().is_empty())
            .map(str::to_owned)
            .collect();
        all.sort();
        all.dedup();
        Ok(all)
    }

    /// Prints what was left out, loudly, and says whether it was nothing.
    pub(crate) fn report(&self) -> Result<bool, Failure> {
        let all = self.all()?;
        if all.is_empty() {
            eprintln!("\nNothing was left out on this machine.");
            return Ok(true);
        }
        eprintln!("\nLEFT OUT on this machine ({}):", all.len());
        for line in &all {
            eprintln!("  - {line}");
        }
        Ok(false)
    }
}

/// Whether nothing may be left out: `DAYBOOK_REQUIRE=all`, or any CI, unless `DAYBOOK_REQUIRE`
/// says otherwise.
pub(crate) fn everything_is_required() -> bool {
    match std::env::var("DAYBOOK_REQUIRE") {
        Ok(value) => value == "all",
        Err(_) => std::env::var("CI").is_ok_and(|v| v == "true" || v == "1"),
    }
}
