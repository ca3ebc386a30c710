//! From credentials to principals.

use std::net::IpAddr;
use std::num::{NonZeroU32, NonZeroUsize};
use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::http::{HeaderMap, HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use daybook_events::access::{Access, Token};
use daybook_events::{Actor, Digest, Subject};
use daybook_projections::{Projections, QueryError};
use jiff::Timestamp;
use zeroize::Zeroizing;

use super::lease::Leases;
use super::limits::{Buckets, Caller, Rate};
use super::oidc::{KeysError, Oidc};
use super::principal::{Credential, Principal};
use super::token::{self, SecretToken};
use crate::problem::Problem;

/// How many requests with bad credentials a second get more than "too many" for an answer.
const FAILURES: NonZeroU32 = NonZeroU32::new(100).unwrap();

/// Whether a server asks who somebody is.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum AccessMode {
    /// Nobody is asked: whoever reaches the server may do everything, under the name that they
    /// say. A token that is shown all the same is checked, and its limits hold.
    #[default]
    Open,
    /// Whatever is not public takes a credential.
    Required,
}

/// Why a request was refused at the door.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Unauthenticated {
    /// There is no credential.
    #[error("the request does not say who asks")]
    Missing,
    /// The credential is none that this server knows the form of.
    #[error("the credential is not one that this server takes")]
    Malformed,
    /// There is no such token, or its secret is another one.
    #[error("the token is not one that this server takes")]
    Unknown,
    /// It was revoked.
    #[error("the token is revoked")]
    Revoked,
    /// It has ended.
    #[error("the token has expired")]
    Expired,
}

impl Unauthenticated {
    /// A stable code.
    pub fn code(self) -> &'static str {
        match self {
            Self::Missing => "unauthenticated",
            Self::Malformed => "invalid_credential",
            Self::Unknown => "unknown_token",
            Self::Revoked => "token_revoked",
            Self::Expired => "token_expired",
        }
    }

    fn remedy(self) -> &'static str {
        match self {
            Self::Missing | Self::Malformed => {
                "send a token in the header Authorization: Bearer daybook_…; `daybook login` keeps \
                 one, and `daybook token create` makes one"
            }
            Self::Unknown | Self::Revoked | Self::Expired => {
                "ask an administrator for a token: `daybook token create` makes one"
            }
        }
    }
}

impl From<Unauthenticated> for Problem {
    fn from(e: Unauthenticated) -> Self {
        let challenge = match e {
            Unauthenticated::Missing => r#"Bearer realm="daybook""#,
            _ => r#"Bearer realm="daybook", error="invalid_token""#,
        };
        Self::new(
            StatusCode::UNAUTHORIZED,
            e.code(),
            e.to_string(),
            e.remedy(),
        )
        .challenge(challenge)
    }
}

/// A refusal as Git shows it: as text, and with the challenge upon which it asks for a password.
pub(super) fn for_git(e: Unauthenticated) -> Response {
    let headers = [
        (
            header::CONTENT_TYPE,
            HeaderValue::from_static("text/plain; charset=utf-8"),
        ),
        (
            header::WWW_AUTHENTICATE,
            HeaderValue::from_static(
                r#"Basic realm="Daybook: any user name, and a token as password""#,
            ),
        ),
    ];
    let text = format!("{e}: give a token as the password\n");
    (StatusCode::UNAUTHORIZED, headers, text).into_response()
}

/// What a request shows to say who asks.
enum Shown {
    Nothing,
    /// A bearer token.
    Bearer(Zeroizing<String>),
    /// A user and a password.
    Basic(Zeroizing<String>),
    /// Something else.
    Other,
}

/// Knows who may come in. Cheap to clone; all clones are the same.
#[derive(Clone)]
pub struct AccessControl {
    mode: AccessMode,
    projections: Projections,
    /// Beside tokens of Daybook's own, those of an identity provider.
    oidc: Option<Arc<Oidc>>,
    /// How often each caller may ask, where callers are told apart.
    requests: Option<Arc<Buckets<Caller>>>,
    /// How often an address is told what is wrong with its credentials.
    failures: Arc<Buckets<Caller>>,
    /// How often an address may ask for what is public.
    strangers: Arc<Buckets<Caller>>,
    pub(super) leases: Arc<Leases>,
    /// How many streams each caller may have open.
    pub(super) streams_max: Option<NonZeroUsize>,
}

impl std::fmt::Debug for AccessControl {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("AccessControl")
            .field("mode", &self.mode)
            .finish_non_exhaustive()
    }
}

impl AccessControl {
    /// For a server over these projections.
    pub(crate) fn new(
        mode: AccessMode,
        oidc: Option<Arc<Oidc>>,
        rate: Option<Rate>,
        strangers: Rate,
        streams_max: Option<NonZeroUsize>,
        projections: Projections,
    ) -> Self {
        Self {
            mode,
            projections,
            oidc,
            requests: rate.map(|rate| Arc::new(Buckets::new(rate))),
            failures: Arc::new(Buckets::new(Rate::per_second(FAILURES))),
            strangers: Arc::new(Buckets::new(strangers)),
            leases: Arc::default(),
            streams_max,
        }
    }

    /// Counts a request of a principal, or says how long it has to wait.
    pub(super) fn count(&self, principal: &Principal) -> Result<(), Duration> {
        match (&self.requests, Caller::of(principal)) {
            (Some(requests), Some(caller)) => requests.take(caller, Instant::now()),
            _ => Ok(()),
        }
    }

