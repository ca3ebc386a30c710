//! The one worker driver: every worker of Daybook runs on it.
//!
//! A durable consumer hands over an event. The driver waits until the projections have folded it,
//! activates the worker, and answers by what came of it. An activation takes no input but *which*
//! aggregate it is about: it re-reads the world, compares what should be with what is, does one
//! idempotent step, and appends what happened. So it does not matter whether an event is delivered
//! once, twice or late, or in which of several processes.
//!
//! What the driver takes care of, so that no worker has to: order of activations with the same
//! key, a bound on how many run at once, heartbeats for long steps, a delay between tries, an end
//! to tries (the last one records the failure), panics, and a shutdown that hands unfinished work
//! to others at once.

use std::borrow::Cow;
use std::collections::HashMap;
use std::panic::AssertUnwindSafe;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use daybook_events::log::{Consumer, ConsumerConfig, Delivery, EventLog};
use daybook_events::{Event, Position, Subject, SubjectFilter};
use daybook_projections::{Behind, Projections};
use daybook_trace::{KeyValue, Kind, Work, attribute};
use futures_util::FutureExt;
use tokio::sync::{Semaphore, oneshot};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::pipeline::deployment_of;
use crate::pipeline::traced::About;

/// What a worker is woken with.
#[derive(Debug, Clone)]
pub struct Activation {
    /// The event that woke it. Only a hint: the world may have moved on.
    pub event: Event,
    /// Its aggregate.
    pub subject: Subject,
    /// Its position. The projections have folded at least up to here.
    pub position: Position,
    /// How often this event has been handed over, from 1.
    pub attempt: u32,
    /// Ends the activation: the process is shutting down.
    pub cancel: CancellationToken,
}

/// What came of an activation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    /// Nothing is left to do for this event.
    Done,
    /// Look again after this long. Not counted as a failure, but as a try.
    Wait(Duration),
    /// It did not work this time; try again later, with growing delays, up to the bound.
    Retry(String),
    /// The process shuts down; somebody else is to go on, at once.
    Interrupted,
    /// The event was handed over again meanwhile, and somebody else works on it: theirs is the
    /// answer. If they die before they give it, it is handed over once more.
    Overtaken,
}

/// One kind of worker.
#[async_trait]
pub trait Worker: Send + Sync + 'static {
    /// Name of its durable consumer.
    fn name(&self) -> String;

    /// What its activations are called in traces: the same in all clusters.
    fn unit(&self) -> Cow<'static, str> {
        self.name().into()
    }

    /// The events that may concern it.
    fn filter(&self) -> SubjectFilter;

    /// Whether an event of this type (without the common prefix) concerns it.
    fn wants(&self, kind: &str) -> bool;

    /// Activations with the same key run one after the other, in log order. By default the
    /// aggregate is the key.
    fn key(&self, subject: &Subject) -> String {
        subject.to_string()
    }

    /// How many activations may run at once in this process.
    fn concurrency(&self) -> usize {
        16
    }

    /// How many deliveries may be open over all processes.
    fn max_in_flight(&self) -> usize {
        256
    }

    /// Compares, acts, appends.
    async fn activate(&self, activation: &Activation) -> Outcome;

    /// Called when the bound is reached: records that it was given up. Unless it is then
    /// [`Outcome::Done`], it is called again later: what nobody knows to have ended would wait for
    /// ever.
    async fn give_up(&self, activation: &Activation, why: &str) -> Outcome;
}

/// How the driver treats its workers.
#[derive(Debug, Clone)]
pub struct DriverOptions {
    /// An event is handed to somebody else when its worker has been silent for this long.
    pub ack_wait: Duration,
    /// Tries before an event is given up.
    pub max_tries: u32,
    /// How long unfinished activations may take at shutdown.
    pub drain: Duration,
}

impl Default for DriverOptions {
    fn default() -> Self {
        Self {
            ack_wait: Duration::from_secs(15),
            max_tries: 12,
            drain: Duration::from_secs(5),
        }
    }
}

