//! Hashing of RFC 6962: leaves and nodes are told apart by their first byte.

use sha2::{Digest, Sha256};

/// A SHA-256 hash: of a leaf, a node or a whole tree.
pub type Hash = [u8; 32];

/// The hash of a leaf that holds these bytes.
pub fn leaf_hash(entry: &[u8]) -> Hash {
    let mut hasher = Sha256::new();
    hasher.update([0]);
    hasher.update(entry);
    hasher.finalize().into()
}

/// The hash of a node over two subtrees.
pub fn node_hash(left: &Hash, right: &Hash) -> Hash {
    let mut bytes = [1; 65];
    bytes[1..33].copy_from_slice(left);
    bytes[33..].copy_from_slice(right);
    Sha256::digest(bytes).into()
}

/// The root of the tree without leaves.
pub fn empty_root() -> Hash {
    Sha256::digest([]).into()
}

/// The root over leaves or complete subtrees of equal height, as many as a power of two.
pub(super) fn complete_root(hashes: &[Hash]) -> Option<Hash> {
    if !hashes.len().is_power_of_two() {
        return None;
    }
    let mut row = hashes.to_vec();
    while row.len() > 1 {
        row = row
            .as_chunks::<2>()
            .0
            .iter()
            .map(|[left, right]| node_hash(left, right))
            .collect();
    }
    row.pop()
}

/// The root over complete subtrees of equal height, followed by a smaller tree where there is one.
pub(super) fn root_with_tail(hashes: &[Hash], tail: Option<Hash>) -> Option<Hash> {
    let mut root = tail;
    let mut rest = hashes;
    while !rest.is_empty() {
        // The rightmost complete subtree is as large as the lowest bit of the count.
        let width = 1 << rest.len().trailing_zeros();
        let (before, subtree) = rest.split_at(rest.len() - width);
        let left = complete_root(subtree)?;
        root = Some(match root {
            Some(right) => node_hash(&left, &right),
            None => left,
        });
        rest = before;
    }
    root
}
