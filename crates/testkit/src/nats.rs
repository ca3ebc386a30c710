//! Real nats-servers with JetStream, alone or three in a cluster, that tests can stop, kill,
//! pause and start again over the same store.
//!
//! Which binaries: `DAYBOOK_NATS_SERVER` may list some, separated by `:`; otherwise the
//! `nats-server` on `PATH` is taken. The newest is looked for in `DAYBOOK_NATS_SERVER_NEW` and then
//! where `cargo xtask tools` puts it.

use std::ffi::OsStr;
use std::fmt;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, WaitId, WaitIdOptions, kill_process, waitid};
use tempfile::TempDir;

use crate::free_port;

/// How long a server may take to be ready, or to end after it was asked to.
const PATIENCE: Duration = Duration::from_secs(30);

/// A nats-server executable.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NatsBinary {
    /// Where it is.
    pub path: PathBuf,
    /// Its version: major, minor, patch.
    pub version: (u32, u32, u32),
}

impl fmt::Display for NatsBinary {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (major, minor, patch) = self.version;
        write!(f, "nats-server {major}.{minor}.{patch}")
    }
}

impl NatsBinary {
    /// Asks an executable for its version; `None` if it cannot be run or is no nats-server.
    pub fn at(path: impl Into<PathBuf>) -> Option<Self> {
        let path = path.into();
        let output = Command::new(&path).arg("--version").output().ok()?;
        let text = String::from_utf8(output.stdout).ok()?;
        let mut numbers = text
            .trim()
            .strip_prefix("nats-server: v")?
            .split(['.', '-'])
            .map(str::parse);
        let mut number = || numbers.next()?.ok();
        let version = (number()?, number()?, number()?);
        Some(Self { path, version })
    }

    /// The servers that are installed: those that `DAYBOOK_NATS_SERVER` lists, or the one on
    /// `PATH`, or none.
    ///
    /// # Panics
    /// If `DAYBOOK_NATS_SERVER` lists something that is no nats-server.
    pub fn installed() -> Vec<Self> {
        if let Some(list) = std::env::var_os("DAYBOOK_NATS_SERVER") {
            return std::env::split_paths(&list)
                .filter(|path| !path.as_os_str().is_empty())
                .map(|path| {
                    Self::at(&path).unwrap_or_else(|| {
                        panic!(
                            "DAYBOOK_NATS_SERVER: {} is no nats-server that runs",
                            path.display()
                        )
                    })
                })
                .collect();
        }
        on_path(OsStr::new("nats-server"))
            .and_then(Self::at)
            .into_iter()
            .collect()
    }

    /// The newest server: `DAYBOOK_NATS_SERVER_NEW`, or the one that `cargo xtask tools` built.
    ///
    /// # Panics
    /// If `DAYBOOK_NATS_SERVER_NEW` names something that is no nats-server.
    pub fn newest() -> Option<Self> {
        if let Some(path) = std::env::var_os("DAYBOOK_NATS_SERVER_NEW") {
            let path = PathBuf::from(path);
            return Some(Self::at(&path).unwrap_or_else(|| {
                panic!(
                    "DAYBOOK_NATS_SERVER_NEW: {} is no nats-server that runs",
                    path.display()
                )
            }));
        }
        Self::at(tools_folder()?.join("bin/nats-server"))
    }

    /// Whether the server is at least of this version.
    pub fn at_least(&self, major: u32, minor: u32, patch: u32) -> bool {
        self.version >= (major, minor, patch)
    }
}

/// Where `cargo xtask tools` puts what it builds.
pub fn tools_folder() -> Option<PathBuf> {
    if let Some(folder) = std::env::var_os("DAYBOOK_TOOLS") {
        return Some(folder.into());
    }
    let cache = std::env::var_os("XDG_CACHE_HOME")
        .map(PathBuf::from)
        .or_else(|| Some(PathBuf::from(std::env::var_os("HOME")?).join(".cache")))?;
    Some(cache.join("daybook/tools"))
}

fn on_path(name: &OsStr) -> Option<PathBuf> {
    std::env::split_paths(&std::env::var_os("PATH")?)
        .map(|folder| folder.join(name))
        .find(|file| file.is_file())
}

/// How a server is set up.
#[derive(Debug, Clone, Default)]
pub struct NatsSettings {
    /// Sync each write before it is acknowledged (2.10 and later).
    pub sync_always: bool,
    /// Further lines of the configuration file: accounts, users, limits.
    pub extra: String,
    /// Ask for readiness with these credentials, where `extra` demands some.
    pub user: Option<(String, String)>,
}

/// A running nats-server with JetStream, on 127.0.0.1. Dropping it kills the process and removes
/// its folder, unless the test is failing: then the folder is kept and its path printed.
#[derive(Debug)]
pub struct NatsServer {
    binary: NatsBinary,
    settings: NatsSettings,
    folder: Option<TempDir>,
    port: u16,
    member: Option<ClusterMember>,
    process: Option<Child>,
    paused: bool,
}