/// Runs a worker until `cancel`. Returns when all its activations have ended.
pub async fn run(
    worker: Arc<dyn Worker>,
    log: Arc<dyn EventLog>,
    projections: Projections,
    options: DriverOptions,
    cancel: CancellationToken,
) {
    let name = worker.name();
    let config = ConsumerConfig {
        ack_wait: options.ack_wait,
        // The driver counts the tries. What a log hands over no more could not even be ended.
        max_deliver: u32::MAX,
        max_in_flight: worker.max_in_flight(),
        ..ConsumerConfig::new(name.clone(), worker.filter())
    };
    let driver = Arc::new(Driver {
        worker,
        projections,
        options,
        chains: Mutex::default(),
    });
    let tasks = TaskTracker::new();
    let permits = Arc::new(Semaphore::new(driver.worker.concurrency()));
    'reconnect: while !cancel.is_cancelled() {
        let Some(consumer) = open(&*log, &config, &cancel).await else {
            break;
        };
        loop {
            let permit = tokio::select! {
                biased;
                () = cancel.cancelled() => break 'reconnect,
                permit = permits.clone().acquire_owned() => match permit {
                    Ok(permit) => permit,
                    Err(_) => break 'reconnect,
                },
            };
            let delivery = tokio::select! {
                biased;
                () = cancel.cancelled() => break 'reconnect,
                delivery = consumer.next() => delivery,
            };
            match delivery {
                Ok(delivery) => {
                    let Some(event) = driver.wanted(&delivery).await else {
                        continue;
                    };
                    let driver = driver.clone();
                    let turn = driver.take_turn(&delivery);
                    let cancel = cancel.child_token();
                    tasks.spawn(async move {
                        let _permit = permit;
                        driver.handle(delivery, event, turn, cancel).await;
                    });
                }
                Err(error) => {
                    tracing::warn!(worker = %name, %error, "deliveries were interrupted; reopening");
                    continue 'reconnect;
                }
            }
        }
    }
    tasks.close();
    if tokio::time::timeout(driver.options.drain, tasks.wait())
        .await
        .is_err()
    {
        tracing::warn!(worker = %name, "some activations did not end in time; their events will be delivered again");
    }
}

async fn open(
    log: &dyn EventLog,
    config: &ConsumerConfig,
    cancel: &CancellationToken,
) -> Option<Arc<dyn Consumer>> {
    let mut delay = Duration::from_millis(100);
    loop {
        match log.consumer(config.clone()).await {
            Ok(consumer) => return Some(consumer),
            Err(error) => {
                tracing::warn!(worker = %config.name, %error, "the consumer cannot be opened; trying again");
            }
        }
        tokio::select! {
            () = cancel.cancelled() => return None,
            () = tokio::time::sleep(delay) => delay = (delay * 2).min(Duration::from_secs(5)),
        }
    }
}

struct Driver {
    worker: Arc<dyn Worker>,
    projections: Projections,
    options: DriverOptions,
    /// For each key the end of the newest activation's turn.
    chains: Mutex<HashMap<String, (u64, oneshot::Receiver<()>)>>,
}

/// A place in the queue of one key. Dropping it lets the next one go.
struct Turn {
    key: String,
    number: u64,
    before: Option<oneshot::Receiver<()>>,
    _end: oneshot::Sender<()>,
}

impl Driver {
    fn take_turn(&self, delivery: &Delivery) -> Turn {
        let key = self.worker.key(&delivery.recorded.subject);
        let (end, ended) = oneshot::channel();
        let mut chains = self.chains.lock().unwrap_or_else(PoisonError::into_inner);
        let (number, before) = match chains.remove(&key) {
            Some((n, before)) => (n + 1, Some(before)),
            None => (0, None),
        };
        chains.insert(key.clone(), (number, ended));
        Turn {
            key,
            number,
            before,
            _end: end,
        }
    }

    fn end_turn(&self, turn: &Turn) {
        let mut chains = self.chains.lock().unwrap_or_else(PoisonError::into_inner);
        if chains
            .get(&turn.key)
            .is_some_and(|(n, _)| *n == turn.number)
        {
            chains.remove(&turn.key);
        }
    }

