//! Reading the entries of the tree: what each says, and which rules it breaks.
//!
//! Daybook writes the attributes of an event always in the same order, so that nearly all events
//! are read without a parser; whatever is written otherwise is read by one. What is accepted is
//! the same.

use std::hash::{BuildHasher, RandomState};
use std::ops::Range;

use daybook_events::check::plain;
use daybook_events::envelope::{DecodeError, TYPE_PREFIX};
use daybook_events::outline::Step;
use daybook_events::{AggregateKind, AnyPayload, Event, EventId, Position, TraceParent};
use daybook_store::tlog::is_gap;
use jiff::Timestamp;
use serde_json::value::RawValue;
use uuid::Uuid;

use crate::finding::Kind;
use crate::schema::Schemas;

/// An entry as it was read.
#[derive(Debug)]
pub(crate) struct Entry {
    pub(crate) position: Position,
    /// Where it is in its bundle.
    pub(crate) place: Range<usize>,
    /// The event's id, where one can be read.
    pub(crate) id: Option<EventId>,
    pub(crate) content: Content,
    /// Rules that it breaks.
    pub(crate) broken: Vec<(Kind, String)>,
}

/// What an entry is.
#[derive(Debug)]
pub(crate) enum Content {
    /// An event that a fold takes.
    Event(Read),
    /// Nothing is there, and the tree says so.
    Gap,
    /// What no fold can take.
    Other,
}

/// What a fold needs of an event.
#[derive(Debug)]
pub(crate) struct Read {
    /// Stands for the subject; see [`Keys`].
    pub(crate) key: u128,
    /// Where the subject stands in the bytes, if it stands there literally.
    pub(crate) subject: Subject,
    /// The kind of aggregate that the subject names.
    pub(crate) of: Option<AggregateKind>,
    pub(crate) time: Timestamp,
    pub(crate) trace: Option<TraceParent>,
    pub(crate) revision: u32,
    /// Where the type (without the common prefix) and the payload stand in the bytes, as long as
    /// the payload is unread.
    pub(crate) unread: [Range<usize>; 2],
    /// None as long as it is unread, as it is of nearly all.
    pub(crate) payload: Option<Box<Payload>>,
}

/// What is known of a payload.
#[derive(Debug)]
// It goes straight to the fold, without memory of its own.
#[allow(clippy::large_enum_variant)]
pub(crate) enum Payload {
    /// That it can be read, and what it is to its aggregate.
    Step(Step),
    /// All of it, or why it could not be read.
    Whole(AnyPayload),
}

/// The text of a subject.
#[derive(Debug, Clone)]
pub(crate) enum Subject {
    In(Range<usize>),
    Text(String),
}

impl Subject {
    pub(crate) fn text<'a>(&'a self, bytes: &'a [u8]) -> &'a str {
        match self {
            Self::In(range) => bytes
                .get(range.clone())
                .and_then(|b| std::str::from_utf8(b).ok())
                .unwrap_or_default(),
            Self::Text(text) => text,
        }
    }
}

/// Numbers that stand for subjects. They differ from run to run, so that nobody can choose
/// subjects that collide.
#[derive(Debug, Clone, Default)]
pub(crate) struct Keys(RandomState, RandomState);

impl Keys {
    pub(crate) fn of(&self, subject: &str) -> u128 {
        u128::from(self.0.hash_one(subject)) << 64 | u128::from(self.1.hash_one(subject))
    }
}

/// The attributes of an event that are looked at.
struct Envelope<'a> {
    id: Uuid,
    source: &'a str,
    kind: &'a str,
    subject: &'a str,
    time: Timestamp,
    content_type: &'a str,
    revision: u32,
    authtype: &'a str,
    authid: &'a str,
    trace: Option<TraceParent>,
    data: &'a str,
}

