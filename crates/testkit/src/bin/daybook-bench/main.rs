//! Benchmarks of Daybook against their yardsticks. Both sides run interleaved, in one run, on the
//! same machine; what counts is the ratio of their medians. `cargo xtask bench` starts this with
//! the servers that it needs.

mod append;
mod audit;
mod coverage;
mod drain;
mod fanout;
mod group_commit_file;
mod idle;
mod kubernetes;
mod logs;
mod notarise;
mod orchestrate;
mod package;
mod page;
mod past;
mod query;
mod raw_publish;
mod rebuild;
mod report;
mod sample_ledger;
mod switch;
mod tessera;
mod writers;

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::Parser;
use tempfile::TempDir;

/// Whatever went wrong, in a sentence for the person at the terminal; nobody branches on it.
type Failure = Box<dyn std::error::Error + Send + Sync>;

/// Benchmarks of Daybook against their yardsticks
#[derive(Debug, Parser)]
#[command(name = "daybook-bench")]
struct Arguments {
    /// Also write the figures as JSON to this file
    #[arg(long, global = true, value_name = "FILE", overrides_with = "json")]
    json: Option<PathBuf>,

    /// Fail if a ratio is below its limit
    #[arg(long, global = true)]
    enforce: bool,

    #[command(subcommand)]
    benchmark: Benchmark,
}

#[derive(Debug, clap::Subcommand)]
enum Benchmark {
    /// Appends with compare-and-set, against a raw publish and against a plain file
    Append(append::Options),
    /// Events to signed checkpoints, against Tessera, and what the notary costs
    Notarise(notarise::Options),
    /// A whole ledger verified offline, against SHA-256 of the same bytes
    Audit(audit::Options),
    /// One side of that, once: the benchmark starts it
    #[command(hide = true)]
    AuditSide(audit::Side),
    /// Deployments whose build and sync do nothing, from request to success
    Orchestrate(orchestrate::Options),
    /// The memory that a long queue of deployments takes while it drains
    Drain(drain::Options),
    /// Events to a thousand subscribers, against core NATS
    Fanout(fanout::Options),
    /// From the start of the program to ready, its memory when idle, and its demo
    Idle(idle::Options),
    /// Clusters as targets: from a pod's status to the event, many Applications, unchanged environments
    Kubernetes(kubernetes::Options),
    /// Signed GitOps commits into a repository of 10,000 files, against the `git` CLI
    Package(package::Options),
    /// The page in Chromium, with nothing in its memory: when it paints first, and what it fetches
    Page(page::Options),
    /// Answers about the past of a large ledger, with the state hash there
    Past(past::Options),
    /// Questions over HTTP, against the same bytes from memory
    Query(query::Options),
    /// One side of that: the benchmark starts it
    #[command(hide = true)]
    QuerySide(query::Side),
    /// Projections from nothing, against a raw read of the same stream
    Rebuild(rebuild::Options),
    /// From the request to switch to the first answer of the new target, under constant load
    Switch(switch::Options),
}

#[tokio::main]
async fn main() -> ExitCode {
    // Of the two that the libraries have, as in Daybook; an error says that there is one already.
    let _ = rustls::crypto::ring::default_provider().install_default();
    match run(Arguments::parse()).await {
        Ok(code) => code,
        Err(failure) => {
            eprintln!("error: {failure}");
            ExitCode::FAILURE
        }
    }
}

async fn run(arguments: Arguments) -> Result<ExitCode, Failure> {
    let report = match arguments.benchmark {
        Benchmark::Append(options) => append::run(options).await?,
        Benchmark::Notarise(options) => notarise::run(options).await?,
        Benchmark::Audit(options) => audit::run(options).await?,
        Benchmark::AuditSide(side) => return audit::run_side(&side).map(|()| ExitCode::SUCCESS),
        Benchmark::Orchestrate(options) => orchestrate::run(options).await?,
        Benchmark::Drain(options) => drain::run(options).await?,
        Benchmark::Fanout(options) => fanout::run(options).await?,
        Benchmark::Idle(options) => idle::run(options).await?,
        Benchmark::Kubernetes(options) => kubernetes::run(options).await?,
        Benchmark::Package(options) => package::run(options).await?,
        Benchmark::Page(options) => page::run(options).await?,
        Benchmark::Past(options) => past::run(options).await?,
        Benchmark::Query(options) => query::run(options).await?,
        Benchmark::QuerySide(side) => {
            return query::run_side(&side).await.map(|()| ExitCode::SUCCESS);
        }
        Benchmark::Rebuild(options) => rebuild::run(options).await?,
        Benchmark::Switch(options) => switch::run(options).await?,
    };
    print!("{report}");
    if let Some(file) = arguments.json {
        if let Some(folder) = file.parent() {
            std::fs::create_dir_all(folder)?;
        }
        std::fs::write(&file, serde_json::to_vec_pretty(&report.to_json())?)?;
        println!("\nThe same as JSON: {}", file.display());
    }
    let missed = arguments.enforce && !report.keeps_its_limits();
    Ok(ExitCode::from(u8::from(missed)))
}

/// A folder of its own below `parent`, or where the system has temporary files. A file system in
/// memory is refused: it syncs nothing, so a comparison on it would be worth nothing.
fn temporary_folder(parent: Option<&Path>) -> Result<TempDir, Failure> {
    let folder = match parent {
        Some(parent) => tempfile::tempdir_in(parent)?,
        None => tempfile::tempdir()?,
    };
    let tmpfs = 0x0102_1994;
    if rustix::fs::statfs(folder.path())?.f_type == tmpfs {
        let path = folder.path().display();
        return Err(format!("{path} is in memory; name a folder on a disk with --folder").into());
    }
    Ok(folder)
}
