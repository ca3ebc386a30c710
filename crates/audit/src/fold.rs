//! Folding every aggregate, in bounded memory: which events count, and which do not fit.

use std::collections::hash_map::Entry;
use std::collections::{HashMap, VecDeque};
use std::fs::File;
use std::hash::{BuildHasherDefault, Hasher};
use std::io;
use std::os::unix::fs::FileExt;
use std::str::FromStr;

use daybook_events::aggregate::{At, Folded, Void};
use daybook_events::envelope::DecodeError;
use daybook_events::outline::Step;
use daybook_events::subject::PREFIX;
use daybook_events::{AggregateKind, AnyFolded, AnyPayload, Outline, Position, Subject};
use daybook_projections::StateSum;

use crate::entry::{self, Payload, Read};

/// What a state costs beyond the events that made it.
const STATE_BYTES: usize = 1 << 10;
/// An aggregate with many events is not larger for it.
const MOST_BYTES: usize = 64 << 10;
/// How many states each event asks whether they may be put aside, as long as there are not far too
/// many bytes of them. Of events of one size two would do: none brings more than one state, or makes
/// more than one used again.
const TURNS: usize = 4;
/// Turns of states that are gone are forgotten when there are more of them than that, and more than
/// states.
const TURNS_LEAST: usize = 1 << 10;
/// So much memory of deployments that were put aside is kept for the next ones. It is large, and
/// getting it anew makes the allocator tidy up each time.
const SPARE_DEPLOYMENTS: usize = 64;
/// States are written to the file when there are so many bytes of them.
const UNWRITTEN_BYTES: usize = 256 << 10;

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
    /// The state before the first event of a subject.
    fn of(subject: Option<&Subject>, recycled: &mut Recycled) -> Self {
        match subject.map(Subject::kind) {
            Some(Some(kind)) => Self::Known(recycled.take(kind)),
            Some(None) => Self::Unknown,
            None => Self::None,
        }
    }

    fn step(&mut self, at: At, revision: u32, payload: AnyPayload) -> Outcome {
        match self {
            Self::Known(folded) => folded.step(at, revision, payload).into(),
            Self::Unknown => Outcome::Unknown,
            Self::None => Outcome::NoSubject,
        }
    }

    /// Whether hardly any event comes after those that there were.
    fn is_over(&self) -> bool {
        use daybook_events::deployment::Status::{Cancelled, Deleted, Failed, Terminated};
        match self {
            Self::Known(AnyFolded::Build(build)) => {
                build.state.as_ref().is_some_and(|b| b.status.is_final())
            }
            Self::Known(AnyFolded::Deployment(deployment)) => deployment
                .state
                .as_ref()
                .is_some_and(|d| matches!(d.status, Terminated | Deleted | Failed | Cancelled)),
            _ => false,
        }
    }
}

/// Deployments before their first event, in memory of some that are not needed any more.
#[derive(Debug, Default)]
struct Recycled(Vec<AnyFolded>);

impl Recycled {
    /// An aggregate before its first event.
    fn take(&mut self, kind: AggregateKind) -> AnyFolded {
        let recycled = match kind {
            AggregateKind::Deployment => self.0.pop(),
            _ => None,
        };
        recycled.unwrap_or_else(|| AnyFolded::new(kind))
    }