    /// The event of a delivery, if it concerns the worker. Most do not: they are answered here, and
    /// cost neither a task nor a turn.
    async fn wanted(&self, delivery: &Delivery) -> Option<Event> {
        let answered = match delivery.recorded.event() {
            Ok(event) if self.worker.wants(event.short_kind()) => return Some(event),
            Ok(_) => delivery.reply.ack().await,
            Err(error) => {
                // The audit view shows it; no worker can do anything with it.
                tracing::error!(worker = %self.worker.name(), position = %delivery.recorded.position, %error,
                    "an event cannot be read and is set aside");
                delivery.reply.term().await
            }
        };
        if let Err(error) = answered {
            tracing::debug!(worker = %self.worker.name(), %error, "an answer was lost; the event will come again");
        }
        None
    }

    async fn handle(
        &self,
        delivery: Delivery,
        event: Event,
        mut turn: Turn,
        cancel: CancellationToken,
    ) {
        let kind = daybook_failpoints::ARMED.then(|| event.short_kind().to_owned());
        let outcome = {
            let work = self.work(&delivery, event, &mut turn, &cancel);
            tokio::pin!(work);
            let mut heartbeat = tokio::time::interval(self.options.ack_wait / 3);
            heartbeat.tick().await;
            loop {
                tokio::select! {
                    outcome = &mut work => break outcome,
                    _ = heartbeat.tick() => {
                        if let Err(error) = delivery.reply.progress().await {
                            tracing::debug!(worker = %self.worker.name(), %error, "a heartbeat was lost");
                        }
                    }
                }
            }
        };
        self.end_turn(&turn);
        drop(turn);
        self.answering("ack.before", kind.as_deref(), &outcome);
        let answered = match outcome {
            Some(Outcome::Done) => delivery.reply.ack().await,
            Some(Outcome::Wait(delay)) => delivery.reply.nak(delay).await,
            Some(Outcome::Retry(_)) => delivery.reply.nak(self.delay(delivery.attempt)).await,
            Some(Outcome::Interrupted) => delivery.reply.nak(Duration::ZERO).await,
            Some(Outcome::Overtaken) => Ok(()),
            None => delivery.reply.term().await,
        };
        self.answering("ack.after", kind.as_deref(), &outcome);
        if let Err(error) = answered {
            tracing::debug!(worker = %self.worker.name(), %error, "an answer was lost; the event will come again");
        }
    }

    /// A failpoint beside an acknowledgement.
    fn answering(&self, place: &str, kind: Option<&str>, outcome: &Option<Outcome>) {
        if matches!(outcome, Some(Outcome::Done)) {
            daybook_failpoints::reached_for(place, || {
                format!("{} {}", self.worker.name(), kind.unwrap_or_default())
            });
        }
    }

    /// Growing delays between tries: 0.2 s, 0.4 s, … at most 30 s.
    fn delay(&self, attempt: u32) -> Duration {
        Duration::from_millis(200 << attempt.saturating_sub(1).min(8)).min(Duration::from_secs(30))
    }

    /// One activation; `None` if the event is set aside for good.
    async fn work(
        &self,
        delivery: &Delivery,
        event: Event,
        turn: &mut Turn,
        cancel: &CancellationToken,
    ) -> Option<Outcome> {
        if let Some(before) = turn.before.take() {
            let _ = before.await;
        }
        let wait = self
            .projections
            .wait_for(delivery.recorded.position, Duration::from_secs(30));
        let folded = tokio::select! {
            () = cancel.cancelled() => return Some(Outcome::Interrupted),
            folded = wait => folded,
        };
        let activation = Activation {
            event,
            subject: delivery.recorded.subject.clone(),
            position: delivery.recorded.position,
            attempt: delivery.attempt,
            cancel: cancel.clone(),
        };
        let unit = self.unit(&activation);
        let outcome = unit.run(self.tried(&activation, folded)).await;
        self.end(&unit, &outcome);
        outcome
    }

