//! Folding every aggregate, in bounded memory: which events count, and which do not fit.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::fs::File;
use std::hash::{BuildHasherDefault, Hasher};
use std::io;
use std::os::unix::fs::FileExt;
use std::str::FromStr;

use daybook_events::aggregate::{At, Void};
use daybook_events::envelope::DecodeError;
use daybook_events::outline::Step;
use daybook_events::subject::PREFIX;
use daybook_events::{AnyFolded, AnyPayload, Outline, Position, Subject};
use daybook_projections::StateSum;

use crate::entry::{Payload, Read};

/// What a state costs beyond the events that made it.
const STATE_BYTES: usize = 1 << 10;
/// An aggregate with many events is not larger for it.
const MOST_BYTES: usize = 64 << 10;

/// Hashing of keys, which are hashes.
#[derive(Debug, Default)]
struct Already(u64);

impl Hasher for Already {
    fn write(&mut self, _: &[u8]) {}
    fn write_u128(&mut self, key: u128) {
        self.0 = key as u64;
    }
    fn finish(&self) -> u64 {
        self.0
    }
}

type Map<V> = HashMap<u128, V, BuildHasherDefault<Already>>;

/// The state of one aggregate.
#[derive(Debug)]
enum State {
    Known(AnyFolded),
    /// The aggregate is of a newer version.
    Unknown,
    /// The subject is none.
    None,
}

/// A subject, as an envelope has it.
pub(crate) fn parsed(subject: &str) -> Option<Subject> {
    Subject::from_str(&format!("{PREFIX}.{}", subject.replace('/', "."))).ok()
}

impl State {
    /// The state before the first event of a subject, as an envelope has it.
    fn of(subject: &str) -> Self {
        match parsed(subject).map(|s| s.kind()) {
            Some(Some(kind)) => Self::Known(AnyFolded::new(kind)),
            Some(None) => Self::Unknown,
            None => Self::None,
        }
    }

    fn add_to(&self, subject: &str, sum: &mut StateSum) -> io::Result<()> {
        match (self, parsed(subject)) {
            (Self::Known(folded), Some(subject)) => {
                sum.add(&subject, folded).map_err(io::Error::other)
            }
            _ => Ok(()),
        }
    }

    fn step(&mut self, at: At, revision: u32, payload: AnyPayload) -> Outcome {
        match self {
            Self::Known(folded) => folded.step(at, revision, payload).into(),
            Self::Unknown => Outcome::Unknown,
            Self::None => Outcome::NoSubject,
        }
    }
}

/// An aggregate of which only what decides about its events is remembered. In memory it is no
/// larger than the place in a file would be at which it is put aside.
#[derive(Debug)]
enum Sketch {
    Known(Outline),
    /// The aggregate is of a newer version.
    Unknown,
    /// The subject is none.
    None,
}

impl Sketch {
    fn of(subject: &str) -> Self {
        match parsed(subject).map(|s| s.kind()) {
            Some(kind) => kind
                .and_then(Outline::new)
                .map_or(Self::Unknown, Self::Known),
            None => Self::None,
        }
    }

    fn step(&mut self, revision: u32, step: Result<Step, DecodeError>) -> Outcome {
        match self {
            Self::Known(outline) => outline.step(revision, step).into(),
            Self::Unknown => Outcome::Unknown,
            Self::None => Outcome::NoSubject,
        }
    }
}

/// An event that is to be folded.
#[derive(Debug)]
pub(crate) struct Fold<'a> {
    /// Stands for the subject; see [`Keys`](crate::entry::Keys).
    pub(crate) key: u128,
    /// As the envelope has it.
    pub(crate) subject: &'a str,
    /// How long the event is.
    pub(crate) bytes: usize,
    pub(crate) revision: u32,
    pub(crate) payload: Payload,
}

/// What became of an event.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Outcome {
    /// It changed the state of its aggregate.
    Counted,
    /// It changed nothing.
    Void(Void),
    /// It, or its aggregate, is of a newer version.
    Unknown,
    /// Its subject is none.
    NoSubject,
}

impl From<Result<(), Void>> for Outcome {
    fn from(folded: Result<(), Void>) -> Self {
        match folded {
            Ok(()) => Self::Counted,
            Err(Void::Unknown(_)) => Self::Unknown,
            Err(void) => Self::Void(void),
        }
    }
}

