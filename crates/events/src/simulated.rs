//! A log that misbehaves as brokers do, by the throw of seeded dice.
//!
//! It keeps what the port promises: what is acknowledged is stored, once, in one order for all. It
//! does everything else that a cluster of brokers and a network may do: acknowledgements get lost,
//! an append arrives long after its writer gave it up, two writers with the same expectation are
//! both accepted, deliveries are made twice, late and out of order, and answers to them are lost.
//!
//! Dice are thrown in the order in which calls are made; where several tasks make calls, the same
//! seed gives the same throws, but not the same history.

use std::collections::VecDeque;
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use async_trait::async_trait;

use crate::log::{
    Append, AppendError, Appended, Consumer, ConsumerConfig, Delivery, EventLog, EventStream,
    LogInfo, Position, ReadError, Recorded, Reply,
};
use crate::memory::{Fault, MemoryLog};
use crate::subject::{Subject, SubjectFilter};
use crate::testing::fleet::choices;

/// How often something goes wrong, of a thousand times each.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Weather {
    /// An append is refused for now, and not stored.
    pub unavailable: u32,
    /// An append is stored, and its writer is told that nobody knows.
    pub lost_ack: u32,
    /// The writer is told that nobody knows; the append arrives a little later, if its expectation
    /// is still met then.
    pub late: u32,
    /// The append takes its time, and its expectation is not looked at: whoever came in between was
    /// accepted on the same expectation.
    pub double_accept: u32,
    /// An event is delivered twice.
    pub redelivered: u32,
    /// A delivery is made after the ones that follow it.
    pub overtaken: u32,
    /// An answer to a delivery gets lost.
    pub lost_answer: u32,
}

impl Weather {
    /// Nothing goes wrong.
    pub const CALM: Self = Self {
        unavailable: 0,
        lost_ack: 0,
        late: 0,
        double_accept: 0,
        redelivered: 0,
        overtaken: 0,
        lost_answer: 0,
    };

    /// Everything goes wrong, one time in ten or so.
    pub const STORM: Self = Self {
        unavailable: 60,
        lost_ack: 100,
        late: 60,
        double_accept: 150,
        redelivered: 150,
        overtaken: 100,
        lost_answer: 60,
    };
}

/// A log that misbehaves. Clones are the same log.
#[derive(Clone)]
pub struct SimulatedLog {
    log: MemoryLog,
    sky: Arc<Mutex<Sky>>,
}

struct Sky {
    weather: Weather,
    dice: Box<dyn FnMut(u32) -> u32 + Send>,
}

impl fmt::Debug for SimulatedLog {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("SimulatedLog").field(&self.log).finish()
    }
}

impl SimulatedLog {
    /// An empty log in this weather.
    pub fn new(seed: u64, weather: Weather) -> Self {
        Self {
            log: MemoryLog::new(),
            sky: Arc::new(Mutex::new(Sky {
                weather,
                dice: Box::new(choices(seed)),
            })),
        }
    }

    /// Changes the weather.
    pub fn set_weather(&self, weather: Weather) {
        self.sky().weather = weather;
    }

    fn sky(&self) -> MutexGuard<'_, Sky> {
        self.sky.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether something happens that happens so often of a thousand times.
    fn happens(&self, odds: impl Fn(&Weather) -> u32) -> bool {
        let mut sky = self.sky();
        let odds = odds(&sky.weather);
        odds > 0 && (sky.dice)(1000) < odds
    }

    /// A short while, as calls of others take.
    fn a_while(&self) -> Duration {
        Duration::from_micros(u64::from((self.sky().dice)(4000)))
    }
}

#[async_trait]
impl EventLog for SimulatedLog {
    async fn append(&self, append: Append) -> Result<Appended, AppendError> {
        if self.happens(|w| w.late) {
            let (log, wait) = (self.log.clone(), self.a_while());
            tokio::spawn(async move {
                tokio::time::sleep(wait).await;
                let _ = log.append_with(append, None);
            });
            return Err(AppendError::Unknown("it is on its way".to_owned()));
        }
        let fault = if self.happens(|w| w.double_accept) {
            let wait = self.a_while();
            tokio::time::sleep(wait).await;
            Some(Fault::Unchecked)
        } else if self.happens(|w| w.unavailable) {
            Some(Fault::Unavailable)
        } else if self.happens(|w| w.lost_ack) {
            Some(Fault::LostAck)
        } else {
            None
        };
        self.log.append_with(append, fault)
    }

