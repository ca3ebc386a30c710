//! Webhooks out: what of a project's events is sent to whom, and what could not be sent.
//!
//! Each subscription is an aggregate of its own. Its events say what people decided (made,
//! changed, paused, resumed, given a new secret, deleted, what to send again) and what an auditor
//! has to know of deliveries (what was set aside undelivered, and what was delivered after all).
//! Each single delivery is no event: the tries are lines of the subscription's
//! [delivery log](delivery), from which whoever delivers also knows how far it is.

pub mod delivery;

use std::collections::BTreeMap;

use jiff::Timestamp;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::aggregate::{Aggregate, At, Decision, Illegal, Refusal, events};
use crate::envelope::Payload;
use crate::log::Position;
use crate::names::{
    DeploymentId, EnvKey, EnvironmentName, EventId, InvalidName, ServiceName, SubscriptionId,
    validated,
};
use crate::secret::{SecretId, SecretRef, SecretScope};
use crate::subject::AggregateKind;

validated! {
    /// Where events are sent: an `https` or `http` URL without user, query and fragment, because it
    /// is kept in the ledger for ever.
    EndpointUrl, "webhook URL", "invalid_webhook_url",
    pattern = "^https?://[^\\s?#@]+$", |s| {
        if s.is_empty() || s.len() > 1024 {
            return Err("it must have 1 to 1024 characters");
        }
        if s.chars().any(|c| c.is_control() || c.is_whitespace() || c == '\\') {
            return Err("white space, control characters and backslashes are not allowed");
        }
        let Ok(url) = url::Url::parse(s) else {
            return Err("it must be a URL such as https://example.com/deployments");
        };
        if !matches!(url.scheme(), "https" | "http") || !s.contains("://") {
            return Err("only https and http URLs are allowed");
        }
        let no_host = s.split_once("://").is_none_or(|(_, rest)| rest.starts_with('/'));
        if no_host || url.host_str().is_none_or(str::is_empty) {
            return Err("it has no host");
        }
        if !url.username().is_empty() || url.password().is_some() {
            return Err("it must not contain a user or password: deliveries are signed instead");
        }
        if url.query().is_some() || url.fragment().is_some() {
            return Err("a query or fragment is not allowed: the ledger keeps it for ever");
        }
        Ok(())
    }
}

validated! {
    /// An event type without the common prefix (`deployment.succeeded.v1`), or the name of an
    /// aggregate, which stands for all its types (`deployment`).
    KindPattern, "event type", "invalid_event_type",
    pattern = "^[a-z_]{1,40}(\\.[a-z_]{1,60}\\.v[0-9]{1,4})?$", |s| {
        let rule = Err("it must be a type such as deployment.succeeded.v1, or an aggregate");
        let word = |s: &str, max| {
            (1..=max).contains(&s.len()) && s.bytes().all(|b| b.is_ascii_lowercase() || b == b'_')
        };
        let mut parts = s.split('.');
        match (parts.next(), parts.next(), parts.next(), parts.next()) {
            (Some(family), None, None, None) if word(family, 40) => Ok(()),
            (Some(family), Some(fact), Some(version), None)
                if word(family, 40)
                    && word(fact, 60)
                    && version.strip_prefix('v').is_some_and(|n| {
                        (1..=4).contains(&n.len()) && n.bytes().all(|b| b.is_ascii_digit())
                    }) =>
            {
                Ok(())
            }
            _ => rule,
        }
    }
}

impl KindPattern {
    /// The name of the aggregate.
    pub fn family(&self) -> &str {
        self.as_str().split('.').next().unwrap_or_default()
    }

    /// Whether an event of this type (without the common prefix) is meant.
    pub fn fits(&self, kind: &str) -> bool {
        let pattern = self.as_str();
        pattern == kind
            || (!pattern.contains('.')
                && kind
                    .strip_prefix(pattern)
                    .is_some_and(|rest| rest.starts_with('.')))
    }
}

/// The form in which events are sent.
#[derive(
    Debug,
    Clone,
    Copy,
    PartialEq,
    Eq,
    PartialOrd,
    Ord,
    Hash,
    Default,
    Serialize,
    Deserialize,
    JsonSchema,
)]
#[serde(rename_all = "snake_case")]
pub enum Format {
    /// As they are stored: CloudEvents in structured mode.
    #[default]
    Cloudevents,
    /// What they mean in the words of CDEvents. Events that mean nothing there are not sent.
    Cdevents,
}

