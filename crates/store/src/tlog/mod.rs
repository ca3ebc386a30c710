//! The log as a transparency log: an RFC 6962 tree over it in tiles, with signed checkpoints.
//!
//! - [`Notary`] reads the log in order, maintains the tree in a [`TileStorage`] and signs it with
//!   the keys of a [`KeyRing`]. It notices when the log is not what was signed.
//! - [`FolderTree`] and [`Notary::tree`] show what is published to the other parts of Daybook, and
//!   [`GuardedLog`] stops appends to a log that is broken. [`repair`] restores one from its tiles.
//! - [`TreeReader`] reads a tree from its tiles, wherever those are ([`ReadTiles`]), and computes
//!   proofs; [`verify_inclusion`], [`verify_consistency`], [`Checkpoint::open`] and
//!   [`ProofFile::verify`] check them.
//!
//! Formats are those of C2SP: tlog-tiles, tlog-checkpoint, signed-note, tlog-proof. Leaf `i` is the
//! event at position `i + 1`: its exact stored bytes.

mod bundle;
mod checkpoint;
mod compare;
mod dsse;
mod growth;
mod guard;
mod hash;
mod keys;
mod leaf;
mod ledger_state;
mod notary;
mod note;
mod path;
mod proof_file;
mod published;
mod reader;
mod repair;
mod storage;
#[cfg(test)]
mod tests;
mod verify;

pub use bundle::{BundleError, EntryTooLarge, decode_bundle, encode_bundle, entry_places};
pub use checkpoint::{Checkpoint, CheckpointError};
pub use dsse::{Envelope, EnvelopeError, EnvelopeSignature};
pub use growth::Growth;
pub use guard::GuardedLog;
pub use hash::{Hash, empty_root, leaf_hash, node_hash};
pub use keys::{KeyFileError, KeyRing, parse_verifiers};
pub use leaf::{event_entry, gap_entry, is_gap};
pub use ledger_state::{StateError, breach_code, codes};

pub use notary::{Notary, NotaryError, NotaryOptions};
pub use note::{
    GenerateError, KeyError, KeyId, NoteError, NoteSignature, SignatureError, SignedNote,
    SignerKey, VerifierKey,
};
pub use path::{InvalidTilePath, TILE_WIDTH, TileKind, TilePath};
pub use proof_file::{ProofFile, ProofFileError};
pub use published::FolderTree;
pub use reader::{Published, ReadTiles, TreeError, TreeReader};
pub use repair::{
    RecheckError, RepairError, Repaired, clear_breach, compare_log, is_repairable, recheck, repair,
};
pub use storage::{FolderStorage, StorageError, TileStorage};
pub use verify::{ProofError, verify_consistency, verify_inclusion};
