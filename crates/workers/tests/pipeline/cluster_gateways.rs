//! What follows from what the Gateway of a cluster takes, refuses, or is late with.

use std::collections::{BTreeMap, BTreeSet};

use daybook_events::Position;
use daybook_events::gitops::{
    self, ForeignCommitFound, ForeignStatus, Gitops, GitopsEvent, UndoneDeployment,
};
use daybook_events::lines::LineSource;
use daybook_events::routing::{GatewayAddress, IngressSeen, Ingresses};
use daybook_workers::host_routes::{HostRoutes, RouteError};
use daybook_workers::target::{AppStatus, TargetError};
use tokio::sync::watch;

use super::*;

const PATIENCE: Duration = Duration::from_secs(60);

/// A cluster whose Gateway does as it is told.
#[derive(Debug)]
struct Edge {
    cluster: IdleTarget,
    gateway: watch::Sender<Told>,
    addresses: watch::Sender<Option<Vec<GatewayAddress>>>,
}

#[derive(Debug, Default)]
struct Told {
    refuses: BTreeSet<Hostname>,
    /// Says nothing.
    silent: bool,
    /// What else is on the cluster.
    ingresses: Option<Ingresses>,
    /// What it was asked for, the newest last.
    asked: Vec<HostRoutes>,
    /// The projects for which it is looked at what else there is, and for which it was.
    looking: BTreeSet<ProjectName>,
    looked: BTreeSet<ProjectName>,
    /// Whether it was looked for two of them at once.
    crowded: bool,
}

/// A look at what else there is, which may be given up.
struct Look<'a>(&'a Edge, ProjectName);

impl Drop for Look<'_> {
    fn drop(&mut self) {
        self.0.tell(|told| _ = told.looking.remove(&self.1));
    }
}

impl Edge {
    fn ports() -> (Ports, Arc<Self>) {
        let edge = Arc::new(Self {
            cluster: IdleTarget::new(cluster()),
            gateway: watch::Sender::default(),
            addresses: watch::Sender::default(),
        });
        let ports = Ports {
            target: edge.clone(),
            ..Ports::default()
        };
        (ports, edge)
    }

    fn tell(&self, how: impl FnOnce(&mut Told)) {
        self.gateway.send_modify(how);
    }

    async fn until(&self, what: &str, is_so: impl Fn(&Told) -> bool) {
        let mut told = self.gateway.subscribe();
        let waited = tokio::time::timeout(PATIENCE, told.wait_for(|t| is_so(t)));
        assert!(waited.await.is_ok(), "{what}: {:#?}", self.gateway.borrow());
    }
}

#[async_trait]
impl Target for Edge {
    fn cluster(&self) -> &ClusterName {
        self.cluster.cluster()
    }
    async fn apply(
        &self,
        app: &AppRef,
        revision: &daybook_events::CommitId,
        desired: &EnvironmentValues,
    ) -> Result<(), TargetError> {
        self.cluster.apply(app, revision, desired).await
    }
    fn has_gateway(&self) -> bool {
        true
    }
    fn gateway_addresses(&self) -> Option<watch::Receiver<Option<Vec<GatewayAddress>>>> {
        Some(self.addresses.subscribe())
    }
    async fn ingresses(&self, routes: &HostRoutes) -> Option<Ingresses> {
        self.tell(|told| {
            told.looking.insert(routes.project.clone());
            told.crowded |= told.looking.len() > 1;
        });
        let look = Look(self, routes.project.clone());
        // Nobody is done at once.
        tokio::time::sleep(Duration::from_millis(20)).await;
        drop(look);
        self.tell(|told| _ = told.looked.insert(routes.project.clone()));
        self.gateway.borrow().ingresses.clone()
    }
    async fn route(&self, routes: &HostRoutes) -> Result<(), RouteError> {
        let (silent, refused) = {
            self.tell(|told| told.asked.push(routes.clone()));
            let told = self.gateway.borrow();
            let hosts = routes.hosts.iter().map(|host| &host.hostname);
            let refused = hosts.filter(|hostname| told.refuses.contains(*hostname));
            let refused = refused.map(|h| (h.clone(), "no listener allows it".to_owned()));
            (told.silent, refused.collect::<BTreeMap<_, _>>())
        };
        match (silent, refused.is_empty()) {
            (true, _) => Err(RouteError::Unavailable("it says nothing".into())),
            (false, true) => Ok(()),
            (false, false) => Err(RouteError::Refused(refused)),
        }
    }
    fn watch(&self, app: &AppRef) -> watch::Receiver<AppStatus> {
        self.cluster.watch(app)
    }
}

