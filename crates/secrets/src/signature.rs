//! Checks that somebody who knows a secret sent a message. Every comparison takes the same time
//! wherever it finds a difference.

use std::io;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use hmac::{Hmac, Mac};
use sha2::Sha256;
use zeroize::Zeroizing;

use crate::cipher::random;
use crate::value::SecretValue;

type HmacSha256 = Hmac<Sha256>;

/// What keys of the Standard Webhooks specification begin with; the rest is base64.
const STANDARD_PREFIX: &str = "whsec_";

impl SecretValue {
    /// A new random key of 32 bytes, written as that specification wants it. Whoever signs with
    /// texts as they are can take it too.
    pub fn new_key() -> io::Result<Self> {
        let key = random::<32>()?;
        let text = Zeroizing::new(format!("{STANDARD_PREFIX}{}", STANDARD.encode(*key)));
        Self::new(text).map_err(io::Error::other)
    }

    /// Whether `mac` is the HMAC-SHA256 of `message` under the secret.
    pub fn signed(&self, message: &[u8], mac: &[u8]) -> bool {
        verify(self.expose().as_bytes(), &[message], mac)
    }

    /// The HMAC-SHA256 that the Standard Webhooks specification defines, over the id and the time of
    /// a message and itself, in Base64. A secret that is not written as that specification wants it
    /// is taken as it is.
    pub fn sign_as_standard_webhook(&self, id: &str, timestamp: &str, message: &[u8]) -> String {
        let key = self.standard_key();
        let key = key.as_ref().map_or(self.expose().as_bytes(), |key| key);
        let Ok(mut hmac) = HmacSha256::new_from_slice(key) else {
            return String::new();
        };
        for part in [id.as_bytes(), b".", timestamp.as_bytes(), b".", message] {
            hmac.update(part);
        }
        STANDARD.encode(hmac.finalize().into_bytes())
    }

    /// The key of a secret in the form of that specification.
    fn standard_key(&self) -> Option<Zeroizing<Vec<u8>>> {
        let key = self.expose().strip_prefix(STANDARD_PREFIX)?;
        STANDARD.decode(key).ok().map(Zeroizing::new)
    }

    /// Whether `mac` is the HMAC-SHA256 that the Standard Webhooks specification defines, over the
    /// id and the time of a message and itself. A secret that is not written as that specification
    /// wants it is taken as it is.
    pub fn signed_as_standard_webhook(
        &self,
        id: &str,
        timestamp: &str,
        message: &[u8],
        mac: &[u8],
    ) -> bool {
        let key = self.standard_key();
        let key = key.as_ref().map_or(self.expose().as_bytes(), |key| key);
        let parts = [id.as_bytes(), b".", timestamp.as_bytes(), b".", message];
        verify(key, &parts, mac)
    }

    /// Whether a text is the secret itself.
    pub fn is(&self, text: &[u8]) -> bool {
        // Two MACs are compared in place of the texts, whose lengths may differ.
        let Ok(mut own) = HmacSha256::new_from_slice(self.expose().as_bytes()) else {
            return false;
        };
        own.update(self.expose().as_bytes());
        verify(
            self.expose().as_bytes(),
            &[text],
            &own.finalize().into_bytes(),
        )
    }
}

fn verify(key: &[u8], parts: &[&[u8]], mac: &[u8]) -> bool {
    let Ok(mut hmac) = HmacSha256::new_from_slice(key) else {
        return false;
    };
    for part in parts {
        hmac.update(part);
    }
    hmac.verify_slice(mac).is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn secret(text: &str) -> SecretValue {
        SecretValue::new(Zeroizing::new(text.to_owned())).unwrap()
    }

    fn hex(text: &str) -> Vec<u8> {
        (0..text.len())
            .step_by(2)
            .map(|i| u8::from_str_radix(&text[i..i + 2], 16).unwrap())
            .collect()
    }

    #[test]
    fn the_example_that_github_publishes_is_verified() {
        let secret = secret("It's a Secret to Everybody");
        let mac = hex("757107ea0eb2509fc211221cce984b8a37570b6d7586c22c46f4379c8b043e17");
        assert!(secret.signed(b"Hello, World!", &mac));
        assert!(!secret.signed(b"Hello, World?", &mac));
        assert!(!secret.signed(b"Hello, World!", &mac[..31]));
        assert!(!secret.signed(b"Hello, World!", b""));
    }

    #[test]
    fn the_example_of_the_standard_webhooks_specification_is_verified() {
        let secret = secret("whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw");
        let mac = STANDARD
            .decode("g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE=")
            .unwrap();
        let id = "msg_p5jXN8AQM9LWM0D4loKWxJek";
        let body = br#"{"test": 2432232314}"#;
        assert!(secret.signed_as_standard_webhook(id, "1614265330", body, &mac));
        assert!(!secret.signed_as_standard_webhook(id, "1614265331", body, &mac));
    }

    #[test]
    fn only_the_secret_itself_is_the_secret() {
        let secret = secret("correct horse");
        assert!(secret.is(b"correct horse"));
        for other in [
            &b"correct hors"[..],
            b"correct horse ",
            b"",
            b"Correct horse",
        ] {
            assert!(!secret.is(other));
        }
    }
}
