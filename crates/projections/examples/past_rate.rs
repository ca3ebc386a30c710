//! How long answers about the past take, on an embedded log.
//!
//! `cargo run --release -p daybook-projections --example past_rate -- 1000000`

use std::error::Error;
use std::sync::Arc;
use std::time::{Duration, Instant};

use daybook_events::log::{Append, Expected};
use daybook_events::testing::fleet::{Fleet, Size, choices};
use daybook_events::{EventLog, Position};
use daybook_projections::{DeploymentFilter, Ledger, Page, Projections, replay};
use daybook_store::embedded::{EmbeddedConfig, EmbeddedLog};
use futures_util::{StreamExt, TryStreamExt, stream};

/// Questions of each kind.
const QUESTIONS: u32 = 100;

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    let events: u64 = std::env::args().nth(1).map_or(Ok(100_000), |n| n.parse())?;
    let dir = tempfile::tempdir()?;
    let log = EmbeddedLog::open(dir.path().join("log"), EmbeddedConfig::default()).await?;
    let log: Arc<dyn EventLog> = Arc::new(log);
    let mut fleet = Fleet::new(Size {
        projects: 20,
        services: 3,
        active: 10,
    });
    let mut choose = choices(1);
    let appends = stream::iter((0..events).map(|_| {
        let happened = fleet.next(&mut choose);
        let log = log.clone();
        async move {
            log.append(Append {
                subject: happened.subject,
                id: happened.id,
                expected: Expected::Any,
                bytes: happened.bytes,
            })
            .await
        }
    }));
    appends
        .buffered(256)
        .try_for_each(|_| async { Ok(()) })
        .await?;

    let projections = Projections::open(&dir.path().join("projections"))?;
    let start = Instant::now();
    replay::fold_to(&projections, &log, Position(events), |_| {}).await?;
    println!("{events} events folded in {:?}", start.elapsed());
    let ledger = Ledger::new(log, projections);

    let mut answers = [const { Vec::new() }; 3];
    for _ in 0..QUESTIONS {
        let at = Position(1 + u64::from(choose(u32::try_from(events)?)));
        let start = Instant::now();
        let overview = ledger.overview_at(at, None, None).await?;
        answers[0].push(start.elapsed());
        assert!(overview.position == at);
        let start = Instant::now();
        ledger
            .history_at(at, &DeploymentFilter::default(), Page::default())
            .await?;
        answers[1].push(start.elapsed());
        let start = Instant::now();
        ledger.state_hash_at(at).await?;
        answers[2].push(start.elapsed());
    }
    for (what, took) in ["state", "history", "state hash"].iter().zip(&mut answers) {
        took.sort();
        let at = |part: usize| -> Duration { took[(took.len() - 1) * part / 100] };
        println!(
            "{what}: p50 {:?} p99 {:?} most {:?}",
            at(50),
            at(99),
            at(100)
        );
    }
    Ok(())
}
