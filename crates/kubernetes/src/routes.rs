//! Hostnames that move from one release to another: one HTTPRoute each, in the namespace of the
//! releases that it leads to, attached to the cluster's Gateway.
//!
//! Only objects that say that they are such routes of Daybook's are written or removed. What others
//! attach to the same Gateway, for the same hostnames or other ones, is theirs.

mod http_route;

use std::collections::{HashMap, HashSet};
use std::time::Duration;

use daybook_workers::host_routes::{HostRoute, HostRoutes};
use daybook_workers::target::TargetError;
use kube::api::{DeleteParams, Patch, PatchParams};
use kube::{Api, Client, ResourceExt};
use serde_json::{Value, json};
use tokio::sync::watch;

pub(crate) use http_route::HttpRoute;
use http_route::Verdict;

use crate::apply::timely;
use crate::differences::differences;
use crate::error::refusal;
use crate::names::{self, ADDRESS, ENVIRONMENT, MANAGED_BY, MANAGER, PROJECT};
use crate::objects::{self, GatewayRef};
use crate::watches::Change;

/// How long a Gateway may take for routes that it has not refused.
const TAKEN_WITHIN: Duration = Duration::from_secs(30);
/// How long a refusal has to last. What a route names may come after it.
const REFUSED_FOR: Duration = Duration::from_secs(5);

/// The value of [`ADDRESS`] of routes whose hostname moves.
const MOVES: &str = "moves";

/// Routes by namespace and name.
pub(crate) type Known = HashMap<(String, String), HttpRoute>;

/// Keeps what is known of the routes of a cluster.
pub(crate) fn take(known: &watch::Sender<Option<Known>>, change: Change<HttpRoute>) {
    let key = |route: &HttpRoute| (route.namespace().unwrap_or_default(), route.name_any());
    known.send_modify(|known| match change {
        Change::All(all) => {
            *known = Some(all.into_iter().map(|route| (key(&route), route)).collect());
        }
        Change::Applied(route) => {
            known.get_or_insert_default().insert(key(&route), *route);
        }
        Change::Deleted(route) => {
            known.get_or_insert_default().remove(&key(&route));
        }
    });
}

/// The Gateway of a cluster.
pub(crate) struct Gateway<'a> {
    pub(crate) client: &'a Client,
    pub(crate) gateway: &'a GatewayRef,
    pub(crate) known: watch::Receiver<Option<Known>>,
}

impl Gateway<'_> {
    /// Leads a project's hostnames where they are to lead, and nowhere else, and waits until the
    /// Gateway has taken that.
    pub(crate) async fn lead(mut self, routes: &HostRoutes) -> Result<(), TargetError> {
        let before = {
            let listed = self.known.wait_for(Option::is_some);
            let listed = tokio::time::timeout(TAKEN_WITHIN, listed).await;
            let known = listed.ok().and_then(Result::ok);
            known.and_then(|known| known.clone())
        };
        let before = before.ok_or_else(|| {
            TargetError::Unavailable("HTTPRoutes cannot be listed yet".to_owned())
        })?;
        let wanted: Vec<_> = routes
            .hosts
            .iter()
            .map(|host| Wanted::new(routes, host, self.gateway))
            .collect();
        for route in &wanted {
            self.apply(route, before.get(&route.key())).await?;
        }
        self.prune(routes, &wanted, &before).await?;
        self.taken(&wanted).await
    }

    async fn apply(&self, route: &Wanted, known: Option<&HttpRoute>) -> Result<(), TargetError> {
        let what = format!("HTTPRoute {}", route.name);
        let api: Api<HttpRoute> = Api::namespaced(self.client.clone(), &route.namespace);
        let is_ours = match known {
            Some(known) if moves(known) && route.is(known) => return Ok(()),
            Some(known) => moves(known),
            None => {
                let found = timely(&what, api.get_opt(&route.name)).await?;
                let found = found.map_err(|e| refusal(&what, &e))?;
                found.is_none_or(|found| moves(&found))
            }
        };
        if !is_ours {
            return Err(TargetError::Refused(format!(
                "{what} in namespace {} exists and is not Daybook's. Rename it, or delete it",
                route.namespace
            )));
        }
        let patch = Patch::Apply(&route.body);
        let params = PatchParams::apply(MANAGER);
        let applied = timely(&what, api.patch(&route.name, &params, &patch)).await?;
        match applied {
            Ok(_) => Ok(()),
            // Its namespace comes with the releases.
            Err(kube::Error::Api(status))
                if status.code == 404 && status.message.contains("namespaces") =>
            {
                Err(TargetError::Unavailable(format!(
                    "{what}: {}",
                    status.message
                )))
            }
            Err(e) => Err(refusal(&what, &e)),
        }
    }

    /// Removes the routes of hostnames that lead nowhere on this cluster any more.
    async fn prune(
        &self,
        routes: &HostRoutes,
        wanted: &[Wanted],
        before: &Known,
    ) -> Result<(), TargetError> {
        let wanted: HashSet<_> = wanted.iter().map(Wanted::key).collect();
        for (key, route) in before {
            let of_project = route.labels().get(PROJECT).map(String::as_str);
            if of_project != Some(routes.project.as_str()) || !moves(route) || wanted.contains(key)
            {
                continue;
            }
            let (namespace, name) = key;
            let what = format!("HTTPRoute {name}");
            let api: Api<HttpRoute> = Api::namespaced(self.client.clone(), namespace);
            match timely(&what, api.delete(name, &DeleteParams::default())).await? {
                Ok(_) => {}
                Err(kube::Error::Api(status)) if status.code == 404 => {}
                Err(e) => return Err(refusal(&what, &e)),
            }
        }
        Ok(())
    }

    /// Waits until the Gateway says that it has taken all of them. What it refuses, and goes on
    /// refusing, is refused.
    async fn taken(&mut self, wanted: &[Wanted]) -> Result<(), TargetError> {
        let begun = tokio::time::Instant::now();
        let mut refused_since = None;
        loop {
            let verdict = {
                let known = self.known.borrow_and_update();
                let known = known.as_ref();
                let verdicts = wanted.iter().map(|route| {
                    let seen = known.and_then(|k| k.get(&route.key()));
                    let seen = seen.filter(|seen| route.is(seen));
                    let verdict = seen.map_or_else(http_route::silent, |s| s.verdict(self.gateway));
                    (route, verdict)
                });
                worst(verdicts)
            };
            let (route, said, refused) = match verdict {
                None => return self.programmed().await,
                Some((name, Verdict::Refused(why))) => (name, why, true),
                Some((name, Verdict::Waiting(why))) => (name, why, false),
                Some((_, Verdict::Taken)) => continue,
            };
            let since = match refused {
                true => *refused_since.get_or_insert_with(tokio::time::Instant::now),
                false => {
                    refused_since = None;
                    begun
                }
            };
            let allowed = if refused { REFUSED_FOR } else { TAKEN_WITHIN };
            let message = || {
                let gateway = &self.gateway.name;
                format!("HTTPRoute {route}: the Gateway {gateway} has not taken it: {said}")
            };
            let over = since + allowed;
            match tokio::time::timeout_at(over, self.known.changed()).await {
                Ok(Ok(())) => {}
                Ok(Err(_)) => return Err(TargetError::Unavailable(message())),
                Err(_) if refused => return Err(TargetError::Refused(message())),
                Err(_) => return Err(TargetError::Unavailable(message())),
            }
        }
    }

    /// Whether the Gateway itself serves what it has taken. One that does not say so does.
    async fn programmed(&self) -> Result<(), TargetError> {
        let namespace = self.gateway.namespace.as_deref();
        // In the routes' own namespaces there may be several of that name.
        let Some(namespace) = namespace else {
            return Ok(());
        };
        let what = format!("Gateway {}", self.gateway.name);
        let api: Api<http_route::GatewayObject> = Api::namespaced(self.client.clone(), namespace);
        let found = timely(&what, api.get(&self.gateway.name)).await?;
        let found = found.map_err(|e| refusal(&what, &e))?;
        match found.unprogrammed() {
            Some(why) => Err(TargetError::Unavailable(format!(
                "{what} is not programmed: {why}"
            ))),
            None => Ok(()),
        }
    }
}

