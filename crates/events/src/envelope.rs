//! The envelope: one event as a CloudEvent (1.0, JSON, structured mode).
//!
//! The envelope is readable without the payload, so that an event of a newer version can be kept,
//! shown and skipped. What is stored is exactly [`NewEvent::to_bytes`]; it is never re-serialised.

mod canonical;

pub(crate) use canonical::timestamp;

use std::borrow::Cow;

use bytes::Bytes;
use jiff::Timestamp;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;
use uuid::Uuid;

use crate::names::EventId;
use crate::subject::Subject;
use crate::trace::TraceParent;

/// What every event type starts with: `dev.daybook.<aggregate>.<fact>.v<N>`.
pub const TYPE_PREFIX: &str = "dev.daybook.";

/// The CloudEvents media type, which an event carries wherever it travels.
pub const MEDIA_TYPE: &str = "application/cloudevents+json";

/// Who caused an event, and how we know.
///
/// The id is an account, a token's name or a worker, never a personal name or address: personal
/// data stays out of the ledger.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize, schemars::JsonSchema)]
pub struct Actor {
    /// How the actor was authenticated, as CloudEvents' `authtype`: `user` for somebody whom an
    /// identity provider vouches for, `api_key` for a token of Daybook's own, `system`,
    /// `unauthenticated`.
    pub kind: String,
    /// The actor's id within that kind: `alice`, `worker/build`.
    pub id: String,
}

impl Actor {
    /// A part of Daybook itself.
    pub fn system(part: &str) -> Self {
        Self {
            kind: "system".into(),
            id: part.into(),
        }
    }

    /// Whether it is a part of Daybook itself.
    pub fn is_system(&self) -> bool {
        self.kind == "system"
    }

    /// Somebody who said a name that nobody checked, as on an open loopback server.
    pub fn unauthenticated(id: impl Into<String>) -> Self {
        Self {
            kind: "unauthenticated".into(),
            id: id.into(),
        }
    }
}

/// An event as read: the envelope, and the payload still as its raw JSON.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Event {
    /// CloudEvents version, `1.0`.
    pub specversion: String,
    /// Unique id of the event, and its message id on the log.
    pub id: EventId,
    /// `/projects/<project>`.
    pub source: String,
    /// `dev.daybook.<aggregate>.<fact>.v<N>`.
    #[serde(rename = "type")]
    pub kind: String,
    /// The log subject, without its prefix and with slashes: `shop/production/deployment/<id>`.
    pub subject: String,
    /// When it happened.
    pub time: Timestamp,
    /// When the writer handed it to the log.
    pub recordedtime: Timestamp,
    /// `application/json`.
    pub datacontenttype: String,
    /// Its number among the events of its aggregate, from 1. Of two events that claim the same
    /// revision the first in log order counts, and the other is void.
    pub revision: u32,
    /// The request or run that all of this belongs to: for a deployment, its id.
    pub correlationid: Uuid,
    /// The event that directly led to this one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub causationid: Option<EventId>,
    /// How the actor was authenticated.
    pub authtype: String,
    /// Who did it.
    pub authid: String,
    /// W3C trace context.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub traceparent: Option<String>,
    /// SHA-256 of the request that a caller's `Idempotency-Key` was first used for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub requestdigest: Option<String>,
    /// The payload.
    pub data: Box<RawValue>,
}

