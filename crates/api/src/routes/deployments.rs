//! Deployments and what can be done to them.

use axum::extract::State;
use daybook_events::deployment::{Status, SwitchMode};
use daybook_events::{
    ClusterName, CommitId, DeploymentId, EnvironmentName, InstanceRef, ProjectName, Refusal,
    ServiceName,
};
use daybook_projections::{DeploymentFilter, Page};
use schemars::JsonSchema;
use serde::Deserialize;
use utoipa::IntoParams;

use crate::access::Principal;
use crate::answer::Answer;
use crate::commands::{
    Caller, Deploy, Deployed, First, Lifecycle, Promote, Redeploy, RunOverrides, Switched, What,
};
use crate::extract::{Command, CommandBody, Named, NoParams, Params, deployment_id};
use crate::problem::Problem;
use crate::routes::history::{filter, page};
use crate::state::AppState;
use crate::view::{
    DeploymentAccepted, DeploymentDetail, DeploymentList, MainSwitched, OperationAccepted, Shown,
};

type Handled<T> = Result<Answer<T>, Problem>;

/// Which deployments are listed.
#[derive(Debug, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
#[serde(deny_unknown_fields)]
pub(crate) struct DeploymentQuery {
    /// Of this instance: `project.environment.service`.
    instance_id: Option<String>,
    /// Of this project.
    project: Option<String>,
    /// Of this environment.
    environment: Option<String>,
    /// Of this service.
    service: Option<String>,
    /// In this state, or in one that has this status: `started`, `deploying`, `start_error`. Those
    /// that are put away are listed with `deleted` only.
    status: Option<String>,
    /// Of this version: a ref, image, tag, digest or (abbreviated) commit.
    version: Option<String>,
    /// Most deployments on a page: 1 to 500, 50 if not given.
    limit: Option<u32>,
    /// Where the list goes on: `next` of the page before.
    cursor: Option<String>,
}

/// A deployment to be made: of an instance (`instance_id`, or `project`, `environment` and
/// `service`), of at most one of `version`, `git_ref`, `image`, `chart` and `upload`; without any, of
/// the service's default ref.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct CreateDeployment {
    /// `project.environment.service`.
    pub(crate) instance_id: Option<String>,
    /// The project.
    pub(crate) project: Option<String>,
    /// The environment.
    pub(crate) environment: Option<String>,
    /// The service.
    pub(crate) service: Option<String>,
    /// A branch, tag or commit, or an image reference, tag or digest, as fits the service.
    pub(crate) version: Option<String>,
    /// A branch, tag or commit of the service's source.
    pub(crate) git_ref: Option<String>,
    /// An image reference, or a tag or digest in the service's image repository.
    pub(crate) image: Option<String>,
    /// A Helm chart in its repository, for clusters that render charts:
    /// `https://host/path/name` or `oci://host/path/name`. Needs `chart_version`.
    pub(crate) chart: Option<String>,
    /// The exact version of the chart.
    pub(crate) chart_version: Option<String>,
    /// A commit that was uploaded for the service: `commit` of what POST
    /// /api/v1/projects/{project}/services/{service}/uploads answers.
    pub(crate) upload: Option<String>,
    /// The service's folder in what was uploaded, if it is not the one of its definition.
    pub(crate) upload_path: Option<String>,
    /// The clusters; the environment's if not given.
    #[serde(alias = "cluster_ids")]
    pub(crate) clusters: Option<Vec<String>>,
    /// Whether traffic follows by itself; as the environment says if not given.
    pub(crate) switch: Option<SwitchMode>,
    /// Whether it takes over traffic also where it is ready in some of its clusters only.
    #[serde(default)]
    pub(crate) allow_partial: bool,
    /// What runs differently from the service's definition.
    #[serde(default)]
    pub(crate) run: RunOverrides,
    /// Why.
    pub(crate) reason: Option<String>,
}
impl CommandBody for CreateDeployment {}

