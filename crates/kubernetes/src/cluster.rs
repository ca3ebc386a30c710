//! The target itself.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet, VecDeque};
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use async_trait::async_trait;
use daybook_events::lines::LineLog;
use daybook_events::routing::{GatewayAddress, Ingresses};
use daybook_events::{ClusterName, CommitId, DeploymentId, ProjectName};
use daybook_secrets::SecretStore;
use daybook_workers::host_routes::{HostRoute, HostRoutes, RouteError, RouteSeen};
use daybook_workers::target::{AppRef, AppStatus, ReleaseStatus, Target, TargetError};
use daybook_workers::values::EnvironmentValues;
use k8s_openapi::api::apps::v1::{Deployment, ReplicaSet};
use k8s_openapi::api::core::v1::{Container, Pod, PodSpec};
use kube::{Api, Client, ResourceExt};
use tokio::sync::watch;
use tokio_util::sync::{CancellationToken, DropGuard};
use tokio_util::task::TaskTracker;

use crate::apply::{ANSWER_WITHIN, Space};
use crate::argocd::{self, Application, ArgoCd};
use crate::asked::Asked;
use crate::diagnosis::{self, Warning};
use crate::error::{ConnectError, no_gateway_api};
use crate::names;
use crate::objects::{GatewayRef, Kind};
use crate::output::Output;
use crate::retry;
use crate::routes::{self, GatewayObject, HttpRoute};
use crate::status::Seen;
use crate::watches::{self, Change, Trouble, Watched};

/// What is said of Argo CD's objects where they cannot be watched.
const APPLICATIONS: &str = "applications of Argo CD";

/// What is said of routes where they cannot be watched.
const ROUTES: &str = "httproutes";

/// What a cluster is made of.
#[derive(Clone)]
pub struct ClusterOptions {
    /// Its name in the ledger.
    pub name: ClusterName,
    /// How its API server is reached.
    pub client: Client,
    /// Where the values of secrets are.
    pub secrets: Arc<dyn SecretStore>,
    /// The Gateway for the addresses of releases, and what those end in; none are made without.
    pub gateway: Option<(GatewayRef, String)>,
    /// The Argo CD that applies there; Daybook does so itself without.
    pub argocd: Option<ArgoCd>,
    /// Where what pods print goes; nobody carries it without.
    pub lines: Option<Arc<dyn LineLog>>,
    /// Ends the looking after it. What runs there keeps running.
    pub cancel: CancellationToken,
}

/// A Kubernetes cluster.
pub struct KubernetesCluster {
    shared: Arc<Shared>,
    _end: DropGuard,
}

impl fmt::Debug for KubernetesCluster {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("KubernetesCluster")
            .field("name", &self.shared.options.name)
            .finish_non_exhaustive()
    }
}

struct Shared {
    options: ClusterOptions,
    world: Mutex<World>,
    /// The routes of its Gateway; none before they were listed.
    routes: watch::Sender<Option<routes::Known>>,
    /// Where its Gateway is reached.
    addresses: Arc<routes::Addresses>,
    /// One change of a namespace at a time.
    turns: Mutex<HashMap<String, Arc<tokio::sync::Mutex<()>>>>,
}

/// What is known of the cluster.
#[derive(Default)]
struct World {
    /// By namespace.
    spaces: HashMap<String, Known>,
    /// The kinds that were listed at least once. Before all were, nothing is said of any release:
    /// what was not listed yet would look gone.
    listed: HashSet<&'static str>,
    /// How many kinds have to be.
    needed: usize,
    /// Watches that are cut, with the reason.
    troubles: BTreeMap<&'static str, Trouble>,
    /// Warnings that come before anything of their namespace is seen, with the namespace and the
    /// pod: of other people's pods, or of what was not listed yet.
    early: VecDeque<(String, String, Warning)>,
}

/// So many of them are kept.
const EARLY: usize = 256;

#[derive(Default)]
struct Known {
    seen: Seen,
    /// What was asked for last, once it was applied.
    asked: Option<Asked>,
    status: watch::Sender<AppStatus>,
}

impl Known {
    /// Whether nothing is there, nothing was asked for, and nobody looks.
    fn is_of_no_use(&self) -> bool {
        self.asked.is_none() && self.seen.is_empty() && self.status.receiver_count() == 0
    }
}

