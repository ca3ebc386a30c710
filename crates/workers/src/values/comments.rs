//! Comments that people wrote into a values file, carried over to the file that takes its place.
//!
//! Daybook writes a values file anew from its data: keys sorted, one style. A comment has no place
//! in data, so it is found by the key that it stands before or beside, and put back there. One of
//! a key that is gone goes with it. This knows the YAML that people write by hand (block maps and
//! lists, quotes, flow values, block scalars); what comes of it is read again, and where it is not
//! the same data, the file is written without comments rather than with other values.

use std::collections::BTreeMap;
use std::mem;

use serde_json::Value;

/// Lines that Daybook begins its files with, now and in earlier versions.
const HEADERS: [&str; 2] = [
    "# Written by Daybook. Changes by hand are kept.",
    "# Written by Daybook. Changes by hand are kept, except for comments.",
];

/// The keys from the outermost to an entry's own. An item of a list is its own text.
type Path = Vec<String>;

/// The comments of a file.
#[derive(Debug, Default)]
struct Comments {
    /// Whole lines, with the empty ones between them, before an entry.
    before: BTreeMap<Path, Vec<String>>,
    /// At the end of an entry's line.
    beside: BTreeMap<Path, String>,
    /// After the last entry.
    end: Vec<String>,
}

/// The file `next` with the comments of `previous`.
pub(super) fn carry_over(previous: &str, next: String) -> String {
    if !previous.contains('#') {
        return next;
    }
    let merged = merge(collect(previous), &next);
    let read = |text: &str| serde_saphyr::from_str::<Value>(text).ok();
    match (read(&merged), read(&next)) {
        (Some(merged_data), Some(data)) if merged_data == data => merged,
        _ => next,
    }
}

fn collect(text: &str) -> Comments {
    let mut found = Comments::default();
    let mut pending: Vec<String> = Vec::new();
    let mut reader = Reader::default();
    for line in text.lines() {
        match reader.read(line) {
            Line::Empty => pending.push(String::new()),
            Line::Comment if HEADERS.contains(&line.trim()) => {}
            Line::Comment => pending.push(line.trim().to_owned()),
            Line::Inside => {}
            Line::Entry { path, comment } => {
                let lines = trimmed(mem::take(&mut pending));
                if !lines.is_empty() {
                    found.before.entry(path.clone()).or_default().extend(lines);
                }
                if let Some(at) = comment {
                    found
                        .beside
                        .entry(path)
                        .or_insert_with(|| line[at..].trim_end().to_owned());
                }
            }
        }
    }
    found.end = trimmed(pending);
    found
}

/// Without the empty lines around it.
fn trimmed(mut lines: Vec<String>) -> Vec<String> {
    let Some(first) = lines.iter().position(|l| !l.is_empty()) else {
        return Vec::new();
    };
    lines.drain(..first);
    while lines.last().is_some_and(String::is_empty) {
        lines.pop();
    }
    lines
}

fn merge(mut comments: Comments, next: &str) -> String {
    let mut out = String::with_capacity(next.len() * 2);
    let mut reader = Reader::default();
    for line in next.lines() {
        let Line::Entry { path, comment } = reader.read(line) else {
            out.push_str(line);
            out.push('\n');
            continue;
        };
        let indent = &line[..line.len() - line.trim_start().len()];
        for text in comments.before.remove(&path).into_iter().flatten() {
            if !text.is_empty() {
                out.push_str(indent);
            }
            out.push_str(&text);
            out.push('\n');
        }
        out.push_str(line);
        if comment.is_none()
            && let Some(text) = comments.beside.remove(&path)
        {
            out.push_str("  ");
            out.push_str(&text);
        }
        out.push('\n');
    }
    for text in comments.end {
        out.push_str(&text);
        out.push('\n');
    }
    out
}

