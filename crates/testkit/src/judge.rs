//! `tlog-judge`, which checks transparency logs with nothing of Daybook's: see `tools/judges`.

use std::path::{Path, PathBuf};
use std::process::Command;

/// The program, found in `DAYBOOK_TLOG_JUDGE` or where `cargo xtask tools` puts it.
#[derive(Debug, Clone)]
pub struct TlogJudge {
    program: PathBuf,
    origin: String,
    key: String,
}

/// What it said: that all is well, or what is wrong.
pub type Verdict = Result<String, String>;

impl TlogJudge {
    /// A judge of the log with this origin and verifier key; `None` if there is no such program.
    pub fn find(origin: &str, key: &str) -> Option<Self> {
        let program = match std::env::var_os("DAYBOOK_TLOG_JUDGE") {
            Some(program) => program.into(),
            None => crate::nats::tools_folder()?.join("bin/tlog-judge"),
        };
        program.is_file().then(|| Self {
            program,
            origin: origin.to_owned(),
            key: key.to_owned(),
        })
    }

    /// Judges a whole log: a folder, or a URL.
    ///
    /// # Panics
    /// If the program cannot be run.
    pub fn log(&self, at: &str) -> Verdict {
        self.ask(&[("-log", at.as_ref())])
    }

    /// Judges a tlog-proof file with the bytes of its entry.
    ///
    /// # Panics
    /// If the program cannot be run.
    pub fn inclusion(&self, proof: &Path, entry: &Path) -> Verdict {
        self.ask(&[("-proof", proof), ("-entry", entry)])
    }

    /// Judges whether one checkpoint extends another. The proof has one hash in base64 a line.
    ///
    /// # Panics
    /// If the program cannot be run.
    pub fn consistency(&self, old: &Path, new: &Path, proof: &Path) -> Verdict {
        self.ask(&[("-old", old), ("-new", new), ("-consistency", proof)])
    }

    fn ask(&self, question: &[(&str, &Path)]) -> Verdict {
        let mut command = Command::new(&self.program);
        command.args(["-origin", &self.origin, "-key", &self.key]);
        for (flag, value) in question {
            command.arg(flag).arg(value);
        }
        let output = command.output().expect("the judge can be run");
        let said = String::from_utf8_lossy(&output.stdout).trim().to_owned();
        match said.strip_prefix("ok: ") {
            Some(verdict) if output.status.success() => Ok(verdict.to_owned()),
            _ => Err(said + &String::from_utf8_lossy(&output.stderr)),
        }
    }
}
