//! Scheduled stops: when a deployment is to be stopped by itself, why, and what cancels that.
//!
//! A scheduled stop is a decision with a time and a *nonce*, and belongs to its deployment. When it
//! is due, whoever notices appends the stop under the nonce as its id, and the deployment's state
//! says whether that nonce is still the one that counts. So it fires once, however many processes
//! look, however late, and never after a later decision.

use std::fmt;
use std::str::FromStr;

use jiff::{SignedDuration, Timestamp};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::aggregate::{Decision, Refusal};
use crate::deployment::{Deployment, DeploymentEvent, OperationRequested, Status, decide};
use crate::names::{DeploymentId, EventId, InstanceRef};
use crate::routing::{Routing, Stickiness};

/// How long something is kept that nobody needs any more: `30m`, `24h`, or `never` for without an
/// end.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum KeepFor {
    /// So many seconds, at most a year.
    Seconds(u32),
    /// It is never stopped by itself.
    Never,
}

/// A text is no time to keep something for.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "{0:?} is no time to keep something for: use a number with s, m, h or d, at most 365d, or `never`"
)]
pub struct InvalidKeepFor(String);

const YEAR: u32 = 365 * DAY;
const DAY: u32 = 24 * HOUR;
const HOUR: u32 = 60 * MINUTE;
const MINUTE: u32 = 60;

impl KeepFor {
    /// How long the former main deployment is kept where nobody says otherwise.
    pub const OLD: Self = Self::Seconds(30 * MINUTE);
    /// How long a preview is kept without a request where nobody says otherwise.
    pub const IDLE: Self = Self::Seconds(DAY);

    /// The time as a duration; none for [`Self::Never`].
    pub fn duration(self) -> Option<SignedDuration> {
        match self {
            Self::Seconds(seconds) => Some(SignedDuration::from_secs(seconds.into())),
            Self::Never => None,
        }
    }
}

impl FromStr for KeepFor {
    type Err = InvalidKeepFor;

    fn from_str(text: &str) -> Result<Self, InvalidKeepFor> {
        if text == "never" {
            return Ok(Self::Never);
        }
        let invalid = || InvalidKeepFor(text.chars().take(40).collect());
        let unit = match text.chars().next_back() {
            Some('s') => 1,
            Some('m') => MINUTE,
            Some('h') => HOUR,
            Some('d') => DAY,
            _ => return Err(invalid()),
        };
        let number = &text[..text.len() - 1];
        let digits = (1..=8).contains(&number.len()) && number.bytes().all(|b| b.is_ascii_digit());
        let seconds = digits.then(|| number.parse::<u32>().ok()).flatten();
        let seconds = seconds.and_then(|n| n.checked_mul(unit));
        seconds
            .filter(|s| *s <= YEAR)
            .map(Self::Seconds)
            .ok_or_else(invalid)
    }
}

impl fmt::Display for KeepFor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self::Seconds(seconds) = *self else {
            return f.write_str("never");
        };
        let units = [(DAY, 'd'), (HOUR, 'h'), (MINUTE, 'm')];
        let whole = |unit: u32| seconds > 0 && seconds.is_multiple_of(unit);
        match units.into_iter().find(|(unit, _)| whole(*unit)) {
            // A single day is said in hours, as people do.
            Some((DAY, _)) if seconds == DAY => f.write_str("24h"),
            Some((unit, letter)) => write!(f, "{}{letter}", seconds / unit),
            None => write!(f, "{seconds}s"),
        }
    }
}

impl JsonSchema for KeepFor {
    fn schema_name() -> std::borrow::Cow<'static, str> {
        "KeepFor".into()
    }
    fn json_schema(_: &mut schemars::SchemaGenerator) -> schemars::Schema {
        schemars::json_schema!({
            "type": "string",
            "pattern": "^(never|[0-9]{1,8}[smhd])$",
            "description": "How long something is kept that nobody needs any more: 30m, 24h, never."
        })
    }
}

impl TryFrom<String> for KeepFor {
    type Error = InvalidKeepFor;
    fn try_from(text: String) -> Result<Self, InvalidKeepFor> {
        text.parse()
    }
}

impl From<KeepFor> for String {
    fn from(keep: KeepFor) -> Self {
        keep.to_string()
    }
}

