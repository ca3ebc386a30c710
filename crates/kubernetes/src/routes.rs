//! Hostnames that move from one release to another: one HTTPRoute each, in the namespace of the
//! releases that it leads to, attached to the cluster's Gateway.
//!
//! Only objects that say that they are such routes of Daybook's are written or removed. What others
//! attach to the same Gateway, for the same hostnames or other ones, is theirs.

mod http_route;
mod ingress;

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use daybook_events::routing::GatewayAddress;
use daybook_events::{Hostname, ProjectName};
use daybook_workers::host_routes::{HostRoute, HostRoutes, RouteError, RouteSeen};
use daybook_workers::target::TargetError;
use kube::api::{DeleteParams, ListParams, Patch, PatchParams};
use kube::{Api, Client, Resource as _, ResourceExt};
use serde_json::{Value, json};
use tokio::sync::watch;

use http_route::Verdict;
pub(crate) use http_route::{GatewayObject, HttpRoute};
pub(crate) use ingress::seen as ingresses;

use crate::apply::timely;
use crate::differences::{differences, unasked};
use crate::error::refusal_of_gateway_api as refusal;
use crate::names::{self, ADDRESS, ENVIRONMENT, EPHEMERAL, MANAGED_BY, MANAGER, PROJECT};
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

fn key(route: &HttpRoute) -> (String, String) {
    (route.namespace().unwrap_or_default(), route.name_any())
}

/// Keeps what is known of the routes of a cluster.
pub(crate) fn take(known: &watch::Sender<Option<Known>>, change: Change<HttpRoute>) {
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

/// Where the Gateway of a cluster is reached.
#[derive(Default)]
pub(crate) struct Addresses {
    /// Nothing before it was seen.
    pub(crate) known: watch::Sender<Option<Vec<GatewayAddress>>>,
    is_watched: AtomicBool,
}

impl Addresses {
    /// Takes what a watch says. A Gateway that is gone is reached nowhere.
    pub(crate) fn take(&self, change: Change<GatewayObject>) {
        self.is_watched.store(true, Ordering::Relaxed);
        match change {
            Change::All(all) => self.tell(all.first()),
            Change::Applied(gateway) => self.tell(Some(&*gateway)),
            Change::Deleted(_) => self.tell(None),
        }
    }

    /// Takes that it is not watched any more, for the time being or for good.
    pub(crate) fn cut(&self) {
        self.is_watched.store(false, Ordering::Relaxed);
    }

    /// Takes what it said when it was asked, which counts where it is not watched: a watch is
    /// behind, and would take it back for a moment.
    fn asked(&self, gateway: &GatewayObject) {
        if !self.is_watched.load(Ordering::Relaxed) {
            self.tell(Some(gateway));
        }
    }

    fn tell(&self, gateway: Option<&GatewayObject>) {
        let now = Some(gateway.map_or_else(Vec::new, GatewayObject::addresses));
        self.known.send_if_modified(|known| {
            let differs = *known != now;
            *known = now;
            differs
        });
    }
}

/// The Gateway of a cluster.
pub(crate) struct Gateway<'a> {
    pub(crate) client: &'a Client,
    pub(crate) gateway: &'a GatewayRef,
    pub(crate) known: watch::Receiver<Option<Known>>,
    pub(crate) addresses: &'a Addresses,
}

