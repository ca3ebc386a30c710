//! Workload B: from an event to the published checkpoint that covers it, against what was promised and
//! against Tessera, and what the notary costs.

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

use crate::coverage::{Acknowledged, Coverage, Delays};
use crate::report::{Comparison, Report};
use crate::tessera::{self, Load, Tessera};
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

    /// How many writers at once where both sides run flat out: two batches of Tessera by default,
    /// with which it is fastest
    #[arg(long, default_value_t = 512)]
    in_flight: usize,

    /// Most entries of a batch of Tessera
    #[arg(long, default_value_t = 256)]
    tessera_batch: u32,

    /// Folder for the logs and the tiles, on the disk that is to be measured
    #[arg(long, value_name = "FOLDER")]
    folder: Option<PathBuf>,
}

/// A log that notes when each event was acknowledged, and takes no more than so many a second.
struct Observed {
    log: Arc<dyn EventLog>,
    coverage: Arc<Coverage>,
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
        let called_at = Instant::now();
        let position = self.log.append(append).await?.position;
        self.coverage.acknowledge(Acknowledged {
            position,
            called_at,
            acknowledged_at: Instant::now(),
        });
        Ok(position)
    }
}

/// One run: events a second, and how long they took.
struct Found {
    appended: f64,
    /// What was published by the moment at which the writers stopped. What keeps up is behind by its
    /// delay then, and what does not by more the longer it goes on.
    meanwhile: f64,
    /// All that was appended, over the time until it was published. That is as long as the notary
    /// waits for more at the end, and the shorter the run, the more of it.
    signed: f64,
    delays: Delays,
    cpu: Duration,
}

