//! A sorted run: rows in a file, written once in the order of their keys, and only read from then on.
//!
//! The file holds blocks of a few kilobytes, each behind a checksum; then where each block is and with
//! which key it begins, and a Bloom filter over all keys; then a tail that says where those two
//! are. Blocks and filter are in the file alone and in memory, respectively: a row that is there costs
//! one read, and one that is not hardly ever any.

use std::fs::File;
use std::io::{self, Write as _};
use std::ops::{Bound, Range, RangeBounds};
use std::os::unix::fs::FileExt as _;
use std::path::Path;

use sled::IVec;

use crate::table::{TableError, Way};

/// A block is closed once it holds so many bytes.
const BLOCK: usize = 4 << 10;
/// So many bytes are written at once.
const BUFFER: usize = 256 << 10;
/// Bits of the filter for each row, and how many of them a key sets: one in a hundred keys that are
/// not there seems to be.
const BITS: usize = 10;
const PROBES: u64 = 6;
/// The last bytes of a run.
const MAGIC: &[u8; 8] = b"dbrun 1\n";
/// Lengths of index and filter, a checksum over both, and the magic.
const TAIL: usize = 8 + 8 + 4 + 8;
const CHECKSUM: usize = 4;

/// A row of a run; no value if the row is removed from what is below the run.
pub(crate) type Row = (IVec, Option<IVec>);

/// Rows in a file.
#[derive(Debug)]
pub(crate) struct Run {
    file: File,
    index: Index,
    filter: Filter,
}

/// Where the blocks are.
#[derive(Debug, Default)]
struct Index {
    /// The first keys of the blocks, one behind the other.
    keys: Vec<u8>,
    blocks: Vec<Block>,
}

#[derive(Debug)]
struct Block {
    /// Where its first key ends in the keys of the index.
    key_end: usize,
    /// Where it ends in the file; it begins where the one before it ends.
    end: u64,
}

impl Index {
    fn first_key(&self, block: usize) -> &[u8] {
        let start = block.checked_sub(1).map_or(0, |b| self.blocks[b].key_end);
        &self.keys[start..self.blocks[block].key_end]
    }

    fn place(&self, block: usize) -> Range<u64> {
        let start = block.checked_sub(1).map_or(0, |b| self.blocks[b].end);
        start..self.blocks[block].end
    }

    /// How many blocks begin with a key for which this holds, as it does for none after the first
    /// for which it does not.
    fn count(&self, holds: impl Fn(&[u8]) -> bool) -> usize {
        let (mut low, mut high) = (0, self.blocks.len());
        while low < high {
            let middle = low + (high - low) / 2;
            if holds(self.first_key(middle)) {
                low = middle + 1;
            } else {
                high = middle;
            }
        }
        low
    }

    fn encode(&self, out: &mut Vec<u8>) {
        put_number(out, self.blocks.len() as u64);
        for block in 0..self.blocks.len() {
            let (key, place) = (self.first_key(block), self.place(block));
            put_number(out, key.len() as u64);
            out.extend_from_slice(key);
            put_number(out, place.end - place.start);
        }
    }

    fn decode(mut bytes: &[u8]) -> Option<Self> {
        let mut index = Self::default();
        let mut end = 0_u64;
        for _ in 0..number(&mut bytes)? {
            let length = usize::try_from(number(&mut bytes)?).ok()?;
            let (key, rest) = bytes.split_at_checked(length)?;
            index.keys.extend_from_slice(key);
            bytes = rest;
            end = end.checked_add(number(&mut bytes)?)?;
            index.blocks.push(Block {
                key_end: index.keys.len(),
                end,
            });
        }
        bytes.is_empty().then_some(index)
    }
}

/// A Bloom filter over keys.
#[derive(Debug)]
struct Filter(Vec<u8>);

impl Filter {
    fn for_rows(rows: usize) -> Self {
        Self(vec![0; (rows * BITS).div_ceil(8).max(8)])
    }

