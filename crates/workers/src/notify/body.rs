//! What is sent.

use bytes::Bytes;
use daybook_events::Recorded;

/// The extension attribute with the proof that an event is in the signed ledger.
pub const PROOF: &str = "ledgerproof";

/// An event with its proof: the stored bytes with one member put before all others. Whoever takes
/// that member out again, up to and with the comma behind it, has the bytes that were signed.
pub fn with_proof(recorded: &Recorded, proof: &str) -> Option<Bytes> {
    let rest = recorded.bytes.strip_prefix(b"{\"")?;
    let proof = serde_json::to_string(proof).ok()?;
    let mut body = format!("{{\"{PROOF}\":{proof},\"").into_bytes();
    body.extend_from_slice(rest);
    Some(body.into())
}

#[cfg(test)]
mod tests {
    use daybook_events::{Position, Subject};

    use super::*;

    #[test]
    fn the_signed_bytes_are_what_is_left_without_the_proof() {
        let stored = br#"{"specversion":"1.0","data":{"a":[1,2]}}"#;
        let recorded = Recorded {
            position: Position(1),
            subject: Subject::Ledger,
            stored_at: jiff::Timestamp::UNIX_EPOCH,
            bytes: Bytes::from_static(stored),
        };
        let proof = "c2sp.org/tlog-proof@v1\nindex 3\nab/c+=\n\nexample.com/log\n\u{2014} k sig\n";
        let body = with_proof(&recorded, proof).unwrap();
        let read: serde_json::Value = serde_json::from_slice(&body).unwrap();
        assert_eq!(read[PROOF], proof);
        assert_eq!(read["data"]["a"][1], 2);
        let text = std::str::from_utf8(&body).unwrap();
        let (_, rest) = text.split_once("\",").unwrap();
        assert_eq!(format!("{{{rest}").as_bytes(), stored);
    }
}
