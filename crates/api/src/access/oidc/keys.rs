//! The keys of an identity provider, as it publishes them.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, PoisonError, RwLock};
use std::time::{Duration, Instant};

use daybook_events::with_causes;
use futures_util::StreamExt as _;
use jsonwebtoken::jwk::{AlgorithmParameters, EllipticCurve, Jwk, PublicKeyUse};
use jsonwebtoken::{Algorithm, DecodingKey};
use serde::Deserialize;
use serde::de::DeserializeOwned;
use tokio::sync::{Mutex, OwnedMutexGuard};
use url::Url;

/// After this time the keys are fetched again: one that was withdrawn is taken no longer than that,
/// as long as the provider answers.
const FRESH: Duration = Duration::from_secs(600);
/// As long as the provider cannot be reached, its last keys are taken at most this long.
const STALE_MAX: Duration = Duration::from_secs(24 * 3600);
/// However many tokens with unknown keys come, the provider is left alone for so long after it was
/// asked.
const PAUSE: Duration = Duration::from_secs(3);
/// How long the provider may take to answer.
const PATIENCE: Duration = Duration::from_secs(5);
/// How long a request waits for new keys if its own is among the last ones.
const STALE_PATIENCE: Duration = Duration::from_secs(1);
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
    /// It takes too long.
    #[error("the identity provider does not answer in time")]
    Slow,
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

/// The keys of a provider, fetched when they are needed. Cheap to clone; all clones are the same.
#[derive(Debug, Clone)]
pub(super) struct Keys(Arc<Provider>);

#[derive(Debug)]
struct Provider {
    issuer: String,
    jwks_url: Option<Url>,
    http: reqwest::Client,
    /// After which time keys are fetched again.
    fresh: Duration,
    fetched: RwLock<Option<Arc<Fetched>>>,
    /// When the provider has last answered or failed to. Held while it is asked, so that one asks
    /// for all.
    asked: Arc<Mutex<Option<Instant>>>,
    /// Whether it was found not to answer, and has not answered since: nobody waits for it then whose
    /// key is among the last ones.
    away: AtomicBool,
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
        Self::fresh_for(FRESH, issuer, jwks_url)
    }

    fn fresh_for(
        fresh: Duration,
        issuer: String,
        jwks_url: Option<Url>,
    ) -> Result<Self, reqwest::Error> {
        let http = reqwest::Client::builder()
            .connect_timeout(PATIENCE)
            .timeout(PATIENCE)
            .redirect(reqwest::redirect::Policy::none())
            .build()?;
        Ok(Self(Arc::new(Provider {
            issuer,
            jwks_url,
            http,
            fresh,
            fetched: RwLock::default(),
            asked: Arc::default(),
            away: AtomicBool::new(false),
        })))
    }

    /// The key with a name; none if the provider has no such key. A key that is not known yet is
    /// asked for, within bounds. Where the provider does not answer, a key that it had last is taken,
    /// and nobody waits for it.
    pub(super) async fn find(&self, name: Option<&str>) -> Result<Option<Key>, KeysError> {
        let last = self.0.known().filter(|k| k.at.elapsed() < STALE_MAX);
        let Some(last) = last else {
            return Ok(self.refresh().await?.key(name));
        };
        match last.key(name) {
            Some(key) if last.at.elapsed() < self.0.fresh => Ok(Some(key)),
            Some(key) => Ok(self.still(key, name).await),
            None => match self.refresh().await {
                Ok(fetched) => Ok(fetched.key(name)),
                // The last ones are known, and this is none of them.
                Err(_) => Ok(None),
            },
        }
    }

    /// A key of the last ones as it is now, if the provider says so soon; and as it was otherwise.
    async fn still(&self, key: Key, name: Option<&str>) -> Option<Key> {
        if self.0.away.load(Ordering::Relaxed) {
            // Whoever finds the lock taken leaves it to the one who asks already.
            if let Ok(asked) = self.0.asked.clone().try_lock_owned()
                && !just(&asked)
            {
                tokio::spawn(self.0.clone().ask(asked));
            }
            return Some(key);
        }
        match tokio::time::timeout(STALE_PATIENCE, self.refresh()).await {
            Ok(Ok(fetched)) => fetched.key(name),
            Ok(Err(_)) => Some(key),
            Err(_) => {
                self.0.away.store(true, Ordering::Relaxed);
                Some(key)
            }
        }
    }

    /// The keys as they are now, or as they were within the pause. The provider's answer is awaited
    /// and kept also if nobody waits for it here any more.
    async fn refresh(&self) -> Result<Arc<Fetched>, KeysError> {
        let asked = self.0.asked.clone().lock_owned().await;
        if just(&asked) {
            let known = self.0.known().filter(|k| k.at.elapsed() < self.0.fresh);
            return known.ok_or(KeysError::Recently);
        }
        let answer = tokio::spawn(self.0.clone().ask(asked));
        answer.await.unwrap_or(Err(KeysError::Slow))
    }
}