/// How thoroughly events are checked.
#[derive(Debug, Clone)]
pub(crate) struct Checks {
    pub(crate) keys: Keys,
    pub(crate) schemas: Schemas,
    /// Whether schemas are asked about events that can be read without them.
    pub(crate) all_schemas: bool,
    /// Whether it is enough to know of payloads that they can be read, where that is enough to
    /// say which events may follow.
    pub(crate) outlines: bool,
}

impl Checks {
    /// Reads an entry of a bundle and checks it by itself.
    pub(crate) fn read(&self, position: Position, bundle: &[u8], place: Range<usize>) -> Entry {
        self.entry(position, bundle, place, true)
    }

    /// The same, but leaves payloads unread wherever [`Self::plain_payload`] can read them later.
    /// Where it cannot, the entry is to be [read](Self::read) after all: what is known of it so far
    /// may be wrong.
    pub(crate) fn skim(&self, position: Position, bundle: &[u8], place: Range<usize>) -> Entry {
        self.entry(position, bundle, place, false)
    }

    /// The payload of an event of these bytes that was skimmed, if there is nothing to be said
    /// about it.
    pub(crate) fn plain_payload(&self, read: &Read, bytes: &[u8]) -> Option<Payload> {
        if read.payload.is_some() || self.all_schemas {
            return None;
        }
        let text = |place: &Range<usize>| std::str::from_utf8(bytes.get(place.clone())?).ok();
        let [kind, data] = &read.unread;
        match self.payload(read.of, text(kind)?, text(data)?) {
            Payload::Whole(payload) if is_unread(&payload) => None,
            payload => Some(payload),
        }
    }

    fn entry(
        &self,
        position: Position,
        bundle: &[u8],
        place: Range<usize>,
        payloads: bool,
    ) -> Entry {
        let mut broken = Vec::new();
        let bytes = bundle.get(place.clone()).unwrap_or_default();
        let (id, content) = self.content(position, bytes, payloads, &mut broken);
        Entry {
            position,
            place,
            id,
            content,
            broken,
        }
    }

    fn content(
        &self,
        position: Position,
        bytes: &[u8],
        payloads: bool,
        broken: &mut Vec<(Kind, String)>,
    ) -> (Option<EventId>, Content) {
        if is_gap(position, bytes) {
            broken.push((
                Kind::GapRecorded,
                "nothing was there when it was signed".into(),
            ));
            return (None, Content::Gap);
        }
        if let Some(digest) = too_large(position, bytes) {
            broken.push((
                Kind::EventTooLarge,
                format!("the event did not fit the tree; its digest is {digest}"),
            ));
            return (None, Content::Other);
        }
        let text = match std::str::from_utf8(bytes) {
            Ok(text) => text,
            Err(e) => {
                broken.push((Kind::EnvelopeInvalid, format!("it is not UTF-8: {e}")));
                return (None, Content::Other);
            }
        };
        let known = broken.len();
        let judged = canonical(text).and_then(|e| self.judge(text, &e, payloads, broken).ok());
        let (id, content) = match judged {
            Some((id, read)) => (id, Content::Event(read)),
            None => {
                broken.truncate(known);
                match self.by_parser(text, broken) {
                    Ok((id, read)) => (id, Content::Event(read)),
                    Err(why) => {
                        broken.push((Kind::EnvelopeInvalid, why));
                        return (None, Content::Other);
                    }
                }
            }
        };
        (Some(EventId(id)), content)
    }

    fn by_parser(
        &self,
        text: &str,
        broken: &mut Vec<(Kind, String)>,
    ) -> Result<(Uuid, Read), String> {
        let event = Event::from_bytes(text.as_bytes()).map_err(|e| e.to_string())?;
        let Some(kind) = event.kind.strip_prefix(TYPE_PREFIX) else {
            return Err(format!("its type {:?} is none of Daybook's", event.kind));
        };
        let envelope = Envelope {
            id: event.id.0,
            source: &event.source,
            kind,
            subject: &event.subject,
            time: event.time,
            content_type: &event.datacontenttype,
            revision: event.revision,
            authtype: &event.authtype,
            authid: &event.authid,
            trace: event.trace(),
            data: event.data.get(),
        };
        let (id, mut read) = self
            .judge(text, &envelope, true, broken)
            .map_err(|e| e.to_string())?;
        if let Subject::In(_) = read.subject {
            read.subject = Subject::Text(event.subject.clone());
        }
        Ok((id, read))
    }

