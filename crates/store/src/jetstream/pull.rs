//! Reading many messages of a stream in order, fast: a short-lived consumer of which nothing is
//! acknowledged, asked for large batches, the next one before the last has run out.
//!
//! It holds as long as nothing goes wrong. When the connection is lost, the consumer vanishes or
//! a message is missing, it says [`Broken`], and whoever reads opens another one after the last
//! message that he has seen.

use std::time::Duration;

use async_nats::jetstream::consumer::{AckPolicy, Consumer, DeliverPolicy, pull};
use async_nats::jetstream::stream::Stream;
use async_nats::{StatusCode, Subject, Subscriber};
use bytes::Bytes;
use futures_util::{FutureExt, StreamExt};

use super::connection::{Connection, LinkWatch};

/// The most messages that are asked for and have not come yet.
pub(crate) const MOST_OUTSTANDING: usize = 10_000;
const LARGEST_BATCH: usize = 5_000;
/// A batch should not have many more bytes than this.
const BATCH_BYTES: usize = 16 * 1024 * 1024;

/// How long the server keeps a request for messages.
const EXPIRES: Duration = Duration::from_secs(30);
/// How often the server says that it still knows of the request when it has no messages.
const HEARTBEAT: Duration = Duration::from_secs(2);
/// How long the server keeps a consumer that nobody asks.
const KEPT_UNASKED: Duration = Duration::from_secs(60);

/// Which messages are read.
#[derive(Debug, Clone)]
pub(crate) struct Wanted {
    /// Only those after this sequence.
    pub(crate) after: u64,
    /// Only those on subjects that this one matches; empty for all.
    pub(crate) filter: String,
    /// How many at most; the reader then asks for no more than these.
    pub(crate) limit: Option<usize>,
    /// How many bytes a message may have, at most.
    pub(crate) largest: usize,
}

/// One message, with what the server says of its delivery.
#[derive(Debug)]
pub(crate) struct Pulled {
    pub(crate) message: async_nats::Message,
    /// Its place in the stream.
    pub(crate) sequence: u64,
    /// When the stream stored it, in nanoseconds since 1970.
    pub(crate) stored_at: i128,
}

/// The reader can read no further and has to be opened again.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Broken(pub(crate) String);

/// An open reader.
#[derive(Debug)]
pub(crate) struct Puller {
    connection: Connection,
    link: LinkWatch,
    consumer: Consumer<pull::Config>,
    stream: String,
    inbox: Subject,
    messages: Subscriber,
    /// Asked for and not yet come.
    outstanding: usize,
    /// How many more may be asked for.
    allowance: Option<usize>,
    /// The consumer's number of the last message; numbers without gap mean that none was lost.
    delivered: u64,
    bytes_seen: usize,
    largest: usize,
}

impl Puller {
    /// Opens a reader.
    pub(crate) async fn open(
        connection: &Connection,
        stream: &Stream<()>,
        stream_name: &str,
        wanted: &Wanted,
    ) -> Result<Self, Broken> {
        let link = connection.watch();
        let config = pull::Config {
            deliver_policy: DeliverPolicy::ByStartSequence {
                start_sequence: wanted.after.saturating_add(1),
            },
            ack_policy: AckPolicy::None,
            filter_subject: wanted.filter.clone(),
            inactive_threshold: KEPT_UNASKED,
            num_replicas: 1,
            memory_storage: true,
            ..Default::default()
        };
        let inbox = Subject::from(connection.client().new_inbox());
        let messages = connection
            .client()
            .subscribe(inbox.clone())
            .await
            .map_err(broken)?;
        let consumer = stream.create_consumer(config).await.map_err(broken)?;
        Ok(Self {
            connection: connection.clone(),
            link,
            consumer,
            stream: stream_name.to_owned(),
            inbox,
            messages,
            outstanding: 0,
            allowance: wanted.limit,
            delivered: 0,
            bytes_seen: 0,
            largest: wanted.largest,
        })
    }

    /// The next message; waits until there is one.
    pub(crate) async fn next(&mut self) -> Result<Pulled, Broken> {
        loop {
            self.keep_asking().await?;
            // Most messages are here already; a timer for each would cost more than they do.
            let message = match self.messages.next().now_or_never() {
                Some(message) => message,
                None => self.wait().await?,
            };
            let message = message.ok_or_else(|| Broken("the subscription has ended".into()))?;
            match message.status {
                None | Some(StatusCode::OK) => return self.take(message),
                Some(status) => self.note_status(status, &message)?,
            }
        }
    }

    async fn wait(&mut self) -> Result<Option<async_nats::Message>, Broken> {
        tokio::select! {
            biased;
            message = self.messages.next() => Ok(message),
            () = self.link.lost() => Err(Broken("the connection to NATS was lost".into())),
            () = tokio::time::sleep(2 * HEARTBEAT + HEARTBEAT / 2) => {
                Err(Broken("the server is silent".into()))
            }
        }
    }

