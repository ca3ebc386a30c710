//! Reading requests: names in paths, query parameters, and commands with their caller. Whatever
//! does not fit is refused with a problem document, and unknown parameters and fields are.

use axum::body::Body;
use axum::extract::{FromRequest, FromRequestParts, Query, RawPathParams, Request};
use axum::http::request::Parts;
use axum::http::{HeaderMap, HeaderName, StatusCode, header};
use daybook_events::access::TokenId;
use daybook_events::{
    Actor, CommitId, DeploymentId, Digest, EnvKey, EnvironmentName, FreezeName, HookName, Hostname,
    InstanceRef, Position, ProjectName, ServiceName, SubscriptionId, TemplateName, TraceParent,
};
use daybook_secrets::SecretStore;
use futures_util::StreamExt;
use serde::Deserialize;
use serde::de::DeserializeOwned;
use zeroize::Zeroizing;

use crate::access::Principal;
use crate::commands::{Caller, CommandError, RequestKey};
use crate::problem::Problem;

/// Says who asks, where nobody is asked for a credential. Nobody checks it: a server that trusts it
/// listens on loopback only. With a credential it says nothing.
pub(crate) const ACTOR: HeaderName = HeaderName::from_static("daybook-actor");
/// Makes a request recognisable when it is repeated.
pub(crate) const IDEMPOTENCY_KEY: HeaderName = HeaderName::from_static("idempotency-key");

/// Most bytes of a request body. An event, which is what becomes of it, has at most 64 KiB.
pub(crate) const BODY_MAX: usize = 256 * 1024;
pub(crate) const KEY_MAX: usize = 255;
const ACTOR_MAX: usize = 64;

/// One part of a path.
pub(crate) trait Segment: Sized {
    fn parse(text: &str) -> Result<Self, Problem>;
}

macro_rules! segment {
    ($($name:ty),*) => { $(
        impl Segment for $name {
            fn parse(text: &str) -> Result<Self, Problem> {
                Ok(text.parse::<Self>()?)
            }
        }
    )* };
}
segment!(
    ProjectName,
    EnvironmentName,
    ServiceName,
    InstanceRef,
    CommitId,
    EnvKey,
    HookName,
    FreezeName,
    TemplateName,
    Hostname,
    TokenId
);

impl Segment for DeploymentId {
    fn parse(text: &str) -> Result<Self, Problem> {
        deployment_id(text)
    }
}

impl Segment for SubscriptionId {
    fn parse(text: &str) -> Result<Self, Problem> {
        text.parse().map_err(|_| {
            let shown: String = text.chars().take(80).collect();
            Problem::new(
                StatusCode::UNPROCESSABLE_ENTITY,
                "invalid_webhook_id",
                format!("{shown:?} is not the id of a webhook"),
                "use an id that GET /api/v1/webhooks lists",
            )
        })
    }
}

impl Segment for Position {
    fn parse(text: &str) -> Result<Self, Problem> {
        position("the position", text)
    }
}

/// What the thing that a request changes must be as, by its entity tags (`If-Match`, RFC 9110).
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct IfMatch(Option<Vec<String>>);

impl IfMatch {
    /// The strong entity tags of which one must be the thing's, as they stand in `ETag`; none if it may
    /// be whatever it is.
    pub(crate) fn tags(self) -> Option<Vec<String>> {
        self.0
    }

    /// Reads a list of entity tags, of which the weak ones never match (RFC 9110, 13.1.1), or that any
    /// will do; none if it is no such list.
    fn parse(mut text: &str) -> Option<Self> {
        if text.trim() == "*" {
            return Some(Self(None));
        }
        let mut tags = Vec::new();
        loop {
            // Empty members of a list say nothing, and a list may have no others (RFC 9110, 5.6.1).
            text = text.trim_start_matches([' ', '\t', ',']);
            if text.is_empty() {
                return Some(Self(Some(tags)));
            }
            let weak = text.starts_with("W/");
            let opaque = text.strip_prefix("W/").unwrap_or(text);
            let (opaque, rest) = opaque.strip_prefix('"')?.split_once('"')?;
            if !opaque
                .bytes()
                .all(|b| b == 0x21 || (0x23..=0x7e).contains(&b))
            {
                return None;
            }
            text = rest.trim_start_matches([' ', '\t']);
            if !text.is_empty() && !text.starts_with(',') {
                return None;
            }
            if !weak {
                tags.push(format!("\"{opaque}\""));
            }
        }
    }
}

