//! The runner and the ledger handle on a log: catching up, living on, and what goes wrong.

#![allow(clippy::unwrap_used)]

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use daybook_events::memory::{Fault, MemoryLog};
use daybook_events::project::{self, Project, ProjectEvent};
use daybook_events::spec::ServiceSpec;
use daybook_events::testing::context;
use daybook_events::testing::fleet::{Fleet, Size, choices};
use daybook_events::{Aggregate, Context, EventLog, Position, ProjectName, Refusal, Subject};
use daybook_projections::runner::{RunError, run};
use daybook_projections::{AuditFilter, ExecuteError, Executed, Ledger, Page, Projections, replay};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

const PATIENCE: Duration = Duration::from_secs(60);

struct Running {
    projections: Projections,
    cancel: CancellationToken,
    task: JoinHandle<Result<(), RunError>>,
}

impl Running {
    fn start(projections: &Projections, log: &MemoryLog) -> Self {
        let cancel = CancellationToken::new();
        let task = tokio::spawn(run(
            projections.clone(),
            Arc::new(log.clone()),
            cancel.clone(),
        ));
        Self {
            projections: projections.clone(),
            cancel,
            task,
        }
    }

    async fn reached(&self, position: Position) {
        self.projections.wait_for(position, PATIENCE).await.unwrap();
    }

    async fn stop(self) {
        self.cancel.cancel();
        self.task.await.unwrap().unwrap();
    }
}

struct Source {
    fleet: Fleet,
    choose: Box<dyn FnMut(u32) -> u32>,
}

impl Source {
    fn new(seed: u64) -> Self {
        Self {
            fleet: Fleet::new(Size::default()),
            choose: Box::new(choices(seed)),
        }
    }

    fn pour(&mut self, log: &MemoryLog, events: u32) -> Position {
        let mut last = Position::ZERO;
        for _ in 0..events {
            let happened = self.fleet.next(&mut *self.choose);
            last = log.store(happened.subject, happened.bytes);
        }
        last
    }
}

/// A store, as soon as the threads that wrote to it last have let go of it.
fn opened(store: &Path) -> sled::Db {
    let began = Instant::now();
    loop {
        match sled::open(store) {
            Ok(db) => return db,
            Err(e) if began.elapsed() > PATIENCE => panic!("{e}"),
            Err(_) => std::thread::sleep(Duration::from_millis(10)),
        }
    }
}

fn port(log: &MemoryLog) -> Arc<dyn EventLog> {
    Arc::new(log.clone())
}

#[tokio::test]
async fn it_catches_up_follows_and_goes_on_where_it_was() {
    let (log, dir) = (MemoryLog::new(), tempfile::tempdir().unwrap());
    let mut source = Source::new(1);
    source.pour(&log, 3000);
    for _ in 0..3 {
        let projections = Projections::open(dir.path()).unwrap();
        let running = Running::start(&projections, &log);
        let last = source.pour(&log, 500);
        running.reached(last).await;
        for _ in 0..20 {
            let mut changes = projections.changes();
            changes.borrow_and_update();
            let last = source.pour(&log, 1);
            tokio::time::timeout(PATIENCE, changes.changed())
                .await
                .unwrap()
                .unwrap();
            running.reached(last).await;
        }
        let expected = replay::state_at(&port(&log), projections.position())
            .await
            .unwrap();
        assert_eq!(projections.digest().unwrap(), expected.digest().unwrap());
        running.stop().await;
    }
}

#[tokio::test]
async fn a_wait_that_is_in_vain_ends() {
    let projections = Projections::in_memory();
    let behind = projections
        .wait_for(Position(1), Duration::from_millis(1))
        .await
        .unwrap_err();
    assert_eq!((behind.wanted, behind.reached), (Position(1), Position(0)));
}

