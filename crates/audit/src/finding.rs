//! What an audit finds: each kind with a stable code, a place, a sentence, and what to do.

use std::collections::BTreeMap;
use std::fmt;

use daybook_events::{EventId, Position};
use serde::{Serialize, Serializer};

/// How many findings are kept with their places; all are counted.
const KEPT: usize = 1000;

/// What a finding means for the verdict.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Severity {
    /// Something that must hold does not: the verdict is that the ledger differs.
    Problem,
    /// Something to know, which contradicts nothing that was signed.
    Notice,
}

/// Declares the kinds: name, code, severity, what to do.
macro_rules! kinds {
    ($( $(#[$doc:meta])* $name:ident = $code:literal, $severity:ident, $remedy:literal; )*) => {
        /// A kind of finding. Codes are part of the interface and never change their meaning.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub enum Kind {
            $( $(#[$doc])* $name, )*
        }

        impl Kind {
            /// All kinds.
            pub const ALL: &[Self] = &[ $( Self::$name, )* ];

            /// The stable code.
            pub fn code(self) -> &'static str {
                match self { $( Self::$name => $code, )* }
            }

            /// What it means for the verdict.
            pub fn severity(self) -> Severity {
                match self { $( Self::$name => Severity::$severity, )* }
            }

            /// What to do about it.
            pub fn remedy(self) -> &'static str {
                match self { $( Self::$name => $remedy, )* }
            }
        }
    };
}

kinds! {
    /// The archive is not written as an export is.
    ArchiveMalformed = "archive_malformed", Problem,
        "ask for the export again; if it was packed anew on the way, unpack it and verify the folder";
    /// The archive ends too early.
    ArchiveTruncated = "archive_truncated", Problem,
        "the file was cut off on the way: compare its length with the sender's, and ask for it again";
    /// Something follows on the end of the archive.
    ArchiveTrailing = "archive_trailing", Problem,
        "somebody appended to the file; ask for the export again";
    /// A file that must be there is not.
    FileMissing = "file_missing", Problem,
        "ask for the export again; if it is missing at the server too, its tiles must be repaired";
    /// A file is there that must not be.
    FileUnexpected = "file_unexpected", Problem,
        "it belongs to no export: somebody added it, or a newer version of Daybook wrote it";
    /// A file is there twice, or not where it belongs.
    FileOutOfOrder = "file_out_of_order", Problem,
        "somebody rearranged the archive; ask for the export again";
    /// A file is larger than any such file can be.
    FileTooLarge = "file_too_large", Problem,
        "do not unpack this archive; ask for the export again";
    /// The manifest cannot be read.
    ManifestMalformed = "manifest_malformed", Problem,
        "ask for the export again";
    /// The manifest says something else than the files.
    ManifestDiffers = "manifest_differs", Problem,
        "a file or the manifest was changed after the export was made; ask for it again";
    /// The checkpoint cannot be read.
    CheckpointMalformed = "checkpoint_malformed", Problem,
        "ask for the export again, or for the checkpoint that was published";
    /// No key that is trusted signed the checkpoint.
    CheckpointUntrusted = "checkpoint_untrusted", Problem,
        "get the log's verifier key from its operator by another way than this file, and name it with --key; keys are changed from time to time";
    /// A signature of a trusted key does not hold.
    CheckpointForged = "checkpoint_forged", Problem,
        "the checkpoint was changed after it was signed: keep the file as evidence, and ask where it came from";
    /// The checkpoint is of another log.
    OriginDiffers = "origin_differs", Problem,
        "this is the export of another ledger: compare the origins";
    /// The tree over the entries is not the signed one.
    RootDiffers = "root_differs", Problem,
        "the events are not those that were signed: keep the file as evidence, and compare with another copy";
    /// An entry is not what the tree says.
    EntryDiffers = "entry_differs", Problem,
        "this event was changed after it was signed: compare it with another copy of the ledger";
    /// A tile is not what follows from the entries.
    TileDiffers = "tile_differs", Problem,
        "the tile was changed or damaged; the events are judged by the signed root alone";
    /// A bundle of entries cannot be read.
    BundleMalformed = "bundle_malformed", Problem,
        "the bundle was changed or damaged; ask for the export again";
    /// The ledger does not go on from the kept checkpoint.
    HistoryRewritten = "history_rewritten", Problem,
        "what was signed before is not part of this ledger: keep both checkpoints, they prove it";
    /// There are two signed trees of one size.
    SplitView = "split_view", Problem,
        "the log showed two histories of the same length: keep both checkpoints, they prove it";
    /// The ledger is shorter than one that was seen before.
    Older = "older_than_kept", Notice,
        "you have verified a later checkpoint of this ledger; ask for a newer export to compare with it";
    /// The server shows less than it has shown before.
    RolledBack = "rolled_back", Problem,
        "the server has forgotten what it signed: keep the checkpoint, and ask its operator for a repair from the tiles";
    /// Nothing is at a position, and the tree says so.
    GapRecorded = "gap_recorded", Notice,
        "an event was lost before it was signed; ask the operator what happened then";
    /// An event was too large for the tree, which holds its digest instead.
    EventTooLarge = "event_too_large", Notice,
        "somebody wrote to the broker past Daybook; ask the operator for the event and compare its SHA-256";
    /// An event's envelope breaks a rule.
    EnvelopeInvalid = "envelope_invalid", Problem,
        "something else than Daybook wrote this event; ask the operator who has access to the broker";
    /// An event of a known kind cannot be read.
    EventUnreadable = "event_unreadable", Problem,
        "every fold skips it; ask the operator what wrote it";
    /// An event does not fit the schema of its kind.
    SchemaViolated = "schema_violated", Problem,
        "something else than Daybook wrote this event; ask the operator who has access to the broker";
    /// An event is of a kind that this version does not know.
    KindUnknown = "kind_unknown", Notice,
        "verify with a newer version of Daybook, which knows it";
    /// Two events claim the same revision; the first counts.
    EventOvertaken = "event_overtaken", Notice,
        "two writers were accepted at once; the first event counts, and this one changes nothing";
    /// A revision of an aggregate is missing.
    RevisionMissing = "revision_missing", Problem,
        "an event before this one is missing, or something else than Daybook wrote it";
    /// An event is not allowed in the state that it meets.
    TransitionIllegal = "transition_illegal", Problem,
        "every fold skips it; ask the operator what wrote it";
    /// The state is not the one that was claimed.
    StateDiffers = "state_differs", Problem,
        "what the server says does not follow from its events: run `daybook projections rebuild` there, and verify again";
    /// No repository came with the ledger, although it has commits.
    RepositoryMissing = "repository_missing", Notice,
        "its commits were not compared with the events; ask for an export with repositories";
    /// The ledger has commits that the copy of the repository does not have, and that may be newer.
    RepositoryBehind = "repository_behind", Notice,
        "these commits were made after the repository was copied, or were taken away from it; a newer export tells which";
    /// A repository cannot be read.
    RepositoryUnreadable = "repository_unreadable", Problem,
        "ask for the export again";
    /// A commit of Daybook has no event.
    CommitUnrecorded = "commit_unrecorded", Problem,
        "the repository has a commit in Daybook's name that the ledger does not know: ask who can push";
    /// An event names a commit that is not there.
    CommitMissing = "commit_missing", Problem,
        "the repository lost or rewrote a commit that the ledger has; restore it from a clone";
    /// A commit is not what its event says.
    CommitDiffers = "commit_differs", Problem,
        "compare the commit with its event: one of the two histories was rewritten";
    /// A commit is not signed as it should be.
    CommitUnsigned = "commit_unsigned", Problem,
        "ask the operator since when commits are signed, and who can push";
    /// A commit that somebody else made.
    CommitForeign = "commit_foreign", Notice,
        "somebody changed the repository by hand; the ledger knows it: ask whether it was allowed";
}

impl Serialize for Kind {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(self.code())
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.code())
    }
}

