//! What operators and their tools ask: does it run, is it ready, how does it do.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use axum::extract::State;
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::{IntoResponse, Response};
use daybook_events::deployment::{Plane, PlaneState, Status};
use daybook_events::tree::{Breach, TreeCondition};
use daybook_events::{Digest, Hostname, Position};
use daybook_projections::{Counters, DeploymentRow, Projections, QueryError};
use jiff::Timestamp;
use tokio::sync::Mutex;

use crate::access::{Over, Verb, authorise};
use crate::answer::Answer;
use crate::extract::{NoParams, Params};
use crate::metrics::{Exposition, write_link, write_work};
use crate::problem::Problem;
use crate::queue;
use crate::state::{AppState, Part};
use crate::view::{Health, ProjectionsReport, ReadinessReport};

/// Projections that are at most this many events behind are ready.
const LAG_MAX: u64 = 1000;

/// Whether the process runs. Says nothing of what it depends on.
#[utoipa::path(get, path = "/healthz", tag = "operations",
    responses((status = 200, description = "It runs.", body = Health)))]
pub(crate) async fn healthz(Params(NoParams {}): Params<NoParams>) -> Answer<Health> {
    Answer::ok(Health {
        status: "ok",
        version: env!("CARGO_PKG_VERSION"),
    })
}

/// The newest digest over all rows, and who works out the next one.
#[derive(Debug, Default)]
pub(crate) struct Rows {
    /// Held by whoever reads all rows: one at a time, however many ask.
    newest: Arc<Mutex<Option<RowsDigest>>>,
    /// How often all rows were read.
    read: AtomicU64,
}

#[derive(Debug, Clone)]
struct RowsDigest {
    position: Position,
    digest: Digest,
    counters: Counters,
}

impl Rows {
    async fn digest(&self, projections: &Projections) -> Result<RowsDigest, Problem> {
        let mut newest = self.newest.clone().lock_owned().await;
        if let Some(known) = newest.clone()
            && known.position == projections.position()
        {
            return Ok(known);
        }
        self.read.fetch_add(1, Ordering::Relaxed);
        let projections = projections.clone();
        // Every row is read: not on a thread that others wait for. It goes on when the request is
        // given up, and so does the lock.
        let read = tokio::task::spawn_blocking(move || {
            let counters = projections.counters();
            let (position, digest) = projections.digest()?;
            let read = RowsDigest {
                position,
                digest,
                counters,
            };
            *newest = Some(read.clone());
            Ok::<_, QueryError>(read)
        });
        Ok(read.await.map_err(|e| Problem::internal(&e))??)
    }
}

/// How far the projections are, and a digest over all their rows. Whoever folds the same events
/// anew gets the same digest: what this server answers follows from its ledger, and nothing else.
#[utoipa::path(get, path = "/api/v1/projections", tag = "history",
    responses((status = 200, description = "How far they are.", body = ProjectionsReport)))]
pub(crate) async fn projections(
    State(state): State<AppState>,
    Params(NoParams {}): Params<NoParams>,
) -> Result<Answer<ProjectionsReport>, Problem> {
    let RowsDigest {
        position,
        digest,
        counters,
    } = state.rows.digest(state.projections()).await?;
    Ok(Answer::ok(ProjectionsReport {
        position,
        digest,
        state_hash: state.projections().recent_state_hash(position),
        counters,
    }))
}

/// Whether the server can do its work, and if not, which part cannot. Why is said to whoever may see
/// the figures, as it names hosts and folders; where nobody is asked, to everybody.
#[utoipa::path(get, path = "/readyz", tag = "operations", responses(
    (status = 200, description = "It is ready.", body = ReadinessReport),
    (status = 503, description = "A part is not ready.", body = ReadinessReport)))]
