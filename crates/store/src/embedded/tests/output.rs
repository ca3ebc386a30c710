use std::fs;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::SystemTime;

use daybook_events::lines::{Line, LineKind, LineLog, LineSource, NewLine};
use daybook_events::names::BuildId;
use futures_util::StreamExt;
use futures_util::future::join_all;
use futures_util::poll;
use jiff::Timestamp;

use super::*;
use crate::embedded::{EmbeddedLines, LineRetention};

fn source(n: u128) -> LineSource {
    LineSource::Build(BuildId(Uuid::from_u128(n)))
}

fn lines(texts: impl IntoIterator<Item = String>) -> Vec<NewLine> {
    let line = |text| NewLine {
        time: Timestamp::UNIX_EPOCH,
        kind: LineKind::Build,
        cluster: None,
        instance: None,
        text,
    };
    texts.into_iter().map(line).collect()
}

async fn open_lines(dir: &Path) -> EmbeddedLines {
    EmbeddedLines::open(dir, LineRetention::default())
        .await
        .unwrap()
}

fn seqs(lines: &[Line]) -> Vec<u64> {
    lines.iter().map(|l| l.seq).collect()
}

#[tokio::test]
async fn a_line_that_was_being_written_is_cut_off() {
    let dir = tempfile::tempdir().unwrap();
    let log = open_lines(dir.path()).await;
    let three = ["a", "b", "c"].map(String::from);
    log.append(source(1), lines(three)).await.unwrap();
    drop(log);
    let file = dir
        .path()
        .join(source(1).to_string())
        .join("00000000000000000001.jsonl");
    let bytes = fs::read(&file).unwrap();
    fs::write(&file, &bytes[..bytes.len() - 3]).unwrap();
    let log = open_lines(dir.path()).await;
    assert_eq!(log.last(source(1)).await.unwrap(), 2);
    let next = lines(["d".to_owned()]);
    assert_eq!(log.append(source(1), next).await.unwrap(), 3);
    let read = log.read(source(1), 0, 10).await.unwrap();
    let texts: Vec<_> = read.iter().map(|l| l.line.text.as_str()).collect();
    assert_eq!(texts, ["a", "b", "d"]);
}

#[tokio::test]
async fn a_damaged_line_keeps_its_number() {
    let dir = tempfile::tempdir().unwrap();
    let log = open_lines(dir.path()).await;
    let three = ["a", "b", "c"].map(String::from);
    log.append(source(1), lines(three)).await.unwrap();
    let file = dir
        .path()
        .join(source(1).to_string())
        .join("00000000000000000001.jsonl");
    let text = fs::read_to_string(&file).unwrap();
    fs::write(&file, text.replace("\"b\"", "\0\0\0")).unwrap();
    let read = log.read(source(1), 0, 10).await.unwrap();
    assert_eq!(seqs(&read), [1, 2, 3]);
    assert!(read[1].line.text.contains("damaged"));
    assert_eq!(read[2].line.text, "c");
}

#[tokio::test]
async fn a_long_text_is_cut_and_says_so() {
    let dir = tempfile::tempdir().unwrap();
    let log = open_lines(dir.path()).await;
    let long = lines(["ü".repeat(16_384)]);
    log.append(source(1), long).await.unwrap();
    let read = log.read(source(1), 0, 1).await.unwrap();
    let text = &read[0].line.text;
    assert!(text.len() <= 16_384 && text.len() > 16_000);
    assert!(text.ends_with("cut by Daybook]"));
}

#[tokio::test]
async fn old_beginnings_and_old_sources_go() {
    let dir = tempfile::tempdir().unwrap();
    let retention = LineRetention {
        max_bytes: 3 << 20,
        ..LineRetention::default()
    };
    let log = EmbeddedLines::open(dir.path(), retention).await.unwrap();
    let small = lines(["still wanted".to_owned()]);
    log.append(source(2), small).await.unwrap();
    let mut follower = log.follow(source(2), 0).await.unwrap();
    for _ in 0..50 {
        let batch = (0..8).map(|_| "x".repeat(16_000));
        log.append(source(1), lines(batch)).await.unwrap();
    }
    log.sweep(SystemTime::now());
    let kept = log.read(source(1), 0, usize::MAX).await.unwrap();
    assert_eq!(kept.last().unwrap().seq, 400);
    assert!(kept[0].seq > 1 && kept.len() < 250, "{}", kept.len());
    let numbers = Vec::from_iter(kept[0].seq..=400);
    assert_eq!(seqs(&kept), numbers);
    // From a number that is gone, reading begins with what is left.
    let mut from_gone = log.follow(source(1), 2).await.unwrap();
    let first = soon(from_gone.next()).await.unwrap().unwrap();
    assert_eq!(first.seq, kept[0].seq);
    // The newest file of a source that is followed stays.
    assert_eq!(soon(follower.next()).await.unwrap().unwrap().seq, 1);
    drop((follower, from_gone));

    let later = SystemTime::now() + Duration::from_hours(24 * 31);
    log.sweep(later);
    assert_eq!(log.last(source(1)).await.unwrap(), 0);
    assert_eq!(log.last(source(2)).await.unwrap(), 0);
    let left = fs::read_dir(dir.path()).unwrap();
    let left: Vec<_> = left.map(|e| e.unwrap().file_name()).collect();
    assert_eq!(left, ["lock"]);
}

#[tokio::test]
async fn a_follower_ends_with_the_folder() {
    let dir = tempfile::tempdir().unwrap();
    let log = open_lines(dir.path()).await;
    let mut follower = log.follow(source(1), 0).await.unwrap();
    drop(log);
    assert!(soon(follower.next()).await.unwrap().is_err());
    assert!(soon(follower.next()).await.is_none());
    open_lines(dir.path()).await;
}

/// A server that starts follows the output of hundreds of deployments at once.
#[test]
fn many_sources_share_a_few_threads() {
    let dir = tempfile::tempdir().unwrap();
    let threads = Arc::new(AtomicUsize::new(0));
    let started = Arc::clone(&threads);
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .on_thread_start(move || {
            started.fetch_add(1, Ordering::Relaxed);
        })
        .build()
        .unwrap();
    runtime.block_on(async {
        let log = open_lines(dir.path()).await;
        let appends = (0..200).map(|n| log.append(source(n), lines(["a".to_owned()])));
        for appended in join_all(appends).await {
            assert_eq!(appended.unwrap(), 1);
        }
    });
    // One that works, and eight that wait for files; another one is made while one of them says that
    // it is done.
    let threads = threads.load(Ordering::Relaxed);
    assert!(threads < 40, "{threads} threads");
}

/// A client that does not read is not polled, for as long as it likes.
#[tokio::test]
async fn followers_that_are_not_polled_hold_nobody_up() {
    let dir = tempfile::tempdir().unwrap();
    let log = open_lines(dir.path()).await;
    let mut followers = Vec::new();
    for n in 0..20 {
        log.append(source(n), lines(["a".to_owned()]))
            .await
            .unwrap();
        let mut follower = log.follow(source(n), 0).await.unwrap();
        // It begins to read.
        assert!(poll!(follower.next()).is_pending());
        followers.push(follower);
    }
    let others = log.append(source(99), lines(["b".to_owned()]));
    let others = tokio::time::timeout(Duration::from_secs(60), others).await;
    assert_eq!(others.expect("a turn").unwrap(), 1);
}
