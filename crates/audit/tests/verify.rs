//! Ledgers that hold, and ledgers that do not, with the exact place.

#![allow(clippy::unwrap_used)]

mod support;

use std::fs;

use bytes::Bytes;
use daybook_audit::{
    Continuity, Effect, Finding, Kept, Kind, Observe, Options, Source, Thoroughness, Trust,
    Verified, observe,
};
use daybook_events::{Event, Position};
use daybook_store::tlog::{Checkpoint, gap_entry};
use support::{Ledger, ORIGIN, history, key, trusting, verified, verified_bytes};

fn kinds(verified: &Verified) -> Vec<Kind> {
    verified.findings.counts().keys().copied().collect()
}

fn first(verified: &Verified) -> Finding {
    verified.findings.list().next().unwrap().clone()
}

#[test]
fn an_honest_ledger_holds_in_every_form() {
    for size in [0, 1, 2, 255, 256, 257, 700] {
        let ledger = Ledger::new(size);
        let folder = tempfile::tempdir().unwrap();
        let export = folder.path().join("export.tar");
        ledger.export(&export);
        for path in [ledger.path(), &export] {
            for thoroughness in [
                Thoroughness::Quick,
                Thoroughness::Normal,
                Thoroughness::Full,
            ] {
                let options = Options {
                    thoroughness,
                    ..trusting()
                };
                let verified = verified(path, &options);
                assert!(verified.holds(), "{size}: {:#?}", verified.findings);
                assert_eq!(kinds(&verified), [], "{size}");
                assert_eq!(verified.trust, Trust::Given);
                let events = if thoroughness == Thoroughness::Quick {
                    0
                } else {
                    size as u64
                };
                assert_eq!(
                    (verified.counts.events, verified.counts.counted),
                    (events, events)
                );
                assert_eq!(verified.counts.entries, size as u64);
                assert!(!verified.proven().is_empty() && !verified.not_proven().is_empty());
            }
        }
    }
}

#[test]
fn a_large_ledger_holds_and_its_exports_are_the_same_bytes() {
    // Enough for tiles of three levels.
    let entries: Vec<Bytes> = (0..65_793_u32).map(|n| n.to_string().into()).collect();
    let ledger = Ledger::of(entries);
    let options = Options {
        thoroughness: Thoroughness::Quick,
        ..trusting()
    };
    assert!(verified(ledger.path(), &options).holds());
    let export = ledger.exported();
    assert_eq!(export, ledger.exported());
    let verified = verified_bytes(export, &options).unwrap();
    assert!(verified.holds(), "{:#?}", verified.findings);
}

#[test]
fn an_unpacked_export_is_verified_as_a_folder() {
    let ledger = Ledger::new(300);
    let folder = tempfile::tempdir().unwrap();
    tar::Archive::new(ledger.exported().as_slice())
        .unpack(folder.path())
        .unwrap();
    let options = Options {
        thoroughness: Thoroughness::Full,
        ..trusting()
    };
    let good = verified(folder.path(), &options);
    assert!(good.holds(), "{:#?}", good.findings);
    let path = folder.path().join("schemas/events/build.failed.v1.json");
    fs::write(path, "{}").unwrap();
    assert_eq!(
        kinds(&verified(folder.path(), &options)),
        [Kind::ManifestDiffers]
    );
}

#[test]
fn the_key_decides_what_is_believed() {
    let ledger = Ledger::new(10);
    let first_use = verified(ledger.path(), &Options::default());
    assert!(first_use.holds());
    assert_eq!(first_use.trust, Trust::FirstUse);
    assert!(first_use.not_proven().iter().any(|s| s.contains("--key")));

    let stranger = Options {
        keys: vec![key(2).verifier().clone()],
        ..Options::default()
    };
    let distrusted = verified(ledger.path(), &stranger);
    assert_eq!(kinds(&distrusted), [Kind::CheckpointUntrusted]);
    assert!(!distrusted.holds() && distrusted.tree_holds);

    // Signed by a key of that name, but not this key: the kept one is asked, not the new list.
    let forger = Ledger {
        key: key(2),
        ..Ledger::new(10)
    };
    forger.write(10);
    let kept = Options {
        kept: first_use.keep,
        ..Options::default()
    };
    let forged = verified(forger.path(), &kept);
    assert_eq!(forged.trust, Trust::Kept);
    assert!(!forged.holds());
    assert!(forged.keep.is_none());
}

