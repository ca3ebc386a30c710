//! What answers consist of.

use async_graphql::{
    Enum, ID, InputValueError, InputValueResult, Json, Scalar, ScalarType, SimpleObject, Value,
};
use daybook_events::deployment::SwitchMode as Switching;
use daybook_events::feed::leaf_hash;
use daybook_events::log::Recorded;
use daybook_events::{Digest, Position};
use daybook_projections::AuditRow;
use daybook_projections::views;
use jiff::Timestamp;

use super::deploy_run::{Phase, word};
use crate::routes::events::StoredEvent;
use crate::routes::traffic::{RouteView, SwitchView};
use crate::tlog::{ConditionReport, LedgerReport};
use crate::view::{EnvironmentView, MainSwitched};

/// A position of the ledger: 1 for its first event. Written as a number; read as a number or as
/// its digits.
#[derive(Debug, Clone, Copy)]
pub(crate) struct LogPosition(pub(super) Position);

impl From<Position> for LogPosition {
    fn from(position: Position) -> Self {
        Self(position)
    }
}

#[Scalar(name = "Position")]
impl ScalarType for LogPosition {
    fn parse(value: Value) -> InputValueResult<Self> {
        let number = match &value {
            Value::Number(n) => n.as_u64(),
            Value::String(s) if s.bytes().all(|b| b.is_ascii_digit()) => s.parse().ok(),
            _ => None,
        };
        number
            .map(|n| Self(Position(n)))
            .ok_or_else(|| InputValueError::expected_type(value))
    }

    fn to_value(&self) -> Value {
        Value::Number(self.0.0.into())
    }
}

/// Whether traffic follows a deployment by itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Enum)]
pub(crate) enum SwitchMode {
    /// It becomes the main deployment as soon as it is ready.
    Automatic,
    /// It runs beside the main one until somebody marks it as main.
    Manual,
}

impl From<SwitchMode> for Switching {
    fn from(mode: SwitchMode) -> Self {
        match mode {
            SwitchMode::Automatic => Self::Automatic,
            SwitchMode::Manual => Self::Manual,
        }
    }
}

impl From<Switching> for SwitchMode {
    fn from(mode: Switching) -> Self {
        match mode {
            Switching::Automatic => Self::Automatic,
            Switching::Manual => Self::Manual,
        }
    }
}

/// A deployment in the history of a service instance.
#[derive(Debug, SimpleObject)]
pub(crate) struct Deployment {
    /// Its id.
    id: ID,
    /// The project.
    project_id: ID,
    /// The environment.
    environment: String,
    /// The service.
    service: String,
    /// Tag of its image, once it is known.
    image_tag: Option<String>,
    /// Digest of its image, once it is known.
    digest: Option<String>,
    /// Whether traffic goes to it.
    active: bool,
    /// When it was asked for.
    timestamp: Timestamp,
    /// The GitOps commit that introduced it.
    revision: Option<String>,
    /// First line of that commit's message.
    message: Option<String>,
    /// The ref or image that was asked for.
    version: String,
    /// The commit of the source.
    source_commit: Option<String>,
    /// That commit's message.
    source_commit_message: Option<String>,
    /// A link to that commit.
    source_url: Option<String>,
    /// The pipeline's view of it.
    phase: Phase,
    /// Exactly where it is.
    state: String,
    /// Since when.
    since: Timestamp,
    /// Who asked for it.
    actor: String,
    /// Why, in the caller's words.
    reason: Option<String>,
    /// How it ended, if it did not become or stay live.
    outcome: Option<String>,
    /// A stable code for that.
    outcome_code: Option<String>,
    /// The deployment whose snapshot it repeats.
    redeploy_of: Option<ID>,
    /// Position of its request.
    position: LogPosition,
    /// A list goes on after it with this as `after`.
    cursor: String,
}

