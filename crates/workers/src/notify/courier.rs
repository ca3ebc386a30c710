//! Sends the events of one subscription.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use daybook_events::lines::LineSource;
use daybook_events::log::{EventStream, Recorded};
use daybook_events::subscription::delivery::{Outcome, Try};
use daybook_events::subscription::{
    self, Command, Endpoint, EventDeadLettered, Format, PauseReason, Subscription,
    SubscriptionEvent,
};
use daybook_events::{
    Context, Event, EventId, Position, ProjectName, Subject, SubjectFilter, SubscriptionId,
    envelope, with_causes,
};
use daybook_projections::{Change, Feed};
use daybook_trace::figures::{self, LookedAfter};
use daybook_trace::{KeyValue, Kind, Work, attribute};
use futures_util::StreamExt;
use jiff::Timestamp;
use tokio::task::JoinSet;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::book::Book;
use super::desk::{Desk, Item};
use super::lease::Lease;
use super::pace::chance;
use super::sender::{Message, Sent};
use super::{Office, body};
use crate::pipeline::Stop;

const ROLE: &str = "notify";
/// So many positions at most have something that is not dealt with; then no more is read.
const OPEN_MAX: usize = 65_536;
/// When what failed here, and not at the receiver, is tried again.
const AGAIN: Duration = Duration::from_secs(2);
/// The same where somebody has to do something first.
const AGAIN_LATER: Duration = Duration::from_secs(30);
/// How long what is under way may take when the process ends.
const LAST_WORDS: Duration = Duration::from_secs(3);
/// How often the ledger itself is told how far it is, if it is further than it was. Lines, in which it
/// stands until then, must be kept for longer: see `--lines-keep`.
const PROGRESS_EVERY: Duration = Duration::from_hours(24);
/// The same by the number of tries.
const PROGRESS_TRIES: u64 = 10_000;
/// When it is told again if that did not work.
const PROGRESS_AGAIN: Duration = Duration::from_secs(60);
/// When an old secret is erased again if that did not work.
const ERASE_AGAIN: Duration = Duration::from_secs(600);
/// How long telling it may take when the process ends.
const PROGRESS_LAST: Duration = Duration::from_millis(500);
/// How often a proof is asked for that is not there yet.
const PROOF_EVERY: Duration = Duration::from_millis(250);

/// Why it ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum End {
    /// The subscription was deleted.
    Over,
    /// The process ends.
    Interrupted,
    /// The subscription may be somebody else's.
    Lost,
}

/// Why sending stops for now.
enum Break {
    End(End),
    /// The subscription is not what it was.
    Changed,
    /// Something here does not work.
    Trouble(String),
}

impl From<Stop> for Break {
    fn from(stop: Stop) -> Self {
        match stop {
            Stop::Moved(refusal) => Self::Trouble(refusal.message),
            Stop::Retry(why) => Self::Trouble(why),
            Stop::Fail(e) => Self::Trouble(e.message),
            Stop::Interrupted => Self::End(End::Interrupted),
        }
    }
}

/// What came of sending an item.
struct Done {
    key: String,
    item: Item,
    sent: Sent,
    took: Duration,
}

/// Sends the events of one subscription.
pub(super) struct Courier {
    office: Arc<Office>,
    project: ProjectName,
    id: SubscriptionId,
    subject: Subject,
    lease: Lease,
    cancel: CancellationToken,
}

impl Courier {
    pub(super) fn new(
        office: Arc<Office>,
        project: ProjectName,
        id: SubscriptionId,
        lease: Lease,
        cancel: CancellationToken,
    ) -> Self {
        Self {
            subject: Subject::Subscription(project.clone(), id),
            office,
            project,
            id,
            lease,
            cancel,
        }
    }

