//! A service in constant use, by visitors who know what they may be answered.

use std::sync::atomic::{AtomicBool, AtomicU32, AtomicUsize, Ordering::SeqCst};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::connection::Connection;
use super::server::{Server, until};

/// Connections that the requests come over.
const VISITORS: u32 = 16;
/// Requests per second, of all visitors together.
const RATE: u32 = 500;

/// Which deployments may answer at a time.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Expected {
    /// The first until it is the second, and never the first again.
    Switch(String, String),
    /// Either of them.
    Shared(String, String),
}

impl Expected {
    /// No other than this one.
    pub fn only(id: &str) -> Self {
        Self::Switch(id.to_owned(), id.to_owned())
    }

    /// Whether a deployment may answer, where the one that answered before was `before`.
    pub fn allows(&self, before: Option<&str>, by: &str) -> bool {
        match self {
            Self::Switch(from, to) => by == to || (by == from && before != Some(to)),
            Self::Shared(one, two) => by == one || by == two,
        }
    }
}

/// Visitors that ask at a steady rate, each on one connection that is never opened again. The
/// addresses are asked in turn: what answers at one of them holds for all.
#[derive(Debug)]
pub struct Load {
    done: Arc<AtomicBool>,
    answers: Arc<AtomicU32>,
    /// What was expected, from the beginning; the last is so now.
    phases: Arc<Mutex<Vec<Expected>>>,
    now: Arc<AtomicUsize>,
    visitors: Vec<JoinHandle<Vec<String>>>,
}

impl Load {
    /// Starts to visit these hosts.
    pub fn on(server: &Server, hosts: &[&str], expected: Expected) -> Self {
        let mut load = Self {
            done: Arc::default(),
            answers: Arc::default(),
            phases: Arc::new(Mutex::new(vec![expected])),
            now: Arc::default(),
            visitors: Vec::new(),
        };
        let visitors = (0..VISITORS).map(|number| {
            let visitor = Visit {
                done: load.done.clone(),
                answers: load.answers.clone(),
                phases: load.phases.clone(),
                now: load.now.clone(),
                hosts: hosts.iter().map(|h| (*h).to_owned()).collect(),
                connection: Connection::open(&server.gateway()),
            };
            std::thread::spawn(move || visitor.go(number))
        });
        load.visitors = visitors.collect();
        load
    }

    /// What is expected from here on; to be said before it is asked for.
    pub fn expect(&self, expected: Expected) {
        let mut phases = self.phases.lock().unwrap();
        phases.push(expected);
        self.now.store(phases.len() - 1, SeqCst);
    }

    /// Waits until each visitor has asked about twice more.
    #[track_caller]
    pub fn go_on(&self) {
        let before = self.answers.load(SeqCst);
        until("more answers", || {
            let over = self.visitors.iter().any(JoinHandle::is_finished);
            (over || self.answers.load(SeqCst) >= before + 2 * VISITORS).then_some(())
        });
    }

    /// Ends the visits. How many requests there were.
    ///
    /// # Panics
    /// If one of them was not answered, or by somebody who was not expected.
    #[track_caller]
    pub fn was_always_served(self) -> u32 {
        self.done.store(true, SeqCst);
        let failed = self.visitors.into_iter().map(|v| v.join().unwrap());
        let failed: Vec<_> = failed.collect();
        assert_eq!(failed.concat(), Vec::<String>::new());
        let answers = self.answers.load(SeqCst);
        assert!(answers > 0);
        answers
    }
}

struct Visit {
    done: Arc<AtomicBool>,
    answers: Arc<AtomicU32>,
    phases: Arc<Mutex<Vec<Expected>>>,
    now: Arc<AtomicUsize>,
    hosts: Vec<String>,
    connection: Connection,
}

impl Visit {
    fn go(mut self, number: u32) -> Vec<String> {
        let every = Duration::from_secs(1) * VISITORS / RATE;
        let mut next = Instant::now() + every * number / VISITORS;
        let (mut phase, mut before) = (0, None::<String>);
        let mut failed = Vec::new();
        for host in self.hosts.clone().iter().cycle() {
            if self.done.load(SeqCst) || failed.len() > 3 {
                break;
            }
            // What could not be asked in time is left out.
            let now = Instant::now();
            std::thread::sleep(next.saturating_duration_since(now));
            next = (next + every).max(now);
            // What one answer has shown to be so is so for the next.
            let now = self.now.load(SeqCst);
            if now > phase {
                (phase, before) = (now, None);
            }
            let answer = match self.connection.get(host, "/") {
                Ok(answer) => answer,
                Err(error) => {
                    failed.push(format!("{host}: {error}"));
                    break;
                }
            };
            self.answers.fetch_add(1, SeqCst);
            let phases = self.phases.lock().unwrap();
            // What was asked before a switch may be answered after it.
            let found = answer.by().filter(|_| answer.status == 200).and_then(|by| {
                let later = phases.iter().enumerate().skip(phase);
                let mut later = later.map(|(n, expected)| {
                    let before = before.as_deref().filter(|_| n == phase);
                    (n, expected.allows(before, by))
                });
                later.find(|(_, allowed)| *allowed)
            });
            match found {
                Some((n, _)) => (phase, before) = (n, answer.by().map(str::to_owned)),
                None => {
                    let expected = &phases[phase..];
                    let text = format!("{host}: {answer:?} after {before:?}, not {expected:?}");
                    failed.push(text);
                }
            }
        }
        failed
    }
}