#[derive(Debug)]
struct Slot {
    /// As an envelope has it.
    subject: Box<str>,
    state: State,
    bytes: usize,
}

impl Slot {
    /// An aggregate before its first event.
    fn new(subject: &str) -> Self {
        Self {
            subject: subject.into(),
            state: State::of(subject),
            bytes: STATE_BYTES,
        }
    }

    /// Writes it as it is in the file: the length of the subject, the subject, the state.
    fn write(&self, out: &mut Vec<u8>) -> io::Result<()> {
        let len = u32::try_from(self.subject.len()).map_err(io::Error::other)?;
        out.extend(len.to_le_bytes());
        out.extend(self.subject.as_bytes());
        match &self.state {
            State::Known(folded) => {
                let coding = bincode::config::standard();
                bincode::serde::encode_into_std_write(folded, out, coding)
                    .map(drop)
                    .map_err(io::Error::other)
            }
            State::Unknown | State::None => Ok(()),
        }
    }

    /// The subject and the state in what was written.
    fn split(bytes: &[u8]) -> io::Result<(&str, &[u8])> {
        let bad = || io::Error::other("a state in the file is not as it was written");
        let (len, rest) = bytes.split_first_chunk().ok_or_else(bad)?;
        let subject_and_state = rest.split_at_checked(u32::from_le_bytes(*len) as usize);
        let (subject, folded) = subject_and_state.ok_or_else(bad)?;
        let subject = std::str::from_utf8(subject).map_err(io::Error::other)?;
        Ok((subject, folded))
    }

    /// The same, if this version knows the aggregate.
    fn encoded(bytes: &[u8]) -> io::Result<Option<(Subject, &[u8])>> {
        let (subject, folded) = Self::split(bytes)?;
        let known = parsed(subject).filter(|subject| subject.kind().is_some());
        Ok(known.map(|subject| (subject, folded)))
    }

    fn read(bytes: &[u8]) -> io::Result<Self> {
        let (subject, folded) = Self::split(bytes)?;
        let mut state = State::of(subject);
        if let State::Known(known) = &mut state {
            let coding = bincode::config::standard();
            *known = bincode::serde::seed_decode_from_slice(known.kind(), folded, coding)
                .map_err(io::Error::other)?
                .0;
        }
        Ok(Self {
            subject: subject.into(),
            state,
            bytes: STATE_BYTES + bytes.len(),
        })
    }
}

/// The states of all aggregates. Those that were not used for long are in a file.
///
/// Where nobody asks for the states themselves, only outlines are kept of the aggregates that have
/// one: what becomes of each event is the same.
#[derive(Debug)]
pub(crate) struct Folds {
    /// Whether outlines are enough.
    outlines: bool,
    sketches: Map<Sketch>,
    young: Map<Slot>,
    old: Map<Slot>,
    young_bytes: usize,
    cold: Cold,
    aggregates: u64,
    hot_bytes: usize,
}

impl Folds {
    /// States that are used are kept in memory up to about so many bytes of events that made them.
    pub(crate) fn new(outlines: bool, hot_bytes: usize) -> io::Result<Self> {
        Ok(Self {
            outlines,
            sketches: Map::default(),
            young: Map::default(),
            old: Map::default(),
            young_bytes: 0,
            cold: Cold::new()?,
            aggregates: 0,
            hot_bytes,
        })
    }

    /// How many aggregates there are.
    pub(crate) fn aggregates(&self) -> u64 {
        self.aggregates
    }

    /// Folds an event.
    pub(crate) fn apply(&mut self, at: At, event: Fold<'_>) -> io::Result<Outcome> {
        let Fold {
            key,
            bytes,
            revision,
            ..
        } = event;
        let payload = match event.payload {
            Payload::Step(step) => return Ok(self.sketch(key, event.subject, revision, Ok(step))),
            Payload::Whole(payload) => *payload,
        };
        if self.outlines
            && let Some(step) = Step::of(&payload)
        {
            return Ok(self.sketch(key, event.subject, revision, step));
        }
        let slot = match self.young.entry(key) {
            Entry::Occupied(slot) => slot.into_mut(),
            Entry::Vacant(place) => {
                let slot = match self.old.remove(&key) {
                    Some(slot) => slot,
                    None => match self.cold.take(key)? {
                        Some(bytes) => Slot::read(&bytes)?,
                        None => {
                            self.aggregates += 1;
                            Slot::new(event.subject)
                        }
                    },
                };
                self.young_bytes += slot.bytes;
                place.insert(slot)
            }
        };
        let grown = (slot.bytes + bytes).min(MOST_BYTES.max(slot.bytes));
        self.young_bytes += grown - slot.bytes;
        slot.bytes = grown;
        let outcome = slot.state.step(at, revision, payload);
        if self.young_bytes > self.hot_bytes / 2 {
            self.age()?;
        }
        Ok(outcome)
    }

