//! Which files a tree of a certain size has, and in which order an export has them.
//!
//! Each bundle of entries is followed by the tiles that its entries complete, so that a reader who
//! sees the files once, in order, needs to remember only the right edge of the tree.

use daybook_store::tlog::{TILE_WIDTH, TileKind, TilePath};

/// A tile has 2^8 hashes.
const HEIGHT: u32 = 8;

/// How many bundles a tree of this size has.
pub(crate) fn bundles(size: u64) -> u64 {
    size.div_ceil(TILE_WIDTH)
}

/// All bundles and tiles of a tree, in the order of an export.
#[derive(Debug, Clone)]
pub(crate) struct TreeFiles {
    size: u64,
    /// The bundle whose files come next.
    bundle: u64,
    /// Which of its files: 0 for the bundle, and 1 more than the level for a tile.
    rank: u8,
}

impl TreeFiles {
    pub(crate) fn new(size: u64) -> Self {
        Self {
            size,
            bundle: 0,
            rank: 0,
        }
    }

    /// The tile of this rank that is due after the present bundle, if there is one.
    fn due(&self) -> Option<TilePath> {
        let Some(level) = self.rank.checked_sub(1) else {
            return TilePath::in_tree(TileKind::Entries, self.bundle, self.size);
        };
        let last = self.bundle + 1 == bundles(self.size);
        let shift = HEIGHT * u32::from(level);
        let index = self.bundle >> shift;
        let completes = self.bundle & ((1_u64 << shift) - 1) == (1_u64 << shift) - 1;
        let kind = TileKind::Hashes { level };
        // At the right edge every level has what is left of it.
        (completes || last)
            .then(|| TilePath::in_tree(kind, index, self.size))
            .flatten()
    }
}

impl Iterator for TreeFiles {
    type Item = TilePath;

    fn next(&mut self) -> Option<TilePath> {
        while self.bundle < bundles(self.size) {
            let due = self.due();
            if due.is_some() {
                self.rank += 1;
                return due;
            }
            // A level that has nothing to complete has none above it that has; at the edge a
            // level may be empty although one above it is not.
            let last = self.bundle + 1 == bundles(self.size);
            if last && self.rank < 8 {
                self.rank += 1;
            } else {
                self.bundle += 1;
                self.rank = 0;
            }
        }
        None
    }
}

/// Where a file stands in the order of an export of this size; `None` for one that is not in it.
pub(crate) fn order(path: TilePath, size: u64) -> Option<(u64, u8)> {
    if TilePath::in_tree(path.kind, path.index, size) != Some(path) {
        return None;
    }
    let last = bundles(size).checked_sub(1)?;
    let (end, rank) = match path.kind {
        TileKind::Entries => (path.index, 0),
        TileKind::Hashes { level } => {
            let end = path.index.checked_add(1).and_then(|after| {
                let shift = HEIGHT * u32::from(level);
                after.checked_mul(1_u64.checked_shl(shift)?)?.checked_sub(1)
            });
            (end.unwrap_or(u64::MAX), level + 1)
        }
    };
    Some((end.min(last), rank))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    /// Every file of a tree, by the definition.
    fn all(size: u64) -> BTreeSet<String> {
        let mut all = BTreeSet::new();
        let kinds = (0..8).map(|level| TileKind::Hashes { level });
        for kind in kinds.chain([TileKind::Entries]) {
            let mut index = 0;
            while let Some(path) = TilePath::in_tree(kind, index, size) {
                all.insert(path.to_string());
                index += 1;
            }
        }
        all
    }

    #[test]
    fn every_file_is_there_once_and_in_order() {
        let edges = [0, 1, 255, 256, 257, 511, 512, 513, 65_535, 65_536, 65_537];
        let more = [131_071, 131_072, 131_328, 200_000, 65_536 * 3 + 256];
        for size in edges.into_iter().chain(more) {
            let listed: Vec<_> = TreeFiles::new(size).collect();
            let names: BTreeSet<_> = listed.iter().map(ToString::to_string).collect();
            assert_eq!(names.len(), listed.len(), "{size}: a file is there twice");
            assert_eq!(names, all(size), "{size}");
            let orders: Vec<_> = listed.iter().map(|p| order(*p, size).unwrap()).collect();
            assert!(orders.is_sorted_by(|a, b| a < b), "{size}: {orders:?}");
        }
    }
}