/// The first that was refused, or else the first that is not taken yet.
fn worst<'a>(verdicts: impl Iterator<Item = (&'a Wanted, Verdict)>) -> Option<(&'a str, Verdict)> {
    let mut waiting = None;
    for (route, verdict) in verdicts {
        match verdict {
            Verdict::Taken => {}
            Verdict::Refused(_) => return Some((route.name.as_str(), verdict)),
            Verdict::Waiting(_) => waiting = waiting.or(Some((route.name.as_str(), verdict))),
        }
    }
    waiting
}

/// Whether an object says that it is the route of a hostname that moves.
fn moves(route: &HttpRoute) -> bool {
    let label = |key| route.labels().get(key).map(String::as_str);
    label(MANAGED_BY) == Some(MANAGER) && label(ADDRESS) == Some(MOVES)
}

/// A route, as it is to be. It is called as its hostname.
struct Wanted {
    namespace: String,
    name: String,
    body: Value,
}

impl Wanted {
    fn new(routes: &HostRoutes, host: &HostRoute, gateway: &GatewayRef) -> Self {
        let namespace = names::namespace(&routes.project, &host.environment);
        let name = host.hostname.to_string();
        let backends = host.backends.iter().map(|backend| {
            json!({
                "group": "",
                "kind": "Service",
                "name": names::release(&backend.service, backend.deployment),
                "port": 80,
                "weight": backend.weight,
            })
        });
        let body = json!({
            "apiVersion": "gateway.networking.k8s.io/v1",
            "kind": "HTTPRoute",
            "metadata": {
                "name": name,
                "namespace": namespace,
                "labels": {
                    ADDRESS: MOVES,
                    MANAGED_BY: MANAGER,
                    PROJECT: routes.project,
                    ENVIRONMENT: host.environment,
                },
            },
            "spec": {
                "parentRefs": [objects::parent(gateway)],
                "hostnames": [host.hostname],
                "rules": [{
                    "matches": [{ "path": { "type": "PathPrefix", "value": "/" } }],
                    "backendRefs": backends.collect::<Vec<_>>(),
                }],
            },
        });
        Self {
            namespace,
            name,
            body,
        }
    }

    fn key(&self) -> (String, String) {
        (self.namespace.clone(), self.name.clone())
    }

    /// Whether an object is so already.
    fn is(&self, known: &HttpRoute) -> bool {
        let live = json!({ "spec": known.spec });
        let wanted = json!({ "spec": self.body["spec"] });
        // The backends are told apart by name, and one too many would not be missed.
        let count = |of: &Value| {
            of["spec"]["rules"][0]["backendRefs"]
                .as_array()
                .map(Vec::len)
        };
        differences(&wanted, &live).is_empty() && count(&wanted) == count(&live)
    }
}
