//! Hostnames of a project on the Gateway of a cluster, whose controller is played.

use daybook_events::routing::{GatewayAddress, IngressSeen, Ingresses};
use daybook_kubernetes::objects::GatewayRef;
use daybook_testkit::kubernetes::proxy::{FaultProxy, refusal};
use daybook_testkit::kubernetes::{Crd, Gateway, gateway};
use daybook_workers::host_routes::{HostBackend, HostRoute, HostRoutes, RouteError, RouteSeen};
use k8s_openapi::api::networking::v1::Ingress;
use kube::core::{ApiResource, DynamicObject, GroupVersionKind};
use serde_json::Value;

use super::*;

struct Edge {
    stage: Stage,
    namespace: String,
}

impl Edge {
    async fn new(environment: &str) -> Option<Self> {
        Self::of(environment, |_| {}).await
    }

    async fn of(environment: &str, set: impl FnOnce(&mut ClusterOptions)) -> Option<Self> {
        let namespace = format!("edge-{environment}");
        let plane = tokio::task::spawn_blocking(ControlPlane::shared);
        let client = plane.await.unwrap()?.client().await;
        for crd in [Crd::Gateway, Crd::HttpRoute] {
            if !crd.install(&client).await {
                return None;
            }
        }
        let gateway = GatewayRef {
            name: "public".to_owned(),
            namespace: Some(namespace.clone()),
            section_name: None,
        };
        let stage = Stage::of(environment, |options| {
            options.gateway = Some((gateway, "example.com".to_owned()));
            set(options);
        });
        let mut stage = stage.await?;
        stage.client = client.clone();
        // Whatever else a project has is pruned.
        stage.app.project = format!("shop-{environment}").parse().unwrap();
        let spaces: Api<Namespace> = Api::all(client);
        let params = PostParams::default();
        for name in [&namespace, &stage.namespace()] {
            let space = json!({ "metadata": { "name": name } });
            let space: Namespace = serde_json::from_value(space).unwrap();
            spaces.create(&params, &space).await.unwrap();
        }
        Some(Self { stage, namespace })
    }

    async fn controller(
        &self,
        refuses: impl Fn(&Value) -> Option<String> + Send + Sync + 'static,
    ) -> Gateway {
        let client = self.stage.client.clone();
        Gateway::start(client, &self.namespace, "public", refuses).await
    }

    fn api(&self) -> Api<DynamicObject> {
        let kind = GroupVersionKind::gvk("gateway.networking.k8s.io", "v1", "HTTPRoute");
        let client = self.stage.client.clone();
        Api::namespaced_with(
            client,
            &self.stage.namespace(),
            &ApiResource::from_gvk(&kind),
        )
    }

    async fn names(&self) -> Vec<String> {
        let all = self.api().list(&ListParams::default()).await.unwrap();
        all.iter().map(ResourceExt::name_any).collect()
    }

    fn host(&self, hostname: &str, backends: &[(u128, u32)]) -> HostRoute {
        let backends = backends.iter().map(|(n, weight)| HostBackend {
            service: web(),
            deployment: deployment(*n),
            weight: *weight,
        });
        HostRoute {
            hostname: hostname.parse().unwrap(),
            environment: self.stage.app.environment.clone(),
            ephemeral: false,
            backends: backends.collect(),
        }
    }