impl<S: Send + Sync> FromRequestParts<S> for IfMatch {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, Problem> {
        let values = parts.headers.get_all(header::IF_MATCH).iter();
        let values: Option<Vec<_>> = values.map(|v| v.to_str().ok()).collect();
        let read = values.and_then(|values| match values.is_empty() {
            true => Some(Self(None)),
            false => Self::parse(&values.join(",")),
        });
        read.ok_or_else(|| {
            Problem::new(
                StatusCode::BAD_REQUEST,
                "invalid_if_match",
                "the header If-Match is neither `*` nor a list of entity tags",
                "give the ETag of the answer that was read, as it is with its quotation marks, or \
                 leave the header out",
            )
        })
    }
}

/// Reads a deployment's id.
pub(crate) fn deployment_id(text: &str) -> Result<DeploymentId, Problem> {
    text.parse().map_err(|_| {
        let shown: String = text.chars().take(80).collect();
        Problem::new(
            StatusCode::UNPROCESSABLE_ENTITY,
            "invalid_deployment_id",
            format!("{shown:?} is not the id of a deployment"),
            "use an id that GET /api/v1/deployments lists",
        )
    })
}

/// Reads a position of the log.
pub(crate) fn position(what: &str, text: &str) -> Result<Position, Problem> {
    let digits = !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
    let parsed = text.parse().ok().filter(|_| digits);
    parsed.map(Position).ok_or_else(|| {
        Problem::new(
            StatusCode::BAD_REQUEST,
            "invalid_position",
            format!("{what} is not a position of the log"),
            "give a whole number from 0, as it stands in Daybook-Position or in an event's id",
        )
    })
}

/// The parts of a path that are names.
pub(crate) trait Segments: Sized {
    fn parse(texts: &[String]) -> Result<Self, Problem>;
}

impl<A: Segment> Segments for A {
    fn parse(texts: &[String]) -> Result<Self, Problem> {
        match texts {
            [a] => A::parse(a),
            _ => Err(not_found()),
        }
    }
}

impl<A: Segment, B: Segment> Segments for (A, B) {
    fn parse(texts: &[String]) -> Result<Self, Problem> {
        match texts {
            [a, b] => Ok((A::parse(a)?, B::parse(b)?)),
            _ => Err(not_found()),
        }
    }
}

impl<A: Segment, B: Segment, C: Segment> Segments for (A, B, C) {
    fn parse(texts: &[String]) -> Result<Self, Problem> {
        match texts {
            [a, b, c] => Ok((A::parse(a)?, B::parse(b)?, C::parse(c)?)),
            _ => Err(not_found()),
        }
    }
}

/// Nothing is served at this address.
pub(crate) fn not_found() -> Problem {
    Problem::new(
        StatusCode::NOT_FOUND,
        "no_such_address",
        "nothing is served at this address",
        "GET /openapi.json lists all addresses",
    )
}

/// The names in the path.
pub(crate) struct Named<T>(pub(crate) T);

impl<S: Send + Sync, T: Segments> FromRequestParts<S> for Named<T> {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, Problem> {
        let raw = RawPathParams::from_request_parts(parts, state)
            .await
            .map_err(|_| {
                Problem::new(
                    StatusCode::BAD_REQUEST,
                    "invalid_path",
                    "the path is not valid UTF-8 once it is decoded",
                    "percent-encode the path correctly",
                )
            })?;
        let texts: Vec<String> = raw.iter().map(|(_, v)| v.to_owned()).collect();
        T::parse(&texts).map(Self)
    }
}

/// The query parameters; unknown ones are refused.
pub(crate) struct Params<T>(pub(crate) T);