impl KubernetesCluster {
    /// Begins to look after a cluster, if its API server answers.
    pub async fn open(options: ClusterOptions) -> Result<Self, ConnectError> {
        let version = tokio::time::timeout(ANSWER_WITHIN, options.client.apiserver_version());
        let version = version.await.map_err(|_| ConnectError::Silent)?;
        let version = version.map_err(ConnectError::of)?;
        tracing::info!(cluster = %options.name, version = version.git_version, "connected");
        let cancel = options.cancel.child_token();
        let world = World {
            needed: 3 + usize::from(options.argocd.is_some()),
            ..World::default()
        };
        let shared = Arc::new(Shared {
            options,
            world: Mutex::new(world),
            routes: watch::Sender::default(),
            addresses: Arc::default(),
            turns: Mutex::default(),
        });
        let tasks = TaskTracker::new();
        let workloads: Api<Deployment> = Api::all(shared.options.client.clone());
        shared.follow(
            &tasks,
            &cancel,
            "deployments",
            workloads,
            |world, change| {
                world.take("deployments", change, |s| &mut s.workloads);
            },
        );
        let sets: Api<ReplicaSet> = Api::all(shared.options.client.clone());
        shared.follow(&tasks, &cancel, "replicasets", sets, |world, mut change| {
            // They repeat the whole template of their pods, for which nobody asks.
            for set in change.there() {
                set.spec = None;
                set.status = None;
            }
            world.take("replicasets", change, |s| &mut s.sets);
        });
        let output = shared.output(&tasks, &cancel);
        let pods: Api<Pod> = Api::all(shared.options.client.clone());
        let told = output.clone();
        let secrets = shared.options.secrets.clone();
        shared.follow(&tasks, &cancel, "pods", pods, move |world, mut change| {
            for pod in change.there() {
                diagnosis::mask_last_words(pod, &secrets);
                // Of what it is to be, nobody asks for more than how its ports are called.
                if let Some(spec) = &mut pod.spec {
                    let called = spec.containers.drain(..).filter(|c| c.ports.is_some());
                    let containers = called.map(|container| Container {
                        name: container.name,
                        ports: container.ports,
                        ..Container::default()
                    });
                    let containers = containers.collect();
                    *spec = PodSpec {
                        containers,
                        ..PodSpec::default()
                    };
                }
            }
            if let Some(output) = &told {
                output.pods(&change);
            }
            world.take("pods", change, |s| &mut s.pods);
        });
        if shared.options.gateway.is_some() {
            let routes: Api<HttpRoute> = Api::all(shared.options.client.clone());
            let known = shared.routes.clone();
            shared.follow(&tasks, &cancel, ROUTES, routes, move |_, change| {
                routes::take(&known, change);
            });
        }
        shared.follow_gateway(&tasks, &cancel);
        if let Some(argocd) = &shared.options.argocd {
            let api = argocd.api(&shared.options.client);
            shared.follow(&tasks, &cancel, APPLICATIONS, api, World::take_applications);
        }
        let weak = Arc::downgrade(&shared);
        let warned = move |namespace: &str, pod: &str, warning: Warning| {
            if let Some(output) = &output {
                output.warned(namespace, pod, &warning);
            }
            if let Some(shared) = weak.upgrade() {
                shared.warned(namespace, pod, warning);
            }
        };
        tasks.spawn(watches::warnings(
            shared.options.client.clone(),
            Arc::new(warned),
            cancel.clone(),
        ));
        tasks.close();
        Ok(Self {
            shared,
            _end: cancel.drop_guard(),
        })
    }

    /// What keeps this process from seeing what happens on the cluster, if anything.
    pub fn trouble(&self) -> Option<String> {
        let world = self.shared.world();
        let (kind, trouble) = world.troubles.first_key_value()?;
        let text = format!("{kind} cannot be watched: {}", trouble.why);
        if !trouble.is_unknown {
            return Some(text);
        }
        let argocd = self
            .options()
            .argocd
            .as_ref()
            .filter(|_| *kind == APPLICATIONS);
        Some(match argocd {
            Some(argocd) => argocd::missing(
                &argocd.namespace,
                &format!("{text}. The cluster has no Argo CD"),
            ),
            None if *kind == ROUTES => {
                no_gateway_api(&format!("{text}. The cluster does not know Gateway API"))
            }
            None => text,
        })
    }

    pub(crate) fn options(&self) -> &ClusterOptions {
        &self.shared.options
    }
}

