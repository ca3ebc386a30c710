//! Folds against random legal histories: whatever is read, batched or interrupted, the rows are
//! the same; and against what goes wrong with stores and logs.

use std::collections::BTreeMap;
use std::path::Path;

use daybook_events::access::{Access, Projects};
use daybook_events::build::Build;
use daybook_events::deployment::{Deployment, Status};
use daybook_events::domain::Domain;
use daybook_events::environment::Environment;
use daybook_events::gitops::Gitops;
use daybook_events::ledger::LedgerRecord;
use daybook_events::project::Project;
use daybook_events::routing::Routing;
use daybook_events::subscription::Subscription;
use daybook_events::testing::fleet::{Fleet, Size, choices};
use daybook_events::testing::time;
use daybook_events::{Aggregate, AggregateKind, DeploymentId, Folded, Position, Recorded, Subject};
use proptest::prelude::*;

use crate::keys::{LISTED, MARK};
use crate::slot::is_active;
use crate::table::{Table, Way, Write, open_db};
use crate::{AuditFilter, Change, DeploymentFilter, Page, Projections};

/// The events of a fleet, as a log would hand them out; every fortieth is written over by
/// something that no fold can use.
fn history(events: u64, seed: u64, spoil: bool) -> Vec<Recorded> {
    let mut fleet = Fleet::new(Size::default());
    let mut choose = choices(seed);
    (1..=events)
        .map(|n| {
            let happened = fleet.next(&mut choose);
            let mut bytes = happened.bytes;
            let mut subject = happened.subject;
            if spoil && n % 40 == 0 {
                let text = String::from_utf8(bytes.to_vec()).unwrap();
                bytes = match n / 40 % 4 {
                    0 => "no event".into(),
                    1 => text.replace(".v1\"", ".v7\"").into(),
                    2 => text
                        .replace("\"data\":{", "\"data\":{\"x\":1,")
                        .replace("\"revision\":", "\"revision\":9")
                        .into(),
                    _ => {
                        subject = Subject::Other(subject.to_string().replace("._.", ".new."));
                        text.into()
                    }
                };
            }
            Recorded {
                position: Position(n),
                subject,
                stored_at: time(n),
                bytes,
            }
        })
        .collect()
}

fn folded(events: &[Recorded], batch: usize) -> Projections {
    let projections = Projections::in_memory();
    for batch in events.chunks(batch) {
        projections.take(batch).unwrap();
    }
    projections
}

fn same_state<A: Aggregate + PartialEq + std::fmt::Debug>(
    projections: &Projections,
    subject: &Subject,
    events: &[&Recorded],
) {
    let expected = Folded::<A>::replay(events.iter().copied());
    let found = projections.folded::<A>(subject).unwrap();
    assert_eq!(found.state, expected.state, "{subject}");
    assert_eq!(found.revision, expected.revision);
    assert_eq!(found.position, expected.position);
    assert_eq!(found.last_id, expected.last_id);
}

#[test]
fn states_are_what_a_replay_of_each_aggregate_gives() {
    let events = history(3000, 7, true);
    let projections = folded(&events, 100);
    let mut by_subject = BTreeMap::<Subject, Vec<&Recorded>>::new();
    for event in &events {
        by_subject
            .entry(event.subject.clone())
            .or_default()
            .push(event);
    }
    let mut kinds = BTreeMap::<AggregateKind, u32>::new();
    for (subject, events) in &by_subject {
        let Some(kind) = subject.kind() else { continue };
        *kinds.entry(kind).or_default() += 1;
        match kind {
            AggregateKind::Project => same_state::<Project>(&projections, subject, events),
            AggregateKind::Environment => same_state::<Environment>(&projections, subject, events),
            AggregateKind::Build => same_state::<Build>(&projections, subject, events),
            AggregateKind::Deployment => same_state::<Deployment>(&projections, subject, events),
            AggregateKind::Gitops => same_state::<Gitops>(&projections, subject, events),
            AggregateKind::Routing => same_state::<Routing>(&projections, subject, events),
            AggregateKind::Domain => same_state::<Domain>(&projections, subject, events),
            AggregateKind::Subscription => {
                same_state::<Subscription>(&projections, subject, events);
            }
            AggregateKind::Ledger => same_state::<LedgerRecord>(&projections, subject, events),
            AggregateKind::Access => same_state::<Access>(&projections, subject, events),
        }
    }
    assert_eq!(kinds.len(), 6, "{kinds:?}");
}

