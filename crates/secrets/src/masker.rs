//! Puts a mark in the place of secrets, in whatever text they turn up.

use std::borrow::Cow;
use std::collections::BTreeSet;
use std::fmt;
use std::ops::Range;

use aho_corasick::{AhoCorasick, MatchKind};

use crate::forms;
use crate::value::{SecretValue, VALUE_MIN};

/// What stands in the place of a secret.
pub const MASK: &str = "***";

/// What stands in the place of a text that could not be checked.
const WITHHELD: &str = "[withheld: the secrets of its project cannot be read]";

/// Masks a set of values, in all forms in which they usually turn up: as they are, in base64, in
/// hexadecimal digits, percent-encoded, and escaped as in JSON. It cannot recognise what was
/// encrypted, compressed, reversed or spread over several texts.
///
/// It holds the values: it is as secret as they are, and prints nothing of them.
#[derive(Default)]
pub struct Masker {
    patterns: Vec<Vec<u8>>,
    search: Option<AhoCorasick>,
    withholds: bool,
}

impl fmt::Debug for Masker {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Masker")
            .field("patterns", &self.patterns.len())
            .field("withholds", &self.withholds)
            .finish_non_exhaustive()
    }
}

impl Masker {
    /// Masks these values.
    pub fn new<'a>(values: impl IntoIterator<Item = &'a SecretValue>) -> Self {
        let patterns: BTreeSet<Vec<u8>> = values.into_iter().flat_map(forms::patterns).collect();
        let patterns: Vec<_> = patterns.into_iter().collect();
        if patterns.is_empty() {
            return Self::default();
        }
        let search = AhoCorasick::builder()
            .match_kind(MatchKind::Standard)
            .build(&patterns)
            .ok();
        Self {
            // More values than a search can be built for: nothing can be checked any more.
            withholds: search.is_none(),
            patterns,
            search,
        }
    }

    /// Lets no text through.
    pub fn withholding() -> Self {
        Self {
            withholds: true,
            ..Self::default()
        }
    }

    /// The text with every secret masked, and also a beginning of one at the text's end and an end
    /// of one at its beginning, if it is long enough to say anything: texts are cut.
    pub fn mask<'a>(&self, text: &'a str) -> Cow<'a, str> {
        self.masked(text, VALUE_MIN, VALUE_MIN)
    }

    /// The same for a text that is known to end in the middle of a longer one: however little of
    /// a secret stands at its end is masked.
    pub fn mask_beginning<'a>(&self, text: &'a str) -> Cow<'a, str> {
        self.masked(text, VALUE_MIN, 1)
    }

    /// The same for a text that is known to begin in the middle of a longer one.
    pub fn mask_end<'a>(&self, text: &'a str) -> Cow<'a, str> {
        self.masked(text, 1, VALUE_MIN)
    }

    /// Where secrets stand in some bytes, in order and apart from each other. None if that cannot
    /// be said, because the values cannot be read.
    pub fn find(&self, bytes: &[u8]) -> Option<Vec<Range<usize>>> {
        if self.withholds {
            return None;
        }
        let Some(search) = &self.search else {
            return Some(Vec::new());
        };
        let mut found: Vec<Range<usize>> = Vec::new();
        let mut all: Vec<_> = search
            .find_overlapping_iter(bytes)
            .map(|m| m.range())
            .collect();
        all.sort_by_key(|r| r.start);
        for range in all {
            match found.last_mut() {
                Some(last) if range.start <= last.end => last.end = last.end.max(range.end),
                _ => found.push(range),
            }
        }
        Some(found)
    }

    fn masked<'a>(&self, text: &'a str, head_min: usize, tail_min: usize) -> Cow<'a, str> {
        if self.withholds {
            return Cow::Borrowed(WITHHELD);
        }
        let Some(search) = &self.search else {
            return Cow::Borrowed(text);
        };
        let mut found: Vec<Range<usize>> = search
            .find_overlapping_iter(text)
            .map(|m| m.range())
            .collect();
        found.extend(self.head(text, head_min));
        found.extend(self.tail(text, tail_min));
        if found.is_empty() {
            return Cow::Borrowed(text);
        }
        Cow::Owned(replaced(text, found))
    }

    /// The longest proper end of a pattern that the text begins with.
    fn head(&self, text: &str, min: usize) -> Option<Range<usize>> {
        let text = text.as_bytes();
        let lengths = self.patterns.iter().filter_map(|p| {
            let longest = (p.len() - 1).min(text.len());
            (min..=longest)
                .rev()
                .find(|n| text[n - 1] == p[p.len() - 1] && text[..*n] == p[p.len() - n..])
        });
        lengths.max().map(|n| 0..n)
    }

    /// The longest proper beginning of a pattern that the text ends with.
    fn tail(&self, text: &str, min: usize) -> Option<Range<usize>> {
        let text = text.as_bytes();
        let lengths = self.patterns.iter().filter_map(|p| {
            let longest = (p.len() - 1).min(text.len());
            (min..=longest)
                .rev()
                .find(|n| text[text.len() - n] == p[0] && text[text.len() - n..] == p[..*n])
        });
        lengths.max().map(|n| text.len() - n..text.len())
    }
}

/// Ranges that touch or overlap become one mark.
fn replaced(text: &str, mut ranges: Vec<Range<usize>>) -> String {
    ranges.sort_by_key(|r| r.start);
    let mut out = String::with_capacity(text.len());
    let mut shown = 0;
    let mut masked_to = None;
    for range in ranges {
        // A part of a pattern may begin or end within a character.
        let start = text.floor_char_boundary(range.start);
        let end = text.ceil_char_boundary(range.end);
        if masked_to.is_none_or(|to| start > to) {
            out.push_str(&text[shown..start]);
            out.push_str(MASK);
        }
        shown = shown.max(end);
        masked_to = Some(shown);
    }
    out.push_str(&text[shown..]);
    out
}

