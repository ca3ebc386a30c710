//! Restarts, crashes and pauses: what was acknowledged stays, once and as it was.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use bytes::Bytes;
use daybook_events::Position;
use daybook_events::log::{Append, Appended, ConsumerConfig, EventLog, Expected, Recorded};
use daybook_events::subject::{Subject, SubjectFilter};
use futures_util::StreamExt;
use futures_util::future::join_all;

use super::{
    Backend, a_deployment, an_event, append, append_with_retries, conflict, expecting, within,
};

async fn read_all(log: &Arc<dyn EventLog>) -> Vec<Recorded> {
    let all = SubjectFilter::default();
    within("a read of everything", async {
        loop {
            match log.read(Position::ZERO, &all, usize::MAX).await {
                Ok(events) => return events,
                Err(_) => tokio::time::sleep(Duration::from_millis(20)).await,
            }
        }
    })
    .await
}

pub async fn a_restart_loses_nothing(backend: &impl Backend) {
    let log = backend.log().await;
    let subjects: Vec<Subject> = (0..10).map(|_| a_deployment()).collect();
    let appends = (0..200).map(|number| log.append(an_event(&subjects[number % 10], number)));
    for appended in join_all(appends).await {
        appended.unwrap();
    }
    let before = read_all(&log).await;
    assert_eq!(before.len(), 200);
    drop(log);
    backend.restart().await;
    let log = backend.log().await;
    assert_eq!(read_all(&log).await, before);

    let last = |subject: &Subject| {
        let own = before.iter().rfind(|recorded| recorded.subject == *subject);
        own.unwrap().position
    };
    let subject = &subjects[4];
    conflict(
        log.append(expecting(Position(1), an_event(subject, "stale")))
            .await,
    );
    let event = expecting(last(subject), an_event(subject, "next"));
    assert_eq!(append(&log, event).await, Position(201));
}

pub async fn a_crash_loses_nothing_and_the_same_ids_are_duplicates(backend: &impl Backend) {
    let log = backend.log().await;
    let subject = a_deployment();
    let mut last = Position::ZERO;
    let mut events = Vec::new();
    for number in 1..=20 {
        let event = expecting(last, an_event(&subject, number));
        last = append(&log, event.clone()).await;
        events.push(event);
    }
    let before = read_all(&log).await;
    drop(log);
    backend.crash().await;
    let log = backend.log().await;
    assert_eq!(read_all(&log).await, before);
    for (number, event) in events.iter().enumerate() {
        let again = append_with_retries(&log, event).await;
        let position = Position(number as u64 + 1);
        assert_eq!(
            again,
            Appended {
                position,
                duplicate: true
            }
        );
    }
    assert_eq!(read_all(&log).await, before);
}

