//! The gateway in front of real processes.
#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};
use std::time::Duration;

use daybook_events::{ClusterName, DeploymentId, Hostname, ProjectName};
use daybook_testkit::{TestApp, free_addr};
use daybook_workers::gateway::{
    Applied, ApplyError, Backend, ClusterPolicy, Gateway, GatewayOptions, Route, RouteChanges,
    RouteTable,
};
use uuid::Uuid;

fn project(name: &str) -> ProjectName {
    ProjectName::parse(name).unwrap()
}
fn host(name: &str) -> Hostname {
    Hostname::parse(name).unwrap()
}
fn cluster(name: &str) -> ClusterName {
    ClusterName::parse(name).unwrap()
}
fn deployment() -> DeploymentId {
    DeploymentId(Uuid::new_v4())
}

async fn gateway() -> Gateway {
    Gateway::bind("127.0.0.1:0".parse().unwrap()).await.unwrap()
}

fn backend(deployment: DeploymentId, cluster_name: &str, weight: u32) -> Backend {
    Backend {
        deployment,
        clusters: vec![cluster(cluster_name)],
        weight,
    }
}

/// A table of the project `shop` with one host name.
fn table(revision: u64, policy: ClusterPolicy, backends: Vec<Backend>) -> RouteTable {
    RouteTable {
        project: project("shop"),
        revision,
        routes: BTreeMap::from([(
            host("shop.localhost"),
            Route {
                backends,
                policy,
                internal: None,
            },
        )]),
    }
}

fn to(revision: u64, deployment: DeploymentId) -> RouteTable {
    table(
        revision,
        ClusterPolicy::Simple,
        vec![backend(deployment, "one", 1)],
    )
}

/// A deployment that is known to answer at this address.
fn known(gateway: &Gateway, app: &TestApp) -> DeploymentId {
    let id = deployment();
    gateway.set_addresses(id, &cluster("one"), vec![app.addr], None);
    id
}

/// One request on a connection of its own, byte for byte, and all that comes back until the
/// gateway closes it.
fn raw(addr: SocketAddr, bytes: &[u8]) -> String {
    let mut stream = TcpStream::connect(addr).unwrap();
    stream
        .set_read_timeout(Some(Duration::from_secs(20)))
        .unwrap();
    stream.write_all(bytes).unwrap();
    let mut answer = Vec::new();
    let _ = stream.read_to_end(&mut answer);
    String::from_utf8_lossy(&answer).into_owned()
}

async fn ask(addr: SocketAddr, request: String) -> String {
    tokio::task::spawn_blocking(move || raw(addr, request.as_bytes()))
        .await
        .unwrap()
}

async fn get(addr: SocketAddr, host: &str, path: &str) -> String {
    let request = format!("GET {path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n");
    ask(addr, request).await
}

fn status(answer: &str) -> u16 {
    answer
        .split(' ')
        .nth(1)
        .and_then(|s| s.parse().ok())
        .unwrap_or_else(|| panic!("no answer: {answer:?}"))
}

fn body(answer: &str) -> &str {
    answer.split_once("\r\n\r\n").unwrap().1
}

fn problem(answer: &str) -> serde_json::Value {
    assert!(answer.contains("application/problem+json"), "{answer}");
    serde_json::from_str(body(answer)).unwrap()
}

/// A connection that is kept alive.
struct KeptAlive {
    stream: std::io::BufReader<TcpStream>,
}

impl KeptAlive {
    fn open(addr: SocketAddr) -> Self {
        let stream = TcpStream::connect(addr).unwrap();
        stream.set_nodelay(true).unwrap();
        stream
            .set_read_timeout(Some(Duration::from_secs(20)))
            .unwrap();
        Self {
            stream: std::io::BufReader::new(stream),
        }
    }

    fn request(&mut self, request: &str) -> std::io::Result<(u16, String)> {
        use std::io::BufRead;
        self.stream.get_mut().write_all(request.as_bytes())?;
        let mut head = String::new();
        while !head.ends_with("\r\n\r\n") {
            if self.stream.read_line(&mut head)? == 0 {
                return Err(std::io::ErrorKind::UnexpectedEof.into());
            }
        }
        let length = head
            .lines()
            .find_map(|l| {
                l.to_ascii_lowercase()
                    .strip_prefix("content-length: ")?
                    .parse()
                    .ok()
            })
            .unwrap_or(0);
        let mut body = vec![0; length];
        self.stream.read_exact(&mut body)?;
        Ok((status(&head), String::from_utf8_lossy(&body).into_owned()))
    }

