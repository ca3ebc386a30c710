//! Signed envelopes (DSSE), for statements that are no notes.
//!
//! They are signed with the keys of the log. What is signed begins with `DSSEv1 `, which is the
//! beginning of no checkpoint: a space is not allowed in an origin. So nobody can pass one off as
//! the other.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use serde::{Deserialize, Serialize};

use super::note::{KeyId, SignerKey, VerifierKey};

/// A signed payload.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Envelope {
    /// The payload in Base64.
    pub payload: String,
    /// Its media type.
    #[serde(rename = "payloadType")]
    pub payload_type: String,
    /// Who signed it.
    pub signatures: Vec<EnvelopeSignature>,
}

/// A signature of an envelope.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct EnvelopeSignature {
    /// The id of the key, as it stands in its public form: eight hexadecimal digits.
    pub keyid: String,
    /// The Ed25519 signature in Base64.
    pub sig: String,
}

/// Why an envelope is not to be believed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum EnvelopeError {
    /// A part of it is not in Base64.
    #[error("{0} of the envelope is not in Base64")]
    Form(&'static str),
    /// Its payload is something else.
    #[error("the envelope holds {0:?}")]
    Type(String),
    /// Nobody who is trusted has signed it.
    #[error("none of the known keys has signed the envelope")]
    Unsigned,
    /// A signature that claims to be by a known key is not.
    #[error("the signature of the key {0} does not hold")]
    Broken(KeyId),
}

/// The bytes that are signed: DSSE's pre-authentication encoding.
fn encoded(payload_type: &str, payload: &[u8]) -> Vec<u8> {
    let head = format!(
        "DSSEv1 {} {payload_type} {} ",
        payload_type.len(),
        payload.len()
    );
    [head.as_bytes(), payload].concat()
}

impl Envelope {
    /// Signs a payload with all of these keys.
    pub fn sign(payload_type: &str, payload: &[u8], keys: &[SignerKey]) -> Self {
        let message = encoded(payload_type, payload);
        let signatures = keys.iter().map(|key| EnvelopeSignature {
            keyid: key.verifier().id().to_string(),
            sig: BASE64.encode(key.sign_bytes(&message)),
        });
        Self {
            payload: BASE64.encode(payload),
            payload_type: payload_type.to_owned(),
            signatures: signatures.collect(),
        }
    }

    /// The payload, if it is of this type and one of these keys has signed it, with who did.
    /// Signatures by other keys say nothing; one that claims to be by one of these must hold.
    pub fn verify<'k>(
        &self,
        payload_type: &str,
        keys: &'k [VerifierKey],
    ) -> Result<(Vec<u8>, Vec<&'k VerifierKey>), EnvelopeError> {
        if self.payload_type != payload_type {
            let found = self.payload_type.chars().take(80).collect();
            return Err(EnvelopeError::Type(found));
        }
        let payload = BASE64
            .decode(&self.payload)
            .map_err(|_| EnvelopeError::Form("the payload"))?;
        let message = encoded(payload_type, &payload);
        let mut by = Vec::new();
        for signature in &self.signatures {
            let claimed = keys.iter().find(|k| k.id().to_string() == signature.keyid);
            let Some(key) = claimed else { continue };
            let sig = BASE64
                .decode(&signature.sig)
                .map_err(|_| EnvelopeError::Form("a signature"))?;
            if !key.verifies_bytes(&message, &sig) {
                return Err(EnvelopeError::Broken(key.id()));
            }
            by.push(key);
        }
        match by.is_empty() {
            true => Err(EnvelopeError::Unsigned),
            false => Ok((payload, by)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_encoding_is_the_one_of_the_specification() {
        let encoded = encoded("http://example.com/HelloWorld", b"hello world");
        assert_eq!(
            encoded,
            b"DSSEv1 29 http://example.com/HelloWorld 11 hello world"
        );
    }

    #[test]
    fn what_was_changed_or_is_signed_by_others_is_not_believed() {
        let key = SignerKey::generate("example.com/log").unwrap();
        let keys = [key.verifier().clone()];
        let good = Envelope::sign("text/plain", b"hello", &[key]);
        let (payload, by) = good.verify("text/plain", &keys).unwrap();
        assert_eq!((payload.as_slice(), by.len()), (&b"hello"[..], 1));

        let other = [SignerKey::generate("example.com/log")
            .unwrap()
            .verifier()
            .clone()];
        let refused = |envelope: &Envelope, kind, keys: &[VerifierKey]| {
            envelope.verify(kind, keys).unwrap_err()
        };
        assert_eq!(
            refused(&good, "text/plain", &other),
            EnvelopeError::Unsigned
        );
        assert!(matches!(
            refused(&good, "text/html", &keys),
            EnvelopeError::Type(_)
        ));
        let mut changed = good.clone();
        changed.payload = BASE64.encode("hollo");
        assert!(matches!(
            refused(&changed, "text/plain", &keys),
            EnvelopeError::Broken(_)
        ));
        let mut unsigned = good;
        unsigned.signatures.clear();
        assert_eq!(
            refused(&unsigned, "text/plain", &keys),
            EnvelopeError::Unsigned
        );
    }
}
