//! Verifying proofs: pure functions over what somebody sent, as RFC 9162 (2.1.3.2, 2.1.4.2) has
//! them. They read no tile and never panic.

use super::hash::{Hash, empty_root, node_hash};
use daybook_events::tree::TreeHead;

/// Why a proof proves nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum ProofError {
    /// The tree has no such leaf.
    #[error("leaf {index} is not in a tree of {size}")]
    OutOfRange {
        /// The leaf, from 0.
        index: u64,
        /// The size of the tree.
        size: u64,
    },
    /// The first tree is larger than the second.
    #[error("a tree of {old} cannot have grown into one of {new}")]
    Shrunk {
        /// Size of the first.
        old: u64,
        /// Size of the second.
        new: u64,
    },
    /// There are too many or too few hashes.
    #[error("the proof has {found} hashes; another number is needed")]
    Length {
        /// How many there are.
        found: usize,
    },
    /// The hashes lead to another root than the signed one: the leaf, the proof or the root was
    /// changed, or they are of different trees.
    #[error("the proof does not lead to the root of the tree of {size}")]
    Root {
        /// The tree whose root was not reached.
        size: u64,
    },
}

/// Checks that a leaf stands at an index, from 0, of the tree with this head.
pub fn verify_inclusion(
    leaf: &Hash,
    index: u64,
    head: &TreeHead,
    proof: &[Hash],
) -> Result<(), ProofError> {
    let size = head.size;
    if index >= size {
        return Err(ProofError::OutOfRange { index, size });
    }
    let length = ProofError::Length { found: proof.len() };
    let mut node = index;
    let mut last = size - 1;
    let mut hash = *leaf;
    for sibling in proof {
        if last == 0 {
            return Err(length);
        }
        if node & 1 == 1 || node == last {
            hash = node_hash(sibling, &hash);
            while node & 1 == 0 && node != 0 {
                node >>= 1;
                last >>= 1;
            }
        } else {
            hash = node_hash(&hash, sibling);
        }
        node >>= 1;
        last >>= 1;
    }
    if last != 0 {
        return Err(length);
    }
    if hash != head.root {
        return Err(ProofError::Root { size });
    }
    Ok(())
}

/// Checks that the tree with the head `new` begins with all of the tree with the head `old`.
pub fn verify_consistency(
    old: &TreeHead,
    new: &TreeHead,
    proof: &[Hash],
) -> Result<(), ProofError> {
    if old.size > new.size {
        return Err(ProofError::Shrunk {
            old: old.size,
            new: new.size,
        });
    }
    let length = ProofError::Length { found: proof.len() };
    let wrong = |size| ProofError::Root { size };
    if old.size == 0 || old.size == new.size {
        if !proof.is_empty() {
            return Err(length);
        }
        if old.size == 0 && old.root != empty_root() {
            return Err(wrong(0));
        }
        if old.size == new.size && old.root != new.root {
            return Err(wrong(new.size));
        }
        return Ok(());
    }
    // A tree that is complete is itself the first hash, which is then left out.
    let (first, rest) = if old.size.is_power_of_two() {
        (old.root, proof)
    } else {
        let (first, rest) = proof.split_first().ok_or(length)?;
        (*first, rest)
    };
    let mut node = old.size - 1;
    let mut last = new.size - 1;
    while node & 1 == 1 {
        node >>= 1;
        last >>= 1;
    }
    let (mut old_hash, mut new_hash) = (first, first);
    for sibling in rest {
        if last == 0 {
            return Err(length);
        }
        if node & 1 == 1 || node == last {
            old_hash = node_hash(sibling, &old_hash);
            new_hash = node_hash(sibling, &new_hash);
            while node & 1 == 0 && node != 0 {
                node >>= 1;
                last >>= 1;
            }
        } else {
            new_hash = node_hash(&new_hash, sibling);
        }
        node >>= 1;
        last >>= 1;
    }
    if last != 0 {
        return Err(length);
    }
    if old_hash != old.root {
        return Err(wrong(old.size));
    }
    if new_hash != new.root {
        return Err(wrong(new.size));
    }
    Ok(())
}
