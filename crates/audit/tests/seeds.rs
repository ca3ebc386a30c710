//! The inputs that fuzzing starts from are whole: what the tools make of a small ledger. Of events
//! those are the golden files. An export has all schemas in it, and is too long to be one.

#![allow(clippy::unwrap_used)]

mod support;

use std::fs;
use std::path::PathBuf;

use daybook_audit::Trust;
use daybook_audit::receipt::{Look, check_receipt, receipt};
use daybook_events::Event;
use futures_util::FutureExt;
use support::{Files, Ledger};

fn seed(target: &str) -> PathBuf {
    let folder = PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../../fuzz/seeds"));
    folder.join(target).join("small")
}

#[test]
fn a_receipt_is_accepted() {
    let receipt = fs::read(seed("receipt")).unwrap();
    assert!(receipt.len() <= 65_536, "longer than what is fuzzed");
    let checked = check_receipt(&receipt, &[], |_| Vec::new()).unwrap();
    assert_eq!(checked.trust, Trust::FirstUse);
}

/// `cargo test -p daybook-audit --test seeds -- --ignored` makes them anew, with another key.
#[test]
#[ignore = "it writes the seeds"]
fn they_are_written() {
    let ledger = Ledger::new(24);
    let events = ledger.entries.iter().map(|e| Event::from_bytes(e).unwrap());
    let mut requests = events.filter(|e| e.kind.ends_with("deployment.requested.v1"));
    let subject = requests.next().unwrap().subject;
    let id = subject.split('/').nth(3).unwrap().parse().unwrap();
    let files = Files(ledger.path().to_owned());
    let made = receipt(&files, id, &Look::Everywhere, &mut |_, _| {}).now_or_never();
    fs::write(seed("receipt"), made.unwrap().unwrap().1).unwrap();
}
