//! What stands in the tree for a position of the log.

use bytes::Bytes;
use daybook_events::log::{MAX_EVENT_BYTES, Position};
use sha2::{Digest, Sha256};

const GAP: &str = "daybook.dev/gap/v1";
const TOO_LARGE: &str = "daybook.dev/too-large/v1";

/// The leaf of an event: its exact bytes.
///
/// Only somebody who writes to the broker past Daybook can store an event that is too large for an
/// entry. Its leaf says so and names its SHA-256.
pub fn event_entry(position: Position, bytes: &Bytes) -> Bytes {
    if bytes.len() <= MAX_EVENT_BYTES {
        return bytes.clone();
    }
    let digest = hex::encode(Sha256::digest(bytes));
    format!("{TOO_LARGE}\n{position}\nsha256:{digest}\n").into()
}

/// The leaf of a position at which the log has nothing, although it has gone past it. An event is
/// a JSON object and so never has these bytes.
pub fn gap_entry(position: Position) -> Bytes {
    format!("{GAP}\n{position}\n").into()
}

/// Whether an entry is the recorded gap of this position.
pub fn is_gap(position: Position, entry: &[u8]) -> bool {
    entry.starts_with(GAP.as_bytes()) && entry == gap_entry(position)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn leaves_are_the_stored_bytes_or_say_what_they_stand_for() {
        let bytes = Bytes::from_static(b"{}");
        assert_eq!(event_entry(Position(7), &bytes), bytes);
        let gap = gap_entry(Position(7));
        assert_eq!(gap.as_ref(), b"daybook.dev/gap/v1\n7\n");
        assert!(is_gap(Position(7), &gap) && !is_gap(Position(8), &gap));
        let large = event_entry(Position(7), &vec![0; MAX_EVENT_BYTES + 1].into());
        assert!(large.starts_with(b"daybook.dev/too-large/v1\n7\nsha256:"));
    }
}
