//! A tree that grows: its right edge, and the files that it takes to write down what is new.

use bytes::{Bytes, BytesMut};
use daybook_events::tree::TreeHead;

use super::bundle::{EntryTooLarge, encode_bundle};
use super::hash::{Hash, complete_root, empty_root, leaf_hash, root_with_tail};
use super::path::{TILE_HEIGHT, TILE_WIDTH, TileKind, TilePath};
use super::reader::{TreeError, TreeReader};

/// The right edge of a tree, to which leaves are added.
#[derive(Debug, Clone)]
pub struct Growth {
    size: u64,
    /// For each level, the hashes of the tile that is not full yet: fewer than 256.
    levels: Vec<Vec<Hash>>,
    /// The entries of the bundle that is not full yet.
    entries: Vec<Bytes>,
    /// The last leaf.
    newest: Option<Hash>,
    /// Tiles and bundles that became full and were not taken yet.
    full: Vec<(TilePath, Bytes)>,
}

impl Growth {
    /// A tree without leaves.
    pub fn empty() -> Self {
        Self {
            size: 0,
            levels: Vec::new(),
            entries: Vec::new(),
            newest: None,
            full: Vec::new(),
        }
    }

    /// Continues a tree from its tiles.
    pub async fn load(tree: &TreeReader<'_>) -> Result<Self, TreeError> {
        let size = tree.size();
        let mut levels = Vec::new();
        let mut rest = size;
        while rest > 0 {
            let width = rest % TILE_WIDTH;
            rest >>= TILE_HEIGHT;
            let hashes = match width {
                0 => Vec::new(),
                _ => tree.hashes(levels.len() as u8, rest).await?.to_vec(),
            };
            levels.push(hashes);
        }
        let entries = match size % TILE_WIDTH {
            0 => Vec::new(),
            _ => tree.entries(size / TILE_WIDTH).await?,
        };
        Ok(Self {
            size,
            levels,
            entries,
            newest: match size {
                0 => None,
                _ => Some(tree.leaf(size - 1).await?),
            },
            full: Vec::new(),
        })
    }

    /// How many leaves it has.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// The hash of the last leaf.
    pub(super) fn newest_leaf(&self) -> Option<Hash> {
        self.newest
    }

    /// Adds a leaf.
    pub fn push(&mut self, entry: Bytes) -> Result<(), EntryTooLarge> {
        if entry.len() > usize::from(u16::MAX) {
            return Err(EntryTooLarge(entry.len()));
        }
        let mut hash = leaf_hash(&entry);
        self.newest = Some(hash);
        self.entries.push(entry);
        let index = self.size / TILE_WIDTH;
        self.size += 1;
        if self.size.is_multiple_of(TILE_WIDTH) {
            let bundle = encode_bundle(&std::mem::take(&mut self.entries))?;
            self.full
                .push((TilePath::full(TileKind::Entries, index), bundle));
        }
        for level in 0_u8.. {
            if self.levels.len() == usize::from(level) {
                self.levels.push(Vec::with_capacity(TILE_WIDTH as usize));
            }
            let hashes = &mut self.levels[usize::from(level)];
            hashes.push(hash);
            if (hashes.len() as u64) < TILE_WIDTH {
                break;
            }
            let hashes = std::mem::take(hashes);
            let index = (self.size >> (TILE_HEIGHT * (u32::from(level) + 1))) - 1;
            let tile = TilePath::full(TileKind::Hashes { level }, index);
            self.full.push((tile, concatenated(&hashes)));
            match complete_root(&hashes) {
                Some(root) => hash = root,
                None => break,
            }
        }
        Ok(())
    }

    /// The head of the tree as it is.
    pub fn head(&self) -> TreeHead {
        let root = self
            .levels
            .iter()
            .fold(None, |below, hashes| root_with_tail(hashes, below));
        TreeHead {
            size: self.size,
            root: root.unwrap_or_else(empty_root),
        }
    }

    /// Everything that has to be stored before this size can be signed, as far as it was not
    /// stored for an earlier one: see [`stored`](Self::stored).
    pub fn files(&self) -> Result<Vec<(TilePath, Bytes)>, EntryTooLarge> {
        let mut files = self.full.clone();
        let partial = |kind, level: u32| {
            let index = self.size >> (TILE_HEIGHT * (level + 1));
            TilePath::in_tree(kind, index, self.size)
        };
        if !self.entries.is_empty()
            && let Some(path) = partial(TileKind::Entries, 0)
        {
            files.push((path, encode_bundle(&self.entries)?));
        }
        for (level, hashes) in self.levels.iter().enumerate() {
            let kind = TileKind::Hashes { level: level as u8 };
            if !hashes.is_empty()
                && let Some(path) = partial(kind, level as u32)
            {
                files.push((path, concatenated(hashes)));
            }
        }
        Ok(files)
    }

    /// Forgets what [`files`](Self::files) returned, now that it is stored, and says which tiles
    /// became full by it.
    pub fn stored(&mut self) -> Vec<TilePath> {
        std::mem::take(&mut self.full)
            .into_iter()
            .map(|(path, _)| path)
            .collect()
    }
}

fn concatenated(hashes: &[Hash]) -> Bytes {
    let mut bytes = BytesMut::with_capacity(32 * hashes.len());
    hashes.iter().for_each(|hash| bytes.extend_from_slice(hash));
    bytes.freeze()
}
