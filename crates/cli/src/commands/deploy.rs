//! `daybook deploy`, and following a deployment.

use std::collections::VecDeque;
use std::path::PathBuf;
use std::time::Duration;

use clap::Args;
use daybook_events::{InvalidName, ProjectName, ServiceName};
use futures_util::StreamExt;
use jiff::Timestamp;
use reqwest::Method;
use serde_json::{Value, json};

use super::manage::ResourceArgs;
use super::{Outcome, ServerArgs, deploy_folder};
use crate::client::{Client, LogLine};
use crate::exit::{Code, Failure};
use crate::output;

/// Deploys a git ref, an image, a Helm chart or a folder, and follows it until it is live.
///
/// Of a service that has neither a source repository nor images of its own, the folder that this runs
/// in is uploaded and deployed, if git knows no remote of it.
#[derive(Debug, Args)]
pub struct DeployArgs {
    #[command(flatten)]
    server: ServerArgs,
    /// The service instance in one word: `project.environment.service`.
    #[arg(required_unless_present_all = ["project", "env", "service"])]
    instance: Option<String>,
    /// The project.
    #[arg(long, short, env = "DAYBOOK_PROJECT", conflicts_with = "instance")]
    project: Option<String>,
    /// The environment.
    #[arg(long, short, conflicts_with = "instance")]
    env: Option<String>,
    /// The service.
    #[arg(long, short, conflicts_with = "instance")]
    service: Option<String>,
    /// A branch, tag or commit of the service's repository; its default if not given.
    #[arg(long = "ref", value_name = "REF", conflicts_with = "image")]
    git_ref: Option<String>,
    /// An existing image: `repository:tag`, `repository@digest` or both.
    #[arg(long)]
    image: Option<String>,
    /// A Helm chart, for clusters that render charts: `https://host/path/name` or
    /// `oci://host/path/name`.
    #[arg(long, requires = "chart_version", conflicts_with_all = ["git_ref", "image"])]
    chart: Option<String>,
    /// The exact version of the chart: `1.2.3`.
    #[arg(long, value_name = "VERSION", requires = "chart")]
    chart_version: Option<String>,
    /// The folder to deploy. In a git repository this is its work tree as it is, else all that is in
    /// it; what git ignores is left out. The service's folder in it is DIR.
    #[arg(long, value_name = "DIR", conflicts_with_all = ["git_ref", "image", "chart"])]
    from: Option<PathBuf>,
    /// A cluster to deploy to, if not to all of the environment; may be given several times.
    #[arg(long = "cluster", value_name = "NAME")]
    clusters: Vec<String>,
    /// How many instances of it run in each cluster, if not as many as of the main deployment.
    #[arg(long, value_name = "NUMBER")]
    replicas: Option<u32>,
    #[command(flatten)]
    resources: ResourceArgs,
    /// Run it beside the main deployment; traffic follows with `daybook mark-main`.
    #[arg(long)]
    no_switch: bool,
    /// Let it take over traffic also if it is ready in some of its clusters only.
    #[arg(long)]
    allow_partial: bool,
    /// Why, for the ledger.
    #[arg(long)]
    reason: Option<String>,
    /// Names this request: repeating it with the same key deploys once.
    #[arg(long, value_name = "KEY")]
    idempotency_key: Option<String>,
    /// Return as soon as it is accepted.
    #[arg(long)]
    detach: bool,
}

/// Deploys to one environment what runs in another: the same image, by its digest.
#[derive(Debug, Args)]
pub struct PromoteArgs {
    #[command(flatten)]
    server: ServerArgs,
    /// What has it, in one word: `project.environment.service`; or the deployment itself: its id, or
    /// the end of it.
    #[arg(required_unless_present_all = ["project", "from", "service"])]
    instance: Option<String>,
    /// The project.
    #[arg(long, short, env = "DAYBOOK_PROJECT", conflicts_with = "instance")]
    project: Option<String>,
    /// The service.
    #[arg(long, short, conflicts_with = "instance")]
    service: Option<String>,
    /// The environment that has it.
    #[arg(long, value_name = "ENVIRONMENT", conflicts_with = "instance")]
    from: Option<String>,
    /// The environment that gets it.
    #[arg(long, value_name = "ENVIRONMENT")]
    to: String,
    /// The deployment there, if not the main one: its id, or the end of it.
    #[arg(long, value_name = "ID")]
    deployment: Option<String>,
    /// Run it beside the main deployment; traffic follows with `daybook mark-main`.
    #[arg(long)]
    no_switch: bool,
    /// Why, for the ledger.
    #[arg(long)]
    reason: Option<String>,
    /// Names this request: repeating it with the same key deploys once.
    #[arg(long, value_name = "KEY")]
    idempotency_key: Option<String>,
    /// Return as soon as it is accepted.
    #[arg(long)]
    detach: bool,
}