    fn bits(&self, key: &[u8]) -> impl Iterator<Item = (usize, u8)> + use<> {
        let (hash, bits) = (hash(key), self.0.len() as u64 * 8);
        let step = (hash >> 32) | 1;
        (0..PROBES).map(move |i| {
            let bit = hash.wrapping_add(i.wrapping_mul(step)) % bits;
            ((bit / 8) as usize, 1 << (bit % 8))
        })
    }

    fn add(&mut self, key: &[u8]) {
        for (byte, bit) in self.bits(key) {
            self.0[byte] |= bit;
        }
    }

    fn may_hold(&self, key: &[u8]) -> bool {
        self.bits(key).all(|(byte, bit)| self.0[byte] & bit != 0)
    }
}

/// A hash of a key. It is part of the format of the files.
fn hash(key: &[u8]) -> u64 {
    let mix = |hash: u64, word: u64| {
        let product = u128::from(hash ^ word) * 0x9e37_79b9_7f4a_7c15;
        (product as u64) ^ ((product >> 64) as u64)
    };
    let (words, rest) = key.as_chunks::<8>();
    let mut last = [0; 8];
    last[..rest.len()].copy_from_slice(rest);
    let words = words.iter().chain([&last]);
    words.fold(key.len() as u64 ^ 0x2545_f491_4f6c_dd1d, |hash, word| {
        mix(hash, u64::from_le_bytes(*word))
    })
}

/// A run that is being written.
#[derive(Debug)]
pub(crate) struct Writer {
    file: File,
    /// What is not in the file yet, and where in it the block begins that is not closed.
    buffer: Vec<u8>,
    open: usize,
    /// Where in the file the buffer begins.
    written: u64,
    index: Index,
    filter: Filter,
}

impl Writer {
    /// Makes a file for at most so many rows.
    pub(crate) fn create(path: &Path, rows: usize) -> io::Result<Self> {
        let file = File::options()
            .read(true)
            .write(true)
            .create(true)
            .truncate(true)
            .open(path)?;
        Ok(Self {
            file,
            buffer: Vec::with_capacity(BUFFER + 2 * BLOCK),
            open: 0,
            written: 0,
            index: Index::default(),
            filter: Filter::for_rows(rows),
        })
    }

    /// Adds a row, whose key is greater than all before it.
    pub(crate) fn add(&mut self, key: &[u8], value: Option<&[u8]>) -> io::Result<()> {
        if self.buffer.len() == self.open {
            self.index.keys.extend_from_slice(key);
            self.buffer.extend_from_slice(&[0; CHECKSUM]);
        }
        self.filter.add(key);
        put_number(&mut self.buffer, key.len() as u64);
        self.buffer.extend_from_slice(key);
        put_number(&mut self.buffer, value.map_or(0, |v| v.len() as u64 + 1));
        self.buffer.extend_from_slice(value.unwrap_or_default());
        if self.buffer.len() - self.open >= BLOCK {
            self.close();
        }
        if self.buffer.len() >= BUFFER {
            self.spill()?;
        }
        Ok(())
    }

    fn close(&mut self) {
        let block = &mut self.buffer[self.open..];
        if let Some((checksum, rows)) = block.split_first_chunk_mut::<CHECKSUM>() {
            *checksum = crc32fast::hash(rows).to_le_bytes();
            self.open = self.buffer.len();
            self.index.blocks.push(Block {
                key_end: self.index.keys.len(),
                end: self.written + self.open as u64,
            });
        }
    }

    /// Writes the blocks that are closed.
    fn spill(&mut self) -> io::Result<()> {
        self.file.write_all(&self.buffer[..self.open])?;
        self.written += self.open as u64;
        self.buffer.drain(..self.open);
        self.open = 0;
        Ok(())
    }

