//! Commands whose output is passed on while they run, and that can be ended with everything that
//! they started.

use std::collections::VecDeque;
use std::ffi::{OsStr, OsString};
use std::io;
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process_group};
use tokio::io::{AsyncRead, AsyncReadExt as _};
use tokio::net::unix::pipe;
use tokio::process::Command;
use tokio_util::sync::CancellationToken;

use crate::output::{LineSender, MAX_LINE};

/// How long a cancelled command may take to end by itself before it is killed.
const GRACE: Duration = Duration::from_secs(5);

/// How long output is waited for after the command has ended, if a process that left its group
/// keeps the pipe open.
const STRAGGLERS: Duration = Duration::from_secs(1);

/// How many of the last lines an error shows.
const TAIL: usize = 20;

/// The variables that a build command is given from the worker's own environment.
const PASSED_ON: &[&str] = &[
    "PATH",
    "HOME",
    "USER",
    "LOGNAME",
    "SHELL",
    "LANG",
    "LC_ALL",
    "TZ",
    "TMPDIR",
    "XDG_CACHE_HOME",
    "XDG_RUNTIME_DIR",
    "CARGO_HOME",
    "RUSTUP_HOME",
    "RUSTUP_TOOLCHAIN",
    "GOPATH",
    "GOCACHE",
    "GOMODCACHE",
    "GOPROXY",
    "GOTOOLCHAIN",
    "PYENV_ROOT",
    "NVM_DIR",
    "JAVA_HOME",
    "HTTP_PROXY",
    "HTTPS_PROXY",
    "NO_PROXY",
    "http_proxy",
    "https_proxy",
    "no_proxy",
    "SSL_CERT_FILE",
    "SSL_CERT_DIR",
];

/// A command that ended by itself.
#[derive(Debug)]
pub struct Ended {
    /// How it ended.
    pub status: ExitStatus,
    /// The last lines that it printed.
    pub tail: Vec<String>,
}

impl Ended {
    /// How it ended, in words: "exited with 1", "was killed by signal 9".
    pub fn how(&self) -> String {
        use std::os::unix::process::ExitStatusExt as _;
        match (self.status.code(), self.status.signal()) {
            (Some(code), _) => format!("exited with {code}"),
            (None, Some(signal)) => format!("was killed by signal {signal}"),
            (None, None) => "ended".into(),
        }
    }
}

/// Why a command could not be run to its end.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    /// There is no such program.
    #[error("the program was not found")]
    NotFound,
    /// The system refused.
    #[error("the command could not be run")]
    Io(#[from] io::Error),
    /// It was told to stop.
    #[error("the command was cancelled")]
    Cancelled,
}

/// A command with the few variables of this process that a build needs (`PATH`, `HOME`, locale,
/// proxies, where toolchains are); all others stay away from it, as they may hold credentials.
pub fn command(program: impl AsRef<OsStr>) -> Command {
    let mut command = Command::new(program);
    command.env_clear();
    pass_on(&mut command, PASSED_ON);
    command
}

/// Gives a command variables of this process, as far as they are set.
pub(crate) fn pass_on(command: &mut Command, names: &[&str]) {
    for name in names {
        if let Some(value) = std::env::var_os(name) {
            command.env(name, value);
        }
    }
}

/// Where a program is on the `PATH` of this process.
pub fn find_program(name: &str) -> Option<PathBuf> {
    let path: OsString = std::env::var_os("PATH")?;
    std::env::split_paths(&path)
        .map(|folder| folder.join(name))
        .find(|file| is_executable(file))
}

/// Whether this is a file that may be executed.
pub(crate) fn is_executable(file: &Path) -> bool {
    use std::os::unix::fs::PermissionsExt as _;
    std::fs::metadata(file).is_ok_and(|m| m.is_file() && m.permissions().mode() & 0o111 != 0)
}

