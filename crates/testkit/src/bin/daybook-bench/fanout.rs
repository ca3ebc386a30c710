//! Events to a thousand subscribers over server-sent events, from the request that makes each until
//! the last subscriber has it, against core NATS with as many subscribers on connections of their
//! own. Subscribers of both sides are sockets of this process that do nothing but count.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use daybook_testkit::nats::{NatsBinary, NatsServer};
use futures_util::future::try_join_all;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::task::JoinSet;

use crate::report::{Comparison, Report};
use crate::{Failure, idle, temporary_folder};

/// What is promised: the 99th percentile within so many times that of NATS.
const TIMES_NATS: f64 = 1.5;
/// What is promised of the server's processor time, in cores.
const CORES: f64 = 2.0 / 3.0;
/// What is promised of its memory for each subscriber.
const KIB: f64 = 64.0;
/// The size of what NATS carries: that of an event.
const PAYLOAD: usize = 700;
const PATIENCE: Duration = Duration::from_secs(60);

#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// Subscribers, on a connection each
    #[arg(long, default_value_t = 1000)]
    subscribers: u32,
    /// Events a second
    #[arg(long, default_value_t = 100)]
    rate: u32,
    /// Seconds of each side in each round
    #[arg(long, default_value_t = 10)]
    seconds: u32,
    /// Rounds
    #[arg(long, default_value_t = 5)]
    rounds: u32,
    /// The program; the one beside this one if it is not named
    #[arg(long, value_name = "FILE")]
    daybook: Option<PathBuf>,
    /// Where its data folder is meanwhile
    #[arg(long)]
    folder: Option<PathBuf>,
}

/// When each message was sent, and when the last subscriber had it.
struct Deliveries {
    began: Instant,
    sent: Vec<AtomicU64>,
    missing: Vec<AtomicU32>,
    last: Vec<AtomicU64>,
}

impl Deliveries {
    fn new(options: &Options) -> Arc<Self> {
        let messages = options.rate * options.seconds;
        let each = |value: u32| (0..messages).map(|_| AtomicU32::new(value)).collect();
        let times = || (0..messages).map(|_| AtomicU64::new(0)).collect();
        Arc::new(Self {
            began: Instant::now(),
            sent: times(),
            missing: each(options.subscribers),
            last: times(),
        })
    }

    fn now(&self) -> u64 {
        u64::try_from(self.began.elapsed().as_micros()).unwrap_or(u64::MAX)
    }

    fn send(&self, message: usize) {
        self.sent[message].store(self.now(), Ordering::Relaxed);
    }

    /// A subscriber has these messages.
    fn had(&self, messages: std::ops::Range<usize>) {
        let now = self.now();
        for message in messages {
            let Some(missing) = self.missing.get(message) else {
                return;
            };
            if missing.fetch_sub(1, Ordering::Relaxed) == 1 {
                self.last[message].store(now, Ordering::Release);
            }
        }
    }

