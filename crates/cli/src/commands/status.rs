//! `daybook status`

use std::collections::BTreeMap;

use clap::Args;
use daybook_events::deployment::ClusterState;
use daybook_projections::Moment;
use daybook_projections::views::{ApprovalView, DeploymentView, HoldView, InstanceView, Overview};
use serde_json::Value;

use super::watch::{Watched, watch};
use super::{Outcome, ServerArgs};
use crate::client::Client;
use crate::exit::{Code, Failure};
use crate::output::{self, Row, Table};

/// What runs where, with the three readiness answers.
#[derive(Debug, Args)]
pub struct StatusArgs {
    #[command(flatten)]
    server: ServerArgs,
    /// Only this project.
    #[arg(long, short, env = "DAYBOOK_PROJECT")]
    project: Option<String>,
    /// Only this environment.
    #[arg(long, short)]
    env: Option<String>,
    /// Only this service.
    #[arg(long, short)]
    service: Option<String>,
    /// As it was then: a position of the ledger, or a time such as 2024-01-15T10:30:00Z.
    #[arg(long, value_name = "POSITION|TIME")]
    at: Option<Moment>,
    /// Show it again whenever it changes, until interrupted: in the same place on a terminal, else a
    /// line for each deployment that changed.
    #[arg(long, conflicts_with = "at")]
    watch: bool,
    /// Everything about one deployment, by its id or the end of it; or one service instance, as
    /// `project.environment.service`.
    deployment: Option<String>,
}

pub async fn run(args: StatusArgs) -> Outcome {
    let client = Client::new(&args.server)?;
    if let Some(instance) = args.deployment.as_ref().filter(|d| d.contains('.')) {
        let mut parts = instance.splitn(3, '.').map(|p| Some(p.to_owned()));
        let mut part = || parts.next().flatten();
        let query = [
            ("project", part()),
            ("environment", part()),
            ("service", part()),
            ("at", args.at.map(|at| at.to_string())),
        ];
        if args.watch {
            return watch(&client, &Watched::Overview(query.into())).await;
        }
        overview(&client, &query).await?;
        return Ok(Code::Success);
    }
    if let Some(id) = &args.deployment {
        if args.at.is_some() {
            return Err(Failure::new(
                Code::Usage,
                "at_needs_an_overview",
                "--at shows what ran where, and no single deployment",
            )
            .hint("leave the id out, or name an instance as project.environment.service"));
        }
        let id = super::lifecycle::find(&client, id).await?;
        if args.watch {
            return watch(&client, &Watched::Deployment(id)).await;
        }
        let detail: Value = client
            .get(&format!("/api/v1/deployments/{id}"), &[])
            .await?;
        if output::is_json() {
            output::json(&detail);
        } else {
            print_detail(&detail);
        }
        return Ok(Code::Success);
    }
    let query = [
        ("project", args.project),
        ("environment", args.env),
        ("service", args.service),
        ("at", args.at.map(|at| at.to_string())),
    ];
    if args.watch {
        return watch(&client, &Watched::Overview(query.into())).await;
    }
    overview(&client, &query).await?;
    Ok(Code::Success)
}

/// Asks for what runs where, and prints it.
pub async fn overview(client: &Client, query: &[(&str, Option<String>)]) -> Result<(), Failure> {
    let state: Value = client.get("/api/v1/state", query).await?;
    show(client, query, state).await
}

/// Prints what runs where.
pub async fn show(
    client: &Client,
    query: &[(&str, Option<String>)],
    state: Value,
) -> Result<(), Failure> {
    if output::is_json() {
        output::json(&state);
        return Ok(());
    }
    let set_aside = state.get("set_aside").and_then(Value::as_u64).unwrap_or(0);
    let overview: Overview = serde_json::from_value(state)
        .map_err(|e| Failure::new(Code::Failure, "unexpected_answer", e.to_string()))?;
    print_overview(&overview);
    if set_aside > 0 {
        output::line(&output::style().warn(&format!(
            "{set_aside} events of the ledger cannot be read and are set aside; \
             GET {}/api/v1/audit?void=true lists them",
            client.shown()
        )));
    }
    print_gitops(client, query, &overview).await;
    Ok(())
}