    /// What comes of an activation, once its event is folded, or is not for a long time.
    async fn tried(&self, activation: &Activation, folded: Result<(), Behind>) -> Option<Outcome> {
        let outcome = match folded {
            Err(behind) => Outcome::Retry(behind.to_string()),
            // Every try ended with its process.
            Ok(()) if activation.attempt > self.options.max_tries * 2 => {
                Outcome::Retry("no try came to an end".to_owned())
            }
            Ok(()) => caught(self.worker.activate(activation)).await,
        };
        match &outcome {
            Outcome::Retry(why) if activation.attempt >= self.options.max_tries => {
                tracing::error!(worker = %self.worker.name(), subject = %activation.subject,
                    position = %activation.position, attempts = activation.attempt, %why, "given up");
                match caught(self.worker.give_up(activation, why)).await {
                    Outcome::Done => None,
                    unrecorded => Some(unrecorded),
                }
            }
            Outcome::Retry(why) => {
                tracing::warn!(worker = %self.worker.name(), subject = %activation.subject,
                    position = %activation.position, attempt = activation.attempt, %why, "will be tried again");
                Some(outcome)
            }
            _ => Some(outcome),
        }
    }

    /// The unit of work that an activation is: in the trace that its event belongs to.
    fn unit(&self, a: &Activation) -> Work {
        let trace = a.event.trace();
        if !daybook_trace::is_recording() {
            return Work::pass_on(trace);
        }
        let row = deployment_of(&a.subject, &a.event)
            .and_then(|id| self.projections.deployment(id).ok().flatten());
        let about = row.as_ref().map(About::of);
        // Whoever appended the event may have known of no trace.
        let trace = trace.or_else(|| about.as_ref().and_then(About::trace));
        Work::begin(self.worker.unit(), Kind::Consumer, trace, || {
            let mut all = match &about {
                Some(about) => about.attributes(),
                None => daybook_trace::about(&a.subject),
            };
            if let (Some(_), Subject::Build(_, id)) = (&about, &a.subject) {
                all.push(KeyValue::new(attribute::BUILD, id.to_string()));
            }
            let position = i64::try_from(a.position.0).unwrap_or(i64::MAX);
            all.extend([
                KeyValue::new(attribute::WORKER, self.worker.name()),
                KeyValue::new(attribute::EVENT_TYPE, a.event.short_kind().to_owned()),
                KeyValue::new(attribute::EVENT_POSITION, position),
                KeyValue::new(attribute::ATTEMPT, i64::from(a.attempt)),
            ]);
            all
        })
    }

    /// Says what came of a unit of work. Most activations find that there is nothing to do: their
    /// spans would hide the others.
    fn end(&self, unit: &Work, outcome: &Option<Outcome>) {
        if !daybook_trace::is_recording() {
            return;
        }
        let name = match outcome {
            Some(Outcome::Done) => "done",
            Some(Outcome::Wait(_)) => "wait",
            Some(Outcome::Retry(_)) => "retry",
            Some(Outcome::Interrupted) => "interrupted",
            Some(Outcome::Overtaken) => "overtaken",
            None => "given_up",
        };
        unit.say(KeyValue::new(attribute::OUTCOME, name));
        match outcome {
            Some(Outcome::Retry(_)) | None => unit.fail(name),
            _ if !unit.is_touched() => unit.leave_out(),
            _ => {}
        }
    }
}

/// What comes of it; a panic is a try that did not work.
async fn caught(work: impl Future<Output = Outcome>) -> Outcome {
    AssertUnwindSafe(work)
        .catch_unwind()
        .await
        .unwrap_or_else(|panic| Outcome::Retry(format!("it panicked: {}", panic_text(&panic))))
}

fn panic_text(panic: &Box<dyn std::any::Any + Send>) -> String {
    panic
        .downcast_ref::<&str>()
        .map(|s| (*s).to_owned())
        .or_else(|| panic.downcast_ref::<String>().cloned())
        .unwrap_or_else(|| "without a message".to_owned())
}
