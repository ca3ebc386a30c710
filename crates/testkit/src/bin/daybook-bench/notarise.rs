//! Workload B: from an acknowledged event to the published checkpoint that covers it, and what the
//! notary costs.

use std::collections::VecDeque;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use daybook_events::log::{Append, EventLog, Expected};
use daybook_events::tree::PublishedTree;
use daybook_events::{EventId, Position, Subject};
use daybook_store::tlog::{FolderStorage, KeyRing, Notary, NotaryOptions, SignerKey};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::report::{Comparison, Report};
use crate::writers::{Prepared, Side};
use crate::{Failure, logs, temporary_folder};

/// Longest time from an acknowledgement to the published checkpoint, 99 % of them.
const PROMISED_P99: Duration = Duration::from_millis(1500);
/// Thousandths of a core for 1,000 events a second.
const PROMISED_CPU: f64 = 150.0;
/// The part of workload A's append rate that the notary has to keep up with.
const KEEPS_UP: f64 = 0.9;

#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// Rounds
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..))]
    rounds: u32,

    /// Seconds for each part of each round
    #[arg(long, default_value_t = 5.0)]
    seconds: f64,

    /// How many writers at once
    #[arg(long, default_value_t = 16)]
    writers: usize,

    /// Events a second at which the cost of the notary is measured
    #[arg(long, default_value_t = 1000)]
    rate: u32,

    /// Number of aggregates
    #[arg(long, default_value_t = 1000)]
    aggregates: usize,

    /// Bytes of an event
    #[arg(long, default_value_t = 1024)]
    bytes: usize,

    /// Folder for the log and the tiles, on the disk that is to be measured
    #[arg(long, value_name = "FOLDER")]
    folder: Option<PathBuf>,
}

/// A log that notes when each event was acknowledged, and takes no more than so many a second.
struct Observed {
    log: Arc<dyn EventLog>,
    acknowledged: Arc<Mutex<VecDeque<(u64, Instant)>>>,
    pace: Option<(Duration, Mutex<Instant>)>,
}

impl Side for Observed {
    type Aggregate = Subject;

    fn aggregate(&self, subject: &Subject) -> Subject {
        subject.clone()
    }

    async fn append(
        &self,
        aggregate: &Subject,
        id: EventId,
        last: Position,
        bytes: Bytes,
    ) -> Result<Position, Failure> {
        if let Some((apart, next)) = &self.pace {
            let turn = {
                let mut next = next.lock().unwrap_or_else(PoisonError::into_inner);
                // What was missed is not made up for.
                let turn = Instant::now().max(*next);
                *next = turn + *apart;
                turn
            };
            tokio::time::sleep_until(turn).await;
        }
        let append = Append {
            subject: aggregate.clone(),
            id,
            expected: Expected::Last(last),
            bytes,
        };
        let position = self.log.append(append).await?.position;
        let mut acknowledged = self
            .acknowledged
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        acknowledged.push_back((position.0, Instant::now()));
        Ok(position)
    }
}

/// One run: what was appended, what of it was signed, and how long that took.
struct Found {
    appended: f64,
    signed: f64,
    /// Sorted.
    delays: Vec<Duration>,
    cpu: Duration,
}

impl Found {
    fn delay_ms(&self, per_thousand: usize) -> f64 {
        let at = (self.delays.len() * per_thousand / 1000).min(self.delays.len().saturating_sub(1));
        self.delays
            .get(at)
            .map_or(f64::NAN, |d| d.as_secs_f64() * 1000.0)
    }
}

pub(crate) async fn run(options: Options) -> Result<Report, Failure> {
    let (mut flat, mut paced, mut alone) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..options.rounds {
        flat.push(options.measure(None, true).await?);
        paced.push(options.measure(Some(options.rate), true).await?);
        alone.push(options.measure(Some(options.rate), false).await?);
    }
    let figures = |found: &[Found], of: fn(&Found) -> f64| found.iter().map(of).collect::<Vec<_>>();
    let mut comparisons = vec![Comparison {
        subject: format!("events/s signed, {} writers flat out", options.writers),
        yardstick: "events/s appended",
        measured: figures(&flat, |f| f.signed),
        against: figures(&flat, |f| f.appended),
        limit: Some(KEEPS_UP),
    }];
    let promised = PROMISED_P99.as_secs_f64() * 1000.0;
    for (name, found) in [("flat out", &flat), ("paced", &paced)] {
        comparisons.push(Comparison {
            subject: format!("p99 from append to published, {name}: ms promised"),
            yardstick: "ms found",
            measured: vec![promised; found.len()],
            against: figures(found, |f| f.delay_ms(990)),
            limit: Some(1.0),
        });
        comparisons.push(Comparison {
            subject: format!("p50, {name}: ms promised for p99"),
            yardstick: "ms found",
            measured: vec![promised; found.len()],
            against: figures(found, |f| f.delay_ms(500)),
            limit: None,
        });
    }
    let cost = |(with, without): (&Found, &Found)| {
        let a_second = |f: &Found| f.cpu.as_secs_f64() / options.seconds;
        // Never nothing, so that there is a ratio.
        let cores = (a_second(with) - a_second(without)).max(0.0001);
        cores * 1000.0 / (with.appended / 1000.0)
    };
    comparisons.push(Comparison {
        subject: "CPU of the notary: 1/1000 core per 1,000 events/s promised".to_owned(),
        yardstick: "1/1000 core found",
        measured: vec![PROMISED_CPU; paced.len()],
        against: paced.iter().zip(&alone).map(cost).collect(),
        limit: Some(1.0),
    });
    Ok(Report {
        title: format!(
            "Events of {} bytes to signed and published checkpoints, embedded log and tiles on one \
             disk, default settings of the notary; {} rounds of {} s; paced is {} events/s",
            options.bytes, options.rounds, options.seconds, options.rate
        ),
        unit: "see there",
        comparisons,
    })
}

