//! Receipts and checkpoints: what they prove, and that no byte of them can be changed.

#![allow(clippy::unwrap_used)]

mod support;

use std::collections::BTreeSet;

use bytes::Bytes;
use daybook_audit::receipt::{Look, ReceiptError, check_receipt, named, receipt};
use daybook_audit::{Consistency, Trust, consistency};
use daybook_events::{DeploymentId, Event, Position};
use futures_util::FutureExt;
use support::{Files, Ledger, ORIGIN, history, key};

/// The last one that succeeded of those that have an image of their own.
fn deployment(ledger: &Ledger) -> DeploymentId {
    let events = ledger.entries.iter().map(|e| Event::from_bytes(e).unwrap());
    let events: Vec<_> = events.collect();
    let has_an_image = |subject: &str| {
        let mut of = events.iter().filter(|e| e.subject == subject);
        of.any(|e| e.kind.ends_with("deployment.image_pinned.v1"))
    };
    let done = events.iter().rev();
    let mut done = done.filter(|e| e.kind.ends_with("deployment.succeeded.v1"));
    let done = done.find(|e| has_an_image(&e.subject));
    let subject = &done.unwrap().subject;
    subject.split('/').nth(3).unwrap().parse().unwrap()
}

fn made(ledger: &Ledger, id: DeploymentId) -> Result<Vec<u8>, ReceiptError> {
    made_at(ledger, id, &Look::Everywhere)
}

fn made_at(ledger: &Ledger, id: DeploymentId, look: &Look) -> Result<Vec<u8>, ReceiptError> {
    let files = Files(ledger.path().to_owned());
    let made = receipt(&files, id, look, &mut |_, _| {}).now_or_never();
    made.unwrap().map(|(_, bytes)| bytes)
}

/// All deployments of a ledger.
fn deployments(ledger: &Ledger) -> Vec<DeploymentId> {
    let events = ledger.entries.iter().map(|e| Event::from_bytes(e).unwrap());
    let requests = events.filter(|e| e.kind.ends_with("deployment.requested.v1"));
    requests
        .map(|e| e.subject.split('/').nth(3).unwrap().parse().unwrap())
        .collect()
}

#[test]
fn where_somebody_says_the_events_are_the_same_ones_are_found() {
    let ledger = Ledger::new(700);
    let all = (1..=700).map(Position).collect();
    for id in deployments(&ledger) {
        let everywhere = made(&ledger, id).unwrap();
        let said = made_at(&ledger, id, &Look::At(BTreeSet::clone(&all))).unwrap();
        assert!(everywhere == said, "{id}");
    }
    // What is not signed yet is not there, and what is about others is passed over.
    let id = deployment(&ledger);
    let beyond = Look::At([701, 9_000].map(Position).into());
    let missing = made_at(&ledger, id, &beyond).unwrap_err();
    assert!(matches!(missing, ReceiptError::NotFound { .. }));
    let of_other = deployments(&ledger).into_iter().find(|d| *d != id).unwrap();
    let foreign = ledger.entries.iter().zip(1..).filter(|(e, _)| {
        let event = Event::from_bytes(e).unwrap();
        event.subject.ends_with(&of_other.to_string())
    });
    let foreign = Look::At(foreign.map(|(_, at)| Position(at)).collect());
    let missing = made_at(&ledger, id, &foreign).unwrap_err();
    assert!(matches!(missing, ReceiptError::NotFound { .. }));
}

#[test]
fn a_ledger_without_entries_has_no_receipts() {
    let ledger = Ledger::new(10);
    let id = deployments(&Ledger::new(700))[0];
    ledger.write(0);
    for look in [Look::Everywhere, Look::At([Position(1)].into())] {
        let missing = made_at(&ledger, id, &look).unwrap_err();
        assert!(matches!(missing, ReceiptError::NotFound { .. }));
    }
}

