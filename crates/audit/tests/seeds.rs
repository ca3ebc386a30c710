//! The inputs that fuzzing starts from are whole: what the tools make of a small ledger. Of events
//! those are the golden files. An export has all schemas in it, and is too long: the one here is
//! without them.

#![allow(clippy::unwrap_used)]

mod support;

use std::fs;
use std::io::Read;
use std::path::PathBuf;

use daybook_audit::receipt::{Look, check_receipt, receipt};
use daybook_audit::{Options, Thoroughness, Trust};
use daybook_events::Event;
use futures_util::FutureExt;
use sha2::{Digest, Sha256};
use support::{Files, Ledger, verified, verified_bytes};

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

#[test]
fn an_export_is_accepted() {
    let export = fs::read(seed("export")).unwrap();
    assert!(export.len() <= 65_536, "longer than what is fuzzed");
    let verified = verified_bytes(export, &Options::default()).unwrap();
    assert!(verified.holds(), "{:#?}", verified.findings);
    assert_eq!(verified.counts.events, 24);
    assert!(verified.claimed_state_hash.is_some());
}

/// An export without the schemas in it, which are for others.
fn without_schemas(export: &[u8]) -> Vec<u8> {
    let mut archive = tar::Archive::new(export);
    let mut kept = Vec::new();
    for entry in archive.entries().unwrap() {
        let mut entry = entry.unwrap();
        let name = entry.path().unwrap().display().to_string();
        if name.starts_with("schemas/") {
            continue;
        }
        let mut header = entry.header().clone();
        let mut content = Vec::new();
        entry.read_to_end(&mut content).unwrap();
        if name == "MANIFEST" {
            content = listing_no_schemas(std::str::from_utf8(&content).unwrap()).into_bytes();
            header.set_size(content.len() as u64);
            header.set_cksum();
        }
        kept.extend_from_slice(header.as_bytes());
        kept.extend_from_slice(&content);
        kept.resize(kept.len().next_multiple_of(512), 0);
    }
    kept.resize(kept.len() + 1024, 0);
    kept
}

fn listing_no_schemas(manifest: &str) -> String {
    let lines: Vec<&str> = manifest.lines().collect();
    let kept = lines.iter().filter(|line| !line.contains("  schemas/"));
    let files = lines.iter().filter(|line| line.contains("  ")).count();
    let left = kept.clone().filter(|line| line.contains("  ")).count();
    assert!(left < files);
    let mut text = String::new();
    for line in kept.take_while(|line| !line.starts_with("sha256 ")) {
        let line = line.replace(&format!("files {files}"), &format!("files {left}"));
        text += &line;
        text.push('\n');
    }
    let digest = hex::encode(Sha256::digest(&text));
    format!("{text}sha256 {digest}\n")
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
    let full = Options {
        thoroughness: Thoroughness::Full,
        ..Options::default()
    };
    let hash = verified(ledger.path(), &full).state_hash.unwrap();
    fs::write(ledger.path().join("state_hash"), format!("24 {hash}\n")).unwrap();
    fs::write(seed("export"), without_schemas(&ledger.exported())).unwrap();
}