impl Shared {
    fn world(&self) -> MutexGuard<'_, World> {
        self.world.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn turn(&self, namespace: &str) -> Arc<tokio::sync::Mutex<()>> {
        let mut turns = self.turns.lock().unwrap_or_else(PoisonError::into_inner);
        turns.entry(namespace.to_owned()).or_default().clone()
    }

    /// Carries what pods print, if anybody keeps it.
    fn output(&self, tasks: &TaskTracker, cancel: &CancellationToken) -> Option<Arc<Output>> {
        Some(Arc::new(Output {
            client: self.options.client.clone(),
            cluster: self.options.name.clone(),
            lines: self.options.lines.clone()?,
            tasks: tasks.clone(),
            cancel: cancel.clone(),
            known: Mutex::default(),
        }))
    }

    /// Tells the world of the objects of a kind.
    fn follow<K: Watched>(
        self: &Arc<Self>,
        tasks: &TaskTracker,
        cancel: &CancellationToken,
        kind: &'static str,
        api: Api<K>,
        take: impl Fn(&mut World, Change<K>) + Send + 'static,
    ) {
        let weak = Arc::downgrade(self);
        let changed = move |change| {
            if let Some(shared) = weak.upgrade() {
                take(&mut shared.world(), change);
            }
        };
        let weak = Arc::downgrade(self);
        let troubled = move |trouble: Option<Trouble>| {
            if let Some(shared) = weak.upgrade() {
                let mut world = shared.world();
                match trouble {
                    Some(trouble) => world.troubles.insert(kind, trouble),
                    None => world.troubles.remove(kind),
                };
            }
        };
        tasks.spawn(watches::objects(api, changed, troubled, cancel.clone()));
    }

    /// Follows where the Gateway is reached, which comes after it, and may change. In the
    /// namespaces of the routes there may be several of that name.
    fn follow_gateway(self: &Arc<Self>, tasks: &TaskTracker, cancel: &CancellationToken) {
        let Some((gateway, _)) = &self.options.gateway else {
            return;
        };
        let Some(namespace) = &gateway.namespace else {
            return;
        };
        let api: Api<GatewayObject> = Api::namespaced(self.options.client.clone(), namespace);
        let (name, known, cancel) = (gateway.name.clone(), self.addresses.clone(), cancel.clone());
        tasks.spawn(async move {
            let changed = |change| known.take(change);
            // That it cannot be watched is for the log only: it is asked at each switch then.
            let troubled = |trouble: Option<Trouble>| {
                if trouble.is_some() {
                    known.cut();
                }
            };
            watches::named(api, &name, changed, troubled, cancel).await;
        });
    }

    fn warned(&self, namespace: &str, pod: &str, warning: Warning) {
        let mut world = self.world();
        let warned = (namespace.to_owned(), pod.to_owned(), warning);
        world.early.push_back(warned);
        world.recall();
        if world.early.len() > EARLY {
            world.early.pop_front();
        }
        world.publish(namespace);
    }
}

impl World {
    fn take<K: kube::Resource<DynamicType = ()>>(
        &mut self,
        kind: &'static str,
        change: Change<K>,
        of: fn(&mut Seen) -> &mut HashMap<String, Box<K>>,
    ) {
        match change {
            Change::All(all) => {
                for known in self.spaces.values_mut() {
                    of(&mut known.seen).clear();
                }
                for object in all {
                    let known = self.spaces.entry(space_of(&object)).or_default();
                    of(&mut known.seen).insert(object.name_any(), Box::new(object));
                }
                self.recall();
                self.listed.insert(kind);
                let all: Vec<String> = self.spaces.keys().cloned().collect();
                for namespace in all {
                    self.publish(&namespace);
                }
            }
            Change::Applied(object) => {
                let namespace = space_of(&*object);
                let is_new = !self.spaces.contains_key(&namespace);
                let known = self.spaces.entry(namespace.clone()).or_default();
                of(&mut known.seen).insert(object.name_any(), object);
                if is_new {
                    self.recall();
                }
                self.publish(&namespace);
            }
            Change::Deleted(object) => {
                let namespace = space_of(&*object);
                if let Some(known) = self.spaces.get_mut(&namespace) {
                    let name = object.name_any();
                    of(&mut known.seen).remove(&name);
                    if kind == "pods" {
                        known.seen.warnings.remove(&name);
                    }
                }
                self.publish(&namespace);
                if self.spaces.get(&namespace).is_some_and(Known::is_of_no_use) {
                    self.spaces.remove(&namespace);
                }
            }
        }
    }