    /// Sends until the subscription is deleted, the process ends, or somebody else may send.
    pub(super) async fn run(&self) -> End {
        let mut book = None;
        // It is shown through all trouble, which is when somebody wants to see it.
        let mut looked_after = None;
        loop {
            let trouble = match self.go_on(&mut book, &mut looked_after).await {
                Break::End(end) => {
                    if let (Some(book), End::Interrupted) = (&mut book, end) {
                        book.note(true).await;
                        let told = self.tell_progress(book);
                        let _ = tokio::time::timeout(PROGRESS_LAST, told).await;
                    }
                    return end;
                }
                Break::Changed => continue,
                Break::Trouble(why) => why,
            };
            tracing::warn!(webhook.id = %self.id, why = %trouble, "nothing can be sent now; trying again");
            tokio::select! {
                () = self.cancel.cancelled() => return End::Interrupted,
                () = tokio::time::sleep(AGAIN) => {}
            }
            if !self.lease.holds() {
                return End::Lost;
            }
        }
    }

    async fn go_on(
        &self,
        book: &mut Option<Book>,
        looked_after: &mut Option<LookedAfter>,
    ) -> Break {
        let mut feed = self.office.bench.ledger.projections().feed();
        let state = match self.state() {
            Ok(state) => state,
            Err(stop) => return stop.into(),
        };
        if state.deleted {
            return Break::End(End::Over);
        }
        if state.pause.is_some() {
            *looked_after = None;
            return self.wait_for_change(&state, &mut feed).await;
        }
        let book = match book {
            Some(book) => book,
            None => {
                let lines = self.office.bench.lines.clone();
                let source = LineSource::Subscription(self.id);
                match Book::open(lines, source, state.progress.max(state.after)).await {
                    Ok(opened) => book.insert(opened),
                    Err(e) => return Break::Trouble(with_causes(&e)),
                }
            }
        };
        let looked_after =
            looked_after.get_or_insert_with(|| figures::webhooks().look_after(self.id));
        self.send_all(&state, book, looked_after, feed).await
    }

    fn state(&self) -> Result<Subscription, Stop> {
        let projections = self.office.bench.ledger.projections();
        let folded = projections.shared::<Subscription>(&self.subject)?;
        let state = folded.state.clone();
        state.ok_or_else(|| Stop::Retry("the subscription is not folded yet".into()))
    }

    async fn wait_for_change(&self, state: &Subscription, feed: &mut Feed) -> Break {
        let mut unused = Unused::of(state);
        loop {
            tokio::select! {
                () = self.cancel.cancelled() => return Break::End(End::Interrupted),
                () = sleep_until(unused.at) => self.erase(&mut unused).await,
                change = feed.next() => match change {
                    Some(change) if self.concerns(&change) => return Break::Changed,
                    Some(_) => {}
                    None => return Break::End(End::Lost),
                },
            }
        }
    }

    fn concerns(&self, change: &Change) -> bool {
        match change {
            Change::Of(subjects) => subjects.contains(&self.subject),
            Change::Any => true,
        }
    }

    /// Whether the subscription is another one than it was when sending began.
    fn is_other(&self, endpoint: &Endpoint) -> bool {
        // What cannot be read now is found out later.
        self.state()
            .is_ok_and(|now| !now.is_active() || now.endpoint != *endpoint)
    }

