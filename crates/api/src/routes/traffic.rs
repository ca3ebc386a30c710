//! The route table of a project: what leads where, since when and why, and changing it.

use std::collections::BTreeMap;

use axum::extract::State;
use daybook_events::deployment::Status;
use daybook_events::routing::{
    self, ClusterPolicy, Ingresses, PolicyChange, RouteChange, Routing, Stickiness, SwitchReason,
};
use daybook_events::{ClusterName, DeploymentId, EventId, Hostname, InstanceRef, ProjectName};
use daybook_projections::{Projections, QueryError};
use jiff::Timestamp;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use utoipa::IntoParams;

use crate::answer::Answer;
use crate::commands::{RoutesSet, Shares, Traffic};
use crate::extract::{Command, CommandBody, Named, NoParams, Params, deployment_id};
use crate::problem::Problem;
use crate::state::AppState;

type Handled<T> = Result<Answer<T>, Problem>;

/// Which routes are listed.
#[derive(Debug, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
#[serde(deny_unknown_fields)]
pub(crate) struct RouteQuery {
    /// Of this instance: `project.environment.service`.
    pub(crate) instance_id: Option<String>,
    /// That of this hostname.
    pub(crate) hostname: Option<String>,
}

/// The route table of a project.
#[derive(Debug, Serialize, JsonSchema)]
pub(crate) struct RouteList {
    /// The number of the newest table.
    pub(crate) table: u32,
    /// The routes, by hostname.
    pub(crate) routes: Vec<RouteView>,
    /// The newest switches, newest first, at most sixteen; events have them all.
    pub(crate) switches: Vec<SwitchView>,
    /// The newest table that each gateway has applied.
    pub(crate) gateways: BTreeMap<String, u32>,
    /// Why it is not known of some clusters whether an Ingress serves a hostname as well.
    pub(crate) ingresses_unread: BTreeMap<String, String>,
}

/// Where a hostname leads.
#[derive(Debug, Serialize, JsonSchema)]
pub(crate) struct RouteView {
    /// The hostname.
    pub(crate) hostname: Hostname,
    /// Where to open it.
    pub(crate) url: String,
    /// `project.environment.service`.
    pub(crate) instance_id: String,
    /// What it sticks to.
    pub(crate) stickiness: Stickiness,
    /// How it is spread over clusters.
    pub(crate) policy: ClusterPolicy,
    /// The deployments that share it.
    pub(crate) backends: Vec<BackendView>,
    /// The number of the table that made it so.
    pub(crate) table: u32,
    /// Since when.
    pub(crate) since: Timestamp,
    /// Why that table was made.
    pub(crate) reason: SwitchReason,
    /// The event that made it.
    pub(crate) switched_by: EventId,
    /// Where it led before; empty for a new hostname.
    pub(crate) previous: Vec<routing::Backend>,
    /// The Ingresses of others that serve it as well on clusters with a Gateway, as of the newest
    /// table that each has applied.
    pub(crate) also_served: Vec<AlsoServed>,
}

/// An Ingress of somebody else that serves a hostname as well.
#[derive(Debug, Serialize, JsonSchema)]
pub(crate) struct AlsoServed {
    /// The cluster.
    pub(crate) cluster: String,
    /// Its namespace.
    pub(crate) namespace: String,
    /// Its name.
    pub(crate) name: String,
    /// Where it leads: `web:80` is a port of a Service.
    pub(crate) backends: Vec<String>,
}

/// A deployment's part of a route.
#[derive(Debug, Serialize, JsonSchema)]
pub(crate) struct BackendView {
    /// The deployment.
    pub(crate) deployment: DeploymentId,
    /// Its share, relative to the other backends' weights.
    pub(crate) weight: u32,
    /// Where it is in its life.
    pub(crate) status: Option<Status>,
    /// The clusters that it runs in, and whether each has a ready instance. The gateway sends
    /// nothing to one that has none.
    pub(crate) clusters: BTreeMap<ClusterName, bool>,
}