#[test]
fn every_event_is_in_the_audit_once_and_in_order() {
    let events = history(1500, 3, true);
    let projections = folded(&events, 64);
    let mut page = Page::new(Some(97), None).unwrap();
    let mut rows = Vec::new();
    loop {
        let found = projections.audit(&AuditFilter::default(), page).unwrap();
        assert_eq!(found.position, Position(1500));
        rows.extend(found.items);
        match found.next {
            Some(next) => page = page.starting(next),
            None => break,
        }
    }
    let positions: Vec<_> = rows.iter().map(|r| r.position.0).collect();
    assert_eq!(positions, (1..=1500).rev().collect::<Vec<_>>());
    let void = rows.iter().filter(|r| r.void.is_some()).count() as u64;
    let c = projections.counters();
    assert_eq!(c.events, 1500);
    assert_eq!(c.void + c.unknown + c.unreadable, void);
    assert!(c.void > 0 && c.unknown > 0 && c.unreadable > 0, "{c:?}");
    assert!(
        rows.iter()
            .all(|r| r.summary.ends_with('.') || r.kind.contains("gitops"))
    );

    // Any filter finds what a look at all rows finds.
    let some = rows
        .iter()
        .find(|r| r.deployment.is_some() && r.service.is_some())
        .unwrap();
    let filters = [
        AuditFilter {
            project: some.project.clone(),
            ..AuditFilter::default()
        },
        AuditFilter {
            environment: some.environment.clone(),
            service: some.service.clone(),
            ..AuditFilter::default()
        },
        AuditFilter {
            deployment: some.deployment,
            ..AuditFilter::default()
        },
        AuditFilter {
            actor: Some("test".into()),
            kind: Some("routing".into()),
            ..AuditFilter::default()
        },
        AuditFilter {
            kind: Some("gitops.committed.v1".into()),
            ..AuditFilter::default()
        },
        AuditFilter {
            correlation: some.correlation,
            ..AuditFilter::default()
        },
        AuditFilter {
            void_only: true,
            ..AuditFilter::default()
        },
        AuditFilter {
            from: Some(time(300)),
            until: Some(time(310)),
            ..AuditFilter::default()
        },
        AuditFilter {
            actor: Some("nobody".into()),
            ..AuditFilter::default()
        },
        AuditFilter {
            visible: Projects::Named(some.project.iter().cloned().collect()),
            ..AuditFilter::default()
        },
        AuditFilter {
            visible: Projects::Named(["quiet".parse().unwrap()].into()),
            ..AuditFilter::default()
        },
    ];
    for filter in filters {
        let expected: Vec<_> = rows.iter().filter(|r| filter.matches(r)).cloned().collect();
        // The same in small steps, of which none looks at more than it may.
        let mut page = Page::new(Some(13), None).unwrap();
        let (mut found, mut steps) = (Vec::new(), 0);
        loop {
            let part = projections.audit_within(&filter, page, 100).unwrap();
            found.extend(part.items);
            steps += 1;
            match part.next {
                Some(next) => page = page.starting(next),
                None => break,
            }
        }
        assert_eq!(found, expected, "{filter:?}");
        if filter.from.is_some() {
            assert!(steps > 1500 / 140, "{steps}");
        }
        let mut found = Vec::new();
        let mut page = Page::new(Some(13), None).unwrap();
        loop {
            let part = projections.audit(&filter, page).unwrap();
            found.extend(part.items);
            match part.next {
                Some(next) => page = page.starting(next),
                None => break,
            }
        }
        assert_eq!(found, expected, "{filter:?}");
    }
}

