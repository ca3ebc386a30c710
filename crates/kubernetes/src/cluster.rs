//! The target itself.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use async_trait::async_trait;
use daybook_events::{ClusterName, CommitId, DeploymentId};
use daybook_secrets::SecretStore;
use daybook_workers::image::LOCAL_HOST;
use daybook_workers::target::{AppRef, AppStatus, Problem, Target, TargetError};
use daybook_workers::values::{EnvironmentValues, ReleaseValues};
use k8s_openapi::ByteString;
use k8s_openapi::api::apps::v1::{Deployment, ReplicaSet};
use k8s_openapi::api::core::v1::Pod;
use kube::{Client, ResourceExt};
use tokio::sync::watch;
use tokio_util::sync::{CancellationToken, DropGuard};
use tokio_util::task::TaskTracker;

use crate::apply::{ANSWER_WITHIN, Space};
use crate::diagnosis::Warning;
use crate::error::ConnectError;
use crate::names;
use crate::objects::{self, GatewayRef, Kind, Object, Place};
use crate::status::{Asked, Seen};
use crate::watches::{self, Change};

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
    /// Watches that are cut, with the reason.
    troubles: BTreeMap<&'static str, String>,
}

#[derive(Default)]
struct Known {
    seen: Seen,
    /// What was asked for last, once it was applied.
    asked: Option<Asked>,
    status: watch::Sender<AppStatus>,
}

/// The kinds without which nothing can be said.
const NEEDED: usize = 3;

