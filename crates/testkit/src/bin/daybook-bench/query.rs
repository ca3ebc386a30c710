//! Questions to the real program on a large ledger, over HTTP, against an axum handler in a process
//! of its own that answers with the same bytes from memory. While nothing is appended, and while
//! events are, which makes every answer about now another one.

use std::path::PathBuf;
use std::process::Stdio;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use axum::http::header;
use bytes::Bytes;
use daybook_testkit::nats::{NatsBinary, NatsServer};
use tokio::io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::net::{TcpListener, TcpStream};
use tokio::process::{Child, Command};

use crate::report::{Comparison, Report};
use crate::{Failure, idle, logs, past, temporary_folder};

/// What is promised: so much of what the handler answers that only sends bytes.
const OF_STATIC: f64 = 0.5;
/// What is promised of the 99th percentile at a thousand requests a second, in milliseconds.
const PROMISED_MS: f64 = 5.0;
const RATE: u32 = 1000;

#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// Events in the ledger
    #[arg(long, default_value_t = 1_000_000)]
    events: u32,
    /// Seconds of each measurement
    #[arg(long, default_value_t = 3)]
    seconds: u64,
    /// Connections
    #[arg(long, default_value_t = 16)]
    connections: u32,
    /// Rounds
    #[arg(long, default_value_t = 5)]
    rounds: u32,
    /// Events a second that are appended while questions about now are asked once more
    #[arg(long, default_value_t = 100)]
    appended: u32,
    /// The program; the one beside this one if it is not named
    #[arg(long, value_name = "FILE")]
    daybook: Option<PathBuf>,
    /// Where its data folder is meanwhile
    #[arg(long)]
    folder: Option<PathBuf>,
}

/// The other side: answers every request with the bytes of a file.
#[derive(Debug, clap::Args)]
pub(crate) struct Side {
    /// What it answers with
    file: PathBuf,
}

pub(crate) async fn run_side(side: &Side) -> Result<(), Failure> {
    let bytes = Bytes::from(std::fs::read(&side.file)?);
    let answer = move || {
        let bytes = bytes.clone();
        async move { ([(header::CONTENT_TYPE, "application/json")], bytes) }
    };
    let listener = TcpListener::bind("127.0.0.1:0").await?;
    println!("{}", listener.local_addr()?);
    Ok(axum::serve(listener, axum::Router::new().fallback(answer)).await?)
}

pub(crate) async fn run(options: Options) -> Result<Report, Failure> {
    let program = idle::program(options.daybook.as_deref())?;
    let folder = temporary_folder(options.folder.as_deref())?;
    eprint!("writing {} events ", options.events);
    let nats = NatsBinary::newest().or_else(|| NatsBinary::installed().into_iter().next());
    let nats = nats.ok_or("there is no nats-server")?;
    let broker = NatsServer::start(&nats).await;
    let log = logs::jetstream(&broker.url()).await?;
    let mut history = past::History::new();
    history.write(&log, options.events).await?;
    eprint!("and starting on them ");
    // Nothing but the interface: workers would take up what the ledger says is under way.
    let arguments = ["serve", "--role", "api", "--nats", &broker.url()];
    let (mut server, took, address) = idle::start(&program, folder.path(), &arguments).await?;
    eprintln!("in {:.1} s", took.as_secs_f64());
    let projects = ask(&mut connect(&address).await?, &address, "/api/v1/projects").await?;
    let projects: serde_json::Value = serde_json::from_slice(&projects)?;
    let project = projects["projects"][0]["name"].as_str();
    let project = project.ok_or("the ledger has no project")?;

    let mut comparisons = Vec::new();
    let questions = questions(project, options.events);
    // What a server does after its start is not what is measured.
    throughput(&options, &address, &questions[0]).await?;
    for path in &questions {
        let subject = format!("GET {path}");
        measure(&options, &address, path, &subject, &mut comparisons).await?;
    }
    let rate = options.appended;
    let appending = tokio::spawn(async move {
        let mut tick = tokio::time::interval(Duration::from_secs(1) / rate.max(1));
        loop {
            tick.tick().await;
            if let Err(e) = log.append(history.next()).await {
                return e;
            }
        }
    });
    for path in questions.iter().filter(|path| !path.contains("at=")) {
        let subject = format!("GET {path}, {rate} events/s being appended");
        measure(&options, &address, path, &subject, &mut comparisons).await?;
    }
    appending.abort();
    if let Ok(error) = appending.await {
        return Err(error.into());
    }
    idle::stop(&mut server).await?;
    Ok(Report {
        title: format!(
            "Questions to a ledger of {} events, over HTTP",
            options.events
        ),
        unit: "requests/s",
        notes: vec![
            "each question is asked again and again, and its answer is kept as it was sent for as \
             long as nothing is appended (ADR 43); `cargo xtask bench past` asks about other \
             positions"
                .to_owned(),
        ],
        comparisons,
    })
}

