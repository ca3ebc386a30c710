//! What waits to be allowed, and who allows it.

use axum::extract::State;
use daybook_events::approval::{ApprovalRejected, Emergency, Grant, Plan};
use daybook_events::deployment::Status;
use daybook_events::{DeploymentId, Digest, EnvironmentName, FreezeName, ProjectName};
use daybook_projections::DeploymentRow;
use jiff::Timestamp;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use utoipa::IntoParams;

use crate::access::Principal;
use crate::answer::Answer;
use crate::commands::Verdict;
use crate::commands::approval;
use crate::extract::{Command, CommandBody, Named, NoParams, Params};
use crate::problem::Problem;
use crate::routes::deployments::Why;
use crate::state::AppState;
use crate::view::OperationAccepted;

type Handled<T> = Result<Answer<T>, Problem>;

/// Which are listed.
#[derive(Debug, Default, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
#[serde(deny_unknown_fields)]
pub(crate) struct ApprovalQuery {
    /// Of this project.
    pub(crate) project: Option<String>,
    /// Of this environment.
    pub(crate) environment: Option<String>,
}

/// A deployment's approvals.
#[derive(Debug, Serialize, JsonSchema)]
pub(crate) struct ApprovalDetail {
    /// The deployment.
    pub(crate) id: DeploymentId,
    /// `project.environment.service`.
    pub(crate) instance_id: String,
    /// Where the deployment is.
    pub(crate) state: Status,
    /// The hash that names the plan: what is granted is granted to it.
    pub(crate) hash: Digest,
    /// Exactly what will be made so.
    pub(crate) plan: Plan,
    /// Who asked for the deployment.
    pub(crate) requester: String,
    /// Who wrote the commit of the source.
    pub(crate) author: Option<String>,
    /// Since when it is asked for.
    pub(crate) since: Timestamp,
    /// When it is too late; none for never.
    pub(crate) expires: Option<Timestamp>,
    /// Who has allowed this plan.
    pub(crate) grants: Vec<Grant>,
    /// Who has not.
    pub(crate) rejected: Option<ApprovalRejected>,
    /// Who went ahead without, and who looked at that later.
    pub(crate) emergency: Option<Emergency>,
    /// Whether it waits to be allowed.
    pub(crate) waits: bool,
    /// Whether an emergency waits to be reviewed.
    pub(crate) to_review: bool,
}

/// What waits to be allowed or to be reviewed.
#[derive(Debug, Serialize, JsonSchema)]
pub(crate) struct ApprovalList {
    /// Newest first.
    pub(crate) approvals: Vec<ApprovalDetail>,
    /// What was let through a freeze in an emergency, and waits to be reviewed, newest first.
    pub(crate) let_through: Vec<LetThrough>,
}

/// A deployment that somebody let through a freeze, which nobody has reviewed yet.
#[derive(Debug, Serialize, JsonSchema)]
pub(crate) struct LetThrough {
    /// The deployment.
    pub(crate) id: DeploymentId,
    /// `project.environment.service`.
    pub(crate) instance_id: String,
    /// The window that held it.
    pub(crate) freeze: FreezeName,
    /// Who let it through, and why.
    pub(crate) emergency: Emergency,
}

impl LetThrough {
    fn of(row: &DeploymentRow) -> Option<Self> {
        let hold = row.state.hold.as_ref().filter(|h| h.needs_review())?;
        Some(Self {
            id: row.id,
            instance_id: row.state.request.instance.to_string(),
            freeze: hold.freeze.clone(),
            emergency: hold.emergency.clone()?,
        })
    }
}

/// A plan that is allowed, or gone ahead with.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct DecideOnPlan {
    /// The hash of the plan: if it is another one by then, nothing is done.
    hash: String,
    /// Why.
    reason: Option<String>,
}
impl CommandBody for DecideOnPlan {}

pub(crate) fn detail(row: &DeploymentRow) -> Result<ApprovalDetail, Problem> {
    let approval = approval(&row.state)?;
    Ok(ApprovalDetail {
        id: row.id,
        instance_id: row.state.request.instance.to_string(),
        state: row.state.status,
        hash: approval.hash.clone(),
        plan: approval.plan.clone(),
        requester: approval.requester.clone(),
        author: approval.author.clone(),
        since: approval.since,
        expires: approval.expires,
        grants: approval.grants.clone(),
        rejected: approval.rejected.clone(),
        emergency: approval.emergency.clone(),
        waits: row.state.status == Status::AwaitingApproval,
        to_review: approval.needs_review(),
    })
}

/// What waits to be allowed, and emergencies that wait to be reviewed, newest first.
#[utoipa::path(get, path = "/api/v1/approvals", tag = "approvals", params(ApprovalQuery),
    responses((status = 200, description = "What waits.", body = ApprovalList)))]
