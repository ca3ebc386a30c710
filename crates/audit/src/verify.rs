//! Verifying a whole ledger.

use std::collections::{BTreeMap, VecDeque};
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use base64::Engine;
use base64::engine::general_purpose::STANDARD as BASE64;
use bytes::Bytes;
use daybook_events::aggregate::Void;
use daybook_events::tree::TreeHead;
use daybook_events::{AggregateKind, Position, with_causes};
use daybook_projections::StateHash;
use daybook_store::tlog::{
    Checkpoint, CheckpointError, Hash, SignatureError, TILE_WIDTH, TileKind, TilePath, VerifierKey,
    parse_verifiers,
};
use jiff::Timestamp;
use serde::{Serialize, Serializer};

use crate::archive::Stop;
use crate::entry::{Checks, Content, Entry, Keys, Read};
use crate::finding::{Finding, Findings, Kind, Place};
use crate::fold::Outcome;
use crate::gitops::{CompareRepository, Compared, Spool};
use crate::kept::{KeepError, Keeper, Kept};
use crate::pipeline::{self, Bundle, Plan, Roots, Step, Suspect};
use crate::schema::Schemas;
use crate::shares::{self, Plain, Remark, Shares, Skimmed, including};
use crate::source::{CHECKPOINT, Found, KEYS, STATE, Source};
use crate::spares::Spares;
use crate::tree::{Edge, Levels};

/// Suspects are remembered up to so many; more say nothing new.
const SUSPECTS: usize = 1000;

/// States that are in use are kept in memory up to about so many bytes of events that made them.
const STATES_BYTES: usize = 48 << 20;

/// Bundles with so many bytes in all may wait for their events to be folded.
const FOLDING_BYTES: usize = 8 << 20;

/// How thoroughly a ledger is verified.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Thoroughness {
    /// Signatures, tree and consistency; events are not read.
    Quick,
    /// All of that, and every event and every aggregate.
    #[default]
    Normal,
    /// All of that; every event is also held against its JSON Schema, and every file against the
    /// manifest's digest of it.
    Full,
}

/// How a ledger is verified.
#[derive(Debug, Clone, Default)]
pub struct Options {
    /// Keys that the auditor trusts; if there are none, kept ones are used, and if there are none
    /// either, those that came with the ledger.
    pub keys: Vec<VerifierKey>,
    /// What was kept of this log from the last time.
    pub kept: Option<Kept>,
    /// Where to look for what was kept, if it is not given.
    pub keeper: Option<Keeper>,
    /// A checkpoint from elsewhere that the ledger must go on from.
    pub earlier: Option<Bytes>,
    /// How thoroughly.
    pub thoroughness: Thoroughness,
    /// What compares GitOps repositories; without it they are not compared.
    pub gitops: Option<Arc<dyn CompareRepository>>,
    /// Threads that hash and parse; as many as there are cores if none are given.
    pub threads: Option<usize>,
    /// Ends the verification when it becomes true.
    pub stop: Arc<AtomicBool>,
}

/// What an event did to the state of its aggregate.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Effect {
    /// It changed it.
    Counted,
    /// It is void and changed nothing: another event had taken its revision, or it may not follow, or
    /// it cannot be read.
    Void,
    /// It, or its aggregate, is of a newer version, which knows.
    Unknown,
}

impl Effect {
    /// In one word, as reports have it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Counted => "counted",
            Self::Void => "void",
            Self::Unknown => "unknown",
        }
    }
}

/// Somebody who looks on while a ledger is verified. What is said here is evidence only if the
/// ledger turns out to hold.
pub trait Observe: Send {
    /// An event, in the order of the ledger.
    fn event(&mut self, position: Position, bytes: &[u8], effect: Effect);
    /// Whether it wants to be told of events at all.
    fn looks(&self) -> bool {
        true
    }
}

impl Observe for () {
    fn event(&mut self, _: Position, _: &[u8], _: Effect) {}
    fn looks(&self) -> bool {
        false
    }
}

/// Why a ledger could not be verified at all.
#[derive(Debug, thiserror::Error)]
pub enum VerifyError {
    /// It cannot be read, or what it takes to verify it cannot be written.
    #[error("{name} could not be verified")]
    Io {
        /// The ledger.
        name: String,
        /// What the system said.
        source: io::Error,
    },
    /// What was kept from the last time cannot be read.
    #[error(transparent)]
    Kept(#[from] KeepError),
    /// It was stopped.
    #[error("the verification was stopped")]
    Stopped,
}

/// Whose word is taken for the keys.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Trust {
    /// The auditor named the keys.
    Given,
    /// They are those of the last time.
    Kept,
    /// They came with the ledger itself.
    FirstUse,
}

/// How the ledger compares with an earlier checkpoint of it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case", tag = "outcome")]
pub enum Continuity {
    /// There is none to compare with.
    NothingKept,
    /// It begins with the tree of that checkpoint.
    Continues {
        /// The size then.
        size: u64,
    },
    /// It ends before that checkpoint.
    Older {
        /// The size then.
        size: u64,
    },
    /// It does not begin with the tree of that checkpoint.
    Contradicts {
        /// The size then.
        size: u64,
    },
    /// It could not be said, because the tree could not be computed.
    Unknown {
        /// The size then.
        size: u64,
    },
}

