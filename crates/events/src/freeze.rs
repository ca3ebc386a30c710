//! Freezes: times at which nothing new is brought to an environment.
//!
//! An environment has named windows. What is deployed to it while one is open is accepted and
//! *held*: it waits, with the window and its end on record, before it is admitted, or before its
//! commit where it was under way already. When the window ends, or is taken away, it is *released*;
//! of several that wait for an instance, the newest goes. In an emergency somebody lets one
//! deployment through, which somebody else reviews later, as with approvals.
//!
//! Whoever decides here is told the time. What was decided is in events, with the end of the
//! window as a moment: to fold them, neither a clock nor a time zone is needed.

mod window;

use std::collections::BTreeMap;

use jiff::Timestamp;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

pub use window::{
    Day, FreezeRule, InvalidDay, InvalidLength, Occurrence, OneOff, Weekly, WindowLength, clock,
};

use crate::aggregate::{At, Decision, Refusal};
use crate::approval::{Emergency, Grant, PostReviewCompleted};
use crate::deployment::{Deployment, DeploymentEvent, Status, decide};
use crate::environment::{self, Environment, EnvironmentEvent};
use crate::names::{EventId, FreezeName};

/// The most windows that an environment can have.
const MOST: usize = 50;

/// A window in which an environment is frozen.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Freeze {
    /// When.
    pub rule: FreezeRule,
    /// Why, for those who have to wait.
    #[serde(default)]
    pub reason: Option<String>,
}

/// The windows of an environment, by name.
pub type Freezes = BTreeMap<FreezeName, Freeze>;

/// An environment has a window from now on, or another one of this name.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct FreezeSet {
    /// Its name.
    pub name: FreezeName,
    /// The window.
    pub freeze: Freeze,
}

/// An environment has a window no more.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct FreezeRemoved {
    /// Its name.
    pub name: FreezeName,
    /// Why, in the caller's words.
    pub reason: Option<String>,
}

/// It waits: its environment is frozen. Takes the place of what it was held by before.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Held {
    /// The window.
    pub freeze: FreezeName,
    /// When that ends; none if it does not end by itself.
    pub until: Option<Timestamp>,
    /// The id of the event that then lets it go on.
    pub nonce: EventId,
}

/// Why a deployment waits no more.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum ReleaseCause {
    /// The window has ended.
    Ended,
    /// The window was taken away, or moved.
    Removed,
}

/// It goes on: its environment is not frozen any more.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Released {
    /// The window that it waited for.
    pub freeze: FreezeName,
    /// The nonce of what it was held by.
    pub nonce: EventId,
    /// Why.
    pub cause: ReleaseCause,
}

/// Somebody let it through, because it could not wait. To be reviewed later.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct FreezeOverride {
    /// The window that held it.
    pub freeze: FreezeName,
    /// Who.
    pub by: String,
    /// Why.
    pub reason: String,
}

/// What held a deployment.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hold {
    /// The window.
    pub freeze: FreezeName,
    /// When that ends.
    pub until: Option<Timestamp>,
    /// Since when it waits.
    pub since: Timestamp,
    /// The id of the event that lets it go on.
    pub nonce: EventId,
    /// Whether it was let go on.
    pub released: bool,
    /// Who let it through.
    pub emergency: Option<Emergency>,
}

impl Hold {
    /// Whether it still holds the deployment.
    pub fn is_in_force(&self) -> bool {
        !self.released && self.emergency.is_none()
    }

    /// Whether somebody still has to look at an emergency.
    pub fn needs_review(&self) -> bool {
        self.emergency.as_ref().is_some_and(|e| e.review.is_none())
    }
}

impl Deployment {
    /// What holds it now.
    pub fn held(&self) -> Option<&Hold> {
        let waits = matches!(self.status, Status::Requested | Status::Packaging);
        self.hold
            .as_deref()
            .filter(|hold| waits && hold.is_in_force())
    }

    /// Whether somebody let it through a freeze in an emergency.
    pub fn goes_through_freezes(&self) -> bool {
        self.hold.as_ref().is_some_and(|h| h.emergency.is_some())
    }
}

/// The window that an environment is in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Frozen<'a> {
    /// Its name.
    pub name: &'a FreezeName,
    /// The window.
    pub freeze: &'a Freeze,
    /// When it ends; none if it does not end by itself.
    pub until: Option<Timestamp>,
}