    fn sketch(
        &mut self,
        key: u128,
        subject: &str,
        revision: u32,
        step: Result<Step, DecodeError>,
    ) -> Outcome {
        let sketch = match self.sketches.entry(key) {
            Entry::Occupied(sketch) => sketch.into_mut(),
            Entry::Vacant(place) => {
                self.aggregates += 1;
                place.insert(Sketch::of(subject))
            }
        };
        sketch.step(revision, step)
    }

    /// Adds the states of all aggregates that this version knows and that are no outlines.
    pub(crate) fn add_states_to(&self, sum: &mut StateSum) -> io::Result<()> {
        for slot in self.young.values().chain(self.old.values()) {
            slot.state.add_to(&slot.subject, sum)?;
        }
        sum.merge(&self.cold.sum);
        Ok(())
    }

    /// What was not used since the last time goes to the file.
    fn age(&mut self) -> io::Result<()> {
        let young = std::mem::take(&mut self.young);
        self.young_bytes = 0;
        for (key, slot) in std::mem::replace(&mut self.old, young) {
            self.cold.put(key, &slot)?;
        }
        self.cold.flush()
    }
}

/// States in a file that has no name, and so leaves nothing behind.
#[derive(Debug)]
struct Cold {
    file: File,
    len: u64,
    unwritten: Vec<u8>,
    /// Where each state begins, and how long it is.
    places: Map<(u64, u32)>,
    /// The sum of the states in it: they are encoded here as the sum takes them.
    sum: StateSum,
}

impl Cold {
    fn new() -> io::Result<Self> {
        Ok(Self {
            file: tempfile::tempfile()?,
            len: 0,
            unwritten: Vec::new(),
            places: Map::default(),
            sum: StateSum::default(),
        })
    }

    fn put(&mut self, key: u128, slot: &Slot) -> io::Result<()> {
        let begin = self.unwritten.len();
        slot.write(&mut self.unwritten)?;
        let written = self.unwritten.get(begin..).unwrap_or_default();
        if let Some((subject, state)) = Slot::encoded(written)? {
            self.sum.add_encoded(&subject, state);
        }
        let len = u32::try_from(self.unwritten.len() - begin).map_err(io::Error::other)?;
        self.places.insert(key, (self.len + begin as u64, len));
        if self.unwritten.len() > 1 << 20 {
            self.flush()?;
        }
        Ok(())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.write_all_at(&self.unwritten, self.len)?;
        self.len += self.unwritten.len() as u64;
        self.unwritten.clear();
        Ok(())
    }

    fn take(&mut self, key: u128) -> io::Result<Option<Vec<u8>>> {
        let Some((begin, len)) = self.places.remove(&key) else {
            return Ok(None);
        };
        let bytes = self.read(begin, len)?;
        if let Some((subject, state)) = Slot::encoded(&bytes)? {
            self.sum.remove_encoded(&subject, state);
        }
        Ok(Some(bytes))
    }

    /// Reads a state; all of them are written at the end of [`Folds::age`].
    fn read(&self, begin: u64, len: u32) -> io::Result<Vec<u8>> {
        let mut bytes = vec![0; len as usize];
        self.file.read_exact_at(&mut bytes, begin)?;
        Ok(bytes)
    }
}