/// Runs a command in a process group of its own and passes on each line of its standard output
/// and standard error, in the order in which they are printed.
///
/// When the command has ended, processes of its group that it left behind are killed. When
/// `cancel` is cancelled, the group is told to end (SIGTERM), killed if it does not, and this
/// returns when the command is gone. When the future is dropped the group is killed, and also
/// when this process is, however it ends.
pub async fn run(
    mut command: Command,
    output: &LineSender,
    cancel: &CancellationToken,
) -> Result<Ended, RunError> {
    if cancel.is_cancelled() {
        return Err(RunError::Cancelled);
    }
    let guard = Guard::start()?;
    // One pipe for both, so that the lines stay in order.
    let (reader, writer) = io::pipe()?;
    command
        .process_group(guard.group)
        .stdin(Stdio::null())
        .stdout(writer.try_clone()?)
        .stderr(writer)
        .kill_on_drop(true);
    let mut child = command.spawn().map_err(|e| match e.kind() {
        io::ErrorKind::NotFound => RunError::NotFound,
        _ => RunError::Io(e),
    })?;
    // It holds the pipe's other end, which must close for the output to end.
    drop(command);
    let reader = pipe::Receiver::from_owned_fd(reader.into())?;

    let mut tail = VecDeque::new();
    let ended = CancellationToken::new();
    let mut forwarding = Box::pin(forward(reader, output, &mut tail, &ended));
    let mut forwarded = false;
    let status = loop {
        tokio::select! {
            biased;
            () = cancel.cancelled() => {
                guard.signal(Signal::TERM);
                let gone = tokio::time::timeout(GRACE, child.wait()).await;
                guard.signal(Signal::KILL);
                if gone.is_err() {
                    child.wait().await?;
                }
                return Err(RunError::Cancelled);
            }
            result = &mut forwarding, if !forwarded => {
                result?;
                forwarded = true;
            }
            status = child.wait() => break status?,
        }
    };
    guard.signal(Signal::KILL);
    if !forwarded {
        ended.cancel();
        tokio::select! {
            () = cancel.cancelled() => return Err(RunError::Cancelled),
            result = &mut forwarding => result?,
        }
    }
    drop(forwarding);
    Ok(Ended {
        status,
        tail: tail.into(),
    })
}

/// The leader of a process group, which kills the group, itself included, as soon as nobody holds
/// the other end of its standard input any more: when this is dropped, and when this process ends
/// in whatever way. It is there before the command is, which so never runs unguarded.
struct Guard {
    group: i32,
    _leader: tokio::process::Child,
}

impl Guard {
    /// Waits for the end of its input, whatever the group is told meanwhile.
    const SCRIPT: &str = "trap '' HUP INT QUIT TERM; read -r _; kill -KILL 0";

    fn start() -> io::Result<Self> {
        let leader = Command::new("/bin/sh")
            .args(["-c", Self::SCRIPT])
            .env_clear()
            .current_dir("/")
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .process_group(0)
            .kill_on_drop(true)
            .spawn()?;
        let id = leader.id().and_then(|id| i32::try_from(id).ok());
        let group = id.ok_or_else(|| io::Error::other("a process has no id"))?;
        Ok(Self {
            group,
            _leader: leader,
        })
    }

    /// The group's id stays taken: its leader is waited for only after this is dropped.
    fn signal(&self, signal: Signal) {
        if let Some(group) = Pid::from_raw(self.group) {
            // A group that is gone already needs no signal.
            let _ = kill_process_group(group, signal);
        }
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        self.signal(Signal::KILL);
    }
}

/// Passes on lines until the pipe closes or, after `ended`, nothing comes any more.
async fn forward(
    mut reader: impl AsyncRead + Unpin,
    output: &LineSender,
    tail: &mut VecDeque<String>,
    ended: &CancellationToken,
) -> io::Result<()> {
    let mut lines = Lines::default();
    let mut buffer = vec![0; 16 * 1024];
    loop {
        let nothing_more = async {
            ended.cancelled().await;
            tokio::time::sleep(STRAGGLERS).await;
        };
        let n = tokio::select! {
            biased;
            n = reader.read(&mut buffer) => n?,
            () = nothing_more => 0,
        };
        let complete = if n == 0 {
            lines.rest().into_iter().collect()
        } else {
            lines.push(&buffer[..n])
        };
        for line in complete {
            if tail.len() == TAIL {
                tail.pop_front();
            }
            tail.push_back(line.clone());
            output.send(line).await;
        }
        if n == 0 {
            return Ok(());
        }
    }
}

/// Cuts bytes into lines. A carriage return starts a line anew, as on a terminal; a line that is
/// too long is kept up to its bound and the rest of it thrown away.
#[derive(Debug, Default)]
struct Lines {
    line: Vec<u8>,
}

impl Lines {
    fn push(&mut self, bytes: &[u8]) -> Vec<String> {
        let mut complete = Vec::new();
        let mut rest = bytes;
        while let Some(end) = rest.iter().position(|b| *b == b'\n') {
            self.extend(&rest[..end]);
            complete.extend(self.rest().or(Some(String::new())));
            rest = &rest[end + 1..];
        }
        self.extend(rest);
        complete
    }

