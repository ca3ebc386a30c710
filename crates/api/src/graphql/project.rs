//! A project with its services, what they run as, and what that was before.

use std::collections::BTreeMap;
use std::sync::Arc;

use async_graphql::{Context, ID, Json, Object, Result};
use axum::extract::State;
use daybook_events::environment::EnvironmentStatus;
use daybook_events::project::Project as Folded;
use daybook_events::spec::ServiceSpec;
use daybook_events::{EnvironmentName, InstanceRef, ServiceName};
use daybook_projections::views::InstanceView;
use jiff::Timestamp;

use super::asked::asked;
use super::deploy_run::DeployRun;
use super::objects::{Deployment, Environment, RouteTable};
use super::query;
use crate::extract::{Named, NoParams, Params};
use crate::problem::Problem;
use crate::routes::history::{self, HistoryQuery};
use crate::routes::projects;
use crate::state::AppState;

/// A project.
#[derive(Debug)]
pub(crate) struct Project(pub(super) Folded);

/// What is read once for all instances of a project, whatever is asked about them.
#[derive(Debug)]
struct Running {
    environments: Vec<EnvironmentName>,
    instances: BTreeMap<InstanceRef, InstanceView>,
}

impl Running {
    fn read(state: &AppState, project: &Folded) -> Result<Self, Problem> {
        let projections = state.projections();
        let environments = projections.environments(&project.name)?;
        let overview = projections.overview(Some(&project.name), None)?;
        let by_instance = |view: InstanceView| (view.instance.clone(), view);
        Ok(Self {
            environments: environments
                .into_iter()
                .filter(|e| e.status != EnvironmentStatus::Deleted)
                .map(|e| e.name)
                .collect(),
            instances: overview.instances.into_iter().map(by_instance).collect(),
        })
    }
}

/// A project.
#[Object]
impl Project {
    /// Its id, which is its name.
    async fn id(&self) -> ID {
        self.0.name.to_string().into()
    }

    /// Its name.
    async fn name(&self) -> &str {
        self.0.name.as_str()
    }

    /// What it is.
    async fn description(&self) -> Option<&str> {
        self.0.description.as_deref()
    }

    /// When it was created.
    async fn created_at(&self) -> Timestamp {
        self.0.created_at
    }

    /// Its services, by name.
    #[graphql(complexity = "super::limits::many(10, child_complexity)")]
    async fn services(&self, ctx: &Context<'_>) -> Result<Vec<Service>> {
        let running = match ctx.look_ahead().field("instances").exists() {
            true => Some(Arc::new(Running::read(&asked(ctx).state, &self.0)?)),
            false => None,
        };
        let service = |(name, spec): (&ServiceName, &ServiceSpec)| Service {
            name: name.clone(),
            spec: spec.clone(),
            project: self.0.name.clone(),
            running: running.clone(),
        };
        Ok(self.0.services.iter().map(service).collect())
    }

    /// Its environments, by name.
    #[graphql(complexity = "super::limits::many(5, child_complexity)")]
    async fn environments(&self, ctx: &Context<'_>) -> Result<Vec<Environment>> {
        let state = asked(ctx).state.clone();
        let name = Named(self.0.name.clone());
        let listed = projects::list_environments(State(state), name, Params(NoParams {})).await?;
        let environments = listed.into_body().environments;
        Ok(environments.into_iter().map(Environment::from).collect())
    }

    /// Where its hostnames lead.
    async fn routes(&self, ctx: &Context<'_>) -> Result<RouteTable> {
        query::route_table(asked(ctx), self.0.name.clone(), None, None).await
    }
}

/// A service of a project.
#[derive(Debug)]
pub(crate) struct Service {
    name: ServiceName,
    spec: ServiceSpec,
    project: daybook_events::ProjectName,
    running: Option<Arc<Running>>,
}

/// A service of a project.
#[Object]
impl Service {
    /// Its name.
    async fn name(&self) -> &str {
        self.name.as_str()
    }

    /// Its definition.
    async fn spec(&self) -> Json<serde_json::Value> {
        Json(serde_json::to_value(&self.spec).unwrap_or_default())
    }

    /// It in each environment of its project, or in one.
    #[graphql(complexity = "super::limits::many(4, child_complexity)")]
    async fn instances(&self, environment: Option<String>) -> Result<Vec<ServiceInstance>> {
        let wanted = environment
            .map(EnvironmentName::parse)
            .transpose()
            .map_err(Problem::from)?;
        // What looks ahead sees this field, so it was read.
        let Some(running) = &self.running else {
            return Ok(Vec::new());
        };
        let instance = |environment: &EnvironmentName| InstanceRef {
            project: self.project.clone(),
            environment: environment.clone(),
            service: self.name.clone(),
        };
        let environments = running.environments.iter();
        Ok(environments
            .filter(|e| wanted.as_ref().is_none_or(|w| w == *e))
            .map(|e| ServiceInstance {
                instance: instance(e),
                running: running.clone(),
            })
            .collect())
    }
}

/// A service in an environment.
#[derive(Debug)]
pub(crate) struct ServiceInstance {
    instance: InstanceRef,
    running: Arc<Running>,
}

impl ServiceInstance {
    fn view(&self) -> Option<&InstanceView> {
        self.running.instances.get(&self.instance)
    }
}

/// A service in an environment.
#[Object]
impl ServiceInstance {
    /// `project.environment.service`.
    async fn id(&self) -> ID {
        self.instance.to_string().into()
    }

    /// The environment.
    async fn environment(&self) -> &str {
        self.instance.environment.as_str()
    }

    /// Tag of the image that its traffic goes to.
    async fn image_tag(&self) -> Option<&str> {
        let main = self.view()?.main.as_ref()?;
        main.image_tag.as_ref().map(|t| t.as_str())
    }

    /// Whether it is rolled back: then no deployment takes over traffic by itself.
    async fn rolled_back(&self) -> bool {
        self.view().is_some_and(|v| v.rolled_back)
    }

    /// The deployment that its traffic goes to.
    async fn main(&self, ctx: &Context<'_>) -> Result<Option<DeployRun>> {
        let Some(main) = self.view().and_then(|v| v.main.as_ref()) else {
            return Ok(None);
        };
        let row = asked(ctx).state.projections().deployment(main.id);
        Ok(row.map_err(Problem::from)?.map(DeployRun::from))
    }

    /// What was deployed to it, newest first; with `at`, a position or a time, as that was then.
    #[graphql(complexity = "super::limits::page(first, child_complexity)")]
    async fn deployments(
        &self,
        ctx: &Context<'_>,
        first: Option<u32>,
        after: Option<String>,
        at: Option<String>,
    ) -> Result<Vec<Deployment>> {
        let query = HistoryQuery {
            instance_id: Some(self.instance.to_string()),
            limit: Some(first.unwrap_or(super::limits::FIRST)),
            cursor: after,
            at,
            ..HistoryQuery::default()
        };
        let asked = asked(ctx);
        let (state, principal) = (State(asked.state.clone()), asked.principal.clone());
        let listed = history::list_history(state, principal, Params(query)).await?;
        let rows = listed.into_body().history;
        Ok(rows.into_iter().map(Deployment::from).collect())
    }
}