impl Format {
    /// Its name.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Cloudevents => "cloudevents",
            Self::Cdevents => "cdevents",
        }
    }
}

/// Which events of the project are sent; all that is given must fit.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
pub struct Filter {
    /// Of this environment. Builds, commits and route tables belong to none.
    #[serde(default)]
    pub environment: Option<EnvironmentName>,
    /// About this service.
    #[serde(default)]
    pub service: Option<ServiceName>,
    /// Of one of these types; all if there is none.
    #[serde(default)]
    pub kinds: Vec<KindPattern>,
    /// Of this deployment and of the run that it began.
    #[serde(default)]
    pub deployment: Option<DeploymentId>,
}

/// Where events go, which ones, and how.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Endpoint {
    /// Where they go.
    pub url: EndpointUrl,
    /// In which form.
    pub format: Format,
    /// Which ones.
    pub filter: Filter,
    /// Whether each carries the proof that it is in the signed ledger.
    pub proof: bool,
    /// How often each is tried before it is set aside.
    pub tries: u32,
}

/// A subscription was made. Its secret is in the secret store only.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Created {
    /// Its id.
    pub id: SubscriptionId,
    /// What it is.
    pub endpoint: Endpoint,
    /// Only events after this position are sent.
    pub after: Position,
    /// What its deliveries are signed with.
    pub secret: SecretRef,
}

/// It was defined anew. What was sent already is not sent again.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Changed {
    /// What it is from here on.
    pub endpoint: Endpoint,
}

/// It has another secret. Until a time, deliveries are signed with both.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct SecretRotated {
    /// The new one.
    pub secret: SecretRef,
    /// Until when the one before is used too.
    pub overlap_until: Timestamp,
}

/// Why nothing is sent any more.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, JsonSchema,
)]
#[serde(rename_all = "snake_case")]
pub enum PauseReason {
    /// Somebody asked for it.
    Asked,
    /// The receiver answered 410: it wants no more.
    Gone,
    /// Too much was set aside undelivered.
    Failing,
}

/// Nothing is sent until it is resumed. What comes meanwhile is sent then.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Paused {
    /// Why.
    pub reason: PauseReason,
}

/// It is sent again, from where it stopped.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Resumed {}

/// Somebody wants to see whether it works: this event itself is sent, whatever the filter says.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct TestRequested {}

/// An event could not be delivered and was set aside. Later ones are sent.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct EventDeadLettered {
    /// The event's position.
    pub position: Position,
    /// Its id.
    pub event: EventId,
    /// How often it was tried.
    pub tries: u32,
    /// What was wrong the last time, as a stable code: `status_500`, `timeout`.
    pub code: String,
}

/// What was set aside is to be sent again.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct ReplayRequested {
    /// The positions of the events.
    pub positions: Vec<Position>,
}

/// What was set aside was delivered after all.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct EventReplayed {
    /// The event's position.
    pub position: Position,
    /// Its id.
    pub event: EventId,
}

/// What was set aside is not wanted any more: it is never sent.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct DeadLettersDiscarded {
    /// The positions of the events.
    pub positions: Vec<Position>,
}

/// All events up to here are dealt with. Written seldom (once a day, and when sending ends): it
/// bounds what is sent twice once the delivery log is lost, or older than output is kept.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Progressed {
    /// The position.
    pub position: Position,
}

/// It was deleted, and its secrets are erased.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Deleted {}

events! {
    /// The events of a subscription.
    SubscriptionEvent {
        /// It was made.
        Created(Box<Created>) = "subscription.created.v1",
        /// It was defined anew.
        Changed(Box<Changed>) = "subscription.changed.v1",
        /// It has another secret.
        SecretRotated(Box<SecretRotated>) = "subscription.secret_rotated.v1",
        /// Nothing is sent.
        Paused(Paused) = "subscription.paused.v1",
        /// It is sent again.
        Resumed(Resumed) = "subscription.resumed.v1",
        /// This event itself is to be sent.
        TestRequested(TestRequested) = "subscription.test_requested.v1",
        /// An event was set aside undelivered.
        EventDeadLettered(EventDeadLettered) = "subscription.event_dead_lettered.v1",
        /// What was set aside is to be sent again.
        ReplayRequested(ReplayRequested) = "subscription.replay_requested.v1",
        /// What was set aside was delivered.
        EventReplayed(EventReplayed) = "subscription.event_replayed.v1",
        /// What was set aside is not wanted any more.
        DeadLettersDiscarded(DeadLettersDiscarded) = "subscription.dead_letters_discarded.v1",
        /// All up to a position is dealt with.
        Progressed(Progressed) = "subscription.progressed.v1",
        /// It was deleted.
        Deleted(Deleted) = "subscription.deleted.v1",
    }
}

