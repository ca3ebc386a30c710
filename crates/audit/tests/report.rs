//! Reports and differences, from verified ledgers.

#![allow(clippy::unwrap_used)]

mod support;

use std::collections::{BTreeMap, BTreeSet};

use daybook_audit::report::{Collector, Report, Scope, Subject};
use daybook_audit::world::{Snapshots, differences};
use daybook_audit::{Effect, Observe, Options, Source, observe};
use daybook_events::{Event, Position};
use serde_json::{Value, json};
use support::{Ledger, history, trusting, verified};

fn report(ledger: &Ledger, subject: Subject, scope: Scope) -> Report {
    let mut collector = Collector::new(subject, scope);
    let source = Source::open(ledger.path()).unwrap();
    let verified = observe(source, &trusting(), &mut collector, &mut |_, _| {}).unwrap();
    collector.report(&verified)
}

fn events(ledger: &Ledger) -> Vec<Event> {
    let read = |e| Event::from_bytes(e).unwrap();
    ledger.entries.iter().map(|e| read(e)).collect()
}

#[test]
fn a_population_is_complete_and_says_so() {
    let ledger = Ledger::new(900);
    let all = events(&ledger);
    let requested: Vec<&Event> = all
        .iter()
        .filter(|e| e.kind.ends_with("deployment.requested.v1"))
        .collect();
    let population = report(&ledger, Subject::Population, Scope::default());
    assert_eq!(population.rows.len(), requested.len());
    assert_eq!((population.position, population.size), (900, 900));
    assert!(population.ledger_holds && !population.root.is_empty());
    assert!(
        population
            .statement
            .iter()
            .any(|s| s.contains("positions 1 to 900"))
    );
    let width = population.columns.len();
    assert!(population.rows.iter().all(|row| row.len() == width));
    // A period, a project, and their complements cover it.
    let middle = requested[requested.len() / 2].time;
    let before = Scope {
        to: Some(middle),
        ..Scope::default()
    };
    let after = Scope {
        from: Some(middle),
        ..Scope::default()
    };
    let count = |scope| report(&ledger, Subject::Population, scope).rows.len();
    let (before, after) = (count(before), count(after));
    assert!(before > 0 && after > 0);
    assert_eq!(before + after, requested.len());
    let of = |project: &str| {
        count(Scope {
            project: Some(project.into()),
            ..Scope::default()
        })
    };
    assert_eq!(of("shop-0") + of("shop-1"), requested.len());
    // As values for a spreadsheet: as many lines as rows, a heading and comments.
    let csv = population.to_csv();
    let lines = csv.lines().filter(|l| !l.starts_with('#')).count();
    assert_eq!(lines, requested.len() + 1);
}

#[test]
fn evidence_has_every_event_of_a_deployment() {
    let ledger = Ledger::new(900);
    let all = events(&ledger);
    let first = all
        .iter()
        .find(|e| e.kind.ends_with("deployment.requested.v1"))
        .unwrap();
    let id = first.subject.split('/').nth(3).unwrap();
    let evidence = report(
        &ledger,
        Subject::Evidence(id.parse().unwrap()),
        Scope::default(),
    );
    let shown: BTreeSet<&str> = evidence.rows.iter().map(|row| row[5].as_str()).collect();
    for event in all.iter().filter(|e| e.subject.ends_with(id)) {
        assert!(
            shown.contains(event.id.to_string().as_str()),
            "{}",
            event.kind
        );
    }
}

#[test]
fn what_changed_nothing_is_in_no_report_but_the_evidence() {
    let entries = history(1_500);
    let plain = Ledger::of(entries.clone());
    // Each event once more: its revision is taken, as where a broker accepts two writers at once.
    let again = Ledger::of([entries.clone(), entries].concat());
    for subject in [
        Subject::Population,
        Subject::SegregationOfDuties,
        Subject::Emergency,
        Subject::Unapproved,
        Subject::FailuresAndRollbacks,
    ] {
        let name = subject.name();
        let expected = report(&plain, subject.clone(), Scope::default());
        let found = report(&again, subject, Scope::default());
        assert!(!expected.rows.is_empty() && found.ledger_holds, "{name}");
        assert_eq!(found.rows, expected.rows, "{name}");
    }
    let all = events(&plain);
    let mut requests = all
        .iter()
        .filter(|e| e.kind.ends_with("deployment.requested.v1"));
    let id = requests.next().unwrap().subject.split('/').nth(3).unwrap();
    let evidence = |ledger| {
        report(
            ledger,
            Subject::Evidence(id.parse().unwrap()),
            Scope::default(),
        )
    };
    let (expected, found) = (evidence(&plain).rows, evidence(&again).rows);
    assert_eq!(found.len(), 2 * expected.len());
    let effects = |effect: &str| found.iter().filter(|row| row[8] == effect).count();
    assert_eq!(effects("counted"), expected.len());
    assert_eq!(effects("void"), expected.len());
}

