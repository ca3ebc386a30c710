//! One release: as many instances as are wanted, of the specification that is wanted.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;
use std::time::Duration;

use daybook_events::secret::SecretRef;
use daybook_events::spec::{PinnedImage, RunSpec};
use daybook_events::{CommitId, DeploymentId, Digest, EnvKey, ServiceName};
use tokio::sync::watch;
use tokio::task::{Id, JoinSet};
use tokio_util::sync::CancellationToken;

use super::board::{Board, Wanted};
use super::instance::Instance;
use super::record::{InstanceSpec, Record, generation};
use super::{Cluster, state_file};
use crate::target::AppRef;
use crate::values::ReleaseValues;

/// What a release is to be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Goal {
    service: ServiceName,
    image: PinnedImage,
    run: RunSpec,
    secrets: BTreeMap<EnvKey, SecretRef>,
    generation: String,
    revision: CommitId,
    /// It is to go away, with all that it has.
    removed: bool,
    /// How often somebody asked that what is not ready be tried again.
    tries: u32,
}

impl Goal {
    pub(super) fn new(service: ServiceName, values: &ReleaseValues, revision: CommitId) -> Self {
        Self {
            service,
            image: values.image.clone(),
            run: values.run.clone(),
            secrets: values.secret_env.clone(),
            generation: generation(values),
            revision,
            removed: false,
            tries: 0,
        }
    }

    /// For a release that nothing asks for any more.
    pub(super) fn leftover(record: &Record) -> Self {
        Self {
            service: record.spec.service.clone(),
            image: record.spec.image.clone(),
            run: record.spec.run.clone(),
            secrets: record.spec.secrets.clone(),
            generation: record.spec.generation.clone(),
            revision: record.spec.revision.clone(),
            removed: true,
            tries: 0,
        }
    }

    /// Becomes another goal, without forgetting the tries.
    pub(super) fn replace(&mut self, goal: Self) {
        let tries = self.tries;
        *self = Self { tries, ..goal };
    }

    pub(super) fn try_again(&mut self) {
        self.tries += 1;
    }

    pub(super) fn remove(&mut self) {
        self.removed = true;
    }

    pub(super) fn wanted(&self) -> Wanted {
        Wanted {
            service: self.service.clone(),
            replicas: if self.removed { 0 } else { self.run.replicas },
            generation: self.generation.clone(),
        }
    }
}

/// An instance among those of a release: its specification and its number.
type Key = (String, u32);

/// The task of one release.
pub(super) struct Release {
    cluster: Arc<Cluster>,
    board: Arc<Board>,
    app: AppRef,
    deployment: DeploymentId,
    instances: BTreeMap<Key, Running>,
    tasks: JoinSet<()>,
    keys: HashMap<Id, Key>,
    /// The images that it holds.
    images: BTreeSet<Digest>,
    /// The tries that were begun.
    tries: u32,
}

#[derive(Debug)]
struct Running {
    name: String,
    image: Digest,
    stop: CancellationToken,
}

impl Release {
    pub(super) fn new(
        cluster: Arc<Cluster>,
        board: Arc<Board>,
        app: AppRef,
        deployment: DeploymentId,
    ) -> Self {
        Self {
            cluster,
            board,
            app,
            deployment,
            instances: BTreeMap::new(),
            tasks: JoinSet::new(),
            keys: HashMap::new(),
            images: BTreeSet::new(),
            tries: 0,
        }
    }

