//! How many events a second the embedded log acknowledges, compared with a plain file that is
//! synced once a group: `cargo run --release -p daybook-store --example append_bench`.
//!
//! Both sides have the same writers (tasks that append one event after another), the same events
//! of 1 KiB over 10,000 aggregates and the same group commit. The log checks an expectation and an
//! id for each event; the file checks nothing. Rounds alternate. Arguments: a folder to write in,
//! and the number of writers.
#![allow(clippy::unwrap_used)]

use std::fs::File;
use std::io::Write;
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

use bytes::Bytes;
use daybook_events::log::{Append, EventLog, Expected, Position};
use daybook_events::names::{BuildId, EventId, ProjectName};
use daybook_events::subject::Subject;
use daybook_store::embedded::{EmbeddedConfig, EmbeddedLog};
use tokio::sync::oneshot;
use uuid::Uuid;

const ROUNDS: usize = 21;
const ROUND: Duration = Duration::from_millis(400);
const AGGREGATES: usize = 10_000;
const EVENT_BYTES: usize = 1_024;

fn main() {
    let folder = std::env::args().nth(1).unwrap_or_else(|| "target".into());
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let writers = std::env::args().nth(2);
    let writers = writers.map_or(vec![1, 16, 64], |w| vec![w.parse().unwrap()]);
    for writers in writers {
        let mut file = Vec::new();
        let mut log = Vec::new();
        for _ in 0..ROUNDS {
            let dir = tempfile::tempdir_in(&folder).unwrap();
            file.push(runtime.block_on(run_file(dir.path(), writers)));
            log.push(runtime.block_on(run_log(dir.path(), writers)));
        }
        let ratios: Vec<f64> = log.iter().zip(&file).map(|(l, f)| l / f).collect();
        println!(
            "{writers:3} writers: file {:7.0}/s  log {:7.0}/s  ratio of medians {:.2}, median ratio {:.2}",
            median(&file),
            median(&log),
            median(&log) / median(&file),
            median(&ratios),
        );
    }
}

fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted[sorted.len() / 2]
}

fn subject(n: usize) -> Subject {
    let project = ProjectName::parse("shop").unwrap();
    Subject::Build(project, BuildId(Uuid::from_u128(n as u128)))
}

async fn run_log(dir: &Path, writers: usize) -> f64 {
    let log = EmbeddedLog::open(dir.join("log"), EmbeddedConfig::default()).await;
    let log = Arc::new(log.unwrap());
    let rate = measure(writers, |w, end| {
        let log = Arc::clone(&log);
        async move {
            let bytes = Bytes::from(vec![b'x'; EVENT_BYTES]);
            let own = AGGREGATES / writers;
            let mut lasts = vec![Position::ZERO; own];
            let mut count = 0;
            while Instant::now() < end {
                let n = count * 7 % own;
                let append = Append {
                    subject: subject(w * own + n),
                    id: EventId(Uuid::new_v4()),
                    expected: Expected::Last(lasts[n]),
                    bytes: bytes.clone(),
                };
                lasts[n] = log.append(append).await.unwrap().position;
                count += 1;
            }
            count
        }
    });
    let rate = rate.await;
    log.close().await;
    rate
}

/// The writers' loop, over whatever makes one append durable.
async fn measure<F: Future<Output = usize> + Send + 'static>(
    writers: usize,
    work: impl Fn(usize, Instant) -> F,
) -> f64 {
    let start = Instant::now();
    let tasks: Vec<_> = (0..writers)
        .map(|w| tokio::spawn(work(w, start + ROUND)))
        .collect();
    let mut total = 0;
    for task in tasks {
        total += task.await.unwrap();
    }
    total as f64 / start.elapsed().as_secs_f64()
}

type Group = Vec<(Bytes, oneshot::Sender<()>)>;

/// A plain file: bytes in, one write and one `fdatasync` a group, answers out.
#[derive(Default)]
struct Plain {
    waiting: Mutex<(Group, bool)>,
    len: AtomicUsize,
    wake: Condvar,
}

async fn run_file(dir: &Path, writers: usize) -> f64 {
    let plain = Arc::new(Plain::default());
    let file = File::create(dir.join("file")).unwrap();
    let thread = std::thread::spawn({
        let plain = Arc::clone(&plain);
        move || plain.write(file)
    });
    let rate = measure(writers, |_, end| {
        let plain = Arc::clone(&plain);
        async move {
            let bytes = Bytes::from(vec![b'x'; EVENT_BYTES]);
            let mut count = 0;
            while Instant::now() < end {
                // As on the other side, so that what is compared is the log.
                std::hint::black_box((subject(count), Uuid::new_v4()));
                let (answer, answered) = oneshot::channel();
                let len = {
                    let mut waiting = plain.waiting.lock().unwrap();
                    waiting.0.push((bytes.clone(), answer));
                    plain.len.store(waiting.0.len(), Ordering::Release);
                    waiting.0.len()
                };
                if len == 1 {
                    plain.wake.notify_one();
                }
                answered.await.unwrap();
                count += 1;
            }
            count
        }
    })
    .await;
    plain.waiting.lock().unwrap().1 = true;
    plain.wake.notify_one();
    thread.join().unwrap();
    rate
}

impl Plain {
    fn write(&self, mut file: File) {
        let mut group = Group::new();
        let mut buf = Vec::new();
        let (mut size, mut took) = (0, Duration::ZERO);
        loop {
            let start = Instant::now();
            let (mut seen, mut since) = (0, start);
            loop {
                let len = self.len.load(Ordering::Acquire);
                let now = Instant::now();
                if len > seen {
                    (seen, since) = (len, now);
                }
                let quiet = now - since > Duration::from_micros(50);
                if len >= size || quiet || now - start > took / 2 {
                    break;
                }
                std::thread::yield_now();
            }
            let mut waiting = self.waiting.lock().unwrap();
            while waiting.0.is_empty() {
                if waiting.1 {
                    return;
                }
                waiting = self.wake.wait(waiting).unwrap();
            }
            std::mem::swap(&mut waiting.0, &mut group);
            self.len.store(0, Ordering::Release);
            drop(waiting);
            size = group.len();
            let start = Instant::now();
            buf.clear();
            for (bytes, _) in &group {
                buf.extend_from_slice(bytes);
            }
            file.write_all(&buf).unwrap();
            file.sync_data().unwrap();
            for (_, answer) in group.drain(..) {
                let _ = answer.send(());
            }
            took = start.elapsed();
        }
    }
}