/// The deployments of a history with their states, newest first, as the log has them.
fn deployments(events: &[Recorded]) -> Vec<(DeploymentId, Deployment)> {
    let mut all: Vec<(DeploymentId, Vec<&Recorded>)> = Vec::new();
    for event in events {
        if let Subject::Deployment(_, _, id) = event.subject {
            match all.iter_mut().find(|(d, _)| *d == id) {
                Some((_, events)) => events.push(event),
                None => all.push((id, vec![event])),
            }
        }
    }
    let states = all
        .into_iter()
        .filter_map(|(id, events)| Some((id, Folded::<Deployment>::replay(events).state?)));
    let mut states: Vec<_> = states.collect();
    states.reverse();
    states
}

#[test]
fn deployments_are_listed_newest_first_by_every_filter() {
    let events = history(4000, 11, true);
    let projections = folded(&events, 1000);
    let all = deployments(&events);
    assert!(all.len() > 40);
    let (_, some) = &all[3];
    let instance = &some.request.instance;
    let filters = [
        DeploymentFilter::default(),
        DeploymentFilter::of(instance),
        DeploymentFilter {
            project: Some(instance.project.clone()),
            ..Default::default()
        },
        DeploymentFilter {
            environment: Some(instance.environment.clone()),
            ..Default::default()
        },
        DeploymentFilter {
            project: Some(instance.project.clone()),
            environment: Some(instance.environment.clone()),
            ..Default::default()
        },
        DeploymentFilter {
            statuses: vec![some.status],
            ..Default::default()
        },
        DeploymentFilter {
            version: Some("main".into()),
            ..Default::default()
        },
        DeploymentFilter {
            version: all
                .iter()
                .find_map(|(_, d)| Some(d.source.as_ref()?.commit.short().to_owned())),
            ..Default::default()
        },
        DeploymentFilter {
            version: Some("none".into()),
            ..Default::default()
        },
    ];
    for filter in filters {
        let expected: Vec<_> = all
            .iter()
            .filter(|(_, d)| {
                let i = &d.request.instance;
                filter.project.as_ref().is_none_or(|p| *p == i.project)
                    && filter
                        .environment
                        .as_ref()
                        .is_none_or(|e| *e == i.environment)
                    && filter.service.as_ref().is_none_or(|s| *s == i.service)
                    && (filter.statuses.is_empty() || filter.statuses.contains(&d.status))
                    && filter.version.as_ref().is_none_or(|v| {
                        crate::views::version_text(d) == *v
                            || d.source.as_ref().is_some_and(|s| s.commit.short() == v)
                            || d.image.as_ref().is_some_and(|i| i.tag.as_str() == v)
                    })
            })
            .map(|(id, _)| *id)
            .collect();
        let mut page = Page::new(Some(7), None).unwrap();
        let (mut rows, mut history) = (Vec::new(), Vec::new());
        loop {
            let part = projections.deployments(&filter, page).unwrap();
            rows.extend(part.items);
            history.extend(projections.history(&filter, page).unwrap().items);
            match part.next {
                Some(next) => page = page.starting(next),
                None => break,
            }
        }
        let ids: Vec<_> = rows.iter().map(|r| r.id).collect();
        assert_eq!(ids, expected, "{filter:?}");
        let ids: Vec<_> = history.iter().map(|r| r.deployment).collect();
        assert_eq!(ids, expected, "{filter:?}");
        for (row, line) in rows.iter().zip(&history) {
            assert_eq!(row.main, line.active);
            assert_eq!(row.state.status, line.status);
            let one = projections.deployment(row.id).unwrap().unwrap();
            assert_eq!(one.state, row.state);
            assert_eq!(one.hostnames, row.hostnames);
        }
    }
    let active: Vec<_> = all
        .iter()
        .filter(|(_, d)| is_active(d.status))
        .map(|(id, _)| *id)
        .collect();
    let found = projections.active_deployments(None, None).unwrap();
    assert_eq!(found.iter().map(|r| r.id).collect::<Vec<_>>(), active);
    for (id, state) in &all {
        if let Some(build) = state.build {
            let waiting = projections
                .deployments_of_build(build)
                .unwrap()
                .contains(id);
            assert_eq!(waiting, state.status.in_pipeline());
        }
        let undecided = projections
            .undecided(&state.request.instance.project)
            .unwrap()
            .contains(id);
        assert_eq!(undecided, state.status == Status::AwaitingApproval);
    }
    let mut undecided = all.iter().map(|(_, d)| d.status);
    assert!(undecided.any(|s| s == Status::AwaitingApproval));
    let overview = projections.overview(None, None).unwrap();
    let shown: usize = overview
        .instances
        .iter()
        .map(|i| i.others.len() + usize::from(i.main.is_some()))
        .sum();
    assert_eq!(shown, active.len());
    serde_json::to_value(&overview).unwrap();
}