    /// Counts a request that was refused at the door, or says how long the next one has to wait.
    /// Good credentials are not held up by bad ones from the same address.
    pub(crate) fn count_failure(&self, peer: Option<IpAddr>) -> Result<(), Duration> {
        self.failures.take(Caller::Stranger(peer), Instant::now())
    }

    /// Counts a request for what is public, or says how long the next one has to wait. Where nobody
    /// is asked, nobody is a stranger.
    pub(super) fn count_stranger(&self, peer: Option<IpAddr>) -> Result<(), Duration> {
        match self.mode {
            AccessMode::Open => Ok(()),
            AccessMode::Required => self.strangers.take(Caller::Stranger(peer), Instant::now()),
        }
    }

    /// Whether it asks.
    pub fn mode(&self) -> AccessMode {
        self.mode
    }

    /// Who asks with these headers. `passwords` says whether the surface takes a token as a
    /// password too, as Git has no other way.
    pub async fn recognise(
        &self,
        headers: &HeaderMap,
        passwords: bool,
    ) -> Result<Principal, Refused> {
        let shown = shown(headers)?;
        let open = self.mode == AccessMode::Open;
        match shown {
            Shown::Nothing if open => Ok(Principal::anybody()),
            Shown::Nothing => Err(Unauthenticated::Missing.into()),
            Shown::Bearer(text) => self.bearer(&text).await,
            Shown::Basic(password)
                if passwords && (!open || password.starts_with(token::PREFIX)) =>
            {
                self.bearer(&password).await
            }
            // What a proxy before an open server asked for is none of its business.
            Shown::Basic(password) if open && !password.starts_with(token::PREFIX) => {
                Ok(Principal::anybody())
            }
            Shown::Other if open => Ok(Principal::anybody()),
            Shown::Basic(_) | Shown::Other => Err(Unauthenticated::Malformed.into()),
        }
    }

    async fn bearer(&self, text: &str) -> Result<Principal, Refused> {
        let Some(shown) = SecretToken::parse(text) else {
            return match &self.oidc {
                Some(oidc) if !text.starts_with(token::PREFIX) => oidc.principal(text).await,
                _ => Err(Unauthenticated::Malformed.into()),
            };
        };
        let digest = shown.digest();
        let folded = self.projections.shared::<Access>(&Subject::Access)?;
        let token = folded.state.as_ref().and_then(|a| a.tokens.get(shown.id()));
        let token = token.ok_or(Unauthenticated::Unknown)?;
        check(token, &digest, Timestamp::now())?;
        let actor = Actor {
            kind: "api_key".into(),
            id: token.account.to_string(),
        };
        Ok(Principal::new(
            Some(actor),
            token.grants.clone(),
            Credential::Token(shown.id().clone(), digest),
        ))
    }

    /// Whether what a principal was recognised by holds still.
    pub(super) fn holds(&self, principal: &Principal, now: Timestamp) -> bool {
        match principal.credential() {
            Credential::None => true,
            Credential::Vouched(until) => now < *until,
            Credential::Token(id, digest) => {
                // What cannot be read says nothing against anybody.
                let Ok(folded) = self.projections.shared::<Access>(&Subject::Access) else {
                    return true;
                };
                let token = folded.state.as_ref().and_then(|a| a.tokens.get(id));
                token.is_some_and(|t| check(t, digest, now).is_ok())
            }
        }
    }
}

/// Why nobody was recognised.
#[derive(Debug, thiserror::Error)]
pub enum Refused {
    /// The credential is missing or not good.
    #[error(transparent)]
    Unauthenticated(#[from] Unauthenticated),
    /// It could not be looked up.
    #[error(transparent)]
    Query(#[from] QueryError),
    /// Whoever vouches for it cannot be asked.
    #[error(transparent)]
    Keys(#[from] KeysError),
}

fn check(token: &Token, digest: &Digest, now: Timestamp) -> Result<(), Unauthenticated> {
    // Whether it is revoked or has ended is said only to whoever has its secret.
    let old = token
        .old
        .as_ref()
        .filter(|o| token::same(&o.digest, digest));
    if old.is_none() && !token::same(&token.digest, digest) {
        return Err(Unauthenticated::Unknown);
    }
    if token.revoked_at.is_some() {
        return Err(Unauthenticated::Revoked);
    }
    if token.is_expired(now) || old.is_some_and(|o| o.until <= now) {
        return Err(Unauthenticated::Expired);
    }
    Ok(())
}

fn shown(headers: &HeaderMap) -> Result<Shown, Unauthenticated> {
    let mut values = headers.get_all(header::AUTHORIZATION).iter();
    let Some(value) = values.next() else {
        return Ok(Shown::Nothing);
    };
    // Of two credentials, a proxy and this server might each believe another one.
    if values.next().is_some() {
        return Err(Unauthenticated::Malformed);
    }
    let text = value.to_str().map_err(|_| Unauthenticated::Malformed)?;
    let Some((scheme, rest)) = text.split_once(' ') else {
        return Ok(Shown::Other);
    };
    let rest = rest.trim();
    if scheme.eq_ignore_ascii_case("bearer") {
        return Ok(Shown::Bearer(Zeroizing::new(rest.to_owned())));
    }
    if !scheme.eq_ignore_ascii_case("basic") {
        return Ok(Shown::Other);
    }
    let decoded = BASE64
        .decode(rest)
        .map_err(|_| Unauthenticated::Malformed)?;
    let decoded =
        Zeroizing::new(String::from_utf8(decoded).map_err(|_| Unauthenticated::Malformed)?);
    let (_, password) = decoded.split_once(':').ok_or(Unauthenticated::Malformed)?;
    Ok(Shown::Basic(Zeroizing::new(password.to_owned())))
}
