//! Reading envelopes without a parser.
//!
//! Daybook writes the attributes of an event always in the same order and without white space, so
//! that nearly every envelope is read by comparing what stands between its values. Whatever is
//! written otherwise is left to the parser, and so is all that is wrong: what is accepted, and what
//! it is read as, is the same.

use std::borrow::Cow;

use jiff::Timestamp;
use serde_json::value::RawValue;
use uuid::Uuid;

use super::EventView;
use crate::check::plain;
use crate::names::EventId;

/// Reads an event that is written exactly as Daybook writes one. `None` says nothing about it.
pub(super) fn read(text: &str) -> Option<EventView<'_>> {
    let mut rest = text;
    literal(&mut rest, r#"{"specversion":"#)?;
    let specversion = string(&mut rest)?;
    literal(&mut rest, r#","id":"#)?;
    let id = EventId(uuid(&mut rest)?);
    literal(&mut rest, r#","source":"#)?;
    let source = string(&mut rest)?;
    literal(&mut rest, r#","type":"#)?;
    let kind = string(&mut rest)?;
    literal(&mut rest, r#","subject":"#)?;
    let subject = string(&mut rest)?;
    literal(&mut rest, r#","time":"#)?;
    let time = timestamp(string(&mut rest)?)?;
    literal(&mut rest, r#","recordedtime":"#)?;
    let recordedtime = timestamp(string(&mut rest)?)?;
    literal(&mut rest, r#","datacontenttype":"#)?;
    let datacontenttype = string(&mut rest)?;
    literal(&mut rest, r#","revision":"#)?;
    let revision = number(&mut rest)?;
    literal(&mut rest, r#","correlationid":"#)?;
    let correlationid = uuid(&mut rest)?;
    let causationid = match literal(&mut rest, r#","causationid":"#) {
        Some(()) => Some(EventId(uuid(&mut rest)?)),
        None => None,
    };
    literal(&mut rest, r#","authtype":"#)?;
    let authtype = string(&mut rest)?;
    literal(&mut rest, r#","authid":"#)?;
    let authid = string(&mut rest)?;
    let mut optional = |name: &str| match literal(&mut rest, name) {
        Some(()) => string(&mut rest).map(|text| Some(Cow::Borrowed(text))),
        None => Some(None),
    };
    let traceparent = optional(r#","traceparent":"#)?;
    let requestdigest = optional(r#","requestdigest":"#)?;
    literal(&mut rest, r#","data":"#)?;
    // White space around it would not be part of a value.
    if !rest.starts_with(['{', '[', '"']) {
        return None;
    }
    // If more than the closing brace follows on the data, this is no JSON.
    let data: &RawValue = serde_json::from_str(rest.strip_suffix('}')?).ok()?;
    Some(EventView {
        specversion: specversion.into(),
        id,
        _source: source.into(),
        kind: kind.into(),
        _subject: subject.into(),
        time,
        recordedtime,
        _datacontenttype: datacontenttype.into(),
        revision,
        correlationid,
        causationid,
        authtype: authtype.into(),
        authid: authid.into(),
        traceparent,
        requestdigest,
        data,
    })
}

#[inline(always)]
fn literal(rest: &mut &str, literal: &str) -> Option<()> {
    *rest = rest.strip_prefix(literal)?;
    Some(())
}

/// A string without escapes.
fn string<'a>(rest: &mut &'a str) -> Option<&'a str> {
    let text = rest.strip_prefix('"')?;
    let (text, after) = text.split_at_checked(plain(text.as_bytes()))?;
    *rest = after.strip_prefix('"')?;
    Some(text)
}

/// A UUID in its usual form.
fn uuid(rest: &mut &str) -> Option<Uuid> {
    let text = string(rest)?;
    (text.len() == 36).then(|| Uuid::try_parse(text).ok())?
}

fn number(rest: &mut &str) -> Option<u32> {
    let digits = rest.bytes().take_while(u8::is_ascii_digit).count();
    let (number, after) = rest.split_at(digits);
    *rest = after;
    let is_json = number.len() == 1 || !number.starts_with('0');
    is_json.then(|| number.parse().ok())?
}

/// A time in UTC as Daybook writes it: `2024-01-15T10:30:00Z`, or with a fraction of a second.
pub(crate) fn timestamp(text: &str) -> Option<Timestamp> {
    let bytes = text.as_bytes();
    let (moment, rest) = bytes.split_first_chunk::<19>()?;
    let fraction = rest.strip_suffix(b"Z")?;
    let nanosecond = match fraction.split_first() {
        None => 0,
        Some((b'.', digits)) if (1..=9).contains(&digits.len()) => {
            decimal(digits)? * 10_i64.pow(9 - digits.len() as u32)
        }
        Some(_) => return None,
    };
    let [
        y1,
        y2,
        y3,
        y4,
        b'-',
        m1,
        m2,
        b'-',
        d1,
        d2,
        b'T',
        h1,
        h2,
        b':',
        i1,
        i2,
        b':',
        s1,
        s2,
    ] = *moment
    else {
        return None;
    };
    let year = decimal(&[y1, y2, y3, y4])?;
    let (month, day) = (decimal(&[m1, m2])?, decimal(&[d1, d2])?);
    let (hour, minute, second) = (
        decimal(&[h1, h2])?,
        decimal(&[i1, i2])?,
        decimal(&[s1, s2])?,
    );
    // Days that not every month has, leap seconds and the like are for the library.
    let plain = (1970..=9998).contains(&year)
        && (1..=12).contains(&month)
        && (1..=28).contains(&day)
        && hour < 24
        && minute < 60
        && second < 60;
    if !plain {
        return text.parse().ok();
    }
    // Days since 1970, counted in years that begin in March.
    let (year, month) = if month > 2 {
        (year, month - 3)
    } else {
        (year - 1, month + 9)
    };
    let leap_days = year / 4 - year / 100 + year / 400;
    let days = 365 * year + leap_days + (153 * month + 2) / 5 + day - 1 - 719_468;
    let seconds = days * 86_400 + hour * 3_600 + minute * 60 + second;
    Timestamp::new(seconds, nanosecond.try_into().ok()?).ok()
}

fn decimal(digits: &[u8]) -> Option<i64> {
    digits.iter().try_fold(0, |number, digit| {
        let value = i64::from(digit.wrapping_sub(b'0'));
        (value < 10).then_some(number * 10 + value)
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// The frozen events, as Daybook writes them.
    fn golden() -> Vec<String> {
        let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden");
        let files = std::fs::read_dir(folder).unwrap();
        let written = files.map(|file| {
            let text = std::fs::read(file.unwrap().path()).unwrap();
            serde_json::to_string(&super::super::Event::from_bytes(&text).unwrap()).unwrap()
        });
        let all: Vec<String> = written.collect();
        assert!(all.len() > 30);
        all
    }

    fn same(one: &EventView<'_>, other: &EventView<'_>) -> bool {
        format!("{one:?}") == format!("{other:?}")
    }

    #[test]
    fn what_daybook_writes_is_read_without_a_parser() {
        for text in golden() {
            let read = read(&text).unwrap_or_else(|| panic!("{text}"));
            let parsed: EventView<'_> = serde_json::from_str(&text).unwrap();
            assert!(same(&read, &parsed), "{read:?} {parsed:?}");
        }
    }

    #[test]
    fn what_is_written_otherwise_is_left_to_the_parser() {
        let text = &golden()[0];
        for (from, to) in [
            ("\"data\":", "\"data\": "),
            (",\"data\":", ",\"extra\":1,\"data\":"),
            ("\"revision\":", "\"revision\":0"),
            (
                "\"specversion\":",
                "\"specversion\":\"1.0\",\"specversion\":",
            ),
            ("/projects/", "\\u002fprojects/"),
            ("\"authtype\":", "\"authtype\":null,\"authtype\":"),
        ] {
            let other = text.replacen(from, to, 1);
            assert_ne!(other, *text, "{from}");
            assert!(read(&other).is_none(), "{other}");
        }
        let more = text.strip_suffix('}').unwrap().to_owned() + ",\"extra\":{}}";
        assert!(read(&more).is_none());
        assert!(EventView::from_bytes(more.as_bytes()).is_ok());
    }

    proptest! {
        #[test]
        fn times_are_read_as_the_library_reads_them(
            seconds in -1_000_000_000_i64..253_000_000_000, nanos in 0_i32..1_000_000_000,
        ) {
            for nanos in [0, nanos, nanos / 1000 * 1000, nanos / 1_000_000 * 1_000_000] {
                let at = Timestamp::new(seconds, nanos).unwrap();
                prop_assert_eq!(timestamp(&at.to_string()), Some(at));
            }
        }

        #[test]
        fn a_damaged_event_is_read_as_the_parser_reads_it(
            which in any::<prop::sample::Index>(), at in any::<prop::sample::Index>(),
            with in prop::collection::vec(any::<u8>(), 0..3), cut in 0_usize..3,
        ) {
            static GOLDEN: std::sync::OnceLock<Vec<String>> = std::sync::OnceLock::new();
            let golden = GOLDEN.get_or_init(golden);
            let mut bytes = golden[which.index(golden.len())].clone().into_bytes();
            let at = at.index(bytes.len());
            let end = (at + cut).min(bytes.len());
            bytes.splice(at..end, with);
            if let Ok(text) = std::str::from_utf8(&bytes) && let Some(read) = read(text) {
                let parsed = serde_json::from_str::<EventView<'_>>(text);
                prop_assert!(parsed.is_ok_and(|parsed| same(&read, &parsed)), "{}", text);
            }
        }
    }
}
