//! What is kept on disk about an instance, so that another Daybook can take it over.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use daybook_events::secret::SecretRef;
use daybook_events::spec::{PinnedImage, RunSpec};
use daybook_events::{CommitId, DeploymentId, EnvKey, ServiceName};
use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use super::processes::ProcessId;
use super::state_file;
use crate::target::AppRef;
use crate::values::ReleaseValues;

/// What an instance is to run.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct InstanceSpec {
    pub(super) app: AppRef,
    pub(super) deployment: DeploymentId,
    pub(super) service: ServiceName,
    /// Its number among the instances of its release, from 0.
    pub(super) slot: u32,
    /// Names the specification that it runs.
    pub(super) generation: String,
    pub(super) image: PinnedImage,
    pub(super) run: RunSpec,
    /// The secrets in its environment, by variable. Their values are only in its processes.
    #[serde(default)]
    pub(super) secrets: BTreeMap<EnvKey, SecretRef>,
    /// The GitOps commit that asked for it first.
    pub(super) revision: CommitId,
}

impl InstanceSpec {
    /// Unique within the cluster, as a pod's name is.
    pub(super) fn name(&self) -> String {
        let (service, deployment) = (&self.service, self.deployment.short());
        let (generation, slot) = (&self.generation[..5], self.slot);
        format!("{service}-{deployment}-{generation}-{slot}")
    }

    /// The folder of its files.
    pub(super) fn dir(&self, releases: &Path) -> PathBuf {
        let name = format!("{}-{}", self.generation, self.slot);
        releases.join(self.deployment.to_string()).join(name)
    }
}

/// Names a specification: instances of the same one need not be replaced. How many there are is
/// no part of it.
pub(super) fn generation(values: &ReleaseValues) -> String {
    let digest = &values.image.digest;
    let same_count = RunSpec {
        replicas: 0,
        ..values.run.clone()
    };
    // As it was before there were secrets, so that what runs without them is not replaced.
    let text = if values.secret_env.is_empty() {
        serde_json::to_vec(&(digest, same_count))
    } else {
        serde_json::to_vec(&(digest, same_count, &values.secret_env))
    };
    let text = text.unwrap_or_default();
    daybook_events::Digest::of(&text).hex()[..10].to_owned()
}

/// An instance.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Record {
    pub(super) spec: InstanceSpec,
    /// How often a process was started for it; the number of its newest file of output.
    pub(super) run: u64,
    /// What its processes carry in their environment, since before they exist.
    pub(super) mark: String,
    pub(super) port: u16,
    /// The process, once it is known to have started.
    pub(super) process: Option<ProcessId>,
    pub(super) started_at: Timestamp,
    /// Since when it is wanted to run.
    pub(super) wanted_since: Timestamp,
    pub(super) restarts: u32,
    /// Whether it was ready once since it is wanted to run.
    pub(super) was_ready: bool,
}

impl Record {
    pub(super) fn new(spec: InstanceSpec) -> Self {
        let now = Timestamp::now();
        Self {
            spec,
            run: 0,
            mark: String::new(),
            port: 0,
            process: None,
            started_at: now,
            wanted_since: now,
            restarts: 0,
            was_ready: false,
        }
    }

    /// The record in an instance's folder, if there is one.
    pub(super) fn read(dir: &Path) -> std::io::Result<Option<Self>> {
        state_file::read(&dir.join("instance.json"))
    }

    pub(super) fn write(&self, dir: &Path) -> std::io::Result<()> {
        state_file::write(&dir.join("instance.json"), self)
    }
}