    fn get(&mut self, path: &str) -> std::io::Result<(u16, String)> {
        self.request(&format!(
            "GET {path} HTTP/1.1\r\nHost: shop.localhost\r\n\r\n"
        ))
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_host_name_leads_to_its_deployment_whatever_its_case_and_port() {
    let app = TestApp::start(&["--text", "one"]);
    let gateway = gateway().await;
    let id = known(&gateway, &app);
    assert_eq!(gateway.apply(to(1, id)), Ok(Applied::Switched));
    for name in ["shop.localhost", "SHOP.localhost:7080", "shop.localhost."] {
        let answer = get(gateway.addr(), name, "/").await;
        assert_eq!((status(&answer), body(&answer)), (200, "one"), "{name}");
        assert!(
            answer.contains(&format!("x-daybook-deployment: {id}")),
            "{answer}"
        );
    }
    assert_eq!(gateway.traffic()[&id].requests, 3);
    assert_eq!(gateway.traffic()[&id].failures, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn who_has_no_route_or_no_instance_is_told_so() {
    let gateway = gateway().await;
    let answer = get(gateway.addr(), "nobody.localhost", "/").await;
    assert_eq!(status(&answer), 404);
    assert_eq!(problem(&answer)["code"], "unknown_host");
    assert_eq!(problem(&answer)["host"], "nobody.localhost");
    assert_eq!(gateway.unrouted(), 1);

    let id = deployment();
    gateway.apply(to(1, id)).unwrap();
    let why = Some("CrashLoopBackOff: it exits with code 1".to_owned());
    gateway.set_addresses(id, &cluster("one"), Vec::new(), why);
    let answer = get(gateway.addr(), "shop.localhost", "/").await;
    assert_eq!(status(&answer), 503);
    assert!(answer.contains(&format!("x-daybook-deployment: {id}")));
    let problem = problem(&answer);
    assert_eq!(problem["code"], "not_ready");
    assert_eq!(problem["deployment"], id.to_string());
    assert!(problem["remedy"].as_str().unwrap().contains("daybook"));
    assert!(
        problem["detail"]
            .as_str()
            .unwrap()
            .contains("exits with code 1")
    );
    assert_eq!(gateway.traffic()[&id].failures, 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn tables_never_go_back_and_projects_do_not_share_host_names() {
    let one = TestApp::start(&["--text", "one"]);
    let two = TestApp::start(&["--text", "two"]);
    let gateway = gateway().await;
    let (first, second) = (known(&gateway, &one), known(&gateway, &two));
    gateway.apply(to(5, second)).unwrap();
    let older = gateway.apply(to(4, first));
    assert!(matches!(
        older,
        Err(ApplyError::Stale {
            given: 4,
            newest: 5,
            ..
        })
    ));
    assert_eq!(gateway.apply(to(5, first)), Ok(Applied::Unchanged));
    assert_eq!(
        body(&get(gateway.addr(), "shop.localhost", "/").await),
        "two"
    );
    assert_eq!(gateway.revision(&project("shop")), Some(5));

    let mut foreign = to(9, first);
    foreign.project = project("thief");
    let refused = gateway.apply(foreign);
    assert!(
        matches!(refused, Err(ApplyError::HostTaken { .. })),
        "{refused:?}"
    );
    assert_eq!(gateway.revision(&project("thief")), None);
    assert_eq!(
        body(&get(gateway.addr(), "shop.localhost", "/").await),
        "two"
    );

    // A host name that its owner has given up is free.
    let empty = RouteTable {
        project: project("shop"),
        revision: 6,
        routes: BTreeMap::new(),
    };
    gateway.apply(empty).unwrap();
    assert_eq!(
        status(&get(gateway.addr(), "shop.localhost", "/").await),
        404
    );
    let mut heir = to(1, first);
    heir.project = project("heir");
    gateway.apply(heir).unwrap();
    assert_eq!(
        body(&get(gateway.addr(), "shop.localhost", "/").await),
        "one"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn changes_follow_on_the_table_in_force_and_leave_other_routes_alone() {
    let one = TestApp::start(&["--text", "one"]);
    let two = TestApp::start(&["--text", "two"]);
    let gateway = gateway().await;
    let (first, second) = (known(&gateway, &one), known(&gateway, &two));
    let route = |deployment| Route {
        backends: vec![backend(deployment, "one", 1)],
        policy: ClusterPolicy::Simple,
        internal: None,
    };
    let changes = |after, revision, routes: &[(&str, Option<Route>)]| RouteChanges {
        project: project("shop"),
        after,
        revision,
        routes: routes.iter().map(|(h, r)| (host(h), r.clone())).collect(),
    };
    // The first changes of a project need no table.
    let both = [
        ("a.localhost", Some(route(first))),
        ("b.localhost", Some(route(first))),
    ];
    assert_eq!(gateway.change(changes(0, 2, &both)), Ok(Applied::Switched));
    let moved = [("b.localhost", Some(route(second)))];
    let missed = gateway.change(changes(1, 3, &moved));
    assert!(
        matches!(missed, Err(ApplyError::Missed { after: 1, .. })),
        "{missed:?}"
    );
    assert_eq!(gateway.revision(&project("shop")), Some(2));
    assert_eq!(gateway.change(changes(2, 3, &moved)), Ok(Applied::Switched));
    assert_eq!(
        gateway.change(changes(2, 3, &moved)),
        Ok(Applied::Unchanged)
    );
    assert_eq!(body(&get(gateway.addr(), "a.localhost", "/").await), "one");
    assert_eq!(body(&get(gateway.addr(), "b.localhost", "/").await), "two");
    // A host name that another project has is refused, and nothing is changed.
    let mut thief = changes(
        0,
        1,
        &[
            ("c.localhost", Some(route(second))),
            ("a.localhost", Some(route(second))),
        ],
    );
    thief.project = project("thief");
    let refused = gateway.change(thief.clone());
    assert!(
        matches!(refused, Err(ApplyError::HostTaken { .. })),
        "{refused:?}"
    );
    assert_eq!(status(&get(gateway.addr(), "c.localhost", "/").await), 404);
    // One that leads nowhere any more is free.
    let gone = [("a.localhost", None), ("unknown.localhost", None)];
    assert_eq!(gateway.change(changes(3, 4, &gone)), Ok(Applied::Switched));
    assert_eq!(status(&get(gateway.addr(), "a.localhost", "/").await), 404);
    assert_eq!(gateway.change(thief), Ok(Applied::Switched));
    assert_eq!(body(&get(gateway.addr(), "a.localhost", "/").await), "two");
    assert_eq!(gateway.hostnames().len(), 3);
}

/// Two projects take a host name over from each other: neither table can be applied before the
/// other one, unless the names are released first.
#[tokio::test(flavor = "multi_thread")]
async fn a_released_hostname_leads_where_it_led_until_another_project_routes_it() {
    let one = TestApp::start(&["--text", "one"]);
    let two = TestApp::start(&["--text", "two"]);
    let gateway = gateway().await;
    let (first, second) = (known(&gateway, &one), known(&gateway, &two));
    let table = |name: &str, revision, hostname: &str, deployment| RouteTable {
        project: project(name),
        revision,
        routes: [(
            host(hostname),
            Route {
                backends: vec![backend(deployment, "one", 1)],
                policy: ClusterPolicy::Simple,
                internal: None,
            },
        )]
        .into(),
    };
    gateway.apply(table("a", 1, "x.localhost", first)).unwrap();
    gateway.apply(table("b", 1, "y.localhost", second)).unwrap();
    let swapped = table("a", 2, "y.localhost", first);
    assert!(matches!(
        gateway.apply(swapped.clone()),
        Err(ApplyError::HostTaken { .. })
    ));
    gateway.release(&project("b"), &host("y.localhost"));
    assert_eq!(body(&get(gateway.addr(), "y.localhost", "/").await), "two");
    gateway.apply(swapped).unwrap();
    gateway.apply(table("b", 2, "x.localhost", second)).unwrap();
    assert_eq!(body(&get(gateway.addr(), "y.localhost", "/").await), "one");
    assert_eq!(body(&get(gateway.addr(), "x.localhost", "/").await), "two");
    // What somebody else has is nobody else's to release.
    gateway.release(&project("b"), &host("y.localhost"));
    assert_eq!(gateway.hostnames()[&host("y.localhost")], project("a"));
}

/// Eight kept-alive connections under constant load, while the route goes back and forth: no
/// request fails, and one that starts after `apply` has returned meets the new deployment.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_switch_under_load_fails_no_request() {
    let one = TestApp::start(&["--text", "one"]);
    let two = TestApp::start(&["--text", "two"]);
    let gateway = gateway().await;
    let ids = [known(&gateway, &one), known(&gateway, &two)];
    gateway.apply(to(1, ids[0])).unwrap();
    let addr = gateway.addr();
    let (done, answered) = (
        Arc::new(AtomicBool::new(false)),
        Arc::new(AtomicU64::new(0)),
    );
    let clients: Vec<_> = (0..8)
        .map(|n| {
            let (done, answered) = (done.clone(), answered.clone());
            std::thread::spawn(move || {
                let mut connection = KeptAlive::open(addr);
                while !done.load(SeqCst) {
                    let (status, text) = if n % 2 == 0 {
                        connection.get("/").unwrap()
                    } else {
                        connection
                            .request("POST /echo HTTP/1.1\r\nHost: shop.localhost\r\nContent-Length: 3\r\n\r\none")
                            .unwrap()
                    };
                    assert_eq!(status, 200, "{text}");
                    assert!(matches!(text.as_str(), "one" | "two"), "{text:?}");
                    answered.fetch_add(1, SeqCst);
                }
            })
        })
        .collect();
    let mut probe = KeptAlive::open(addr);
    for revision in 2..60u64 {
        let which = usize::try_from(revision % 2).unwrap();
        gateway.apply(to(revision, ids[which])).unwrap();
        let (status, text) = probe.get("/").unwrap();
        assert_eq!((status, text.as_str()), (200, ["one", "two"][which]));
        let before = answered.load(SeqCst);
        while answered.load(SeqCst) < before + 40 && !clients.iter().any(|c| c.is_finished()) {
            tokio::task::yield_now().await;
        }
    }
    done.store(true, SeqCst);
    for client in clients {
        client.join().unwrap();
    }
    assert!(gateway.traffic().values().all(|t| t.failures == 0));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_request_that_is_on_its_way_finishes_where_it_started() {
    let one = TestApp::start(&["--text", "one"]);
    let two = TestApp::start(&["--text", "two"]);
    let gateway = gateway().await;
    let (first, second) = (known(&gateway, &one), known(&gateway, &two));
    gateway.apply(to(1, first)).unwrap();
    let slow = tokio::spawn(get(gateway.addr(), "shop.localhost", "/stream?20"));
    while gateway.traffic()[&first].requests == 0 {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    gateway.apply(to(2, second)).unwrap();
    assert_eq!(
        body(&get(gateway.addr(), "shop.localhost", "/").await),
        "two"
    );
    let answer = slow.await.unwrap();
    assert!(answer.contains("one-19"), "{answer}");
    assert_eq!(gateway.traffic()[&first].failures, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_refuses_a_connection_is_passed_over() {
    let app = TestApp::start(&["--text", "alive"]);
    let gateway = gateway().await;
    let id = deployment();
    let addresses = vec![free_addr(), app.addr, free_addr()];
    gateway.set_addresses(id, &cluster("one"), addresses, None);
    gateway.apply(to(1, id)).unwrap();
    for _ in 0..6 {
        let request = "POST /echo HTTP/1.1\r\nHost: shop.localhost\r\nContent-Length: 5\r\nConnection: close\r\n\r\nhello";
        let answer = ask(gateway.addr(), request.to_owned()).await;
        assert_eq!((status(&answer), body(&answer)), (200, "hello"));
    }
    gateway.set_addresses(id, &cluster("one"), vec![free_addr()], None);
    let answer = get(gateway.addr(), "shop.localhost", "/").await;
    assert_eq!(status(&answer), 503);
    assert!(
        body(&answer).contains("no instance can be reached"),
        "{answer}"
    );
}

/// An instance restarts on another port between two requests on one connection.
#[tokio::test(flavor = "multi_thread")]
async fn an_instance_may_move_without_a_new_revision() {
    let mut old = TestApp::start(&["--text", "old"]);
    let gateway = gateway().await;
    let id = known(&gateway, &old);
    gateway.apply(to(1, id)).unwrap();
    let addr = gateway.addr();
    let mut connection = tokio::task::spawn_blocking(move || {
        let mut connection = KeptAlive::open(addr);
        assert_eq!(connection.get("/").unwrap().1, "old");
        connection
    })
    .await
    .unwrap();
    old.kill();
    let new = TestApp::start(&["--text", "new"]);
    gateway.set_addresses(id, &cluster("one"), vec![new.addr], None);
    tokio::task::spawn_blocking(move || assert_eq!(connection.get("/").unwrap().1, "new"))
        .await
        .unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn weights_share_requests_and_nothing_goes_to_weight_zero() {
    let apps = ["a", "b", "c"].map(|t| TestApp::start(&["--text", t]));
    let gateway = gateway().await;
    let ids = [0, 1, 2].map(|i| known(&gateway, &apps[i]));
    let backends = vec![
        backend(ids[0], "one", 9),
        backend(ids[1], "one", 3),
        backend(ids[2], "one", 0),
    ];
    gateway
        .apply(table(1, ClusterPolicy::Simple, backends))
        .unwrap();
    let addr = gateway.addr();
    tokio::task::spawn_blocking(move || {
        let mut connection = KeptAlive::open(addr);
        for _ in 0..120 {
            connection.get("/").unwrap();
        }
    })
    .await
    .unwrap();
    let traffic = gateway.traffic();
    let served = ids.map(|id| traffic[&id].requests);
    assert!((85..=95).contains(&served[0]), "{served:?}");
    assert_eq!((served[0] + served[1], served[2]), (120, 0));
}

#[tokio::test(flavor = "multi_thread")]
async fn failover_goes_to_the_first_cluster_that_has_a_ready_instance() {
    let (near, far) = (
        TestApp::start(&["--text", "near"]),
        TestApp::start(&["--text", "far"]),
    );
    let gateway = gateway().await;
    let id = deployment();
    let both = Backend {
        deployment: id,
        clusters: vec![cluster("far"), cluster("near")],
        weight: 1,
    };
    let policy = ClusterPolicy::Failover(vec![cluster("near"), cluster("far")]);
    gateway.apply(table(1, policy, vec![both])).unwrap();
    gateway.set_addresses(id, &cluster("far"), vec![far.addr], None);
    assert_eq!(
        body(&get(gateway.addr(), "shop.localhost", "/").await),
        "far"
    );
    gateway.set_addresses(id, &cluster("near"), vec![near.addr], None);
    for _ in 0..4 {
        assert_eq!(
            body(&get(gateway.addr(), "shop.localhost", "/").await),
            "near"
        );
    }
    // Said to be ready, yet gone: the next cluster takes the request.
    drop(near);
    assert_eq!(
        body(&get(gateway.addr(), "shop.localhost", "/").await),
        "far"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn bodies_stream_both_ways_and_large_ones_arrive_whole() {
    let app = TestApp::start(&[]);
    let gateway = gateway().await;
    let id = known(&gateway, &app);
    gateway.apply(to(1, id)).unwrap();
    let payload: String = (0..400_000)
        .map(|i| char::from(b'a' + (i % 26) as u8))
        .collect();
    let length = payload.len();
    let request = format!(
        "POST /echo HTTP/1.1\r\nHost: shop.localhost\r\nContent-Length: {length}\r\nConnection: close\r\n\r\n{payload}"
    );
    assert_eq!(body(&ask(gateway.addr(), request).await), payload);
    let chunked = "POST /echo HTTP/1.1\r\nHost: shop.localhost\r\nTransfer-Encoding: chunked\r\nConnection: close\r\n\r\n3\r\nabc\r\n2\r\nde\r\n0\r\n\r\n";
    assert_eq!(
        body(&ask(gateway.addr(), chunked.to_owned()).await),
        "abcde"
    );

    // The first part of an endless answer arrives while the rest is still to come.
    let addr = gateway.addr();
    tokio::task::spawn_blocking(move || {
        let mut stream = TcpStream::connect(addr).unwrap();
        stream
            .set_read_timeout(Some(Duration::from_secs(20)))
            .unwrap();
        stream
            .write_all(b"GET /stream?100000 HTTP/1.1\r\nHost: shop.localhost\r\n\r\n")
            .unwrap();
        let mut seen = String::new();
        while !seen.contains("hello-1") {
            let mut buffer = [0; 1024];
            let n = stream.read(&mut buffer).unwrap();
            assert!(n > 0, "{seen}");
            seen.push_str(&String::from_utf8_lossy(&buffer[..n]));
        }
    })
    .await
    .unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn upgraded_connections_carry_bytes_both_ways() {
    let app = TestApp::start(&[]);
    let gateway = gateway().await;
    let id = known(&gateway, &app);
    gateway.apply(to(1, id)).unwrap();
    let addr = gateway.addr();
    let mut stream = tokio::task::spawn_blocking(move || {
        let mut stream = TcpStream::connect(addr).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        stream
            .write_all(b"GET /ws HTTP/1.1\r\nHost: shop.localhost\r\nConnection: keep-alive, Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Key: x\r\n\r\n")
            .unwrap();
        let mut head = Vec::new();
        while !head.ends_with(b"\r\n\r\n") {
            let mut byte = [0];
            stream.read_exact(&mut byte).unwrap();
            head.push(byte[0]);
        }
        let head = String::from_utf8(head).unwrap().to_ascii_lowercase();
        assert!(head.starts_with("http/1.1 101"), "{head}");
        assert!(head.contains("upgrade: websocket"), "{head}");
        for message in ["one", "two"] {
            stream.write_all(message.as_bytes()).unwrap();
            let mut echo = [0; 3];
            stream.read_exact(&mut echo).unwrap();
            assert_eq!(echo, message.as_bytes());
        }
        stream
    })
    .await
    .unwrap();
    // It ends with the gateway, which does not wait for it for ever.
    gateway.shutdown(Duration::from_millis(50)).await;
    tokio::task::spawn_blocking(move || {
        let end = stream.read(&mut [0; 8]);
        assert!(matches!(end, Ok(0) | Err(_)), "{end:?}");
    })
    .await
    .unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn the_application_learns_who_asked_and_for_what() {
    let app = TestApp::start(&[]);
    let gateway = gateway().await;
    let id = known(&gateway, &app);
    gateway.apply(to(1, id)).unwrap();
    let request = "GET /headers?a=b HTTP/1.1\r\nHost: Shop.localhost:99\r\nX-Forwarded-For: 6.6.6.6\r\nX-Secret: 1\r\nKeep-Alive: 5\r\nConnection: close, x-secret\r\n\r\n";
    let answer = ask(gateway.addr(), request.to_owned()).await;
    let seen = body(&answer).to_ascii_lowercase();
    assert!(seen.contains("get /headers?a=b http/1.1"), "{seen}");
    for line in [
        "host: shop.localhost:99",
        "x-forwarded-for: 127.0.0.1",
        "x-forwarded-proto: http",
        "x-forwarded-host: shop.localhost:99",
    ] {
        assert!(seen.contains(line), "{line} is not in {seen}");
    }
    for gone in ["6.6.6.6", "x-secret", "keep-alive", "connection"] {
        assert!(!seen.contains(gone), "{gone} is in {seen}");
    }
}

/// Requests that two servers could read differently, and others that nobody should send.
#[tokio::test(flavor = "multi_thread")]
async fn hostile_requests_reach_no_application() {
    let app = TestApp::start(&[]);
    let gateway = gateway().await;
    let id = known(&gateway, &app);
    gateway.apply(to(1, id)).unwrap();
    let many: String = (0..200).map(|i| format!("X-{i}: 1\r\n")).collect();
    let long = "a".repeat(200_000);
    for (what, request) in [
        ("no host", "GET / HTTP/1.1\r\n\r\n".to_owned()),
        ("two hosts", "GET / HTTP/1.1\r\nHost: shop.localhost\r\nHost: other\r\n\r\n".into()),
        ("user in host", "GET / HTTP/1.1\r\nHost: a@shop.localhost\r\n\r\n".into()),
        ("two lengths", "POST /echo HTTP/1.1\r\nHost: shop.localhost\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nab".into()),
        ("signed length", "POST /echo HTTP/1.1\r\nHost: shop.localhost\r\nContent-Length: +1\r\n\r\na".into()),
        ("chunked is not last", "POST /echo HTTP/1.1\r\nHost: shop.localhost\r\nTransfer-Encoding: chunked, identity\r\n\r\n0\r\n\r\n".into()),
        ("unknown encoding", "POST /echo HTTP/1.1\r\nHost: shop.localhost\r\nTransfer-Encoding: xchunked\r\n\r\n0\r\n\r\n".into()),
        ("space before colon", "POST /echo HTTP/1.1\r\nHost: shop.localhost\r\nContent-Length : 1\r\n\r\na".into()),
        ("folded header", "GET / HTTP/1.1\r\nHost: shop.localhost\r\nX: a\r\n b\r\n\r\n".into()),
        ("NUL", "GET / HTTP/1.1\r\nHost: shop.localhost\r\nX: a\0b\r\n\r\n".into()),
        ("tunnel", "CONNECT example.org:443 HTTP/1.1\r\nHost: shop.localhost\r\n\r\n".into()),
        ("too many headers", format!("GET / HTTP/1.1\r\nHost: shop.localhost\r\n{many}\r\n")),
        ("too long a header", format!("GET / HTTP/1.1\r\nHost: shop.localhost\r\nX: {long}\r\n\r\n")),
        ("not HTTP", "\u{16}\u{3}\u{1}hello\r\n\r\n".into()),
    ] {
        let mut request = request;
        if !request.contains("Connection") {
            request = request.replacen("\r\n", "\r\nConnection: close\r\n", 1);
        }
        let answer = ask(gateway.addr(), request).await;
        if !answer.is_empty() {
            assert!(matches!(status(&answer), 400..=599), "{what}: {answer}");
        }
        assert_eq!(gateway.traffic()[&id].requests, 0, "{what} was passed on");
    }
}

/// Both framings at once: one reading only, the connection ends, and the application receives
/// the body framed anew, so that nothing hides behind it.
#[tokio::test(flavor = "multi_thread")]
async fn a_request_with_both_framings_smuggles_nothing() {
    let app = TestApp::start(&[]);
    let gateway = gateway().await;
    let id = known(&gateway, &app);
    gateway.apply(to(1, id)).unwrap();
    let request = "POST /echo HTTP/1.1\r\nHost: shop.localhost\r\nContent-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n1\r\nZ\r\n0\r\n\r\nGET /pid HTTP/1.1\r\nHost: shop.localhost\r\n\r\n";
    let answer = ask(gateway.addr(), request.to_owned()).await;
    assert_eq!(answer.matches("HTTP/1.1").count(), 1, "{answer}");
    assert_eq!(body(&answer), "Z");
    assert_eq!(gateway.traffic()[&id].requests, 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn whoever_comes_before_the_routes_waits_for_them() {
    let app = TestApp::start(&[]);
    let options = GatewayOptions {
        begins_closed: true,
        ..GatewayOptions::default()
    };
    let gateway = Gateway::bind_with("127.0.0.1:0".parse().unwrap(), options)
        .await
        .unwrap();
    // Connected and sent, by what the system says, before anything is routed.
    let mut early = TcpStream::connect(gateway.addr()).unwrap();
    early
        .set_read_timeout(Some(Duration::from_secs(20)))
        .unwrap();
    let request = "GET /pid HTTP/1.1\r\nHost: shop.localhost\r\nConnection: close\r\n\r\n";
    early.write_all(request.as_bytes()).unwrap();
    let id = known(&gateway, &app);
    gateway.apply(to(1, id)).unwrap();
    gateway.open();
    let read = tokio::task::spawn_blocking(move || {
        let mut answer = String::new();
        early.read_to_string(&mut answer).map(|_| answer)
    });
    let answer = read.await.unwrap().unwrap();
    assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
}

#[tokio::test(flavor = "multi_thread")]
async fn silence_and_broken_answers_end_in_an_error_that_says_so() {
    let app = TestApp::start(&[]);
    let options = GatewayOptions {
        response_timeout: Duration::from_secs(2),
        head_timeout: Duration::from_secs(2),
        ..GatewayOptions::default()
    };
    let gateway = Gateway::bind_with("127.0.0.1:0".parse().unwrap(), options)
        .await
        .unwrap();
    let id = known(&gateway, &app);
    gateway.apply(to(1, id)).unwrap();
    let answer = get(gateway.addr(), "shop.localhost", "/slow?60000").await;
    assert_eq!(
        (status(&answer), problem(&answer)["code"].as_str()),
        (504, Some("no_answer_in_time"))
    );
    let post = "POST /drop HTTP/1.1\r\nHost: shop.localhost\r\nContent-Length: 0\r\nConnection: close\r\n\r\n";
    let answer = ask(gateway.addr(), post.to_owned()).await;
    assert_eq!(
        (status(&answer), problem(&answer)["code"].as_str()),
        (502, Some("broken_answer"))
    );
    assert_eq!(gateway.traffic()[&id].failures, 2);
    // A client that never finishes its head is let go.
    let answer = ask(gateway.addr(), "GET / HTTP/1.1\r\nHost: shop".to_owned()).await;
    assert!(!answer.contains("200"), "{answer}");
}

#[tokio::test(flavor = "multi_thread")]
async fn shutdown_lets_requests_finish_and_takes_no_more() {
    let app = TestApp::start(&["--text", "done"]);
    let gateway = gateway().await;
    let id = known(&gateway, &app);
    gateway.apply(to(1, id)).unwrap();
    let slow = tokio::spawn(get(gateway.addr(), "shop.localhost", "/slow?300"));
    while gateway.traffic()[&id].requests == 0 {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    gateway.shutdown(Duration::from_secs(20)).await;
    assert_eq!(body(&slow.await.unwrap()), "done");
    assert!(TcpStream::connect(gateway.addr()).is_err());
}

/// What a service answers that asks at an address on loopback, as any HTTP client would.
async fn get_at(addr: SocketAddr) -> std::io::Result<String> {
    let asked = tokio::task::spawn_blocking(move || {
        let mut stream = TcpStream::connect(addr)?;
        let request = format!("GET / HTTP/1.1\r\nHost: {addr}\r\nConnection: close\r\n\r\n");
        stream.write_all(request.as_bytes())?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        Ok(answer)
    });
    asked.await.unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn an_internal_address_leads_to_one_host_name_without_being_told_which() {
    let internal = Ipv4Addr::new(127, 83, 12, 7);
    let other = Ipv4Addr::new(127, 83, 12, 8);
    if std::net::TcpListener::bind((internal, 0)).is_err() {
        return daybook_testkit::left_out("this system has but one loopback address");
    }
    let one = TestApp::start(&["--text", "one"]);
    let two = TestApp::start(&["--text", "two"]);
    let gateway = gateway().await;
    let (first, second) = (known(&gateway, &one), known(&gateway, &two));
    let at = SocketAddr::from((internal, gateway.addr().port()));
    let table = |revision, routes: &[(&str, DeploymentId)]| RouteTable {
        project: project("shop"),
        revision,
        routes: routes
            .iter()
            .map(|(hostname, deployment)| {
                let route = Route {
                    backends: vec![backend(*deployment, "one", 1)],
                    policy: ClusterPolicy::Simple,
                    internal: match *hostname {
                        "c.localhost" => Some(other),
                        _ => Some(internal),
                    },
                };
                (host(hostname), route)
            })
            .collect(),
    };
    assert!(get_at(at).await.is_err());
    gateway.apply(table(1, &[("a.localhost", first)])).unwrap();
    assert_eq!(body(&get_at(at).await.unwrap()), "one");
    // It is switched with the host name.
    gateway.apply(table(2, &[("a.localhost", second)])).unwrap();
    assert_eq!(body(&get_at(at).await.unwrap()), "two");
    // Where two want it, neither has it.
    let both = [("a.localhost", second), ("b.localhost", first)];
    gateway.apply(table(3, &both)).unwrap();
    assert_eq!(status(&get_at(at).await.unwrap()), 404);
    assert_eq!(body(&get(gateway.addr(), "b.localhost", "/").await), "one");
    gateway.apply(table(4, &[("b.localhost", first)])).unwrap();
    assert_eq!(body(&get_at(at).await.unwrap()), "one");
    // When nothing wants it any more, nobody listens there.
    gateway.apply(table(5, &[])).unwrap();
    eventually_refused(at).await;
    // Where somebody else listens it is tried again with what is switched later.
    let somebody = std::net::TcpListener::bind(at).unwrap();
    gateway.apply(table(6, &[("a.localhost", first)])).unwrap();
    drop(somebody);
    eventually_refused(at).await;
    let both = [("a.localhost", first), ("c.localhost", second)];
    gateway.apply(table(7, &both)).unwrap();
    assert_eq!(body(&get_at(at).await.unwrap()), "one");
    gateway.shutdown(Duration::from_secs(1)).await;
    eventually_refused(at).await;
}

/// Waits until nobody listens at an address.
async fn eventually_refused(at: SocketAddr) {
    let refused = async {
        while get_at(at).await.is_ok() {
            tokio::task::yield_now().await;
        }
    };
    let refused = tokio::time::timeout(Duration::from_secs(30), refused);
    refused.await.expect("somebody still listens there");
}
