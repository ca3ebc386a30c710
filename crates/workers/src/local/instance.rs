//! The life of one instance: started or adopted, probed, restarted, stopped.

use std::collections::BTreeMap;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use daybook_events::EnvKey;
use daybook_events::lines::{LineKind, LineSource, NewLine};
use daybook_failpoints::reached;
use daybook_secrets::SecretValue;
use jiff::Timestamp;
use tokio::sync::watch;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;

use super::board::{Board, Report};
use super::command::{self, Launch};
use super::output::{self, Output, Runs};
use super::ports::Port;
use super::probe::{NotReady, Probe};
use super::process::{self, Exit, Process};
use super::processes::{Marked, marked};
use super::record::{InstanceSpec, Record};
use super::{Cluster, problems};
use crate::target::Problem;

/// Pauses between restarts: the first, and the longest.
const BACKOFF: Duration = Duration::from_millis(200);
const BACKOFF_MAX: Duration = Duration::from_secs(10);
/// Who was ready for this long starts with the first pause again.
const STABLE: Duration = Duration::from_secs(10);
/// So many starts in a row without becoming ready, and the rollout has failed.
const MAX_STARTS: u32 = 5;
/// Each process gets this long to become ready, also one that is taken over after its deadline.
const CHANCE: Duration = Duration::from_secs(2);
/// So often another port is tried because somebody else was faster.
const MAX_PORTS: u32 = 5;
/// So many unanswered probes make a ready instance unready; a refused connection does at once.
const MAX_MISSES: u32 = 2;
/// Between saying that an instance is no longer ready and stopping it: requests that were just
/// being routed to it still arrive.
const UNROUTE: Duration = Duration::from_millis(100);
/// How long output may take to reach the line log before something is said about its end.
const OUTPUT_SETTLES: Duration = Duration::from_millis(300);
/// How long output may take to reach the line log when the instance goes away.
const OUTPUT_ENDS: Duration = Duration::from_secs(5);

/// One instance, owned by the task that runs it.
pub(super) struct Instance {
    cluster: Arc<Cluster>,
    board: Arc<Board>,
    name: String,
    dir: PathBuf,
    record: Record,
    port: Option<Port>,
    ready: bool,
    problem: Option<Problem>,
    /// How long the image took to be fetched, if this had to wait for that.
    image_pull: Option<Duration>,
    /// Starts in a row that did not lead to a ready instance.
    failed_starts: u32,
    lost_ports: u32,
    runs: watch::Sender<Runs>,
    carried: watch::Receiver<u64>,
    output: AbortOnDropHandle<()>,
}

/// How a process ceased to be looked after.
enum End {
    Exited(Exit),
    /// Another process answers on its port.
    LostPort,
    Stop,
    Leave,
}

impl Instance {
    /// Looks after an instance until `stop` is cancelled, and ends it then; or until the cluster
    /// is left, and leaves it running then.
    pub(super) async fn look_after(
        cluster: Arc<Cluster>,
        board: Arc<Board>,
        spec: InstanceSpec,
        stop: CancellationToken,
    ) {
        match Self::open(cluster, board, spec) {
            Ok(mut instance) => match instance.live(&stop).await {
                Left::Stopped => instance.finish().await,
                Left::Running => instance.leave().await,
            },
            Err(error) => tracing::error!(%error, "an instance has no folder to live in"),
        }
    }

    fn open(cluster: Arc<Cluster>, board: Arc<Board>, spec: InstanceSpec) -> io::Result<Self> {
        let name = spec.name();
        let dir = spec.dir(&cluster.releases);
        std::fs::create_dir_all(&dir)?;
        let record = match Record::read(&dir) {
            Ok(Some(record)) => Record { spec, ..record },
            Ok(None) => Record::new(spec),
            Err(error) => {
                tracing::warn!(name, %error, "the record of an instance cannot be read");
                Record::new(spec)
            }
        };
        let (runs, known_runs) = watch::channel(Runs {
            newest: record.run,
            ended: false,
        });
        let (done, carried) = watch::channel(0);
        let output = Output {
            dir: dir.clone(),
            lines: cluster.lines.clone(),
            secrets: cluster.secrets.clone(),
            project: record.spec.app.project.clone(),
            source: LineSource::Deployment(record.spec.deployment),
            cluster: cluster.name.clone(),
            instance: name.clone(),
        };
        let carry = output.carry(known_runs, done, cluster.leave.clone());
        let output = AbortOnDropHandle::new(tokio::spawn(carry));
        Ok(Self {
            cluster,
            board,
            name,
            dir,
            record,
            port: None,
            ready: false,
            problem: None,
            image_pull: None,
            failed_starts: 0,
            lost_ports: 0,
            runs,
            carried,
            output,
        })
    }

