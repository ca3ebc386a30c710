//! `daybook doctor`

use clap::Args;
use jiff::Timestamp;
use serde::Serialize;
use serde_json::Value;

use super::{Outcome, ServerArgs};
use crate::client::Client;
use crate::exit::{Code, Failure};
use crate::output;

/// Clocks that differ by more than this many seconds make times in the ledger misleading.
const CLOCKS_APART: i64 = 5;

/// Look for what keeps this command or the server from doing their work, and say what helps.
///
/// Ends with 0 if nothing is wrong (warnings included), with 1 if something is, and with 3 if the
/// server cannot be reached.
#[derive(Debug, Args)]
pub struct DoctorArgs {
    #[command(flatten)]
    server: ServerArgs,
}

/// How something was found.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
enum Verdict {
    Ok,
    Warning,
    Wrong,
}

/// Something that was looked at.
#[derive(Debug, Serialize)]
struct Check {
    /// `server`, `version`, `clock`, `ledger`, `durability`, or a part of the server.
    name: String,
    verdict: Verdict,
    /// What was found.
    found: String,
    /// What helps.
    #[serde(skip_serializing_if = "Option::is_none")]
    remedy: Option<String>,
}

#[derive(Debug, Default, Serialize)]
struct Findings {
    checks: Vec<Check>,
}

impl Findings {
    fn add(&mut self, name: &str, verdict: Verdict, found: impl Into<String>, remedy: &str) {
        self.checks.push(Check {
            name: name.to_owned(),
            verdict,
            found: found.into(),
            remedy: (!remedy.is_empty()).then(|| remedy.to_owned()),
        });
    }

    fn ok(&mut self, name: &str, found: impl Into<String>) {
        self.add(name, Verdict::Ok, found, "");
    }
}

pub async fn run(args: DoctorArgs) -> Outcome {
    let client = Client::new(&args.server)?;
    let mut findings = Findings::default();
    let reached = look(&client, &mut findings).await;
    let worst = findings.checks.iter().map(|c| c.verdict);
    let wrong = worst.filter(|v| *v == Verdict::Wrong).count();
    if output::is_json() {
        output::json(&findings);
    } else {
        print(&findings);
    }
    match (reached, wrong) {
        (false, _) => Ok(Code::Unreachable),
        (true, 0) => Ok(Code::Success),
        (true, _) => Ok(Code::Failure),
    }
}

/// Looks at everything that can be looked at from here. Returns whether the server answers.
async fn look(client: &Client, findings: &mut Findings) -> bool {
    let health = match client.dated("/healthz").await {
        Ok(health) => health,
        Err(failure) => {
            let remedy = failure.hint.unwrap_or_default();
            findings.add("server", Verdict::Wrong, failure.message, &remedy);
            return false;
        }
    };
    let (health, date): (Value, Option<Timestamp>) = health;
    findings.ok("server", format!("{} answers", client.shown()));
    let theirs = text(&health, "version");
    let ours = env!("CARGO_PKG_VERSION");
    if theirs == ours {
        findings.ok("version", format!("both are {ours}"));
    } else {
        let found = format!("the server is {theirs}, and this command {ours}");
        let remedy = "use the same version: an option of the newer one may be unknown to the other";
        findings.add("version", Verdict::Warning, found, remedy);
    }
    clock(date, findings);
    parts(client, findings).await;
    ledger(client, findings).await;
    true
}

fn clock(date: Option<Timestamp>, findings: &mut Findings) {
    let Some(date) = date else {
        return;
    };
    // The header has whole seconds.
    let apart = (Timestamp::now().as_second() - date.as_second()).abs();
    if apart <= CLOCKS_APART {
        findings.ok("clock", "it agrees with the server's");
    } else {
        let found = format!("it is {apart} s away from the server's");
        let remedy = "let both machines get their time by NTP: the ledger keeps what writers say";
        findings.add("clock", Verdict::Warning, found, remedy);
    }
}

/// What the server says of its own parts.
async fn parts(client: &Client, findings: &mut Findings) {
    let report = match client.even_if_unready("/readyz").await {
        Ok(report) => report,
        Err(failure) => return unknown("readiness", failure, findings),
    };
    let parts = report.get("parts").and_then(Value::as_array);
    for part in parts.into_iter().flatten() {
        let name = text(part, "name");
        let reason = part.get("reason").and_then(Value::as_str);
        match (part.get("ready").and_then(Value::as_bool), reason) {
            (Some(true), None) => findings.ok(&name, "it is ready"),
            (Some(true), Some(reason)) => {
                findings.add(&name, Verdict::Warning, reason, "");
            }
            (_, reason) => {
                let found = reason.unwrap_or("it is not ready; why is said to an auditor's token");
                let remedy = "see docs/operating.md; the server's log has the cause";
                findings.add(&name, Verdict::Wrong, found, remedy);
            }
        }
    }
}

/// What becomes of what is written.
async fn ledger(client: &Client, findings: &mut Findings) {
    let report: Value = match client.get_as_it_is("/api/v1/ledger").await {
        Ok(report) => report,
        Err(failure) => return unknown("durability", failure, findings),
    };
    match text(&report, "durability").as_str() {
        "synced" => findings.ok(
            "durability",
            "what is acknowledged survives the loss of power",
        ),
        "buffered" => findings.add(
            "durability",
            Verdict::Warning,
            "what is acknowledged survives the death of the process, not the loss of power",
            "set `sync_interval: always` on the nats-server; see docs/operating.md",
        ),
        _ => findings.add(
            "durability",
            Verdict::Warning,
            "it is not known whether what is acknowledged survives the loss of power",
            "let Daybook read the server's settings; see docs/operating.md",
        ),
    }
    let warnings = report.get("warnings").and_then(Value::as_array);
    for warning in warnings.into_iter().flatten().filter_map(Value::as_str) {
        findings.add("log", Verdict::Warning, warning, "");
    }
    let signed = report.pointer("/signed/size").and_then(Value::as_u64);
    let head = report.get("head").and_then(Value::as_u64);
    match (signed, head) {
        (Some(signed), Some(head)) => {
            findings.ok("signed", format!("{signed} of {head} events are signed"));
        }
        (None, Some(_)) => findings.add(
            "signed",
            Verdict::Warning,
            "nothing is signed yet",
            "a process with the role `notary` signs; `daybook up` has it",
        ),
        _ => {}
    }
}

fn unknown(name: &str, failure: Failure, findings: &mut Findings) {
    let remedy = failure.hint.unwrap_or_default();
    findings.add(name, Verdict::Wrong, failure.message, &remedy);
}

fn text(value: &Value, name: &str) -> String {
    let found = value.get(name).and_then(Value::as_str);
    found.unwrap_or_default().to_owned()
}

fn print(findings: &Findings) {
    let style = output::style();
    let width = findings.checks.iter().map(|c| c.name.len()).max();
    let width = width.unwrap_or_default();
    for check in &findings.checks {
        let mark = match check.verdict {
            Verdict::Ok => style.good("ok     "),
            Verdict::Warning => style.warn("warning"),
            Verdict::Wrong => style.error("wrong  "),
        };
        output::line(&format!("{mark}  {:width$}  {}", check.name, check.found));
        if let Some(remedy) = &check.remedy {
            let space = width + 11;
            output::line(&style.dim(&format!("{:space$}{remedy}", "")));
        }
    }
}