/// How many there were of what.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize)]
pub struct Counts {
    /// Leaves that were hashed.
    pub entries: u64,
    /// Bytes in them.
    pub bytes: u64,
    /// Events that were read.
    pub events: u64,
    /// Events that changed the state of their aggregate.
    pub counted: u64,
    /// Events that changed nothing.
    pub void: u64,
    /// Events of a newer version.
    pub unknown: u64,
    /// Positions at which nothing is.
    pub gaps: u64,
    /// Aggregates.
    pub aggregates: u64,
}

/// What a verification came to.
#[derive(Debug, Clone, Serialize)]
pub struct Verified {
    /// What was verified.
    pub source: String,
    /// How thoroughly.
    pub thoroughness: Thoroughness,
    /// The log, as its checkpoint names it.
    pub origin: Option<String>,
    /// The signed size.
    pub size: u64,
    /// The signed root.
    #[serde(serialize_with = "in_base64")]
    pub root: Option<Hash>,
    /// Who signed: names and ids of keys whose signatures hold.
    pub signed_by: Vec<String>,
    /// Who else claims to have signed in the name of the log, with keys that the auditor does not
    /// know: the next key, perhaps, while keys are being changed.
    pub strangers: Vec<String>,
    /// Whose word was taken for the keys.
    pub trust: Trust,
    /// Whether a trusted key signed this very checkpoint.
    pub signature_holds: bool,
    /// Whether the entries lead to the signed root.
    pub tree_holds: bool,
    /// How it compares with the checkpoint of the last time.
    pub continuity: Continuity,
    /// How it compares with the checkpoint that was named.
    pub earlier: Option<Continuity>,
    /// When the export was made, as it says itself.
    pub exported: Option<Timestamp>,
    /// When the first and the last event say that they were recorded.
    pub period: Option<(Timestamp, Timestamp)>,
    /// The hash over the states of all aggregates, as it follows from the events; none if it was
    /// not computed, which it is where the server claims one, and if all is checked.
    pub state_hash: Option<StateHash>,
    /// What the server claims that it is.
    pub claimed_state_hash: Option<String>,
    /// The repositories that were compared with the ledger.
    pub repositories: Vec<Compared>,
    /// How many there were of what.
    pub counts: Counts,
    /// All that was found.
    pub findings: Findings,
    /// What to keep for the next time; none if the ledger does not hold.
    #[serde(skip)]
    pub keep: Option<Kept>,
    /// The checkpoint, as it was found.
    #[serde(skip)]
    pub note: Bytes,
}

fn in_base64<S: Serializer>(root: &Option<Hash>, serializer: S) -> Result<S::Ok, S::Error> {
    root.map(|root| BASE64.encode(root)).serialize(serializer)
}

impl Verified {
    /// Whether everything that was looked at holds.
    pub fn holds(&self) -> bool {
        self.findings.problems() == 0 && self.signature_holds && self.tree_holds
    }

    /// The signed root in base64, as the checkpoint has it.
    pub fn root_text(&self) -> String {
        self.root
            .map(|root| BASE64.encode(root))
            .unwrap_or_default()
    }

    /// What was proven, in sentences.
    pub fn proven(&self) -> Vec<String> {
        let mut all = Vec::new();
        let origin = self.origin.as_deref().unwrap_or("an unknown log");
        if self.signature_holds {
            let who = self.signed_by.join(" and ");
            all.push(format!(
                "{who} signed the ledger {origin} as it was at {} entries.",
                self.size
            ));
        }
        if self.tree_holds {
            all.push(format!(
                "The {} entries here are exactly those: none is missing, added, changed or moved.",
                self.size
            ));
        }
        let earlier = self.earlier.as_ref().unwrap_or(&Continuity::NothingKept);
        for (continuity, which) in [
            (&self.continuity, "that you saw last time"),
            (earlier, "of the checkpoint that you named"),
        ] {
            let Continuity::Continues { size } = continuity else {
                continue;
            };
            all.push(if self.tree_holds {
                format!(
                    "The {size} entries {which} are all still there, unchanged and in their places."
                )
            } else {
                format!(
                    "What was signed begins with the {size} entries {which}: history was not rewritten. \
                     That all of them are here is not shown."
                )
            });
        }
        if self.thoroughness != Thoroughness::Quick && self.tree_holds {
            let none = |kinds: &[Kind]| kinds.iter().all(|k| self.findings.count(*k) == 0);
            if none(&[
                Kind::EnvelopeInvalid,
                Kind::EventUnreadable,
                Kind::SchemaViolated,
            ]) {
                let how = match self.thoroughness {
                    Thoroughness::Full => "and fits its JSON Schema",
                    _ => "and has the fields that its kind demands",
                };
                all.push(format!(
                    "Each of the {} events names its author, time and aggregate {how}.",
                    self.counts.events - self.counts.unknown
                ));
            }
            if none(&[Kind::RevisionMissing, Kind::TransitionIllegal]) {
                all.push(format!(
                    "In each of the {} aggregates every revision is there, and every event was allowed where it stands.",
                    self.counts.aggregates
                ));
            }
        }
        if self.claimed_state_hash.is_some()
            && self.tree_holds
            && self.findings.count(Kind::StateDiffers) == 0
        {
            all.push("The state that the server shows follows from these events: the hash over all states is the same.".into());
        }
        let kinds = [
            Kind::CommitUnrecorded,
            Kind::CommitMissing,
            Kind::CommitDiffers,
            Kind::CommitUnsigned,
            Kind::RepositoryUnreadable,
            Kind::RepositoryBehind,
        ];
        let compared = self.tree_holds && !self.repositories.is_empty();
        if compared && kinds.iter().all(|k| self.findings.count(*k) == 0) {
            let commits: u64 = self.repositories.iter().map(|r| r.commits).sum();
            all.push(format!(
                "The {commits} commits of {} GitOps repositories and the events about them agree, one to one.",
                self.repositories.len()
            ));
        }
        all
    }