#[tokio::test]
async fn rows_of_another_log_are_thrown_away() {
    let (one, other) = (MemoryLog::new(), MemoryLog::new());
    Source::new(1).pour(&one, 300);
    let last = Source::new(2).pour(&other, 400);
    let projections = Projections::in_memory();
    let running = Running::start(&projections, &one);
    running.reached(Position(300)).await;
    running.stop().await;
    let running = Running::start(&projections, &other);
    running.reached(last).await;
    let expected = replay::state_at(&port(&other), last).await.unwrap();
    assert_eq!(projections.digest().unwrap(), expected.digest().unwrap());
    running.stop().await;
}

#[tokio::test]
async fn rows_that_are_ahead_of_their_log_are_thrown_away() {
    let log = MemoryLog::new();
    Source::new(1).pour(&log, 300);
    let projections = Projections::in_memory();
    let running = Running::start(&projections, &log);
    running.reached(Position(300)).await;
    running.stop().await;
    log.truncate(Position(100));
    let mut changes = projections.changes();
    let running = Running::start(&projections, &log);
    let back = changes.wait_for(|p| *p == Position(100));
    tokio::time::timeout(PATIENCE, back).await.unwrap().unwrap();
    let expected = replay::state_at(&port(&log), Position(100)).await.unwrap();
    assert_eq!(projections.digest().unwrap(), expected.digest().unwrap());
    running.stop().await;
}

#[tokio::test]
async fn a_rebuild_gives_the_same_bytes_and_a_comparison_finds_what_was_changed() {
    let (log, dir) = (MemoryLog::new(), tempfile::tempdir().unwrap());
    let store = dir.path().join("projections");
    let last = Source::new(4).pour(&log, 1200);
    log.store(Subject::Project("shop-0".parse().unwrap()), "poison");
    let last = last.next();
    let projections = Projections::open(&store).unwrap();
    let running = Running::start(&projections, &log);
    running.reached(last).await;
    let (_, live) = projections.digest().unwrap();
    let equal = replay::compare(&projections, &port(&log), |_| {})
        .await
        .unwrap();
    assert!(equal.is_equal() && equal.differences.is_empty());
    assert_eq!((equal.position, &equal.found), (last, &live));
    assert_eq!(equal.counters.unreadable, 1);
    running.stop().await;

    // Nobody rebuilds what is open.
    let in_use = replay::rebuild(&store, &port(&log), |_| {})
        .await
        .unwrap_err();
    assert!(matches!(in_use, replay::ReplayError::Open(_)), "{in_use}");
    drop(projections);

    {
        let db = opened(&store.join("1"));
        let (key, value) = db.scan_prefix(b"h").next().unwrap().unwrap();
        let text = String::from_utf8(value.to_vec()).unwrap();
        db.insert(key, text.replace("main", "gone").as_bytes())
            .unwrap();
        let (key, _) = db.scan_prefix(b"x").next().unwrap().unwrap();
        db.remove(key).unwrap();
        db.insert("zzz", "surplus").unwrap();
    }
    let projections = Projections::open(&store).unwrap();
    let changed = replay::compare(&projections, &port(&log), |_| {})
        .await
        .unwrap();
    assert!(!changed.is_equal());
    let kinds: Vec<_> = changed
        .differences
        .iter()
        .map(|d| d.kind.as_str())
        .collect();
    assert_eq!(kinds, ["different", "missing", "surplus"], "{changed:?}");
    assert!(changed.differences[0].row.starts_with("history"));
    drop(projections);

    let mut seen = Position::ZERO;
    let rebuilt = replay::rebuild(&store, &port(&log), |p| seen = p)
        .await
        .unwrap();
    assert_eq!(
        (rebuilt.position, &rebuilt.digest, seen),
        (last, &live, last)
    );
    let projections = Projections::open(&store).unwrap();
    assert_eq!(projections.digest().unwrap(), (last, live));
    let names = std::fs::read_dir(&store).unwrap();
    let names: Vec<_> = names.map(|e| e.unwrap().file_name()).collect();
    assert_eq!(names, ["2"], "something was left behind");
    // A runner takes the rebuilt store as its own.
    let running = Running::start(&projections, &log);
    log.store(Subject::Project("shop-0".parse().unwrap()), "poison");
    running.reached(last.next()).await;
    running.stop().await;
}

