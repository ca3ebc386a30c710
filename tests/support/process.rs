//! Processes of the binary: those that run for a while, and commands that end by themselves.

use std::fs::{self, File};
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use tempfile::TempDir;

/// How long a process may take to be ready, or to end after it was asked to.
const PATIENCE: Duration = Duration::from_secs(60);

/// The binary, without what the machine's own environment would tell it.
pub fn daybook() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_daybook"));
    for (name, _) in std::env::vars_os() {
        let daybooks = name.to_str().is_some_and(|n| n.starts_with("DAYBOOK_"));
        if daybooks {
            command.env_remove(name);
        }
    }
    command
        .env("USER", "tester")
        .env("DAYBOOK_CONFIG", "/nonexistent/config.toml")
        .env("GIT_CONFIG_NOSYSTEM", "1")
        .env("GIT_CONFIG_GLOBAL", "/dev/null")
        .stdin(Stdio::null());
    command
}

/// How a command ended.
#[derive(Debug)]
pub struct Done {
    /// Its exit code; -1 if a signal ended it.
    pub code: i32,
    /// What it printed.
    pub stdout: String,
    /// What it complained about.
    pub stderr: String,
}

impl Done {
    /// Runs a command to its end.
    pub fn of(command: &mut Command) -> Self {
        let output = command.output().expect("the binary starts");
        Self {
            code: output.status.code().unwrap_or(-1),
            stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
            stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
        }
    }

    /// The last line of what it printed, as JSON.
    #[track_caller]
    pub fn json(&self) -> Value {
        let line = self.stdout.trim_end().lines().last().unwrap_or_default();
        serde_json::from_str(line).unwrap_or_else(|e| panic!("{e}: not JSON: {self:?}"))
    }

    /// All of what it printed, as one JSON document.
    #[track_caller]
    pub fn json_document(&self) -> Value {
        serde_json::from_str(&self.stdout).unwrap_or_else(|e| panic!("{e}: not JSON: {self:?}"))
    }

    /// All lines of what it printed, as JSON.
    #[track_caller]
    pub fn json_lines(&self) -> Vec<Value> {
        let lines = self.stdout.lines().map(|line| {
            serde_json::from_str(line).unwrap_or_else(|e| panic!("{e}: not JSON: {line}"))
        });
        lines.collect()
    }

    /// The error that it printed with `--output json`.
    #[track_caller]
    pub fn error(&self) -> Value {
        let line = self.stderr.trim_end().lines().last().unwrap_or_default();
        let value: Value =
            serde_json::from_str(line).unwrap_or_else(|e| panic!("{e}: not JSON: {self:?}"));
        value["error"].clone()
    }
}

/// A folder for data, removed when dropped together with all processes that run in it.
#[derive(Debug)]
pub struct Folder {
    dir: TempDir,
    logs: AtomicU32,
}

impl Default for Folder {
    fn default() -> Self {
        Self::new()
    }
}

impl Folder {
    /// An empty one.
    pub fn new() -> Self {
        let dir = tempfile::Builder::new()
            .prefix("daybook-e2e-")
            .tempdir()
            .unwrap();
        Self {
            dir,
            logs: AtomicU32::new(0),
        }
    }

    /// What `--data` names.
    pub fn data(&self) -> PathBuf {
        self.dir.path().join("data")
    }

    /// How many things are in progress in the folders in which processes work, beside their locks.
    pub fn work_in_progress(&self) -> usize {
        let folders = std::fs::read_dir(self.data().join("scratch"));
        folders
            .into_iter()
            .flatten()
            .flatten()
            .filter_map(|folder| std::fs::read_dir(folder.path()).ok())
            .flat_map(|entries| entries.flatten())
            .filter(|entry| entry.file_name() != "lock")
            .count()
    }

    /// For what a test keeps beside the data.
    pub fn path(&self) -> &Path {
        self.dir.path()
    }

    fn next_log(&self, name: &str) -> PathBuf {
        let number = self.logs.fetch_add(1, Ordering::Relaxed);
        self.dir.path().join(format!("{number}-{name}.log"))
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        if std::thread::panicking() {
            for entry in fs::read_dir(self.dir.path())
                .into_iter()
                .flatten()
                .flatten()
            {
                let path = entry.path();
                if path.extension().is_some_and(|e| e == "log") {
                    let text = fs::read_to_string(&path).unwrap_or_default();
                    eprintln!("── {}\n{text}", path.display());
                }
            }
        }
        // Workloads outlive a server that was killed.
        let deadline = Instant::now() + Duration::from_secs(5);
        loop {
            let left = processes_in(self.dir.path());
            if left.is_empty() || Instant::now() > deadline {
                break;
            }
            for pid in left {
                if let Some(pid) = Pid::from_raw(pid) {
                    let _ = kill_process(pid, Signal::KILL);
                }
            }
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

/// The processes whose working directory is in this folder: the deployments' own.
pub fn processes_in(folder: &Path) -> Vec<i32> {
    let folder = fs::canonicalize(folder).unwrap_or_else(|_| folder.to_owned());
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc").into_iter().flatten().flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|n| n.parse().ok()) else {
            continue;
        };
        if fs::read_link(entry.path().join("cwd")).is_ok_and(|cwd| cwd.starts_with(&folder)) {
            found.push(pid);
        }
    }
    found
}

/// The processes that run for a deployment.
pub fn processes_of(deployment: &str) -> Vec<i32> {
    let mark = format!("DAYBOOK_DEPLOYMENT={deployment}");
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc").into_iter().flatten().flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|n| n.parse().ok()) else {
            continue;
        };
        let environment = fs::read(entry.path().join("environ")).unwrap_or_default();
        if environment.split(|b| *b == 0).any(|v| v == mark.as_bytes()) {
            found.push(pid);
        }
    }
    found
}

