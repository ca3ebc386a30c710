//! Reads and tails.

use std::sync::Arc;

use daybook_events::Position;
use daybook_events::log::{EventLog, EventStream, Recorded};
use daybook_events::subject::{AggregateKind, Subject, SubjectFilter};
use futures_util::StreamExt;
use futures_util::future::join_all;

use super::{
    Backend, a_build, a_deployment, an_event, append, append_many, environment, never, project,
    within,
};

async fn next(tail: &mut EventStream) -> Recorded {
    within("the next event of a tail", tail.next())
        .await
        .expect("a tail does not end")
        .unwrap()
}

/// The positions that a filter lets through, read and tailed alike.
async fn chosen(log: &Arc<dyn EventLog>, filter: SubjectFilter) -> Vec<u64> {
    let read = log.read(Position::ZERO, &filter, 1000).await.unwrap();
    let mut tail = log.tail(Position::ZERO, filter).await.unwrap();
    for recorded in &read {
        assert_eq!(next(&mut tail).await, *recorded);
    }
    read.iter().map(|recorded| recorded.position.0).collect()
}

pub async fn filters_choose_by_project_environment_aggregate_and_subject(backend: &impl Backend) {
    let log = backend.log().await;
    let (shop, blog) = (project("shop"), project("blog"));
    let (staging, production) = (environment("staging"), environment("production"));
    let deployment = a_deployment();
    let subjects = [
        Subject::Project(shop.clone()),
        Subject::Project(blog.clone()),
        Subject::Environment(shop.clone(), staging.clone()),
        Subject::Environment(shop.clone(), production.clone()),
        Subject::Environment(blog.clone(), production.clone()),
        a_build(),
        deployment.clone(),
        a_deployment(),
        Subject::Gitops(shop.clone()),
        Subject::Routing(shop.clone()),
        Subject::Other("daybook.ev.shop.production.experiment.7".to_owned()),
    ];
    for subject in &subjects {
        append(&log, an_event(subject, "x")).await;
    }
    append(&log, an_event(&deployment, "y")).await;

    let all = SubjectFilter::default();
    let in_project = SubjectFilter {
        project: Some(shop.clone()),
        ..all.clone()
    };
    let in_environment = SubjectFilter {
        environment: Some(production.clone()),
        ..all.clone()
    };
    let deployments = SubjectFilter::of(AggregateKind::Deployment);
    let narrow = SubjectFilter {
        project: Some(shop),
        environment: Some(production),
        aggregate: Some(AggregateKind::Environment),
        subject: None,
    };
    let nothing = SubjectFilter {
        project: Some(project("nobody")),
        ..all.clone()
    };
    assert_eq!(chosen(&log, all).await, (1..=12).collect::<Vec<_>>());
    assert_eq!(
        chosen(&log, in_project).await,
        [1, 3, 4, 6, 7, 8, 9, 10, 11, 12]
    );
    assert_eq!(chosen(&log, in_environment).await, [4, 5, 7, 8, 11, 12]);
    assert_eq!(chosen(&log, deployments).await, [7, 8, 12]);
    assert_eq!(chosen(&log, narrow).await, [4]);
    assert_eq!(
        chosen(&log, SubjectFilter::exactly(deployment)).await,
        [7, 12]
    );
    assert!(chosen(&log, nothing).await.is_empty());
}

pub async fn an_aggregate_is_read_without_its_neighbours(backend: &impl Backend) {
    let log = backend.log().await;
    let (subject, neighbour) = (a_deployment(), a_deployment());
    let mut mine = Vec::new();
    for number in 0..20 {
        mine.push(append(&log, an_event(&subject, number)).await);
        append(&log, an_event(&neighbour, number)).await;
    }
    let read = log.read_aggregate(&subject).await.unwrap();
    assert!(read.iter().all(|recorded| recorded.subject == subject));
    let positions: Vec<_> = read.iter().map(|recorded| recorded.position).collect();
    assert_eq!(positions, mine);
    let unknown = log.read_aggregate(&a_deployment()).await.unwrap();
    assert!(unknown.is_empty());
}

pub async fn a_read_ends_at_its_limit_and_at_the_end(backend: &impl Backend) {
    let log = backend.log().await;
    let all = SubjectFilter::default();
    let empty = log.read(Position::ZERO, &all, 10).await.unwrap();
    assert!(empty.is_empty());
    append_many(&log, &a_deployment(), 25).await;
    let positions = async |after: u64, limit: usize| -> Vec<u64> {
        let read = log.read(Position(after), &all, limit).await.unwrap();
        read.iter().map(|recorded| recorded.position.0).collect()
    };
    assert_eq!(positions(0, 10).await, (1..=10).collect::<Vec<_>>());
    assert_eq!(positions(10, 10).await, (11..=20).collect::<Vec<_>>());
    assert_eq!(positions(20, 10).await, (21..=25).collect::<Vec<_>>());
    assert_eq!(positions(24, 1).await, [25]);
    assert!(positions(25, 10).await.is_empty());
    assert!(positions(3, 0).await.is_empty());
    assert_eq!(positions(0, usize::MAX).await.len(), 25);
}

