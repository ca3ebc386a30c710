//! Webhooks out: events are sent to those who subscribed to them.
//!
//! Each subscription is looked after by one process at a time, which holds the delivery of its
//! `subscription.created` event from a durable consumer, and gives it back when it ends; if it
//! dies, another process gets it ([`lease`]). That process follows the ledger from where the
//! delivery log says that it is ([`book`]), keeps a queue for each deployment ([`desk`]), and sends
//! the first event of each: in order within a deployment, and without waiting for another one.
//!
//! Events are sent at least once. Only what the receiver took, or was set aside with an event that
//! says so, is dealt with; a process that dies in between, or one that is late, sends something
//! twice, with the same `webhook-id`.

pub mod body;
mod book;
pub(crate) mod cdevents;
mod courier;
mod desk;
mod lease;
mod pace;
mod sender;

use std::collections::HashMap;
use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use daybook_events::log::{Consumer, ConsumerConfig, Delivery};
use daybook_events::{AggregateKind, Position, Subject, SubjectFilter, SubscriptionId};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

pub use self::cdevents::Bulletin;
use self::courier::{Courier, End};
use self::lease::Lease;
pub use self::pace::Pace;
use self::sender::Sender;
use crate::pipeline::Bench;

/// The name of the durable consumer by which processes share the subscriptions.
const CONSUMER: &str = "notify";

/// How long what is under way may take at the end.
const DRAIN: Duration = Duration::from_secs(4);

/// Where the proof of an event comes from.
#[async_trait]
pub trait Proofs: fmt::Debug + Send + Sync {
    /// The proof that the event at a position is in the signed ledger, as a C2SP `tlog-proof`; none
    /// if no checkpoint covers it yet.
    async fn proof(&self, position: Position) -> Result<Option<String>, String>;
}

/// What an operator can set, and what follows from it.
#[derive(Debug, Clone)]
pub struct NotifyOptions {
    /// Whether receivers may be at addresses that are not public, and be called without TLS.
    pub allow_private: bool,
    /// How many requests to one receiver are under way at once.
    pub at_once: usize,
    /// How long a request may take.
    pub timeout: Duration,
    /// How long is waited between tries.
    pub pace: Pace,
    /// How long a process that is silent keeps a subscription.
    pub lease: Duration,
    /// How long an event waits for its proof before it is sent without.
    pub proof_wait: Duration,
}

impl Default for NotifyOptions {
    fn default() -> Self {
        Self {
            allow_private: false,
            at_once: 8,
            timeout: Duration::from_secs(15),
            pace: Pace::default(),
            lease: Duration::from_secs(15),
            proof_wait: Duration::from_secs(30),
        }
    }
}

/// What all subscriptions of a process share.
#[derive(Debug)]
pub(crate) struct Office {
    bench: Bench,
    proofs: Option<Arc<dyn Proofs>>,
    options: NotifyOptions,
    sender: Sender,
    /// Who looks after which subscription here: one after the other.
    turns: Mutex<HashMap<SubscriptionId, Arc<tokio::sync::Mutex<()>>>>,
}

impl Office {
    /// Prepares everything. It is an error if no HTTP client can be made.
    pub(crate) fn new(
        bench: Bench,
        proofs: Option<Arc<dyn Proofs>>,
        options: NotifyOptions,
    ) -> Result<Self, reqwest::Error> {
        Ok(Self {
            sender: Sender::new(options.allow_private, options.timeout)?,
            bench,
            proofs,
            options,
            turns: Mutex::default(),
        })
    }

    fn turn(&self, id: SubscriptionId) -> Arc<tokio::sync::Mutex<()>> {
        let mut turns = self.turns.lock().unwrap_or_else(PoisonError::into_inner);
        turns.entry(id).or_default().clone()
    }
}

