//! The table: which places there are, a run for each, and what came of it.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::ExitCode;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU32, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::outcome::{complaints, outcome};
use crate::scenario::{Versions, play};
use crate::stage::{Cast, Stage};

/// How long a run may take to come to the end that the undisturbed one had.
const SETTLES: Duration = Duration::from_secs(10);

/// So many runs at once. They mostly wait.
const AT_ONCE: usize = 3;

type Outcome = BTreeMap<String, Value>;

/// A place, and at which time it kills.
#[derive(Debug, Clone)]
struct Cell {
    part: &'static str,
    place: String,
    time: u32,
    /// How often the undisturbed run was there.
    of: u32,
    /// There is a later time, too.
    early: bool,
}

/// Runs all places that a filter names; all of them without one. If `all`, also for the first time
/// that each is reached.
pub fn run(cast: &Cast, filters: &[String], all: bool) -> ExitCode {
    let versions = Versions::new();
    let began = Instant::now();
    let (expected, cells) = undisturbed(cast, &versions);
    println!(
        "undisturbed: {:.1} s, {} places\n",
        began.elapsed().as_secs_f64(),
        places(&cells),
    );
    let cells: Vec<Cell> = cells
        .into_iter()
        .filter(|c| all || !c.early)
        .filter(|c| filters.is_empty() || filters.iter().any(|f| c.place.contains(f.as_str())))
        .collect();
    let next = AtomicUsize::new(0);
    let failures = Mutex::new(Vec::new());
    std::thread::scope(|scope| {
        for _ in 0..AT_ONCE {
            scope.spawn(|| {
                while let Some(cell) = cells.get(next.fetch_add(1, Ordering::Relaxed)) {
                    let began = Instant::now();
                    let killed = AtomicU32::new(cell.time);
                    let result = catch_unwind(AssertUnwindSafe(|| {
                        killed_at(cell, &killed, cast, &versions, &expected)
                    }));
                    let result = result.unwrap_or_else(|panic| Err(vec![text_of(&*panic)]));
                    let said = match &result {
                        Ok(()) => "ok",
                        Err(_) => "FAILED",
                    };
                    println!(
                        "{:<64} {:>3} of {:<3} {said:<6} {:>5.1} s",
                        format!("{} {}", cell.part, cell.place),
                        killed.load(Ordering::Relaxed),
                        cell.of,
                        began.elapsed().as_secs_f64()
                    );
                    if let Err(wrong) = result {
                        failures.lock().unwrap().push((cell.clone(), wrong));
                    }
                }
            });
        }
    });
    let failures = failures.into_inner().unwrap();
    let mut told = String::new();
    for (cell, wrong) in &failures {
        let _ = writeln!(told, "\n{} {}#{}", cell.part, cell.place, cell.time);
        for text in wrong {
            let _ = writeln!(told, "  {}", text.replace('\n', "\n  "));
        }
    }
    println!(
        "{told}\n{} runs, {} failed, {:.0} s",
        cells.len(),
        failures.len(),
        began.elapsed().as_secs_f64()
    );
    ExitCode::from(u8::from(!failures.is_empty()))
}

fn places(cells: &[Cell]) -> usize {
    let mut names: Vec<_> = cells.iter().map(|c| (c.part, &c.place)).collect();
    names.dedup();
    names.len()
}

/// The run that nothing disturbs: where everything ends, and what there is to kill.
fn undisturbed(cast: &Cast, versions: &Versions) -> (Outcome, Vec<Cell>) {
    let mut stage = Stage::start(cast, None);
    let (deployments, wrong) = play(&mut stage, versions);
    assert!(wrong.is_empty(), "without any fault: {wrong:?}");
    let wrong = complaints(&mut stage);
    assert!(wrong.is_empty(), "without any fault: {wrong:?}");
    let expected = outcome(&mut stage, &deployments);
    let mut cells = Vec::new();
    for (part, _) in &cast.parts {
        let mut order: Vec<String> = Vec::new();
        let mut counts: BTreeMap<String, u32> = BTreeMap::new();
        for place in stage.trace(part) {
            if !counts.contains_key(&place) {
                order.push(place.clone());
            }
            *counts.entry(place).or_default() += 1;
        }
        for place in order {
            let of = counts[&place];
            // Once early, and once when there is traffic to disturb.
            let mut times = vec![1];
            if of > 1 {
                times.push(of.div_ceil(2) + 1);
            }
            let last = times.len() - 1;
            for (index, time) in times.into_iter().enumerate() {
                cells.push(Cell {
                    early: index < last,
                    part,
                    place: place.clone(),
                    time: time.min(of),
                    of,
                });
            }
        }
    }
    (expected, cells)
}

/// A run that is killed at a place. How often a place is reached differs from run to run, as tries
/// do: if it was not reached that often, it is killed a time earlier.
fn killed_at(
    cell: &Cell,
    time: &AtomicU32,
    cast: &Cast,
    versions: &Versions,
    expected: &Outcome,
) -> Result<(), Vec<String>> {
    let (mut stage, deployments, mut wrong) = loop {
        let number = time.load(Ordering::Relaxed);
        let place = format!("{}#{number}", cell.place);
        let mut stage = Stage::start(cast, Some((cell.part, &place)));
        let (deployments, mut wrong) = play(&mut stage, versions);
        if stage.deaths == 0 && number > 1 && wrong.is_empty() {
            time.store(number - 1, Ordering::Relaxed);
            continue;
        }
        if stage.deaths == 0 {
            wrong.push("it was never reached".into());
        }
        break (stage, deployments, wrong);
    };
    wrong.extend(complaints(&mut stage));
    let deadline = Instant::now() + SETTLES;
    let found = loop {
        let found = outcome(&mut stage, &deployments);
        if found == *expected || Instant::now() > deadline {
            break found;
        }
        std::thread::sleep(Duration::from_millis(200));
    };
    for (name, value) in expected {
        if found.get(name) != Some(value) {
            let found = found.get(name).unwrap_or(&Value::Null);
            wrong.push(difference(name, value, found));
        }
    }
    if wrong.is_empty() { Ok(()) } else { Err(wrong) }
}

/// What is expected and what was found, of objects only what differs.
fn difference(name: &str, expected: &Value, found: &Value) -> String {
    let (Some(expected), Some(found)) = (expected.as_object(), found.as_object()) else {
        return format!("{name}: expected {expected}, found {found}");
    };
    let keys: BTreeSet<_> = expected.keys().chain(found.keys()).collect();
    let differ = keys
        .into_iter()
        .filter(|k| expected.get(*k) != found.get(*k));
    let told = differ.map(|key| {
        let text = |value: Option<&Value>| value.map_or("nothing".into(), Value::to_string);
        format!(
            "{key}: expected {}, found {}",
            text(expected.get(key)),
            text(found.get(key))
        )
    });
    format!("{name}: {}", told.collect::<Vec<_>>().join("; "))
}

fn text_of(panic: &(dyn std::any::Any + Send)) -> String {
    panic
        .downcast_ref::<String>()
        .cloned()
        .or_else(|| panic.downcast_ref::<&str>().map(|s| (*s).to_owned()))
        .unwrap_or_else(|| "it panicked".into())
}
