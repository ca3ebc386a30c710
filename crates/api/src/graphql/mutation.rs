//! What can be done.

use async_graphql::{Context, ID, InputObject, Json, Object, Result};
use axum::extract::State as Held;
use axum::http::StatusCode;
use daybook_events::spec::ServiceSpec;
use daybook_events::{
    ClusterName, DeploymentId, EnvKey, EnvironmentName, GitRef, InstanceRef, ParameterName,
    ProjectName, ServiceName, TemplateName,
};

use super::asked::{Asked, asked, caller};
use super::deploy_run::DeployRun;
use super::objects::{Environment, MainSwitch, RoutesSet, Switch, SwitchMode};
use super::project::Project;
use super::query::project_name;
use crate::access::Verb;
use crate::commands::{Configure, Deploy, DeployTemplate, Lifecycle, Redeploy, RunOverrides, What};
use crate::extract::{Command, Named, NoParams, Params, deployment_id};
use crate::problem::Problem;
use crate::routes::deployments::{self, CreateDeployment, MarkMain, PromoteTo, RollbackTo, Why};
use crate::routes::projects::{self, CreateEnvironment, CreateProject, DefineService};
use crate::routes::traffic::{self, SetRoutes, SetShare};

/// A deployment to be made: built from source, or of what the service is defined as.
#[derive(Debug, InputObject)]
pub(crate) struct DeployInput {
    /// The project.
    project_id: ID,
    /// The service.
    service: String,
    /// The environment.
    environment: String,
    /// A branch, tag or commit of the service's source; its default ref if not given.
    git_ref: Option<String>,
    /// Instead of a ref: a commit that was uploaded for the service, over REST.
    upload: Option<String>,
    /// The service's folder in what was uploaded, if it is not the one of its definition.
    upload_path: Option<String>,
    /// The clusters; the environment's if not given.
    clusters: Option<Vec<String>>,
    /// Whether traffic follows by itself; as the environment says if not given.
    switch: Option<SwitchMode>,
    /// Whether it takes over traffic also where it is ready in some of its clusters only.
    #[graphql(default)]
    allow_partial: bool,
    /// Why.
    reason: Option<String>,
    /// Carries the mutation out once, however often it is repeated.
    idempotency_key: Option<String>,
}

/// A deployment of an image that exists.
#[derive(Debug, InputObject)]
pub(crate) struct DeployBuildInput {
    /// The project.
    project_id: ID,
    /// The service.
    service: String,
    /// The environment.
    environment: String,
    /// The image's tag, in the service's image repository.
    tag: String,
    /// The image's digest, for exactly this image.
    digest: Option<String>,
    /// The clusters; the environment's if not given.
    clusters: Option<Vec<String>>,
    /// Whether traffic follows by itself; as the environment says if not given.
    switch: Option<SwitchMode>,
    /// Whether it takes over traffic also where it is ready in some of its clusters only.
    #[graphql(default)]
    allow_partial: bool,
    /// Why.
    reason: Option<String>,
    /// Carries the mutation out once, however often it is repeated.
    idempotency_key: Option<String>,
}

/// What is promoted: the image that runs in one environment, to another one.
#[derive(Debug, InputObject)]
pub(crate) struct PromoteInput {
    /// The project.
    project_id: ID,
    /// The service.
    service: String,
    /// The environment that has it.
    from: String,
    /// The environment that gets it.
    to: String,
    /// The deployment; the main one if not given.
    deployment: Option<ID>,
    /// The clusters; the environment's if not given.
    clusters: Option<Vec<String>>,
    /// Whether traffic follows by itself; as the environment says if not given.
    switch: Option<SwitchMode>,
    /// Whether it takes over traffic also where it is ready in some of its clusters only.
    #[graphql(default)]
    allow_partial: bool,
    /// Why.
    reason: Option<String>,
    /// Carries the mutation out once, however often it is repeated.
    idempotency_key: Option<String>,
}