    /// Sends what comes, until there is a reason to stop.
    async fn send_all(
        &self,
        state: &Subscription,
        book: &mut Book,
        looked_after: &LookedAfter,
        mut feed: Feed,
    ) -> Break {
        let filter = SubjectFilter {
            project: Some(self.project.clone()),
            ..SubjectFilter::default()
        };
        book.rewind();
        let log = self.office.bench.ledger.log();
        let mut tail: EventStream = match log.tail(book.mark(), filter).await {
            Ok(tail) => tail,
            Err(e) => return Break::Trouble(with_causes(&e)),
        };
        let endpoint = &state.endpoint;
        let mut desk = Desk::default();
        let mut sending = JoinSet::new();
        // Until something is read again, what waited before is what is known.
        let mut has_read = false;
        let mut stuck = None;
        let mut reason = None;
        let mut unused = Unused::of(state);
        let mut told = state.progress;
        let mut tell_at = Instant::now() + until_told(state, Timestamp::now());
        // It may have changed before the feed was followed.
        if self.is_other(endpoint) {
            return Break::Changed;
        }
        loop {
            if reason.is_none() && (!self.lease.holds() || book.is_shared()) {
                reason = Some(Break::End(End::Lost));
            }
            if reason.is_none() {
                self.start(&mut desk, &mut sending, book, endpoint);
            } else if sending.is_empty() {
                break;
            }
            let reads = reason.is_none() && book.open_items() < OPEN_MAX;
            let next_at = desk.next_at().filter(|_| reason.is_none());
            let due = sleep_until(next_at);
            let further = book.mark() > told && reason.is_none();
            let to_erase = sleep_until(unused.at);
            let to_tell = sleep_until(further.then_some(tell_at));
            tokio::select! {
                biased;
                () = self.cancel.cancelled(), if reason.is_none() => {
                    reason = Some(Break::End(End::Interrupted));
                    let rest = self.finish(&mut sending, &mut desk, book, endpoint);
                    let _ = tokio::time::timeout(LAST_WORDS, rest).await;
                    break;
                }
                Some(done) = sending.join_next(), if !sending.is_empty() => {
                    if let Err(why) = self.settle(done, &mut desk, book, endpoint).await {
                        reason.get_or_insert(Break::Trouble(why));
                    }
                }
                change = feed.next(), if reason.is_none() => match change {
                    Some(change) if self.concerns(&change) => {
                        if self.is_other(endpoint) {
                            reason = Some(Break::Changed);
                        } else if let Ok(now) = self.state() {
                            unused.look(&now);
                        }
                    }
                    Some(_) => {}
                    None => reason = Some(Break::End(End::Lost)),
                },
                recorded = tail.next(), if reads => match recorded {
                    Some(Ok(recorded)) => {
                        if let Err(stop) = self.take(&recorded, &mut desk, book, endpoint).await {
                            let event = recorded.event().ok();
                            stuck = Some(event.map_or_else(Timestamp::now, |event| event.time));
                            reason = Some(stop.into());
                        }
                        has_read = true;
                        book.note(false).await;
                    }
                    Some(Err(e)) => reason = Some(Break::Trouble(with_causes(&e))),
                    None => reason = Some(Break::Trouble("the log's tail ended".into())),
                },
                () = due => {}
                () = to_tell => {}
                () = to_erase, if reason.is_none() => self.erase(&mut unused).await,
            }
            if has_read {
                let mut waits = book.waiting();
                // Whether it is to be sent is not known; it is no further than that all the same.
                if let Some(since) = stuck {
                    waits.events += 1;
                    waits.oldest.get_or_insert(since);
                }
                looked_after.waits(waits);
            }
            let mark = book.mark();
            if book.untold() >= PROGRESS_TRIES || (mark > told && tell_at <= Instant::now()) {
                let wait = if self.tell_progress(book).await {
                    told = mark;
                    PROGRESS_EVERY
                } else {
                    PROGRESS_AGAIN
                };
                tell_at = Instant::now() + wait;
            }
        }
        if matches!(reason, Some(Break::Changed)) && self.state().is_ok_and(|s| s.pause.is_some()) {
            // It may stay so for longer than lines are kept.
            self.tell_progress(book).await;
        }
        reason.unwrap_or(Break::Changed)
    }

    /// Takes what is under way to its end.
    async fn finish(
        &self,
        sending: &mut JoinSet<Done>,
        desk: &mut Desk,
        book: &mut Book,
        endpoint: &Endpoint,
    ) {
        while let Some(done) = sending.join_next().await {
            if let Err(error) = self.settle(done, desk, book, endpoint).await {
                tracing::error!(webhook.id = %self.id, %error, "sending an event broke off");
            }
        }
    }

