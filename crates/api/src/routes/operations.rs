//! What operators and their tools ask: does it run, is it ready, how does it do.

use std::collections::BTreeMap;

use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use daybook_events::deployment::Status;
use daybook_events::tree::{Breach, TreeCondition};
use jiff::Timestamp;

use crate::answer::Answer;
use crate::extract::{NoParams, Params};
use crate::metrics::Exposition;
use crate::problem::Problem;
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

/// How far the projections are, and a digest over all their rows. Whoever folds the same events
/// anew gets the same digest: what this server answers follows from its ledger, and nothing else.
#[utoipa::path(get, path = "/api/v1/projections", tag = "history",
    responses((status = 200, description = "How far they are.", body = ProjectionsReport)))]
pub(crate) async fn projections(
    State(state): State<AppState>,
    Params(NoParams {}): Params<NoParams>,
) -> Result<Answer<ProjectionsReport>, Problem> {
    let projections = state.projections().clone();
    // Every row is read: not on a thread that others wait for.
    let digest = tokio::task::spawn_blocking(move || {
        let counters = projections.counters();
        projections
            .digest()
            .map(|(position, digest)| (position, digest, counters))
    });
    let (position, digest, counters) = digest.await.map_err(|e| Problem::internal(&e))??;
    Ok(Answer::ok(ProjectionsReport {
        position,
        digest,
        state_hash: state.projections().recent_state_hash(position),
        counters,
    }))
}

/// Whether the server can do its work, and if not, which part cannot.
#[utoipa::path(get, path = "/readyz", tag = "operations", responses(
    (status = 200, description = "It is ready.", body = ReadinessReport),
    (status = 503, description = "A part is not ready.", body = ReadinessReport)))]
pub(crate) async fn readyz(
    State(state): State<AppState>,
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
    let mut response = Answer::ok(ReadinessReport { ready, parts }).into_response();
    if !ready {
        *response.status_mut() = StatusCode::SERVICE_UNAVAILABLE;
    }
    response
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
            ("broken", matches!(condition, TreeCondition::Broken(_))),
        ];
        for (name, holds) in states {
            let value = f64::from(u8::from(holds));
            page.sample("daybook_ledger_condition", &[("state", name)], value);
        }
    }
    let mut by_status = BTreeMap::<Status, u64>::new();
    for row in projections.active_deployments(None, None)? {
        *by_status.entry(row.state.status).or_default() += 1;
    }
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
    state.metrics.write(&mut page);
    let headers = [(header::CONTENT_TYPE, Exposition::MEDIA_TYPE)];
    Ok((headers, page.into_text()).into_response())
}
