//! Durable consumers: deliveries and their answers.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use daybook_events::Position;
use daybook_events::log::{Consumer, ConsumerConfig, Delivery, EventLog, ReadError};
use daybook_events::subject::{AggregateKind, SubjectFilter};

use super::{Backend, a_build, a_deployment, an_event, append, append_many, never, within};

/// After how long an unanswered delivery is taken back, where that is waited for. A busy machine must
/// answer faster.
const IMPATIENCE: Duration = Duration::from_secs(4);

/// A consumer that takes an unanswered delivery back soon.
fn impatient(name: &str) -> ConsumerConfig {
    ConsumerConfig {
        ack_wait: IMPATIENCE,
        ..ConsumerConfig::new(name, SubjectFilter::default())
    }
}

fn patient(name: &str) -> ConsumerConfig {
    ConsumerConfig {
        ack_wait: Duration::from_secs(60),
        ..ConsumerConfig::new(name, SubjectFilter::default())
    }
}

/// Opens a consumer, as often as it takes: a cluster that chooses a leader is away for a moment.
async fn open(log: &Arc<dyn EventLog>, config: ConsumerConfig) -> Arc<dyn Consumer> {
    within("a consumer", async {
        loop {
            match log.consumer(config.clone()).await {
                Err(ReadError::Unavailable(_)) => {
                    tokio::time::sleep(Duration::from_millis(20)).await;
                }
                opened => return opened.unwrap(),
            }
        }
    })
    .await
}

async fn next(consumer: &Arc<dyn Consumer>) -> Delivery {
    within("the next delivery", consumer.next()).await.unwrap()
}

/// The next delivery, which must be a certain one.
async fn expect(consumer: &Arc<dyn Consumer>, position: u64, attempt: u32) -> Delivery {
    let delivery = next(consumer).await;
    assert_eq!(delivery.recorded.position, Position(position));
    assert_eq!(delivery.attempt, attempt);
    delivery
}

pub async fn what_is_acknowledged_is_not_delivered_again(backend: &impl Backend) {
    let log = backend.log().await;
    let subject = a_deployment();
    let events = append_many(&log, &subject, 5).await;
    let consumer = open(&log, impatient("worker")).await;
    for (position, event) in (1..).zip(&events) {
        let delivery = expect(&consumer, position, 1).await;
        assert_eq!(delivery.recorded.subject, subject);
        assert_eq!(delivery.recorded.bytes, event.bytes);
        assert!(!delivery.is_last);
        delivery.reply.ack().await.unwrap();
    }
    let waited = tokio::time::timeout(IMPATIENCE + IMPATIENCE / 8, consumer.next()).await;
    assert!(waited.is_err(), "delivered again: {waited:?}");
    append(&log, an_event(&subject, 6)).await;
    expect(&consumer, 6, 1).await;
}

pub async fn two_readers_share_a_consumer(backend: &impl Backend) {
    const EVENTS: u64 = 60;
    let log = backend.log().await;
    append_many(&log, &a_deployment(), EVENTS as usize).await;
    let (sender, mut taken) = tokio::sync::mpsc::channel(1_000);
    let mut readers = tokio::task::JoinSet::new();
    let consumers = [
        open(&log, patient("worker")).await,
        open(&log, patient("worker")).await,
    ];
    for (reader, consumer) in consumers.into_iter().enumerate() {
        let sender = sender.clone();
        readers.spawn(async move {
            loop {
                let delivery = consumer.next().await.unwrap();
                delivery.reply.ack().await.unwrap();
                sender
                    .send((reader, delivery.recorded.position.0))
                    .await
                    .unwrap();
                // A worker works, so that the other one gets its turn.
                tokio::time::sleep(Duration::from_millis(2)).await;
            }
        });
    }
    let mut times_taken = BTreeMap::new();
    let mut by_reader = [0, 0];
    for _ in 0..EVENTS {
        let (reader, position) = within("an event for one of the two", taken.recv())
            .await
            .unwrap();
        by_reader[reader] += 1;
        *times_taken.entry(position).or_insert(0) += 1;
    }
    never("a delivery to both", taken.recv()).await;
    assert_eq!(times_taken, (1..=EVENTS).map(|p| (p, 1)).collect());
    assert!(by_reader.iter().all(|&count| count > 0), "{by_reader:?}");
}