impl From<daybook_projections::HistoryRow> for Deployment {
    fn from(row: daybook_projections::HistoryRow) -> Self {
        Self {
            cursor: row.cursor().to_string(),
            id: row.deployment.to_string().into(),
            project_id: row.project.to_string().into(),
            environment: row.environment.to_string(),
            service: row.service.to_string(),
            image_tag: row.image_tag.map(|t| t.to_string()),
            digest: row.digest.map(|d| d.to_string()),
            active: row.active,
            timestamp: row.timestamp,
            revision: row.revision.map(|c| c.to_string()),
            message: row.message,
            version: row.version,
            source_commit: row.source_commit.map(|c| c.to_string()),
            source_commit_message: row.source_commit_message,
            source_url: row.source_url,
            phase: row.phase.into(),
            state: row.status.as_str().to_owned(),
            since: row.status_since,
            actor: row.actor.id,
            reason: row.reason,
            outcome: row.outcome,
            outcome_code: row.outcome_code,
            redeploy_of: row.redeploy_of.map(|d| d.to_string().into()),
            position: row.position.into(),
        }
    }
}

/// A page of the history, newest first.
#[derive(Debug, SimpleObject)]
pub(crate) struct HistoryPage {
    /// The deployments.
    pub(super) deployments: Vec<Deployment>,
    /// Where the list goes on (`after`); null at its end.
    pub(super) next: Option<String>,
    /// The list shows the ledger up to here.
    pub(super) position: LogPosition,
}

/// An environment of a project.
#[derive(Debug, SimpleObject)]
pub(crate) struct Environment {
    /// Its name.
    name: String,
    /// The project.
    project_id: ID,
    /// When it was created.
    created_at: Timestamp,
    /// `active`, `deleting` or `deleted`.
    status: String,
    /// The environment that it was made from.
    from: Option<String>,
    /// The branch whose pushes are deployed to it by themselves.
    auto_deploy: Option<String>,
    /// The number of the pull request that it is for.
    pull_request: Option<u64>,
    /// Where its services answer.
    urls: Vec<String>,
    /// Whether something new is kept from it now.
    frozen: bool,
    /// Clusters that deployments go to unless they name others.
    clusters: Vec<String>,
    /// Whether its services answer on the project's live hostnames.
    live: bool,
    /// Whether traffic follows a new deployment by itself.
    switch: SwitchMode,
    /// Whether it goes away with its pull request.
    ephemeral: bool,
}

impl From<EnvironmentView> for Environment {
    fn from(view: EnvironmentView) -> Self {
        Self {
            name: view.name.to_string(),
            project_id: view.project.to_string().into(),
            created_at: view.created_at,
            status: word(view.status),
            from: view.from.map(|e| e.to_string()),
            auto_deploy: view.auto_deploy.map(|r| r.to_string()),
            pull_request: view.pull_request.map(|p| p.number),
            urls: view.urls,
            frozen: view.freezes.iter().any(|f| f.open),
            clusters: view.spec.clusters.iter().map(ToString::to_string).collect(),
            live: view.spec.live,
            switch: view.spec.switch.into(),
            ephemeral: view.spec.ephemeral,
        }
    }
}

/// A deployment's share of a route.
#[derive(Debug, SimpleObject)]
pub(crate) struct Backend {
    /// The deployment.
    deployment: ID,
    /// Its share, relative to the other backends' weights.
    weight: u32,
    /// Where it is in its life.
    state: Option<String>,
}

/// Where a hostname leads.
#[derive(Debug, SimpleObject)]
pub(crate) struct Route {
    /// The hostname.
    hostname: String,
    /// Where to open it.
    url: String,
    /// `project.environment.service`.
    instance_id: ID,
    /// What it sticks to: `deployment`, `branch`, `environment`, `live`.
    stickiness: String,
    /// The deployments that share it.
    backends: Vec<Backend>,
    /// The number of the table that made it so.
    table: u32,
    /// Since when.
    since: Timestamp,
    /// Why that table was made.
    reason: String,
    /// The event that made it.
    switched_by: ID,
}

impl From<RouteView> for Route {
    fn from(view: RouteView) -> Self {
        let backends = view.backends.into_iter().map(|b| Backend {
            deployment: b.deployment.to_string().into(),
            weight: b.weight,
            state: b.status.map(|s| s.as_str().to_owned()),
        });
        Self {
            hostname: view.hostname.to_string(),
            url: view.url,
            instance_id: view.instance_id.into(),
            stickiness: word(view.stickiness),
            backends: backends.collect(),
            table: view.table,
            since: view.since,
            reason: word(view.reason),
            switched_by: view.switched_by.to_string().into(),
        }
    }
}

