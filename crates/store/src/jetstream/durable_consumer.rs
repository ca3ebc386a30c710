//! Durable consumers: the server remembers what was answered, and shares the deliveries out
//! among all processes that ask.
//!
//! One event is asked for at a time, and only when somebody waits for it. So nothing lies in a
//! process that is busy while another one has nothing to do, and no deadline runs before the work
//! begins.

use std::fmt;
use std::sync::{Arc, PoisonError};
use std::time::Duration;

use async_nats::jetstream::consumer::{AckPolicy, DeliverPolicy, pull};
use async_nats::jetstream::stream::ConsumerErrorKind;
use async_nats::{StatusCode, Subject, Subscriber};
use async_trait::async_trait;
use bytes::Bytes;
use daybook_events::log::{Consumer, ConsumerConfig, Delivery, ReadError, Reply};
use futures_util::StreamExt;
use tokio::sync::Mutex;
use tokio::time::Instant;

use super::connection::{Connection, LinkWatch};
use super::log::EventStreamHandle;
use super::pull::parse_delivery;
use super::read::recorded_from;

/// How long the server keeps a request for an event.
const EXPIRES: Duration = Duration::from_secs(30);
/// How often it says that it still does.
const HEARTBEAT: Duration = Duration::from_secs(2);

/// A durable consumer of the log.
pub(super) struct DurableConsumer {
    log: EventStreamHandle,
    config: ConsumerConfig,
    asking: Mutex<Option<Asking>>,
}

impl fmt::Debug for DurableConsumer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DurableConsumer")
            .field("name", &self.config.name)
            .finish_non_exhaustive()
    }
}

/// A subscription through which events come when they were asked for.
struct Asking {
    link: LinkWatch,
    inbox: Subject,
    messages: Subscriber,
    /// An event was asked for and has not been returned.
    pending: bool,
    /// When the last wait ended.
    left: LeftAt,
}

/// When somebody last stopped waiting, be it because he gave up.
#[derive(Clone)]
struct LeftAt(Arc<std::sync::Mutex<Instant>>);

impl LeftAt {
    fn now() -> Self {
        Self(Arc::new(std::sync::Mutex::new(Instant::now())))
    }

    fn elapsed(&self) -> Duration {
        self.0
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .elapsed()
    }
}

/// Notes the end of a wait.
struct Waiting(LeftAt);

impl Drop for Waiting {
    fn drop(&mut self) {
        *self.0.0.lock().unwrap_or_else(PoisonError::into_inner) = Instant::now();
    }
}

/// Why a wait came to nothing.
enum Setback {
    /// Ask again, through another subscription.
    Again(String),
    /// The consumer is not there, or nobody answers for it.
    NotThere,
}

/// Why there can be no such consumer.
fn objection(config: &ConsumerConfig) -> Option<&'static str> {
    let allowed = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
    let name = &config.name;
    if name.is_empty() || name.len() > 64 || !name.chars().all(allowed) {
        return Some("needs a name of 1 to 64 lowercase letters, digits and hyphens");
    }
    if config.max_deliver == 0 || config.max_in_flight == 0 || config.ack_wait.is_zero() {
        return Some("could deliver nothing: no attempts, no room, or no time for an answer");
    }
    None
}

impl DurableConsumer {
    pub(super) async fn open(
        log: EventStreamHandle,
        config: ConsumerConfig,
    ) -> Result<Self, ReadError> {
        if let Some(reason) = objection(&config) {
            let name = &config.name;
            return Err(ReadError::Invalid(format!(
                "the consumer {name:?} {reason}"
            )));
        }
        let consumer = Self {
            log,
            config,
            asking: Mutex::new(None),
        };
        // Say now what is wrong with it, rather than at the first delivery.
        let until = Instant::now() + 2 * consumer.log.connection.answer_timeout();
        loop {
            match consumer.register().await {
                Ok(()) => return Ok(consumer),
                Err(ReadError::Unavailable(_)) if Instant::now() < until => {
                    tokio::time::sleep(Duration::from_millis(50)).await;
                }
                Err(error) => return Err(error),
            }
        }
    }

    /// Creates the consumer on the server, or brings its settings up to date.
    async fn register(&self) -> Result<(), ReadError> {
        let config = &self.config;
        let wanted = pull::Config {
            durable_name: Some(config.name.clone()),
            deliver_policy: DeliverPolicy::All,
            ack_policy: AckPolicy::Explicit,
            ack_wait: config.ack_wait,
            max_deliver: i64::from(config.max_deliver),
            max_ack_pending: i64::try_from(config.max_in_flight).unwrap_or(i64::MAX),
            filter_subject: if config.filter.is_all() {
                String::new()
            } else {
                config.filter.to_nats()
            },
            ..Default::default()
        };
        match self.log.stream.create_consumer(wanted).await {
            Ok(_) => Ok(()),
            Err(error) => Err(match error.kind() {
                ConsumerErrorKind::JetStream(e) if e.code() == 400 => ReadError::Invalid(format!(
                    "the consumer {} cannot be set up like this: {e}; `nats consumer rm {} {}` \
                     makes room for a new one, which then starts from the first event",
                    config.name, self.log.name, config.name
                )),
                _ => ReadError::Unavailable(error.to_string()),
            }),
        }
    }

    /// Takes no round trip, so that waits which are given up early get somewhere, too.
    async fn begin(&self) -> Result<Asking, Setback> {
        let client = self.log.connection.client();
        let link = self.log.connection.watch();
        let inbox = Subject::from(client.new_inbox());
        let messages = client
            .subscribe(inbox.clone())
            .await
            .map_err(|error| Setback::Again(error.to_string()))?;
        Ok(Asking {
            link,
            inbox,
            messages,
            pending: false,
            left: LeftAt::now(),
        })
    }