#[test]
fn a_ledger_must_go_on_from_what_was_kept() {
    let ledger = Ledger::new(700);
    for before in [0, 1, 255, 256, 257, 512, 600, 700] {
        ledger.write(before);
        let kept = verified(ledger.path(), &trusting()).keep;
        assert!(kept.is_some());
        ledger.write(700);
        let options = Options { kept, ..trusting() };
        let now = verified(ledger.path(), &options);
        assert!(now.holds(), "{before}: {:#?}", now.findings);
        assert_eq!(
            now.continuity,
            Continuity::Continues {
                size: before as u64
            }
        );
    }
    // Another history, signed by the same key.
    let mut entries = history(700);
    entries.swap(3, 4);
    let other = Ledger::of(entries);
    for (before, kind) in [(100, Kind::HistoryRewritten), (700, Kind::SplitView)] {
        other.write(before);
        let note = fs::read(other.path().join("checkpoint")).unwrap();
        let options = Options {
            kept: Some(Kept {
                checkpoint: note.clone().into(),
                keys: vec![key(1).verifier().clone()],
            }),
            ..trusting()
        };
        let now = verified(ledger.path(), &options);
        assert_eq!(kinds(&now), [kind]);
        assert!(now.keep.is_none());
        let options = Options {
            earlier: Some(note.into()),
            ..trusting()
        };
        assert_eq!(kinds(&verified(ledger.path(), &options)), [kind]);
    }
    // An older export is no rewrite, and what was kept stays.
    let options = Options {
        kept: verified(ledger.path(), &trusting()).keep,
        ..trusting()
    };
    ledger.write(300);
    let older = verified(ledger.path(), &options);
    assert!(older.holds());
    assert_eq!(older.continuity, Continuity::Older { size: 700 });
    assert_eq!(older.keep, None);
}

#[test]
fn a_claimed_state_is_compared_with_what_the_signed_events_lead_to() {
    let ledger = Ledger::new(300);
    let full = Options {
        thoroughness: Thoroughness::Full,
        ..trusting()
    };
    let hash = verified(ledger.path(), &full).state_hash.unwrap();
    let claiming = |claim: String| {
        fs::write(ledger.path().join("state_hash"), claim).unwrap();
        verified(ledger.path(), &trusting())
    };
    let says_so = |verified: &Verified| {
        let sentences = verified.proven();
        sentences.iter().any(|s| s.contains("hash over all states"))
    };
    let honest = claiming(format!("300 {hash}\n"));
    assert!(honest.holds() && says_so(&honest), "{:#?}", honest.findings);

    let other = claiming(format!("300 {hash}0\n"));
    let past = claiming(format!("299 {hash}\n"));
    for wrong in [other, past] {
        assert_eq!(kinds(&wrong), [Kind::StateDiffers]);
        assert_eq!(first(&wrong).place.file.as_deref(), Some("state_hash"));
        assert!(wrong.tree_holds && !wrong.holds() && !says_so(&wrong));
    }

    // Where an event was changed, it is the event that is to blame, and not the server's state.
    let path = ledger.path().join("tile/entries/000");
    let mut bytes = fs::read(&path).unwrap();
    let entry = String::from_utf8(ledger.entries[0].to_vec()).unwrap();
    let id = entry.find("\"authid\":\"").unwrap() + 11;
    bytes[2 + id] ^= 1;
    fs::write(&path, bytes).unwrap();
    let changed = claiming(format!("300 {hash}0\n"));
    assert_eq!(kinds(&changed), [Kind::EntryDiffers]);
    let unknown = changed.not_proven();
    assert!(
        unknown
            .iter()
            .any(|s| s.contains("the state that the server shows"))
    );
    assert!(
        !honest
            .not_proven()
            .iter()
            .any(|s| s.contains("the state that"))
    );
}

