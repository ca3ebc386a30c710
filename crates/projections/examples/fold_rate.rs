//! How many events a second are folded into rows on disk, and how soon a live event is seen.
//!
//! `cargo run --release -p daybook-projections --example fold_rate -- 1000000`

use std::error::Error;
use std::sync::Arc;
use std::time::{Duration, Instant};

use daybook_events::EventLog;
use daybook_events::memory::MemoryLog;
use daybook_events::testing::fleet::{Fleet, Size, choices};
use daybook_projections::{Projections, replay, runner};
use futures_util::StreamExt;
use tokio_util::sync::CancellationToken;

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    let events: u64 = std::env::args().nth(1).map_or(Ok(100_000), |n| n.parse())?;
    let mut fleet = Fleet::new(Size {
        projects: 20,
        services: 3,
        active: 20,
    });
    let mut choose = choices(1);
    let memory = MemoryLog::new();
    let mut bytes = 0;
    for _ in 0..events {
        let happened = fleet.next(&mut choose);
        bytes += happened.bytes.len() as u64;
        memory.store(happened.subject, happened.bytes);
    }
    let log: Arc<dyn EventLog> = Arc::new(memory.clone());
    println!("{events} events of {} bytes", bytes / events.max(1));

    let rate = |what: &str, took: Duration| {
        println!("{what}: {:.0}/s", events as f64 / took.as_secs_f64());
    };
    let head = log.head().await?;
    let start = Instant::now();
    let mut tail = log
        .tail(daybook_events::Position::ZERO, Default::default())
        .await?;
    for _ in 0..events {
        tail.next().await.ok_or("the log ends early")??;
    }
    rate("read", start.elapsed());
    let start = Instant::now();
    for event in log
        .read(
            daybook_events::Position::ZERO,
            &Default::default(),
            events as usize,
        )
        .await?
    {
        event.event()?;
    }
    rate("envelopes decoded", start.elapsed());
    let dir = tempfile::tempdir()?;
    let start = Instant::now();
    replay::rebuild(dir.path(), &log, |_| {}).await?;
    rate("rebuilt on disk", start.elapsed());
    let projections = Projections::open(dir.path())?;
    if events <= 200_000 {
        let start = Instant::now();
        let memory = replay::state_at(&log, head).await?;
        rate("folded in memory", start.elapsed());
        assert_eq!(memory.digest()?, projections.digest()?);
    }

    let start = Instant::now();
    drop(projections);
    let projections = Projections::open(dir.path())?;
    println!("closed and opened: {:?}", start.elapsed());
    let cancel = CancellationToken::new();
    let running = tokio::spawn(runner::run(
        projections.clone(),
        log.clone(),
        cancel.clone(),
    ));
    let mut took = Vec::new();
    for _ in 0..2000 {
        let happened = fleet.next(&mut choose);
        let start = Instant::now();
        let position = memory.store(happened.subject, happened.bytes);
        projections
            .wait_for(position, Duration::from_secs(5))
            .await?;
        took.push(start.elapsed());
        tokio::time::sleep(Duration::from_micros(300)).await;
    }
    took.sort();
    println!("append to seen: p50 {:?} p99 {:?}", took[1000], took[1980]);
    cancel.cancel();
    running.await??;
    Ok(())
}