    /// What was not proven, in sentences.
    pub fn not_proven(&self) -> Vec<String> {
        let mut all = vec![format!(
            "Nothing is said about what happened after entry {}.",
            self.size
        )];
        match self.trust {
            Trust::FirstUse => all.push(
                "The keys came with the ledger itself: whoever could replace the one could replace the other. \
                 Compare them with what the operator tells you by another way, or name them with --key."
                    .into(),
            ),
            Trust::Kept | Trust::Given => {}
        }
        match self.continuity {
            Continuity::NothingKept => all.push(
                "There was no checkpoint from an earlier audit: that history was not rewritten before this one is not shown."
                    .into(),
            ),
            Continuity::Older { size } => all.push(format!(
                "You have seen {size} entries before; that these are the beginning of those was not compared."
            )),
            Continuity::Unknown { .. } => all.push(
                "Whether it continues what you saw last time could not be computed.".into(),
            ),
            Continuity::Continues { .. } | Continuity::Contradicts { .. } => {}
        }
        if !self.strangers.is_empty() {
            all.push(format!(
                "{} signed it as well, with a key that you do not know: ask the operator by another way whether it is the \
                 ledger's next key, and if so name it with --key, beside the old one.",
                self.strangers.join(" and ")
            ));
        }
        all.push("The times are what the writers' clocks said; no proof covers a clock.".into());
        all.push(if self.repositories.is_empty() {
            "That what is recorded did happen is not shown: no GitOps repository was compared with the events.".into()
        } else {
            "That what is recorded did happen is shown only as far as the commits bear it out.".to_owned()
        });
        let newer: u64 = self.repositories.iter().map(|r| r.newer).sum();
        if newer > 0 {
            all.push(format!(
                "{newer} commits that the ledger records are not in the copies of the repositories: \
                 they were made after those, or were taken away."
            ));
        }
        if self.thoroughness == Thoroughness::Quick {
            all.push("The events were hashed and not read.".into());
        }
        if self.claimed_state_hash.is_some() && !self.tree_holds {
            all.push(
                "Whether the state that the server shows follows from the signed events is not known: those are not all here."
                    .into(),
            );
        }
        if self.counts.gaps > 0 {
            all.push(format!(
                "What once was at {} positions is lost, and was before they were signed.",
                self.counts.gaps
            ));
        }
        if self.counts.unknown > 0 {
            all.push(format!(
                "{} events are of kinds that this version does not know: their payloads were not checked.",
                self.counts.unknown
            ));
        }
        all
    }
}

/// The checkpoint, and who is believed to have signed it.
struct Signed {
    checkpoint: Checkpoint,
    holds: bool,
    signed_by: Vec<String>,
    strangers: Vec<String>,
    trust: Trust,
    keys: Vec<VerifierKey>,
}

