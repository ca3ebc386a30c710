//! Storing one message in a stream, once, whatever happens on the way.
//!
//! A publish carries a message id and, mostly, the sequence that its subject must end with. If no
//! acknowledgement comes, the message may or may not have been stored; then the stream is asked,
//! and the same message, with the same id, is sent again, until it is known or time is up.

use std::time::Duration;

use async_nats::jetstream::message::StreamMessage;
use async_nats::jetstream::stream::{RawMessageError, RawMessageErrorKind, Stream};
use async_nats::{HeaderMap, HeaderValue, Request, RequestErrorKind, Subject, header};
use bytes::Bytes;
use serde::Deserialize;
use tokio::time::Instant;

use super::connection::Connection;

/// How often one who waits for an acknowledgement looks whether it can still come.
const LOOK_AFTER: Duration = Duration::from_millis(100);

/// Header of the media type.
const CONTENT_TYPE: &str = "Content-Type";

/// One message on its way into a stream.
#[derive(Debug, Clone)]
pub(crate) struct Outgoing {
    pub(crate) subject: Subject,
    /// By which the stream recognises a repetition.
    pub(crate) id: String,
    /// The sequence of the last message of this subject, 0 for none.
    pub(crate) expected: Option<u64>,
    pub(crate) content_type: &'static str,
    /// Further headers.
    pub(crate) headers: Vec<(&'static str, String)>,
    pub(crate) payload: Bytes,
}

/// A message that is stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Stored {
    pub(crate) sequence: u64,
    /// It had been stored before.
    pub(crate) duplicate: bool,
}

/// Why a message is not, or perhaps not, stored.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum PublishFailure {
    /// The subject ends with another message than expected, and not with ours.
    Conflict { actual: Option<u64> },
    /// It is certainly not stored; it may be later.
    Refused(String),
    /// It is not known whether it is stored.
    Unknown(String),
    /// It is not stored, and never will be.
    Hopeless(String),
    /// It is larger than the stream takes.
    TooLarge,
}

/// What one attempt came to.
enum Attempt {
    Stored(Stored),
    Conflict {
        actual: Option<u64>,
    },
    /// Certainly not stored, and soon it may be.
    NotNow(String),
    /// Sent, but nothing is known.
    NoAnswer(String),
    Failed(PublishFailure),
}

/// The answer of a stream to a publish.
#[derive(Debug, Deserialize)]
struct Answer {
    #[serde(default)]
    seq: u64,
    #[serde(default)]
    duplicate: bool,
    error: Option<AnswerError>,
}

#[derive(Debug, Deserialize)]
struct AnswerError {
    #[serde(default)]
    err_code: u64,
    #[serde(default)]
    description: String,
}

/// Publishes to one stream.
#[derive(Debug, Clone)]
pub(crate) struct Publisher {
    connection: Connection,
    stream: Stream<()>,
}

impl Publisher {
    pub(crate) fn new(connection: Connection, stream: Stream<()>) -> Self {
        Self { connection, stream }
    }

    /// Stores a message. Takes at most about four times the answer timeout.
    pub(crate) async fn publish(&self, message: &Outgoing) -> Result<Stored, PublishFailure> {
        // Nothing but the publish itself on the way that is nearly always taken; the others are
        // boxed, so that they do not make every append carry their state.
        match self.attempt(message).await {
            Attempt::Stored(stored) => Ok(stored),
            Attempt::Failed(failure) => Err(failure),
            Attempt::Conflict { actual } => {
                Box::pin(self.after_conflict(message, actual, false)).await
            }
            Attempt::NotNow(reason) => Box::pin(self.try_again(message, false, reason)).await,
            Attempt::NoAnswer(reason) => Box::pin(self.try_again(message, true, reason)).await,
        }
    }

    async fn try_again(
        &self,
        message: &Outgoing,
        mut may_be_stored: bool,
        mut reason: String,
    ) -> Result<Stored, PublishFailure> {
        let until = Instant::now() + 2 * self.connection.answer_timeout();
        let mut pause = Duration::from_millis(20);
        while Instant::now() < until {
            if !self.connection.wait_until_up().await {
                reason = "the connection to NATS is down".to_owned();
                continue;
            }
            if may_be_stored {
                match self.find(message).await {
                    Ok(Found {
                        own: Some(sequence),
                        ..
                    }) => {
                        return Ok(Stored {
                            sequence,
                            duplicate: true,
                        });
                    }
                    Ok(_) => {}
                    Err(why) => {
                        reason = why;
                        tokio::time::sleep(pause).await;
                        continue;
                    }
                }
            }
            match self.attempt(message).await {
                Attempt::Stored(stored) => return Ok(stored),
                Attempt::Conflict { actual } => {
                    return self.after_conflict(message, actual, may_be_stored).await;
                }
                Attempt::Failed(failure) if !may_be_stored => return Err(failure),
                Attempt::Failed(failure) => {
                    return Err(PublishFailure::Unknown(format!("{failure:?}")));
                }
                Attempt::NotNow(why) => reason = why,
                Attempt::NoAnswer(why) => {
                    may_be_stored = true;
                    reason = why;
                }
            }
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(Duration::from_millis(500));
        }
        Err(if may_be_stored {
            PublishFailure::Unknown(reason)
        } else {
            PublishFailure::Refused(reason)
        })
    }

