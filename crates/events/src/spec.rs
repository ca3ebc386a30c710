//! What a service is, how it is built and how it runs: data that requests carry in and that a
//! deployment keeps as its immutable snapshot.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::str::FromStr;

use schemars::JsonSchema;
use serde::ser::SerializeStruct as _;
use serde::{Deserialize, Serialize, Serializer};

use crate::aggregate::Refusal;
use crate::chart::ChartValues;
use crate::names::{
    Digest, EnvKey, GitRef, ImageRepository, ImageTag, InvalidName, RepositoryUrl, VolumeName,
};
use crate::resources::{Quantity, Resources};

/// Where the source of a service is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct SourceSpec {
    /// The repository. It is only ever read.
    pub url: RepositoryUrl,
    /// What is deployed when a request names no ref.
    #[serde(default = "default_ref")]
    pub default_ref: GitRef,
    /// Folder of the service within the repository, relative, without `..`; empty for its root.
    #[serde(default)]
    pub path: String,
}

fn default_ref() -> GitRef {
    GitRef::parse("HEAD").expect("HEAD is a valid ref")
}

/// Which builder makes the image.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum BuilderKind {
    /// `dockerfile` if the source has a Dockerfile and a tool to build it is there, else `archive`.
    #[default]
    Auto,
    /// The source as layers on a base image, or on none, written without any daemon.
    Archive,
    /// A Dockerfile, built with buildah, podman or docker.
    Dockerfile,
}

/// How an image is made from source. Part of the identity of a build.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct BuildSpec {
    /// The builder.
    #[serde(default)]
    pub builder: BuilderKind,
    /// The image that the archive builder puts its layers on; none for a bare one, which only
    /// the local target can run.
    #[serde(default)]
    pub base_image: Option<ImageReference>,
    /// Path of the Dockerfile within the service's folder; `Dockerfile` if not given.
    #[serde(default)]
    pub dockerfile: Option<String>,
    /// A command that the archive builder runs in a copy of the source before packing it, such
    /// as `["npm", "ci"]`. It runs on the worker's machine.
    #[serde(default)]
    pub command: Vec<String>,
}

/// How readiness is asked.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct HealthSpec {
    /// HTTP path that answers 2xx or 3xx when the instance is ready; a TCP connection is enough
    /// if it is empty.
    #[serde(default = "default_health_path")]
    pub path: String,
    /// How long an instance may take to become ready, in seconds. After that the rollout failed.
    #[serde(default = "default_deadline")]
    pub deadline_seconds: u32,
}

fn default_health_path() -> String {
    "/".to_owned()
}
fn default_deadline() -> u32 {
    60
}

impl Default for HealthSpec {
    fn default() -> Self {
        Self {
            path: default_health_path(),
            deadline_seconds: default_deadline(),
        }
    }
}

/// A folder that is kept from one deployment of a service instance to the next.
#[derive(Debug, Clone, PartialEq, Eq, Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct VolumeSpec {
    /// Where a container finds it: an absolute path.
    pub path: String,
    /// The variable that says where it is, also where nothing can be mounted; `VOLUME_` and the
    /// volume's name if not given.
    #[serde(default)]
    pub env: Option<EnvKey>,
    /// How large a cluster makes it, in bytes; `1Gi` if not given. It may grow, and never shrinks.
    /// Local clusters do not see to it.
    #[serde(default)]
    pub size: Option<Quantity>,
    /// The StorageClass that it is made of; the cluster's own choice if not given. It counts when the
    /// volume is made.
    #[serde(default)]
    pub storage_class: Option<String>,
    /// Whether instances on several nodes use it at once, for which it has to be made of storage
    /// that can do so (`ReadWriteMany`). If not, all instances that use it run on one node. It counts
    /// when the volume is made.
    #[serde(default)]
    pub many_nodes: bool,
}

