//! The ledger's events as somebody has them who follows it over HTTP, with the time at which each
//! came. What is stored comes no earlier.

use std::time::{Duration, Instant};

use reqwest::Client;
use serde_json::Value;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;

use crate::Failure;

const PATIENCE: Duration = Duration::from_secs(60);
/// So many events may wait until somebody looks.
const WAITING: usize = 4096;

pub(super) struct Feed {
    events: mpsc::Receiver<(Instant, Value)>,
    reader: JoinHandle<()>,
}

impl Drop for Feed {
    fn drop(&mut self) {
        self.reader.abort();
    }
}

impl Feed {
    /// Follows all observations of workloads from now on.
    pub(super) async fn open(url: &str) -> Result<Self, Failure> {
        let url = format!("{url}/api/v1/events?follow=true&kind=deployment.workload_observed.v1");
        let request = Client::builder().no_proxy().build()?.get(url);
        let request = request.header("Accept", "text/event-stream");
        let mut answer = request.send().await?.error_for_status()?;
        let (sender, events) = mpsc::channel(WAITING);
        let reader = tokio::spawn(async move {
            let mut rest = Vec::new();
            while let Ok(Some(chunk)) = answer.chunk().await {
                let came = Instant::now();
                rest.extend_from_slice(&chunk);
                while let Some(end) = rest.iter().position(|b| *b == b'\n') {
                    let line: Vec<u8> = rest.drain(..=end).collect();
                    let event = line.strip_prefix(b"data: ").unwrap_or_default();
                    if let Ok(event) = serde_json::from_slice(event) {
                        let _ = sender.send((came, event)).await;
                    }
                }
            }
        });
        Ok(Self { events, reader })
    }

    /// Forgets what has come so far.
    pub(super) fn forget(&mut self) {
        while self.events.try_recv().is_ok() {}
    }

    /// Waits for an observation of a deployment, and says when it came.
    pub(super) async fn observed(
        &mut self,
        deployment: &str,
        is: impl Fn(&Value) -> bool,
    ) -> Result<Instant, Failure> {
        let found = async {
            while let Some((came, event)) = self.events.recv().await {
                let subject = event["subject"].as_str().unwrap_or_default();
                if subject.contains(deployment) && is(&event["data"]) {
                    return Ok(came);
                }
            }
            Err::<_, Failure>("the feed of events ended".into())
        };
        let found = tokio::time::timeout(PATIENCE, found).await;
        found.map_err(|_| format!("what was done to {deployment} was not observed"))?
    }
}

/// Whether all instances are ready, and nothing is the matter.
pub(super) fn is_ready(observed: &Value) -> bool {
    let instances = observed["instances"].as_array();
    let ready =
        instances.is_some_and(|all| !all.is_empty() && all.iter().all(|i| i["ready"] == true));
    ready && observed["problem"].is_null()
}

/// Whether no instance is ready, for no reason yet.
pub(super) fn is_unready(observed: &Value) -> bool {
    let mut instances = observed["instances"].as_array().into_iter().flatten();
    instances.all(|i| i["ready"] == false) && observed["problem"].is_null()
}

/// Whether a release is not ready for this reason, with these words.
pub(super) fn has_problem(observed: &Value, reason: &str, words: &str) -> bool {
    let problem = &observed["problem"];
    let message = problem["message"].as_str().unwrap_or_default();
    problem["reason"] == reason && message.contains(words)
}