impl<S: Send + Sync, T: DeserializeOwned> FromRequestParts<S> for Params<T> {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, Problem> {
        match Query::<T>::try_from_uri(&parts.uri) {
            Ok(Query(params)) => Ok(Self(params)),
            Err(e) => Err(Problem::new(
                StatusCode::BAD_REQUEST,
                "invalid_query",
                e.body_text(),
                "GET /openapi.json lists the parameters of each address",
            )),
        }
    }
}

/// For addresses that have no parameters.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct NoParams {}

/// What a command is told in its body.
pub(crate) trait CommandBody: DeserializeOwned {
    /// What an empty body stands for; none if there must be one.
    fn absent() -> Option<Self> {
        None
    }
}

/// A command: who asks, under which key, and what for.
pub(crate) struct Command<T> {
    pub(crate) caller: Caller,
    pub(crate) body: T,
}

impl<S: Send + Sync, T: CommandBody> FromRequest<S> for Command<T> {
    type Rejection = Problem;

    async fn from_request(request: Request, _: &S) -> Result<Self, Problem> {
        let (mut parts, body) = request.into_parts();
        let principal = Principal::from_request_parts(&mut parts, &()).await?;
        let actor = actor(&principal, &parts.headers)?;
        let key = idempotency_key(&parts.headers)?;
        let bytes = read_body(&parts.headers, body).await?;
        let (body, digest) = if bytes.is_empty() {
            let absent = T::absent().ok_or_else(|| {
                Problem::new(
                    StatusCode::BAD_REQUEST,
                    "body_missing",
                    "the request has no body",
                    "send a JSON object; GET /openapi.json says which",
                )
            })?;
            (absent, Digest::of(b""))
        } else {
            check_media_type(&parts.headers)?;
            let value: serde_json::Value = parse_json(&bytes)?;
            // Parsed from the bytes and not from the value, so that the error names the place.
            let body = parse_json(&bytes)?;
            (body, Digest::of(canonical(&value).as_bytes()))
        };
        let key = key.map(|key| {
            // The query belongs to the request: DELETE takes its reason from there.
            let query = parts.uri.query().unwrap_or_default();
            let digest = Digest::of(format!("{query}\n{digest}").as_bytes());
            let operation = format!("{} {}", parts.method, parts.uri.path());
            RequestKey::new(&actor, &operation, key, digest.to_string())
        });
        let caller = Caller {
            key,
            traceparent: trace_here(&parts.headers),
            ..Caller::of(actor, principal)
        };
        Ok(Self { caller, body })
    }
}

/// A command whose body holds a secret: who asks, and what for. Nothing that is wrong with it is
/// answered with a part of the body, and its digest is made with a key that the secret store has.
pub(crate) struct SecretCommand<T> {
    pub(crate) body: T,
    caller: Caller,
    key: Option<String>,
    operation: String,
    canonical: Zeroizing<String>,
}

impl<T> SecretCommand<T> {
    /// Who asks, for what changes nothing: no key is needed for it.
    pub(crate) fn asker(&self) -> &Caller {
        &self.caller
    }

    /// The caller, with the digest of the request if there is a key to need it.
    pub(crate) async fn caller(
        &self,
        project: &ProjectName,
        store: &dyn SecretStore,
    ) -> Result<Caller, CommandError> {
        let mut caller = self.caller.clone();
        if let Some(key) = &self.key {
            let request = self.canonical.as_bytes();
            let digest = store.request_digest(project, request).await?;
            let key = RequestKey::new(&caller.actor, &self.operation, key, digest);
            caller.key = Some(key);
        }
        Ok(caller)
    }
}

impl<S: Send + Sync, T: DeserializeOwned> FromRequest<S> for SecretCommand<T> {
    type Rejection = Problem;