/// The folder of the newest store.
fn newest(root: &Path) -> std::path::PathBuf {
    let dirs = std::fs::read_dir(root).unwrap().map(|e| e.unwrap().path());
    let number = |p: &std::path::PathBuf| p.file_name()?.to_str()?.parse::<u64>().ok();
    dirs.max_by_key(number).unwrap()
}

#[test]
fn a_store_whose_writing_was_interrupted_is_thrown_away() {
    let events = history(600, 6, false);
    let dir = tempfile::tempdir().unwrap();
    let projections = Projections::open(dir.path()).unwrap();
    projections.take(&events).unwrap();
    drop(projections);
    {
        let db = open_db(&newest(dir.path())).unwrap();
        let mark = db.get(crate::keys::BEGUN).unwrap();
        assert_eq!(mark, db.get(crate::keys::CHECKPOINT).unwrap());
        db.insert(crate::keys::BEGUN, "further").unwrap();
    }
    let projections = Projections::open(dir.path()).unwrap();
    assert_eq!(projections.position(), Position::ZERO);
    projections.take(&events).unwrap();
    assert_eq!(
        projections.digest().unwrap(),
        folded(&events, 600).digest().unwrap()
    );
}

#[test]
fn a_damaged_or_foreign_store_is_thrown_away() {
    let events = history(600, 5, false);
    let dir = tempfile::tempdir().unwrap();
    let digest = |dir: &Path| {
        let projections = Projections::open(dir).unwrap();
        let from = projections.position();
        projections.take(&events).unwrap();
        if projections.flush().is_err() {
            // Damage that is seen only now; a runner starts anew then, as it is done here.
            projections.restart("").unwrap();
            projections.take(&events).unwrap();
            projections.flush().unwrap();
        }
        (from, projections.digest().unwrap())
    };
    let (from, expected) = digest(dir.path());
    assert_eq!(from, Position::ZERO);
    assert_eq!(digest(dir.path()), (Position(600), expected.clone()));

    // Another version.
    {
        let db = open_db(&newest(dir.path())).unwrap();
        db.insert(crate::keys::FORMAT, "0").unwrap();
    }
    assert_eq!(digest(dir.path()), (Position::ZERO, expected.clone()));

    // A row that is missing.
    {
        let db = open_db(&newest(dir.path())).unwrap();
        db.remove(crate::keys::chunk(18)).unwrap();
    }
    assert_eq!(digest(dir.path()), (Position::ZERO, expected.clone()));

    // Files that sled did not write so.
    for (part, garbage) in [(0, 64), (3, 4096), (2, 200_000)] {
        use std::os::unix::fs::FileExt;
        let file = newest(dir.path()).join("db");
        let length = std::fs::metadata(&file).unwrap().len();
        let offset = length.checked_div(part).unwrap_or(0);
        let db = std::fs::File::options().write(true).open(&file).unwrap();
        db.write_all_at(&vec![0xa5; garbage], offset).unwrap();
        drop(db);
        let (_, found) = digest(dir.path());
        assert_eq!(found, expected, "garbage at {offset}");
    }
    std::fs::write(newest(dir.path()).join("conf"), "nonsense").unwrap();
    assert_eq!(digest(dir.path()).1, expected);
}

