//! Hostnames that their owners bring along.

use axum::extract::State;
use daybook_events::domain::{Claim, Domain};
use daybook_events::routing::{Routing, Stickiness};
use daybook_events::{Hostname, ProjectName, Refusal};
use jiff::Timestamp;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::answer::Answer;
use crate::extract::{Command, CommandBody, Named, NoParams, Params};
use crate::problem::Problem;
use crate::routes::secrets::Nothing;
use crate::state::AppState;

type Handled<T> = Result<Answer<T>, Problem>;

/// A hostname and the instance that it is to lead to.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct ClaimDomain {
    /// The hostname, such as `www.example.com`.
    hostname: String,
    /// `project.environment.service`.
    instance_id: String,
}
impl CommandBody for ClaimDomain {}

/// Where a claimed hostname is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub(crate) enum DomainStatus {
    /// It is claimed, and not in the route table yet.
    Claimed,
    /// It is in the route table: it leads where the main deployment is.
    Routed,
    /// It is being given up.
    Releasing,
}

/// A hostname that a project brought along.
#[derive(Debug, Serialize, JsonSchema)]
pub(crate) struct DomainView {
    /// The hostname.
    hostname: Hostname,
    /// Where to open it, once its name leads to the gateway.
    url: String,
    /// `project.environment.service`.
    instance_id: String,
    /// What it sticks to.
    stickiness: Stickiness,
    /// Where it is.
    status: DomainStatus,
    /// Since when it belongs to the project.
    since: Timestamp,
}

/// The hostnames that a project brought along.
#[derive(Debug, Serialize, JsonSchema)]
pub(crate) struct DomainList {
    /// By hostname.
    domains: Vec<DomainView>,
}

fn view(state: &AppState, routing: &Routing, hostname: Hostname, claim: Claim) -> DomainView {
    let routed = routing.domain(&hostname);
    let status = match (claim.releasing, routed) {
        (true, _) => DomainStatus::Releasing,
        (false, Some(_)) => DomainStatus::Routed,
        (false, None) => DomainStatus::Claimed,
    };
    DomainView {
        url: state.settings.gateway.url(&hostname),
        hostname,
        instance_id: claim.instance.to_string(),
        stickiness: claim.stickiness,
        status,
        since: claim.since,
    }
}

/// The hostnames that a project brought along, by name.
#[utoipa::path(get, path = "/api/v1/projects/{project}/domains", tag = "traffic",
    params(("project" = String, Path, description = "The project.")),
    responses((status = 200, description = "The domains.", body = DomainList)))]
pub(crate) async fn list_domains(
    State(state): State<AppState>,
    Named(project): Named<ProjectName>,
    Params(NoParams {}): Params<NoParams>,
) -> Handled<DomainList> {
    let routing = state.commands.routing(&project)?;
    let all = state.projections().domains()?.into_iter();
    let own = all.filter_map(
        |Domain {
             hostname, claim, ..
         }| {
            let claim = claim.filter(|c| c.instance.project == project)?;
            Some(view(&state, &routing, hostname, claim))
        },
    );
    Ok(Answer::ok(DomainList {
        domains: own.collect(),
    }))
}

/// Claims a hostname for a service instance. Nobody else can have it from here on.
#[utoipa::path(post, path = "/api/v1/projects/{project}/domains", tag = "traffic",
    params(("project" = String, Path, description = "The project.")),
    request_body = ClaimDomain,
    responses((status = 202, description = "It belongs to the project, and is being routed.",
        body = DomainView)))]
pub(crate) async fn claim_domain(
    State(state): State<AppState>,
    Named(project): Named<ProjectName>,
    Params(NoParams {}): Params<NoParams>,
    Command { caller, body }: Command<ClaimDomain>,
) -> Handled<DomainView> {
    let hostname = Hostname::parse(body.hostname.to_ascii_lowercase())?;
    let instance: daybook_events::InstanceRef = body.instance_id.parse()?;
    if instance.project != project {
        return Err(Refusal::new(
            "other_project",
            format!("{instance} does not belong to the project {project}"),
            "name the instance's own project",
        )
        .into());
    }
    let commands = &state.commands;
    let done = commands
        .claim_domain(&caller, hostname.clone(), instance)
        .await?;
    found(&state, &project, hostname).map(|view| Answer::done(&done, view).accepted())
}

/// Gives a hostname up. It is taken out of the routes first, and free then.
#[utoipa::path(delete, path = "/api/v1/projects/{project}/domains/{hostname}", tag = "traffic",
    params(
        ("project" = String, Path, description = "The project."),
        ("hostname" = String, Path, description = "The hostname."),
    ),
    responses((status = 202, description = "It is being given up.", body = DomainGivenUp)))]
pub(crate) async fn release_domain(
    State(state): State<AppState>,
    Named((project, hostname)): Named<(ProjectName, Hostname)>,
    Params(NoParams {}): Params<NoParams>,
    Command { caller, .. }: Command<Nothing>,
) -> Handled<DomainGivenUp> {
    let commands = &state.commands;
    let done = commands
        .release_domain(&caller, &project, hostname.clone())
        .await?;
    Ok(Answer::done(&done, DomainGivenUp { hostname }).accepted())
}

/// A hostname is being given up.
#[derive(Debug, Serialize, JsonSchema)]
pub(crate) struct DomainGivenUp {
    /// The hostname.
    hostname: Hostname,
}

fn found(
    state: &AppState,
    project: &ProjectName,
    hostname: Hostname,
) -> Result<DomainView, Problem> {
    let routing = state.commands.routing(project)?;
    let domain = state.projections().domain(&hostname)?;
    let claim = domain.and_then(|d| d.claim);
    let claim = claim.filter(|c| c.instance.project == *project);
    let claim = claim.ok_or_else(|| {
        Refusal::new(
            "domain_not_found",
            format!("the project {project} has no such domain by now"),
            "`daybook domain list` shows the domains of a project",
        )
    })?;
    Ok(view(state, &routing, hostname, claim))
}