    async fn live(&mut self, stop: &CancellationToken) -> Left {
        let mut process = self.take_over().await;
        if process.is_some() && self.record.was_ready {
            // Nobody is told that it is not ready only because it was not asked yet.
            let mut probe = Probe::new(self.record.port, &self.record.spec.run.health);
            self.ready = probe.next().await.is_ok();
        }
        self.report();
        loop {
            let running = match process.take() {
                Some(process) => Ok(process),
                None => {
                    let leave = self.cluster.leave.clone();
                    tokio::select! {
                        biased;
                        () = leave.cancelled() => return Left::Running,
                        () = stop.cancelled() => return Left::Stopped,
                        started = self.start() => started,
                    }
                }
            };
            if let Ok(process) = &running
                && process.is_new()
            {
                let (pid, port) = (process.id().pid, self.record.port);
                self.say(format!("started with process id {pid} on port {port}"))
                    .await;
            }
            let pause = match running {
                Ok(mut process) => match self.watch_over(&mut process, stop).await {
                    End::Leave => return Left::Running,
                    End::Stop => {
                        self.stop(process).await;
                        return Left::Stopped;
                    }
                    End::LostPort => {
                        process.stop(Duration::from_secs(1)).await;
                        self.after_lost_port();
                        Duration::ZERO
                    }
                    End::Exited(exit) => {
                        process.kill_family().await;
                        self.after_exit(exit).await
                    }
                },
                Err(problem) => {
                    self.failed_starts += 1;
                    self.problem = Some(problem);
                    self.pause()
                }
            };
            self.report();
            tokio::select! {
                biased;
                () = self.cluster.leave.cancelled() => return Left::Running,
                () = stop.cancelled() => return Left::Stopped,
                () = tokio::time::sleep(pause) => {}
            }
            self.record.restarts += u32::from(self.record.run > 0);
        }
    }

    /// The process of an earlier Daybook, if it still runs. What else is left of it is ended.
    async fn take_over(&mut self) -> Option<Process> {
        if self.record.mark.is_empty() {
            return None;
        }
        let mark = self.record.mark.clone();
        // Daybook may have died between starting the process and noting its id.
        if self.record.process.is_none() {
            let found = scan(mark.clone()).await;
            let leader = found.into_iter().find(|m| m.group == m.id.pid);
            self.record.process = leader.map(|m| m.id);
            self.save();
        }
        let id = self.record.process.as_ref()?;
        if let Some(process) = Process::adopt(id, &mark) {
            self.port = Some(Port::in_use(self.record.port));
            let pid = id.pid;
            self.say(format!("still running with process id {pid}: taken over"))
                .await;
            return Some(process);
        }
        process::kill_leftovers(id.clone(), mark).await;
        self.ended();
        // While nobody looked after it, it could not become ready.
        self.record.wanted_since = Timestamp::now();
        None
    }

    /// Starts a process. May be cancelled: once there is a process, nothing is waited for.
    async fn start(&mut self) -> Result<Process, Problem> {
        let spec = &self.record.spec;
        let unpacked = self
            .cluster
            .images
            .get(&spec.image, spec.deployment)
            .await
            .map_err(|e| problems::image(&spec.image, &e, self.is_hopeless()))?;
        self.image_pull = self.image_pull.or(unpacked.took);
        let secrets = self
            .cluster
            .secrets
            .resolve(&spec.app.project, &spec.secrets)
            .await
            .map_err(|e| problems::secrets(&e, self.is_hopeless()))?;
        let volumes = &self.cluster.volumes;
        volumes
            .make(&spec.app, &spec.service, &spec.run)
            .map_err(|e| problems::folder(&self.dir, &e))?;
        self.choose_port()?;
        let port = self.port.as_ref().map_or(0, Port::number);
        let spec = &self.record.spec;
        let launch = command::launch(
            &unpacked,
            &spec.run.command,
            &self.environment(port, &secrets),
            &self.cluster.static_server,
        )
        .map_err(|e| problems::start(&e))?;

        // The mark is on disk before the process exists, so that it is found whatever happens.
        self.record.run += 1;
        self.record.mark = format!("{}/{}", self.cluster.id, uuid::Uuid::new_v4());
        self.record.port = port;
        self.record.process = None;
        self.record.started_at = Timestamp::now();
        self.record
            .write(&self.dir)
            .map_err(|e| problems::folder(&self.dir, &e))?;
        reached("process.start.before");
        let started = self.spawn(&launch).await;
        reached("process.start.spawned");
        self.runs.send_replace(Runs {
            newest: self.record.run,
            ended: started.is_err(),
        });
        let process = started?;
        self.record.process = Some(process.id().clone());
        self.save();
        reached("process.start.after");
        self.report();
        Ok(process)
    }