    /// Keeps the warnings whose namespaces are known by now, in the order in which they came.
    fn recall(&mut self) {
        for (namespace, pod, warning) in std::mem::take(&mut self.early) {
            match self.spaces.get_mut(&namespace) {
                Some(known) => known.seen.warn(&pod, warning),
                None => self.early.push_back((namespace, pod, warning)),
            }
        }
    }

    /// Applications are called as the namespaces that they are for.
    fn take_applications(&mut self, change: Change<Application>) {
        let mut changed = Vec::new();
        match change {
            Change::All(all) => {
                for (namespace, known) in &mut self.spaces {
                    if known.seen.application.take().is_some() {
                        changed.push(namespace.clone());
                    }
                }
                changed.extend(all.iter().map(ResourceExt::name_any));
                for application in all {
                    let known = self.spaces.entry(application.name_any()).or_default();
                    known.seen.application = Some(application);
                }
                self.listed.insert(APPLICATIONS);
                changed.extend(self.spaces.keys().cloned());
            }
            Change::Applied(application) => {
                let name = application.name_any();
                let known = self.spaces.entry(name.clone()).or_default();
                known.seen.application = Some(*application);
                changed.push(name);
            }
            Change::Deleted(application) => {
                let name = application.name_any();
                if let Some(known) = self.spaces.get_mut(&name) {
                    known.seen.application = None;
                }
                changed.push(name);
            }
        }
        for namespace in changed {
            self.publish(&namespace);
        }
    }

    /// Tells what is seen of an environment, if that is different from before.
    fn publish(&mut self, namespace: &str) {
        if self.listed.len() < self.needed {
            return;
        }
        if let Some(known) = self.spaces.get_mut(namespace)
            && let Some(asked) = &mut known.asked
        {
            for deployment in known.seen.settled(asked) {
                asked.settles(deployment);
            }
            let status = known.seen.status(asked);
            known.status.send_if_modified(|before| {
                let differs = *before != status;
                *before = status;
                differs
            });
        }
    }
}

fn space_of(object: &impl kube::Resource<DynamicType = ()>) -> String {
    object.namespace().unwrap_or_default()
}

#[async_trait]
impl Target for KubernetesCluster {
    fn cluster(&self) -> &ClusterName {
        &self.shared.options.name
    }

    async fn apply(
        &self,
        app: &AppRef,
        revision: &CommitId,
        desired: &EnvironmentValues,
    ) -> Result<(), TargetError> {
        let none = BTreeSet::new();
        self.apply_keeping(app, revision, desired, &none).await
    }

    async fn apply_keeping(
        &self,
        app: &AppRef,
        revision: &CommitId,
        desired: &EnvironmentValues,
        kept: &BTreeSet<DeploymentId>,
    ) -> Result<(), TargetError> {
        let namespace = names::namespace(&app.project, &app.environment);
        let turn = self.shared.turn(&namespace);
        let _turn = turn.lock().await;
        let mut asked = self.bring(app, &namespace, revision, desired, kept).await?;
        let mut world = self.shared.world();
        let known = world.spaces.entry(namespace.clone()).or_default();
        let again = asked.again();
        if let Some(before) = &known.asked {
            asked.follows(before);
        }
        known.asked = Some(asked);
        world.publish(&namespace);
        match again {
            Some(why) => Err(TargetError::Unavailable(why)),
            None => Ok(()),
        }
    }

