//! Webhooks out and CDEvents, with everything real but the ledger's log: receivers are HTTP servers,
//! output is in files, secrets are in a folder.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use daybook_events::aggregate::Decision;
use daybook_events::environment::{self, Environment, EnvironmentEvent};
use daybook_events::lines::{LineLog, LineSource};
use daybook_events::memory::{Fault, MemoryLog};
use daybook_events::secret::{SecretId, SecretRef, SecretScope};
use daybook_events::subscription::delivery::{Entry, Outcome, Try};
use daybook_events::subscription::{
    self, Command, Created, Endpoint, EndpointUrl, Filter, Format, KindPattern, MAX_DEAD,
    PauseReason, Subscription,
};
use daybook_events::testing::{context, samples, time};
use daybook_events::{
    Context, EnvKey, EventId, EventLog, Hostname, NewEvent, Position, ProjectName, Subject,
    SubscriptionId,
};
use daybook_projections::{Ledger, Projections, runner};
use daybook_secrets::{MaskedLines, SecretFolder, SecretStore, SecretValue};
use daybook_store::embedded::{EmbeddedLines, LineRetention};
use daybook_workers::crew::Crew;
use daybook_workers::driver::DriverOptions;
use daybook_workers::notify::{Bulletin, NotifyOptions, Pace};
use daybook_workers::pipeline::{Bench, Settings};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio_util::sync::CancellationToken;
use uuid::Uuid;
use zeroize::Zeroizing;

/// Long enough for a loaded machine; nothing waits for it unless something is wrong.
const PATIENCE: Duration = Duration::from_secs(40);

async fn until<T>(what: &str, mut look: impl AsyncFnMut() -> Option<T>) -> T {
    let begun = tokio::time::Instant::now();
    loop {
        if let Some(found) = look().await {
            return found;
        }
        assert!(
            begun.elapsed() < PATIENCE,
            "{what}: not within {PATIENCE:?}"
        );
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

/// What a receiver does with a request.
#[derive(Clone, Copy)]
enum Answer {
    Status(u16),
    /// It takes the request and says nothing.
    Silence,
    /// A status, and a body without an end.
    Endless(u16),
}

type Rule = Arc<dyn Fn(usize) -> Answer + Send + Sync>;

/// A receiver of webhooks. It ends with the test.
struct Receiver {
    url: EndpointUrl,
    ids: Arc<Mutex<Vec<String>>>,
}

impl Receiver {
    /// One that answers by a rule, which is told how many requests came before.
    async fn start(rule: impl Fn(usize) -> Answer + Send + Sync + 'static) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}/hook", listener.local_addr().unwrap());
        let (ids, rule): (Arc<Mutex<Vec<String>>>, Rule) = (Arc::default(), Arc::new(rule));
        let seen = ids.clone();
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let (seen, rule) = (seen.clone(), rule.clone());
                tokio::spawn(async move { serve(stream, &seen, &rule).await });
            }
        });
        Self {
            url: EndpointUrl::parse(url).unwrap(),
            ids,
        }
    }

    async fn willing() -> Self {
        Self::start(|_| Answer::Status(204)).await
    }

    /// The ids of the events that came, in order.
    fn ids(&self) -> Vec<String> {
        self.ids.lock().unwrap().clone()
    }

    fn count(&self) -> usize {
        self.ids().len()
    }
}

/// One request on each connection.
async fn serve(mut stream: TcpStream, seen: &Mutex<Vec<String>>, rule: &Rule) -> Option<()> {
    let mut read = Vec::new();
    let end = loop {
        let mut chunk = [0; 4096];
        let length = stream.read(&mut chunk).await.ok()?;
        if length == 0 {
            return None;
        }
        read.extend_from_slice(&chunk[..length]);
        if let Some(end) = read.windows(4).position(|w| w == b"\r\n\r\n") {
            break end + 4;
        }
    };
    let head = String::from_utf8_lossy(&read[..end]).to_lowercase();
    let header = |name: &str| {
        let line = head.lines().find_map(|l| l.strip_prefix(name))?;
        Some(line.trim().to_owned())
    };
    let length: usize = header("content-length:")?.parse().ok()?;
    let mut rest = vec![0; length - (read.len() - end).min(length)];
    stream.read_exact(&mut rest).await.ok()?;
    let before = {
        let mut seen = seen.lock().unwrap();
        seen.push(header("webhook-id:")?);
        seen.len() - 1
    };
    match rule(before) {
        Answer::Status(status) => {
            let answer =
                format!("HTTP/1.1 {status} Said\r\nContent-Length: 0\r\nConnection: close\r\n\r\n");
            stream.write_all(answer.as_bytes()).await.ok()
        }
        Answer::Silence => {
            // Until whoever asked has gone.
            while stream.read(&mut [0; 16]).await.ok()? > 0 {}
            Some(())
        }
        Answer::Endless(status) => {
            let answer = format!("HTTP/1.1 {status} Said\r\nConnection: close\r\n\r\n");
            stream.write_all(answer.as_bytes()).await.ok()?;
            loop {
                stream.write_all(&[b'x'; 4096]).await.ok()?;
            }
        }
    }
}