#[test]
fn failures_duties_and_approvals_are_reported() {
    let ledger = Ledger::new(3000);
    let all = events(&ledger);
    let of = |kind: &str| all.iter().filter(|e| e.kind.ends_with(kind)).count();
    let failures = report(&ledger, Subject::FailuresAndRollbacks, Scope::default());
    let what = |what: &str| failures.rows.iter().filter(|row| row[2] == what).count();
    assert!(of("deployment.failed.v1") + of("deployment.cancelled.v1") > 0);
    assert_eq!(what("failed"), of("deployment.failed.v1"));
    assert_eq!(what("cancelled"), of("deployment.cancelled.v1"));
    let switched = |reason: &str| {
        let reason = format!("\"reason\":\"{reason}\"");
        let switches = all
            .iter()
            .filter(|e| e.kind.ends_with("routing.switched.v1"));
        switches
            .filter(|e| e.data.get().replace(' ', "").contains(&reason))
            .count()
    };
    assert!(switched("rollback") > 0 && switched("compensation") > 0 && switched("mark_main") > 0);
    assert_eq!(what("rollback"), switched("rollback"));
    assert_eq!(what("routes restored"), switched("compensation"));
    // Who allowed what, from the events themselves: grants since the last change of the plan.
    let mut grants: BTreeMap<&str, Vec<&Event>> = BTreeMap::new();
    let (mut overridden, mut reviewed) = (BTreeSet::new(), BTreeSet::new());
    for event in &all {
        let id = event.subject.rsplit('/').next().unwrap();
        match event.kind.rsplit_once("deployment.").map(|(_, kind)| kind) {
            Some("requested.v1") => drop(grants.entry(id).or_default()),
            Some("approval_granted.v1") => grants.get_mut(id).unwrap().push(event),
            Some("approvals_voided.v1") => grants.get_mut(id).unwrap().clear(),
            Some("emergency_override.v1" | "emergency_freeze_override.v1") => {
                overridden.insert(id);
            }
            Some("post_review_completed.v1") => drop(reviewed.insert(id)),
            _ => {}
        }
    }
    let without: BTreeSet<&str> = grants
        .iter()
        .filter_map(|(id, found)| found.is_empty().then_some(*id))
        .collect();
    assert!(!without.is_empty() && without.len() < grants.len());
    assert!(!overridden.is_empty() && !reviewed.is_empty());
    let unapproved = report(&ledger, Subject::Unapproved, Scope::default());
    let shown: BTreeSet<&str> = unapproved
        .rows
        .iter()
        .filter(|row| row[2] == "deployment without approval")
        .map(|row| row[4].split(' ').next().unwrap())
        .collect();
    assert_eq!(shown, without);
    let by_hand = unapproved.rows.iter();
    let by_hand = by_hand.filter(|row| row[2] == "traffic switched by hand");
    assert_eq!(by_hand.count(), switched("mark_main"));
    let duties = report(&ledger, Subject::SegregationOfDuties, Scope::default());
    let nobody: BTreeSet<&str> = duties
        .rows
        .iter()
        .filter(|row| row[7].contains("nobody approved it"))
        .map(|row| row[2].as_str())
        .collect();
    assert_eq!(nobody, without);
    let emergencies = report(&ledger, Subject::Emergency, Scope::default());
    let shown: BTreeSet<(&str, bool)> = emergencies
        .rows
        .iter()
        .map(|row| (row[2].as_str(), row[7].starts_with("reviewed")))
        .collect();
    let expected = overridden.iter().map(|id| (*id, reviewed.contains(id)));
    assert_eq!(shown, expected.collect());
    for found in [unapproved, duties, emergencies] {
        let none = |s: &String| s.contains("No event of this ledger is about approvals");
        assert!(!found.statement.iter().any(none), "{:?}", found.statement);
    }
    assert_eq!(
        report(&ledger, Subject::Integrity, Scope::default())
            .rows
            .len(),
        0
    );
}

/// An event as the golden files have it, with fields replaced.
fn golden(kind: &str, data: &[(&str, Value)]) -> Vec<u8> {
    let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/../events/tests/golden");
    let text = std::fs::read_to_string(format!("{folder}/{kind}.json")).unwrap();
    let mut event: Value = serde_json::from_str(&text).unwrap();
    for (field, value) in data {
        event["data"][field] = value.clone();
    }
    event.to_string().into_bytes()
}

