//! Tokens of an identity provider (OpenID Connect): who it vouches for, and what they may do here.
//!
//! A token is a JWT that is signed with a key of the provider, for this audience, and has not ended.
//! Keys come from the provider's JWKS. A key says with which one algorithm it is used: a token that
//! names another one (`none`, or an HMAC made with the public key) is refused before anything is
//! computed.

mod keys;
mod verify;

use std::collections::BTreeSet;
use std::time::Duration;

use daybook_events::access::{AccountName, Grant, Projects, Role};
use daybook_events::{Actor, Digest};
use jiff::Timestamp;
use jsonwebtoken::errors::ErrorKind;
use jsonwebtoken::{Validation, decode, decode_header};
use serde::Deserialize;
use serde_json::{Map, Value};
use url::Url;

use super::control::{Refused, Unauthenticated};
use super::principal::{Credential, Principal};
use keys::Keys;

pub use keys::KeysError;

/// How far the clocks of the provider and of this server may differ.
const LEEWAY: Duration = Duration::from_secs(30);

/// An identity provider, and what its users may do. As it stands in a file.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct OidcConfig {
    /// The issuer, exactly as `iss` of its tokens says it.
    pub issuer: String,
    /// What `aud` of a token must name one of.
    pub audience: BTreeSet<String>,
    /// Where its keys are. Its discovery document says it, if not given.
    pub jwks_url: Option<String>,
    /// The claim that says who acts.
    #[serde(default = "default_account")]
    pub account_claim: String,
    /// Which claims give which roles. Whoever has none of them may do nothing.
    #[serde(default)]
    pub roles: Vec<RoleRule>,
}

/// A role for whoever has a claim.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RoleRule {
    /// The claim: its name, or a JSON pointer to it (`/realm_access/roles`).
    pub claim: String,
    /// What it must be, or have among its values.
    pub value: String,
    /// The role.
    pub role: Role,
    /// Where: `"all"`, or `{ named = ["shop"] }`.
    pub projects: Projects,
}

fn default_account() -> String {
    "sub".into()
}

/// A configuration that cannot be.
#[derive(Debug, thiserror::Error)]
pub enum OidcConfigError {
    /// The issuer is no address, or its keys could be replaced on the way.
    #[error("the issuer and the address of its keys must be https URLs")]
    Insecure,
    /// Nobody is meant.
    #[error("there must be an audience: without one, tokens for other services would be taken")]
    NoAudience,
    /// The client for fetching keys cannot be made.
    #[error("no HTTP client can be made")]
    Client(#[source] reqwest::Error),
}

/// Knows the users of an identity provider.
#[derive(Debug)]
pub struct Oidc {
    config: OidcConfig,
    keys: Keys,
}

impl Oidc {
    /// For a provider. Nothing is fetched before the first token comes.
    pub fn new(config: OidcConfig) -> Result<Self, OidcConfigError> {
        let safe = |text: &String| Url::parse(text).ok().filter(keys::is_safe);
        safe(&config.issuer).ok_or(OidcConfigError::Insecure)?;
        let jwks_url = match &config.jwks_url {
            Some(text) => Some(safe(text).ok_or(OidcConfigError::Insecure)?),
            None => None,
        };
        if config.audience.is_empty() {
            return Err(OidcConfigError::NoAudience);
        }
        verify::install();
        let keys = Keys::new(config.issuer.clone(), jwks_url).map_err(OidcConfigError::Client)?;
        Ok(Self { config, keys })
    }

    /// Who a token is of.
    pub(super) async fn principal(&self, text: &str) -> Result<Principal, Refused> {
        let header = decode_header(text).map_err(|_| Unauthenticated::Malformed)?;
        let key = self.keys.find(header.kid.as_deref()).await?;
        let key = key.ok_or(Unauthenticated::Unknown)?;
        // One algorithm, the key's own: whatever else the token names is refused.
        let mut validation = Validation::new(key.algorithm);
        validation.leeway = LEEWAY.as_secs();
        validation.validate_nbf = true;
        validation.set_issuer(&[&self.config.issuer]);
        let audience: Vec<_> = self.config.audience.iter().collect();
        validation.set_audience(&audience);
        validation.set_required_spec_claims(&["exp", "iss", "aud", "sub"]);
        let claims = decode::<Map<String, Value>>(text, &key.key, &validation)
            .map_err(|e| match e.kind() {
                ErrorKind::ExpiredSignature => Unauthenticated::Expired,
                _ => Unauthenticated::Unknown,
            })?
            .claims;
        let until = claims
            .get("exp")
            .and_then(Value::as_f64)
            .and_then(|exp| Timestamp::from_second(exp as i64).ok())
            .and_then(|exp| exp.checked_add(LEEWAY).ok())
            .ok_or(Unauthenticated::Unknown)?;
        let actor = Actor {
            kind: "user".into(),
            id: self.account(&claims),
        };
        let grants = self.grants(&claims);
        Ok(Principal::new(
            Some(actor),
            grants,
            Credential::Vouched(until),
        ))
    }

    /// Who acts, as events may say it: a name, or what stands for one.
    fn account(&self, claims: &Map<String, Value>) -> String {
        let text = |claim: &str| claims.get(claim).and_then(Value::as_str);
        let named = text(&self.config.account_claim).unwrap_or_default();
        match AccountName::parse(named) {
            Ok(name) => name.to_string(),
            // It may be anything, an address too.
            Err(_) => {
                let subject = text("sub").unwrap_or_default();
                let digest = Digest::of(format!("{}\n{subject}", self.config.issuer).as_bytes());
                format!("oidc-{}", &digest.hex()[..16])
            }
        }
    }

    fn grants(&self, claims: &Map<String, Value>) -> Vec<Grant> {
        let holds = |rule: &&RoleRule| {
            let found = match rule.claim.strip_prefix('/') {
                Some(path) => {
                    let mut parts = path.split('/');
                    let first = parts.next().and_then(|part| claims.get(part));
                    parts.fold(first, |value, part| value.and_then(|v| v.get(part)))
                }
                None => claims.get(&rule.claim),
            };
            match found {
                Some(Value::String(text)) => *text == rule.value,
                Some(Value::Array(values)) => values.iter().any(|v| *v == rule.value),
                _ => false,
            }
        };
        let rules = self.config.roles.iter().filter(holds);
        rules
            .map(|rule| Grant {
                role: rule.role,
                projects: rule.projects.clone(),
            })
            .collect()
    }
}