/// Says which GitOps repositories need somebody's decision: of the projects that are shown.
async fn print_gitops(client: &Client, query: &[(&str, Option<String>)], overview: &Overview) {
    let asked = query
        .iter()
        .find(|(name, _)| *name == "project")
        .and_then(|(_, project)| project.clone());
    let mut projects: Vec<String> = overview
        .instances
        .iter()
        .filter_map(|i| i.id.split('.').next().map(str::to_owned))
        .chain(asked)
        .collect();
    projects.sort();
    projects.dedup();
    for project in projects {
        let path = format!("/api/v1/projects/{project}/gitops");
        // A project without a repository has nothing to decide about.
        let Ok(found) = client.get::<Value>(&path, &[]).await else {
            continue;
        };
        for line in super::gitops::attention(&project, &found) {
            output::line(&output::style().warn(&line));
        }
    }
}

fn print_overview(overview: &Overview) {
    let style = output::style();
    if overview.instances.is_empty() {
        output::line("nothing runs, and nothing is on its way");
        output::line(
            &style
                .dim("`daybook history` lists what was deployed; `daybook demo` shows how it goes"),
        );
        return;
    }
    let mut table = Table::new([
        "SERVICE",
        "DEPLOYMENT",
        "VERSION",
        "STATUS",
        "BUILD",
        "WORKLOAD",
        "ENDPOINT",
        "CLUSTERS",
        "ADDRESS",
    ]);
    for instance in &overview.instances {
        let all = instance
            .main
            .iter()
            .map(|d| (d, true))
            .chain(instance.others.iter().map(|d| (d, false)));
        for (deployment, main) in all {
            table.row(row(instance, deployment, main));
        }
    }
    table.print();
    for instance in overview.instances.iter().filter(|i| i.rolled_back) {
        output::line(&style.warn(&format!(
            "{} is rolled back: new deployments do not take over traffic until `daybook mark-main`",
            instance.id
        )));
    }
    for d in overview
        .instances
        .iter()
        .flat_map(|i| i.main.iter().chain(&i.others))
    {
        if let Some(approval) = &d.approval {
            output::line(&style.warn(&approval_line(d, approval)));
        }
        if let Some(hold) = &d.hold {
            output::line(&style.warn(&hold_line(d, hold)));
        }
        if let Some(stop) = &d.stops {
            output::line(&format!(
                "{} stops at {:.0}, because {}; `daybook keep {0}` keeps it",
                d.id.short(),
                stop.at,
                stop.because,
            ));
        }
        if let Some(p) = &d.problem {
            output::line(&format!(
                "{} {}: {} ({})",
                style.error("!"),
                d.id.short(),
                p.message,
                p.code
            ));
            output::line(&format!("  {} {}", style.dim("remedy:"), p.remedy));
        }
    }
}

/// The deployments in a line each, by instance and id.
pub fn lines(overview: &Overview) -> BTreeMap<String, String> {
    let mut lines = BTreeMap::new();
    for instance in &overview.instances {
        let main = instance.main.iter().map(|d| (d, " *"));
        let others = instance.others.iter().map(|d| (d, ""));
        for (d, mark) in main.chain(others) {
            let line = format!(
                "{}{mark} {}: {}; build {}, workload {}, endpoint {}",
                instance.id,
                d.id.short(),
                output::status_word(&d.lifecycle),
                output::readiness(&d.build),
                output::readiness(&d.workload),
                output::readiness(&d.endpoint),
            );
            lines.insert(format!("{} {}", instance.id, d.id), line);
        }
    }
    lines
}

/// A deployment in one line, from what the server knows of it.
pub fn detail_line(detail: &Value) -> String {
    let text = |pointer: &str| {
        let text = detail.pointer(pointer).and_then(Value::as_str);
        text.unwrap_or_default().to_owned()
    };
    let readiness = ["build", "workload", "endpoint"].map(|what| {
        let state = text(&format!("/readiness/{what}/state"));
        let word = output::readiness_word(&state);
        match state.as_str() {
            "ready" => format!("{what} {word}"),
            _ => format!(
                "{what} {word} ({})",
                text(&format!("/readiness/{what}/reason"))
            ),
        }
    });
    let id = text("/id");
    format!(
        "{} {}: {}; {}",
        text("/instance_id"),
        id.get(28..).unwrap_or(&id),
        output::status_word(&text("/status")),
        readiness.join(", ")
    )
}

