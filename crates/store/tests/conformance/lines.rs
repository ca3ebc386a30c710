//! The line log.

use std::sync::Arc;

use daybook_events::lines::{Line, LineKind, LineLog, LineSource, NewLine};
use daybook_events::log::ReadError;
use daybook_events::names::{BuildId, ClusterName, DeploymentId};
use futures_util::StreamExt;
use futures_util::future::join_all;
use futures_util::stream::BoxStream;
use uuid::Uuid;

use super::{Backend, within};

fn a_source() -> LineSource {
    LineSource::Build(BuildId(Uuid::now_v7()))
}

fn line(text: impl Into<String>) -> NewLine {
    NewLine {
        time: "2026-03-01T12:00:00.123456Z".parse().unwrap(),
        kind: LineKind::Build,
        cluster: None,
        instance: None,
        text: text.into(),
    }
}

fn numbered(numbers: impl IntoIterator<Item = u64>) -> Vec<NewLine> {
    numbers.into_iter().map(|n| line(n.to_string())).collect()
}

/// Lines numbered from 1 that say their number have to be these.
fn assert_lines(lines: &[Line], expected: impl IntoIterator<Item = u64>) {
    let expected: Vec<u64> = expected.into_iter().collect();
    let found: Vec<u64> = lines.iter().map(|line| line.seq).collect();
    assert_eq!(found, expected);
    for line in lines {
        assert_eq!(line.line.text, line.seq.to_string());
    }
}

async fn take(stream: &mut BoxStream<'static, Result<Line, ReadError>>, count: usize) -> Vec<Line> {
    let mut lines = Vec::with_capacity(count);
    while lines.len() < count {
        let line = within("the next line", stream.next()).await;
        lines.push(line.expect("a follower does not end").unwrap());
    }
    lines
}

async fn append(log: &Arc<dyn LineLog>, source: LineSource, lines: Vec<NewLine>) -> u64 {
    within("an append of lines", log.append(source, lines))
        .await
        .unwrap()
}

pub async fn lines_are_numbered_within_their_source(backend: &impl Backend) {
    let log = backend.lines().await;
    let source = a_source();
    let other = LineSource::Deployment(DeploymentId(Uuid::now_v7()));
    assert_eq!(log.last(source).await.unwrap(), 0);
    assert!(log.read(source, 0, 10).await.unwrap().is_empty());

    assert_eq!(append(&log, source, numbered(1..=3)).await, 3);
    assert_eq!(append(&log, other, numbered(1..=1)).await, 1);
    assert_eq!(append(&log, source, numbered(4..=4)).await, 4);
    assert_eq!(append(&log, source, Vec::new()).await, 4);
    assert_eq!(append(&log, other, numbered(2..=5)).await, 5);

    assert_eq!(log.last(source).await.unwrap(), 4);
    assert_eq!(log.last(other).await.unwrap(), 5);
    assert_lines(&log.read(source, 0, 10).await.unwrap(), 1..=4);
    assert_lines(&log.read(other, 0, 10).await.unwrap(), 1..=5);
}

pub async fn lines_keep_all_that_they_say(backend: &impl Backend) {
    let log = backend.lines().await;
    let source = a_source();
    let lines = vec![
        NewLine {
            kind: LineKind::Container,
            cluster: Some(ClusterName::parse("west").unwrap()),
            instance: Some("web-1".to_owned()),
            ..line("snow ☃ and \"quotes\" \\ and a tab\t and \u{1b}[31mred")
        },
        NewLine {
            kind: LineKind::Platform,
            ..line("")
        },
        line("x".repeat(16 * 1024)),
    ];
    append(&log, source, lines.clone()).await;
    let read = log.read(source, 0, 10).await.unwrap();
    let read: Vec<NewLine> = read.into_iter().map(|line| line.line).collect();
    assert_eq!(read, lines);
}

