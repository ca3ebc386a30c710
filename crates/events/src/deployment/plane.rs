//! The planes on which an address is looked at from where users are, each for itself: a name that
//! resolves is not yet served, and a certificate that is valid is not yet that of this deployment.
//!
//! What is kept is the newest of what was recorded of each plane. A look that shows what is known
//! already is no event.

use std::fmt;

use jiff::Timestamp;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{Deployment, ReadinessState, Status, set};
use crate::names::Hostname;

/// What is between a user and a deployment, from what was decided to what answers.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, JsonSchema,
)]
#[serde(rename_all = "snake_case")]
pub enum Plane {
    /// What the ledger says: whose the hostname is, and where it leads.
    Metadata,
    /// What the gateways that serve it say that they have applied.
    Route,
    /// What its name resolves to.
    Dns,
    /// The certificate that is shown for it.
    Tls,
    /// Who answers for it.
    Http,
}

impl Plane {
    /// All planes, in the order in which a request meets them.
    pub const ALL: [Self; 5] = [
        Self::Metadata,
        Self::Route,
        Self::Dns,
        Self::Tls,
        Self::Http,
    ];

    /// The plane as one word.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Metadata => "metadata",
            Self::Route => "route",
            Self::Dns => "dns",
            Self::Tls => "tls",
            Self::Http => "http",
        }
    }

    /// The plane as people write it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Metadata => "metadata",
            Self::Route => "route object",
            Self::Dns => "DNS",
            Self::Tls => "TLS",
            Self::Http => "HTTP",
        }
    }
}

/// What was found on a plane.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum PlaneState {
    /// It is as it should be.
    Ok,
    /// There is no usable answer.
    Failing,
    /// There is one, and it names something else than what is expected.
    Drifted,
    /// It was not asked, or could not be.
    Unknown,
}

impl PlaneState {
    /// The state as one word.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::Failing => "failing",
            Self::Drifted => "drifted",
            Self::Unknown => "unknown",
        }
    }

    /// Whether users are kept from the deployment, or brought elsewhere.
    pub fn is_bad(self) -> bool {
        matches!(self, Self::Failing | Self::Drifted)
    }
}

impl fmt::Display for PlaneState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// What was seen of one plane.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct PlaneSeen {
    /// The plane.
    pub plane: Plane,
    /// What was found.
    pub state: PlaneState,
    /// Why, in one word: `Resolves`, `WrongAddress`, `CertificateExpired`.
    pub reason: String,
    /// A sentence, if there is more to say.
    pub message: Option<String>,
    /// What should be there: addresses, a name, a deployment.
    pub expected: Option<String>,
    /// What was there.
    pub actual: Option<String>,
    /// When the certificate ends that was shown.
    #[serde(with = "crate::instant::option")]
    #[schemars(with = "Option<Timestamp>")]
    pub expires: Option<Timestamp>,
}

impl PlaneSeen {
    /// The reason of a hostname that leads to the deployment no more, or is looked at no more.
    pub const NOT_LOOKED_AT: &str = "NotLookedAt";

    /// Something seen of a plane, without more to say.
    pub fn new(plane: Plane, state: PlaneState, reason: &str) -> Self {
        Self {
            plane,
            state,
            reason: reason.to_owned(),
            message: None,
            expected: None,
            actual: None,
            expires: None,
        }
    }

    /// Whether this says something that was not known. What is as it should be may be so in many
    /// ways: a name may resolve to one of several right addresses, now to this one and now to that.
    pub fn is_news_after(&self, known: Option<&Self>) -> bool {
        let Some(known) = known else {
            return true;
        };
        let same_actual = !self.state.is_bad() || self.actual == known.actual;
        !(self.state == known.state
            && self.reason == known.reason
            && self.expected == known.expected
            && self.expires == known.expires
            && same_actual)
    }

    fn is_not_looked_at(&self) -> bool {
        self.state == PlaneState::Unknown && self.reason == Self::NOT_LOOKED_AT
    }
}

/// What a plane was, and is seen to be.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct PlaneChange {
    /// What it was; none if it was not looked at before.
    pub before: Option<PlaneState>,
    /// What it is.
    pub now: PlaneSeen,
}

/// An address was looked at from where users are, and is not what it was on some planes: one has
/// drifted or fails, or is as it should be again.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct EndpointPlanesChanged {
    /// The hostname.
    pub hostname: Hostname,
    /// The planes that have changed, each once.
    pub changes: Vec<PlaneChange>,
}

/// What is known of a plane.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PlaneKnown {
    /// What was recorded last.
    pub seen: PlaneSeen,
    /// Since when it is in its state.
    #[serde(with = "crate::instant")]
    pub since: Timestamp,
}

/// What is known of the planes of one hostname, at most one entry for each plane, in their order.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Planes(Vec<PlaneKnown>);