impl Frozen<'_> {
    /// Its end in words: `until 2026-11-23 08:00 Europe/Berlin`.
    pub fn ends(&self) -> String {
        ends(self.until, self.freeze)
    }
}

fn ends(until: Option<Timestamp>, freeze: &Freeze) -> String {
    match until {
        Some(until) => format!("until {}", clock(until, freeze.rule.zone())),
        None => "until somebody takes that away".to_owned(),
    }
}

/// The window that is open at a moment; of several the one that ends last.
pub fn frozen(freezes: &Freezes, now: Timestamp) -> Option<Frozen<'_>> {
    let open = freezes.iter().filter_map(|(name, freeze)| {
        let found = freeze.rule.next(now).filter(|o| o.has_begun(now))?;
        Some(Frozen {
            name,
            freeze,
            until: found.until,
        })
    });
    open.max_by_key(|frozen| frozen.until.unwrap_or(Timestamp::MAX))
}

/// Why what cannot wait is not done while an environment is frozen, and the ways out.
pub fn refusal(environment: &Environment, now: Timestamp) -> Option<Refusal> {
    let frozen = frozen(&environment.freezes, now)?;
    let Environment { project, name, .. } = environment;
    let reason = frozen.freeze.reason.as_ref();
    let reason = reason.map_or_else(String::new, |reason| format!(": {reason}"));
    Some(Refusal::new(
        "environment_frozen",
        format!(
            "{name} is frozen by {} {}{reason}",
            frozen.name,
            frozen.ends()
        ),
        format!(
            "wait for its end, or take it away with `daybook freeze remove {project} {name} {}`; \
             what is deployed meanwhile waits by itself, and `daybook rollback` goes back at any time",
            frozen.name
        ),
    ))
}

/// Decides to give an environment a window at a moment. One that is over already is refused.
pub fn set(
    state: Option<&Environment>,
    event: FreezeSet,
    now: Timestamp,
) -> Result<Decision<EnvironmentEvent>, Refusal> {
    event.freeze.rule.check()?;
    if event.freeze.rule.next(now).is_none() {
        return Err(Refusal::new(
            "freeze_over",
            format!("this window is over: {}", event.freeze.rule),
            "give one that ends in the future",
        ));
    }
    environment::decide(state, EnvironmentEvent::FreezeSet(event))
}

/// Refuses a window that an environment cannot have, and says whether it changes anything.
pub(crate) fn sets(state: &Environment, event: &FreezeSet) -> Result<bool, Refusal> {
    event.freeze.rule.check()?;
    let known = state.freezes.get(&event.name);
    if known.is_none() && state.freezes.len() >= MOST {
        return Err(Refusal::new(
            "too_many_freezes",
            format!("the environment {} has {MOST} windows already", state.name),
            "take away those that are over with `daybook freeze remove`",
        ));
    }
    Ok(known != Some(&event.freeze))
}

/// Refuses to take away a window that an environment does not have.
pub(crate) fn removes(state: &Environment, event: &FreezeRemoved) -> Result<(), Refusal> {
    if state.freezes.contains_key(&event.name) {
        return Ok(());
    }
    Err(Refusal::new(
        "freeze_not_found",
        format!(
            "the environment {} has no window {}",
            state.name, event.name
        ),
        "`daybook freeze list` shows those that it has",
    ))
}

/// What is to be done about a deployment that is about to go on.
#[derive(Debug, Clone, PartialEq)]
pub enum Verdict {
    /// It goes on.
    Goes,
    /// It waits, and that is on record.
    Waits,
    /// This is to be recorded first: that it waits, or that it waits no more.
    Record(Box<DeploymentEvent>),
}

/// Judges a deployment that waits to be admitted or to be committed, at a moment.
pub fn judge(state: &Deployment, freezes: &Freezes, now: Timestamp) -> Verdict {
    if state.goes_through_freezes() {
        return Verdict::Goes;
    }
    let held = state.held();
    match (frozen(freezes, now), held) {
        (None, None) => Verdict::Goes,
        (None, Some(hold)) => Verdict::Record(Box::new(DeploymentEvent::Released(Released {
            freeze: hold.freeze.clone(),
            nonce: hold.nonce,
            cause: match hold.until {
                Some(until) if until <= now => ReleaseCause::Ended,
                _ => ReleaseCause::Removed,
            },
        }))),
        (Some(frozen), Some(hold)) if *frozen.name == hold.freeze && frozen.until == hold.until => {
            Verdict::Waits
        }
        (Some(frozen), _) => {
            let before = state.hold.as_ref().map_or(state.status_event, |h| h.nonce);
            Verdict::Record(Box::new(DeploymentEvent::Held(Held {
                freeze: frozen.name.clone(),
                until: frozen.until,
                nonce: EventId::derived(before.0, "end of the freeze"),
            })))
        }
    }
}