impl Gateway<'_> {
    /// Leads a project's hostnames where they are to lead, and nowhere else, and waits until the
    /// Gateway has taken that. A hostname that is refused keeps no other from being led.
    pub(crate) async fn lead(mut self, routes: &HostRoutes) -> Result<(), RouteError> {
        let before = self.list(&routes.project).await.map_err(later)?;
        let wanted: Vec<_> = routes
            .hosts
            .iter()
            .map(|host| Wanted::new(&routes.project, host, self.gateway))
            .collect();
        let mut refused = BTreeMap::new();
        let mut written = Vec::new();
        for route in &wanted {
            match self.apply(route, before.get(&route.key())).await {
                Ok(at) => written.push((route, at)),
                Err(TargetError::Refused(why)) => {
                    refused.insert(route.hostname.clone(), why);
                }
                Err(error) => return Err(later(error)),
            }
        }
        self.prune(&wanted, &before).await.map_err(later)?;
        if !written.is_empty() {
            match self.taken(&written).await {
                Err(RouteError::Refused(more)) => refused.extend(more),
                Err(error) if refused.is_empty() => return Err(error),
                _ => {}
            }
        }
        match refused.is_empty() {
            true => Ok(()),
            false => Err(RouteError::Refused(refused)),
        }
    }

    /// The routes of a project as the API server has them now: a watch may be behind.
    async fn list(&self, project: &ProjectName) -> Result<Known, TargetError> {
        let what = "the HTTPRoutes of hostnames that move";
        let ours = format!("{MANAGED_BY}={MANAGER},{PROJECT}={project},{ADDRESS}={MOVES}");
        let list = ListParams::default().labels(&ours);
        let api: Api<HttpRoute> = Api::all(self.client.clone());
        let found = timely(what, api.list(&list)).await?;
        let found = found.map_err(|e| refusal(what, &e))?;
        Ok(found
            .into_iter()
            .map(|route| (key(&route), route))
            .collect())
    }

    async fn apply(&self, route: &Wanted, known: Option<&HttpRoute>) -> Result<At, TargetError> {
        let what = format!("HTTPRoute {}", route.name);
        let api: Api<HttpRoute> = Api::namespaced(self.client.clone(), &route.namespace);
        match known {
            Some(known) if known.meta().deletion_timestamp.is_some() => {
                return Err(TargetError::Unavailable(format!(
                    "{what} is still being deleted"
                )));
            }
            Some(known) if route.is(known) => return Ok(At::of(known)),
            Some(_) => {}
            None => {
                let found = timely(&what, api.get_opt(&route.name)).await?;
                let found = found.map_err(|e| refusal(&what, &e))?;
                if found.is_some_and(|found| !moves(&found)) {
                    return Err(TargetError::Refused(format!(
                        "{what} in namespace {} exists and is not Daybook's. Rename it, or delete it",
                        route.namespace
                    )));
                }
            }
        }
        let patch = Patch::Apply(&route.body);
        // Whoever edits it by hand owns those fields from then on, also once they are put back. A
        // switch, and so the way back from a bad release, must not wait for them to be handed over.
        let params = PatchParams::apply(MANAGER).force();
        let applied = timely(&what, api.patch(&route.name, &params, &patch)).await?;
        match applied {
            Ok(applied) => Ok(At::of(&applied)),
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
    async fn prune(&self, wanted: &[Wanted], before: &Known) -> Result<(), TargetError> {
        let wanted: HashSet<_> = wanted.iter().map(Wanted::key).collect();
        for (namespace, name) in before.keys().filter(|key| !wanted.contains(key)) {
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
    async fn taken(&mut self, written: &[(&Wanted, At)]) -> Result<(), RouteError> {
        let begun = tokio::time::Instant::now();
        let mut refused_since = None;
        loop {
            let (refused, waiting) = self.verdicts(written);
            let since = match (refused.is_empty(), &waiting) {
                (true, None) => return self.programmed().await,
                (true, Some(_)) => {
                    refused_since = None;
                    begun
                }
                (false, _) => *refused_since.get_or_insert_with(tokio::time::Instant::now),
            };
            let allowed = match refused.is_empty() {
                true => TAKEN_WITHIN,
                false => REFUSED_FOR,
            };
            match tokio::time::timeout_at(since + allowed, self.known.changed()).await {
                Ok(Ok(())) => {}
                Err(_) if !refused.is_empty() => return Err(RouteError::Refused(refused)),
                _ => return Err(RouteError::Unavailable(waiting.unwrap_or_default())),
            }
        }
    }

    /// What is refused, and one that is not taken yet, with what the Gateway says of them. What was
    /// seen of a route before it was written is of the time before.
    fn verdicts(
        &mut self,
        written: &[(&Wanted, At)],
    ) -> (BTreeMap<Hostname, String>, Option<String>) {
        let (mut refused, mut waiting) = (BTreeMap::new(), None);
        let known = self.known.borrow_and_update();
        for (route, at) in written {
            let seen = known.as_ref().and_then(|known| known.get(&route.key()));
            let seen = seen.filter(|seen| at.is_reached_by(seen) && route.is(seen));
            let message = |said: String| {
                let (name, gateway) = (&route.name, &self.gateway.name);
                format!("HTTPRoute {name}: the Gateway {gateway} has not taken it: {said}")
            };
            match seen.map_or_else(http_route::silent, |seen| seen.verdict(self.gateway)) {
                Verdict::Taken => {}
                Verdict::Refused(why) => {
                    refused.insert(route.hostname.clone(), message(why));
                }
                Verdict::Waiting(why) => waiting = waiting.or_else(|| Some(message(why))),
            }
        }
        (refused, waiting)
    }

    /// Whether the Gateway itself serves what it has taken. One that does not say so does.
    async fn programmed(&self) -> Result<(), RouteError> {
        let namespace = self.gateway.namespace.as_deref();
        // In the routes' own namespaces there may be several of that name.
        let Some(namespace) = namespace else {
            return Ok(());
        };
        let what = format!("Gateway {}", self.gateway.name);
        let api: Api<GatewayObject> = Api::namespaced(self.client.clone(), namespace);
        let found = timely(&what, api.get(&self.gateway.name)).await;
        let found = found.and_then(|found| found.map_err(|e| refusal(&what, &e)));
        let found = found.map_err(later)?;
        self.addresses.asked(&found);
        match found.unprogrammed() {
            Some(why) => Err(RouteError::Unavailable(format!(
                "{what} is not programmed: {why}"
            ))),
            None => Ok(()),
        }
    }
}

/// What is about no hostname of its own is no reason to lead one back.
fn later(error: TargetError) -> RouteError {
    RouteError::Unavailable(error.to_string())
}

/// A route as the API server had it at a certain time.
struct At {
    uid: Option<String>,
    generation: Option<i64>,
}

impl At {
    fn of(route: &HttpRoute) -> Self {
        Self {
            uid: route.uid(),
            generation: route.meta().generation,
        }
    }

    /// Whether what is seen is of that time, or later.
    fn is_reached_by(&self, seen: &HttpRoute) -> bool {
        seen.uid() == self.uid && seen.meta().generation >= self.generation
    }
}

/// Whether an object says that it is the route of a hostname that moves.
fn moves(route: &HttpRoute) -> bool {
    let label = |key| route.labels().get(key).map(String::as_str);
    label(MANAGED_BY) == Some(MANAGER) && label(ADDRESS) == Some(MOVES)
}

/// A route, as it is to be. It is called as its hostname.
struct Wanted {
    hostname: Hostname,
    namespace: String,
    name: String,
    body: Value,
}

impl Wanted {
    fn new(project: &ProjectName, host: &HostRoute, gateway: &GatewayRef) -> Self {
        let namespace = names::namespace(project, &host.environment);
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
                    PROJECT: project,
                    ENVIRONMENT: host.environment,
                    EPHEMERAL: host.ephemeral.to_string(),
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
            hostname: host.hostname.clone(),
            namespace,
            name,
            body,
        }
    }

    fn key(&self) -> (String, String) {
        (self.namespace.clone(), self.name.clone())
    }

    /// Whether an object leads it there already, and nothing elsewhere, and says whose it is.
    fn is(&self, known: &HttpRoute) -> bool {
        let labels = &self.body["metadata"]["labels"];
        differences(labels, &json!(known.labels())).is_empty()
            && otherwise(&self.body["spec"], &known.spec).is_empty()
    }
}

/// How a hostname is led, held against how it is to be led.
pub(crate) fn seen(
    known: &Known,
    project: &ProjectName,
    host: &HostRoute,
    gateway: &GatewayRef,
) -> RouteSeen {
    let wanted = Wanted::new(project, host, gateway);
    let expected = way(&wanted.body["spec"]);
    let found = known.get(&wanted.key());
    let Some(found) = found.filter(|found| found.meta().deletion_timestamp.is_none()) else {
        return RouteSeen::Missing { expected };
    };
    let fields = otherwise(&wanted.body["spec"], &found.spec);
    match fields.is_empty() {
        true => RouteSeen::AsAsked,
        false => RouteSeen::Changed {
            expected,
            actual: way(&found.spec),
            fields,
        },
    }
}

/// The fields of a route's spec that are otherwise. Unlike with other objects, what nobody asked for
/// counts as well: another rule, a match on a header, a filter or one more Gateway leads somebody
/// elsewhere. Only what Gateway API takes for granted does not.
pub(crate) fn otherwise(wanted: &Value, live: &Value) -> Vec<String> {
    let live = with_defaults(live);
    let mut fields = differences(wanted, &live);
    fields.extend(unasked(wanted, &live));
    fields.sort();
    fields.dedup();
    fields
}

/// A route's spec with what Gateway API takes for granted where nothing is said. Routes that Daybook
/// makes say all of it.
fn with_defaults(spec: &Value) -> Value {
    let mut spec = spec.clone();
    for parent in items(&mut spec, "parentRefs") {
        presume(parent, "group", json!("gateway.networking.k8s.io"));
        presume(parent, "kind", json!("Gateway"));
    }
    for rule in items(&mut spec, "rules") {
        presume(rule, "matches", json!([{}]));
        for one in items(rule, "matches") {
            presume(one, "path", json!({}));
            if let Some(path) = one.get_mut("path") {
                presume(path, "type", json!("PathPrefix"));
                presume(path, "value", json!("/"));
            }
        }
        for backend in items(rule, "backendRefs") {
            presume(backend, "group", json!(""));
            presume(backend, "kind", json!("Service"));
            presume(backend, "weight", json!(1));
        }
    }
    spec
}

/// The items of a list in an object; none if there is no such list.
fn items<'a>(of: &'a mut Value, list: &str) -> &'a mut [Value] {
    match of.get_mut(list) {
        Some(Value::Array(items)) => items.as_mut_slice(),
        _ => &mut [],
    }
}

