//! Reports for auditors, each from a whole verified ledger, with a statement of what it covers.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use daybook_events::deployment::DeploymentEvent;
use daybook_events::gitops::GitopsEvent;
use daybook_events::routing::{RoutingEvent, SwitchReason};
use daybook_events::{DeploymentId, Event, Position};
use daybook_projections::dora::Period;
use daybook_store::tlog::leaf_hash;
use jiff::Timestamp;
use serde::Serialize;

use crate::deliveries::{self, Deliveries};
use crate::verify::{Effect, Observe, Verified};
use crate::world::World;

/// Which report.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Subject {
    /// All deployments that were requested in the period.
    Population,
    /// Every event about one deployment.
    Evidence(DeploymentId),
    /// Deployments whose requester, author and approver are not different people.
    SegregationOfDuties,
    /// Changes that were made as emergencies, and how late they were reviewed.
    Emergency,
    /// Changes that no event approves: commits by others, deployments without an approval, and what
    /// was changed in place.
    Unapproved,
    /// Deployments that failed, wholly or in part, or were cancelled, and what went back.
    FailuresAndRollbacks,
    /// What ran at a time, and what was on its way.
    WhatRan(Timestamp),
    /// Whether the log is whole, and goes on from the last audit.
    Integrity,
    /// The measures of software delivery of each service instance in a period.
    Dora(Period),
}

impl Subject {
    /// Its name on the command line.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Population => "population",
            Self::Evidence(_) => "evidence",
            Self::SegregationOfDuties => "segregation-of-duties",
            Self::Emergency => "emergency",
            Self::Unapproved => "unapproved",
            Self::FailuresAndRollbacks => "failures-and-rollbacks",
            Self::WhatRan(_) => "what-ran",
            Self::Integrity => "integrity",
            Self::Dora(_) => "dora",
        }
    }
}

impl Subject {
    /// What a switch for this reason is called in this report, if it belongs into it.
    fn names_switch(&self, reason: SwitchReason) -> Option<&'static str> {
        match (self, reason) {
            (Self::FailuresAndRollbacks, SwitchReason::Rollback) => Some("rollback"),
            (Self::FailuresAndRollbacks, SwitchReason::Compensation) => Some("routes restored"),
            (Self::Unapproved, SwitchReason::MarkMain) => Some("traffic switched by hand"),
            (Self::Unapproved, SwitchReason::Split) => Some("traffic shared by hand"),
            (Self::Unapproved, SwitchReason::Policy) => {
                Some("traffic spread over clusters by hand")
            }
            _ => None,
        }
    }
}

/// What a report is restricted to.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Scope {
    /// From this time on.
    pub from: Option<Timestamp>,
    /// Before this time.
    pub to: Option<Timestamp>,
    /// Only this project.
    pub project: Option<String>,
    /// Only this environment.
    pub environment: Option<String>,
}

impl Scope {
    fn has(&self, time: Timestamp, project: &str, environment: Option<&str>) -> bool {
        self.from.is_none_or(|from| from <= time)
            && self.to.is_none_or(|to| time < to)
            && self.project.as_deref().is_none_or(|p| p == project)
            && self
                .environment
                .as_deref()
                .is_none_or(|e| environment == Some(e))
    }

    /// The same for `project.environment.service`, whenever.
    fn has_instance(&self, id: &str) -> bool {
        let mut parts = id.split('.');
        let (project, environment) = (parts.next(), parts.next());
        self.project.is_none() | (self.project.as_deref() == project)
            && self.environment.is_none() | (self.environment.as_deref() == environment)
    }
}

/// A report.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Report {
    /// Its name.
    pub name: String,
    /// What the columns are.
    pub columns: Vec<&'static str>,
    /// The rows, each as long as the columns.
    pub rows: Vec<Vec<String>>,
    /// What is covered, and what is not, in sentences.
    pub statement: Vec<String>,
    /// The log.
    pub origin: String,
    /// The last position that was looked at.
    pub position: u64,
    /// The signed size.
    pub size: u64,
    /// The signed root, in base64.
    pub root: String,
    /// Whether the ledger holds. If it does not, the report is worth nothing.
    pub ledger_holds: bool,
}

