//! The bytes of a segment file: one header, then records back to back.
//!
//! ```text
//! header   magic[8] identity[16] first:u64 crc:u32, padded with zeros to 64 bytes
//! record   body_len:u32 crc:u32 body
//! body     position:u64 synced:u64 stored_at:i64 id[16] subject_len:u16 subject bytes
//! ```
//!
//! Numbers are little-endian. `crc` is the CRC-32 of what it stands for. `synced` is the last
//! position that was known to be on disk when the record was written: a record that is found
//! *after* something unreadable thereby says whether what cannot be read had been acknowledged
//! (damage, to be reported) or not (the torn end of a write that nobody was told of).

use uuid::Uuid;

/// Length of a segment's header.
pub(super) const HEADER_LEN: u64 = 64;
/// Length of what stands before a record's body.
pub(super) const FRAME_LEN: usize = 8;
/// Length of a record's body without its subject and bytes.
const FIXED_LEN: usize = 8 + 8 + 8 + 16 + 2;
/// Longest body that can be: a longer one is not a record.
const MAX_BODY: usize = FIXED_LEN + u16::MAX as usize + daybook_events::log::MAX_EVENT_BYTES;

const MAGIC: &[u8; 8] = b"DAYBOOK\x01";
const HEADER_USED: usize = 8 + 16 + 8;

/// What a segment says of itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Header {
    /// The log that it belongs to.
    pub identity: Uuid,
    /// Position of its first record.
    pub first: u64,
}

impl Header {
    pub(super) fn encode(self) -> [u8; HEADER_LEN as usize] {
        let mut out = [0; HEADER_LEN as usize];
        out[..8].copy_from_slice(MAGIC);
        out[8..24].copy_from_slice(self.identity.as_bytes());
        out[24..32].copy_from_slice(&self.first.to_le_bytes());
        let crc = crc32fast::hash(&out[..HEADER_USED]);
        out[HEADER_USED..HEADER_USED + 4].copy_from_slice(&crc.to_le_bytes());
        out
    }

    /// `None` if these bytes are no header.
    pub(super) fn decode(bytes: &[u8]) -> Option<Self> {
        let (used, rest) = bytes.split_at_checked(HEADER_USED)?;
        let crc = u32::from_le_bytes(*rest.first_chunk()?);
        if !used.starts_with(MAGIC) || crc32fast::hash(used) != crc {
            return None;
        }
        Some(Self {
            identity: Uuid::from_bytes(*used[8..].first_chunk()?),
            first: u64::from_le_bytes(*used[24..].first_chunk()?),
        })
    }
}

/// One record, borrowed from the buffer that it was read into.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Record<'a> {
    pub position: u64,
    /// Last position known to be on disk when this record was written.
    pub synced: u64,
    /// Microseconds since 1970.
    pub stored_at: i64,
    pub id: Uuid,
    pub subject: &'a str,
    pub bytes: &'a [u8],
}

