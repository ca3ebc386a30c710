//! Running `helm`: with a deadline, bounds on what it says and on its memory, and none of this
//! process's credentials.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncReadExt as _};

use super::egress::Egress;
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
/// The most memory that it may have, in bytes: a chart of a few lines can ask for any amount of it.
#[cfg(target_os = "linux")]
const MEMORY_MAX: u64 = 4 << 30;

/// The first version that is used: those before follow what a chart's schema refers to, wherever that is
/// (CVE-2025-55199).
const OLDEST: [u64; 3] = [3, 18, 5];

/// The ways out that it is told of otherwise.
const PROXIES: [&str; 4] = ["HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy"];

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
        // It is run in another folder than that which a path is relative to.
        let program = program.map(|program| std::path::absolute(&program).unwrap_or(program));
        let program = program.ok_or_else(|| {
            let where_not = match named {
                Some(named) => format!("{} is no program", named.display()),
                None => "there is none on the PATH".to_owned(),
            };
            StepError::fatal(
                "helm_missing",
                format!("charts are rendered with the program helm, and {where_not}"),
                "install helm 3.18.5 or newer (https://helm.sh/docs/intro/install) where Daybook's \
                 workers run, or say where it is with the variable DAYBOOK_HELM; then deploy again",
            )
        })?;
        Ok(Self {
            program,
            scratch: scratch.to_owned(),
        })
    }

    /// Refuses a version that is too old.
    pub(super) async fn check_version(&self) -> Result<(), StepError> {
        let said = self.call(["version", "--short"]).await?;
        let text = String::from_utf8_lossy(&said.output);
        let text = text.trim();
        if said.worked && version(text).is_some_and(|version| version >= OLDEST) {
            return Ok(());
        }
        let shown: String = text.chars().filter(|c| !c.is_control()).take(60).collect();
        let [major, minor, patch] = OLDEST;
        Err(StepError::fatal(
            "helm_too_old",
            format!(
                "{} says that its version is {shown:?}, and charts are rendered with {major}.{minor}.{patch} \
                 or newer",
                self.program.display()
            ),
            "install a newer helm (https://helm.sh/docs/intro/install) where Daybook's workers run, or \
             name one with the variable DAYBOOK_HELM; then deploy again",
        ))
    }

    /// Calls it.
    pub(super) async fn call<A: AsRef<OsStr>>(
        &self,
        arguments: impl IntoIterator<Item = A>,
    ) -> Result<Said, StepError> {
        self.run(arguments, None).await
    }

    /// Calls it, with this as its way out if there is one.
    pub(super) async fn run<A: AsRef<OsStr>>(
        &self,
        arguments: impl IntoIterator<Item = A>,
        egress: Option<&Egress>,
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
        if let Some(egress) = egress {
            helm.env_remove("NO_PROXY").env_remove("no_proxy");
            for proxy in PROXIES {
                helm.env(proxy, egress.url());
            }
        }
        let mut child = helm.spawn().map_err(|e| not_run(&e))?;
        bound_memory(&child).map_err(|e| not_run(&e))?;
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

/// `v3.18.5+gb78692c`: what was built without a patch has none.
fn version(text: &str) -> Option<[u64; 3]> {
    let text = text.trim_start_matches('v');
    let core = text.split(['+', '-']).next()?;
    let mut numbers = core.split('.').map(|number| number.parse().ok());
    let (major, minor) = (numbers.next()??, numbers.next()??);
    let patch = numbers.next().unwrap_or(Some(0))?;
    Some([major, minor, patch])
}

/// Bounds the memory of what was just started, and of whatever it starts.
#[cfg(target_os = "linux")]
fn bound_memory(child: &tokio::process::Child) -> std::io::Result<()> {
    use rustix::io::Errno;
    use rustix::process::{Pid, Resource, Rlimit, prlimit};
    let id = child.id().and_then(|id| i32::try_from(id).ok());
    let Some(process) = id.and_then(Pid::from_raw) else {
        return Ok(());
    };
    let bound = Rlimit {
        current: Some(MEMORY_MAX),
        maximum: Some(MEMORY_MAX),
    };
    match prlimit(Some(process), Resource::As, bound) {
        // What has ended already needs none, and who may not set this one has a lower one.
        Ok(_) | Err(Errno::SRCH | Errno::PERM) => Ok(()),
        Err(e) => Err(e.into()),
    }
}

/// Other systems have no way to bound another process.
#[cfg(not(target_os = "linux"))]
fn bound_memory(_: &tokio::process::Child) -> std::io::Result<()> {
    Ok(())
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

    #[test]
    fn a_version_is_read_as_helm_says_it() {
        for (text, expected) in [
            ("v3.18.5+gb78692c", Some([3, 18, 5])),
            ("v4.3.1", Some([4, 3, 1])),
            ("v4.3", Some([4, 3, 0])),
            ("v4.0.0-rc.1", Some([4, 0, 0])),
            ("Client: v2.17.0+ga690bad", None),
            ("", None),
        ] {
            assert_eq!(version(text), expected, "{text}");
        }
    }

    #[cfg(target_os = "linux")]
    #[tokio::test]
    async fn its_memory_is_bounded() {
        let dir = tempfile::tempdir().unwrap();
        let helm = Helm::find(Some(Path::new("/bin/sh")), dir.path()).unwrap();
        // It may come to ask before the bound is there. Without one, the comparison fails.
        let most = MEMORY_MAX >> 10;
        let asks =
            format!("until [ \"$(ulimit -v)\" -le {most} ]; do sleep 0.01; done; echo bound");
        let said = helm.call(["-c", asks.as_str()]).await.unwrap();
        assert_eq!(said.output, b"bound\n");
    }

    #[tokio::test]
    async fn a_version_with_a_known_hole_is_not_used() {
        let dir = tempfile::tempdir().unwrap();
        for (version, taken) in [("v3.18.4+gd80839c", false), ("v4.3.1", true)] {
            // The shell takes the first word that it is called with for a script.
            std::fs::write(dir.path().join("version"), format!("echo {version}\n")).unwrap();
            let helm = Helm::find(Some(Path::new("/bin/sh")), dir.path()).unwrap();
            let checked = helm.check_version().await;
            assert_eq!(checked.is_ok(), taken, "{checked:?}");
            if let Err(e) = checked {
                assert_eq!(e.code, "helm_too_old");
                assert!(e.message.contains("v3.18.4") && e.remedy.contains("DAYBOOK_HELM"));
            }
        }
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
