//! How long a switch takes: from the request that makes another deployment the main one to the
//! first answer of that deployment, while the service is in constant use. On the real binary, with
//! everything that a switch is: an event in the embedded log, folded, applied by the gateway.

use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use daybook_testkit::git::SourceRepository;
use reqwest::{Client, Method};
use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::process::{Child, Command};
use tokio::time::MissedTickBehavior;
use tokio_util::sync::CancellationToken;

use crate::report::{Comparison, Report};
use crate::{Failure, temporary_folder};

/// What is promised of the 99th percentile, in milliseconds.
const PROMISED_MS: f64 = 50.0;
/// Connections that the load comes over.
const CONNECTIONS: u32 = 16;
const HOST: &str = "web.shop.localhost";
const PATIENCE: Duration = Duration::from_secs(60);

#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// Switches in each round
    #[arg(long, default_value_t = 100)]
    switches: usize,
    /// Rounds; the median of their 99th percentiles counts
    #[arg(long, default_value_t = 5)]
    rounds: usize,
    /// Requests per second, all the time
    #[arg(long, default_value_t = 500)]
    load: u32,
    /// From one switch to the next, in milliseconds
    #[arg(long, default_value_t = 60)]
    pause: u64,
    /// The program; the one beside this one if it is not named
    #[arg(long, value_name = "FILE")]
    daybook: Option<PathBuf>,
    /// Where the log is kept meanwhile
    #[arg(long)]
    folder: Option<PathBuf>,
}

pub(crate) async fn run(options: Options) -> Result<Report, Failure> {
    // The clients want one, although they speak plain HTTP here.
    let _ = rustls::crypto::ring::default_provider().install_default();
    let folder = temporary_folder(options.folder.as_deref())?;
    let program = match &options.daybook {
        Some(program) => program.clone(),
        None => std::env::current_exe()?.with_file_name("daybook"),
    };
    if !program.is_file() {
        let program = program.display();
        return Err(format!(
            "there is no {program}; build it with `cargo build --release --package daybook`"
        )
        .into());
    }
    let server = Server::start(&program, folder.path(), "127.0.0.1:0", &[]).await?;
    let mut deployments = server.two_deployments().await?;
    let load = Load::start(&server.gateway, options.load);
    // Warm-up: connections, files, caches.
    for _ in 0..10 {
        server.switch(&load, &mut deployments).await?;
    }
    load.take();
    let (mut medians, mut p99s, mut all) = (Vec::new(), Vec::new(), Vec::new());
    let (mut answers, mut failures) = (0, Vec::new());
    let begun = Instant::now();
    for _ in 0..options.rounds {
        let mut taken = Vec::with_capacity(options.switches);
        for _ in 0..options.switches {
            tokio::time::sleep(Duration::from_millis(options.pause)).await;
            let (count, failed) = load.take();
            answers += count;
            failures.extend(failed);
            taken.push(server.switch(&load, &mut deployments).await?);
        }
        all.extend_from_slice(&taken);
        medians.push(percentile(&mut taken, 50));
        p99s.push(percentile(&mut taken, 99));
    }
    let elapsed = begun.elapsed().as_secs_f64();
    let (count, failed) = load.end().await;
    answers += count;
    failures.extend(failed);
    server.stop().await?;
    if let Some(first) = failures.first() {
        let failed = failures.len();
        return Err(format!("{failed} of {answers} requests failed; the first: {first}").into());
    }
    let subject = format!(
        "{} switches at {:.0} requests/s, none of {answers} failed (p50 {:.1} ms, p99 {:.1} ms, \
         longest {:.1} ms)",
        all.len(),
        f64::from(answers) / elapsed,
        percentile(&mut all, 50),
        percentile(&mut all, 99),
        percentile(&mut all, 100),
    );
    let notes = vec![format!(
        "median of the rounds' medians: {:.1} ms",
        percentile(&mut medians, 50)
    )];
    Ok(Report {
        title: "From the request to switch to the first answer of the new target: one after the \
                other, by the time of the 99th percentile"
            .to_owned(),
        unit: "switches/s",
        notes,
        comparisons: vec![Comparison {
            subject,
            yardstick: "50 ms a switch",
            measured: p99s.iter().map(|ms| 1000.0 / ms).collect(),
            against: p99s.iter().map(|_| 1000.0 / PROMISED_MS).collect(),
            limit: Some(1.0),
        }],
    })
}