/// Where to go back.
#[derive(Debug, InputObject)]
pub(crate) struct RollbackInput {
    /// The project.
    project_id: ID,
    /// The service.
    service: String,
    /// The environment.
    environment: String,
    /// The deployment to go back to; the main one before if not given.
    to: Option<ID>,
    /// Whether it is started first if it is stopped.
    #[graphql(default)]
    start: bool,
    /// Whether what it was made from is deployed once more first.
    #[graphql(default)]
    redeploy: bool,
    /// Why.
    reason: Option<String>,
    /// Carries the mutation out once, however often it is repeated.
    idempotency_key: Option<String>,
}

/// How many instances of a service are to run.
#[derive(Debug, InputObject)]
pub(crate) struct ScaleInput {
    /// The project.
    project_id: ID,
    /// The service.
    service: String,
    /// The environment.
    environment: String,
    /// Instances in each cluster: 1 to 100.
    replicas: u32,
    /// Why.
    reason: Option<String>,
    /// Carries the mutation out once, however often it is repeated.
    idempotency_key: Option<String>,
}

/// A name with a value: of an environment variable, or of a template's parameter.
#[derive(Debug, InputObject)]
pub(crate) struct ValueInput {
    /// The name.
    name: String,
    /// The value.
    value: String,
}

/// Environment variables of a service to be changed.
#[derive(Debug, InputObject)]
pub(crate) struct ChangeConfigInput {
    /// The project.
    project_id: ID,
    /// The service.
    service: String,
    /// The environment.
    environment: String,
    /// Variables with their new values.
    #[graphql(default)]
    set: Vec<ValueInput>,
    /// Variables to be taken away.
    #[graphql(default)]
    unset: Vec<String>,
    /// Whether traffic follows by itself; as the environment says if not given.
    switch: Option<SwitchMode>,
    /// Why.
    reason: Option<String>,
    /// Carries the mutation out once, however often it is repeated.
    idempotency_key: Option<String>,
}

/// What a template is to become.
#[derive(Debug, InputObject)]
pub(crate) struct DeployTemplateInput {
    /// The template's name.
    template: String,
    /// The project.
    project_id: ID,
    /// The service.
    service: String,
    /// The environment.
    environment: String,
    /// The values of its parameters.
    #[graphql(default)]
    parameters: Vec<ValueInput>,
    /// Why.
    reason: Option<String>,
    /// Carries the mutation out once, however often it is repeated.
    idempotency_key: Option<String>,
}

/// An environment to be created.
#[derive(Debug, InputObject)]
pub(crate) struct CreateEnvironmentInput {
    /// The project.
    project_id: ID,
    /// Its name.
    name: String,
    /// Clusters that deployments go to unless they name others; all that the server knows if none
    /// is named.
    #[graphql(default)]
    clusters: Vec<String>,
    /// Whether its services answer on the project's live hostnames.
    #[graphql(default)]
    live: bool,
    /// Whether traffic follows a new deployment by itself.
    switch: Option<SwitchMode>,
    /// Whether it goes away with its pull request.
    #[graphql(default)]
    ephemeral: bool,
    /// The environment that it is made from.
    from: Option<String>,
    /// The branch whose pushes are deployed to it by themselves.
    auto_deploy: Option<String>,
    /// Carries the mutation out once, however often it is repeated.
    idempotency_key: Option<String>,
}

/// A deployment's share of traffic.
#[derive(Debug, InputObject)]
pub(crate) struct ShareInput {
    /// The deployment.
    deployment: ID,
    /// Its weight, relative to the others' weights: 1 to 10,000.
    weight: u32,
}

/// Which deployments share the traffic of an instance, or of one hostname.
#[derive(Debug, InputObject)]
pub(crate) struct SetRoutesInput {
    /// The project.
    project_id: ID,
    /// `project.environment.service`: all addresses that move with its main deployment.
    instance_id: Option<ID>,
    /// One of its addresses.
    hostname: Option<String>,
    /// The deployments.
    to: Vec<ShareInput>,
    /// The table that the caller decided on: if one of the hostnames was switched after it, nothing
    /// is done.
    expected_table: Option<u32>,
    /// Why.
    reason: Option<String>,
    /// Carries the mutation out once, however often it is repeated.
    idempotency_key: Option<String>,
}

