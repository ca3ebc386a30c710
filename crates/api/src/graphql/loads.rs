//! What the items of lists read, read for all of them at once.
//!
//! A field of an item asks here for what it needs; what was asked for in one round is then read
//! together, beside the threads that answer others.

use std::collections::HashMap;
use std::sync::Arc;

use async_graphql::Context;
use async_graphql::dataloader::{DataLoader, Loader};
use daybook_events::environment::EnvironmentStatus;
use daybook_events::{DeploymentId, InstanceRef, ProjectName};
use daybook_projections::views::InstanceView;
use daybook_projections::{DeploymentFilter, DeploymentRow, HistoryRow, QueryError};

use super::asked::Asked;
use crate::problem::Problem;
use crate::routes::history;
use crate::view::EnvironmentView;

/// Reads for one request.
#[derive(Debug)]
pub(super) struct Loads(Asked);

/// A reader for one request.
pub(super) fn loader(asked: Asked) -> DataLoader<Loads> {
    DataLoader::new(Loads(asked), tokio::spawn)
}

/// The reader of the request that a resolver answers a part of.
pub(super) fn loads<'a>(ctx: &Context<'a>) -> &'a DataLoader<Loads> {
    ctx.data_unchecked::<DataLoader<Loads>>()
}

/// The environments of a project that are not deleted.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) struct EnvironmentsOf(pub(super) ProjectName);

/// What runs in a project.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) struct RunningIn(pub(super) ProjectName);

/// A page of what was deployed to an instance.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) struct DeployedTo {
    pub(super) instance: InstanceRef,
    pub(super) first: u32,
    pub(super) after: Option<String>,
    pub(super) at: Option<String>,
}

impl Loads {
    /// Reads something for so many items at once, beside the threads that answer requests. Who wants to know
    /// how often that is done sees it with `DAYBOOK_LOG=daybook_api::graphql=trace`.
    async fn read<T: Send + 'static>(
        &self,
        what: &'static str,
        items: usize,
        read: impl FnOnce(&Asked) -> Result<T, Problem> + Send + 'static,
    ) -> Result<T, Problem> {
        tracing::trace!(what, items, "read at once");
        let asked = self.0.clone();
        let done = tokio::task::spawn_blocking(move || read(&asked)).await;
        done.map_err(|e| Problem::internal(&e))?
    }
}

/// The one project that is asked about, if it is one.
fn only<'a>(mut projects: impl Iterator<Item = &'a ProjectName>) -> Option<&'a ProjectName> {
    let one = projects.next()?;
    projects.next().is_none().then_some(one)
}

impl Loader<EnvironmentsOf> for Loads {
    type Value = Vec<EnvironmentView>;
    type Error = Problem;

    async fn load(
        &self,
        keys: &[EnvironmentsOf],
    ) -> Result<HashMap<EnvironmentsOf, Self::Value>, Problem> {
        let keys = keys.to_vec();
        let items = keys.len();
        self.read("environments", items, move |asked| {
            let projections = asked.state.projections();
            let all = match only(keys.iter().map(|k| &k.0)) {
                Some(project) => projections.environments(project)?,
                None => projections.all_environments()?,
            };
            let mut found: HashMap<_, Vec<_>> =
                keys.into_iter().map(|key| (key, Vec::new())).collect();
            for environment in all {
                if environment.status != EnvironmentStatus::Deleted
                    && let Some(of) = found.get_mut(&EnvironmentsOf(environment.project.clone()))
                {
                    of.push(environment);
                }
            }
            let gateway = &asked.state.settings.gateway;
            let shown = found.into_iter().map(|(key, environments)| {
                let routing = projections.routing(&key.0)?;
                let view = |e| EnvironmentView::from(e).with_urls(routing.as_ref(), gateway);
                Ok((key, environments.into_iter().map(view).collect()))
            });
            shown.collect::<Result<_, QueryError>>().map_err(Into::into)
        })
        .await
    }
}

