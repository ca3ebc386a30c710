//! Entry bundles: big-endian uint16 length and bytes, over and over.

use std::ops::Range;

use bytes::{BufMut, Bytes, BytesMut};

/// Why bytes are not the bundle that they should be.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum BundleError {
    /// An entry is cut off.
    #[error("its entry {entry} is cut off at byte {offset}")]
    Truncated {
        /// Which entry of the bundle, from 0.
        entry: usize,
        /// Where the entry begins.
        offset: usize,
    },
    /// There are more or fewer entries than there should be.
    #[error("it has {found} entries and not {wanted}")]
    Count {
        /// How many should be there.
        wanted: usize,
        /// How many are.
        found: usize,
    },
}

/// An entry is longer than a bundle can hold.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("an entry of {0} bytes does not fit a bundle, which takes up to 65535")]
pub struct EntryTooLarge(pub usize);

/// Writes a bundle.
pub fn encode_bundle<E: AsRef<[u8]>>(entries: &[E]) -> Result<Bytes, EntryTooLarge> {
    let bytes = entries.iter().map(|e| 2 + e.as_ref().len()).sum();
    let mut out = BytesMut::with_capacity(bytes);
    for entry in entries {
        let entry = entry.as_ref();
        out.put_u16(u16::try_from(entry.len()).map_err(|_| EntryTooLarge(entry.len()))?);
        out.put_slice(entry);
    }
    Ok(out.freeze())
}

/// Reads a bundle of exactly `width` entries, which share its memory.
pub fn decode_bundle(bundle: &Bytes, width: usize) -> Result<Vec<Bytes>, BundleError> {
    let places = entry_places(bundle, width)?;
    Ok(places
        .into_iter()
        .map(|place| bundle.slice(place))
        .collect())
}

/// Where the entries of a bundle of exactly `width` entries are in it.
pub fn entry_places(bundle: &[u8], width: usize) -> Result<Vec<Range<usize>>, BundleError> {
    let mut entries = Vec::with_capacity(width.min(256));
    let mut offset = 0;
    while offset < bundle.len() {
        let truncated = BundleError::Truncated {
            entry: entries.len(),
            offset,
        };
        let start = offset + 2;
        let Some(&[high, low]) = bundle.get(offset..start) else {
            return Err(truncated);
        };
        let end = start + usize::from(u16::from_be_bytes([high, low]));
        if end > bundle.len() {
            return Err(truncated);
        }
        entries.push(start..end);
        offset = end;
    }
    if entries.len() != width {
        return Err(BundleError::Count {
            wanted: width,
            found: entries.len(),
        });
    }
    Ok(entries)
}

/// The length in bytes of the first `width` entries of a bundle, where it has so many.
pub(super) fn prefix_len(bundle: &[u8], width: usize) -> Option<usize> {
    (0..width).try_fold(0_usize, |offset, _| {
        let len: [u8; 2] = bundle.get(offset..offset + 2)?.try_into().ok()?;
        let end = offset + 2 + usize::from(u16::from_be_bytes(len));
        (end <= bundle.len()).then_some(end)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_cut_or_padded_bundle_is_refused_with_the_place() {
        let bundle = encode_bundle(&[b"one".as_slice(), b"", b"three"]).unwrap();
        assert_eq!(bundle.as_ref(), b"\0\x03one\0\0\0\x05three");
        let cut = bundle.slice(..bundle.len() - 1);
        let error = BundleError::Truncated {
            entry: 2,
            offset: 7,
        };
        assert_eq!(decode_bundle(&cut, 3), Err(error));
        let error = BundleError::Count {
            wanted: 2,
            found: 3,
        };
        assert_eq!(decode_bundle(&bundle, 2), Err(error));
        assert_eq!(prefix_len(&bundle, 2), Some(7));
        assert_eq!(prefix_len(&bundle, 4), None);
    }

    #[test]
    fn the_largest_entry_fits_and_a_larger_one_does_not() {
        let largest = vec![7; 65_535];
        let bundle = encode_bundle(&[&largest]).unwrap();
        assert_eq!(decode_bundle(&bundle, 1).unwrap(), [largest]);
        assert_eq!(
            encode_bundle(&[vec![7; 65_536]]),
            Err(EntryTooLarge(65_536))
        );
    }

    proptest! {
        #[test]
        fn bundles_read_as_they_were_written(entries: Vec<Vec<u8>>) {
            let bundle = encode_bundle(&entries).unwrap();
            prop_assert_eq!(decode_bundle(&bundle, entries.len()).unwrap(), entries);
        }

        #[test]
        fn no_bytes_make_it_panic(bytes: Vec<u8>, width in 0_usize..300) {
            let _ = decode_bundle(&Bytes::from(bytes.clone()), width);
            let _ = prefix_len(&bytes, width);
        }
    }
}