/// The names of the sorted runs in the newest store.
fn runs(root: &Path) -> Vec<std::path::PathBuf> {
    let Ok(files) = std::fs::read_dir(newest(root).join("runs")) else {
        return Vec::new();
    };
    files.map(|e| e.unwrap().path()).collect()
}

#[test]
fn a_table_with_runs_says_what_one_in_memory_says() {
    let dir = tempfile::tempdir().unwrap();
    let memory = Table::memory();
    let mut disk = Table::open(dir.path(), b"t").unwrap();
    let mut choose = choices(11);
    // Eighteen large batches, of which sixteen become one run, and then small ones, which go to sled.
    for batch in 0..40_u32 {
        let (rows, size) = if batch < 18 { (400, 6000) } else { (40, 20) };
        for table in [&memory, &disk] {
            let mut choose = choices(u64::from(batch));
            let mut of_batch: Vec<_> = (0..rows)
                .map(|_| {
                    let key = format!("r{:04}", choose(3000));
                    let write = match choose(4) {
                        0 => Write::Remove,
                        _ => Write::Put(vec![b'a' + choose(26) as u8; size].into()),
                    };
                    (key.as_bytes().into(), write)
                })
                .collect();
            let checkpoint = Write::Put(batch.to_string().as_bytes().into());
            of_batch.push((crate::keys::CHECKPOINT.into(), checkpoint));
            table.apply(of_batch);
        }
        disk.flush().unwrap();
        if batch % 7 == 3 {
            drop(disk);
            disk = Table::open(dir.path(), b"t").unwrap();
        }
        let all = |table: &Table, prefix: &str, from: Option<&[u8]>, way| {
            let mut rows = Vec::new();
            let visit = |key: &[u8], value: &sled::IVec| {
                rows.push((key.to_vec(), value.clone()));
                std::ops::ControlFlow::<()>::Continue(())
            };
            table.scan(prefix.as_bytes(), from, way, visit).unwrap();
            rows
        };
        let from = format!("r{:04}", choose(3000));
        for way in [Way::Up, Way::Down] {
            // The whole table takes long to compare.
            let froms = [Some(from.as_bytes()), None];
            for from in froms.into_iter().take(1 + usize::from(batch % 8 == 1)) {
                let expected = all(&memory, "r", from, way);
                assert!(all(&disk, "r", from, way) == expected, "batch {batch}");
            }
        }
        for number in (0..3000).skip(batch as usize % 5).step_by(5) {
            let key = format!("r{number:04}");
            let expected = memory.get(key.as_bytes()).unwrap();
            assert_eq!(disk.get(key.as_bytes()).unwrap(), expected, "batch {batch}");
        }
        match batch {
            6 => assert_eq!(runs(dir.path()).len(), 7),
            17.. => assert_eq!(runs(dir.path()).len(), 3),
            _ => {}
        }
    }
}

#[test]
fn a_store_that_caught_up_goes_on_above_its_runs() {
    let events = history(9000, 8, false);
    let dir = tempfile::tempdir().unwrap();
    let projections = Projections::open(dir.path()).unwrap();
    for batch in events[..8000].chunks(4000) {
        projections.take(batch).unwrap();
        projections.flush().unwrap();
    }
    assert_eq!(runs(dir.path()).len(), 2);
    for batch in events[8000..8900].chunks(100) {
        projections.take(batch).unwrap();
        projections.flush().unwrap();
    }
    drop(projections);
    let projections = Projections::open(dir.path()).unwrap();
    assert_eq!(projections.position(), Position(8900));
    projections.take(&events[8900..]).unwrap();
    projections.flush().unwrap();
    assert_eq!(runs(dir.path()).len(), 2);
    let expected = folded(&events, 9000).digest().unwrap();
    assert_eq!(projections.digest().unwrap(), expected);

    // A run that was damaged, or lost, is noticed, and all is built anew.
    drop(projections);
    let run = runs(dir.path()).remove(0);
    let length = std::fs::metadata(&run).unwrap().len();
    std::fs::File::options()
        .write(true)
        .open(&run)
        .unwrap()
        .set_len(length - 1)
        .unwrap();
    let projections = Projections::open(dir.path()).unwrap();
    assert_eq!(projections.position(), Position::ZERO);
    projections.take(&events).unwrap();
    assert_eq!(projections.digest().unwrap(), expected);
}

