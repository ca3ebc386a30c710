//! The ledger itself: its events as they are stored, in pages and as a stream.

use std::sync::Arc;

use axum::body::Body;
use axum::extract::State;
use axum::http::{HeaderMap, HeaderName, StatusCode, header};
use axum::response::{IntoResponse, Response};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use bytes::Bytes;
use daybook_events::Position;
use daybook_events::envelope;
use daybook_events::feed::FeedChain;
use daybook_events::log::{ReadError, Recorded};
use futures_util::{Stream, StreamExt, future, stream};
use jiff::Timestamp;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;
use utoipa::IntoParams;

use crate::access::Principal;
use crate::answer::Answer;
use crate::event_filter::{EventFilter, WantedEvents};
use crate::extract::{self, Named, NoParams, Params};
use crate::feed::FeedEvent;
use crate::problem::{Problem, ahead};
use crate::routes::history::page;
use crate::sse;
use crate::state::AppState;
use crate::ws::{self, Received, Socket, Upgrade, code};

const LAST_EVENT_ID: HeaderName = HeaderName::from_static("last-event-id");
/// Most events that one page looks at: a filter that little passes must not make it endless.
const SCAN_MAX: usize = 20_000;
/// Events that are read at once.
const READ: usize = 512;
/// Most events that one request for a chain looks at.
const CHAIN_SCAN: usize = 100_000;
/// Most bytes that a subscriber may send over its socket: it has nothing to say.
const FROM_SUBSCRIBER: usize = 1024;

/// Which events are wanted, and from where on; all that is given must fit.
#[derive(Debug, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
#[serde(deny_unknown_fields)]
pub(crate) struct EventQuery {
    /// Only events after this position; 0, the start, if not given.
    after: Option<String>,
    /// Most events on a page: 1 to 500, 50 if not given.
    limit: Option<u32>,
    /// Of this project.
    project: Option<String>,
    /// Of this environment. Builds, commits and route tables belong to none.
    environment: Option<String>,
    /// About this service.
    service: Option<String>,
    /// Of this type (`deployment.requested.v1`), or of all types of an aggregate (`deployment`).
    kind: Option<String>,
    /// Of this deployment and of the run that it began: its commits and its switches too.
    deployment: Option<String>,
    /// Goes on as events come, as server-sent events.
    #[serde(default)]
    follow: bool,
    /// Over a WebSocket: the value of the feed's chain at `after`, to go on with; it is begun
    /// anew if not given.
    chain: Option<String>,
}

/// Which feed's chain is wanted, and from where to where.
#[derive(Debug, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
#[serde(deny_unknown_fields)]
pub(crate) struct ChainQuery {
    /// The feed starts after this position; 0, the start, if not given.
    after: Option<String>,
    /// Up to this position; the end of the log if not given.
    to: Option<String>,
    /// The value at `after`, to go on with; the chain is begun anew if not given.
    chain: Option<String>,
    /// Of this project.
    project: Option<String>,
    /// Of this environment.
    environment: Option<String>,
    /// About this service.
    service: Option<String>,
    /// Of this type, or of all types of an aggregate.
    kind: Option<String>,
    /// Of this deployment and of the run that it began.
    deployment: Option<String>,
}

/// The hash chain of a feed, as the log has it.
#[derive(Debug, Serialize, JsonSchema)]
pub(crate) struct FeedChainReport {
    /// The feed starts after this position, or goes on after it.
    after: Position,
    /// The value is the one here: after the last event of the feed up to this position. It may be
    /// before what was asked for: then go on with `after=<to>&chain=<chain>`.
    to: Position,
    /// How many events of the feed stand in between.
    events: u64,
    /// The value, in hexadecimal digits.
    #[schemars(with = "String")]
    chain: String,
    /// Position of the last event of the log.
    head: Position,
}