    /// Ends the run, and waits until it is on the disk.
    pub(crate) fn finish(mut self) -> io::Result<Run> {
        self.close();
        self.spill()?;
        let mut end = Vec::new();
        self.index.encode(&mut end);
        let index = end.len() as u64;
        end.extend_from_slice(&self.filter.0);
        let checksum = crc32fast::hash(&end);
        end.extend_from_slice(&index.to_le_bytes());
        end.extend_from_slice(&(self.filter.0.len() as u64).to_le_bytes());
        end.extend_from_slice(&checksum.to_le_bytes());
        end.extend_from_slice(MAGIC);
        self.file.write_all(&end)?;
        self.file.sync_data()?;
        Ok(Run {
            file: self.file,
            index: self.index,
            filter: self.filter,
        })
    }
}

impl Run {
    /// Opens a run that was finished.
    pub(crate) fn open(path: &Path) -> Result<Self, TableError> {
        let file = File::open(path)?;
        let broken = || TableError::Broken(format!("{} is not a whole run", path.display()));
        let length = file.metadata()?.len();
        let at = length.checked_sub(TAIL as u64).ok_or_else(broken)?;
        let mut tail = [0; TAIL];
        file.read_exact_at(&mut tail, at)?;
        let mut rest = tail.as_slice();
        let index = take(&mut rest).map(u64::from_le_bytes).ok_or_else(broken)?;
        let filter = take(&mut rest).map(u64::from_le_bytes).ok_or_else(broken)?;
        let checksum = take(&mut rest).map(u32::from_le_bytes);
        let both = index.checked_add(filter).filter(|both| *both <= at);
        let both = both.filter(|_| rest == MAGIC && filter > 0);
        let both = both.ok_or_else(broken)?;
        let mut end = vec![0; both as usize];
        file.read_exact_at(&mut end, at - both)?;
        if checksum != Some(crc32fast::hash(&end)) {
            return Err(broken());
        }
        let filter = Filter(end.split_off(index as usize));
        let index = Index::decode(&end).ok_or_else(broken)?;
        if index.blocks.last().map_or(0, |b| b.end) != at - both {
            return Err(broken());
        }
        Ok(Self {
            file,
            index,
            filter,
        })
    }

    /// Whether a row may be here; if not, it is not.
    pub(crate) fn may_hold(&self, key: &[u8]) -> bool {
        self.filter.may_hold(key)
    }

    /// At most so many rows are in this run.
    pub(crate) fn at_most(&self) -> usize {
        self.filter.0.len() * 8 / BITS + 1
    }

    /// What this run says of a row; nothing if it does not know it.
    pub(crate) fn get(&self, key: &[u8]) -> Result<Option<Option<IVec>>, TableError> {
        if !self.may_hold(key) {
            return Ok(None);
        }
        let begun = self.index.count(|first| first <= key);
        let Some(block) = begun.checked_sub(1) else {
            return Ok(None);
        };
        let bytes = self.block(block)?;
        let mut at = 0;
        while at < bytes.len() {
            let place = Place::read(&bytes, at).ok_or_else(malformed)?;
            let found = &bytes[place.key];
            if found >= key {
                let value = || place.value.map(|value| IVec::from(&bytes[value]));
                return Ok((found == key).then(value));
            }
            at = place.end;
        }
        Ok(None)
    }

    /// The rows of a range, one after the other.
    pub(crate) fn range<'a>(&'a self, range: KeyRange<'a>, way: Way) -> Cursor<'a> {
        let from = match range.0 {
            Bound::Included(low) | Bound::Excluded(low) => {
                self.index.count(|first| first <= low).saturating_sub(1)
            }
            Bound::Unbounded => 0,
        };
        let to = match range.1 {
            Bound::Included(high) => self.index.count(|first| first <= high),
            Bound::Excluded(high) => self.index.count(|first| first < high),
            Bound::Unbounded => self.index.blocks.len(),
        };
        Cursor {
            run: self,
            range,
            way,
            blocks: from..to,
            bytes: Vec::new(),
            rows: Vec::new().into_iter(),
        }
    }

