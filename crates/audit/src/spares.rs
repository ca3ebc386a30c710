//! Memory that is used again: getting it from the system for each bundle, and giving it back, costs
//! as much as reading the bundle does.

use std::sync::{Mutex, MutexGuard, PoisonError};

use bytes::{Bytes, BytesMut};

/// No more bytes than that wait to be used again: about as many as are on their way at once.
const SPARES: usize = 24 << 20;
/// Memory that is larger goes back to the system: who takes it next may want little.
const LARGEST: usize = 1 << 20;

/// The memory of bundles that somebody is done with.
#[derive(Debug, Default)]
pub(crate) struct Spares(Mutex<Waiting>);

#[derive(Debug, Default)]
struct Waiting {
    all: Vec<BytesMut>,
    /// How many bytes they have.
    bytes: usize,
    /// Whether somebody takes them.
    are_wanted: bool,
}

impl Spares {
    fn waiting(&self) -> MutexGuard<'_, Waiting> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// So many bytes, to be written over.
    pub(crate) fn take(&self, len: usize) -> BytesMut {
        let mut waiting = self.waiting();
        waiting.are_wanted = true;
        let mut bytes = waiting.all.pop().unwrap_or_default();
        waiting.bytes -= bytes.capacity();
        drop(waiting);
        bytes.resize(len, 0);
        bytes
    }

    /// Takes memory back, if nobody else reads it any more.
    pub(crate) fn give(&self, bytes: Bytes) {
        let Ok(bytes) = bytes.try_into_mut() else {
            return;
        };
        let len = bytes.capacity();
        let mut waiting = self.waiting();
        if waiting.are_wanted && len <= LARGEST && waiting.bytes + len <= SPARES {
            waiting.bytes += len;
            waiting.all.push(bytes);
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

    #[test]
    fn no_more_waits_than_is_of_use() {
        let spares = Spares::default();
        spares.give(BytesMut::zeroed(9).freeze());
        assert_eq!(spares.waiting().bytes, 0, "nobody takes any");
        let taken: Vec<_> = (0..SPARES / LARGEST + 3)
            .map(|_| spares.take(LARGEST).freeze())
            .collect();
        taken.into_iter().for_each(|bytes| spares.give(bytes));
        let waiting = spares.waiting();
        let bytes: usize = waiting.all.iter().map(BytesMut::capacity).sum();
        assert_eq!((bytes, waiting.bytes), (SPARES, SPARES));
        drop(waiting);
        let before = spares.take(LARGEST);
        let count = spares.waiting().all.len();
        drop(before);
        spares.give(BytesMut::zeroed(LARGEST + 1).freeze());
        assert_eq!(spares.waiting().all.len(), count);
    }
}