pub async fn many_events_are_read_and_tailed_whole(backend: &impl Backend) {
    const MANY: usize = 12_000;
    let log = backend.log().await;
    let subjects: Vec<_> = (0..20).map(|_| a_deployment()).collect();
    for chunk in 0..MANY / 500 {
        let appends = (0..500).map(|number| {
            let event = an_event(&subjects[number % 20], chunk * 500 + number);
            log.append(event)
        });
        for appended in within("a chunk of appends", join_all(appends)).await {
            appended.unwrap();
        }
    }
    let read = log
        .read(Position::ZERO, &SubjectFilter::default(), usize::MAX)
        .await
        .unwrap();
    let expected: Vec<u64> = (1..=MANY as u64).collect();
    let positions: Vec<u64> = read.iter().map(|recorded| recorded.position.0).collect();
    assert_eq!(positions, expected);
    let mut tail = log
        .tail(Position::ZERO, SubjectFilter::default())
        .await
        .unwrap();
    for recorded in &read {
        assert_eq!(next(&mut tail).await, *recorded);
    }
    let one = log.read_aggregate(&subjects[3]).await.unwrap();
    assert_eq!(one.len(), MANY / 20);
}

pub async fn a_single_event_is_got_by_its_position(backend: &impl Backend) {
    let log = backend.log().await;
    assert_eq!(log.get(Position(1)).await.unwrap(), None);
    let events = append_many(&log, &a_deployment(), 3).await;
    for (number, event) in events.iter().enumerate() {
        let position = Position(number as u64 + 1);
        let got = log.get(position).await.unwrap().unwrap();
        assert_eq!(got.position, position);
        assert_eq!(got.subject, event.subject);
        assert_eq!(got.bytes, event.bytes);
    }
    assert_eq!(log.get(Position::ZERO).await.unwrap(), None);
    assert_eq!(log.get(Position(4)).await.unwrap(), None);
    assert_eq!(log.get(Position(u64::MAX)).await.unwrap(), None);
}

pub async fn a_tail_starts_in_the_middle_and_goes_on_live(backend: &impl Backend) {
    let log = backend.log().await;
    let subject = a_deployment();
    append_many(&log, &subject, 10).await;
    let all = SubjectFilter::default();
    let mut from_start = log.tail(Position::ZERO, all.clone()).await.unwrap();
    let mut from_middle = log.tail(Position(5), all.clone()).await.unwrap();
    let mut from_end = log.tail(Position(10), all).await.unwrap();
    for position in 1..=10 {
        assert_eq!(next(&mut from_start).await.position, Position(position));
    }
    for position in 6..=10 {
        assert_eq!(next(&mut from_middle).await.position, Position(position));
    }
    for position in 11..=20 {
        let event = an_event(&subject, position);
        append(&log, event.clone()).await;
        for tail in [&mut from_start, &mut from_middle, &mut from_end] {
            let recorded = next(tail).await;
            assert_eq!(recorded.position, Position(position));
            assert_eq!(recorded.bytes, event.bytes);
        }
    }
}

pub async fn a_filtered_tail_skips_what_it_does_not_want(backend: &impl Backend) {
    let log = backend.log().await;
    let filter = SubjectFilter::of(AggregateKind::Build);
    let mut tail = log.tail(Position::ZERO, filter).await.unwrap();
    append_many(&log, &a_deployment(), 3).await;
    let build = append(&log, an_event(&a_build(), 1)).await;
    assert_eq!(next(&mut tail).await.position, build);
    append_many(&log, &a_deployment(), 3).await;
    never("an event that nobody asked for", tail.next()).await;
    let build = append(&log, an_event(&a_build(), 2)).await;
    assert_eq!(next(&mut tail).await.position, build);
}

pub async fn a_tail_ahead_of_a_quiet_log_waits(backend: &impl Backend) {
    let log = backend.log().await;
    let mut tail = log
        .tail(Position::ZERO, SubjectFilter::default())
        .await
        .unwrap();
    never("an event of an empty log", tail.next()).await;
    let position = append(&log, an_event(&a_build(), 1)).await;
    assert_eq!(next(&mut tail).await.position, position);
    never("an event that is not there", tail.next()).await;
}

pub async fn a_tail_goes_on_across_a_restart(backend: &impl Backend) {
    let all = SubjectFilter::default;
    let subject = a_deployment();
    let log = backend.log().await;
    append_many(&log, &subject, 5).await;
    let mut tail = log.tail(Position::ZERO, all()).await.unwrap();
    let mut filtered = log
        .tail(Position::ZERO, SubjectFilter::exactly(subject.clone()))
        .await
        .unwrap();
    for position in 1..=3 {
        assert_eq!(next(&mut tail).await.position, Position(position));
        assert_eq!(next(&mut filtered).await.position, Position(position));
    }
    drop(log);
    if backend.abilities().handles_survive {
        backend.restart().await;
    } else {
        drop((tail, filtered));
        backend.restart().await;
        let log = backend.log().await;
        tail = log.tail(Position(3), all()).await.unwrap();
        filtered = log
            .tail(Position(3), SubjectFilter::exactly(subject.clone()))
            .await
            .unwrap();
    }
    let log = backend.log().await;
    for number in 6..=8 {
        super::append_with_retries(&log, &an_event(&subject, number)).await;
    }
    for position in 4..=8 {
        assert_eq!(next(&mut tail).await.position, Position(position));
        assert_eq!(next(&mut filtered).await.position, Position(position));
    }
}
