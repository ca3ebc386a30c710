//! What the ledger was at a position: how long an answer takes, with the state hash there, as the
//! HTTP server puts it together.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use daybook_events::log::{Append, EventLog, Expected};
use daybook_events::testing::fleet::{Fleet, Size, choices};
use daybook_events::{Position, with_causes};
use daybook_projections::{DeploymentFilter, Ledger, Page, Projections, replay};
use futures_util::{StreamExt as _, TryStreamExt as _, stream};

use crate::logs;
use crate::report::{Comparison, Report};
use crate::{Failure, temporary_folder};

/// What is promised of the 99th percentile, in milliseconds.
const PROMISED_MS: f64 = 100.0;

#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// Events in the ledger
    #[arg(long, default_value_t = 1_000_000)]
    events: u32,
    /// Positions that are asked for in each round, all over the ledger
    #[arg(long, default_value_t = 100)]
    questions: usize,
    /// Rounds; the median of their 99th percentiles counts
    #[arg(long, default_value_t = 5)]
    rounds: usize,
    /// Folder for the log and the projections
    #[arg(long, value_name = "FOLDER")]
    folder: Option<PathBuf>,
}

/// What is asked for.
#[derive(Debug, Clone, Copy)]
enum Question {
    /// `GET /api/v1/state?at=`
    State,
    /// `GET /api/v1/history?at=`
    History,
    /// The state hash alone, which every answer carries.
    Hash,
}

pub(crate) async fn run(options: Options) -> Result<Report, Failure> {
    let folder = temporary_folder(options.folder.as_deref())?;
    let log = logs::embedded(&folder.path().join("log")).await?;
    eprint!("writing {} events ", options.events);
    History::new().write(&log, options.events).await?;
    let projections = Projections::open(&folder.path().join("projections"))?;
    replay::fold_to(
        &projections,
        &log,
        Position(u64::from(options.events)),
        |_| {},
    )
    .await?;
    eprintln!("and folding them: done");
    let ledger = Ledger::new(log, projections);

    let questions = [
        (Question::State, "what ran where, with the state hash"),
        (
            Question::History,
            "a page of the history, with the state hash",
        ),
        (Question::Hash, "the state hash alone"),
    ];
    let mut choose = choices(7);
    let mut comparisons = Vec::new();
    for (question, what) in questions {
        let (mut all, mut p99s) = (Vec::new(), Vec::new());
        for _ in 0..options.rounds {
            let mut taken = Vec::with_capacity(options.questions);
            for _ in 0..options.questions {
                let at = Position(1 + u64::from(choose(options.events)));
                taken.push(ask(&ledger, question, at).await?.as_secs_f64() * 1000.0);
            }
            all.extend_from_slice(&taken);
            p99s.push(percentile(&mut taken, 99));
        }
        comparisons.push(Comparison {
            subject: format!(
                "{what} (p50 {:.0} ms, p99 {:.0} ms, longest {:.0} ms)",
                percentile(&mut all, 50),
                percentile(&mut all, 99),
                percentile(&mut all, 100)
            ),
            yardstick: "100 ms",
            measured: p99s.iter().map(|ms| 1000.0 / ms).collect(),
            against: p99s.iter().map(|_| 1000.0 / PROMISED_MS).collect(),
            limit: Some(1.0),
        });
    }
    Ok(Report {
        title: format!(
            "Answers about the past of {} events, one after the other, by the time of the 99th \
             percentile of {} answers",
            options.events, options.questions
        ),
        unit: "answers/s",
        notes: Vec::new(),
        comparisons,
    })
}

/// How long one answer takes. No position is asked for twice but by chance: hashes that were
/// worked out are remembered.
async fn ask(ledger: &Ledger, question: Question, at: Position) -> Result<Duration, Failure> {
    let begun = Instant::now();
    // As the server does it: the hash in a task of its own, beside the answer.
    let other = ledger.clone();
    let hash = tokio::spawn(async move { other.state_hash_at(at).await });
    match question {
        Question::State => drop(ledger.overview_at(at, None, None).await?),
        Question::History => drop(
            ledger
                .history_at(at, &DeploymentFilter::default(), Page::default())
                .await?,
        ),
        Question::Hash => {}
    }
    hash.await?
        .map_err(|e| format!("no state hash at {at}: {}", with_causes(&e)))?;
    Ok(begun.elapsed())
}

/// What happens to a fleet of 20 projects, with some 600 deployments that run at a time.
pub(crate) struct History {
    fleet: Fleet,
    choose: Box<dyn FnMut(u32) -> u32 + Send>,
}

impl History {
    pub(crate) fn new() -> Self {
        Self {
            fleet: Fleet::new(Size {
                projects: 20,
                services: 3,
                active: 10,
            }),
            choose: Box::new(choices(1)),
        }
    }

    /// What happens next.
    pub(crate) fn next(&mut self) -> Append {
        let happened = self.fleet.next(&mut self.choose);
        Append {
            subject: happened.subject,
            id: happened.id,
            expected: Expected::Any,
            bytes: happened.bytes,
        }
    }

    /// Appends the next events as fast as the log takes them.
    pub(crate) async fn write(
        &mut self,
        log: &Arc<dyn EventLog>,
        events: u32,
    ) -> Result<(), Failure> {
        let appends = stream::iter((0..events).map(|_| {
            let append = self.next();
            let log = Arc::clone(log);
            async move { log.append(append).await }
        }));
        appends
            .buffered(256)
            .try_for_each(|_| async { Ok(()) })
            .await?;
        Ok(())
    }
}

/// The value that so many percent do not exceed.
pub(crate) fn percentile(values: &mut [f64], percent: usize) -> f64 {
    values.sort_by(f64::total_cmp);
    let rank = (values.len() * percent).div_ceil(100).max(1);
    values.get(rank - 1).copied().unwrap_or(f64::NAN)
}