/// Verifies a ledger. `progress` is told how many entries are done, and how many there are.
///
/// What is wrong with the ledger is in the outcome; an error means that it could not be looked at.
pub fn verify(
    source: Source,
    options: &Options,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<Verified, VerifyError> {
    observe(source, options, &mut (), progress)
}

/// The same, while somebody looks on.
pub fn observe(
    mut source: Source,
    options: &Options,
    observer: &mut dyn Observe,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<Verified, VerifyError> {
    let name = source.name().to_owned();
    let is_live = source.is_live();
    let failed = |source| VerifyError::Io {
        name: name.clone(),
        source,
    };
    let mut findings = Findings::default();
    let mut broken = None;
    note_stop(source.begin(&mut findings), &mut broken).map_err(failed)?;
    let note = source.small(CHECKPOINT).unwrap_or_default();
    let kept = match (&options.kept, &options.keeper) {
        (None, Some(keeper)) => match Checkpoint::parse_unverified(&note) {
            Ok((checkpoint, _)) => keeper.load(&checkpoint.origin)?,
            Err(_) => None,
        },
        (kept, _) => kept.clone(),
    };
    let signed = judge_checkpoint(&source, &note, options, kept.as_ref(), &mut findings);
    let mut verified = Verified {
        source: name.clone(),
        thoroughness: options.thoroughness,
        origin: signed.as_ref().map(|s| s.checkpoint.origin.clone()),
        size: signed.as_ref().map_or(0, |s| s.checkpoint.head.size),
        root: signed.as_ref().map(|s| s.checkpoint.head.root),
        signed_by: signed.iter().flat_map(|s| s.signed_by.clone()).collect(),
        strangers: signed.iter().flat_map(|s| s.strangers.clone()).collect(),
        trust: signed.as_ref().map_or(Trust::FirstUse, |s| s.trust),
        signature_holds: signed.as_ref().is_some_and(|s| s.holds),
        tree_holds: false,
        continuity: Continuity::NothingKept,
        earlier: None,
        exported: None,
        period: None,
        state_hash: None,
        claimed_state_hash: None,
        repositories: Vec::new(),
        counts: Counts::default(),
        findings: Findings::default(),
        keep: None,
        note: note.clone(),
    };
    let Some(signed) = signed else {
        if let Some(finding) = broken {
            findings.add(finding);
        }
        verified.findings = findings;
        return Ok(verified);
    };
    let head = signed.checkpoint.head;
    let origin = &signed.checkpoint.origin;
    // What was kept was believed by the keys of that time.
    let kept = kept.as_ref().and_then(|kept| {
        let keys = [&kept.keys[..], &signed.keys].concat();
        older(&kept.checkpoint, origin, &keys, "kept", &mut findings)
    });
    let earlier = options
        .earlier
        .as_ref()
        .and_then(|note| older(note, origin, &signed.keys, "named", &mut findings));
    let older_heads: Vec<TreeHead> = [kept, earlier].into_iter().flatten().collect();
    let older_sizes: Vec<u64> = older_heads.iter().map(|h| h.size).collect();

    // The states are needed only for their hash.
    let hashed = match options.thoroughness {
        Thoroughness::Quick => false,
        Thoroughness::Normal => source.small(STATE).is_some(),
        Thoroughness::Full => true,
    };
    let checks = Checks {
        keys: Keys::default(),
        schemas: Schemas::of_this_version(),
        all_schemas: options.thoroughness == Thoroughness::Full,
        outlines: !hashed,
    };
    let cores = std::thread::available_parallelism().map_or(2, usize::from);
    let plan = Plan {
        size: head.size,
        older: &older_sizes,
        checks: &checks,
        parse: options.thoroughness != Thoroughness::Quick,
        digests: options.thoroughness == Thoroughness::Full,
        threads: options.threads.unwrap_or(cores).clamp(1, 16),
        stop: &options.stop,
    };
    let shares = plan
        .parse
        .then(|| Shares::start(plan.threads, &checks, STATES_BYTES));
    let repositories = source.repositories();
    let spool = (options.gitops.is_some() && plan.parse)
        .then(|| Spool::new(repositories.iter().map(|r| r.project.clone())));
    let mut walk = Walk {
        findings,
        shares: shares.transpose().map_err(failed)?,
        waiting: Waiting::default(),
        spares: source.spares(),
        counts: Counts::default(),
        period: None,
        entries: Some(Edge::default()),
        tiles: Edge::default(),
        tail: (None, None),
        levels: Default::default(),
        doubtful: Vec::new(),
        roots: BTreeMap::new(),
        wanted: older_sizes.clone(),
        suspects: Vec::new(),
        spool: spool.transpose().map_err(failed)?,
        observer,
        trouble: None,
    };
    let mut copied_at = None;
    if broken.is_none() {
        walk.note_roots();
        let ended = pipeline::read(source, &plan, |step| {
            let goes_on = walk.step(step);
            progress(walk.counts.entries, head.size);
            goes_on
        });
        let pipeline::Ended {
            source: after,
            findings: read,
            listed,
            stop,
        } = ended;
        source = after;
        if let Some(e) = walk.trouble.take() {
            return Err(failed(e));
        }
        walk.settle_all().map_err(failed)?;
        progress(walk.counts.entries, head.size);
        // What was not there comes before what follows from that.
        let walked = std::mem::replace(&mut walk.findings, read);
        walk.findings.merge(walked);
        if options.stop.load(Ordering::Relaxed) {
            return Err(VerifyError::Stopped);
        }
        note_stop(stop.map_or(Ok(()), Err), &mut broken).map_err(failed)?;
        if broken.is_none() {
            let end = source.end(origin, &head, listed.into_iter(), &mut walk.findings);
            match end {
                Ok(Some(said)) => {
                    verified.exported = said.exported;
                    copied_at = said.repositories;
                }
                Ok(None) => {}
                Err(stop) => note_stop(Err(stop), &mut broken).map_err(failed)?,
            }
        }
    }
    let read_all = broken.is_none();
    let folded = walk.shares.take().map(Shares::finish).transpose();
    let folded = folded.map_err(failed)?.unwrap_or_default();
    if let Some(finding) = broken {
        walk.findings.add(finding);
    }
    let lead = walk.judge_root(&head, read_all);
    verified.tree_holds = lead == Lead::Entries;
    if read_all && hashed && walk.findings.count(Kind::EnvelopeInvalid) == 0 {
        walk.judge_state(&source, folded.sum.hash(), &mut verified);
    }
    if let (Some(compare), Some(spool), true) = (&options.gitops, &mut walk.spool, read_all) {
        verified.repositories = spool
            .compare(
                &repositories,
                copied_at,
                compare.as_ref(),
                &mut walk.findings,
            )
            .map_err(failed)?;
    }
    // What nobody signed is no word of the log, and contradicts none.
    let signed_head = verified.signature_holds.then_some(head);
    let mut compare = |old: Option<TreeHead>, what| {
        old.map(|old| match signed_head {
            Some(head) => walk.continuity(&old, &head, lead, what, is_live),
            None => Continuity::Unknown { size: old.size },
        })
    };
    let continuity = compare(kept, "the checkpoint that you kept");
    verified.continuity = continuity.unwrap_or(Continuity::NothingKept);
    verified.earlier = compare(earlier, "the checkpoint that you named");
    verified.counts = Counts {
        aggregates: folded.aggregates,
        ..walk.counts
    };
    verified.period = walk.period;
    verified.findings = walk.findings;
    if verified.holds() {
        let newer = kept.is_none_or(|old| old.size <= head.size);
        verified.keep = newer.then(|| Kept {
            checkpoint: note,
            keys: signed.keys,
        });
    }
    Ok(verified)
}

/// Sets aside why an archive could not be read on.
fn note_stop(read: Result<(), Stop>, broken: &mut Option<Finding>) -> io::Result<()> {
    match read {
        Ok(()) => Ok(()),
        Err(Stop::Broken(finding)) => {
            *broken = Some(*finding);
            Ok(())
        }
        Err(Stop::Io(e)) => Err(e),
    }
}

/// Reads the checkpoint and judges who signed it. `None` if it states no tree.
fn judge_checkpoint(
    source: &Source,
    note: &Bytes,
    options: &Options,
    kept: Option<&Kept>,
    findings: &mut Findings,
) -> Option<Signed> {
    let place = || Place::file(CHECKPOINT);
    if note.is_empty() {
        findings.push(Kind::FileMissing, place(), "there is no checkpoint");
        return None;
    }
    let (checkpoint, parsed) = match Checkpoint::parse_unverified(note) {
        Ok(parsed) => parsed,
        Err(e) => {
            findings.push(Kind::CheckpointMalformed, place(), with_causes(&e));
            return None;
        }
    };
    let kept = kept.map(|k| k.keys.clone());
    let came = came_with(source, findings);
    let (trust, keys) = match (options.keys.is_empty(), kept) {
        (false, _) => (Trust::Given, options.keys.clone()),
        (true, Some(keys)) if !keys.is_empty() => (Trust::Kept, keys),
        _ => (Trust::FirstUse, came),
    };
    let mut signed_by = Vec::new();
    let holds = match parsed.verify(&keys) {
        Ok(good) => {
            signed_by = good
                .iter()
                .map(|k| format!("{}+{}", k.name(), k.id()))
                .collect();
            let ours = good.iter().any(|k| k.name() == checkpoint.origin);
            if !ours {
                let message = format!(
                    "the checkpoint is of {:?}, and signed by the key of {:?}",
                    checkpoint.origin,
                    good.first().map_or("", |k| k.name())
                );
                findings.push(Kind::OriginDiffers, place(), message);
            }
            ours
        }
        Err(error @ SignatureError::Invalid { .. }) => {
            findings.push(Kind::CheckpointForged, place(), error.to_string());
            false
        }
        Err(error) => {
            findings.push(Kind::CheckpointUntrusted, place(), error.to_string());
            false
        }
    };
    let strangers = parsed
        .signatures
        .iter()
        .filter(|s| s.name == checkpoint.origin && keys.iter().all(|k| k.id() != s.id))
        .map(|s| format!("{}+{}", s.name, s.id));
    Some(Signed {
        strangers: strangers.collect(),
        checkpoint,
        holds,
        signed_by,
        trust,
        keys,
    })
}

/// The keys that came with the ledger.
fn came_with(source: &Source, findings: &mut Findings) -> Vec<VerifierKey> {
    let Some(bytes) = source.small(KEYS) else {
        return Vec::new();
    };
    let text = String::from_utf8_lossy(&bytes);
    parse_verifiers(&text).unwrap_or_else(|(line, e)| {
        let place = Place::file(KEYS);
        findings.push(
            Kind::ManifestDiffers,
            place,
            format!("line {line} is no key: {e}"),
        );
        Vec::new()
    })
}

/// The head of an older checkpoint of the same log.
fn older(
    note: &Bytes,
    origin: &str,
    keys: &[VerifierKey],
    which: &str,
    findings: &mut Findings,
) -> Option<TreeHead> {
    let place = || Place::file(format!("the {which} checkpoint"));
    match Checkpoint::open(note, origin, keys) {
        Ok(old) => Some(old.head),
        Err(e @ CheckpointError::Origin { .. }) => {
            findings.push(Kind::OriginDiffers, place(), e.to_string());
            None
        }
        Err(CheckpointError::Signature(e)) => {
            findings.push(Kind::CheckpointUntrusted, place(), with_causes(&e));
            None
        }
        Err(e) => {
            findings.push(Kind::CheckpointMalformed, place(), with_causes(&e));
            None
        }
    }
}

/// What leads to the root that the checkpoint states.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Lead {
    /// The entries.
    Entries,
    /// Not the entries, but the hashes in the tiles over them.
    Tiles,
    /// Neither, or not all of them were read.
    Nothing,
}

/// A tile above the leaves, with its first hash that does not follow from what is below it.
struct Doubtful {
    tile: Place,
    by_entries: Option<usize>,
    by_tiles: Option<usize>,
}

/// The steps that the walk has not taken yet, because the events in them are being folded.
#[derive(Default)]
struct Waiting {
    steps: VecDeque<Due>,
    /// How many of them are bundles, and how many bytes those have.
    bundles: usize,
    bytes: usize,
}

/// A step of which the walk can be told what became of its events.
enum Due {
    /// A bundle, and its entries.
    Bundle(Box<Bundle>, Arc<Skimmed>),
    Tile(TilePath, Option<Found>),
}

/// The walk over a tree from its first to its last entry.
struct Walk<'o> {
    observer: &'o mut dyn Observe,
    findings: Findings,
    /// Who folds the events, if they are read.
    shares: Option<Shares>,
    waiting: Waiting,
    spares: Arc<Spares>,
    counts: Counts,
    period: Option<(Timestamp, Timestamp)>,
    /// The tree over the entries; none once some of them could not be read.
    entries: Option<Edge>,
    /// The tree over the hashes in the tiles.
    tiles: Edge,
    /// The root over what is left in the last bundle and tile, unless they are full.
    tail: (Option<Hash>, Option<Hash>),
    /// The tiles above, as they follow from the entries, and from the tiles below.
    levels: (Levels, Levels),
    /// Tiles above that do not follow from the one or the other.
    doubtful: Vec<Doubtful>,
    /// Roots of older trees, as they follow from the entries.
    roots: BTreeMap<u64, Roots>,
    wanted: Vec<u64>,
    suspects: Vec<Suspect>,
    /// The events of GitOps repositories; none if nobody compares them.
    spool: Option<Spool>,
    /// What the system refused.
    trouble: Option<io::Error>,
}

