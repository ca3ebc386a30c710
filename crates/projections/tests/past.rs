//! The past, as it is told from snapshots and a few events, is what a replay to it gives.

#![allow(clippy::unwrap_used)]

use std::sync::Arc;

use daybook_events::memory::MemoryLog;
use daybook_events::testing::fleet::{Fleet, Size, choices};
use daybook_events::{Event, EventLog, Position, Subject};
use daybook_projections::{DeploymentFilter, Ledger, Moment, Page, PastError, Projections, replay};
use proptest::prelude::*;

/// A random ledger; every fortieth event is something that no fold can use.
fn ledger_of(length: u64, seed: u64) -> MemoryLog {
    let log = MemoryLog::new();
    let mut fleet = Fleet::new(Size::default());
    let mut choose = choices(seed);
    for n in 1..=length {
        let happened = fleet.next(&mut choose);
        let (mut subject, mut bytes) = (happened.subject, happened.bytes);
        if n % 40 == 0 {
            let text = String::from_utf8(bytes.to_vec()).unwrap();
            bytes = match n / 40 % 4 {
                0 => "no event".into(),
                1 => text.replace(".v1\"", ".v7\"").into(),
                2 => text.replace("\"revision\":", "\"revision\":9").into(),
                _ => {
                    subject = Subject::Other(subject.to_string().replace("._.", ".new."));
                    text.into()
                }
            };
        }
        log.store(subject, bytes);
    }
    log
}

async fn folded(log: &MemoryLog) -> Ledger {
    let port: Arc<dyn EventLog> = Arc::new(log.clone());
    let head = port.head().await.unwrap();
    let projections = replay::state_at(&port, head).await.unwrap();
    Ledger::new(port, projections)
}

