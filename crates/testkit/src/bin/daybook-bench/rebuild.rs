//! Workload F: projections from nothing, against a raw read of the same stream.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use async_nats::jetstream;
use async_nats::jetstream::consumer::push;
use daybook_events::log::{Append, EventLog, Expected};
use daybook_events::{Position, SubjectFilter};
use daybook_projections::{Counters, Projections, runner};
use daybook_testkit::nats::{NatsBinary, NatsServer};
use futures_util::StreamExt as _;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use crate::logs::{self, Backend};
use crate::report::{Comparison, Report};
use crate::sample_ledger::SampleProject;
use crate::{Failure, temporary_folder};

/// The ratio that a rebuild is to reach of a raw read of the stream.
const LIMIT: f64 = 0.4;
/// Projects in the ledger; each is written by a task of its own.
const PROJECTS: usize = 64;
/// Events of one page, where the embedded log is read page by page.
const PAGE: usize = 8192;

#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// Only this backend
    #[arg(long, value_enum)]
    only: Option<Backend>,

    /// Events in the ledger
    #[arg(long, default_value_t = 1_000_000)]
    events: usize,

    /// Rounds; each side runs once in each of them
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..))]
    rounds: u32,

    /// Folder for the embedded log and the projections, on the disk that is to be measured
    #[arg(long, value_name = "FOLDER")]
    folder: Option<PathBuf>,
}

pub(crate) async fn run(options: Options) -> Result<Report, Failure> {
    let mut comparisons = Vec::new();
    if options.only != Some(Backend::Embedded) {
        let servers = NatsBinary::installed()
            .into_iter()
            .chain(NatsBinary::newest());
        for binary in servers {
            let server = NatsServer::start(&binary).await;
            let log = logs::jetstream(&server.url()).await?;
            let stream = RawStream::of_the_log(&server.url()).await?;
            comparisons.push(
                options
                    .compare(binary.to_string(), log, Raw::Stream(Box::new(stream)))
                    .await?,
            );
        }
    }
    if options.only != Some(Backend::Jetstream) {
        let folder = temporary_folder(options.folder.as_deref())?;
        let log = logs::embedded(&folder.path().join("log")).await?;
        let raw = Raw::Pages(Arc::clone(&log));
        comparisons.push(options.compare("embedded".into(), log, raw).await?);
    }
    Ok(Report {
        title: format!(
            "Projections of {} events from nothing; medians of {} interleaved rounds",
            options.events, options.rounds
        ),
        unit: "events/s",
        notes: Vec::new(),
        comparisons,
    })
}

impl Options {
    async fn compare(
        &self,
        subject: String,
        log: Arc<dyn EventLog>,
        raw: Raw,
    ) -> Result<Comparison, Failure> {
        eprint!("{subject}: writing {} events ", self.events);
        write_ledger(&log, self.events).await?;
        let (mut measured, mut against) = (Vec::new(), Vec::new());
        let mut digest = None;
        for round in 0..self.rounds {
            let mut rebuild = None;
            for turn in 0..2 {
                let start = Instant::now();
                if (round + turn) % 2 == 0 {
                    let folder = temporary_folder(self.folder.as_deref())?;
                    let rebuilt = Projections::open(folder.path())?;
                    fold(&rebuilt, &log, self.events).await?;
                    measured.push(self.events as f64 / start.elapsed().as_secs_f64());
                    rebuild = Some((folder, rebuilt));
                } else {
                    raw.read(self.events).await?;
                    against.push(self.events as f64 / start.elapsed().as_secs_f64());
                }
                eprint!(".");
            }
            let Some((_folder, rebuilt)) = rebuild else {
                continue;
            };
            let this = rebuilt.digest()?;
            if *digest.get_or_insert(this.clone()) != this {
                return Err("two rebuilds of the same ledger differ".into());
            }
        }
        eprintln!();
        let limit = matches!(raw, Raw::Stream(_)).then_some(LIMIT);
        Ok(Comparison {
            subject,
            yardstick: raw.name(),
            measured,
            against,
            limit,
        })
    }
}

