//! Running `helm`: with a deadline, a bound on what it says, and none of this process's credentials.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncReadExt as _};

use crate::builder::command::{command, find_program, is_executable, pass_on};
use crate::ports::StepError;

/// How long a call may take.
const WITHIN: Duration = Duration::from_secs(120);
/// The most that is read of what it prints, in bytes.
const OUTPUT_MAX: usize = 8 << 20;
/// The most that is read of what it complains about, in bytes.
const COMPLAINT_MAX: usize = 16 << 10;
/// How much of a complaint is shown, in characters.
const SHOWN_MAX: usize = 500;

/// Where it finds what people have logged in to.
const ITS_OWN: &[&str] = &[
    "HELM_CONFIG_HOME",
    "HELM_REGISTRY_CONFIG",
    "XDG_CONFIG_HOME",
    "DOCKER_CONFIG",
];

/// The program, and where it keeps what it needs for a while.
pub(super) struct Helm {
    program: PathBuf,
    scratch: PathBuf,
}

/// What a call came to.
pub(super) struct Said {
    /// Whether it did what it was asked.
    pub(super) worked: bool,
    /// What it printed.
    pub(super) output: Vec<u8>,
    /// What it complained about, in one line.
    pub(super) complaint: String,
}

impl Helm {
    /// The program that is named, or else that of `DAYBOOK_HELM` or on the `PATH`.
    pub(super) fn find(named: Option<&Path>, scratch: &Path) -> Result<Self, StepError> {
        let set = || std::env::var_os("DAYBOOK_HELM").map(PathBuf::from);
        let named = named.map(Path::to_owned).or_else(set);
        let program = match &named {
            Some(named) => Some(named.clone()).filter(|named| is_executable(named)),
            None => find_program("helm"),
        };
        let program = program.ok_or_else(|| {
            let where_not = match named {
                Some(named) => format!("{} is no program", named.display()),
                None => "there is none on the PATH".to_owned(),
            };
            StepError::fatal(
                "helm_missing",
                format!("charts are rendered with the program helm, and {where_not}"),
                "install helm 3.8 or newer (https://helm.sh/docs/intro/install) where Daybook's \
                 workers run, or say where it is with the variable DAYBOOK_HELM; then deploy again",
            )
        })?;
        Ok(Self {
            program,
            scratch: scratch.to_owned(),
        })
    }

    /// Calls it.
    pub(super) async fn call<A: AsRef<OsStr>>(
        &self,
        arguments: impl IntoIterator<Item = A>,
    ) -> Result<Said, StepError> {
        let mut helm = command(&self.program);
        pass_on(&mut helm, ITS_OWN);
        helm.args(arguments)
            .env("HELM_CACHE_HOME", self.scratch.join("cache"))
            .env("HELM_DATA_HOME", self.scratch.join("data"))
            .current_dir(&self.scratch)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .kill_on_drop(true);
        let mut child = helm.spawn().map_err(|e| not_run(&e))?;
        let (output, complaint) = (child.stdout.take(), child.stderr.take());
        let done = async {
            let (output, complaint) =
                tokio::try_join!(read(output, OUTPUT_MAX), read(complaint, COMPLAINT_MAX))?;
            // What it prints beyond the bound it prints to nobody.
            let status = child.wait().await?;
            Ok::<_, std::io::Error>((status, output, complaint))
        };
        let done = tokio::time::timeout(WITHIN, done).await.map_err(|_| {
            let seconds = WITHIN.as_secs();
            StepError::passing(
                "helm_slow",
                format!("helm was not done within {seconds} s"),
                "check that the repository of the chart answers",
            )
        })?;
        let (status, output, complaint) = done.map_err(|e| not_run(&e))?;
        if output.len() > OUTPUT_MAX {
            return Err(too_large(&format!(
                "more than {OUTPUT_MAX} bytes of objects"
            )));
        }
        Ok(Said {
            worked: status.success(),
            output,
            complaint: one_line(&complaint),
        })
    }
}

/// Why a chart is not taken for what it makes.
pub(super) fn too_large(what: &str) -> StepError {
    StepError::fatal(
        "chart_too_large",
        format!("the chart has {what}"),
        "turn off what is not needed in `run.chart_values` of the service",
    )
}

fn not_run(error: &std::io::Error) -> StepError {
    StepError::passing(
        "helm_failed",
        format!("helm cannot be run: {error}"),
        "check the program that DAYBOOK_HELM or the PATH names",
    )
}

/// What is printed, up to one byte more than these. The rest is read and thrown away.
async fn read(from: Option<impl AsyncRead + Unpin>, most: usize) -> std::io::Result<Vec<u8>> {
    let mut all = Vec::new();
    let Some(mut from) = from else {
        return Ok(all);
    };
    let bound = u64::try_from(most).unwrap_or(u64::MAX).saturating_add(1);
    (&mut from).take(bound).read_to_end(&mut all).await?;
    tokio::io::copy(&mut from, &mut tokio::io::sink()).await?;
    Ok(all)
}

/// The last thing that was complained about, without what a terminal would take for a command.
fn one_line(complaint: &[u8]) -> String {
    let text = String::from_utf8_lossy(complaint);
    let mut lines = text.lines().map(str::trim).filter(|line| !line.is_empty());
    let mut errors = lines.clone().filter(|line| line.starts_with("Error:"));
    let line = errors.next_back().or_else(|| lines.next_back());
    let line = line.unwrap_or("it does not say why");
    let line = line.strip_prefix("Error:").unwrap_or(line).trim();
    let shown = line.chars().filter(|c| !c.is_control());
    shown.take(SHOWN_MAX).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_complaint_is_one_line_of_plain_text() {
        let said = one_line(b"level=WARN x\nError: chart \"web\" \x1b[1mmatching\n\n");
        assert_eq!(said, "chart \"web\" [1mmatching");
        assert_eq!(one_line(b"\n"), "it does not say why");
        assert_eq!(one_line(b"first\nlast\n"), "last");
        assert_eq!(one_line("x".repeat(9000).as_bytes()).len(), SHOWN_MAX);
    }

    #[test]
    fn a_program_that_is_not_there_is_said_to_be_missing() {
        let dir = tempfile::tempdir().unwrap();
        let missing = dir.path().join("helm");
        let error = Helm::find(Some(&missing), dir.path()).err().unwrap();
        assert_eq!(error.code, "helm_missing");
        assert!(error.remedy.contains("DAYBOOK_HELM"), "{error:?}");
    }

    #[tokio::test]
    async fn what_is_printed_is_bounded() {
        let dir = tempfile::tempdir().unwrap();
        let shell = Path::new("/bin/sh");
        let helm = Helm::find(Some(shell), dir.path()).unwrap();
        let said = helm
            .call(["-c", "echo out; echo Error: no >&2; exit 3"])
            .await;
        let said = said.unwrap();
        assert!(!said.worked);
        assert_eq!(
            (said.output.as_slice(), said.complaint.as_str()),
            (&b"out\n"[..], "no")
        );
        let endless = format!("head -c {} /dev/zero", OUTPUT_MAX + 100_000);
        let said = helm.call(["-c", endless.as_str()]).await;
        assert_eq!(said.err().unwrap().code, "chart_too_large");
    }
}