#[test]
fn a_store_that_is_open_is_not_touched() {
    let dir = tempfile::tempdir().unwrap();
    let first = Projections::open(dir.path()).unwrap();
    first.take(&history(10, 1, false)).unwrap();
    let refused = Projections::open(dir.path()).unwrap_err();
    assert!(matches!(refused, crate::OpenError::InUse), "{refused}");
    assert_eq!(first.position(), Position(10));
}

#[test]
fn events_come_once_and_without_gap() {
    let events = history(20, 2, false);
    let projections = folded(&events[..10], 10);
    let before = projections.digest().unwrap();
    projections.take(&events[..10]).unwrap();
    assert_eq!(projections.digest().unwrap(), before);
    projections.take(&events[12..]).unwrap_err();
    assert_eq!(projections.digest().unwrap(), before);
    // The good part of a batch with a gap is not taken either.
    let mut gap = events[10..].to_vec();
    gap.remove(5);
    projections.take(&gap).unwrap_err();
    assert_eq!(projections.digest().unwrap(), before);
    projections.take(&events[5..]).unwrap();
    assert_eq!(
        projections.digest().unwrap(),
        folded(&events, 20).digest().unwrap()
    );
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    /// Any history in any batches, on disk and in memory, with the store closed in the middle,
    /// has the same bytes as the history folded one event at a time.
    #[test]
    fn rows_do_not_depend_on_batches(
        seed in any::<u64>(),
        length in 1_u64..900,
        batches in prop::collection::vec(1_usize..300, 1..12),
        reopen in prop::collection::vec(any::<bool>(), 12),
    ) {
        let events = history(length, seed, true);
        let expected = folded(&events, 1).digest().unwrap();
        prop_assert_eq!(&folded(&events, events.len()).digest().unwrap(), &expected);

        let dir = tempfile::tempdir().unwrap();
        let mut projections = Projections::open(dir.path()).unwrap();
        let mut rest = &events[..];
        for turn in 0.. {
            if rest.is_empty() { break; }
            let (batch, after) = rest.split_at(batches[turn % batches.len()].min(rest.len()));
            projections.take(batch).unwrap();
            rest = after;
            if reopen[turn % reopen.len()] {
                drop(projections);
                projections = Projections::open(dir.path()).unwrap();
            }
        }
        prop_assert_eq!(&projections.digest().unwrap(), &expected);
    }
}

/// Rows are the same whether they are written where the sum of states is kept, before it or behind
/// it.
#[test]
fn rows_do_not_depend_on_where_the_sum_is_kept() {
    let mark = MARK as usize;
    let events = history(LISTED + 2 * MARK + 100, 13, true);
    let expected = folded(&events, 1000);
    for batch in [mark - 1, mark, mark + 1, events.len()] {
        let found = folded(&events, batch);
        assert_eq!(found.state_hash(), expected.state_hash(), "{batch}");
        assert_eq!(
            found.digest().unwrap(),
            expected.digest().unwrap(),
            "{batch}"
        );
    }
}

/// What is folded is seen when it is committed, and not before; an error takes back what was not.
#[test]
fn nothing_is_seen_before_it_is_committed() {
    let events = history(300, 17, false);
    let projections = Projections::in_memory();
    projections.take(&events[..100]).unwrap();
    let before = projections.digest().unwrap();
    projections.fold(&events[100..200]).unwrap();
    assert_eq!(projections.digest().unwrap(), before);
    projections.fold(&events[201..]).unwrap_err();
    projections.commit().unwrap();
    assert_eq!(projections.digest().unwrap(), before);
    projections.fold(&events[100..200]).unwrap();
    projections.fold(&events[200..]).unwrap();
    projections.commit().unwrap();
    assert_eq!(
        projections.digest().unwrap(),
        folded(&events, 300).digest().unwrap()
    );
}