    /// Looks at an event of the project: what is to be sent because of it is queued.
    async fn take(
        &self,
        recorded: &Recorded,
        desk: &mut Desk,
        book: &mut Book,
        endpoint: &Endpoint,
    ) -> Result<(), Stop> {
        let at = recorded.position;
        let (since, wanted) = match recorded.event() {
            Ok(event) => {
                let wanted = self.wanted(recorded, &event, endpoint).await?;
                (event.time, wanted)
            }
            // Nobody can do anything with it; the audit view shows it.
            Err(_) => (Timestamp::now(), Vec::new()),
        };
        // What is said of webhooks does not count as being further: saying how far one is would
        // make it further.
        if wanted.is_empty() && matches!(recorded.subject, Subject::Subscription(..)) {
            return Ok(());
        }
        let mut items = BTreeMap::new();
        for (key, item) in wanted {
            items.insert(item.position, (key, item));
        }
        let open = book.due(at, since, items.keys().copied().collect());
        for position in open {
            if let Some((key, item)) = items.remove(&position) {
                desk.push(key, item);
            }
        }
        Ok(())
    }

    /// What is to be sent because of an event, each with the key of its queue.
    async fn wanted(
        &self,
        recorded: &Recorded,
        event: &Event,
        endpoint: &Endpoint,
    ) -> Result<Vec<(String, Item)>, Stop> {
        let (at, subject) = (recorded.position, &recorded.subject);
        if let Subject::Subscription(..) = subject {
            if *subject != self.subject {
                return Ok(Vec::new());
            }
            // What is to be sent again is known only once it is folded that it was set aside.
            self.office.bench.folded(at).await?;
            return match event.payload() {
                Ok(SubscriptionEvent::TestRequested(_)) => {
                    Ok(vec![self.item(at, at, subject, event)?])
                }
                Ok(SubscriptionEvent::ReplayRequested(e)) => {
                    self.again(at, e.positions, endpoint).await
                }
                // Telling a receiver of what happens to its own webhook would have no end.
                _ => Ok(Vec::new()),
            };
        }
        self.office.bench.folded(at).await?;
        let projections = self.office.bench.ledger.projections();
        if !projections.passes(&endpoint.filter, subject, event)? {
            return Ok(Vec::new());
        }
        // Of two events that were accepted beside each other one does not count: it did not happen.
        if projections.is_void(at)? {
            return Ok(Vec::new());
        }
        if endpoint.format == Format::Cdevents && self.translated(recorded, event)?.is_none() {
            return Ok(Vec::new());
        }
        // It was set aside just before a process died, which could not note it.
        if self.state()?.dead.contains_key(&at) {
            return Ok(Vec::new());
        }
        Ok(vec![self.item(at, at, subject, event)?])
    }

    /// What was set aside, to be sent again.
    async fn again(
        &self,
        due_by: Position,
        positions: Vec<Position>,
        endpoint: &Endpoint,
    ) -> Result<Vec<(String, Item)>, Stop> {
        let mut items = Vec::new();
        let dead = self.state()?.dead;
        // What is not set aside any more was delivered after another demand.
        for position in positions.into_iter().filter(|p| dead.contains_key(p)) {
            let recorded = self.read(position).await?;
            let Ok(event) = recorded.event() else {
                continue;
            };
            // It was set aside in another format. Discarding it is what is left.
            let translates = endpoint.format == Format::Cdevents && !is_test(&recorded);
            if translates && self.translated(&recorded, &event)?.is_none() {
                continue;
            }
            items.push(self.item(due_by, position, &recorded.subject, &event)?);
        }
        Ok(items)
    }

    async fn read(&self, position: Position) -> Result<Recorded, Stop> {
        let found = self.office.bench.ledger.log().get(position).await;
        let found = found.map_err(|e| Stop::Retry(with_causes(&e)))?;
        found.ok_or_else(|| Stop::Retry(format!("there is no event at {position}")))
    }