    /// Reads a payload, or only checks it where that is enough.
    fn payload(&self, of: Option<AggregateKind>, kind: &str, data: &str) -> Payload {
        let checked = of
            .filter(|_| self.outlines)
            .and_then(|of| Step::check(of, kind, data));
        match checked {
            Some(step) => Payload::Step(step),
            None => Payload::Whole(AnyPayload::decode(of, kind, data)),
        }
    }

    /// Checks an event's rules, and reads its payload if that is asked for.
    fn judge(
        &self,
        text: &str,
        envelope: &Envelope<'_>,
        payloads: bool,
        broken: &mut Vec<(Kind, String)>,
    ) -> Result<(Uuid, Read), serde_json::Error> {
        let Envelope { kind, subject, .. } = *envelope;
        let mut slashes = memchr::memchr_iter(b'/', subject.as_bytes());
        let [first, second, third] = std::array::from_fn(|_| slashes.next());
        let has_four = third.is_some() && slashes.next().is_none();
        let project = &subject[..first.unwrap_or(subject.len())];
        let aggregate = match second {
            Some(second) => &subject[second + 1..third.unwrap_or(subject.len())],
            None => "",
        };
        let of: Option<AggregateKind> = aggregate.parse().ok();
        let place = |part: &str| {
            let at = part.as_ptr() as usize;
            let start = at.wrapping_sub(text.as_ptr() as usize);
            start..start.wrapping_add(part.len())
        };
        let payload = payloads.then(|| self.payload(of, kind, envelope.data));
        if let Some(Payload::Whole(payload)) = &payload
            && is_unread(payload)
        {
            // What could be read is JSON. What could not may be none at all.
            serde_json::from_str::<&RawValue>(envelope.data)?;
        }
        let mut rule = |holds: bool, what: &dyn Fn() -> String| {
            if !holds {
                broken.push((Kind::EnvelopeInvalid, what()));
            }
        };
        rule(has_four, &|| {
            format!("its subject {subject:?} is not <project>/<environment>/<aggregate>/<id>")
        });
        // What is about the ledger itself belongs to no project.
        let source = envelope.source.strip_prefix("/projects/");
        let of_project = match project {
            "_" => envelope.source == "/",
            project => source == Some(project),
        };
        rule(of_project, &|| {
            let source = envelope.source;
            format!("its source {source:?} is not the project of its subject {subject:?}")
        });
        let of_aggregate = kind.strip_prefix(aggregate).is_some_and(|rest| {
            // One that is known has no dot of its own.
            matches!(rest.as_bytes().first(), None | Some(b'.'))
                && (of.is_some() || !aggregate.contains('.'))
        });
        rule(of_aggregate, &|| {
            format!("its type {kind} is not of the aggregate of its subject {subject:?}")
        });
        rule(envelope.content_type == "application/json", &|| {
            format!("its content type is {:?}", envelope.content_type)
        });
        rule(envelope.revision > 0, &|| "its revision is 0".into());
        rule(
            !envelope.authtype.is_empty() && !envelope.authid.is_empty(),
            &|| "it names nobody as its author".into(),
        );
        if let Some(payload) = &payload {
            self.judge_payload(text, kind, payload, broken);
        }
        let read = Read {
            key: self.keys.of(subject),
            subject: Subject::In(place(subject)),
            of,
            time: envelope.time,
            trace: envelope.trace,
            revision: envelope.revision,
            unread: [place(kind), place(envelope.data)],
            payload: payload.map(Box::new),
        };
        Ok((envelope.id, read))
    }

