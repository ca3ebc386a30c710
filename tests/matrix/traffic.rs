//! Somebody who uses the service all the time.

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use reqwest::Method;

use crate::stage::Outage;
use crate::support::request;

type Visits = (u32, Vec<Missed>);

/// A visit that was not served.
#[derive(Debug)]
struct Missed {
    from: Instant,
    to: Instant,
    why: String,
}

/// A client in a loop at the gateway.
#[derive(Debug)]
pub struct Traffic {
    may_answer: Arc<Mutex<BTreeSet<String>>>,
    wrong: Arc<Mutex<Vec<String>>>,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<Visits>>,
}

impl Traffic {
    /// Visits a host through a gateway, where only these deployments may answer.
    pub fn to(gateway: &str, host: &str, deployment: &str) -> Self {
        let may_answer = Arc::new(Mutex::new(BTreeSet::from([deployment.to_owned()])));
        let wrong: Arc<Mutex<Vec<String>>> = Arc::default();
        let stop = Arc::new(AtomicBool::new(false));
        let (url, host) = (gateway.to_owned(), host.to_owned());
        let (allowed, bad, stopped) = (may_answer.clone(), wrong.clone(), stop.clone());
        let thread = std::thread::spawn(move || {
            let (mut served, mut missed) = (0, Vec::new());
            while !stopped.load(Ordering::Relaxed) {
                let mut allowed_now = allowed.lock().unwrap().clone();
                let from = Instant::now();
                let answer = request(Method::GET, &url, &[("Host", &host)], None);
                let to = Instant::now();
                allowed_now.extend(allowed.lock().unwrap().iter().cloned());
                match answer {
                    Ok(answer) if answer.status == 200 => {
                        served += 1;
                        let by = answer.by().unwrap_or("nobody");
                        if !allowed_now.contains(by) {
                            let text = format!("{by} answered, and not one of {allowed_now:?}");
                            bad.lock().unwrap().push(text);
                        }
                    }
                    other => missed.push(Missed {
                        from,
                        to,
                        why: format!("{other:?}"),
                    }),
                }
                std::thread::sleep(Duration::from_millis(5));
            }
            (served, missed)
        });
        Self {
            may_answer,
            wrong,
            stop,
            thread: Some(thread),
        }
    }

    /// From now on only these may answer.
    pub fn may_come_from(&self, deployments: &[&str]) {
        let deployments = deployments.iter().map(|d| (*d).to_owned());
        *self.may_answer.lock().unwrap() = deployments.collect();
    }

    /// Ends the visits, and says what was wrong with them: a visit may only fail while its gateway
    /// was dead, and a wrong one may never answer.
    pub fn end(mut self, outages: &[Outage]) -> (u32, Vec<String>) {
        self.stop.store(true, Ordering::Relaxed);
        let (served, missed) = self.thread.take().unwrap().join().unwrap();
        let mut wrong = self.wrong.lock().unwrap().clone();
        let excused = |visit: &&Missed| {
            let mut outages = outages.iter();
            outages.any(|o| visit.from <= o.to && visit.to >= o.from)
        };
        let unexcused: Vec<_> = missed.iter().filter(|v| !excused(v)).collect();
        if let (Some(first), Some(last)) = (unexcused.first(), unexcused.last()) {
            let ready = outages.last().map(|o| o.to);
            let after = |visit: &Missed| ready.map(|ready| visit.from.duration_since(ready));
            wrong.push(format!(
                "{} visits were not served although everything ran, from {:?} to {:?} after the \
                 restart: {}",
                unexcused.len(),
                after(first),
                after(last),
                last.why
            ));
        }
        (served, wrong)
    }
}

impl Drop for Traffic {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}