fn approval_line(d: &DeploymentView, approval: &ApprovalView) -> String {
    let id = d.id.short();
    match &approval.to_review {
        Some(by) => format!(
            "{by} went ahead with {id} in an emergency; once looked at: `daybook approvals review {id}`"
        ),
        None => format!(
            "{id} waits for approvals, {} of {} are there: `daybook approvals show {id}`",
            approval.granted.len(),
            approval.required
        ),
    }
}

fn hold_line(d: &DeploymentView, hold: &HoldView) -> String {
    let (id, freeze) = (d.id.short(), &hold.freeze);
    if let Some(by) = &hold.to_review {
        return format!(
            "{by} let {id} through the freeze {freeze}; once looked at: `daybook approvals review {id}`"
        );
    }
    let end = match hold.until {
        Some(until) => format!("until {until:.0}"),
        None => "until that is taken away".to_owned(),
    };
    format!(
        "{id} waits: its environment is frozen by {freeze} {end}; `daybook freeze override {id}` lets it through"
    )
}

fn row(instance: &InstanceView, d: &DeploymentView, main: bool) -> Row {
    let clusters: Vec<_> = d
        .clusters
        .iter()
        .map(|c| {
            let seen = match c.wanted {
                Some(wanted) => format!("{} {}/{wanted}", c.name, c.ready),
                None => c.name.to_string(),
            };
            match c.state {
                ClusterState::Started => seen,
                state => format!("{seen} {}", state.as_str()),
            }
        })
        .collect();
    let name = if main {
        format!("{} *", instance.id)
    } else {
        instance.id.clone()
    };
    let version = match &d.image_tag {
        Some(tag) if !d.version.contains(tag.as_str()) => format!("{} ({tag})", d.version),
        _ => output::version(&d.version),
    };
    Row::new([
        name,
        d.id.short(),
        version,
        output::status_word(&d.lifecycle),
        output::readiness(&d.build),
        output::readiness(&d.workload),
        output::readiness(&d.endpoint),
        clusters.join(", "),
        // The shortest name is the one that people use.
        d.hostnames
            .iter()
            .min_by_key(|h| h.as_str().len())
            .map(ToString::to_string)
            .unwrap_or_default(),
    ])
}

/// How long the steps took: `2.4 s in all, queue 12 ms, build 1.1 s`.
fn took(detail: &Value) -> Option<String> {
    let of = |step: &str| {
        let ms = detail.pointer(&format!("/durations/{step}_ms"))?.as_u64()?;
        Some(match ms {
            ..1000 => format!("{ms} ms"),
            ms => format!("{}.{} s", ms / 1000, ms % 1000 / 100),
        })
    };
    let steps = [
        ("queue", "queue"),
        ("clone", "clone"),
        ("build", "build"),
        ("push", "push"),
        ("sync", "sync"),
        ("image_pull", "image pull"),
        ("startup", "startup"),
        ("endpoint", "endpoint"),
    ];
    let steps = steps.map(|(step, name)| of(step).map(|took| format!("{name} {took}")));
    let steps: Vec<_> = steps.into_iter().flatten().collect();
    let total = of("total").map(|took| format!("{took} in all"));
    let all: Vec<_> = total.into_iter().chain(steps).collect();
    (!all.is_empty()).then(|| all.join(", "))
}