/// The three parts of `project.environment.service`.
fn parts(instance: &str) -> Result<[&str; 3], Failure> {
    let parts: Vec<_> = instance.split('.').collect();
    <[&str; 3]>::try_from(parts).map_err(|_| {
        Failure::new(
            Code::Usage,
            "invalid_instance_id",
            format!(
                "{:?} is not project.environment.service",
                daybook_events::without_credentials(instance)
            ),
        )
        .hint("a deployment that is known by its id is repeated with `daybook redeploy`")
    })
}

pub async fn promote(args: PromoteArgs) -> Outcome {
    let client = Client::new(&args.server)?;
    let named: Option<Value> = match &args.instance {
        Some(name) if !name.contains('.') => {
            let id = super::lifecycle::find(&client, name).await?;
            let path = format!("/api/v1/deployments/{id}");
            Some(client.get(&path, &[]).await?)
        }
        _ => None,
    };
    let (project, from, service) = match (&args.instance, &named) {
        (_, Some(named)) => (
            named["project"].as_str(),
            named["environment"].as_str(),
            named["service"].as_str(),
        ),
        (Some(instance), None) => {
            let [project, from, service] = parts(instance)?.map(Some);
            (project, from, service)
        }
        (None, None) => (
            args.project.as_deref(),
            args.from.as_deref(),
            args.service.as_deref(),
        ),
    };
    let mut body = json!({
        "project": project, "service": service, "from": from, "to": args.to,
        "reason": args.reason,
    });
    if let Some(named) = &named {
        body["deployment"] = named["id"].clone();
    }
    if let Some(deployment) = &args.deployment {
        body["deployment"] = super::lifecycle::find(&client, deployment).await?.into();
    }
    if args.no_switch {
        body["switch"] = "manual".into();
    }
    let key = args.idempotency_key.as_deref();
    let answer: Value = client
        .command(Method::POST, "/api/v1/promote", &body, key)
        .await?;
    accepted(&client, &answer, args.detach).await
}

/// Follows what was accepted, unless that is not wanted.
async fn accepted(client: &Client, answer: &Value, detach: bool) -> Outcome {
    let Some(id) = answer.get("id").and_then(Value::as_str) else {
        return Err(Failure::new(
            Code::Failure,
            "unexpected_answer",
            "the server did not say which deployment it made",
        ));
    };
    if detach {
        if output::is_json() {
            output::json(answer);
        } else {
            output::line(id);
        }
        return Ok(Code::Success);
    }
    follow(client, id, Follow::Deployment).await
}