#[test]
fn what_is_void_is_in_a_receipt_and_says_nothing() {
    let ledger = Ledger::new(700);
    let id = deployment(&ledger);
    let state = |ledger: &Ledger| {
        let bytes = made(ledger, id).unwrap();
        let keys = [key(1).verifier().clone()];
        check_receipt(&bytes, &keys, |_| Vec::new())
            .unwrap()
            .statement
    };
    let before = state(&ledger);
    let own = |e: &&Bytes| {
        let event = Event::from_bytes(e).unwrap();
        event.subject.ends_with(&format!("/deployment/{id}"))
    };
    let own: Vec<_> = ledger.entries.iter().filter(own).collect();
    let request = String::from_utf8(own[0].to_vec()).unwrap();
    assert!(request.contains("\"revision\":1,"));
    let last = Event::from_bytes(own[own.len() - 1]).unwrap().revision;
    // One whose revision is taken, and one that may not follow.
    for revision in [1, last + 1] {
        let void = request.replace("\"revision\":1,", &format!("\"revision\":{revision},"));
        let with = Ledger::of([ledger.entries.clone(), vec![void.into()]].concat());
        let after = state(&with);
        assert_eq!(after.events.len(), before.events.len() + 1);
        assert_eq!(after.last_event, before.last_event, "{revision}");
        assert_eq!(
            (after.image, after.commit),
            (before.image.clone(), before.commit.clone())
        );
    }
}

#[test]
fn a_deployment_is_named_by_the_beginning_or_the_end_of_its_id() {
    let ledger = Ledger::new(700);
    let files = Files(ledger.path().to_owned());
    let find = |part: &str| named(&files, part, &mut |_, _| {}).now_or_never().unwrap();
    let ids: Vec<String> = deployments(&ledger).iter().map(|d| d.to_string()).collect();
    for id in &ids {
        assert_eq!(find(id).unwrap().to_string(), *id);
        let end = &id[id.len() - 12..];
        let alike = ids.iter().filter(|other| other.ends_with(end)).count();
        match find(&end.to_uppercase()) {
            Ok(found) => assert_eq!((found.to_string(), alike), (id.clone(), 1)),
            Err(ReceiptError::Ambiguous { .. }) => assert!(alike > 1),
            Err(other) => panic!("{other}"),
        }
    }
    let begin = &ids[0][..1];
    let alike = ids
        .iter()
        .filter(|id| id.starts_with(begin) || id.ends_with(begin));
    let found = find(begin);
    assert_eq!(found.is_ok(), alike.count() == 1, "{found:?}");
    let several = find("").unwrap_err();
    assert!(
        matches!(several, ReceiptError::Ambiguous { .. }),
        "{several}"
    );
    let none = find("zzzz").unwrap_err();
    assert!(matches!(none, ReceiptError::NotFound { .. }), "{none}");
}

#[test]
fn a_receipt_proves_the_life_of_a_deployment_by_itself() {
    let ledger = Ledger::new(700);
    let id = deployment(&ledger);
    let bytes = made(&ledger, id).unwrap();
    let keys = [key(1).verifier().clone()];
    let checked = check_receipt(&bytes, &keys, |_| Vec::new()).unwrap();
    assert_eq!(checked.trust, Trust::Given);
    let statement = checked.statement;
    assert_eq!((statement.deployment, statement.size), (id, 700));
    assert!(statement.image.unwrap().contains("@sha256:"));
    assert_eq!(statement.commit.unwrap().len(), 40);
    assert!(statement.caveat.contains("cannot prove"));
    let has = |kind: &str| statement.events.iter().any(|e| e.kind == kind);
    for kind in [
        "deployment.requested.v1",
        "deployment.image_pinned.v1",
        "gitops.committed.v1",
        "deployment.succeeded.v1",
    ] {
        assert!(has(kind), "{kind}: {:?}", statement.events);
    }
    // Every event that names it is in it.
    let named = ledger.entries.iter().filter(|e| {
        let event = Event::from_bytes(e).unwrap();
        event.subject.ends_with(&format!("/deployment/{id}"))
    });
    let own = statement
        .events
        .iter()
        .filter(|e| e.kind.starts_with("deployment."));
    assert_eq!(own.count(), named.count());

    let first_use = check_receipt(&bytes, &[], |_| Vec::new()).unwrap();
    assert_eq!(first_use.trust, Trust::FirstUse);
    let kept = check_receipt(&bytes, &[], |_| keys.to_vec()).unwrap();
    assert_eq!(kept.trust, Trust::Kept);
    let stranger = [key(2).verifier().clone()];
    assert!(check_receipt(&bytes, &stranger, |_| Vec::new()).is_err());
}

