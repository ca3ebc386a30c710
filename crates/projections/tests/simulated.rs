//! Several writers on a log that misbehaves as brokers do: whatever it does, what a command was
//! told is what the folds say.
//!
//! A case is a seed of the log's dice and what three processes do with one deployment at the same
//! time, each with a fold of its own: they take its next steps, as workers do that were handed the
//! same event, and requests come in between. There are two thousand cases;
//! `PROPTEST_CASES=100000 cargo test -p daybook-projections --test simulated` runs more.
#![allow(clippy::unwrap_used)]

use std::collections::HashSet;
use std::sync::Arc;
use std::time::Duration;

use daybook_events::deployment::{self, Deployment, DeploymentEvent, Status, TRANSITIONS};
use daybook_events::simulated::{SimulatedLog, Weather};
use daybook_events::testing::{context, samples};
use daybook_events::{Context, EventId, EventLog, Folded, Payload, Position, Subject};
use daybook_projections::runner::run;
use daybook_projections::{ExecuteError, Executed, Ledger, Projections, replay};
use futures_util::StreamExt;
use proptest::prelude::*;
use proptest::strategy::ValueTree;
use proptest::test_runner::TestRunner;
use tokio_util::sync::CancellationToken;

/// How many cases there are, unless the environment says otherwise.
const CASES: u32 = 2000;
/// So many run at once: they mostly wait.
const AT_ONCE: usize = 64;
const WRITERS: usize = 3;
const PATIENCE: Duration = Duration::from_secs(30);
/// More often than this no event is appended anew in the stead of a void one.
const STEADS: usize = 32;

/// What one case does.
#[derive(Debug, Clone)]
struct Case {
    seed: u64,
    /// For each writer which of the possible steps it takes, one after the other.
    choices: Vec<Vec<u8>>,
}

fn cases() -> impl Strategy<Value = Case> {
    let choices = prop::collection::vec(any::<u8>(), 4..14);
    let all = prop::collection::vec(choices, WRITERS);
    (any::<u64>(), all).prop_map(|(seed, choices)| Case { seed, choices })
}

fn subject() -> Subject {
    let instance = samples::shop();
    let id = samples::deployment_id(1);
    Subject::Deployment(instance.project, instance.environment, id)
}

/// One process: a ledger, and a fold that follows the log by itself.
struct Process {
    ledger: Ledger,
    cancel: CancellationToken,
}

impl Process {
    fn start(log: &SimulatedLog) -> Self {
        let log: Arc<dyn EventLog> = Arc::new(log.clone());
        let projections = Projections::in_memory();
        let cancel = CancellationToken::new();
        tokio::spawn(run(projections.clone(), log.clone(), cancel.clone()));
        let ledger = Ledger::new(log, projections);
        Self { ledger, cancel }
    }

    fn state(&self) -> Option<Deployment> {
        let projections = self.ledger.projections();
        let folded = projections.shared::<Deployment>(&subject()).unwrap();
        folded.state.clone()
    }

    /// Takes a step again and again until it is known what came of it, as a worker does whose
    /// event is delivered again. What was said is noted.
    async fn take(&self, event: &DeploymentEvent, context: &Context, said: &mut Vec<Said>) {
        let until = tokio::time::Instant::now() + PATIENCE;
        loop {
            let decide = |state: Option<&Deployment>| deployment::decide(state, event.clone());
            match self.ledger.execute(&subject(), context, decide).await {
                Ok(Executed::Nothing) | Err(ExecuteError::Refused(_)) => return,
                Ok(executed) => {
                    said.push(Said {
                        position: executed.position().unwrap(),
                        id: context.id,
                        kind: event.kind(),
                    });
                    return;
                }
                Err(error) => {
                    assert!(error.is_retryable(), "{error:?}");
                    assert!(tokio::time::Instant::now() < until, "{error:?}");
                    tokio::time::sleep(Duration::from_millis(1)).await;
                }
            }
        }
    }

    async fn live(&self, choices: &[u8]) -> Vec<Said> {
        let mut said = Vec::new();
        for choice in choices {
            let Some(state) = self.state() else {
                continue;
            };
            let Some(event) = possible(state.status, *choice) else {
                break;
            };
            // As every worker derives it: the same step of the same status is the same event.
            let id = EventId::derived(state.status_event.0, event.kind());
            let context = Context { id, ..context(0) };
            self.take(&event, &context, &mut said).await;
        }
        said
    }
}

/// What a command was told.
struct Said {
    position: Position,
    id: EventId,
    kind: &'static str,
}

impl Said {
    /// Whether an event is the command's: its own, or one in the stead of a void one.
    fn is_of(&self, event: EventId) -> bool {
        let stead = std::iter::successors(Some(self.id), |id| Some(id.in_its_stead()));
        stead.take(STEADS).any(|id| id == event)
    }
}

