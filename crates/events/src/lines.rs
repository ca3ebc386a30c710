//! Lines of output beside the log: what builds and containers print.
//!
//! Output is no event: it has a retention of its own and is not part of the ledger. Every line
//! has a sequence number, contiguous from 1 within its source, from which a reader resumes. The
//! event that ends a build carries the number of its lines and a digest over them.

use std::fmt;

use async_trait::async_trait;
use futures_util::stream::BoxStream;
use jiff::Timestamp;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::log::ReadError;
use crate::names::{BuildId, ClusterName, DeploymentId, SubscriptionId};

/// Whose output it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum LineSource {
    /// A build; its lines are shared by all deployments that share the build.
    Build(BuildId),
    /// A deployment: output of its containers, and what its workers say about it.
    Deployment(DeploymentId),
    /// A subscription: its [delivery log](crate::subscription::delivery).
    Subscription(SubscriptionId),
}

impl fmt::Display for LineSource {
    /// `build.<id>`, `deployment.<id>` or `subscription.<id>`: two subject tokens.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Build(id) => write!(f, "build.{id}"),
            Self::Deployment(id) => write!(f, "deployment.{id}"),
            Self::Subscription(id) => write!(f, "subscription.{id}"),
        }
    }
}

/// What kind of output a line is.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, JsonSchema,
)]
#[serde(rename_all = "snake_case")]
pub enum LineKind {
    /// Output of the build.
    Build,
    /// Standard output or error of a running container or process.
    Container,
    /// What a worker reports: "pushing layer 2 of 3", "waiting for readiness".
    Status,
    /// An event of the platform underneath, such as a Kubernetes Event.
    Platform,
}

/// One line of output, to be appended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct NewLine {
    /// When it was printed.
    pub time: Timestamp,
    /// What it is.
    pub kind: LineKind,
    /// Where the container runs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cluster: Option<ClusterName>,
    /// Which instance (pod, process) printed it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub instance: Option<String>,
    /// The text, without line break, at most 16 KiB; longer lines are cut and say so.
    pub text: String,
}

/// One stored line.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Line {
    /// Its number within its source: 1, 2, 3, …
    pub seq: u64,
    /// The line.
    #[serde(flatten)]
    pub line: NewLine,
}

/// Where output is kept.
#[async_trait]
pub trait LineLog: Send + Sync + fmt::Debug + 'static {
    /// Appends lines of one source in order and returns the number of the last. Several writers
    /// may write to one source at once; each batch stays together.
    async fn append(&self, source: LineSource, lines: Vec<NewLine>) -> Result<u64, ReadError>;

    /// At most `limit` lines after a number, without waiting.
    async fn read(
        &self,
        source: LineSource,
        after: u64,
        limit: usize,
    ) -> Result<Vec<Line>, ReadError>;

    /// All lines after a number, and those to come, without gap or repeat. Never ends by itself.
    async fn follow(
        &self,
        source: LineSource,
        after: u64,
    ) -> Result<BoxStream<'static, Result<Line, ReadError>>, ReadError>;

    /// The number of the last line; 0 if there is none.
    async fn last(&self, source: LineSource) -> Result<u64, ReadError>;
}