    fn extend(&mut self, bytes: &[u8]) {
        // One more than is allowed, so that it is seen that the line is too long.
        let room = (MAX_LINE + 1).saturating_sub(self.line.len());
        self.line.extend_from_slice(&bytes[..bytes.len().min(room)]);
    }

    /// What is there of an unfinished line.
    fn rest(&mut self) -> Option<String> {
        let line = std::mem::take(&mut self.line);
        if line.is_empty() {
            return None;
        }
        let line = line.strip_suffix(b"\r").unwrap_or(&line);
        let shown = line.rsplit(|b| *b == b'\r').next().unwrap_or(line);
        Some(String::from_utf8_lossy(shown).into_owned())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shell(script: &str) -> Command {
        let mut command = command("/bin/sh");
        command.arg("-c").arg(script);
        command
    }

    #[test]
    fn lines_are_cut_wherever_the_reads_end() {
        let mut lines = Lines::default();
        assert_eq!(lines.push(b"one\r\ntw"), ["one"]);
        assert_eq!(
            lines.push(b"o\n\n 10%\r 50%\r100%\nthr"),
            ["two", "", "100%"]
        );
        assert_eq!(lines.rest().as_deref(), Some("thr"));
        assert_eq!(lines.rest(), None);
    }

    #[tokio::test]
    async fn lines_arrive_in_order_while_the_command_runs() {
        let dir = tempfile::tempdir().unwrap();
        let gate = dir.path().join("gate");
        let (sender, mut received) = LineSender::channel(16);
        let script = format!(
            "echo out; echo err >&2; while [ ! -e {0} ]; do sleep 0.02; done; echo end; exit 3",
            gate.display()
        );
        let running =
            tokio::spawn(
                async move { run(shell(&script), &sender, &CancellationToken::new()).await },
            );
        assert_eq!(received.recv().await.unwrap(), "out");
        assert_eq!(received.recv().await.unwrap(), "err");
        std::fs::write(&gate, "").unwrap();
        assert_eq!(received.recv().await.unwrap(), "end");
        let ended = running.await.unwrap().unwrap();
        assert_eq!(ended.how(), "exited with 3");
        assert_eq!(ended.tail, ["out", "err", "end"]);
    }

    #[tokio::test]
    async fn cancelling_ends_all_processes_of_the_group() {
        let (sender, mut received) = LineSender::channel(16);
        let cancel = CancellationToken::new();
        let token = cancel.clone();
        // Both ignore the polite request.
        let script = "trap '' TERM; sh -c 'trap \"\" TERM; echo $$; while :; do sleep 0.1; done'";
        let running = tokio::spawn(async move { run(shell(script), &sender, &token).await });
        let child: i32 = received.recv().await.unwrap().parse().unwrap();
        cancel.cancel();
        assert!(matches!(
            running.await.unwrap().unwrap_err(),
            RunError::Cancelled
        ));
        gone(child).await;
    }

    #[tokio::test]
    async fn what_the_command_leaves_behind_is_killed() {
        let (sender, mut received) = LineSender::channel(16);
        let script = "sleep 1000 & echo $!";
        let ended = run(shell(script), &sender, &CancellationToken::new())
            .await
            .unwrap();
        assert!(ended.status.success());
        gone(received.recv().await.unwrap().parse().unwrap()).await;
    }

    #[tokio::test]
    async fn dropping_the_future_kills_the_group() {
        let (sender, mut received) = LineSender::channel(16);
        let running = tokio::spawn(async move {
            let _ = run(
                shell("sleep 1000 & echo $!; wait"),
                &sender,
                &CancellationToken::new(),
            )
            .await;
        });
        let child = received.recv().await.unwrap().parse().unwrap();
        running.abort();
        gone(child).await;
    }

    #[tokio::test]
    async fn a_missing_program_is_told() {
        let result = run(
            command("/nonexistent/program"),
            &LineSender::discard(),
            &CancellationToken::new(),
        )
        .await;
        assert!(matches!(result.unwrap_err(), RunError::NotFound));
    }

    /// Waits until a process is gone or only waits to be reaped.
    async fn gone(pid: i32) {
        let stat = format!("/proc/{pid}/stat");
        let waiting = async {
            while std::fs::read_to_string(&stat).is_ok_and(|s| !s.contains(") Z ")) {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        };
        tokio::time::timeout(Duration::from_secs(60), waiting)
            .await
            .unwrap();
    }
}