/// What is promoted: the main deployment of a service in one environment, or the deployment that is
/// named, to another environment.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct PromoteTo {
    /// The project.
    pub(crate) project: String,
    /// The service.
    pub(crate) service: String,
    /// The environment that has it.
    pub(crate) from: String,
    /// The environment that gets it.
    pub(crate) to: String,
    /// The deployment; the main one if not given.
    pub(crate) deployment: Option<String>,
    /// The clusters; the environment's if not given.
    pub(crate) clusters: Option<Vec<ClusterName>>,
    /// Whether traffic follows by itself; as the environment says if not given.
    pub(crate) switch: Option<SwitchMode>,
    /// Whether it takes over traffic also where it is ready in some of its clusters only.
    #[serde(default)]
    pub(crate) allow_partial: bool,
    /// What runs differently from the service's definition.
    #[serde(default)]
    pub(crate) run: RunOverrides,
    /// Why.
    pub(crate) reason: Option<String>,
}
impl CommandBody for PromoteTo {}

/// Why something is asked for.
#[derive(Debug, Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct Why {
    /// In the caller's words.
    pub(crate) reason: Option<String>,
}
impl CommandBody for Why {
    fn absent() -> Option<Self> {
        Some(Self::default())
    }
}

/// What is tried again.
#[derive(Debug, Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct RetryIn {
    /// The clusters; all where it has failed if not given.
    pub(crate) clusters: Option<Vec<ClusterName>>,
    /// Why.
    pub(crate) reason: Option<String>,
}
impl CommandBody for RetryIn {
    fn absent() -> Option<Self> {
        Some(Self::default())
    }
}

/// A switch of the main deployment.
#[derive(Debug, Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct MarkMain {
    /// What the caller takes for the main deployment now: if it is another one, nothing is done.
    pub(crate) expected_main: Option<String>,
    /// Why.
    pub(crate) reason: Option<String>,
}
impl CommandBody for MarkMain {
    fn absent() -> Option<Self> {
        Some(Self::default())
    }
}

/// How an older deployment is repeated.
#[derive(Debug, Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct RedeployOptions {
    /// Whether traffic follows by itself; as the environment says if not given.
    pub(crate) switch: Option<SwitchMode>,
    /// Why.
    pub(crate) reason: Option<String>,
}
impl CommandBody for RedeployOptions {
    fn absent() -> Option<Self> {
        Some(Self::default())
    }
}

/// Where to go back: an instance (`instance_id`, or `project`, `environment` and `service`), and
/// the deployment, if not the main one before.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct RollbackTo {
    /// `project.environment.service`.
    pub(crate) instance_id: Option<String>,
    /// The project.
    pub(crate) project: Option<String>,
    /// The environment.
    pub(crate) environment: Option<String>,
    /// The service.
    pub(crate) service: Option<String>,
    /// The deployment to go back to; the main one before if not given.
    pub(crate) to: Option<String>,
    /// Whether it is started first if it is stopped. The answer then waits until it is ready, for
    /// half a minute at most: after that it is 409 `target_not_ready`, and the same request with the
    /// same `Idempotency-Key` goes on waiting.
    #[serde(default)]
    pub(crate) start: bool,
    /// Whether what it was made from is deployed once more, and that is gone back to: also where it
    /// was removed. The answer waits until that is ready; under an Idempotency-Key, a repetition goes
    /// on where the first request ended.
    #[serde(default)]
    pub(crate) redeploy: bool,
    /// Why.
    pub(crate) reason: Option<String>,
}
impl CommandBody for RollbackTo {}

/// The instance that a request names, in one of the two ways.
pub(super) fn instance(
    id: Option<String>,
    project: Option<String>,
    environment: Option<String>,
    service: Option<String>,
) -> Result<InstanceRef, Problem> {
    match (id, project, environment, service) {
        (Some(id), None, None, None) => Ok(id.parse()?),
        (None, Some(project), Some(environment), Some(service)) => Ok(InstanceRef {
            project: ProjectName::parse(project)?,
            environment: EnvironmentName::parse(environment)?,
            service: ServiceName::parse(service)?,
        }),
        _ => Err(Refusal::new(
            "instance_required",
            "the request does not name exactly one instance",
            "give instance_id, or project, environment and service, but not both",
        )
        .into()),
    }
}