/// A switch of routes.
#[derive(Debug, Serialize, JsonSchema)]
pub(crate) struct SwitchView {
    /// The number of the table that it made.
    pub(crate) table: u32,
    /// Why.
    pub(crate) reason: SwitchReason,
    /// `project.environment.service`.
    pub(crate) instance_id: String,
    /// The deployment that it is about.
    pub(crate) deployment: DeploymentId,
    /// The hostnames, with where they led before and where they lead from then on.
    pub(crate) changes: Vec<RouteChange>,
    /// The main deployment from then on, if that changed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) main: Option<routing::MainChange>,
    /// The policy across clusters from then on, if that changed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) policy: Option<PolicyChange>,
    /// The table that it undoes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) undoes: Option<u32>,
    /// Why, in the caller's words.
    pub(crate) note: Option<String>,
}

impl From<&routing::Switched> for SwitchView {
    fn from(e: &routing::Switched) -> Self {
        Self {
            table: e.table,
            reason: e.reason,
            instance_id: e.instance.to_string(),
            deployment: e.deployment,
            changes: e.changes.clone(),
            main: e.main.clone(),
            policy: e.policy.clone(),
            undoes: e.undoes,
            note: e.note.clone(),
        }
    }
}

/// Which deployments share the traffic from here on, of an instance or of one hostname.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct SetRoutes {
    /// `project.environment.service`: all addresses that move with its main deployment.
    pub(crate) instance_id: Option<String>,
    /// One of its addresses.
    pub(crate) hostname: Option<String>,
    /// The deployments.
    pub(crate) to: Vec<SetShare>,
    /// The table that the caller decided on: if one of the hostnames was switched after it, nothing
    /// is done.
    pub(crate) expected_table: Option<u32>,
    /// Why.
    pub(crate) reason: Option<String>,
}
impl CommandBody for SetRoutes {}

/// A deployment's share.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct SetShare {
    /// The deployment.
    pub(crate) deployment: String,
    /// Its weight, relative to the others' weights: 1 to 10,000.
    pub(crate) weight: u32,
}

/// How the traffic of an instance is spread over clusters from here on.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct SetClusterPolicy {
    /// `project.environment.service`.
    instance_id: String,
    /// The policy.
    policy: ClusterPolicy,
    /// Why.
    reason: Option<String>,
}
impl CommandBody for SetClusterPolicy {}

/// Routes are set.
#[derive(Debug, Serialize, JsonSchema)]
pub(crate) struct RoutesAreSet {
    /// `project.environment.service`.
    pub(crate) instance_id: String,
    /// The switch; none if everything was as asked for already.
    pub(crate) switch: Option<SwitchView>,
}

impl From<RoutesSet> for Answer<RoutesAreSet> {
    fn from(set: RoutesSet) -> Self {
        let body = RoutesAreSet {
            instance_id: set.instance.to_string(),
            switch: set.switched.as_deref().map(SwitchView::from),
        };
        Self::done(&set.done, body)
    }
}

/// Where the hostnames of a project lead, since when and why, and the newest switches.
#[utoipa::path(get, path = "/api/v1/projects/{project}/routes", tag = "traffic",
    params(("project" = String, Path, description = "The project."), RouteQuery),
    responses((status = 200, description = "The routes.", body = RouteList)))]
pub(crate) async fn list_routes(
    State(state): State<AppState>,
    Named(project): Named<ProjectName>,
    Params(query): Params<RouteQuery>,
) -> Handled<RouteList> {
    let instance = query.instance_id.map(|i| i.parse::<InstanceRef>());
    let instance = instance.transpose()?;
    let hostname = query.hostname.map(Hostname::parse).transpose()?;
    let routing = state.commands.routing(&project)?;
    let wanted = |h: &Hostname, r: &routing::Route| {
        hostname.as_ref().is_none_or(|wanted| wanted == h)
            && instance.as_ref().is_none_or(|i| *i == r.instance)
    };
    let mut routes = Vec::new();
    for (h, route) in routing.routes.iter().filter(|(h, r)| wanted(h, r)) {
        let url = state.settings.gateway.url(h);
        routes.push(view(state.projections(), &routing, h, route, url)?);
    }
    let unread = routing.ingresses.iter();
    let unread = unread.filter_map(|(cluster, ingresses)| match ingresses {
        Ingresses::Unread(why) => Some((cluster.clone(), why.clone())),
        Ingresses::Seen(_) => None,
    });
    let switches = routing.recent.iter().rev();
    let switches = switches.filter(|s| instance.as_ref().is_none_or(|i| *i == s.instance));
    Ok(Answer::ok(RouteList {
        table: routing.table,
        routes,
        switches: switches.map(SwitchView::from).collect(),
        gateways: routing.applied.clone(),
        ingresses_unread: unread.collect(),
    }))
}

