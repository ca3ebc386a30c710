//! Memory that is used again: getting it from the system for each bundle, and giving it back, costs
//! as much as reading the bundle does.

use std::sync::{Mutex, PoisonError};

use bytes::{Bytes, BytesMut};

/// No more than so many wait to be used again, and none that is larger.
const SPARES: usize = 32;
const LARGEST: usize = 512 << 10;

/// The memory of bundles that somebody is done with.
#[derive(Debug, Default)]
pub(crate) struct Spares(Mutex<Vec<BytesMut>>);

impl Spares {
    /// So many bytes, to be written over.
    pub(crate) fn take(&self, len: usize) -> BytesMut {
        let spare = self.0.lock().unwrap_or_else(PoisonError::into_inner).pop();
        let mut bytes = spare.unwrap_or_default();
        bytes.resize(len, 0);
        bytes
    }

    /// Takes memory back, if nobody else reads it any more.
    pub(crate) fn give(&self, bytes: Bytes) {
        if bytes.len() > LARGEST {
            return;
        }
        let Ok(bytes) = bytes.try_into_mut() else {
            return;
        };
        let mut spares = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if spares.len() < SPARES {
            spares.push(bytes);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_comes_back_once_nobody_reads_it() {
        let spares = Spares::default();
        let mut bytes = spares.take(100);
        bytes.fill(7);
        let place = bytes.as_ptr();
        let bytes = bytes.freeze();
        spares.give(bytes.clone());
        assert_ne!(spares.take(10).as_ptr(), place);
        spares.give(bytes);
        let again = spares.take(60);
        assert_eq!((again.as_ptr(), again.len()), (place, 60));
    }
}