#[test]
fn no_bit_of_a_receipt_can_be_flipped() {
    let ledger = Ledger::new(120);
    let events = ledger.entries.iter().map(|e| Event::from_bytes(e).unwrap());
    // The deployment with the fewest events, so that the receipt is small.
    let requested = events.filter(|e| e.kind.ends_with("deployment.requested.v1"));
    let receipts = requested.map(|e| {
        let id = e.subject.split('/').nth(3).unwrap().parse().unwrap();
        made(&ledger, id).unwrap()
    });
    let good = receipts.min_by_key(Vec::len).unwrap();
    let keys = [key(1).verifier().clone()];
    for given in [&keys[..], &[]] {
        check_receipt(&good, given, |_| Vec::new()).unwrap();
        for at in 0..good.len() {
            let mut bad = good.clone();
            bad[at] ^= 1 << (at % 8);
            let broken = check_receipt(&bad, given, |_| Vec::new());
            let broken = broken.expect_err(&format!("byte {at} of {}", good.len()));
            assert!(!broken.part.is_empty() && !broken.message.is_empty());
        }
    }
    for len in (0..good.len()).step_by(97) {
        assert!(check_receipt(&good[..len], &keys, |_| Vec::new()).is_err());
    }
}

#[test]
fn there_is_no_receipt_for_what_was_not_signed() {
    let ledger = Ledger::new(300);
    let id = deployment(&ledger);
    let first = ledger.entries.iter().position(|e| {
        Event::from_bytes(e)
            .unwrap()
            .subject
            .ends_with(&id.to_string())
    });
    ledger.write(first.unwrap());
    let missing = made(&ledger, id).unwrap_err();
    assert!(
        matches!(missing, ReceiptError::NotFound { .. }),
        "{missing}"
    );
    std::fs::remove_file(ledger.path().join("checkpoint")).unwrap();
    assert!(matches!(
        made(&ledger, id),
        Err(ReceiptError::NothingSigned)
    ));
}

#[test]
fn a_split_view_is_told_from_a_ledger_that_grew() {
    let ledger = Ledger::new(700);
    let mut entries = history(700);
    entries.swap(3, 4);
    let other = Ledger::of(entries);
    let note = |ledger: &Ledger, size| -> Bytes {
        ledger.write(size);
        std::fs::read(ledger.path().join("checkpoint"))
            .unwrap()
            .into()
    };
    let compare = |old: &Bytes, new: &Bytes, ledger: &Ledger| {
        let keys = [key(1).verifier().clone()];
        let files = Files(ledger.path().to_owned());
        consistency(old, new, ORIGIN, &keys, &files)
            .now_or_never()
            .unwrap()
    };
    for old in [1, 255, 256, 300, 699] {
        let (ours, theirs) = (note(&ledger, old), note(&other, old));
        let now = note(&ledger, 700);
        for pair in [(&ours, &now), (&now, &ours)] {
            let found = compare(pair.0, pair.1, &ledger).unwrap();
            assert!(
                matches!(found, Consistency::Extends { .. }),
                "{old}: {found:?}"
            );
        }
        let found = compare(&theirs, &now, &ledger).unwrap();
        let same_yet = old < 4;
        assert_eq!(
            matches!(found, Consistency::SplitView { .. }),
            !same_yet,
            "{old}: {found:?}"
        );
    }
    let (ours, theirs) = (note(&ledger, 700), note(&other, 700));
    assert_eq!(
        compare(&ours, &ours, &ledger).unwrap(),
        Consistency::Same { size: 700 }
    );
    let split = compare(&ours, &theirs, &ledger).unwrap();
    assert_eq!(split, Consistency::SplitView { old: 700, new: 700 });
    // Tiles of another tree prove nothing against the log.
    let before = note(&ledger, 300);
    let now = note(&ledger, 700);
    let found = compare(&before, &now, &other).unwrap();
    assert_eq!(found, Consistency::TilesDiffer { size: 700 });
}