/// What a line is.
#[derive(Debug, PartialEq, Eq)]
enum Line {
    Empty,
    Comment,
    /// A further line of a value, or nothing that an entry begins with.
    Inside,
    /// A key or an item begins here; `comment` says at which byte its comment does.
    Entry {
        path: Path,
        comment: Option<usize>,
    },
}

/// Reads a document line by line.
#[derive(Debug, Default)]
struct Reader {
    /// The entries around, each with its column.
    around: Vec<(usize, String)>,
    /// A quoted or flow value that is still open.
    open: Open,
    /// Lines beyond this column belong to a block scalar.
    scalar: Option<usize>,
}

/// How far a value is open at the end of a line.
#[derive(Debug, Default)]
struct Open {
    quote: Option<char>,
    depth: usize,
}

impl Open {
    fn is_open(&self) -> bool {
        self.quote.is_some() || self.depth > 0
    }

    /// Reads a part of a value, and returns where its comment begins.
    fn read(&mut self, text: &str) -> Option<usize> {
        let mut before = ' ';
        let mut escaped = false;
        let mut begins = true;
        for (at, c) in text.char_indices() {
            match self.quote {
                Some('"') if escaped => escaped = false,
                Some('"') if c == '\\' => escaped = true,
                Some(quote) if c == quote => self.quote = None,
                Some(_) => {}
                None => match c {
                    '#' if before.is_whitespace() => return Some(at),
                    // In a plain value they are letters like any other.
                    '"' | '\'' if begins || self.depth > 0 => self.quote = Some(c),
                    '[' | '{' if begins || self.depth > 0 => self.depth += 1,
                    ']' | '}' if self.depth > 0 => self.depth -= 1,
                    _ => {}
                },
            }
            begins &= c.is_whitespace();
            before = c;
        }
        None
    }
}

impl Reader {
    fn read(&mut self, line: &str) -> Line {
        let text = line.trim_start();
        let column = line.len() - text.len();
        if self.open.is_open() {
            self.open.read(line);
            return Line::Inside;
        }
        if text.is_empty() {
            return if self.scalar.is_some() {
                Line::Inside
            } else {
                Line::Empty
            };
        }
        if let Some(of) = self.scalar {
            if column > of {
                return Line::Inside;
            }
            self.scalar = None;
        }
        if text.starts_with('#') {
            return Line::Comment;
        }
        if let Some(item) = text.strip_prefix("- ") {
            let inner = item.trim_start();
            let at = line.len() - inner.len();
            let comment = Open::default().read(inner);
            let own = inner[..comment.unwrap_or(inner.len())].trim_end();
            self.enter(column, format!("- {own}"));
            let path = self.path();
            // A map begins on the line of its item.
            match key_of(inner) {
                Some((key, value)) => {
                    self.enter(at, key);
                    self.value(at, &inner[value..])
                }
                None => self.value(column, inner),
            };
            return Line::Entry {
                path,
                comment: comment.map(|c| at + c),
            };
        }
        let Some((key, value)) = key_of(text) else {
            return Line::Inside;
        };
        self.enter(column, key);
        let comment = self.value(column, &text[value..]);
        Line::Entry {
            path: self.path(),
            comment: comment.map(|c| column + value + c),
        }
    }

    fn enter(&mut self, column: usize, key: String) {
        while self.around.last().is_some_and(|(c, _)| *c >= column) {
            // The items of a list may stand in the column of its key.
            let is_item = key.starts_with("- ");
            if is_item
                && self
                    .around
                    .last()
                    .is_some_and(|(c, k)| *c == column && !k.starts_with("- "))
            {
                break;
            }
            self.around.pop();
        }
        self.around.push((column, key));
    }

    /// Reads what stands after a key or the dash of an item in this column.
    fn value(&mut self, column: usize, text: &str) -> Option<usize> {
        let comment = self.open.read(text);
        let value = text[..comment.unwrap_or(text.len())].trim();
        let mut marks = value.chars();
        if matches!(marks.next(), Some('|' | '>'))
            && marks.all(|c| matches!(c, '+' | '-' | '0'..='9'))
        {
            self.scalar = Some(column);
        }
        comment
    }