/// What is shared with readers is what a replay gives, while aggregates come and go in memory; a
/// state that a reader keeps does not change under it.
#[test]
fn readers_share_what_is_folded() {
    let events = history(6_000, 11, true);
    let projections = Projections::in_memory();
    let subject = |e: &Recorded| matches!(e.subject, Subject::Routing(_));
    let first = events.iter().find(|e| subject(e)).unwrap();
    let mut kept = None;
    for batch in events.chunks(7) {
        projections.take(batch).unwrap();
        if kept.is_none() {
            let routing = projections.shared::<Routing>(&first.subject).unwrap();
            kept = routing.state.clone().map(|state| (routing, state));
        }
    }
    let (routing, state) = kept.unwrap();
    assert_eq!(routing.state.as_ref(), Some(&state));
    let newer = projections.shared::<Routing>(&first.subject).unwrap();
    assert!(newer.position > routing.position);
    let mut by_subject = BTreeMap::<Subject, Vec<&Recorded>>::new();
    for event in &events {
        by_subject
            .entry(event.subject.clone())
            .or_default()
            .push(event);
    }
    for (subject, events) in &by_subject {
        match subject.kind() {
            Some(AggregateKind::Deployment) => {
                same_state::<Deployment>(&projections, subject, events);
            }
            Some(AggregateKind::Routing) => same_state::<Routing>(&projections, subject, events),
            Some(AggregateKind::Gitops) => same_state::<Gitops>(&projections, subject, events),
            _ => {}
        }
    }
}

/// Every aggregate that has an event in a batch is told, once the queries show it.
#[tokio::test]
async fn a_feed_tells_what_has_changed() {
    let events = history(100, 3, false);
    let projections = Projections::in_memory();
    let mut feed = projections.feed();
    for batch in events.chunks(10) {
        projections.take(batch).unwrap();
        let Some(Change::Of(told)) = feed.next().await else {
            panic!("nothing was told");
        };
        for event in batch {
            assert!(told.contains(&event.subject), "{}", event.subject);
        }
    }
    assert!(feed.next_now().is_none());
    // Whoever is too slow is told to look at everything, and so is everybody after a restart.
    let mut slow = projections.feed();
    projections.restart("").unwrap();
    assert!(matches!(feed.next().await, Some(Change::Any)));
    for event in history(2_000, 4, false) {
        projections.take(&[event]).unwrap();
    }
    assert!(matches!(slow.next().await, Some(Change::Any)));
    drop(projections);
    while feed.next().await.is_some() {}
}

/// As long as a project says that nothing has changed since a position, it answers the same.
#[test]
fn what_has_not_changed_since_a_position_is_answered_the_same() {
    for (batch, events) in [(1, 300), (3, 300), (300, 1_500)] {
        let projections = Projections::in_memory();
        let mut known = BTreeMap::new();
        let mut same = 0;
        for events in history(events, 3, true).chunks(batch) {
            projections.take(events).unwrap();
            for project in projections.projects().unwrap() {
                let name = project.name;
                let (since, now) = projections.unchanged_since(&name);
                assert_eq!(now, projections.position());
                assert!(since <= now);
                let filter = DeploymentFilter {
                    project: Some(name.clone()),
                    ..DeploymentFilter::default()
                };
                let overview = projections.overview(Some(&name), None).unwrap().instances;
                let history = projections.history(&filter, Page::default()).unwrap().items;
                let said = format!("{overview:?} {history:?}");
                if let Some((before, said_before)) = known.insert(name, (since, said.clone()))
                    && before == since
                {
                    same += 1;
                    assert_eq!(said_before, said, "since {since} at {now}");
                }
            }
        }
        assert_eq!(same > 10, batch < 300, "{same} of batches of {batch}");
    }
}