/// What is known of one deployment.
#[derive(Debug, Clone, Default)]
struct Run {
    position: Position,
    requested: Option<Timestamp>,
    instance: String,
    project: String,
    environment: String,
    version: String,
    reason: String,
    requester: String,
    author: String,
    source: String,
    image: String,
    commit: String,
    outcome: String,
    ended: Option<Timestamp>,
    approvals: Vec<(String, String)>,
    emergency: Option<(Timestamp, Option<Timestamp>)>,
}

/// Collects on one walk over a ledger what a report needs.
#[derive(Debug)]
pub struct Collector {
    subject: Subject,
    scope: Scope,
    runs: BTreeMap<String, Run>,
    rows: Vec<Vec<String>>,
    world: World,
    newest: Option<Timestamp>,
    approvals: u64,
    undecodable: u64,
    deliveries: Option<Deliveries>,
}

impl Collector {
    /// For one report.
    pub fn new(subject: Subject, scope: Scope) -> Self {
        let deliveries = match &subject {
            Subject::Dora(period) => Some(Deliveries::new(*period)),
            _ => None,
        };
        Self {
            deliveries,
            subject,
            scope,
            runs: BTreeMap::new(),
            rows: Vec::new(),
            world: World::default(),
            newest: None,
            approvals: 0,
            undecodable: 0,
        }
    }

