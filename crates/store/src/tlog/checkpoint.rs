//! Checkpoints: signed notes that state the head of a tree (C2SP tlog-checkpoint).

use std::fmt;

use base64::Engine;
use base64::engine::general_purpose::STANDARD as BASE64;
use bytes::Bytes;
use daybook_events::tree::TreeHead;

use super::note::{NoteError, SignatureError, SignedNote, SignerKey, VerifierKey};

/// What a checkpoint states.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Checkpoint {
    /// Which log it is of: the URL prefix of its tiles, without scheme.
    pub origin: String,
    /// The tree.
    pub head: TreeHead,
    /// Further lines, which Daybook writes none of and keeps as they are.
    pub extensions: Vec<String>,
}

/// Why bytes are no checkpoint to be believed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CheckpointError {
    /// It is no signed note.
    #[error("the checkpoint is not a signed note")]
    Note(#[from] NoteError),
    /// It is not signed as it should be.
    #[error("the checkpoint is not to be believed")]
    Signature(#[from] SignatureError),
    /// Its text does not state a tree.
    #[error("line {line} of the checkpoint is not {wanted}")]
    Line {
        /// From 1.
        line: usize,
        /// What should be there.
        wanted: &'static str,
    },
    /// It is of another log.
    #[error("the checkpoint is of the log {found:?} and not of {wanted:?}")]
    Origin {
        /// The log that was asked for.
        wanted: String,
        /// The log that it is of.
        found: String,
    },
}

impl Checkpoint {
    /// Reads the text of a checkpoint, without its signatures.
    pub fn parse_text(text: &str) -> Result<Self, CheckpointError> {
        let wrong = |line, wanted| CheckpointError::Line { line, wanted };
        let text = text
            .strip_suffix('\n')
            .ok_or(wrong(1, "ended by a newline"))?;
        let mut lines = text.split('\n');
        let origin = lines.next().filter(|o| !o.is_empty());
        let origin = origin.ok_or(wrong(1, "an origin"))?.to_owned();
        let size = lines.next().and_then(parse_decimal);
        let size = size.ok_or(wrong(2, "a size in decimal digits"))?;
        let root = lines.next().and_then(parse_hash);
        let root = root.ok_or(wrong(3, "a SHA-256 hash in base64"))?;
        let extensions: Vec<String> = lines.map(str::to_owned).collect();
        if let Some(empty) = extensions.iter().position(String::is_empty) {
            return Err(wrong(4 + empty, "an extension: it is empty"));
        }
        Ok(Self {
            origin,
            head: TreeHead { size, root },
            extensions,
        })
    }

    /// Reads a signed checkpoint without verifying who signed it.
    pub fn parse_unverified(note: &[u8]) -> Result<(Self, SignedNote), CheckpointError> {
        let note = SignedNote::parse(note)?;
        Ok((Self::parse_text(&note.text)?, note))
    }

    /// Reads a signed checkpoint of the log with this origin, signed by at least one of these
    /// keys.
    pub fn open(note: &[u8], origin: &str, keys: &[VerifierKey]) -> Result<Self, CheckpointError> {
        let (checkpoint, note) = Self::parse_unverified(note)?;
        note.verify(keys)?;
        if checkpoint.origin != origin {
            return Err(CheckpointError::Origin {
                wanted: origin.to_owned(),
                found: checkpoint.origin,
            });
        }
        Ok(checkpoint)
    }

    /// Signs it with all of these keys.
    pub fn sign(&self, keys: &[SignerKey]) -> Bytes {
        SignedNote::sign(self.to_string(), keys).to_string().into()
    }
}

impl fmt::Display for Checkpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let root = BASE64.encode(self.head.root);
        writeln!(f, "{}\n{}\n{root}", self.origin, self.head.size)?;
        self.extensions.iter().try_for_each(|e| writeln!(f, "{e}"))
    }
}

/// A number without sign or leading zeros.
pub(super) fn parse_decimal(text: &str) -> Option<u64> {
    let number: u64 = text.parse().ok()?;
    (number.to_string() == text).then_some(number)
}

pub(super) fn parse_hash(text: &str) -> Option<[u8; 32]> {
    BASE64.decode(text).ok()?.try_into().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample() -> Checkpoint {
        Checkpoint {
            origin: "log.example.com/tlog".into(),
            head: TreeHead {
                size: 20_852_163,
                root: [9; 32],
            },
            extensions: Vec::new(),
        }
    }

    #[test]
    fn a_checkpoint_is_believed_only_from_its_log_and_key() {
        let key = SignerKey::generate("log.example.com/tlog").unwrap();
        let known = [key.verifier().clone()];
        let note = sample().sign(std::slice::from_ref(&key));
        let opened = Checkpoint::open(&note, "log.example.com/tlog", &known);
        assert_eq!(opened, Ok(sample()));
        assert!(matches!(
            Checkpoint::open(&note, "other", &known),
            Err(CheckpointError::Origin { .. })
        ));
        let other = [SignerKey::generate("log.example.com/tlog")
            .unwrap()
            .verifier()
            .clone()];
        assert!(matches!(
            Checkpoint::open(&note, "log.example.com/tlog", &other),
            Err(CheckpointError::Signature(SignatureError::Unknown { .. }))
        ));
    }

    #[test]
    fn a_text_that_states_no_tree_is_refused_with_the_line() {
        let root = BASE64.encode([9; 32]);
        for (text, wrong) in [
            (format!("\n5\n{root}\n"), 1),
            (format!("o\n05\n{root}\n"), 2),
            (format!("o\n+5\n{root}\n"), 2),
            (format!("o\n18446744073709551616\n{root}\n"), 2),
            ("o\n5\nAAAA\n".into(), 3),
            ("o\n5\n".into(), 3),
            (format!("o\n5\n{root}\n\n"), 4),
            (format!("o\n5\n{root}"), 1),
        ] {
            match Checkpoint::parse_text(&text) {
                Err(CheckpointError::Line { line, .. }) => assert_eq!(line, wrong, "{text:?}"),
                other => panic!("{text:?}: {other:?}"),
            }
        }
        let extended = format!("o\n5\n{root}\nmore\n");
        assert_eq!(
            Checkpoint::parse_text(&extended).unwrap().to_string(),
            extended
        );
    }
}