/// Sets a field of an object that does not say it.
fn presume(of: &mut Value, field: &str, default: Value) {
    if let Value::Object(fields) = of {
        fields.entry(field).or_insert(default);
    }
}

/// Where a route leads which hostnames, in one line: `www.example.com: web-1a2b3c4d 90, web-… 10`.
fn way(spec: &Value) -> String {
    let text = |value: &Value| value.as_str().unwrap_or("?").to_owned();
    let all = |value: &Value| value.as_array().cloned().unwrap_or_default();
    let hostnames: Vec<_> = all(&spec["hostnames"]).iter().map(text).collect();
    let rules = all(&spec["rules"]).into_iter().map(|rule| {
        let backends = all(&rule["backendRefs"]).into_iter().map(|backend| {
            // One is the weight of those that say none.
            let weight = backend["weight"].as_u64().unwrap_or(1);
            format!("{} {weight}", text(&backend["name"]))
        });
        backends.collect::<Vec<_>>().join(", ")
    });
    let rules = rules.collect::<Vec<_>>().join("; ");
    format!("{}: {rules}", hostnames.join(", "))
}

#[cfg(test)]
mod tests {
    use daybook_events::DeploymentId;
    use daybook_workers::host_routes::HostBackend;
    use uuid::Uuid;

    use super::*;

