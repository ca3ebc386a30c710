//! Receipts: that certain events about one deployment are in a signed ledger, in one file.
//!
//! A receipt is an archive of the same strict form as an export:
//!
//! ```text
//! RECEIPT              what it is about, in JSON of one exact form
//! events/<position>    the exact bytes of an event
//! proofs/<position>    its proof, in the form of C2SP tlog-proof, with the checkpoint in it
//! keys                 the keys that the log had
//! ```
//!
//! Every byte of it is covered: by a signature, by a proof, or by being the only way to write what
//! was proven.

use std::collections::BTreeMap;
use std::io;

use bytes::Bytes;
use daybook_events::aggregate::Void;
use daybook_events::build::BuildEvent;
use daybook_events::deployment::{Deployment, DeploymentEvent};
use daybook_events::tree::TreeHead;
use daybook_events::with_causes;
use daybook_events::{DeploymentId, Event, EventId, Folded, Position};
use daybook_store::tlog::{
    Checkpoint, CheckpointError, ProofFile, ReadTiles, TreeError, TreeReader, VerifierKey,
    parse_verifiers,
};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::about::{Events, events_of};
pub use crate::about::{Look, named};
use crate::archive::{Reader, Stop, Writer};
use crate::source::{CHECKPOINT, KEYS};
use crate::verify::Trust;

/// The version of the format.
pub const FORMAT: &str = "daybook.dev/receipt/v1";
const SUBJECT: &str = "RECEIPT";
/// No deployment has more events in a receipt.
pub(crate) const MAX_EVENTS: usize = 10_000;
/// No file of a receipt is larger.
const MAX_FILE: u64 = 16 << 20;

/// What a receipt says. All of it follows from the events in it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Statement {
    /// The version of the format.
    pub format: String,
    /// The deployment.
    pub deployment: DeploymentId,
    /// The log.
    pub origin: String,
    /// How many entries the ledger had.
    pub size: u64,
    /// SHA-256 of the signed checkpoint, which every proof has in it.
    pub checkpoint: String,
    /// SHA-256 of the keys that the log had.
    pub keys: String,
    /// What was deployed where: `project.environment.service`.
    pub instance: String,
    /// Who asked for it.
    pub requested_by: String,
    /// The digest of its image, once there was one.
    pub image: Option<String>,
    /// The commit in the GitOps repository that introduced it, once there was one.
    pub commit: Option<String>,
    /// How it ended, as far as the ledger went: the type of its last event.
    pub last_event: String,
    /// What is in it, in the order of the ledger.
    pub events: Vec<Line>,
    /// What this does not prove.
    pub caveat: String,
}

/// One event of a receipt.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Line {
    /// Its place in the ledger.
    pub position: Position,
    /// Its id.
    pub id: EventId,
    /// Its type.
    pub kind: String,
}

/// Said in every receipt.
const CAVEAT: &str = "These events are in the ledger. Whether there are others about this deployment, \
     a receipt cannot prove: verify the whole ledger for that.";