/// What an auditor is told of a ledger that was damaged on the way: not that its operator rewrote it.
#[test]
fn what_was_damaged_is_no_rewritten_history() {
    let ledger = Ledger::new(700);
    ledger.write(100);
    let kept = verified(ledger.path(), &trusting()).keep;
    ledger.write(700);
    let options = Options { kept, ..trusting() };
    let bundle = ledger.path().join("tile/entries/000");
    let tile = ledger.path().join("tile/0/000");
    let (good, good_tile) = (fs::read(&bundle).unwrap(), fs::read(&tile).unwrap());
    let flipped = |bytes: &[u8], at: usize| {
        let mut bytes = bytes.to_vec();
        bytes[at] ^= 1;
        bytes
    };
    // A letter of a name in the first event.
    let event = String::from_utf8(ledger.entries[0].to_vec()).unwrap();
    let letter = 2 + event.find("\"authid\":\"").unwrap() + 11;
    let continues = Continuity::Continues { size: 100 };
    let shown = |v: &Verified, what: &str| v.proven().iter().any(|s| s.contains(what));
    let begins = "What was signed begins with the 100 entries that you saw last time";

    fs::write(&bundle, flipped(&good, letter)).unwrap();
    let changed = verified(ledger.path(), &options);
    assert_eq!(kinds(&changed), [Kind::EntryDiffers]);
    assert_eq!(changed.continuity, continues);
    assert!(
        shown(&changed, begins) && !shown(&changed, "unchanged"),
        "{:?}",
        changed.proven()
    );

    fs::remove_file(&bundle).unwrap();
    let missing = verified(ledger.path(), &options);
    assert_eq!(first(&missing).kind, Kind::FileMissing);
    assert_eq!(missing.findings.count(Kind::HistoryRewritten), 0);
    assert_eq!(missing.continuity, continues);
    assert!(
        shown(&missing, begins) && !shown(&missing, "unchanged"),
        "{:?}",
        missing.proven()
    );

    // Where nothing leads to what was signed, nothing can be said.
    fs::write(&bundle, flipped(&good, letter)).unwrap();
    fs::write(&tile, flipped(&good_tile, 32 * 200)).unwrap();
    let both = verified(ledger.path(), &options);
    assert_eq!(both.continuity, Continuity::Unknown { size: 100 });
    assert!(!both.holds());
    for kind in [Kind::HistoryRewritten, Kind::SplitView] {
        assert_eq!(both.findings.count(kind), 0, "{:#?}", both.findings);
    }

    fs::write(&bundle, good).unwrap();
    fs::write(&tile, good_tile).unwrap();
    assert_eq!(verified(ledger.path(), &options).continuity, continues);
}

#[test]
fn what_somebody_else_signed_is_not_held_against_the_log() {
    let ledger = Ledger::new(300);
    let mut entries = history(300);
    entries.swap(3, 4);
    let forger = Ledger {
        key: key(2),
        ..Ledger::of(entries)
    };
    forger.write(300);
    for before in [100, 300] {
        ledger.write(before);
        let kept = verified(ledger.path(), &trusting()).keep;
        assert!(kept.is_some());
        let options = Options { kept, ..trusting() };
        let forged = verified(forger.path(), &options);
        let found = kinds(&forged);
        assert!(found.contains(&Kind::CheckpointUntrusted), "{found:?}");
        for kind in [Kind::HistoryRewritten, Kind::SplitView] {
            assert!(!found.contains(&kind), "{found:?}");
        }
        let size = before as u64;
        assert_eq!(forged.continuity, Continuity::Unknown { size });
        assert!(!forged.holds() && forged.keep.is_none());
    }
}