    fn judge_payload(
        &self,
        text: &str,
        kind: &str,
        payload: &Payload,
        broken: &mut Vec<(Kind, String)>,
    ) {
        let error = match payload {
            Payload::Step(_) => None,
            Payload::Whole(payload) => payload.error(),
        };
        let unknown = match error {
            None => matches!(payload, Payload::Whole(AnyPayload::Other)),
            Some(DecodeError::UnknownKind(_)) => true,
            Some(error) => {
                broken.push((Kind::EventUnreadable, error.to_string()));
                false
            }
        };
        if unknown {
            let what = format!("{kind} is not known to this version: its payload was not checked");
            broken.push((Kind::KindUnknown, what));
        }
        if (self.all_schemas || unknown || error.is_some())
            && let Some(why) = self.schemas.violation(kind, text)
        {
            broken.push((Kind::SchemaViolated, why));
        }
    }
}

/// Whether a payload could not be read, or is of a newer version.
fn is_unread(payload: &AnyPayload) -> bool {
    payload.error().is_some() || matches!(payload, AnyPayload::Other)
}

/// The digest in the leaf of an event that was too large, if it is one.
fn too_large(position: Position, bytes: &[u8]) -> Option<&str> {
    let text = std::str::from_utf8(bytes.strip_prefix(b"daybook.dev/too-large/v1\n")?).ok()?;
    let (at, digest) = text.split_once('\n')?;
    let digest = digest.strip_suffix('\n')?;
    let hash = digest.strip_prefix("sha256:")?;
    let is_hash = hash.len() == 64 && hash.bytes().all(|b| b.is_ascii_hexdigit());
    (is_hash && at == position.to_string()).then_some(digest)
}