/// Why no receipt was made.
#[derive(Debug, thiserror::Error)]
pub enum ReceiptError {
    /// The ledger has no such deployment, as far as it was signed.
    #[error("the signed ledger of {size} entries has no deployment {deployment}")]
    NotFound {
        /// The deployment, or what was given of its id.
        deployment: String,
        /// How far the ledger was signed.
        size: u64,
    },
    /// What was given of an id is the beginning or the end of several.
    #[error("several deployments have an id like {part}: {}", list(found))]
    Ambiguous {
        /// What was given.
        part: String,
        /// Two of them, at least.
        found: Vec<DeploymentId>,
    },
    /// Nothing was signed yet.
    #[error("the ledger has no checkpoint: nothing was signed yet")]
    NothingSigned,
    /// The checkpoint is none.
    #[error("the checkpoint cannot be read")]
    Checkpoint(#[from] CheckpointError),
    /// The tree cannot be read.
    #[error("the tree cannot be read")]
    Tree(#[from] TreeError),
    /// An event cannot be read.
    #[error("the event at {position} cannot be read: {reason}")]
    Event {
        /// Where.
        position: Position,
        /// What is wrong with it.
        reason: String,
    },
    /// A file cannot be read or written.
    #[error("the receipt cannot be made")]
    Io(#[from] io::Error),
}

fn list(ids: &[DeploymentId]) -> String {
    let ids: Vec<String> = ids.iter().map(ToString::to_string).collect();
    ids.join(", ")
}

/// Makes the receipt of a deployment, as its ledger was signed last. Events that cannot be read
/// are left out: a receipt says nothing about what is not in it.
pub async fn receipt(
    tiles: &dyn ReadTiles,
    deployment: DeploymentId,
    look: &Look,
    progress: &mut (dyn FnMut(u64, u64) + Send),
) -> Result<(Statement, Vec<u8>), ReceiptError> {
    let note = tiles.get(CHECKPOINT).await?;
    let note = note.ok_or(ReceiptError::NothingSigned)?;
    let keys = tiles.get(KEYS).await?.unwrap_or_default();
    let (checkpoint, _) = Checkpoint::parse_unverified(&note)?;
    let tree = TreeReader::new(tiles, checkpoint.head.size);
    let events = events_of(&tree, deployment, look, progress).await?;
    let statement = state(
        &Signed {
            origin: &checkpoint.origin,
            head: checkpoint.head,
            note: &note,
            keys: &keys,
        },
        &events,
        deployment,
    )
    .map_err(|(position, reason)| ReceiptError::Event { position, reason })?;
    let mut writer = Writer::new(Vec::new());
    let text = written(&statement)?;
    writer.file(SUBJECT, text.len() as u64, text.as_bytes())?;
    for (position, bytes) in &events {
        let name = format!("events/{position}");
        writer.file(&name, bytes.len() as u64, bytes.as_ref())?;
        let proof = tree.proof_file(position.0 - 1, note.clone()).await?;
        let proof = proof.to_string();
        let name = format!("proofs/{position}");
        writer.file(&name, proof.len() as u64, proof.as_bytes())?;
    }
    writer.file(KEYS, keys.len() as u64, keys.as_ref())?;
    Ok((statement, writer.finish()?))
}

/// The only way in which a statement is written.
fn written(statement: &Statement) -> io::Result<String> {
    let mut text = serde_json::to_string_pretty(statement)?;
    text.push('\n');
    Ok(text)
}

/// The tree that events are proven to be in.
struct Signed<'a> {
    origin: &'a str,
    head: TreeHead,
    note: &'a [u8],
    keys: &'a [u8],
}

fn sha256(bytes: &[u8]) -> String {
    format!("sha256:{}", hex::encode(Sha256::digest(bytes)))
}

/// What some events say of the deployment that they are about.
fn state(
    signed: &Signed<'_>,
    events: &Events,
    deployment: DeploymentId,
) -> Result<Statement, (Position, String)> {
    let mut lines = Vec::new();
    let mut requested = None;
    let mut image = None;
    let mut commit = None;
    let mut last = None;
    let mut folded: Folded<Deployment> = Folded::default();
    for (position, bytes) in events {
        let event = Event::from_bytes(bytes).map_err(|e| (*position, e.to_string()))?;
        lines.push(Line {
            position: *position,
            id: event.id,
            kind: event.short_kind().to_owned(),
        });
        let mut own = |id: &str| {
            if deployment.to_string() != id {
                return false;
            }
            // As in every fold, what is void changes nothing. A receipt need not have all events, so
            // that those after one that is missing count; of a newer version something is known.
            let void = folded
                .apply(*position, &event)
                .is_err_and(|void| !matches!(void, Void::Gap { .. } | Void::Unknown(_)));
            if !void {
                last = Some(event.short_kind().to_owned());
            }
            !void
        };
        let mut tokens = event.subject.split('/').skip(2);
        match (tokens.next(), tokens.next()) {
            (Some("deployment"), Some(id)) if own(id) => match event.payload() {
                Ok(DeploymentEvent::Requested(e)) => {
                    let who = format!("{}/{}", event.authtype, event.authid);
                    let id: Option<DeploymentId> = id.parse().ok();
                    requested.get_or_insert((id, e.instance.to_string(), who));
                }
                Ok(DeploymentEvent::ImagePinned(e)) => {
                    image = Some(format!("{}@{}", e.image.repository, e.image.digest));
                }
                Ok(DeploymentEvent::ChartPinned(e)) => image = Some(e.chart.to_string()),
                Ok(DeploymentEvent::DeployingStarted(e)) => commit = Some(e.commit.to_string()),
                _ => {}
            },
            (Some("build"), _) => {
                if let (Ok(BuildEvent::Succeeded(e)), None) = (event.payload(), &image) {
                    image = Some(format!("{}@{}", e.image.repository, e.image.digest));
                }
            }
            _ => {}
        }
    }
    let first = events.keys().next().copied().unwrap_or(Position::ZERO);
    let Some((Some(id), instance, requested_by)) = requested else {
        return Err((
            first,
            "the request of the deployment is not among them".into(),
        ));
    };
    Ok(Statement {
        format: FORMAT.to_owned(),
        deployment: id,
        origin: signed.origin.to_owned(),
        size: signed.head.size,
        checkpoint: sha256(signed.note),
        keys: sha256(signed.keys),
        instance,
        requested_by,
        image,
        commit,
        last_event: last.unwrap_or_default(),
        events: lines,
        caveat: CAVEAT.to_owned(),
    })
}

/// A part of a receipt that does not hold.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error, Serialize)]
#[error("{part}: {message}")]
pub struct Broken {
    /// Which part: a file of the receipt, or a byte of it.
    pub part: String,
    /// What is wrong, in a sentence.
    pub message: String,
}

/// A receipt that holds.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Checked {
    /// What it proves.
    pub statement: Statement,
    /// Whose word was taken for the keys.
    pub trust: Trust,
    /// Whose signatures hold, by name and id.
    pub signed_by: Vec<String>,
}

/// Checks a receipt: every event's bytes, its proof, the signature under the checkpoint, and that
/// it says nothing but what follows from the events. `given` are keys that are trusted; without
/// any those that were `kept`, and without these the ones in the receipt.
pub fn check_receipt(
    bytes: &[u8],
    given: &[VerifierKey],
    kept: impl FnOnce(&str) -> Vec<VerifierKey>,
) -> Result<Checked, Broken> {
    let broken = |part: &str, message: String| Broken {
        part: part.to_owned(),
        message,
    };
    let files = unpack(bytes)?;
    let file = |name: &str| {
        files
            .get(name)
            .ok_or_else(|| broken(name, "it is missing".into()))
    };
    let subject = file(SUBJECT)?;
    let claimed: Statement = serde_json::from_slice(subject)
        .map_err(|e| broken(SUBJECT, format!("it is no statement: {e}")))?;
    if claimed.format != FORMAT {
        let message = format!(
            "it has the format {:?}; this version knows {FORMAT}",
            claimed.format
        );
        return Err(broken(SUBJECT, message));
    }
    let came = String::from_utf8(file(KEYS)?.to_vec())
        .map_err(|_| broken(KEYS, "it is not text".into()))?;
    let own =
        parse_verifiers(&came).map_err(|(line, e)| broken(KEYS, format!("line {line}: {e}")))?;
    // Nothing that could be changed may stand beside the keys.
    if own.iter().map(|k| format!("{k}\n")).collect::<String>() != came {
        return Err(broken(KEYS, "it is not one key a line".into()));
    }
    let (trust, keys) = if !given.is_empty() {
        (Trust::Given, given.to_vec())
    } else {
        match kept(&claimed.origin) {
            keys if keys.is_empty() => (Trust::FirstUse, own.clone()),
            keys => (Trust::Kept, keys),
        }
    };
    let mut events = Events::new();
    let mut head: Option<(TreeHead, Bytes)> = None;
    let mut expected = vec![SUBJECT.to_owned()];
    for line in &claimed.events {
        let position = line.position;
        let (event, proof) = (format!("events/{position}"), format!("proofs/{position}"));
        let entry = file(&event)?;
        let proof_bytes = file(&proof)?;
        let parsed = ProofFile::parse(proof_bytes).map_err(|e| broken(&proof, with_causes(&e)))?;
        if position.0.checked_sub(1) != Some(parsed.index) || parsed.extra.is_some() {
            let message = format!(
                "it is of leaf {}, and not of position {position}",
                parsed.index
            );
            return Err(broken(&proof, message));
        }
        if parsed.to_string().as_bytes() != proof_bytes.as_ref() {
            return Err(broken(&proof, "it is not written as a proof is".into()));
        }
        let checkpoint = parsed
            .verify(entry, &claimed.origin, &keys)
            .map_err(|e| match e {
                daybook_store::tlog::ProofFileError::Proof(e) => broken(
                    &event,
                    format!("the proof does not lead from it to the signed root: {e}"),
                ),
                other => broken(&proof, with_causes(&other)),
            })?;
        let this = (checkpoint.head, parsed.checkpoint.clone());
        if *head.get_or_insert_with(|| this.clone()) != this {
            return Err(broken(
                &proof,
                "it has another checkpoint than the others".into(),
            ));
        }
        if events.insert(position, entry.clone()).is_some() {
            return Err(broken(
                SUBJECT,
                format!("position {position} is listed twice"),
            ));
        }
        expected.extend([event, proof]);
    }
    expected.push(KEYS.to_owned());
    let Some((head, note)) = head else {
        return Err(broken(SUBJECT, "it lists no event".into()));
    };
    if let Some(name) = files.keys().find(|name| !expected.contains(name)) {
        return Err(broken(name, "it belongs to no receipt".into()));
    }
    let signed = Signed {
        origin: &claimed.origin,
        head,
        note: &note,
        keys: came.as_bytes(),
    };
    let follows = state(&signed, &events, claimed.deployment)
        .map_err(|(position, why)| broken(&format!("events/{position}"), why))?;
    let text = written(&follows).map_err(|e| broken(SUBJECT, e.to_string()))?;
    if text.as_bytes() != subject.as_ref() {
        let message = "it says something else than follows from the events".to_owned();
        return Err(broken(SUBJECT, message));
    }
    let (_, note) =
        Checkpoint::parse_unverified(&note).map_err(|e| broken(SUBJECT, with_causes(&e)))?;
    let good = note
        .verify(&keys)
        .map_err(|e| broken(SUBJECT, with_causes(&e)))?;
    // The keys in the receipt are those that its checkpoint is signed with, or older ones.
    Ok(Checked {
        statement: follows,
        trust,
        signed_by: good
            .iter()
            .map(|k| format!("{}+{}", k.name(), k.id()))
            .collect(),
    })
}

fn unpack(bytes: &[u8]) -> Result<BTreeMap<String, Bytes>, Broken> {
    let broken = |stop| match stop {
        Stop::Broken(finding) => Broken {
            part: finding.place.to_string(),
            message: finding.message,
        },
        Stop::Io(e) => Broken {
            part: "the receipt".to_owned(),
            message: e.to_string(),
        },
    };
    let mut reader = Reader::new(Box::new(io::Cursor::new(bytes.to_vec())));
    let mut files = BTreeMap::new();
    while let Some(member) = reader.peek().map_err(broken)? {
        let name = member.name.clone();
        let content = reader.read(MAX_FILE).map_err(broken)?;
        if files.insert(name.clone(), content).is_some() || files.len() > 2 * MAX_EVENTS + 2 {
            return Err(Broken {
                part: name,
                message: "it is there twice, or there are too many files".into(),
            });
        }
    }
    Ok(files)
}