#[tokio::test]
async fn the_past_is_what_it_was() {
    let log = MemoryLog::new();
    let mut source = Source::new(9);
    let past = source.pour(&log, 700);
    let then = replay::state_at(&port(&log), past).await.unwrap();
    let now = source.pour(&log, 700);
    let again = replay::state_at(&port(&log), past).await.unwrap();
    assert_eq!(then.digest().unwrap(), again.digest().unwrap());
    let later = replay::state_at(&port(&log), now.next()).await.unwrap_err();
    assert!(matches!(later, replay::ReplayError::Ends { .. }), "{later}");
}

fn shop() -> ProjectName {
    "shop".parse().unwrap()
}

fn subject() -> Subject {
    Subject::Project(shop())
}

fn create() -> ProjectEvent {
    ProjectEvent::Created(project::Created {
        name: shop(),
        description: None,
    })
}

fn define(service: &str) -> ProjectEvent {
    ProjectEvent::ServiceDefined(Box::new(project::ServiceDefined {
        name: service.parse().unwrap(),
        spec: ServiceSpec::default(),
    }))
}

async fn execute(
    ledger: &Ledger,
    context: &Context,
    event: ProjectEvent,
) -> Result<Executed, ExecuteError> {
    let decide = move |s: Option<&Project>| project::decide(s, event.clone());
    ledger.execute::<Project>(&subject(), context, decide).await
}

async fn ledger(log: &MemoryLog) -> (Ledger, Running) {
    let projections = Projections::in_memory();
    let running = Running::start(&projections, log);
    (Ledger::new(port(log), projections), running)
}