pub async fn run(args: DeployArgs) -> Outcome {
    let client = Client::new(&args.server)?;
    let mut body = json!({});
    let mut set = |key: &str, value: Option<Value>| {
        if let Some(value) = value {
            body[key] = value;
        }
    };
    let (project, environment, service) = match &args.instance {
        Some(instance) => {
            let [project, environment, service] = parts(instance)?.map(Some);
            (project, environment, service)
        }
        None => (
            args.project.as_deref(),
            args.env.as_deref(),
            args.service.as_deref(),
        ),
    };
    set("project", project.map(Value::from));
    set("environment", environment.map(Value::from));
    set("service", service.map(Value::from));
    if let (Some(project), Some(service)) = (project, service)
        && [&args.git_ref, &args.image, &args.chart]
            .iter()
            .all(|named| named.is_none())
    {
        // Names become parts of addresses.
        let invalid = |e: InvalidName| Failure::new(Code::Usage, e.code, e.to_string());
        let project = ProjectName::parse(project).map_err(invalid)?;
        let service = ServiceName::parse(service).map_err(invalid)?;
        let (project, service) = (project.as_str(), service.as_str());
        let from = args.from.as_deref();
        if let Some(folder) = deploy_folder::find(&client, from, project, service).await? {
            let uploaded = deploy_folder::upload(&client, &folder, project, service).await?;
            set("upload", Some(uploaded.commit.into()));
            // Whatever folder the service has in its own repository.
            set("upload_path", Some(uploaded.within.into()));
        }
    }
    set("git_ref", args.git_ref.clone().map(Value::from));
    set("image", args.image.clone().map(Value::from));
    set("chart", args.chart.clone().map(Value::from));
    set("chart_version", args.chart_version.clone().map(Value::from));
    set("reason", args.reason.clone().map(Value::from));
    if !args.clusters.is_empty() {
        set("clusters", Some(args.clusters.clone().into()));
    }
    let mut run = json!({});
    if let Some(replicas) = args.replicas {
        run["replicas"] = replicas.into();
    }
    for ([kind, what], amount) in args.resources.given() {
        run["resources"][kind][what] = amount.into();
    }
    if run != json!({}) {
        set("run", Some(run));
    }
    if args.no_switch {
        set("switch", Some("manual".into()));
    }
    if args.allow_partial {
        set("allow_partial", Some(true.into()));
    }
    let answer: Value = client
        .command(
            Method::POST,
            "/api/v1/deployments",
            &body,
            args.idempotency_key.as_deref(),
        )
        .await?;
    accepted(&client, &answer, args.detach).await
}

/// What is being followed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Follow {
    /// A deployment until it is live.
    Deployment,
    /// An operation on one until it is done; it was asked for after this position.
    Operation(u64),
    /// A new try in some of its clusters until each of them is ready or has failed; it was asked
    /// for after this position.
    Retry(u64),
}

impl Follow {
    /// Events up to this position are about something that was before.
    fn after(self) -> u64 {
        match self {
            Self::Deployment => 0,
            Self::Operation(position) | Self::Retry(position) => position,
        }
    }
}

