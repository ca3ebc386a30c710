//! How a token is written, made and compared.
//!
//! `daybook_<id>_<secret>`: twelve hexadecimal digits that name it, and sixty-four that are the
//! secret. The fixed form is there for secret scanners, which find it with
//! `daybook_[0-9a-f]{12}_[0-9a-f]{64}`, and for people, who see what they hold.

use std::fmt;

use daybook_events::Digest;
use daybook_events::access::TokenId;
use zeroize::{Zeroize, Zeroizing};

/// What every token starts with.
pub const PREFIX: &str = "daybook_";
/// Bytes of a secret. Half of the random bits of a UUID would do; nobody types it.
const SECRET_BYTES: usize = 32;

/// A token as it is shown to whoever uses it: once. It is in no event, log line or error.
pub struct SecretToken {
    id: TokenId,
    secret: Zeroizing<String>,
}

impl fmt::Debug for SecretToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("SecretToken").field(&self.id).finish()
    }
}

/// The system gave no random bytes.
#[derive(Debug, thiserror::Error)]
#[error("the system gives no random bytes: {0}")]
pub struct NoRandomness(getrandom::Error);

impl SecretToken {
    /// A new token.
    pub fn generate() -> Result<Self, NoRandomness> {
        let mut id = [0_u8; 6];
        getrandom::fill(&mut id).map_err(NoRandomness)?;
        // Twelve hexadecimal digits are an id.
        let id = TokenId::parse(hex::encode(id)).unwrap_or_else(|e| unreachable!("{e}"));
        Self::for_id(id)
    }

    /// A new secret for a token.
    pub fn for_id(id: TokenId) -> Result<Self, NoRandomness> {
        let mut bytes = [0_u8; SECRET_BYTES];
        getrandom::fill(&mut bytes).map_err(NoRandomness)?;
        let secret = Zeroizing::new(hex::encode(bytes));
        bytes.zeroize();
        Ok(Self { id, secret })
    }

    /// Reads a token; none if the text is not one.
    pub fn parse(text: &str) -> Option<Self> {
        let (id, secret) = text.strip_prefix(PREFIX)?.split_once('_')?;
        let digits = secret
            .bytes()
            .all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'));
        if !digits || secret.len() != SECRET_BYTES * 2 {
            return None;
        }
        Some(Self {
            id: TokenId::parse(id).ok()?,
            secret: Zeroizing::new(secret.to_owned()),
        })
    }

    /// Its id, which is no secret.
    pub fn id(&self) -> &TokenId {
        &self.id
    }

    /// The digest of its secret, as the ledger has it.
    pub fn digest(&self) -> Digest {
        Digest::of(self.secret.as_bytes())
    }

    /// The whole token, for the one place where it is shown.
    pub fn reveal(&self) -> Zeroizing<String> {
        Zeroizing::new(format!("{PREFIX}{}_{}", self.id, self.secret.as_str()))
    }
}

/// Whether two digests are the same, in a time that does not say where they differ.
pub(super) fn same(a: &Digest, b: &Digest) -> bool {
    let (a, b) = (a.as_str().as_bytes(), b.as_str().as_bytes());
    a.len() == b.len() && a.iter().zip(b).fold(0, |d, (x, y)| d | (x ^ y)) == 0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_is_read_back_and_is_not_shown_by_accident() {
        let token = SecretToken::generate().unwrap();
        let text = token.reveal();
        assert_eq!(text.len(), PREFIX.len() + 12 + 1 + 64);
        let read = SecretToken::parse(&text).unwrap();
        assert_eq!(read.id(), token.id());
        assert!(same(&read.digest(), &token.digest()));
        let (_, secret) = text.rsplit_once('_').unwrap();
        assert!(!format!("{token:?}").contains(secret));
        let other = SecretToken::for_id(token.id().clone()).unwrap();
        assert!(!same(&other.digest(), &token.digest()));
    }

    #[test]
    fn what_is_no_token_is_none() {
        let good = SecretToken::generate().unwrap().reveal();
        for bad in [
            "",
            "daybook_",
            &good[1..],
            &good[..good.len() - 1],
            &format!("{}0", *good),
            &good.to_uppercase(),
            &good.replacen('_', "-", 2),
        ] {
            assert!(SecretToken::parse(bad).is_none(), "{bad}");
        }
    }
}
