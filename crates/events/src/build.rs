//! The build aggregate: one image made from one commit with one configuration, shared by all
//! deployments that want it.
//!
//! A worker that takes a build on starts a new *attempt*. Everything that it reports names its
//! attempt, so that a worker which was taken for dead and comes back changes nothing.

use jiff::Timestamp;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::aggregate::{Aggregate, At, Decision, Illegal, Refusal, events};
use crate::deployment::SourceCommit;
use crate::envelope::Payload;
use crate::names::{
    CommitId, Digest, ImageRepository, ImageTag, ProjectName, RepositoryUrl, ServiceName,
};
use crate::spec::{BuildSpec, PinnedImage};
use crate::subject::AggregateKind;

/// Where a build is.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, JsonSchema,
)]
#[serde(rename_all = "snake_case")]
#[allow(missing_docs)]
pub enum BuildStatus {
    Requested,
    Cloning,
    Building,
    Pushing,
    Succeeded,
    Failed,
    Cancelled,
}

impl BuildStatus {
    /// Whether it has ended.
    pub fn is_final(self) -> bool {
        self >= Self::Succeeded
    }

    /// The state as one word.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Requested => "requested",
            Self::Cloning => "cloning",
            Self::Building => "building",
            Self::Pushing => "pushing",
            Self::Succeeded => "succeeded",
            Self::Failed => "failed",
            Self::Cancelled => "cancelled",
        }
    }
}

/// Somebody needs this image.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Requested {
    /// The project that pays for it.
    pub project: ProjectName,
    /// The service.
    pub service: ServiceName,
    /// The source repository.
    pub url: RepositoryUrl,
    /// The commit.
    pub commit: SourceCommit,
    /// Folder of the service within the repository.
    pub path: String,
    /// How it is built.
    pub spec: BuildSpec,
    /// Where the image goes.
    pub repository: ImageRepository,
    /// Its tag.
    pub tag: ImageTag,
}

/// A worker took it on, and fetches the source.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Started {
    /// 1 for the first try; more if a worker before it was lost.
    pub attempt: u32,
    /// The worker.
    pub worker: String,
}

/// The source is there; the builder runs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct BuilderStarted {
    /// The attempt.
    pub attempt: u32,
    /// The commit that was checked out.
    pub commit: CommitId,
}

/// The image is made, and is being pushed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct PushStarted {
    /// The attempt.
    pub attempt: u32,
    /// Digest of the image's manifest.
    pub digest: Digest,
    /// The builder that made it: `archive`, `buildah`.
    pub builder: String,
    /// What the source was taken for: `python`, `procfile`, `dockerfile`.
    pub detected: String,
    /// Size of all its layers, compressed, in bytes.
    pub size_bytes: u64,
}

/// What a build printed, sealed: the lines themselves are kept beside the ledger.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
pub struct LogSeal {
    /// Number of lines.
    pub lines: u64,
    /// SHA-256 over the lines' texts, each followed by a line feed.
    pub digest: Option<Digest>,
}

/// The image is in its repository.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Succeeded {
    /// The attempt.
    pub attempt: u32,
    /// The image.
    pub image: PinnedImage,
    /// What it printed.
    pub log: LogSeal,
}

/// No image came of it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Failed {
    /// The attempt; 0 if none was started since the build was last asked for.
    pub attempt: u32,
    /// A stable code.
    pub code: String,
    /// What happened.
    pub message: String,
    /// What helps.
    pub remedy: String,
    /// What it printed.
    pub log: LogSeal,
}

/// Nobody wants it any more.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Cancelled {
    /// The attempt; 0 if none was started since the build was last asked for.
    pub attempt: u32,
    /// Why.
    pub message: String,
    /// What it printed.
    pub log: LogSeal,
}