fn what(body: &mut CreateDeployment) -> Result<What, Problem> {
    let chart = match (body.chart.take(), body.chart_version.take()) {
        (Some(chart), Some(version)) => Some(What::Chart(chart, version)),
        (None, None) => None,
        _ => {
            return Err(Refusal::new(
                "chart_incomplete",
                "a chart and the version of one belong together",
                "give both chart and chart_version, or neither",
            )
            .into());
        }
    };
    let upload = match (body.upload.take(), body.upload_path.take()) {
        (Some(commit), path) => Some(What::Upload(CommitId::parse(commit)?, path)),
        (None, None) => None,
        (None, Some(_)) => {
            return Err(Refusal::new(
                "upload_incomplete",
                "a folder of an upload is named, and no upload",
                "give upload too, or leave upload_path out",
            )
            .into());
        }
    };
    let wishes = [
        upload,
        body.version.take().map(What::Version),
        body.git_ref.take().map(What::GitRef),
        body.image.take().map(What::Image),
        chart,
    ];
    let mut wishes = wishes.into_iter().flatten();
    match (wishes.next(), wishes.next()) {
        (None, _) => Ok(What::Default),
        (Some(what), None) => Ok(what),
        _ => Err(Refusal::new(
            "version_ambiguous",
            "the request names more than one thing to deploy",
            "give one of version, git_ref, image, chart and upload",
        )
        .into()),
    }
}

/// Deployments, newest first.
#[utoipa::path(get, path = "/api/v1/deployments", tag = "deployments", params(DeploymentQuery),
    responses((status = 200, description = "The deployments.", body = DeploymentList)))]
pub(crate) async fn list_deployments(
    State(state): State<AppState>,
    principal: Principal,
    Params(query): Params<DeploymentQuery>,
) -> Handled<DeploymentList> {
    let filter = DeploymentFilter {
        visible: principal.visible().clone(),
        statuses: statuses(query.status.as_deref())?,
        version: query.version,
        ..filter(
            query.instance_id,
            query.project,
            query.environment,
            query.service,
        )?
    };
    let page: Page = page(query.limit, query.cursor.as_deref())?;
    let projections = state.projections();
    let found = projections.deployments(&filter, page)?;
    let mut shown = Shown::new(projections, &state.settings);
    let deployments: Result<_, _> = found.items.iter().map(|row| shown.entry(row)).collect();
    Ok(Answer::ok(DeploymentList {
        deployments: deployments?,
        next: found.next.map(|c| c.to_string()),
    }))
}

/// The states that a word stands for: one state, or all that are shown as one status. Records that
/// are put away are listed only when they are asked for.
fn statuses(word: Option<&str>) -> Result<Vec<Status>, Problem> {
    let kept = Status::ALL.into_iter().filter(|s| *s != Status::Deleted);
    let Some(word) = word else {
        return Ok(kept.collect());
    };
    let mut found: Vec<_> = kept.filter(|s| s.lifecycle() == word).collect();
    found.extend(Status::ALL.into_iter().filter(|s| s.as_str() == word));
    if found.is_empty() {
        let words: Vec<_> = Status::ALL.iter().map(|s| s.as_str()).collect();
        return Err(Refusal::new(
            "unknown_status",
            "there is no such status",
            format!("use one of: {}", words.join(", ")),
        )
        .into());
    }
    Ok(found)
}

/// Requests a deployment. It is queued, and workers carry it out.
#[utoipa::path(post, path = "/api/v1/deployments", tag = "deployments",
    request_body = CreateDeployment,
    responses((status = 201, description = "It is queued.", body = DeploymentAccepted)))]
pub(crate) async fn create_deployment(
    State(state): State<AppState>,
    Params(NoParams {}): Params<NoParams>,
    Command { caller, body }: Command<CreateDeployment>,
) -> Handled<DeploymentAccepted> {
    let (deployed, instance) = deploy(&state, &caller, body).await?;
    Ok(accepted(&deployed, &instance))
}