/// Whether the provider has just been asked.
fn just(asked: &Option<Instant>) -> bool {
    asked.is_some_and(|at| at.elapsed() < PAUSE)
}

impl Provider {
    fn known(&self) -> Option<Arc<Fetched>> {
        let fetched = self.fetched.read().unwrap_or_else(PoisonError::into_inner);
        fetched.clone()
    }

    async fn ask(
        self: Arc<Self>,
        mut asked: OwnedMutexGuard<Option<Instant>>,
    ) -> Result<Arc<Fetched>, KeysError> {
        let answer = tokio::time::timeout(PATIENCE, self.fetch()).await;
        let answer = answer.unwrap_or(Err(KeysError::Slow)).map(Arc::new);
        // The pause begins with the answer: one that took long would leave none otherwise.
        *asked = Some(Instant::now());
        self.away.store(answer.is_err(), Ordering::Relaxed);
        let fetched = answer.inspect_err(|e| {
            tracing::warn!(
                error = with_causes(e),
                "the identity provider does not say its keys"
            );
        })?;
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

#[cfg(test)]
mod tests {
    use serde_json::json;
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    use tokio::net::TcpListener;

    use super::*;

    /// A provider with one key that takes requests and answers them, as long as it is not told to
    /// hang.
    struct Hanging {
        keys: Keys,
        hangs: Arc<AtomicBool>,
    }

    impl Hanging {
        async fn start() -> Self {
            let _ = rustls::crypto::ring::default_provider().install_default();
            let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
            let url = format!("http://{}", listener.local_addr().unwrap());
            let hangs = Arc::new(AtomicBool::new(false));
            let told = hangs.clone();
            let key = json!({ "kty": "OKP", "kid": "k", "crv": "Ed25519",
                "x": "11qYAYKxCrfVS_7TyWQHOg7hcvPapiMlrwIaaPcHURo" });
            let body = json!({ "keys": [key] }).to_string();
            tokio::spawn(async move {
                let mut open = Vec::new();
                loop {
                    let (mut stream, _) = listener.accept().await.unwrap();
                    let mut head = [0; 4096];
                    let _ = stream.read(&mut head).await;
                    if !told.load(Ordering::Relaxed) {
                        let answer = format!(
                            "HTTP/1.1 200 OK\r\ncontent-length: {}\r\nconnection: close\r\n\r\n{body}",
                            body.len()
                        );
                        let _ = stream.write_all(answer.as_bytes()).await;
                    }
                    open.push(stream);
                }
            });
            let address = Url::parse(&format!("{url}/keys")).ok();
            let keys = Keys::fresh_for(Duration::ZERO, url, address).unwrap();
            Self { keys, hangs }
        }

        fn hang(&self, hangs: bool) {
            self.hangs.store(hangs, Ordering::Relaxed);
        }
    }

    #[tokio::test]
    async fn a_provider_that_hangs_holds_nobody_up_whose_key_is_known() {
        let provider = Hanging::start().await;
        assert!(provider.keys.find(Some("k")).await.unwrap().is_some());
        provider.hang(true);
        // The pause after the last answer is over.
        *provider.keys.0.asked.lock().await = None;
        let begun = Instant::now();
        let many = (0..50).map(|_| provider.keys.find(Some("k")));
        for found in futures_util::future::join_all(many).await {
            assert!(found.unwrap().is_some());
        }
        // Together they wait as long as one, and from then on nobody does.
        assert!(begun.elapsed() < PATIENCE, "{:?}", begun.elapsed());
        let begun = Instant::now();
        for _ in 0..50 {
            assert!(provider.keys.find(Some("k")).await.unwrap().is_some());
        }
        assert!(begun.elapsed() < STALE_PATIENCE, "{:?}", begun.elapsed());
        // Once it answers again, that is noticed by itself.
        provider.hang(false);
        let deadline = Instant::now() + PATIENCE + PAUSE + Duration::from_secs(20);
        while provider.keys.0.away.load(Ordering::Relaxed) {
            assert!(Instant::now() < deadline, "it is never asked again");
            provider.keys.find(Some("k")).await.unwrap().unwrap();
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    #[tokio::test]
    async fn who_waits_for_the_first_keys_of_a_provider_that_hangs_waits_once() {
        let provider = Hanging::start().await;
        provider.hang(true);
        let begun = Instant::now();
        let many = (0..20).map(|_| provider.keys.find(Some("k")));
        for found in futures_util::future::join_all(many).await {
            found.unwrap_err();
        }
        assert!(begun.elapsed() < PATIENCE * 2, "{:?}", begun.elapsed());
        let begun = Instant::now();
        let again = provider.keys.find(Some("k")).await.unwrap_err();
        assert!(matches!(again, KeysError::Recently), "{again:?}");
        assert!(begun.elapsed() < STALE_PATIENCE, "{:?}", begun.elapsed());
    }
}