/// Where something was found, as exactly as it is known.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize)]
pub struct Place {
    /// The file: a member of the archive, a file of the folder, a resource of the server.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub file: Option<String>,
    /// Bytes from the beginning of the archive.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub archive_offset: Option<u64>,
    /// Bytes from the beginning of the file.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub file_offset: Option<u64>,
    /// Which entry of the bundle or hash of the tile, from 0.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub entry: Option<u16>,
    /// Position of the event.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub position: Option<Position>,
    /// The event.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub event: Option<EventId>,
}

impl Place {
    /// A whole file.
    pub fn file(name: impl Into<String>) -> Self {
        Self {
            file: Some(name.into()),
            ..Self::default()
        }
    }

    /// A byte of the archive.
    pub fn archive(offset: u64) -> Self {
        Self {
            archive_offset: Some(offset),
            ..Self::default()
        }
    }

    /// The same, at a byte of the archive.
    pub fn at(mut self, offset: Option<u64>) -> Self {
        self.archive_offset = offset;
        self
    }

    /// The same, for an event.
    pub fn position(mut self, position: Position) -> Self {
        self.position = Some(position);
        self
    }
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut parts = Vec::new();
        if let Some(position) = self.position {
            parts.push(format!("position {position}"));
        }
        if let Some(event) = self.event {
            parts.push(format!("event {event}"));
        }
        if let Some(file) = &self.file {
            parts.push(file.clone());
        }
        if let Some(entry) = self.entry {
            parts.push(format!("entry {entry}"));
        }
        if let Some(offset) = self.file_offset {
            parts.push(format!("its byte {offset}"));
        }
        if let Some(offset) = self.archive_offset {
            parts.push(format!("byte {offset} of the archive"));
        }
        f.write_str(&parts.join(", "))
    }
}

