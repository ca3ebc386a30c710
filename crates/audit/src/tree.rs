//! The tree over entries, computed here and not taken from anybody: RFC 6962.

use daybook_store::tlog::{Hash, TILE_WIDTH, empty_root, node_hash};

/// The root over some leaves, as many as one likes; `None` over none.
pub(crate) fn root_over(leaves: &[Hash]) -> Option<Hash> {
    match leaves {
        [] => None,
        [leaf] => Some(*leaf),
        _ => {
            let left = 1 << (leaves.len() - 1).ilog2();
            let (left, right) = leaves.split_at(left);
            Some(node_hash(&root_over(left)?, &root_over(right)?))
        }
    }
}

/// A tree that grows by whole tiles of leaves, of which only the right edge is remembered.
#[derive(Debug, Clone, Default)]
pub(crate) struct Edge {
    /// Complete subtrees from left to right: their heights above a tile, and their hashes.
    subtrees: Vec<(u32, Hash)>,
}

impl Edge {
    /// Adds the root over a full tile of leaves.
    pub(crate) fn push(&mut self, tile: Hash) {
        let mut added = (0, tile);
        while let Some((height, left)) = self.subtrees.pop_if(|(height, _)| *height == added.0) {
            added = (height + 1, node_hash(&left, &added.1));
        }
        self.subtrees.push(added);
    }

    /// The root, with the root over a last tile that is not full.
    pub(crate) fn root(&self, tail: Option<Hash>) -> Hash {
        let mut subtrees = self.subtrees.iter().rev().map(|(_, hash)| *hash);
        let Some(last) = tail.or_else(|| subtrees.next()) else {
            return empty_root();
        };
        subtrees.fold(last, |right, left| node_hash(&left, &right))
    }
}

/// The hashes of the tiles above the leaves, which follow from those below.
#[derive(Debug, Default)]
pub(crate) struct Levels {
    /// For each level from 1, the hashes of its tile that is not full yet.
    open: Vec<Vec<Hash>>,
}

impl Levels {
    /// Adds the root over a full tile of leaves. Full tiles of higher levels stay until
    /// [`take`](Self::take).
    pub(crate) fn push(&mut self, tile: Hash) {
        if self.open.is_empty() {
            self.open.push(Vec::new());
        }
        self.open[0].push(tile);
    }

    /// The hashes of the present tile of a level, from 1. A full one makes room for the next one,
    /// and adds its root to the level above.
    pub(crate) fn take(&mut self, level: u8) -> Vec<Hash> {
        let Some(open) = self.open.get_mut(usize::from(level) - 1) else {
            return Vec::new();
        };
        if (open.len() as u64) < TILE_WIDTH {
            return open.clone();
        }
        let full = std::mem::take(open);
        if self.open.len() == usize::from(level) {
            self.open.push(Vec::new());
        }
        self.open[usize::from(level)].extend(root_over(&full));
        full
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use bytes::Bytes;
    use daybook_store::tlog::{Growth, leaf_hash};

    #[test]
    fn roots_are_those_that_the_notary_computes() {
        let mut growth = Growth::empty();
        let mut edge = Edge::default();
        let mut leaves = Vec::new();
        for index in 0..70_000_u64 {
            let tail = || edge.root(root_over(&leaves));
            if index % 256 < 3 || index % 97 == 0 {
                assert_eq!(tail(), growth.head().root, "{index}");
            }
            let entry = Bytes::from(index.to_string());
            leaves.push(leaf_hash(&entry));
            growth.push(entry).unwrap();
            if leaves.len() == 256 {
                edge.push(root_over(&leaves).unwrap());
                leaves.clear();
            }
        }
    }
}