impl NatsServer {
    /// Starts a server with an empty store.
    ///
    /// # Panics
    /// If it does not get ready; the message has its log.
    pub async fn start(binary: &NatsBinary) -> Self {
        Self::start_with(binary, NatsSettings::default()).await
    }

    /// Starts a server that is set up in a certain way.
    ///
    /// # Panics
    /// If it does not get ready; the message has its log.
    pub async fn start_with(binary: &NatsBinary, settings: NatsSettings) -> Self {
        let mut server = Self::prepared(binary, settings, None);
        server.launch();
        server.wait_until_ready().await;
        server
    }

    fn prepared(
        binary: &NatsBinary,
        settings: NatsSettings,
        member: Option<ClusterMember>,
    ) -> Self {
        assert!(
            !settings.sync_always || binary.at_least(2, 10, 0),
            "{binary} has no sync_interval; ask for it from 2.10 on"
        );
        let folder = tempfile::Builder::new()
            .prefix("daybook-nats-")
            .tempdir()
            .expect("a temporary folder can be made");
        Self {
            binary: binary.clone(),
            settings,
            folder: Some(folder),
            port: free_port(),
            member,
            process: None,
            paused: false,
        }
    }

    /// The executable that runs.
    pub fn binary(&self) -> &NatsBinary {
        &self.binary
    }

    /// Where clients connect.
    pub fn url(&self) -> String {
        format!("nats://127.0.0.1:{}", self.port)
    }

    /// The folder with its configuration, its log and its store.
    pub fn folder(&self) -> &Path {
        self.folder.as_ref().expect("present until drop").path()
    }

    /// What the server has logged.
    pub fn log(&self) -> String {
        fs::read_to_string(self.folder().join("server.log")).unwrap_or_default()
    }

    /// Whether the process was started and not stopped or killed by the test.
    pub fn is_running(&self) -> bool {
        self.process.is_some()
    }

    /// Kills the server as `kill -9` does. Its store and its port stay reserved for
    /// [`start_again`](Self::start_again).
    pub fn kill(&mut self) {
        if let Some(mut process) = self.process.take() {
            let _ = process.kill();
            let _ = process.wait();
        }
        self.paused = false;
    }