    async fn spawn(&self, launch: &Launch) -> Result<Process, Problem> {
        let output = output::file(&self.dir, self.record.run);
        Process::start(launch, &self.record.mark, &output)
            .await
            .map_err(|e| problems::spawn(&launch.program, &e))
    }

    /// The port of the run before, if it is still free, or else another; the one that the service
    /// insists on by setting `PORT`, if it does.
    fn choose_port(&mut self) -> Result<(), Problem> {
        self.port = None;
        self.port = match self.fixed_port() {
            Some(fixed) => {
                let number = fixed
                    .parse()
                    .ok()
                    .filter(|n| *n > 0)
                    .ok_or_else(|| problems::no_port_number(fixed))?;
                let port = Port::exactly(number)
                    .ok_or_else(|| problems::port_in_use(number, self.is_hopeless()))?;
                Some(port)
            }
            None => match self.record.port {
                0 => Port::any(),
                last => Port::exactly(last).or_else(Port::any),
            },
        };
        self.port.as_ref().map(|_| ()).ok_or_else(problems::no_port)
    }

    fn fixed_port(&self) -> Option<&str> {
        let env = &self.record.spec.run.env;
        env.iter()
            .find(|(key, _)| key.as_str() == "PORT")
            .map(|(_, value)| value.as_str())
    }

    /// Variables of the release, over which its secrets win; those that say who it is win over all.
    fn environment(
        &self,
        port: u16,
        secrets: &BTreeMap<EnvKey, SecretValue>,
    ) -> BTreeMap<String, String> {
        let spec = &self.record.spec;
        let own = [("HOST", "127.0.0.1".to_owned()), ("PORT", port.to_string())];
        let identity = [
            ("DAYBOOK_PROJECT", spec.app.project.to_string()),
            ("DAYBOOK_ENVIRONMENT", spec.app.environment.to_string()),
            ("DAYBOOK_SERVICE", spec.service.to_string()),
            ("DAYBOOK_DEPLOYMENT", spec.deployment.to_string()),
            ("DAYBOOK_CLUSTER", self.cluster.name.to_string()),
            ("DAYBOOK_INSTANCE", self.name.clone()),
        ];
        let wanted = spec.run.env.iter().map(|(k, v)| (k.to_string(), v.clone()));
        let secrets = secrets
            .iter()
            .map(|(k, v)| (k.to_string(), v.expose().to_owned()));
        let named = |(k, v): (&str, String)| (k.to_owned(), v);
        let volumes = &self.cluster.volumes;
        let volumes = volumes.variables(&spec.app, &spec.service, &spec.run);
        own.into_iter()
            .map(named)
            .chain(wanted)
            .chain(volumes)
            .chain(secrets)
            .chain(identity.into_iter().map(named))
            .collect()
    }

    /// Probes a running process until something happens that ends this.
    async fn watch_over(&mut self, process: &mut Process, stop: &CancellationToken) -> End {
        let mut probe = Probe::new(self.record.port, &self.record.spec.run.health);
        let deadline = tokio::time::sleep(self.time_left().max(CHANCE));
        let mut deadline = std::pin::pin!(deadline);
        let mut overdue = false;
        let mut misses = 0;
        let mut ready_since = self.ready.then(Instant::now);
        let mut last_answer = None;
        let leave = self.cluster.leave.clone();
        loop {
            tokio::select! {
                biased;
                () = leave.cancelled() => return End::Leave,
                () = stop.cancelled() => return End::Stop,
                exit = process.exited() => {
                    if ready_since.is_some_and(|since: Instant| since.elapsed() > STABLE) {
                        self.failed_starts = 0;
                    }
                    return End::Exited(exit);
                }
                answer = probe.next() => match answer {
                    Ok(()) => {
                        misses = 0;
                        if !self.ready {
                            if self.is_answered_by_another(process).await {
                                return End::LostPort;
                            }
                            ready_since = Some(Instant::now());
                            self.now_ready().await;
                        }
                    }
                    Err(why) => {
                        misses += 1;
                        let gone = matches!(why, NotReady::NobodyListens(_));
                        if self.ready && (gone || misses >= MAX_MISSES) {
                            self.ready = false;
                            self.problem = Some(problems::no_longer_ready(&why));
                            self.report();
                            self.say(format!("no longer ready: {why}")).await;
                        }
                        if matches!(why, NotReady::NoPath(_)) && !overdue {
                            overdue = true;
                            self.never_ready(process, Some(&why)).await;
                        }
                        last_answer = Some(why);
                    }
                },
                () = &mut deadline, if !overdue && !self.record.was_ready => {
                    overdue = true;
                    self.never_ready(process, last_answer.as_ref()).await;
                }
            }
        }
    }