/// Requests a deployment as a body says it.
pub(crate) async fn deploy(
    state: &AppState,
    caller: &Caller,
    mut body: CreateDeployment,
) -> Result<(Deployed, InstanceRef), Problem> {
    let what = what(&mut body)?;
    let instance = instance(
        body.instance_id,
        body.project,
        body.environment,
        body.service,
    )?;
    let clusters = body.clusters.map(|names| {
        let names = names.into_iter().map(ClusterName::parse);
        names.collect::<Result<Vec<_>, _>>()
    });
    let wish = Deploy {
        instance: instance.clone(),
        what,
        clusters: clusters.transpose()?,
        switch: body.switch,
        allow_partial: body.allow_partial,
        run: body.run,
        reason: body.reason,
    };
    let deployed = state.commands.deploy(caller, wish).await?;
    Ok((deployed, instance))
}

pub(crate) fn accepted(deployed: &Deployed, instance: &InstanceRef) -> Answer<DeploymentAccepted> {
    let body = DeploymentAccepted {
        id: deployed.id,
        status: "queued",
        instance_id: instance.to_string(),
    };
    Answer::done(&deployed.done, body).created(format!("/api/v1/deployments/{}", deployed.id))
}

/// Everything that is known of a deployment.
#[utoipa::path(get, path = "/api/v1/deployments/{id}", tag = "deployments",
    params(("id" = String, Path, description = "The deployment.")),
    responses((status = 200, description = "The deployment.", body = DeploymentDetail)))]
pub(crate) async fn get_deployment(
    State(state): State<AppState>,
    Named(id): Named<DeploymentId>,
    Params(NoParams {}): Params<NoParams>,
) -> Handled<DeploymentDetail> {
    let row = state.commands.deployment(id)?;
    let mut shown = Shown::new(state.projections(), &state.settings);
    Ok(Answer::ok(shown.detail(&row)?))
}

async fn operate(
    state: &AppState,
    id: DeploymentId,
    operation: Lifecycle,
    command: Command<Why>,
) -> Handled<OperationAccepted> {
    let Command { caller, body } = command;
    let operated = state
        .commands
        .operate(&caller, id, operation, body.reason)
        .await?;
    let body = OperationAccepted {
        id,
        status: operation.leads_to(),
    };
    Ok(Answer::done(&operated.done, body))
}

/// Scales a running deployment to zero. It can be started again.
#[utoipa::path(post, path = "/api/v1/deployments/{id}/stop", tag = "deployments",
    params(("id" = String, Path, description = "The deployment.")),
    request_body = Option<Why>,
    responses((status = 200, description = "It is being stopped.", body = OperationAccepted)))]
pub(crate) async fn stop_deployment(
    State(state): State<AppState>,
    Named(id): Named<DeploymentId>,
    Params(NoParams {}): Params<NoParams>,
    command: Command<Why>,
) -> Handled<OperationAccepted> {
    operate(&state, id, Lifecycle::Stop, command).await
}

/// Starts a stopped deployment again.
#[utoipa::path(post, path = "/api/v1/deployments/{id}/start", tag = "deployments",
    params(("id" = String, Path, description = "The deployment.")),
    request_body = Option<Why>,
    responses((status = 200, description = "It is being started.", body = OperationAccepted)))]
pub(crate) async fn start_deployment(
    State(state): State<AppState>,
    Named(id): Named<DeploymentId>,
    Params(NoParams {}): Params<NoParams>,
    command: Command<Why>,
) -> Handled<OperationAccepted> {
    operate(&state, id, Lifecycle::Start, command).await
}

/// Tries a partially started deployment again in the clusters where it has failed. Where it is
/// ready nothing changes; once it is ready everywhere it has succeeded.
#[utoipa::path(post, path = "/api/v1/deployments/{id}/retry", tag = "deployments",
    params(("id" = String, Path, description = "The deployment.")),
    request_body = Option<RetryIn>,
    responses((status = 200, description = "It is being tried again.", body = OperationAccepted)))]
