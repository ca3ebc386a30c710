//! What all aggregates have in common: how events fold into state, and how a decision is refused.

use jiff::Timestamp;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::envelope::{DecodeError, Event, Payload};
use crate::log::{Position, Recorded};
use crate::names::EventId;
use crate::subject::AggregateKind;
use crate::trace::TraceParent;

/// Where and when an event stands, as far as a fold may look at it.
#[derive(Debug, Clone, Copy)]
pub struct At {
    /// Position of the event.
    pub position: Position,
    /// Its id.
    pub id: EventId,
    /// When it happened.
    pub time: Timestamp,
    /// The trace that it belongs to.
    pub trace: Option<TraceParent>,
}

/// A consistency boundary: its events fold into its state, purely.
pub trait Aggregate: Sized + Clone + Send + Sync + Serialize + DeserializeOwned + 'static {
    /// Its events.
    type Event: Payload;
    /// Its kind.
    const KIND: AggregateKind;

    /// The state after the first event.
    fn first(event: Self::Event, at: At) -> Result<Self, Illegal>;
    /// The state after a further event. An event that is refused leaves the state as it was.
    fn apply(&mut self, event: Self::Event, at: At) -> Result<(), Illegal>;
}

/// An event that does not fit the state that it meets. It is void: kept, shown, and skipped.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{kind} does not follow on {state}")]
pub struct Illegal {
    /// The event's type.
    pub kind: String,
    /// The state that it met.
    pub state: String,
}

impl Illegal {
    /// For an event that only a first event may be, or the other way round.
    pub fn new(kind: &str, state: impl Into<String>) -> Self {
        Self {
            kind: kind.into(),
            state: state.into(),
        }
    }
}

/// Why an event changed nothing in a fold.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Void {
    /// Another event with the same revision came first. This happens when a broker's cluster
    /// accepts two writers at once (nats-server#4320): the first in log order counts.
    #[error("revision {revision} was taken by an earlier event")]
    Overtaken {
        /// The claimed revision.
        revision: u32,
    },
    /// A revision is missing before this one.
    #[error("revision {found} follows on {last}")]
    Gap {
        /// The last revision that was folded.
        last: u32,
        /// What this event claims.
        found: u32,
    },
    /// The event's type is not known to this version.
    #[error("{0} is not known to this version")]
    Unknown(String),
    /// The event cannot be read.
    #[error(transparent)]
    Unreadable(DecodeError),
    /// The event does not fit the state.
    #[error(transparent)]
    Illegal(#[from] Illegal),
}

/// An aggregate's state with the place up to which it is folded.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(bound = "A: Aggregate")]
pub struct Folded<A> {
    /// The state; none before the first event.
    pub state: Option<A>,
    /// Revision of the last event that counted; 0 for none.
    pub revision: u32,
    /// Position of the last event on this subject, whether it counted or not: what the next
    /// append expects.
    pub position: Position,
    /// Id of the last event that counted.
    pub last_id: Option<EventId>,
}

impl<A> Default for Folded<A> {
    fn default() -> Self {
        Self {
            state: None,
            revision: 0,
            position: Position::ZERO,
            last_id: None,
        }
    }
}

impl<A: Aggregate> Folded<A> {
    /// Folds one event. A void event changes no state: it moves the position, and takes its
    /// revision if that was the next one.
    pub fn apply(&mut self, position: Position, event: &Event) -> Result<(), Void> {
        let at = At {
            position,
            id: event.id,
            time: event.time,
            trace: event.trace(),
        };
        self.step(at, event.revision, event.payload())
    }

    /// Folds one event whose payload is decoded already, or could not be. The same as
    /// [`Self::apply`].
    pub fn step(
        &mut self,
        at: At,
        revision: u32,
        payload: Result<A::Event, DecodeError>,
    ) -> Result<(), Void> {
        self.position = at.position;
        let before = self.revision;
        let payload = count(&mut self.revision, revision, payload);
        if self.revision != before {
            self.last_id = Some(at.id);
        }
        let payload = payload?;
        match &mut self.state {
            Some(state) => state.apply(payload, at)?,
            none => *none = Some(A::first(payload, at)?),
        }
        Ok(())
    }

    /// Folds stored events from nothing, skipping void ones.
    pub fn replay<'a>(events: impl IntoIterator<Item = &'a Recorded>) -> Self {
        let mut folded = Self::default();
        for recorded in events {
            match recorded.event() {
                Ok(event) => {
                    let _ = folded.apply(recorded.position, &event);
                }
                Err(_) => folded.position = recorded.position,
            }
        }
        folded
    }
}

/// Counts an event as the next one of its aggregate, if its revision is the next one.
pub(crate) fn count<P>(
    last: &mut u32,
    revision: u32,
    payload: Result<P, DecodeError>,
) -> Result<P, Void> {
    if revision <= *last {
        return Err(Void::Overtaken { revision });
    }
    if revision - 1 != *last {
        return Err(Void::Gap {
            last: *last,
            found: revision,
        });
    }
    // From here on the revision is taken, even if its event says nothing to this version: the
    // next writer, who may be newer, counts on from it.
    *last = revision;
    payload.map_err(|e| match e {
        DecodeError::UnknownKind(kind) => Void::Unknown(kind),
        other => Void::Unreadable(other),
    })
}

/// A command that was refused: what is wrong, and the way out.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct Refusal {
    /// A stable code for programs.
    pub code: &'static str,
    /// What is wrong, in one sentence.
    pub message: String,
    /// What would make it possible.
    pub remedy: String,
}