events! {
    /// The events of a build.
    BuildEvent {
        /// It is needed.
        Requested(Box<Requested>) = "build.requested.v1",
        /// It is taken on.
        Started(Started) = "build.started.v1",
        /// The builder runs.
        BuilderStarted(BuilderStarted) = "build.builder_started.v1",
        /// The image is being pushed.
        PushStarted(PushStarted) = "build.push_started.v1",
        /// The image is there.
        Succeeded(Succeeded) = "build.succeeded.v1",
        /// There will be no image.
        Failed(Failed) = "build.failed.v1",
        /// It was given up.
        Cancelled(Cancelled) = "build.cancelled.v1",
    }
}

/// The state of a build.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Build {
    /// What is to be built.
    pub request: Requested,
    /// When it was asked for.
    #[serde(with = "crate::instant")]
    pub created_at: Timestamp,
    /// Where it is.
    pub status: BuildStatus,
    /// The attempt that counts; 0 before the first.
    pub attempt: u32,
    /// How many times it was asked for: a failed build is tried again by a new request.
    pub requests: u32,
    /// The worker of that attempt.
    pub worker: Option<String>,
    /// Digest of the image, once it is made.
    pub digest: Option<Digest>,
    /// What the source was taken for.
    pub detected: Option<String>,
    /// The image, once it is pushed.
    pub image: Option<PinnedImage>,
    /// Why it failed or was given up.
    pub failure: Option<Failed>,
    /// What it printed.
    pub log: LogSeal,
    /// When it ended.
    #[serde(with = "crate::instant::option")]
    pub ended_at: Option<Timestamp>,
}

impl Build {
    fn begin(request: Requested, created_at: Timestamp, requests: u32, attempt: u32) -> Self {
        Self {
            request,
            created_at,
            status: BuildStatus::Requested,
            attempt,
            requests,
            worker: None,
            digest: None,
            detected: None,
            image: None,
            failure: None,
            log: LogSeal::default(),
            ended_at: None,
        }
    }
}

impl Aggregate for Build {
    type Event = BuildEvent;
    const KIND: AggregateKind = AggregateKind::Build;

    fn first(event: BuildEvent, at: At) -> Result<Self, Illegal> {
        Step::from(&event).follow(None)?;
        match event {
            BuildEvent::Requested(r) => Ok(Self::begin(*r, at.time, 1, 0)),
            other => Err(Illegal::new(other.kind(), "a build that does not exist")),
        }
    }

    fn apply(&mut self, event: BuildEvent, at: At) -> Result<(), Illegal> {
        let Standing { status, attempt } = legal(self, &event)?;
        self.status = status;
        self.attempt = attempt;
        match event {
            BuildEvent::Requested(r) => {
                *self = Self::begin(*r, at.time, self.requests + 1, self.attempt);
            }
            BuildEvent::Started(e) => self.worker = Some(e.worker),
            BuildEvent::BuilderStarted(_) => {}
            BuildEvent::PushStarted(e) => {
                self.digest = Some(e.digest);
                self.detected = Some(e.detected);
            }
            BuildEvent::Succeeded(e) => {
                self.image = Some(e.image);
                self.log = e.log;
                self.ended_at = Some(at.time);
            }
            BuildEvent::Failed(e) => {
                self.log = e.log.clone();
                self.failure = Some(e);
                self.ended_at = Some(at.time);
            }
            BuildEvent::Cancelled(e) => {
                self.log = e.log.clone();
                self.failure = Some(Failed {
                    attempt: e.attempt,
                    code: "cancelled".to_owned(),
                    message: e.message,
                    remedy: "deploy it again if it is wanted after all".to_owned(),
                    log: e.log,
                });
                self.ended_at = Some(at.time);
            }
        }
        Ok(())
    }
}

/// An event of a build with its attempt, as far as the table knows it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum Step {
    Requested,
    Started(u32),
    BuilderStarted(u32),
    PushStarted(u32),
    Succeeded(u32),
    Failed(u32),
    Cancelled(u32),
}

impl From<&BuildEvent> for Step {
    fn from(event: &BuildEvent) -> Self {
        match event {
            BuildEvent::Requested(_) => Self::Requested,
            BuildEvent::Started(e) => Self::Started(e.attempt),
            BuildEvent::BuilderStarted(e) => Self::BuilderStarted(e.attempt),
            BuildEvent::PushStarted(e) => Self::PushStarted(e.attempt),
            BuildEvent::Succeeded(e) => Self::Succeeded(e.attempt),
            BuildEvent::Failed(e) => Self::Failed(e.attempt),
            BuildEvent::Cancelled(e) => Self::Cancelled(e.attempt),
        }
    }
}