/// Asks one question in rounds, and the other side in each of them.
async fn measure(
    options: &Options,
    address: &str,
    path: &str,
    subject: &str,
    comparisons: &mut Vec<Comparison>,
) -> Result<(), Failure> {
    let mut connection = connect(address).await?;
    // The first answer about a position is worked out; that is what `past` measures.
    ask(&mut connection, address, path).await?;
    let body = ask(&mut connection, address, path).await?;
    drop(connection);
    let folder = temporary_folder(None)?;
    let file = folder.path().join("answer.json");
    std::fs::write(&file, &body)?;
    let (mut other, static_address) = start_side(&file).await?;
    let (mut own, mut theirs, mut p99s) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..options.rounds {
        own.push(throughput(options, address, path).await?);
        theirs.push(throughput(options, &static_address, path).await?);
        p99s.push(paced(options, address, path).await?);
    }
    other.kill().await?;
    comparisons.push(Comparison {
        subject: format!("{subject} ({} bytes)", body.len()),
        yardstick: "the same bytes from memory",
        measured: own,
        against: theirs,
        limit: Some(OF_STATIC),
    });
    let listed: Vec<String> = p99s.iter().map(|ms| format!("{ms:.1}")).collect();
    comparisons.push(Comparison {
        subject: format!("its p99 at {RATE} requests/s: {} ms", listed.join("/")),
        yardstick: "5 ms",
        measured: p99s.iter().map(|ms| 1000.0 / ms).collect(),
        against: p99s.iter().map(|_| 1000.0 / PROMISED_MS).collect(),
        limit: Some(1.0),
    });
    Ok(())
}

/// What is asked: of the present, and of the middle of the ledger.
fn questions(project: &str, events: u32) -> Vec<String> {
    let at = (events / 2).max(1);
    vec![
        format!("/api/v1/history?project={project}"),
        "/api/v1/history".to_owned(),
        format!("/api/v1/state?project={project}"),
        format!("/api/v1/history?project={project}&at={at}"),
        format!("/api/v1/history?at={at}"),
        format!("/api/v1/state?project={project}&at={at}"),
    ]
}

async fn start_side(file: &std::path::Path) -> Result<(Child, String), Failure> {
    let mut child = Command::new(std::env::current_exe()?)
        .arg("query-side")
        .arg(file)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .kill_on_drop(true)
        .spawn()?;
    let stdout = child.stdout.take().ok_or("the other side has no output")?;
    let address = BufReader::new(stdout).lines().next_line().await?;
    Ok((child, address.ok_or("the other side does not start")?))
}

async fn connect(address: &str) -> Result<BufReader<TcpStream>, Failure> {
    let stream = TcpStream::connect(address).await?;
    stream.set_nodelay(true)?;
    Ok(BufReader::new(stream))
}

/// One request over a connection that stays open, and the body of its answer.
async fn ask(
    connection: &mut BufReader<TcpStream>,
    host: &str,
    path: &str,
) -> Result<Vec<u8>, Failure> {
    let request = format!("GET {path} HTTP/1.1\r\nHost: {host}\r\n\r\n");
    connection.write_all(request.as_bytes()).await?;
    let mut line = String::new();
    connection.read_line(&mut line).await?;
    if !line.contains(" 200 ") {
        return Err(format!("GET {path}: {}", line.trim()).into());
    }
    let mut length = 0;
    loop {
        line.clear();
        connection.read_line(&mut line).await?;
        let Some((name, value)) = line.split_once(':') else {
            break;
        };
        if name.eq_ignore_ascii_case("content-length") {
            length = value.trim().parse()?;
        }
    }
    let mut body = vec![0; length];
    connection.read_exact(&mut body).await?;
    Ok(body)
}

/// Requests a second, each connection sending its next as soon as it has its answer.
async fn throughput(options: &Options, address: &str, path: &str) -> Result<f64, Failure> {
    let answered = Arc::new(AtomicU64::new(0));
    let began = Instant::now();
    let until = began + Duration::from_secs(options.seconds);
    let mut clients = tokio::task::JoinSet::new();
    for _ in 0..options.connections {
        let mut connection = connect(address).await?;
        let (address, path, answered) = (address.to_owned(), path.to_owned(), answered.clone());
        clients.spawn(async move {
            while Instant::now() < until {
                ask(&mut connection, &address, &path).await?;
                answered.fetch_add(1, Ordering::Relaxed);
            }
            Ok::<_, Failure>(())
        });
    }
    while let Some(ended) = clients.join_next().await {
        ended??;
    }
    Ok(answered.load(Ordering::Relaxed) as f64 / began.elapsed().as_secs_f64())
}

/// The 99th percentile, in milliseconds, at so many requests a second. A request that has to wait
/// for a connection has waited since it was due.
async fn paced(options: &Options, address: &str, path: &str) -> Result<f64, Failure> {
    let each = Duration::from_secs(1) / RATE * options.connections;
    let count = u64::from(RATE) * options.seconds / u64::from(options.connections);
    let mut clients = tokio::task::JoinSet::new();
    for number in 0..options.connections {
        let mut connection = connect(address).await?;
        let (address, path) = (address.to_owned(), path.to_owned());
        let first = Instant::now() + each * number / options.connections;
        clients.spawn(async move {
            let mut taken = Vec::new();
            for n in 0..count {
                let due = first + each * u32::try_from(n).unwrap_or(u32::MAX);
                tokio::time::sleep_until(due.into()).await;
                ask(&mut connection, &address, &path).await?;
                taken.push(due.elapsed().as_secs_f64() * 1000.0);
            }
            Ok::<_, Failure>(taken)
        });
    }
    let mut taken = Vec::new();
    while let Some(ended) = clients.join_next().await {
        taken.extend(ended??);
    }
    Ok(past::percentile(&mut taken, 99))
}

#[cfg(test)]
mod tests {
    use super::questions;

    #[test]
    fn whatever_is_asked_of_the_present_is_asked_of_the_past_too() {
        let all = questions("shop", 1_000_000);
        let (past, present): (Vec<_>, Vec<_>) =
            all.iter().partition(|path| path.contains("at=500000"));
        assert_eq!(past.len(), present.len());
        for path in present {
            let joint = if path.contains('?') { '&' } else { '?' };
            let then = format!("{path}{joint}at=500000");
            assert!(past.contains(&&then), "{path}");
        }
        assert_eq!(questions("shop", 1)[3], "/api/v1/history?project=shop&at=1");
    }
}
