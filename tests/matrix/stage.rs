//! The processes of a run: started, watched, and started again when they have died.

use std::collections::BTreeSet;
use std::os::unix::process::ExitStatusExt as _;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::Instant;

use daybook_testkit::free_port;
use daybook_testkit::git::{BareRemote, GitHttpServer};
use daybook_testkit::nats::{NatsBinary, NatsServer};
use reqwest::Method;
use serde_json::Value;
use tokio::runtime::Runtime;

use crate::support::{Answer, Folder, PATIENCE, Process, processes_in, processes_of, request};

/// A time in which nobody could be served: from the moment in which a process was killed to the one
/// in which its successor said that it was ready.
#[derive(Debug, Clone, Copy)]
pub struct Outage {
    pub from: Instant,
    pub to: Instant,
}

/// One process of a run.
#[derive(Debug)]
struct Part {
    name: &'static str,
    args: Vec<String>,
    env: Vec<(String, String)>,
    /// Where it is to die, for its first life only.
    failpoint: Option<String>,
    process: Option<Process>,
    /// What it writes the places to that it reaches.
    trace: PathBuf,
    /// Whether requests depend on it.
    serves: bool,
}

impl Part {
    /// When its processes last reached a place; none if they have not yet. For a process that was
    /// killed at one this is the moment of its death: when it is gone for its parent is later than
    /// when nobody answers any more.
    fn last_reached(&self) -> Option<Instant> {
        let written = std::fs::metadata(&self.trace).and_then(|m| m.modified());
        let since = written.ok()?.elapsed().unwrap_or_default();
        Instant::now().checked_sub(since)
    }
}

/// All processes of a run, over one data folder.
#[derive(Debug)]
pub struct Stage {
    // Before the folder: what runs ends before the folder goes.
    parts: Vec<Part>,
    _nats: Option<(NatsServer, Runtime)>,
    pub forge: Option<Forge>,
    pub folder: Folder,
    pub url: String,
    pub gateway: String,
    pub outages: Arc<Mutex<Vec<Outage>>>,
    /// How often a process died.
    pub deaths: u32,
}

/// How a run is made up.
#[derive(Debug, Clone)]
pub struct Cast {
    /// Name and roles of each process; `up` if there is only one.
    pub parts: Vec<(&'static str, Option<&'static str>)>,
    /// The nats-server that each run has one of; none for the embedded log.
    pub nats: Option<NatsBinary>,
    /// Whether GitOps commits are pushed to a server over HTTP, one for each run.
    pub remote: bool,
}

/// Where the GitOps commits of a run are pushed.
#[derive(Debug)]
pub struct Forge {
    pub repository: BareRemote,
    server: GitHttpServer,
    _runtime: Runtime,
}

impl Forge {
    fn new() -> Self {
        let runtime = Runtime::new().unwrap();
        let repository = BareRemote::new();
        let server = runtime.block_on(GitHttpServer::start(repository.root()));
        Self {
            repository,
            server,
            _runtime: runtime,
        }
    }

    /// Its URL.
    pub fn url(&self) -> String {
        self.server.url(BareRemote::NAME)
    }
}

impl Cast {
    /// Everything in one process, on the embedded log.
    pub fn alone() -> Self {
        Self {
            parts: vec![("up", None)],
            nats: None,
            remote: false,
        }
    }

    /// Workers in processes of their own, on JetStream. None if there is no nats-server.
    pub fn on_nats() -> Option<Self> {
        let nats = NatsBinary::newest().or_else(|| NatsBinary::installed().pop())?;
        Some(Self {
            parts: vec![
                ("front", Some("api,gateway,route,probe,timers,notary")),
                ("builder", Some("build")),
                ("packager", Some("package")),
                ("cluster", Some("sync")),
            ],
            nats: Some(nats),
            remote: false,
        })
    }
}

impl Stage {
    /// Starts everything. The part that is named dies at its failpoint.
    pub fn start(cast: &Cast, failpoint: Option<(&str, &str)>) -> Self {
        let folder = Folder::new();
        let (api, gateway) = (free_port(), free_port());
        let nats = cast.nats.as_ref().map(|binary| {
            let runtime = Runtime::new().unwrap();
            (runtime.block_on(NatsServer::start(binary)), runtime)
        });
        let url = nats.as_ref().map(|(server, _)| server.url());
        let parts = cast.parts.iter().map(|(name, roles)| {
            let mut args: Vec<String> = match roles {
                None => vec!["up".into()],
                Some(roles) => vec!["serve".into(), "--role".into(), (*roles).into()],
            };
            for (flag, port) in [("--listen", api), ("--gateway", gateway)] {
                args.extend([flag.to_owned(), format!("127.0.0.1:{port}")]);
            }
            let mut env = Vec::new();
            env.extend(url.clone().map(|url| ("DAYBOOK_NATS".to_owned(), url)));
            let trace = folder.path().join(format!("{name}.trace"));
            env.push((
                "DAYBOOK_FAILPOINTS_TRACE".into(),
                trace.to_str().unwrap().into(),
            ));
            Part {
                name,
                args,
                env,
                failpoint: failpoint
                    .filter(|(part, _)| part == name)
                    .map(|(_, place)| place.to_owned()),
                process: None,
                trace,
                serves: roles.is_none_or(|r| r.contains("gateway")),
            }
        });
        let parts = parts.collect();
        let mut stage = Self {
            parts,
            _nats: nats,
            forge: cast.remote.then(Forge::new),
            folder,
            url: format!("http://127.0.0.1:{api}"),
            gateway: format!("http://127.0.0.1:{gateway}"),
            outages: Arc::default(),
            deaths: 0,
        };
        stage.revive();
        stage
    }