pub(super) fn clusters(names: Option<Vec<String>>) -> Result<Option<Vec<ClusterName>>, Problem> {
    let parse = |names: Vec<String>| {
        let names = names.into_iter().map(ClusterName::parse);
        names.collect::<Result<Vec<_>, _>>()
    };
    Ok(names.map(parse).transpose()?)
}

pub(super) fn instance(
    project: ID,
    environment: String,
    service: String,
) -> Result<InstanceRef, Problem> {
    Ok(InstanceRef {
        project: project_name(project)?,
        environment: EnvironmentName::parse(environment)?,
        service: ServiceName::parse(service)?,
    })
}

/// The arguments that every operation on a deployment has.
struct Operation {
    id: ID,
    reason: Option<String>,
    key: Option<String>,
}

async fn operate(ctx: &Context<'_>, what: Lifecycle, on: Operation) -> Result<DeployRun> {
    let Asked { state, .. } = asked(ctx);
    let id = deployment_id(&on.id)?;
    let caller = caller(ctx, on.key.as_deref())?;
    let operated = state.commands.operate(&caller, id, what, on.reason).await;
    operated.map_err(Problem::from)?;
    as_it_is(ctx, id)
}

/// A deployment as it is after something was done to it.
pub(super) fn as_it_is(ctx: &Context<'_>, id: DeploymentId) -> Result<DeployRun> {
    let row = asked(ctx).state.commands.deployment(id);
    Ok(row.map_err(Problem::from)?.into())
}

/// What can be done to projects, deployments and their traffic.
#[derive(Debug, Default)]
pub(crate) struct Operating;

/// What can be done to projects, deployments and their traffic.
#[Object]
impl Operating {
    /// Deploys a service: the image is built, the GitOps repository changed, and the clusters
    /// synced. `deployStatus` and `deployLogs` follow it.
    async fn deploy(&self, ctx: &Context<'_>, input: DeployInput) -> Result<DeployRun> {
        let Asked { state, .. } = asked(ctx);
        let caller = caller(ctx, input.idempotency_key.as_deref())?;
        let body = CreateDeployment {
            instance_id: None,
            project: Some(input.project_id.into()),
            environment: Some(input.environment),
            service: Some(input.service),
            version: None,
            git_ref: input.git_ref,
            image: None,
            chart: None,
            chart_version: None,
            upload: input.upload,
            upload_path: input.upload_path,
            clusters: input.clusters,
            switch: input.switch.map(Into::into),
            allow_partial: input.allow_partial,
            run: RunOverrides::default(),
            reason: input.reason,
        };
        let (deployed, _) = deployments::deploy(state, &caller, body).await?;
        let run = DeployRun::requested(state, &deployed).await;
        Ok(run.map_err(Problem::from)?)
    }

    /// Deploys an image that exists, without a build; answers with the deployment's id, which
    /// `deployStatus` and `deployLogs` take.
    async fn deploy_build(&self, ctx: &Context<'_>, input: DeployBuildInput) -> Result<ID> {
        let Asked { state, .. } = asked(ctx);
        let caller = caller(ctx, input.idempotency_key.as_deref())?;
        let wish = Deploy {
            instance: instance(input.project_id, input.environment, input.service)?,
            what: What::Tag(input.tag, input.digest),
            clusters: clusters(input.clusters)?,
            switch: input.switch.map(Into::into),
            allow_partial: input.allow_partial,
            run: RunOverrides::default(),
            reason: input.reason,
        };
        let deployed = state.commands.deploy(&caller, wish).await;
        Ok(deployed.map_err(Problem::from)?.id.to_string().into())
    }

    /// Deploys to one environment what runs in another: the same image, by its digest.
    async fn promote(&self, ctx: &Context<'_>, input: PromoteInput) -> Result<DeployRun> {
        let Asked { state, .. } = asked(ctx);
        let caller = caller(ctx, input.idempotency_key.as_deref())?;
        let body = PromoteTo {
            project: input.project_id.into(),
            service: input.service,
            from: input.from,
            to: input.to,
            deployment: input.deployment.map(String::from),
            clusters: clusters(input.clusters)?,
            switch: input.switch.map(Into::into),
            allow_partial: input.allow_partial,
            run: RunOverrides::default(),
            reason: input.reason,
        };
        let (deployed, _) = deployments::promote_to(state, &caller, body).await?;
        let run = DeployRun::requested(state, &deployed).await;
        Ok(run.map_err(Problem::from)?)
    }