/// One of the events that may follow on a status; none at the end of the life.
fn possible(status: Status, choice: u8) -> Option<DeploymentEvent> {
    let follows = |kind: &str| {
        let transition = TRANSITIONS.iter().find(|t| t.kind == kind);
        transition.is_some_and(|t| t.from.contains(&status) && t.to.is_some())
    };
    let all = samples::deployment_events(samples::shop(), 1);
    let mut possible: Vec<_> = all.into_iter().filter(|e| follows(e.kind())).collect();
    if possible.is_empty() {
        return None;
    }
    let index = usize::from(choice) % possible.len();
    Some(possible.swap_remove(index))
}

async fn carry_out(case: Case) -> Result<(), String> {
    let log = SimulatedLog::new(case.seed, Weather::STORM);
    let processes: Vec<_> = (0..WRITERS).map(|_| Process::start(&log)).collect();
    let requested = samples::request(samples::shop());
    let requested = DeploymentEvent::Requested(Box::new(requested));
    let mut said = Vec::new();
    processes[0].take(&requested, &context(1), &mut said).await;
    let lives = processes.iter().zip(&case.choices);
    let lives = lives.map(|(process, choices)| process.live(choices));
    for told in futures_util::future::join_all(lives).await {
        said.extend(told);
    }
    // What is still on its way arrives.
    log.set_weather(Weather::CALM);
    tokio::time::sleep(Duration::from_millis(10)).await;
    let head = log.head().await.unwrap();
    for process in &processes {
        let projections = process.ledger.projections();
        projections.wait_for(head, PATIENCE).await.unwrap();
    }
    let result = judge(&log, &processes, &said, head).await;
    for process in processes {
        process.cancel.cancel();
    }
    result
}

async fn judge(
    log: &SimulatedLog,
    processes: &[Process],
    said: &[Said],
    head: Position,
) -> Result<(), String> {
    // Folded once more by hand, every step checked against the table.
    let mut folded = Folded::<Deployment>::default();
    let mut counted = Vec::new();
    let mut steps = HashSet::new();
    for recorded in log.read_aggregate(&subject()).await.unwrap() {
        let event = recorded.event().unwrap();
        let before = folded.state.as_ref().map(|s| (s.status, s.status_event));
        if folded.apply(recorded.position, &event).is_err() {
            continue;
        }
        counted.push((recorded.position, event.id, event.short_kind().to_owned()));
        let Some((status, cause)) = before else {
            continue;
        };
        let kind = event.short_kind();
        let transition = TRANSITIONS.iter().find(|t| t.kind == kind);
        if !transition.is_some_and(|t| t.from.contains(&status)) {
            return Err(format!("{kind} counted after {status:?}"));
        }
        if !steps.insert((cause, kind.to_owned())) {
            return Err(format!("{kind} counted twice after {status:?}"));
        }
    }
    for said in said {
        let Said { position, kind, .. } = said;
        let own: Vec<_> = counted
            .iter()
            .filter(|(_, id, _)| said.is_of(*id))
            .collect();
        let [(at, _, counts)] = own[..] else {
            return Err(format!(
                "{kind} was said to be at {position}, and counts {} times",
                own.len()
            ));
        };
        if counts != kind {
            return Err(format!("{kind} was said to be at {position}: {counts}"));
        }
        // A repetition may be told a later position, up to which only void events follow.
        let between = |at_other: Position| *at < at_other && at_other <= *position;
        if at > position || counted.iter().any(|(other, ..)| between(*other)) {
            return Err(format!(
                "{kind} was said to be at {position}, and is at {at}"
            ));
        }
    }
    let port: Arc<dyn EventLog> = Arc::new(log.clone());
    let expected = replay::state_at(&port, head).await.unwrap();
    let expected = expected.digest().unwrap();
    for process in processes {
        if process.ledger.projections().digest().unwrap() != expected {
            return Err("the folds differ".to_owned());
        }
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_command_was_told_is_what_all_folds_say() {
    let config = ProptestConfig::default();
    let asked = std::env::var_os("PROPTEST_CASES").is_some();
    let number = if asked { config.cases } else { CASES };
    let mut runner = TestRunner::new(config);
    let drawn = (0..number).map(|_| cases().new_tree(&mut runner).unwrap().current());
    let drawn: Vec<Case> = drawn.collect();
    let mut running = futures_util::stream::iter(drawn)
        .map(|case| async move {
            let result = tokio::spawn(carry_out(case.clone())).await;
            (case, result)
        })
        .buffer_unordered(AT_ONCE);
    while let Some((case, result)) = running.next().await {
        match result {
            Ok(Ok(())) => {}
            Ok(Err(wrong)) => panic!("{wrong}: {case:?}"),
            Err(panicked) => panic!("{panicked}: {case:?}"),
        }
    }
}