/// Why a deployment is to be stopped by itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum StopCause {
    /// Another deployment took its traffic over.
    Replaced,
    /// Its service went back to another deployment.
    RolledBack,
    /// Nobody asks for it.
    Idle,
}

/// It will be stopped by itself, unless something is decided before. It takes the place of a stop
/// that was scheduled before.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct StopScheduled {
    /// When.
    pub due: Timestamp,
    /// Why.
    pub cause: StopCause,
    /// How long it is kept from the cause on.
    pub keep: KeepFor,
    /// The deployment that has its traffic now, if that is why.
    pub by: Option<DeploymentId>,
    /// The route table that took its traffic away, if that is why.
    pub table: Option<u32>,
    /// The id of the event that will stop it.
    pub nonce: EventId,
}

/// Why a scheduled stop does not happen.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum KeepCause {
    /// Somebody asked to keep it.
    Asked,
    /// It has traffic, or is about to get some.
    Traffic,
}

/// The scheduled stop does not happen.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct StopUnscheduled {
    /// The stop's nonce.
    pub nonce: EventId,
    /// Why.
    pub cause: KeepCause,
    /// The newest route table when this was decided: older ones schedule nothing any more.
    pub table: Option<u32>,
    /// Why, in the caller's words.
    pub reason: Option<String>,
}

impl StopScheduled {
    /// Why it is to be stopped, as a sentence's end: `because …`.
    pub fn because(&self) -> String {
        let other = |by: Option<DeploymentId>| {
            by.map_or_else(|| "another deployment".to_owned(), |id| id.short())
        };
        match self.cause {
            StopCause::Replaced => format!("{} took its traffic over", other(self.by)),
            StopCause::RolledBack => format!("its service went back to {}", other(self.by)),
            StopCause::Idle => format!("nobody has asked for it for {}", self.keep),
        }
    }

    fn reason(&self) -> String {
        match self.cause {
            StopCause::Idle => self.because(),
            StopCause::Replaced | StopCause::RolledBack => {
                format!("{}, {} ago", self.because(), self.keep)
            }
        }
    }
}

/// What a deployment's state knows of scheduled stops.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct StopPlan {
    /// The stop that will happen, if nothing is decided before.
    pub pending: Option<StopScheduled>,
    /// The newest nonce: what it was given for is decided.
    last: Option<EventId>,
    /// The newest route table that was decided about.
    table: u32,
    /// Why the timer stopped it, as long as that is why it is stopped.
    fired: Option<StopScheduled>,
}

impl StopPlan {
    /// The scheduled stop that it was stopped by, as long as it is.
    pub fn stopped_by(&self) -> Option<&StopScheduled> {
        self.fired.as_ref()
    }

    /// Whether a stop of this kind was decided before, or something newer was.
    pub(crate) fn knows(&self, e: &StopScheduled) -> bool {
        self.last == Some(e.nonce) || e.table.is_some_and(|table| table <= self.table)
    }

    /// Whether this nonce is the one that counts.
    pub(crate) fn waits_for(&self, nonce: EventId) -> bool {
        self.pending.as_ref().is_some_and(|p| p.nonce == nonce)
    }

    pub(crate) fn schedule(&mut self, e: StopScheduled) {
        self.last = Some(e.nonce);
        self.table = e.table.unwrap_or_default().max(self.table);
        self.pending = Some(e);
    }

    pub(crate) fn unschedule(&mut self, e: &StopUnscheduled) {
        self.table = e.table.unwrap_or_default().max(self.table);
        if self.waits_for(e.nonce) {
            self.pending = None;
        }
    }

    /// Its deployment has entered another status by an event with this id.
    pub(crate) fn entered(&mut self, status: Status, event: EventId) {
        match status {
            Status::Deploying | Status::Started | Status::PartiallyStarted => self.fired = None,
            Status::Stopping => {
                let fired = |p: &StopScheduled| [p.nonce, p.nonce.in_its_stead()].contains(&event);
                self.fired = self.pending.take().filter(fired);
            }
            Status::Stopped => {}
            _ => (self.pending, self.fired) = (None, None),
        }
    }
}