    #[test]
    fn what_a_gateway_says_when_asked_counts_for_as_long_as_it_is_not_watched() {
        let gateway = |address: &str| -> GatewayObject {
            let addresses = json!([{ "type": "IPAddress", "value": address }]);
            serde_json::from_value(json!({ "status": { "addresses": addresses } })).unwrap()
        };
        let addresses = Addresses::default();
        let known = || {
            let known = addresses.known.borrow().clone().unwrap();
            known.iter().map(ToString::to_string).collect::<Vec<_>>()
        };
        addresses.asked(&gateway("203.0.113.1"));
        assert_eq!(known(), ["203.0.113.1"]);
        addresses.take(Change::All(vec![gateway("203.0.113.2")]));
        addresses.asked(&gateway("203.0.113.3"));
        assert_eq!(known(), ["203.0.113.2"]);
        addresses.cut();
        assert_eq!(known(), ["203.0.113.2"]);
        addresses.asked(&gateway("203.0.113.3"));
        assert_eq!(known(), ["203.0.113.3"]);
        addresses.take(Change::All(Vec::new()));
        addresses.asked(&gateway("203.0.113.4"));
        assert_eq!(known(), [""; 0]);
    }

    /// A route with two backends, as it is to be.
    fn spec() -> Value {
        let backend = |n, weight| HostBackend {
            service: "web".parse().unwrap(),
            deployment: DeploymentId(Uuid::from_u128(n)),
            weight,
        };
        let host = HostRoute {
            hostname: "shop.example.com".parse().unwrap(),
            environment: "production".parse().unwrap(),
            ephemeral: false,
            backends: vec![backend(1, 90), backend(2, 1)],
        };
        let gateway = GatewayRef {
            name: "public".to_owned(),
            namespace: Some("edge".to_owned()),
            section_name: None,
        };
        let wanted = Wanted::new(&"shop".parse().unwrap(), &host, &gateway);
        wanted.body["spec"].clone()
    }

    /// The name of the n-th backend.
    fn backend(spec: &Value, n: usize) -> String {
        let name = &spec["rules"][0]["backendRefs"][n]["name"];
        name.as_str().unwrap().to_owned()
    }

