//! The domain aggregate: whose a hostname is that its owner brought along.
//!
//! Each hostname is an aggregate of its own, so that two projects that claim it at once append to
//! the same subject, and one of them is refused. A claim has a number. The project's route table
//! takes a hostname in under the number of its claim, and gives it up under the same number before
//! the claim ends: so no table of another project ever has it meanwhile, whoever is late.

use jiff::Timestamp;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::aggregate::{Aggregate, At, Decision, Illegal, Refusal, events};
use crate::envelope::Payload;
use crate::names::{EventId, Hostname, InstanceRef, ProjectName};
use crate::routing::Stickiness;
use crate::subject::AggregateKind;

/// A hostname belongs to a service instance from here on.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Claimed {
    /// The hostname.
    pub hostname: Hostname,
    /// The number of this claim among those of the hostname, from 1.
    pub number: u32,
    /// The instance.
    pub instance: InstanceRef,
    /// Whether it moves with the main deployment of the instance (`environment`), or with that of
    /// the service in the live environment (`live`).
    pub stickiness: Stickiness,
}

/// Its owner gives it up.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct ReleaseRequested {
    /// The number of the claim.
    pub number: u32,
}

/// It belongs to nobody: no route table has it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Released {
    /// The number of the claim that has ended.
    pub number: u32,
}

events! {
    /// The events of a hostname.
    DomainEvent {
        /// Somebody claimed it.
        Claimed(Claimed) = "domain.claimed.v1",
        /// Its owner gives it up.
        ReleaseRequested(ReleaseRequested) = "domain.release_requested.v1",
        /// It is free.
        Released(Released) = "domain.released.v1",
    }
}

/// Whose a hostname is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Claim {
    /// The instance.
    pub instance: InstanceRef,
    /// What it sticks to.
    pub stickiness: Stickiness,
    /// Since when.
    pub since: Timestamp,
    /// The event that made it what it is.
    pub by: EventId,
    /// Whether it is being given up.
    pub releasing: bool,
}

/// The state of a hostname.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Domain {
    /// The hostname.
    pub hostname: Hostname,
    /// The number of its newest claim.
    pub number: u32,
    /// That claim, if it has not ended.
    pub claim: Option<Claim>,
}

impl Domain {
    /// Its claim, if it is this one.
    fn claim_of(&mut self, number: u32, kind: &str) -> Result<&mut Option<Claim>, Illegal> {
        if self.number == number && self.claim.is_some() {
            return Ok(&mut self.claim);
        }
        Err(Illegal::new(kind, format!("claim {}", self.number)))
    }
}

impl Aggregate for Domain {
    type Event = DomainEvent;
    const KIND: AggregateKind = AggregateKind::Domain;

    fn first(event: DomainEvent, at: At) -> Result<Self, Illegal> {
        let DomainEvent::Claimed(first) = &event else {
            return Err(Illegal::new(event.kind(), "a hostname that is free"));
        };
        let mut state = Self {
            hostname: first.hostname.clone(),
            number: 0,
            claim: None,
        };
        state.apply(event, at)?;
        Ok(state)
    }

    fn apply(&mut self, event: DomainEvent, at: At) -> Result<(), Illegal> {
        let kind = event.kind();
        match event {
            DomainEvent::Claimed(e) => {
                let next = self.number.checked_add(1) == Some(e.number);
                if !next || self.claim.is_some() || e.hostname != self.hostname {
                    return Err(Illegal::new(kind, format!("claim {}", self.number)));
                }
                self.number = e.number;
                self.claim = Some(Claim {
                    instance: e.instance,
                    stickiness: e.stickiness,
                    since: at.time,
                    by: at.id,
                    releasing: false,
                });
            }
            DomainEvent::ReleaseRequested(e) => {
                if let Some(claim) = self.claim_of(e.number, kind)? {
                    claim.releasing = true;
                    claim.by = at.id;
                }
            }
            DomainEvent::Released(e) => *self.claim_of(e.number, kind)? = None,
        }
        Ok(())
    }
}

/// What can be asked of a hostname.
#[derive(Debug, Clone)]
pub enum Command {
    /// Claim it for an instance.
    Claim {
        /// The hostname.
        hostname: Hostname,
        /// The instance.
        instance: InstanceRef,
        /// What it sticks to.
        stickiness: Stickiness,
    },
    /// Give it up.
    Release {
        /// The project that has it.
        project: ProjectName,
    },
    /// No route table has it any more.
    Free {
        /// The number of the claim.
        number: u32,
    },
}

/// Decides on a hostname. To a project that does not have it, it is taken, and no more is said.
pub fn decide(state: Option<&Domain>, command: Command) -> Result<Decision<DomainEvent>, Refusal> {
    let claim = state.and_then(|s| s.claim.as_ref());
    let number = state.map_or(0, |s| s.number);
    match command {
        Command::Claim {
            hostname,
            instance,
            stickiness,
        } => match claim {
            None => Ok(Decision::Append(DomainEvent::Claimed(Claimed {
                hostname,
                number: number.saturating_add(1),
                instance,
                stickiness,
            }))),
            Some(c) if c.releasing && c.instance.project == instance.project => Err(Refusal::new(
                "hostname_taken",
                format!("{hostname} is just being given up by {}", c.instance),
                "ask again in a moment",
            )),
            Some(c) if c.instance == instance && c.stickiness == stickiness => {
                Ok(Decision::Nothing)
            }
            Some(c) if c.instance.project == instance.project => Err(Refusal::new(
                "hostname_taken",
                format!("{hostname} belongs to {} already", c.instance),
                "remove it there first with `daybook domain remove`",
            )),
            Some(_) => Err(Refusal::new(
                "hostname_taken",
                format!("{hostname} belongs to another project"),
                "whoever has it must give it up first",
            )),
        },
        Command::Release { project } => match claim {
            Some(c) if c.instance.project == project && c.releasing => Ok(Decision::Nothing),
            Some(c) if c.instance.project == project => Ok(Decision::Append(
                DomainEvent::ReleaseRequested(ReleaseRequested { number }),
            )),
            _ => Err(Refusal::new(
                "domain_not_found",
                format!("the project {project} has no such domain"),
                "`daybook domain list` shows the domains of a project",
            )),
        },
        Command::Free { number: ended } => match claim {
            Some(c) if c.releasing && ended == number => {
                Ok(Decision::Append(DomainEvent::Released(Released { number })))
            }
            _ => Ok(Decision::Nothing),
        },
    }
}