/// What stands at the start of a buffer.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Parsed<'a> {
    /// A record, and the length of its frame and body together.
    Record(Record<'a>, usize),
    /// Perhaps a record, of which the buffer holds too little: so many bytes are needed.
    Partial(usize),
    /// No record.
    Invalid(&'static str),
}

impl<'a> Record<'a> {
    /// Appends the record to a buffer. The subject must be shorter than 64 KiB.
    pub(super) fn encode(&self, out: &mut Vec<u8>) {
        let start = out.len();
        out.extend_from_slice(&[0; FRAME_LEN]);
        out.extend_from_slice(&self.position.to_le_bytes());
        out.extend_from_slice(&self.synced.to_le_bytes());
        out.extend_from_slice(&self.stored_at.to_le_bytes());
        out.extend_from_slice(self.id.as_bytes());
        out.extend_from_slice(&(self.subject.len() as u16).to_le_bytes());
        out.extend_from_slice(self.subject.as_bytes());
        out.extend_from_slice(self.bytes);
        let body = start + FRAME_LEN;
        let len = (out.len() - body) as u32;
        let crc = crc32fast::hash(&out[body..]);
        out[start..start + 4].copy_from_slice(&len.to_le_bytes());
        out[start + 4..body].copy_from_slice(&crc.to_le_bytes());
    }

    /// Reads what stands at the start of a buffer.
    pub(super) fn parse(buf: &'a [u8]) -> Parsed<'a> {
        let Some((frame, rest)) = buf.split_at_checked(FRAME_LEN) else {
            return Parsed::Partial(FRAME_LEN);
        };
        let (len, crc) = frame.split_at(4);
        let len = u32::from_le_bytes([len[0], len[1], len[2], len[3]]) as usize;
        let crc = u32::from_le_bytes([crc[0], crc[1], crc[2], crc[3]]);
        if len == 0 {
            return Parsed::Invalid("nothing is written there");
        }
        if !(FIXED_LEN..=MAX_BODY).contains(&len) {
            return Parsed::Invalid("its length is impossible");
        }
        let Some(body) = rest.get(..len) else {
            return Parsed::Partial(FRAME_LEN + len);
        };
        if crc32fast::hash(body) != crc {
            return Parsed::Invalid("its checksum does not fit");
        }
        match Self::parse_body(body) {
            Some(record) => Parsed::Record(record, FRAME_LEN + len),
            None => Parsed::Invalid("its fields do not fit its length"),
        }
    }

    fn parse_body(body: &'a [u8]) -> Option<Self> {
        let (position, rest) = body.split_first_chunk()?;
        let (synced, rest) = rest.split_first_chunk()?;
        let (stored_at, rest) = rest.split_first_chunk()?;
        let (id, rest) = rest.split_first_chunk()?;
        let (subject_len, rest) = rest.split_first_chunk()?;
        let (subject, bytes) = rest.split_at_checked(u16::from_le_bytes(*subject_len).into())?;
        Some(Self {
            position: u64::from_le_bytes(*position),
            synced: u64::from_le_bytes(*synced),
            stored_at: i64::from_le_bytes(*stored_at),
            id: Uuid::from_bytes(*id),
            subject: std::str::from_utf8(subject).ok()?,
            bytes,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample(bytes: &[u8]) -> Record<'_> {
        Record {
            position: 7,
            synced: 6,
            stored_at: -5,
            id: Uuid::from_u128(9),
            subject: "daybook.ev.shop._.project.shop",
            bytes,
        }
    }

    #[test]
    fn a_record_reads_as_it_was_written() {
        let mut buf = Vec::new();
        sample(b"{}").encode(&mut buf);
        let len = buf.len();
        buf.extend_from_slice(b"more");
        assert_eq!(Record::parse(&buf), Parsed::Record(sample(b"{}"), len));
    }

    #[test]
    fn a_cut_record_asks_for_the_rest() {
        let mut buf = Vec::new();
        sample(b"{}").encode(&mut buf);
        assert_eq!(Record::parse(&buf[..3]), Parsed::Partial(FRAME_LEN));
        assert_eq!(
            Record::parse(&buf[..buf.len() - 1]),
            Parsed::Partial(buf.len())
        );
    }

    #[test]
    fn every_flipped_bit_is_noticed() {
        let mut good = Vec::new();
        sample(b"some bytes").encode(&mut good);
        for bit in 0..good.len() * 8 {
            let mut bad = good.clone();
            bad[bit / 8] ^= 1 << (bit % 8);
            assert!(
                !matches!(Record::parse(&bad), Parsed::Record(..)),
                "bit {bit} was not noticed"
            );
        }
    }

    #[test]
    fn a_header_reads_as_it_was_written_and_nothing_else_does() {
        let header = Header {
            identity: Uuid::from_u128(5),
            first: 11,
        };
        let mut bytes = header.encode();
        assert_eq!(Header::decode(&bytes), Some(header));
        bytes[25] ^= 1;
        assert_eq!(Header::decode(&bytes), None);
        assert_eq!(Header::decode(&[0; HEADER_LEN as usize]), None);
        assert_eq!(Header::decode(b"short"), None);
    }
}
