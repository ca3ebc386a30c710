//! What the embedded log keeps when its process is killed, the power goes, the disk is full or
//! the disk fails. Real processes, real file systems.
//!
//! A test that needs a process to kill runs this very file again, with only the test [`child`] in
//! it and the folder of the log in an environment variable.

#![allow(clippy::unwrap_used)]

use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use daybook_events::EventLog;
use daybook_events::log::{Append, AppendError, ConsumerConfig, Expected, Position, Recorded};
use daybook_events::names::{BuildId, EventId, ProjectName};
use daybook_events::subject::{Subject, SubjectFilter};
use daybook_store::embedded::{EmbeddedConfig, EmbeddedLog};
use daybook_testkit::left_out;
use uuid::Uuid;

const FOLDER: &str = "DAYBOOK_TEST_LOG";
const UNSYNCED: &str = "DAYBOOK_TEST_UNSYNCED";
/// Longest wait for something that must happen.
const PATIENCE: Duration = Duration::from_secs(60);

/// Writers of a process that is to be killed.
const WRITERS: usize = 16;

fn an_event(writer: usize, text: impl std::fmt::Display) -> Append {
    let project = ProjectName::parse("shop").unwrap();
    let id = Uuid::now_v7();
    Append {
        subject: Subject::Build(project, BuildId(Uuid::from_u128(writer as u128))),
        id: EventId(id),
        expected: Expected::Any,
        bytes: Bytes::from(format!("{{\"id\":\"{id}\",\"text\":\"{text}\"}}")),
    }
}

async fn open(dir: &Path) -> EmbeddedLog {
    EmbeddedLog::open(dir, EmbeddedConfig::default())
        .await
        .unwrap()
}

async fn read_all(log: &EmbeddedLog) -> Vec<Recorded> {
    let all = SubjectFilter::default();
    log.read(Position::ZERO, &all, usize::MAX).await.unwrap()
}

/// The process that is killed: appends as fast as it can and says what was acknowledged.
#[test]
fn child() {
    let Some(folder) = std::env::var_os(FOLDER) else {
        return;
    };
    let config = match std::env::var_os(UNSYNCED) {
        Some(_) => EmbeddedConfig {
            sync: false,
            ..EmbeddedConfig::default()
        },
        None => EmbeddedConfig {
            // Small, so that what is done between two segments is hit, too.
            segment_bytes: 512 << 10,
            index_round: 500,
            ..EmbeddedConfig::default()
        },
    };
    let runtime = tokio::runtime::Runtime::new().unwrap();
    runtime.block_on(async {
        let log = Arc::new(
            EmbeddedLog::open(PathBuf::from(folder), config)
                .await
                .unwrap(),
        );
        let mut writers = tokio::task::JoinSet::new();
        for writer in 0..WRITERS {
            let log = Arc::clone(&log);
            writers.spawn(async move {
                let subject = an_event(writer, 0).subject;
                let own = log.read_aggregate(&subject).await.unwrap();
                let mut last = own.last().map_or(Position::ZERO, |r| r.position);
                loop {
                    let event = Append {
                        expected: Expected::Last(last),
                        ..an_event(writer, "x".repeat(600))
                    };
                    let id = event.id;
                    last = log.append(event).await.unwrap().position;
                    let line = format!("ack {last} {id}\n");
                    std::io::stdout().lock().write_all(line.as_bytes()).unwrap();
                }
            });
        }
        writers.join_all().await;
    });
}

/// A running [`child`]. Killed when dropped.
struct Appender {
    process: Child,
    output: BufReader<ChildStdout>,
    acknowledged: Vec<(u64, String)>,
}

impl Appender {
    fn start(folder: &Path, synced: bool) -> Self {
        let mut command = Command::new(std::env::current_exe().unwrap());
        command
            .args(["child", "--exact", "--nocapture"])
            .env(FOLDER, folder)
            .stdout(Stdio::piped());
        if !synced {
            command.env(UNSYNCED, "1");
        }
        let mut process = command.spawn().unwrap();
        Self {
            output: BufReader::new(process.stdout.take().unwrap()),
            process,
            acknowledged: Vec::new(),
        }
    }

    /// Reads one line of the process. `false` at the end.
    fn read(&mut self) -> bool {
        let mut line = String::new();
        if self.output.read_line(&mut line).unwrap() == 0 {
            return false;
        }
        let mut words = line.split_whitespace();
        if words.next() == Some("ack")
            && let (Some(position), Some(id), true) =
                (words.next(), words.next(), line.ends_with('\n'))
        {
            let position = position.parse().unwrap();
            self.acknowledged.push((position, id.to_owned()));
        }
        true
    }