    async fn from_request(request: Request, _: &S) -> Result<Self, Problem> {
        let (mut parts, body) = request.into_parts();
        let principal = Principal::from_request_parts(&mut parts, &()).await?;
        let caller = Caller {
            traceparent: trace_here(&parts.headers),
            ..Caller::of(actor(&principal, &parts.headers)?, principal)
        };
        let key = idempotency_key(&parts.headers)?.map(str::to_owned);
        let bytes = Zeroizing::new(read_body(&parts.headers, body).await?);
        check_media_type(&parts.headers)?;
        // What serde says about a value that does not fit quotes it.
        let unfit = |e: serde_json::Error| {
            Problem::new(
                StatusCode::UNPROCESSABLE_ENTITY,
                "invalid_body",
                format!(
                    "the body does not fit at line {}, column {}",
                    e.line(),
                    e.column()
                ),
                "GET /openapi.json says what the body looks like",
            )
        };
        let value: serde_json::Value = serde_json::from_slice(&bytes).map_err(unfit)?;
        Ok(Self {
            body: serde_json::from_slice(&bytes).map_err(unfit)?,
            caller,
            key,
            operation: format!("{} {}", parts.method, parts.uri.path()),
            canonical: Zeroizing::new(canonical(&value)),
        })
    }
}

/// Who acts: whoever the credential says, and where none is asked for, whoever the caller says.
pub(crate) fn actor(principal: &Principal, headers: &HeaderMap) -> Result<Actor, Problem> {
    if let Some(actor) = principal.actor() {
        return Ok(actor.clone());
    }
    let Some(value) = headers.get(ACTOR) else {
        return Ok(Actor::unauthenticated("anonymous"));
    };
    let name = value.to_str().unwrap_or_default();
    let fits = (1..=ACTOR_MAX).contains(&name.len())
        && name
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || b"._@-".contains(&b));
    if fits {
        Ok(Actor::unauthenticated(name))
    } else {
        Err(Problem::new(
            StatusCode::BAD_REQUEST,
            "invalid_actor",
            "the header Daybook-Actor is not an actor's id",
            "give 1 to 64 letters, digits and . _ @ -: an account's name, no personal data",
        ))
    }
}

pub(crate) fn idempotency_key(headers: &HeaderMap) -> Result<Option<&str>, Problem> {
    let Some(value) = headers.get(IDEMPOTENCY_KEY) else {
        return Ok(None);
    };
    let key = value.to_str().unwrap_or_default();
    if (1..=KEY_MAX).contains(&key.len()) {
        Ok(Some(key))
    } else {
        Err(Problem::new(
            StatusCode::BAD_REQUEST,
            "invalid_idempotency_key",
            "the header Idempotency-Key is not a key",
            "give 1 to 255 visible ASCII characters, such as a UUID",
        ))
    }
}

/// The trace context, if it is well-formed. One that is not is to be ignored, says W3C.
pub(crate) fn trace_of(headers: &HeaderMap) -> Option<TraceParent> {
    let mut all = headers.get_all("traceparent").iter();
    let (first, second) = (all.next()?, all.next());
    // Of several none counts, says W3C.
    let only = first.to_str().ok().filter(|_| second.is_none())?;
    TraceParent::parse(only).ok()
}

/// The place in a trace that a request has here: under its span, or where its headers say.
pub(crate) fn trace_here(headers: &HeaderMap) -> Option<TraceParent> {
    daybook_trace::current().or_else(|| trace_of(headers))
}

pub(crate) fn check_media_type(headers: &HeaderMap) -> Result<(), Problem> {
    let value = headers.get(header::CONTENT_TYPE);
    let text = value.and_then(|v| v.to_str().ok()).unwrap_or_default();
    let essence = text.split(';').next().unwrap_or_default().trim();
    if essence.eq_ignore_ascii_case("application/json") {
        Ok(())
    } else {
        Err(Problem::new(
            StatusCode::UNSUPPORTED_MEDIA_TYPE,
            "unsupported_media_type",
            "the body is not said to be JSON",
            "send JSON with the header Content-Type: application/json",
        ))
    }
}

pub(crate) async fn read_body(headers: &HeaderMap, body: Body) -> Result<Vec<u8>, Problem> {
    let announced = headers
        .get(header::CONTENT_LENGTH)
        .and_then(|v| v.to_str().ok()?.parse::<u64>().ok());
    if announced.is_some_and(|n| n > BODY_MAX as u64) {
        return Err(body_too_large(BODY_MAX));
    }
    read_at_most(body, BODY_MAX).await
}