    fn item(
        &self,
        due_by: Position,
        position: Position,
        subject: &Subject,
        event: &Event,
    ) -> Result<(String, Item), Stop> {
        let projections = self.office.bench.ledger.projections();
        let deployment = projections.run_of(subject, event)?;
        let key = match deployment {
            Some(id) => id.to_string(),
            None => subject.to_string(),
        };
        let item = Item {
            due_by,
            position,
            event: event.id,
            kind: event.short_kind().to_owned(),
            deployment,
        };
        Ok((key, item))
    }

    /// Starts to send what may be sent now.
    fn start(
        &self,
        desk: &mut Desk,
        sending: &mut JoinSet<Done>,
        book: &Book,
        endpoint: &Endpoint,
    ) {
        while sending.len() < self.office.options.at_once {
            let Some((key, item)) = desk.take(Instant::now()) else {
                return;
            };
            let tries = book.tries(item.due_by, item.position);
            tracing::debug!(webhook.id = %self.id, position = %item.position, tries, "sending");
            let (courier, endpoint) = (self.handle(), endpoint.clone());
            sending.spawn(async move {
                let began = Instant::now();
                let sent = match courier.send(&item, &endpoint).await {
                    Ok(sent) => sent,
                    Err(stop) => Sent::Withheld {
                        code: "not_ready",
                        message: match stop {
                            Stop::Moved(r) => r.message,
                            Stop::Retry(why) => why,
                            Stop::Fail(e) => e.message,
                            Stop::Interrupted => "the process ends".into(),
                        },
                    },
                };
                Done {
                    key,
                    item,
                    sent,
                    took: began.elapsed(),
                }
            });
        }
    }

    /// The same courier for a task of its own.
    fn handle(&self) -> Self {
        Self::new(
            self.office.clone(),
            self.project.clone(),
            self.id,
            self.lease.clone(),
            self.cancel.clone(),
        )
    }

    /// Sends one event, signed with the secrets of this moment.
    async fn send(&self, item: &Item, endpoint: &Endpoint) -> Result<Sent, Stop> {
        let recorded = self.read(item.position).await?;
        let event = recorded.event().map_err(|e| Stop::Retry(e.to_string()))?;
        let body = match endpoint.format {
            Format::Cdevents if !is_test(&recorded) => match self.translated(&recorded, &event)? {
                Some(body) => body,
                None => return Err(Stop::Retry("it means nothing in CDEvents any more".into())),
            },
            _ if endpoint.proof => self.proven(&recorded).await,
            _ => recorded.bytes.clone(),
        };
        let now = Timestamp::now();
        let id = item.event.to_string();
        let timestamp = now.as_second().to_string();
        let mut signatures = Vec::new();
        for secret in self.state()?.secrets_at(now) {
            let wanted = BTreeMap::from([(secret.secret.clone(), secret.clone())]);
            let found = self
                .office
                .bench
                .secrets
                .resolve(&self.project, &wanted)
                .await;
            let value = match found.map(|mut all| all.remove(&secret.secret)) {
                Ok(Some(value)) => value,
                Ok(None) => continue,
                // An old secret that is gone signs nothing any more.
                Err(_) if !signatures.is_empty() => continue,
                Err(e) => {
                    return Ok(Sent::Withheld {
                        code: e.code(),
                        message: e.to_line(),
                    });
                }
            };
            let mac = value.sign_as_standard_webhook(&id, &timestamp, &body);
            signatures.push(format!("v1,{mac}"));
        }
        if !self.lease.holds() {
            return Err(Stop::Interrupted);
        }
        let work = self.span(item, &recorded, &event, endpoint);
        let message = Message {
            traceparent: work.place(),
            url: endpoint.url.clone(),
            content_type: envelope::MEDIA_TYPE,
            id,
            timestamp,
            signature: signatures.join(" "),
            body,
        };
        let sent = work.run(self.office.sender.send(message)).await;
        match &sent {
            Sent::Taken { status } => work.say(answered(*status)),
            Sent::Refused { status, code, .. } => {
                if let Some(status) = status {
                    work.say(answered(*status));
                }
                work.fail(code.clone());
            }
            Sent::Withheld { code, .. } => work.fail(*code),
        }
        Ok(sent)
    }