    /// Waits until all have everything; the 50th and the 99th percentile in milliseconds.
    async fn percentiles(&self) -> Result<(f64, f64), Failure> {
        let deadline = Instant::now() + PATIENCE;
        while self.last.iter().any(|t| t.load(Ordering::Acquire) == 0) {
            if Instant::now() > deadline {
                return Err("not every subscriber had everything".into());
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        let taken = self.sent.iter().zip(&self.last).map(|(sent, last)| {
            let micros = last.load(Ordering::Relaxed) - sent.load(Ordering::Relaxed);
            Duration::from_micros(micros).as_secs_f64() * 1000.0
        });
        let mut taken: Vec<f64> = taken.collect();
        taken.sort_by(f64::total_cmp);
        let rank = |percent: usize| taken[(taken.len() * percent).div_ceil(100).max(1) - 1];
        Ok((rank(50), rank(99)))
    }
}

pub(crate) async fn run(options: Options) -> Result<Report, Failure> {
    let program = idle::program(options.daybook.as_deref())?;
    let nats = NatsBinary::newest().or_else(|| NatsBinary::installed().into_iter().next());
    let nats = nats.ok_or("there is no nats-server to measure against")?;
    // A socket for each subscriber, here and in the servers, which inherit this.
    let limit = rustix::process::getrlimit(rustix::process::Resource::Nofile);
    rustix::process::setrlimit(
        rustix::process::Resource::Nofile,
        rustix::process::Rlimit {
            current: limit.maximum,
            maximum: limit.maximum,
        },
    )?;
    let (mut own, mut theirs) = (Vec::new(), Vec::new());
    let (mut cores, mut memory) = (Vec::new(), Vec::new());
    let mut median = Vec::new();
    for _ in 0..options.rounds {
        let round = of_daybook(&options, &program).await?;
        own.push(round.p99);
        cores.push(round.cores);
        memory.push(round.kib);
        median.push(round.p50);
        theirs.push(of_nats(&options, &nats).await?.1);
    }
    let listed = |figures: &[f64], digits: usize| {
        let figures: Vec<String> = figures.iter().map(|f| format!("{f:.digits$}")).collect();
        figures.join("/")
    };
    let inverse = |figures: &[f64]| figures.iter().map(|f| 1000.0 / f).collect::<Vec<_>>();
    let against = |limit: f64| vec![1000.0 / limit; own.len()];
    Ok(Report {
        title: format!(
            "{} events a second to {} subscribers, by the 99th percentile until the last has it",
            options.rate, options.subscribers
        ),
        unit: "1000/figure",
        notes: vec![
            "Daybook's time is from the request that makes an event, which is synced to disk before \
             it is sent; that of NATS from its publication."
                .to_owned(),
        ],
        comparisons: vec![
            Comparison {
                subject: format!(
                    "server-sent events: p50 {} ms, p99 {} ms; {nats}: p99 {} ms",
                    listed(&median, 1),
                    listed(&own, 1),
                    listed(&theirs, 1)
                ),
                yardstick: "core NATS",
                measured: inverse(&own),
                against: inverse(&theirs),
                limit: Some(1.0 / TIMES_NATS),
            },
            Comparison {
                subject: format!("processor: {} cores", listed(&cores, 2)),
                yardstick: "two thirds of a core",
                measured: inverse(&cores),
                against: against(CORES),
                limit: Some(1.0),
            },
            Comparison {
                subject: format!("memory: {} KiB a subscriber", listed(&memory, 1)),
                yardstick: "64 KiB",
                measured: inverse(&memory),
                against: against(KIB),
                limit: Some(1.0),
            },
        ],
    })
}

/// Calls something so many times a second.
async fn paced<F>(options: &Options, mut send: impl FnMut(usize) -> F) -> Result<(), Failure>
where
    F: Future<Output = Result<(), Failure>>,
{
    let mut ticks = tokio::time::interval(Duration::from_secs(1) / options.rate);
    for message in 0..(options.rate * options.seconds) as usize {
        ticks.tick().await;
        send(message).await?;
    }
    Ok(())
}

struct Round {
    p50: f64,
    p99: f64,
    cores: f64,
    kib: f64,
}

async fn of_daybook(options: &Options, program: &std::path::Path) -> Result<Round, Failure> {
    let folder = temporary_folder(options.folder.as_deref())?;
    let (mut server, _, address) = idle::start_up(program, folder.path()).await?;
    let before = idle::mib(&idle::status_of(&server)?, "RssAnon")?;
    let deliveries = Deliveries::new(options);
    let mut subscribers = JoinSet::new();
    let head = format!(
        "GET /api/v1/events?follow=true HTTP/1.1\r\nHost: {address}\r\nAccept: \
         text/event-stream\r\n\r\n"
    );
    let sockets = (0..options.subscribers).map(|_| subscribe(&address, &head, b"retry: 1000\n\n"));
    for socket in try_join_all(sockets).await? {
        subscribers.spawn(count(socket, b"\n\n", deliveries.clone()));
    }
    let client = reqwest::Client::new();
    let url = format!("http://{address}/api/v1/projects");
    let (busy, began) = (processor(&server)?, Instant::now());
    paced(options, |message| {
        deliveries.send(message);
        let body = serde_json::json!({
            "name": format!("p{message:06}"),
            // An event of an ordinary size.
            "description": "x".repeat(200),
        });
        let request = client.post(&url).body(body.to_string());
        let request = request.header("Content-Type", "application/json");
        async move {
            request.send().await?.error_for_status()?;
            Ok(())
        }
    })
    .await?;
    let cores = (processor(&server)? - busy) / began.elapsed().as_secs_f64();
    let (p50, p99) = deliveries.percentiles().await?;
    let after = idle::mib(&idle::status_of(&server)?, "RssAnon")?;
    drop(subscribers);
    idle::stop(&mut server).await?;
    Ok(Round {
        p50,
        p99,
        cores,
        kib: (after - before).max(0.0) * 1024.0 / f64::from(options.subscribers),
    })
}

async fn of_nats(options: &Options, binary: &NatsBinary) -> Result<(f64, f64), Failure> {
    let server = NatsServer::start(binary).await;
    let address = server.url().replace("nats://", "");
    let deliveries = Deliveries::new(options);
    let mut subscribers = JoinSet::new();
    let head = "CONNECT {\"verbose\":false}\r\nSUB bench 1\r\nPING\r\n";
    let sockets = (0..options.subscribers).map(|_| subscribe(&address, head, b"PONG\r\n"));
    for socket in try_join_all(sockets).await? {
        subscribers.spawn(count(socket, b"MSG bench", deliveries.clone()));
    }
    let publisher = subscribe(
        &address,
        "CONNECT {\"verbose\":false}\r\nPING\r\n",
        b"PONG\r\n",
    );
    let publisher = tokio::sync::Mutex::new(publisher.await?);
    let publication = format!("PUB bench {PAYLOAD}\r\n{}\r\n", "x".repeat(PAYLOAD));
    paced(options, |message| {
        let (deliveries, publisher, publication) = (&deliveries, &publisher, &publication);
        async move {
            deliveries.send(message);
            publisher
                .lock()
                .await
                .write_all(publication.as_bytes())
                .await?;
            Ok(())
        }
    })
    .await?;
    deliveries.percentiles().await
}

/// Opens a connection, says something, and waits for an answer that ends so.
async fn subscribe(address: &str, head: &str, end: &[u8]) -> Result<TcpStream, Failure> {
    let mut socket = TcpStream::connect(address).await?;
    socket.set_nodelay(true)?;
    socket.write_all(head.as_bytes()).await?;
    let mut answer = Vec::new();
    let answered = async {
        while !answer.windows(end.len()).any(|w| w == end) {
            if socket.read_buf(&mut answer).await? == 0 {
                return Err::<_, Failure>("the server closed a connection".into());
            }
        }
        Ok(())
    };
    tokio::time::timeout(PATIENCE, answered).await??;
    Ok(socket)
}

/// Counts what comes by the mark that each message has once.
async fn count(mut socket: TcpStream, mark: &'static [u8], deliveries: Arc<Deliveries>) {
    let mut buffer = vec![0; 16 * 1024];
    let (mut had, mut matched) = (0, 0);
    loop {
        let Ok(read @ 1..) = socket.read(&mut buffer).await else {
            return;
        };
        let before = had;
        for byte in &buffer[..read] {
            matched = match () {
                () if *byte == mark[matched] => matched + 1,
                () if *byte == mark[0] => 1,
                () => 0,
            };
            if matched == mark.len() {
                had += 1;
                matched = 0;
            }
        }
        deliveries.had(before..had);
    }
}

/// Ticks of a second, as Linux shows times of processors on every platform that this runs on: proc(5).
const TICKS: f64 = 100.0;

/// Seconds of processor time that a process has taken.
fn processor(child: &tokio::process::Child) -> Result<f64, Failure> {
    let id = child.id().ok_or("the server has ended")?;
    let stat = std::fs::read_to_string(format!("/proc/{id}/stat"))?;
    // The name of the program may have spaces; fields are counted after it.
    let (_, fields) = stat.rsplit_once(')').ok_or("/proc is not as it was")?;
    let fields: Vec<&str> = fields.split_whitespace().collect();
    let ticks = |n: usize| fields.get(n).and_then(|f| f.parse::<f64>().ok());
    let ticks = ticks(11).zip(ticks(12)).ok_or("/proc is not as it was")?;
    Ok((ticks.0 + ticks.1) / TICKS)
}
