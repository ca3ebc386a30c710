//! What was sent to webhooks, and what came of it: the delivery log, as pages and as a stream.

use std::collections::VecDeque;
use std::sync::Arc;

use axum::extract::State;
use axum::http::HeaderMap;
use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use daybook_events::lines::{Line, LineLog, LineSource};
use daybook_events::log::ReadError;
use daybook_events::subscription::delivery::{Entry, Outcome, Try, retrying as tried_again};
use daybook_events::subscription::{self, Subscription};
use daybook_events::{EventId, Position, Subject, SubscriptionId};
use daybook_projections::{Projections, QueryError};
use futures_util::stream::{self, BoxStream, StreamExt};
use jiff::Timestamp;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use tokio::sync::watch;
use utoipa::IntoParams;

use crate::access::Principal;
use crate::answer::Answer;
use crate::extract::{self, Named, Params};
use crate::problem::Problem;
use crate::routes::events::{accepts, stream_response};
use crate::routes::history::page;
use crate::routes::logs::LAST_EVENT_ID;
use crate::sse::{self, END};
use crate::state::AppState;

/// Lines of the delivery log that are read at once.
const READ: u64 = 256;
/// Most lines that one page looks at.
const LOOK: u64 = 10_000;
/// Most lines at the end that are looked at for what is tried again.
const NEWEST: u64 = 2_000;
/// So many of them are read first: the newest says whether more are needed.
const TAIL: u64 = 64;

/// What was sent.
#[derive(Debug, Serialize, JsonSchema)]
pub(crate) struct DeliveryList {
    /// The tries, the newest first.
    deliveries: Vec<DeliveryTry>,
    /// The next page is `before` this; none if there is none.
    next: Option<u64>,
    /// The newest line of the delivery log. A stream goes on after it.
    newest: u64,
}

/// One try.
#[derive(Debug, Serialize, JsonSchema)]
pub(crate) struct DeliveryTry {
    /// Its number in the delivery log, which `before` and the id of a streamed event mean.
    seq: u64,
    /// When.
    time: Timestamp,
    /// What was sent, and what came of it.
    #[serde(flatten)]
    attempt: Try,
}

impl DeliveryTry {
    /// The try that a line of the delivery log is about, if it is about one.
    fn of(line: Line) -> Option<Self> {
        Some(Self {
            attempt: Entry::from_text(&line.line.text)?.attempt?,
            seq: line.seq,
            time: line.line.time,
        })
    }
}

/// An event that was not taken, and is tried again.
#[derive(Debug, Serialize, JsonSchema)]
pub(crate) struct RetryView {
    /// Its position.
    position: Position,
    /// Its id.
    event: EventId,
    /// Its type, without the common prefix.
    kind: String,
    /// How often it was tried.
    tries: u32,
    /// What was wrong the last time, as a stable code.
    code: Option<String>,
    /// When it is tried again, at the earliest.
    next_at: Option<Timestamp>,
}

impl From<Try> for RetryView {
    fn from(last: Try) -> Self {
        Self {
            position: last.position,
            event: last.event,
            kind: last.kind,
            tries: last.number,
            code: last.code,
            next_at: last.next_at,
        }
    }
}

/// Which tries are wanted.
#[derive(Debug, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
#[serde(deny_unknown_fields)]
pub(crate) struct DeliveryQuery {
    /// Most tries on a page: 1 to 500, 50 if not given.
    limit: Option<u32>,
    /// Only tries before this number.
    before: Option<u64>,
    /// Only those with this outcome: `delivered`, `failed`, `dead_lettered`, `discarded`
    /// or `gone`.
    #[param(value_type = Option<String>)]
    outcome: Option<Outcome>,
    /// Only those of the event at this position.
    position: Option<u64>,
}

impl DeliveryQuery {
    fn wants(&self, attempt: &Try) -> bool {
        self.outcome.is_none_or(|o| o == attempt.outcome)
            && self.position.is_none_or(|p| p == attempt.position.0)
    }
}

