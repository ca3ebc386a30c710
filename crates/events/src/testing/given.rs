//! Given some events, when a command is decided, then an event or a refusal follows.

use std::fmt::Debug;

use super::time;
use crate::aggregate::{Aggregate, At, Decision, Refusal};
use crate::envelope::Payload;
use crate::log::Position;
use crate::names::EventId;

/// An aggregate with a past.
#[derive(Debug, Clone)]
pub struct Given<A> {
    /// Its state.
    pub state: Option<A>,
    events: u64,
}

/// What was decided.
#[derive(Debug)]
pub struct When<A: Aggregate> {
    given: Given<A>,
    decision: Result<Decision<A::Event>, Refusal>,
}

/// An aggregate to which these events happened.
///
/// # Panics
/// If one of them is void.
#[track_caller]
pub fn given<A: Aggregate>(events: impl IntoIterator<Item = A::Event>) -> Given<A> {
    let empty = Given {
        state: None,
        events: 0,
    };
    events.into_iter().fold(empty, |g, event| g.and(event))
}

impl<A: Aggregate> Given<A> {
    /// One more event happened.
    ///
    /// # Panics
    /// If it is void.
    #[must_use]
    #[track_caller]
    pub fn and(mut self, event: A::Event) -> Self {
        let kind = event.kind();
        if let Err(e) = self.try_apply(event) {
            panic!("{kind} is void: {e}");
        }
        self
    }

    /// Applies an event, or says why it is void. A void one must leave the state as it was.
    pub fn try_apply(&mut self, event: A::Event) -> Result<(), crate::aggregate::Illegal> {
        self.events += 1;
        let at = At {
            position: Position(self.events),
            id: EventId::derived(uuid::Uuid::NAMESPACE_OID, &self.events.to_string()),
            time: time(self.events),
            trace: None,
        };
        match &mut self.state {
            Some(state) => state.apply(event, at),
            none => {
                *none = Some(A::first(event, at)?);
                Ok(())
            }
        }
    }

    /// Decides on the state.
    pub fn when(
        self,
        decide: impl FnOnce(Option<&A>) -> Result<Decision<A::Event>, Refusal>,
    ) -> When<A> {
        let decision = decide(self.state.as_ref());
        When {
            given: self,
            decision,
        }
    }
}

impl<A: Aggregate> When<A>
where
    A::Event: Debug + PartialEq + Clone,
{
    /// Exactly this event was decided; it is applied.
    ///
    /// # Panics
    /// If something else was decided, or the event is void.
    #[track_caller]
    pub fn then(self, event: A::Event) -> Given<A> {
        assert_eq!(self.decision, Ok(Decision::Append(event.clone())));
        self.given.and(event)
    }

    /// Some event was decided; it is applied and handed out.
    ///
    /// # Panics
    /// If none was decided, or the event is void.
    #[track_caller]
    pub fn then_some(self) -> (A::Event, Given<A>) {
        match self.decision {
            Ok(Decision::Append(event)) => (event.clone(), self.given.and(event)),
            other => panic!("no event was decided: {other:?}"),
        }
    }

    /// Nothing was to be done.
    ///
    /// # Panics
    /// If something was decided.
    #[track_caller]
    pub fn then_nothing(self) -> Given<A> {
        assert_eq!(self.decision, Ok(Decision::Nothing));
        self.given
    }

    /// It was refused with this code, and with a way out.
    ///
    /// # Panics
    /// If it was not.
    #[track_caller]
    pub fn then_refused(self, code: &str) -> Given<A> {
        match self.decision {
            Err(refusal) => {
                assert_eq!(refusal.code, code, "{refusal:?}");
                assert!(!refusal.message.is_empty() && !refusal.remedy.is_empty());
            }
            Ok(decision) => panic!("it was not refused: {decision:?}"),
        }
        self.given
    }
}