/// Follows a deployment's events and output, live, until it is settled. The exit code says how it
/// ended.
pub async fn follow(client: &Client, id: &str, what: Follow) -> Outcome {
    let style = output::style();
    let mut progress = Progress::new();
    let logs = client.clone();
    let log_id = id.to_owned();
    let (sender, mut lines) = tokio::sync::mpsc::channel(256);
    let reader = tokio::spawn(async move {
        if what != Follow::Deployment {
            return;
        }
        let path = format!("/api/v1/deployments/{log_id}/logs");
        let query = [("follow", Some("true".to_owned()))];
        let stream = match logs.stream(&path, &query, None).await {
            Ok(stream) => stream,
            Err(failure) => {
                let warning = output::style().warn("warning:");
                eprintln!("{warning} its output is not shown: {}", failure.message);
                return;
            }
        };
        let mut stream = std::pin::pin!(stream);
        while let Some(Ok(event)) = stream.next().await {
            let Ok(line) = serde_json::from_str::<LogLine>(&event.data) else {
                continue;
            };
            if sender.send(line).await.is_err() {
                return;
            }
        }
    });
    let path = format!("/api/v1/deployments/{id}");
    let query = [
        ("deployment", Some(id.to_owned())),
        ("follow", Some("true".to_owned())),
        ("after", Some(what.after().to_string())),
    ];
    let mut last_id: Option<String> = None;
    // What is done already has no event to come.
    let mut done = what != Follow::Deployment && is_settled(&client.get(&path, &[]).await?, what);
    'connect: while !done {
        let stream = client
            .stream("/api/v1/events", &query, last_id.as_deref())
            .await?;
        let mut stream = std::pin::pin!(stream);
        loop {
            let event = tokio::select! {
                biased;
                Some(line) = lines.recv() => {
                    progress.line(line);
                    continue;
                }
                event = stream.next() => event,
            };
            let Some(Ok(event)) = event else {
                // The server was restarted, or the connection broke: go on after the last event.
                tokio::time::sleep(Duration::from_millis(300)).await;
                continue 'connect;
            };
            last_id = Some(event.id.clone());
            // The stream is the ledger's; the state below is asked of a fold that may be behind.
            client.saw(event.id.parse().unwrap_or_default());
            let Ok(data) = serde_json::from_str::<Value>(&event.data) else {
                continue;
            };
            let kind = event.event.trim_start_matches("dev.daybook.").to_owned();
            progress.event(&kind, &data);
            if matches!(what, Follow::Retry(_)) || ends(&kind) {
                let detail: Value = client.get(&path, &[]).await?;
                done = is_settled(&detail, what);
                if done {
                    break;
                }
            }
        }
    }
    if what != Follow::Deployment {
        // The state was ahead of the stream.
        let last = last_id.and_then(|id| id.parse().ok());
        let query = [
            ("deployment", Some(id.to_owned())),
            ("after", Some(last.unwrap_or(what.after()).to_string())),
        ];
        let page: Value = client.get("/api/v1/events", &query).await?;
        for entry in page["events"].as_array().into_iter().flatten() {
            let event = &entry["event"];
            let kind = event["type"].as_str().unwrap_or_default();
            progress.event(kind.trim_start_matches("dev.daybook."), event);
        }
    }
    // The server ends the output once it is complete.
    let _ = tokio::time::timeout(Duration::from_secs(2), async {
        while let Some(line) = lines.recv().await {
            progress.line(line);
        }
    })
    .await;
    reader.abort();
    let detail: Value = client.get(&path, &[]).await?;
    let state = detail
        .get("state")
        .and_then(Value::as_str)
        .unwrap_or_default();
    let code = match state {
        "failed" | "start_error" | "stop_error" | "terminate_error" => Code::DeploymentFailed,
        "cancelled" => Code::DeploymentCancelled,
        "partially_started" => Code::DeploymentPartial,
        _ => Code::Success,
    };
    progress.end(code);
    if output::is_json() {
        output::json(&detail);
    } else {
        output::line("");
        super::status::print_detail(&detail);
    }
    if !output::is_json() && code == Code::Success && what == Follow::Deployment {
        output::line(&style.good("it is live"));
    }
    Ok(code)
}

fn ends(kind: &str) -> bool {
    matches!(
        kind,
        "deployment.succeeded.v1"
            | "deployment.partially_succeeded.v1"
            | "deployment.failed.v1"
            | "deployment.cancelled.v1"
            | "deployment.started.v1"
            | "deployment.stopped.v1"
            | "deployment.terminated.v1"
            | "deployment.start_failed.v1"
            | "deployment.stop_failed.v1"
            | "deployment.terminate_failed.v1"
            | "deployment.deleted.v1"
    )
}

fn is_settled(detail: &Value, what: Follow) -> bool {
    let state = detail.get("state").and_then(Value::as_str);
    let state = state.unwrap_or_default();
    if matches!(what, Follow::Retry(_)) && state == "partially_started" {
        let clusters = detail.get("cluster_status").and_then(Value::as_array);
        let states = clusters.into_iter().flatten();
        let states: Vec<_> = states.filter_map(|c| c["state"].as_str()).collect();
        let under_way = ["pending", "syncing", "starting"];
        // Ready everywhere, it is about to be whole.
        return states.contains(&"failed") && !states.iter().any(|s| under_way.contains(s));
    }
    matches!(
        state,
        "started"
            | "partially_started"
            | "stopped"
            | "terminated"
            | "deleted"
            | "failed"
            | "cancelled"
            | "start_error"
            | "stop_error"
            | "terminate_error"
    )
}

/// Output that is shown after all, should it end badly: its last lines.
const LAST_LINES: usize = 20;

/// What is shown while something is followed: on a terminal one line, with the newest step and the
/// newest output, and a line of its own for what somebody has to read; elsewhere, and with
/// `--verbose`, a line for each.
struct Progress {
    live: bool,
    begun: Timestamp,
    /// The newest step; empty once it has a line of its own.
    step: String,
    last: VecDeque<LogLine>,
}