    fn take(&mut self, message: async_nats::Message) -> Result<Pulled, Broken> {
        let delivery = message
            .reply
            .as_deref()
            .and_then(parse_delivery)
            .ok_or_else(|| Broken("a message says nothing of its delivery".into()))?;
        if delivery.number != self.delivered + 1 {
            return Err(Broken(format!(
                "delivery {} came after delivery {}",
                delivery.number, self.delivered
            )));
        }
        self.delivered = delivery.number;
        self.outstanding = self.outstanding.saturating_sub(1);
        self.bytes_seen += message.length;
        Ok(Pulled {
            message,
            sequence: delivery.sequence,
            stored_at: delivery.stored_at,
        })
    }

    fn note_status(
        &mut self,
        status: StatusCode,
        message: &async_nats::Message,
    ) -> Result<(), Broken> {
        match status {
            StatusCode::IDLE_HEARTBEAT => Ok(()),
            // A request has expired with so many messages still to come.
            StatusCode::TIMEOUT => {
                let unserved = message
                    .headers
                    .as_ref()
                    .and_then(|headers| headers.get("Nats-Pending-Messages"))
                    .and_then(|value| value.as_str().parse().ok())
                    .unwrap_or(self.outstanding);
                self.outstanding = self.outstanding.saturating_sub(unserved);
                if let Some(allowance) = &mut self.allowance {
                    *allowance += unserved;
                }
                Ok(())
            }
            status => Err(Broken(format!(
                "the server ends the delivery: {status} {}",
                message.description.as_deref().unwrap_or_default()
            ))),
        }
    }

    /// Asks for more when half of what was asked for has come.
    async fn keep_asking(&mut self) -> Result<(), Broken> {
        let batch = self.batch();
        if self.outstanding > batch / 2 {
            return Ok(());
        }
        let batch = batch.min(self.allowance.unwrap_or(usize::MAX));
        if batch == 0 {
            return Ok(());
        }
        let request = pull::BatchConfig {
            batch,
            expires: Some(EXPIRES),
            idle_heartbeat: HEARTBEAT,
            ..Default::default()
        };
        self.consumer
            .request_batch(request, self.inbox.clone())
            .await
            .map_err(broken)?;
        self.outstanding += batch;
        if let Some(allowance) = &mut self.allowance {
            *allowance -= batch;
        }
        Ok(())
    }

    /// How many messages to ask for: many, unless they are large.
    fn batch(&self) -> usize {
        let size = match self.delivered {
            0 => self.largest,
            delivered => self.bytes_seen / delivered as usize,
        };
        (BATCH_BYTES / size.max(1)).clamp(BATCH_BYTES / self.largest, LARGEST_BATCH)
    }
}

impl Drop for Puller {
    /// Lets the server forget the consumer now; otherwise it does so by itself after a while.
    fn drop(&mut self) {
        let api = format!(
            "$JS.API.CONSUMER.DELETE.{}.{}",
            self.stream,
            self.consumer.cached_info().name
        );
        let client = self.connection.client();
        let nobody = client.new_inbox();
        let _ = client
            .publish_with_reply(api, nobody, Bytes::new())
            .now_or_never();
    }
}

fn broken(error: impl std::fmt::Display) -> Broken {
    Broken(error.to_string())
}

/// What the reply subject of a delivered message says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Delivered {
    /// How often this message was delivered by this consumer, this time included.
    pub(crate) attempt: u32,
    /// The message's place in the stream.
    pub(crate) sequence: u64,
    /// Its number among the consumer's deliveries, from 1.
    pub(crate) number: u64,
    /// When the stream stored it, in nanoseconds since 1970.
    pub(crate) stored_at: i128,
}

/// Reads `$JS.ACK.<stream>.<consumer>.<attempt>.<sequence>.<number>.<time>.<pending>`, or the
/// longer form with domain and account before the stream (and a token after the end).
pub(crate) fn parse_delivery(reply: &str) -> Option<Delivered> {
    let rest = reply.strip_prefix("$JS.ACK.")?;
    let dots = rest.bytes().filter(|b| *b == b'.').count();
    let mut tokens = rest.split('.').skip(if dots >= 8 { 4 } else { 2 });
    let attempt = tokens.next()?.parse().ok()?;
    let sequence = tokens.next()?.parse().ok()?;
    let number = tokens.next()?.parse().ok()?;
    let stored_at: i64 = tokens.next()?.parse().ok()?;
    Some(Delivered {
        attempt,
        sequence,
        number,
        stored_at: stored_at.into(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_forms_of_a_reply_subject_are_read() {
        let expected = Some(Delivered {
            attempt: 3,
            sequence: 100,
            number: 7,
            stored_at: 1_790_230_470_084_404_000,
        });
        let times = "3.100.7.1790230470084404000.42";
        for reply in [
            format!("$JS.ACK.DAYBOOK.worker.{times}"),
            format!("$JS.ACK._.hash.DAYBOOK.worker.{times}"),
            format!("$JS.ACK.hub.hash.DAYBOOK.worker.{times}.token"),
        ] {
            assert_eq!(parse_delivery(&reply), expected, "{reply}");
        }
        for reply in ["", "_INBOX.x.y", "$JS.ACK.S.C.1.x.3.4.5", "$JS.ACK.S.C.1"] {
            assert_eq!(parse_delivery(reply), None, "{reply}");
        }
    }
}