/// A switch of routes.
#[derive(Debug, SimpleObject)]
pub(crate) struct Switch {
    /// The number of the table that it made.
    table: u32,
    /// Why.
    reason: String,
    /// `project.environment.service`.
    instance_id: ID,
    /// The deployment that it is about.
    deployment: ID,
    /// The hostnames that it moved.
    hostnames: Vec<String>,
    /// The table that it undoes.
    undoes: Option<u32>,
    /// Why, in the caller's words.
    note: Option<String>,
}

impl From<SwitchView> for Switch {
    fn from(view: SwitchView) -> Self {
        Self {
            table: view.table,
            reason: word(view.reason),
            instance_id: view.instance_id.into(),
            deployment: view.deployment.to_string().into(),
            hostnames: view
                .changes
                .iter()
                .map(|c| c.hostname.to_string())
                .collect(),
            undoes: view.undoes,
            note: view.note,
        }
    }
}

/// The route table of a project.
#[derive(Debug, SimpleObject)]
pub(crate) struct RouteTable {
    /// The number of the newest table.
    pub(super) table: u32,
    /// The routes, by hostname.
    #[graphql(complexity = "super::limits::many(20, child_complexity)")]
    pub(super) routes: Vec<Route>,
    /// The newest switches, newest first.
    #[graphql(complexity = "super::limits::many(16, child_complexity)")]
    pub(super) switches: Vec<Switch>,
}

/// The main deployment of an instance from here on.
#[derive(Debug, SimpleObject)]
pub(crate) struct MainSwitch {
    /// The deployment that traffic goes to.
    id: ID,
    /// `project.environment.service`.
    instance_id: ID,
    /// The main deployment before.
    previous_main: Option<ID>,
}

impl From<MainSwitched> for MainSwitch {
    fn from(view: MainSwitched) -> Self {
        Self {
            id: view.id.to_string().into(),
            instance_id: view.instance_id.into(),
            previous_main: view.previous_main.map(|d| d.to_string().into()),
        }
    }
}

/// Routes were set.
#[derive(Debug, SimpleObject)]
pub(crate) struct RoutesSet {
    /// `project.environment.service`.
    pub(super) instance_id: ID,
    /// The switch; null if everything was as asked for already.
    pub(super) switch: Option<Switch>,
}

/// A deployment as an overview shows it.
#[derive(Debug, SimpleObject)]
pub(crate) struct RunningDeployment {
    /// Its id.
    id: ID,
    /// The ref or image that was asked for.
    version: String,
    /// Tag of its image.
    pub(super) image_tag: Option<String>,
    /// Digest of its image.
    digest: Option<String>,
    /// The newest GitOps commit about it.
    revision: Option<String>,
    /// The pipeline's view of it.
    phase: Phase,
    /// The operator's view of it.
    status: String,
    /// Exactly where it is.
    state: String,
    /// Since when.
    since: Timestamp,
    /// Is there an image? `pending`, `ready`, `not_ready`, `failed`, …
    build: String,
    /// Does it run?
    workload: String,
    /// Is it reached?
    endpoint: String,
    /// The hostnames that lead to it.
    hostnames: Vec<String>,
    /// When it was asked for.
    created_at: Timestamp,
}

impl From<views::DeploymentView> for RunningDeployment {
    fn from(view: views::DeploymentView) -> Self {
        Self {
            id: view.id.to_string().into(),
            version: view.version,
            image_tag: view.image_tag.map(|t| t.to_string()),
            digest: view.digest.map(|d| d.to_string()),
            revision: view.revision.map(|c| c.to_string()),
            phase: view.phase.into(),
            status: view.lifecycle,
            state: view.status.as_str().to_owned(),
            since: view.since,
            build: word(view.build.state),
            workload: word(view.workload.state),
            endpoint: word(view.endpoint.state),
            hostnames: view.hostnames.iter().map(ToString::to_string).collect(),
            created_at: view.created_at,
        }
    }
}