fn address(instance: &InstanceRef) -> Hostname {
    let domain = Hostname::parse("localhost").unwrap();
    let names = Hostnames::under(&domain, instance, DeploymentId(Uuid::nil()), false);
    names.unwrap().environment
}

fn undone(routing: &Routing) -> Vec<u32> {
    routing.recent.iter().filter_map(|s| s.undoes).collect()
}

fn served(routing: &Routing) -> bool {
    let everywhere = ["local", cluster().as_str()].map(|name| routing.applied.get(name).copied());
    everywhere == [Some(routing.table); 2]
}

fn main_of(routing: &Routing, instance: &InstanceRef) -> Option<DeploymentId> {
    routing.traffic(instance)?.main
}

#[tokio::test(flavor = "multi_thread")]
async fn a_refusal_that_lasts_undoes_what_it_is_about_once_and_nothing_else() {
    let dir = tempfile::tempdir().unwrap();
    let (ports, edge) = Edge::ports();
    let world = World::start(dir.path(), &ports).await;
    world.prepare().await;
    let first = world.request("one", SwitchMode::Automatic).await;
    world.reach(first, Status::Started).await;
    world.routes("the first is served everywhere", served).await;

    // From now on the address of this service is refused. Another one is none the worse for it.
    edge.tell(|told| {
        told.refuses.insert(address(&instance()));
    });
    let other: InstanceRef = "shop.production.api".parse().unwrap();
    let beside = world
        .request_of(other.clone(), of_git("one"), SwitchMode::Automatic)
        .await;
    world.reach(beside, Status::Started).await;
    let asked_for_both = |told: &Told| {
        let both = |routes: &&HostRoutes| {
            let has = |i: &InstanceRef| routes.hosts.iter().any(|h| h.hostname == address(i));
            has(&instance()) && has(&other)
        };
        told.asked.iter().filter(both).count() >= 3
    };
    edge.until("it is refused again and again", asked_for_both)
        .await;
    let routing = world.routes("it is routed", |_| true).await;
    assert_eq!(undone(&routing), [0; 0]);
    assert_eq!(main_of(&routing, &other), Some(beside));

    // What leads the refused address elsewhere is undone, and that is the end of it.
    let before = routing.table;
    let second = world.request("two", SwitchMode::Automatic).await;
    let is_undone = |r: &Routing| !undone(r).is_empty();
    let routing = world.routes("the second is undone", is_undone).await;
    assert_eq!(undone(&routing), [before + 1]);
    let asked = edge.gateway.borrow().asked.len();
    edge.until("the way back is refused, too", |told| {
        told.asked.len() >= asked + 2
    })
    .await;
    let routing = world.routes("it stays so", |_| true).await;
    assert_eq!(undone(&routing), [before + 1]);
    assert_eq!(main_of(&routing, &instance()), Some(first));
    assert_eq!(main_of(&routing, &other), Some(beside));
    assert_ne!(main_of(&routing, &instance()), Some(second));

    edge.tell(|told| told.refuses.clear());
    world.routes("all is served again", served).await;
    world.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_first_table_that_is_refused_leaves_nothing_on_the_cluster() {
    let dir = tempfile::tempdir().unwrap();
    let (ports, edge) = Edge::ports();
    edge.tell(|told| {
        told.refuses.insert(address(&instance()));
    });
    let world = World::start(dir.path(), &ports).await;
    world.prepare().await;
    world.request("one", SwitchMode::Automatic).await;
    let routing = world
        .routes("it is undone", |r| !undone(r).is_empty())
        .await;
    assert!(routing.routes.is_empty(), "{routing:#?}");
    edge.until("nothing is left there", |told| {
        let last = told.asked.last();
        last.is_some_and(|routes| routes.hosts.is_empty())
    })
    .await;
    world.stop().await;
}

impl World {
    /// Where an event stands in the ledger.
    async fn position_of(
        &self,
        what: &str,
        subject: &Subject,
        is_it: impl Fn(&daybook_events::Event) -> bool,
    ) -> Position {
        let mut changes = self.ledger.projections().changes();
        let found = tokio::time::timeout(PATIENCE, async {
            loop {
                let events = self.ledger.log().read_aggregate(subject).await.unwrap();
                let found = events.iter().find(|r| is_it(&r.event().unwrap()));
                if let Some(found) = found {
                    break found.position;
                }
                changes.changed().await.unwrap();
            }
        });
        found.await.unwrap_or_else(|_| panic!("{what}"))
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_lost_its_traffic_is_stopped_when_the_gateways_of_its_clusters_know() {
    let dir = tempfile::tempdir().unwrap();
    let (ports, edge) = Edge::ports();
    let world = World::start(dir.path(), &ports).await;
    world.prepare().await;
    let first = world.request("one", SwitchMode::Automatic).await;
    world.reach(first, Status::Started).await;
    let before = world.routes("the first is served everywhere", served).await;

    edge.tell(|told| told.silent = true);
    let second = world.request("two", SwitchMode::Automatic).await;
    world.reach(second, Status::Started).await;
    let stop = OperationRequested { reason: None };
    world
        .apply(first, DeploymentEvent::StopRequested(stop))
        .await;
    world.reach(first, Status::Stopping).await;
    let early = world.reach(first, Status::Stopped);
    let early = tokio::time::timeout(Duration::from_secs(1), early).await;
    assert!(early.is_err(), "the Gateway still leads to it");
    edge.tell(|told| told.silent = false);
    world.reach(first, Status::Stopped).await;

    let project = instance().project;
    let routes = Subject::Routing(project.clone());
    let applied = world.position_of("applied", &routes, |e| {
        matches!(e.payload(), Ok(routing::RoutingEvent::Applied(a))
            if a.gateway == cluster().as_str() && a.table > before.table)
    });
    let subject = Subject::Deployment(project, instance().environment, first);
    let committed = world.position_of("committed", &subject, |e| {
        e.short_kind() == "deployment.change_committed.v1"
    });
    assert!(applied.await < committed.await);
    world.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_git_revert_whose_switch_is_refused_stops_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let (ports, edge) = Edge::ports();
    let world = World::start(dir.path(), &ports).await;
    world.prepare().await;
    let first = world.request("one", SwitchMode::Automatic).await;
    world.reach(first, Status::Started).await;
    let second = world.request("two", SwitchMode::Automatic).await;
    let state = world.reach(second, Status::Started).await;
    world
        .routes("the second is served everywhere", served)
        .await;

    edge.tell(|told| {
        told.refuses.insert(address(&instance()));
    });
    let InstanceRef {
        project,
        environment,
        service,
    } = instance();
    let commit = daybook_events::CommitId::parse("ab".repeat(20)).unwrap();
    let found = GitopsEvent::ForeignCommitFound(Box::new(ForeignCommitFound {
        commit: commit.clone(),
        author: "Grace <grace@example.com>".into(),
        message: "Revert it".into(),
        files: Vec::new(),
        parents: Vec::new(),
        ordinal: None,
        committer: None,
        committed_at: None,
        signature: None,
        diff: None,
        environments: vec![environment.clone()],
        reverts: state.commit.clone(),
        undoes: Some(UndoneDeployment {
            environment,
            service,
            deployment: second,
        }),
    }));
    let subject = Subject::Gitops(project.clone());
    let context = world.context();
    let recorded = world
        .ledger
        .execute::<Gitops>(&subject, &context, |s| gitops::decide(s, found.clone()));
    recorded.await.unwrap();

    let is_undone = |r: &Routing| !undone(r).is_empty();
    let routing = world.routes("the rollback is undone", is_undone).await;
    assert_eq!(main_of(&routing, &instance()), Some(second));
    let said = tokio::time::timeout(PATIENCE, async {
        let source = LineSource::Deployment(second);
        loop {
            let lines = world.bench.lines.read(source, 0, 1000).await.unwrap();
            let texts = lines.iter().map(|l| &l.line.text);
            if texts.into_iter().any(|t| t.contains("rolls nothing back")) {
                break;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    });
    said.await.expect("it is said that nothing is rolled back");
    let gitops = world.ledger.projections().gitops(&project).unwrap();
    let status = gitops.unwrap().foreign_commit(&commit).unwrap().status;
    assert_eq!(status, ForeignStatus::Found);
    world.reach(second, Status::Started).await;
    world.stop().await;
}

/// An Ingress of somebody else for the address of the instance.
fn theirs(backend: &str) -> Ingresses {
    Ingresses::Seen(vec![IngressSeen {
        hostname: address(&instance()),
        namespace: "legacy".to_owned(),
        name: "shop".to_owned(),
        backends: vec![backend.to_owned()],
    }])
}

/// Where a Gateway is reached.
fn at(n: u8) -> Vec<GatewayAddress> {
    vec![GatewayAddress::Ip([203, 0, 113, n].into())]
}

/// Where the Gateway of the cluster was said to be reached, the newest last.
async fn addresses_said(world: &World) -> Vec<Vec<GatewayAddress>> {
    let subject = Subject::Routing(instance().project);
    let events = world.ledger.log().read_aggregate(&subject).await.unwrap();
    let said = events
        .iter()
        .filter_map(|r| match r.event().ok()?.payload() {
            Ok(routing::RoutingEvent::Applied(a)) => a.addresses,
            _ => None,
        });
    said.collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn where_a_gateway_is_reached_is_in_the_ledger_once_for_each_change() {
    let dir = tempfile::tempdir().unwrap();
    let (ports, edge) = Edge::ports();
    let world = World::start(dir.path(), &ports).await;
    world.prepare().await;
    let first = world.request("one", SwitchMode::Automatic).await;
    world.reach(first, Status::Started).await;
    let routing = world.routes("it is served everywhere", served).await;
    assert!(routing.addresses.is_empty());

    // It is given its address late, another one then, none, and the first again.
    let name = cluster();
    for now in [at(1), at(2), Vec::new(), at(1)] {
        edge.addresses.send_replace(Some(now.clone()));
        let is_there = |r: &Routing| r.addresses.get(name.as_str()) == Some(&now);
        let routing = world.routes("where it is reached is known", is_there).await;
        assert!(served(&routing));
    }
    // A switch does not say it again.
    let second = world.request("two", SwitchMode::Automatic).await;
    world.reach(second, Status::Started).await;
    world
        .routes("the second is served everywhere", served)
        .await;
    let said = addresses_said(&world).await;
    assert_eq!(said, [at(1), at(2), Vec::new(), at(1)]);
    world.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn ingresses_that_serve_a_hostname_as_well_are_seen_at_each_switch() {
    let dir = tempfile::tempdir().unwrap();
    let (ports, edge) = Edge::ports();
    let seen = theirs("web:80");
    edge.tell(|told| told.ingresses = Some(seen.clone()));
    let world = World::start(dir.path(), &ports).await;
    world.prepare().await;
    let first = world.request("one", SwitchMode::Automatic).await;
    world.reach(first, Status::Started).await;
    let name = cluster();
    let is_said = |r: &Routing| r.ingresses.get(name.as_str()) == Some(&seen);
    let is_served = |r: &Routing| is_said(r) && served(r);
    let routing = world.routes("it is said", is_served).await;
    assert_eq!(routing.also_served(&address(&instance())).count(), 1);

    // What cannot be read for a moment says nothing; that there is none any more is said.
    edge.tell(|told| told.ingresses = None);
    let second = world.request("two", SwitchMode::Automatic).await;
    world.reach(second, Status::Started).await;
    let routing = world.routes("it is served everywhere", served).await;
    assert!(is_said(&routing));
    edge.tell(|told| told.ingresses = Some(Ingresses::default()));
    let third = world.request("three", SwitchMode::Automatic).await;
    world.reach(third, Status::Started).await;
    let is_gone = |r: &Routing| r.also_served(&address(&instance())).count() == 0;
    world.routes("it is gone", is_gone).await;
    world.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn where_a_gateway_is_reached_is_said_while_it_takes_no_routes() {
    let dir = tempfile::tempdir().unwrap();
    let (ports, edge) = Edge::ports();
    edge.addresses.send_replace(Some(at(1)));
    let world = World::start(dir.path(), &ports).await;
    world.prepare().await;
    let first = world.request("one", SwitchMode::Automatic).await;
    world.reach(first, Status::Started).await;
    world.routes("it is served everywhere", served).await;

    // Nobody has switched anything, so nothing is led anew, whatever is said.
    let asked = edge.gateway.borrow().asked.len();
    edge.tell(|told| told.silent = true);
    let name = cluster();
    for now in [Vec::new(), at(2), at(1)] {
        edge.addresses.send_replace(Some(now.clone()));
        let is_there = |r: &Routing| r.addresses.get(name.as_str()) == Some(&now);
        world.routes("where it is reached is known", is_there).await;
    }
    assert_eq!(edge.gateway.borrow().asked.len(), asked);

    // The next switch waits for it, and what is served is reached elsewhere meanwhile.
    let second = world.request("two", SwitchMode::Automatic).await;
    world.reach(second, Status::Started).await;
    let waits = |told: &Told| told.asked.len() > asked + 1;
    edge.until("it is asked again and again", waits).await;
    edge.tell(|told| told.silent = false);
    edge.addresses.send_replace(Some(at(3)));
    let is_there = |r: &Routing| served(r) && r.addresses.get(name.as_str()) == Some(&at(3));
    world
        .routes("it is served, and reached there", is_there)
        .await;
    world.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_another_process_sees_of_a_gateway_is_not_taken_back() {
    let dir = tempfile::tempdir().unwrap();
    let (ports, edge) = Edge::ports();
    edge.addresses.send_replace(Some(at(1)));
    let world = World::start(dir.path(), &ports).await;
    world.prepare().await;
    let first = world.request("one", SwitchMode::Automatic).await;
    world.reach(first, Status::Started).await;
    let name = cluster();
    let reached = |n: u8| {
        let name = name.clone();
        move |r: &Routing| served(r) && r.addresses.get(name.as_str()) == Some(&at(n))
    };
    let routing = world.routes("it is reached there", reached(1)).await;

    let report = routing::Applied {
        gateway: name.to_string(),
        table: routing.table,
        hostnames: Vec::new(),
        addresses: Some(at(9)),
        ingresses: None,
    };
    let subject = Subject::Routing(instance().project);
    let context = world.context();
    let reported = world.ledger.execute::<Routing>(&subject, &context, |s| {
        routing::decide(s, routing::Command::ReportApplied(report.clone()))
    });
    reported.await.unwrap();
    world.routes("another one has said so", reached(9)).await;
    let second = world.request("two", SwitchMode::Automatic).await;
    world.reach(second, Status::Started).await;
    world.routes("the second is served", served).await;
    assert_eq!(addresses_said(&world).await, [at(1), at(9)]);

    // What is news to this one is said.
    edge.addresses.send_replace(Some(at(2)));
    world.routes("it is reached elsewhere", reached(2)).await;
    assert_eq!(addresses_said(&world).await, [at(1), at(9), at(2)]);
    world.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_else_is_on_a_cluster_is_said_where_the_table_is_not_folded_yet() {
    let dir = tempfile::tempdir().unwrap();
    let (mut ports, edge) = Edge::ports();
    ports.lag = Duration::from_millis(50);
    let seen = theirs("web:80");
    edge.tell(|told| told.ingresses = Some(seen.clone()));
    let world = World::start(dir.path(), &ports).await;
    world.prepare().await;
    let first = world.request("one", SwitchMode::Automatic).await;
    world.reach(first, Status::Started).await;
    let name = cluster();
    let is_said = |r: &Routing| r.ingresses.get(name.as_str()) == Some(&seen);
    world.routes("it is said", is_said).await;
    world.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_said_of_others_has_nothing_led_anew() {
    let dir = tempfile::tempdir().unwrap();
    let (ports, edge) = Edge::ports();
    // Larger than any event.
    let large = theirs(&"x".repeat(100_000));
    edge.tell(|told| told.ingresses = Some(large));
    let world = World::start(dir.path(), &ports).await;
    world.prepare().await;
    let first = world.request("one", SwitchMode::Automatic).await;
    world.reach(first, Status::Started).await;
    world.routes("it is served everywhere", served).await;
    let asked = edge.gateway.borrow().asked.len();
    let name = cluster();
    for n in 1..4 {
        edge.addresses.send_replace(Some(at(n)));
        let is_there = |r: &Routing| r.addresses.get(name.as_str()) == Some(&at(n));
        world.routes("where it is reached is known", is_there).await;
    }
    assert_eq!(edge.gateway.borrow().asked.len(), asked);
    // The next one is smaller.
    edge.tell(|told| told.ingresses = Some(theirs("web:80")));
    let second = world.request("two", SwitchMode::Automatic).await;
    world.reach(second, Status::Started).await;
    let is_said = |r: &Routing| r.ingresses.get(name.as_str()) == Some(&theirs("web:80"));
    world.routes("it is said", is_said).await;
    world.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn it_is_looked_at_what_else_there_is_for_one_project_after_the_other() {
    let dir = tempfile::tempdir().unwrap();
    let (ports, edge) = Edge::ports();
    let world = World::start(dir.path(), &ports).await;
    let instances = ["one", "two", "three", "four"].map(|project| {
        let instance = format!("{project}.production.web");
        instance.parse::<InstanceRef>().unwrap()
    });
    for instance in &instances {
        world.prepare_for(instance).await;
    }
    for instance in &instances {
        let (instance, version) = (instance.clone(), of_git("main"));
        world
            .request_of(instance, version, SwitchMode::Automatic)
            .await;
    }
    let all = |told: &Told| told.looked.len() == instances.len();
    edge.until("it was looked for all of them", all).await;
    assert!(!edge.gateway.borrow().crowded);
    world.stop().await;
}
