//! One process that was started for an instance, by this Daybook or by an earlier one.

use std::collections::BTreeSet;
use std::fmt;
use std::fs::OpenOptions;
use std::io;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process, kill_process_group};
use tokio::process::{Child, Command};
use tokio::time::Instant;

use super::command::Launch;
use super::processes::{Family, ProcessId, RUN_VARIABLE, listening_ports, members};

/// Between two looks at what is left of a family that is ending.
const LOOK: Duration = Duration::from_millis(20);
/// Between two looks at whether an adopted process still runs.
const ADOPTED_LOOK: Duration = Duration::from_millis(100);
/// How long the system may take to end what was killed.
const KILL_LIMIT: Duration = Duration::from_secs(10);

/// How a process ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Exit {
    Code(i32),
    Signal(i32),
    /// It was started by an earlier Daybook, and only its parent learns more.
    Unknown,
}

impl fmt::Display for Exit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Code(code) => write!(f, "exited with code {code}"),
            Self::Signal(number) => match signal_name(*number) {
                Some(name) => write!(f, "was ended by signal {number} ({name})"),
                None => write!(f, "was ended by signal {number}"),
            },
            Self::Unknown => f.write_str("ended"),
        }
    }
}

fn signal_name(number: i32) -> Option<&'static str> {
    Some(match number {
        1 => "SIGHUP",
        2 => "SIGINT",
        3 => "SIGQUIT",
        4 => "SIGILL",
        6 => "SIGABRT",
        8 => "SIGFPE",
        9 => "SIGKILL",
        11 => "SIGSEGV",
        13 => "SIGPIPE",
        15 => "SIGTERM",
        _ => return None,
    })
}

/// A process, its group, and what else it started. Dropping this leaves them all running.
#[derive(Debug)]
pub(super) struct Process {
    id: ProcessId,
    /// The value of [`RUN_VARIABLE`] in its environment.
    run: String,
    /// Only for one that this Daybook has started.
    child: Option<Child>,
}

impl Process {
    /// Starts one as the leader of a process group of its own. Its output goes to the end of a
    /// file, so that it does not depend on the life of Daybook.
    pub(super) async fn start(launch: &Launch, run: &str, output: &Path) -> io::Result<Self> {
        let file = OpenOptions::new().create(true).append(true).open(output)?;
        let mut command = Command::new(&launch.program);
        command
            .args(&launch.args)
            .env_clear()
            .envs(&launch.env)
            .env(RUN_VARIABLE, run)
            .current_dir(&launch.dir)
            .stdin(Stdio::null())
            .stdout(file.try_clone()?)
            .stderr(file)
            .process_group(0)
            .kill_on_drop(false);
        let mut tries = 0;
        let child = loop {
            match command.spawn() {
                // The file was just written, and another thread is about to start a process that
                // has inherited it for a moment.
                Err(e) if e.kind() == io::ErrorKind::ExecutableFileBusy && tries < 50 => {
                    tries += 1;
                    tokio::time::sleep(LOOK).await;
                }
                other => break other?,
            }
        };
        let id = child
            .id()
            .and_then(|pid| ProcessId::of_child(i32::try_from(pid).ok()?))
            .ok_or_else(|| io::Error::other("the system does not know the new process"))?;
        Ok(Self {
            id,
            run: run.to_owned(),
            child: Some(child),
        })
    }

    /// Takes over a process that an earlier Daybook has started, if it still runs.
    pub(super) fn adopt(id: &ProcessId, run: &str) -> Option<Self> {
        id.runs().then(|| Self {
            id: id.clone(),
            run: run.to_owned(),
            child: None,
        })
    }

    pub(super) fn id(&self) -> &ProcessId {
        &self.id
    }

    /// Whether this Daybook has started it.
    pub(super) fn is_new(&self) -> bool {
        self.child.is_some()
    }

    fn family(&self) -> Family {
        Family {
            leader: self.id.clone(),
            run: self.run.clone(),
        }
    }

    /// Waits until it has ended. Cancel-safe.
    pub(super) async fn exited(&mut self) -> Exit {
        let Some(child) = &mut self.child else {
            ended(&self.id).await;
            return Exit::Unknown;
        };
        match child.wait().await {
            Ok(status) => match (status.code(), status.signal()) {
                (Some(code), _) => Exit::Code(code),
                (None, Some(signal)) => Exit::Signal(signal),
                (None, None) => Exit::Unknown,
            },
            Err(_) => Exit::Unknown,
        }
    }

    /// The TCP ports on which it and its children listen. `None` if the system does not say.
    pub(super) async fn listening_ports(&self) -> Option<BTreeSet<u16>> {
        let family = self.family();
        tokio::task::spawn_blocking(move || listening_ports(&family))
            .await
            .ok()?
    }

    /// Ends it and all that it has started: politely first, by force after `grace`. When this
    /// returns, none of it runs any more, unless the system keeps it alive against SIGKILL.
    pub(super) async fn stop(&mut self, grace: Duration) -> Exit {
        let until = Instant::now() + grace;
        if let Some(group) = Pid::from_raw(self.id.pid)
            && self.id.runs()
        {
            let _ = kill_process_group(group, Signal::TERM);
        }
        let mut exit = tokio::time::timeout_at(until, self.exited()).await.ok();
        while exit.is_some() && Instant::now() < until && !left(self.family()).await.is_empty() {
            tokio::time::sleep(LOOK).await;
        }
        self.kill_family().await;
        if exit.is_none() {
            exit = tokio::time::timeout(KILL_LIMIT, self.exited()).await.ok();
        }
        exit.unwrap_or(Exit::Unknown)
    }

    /// Ends at once what is left of it and its children.
    pub(super) async fn kill_family(&self) {
        kill(self.family()).await;
    }
}

/// Ends at once what a process that no longer runs has left behind.
pub(super) async fn kill_leftovers(leader: ProcessId, run: String) {
    kill(Family { leader, run }).await;
}

async fn left(family: Family) -> Vec<ProcessId> {
    tokio::task::spawn_blocking(move || members(&family))
        .await
        .unwrap_or_default()
}

async fn kill(family: Family) {
    let until = Instant::now() + KILL_LIMIT;
    loop {
        let left = left(family.clone()).await;
        if left.is_empty() {
            return;
        }
        if Instant::now() > until {
            tracing::error!(?left, "processes do not end although they were killed");
            return;
        }
        for id in left {
            if let Some(pid) = Pid::from_raw(id.pid)
                && id.runs()
            {
                let _ = kill_process(pid, Signal::KILL);
            }
        }
        tokio::time::sleep(LOOK).await;
    }
}

/// Waits until a process that is no child of ours has ended. Nobody reports that, so it is looked
/// at.
async fn ended(id: &ProcessId) {
    while id.runs() {
        tokio::time::sleep(ADOPTED_LOOK).await;
    }
}