impl Event {
    /// Reads an envelope.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, DecodeError> {
        let text = std::str::from_utf8(bytes).map_err(|e| DecodeError::Envelope(e.to_string()))?;
        let event: Self =
            serde_json::from_str(text).map_err(|e| DecodeError::Envelope(e.to_string()))?;
        must_be_current(&event.specversion)?;
        Ok(event)
    }

    /// The type without its common prefix: `deployment.requested.v1`.
    pub fn short_kind(&self) -> &str {
        self.kind.strip_prefix(TYPE_PREFIX).unwrap_or(&self.kind)
    }

    /// Who did it.
    pub fn actor(&self) -> Actor {
        Actor {
            kind: self.authtype.clone(),
            id: self.authid.clone(),
        }
    }

    /// The trace that it belongs to, if its `traceparent` names one.
    pub fn trace(&self) -> Option<TraceParent> {
        TraceParent::parse(self.traceparent.as_deref()?).ok()
    }

    /// Decodes the payload as the events of one aggregate, upcasting old versions.
    pub fn payload<P: Payload>(&self) -> Result<P, DecodeError> {
        let short = self.short_kind();
        P::decode(short, &self.data)
    }
}

/// An event as read, borrowed from its bytes: what a fold needs of an envelope, and no copy of
/// it. It accepts exactly what [`Event::from_bytes`] accepts.
#[derive(Debug, Deserialize)]
pub struct EventView<'a> {
    #[serde(borrow)]
    specversion: Cow<'a, str>,
    /// Unique id of the event.
    pub id: EventId,
    #[serde(borrow, rename = "source")]
    _source: Cow<'a, str>,
    #[serde(borrow, rename = "type")]
    kind: Cow<'a, str>,
    #[serde(borrow, rename = "subject")]
    _subject: Cow<'a, str>,
    /// When it happened.
    pub time: Timestamp,
    /// When the writer handed it to the log.
    pub recordedtime: Timestamp,
    #[serde(borrow, rename = "datacontenttype")]
    _datacontenttype: Cow<'a, str>,
    /// Its number among the events of its aggregate, from 1.
    pub revision: u32,
    /// The request or run that all of this belongs to.
    pub correlationid: Uuid,
    /// The event that directly led to this one.
    #[serde(default)]
    pub causationid: Option<EventId>,
    /// How the actor was authenticated.
    #[serde(borrow)]
    pub authtype: Cow<'a, str>,
    /// Who did it.
    #[serde(borrow)]
    pub authid: Cow<'a, str>,
    #[serde(default)]
    traceparent: Option<Cow<'a, str>>,
    /// SHA-256 of the request that a caller's `Idempotency-Key` was first used for.
    #[serde(default)]
    pub requestdigest: Option<Cow<'a, str>>,
    #[serde(borrow)]
    data: &'a RawValue,
}

impl<'a> EventView<'a> {
    /// Reads an envelope.
    pub fn from_bytes(bytes: &'a [u8]) -> Result<Self, DecodeError> {
        // Checked once as a whole, so that no text in it has to be checked by itself.
        let text = std::str::from_utf8(bytes).map_err(|e| DecodeError::Envelope(e.to_string()))?;
        let event = match canonical::read(text) {
            Some(event) => event,
            None => serde_json::from_str(text).map_err(|e| DecodeError::Envelope(e.to_string()))?,
        };
        must_be_current(&event.specversion)?;
        Ok(event)
    }

    /// The type without its common prefix: `deployment.requested.v1`.
    pub fn short_kind(&self) -> &str {
        self.kind.strip_prefix(TYPE_PREFIX).unwrap_or(&self.kind)
    }

    /// Who did it.
    pub fn actor(&self) -> Actor {
        Actor {
            kind: self.authtype.clone().into_owned(),
            id: self.authid.clone().into_owned(),
        }
    }

    /// The trace that it belongs to, if its `traceparent` names one.
    pub fn trace(&self) -> Option<TraceParent> {
        TraceParent::parse(self.traceparent.as_deref()?).ok()
    }

    /// The payload as it is written.
    pub fn data(&self) -> &'a RawValue {
        self.data
    }

    /// Decodes the payload as the events of one aggregate, upcasting old versions.
    pub fn payload<P: Payload>(&self) -> Result<P, DecodeError> {
        P::decode(self.short_kind(), self.data)
    }
}

fn must_be_current(specversion: &str) -> Result<(), DecodeError> {
    if specversion == "1.0" {
        return Ok(());
    }
    Err(DecodeError::Envelope(format!(
        "specversion {specversion:?} is not 1.0"
    )))
}