    fn take(&mut self, position: Position, bytes: &[u8], event: &Event, effect: Effect) {
        let mut tokens = event.subject.split('/');
        let mut token = || tokens.next().unwrap_or_default();
        let (project, environment, aggregate, id) = (token(), token(), token(), token());
        let actor = format!("{}/{}", event.authtype, event.authid);
        let run = event.correlationid.to_string();
        if let Subject::Evidence(wanted) = self.subject {
            let wanted = wanted.to_string();
            if run == wanted || id == wanted || event.data.get().contains(&wanted) {
                self.rows.push(vec![
                    position.to_string(),
                    event.time.to_string(),
                    actor,
                    event.short_kind().to_owned(),
                    event.subject.clone(),
                    event.id.to_string(),
                    event.causationid.map(|c| c.to_string()).unwrap_or_default(),
                    hex::encode(leaf_hash(bytes)),
                    effect.as_str().to_owned(),
                ]);
            }
            return;
        }
        let kind = event.short_kind();
        // Approvals are read by what they are called: a newer version may have more kinds, and
        // those of another aggregate belong to the deployment whose run they are part of.
        if is_about_approval(kind) {
            self.approvals += 1;
            let of = if aggregate == "deployment" { id } else { &run };
            let run = self.runs.entry(of.to_owned()).or_default();
            if kind.contains("emergency") {
                run.emergency.get_or_insert((event.time, None));
            } else if kind.contains("post_review") {
                if let Some((_, reviewed)) = &mut run.emergency {
                    reviewed.get_or_insert(event.time);
                }
            } else if kind.contains("voided") {
                run.approvals.clear();
            } else if kind.contains("granted") {
                run.approvals.push((actor.clone(), event.id.to_string()));
            }
        }
        match aggregate {
            "deployment" => {
                let Ok(payload) = event.payload::<DeploymentEvent>() else {
                    self.undecodable += 1;
                    return;
                };
                let run = self.runs.entry(id.to_owned()).or_default();
                match payload {
                    DeploymentEvent::Requested(e) => {
                        run.position = position;
                        run.requested = Some(event.time);
                        run.instance = e.instance.to_string();
                        run.project = project.to_owned();
                        run.environment = environment.to_owned();
                        run.reason = e.reason.unwrap_or_default();
                        run.requester = actor;
                        run.outcome = "under way".into();
                        run.version = e.version.to_string();
                    }
                    DeploymentEvent::SourceResolved(e) => {
                        run.author =
                            format!("{} <{}>", e.source.author_name, e.source.author_email);
                        run.source = e.source.commit.to_string();
                    }
                    DeploymentEvent::ImagePinned(e) => {
                        run.image = format!("{}@{}", e.image.repository, e.image.digest);
                    }
                    DeploymentEvent::ChartPinned(e) => run.image = e.chart.to_string(),
                    DeploymentEvent::DeployingStarted(e) => run.commit = e.commit.to_string(),
                    DeploymentEvent::Succeeded(_) => run.end("succeeded", event.time),
                    DeploymentEvent::PartiallySucceeded(e) => {
                        let failed: Vec<_> = e.failed.iter().map(|f| f.cluster.as_str()).collect();
                        let text = format!("partially succeeded: failed in {}", failed.join(", "));
                        run.end(&text, event.time);
                    }
                    DeploymentEvent::Failed(e) => {
                        run.end(&format!("failed: {}: {}", e.code, e.message), event.time);
                    }
                    DeploymentEvent::Cancelled(e) => {
                        run.end(&format!("cancelled: {}", e.message), event.time);
                    }
                    DeploymentEvent::ScaleRequested(e) if self.subject == Subject::Unapproved => {
                        let instance = run.instance.clone();
                        if self.scope.has(event.time, project, Some(environment)) {
                            self.rows.push(vec![
                                position.to_string(),
                                event.time.to_string(),
                                "scaled in place".into(),
                                instance,
                                format!("{id} to {} instances by {actor}", e.replicas),
                            ]);
                        }
                    }
                    _ => {}
                }
            }
            "gitops" if self.subject == Subject::Unapproved => {
                if kind == "gitops.committed.v1" || !self.scope.has(event.time, project, None) {
                    return;
                }
                let message = match event.payload::<GitopsEvent>() {
                    Ok(GitopsEvent::ForeignCommitFound(e)) => {
                        format!("{} by {}: {}", e.commit, e.author, e.message)
                    }
                    Ok(_) if !kind.contains("rewritten") => return,
                    Ok(_) => "the history of the repository was rewritten".to_owned(),
                    Err(_) => return,
                };
                self.rows.push(vec![
                    position.to_string(),
                    event.time.to_string(),
                    "commit by others".into(),
                    project.to_owned(),
                    message,
                ]);
            }
            "gitops" if self.subject == Subject::FailuresAndRollbacks => {
                if let Ok(GitopsEvent::ForeignCommitFound(e)) = event.payload()
                    && let Some(undone) = e.undoes
                    && self
                        .scope
                        .has(event.time, project, Some(undone.environment.as_str()))
                {
                    self.rows.push(vec![
                        position.to_string(),
                        event.time.to_string(),
                        "rollback by git revert".into(),
                        format!("{project}.{}.{}", undone.environment, undone.service),
                        undone.deployment.to_string(),
                        e.author,
                        format!("{}: {}", e.commit, e.message),
                    ]);
                }
            }
            "routing" => {
                if let Ok(RoutingEvent::Switched(e)) = event.payload()
                    && let Some(what) = self.subject.names_switch(e.reason)
                    && self
                        .scope
                        .has(event.time, project, Some(e.instance.environment.as_str()))
                {
                    let (instance, note) = (e.instance.to_string(), e.note.unwrap_or_default());
                    let mut row = vec![
                        position.to_string(),
                        event.time.to_string(),
                        what.into(),
                        instance,
                    ];
                    match self.subject {
                        Subject::Unapproved => row.push(
                            format!("{} by {actor} {note}", e.deployment)
                                .trim_end()
                                .into(),
                        ),
                        _ => row.extend([e.deployment.to_string(), actor, note]),
                    }
                    self.rows.push(row);
                }
            }
            _ => {}
        }
    }