/// An event that was set aside undelivered.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct DeadLetter {
    /// Its id.
    pub event: EventId,
    /// How often it was tried.
    pub tries: u32,
    /// What was wrong the last time.
    pub code: String,
    /// Since when.
    pub since: Timestamp,
    /// Whether it is to be sent again.
    pub replaying: bool,
}

/// That nothing is sent.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Pause {
    /// Why.
    pub reason: PauseReason,
    /// Since when.
    pub since: Timestamp,
}

/// The secret before the present one.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Previous {
    /// The secret.
    pub secret: SecretRef,
    /// Until when it is used too.
    pub until: Timestamp,
}

/// The state of a subscription.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Subscription {
    /// Its id.
    pub id: SubscriptionId,
    /// What is sent where.
    pub endpoint: Endpoint,
    /// Only events after this position are sent.
    pub after: Position,
    /// What deliveries are signed with.
    pub secret: SecretRef,
    /// The secret before that one.
    pub previous: Option<Previous>,
    /// Whether nothing is sent.
    pub pause: Option<Pause>,
    /// What was set aside undelivered, by position.
    pub dead: BTreeMap<Position, DeadLetter>,
    /// All events up to here are dealt with, at least.
    pub progress: Position,
    /// When that was said last.
    pub progress_at: Timestamp,
    /// When it was made.
    pub created_at: Timestamp,
    /// Whether it was deleted.
    pub deleted: bool,
}

/// The fewest and the most tries that a subscription may ask for.
pub const TRIES: std::ops::RangeInclusive<u32> = 1..=20;

/// The tries of a subscription that does not say how many.
pub const DEFAULT_TRIES: u32 = 16;

/// So many events can be set aside. With more to come, the subscription is paused.
pub const MAX_DEAD: usize = 200;

/// Most types that a filter can name.
pub const MAX_KINDS: usize = 20;

impl Subscription {
    /// The secret that the given version of a subscription's key is kept as. No variable of a
    /// deployment can be called so.
    pub fn secret_id(id: SubscriptionId, version: u32) -> Result<SecretId, InvalidName> {
        let id = id.0.simple().to_string().to_ascii_uppercase();
        Ok(SecretId {
            name: EnvKey::parse(format!("DAYBOOK_WEBHOOK_{id}_V{version}"))?,
            scope: SecretScope::default(),
        })
    }

    /// The secrets that a delivery at a time is signed with, the newest first.
    pub fn secrets_at(&self, now: Timestamp) -> impl Iterator<Item = &SecretRef> {
        let previous = self.previous.iter().filter(move |p| now < p.until);
        std::iter::once(&self.secret).chain(previous.map(|p| &p.secret))
    }

    /// Whether events are sent.
    pub fn is_active(&self) -> bool {
        !self.deleted && self.pause.is_none()
    }
}

impl Aggregate for Subscription {
    type Event = SubscriptionEvent;
    const KIND: AggregateKind = AggregateKind::Subscription;

    fn first(event: SubscriptionEvent, at: At) -> Result<Self, Illegal> {
        let SubscriptionEvent::Created(first) = event else {
            return Err(Illegal::new(event.kind(), "no subscription"));
        };
        Ok(Self {
            id: first.id,
            endpoint: first.endpoint,
            after: first.after,
            secret: first.secret,
            previous: None,
            pause: None,
            dead: BTreeMap::new(),
            progress: first.after,
            progress_at: at.time,
            created_at: at.time,
            deleted: false,
        })
    }