/// One service in one environment, with what runs there.
#[derive(Debug, SimpleObject)]
pub(crate) struct RunningInstance {
    /// `project.environment.service`.
    id: ID,
    /// The project.
    project_id: ID,
    /// The environment.
    environment: String,
    /// The service.
    service: String,
    /// Whether it is rolled back: then no deployment takes over traffic by itself.
    rolled_back: bool,
    /// The deployment that its traffic goes to.
    main: Option<RunningDeployment>,
    /// The others that run, can run again or are on their way, newest first.
    others: Vec<RunningDeployment>,
}

impl From<views::InstanceView> for RunningInstance {
    fn from(view: views::InstanceView) -> Self {
        Self {
            id: view.id.into(),
            project_id: view.instance.project.to_string().into(),
            environment: view.instance.environment.to_string(),
            service: view.instance.service.to_string(),
            rolled_back: view.rolled_back,
            main: view.main.map(RunningDeployment::from),
            others: view.others.into_iter().map(Into::into).collect(),
        }
    }
}

/// What runs where, at one position of the ledger.
#[derive(Debug, SimpleObject)]
pub(crate) struct State {
    /// The service instances with their deployments.
    pub(super) instances: Vec<RunningInstance>,
    /// Where the list goes on (`after`); null at its end.
    pub(super) next: Option<String>,
    /// It is so at this position.
    pub(super) position: LogPosition,
    /// The hash over the states of all aggregates there. A replay to that position gives the same
    /// one. Null while it is being worked out.
    pub(super) state_hash: Option<String>,
}

/// Who did what, when, why, and what led to it.
#[derive(Debug, SimpleObject)]
pub(crate) struct AuditEntry {
    /// Position of the event: what a receipt or an inclusion proof is asked for.
    position: LogPosition,
    /// Whether a signed head covers it.
    signed: bool,
    /// Id of the event; null if it could not be read.
    id: Option<ID>,
    /// When it happened.
    time: Timestamp,
    /// Who did it.
    actor: String,
    /// The event's type.
    kind: String,
    /// The aggregate: `shop/production/deployment/<id>`.
    subject: String,
    /// Revision of the aggregate that the event claims.
    revision: u32,
    /// The project.
    project_id: Option<ID>,
    /// The environment.
    environment: Option<String>,
    /// The service.
    service: Option<String>,
    /// The deployment.
    deployment: Option<ID>,
    /// What happened, in one sentence.
    summary: String,
    /// Why, in the words of whoever did it.
    reason: Option<String>,
    /// The event that directly led to it.
    cause: Option<ID>,
    /// The request or run that it belongs to.
    correlation: Option<ID>,
    /// Why it changed nothing, if so.
    void: Option<String>,
}

impl AuditEntry {
    /// A row, with how many events the newest signed head covers.
    pub(super) fn new(row: AuditRow, signed: u64) -> Self {
        Self {
            position: row.position.into(),
            signed: row.position.0 <= signed,
            id: row.id.map(|id| id.to_string().into()),
            time: row.time,
            actor: row.actor.id,
            kind: row.kind,
            subject: row.subject,
            revision: row.revision,
            project_id: row.project.map(|p| p.to_string().into()),
            environment: row.environment.map(|e| e.to_string()),
            service: row.service.map(|s| s.to_string()),
            deployment: row.deployment.map(|d| d.to_string().into()),
            summary: row.summary,
            reason: row.reason,
            cause: row.cause.map(|id| id.to_string().into()),
            correlation: row.correlation.map(|id| id.to_string().into()),
            void: row.void.map(|v| v.message),
        }
    }
}

/// A signed head of the transparency log.
#[derive(Debug, SimpleObject)]
pub(crate) struct SignedHead {
    /// How many events it covers.
    pub(super) size: LogPosition,
    /// The root of the tree over them: `sha256:…`.
    pub(super) root: String,
    /// When it was published.
    pub(super) published_at: Timestamp,
}