    /// The report, of a ledger that this collected from.
    pub fn report(self, verified: &Verified) -> Report {
        let Self {
            subject,
            scope,
            runs,
            mut rows,
            world,
            approvals,
            undecodable,
            deliveries,
            ..
        } = self;
        let mut statement = Vec::new();
        let of_run = |run: &Run| {
            run.requested
                .is_some_and(|time| scope.has(time, &run.project, Some(&run.environment)))
        };
        let mut wanted: Vec<(&String, &Run)> = runs.iter().filter(|(_, run)| of_run(run)).collect();
        wanted.sort_by_key(|(_, run)| run.position);
        let no_approvals =
            "No event of this ledger is about approvals: it does not show who allowed what.";
        let columns: Vec<&'static str> = match &subject {
            Subject::Population => {
                rows = wanted.iter().map(|(id, run)| run.row(id)).collect();
                statement.push(format!(
                    "These {} deployments are all that were requested in the period: each entry of the ledger was looked at.",
                    rows.len()
                ));
                statement.push("A change of the configuration is a deployment. Numbers of instances and routes that somebody changed in place are none, and are in the report `unapproved`.".into());
                Run::COLUMNS.to_vec()
            }
            Subject::Evidence(id) => {
                statement.push(format!(
                    "These {} events are all that name deployment {id} or belong to it.",
                    rows.len()
                ));
                vec![
                    "position", "time", "actor", "event", "subject", "id", "cause", "leaf",
                    "effect",
                ]
            }
            Subject::SegregationOfDuties => {
                for (id, run) in &wanted {
                    let exceptions = run.exceptions();
                    if !exceptions.is_empty() {
                        let mut row = run.row(id);
                        row.truncate(7);
                        row.push(exceptions.join("; "));
                        rows.push(row);
                    }
                }
                statement.push(format!(
                    "{} of {} deployments have an exception. Requester and author are compared by name and by the first part of the address.",
                    rows.len(),
                    wanted.len()
                ));
                if approvals == 0 {
                    statement.push(no_approvals.into());
                }
                let mut columns = Run::COLUMNS[..7].to_vec();
                columns.push("exception");
                columns
            }
            Subject::Emergency => {
                for (id, run) in &wanted {
                    let Some((at, reviewed)) = run.emergency else {
                        continue;
                    };
                    let late = reviewed.map_or("not reviewed".to_owned(), |r| {
                        let hours = (r.as_second() - at.as_second()) / 3600;
                        format!("reviewed after {hours} h")
                    });
                    let mut row = run.row(id);
                    row.truncate(7);
                    row.push(late);
                    rows.push(row);
                }
                if approvals == 0 {
                    statement.push(no_approvals.into());
                }
                let mut columns = Run::COLUMNS[..7].to_vec();
                columns.push("review");
                columns
            }
            Subject::Unapproved => {
                for (id, run) in wanted.iter().filter(|(_, run)| run.approvals.is_empty()) {
                    rows.push(vec![
                        run.position.to_string(),
                        run.requested.map(|t| t.to_string()).unwrap_or_default(),
                        "deployment without approval".into(),
                        run.instance.clone(),
                        format!("{id} by {}", run.requester),
                    ]);
                }
                rows.sort_by_key(|row| row[0].parse::<u64>().unwrap_or(0));
                if approvals == 0 {
                    statement.push(no_approvals.into());
                }
                statement.push("Commits by others are those that Daybook found in its repositories; `daybook audit verify` of an export with repositories shows whether there are more.".into());
                statement.push("Approvals are asked for deployments. What was scaled or whose traffic was moved by hand is listed whoever did it; rollbacks are in the report `failures-and-rollbacks`, and stops, starts and removals in the evidence of each deployment.".into());
                vec!["position", "time", "what", "where", "details"]
            }
            Subject::FailuresAndRollbacks => {
                for (id, run) in &wanted {
                    let bad = ["failed", "partially succeeded", "cancelled"];
                    if bad.iter().any(|b| run.outcome.starts_with(b)) {
                        let what = run.outcome.split(':').next().unwrap_or_default();
                        rows.push(vec![
                            run.position.to_string(),
                            run.ended.map(|t| t.to_string()).unwrap_or_default(),
                            what.to_owned(),
                            run.instance.clone(),
                            (*id).clone(),
                            run.requester.clone(),
                            run.outcome.clone(),
                        ]);
                    }
                }
                rows.sort_by_key(|row| row[0].parse::<u64>().unwrap_or(0));
                statement.push(format!(
                    "{} deployments were requested in the period, and are counted whether they failed or not.",
                    wanted.len()
                ));
                vec![
                    "position",
                    "time",
                    "what",
                    "instance",
                    "deployment",
                    "actor",
                    "details",
                ]
            }
            Subject::WhatRan(at) => {
                for (deployment, subject) in world.running() {
                    let instance = &deployment.request.instance;
                    let project = instance.project.as_str();
                    let environment = Some(instance.environment.as_str());
                    let scope = Scope {
                        from: None,
                        to: None,
                        ..scope.clone()
                    };
                    if !scope.has(*at, project, environment) {
                        continue;
                    }
                    let id = match subject {
                        daybook_events::Subject::Deployment(_, _, id) => id.to_string(),
                        _ => continue,
                    };
                    rows.push(vec![
                        instance.to_string(),
                        id,
                        deployment.status.as_str().to_owned(),
                        deployment.status_since.to_string(),
                        deployment
                            .image
                            .as_ref()
                            .map(|i| format!("{}@{}", i.repository, i.digest))
                            .or_else(|| deployment.chart.as_ref().map(ToString::to_string))
                            .unwrap_or_default(),
                        deployment
                            .commit
                            .as_ref()
                            .map(ToString::to_string)
                            .unwrap_or_default(),
                    ]);
                }
                statement.push(format!(
                    "This is what follows from all events up to the last one before {at}, by the times that the writers recorded."
                ));
                vec![
                    "instance",
                    "deployment",
                    "status",
                    "since",
                    "image",
                    "commit",
                ]
            }
            Subject::Integrity => {
                for finding in verified.findings.list() {
                    rows.push(vec![
                        finding.kind.code().to_owned(),
                        finding.place.to_string(),
                        finding.message.clone(),
                        finding.remedy.to_owned(),
                    ]);
                }
                statement.extend(verified.proven());
                statement.extend(verified.not_proven());
                vec!["finding", "place", "message", "remedy"]
            }
            Subject::Dora(period) => {
                let measures = deliveries.iter().flat_map(Deliveries::measures);
                let wanted = measures.filter(|m| scope.has_instance(&m.instance_id));
                rows = wanted.map(|m| deliveries::row(&m)).collect();
                statement.extend(deliveries::statement(*period));
                deliveries::COLUMNS.to_vec()
            }
        };
        if undecodable > 0 {
            statement.push(format!(
                "{undecodable} events about deployments cannot be read by this version, and are not in it."
            ));
        }
        statement.push(if verified.holds() {
            format!(
                "It covers positions 1 to {} of {}, as signed, without a gap{}.",
                verified.size,
                verified.origin.as_deref().unwrap_or("an unknown log"),
                match verified.counts.gaps {
                    0 => String::new(),
                    gaps => format!(", except for {gaps} positions that are recorded as lost"),
                }
            )
        } else {
            format!(
                "The ledger does NOT hold (problems: {}; see `daybook audit verify`): this report is no evidence.",
                verified.findings.problems().max(1)
            )
        });
        Report {
            name: subject.name().to_owned(),
            columns,
            rows,
            statement,
            origin: verified.origin.clone().unwrap_or_default(),
            position: verified.counts.entries,
            size: verified.size,
            root: verified.root_text(),
            ledger_holds: verified.holds(),
        }
    }
}