/// What the workers of several processes, one after the other, stand on.
struct House {
    log: MemoryLog,
    ledger: Ledger,
    secrets: Arc<dyn SecretStore>,
    folding: CancellationToken,
    dir: tempfile::TempDir,
    project: ProjectName,
}

impl Drop for House {
    fn drop(&mut self) {
        self.folding.cancel();
    }
}

/// A process that sends.
struct Process {
    crew: Crew,
    cancel: CancellationToken,
    lines: Arc<dyn LineLog>,
}

impl Process {
    /// Ends it as an operator would.
    async fn stop(self) {
        self.cancel.cancel();
        self.crew.ended().await;
    }

    async fn tries(&self, id: SubscriptionId) -> Vec<Try> {
        let source = LineSource::Subscription(id);
        let lines = self.lines.read(source, 0, 10_000).await.unwrap();
        let entries = lines.iter().map(|l| Entry::from_text(&l.line.text));
        entries
            .filter_map(|e| e.expect("a line that can be read").attempt)
            .collect()
    }
}

fn options() -> NotifyOptions {
    NotifyOptions {
        allow_private: true,
        pace: Pace {
            first: Duration::from_millis(20),
            longest: Duration::from_millis(100),
        },
        lease: Duration::from_secs(10),
        ..NotifyOptions::default()
    }
}

impl House {
    async fn new() -> Self {
        let log = MemoryLog::new();
        let projections = Projections::in_memory();
        let folding = CancellationToken::new();
        let shared: Arc<dyn EventLog> = Arc::new(log.clone());
        tokio::spawn(runner::run(
            projections.clone(),
            shared.clone(),
            folding.clone(),
        ));
        let dir = tempfile::tempdir().unwrap();
        Self {
            ledger: Ledger::new(shared, projections),
            secrets: Arc::new(SecretFolder::new(dir.path().join("secrets"), None)),
            log,
            folding,
            dir,
            project: samples::shop().project,
        }
    }

    /// Starts a process whose output is in the folder of this name.
    async fn process(&self, lines: &str, options: NotifyOptions) -> Process {
        let opened = EmbeddedLines::open(self.dir.path().join(lines), LineRetention::default());
        let project = self.project.clone();
        let lines: Arc<dyn LineLog> = Arc::new(MaskedLines::new(
            Arc::new(opened.await.unwrap()),
            self.secrets.clone(),
            Arc::new(move |_| Some(project.clone())),
        ));
        let cancel = CancellationToken::new();
        let crew = Crew::new(
            self.bench(lines.clone()),
            DriverOptions::default(),
            cancel.clone(),
        );
        crew.notify(None, options).unwrap();
        Process {
            crew,
            cancel,
            lines,
        }
    }

    fn bench(&self, lines: Arc<dyn LineLog>) -> Bench {
        Bench {
            ledger: self.ledger.clone(),
            lines,
            secrets: self.secrets.clone(),
            settings: Arc::new(Settings {
                worker: "test".into(),
                domain: Hostname::parse("localhost").unwrap(),
                image_prefix: "registry.example/daybook".into(),
                scratch: self.dir.path().join("scratch"),
                gateway_url: None,
                builds: 1,
                keep_old: daybook_events::timer::KeepFor::Never,
            }),
        }
    }

    /// Keeps a key for a webhook.
    async fn key(&self, id: SubscriptionId, version: u32) -> SecretRef {
        let secret = Subscription::secret_id(id, version).unwrap();
        let value = SecretValue::new_key().unwrap();
        let kept = self
            .secrets
            .put(&self.project, &secret, &value)
            .await
            .unwrap();
        SecretRef {
            secret: secret.name,
            scope: secret.scope,
            version,
            commitment: kept.commitment,
        }
    }