impl Loader<RunningIn> for Loads {
    type Value = Arc<HashMap<InstanceRef, InstanceView>>;
    type Error = Problem;

    async fn load(&self, keys: &[RunningIn]) -> Result<HashMap<RunningIn, Self::Value>, Problem> {
        let keys = keys.to_vec();
        let items = keys.len();
        self.read("running", items, move |asked| {
            let project = only(keys.iter().map(|k| &k.0));
            let overview = asked.state.projections().overview(project, None)?;
            let mut found: HashMap<_, HashMap<_, _>> =
                keys.into_iter().map(|key| (key, HashMap::new())).collect();
            for view in overview.instances {
                let key = RunningIn(view.instance.project.clone());
                if let Some(of) = found.get_mut(&key) {
                    of.insert(view.instance.clone(), view);
                }
            }
            let found = found.into_iter().map(|(key, of)| (key, Arc::new(of)));
            Ok(found.collect())
        })
        .await
    }
}

impl Loader<DeploymentId> for Loads {
    type Value = DeploymentRow;
    type Error = Problem;

    async fn load(
        &self,
        keys: &[DeploymentId],
    ) -> Result<HashMap<DeploymentId, DeploymentRow>, Problem> {
        let mut keys = keys.to_vec();
        keys.sort_unstable();
        let items = keys.len();
        self.read("deployments", items, move |asked| {
            let projections = asked.state.projections();
            let mut found = HashMap::with_capacity(keys.len());
            for id in keys {
                found.extend(projections.deployment(id)?.map(|row| (id, row)));
            }
            Ok(found)
        })
        .await
    }
}

impl Loader<DeployedTo> for Loads {
    type Value = Result<Vec<HistoryRow>, Problem>;
    type Error = Problem;

    async fn load(&self, keys: &[DeployedTo]) -> Result<HashMap<DeployedTo, Self::Value>, Problem> {
        let (past, mut now): (Vec<_>, Vec<_>) =
            keys.iter().cloned().partition(|key| key.at.is_some());
        // In the order of the index.
        now.sort_unstable_by(|a, b| a.instance.cmp(&b.instance));
        let mut found = HashMap::with_capacity(keys.len());
        if !now.is_empty() {
            let items = now.len();
            let rows = self.read("history", items, move |asked| {
                let rows = now.into_iter().map(|key| {
                    let rows = deployed_now(asked, &key);
                    (key, rows)
                });
                Ok(rows.collect::<Vec<_>>())
            });
            found.extend(rows.await?);
        }
        for key in past {
            tracing::trace!(what = "past", items = 1, "read");
            let rows = deployed_then(&self.0, &key).await;
            found.insert(key, rows);
        }
        Ok(found)
    }
}

fn deployed_now(asked: &Asked, key: &DeployedTo) -> Result<Vec<HistoryRow>, Problem> {
    // Once there is too much, nothing more is read.
    asked.lists(0)?;
    let page = history::page(Some(key.first), key.after.as_deref())?;
    let filter = of(asked, &key.instance);
    let rows = asked.state.projections().history(&filter, page)?.items;
    asked.lists(rows.len())?;
    Ok(rows)
}

async fn deployed_then(asked: &Asked, key: &DeployedTo) -> Result<Vec<HistoryRow>, Problem> {
    let page = history::page(Some(key.first), key.after.as_deref())?;
    asked.lists(0)?;
    asked.looks_back()?;
    let Some(at) = history::moment(&asked.state, key.at.clone())? else {
        return Ok(Vec::new());
    };
    let filter = of(asked, &key.instance);
    let ledger = asked.state.commands.ledger();
    let rows = ledger.history_at(at, &filter, page).await?.items;
    asked.lists(rows.len())?;
    Ok(rows)
}

fn of(asked: &Asked, instance: &InstanceRef) -> DeploymentFilter {
    DeploymentFilter {
        visible: asked.principal.visible().clone(),
        ..DeploymentFilter::of(instance)
    }
}