    async fn now_ready(&mut self) {
        self.ready = true;
        self.problem = None;
        self.lost_ports = 0;
        if !self.record.was_ready {
            self.record.was_ready = true;
            self.save();
        }
        self.report();
        self.say("ready".into()).await;
    }

    async fn never_ready(&mut self, process: &Process, why: Option<&NotReady>) {
        let seconds = self.record.spec.run.health.deadline_seconds;
        // Where it listens instead is what people get wrong most.
        let elsewhere = process.listening_ports().await.unwrap_or_default();
        let problem = problems::never_ready(seconds, why, self.record.port, &elsewhere);
        self.say(problem.message.clone()).await;
        self.problem = Some(problem);
        self.report();
    }

    /// Whether the port is somebody else's, who took it between its choice and now.
    async fn is_answered_by_another(&self, process: &Process) -> bool {
        let ports = process.listening_ports().await;
        ports.is_some_and(|ports| !ports.contains(&self.record.port))
    }

    fn after_lost_port(&mut self) {
        self.ended();
        self.lost_ports += 1;
        let port = self.record.port;
        tracing::info!(name = self.name, port, "another process has taken the port");
        if self.fixed_port().is_some() || self.lost_ports > MAX_PORTS {
            self.failed_starts += 1;
            self.problem = Some(problems::port_in_use(port, self.is_hopeless()));
        }
    }

    /// Says what the end of the process means, and how long to wait before it is started again.
    async fn after_exit(&mut self, exit: Exit) -> Duration {
        let was_ready = self.ready;
        let run = self.record.run;
        self.ended();
        let mut carried = self.carried.clone();
        let _ = tokio::time::timeout(OUTPUT_SETTLES, carried.wait_for(|n| *n >= run)).await;
        let project = &self.record.spec.app.project;
        let masker = self.cluster.secrets.masker_or_withhold(Some(project));
        let last = output::last_lines(&output::file(&self.dir, run), &masker).unwrap_or_default();
        let taken = !was_ready && self.port.as_ref().is_some_and(Port::is_taken);
        if taken && self.fixed_port().is_none() && self.lost_ports < MAX_PORTS {
            self.lost_ports += 1;
            self.say(format!("{exit}; its port was taken, trying another"))
                .await;
            return Duration::ZERO;
        }
        self.failed_starts += 1;
        let pause = self.pause();
        let in_use = ["address already in use", "eaddrinuse", "addrinuse"];
        let lower = last.to_lowercase();
        self.problem = Some(if !was_ready && in_use.iter().any(|w| lower.contains(w)) {
            problems::fixed_port_in_use(exit, &last, self.is_hopeless())
        } else {
            problems::crashed(exit, &last, pause, self.is_hopeless())
        });
        self.say(format!(
            "{exit}; starting again in {} s",
            pause.as_secs_f32()
        ))
        .await;
        pause
    }

    /// Whether the rollout has failed: it never was ready, in many tries or for too long.
    fn is_hopeless(&self) -> bool {
        !self.record.was_ready && (self.failed_starts >= MAX_STARTS || self.time_left().is_zero())
    }

    /// How long it may still take to become ready for the first time.
    fn time_left(&self) -> Duration {
        let limit = u64::from(self.record.spec.run.health.deadline_seconds);
        let waited = Timestamp::now().duration_since(self.record.wanted_since);
        let waited = Duration::try_from(waited).unwrap_or_default();
        Duration::from_secs(limit).saturating_sub(waited)
    }

    fn pause(&self) -> Duration {
        let doublings = self.failed_starts.saturating_sub(1).min(16);
        (BACKOFF * 2u32.pow(doublings)).min(BACKOFF_MAX)
    }

    /// Notes that no process of it runs any more.
    fn ended(&mut self) {
        self.ready = false;
        self.record.process = None;
        self.save();
        self.runs.send_replace(Runs {
            newest: self.record.run,
            ended: true,
        });
    }