    fn remove(of: &mut Value, field: &str) {
        assert!(of.as_object_mut().unwrap().remove(field).is_some());
    }

    #[test]
    fn what_gateway_api_takes_for_granted_is_no_change() {
        let wanted = spec();
        assert_eq!(otherwise(&wanted, &wanted), [""; 0]);
        let mut live = wanted.clone();
        for field in ["group", "kind"] {
            remove(&mut live["parentRefs"][0], field);
            remove(&mut live["rules"][0]["backendRefs"][0], field);
        }
        remove(&mut live["rules"][0]["backendRefs"][1], "weight");
        remove(&mut live["rules"][0]["matches"][0]["path"], "type");
        assert_eq!(otherwise(&wanted, &live), [""; 0]);
        remove(&mut live["rules"][0]["matches"][0], "path");
        assert_eq!(otherwise(&wanted, &live), [""; 0]);
        remove(&mut live["rules"][0], "matches");
        assert_eq!(otherwise(&wanted, &live), [""; 0]);
        // Nor is what says nothing, nor the order of backends.
        live["rules"][0]["filters"] = json!([]);
        live["rules"][0]["timeouts"] = json!({});
        live["rules"][0]["backendRefs"]
            .as_array_mut()
            .unwrap()
            .reverse();
        assert_eq!(otherwise(&wanted, &live), [""; 0]);
    }

    #[test]
    fn whatever_else_is_said_of_a_route_leads_somebody_elsewhere() {
        let wanted = spec();
        let second = backend(&wanted, 1);
        let filter = json!([{
            "type": "RequestRedirect",
            "requestRedirect": { "hostname": "theirs.example.com", "statusCode": 302 },
        }]);
        let header = json!([{ "type": "Exact", "name": "x-beta", "value": "1" }]);
        for (place, value, field) in [
            (
                "/rules/0/matches/0/headers",
                header.clone(),
                ".rules[0].matches[0].headers".to_owned(),
            ),
            (
                "/rules/0/matches/0/queryParams",
                header,
                ".rules[0].matches[0].queryParams".to_owned(),
            ),
            (
                "/rules/0/matches/0/method",
                json!("GET"),
                ".rules[0].matches[0].method".to_owned(),
            ),
            (
                "/rules/0/matches/0/path/value",
                json!("/theirs"),
                ".rules[0].matches[0].path.value".to_owned(),
            ),
            (
                "/rules/0/filters",
                filter.clone(),
                ".rules[0].filters".to_owned(),
            ),
            (
                "/rules/0/timeouts",
                json!({ "request": "1ms" }),
                ".rules[0].timeouts".to_owned(),
            ),
            (
                "/rules/0/retry",
                json!({ "attempts": 9 }),
                ".rules[0].retry".to_owned(),
            ),
            (
                "/rules/0/sessionPersistence",
                json!({ "type": "Cookie" }),
                ".rules[0].sessionPersistence".to_owned(),
            ),
            (
                "/rules/0/backendRefs/1/filters",
                filter,
                format!(".rules[0].backendRefs[{second}].filters"),
            ),
            (
                "/rules/0/backendRefs/1/namespace",
                json!("theirs"),
                format!(".rules[0].backendRefs[{second}].namespace"),
            ),
            (
                "/parentRefs/0/port",
                json!(8080),
                ".parentRefs[public].port".to_owned(),
            ),
        ] {
            let mut live = wanted.clone();
            let (of, key) = place.rsplit_once('/').unwrap();
            live.pointer_mut(of).unwrap()[key] = value;
            assert_eq!(otherwise(&wanted, &live), [field], "{live}");
        }
    }

    #[test]
    fn one_more_of_anything_is_a_change() {
        let wanted = spec();
        for (list, field) in [
            ("/parentRefs", ".parentRefs"),
            ("/hostnames", ".hostnames"),
            ("/rules", ".rules"),
            ("/rules/0/matches", ".rules[0].matches"),
            ("/rules/0/backendRefs", ".rules[0].backendRefs"),
        ] {
            let mut live = wanted.clone();
            let items = live.pointer_mut(list).unwrap().as_array_mut().unwrap();
            let mut more = items[0].clone();
            if let Some(name) = more.get_mut("name") {
                *name = json!("theirs");
            }
            items.push(more);
            assert_eq!(otherwise(&wanted, &live), [field], "{live}");
        }
    }
}
