//! `daybook up` on a folder of its own.

use std::process::ExitStatus;
use std::time::{Duration, Instant};

use daybook_testkit::git::SourceRepository;
use reqwest::Method;
use serde_json::{Value, json};

use super::http::{Answer, request};
use super::process::{Done, Folder, Process, Refused, daybook, processes_of};

/// How long anything may take that a test waits for.
pub const PATIENCE: Duration = Duration::from_secs(90);

/// Waits until there is an answer.
///
/// # Panics
/// If there is none in time; `what` says what was waited for.
#[track_caller]
pub fn until<T>(what: &str, mut look: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + PATIENCE;
    loop {
        if let Some(found) = look() {
            return found;
        }
        assert!(Instant::now() < deadline, "not in time: {what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// How a server is started.
#[derive(Debug, Clone, Default)]
pub struct Settings {
    /// Only these roles, with `daybook serve`; all of them, with `daybook up`, if none is named.
    pub roles: Option<&'static str>,
    /// More arguments.
    pub args: Vec<String>,
    /// More variables of its environment.
    pub env: Vec<(String, String)>,
}

impl Settings {
    /// The same with another argument.
    pub fn arg(mut self, arg: impl Into<String>) -> Self {
        self.args.push(arg.into());
        self
    }

    /// The same with another variable.
    pub fn env(mut self, name: &str, value: impl Into<String>) -> Self {
        self.env.push((name.to_owned(), value.into()));
        self
    }
}

/// A running `daybook up` on free ports. Dropping it kills it and all that it has started; its
/// log is printed if the test is failing.
#[derive(Debug)]
pub struct Server {
    // Before the folder: what runs ends before the folder goes.
    process: Option<Process>,
    settings: Settings,
    folder: Folder,
}

impl Server {
    /// Starts one in an empty folder.
    ///
    /// # Panics
    /// If it does not get ready.
    #[track_caller]
    pub fn start(settings: Settings) -> Self {
        let mut server = Self {
            process: None,
            settings,
            folder: Folder::new(),
        };
        server.restart();
        server
    }

    /// One that is stopped.
    pub fn stopped(settings: Settings) -> Self {
        Self {
            process: None,
            settings,
            folder: Folder::new(),
        }
    }

    /// Starts it on the data that it has, on other ports. It must have ended before.
    #[track_caller]
    pub fn restart(&mut self) {
        self.restart_with(&["--listen", "127.0.0.1:0", "--gateway", "127.0.0.1:0"]);
    }

    /// Starts it with these arguments in place of free ports.
    #[track_caller]
    pub fn restart_with(&mut self, addresses: &[&str]) {
        // A port that it had may be the near end of somebody's connection for a moment.
        until("`daybook up` starts", || {
            match self.try_restart_with(addresses) {
                Err(refused) if refused.stderr.contains("address_unusable") => None,
                Err(refused) => panic!("`daybook up` does not start: {refused:?}"),
                Ok(()) => Some(()),
            }
        });
    }

    /// The same, where it may refuse to start.
    pub fn try_restart_with(&mut self, addresses: &[&str]) -> Result<(), Refused> {
        assert!(self.process.is_none(), "it runs");
        let more = self.settings.args.iter().map(String::as_str);
        let verb = match self.settings.roles {
            None => vec!["up"],
            Some(roles) => vec!["serve", "--role", roles],
        };
        let args: Vec<&str> = verb
            .into_iter()
            .chain(addresses.iter().copied())
            .chain(more)
            .collect();
        self.process = Some(Process::try_start(&self.folder, &args, &self.settings.env)?);
        Ok(())
    }

    /// What is changed here holds from the next start on.
    pub fn settings(&mut self) -> &mut Settings {
        &mut self.settings
    }

    /// The process.
    #[track_caller]
    pub fn process(&self) -> &Process {
        self.process.as_ref().expect("it runs")
    }

    /// The process, to ask whether it still runs.
    #[track_caller]
    pub fn process_mut(&mut self) -> &mut Process {
        self.process.as_mut().expect("it runs")
    }

    /// Kills it with SIGKILL. The deployments' processes stay, as after a crash.
    #[track_caller]
    pub fn kill(&mut self) {
        self.process.take().expect("it runs").kill();
    }

    /// Ends it with SIGTERM, and waits until it has ended.
    #[track_caller]
    pub fn stop(&mut self) -> ExitStatus {
        self.process.take().expect("it runs").stop()
    }

    /// Its folder.
    pub fn folder(&self) -> &Folder {
        &self.folder
    }

    /// Where its HTTP interface is.
    #[track_caller]
    pub fn url(&self) -> String {
        self.process().fact("url")
    }

    /// Where its gateway is.
    #[track_caller]
    pub fn gateway(&self) -> String {
        self.process().fact("gateway")
    }

    /// Runs a client command against it.
    #[track_caller]
    pub fn cli(&self, args: &[&str]) -> Done {
        Done::of(&mut self.command(args))
    }

    /// A client command against it, not started yet.
    #[track_caller]
    pub fn command(&self, args: &[&str]) -> std::process::Command {
        let mut command = daybook();
        command.env("DAYBOOK_URL", self.url()).args(args);
        command
    }

    /// Runs a client command that must succeed.
    #[track_caller]
    pub fn ok(&self, args: &[&str]) -> Done {
        let done = self.cli(args);
        assert_eq!(done.code, 0, "daybook {args:?}: {done:?}");
        done
    }

    /// Runs a client command that must succeed, and reads its JSON.
    #[track_caller]
    pub fn json(&self, args: &[&str]) -> Value {
        let mut all = args.to_vec();
        all.extend(["--output", "json"]);
        self.ok(&all).json()
    }

    /// GET from the HTTP interface.
    #[track_caller]
    pub fn read(&self, path: &str) -> Value {
        let answer = request(Method::GET, &format!("{}{path}", self.url()), &[], None)
            .unwrap_or_else(|e| panic!("GET {path}: {e}"));
        assert_eq!(answer.status, 200, "GET {path}: {answer:?}");
        answer.json()
    }

    /// POST to the HTTP interface, with an idempotency key if there is one.
    #[track_caller]
    pub fn post(&self, path: &str, body: &Value, key: Option<&str>) -> Answer {
        let headers: Vec<_> = key.map(|k| ("Idempotency-Key", k)).into_iter().collect();
        let url = format!("{}{path}", self.url());
        request(Method::POST, &url, &headers, Some(body))
            .unwrap_or_else(|e| panic!("POST {path}: {e}"))
    }

    /// Asks for the end of something, without a key.
    #[track_caller]
    pub fn delete(&self, path: &str) -> Answer {
        let url = format!("{}{path}", self.url());
        request(Method::DELETE, &url, &[], None).unwrap_or_else(|e| panic!("DELETE {path}: {e}"))
    }

    /// Creates the project, an environment `production` on the cluster `local-a`, and a service
    /// with a source and these further flags of `service create`.
    #[track_caller]
    pub fn define(&self, project: &str, service: &str, source: &SourceRepository, flags: &[&str]) {
        self.ok(&["project", "create", project]);
        self.ok(&[
            "env",
            "create",
            project,
            "production",
            "--cluster",
            "local-a",
        ]);
        self.service(project, service, source, flags);
    }

    /// Defines a service, or defines it anew.
    #[track_caller]
    pub fn service(&self, project: &str, service: &str, source: &SourceRepository, flags: &[&str]) {
        let url = source.url();
        let mut args = vec!["service", "create", project, service, "--repo", &url];
        args.extend(flags);
        self.ok(&args);
    }

    /// Asks for a deployment and returns its id at once. The flags are those of `deploy`.
    #[track_caller]
    pub fn begin(&self, instance: &str, flags: &[&str]) -> String {
        let mut args = vec!["deploy", instance, "--detach"];
        args.extend(flags);
        let answer = self.json(&args);
        answer["id"].as_str().expect("an id").to_owned()
    }

    /// Deploys, and waits until it is live.
    #[track_caller]
    pub fn deploy(&self, instance: &str, flags: &[&str]) -> String {
        let id = self.begin(instance, flags);
        self.wait_for(&id, "started");
        id
    }

    /// What is known of a deployment.
    #[track_caller]
    pub fn deployment(&self, id: &str) -> Value {
        self.read(&format!("/api/v1/deployments/{id}"))
    }

    /// Waits until a deployment is in a state, and returns what is known of it then.
    ///
    /// # Panics
    /// If it gets into a state that it does not leave by itself, or takes too long.
    #[track_caller]
    pub fn wait_for(&self, id: &str, state: &str) -> Value {
        const FINAL: [&str; 5] = [
            "failed",
            "cancelled",
            "terminated",
            "deleted",
            "start_error",
        ];
        let deadline = Instant::now() + PATIENCE;
        loop {
            let detail = self.deployment(id);
            if detail["state"] == state {
                return detail;
            }
            let lost = FINAL.iter().any(|s| detail["state"] == *s);
            assert!(
                !lost && Instant::now() < deadline,
                "{id} is not {state}: {}",
                serde_json::to_string_pretty(&detail).unwrap()
            );
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Asks an address through the gateway, once.
    #[track_caller]
    pub fn get(&self, host: &str, path: &str) -> Answer {
        let url = format!("{}{path}", self.gateway());
        request(Method::GET, &url, &[("Host", host)], None)
            .unwrap_or_else(|e| panic!("the gateway does not answer for {host}: {e}"))
    }

    /// Asks an address through the gateway until this deployment answers: a switch is recorded
    /// first, and applied a moment later.
    #[track_caller]
    pub fn get_from(&self, host: &str, path: &str, deployment: &str) -> Answer {
        until(&format!("{host} answered by {deployment}"), || {
            let answer = self.get(host, path);
            (answer.status == 200 && answer.by() == Some(deployment)).then_some(answer)
        })
    }

    /// The addresses of a deployment with what they stick to.
    #[track_caller]
    pub fn host_of(&self, id: &str, stickiness: &str) -> String {
        let detail = self.deployment(id);
        let hosts = detail["hostnames"].as_array().unwrap();
        let found = hosts.iter().find(|h| h["stickiness"] == stickiness);
        let found = found.unwrap_or_else(|| panic!("no {stickiness} address in {detail}"));
        found["hostname"].as_str().unwrap().to_owned()
    }

    /// All events of the ledger, with their positions.
    #[track_caller]
    pub fn events(&self) -> Vec<Value> {
        let done = self.ok(&["events", "--output", "json"]);
        done.json_lines()
    }

    /// The types of the events about a deployment, in their order.
    #[track_caller]
    pub fn kinds(&self, deployment: &str) -> Vec<String> {
        let done = self.ok(&["events", "--deployment", deployment, "--output", "json"]);
        let kinds = done.json_lines().into_iter().map(|line| {
            let kind = line["event"]["type"].as_str().unwrap_or_default();
            kind.trim_start_matches("dev.daybook.").to_owned()
        });
        kinds.collect()
    }

    /// The history row of a deployment.
    #[track_caller]
    pub fn history(&self, deployment: &str) -> Value {
        let page = self.read("/api/v1/history?limit=500");
        let rows = page["history"].as_array().unwrap();
        let found = rows.iter().find(|r| r["deployment"] == deployment);
        found
            .unwrap_or_else(|| panic!("no {deployment} in {page}"))
            .clone()
    }

    /// Checks that the projections are what the ledger folds to, as `daybook replay` does.
    #[track_caller]
    pub fn check_replay(&self) {
        let done = self.ok(&["replay", "--quiet", "--output", "json"]);
        let answer = done.json();
        assert_eq!(answer["same"], json!(true), "{answer}");
        assert_eq!(answer["unreadable"], json!(0), "{answer}");
        assert!(answer["state_hash"].is_string(), "{answer}");
        self.check_past(answer["position"].as_u64().unwrap_or_default() / 2);
    }

    /// Checks that what the server says of a position in the past is what the ledger folds to.
    #[track_caller]
    fn check_past(&self, at: u64) {
        let at = at.to_string();
        let replayed = self.ok(&["replay", "--quiet", "--at", &at, "--output", "json"]);
        assert_eq!(replayed.json()["same"], json!(true));
        let state = self.ok(&["status", "--at", &at, "--output", "json"]).json();
        assert_eq!(state["position"].to_string(), at);
        assert_eq!(state["state_hash"], replayed.json()["state_hash"]);
        let history = self
            .ok(&["history", "--at", &at, "--output", "json"])
            .json();
        assert_eq!(history["position"].to_string(), at);
    }

    /// The GitOps repository of a project, on the server's disk.
    pub fn gitops(&self, project: &str) -> std::path::PathBuf {
        self.folder
            .data()
            .join("git")
            .join(format!("{project}.git"))
    }

    /// Waits until a deployment has failed or was cancelled, and checks that it says what
    /// happened, why, and what helps, wherever people look; returns the code of the cause.
    #[track_caller]
    pub fn wait_for_failure(&self, id: &str) -> String {
        let detail = self.wait_for(id, "failed");
        let text = |name: &str| {
            let text = detail["failure"][name].as_str().unwrap_or_default();
            assert!(!text.is_empty(), "no {name} in {detail}");
            text.to_owned()
        };
        let (code, message, remedy) = (text("code"), text("message"), text("remedy"));
        assert_eq!(detail["phase"], "FAILED");
        let told = self.ok(&["status", id]).stdout;
        for part in [&code, &message, &remedy] {
            assert!(told.contains(part.as_str()), "{part:?} is not in {told}");
        }
        let row = self.history(id);
        assert_eq!(row["status"], "failed");
        assert_eq!(row["outcome_code"], code.as_str());
        assert_eq!(row["outcome"], message.as_str());
        assert_eq!(row["active"], false);
        self.check_undone(id);
        code
    }

    /// Waits until a deployment was cancelled, and returns why.
    #[track_caller]
    pub fn wait_until_cancelled(&self, id: &str) -> String {
        let detail = self.wait_for(id, "cancelled");
        let message = detail["cancelled"]["message"].as_str().unwrap().to_owned();
        let row = self.history(id);
        assert_eq!(row["status"], "cancelled");
        assert_eq!(row["outcome"], message.as_str());
        assert!(self.ok(&["status", id]).stdout.contains(&message));
        self.check_undone(id);
        message
    }

    /// Waits until nothing is left of a deployment that ended before it was live: no release in
    /// the GitOps repository, no process, no address, no files of a build.
    #[track_caller]
    pub fn check_undone(&self, id: &str) {
        let detail = self.deployment(id);
        let project = detail["project"].as_str().unwrap();
        let environment = detail["environment"].as_str().unwrap();
        let file = format!("HEAD:environments/{environment}/values.yaml");
        let repository = self.gitops(project);
        until(&format!("{id} taken out of the repository"), || {
            // Nothing was committed for the project yet.
            if !repository.exists() {
                return Some(());
            }
            let shown = daybook_testkit::git::git_command(&repository)
                .args(["show", &file])
                .output()
                .ok()?;
            (!String::from_utf8_lossy(&shown.stdout).contains(id)).then_some(())
        });
        until(&format!("the processes of {id} ended"), || {
            processes_of(id).is_empty().then_some(())
        });
        until(&format!("the addresses of {id} gone"), || {
            (self.deployment(id)["hostnames"] == json!([])).then_some(())
        });
        until("the files of builds removed", || {
            let busy = self.read("/api/v1/deployments?limit=500");
            let busy = busy["deployments"].as_array()?.iter().any(|d| {
                ["cloning", "building", "pushing"]
                    .iter()
                    .any(|s| d["state"] == *s)
            });
            (busy || self.folder.work_in_progress() == 0).then_some(())
        });
    }
}
