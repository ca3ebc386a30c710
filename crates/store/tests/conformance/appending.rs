//! Appends: order, bytes, expectations, repetitions.

use std::collections::HashSet;

use bytes::Bytes;
use daybook_events::Position;
use daybook_events::log::{Append, AppendError, Appended, Expected, MAX_EVENT_BYTES};
use daybook_events::subject::SubjectFilter;
use futures_util::future::join_all;

use super::{
    Backend, a_build, a_deployment, an_event, append, append_many, conflict, expecting, within,
};

pub async fn events_come_back_in_order_with_their_exact_bytes(backend: &impl Backend) {
    let log = backend.log().await;
    assert_eq!(log.head().await.unwrap(), Position::ZERO);
    let subjects = [a_deployment(), a_build(), a_deployment()];
    let every_byte: Vec<u8> = (0..=255).collect();
    let mut stored = Vec::new();
    for number in 0..30 {
        let mut event = an_event(&subjects[number % 3], number);
        if number == 7 {
            event.bytes = Bytes::from(every_byte.clone());
        }
        let position = append(&log, event.clone()).await;
        assert_eq!(position, Position(number as u64 + 1));
        stored.push(event);
    }
    assert_eq!(log.head().await.unwrap(), Position(30));
    let read = log
        .read(Position::ZERO, &SubjectFilter::default(), 100)
        .await
        .unwrap();
    assert_eq!(read.len(), 30);
    for (number, (recorded, event)) in read.iter().zip(&stored).enumerate() {
        assert_eq!(recorded.position, Position(number as u64 + 1));
        assert_eq!(recorded.subject, event.subject);
        assert_eq!(recorded.bytes, event.bytes);
    }
    assert!(read.is_sorted_by_key(|recorded| recorded.stored_at));
}

pub async fn a_right_expectation_is_accepted_and_a_wrong_one_learns_the_truth(
    backend: &impl Backend,
) {
    let log = backend.log().await;
    let (subject, other) = (a_deployment(), a_deployment());
    let first = append(&log, expecting(Position::ZERO, an_event(&subject, 1))).await;
    append(&log, expecting(Position::ZERO, an_event(&other, 1))).await;
    let second = append(&log, expecting(first, an_event(&subject, 2))).await;
    assert_eq!(second, Position(3));

    for wrong in [Position::ZERO, first, Position(2), Position(99)] {
        let refused = log.append(expecting(wrong, an_event(&subject, 3))).await;
        let (expected, actual) = conflict(refused);
        assert_eq!(expected, wrong);
        assert!(
            actual.is_none_or(|actual| actual == second),
            "found {actual:?}"
        );
    }
    let fresh = a_deployment();
    let (_, actual) = conflict(log.append(expecting(first, an_event(&fresh, 1))).await);
    assert!(actual.is_none_or(|actual| actual == Position::ZERO));
    assert_eq!(log.head().await.unwrap(), second, "nothing was left behind");
}

pub async fn racing_writers_lose_no_update(backend: &impl Backend) {
    const WRITERS: usize = 16;
    const EACH: usize = 8;
    let subject = a_deployment();
    let writers = (0..WRITERS).map(|writer| {
        let subject = subject.clone();
        async move {
            let log = backend.log().await;
            let mut mine = Vec::new();
            let mut last = Position::ZERO;
            while mine.len() < EACH {
                let text = format!("{} {writer}.{}", last.0, mine.len());
                let event = expecting(last, an_event(&subject, text));
                match log.append(event.clone()).await {
                    Ok(appended) => {
                        assert!(!appended.duplicate);
                        mine.push((appended.position, event));
                        last = appended.position;
                    }
                    Err(AppendError::Conflict { actual, .. }) => {
                        last = match actual {
                            Some(actual) => actual,
                            None => {
                                let events = log.read_aggregate(&subject).await.unwrap();
                                events.last().map_or(Position::ZERO, |r| r.position)
                            }
                        };
                    }
                    Err(error) if error.is_retryable() => {}
                    Err(error) => panic!("{error}"),
                }
            }
            mine
        }
    });
    let accepted: Vec<(Position, Append)> = within("the race", join_all(writers))
        .await
        .into_iter()
        .flatten()
        .collect();

    let log = backend.log().await;
    let stored = log.read_aggregate(&subject).await.unwrap();
    for (position, event) in &accepted {
        let there = stored.iter().find(|r| r.position == *position);
        assert_eq!(there.map(|r| &r.bytes), Some(&event.bytes));
    }
    let positions: HashSet<Position> = accepted.iter().map(|(position, _)| *position).collect();
    assert_eq!(positions.len(), WRITERS * EACH, "each position once");
    if !backend.abilities().may_accept_twice {
        assert_eq!(stored.len(), WRITERS * EACH);
        let mut before = Position::ZERO;
        for recorded in &stored {
            let (_, event) = accepted
                .iter()
                .find(|(position, _)| *position == recorded.position)
                .unwrap();
            assert_eq!(event.expected, Expected::Last(before), "a lost update");
            before = recorded.position;
        }
    }
}