async fn same_past(ledger: &Ledger, at: Position) {
    let then = replay::state_at(ledger.log(), at).await.unwrap();
    let overview = then.overview(None, None).unwrap();
    assert_eq!(ledger.overview_at(at, None, None).await.unwrap(), overview);
    assert_eq!(
        ledger.state_hash_at(at).await.unwrap(),
        then.state_hash().1,
        "at {at}"
    );
    let mut filters = vec![DeploymentFilter::default()];
    if let Some(shown) = overview.instances.last() {
        let instance = &shown.instance;
        let (project, environment) = (&instance.project, &instance.environment);
        assert_eq!(
            ledger
                .overview_at(at, Some(project), Some(environment))
                .await
                .unwrap(),
            then.overview(Some(project), Some(environment)).unwrap()
        );
        filters.push(DeploymentFilter::of(instance));
        filters.push(DeploymentFilter {
            project: Some(project.clone()),
            statuses: shown.main.iter().map(|d| d.status).collect(),
            ..DeploymentFilter::default()
        });
    }
    for filter in filters {
        let mut page = Page::new(Some(5), None).unwrap();
        loop {
            let expected = then.history(&filter, page).unwrap();
            let found = ledger.history_at(at, &filter, page).await.unwrap();
            assert_eq!(found, expected, "at {at}, {filter:?}");
            match found.next {
                Some(next) => page = page.starting(next),
                None => break,
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(8))]

    #[test]
    fn the_past_is_what_a_replay_to_it_gives(
        seed in any::<u64>(),
        length in 1_u64..1500,
        places in prop::collection::vec(0.0_f64..=1.0, 2),
    ) {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
        runtime.block_on(async {
            let log = ledger_of(length, seed);
            let ledger = folded(&log).await;
            for place in places {
                same_past(&ledger, Position((length as f64 * place) as u64)).await;
            }
            same_past(&ledger, Position(length)).await;
            same_past(&ledger, Position::ZERO).await;
        });
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn it_is_the_same_around_each_place_where_something_is_written_down() {
    let log = ledger_of(9000, 5);
    let ledger = folded(&log).await;
    for at in [
        1, 31, 32, 33, 2047, 2048, 2049, 4095, 4096, 4097, 6144, 6145, 8191, 8192, 8193, 8595,
        8597, 8999,
    ] {
        same_past(&ledger, Position(at)).await;
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(3))]

    /// Whether the sum that is nearest stands before a position, behind it, or is that of the end.
    #[test]
    fn a_past_state_hash_is_what_a_replay_gives(
        seed in any::<u64>(),
        length in 4097_u64..7_000,
        mut places in prop::collection::vec(0.0_f64..=1.0, 12),
    ) {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
        runtime.block_on(async {
            let log = ledger_of(length, seed);
            let ledger = folded(&log).await;
            let then = Projections::in_memory();
            places.sort_by(f64::total_cmp);
            for place in places {
                let at = Position((length as f64 * place) as u64);
                replay::fold_to(&then, ledger.log(), at, |_| {}).await.unwrap();
                let hash = ledger.state_hash_at(at).await.unwrap();
                assert_eq!(hash, then.state_hash().1, "at {at} of {length}");
            }
        });
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_time_means_the_ledger_before_the_first_event_that_was_recorded_later() {
    let log = ledger_of(700, 9);
    let ledger = folded(&log).await;
    let events = log
        .read(Position::ZERO, &Default::default(), 1000)
        .await
        .unwrap();
    let recorded: Vec<_> = events
        .iter()
        .map(|r| Some(Event::from_bytes(&r.bytes).ok()?.recordedtime))
        .collect();
    let known: Vec<_> = recorded.iter().flatten().copied().collect();
    for time in [
        known[0],
        known[1],
        known[350],
        *known.iter().max().unwrap(),
        "2000-01-01T00:00:00Z".parse().unwrap(),
        "2999-01-01T00:00:00Z".parse().unwrap(),
    ] {
        let later = recorded.iter().position(|t| t.is_some_and(|t| t > time));
        let expected = Position(later.unwrap_or(recorded.len()) as u64);
        let found = ledger.position_of(Moment::Time(time)).unwrap();
        assert_eq!(found, expected, "{time}");
    }
}

#[tokio::test]
async fn what_has_not_been_yet_is_refused() {
    let ledger = folded(&ledger_of(10, 1)).await;
    let refused = ledger.overview_at(Position(11), None, None).await;
    assert!(matches!(
        refused.unwrap_err(),
        PastError::NotYet {
            wanted: Position(11),
            reached: Position(10)
        }
    ));
}

#[tokio::test]
async fn an_event_that_the_log_has_lost_is_named() {
    let ledger = folded(&ledger_of(400, 3)).await;
    let empty: Arc<dyn EventLog> = Arc::new(MemoryLog::new());
    let ledger = Ledger::new(empty, ledger.projections().clone());
    let lost = ledger.overview_at(Position(390), None, None).await;
    assert!(matches!(lost.unwrap_err(), PastError::Lost(_)));
}

#[test]
fn a_moment_is_a_position_or_a_time() {
    assert_eq!("17".parse(), Ok(Moment::At(Position(17))));
    let time = "2024-01-15T10:30:00Z";
    assert_eq!(time.parse(), Ok(Moment::Time(time.parse().unwrap())));
    for bad in [
        "",
        "-1",
        "+3",
        "99999999999999999999",
        "yesterday",
        "2024-01-15",
    ] {
        assert!(bad.parse::<Moment>().is_err(), "{bad}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_state_hash_does_not_depend_on_batches_or_restarts() {
    let log = ledger_of(5000, 21);
    let port: Arc<dyn EventLog> = Arc::new(log.clone());
    let expected = folded(&log).await.projections().state_hash();
    let dir = tempfile::tempdir().unwrap();
    for at in [1, 2, 700, 701, 4096, 4500, 5000] {
        let projections = Projections::open(dir.path()).unwrap();
        replay::fold_to(&projections, &port, Position(at), |_| {})
            .await
            .unwrap();
        let then = replay::state_at(&port, Position(at)).await.unwrap();
        assert_eq!(projections.state_hash(), then.state_hash());
    }
    let projections = Projections::open(dir.path()).unwrap();
    assert_eq!(projections.state_hash(), expected);
}