/// What was sent to a webhook, and what came of it: the tries, the newest first, for as long as
/// output is kept. With `Accept: text/event-stream` they come as they are made; the id of each is its
/// number. Once the webhook is deleted, the stream ends with an event `end`.
#[utoipa::path(get, path = "/api/v1/webhooks/{webhook}/deliveries", tag = "webhooks",
    params(("webhook" = String, Path, description = "The webhook."), DeliveryQuery,
        ("Last-Event-ID" = Option<u64>, Header,
            description = "A stream goes on after this number; with those to come if not given.")),
    responses((status = 200, description = "The tries.", content(
        (DeliveryList = "application/json"), (String = "text/event-stream")))))]
pub(crate) async fn list_deliveries(
    State(state): State<AppState>,
    principal: Principal,
    Named(id): Named<SubscriptionId>,
    Params(query): Params<DeliveryQuery>,
    headers: HeaderMap,
) -> Result<Response, Problem> {
    state.commands.webhook(id)?;
    let source = LineSource::Subscription(id);
    let limit = page(query.limit, None)?.limit();
    let newest = state.lines.last(source).await?;
    if accepts(&headers, sse::MEDIA_TYPE) {
        let last = headers.get(LAST_EVENT_ID).map(|id| {
            let text = id.to_str().unwrap_or_default();
            extract::position("Last-Event-ID", text)
        });
        let last = last.transpose()?.map_or(newest, |p| p.0);
        // Lines that were all removed begin with 1 again.
        return follow(&state, &principal, id, last.min(newest), query).await;
    }
    let list = list(&state, source, &query, limit, newest).await?;
    Ok(Answer::ok(list).into_response())
}

async fn list(
    state: &AppState,
    source: LineSource,
    query: &DeliveryQuery,
    limit: usize,
    newest: u64,
) -> Result<DeliveryList, Problem> {
    let mut end = query
        .before
        .map_or(newest, |b| newest.min(b.saturating_sub(1)));
    let oldest = end.saturating_sub(LOOK);
    let mut deliveries = Vec::new();
    while end > oldest && deliveries.len() < limit {
        let after = end.saturating_sub(READ).max(oldest);
        let wanted = usize::try_from(end - after).unwrap_or(0);
        let lines = state.lines.read(source, after, wanted).await?;
        let lines = lines.into_iter().rev().filter(|l| l.seq <= end);
        let tries = lines.filter_map(DeliveryTry::of);
        let fitting = tries.filter(|d| query.wants(&d.attempt));
        deliveries.extend(fitting.take(limit - deliveries.len()));
        end = after;
    }
    let next = match deliveries.last() {
        Some(last) if deliveries.len() == limit => Some(last.seq),
        _ => Some(end + 1),
    };
    Ok(DeliveryList {
        deliveries,
        next: next.filter(|n| *n > 1),
        newest,
    })
}

async fn follow(
    state: &AppState,
    principal: &Principal,
    id: SubscriptionId,
    after: u64,
    query: DeliveryQuery,
) -> Result<Response, Problem> {
    let project = state.projections().project_of(id)?;
    let project = project.ok_or_else(subscription::not_found)?;
    let source = LineSource::Subscription(id);
    let follower = Follower {
        live: state.lines.follow(source, after).await?,
        lines: state.lines.clone(),
        changes: state.projections().changes(),
        projections: state.projections().clone(),
        id,
        subject: Subject::Subscription(project, id),
        read: after,
        rest: None,
    };
    let frames = stream::unfold(Some(follower), |open| async move {
        let mut follower = open?;
        match follower.next().await {
            Ok(Some(line)) => Some((Ok(line), Some(follower))),
            Ok(None) => Some((Err(Bytes::from_static(END)), None)),
            Err(e) => {
                tracing::error!(webhook.id = %follower.id, error = %e, "a stream of deliveries broke off");
                None
            }
        }
    })
    .filter_map(move |next| {
        std::future::ready(match next {
            Ok(line) => DeliveryTry::of(line)
                .filter(|d| query.wants(&d.attempt))
                .map(|d| frame(&d)),
            Err(end) => Some(end),
        })
    });
    Ok(stream_response(state, principal, frames))
}

