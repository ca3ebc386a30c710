//! A server's ledger, read over HTTP: what replaying it on this machine folds.

use std::sync::Arc;

use async_trait::async_trait;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use bytes::Bytes;
use daybook_events::log::{
    Append, AppendError, Appended, Consumer, ConsumerConfig, Durability, EventLog, EventStream,
    LogInfo, ReadError,
};
use daybook_events::{Position, Recorded, Subject, SubjectFilter};
use futures_util::StreamExt;
use jiff::Timestamp;
use serde::Deserialize;
use serde_json::value::RawValue;

use crate::client::Client;
use crate::commands::print_event;
use crate::exit::{Code, Failure};

/// All events of a server up to a position, in memory.
#[derive(Debug)]
pub struct RemoteLog {
    events: Arc<Vec<Recorded>>,
}

#[derive(Deserialize)]
struct EventPage {
    events: Vec<Entry>,
}

#[derive(Deserialize)]
struct Entry {
    position: u64,
    subject: String,
    stored_at: Timestamp,
    /// The exact stored bytes, if they are JSON.
    event: Option<Box<RawValue>>,
    /// The stored bytes in Base64, if they are not.
    bytes: Option<String>,
}

impl Entry {
    fn stored(self) -> Result<Bytes, Failure> {
        let unreadable = || {
            let what = format!(
                "the server does not say what is stored at {}",
                self.position
            );
            Failure::new(Code::Mismatch, "ledger_incomplete", what)
        };
        match (self.event, self.bytes) {
            (Some(event), _) => Ok(Bytes::from(String::from(Box::<str>::from(event)))),
            (None, Some(bytes)) => {
                let bytes = BASE64.decode(bytes).map_err(|_| unreadable())?;
                Ok(bytes.into())
            }
            (None, None) => Err(unreadable()),
        }
    }
}

impl RemoteLog {
    /// Reads the events up to a position, printing them as they come if asked to.
    pub async fn fetch(client: &Client, to: u64, print: bool) -> Result<Self, Failure> {
        let mut events: Vec<Recorded> = Vec::new();
        while (events.len() as u64) < to {
            let after = events.len() as u64;
            let query = [
                ("after", Some(after.to_string())),
                ("limit", Some((to - after).min(500).to_string())),
            ];
            let page: EventPage = client.get("/api/v1/events", &query).await?;
            if page.events.is_empty() {
                break;
            }
            for entry in page.events {
                let expected = events.len() as u64 + 1;
                if entry.position != expected {
                    return Err(Failure::new(
                        Code::Mismatch,
                        "ledger_incomplete",
                        format!("event {} came where {expected} was due", entry.position),
                    ));
                }
                if print
                    && let Some(event) = &entry.event
                    && let Ok(value) = serde_json::from_str(event.get())
                {
                    print_event(entry.position, &value);
                }
                events.push(Recorded {
                    position: Position(entry.position),
                    subject: Subject::of_stored(&entry.subject),
                    stored_at: entry.stored_at,
                    bytes: entry.stored()?,
                });
            }
        }
        Ok(Self {
            events: Arc::new(events),
        })
    }

    fn after(&self, after: Position) -> impl Iterator<Item = &Recorded> {
        let from = usize::try_from(after.0)
            .unwrap_or(usize::MAX)
            .min(self.events.len());
        self.events[from..].iter()
    }
}

#[async_trait]
impl EventLog for RemoteLog {
    async fn append(&self, _: Append) -> Result<Appended, AppendError> {
        Err(AppendError::Stopped(
            "this copy of the ledger is only read".into(),
        ))
    }

    async fn head(&self) -> Result<Position, ReadError> {
        Ok(Position(self.events.len() as u64))
    }

    async fn get(&self, position: Position) -> Result<Option<Recorded>, ReadError> {
        Ok(self
            .after(Position(position.0.saturating_sub(1)))
            .next()
            .filter(|r| r.position == position)
            .cloned())
    }

    async fn read_aggregate(&self, subject: &Subject) -> Result<Vec<Recorded>, ReadError> {
        Ok(self
            .events
            .iter()
            .filter(|r| r.subject == *subject)
            .cloned()
            .collect())
    }

    async fn read(
        &self,
        after: Position,
        filter: &SubjectFilter,
        limit: usize,
    ) -> Result<Vec<Recorded>, ReadError> {
        Ok(self
            .after(after)
            .filter(|r| filter.matches(&r.subject))
            .take(limit)
            .cloned()
            .collect())
    }

    async fn tail(&self, after: Position, filter: SubjectFilter) -> Result<EventStream, ReadError> {
        let events: Vec<_> = self
            .after(after)
            .filter(|r| filter.matches(&r.subject))
            .cloned()
            .map(Ok)
            .collect();
        // A tail waits for what comes, and nothing comes here.
        Ok(futures_util::stream::iter(events)
            .chain(futures_util::stream::pending())
            .boxed())
    }

    async fn consumer(&self, _: ConsumerConfig) -> Result<Arc<dyn Consumer>, ReadError> {
        Err(ReadError::Invalid(
            "a copy of a ledger has no consumers".into(),
        ))
    }

    async fn info(&self) -> Result<LogInfo, ReadError> {
        Ok(LogInfo {
            backend: "copy",
            version: env!("CARGO_PKG_VERSION").into(),
            durability: Durability::Buffered,
            identity: "copy".into(),
            warnings: Vec::new(),
        })
    }
}
