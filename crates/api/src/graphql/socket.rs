//! GraphQL over a WebSocket: the protocol `graphql-transport-ws`.
//!
//! Each operation is a stream that is asked for its next message only when the client has taken
//! the last one, so that a slow client costs no memory and misses nothing.

use std::borrow::Cow;
use std::collections::HashMap;
use std::net::IpAddr;
use std::time::Duration;

use async_graphql::parser::types::OperationType;
use async_graphql::{Request, Response as Answer};
use axum::extract::ws::WebSocketUpgrade;
use axum::http::{HeaderMap, HeaderValue, StatusCode, header};
use axum::response::Response;
use futures_util::stream::{self, BoxStream, SelectAll, StreamExt};
use serde::{Deserialize, Serialize};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::asked::Asked;
use super::loads::loader;
use super::{DaybookSchema, limits, refusal};
use crate::access::{Lease, charge, recognise_later};
use crate::extract;
use crate::problem::Problem;
use crate::ws::{self, Received, Socket, code};

/// The subprotocol.
const PROTOCOL: &str = "graphql-transport-ws";
/// How long a client may take to begin.
const INIT_TIMEOUT: Duration = Duration::from_secs(10);
/// Most operations that a client has open at once.
const OPERATIONS: usize = 64;

/// Why a socket is closed, as the protocol numbers it.
mod close {
    pub(super) const BAD_REQUEST: u16 = 4400;
    pub(super) const UNAUTHORIZED: u16 = 4401;
    pub(super) const FORBIDDEN: u16 = 4403;
    pub(super) const INIT_TIMEOUT: u16 = 4408;
    pub(super) const SUBSCRIBER_EXISTS: u16 = 4409;
    pub(super) const TOO_MANY_INITS: u16 = 4429;
}

/// What a client says.
#[derive(Debug, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
enum ClientMessage {
    ConnectionInit {
        #[serde(default)]
        payload: Option<serde_json::Value>,
    },
    Ping {
        #[serde(default)]
        payload: Option<serde_json::Value>,
    },
    Pong {},
    Subscribe {
        id: String,
        payload: serde_json::Value,
    },
    Complete {
        id: String,
    },
}

/// What a client is told.
#[derive(Debug, Serialize)]
#[serde(tag = "type", rename_all = "snake_case")]
enum ServerMessage<'a> {
    ConnectionAck,
    Pong {
        #[serde(skip_serializing_if = "Option::is_none")]
        payload: Option<serde_json::Value>,
    },
    Next {
        id: &'a str,
        payload: &'a Answer,
    },
    Error {
        id: &'a str,
        payload: &'a [async_graphql::ServerError],
    },
    Complete {
        id: &'a str,
    },
}

impl ServerMessage<'_> {
    fn text(&self) -> String {
        // Texts, numbers and JSON that was made here can always be written.
        serde_json::to_string(self).unwrap_or_default()
    }
}

/// A socket as it was asked for.
pub(super) struct Opened {
    asked: Asked,
    peer: Option<IpAddr>,
    /// What the upgrade said beside a credential.
    headers: HeaderMap,
}

impl Opened {
    /// With these headers, of which the credential was looked at already.
    pub(super) fn new(asked: Asked, peer: Option<IpAddr>, mut headers: HeaderMap) -> Self {
        headers.remove(header::AUTHORIZATION);
        Self {
            asked,
            peer,
            headers,
        }
    }
}

/// Answers with a socket, if the client speaks the protocol.
pub(super) fn answer(upgrade: WebSocketUpgrade, opened: Opened) -> Result<Response, Problem> {
    let upgrade = upgrade.protocols([PROTOCOL]);
    if upgrade.selected_protocol().is_none() {
        return Err(Problem::new(
            StatusCode::BAD_REQUEST,
            "unknown_subprotocol",
            "the client does not offer the subprotocol that is spoken here",
            "open the socket with Sec-WebSocket-Protocol: graphql-transport-ws",
        ));
    }
    let state = opened.asked.state.clone();
    let principal = opened.asked.principal.clone();
    Ok(ws::answer(
        &state,
        &principal,
        upgrade,
        extract::BODY_MAX,
        move |socket| serve(socket, opened),
    ))
}