    async fn retry(&self, app: &AppRef, deployment: DeploymentId) -> Result<(), TargetError> {
        let namespace = names::namespace(&app.project, &app.environment);
        let turn = self.shared.turn(&namespace);
        let _turn = turn.lock().await;
        let mut status = self.watch(app);
        let release = of(&status.borrow(), deployment).cloned();
        let Some(release) = release else {
            return Err(TargetError::Unavailable(format!(
                "deployment {} is not seen there yet",
                deployment.short()
            )));
        };
        let (held, unsynced, workloads) = {
            let world = self.shared.world();
            let known = world.spaces.get(&namespace);
            let asked = known.and_then(|known| known.asked.as_ref());
            let of_chart = asked.and_then(|asked| asked.workloads(deployment));
            let workloads: Vec<_> = match of_chart {
                Some(of_chart) => of_chart.iter().map(|w| (w.kind, w.name.clone())).collect(),
                None => {
                    let name = names::release(&release.service, deployment);
                    vec![(Kind::DEPLOYMENT, name)]
                }
            };
            let held = asked.and_then(|asked| asked.held(deployment));
            let held = held.filter(|problem| !problem.transient).cloned();
            let unsynced = asked.filter(|asked| !asked.is_settled(deployment));
            let unsynced = unsynced.map(|asked| asked.revision().clone());
            (held, unsynced, workloads)
        };
        if let Some(problem) = held {
            return Err(TargetError::Refused(problem.message));
        }
        let unready = release.instances.iter();
        let unready = unready.filter(|i| !i.ready && !i.outdated);
        let unready: Vec<String> = unready.map(|i| i.name.clone()).collect();
        let names: Vec<_> = workloads.iter().map(|(_, name)| name.as_str()).collect();
        let names = names.join(", ");
        let deployments = workloads
            .iter()
            .filter(|(kind, _)| *kind == Kind::DEPLOYMENT);
        let client = &self.options().client;
        match (&self.options().argocd, unsynced) {
            (Some(argocd), Some(revision)) => argocd.sync_again(client, app, &revision).await?,
            _ => {
                for (_, workload) in deployments {
                    retry::again(client, &namespace, workload).await?;
                }
                retry::anew(client, &namespace, &unready).await?;
            }
        }
        let is_over = |status: &AppStatus| {
            let problem = of(status, deployment).and_then(|r| r.problem.as_ref());
            problem.is_some_and(|problem| !problem.transient)
        };
        let forgotten = status.wait_for(|status| !is_over(status));
        match tokio::time::timeout(ANSWER_WITHIN, forgotten).await {
            Ok(Ok(_)) => Ok(()),
            _ => Err(TargetError::Unavailable(format!(
                "{names} still shows that it has failed"
            ))),
        }
    }

    async fn remove_volumes(&self, app: &AppRef) -> Result<(), TargetError> {
        let namespace = names::namespace(&app.project, &app.environment);
        let turn = self.shared.turn(&namespace);
        let _turn = turn.lock().await;
        let space = Space {
            client: &self.options().client,
            app,
            namespace: &namespace,
            ephemeral: false,
        };
        space.remove_claims().await
    }

    fn runs_charts(&self) -> bool {
        true
    }

    fn has_gateway(&self) -> bool {
        self.options().gateway.is_some()
    }

    async fn route(&self, routes: &HostRoutes) -> Result<(), RouteError> {
        let Some((gateway, _)) = &self.options().gateway else {
            return Err(RouteError::Unavailable("it has no Gateway".to_owned()));
        };
        let gateway = routes::Gateway {
            client: &self.options().client,
            gateway,
            known: self.shared.routes.subscribe(),
            addresses: &self.shared.addresses,
        };
        gateway.lead(routes).await
    }

    fn gateway_addresses(&self) -> Option<watch::Receiver<Option<Vec<GatewayAddress>>>> {
        let (gateway, _) = self.options().gateway.as_ref()?;
        let one = gateway.namespace.is_some();
        one.then(|| self.shared.addresses.known.subscribe())
    }

    async fn ingresses(&self, routes: &HostRoutes) -> Option<Ingresses> {
        routes::ingresses(&self.options().client, routes).await
    }

    fn route_seen(&self, project: &ProjectName, host: &HostRoute) -> RouteSeen {
        let Some((gateway, _)) = &self.options().gateway else {
            return RouteSeen::Unseen;
        };
        // What is not watched may be otherwise by now.
        if self.shared.world().troubles.contains_key(ROUTES) {
            return RouteSeen::Unseen;
        }
        match &*self.shared.routes.borrow() {
            Some(known) => routes::seen(known, project, host, gateway),
            None => RouteSeen::Unseen,
        }
    }

    fn watch(&self, app: &AppRef) -> watch::Receiver<AppStatus> {
        let namespace = names::namespace(&app.project, &app.environment);
        let mut world = self.shared.world();
        let known = world.spaces.entry(namespace).or_default();
        known.status.subscribe()
    }
}

/// What is seen of one release.
fn of(status: &AppStatus, deployment: DeploymentId) -> Option<&ReleaseStatus> {
    let mut releases = status.releases.iter();
    releases.find(|release| release.deployment == deployment)
}