/// A page of events.
#[derive(Debug, Serialize, JsonSchema)]
pub(crate) struct EventPage {
    /// The events, oldest first.
    pub(crate) events: Vec<StoredEvent>,
    /// The next page is after this position. It may move on although no event fitted.
    pub(crate) next_after: Position,
    /// Position of the last event of the log.
    pub(crate) head: Position,
}

/// One event as it is stored.
#[derive(Debug, Serialize, JsonSchema)]
pub(crate) struct StoredEvent {
    /// Its position.
    pub(crate) position: Position,
    /// Its subject on the log.
    pub(crate) subject: String,
    /// When the log stored it.
    pub(crate) stored_at: Timestamp,
    /// The stored CloudEvent.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Option<serde_json::Value>")]
    pub(crate) event: Option<Box<RawValue>>,
    /// The stored bytes in Base64, if they are not JSON.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) bytes: Option<String>,
}

impl From<&Recorded> for StoredEvent {
    fn from(recorded: &Recorded) -> Self {
        let event: Option<Box<RawValue>> = serde_json::from_slice(&recorded.bytes).ok();
        let bytes = event.is_none().then(|| BASE64.encode(&recorded.bytes));
        Self {
            position: recorded.position,
            subject: recorded.subject.to_string(),
            stored_at: recorded.stored_at,
            event,
            bytes,
        }
    }
}

/// An event as a socket sends it.
#[derive(Serialize)]
struct SentEvent {
    #[serde(flatten)]
    stored: StoredEvent,
    chain: String,
}

/// The events of the ledger, exactly as they are stored, oldest first: as pages of JSON, or, with
/// `Accept: text/event-stream` or `follow`, as a stream that goes on, or, with the upgrade of
/// RFC 6455, over a WebSocket. The id of a streamed event is its position, so that `Last-Event-ID`
/// or `after` resumes without gap or repeat.
#[utoipa::path(get, path = "/api/v1/events", tag = "events",
    params(EventQuery,
        ("Last-Event-ID" = Option<u64>, Header,
            description = "Goes on after this position; goes before `after`.")),
    responses((status = 200, description = "The events.", content(
        (EventPage = "application/json"), (String = "text/event-stream"))),
        (status = 101, description = "A WebSocket, which sends a StoredEvent with its `chain` as \
            JSON in a text message for each event.")))]
pub(crate) async fn list_events(
    State(state): State<AppState>,
    principal: Principal,
    Params(query): Params<EventQuery>,
    headers: HeaderMap,
    Upgrade(upgrade): Upgrade,
) -> Result<Response, Problem> {
    let stream = query.follow || accepts(&headers, sse::MEDIA_TYPE) || upgrade.is_some();
    let last_id = headers
        .get(LAST_EVENT_ID)
        .map(|id| extract::position("Last-Event-ID", id.to_str().unwrap_or_default()));
    let after = query.after.as_deref().unwrap_or("0");
    let after = extract::position("after", after)?;
    let after = last_id.transpose()?.unwrap_or(after);
    let chain = query.chain.as_deref().map(chain_value).transpose()?;
    let limit = page(query.limit, None)?.limit();
    let filter = EventFilter::parse(
        WantedEvents {
            project: query.project,
            environment: query.environment,
            service: query.service,
            kind: query.kind,
            deployment: query.deployment,
        },
        &principal,
    )?;
    let head = reached(&state, after).await?;
    if let Some(upgrade) = upgrade {
        let chain = chain.unwrap_or_else(|| FeedChain::begin(&filter.feed, after));
        let events = state.feed.subscribe(after, filter);
        return Ok(ws::answer(
            &state,
            &principal,
            upgrade,
            FROM_SUBSCRIBER,
            move |socket| send_events(socket, Box::pin(events), chain),
        ));
    }
    if stream {
        Ok(follow(&state, &principal, after, filter))
    } else {
        let page = events(&state, after, filter, limit, head).await?;
        Ok(Answer::ok(page).into_response())
    }
}