fn view(
    projections: &Projections,
    routing: &Routing,
    hostname: &Hostname,
    route: &routing::Route,
    url: String,
) -> Result<RouteView, QueryError> {
    let mut backends = Vec::with_capacity(route.backends.len());
    for backend in &route.backends {
        let row = projections.deployment(backend.deployment)?;
        let state = row.map(|row| row.state);
        let clusters = state.iter().flat_map(|s| {
            s.request.clusters.iter().map(|cluster| {
                let seen = s.observed.get(cluster);
                let ready = seen.is_some_and(|o| o.instances.iter().any(|i| i.ready));
                (cluster.clone(), ready)
            })
        });
        backends.push(BackendView {
            deployment: backend.deployment,
            weight: backend.weight,
            clusters: clusters.collect(),
            status: state.as_ref().map(|s| s.status),
        });
    }
    let also_served = routing.also_served(hostname);
    let also_served = also_served.map(|(cluster, ingress)| AlsoServed {
        cluster: cluster.to_owned(),
        namespace: ingress.namespace.clone(),
        name: ingress.name.clone(),
        backends: ingress.backends.clone(),
    });
    Ok(RouteView {
        hostname: hostname.clone(),
        url,
        instance_id: route.instance.to_string(),
        stickiness: route.stickiness,
        policy: routing.policy_of(route).clone(),
        backends,
        table: route.table,
        since: route.since,
        reason: route.reason,
        switched_by: route.by,
        previous: route.previous.clone(),
        also_served: also_served.collect(),
    })
}

/// Spreads the traffic of an instance, or of one of its hostnames, over running deployments.
#[utoipa::path(post, path = "/api/v1/projects/{project}/routes", tag = "traffic",
    params(("project" = String, Path, description = "The project.")),
    request_body = SetRoutes,
    responses((status = 200, description = "The routes are set.", body = RoutesAreSet)))]
pub(crate) async fn set_routes(
    State(state): State<AppState>,
    Named(project): Named<ProjectName>,
    Params(NoParams {}): Params<NoParams>,
    Command { caller, body }: Command<SetRoutes>,
) -> Handled<RoutesAreSet> {
    let traffic = match (body.instance_id, body.hostname) {
        (Some(instance), None) => Traffic::Of(instance.parse()?),
        (None, Some(hostname)) => Traffic::On(Hostname::parse(hostname)?),
        _ => {
            return Err(daybook_events::Refusal::new(
                "routes_required",
                "the request does not name exactly one instance or hostname",
                "give instance_id or hostname, but not both",
            )
            .into());
        }
    };
    let to = body.to.iter();
    let to = to.map(|share| Ok((deployment_id(&share.deployment)?, share.weight)));
    let wish = Shares {
        project,
        traffic,
        to: to.collect::<Result<_, Problem>>()?,
        expected_table: body.expected_table,
        note: body.reason,
    };
    Ok(state.commands.share_traffic(&caller, wish).await?.into())
}

/// Says how the traffic of an instance is spread over the clusters that it runs in.
#[utoipa::path(post, path = "/api/v1/projects/{project}/routes/policy", tag = "traffic",
    params(("project" = String, Path, description = "The project.")),
    request_body = SetClusterPolicy,
    responses((status = 200, description = "The policy is set.", body = RoutesAreSet)))]
pub(crate) async fn set_policy(
    State(state): State<AppState>,
    Named(project): Named<ProjectName>,
    Params(NoParams {}): Params<NoParams>,
    Command { caller, body }: Command<SetClusterPolicy>,
) -> Handled<RoutesAreSet> {
    let instance: InstanceRef = body.instance_id.parse()?;
    let commands = &state.commands;
    let set = commands.set_policy(&caller, &project, instance, body.policy, body.reason);
    Ok(set.await?.into())
}
