//! Feeds: which events a subscriber wants, and the hash chain by which it can tell that it has
//! all of them.
//!
//! The chain begins with a value that says which feed it is of, and every event of the feed is
//! hashed into it. Whoever knows the events of the log, a server or an export, gets the same
//! values; so a subscriber whose value differs has missed, repeated or received something else.

use std::fmt;
use std::str::FromStr;

use sha2::{Digest as _, Sha256};

use crate::log::Position;
use crate::names::{DeploymentId, EnvironmentName, ProjectName, ServiceName};

/// Which events a subscriber wants; all that is given must fit. `Default` wants all.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct FeedFilter {
    /// Of this project.
    pub project: Option<ProjectName>,
    /// Of this environment.
    pub environment: Option<EnvironmentName>,
    /// About this service.
    pub service: Option<ServiceName>,
    /// Of this type, without the common prefix (`deployment.requested.v1`), or of all types of an
    /// aggregate (`deployment`).
    pub kind: Option<String>,
    /// Of this deployment and of the run that it began.
    pub deployment: Option<DeploymentId>,
}

/// The text that a chain begins with: one line for each part of the filter, `*` where it is not
/// given, and one for the position that the feed starts after.
struct Beginning<'a>(&'a FeedFilter, Position);

impl fmt::Display for Beginning<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fn line(
            f: &mut fmt::Formatter<'_>,
            name: &str,
            value: Option<&dyn fmt::Display>,
        ) -> fmt::Result {
            match value {
                Some(value) => writeln!(f, "{name}={value}"),
                None => writeln!(f, "{name}=*"),
            }
        }
        let Self(filter, after) = self;
        writeln!(f, "daybook feed v1")?;
        line(f, "project", filter.project.as_ref().map(|v| v as _))?;
        line(
            f,
            "environment",
            filter.environment.as_ref().map(|v| v as _),
        )?;
        line(f, "service", filter.service.as_ref().map(|v| v as _))?;
        line(f, "kind", filter.kind.as_ref().map(|v| v as _))?;
        line(f, "deployment", filter.deployment.as_ref().map(|v| v as _))?;
        writeln!(f, "after={after}")
    }
}

/// The value of a feed's hash chain at one of its events.
///
/// `chain(0) = SHA-256(beginning)` and `chain(n) = SHA-256(chain(n-1) || leaf(n))`, where `leaf(n)`
/// is the leaf hash of the feed's n-th event in the transparency log: `SHA-256(0x00 || bytes)`.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct FeedChain([u8; 32]);

impl FeedChain {
    /// The value before the first event of a feed that starts after a position.
    pub fn begin(filter: &FeedFilter, after: Position) -> Self {
        Self(Sha256::digest(Beginning(filter, after).to_string()).into())
    }

    /// The value after one more event, of which this is the leaf hash.
    #[must_use]
    pub fn then(self, leaf: &[u8; 32]) -> Self {
        Self(
            Sha256::new()
                .chain_update(self.0)
                .chain_update(leaf)
                .finalize()
                .into(),
        )
    }
}

/// The leaf hash of an event in the transparency log (RFC 6962): of its exact stored bytes.
pub fn leaf_hash(event: &[u8]) -> [u8; 32] {
    Sha256::new()
        .chain_update([0])
        .chain_update(event)
        .finalize()
        .into()
}

impl fmt::Display for FeedChain {
    /// 64 lowercase hexadecimal digits.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|b| write!(f, "{b:02x}"))
    }
}

impl fmt::Debug for FeedChain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// A text is not the value of a chain.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the value of a chain has 64 hexadecimal digits")]
pub struct InvalidChain;

impl FromStr for FeedChain {
    type Err = InvalidChain;

    fn from_str(text: &str) -> Result<Self, InvalidChain> {
        let digits = text.as_bytes();
        let mut hash = [0; 32];
        if digits.len() != 64 {
            return Err(InvalidChain);
        }
        let digit = |c: u8| char::from(c).to_digit(16).ok_or(InvalidChain);
        for (byte, pair) in hash.iter_mut().zip(digits.chunks_exact(2)) {
            let value = digit(pair[0])? * 16 + digit(pair[1])?;
            *byte = u8::try_from(value).map_err(|_| InvalidChain)?;
        }
        Ok(Self(hash))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_beginning_is_what_the_documentation_says() {
        let filter = FeedFilter {
            project: Some("shop".parse().unwrap()),
            kind: Some("deployment".into()),
            ..FeedFilter::default()
        };
        let text = "daybook feed v1\nproject=shop\nenvironment=*\nservice=*\nkind=deployment\n\
                    deployment=*\nafter=24\n";
        assert_eq!(Beginning(&filter, Position(24)).to_string(), text);
        let begun = FeedChain::begin(&filter, Position(24));
        assert_eq!(begun.0, <[u8; 32]>::from(Sha256::digest(text)));
    }

    #[test]
    fn every_event_its_order_and_the_feed_itself_count() {
        let all = FeedFilter::default();
        let begin = FeedChain::begin(&all, Position::ZERO);
        let (a, b) = (leaf_hash(b"a"), leaf_hash(b"b"));
        let both = begin.then(&a).then(&b);
        let others = [
            begin,
            begin.then(&a),
            begin.then(&b).then(&a),
            begin.then(&a).then(&a).then(&b),
            FeedChain::begin(&all, Position(1)).then(&a).then(&b),
        ];
        assert!(others.iter().all(|other| *other != both));
    }

    #[test]
    fn values_are_read_as_they_are_written() {
        let value = FeedChain::begin(&FeedFilter::default(), Position::ZERO);
        assert_eq!(value.to_string().parse(), Ok(value));
        for bad in ["", "ab", &"g".repeat(64), &"a".repeat(65), &"é".repeat(32)] {
            assert_eq!(bad.parse::<FeedChain>(), Err(InvalidChain), "{bad:?}");
        }
    }
}