impl Planes {
    /// What is known of a plane.
    pub fn get(&self, plane: Plane) -> Option<&PlaneKnown> {
        self.0.iter().find(|known| known.seen.plane == plane)
    }

    /// All that is known.
    pub fn iter(&self) -> impl Iterator<Item = &PlaneKnown> {
        self.0.iter()
    }

    fn take(&mut self, seen: PlaneSeen, at: Timestamp) {
        match self.0.binary_search_by_key(&seen.plane, |k| k.seen.plane) {
            Ok(place) => {
                let known = &mut self.0[place];
                if known.seen.state != seen.state {
                    known.since = at;
                }
                known.seen = seen;
            }
            Err(place) => self.0.insert(place, PlaneKnown { seen, since: at }),
        }
    }
}

/// What of an event is news to a deployment: none of it, if that is nothing.
pub(super) fn news(
    state: &Deployment,
    event: EndpointPlanesChanged,
) -> Option<EndpointPlanesChanged> {
    let known = state.planes.get(&event.hostname);
    let mut changes: Vec<PlaneChange> = Vec::new();
    for change in event.changes {
        let plane = change.now.plane;
        let before = known.and_then(|k| k.get(plane)).map(|k| &k.seen);
        let nothing_known = before.is_none() && change.now.is_not_looked_at();
        let twice = changes.iter().any(|c| c.now.plane == plane);
        if !nothing_known && !twice && change.now.is_news_after(before) {
            changes.push(PlaneChange {
                before: before.map(|b| b.state),
                now: change.now,
            });
        }
    }
    (!changes.is_empty()).then_some(EndpointPlanesChanged {
        hostname: event.hostname,
        changes,
    })
}

pub(super) fn fold(state: &mut Deployment, event: EndpointPlanesChanged, at: Timestamp) {
    let mut planes = state.planes.remove(&event.hostname).unwrap_or_default();
    for change in event.changes {
        planes.take(change.now, at);
    }
    if !planes.iter().all(|known| known.seen.is_not_looked_at()) {
        state.planes.insert(event.hostname, planes);
    }
    // Of what is stopped it is known that nobody reaches it.
    if !matches!(
        state.status,
        Status::Stopping | Status::Stopped | Status::Starting
    ) {
        judge(state, at);
    }
}

/// Whether users reach the deployment: what was seen from where they are counts for more than what
/// the gateway was asked by itself.
pub(super) fn judge(state: &mut Deployment, at: Timestamp) {
    let all = || {
        let hosts = state.planes.iter();
        hosts.flat_map(|(host, planes)| planes.iter().map(move |known| (host, &known.seen)))
    };
    let bad = all().find(|(_, seen)| seen.state.is_bad());
    let reached = all().find(|(_, s)| s.plane == Plane::Http && s.state == PlaneState::Ok);
    let asked = state
        .last_asked
        .as_ref()
        .and_then(|host| state.endpoints.get(host));
    let (ready, reason, message, host) = match (bad, reached, asked) {
        (Some((host, seen)), _, _) => {
            let what = seen.message.as_deref().unwrap_or(&seen.reason);
            let message = format!("{host}: {}: {what}", seen.plane.name());
            let reason = bad_reason(seen);
            (false, reason, Some(message), host.clone())
        }
        (None, Some((host, _)), _) => (true, "Reachable", None, host.clone()),
        (None, None, Some(asked)) => {
            let reason = if asked.ready {
                "Reachable"
            } else {
                "Unreachable"
            };
            let message = asked.message.clone();
            (asked.ready, reason, message, asked.hostname.clone())
        }
        (None, None, None) => return,
    };
    let answer = if ready {
        ReadinessState::Ready
    } else {
        ReadinessState::NotReady
    };
    let host = Some(host.to_string());
    set(
        &mut state.endpoint_readiness,
        answer,
        reason,
        message,
        at,
        host,
    );
}

/// The plane and what is the matter with it, in one word.
fn bad_reason(seen: &PlaneSeen) -> &'static str {
    match (seen.plane, seen.state) {
        (Plane::Metadata, PlaneState::Drifted) => "MetadataDrifted",
        (Plane::Metadata, _) => "MetadataFailing",
        (Plane::Route, PlaneState::Drifted) => "RouteDrifted",
        (Plane::Route, _) => "RouteFailing",
        (Plane::Dns, PlaneState::Drifted) => "DnsDrifted",
        (Plane::Dns, _) => "DnsFailing",
        (Plane::Tls, PlaneState::Drifted) => "TlsDrifted",
        (Plane::Tls, _) => "TlsFailing",
        (Plane::Http, PlaneState::Drifted) => "HttpDrifted",
        (Plane::Http, _) => "HttpFailing",
    }
}