pub(crate) async fn list_approvals(
    State(state): State<AppState>,
    principal: Principal,
    Params(query): Params<ApprovalQuery>,
) -> Handled<ApprovalList> {
    let project = query.project.map(ProjectName::parse).transpose()?;
    let environment = query.environment.map(EnvironmentName::parse).transpose()?;
    let mut rows = state
        .projections()
        .active_deployments(project.as_ref(), None)?;
    rows.retain(|row| {
        let of = &row.state.request.instance;
        principal.sees(&of.project) && environment.as_ref().is_none_or(|e| *e == of.environment)
    });
    let let_through = rows.iter().filter_map(LetThrough::of).collect();
    rows.retain(|row| {
        let approval = row.state.approval.as_ref();
        row.state.status == Status::AwaitingApproval || approval.is_some_and(|a| a.needs_review())
    });
    let approvals = rows.iter().map(detail).collect::<Result<_, _>>()?;
    Ok(Answer::ok(ApprovalList {
        approvals,
        let_through,
    }))
}

/// The plan of a deployment, and who has allowed it.
#[utoipa::path(get, path = "/api/v1/deployments/{id}/approval", tag = "approvals",
    params(("id" = String, Path, description = "The deployment.")),
    responses((status = 200, description = "Its plan.", body = ApprovalDetail)))]
pub(crate) async fn get_approval(
    State(state): State<AppState>,
    Named(id): Named<DeploymentId>,
    Params(NoParams {}): Params<NoParams>,
) -> Handled<ApprovalDetail> {
    Ok(Answer::ok(detail(&state.commands.deployment(id)?)?))
}

async fn decide(
    state: &AppState,
    id: DeploymentId,
    verdict: Verdict,
    caller: &crate::commands::Caller,
    reason: Option<String>,
) -> Handled<OperationAccepted> {
    let status = verdict.leads_to();
    let commands = &state.commands;
    let operated = commands
        .decide_approval(caller, id, verdict, reason)
        .await?;
    let body = OperationAccepted { id, status };
    Ok(Answer::done(&operated.done, body))
}

/// Allows a plan. Neither who asked for the deployment nor who wrote its commit can.
#[utoipa::path(post, path = "/api/v1/deployments/{id}/approve", tag = "approvals",
    params(("id" = String, Path, description = "The deployment.")),
    request_body = DecideOnPlan,
    responses((status = 200, description = "It is allowed by one more.", body = OperationAccepted)))]
pub(crate) async fn approve_deployment(
    State(state): State<AppState>,
    Named(id): Named<DeploymentId>,
    Params(NoParams {}): Params<NoParams>,
    Command { caller, body }: Command<DecideOnPlan>,
) -> Handled<OperationAccepted> {
    let verdict = Verdict::Approve(Digest::parse(body.hash)?);
    decide(&state, id, verdict, &caller, body.reason).await
}

/// Does not allow a plan. Its deployment fails, with who and why.
#[utoipa::path(post, path = "/api/v1/deployments/{id}/reject", tag = "approvals",
    params(("id" = String, Path, description = "The deployment.")),
    request_body = Why,
    responses((status = 200, description = "It is rejected.", body = OperationAccepted)))]
pub(crate) async fn reject_deployment(
    State(state): State<AppState>,
    Named(id): Named<DeploymentId>,
    Params(NoParams {}): Params<NoParams>,
    Command { caller, body }: Command<Why>,
) -> Handled<OperationAccepted> {
    decide(&state, id, Verdict::Reject, &caller, body.reason).await
}

/// Goes ahead without approvals, because it cannot wait. Somebody else has to review that later.
#[utoipa::path(post, path = "/api/v1/deployments/{id}/override", tag = "approvals",
    params(("id" = String, Path, description = "The deployment.")),
    request_body = DecideOnPlan,
    responses((status = 200, description = "It goes ahead.", body = OperationAccepted)))]
pub(crate) async fn override_deployment(
    State(state): State<AppState>,
    Named(id): Named<DeploymentId>,
    Params(NoParams {}): Params<NoParams>,
    Command { caller, body }: Command<DecideOnPlan>,
) -> Handled<OperationAccepted> {
    let verdict = Verdict::Override(Digest::parse(body.hash)?);
    decide(&state, id, verdict, &caller, body.reason).await
}

/// Says that what was done in an emergency was looked at.
#[utoipa::path(post, path = "/api/v1/deployments/{id}/review", tag = "approvals",
    params(("id" = String, Path, description = "The deployment.")),
    request_body = Option<Why>,
    responses((status = 200, description = "It is reviewed.", body = OperationAccepted)))]
pub(crate) async fn review_deployment(
    State(state): State<AppState>,
    Named(id): Named<DeploymentId>,
    Params(NoParams {}): Params<NoParams>,
    Command { caller, body }: Command<Why>,
) -> Handled<OperationAccepted> {
    decide(&state, id, Verdict::Review, &caller, body.reason).await
}