    /// The sending of an event, in the trace that the event belongs to.
    fn span(&self, item: &Item, recorded: &Recorded, event: &Event, endpoint: &Endpoint) -> Work {
        let position = i64::try_from(item.position.0).unwrap_or(i64::MAX);
        Work::begin("deliver", Kind::Client, event.trace(), || {
            let mut all = daybook_trace::about(&recorded.subject);
            if item.deployment.is_some() && !matches!(recorded.subject, Subject::Deployment(..)) {
                let about = item.deployment.map(|id| id.to_string());
                all.extend(about.map(|id| KeyValue::new(attribute::DEPLOYMENT, id)));
            }
            all.extend([
                KeyValue::new(attribute::WEBHOOK, self.id.to_string()),
                KeyValue::new(attribute::EVENT_TYPE, item.kind.clone()),
                KeyValue::new(attribute::EVENT_POSITION, position),
                KeyValue::new("http.request.method", "POST"),
            ]);
            let url = url::Url::parse(endpoint.url.as_str()).ok();
            let host = url.and_then(|u| u.host_str().map(str::to_owned));
            all.extend(host.map(|host| KeyValue::new(attribute::SERVER, host)));
            all
        })
    }

    /// What an event means in the words of CDEvents.
    fn translated(&self, recorded: &Recorded, event: &Event) -> Result<Option<bytes::Bytes>, Stop> {
        let projections = self.office.bench.ledger.projections();
        let message = projections.cdevent_message(recorded, event)?;
        Ok(message.map(bytes::Bytes::from))
    }

    /// The event with its proof; without, if there is none in time.
    async fn proven(&self, recorded: &Recorded) -> bytes::Bytes {
        let Some(proofs) = &self.office.proofs else {
            return recorded.bytes.clone();
        };
        let until = Instant::now() + self.office.options.proof_wait;
        while Instant::now() < until && !self.cancel.is_cancelled() {
            match proofs.proof(recorded.position).await {
                Ok(Some(proof)) => {
                    if let Some(body) = body::with_proof(recorded, &proof) {
                        return body;
                    }
                    break;
                }
                Ok(None) => {}
                Err(why) => {
                    tracing::debug!(position = %recorded.position, %why, "a proof cannot be made now");
                }
            }
            tokio::time::sleep(PROOF_EVERY).await;
        }
        recorded.bytes.clone()
    }