impl Walk<'_> {
    /// Takes a step, once its events are folded; false ends the walk.
    fn step(&mut self, step: Step) -> bool {
        let waiting = &mut self.waiting;
        waiting.steps.push_back(match step {
            Step::Bundle(mut bundle) => {
                let skimmed = Arc::new(std::mem::take(&mut bundle.skimmed));
                if let Some(shares) = &mut self.shares {
                    shares.hand_over(&skimmed);
                }
                waiting.bundles += 1;
                waiting.bytes += skimmed.bytes.len();
                Due::Bundle(bundle, skimmed)
            }
            Step::Tile(path, found) => Due::Tile(path, found),
        });
        let is_full =
            |waiting: &Waiting| waiting.bundles >= shares::AHEAD || waiting.bytes > FOLDING_BYTES;
        while !self.waiting.steps.is_empty() && (self.shares.is_none() || is_full(&self.waiting)) {
            if let Err(e) = self.settle() {
                self.trouble = Some(e);
                return false;
            }
        }
        true
    }

    /// Takes all steps that wait.
    fn settle_all(&mut self) -> io::Result<()> {
        while !self.waiting.steps.is_empty() {
            self.settle()?;
        }
        Ok(())
    }

    /// Takes the step that has waited for longest.
    fn settle(&mut self) -> io::Result<()> {
        match self.waiting.steps.pop_front() {
            Some(Due::Bundle(bundle, skimmed)) => {
                self.waiting.bundles -= 1;
                self.waiting.bytes -= skimmed.bytes.len();
                self.bundle(*bundle, &skimmed)?;
                if let Some(Skimmed { bytes, .. }) = Arc::into_inner(skimmed) {
                    self.spares.give(bytes);
                }
                Ok(())
            }
            Some(Due::Tile(path, found)) => {
                self.tile(path, found);
                Ok(())
            }
            None => Ok(()),
        }
    }

    /// The roots of older trees that end here.
    fn note_roots(&mut self) {
        let here = self.counts.entries;
        if self.wanted.contains(&here) && here.is_multiple_of(TILE_WIDTH) {
            let roots = Roots {
                by_entries: self.entries.as_ref().map(|edge| edge.root(None)),
                by_tiles: Some(self.tiles.root(None)),
            };
            self.roots.insert(here, roots);
        }
    }

    fn bundle(&mut self, bundle: Bundle, skimmed: &Skimmed) -> io::Result<()> {
        let Bundle {
            place,
            width,
            by_entries,
            by_tile,
            prefixes,
            suspects,
            findings,
            ..
        } = bundle;
        self.findings.merge(findings);
        let room = SUSPECTS.saturating_sub(self.suspects.len());
        self.suspects.extend(suspects.into_iter().take(room));
        for (width, tail) in prefixes {
            let roots = Roots {
                by_entries: self
                    .entries
                    .as_ref()
                    .and_then(|edge| Some(edge.root(Some(tail.by_entries?)))),
                by_tiles: tail.by_tiles.map(|tail| self.tiles.root(Some(tail))),
            };
            self.roots.insert(self.counts.entries + width as u64, roots);
        }
        // Where one of the two cannot be read, the other speaks for the tiles above.
        let above = by_tile.or(by_entries);
        if by_entries.is_none() {
            self.entries = None;
        }
        if width as u64 == TILE_WIDTH {
            if let (Some(edge), Some(root)) = (&mut self.entries, by_entries) {
                edge.push(root);
            }
            if let Some(root) = above {
                self.tiles.push(root);
                self.levels.0.push(by_entries.unwrap_or(root));
                self.levels.1.push(root);
            }
        } else {
            self.tail = (by_entries, above);
        }
        self.counts.entries += width as u64;
        self.note_roots();
        let remarks = match &mut self.shares {
            Some(shares) => shares.remarks()?,
            None => Vec::new(),
        };
        if let (Some(plain), true, false) =
            (&skimmed.plain, remarks.is_empty(), self.observer.looks())
        {
            return self.plain(plain, skimmed);
        }
        let mut remarks = remarks.into_iter().peekable();
        for (number, entry) in skimmed.entries.iter().enumerate() {
            let remark = remarks.next_if(|remark| remark.number == number);
            // With its length, which comes before it.
            let offset = entry.place.start.saturating_sub(2) as u64;
            self.entry(entry, remark, &skimmed.bytes, &|| Place {
                file_offset: Some(offset),
                archive_offset: place.archive_offset.map(|at| at + offset),
                entry: u16::try_from(number).ok(),
                ..place.clone()
            })?;
        }
        Ok(())
    }

    /// Takes the entries of a bundle that are events, of which each counts, and of which there is
    /// nothing to be said. The same as [`Self::entry`] of each.
    fn plain(&mut self, plain: &Plain, skimmed: &Skimmed) -> io::Result<()> {
        let events = skimmed.entries.len() as u64;
        self.counts.bytes += plain.bytes;
        self.counts.events += events;
        self.counts.counted += events;
        if let Some((first, last)) = plain.period {
            self.period = including(including(self.period, first), last);
        }
        if self.spool.is_none() {
            return Ok(());
        }
        for number in &plain.gitops {
            if let Some(entry) = skimmed.entries.get(*number)
                && let Content::Event(read) = &entry.content
            {
                let bytes = skimmed.bytes.get(entry.place.clone()).unwrap_or_default();
                self.spool(entry.position, read, bytes)?;
            }
        }
        Ok(())
    }

    /// Keeps an event of a GitOps repository for the comparison with that.
    fn spool(&mut self, position: Position, read: &Read, bytes: &[u8]) -> io::Result<()> {
        let Some(spool) = &mut self.spool else {
            return Ok(());
        };
        let subject = read.subject.text(bytes);
        let project = subject.split('/').next().unwrap_or_default();
        spool.add(project, position, bytes)
    }

    fn entry(
        &mut self,
        entry: &Entry,
        remark: Option<Remark>,
        bundle: &[u8],
        place: &dyn Fn() -> Place,
    ) -> io::Result<()> {
        let (again, outcome) = match remark {
            Some(remark) => (remark.again, remark.outcome),
            None => (None, Some(Outcome::Counted)),
        };
        let entry = again.as_ref().unwrap_or(entry);
        let (position, id) = (entry.position, entry.id);
        let bytes = bundle.get(entry.place.clone()).unwrap_or_default();
        self.counts.bytes += bytes.len() as u64;
        let place = || Place {
            position: Some(position),
            event: id,
            ..place()
        };
        for (kind, message) in &entry.broken {
            match kind {
                Kind::GapRecorded => self.counts.gaps += 1,
                Kind::KindUnknown => self.counts.unknown += 1,
                _ => {}
            }
            self.findings.push(*kind, place(), message.as_str());
        }
        let (Content::Event(read), Some(_), Some(outcome)) = (&entry.content, id, outcome) else {
            return Ok(());
        };
        self.counts.events += 1;
        self.period = including(self.period, read.time);
        let effect = match &outcome {
            Outcome::Counted => Effect::Counted,
            Outcome::Unknown => Effect::Unknown,
            Outcome::Void(_) | Outcome::NoSubject => Effect::Void,
        };
        self.observer.event(position, bytes, effect);
        match outcome {
            Outcome::Counted => {
                self.counts.counted += 1;
                if read.of == Some(AggregateKind::Gitops) {
                    self.spool(position, read, bytes)?;
                }
            }
            Outcome::Unknown => {}
            Outcome::NoSubject => {
                let subject = read.subject.text(bytes);
                let message = format!("its subject {subject:?} is none of the ledger");
                self.findings.push(Kind::EnvelopeInvalid, place(), message);
            }
            Outcome::Void(void) => {
                self.counts.void += 1;
                let kind = match void {
                    Void::Overtaken { .. } => Kind::EventOvertaken,
                    Void::Gap { .. } => Kind::RevisionMissing,
                    Void::Illegal(_) => Kind::TransitionIllegal,
                    // Reported when the event was read.
                    Void::Unknown(_) | Void::Unreadable(_) => return Ok(()),
                };
                let subject = read.subject.text(bytes);
                self.findings
                    .push(kind, place(), format!("{subject}: {void}"));
            }
        }
        Ok(())
    }

    /// Compares a tile above the leaves with what follows from those below it.
    fn tile(&mut self, path: TilePath, found: Option<Found>) {
        let TileKind::Hashes { level } = path.kind else {
            return;
        };
        let expected = [self.levels.0.take(level), self.levels.1.take(level)];
        let Some(found) = found else { return };
        if expected[0].len() != path.width() || self.doubtful.len() == SUSPECTS {
            return;
        }
        let (hashes, rest) = found.bytes.as_chunks::<32>();
        if hashes.len() != path.width() || !rest.is_empty() {
            let message = format!(
                "it has {} bytes and not {}",
                found.bytes.len(),
                32 * path.width()
            );
            self.findings
                .push(Kind::TileDiffers, found.place(), message);
            return;
        }
        let differs =
            expected.map(|expected| expected.iter().zip(hashes).position(|(a, b)| a != b));
        if differs != [None, None] {
            self.doubtful.push(Doubtful {
                tile: found.place(),
                by_entries: differs[0],
                by_tiles: differs[1],
            });
        }
    }

    /// What leads to the signed root; where the entries do not, says what is to blame.
    fn judge_root(&mut self, head: &TreeHead, read_all: bool) -> Lead {
        let complete = read_all && self.counts.entries == head.size;
        let by_entries = self.entries.as_ref().filter(|_| complete);
        let by_entries = by_entries.map(|edge| edge.root(self.tail.0));
        let by_tiles = complete.then(|| self.tiles.root(self.tail.1));
        let entries_hold = by_entries == Some(head.root);
        let tiles_hold = by_tiles == Some(head.root);
        for suspect in std::mem::take(&mut self.suspects) {
            let (kind, place, message) = match (entries_hold, tiles_hold) {
                (true, _) => (
                    Kind::TileDiffers,
                    suspect.tile,
                    "this hash is not that of the entry, which is as it was signed",
                ),
                (false, true) => (
                    Kind::EntryDiffers,
                    suspect.entry,
                    "this entry is not the one that was signed",
                ),
                (false, false) => (
                    Kind::EntryDiffers,
                    suspect.entry,
                    "this entry and the tile over it differ, and neither leads to the signed root",
                ),
            };
            self.findings.push(kind, place, message);
        }
        for doubtful in std::mem::take(&mut self.doubtful) {
            let hash = if entries_hold {
                doubtful.by_entries
            } else {
                doubtful.by_tiles
            };
            if let Some(hash) = hash {
                let place = Place {
                    entry: u16::try_from(hash).ok(),
                    file_offset: Some(32 * hash as u64),
                    ..doubtful.tile
                };
                let message = "this hash does not follow from the tile below it";
                self.findings.push(Kind::TileDiffers, place, message);
            }
        }
        if by_entries.is_some() && !entries_hold && !tiles_hold {
            let computed = by_entries.map(|r| BASE64.encode(r)).unwrap_or_default();
            let signed = BASE64.encode(head.root);
            let message = format!(
                "the root over the {} entries is {computed}, and {signed} was signed",
                head.size
            );
            self.findings
                .push(Kind::RootDiffers, Place::file(CHECKPOINT), message);
        }
        match (entries_hold, tiles_hold) {
            (true, _) => Lead::Entries,
            (false, true) => Lead::Tiles,
            (false, false) => Lead::Nothing,
        }
    }

    /// Compares the hash over all states with what the server claims, where the events are those that
    /// were signed.
    fn judge_state(&mut self, source: &Source, hash: StateHash, verified: &mut Verified) {
        let claim = source.small(STATE);
        let claim = claim.as_deref().map(String::from_utf8_lossy);
        verified.state_hash = Some(hash);
        let Some(claim) = claim else { return };
        let (position, claimed) = claim.trim_end().split_once(' ').unwrap_or_default();
        verified.claimed_state_hash = Some(claimed.to_owned());
        if !verified.tree_holds {
            // What was claimed was claimed of other events: that these lead elsewhere follows.
            return;
        }
        if position != verified.size.to_string() {
            let message = format!(
                "the claim is about position {position:?}, and not about {}",
                verified.size
            );
            self.findings
                .push(Kind::StateDiffers, Place::file(STATE), message);
        } else if claimed != hash.to_string() {
            let message = format!("the server claims {claimed}; the events lead to {hash}");
            self.findings
                .push(Kind::StateDiffers, Place::file(STATE), message);
        }
    }

    /// Compares a signed checkpoint with an older one. That history was rewritten is said only of a
    /// tree that leads to the signed root: what was damaged on the way to the auditor shows nothing.
    fn continuity(
        &mut self,
        old: &TreeHead,
        head: &TreeHead,
        lead: Lead,
        what: &str,
        is_live: bool,
    ) -> Continuity {
        let size = old.size;
        let place = Place::file(CHECKPOINT);
        if size > head.size {
            let message = format!("{what} is of {size} entries, this one of {}", head.size);
            let kind = if is_live {
                Kind::RolledBack
            } else {
                Kind::Older
            };
            self.findings.push(kind, place, message);
            return Continuity::Older { size };
        }
        if size == head.size && old.root != head.root {
            let message = format!(
                "{what} and this one are both of {size} entries, are both signed, and have different roots: {} and {}",
                BASE64.encode(old.root),
                BASE64.encode(head.root)
            );
            self.findings.push(Kind::SplitView, place, message);
            return Continuity::Contradicts { size };
        }
        let roots = self.roots.get(&size).copied().unwrap_or_default();
        let root = match lead {
            Lead::Entries => roots.by_entries,
            Lead::Tiles => roots.by_tiles,
            // One and the same tree needs no proof.
            Lead::Nothing => (size == head.size).then_some(head.root),
        };
        match root {
            Some(root) if root == old.root => Continuity::Continues { size },
            Some(root) => {
                let message = format!(
                    "{what} has the root {} at {size} entries; the first {size} entries of what was signed have {}",
                    BASE64.encode(old.root),
                    BASE64.encode(root)
                );
                self.findings.push(Kind::HistoryRewritten, place, message);
                Continuity::Contradicts { size }
            }
            None => Continuity::Unknown { size },
        }
    }
}