impl Progress {
    fn new() -> Self {
        Self {
            live: output::is_live(),
            begun: Timestamp::now(),
            step: String::new(),
            last: VecDeque::new(),
        }
    }

    fn event(&mut self, kind: &str, data: &Value) {
        if self.live {
            let step = step(kind, data, self.begun);
            if is_for_people(kind) {
                output::end_live();
                output::line(&step);
                self.step.clear();
            } else {
                self.step = step;
            }
            self.draw();
        } else if output::is_json() {
            output::json(data);
        } else {
            output::line(&step(kind, data, self.begun));
        }
    }

    fn line(&mut self, line: LogLine) {
        if !self.live {
            print_line(&line);
            return;
        }
        if self.last.len() == LAST_LINES {
            self.last.pop_front();
        }
        self.last.push_back(line);
        self.draw();
    }

    fn draw(&self) {
        let said = self.last.back().map(|line| line.line.line.text.trim());
        let said = said.filter(|text| !text.is_empty());
        let said = said.map(|text| output::style().dim(&format!("| {}", output::plain(text))));
        output::live(&format!("{} {}", self.step, said.unwrap_or_default()));
    }

    /// Takes the one line away. If it ended badly, the last of its output is shown, and how far it
    /// had come.
    fn end(&mut self, code: Code) {
        if !std::mem::take(&mut self.live) {
            return;
        }
        output::end_live();
        if code != Code::Success {
            self.last.iter().for_each(print_line);
            if !self.step.is_empty() {
                output::line(&self.step);
            }
        }
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        // Whatever went wrong is said in a line of its own.
        if self.live {
            output::end_live();
        }
    }
}

/// Whether an event says what somebody has to do, or what has gone wrong while the rest goes on: it is
/// read to its end, and stays.
fn is_for_people(kind: &str) -> bool {
    matches!(
        kind,
        "deployment.approval_requested.v1"
            | "deployment.held.v1"
            | "deployment.cluster_failed.v1"
            | "deployment.partially_succeeded.v1"
    )
}