pub async fn a_consumer_delivers_only_what_it_wants(backend: &impl Backend) {
    let log = backend.log().await;
    append_many(&log, &a_deployment(), 3).await;
    let build = append(&log, an_event(&a_build(), 1)).await;
    let config = ConsumerConfig {
        filter: SubjectFilter::of(AggregateKind::Build),
        ..patient("builder")
    };
    let consumer = open(&log, config).await;
    expect(&consumer, build.0, 1)
        .await
        .reply
        .ack()
        .await
        .unwrap();
    append_many(&log, &a_deployment(), 2).await;
    let build = append(&log, an_event(&a_build(), 2)).await;
    expect(&consumer, build.0, 1).await;
}

pub async fn a_refused_delivery_comes_again_after_its_delay(backend: &impl Backend) {
    let log = backend.log().await;
    append_many(&log, &a_deployment(), 2).await;
    let consumer = open(&log, patient("worker")).await;
    let delivery = expect(&consumer, 1, 1).await;
    delivery.reply.nak(Duration::from_secs(5)).await.unwrap();
    // The delay lets what follows go first.
    let second = expect(&consumer, 2, 1).await;
    second.reply.ack().await.unwrap();
    let again = expect(&consumer, 1, 2).await;
    again.reply.nak(Duration::ZERO).await.unwrap();
    let again = expect(&consumer, 1, 3).await;
    again.reply.ack().await.unwrap();
    never("a delivery after the acknowledgement", consumer.next()).await;
}

pub async fn an_unanswered_delivery_comes_again(backend: &impl Backend) {
    let log = backend.log().await;
    append_many(&log, &a_deployment(), 1).await;
    let consumer = open(&log, impatient("worker")).await;
    drop(expect(&consumer, 1, 1).await);
    // Another process takes over what the first one left.
    let other = open(&log, impatient("worker")).await;
    let again = expect(&other, 1, 2).await;
    again.reply.ack().await.unwrap();
}

pub async fn progress_keeps_a_delivery(backend: &impl Backend) {
    let log = backend.log().await;
    append_many(&log, &a_deployment(), 1).await;
    let config = ConsumerConfig {
        ack_wait: IMPATIENCE,
        ..impatient("worker")
    };
    let consumer = open(&log, config.clone()).await;
    let other = open(&log, config).await;
    let delivery = expect(&consumer, 1, 1).await;
    let working = async {
        for _ in 0..30 {
            tokio::time::sleep(Duration::from_millis(200)).await;
            delivery.reply.progress().await.unwrap();
        }
    };
    tokio::select! {
        () = working => {}
        taken = other.next() => panic!("taken away at work: {taken:?}"),
    }
    delivery.reply.ack().await.unwrap();
    append(&log, an_event(&a_deployment(), 2)).await;
    expect(&other, 2, 1).await;
}

pub async fn a_terminated_delivery_never_comes_again(backend: &impl Backend) {
    let log = backend.log().await;
    append_many(&log, &a_deployment(), 2).await;
    let consumer = open(&log, impatient("worker")).await;
    let poison = expect(&consumer, 1, 1).await;
    poison.reply.term().await.unwrap();
    let second = expect(&consumer, 2, 1).await;
    second.reply.ack().await.unwrap();
    let waited = tokio::time::timeout(IMPATIENCE + IMPATIENCE / 8, consumer.next()).await;
    assert!(waited.is_err(), "delivered again: {waited:?}");
}

pub async fn deliveries_end_at_the_bound_and_the_last_one_says_so(backend: &impl Backend) {
    let log = backend.log().await;
    append_many(&log, &a_deployment(), 1).await;
    let config = ConsumerConfig {
        max_deliver: 3,
        ..impatient("worker")
    };
    let consumer = open(&log, config).await;
    let first = expect(&consumer, 1, 1).await;
    assert!(!first.is_last);
    first.reply.nak(Duration::ZERO).await.unwrap();
    // An attempt that is never answered counts as one.
    assert!(!expect(&consumer, 1, 2).await.is_last);
    let third = expect(&consumer, 1, 3).await;
    assert!(third.is_last);
    third.reply.nak(Duration::ZERO).await.unwrap();
    let waited = tokio::time::timeout(IMPATIENCE + IMPATIENCE / 8, consumer.next()).await;
    assert!(waited.is_err(), "delivered beyond the bound: {waited:?}");
    append(&log, an_event(&a_deployment(), 2)).await;
    expect(&consumer, 2, 1).await;
}