impl KubernetesCluster {
    /// Begins to look after a cluster, if its API server answers.
    pub async fn open(options: ClusterOptions) -> Result<Self, ConnectError> {
        let version = tokio::time::timeout(ANSWER_WITHIN, options.client.apiserver_version());
        let version = version.await.map_err(|_| ConnectError::Silent)?;
        let version = version.map_err(ConnectError::Api)?;
        tracing::info!(cluster = %options.name, version = version.git_version, "connected");
        let cancel = options.cancel.child_token();
        let shared = Arc::new(Shared {
            options,
            world: Mutex::default(),
            turns: Mutex::default(),
        });
        let tasks = TaskTracker::new();
        shared.follow::<Deployment>(&tasks, &cancel, "deployments", |seen| &mut seen.workloads);
        shared.follow::<ReplicaSet>(&tasks, &cancel, "replicasets", |seen| &mut seen.sets);
        shared.follow::<Pod>(&tasks, &cancel, "pods", |seen| &mut seen.pods);
        let weak = Arc::downgrade(&shared);
        let warned = move |namespace: &str, pod: &str, warning: Warning| {
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
        let (kind, why) = world.troubles.first_key_value()?;
        Some(format!("{kind} cannot be watched: {why}"))
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

    /// Keeps the objects of a kind.
    fn follow<K>(
        self: &Arc<Self>,
        tasks: &TaskTracker,
        cancel: &CancellationToken,
        kind: &'static str,
        of: fn(&mut Seen) -> &mut HashMap<String, K>,
    ) where
        K: kube::Resource<DynamicType = ()>
            + Clone
            + fmt::Debug
            + serde::de::DeserializeOwned
            + Send
            + 'static,
    {
        let weak = Arc::downgrade(self);
        let changed = move |change| {
            if let Some(shared) = weak.upgrade() {
                shared.world().take(kind, change, of);
            }
        };
        let weak = Arc::downgrade(self);
        let troubled = move |why: Option<String>| {
            if let Some(shared) = weak.upgrade() {
                let mut world = shared.world();
                match why {
                    Some(why) => world.troubles.insert(kind, why),
                    None => world.troubles.remove(kind),
                };
            }
        };
        tasks.spawn(watches::objects(
            self.options.client.clone(),
            changed,
            troubled,
            cancel.clone(),
        ));
    }

    fn warned(&self, namespace: &str, pod: &str, warning: Warning) {
        let mut world = self.world();
        // Warnings outlive their pods, and other pods have theirs.
        if let Some(known) = world.spaces.get_mut(namespace) {
            known.seen.warnings.insert(pod.to_owned(), warning);
        }
        world.publish(namespace);
    }
}

impl World {
    fn take<K: kube::Resource<DynamicType = ()>>(
        &mut self,
        kind: &'static str,
        change: Change<K>,
        of: fn(&mut Seen) -> &mut HashMap<String, K>,
    ) {
        match change {
            Change::All(all) => {
                for known in self.spaces.values_mut() {
                    of(&mut known.seen).clear();
                }
                for object in all {
                    let known = self.spaces.entry(space_of(&object)).or_default();
                    of(&mut known.seen).insert(object.name_any(), object);
                }
                self.listed.insert(kind);
                let all: Vec<String> = self.spaces.keys().cloned().collect();
                for namespace in all {
                    self.publish(&namespace);
                }
            }
            Change::Applied(object) => {
                let namespace = space_of(&*object);
                let known = self.spaces.entry(namespace.clone()).or_default();
                of(&mut known.seen).insert(object.name_any(), *object);
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
            }
        }
    }

    /// Tells what is seen of an environment, if that is different from before.
    fn publish(&mut self, namespace: &str) {
        if self.listed.len() < NEEDED {
            return;
        }
        if let Some(known) = self.spaces.get(namespace)
            && let Some(asked) = &known.asked
        {
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
        let namespace = names::namespace(&app.project, &app.environment);
        let turn = self.shared.turn(&namespace);
        let _turn = turn.lock().await;
        let asked = self.bring(app, &namespace, revision, desired).await?;
        let mut world = self.shared.world();
        let known = world.spaces.entry(namespace.clone()).or_default();
        let again = asked.again();
        known.asked = Some(asked);
        world.publish(&namespace);
        match again {
            Some(why) => Err(TargetError::Unavailable(why)),
            None => Ok(()),
        }
    }

    fn watch(&self, app: &AppRef) -> watch::Receiver<AppStatus> {
        let namespace = names::namespace(&app.project, &app.environment);
        let mut world = self.shared.world();
        let known = world.spaces.entry(namespace).or_default();
        known.status.subscribe()
    }
}

impl KubernetesCluster {
    async fn bring(
        &self,
        app: &AppRef,
        namespace: &str,
        revision: &CommitId,
        desired: &EnvironmentValues,
    ) -> Result<Asked, TargetError> {
        let options = &self.shared.options;
        let gateway = options.gateway.as_ref();
        let place = Place {
            cluster: &options.name,
            namespace,
            gateway: gateway.map(|(gateway, domain)| (gateway, domain.as_str())),
        };
        let space = Space {
            client: &options.client,
            app,
            namespace,
            ephemeral: desired.ephemeral,
        };
        let mut asked = Asked::new(revision.clone());
        let mut kept = Vec::new();
        let mut wanted = objects::objects(desired, &place);
        if wanted.is_empty() && desired.ephemeral {
            space.remove().await?;
            return Ok(asked);
        }
        if !wanted.is_empty() {
            space.ensure().await?;
        }
        for (service, values) in &desired.services {
            for (deployment, release) in &values.releases {
                if !release.clusters.contains(&options.name) {
                    continue;
                }
                asked.wants(*deployment, service.clone(), release.run.replicas);
                if let Some(problem) = not_pullable(release) {
                    asked.holds(*deployment, problem);
                }
                let name = names::release(service, *deployment);
                match self
                    .secret(app, &place, desired, *deployment, release)
                    .await
                {
                    Ok(Some(secret)) => wanted.insert(0, secret),
                    Ok(None) => {}
                    Err(problem) => {
                        asked.holds(*deployment, problem);
                        // What it has of them keeps it running.
                        kept.push(name);
                    }
                }
            }
        }
        for object in &wanted {
            let applied = space.apply(object).await?;
            if object.kind == Kind::DEPLOYMENT {
                asked.applied(&object.name, applied.uid, applied.generation);
            }
        }
        // Routes also where none are made any more.
        let kinds = [
            Kind::HTTP_ROUTE,
            Kind::SERVICE,
            Kind::DEPLOYMENT,
            Kind::CONFIG_MAP,
            Kind::SECRET,
        ];
        let mut keep: HashSet<_> = wanted.iter().map(|o| (o.kind, o.name.as_str())).collect();
        keep.extend(kept.iter().map(|name| (Kind::SECRET, name.as_str())));
        space.prune(&kinds, &keep).await?;
        Ok(asked)
    }

    /// The object with the values of a release's secrets. Values that are not to be had keep only
    /// this release from running.
    async fn secret(
        &self,
        app: &AppRef,
        place: &Place<'_>,
        desired: &EnvironmentValues,
        deployment: DeploymentId,
        release: &ReleaseValues,
    ) -> Result<Option<Object>, Problem> {
        if release.secret_env.is_empty() {
            return Ok(None);
        }
        let values = self
            .shared
            .options
            .secrets
            .resolve(&app.project, &release.secret_env)
            .await
            .map_err(|e| Problem {
                reason: "SecretMissing".to_owned(),
                message: e.to_line(),
                remedy: e.remedy().to_owned(),
                transient: e.is_retryable(),
            })?;
        let data = values
            .iter()
            .map(|(key, value)| (key.as_str(), ByteString(value.expose().as_bytes().to_vec())));
        Ok(objects::secret(
            desired,
            place,
            deployment,
            data.collect::<BTreeMap<_, _>>(),
        ))
    }
}

/// An image that only Daybook's own machine has.
fn not_pullable(release: &ReleaseValues) -> Option<Problem> {
    let image = release.image.to_string();
    let local = image.split('/').next() == Some(LOCAL_HOST);
    (local && release.run.replicas > 0).then(|| Problem {
        reason: "ImagePullBackOff".to_owned(),
        message: format!("the image {image} is in no registry, so that no cluster can pull it"),
        remedy: "Start Daybook with --image-prefix HOST/PATH, a registry that the cluster \
                 reaches, and deploy again."
            .to_owned(),
        transient: false,
    })
}