/// The value that so many percent do not exceed.
pub(crate) fn percentile(values: &mut [f64], percent: usize) -> f64 {
    values.sort_by(f64::total_cmp);
    let rank = (values.len() * percent).div_ceil(100).max(1);
    values.get(rank - 1).copied().unwrap_or(f64::NAN)
}

/// `daybook up` on a folder of its own.
pub(crate) struct Server {
    pub(crate) child: Child,
    client: Client,
    pub(crate) url: String,
    gateway: String,
}

impl Server {
    /// Starts it at an address, with more arguments.
    pub(crate) async fn start(
        program: &Path,
        folder: &Path,
        listen: &str,
        arguments: &[String],
    ) -> Result<Self, Failure> {
        let mut child = Command::new(program)
            .args(["up", "--output", "json"])
            .args(["--listen", listen, "--gateway", "127.0.0.1:0"])
            .args(arguments)
            .arg("--data")
            .arg(folder.join("data"))
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .kill_on_drop(true)
            .spawn()?;
        let stdout = child.stdout.take().ok_or("the server has no output")?;
        let mut lines = BufReader::new(stdout).lines();
        let facts = tokio::time::timeout(PATIENCE, lines.next_line()).await??;
        let facts: Value = serde_json::from_str(&facts.ok_or("the server did not start")?)?;
        // Read on, so that it never blocks on a full pipe.
        tokio::spawn(async move { while let Ok(Some(_)) = lines.next_line().await {} });
        let fact = |name: &str| match facts[name].as_str() {
            Some(text) => Ok(text.to_owned()),
            None => Err(format!("the server does not say its {name}: {facts}")),
        };
        Ok(Self {
            child,
            client: Client::builder().no_proxy().build()?,
            url: fact("url")?,
            gateway: fact("gateway")?,
        })
    }

    pub(crate) async fn ask(
        &self,
        method: Method,
        path: &str,
        body: Value,
    ) -> Result<Value, Failure> {
        let request = self.client.request(method, format!("{}{path}", self.url));
        let request = match body {
            Value::Null => request,
            body => request.json(&body),
        };
        let answer = request.send().await?;
        let (status, text) = (answer.status(), answer.text().await?);
        if !status.is_success() {
            return Err(format!("{path}: {status}: {text}").into());
        }
        Ok(serde_json::from_str(&text)?)
    }

    /// Two deployments of a service, side by side; the first one has the traffic.
    async fn two_deployments(&self) -> Result<[String; 2], Failure> {
        let source = SourceRepository::new();
        source.commit("A page", &[("index.html", "one")]);
        let post = |path: &'static str, body| self.ask(Method::POST, path, body);
        post("/api/v1/projects", json!({ "name": "shop" })).await?;
        let service = json!({ "source": { "url": source.url() } });
        self.ask(Method::PUT, "/api/v1/projects/shop/services/web", service)
            .await?;
        let environment = json!({ "name": "production", "live": true });
        post("/api/v1/projects/shop/environments", environment).await?;
        let mut deployments = Vec::new();
        for switch in ["automatic", "manual"] {
            let wish = json!({ "instance_id": "shop.production.web", "switch": switch });
            let accepted = post("/api/v1/deployments", wish).await?;
            let id = accepted["id"].as_str().unwrap_or_default().to_owned();
            self.started(&id).await?;
            deployments.push(id);
            source.commit("Another page", &[("index.html", "two")]);
        }
        let [first, second] = deployments.try_into().map_err(|_| "two were asked for")?;
        Ok([first, second])
    }

    async fn started(&self, id: &str) -> Result<(), Failure> {
        let path = format!("/api/v1/deployments/{id}");
        let begun = Instant::now();
        loop {
            let seen = self.ask(Method::GET, &path, Value::Null).await?;
            match seen["state"].as_str() {
                Some("started") => return Ok(()),
                Some("failed" | "cancelled") => return Err(format!("it failed: {seen}").into()),
                _ if begun.elapsed() > PATIENCE => {
                    return Err(format!("it did not start: {seen}").into());
                }
                _ => tokio::time::sleep(Duration::from_millis(20)).await,
            }
        }
    }