    /// A block's rows, as bytes.
    fn block(&self, number: usize) -> Result<Vec<u8>, TableError> {
        let place = self.index.place(number);
        let mut bytes = vec![0; (place.end - place.start) as usize];
        self.file.read_exact_at(&mut bytes, place.start)?;
        let mut rest = bytes.as_slice();
        let checksum = take(&mut rest).map(u32::from_le_bytes);
        if checksum != Some(crc32fast::hash(rest)) {
            return Err(malformed());
        }
        bytes.drain(..CHECKSUM);
        Ok(bytes)
    }
}

/// From one key to another.
pub(crate) type KeyRange<'a> = (Bound<&'a [u8]>, Bound<&'a [u8]>);

/// Goes through rows of a run.
#[derive(Debug)]
pub(crate) struct Cursor<'a> {
    run: &'a Run,
    range: KeyRange<'a>,
    way: Way,
    /// The blocks that are not read yet.
    blocks: Range<usize>,
    /// The block that is read, and which of its rows are still to be visited.
    bytes: Vec<u8>,
    rows: std::vec::IntoIter<Place>,
}

impl Cursor<'_> {
    /// The next row.
    pub(crate) fn next(&mut self) -> Result<Option<Row>, TableError> {
        loop {
            let row = match self.way {
                Way::Up => self.rows.next(),
                Way::Down => self.rows.next_back(),
            };
            if let Some(place) = row {
                let value = place.value.map(|value| IVec::from(&self.bytes[value]));
                return Ok(Some((IVec::from(&self.bytes[place.key]), value)));
            }
            let block = match self.way {
                Way::Up => self.blocks.next(),
                Way::Down => self.blocks.next_back(),
            };
            let Some(block) = block else {
                return Ok(None);
            };
            self.bytes = self.run.block(block)?;
            let (mut rows, mut at) = (Vec::new(), 0);
            while at < self.bytes.len() {
                let place = Place::read(&self.bytes, at).ok_or_else(malformed)?;
                at = place.end;
                if RangeBounds::<[u8]>::contains(&self.range, &self.bytes[place.key.clone()]) {
                    rows.push(place);
                }
            }
            self.rows = rows.into_iter();
        }
    }
}

/// Where a row is in a block.
#[derive(Debug)]
struct Place {
    key: Range<usize>,
    value: Option<Range<usize>>,
    end: usize,
}

impl Place {
    fn read(block: &[u8], at: usize) -> Option<Self> {
        let mut rest = block.get(at..)?;
        let length = usize::try_from(number(&mut rest)?).ok()?;
        let start = block.len() - rest.len();
        let key = start..start.checked_add(length)?;
        rest = block.get(key.end..)?;
        let length = usize::try_from(number(&mut rest)?).ok()?;
        let start = block.len() - rest.len();
        let value = match length.checked_sub(1) {
            Some(length) => Some(start..start.checked_add(length)?),
            None => None,
        };
        let end = value.as_ref().map_or(start, |value| value.end);
        (end <= block.len()).then_some(Self { key, value, end })
    }
}

fn malformed() -> TableError {
    TableError::Broken("a block of a run is not what was written".to_owned())
}

/// Appends a number, seven bits a byte.
fn put_number(out: &mut Vec<u8>, mut number: u64) {
    while number >= 0x80 {
        out.push((number & 0x7f) as u8 | 0x80);
        number >>= 7;
    }
    out.push(number as u8);
}

/// Takes a number from the start of what is left.
fn number(rest: &mut &[u8]) -> Option<u64> {
    let mut number = 0;
    for shift in (0..u64::BITS).step_by(7) {
        let (byte, behind) = rest.split_first()?;
        *rest = behind;
        number |= u64::from(byte & 0x7f).checked_shl(shift)?;
        if byte & 0x80 == 0 {
            return Some(number);
        }
    }
    None
}