pub(crate) async fn retry_deployment(
    State(state): State<AppState>,
    Named(id): Named<DeploymentId>,
    Params(NoParams {}): Params<NoParams>,
    Command { caller, body }: Command<RetryIn>,
) -> Handled<OperationAccepted> {
    let commands = &state.commands;
    let operated = commands
        .retry(&caller, id, body.clusters, body.reason)
        .await?;
    let body = OperationAccepted {
        id,
        status: "retrying",
    };
    Ok(Answer::done(&operated.done, body))
}

/// Removes what a stopped deployment consists of. It cannot be started again.
#[utoipa::path(post, path = "/api/v1/deployments/{id}/terminate", tag = "deployments",
    params(("id" = String, Path, description = "The deployment.")),
    request_body = Option<Why>,
    responses((status = 200, description = "It is being removed.", body = OperationAccepted)))]
pub(crate) async fn terminate_deployment(
    State(state): State<AppState>,
    Named(id): Named<DeploymentId>,
    Params(NoParams {}): Params<NoParams>,
    command: Command<Why>,
) -> Handled<OperationAccepted> {
    operate(&state, id, Lifecycle::Terminate, command).await
}

/// Gives a deployment up before it is live.
#[utoipa::path(post, path = "/api/v1/deployments/{id}/cancel", tag = "deployments",
    params(("id" = String, Path, description = "The deployment.")),
    request_body = Option<Why>,
    responses((status = 200, description = "It is being cancelled.", body = OperationAccepted)))]
pub(crate) async fn cancel_deployment(
    State(state): State<AppState>,
    Named(id): Named<DeploymentId>,
    Params(NoParams {}): Params<NoParams>,
    command: Command<Why>,
) -> Handled<OperationAccepted> {
    operate(&state, id, Lifecycle::Cancel, command).await
}

/// Keeps a deployment running whose stop is scheduled.
#[utoipa::path(post, path = "/api/v1/deployments/{id}/keep", tag = "deployments",
    params(("id" = String, Path, description = "The deployment.")),
    request_body = Option<Why>,
    responses((status = 200, description = "It is kept.", body = OperationAccepted)))]
pub(crate) async fn keep_deployment(
    State(state): State<AppState>,
    Named(id): Named<DeploymentId>,
    Params(NoParams {}): Params<NoParams>,
    command: Command<Why>,
) -> Handled<OperationAccepted> {
    operate(&state, id, Lifecycle::Keep, command).await
}

/// Puts the record of an ended deployment away. Its events stay in the ledger.
#[utoipa::path(delete, path = "/api/v1/deployments/{id}", tag = "deployments",
    params(("id" = String, Path, description = "The deployment.")),
    request_body = Option<Why>,
    responses((status = 200, description = "It is put away.", body = OperationAccepted)))]
pub(crate) async fn delete_deployment(
    State(state): State<AppState>,
    Named(id): Named<DeploymentId>,
    Params(NoParams {}): Params<NoParams>,
    command: Command<Why>,
) -> Handled<OperationAccepted> {
    operate(&state, id, Lifecycle::Delete, command).await
}

pub(crate) fn switched(switched: Switched) -> Answer<MainSwitched> {
    let body = MainSwitched {
        id: switched.main,
        instance_id: switched.instance.to_string(),
        main: true,
        previous_main: switched.previous_main,
    };
    Answer::done(&switched.done, body)
}

/// Sends traffic to a running deployment. The one before goes on running.
#[utoipa::path(post, path = "/api/v1/deployments/{id}/mark-main", tag = "traffic",
    params(("id" = String, Path, description = "The deployment.")),
    request_body = Option<MarkMain>,
    responses((status = 200, description = "It is the main deployment.", body = MainSwitched)))]
pub(crate) async fn mark_main(
    State(state): State<AppState>,
    Named(id): Named<DeploymentId>,
    Params(NoParams {}): Params<NoParams>,
    Command { caller, body }: Command<MarkMain>,
) -> Handled<MainSwitched> {
    let expected = body
        .expected_main
        .as_deref()
        .map(deployment_id)
        .transpose()?;
    let done = state
        .commands
        .mark_main(&caller, id, expected, body.reason)
        .await?;
    Ok(switched(done))
}