#[test]
fn a_tree_of_any_claimed_size_is_judged_at_once() {
    let ledger = Ledger::new(10);
    for size in [300_000, u64::MAX / 2, u64::MAX] {
        let mut checkpoint = Checkpoint::open(
            &fs::read(ledger.path().join("checkpoint")).unwrap(),
            ORIGIN,
            &[key(1).verifier().clone()],
        )
        .unwrap();
        checkpoint.head.size = size;
        let note = checkpoint.sign(&[key(1)]);
        let path = ledger.path().join("checkpoint");
        let good = fs::read(&path).unwrap();
        fs::write(&path, &note).unwrap();
        let found = verified(ledger.path(), &trusting());
        assert_eq!(kinds(&found), [Kind::FileMissing], "{size}");
        assert!(!found.holds());

        // The same in an archive, which has only the checkpoint and a bundle.
        let mut archive = tar::Builder::new(Vec::new());
        let bundle = fs::read(ledger.path().join("tile/entries/000.p/10")).unwrap();
        for (name, bytes) in [
            ("checkpoint", &note),
            ("tile/entries/000.p/10", &Bytes::from(bundle)),
        ] {
            let mut header = tar::Header::new_ustar();
            header.set_size(bytes.len() as u64);
            header.set_mode(0o644);
            archive
                .append_data(&mut header, name, bytes.as_ref())
                .unwrap();
        }
        let archive = archive.into_inner().unwrap();
        if let Ok(found) = verified_bytes(archive, &trusting()) {
            assert!(!found.holds(), "{size}");
        }
        fs::write(&path, good).unwrap();
    }
}

#[test]
fn a_changed_event_is_named_by_its_position_id_and_byte() {
    let ledger = Ledger::new(300);
    let path = ledger.path().join("tile/entries/000");
    let mut bytes = fs::read(&path).unwrap();
    let before: usize = ledger.entries[..7].iter().map(|e| 2 + e.len()).sum();
    // A letter of a name in the eighth event.
    let entry = String::from_utf8(ledger.entries[7].to_vec()).unwrap();
    let at = before + 2 + entry.find("\"authid\":\"").unwrap() + 11;
    bytes[at] ^= 1;
    fs::write(&path, bytes).unwrap();
    let changed = verified(ledger.path(), &trusting());
    assert_eq!(kinds(&changed), [Kind::EntryDiffers]);
    let place = first(&changed).place;
    assert_eq!(place.file.as_deref(), Some("tile/entries/000"));
    assert_eq!(place.position, Some(Position(8)));
    assert_eq!(place.entry, Some(7));
    assert_eq!(place.file_offset, Some(before as u64));
    assert!(
        place
            .event
            .is_some_and(|id| entry.contains(&id.to_string()))
    );
    assert!(!changed.tree_holds && changed.keep.is_none());
}

#[test]
fn a_changed_tile_is_told_from_a_changed_event() {
    let ledger = Ledger::new(70_000 / 100);
    for (tile, at, entry) in [("tile/0/001", 64, 2), ("tile/1/000.p/2", 32, 1)] {
        let path = ledger.path().join(tile);
        let good = fs::read(&path).unwrap();
        let mut bytes = good.clone();
        bytes[at] ^= 4;
        fs::write(&path, bytes).unwrap();
        let changed = verified(ledger.path(), &trusting());
        assert_eq!(kinds(&changed), [Kind::TileDiffers]);
        assert!(changed.tree_holds, "the events are as they were signed");
        let place = first(&changed).place;
        assert_eq!(
            (place.file.as_deref(), place.entry),
            (Some(tile), Some(entry))
        );
        for bad in [&good[..good.len() - 1], &[]] {
            fs::write(&path, bad).unwrap();
            assert_eq!(
                kinds(&verified(ledger.path(), &trusting())),
                [Kind::TileDiffers]
            );
        }
        fs::remove_file(&path).unwrap();
        assert_eq!(
            kinds(&verified(ledger.path(), &trusting())),
            [Kind::FileMissing]
        );
        fs::write(&path, good).unwrap();
    }
}

/// Somebody who counts the events that are shown.
struct Looking(u64);

impl Observe for Looking {
    fn event(&mut self, _: Position, _: &[u8], _: Effect) {
        self.0 += 1;
    }
}