    fn may_accept_two(&self) -> bool {
        true
    }

    async fn head(&self) -> Result<Position, ReadError> {
        self.log.head().await
    }

    async fn get(&self, position: Position) -> Result<Option<Recorded>, ReadError> {
        self.log.get(position).await
    }

    async fn read_aggregate(&self, subject: &Subject) -> Result<Vec<Recorded>, ReadError> {
        self.log.read_aggregate(subject).await
    }

    async fn read(
        &self,
        after: Position,
        filter: &SubjectFilter,
        limit: usize,
    ) -> Result<Vec<Recorded>, ReadError> {
        self.log.read(after, filter, limit).await
    }

    async fn tail(&self, after: Position, filter: SubjectFilter) -> Result<EventStream, ReadError> {
        self.log.tail(after, filter).await
    }

    async fn consumer(&self, config: ConsumerConfig) -> Result<Arc<dyn Consumer>, ReadError> {
        Ok(Arc::new(SimulatedConsumer {
            consumer: self.log.consumer(config).await?,
            log: self.clone(),
            held: Mutex::default(),
        }))
    }

    async fn info(&self) -> Result<LogInfo, ReadError> {
        self.log.info().await
    }
}

#[derive(Debug)]
struct SimulatedConsumer {
    consumer: Arc<dyn Consumer>,
    log: SimulatedLog,
    /// Deliveries that are made later, or again.
    held: Mutex<VecDeque<Delivery>>,
}

impl SimulatedConsumer {
    fn held(&self) -> MutexGuard<'_, VecDeque<Delivery>> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wrap(&self, delivery: Delivery) -> Delivery {
        let reply: Arc<dyn Reply> = Arc::from(delivery.reply);
        let wrapped = |reply: &Arc<dyn Reply>| {
            Box::new(SimulatedReply {
                reply: reply.clone(),
                log: self.log.clone(),
            })
        };
        if self.log.happens(|w| w.redelivered) {
            self.held().push_back(Delivery {
                recorded: delivery.recorded.clone(),
                attempt: delivery.attempt,
                is_last: delivery.is_last,
                reply: wrapped(&reply),
            });
        }
        Delivery {
            reply: wrapped(&reply),
            ..delivery
        }
    }
}

#[async_trait]
impl Consumer for SimulatedConsumer {
    async fn next(&self) -> Result<Delivery, ReadError> {
        loop {
            let wait = self.log.a_while();
            let held = !self.held().is_empty();
            // What is held comes when nothing else does, or a little later.
            tokio::select! {
                biased;
                () = tokio::time::sleep(wait), if held => {
                    if let Some(delivery) = self.held().pop_front() {
                        return Ok(delivery);
                    }
                }
                delivery = self.consumer.next() => {
                    let delivery = self.wrap(delivery?);
                    if !self.log.happens(|w| w.overtaken) {
                        return Ok(delivery);
                    }
                    self.held().push_back(delivery);
                }
            }
        }
    }
}

#[derive(Debug)]
struct SimulatedReply {
    reply: Arc<dyn Reply>,
    log: SimulatedLog,
}

impl SimulatedReply {
    /// An answer that gets lost may have arrived, or not.
    fn is_lost(&self) -> Option<ReadError> {
        self.log
            .happens(|w| w.lost_answer)
            .then(|| ReadError::Unavailable("the answer got lost".to_owned()))
    }
}

#[async_trait]
impl Reply for SimulatedReply {
    async fn ack(&self) -> Result<(), ReadError> {
        match self.is_lost() {
            Some(error) => Err(error),
            None => self.reply.ack().await,
        }
    }
    async fn nak(&self, delay: Duration) -> Result<(), ReadError> {
        match self.is_lost() {
            Some(error) => Err(error),
            None => self.reply.nak(delay).await,
        }
    }
    async fn progress(&self) -> Result<(), ReadError> {
        match self.is_lost() {
            Some(error) => Err(error),
            None => self.reply.progress().await,
        }
    }
    async fn term(&self) -> Result<(), ReadError> {
        match self.is_lost() {
            Some(error) => Err(error),
            None => self.reply.term().await,
        }
    }
}