/// The events of one aggregate.
pub trait Payload: Sized {
    /// The type without the common prefix: `deployment.requested.v1`.
    fn kind(&self) -> &'static str;
    /// The payload as JSON.
    fn encode(&self) -> Result<Box<RawValue>, serde_json::Error>;
    /// Reads the payload of a type. Old versions are upcast here.
    fn decode(kind: &str, data: &RawValue) -> Result<Self, DecodeError> {
        Self::decode_text(kind, data.get())
    }
    /// The same from a text that may be no JSON, which is an error as any other.
    fn decode_text(kind: &str, data: &str) -> Result<Self, DecodeError>;
}

/// Why an event could not be read.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum DecodeError {
    /// The envelope is not one.
    #[error("not a CloudEvent of Daybook: {0}")]
    Envelope(String),
    /// The type is not known here; a newer version wrote it. Not an error for a fold: it is
    /// counted and skipped.
    #[error("event type {0} is not known to this version")]
    UnknownKind(String),
    /// The payload does not fit its type.
    #[error("the payload of {kind} cannot be read: {reason}")]
    Payload {
        /// The type.
        kind: String,
        /// What is wrong.
        reason: String,
    },
}

/// Decodes one payload type, for the `decode` of an aggregate.
pub fn decode_as<T: DeserializeOwned>(kind: &str, data: &str) -> Result<T, DecodeError> {
    serde_json::from_str(data).map_err(|e| DecodeError::Payload {
        kind: kind.into(),
        reason: e.to_string(),
    })
}

/// What surrounds a decision: who, when, why. Together with a payload it makes an event.
#[derive(Debug, Clone)]
pub struct Context {
    /// The id of the event to be, which makes a retry recognisable.
    pub id: EventId,
    /// When it happened.
    pub time: Timestamp,
    /// The request or run.
    pub correlation: Uuid,
    /// The event that led to it.
    pub causation: Option<EventId>,
    /// Who.
    pub actor: Actor,
    /// The trace that it belongs to; none for that of the unit of work that appends it, if that
    /// has one.
    pub traceparent: Option<TraceParent>,
    /// Digest of the request, where there was one.
    pub request_digest: Option<String>,
}

/// An event that is decided but not yet recorded.
#[derive(Debug, Clone)]
pub struct NewEvent<P> {
    /// The aggregate.
    pub subject: Subject,
    /// Its revision: one more than the aggregate's.
    pub revision: u32,
    /// Who, when, why.
    pub context: Context,
    /// What.
    pub payload: P,
}

impl<P: Payload> NewEvent<P> {
    /// The bytes to store. `recorded` is the writer's clock at this moment.
    pub fn to_bytes(&self, recorded: Timestamp) -> Result<Bytes, serde_json::Error> {
        let subject = self.subject.to_string();
        let subject = subject
            .strip_prefix(crate::subject::PREFIX)
            .map_or(subject.as_str(), |s| s.trim_start_matches('.'))
            .replace('.', "/");
        let event = Event {
            specversion: "1.0".into(),
            id: self.context.id,
            source: self
                .subject
                .project()
                .map_or_else(|| "/".to_owned(), |p| format!("/projects/{p}")),
            kind: format!("{TYPE_PREFIX}{}", self.payload.kind()),
            subject,
            time: self.context.time,
            recordedtime: recorded,
            datacontenttype: "application/json".into(),
            revision: self.revision,
            correlationid: self.context.correlation,
            causationid: self.context.causation,
            authtype: self.context.actor.kind.clone(),
            authid: self.context.actor.id.clone(),
            traceparent: self.context.traceparent.map(|t| t.to_string()),
            requestdigest: self.context.request_digest.clone(),
            data: self.payload.encode()?,
        };
        serde_json::to_vec(&event).map(Bytes::from)
    }
}