/// Whether a deployment has traffic of its service: it is the main one, or gets a share of an
/// address that is not its own preview or its branch's.
pub fn has_traffic(routing: &Routing, instance: &InstanceRef, id: DeploymentId) -> bool {
    let main = routing.traffic(instance).and_then(|t| t.main) == Some(id);
    main || routing.hostnames_of(id).into_iter().any(|(_, route)| {
        is_service_address(route.stickiness)
            && route
                .backends
                .iter()
                .any(|b| b.deployment == id && b.weight > 0)
    })
}

/// Whether an address is one that the users of a service know.
pub fn is_service_address(stickiness: Stickiness) -> bool {
    !matches!(stickiness, Stickiness::Deployment | Stickiness::Branch)
}

/// The nonce of what a deployment waits for.
pub fn nonce_of(state: &Deployment) -> Option<EventId> {
    match state.status {
        Status::AwaitingApproval => state.approval.as_ref().map(|a| a.nonce),
        Status::Requested | Status::Packaging => state.held().map(|hold| hold.nonce),
        _ => state.stops.pending.as_ref().map(|p| p.nonce),
    }
}

/// Decides on a timer that is due: a scheduled stop, or the end of waiting for approvals. What was superseded, or is not due yet, comes to
/// nothing; what has traffic is kept.
pub fn fire(
    state: Option<&Deployment>,
    nonce: EventId,
    now: Timestamp,
    has_traffic: bool,
) -> Result<Decision<DeploymentEvent>, Refusal> {
    let approval = state.and_then(|s| s.approval.as_ref());
    if let (Some(s), Some(approval)) = (state, approval)
        && s.status == Status::AwaitingApproval
        && approval.nonce == nonce
        && approval.expires.is_some_and(|expires| expires <= now)
    {
        return decide(state, DeploymentEvent::Failed(approval.expired()));
    }
    let pending = state.and_then(|s| s.stops.pending.as_ref());
    let Some(pending) = pending.filter(|p| p.nonce == nonce && p.due <= now) else {
        return Ok(Decision::Nothing);
    };
    if has_traffic && pending.cause != StopCause::Idle {
        let kept = StopUnscheduled {
            nonce,
            cause: KeepCause::Traffic,
            table: None,
            reason: None,
        };
        return decide(state, DeploymentEvent::StopUnscheduled(kept));
    }
    if state.is_none_or(|s| s.status != Status::Started) {
        return Ok(Decision::Nothing);
    }
    let reason = Some(pending.reason());
    decide(
        state,
        DeploymentEvent::StopRequested(OperationRequested { reason }),
    )
}

/// Decides to keep a deployment whose stop is scheduled.
pub fn keep(
    state: Option<&Deployment>,
    cause: KeepCause,
    table: Option<u32>,
    reason: Option<String>,
) -> Result<Decision<DeploymentEvent>, Refusal> {
    let Some(pending) = state.and_then(|s| s.stops.pending.as_ref()) else {
        return match (state, cause) {
            (Some(_), KeepCause::Asked) => Err(Refusal::new(
                "no_stop_scheduled",
                "no stop of the deployment is scheduled",
                "there is nothing to do; `daybook status` shows which stops are",
            )),
            (Some(_), KeepCause::Traffic) => Ok(Decision::Nothing),
            (None, _) => Err(crate::deployment::not_found()),
        };
    };
    let kept = StopUnscheduled {
        nonce: pending.nonce,
        cause,
        table,
        reason,
    };
    decide(state, DeploymentEvent::StopUnscheduled(kept))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_read_and_written() {
        for (text, seconds) in [
            ("30m", 1800),
            ("24h", 86_400),
            ("45s", 45),
            ("0s", 0),
            ("7d", 604_800),
        ] {
            let keep: KeepFor = text.parse().unwrap();
            assert_eq!(keep, KeepFor::Seconds(seconds));
            assert_eq!(keep.to_string(), text);
        }
        assert_eq!("1800s".parse(), Ok(KeepFor::OLD));
        assert_eq!("1d".parse(), Ok(KeepFor::IDLE));
        assert_eq!("never".parse(), Ok(KeepFor::Never));
        for bad in [
            "",
            "m",
            "30",
            "-1m",
            "1.5h",
            "366d",
            "9999999999s",
            "30 m",
            "30µ",
            "Never",
        ] {
            assert!(bad.parse::<KeepFor>().is_err(), "{bad}");
        }
    }
}