    async fn attempt(&self, message: &Outgoing) -> Attempt {
        let turns = self.connection.turns();
        if !self.connection.is_up() {
            return Attempt::NotNow("the connection to NATS is down".to_owned());
        }
        let request = Request::new()
            .headers(headers_of(message))
            .payload(message.payload.clone())
            .timeout(None);
        let sent = self
            .connection
            .client()
            .send_request(message.subject.clone(), request);
        let mut sent = std::pin::pin!(sent);
        let began = Instant::now();
        let answer = loop {
            // Between these looks nothing is done but waiting: no append pays for being told.
            match tokio::time::timeout(LOOK_AFTER, &mut sent).await {
                Ok(answer) => break answer,
                Err(_) if self.connection.turns() != turns => {
                    return Attempt::NoAnswer(
                        "the connection to NATS was lost before the acknowledgement came"
                            .to_owned(),
                    );
                }
                Err(_) if began.elapsed() >= self.connection.answer_timeout() => {
                    return Attempt::NoAnswer(format!(
                        "no acknowledgement came within {:?}",
                        self.connection.answer_timeout()
                    ));
                }
                Err(_) => {}
            }
        };
        let error = match answer {
            Ok(answer) => return read_answer(&answer.payload),
            Err(error) => error,
        };
        match error.kind() {
            RequestErrorKind::NoResponders => {
                Attempt::NotNow("no server answers for the stream at the moment".to_owned())
            }
            RequestErrorKind::InvalidSubject => Attempt::Failed(PublishFailure::Hopeless(format!(
                "{:?} is no subject to publish to",
                message.subject
            ))),
            RequestErrorKind::MaxPayloadExceeded => Attempt::Failed(PublishFailure::TooLarge),
            RequestErrorKind::TimedOut | RequestErrorKind::Other => {
                Attempt::NoAnswer(error.to_string())
            }
        }
    }

