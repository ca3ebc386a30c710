//! A stream beside the log, for what is made from it and wanted by others on NATS.

use std::fmt;
use std::time::Duration;

use async_nats::header::NATS_MESSAGE_ID;
use async_nats::jetstream::stream::{LastRawMessageErrorKind, Stream};
use bytes::Bytes;
use daybook_events::envelope::MEDIA_TYPE;

use super::connection::Connection;
use super::publish::{Outgoing, PublishFailure, Publisher};
use super::stream_setup::{self, OpenError, StreamSetup};

/// How the stream is to be. The retention is only used when it is created.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BulletinOptions {
    /// Name of the stream.
    pub stream: String,
    /// What every subject of it starts with.
    pub prefix: String,
    /// On how many servers each message is kept; 1, 3 or 5.
    pub replicas: usize,
    /// Messages older than this go.
    pub max_age: Duration,
    /// When all messages together have more bytes, the oldest go.
    pub max_bytes: u64,
}

impl BulletinOptions {
    /// The stream of CDEvents: a week of them, and at most 256 MiB.
    pub fn cdevents(replicas: usize) -> Self {
        Self {
            stream: "DAYBOOK_CDEVENTS".to_owned(),
            prefix: "daybook.cdevents".to_owned(),
            replicas,
            max_age: Duration::from_hours(24 * 7),
            max_bytes: 256 << 20,
        }
    }
}

/// Why something was not published. Trying again may help.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("it was not published: {0}")]
pub struct NotPublished(String);

/// The stream.
pub struct JetStreamBulletin {
    publisher: Publisher,
    prefix: String,
    stream: Stream<()>,
}

impl fmt::Debug for JetStreamBulletin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("JetStreamBulletin")
            .field("prefix", &self.prefix)
            .finish_non_exhaustive()
    }
}

impl JetStreamBulletin {
    /// Opens the stream, creating it if there is none.
    pub async fn open(
        connection: Connection,
        options: &BulletinOptions,
    ) -> Result<Self, OpenError> {
        let opened = stream_setup::open(&connection, &StreamSetup::bulletin(options)).await?;
        for note in &opened.notes {
            tracing::info!("{note}");
        }
        Ok(Self {
            publisher: Publisher::new(connection, opened.stream.clone()),
            prefix: options.prefix.clone(),
            stream: opened.stream,
        })
    }

    /// Publishes a CloudEvent under the prefix. One that has the id of an earlier one, of the last
    /// two minutes at least, is not stored again. With `again`, one that is the last of the stream
    /// is not stored again either, however long ago that was.
    pub async fn publish(
        &self,
        place: &str,
        id: &str,
        event: Bytes,
        again: bool,
    ) -> Result<(), NotPublished> {
        if again && self.last_id().await?.as_deref() == Some(id) {
            return Ok(());
        }
        let message = Outgoing {
            subject: format!("{}.{place}", self.prefix).into(),
            id: id.to_owned(),
            expected: None,
            content_type: MEDIA_TYPE,
            headers: Vec::new(),
            payload: event,
        };
        match self.publisher.publish(&message).await {
            Ok(_) => Ok(()),
            Err(PublishFailure::TooLarge) => {
                // It would be too large the next time, too.
                tracing::error!(id, "a message is larger than NATS takes, and is left out");
                Ok(())
            }
            Err(PublishFailure::Conflict { .. }) => Err(NotPublished("a conflict".into())),
            Err(
                PublishFailure::Refused(why)
                | PublishFailure::Unknown(why)
                | PublishFailure::Hopeless(why),
            ) => Err(NotPublished(why)),
        }
    }

    /// The id of the last message of the stream.
    async fn last_id(&self) -> Result<Option<String>, NotPublished> {
        let all = format!("{}.>", self.prefix);
        match self.stream.get_last_raw_message_by_subject(&all).await {
            Ok(last) => {
                let id = last.headers.get(NATS_MESSAGE_ID);
                Ok(id.map(|id| id.as_str().to_owned()))
            }
            Err(e) if e.kind() == LastRawMessageErrorKind::NoMessageFound => Ok(None),
            Err(e) => Err(NotPublished(format!(
                "what was published last cannot be read: {e}"
            ))),
        }
    }
}
