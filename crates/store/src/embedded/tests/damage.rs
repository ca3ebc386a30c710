//! Damage is told from the torn end of a write, and neither is passed over in silence.

use std::fs;
use std::path::PathBuf;

use super::*;
use crate::embedded::OpenError;

/// A log of ten events, each a group of its own; and its one segment.
async fn ten() -> (tempfile::TempDir, PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let log = open(dir.path()).await;
    for id in 1..=10 {
        put(&log, 1, id).await;
    }
    log.close().await;
    let segment = dir.path().join("segments/00000000000000000001.seg");
    (dir, segment)
}

/// Where the records of ten events begin, and where the last one ends.
fn offsets(bytes: &[u8]) -> Vec<usize> {
    let mut offsets = vec![64];
    while let Some(len) = bytes[offsets[offsets.len() - 1]..].first_chunk() {
        offsets.push(offsets[offsets.len() - 1] + 8 + u32::from_le_bytes(*len) as usize);
    }
    offsets
}

async fn positions(log: &EmbeddedLog) -> Vec<u64> {
    all(log)
        .await
        .unwrap()
        .iter()
        .map(|r| r.position.0)
        .collect()
}

#[tokio::test]
async fn a_flipped_bit_in_an_acknowledged_event_is_damage() {
    let (dir, segment) = ten().await;
    let good = fs::read(&segment).unwrap();
    let offsets = offsets(&good);
    assert_eq!(offsets.len(), 11);
    for event in [0, 4, 8] {
        // In its length, its checksum, its position and its content.
        for within in [0, 5, 9, 60] {
            let mut bad = good.clone();
            bad[offsets[event] + within] ^= 0x10;
            fs::write(&segment, &bad).unwrap();
            let opened = EmbeddedLog::open(dir.path(), EmbeddedConfig::default()).await;
            match opened {
                Err(OpenError::Damaged { position, .. }) => {
                    assert_eq!(position, Position(event as u64 + 1));
                }
                other => panic!("event {event}, byte {within}: {other:?}"),
            }
            assert!(fs::read(&segment).unwrap() == bad, "it was left as it is");
        }
    }
    fs::write(&segment, &good).unwrap();
    assert_eq!(positions(&open(dir.path()).await).await.len(), 10);
}

#[tokio::test]
async fn a_destroyed_header_is_damage() {
    let (dir, segment) = ten().await;
    let mut bytes = fs::read(&segment).unwrap();
    bytes[..64].fill(0);
    fs::write(&segment, &bytes).unwrap();
    let opened = EmbeddedLog::open(dir.path(), EmbeddedConfig::default()).await;
    assert!(matches!(opened, Err(OpenError::Damaged { .. })));
}

#[tokio::test]
async fn a_torn_end_is_cut_off_and_its_position_given_anew() {
    let (dir, segment) = ten().await;
    let good = fs::read(&segment).unwrap();
    let last = offsets(&good)[9];
    for len in [last + 1, last + 8, last + 50, good.len() - 1] {
        // Cut short, and cut short before allocated space.
        for zeros in [0, 5_000] {
            let mut torn = good[..len].to_vec();
            torn.resize(len + zeros, 0);
            fs::write(&segment, &torn).unwrap();
            let log = open(dir.path()).await;
            assert_eq!(
                positions(&log).await,
                Vec::from_iter(1..=9),
                "{len} {zeros}"
            );
            assert_eq!(put(&log, 2, 77).await, stored(10));
            log.close().await;
            let log = open(dir.path()).await;
            assert_eq!(
                log.get(Position(10)).await.unwrap().unwrap().subject,
                subject(2)
            );
        }
    }
}

