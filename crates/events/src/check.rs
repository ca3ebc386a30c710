//! Checking and reading payloads without a parser.
//!
//! Daybook writes the fields of a payload always in the same order and without white space, so that
//! it is read by comparing what stands between the values, and by asking the rules of the values
//! themselves. Who verifies a ledger wants to know of nearly every event only that its payload can
//! be read, and whether it was allowed: then nothing is made of it. Whatever is written otherwise
//! is left to the parser, and so is all that is wrong: what is accepted here, the parser accepts,
//! and reads as the same.

use std::collections::BTreeMap;

use jiff::Timestamp;
use serde::de::DeserializeOwned;
use serde::de::value::{BorrowedStrDeserializer, Error};
use uuid::Uuid;

use crate::any::AnyPayload;
use crate::build::{self, BuildEvent};
use crate::chart::{ChartReference, ChartValues, ChartVersion, PinnedChart};
use crate::config::InstanceConfig;
use crate::deployment::{self, DeploymentEvent};
use crate::envelope::timestamp;
use crate::gitops::{self, GitopsEvent};
use crate::names::{
    BuildId, ClusterName, CommitId, DeploymentId, Digest, EnvKey, EnvironmentName, EventId, GitRef,
    Hostname, ImageRepository, ImageTag, InstanceRef, ProjectName, RepositoryUrl, ServiceName,
    VolumeName,
};
use crate::outline::Step;
use crate::resources::{Amounts, Quantity, Resources};
use crate::routing::{self, RoutingEvent};
use crate::secret::SecretRef;
use crate::spec::{
    Autoscaling, BuildSpec, BuilderKind, HealthSpec, ImageReference, PinnedImage, RunSpec,
    VolumeSpec,
};
use crate::subject::AggregateKind;
use crate::timer::{KeepCause, KeepFor, StopCause};

/// Checks the payload of a type (without the common prefix), and says what it means for the
/// aggregate that its subject names. `None` says nothing about it: the parser is to be asked.
pub(crate) fn check(kind: &str, data: &str) -> Option<Step> {
    let mut text = Text(data);
    let step = match kind.split_once('.')?.0 {
        "deployment" => check_deployment(kind, &mut text)?,
        "build" => check_build(kind, &mut text)?,
        _ => return None,
    };
    text.0.is_empty().then_some(step)
}

/// Reads the payload of a type (without the common prefix) of an aggregate. `None` says nothing
/// about it: the parser is to be asked.
pub(crate) fn read(aggregate: AggregateKind, kind: &str, data: &str) -> Option<AnyPayload> {
    let mut text = Text(data);
    let payload = match aggregate {
        AggregateKind::Deployment => AnyPayload::Deployment(Ok(read_deployment(kind, &mut text)?)),
        AggregateKind::Build => AnyPayload::Build(Ok(read_build(kind, &mut text)?)),
        AggregateKind::Gitops => AnyPayload::Gitops(Ok(read_gitops(kind, &mut text)?)),
        AggregateKind::Routing => AnyPayload::Routing(Ok(read_routing(kind, &mut text)?)),
        _ => return None,
    };
    text.0.is_empty().then_some(payload)
}

macro_rules! deployments {
    ($( $kind:literal: $variant:ident($type:ident), )*) => {
        fn check_deployment(kind: &str, text: &mut Text<'_>) -> Option<Step> {
            Some(Step::Deployment(match kind {
                $( $kind => {
                    deployment::$type::check(text)?;
                    const { deployment::Step::of($kind) }
                } )*
                _ => return None,
            }))
        }

        fn read_deployment(kind: &str, text: &mut Text<'_>) -> Option<DeploymentEvent> {
            Some(match kind {
                $( $kind => DeploymentEvent::$variant(Canonical::read(text)?), )*
                _ => return None,
            })
        }
    };
}