/// As derived, but that JSON leaves out what is not given of the newer fields.
impl Serialize for VolumeSpec {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let all = !serializer.is_human_readable();
        let size = all || self.size.is_some();
        let storage_class = all || self.storage_class.is_some();
        let many_nodes = all || self.many_nodes;
        let newer = [size, storage_class, many_nodes];
        let newer = newer.into_iter().filter(|written| *written).count();
        let mut out = serializer.serialize_struct("VolumeSpec", 2 + newer)?;
        out.serialize_field("path", &self.path)?;
        out.serialize_field("env", &self.env)?;
        if size {
            out.serialize_field("size", &self.size)?;
        }
        if storage_class {
            out.serialize_field("storage_class", &self.storage_class)?;
        }
        if many_nodes {
            out.serialize_field("many_nodes", &self.many_nodes)?;
        }
        out.end()
    }
}

impl VolumeSpec {
    /// How large a cluster makes it.
    pub fn size(&self) -> Quantity {
        self.size.clone().unwrap_or_else(|| Quantity::new("1Gi"))
    }

    /// The variable that says where the volume of this name is.
    pub fn variable(&self, name: &VolumeName) -> String {
        match &self.env {
            Some(key) => key.to_string(),
            None => format!(
                "VOLUME_{}",
                name.as_str().to_ascii_uppercase().replace('-', "_")
            ),
        }
    }
}

/// How instances come and go by themselves. There are never fewer than `replicas`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Autoscaling {
    /// How many there are at most in each cluster: up to 100.
    pub max: u32,
    /// The use of cpu that is aimed for, in percent of what instances request: 1 to 1000.
    #[serde(default = "default_cpu_percent")]
    pub cpu_percent: u32,
}

fn default_cpu_percent() -> u32 {
    80
}

/// How a service runs.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct RunSpec {
    /// The port that the container listens on. On the local target, where all instances share
    /// one network, each gets a port of its own in `PORT` instead.
    #[serde(default = "default_port")]
    pub port: u16,
    /// The command, if not the image's own.
    #[serde(default)]
    pub command: Vec<String>,
    /// Environment variables.
    #[serde(default)]
    pub env: BTreeMap<EnvKey, String>,
    /// How many instances run in each cluster; with `autoscaling` at least.
    #[serde(default = "default_replicas")]
    pub replicas: u32,
    /// How readiness is asked.
    #[serde(default)]
    pub health: HealthSpec,
    /// What is kept from one deployment to the next.
    #[serde(default)]
    pub volumes: BTreeMap<VolumeName, VolumeSpec>,
    /// What each instance is given of cpu and memory. Local clusters, whose instances are
    /// processes of one machine, do not see to it.
    #[serde(default)]
    pub resources: Resources,
    /// How instances come and go by themselves. Local clusters always run `replicas`.
    #[serde(default)]
    pub autoscaling: Option<Autoscaling>,
    /// What a Helm chart is rendered with, where one is deployed: `$(DAYBOOK_RELEASE)` in its texts
    /// stands for the name of the release, which its Secret has, too. Of the rest only
    /// `health.deadline_seconds`, and `port` where a chart has no Service, say anything about a chart.
    #[serde(default)]
    pub chart_values: Option<ChartValues>,
}

/// As derived, but that JSON leaves out what is not given of the newer fields, as it was before
/// there were any. Rows of projections, which are not self-describing, always have them.
impl Serialize for RunSpec {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let all = !serializer.is_human_readable();
        let volumes = all || !self.volumes.is_empty();
        let resources = all || !self.resources.is_empty();
        let autoscaling = all || self.autoscaling.is_some();
        let chart_values = all || self.chart_values.is_some();
        let newer = [volumes, resources, autoscaling, chart_values];
        let newer = newer.into_iter().filter(|written| *written).count();
        let mut out = serializer.serialize_struct("RunSpec", 5 + newer)?;
        out.serialize_field("port", &self.port)?;
        out.serialize_field("command", &self.command)?;
        out.serialize_field("env", &self.env)?;
        out.serialize_field("replicas", &self.replicas)?;
        out.serialize_field("health", &self.health)?;
        if volumes {
            out.serialize_field("volumes", &self.volumes)?;
        }
        if resources {
            out.serialize_field("resources", &self.resources)?;
        }
        if autoscaling {
            out.serialize_field("autoscaling", &self.autoscaling)?;
        }
        if chart_values {
            out.serialize_field("chart_values", &self.chart_values)?;
        }
        out.end()
    }
}