    /// Gives the project a secret of its own.
    async fn secret(&self, name: &str, value: &str) {
        let id = SecretId {
            name: EnvKey::parse(name).unwrap(),
            scope: SecretScope::default(),
        };
        let value = SecretValue::new(Zeroizing::new(value.to_owned())).unwrap();
        self.secrets.put(&self.project, &id, &value).await.unwrap();
    }

    /// A webhook that gets the events about environments, from the first on.
    async fn webhook(&self, receiver: &Receiver, tries: u32) -> SubscriptionId {
        let id = SubscriptionId(Uuid::now_v7());
        let secret = self.key(id, 1).await;
        let created = Box::new(Created {
            id,
            endpoint: Endpoint {
                url: receiver.url.clone(),
                format: Format::Cloudevents,
                filter: Filter {
                    kinds: vec![KindPattern::parse("environment").unwrap()],
                    ..Filter::default()
                },
                proof: false,
                tries,
            },
            after: Position::ZERO,
            secret,
        });
        self.say(id, Command::Create(created)).await;
        id
    }

    /// Gives a command about a webhook.
    async fn say(&self, id: SubscriptionId, command: Command) {
        let subject = Subject::Subscription(self.project.clone(), id);
        let executed = self
            .ledger
            .execute::<Subscription>(&subject, &fresh(), |state| {
                subscription::decide(state, command.clone())
            })
            .await
            .unwrap();
        self.folded(executed.position().unwrap()).await;
    }

    async fn folded(&self, position: Position) {
        let projections = self.ledger.projections();
        projections.wait_for(position, PATIENCE).await.unwrap();
    }

    /// Makes an environment, and returns the id of its event.
    async fn event(&self, name: &str) -> String {
        let subject = Subject::Environment(self.project.clone(), name.parse().unwrap());
        let context = fresh();
        let made = self.made(name);
        self.ledger
            .execute::<Environment>(&subject, &context, |_| Ok(Decision::Append(made.clone())))
            .await
            .unwrap();
        context.id.to_string()
    }

    fn made(&self, name: &str) -> EnvironmentEvent {
        EnvironmentEvent::Created(environment::Created {
            project: self.project.clone(),
            name: name.parse().unwrap(),
            spec: Default::default(),
            from: None,
            auto_deploy: None,
        })
    }

    fn state(&self, id: SubscriptionId) -> Subscription {
        let found = self.ledger.projections().subscription(id).unwrap();
        found.unwrap().1
    }

    async fn came(&self, receiver: &Receiver, count: usize) -> Vec<String> {
        until("the deliveries", async || {
            (receiver.count() >= count).then(|| receiver.ids())
        })
        .await
    }
}

fn fresh() -> Context {
    let id = EventId(Uuid::now_v7());
    Context {
        id,
        correlation: id.0,
        time: jiff::Timestamp::now(),
        ..context(1)
    }
}

#[tokio::test]
async fn no_secret_of_the_project_makes_the_delivery_log_unreadable() {
    let house = House::new().await;
    for (name, value) in [("A", "delivered"), ("B", "position"), ("C", "millis")] {
        house.secret(name, value).await;
    }
    let receiver = Receiver::start(|before| match before {
        0 => Answer::Endless(500),
        _ => Answer::Status(204),
    })
    .await;
    house.secret("D", "xxxxxxxx").await;
    let process = house.process("lines", options()).await;
    let id = house.webhook(&receiver, 5).await;
    house.event("one").await;
    house.came(&receiver, 2).await;
    let tries = until("two tries are noted", async || {
        let tries = process.tries(id).await;
        (tries.len() == 2).then_some(tries)
    })
    .await;
    assert_eq!(tries[1].outcome, Outcome::Delivered);
    // What the receiver said is masked all the same.
    let message = tries[0].message.clone().unwrap();
    assert!(
        message.contains("500") && !message.contains("xxxxxxxx"),
        "{message}"
    );
    process.stop().await;
}

