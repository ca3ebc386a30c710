//! Workload E: a whole ledger verified offline, against SHA-256 of the same bytes. Both sides run
//! in processes of their own, as an auditor's does, and are timed from start to end of those.

use std::fs::{self, File};
use std::io::Read;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Instant;

use daybook_audit::{Options as Audit, Source, Thoroughness, export, verify};
use daybook_store::tlog::{Checkpoint, FolderStorage, Growth, SignerKey, VerifierKey};
use jiff::Timestamp;
use sha2::{Digest, Sha256};

use crate::report::{Comparison, Report};
use crate::sample_ledger::SampleProject;
use crate::{Failure, temporary_folder};

/// Verifying takes at most so many times as long as hashing.
const TIMES: f64 = 3.0;
/// Memory that verifying may take, in MiB.
const MEMORY: f64 = 200.0;
/// Projects whose events alternate.
const PROJECTS: usize = 100;

#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// Rounds
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..))]
    rounds: u32,

    /// Events in the ledger
    #[arg(long, default_value_t = 1_000_000)]
    events: usize,

    /// Folder for the ledger, on the disk that is to be measured
    #[arg(long, value_name = "FOLDER")]
    folder: Option<PathBuf>,
}

pub(crate) async fn run(options: Options) -> Result<Report, Failure> {
    let folder = temporary_folder(options.folder.as_deref())?;
    let Prepared {
        path,
        with_claim,
        key,
        bytes,
    } = prepare(folder.path(), options.events).await?;
    let events = options.events as f64;
    let (mut all, mut claimed) = (vec![], vec![]);
    let (mut one, mut both, mut quick, mut memory) = (vec![], vec![], vec![], vec![]);
    let side = |file: &Path, what| Side {
        file: file.to_owned(),
        what,
        threads: 1,
        key: key.verifier().clone(),
        events: options.events,
    };
    let in_parts = Side {
        threads: cores(),
        ..side(&path, What::Hash)
    };
    // What is measured is not the disk: whoever comes first would pay for it.
    hash(&path, 1)?;
    hash(&with_claim, 1)?;
    for round in 0..options.rounds {
        for turn in 0..5 {
            let start = Instant::now();
            let rate = |start: Instant| events / start.elapsed().as_secs_f64();
            match (round + turn) % 5 {
                0 => {
                    memory.push(side(&path, What::Verify).start()?);
                    all.push(rate(start));
                }
                3 => {
                    memory.push(side(&with_claim, What::Verify).start()?);
                    claimed.push(rate(start));
                }
                1 => {
                    side(&path, What::Hash).start()?;
                    one.push(rate(start));
                }
                2 => {
                    in_parts.start()?;
                    both.push(rate(start));
                }
                _ => {
                    side(&path, What::Tree).start()?;
                    quick.push(rate(start));
                }
            }
            eprint!(".");
        }
    }
    eprintln!();
    let limit = Some(1.0 / TIMES);
    let comparison =
        |subject: &str, yardstick, measured: &Vec<f64>, against: &Vec<f64>, limit| Comparison {
            subject: subject.to_owned(),
            yardstick,
            measured: measured.clone(),
            against: against.clone(),
            limit,
        };
    let verified = "signature, tree, schemas, folds";
    let with_states = "the same, and the hash over all states";
    Ok(Report {
        title: format!(
            "A ledger of {} events of {} bytes on average, verified offline from one file",
            options.events,
            bytes / options.events as u64
        ),
        unit: "events/s",
        notes: vec![
            "each side in a process of its own, with both cores where it has use for them"
                .to_owned(),
        ],
        comparisons: vec![
            comparison(verified, "sha2, one core", &all, &one, limit),
            comparison(verified, "sha2, all cores", &all, &both, limit),
            comparison(with_states, "sha2, one core", &claimed, &one, limit),
            comparison(with_states, "sha2, all cores", &claimed, &both, limit),
            comparison(
                "signature and tree alone",
                "sha2, all cores",
                &quick,
                &both,
                None,
            ),
            comparison(
                "memory: MiB promised",
                "MiB taken",
                &vec![MEMORY; memory.len()],
                &memory,
                Some(1.0),
            ),
        ],
    })
}

fn cores() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}

/// A ledger, as an auditor gets it.
struct Prepared {
    /// Its export.
    path: PathBuf,
    /// Its export as a server makes it, which claims to know the hash over all states.
    with_claim: PathBuf,
    key: SignerKey,
    /// How many bytes its events have.
    bytes: u64,
}