/// Where an event stands, for a fold.
pub(crate) fn at(position: Position, id: daybook_events::EventId, read: &Read) -> At {
    At {
        position,
        id,
        time: read.time,
        trace: read.trace,
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::entry::{Checks, Content, Keys};
    use crate::schema::Schemas;
    use daybook_events::testing::fleet::{Fleet, Size, choices};

    use daybook_projections::StateHash;

    /// More than any test needs.
    pub(crate) const HOT_BYTES: usize = 96 << 20;

    pub(crate) fn checks(outlines: bool) -> Checks {
        Checks {
            keys: Keys::default(),
            schemas: Schemas::default(),
            all_schemas: false,
            outlines,
        }
    }

    pub(crate) fn fold(checks: &Checks, folds: &mut Folds, position: u64, bytes: &[u8]) -> Outcome {
        let entry = checks.read(Position(position), bytes, 0..bytes.len());
        let (Content::Event(read), Some(id)) = (entry.content, entry.id) else {
            panic!("{position} is no event");
        };
        let at = at(Position(position), id, &read);
        let event = Fold {
            key: read.key,
            subject: read.subject.text(bytes),
            bytes: bytes.len(),
            revision: read.revision,
            payload: read.payload.unwrap(),
        };
        folds.apply(at, event).unwrap()
    }

    /// Folds a history with so much memory; returns what became of each event and the hash.
    fn folded(hot_bytes: usize) -> (Vec<Outcome>, u64, StateHash, usize) {
        let checks = checks(false);
        let mut fleet = Fleet::new(Size::default());
        let mut choose = choices(11);
        let mut folds = Folds::new(false, hot_bytes).unwrap();
        let mut outcomes = Vec::new();
        for number in 1..=2000 {
            let bytes = fleet.next(&mut choose).bytes;
            outcomes.push(fold(&checks, &mut folds, number, &bytes));
        }
        let mut sum = StateSum::default();
        folds.add_states_to(&mut sum).unwrap();
        let cold = folds.cold.places.len();
        (outcomes, folds.aggregates(), sum.hash(), cold)
    }

    #[test]
    fn states_that_went_to_the_file_are_the_same_when_they_come_back() {
        let (outcomes, aggregates, hash, cold) = folded(HOT_BYTES);
        assert!(outcomes.iter().all(|o| *o == Outcome::Counted));
        assert_eq!(cold, 0);
        let small = folded(20 << 10);
        assert!(small.3 > 10, "{} states are in the file", small.3);
        assert_eq!((small.0, small.1, small.2), (outcomes, aggregates, hash));
    }

    /// A history in which some events are missing, twice there, late, of a version to come, of a
    /// subject that is none, or claim the revision that is due.
    pub(crate) fn disturbed(seed: u64) -> Vec<Vec<u8>> {
        let mut fleet = Fleet::new(Size::default());
        let mut choose = choices(seed);
        let mut history: Vec<Vec<u8>> = Vec::new();
        let mut late = Vec::new();
        for _ in 0..1500 {
            let bytes = fleet.next(&mut choose).bytes.to_vec();
            let replace = |from: &str, to: &str| {
                let text = String::from_utf8(bytes.clone()).unwrap();
                text.replacen(from, to, 1).into_bytes()
            };
            match choose(40) {
                0 => continue,
                1 => history.extend([bytes.clone(), bytes]),
                2 => late.push(bytes),
                3 => history.push(replace(".v1\"", ".v9\"")),
                4 => history.push(replace("\"subject\":\"shop-0/", "\"subject\":\"sh*p/")),
                5 => history.push(replace("\"attempt\":1", "\"attempt\":\"one\"")),
                6 => {
                    let mut next = late.pop().unwrap_or(bytes);
                    let digit = next
                        .windows(11)
                        .position(|w| w == b"\"revision\":")
                        .unwrap()
                        + 11;
                    next[digit] = b'2' + (choose(4) as u8);
                    history.push(next);
                }
                _ => history.push(bytes),
            }
        }
        history
    }

    #[test]
    fn what_becomes_of_events_is_the_same_by_outlines_as_by_states() {
        let (mut void, mut unknown, mut none) = (0, 0, 0);
        for seed in 0..8 {
            let mut by = [false, true].map(|o| (checks(o), Folds::new(o, HOT_BYTES).unwrap()));
            for (number, bytes) in (1..).zip(disturbed(seed)) {
                let [states, outlines] = by
                    .each_mut()
                    .map(|(checks, folds)| fold(checks, folds, number, &bytes));
                assert_eq!(states, outlines, "{}", String::from_utf8_lossy(&bytes));
                match states {
                    Outcome::Counted => {}
                    Outcome::Void(_) => void += 1,
                    Outcome::Unknown => unknown += 1,
                    Outcome::NoSubject => none += 1,
                }
            }
            let [states, outlines] = by.map(|(_, folds)| (folds.aggregates(), folds.young.len()));
            assert_eq!(states.0, outlines.0);
            assert!(states.1 > outlines.1);
        }
        assert!(
            void > 100 && unknown > 10 && none > 10,
            "{void} {unknown} {none}"
        );
    }
}