    fn keep(&mut self, state: State) {
        if let State::Known(AnyFolded::Deployment(mut deployment)) = state
            && self.0.len() < SPARE_DEPLOYMENTS
        {
            *deployment = Folded::default();
            self.0.push(AnyFolded::Deployment(deployment));
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
    pub(crate) subject: &'a entry::Subject,
    /// The event.
    pub(crate) bytes: &'a [u8],
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
    /// As its text is; empty if it is none.
    subject: Box<str>,
    state: State,
    bytes: usize,
    /// Whether an event came since somebody last asked whether it may be put aside.
    used: bool,
    /// Whether it was put aside before.
    came_back: bool,
}

impl Slot {
    /// An aggregate before its first event; its subject is as an envelope has it.
    fn new(subject: &str, recycled: &mut Recycled) -> Self {
        let subject = parsed(subject);
        Self {
            state: State::of(subject.as_ref(), recycled),
            subject: subject.map(|s| s.to_string()).unwrap_or_default().into(),
            bytes: STATE_BYTES,
            used: false,
            came_back: false,
        }
    }

    /// Writes it as it is in the file: the length of the subject, the subject, the state, which is
    /// added to the sum.
    fn write(&self, out: &mut Vec<u8>, sum: &mut StateSum) -> io::Result<()> {
        let len = u32::try_from(self.subject.len()).map_err(io::Error::other)?;
        out.extend(len.to_le_bytes());
        out.extend(self.subject.as_bytes());
        match &self.state {
            State::Known(folded) => sum
                .add_and_write(&self.subject, folded, out)
                .map_err(io::Error::other),
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

    fn read(bytes: &[u8]) -> io::Result<Self> {
        let (subject, folded) = Self::split(bytes)?;
        let state = match Subject::from_str(subject).map(|s| s.kind()) {
            Ok(Some(kind)) => {
                let coding = bincode::config::standard();
                let read = bincode::serde::seed_decode_from_slice(kind, folded, coding);
                State::Known(read.map_err(io::Error::other)?.0)
            }
            Ok(None) => State::Unknown,
            Err(_) => State::None,
        };
        Ok(Self {
            subject: subject.into(),
            state,
            bytes: STATE_BYTES + bytes.len(),
            used: false,
            came_back: true,
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
    slots: Map<Slot>,
    /// The keys of the slots, in the order in which they are asked whether they may be put aside:
    /// the second-chance algorithm, by which each event pays for a little of it. Whoever puts many
    /// aside at once lets the other threads wait for as long.
    turns: VecDeque<u128>,
    /// Of all slots.
    bytes: usize,
    cold: Cold,
    recycled: Recycled,
    aggregates: u64,
    hot_bytes: usize,
}

impl Folds {
    /// States that are used are kept in memory up to about so many bytes of events that made them.
    pub(crate) fn new(outlines: bool, hot_bytes: usize) -> io::Result<Self> {
        Ok(Self {
            outlines,
            sketches: Map::default(),
            slots: Map::default(),
            turns: VecDeque::new(),
            bytes: 0,
            cold: Cold::new()?,
            recycled: Recycled::default(),
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
            subject,
            bytes,
            revision,
            payload,
        } = event;
        let subject = || subject.text(bytes);
        let payload = match payload {
            Payload::Step(step) => return Ok(self.sketch(key, subject, revision, Ok(step))),
            Payload::Whole(payload) => payload,
        };
        if self.outlines
            && let Some(step) = Step::of(&payload)
        {
            return Ok(self.sketch(key, subject, revision, step));
        }
        let slot = match self.slots.entry(key) {
            Entry::Occupied(slot) => {
                let slot = slot.into_mut();
                slot.used = true;
                slot
            }
            Entry::Vacant(place) => {
                let slot = match self.cold.take(key)? {
                    Some(bytes) => Slot::read(&bytes)?,
                    None => {
                        self.aggregates += 1;
                        Slot::new(subject(), &mut self.recycled)
                    }
                };
                self.bytes += slot.bytes;
                self.turns.push_back(key);
                place.insert(slot)
            }
        };
        let grown = (slot.bytes + bytes.len()).min(MOST_BYTES.max(slot.bytes));
        self.bytes += grown - slot.bytes;
        slot.bytes = grown;
        let outcome = slot.state.step(at, revision, payload);
        // As long as it is near: what was not looked at for long has to come from far away again. Only
        // once: who writes events for what is over cannot have a large state written for each of them.
        if outcome == Outcome::Counted && !slot.came_back && slot.state.is_over() {
            self.put_aside(key)?;
        }
        let mut turns = 0;
        while self.bytes > self.hot_bytes
            && (turns < TURNS || self.bytes > self.hot_bytes + self.hot_bytes / 8)
            && !self.turns.is_empty()
        {
            self.turn()?;
            turns += 1;
        }
        Ok(outcome)
    }

    fn sketch<'b>(
        &mut self,
        key: u128,
        subject: impl FnOnce() -> &'b str,
        revision: u32,
        step: Result<Step, DecodeError>,
    ) -> Outcome {
        let sketch = match self.sketches.entry(key) {
            Entry::Occupied(sketch) => sketch.into_mut(),
            Entry::Vacant(place) => {
                self.aggregates += 1;
                place.insert(Sketch::of(subject()))
            }
        };
        sketch.step(revision, step)
    }

    /// Adds the states of all aggregates that this version knows and that are no outlines.
    pub(crate) fn add_states_to(&self, sum: &mut StateSum) -> io::Result<()> {
        for slot in self.slots.values() {
            if let State::Known(folded) = &slot.state {
                sum.add(&slot.subject, folded).map_err(io::Error::other)?;
            }
        }
        sum.merge(&self.cold.sum);
        Ok(())
    }

    /// Puts the state aside whose turn it is, unless it was used since its last turn.
    fn turn(&mut self) -> io::Result<()> {
        let Some(key) = self.turns.pop_front() else {
            return Ok(());
        };
        // Some were put aside before it was their turn.
        let Some(slot) = self.slots.get_mut(&key) else {
            return Ok(());
        };
        if std::mem::take(&mut slot.used) {
            self.turns.push_back(key);
            return Ok(());
        }
        self.put_aside(key)
    }

    fn put_aside(&mut self, key: u128) -> io::Result<()> {
        let Some(slot) = self.slots.remove(&key) else {
            return Ok(());
        };
        self.bytes -= slot.bytes;
        if self.turns.len() > 2 * self.slots.len() + TURNS_LEAST {
            self.turns.clear();
            self.turns.extend(self.slots.keys());
        }
        self.cold.put(key, &slot)?;
        self.recycled.keep(slot.state);
        Ok(())
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
        slot.write(&mut self.unwritten, &mut self.sum)?;
        let len = u32::try_from(self.unwritten.len() - begin).map_err(io::Error::other)?;
        self.places.insert(key, (self.len + begin as u64, len));
        if self.unwritten.len() > UNWRITTEN_BYTES {
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
        let (subject, state) = Slot::split(&bytes)?;
        // Of an aggregate that this version does not know, nothing was written.
        if !state.is_empty() {
            self.sum.remove_encoded(subject, state);
        }
        Ok(Some(bytes))
    }

    fn read(&self, begin: u64, len: u32) -> io::Result<Vec<u8>> {
        if let Some(unwritten) = begin.checked_sub(self.len) {
            let bytes = usize::try_from(unwritten).ok().and_then(|at| {
                let unwritten = self.unwritten.get(at..)?;
                unwritten.get(..len as usize)
            });
            let gone = || io::Error::other("a state is not where it was put");
            return Ok(bytes.ok_or_else(gone)?.to_vec());
        }
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
            subject: &read.subject,
            bytes,
            revision: read.revision,
            payload: *read.payload.unwrap(),
        };
        folds.apply(at, event).unwrap()
    }

    /// Folds a history with so much memory; returns what became of each event and the hash.
    fn folded(hot_bytes: usize) -> (Vec<Outcome>, u64, StateHash, Folds) {
        let checks = checks(false);
        let mut fleet = Fleet::new(Size::default());
        let mut choose = choices(11);
        let mut folds = Folds::new(false, hot_bytes).unwrap();
        let mut outcomes = Vec::new();
        for number in 1..=2000 {
            let bytes = fleet.next(&mut choose).bytes;
            outcomes.push(fold(&checks, &mut folds, number, &bytes));
            assert!(folds.bytes <= hot_bytes + hot_bytes / 8, "{}", folds.bytes);
            assert!(folds.slots.keys().all(|key| folds.turns.contains(key)));
            assert!(folds.turns.len() <= 2 * folds.slots.len() + TURNS_LEAST + 1);
        }
        let mut sum = StateSum::default();
        folds.add_states_to(&mut sum).unwrap();
        (outcomes, folds.aggregates(), sum.hash(), folds)
    }

    #[test]
    fn states_that_went_to_the_file_are_the_same_when_they_come_back() {
        let (outcomes, aggregates, hash, folds) = folded(HOT_BYTES);
        assert!(outcomes.iter().all(|o| *o == Outcome::Counted));
        // Those that are over are put aside once, and no others.
        let put_aside = folds.cold.places.len();
        assert!(put_aside > 10, "{put_aside} states were put aside");
        assert_eq!((put_aside + folds.slots.len()) as u64, aggregates);
        let over = || folds.slots.values().filter(|slot| slot.state.is_over());
        assert!(over().all(|slot| slot.came_back) && over().next().is_some());
        let small = folded(20 << 10);
        assert!(small.3.cold.places.len() > put_aside);
        // Some came back from the file, and others before they were written to it.
        assert!(small.3.cold.len > UNWRITTEN_BYTES as u64);
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
            let [states, outlines] = by.map(|(_, folds)| (folds.aggregates(), folds.slots.len()));
            assert_eq!(states.0, outlines.0);
            assert!(states.1 > outlines.1);
        }
        assert!(
            void > 100 && unknown > 10 && none > 10,
            "{void} {unknown} {none}"
        );
    }
}