/// Reads a whole body, unless it has more than `max` bytes.
pub(crate) async fn read_at_most(body: Body, max: usize) -> Result<Vec<u8>, Problem> {
    let mut chunks = body.into_data_stream();
    let mut bytes = Vec::new();
    while let Some(chunk) = chunks.next().await {
        let chunk = chunk.map_err(|_| {
            Problem::new(
                StatusCode::BAD_REQUEST,
                "body_incomplete",
                "the body broke off",
                "send the request again",
            )
        })?;
        if bytes.len() + chunk.len() > max {
            return Err(body_too_large(max));
        }
        bytes.extend_from_slice(&chunk);
    }
    Ok(bytes)
}

fn body_too_large(max: usize) -> Problem {
    Problem::new(
        StatusCode::PAYLOAD_TOO_LARGE,
        "body_too_large",
        format!("the body has more than {max} bytes"),
        "send a smaller request",
    )
}

fn parse_json<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, Problem> {
    serde_json::from_slice(bytes).map_err(|e| {
        if e.is_data() {
            Problem::new(
                StatusCode::UNPROCESSABLE_ENTITY,
                "invalid_body",
                format!("the body does not fit: {e}"),
                "GET /openapi.json says what the body looks like",
            )
        } else {
            Problem::new(
                StatusCode::BAD_REQUEST,
                "malformed_json",
                format!("the body is not JSON: {e}"),
                "send one JSON object",
            )
        }
    })
}

/// JSON in one form, whatever the order of fields and the white space were.
pub(crate) fn canonical(value: &serde_json::Value) -> String {
    use serde_json::Value::{Array, Object};
    match value {
        Object(map) => {
            let mut fields: Vec<_> = map.iter().collect();
            fields.sort_by_key(|(k, _)| *k);
            let fields: Vec<String> = fields
                .into_iter()
                .map(|(k, v)| format!("{}:{}", serde_json::Value::from(k.as_str()), canonical(v)))
                .collect();
            format!("{{{}}}", fields.join(","))
        }
        Array(items) => {
            let items: Vec<String> = items.iter().map(canonical).collect();
            format!("[{}]", items.join(","))
        }
        scalar => scalar.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entity_tags_are_read_as_rfc_9110_writes_them() {
        let strong = |tags: &[&str]| {
            Some(IfMatch(Some(
                tags.iter().map(|t| (*t).to_owned()).collect(),
            )))
        };
        assert_eq!(IfMatch::parse(" * "), Some(IfMatch(None)));
        assert_eq!(IfMatch::parse("\"a\""), strong(&["\"a\""]));
        let several = "\"a,b\" ,, \"\",W/\"c\"";
        assert_eq!(IfMatch::parse(several), strong(&["\"a,b\"", "\"\""]));
        for none in ["W/\"c\"", "", " ,"] {
            assert_eq!(IfMatch::parse(none), strong(&[]), "{none}");
        }
        for bad in ["a", "\"a", "\"a\" \"b\"", "w/\"a\"", "*, \"a\"", "\"a b\""] {
            assert_eq!(IfMatch::parse(bad), None, "{bad}");
        }
    }

    #[test]
    fn canonical_json_does_not_depend_on_order_or_space() {
        let one: serde_json::Value =
            serde_json::from_str(r#"{"b": [1, {"y": null, "x": "\u0041"}], "a": true}"#).unwrap();
        let other: serde_json::Value =
            serde_json::from_str(r#"{"a":true,"b":[1,{"x":"A","y":null}]}"#).unwrap();
        assert_eq!(canonical(&one), canonical(&other));
        assert_eq!(canonical(&one), r#"{"a":true,"b":[1,{"x":"A","y":null}]}"#);
    }

    #[test]
    fn only_well_formed_trace_contexts_are_kept() {
        let mut headers = HeaderMap::new();
        let good = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";
        headers.insert("traceparent", good.parse().unwrap());
        assert_eq!(trace_of(&headers), good.parse().ok());
        headers.append("traceparent", good.parse().unwrap());
        assert_eq!(trace_of(&headers), None, "two are none");
        headers.insert("traceparent", "00-xyz-1-01".parse().unwrap());
        assert_eq!(trace_of(&headers), None);
    }
}