/// A page of the audit, newest first.
#[derive(Debug, SimpleObject)]
pub(crate) struct AuditPage {
    /// One entry for each event.
    pub(super) entries: Vec<AuditEntry>,
    /// Where the list goes on (`after`); null at its end.
    pub(super) next: Option<String>,
    /// The list shows the ledger up to here.
    pub(super) position: LogPosition,
    /// The newest signed head; null where nothing is signed.
    pub(super) signed: Option<SignedHead>,
}

/// What the ledger is, and how far it is signed.
#[derive(Debug, SimpleObject)]
pub(crate) struct Ledger {
    /// Identifies the very log; it changes when the log is made anew.
    identity: Option<String>,
    /// Position of its last event.
    head: Option<LogPosition>,
    /// The events up to here are folded.
    position: LogPosition,
    /// What an acknowledged event survives: `synced`, `buffered`, `unknown`.
    durability: String,
    /// The newest signed head; null before the first.
    signed: Option<SignedHead>,
    /// Whether the log still is what was signed: `sound`, `unknown`, `doubted` or `broken`.
    condition: String,
    /// What an operator should know.
    warnings: Vec<String>,
}

impl From<LedgerReport> for Ledger {
    fn from(report: LedgerReport) -> Self {
        let condition = match report.condition {
            ConditionReport::Sound {} => "sound",
            ConditionReport::Unknown { .. } => "unknown",
            ConditionReport::Doubted { .. } => "doubted",
            ConditionReport::Broken { .. } => "broken",
        };
        Self {
            identity: report.identity,
            head: report.head.map(LogPosition),
            position: report.position.into(),
            durability: report.durability,
            signed: report.signed.map(|s| SignedHead {
                size: Position(s.size).into(),
                root: s.root.to_string(),
                published_at: s.published_at,
            }),
            condition: condition.to_owned(),
            warnings: report.warnings,
        }
    }
}

/// An event as it is stored.
#[derive(Debug, SimpleObject)]
pub(crate) struct Event {
    /// Its position.
    position: LogPosition,
    /// Its subject on the log.
    subject: String,
    /// When the log stored it.
    stored_at: Timestamp,
    /// The stored CloudEvent; null if what is stored is none. Its exact bytes are at
    /// `/api/v1/events/<position>`.
    event: Option<Json<serde_json::Value>>,
    /// Its leaf hash in the transparency log: `sha256:…`; only over a subscription.
    leaf_hash: Option<String>,
    /// The value of the feed's hash chain after it; only over a subscription.
    chain: Option<String>,
}

impl From<StoredEvent> for Event {
    fn from(stored: StoredEvent) -> Self {
        let event = stored.event.as_deref();
        Self {
            position: stored.position.into(),
            subject: stored.subject,
            stored_at: stored.stored_at,
            event: event.and_then(|e| serde_json::from_str(e.get()).ok()),
            leaf_hash: None,
            chain: None,
        }
    }
}

impl Event {
    /// An event of a feed, with the value of its chain.
    pub(super) fn of_feed(recorded: &Recorded, chain: String) -> Self {
        Self {
            leaf_hash: Some(Digest::from_sha256(&leaf_hash(&recorded.bytes)).to_string()),
            chain: Some(chain),
            ..StoredEvent::from(recorded).into()
        }
    }
}

/// A page of events, oldest first.
#[derive(Debug, SimpleObject)]
pub(crate) struct EventPage {
    /// The events.
    pub(super) events: Vec<Event>,
    /// The next page is after this position.
    pub(super) next_after: LogPosition,
    /// Position of the last event of the log.
    pub(super) head: LogPosition,
}

/// One line of output.
#[derive(Debug, SimpleObject)]
pub(crate) struct LogLine {
    /// Lines after this one are asked for with `after`.
    pub(super) cursor: String,
    /// When it was printed.
    pub(super) time: Timestamp,
    /// What it is: `build`, `container`, `status`, `platform`.
    #[graphql(name = "type")]
    pub(super) kind: String,
    /// `DEBUG`, `INFO`, `WARN` or `ERROR`, as far as the text says so; `INFO` otherwise.
    pub(super) level: String,
    /// Where it was printed.
    pub(super) cluster: Option<String>,
    /// The instance that printed it.
    pub(super) instance: Option<String>,
    /// The text.
    pub(super) text: String,
}
