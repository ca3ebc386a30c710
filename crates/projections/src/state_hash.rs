//! The state hash: one value over the states of all aggregates, whatever led to them.
//!
//! Each aggregate that has events contributes an *element*: the BLAKE3 hash over its subject and
//! its folded state, spread by BLAKE3's output function to 1024 numbers of 16 bits. The elements
//! are added number by number, modulo 2^16 (LtHash: Bellare and Micciancio 1997, as Lewi and others
//! give its parameters in 2019; collisions are as hard to find as short vectors in a lattice). So an
//! aggregate that changes costs one element that is taken away and one that is added, in whatever
//! order aggregates change; and the state hash is the BLAKE3 hash of the sum.

use std::fmt;
use std::str::FromStr;
use std::sync::OnceLock;

use blake3::hazmat::{ContextKey, HasherExt};
use daybook_events::{AnyFolded, Subject};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::store::QueryError;
use crate::table::{TableError, append, through_scratch_to};

/// Numbers in an element.
const LANES: usize = 1024;

/// What each hash begins with, so that it is a hash of nothing else. Its number is the one in
/// [`StateHash`]'s text: it changes with how states are encoded.
const ELEMENT: &str = "daybook 2026 state element 3";
const SPREAD: &str = "daybook 2026 state spread 3";
const SUM: &str = "daybook 2026 state hash 3";

/// A context takes a hash of its own to be made into a key.
static ELEMENT_KEY: OnceLock<ContextKey> = OnceLock::new();
static SPREAD_KEY: OnceLock<ContextKey> = OnceLock::new();

fn hasher(key: &OnceLock<ContextKey>, context: &str) -> blake3::Hasher {
    blake3::Hasher::new_from_context_key(
        key.get_or_init(|| blake3::hazmat::hash_derive_key_context(context)),
    )
}

/// A hash over the states of all aggregates at a position. Whoever folds the same events with the
/// same version of Daybook's states has the same one.
///
/// Its text is `s3:` and 64 hexadecimal digits; the number counts the definitions of the hash and
/// of what it is taken over, and values of different definitions say nothing about each other.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct StateHash([u8; 32]);

impl fmt::Display for StateHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("s3:")?;
        self.0.iter().try_for_each(|b| write!(f, "{b:02x}"))
    }
}

impl fmt::Debug for StateHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// A text that is no state hash of this version.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is not a state hash of this version: s3: and 64 hexadecimal digits")]
pub struct InvalidStateHash(String);

impl FromStr for StateHash {
    type Err = InvalidStateHash;
    fn from_str(s: &str) -> Result<Self, InvalidStateHash> {
        let bad = || InvalidStateHash(s.chars().take(80).collect());
        let digits = s.strip_prefix("s3:").filter(|d| d.len() == 64);
        let digits = digits.ok_or_else(bad)?.as_bytes();
        let mut hash = [0; 32];
        for (byte, pair) in hash.iter_mut().zip(digits.chunks(2)) {
            for digit in pair {
                let value = match digit {
                    b'0'..=b'9' => digit - b'0',
                    b'a'..=b'f' => digit - b'a' + 10,
                    _ => return Err(bad()),
                };
                *byte = *byte << 4 | value;
            }
        }
        Ok(Self(hash))
    }
}

impl Serialize for StateHash {
    fn serialize<S: serde::Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        s.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for StateHash {
    fn deserialize<D: serde::Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        let text = String::deserialize(d)?;
        text.parse().map_err(serde::de::Error::custom)
    }
}

impl JsonSchema for StateHash {
    fn schema_name() -> std::borrow::Cow<'static, str> {
        "StateHash".into()
    }
    fn json_schema(_: &mut schemars::SchemaGenerator) -> schemars::Schema {
        schemars::json_schema!({
            "type": "string",
            "pattern": "^s3:[0-9a-f]{64}$",
            "description": "A hash over the states of all aggregates.",
        })
    }
}

/// What an aggregate's element is made from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Element([u8; 32]);

impl Element {
    /// The element of an aggregate with this folded state, as it is encoded in its row.
    pub(crate) fn of(subject: &Subject, folded: &[u8]) -> Self {
        Self::of_text(&subject.to_string(), folded)
    }

    /// The same, where the subject's text is at hand.
    fn of_text(subject: &str, folded: &[u8]) -> Self {
        let mut hash = hasher(&ELEMENT_KEY, ELEMENT);
        hash.update(&(subject.len() as u64).to_le_bytes());
        hash.update(subject.as_bytes());
        hash.update(folded);
        Self(hash.finalize().into())
    }

    fn spread(self) -> [u8; 2 * LANES] {
        let mut bytes = [0; 2 * LANES];
        let mut hash = hasher(&SPREAD_KEY, SPREAD);
        hash.update(&self.0);
        hash.finalize_xof().fill(&mut bytes);
        bytes
    }
}

/// The sum of elements.
#[derive(Clone, PartialEq, Eq)]
pub(crate) struct Sum(Box<[u16; LANES]>);

impl fmt::Debug for Sum {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.hash().fmt(f)
    }
}

