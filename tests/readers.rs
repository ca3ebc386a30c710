//! A thousand readers of the ledger, over server-sent events and over sockets, while the server is killed, ended and
//! started again: each goes on after the last event that it has, and none misses one or has one twice.

use std::io;
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use daybook_events::Position;
use daybook_events::feed::{FeedChain, FeedFilter, leaf_hash};
use futures_util::StreamExt as _;
use reqwest::Method;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use serde::Deserialize;
use serde_json::json;
use serde_json::value::RawValue;
use tokio::io::{AsyncBufReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::net::TcpStream;
use tokio_tungstenite::tungstenite::Message;

use crate::support::{Server, Settings, request, until};

const READERS: usize = 1000;
/// Sockets here and in the server, with room for all else.
const FILES: u64 = 8192;
/// Events that are made while the server comes and goes, beside those that it makes itself.
const MADE: usize = 120;
/// How often the server goes.
const CUTS: usize = 3;
/// How long all readers together may take to have everything. A busy machine is slow.
const ALL_WITHIN: Duration = Duration::from_secs(400);

/// What readers ask for: everything, a project, a kind.
const FEEDS: [&str; 3] = ["", "project=shop", "kind=project"];

fn filter(feed: &str) -> FeedFilter {
    let mut filter = FeedFilter::default();
    match feed.split_once('=') {
        Some(("project", name)) => filter.project = Some(name.parse().unwrap()),
        Some(("kind", kind)) => filter.kind = Some(kind.to_owned()),
        _ => {}
    }
    filter
}

/// What a reader has.
struct Has {
    last: u64,
    /// Worked out here, from the bytes that came.
    chain: FeedChain,
    connected: usize,
    wrong: Option<String>,
}

struct Reader {
    feed: &'static str,
    over_socket: bool,
    has: Mutex<Has>,
}

/// An event as a socket sends it.
#[derive(Deserialize)]
struct Sent {
    position: u64,
    event: Box<RawValue>,
    chain: String,
}

impl Reader {
    fn new(number: usize) -> Self {
        let feed = FEEDS[number % FEEDS.len()];
        let has = Has {
            last: 0,
            chain: FeedChain::begin(&filter(feed), Position(0)),
            connected: 0,
            wrong: None,
        };
        Self {
            feed,
            over_socket: number.is_multiple_of(4),
            has: Mutex::new(has),
        }
    }

    /// Reads for ever, going on after each cut where it was.
    async fn read(&self, address: &str) {
        loop {
            // Why it was cut makes no difference: nobody is there, or the server comes up.
            let _ = match self.over_socket {
                true => self.over_socket(address).await,
                false => self.over_stream(address).await,
            };
            if self.has.lock().unwrap().wrong.is_some() {
                return;
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    }

    async fn over_stream(&self, address: &str) -> io::Result<()> {
        let after = self.has.lock().unwrap().last;
        let feed = self.feed;
        // Of this version an answer ends with its connection, and comes in no parts of its own.
        let head = format!(
            "GET /api/v1/events?follow=true&{feed} HTTP/1.0\r\nHost: {address}\r\n\
             Accept: text/event-stream\r\nLast-Event-ID: {after}\r\n\r\n"
        );
        let mut stream = BufReader::new(TcpStream::connect(address).await?);
        stream.get_mut().write_all(head.as_bytes()).await?;
        let mut line = String::new();
        stream.read_line(&mut line).await?;
        if !line.contains(" 200 ") {
            return Err(io::Error::other(line));
        }
        while !line.trim().is_empty() {
            line.clear();
            if stream.read_line(&mut line).await? == 0 {
                return Ok(());
            }
        }
        self.has.lock().unwrap().connected += 1;
        let (mut id, mut data) = (None, String::new());
        loop {
            line.clear();
            // What breaks off in the middle of an event is none.
            if stream.read_line(&mut line).await? == 0 {
                return Ok(());
            }
            let text = line.trim_end_matches('\n');
            if let Some(text) = text.strip_prefix("id: ") {
                id = text.parse().ok();
            } else if let Some(text) = text.strip_prefix("data: ") {
                data.push_str(text);
            } else if text.is_empty() {
                if let Some(position) = id.take() {
                    self.take(position, data.as_bytes(), None)?;
                }
                data.clear();
            }
        }
    }

    async fn over_socket(&self, address: &str) -> io::Result<()> {
        let (after, chain) = {
            let has = self.has.lock().unwrap();
            (has.last, has.chain)
        };
        let feed = self.feed;
        let url = format!("ws://{address}/api/v1/events?after={after}&chain={chain}&{feed}");
        let connected = Box::pin(tokio_tungstenite::connect_async(url)).await;
        let (mut socket, _) = connected.map_err(io::Error::other)?;
        self.has.lock().unwrap().connected += 1;
        while let Some(message) = socket.next().await {
            if let Message::Text(text) = message.map_err(io::Error::other)? {
                let sent: Sent = serde_json::from_str(text.as_str()).unwrap();
                let bytes = sent.event.get().as_bytes();
                self.take(sent.position, bytes, Some(&sent.chain))?;
            }
        }
        Ok(())
    }

    /// Takes an event, which must be the next one, and end the chain that the server says.
    fn take(&self, position: u64, bytes: &[u8], chain: Option<&str>) -> io::Result<()> {
        let mut has = self.has.lock().unwrap();
        let is_next = match self.feed {
            "" => position == has.last + 1,
            // What is missing in between shows in the chain.
            _ => position > has.last,
        };
        let before = has.last;
        has.last = position;
        has.chain = has.chain.then(&leaf_hash(bytes));
        if is_next && chain.is_none_or(|chain| chain == has.chain.to_string()) {
            return Ok(());
        }
        let wrong = format!("{position} after {before} of {:?}, {chain:?}", self.feed);
        has.wrong = Some(wrong.clone());
        Err(io::Error::other(wrong))
    }
}

/// Makes an event, once, however often it has to be asked for.
fn make(url: &str, number: usize) {
    let (method, path, body) = match number % 2 {
        0 => {
            let body = json!({ "name": format!("p{number}") });
            (Method::POST, "/api/v1/projects".to_owned(), body)
        }
        _ => {
            let path = format!("/api/v1/projects/shop/services/s{number}");
            let body = json!({ "image_repository": "registry.example/cache" });
            (Method::PUT, path, body)
        }
    };
    let (url, key) = (format!("{url}{path}"), format!("made-{number}"));
    until(&format!("{path} is made"), || {
        let answer = request(
            method.clone(),
            &url,
            &[("Idempotency-Key", key.as_str())],
            Some(&body),
        );
        match answer {
            Ok(answer) if answer.status < 300 => Some(()),
            Ok(answer) if answer.status >= 500 || answer.status == 429 => None,
            Ok(answer) => panic!("{answer:?}"),
            // It is not there, or has gone before it answered.
            Err(_) => None,
        }
    });
}

/// Waits until it holds for all readers, of which none has had anything wrong.
#[track_caller]
fn all(readers: &[Arc<Reader>], what: &str, holds: impl Fn(&Reader, &Has) -> bool) {
    let deadline = Instant::now() + ALL_WITHIN;
    loop {
        let missing = readers.iter().filter(|reader| {
            let has = reader.has.lock().unwrap();
            assert_eq!(has.wrong, None, "over a socket: {}", reader.over_socket);
            !holds(reader, &has)
        });
        let missing = missing.count();
        if missing == 0 {
            return;
        }
        assert!(
            Instant::now() < deadline,
            "not in time: {what}; {missing} readers are missing"
        );
        std::thread::sleep(Duration::from_millis(100));
    }
}

/// Lets this process, and what it starts, have so many files open.
fn may_open(files: u64) -> bool {
    let limit = getrlimit(Resource::Nofile);
    if limit.current.is_none_or(|current| current >= files) {
        return true;
    }
    let raised = Rlimit {
        current: Some(files),
        maximum: limit.maximum,
    };
    setrlimit(Resource::Nofile, raised).is_ok()
}

#[test]
fn a_thousand_readers_miss_nothing_and_have_nothing_twice_while_the_server_comes_and_goes() {
    if !may_open(FILES) {
        daybook_testkit::left_out("a thousand readers: too few files may be open (ulimit -Hn)");
        return;
    }
    let mut server = Server::start(Settings::default());
    server.ok(&["project", "create", "shop"]);
    let url = server.url();
    let address = url.trim_start_matches("http://").to_owned();
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let readers: Vec<Arc<Reader>> = (0..READERS).map(|n| Arc::new(Reader::new(n))).collect();
    for reader in &readers {
        let (reader, address) = (reader.clone(), address.clone());
        runtime.spawn(async move { reader.read(&address).await });
    }
    all(&readers, "all are connected", |_, has| has.connected > 0);

    let made = Arc::new(AtomicUsize::new(0));
    let maker = std::thread::spawn({
        let (made, url) = (made.clone(), url.clone());
        move || {
            for number in 0..MADE {
                make(&url, number);
                made.store(number + 1, SeqCst);
            }
        }
    });
    for cut in 1..=CUTS {
        until("events are made", || {
            let enough = made.load(SeqCst) >= cut * MADE / (CUTS + 1);
            (enough || maker.is_finished()).then_some(())
        });
        match cut {
            2 => {
                server.stop();
            }
            _ => server.kill(),
        }
        server.restart_with(&["--listen", &address, "--gateway", "127.0.0.1:0"]);
        all(&readers, "all are connected again", |_, has| {
            has.connected > cut
        });
    }
    maker.join().unwrap();

    // What the server says of each feed now: more may come, made by itself.
    let deadline = Instant::now() + ALL_WITHIN;
    loop {
        let chains = FEEDS.map(|feed| {
            let said = server.read(&format!("/api/v1/events/chain?{feed}"));
            (
                said["chain"].as_str().unwrap().to_owned(),
                said["events"].as_u64().unwrap(),
            )
        });
        assert!(chains[0].1 > MADE as u64, "{chains:?}");
        let head = server.read("/api/v1/events?limit=1")["head"]
            .as_u64()
            .unwrap();
        all(&readers, "all have everything", |reader, has| {
            reader.feed != FEEDS[0] || has.last >= head
        });
        let differ = readers.iter().filter(|reader| {
            let at = FEEDS.iter().position(|feed| *feed == reader.feed);
            reader.has.lock().unwrap().chain.to_string() != chains[at.unwrap()].0
        });
        let differ = differ.count();
        if differ == 0 {
            break;
        }
        assert!(
            Instant::now() < deadline,
            "{differ} readers have another chain than {chains:?}"
        );
        std::thread::sleep(Duration::from_millis(200));
    }
    runtime.shutdown_background();
    server.check_replay();
}