pub(crate) async fn readyz(
    State(state): State<AppState>,
    headers: HeaderMap,
    Params(NoParams {}): Params<NoParams>,
) -> Response {
    let mut parts = vec![];
    let part = |name: &str, reason: Option<String>| Part {
        name: name.to_owned(),
        ready: reason.is_none(),
        reason,
        since: Timestamp::now(),
    };
    match state.commands.ledger().log().head().await {
        Ok(head) => {
            let lag = head.0.saturating_sub(state.projections().position().0);
            let behind = (lag > LAG_MAX).then(|| format!("{lag} events are not folded yet"));
            parts.push(part("log", None));
            // Nothing stops for an event that cannot be read, but somebody should look at it.
            let unreadable = state.projections().counters().unreadable;
            let set_aside = (unreadable > 0).then(|| {
                format!(
                    "{unreadable} events cannot be read and are set aside; \
                     GET /api/v1/audit?void=true lists them"
                )
            });
            parts.push(Part {
                reason: behind.clone().or(set_aside),
                ..part("projections", behind)
            });
        }
        Err(e) => parts.push(part("log", Some(e.to_string()))),
    }
    if state.cancel.is_cancelled() {
        parts.push(part("server", Some("it is shutting down".to_owned())));
    }
    if let Some(tree) = &state.tree {
        // A notary that is not heard of is no reason to refuse work: it catches up.
        parts.push(match tree.condition() {
            TreeCondition::Sound => part("ledger", None),
            TreeCondition::Unknown(reason) => Part {
                reason: Some(reason),
                ..part("ledger", None)
            },
            TreeCondition::Doubted(reason) => part("ledger", Some(reason)),
            TreeCondition::Broken(breach) => {
                let Breach {
                    code,
                    message,
                    remedy,
                    ..
                } = breach;
                part("ledger", Some(format!("{code}: {message}; {remedy}")))
            }
        });
    }
    parts.extend(state.parts.all());
    let ready = parts.iter().all(|p| p.ready);
    // It is asked without credentials most of the time, and one that is no good is as good as none.
    let asks = state.access.recognise(&headers, false).await;
    if !asks.is_ok_and(|who| authorise(&who, Verb::Oversee, Over::Everything).is_ok()) {
        for part in &mut parts {
            part.reason = None;
        }
    }
    let mut response = Answer::ok(ReadinessReport { ready, parts }).into_response();
    if !ready {
        *response.status_mut() = StatusCode::SERVICE_UNAVAILABLE;
    }
    response
}

/// What addresses are like from where users are.
#[derive(Default)]
struct Addresses {
    planes: BTreeMap<(Hostname, Plane), PlaneState>,
    /// In seconds since 1970.
    certificates: BTreeMap<Hostname, i64>,
}

impl Addresses {
    fn see(&mut self, row: &DeploymentRow) {
        for (hostname, planes) in row.state.planes.iter() {
            for known in planes.iter() {
                let plane = (hostname.clone(), known.seen.plane);
                let shown = self.planes.entry(plane).or_insert(known.seen.state);
                // An address that several deployments share is as bad as the worst of it.
                if known.seen.state.is_bad() {
                    *shown = known.seen.state;
                }
                if let Some(expires) = known.seen.expires {
                    let expires = expires.as_second();
                    let first = self.certificates.entry(hostname.clone());
                    let first = first.or_insert(expires);
                    *first = expires.min(*first);
                }
            }
        }
    }

    fn write(&self, page: &mut Exposition) {
        let name = "daybook_endpoint_plane_ok";
        page.head(
            name,
            "gauge",
            "Whether a plane of an address is as it should be from where users are; nothing where \
             that is not known.",
        );
        for ((hostname, plane), state) in &self.planes {
            let labels = [("hostname", hostname.as_str()), ("plane", plane.as_str())];
            if *state != PlaneState::Unknown {
                let ok = f64::from(u8::from(*state == PlaneState::Ok));
                page.sample(name, &labels, ok);
            }
        }
        let name = "daybook_endpoint_certificate_expiry_seconds";
        page.head(
            name,
            "gauge",
            "When the certificate of an address ends that was shown last, in seconds since 1970.",
        );
        for (hostname, expires) in &self.certificates {
            page.sample(name, &[("hostname", hostname.as_str())], *expires as f64);
        }
    }
}

