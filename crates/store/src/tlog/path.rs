//! Names of tiles and entry bundles, as C2SP tlog-tiles writes them.

use std::fmt;
use std::str::FromStr;

/// Hashes in a full tile, and entries in a full bundle.
pub const TILE_WIDTH: u64 = 256;

/// Hashes of level L+1 stand for so many bits of leaves more than those of level L.
pub(super) const TILE_HEIGHT: u32 = 8;

/// The highest level of tiles that a tree of 2^64 leaves could have.
const MAX_LEVEL: u8 = 63;

/// What a tile holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum TileKind {
    /// The entries themselves: a bundle.
    Entries,
    /// Hashes of complete subtrees of 256^level leaves.
    Hashes {
        /// 0 for hashes of leaves.
        level: u8,
    },
}

/// One static resource of a tree.
///
/// Its text form is canonical: `tile/0/x001/x234/067`, `tile/entries/000.p/17`. Nothing else
/// parses.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct TilePath {
    /// What it holds.
    pub kind: TileKind,
    /// Its number within its level, from 0.
    pub index: u64,
    /// How many hashes or entries it has; 256 in a full one. Never 0.
    width: u16,
}

impl TilePath {
    /// A full tile.
    pub fn full(kind: TileKind, index: u64) -> Self {
        Self {
            kind,
            index,
            width: TILE_WIDTH as u16,
        }
    }

    /// The tile of this kind and number in a tree of `size` leaves; `None` where it would be
    /// empty.
    pub fn in_tree(kind: TileKind, index: u64, size: u64) -> Option<Self> {
        let level = match kind {
            TileKind::Entries => 0,
            TileKind::Hashes { level } => level,
        };
        let hashes = size
            .checked_shr(TILE_HEIGHT * u32::from(level))
            .unwrap_or(0);
        let before = index.checked_mul(TILE_WIDTH)?;
        match hashes.checked_sub(before)? {
            0 => None,
            width => Some(Self {
                kind,
                index,
                width: width.min(TILE_WIDTH) as u16,
            }),
        }
    }

    /// Whether a tree of this size has it: what is stored beyond is not signed, and may never be.
    pub fn is_covered_by(&self, size: u64) -> bool {
        Self::in_tree(self.kind, self.index, size)
            .is_some_and(|whole| self.width() <= whole.width())
    }

    /// How many hashes or entries it has: 1 to 256.
    pub fn width(&self) -> usize {
        self.width.into()
    }

    /// Whether it has all 256.
    pub fn is_full(&self) -> bool {
        u64::from(self.width) == TILE_WIDTH
    }

    /// The full tile of the same kind and number.
    pub fn when_full(&self) -> Self {
        Self::full(self.kind, self.index)
    }

    /// The folder that holds all partial forms of this tile.
    pub(super) fn partials(&self) -> String {
        format!("{}.p", self.when_full())
    }
}

impl fmt::Display for TilePath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.kind {
            TileKind::Entries => write!(f, "tile/entries")?,
            TileKind::Hashes { level } => write!(f, "tile/{level}")?,
        }
        let mut groups = [0; 7];
        let mut rest = self.index;
        let mut count = 0;
        loop {
            groups[count] = rest % 1000;
            rest /= 1000;
            count += 1;
            if rest == 0 {
                break;
            }
        }
        for (left, group) in groups[..count].iter().enumerate().rev() {
            let x = if left > 0 { "x" } else { "" };
            write!(f, "/{x}{group:03}")?;
        }
        if self.is_full() {
            return Ok(());
        }
        write!(f, ".p/{}", self.width)
    }
}

impl fmt::Debug for TilePath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// It is not the canonical name of a tile or an entry bundle.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("it is not the canonical path of a tile or an entry bundle")]
pub struct InvalidTilePath;

impl FromStr for TilePath {
    type Err = InvalidTilePath;