    fn wait_for(&mut self, count: usize) {
        while self.acknowledged.len() < count {
            assert!(self.read(), "the process ended by itself");
        }
    }

    fn pause(&self) {
        let pid = rustix::process::Pid::from_child(&self.process);
        rustix::process::kill_process(pid, rustix::process::Signal::STOP).unwrap();
        let tasks = format!("/proc/{}/task", self.process.id());
        let start = Instant::now();
        let all_stopped = || {
            std::fs::read_dir(&tasks).unwrap().all(|task| {
                let stat = std::fs::read_to_string(task.unwrap().path().join("stat")).unwrap();
                let state = stat.rsplit(") ").next().unwrap();
                state.starts_with('T')
            })
        };
        while !all_stopped() {
            assert!(start.elapsed() < PATIENCE, "the process does not stop");
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// Kills the process and returns all that was acknowledged before.
    fn kill(mut self) -> Vec<(u64, String)> {
        self.process.kill().unwrap();
        while self.read() {}
        self.process.wait().unwrap();
        std::mem::take(&mut self.acknowledged)
    }
}

impl Drop for Appender {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// How many of the acknowledged events are where they were said to be.
fn found(stored: &[Recorded], acknowledged: &[(u64, String)]) -> usize {
    for (i, recorded) in stored.iter().enumerate() {
        assert_eq!(recorded.position.0, i as u64 + 1);
    }
    let is_there = |(position, id): &&(u64, String)| {
        let recorded = stored.get(*position as usize - 1);
        recorded.is_some_and(|r| String::from_utf8_lossy(&r.bytes).contains(id.as_str()))
    };
    acknowledged.iter().filter(is_there).count()
}

#[tokio::test]
async fn a_killed_process_loses_nothing_that_was_acknowledged() {
    let dir = tempfile::tempdir().unwrap();
    let mut acknowledged = Vec::new();
    for round in 1..=4 {
        let mut appender = Appender::start(dir.path(), true);
        appender.wait_for(round * 400);
        acknowledged.extend(appender.kill());
        let log = open(dir.path()).await;
        let stored = read_all(&log).await;
        assert_eq!(found(&stored, &acknowledged), acknowledged.len());
        // What nobody was told of may be there, too: one event a writer and round at most.
        assert!(stored.len() - acknowledged.len() <= round * WRITERS);
        for writer in 0..WRITERS {
            let subject = an_event(writer, 0).subject;
            let own = stored.iter().filter(|r| r.subject == subject);
            let read = log.read_aggregate(&subject).await.unwrap();
            assert!(own.eq(&read));
        }
    }
}

/// Whether this process may mount file systems, and has the tools to make them.
fn can_mount() -> bool {
    let tools = ["mkfs.ext4", "mount", "umount"];
    let missing = tools.iter().find(|tool| {
        let found = Command::new("sh")
            .args(["-c", &format!("command -v {tool}")])
            .output();
        !found.is_ok_and(|f| f.status.success())
    });
    if let Some(tool) = missing {
        left_out(format!("it needs {tool}, which is not installed"));
        return false;
    }
    let dir = tempfile::tempdir().unwrap();
    match Mount::tmpfs(dir.path(), "1m") {
        Ok(_mounted) => true,
        Err(error) => {
            left_out(format!("it has to mount a file system, as root: {error}"));
            false
        }
    }
}

fn run(command: &mut Command) -> Result<(), String> {
    let output = command.output().map_err(|e| e.to_string())?;
    if output.status.success() {
        return Ok(());
    }
    Err(String::from_utf8_lossy(&output.stderr).trim().to_owned())
}

/// A mounted file system, unmounted when dropped.
struct Mount {
    at: PathBuf,
}

impl Mount {
    fn tmpfs(at: &Path, size: &str) -> Result<Self, String> {
        let options = format!("size={size}");
        run(Command::new("mount")
            .args(["-t", "tmpfs", "-o", &options, "tmpfs"])
            .arg(at))?;
        Ok(Self { at: at.to_owned() })
    }

    /// A file system within a file, on a loop device that goes with the mount.
    fn image(image: &Path, at: &Path) -> Result<Self, String> {
        std::fs::create_dir_all(at).unwrap();
        run(Command::new("mount").args(["-o", "loop"]).args([image, at]))?;
        Ok(Self { at: at.to_owned() })
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        // Whoever had files open there is being killed; the last one to go may take a moment.
        let start = Instant::now();
        while let Err(error) = run(Command::new("umount").arg(&self.at)) {
            if start.elapsed() > PATIENCE {
                let _ = run(Command::new("umount").arg("-l").arg(&self.at));
                eprintln!("{} stays mounted: {error}", self.at.display());
                return;
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

fn make_image(path: &Path, megabytes: u64, options: &[&str]) {
    File::create(path)
        .unwrap()
        .set_len(megabytes << 20)
        .unwrap();
    let made = run(Command::new("mkfs.ext4")
        .args(["-q", "-F"])
        .args(options)
        .arg(path));
    made.unwrap();
}

/// Appends to a log on a file system of its own, stops in the middle, and copies what the disk
/// holds at that moment, without what only memory holds. Returns the number of acknowledged
/// events and how many of them the copy has.
async fn lose_power(synced: bool) -> (usize, usize) {
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("disk");
    let left = dir.path().join("left");
    make_image(&image, 128, &[]);
    let acknowledged = {
        let mounted = Mount::image(&image, &dir.path().join("mounted")).unwrap();
        let mut appender = Appender::start(&mounted.at.join("log"), synced);
        appender.wait_for(2_000);
        appender.pause();
        std::fs::copy(&image, &left).unwrap();
        appender.kill()
    };
    let mounted = Mount::image(&left, &dir.path().join("again")).unwrap();
    let folder = mounted.at.join("log");
    let stored = match EmbeddedLog::open(folder, EmbeddedConfig::default()).await {
        Ok(log) => read_all(&log).await,
        // Lost so that it cannot even be opened.
        Err(_) if !synced => Vec::new(),
        Err(error) => panic!("{error}"),
    };
    drop(mounted);
    (acknowledged.len(), found(&stored, &acknowledged))
}

#[tokio::test]
async fn an_acknowledged_append_survives_the_loss_of_power() {
    if !can_mount() {
        return;
    }
    for _ in 0..2 {
        let (acknowledged, found) = lose_power(true).await;
        assert!(acknowledged >= 2_000);
        assert_eq!(found, acknowledged);
    }
}

/// The test above would notice.
#[tokio::test]
async fn without_syncing_the_loss_of_power_loses_events() {
    if !can_mount() {
        return;
    }
    // Somebody else on this machine may sync all disks at the wrong moment.
    for _ in 0..5 {
        let (acknowledged, found) = lose_power(false).await;
        if found < acknowledged {
            return;
        }
    }
    panic!("what was not synced was on the disk five times in a row");
}

/// A killed process leaves events that were written and not synced. Whoever reads them after the
/// next start may rely on them.
#[tokio::test]
async fn what_was_read_after_a_start_survives_the_loss_of_power() {
    if !can_mount() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("disk");
    let left = dir.path().join("left");
    make_image(&image, 128, &[]);
    let read = {
        let mounted = Mount::image(&image, &dir.path().join("mounted")).unwrap();
        let folder = mounted.at.join("log");
        let mut appender = Appender::start(&folder, false);
        appender.wait_for(500);
        appender.kill();
        let log = open(&folder).await;
        let read = read_all(&log).await;
        std::fs::copy(&image, &left).unwrap();
        read
    };
    assert!(read.len() >= 500);
    let mounted = Mount::image(&left, &dir.path().join("again")).unwrap();
    let log = open(&mounted.at.join("log")).await;
    assert!(read_all(&log).await == read);
    log.close().await;
}

async fn append_until_refused(log: &EmbeddedLog, stored: &mut Vec<Append>) -> AppendError {
    loop {
        let event = an_event(1, "x".repeat(4_000));
        match log.append(event.clone()).await {
            Ok(appended) => {
                stored.push(event);
                assert_eq!(appended.position.0, stored.len() as u64);
            }
            Err(error) => return error,
        }
    }
}

async fn holds(log: &EmbeddedLog, stored: &[Append]) {
    let all = read_all(log).await;
    assert_eq!(all.len(), stored.len());
    for (recorded, append) in all.iter().zip(stored) {
        assert_eq!(recorded.bytes, append.bytes);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_full_disk_refuses_appends_until_there_is_space_again() {
    if !can_mount() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let mounted = Mount::tmpfs(dir.path(), "16m").unwrap();
    let folder = mounted.at.join("log");
    let log = open(&folder).await;
    let consumer = log
        .consumer(ConsumerConfig::new("worker", SubjectFilter::default()))
        .await
        .unwrap();
    let mut stored = Vec::new();
    let filler = mounted.at.join("filler");
    for round in 1..=2 {
        // Fails when there is no space left, which is the point.
        let mut file = File::create(&filler).unwrap();
        let _ = file.set_len(0);
        while file.write_all(&[1; 65_536]).is_ok() {}
        drop(file);
        for _ in 0..2 {
            let error = append_until_refused(&log, &mut stored).await;
            assert!(matches!(error, AppendError::Unavailable(_)), "{error}");
            assert!(error.to_string().contains("no room"), "{error}");
        }
        let info = log.info().await.unwrap();
        assert_eq!(info.warnings.len(), 1, "{:?}", info.warnings);
        // Reading goes on, and so does whoever consumes.
        holds(&log, &stored).await;
        let delivery = tokio::time::timeout(PATIENCE, consumer.next()).await;
        delivery.unwrap().unwrap().reply.ack().await.unwrap();

        std::fs::remove_file(&filler).unwrap();
        let event = an_event(1, "after");
        let appended = log.append(event.clone()).await.unwrap();
        stored.push(event);
        assert_eq!(appended.position.0, stored.len() as u64, "round {round}");
        assert!(log.info().await.unwrap().warnings.is_empty());
    }
    log.close().await;
    drop((log, consumer));
    holds(&open(&folder).await, &stored).await;

    let remounted = Command::new("mount")
        .args(["-o", "remount,ro"])
        .arg(&mounted.at)
        .status();
    assert!(remounted.unwrap().success());
    let refused = EmbeddedLog::open(&folder, EmbeddedConfig::default()).await;
    let error = refused.unwrap_err();
    assert!(error.to_string().contains("lock"), "{error}");
}

/// The disk below the file system has no room where the file system thinks that it has: writes
/// that were accepted fail when they are synced.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_disk_that_fails_acknowledges_nothing_and_gives_no_position_twice() {
    if !can_mount() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let below = dir.path().join("below");
    std::fs::create_dir(&below).unwrap();
    let below = Mount::tmpfs(&below, "24m").unwrap();
    let image = below.at.join("disk");
    let plain = [
        "-O",
        "^has_journal",
        "-E",
        "lazy_itable_init=0,nodiscard",
        "-N",
        "256",
    ];
    make_image(&image, 200, &plain);
    let mounted = Mount::image(&image, &dir.path().join("mounted")).unwrap();
    let folder = mounted.at.join("log");
    let log = open(&folder).await;
    let mut stored = Vec::new();
    for _ in 0..20 {
        let event = an_event(1, "before");
        log.append(event.clone()).await.unwrap();
        stored.push(event);
    }
    let filler = below.at.join("filler");
    let mut file = File::create(&filler).unwrap();
    while file.write_all(&[1; 4_096]).is_ok() {}
    drop(file);
    let mut doubtful = None;
    let error = loop {
        let event = an_event(1, "x".repeat(4_000));
        match log.append(event.clone()).await {
            Ok(appended) => {
                stored.push(event);
                assert_eq!(appended.position.0, stored.len() as u64);
            }
            Err(error) => {
                doubtful = doubtful.or(Some(event));
                if matches!(error, AppendError::Unknown(_)) {
                    break error;
                }
                assert!(matches!(error, AppendError::Unavailable(_)), "{error}");
            }
        }
    };
    assert!(error.to_string().contains("synced"), "{error}");
    assert!(error.is_retryable());
    holds(&log, &stored).await;

    std::fs::remove_file(&filler).unwrap();
    let doubtful = doubtful.unwrap();
    let start = Instant::now();
    let appended = loop {
        match log.append(doubtful.clone()).await {
            Ok(appended) => break appended,
            Err(error) => {
                assert!(error.is_retryable(), "{error}");
                assert!(start.elapsed() < PATIENCE, "{error}");
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        }
    };
    stored.push(doubtful);
    assert_eq!(appended.position.0, stored.len() as u64);
    holds(&log, &stored).await;
    log.close().await;
    drop(log);
    let log = open(&folder).await;
    holds(&log, &stored).await;
    let again = log.append(stored[stored.len() - 1].clone()).await.unwrap();
    assert!(again.duplicate);
    log.close().await;
}