deployments! {
    "deployment.requested.v1": Requested(Requested),
    "deployment.queued.v1": Queued(Queued),
    "deployment.cloning_started.v1": CloningStarted(CloningStarted),
    "deployment.source_resolved.v1": SourceResolved(SourceResolved),
    "deployment.building_started.v1": BuildingStarted(BuildingStarted),
    "deployment.pushing_started.v1": PushingStarted(PushingStarted),
    "deployment.image_pinned.v1": ImagePinned(ImagePinned),
    "deployment.chart_pinned.v1": ChartPinned(ChartPinned),
    "deployment.deploying_started.v1": DeployingStarted(DeployingStarted),
    "deployment.workload_observed.v1": WorkloadObserved(WorkloadObserved),
    "deployment.endpoint_observed.v1": EndpointObserved(EndpointObserved),
    "deployment.succeeded.v1": Succeeded(Succeeded),
    "deployment.partially_succeeded.v1": PartiallySucceeded(PartiallySucceeded),
    "deployment.cluster_failed.v1": ClusterFailed(ClusterFailed),
    "deployment.retry_requested.v1": RetryRequested(RetryRequested),
    "deployment.cluster_retried.v1": ClusterRetried(ClusterRetried),
    "deployment.overtaken.v1": Overtaken(Overtaken),
    "deployment.failed.v1": Failed(Failed),
    "deployment.stop_requested.v1": StopRequested(OperationRequested),
    "deployment.stopped.v1": Stopped(OperationDone),
    "deployment.start_requested.v1": StartRequested(OperationRequested),
    "deployment.started.v1": RestartDone(OperationDone),
    "deployment.terminate_requested.v1": TerminateRequested(OperationRequested),
    "deployment.terminated.v1": Terminated(OperationDone),
    "deployment.deleted.v1": Deleted(Deleted),
    "deployment.stop_scheduled.v1": StopScheduled(StopScheduled),
    "deployment.stop_unscheduled.v1": StopUnscheduled(StopUnscheduled),
    "deployment.change_committed.v1": ChangeCommitted(ChangeCommitted),
    "deployment.scale_requested.v1": ScaleRequested(ScaleRequested),
}

fn check_build(kind: &str, text: &mut Text<'_>) -> Option<Step> {
    // All but the first begin with their attempt.
    let attempt = || {
        let mut text = Text(text.0);
        text.literal(r#"{"attempt":"#)?;
        text.number()?.try_into().ok()
    };
    let attempt: Option<u32> = attempt();
    Some(Step::Build(match kind {
        "build.requested.v1" => {
            build::Requested::check(text)?;
            build::Step::Requested
        }
        "build.started.v1" => {
            build::Started::check(text)?;
            build::Step::Started(attempt?)
        }
        "build.builder_started.v1" => {
            build::BuilderStarted::check(text)?;
            build::Step::BuilderStarted(attempt?)
        }
        "build.push_started.v1" => {
            build::PushStarted::check(text)?;
            build::Step::PushStarted(attempt?)
        }
        "build.succeeded.v1" => {
            build::Succeeded::check(text)?;
            build::Step::Succeeded(attempt?)
        }
        "build.failed.v1" => {
            build::Failed::check(text)?;
            build::Step::Failed(attempt?)
        }
        _ => return None,
    }))
}

fn read_build(kind: &str, text: &mut Text<'_>) -> Option<BuildEvent> {
    Some(match kind {
        "build.requested.v1" => BuildEvent::Requested(Canonical::read(text)?),
        "build.started.v1" => BuildEvent::Started(Canonical::read(text)?),
        "build.builder_started.v1" => BuildEvent::BuilderStarted(Canonical::read(text)?),
        "build.push_started.v1" => BuildEvent::PushStarted(Canonical::read(text)?),
        "build.succeeded.v1" => BuildEvent::Succeeded(Canonical::read(text)?),
        "build.failed.v1" => BuildEvent::Failed(Canonical::read(text)?),
        _ => return None,
    })
}

fn read_gitops(kind: &str, text: &mut Text<'_>) -> Option<GitopsEvent> {
    match kind {
        "gitops.committed.v1" => Canonical::read(text).map(GitopsEvent::Committed),
        _ => None,
    }
}

fn read_routing(kind: &str, text: &mut Text<'_>) -> Option<RoutingEvent> {
    match kind {
        "routing.switched.v1" => Canonical::read(text).map(RoutingEvent::Switched),
        "routing.applied.v1" => Canonical::read(text).map(RoutingEvent::Applied),
        _ => None,
    }
}

/// What is still to be checked.
struct Text<'a>(&'a str);

impl<'a> Text<'a> {
    /// Always inline: what is compared with a text that the compiler knows needs no call.
    #[inline(always)]
    fn literal(&mut self, literal: &str) -> Option<()> {
        self.0 = self.0.strip_prefix(literal)?;
        Some(())
    }

    /// A string without escapes.
    fn string(&mut self) -> Option<&'a str> {
        let text = self.0.strip_prefix('"')?;
        let (text, after) = text.split_at_checked(plain(text.as_bytes()))?;
        self.0 = after.strip_prefix('"')?;
        Some(text)
    }

    /// A whole number that is not negative.
    fn number(&mut self) -> Option<u64> {
        let digits = self.0.bytes().take_while(u8::is_ascii_digit).count();
        let (number, after) = self.0.split_at_checked(digits)?;
        self.0 = after;
        let is_json = number.len() == 1 || !number.starts_with('0');
        is_json.then(|| number.parse().ok())?
    }

    fn uuid(&mut self) -> Option<Uuid> {
        let text = self.string()?;
        (text.len() == 36).then(|| Uuid::try_parse(text).ok())?
    }

    /// A value that is one word of several, or short and rare.
    fn word<T: DeserializeOwned>(&mut self) -> Option<T> {
        let word = BorrowedStrDeserializer::<Error>::new(self.string()?);
        T::deserialize(word).ok()
    }
}

