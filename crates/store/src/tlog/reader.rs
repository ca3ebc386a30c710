//! Reading a tree from its tiles, and the proofs that follow from them.

use std::collections::HashMap;
use std::fmt;
use std::io;
use std::sync::{Arc, Mutex, PoisonError};

use async_trait::async_trait;
use bytes::Bytes;

use super::bundle::decode_bundle;
use super::hash::{Hash, complete_root, empty_root, node_hash};
use super::path::{TILE_HEIGHT, TILE_WIDTH, TileKind, TilePath};
use super::proof_file::ProofFile;
use daybook_events::tree::{PublishedTree, TreeHead};

/// Tiles of hashes that a reader remembers: 8 KiB each.
const REMEMBERED: usize = 128;

/// Where the static resources of a tree can be read: a folder, an archive, a server.
#[async_trait]
pub trait ReadTiles: fmt::Debug + Send + Sync {
    /// One resource by its path below the prefix, such as `checkpoint` or `tile/0/000.p/17`;
    /// `None` if there is no such resource.
    async fn get(&self, path: &str) -> io::Result<Option<Bytes>>;
}

#[async_trait]
impl<T: ReadTiles + ?Sized> ReadTiles for Arc<T> {
    async fn get(&self, path: &str) -> io::Result<Option<Bytes>> {
        (**self).get(path).await
    }
}

/// A published tree, read through its port.
#[derive(Debug)]
pub struct Published(pub Arc<dyn PublishedTree>);

#[async_trait]
impl ReadTiles for Published {
    async fn get(&self, path: &str) -> io::Result<Option<Bytes>> {
        self.0.resource(path).await
    }
}

/// Why a tree could not be read from its tiles.
#[derive(Debug, thiserror::Error)]
pub enum TreeError {
    /// A tile or bundle that a tree of this size has is not there.
    #[error("{path} is missing, which a tree of {size} has")]
    Missing {
        /// Which.
        path: TilePath,
        /// Size of the tree.
        size: u64,
    },
    /// A tile or bundle is not what it should be.
    #[error("{path} is damaged: {reason}")]
    Malformed {
        /// Which.
        path: TilePath,
        /// What is wrong with it.
        reason: String,
    },
    /// The tiles cannot be read now.
    #[error("{path} cannot be read")]
    Io {
        /// Which.
        path: TilePath,
        /// What the system said.
        source: io::Error,
    },
    /// The tree has no such leaf, or there is no tree of such a size in it.
    #[error("{wanted} is beyond a tree of {size}")]
    OutOfRange {
        /// What was asked for.
        wanted: u64,
        /// Size of the tree.
        size: u64,
    },
}

impl TreeError {
    /// Whether the tiles themselves are at fault, and no waiting helps.
    pub fn is_damage(&self) -> bool {
        matches!(self, Self::Missing { .. } | Self::Malformed { .. })
    }
}

/// A tree of a certain size, read from tiles that may belong to a larger one.
///
/// Nothing that is read is believed by this: roots, entries and proofs are what the tiles say, for
/// the caller to compare with something signed.
pub struct TreeReader<'t> {
    tiles: &'t dyn ReadTiles,
    size: u64,
    /// The tree that the tiles are known to be of, which has at least this size.
    whole: u64,
    remembered: Mutex<HashMap<TilePath, Arc<[Hash]>>>,
}

impl fmt::Debug for TreeReader<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TreeReader")
            .field("tiles", &self.tiles)
            .field("size", &self.size)
            .finish_non_exhaustive()
    }
}

impl<'t> TreeReader<'t> {
    /// The tree of a size that was signed.
    pub fn new(tiles: &'t dyn ReadTiles, size: u64) -> Self {
        Self::part_of(tiles, size, size)
    }

    /// The first `size` leaves of a tree of `whole` leaves, which was signed. It does not matter
    /// whether `size` was.
    pub fn part_of(tiles: &'t dyn ReadTiles, size: u64, whole: u64) -> Self {
        Self {
            tiles,
            size,
            whole: whole.max(size),
            remembered: Mutex::default(),
        }
    }