impl Refusal {
    /// A refusal.
    pub fn new(code: &'static str, message: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self {
            code,
            message: message.into(),
            remedy: remedy.into(),
        }
    }
}

/// What came of a decision.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Decision<E> {
    /// Append this event.
    Append(E),
    /// Everything is already as the command wants it.
    Nothing,
}

/// Declares the events of one aggregate: the enum, its codec and its schemas.
///
/// When a payload has to change its shape, its event gets a new version: the variant's type and
/// kind become those of the new one, and the old ones move to the list `older`, with a type that
/// still reads what was written and a `From` of it that says what the old one means today. That
/// is the only place that knows the old version: it is never written again, and states, folds and
/// queries meet the new one alone. Its frozen event and its schema stay.
macro_rules! events {
    (
        $(#[$doc:meta])*
        $name:ident { $( $(#[$vdoc:meta])* $variant:ident($ty:ty) = $kind:literal, )* }
        $( older { $( $old_variant:ident($old:ty) = $old_kind:literal, )* } )?
    ) => {
        $(#[$doc])*
        #[derive(Debug, Clone, PartialEq)]
        pub enum $name {
            $( $(#[$vdoc])* $variant($ty), )*
        }

        impl $crate::envelope::Payload for $name {
            fn kind(&self) -> &'static str {
                match self { $( Self::$variant(_) => $kind, )* }
            }
            fn encode(&self) -> Result<Box<serde_json::value::RawValue>, serde_json::Error> {
                match self { $( Self::$variant(p) => serde_json::value::to_raw_value(p), )* }
            }
            fn decode_text(
                kind: &str,
                data: &str,
            ) -> Result<Self, $crate::envelope::DecodeError> {
                match kind {
                    $( $kind => $crate::envelope::decode_as(kind, data).map(Self::$variant), )*
                    $( $( $old_kind => $crate::envelope::decode_as::<$old>(kind, data)
                        .map(|old| Self::$old_variant(old.into())), )* )?
                    other => Err($crate::envelope::DecodeError::UnknownKind(other.to_owned())),
                }
            }
        }

        impl $name {
            /// Type (without the common prefix) and payload schema of each event of this
            /// aggregate, in the order of declaration.
            pub fn schemas() -> Vec<(&'static str, schemars::Schema)> {
                vec![
                    $( ($kind, schemars::schema_for!($ty)), )*
                    $( $( ($old_kind, schemars::schema_for!($old)), )* )?
                ]
            }
        }
    };
}
pub(crate) use events;

#[cfg(test)]
// The macro declares what all crates see.
#[allow(unreachable_pub)]
mod tests {
    //! A worked example of a second version: an observation that once had one instance, and now
    //! has several.

    use schemars::JsonSchema;
    use serde_json::value::RawValue;

    use super::*;

    /// As it is today.
    #[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
    pub struct Seen {
        /// The instances.
        pub instances: Vec<String>,
        /// How many of them are ready.
        pub ready: u32,
    }

    /// As it was written at first.
    #[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
    pub struct SeenV1 {
        /// The instance.
        pub instance: Option<String>,
        /// Whether it is ready.
        pub ready: bool,
    }

    impl From<SeenV1> for Seen {
        fn from(old: SeenV1) -> Self {
            Self {
                ready: u32::from(old.ready && old.instance.is_some()),
                instances: old.instance.into_iter().collect(),
            }
        }
    }

    events! {
        /// The events of a thing that is looked at.
        SightEvent {
            /// It was looked at.
            Seen(Seen) = "sight.seen.v2",
        }
        older {
            Seen(SeenV1) = "sight.seen.v1",
        }
    }

    fn read(kind: &str, data: &str) -> Result<SightEvent, DecodeError> {
        SightEvent::decode(kind, &RawValue::from_string(data.to_owned()).unwrap())
    }

    #[test]
    fn an_old_version_is_read_as_what_it_means_today() {
        let old = read("sight.seen.v1", r#"{"instance":"a","ready":true}"#).unwrap();
        let new = read("sight.seen.v2", r#"{"instances":["a"],"ready":1}"#).unwrap();
        assert_eq!(old, new);
        let none = read("sight.seen.v1", r#"{"instance":null,"ready":true}"#).unwrap();
        let SightEvent::Seen(seen) = &none;
        assert_eq!((seen.instances.len(), seen.ready), (0, 0));
    }

    #[test]
    fn only_the_new_version_is_written_and_both_have_a_schema() {
        let event = read("sight.seen.v1", r#"{"instance":"a","ready":true}"#).unwrap();
        assert_eq!(event.kind(), "sight.seen.v2");
        let data = event.encode().unwrap();
        assert_eq!(data.get(), r#"{"instances":["a"],"ready":1}"#);
        let kinds: Vec<_> = SightEvent::schemas().into_iter().map(|(k, _)| k).collect();
        assert_eq!(kinds, ["sight.seen.v2", "sight.seen.v1"]);
    }

    #[test]
    fn a_version_still_to_come_and_a_payload_of_the_other_version_are_told_apart() {
        let unknown = read("sight.seen.v3", "{}").unwrap_err();
        assert_eq!(unknown, DecodeError::UnknownKind("sight.seen.v3".into()));
        for (kind, data) in [
            ("sight.seen.v1", r#"{"instances":["a"],"ready":1}"#),
            ("sight.seen.v2", r#"{"instance":"a","ready":true}"#),
        ] {
            let refused = read(kind, data).unwrap_err();
            assert!(matches!(refused, DecodeError::Payload { .. }), "{refused}");
        }
    }
}