#[test]
fn what_is_found_does_not_depend_on_whether_somebody_looks_on() {
    let plain = history(1_200);
    let mut with_remarks = plain.clone();
    with_remarks.insert(700, plain[600].clone());
    with_remarks.insert(1_100, gap_entry(Position(1_101)));
    for (entries, kinds_found) in [
        (plain, vec![]),
        (with_remarks, vec![Kind::GapRecorded, Kind::EventOvertaken]),
    ] {
        let events = entries.iter().filter_map(|e| Event::from_bytes(e).ok());
        let times: Vec<_> = events.map(|e| e.time).collect();
        let ledger = Ledger::of(entries);
        let mut looking = Looking(0);
        let source = Source::open(ledger.path()).unwrap();
        let seen = observe(source, &trusting(), &mut looking, &mut |_, _| {}).unwrap();
        let unseen = verified(ledger.path(), &trusting());
        assert_eq!(looking.0, times.len() as u64);
        for verified in [&seen, &unseen] {
            let mut found = kinds(verified);
            found.sort_by_key(|kind| kind.code());
            let mut expected = kinds_found.clone();
            expected.sort_by_key(|kind| kind.code());
            assert_eq!(found, expected);
            let bytes: usize = ledger.entries.iter().map(Bytes::len).sum();
            assert_eq!(verified.counts.bytes, bytes as u64);
            assert_eq!(verified.counts.events, times.len() as u64);
            let period = (*times.iter().min().unwrap(), *times.iter().max().unwrap());
            assert_eq!(verified.period, Some(period));
        }
        assert_eq!(seen.counts, unseen.counts);
        let places = |v: &Verified| {
            v.findings
                .list()
                .map(|f| f.place.clone())
                .collect::<Vec<_>>()
        };
        assert_eq!(places(&seen), places(&unseen));
    }
}

#[test]
fn events_that_no_rule_allows_are_found_although_they_are_signed() {
    let good = history(300);
    let text = |n: usize| String::from_utf8(good[n].to_vec()).unwrap();
    let with = |entry: Bytes| {
        let mut entries = good.clone();
        entries.push(entry);
        verified(Ledger::of(entries).path(), &trusting())
    };
    let found = with(good[0].clone());
    assert_eq!(kinds(&found), [Kind::EventOvertaken]);
    assert!(
        found.holds(),
        "the first counts, and the second changes nothing"
    );
    assert_eq!(first(&found).place.position, Some(Position(301)));

    let found = with(
        text(0)
            .replace("\"revision\":1,", "\"revision\":99,")
            .into(),
    );
    assert_eq!(kinds(&found), [Kind::RevisionMissing]);
    let found = with(gap_entry(Position(301)));
    assert_eq!(kinds(&found), [Kind::GapRecorded]);
    assert!(found.holds() && found.counts.gaps == 1);
    let found = with("{}".into());
    assert_eq!(kinds(&found), [Kind::EnvelopeInvalid]);
    let found = with(text(0).replace(".v1\"", ".v9\"").into());
    assert_eq!(kinds(&found), [Kind::KindUnknown, Kind::EventOvertaken]);
    // Created twice: the revision is right, the transition is not.
    let created = (0..300)
        .find(|n| text(*n).contains("project.created.v1"))
        .unwrap();
    let subject = format!("/project/{}", "shop-");
    let events = (0..300).filter(|n| text(*n).contains(&subject));
    let same = text(created);
    let project = same
        .split("\"subject\":\"")
        .nth(1)
        .unwrap()
        .split('"')
        .next()
        .unwrap()
        .to_owned();
    let last = events
        .filter(|n| text(*n).contains(&format!("\"subject\":\"{project}\"")))
        .count();
    let again = same.replace("\"revision\":1,", &format!("\"revision\":{},", last + 1));
    let found = with(again.into());
    assert_eq!(kinds(&found), [Kind::TransitionIllegal]);
    assert!(!found.holds());
}

#[test]
fn a_proof_of_another_log_proves_nothing() {
    let ledger = Ledger::new(10);
    let other = Checkpoint {
        origin: "elsewhere.example.com/tlog".into(),
        ..Checkpoint::open(
            &fs::read(ledger.path().join("checkpoint")).unwrap(),
            ORIGIN,
            &[key(1).verifier().clone()],
        )
        .unwrap()
    };
    let note = other.sign(&[key(1)]);
    fs::write(ledger.path().join("checkpoint"), note).unwrap();
    let found = verified(ledger.path(), &trusting());
    assert_eq!(kinds(&found), [Kind::OriginDiffers]);
    assert!(!found.holds());
}