    fn apply(&mut self, event: SubscriptionEvent, at: At) -> Result<(), Illegal> {
        let kind = event.kind();
        if self.deleted {
            return Err(Illegal::new(kind, "a subscription that was deleted"));
        }
        match event {
            SubscriptionEvent::Created(_) => return Err(Illegal::new(kind, "a subscription")),
            SubscriptionEvent::Changed(e) => self.endpoint = e.endpoint,
            SubscriptionEvent::SecretRotated(e) => {
                if e.secret.version <= self.secret.version {
                    return Err(Illegal::new(kind, "a newer secret"));
                }
                let before = std::mem::replace(&mut self.secret, e.secret);
                self.previous = Some(Previous {
                    secret: before,
                    until: e.overlap_until,
                });
            }
            SubscriptionEvent::Paused(e) => {
                self.pause = Some(Pause {
                    reason: e.reason,
                    since: at.time,
                });
            }
            SubscriptionEvent::Resumed(_) => self.pause = None,
            SubscriptionEvent::TestRequested(_) => {}
            SubscriptionEvent::EventDeadLettered(e) => {
                let letter = DeadLetter {
                    event: e.event,
                    tries: e.tries,
                    code: e.code,
                    since: at.time,
                    replaying: false,
                };
                self.dead.insert(e.position, letter);
            }
            SubscriptionEvent::ReplayRequested(e) => {
                for position in e.positions {
                    if let Some(letter) = self.dead.get_mut(&position) {
                        letter.replaying = true;
                    }
                }
            }
            SubscriptionEvent::EventReplayed(e) => drop(self.dead.remove(&e.position)),
            SubscriptionEvent::DeadLettersDiscarded(e) => {
                for position in e.positions {
                    self.dead.remove(&position);
                }
            }
            SubscriptionEvent::Progressed(e) => {
                self.progress = self.progress.max(e.position);
                self.progress_at = at.time;
            }
            SubscriptionEvent::Deleted(_) => {
                self.deleted = true;
                self.dead.clear();
            }
        }
        Ok(())
    }
}

/// What can be asked of a subscription.
#[derive(Debug, Clone)]
pub enum Command {
    /// Make it.
    Create(Box<Created>),
    /// Define it anew.
    Change(Endpoint),
    /// Give it another secret.
    Rotate {
        /// The new one.
        secret: SecretRef,
        /// Until when the one before is used too.
        overlap_until: Timestamp,
    },
    /// Send nothing any more.
    Pause(PauseReason),
    /// Send again.
    Resume,
    /// Send the event that is made of this.
    Test,
    /// Set an event aside, or, if there is no room for it, pause.
    SetAside(EventDeadLettered),
    /// Send again what was set aside: these, or all.
    Replay(Option<Vec<Position>>),
    /// Never send what was set aside: these, or all.
    Discard(Option<Vec<Position>>),
    /// Note that an event was delivered after all.
    Replayed {
        /// Its position.
        position: Position,
        /// Its id.
        event: EventId,
    },
    /// Note that all up to a position is dealt with.
    Progress(Position),
    /// Delete it.
    Delete,
}

/// What is answered where there is no such subscription.
pub fn not_found() -> Refusal {
    Refusal::new(
        "webhook_not_found",
        "there is no such webhook",
        "`daybook webhook list` shows all of a project",
    )
}

fn check(endpoint: &Endpoint) -> Result<(), Refusal> {
    if !TRIES.contains(&endpoint.tries) {
        return Err(Refusal::new(
            "invalid_tries",
            format!("{} tries are not possible", endpoint.tries),
            format!("ask for {} to {}", TRIES.start(), TRIES.end()),
        ));
    }
    if endpoint.proof && endpoint.format != Format::Cloudevents {
        return Err(Refusal::new(
            "proof_needs_cloudevents",
            "a proof is of the event as it is stored, and not of its translation",
            "use the format cloudevents, or ask for no proof",
        ));
    }
    let kinds = &endpoint.filter.kinds;
    if kinds.len() > MAX_KINDS {
        return Err(Refusal::new(
            "too_many_kinds",
            format!("the filter names {} types", kinds.len()),
            format!("name at most {MAX_KINDS}, or whole aggregates such as `deployment`"),
        ));
    }
    match kinds
        .iter()
        .find(|k| k.family().parse::<AggregateKind>().is_err())
    {
        None => Ok(()),
        Some(unknown) => Err(Refusal::new(
            "unknown_kind",
            format!("there is no kind of event like {unknown}"),
            "use an event type such as deployment.succeeded.v1, or an aggregate such as deployment",
        )),
    }
}