/// The delivery log of a webhook as it grows, until the webhook is deleted and all is said.
struct Follower {
    lines: Arc<dyn LineLog>,
    live: BoxStream<'static, Result<Line, ReadError>>,
    projections: Projections,
    changes: watch::Receiver<Position>,
    id: SubscriptionId,
    subject: Subject,
    /// The last line that was read.
    read: u64,
    /// What is left of the delivery log, once the webhook is deleted.
    rest: Option<VecDeque<Line>>,
}

/// Why a delivery log could not be followed.
#[derive(Debug, thiserror::Error)]
enum FollowError {
    #[error(transparent)]
    Lines(#[from] ReadError),
    #[error(transparent)]
    State(#[from] QueryError),
    #[error("nobody says any more what comes")]
    Closed,
}

impl Follower {
    /// The next line; none at the end.
    async fn next(&mut self) -> Result<Option<Line>, FollowError> {
        while self.rest.is_none() {
            // Changes from here on are noticed in the wait below.
            self.changes.borrow_and_update();
            if self.is_deleted()? {
                self.rest = Some(VecDeque::new());
                break;
            }
            tokio::select! {
                line = self.live.next() => {
                    let line = line.ok_or(FollowError::Closed)??;
                    self.read = line.seq;
                    return Ok(Some(line));
                }
                changed = self.changes.changed() => changed.map_err(|_| FollowError::Closed)?,
            }
        }
        self.rest().await
    }

    fn is_deleted(&self) -> Result<bool, QueryError> {
        let found = self.projections.shared::<Subscription>(&self.subject)?;
        Ok(found.state.as_ref().is_none_or(|webhook| webhook.deleted))
    }

    /// The next line of those that are there.
    async fn rest(&mut self) -> Result<Option<Line>, FollowError> {
        let rest = self.rest.get_or_insert_default();
        if rest.is_empty() {
            let wanted = usize::try_from(READ).unwrap_or(0);
            let source = LineSource::Subscription(self.id);
            rest.extend(self.lines.read(source, self.read, wanted).await?);
        }
        let line = rest.pop_front();
        self.read = line.as_ref().map_or(self.read, |l| l.seq);
        Ok(line)
    }
}

fn frame(sent: &DeliveryTry) -> Bytes {
    // Texts and numbers can always be written.
    let json = serde_json::to_vec(sent).unwrap_or_default();
    sse::frame(&sent.seq.to_string(), None, &json)
}

/// What the receiver of a webhook did not take, and is tried again, by position.
///
/// The newest line says how far back what is open begins, so that one read is enough where nothing is. A
/// line that its writer took for lost, and that nothing came after yet, is found with the next try.
pub(crate) async fn retrying(
    state: &AppState,
    id: SubscriptionId,
) -> Result<Vec<RetryView>, Problem> {
    let source = LineSource::Subscription(id);
    let newest = state.lines.last(source).await?;
    if newest == 0 {
        return Ok(Vec::new());
    }
    let oldest = newest.saturating_sub(NEWEST);
    let end = newest.saturating_sub(TAIL).max(oldest);
    let tail = entries(state, source, end, newest).await?;
    let last = tail.last();
    let begin = last.map_or(oldest, |(seq, entry)| match entry.since {
        0 => seq - 1,
        since => since.saturating_sub(1).max(oldest),
    });
    let mut found = Vec::new();
    let mut after = begin;
    while after < end {
        let until = end.min(after + READ);
        found.extend(entries(state, source, after, until).await?);
        after = until;
    }
    found.extend(tail.into_iter().filter(|(seq, _)| *seq > begin));
    let found = found.into_iter().map(|(_, entry)| entry);
    Ok(tried_again(found)
        .into_iter()
        .map(RetryView::from)
        .collect())
}

/// The lines of a delivery log after one up to another that can be read, with their numbers.
async fn entries(
    state: &AppState,
    source: LineSource,
    after: u64,
    until: u64,
) -> Result<Vec<(u64, Entry)>, Problem> {
    let wanted = usize::try_from(until.saturating_sub(after)).unwrap_or(0);
    let lines = state.lines.read(source, after, wanted).await?;
    // Where lines were removed, those that are read begin later.
    let lines = lines.into_iter().filter(|l| l.seq <= until);
    let read = lines.filter_map(|l| Some((l.seq, Entry::from_text(&l.line.text)?)));
    Ok(read.collect())
}