    /// Records what came of sending an event, and says what follows.
    async fn settle(
        &self,
        done: Result<Done, tokio::task::JoinError>,
        desk: &mut Desk,
        book: &mut Book,
        endpoint: &Endpoint,
    ) -> Result<(), String> {
        let Done {
            key,
            item,
            sent,
            took,
        } = match done {
            Ok(done) => done,
            // Its queue stays held until sending begins anew.
            Err(error) => return Err(format!("sending an event broke off: {error}")),
        };
        let before = book.tries(item.due_by, item.position);
        let mut attempt = Try {
            position: item.position,
            due_by: item.due_by,
            event: item.event,
            kind: item.kind.clone(),
            deployment: item.deployment,
            number: before.saturating_add(1),
            outcome: Outcome::Delivered,
            status: None,
            code: None,
            message: None,
            millis: u64::try_from(took.as_millis()).unwrap_or(u64::MAX),
            next_at: None,
        };
        let wait = match sent {
            Sent::Taken { status } => {
                attempt.status = Some(status);
                if item.is_replay() && !self.replayed(&item).await {
                    // It is sent once more: better than a letter that is never taken off the list.
                    desk.put_off(key, Instant::now() + AGAIN);
                    return Ok(());
                }
                book.record(attempt).await;
                desk.finish(key);
                return Ok(());
            }
            Sent::Withheld { code, message } => {
                // The receiver has nothing to do with it.
                attempt.number = before;
                attempt.outcome = Outcome::Failed;
                attempt.code = Some(code.to_owned());
                attempt.message = Some(self.masked(&message));
                if code == "not_ready" {
                    desk.put_off(key, Instant::now() + AGAIN);
                    return Ok(());
                }
                AGAIN_LATER
            }
            Sent::Refused {
                status,
                code,
                message,
                retry_after,
            } => {
                attempt.status = status;
                attempt.message = Some(self.masked(&message));
                attempt.outcome = Outcome::Failed;
                let number = attempt.number;
                attempt.code = Some(code.clone());
                if item.is_replay() && self.is_discarded(&item) {
                    attempt.outcome = Outcome::Discarded;
                    book.record(attempt).await;
                    desk.finish(key);
                    return Ok(());
                }
                if status == Some(410) {
                    attempt.outcome = Outcome::Gone;
                    self.pause(&item, PauseReason::Gone).await;
                } else if number >= endpoint.tries && self.set_aside(&item, number, &code).await {
                    attempt.outcome = Outcome::DeadLettered;
                    book.record(attempt).await;
                    desk.finish(key);
                    return Ok(());
                }
                self.office
                    .options
                    .pace
                    .after(number, retry_after, chance())
            }
        };
        attempt.next_at = jiff::SignedDuration::try_from(wait)
            .ok()
            .and_then(|wait| Timestamp::now().checked_add(wait).ok());
        book.record(attempt).await;
        desk.put_off(key, Instant::now() + wait);
        Ok(())
    }

    /// Whether what was to be sent again is not wanted any more, or was delivered meanwhile.
    fn is_discarded(&self, item: &Item) -> bool {
        self.state()
            .is_ok_and(|s| !s.dead.contains_key(&item.position))
    }

    fn masked(&self, text: &str) -> String {
        let secrets = &self.office.bench.secrets;
        let masker = secrets.masker_or_withhold(Some(&self.project));
        masker.mask(text).into_owned()
    }

    fn context(&self, item: &Item, step: &str) -> Context {
        let step = format!("{step}/{}/{}", item.due_by, item.position);
        let mut context = self
            .office
            .bench
            .follow_up(ROLE, EventId(self.id.0), self.id.0, &step);
        context.causation = Some(item.event);
        context
    }

    async fn append(&self, context: &Context, command: Command) -> Result<(), Stop> {
        let bench = &self.office.bench;
        let executed = bench
            .append::<Subscription>(&self.subject, context, |state| {
                subscription::decide(state, command.clone())
            })
            .await?;
        match executed.position() {
            Some(position) => bench.folded(position).await,
            None => Ok(()),
        }
    }

    /// Records that what was set aside was delivered; false if that did not work.
    async fn replayed(&self, item: &Item) -> bool {
        let command = Command::Replayed {
            position: item.position,
            event: item.event,
        };
        let context = self.context(item, "replayed");
        let recorded = self.append(&context, command).await;
        if let Err(stop) = &recorded {
            tracing::warn!(webhook.id = %self.id, position = %item.position, ?stop,
                "that an event was delivered after all is not recorded");
        }
        recorded.is_ok()
    }

    /// Pauses the subscription. If that does not work now, the next answer leads here again.
    async fn pause(&self, item: &Item, reason: PauseReason) {
        // It may be resumed, and answered so again.
        let context = Context {
            id: EventId(uuid::Uuid::now_v7()),
            ..self.context(item, "paused")
        };
        if let Err(stop) = self.append(&context, Command::Pause(reason)).await {
            tracing::warn!(webhook.id = %self.id, ?stop, "the webhook was not paused");
        }
    }

