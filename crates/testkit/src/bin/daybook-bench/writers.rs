//! Writers that append as Daybook does: each owns some aggregates, knows the last position of
//! each, and waits for one acknowledgement before it sends the next event.

use std::future::Future;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use daybook_events::log::{Append, EventLog, Expected};
use daybook_events::{DeploymentId, EnvironmentName, EventId, Position, ProjectName, Subject};
use tokio::task::JoinSet;
use uuid::Uuid;

use crate::Failure;

/// One side of a comparison.
pub(crate) trait Side: Send + Sync + 'static {
    /// An aggregate, in the form in which this side wants it.
    type Aggregate: Send + 'static;

    /// Prepares an aggregate for the run, outside of what is measured.
    fn aggregate(&self, subject: &Subject) -> Self::Aggregate;

    /// Appends one event after the given last position of its aggregate, and returns its own.
    fn append(
        &self,
        aggregate: &Self::Aggregate,
        id: EventId,
        last: Position,
        bytes: Bytes,
    ) -> impl Future<Output = Result<Position, Failure>> + Send;
}

/// The log of Daybook as a side.
#[derive(Debug)]
pub(crate) struct Log(pub(crate) Arc<dyn EventLog>);

impl Side for Log {
    type Aggregate = Subject;

    fn aggregate(&self, subject: &Subject) -> Subject {
        subject.clone()
    }

    async fn append(
        &self,
        aggregate: &Subject,
        id: EventId,
        last: Position,
        bytes: Bytes,
    ) -> Result<Position, Failure> {
        let append = Append {
            subject: aggregate.clone(),
            id,
            expected: Expected::Last(last),
            bytes,
        };
        Ok(self.0.append(append).await?.position)
    }
}

/// A side with its aggregates, each of which has its first event already.
pub(crate) struct Prepared<S: Side> {
    side: Arc<S>,
    aggregates: Vec<(S::Aggregate, Position)>,
    template: Arc<Template>,
}

impl<S: Side> Prepared<S> {
    /// Appends the first event of each of so many aggregates.
    pub(crate) async fn new(side: S, aggregates: usize, bytes: usize) -> Result<Self, Failure> {
        let project = ProjectName::parse("bench")?;
        let environment = EnvironmentName::parse("production")?;
        let aggregates = (0..aggregates)
            .map(|_| {
                let id = DeploymentId(Uuid::now_v7());
                let subject = Subject::Deployment(project.clone(), environment.clone(), id);
                (side.aggregate(&subject), Position::ZERO)
            })
            .collect();
        let mut prepared = Self {
            side: Arc::new(side),
            aggregates,
            template: Arc::new(Template::new(bytes)?),
        };
        prepared.run(64, Until::EachOnce).await?;
        Ok(prepared)
    }

    /// The side.
    pub(crate) fn side(&self) -> &S {
        &self.side
    }

    /// Lets so many writers append for a while; returns how many events a second were
    /// acknowledged.
    pub(crate) async fn events_per_second(
        &mut self,
        writers: usize,
        duration: Duration,
    ) -> Result<f64, Failure> {
        let start = Instant::now();
        let events = self.run(writers, Until::Time(start + duration)).await?;
        Ok(events as f64 / start.elapsed().as_secs_f64())
    }

    async fn run(&mut self, writers: usize, until: Until) -> Result<usize, Failure> {
        let mut shares: Vec<Vec<_>> = (0..writers).map(|_| Vec::new()).collect();
        for (number, aggregate) in self.aggregates.drain(..).enumerate() {
            shares[number % writers].push(aggregate);
        }
        let mut tasks = JoinSet::new();
        for share in shares {
            let (side, template) = (Arc::clone(&self.side), Arc::clone(&self.template));
            tasks.spawn(write(side, template, share, until));
        }
        let mut events = 0;
        while let Some(ended) = tasks.join_next().await {
            let (share, written) = ended??;
            self.aggregates.extend(share);
            events += written;
        }
        Ok(events)
    }
}

#[derive(Debug, Clone, Copy)]
enum Until {
    /// Each aggregate has got one event.
    EachOnce,
    /// It is so late.
    Time(Instant),
}

type Share<S> = Vec<(<S as Side>::Aggregate, Position)>;

async fn write<S: Side>(
    side: Arc<S>,
    template: Arc<Template>,
    mut share: Share<S>,
    until: Until,
) -> Result<(Share<S>, usize), Failure> {
    let mut written = 0;
    'all: loop {
        for (aggregate, last) in &mut share {
            if matches!(until, Until::Time(end) if Instant::now() >= end) {
                break 'all;
            }
            let id = EventId(Uuid::now_v7());
            *last = side
                .append(aggregate, id, *last, template.event(id))
                .await?;
            written += 1;
        }
        if matches!(until, Until::EachOnce) || share.is_empty() {
            break;
        }
    }
    Ok((share, written))
}

/// Events of exactly the wanted size that differ in their ids. Their payload is made of random
/// hexadecimal digits, so that a side that compresses gains no more than on real digests.
#[derive(Debug)]
struct Template {
    bytes: Vec<u8>,
    id_at: usize,
}

impl Template {
    fn new(size: usize) -> Result<Self, Failure> {
        let placeholder = Uuid::nil().to_string();
        let head = format!(
            r#"{{"specversion":"1.0","id":"{placeholder}","source":"/projects/bench","type":"dev.daybook.deployment.status_observed.v1","datacontenttype":"application/json","data":{{"digest":""#
        );
        let tail = r#""}}"#;
        let filling = size
            .checked_sub(head.len() + tail.len())
            .ok_or_else(|| format!("an event has at least {} bytes", head.len() + tail.len()))?;
        let mut digits = String::new();
        while digits.len() < filling {
            digits.push_str(&Uuid::now_v7().simple().to_string()[16..]);
        }
        let id_at = head.find(&placeholder).unwrap_or_default();
        let bytes = [
            head.as_bytes(),
            &digits.as_bytes()[..filling],
            tail.as_bytes(),
        ]
        .concat();
        Ok(Self { bytes, id_at })
    }

    fn event(&self, id: EventId) -> Bytes {
        let mut bytes = self.bytes.clone();
        id.0.hyphenated().encode_lower(&mut bytes[self.id_at..]);
        Bytes::from(bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_event_has_its_size_and_its_id() {
        let id = EventId(Uuid::now_v7());
        let event = Template::new(1024).unwrap().event(id);
        assert_eq!(event.len(), 1024);
        let json: serde_json::Value = serde_json::from_slice(&event).unwrap();
        assert_eq!(json["id"], id.0.to_string());
    }
}