/// How many bytes there are before the first quote, backslash or control character: how much of a
/// text in JSON stands for itself.
pub fn plain(bytes: &[u8]) -> usize {
    const ONES: u64 = u64::from_ne_bytes([0x01; 8]);
    const HIGH: u64 = u64::from_ne_bytes([0x80; 8]);
    // The lowest bit that is set marks a byte that is less. Higher ones may mark others, too.
    let less = |word: u64, than: u8| word.wrapping_sub(ONES * u64::from(than)) & !word & HIGH;
    let is = |word: u64, byte: u8| less(word ^ (ONES * u64::from(byte)), 1);
    let (words, rest) = bytes.as_chunks::<8>();
    for (number, word) in words.iter().enumerate() {
        let word = u64::from_le_bytes(*word);
        let ends = less(word, 0x20) | is(word, b'"') | is(word, b'\\');
        if ends != 0 {
            return 8 * number + ends.trailing_zeros() as usize / 8;
        }
    }
    let ends = |b: &u8| matches!(b, b'"' | b'\\' | 0..0x20);
    let of_rest = rest.iter().position(ends).unwrap_or(rest.len());
    8 * words.len() + of_rest
}

/// What is read as Daybook writes it, without a parser.
trait Canonical: Sized {
    /// Takes a value from the front of a text, if it is written as Daybook writes it and holds to
    /// its rules.
    fn check(text: &mut Text<'_>) -> Option<()>;
    /// The same, and makes it.
    fn read(text: &mut Text<'_>) -> Option<Self>;
}

macro_rules! names {
    ($( $name:ident, )*) => {$(
        impl Canonical for $name {
            fn check(text: &mut Text<'_>) -> Option<()> {
                Self::rule(text.string()?).ok()
            }
            fn read(text: &mut Text<'_>) -> Option<Self> {
                Self::parse(text.string()?).ok()
            }
        }
    )*};
}

names! {
    ChartReference, ChartVersion, ClusterName, CommitId, Digest, EnvKey, EnvironmentName, GitRef, Hostname, ImageRepository,
    ImageTag, ProjectName, RepositoryUrl, ServiceName, VolumeName,
}

/// Values that cost nothing to make.
macro_rules! made {
    ($( $type:ty = $read:expr; )*) => {$(
        impl Canonical for $type {
            fn check(text: &mut Text<'_>) -> Option<()> {
                Self::read(text).map(drop)
            }
            fn read(text: &mut Text<'_>) -> Option<Self> {
                let read: fn(&mut Text<'_>) -> Option<Self> = $read;
                read(text)
            }
        }
    )*};
}

made! {
    u16 = |text| text.number()?.try_into().ok();
    u32 = |text| text.number()?.try_into().ok();
    u64 = |text| text.number();
    bool = |text| match text.literal("true") {
        Some(()) => Some(true),
        None => text.literal("false").map(|()| false),
    };
    BuildId = |text| text.uuid().map(BuildId);
    DeploymentId = |text| text.uuid().map(DeploymentId);
    EventId = |text| text.uuid().map(EventId);
    Timestamp = |text| timestamp(text.string()?);
    BuilderKind = |text| text.word();
    ImageReference = |text| text.word();
    deployment::Status = |text| text.word();
    deployment::SwitchMode = |text| text.word();
    KeepCause = |text| text.word();
    KeepFor = |text| text.word();
    StopCause = |text| text.word();
    routing::Stickiness = |text| text.word();
    routing::SwitchReason = |text| text.word();
}

impl Canonical for String {
    fn check(text: &mut Text<'_>) -> Option<()> {
        text.literal("\"")?;
        loop {
            let (_, after) = text.0.split_at_checked(plain(text.0.as_bytes()))?;
            text.0 = after;
            if text.literal("\"").is_some() {
                return Some(());
            }
            // Those that are written as numbers are left to the parser.
            let escapes = [r"\n", r#"\""#, r"\\", r"\t", r"\r", r"\b", r"\f"];
            escapes.iter().find_map(|escape| text.literal(escape))?;
        }
    }

    fn read(text: &mut Text<'_>) -> Option<Self> {
        if let Some(plain) = text.string() {
            return Some(plain.to_owned());
        }
        let before = text.0;
        Self::check(text)?;
        let escaped = before.strip_suffix(text.0)?;
        serde_json::from_str(escaped).ok()
    }
}

impl<T: Canonical> Canonical for Box<T> {
    fn check(text: &mut Text<'_>) -> Option<()> {
        T::check(text)
    }
    fn read(text: &mut Text<'_>) -> Option<Self> {
        T::read(text).map(Self::new)
    }
}

impl<T: Canonical> Canonical for Option<T> {
    fn check(text: &mut Text<'_>) -> Option<()> {
        text.literal("null").or_else(|| T::check(text))
    }
    fn read(text: &mut Text<'_>) -> Option<Self> {
        match text.literal("null") {
            Some(()) => Some(None),
            None => T::read(text).map(Some),
        }
    }
}

/// Values between brackets.
fn list(
    text: &mut Text<'_>,
    [open, close]: [&str; 2],
    mut each: impl FnMut(&mut Text<'_>) -> Option<()>,
) -> Option<()> {
    text.literal(open)?;
    if text.literal(close).is_some() {
        return Some(());
    }
    loop {
        each(text)?;
        if text.literal(close).is_some() {
            return Some(());
        }
        text.literal(",")?;
    }
}

impl<T: Canonical> Canonical for Vec<T> {
    fn check(text: &mut Text<'_>) -> Option<()> {
        list(text, ["[", "]"], T::check)
    }
    fn read(text: &mut Text<'_>) -> Option<Self> {
        let mut all = Self::new();
        list(text, ["[", "]"], |text| {
            all.push(T::read(text)?);
            Some(())
        })?;
        Some(all)
    }
}

impl<K: Canonical + Ord, V: Canonical> Canonical for BTreeMap<K, V> {
    fn check(text: &mut Text<'_>) -> Option<()> {
        list(text, ["{", "}"], |text| {
            K::check(text)?;
            text.literal(":")?;
            V::check(text)
        })
    }
    fn read(text: &mut Text<'_>) -> Option<Self> {
        let mut all = Self::new();
        list(text, ["{", "}"], |text| {
            let key = K::read(text)?;
            text.literal(":")?;
            all.insert(key, V::read(text)?);
            Some(())
        })?;
        Some(all)
    }
}

impl Canonical for Quantity {
    fn check(text: &mut Text<'_>) -> Option<()> {
        text.string().map(drop)
    }
    fn read(text: &mut Text<'_>) -> Option<Self> {
        text.string().map(Self::new)
    }
}

/// Anything may stand in them, so that they do need a parser. What comes of them is what they are
/// written as, or somebody else has written them.
impl Canonical for ChartValues {
    fn check(text: &mut Text<'_>) -> Option<()> {
        Self::read(text).map(drop)
    }
    fn read(text: &mut Text<'_>) -> Option<Self> {
        let mut stream = serde_json::Deserializer::from_str(text.0).into_iter();
        let values: serde_json::Map<String, serde_json::Value> = stream.next()?.ok()?;
        let values = Self::new(&values);
        let (written, after) = text.0.split_at_checked(stream.byte_offset())?;
        text.0 = after;
        (written == values.as_str()).then_some(values)
    }
}

/// Fields between braces, in their order, of which each may be left out.
fn sparse<T: Canonical>(text: &mut Text<'_>, names: [&str; 2]) -> Option<[Option<T>; 2]> {
    text.literal("{")?;
    let mut found = [None, None];
    let mut separator = "";
    for (name, found) in names.into_iter().zip(&mut found) {
        let mut ahead = Text(text.0);
        let is_next = ahead.literal(separator).and_then(|()| ahead.literal(name));
        if is_next.is_some() {
            *found = Some(T::read(&mut ahead)?);
            *text = ahead;
            separator = ",";
        }
    }
    text.literal("}")?;
    Some(found)
}

impl Canonical for Amounts {
    fn check(text: &mut Text<'_>) -> Option<()> {
        Self::read(text).map(drop)
    }
    fn read(text: &mut Text<'_>) -> Option<Self> {
        let [cpu, memory] = sparse(text, ["\"cpu\":", "\"memory\":"])?;
        Some(Self { cpu, memory })
    }
}

impl Canonical for Resources {
    fn check(text: &mut Text<'_>) -> Option<()> {
        Self::read(text).map(drop)
    }
    fn read(text: &mut Text<'_>) -> Option<Self> {
        let [requests, limits] = sparse(text, ["\"requests\":", "\"limits\":"])?;
        Some(Self {
            requests: requests.unwrap_or_default(),
            limits: limits.unwrap_or_default(),
        })
    }
}

/// Checks or reads a field behind another one. One that is `sparse` is left out where it has its
/// type's default; where one that is `rare` is not left out, the parser is asked.
macro_rules! field {
    ($do:ident $text:ident, $field:ident: $type:ty) => {{
        $text.literal(concat!(",\"", stringify!($field), "\":"))?;
        <$type as Canonical>::$do($text)?
    }};
    (check $text:ident, $field:ident sparse: $type:ty) => {
        if $text
            .literal(concat!(",\"", stringify!($field), "\":"))
            .is_some()
        {
            <$type as Canonical>::check($text)?;
        }
    };
    (read $text:ident, $field:ident sparse: $type:ty) => {
        match $text.literal(concat!(",\"", stringify!($field), "\":")) {
            Some(()) => <$type as Canonical>::read($text)?,
            None => <$type>::default(),
        }
    };
    (check $text:ident, $field:ident rare: $type:ty) => {};
    (read $text:ident, $field:ident rare: $type:ty) => {
        <$type>::default()
    };
}

/// Checks or reads what is between the braces of a struct or of a variant.
macro_rules! fields {
    (check $text:ident, $($path:ident)::+ {
        $first:ident: $first_type:ty $(, $field:ident $($mark:ident)?: $type:ty)*
    }) => {{
        $text.literal(concat!("{\"", stringify!($first), "\":"))?;
        <$first_type>::check($text)?;
        $( field!(check $text, $field $($mark)?: $type); )*
        $text.literal("}")?;
    }};
    (read $text:ident, $($path:ident)::+ {
        $first:ident: $first_type:ty $(, $field:ident $($mark:ident)?: $type:ty)*
    }) => {{
        $text.literal(concat!("{\"", stringify!($first), "\":"))?;
        let $first = <$first_type>::read($text)?;
        $( let $field = field!(read $text, $field $($mark)?: $type); )*
        $text.literal("}")?;
        $($path)::+ { $first, $( $field ),* }
    }};
}

/// Structs, with all their fields in the order in which they are written.
macro_rules! structs {
    ($( $($path:ident)::+ { $($fields:tt)* } )*) => {$(
        impl Canonical for $($path)::+ {
            fn check(text: &mut Text<'_>) -> Option<()> {
                fields!(check text, $($path)::+ { $($fields)* });
                Some(())
            }
            fn read(text: &mut Text<'_>) -> Option<Self> {
                Some(fields!(read text, $($path)::+ { $($fields)* }))
            }
        }
    )*};
}

structs! {
    InstanceRef { project: ProjectName, environment: EnvironmentName, service: ServiceName }
    PinnedImage { repository: ImageRepository, tag: ImageTag, digest: Digest }
    PinnedChart { chart: ChartReference, version: ChartVersion, digest: Digest }
    BuildSpec {
        builder: BuilderKind, base_image: Option<ImageReference>, dockerfile: Option<String>,
        command: Vec<String>
    }
    HealthSpec { path: String, deadline_seconds: u32 }
    Autoscaling { max: u32, cpu_percent: u32 }
    VolumeSpec {
        path: String, env: Option<EnvKey>, size sparse: Option<Quantity>,
        storage_class sparse: Option<String>, many_nodes sparse: bool
    }
    RunSpec {
        port: u16, command: Vec<String>, env: BTreeMap<EnvKey, String>, replicas: u32,
        health: HealthSpec, volumes sparse: BTreeMap<VolumeName, VolumeSpec>,
        resources sparse: Resources, autoscaling sparse: Option<Autoscaling>,
        chart_values sparse: Option<ChartValues>
    }

    deployment::SourceCommit {
        commit: CommitId, message: String, author_name: String, author_email: String,
        committed_at: Timestamp, url: String
    }
    deployment::Instance { name: String, address: String, ready: bool, restarts: u32 }
    deployment::Problem {
        reason: String, message: String, remedy: String, transient: bool,
        likely_causes sparse: Vec<String>, remedies sparse: Vec<String>
    }
    deployment::Requested {
        instance: InstanceRef, version: deployment::Version, clusters: Vec<ClusterName>,
        build: BuildSpec, image_repository: Option<ImageRepository>, run: RunSpec,
        switch: deployment::SwitchMode, reason: Option<String>,
        redeploy_of: Option<DeploymentId>, secrets rare: BTreeMap<EnvKey, SecretRef>,
        promoted_from rare: Option<deployment::PromotedFrom>, allow_partial sparse: bool,
        config rare: InstanceConfig
    }
    deployment::CloningStarted { worker: String }
    deployment::SourceResolved {
        source: deployment::SourceCommit, build: BuildId, branch sparse: Option<GitRef>
    }
    deployment::BuildingStarted { build: BuildId }
    deployment::PushingStarted { build: BuildId }
    deployment::ImagePinned { image: PinnedImage, build: Option<BuildId>, shared: bool }
    deployment::ChartPinned { chart: PinnedChart }
    deployment::DeployingStarted { commit: CommitId }
    deployment::ChangeCommitted { commit: CommitId, replicas: Option<u32> }
    deployment::ScaleRequested { replicas: u32, reason: Option<String> }
    deployment::WorkloadObserved {
        cluster: ClusterName, revision: CommitId, wanted: u32, instances: Vec<deployment::Instance>,
        problem: Option<deployment::Problem>
    }
    deployment::EndpointObserved {
        hostname: Hostname, url: String, ready: bool, http_status: Option<u16>,
        message: Option<String>
    }
    deployment::Succeeded { revision: CommitId, table: u32 }
    deployment::ClusterFailed {
        cluster: ClusterName, code: String, message: String, remedy: String
    }
    deployment::PartiallySucceeded {
        revision: CommitId, table: u32, ready: Vec<ClusterName>,
        failed: Vec<deployment::ClusterFailed>
    }
    deployment::RetryRequested { clusters: Vec<ClusterName>, reason: Option<String> }
    deployment::ClusterRetried { cluster: ClusterName }
    deployment::Overtaken { by: DeploymentId, reason: String }
    deployment::Failed {
        during: deployment::Status, code: String, message: String, remedy: String
    }
    deployment::StopScheduled {
        due: Timestamp, cause: StopCause, keep: KeepFor, by: Option<DeploymentId>,
        table: Option<u32>, nonce: EventId
    }
    deployment::StopUnscheduled {
        nonce: EventId, cause: KeepCause, table: Option<u32>, reason: Option<String>
    }
    deployment::OperationRequested { reason: Option<String> }
    deployment::OperationDone { revision: CommitId }
    deployment::Deleted { reason: Option<String> }

    build::Requested {
        project: ProjectName, service: ServiceName, url: RepositoryUrl,
        commit: deployment::SourceCommit, path: String, spec: BuildSpec,
        repository: ImageRepository, tag: ImageTag
    }
    build::LogSeal { lines: u64, digest: Option<Digest> }
    build::Started { attempt: u32, worker: String }
    build::BuilderStarted { attempt: u32, commit: CommitId }
    build::PushStarted {
        attempt: u32, digest: Digest, builder: String, detected: String, size_bytes: u64
    }
    build::Succeeded { attempt: u32, image: PinnedImage, log: build::LogSeal }
    build::Failed {
        attempt: u32, code: String, message: String, remedy: String, log: build::LogSeal
    }

    gitops::LedgerAnchor { size: u64, root: String }
    gitops::Committed {
        commit: CommitId, parent: Option<CommitId>, ordinal sparse: Option<u64>,
        environment: EnvironmentName, change: gitops::Change, message: String, author: String,
        cause: EventId, files: BTreeMap<String, Option<Digest>>, files_digest: Digest,
        ledger sparse: Option<gitops::LedgerAnchor>, signer sparse: Option<String>,
        unchanged sparse: bool
    }

    routing::Backend { deployment: DeploymentId, weight: u32 }
    routing::RouteChange {
        hostname: Hostname, stickiness: routing::Stickiness, previous: Vec<routing::Backend>,
        next: Vec<routing::Backend>
    }
    routing::MainChange { previous: Option<DeploymentId>, next: Option<DeploymentId> }
    routing::Switched {
        table: u32, reason: routing::SwitchReason, instance: InstanceRef, deployment: DeploymentId,
        changes: Vec<routing::RouteChange>, main: Option<routing::MainChange>, rolled_back: bool,
        was_rolled_back: bool, undoes: Option<u32>, note: Option<String>,
        policy rare: Option<routing::PolicyChange>, domain rare: Option<routing::DomainChange>
    }
    routing::Applied {
        gateway: String, table: u32, hostnames: Vec<Hostname>,
        addresses rare: Option<Vec<routing::GatewayAddress>>,
        ingresses rare: Option<routing::Ingresses>
    }
}

impl Canonical for deployment::Queued {
    fn check(text: &mut Text<'_>) -> Option<()> {
        text.literal("{}")
    }
    fn read(text: &mut Text<'_>) -> Option<Self> {
        text.literal("{}").map(|()| Self {})
    }
}

/// Enums whose values are an object with one field, named by the variant. Other variants are left
/// to the parser.
macro_rules! variants {
    ($( $enum:ident::$type:ident { $( $name:literal: $variant:ident { $($fields:tt)* } )* } )*) => {$(
        impl Canonical for $enum::$type {
            fn check(text: &mut Text<'_>) -> Option<()> {
                $( if text.literal(concat!("{\"", $name, "\":")).is_some() {
                    fields!(check text, $enum::$type::$variant { $($fields)* });
                } else )* {
                    return None;
                }
                text.literal("}")
            }
            fn read(text: &mut Text<'_>) -> Option<Self> {
                let value = $( if text.literal(concat!("{\"", $name, "\":")).is_some() {
                    fields!(read text, $enum::$type::$variant { $($fields)* })
                } else )* {
                    return None;
                };
                text.literal("}").map(|()| value)
            }
        }
    )*};
}

variants! {
    deployment::Version {
        "git": Git { url: RepositoryUrl, git_ref: GitRef, path: String }
        "image": Image { reference: ImageReference }
        "helm": Helm { chart: ChartReference, version: ChartVersion }
    }
    gitops::Change {
        "deploy": Deploy {
            service: ServiceName, deployment: DeploymentId, from sparse: Option<EnvironmentName>
        }
        "scale": Scale { service: ServiceName, deployment: DeploymentId, replicas: u32 }
        "remove": Remove { service: ServiceName, deployment: DeploymentId }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::OnceLock;

    use proptest::prelude::*;

    use super::*;
    use crate::envelope::{Event, Payload as _};
    use crate::testing::fleet::{Fleet, Size, choices};

    /// Payloads with their types: the frozen events as Daybook writes them, and a history.
    fn payloads() -> &'static [(String, String)] {
        static ALL: OnceLock<Vec<(String, String)>> = OnceLock::new();
        ALL.get_or_init(|| {
            let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden");
            let files = std::fs::read_dir(folder).unwrap();
            let golden = files.map(|file| std::fs::read(file.unwrap().path()).unwrap());
            let mut fleet = Fleet::new(Size::default());
            let mut choose = choices(3);
            let history = (0..600).map(|_| fleet.next(&mut choose).bytes.to_vec());
            let read = |bytes: Vec<u8>| {
                let event = Event::from_bytes(&bytes).unwrap();
                // Without the white space of the frozen ones.
                let data = match parse(event.short_kind(), event.data.get()) {
                    AnyPayload::Deployment(Ok(e)) => e.encode().unwrap(),
                    AnyPayload::Build(Ok(e)) => e.encode().unwrap(),
                    AnyPayload::Gitops(Ok(e)) => e.encode().unwrap(),
                    AnyPayload::Routing(Ok(e)) => e.encode().unwrap(),
                    _ => return None,
                };
                Some((event.short_kind().to_owned(), data.get().to_owned()))
            };
            let all: Vec<_> = golden.chain(history).filter_map(read).collect();
            assert!(all.len() > 300);
            all
        })
    }

    /// What the parser says of a payload.
    fn parse(kind: &str, data: &str) -> AnyPayload {
        match kind.split('.').next().unwrap() {
            "deployment" => AnyPayload::Deployment(DeploymentEvent::decode_text(kind, data)),
            "build" => AnyPayload::Build(BuildEvent::decode_text(kind, data)),
            "gitops" => AnyPayload::Gitops(GitopsEvent::decode_text(kind, data)),
            "routing" => AnyPayload::Routing(RoutingEvent::decode_text(kind, data)),
            _ => AnyPayload::Other,
        }
    }

    #[test]
    fn what_a_problem_comes_of_is_left_out_where_it_is_not_known_but_in_rows() {
        let observed = crate::testing::samples::observed("east", 1, 1, false);
        let DeploymentEvent::WorkloadObserved(mut observed) = observed else {
            panic!("{observed:?}");
        };
        let plain = serde_json::to_string(&observed).unwrap();
        assert!(!plain.contains("likely_causes") && !plain.contains("remedies"));
        let problem = observed.problem.as_mut().unwrap();
        problem.likely_causes = vec!["it leaks".to_owned()];
        problem.remedies = vec!["more memory".to_owned(), "less".to_owned()];
        let whole = serde_json::to_string(&observed).unwrap();
        let kind = "deployment.workload_observed.v1";
        for text in [&plain, &whole] {
            assert!(check(kind, text).is_some(), "{text}");
            let payload = read(AggregateKind::Deployment, kind, text).unwrap();
            assert_eq!(shown(&payload), shown(&parse(kind, text)));
            let observed: deployment::WorkloadObserved = serde_json::from_str(text).unwrap();
            assert_eq!(serde_json::to_string(&observed).unwrap(), *text);
            let coding = bincode::config::standard();
            let row = bincode::serde::encode_to_vec(&observed, coding).unwrap();
            let (back, _): (deployment::WorkloadObserved, usize) =
                bincode::serde::decode_from_slice(&row, coding).unwrap();
            assert_eq!(back, observed);
        }
    }

    #[test]
    fn what_daybook_writes_needs_no_parser() {
        let mut left = std::collections::BTreeSet::new();
        for (kind, data) in payloads() {
            let of = kind.split('.').next().unwrap().parse().unwrap();
            match read(of, kind, data) {
                Some(payload) => assert_eq!(shown(&payload), shown(&parse(kind, data))),
                None => _ = left.insert(kind.as_str()),
            }
            let step = read(of, kind, data).and_then(|payload| Step::of(&payload));
            assert_eq!(check(kind, data).map(Ok), step, "{kind}: {data}");
        }
        // What is rare.
        let left: Vec<_> = left.into_iter().collect();
        assert_eq!(
            left,
            [
                "build.cancelled.v1",
                "deployment.approval_granted.v1",
                "deployment.approval_rejected.v1",
                "deployment.approval_requested.v1",
                "deployment.approvals_voided.v1",
                "deployment.approved.v1",
                "deployment.cancel_requested.v1",
                "deployment.cancelled.v1",
                "deployment.emergency_freeze_override.v1",
                "deployment.emergency_override.v1",
                "deployment.endpoint_planes_changed.v1",
                "deployment.held.v1",
                "deployment.image_pulled.v1",
                "deployment.openapi_found.v1",
                "deployment.post_review_completed.v1",
                "deployment.released.v1",
                "deployment.start_failed.v1",
                "deployment.stop_failed.v1",
                "deployment.terminate_failed.v1",
                "gitops.foreign_commit_adopted.v1",
                "gitops.foreign_commit_found.v1",
                "gitops.history_restored.v1",
                "gitops.history_rewritten.v1",
                "gitops.remote_failing.v1",
                "gitops.remote_recovered.v1",
                "gitops.repository_created.v1",
                "gitops.revert_failed.v1",
                "gitops.revert_requested.v1",
                "gitops.reverted.v1",
                "gitops.rewrite_accepted.v1",
                "gitops.signer_added.v1",
                "routing.applied.v1",
                "routing.rejected.v1",
            ]
        );
    }

    #[test]
    fn a_payload_is_checked_for_its_own_aggregate_only() {
        for (kind, data) in payloads() {
            for aggregate in AggregateKind::ALL {
                let checked = Step::check(aggregate, kind, data).is_some();
                let read = read(aggregate, kind, data).is_some();
                let is_its_own = kind.starts_with(&format!("{}.", aggregate.as_str()));
                assert!(is_its_own || !(checked || read));
            }
        }
    }

    /// Holds what is accepted without the parser against what the parser says of it.
    fn compare(kind: &str, data: &str) -> Result<(), TestCaseError> {
        let of = kind.split('.').next().unwrap().parse().unwrap();
        let payload = read(of, kind, data);
        if let Some(payload) = &payload {
            prop_assert_eq!(shown(payload), shown(&parse(kind, data)), "{}", data);
        }
        let step = payload.as_ref().and_then(Step::of);
        prop_assert_eq!(check(kind, data).map(Ok), step, "{}: {}", kind, data);
        Ok(())
    }

    /// All of a payload, to be compared.
    fn shown(payload: &AnyPayload) -> String {
        format!("{payload:?}")
    }

    proptest! {
        #[test]
        fn the_end_of_a_string_is_where_its_first_special_byte_is(bytes: Vec<u8>, special: [u8; 3]) {
            for byte in [0, 0x1f, b'"', b'\\', 0x20, 0x7f, 0x80, special[0]] {
                for at in 0..=bytes.len() {
                    let mut text = bytes.clone();
                    text.retain(|b| !matches!(b, b'"' | b'\\' | 0..0x20));
                    text.insert(at.min(text.len()), byte);
                    text.extend(special);
                    let first = text.iter().position(|b| matches!(b, b'"' | b'\\' | 0..0x20));
                    prop_assert_eq!(plain(&text), first.unwrap_or(text.len()));
                }
            }
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(4000))]

        #[test]
        fn what_is_accepted_without_the_parser_is_accepted_by_it(
            which in any::<prop::sample::Index>(), at in any::<prop::sample::Index>(),
            with in prop::collection::vec(0_u8..128, 0..3), cut in 0_usize..3,
        ) {
            let (kind, data) = &payloads()[which.index(payloads().len())];
            let mut bytes = data.clone().into_bytes();
            let at = at.index(bytes.len());
            let end = (at + cut).min(bytes.len());
            bytes.splice(at..end, with);
            if let Ok(data) = std::str::from_utf8(&bytes) {
                compare(kind, data)?;
            }
        }

        #[test]
        fn a_payload_of_another_type_is_judged_as_the_parser_judges_it(
            one in any::<prop::sample::Index>(), other in any::<prop::sample::Index>(),
        ) {
            let all = payloads();
            compare(&all[one.index(all.len())].0, &all[other.index(all.len())].1)?;
        }

        #[test]
        fn values_that_are_spliced_are_judged_as_the_parser_judges_them(
            one in any::<prop::sample::Index>(), other in any::<prop::sample::Index>(),
            from in any::<prop::sample::Index>(), to in any::<prop::sample::Index>(),
        ) {
            // A whole value from elsewhere, in the place of a value.
            let all = payloads();
            let (kind, data) = &all[one.index(all.len())];
            let values = |data: &str| -> Vec<(usize, usize)> {
                let starts: Vec<_> = data.match_indices(':').map(|(at, _)| at + 1).collect();
                let end = |at: usize| data[at..].find([',', '}']).map_or(data.len(), |n| at + n);
                starts.into_iter().map(|at| (at, end(at))).collect()
            };
            let source = &all[other.index(all.len())].1;
            let (places, sources) = (values(data), values(source));
            if !places.is_empty() && !sources.is_empty() {
                let (start, end) = places[to.index(places.len())];
                let (first, last) = sources[from.index(sources.len())];
                let spliced = [&data[..start], &source[first..last], &data[end..]].concat();
                compare(kind, &spliced)?;
            }
        }
    }
}