/// One finding.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// What kind, by its stable code.
    #[serde(rename = "code")]
    pub kind: Kind,
    /// What it means for the verdict.
    pub severity: Severity,
    /// Where.
    pub place: Place,
    /// What was found, in a sentence.
    pub message: String,
    /// What to do.
    pub remedy: &'static str,
}

impl Finding {
    /// A finding.
    pub fn new(kind: Kind, place: Place, message: impl Into<String>) -> Self {
        Self {
            kind,
            severity: kind.severity(),
            place,
            message: message.into(),
            remedy: kind.remedy(),
        }
    }
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let place = self.place.to_string();
        let at = if place.is_empty() { "" } else { ": " };
        write!(f, "{}: {place}{at}{}", self.kind, self.message)
    }
}

/// All that was found: every one counted, the first thousand kept.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Findings {
    counts: BTreeMap<Kind, u64>,
    kept: Vec<Finding>,
}

impl Findings {
    /// Adds one.
    pub fn add(&mut self, finding: Finding) {
        *self.counts.entry(finding.kind).or_default() += 1;
        if self.kept.len() < KEPT {
            self.kept.push(finding);
        } else if finding.severity == Severity::Problem
            && let Some(notice) = self
                .kept
                .iter()
                .rposition(|f| f.severity == Severity::Notice)
        {
            // Notices do not crowd out what decides the verdict.
            self.kept[notice] = finding;
        }
    }

    /// Adds all of others.
    pub(crate) fn merge(&mut self, others: Self) {
        let dropped = others
            .kept
            .iter()
            .fold(others.counts.clone(), |mut rest, f| {
                rest.entry(f.kind).and_modify(|count| *count -= 1);
                rest
            });
        for finding in others.kept {
            self.add(finding);
        }
        for (kind, count) in dropped {
            *self.counts.entry(kind).or_default() += count;
        }
        self.counts.retain(|_, count| *count > 0);
    }

    /// Adds one.
    pub fn push(&mut self, kind: Kind, place: Place, message: impl Into<String>) {
        self.add(Finding::new(kind, place, message));
    }

    /// Those that are kept with their places, problems first, in the order in which they were
    /// found.
    pub fn list(&self) -> impl Iterator<Item = &Finding> {
        let of = |severity| self.kept.iter().filter(move |f| f.severity == severity);
        of(Severity::Problem).chain(of(Severity::Notice))
    }

    /// How many there are of each kind.
    pub fn counts(&self) -> &BTreeMap<Kind, u64> {
        &self.counts
    }

    /// How many there are of a kind.
    pub fn count(&self, kind: Kind) -> u64 {
        self.counts.get(&kind).copied().unwrap_or(0)
    }

    /// How many problems there are.
    pub fn problems(&self) -> u64 {
        self.total(Severity::Problem)
    }

    /// How many notices there are.
    pub fn notices(&self) -> u64 {
        self.total(Severity::Notice)
    }

    /// How many were counted and not kept.
    pub fn dropped(&self) -> u64 {
        let all: u64 = self.counts.values().sum();
        all - self.kept.len() as u64
    }

    fn total(&self, severity: Severity) -> u64 {
        self.counts
            .iter()
            .filter(|(kind, _)| kind.severity() == severity)
            .map(|(_, count)| count)
            .sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_are_unique_and_lower_case() {
        let mut codes: Vec<_> = Kind::ALL.iter().map(|k| k.code()).collect();
        codes.sort_unstable();
        codes.dedup();
        assert_eq!(codes.len(), Kind::ALL.len());
        let plain = |c: char| c.is_ascii_lowercase() || c == '_';
        assert!(codes.iter().all(|c| c.chars().all(plain)));
    }

    #[test]
    fn notices_do_not_crowd_out_problems() {
        let mut findings = Findings::default();
        for number in 0..2000 {
            let place = Place::default().position(Position(number));
            findings.push(Kind::EventOvertaken, place, "two");
        }
        findings.push(Kind::EntryDiffers, Place::file("tile/entries/000"), "other");
        assert_eq!((findings.problems(), findings.notices()), (1, 2000));
        assert_eq!(
            findings.list().next().map(|f| f.kind),
            Some(Kind::EntryDiffers)
        );
        assert_eq!(findings.dropped(), 1001);
    }
}