#[cfg(test)]
mod tests {
    use base64::Engine as _;
    use base64::engine::general_purpose::STANDARD;
    use proptest::prelude::*;
    use zeroize::Zeroizing;

    use super::*;

    fn masker(values: &[&str]) -> Masker {
        let values: Vec<_> = values
            .iter()
            .map(|v| SecretValue::new(Zeroizing::new((*v).to_owned())).unwrap())
            .collect();
        Masker::new(&values)
    }

    #[test]
    fn a_secret_is_masked_in_every_form() {
        let secret = "pa55 \"w/ord\\ü=+";
        let masker = masker(&[secret]);
        let url = url_encoded(secret);
        let json = serde_json::to_string(&serde_json::json!({ "key": secret })).unwrap();
        let basic = STANDARD.encode(format!("user:{secret}"));
        let hex: String = secret.bytes().map(|b| format!("{b:02x}")).collect();
        for (text, masked) in [
            (format!("it is {secret}!"), "it is ***!".to_owned()),
            (
                format!("https://u:{url}@host/"),
                "https://u:***@host/".into(),
            ),
            (json, r#"{"key":"***"}"#.into()),
            (format!("{secret}{secret}"), MASK.into()),
            (hex, MASK.into()),
            (format!("{secret:?}"), "\"***\"".into()),
            ("nothing of it".into(), "nothing of it".into()),
        ] {
            assert_eq!(masker.mask(&text), masked);
        }
        let shown = masker.mask(&basic).into_owned();
        assert!(shown.contains(MASK) && shown.len() < 14, "{shown}");
    }

    fn url_encoded(text: &str) -> String {
        text.bytes()
            .map(|b| match b {
                b'a'..=b'z' | b'0'..=b'9' => char::from(b).to_string(),
                b => format!("%{b:02X}"),
            })
            .collect()
    }

    #[test]
    fn secrets_that_overlap_are_masked_as_one() {
        let masker = masker(&["abcdefgh", "fghijklm", "cdefgh"]);
        assert_eq!(masker.mask("<abcdefghijklm>"), "<***>");
        assert_eq!(masker.mask("<abcdefgh fghijklm>"), "<*** ***>");
        let found = masker.find(b"\xff<abcdefghijklm>").unwrap();
        assert_eq!((found.len(), found[0].clone()), (1, 2..15));
    }

    #[test]
    fn lines_of_a_value_are_secrets_of_their_own() {
        let masker = masker(&["-----BEGIN-----\nMIIEvQIBADANBg\n  kqhkiG9w0B  \nab\n"]);
        assert_eq!(masker.mask("key: MIIEvQIBADANBg"), "key: ***");
        assert_eq!(masker.mask("kqhkiG9w0B"), MASK);
        assert_eq!(masker.mask("about"), "about");
        let escaped = "\"-----BEGIN-----\\nMIIEvQIBADANBg\\n  kqhkiG9w0B  \\nab\\n\"";
        assert_eq!(masker.mask(escaped), "\"***\"");
    }

    #[test]
    fn a_long_value_is_masked_whole_and_in_part() {
        let secret: String = (0..4000).map(|n| format!("{n:x}")).collect();
        let masker = masker(&[&secret]);
        assert_eq!(masker.mask(&format!("<{secret}>")), "<***>");
        for length in [1500, 1024, 1000, 20, 3] {
            let beginning = format!("<{}", &secret[..length]);
            assert_eq!(masker.mask_beginning(&beginning), "<***");
        }
        let wrapped = STANDARD.encode(&secret);
        for line in wrapped.as_bytes().chunks(76) {
            let shown = masker.mask(std::str::from_utf8(line).unwrap()).into_owned();
            assert!(shown.len() < 12, "{shown}");
        }
    }

    #[test]
    fn what_cannot_be_checked_is_withheld() {
        assert_eq!(Masker::withholding().mask("anything"), WITHHELD);
        assert_eq!(Masker::default().mask("anything"), "anything");
    }

    proptest! {
        #[test]
        fn no_secret_survives(
            secret in "[a-z]{6,12}", other in "[a-d]{6,9}",
            parts in prop::collection::vec("[a-z ü]{0,6}", 1..5),
        ) {
            let masker = masker(&[&secret, &other]);
            let text = parts.join(&secret) + &other;
            let shown = masker.mask(&text).replace(MASK, "\n");
            prop_assert!(!shown.contains(&secret) && !shown.contains(&other), "{shown}");
        }

        #[test]
        fn wherever_a_text_is_cut_nothing_of_a_secret_is_left(
            secret in "[a-z0-9]{6,30}", before in "!{0,9}", at in 0..30usize,
        ) {
            let masker = masker(&[&secret]);
            let at = at.min(secret.len());
            let text = format!("{before}{}", &secret[..at]);
            let shown = masker.mask_beginning(&text).replace(MASK, "");
            prop_assert_eq!(shown, &before[..]);
            let text = format!("{}{before}", &secret[at..]);
            let shown = masker.mask_end(&text).replace(MASK, "");
            prop_assert_eq!(shown, &before[..]);
        }

        #[test]
        fn any_text_can_be_masked(text in any::<String>()) {
            masker(&["correct horse", "ünicode"]).mask(&text);
        }
    }
}
