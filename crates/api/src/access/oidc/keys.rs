//! The keys of an identity provider, as it publishes them.

use std::collections::HashMap;
use std::sync::{Arc, PoisonError, RwLock};
use std::time::{Duration, Instant};

use futures_util::StreamExt as _;
use jsonwebtoken::jwk::{AlgorithmParameters, EllipticCurve, Jwk, PublicKeyUse};
use jsonwebtoken::{Algorithm, DecodingKey};
use serde::Deserialize;
use serde::de::DeserializeOwned;
use url::Url;

/// After this time the keys are fetched again: one that was withdrawn is taken no longer than that.
const FRESH: Duration = Duration::from_secs(600);
/// As long as the provider cannot be reached, its last keys are taken at most this long.
const STALE_MAX: Duration = Duration::from_secs(24 * 3600);
/// However many tokens with unknown keys come, the keys are fetched once in this time.
const PAUSE: Duration = Duration::from_secs(3);
/// How long the provider may take to answer.
const PATIENCE: Duration = Duration::from_secs(5);
/// Most bytes of what it answers.
const ANSWER_MAX: usize = 1024 * 1024;

/// Why the keys are not known.
#[derive(Debug, thiserror::Error)]
pub enum KeysError {
    /// The provider does not answer.
    #[error("the identity provider cannot be asked for its keys")]
    Fetch(#[source] reqwest::Error),
    /// It answers something else.
    #[error("the identity provider's answer is not what it should be: {0}")]
    Answer(&'static str),
    /// It failed a moment ago, and is not asked again so soon.
    #[error("the identity provider could not be asked for its keys a moment ago")]
    Recently,
}

/// A key, with the one algorithm that it is used with.
#[derive(Debug, Clone)]
pub(super) struct Key {
    pub(super) algorithm: Algorithm,
    pub(super) key: DecodingKey,
}

#[derive(Debug)]
struct Fetched {
    at: Instant,
    keys: HashMap<String, Key>,
    /// The key of a provider that has a single one and does not name it.
    nameless: Option<Key>,
}

/// The keys of a provider, fetched when they are needed.
#[derive(Debug)]
pub(super) struct Keys {
    issuer: String,
    jwks_url: Option<Url>,
    http: reqwest::Client,
    fetched: RwLock<Option<Arc<Fetched>>>,
    /// When the provider was last asked. Held while it is asked, so that one asks for all.
    asked: tokio::sync::Mutex<Option<Instant>>,
}

#[derive(Deserialize)]
struct Discovery {
    issuer: String,
    jwks_uri: String,
}

/// Whether nobody on the way can answer for this address.
pub(super) fn is_safe(url: &Url) -> bool {
    let loopback = match url.host() {
        Some(url::Host::Ipv4(ip)) => ip.is_loopback(),
        Some(url::Host::Ipv6(ip)) => ip.is_loopback(),
        Some(url::Host::Domain(name)) => name == "localhost",
        None => false,
    };
    url.scheme() == "https" || (url.scheme() == "http" && loopback)
}

impl Keys {
    pub(super) fn new(issuer: String, jwks_url: Option<Url>) -> Result<Self, reqwest::Error> {
        let http = reqwest::Client::builder()
            .connect_timeout(PATIENCE)
            .timeout(PATIENCE)
            .redirect(reqwest::redirect::Policy::none())
            .build()?;
        Ok(Self {
            issuer,
            jwks_url,
            http,
            fetched: RwLock::default(),
            asked: tokio::sync::Mutex::default(),
        })
    }

    /// The key with a name; none if the provider has no such key. A key that is not known yet is
    /// asked for, within bounds.
    pub(super) async fn find(&self, name: Option<&str>) -> Result<Option<Key>, KeysError> {
        let known = self.known();
        if let Some(fetched) = &known
            && fetched.at.elapsed() < FRESH
            && let Some(key) = fetched.key(name)
        {
            return Ok(Some(key));
        }
        match self.refresh().await {
            Ok(fetched) => Ok(fetched.key(name)),
            Err(error) => match known.filter(|k| k.at.elapsed() < STALE_MAX) {
                Some(fetched) => {
                    tracing::warn!(error = %error, "the last keys of the identity provider are used");
                    Ok(fetched.key(name))
                }
                None => Err(error),
            },
        }
    }

    fn known(&self) -> Option<Arc<Fetched>> {
        let fetched = self.fetched.read().unwrap_or_else(PoisonError::into_inner);
        fetched.clone()
    }

    /// The keys as they are now, or as they were within the pause.
    async fn refresh(&self) -> Result<Arc<Fetched>, KeysError> {
        let mut asked = self.asked.lock().await;
        if asked.is_some_and(|at| at.elapsed() < PAUSE) {
            let known = self.known().filter(|k| k.at.elapsed() < FRESH);
            return known.ok_or(KeysError::Recently);
        }
        *asked = Some(Instant::now());
        let fetched = Arc::new(self.fetch().await?);
        let mut kept = self.fetched.write().unwrap_or_else(PoisonError::into_inner);
        *kept = Some(fetched.clone());
        Ok(fetched)
    }

    async fn fetch(&self) -> Result<Fetched, KeysError> {
        let url = match &self.jwks_url {
            Some(url) => url.clone(),
            None => {
                let issuer = self.issuer.trim_end_matches('/');
                let found: Discovery = self
                    .get(&format!("{issuer}/.well-known/openid-configuration"))
                    .await?;
                if found.issuer != self.issuer {
                    return Err(KeysError::Answer("it says that it is another issuer"));
                }
                let keys = Url::parse(&found.jwks_uri).ok().filter(is_safe);
                keys.ok_or(KeysError::Answer("its keys are not at an https address"))?
            }
        };
        let set: RawSet = self.get(url.as_str()).await?;
        let mut usable = Vec::new();
        for raw in set.keys {
            // A key of a kind that is not known here says nothing against the others.
            let Ok(jwk) = serde_json::from_value::<Jwk>(raw) else {
                continue;
            };
            if let Some(key) = key_of(&jwk) {
                usable.push((jwk.common.key_id, key));
            }
        }
        let nameless = match usable.as_slice() {
            [(_, only)] => Some(only.clone()),
            _ => None,
        };
        let named = usable.into_iter().filter_map(|(id, key)| Some((id?, key)));
        Ok(Fetched {
            at: Instant::now(),
            keys: named.collect(),
            nameless,
        })
    }

    async fn get<T: DeserializeOwned>(&self, url: &str) -> Result<T, KeysError> {
        let answer = self.http.get(url).send().await;
        let answer = answer
            .and_then(reqwest::Response::error_for_status)
            .map_err(KeysError::Fetch)?;
        let mut parts = answer.bytes_stream();
        let mut bytes = Vec::new();
        while let Some(part) = parts.next().await {
            let part = part.map_err(KeysError::Fetch)?;
            if bytes.len() + part.len() > ANSWER_MAX {
                return Err(KeysError::Answer("it is too long"));
            }
            bytes.extend_from_slice(&part);
        }
        serde_json::from_slice(&bytes).map_err(|_| KeysError::Answer("it is not the JSON expected"))
    }
}

#[derive(Deserialize)]
struct RawSet {
    keys: Vec<serde_json::Value>,
}

impl Fetched {
    fn key(&self, name: Option<&str>) -> Option<Key> {
        match name {
            Some(name) => self.keys.get(name).cloned(),
            None => self.nameless.clone(),
        }
    }
}

/// A key that is for signatures, with the algorithm that its kind is used with.
fn key_of(jwk: &Jwk) -> Option<Key> {
    if matches!(&jwk.common.public_key_use, Some(of) if *of != PublicKeyUse::Signature) {
        return None;
    }
    let algorithm = match &jwk.algorithm {
        AlgorithmParameters::RSA(_) => Algorithm::RS256,
        AlgorithmParameters::EllipticCurve(p) if p.curve == EllipticCurve::P256 => Algorithm::ES256,
        AlgorithmParameters::OctetKeyPair(p) if p.curve == EllipticCurve::Ed25519 => {
            Algorithm::EdDSA
        }
        _ => return None,
    };
    let named = jwk.common.key_algorithm.map(|a| a.to_string());
    if named.is_some_and(|named| named != format!("{algorithm:?}")) {
        return None;
    }
    Some(Key {
        algorithm,
        key: DecodingKey::from_jwk(jwk).ok()?,
    })
}