async fn serve(mut socket: Socket, opened: Opened) {
    let deadline = Instant::now() + INIT_TIMEOUT;
    let mut connection = Connection {
        opened,
        begun: false,
        open: HashMap::new(),
        last: 0,
        running: SelectAll::new(),
    };
    let late = (
        close::INIT_TIMEOUT,
        "Connection initialisation timeout".into(),
    );
    let (code, reason): (u16, Cow<'static, str>) = loop {
        let step = tokio::select! {
            biased;
            received = socket.receive() => match received {
                Received::Gone => return,
                Received::ServerEnds => {
                    break (code::AWAY, "the server or the credential ends; connect again".into());
                }
                Received::Other => Err((close::BAD_REQUEST, "a message is not text".into())),
                Received::Text(text) => match connection.told(&text) {
                    Ok(Told::Say(text)) => Ok(text),
                    Ok(Told::WhoAsks(value)) => {
                        let said = connection.recognise(value);
                        match tokio::time::timeout_at(deadline, said).await {
                            Ok(Ok(lease)) => {
                                socket.depends_on(lease);
                                Ok(Some(connection.begins()))
                            }
                            Ok(Err(end)) => Err(end),
                            Err(_) => break late,
                        }
                    }
                    Err(end) => Err(end),
                },
            },
            Some((place, answer)) = connection.running.next() => Ok(connection.came(&place, answer)),
            () = tokio::time::sleep_until(deadline), if !connection.begun => break late,
        };
        match step {
            Ok(texts) => {
                if socket.send(texts).await.is_err() {
                    return;
                }
            }
            Err(end) => break end,
        }
    };
    socket.close(code, &reason).await;
}

/// An operation: what the client calls it, and which of those it called so.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Place {
    id: String,
    number: u64,
}

/// The answers of an operation; none once it has ended.
type Answers = BoxStream<'static, (Place, Option<Answer>)>;

struct Connection {
    opened: Opened,
    begun: bool,
    /// The operations that the client has open, and what ends each.
    open: HashMap<String, (u64, CancellationToken)>,
    last: u64,
    running: SelectAll<Answers>,
}

