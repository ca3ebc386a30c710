//! A value, handled so that it does not get about by accident.

use std::fmt;

use zeroize::Zeroizing;

use crate::store::SecretError;

/// The fewest bytes that a value may have, and that one of its lines must have. Shorter texts occur
/// everywhere by chance: they could not be masked without masking half of all output.
pub const VALUE_MIN: usize = 6;

/// The most bytes that a value may have.
pub const VALUE_MAX: usize = 32 * 1024;

/// The value of a secret: text that an environment variable can hold. Its memory is overwritten
/// when it is dropped, and printing it for debugging prints nothing of it.
#[derive(Clone, PartialEq, Eq)]
pub struct SecretValue(Zeroizing<String>);

/// A value that was refused. It does not contain the value.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the value cannot be a secret: {rule}")]
pub struct InvalidValue {
    /// A stable code for programs.
    pub code: &'static str,
    /// The rule that it breaks.
    pub rule: &'static str,
}

impl SecretValue {
    /// Takes a value over, if it can be kept and masked.
    pub fn new(value: Zeroizing<String>) -> Result<Self, InvalidValue> {
        let refused = |code, rule| Err(InvalidValue { code, rule });
        if value.is_empty() {
            return refused("secret_empty", "it is empty");
        }
        if value.len() > VALUE_MAX {
            return refused("secret_too_long", "it has more than 32 KiB");
        }
        if value.contains('\0') {
            return refused("invalid_secret_value", "it contains a NUL character");
        }
        if value.lines().all(|line| line.trim().len() < VALUE_MIN) {
            return refused(
                "secret_too_short",
                "no line of it has at least 6 bytes, so that it could not be masked in output",
            );
        }
        Ok(Self(value))
    }

    /// A value of so many random letters and digits, at least [`VALUE_MIN`].
    pub fn generate(length: usize) -> Result<Self, SecretError> {
        const LETTERS: &[u8; 62] =
            b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789";
        let length = length.clamp(VALUE_MIN, VALUE_MAX);
        let mut value = Zeroizing::new(String::with_capacity(length));
        let mut random = Zeroizing::new([0_u8; 64]);
        while value.len() < length {
            getrandom::fill(&mut *random).map_err(|e| SecretError::Unusable {
                path: "/dev/urandom".into(),
                source: std::io::Error::other(e.to_string()),
            })?;
            // 248 is four times 62: each letter is as likely as another.
            let even = random.iter().filter(|byte| **byte < 248);
            let letters = even.map(|byte| char::from(LETTERS[usize::from(*byte) % 62]));
            let missing = length - value.len();
            value.extend(letters.take(missing));
        }
        Ok(Self(value))
    }

    /// The value itself, to be handed to whom it is for and to nobody else.
    pub fn expose(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for SecretValue {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("SecretValue(…)")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn generated_values_are_as_long_as_asked_for_and_differ() {
        let one = SecretValue::generate(48).unwrap();
        assert_eq!(one.expose().len(), 48);
        assert!(one.expose().bytes().all(|b| b.is_ascii_alphanumeric()));
        assert_ne!(one, SecretValue::generate(48).unwrap());
    }

    fn value(text: &str) -> Result<SecretValue, InvalidValue> {
        SecretValue::new(Zeroizing::new(text.to_owned()))
    }

    #[test]
    fn what_cannot_be_kept_or_masked_is_refused() {
        for (text, code) in [
            ("", "secret_empty"),
            ("short", "secret_too_short"),
            ("a\nbcdef\n  g  \n", "secret_too_short"),
            ("hunter\0two", "invalid_secret_value"),
        ] {
            let error = value(text).unwrap_err();
            assert_eq!(error.code, code);
            assert!(text.is_empty() || !error.to_string().contains(text));
        }
        assert_eq!(
            value(&"x".repeat(VALUE_MAX + 1)).unwrap_err().code,
            "secret_too_long"
        );
        assert!(value(&"x".repeat(VALUE_MAX)).is_ok());
        assert!(value("{\n  \"key\": 1\n}").is_ok());
    }

    #[test]
    fn printing_it_for_debugging_prints_nothing_of_it() {
        let secret = value("correct horse").unwrap();
        assert!(!format!("{secret:?}").contains("horse"));
    }
}
