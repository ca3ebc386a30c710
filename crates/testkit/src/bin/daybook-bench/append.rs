//! Workload A: appends with compare-and-set on, over many aggregates, by 1, 16 and 64 writers.

use std::path::PathBuf;
use std::time::Duration;

use daybook_events::log::Durability;
use daybook_testkit::nats::{NatsBinary, NatsServer, NatsSettings};

use crate::group_commit_file::GroupCommitFile;
use crate::logs::{self, Backend};
use crate::raw_publish::RawPublish;
use crate::report::{Comparison, Report};
use crate::writers::{Log, Prepared, Side};
use crate::{Failure, temporary_folder};

/// The ratio that appends over JetStream are to reach.
const JETSTREAM_LIMIT: f64 = 0.9;

#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// Only this backend
    #[arg(long, value_enum)]
    only: Option<Backend>,

    /// How many writers at once
    #[arg(long, value_delimiter = ',', default_values_t = [1, 16, 64])]
    writers: Vec<usize>,

    /// Rounds; each side runs once in each of them
    #[arg(long, default_value_t = 9, value_parser = clap::value_parser!(u32).range(1..))]
    rounds: u32,

    /// Seconds for each side in each round
    #[arg(long, default_value_t = 1.0)]
    seconds: f64,

    /// Number of aggregates
    #[arg(long, default_value_t = 10_000)]
    aggregates: usize,

    /// Bytes of an event
    #[arg(long, default_value_t = 1024)]
    bytes: usize,

    /// Folder for the embedded log and the plain file, on the disk that is to be measured
    #[arg(long, value_name = "FOLDER")]
    folder: Option<PathBuf>,
}

pub(crate) async fn run(options: Options) -> Result<Report, Failure> {
    let mut comparisons = Vec::new();
    if options.only != Some(Backend::Jetstream) {
        embedded(&options, &mut comparisons).await?;
    }
    if options.only != Some(Backend::Embedded) {
        for (binary, sync_always) in servers() {
            jetstream(&options, &binary, sync_always, &mut comparisons).await?;
        }
    }
    Ok(Report {
        title: format!(
            "Appends of {} bytes with compare-and-set to {} aggregates; medians of {} interleaved \
             rounds of {} s",
            options.bytes, options.aggregates, options.rounds, options.seconds
        ),
        unit: "events/s",
        notes: Vec::new(),
        comparisons,
    })
}

/// The servers to measure, and whether each syncs before it acknowledges.
fn servers() -> Vec<(NatsBinary, bool)> {
    let mut servers: Vec<_> = NatsBinary::installed()
        .into_iter()
        .map(|binary| (binary, false))
        .collect();
    match NatsBinary::newest() {
        Some(newest) => servers.extend([(newest.clone(), false), (newest, true)]),
        None => daybook_testkit::left_out("there is no newest nats-server; run cargo xtask tools"),
    }
    servers
}

async fn embedded(options: &Options, found: &mut Vec<Comparison>) -> Result<(), Failure> {
    let folder = temporary_folder(options.folder.as_deref())?;
    let folder = folder.path();
    let log = logs::embedded(&folder.join("log")).await?;
    if log.info().await?.durability != Durability::Synced {
        return Err("the embedded log acknowledges before it syncs: nothing to compare".into());
    }
    let mut log = options.prepare(Log(log)).await?;
    let plain = GroupCommitFile::create(&folder.join("plain"), false)?;
    let mut plain = options.prepare(plain).await?;
    let ahead = GroupCommitFile::create(&folder.join("ahead"), true)?;
    let mut ahead = options.prepare(ahead).await?;

    for &writers in &options.writers {
        let mut figures = [Vec::new(), Vec::new(), Vec::new()];
        for round in 0..options.rounds as usize {
            for turn in 0..3 {
                let side = (round + turn) % 3;
                let figure = match side {
                    0 => options.measure(&mut log, writers).await?,
                    1 => options.measure(&mut plain, writers).await?,
                    _ => options.measure(&mut ahead, writers).await?,
                };
                figures[side].push(figure);
            }
        }
        let [measured, plain, ahead] = figures;
        let compared = |yardstick, against, limit| Comparison {
            subject: format!("embedded, {}", in_words(writers)),
            yardstick,
            measured: measured.clone(),
            against,
            limit,
        };
        found.push(compared(
            "plain file",
            plain,
            Some(if writers <= 16 { 0.8 } else { 0.6 }),
        ));
        found.push(compared("plain file, allocated ahead", ahead, None));
    }
    Ok(())
}

async fn jetstream(
    options: &Options,
    binary: &NatsBinary,
    sync_always: bool,
    found: &mut Vec<Comparison>,
) -> Result<(), Failure> {
    let settings = NatsSettings {
        sync_always,
        ..NatsSettings::default()
    };
    let server = NatsServer::start_with(binary, settings).await;
    let mut log = options
        .prepare(Log(logs::jetstream(&server.url()).await?))
        .await?;
    let raw = RawPublish::beside_the_log(&server.url()).await?;
    let mut raw = options.prepare(raw).await?;
    raw.side().sends_what_the_log_sends().await?;
    let sync = if sync_always {
        "sync always"
    } else {
        "default sync"
    };
    for &writers in &options.writers {
        let (mut measured, mut against) = (Vec::new(), Vec::new());
        for round in 0..options.rounds {
            if round % 2 == 0 {
                measured.push(options.measure(&mut log, writers).await?);
                against.push(options.measure(&mut raw, writers).await?);
            } else {
                against.push(options.measure(&mut raw, writers).await?);
                measured.push(options.measure(&mut log, writers).await?);
            }
        }
        found.push(Comparison {
            subject: format!("{binary}, {sync}, {}", in_words(writers)),
            yardstick: "raw publish",
            measured,
            against,
            limit: Some(JETSTREAM_LIMIT),
        });
    }
    Ok(())
}

impl Options {
    async fn prepare<S: Side>(&self, side: S) -> Result<Prepared<S>, Failure> {
        Prepared::new(side, self.aggregates, self.bytes).await
    }

    async fn measure<S: Side>(
        &self,
        side: &mut Prepared<S>,
        writers: usize,
    ) -> Result<f64, Failure> {
        let duration = Duration::try_from_secs_f64(self.seconds)?;
        let figure = side.events_per_second(writers, duration).await?;
        eprint!(".");
        Ok(figure)
    }
}

fn in_words(writers: usize) -> String {
    match writers {
        1 => "1 writer".to_owned(),
        n => format!("{n} writers"),
    }
}