    async fn route(&self, hosts: Vec<HostRoute>) -> Result<(), RouteError> {
        let project = self.stage.app.project.clone();
        self.stage
            .target
            .route(&HostRoutes { project, hosts })
            .await
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn hostnames_lead_where_the_table_says_and_foreign_routes_stay() {
    let Some(edge) = Edge::new("traffic").await else {
        return;
    };
    let _controller = edge.controller(|_| None).await;
    let theirs = json!({
        "apiVersion": "gateway.networking.k8s.io/v1",
        "kind": "HTTPRoute",
        "metadata": { "name": "theirs" },
        "spec": {
            "parentRefs": [{ "name": "public", "namespace": edge.namespace }],
            "hostnames": ["shop.example.com"],
            "rules": [{ "backendRefs": [{ "name": "theirs", "port": 80 }] }],
        },
    });
    let theirs: DynamicObject = serde_json::from_value(theirs).unwrap();
    let (api, params) = (edge.api(), PostParams::default());
    api.create(&params, &theirs).await.unwrap();

    let both = |weights| {
        vec![
            edge.host("shop.example.com", weights),
            edge.host("web.traffic.shop.example.com", &[(1, 1)]),
        ]
    };
    edge.route(both(&[(1, 90), (2, 10)])).await.unwrap();
    let found = api.get("shop.example.com").await.unwrap();
    let backends = &found.data["spec"]["rules"][0]["backendRefs"];
    let weights: Vec<_> = [0, 1]
        .map(|n| (backends[n]["name"].clone(), backends[n]["weight"].clone()))
        .into();
    let service = |n| json!(names::release(&web(), deployment(n)));
    assert_eq!(weights, [(service(1), json!(90)), (service(2), json!(10))]);
    assert_eq!(
        found.data["status"]["parents"][0]["conditions"][0]["status"],
        "True"
    );

    // The same again writes nothing; a switch writes what differs.
    let version = |o: DynamicObject| o.resource_version().unwrap();
    let before = version(found);
    edge.route(both(&[(1, 90), (2, 10)])).await.unwrap();
    assert_eq!(version(api.get("shop.example.com").await.unwrap()), before);
    edge.route(both(&[(2, 1)])).await.unwrap();
    let found = api.get("shop.example.com").await.unwrap();
    let backends = found.data["spec"]["rules"][0]["backendRefs"].as_array();
    assert_eq!(backends.unwrap().len(), 1);

    // What syncs an environment leaves them alone.
    edge.stage.apply(1, &edge.stage.values()).await.unwrap();
    edge.route(vec![edge.host("shop.example.com", &[(2, 1)])])
        .await
        .unwrap();
    assert_eq!(edge.names().await, ["shop.example.com", "theirs"]);
    edge.route(Vec::new()).await.unwrap();
    assert_eq!(edge.names().await, ["theirs"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_gateway_does_not_take_is_refused_with_its_reason() {
    let Some(edge) = Edge::new("unrouted").await else {
        return;
    };
    let refuses = |route: &Value| {
        let bad = route["spec"]["hostnames"][0] == "forbidden.example.com";
        bad.then(|| "no listener allows this hostname".to_owned())
    };
    let _controller = edge.controller(refuses).await;
    // Nor is a route of somebody else taken over.
    let theirs = json!({
        "apiVersion": "gateway.networking.k8s.io/v1",
        "kind": "HTTPRoute",
        "metadata": { "name": "already.example.com" },
        "spec": { "hostnames": ["already.example.com"] },
    });
    let theirs: DynamicObject = serde_json::from_value(theirs).unwrap();
    let (api, params) = (edge.api(), PostParams::default());
    api.create(&params, &theirs).await.unwrap();
    let hostnames = [
        "already.example.com",
        "allowed.example.com",
        "forbidden.example.com",
    ];
    let hosts = hostnames.map(|hostname| edge.host(hostname, &[(1, 1)]));
    let refused = edge.route(hosts.into()).await;
    let Err(RouteError::Refused(refused)) = refused else {
        panic!("{refused:?}");
    };
    let by_name = |n: usize| refused[&hostnames[n].parse().unwrap()].as_str();
    assert_eq!(refused.len(), 2, "{refused:?}");
    assert!(by_name(0).contains("is not Daybook's"), "{refused:?}");
    let why = by_name(2);
    assert!(why.contains("HTTPRoute forbidden.example.com"), "{why}");
    assert!(why.contains("no listener allows this hostname"), "{why}");
    // That keeps no other from being led.
    let allowed = api.get("allowed.example.com").await.unwrap();
    let said = &allowed.data["status"]["parents"][0]["conditions"][0]["status"];
    assert_eq!(said, "True");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_gateway_that_is_gone_refuses_nothing_and_keeps_nothing_there() {
    let Some(edge) = Edge::new("no-gateway").await else {
        return;
    };
    let _controller = edge.controller(|_| None).await;
    let hosts = || vec![edge.host("shop.example.com", &[(1, 1)])];
    edge.route(hosts()).await.unwrap();
    let kind = GroupVersionKind::gvk("gateway.networking.k8s.io", "v1", "Gateway");
    let resource = ApiResource::from_gvk(&kind);
    let client = edge.stage.client.clone();
    let gateways: Api<DynamicObject> = Api::namespaced_with(client, &edge.namespace, &resource);
    let params = Default::default();
    gateways.delete("public", &params).await.unwrap();
    let failed = edge.route(hosts()).await;
    assert!(
        matches!(&failed, Err(RouteError::Unavailable(why)) if why.contains("Gateway public")),
        "{failed:?}"
    );
    edge.route(Vec::new()).await.unwrap();
    assert_eq!(edge.names().await, [""; 0]);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_others_switched_while_a_watch_is_cut_is_not_taken_for_the_same() {
    let plane = tokio::task::spawn_blocking(ControlPlane::shared);
    let Some(plane) = plane.await.unwrap() else {
        return;
    };
    let proxy = FaultProxy::start(plane).await;
    let client = proxy.client();
    let edge = Edge::of("unwatched", |options| options.client = client).await;
    let Some(edge) = edge else {
        return;
    };
    let _controller = edge.controller(|_| None).await;
    let leads_to = |n| vec![edge.host("shop.example.com", &[(n, 1)])];
    edge.route(leads_to(1)).await.unwrap();

    // Of HTTPRoutes nothing is seen any more, and another process switches.
    proxy.answer(|method, address| {
        let routes = method == "GET" && address.contains("/httproutes?");
        let is_watch = routes && !address.contains("project");
        is_watch.then(|| refusal(503, "ServiceUnavailable"))
    });
    proxy.cut();
    let troubled = tokio::time::timeout(PATIENCE, async {
        loop {
            match edge.stage.target.trouble() {
                Some(why) if why.starts_with("httproutes") => break why,
                _ => tokio::time::sleep(Duration::from_millis(20)).await,
            }
        }
    });
    let why = troubled.await.unwrap();
    // They are known there: nothing is to be installed.
    assert!(!why.contains("Install it"), "{why}");
    let backend = |n| names::release(&web(), deployment(n));
    let api = edge.api();
    let mut found = api.get("shop.example.com").await.unwrap();
    found.data["spec"]["rules"][0]["backendRefs"][0]["name"] = json!(backend(2));
    let other = json!({
        "apiVersion": "gateway.networking.k8s.io/v1",
        "kind": "HTTPRoute",
        "metadata": { "name": "shop.example.com", "labels": found.labels() },
        "spec": found.data["spec"],
    });
    let params = PatchParams::apply("daybook");
    api.patch("shop.example.com", &params, &Patch::Apply(other))
        .await
        .unwrap();

    let is_back = async {
        let leads_back = |found: Option<&DynamicObject>| {
            found.is_some_and(|o| {
                o.data["spec"]["rules"][0]["backendRefs"][0]["name"] == json!(backend(1))
            })
        };
        let awaited =
            kube::runtime::wait::await_condition(edge.api(), "shop.example.com", leads_back);
        let written = tokio::time::timeout(PATIENCE, awaited).await;
        written.expect("it is written again").unwrap();
        proxy.behave();
    };
    let (routed, ()) = tokio::join!(edge.route(leads_to(1)), is_back);
    routed.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_route_that_somebody_has_changed_is_seen_with_where_it_should_lead() {
    let Some(edge) = Edge::new("by-hand").await else {
        return;
    };
    let _controller = edge.controller(|_| None).await;
    let host = || edge.host("shop.example.com", &[(1, 90), (2, 10)]);
    edge.route(vec![host()]).await.unwrap();
    let project = edge.stage.app.project.clone();
    let seen = async |what: &str, is: &dyn Fn(&RouteSeen) -> bool| {
        let found = tokio::time::timeout(PATIENCE, async {
            loop {
                let seen = edge.stage.target.route_seen(&project, &host());
                if is(&seen) {
                    break seen;
                }
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        });
        let now = || edge.stage.target.route_seen(&project, &host());
        found
            .await
            .unwrap_or_else(|_| panic!("{what}: {:?}", now()))
    };
    let is_right = |seen: &RouteSeen| *seen == RouteSeen::AsAsked;
    let is_changed = |seen: &RouteSeen| matches!(seen, RouteSeen::Changed { .. });
    seen("as it is to be", &is_right).await;

    let (api, params) = (edge.api(), PatchParams::default());
    let name = "shop.example.com";
    let spec = api.get(name).await.unwrap().data["spec"].clone();
    let patched = async |spec: &Value| {
        let patch = Patch::Merge(json!({ "spec": spec }));
        api.patch(name, &params, &patch).await.unwrap();
    };
    let backend = |n| names::release(&web(), deployment(n));
    let way = |first: u32, second: u32| {
        format!("{name}: {} {first}, {} {second}", backend(1), backend(2))
    };
    // Other weights.
    let mut other = spec.clone();
    other["rules"][0]["backendRefs"][0]["weight"] = json!(1);
    patched(&other).await;
    let changed = RouteSeen::Changed {
        expected: way(90, 10),
        actual: way(1, 10),
        fields: vec![format!(".rules[0].backendRefs[{}].weight", backend(1))],
    };
    assert_eq!(seen("other weights", &is_changed).await, changed);
    patched(&spec).await;
    seen("as before", &is_right).await;

    // Another hostname, one more backend, and a filter that nobody asked for.
    let mut more = spec.clone();
    more["hostnames"] = json!([name, "more.example.com"]);
    let mut backends = spec["rules"][0]["backendRefs"].as_array().unwrap().clone();
    backends.push(json!({ "name": "theirs", "port": 80 }));
    let mut one_more = spec.clone();
    one_more["rules"][0]["backendRefs"] = json!(backends);
    let mut filtered = spec.clone();
    filtered["rules"][0]["filters"] = json!([{
        "type": "RequestHeaderModifier",
        "requestHeaderModifier": { "set": [{ "name": "x-by", "value": "hand" }] },
    }]);
    for (what, changed, field) in [
        ("hostnames", &more, ".hostnames"),
        ("backends", &one_more, ".rules[0].backendRefs"),
        ("filters", &filtered, ".rules[0].filters"),
    ] {
        patched(changed).await;
        let found = seen(what, &is_changed).await;
        let RouteSeen::Changed { fields, .. } = &found else {
            panic!("{found:?}");
        };
        assert_eq!(*fields, [field], "{found:?}");
        patched(&spec).await;
        seen("as before", &is_right).await;
    }

    // The next switch takes back what somebody still has, and what somebody has put back.
    patched(&filtered).await;
    seen("a filter", &is_changed).await;
    edge.route(vec![host()]).await.unwrap();
    seen("that it is taken back", &is_right).await;
    patched(&other).await;
    patched(&spec).await;
    let switched = edge.host(name, &[(2, 1)]);
    edge.route(vec![switched]).await.unwrap();
    let found = api.get(name).await.unwrap();
    let led = &found.data["spec"]["rules"][0]["backendRefs"];
    assert_eq!(led[0]["name"], json!(backend(2)), "{led}");
    edge.route(vec![host()]).await.unwrap();
    seen("as it is to be again", &is_right).await;

    api.delete(name, &Default::default()).await.unwrap();
    let missing = RouteSeen::Missing {
        expected: way(90, 10),
    };
    seen("that it is gone", &|seen| *seen == missing).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_gateway_is_reached_where_its_status_says_from_the_first_switch_on() {
    let Some(edge) = Edge::new("reached").await else {
        return;
    };
    let mut seen = edge.stage.target.gateway_addresses().unwrap();
    let until = async |seen: &mut tokio::sync::watch::Receiver<_>, expected: &[&str]| {
        let is_so = |now: &Option<Vec<GatewayAddress>>| {
            let now = now.as_ref().map(|all| all.iter().map(ToString::to_string));
            now.is_some_and(|now| now.eq(expected.iter().copied()))
        };
        let waited = tokio::time::timeout(PATIENCE, seen.wait_for(is_so))
            .await
            .is_ok();
        assert!(waited, "{expected:?}: {:?}", *seen.borrow());
    };
    let _controller = edge.controller(|_| None).await;
    let client = edge.stage.client.clone();
    let reach = async |addresses: &[(&str, &str)]| {
        gateway::reach(client.clone(), &edge.namespace, "public", addresses).await;
    };
    reach(&[("IPAddress", "203.0.113.7"), ("IPAddress", "2001:db8::7")]).await;
    edge.route(vec![edge.host("shop.example.com", &[(1, 1)])])
        .await
        .unwrap();
    until(&mut seen, &["203.0.113.7", "2001:db8::7"]).await;
    // It moves without any switch, as what its addresses come from does.
    reach(&[("Hostname", "lb-7.example.net")]).await;
    until(&mut seen, &["lb-7.example.net"]).await;
    reach(&[("example.com/pool", "blue")]).await;
    until(&mut seen, &[]).await;
    reach(&[("IPAddress", "203.0.113.8")]).await;
    until(&mut seen, &["203.0.113.8"]).await;
    let kind = GroupVersionKind::gvk("gateway.networking.k8s.io", "v1", "Gateway");
    let resource = ApiResource::from_gvk(&kind);
    let gateways: Api<DynamicObject> = Api::namespaced_with(client, &edge.namespace, &resource);
    gateways
        .delete("public", &Default::default())
        .await
        .unwrap();
    until(&mut seen, &[]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_gateway_that_may_not_be_watched_is_asked_at_each_switch() {
    let plane = tokio::task::spawn_blocking(ControlPlane::shared);
    let Some(plane) = plane.await.unwrap() else {
        return;
    };
    let proxy = FaultProxy::start(plane).await;
    proxy.answer(|method, address| {
        let lists = method == "GET" && address.contains("/gateways?");
        lists.then(|| refusal(403, "Forbidden"))
    });
    let client = proxy.client();
    let edge = Edge::of("asked", |options| options.client = client).await;
    let Some(edge) = edge else {
        return;
    };
    let _controller = edge.controller(|_| None).await;
    let seen = edge.stage.target.gateway_addresses().unwrap();
    for (n, address) in [(1, "203.0.113.7"), (2, "203.0.113.8")] {
        let client = edge.stage.client.clone();
        gateway::reach(client, &edge.namespace, "public", &[("IPAddress", address)]).await;
        edge.route(vec![edge.host("shop.example.com", &[(n, 1)])])
            .await
            .unwrap();
        let now = seen.borrow().clone().unwrap();
        assert_eq!(now, [GatewayAddress::Ip(address.parse().unwrap())]);
    }
    assert_eq!(edge.stage.target.trouble(), None);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_gateway_whose_watch_is_withdrawn_is_asked_from_then_on() {
    let plane = tokio::task::spawn_blocking(ControlPlane::shared);
    let Some(plane) = plane.await.unwrap() else {
        return;
    };
    let proxy = FaultProxy::start(plane).await;
    let client = proxy.client();
    let edge = Edge::of("withdrawn", |options| options.client = client).await;
    let Some(edge) = edge else {
        return;
    };
    let _controller = edge.controller(|_| None).await;
    let mut seen = edge.stage.target.gateway_addresses().unwrap();
    let reach = async |address: &str| {
        let client = edge.stage.client.clone();
        gateway::reach(client, &edge.namespace, "public", &[("IPAddress", address)]).await;
        Some(vec![GatewayAddress::Ip(address.parse().unwrap())])
    };
    let first = reach("203.0.113.7").await;
    let watched = tokio::time::timeout(PATIENCE, seen.wait_for(|now| *now == first));
    watched.await.expect("it is watched").unwrap();

    proxy.answer(|method, address| {
        let lists = method == "GET" && address.contains("/gateways?");
        lists.then(|| refusal(403, "Forbidden"))
    });
    proxy.cut();
    let second = reach("203.0.113.8").await;
    let asked = tokio::time::timeout(PATIENCE, async {
        while *seen.borrow() != second {
            // Connections that were cut are of no use at first.
            let hosts = vec![edge.host("shop.example.com", &[(1, 1)])];
            let _ = edge.route(hosts).await;
        }
    });
    asked.await.expect("it is asked");
}

/// An Ingress of somebody else for hostnames, each with where it leads.
async fn ingress(client: &Client, namespace: &str, name: &str, hosts: &[(&str, &str)]) {
    let rules = hosts.iter().map(|(host, service)| {
        let backend = json!({ "service": { "name": service, "port": { "number": 80 } } });
        let paths = json!([{ "path": "/", "pathType": "Prefix", "backend": backend }]);
        json!({ "host": host, "http": { "paths": paths } })
    });
    let ingress = json!({
        "metadata": { "name": name },
        "spec": { "rules": rules.collect::<Vec<_>>() },
    });
    let ingress: Ingress = serde_json::from_value(ingress).unwrap();
    let api: Api<Ingress> = Api::namespaced(client.clone(), namespace);
    let created = api.create(&PostParams::default(), &ingress).await;
    created.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn an_ingress_for_the_same_hostname_is_read_and_never_written() {
    let plane = tokio::task::spawn_blocking(ControlPlane::shared);
    let Some(plane) = plane.await.unwrap() else {
        return;
    };
    let proxy = FaultProxy::start(plane).await;
    let client = proxy.client();
    let edge = Edge::of("ingresses", |options| options.client = client).await;
    let Some(edge) = edge else {
        return;
    };
    let _controller = edge.controller(|_| None).await;
    let host = |name: &str| edge.host(name, &[(1, 1)]);
    let project = edge.stage.app.project.clone();
    let routes = |hosts: &[&str]| HostRoutes {
        project: project.clone(),
        hosts: hosts.iter().map(|name| host(name)).collect(),
    };
    let (target, client) = (&edge.stage.target, &edge.stage.client);
    let none = Some(Ingresses::default());
    let both = routes(&["shop.met.example.com", "deep.below.met.example.com"]);
    assert_eq!(target.ingresses(&both).await, none);

    let theirs = &edge.namespace;
    let exact = [
        ("shop.met.example.com", "old-shop"),
        ("other.met.example.com", "other"),
    ];
    ingress(client, theirs, "legacy", &exact).await;
    ingress(
        client,
        theirs,
        "wide",
        &[("*.met.example.com", "catch-all")],
    )
    .await;
    let before = {
        let api: Api<Ingress> = Api::namespaced(client.clone(), theirs);
        api.get("legacy").await.unwrap()
    };
    edge.route(both.hosts.clone()).await.unwrap();
    let seen = |name: &str, service: &str| IngressSeen {
        hostname: "shop.met.example.com".parse().unwrap(),
        namespace: theirs.clone(),
        name: name.to_owned(),
        backends: vec![format!("{service}:80")],
    };
    let all = vec![seen("legacy", "old-shop"), seen("wide", "catch-all")];
    assert_eq!(target.ingresses(&both).await, Some(Ingresses::Seen(all)));
    assert_eq!(target.ingresses(&routes(&[])).await, none);
    let elsewhere = routes(&["shop.elsewhere.example.com"]);
    assert_eq!(target.ingresses(&elsewhere).await, none);
    let api: Api<Ingress> = Api::namespaced(client.clone(), theirs);
    assert_eq!(api.get("legacy").await.unwrap(), before);

    // A right that is missing is named; what passes says nothing. Routes are led all the same.
    for (code, reason, expected) in [(403, "Forbidden", true), (503, "ServiceUnavailable", false)] {
        proxy.answer(move |method, address| {
            let lists = method == "GET" && address.contains("/ingresses?");
            lists.then(|| refusal(code, reason))
        });
        edge.route(both.hosts.clone()).await.unwrap();
        match target.ingresses(&both).await {
            Some(Ingresses::Unread(why)) if expected => {
                assert!(why.contains("this right"), "{why}");
            }
            None if !expected => {}
            other => panic!("{code}: {other:?}"),
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cluster_without_gateway_api_is_said_to_be_that_with_how_to_install_it() {
    // The one that is shared has it.
    let plane = tokio::task::spawn_blocking(ControlPlane::start);
    let Some(plane) = plane.await.unwrap() else {
        return;
    };
    let client = plane.client().await;
    let mut with_gateway = options(client.clone());
    let gateway = GatewayRef {
        name: "public".to_owned(),
        namespace: Some("edge".to_owned()),
        section_name: None,
    };
    with_gateway.gateway = Some((gateway, "example.com".to_owned()));
    let target = KubernetesCluster::open(with_gateway).await.unwrap();
    let stage = Stage {
        client,
        target,
        app: app("bare"),
    };
    let is_helped = |why: &str| {
        let said = [
            "Gateway API",
            "standard-install.yaml",
            "without --kubernetes-gateway",
        ];
        said.iter().all(|said| why.contains(said))
    };
    let mut values = stage.values();
    release(&mut values, 1, 1);
    let refused = stage.apply(1, &values).await;
    let Err(TargetError::Refused(why)) = refused else {
        panic!("{refused:?}");
    };
    assert!(is_helped(&why), "{why}");
    let routes = HostRoutes {
        project: stage.app.project.clone(),
        hosts: Vec::new(),
    };
    let refused = stage.target.route(&routes).await;
    let Err(RouteError::Unavailable(why)) = refused else {
        panic!("{refused:?}");
    };
    assert!(is_helped(&why), "{why}");
    let troubled = tokio::time::timeout(PATIENCE, async {
        while !stage.target.trouble().is_some_and(|why| is_helped(&why)) {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    });
    assert!(troubled.await.is_ok(), "{:?}", stage.target.trouble());

    // Once it is there nothing has to be started again.
    for crd in [Crd::Gateway, Crd::HttpRoute] {
        if !crd.install(&stage.client).await {
            return;
        }
    }
    let applied = tokio::time::timeout(PATIENCE, async {
        while stage.apply(1, &values).await.is_err() || stage.target.trouble().is_some() {
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    });
    applied.await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn bursts_of_refusals_keep_a_hostname_from_being_led_only_for_so_long() {
    let plane = tokio::task::spawn_blocking(ControlPlane::shared);
    let Some(plane) = plane.await.unwrap() else {
        return;
    };
    let proxy = FaultProxy::start(plane).await;
    let client = proxy.client();
    let edge = Edge::of("bursts-of-routes", |options| options.client = client).await;
    let Some(edge) = edge else {
        return;
    };
    let _controller = edge.controller(|_| None).await;
    let hosts = || vec![edge.host("shop.example.com", &[(1, 1)])];
    for (code, reason) in super::faults::BURSTS {
        proxy.answer(move |method, address| {
            let write = method == "PATCH" && address.contains("/httproutes/");
            write.then(|| refusal(code, reason))
        });
        let refused = edge.route(hosts()).await;
        let Err(RouteError::Unavailable(why)) = refused else {
            panic!("{code}: {refused:?}");
        };
        assert!(why.contains("HTTPRoute shop.example.com"), "{why}");
        assert!(why.contains(&code.to_string()), "{why}");
    }
    assert_eq!(edge.names().await, [""; 0]);
    proxy.behave();
    edge.route(hosts()).await.unwrap();
    assert_eq!(edge.names().await, ["shop.example.com"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_route_says_what_it_is_of_also_one_that_was_made_before_it_did() {
    let Some(edge) = Edge::new("labelled").await else {
        return;
    };
    let _controller = edge.controller(|_| None).await;
    let hosts = || {
        let mut host = edge.host("shop.example.com", &[(1, 1)]);
        host.ephemeral = true;
        vec![host]
    };
    let label = |found: &DynamicObject, name: &str| {
        let name = format!("daybook.dev/{name}");
        found.labels().get(&name).cloned().unwrap_or_default()
    };
    let api = edge.api();
    edge.route(hosts()).await.unwrap();
    let found = api.get("shop.example.com").await.unwrap();
    let said = ["project", "environment", "ephemeral"].map(|name| label(&found, name));
    assert_eq!(said, ["shop-labelled", "labelled", "true"]);

    let before = json!({ "metadata": { "labels": { "daybook.dev/ephemeral": null } } });
    let params = PatchParams::default();
    let patch = Patch::Merge(before);
    api.patch("shop.example.com", &params, &patch)
        .await
        .unwrap();
    edge.route(hosts()).await.unwrap();
    let found = api.get("shop.example.com").await.unwrap();
    assert_eq!(label(&found, "ephemeral"), "true");
}