/// Writes how the webhooks are, whoever looks after them.
fn write_webhooks(page: &mut Exposition, projections: &Projections) -> Result<(), QueryError> {
    let mut all = projections.subscriptions(None)?;
    all.retain(|(_, webhook)| !webhook.deleted);
    let paused = all.iter().filter(|(_, w)| w.pause.is_some()).count();
    let name = "daybook_webhooks";
    page.head(
        name,
        "gauge",
        "Webhooks by whether events are sent to them.",
    );
    let active = (all.len() - paused) as f64;
    page.sample(name, &[("state", "active")], active);
    page.sample(name, &[("state", "paused")], paused as f64);
    let name = "daybook_webhook_dead_letters";
    page.head(
        name,
        "gauge",
        "Events that were set aside, as a webhook did not take them.",
    );
    for (project, webhook) in &all {
        let id = webhook.id.to_string();
        let labels = [("project", project.as_str()), ("webhook", id.as_str())];
        page.sample(name, &labels, webhook.dead.len() as f64);
    }
    Ok(())
}

/// Figures in the Prometheus text format.
#[utoipa::path(get, path = "/metrics", tag = "operations", responses(
    (status = 200, description = "The figures.", body = String, content_type = "text/plain")))]
pub(crate) async fn metrics(
    State(state): State<AppState>,
    Params(NoParams {}): Params<NoParams>,
) -> Result<Response, Problem> {
    let mut page = Exposition::default();
    let projections = state.projections();
    page.counter(
        "daybook_events_appended_total",
        "Events that commands of this server appended.",
        state.commands.appended() as f64,
    );
    let counters = projections.counters();
    let folded = [
        ("all", counters.events),
        ("void", counters.void),
        ("unknown", counters.unknown),
        ("unreadable", counters.unreadable),
    ];
    page.head(
        "daybook_events_folded_total",
        "counter",
        "Events that the projections have read; those that changed nothing also by their cause.",
    );
    for (outcome, count) in folded {
        page.sample(
            "daybook_events_folded_total",
            &[("outcome", outcome)],
            count as f64,
        );
    }
    let position = projections.position();
    page.counter(
        "daybook_projection_digests_total",
        "How often all rows of the projections were read for a digest over them.",
        state.rows.read.load(Ordering::Relaxed) as f64,
    );
    page.gauge(
        "daybook_projection_position",
        "Position up to which events are folded.",
        position.0 as f64,
    );
    // A log that is away must not hide the other figures.
    if let Ok(head) = state.commands.ledger().log().head().await {
        page.gauge(
            "daybook_log_head_position",
            "Position of the last event of the log.",
            head.0 as f64,
        );
        page.gauge(
            "daybook_projection_lag_events",
            "Events of the log that are not folded yet.",
            head.0.saturating_sub(position.0) as f64,
        );
    }
    if let Some(tree) = &state.tree {
        if let Some(signed) = tree.head() {
            page.gauge(
                "daybook_ledger_signed_size",
                "Events that the newest signed checkpoint covers.",
                signed.head.size as f64,
            );
        }
        let condition = tree.condition();
        page.head(
            "daybook_ledger_condition",
            "gauge",
            "Whether the log is what was signed: 1 for the state that holds.",
        );
        let states = [
            ("sound", condition == TreeCondition::Sound),
            ("unknown", matches!(condition, TreeCondition::Unknown(_))),
            ("doubted", matches!(condition, TreeCondition::Doubted(_))),
            ("broken", matches!(condition, TreeCondition::Broken(_))),
        ];
        for (name, holds) in states {
            let value = f64::from(u8::from(holds));
            page.sample("daybook_ledger_condition", &[("state", name)], value);
        }
    }
    let mut by_status = BTreeMap::<Status, u64>::new();
    let mut addresses = Addresses::default();
    for row in projections.active_deployments(None, None)? {
        *by_status.entry(row.state.status).or_default() += 1;
        addresses.see(&row);
    }
    addresses.write(&mut page);
    page.head(
        "daybook_deployments",
        "gauge",
        "Deployments that run, can run again or are on their way, by state.",
    );
    for (status, count) in by_status {
        page.sample(
            "daybook_deployments",
            &[("state", status.as_str())],
            count as f64,
        );
    }
    let now = Timestamp::now();
    queue::count(projections)?.write(&mut page, now);
    write_webhooks(&mut page, projections)?;
    write_work(&mut page, now);
    if let Some(link) = state.commands.ledger().log().link() {
        write_link(&mut page, link);
    }
    state.metrics.write(&mut page);
    let headers = [(header::CONTENT_TYPE, Exposition::MEDIA_TYPE)];
    Ok((headers, page.into_text()).into_response())
}