/// Requests a deployment of exactly what an older one was made from.
#[utoipa::path(post, path = "/api/v1/deployments/{id}/redeploy", tag = "deployments",
    params(("id" = String, Path, description = "The older deployment.")),
    request_body = Option<RedeployOptions>,
    responses((status = 201, description = "It is queued.", body = DeploymentAccepted)))]
pub(crate) async fn redeploy(
    State(state): State<AppState>,
    Named(id): Named<DeploymentId>,
    Params(NoParams {}): Params<NoParams>,
    Command { caller, body }: Command<RedeployOptions>,
) -> Handled<DeploymentAccepted> {
    let instance = state.commands.deployment(id)?.state.request.instance;
    let wish = Redeploy {
        of: id,
        switch: body.switch,
        reason: body.reason,
    };
    let deployed = state.commands.redeploy(&caller, wish).await?;
    Ok(accepted(&deployed, &instance))
}

/// Sends traffic back to an older deployment, which must run, unless it is said how it comes to. From here on no deployment takes
/// over by itself, until one is marked as main.
#[utoipa::path(post, path = "/api/v1/rollback", tag = "traffic",
    request_body = RollbackTo,
    responses((status = 200, description = "It is rolled back.", body = MainSwitched)))]
pub(crate) async fn rollback(
    State(state): State<AppState>,
    Params(NoParams {}): Params<NoParams>,
    Command { caller, body }: Command<RollbackTo>,
) -> Handled<MainSwitched> {
    Ok(switched(roll_back(&state, &caller, body).await?))
}

/// Sends traffic back as a body says it.
pub(crate) async fn roll_back(
    state: &AppState,
    caller: &Caller,
    body: RollbackTo,
) -> Result<Switched, Problem> {
    let instance = instance(
        body.instance_id,
        body.project,
        body.environment,
        body.service,
    )?;
    let to = body.to.as_deref().map(deployment_id).transpose()?;
    let first = match (body.start, body.redeploy) {
        (false, false) => First::Nothing,
        (true, false) => First::Start,
        (false, true) => First::Redeploy,
        (true, true) => {
            return Err(Refusal::new(
                "rollback_ambiguous",
                "it is to be started, and to be deployed once more",
                "give one of start and redeploy",
            )
            .into());
        }
    };
    let commands = &state.commands;
    let done = commands.roll_back_after(caller, instance, to, first, body.reason);
    Ok(done.await?)
}

/// Deploys to one environment what runs in another: the same image, by its digest.
#[utoipa::path(post, path = "/api/v1/promote", tag = "deployments",
    request_body = PromoteTo,
    responses((status = 201, description = "It is accepted.", body = DeploymentAccepted)))]
pub(crate) async fn promote(
    State(state): State<AppState>,
    Params(NoParams {}): Params<NoParams>,
    Command { caller, body }: Command<PromoteTo>,
) -> Handled<DeploymentAccepted> {
    let (deployed, instance) = promote_to(&state, &caller, body).await?;
    Ok(accepted(&deployed, &instance))
}

/// Promotes as a body says it.
pub(crate) async fn promote_to(
    state: &AppState,
    caller: &Caller,
    body: PromoteTo,
) -> Result<(Deployed, InstanceRef), Problem> {
    let from = InstanceRef {
        project: ProjectName::parse(body.project)?,
        environment: EnvironmentName::parse(body.from)?,
        service: ServiceName::parse(body.service)?,
    };
    let to = EnvironmentName::parse(body.to)?;
    let instance = InstanceRef {
        environment: to.clone(),
        ..from.clone()
    };
    let wish = Promote {
        from,
        to,
        deployment: body.deployment.as_deref().map(deployment_id).transpose()?,
        clusters: body.clusters,
        switch: body.switch,
        allow_partial: body.allow_partial,
        run: body.run,
        reason: body.reason,
    };
    let deployed = state.commands.promote(caller, wish).await?;
    Ok((deployed, instance))
}