/// Looks after subscriptions until `cancel`. Returns when all that is under way has ended.
pub(crate) async fn run(office: Office, cancel: CancellationToken) {
    let office = Arc::new(office);
    let log = office.bench.ledger.log().clone();
    let config = ConsumerConfig {
        ack_wait: office.options.lease,
        max_deliver: u32::MAX,
        max_in_flight: 10_000,
        ..ConsumerConfig::new(CONSUMER, SubjectFilter::of(AggregateKind::Subscription))
    };
    let tasks = TaskTracker::new();
    let mut pause = Duration::from_millis(100);
    while !cancel.is_cancelled() {
        let opened = tokio::select! {
            () = cancel.cancelled() => break,
            opened = log.consumer(config.clone()) => opened,
        };
        match opened {
            Ok(consumer) => {
                pause = Duration::from_millis(100);
                take_on(&office, &*consumer, &tasks, &cancel).await;
            }
            Err(error) => {
                tracing::warn!(%error, "the subscriptions cannot be shared out; trying again");
            }
        }
        tokio::select! {
            () = cancel.cancelled() => break,
            () = tokio::time::sleep(pause) => pause = (pause * 2).min(Duration::from_secs(5)),
        }
    }
    tasks.close();
    if tokio::time::timeout(DRAIN, tasks.wait()).await.is_err() {
        tracing::warn!("some webhooks did not end in time; others take them over later");
    }
}

/// Takes on what is handed over, until that breaks off.
async fn take_on(
    office: &Arc<Office>,
    consumer: &dyn Consumer,
    tasks: &TaskTracker,
    cancel: &CancellationToken,
) {
    loop {
        let delivery = tokio::select! {
            biased;
            () = cancel.cancelled() => return,
            delivery = consumer.next() => delivery,
        };
        let delivery = match delivery {
            Ok(delivery) => delivery,
            Err(error) => {
                tracing::warn!(%error, "the subscriptions are no longer handed over; reopening");
                return;
            }
        };
        let created = delivery
            .recorded
            .event()
            .is_ok_and(|e| e.short_kind() == "subscription.created.v1");
        if created {
            tasks.spawn(hold(office.clone(), delivery, cancel.clone()));
        } else {
            answered(delivery.reply.ack().await);
        }
    }
}

fn answered(answer: Result<(), daybook_events::log::ReadError>) {
    if let Err(error) = answer {
        tracing::debug!(%error, "an answer was lost; the subscription will be handed over again");
    }
}

/// Waits until all that was recorded by now is folded.
async fn caught_up(office: &Office, at_least: Position) -> Result<(), String> {
    let head = office.bench.ledger.log().head().await;
    let head = head.map_err(|e| e.to_string())?.max(at_least);
    let folded = office.bench.folded(head).await;
    folded.map_err(|_| format!("the projections do not reach event {head}"))
}

/// Looks after one subscription for as long as it is this process's.
async fn hold(office: Arc<Office>, delivery: Delivery, cancel: CancellationToken) {
    let Subject::Subscription(project, id) = delivery.recorded.subject.clone() else {
        return answered(delivery.reply.ack().await);
    };
    let lease = Lease::new(office.options.lease);
    let turn = office.turn(id);
    let end = {
        let work = async {
            let _turn = turn.lock().await;
            // All that is known by now: what whoever had it before set aside, and what people
            // changed.
            if let Err(why) = caught_up(&office, delivery.recorded.position).await {
                tracing::warn!(webhook.id = %id, %why, "a webhook cannot be taken on; another try follows");
                return End::Lost;
            }
            let courier = Courier::new(office.clone(), project, id, lease.clone(), cancel);
            courier.run().await
        };
        tokio::pin!(work);
        let mut heartbeat = tokio::time::interval(office.options.lease / 4);
        loop {
            tokio::select! {
                end = &mut work => break end,
                _ = heartbeat.tick() => {
                    // Once it has ended, it may be somebody else's: a broker does not say, and
                    // would take the heartbeat of whoever had it before.
                    if !lease.holds() {
                        break End::Lost;
                    }
                    let asked = lease::now();
                    match delivery.reply.progress().await {
                        _ if !lease.holds() => break End::Lost,
                        // The broker counts from when it got the question at the earliest.
                        Ok(()) => lease.renew(asked),
                        Err(error) => {
                            tracing::debug!(webhook.id = %id, %error, "a heartbeat was lost");
                        }
                    }
                }
            }
        }
    };
    match end {
        End::Over => answered(delivery.reply.ack().await),
        End::Interrupted => answered(delivery.reply.nak(Duration::ZERO).await),
        // It is somebody else's by now, or will be.
        End::Lost => {}
    }
}