/// What of a build decides which event may follow.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Standing {
    status: BuildStatus,
    attempt: u32,
}

impl Step {
    /// The event's type.
    pub fn kind(self) -> &'static str {
        match self {
            Self::Requested => "build.requested.v1",
            Self::Started(_) => "build.started.v1",
            Self::BuilderStarted(_) => "build.builder_started.v1",
            Self::PushStarted(_) => "build.push_started.v1",
            Self::Succeeded(_) => "build.succeeded.v1",
            Self::Failed(_) => "build.failed.v1",
            Self::Cancelled(_) => "build.cancelled.v1",
        }
    }

    /// Where it leads to, if it may follow: the build's transition table.
    pub fn follow(self, on: Option<Standing>) -> Result<Standing, Illegal> {
        let Some(Standing { status, attempt }) = on else {
            return match self {
                Self::Requested => Ok(Standing {
                    status: BuildStatus::Requested,
                    attempt: 0,
                }),
                _ => Err(Illegal::new(self.kind(), "a build that does not exist")),
            };
        };
        let over = status.is_final();
        // Before an attempt of this request has begun, only attempt 0 can end it: an attempt of
        // an earlier request that is still at it somewhere must not.
        let ending = if !over && status > BuildStatus::Requested {
            attempt
        } else {
            0
        };
        let (ok, to) = match self {
            // A build that failed or was given up may be asked for again; one that succeeded is
            // shared.
            Self::Requested => (
                matches!(status, BuildStatus::Failed | BuildStatus::Cancelled),
                BuildStatus::Requested,
            ),
            Self::Started(new) => (
                !over && Some(new) == attempt.checked_add(1),
                BuildStatus::Cloning,
            ),
            Self::BuilderStarted(of) => (
                status == BuildStatus::Cloning && of == attempt,
                BuildStatus::Building,
            ),
            Self::PushStarted(of) => (
                status == BuildStatus::Building && of == attempt,
                BuildStatus::Pushing,
            ),
            Self::Succeeded(of) => (
                status == BuildStatus::Pushing && of == attempt,
                BuildStatus::Succeeded,
            ),
            Self::Failed(of) => (!over && of == ending, BuildStatus::Failed),
            Self::Cancelled(of) => (!over && of == ending, BuildStatus::Cancelled),
        };
        if !ok {
            return Err(Illegal::new(self.kind(), status.as_str()));
        }
        let attempt = match self {
            Self::Started(new) => new,
            _ => attempt,
        };
        Ok(Standing {
            status: to,
            attempt,
        })
    }
}

/// Where an event leads to from a state, if it may follow on it.
fn legal(state: &Build, event: &BuildEvent) -> Result<Standing, Illegal> {
    let standing = Standing {
        status: state.status,
        attempt: state.attempt,
    };
    Step::from(event).follow(Some(standing))
}

/// Decides whether `event` may be appended to a build in this state.
pub fn decide(state: Option<&Build>, event: BuildEvent) -> Result<Decision<BuildEvent>, Refusal> {
    match (state, &event) {
        (None, BuildEvent::Requested(_)) => Ok(Decision::Append(event)),
        (None, _) => Err(Refusal::new(
            "build_not_found",
            "there is no such build",
            "builds are made by deployments; deploy something",
        )),
        (Some(b), BuildEvent::Requested(_)) if legal(b, &event).is_err() => Ok(Decision::Nothing),
        (Some(b), _) => match legal(b, &event) {
            Ok(_) => Ok(Decision::Append(event)),
            Err(illegal) => Err(Refusal::new(
                "stale_attempt",
                format!("{illegal}: another worker took the build on, or it has ended"),
                "nothing needs to be done: this attempt no longer counts",
            )),
        },
    }
}
