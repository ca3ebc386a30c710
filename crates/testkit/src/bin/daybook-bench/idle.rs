//! What `daybook up` costs when nothing is asked of it, and how long a first impression takes: on
//! the real binary, on folders of its own.

use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};

use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::process::{Child, Command};

use crate::report::{Comparison, Report};
use crate::{Failure, temporary_folder};

/// What is promised: milliseconds from the start of the process until it says that it is up.
const READY_MS: f64 = 1000.0;
/// What is promised of the memory of an idle process.
const IDLE_MIB: f64 = 80.0;
const MIB_PER_GIB: f64 = 1024.0;
/// What is promised of the demo, once it is built.
const DEMO_S: f64 = 60.0;
pub(crate) const SECONDS_PER_HOUR: f64 = 3600.0;
const PATIENCE: Duration = Duration::from_secs(180);

#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// Starts, each in an empty folder
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..))]
    starts: u32,
    /// Demos
    #[arg(long, default_value_t = 1)]
    demos: u32,
    /// Seconds without a request before memory is looked at
    #[arg(long, default_value_t = 10)]
    idle: u64,
    /// The program; the one beside this one if it is not named
    #[arg(long, value_name = "FILE")]
    daybook: Option<PathBuf>,
    /// Where the data folders are meanwhile
    #[arg(long)]
    folder: Option<PathBuf>,
}

pub(crate) async fn run(options: Options) -> Result<Report, Failure> {
    let program = program(options.daybook.as_deref())?;
    let (mut ready, mut resident, mut anonymous) = (Vec::new(), Vec::new(), Vec::new());
    for start in 0..options.starts {
        let folder = temporary_folder(options.folder.as_deref())?;
        let (mut server, took, _) = start_up(&program, folder.path()).await?;
        ready.push(took.as_secs_f64() * 1000.0);
        // Memory of one of them is enough.
        if start == 0 {
            tokio::time::sleep(Duration::from_secs(options.idle)).await;
            let status = status_of(&server)?;
            resident.push(mib(&status, "VmRSS")?);
            anonymous.push(mib(&status, "RssAnon")?);
        }
        stop(&mut server).await?;
    }
    let mut demos = Vec::new();
    for _ in 0..options.demos {
        let folder = temporary_folder(options.folder.as_deref())?;
        demos.push(demo(&program, folder.path()).await?.as_secs_f64());
    }

    let mut comparisons = vec![
        against(
            format!("ready {}", listed(&ready, "ms")),
            "1000 ms",
            &ready,
            SECONDS_PER_HOUR * 1000.0,
            READY_MS,
        ),
        against(
            format!(
                "idle for {} s {}, of which anonymous {}",
                options.idle,
                listed(&resident, "MiB"),
                listed(&anonymous, "MiB")
            ),
            "80 MiB",
            &resident,
            MIB_PER_GIB,
            IDLE_MIB,
        ),
    ];
    if !demos.is_empty() {
        let subject = format!("demo {}", listed(&demos, "s"));
        comparisons.push(against(subject, "60 s", &demos, SECONDS_PER_HOUR, DEMO_S));
    }
    Ok(Report {
        title:
            "The program from its start to ready, what it takes idle, and its demo: how many an \
                hour, or in a GiB"
                .to_owned(),
        unit: "of them",
        notes: Vec::new(),
        comparisons,
    })
}

/// Costs as how many there are of them in a whole, so that more is better.
pub(crate) fn against(
    subject: String,
    yardstick: &'static str,
    costs: &[f64],
    whole: f64,
    promised: f64,
) -> Comparison {
    Comparison {
        subject,
        yardstick,
        measured: costs.iter().map(|cost| whole / cost).collect(),
        against: costs.iter().map(|_| whole / promised).collect(),
        limit: Some(1.0),
    }
}

pub(crate) fn listed(figures: &[f64], unit: &str) -> String {
    let figures: Vec<String> = figures.iter().map(|f| format!("{f:.0}")).collect();
    format!("{} {unit}", figures.join("/"))
}

/// The program that is measured.
pub(crate) fn program(named: Option<&Path>) -> Result<PathBuf, Failure> {
    let program = match named {
        Some(program) => program.to_owned(),
        None => std::env::current_exe()?.with_file_name("daybook"),
    };
    if program.is_file() {
        return Ok(program);
    }
    let program = program.display();
    Err(
        format!("there is no {program}; build it with `cargo build --release --package daybook`")
            .into(),
    )
}

/// `daybook up`, how long it took until it said that it is up, and where it listens.
pub(crate) async fn start_up(
    program: &Path,
    folder: &Path,
) -> Result<(Child, Duration, String), Failure> {
    start(program, folder, &["up", "--gateway", "127.0.0.1:0"]).await
}

/// Starts the program with an HTTP interface, and waits until it says where that is.
pub(crate) async fn start(
    program: &Path,
    folder: &Path,
    arguments: &[&str],
) -> Result<(Child, Duration, String), Failure> {
    let begun = Instant::now();
    let mut child = Command::new(program)
        .args(arguments)
        .args(["--listen", "127.0.0.1:0"])
        .arg("--data")
        .arg(folder.join("data"))
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .kill_on_drop(true)
        .spawn()?;
    let stdout = child.stdout.take().ok_or("the server has no output")?;
    let mut lines = BufReader::new(stdout).lines();
    let up = async {
        let mut took = None;
        while let Some(line) = lines.next_line().await? {
            if line.contains("Daybook is up") {
                took = Some(begun.elapsed());
            }
            if let (Some(took), Some((_, address))) = (took, line.split_once("http://")) {
                // More may be said behind it.
                let address = address.split_whitespace().next().unwrap_or_default();
                return Ok((took, address.trim_end_matches([',', '/']).to_owned()));
            }
        }
        Err::<_, Failure>("the server ended before it was up".into())
    };
    let (took, address) = tokio::time::timeout(PATIENCE, up).await??;
    // Read on, so that it never blocks on a full pipe.
    tokio::spawn(async move { while let Ok(Some(_)) = lines.next_line().await {} });
    Ok((child, took, address))
}

pub(crate) fn status_of(child: &Child) -> Result<String, Failure> {
    let id = child.id().ok_or("the server has ended")?;
    Ok(std::fs::read_to_string(format!("/proc/{id}/status"))?)
}

/// A size from `/proc/PID/status`, in MiB.
pub(crate) fn mib(status: &str, name: &str) -> Result<f64, Failure> {
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
    let kib = line.and_then(|line| line.trim().strip_suffix("kB")?.trim().parse::<f64>().ok());
    Ok(kib.ok_or_else(|| format!("/proc does not say {name}"))? / 1024.0)
}

pub(crate) async fn stop(child: &mut Child) -> Result<(), Failure> {
    if let Some(id) = child.id().and_then(|id| i32::try_from(id).ok())
        && let Some(pid) = rustix::process::Pid::from_raw(id)
    {
        rustix::process::kill_process(pid, rustix::process::Signal::TERM)?;
    }
    tokio::time::timeout(PATIENCE, child.wait()).await??;
    Ok(())
}

/// How long the whole demo takes.
async fn demo(program: &Path, folder: &Path) -> Result<Duration, Failure> {
    let begun = Instant::now();
    let ran = Command::new(program)
        .arg("demo")
        .arg("--keep")
        .arg(folder.join("demo"))
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .kill_on_drop(true)
        .status();
    let ended = tokio::time::timeout(PATIENCE, ran).await??;
    if !ended.success() {
        return Err(format!("the demo failed: {ended}").into());
    }
    Ok(begun.elapsed())
}