pub(crate) async fn run(options: Options) -> Result<Report, Failure> {
    let (mut flat, mut paced, mut alone) = (Vec::new(), Vec::new(), Vec::new());
    let mut against_tessera = Tessera::find().map(AgainstTessera::new);
    for round in 0..options.rounds {
        let tessera_first = round % 2 == 1;
        if let Some(against) = against_tessera.as_mut().filter(|_| tessera_first) {
            against.measure(&options).await?;
        }
        flat.push(options.measure(options.writers, None, true).await?);
        let rate = Some(options.rate);
        paced.push(options.measure(options.writers, rate, true).await?);
        alone.push(options.measure(options.writers, rate, false).await?);
        if let Some(against) = &mut against_tessera {
            against
                .wide
                .push(options.measure(options.in_flight, None, true).await?);
        }
        if let Some(against) = against_tessera.as_mut().filter(|_| !tessera_first) {
            against.measure(&options).await?;
        }
    }
    let mut comparisons = vec![Comparison {
        subject: format!(
            "events/s published while {} writers are flat out",
            options.writers
        ),
        yardstick: "events/s appended",
        measured: figures(&flat, |f| f.meanwhile),
        against: figures(&flat, |f| f.appended),
        limit: Some(KEEPS_UP),
    }];
    let promised = PROMISED_P99.as_secs_f64() * 1000.0;
    for (name, found) in [("flat out", &flat), ("paced", &paced)] {
        comparisons.push(Comparison {
            subject: format!("p99 from append to published, {name}: ms promised"),
            yardstick: "ms found",
            measured: vec![promised; found.len()],
            against: figures(found, |f| f.delays.since_acknowledged.ms(990)),
            limit: Some(1.0),
        });
        comparisons.push(Comparison {
            subject: format!("p50, {name}: ms promised for p99"),
            yardstick: "ms found",
            measured: vec![promised; found.len()],
            against: figures(found, |f| f.delays.since_acknowledged.ms(500)),
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
    let mut notes = Vec::new();
    if let Some(against) = against_tessera {
        notes = against.notes(&options);
        comparisons.extend(against.comparisons(options.in_flight, &paced));
    }
    Ok(Report {
        title: format!(
            "Events of {} bytes to signed and published checkpoints, embedded log and tiles on one \
             disk, default settings of the notary; {} rounds of {} s; paced is {} events/s",
            options.bytes, options.rounds, options.seconds, options.rate
        ),
        unit: "see there",
        notes,
        comparisons,
    })
}

fn figures<T>(found: &[T], of: impl Fn(&T) -> f64) -> Vec<f64> {
    found.iter().map(of).collect()
}

/// The same work done by Tessera.
struct AgainstTessera {
    tessera: Tessera,
    /// Daybook flat out with as many writers as suit Tessera.
    wide: Vec<Found>,
    runs: [TesseraRuns; 2],
}

/// Its runs with one checkpoint interval.
struct TesseraRuns {
    interval: Duration,
    flat: Vec<tessera::Run>,
    paced: Vec<tessera::Run>,
}

impl AgainstTessera {
    fn new(tessera: Tessera) -> Self {
        let intervals = [NotaryOptions::default().max_delay, tessera::LEAST_INTERVAL];
        Self {
            tessera,
            wide: Vec::new(),
            runs: intervals.map(|interval| TesseraRuns {
                interval,
                flat: Vec::new(),
                paced: Vec::new(),
            }),
        }
    }

    async fn measure(&mut self, options: &Options) -> Result<(), Failure> {
        for runs in &mut self.runs {
            let flat_out = Load {
                folder: options.folder.as_deref(),
                seconds: options.seconds,
                bytes: options.bytes,
                in_flight: options.in_flight,
                rate: None,
                checkpoint_interval: runs.interval,
                batch: options.tessera_batch,
            };
            let paced = Load {
                rate: Some(options.rate),
                ..flat_out
            };
            runs.flat.push(self.tessera.run(flat_out).await?);
            runs.paced.push(self.tessera.run(paced).await?);
        }
        Ok(())
    }

    fn comparisons(&self, writers: usize, paced: &[Found]) -> Vec<Comparison> {
        let wide = &self.wide;
        let mut comparisons = Vec::new();
        for runs in &self.runs {
            let each = format!("its checkpoints each {} ms", runs.interval.as_millis());
            let mut compare = |subject, yardstick, measured, against| {
                comparisons.push(Comparison {
                    subject: format!("{subject}; {each}"),
                    yardstick,
                    measured,
                    against,
                    limit: None,
                });
            };
            compare(
                format!("events/s appended, {writers} writers flat out"),
                "Tessera",
                figures(wide, |f| f.appended),
                figures(&runs.flat, |r| r.durable_per_second),
            );
            compare(
                format!("events/s signed, {writers} writers flat out"),
                "Tessera",
                figures(wide, |f| f.signed),
                figures(&runs.flat, |r| r.published_per_second),
            );
            for (name, tessera, daybook) in [
                ("flat out", &runs.flat, wide.as_slice()),
                ("paced", &runs.paced, paced),
            ] {
                compare(
                    format!("p50 from call to published, {name}: ms of Tessera"),
                    "ms of Daybook",
                    figures(tessera, |r| r.p50_ms),
                    figures(daybook, |f| f.delays.since_called.ms(500)),
                );
                compare(
                    format!("p99 from call to published, {name}: ms of Tessera"),
                    "ms of Daybook",
                    figures(tessera, |r| r.p99_ms),
                    figures(daybook, |f| f.delays.since_called.ms(990)),
                );
            }
        }
        comparisons
    }

    /// How Tessera was set, and in what the two sides differ.
    fn notes(&self, options: &Options) -> Vec<String> {
        let [alike, least] = self.runs.each_ref().map(|runs| runs.interval.as_millis());
        let ran = self.runs[0].flat.first();
        let (version, syncs) = ran.map_or(("", ""), |run| (&run.version, &run.syncs));
        vec![
            format!(
                "Tessera {version}, POSIX driver, Ed25519, batches of {} entries or 250 ms, \
                 checkpoints each {alike} ms, as the notary's longest delay, and each {least} ms, \
                 the least that the driver takes.",
                options.tessera_batch
            ),
            format!(
                "Daybook syncs before it acknowledges (fdatasync of its log), and tiles and checkpoint \
                 before they are published. Tessera syncs {syncs}."
            ),
            "Daybook compares and sets, knows each event by its id, and stores it twice, in the log \
             and in the tiles; Tessera stores it once, in the tiles, and acknowledges what is in the \
             tree. So Tessera's writers wait for its tree, and Daybook's do not wait for the \
             notary: flat out, what is not signed yet may pile up. Daybook signs at 256 events or \
             after its longest delay."
                .to_owned(),
            format!(
                "Paced, Daybook's {} writers each wait for their acknowledgement, as everywhere; \
                 Tessera's entries come at fixed times, because writers that wait for a batch do not \
                 fill one.",
                options.writers
            ),
        ]
    }
}

impl Options {
    async fn measure(
        &self,
        at_once: usize,
        rate: Option<u32>,
        with_notary: bool,
    ) -> Result<Found, Failure> {
        let folder = temporary_folder(self.folder.as_deref())?;
        let log = logs::embedded(&folder.path().join("log")).await?;
        let coverage = Arc::new(Coverage::default());
        let mut side = Observed {
            log: Arc::clone(&log),
            coverage: Arc::clone(&coverage),
            pace: None,
        };
        if let Some(rate) = rate {
            let apart = Duration::from_secs(1) / rate;
            side.pace = Some((apart, Mutex::new(Instant::now())));
        }
        let mut writers = Prepared::new(side, self.aggregates.max(at_once), self.bytes).await?;
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
        coverage.begin();
        let watching = running.as_ref().map(|(tree, _)| {
            let watching = Arc::clone(&coverage).watch(Arc::clone(tree), cancel.clone());
            tokio::spawn(watching)
        });
        let (cpu, began) = (cpu_time(), Instant::now());
        let duration = Duration::try_from_secs_f64(self.seconds)?;
        let appended = writers.events_per_second(at_once, duration).await?;
        let published = running.as_ref().and_then(|(tree, _)| tree.head());
        let meanwhile = published.map_or(0, |p| p.head.size.saturating_sub(before));
        let cpu = cpu_time().saturating_sub(cpu);
        let mut found = Found {
            appended,
            meanwhile: 0.0,
            signed: 0.0,
            delays: Delays::default(),
            cpu,
        };
        if let (Some((tree, ended)), Some(watching)) = (running, watching) {
            let head = log.head().await?.0;
            reach(&*tree, head).await;
            coverage.publish(head);
            found.meanwhile = appended * meanwhile as f64 / (head - before).max(1) as f64;
            found.signed = (head - before) as f64 / began.elapsed().as_secs_f64();
            found.delays = coverage.take_delays();
            cancel.cancel();
            watching.await?;
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

/// What this process has used so far.
fn cpu_time() -> Duration {
    let used = rustix::time::clock_gettime(rustix::time::ClockId::ProcessCPUTime);
    Duration::new(
        used.tv_sec.try_into().unwrap_or_default(),
        used.tv_nsec.try_into().unwrap_or_default(),
    )
}