    /// Sends traffic back to an older deployment. From here on no deployment takes over by itself,
    /// until one is marked as main.
    async fn rollback(&self, ctx: &Context<'_>, input: RollbackInput) -> Result<MainSwitch> {
        let Asked { state, .. } = asked(ctx);
        let caller = caller(ctx, input.idempotency_key.as_deref())?;
        let body = RollbackTo {
            instance_id: None,
            project: Some(input.project_id.into()),
            environment: Some(input.environment),
            service: Some(input.service),
            to: input.to.map(String::from),
            start: input.start,
            redeploy: input.redeploy,
            reason: input.reason,
        };
        let switched = deployments::roll_back(state, &caller, body).await?;
        Ok(deployments::switched(switched).into_body().into())
    }

    /// Sends traffic to a running deployment. The one before goes on running.
    async fn mark_main(
        &self,
        ctx: &Context<'_>,
        id: ID,
        expected_main: Option<ID>,
        reason: Option<String>,
        idempotency_key: Option<String>,
    ) -> Result<MainSwitch> {
        let Asked { state, .. } = asked(ctx);
        let command = Command {
            caller: caller(ctx, idempotency_key.as_deref())?,
            body: MarkMain {
                expected_main: expected_main.map(String::from),
                reason,
            },
        };
        let id = Named(deployment_id(&id)?);
        let held = Held(state.clone());
        let switched = deployments::mark_main(held, id, Params(NoParams {}), command).await?;
        Ok(switched.into_body().into())
    }

    /// Requests a deployment of exactly what an older one was made from.
    async fn redeploy(
        &self,
        ctx: &Context<'_>,
        id: ID,
        switch: Option<SwitchMode>,
        reason: Option<String>,
        idempotency_key: Option<String>,
    ) -> Result<DeployRun> {
        let Asked { state, .. } = asked(ctx);
        let caller = caller(ctx, idempotency_key.as_deref())?;
        let wish = Redeploy {
            of: deployment_id(&id)?,
            switch: switch.map(Into::into),
            reason,
        };
        let deployed = state.commands.redeploy(&caller, wish).await;
        let deployed = deployed.map_err(Problem::from)?;
        let run = DeployRun::requested(state, &deployed).await;
        Ok(run.map_err(Problem::from)?)
    }

    /// Scales a running deployment to zero. It can be started again.
    async fn stop_deployment(
        &self,
        ctx: &Context<'_>,
        id: ID,
        reason: Option<String>,
        idempotency_key: Option<String>,
    ) -> Result<DeployRun> {
        let key = idempotency_key;
        operate(ctx, Lifecycle::Stop, Operation { id, reason, key }).await
    }

    /// Starts a stopped deployment again.
    async fn start_deployment(
        &self,
        ctx: &Context<'_>,
        id: ID,
        reason: Option<String>,
        idempotency_key: Option<String>,
    ) -> Result<DeployRun> {
        let key = idempotency_key;
        operate(ctx, Lifecycle::Start, Operation { id, reason, key }).await
    }

    /// Removes what a stopped deployment consists of. It cannot be started again.
    async fn terminate_deployment(
        &self,
        ctx: &Context<'_>,
        id: ID,
        reason: Option<String>,
        idempotency_key: Option<String>,
    ) -> Result<DeployRun> {
        let key = idempotency_key;
        operate(ctx, Lifecycle::Terminate, Operation { id, reason, key }).await
    }

    /// Gives a deployment up before it is live.
    async fn cancel_deployment(
        &self,
        ctx: &Context<'_>,
        id: ID,
        reason: Option<String>,
        idempotency_key: Option<String>,
    ) -> Result<DeployRun> {
        let key = idempotency_key;
        operate(ctx, Lifecycle::Cancel, Operation { id, reason, key }).await
    }