/// Takes so many bytes from the start of what is left.
fn take<const N: usize>(rest: &mut &[u8]) -> Option<[u8; N]> {
    let (taken, behind) = rest.split_first_chunk::<N>()?;
    *rest = behind;
    Some(*taken)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::collection::{btree_map, vec};
    use proptest::prelude::*;

    fn written(path: &Path, rows: &[(Vec<u8>, Option<Vec<u8>>)]) -> Run {
        let mut writer = Writer::create(path, rows.len()).unwrap();
        for (key, value) in rows {
            writer.add(key, value.as_deref()).unwrap();
        }
        writer.finish().unwrap();
        Run::open(path).unwrap()
    }

    fn all(run: &Run, range: KeyRange<'_>, way: Way) -> Vec<(Vec<u8>, Option<Vec<u8>>)> {
        let mut cursor = run.range(range, way);
        let mut found = Vec::new();
        while let Some((key, value)) = cursor.next().unwrap() {
            found.push((key.to_vec(), value.map(|v| v.to_vec())));
        }
        found
    }

    fn bound(number: u8, key: &[u8]) -> Bound<&[u8]> {
        match number % 3 {
            0 => Bound::Included(key),
            1 => Bound::Excluded(key),
            _ => Bound::Unbounded,
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn it_says_what_a_map_says(
            rows in btree_map(
                vec(0_u8..4, 0..6),
                proptest::option::of((any::<u8>(), 0_usize..3000)),
                0..120,
            ),
            (low, high) in (vec(0_u8..4, 0..6), vec(0_u8..4, 0..6)),
            bounds in (any::<u8>(), any::<u8>()),
        ) {
            let folder = tempfile::tempdir().unwrap();
            let rows: Vec<_> = rows
                .into_iter()
                .map(|(key, value)| (key, value.map(|(byte, length)| vec![byte; length])))
                .collect();
            let run = written(&folder.path().join("run"), &rows);
            for (key, value) in &rows {
                let found = run.get(key).unwrap();
                prop_assert_eq!(found.map(|v| v.map(|v| v.to_vec())), Some(value.clone()));
            }
            let absent = !rows.iter().any(|(key, _)| *key == low);
            prop_assert_eq!(run.get(&low).unwrap().is_none(), absent);
            prop_assume!(low < high);
            let range = (bound(bounds.0, &low), bound(bounds.1, &high));
            let mut expected: Vec<_> =
                rows.iter().filter(|(k, _)| RangeBounds::<[u8]>::contains(&range, k.as_slice())).cloned().collect();
            prop_assert_eq!(all(&run, range, Way::Up), expected.clone());
            expected.reverse();
            prop_assert_eq!(all(&run, range, Way::Down), expected);
        }
    }

    #[test]
    fn no_byte_of_a_run_changes_unnoticed() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("run");
        let rows: Vec<_> = (0..40_u8).map(|n| (vec![n], Some(vec![n; 300]))).collect();
        written(&path, &rows);
        let whole = std::fs::read(&path).unwrap();
        let read = |bytes: &[u8]| -> Result<(), TableError> {
            std::fs::write(&path, bytes).unwrap();
            let run = Run::open(&path)?;
            let mut cursor = run.range((Bound::Unbounded, Bound::Unbounded), Way::Up);
            while cursor.next()?.is_some() {}
            Ok(())
        };
        read(&whole).unwrap();
        for place in (0..whole.len())
            .step_by(7)
            .chain(whole.len() - TAIL..whole.len())
        {
            let mut changed = whole.clone();
            changed[place] ^= 1;
            assert!(read(&changed).is_err(), "byte {place}");
        }
        for length in (0..whole.len()).step_by(97) {
            assert!(read(&whole[..length]).is_err(), "{length} bytes");
        }
    }

    #[test]
    fn keys_that_are_not_there_are_seldom_looked_for() {
        let mut filter = Filter::for_rows(1000);
        for n in 0..1000_u64 {
            filter.add(&n.to_be_bytes());
        }
        let found = |n: u64| filter.may_hold(&n.to_be_bytes());
        assert!((0..1000).all(found));
        assert!((1000..11_000).filter(|n| found(*n)).count() < 300);
    }
}