impl Options {
    async fn measure(&self, rate: Option<u32>, with_notary: bool) -> Result<Found, Failure> {
        let folder = temporary_folder(self.folder.as_deref())?;
        let log = logs::embedded(&folder.path().join("log")).await?;
        let acknowledged = Arc::new(Mutex::new(VecDeque::new()));
        let mut side = Observed {
            log: Arc::clone(&log),
            acknowledged: Arc::clone(&acknowledged),
            pace: None,
        };
        if let Some(rate) = rate {
            let apart = Duration::from_secs(1) / rate;
            side.pace = Some((apart, Mutex::new(Instant::now())));
        }
        let mut writers = Prepared::new(side, self.aggregates, self.bytes).await?;
        let before = log.head().await?.0;
        let cancel = CancellationToken::new();
        let mut running = None;
        if with_notary {
            let storage = Arc::new(FolderStorage::new(folder.path().join("tlog")));
            let keys = KeyRing::of(SignerKey::generate("bench.example.com/tlog")?);
            let notary = Notary::open(Arc::clone(&log), storage, keys, NotaryOptions::default());
            let notary = notary.await?;
            let tree = notary.tree();
            let ended = tokio::spawn(notary.run(cancel.clone()));
            reach(&*tree, before).await;
            running = Some((tree, ended));
        }
        acknowledged
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clear();
        let watch = running.as_ref().map(|(tree, _)| {
            let (tree, cancel) = (Arc::clone(tree), cancel.clone());
            tokio::spawn(watch(tree, Arc::clone(&acknowledged), cancel))
        });
        let (cpu, began) = (cpu_time(), Instant::now());
        let duration = Duration::try_from_secs_f64(self.seconds)?;
        let appended = writers.events_per_second(self.writers, duration).await?;
        let cpu = cpu_time().saturating_sub(cpu);
        let mut found = Found {
            appended,
            signed: 0.0,
            delays: Vec::new(),
            cpu,
        };
        if let (Some((tree, ended)), Some(watch)) = (running, watch) {
            let head = log.head().await?.0;
            reach(&*tree, head).await;
            found.signed = (head - before) as f64 / began.elapsed().as_secs_f64();
            cancel.cancel();
            found.delays = watch.await?;
            found.delays.sort_unstable();
            ended.await??;
        }
        eprint!(".");
        Ok(found)
    }
}

async fn reach(tree: &dyn PublishedTree, size: u64) {
    while tree.head().is_none_or(|signed| signed.head.size < size) {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
}

/// Notes for each acknowledged event how long it took until it was covered by what is published.
async fn watch(
    tree: Arc<dyn PublishedTree>,
    acknowledged: Arc<Mutex<VecDeque<(u64, Instant)>>>,
    cancel: CancellationToken,
) -> Vec<Duration> {
    let (mut delays, mut seen) = (Vec::new(), 0);
    while !cancel.is_cancelled() {
        tokio::time::sleep(Duration::from_millis(1)).await;
        let size = tree.head().map_or(0, |signed| signed.head.size);
        if size == seen {
            continue;
        }
        seen = size;
        let now = Instant::now();
        let mut waiting = acknowledged.lock().unwrap_or_else(PoisonError::into_inner);
        waiting.retain(|(position, at)| {
            let covered = *position <= size;
            if covered {
                delays.push(now.saturating_duration_since(*at));
            }
            !covered
        });
    }
    delays
}

/// What this process has used so far.
fn cpu_time() -> Duration {
    let used = rustix::time::clock_gettime(rustix::time::ClockId::ProcessCPUTime);
    Duration::new(
        used.tv_sec.try_into().unwrap_or_default(),
        used.tv_nsec.try_into().unwrap_or_default(),
    )
}