/// The end of the log, which must not be before a position.
pub(crate) async fn reached(state: &AppState, after: Position) -> Result<Position, Problem> {
    let head = state.commands.ledger().log().head().await?;
    if after <= head {
        return Ok(head);
    }
    Err(ahead(head, after))
}

pub(crate) fn chain_value(text: &str) -> Result<FeedChain, Problem> {
    text.parse()
        .map_err(|e: daybook_events::feed::InvalidChain| {
            Problem::new(
                StatusCode::BAD_REQUEST,
                "invalid_chain",
                e.to_string(),
                "give the `chain` that came with the last event, or leave it out",
            )
        })
}

/// The hash chain over a feed, worked out from the log: a subscriber of the same feed that has the
/// same value has missed, repeated and changed nothing.
#[utoipa::path(get, path = "/api/v1/events/chain", tag = "events", params(ChainQuery),
    responses((status = 200, description = "The chain.", body = FeedChainReport)))]
pub(crate) async fn events_chain(
    State(state): State<AppState>,
    principal: Principal,
    Params(query): Params<ChainQuery>,
) -> Result<Answer<FeedChainReport>, Problem> {
    let after = extract::position("after", query.after.as_deref().unwrap_or("0"))?;
    let to = query.to.as_deref().map(|t| extract::position("to", t));
    let filter = EventFilter::parse(
        WantedEvents {
            project: query.project,
            environment: query.environment,
            service: query.service,
            kind: query.kind,
            deployment: query.deployment,
        },
        &principal,
    )?;
    let begun = query.chain.as_deref().map(chain_value).transpose()?;
    let mut chain = begun.unwrap_or_else(|| FeedChain::begin(&filter.feed, after));
    let to = to.transpose()?;
    let head = reached(&state, to.unwrap_or(after).max(after)).await?;
    let mut count = 0;
    let to = to.unwrap_or(head);
    let walked = state.feed.walk(after, to, &filter, CHAIN_SCAN, |event| {
        chain = chain.then(event.leaf());
        count += 1;
    });
    let to = walked.await?.max(after);
    Ok(Answer::ok(FeedChainReport {
        after,
        to,
        events: count,
        chain: chain.to_string(),
        head,
    }))
}

/// Sends a feed over a socket until one of the two ends.
async fn send_events(
    mut socket: Socket,
    mut events: impl Stream<Item = Result<Vec<Arc<FeedEvent>>, ReadError>> + Unpin,
    mut chain: FeedChain,
) {
    let (code, reason) = loop {
        tokio::select! {
            biased;
            received = socket.receive() => match received {
                Received::Gone => return,
                Received::ServerEnds => break (code::AWAY, "the server ends; connect again"),
                Received::Text(_) | Received::Other => {
                    break (code::UNSUPPORTED, "this stream takes no messages");
                }
            },
            batch = events.next() => {
                let Some(Ok(batch)) = batch else {
                    if let Some(Err(e)) = batch {
                        tracing::error!(error = %e, "a stream of events broke off");
                    }
                    break (code::INTERNAL, "the log cannot be read; connect again later");
                };
                let mut texts = Vec::with_capacity(batch.len());
                for event in &batch {
                    chain = chain.then(event.leaf());
                    let sent = SentEvent {
                        stored: StoredEvent::from(&event.recorded),
                        chain: chain.to_string(),
                    };
                    // Texts, numbers and JSON that was read can always be written.
                    texts.push(serde_json::to_string(&sent).unwrap_or_default());
                }
                if socket.send(texts).await.is_err() {
                    return;
                }
            }
        }
    };
    socket.close(code, reason).await;
}

/// Whether a client asks for this media type.
pub(crate) fn accepts(headers: &HeaderMap, media_type: &str) -> bool {
    headers
        .get_all(header::ACCEPT)
        .iter()
        .filter_map(|v| v.to_str().ok())
        .flat_map(|v| v.split(','))
        .filter_map(|v| v.split(';').next())
        .any(|v| v.trim().eq_ignore_ascii_case(media_type))
}