    /// Asks the server to end, and waits until it has.
    ///
    /// # Panics
    /// If it does not end in time.
    pub async fn stop(&mut self) {
        self.resume();
        let Some(mut process) = self.process.take() else {
            return;
        };
        let _ = kill_process(pid_of(&process), Signal::TERM);
        let asked = Instant::now();
        while process
            .try_wait()
            .expect("a child can be waited for")
            .is_none()
        {
            if asked.elapsed() > PATIENCE {
                let _ = process.kill();
                let _ = process.wait();
                panic!("nats-server did not end; its log:\n{}", self.log());
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    /// Starts the server again, on the same port and over the same store.
    ///
    /// # Panics
    /// If it does not get ready; the message has its log.
    pub async fn start_again(&mut self) {
        assert!(self.process.is_none(), "the server is still running");
        self.launch();
        self.wait_until_ready().await;
    }

    /// Stops the process without ending it (SIGSTOP): it holds its connections and answers
    /// nothing.
    pub fn pause(&mut self) {
        let pid = pid_of(self.process.as_ref().expect("the server runs"));
        kill_process(pid, Signal::STOP).expect("a child can be signalled");
        self.paused = true;
        // The signal takes effect thread by thread; only then does nothing answer any more.
        waitid(
            WaitId::Pid(pid),
            WaitIdOptions::STOPPED | WaitIdOptions::NOWAIT,
        )
        .expect("a child can be waited for");
    }

    /// Lets a paused process go on (SIGCONT).
    pub fn resume(&mut self) {
        if let Some(process) = &self.process
            && std::mem::take(&mut self.paused)
        {
            kill_process(pid_of(process), Signal::CONT).expect("a child can be signalled");
        }
    }

    /// Writes the configuration and starts the process.
    fn launch(&mut self) {
        let folder = self.folder().to_owned();
        let store = folder.join("store");
        let log = folder.join("server.log");
        let port = self.port;
        let sync = if self.settings.sync_always {
            "sync_interval: always"
        } else {
            ""
        };
        let mut config = format!(
            "listen: \"127.0.0.1:{port}\"\n\
             jetstream {{ store_dir: {store:?}, max_memory_store: 268435456, \
             max_file_store: 10737418240\n{sync} }}\n\
             {}\n",
            self.settings.extra,
        );
        if let Some(member) = &self.member {
            config.push_str(&member.config());
        }
        let file = folder.join("server.conf");
        fs::write(&file, config).expect("the configuration can be written");
        let output = File::options()
            .create(true)
            .append(true)
            .open(&log)
            .expect("the log can be opened");
        let errors = output.try_clone().expect("a file can be cloned");
        let process = Command::new(&self.binary.path)
            .arg("-c")
            .arg(&file)
            .stdin(Stdio::null())
            .stdout(output)
            .stderr(errors)
            .spawn()
            .unwrap_or_else(|error| panic!("{} does not start: {error}", self.binary));
        self.process = Some(process);
    }

    async fn wait_until_ready(&mut self) {
        let since = Instant::now();
        let mut options = async_nats::ConnectOptions::new();
        if let Some((user, password)) = &self.settings.user {
            options = options.user_and_password(user.clone(), password.clone());
        }
        let options = options.request_timeout(Some(Duration::from_millis(500)));
        loop {
            if let Ok(client) = options.clone().connect(self.url()).await
                && jetstream_answers(&client).await
            {
                return;
            }
            self.give_up_after(since, "JetStream does not answer");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    fn give_up_after(&mut self, since: Instant, what: &str) {
        let ended = self
            .process
            .as_mut()
            .and_then(|process| process.try_wait().ok().flatten());
        if let Some(status) = ended {
            self.process = None;
            panic!(
                "{} ended with {status}; its log:\n{}",
                self.binary,
                self.log()
            );
        }
        assert!(
            since.elapsed() < PATIENCE,
            "{} is not ready ({what}); its log:\n{}",
            self.binary,
            self.log()
        );
    }
}

impl Drop for NatsServer {
    fn drop(&mut self) {
        self.kill();
        if std::thread::panicking()
            && let Some(folder) = self.folder.take()
        {
            eprintln!(
                "log and store of {} are kept: {}",
                self.binary,
                folder.keep().display()
            );
        }
    }
}

fn pid_of(process: &Child) -> Pid {
    Pid::from_child(process)
}

async fn jetstream_answers(client: &async_nats::Client) -> bool {
    let Ok(reply) = client.request("$JS.API.INFO", "".into()).await else {
        return false;
    };
    serde_json::from_slice::<serde_json::Value>(&reply.payload)
        .is_ok_and(|answer| answer.get("error").is_none())
}

/// What a server has to know to be a member of a cluster.
#[derive(Debug, Clone)]
struct ClusterMember {
    name: String,
    port: u16,
    all_ports: Vec<u16>,
}

impl ClusterMember {
    fn config(&self) -> String {
        let routes: Vec<String> = self
            .all_ports
            .iter()
            .map(|port| format!("\"nats://127.0.0.1:{port}\""))
            .collect();
        format!(
            "server_name: {}\ncluster {{ name: daybook-test, listen: \"127.0.0.1:{}\", \
             routes: [{}] }}\n",
            self.name,
            self.port,
            routes.join(", ")
        )
    }
}

/// Three nats-servers in a cluster, for streams with three replicas.
#[derive(Debug)]
pub struct NatsCluster {
    /// Named `n0`, `n1`, `n2`.
    nodes: Vec<NatsServer>,
}

impl NatsCluster {
    /// Starts three servers with empty stores and waits until each of them answers for JetStream.
    ///
    /// # Panics
    /// If they do not get ready; the message has a log.
    pub async fn start(binary: &NatsBinary) -> Self {
        let all_ports: Vec<u16> = (0..3).map(|_| free_port()).collect();
        let mut nodes = Vec::new();
        for (number, &port) in all_ports.iter().enumerate() {
            let member = ClusterMember {
                name: format!("n{number}"),
                port,
                all_ports: all_ports.clone(),
            };
            let settings = NatsSettings::default();
            let mut server = NatsServer::prepared(binary, settings, Some(member));
            server.launch();
            nodes.push(server);
        }
        let mut cluster = Self { nodes };
        cluster.wait_until_ready().await;
        cluster
    }

    /// The addresses of all members, separated by commas.
    pub fn url(&self) -> String {
        let urls: Vec<String> = self.nodes.iter().map(NatsServer::url).collect();
        urls.join(",")
    }

    /// The servers.
    pub fn servers(&self) -> impl Iterator<Item = &NatsServer> {
        self.nodes.iter()
    }

    /// The servers, to do something to each of them.
    pub fn servers_mut(&mut self) -> impl Iterator<Item = &mut NatsServer> {
        self.nodes.iter_mut()
    }

    /// One server, by the name that stream and consumer information gives it.
    ///
    /// # Panics
    /// If there is none of this name.
    pub fn server_mut(&mut self, name: &str) -> &mut NatsServer {
        self.nodes
            .iter_mut()
            .find(|server| server.member.as_ref().is_some_and(|m| m.name == name))
            .unwrap_or_else(|| panic!("no member of the cluster is called {name}"))
    }

    /// Kills all members that run, as `kill -9` does.
    pub fn kill_all(&mut self) {
        for server in &mut self.nodes {
            server.kill();
        }
    }

    /// Stops all members in order.
    pub async fn stop_all(&mut self) {
        for server in &mut self.nodes {
            server.stop().await;
        }
    }

    /// Starts each member that does not run, over its store, and waits until all are ready.
    ///
    /// # Panics
    /// If they do not get ready; the message has a log.
    pub async fn start_again(&mut self) {
        for server in &mut self.nodes {
            if !server.is_running() {
                server.launch();
            }
        }
        self.wait_until_ready().await;
    }

    async fn wait_until_ready(&mut self) {
        for server in &mut self.nodes {
            server.wait_until_ready().await;
        }
    }
}