    /// The expectation was wrong: perhaps because this very message is there already. Servers
    /// from 2.12 on check the expectation before the message id.
    async fn after_conflict(
        &self,
        message: &Outgoing,
        actual: Option<u64>,
        may_be_stored: bool,
    ) -> Result<Stored, PublishFailure> {
        let asked = Instant::now();
        let patience = self.connection.answer_timeout() / 2;
        loop {
            let found = self.find(message).await.map_err(PublishFailure::Unknown)?;
            if let Some(sequence) = found.own {
                return Ok(Stored {
                    sequence,
                    duplicate: true,
                });
            }
            // An attempt of ours may be what is in the way, and not yet to be seen.
            if !may_be_stored || asked.elapsed() > patience {
                return Err(PublishFailure::Conflict {
                    actual: Some(found.last.max(actual.unwrap_or(0))),
                });
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    /// Looks for a message by its id, where it can be: last of its subject, or first after the
    /// one that was expected to be the last.
    async fn find(&self, message: &Outgoing) -> Result<Found, String> {
        let last = self
            .stream
            .raw_message_builder()
            .last_by_subject(message.subject.as_str());
        let Some(last) = or_none(last.send().await)? else {
            return Ok(Found { own: None, last: 0 });
        };
        let own = |found: &StreamMessage| has_id(&found.headers, &message.id);
        let mut found = Found {
            own: own(&last).then_some(last.sequence),
            last: last.sequence,
        };
        if let Some(expected) = message.expected
            && found.own.is_none()
            && expected < last.sequence
        {
            let next = self
                .stream
                .raw_message_builder()
                .sequence(expected + 1)
                .next_by_subject(message.subject.as_str());
            let next = or_none(next.send().await)?;
            found.own = next.filter(own).map(|next| next.sequence);
        }
        Ok(found)
    }
}

/// What the stream says of a message that may be in it.
struct Found {
    /// Where it is.
    own: Option<u64>,
    /// The last message of its subject.
    last: u64,
}

fn or_none(found: Result<StreamMessage, RawMessageError>) -> Result<Option<StreamMessage>, String> {
    match found {
        Ok(message) => Ok(Some(message)),
        Err(error) if error.kind() == RawMessageErrorKind::NoMessageFound => Ok(None),
        Err(error) => Err(error.to_string()),
    }
}

fn headers_of(message: &Outgoing) -> HeaderMap {
    let mut headers = HeaderMap::new();
    headers.insert(header::NATS_MESSAGE_ID, message.id.as_str());
    if let Some(expected) = message.expected {
        headers.insert(
            header::NATS_EXPECTED_LAST_SUBJECT_SEQUENCE,
            HeaderValue::from(expected),
        );
    }
    headers.insert(CONTENT_TYPE, message.content_type);
    for (name, value) in &message.headers {
        headers.insert(*name, value.as_str());
    }
    headers
}

fn has_id(headers: &HeaderMap, id: &str) -> bool {
    headers
        .get(header::NATS_MESSAGE_ID)
        .is_some_and(|value| value.as_str() == id)
}

/// Codes of nats-server's `errors.json`.
mod code {
    pub(super) const WRONG_LAST_SEQUENCE: u64 = 10071;
    pub(super) const WRONG_LAST_SEQUENCE_CONSTANT: u64 = 10164;
    pub(super) const MESSAGE_EXCEEDS_MAXIMUM: u64 = 10054;
    pub(super) const STREAM_SEALED: u64 = 10109;
    pub(super) const CLUSTER_NOT_AVAILABLE: u64 = 10008;
    pub(super) const NOT_ENABLED: u64 = 10076;
    /// The first of two equal ids is still being stored.
    pub(super) const DUPLICATE_IN_PROCESS: u64 = 10158;
}

fn read_answer(payload: &[u8]) -> Attempt {
    let answer: Answer = match serde_json::from_slice(payload) {
        Ok(answer) => answer,
        Err(error) => return Attempt::NoAnswer(format!("the acknowledgement is none: {error}")),
    };
    let Some(error) = answer.error else {
        return if answer.seq > 0 {
            Attempt::Stored(Stored {
                sequence: answer.seq,
                duplicate: answer.duplicate,
            })
        } else {
            Attempt::NoAnswer("the acknowledgement names no sequence".to_owned())
        };
    };
    let text = format!("{} ({})", error.description, error.err_code);
    match error.err_code {
        code::WRONG_LAST_SEQUENCE | code::WRONG_LAST_SEQUENCE_CONSTANT => Attempt::Conflict {
            // "wrong last sequence: 17"
            actual: error
                .description
                .rsplit_once(": ")
                .and_then(|(_, number)| number.parse().ok()),
        },
        code::MESSAGE_EXCEEDS_MAXIMUM => Attempt::Failed(PublishFailure::TooLarge),
        code::STREAM_SEALED => Attempt::Failed(PublishFailure::Hopeless(text)),
        code::CLUSTER_NOT_AVAILABLE | code::NOT_ENABLED | code::DUPLICATE_IN_PROCESS => {
            Attempt::NotNow(text)
        }
        _ => Attempt::Failed(PublishFailure::Refused(text)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn conflict(attempt: &Attempt) -> Option<Option<u64>> {
        match attempt {
            Attempt::Conflict { actual } => Some(*actual),
            _ => None,
        }
    }

    #[test]
    fn both_codes_of_a_wrong_sequence_are_conflicts() {
        let with_number = read_answer(
            br#"{"error":{"code":400,"err_code":10071,"description":"wrong last sequence: 17"},"seq":0}"#,
        );
        assert_eq!(conflict(&with_number), Some(Some(17)));
        let without = read_answer(
            br#"{"error":{"code":400,"err_code":10164,"description":"wrong last sequence"}}"#,
        );
        assert_eq!(conflict(&without), Some(None));
    }

    #[test]
    fn an_acknowledgement_without_a_sequence_is_no_acknowledgement() {
        for answer in [&b"{}"[..], b"", b"[]", br#"{"seq":0}"#, b"+OK"] {
            assert!(matches!(read_answer(answer), Attempt::NoAnswer(_)));
        }
        let stored = read_answer(br#"{"stream":"S","seq":7,"duplicate":true,"new":[1]}"#);
        assert!(matches!(
            stored,
            Attempt::Stored(Stored {
                sequence: 7,
                duplicate: true
            })
        ));
    }

    #[test]
    fn a_full_stream_refuses_and_a_missing_leader_is_waited_for() {
        let full =
            br#"{"error":{"code":503,"err_code":10077,"description":"maximum bytes exceeded"}}"#;
        assert!(matches!(
            read_answer(full),
            Attempt::Failed(PublishFailure::Refused(_))
        ));
        let leaderless = br#"{"error":{"code":503,"err_code":10008,"description":"JetStream system temporarily unavailable"}}"#;
        assert!(matches!(read_answer(leaderless), Attempt::NotNow(_)));
    }
}