    /// Tries a partially started deployment again in the clusters where it has failed, or in some of
    /// them.
    async fn retry_deployment(
        &self,
        ctx: &Context<'_>,
        id: ID,
        clusters: Option<Vec<String>>,
        reason: Option<String>,
        idempotency_key: Option<String>,
    ) -> Result<DeployRun> {
        let caller = caller(ctx, idempotency_key.as_deref())?;
        let id = deployment_id(&id)?;
        let commands = &asked(ctx).state.commands;
        let retried = commands.retry(&caller, id, self::clusters(clusters)?, reason);
        retried.await.map_err(Problem::from)?;
        as_it_is(ctx, id)
    }

    /// Scales the main deployment of a service in place. Later deployments have as many instances.
    async fn scale(&self, ctx: &Context<'_>, input: ScaleInput) -> Result<DeployRun> {
        let caller = caller(ctx, input.idempotency_key.as_deref())?;
        let instance = instance(input.project_id, input.environment, input.service)?;
        let commands = &asked(ctx).state.commands;
        let scaled = commands.scale(&caller, &instance, input.replicas, input.reason);
        let scaled = scaled.await.map_err(Problem::from)?;
        as_it_is(ctx, scaled.id)
    }

    /// Changes environment variables of a service: a new deployment of what runs already, with the
    /// same image; or the one that runs, if everything was so already.
    async fn change_config(
        &self,
        ctx: &Context<'_>,
        input: ChangeConfigInput,
    ) -> Result<DeployRun> {
        let Asked { state, .. } = asked(ctx);
        let caller = caller(ctx, input.idempotency_key.as_deref())?;
        let set = input.set.into_iter();
        let set = set.map(|v| Ok((EnvKey::parse(v.name)?, v.value)));
        let unset = input.unset.into_iter().map(|name| Ok(EnvKey::parse(name)?));
        let wish = Configure {
            instance: instance(input.project_id, input.environment, input.service)?,
            set: set.collect::<Result<_, Problem>>()?,
            unset: unset.collect::<Result<_, Problem>>()?,
            switch: input.switch.map(Into::into),
            reason: input.reason,
        };
        let deployed = state.commands.configure(&caller, wish).await;
        let deployed = deployed.map_err(Problem::from)?;
        if deployed.done.event.is_none() {
            return as_it_is(ctx, deployed.id);
        }
        let run = DeployRun::requested(state, &deployed).await;
        Ok(run.map_err(Problem::from)?)
    }

    /// Resolves a template of the catalogue to the definition of a service, and deploys it.
    async fn deploy_template(
        &self,
        ctx: &Context<'_>,
        input: DeployTemplateInput,
    ) -> Result<DeployRun> {
        let asked = asked(ctx);
        asked.may_somewhere(Verb::Deploy)?;
        let state = &asked.state;
        let caller = caller(ctx, input.idempotency_key.as_deref())?;
        let name = TemplateName::parse(input.template).map_err(Problem::from)?;
        let (_, template) = state
            .settings
            .catalogue
            .find(&name)
            .map_err(Problem::from)?;
        let parameters = input.parameters.into_iter();
        let parameters = parameters.map(|p| Ok((ParameterName::parse(p.name)?, p.value)));
        let wish = DeployTemplate {
            template: template.clone(),
            instance: instance(input.project_id, input.environment, input.service)?,
            parameters: parameters.collect::<Result<_, Problem>>()?,
            reason: input.reason,
        };
        let deployed = state.commands.deploy_template(&caller, wish).await;
        let run = DeployRun::requested(state, &deployed.map_err(Problem::from)?).await;
        Ok(run.map_err(Problem::from)?)
    }

    /// Spreads the traffic of an instance, or of one of its hostnames, over running deployments.
    async fn set_routes(&self, ctx: &Context<'_>, input: SetRoutesInput) -> Result<RoutesSet> {
        let share = |share: ShareInput| SetShare {
            deployment: share.deployment.into(),
            weight: share.weight,
        };
        let command = Command {
            caller: caller(ctx, input.idempotency_key.as_deref())?,
            body: SetRoutes {
                instance_id: input.instance_id.map(String::from),
                hostname: input.hostname,
                to: input.to.into_iter().map(share).collect(),
                expected_table: input.expected_table,
                reason: input.reason,
            },
        };
        let project = Named(project_name(input.project_id)?);
        let held = Held(asked(ctx).state.clone());
        let set = traffic::set_routes(held, project, Params(NoParams {}), command).await?;
        let set = set.into_body();
        Ok(RoutesSet {
            instance_id: set.instance_id.into(),
            switch: set.switch.map(Switch::from),
        })
    }

