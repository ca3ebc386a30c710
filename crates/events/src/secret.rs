//! Secret variables, as far as the ledger knows them: names, scopes, versions and commitments,
//! never values.
//!
//! A commitment is an HMAC-SHA256 over what the secret is called and its value, under a random key
//! of the project that is kept outside the ledger. Under one key, equal commitments of one secret
//! mean equal values and different ones different values; without the key a commitment says
//! nothing, not even to somebody who can guess the value. Erasing the key makes all of them
//! meaningless for good.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use jiff::Timestamp;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::aggregate::Refusal;
use crate::log::Position;
use crate::names::{EnvKey, EnvironmentName, InstanceRef, InvalidName, ServiceName};

/// Whom a secret is for: everything in its project, or only one environment, one service, or one
/// service in one environment.
#[derive(
    Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize, JsonSchema,
)]
#[serde(deny_unknown_fields)]
pub struct SecretScope {
    /// Only this environment.
    #[serde(default)]
    pub environment: Option<EnvironmentName>,
    /// Only this service.
    #[serde(default)]
    pub service: Option<ServiceName>,
}

impl SecretScope {
    /// Whether a deployment of this instance gets secrets of this scope.
    pub fn includes(&self, instance: &InstanceRef) -> bool {
        self.environment
            .as_ref()
            .is_none_or(|e| *e == instance.environment)
            && self.service.as_ref().is_none_or(|s| *s == instance.service)
    }

    /// Of two secrets of one name the one with the higher rank wins: that of the service in the
    /// environment before that of the service, of the environment, and of the project.
    pub fn rank(&self) -> u8 {
        2 * u8::from(self.service.is_some()) + u8::from(self.environment.is_some())
    }
}

impl fmt::Display for SecretScope {
    /// `project`, `environment production`, `service web`, or `service web in production`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (&self.environment, &self.service) {
            (None, None) => f.write_str("project"),
            (Some(e), None) => write!(f, "environment {e}"),
            (None, Some(s)) => write!(f, "service {s}"),
            (Some(e), Some(s)) => write!(f, "service {s} in {e}"),
        }
    }
}

/// A secret variable of a project.
#[derive(
    Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, JsonSchema,
)]
pub struct SecretId {
    /// The environment variable that it becomes.
    pub name: EnvKey,
    /// Whom it is for.
    pub scope: SecretScope,
}

impl fmt::Display for SecretId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ({})", self.name, self.scope)
    }
}

/// A keyed commitment to a value: `hmac-sha256:` and 64 lowercase hexadecimal digits.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Commitment(String);

const COMMITMENT_PREFIX: &str = "hmac-sha256:";

impl Commitment {
    /// The commitment with this HMAC.
    pub fn from_hmac(mac: &[u8; 32]) -> Self {
        use fmt::Write as _;
        let mut text = String::from(COMMITMENT_PREFIX);
        for byte in mac {
            let _ = write!(text, "{byte:02x}");
        }
        Self(text)
    }

    /// The commitment as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for Commitment {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}
impl fmt::Debug for Commitment {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}
impl TryFrom<String> for Commitment {
    type Error = InvalidName;
    fn try_from(text: String) -> Result<Self, InvalidName> {
        let hex = text.strip_prefix(COMMITMENT_PREFIX);
        let fits = hex.is_some_and(|h| {
            h.len() == 64 && h.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'))
        });
        if fits {
            Ok(Self(text))
        } else {
            Err(InvalidName {
                what: "commitment",
                code: "invalid_commitment",
                value: text.chars().take(80).collect(),
                rule: "it must be hmac-sha256: and 64 lowercase hexadecimal digits",
            })
        }
    }
}
impl From<Commitment> for String {
    fn from(c: Commitment) -> String {
        c.0
    }
}
impl JsonSchema for Commitment {
    fn schema_name() -> std::borrow::Cow<'static, str> {
        "Commitment".into()
    }
    fn json_schema(_: &mut schemars::SchemaGenerator) -> schemars::Schema {
        schemars::json_schema!({
            "type": "string",
            "pattern": "^hmac-sha256:[0-9a-f]{64}$",
            "description": "HMAC-SHA256 under a key of the project that is not in the ledger"
        })
    }
}

/// One version of one secret: what a deployment runs with, and what a GitOps repository says in
/// place of a value.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
pub struct SecretRef {
    /// The secret's name.
    pub secret: EnvKey,
    /// Whom it is for.
    #[serde(default)]
    pub scope: SecretScope,
    /// Its version.
    pub version: u32,
    /// What the ledger holds of that version's value.
    pub commitment: Commitment,
}

impl SecretRef {
    /// The secret that it is a version of.
    pub fn id(&self) -> SecretId {
        SecretId {
            name: self.secret.clone(),
            scope: self.scope.clone(),
        }
    }
}

/// A secret was given a value, which is not in here.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct SecretSet {
    /// The secret.
    #[serde(flatten)]
    pub secret: SecretId,
    /// 1 for its first value, and one more for each other value.
    pub version: u32,
    /// What the ledger holds of the value.
    pub commitment: Commitment,
    /// The key that the commitment was made under: commitments under different keys say nothing
    /// about each other.
    pub key: Uuid,
}

/// A secret was taken away: later deployments do not get it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct SecretUnset {
    /// The secret.
    #[serde(flatten)]
    pub secret: SecretId,
    /// Its last version.
    pub version: u32,
}

/// All secrets of a project were taken away, and their values with the keys of their commitments
/// were ordered to be erased. The commitments stay in the ledger and say nothing any more.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct SecretsErased {
    /// The keys that the newest versions of the project's secrets were committed under.
    pub keys: BTreeSet<Uuid>,
}

/// What is known of a secret.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Secret {
    /// Its name and scope.
    pub id: SecretId,
    /// Its newest version. Numbers go on where they were when it is set again.
    pub version: u32,
    /// What the ledger holds of the newest version's value.
    pub commitment: Commitment,
    /// The key of the commitment.
    pub key: Uuid,
    /// Whether it is set: later deployments get it.
    pub is_set: bool,
    /// When it was last set or unset.
    pub changed_at: Timestamp,
    /// The event that did.
    pub changed_by: Position,
}

impl Secret {
    /// A reference to the newest version.
    pub fn newest(&self) -> SecretRef {
        SecretRef {
            secret: self.id.name.clone(),
            scope: self.id.scope.clone(),
            version: self.version,
            commitment: self.commitment.clone(),
        }
    }
}

/// What a deployment of an instance gets now, by variable.
pub fn applicable(secrets: &[Secret], instance: &InstanceRef) -> BTreeMap<EnvKey, SecretRef> {
    let mut chosen: BTreeMap<EnvKey, &Secret> = BTreeMap::new();
    for secret in secrets
        .iter()
        .filter(|s| s.is_set && s.id.scope.includes(instance))
    {
        let best = chosen.entry(secret.id.name.clone()).or_insert(secret);
        if secret.id.scope.rank() > best.id.scope.rank() {
            *best = secret;
        }
    }
    chosen.into_iter().map(|(k, s)| (k, s.newest())).collect()
}

/// Variables that Daybook or the system sets, which no secret may take over.
pub fn check_name(name: &EnvKey) -> Result<(), Refusal> {
    let reserved =
        matches!(name.as_str(), "PORT" | "HOST" | "PATH") || name.as_str().starts_with("DAYBOOK_");
    if reserved {
        return Err(Refusal::new(
            "reserved_secret_name",
            format!("{name} is set by Daybook itself and cannot be a secret"),
            "choose another name",
        ));
    }
    Ok(())
}
