//! Whether one signed tree is the beginning of another.

use bytes::Bytes;
use daybook_store::tlog::{
    Checkpoint, CheckpointError, Hash, ProofError, ReadTiles, TreeError, TreeReader, VerifierKey,
    verify_consistency,
};
use serde::Serialize;

/// How two checkpoints of a log compare.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case", tag = "outcome")]
pub enum Consistency {
    /// They are of the same tree.
    Same {
        /// Its size.
        size: u64,
    },
    /// The newer tree begins with all of the older one, and the proof shows it.
    Extends {
        /// Size of the older tree.
        old: u64,
        /// Size of the newer tree.
        new: u64,
        /// The proof, as RFC 6962 has it.
        #[serde(skip)]
        proof: Vec<Hash>,
    },
    /// The log signed two trees of which neither is the beginning of the other. Both checkpoints
    /// together prove it to anybody.
    SplitView {
        /// Size of the older tree.
        old: u64,
        /// Size of the newer tree.
        new: u64,
    },
    /// The tiles lead to no tree that was signed, so that nothing can be said.
    TilesDiffer {
        /// Size of the tree that they should lead to.
        size: u64,
    },
}

/// Why checkpoints could not be compared.
#[derive(Debug, thiserror::Error)]
pub enum ConsistencyError {
    /// A checkpoint is not to be believed.
    #[error("the {which} checkpoint is not to be believed")]
    Checkpoint {
        /// Which of the two.
        which: &'static str,
        /// Why.
        source: CheckpointError,
    },
    /// The tiles cannot be read.
    #[error("the tiles for the proof cannot be read")]
    Tree(#[from] TreeError),
}

/// Compares two signed checkpoints of the log with this origin, with a proof that is computed from
/// tiles which reach up to the newer one. The tiles need not be trusted: that a tree was rewritten
/// is said only if they lead to the root that was signed for the newer one.
pub async fn consistency(
    one: &Bytes,
    other: &Bytes,
    origin: &str,
    keys: &[VerifierKey],
    tiles: &dyn ReadTiles,
) -> Result<Consistency, ConsistencyError> {
    let open = |which, note: &Bytes| {
        Checkpoint::open(note, origin, keys)
            .map_err(|source| ConsistencyError::Checkpoint { which, source })
    };
    let (one, other) = (open("first", one)?.head, open("second", other)?.head);
    let (old, new) = if one.size <= other.size {
        (one, other)
    } else {
        (other, one)
    };
    let split = Consistency::SplitView {
        old: old.size,
        new: new.size,
    };
    if old.size == new.size {
        let same = old.root == new.root;
        return Ok(if same {
            Consistency::Same { size: old.size }
        } else {
            split
        });
    }
    let tree = TreeReader::new(tiles, new.size);
    let proof = tree.consistency(old.size).await?;
    match verify_consistency(&old, &new, &proof) {
        Ok(()) => Ok(Consistency::Extends {
            old: old.size,
            new: new.size,
            proof,
        }),
        // The proof may fail because the tiles are wrong, or because the tree was rewritten.
        Err(ProofError::Root { .. }) if tree.root().await? == new.root => Ok(split),
        Err(_) => Ok(Consistency::TilesDiffer { size: new.size }),
    }
}
