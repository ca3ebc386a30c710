//! The DNS records of a project's hostnames: what a name server is to say so that users get to the
//! Gateways of the clusters that serve them. Daybook writes none.

use std::collections::BTreeMap;

use axum::extract::State;
use daybook_events::routing::records::{
    self, DnsEndpoint, DnsProvider, Reach, RecordNote, RecordNoteReason, Serving, TTL_MAX,
    TTL_USUAL, Wish,
};
use daybook_events::routing::{self, ClusterPolicy, GatewayAddress, Routing, Stickiness};
use daybook_events::{ClusterName, Hostname, InstanceRef, ProjectName, Refusal};
use daybook_projections::{Projections, QueryError};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use utoipa::IntoParams;

use crate::answer::Answer;
use crate::extract::{Named, Params};
use crate::problem::Problem;
use crate::state::AppState;

/// Which records, and what they are to be like.
#[derive(Debug, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
#[serde(deny_unknown_fields)]
pub(crate) struct RecordQuery {
    /// Of this instance: `project.environment.service`.
    pub(crate) instance_id: Option<String>,
    /// Of this hostname.
    pub(crate) hostname: Option<String>,
    /// How long they may be kept by those who ask, in seconds: a minute, if not given.
    pub(crate) ttl: Option<u32>,
    /// Who serves them, which decides what they can say: `aws`, if not given, or `any`.
    pub(crate) provider: Option<String>,
    /// The regions of AWS that clusters are in, which the policy `latency` needs:
    /// `oslo=eu-north-1,bergen=eu-west-1`.
    pub(crate) regions: Option<String>,
    /// The health checks of Route 53 for the Gateways of clusters, which the policy `failover`
    /// needs: `oslo=8f1c6a2e-0000-4000-8000-1d4e5c9b7a30`.
    pub(crate) health_checks: Option<String>,
}

/// The DNS records of a project's hostnames.
#[derive(Debug, Serialize, JsonSchema)]
pub(crate) struct RecordList {
    /// The number of the route table that they are of.
    pub(crate) table: u32,
    /// Who serves them.
    pub(crate) provider: DnsProvider,
    /// By hostname.
    pub(crate) hostnames: Vec<HostnameRecords>,
}

/// The records of one hostname.
#[derive(Debug, Serialize, JsonSchema)]
pub(crate) struct HostnameRecords {
    /// The hostname.
    pub(crate) hostname: Hostname,
    /// `project.environment.service`.
    pub(crate) instance_id: String,
    /// What it sticks to.
    pub(crate) stickiness: Stickiness,
    /// How it is spread over clusters.
    pub(crate) policy: ClusterPolicy,
    /// The clusters that it leads to.
    pub(crate) clusters: BTreeMap<ClusterName, ClusterReach>,
    /// The records, as external-dns has them in its `DNSEndpoint`; none if there can be none.
    pub(crate) endpoints: Vec<DnsEndpoint>,
    /// What the records do not say, or say otherwise than the route table.
    pub(crate) notes: Vec<RecordNote>,
}

/// What is known of a cluster that a hostname leads to.
#[derive(Debug, Serialize, JsonSchema)]
pub(crate) struct ClusterReach {
    /// Whether it has a ready instance.
    pub(crate) ready: bool,
    /// Where its Gateway says that it is reached; null where it has not said anything.
    pub(crate) addresses: Option<Vec<String>>,
    /// The newest table that its Gateway has applied; null where none has reported.
    pub(crate) table: Option<u32>,
}

/// The DNS records that lead to where the hostnames of a project are served.
#[utoipa::path(get, path = "/api/v1/projects/{project}/records", tag = "traffic",
    params(("project" = String, Path, description = "The project."), RecordQuery),
    responses((status = 200, description = "The records.", body = RecordList)))]
pub(crate) async fn list_records(
    State(state): State<AppState>,
    Named(project): Named<ProjectName>,
    Params(query): Params<RecordQuery>,
) -> Result<Answer<RecordList>, Problem> {
    let wish = wish(&query)?;
    let instance = query.instance_id.map(|i| i.parse::<InstanceRef>());
    let instance = instance.transpose()?;
    let hostname = query.hostname.map(Hostname::parse).transpose()?;
    let routing = state.commands.routing(&project)?;
    let wanted = |h: &Hostname, r: &routing::Route| {
        hostname.as_ref().is_none_or(|wanted| wanted == h)
            && instance.as_ref().is_none_or(|i| *i == r.instance)
    };
    let mut hostnames = Vec::new();
    for (hostname, route) in routing.routes.iter().filter(|(h, r)| wanted(h, r)) {
        hostnames.push(of(state.projections(), &routing, hostname, route, &wish)?);
    }
    Ok(Answer::ok(RecordList {
        table: routing.table,
        provider: wish.provider,
        hostnames,
    }))
}