/// Reads an event that is written exactly as Daybook writes one. `None` says nothing about it.
fn canonical(text: &str) -> Option<Envelope<'_>> {
    let mut rest = text;
    literal(&mut rest, r#"{"specversion":"1.0","id":""#)?;
    let id = uuid(&mut rest)?;
    literal(&mut rest, r#"","source":""#)?;
    let source = string(&mut rest)?;
    literal(&mut rest, r#","type":"dev.daybook."#)?;
    let kind = string(&mut rest)?;
    literal(&mut rest, r#","subject":""#)?;
    let subject = string(&mut rest)?;
    literal(&mut rest, r#","time":""#)?;
    let happened = string(&mut rest)?;
    let time = time(happened)?;
    literal(&mut rest, r#","recordedtime":""#)?;
    let recorded = string(&mut rest)?;
    if recorded != happened {
        self::time(recorded)?;
    }
    literal(&mut rest, r#","datacontenttype":""#)?;
    let content_type = string(&mut rest)?;
    literal(&mut rest, r#","revision":"#)?;
    let digits = rest.bytes().take_while(u8::is_ascii_digit).count();
    let (number, after) = rest.split_at(digits);
    if number.len() > 1 && number.starts_with('0') {
        return None;
    }
    let revision = number.parse().ok()?;
    rest = after;
    literal(&mut rest, r#","correlationid":""#)?;
    uuid(&mut rest)?;
    literal(&mut rest, "\"")?;
    if literal(&mut rest, r#","causationid":""#).is_some() {
        uuid(&mut rest)?;
        literal(&mut rest, "\"")?;
    }
    literal(&mut rest, r#","authtype":""#)?;
    let authtype = string(&mut rest)?;
    literal(&mut rest, r#","authid":""#)?;
    let authid = string(&mut rest)?;
    let mut trace = None;
    if literal(&mut rest, r#","traceparent":""#).is_some() {
        trace = TraceParent::parse(string(&mut rest)?).ok();
    }
    if literal(&mut rest, r#","requestdigest":""#).is_some() {
        string(&mut rest)?;
    }
    literal(&mut rest, r#","data":"#)?;
    // If more follows on the data than the closing brace, the data is no JSON, and the parser is
    // asked.
    let data = rest.strip_suffix('}')?;
    Some(Envelope {
        id,
        source,
        kind,
        subject,
        time,
        content_type,
        revision,
        authtype,
        authid,
        trace,
        data,
    })
}

#[inline(always)]
fn literal(rest: &mut &str, literal: &str) -> Option<()> {
    *rest = rest.strip_prefix(literal)?;
    Some(())
}

/// A string without escapes, up to its closing quote, which is taken too.
fn string<'a>(rest: &mut &'a str) -> Option<&'a str> {
    let (text, after) = rest.split_at(plain(rest.as_bytes()));
    *rest = after.strip_prefix('"')?;
    Some(text)
}

/// A UUID in its usual form.
fn uuid(rest: &mut &str) -> Option<Uuid> {
    let (text, after) = rest.split_at_checked(36)?;
    *rest = after;
    Uuid::try_parse(text).ok()
}

/// A time in UTC, as Daybook writes it.
fn time(text: &str) -> Option<Timestamp> {
    let bytes = text.as_bytes();
    let number = |range: Range<usize>| -> Option<i64> {
        bytes.get(range)?.iter().try_fold(0, |number, digit| {
            digit
                .is_ascii_digit()
                .then(|| number * 10 + i64::from(digit - b'0'))
        })
    };
    let is = |at: usize, byte: u8| bytes.get(at) == Some(&byte);
    let punctuated = is(4, b'-') && is(7, b'-') && is(10, b'T') && is(13, b':') && is(16, b':');
    let (year, month, day) = (number(0..4)?, number(5..7)?, number(8..10)?);
    let (hour, minute, second) = (number(11..13)?, number(14..16)?, number(17..19)?);
    let fraction = bytes.get(19..)?.strip_suffix(b"Z")?;
    // Days that not every month has, leap seconds and the like are for the library.
    let plain = (1970..=9999).contains(&year)
        && (1..=12).contains(&month)
        && (1..=28).contains(&day)
        && hour < 24
        && minute < 60
        && second < 60
        && punctuated
        && fraction.len() <= 10
        && fraction.len() != 1;
    if !plain {
        return text.parse().ok();
    }
    let nanos = match fraction.split_first() {
        None => 0,
        Some((b'.', digits)) => {
            let number = number(20..20 + digits.len())?;
            number * 10_i64.pow(9 - digits.len() as u32)
        }
        Some(_) => return None,
    };
    // Days since 1970, counted in years that begin in March.
    let (year, month) = if month > 2 {
        (year, month - 3)
    } else {
        (year - 1, month + 9)
    };
    let era = year / 400;
    let of_era = year % 400;
    let day_of_year = (153 * month + 2) / 5 + day - 1;
    let day_of_era = of_era * 365 + of_era / 4 - of_era / 100 + day_of_year;
    let days = era * 146_097 + day_of_era - 719_468;
    let seconds = days * 86_400 + hour * 3_600 + minute * 60 + second;
    Timestamp::new(seconds, i32::try_from(nanos).ok()?).ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn checks() -> Checks {
        Checks {
            keys: Keys::default(),
            schemas: Schemas::of_this_version(),
            all_schemas: true,
            outlines: false,
        }
    }

    fn without_schemas() -> Checks {
        Checks {
            keys: Keys::default(),
            schemas: Schemas::default(),
            all_schemas: false,
            outlines: true,
        }
    }

    fn golden() -> Vec<(String, String)> {
        let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/../events/tests/golden");
        let mut all = Vec::new();
        for file in std::fs::read_dir(folder).unwrap() {
            let path = file.unwrap().path();
            let text = std::fs::read_to_string(&path).unwrap();
            all.push((path.file_stem().unwrap().display().to_string(), text));
        }
        assert!(all.len() > 30);
        all
    }

    /// As Daybook writes it.
    fn compact(text: &str) -> String {
        serde_json::to_string(&Event::from_bytes(text.as_bytes()).unwrap()).unwrap()
    }

    #[test]
    fn every_kind_of_event_is_read_in_any_form() {
        let checks = checks();
        for (kind, text) in golden() {
            for text in [compact(&text), text] {
                let entry = checks.read(Position(1), text.as_bytes(), 0..text.len());
                assert_eq!(entry.broken, [], "{kind}: {text}");
                let event = Event::from_bytes(text.as_bytes()).unwrap();
                assert_eq!(entry.id, Some(event.id));
                let Content::Event(read) = entry.content else {
                    panic!("{kind} is no event");
                };
                assert_eq!(read.subject.text(text.as_bytes()), event.subject);
                let Some(Payload::Whole(payload)) = read.payload.map(|p| *p) else {
                    panic!("{kind} was not read as a whole");
                };
                assert_eq!(
                    (read.time, read.revision, payload.error()),
                    (event.time, event.revision, None)
                );
            }
        }
    }

    #[test]
    fn what_daybook_writes_is_read_without_a_parser() {
        for (kind, text) in golden() {
            let text = compact(&text);
            let envelope = canonical(&text).unwrap_or_else(|| panic!("{kind}: {text}"));
            let event = Event::from_bytes(text.as_bytes()).unwrap();
            assert_eq!((envelope.id, envelope.time), (event.id.0, event.time));
            assert_eq!(envelope.data, event.data.get());
        }
    }

    #[test]
    fn a_broken_rule_is_named() {
        let (_, text) = golden()
            .into_iter()
            .find(|(kind, _)| kind == "deployment.requested.v1")
            .unwrap();
        let good = compact(&text);
        let checks = checks();
        for (from, to, kind) in [
            ("/projects/shop", "/projects/shoe", Kind::EnvelopeInvalid),
            ("\"revision\":1", "\"revision\":0", Kind::EnvelopeInvalid),
            ("\"revision\":1", "\"revision\":-1", Kind::EnvelopeInvalid),
            ("/deployment/", "/build/", Kind::EnvelopeInvalid),
            ("\"1.0\"", "\"0.3\"", Kind::EnvelopeInvalid),
            ("dev.daybook.", "dev.other.", Kind::EnvelopeInvalid),
            ("application/json", "text/plain", Kind::EnvelopeInvalid),
            (
                "\"authid\":\"alice\"",
                "\"authid\":\"\"",
                Kind::EnvelopeInvalid,
            ),
            ("requested.v1", "requested.v9", Kind::KindUnknown),
            ("\"automatic\"", "\"sometimes\"", Kind::EventUnreadable),
            ("\"data\":{", "\"data\":{{", Kind::EnvelopeInvalid),
            ("\"data\":{", "\"extra\":1,\"data\":{", Kind::SchemaViolated),
        ] {
            let bad = good.replacen(from, to, 1);
            assert_ne!(bad, good, "{from}");
            let entry = checks.read(Position(1), bad.as_bytes(), 0..bad.len());
            if kind == Kind::SchemaViolated {
                // Attributes that others add are allowed, as CloudEvents allows them.
                assert_eq!(entry.broken, [], "{bad}");
                continue;
            }
            assert!(
                entry.broken.iter().any(|(k, _)| *k == kind),
                "{from} -> {to}: {:?}",
                entry.broken
            );
        }
    }

    #[test]
    fn subjects_and_types_are_compared_part_by_part() {
        let (_, text) = golden()
            .into_iter()
            .find(|(kind, _)| kind == "deployment.requested.v1")
            .unwrap();
        let good = compact(&text);
        let checks = checks();
        let not_four = "is not <project>/<environment>/<aggregate>/<id>";
        let not_of_it = "is not of the aggregate of its subject";
        for (aggregate, kind, rules) in [
            ("deployment", "deployment.requested", &[][..]),
            ("deployment/x", "deployment.requested", &[not_four]),
            ("deployment", "deployments.requested", &[not_of_it]),
            ("deploymen", "deployment.requested", &[not_of_it]),
            ("future", "future.requested", &[]),
            ("future", "futures.requested", &[not_of_it]),
            ("fut.ure", "fut.ure.requested", &[not_of_it]),
            ("", "deployment.requested", &[not_of_it]),
            ("", ".requested", &[]),
        ] {
            let event = good
                .replacen("/deployment/", &format!("/{aggregate}/"), 1)
                .replacen("deployment.requested", kind, 1);
            let entry = checks.read(Position(1), event.as_bytes(), 0..event.len());
            let broken = entry.broken.iter();
            let broken: Vec<_> = broken
                .filter(|(kind, _)| *kind == Kind::EnvelopeInvalid)
                .map(|(_, what)| what.as_str())
                .collect();
            assert_eq!(broken.len(), rules.len(), "{event}: {broken:?}");
            for (what, rule) in broken.iter().zip(rules) {
                assert!(what.contains(rule), "{what}");
            }
        }
        let of_three = good.replacen("/deployment/", "-", 1);
        let entry = checks.read(Position(1), of_three.as_bytes(), 0..of_three.len());
        let broken = entry.broken.iter().map(|(_, what)| what);
        assert!(broken.into_iter().any(|what| what.contains(not_four)));
    }

    #[test]
    fn gaps_and_digests_are_entries_of_their_position_only() {
        let checks = checks();
        let read = |at, text: String| {
            checks
                .read(Position(at), text.as_bytes(), 0..text.len())
                .broken
        };
        let gap = |at| format!("daybook.dev/gap/v1\n{at}\n");
        assert_eq!(read(7, gap(7))[0].0, Kind::GapRecorded);
        assert_eq!(read(8, gap(7))[0].0, Kind::EnvelopeInvalid);
        let large = |at, digest: &str| format!("daybook.dev/too-large/v1\n{at}\nsha256:{digest}\n");
        let digest = "ab".repeat(32);
        assert_eq!(read(7, large(7, &digest))[0].0, Kind::EventTooLarge);
        assert_eq!(read(8, large(7, &digest))[0].0, Kind::EnvelopeInvalid);
        assert_eq!(read(7, large(7, "ab"))[0].0, Kind::EnvelopeInvalid);
    }

    proptest! {
        #[test]
        fn times_are_read_as_the_library_reads_them(
            seconds in -1_000_000_000_i64..5_000_000_000, nanos in 0_i32..1_000_000_000,
        ) {
            for nanos in [0, nanos, nanos / 1000 * 1000, nanos / 1_000_000 * 1_000_000] {
                let at = Timestamp::new(seconds, nanos).unwrap();
                prop_assert_eq!(time(&at.to_string()), Some(at));
            }
        }

        #[test]
        fn whatever_is_accepted_is_what_the_parser_accepts(
            at in any::<prop::sample::Index>(), byte: u8, which in any::<prop::sample::Index>(),
        ) {
            static GOLDEN: std::sync::OnceLock<Vec<String>> = std::sync::OnceLock::new();
            let golden = GOLDEN.get_or_init(|| golden().iter().map(|(_, t)| compact(t)).collect());
            let mut bytes = golden[which.index(golden.len())].clone().into_bytes();
            let at = at.index(bytes.len());
            bytes[at] = byte;
            let checks = without_schemas();
            let entry = checks.read(Position(1), &bytes, 0..bytes.len());
            let parsed = Event::from_bytes(&bytes);
            match (&entry.content, parsed) {
                (Content::Event(read), Ok(event)) => {
                    prop_assert_eq!(read.time, event.time);
                    prop_assert_eq!(read.revision, event.revision);
                    prop_assert_eq!(entry.id, Some(event.id));
                    prop_assert_eq!(read.subject.text(&bytes), event.subject);
                }
                (Content::Other, Err(_)) => {}
                (Content::Other, Ok(event)) => {
                    prop_assert!(!event.kind.starts_with(TYPE_PREFIX));
                }
                (content, parsed) => prop_assert!(false, "{content:?} {parsed:?}"),
            }
        }

        #[test]
        fn no_bytes_make_it_panic(bytes: Vec<u8>, position: u64) {
            let checks = without_schemas();
            let _ = checks.read(Position(position), &bytes, 0..bytes.len());
        }
    }
}