/// What the fleet of the tests never does.
#[test]
fn what_failed_in_part_was_changed_in_place_or_was_done_in_git_is_reported() {
    let ledger = Ledger::new(10);
    let reported = |subject: Subject, events: &[Vec<u8>]| -> Report {
        let mut collector = Collector::new(subject, Scope::default());
        for (event, position) in events.iter().zip(1..) {
            collector.event(Position(position), event, Effect::Counted);
        }
        collector.report(&verified(ledger.path(), &trusting()))
    };
    let deployment = "6de850d0-268a-5952-b26a-23f8e50a75de";
    let undoes = json!({ "environment": "production", "service": "api", "deployment": deployment });
    let events = [
        golden("deployment.requested.v1", &[]),
        golden("deployment.partially_succeeded.v1", &[]),
        golden("deployment.scale_requested.v1", &[]),
        golden("gitops.foreign_commit_found.v1", &[("undoes", undoes)]),
        golden("routing.switched.v1", &[("reason", json!("mark_main"))]),
        golden("routing.switched.v1", &[("reason", json!("split"))]),
        golden("routing.switched.v1", &[("reason", json!("policy"))]),
    ];
    let failures = reported(Subject::FailuresAndRollbacks, &events);
    let what: Vec<_> = failures.rows.iter().map(|row| row[2].as_str()).collect();
    assert_eq!(what, ["partially succeeded", "rollback by git revert"]);
    assert!(failures.rows[0][6].contains("oslo"), "{:?}", failures.rows);
    assert_eq!(failures.rows[1][3..5], ["shop.production.api", deployment]);

    let unapproved = reported(Subject::Unapproved, &events);
    let what: Vec<_> = unapproved.rows.iter().map(|row| row[2].as_str()).collect();
    assert_eq!(
        what,
        [
            "deployment without approval",
            "scaled in place",
            "commit by others",
            "traffic switched by hand",
            "traffic shared by hand",
            "traffic spread over clusters by hand",
        ]
    );
    assert!(
        unapproved.rows[2][4].contains("Bob"),
        "{:?}",
        unapproved.rows
    );
    for found in [&failures, &unapproved] {
        let width = found.columns.len();
        assert!(found.rows.iter().all(|row| row.len() == width), "{found:?}");
    }
}

#[test]
fn an_integrity_report_says_what_it_goes_on_from() {
    let ledger = Ledger::new(300);
    ledger.write(200);
    let kept = verified(ledger.path(), &trusting()).keep;
    ledger.write(300);
    let options = Options { kept, ..trusting() };
    let mut collector = Collector::new(Subject::Integrity, Scope::default());
    let source = Source::open(ledger.path()).unwrap();
    let verified = observe(source, &options, &mut collector, &mut |_, _| {}).unwrap();
    let found = collector.report(&verified);
    assert!(found.rows.is_empty() && found.ledger_holds);
    let continues = "The 200 entries that you saw last time are all still there";
    let says = |s: &String| s.starts_with(continues);
    assert!(found.statement.iter().any(says), "{:?}", found.statement);
}

#[test]
fn a_report_from_a_ledger_that_does_not_hold_says_so() {
    let ledger = Ledger::new(300);
    let path = ledger.path().join("tile/entries/000");
    let mut bytes = std::fs::read(&path).unwrap();
    bytes[500] ^= 1;
    std::fs::write(path, bytes).unwrap();
    let found = report(&ledger, Subject::Integrity, Scope::default());
    assert!(!found.ledger_holds);
    assert!(found.rows.iter().any(|row| row[0] == "entry_differs"));
    assert!(found.statement.iter().any(|s| s.contains("no evidence")));
}

#[test]
fn differences_lead_from_one_state_to_the_other() {
    let ledger = Ledger::new(900);
    let facts = |at: &[u64]| {
        let mut snapshots = Snapshots::new(at.iter().map(|p| Position(*p)));
        let source = Source::open(ledger.path()).unwrap();
        observe(source, &trusting(), &mut snapshots, &mut |_, _| {}).unwrap();
        at.iter()
            .map(|p| snapshots.facts(Position(*p)))
            .collect::<Vec<_>>()
    };
    let all = facts(&[0, 450, 900]);
    assert!(all[0].is_empty() && all[1] != all[2]);
    // What a snapshot has does not depend on what is asked for beside it.
    let half = Ledger::of(ledger.entries[..450].to_vec());
    let mut end = Snapshots::new([]);
    let source = Source::open(half.path()).unwrap();
    observe(source, &trusting(), &mut end, &mut |_, _| {}).unwrap();
    assert_eq!(all[1], end.facts(Position(450)));
    let mut state = all[1].clone();
    for change in differences(&all[1], &all[2]) {
        assert_eq!(state.get(&change.what), change.before.as_ref());
        match change.after {
            Some(after) => state.insert(change.what, after),
            None => state.remove(&change.what),
        };
    }
    assert_eq!(state, all[2]);
    // What runs at the end is what the report says.
    let newest = events(&ledger)
        .iter()
        .map(|e| e.recordedtime)
        .max()
        .unwrap();
    let ran = report(&ledger, Subject::WhatRan(newest), Scope::default());
    let running = all[2]
        .keys()
        .filter(|k| k.starts_with("deployment "))
        .count();
    assert_eq!(ran.rows.len(), running);
}