    async fn stop(&mut self, mut process: Process) {
        if self.ready {
            self.ready = false;
            self.report();
            tokio::time::sleep(UNROUTE).await;
        }
        reached("process.stop.before");
        let exit = process.stop(self.cluster.grace).await;
        reached("process.stop.ended");
        self.ended();
        reached("process.stop.after");
        let mut carried = self.carried.clone();
        let run = self.record.run;
        let _ = tokio::time::timeout(OUTPUT_SETTLES, carried.wait_for(|n| *n >= run)).await;
        self.say(format!("stopped; the process {exit}")).await;
    }

    /// After the last process of an instance that is no longer wanted.
    async fn finish(mut self) {
        self.ended();
        // What comes back later under this name starts anew, but for the numbers of its runs.
        let stopped = Record {
            run: self.record.run,
            mark: self.record.mark.clone(),
            ..Record::new(self.record.spec.clone())
        };
        self.record = stopped;
        self.save();
        drop(self.runs);
        output_ends(self.output).await;
        self.board
            .forget_instance(self.record.spec.deployment, &self.name);
    }

    /// After the last look at an instance that keeps running.
    async fn leave(self) {
        output_ends(self.output).await;
    }

    fn report(&self) {
        let port = self.port.as_ref().map_or(0, Port::number);
        let address = match port {
            0 => String::new(),
            port => format!("127.0.0.1:{port}"),
        };
        let report = Report {
            generation: self.record.spec.generation.clone(),
            address,
            ready: self.ready,
            restarts: self.record.restarts,
            started_at: self.record.started_at,
            problem: self.problem.clone(),
            image_pull: self.image_pull,
        };
        self.board
            .report(self.record.spec.deployment, &self.name, report);
    }

    fn save(&self) {
        if let Err(error) = self.record.write(&self.dir) {
            tracing::error!(name = self.name, %error, "the record of an instance cannot be written");
        }
    }

    /// Tells people what happens to the instance, beside its own output.
    async fn say(&self, text: String) {
        let line = NewLine {
            time: Timestamp::now(),
            kind: LineKind::Platform,
            cluster: Some(self.cluster.name.clone()),
            instance: Some(self.name.clone()),
            text,
        };
        let source = LineSource::Deployment(self.record.spec.deployment);
        let append = self.cluster.lines.append(source, vec![line]);
        // Nothing depends on it, so it must not hold anything up.
        match tokio::time::timeout(Duration::from_secs(1), append).await {
            Ok(Ok(_)) => {}
            Ok(Err(error)) => tracing::warn!(name = self.name, %error, "a line was not kept"),
            Err(_) => tracing::warn!(name = self.name, "a line was not kept in time"),
        }
    }
}

/// Waits until output is carried, or no longer is, and ends that if it takes too long.
async fn output_ends(output: AbortOnDropHandle<()>) {
    if tokio::time::timeout(OUTPUT_ENDS, output).await.is_err() {
        tracing::warn!("the last output of an instance could not be carried in time");
    }
}

/// How an instance was left.
enum Left {
    Running,
    Stopped,
}

/// The processes that carry a mark.
pub(super) async fn scan(mark: String) -> Vec<Marked> {
    tokio::task::spawn_blocking(move || marked(|m| m == mark))
        .await
        .unwrap_or_default()
}

/// Ends what an instance's record says to run, and carries the rest of its output. For clusters
/// that are shut down: nobody looks after the instance any more.
pub(super) async fn end(cluster: &Cluster, dir: PathBuf, mut record: Record) {
    let id = match record.process.clone() {
        Some(id) => Some(id),
        None => {
            let found = scan(record.mark.clone()).await;
            found
                .into_iter()
                .find(|m| m.group == m.id.pid)
                .map(|m| m.id)
        }
    };
    if let Some(id) = id {
        let mark = record.mark.clone();
        match Process::adopt(&id, &mark) {
            Some(mut process) => {
                process.stop(cluster.grace).await;
            }
            None => process::kill_leftovers(id, mark).await,
        }
    }
    record.process = None;
    if let Err(error) = record.write(&dir) {
        tracing::error!(%error, "the record of an instance cannot be written");
    }
    let (runs, known) = watch::channel(Runs {
        newest: record.run,
        ended: true,
    });
    drop(runs);
    let output = Output {
        dir,
        lines: cluster.lines.clone(),
        secrets: cluster.secrets.clone(),
        project: record.spec.app.project.clone(),
        source: LineSource::Deployment(record.spec.deployment),
        cluster: cluster.name.clone(),
        instance: record.spec.name(),
    };
    let (done, _) = watch::channel(0);
    let carry = output.carry(known, done, CancellationToken::new());
    if tokio::time::timeout(OUTPUT_ENDS, carry).await.is_err() {
        tracing::warn!("the last output of an instance could not be carried in time");
    }
}
