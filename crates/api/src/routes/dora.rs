//! The measures of software delivery.

use axum::extract::State;
use axum::http::StatusCode;
use daybook_events::{EnvironmentName, Position, ProjectName, ServiceName};
use daybook_projections::dora::{Delivery, Period, Scope};
use jiff::{SignedDuration, Timestamp};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use utoipa::IntoParams;

use super::history::time;
use crate::access::Principal;
use crate::answer::Answer;
use crate::extract::Params;
use crate::problem::Problem;
use crate::state::AppState;

/// The period if none is given: thirty days.
const USUAL: SignedDuration = SignedDuration::from_hours(30 * 24);

/// Of what, and for when.
#[derive(Debug, Default, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
#[serde(deny_unknown_fields)]
pub(crate) struct DoraQuery {
    /// Of this project.
    pub(crate) project: Option<String>,
    /// Of this environment.
    pub(crate) environment: Option<String>,
    /// Of this service.
    pub(crate) service: Option<String>,
    /// From this time on (RFC 3339); thirty days before `until` if not given.
    pub(crate) from: Option<String>,
    /// Before this time (RFC 3339); now if not given.
    pub(crate) until: Option<String>,
}

/// The measures of software delivery in a period.
#[derive(Debug, Serialize, JsonSchema)]
pub(crate) struct DoraView {
    /// From this time on.
    pub(crate) from: Timestamp,
    /// Before this time.
    pub(crate) until: Timestamp,
    /// One for each service instance of which anything was counted.
    pub(crate) instances: Vec<Delivery>,
    /// Events up to here were counted.
    pub(crate) position: Position,
}

/// Deployment frequency, lead time, change failure rate and time to restore of each service
/// instance, with the events that they were counted from. `daybook audit report dora` counts the
/// same from an export.
#[utoipa::path(get, path = "/api/v1/dora", tag = "history", params(DoraQuery),
    responses((status = 200, description = "The measures.", body = DoraView)))]
pub(crate) async fn get_dora(
    State(state): State<AppState>,
    principal: Principal,
    Params(query): Params<DoraQuery>,
) -> Result<Answer<DoraView>, Problem> {
    let to = time("until", query.until)?.unwrap_or_else(Timestamp::now);
    let from = match time("from", query.from)? {
        Some(from) => from,
        None => to.checked_sub(USUAL).unwrap_or(Timestamp::MIN),
    };
    if from >= to {
        return Err(Problem::new(
            StatusCode::UNPROCESSABLE_ENTITY,
            "invalid_period",
            format!("there is no time between {from} and {to}"),
            "give a `from` that is before `until`",
        ));
    }
    let scope = Scope {
        visible: principal.visible().clone(),
        project: query.project.map(ProjectName::parse).transpose()?,
        environment: query.environment.map(EnvironmentName::parse).transpose()?,
        service: query.service.map(ServiceName::parse).transpose()?,
    };
    if let Some(project) = &scope.project {
        state.commands.project_seen(&principal, project)?;
    }
    let period = Period { from, to };
    let (instances, position) = state.commands.ledger().deliveries(&scope, period).await?;
    Ok(Answer::ok(DoraView {
        from,
        until: to,
        instances,
        position,
    }))
}