pub async fn every_acknowledged_event_is_there_once_after_crashes_amid_appends(
    backend: &impl Backend,
) {
    const WRITERS: usize = 6;
    if !backend.abilities().handles_survive {
        return;
    }
    let log = backend.log().await;
    let mut tail = log
        .tail(Position::ZERO, SubjectFilter::default())
        .await
        .unwrap();
    let stop = Arc::new(AtomicBool::new(false));
    let written = Arc::new(AtomicUsize::new(0));
    let mut writers = tokio::task::JoinSet::new();
    for writer in 0..WRITERS {
        let (log, stop, written) = (log.clone(), stop.clone(), written.clone());
        writers.spawn(async move {
            let subject = a_deployment();
            let mut last = Position::ZERO;
            let mut mine: Vec<(Position, Bytes)> = Vec::new();
            while !stop.load(Ordering::Relaxed) {
                // Half of the writers expect nothing: then the id alone tells a repetition.
                let event = an_event(&subject, format!("{writer}.{}", mine.len()));
                let event = match writer % 2 {
                    0 => expecting(last, event),
                    _ => event,
                };
                last = append_with_retries(&log, &event).await.position;
                mine.push((last, event.bytes));
                written.fetch_add(1, Ordering::Relaxed);
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
            mine
        });
    }
    let progress = async |more: usize| {
        let target = written.load(Ordering::Relaxed) + more;
        within("writers that go on", async {
            while written.load(Ordering::Relaxed) < target {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        })
        .await;
    };
    progress(60).await;
    for _ in 0..2 {
        backend.crash().await;
        progress(60).await;
    }
    stop.store(true, Ordering::Relaxed);
    let acknowledged: Vec<(Position, Bytes)> = within("the writers", writers.join_all())
        .await
        .into_iter()
        .flatten()
        .collect();

    let stored = read_all(&log).await;
    let mut times_stored: HashMap<&Bytes, Vec<Position>> = HashMap::new();
    for recorded in &stored {
        let positions = times_stored.entry(&recorded.bytes).or_default();
        positions.push(recorded.position);
    }
    for (position, bytes) in &acknowledged {
        assert_eq!(times_stored.get(bytes), Some(&vec![*position]));
    }
    assert_eq!(stored.len(), acknowledged.len());
    for recorded in &stored {
        let tailed = within("the tail", tail.next()).await.unwrap().unwrap();
        assert_eq!(tailed, *recorded);
    }
}

pub async fn a_consumer_goes_on_across_crashes(backend: &impl Backend) {
    const EVENTS: usize = 60;
    if !backend.abilities().handles_survive {
        return;
    }
    let log = backend.log().await;
    let config = ConsumerConfig {
        ack_wait: Duration::from_secs(2),
        max_deliver: 100,
        ..ConsumerConfig::new("worker", SubjectFilter::default())
    };
    let consumer = log.consumer(config).await.unwrap();
    let (sender, mut done) = tokio::sync::mpsc::channel(1_000);
    let worker = tokio::spawn(async move {
        loop {
            // An error means that waiting for it here makes no sense, not that all is over.
            let Ok(delivery) = consumer.next().await else {
                tokio::time::sleep(Duration::from_millis(20)).await;
                continue;
            };
            let _ = delivery.reply.ack().await;
            sender.send(delivery.recorded).await.unwrap();
        }
    });
    let mut acknowledged = Vec::new();
    for number in 0..EVENTS {
        if number % 20 == 10 {
            backend.crash().await;
        }
        let event = an_event(&a_deployment(), number);
        append_with_retries(&log, &event).await;
        acknowledged.push(event.bytes);
    }
    let mut missing = acknowledged;
    within("every event at a worker", async {
        while !missing.is_empty() {
            let recorded = done.recv().await.unwrap();
            missing.retain(|bytes| *bytes != recorded.bytes);
        }
    })
    .await;
    worker.abort();
}

pub async fn an_append_that_timed_out_is_stored_once(backend: &impl Backend) {
    if !backend.abilities().pauses {
        return;
    }
    let log = backend.log().await;
    let subject = a_deployment();
    let first = append(&log, expecting(Position::ZERO, an_event(&subject, 1))).await;
    let with_expectation = expecting(first, an_event(&subject, 2));
    let without = an_event(&a_deployment(), 3);
    backend.pause().await;
    let outcome = async |event: &Append| within("an answer", log.append(event.clone())).await;
    let (one, two) = tokio::join!(outcome(&with_expectation), outcome(&without));
    for result in [&one, &two] {
        let error = result.as_ref().expect_err("a paused log stores nothing");
        assert!(error.is_retryable(), "{error}");
    }
    backend.resume().await;
    let mut appended = Vec::new();
    for event in [&with_expectation, &without] {
        appended.push((append_with_retries(&log, event).await, event));
    }
    let all = read_all(&log).await;
    for (appended, event) in appended {
        let mut stored = all.iter();
        let stored = stored.find(|stored| stored.position == appended.position);
        assert_eq!(stored.unwrap().bytes, event.bytes);
    }
    assert_eq!(all.len(), 3, "each event once: {all:?}");
    let next = Append {
        expected: Expected::Last(append_with_retries(&log, &with_expectation).await.position),
        ..an_event(&subject, 4)
    };
    append(&log, next).await;
}