    /// Creates a project.
    async fn create_project(
        &self,
        ctx: &Context<'_>,
        name: String,
        description: Option<String>,
        idempotency_key: Option<String>,
    ) -> Result<Project> {
        let asked = asked(ctx);
        asked.may_somewhere(Verb::Administer)?;
        let state = &asked.state;
        let found = ProjectName::parse(name.clone()).map_err(Problem::from)?;
        let command = Command {
            caller: caller(ctx, idempotency_key.as_deref())?,
            body: CreateProject { name, description },
        };
        projects::create_project(Held(state.clone()), Params(NoParams {}), command).await?;
        let project = state.commands.project(&found).map_err(Problem::from)?;
        Ok(Project(project))
    }

    /// Adds a service to a project, or replaces its definition (`schemas/service.json`).
    async fn define_service(
        &self,
        ctx: &Context<'_>,
        project_id: ID,
        service: String,
        spec: Json<serde_json::Value>,
        idempotency_key: Option<String>,
    ) -> Result<Project> {
        let Asked { state, .. } = asked(ctx);
        let project = project_name(project_id)?;
        let spec: ServiceSpec = serde_json::from_value(spec.0).map_err(|e| {
            Problem::new(
                StatusCode::UNPROCESSABLE_ENTITY,
                "invalid_body",
                format!("the definition does not fit: {e}"),
                "schemas/service.json says what a definition looks like",
            )
        })?;
        let service = ServiceName::parse(service).map_err(Problem::from)?;
        let command = Command {
            caller: caller(ctx, idempotency_key.as_deref())?,
            body: DefineService(spec),
        };
        let names = Named((project.clone(), service));
        let held = Held(state.clone());
        projects::define_service(held, names, Params(NoParams {}), command).await?;
        let project = state.commands.project(&project).map_err(Problem::from)?;
        Ok(Project(project))
    }

    /// Creates an environment.
    async fn create_environment(
        &self,
        ctx: &Context<'_>,
        input: CreateEnvironmentInput,
    ) -> Result<Environment> {
        let name = |name: Option<String>| name.map(EnvironmentName::parse).transpose();
        let branch = input.auto_deploy.map(GitRef::parse).transpose();
        let command = Command {
            caller: caller(ctx, input.idempotency_key.as_deref())?,
            body: CreateEnvironment {
                name: input.name,
                clusters: clusters(Some(input.clusters))?.unwrap_or_default(),
                live: input.live,
                switch: input.switch.map(Into::into).unwrap_or_default(),
                ephemeral: input.ephemeral,
                keep_old: None,
                keep_idle: None,
                approval: None,
                from: name(input.from).map_err(Problem::from)?,
                auto_deploy: branch.map_err(Problem::from)?,
            },
        };
        let project = Named(project_name(input.project_id)?);
        let held = Held(asked(ctx).state.clone());
        let created = projects::create_environment(held, project, Params(NoParams {}), command);
        Ok(created.await?.into_body().into())
    }

    /// Deletes an environment, with all that runs in it.
    async fn delete_environment(
        &self,
        ctx: &Context<'_>,
        project_id: ID,
        name: String,
        reason: Option<String>,
        idempotency_key: Option<String>,
    ) -> Result<Environment> {
        let command = Command {
            caller: caller(ctx, idempotency_key.as_deref())?,
            body: Why { reason },
        };
        let name = EnvironmentName::parse(name).map_err(Problem::from)?;
        let names = Named((project_name(project_id)?, name));
        let held = Held(asked(ctx).state.clone());
        let deleted = projects::delete_environment(held, names, Params(NoParams {}), command);
        Ok(deleted.await?.into_body().into())
    }
}