pub(crate) async fn events(
    state: &AppState,
    after: Position,
    filter: EventFilter,
    limit: usize,
    head: Position,
) -> Result<EventPage, ReadError> {
    let log = state.commands.ledger().log();
    let mut events = Vec::new();
    let mut next_after = after;
    let mut scanned = 0;
    while events.len() < limit && scanned < SCAN_MAX {
        let batch = log.read(next_after, &filter.subjects, READ).await?;
        let ended = batch.len() < READ;
        scanned += batch.len();
        for recorded in batch {
            if events.len() == limit {
                break;
            }
            next_after = recorded.position;
            let event = recorded.event().ok();
            let Recorded {
                subject, position, ..
            } = &recorded;
            let wanted = filter.wants(state.projections(), subject, *position, event.as_ref());
            if wanted.await {
                events.push(StoredEvent::from(&recorded));
            }
        }
        if ended {
            // Nothing that fits stands between the last event that fitted and the head.
            if events.len() < limit {
                next_after = next_after.max(head);
            }
            break;
        }
    }
    Ok(EventPage {
        events,
        next_after,
        head,
    })
}

fn follow(
    state: &AppState,
    principal: &Principal,
    after: Position,
    filter: EventFilter,
) -> Response {
    let events = state.feed.subscribe(after, filter);
    // An error is the last that a feed gives, as no waiting would mend it.
    let frames = events
        .inspect(|batch| {
            if let Err(e) = batch {
                tracing::error!(error = %e, "a stream of events broke off");
            }
        })
        .scan((), |(), batch| future::ready(batch.ok()))
        .flat_map(|batch| {
            let frames: Vec<Bytes> = batch.iter().map(|event| event.frame()).collect();
            stream::iter(frames)
        });
    stream_response(state, principal, frames)
}

/// An answer of server-sent events.
pub(crate) fn stream_response(
    state: &AppState,
    principal: &Principal,
    frames: impl futures_util::Stream<Item = Bytes> + Send + 'static,
) -> Response {
    let heartbeat = Bytes::from_static(b": still here\n\n");
    let lease = match state.access.stream(principal, &state.cancel) {
        Ok(lease) => lease,
        Err(e) => return Problem::from(e).into_response(),
    };
    let upkeep = sse::Upkeep {
        lease,
        heartbeat: Some((state.settings.heartbeat, heartbeat)),
        whole: false,
        _open: state.metrics.open_stream(),
    };
    // Sent at once, so that the client knows that it is connected.
    let first = Bytes::from_static(b"retry: 1000\n\n");
    let headers = [
        (header::CONTENT_TYPE, sse::MEDIA_TYPE),
        (header::CACHE_CONTROL, "no-store"),
    ];
    (headers, sse::body(frames, first, upkeep)).into_response()
}

/// One event: its exact stored bytes.
#[utoipa::path(get, path = "/api/v1/events/{position}", tag = "events",
    params(("position" = u64, Path, description = "Its position.")),
    responses((status = 200, description = "The stored CloudEvent.", body = Object,
        content_type = "application/cloudevents+json")))]
pub(crate) async fn get_event(
    State(state): State<AppState>,
    principal: Principal,
    Named(position): Named<Position>,
    Params(NoParams {}): Params<NoParams>,
) -> Result<Response, Problem> {
    let log = state.commands.ledger().log();
    let found = match position {
        Position::ZERO => None,
        position => log.get(position).await?,
    };
    let seen = |r: &Recorded| principal.visible().sees(r.subject.project());
    let recorded = found.filter(seen).ok_or_else(|| {
        Problem::new(
            StatusCode::NOT_FOUND,
            "event_not_found",
            format!("there is no event at position {position}"),
            "positions start at 1; GET /api/v1/events says where the log ends",
        )
    })?;
    let headers = [(header::CONTENT_TYPE, envelope::MEDIA_TYPE)];
    Ok((headers, Body::from(recorded.bytes)).into_response())
}
