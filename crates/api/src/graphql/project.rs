//! A project with its services, what they run as, and what that was before.

use async_graphql::{Context, ID, Json, Object, Result};
use daybook_events::project::Project as Folded;
use daybook_events::spec::ServiceSpec;
use daybook_events::{EnvironmentName, InstanceRef, ProjectName, ServiceName};
use daybook_projections::views::InstanceView;
use jiff::Timestamp;

use super::asked::asked;
use super::deploy_run::DeployRun;
use super::loads::{DeployedTo, EnvironmentsOf, RunningIn, loads};
use super::objects::{Deployment, Environment, RouteTable};
use super::query;
use crate::problem::Problem;
use crate::view::EnvironmentView;

/// A project.
#[derive(Debug)]
pub(crate) struct Project(pub(super) Folded);

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

    /// Its services, by name: all, or the `first` of them `after` a name.
    #[graphql(complexity = "super::limits::list(first, 10, child_complexity)")]
    async fn services(
        &self,
        ctx: &Context<'_>,
        first: Option<u32>,
        after: Option<String>,
    ) -> Result<Vec<Service>> {
        let service = |(name, spec): (&ServiceName, &ServiceSpec)| Service {
            name: name.clone(),
            spec: spec.clone(),
            project: self.0.name.clone(),
        };
        let services = self.0.services.iter();
        let services = services.filter(|(name, _)| is_after(name.as_str(), after.as_deref()));
        let services: Vec<_> = services.take(most(first)).map(service).collect();
        asked(ctx).lists(services.len())?;
        Ok(services)
    }

    /// Its environments, by name.
    #[graphql(complexity = "super::limits::many(5, child_complexity)")]
    async fn environments(&self, ctx: &Context<'_>) -> Result<Vec<Environment>> {
        let environments = environments(ctx, &self.0.name).await?;
        asked(ctx).lists(environments.len())?;
        Ok(environments.into_iter().map(Environment::from).collect())
    }

    /// Where its hostnames lead.
    async fn routes(&self, ctx: &Context<'_>) -> Result<RouteTable> {
        query::route_table(asked(ctx), self.0.name.clone(), None, None).await
    }
}

/// Whether a name comes after another one, if there is one.
pub(super) fn is_after(name: &str, after: Option<&str>) -> bool {
    after.is_none_or(|after| name > after)
}

/// How many items a list has at most that is whole if nobody says how many.
pub(super) fn most(first: Option<u32>) -> usize {
    first.map_or(usize::MAX, |first| {
        usize::try_from(first).unwrap_or(usize::MAX)
    })
}

async fn environments(
    ctx: &Context<'_>,
    project: &ProjectName,
) -> Result<Vec<EnvironmentView>, Problem> {
    let found = loads(ctx).load_one(EnvironmentsOf(project.clone())).await?;
    Ok(found.unwrap_or_default())
}

/// A service of a project.
#[derive(Debug)]
pub(crate) struct Service {
    name: ServiceName,
    spec: ServiceSpec,
    project: ProjectName,
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
    async fn instances(
        &self,
        ctx: &Context<'_>,
        environment: Option<String>,
    ) -> Result<Vec<ServiceInstance>> {
        let wanted = environment
            .map(EnvironmentName::parse)
            .transpose()
            .map_err(Problem::from)?;
        let environments = environments(ctx, &self.project).await?.into_iter();
        let instances: Vec<_> = environments
            .filter(|e| wanted.as_ref().is_none_or(|w| *w == e.name))
            .map(|e| {
                ServiceInstance(InstanceRef {
                    project: self.project.clone(),
                    environment: e.name,
                    service: self.name.clone(),
                })
            })
            .collect();
        asked(ctx).lists(instances.len())?;
        Ok(instances)
    }
}

/// A service in an environment.
#[derive(Debug)]
pub(crate) struct ServiceInstance(InstanceRef);

impl ServiceInstance {
    async fn view(&self, ctx: &Context<'_>) -> Result<Option<InstanceView>, Problem> {
        let key = RunningIn(self.0.project.clone());
        let running = loads(ctx).load_one(key).await?;
        Ok(running.and_then(|running| running.get(&self.0).cloned()))
    }
}

/// A service in an environment.
#[Object]
impl ServiceInstance {
    /// `project.environment.service`.
    async fn id(&self) -> ID {
        self.0.to_string().into()
    }

    /// The environment.
    async fn environment(&self) -> &str {
        self.0.environment.as_str()
    }

    /// Tag of the image that its traffic goes to.
    async fn image_tag(&self, ctx: &Context<'_>) -> Result<Option<String>> {
        let main = self.view(ctx).await?.and_then(|view| view.main);
        Ok(main.and_then(|m| m.image_tag).map(|t| t.to_string()))
    }

    /// Whether it is rolled back: then no deployment takes over traffic by itself.
    async fn rolled_back(&self, ctx: &Context<'_>) -> Result<bool> {
        Ok(self.view(ctx).await?.is_some_and(|v| v.rolled_back))
    }

    /// The deployment that its traffic goes to.
    async fn main(&self, ctx: &Context<'_>) -> Result<Option<DeployRun>> {
        let Some(main) = self.view(ctx).await?.and_then(|view| view.main) else {
            return Ok(None);
        };
        let row = loads(ctx).load_one(main.id).await?;
        Ok(row.map(DeployRun::from))
    }

    /// What was deployed to it, newest first: the `first` (20 if not given, 500 at most), and with
    /// `after`, the `cursor` of the last one, those before it. With `at`, a position or a time, as
    /// that was then.
    #[graphql(complexity = "super::limits::page(first, child_complexity)")]
    async fn deployments(
        &self,
        ctx: &Context<'_>,
        first: Option<u32>,
        after: Option<String>,
        at: Option<String>,
    ) -> Result<Vec<Deployment>> {
        let key = DeployedTo {
            instance: self.0.clone(),
            first: first.unwrap_or(super::limits::FIRST),
            after,
            at,
        };
        let rows = loads(ctx).load_one(key).await?;
        let rows = rows.unwrap_or_else(|| Ok(Vec::new()))?;
        Ok(rows.into_iter().map(Deployment::from).collect())
    }
}