/// A member of an archive: where its header begins, and how long it is with its padding.
fn members(archive: &[u8]) -> Vec<(String, std::ops::Range<usize>)> {
    let mut reader = tar::Archive::new(archive);
    let mut all: Vec<(String, usize)> = Vec::new();
    for entry in reader.entries().unwrap() {
        let entry = entry.unwrap();
        let name = entry.path().unwrap().display().to_string();
        all.push((name, entry.raw_header_position() as usize));
    }
    let end = archive.len() - 1024;
    let ends: Vec<usize> = all.iter().skip(1).map(|(_, at)| *at).chain([end]).collect();
    all.into_iter()
        .zip(ends)
        .map(|((name, at), end)| (name, at..end))
        .collect()
}

/// Every class of file, and everything that can be done to one of them.
#[test]
fn whatever_is_done_to_an_export_is_found_and_named() {
    let ledger = Ledger::new(300);
    let good = ledger.exported();
    let members = members(&good);
    let class = |name: &str| name.split(['/', '.']).take(2).collect::<Vec<_>>().join("/");
    let mut seen = std::collections::BTreeSet::new();
    let mut tried = 0;
    for options in [
        trusting(),
        Options {
            thoroughness: Thoroughness::Quick,
            ..trusting()
        },
    ] {
        seen.clear();
        for (number, (name, range)) in members.iter().enumerate() {
            // Of each class the first and the last file.
            let is_last = members
                .get(number + 1)
                .is_none_or(|(next, _)| class(next) != class(name));
            if !seen.insert(class(name)) && !is_last {
                continue;
            }
            let mut mutants: Vec<(&str, Vec<u8>)> = Vec::new();
            let whole = &good[range.clone()];
            let content = range.start + 512;
            let mut places = vec![range.start, range.start + 130, range.start + 200];
            places.extend([content, content + 1, content + 20]);
            places.push(range.end - 1);
            for at in places.into_iter().filter(|at| *at < range.end) {
                let mut bad = good.clone();
                bad[at] ^= 1;
                mutants.push(("changed", bad));
            }
            let mut bad = good.clone();
            bad.drain(range.clone());
            mutants.push(("removed", bad));
            let mut bad = good.clone();
            bad.splice(range.end..range.end, whole.iter().copied());
            mutants.push(("doubled", bad));
            if let Some((_, next)) = members.get(number + 1) {
                let mut bad = good[..range.start].to_vec();
                bad.extend_from_slice(&good[next.clone()]);
                bad.extend_from_slice(whole);
                bad.extend_from_slice(&good[next.end..]);
                mutants.push(("reordered", bad));
            }
            let mut bad = good.clone();
            bad.drain(content..content + 1);
            mutants.push(("a byte removed", bad));
            let mut bad = good.clone();
            bad.insert(content, b'x');
            mutants.push(("a byte added", bad));
            for at in [range.start, range.start + 100, content, range.end - 1] {
                mutants.push(("truncated", good[..at].to_vec()));
            }
            for (how, bad) in mutants {
                tried += 1;
                match verified_bytes(bad, &options) {
                    Ok(verified) => {
                        assert!(!verified.holds(), "{name} {how}: not noticed");
                        let finding = first(&verified);
                        let named =
                            finding.place.file.is_some() || finding.place.archive_offset.is_some();
                        assert!(named, "{name} {how}: {finding}");
                        assert!(verified.keep.is_none());
                    }
                    // Not even its first header is one.
                    Err(why) => assert_eq!(number, 0, "{name} {how}: {why}"),
                }
            }
        }
    }
    assert!(tried > 100, "{tried}");
}

#[test]
fn an_entry_that_grew_is_noticed_wherever_it_stands() {
    let ledger = Ledger::new(20);
    let path = ledger.path().join("tile/entries/000.p/20");
    let bundle = fs::read(&path).unwrap();
    // A length that leads beyond the end, and one that leads into the middle of another entry.
    for length in [0xffff_u16, 3] {
        let mut bad = bundle.clone();
        bad[..2].copy_from_slice(&length.to_be_bytes());
        fs::write(&path, &bad).unwrap();
        let found = verified(ledger.path(), &trusting());
        assert_eq!(kinds(&found), [Kind::BundleMalformed], "{length}");
        assert!(
            first(&found).message.contains("byte") || first(&found).message.contains("entries")
        );
    }
}
