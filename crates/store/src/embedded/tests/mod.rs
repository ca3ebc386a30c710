//! What only the embedded log promises; what every log promises is in the conformance suite.
#![allow(clippy::unwrap_used)]

mod appends;
mod consumers;
mod damage;
mod model;
mod output;

use std::path::Path;
use std::time::Duration;

use bytes::Bytes;
use daybook_events::log::{
    Append, AppendError, Appended, EventLog, Expected, Position, ReadError, Recorded,
};
use daybook_events::names::{EventId, ProjectName};
use daybook_events::subject::{Subject, SubjectFilter};
use uuid::Uuid;

use super::{EmbeddedConfig, EmbeddedLog};

/// Longest wait for something that must happen.
const SOON: Duration = Duration::from_secs(20);

async fn soon<T>(what: impl Future<Output = T>) -> T {
    tokio::time::timeout(SOON, what)
        .await
        .expect("it did not happen in time")
}

async fn open(dir: &Path) -> EmbeddedLog {
    EmbeddedLog::open(dir, EmbeddedConfig::default())
        .await
        .unwrap()
}

fn subject(n: usize) -> Subject {
    Subject::Routing(ProjectName::parse(format!("p{n}")).unwrap())
}

fn event(n: usize, id: u128, expected: Expected) -> Append {
    Append {
        subject: subject(n),
        id: EventId(Uuid::from_u128(id)),
        expected,
        bytes: Bytes::from(format!("{{\"id\":{id}}}")),
    }
}

async fn put(log: &EmbeddedLog, n: usize, id: u128) -> Appended {
    log.append(event(n, id, Expected::Any)).await.unwrap()
}

fn stored(position: u64) -> Appended {
    Appended {
        position: Position(position),
        duplicate: false,
    }
}

fn is_conflict(answer: &Result<Appended, AppendError>, at: u64) -> bool {
    matches!(answer, Err(AppendError::Conflict { actual: Some(a), .. }) if a.0 == at)
}

async fn all(log: &EmbeddedLog) -> Result<Vec<Recorded>, ReadError> {
    let any = SubjectFilter::default();
    log.read(Position::ZERO, &any, usize::MAX).await
}