#[tokio::test]
async fn a_command_is_decided_on_what_was_just_written() {
    let log = MemoryLog::new();
    let (ledger, running) = ledger(&log).await;
    let missing = execute(&ledger, &context(1), define("api"))
        .await
        .unwrap_err();
    assert!(matches!(
        missing,
        ExecuteError::Refused(Refusal {
            code: "project_not_found",
            ..
        })
    ));
    let created = execute(&ledger, &context(1), create()).await.unwrap();
    assert_eq!(
        created,
        Executed::Appended {
            position: Position(1),
            revision: 1
        }
    );
    for n in 2..30 {
        let name = format!("service-{n}");
        let done = execute(&ledger, &context(n), define(&name)).await.unwrap();
        assert_eq!(done.position(), Some(Position(n)));
        let again = execute(&ledger, &context(100 + n), define(&name))
            .await
            .unwrap();
        assert_eq!(again, Executed::Nothing);
    }
    running.reached(Position(29)).await;
    assert_eq!(log.head().await.unwrap(), Position(29));
    running.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn many_writers_of_one_aggregate_all_have_their_turn() {
    let log = MemoryLog::new();
    let (one, running_one) = ledger(&log).await;
    let (other, running_other) = ledger(&log).await;
    execute(&one, &context(1), create()).await.unwrap();
    one.projections()
        .wait_for(Position(1), PATIENCE)
        .await
        .unwrap();
    other
        .projections()
        .wait_for(Position(1), PATIENCE)
        .await
        .unwrap();
    let writers: Vec<_> = (0..6_u64)
        .map(|writer| {
            let ledger = if writer % 2 == 0 {
                one.clone()
            } else {
                other.clone()
            };
            tokio::spawn(async move {
                for n in 0..10 {
                    let id = 100 + writer * 100 + n;
                    let event = define(&format!("service-{writer}-{n}"));
                    loop {
                        match execute(&ledger, &context(id), event.clone()).await {
                            Ok(done) => break assert!(done.position().is_some()),
                            Err(e) if e.is_retryable() => {}
                            Err(e) => panic!("{e:?}"),
                        }
                    }
                }
            })
        })
        .collect();
    for writer in writers {
        writer.await.unwrap();
    }
    running_one.reached(Position(61)).await;
    let folded = one.projections().folded::<Project>(&subject()).unwrap();
    assert_eq!(folded.state.unwrap().services.len(), 60);
    assert_eq!(folded.revision, 61);
    assert_eq!(one.projections().counters().void, 0);
    running_one.stop().await;
    running_other.stop().await;
}

#[tokio::test]
async fn an_append_whose_answer_is_lost_is_made_once() {
    let log = MemoryLog::new();
    let (ledger, running) = ledger(&log).await;
    log.inject(Fault::LostAck);
    let done = execute(&ledger, &context(1), create()).await.unwrap();
    assert_eq!(done.position(), Some(Position(1)));
    assert_eq!(log.head().await.unwrap(), Position(1));
    log.inject(Fault::Unavailable);
    let away = execute(&ledger, &context(2), define("api"))
        .await
        .unwrap_err();
    assert!(away.is_retryable(), "{away}");
    let done = execute(&ledger, &context(2), define("api")).await.unwrap();
    assert_eq!(done.position(), Some(Position(2)));
    running.stop().await;
}

#[tokio::test]
async fn the_same_request_twice_is_one_event() {
    let log = MemoryLog::new();
    let (ledger, running) = ledger(&log).await;
    let mut request = context(7);
    request.request_digest = Some("d".repeat(64));
    execute(&ledger, &request, create()).await.unwrap();
    execute(&ledger, &context(8), define("api")).await.unwrap();
    running.reached(Position(2)).await;
    let again = execute(&ledger, &request, create()).await.unwrap();
    assert_eq!(
        again,
        Executed::Duplicate {
            position: Position(1)
        }
    );
    let known = ledger
        .projections()
        .event_by_id(request.id)
        .unwrap()
        .unwrap();
    assert_eq!(known.position, Position(1));
    assert_eq!(known.subject, subject());
    assert_eq!(known.request_digest, "d".repeat(64));
    assert_eq!(known.correlation, request.correlation);
    let other = ledger.projections().event_by_id(context(8).id).unwrap();
    assert_eq!(other, None, "it carried no idempotency key");
    running.stop().await;
}

#[tokio::test]
async fn of_two_writers_that_were_both_accepted_the_first_counts() {
    let log = MemoryLog::new();
    let (one, running) = ledger(&log).await;
    let stale = Projections::in_memory();
    execute(&one, &context(1), create()).await.unwrap();
    let first = replay::state_at(&port(&log), Position(1)).await.unwrap();
    drop(stale);
    execute(&one, &context(2), define("api")).await.unwrap();
    running.reached(Position(2)).await;
    // Another writer, whose fold stands still, is let through by a leader that does not look.
    log.inject(Fault::Unchecked);
    let other = Ledger::new(port(&log), first);
    let both = execute(&other, &context(3), define("web")).await.unwrap();
    assert_eq!(
        both,
        Executed::Appended {
            position: Position(3),
            revision: 2
        }
    );
    running.reached(Position(3)).await;
    let folded = one.projections().folded::<Project>(&subject()).unwrap();
    let names: Vec<_> = folded.state.unwrap().services.into_keys().collect();
    assert_eq!(names, ["api".parse().unwrap()]);
    let filter = AuditFilter {
        void_only: true,
        ..AuditFilter::default()
    };
    let audit = one.projections().audit(&filter, Page::default()).unwrap();
    assert_eq!(audit.items.len(), 1);
    assert_eq!(audit.items[0].position, Position(3));
    assert_eq!(audit.items[0].void.as_ref().unwrap().code, "overtaken");
    // The next one goes on after both.
    let next = execute(&one, &context(4), define("web")).await.unwrap();
    assert_eq!(
        next,
        Executed::Appended {
            position: Position(4),
            revision: 3
        }
    );
    running.stop().await;
}

#[tokio::test]
async fn the_wrong_subject_is_refused() {
    let projections = Projections::in_memory();
    let wrong = Subject::Gitops(shop());
    assert!(projections.folded::<Project>(&wrong).is_err());
    assert!(
        projections
            .folded::<Project>(&subject())
            .unwrap()
            .state
            .is_none()
    );
    assert_eq!(Project::KIND.as_str(), "project");
}
