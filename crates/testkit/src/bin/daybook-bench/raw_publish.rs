//! The yardstick of the log over JetStream: what a program does that talks to the server itself.
//! The same stream settings, headers, bytes and number in flight; only the library in between is
//! missing.

use async_nats::header::{
    HeaderMap, HeaderValue, NATS_EXPECTED_LAST_SUBJECT_SEQUENCE, NATS_MESSAGE_ID,
};
use async_nats::jetstream::message::StreamMessage;
use async_nats::jetstream::{self, stream};
use bytes::Bytes;
use daybook_events::subject::PREFIX;
use daybook_events::{EventId, Position, Subject};

use crate::Failure;
use crate::logs;
use crate::writers::Side;

/// The prefix of the yardstick's subjects, as long as the log's.
const RAW_PREFIX: &str = "rawbook.ev";
const RAW_STREAM: &str = "RAWBOOK";

/// A stream beside the log's, on the same server.
#[derive(Debug)]
pub(crate) struct RawPublish {
    jetstream: jetstream::Context,
    log_stream: String,
    /// Headers that the log puts on every event.
    constant_headers: HeaderMap,
}

impl RawPublish {
    /// Makes a stream with the settings of the log's own, for subjects that are as long. The log
    /// must have an event already, whose headers are taken over.
    pub(crate) async fn beside_the_log(url: &str) -> Result<Self, Failure> {
        assert_eq!(RAW_PREFIX.len(), PREFIX.len());
        let jetstream = jetstream::new(async_nats::connect(url).await?);
        let log_stream = jetstream.stream_by_subject(logs::ANY_SUBJECT).await?;
        let log = jetstream.get_stream(&log_stream).await?;
        let mut config: stream::Config = log.cached_info().config.clone();
        config.name = RAW_STREAM.into();
        for subject in &mut config.subjects {
            *subject = subject.replacen(PREFIX, RAW_PREFIX, 1);
        }
        jetstream.create_stream(config).await?;
        let own = [NATS_MESSAGE_ID, NATS_EXPECTED_LAST_SUBJECT_SEQUENCE];
        let mut constant_headers = HeaderMap::new();
        for (name, values) in last_message(&log).await?.headers.iter() {
            for value in values.iter().filter(|_| !own.contains(name)) {
                constant_headers.append(name.clone(), value.clone());
            }
        }
        Ok(Self {
            jetstream,
            log_stream,
            constant_headers,
        })
    }

    /// It is an error if what the two sides stored differs in anything but ids and positions.
    pub(crate) async fn sends_what_the_log_sends(&self) -> Result<(), Failure> {
        let [log, raw] = [self.log_stream.as_str(), RAW_STREAM].map(|name| self.last(name));
        let (log, raw) = (log.await?, raw.await?);
        if log == raw {
            return Ok(());
        }
        Err(format!("the sides are not alike: the log sends {log:?}, the yardstick {raw:?}").into())
    }

    async fn last(&self, stream: &str) -> Result<Sent, Failure> {
        let message = last_message(&self.jetstream.get_stream(stream).await?).await?;
        let mut headers: Vec<String> = message.headers.iter().map(|(n, _)| n.to_string()).collect();
        headers.sort();
        Ok(Sent {
            headers,
            subject_length: message.subject.len(),
            payload_length: message.payload.len(),
        })
    }
}

async fn last_message(stream: &stream::Stream) -> Result<StreamMessage, Failure> {
    let last = stream.get_info().await?.state.last_sequence;
    Ok(stream.get_raw_message(last).await?)
}

/// What of a message must be the same on both sides.
#[derive(Debug, PartialEq, Eq)]
struct Sent {
    headers: Vec<String>,
    subject_length: usize,
    payload_length: usize,
}

impl Side for RawPublish {
    type Aggregate = String;

    fn aggregate(&self, subject: &Subject) -> String {
        subject.to_string().replacen(PREFIX, RAW_PREFIX, 1)
    }

    async fn append(
        &self,
        subject: &String,
        id: EventId,
        last: Position,
        bytes: Bytes,
    ) -> Result<Position, Failure> {
        let mut headers = self.constant_headers.clone();
        headers.insert(NATS_MESSAGE_ID, id.0.to_string());
        headers.insert(
            NATS_EXPECTED_LAST_SUBJECT_SEQUENCE,
            HeaderValue::from(last.0),
        );
        let sent = self
            .jetstream
            .publish_with_headers(subject.clone(), headers, bytes)
            .await?;
        Ok(Position(sent.await?.sequence))
    }
}
