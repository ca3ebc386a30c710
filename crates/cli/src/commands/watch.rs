//! `daybook status --watch`

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use daybook_projections::views::Overview;
use futures_util::StreamExt;
use jiff::Timestamp;
use serde_json::Value;

use super::Outcome;
use super::events::{Lost, RECONNECT};
use super::status;
use crate::client::Client;
use crate::exit::{Code, Failure};
use crate::output;

/// Events that come within this time of one another are shown together.
const TOGETHER: Duration = Duration::from_millis(100);

/// What is watched.
pub enum Watched {
    /// What runs where, of what this asks for.
    Overview(Vec<(&'static str, Option<String>)>),
    /// One deployment, by its full id.
    Deployment(String),
}

/// Shows it, and again whenever an event has changed it, until somebody interrupts that or the
/// server is gone for too long. On a terminal the new takes the place of the old; elsewhere there is
/// a line for each deployment that changed, or a JSON document.
pub async fn watch(client: &Client, watched: &Watched) -> Outcome {
    let mut shown = Shown::default();
    let mut lost = Lost::default();
    loop {
        let wait = match shown.until_it_breaks(client, watched, &mut lost).await {
            Ok(()) => RECONNECT,
            Err(failure) => lost.wait(failure, Instant::now())?,
        };
        tokio::time::sleep(wait).await;
    }
}

/// What was shown last.
#[derive(Debug, Default)]
struct Shown {
    /// The part of the answer that counts.
    of: Option<Value>,
    /// Line by line, where there is no terminal.
    lines: BTreeMap<String, String>,
}

impl Shown {
    /// Shows what is so, and follows the events until the stream ends.
    async fn until_it_breaks(
        &mut self,
        client: &Client,
        watched: &Watched,
        lost: &mut Lost,
    ) -> Result<(), Failure> {
        let first = watched.ask(client).await?;
        // What showing it asks for is newer, and so would be the position.
        let after = client.position();
        lost.is_over();
        let project = watched.project(&first);
        self.show(client, watched, first).await?;
        let query = [
            ("project", project),
            ("follow", Some("true".to_owned())),
            ("after", Some(after.to_string())),
        ];
        let stream = client.stream("/api/v1/events", &query, None).await?;
        let mut stream = std::pin::pin!(stream);
        while let Some(Ok(event)) = stream.next().await {
            client.saw(event.id.parse().unwrap_or_default());
            let mut ended = false;
            let together = tokio::time::sleep(TOGETHER);
            let mut together = std::pin::pin!(together);
            loop {
                tokio::select! {
                    () = &mut together => break,
                    next = stream.next() => match next {
                        Some(Ok(event)) => client.saw(event.id.parse().unwrap_or_default()),
                        _ => {
                            ended = true;
                            break;
                        }
                    },
                }
            }
            // The stream is the ledger's; what is asked for waits until the fold is as far.
            let now = watched.ask(client).await?;
            self.show(client, watched, now).await?;
            if ended {
                break;
            }
        }
        Ok(())
    }

    /// Shows it if it differs from what is shown.
    async fn show(
        &mut self,
        client: &Client,
        watched: &Watched,
        now: Value,
    ) -> Result<(), Failure> {
        let of = match watched {
            Watched::Overview(_) => now["instances"].clone(),
            Watched::Deployment(_) => now.clone(),
        };
        if self.of.as_ref() == Some(&of) {
            return Ok(());
        }
        self.of = Some(of);
        if output::is_json() {
            output::json(&now);
            return Ok(());
        }
        if output::is_drawn_over() {
            output::clear();
            match watched {
                Watched::Overview(query) => status::show(client, query, now).await?,
                Watched::Deployment(_) => status::print_detail(&now),
            }
            return Ok(());
        }
        let lines = match watched {
            Watched::Overview(_) => {
                let overview: Overview = serde_json::from_value(now).map_err(unexpected)?;
                status::lines(&overview)
            }
            Watched::Deployment(id) => BTreeMap::from([(id.clone(), status::detail_line(&now))]),
        };
        let at = output::time(Timestamp::now());
        for (deployment, line) in &lines {
            if self.lines.get(deployment) != Some(line) {
                output::line(&format!("{at} {line}"));
            }
        }
        for (deployment, line) in &self.lines {
            if !lines.contains_key(deployment) {
                let what = line.split(": ").next().unwrap_or_default();
                output::line(&format!("{at} {what}: gone"));
            }
        }
        self.lines = lines;
        Ok(())
    }
}

impl Watched {
    async fn ask(&self, client: &Client) -> Result<Value, Failure> {
        match self {
            Self::Overview(query) => client.get("/api/v1/state", query).await,
            Self::Deployment(id) => client.get(&format!("/api/v1/deployments/{id}"), &[]).await,
        }
    }

    /// The project whose events can change it; those of all if there is none. Routes and the
    /// environment change a deployment too, and theirs are events of others.
    fn project(&self, first: &Value) -> Option<String> {
        match self {
            Self::Overview(query) => {
                let project = query.iter().find(|(name, _)| *name == "project");
                project.and_then(|(_, project)| project.clone())
            }
            Self::Deployment(_) => first["project"].as_str().map(str::to_owned),
        }
    }
}

fn unexpected(error: serde_json::Error) -> Failure {
    Failure::new(Code::Failure, "unexpected_answer", error.to_string())
}
