//! Checking payloads without making them.
//!
//! Who verifies a ledger wants to know of nearly every event only that its payload can be read, and
//! whether it was allowed. Daybook writes the fields of a payload always in the same order and
//! without white space, so that this is found out by comparing what stands between the values, and
//! by asking the rules of the values themselves; nothing is copied. Whatever is written otherwise
//! is left to the parser, and so is all that is wrong: what is accepted here, the parser accepts.

use std::collections::BTreeMap;

use jiff::Timestamp;
use serde::Deserialize;
use serde::de::value::{BorrowedStrDeserializer, Error};
use uuid::Uuid;

use crate::chart::{ChartReference, ChartVersion};
use crate::names::{
    BuildId, ClusterName, CommitId, DeploymentId, Digest, EnvKey, EnvironmentName, EventId, GitRef,
    Hostname, ImageRepository, ImageTag, InstanceRef, ProjectName, RepositoryUrl, ServiceName,
};
use crate::outline::Step;
use crate::spec::{BuildSpec, BuilderKind, HealthSpec, ImageReference, PinnedImage, RunSpec};
use crate::timer::{KeepCause, KeepFor, StopCause};
use crate::{build, deployment};

/// Checks the payload of a type (without the common prefix), and says what it means for the
/// aggregate that its subject names. `None` says nothing about it: the parser is to be asked.
pub(crate) fn check(kind: &str, data: &str) -> Option<Step> {
    let mut text = Text(data);
    let step = match kind.split_once('.')?.0 {
        "deployment" => deployment(kind, &mut text)?,
        "build" => build(kind, &mut text)?,
        _ => return None,
    };
    text.0.is_empty().then_some(step)
}

macro_rules! deployments {
    ($( $kind:literal: $type:ident, )*) => {
        fn deployment(kind: &str, text: &mut Text<'_>) -> Option<Step> {
            Some(Step::Deployment(match kind {
                $( $kind => {
                    deployment::$type::check(text)?;
                    const { deployment::Step::of($kind) }
                } )*
                _ => return None,
            }))
        }
    };
}

deployments! {
    "deployment.requested.v1": Requested,
    "deployment.queued.v1": Queued,
    "deployment.cloning_started.v1": CloningStarted,
    "deployment.source_resolved.v1": SourceResolved,
    "deployment.building_started.v1": BuildingStarted,
    "deployment.pushing_started.v1": PushingStarted,
    "deployment.image_pinned.v1": ImagePinned,
    "deployment.deploying_started.v1": DeployingStarted,
    "deployment.workload_observed.v1": WorkloadObserved,
    "deployment.endpoint_observed.v1": EndpointObserved,
    "deployment.succeeded.v1": Succeeded,
    "deployment.partially_succeeded.v1": PartiallySucceeded,
    "deployment.cluster_failed.v1": ClusterFailed,
    "deployment.retry_requested.v1": RetryRequested,
    "deployment.cluster_retried.v1": ClusterRetried,
    "deployment.overtaken.v1": Overtaken,
    "deployment.failed.v1": Failed,
    "deployment.stop_requested.v1": OperationRequested,
    "deployment.stopped.v1": OperationDone,
    "deployment.start_requested.v1": OperationRequested,
    "deployment.started.v1": OperationDone,
    "deployment.terminate_requested.v1": OperationRequested,
    "deployment.terminated.v1": OperationDone,
    "deployment.deleted.v1": Deleted,
    "deployment.stop_scheduled.v1": StopScheduled,
    "deployment.stop_unscheduled.v1": StopUnscheduled,
    "deployment.change_committed.v1": ChangeCommitted,
    "deployment.scale_requested.v1": ScaleRequested,
}

fn build(kind: &str, text: &mut Text<'_>) -> Option<Step> {
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

/// What is still to be checked.
struct Text<'a>(&'a str);