/// Why a socket is closed.
type End = (u16, Cow<'static, str>);
type Step = Result<Option<String>, End>;

/// What comes of a message.
enum Told {
    /// Something is to be said, or nothing.
    Say(Option<String>),
    /// The client says who asks.
    WhoAsks(HeaderValue),
}

/// The credential in a payload of `connection_init`: what the header of that name would have.
fn credential(payload: Option<&serde_json::Value>) -> Result<Option<HeaderValue>, End> {
    let Some(serde_json::Value::Object(payload)) = payload else {
        return Ok(None);
    };
    let mut shown = payload
        .iter()
        .filter(|(name, value)| name.eq_ignore_ascii_case("authorization") && !value.is_null());
    let Some((_, value)) = shown.next() else {
        return Ok(None);
    };
    let unfit = || (close::BAD_REQUEST, "the authorization is no header".into());
    let text = value.as_str().filter(|_| shown.next().is_none());
    let mut value = HeaderValue::from_str(text.ok_or_else(unfit)?).map_err(|_| unfit())?;
    value.set_sensitive(true);
    Ok(Some(value))
}

impl Connection {
    fn told(&mut self, text: &str) -> Result<Told, End> {
        let message: ClientMessage = serde_json::from_str(text).map_err(|_| {
            let reason = "a message is not one of the protocol's";
            (close::BAD_REQUEST, reason.into())
        })?;
        let say = match message {
            ClientMessage::ConnectionInit { .. } if self.begun => {
                let reason = "Too many initialisation requests";
                return Err((close::TOO_MANY_INITS, reason.into()));
            }
            ClientMessage::ConnectionInit { payload } => {
                let known = &self.opened.asked.principal;
                match credential(payload.as_ref())? {
                    // Which of two is believed should not depend on who reads them.
                    Some(_) if known.has_credential() => {
                        let reason = "the upgrade said who asks already";
                        return Err((close::UNAUTHORIZED, reason.into()));
                    }
                    Some(value) => return Ok(Told::WhoAsks(value)),
                    None if known.is_nobody() => {
                        return Err((close::UNAUTHORIZED, "Unauthorized".into()));
                    }
                    None => Some(self.begins()),
                }
            }
            ClientMessage::Ping { payload } => Some(ServerMessage::Pong { payload }.text()),
            ClientMessage::Pong {} => None,
            ClientMessage::Subscribe { .. } if !self.begun => {
                return Err((close::UNAUTHORIZED, "Unauthorized".into()));
            }
            ClientMessage::Subscribe { id, payload } => self.begin(id, payload)?,
            ClientMessage::Complete { id } => {
                if let Some((_, stop)) = self.open.remove(&id) {
                    stop.cancel();
                }
                None
            }
        };
        Ok(Told::Say(say))
    }

    /// Finds out who asks, and returns what the socket depends on from then on.
    async fn recognise(&mut self, value: HeaderValue) -> Result<Lease, End> {
        let Opened {
            asked,
            peer,
            headers,
        } = &mut self.opened;
        let state = asked.state.clone();
        let shown = HeaderMap::from_iter([(header::AUTHORIZATION, value)]);
        let recognised = recognise_later(&state, *peer, &shown).await;
        let recognised = recognised.and_then(|principal| {
            let lease = state.access.stream(&principal, &state.cancel)?;
            let asked = Asked::new(state.clone(), principal, headers)?;
            Ok((asked.without_key(), lease))
        });
        match recognised {
            Ok((recognised, lease)) => {
                *asked = recognised;
                Ok(lease)
            }
            Err(problem) => {
                let code = match problem.status() {
                    StatusCode::UNAUTHORIZED => close::UNAUTHORIZED,
                    StatusCode::FORBIDDEN => close::FORBIDDEN,
                    status if status.is_client_error() && !problem.is_retryable() => {
                        close::BAD_REQUEST
                    }
                    _ => code::TRY_AGAIN,
                };
                Err((code, problem.code().into()))
            }
        }
    }

    /// From now on operations are carried out.
    fn begins(&mut self) -> String {
        self.begun = true;
        ServerMessage::ConnectionAck.text()
    }

    fn begin(&mut self, id: String, payload: serde_json::Value) -> Step {
        if self.open.contains_key(&id) {
            let reason = "a subscriber for this id exists";
            return Err((close::SUBSCRIBER_EXISTS, reason.into()));
        }
        let refused = |answer: &Answer| {
            let message = ServerMessage::Error {
                id: &id,
                payload: &answer.errors,
            };
            Ok(Some(message.text()))
        };
        if self.open.len() == OPERATIONS {
            let problem = Problem::new(
                StatusCode::TOO_MANY_REQUESTS,
                "too_many_operations",
                format!("{OPERATIONS} operations are open on this socket"),
                "complete one first, or open another socket",
            );
            return refused(&refusal::response(problem));
        }
        let Ok(mut request) = serde_json::from_value::<Request>(payload) else {
            return Err((close::BAD_REQUEST, "a payload is no GraphQL request".into()));
        };
        let asked = self.opened.asked.afresh();
        // What cannot be read was asked for as well.
        if let Err(problem) = charge(&asked.state, &asked.principal, 1) {
            return refused(&refusal::response(problem));
        }
        let operation = match limits::parse(&mut request) {
            Ok(operation) => operation,
            Err(answer) => return refused(&answer),
        };
        let others = operation.requests() - 1;
        if let Err(problem) = charge(&asked.state, &asked.principal, others) {
            return refused(&refusal::response(problem));
        }
        self.last += 1;
        let place = Place {
            id,
            number: self.last,
        };
        let stop = CancellationToken::new();
        let ended = stop.clone().cancelled_owned();
        let limit = asked.state.settings.request_timeout;
        let schema = asked.state.graphql.clone();
        let request = request.data(loader(asked.clone())).data(asked);
        let answers = match operation.kind {
            OperationType::Subscription => schema.execute_stream(request).boxed(),
            OperationType::Query | OperationType::Mutation => {
                stream::once(within(limit, schema, request)).boxed()
            }
        };
        let answers = answers
            .take_until(ended)
            .map(Some)
            .chain(stream::once(async { None }));
        let named = place.clone();
        let answers = answers.map(move |answer| (named.clone(), answer));
        self.running.push(answers.boxed());
        self.open.insert(place.id, (place.number, stop));
        Ok(None)
    }

    /// What the client is told of an operation's answer, or of its end.
    fn came(&mut self, place: &Place, answer: Option<Answer>) -> Option<String> {
        let Place { id, number } = place;
        // What the client has completed itself is not spoken of any more.
        if self.open.get(id).is_none_or(|(n, _)| n != number) {
            return None;
        }
        let Some(answer) = answer else {
            self.open.remove(id);
            return Some(ServerMessage::Complete { id }.text());
        };
        let answer = refusal::coded(answer);
        if refusal::is_of_request(&answer) {
            if let Some((_, stop)) = self.open.remove(id) {
                stop.cancel();
            }
            let payload = &answer.errors;
            return Some(ServerMessage::Error { id, payload }.text());
        }
        let payload = &answer;
        Some(ServerMessage::Next { id, payload }.text())
    }
}

/// The answer to what is no subscription, unless it takes too long.
async fn within(limit: Duration, schema: DaybookSchema, request: Request) -> Answer {
    let answer = tokio::time::timeout(limit, schema.execute(request)).await;
    answer.unwrap_or_else(|_| {
        refusal::response(
            Problem::new(
                StatusCode::GATEWAY_TIMEOUT,
                "timeout",
                format!(
                    "the operation was not done within {} s",
                    limit.as_secs_f32()
                ),
                "repeat it with an idempotencyKey: it is then carried out once at most",
            )
            .retry_after(1),
        )
    })
}