    fn from_str(text: &str) -> Result<Self, InvalidTilePath> {
        // Long enough for every path that there can be, so that nothing below takes long.
        if text.len() > 64 {
            return Err(InvalidTilePath);
        }
        parse(text)
            .filter(|path| path.to_string() == text)
            .ok_or(InvalidTilePath)
    }
}

/// Reads every canonical path, and some others, which are told apart by writing them again.
fn parse(text: &str) -> Option<TilePath> {
    let (kind, rest) = text.strip_prefix("tile/")?.split_once('/')?;
    let kind = match kind {
        "entries" => TileKind::Entries,
        level => TileKind::Hashes {
            level: level.parse().ok().filter(|l| *l <= MAX_LEVEL)?,
        },
    };
    let (number, width) = match rest.split_once(".p/") {
        Some((number, width)) => {
            let width = width.parse().ok().filter(|w| (1..256).contains(w))?;
            (number, width)
        }
        None => (rest, TILE_WIDTH as u16),
    };
    let index = number.split('/').try_fold(0_u64, |index, group| {
        let group: u64 = group.trim_start_matches('x').parse().ok()?;
        index.checked_mul(1000)?.checked_add(group)
    })?;
    Some(TilePath { kind, index, width })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn paths_are_written_as_the_standard_writes_them() {
        let hashes = TileKind::Hashes { level: 0 };
        for (path, text) in [
            (TilePath::full(hashes, 0), "tile/0/000"),
            (TilePath::full(hashes, 67), "tile/0/067"),
            (TilePath::full(hashes, 1_234_067), "tile/0/x001/x234/067"),
            (
                TilePath::full(TileKind::Entries, 1000),
                "tile/entries/x001/000",
            ),
        ] {
            assert_eq!(path.to_string(), text);
            assert_eq!(text.parse(), Ok(path));
        }
        let partial = TilePath::in_tree(TileKind::Entries, 1067, 1067 * 256 + 17).unwrap();
        assert_eq!(partial.to_string(), "tile/entries/x001/067.p/17");
        assert_eq!(
            TilePath::in_tree(hashes, 1, 256),
            None,
            "never an empty one"
        );
    }

    #[test]
    fn nothing_but_the_canonical_form_is_a_path() {
        for text in [
            "",
            "tile",
            "tile/",
            "tile/0",
            "tile/0/",
            "tile/0/0",
            "tile/0/00",
            "tile/0/0000",
            "tile/00/000",
            "tile/64/000",
            "tile/-1/000",
            "tile/+1/000",
            "tile/0/x000/000",
            "tile/0/001/000",
            "tile/0/x001",
            "tile/0/000.p/0",
            "tile/0/000.p/256",
            "tile/0/000.p/01",
            "tile/0/000.p/",
            "tile/0/000.p/+1",
            "tile/0/000/",
            "/tile/0/000",
            "tile/entry/000",
            "tile/0/../000",
            "tile/0/xx01/000",
            "tile/0/000.p/1/",
            "tile/0/x999/x999/x999/x999/x999/x999/x999/999",
            "tile/0/+01",
            "tile/0/0x1",
        ] {
            assert_eq!(text.parse::<TilePath>(), Err(InvalidTilePath), "{text}");
        }
    }

    proptest! {
        #[test]
        fn every_path_reads_as_it_is_written(level in 0_u8..64, index: u64, width in 1_u16..=256) {
            let kind = if level == 63 { TileKind::Entries } else { TileKind::Hashes { level } };
            let path = TilePath { kind, index, width };
            prop_assert_eq!(path.to_string().parse(), Ok(path));
        }

        #[test]
        fn no_text_makes_it_panic(text in "tile/[0-9e]{1,3}(/x?[0-9]{1,4}){0,8}(.p/[0-9]{0,4})?|.*") {
            if let Ok(path) = text.parse::<TilePath>() {
                prop_assert_eq!(path.to_string(), text);
            }
        }
    }
}