fn default_port() -> u16 {
    8080
}
fn default_replicas() -> u32 {
    1
}

impl Default for RunSpec {
    fn default() -> Self {
        Self {
            port: default_port(),
            command: Vec::new(),
            env: BTreeMap::new(),
            replicas: default_replicas(),
            health: HealthSpec::default(),
            volumes: BTreeMap::new(),
            resources: Resources::default(),
            autoscaling: None,
            chart_values: None,
        }
    }
}

impl RunSpec {
    /// Refuses amounts and numbers that no cluster could give, and values of charts that are too
    /// large.
    pub fn check_capacity(&self) -> Result<(), Refusal> {
        self.resources.check()?;
        if let Some(values) = &self.chart_values {
            values.check()?;
        }
        let Some(autoscaling) = &self.autoscaling else {
            return Ok(());
        };
        let (least, most) = (self.replicas, autoscaling.max);
        if most > REPLICAS_MAX || most < least {
            return Err(Refusal::new(
                "invalid_autoscaling",
                format!("there cannot be {least} instances at least and {most} at most"),
                format!(
                    "give as many as `replicas` at least and {REPLICAS_MAX} at most, or leave \
                     `autoscaling` out"
                ),
            ));
        }
        if !(1..=1000).contains(&autoscaling.cpu_percent) {
            return Err(Refusal::new(
                "invalid_autoscaling",
                format!("{} % is no use of cpu to aim for", autoscaling.cpu_percent),
                "give 1 to 1000 percent of what an instance requests",
            ));
        }
        // What has a limit only requests that.
        let Resources { requests, limits } = &self.resources;
        if requests.cpu.is_none() && limits.cpu.is_none() {
            return Err(Refusal::new(
                "autoscaling_without_cpu",
                "instances are to be added by their use of cpu, and request none of it",
                "say what an instance requests: `resources.requests.cpu`, or `--cpu`",
            ));
        }
        Ok(())
    }

    /// Refuses volumes that no cluster could mount, and variables of theirs that mean something else.
    pub fn check_volumes(&self) -> Result<(), Refusal> {
        let wrong = |path: &str| {
            !path.starts_with('/')
                || path.len() > 200
                || path.chars().any(|c| c.is_control() || c == ':')
                || path.trim_matches('/').is_empty()
                || path.split('/').any(|part| part == "..")
        };
        let mut paths = BTreeSet::new();
        let mut variables = BTreeSet::new();
        for (name, volume) in &self.volumes {
            if wrong(&volume.path) {
                return Err(Refusal::new(
                    "invalid_volume_path",
                    format!("{:?} is no place for a volume", volume.path),
                    "use an absolute path without `..` and colons, such as /data",
                ));
            }
            if !paths.insert(volume.path.trim_end_matches('/')) {
                return Err(Refusal::new(
                    "invalid_volume_path",
                    format!("another volume than {name} is at {:?}", volume.path),
                    "give each volume a place of its own",
                ));
            }
            if let Some(size) = volume.size.as_ref().filter(|size| size.bytes().is_none()) {
                return Err(Refusal::new(
                    "invalid_quantity",
                    format!("{:?} is no size for the volume {name}", size.shown()),
                    "give whole bytes with a unit, from 1M to 64Ti, such as 512Mi or 2Gi",
                ));
            }
            if let Some(class) = volume.storage_class.as_ref().filter(|c| !is_subdomain(c)) {
                let shown: String = class.chars().take(80).collect();
                return Err(Refusal::new(
                    "invalid_storage_class",
                    format!("{shown:?} is not the name of a StorageClass"),
                    "use one that `kubectl get storageclasses` lists, or leave it out",
                ));
            }
            let variable = volume.variable(name);
            let own =
                ["HOST", "PORT"].contains(&variable.as_str()) || variable.starts_with("DAYBOOK_");
            let set = self.env.keys().any(|key| key.as_str() == variable);
            if own || set || !variables.insert(variable.clone()) {
                return Err(Refusal::new(
                    "volume_variable_taken",
                    format!("{variable} has another meaning than where the volume {name} is"),
                    "name another variable in the volume's `env`",
                ));
            }
        }
        Ok(())
    }