/// The positions of what was set aside: those that are named, or all.
fn letters(state: &Subscription, wanted: Option<Vec<Position>>) -> Result<Vec<Position>, Refusal> {
    let Some(mut named) = wanted else {
        return Ok(state.dead.keys().copied().collect());
    };
    named.sort_unstable();
    named.dedup();
    match named.iter().find(|p| !state.dead.contains_key(p)) {
        None => Ok(named),
        Some(other) => Err(Refusal::new(
            "not_dead_lettered",
            format!("the event at {other} was not set aside"),
            "`daybook webhook show` lists what was",
        )),
    }
}

/// Decides on a subscription.
pub fn decide(
    state: Option<&Subscription>,
    command: Command,
) -> Result<Decision<SubscriptionEvent>, Refusal> {
    use SubscriptionEvent as E;
    let append = |event| Ok(Decision::Append(event));
    let state = match (state, command) {
        (None, Command::Create(created)) => {
            check(&created.endpoint)?;
            return append(E::Created(created));
        }
        (Some(_), Command::Create(_)) => {
            return Err(Refusal::new(
                "webhook_exists",
                "there is a webhook with this id",
                "make one with another id",
            ));
        }
        // Deleting twice is no mistake.
        (Some(s), Command::Delete) if s.deleted => return Ok(Decision::Nothing),
        (Some(s), command) if !s.deleted => (s, command),
        _ => return Err(not_found()),
    };
    match state {
        (s, Command::Change(endpoint)) => {
            check(&endpoint)?;
            if s.endpoint == endpoint {
                return Ok(Decision::Nothing);
            }
            append(E::Changed(Box::new(Changed { endpoint })))
        }
        (
            s,
            Command::Rotate {
                secret,
                overlap_until,
            },
        ) => {
            if secret.version != s.secret.version.saturating_add(1) {
                return Err(Refusal::new(
                    "stale_secret_version",
                    "the secret of the webhook was changed meanwhile",
                    "repeat the command",
                ));
            }
            append(E::SecretRotated(Box::new(SecretRotated {
                secret,
                overlap_until,
            })))
        }
        (s, Command::Pause(_)) if s.pause.is_some() => Ok(Decision::Nothing),
        (_, Command::Pause(reason)) => append(E::Paused(Paused { reason })),
        (s, Command::Resume) if s.pause.is_none() => Ok(Decision::Nothing),
        (_, Command::Resume) => append(E::Resumed(Resumed {})),
        (s, Command::Test) if s.pause.is_some() => Err(Refusal::new(
            "webhook_paused",
            "the webhook is paused, so nothing is sent",
            "resume it first with `daybook webhook resume`",
        )),
        (_, Command::Test) => append(E::TestRequested(TestRequested {})),
        (s, Command::SetAside(letter)) => {
            if s.dead.len() >= MAX_DEAD && !s.dead.contains_key(&letter.position) {
                return match s.pause {
                    Some(_) => Ok(Decision::Nothing),
                    None => append(E::Paused(Paused {
                        reason: PauseReason::Failing,
                    })),
                };
            }
            append(E::EventDeadLettered(letter))
        }
        (s, Command::Replay(wanted)) => match letters(s, wanted)? {
            positions if positions.is_empty() => Ok(Decision::Nothing),
            positions => append(E::ReplayRequested(ReplayRequested { positions })),
        },
        (s, Command::Discard(wanted)) => match letters(s, wanted)? {
            positions if positions.is_empty() => Ok(Decision::Nothing),
            positions => append(E::DeadLettersDiscarded(DeadLettersDiscarded { positions })),
        },
        (s, Command::Replayed { position, event }) => match s.dead.contains_key(&position) {
            true => append(E::EventReplayed(EventReplayed { position, event })),
            false => Ok(Decision::Nothing),
        },
        (s, Command::Progress(position)) if position <= s.progress => Ok(Decision::Nothing),
        (_, Command::Progress(position)) => append(E::Progressed(Progressed { position })),
        (_, Command::Delete) => append(E::Deleted(Deleted {})),
        (_, Command::Create(_)) => Err(not_found()),
    }
}