#[tokio::test]
async fn without_the_delivery_log_what_was_sent_is_not_sent_again() {
    let house = House::new().await;
    let receiver = Receiver::willing().await;
    let process = house.process("lines", options()).await;
    let id = house.webhook(&receiver, 5).await;
    for name in ["one", "two", "three"] {
        house.event(name).await;
    }
    house.came(&receiver, 3).await;
    // A pause tells how far it is, however long that takes; a stop does so only if it is fast.
    house.say(id, Command::Pause(PauseReason::Asked)).await;
    until("the progress", async || {
        (house.state(id).progress > Position::ZERO).then_some(())
    })
    .await;
    process.stop().await;
    house.say(id, Command::Resume).await;

    // As if the lines were older than output is kept.
    let process = house.process("other lines", options()).await;
    let last = house.event("four").await;
    let came = house.came(&receiver, 4).await;
    assert_eq!(came[3..], [last]);
    process.stop().await;

    // Saying how far it is makes it no further.
    let told = house.state(id).progress;
    house.process("lines", options()).await.stop().await;
    house.process("lines", options()).await.stop().await;
    assert_eq!(house.state(id).progress, told);
    assert_eq!(receiver.count(), 4);
}

#[tokio::test]
async fn what_is_paused_says_how_far_it_is() {
    let house = House::new().await;
    let receiver = Receiver::willing().await;
    let process = house.process("lines", options()).await;
    let id = house.webhook(&receiver, 5).await;
    house.event("one").await;
    house.came(&receiver, 1).await;
    house.say(id, Command::Pause(PauseReason::Asked)).await;
    until("the progress", async || {
        (house.state(id).progress > Position(1)).then_some(())
    })
    .await;
    process.stop().await;
}

#[tokio::test]
async fn an_event_that_does_not_count_is_not_sent() {
    let house = House::new().await;
    let receiver = Receiver::willing().await;
    // Two writers made the same environment at once.
    let subject = Subject::Environment(house.project.clone(), "one".parse().unwrap());
    for number in 1..=2 {
        let event = NewEvent {
            subject: subject.clone(),
            revision: 1,
            payload: house.made("one"),
            context: context(number),
        };
        let position = house
            .log
            .store(subject.clone(), event.to_bytes(time(number)).unwrap());
        house.folded(position).await;
    }
    let last = house.event("two").await;
    let process = house.process("lines", options()).await;
    let id = house.webhook(&receiver, 5).await;
    until("the last one", async || {
        receiver.ids().contains(&last).then_some(())
    })
    .await;
    process.stop().await;
    let mut came = receiver.ids();
    came.sort();
    let mut wanted = vec![context(1).id.to_string(), last];
    wanted.sort();
    assert_eq!(came, wanted, "{id}");
}

#[tokio::test]
async fn what_is_discarded_makes_room_for_what_comes() {
    let house = House::new().await;
    let willing = Arc::new(std::sync::atomic::AtomicBool::new(false));
    let now = willing.clone();
    let receiver = Receiver::start(
        move |_| match now.load(std::sync::atomic::Ordering::SeqCst) {
            true => Answer::Status(204),
            false => Answer::Status(400),
        },
    )
    .await;
    for number in 0..=MAX_DEAD {
        house.event(&format!("e{number}")).await;
    }
    let process = house.process("lines", options()).await;
    let id = house.webhook(&receiver, 1).await;
    until("it is paused", async || {
        let state = house.state(id);
        let failing = state
            .pause
            .is_some_and(|p| p.reason == PauseReason::Failing);
        (failing && state.dead.len() == MAX_DEAD).then_some(())
    })
    .await;
    house.say(id, Command::Discard(None)).await;
    house.say(id, Command::Resume).await;
    // The one for which there was no room.
    let left = until("the last one is set aside", async || {
        let dead = house.state(id).dead;
        dead.first_key_value().map(|(position, _)| *position)
    })
    .await;
    house.say(id, Command::Discard(Some(vec![left]))).await;
    willing.store(true, std::sync::atomic::Ordering::SeqCst);
    let last = house.event("last").await;
    until("what comes is sent", async || {
        receiver.ids().contains(&last).then_some(())
    })
    .await;
    assert!(house.state(id).dead.is_empty());
    process.stop().await;
}

#[tokio::test]
async fn a_replay_is_over_only_when_the_ledger_says_so() {
    let house = House::new().await;
    let log = house.log.clone();
    let receiver = Receiver::start(move |before| match before {
        0 => Answer::Status(500),
        1 => {
            log.inject(Fault::Unavailable);
            Answer::Status(204)
        }
        _ => Answer::Status(204),
    })
    .await;
    let process = house.process("lines", options()).await;
    let id = house.webhook(&receiver, 1).await;
    house.event("one").await;
    until("it is set aside", async || {
        (house.state(id).dead.len() == 1).then_some(())
    })
    .await;
    house.say(id, Command::Replay(None)).await;
    until("it is off the list", async || {
        house.state(id).dead.is_empty().then_some(())
    })
    .await;
    process.stop().await;
}