    /// How many leaves are looked at.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// The bytes of a tile of this tree, cut from a wider form of it where there is none of this
    /// very width.
    async fn tile(&self, kind: TileKind, index: u64) -> Result<(TilePath, Bytes), TreeError> {
        let size = self.size;
        let path = TilePath::in_tree(kind, index, size).ok_or(TreeError::OutOfRange {
            wanted: index.saturating_mul(TILE_WIDTH),
            size,
        })?;
        let in_whole = TilePath::in_tree(kind, index, self.whole).unwrap_or(path);
        let mut forms = vec![path, in_whole, path.when_full()];
        forms.dedup();
        for form in forms {
            let read = self.tiles.get(&form.to_string()).await;
            let read = read.map_err(|source| TreeError::Io { path: form, source })?;
            let Some(bytes) = read else { continue };
            if form == path {
                return Ok((path, bytes));
            }
            let bytes = cut(path, &bytes).ok_or_else(|| TreeError::Malformed {
                path: form,
                reason: format!("it is shorter than {path}, which is a part of it"),
            })?;
            return Ok((path, bytes));
        }
        Err(TreeError::Missing { path, size })
    }

    /// All hashes of a tile of this tree.
    pub async fn hashes(&self, level: u8, index: u64) -> Result<Arc<[Hash]>, TreeError> {
        let kind = TileKind::Hashes { level };
        let known = TilePath::in_tree(kind, index, self.size)
            .and_then(|path| self.remembered().get(&path).cloned());
        if let Some(known) = known {
            return Ok(known);
        }
        let (path, bytes) = self.tile(kind, index).await?;
        let (hashes, rest) = bytes.as_chunks::<32>();
        if hashes.len() != path.width() || !rest.is_empty() {
            let reason = format!("it has {} bytes and not {}", bytes.len(), 32 * path.width());
            return Err(TreeError::Malformed { path, reason });
        }
        let hashes: Arc<[Hash]> = hashes.into();
        let mut remembered = self.remembered();
        if remembered.len() >= REMEMBERED {
            remembered.clear();
        }
        remembered.insert(path, Arc::clone(&hashes));
        Ok(hashes)
    }

    fn remembered(&self) -> std::sync::MutexGuard<'_, HashMap<TilePath, Arc<[Hash]>>> {
        self.remembered
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// The entries `256 * index ..` of this tree, as many as its bundle has.
    pub async fn entries(&self, index: u64) -> Result<Vec<Bytes>, TreeError> {
        let (path, bytes) = self.tile(TileKind::Entries, index).await?;
        decode_bundle(&bytes, path.width()).map_err(|e| TreeError::Malformed {
            path,
            reason: e.to_string(),
        })
    }

    /// One entry, by its index from 0.
    pub async fn entry(&self, index: u64) -> Result<Bytes, TreeError> {
        self.check_index(index)?;
        let mut entries = self.entries(index / TILE_WIDTH).await?;
        Ok(entries.swap_remove((index % TILE_WIDTH) as usize))
    }

    /// The hash of one leaf, by its index from 0.
    pub async fn leaf(&self, index: u64) -> Result<Hash, TreeError> {
        self.check_index(index)?;
        let hashes = self.hashes(0, index / TILE_WIDTH).await?;
        Ok(hashes[(index % TILE_WIDTH) as usize])
    }

    fn check_index(&self, index: u64) -> Result<(), TreeError> {
        if index < self.size {
            return Ok(());
        }
        Err(TreeError::OutOfRange {
            wanted: index,
            size: self.size,
        })
    }

    /// The root, from the tiles at the right edge.
    pub async fn root(&self) -> Result<Hash, TreeError> {
        if self.size == 0 {
            return Ok(empty_root());
        }
        self.range(0, self.size).await
    }

    /// The head that these tiles have at this size.
    pub async fn head(&self) -> Result<TreeHead, TreeError> {
        Ok(TreeHead {
            size: self.size,
            root: self.root().await?,
        })
    }

