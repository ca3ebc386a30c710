use std::fs;
use std::sync::Arc;

use daybook_events::log::{Consumer, ConsumerConfig, Delivery};

use super::*;

fn config() -> ConsumerConfig {
    ConsumerConfig {
        // Longer than a test waits: nothing comes again for having been forgotten.
        ack_wait: Duration::from_secs(3_600),
        ..ConsumerConfig::new("worker", SubjectFilter::default())
    }
}

async fn next(consumer: &Arc<dyn Consumer>) -> Delivery {
    soon(consumer.next()).await.unwrap()
}

/// The position and the attempt of the next deliveries, which are not answered.
async fn take(consumer: &Arc<dyn Consumer>, count: usize) -> Vec<(u64, u32)> {
    let mut out = Vec::new();
    for _ in 0..count {
        let delivery = next(consumer).await;
        out.push((delivery.recorded.position.0, delivery.attempt));
    }
    out
}

#[tokio::test]
async fn what_was_in_flight_comes_again_at_once_after_reopening_and_counts() {
    let dir = tempfile::tempdir().unwrap();
    let log = open(dir.path()).await;
    for id in 1..=4 {
        put(&log, 1, id).await;
    }
    let consumer = log.consumer(config()).await.unwrap();
    let first = next(&consumer).await;
    let second = next(&consumer).await;
    assert_eq!(take(&consumer, 1).await, [(3, 1)]);
    second.reply.ack().await.unwrap();
    first.reply.nak(Duration::from_secs(3_600)).await.unwrap();
    log.close().await;
    assert!(first.reply.ack().await.is_err(), "the answer came too late");
    assert!(consumer.next().await.is_err());

    let log = open(dir.path()).await;
    let consumer = log.consumer(config()).await.unwrap();
    // 1 waits for its time, 2 is settled, 3 was in flight, 4 is new.
    assert_eq!(take(&consumer, 2).await, [(3, 2), (4, 1)]);
}

#[tokio::test]
async fn a_delivery_that_kills_its_worker_each_time_is_given_up() {
    let dir = tempfile::tempdir().unwrap();
    let config = ConsumerConfig {
        max_deliver: 3,
        ..config()
    };
    let log = open(dir.path()).await;
    put(&log, 1, 1).await;
    log.close().await;
    for attempt in 1..=3 {
        let log = open(dir.path()).await;
        let consumer = log.consumer(config.clone()).await.unwrap();
        let delivery = next(&consumer).await;
        assert_eq!(delivery.attempt, attempt);
        assert_eq!(delivery.is_last, attempt == 3);
    }
    let log = open(dir.path()).await;
    let consumer = log.consumer(config).await.unwrap();
    put(&log, 1, 2).await;
    assert_eq!(take(&consumer, 1).await, [(2, 1)]);
}

#[tokio::test]
async fn any_beginning_of_a_journal_is_a_state_that_loses_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let log = open(dir.path()).await;
    for id in 1..=6 {
        put(&log, 1, id).await;
    }
    let consumer = log.consumer(config()).await.unwrap();
    for _ in 0..4 {
        next(&consumer).await.reply.ack().await.unwrap();
    }
    take(&consumer, 1).await;
    log.close().await;
    let path = dir.path().join("consumers/worker");
    let journal = fs::read(&path).unwrap();
    let settled = |text: &[u8]| {
        let text = String::from_utf8_lossy(text).into_owned();
        let acked = text
            .split_inclusive('\n')
            .filter(|l| l.starts_with("a ") && l.ends_with('\n'));
        acked.count() as u64
    };
    for len in 0..=journal.len() {
        let mut torn = journal[..len].to_vec();
        // As the loss of power may leave it.
        torn.extend_from_slice(&[0; 7]);
        fs::write(&path, &torn).unwrap();
        let log = open(dir.path()).await;
        let consumer = log.consumer(config()).await.unwrap();
        let wanted = Vec::from_iter(settled(&journal[..len]) + 1..=6);
        let found = take(&consumer, wanted.len()).await;
        let found: Vec<_> = found.into_iter().map(|(position, _)| position).collect();
        assert_eq!(found, wanted, "cut at {len}");
    }
}

#[tokio::test]
async fn a_long_journal_is_rewritten_to_the_same_state() {
    let dir = tempfile::tempdir().unwrap();
    let log = open(dir.path()).await;
    put(&log, 1, 1).await;
    put(&log, 1, 2).await;
    let consumer = log
        .consumer(ConsumerConfig {
            max_deliver: u32::MAX,
            ..config()
        })
        .await
        .unwrap();
    take(&consumer, 1).await;
    let path = dir.path().join("consumers/worker");
    let mut longest = 0;
    loop {
        let delivery = next(&consumer).await;
        assert_eq!(delivery.recorded.position, Position(2));
        delivery.reply.nak(Duration::ZERO).await.unwrap();
        let len = fs::metadata(&path).unwrap().len();
        if len < longest {
            break;
        }
        longest = len;
    }
    let attempt = next(&consumer).await.attempt;
    drop(consumer);
    log.close().await;
    let log = open(dir.path()).await;
    let consumer = log.consumer(config()).await;
    let consumer = consumer.unwrap();
    let deliveries = take(&consumer, 1).await;
    assert_eq!(deliveries, [(1, 2)]);
    assert!(attempt > 1_000);
}

#[tokio::test]
async fn a_consumer_that_was_ahead_of_the_log_starts_at_its_end() {
    let dir = tempfile::tempdir().unwrap();
    let log = open(dir.path()).await;
    put(&log, 1, 1).await;
    log.close().await;
    // The loss of power took events back that were delivered but never acknowledged as stored.
    fs::write(
        dir.path().join("consumers/worker"),
        "d 1 1\na 1\nd 2 1\nc 9\n",
    )
    .unwrap();
    let log = open(dir.path()).await;
    let consumer = log.consumer(config()).await.unwrap();
    put(&log, 1, 2).await;
    assert_eq!(take(&consumer, 1).await, [(2, 1)]);
}

#[tokio::test]
async fn names_that_are_no_names_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let log = open(dir.path()).await;
    for name in ["", "..", "a/b", "A", "a b", "a.b", &"a".repeat(101)] {
        let refused = log.consumer(ConsumerConfig::new(name, SubjectFilter::default()));
        assert!(refused.await.is_err(), "{name:?}");
    }
    assert_eq!(
        fs::read_dir(dir.path().join("consumers")).unwrap().count(),
        0
    );
}