#[tokio::test]
async fn the_old_secret_is_erased_when_it_is_used_no_more() {
    let house = House::new().await;
    let receiver = Receiver::willing().await;
    let process = house.process("lines", options()).await;
    let id = house.webhook(&receiver, 5).await;
    house.event("one").await;
    house.came(&receiver, 1).await;
    let old = house.state(id).secret;
    let rotate = Command::Rotate {
        secret: house.key(id, 2).await,
        overlap_until: jiff::Timestamp::now() + Duration::from_millis(300),
    };
    house.say(id, rotate).await;
    let wanted = BTreeMap::from([(old.secret.clone(), old)]);
    until("it is erased", async || {
        house.secrets.resolve(&house.project, &wanted).await.err()
    })
    .await;
    house.event("two").await;
    house.came(&receiver, 2).await;
    process.stop().await;
}

#[tokio::test]
async fn a_receiver_that_never_answers_holds_up_nobody_else() {
    let house = House::new().await;
    let (dead, endless) = (
        Receiver::start(|_| Answer::Silence).await,
        Receiver::start(|before| Answer::Endless(if before == 0 { 503 } else { 200 })).await,
    );
    let willing = Receiver::willing().await;
    let options = NotifyOptions {
        timeout: Duration::from_secs(8),
        ..options()
    };
    let process = house.process("lines", options).await;
    let first = house.webhook(&dead, 1).await;
    let second = house.webhook(&endless, 5).await;
    house.webhook(&willing, 5).await;
    house.event("one").await;
    house.came(&dead, 1).await;
    house.event("two").await;
    house.came(&willing, 2).await;
    // An answer without an end is read no further than it has to be.
    let tries = until("it takes both", async || {
        let tries = process.tries(second).await;
        (tries
            .iter()
            .filter(|t| t.outcome == Outcome::Delivered)
            .count()
            == 2)
            .then_some(tries)
    })
    .await;
    let refused = tries.iter().find(|t| t.outcome == Outcome::Failed).unwrap();
    assert_eq!(refused.code.as_deref(), Some("status_503"), "{refused:?}");
    assert!(refused.message.as_ref().unwrap().len() < 300);
    assert!(refused.millis < 8000, "{refused:?}");
    let tries = until("it is given up", async || {
        let tries = process.tries(first).await;
        (tries.len() == 2).then_some(tries)
    })
    .await;
    for attempt in tries {
        assert_eq!(attempt.code.as_deref(), Some("timeout"), "{attempt:?}");
        assert_eq!(attempt.outcome, Outcome::DeadLettered);
    }
    process.stop().await;
}

/// A place for CDEvents that is away for a while.
#[derive(Debug, Default)]
struct Board {
    refused: Mutex<u32>,
    published: Mutex<Vec<(String, bool)>>,
}

#[async_trait]
impl Bulletin for Board {
    async fn publish(&self, _: &str, id: &str, _: Bytes, again: bool) -> Result<(), String> {
        let mut refused = self.refused.lock().unwrap();
        if *refused < 5 {
            *refused += 1;
            return Err("it is away".into());
        }
        self.published.lock().unwrap().push((id.to_owned(), again));
        Ok(())
    }
}

#[tokio::test]
async fn no_cdevent_is_left_out_however_long_nats_is_away() {
    let house = House::new().await;
    let first = house.event("one").await;
    let second = house.event("two").await;
    let opened = EmbeddedLines::open(house.dir.path().join("lines"), LineRetention::default());
    let cancel = CancellationToken::new();
    let options = DriverOptions {
        max_tries: 1,
        ..DriverOptions::default()
    };
    let bench = house.bench(Arc::new(opened.await.unwrap()));
    let crew = Crew::new(bench, options, cancel.clone());
    let board = Arc::new(Board::default());
    crew.publish_cdevents(board.clone());
    let published = until("both are published", async || {
        let published = board.published.lock().unwrap().clone();
        (published.len() == 2).then_some(published)
    })
    .await;
    assert_eq!(published, [(first, true), (second, false)]);
    cancel.cancel();
    crew.ended().await;
}