/// A process that did not get ready, and ended.
#[derive(Debug)]
pub struct Refused {
    /// Its exit code; -1 if a signal ended it.
    pub code: i32,
    /// What it wrote to standard error.
    pub stderr: String,
}

/// `daybook up` or `daybook serve`, once it is ready. Killed with SIGKILL when dropped.
#[derive(Debug)]
pub struct Process {
    child: Child,
    facts: Value,
    log: PathBuf,
}

impl Process {
    /// Starts one on a folder, with these arguments, and waits until it says that it is ready.
    ///
    /// # Panics
    /// If it ends instead.
    #[track_caller]
    pub fn start(folder: &Folder, args: &[&str], env: &[(String, String)]) -> Self {
        Self::try_start(folder, args, env)
            .unwrap_or_else(|refused| panic!("daybook {args:?} does not start: {refused:?}"))
    }

    /// The same, where it may refuse to start.
    pub fn try_start(
        folder: &Folder,
        args: &[&str],
        env: &[(String, String)],
    ) -> Result<Self, Refused> {
        let log = folder.next_log(args.first().copied().unwrap_or("daybook"));
        let file = File::create(&log).unwrap();
        let mut command = daybook();
        command
            .env("DAYBOOK_LOG", "info,async_nats=warn")
            .envs(env.iter().map(|(k, v)| (k, v)))
            .args(args)
            .arg("--data")
            .arg(folder.data())
            .args(["--output", "json"])
            .stdout(Stdio::piped())
            .stderr(file);
        let mut child = command.spawn().expect("the binary starts");
        let stdout = child.stdout.take().unwrap();
        let (sender, ready) = mpsc::channel();
        // Reads on to the end, so that the process never blocks on a full pipe.
        std::thread::spawn(move || {
            for line in BufReader::new(stdout).lines().map_while(Result::ok) {
                let _ = sender.send(line);
            }
        });
        match ready.recv_timeout(PATIENCE) {
            Ok(line) => {
                let facts = serde_json::from_str(&line)
                    .unwrap_or_else(|e| panic!("{e}: the first line is not JSON: {line}"));
                Ok(Self { child, facts, log })
            }
            Err(_) => {
                // Either it has ended, or it takes too long.
                let _ = child.kill();
                let code = child.wait().unwrap().code().unwrap_or(-1);
                let stderr = fs::read_to_string(&log).unwrap_or_default();
                Err(Refused { code, stderr })
            }
        }
    }

    /// What it said about itself: `url`, `gateway`, `pid` and more.
    pub fn facts(&self) -> &Value {
        &self.facts
    }

    /// A fact that is text.
    #[track_caller]
    pub fn fact(&self, name: &str) -> String {
        let text = self.facts[name].as_str();
        text.unwrap_or_else(|| panic!("no {name} in {}", self.facts))
            .to_owned()
    }

    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// What it has logged so far.
    pub fn log(&self) -> String {
        fs::read_to_string(&self.log).unwrap_or_default()
    }

    /// Sends a signal.
    pub fn signal(&self, signal: Signal) {
        let pid = i32::try_from(self.child.id()).ok().and_then(Pid::from_raw);
        kill_process(pid.unwrap(), signal).unwrap();
    }

    /// Whether it still runs.
    pub fn runs(&mut self) -> bool {
        self.child.try_wait().unwrap().is_none()
    }

    /// How it ended, if it has.
    pub fn ended(&mut self) -> Option<ExitStatus> {
        self.child.try_wait().unwrap()
    }

    /// Kills it with SIGKILL, and waits until it is gone. What it started stays.
    pub fn kill(mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }

    /// Asks it to end, as an operator or a supervisor would, and waits until it has.
    ///
    /// # Panics
    /// If it does not end.
    #[track_caller]
    pub fn stop(mut self) -> ExitStatus {
        self.signal(Signal::TERM);
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                return status;
            }
            assert!(Instant::now() < deadline, "it does not end: {}", self.log());
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