/// Of a group that nobody was told of, any part may have reached the disk, also a later one
/// without an earlier one.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_group_with_a_hole_is_cut_off() {
    let (dir, segment) = ten().await;
    let log = open(dir.path()).await;
    // What the log would write as one group: records that say that 10 is synced.
    let mut group = Vec::new();
    for position in 11..=13 {
        let record = crate::embedded::record::Record {
            position,
            synced: 10,
            stored_at: 0,
            id: Uuid::from_u128(position.into()),
            subject: &subject(1).to_string(),
            bytes: b"{}",
        };
        record.encode(&mut group);
    }
    log.close().await;
    let mut bytes = fs::read(&segment).unwrap();
    let hole = bytes.len();
    bytes.extend_from_slice(&group);
    bytes[hole..hole + group.len() / 3].fill(0);
    fs::write(&segment, &bytes).unwrap();
    let log = open(dir.path()).await;
    assert_eq!(positions(&log).await, Vec::from_iter(1..=10));
    assert_eq!(put(&log, 1, 99).await, stored(11));
}

#[tokio::test]
async fn damage_in_a_finished_segment_is_found_by_reading_it() {
    let dir = tempfile::tempdir().unwrap();
    let config = EmbeddedConfig {
        segment_bytes: 1_000,
        // So that no start reads the beginning of the log again.
        index_round: 10,
        ..EmbeddedConfig::default()
    };
    let log = EmbeddedLog::open(dir.path(), config.clone()).await.unwrap();
    for id in 1..=50 {
        put(&log, 1, id).await;
    }
    log.close().await;
    let segment = dir.path().join("segments/00000000000000000001.seg");
    let mut bytes = fs::read(&segment).unwrap();
    let third = offsets(&bytes)[2];
    bytes[third + 60] ^= 1;
    fs::write(&segment, &bytes).unwrap();

    let log = EmbeddedLog::open(dir.path(), config).await.unwrap();
    let damaged = log.get(Position(3)).await;
    assert!(matches!(damaged, Err(ReadError::Damaged { position, .. }) if position.0 == 3));
    assert!(log.get(Position(2)).await.unwrap().is_some());
    let all = all(&log).await;
    assert!(matches!(all, Err(ReadError::Damaged { position, .. }) if position.0 == 3));
    log.close().await;

    // Without the segment's index the opening reads it.
    fs::remove_file(segment.with_extension("idx")).unwrap();
    let opened = EmbeddedLog::open(dir.path(), EmbeddedConfig::default()).await;
    assert!(matches!(opened, Err(OpenError::Damaged { position, .. }) if position.0 == 3));
}

#[tokio::test]
async fn a_missing_segment_is_damage() {
    let dir = tempfile::tempdir().unwrap();
    let config = EmbeddedConfig {
        segment_bytes: 1_000,
        ..EmbeddedConfig::default()
    };
    let log = EmbeddedLog::open(dir.path(), config).await.unwrap();
    for id in 1..=50 {
        put(&log, 1, id).await;
    }
    log.close().await;
    let mut segments: Vec<_> = fs::read_dir(dir.path().join("segments"))
        .unwrap()
        .map(|e| e.unwrap().path())
        .filter(|p| p.extension().unwrap() == "seg")
        .collect();
    segments.sort();
    for missing in [0, 1] {
        let aside = dir.path().join("aside");
        fs::rename(&segments[missing], &aside).unwrap();
        let opened = EmbeddedLog::open(dir.path(), EmbeddedConfig::default()).await;
        assert!(
            matches!(opened, Err(OpenError::Damaged { .. })),
            "{opened:?}"
        );
        fs::rename(&aside, &segments[missing]).unwrap();
    }
    assert_eq!(positions(&open(dir.path()).await).await.len(), 50);
}

#[tokio::test]
async fn an_index_of_another_log_is_made_anew() {
    let (dir, _) = ten().await;
    let (other, _) = ten().await;
    fs::remove_dir_all(dir.path().join("index")).unwrap();
    fs::rename(other.path().join("index"), dir.path().join("index")).unwrap();
    let log = open(dir.path()).await;
    assert!(put(&log, 1, 3).await.duplicate);
    log.close().await;
    // And one that cannot be read at all.
    for file in fs::read_dir(dir.path().join("index")).unwrap() {
        let path = file.unwrap().path();
        if path.is_file() {
            fs::write(path, b"rubbish").unwrap();
        }
    }
    let log = open(dir.path()).await;
    assert!(put(&log, 1, 3).await.duplicate);
    assert_eq!(log.read_aggregate(&subject(1)).await.unwrap().len(), 10);
}
