//! GraphQL over a WebSocket: the protocol `graphql-transport-ws`.
//!
//! Each operation is a stream that is asked for its next message only when the client has taken
//! the last one, so that a slow client costs no memory and misses nothing.

use std::collections::HashMap;
use std::time::Duration;

use async_graphql::{Request, Response as Answer};
use axum::extract::ws::WebSocketUpgrade;
use axum::http::StatusCode;
use axum::response::Response;
use futures_util::stream::{self, BoxStream, SelectAll, StreamExt};
use serde::{Deserialize, Serialize};
use tokio_util::sync::CancellationToken;

use super::asked::Asked;
use super::{limits, refusal};
use crate::extract;
use crate::problem::Problem;
use crate::state::AppState;
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
    pub(super) const INIT_TIMEOUT: u16 = 4408;
    pub(super) const SUBSCRIBER_EXISTS: u16 = 4409;
    pub(super) const TOO_MANY_INITS: u16 = 4429;
}

/// What a client says.
#[derive(Debug, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
enum ClientMessage {
    ConnectionInit {},
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

/// Answers with a socket, if the client speaks the protocol.
pub(super) fn answer(
    state: &AppState,
    upgrade: WebSocketUpgrade,
    asked: Asked,
) -> Result<Response, Problem> {
    let upgrade = upgrade.protocols([PROTOCOL]);
    if upgrade.selected_protocol().is_none() {
        return Err(Problem::new(
            StatusCode::BAD_REQUEST,
            "unknown_subprotocol",
            "the client does not offer the subprotocol that is spoken here",
            "open the socket with Sec-WebSocket-Protocol: graphql-transport-ws",
        ));
    }
    let principal = asked.principal.clone();
    Ok(ws::answer(
        state,
        &principal,
        upgrade,
        extract::BODY_MAX,
        move |socket| serve(socket, asked),
    ))
}

async fn serve(mut socket: Socket, asked: Asked) {
    let mut connection = Connection {
        asked,
        begun: false,
        open: HashMap::new(),
        last: 0,
        running: SelectAll::new(),
    };
    let late = tokio::time::sleep(INIT_TIMEOUT);
    tokio::pin!(late);
    let (code, reason) = loop {
        let step = tokio::select! {
            biased;
            received = socket.receive() => match received {
                Received::Gone => return,
                Received::ServerEnds => break (code::AWAY, "the server ends; connect again"),
                Received::Other => Err((close::BAD_REQUEST, "a message is not text")),
                Received::Text(text) => connection.told(&text),
            },
            Some((place, answer)) = connection.running.next() => Ok(connection.came(&place, answer)),
            () = &mut late, if !connection.begun => {
                break (close::INIT_TIMEOUT, "Connection initialisation timeout");
            }
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
    socket.close(code, reason).await;
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
    asked: Asked,
    begun: bool,
    /// The operations that the client has open, and what ends each.
    open: HashMap<String, (u64, CancellationToken)>,
    last: u64,
    running: SelectAll<Answers>,
}

type Step = Result<Option<String>, (u16, &'static str)>;

impl Connection {
    fn told(&mut self, text: &str) -> Step {
        let message: ClientMessage = serde_json::from_str(text)
            .map_err(|_| (close::BAD_REQUEST, "a message is not one of the protocol's"))?;
        match message {
            ClientMessage::ConnectionInit {} if self.begun => {
                Err((close::TOO_MANY_INITS, "Too many initialisation requests"))
            }
            ClientMessage::ConnectionInit {} => {
                self.begun = true;
                Ok(Some(ServerMessage::ConnectionAck.text()))
            }
            ClientMessage::Ping { payload } => Ok(Some(ServerMessage::Pong { payload }.text())),
            ClientMessage::Pong {} => Ok(None),
            ClientMessage::Subscribe { .. } if !self.begun => {
                Err((close::UNAUTHORIZED, "Unauthorized"))
            }
            ClientMessage::Subscribe { id, payload } => self.begin(id, payload),
            ClientMessage::Complete { id } => {
                if let Some((_, stop)) = self.open.remove(&id) {
                    stop.cancel();
                }
                Ok(None)
            }
        }
    }

    fn begin(&mut self, id: String, payload: serde_json::Value) -> Step {
        if self.open.contains_key(&id) {
            return Err((close::SUBSCRIBER_EXISTS, "a subscriber for this id exists"));
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
            return Err((close::BAD_REQUEST, "a payload is no GraphQL request"));
        };
        if let Err(answer) = limits::parse(&mut request) {
            return refused(&answer);
        }
        self.last += 1;
        let place = Place {
            id,
            number: self.last,
        };
        let stop = CancellationToken::new();
        let ended = stop.clone().cancelled_owned();
        let schema = self.asked.state.graphql.clone();
        let answers = schema
            .execute_stream(request.data(self.asked.clone()))
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