impl Run {
    const COLUMNS: &'static [&'static str] = &[
        "position",
        "requested",
        "deployment",
        "instance",
        "requester",
        "author",
        "version",
        "source",
        "image",
        "commit",
        "approvals",
        "outcome",
        "ended",
        "reason",
    ];

    fn end(&mut self, outcome: &str, at: Timestamp) {
        self.outcome = outcome.to_owned();
        self.ended = Some(at);
    }

    fn row(&self, id: &str) -> Vec<String> {
        let time = |t: Option<Timestamp>| t.map(|t| t.to_string()).unwrap_or_default();
        let approvals: Vec<&str> = self.approvals.iter().map(|(who, _)| who.as_str()).collect();
        vec![
            self.position.to_string(),
            time(self.requested),
            id.to_owned(),
            self.instance.clone(),
            self.requester.clone(),
            self.author.clone(),
            self.version.clone(),
            self.source.clone(),
            self.image.clone(),
            self.commit.clone(),
            approvals.join(", "),
            self.outcome.clone(),
            time(self.ended),
            self.reason.clone(),
        ]
    }

    fn exceptions(&self) -> Vec<&'static str> {
        let mut all = Vec::new();
        let requester = self.requester.split_once('/').map_or("", |(_, id)| id);
        let is = |who: &str| !requester.is_empty() && who.eq_ignore_ascii_case(requester);
        let (name, address) = self.author.split_once(" <").unwrap_or_default();
        if is(name) || is(address.split('@').next().unwrap_or_default()) {
            all.push("the requester is the author of the source");
        }
        if self.approvals.iter().any(|(who, _)| *who == self.requester) {
            all.push("the requester approved it");
        }
        if self.approvals.is_empty() {
            all.push("nobody approved it");
        }
        if self.requester.starts_with("unauthenticated/") {
            all.push("the requester was not authenticated");
        }
        all
    }
}