impl<'a> Text<'a> {
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

/// What can be checked without being made.
trait Check {
    /// Takes a value from the front of a text, if it is written as Daybook writes it and holds to
    /// its rules.
    fn check(text: &mut Text<'_>) -> Option<()>;
}

macro_rules! names {
    ($( $name:ident, )*) => {$(
        impl Check for $name {
            fn check(text: &mut Text<'_>) -> Option<()> {
                Self::rule(text.string()?).ok()
            }
        }
    )*};
}

names! {
    ChartReference, ChartVersion, ClusterName, CommitId, Digest, EnvKey, EnvironmentName, GitRef, Hostname, ImageRepository,
    ImageTag, ProjectName, RepositoryUrl, ServiceName,
}

macro_rules! numbers {
    ($( $type:ident, )*) => {$(
        impl Check for $type {
            fn check(text: &mut Text<'_>) -> Option<()> {
                $type::try_from(text.number()?).ok().map(drop)
            }
        }
    )*};
}

numbers! { u16, u32, u64, }

macro_rules! ids {
    ($( $id:ident, )*) => {$(
        impl Check for $id {
            fn check(text: &mut Text<'_>) -> Option<()> {
                let text = text.string()?;
                (text.len() == 36 && Uuid::try_parse(text).is_ok()).then_some(())
            }
        }
    )*};
}

ids! { BuildId, DeploymentId, EventId, }

/// Values that are one word of several, or short and rare.
macro_rules! words {
    ($( $type:ty, )*) => {$(
        impl Check for $type {
            fn check(text: &mut Text<'_>) -> Option<()> {
                let word = BorrowedStrDeserializer::<Error>::new(text.string()?);
                Self::deserialize(word).ok().map(drop)
            }
        }
    )*};
}

words! {
    BuilderKind, ImageReference, Timestamp, deployment::Status, deployment::SwitchMode, KeepCause,
    KeepFor, StopCause,
}

impl Check for String {
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
}

impl Check for bool {
    fn check(text: &mut Text<'_>) -> Option<()> {
        text.literal("true").or_else(|| text.literal("false"))
    }
}

impl<T: Check> Check for Option<T> {
    fn check(text: &mut Text<'_>) -> Option<()> {
        text.literal("null").or_else(|| T::check(text))
    }
}

/// Values between brackets.
fn list(
    text: &mut Text<'_>,
    [open, close]: [&str; 2],
    each: impl Fn(&mut Text<'_>) -> Option<()>,
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

impl<T: Check> Check for Vec<T> {
    fn check(text: &mut Text<'_>) -> Option<()> {
        list(text, ["[", "]"], T::check)
    }
}

impl<K: Check, V: Check> Check for BTreeMap<K, V> {
    fn check(text: &mut Text<'_>) -> Option<()> {
        list(text, ["{", "}"], |text| {
            K::check(text)?;
            text.literal(":")?;
            V::check(text)
        })
    }
}

/// Without volumes: those are rare, and left to the parser.
impl Check for RunSpec {
    fn check(text: &mut Text<'_>) -> Option<()> {
        text.literal("{\"port\":")?;
        u16::check(text)?;
        text.literal(",\"command\":")?;
        <Vec<String>>::check(text)?;
        text.literal(",\"env\":")?;
        <BTreeMap<EnvKey, String>>::check(text)?;
        text.literal(",\"replicas\":")?;
        u32::check(text)?;
        text.literal(",\"health\":")?;
        HealthSpec::check(text)?;
        text.literal("}")
    }
}

/// Structs, with all their fields in the order in which they are written.
macro_rules! structs {
    ($( $($path:ident)::+ { $first:ident: $first_type:ty $(, $field:ident: $type:ty)* } )*) => {$(
        impl Check for $($path)::+ {
            fn check(text: &mut Text<'_>) -> Option<()> {
                // It has these fields and no others, or this does not compile.
                let _ = |$($path)::+ { $first, $( $field ),* }: Self| -> ($first_type, $( $type ),*) {
                    ($first, $( $field ),*)
                };
                text.literal(concat!("{\"", stringify!($first), "\":"))?;
                <$first_type>::check(text)?;
                $(
                    text.literal(concat!(",\"", stringify!($field), "\":"))?;
                    <$type>::check(text)?;
                )*
                text.literal("}")
            }
        }
    )*};
}

structs! {
    InstanceRef { project: ProjectName, environment: EnvironmentName, service: ServiceName }
    PinnedImage { repository: ImageRepository, tag: ImageTag, digest: Digest }
    BuildSpec {
        builder: BuilderKind, base_image: Option<ImageReference>, dockerfile: Option<String>,
        command: Vec<String>
    }
    HealthSpec { path: String, deadline_seconds: u32 }

    deployment::SourceCommit {
        commit: CommitId, message: String, author_name: String, author_email: String,
        committed_at: Timestamp, url: String
    }
    deployment::Instance { name: String, address: String, ready: bool, restarts: u32 }
    deployment::Problem { reason: String, message: String, remedy: String, transient: bool }
    deployment::CloningStarted { worker: String }
    deployment::BuildingStarted { build: BuildId }
    deployment::PushingStarted { build: BuildId }
    deployment::ImagePinned { image: PinnedImage, build: Option<BuildId>, shared: bool }
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
}

impl Check for deployment::Queued {
    fn check(text: &mut Text<'_>) -> Option<()> {
        let deployment::Queued {} = Self {};
        text.literal("{}")
    }
}

impl Check for deployment::Version {
    fn check(text: &mut Text<'_>) -> Option<()> {
        if text.literal(r#"{"git":{"url":"#).is_some() {
            RepositoryUrl::check(text)?;
            text.literal(r#","git_ref":"#)?;
            GitRef::check(text)?;
            text.literal(r#","path":"#)?;
            String::check(text)?;
        } else if text.literal(r#"{"helm":{"chart":"#).is_some() {
            ChartReference::check(text)?;
            text.literal(r#","version":"#)?;
            ChartVersion::check(text)?;
        } else {
            text.literal(r#"{"image":{"reference":"#)?;
            ImageReference::check(text)?;
        }
        text.literal("}}")
    }
}

impl Check for deployment::SourceResolved {
    fn check(text: &mut Text<'_>) -> Option<()> {
        text.literal(r#"{"source":"#)?;
        deployment::SourceCommit::check(text)?;
        text.literal(r#","build":"#)?;
        BuildId::check(text)?;
        if text.literal(r#","branch":"#).is_some() {
            GitRef::check(text)?;
        }
        text.literal("}")
    }
}

/// A request with secrets is left to the parser.
impl Check for deployment::Requested {
    fn check(text: &mut Text<'_>) -> Option<()> {
        text.literal(r#"{"instance":"#)?;
        InstanceRef::check(text)?;
        text.literal(r#","version":"#)?;
        deployment::Version::check(text)?;
        text.literal(r#","clusters":"#)?;
        Vec::<ClusterName>::check(text)?;
        text.literal(r#","build":"#)?;
        BuildSpec::check(text)?;
        text.literal(r#","image_repository":"#)?;
        Option::<ImageRepository>::check(text)?;
        text.literal(r#","run":"#)?;
        RunSpec::check(text)?;
        text.literal(r#","switch":"#)?;
        deployment::SwitchMode::check(text)?;
        text.literal(r#","reason":"#)?;
        Option::<String>::check(text)?;
        text.literal(r#","redeploy_of":"#)?;
        Option::<DeploymentId>::check(text)?;
        text.literal("}")
    }
}

#[cfg(test)]
mod tests {
    use std::sync::OnceLock;

    use proptest::prelude::*;

    use super::*;
    use crate::any::AnyPayload;
    use crate::envelope::Event;
    use crate::subject::AggregateKind;
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
                let payload = decode(event.short_kind(), event.data.get());
                let data = match payload {
                    AnyPayload::Deployment(Ok(e)) => crate::Payload::encode(&e).unwrap(),
                    AnyPayload::Build(Ok(e)) => crate::Payload::encode(&e).unwrap(),
                    _ => return None,
                };
                Some((event.short_kind().to_owned(), data.get().to_owned()))
            };
            let all: Vec<_> = golden.chain(history).filter_map(read).collect();
            assert!(all.len() > 300);
            all
        })
    }

    fn decode(kind: &str, data: &str) -> AnyPayload {
        let aggregate = kind.split('.').next().unwrap().parse().ok();
        AnyPayload::decode(aggregate, kind, data)
    }

    #[test]
    fn what_daybook_writes_needs_no_parser() {
        let mut left = std::collections::BTreeSet::new();
        for (kind, data) in payloads() {
            match check(kind, data) {
                Some(step) => assert_eq!(Some(Ok(step)), Step::of(&decode(kind, data))),
                None => _ = left.insert(kind.as_str()),
            }
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
                "deployment.held.v1",
                "deployment.openapi_found.v1",
                "deployment.post_review_completed.v1",
                "deployment.released.v1",
                "deployment.start_failed.v1",
                "deployment.stop_failed.v1",
                "deployment.terminate_failed.v1",
            ]
        );
    }

    #[test]
    fn a_payload_is_checked_for_its_own_aggregate_only() {
        for (kind, data) in payloads() {
            for aggregate in AggregateKind::ALL {
                let checked = Step::check(aggregate, kind, data).is_some();
                assert!(!checked || kind.starts_with(&format!("{}.", aggregate.as_str())));
            }
        }
    }

    /// Holds what is accepted without the parser against what the parser says of it.
    fn compare(kind: &str, data: &str) -> Result<(), TestCaseError> {
        if let Some(step) = check(kind, data) {
            let parsed = Step::of(&decode(kind, data));
            prop_assert_eq!(parsed, Some(Ok(step)), "{}: {}", kind, data);
        }
        Ok(())
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
