//! The table of rows: sled on disk, or a map in memory. Both hold the same bytes.

use std::collections::BTreeMap;
use std::ops::{Bound, ControlFlow};
use std::sync::{PoisonError, RwLock};

use sled::IVec;

/// Rows to write at once; `None` removes.
pub(crate) type Batch = Vec<(Vec<u8>, Option<Vec<u8>>)>;

/// Why rows could not be read or written.
#[derive(Debug, thiserror::Error)]
pub(crate) enum TableError {
    #[error("the store of the projections failed")]
    Sled(#[from] sled::Error),
    #[error("a row of the projections cannot be read: {0}")]
    Row(String),
}

#[derive(Debug)]
pub(crate) enum Table {
    Sled(sled::Db),
    Memory(RwLock<BTreeMap<Vec<u8>, IVec>>),
}

/// Which way a scan goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Way {
    Up,
    Down,
}

impl Table {
    pub(crate) fn memory() -> Self {
        Self::Memory(RwLock::default())
    }

    pub(crate) fn get(&self, key: &[u8]) -> Result<Option<IVec>, TableError> {
        match self {
            Self::Sled(db) => Ok(db.get(key)?),
            Self::Memory(rows) => Ok(rows
                .read()
                .unwrap_or_else(PoisonError::into_inner)
                .get(key)
                .cloned()),
        }
    }

    /// Writes all rows or none.
    pub(crate) fn apply(&self, rows: Batch) -> Result<(), TableError> {
        match self {
            Self::Sled(db) => {
                let mut batch = sled::Batch::default();
                for (key, value) in rows {
                    match value {
                        Some(value) => batch.insert(key, value),
                        None => batch.remove(key),
                    }
                }
                Ok(db.apply_batch(batch)?)
            }
            Self::Memory(map) => {
                let mut map = map.write().unwrap_or_else(PoisonError::into_inner);
                for (key, value) in rows {
                    match value {
                        Some(value) => map.insert(key, value.into()),
                        None => map.remove(&key),
                    };
                }
                Ok(())
            }
        }
    }

    /// Removes all rows.
    pub(crate) fn clear(&self) -> Result<(), TableError> {
        match self {
            Self::Sled(db) => Ok(db.clear()?),
            Self::Memory(map) => {
                map.write().unwrap_or_else(PoisonError::into_inner).clear();
                Ok(())
            }
        }
    }

    /// Makes what was written survive the loss of power, as far as sled does.
    pub(crate) fn flush(&self) -> Result<(), TableError> {
        if let Self::Sled(db) = self {
            db.flush()?;
        }
        Ok(())
    }

    /// Visits the rows whose keys start with `prefix`, beginning strictly beyond `from` if it is
    /// given, until the visitor breaks.
    pub(crate) fn scan<B>(
        &self,
        prefix: &[u8],
        from: Option<&[u8]>,
        way: Way,
        mut visit: impl FnMut(&[u8], &IVec) -> ControlFlow<B>,
    ) -> Result<Option<B>, TableError> {
        let mut low = Bound::Included(prefix.to_vec());
        let mut high = after(prefix).map_or(Bound::Unbounded, Bound::Excluded);
        match (way, from) {
            (Way::Up, Some(from)) => low = Bound::Excluded(from.to_vec()),
            (Way::Down, Some(from)) => high = Bound::Excluded(from.to_vec()),
            (_, None) => {}
        }
        let range = (low, high);
        if is_empty(&range) {
            return Ok(None);
        }
        match self {
            Self::Sled(db) => {
                let mut rows = db.range(range);
                while let Some(row) = match way {
                    Way::Up => rows.next(),
                    Way::Down => rows.next_back(),
                } {
                    let (key, value) = row?;
                    if let ControlFlow::Break(b) = visit(&key, &value) {
                        return Ok(Some(b));
                    }
                }
            }
            Self::Memory(map) => {
                let map = map.read().unwrap_or_else(PoisonError::into_inner);
                let mut rows = map.range(range);
                while let Some((key, value)) = match way {
                    Way::Up => rows.next(),
                    Way::Down => rows.next_back(),
                } {
                    if let ControlFlow::Break(b) = visit(key, value) {
                        return Ok(Some(b));
                    }
                }
            }
        }
        Ok(None)
    }
}

/// The first key that does not start with `prefix` and is greater than all that do.
fn after(prefix: &[u8]) -> Option<Vec<u8>> {
    let mut key = prefix.to_vec();
    while let Some(last) = key.pop() {
        if last < u8::MAX {
            key.push(last + 1);
            return Some(key);
        }
    }
    None
}

/// Whether no key can be in a range; a map panics when it is asked for such a one.
fn is_empty((low, high): &(Bound<Vec<u8>>, Bound<Vec<u8>>)) -> bool {
    match (low, high) {
        (Bound::Included(l), Bound::Excluded(h)) => l >= h,
        (Bound::Excluded(l), Bound::Excluded(h)) => l >= h,
        _ => false,
    }
}

/// A row as bytes.
pub(crate) fn encode<T: serde::Serialize>(value: &T) -> Result<Vec<u8>, TableError> {
    bincode::serde::encode_to_vec(value, bincode::config::standard())
        .map_err(|e| TableError::Row(e.to_string()))
}

/// The value at the start of a row.
pub(crate) fn decode<T: serde::de::DeserializeOwned>(row: &[u8]) -> Result<T, TableError> {
    bincode::serde::decode_from_slice(row, bincode::config::standard())
        .map(|(value, _)| value)
        .map_err(|e| TableError::Row(e.to_string()))
}