    /// That the leaf at an index, from 0, is in this tree: for
    /// [`verify_inclusion`](super::verify_inclusion).
    pub async fn inclusion(&self, index: u64) -> Result<Vec<Hash>, TreeError> {
        self.check_index(index)?;
        let (mut start, mut end) = (0, self.size);
        let mut ranges = Vec::new();
        while end - start > 1 {
            let middle = start + split(end - start);
            if index < middle {
                ranges.push((middle, end));
                end = middle;
            } else {
                ranges.push((start, middle));
                start = middle;
            }
        }
        self.hashes_up(ranges).await
    }

    /// That the first `old` leaves of this tree are the tree of that size: for
    /// [`verify_consistency`](super::verify_consistency).
    pub async fn consistency(&self, old: u64) -> Result<Vec<Hash>, TreeError> {
        if old > self.size {
            return Err(TreeError::OutOfRange {
                wanted: old,
                size: self.size,
            });
        }
        if old == 0 || old == self.size {
            return Ok(Vec::new());
        }
        let (mut start, mut end) = (0, self.size);
        let mut ranges = Vec::new();
        while end != old {
            let middle = start + split(end - start);
            if old <= middle {
                ranges.push((middle, end));
                end = middle;
            } else {
                ranges.push((start, middle));
                start = middle;
            }
        }
        if start > 0 {
            ranges.push((start, end));
        }
        self.hashes_up(ranges).await
    }

    /// The proof that travels alone, for the leaf at an index, from 0, under a signed checkpoint of
    /// this very size.
    pub async fn proof_file(&self, index: u64, checkpoint: Bytes) -> Result<ProofFile, TreeError> {
        Ok(ProofFile {
            index,
            hashes: self.inclusion(index).await?,
            checkpoint,
            extra: None,
        })
    }

    /// The hashes of these ranges, the last one first.
    async fn hashes_up(&self, ranges: Vec<(u64, u64)>) -> Result<Vec<Hash>, TreeError> {
        let mut hashes = Vec::with_capacity(ranges.len());
        for (start, end) in ranges.into_iter().rev() {
            hashes.push(self.range(start, end).await?);
        }
        Ok(hashes)
    }

    /// The hash over the leaves of a range that a tree is divided into.
    async fn range(&self, start: u64, end: u64) -> Result<Hash, TreeError> {
        // From left to right, each complete subtree is the largest that fits.
        let mut subtrees = Vec::new();
        let mut at = start;
        while at < end {
            let height = (end - at).ilog2();
            subtrees.push(self.subtree(height, at >> height).await?);
            at += 1 << height;
        }
        let root = subtrees
            .into_iter()
            .rev()
            .reduce(|right, left| node_hash(&left, &right));
        // Callers ask for no empty range.
        Ok(root.unwrap_or_else(empty_root))
    }

    /// The hash of a complete subtree of 2^height leaves.
    async fn subtree(&self, height: u32, index: u64) -> Result<Hash, TreeError> {
        let (level, above) = (height / TILE_HEIGHT, height % TILE_HEIGHT);
        let first = index << above;
        let tile = first / TILE_WIDTH;
        let hashes = self.hashes(level as u8, tile).await?;
        let start = (first % TILE_WIDTH) as usize;
        hashes
            .get(start..start + (1 << above))
            .and_then(complete_root)
            .ok_or(TreeError::OutOfRange {
                wanted: (index + 1) << height,
                size: self.size,
            })
    }
}

/// Where RFC 6962 divides a tree of so many leaves, at least two: at the largest power of two below.
fn split(leaves: u64) -> u64 {
    1 << (leaves - 1).ilog2()
}

/// A partial tile, out of the full one.
pub(super) fn cut(partial: TilePath, full: &Bytes) -> Option<Bytes> {
    let len = match partial.kind {
        TileKind::Hashes { .. } => 32 * partial.width(),
        TileKind::Entries => super::bundle::prefix_len(full, partial.width())?,
    };
    (len <= full.len()).then(|| full.slice(..len))
}