    /// The places that a part has reached, in order.
    pub fn trace(&self, part: &str) -> Vec<String> {
        let mut parts = self.parts.iter();
        let trace = &parts.find(|p| p.name == part).unwrap().trace;
        let text = std::fs::read_to_string(trace).unwrap_or_default();
        text.lines().map(str::to_owned).collect()
    }

    /// Starts what does not run. Anything but its failpoint that ended a process is a failure.
    pub fn revive(&mut self) {
        for part in &mut self.parts {
            if let Some(process) = &mut part.process {
                match process.ended() {
                    None => continue,
                    Some(status) => {
                        let expected = part.failpoint.take().is_some();
                        assert!(
                            expected && status.signal() == Some(9),
                            "{} ended with {status} of its own accord",
                            part.name
                        );
                        self.deaths += 1;
                        part.process = None;
                    }
                }
            }
            let mut died = part.last_reached();
            let deadline = Instant::now() + PATIENCE;
            loop {
                let args: Vec<&str> = part.args.iter().map(String::as_str).collect();
                let mut env = part.env.clone();
                if let Some(place) = &part.failpoint {
                    env.push(("DAYBOOK_FAILPOINT".into(), place.clone()));
                }
                match Process::try_start(&self.folder, &args, &env) {
                    Ok(process) => {
                        part.process = Some(process);
                        break;
                    }
                    Err(refused) if refused.code == -1 && part.failpoint.is_some() => {
                        part.failpoint = None;
                        self.deaths += 1;
                        died = part.last_reached();
                    }
                    Err(refused) => assert!(
                        refused.stderr.contains("address_unusable") && Instant::now() < deadline,
                        "{} does not start: {refused:?}",
                        part.name
                    ),
                }
            }
            if let Some(from) = died.filter(|_| part.serves) {
                let to = Instant::now();
                self.outages.lock().unwrap().push(Outage { from, to });
            }
        }
    }

    /// Whether a failpoint is still to be reached.
    pub fn is_doomed(&self) -> bool {
        self.parts.iter().any(|p| p.failpoint.is_some())
    }

    /// The deployments' processes. They have the same ids in every run, and runs go on at the same
    /// time.
    pub fn processes(&self) -> BTreeSet<i32> {
        processes_in(&self.folder.data().join("clusters"))
            .into_iter()
            .collect()
    }

    /// Those of one deployment.
    pub fn processes_of(&self, deployment: &str) -> BTreeSet<i32> {
        let all = self.processes();
        let of = processes_of(deployment).into_iter();
        of.filter(|pid| all.contains(pid)).collect()
    }

    /// Sends a request until it is answered, and lets nobody stay dead meanwhile.
    ///
    /// # Panics
    /// If it is refused.
    pub fn ask(&mut self, method: &Method, path: &str, body: Option<&Value>, key: &str) -> Value {
        let deadline = Instant::now() + PATIENCE;
        let url = format!("{}{path}", self.url);
        let headers: Vec<_> = (!key.is_empty())
            .then_some(("Idempotency-Key", key))
            .into_iter()
            .collect();
        loop {
            let answer = request(method.clone(), &url, &headers, body);
            match answer {
                Ok(Answer { status, .. }) if status < 300 => {
                    return answer.map(|a| a.json()).unwrap();
                }
                Ok(answer) if answer.status < 500 => {
                    panic!("{method} {path} is refused: {answer:?}")
                }
                other => assert!(Instant::now() < deadline, "{method} {path}: {other:?}"),
            }
            self.rest();
        }
    }

    /// Reads something.
    pub fn read(&mut self, path: &str) -> Value {
        self.ask(&Method::GET, path, None, "")
    }

    /// Waits until there is an answer.
    pub fn until<T>(&mut self, what: &str, mut look: impl FnMut(&mut Self) -> Option<T>) -> T {
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Some(found) = look(self) {
                return found;
            }
            assert!(Instant::now() < deadline, "not in time: {what}");
            self.rest();
        }
    }

    /// A short rest, after which everything runs.
    pub fn rest(&mut self) {
        std::thread::sleep(std::time::Duration::from_millis(10));
        self.revive();
    }
}