pub async fn only_so_many_deliveries_are_in_flight(backend: &impl Backend) {
    let log = backend.log().await;
    append_many(&log, &a_deployment(), 4).await;
    let config = ConsumerConfig {
        max_in_flight: 2,
        ..patient("worker")
    };
    let consumer = open(&log, config.clone()).await;
    let other = open(&log, config).await;
    let first = expect(&consumer, 1, 1).await;
    let _second = expect(&other, 2, 1).await;
    never("a third delivery in flight", consumer.next()).await;
    never("a third delivery in flight", other.next()).await;
    drop(other);
    first.reply.ack().await.unwrap();
    expect(&consumer, 3, 1).await;
}

pub async fn a_wait_that_is_given_up_loses_nothing(backend: &impl Backend) {
    const EVENTS: u64 = 40;
    let log = backend.log().await;
    let consumer = open(&log, impatient("worker")).await;
    let writer = {
        let log = log.clone();
        tokio::spawn(async move {
            let subject = a_deployment();
            for number in 1..=EVENTS {
                append(&log, an_event(&subject, number)).await;
                tokio::time::sleep(Duration::from_millis(3)).await;
            }
        })
    };
    let mut acknowledged = std::collections::BTreeSet::new();
    within("all events in spite of waits given up", async {
        let mut patience = 0;
        while acknowledged.len() < EVENTS as usize {
            patience = (patience + 1) % 7;
            let wait = Duration::from_micros(400 * patience);
            if let Ok(delivery) = tokio::time::timeout(wait, consumer.next()).await {
                let delivery = delivery.unwrap();
                delivery.reply.ack().await.unwrap();
                acknowledged.insert(delivery.recorded.position.0);
            }
        }
    })
    .await;
    writer.await.unwrap();
}

pub async fn a_consumer_remembers_across_a_restart(backend: &impl Backend) {
    let log = backend.log().await;
    append_many(&log, &a_deployment(), 4).await;
    let consumer = open(&log, impatient("worker")).await;
    for position in 1..=2 {
        let delivery = expect(&consumer, position, 1).await;
        delivery.reply.ack().await.unwrap();
    }
    drop(expect(&consumer, 3, 1).await);
    drop((consumer, log));
    backend.restart().await;

    let log = backend.log().await;
    let consumer = open(&log, impatient("worker")).await;
    let mut rest = Vec::new();
    for _ in 0..2 {
        let delivery = next(&consumer).await;
        delivery.reply.ack().await.unwrap();
        rest.push(delivery.recorded.position.0);
    }
    rest.sort_unstable();
    assert_eq!(rest, [3, 4]);
    let waited = tokio::time::timeout(IMPATIENCE + IMPATIENCE / 8, consumer.next()).await;
    assert!(waited.is_err(), "delivered again: {waited:?}");
}

pub async fn consumers_of_different_names_are_independent(backend: &impl Backend) {
    let log = backend.log().await;
    append_many(&log, &a_deployment(), 2).await;
    let (one, two) = (
        open(&log, patient("one")).await,
        open(&log, patient("two")).await,
    );
    for position in 1..=2 {
        for consumer in [&one, &two] {
            let delivery = expect(consumer, position, 1).await;
            delivery.reply.ack().await.unwrap();
        }
    }
}

pub async fn a_consumer_can_be_opened_with_other_settings(backend: &impl Backend) {
    let log = backend.log().await;
    append_many(&log, &a_deployment(), 3).await;
    let consumer = open(&log, patient("worker")).await;
    let delivery = expect(&consumer, 1, 1).await;
    delivery.reply.ack().await.unwrap();
    drop(consumer);
    let config = ConsumerConfig {
        max_deliver: 2,
        max_in_flight: 1,
        ack_wait: Duration::from_secs(5),
        ..patient("worker")
    };
    let consumer = open(&log, config).await;
    let delivery = expect(&consumer, 2, 1).await;
    never("a second delivery in flight", consumer.next()).await;
    delivery.reply.nak(Duration::ZERO).await.unwrap();
    let delivery = next(&consumer).await;
    if delivery.recorded.position == Position(2) {
        assert!(delivery.is_last);
    }
}