/// An event as a step of the run.
fn step(kind: &str, data: &Value, begun: Timestamp) -> String {
    let style = output::style();
    let at = data
        .get("time")
        .and_then(Value::as_str)
        .and_then(|t| t.parse::<Timestamp>().ok())
        .unwrap_or(begun);
    let seconds = at.duration_since(begun).as_secs_f64().max(0.0);
    let payload = data.get("data").cloned().unwrap_or_default();
    let word = kind
        .trim_start_matches("deployment.")
        .trim_end_matches(".v1")
        .replace('_', " ");
    let text = |pointer: &str| {
        payload
            .pointer(pointer)
            .and_then(Value::as_str)
            .unwrap_or_default()
            .to_owned()
    };
    let detail = match kind {
        "deployment.source_resolved.v1" => text("/source/commit"),
        "deployment.image_pinned.v1" => text("/image/digest"),
        "deployment.chart_pinned.v1" => text("/chart/digest"),
        "deployment.deploying_started.v1" => format!("gitops commit {}", text("/commit")),
        "deployment.failed.v1" => format!("{} ({})", text("/message"), text("/code")),
        "deployment.cancelled.v1" => text("/message"),
        "deployment.cluster_failed.v1" => format!("{} ({})", text("/message"), text("/code")),
        "deployment.cluster_retried.v1" => text("/cluster"),
        "deployment.partially_succeeded.v1" => {
            let names = |of: &str, name: &str| {
                let list = payload.get(of).and_then(Value::as_array);
                let list = list.into_iter().flatten();
                let names: Vec<_> = list.filter_map(|v| v.pointer(name)?.as_str()).collect();
                names.join(", ")
            };
            let (ready, failed) = (names("ready", ""), names("failed", "/cluster"));
            format!("ready in {ready}; failed in {failed}")
        }
        "deployment.approval_requested.v1" => format!(
            "{}; look at it with `daybook approvals show`",
            text("/hash")
        ),
        "deployment.held.v1" => format!(
            "its environment is frozen by {} until {}; `daybook freeze override` lets it through",
            text("/freeze"),
            match text("/until") {
                until if until.is_empty() => "that is taken away".to_owned(),
                until => until,
            }
        ),
        "deployment.released.v1" => format!("{} has {}", text("/freeze"), text("/cause")),
        "deployment.emergency_freeze_override.v1" => {
            format!(
                "of {} by {}: {}",
                text("/freeze"),
                text("/by"),
                text("/reason")
            )
        }
        "deployment.approval_granted.v1" => format!("by {}", text("/approver")),
        "deployment.workload_observed.v1" => {
            let instances = payload.get("instances").and_then(Value::as_array);
            let ready = instances
                .into_iter()
                .flatten()
                .filter(|i| i.get("ready").and_then(Value::as_bool) == Some(true))
                .count();
            let wanted = payload
                .get("wanted")
                .and_then(Value::as_u64)
                .unwrap_or_default();
            let problem = payload.pointer("/problem/reason").and_then(Value::as_str);
            format!(
                "{}: {ready} of {wanted} ready{}",
                text("/cluster"),
                problem.map(|p| format!(", {p}")).unwrap_or_default()
            )
        }
        "deployment.image_pulled.v1" => {
            let took = payload.get("took_ms").and_then(Value::as_u64);
            format!("{} in {} ms", text("/cluster"), took.unwrap_or_default())
        }
        "deployment.endpoint_observed.v1" => {
            let ready = payload.get("ready").and_then(Value::as_bool) == Some(true);
            format!(
                "{} {}",
                text("/url"),
                if ready { "answers" } else { "does not answer" }
            )
        }
        "deployment.endpoint_planes_changed.v1" => {
            let changes = payload.get("changes").and_then(Value::as_array);
            let changes = changes.into_iter().flatten().map(|change| {
                let of = |name: &str| change["now"][name].as_str().unwrap_or_default();
                format!("{} {}", of("plane"), of("state"))
            });
            let changes: Vec<_> = changes.collect();
            format!("{}: {}", text("/hostname"), changes.join(", "))
        }
        _ => String::new(),
    };
    // Much of it was said by others; colours of its own come after.
    let (word, detail) = (output::plain(&word), output::plain(&detail));
    let word = match kind {
        "deployment.succeeded.v1" => style.good(&word),
        "deployment.failed.v1" | "deployment.cluster_failed.v1" => style.error(&word),
        "deployment.partially_succeeded.v1" => style.warn(&word),
        "deployment.cancelled.v1" => style.warn(&word),
        _ => style.busy(&word),
    };
    let at = style.dim(&format!("{seconds:>7.2}s"));
    format!("{at} {word} {detail}").trim_end().to_owned()
}

/// Prints a line of output.
pub fn print_line(line: &LogLine) {
    use daybook_events::lines::LineKind;
    if output::is_json() {
        output::json(&line.line);
        return;
    }
    let style = output::style();
    let l = &line.line.line;
    let source = match l.kind {
        LineKind::Build => "build".to_owned(),
        LineKind::Status => l
            .cluster
            .as_ref()
            .map_or_else(|| "status".to_owned(), ToString::to_string),
        LineKind::Container | LineKind::Platform => {
            l.instance.clone().unwrap_or_else(|| "container".to_owned())
        }
    };
    output::line(&format!(
        "{} {}",
        style.dim(&format!("{source:>8} |")),
        l.text
    ));
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::{Timestamp, step};

    #[test]
    fn a_step_is_one_line_and_what_others_said_does_nothing_to_the_terminal() {
        let message = "no such file\r\n\x1b[2J\x1b]0;title\x07: main.rs";
        let data = json!({ "data": { "message": message, "code": "build_failed" } });
        assert_eq!(
            step("deployment.failed.v1", &data, Timestamp::UNIX_EPOCH),
            "   0.00s failed no such file [2J]0;title: main.rs (build_failed)"
        );
        let data = json!({ "data": { "approver": "eve\x1b[1A" } });
        assert_eq!(
            step(
                "deployment.approval_granted.v1",
                &data,
                Timestamp::UNIX_EPOCH
            ),
            "   0.00s approval granted by eve[1A"
        );
    }
}