/// Writes so many events, those of each project in order.
async fn write_ledger(log: &Arc<dyn EventLog>, events: usize) -> Result<(), Failure> {
    let mut tasks = JoinSet::new();
    for number in 0..PROJECTS {
        let share = events / PROJECTS + usize::from(number < events % PROJECTS);
        let log = Arc::clone(log);
        tasks.spawn(async move {
            let mut project = SampleProject::new(number)?;
            for _ in 0..share {
                let sample = project.next()?;
                let append = Append {
                    subject: sample.subject,
                    id: sample.id,
                    expected: Expected::Any,
                    bytes: sample.bytes,
                };
                log.append(append).await?;
            }
            Ok::<_, Failure>(())
        });
    }
    while let Some(ended) = tasks.join_next().await {
        ended??;
    }
    Ok(())
}

/// Folds the whole log. It is an error if an event counts for nothing: such a ledger is cheaper to
/// fold than a real one.
async fn fold(
    projections: &Projections,
    log: &Arc<dyn EventLog>,
    events: usize,
) -> Result<(), Failure> {
    let cancel = CancellationToken::new();
    let runner = tokio::spawn(runner::run(
        projections.clone(),
        Arc::clone(log),
        cancel.clone(),
    ));
    let end = Position(events as u64);
    let reached = projections.wait_for(end, Duration::from_secs(600)).await;
    cancel.cancel();
    runner.await??;
    reached?;
    let counted = projections.counters();
    let expected = Counters {
        events: events as u64,
        ..Counters::default()
    };
    if counted != expected {
        return Err(format!("not every event of the sample counts: {counted:?}").into());
    }
    Ok(())
}

/// The yardstick: every event, and nothing done with it.
enum Raw {
    /// An ordered consumer of the server itself.
    Stream(Box<RawStream>),
    /// Pages of the embedded log.
    Pages(Arc<dyn EventLog>),
}

impl Raw {
    fn name(&self) -> &'static str {
        match self {
            Self::Stream(_) => "ordered consumer",
            Self::Pages(_) => "pages of the log",
        }
    }

    async fn read(&self, events: usize) -> Result<(), Failure> {
        match self {
            Self::Stream(stream) => stream.read(events).await,
            Self::Pages(log) => {
                let (mut last, mut read) = (Position::ZERO, 0);
                while read < events {
                    let page = log.read(last, &SubjectFilter::default(), PAGE).await?;
                    last = page.last().ok_or("the log ended early")?.position;
                    read += page.len();
                }
                Ok(())
            }
        }
    }
}

/// The log's stream, read without the log.
struct RawStream {
    client: async_nats::Client,
    stream: jetstream::stream::Stream,
}

impl RawStream {
    async fn of_the_log(url: &str) -> Result<Self, Failure> {
        let client = async_nats::connect(url).await?;
        let context = jetstream::new(client.clone());
        let name = context.stream_by_subject(logs::ANY_SUBJECT).await?;
        let stream = context.get_stream(name).await?;
        Ok(Self { client, stream })
    }

    async fn read(&self, events: usize) -> Result<(), Failure> {
        let config = push::OrderedConfig {
            deliver_subject: self.client.new_inbox(),
            ..push::OrderedConfig::default()
        };
        let consumer = self.stream.create_consumer(config).await?;
        let mut messages = consumer.messages().await?;
        for _ in 0..events {
            messages.next().await.ok_or("the stream ended early")??;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn every_event_of_the_sample_counts() {
        let folder = tempfile::tempdir().unwrap();
        let log = logs::embedded(&folder.path().join("log")).await.unwrap();
        // Enough for each project to replace and remove a deployment.
        write_ledger(&log, PROJECTS * 200).await.unwrap();
        let projections = Projections::in_memory();
        fold(&projections, &log, PROJECTS * 200).await.unwrap();
    }
}