    /// The volume that a variable says the place of, if it does.
    pub fn volume_of(&self, variable: &str) -> Option<&VolumeName> {
        let mut volumes = self.volumes.iter();
        let found = volumes.find(|(name, volume)| volume.variable(name) == variable);
        found.map(|(name, _)| name)
    }
}

/// Whether a text is the name of an object of a cluster: lower-case letters, digits, `-` and `.`.
fn is_subdomain(name: &str) -> bool {
    let label = |label: &str| {
        let inner = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit();
        let ends = [label.bytes().next(), label.bytes().last()];
        ends.into_iter().all(|b| b.is_some_and(inner))
            && label.bytes().all(|b| inner(b) || b == b'-')
    };
    name.len() <= 253 && name.split('.').all(label)
}

/// The most instances in a cluster.
const REPLICAS_MAX: u32 = 100;

/// A service of a project.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ServiceSpec {
    /// Where its source is; none for a service that is only deployed from images.
    #[serde(default)]
    pub source: Option<SourceSpec>,
    /// Where its images are pushed to and pulled from; if not given, the server's default
    /// registry followed by `<project>/<service>`.
    #[serde(default)]
    pub image_repository: Option<ImageRepository>,
    /// How it is built.
    #[serde(default)]
    pub build: BuildSpec,
    /// How it runs.
    #[serde(default)]
    pub run: RunSpec,
}

/// A complete image reference: `repository[:tag][@digest]`, with at least one of the two.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct ImageReference {
    /// The repository.
    pub repository: ImageRepository,
    /// The tag, for people.
    pub tag: Option<ImageTag>,
    /// The digest, which alone says what the image is.
    pub digest: Option<Digest>,
}

impl fmt::Display for ImageReference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.repository)?;
        if let Some(tag) = &self.tag {
            write!(f, ":{tag}")?;
        }
        if let Some(digest) = &self.digest {
            write!(f, "@{digest}")?;
        }
        Ok(())
    }
}

impl FromStr for ImageReference {
    type Err = InvalidName;
    fn from_str(s: &str) -> Result<Self, InvalidName> {
        let (rest, digest) = match s.split_once('@') {
            Some((rest, d)) => (rest, Some(Digest::parse(d)?)),
            None => (s, None),
        };
        // A colon after the last slash is a tag; one before it is a port.
        let (repository, tag) = match rest.rfind(':') {
            Some(i) if !rest[i..].contains('/') => {
                (&rest[..i], Some(ImageTag::parse(&rest[i + 1..])?))
            }
            _ => (rest, None),
        };
        let repository = ImageRepository::parse(repository)?;
        if tag.is_none() && digest.is_none() {
            return Err(InvalidName {
                what: "image reference",
                code: "invalid_image_reference",
                value: crate::names::without_credentials(s)
                    .chars()
                    .take(80)
                    .collect(),
                rule: "it needs a tag or a digest",
            });
        }
        Ok(Self {
            repository,
            tag,
            digest,
        })
    }
}

impl TryFrom<String> for ImageReference {
    type Error = InvalidName;
    fn try_from(s: String) -> Result<Self, InvalidName> {
        s.parse()
    }
}
impl From<ImageReference> for String {
    fn from(r: ImageReference) -> String {
        r.to_string()
    }
}
impl JsonSchema for ImageReference {
    fn schema_name() -> std::borrow::Cow<'static, str> {
        "ImageReference".into()
    }
    fn json_schema(_: &mut schemars::SchemaGenerator) -> schemars::Schema {
        schemars::json_schema!({ "type": "string", "description": "repository[:tag][@digest]" })
    }
}

/// An image that is pinned: what a deployment runs, by digest from here on.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
pub struct PinnedImage {
    /// The repository.
    pub repository: ImageRepository,
    /// The tag that it was pushed or found under.
    pub tag: ImageTag,
    /// The manifest's digest.
    pub digest: Digest,
}

impl fmt::Display for PinnedImage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}@{}", self.repository, self.tag, self.digest)
    }
}