    fn path(&self) -> Path {
        self.around.iter().map(|(_, key)| key.clone()).collect()
    }
}

/// The key that a text begins with, and where its value begins.
fn key_of(text: &str) -> Option<(String, usize)> {
    let quote = text.chars().next().filter(|c| matches!(c, '"' | '\''));
    let end = match quote {
        Some(quote) => 1 + text[1..].find(quote)? + 1,
        None => text.match_indices(':').map(|(at, _)| at).find(|at| {
            text[at + 1..]
                .chars()
                .next()
                .is_none_or(char::is_whitespace)
        })?,
    };
    let rest = text[end..].strip_prefix(':')?;
    if !rest.is_empty() && !rest.starts_with(char::is_whitespace) {
        return None;
    }
    let key = text[..end].trim();
    let key = match quote {
        Some(quote) => key.trim_matches(quote),
        None => key,
    };
    Some((key.to_owned(), end + 1))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn carried(previous: &str, next: &str, expected: &str) {
        let once = carry_over(previous, next.to_owned());
        assert_eq!(once, expected);
        assert_eq!(carry_over(&once, next.to_owned()), expected, "not stable");
    }

    #[test]
    fn comments_stay_with_their_keys() {
        carried(
            "# why\n\n# all of it\napp: # the app\n  # many\n  replicas: 2   # was 1\n  \
             name: 'a # b'\n  list:\n  # the first\n  - one # 1\n  - two\n# the end\n",
            "app:\n  list:\n    - one\n    - two\n    - three\n  name: 'a # b'\n  new: 1\n  \
             replicas: 3\n",
            "# why\n\n# all of it\napp:  # the app\n  list:\n    # the first\n    - one  # 1\n    \
             - two\n    - three\n  name: 'a # b'\n  new: 1\n  # many\n  replicas: 3  # was 1\n\
             # the end\n",
        );
    }

    #[test]
    fn those_of_a_key_that_is_gone_go_with_it() {
        carried(
            "a:\n  # about b\n  b: 1 # one\n  c: 2\n",
            "a:\n  c: 2\n",
            "a:\n  c: 2\n",
        );
    }

    #[test]
    fn what_looks_like_one_within_a_value_is_none() {
        let text = "a: |\n  # text\n  b: 1\nc: \"x\n  # y\"\nd: [1, # one\n  2]\ne: x#y # z\n";
        let next = "a: \"# text\\nb: 1\\n\"\nc: \"x # y\"\nd:\n  - 1\n  - 2\ne: x#y\n";
        // One within a list stands beside its key.
        let expected = next
            .replace("x#y\n", "x#y  # z\n")
            .replace("d:\n", "d:  # one\n");
        carried(text, next, &expected);
    }

    #[test]
    fn a_header_of_an_earlier_version_is_not_kept() {
        let next = format!("{}\na: 1\n", HEADERS[0]);
        carried(
            &format!("{}\n# mine\na: 2\n", HEADERS[1]),
            &next,
            &format!("{}\n# mine\na: 1\n", HEADERS[0]),
        );
    }

    #[test]
    fn values_never_change() {
        use proptest::prelude::*;
        let line = prop_oneof![
            "[ ]{0,6}[a-c]:( [a-c'\"#\\[\\{|>-]{0,6})?",
            "[ ]{0,6}#[ a-c:]{0,5}",
            "[ ]{0,6}- [a-c:'\" #]{0,6}",
        ];
        proptest!(|(lines in prop::collection::vec(line, 0..12))| {
            let next = "a:\n  b:\n    - c\n    - 'a # b'\n  c: 1\nb: x\n";
            let merged = carry_over(&lines.join("\n"), next.to_owned());
            let read = |text: &str| serde_saphyr::from_str::<Value>(text).unwrap();
            prop_assert_eq!(read(&merged), read(next));
        });
    }
}