    /// Converges to the goal, whatever it becomes, until the release is removed or the cluster
    /// is left.
    pub(super) async fn converge(mut self, mut goal: watch::Receiver<Goal>) {
        let mut status = self.board.watch();
        for record in self.cluster.records(self.deployment) {
            self.start(record.spec);
        }
        loop {
            let now = goal.borrow_and_update().clone();
            status.mark_unchanged();
            self.step(&now);
            self.let_images_go(&now).await;
            if now.removed && self.instances.is_empty() && self.remove(&goal) {
                return;
            }
            let leave = self.cluster.leave.clone();
            tokio::select! {
                biased;
                () = leave.cancelled() => break,
                ended = self.tasks.join_next_with_id(), if !self.tasks.is_empty() => {
                    if let Some(ended) = ended {
                        self.ended(ended).await;
                    }
                }
                changed = goal.changed() => if changed.is_err() { break },
                changed = status.changed() => if changed.is_err() { break },
            }
        }
        while self.tasks.join_next().await.is_some() {}
    }

    /// Starts what is missing and stops what is too much. Instances of an older specification
    /// serve until those of the present one are ready.
    fn step(&mut self, goal: &Goal) {
        let replicas = if goal.removed { 0 } else { goal.run.replicas };
        if goal.tries != self.tries {
            self.tries = goal.tries;
            // What ends here is missing then, and started anew.
            for running in self.instances.values() {
                if !self.board.is_ready(self.deployment, &running.name) {
                    running.stop.cancel();
                }
            }
        }
        for slot in 0..replicas {
            let key = (goal.generation.clone(), slot);
            if !self.instances.contains_key(&key) {
                self.start(InstanceSpec {
                    app: self.app.clone(),
                    deployment: self.deployment,
                    service: goal.service.clone(),
                    slot,
                    generation: goal.generation.clone(),
                    image: goal.image.clone(),
                    run: goal.run.clone(),
                    secrets: goal.secrets.clone(),
                    revision: goal.revision.clone(),
                });
            }
        }
        let replaced = replicas == 0 || self.board.is_complete(self.deployment);
        for ((generation, slot), running) in &self.instances {
            let kept = if *generation == goal.generation {
                *slot < replicas
            } else {
                !replaced
            };
            if !kept {
                running.stop.cancel();
            }
        }
    }

    fn start(&mut self, spec: InstanceSpec) {
        let key = (spec.generation.clone(), spec.slot);
        let running = Running {
            name: spec.name(),
            image: spec.image.digest.clone(),
            stop: CancellationToken::new(),
        };
        self.images.insert(running.image.clone());
        self.cluster.images.hold(&running.image, self.deployment);
        let life = Instance::look_after(
            self.cluster.clone(),
            self.board.clone(),
            spec,
            running.stop.clone(),
        );
        let id = self.tasks.spawn(life).id();
        self.keys.insert(id, key.clone());
        self.instances.insert(key, running);
    }

    async fn ended(&mut self, ended: Result<(Id, ()), tokio::task::JoinError>) {
        let id = match ended {
            Ok((id, ())) => id,
            Err(error) => {
                // Its process is found again through its record.
                let deployment = self.deployment;
                tracing::error!(%deployment, %error, "looking after an instance failed");
                tokio::time::sleep(Duration::from_secs(1)).await;
                error.id()
            }
        };
        if let Some(key) = self.keys.remove(&id) {
            self.instances.remove(&key);
        }
    }

    async fn let_images_go(&mut self, goal: &Goal) {
        let used: BTreeSet<Digest> = self
            .instances
            .values()
            .map(|i| i.image.clone())
            .chain((!goal.removed).then(|| goal.image.digest.clone()))
            .collect();
        for digest in self.images.difference(&used) {
            self.cluster.images.release(digest, self.deployment).await;
        }
        self.images = used;
    }

    /// Removes what is left of the release, unless it was asked for again.
    fn remove(&self, goal: &watch::Receiver<Goal>) -> bool {
        self.cluster.forget(&self.app, self.deployment, || {
            if !goal.borrow().removed {
                return false;
            }
            let folder = self.cluster.releases.join(self.deployment.to_string());
            if let Err(error) = state_file::remove(&folder) {
                tracing::warn!(folder = %folder.display(), %error, "files of a release stay behind");
            }
            self.board.forget_release(self.deployment);
            true
        })
    }
}