    /// Sets an event aside; false if that is not (yet) recorded.
    async fn set_aside(&self, item: &Item, tries: u32, code: &str) -> bool {
        let command = Command::SetAside(EventDeadLettered {
            position: item.position,
            event: item.event,
            tries,
            code: code.to_owned(),
        });
        // With no room for it the subscription is paused instead, and this is asked for again.
        let context = Context {
            id: EventId(uuid::Uuid::now_v7()),
            ..self.context(item, "set-aside")
        };
        if let Err(stop) = self.append(&context, command).await {
            tracing::warn!(webhook.id = %self.id, position = %item.position, ?stop,
                "an event was not set aside");
            return false;
        }
        self.state().is_ok_and(|s| {
            let letter = s.dead.get(&item.position);
            letter.is_some_and(|l| !l.replaying)
        })
    }

    /// Erases the secret before the present one, which is used no more.
    async fn erase(&self, unused: &mut Unused) {
        unused.at = Some(Instant::now() + ERASE_AGAIN);
        let Ok(state) = self.state() else {
            return;
        };
        unused.look(&state);
        let Some(old) = state.previous.filter(|p| p.until <= Timestamp::now()) else {
            return;
        };
        unused.at = Some(Instant::now() + ERASE_AGAIN);
        let secrets = &self.office.bench.secrets;
        match secrets.erase(&self.project, &old.secret.id()).await {
            Ok(()) => {
                unused.erased = old.secret.version;
                unused.at = None;
            }
            Err(error) => {
                tracing::warn!(webhook.id = %self.id, %error, "an old secret was not erased");
            }
        }
    }

    /// Tells the ledger how far it is, if that knows less; false if that did not work. The lines in
    /// which it stands too are not kept for ever.
    async fn tell_progress(&self, book: &mut Book) -> bool {
        book.told();
        let mark = book.mark();
        let known = self.state().map(|s| s.progress);
        if known.is_ok_and(|known| mark <= known) {
            return true;
        }
        let step = format!("progress/{mark}");
        let context = self
            .office
            .bench
            .follow_up(ROLE, EventId(self.id.0), self.id.0, &step);
        let context = Context {
            causation: None,
            ..context
        };
        if let Err(stop) = self.append(&context, Command::Progress(mark)).await {
            tracing::debug!(webhook.id = %self.id, ?stop, "progress was not recorded");
            return false;
        }
        true
    }
}

/// When the secret before the present one is to be erased.
#[derive(Debug, Default)]
struct Unused {
    at: Option<Instant>,
    /// The version that was erased.
    erased: u32,
}

impl Unused {
    fn of(state: &Subscription) -> Self {
        let mut unused = Self::default();
        unused.look(state);
        unused
    }

    fn look(&mut self, state: &Subscription) {
        let previous = state.previous.as_ref();
        self.at = previous
            .filter(|p| p.secret.version > self.erased)
            .map(|p| {
                let left = p.until.duration_since(Timestamp::now());
                Instant::now() + Duration::try_from(left).unwrap_or_default()
            });
    }
}

/// How long the ledger need not be told how far it is.
fn until_told(state: &Subscription, now: Timestamp) -> Duration {
    let since = now.duration_since(state.progress_at);
    let since = Duration::try_from(since).unwrap_or_default();
    PROGRESS_EVERY.saturating_sub(since)
}

/// Waits until then, or for ever.
async fn sleep_until(at: Option<Instant>) {
    match at {
        Some(at) => tokio::time::sleep_until(at).await,
        None => std::future::pending().await,
    }
}

fn answered(status: u16) -> KeyValue {
    KeyValue::new(attribute::STATUS, i64::from(status))
}

fn is_test(recorded: &Recorded) -> bool {
    matches!(recorded.subject, Subject::Subscription(..))
}
