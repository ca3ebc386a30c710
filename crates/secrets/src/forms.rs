//! The forms in which a value turns up in texts.

use std::collections::BTreeSet;

use base64::Engine as _;
use base64::engine::general_purpose::{STANDARD_NO_PAD, URL_SAFE_NO_PAD};

use crate::value::{SecretValue, VALUE_MIN};

/// The longest pattern, in bytes. Longer forms are looked for piece by piece, so that one that is
/// cut somewhere is recognised up to the cut.
pub const PATTERN_MAX: usize = 1024;

/// Columns at which tools break base64.
const WRAPS: [usize; 2] = [64, 76];

/// All texts that give a value away: itself, as JSON, Rust and percent-encoding write it, in
/// hexadecimal digits, and in base64, wherever it stands in what was encoded. Lines of a value are
/// secrets of their own, unless they are short.
pub(crate) fn patterns(value: &SecretValue) -> BTreeSet<Vec<u8>> {
    let value = value.expose();
    let mut all = Patterns::default();
    all.add_text(value);
    for line in value.lines() {
        let line = line.trim();
        if line != value {
            all.add_text(line);
        }
    }
    all.0
}

#[derive(Default)]
struct Patterns(BTreeSet<Vec<u8>>);

impl Patterns {
    fn add_text(&mut self, text: &str) {
        if text.len() < VALUE_MIN {
            return;
        }
        // As it is, it stands on one line only if it is one line.
        if !text.contains('\n') {
            self.add(text);
        }
        self.add(&json(text, false));
        self.add(&json(text, true));
        self.add(&text.escape_debug().to_string());
        for form in [false, true] {
            let encoded = percent_encoded(text, form);
            self.add(&encoded.to_ascii_lowercase_escapes());
            self.add(&encoded);
        }
        let hex: String = text.bytes().map(|b| format!("{b:02x}")).collect();
        self.add(&hex);
        self.add(&hex.to_ascii_uppercase());
        for offset in 0..3 {
            for form in base64_within(text.as_bytes(), offset) {
                self.add(&form);
            }
        }
        for columns in WRAPS {
            let encoded = STANDARD_NO_PAD.encode(text);
            for line in encoded.as_bytes().chunks(columns) {
                if line.len() >= 2 * VALUE_MIN {
                    self.0.insert(line.to_vec());
                }
            }
        }
    }

    /// Adds a form, in pieces if it is long. The last piece overlaps the one before it.
    fn add(&mut self, form: &str) {
        if form.len() < VALUE_MIN {
            return;
        }
        let mut from = 0;
        while form.len() - from > PATTERN_MAX {
            let to = form.floor_char_boundary(from + PATTERN_MAX);
            self.0.insert(form.as_bytes()[from..to].to_vec());
            from = to;
        }
        if from > 0 {
            from = form.ceil_char_boundary(form.len() - PATTERN_MAX);
        }
        self.0.insert(form.as_bytes()[from..].to_vec());
    }
}

/// What stands between the quotes of a JSON string, with all but ASCII escaped if asked for.
fn json(text: &str, ascii: bool) -> String {
    let quoted = serde_json::Value::from(text).to_string();
    let inner = &quoted[1..quoted.len() - 1];
    if !ascii {
        return inner.to_owned();
    }
    let mut out = String::with_capacity(inner.len());
    for c in inner.chars() {
        if c.is_ascii() {
            out.push(c);
        } else {
            let mut units = [0; 2];
            for unit in c.encode_utf16(&mut units) {
                out.push_str(&format!("\\u{unit:04x}"));
            }
        }
    }
    out
}

/// Percent-encoding as of a component of a URL; `form` writes a space as `+`.
fn percent_encoded(text: &str, form: bool) -> String {
    let mut out = String::with_capacity(text.len());
    for byte in text.bytes() {
        match byte {
            b'A'..=b'Z' | b'a'..=b'z' | b'0'..=b'9' | b'-' | b'.' | b'_' | b'~' => {
                out.push(char::from(byte));
            }
            b' ' if form => out.push('+'),
            other => out.push_str(&format!("%{other:02X}")),
        }
    }
    out
}

trait LowercaseEscapes {
    /// The same with `%3a` in place of `%3A`.
    fn to_ascii_lowercase_escapes(&self) -> String;
}

impl LowercaseEscapes for String {
    fn to_ascii_lowercase_escapes(&self) -> String {
        let mut left = 0_u8;
        self.chars()
            .map(|c| {
                if c == '%' {
                    left = 3;
                }
                let digit = left > 0;
                left = left.saturating_sub(1);
                if digit { c.to_ascii_lowercase() } else { c }
            })
            .collect()
    }
}

/// The characters of base64 that depend on nothing but these bytes, when `offset` bytes (modulo
/// three) stand before them: in the standard alphabet and in that for URLs.
fn base64_within(bytes: &[u8], offset: usize) -> [String; 2] {
    let padded: Vec<u8> = std::iter::repeat_n(0, offset)
        .chain(bytes.iter().copied())
        .collect();
    let from = (8 * offset).div_ceil(6);
    let to = 8 * padded.len() / 6;
    [
        STANDARD_NO_PAD.encode(&padded)[from..to].to_owned(),
        URL_SAFE_NO_PAD.encode(&padded)[from..to].to_owned(),
    ]
}

#[cfg(test)]
mod tests {
    use base64::engine::general_purpose::STANDARD;
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn base64_of_anything_around_it_contains_one_of_the_forms(
            secret in "[ -~]{6,40}", before in "[ -~]{0,7}", after in "[ -~]{0,7}"
        ) {
            let whole = STANDARD.encode(format!("{before}{secret}{after}"));
            let [form, _] = base64_within(secret.as_bytes(), before.len() % 3);
            prop_assert!(whole.contains(&form), "{whole} {form}");
        }
    }

    #[test]
    fn encodings_are_those_that_others_write() {
        assert_eq!(percent_encoded("a b/ü", false), "a%20b%2F%C3%BC");
        assert_eq!(percent_encoded("a b/ü", true), "a+b%2F%C3%BC");
        let lower = percent_encoded("A/B", false).to_ascii_lowercase_escapes();
        assert_eq!(lower, "A%2fB");
        assert_eq!(json("a\"b\\ü\n", true), r#"a\"b\\\u00fc\n"#);
    }
}