    /// Switches to the deployment that has no traffic. How long it takes until that answers, in
    /// milliseconds.
    async fn switch(&self, load: &Load, deployments: &mut [String; 2]) -> Result<f64, Failure> {
        deployments.swap(0, 1);
        let target = &deployments[0];
        let path = format!("/api/v1/deployments/{target}/mark-main");
        let begun = Instant::now();
        let (switched, first) = tokio::join!(
            self.ask(Method::POST, &path, json!({})),
            load.first_of(target, begun)
        );
        switched?;
        Ok(first?.duration_since(begun).as_secs_f64() * 1000.0)
    }

    pub(crate) async fn stop(mut self) -> Result<(), Failure> {
        if let Some(id) = self.child.id().and_then(|id| i32::try_from(id).ok())
            && let Some(pid) = rustix::process::Pid::from_raw(id)
        {
            rustix::process::kill_process(pid, rustix::process::Signal::TERM)?;
        }
        tokio::time::timeout(PATIENCE, self.child.wait()).await??;
        Ok(())
    }
}

/// A service in constant use.
struct Load {
    seen: Arc<Mutex<Seen>>,
    changed: Arc<tokio::sync::Notify>,
    stop: CancellationToken,
    visitors: Vec<tokio::task::JoinHandle<()>>,
}

#[derive(Default)]
struct Seen {
    count: u32,
    failures: Vec<String>,
    /// When each of the newest answers came, and whose it was.
    answers: Vec<(Instant, String)>,
}

impl Load {
    fn start(gateway: &str, rate: u32) -> Self {
        let load = Self {
            seen: Arc::default(),
            changed: Arc::default(),
            stop: CancellationToken::new(),
            visitors: Vec::new(),
        };
        let every = Duration::from_secs(1) * CONNECTIONS / rate.max(1);
        let visitors = (0..CONNECTIONS).map(|number| {
            let (seen, changed, stop) =
                (load.seen.clone(), load.changed.clone(), load.stop.clone());
            let gateway = gateway.to_owned();
            tokio::spawn(async move {
                let client = Client::builder().no_proxy().build();
                let Ok(client) = client else { return };
                let first = tokio::time::Instant::now() + every * number / CONNECTIONS;
                let mut tick = tokio::time::interval_at(first, every);
                tick.set_missed_tick_behavior(MissedTickBehavior::Burst);
                while !stop.is_cancelled() {
                    tick.tick().await;
                    let answer = visit(&client, &gateway).await;
                    let mut seen = seen.lock().unwrap_or_else(PoisonError::into_inner);
                    seen.count += 1;
                    match answer {
                        Ok(by) => seen.answers.push((Instant::now(), by)),
                        Err(failure) => seen.failures.push(failure),
                    }
                    changed.notify_waiters();
                }
            })
        });
        Self {
            visitors: visitors.collect(),
            ..load
        }
    }

    /// How many requests there were since this was asked last, and those that failed.
    fn take(&self) -> (u32, Vec<String>) {
        let mut seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        seen.answers.clear();
        (
            std::mem::take(&mut seen.count),
            std::mem::take(&mut seen.failures),
        )
    }

    /// When a deployment answered first.
    async fn first_of(&self, deployment: &str, after: Instant) -> Result<Instant, Failure> {
        let found = async {
            loop {
                let changed = self.changed.notified();
                {
                    let seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
                    let mut answers = seen.answers.iter();
                    let first = answers.find(|(at, by)| *at > after && by == deployment);
                    if let Some((at, _)) = first {
                        return *at;
                    }
                }
                changed.await;
            }
        };
        let found = tokio::time::timeout(PATIENCE, found).await;
        Ok(found.map_err(|_| format!("{deployment} never answered"))?)
    }

    async fn end(self) -> (u32, Vec<String>) {
        self.stop.cancel();
        for visitor in self.visitors {
            let _ = visitor.await;
        }
        let mut seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        (seen.count, std::mem::take(&mut seen.failures))
    }
}

/// One request on a kept-alive connection. Which deployment answered.
async fn visit(client: &Client, gateway: &str) -> Result<String, String> {
    let request = client.get(gateway).header("Host", HOST);
    let answer = request.send().await.map_err(|e| format!("{e:?}"))?;
    let status = answer.status();
    let by = answer.headers().get("x-daybook-deployment");
    let by = by.and_then(|by| by.to_str().ok()).map(str::to_owned);
    let body = answer.text().await.map_err(|e| format!("{e:?}"))?;
    match (status.as_u16(), body.as_str(), by) {
        (200, "one" | "two", Some(by)) => Ok(by),
        other => Err(format!("{other:?}")),
    }
}
