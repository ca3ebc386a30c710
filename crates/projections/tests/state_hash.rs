//! The state hash of events that stay as they are: a text that auditors keep for years.
//!
//! `DAYBOOK_REGENERATE=1 cargo test -p daybook-projections --test state_hash` writes what is missing
//! of the events and of the hash. Where the hash differs, states are encoded in another way than
//! before: count up the number in `state_hash.rs`, so that nobody takes an honest server for one that
//! lies, and remove `golden/state-hash` to have it written anew.
#![allow(clippy::unwrap_used)]

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use daybook_events::memory::MemoryLog;
use daybook_events::testing::fleet::{Fleet, Size, choices};
use daybook_events::testing::{context, samples, time};
use daybook_events::{EventLog, NewEvent, Payload, Subject};
use daybook_projections::replay;

/// How many events of deployments that are made up; those of aggregates that they leave out follow.
const FLEET: usize = 300;

fn golden(name: &str) -> PathBuf {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden");
    dir.join(name)
}

/// What a golden file has. It is written if it is to be and is not there.
fn kept(name: &str, now: impl FnOnce() -> String) -> String {
    let path = golden(name);
    // Tests are the outside here.
    #[allow(clippy::disallowed_methods)]
    let regenerate = std::env::var_os("DAYBOOK_REGENERATE").is_some();
    if regenerate && !path.exists() {
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(&path, now()).unwrap();
    }
    fs::read_to_string(&path).unwrap_or_else(|_| panic!("{name}: set DAYBOOK_REGENERATE=1"))
}

/// Events, a line each: the subject, a tab, and the bytes.
fn events() -> String {
    let mut lines = Vec::new();
    let mut fleet = Fleet::new(Size::default());
    let mut choose = choices(7);
    for _ in 0..FLEET {
        let happened = fleet.next(&mut choose);
        let text = String::from_utf8(happened.bytes.to_vec()).unwrap();
        lines.push(format!("{}\t{text}", happened.subject));
    }
    let shop = samples::instance("kiosk.production.web");
    let domain = Subject::Domain("www.example.com".parse().unwrap());
    let project = shop.project.clone();
    let webhook = Subject::Subscription(project.clone(), samples::subscription_id());
    let (ledger, access) = (Subject::Ledger, Subject::Access);
    add(&mut lines, &domain, samples::domain_events(&shop));
    add(&mut lines, &webhook, samples::subscription_events());
    add(&mut lines, &ledger, samples::ledger_events());
    add(&mut lines, &access, samples::access_events(&shop));
    add(
        &mut lines,
        &Subject::Project(project),
        samples::project_events(),
    );
    lines.join("\n") + "\n"
}

fn add<P: Payload>(lines: &mut Vec<String>, subject: &Subject, events: Vec<P>) {
    for (revision, payload) in (1_u32..).zip(events) {
        let event = NewEvent {
            subject: subject.clone(),
            revision,
            context: context(u64::from(revision)),
            payload,
        };
        let bytes = event.to_bytes(time(100)).unwrap();
        lines.push(format!(
            "{subject}\t{}",
            std::str::from_utf8(&bytes).unwrap()
        ));
    }
}

#[tokio::test]
async fn the_same_events_lead_to_the_same_hash_in_every_build() {
    let log = MemoryLog::new();
    for line in kept("events.tsv", events).lines() {
        let (subject, event) = line.split_once('\t').unwrap();
        log.store(subject.parse().unwrap(), event.to_owned());
    }
    let log: Arc<dyn EventLog> = Arc::new(log);
    let head = log.head().await.unwrap();
    let states = replay::state_at(&log, head).await.unwrap();
    let hash = states.state_hash().1.to_string();
    assert_eq!(
        kept("state-hash", || format!("{hash}\n")).trim_end(),
        hash,
        "states are encoded in another way than before: see the first lines of this test"
    );
}