impl Default for Sum {
    fn default() -> Self {
        Self(Box::new([0; LANES]))
    }
}

impl Sum {
    /// Puts an element in the place of another, or of none.
    pub(crate) fn replace(&mut self, old: Option<Element>, new: Option<Element>) {
        if old == new {
            return;
        }
        if let Some(old) = old {
            self.each(old, u16::wrapping_sub);
        }
        if let Some(new) = new {
            self.each(new, u16::wrapping_add);
        }
    }

    fn each(&mut self, element: Element, change: impl Fn(u16, u16) -> u16) {
        let spread = element.spread();
        let (pairs, _) = spread.as_chunks::<2>();
        for (lane, pair) in self.0.iter_mut().zip(pairs) {
            *lane = change(*lane, u16::from_le_bytes(*pair));
        }
    }

    pub(crate) fn to_bytes(&self) -> Vec<u8> {
        self.0.iter().flat_map(|lane| lane.to_le_bytes()).collect()
    }

    pub(crate) fn from_bytes(bytes: &[u8]) -> Result<Self, TableError> {
        let (pairs, rest) = bytes.as_chunks::<2>();
        if pairs.len() != LANES || !rest.is_empty() {
            return Err(TableError::Row("a sum of states".to_owned()));
        }
        let mut sum = Self::default();
        for (lane, pair) in sum.0.iter_mut().zip(pairs) {
            *lane = u16::from_le_bytes(*pair);
        }
        Ok(sum)
    }

    pub(crate) fn hash(&self) -> StateHash {
        let mut hash = blake3::Hasher::new_derive_key(SUM);
        hash.update(&self.to_bytes());
        StateHash(hash.finalize().into())
    }
}

/// Adds up the states of aggregates that somebody folded without projections, such as an auditor.
/// Each has the text of a [`Subject`].
#[derive(Debug, Default)]
pub struct StateSum(Sum);

impl StateSum {
    /// Adds the state of an aggregate, which must not have been added before.
    pub fn add(&mut self, subject: &str, folded: &AnyFolded) -> Result<(), QueryError> {
        let element = through_scratch_to(|scratch| {
            append(scratch, folded)?;
            Ok(Element::of_text(subject, scratch))
        })?;
        self.0.replace(None, Some(element));
        Ok(())
    }

    /// The same, and appends the state to what was written before it, as bincode writes it in its
    /// standard configuration.
    pub fn add_and_write(
        &mut self,
        subject: &str,
        folded: &AnyFolded,
        written: &mut Vec<u8>,
    ) -> Result<(), QueryError> {
        let begin = written.len();
        append(written, folded)?;
        let folded = written.get(begin..).unwrap_or_default();
        self.0
            .replace(None, Some(Element::of_text(subject, folded)));
        Ok(())
    }

    /// Takes away a state that was added, as it was written.
    pub fn remove_encoded(&mut self, subject: &str, folded: &[u8]) {
        self.0
            .replace(Some(Element::of_text(subject, folded)), None);
    }

    /// Adds all states of another sum, which must have none in common with this one.
    pub fn merge(&mut self, other: &Self) {
        for (lane, other) in self.0.0.iter_mut().zip(other.0.0.iter()) {
            *lane = lane.wrapping_add(*other);
        }
    }

    /// The hash over the states that were added.
    pub fn hash(&self) -> StateHash {
        self.0.hash()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use daybook_events::ProjectName;

    #[test]
    fn a_sum_forgets_what_was_replaced_and_the_order() {
        let element = |name: &str, state: &[u8]| {
            Some(Element::of(
                &Subject::Project(ProjectName::parse(name).unwrap()),
                state,
            ))
        };
        let (mut one, mut other) = (Sum::default(), Sum::default());
        let empty = one.hash();
        one.replace(None, element("shop", b"1"));
        one.replace(None, element("bank", b"1"));
        one.replace(element("shop", b"1"), element("shop", b"2"));
        other.replace(None, element("bank", b"1"));
        assert_ne!(one.hash(), other.hash());
        other.replace(None, element("shop", b"2"));
        assert_eq!(one, other);
        assert_eq!(Sum::from_bytes(&one.to_bytes()).unwrap(), one);
        one.replace(element("shop", b"2"), None);
        one.replace(element("bank", b"1"), None);
        assert_eq!(one.hash(), empty);
        // The same bytes under another subject are another element, as is the same one twice.
        assert_ne!(element("shop", b"1"), element("bank", b"1"));
        one.replace(None, element("shop", b"1"));
        let once = one.hash();
        one.replace(None, element("shop", b"1"));
        assert_ne!(one.hash(), once);
    }

    #[test]
    fn its_text_is_read_back_and_nothing_else_is() {
        let hash = Sum::default().hash();
        assert_eq!(hash.to_string().parse(), Ok(hash));
        let text = hash.to_string();
        for bad in [
            "",
            "s3:",
            &text[1..],
            &text.to_uppercase(),
            &text.replace("s3", "s2"),
        ] {
            assert!(bad.parse::<StateHash>().is_err(), "{bad}");
        }
    }
}