/// Decides on the end of a freeze that a deployment waits for: it goes on, or waits for another
/// one that is open then. What is not due, or was decided before, comes to nothing.
pub fn fire(
    state: Option<&Deployment>,
    freezes: &Freezes,
    nonce: EventId,
    now: Timestamp,
) -> Result<Decision<DeploymentEvent>, Refusal> {
    let Some(deployment) = state else {
        return Ok(Decision::Nothing);
    };
    let due = deployment
        .held()
        .is_some_and(|hold| hold.nonce == nonce && hold.until.is_some_and(|until| until <= now));
    match judge(deployment, freezes, now) {
        Verdict::Record(event) if due => decide(state, *event),
        _ => Ok(Decision::Nothing),
    }
}

/// Refuses what a freeze does not allow, and says whether an event changes anything. The
/// transition table has allowed it already.
pub(crate) fn changes(state: &Deployment, event: &DeploymentEvent) -> Result<bool, Refusal> {
    let held = state.held();
    match (event, held) {
        (DeploymentEvent::Queued(_) | DeploymentEvent::DeployingStarted(_), Some(hold)) => {
            Err(Refusal::new(
                "environment_frozen",
                format!("its environment is frozen by {}", hold.freeze),
                "wait for its end; in an emergency, `daybook freeze override` lets it through",
            ))
        }
        (DeploymentEvent::Held(e), _) => Ok(!state.goes_through_freezes()
            && held.is_none_or(|hold| (&hold.freeze, hold.until) != (&e.freeze, e.until))),
        (DeploymentEvent::Released(e), held) => Ok(held.is_some_and(|h| h.nonce == e.nonce)),
        (DeploymentEvent::FreezeOverride(_), None) if state.goes_through_freezes() => Ok(false),
        (DeploymentEvent::FreezeOverride(_), None) => Err(not_held()),
        (DeploymentEvent::FreezeOverride(e), Some(hold)) if hold.freeze != e.freeze => {
            Err(Refusal::new(
                "freeze_changed",
                format!(
                    "it is held by {} by now, and not by {}",
                    hold.freeze, e.freeze
                ),
                "look at it again with `daybook status`, and decide about that one",
            ))
        }
        _ => Ok(true),
    }
}

/// Refuses to let through what nothing holds.
pub fn not_held() -> Refusal {
    Refusal::new(
        "not_held",
        "no freeze holds the deployment",
        "`daybook status` shows what a deployment waits for",
    )
}

/// Folds what an event says about freezes.
pub(crate) fn fold(hold: &mut Option<Box<Hold>>, event: DeploymentEvent, at: At) {
    match (event, hold) {
        (DeploymentEvent::Held(e), hold) => {
            let since = match hold {
                Some(before) if before.is_in_force() => before.since,
                _ => at.time,
            };
            *hold = Some(Box::new(Hold {
                freeze: e.freeze,
                until: e.until,
                since,
                nonce: e.nonce,
                released: false,
                emergency: None,
            }));
        }
        (DeploymentEvent::Released(e), Some(hold)) if hold.nonce == e.nonce => {
            hold.released = true;
        }
        (DeploymentEvent::FreezeOverride(e), Some(hold)) => {
            hold.emergency = Some(Emergency {
                by: e.by,
                reason: e.reason,
                at: at.time,
                review: None,
            });
        }
        _ => {}
    }
}

/// Folds that somebody has looked at an emergency.
pub(crate) fn review(hold: &mut Option<Box<Hold>>, e: &PostReviewCompleted, at: At) {
    if let Some(emergency) = hold.as_mut().and_then(|hold| hold.emergency.as_mut()) {
        emergency.review = Some(Grant {
            approver: e.reviewer.clone(),
            at: at.time,
            reason: e.reason.clone(),
        });
    }
}