/// A deployment in one cluster: `local-b failed (CrashLoopBackOff): it ended`.
fn cluster_line(cluster: &Value) -> String {
    let text = |pointer: &str| {
        let text = cluster.pointer(pointer).and_then(Value::as_str);
        text.unwrap_or_default().to_owned()
    };
    let mut line = format!(
        "{} {}",
        text("/cluster"),
        output::status_word(&text("/state"))
    );
    if let Some(wanted) = cluster["wanted"].as_u64() {
        let instances = cluster["instances"].as_array().into_iter().flatten();
        let ready = instances.filter(|i| i["ready"] == true).count();
        line.push_str(&format!(" {ready}/{wanted}"));
    }
    let code = text("/problem/code");
    if !code.is_empty() {
        line.push_str(&format!(" ({code}): {}", text("/problem/message")));
    }
    if let Some(tries) = cluster["tries"].as_u64().filter(|tries| *tries > 1) {
        line.push_str(&format!(", try {tries}"));
    }
    line
}

/// What a problem usually comes of, and what helps.
fn advice(problem: &Value) -> impl Iterator<Item = (&'static str, String)> {
    let all = |key: &str| {
        let all = problem[key].as_array().into_iter().flatten();
        let all = all.filter_map(Value::as_str).map(str::to_owned);
        all.collect::<Vec<_>>()
    };
    let mut remedies = all("remedies");
    // There may be no more than this one, and it is never left out for others.
    let remedy = problem["remedy"].as_str().filter(|r| !r.is_empty());
    let remedy = remedy.filter(|remedy| !remedies.iter().any(|other| other == remedy));
    if let Some(remedy) = remedy {
        remedies.insert(0, remedy.to_owned());
    }
    let likely = all("likely_causes").into_iter();
    let likely = likely.map(|cause| ("likely", cause));
    likely.chain(remedies.into_iter().map(|remedy| ("remedy", remedy)))
}

/// What an address is like from where users are: all planes in a line, and what is the matter with
/// any of them in one of its own.
fn seen_by_users(endpoint: &Value) -> impl Iterator<Item = String> {
    let style = output::style();
    let planes = endpoint["planes"].as_array();
    let planes = planes.map(Vec::as_slice).unwrap_or_default();
    let of = |plane: &Value, name: &str| {
        let text = plane.get(name).and_then(Value::as_str);
        text.unwrap_or_default().to_owned()
    };
    let word = |plane: &Value| {
        let state = of(plane, "state");
        match state.as_str() {
            "ok" => style.good(&state),
            "failing" | "drifted" => style.error(&state),
            _ => state,
        }
    };
    let mut all = Vec::new();
    let mut more = Vec::new();
    for plane in planes {
        let name = of(plane, "plane");
        let mut shown = format!("{name} {}", word(plane));
        match (of(plane, "state").as_str(), of(plane, "expires")) {
            ("ok", expires) if !expires.is_empty() => {
                shown.push_str(&format!(" until {}", expires.get(..10).unwrap_or(&expires)));
            }
            ("unknown", _) => shown.push_str(&format!(" ({})", of(plane, "reason"))),
            _ => {}
        }
        all.push(shown);
        let (message, reason) = (of(plane, "message"), of(plane, "reason"));
        let bad = matches!(of(plane, "state").as_str(), "failing" | "drifted");
        if bad {
            let mut line = format!(
                "{name} {} ({reason}) since {}",
                word(plane),
                of(plane, "since")
            );
            for what in ["expected", "actual"] {
                let is = of(plane, what);
                if !is.is_empty() {
                    line.push_str(&format!(", {what} {is}"));
                }
            }
            if !message.is_empty() {
                line.push_str(&format!(": {message}"));
            }
            more.push(line);
        } else if !message.is_empty() && of(plane, "state") == "ok" {
            more.push(format!("{name}: {message}"));
        }
    }
    let first = format!("{}: {}", of(endpoint, "hostname"), all.join(", "));
    std::iter::once(first).chain(more)
}

/// What each instance asks for, whatever its clusters make of it: `cpu 250m to 1, memory 256Mi`.
fn resources(asked: &Value) -> Option<String> {
    let of = |what: &str| {
        let amount = |kind: &str| asked[kind][what].as_str();
        match (amount("requests"), amount("limits")) {
            (Some(least), Some(most)) if least != most => Some(format!("{what} {least} to {most}")),
            (Some(amount), _) => Some(format!("{what} {amount}")),
            (None, Some(most)) => Some(format!("{what} up to {most}")),
            (None, None) => None,
        }
    };
    let all: Vec<_> = ["cpu", "memory"].into_iter().filter_map(of).collect();
    (!all.is_empty()).then(|| all.join(", "))
}