pub async fn an_id_that_was_stored_is_a_duplicate_whatever_is_expected(backend: &impl Backend) {
    let log = backend.log().await;
    let subject = a_deployment();
    let event = expecting(Position::ZERO, an_event(&subject, 1));
    let first = append(&log, event.clone()).await;
    let known = |result: Result<Appended, AppendError>, position: Position| {
        let appended = result.unwrap();
        assert!(appended.duplicate);
        assert_eq!(appended.position, position);
    };
    known(log.append(event.clone()).await, first);
    known(log.append(expecting(first, event.clone())).await, first);
    let unconditional = Append {
        expected: Expected::Any,
        ..event.clone()
    };
    known(log.append(unconditional).await, first);

    // Others went on meanwhile, and the writer still has not heard of its success.
    append_many(&log, &a_deployment(), 3).await;
    let second = expecting(first, an_event(&subject, 2));
    let second_position = append(&log, second.clone()).await;
    append(&log, expecting(second_position, an_event(&subject, 3))).await;
    known(log.append(event).await, first);
    known(log.append(second).await, second_position);
    assert_eq!(log.read_aggregate(&subject).await.unwrap().len(), 3);
}

pub async fn an_id_that_was_refused_is_not_remembered(backend: &impl Backend) {
    let log = backend.log().await;
    let subject = a_deployment();
    let first = append(&log, an_event(&subject, 1)).await;
    let event = an_event(&subject, 2);
    conflict(log.append(expecting(Position::ZERO, event.clone())).await);
    let second = append(&log, expecting(first, event)).await;
    assert_eq!(second, first.next());
}

pub async fn an_event_that_is_too_large_is_refused(backend: &impl Backend) {
    let log = backend.log().await;
    let subject = a_deployment();
    let of_size = |bytes: usize| Append {
        bytes: Bytes::from(vec![b'x'; bytes]),
        ..an_event(&subject, "")
    };
    match log.append(of_size(MAX_EVENT_BYTES + 1)).await {
        Err(AppendError::TooLarge { bytes }) => assert_eq!(bytes, MAX_EVENT_BYTES + 1),
        other => panic!("not too large: {other:?}"),
    }
    assert_eq!(log.head().await.unwrap(), Position::ZERO);
    let largest = append(&log, of_size(MAX_EVENT_BYTES)).await;
    let stored = log.get(largest).await.unwrap().unwrap();
    assert_eq!(stored.bytes.len(), MAX_EVENT_BYTES);
}

pub async fn many_appends_are_in_flight_at_once(backend: &impl Backend) {
    let log = backend.log().await;
    let subjects: Vec<_> = (0..10).map(|_| a_deployment()).collect();
    let events: Vec<_> = (0..500)
        .map(|number| an_event(&subjects[number % 10], number))
        .collect();
    let all = join_all(events.iter().map(|event| log.append(event.clone())));
    let appended = within("all appends", all).await;
    let positions: HashSet<Position> = appended
        .into_iter()
        .map(|appended| appended.unwrap().position)
        .collect();
    assert_eq!(positions, (1..=500).map(Position).collect());
}

pub async fn a_log_says_what_it_is(backend: &impl Backend) {
    let log = backend.log().await;
    let before = log.info().await.unwrap();
    assert!(!before.backend.is_empty());
    assert!(!before.version.is_empty());
    assert!(!before.identity.is_empty());
    append(&log, an_event(&a_build(), 1)).await;
    drop(log);
    backend.restart().await;
    let after = within("information after a restart", async {
        loop {
            if let Ok(info) = backend.log().await.info().await {
                break info;
            }
            tokio::time::sleep(std::time::Duration::from_millis(20)).await;
        }
    })
    .await;
    assert_eq!(after.identity, before.identity);
    assert_eq!(after.durability, before.durability);
}