/// Writes a signed ledger, and the exports of it.
async fn prepare(folder: &Path, events: usize) -> Result<Prepared, Failure> {
    let tiles = folder.join("tiles");
    let mut projects = (0..PROJECTS)
        .map(SampleProject::new)
        .collect::<Result<Vec<_>, _>>()?;
    let mut growth = Growth::empty();
    let mut bytes = 0;
    let write = |growth: &mut Growth| -> Result<(), Failure> {
        for (path, bytes) in growth.files()? {
            let path = tiles.join(path.to_string());
            fs::create_dir_all(path.parent().unwrap_or(&tiles))?;
            fs::write(path, bytes)?;
        }
        growth.stored();
        Ok(())
    };
    for number in 0..events {
        let sample = projects[number % PROJECTS].next()?;
        bytes += sample.bytes.len() as u64;
        growth.push(sample.bytes)?;
        if growth.size().is_multiple_of(65_536) {
            write(&mut growth)?;
        }
    }
    write(&mut growth)?;
    let origin = "bench.example/tlog";
    let key = SignerKey::generate(origin)?;
    let checkpoint = Checkpoint {
        origin: origin.to_owned(),
        head: growth.head(),
        extensions: Vec::new(),
    };
    fs::write(
        tiles.join("checkpoint"),
        checkpoint.sign(std::slice::from_ref(&key)),
    )?;
    let path = folder.join("export.tar");
    let storage = FolderStorage::new(&tiles);
    let made = Timestamp::UNIX_EPOCH;
    export(&storage, &[], None, made, &path, &mut |_, _| {}).await?;
    // A wrong claim is told what is right.
    let with_claim = folder.join("claimed.tar");
    let claim = |hash: &str| fs::write(tiles.join("state_hash"), format!("{events} {hash}\n"));
    claim("unknown")?;
    export(&storage, &[], None, made, &with_claim, &mut |_, _| {}).await?;
    let options = Audit::default();
    let verified = verify(Source::open(&with_claim)?, &options, &mut |_, _| {})?;
    let hash = verified.state_hash.ok_or("there is no state hash")?;
    fs::remove_file(&with_claim)?;
    claim(&hash.to_string())?;
    export(&storage, &[], None, made, &with_claim, &mut |_, _| {}).await?;
    fs::remove_dir_all(tiles)?;
    Ok(Prepared {
        path,
        with_claim,
        key,
        bytes,
    })
}

/// One side of the comparison.
#[derive(Debug, Clone, clap::Args)]
pub(crate) struct Side {
    /// The export
    file: PathBuf,
    /// What is done with it
    #[arg(long, value_enum)]
    what: What,
    /// In how many parts it is hashed at once
    #[arg(long)]
    threads: usize,
    /// Who has signed it
    #[arg(long)]
    key: VerifierKey,
    /// Events in it
    #[arg(long)]
    events: usize,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum What {
    Verify,
    Tree,
    Hash,
}

impl Side {
    /// Runs it in a process of its own; returns how many MiB of memory that had at most.
    fn start(&self) -> Result<f64, Failure> {
        let what = clap::ValueEnum::to_possible_value(&self.what).ok_or("it has a name")?;
        let ended = Command::new(std::env::current_exe()?)
            .arg("audit-side")
            .arg(&self.file)
            .args(["--what", what.get_name()])
            .args(["--threads", &self.threads.to_string()])
            .args(["--key", &self.key.to_string()])
            .args(["--events", &self.events.to_string()])
            .stderr(Stdio::inherit())
            .output()?;
        if !ended.status.success() {
            return Err(format!("a side ended with {}", ended.status).into());
        }
        Ok(String::from_utf8(ended.stdout)?.trim().parse()?)
    }
}

/// Runs one side in this process, and prints how many MiB of memory it had at most.
pub(crate) fn run_side(side: &Side) -> Result<(), Failure> {
    match side.what {
        What::Verify => audit(side, Thoroughness::Normal)?,
        What::Tree => audit(side, Thoroughness::Quick)?,
        What::Hash => hash(&side.file, side.threads)?,
    }
    println!("{}", peak()?);
    Ok(())
}

/// Verifies a ledger.
fn audit(side: &Side, thoroughness: Thoroughness) -> Result<(), Failure> {
    let options = Audit {
        keys: vec![side.key.clone()],
        thoroughness,
        ..Audit::default()
    };
    let verified = verify(Source::open(&side.file)?, &options, &mut |_, _| {})?;
    let read = match thoroughness {
        Thoroughness::Quick => verified.counts.entries,
        _ => verified.counts.counted,
    };
    if !verified.holds() || read != side.events as u64 {
        let found = verified.findings.list().next();
        let events = side.events;
        return Err(format!("the ledger does not hold: {read} of {events}, {found:?}").into());
    }
    Ok(())
}

/// Hashes a file in as many parts as there are threads.
fn hash(path: &Path, threads: usize) -> Result<(), Failure> {
    let file = File::open(path)?;
    let len = file.metadata()?.len();
    let part = len.div_ceil(threads as u64);
    std::thread::scope(|scope| {
        let hashing: Vec<_> = (0..threads as u64)
            .map(|number| {
                let file = &file;
                scope.spawn(move || -> Result<(), std::io::Error> {
                    let mut hash = Sha256::new();
                    let mut buffer = vec![0; 1 << 20];
                    let (mut at, end) = (number * part, ((number + 1) * part).min(len));
                    while at < end {
                        let most = buffer.len().min((end - at) as usize);
                        let read = file.read_at(&mut buffer[..most], at)?;
                        hash.update(&buffer[..read]);
                        at += read as u64;
                    }
                    std::hint::black_box(hash.finalize());
                    Ok(())
                })
            })
            .collect();
        for thread in hashing {
            thread.join().map_err(|_| "a thread panicked")??;
        }
        Ok(())
    })
}

/// The kernel forgets how much memory this process has had at most.
pub(crate) fn reset_peak() -> Result<(), Failure> {
    Ok(fs::write("/proc/self/clear_refs", "5")?)
}

/// How much memory this process has had at most, in MiB.
pub(crate) fn peak() -> Result<f64, Failure> {
    let mut text = String::new();
    File::open("/proc/self/status")?.read_to_string(&mut text)?;
    let line = text.lines().find_map(|l| l.strip_prefix("VmHWM:"));
    let kib = line.and_then(|l| l.trim().strip_suffix(" kB")?.parse::<f64>().ok());
    Ok(kib.ok_or("the kernel does not say how much memory was used")? / 1024.0)
}