/// The records of one hostname.
fn of(
    projections: &Projections,
    routing: &Routing,
    hostname: &Hostname,
    route: &routing::Route,
    wish: &Wish,
) -> Result<HostnameRecords, QueryError> {
    let mut serving = Vec::with_capacity(route.backends.len());
    let mut clusters = BTreeMap::new();
    for backend in &route.backends {
        let row = projections.deployment(backend.deployment)?;
        let state = row.map(|row| row.state).filter(|s| s.in_repository());
        let Some(state) = state else { continue };
        let its = state.request.clusters.iter().map(|cluster| {
            let seen = state.observed.get(cluster);
            let ready = seen.is_some_and(|o| o.instances.iter().any(|i| i.ready));
            (cluster.clone(), ready)
        });
        let its: BTreeMap<_, _> = its.collect();
        for (cluster, ready) in &its {
            let reach = clusters.entry(cluster.clone());
            let reach = reach.or_insert_with(|| ClusterReach {
                ready: false,
                addresses: addresses(routing, cluster)
                    .map(|all| all.iter().map(ToString::to_string).collect()),
                table: routing.applied.get(cluster.as_str()).copied(),
            });
            reach.ready |= *ready;
        }
        serving.push(Serving {
            weight: backend.weight,
            clusters: its,
        });
    }
    let policy = routing.policy_of(route);
    let reach = |cluster: &ClusterName| match addresses(routing, cluster) {
        Some(addresses) => Reach::At(addresses),
        None if routing.applied.contains_key(cluster.as_str()) => Reach::Unsaid,
        None => Reach::NoGateway,
    };
    let records = records::records(hostname, policy, &serving, reach, wish);
    let behind = clusters.iter().filter_map(|(cluster, reach)| {
        let at = reach.table.filter(|at| *at < route.table)?;
        let since = route.table;
        Some(RecordNote {
            reason: RecordNoteReason::Behind,
            cluster: Some(cluster.clone()),
            message: format!(
                "the Gateway of {cluster} serves table {at}; it leads where it does since table {since}"
            ),
        })
    });
    let mut notes = records.notes;
    notes.extend(behind);
    Ok(HostnameRecords {
        hostname: hostname.clone(),
        instance_id: route.instance.to_string(),
        stickiness: route.stickiness,
        policy: policy.clone(),
        clusters,
        endpoints: records.endpoints,
        notes,
    })
}

/// Where the Gateway of a cluster has said that it is reached.
fn addresses<'a>(routing: &'a Routing, cluster: &ClusterName) -> Option<&'a [GatewayAddress]> {
    routing.addresses.get(cluster.as_str()).map(Vec::as_slice)
}

/// What the records are to be like.
fn wish(query: &RecordQuery) -> Result<Wish, Problem> {
    let ttl = query.ttl.unwrap_or(TTL_USUAL);
    if !(1..=TTL_MAX).contains(&ttl) {
        return Err(Refusal::new(
            "invalid_ttl",
            format!("records cannot be kept for {ttl} seconds"),
            "give `ttl` from 1 to 604800 seconds, which is a week",
        )
        .into());
    }
    let provider = match query.provider.as_deref() {
        None | Some("aws") => DnsProvider::Aws,
        Some("any") => DnsProvider::Any,
        Some(_) => {
            return Err(Refusal::new(
                "invalid_provider",
                "records are made for `aws` or for `any` name server",
                "give `provider=any` for every provider but Route 53",
            )
            .into());
        }
    };
    Ok(Wish {
        provider,
        ttl,
        regions: pairs(query.regions.as_deref())?,
        health_checks: pairs(query.health_checks.as_deref())?,
    })
}

/// The longest name of a region or a health check.
const VALUE_MAX: usize = 64;

/// Clusters with what is given for each: `oslo=eu-north-1,bergen=eu-west-1`.
fn pairs(text: Option<&str>) -> Result<BTreeMap<ClusterName, String>, Problem> {
    let mut found = BTreeMap::new();
    for pair in text.into_iter().flat_map(|text| text.split(',')) {
        let is_value = |value: &str| {
            let known = |c: char| c.is_ascii_alphanumeric() || c == '-';
            (1..=VALUE_MAX).contains(&value.len()) && value.chars().all(known)
        };
        let Some((cluster, value)) = pair.split_once('=').filter(|(_, v)| is_value(v)) else {
            let shown: String = pair.chars().take(80).collect();
            return Err(Refusal::new(
                "invalid_cluster_value",
                format!("{shown:?} is no cluster with a region or a health check"),
                "write `oslo=eu-north-1`, several with commas between them",
            )
            .into());
        };
        found.insert(cluster.parse()?, value.to_owned());
    }
    Ok(found)
}
