//! Proofs that travel alone: C2SP tlog-proof.

use std::fmt;

use base64::Engine;
use base64::engine::general_purpose::STANDARD as BASE64;
use bytes::Bytes;

use super::checkpoint::{Checkpoint, CheckpointError, parse_decimal, parse_hash};
use super::hash::{Hash, leaf_hash};
use super::note::VerifierKey;
use super::verify::{ProofError, verify_inclusion};

const HEADER: &str = "c2sp.org/tlog-proof@v1";
/// A tree of 2^64 leaves has no longer path.
const MAX_HASHES: usize = 64;

/// That an entry stands in a log: everything that is needed to check it, except for the entry
/// itself and for the key of the log.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ProofFile {
    /// Which leaf, from 0.
    pub index: u64,
    /// The path from the leaf's sibling to the root's child.
    pub hashes: Vec<Hash>,
    /// The signed checkpoint, as it was published.
    pub checkpoint: Bytes,
    /// Something else that travels along. Nothing vouches for it.
    pub extra: Option<Vec<u8>>,
}

/// Why a proof file proves nothing.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ProofFileError {
    /// The file does not have the form of a proof.
    #[error("line {line} of the proof is not {wanted}")]
    Line {
        /// From 1.
        line: usize,
        /// What should be there.
        wanted: &'static str,
    },
    /// The checkpoint in it is not to be believed.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    /// The path does not lead from the entry to the checkpoint.
    #[error(transparent)]
    Proof(#[from] ProofError),
}

impl ProofFile {
    /// Reads a proof file. Nothing is verified by that.
    pub fn parse(bytes: &[u8]) -> Result<Self, ProofFileError> {
        let wrong = |line, wanted| ProofFileError::Line { line, wanted };
        let text = std::str::from_utf8(bytes).map_err(|_| wrong(1, "UTF-8 text"))?;
        let mut rest = text;
        let mut number = 0;
        let mut next = || {
            let (line, after) = rest.split_once('\n')?;
            rest = after;
            number += 1;
            Some((number, line))
        };
        let head = "the header of a proof";
        next()
            .filter(|(_, line)| *line == HEADER)
            .ok_or(wrong(1, head))?;
        let (mut at, mut line) = next().ok_or(wrong(2, "an index"))?;
        let mut extra = None;
        if let Some(encoded) = line.strip_prefix("extra ") {
            let decoded = BASE64.decode(encoded);
            extra = Some(decoded.map_err(|_| wrong(at, "extra data in base64"))?);
            (at, line) = next().ok_or(wrong(3, "an index"))?;
        }
        let index = line.strip_prefix("index ").and_then(parse_decimal);
        let index = index.ok_or(wrong(at, "an index in decimal digits"))?;
        let mut hashes = Vec::new();
        loop {
            let (at, line) = next().ok_or(wrong(at + hashes.len() + 1, "a hash or empty"))?;
            if line.is_empty() {
                break;
            }
            if hashes.len() == MAX_HASHES {
                return Err(wrong(at, "empty: there are more hashes than in any proof"));
            }
            hashes.push(parse_hash(line).ok_or(wrong(at, "a SHA-256 hash in base64"))?);
        }
        Ok(Self {
            index,
            hashes,
            checkpoint: Bytes::copy_from_slice(rest.as_bytes()),
            extra,
        })
    }

    /// Checks that this entry stands in the log with this origin and one of these keys. Returns
    /// what the checkpoint states.
    pub fn verify(
        &self,
        entry: &[u8],
        origin: &str,
        keys: &[VerifierKey],
    ) -> Result<Checkpoint, ProofFileError> {
        let checkpoint = Checkpoint::open(&self.checkpoint, origin, keys)?;
        verify_inclusion(
            &leaf_hash(entry),
            self.index,
            &checkpoint.head,
            &self.hashes,
        )?;
        Ok(checkpoint)
    }
}

impl fmt::Display for ProofFile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{HEADER}")?;
        if let Some(extra) = &self.extra {
            writeln!(f, "extra {}", BASE64.encode(extra))?;
        }
        writeln!(f, "index {}", self.index)?;
        for hash in &self.hashes {
            writeln!(f, "{}", BASE64.encode(hash))?;
        }
        write!(f, "\n{}", String::from_utf8_lossy(&self.checkpoint))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tlog::hash::node_hash;
    use crate::tlog::note::SignerKey;
    use daybook_events::tree::TreeHead;
    use proptest::prelude::*;

    fn sample(extra: Option<Vec<u8>>) -> (ProofFile, SignerKey) {
        let key = SignerKey::generate("log").unwrap();
        let (left, right) = (leaf_hash(b"a"), leaf_hash(b"b"));
        let checkpoint = Checkpoint {
            origin: "log".into(),
            head: TreeHead {
                size: 2,
                root: node_hash(&left, &right),
            },
            extensions: Vec::new(),
        };
        let checkpoint = checkpoint.sign(std::slice::from_ref(&key));
        let proof = ProofFile {
            index: 1,
            hashes: vec![left],
            checkpoint,
            extra,
        };
        (proof, key)
    }

    #[test]
    fn a_proof_file_reads_as_it_was_written() {
        for extra in [None, Some(b"more".to_vec())] {
            let (proof, _) = sample(extra);
            assert_eq!(ProofFile::parse(proof.to_string().as_bytes()), Ok(proof));
        }
    }

    #[test]
    fn no_bit_of_a_proof_file_can_be_flipped() {
        let (proof, key) = sample(None);
        let keys = [key.verifier().clone()];
        let bytes = proof.to_string().into_bytes();
        assert!(proof.verify(b"b", "log", &keys).is_ok());
        assert!(proof.verify(b"c", "log", &keys).is_err());
        for bit in 0..bytes.len() * 8 {
            let mut bad = bytes.clone();
            bad[bit / 8] ^= 1 << (bit % 8);
            let verdict = ProofFile::parse(&bad).and_then(|p| p.verify(b"b", "log", &keys));
            assert!(verdict.is_err(), "bit {bit} was not noticed");
        }
    }

    proptest! {
        #[test]
        fn no_bytes_make_it_panic(text in "(c2sp.org/tlog-proof@v1\n)?(extra .*\n)?(index [0-9]*\n)?(.*\n)*") {
            if let Ok(proof) = ProofFile::parse(text.as_bytes()) {
                let _ = proof.verify(b"", "", &[]);
            }
        }
    }
}