impl Observe for Collector {
    fn event(&mut self, position: Position, bytes: &[u8], effect: Effect) {
        let of_all = matches!(self.subject, Subject::Evidence(_));
        // What changed nothing did not happen, whatever it says.
        if effect == Effect::Void && !of_all {
            return;
        }
        let Ok(event) = Event::from_bytes(bytes) else {
            return;
        };
        // Unknown kinds may be approvals of a newer version.
        if effect == Effect::Unknown && !of_all && !is_about_approval(event.short_kind()) {
            return;
        }
        if let Some(deliveries) = &mut self.deliveries {
            if !deliveries.take(position, &event) {
                self.undecodable += 1;
            }
            return;
        }
        if let Subject::WhatRan(at) = self.subject {
            // Up to the first event that was recorded after that time: events are not in the
            // order of their times, but in the order of the ledger.
            self.newest = self.newest.max(Some(event.recordedtime));
            if self.newest <= Some(at) {
                self.world.event(position, bytes, effect);
            }
            return;
        }
        self.take(position, bytes, &event, effect);
    }
}

/// Whether events of this kind are approvals, or belong to them, as far as their names say.
fn is_about_approval(kind: &str) -> bool {
    ["approval", "emergency", "post_review"]
        .iter()
        .any(|word| kind.contains(word))
}

impl Report {
    /// As comma-separated values, with the statement in front as lines that begin with `#`. Cells
    /// that a spreadsheet could take for a formula begin with an apostrophe.
    pub fn to_csv(&self) -> String {
        let mut text = String::new();
        let head = [
            format!("report {}", self.name),
            format!("origin {}", self.origin),
            format!(
                "position {}, size {}, root {}",
                self.position, self.size, self.root
            ),
        ];
        for line in head.iter().chain(&self.statement) {
            let _ = writeln!(text, "# {}", line.replace(['\r', '\n'], " "));
        }
        let row = |cells: &mut dyn Iterator<Item = &str>| {
            let cells: Vec<String> = cells.map(cell).collect();
            cells.join(",") + "\r\n"
        };
        text.push_str(&row(&mut self.columns.iter().copied()));
        for cells in &self.rows {
            text.push_str(&row(&mut cells.iter().map(String::as_str)));
        }
        text
    }
}

/// One cell, as RFC 4180 has it, which no spreadsheet takes for a formula.
fn cell(text: &str) -> String {
    let risky = text
        .trim_start()
        .starts_with(['=', '+', '-', '@', '|', '%'])
        || text.starts_with(['\t', '\r', '\n']);
    let guard = if risky { "'" } else { "" };
    if risky || text.contains([',', '"', '\r', '\n', '\'', ';']) {
        return format!("\"{guard}{}\"", text.replace('"', "\"\""));
    }
    text.to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_cell_is_a_formula() {
        for (text, csv) in [
            ("plain", "plain"),
            ("a,b", "\"a,b\""),
            ("a\"b", "\"a\"\"b\""),
            ("=1+1", "\"'=1+1\""),
            ("+1", "\"'+1\""),
            ("-1", "\"'-1\""),
            ("@SUM(A1)", "\"'@SUM(A1)\""),
            (" =1", "\"' =1\""),
            ("\t=1", "\"'\t=1\""),
            ("=cmd|' /C calc'!A0", "\"'=cmd|' /C calc'!A0\""),
        ] {
            assert_eq!(cell(text), csv);
        }
    }
}