pub async fn batches_of_several_writers_stay_together(backend: &impl Backend) {
    const WRITERS: u64 = 8;
    const BATCHES: u64 = 10;
    let source = a_source();
    let writers = (0..WRITERS).map(|writer| async move {
        let log = backend.lines().await;
        for batch in 0..BATCHES {
            let lines = (0..3).map(|n| line(format!("{writer} {batch} {n}")));
            let last = append(&log, source, lines.collect()).await;
            let mine = log.read(source, last - 3, 3).await.unwrap();
            for (n, line) in mine.iter().enumerate() {
                assert_eq!(line.line.text, format!("{writer} {batch} {n}"));
            }
        }
    });
    within("all writers", join_all(writers)).await;
    let log = backend.lines().await;
    let total = WRITERS * BATCHES * 3;
    assert_eq!(log.last(source).await.unwrap(), total);
    let lines = log.read(source, 0, usize::MAX).await.unwrap();
    let numbers: Vec<u64> = lines.iter().map(|line| line.seq).collect();
    assert_eq!(numbers, (1..=total).collect::<Vec<_>>());
    for writer in 0..WRITERS {
        let own = lines
            .iter()
            .filter(|line| line.line.text.starts_with(&format!("{writer} ")));
        let own: Vec<&str> = own.map(|line| line.line.text.as_str()).collect();
        let expected: Vec<String> = (0..BATCHES)
            .flat_map(|batch| (0..3).map(move |n| format!("{writer} {batch} {n}")))
            .collect();
        assert_eq!(own, expected, "a writer's lines are in its order");
    }
}

pub async fn a_reader_follows_from_any_line(backend: &impl Backend) {
    let log = backend.lines().await;
    let source = a_source();
    let mut before_all = log.follow(source, 0).await.unwrap();
    append(&log, source, numbered(1..=5)).await;
    append(&log, a_source(), numbered(1..=5)).await;
    append(&log, source, numbered(6..=8)).await;
    // Within a batch, between two of them, and at the end.
    let mut within_batch = log.follow(source, 3).await.unwrap();
    let mut between = log.follow(source, 5).await.unwrap();
    let mut at_end = log.follow(source, 8).await.unwrap();
    assert_lines(&take(&mut before_all, 8).await, 1..=8);
    assert_lines(&take(&mut within_batch, 5).await, 4..=8);
    assert_lines(&take(&mut between, 3).await, 6..=8);
    append(&log, source, numbered(9..=10)).await;
    for stream in [
        &mut before_all,
        &mut within_batch,
        &mut between,
        &mut at_end,
    ] {
        assert_lines(&take(stream, 2).await, 9..=10);
    }
}

pub async fn a_long_output_is_read_in_parts(backend: &impl Backend) {
    let log = backend.lines().await;
    let source = a_source();
    // More than one message of any broker holds.
    append(&log, source, numbered(1..=3000)).await;
    for batch in 0..10 {
        let first = 3001 + batch * 50;
        append(&log, source, numbered(first..first + 50)).await;
    }
    let large = (0..200).map(|_| line("y".repeat(16 * 1024))).collect();
    assert_eq!(append(&log, source, large).await, 3700);
    assert_lines(&log.read(source, 0, 1).await.unwrap(), [1]);
    assert_lines(&log.read(source, 2990, 20).await.unwrap(), 2991..=3010);
    assert_lines(&log.read(source, 3060, 70).await.unwrap(), 3061..=3130);
    assert_lines(
        &log.read(source, 0, usize::MAX).await.unwrap()[..3500],
        1..=3500,
    );
    assert!(log.read(source, 3700, 10).await.unwrap().is_empty());
    let tail = log.read(source, 3695, 10).await.unwrap();
    assert_eq!(tail.len(), 5);
    let mut follow = log.follow(source, 0).await.unwrap();
    let all = take(&mut follow, 3700).await;
    assert_eq!(all.last().unwrap().seq, 3700);
}

pub async fn lines_and_followers_survive_a_restart(backend: &impl Backend) {
    let source = a_source();
    let log = backend.lines().await;
    append(&log, source, numbered(1..=6)).await;
    let mut follower = log.follow(source, 0).await.unwrap();
    assert_lines(&take(&mut follower, 4).await, 1..=4);
    drop(log);
    if backend.abilities().handles_survive {
        backend.restart().await;
    } else {
        drop(follower);
        backend.restart().await;
        follower = backend.lines().await.follow(source, 4).await.unwrap();
    }
    let log = backend.lines().await;
    within("an append after the restart", async {
        while log.append(source, numbered(7..=9)).await.is_err() {
            assert_eq!(log.last(source).await.unwrap_or(6), 6, "half an append");
        }
    })
    .await;
    assert_lines(&take(&mut follower, 5).await, 5..=9);
    assert_lines(&log.read(source, 0, 100).await.unwrap(), 1..=9);
}