/// Prints what the server knows of one deployment.
pub fn print_detail(detail: &Value) {
    let style = output::style();
    let text = |pointer: &str| match detail.pointer(pointer) {
        Some(Value::String(s)) => s.clone(),
        Some(Value::Null) | None => String::new(),
        Some(other) => other.to_string(),
    };
    output::line(&format!(
        "{} {}",
        style.bold(&text("/instance_id")),
        text("/id")
    ));
    let mut fields = vec![
        (
            "status",
            format!(
                "{} ({})",
                output::status_word(&text("/status")),
                text("/phase")
            ),
        ),
        ("main", text("/main")),
        ("version", text("/version")),
        ("requested", text("/created_at")),
    ];
    if !text("/source/commit").is_empty() {
        let message = text("/source/message");
        let first = message.lines().next().unwrap_or_default().to_owned();
        fields.push(("source", format!("{} {first}", text("/source/commit"))));
        fields.push(("author", text("/source/author")));
    }
    if !text("/chart/digest").is_empty() {
        let chart = ["chart", "version", "digest"].map(|part| text(&format!("/chart/{part}")));
        let [chart, version, digest] = chart;
        fields.push(("chart", format!("{chart}:{version}@{digest}")));
    }
    if !text("/image/digest").is_empty() {
        fields.push((
            "image",
            format!(
                "{}:{}@{}",
                text("/image/repository"),
                text("/image/tag"),
                text("/image/digest")
            ),
        ));
    }
    if !text("/revision").is_empty() {
        fields.push(("gitops", text("/revision")));
    }
    for (label, pointer) in [
        ("build", "build"),
        ("workload", "workload"),
        ("endpoint", "endpoint"),
    ] {
        let state = text(&format!("/readiness/{pointer}/state"));
        let reason = text(&format!("/readiness/{pointer}/reason"));
        let message = text(&format!("/readiness/{pointer}/message"));
        let message = if message.is_empty() {
            message
        } else {
            format!(": {message}")
        };
        fields.push((
            label,
            format!("{} ({reason}){message}", output::readiness_word(&state)),
        ));
    }
    if !text("/queue/reason").is_empty() {
        let place = match detail.pointer("/queue/position").and_then(Value::as_u64) {
            Some(place) => format!("{place} of {}: ", text("/queue/waiting")),
            None => String::new(),
        };
        fields.push(("queue", format!("{place}{}", text("/queue/reason"))));
    }
    let overtaken = detail.get("overtaken_by").and_then(Value::as_array);
    let overtaken: Vec<_> = overtaken
        .into_iter()
        .flatten()
        .filter_map(Value::as_str)
        .collect();
    if !overtaken.is_empty() {
        fields.push(("overtaken", format!("by {}", overtaken.join(", "))));
    }
    let run = &detail["snapshot"]["run"];
    if let Some(asked) = resources(&run["resources"]) {
        fields.push(("asks for", asked));
    }
    if let Some(most) = run["autoscaling"]["max"].as_u64() {
        let (least, cpu) = (text("/replicas"), &run["autoscaling"]["cpu_percent"]);
        let asked = format!("{least} to {most} instances, at {cpu} % of cpu");
        fields.push(("asks for", asked));
    }
    let clusters = detail.get("cluster_status").and_then(Value::as_array);
    for cluster in clusters.into_iter().flatten() {
        fields.push(("cluster", cluster_line(cluster)));
        fields.extend(advice(&cluster["problem"]));
    }
    for address in detail
        .get("hostnames")
        .and_then(Value::as_array)
        .into_iter()
        .flatten()
    {
        let url = address
            .get("url")
            .and_then(Value::as_str)
            .unwrap_or_default();
        let sticks = address
            .get("stickiness")
            .and_then(Value::as_str)
            .unwrap_or_default();
        fields.push(("address", format!("{url} ({sticks})")));
    }
    let endpoints = detail.get("endpoints").and_then(Value::as_array);
    for endpoint in endpoints.into_iter().flatten() {
        fields.extend(seen_by_users(endpoint).map(|line| ("from users", line)));
    }
    if !text("/openapi/path").is_empty() {
        let about = [text("/openapi/title"), text("/openapi/version")];
        let about = about.join(" ");
        fields.push((
            "openapi",
            format!("{} {}", text("/openapi/path"), about.trim()),
        ));
    }
    if let Some(took) = took(detail) {
        fields.push(("took", took));
    }
    if !text("/approval/hash").is_empty() {
        let granted = detail
            .pointer("/approval/granted")
            .and_then(Value::as_array);
        let line = format!(
            "{} of {} for plan {}",
            granted.map_or(0, Vec::len),
            text("/approval/required"),
            text("/approval/hash")
        );
        fields.push(("approvals", line));
        if !text("/approval/to_review").is_empty() {
            let line = format!("by {}, not reviewed yet", text("/approval/to_review"));
            fields.push(("emergency", line));
        }
    }
    if !text("/hold/freeze").is_empty() {
        let mut line = format!("by {} until {}", text("/hold/freeze"), text("/hold/until"));
        if !text("/hold/to_review").is_empty() {
            line = format!(
                "by {}; {} let it through, not reviewed yet",
                text("/hold/freeze"),
                text("/hold/to_review")
            );
        }
        fields.push(("frozen", line));
    }
    if !text("/stops/because").is_empty() {
        let stop = format!(
            "at {}, because {}",
            text("/stops/at"),
            text("/stops/because")
        );
        fields.push(("stops", stop));
    }
    if !text("/access/internal").is_empty() {
        let internal = text("/access/internal");
        fields.push(("internal", format!("{internal} (on the gateway's machine)")));
    }
    let instances = detail.pointer("/access/instances");
    for (cluster, addresses) in instances.and_then(Value::as_object).into_iter().flatten() {
        let addresses = addresses.as_array().into_iter().flatten();
        let addresses: Vec<_> = addresses.filter_map(Value::as_str).collect();
        if !addresses.is_empty() {
            fields.push(("instances", format!("{} ({cluster})", addresses.join(", "))));
        }
    }
    if !text("/access/load_balancer").is_empty() {
        fields.push(("gateway", text("/access/load_balancer")));
    }
    let operations: Vec<_> = detail
        .get("operations")
        .and_then(Value::as_array)
        .into_iter()
        .flatten()
        .filter_map(Value::as_str)
        .map(|o| o.replace('_', "-"))
        .collect();
    fields.push(("possible", operations.join(", ")));
    for (label, value) in fields {
        output::line(&format!("  {} {value}", style.dim(&format!("{label:<10}"))));
    }
    if !text("/failure/code").is_empty() {
        output::line(&format!(
            "  {} {} ({})",
            style.error("failure   "),
            text("/failure/message"),
            text("/failure/code")
        ));
        output::line(&format!(
            "  {} {}",
            style.dim("remedy    "),
            text("/failure/remedy")
        ));
    }
    if !text("/cancelled/message").is_empty() {
        output::line(&format!(
            "  {} {}",
            style.warn("cancelled "),
            text("/cancelled/message")
        ));
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_problem_is_shown_with_what_it_comes_of_and_all_that_helps() {
        let shown = |problem: Value| advice(&problem).collect::<Vec<_>>();
        assert!(shown(Value::Null).is_empty());
        let one = json!({ "code": "rollout_timeout", "remedy": "Wait." });
        assert_eq!(shown(one), [("remedy", "Wait.".to_owned())]);
        let whole = json!({
            "code": "OOMKilled",
            "remedy": "More.",
            "likely_causes": ["Too little."],
            "remedies": ["More.", "Less."],
        });
        let lines = ["Too little.", "More.", "Less."].map(str::to_owned);
        let labels = ["likely", "remedy", "remedy"];
        let expected: Vec<_> = labels.into_iter().zip(lines).collect();
        assert_eq!(shown(whole), expected);
        let apart = json!({ "remedy": "More.", "remedies": ["Less."] });
        let expected = ["More.", "Less."].map(|text| ("remedy", text.to_owned()));
        assert_eq!(shown(apart), expected);
    }
}
