use futures_util::{StreamExt, future::join_all};

use super::*;
use crate::embedded::{LockError, OpenError};

#[tokio::test]
async fn expectations_and_repetitions_hold_also_after_reopening() {
    let dir = tempfile::tempdir().unwrap();
    for round in 0..2 {
        let log = open(dir.path()).await;
        if round == 0 {
            let none = Expected::Last(Position::ZERO);
            assert_eq!(log.append(event(1, 1, none)).await.unwrap(), stored(1));
            assert_eq!(log.append(event(2, 2, none)).await.unwrap(), stored(2));
            let first = Expected::Last(Position(1));
            assert_eq!(log.append(event(1, 3, first)).await.unwrap(), stored(3));
        }
        let stale = log.append(event(1, 9, Expected::Last(Position(1)))).await;
        assert!(is_conflict(&stale, 3), "{stale:?}");
        let again = log.append(event(1, 1, Expected::Last(Position(2)))).await;
        let again = again.unwrap();
        assert!(again.duplicate && again.position == Position(1));
        let of_one = log.read_aggregate(&subject(1)).await.unwrap();
        let positions: Vec<_> = of_one.iter().map(|r| r.position.0).collect();
        assert_eq!(positions, [1, 3]);
        assert_eq!(&*of_one[1].bytes, br#"{"id":3}"#);
        assert_eq!(log.head().await.unwrap(), Position(3));
        assert_eq!(log.get(Position(4)).await.unwrap(), None);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_of_many_wins_an_aggregate() {
    let dir = tempfile::tempdir().unwrap();
    let log = open(dir.path()).await;
    let none = Expected::Last(Position::ZERO);
    let answers = join_all((1..=50).map(|id| log.append(event(1, id, none)))).await;
    assert_eq!(answers.iter().filter(|a| a.is_ok()).count(), 1);
    let conflicts = answers.iter().filter(|a| is_conflict(a, 1)).count();
    assert_eq!(conflicts, 49);
}

#[tokio::test]
async fn too_large_an_event_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let log = open(dir.path()).await;
    let mut large = event(1, 1, Expected::Any);
    large.bytes = vec![b'x'; 65_536].into();
    let refused = log.append(large.clone()).await;
    assert!(matches!(
        refused,
        Err(AppendError::TooLarge { bytes: 65_536 })
    ));
    large.bytes.truncate(65_535);
    assert_eq!(log.append(large.clone()).await.unwrap(), stored(1));
    let read = log.get(Position(1)).await.unwrap().unwrap();
    assert_eq!(read.bytes, large.bytes);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_log_of_many_segments_reads_as_one() {
    let dir = tempfile::tempdir().unwrap();
    let config = EmbeddedConfig {
        sync: false,
        segment_bytes: 4_000,
        ..EmbeddedConfig::default()
    };
    for round in 0..3 {
        let log = EmbeddedLog::open(dir.path(), config.clone()).await.unwrap();
        for id in (round * 500)..(round + 1) * 500 {
            put(&log, id % 7, id as u128).await;
        }
    }
    let segments = std::fs::read_dir(dir.path().join("segments"))
        .unwrap()
        .filter(|e| e.as_ref().unwrap().path().extension().unwrap() == "seg")
        .count();
    assert!(segments > 10, "{segments}");
    let log = open(dir.path()).await;
    let all = all(&log).await.unwrap();
    let positions: Vec<_> = all.iter().map(|r| r.position.0).collect();
    assert_eq!(positions, Vec::from_iter(1..=1_500));
    for recorded in all.iter().step_by(97) {
        let got = log.get(recorded.position).await.unwrap().unwrap();
        assert_eq!(got, *recorded);
    }
    let three = SubjectFilter::exactly(subject(3));
    let of_three = log.read(Position(700), &three, 10).await.unwrap();
    assert_eq!(of_three.len(), 10);
    assert!(of_three.iter().all(|r| r.subject == subject(3)));
    assert!(of_three[0].position > Position(700));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_tail_has_everything_once_and_ends_with_the_log() {
    let dir = tempfile::tempdir().unwrap();
    let log = open(dir.path()).await;
    join_all((0..300).map(|i| put(&log, i % 2, i as u128))).await;
    let mut tail = log
        .tail(Position(100), SubjectFilter::default())
        .await
        .unwrap();
    let appending = join_all((300..400).map(|i| put(&log, i % 2, i as u128)));
    let reading = async {
        for position in 101..=400 {
            let recorded = tail.next().await.unwrap().unwrap();
            assert_eq!(recorded.position, Position(position));
        }
    };
    soon(futures_util::future::join(appending, reading)).await;
    log.close().await;
    let end = soon(tail.next()).await.unwrap();
    assert!(matches!(end, Err(ReadError::Unavailable(_))));
    assert!(soon(tail.next()).await.is_none());
    let late = log.append(event(1, 999, Expected::Any)).await;
    assert!(matches!(late, Err(AppendError::Unavailable(_))));
    // A tail that is still held does not keep the folder.
    open(dir.path()).await;
}

#[tokio::test]
async fn a_second_opening_is_told_who_has_the_folder() {
    let dir = tempfile::tempdir().unwrap();
    let _log = open(dir.path()).await;
    let second = EmbeddedLog::open(dir.path(), EmbeddedConfig::default()).await;
    match second {
        Err(OpenError::Lock(LockError::Held { holder, .. })) => {
            assert_eq!(holder, Some(std::process::id()));
        }
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn the_identity_stays() {
    let dir = tempfile::tempdir().unwrap();
    let first = open(dir.path()).await.info().await.unwrap();
    let second = open(dir.path()).await.info().await.unwrap();
    assert_eq!(first.identity, second.identity);
    assert_ne!(first.identity, {
        let other = tempfile::tempdir().unwrap();
        open(other.path()).await.info().await.unwrap().identity
    });
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_index_moves_to_disk_and_can_be_lost() {
    let dir = tempfile::tempdir().unwrap();
    let config = EmbeddedConfig {
        sync: false,
        index_round: 1_000,
        ..EmbeddedConfig::default()
    };
    let log = EmbeddedLog::open(dir.path(), config.clone()).await.unwrap();
    let count = 5_300;
    for chunk in Vec::from_iter(0..count).chunks(300) {
        join_all(chunk.iter().map(|&i| put(&log, i % 100, i as u128))).await;
    }
    let check = async |log: &EmbeddedLog| {
        assert!(put(log, 7, 7).await.duplicate);
        assert!(put(log, 7, count as u128 - 1).await.duplicate);
        let wrong = log.append(event(7, u128::MAX, Expected::Last(Position(8))));
        assert!(wrong.await.is_err());
        let of_seven = log.read_aggregate(&subject(7)).await.unwrap();
        assert_eq!(of_seven.len(), (0..count).filter(|i| i % 100 == 7).count());
    };
    check(&log).await;
    let tables = dir.path().join("index");
    for lose in [false, true] {
        log.close().await;
        if lose {
            std::fs::remove_dir_all(&tables).unwrap();
        }
        let log = EmbeddedLog::open(dir.path(), config.clone()).await.unwrap();
        check(&log).await;
        log.close().await;
    }
}