    async fn wait(&self, asking: &mut Option<Asking>) -> Result<async_nats::Message, Setback> {
        let current = match asking {
            Some(current) => current,
            None => asking.insert(self.begin().await?),
        };
        // Much later than this, what has come in between may be somebody else's again.
        if current.pending && current.left.elapsed() > self.config.ack_wait / 2 {
            return Err(Setback::Again("nobody has waited for a while".to_owned()));
        }
        let _waiting = Waiting(current.left.clone());
        loop {
            if !current.pending {
                self.ask(current).await?;
            }
            let silence = 2 * HEARTBEAT + HEARTBEAT / 2;
            let message = tokio::select! {
                biased;
                message = current.messages.next() => message,
                () = current.link.lost() => {
                    return Err(Setback::Again("the connection was lost".to_owned()));
                }
                () = tokio::time::sleep(silence) => return Err(Setback::NotThere),
            };
            let message =
                message.ok_or_else(|| Setback::Again("the subscription ended".to_owned()))?;
            match message.status {
                None | Some(StatusCode::OK) => {
                    current.pending = false;
                    return Ok(message);
                }
                Some(StatusCode::IDLE_HEARTBEAT) => {}
                // The request has expired.
                Some(StatusCode::TIMEOUT) => current.pending = false,
                Some(StatusCode::NO_RESPONDERS) => return Err(Setback::NotThere),
                Some(status) => {
                    let text = message.description.as_deref().unwrap_or_default();
                    return Err(Setback::Again(format!("{status} {text}")));
                }
            }
        }
    }

    /// Asks for one event.
    async fn ask(&self, asking: &mut Asking) -> Result<(), Setback> {
        // Set before and not after: if this is given up in between, waiting for an event that was
        // not asked for ends with the silence; asking twice would fetch one that nobody wants.
        asking.pending = true;
        let subject = format!(
            "$JS.API.CONSUMER.MSG.NEXT.{}.{}",
            self.log.name, self.config.name
        );
        let request = format!(
            r#"{{"batch":1,"expires":{},"idle_heartbeat":{}}}"#,
            EXPIRES.as_nanos(),
            HEARTBEAT.as_nanos()
        );
        self.log
            .connection
            .client()
            .publish_with_reply(subject, asking.inbox.clone(), request.into())
            .await
            .map_err(|error| Setback::Again(error.to_string()))
    }

    fn delivery(&self, message: async_nats::Message) -> Result<Delivery, ReadError> {
        let (Some(reply), payload) = (message.reply, message.payload) else {
            return Err(ReadError::Unavailable("a message without reply".to_owned()));
        };
        let delivered = parse_delivery(&reply).ok_or_else(|| {
            ReadError::Unavailable(format!("a message says nothing of its delivery: {reply}"))
        })?;
        let recorded = recorded_from(
            delivered.sequence,
            &message.subject,
            delivered.stored_at,
            payload,
        )?;
        Ok(Delivery {
            recorded,
            attempt: delivered.attempt,
            is_last: delivered.attempt >= self.config.max_deliver,
            reply: Box::new(JetStreamReply {
                connection: self.log.connection.clone(),
                subject: reply,
            }),
        })
    }
}

#[async_trait]
impl Consumer for DurableConsumer {
    /// Cancel-safe: what has come and was not returned is returned by the next call, unless that
    /// comes so late that the event has to be delivered again.
    async fn next(&self) -> Result<Delivery, ReadError> {
        let mut asking = self.asking.lock().await;
        let mut pause = Duration::from_millis(10);
        loop {
            let setback = match self.wait(&mut asking).await {
                Ok(message) => return self.delivery(message),
                Err(setback) => setback,
            };
            *asking = None;
            match setback {
                Setback::Again(reason) => {
                    tracing::debug!(reason, consumer = self.config.name, "asking again");
                }
                Setback::NotThere => match self.register().await {
                    Ok(()) => tracing::info!(consumer = self.config.name, "set up again"),
                    Err(ReadError::Unavailable(reason)) => {
                        tracing::debug!(reason, consumer = self.config.name, "not available");
                    }
                    Err(error) => return Err(error),
                },
            }
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(Duration::from_secs(1));
        }
    }
}

/// Answers one delivery.
#[derive(Debug)]
struct JetStreamReply {
    connection: Connection,
    subject: Subject,
}

impl JetStreamReply {
    /// Sends an answer and waits until the server has taken it.
    async fn answer(&self, answer: Bytes) -> Result<(), ReadError> {
        let mut link = self.connection.watch();
        let sent = self
            .connection
            .client()
            .request(self.subject.clone(), answer);
        tokio::select! {
            biased;
            taken = sent => match taken {
                Ok(_) => Ok(()),
                Err(error) => Err(ReadError::Unavailable(error.to_string())),
            },
            () = link.lost() => Err(ReadError::Unavailable(
                "the connection to NATS was lost before the answer was taken".to_owned(),
            )),
        }
    }
}

#[async_trait]
impl Reply for JetStreamReply {
    async fn ack(&self) -> Result<(), ReadError> {
        self.answer(Bytes::from_static(b"+ACK")).await
    }

    async fn nak(&self, delay: Duration) -> Result<(), ReadError> {
        let answer = if delay.is_zero() {
            Bytes::from_static(b"-NAK")
        } else {
            Bytes::from(format!(r#"-NAK {{"delay": {}}}"#, delay.as_nanos()))
        };
        self.answer(answer).await
    }

    async fn progress(&self) -> Result<(), ReadError> {
        self.answer(Bytes::from_static(b"+WPI")).await
    }

    async fn term(&self) -> Result<(), ReadError> {
        self.answer(Bytes::from_static(b"+TERM")).await
    }
}
