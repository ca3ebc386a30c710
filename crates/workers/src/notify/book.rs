//! How far the deliveries of a subscription are, and the delivery log in which that stands.
//!
//! All that became due up to the *mark* is dealt with. What became due later and is dealt with all
//! the same, because another deployment's event is still being tried, stands in the lines since the
//! one that the newest line names. A line that is lost costs a repetition and never an event.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;
use std::time::Duration;

use daybook_events::Position;
use daybook_events::lines::{Line, LineKind, LineLog, LineSource, NewLine};
use daybook_events::log::ReadError;
use daybook_events::subscription::delivery::{Entry, Try};
use daybook_trace::figures::{self, Waiting};
use jiff::Timestamp;

/// Where something became due, and which event.
type Due = (Position, Position);

/// Lines that are read at once.
const READ: usize = 500;
/// So many lines at the end are looked at first for one that can be read; if there is none, eight
/// times as many, and so on.
const BACK: u64 = 64;
/// After so many positions without a try, a line says how far it is.
const NOTE_EVERY: u64 = 4_096;

/// What became due at a position and is not dealt with.
#[derive(Debug)]
struct Open {
    /// How much.
    left: usize,
    /// When it became due.
    since: Timestamp,
}

/// The progress of one subscription.
#[derive(Debug)]
pub(super) struct Book {
    lines: Arc<dyn LineLog>,
    source: LineSource,
    /// The last position that was looked at.
    seen: Position,
    /// Where something became due that is not dealt with.
    open: BTreeMap<Position, Open>,
    /// How much all of that is.
    left: usize,
    /// What is dealt with above the mark.
    done: BTreeSet<Due>,
    /// How often what is not dealt with was tried.
    tries: HashMap<Due, u32>,
    /// The first line about each that became due above the mark.
    first: BTreeMap<Due, u64>,
    /// Those lines.
    firsts: BTreeSet<u64>,
    /// The mark of the newest line.
    noted: Position,
    /// How many tries were recorded since the ledger was told how far it is.
    untold: u64,
    /// The last line of the log, if that is known.
    last: Option<u64>,
    /// Somebody else has written to the log.
    shared: bool,
}

impl Book {
    /// Reads how far it is. Nothing up to `floor` is due.
    pub(super) async fn open(
        lines: Arc<dyn LineLog>,
        source: LineSource,
        floor: Position,
    ) -> Result<Self, ReadError> {
        let mut book = Self {
            lines,
            source,
            seen: floor,
            open: BTreeMap::new(),
            left: 0,
            done: BTreeSet::new(),
            tries: HashMap::new(),
            first: BTreeMap::new(),
            firsts: BTreeSet::new(),
            noted: floor,
            untold: 0,
            last: None,
            shared: false,
        };
        let last = book.lines.last(source).await?;
        book.last = Some(last);
        let mut back = BACK;
        let (seq, newest) = loop {
            let from = last.saturating_sub(back);
            match book.newest_after(from).await? {
                Some(found) => break found,
                None if from == 0 => return Ok(book),
                None => back = back.saturating_mul(8),
            }
        };
        book.seen = floor.max(newest.mark);
        book.noted = newest.mark;
        let mut after = match newest.since {
            0 => seq,
            since => since,
        }
        .saturating_sub(1);
        loop {
            let batch = book.lines.read(source, after, READ).await?;
            let Some(end) = batch.last() else {
                break;
            };
            after = end.seq;
            for line in &batch {
                if let Some(attempt) = entry(line).and_then(|e| e.attempt) {
                    book.learn(&attempt, line.seq);
                }
            }
        }
        Ok(book)
    }

    /// The last line after the given one that can be read.
    async fn newest_after(&self, mut after: u64) -> Result<Option<(u64, Entry)>, ReadError> {
        let mut newest = None;
        loop {
            let batch = self.lines.read(self.source, after, READ).await?;
            let Some(end) = batch.last() else {
                return Ok(newest);
            };
            after = end.seq;
            let found = batch.iter().rev().find_map(|l| Some((l.seq, entry(l)?)));
            newest = found.or(newest);
        }
    }

    fn learn(&mut self, attempt: &Try, seq: u64) {
        let due = (attempt.due_by, attempt.position);
        if attempt.due_by <= self.seen {
            return;
        }
        if attempt.outcome.is_final() {
            self.done.insert(due);
            self.tries.remove(&due);
        } else {
            self.tries.insert(due, attempt.number);
        }
        self.note_first(due, seq);
    }

    fn note_first(&mut self, due: Due, seq: u64) {
        if let std::collections::btree_map::Entry::Vacant(new) = self.first.entry(due) {
            new.insert(seq);
            self.firsts.insert(seq);
        }
    }

    /// All that became due up to here is dealt with.
    pub(super) fn mark(&self) -> Position {
        match self.open.first_key_value() {
            Some((open, _)) => Position(open.0 - 1),
            None => self.seen,
        }
    }

    /// At how many positions something became due that is not dealt with.
    pub(super) fn open_items(&self) -> usize {
        self.open.len()
    }

    /// What is not dealt with, for the figures of this process.
    pub(super) fn waiting(&self) -> Waiting {
        Waiting {
            events: self.left as u64,
            oldest: self.open.first_key_value().map(|(_, open)| open.since),
        }
    }

    /// Begins again at the mark: what is open will be seen once more.
    pub(super) fn rewind(&mut self) {
        self.seen = self.mark();
        self.open.clear();
        self.left = 0;
    }

    /// Notes what became due at a position and when, and says what of it is not dealt with yet.
    pub(super) fn due(
        &mut self,
        at: Position,
        since: Timestamp,
        mut events: Vec<Position>,
    ) -> Vec<Position> {
        events.retain(|e| !self.done.contains(&(at, *e)));
        self.seen = self.seen.max(at);
        if !events.is_empty() {
            let left = events.len();
            self.left += left;
            if let Some(before) = self.open.insert(at, Open { left, since }) {
                self.left -= before.left;
            }
        }
        events
    }

    /// How often something was tried.
    pub(super) fn tries(&self, due_by: Position, position: Position) -> u32 {
        self.tries.get(&(due_by, position)).copied().unwrap_or(0)
    }

    /// Whether somebody else has written to the delivery log since it was opened: then the
    /// subscription is theirs.
    pub(super) fn is_shared(&self) -> bool {
        self.shared
    }

    /// How many tries were recorded since the ledger was told how far it is.
    pub(super) fn untold(&self) -> u64 {
        self.untold
    }

    /// The ledger was told how far it is.
    pub(super) fn told(&mut self) {
        self.untold = 0;
    }

    /// Records a try.
    pub(super) async fn record(&mut self, attempt: Try) {
        self.untold += 1;
        let took = Duration::from_millis(attempt.millis);
        figures::webhooks().tried(attempt.outcome, took);
        let due = (attempt.due_by, attempt.position);
        if attempt.outcome.is_final() {
            if let Some(open) = self.open.get_mut(&attempt.due_by) {
                open.left -= 1;
                self.left -= 1;
                if open.left == 0 {
                    self.open.remove(&attempt.due_by);
                }
            }
            self.tries.remove(&due);
            self.done.insert(due);
        } else {
            self.tries.insert(due, attempt.number);
        }
        let seq = self.write(Some(attempt)).await;
        if let Some(seq) = seq
            && due.0 > self.noted
        {
            self.note_first(due, seq);
        }
    }

    /// Notes how far it is, if that was not noted for long, or at the end.
    pub(super) async fn note(&mut self, at_the_end: bool) {
        let ahead = self.mark().0.saturating_sub(self.noted.0);
        if ahead >= NOTE_EVERY || (at_the_end && ahead > 0) {
            self.write(None).await;
        }
    }

    async fn write(&mut self, attempt: Option<Try>) -> Option<u64> {
        let mark = self.mark();
        self.forget_up_to(mark);
        let entry = Entry {
            attempt,
            mark,
            since: self.firsts.first().copied().unwrap_or(0),
        };
        let text = match entry.to_text() {
            Ok(text) => text,
            Err(error) => {
                tracing::error!(%error, "a line of a delivery log cannot be written");
                return None;
            }
        };
        let line = NewLine {
            time: Timestamp::now(),
            kind: LineKind::Status,
            cluster: None,
            instance: None,
            text,
        };
        match self.lines.append(self.source, vec![line]).await {
            Ok(seq) => {
                self.noted = mark;
                // Lines that were all removed begin with 1 again.
                if self.last.is_some_and(|last| seq > last + 1) {
                    self.shared = true;
                }
                self.last = Some(seq);
                Some(seq)
            }
            Err(error) => {
                // It may have been stored all the same.
                self.last = None;
                tracing::warn!(%error, "a line of a delivery log was lost; after a crash something may be sent twice");
                None
            }
        }
    }

    fn forget_up_to(&mut self, mark: Position) {
        let above = (mark.next(), Position::ZERO);
        self.done = self.done.split_off(&above);
        let kept = self.first.split_off(&above);
        for (_, seq) in std::mem::replace(&mut self.first, kept) {
            self.firsts.remove(&seq);
        }
    }
}

fn entry(line: &Line) -> Option<Entry> {
    Entry::from_text(&line.line.text)
}

#[cfg(test)]
mod tests {
    use daybook_events::subscription::delivery::Outcome;
    use daybook_events::{EventId, SubscriptionId};
    use daybook_store::embedded::{EmbeddedLines, LineRetention};
    use uuid::Uuid;

    use super::*;

    fn attempt(due_by: u64, position: u64, number: u32, outcome: Outcome) -> Try {
        Try {
            position: Position(position),
            due_by: Position(due_by),
            event: EventId(Uuid::from_u128(position.into())),
            kind: "deployment.queued.v1".into(),
            deployment: None,
            number,
            outcome,
            status: None,
            code: None,
            message: None,
            millis: 1,
            next_at: None,
        }
    }

    struct Shelf {
        lines: Arc<dyn LineLog>,
        _dir: tempfile::TempDir,
    }

    impl Shelf {
        async fn new() -> Self {
            let dir = tempfile::tempdir().unwrap();
            let lines = EmbeddedLines::open(dir.path().join("lines"), LineRetention::default());
            Self {
                lines: Arc::new(lines.await.unwrap()),
                _dir: dir,
            }
        }

        async fn open(&self, floor: u64) -> Book {
            let source = LineSource::Subscription(SubscriptionId(Uuid::from_u128(7)));
            Book::open(self.lines.clone(), source, Position(floor))
                .await
                .unwrap()
        }
    }

    /// An event that is due by itself.
    fn due(book: &mut Book, at: u64) -> usize {
        let since = Timestamp::UNIX_EPOCH;
        book.due(Position(at), since, vec![Position(at)]).len()
    }

    #[tokio::test]
    async fn what_is_dealt_with_stays_so_and_what_is_not_is_due_again() {
        let shelf = Shelf::new().await;
        let mut book = shelf.open(10).await;
        assert_eq!(book.mark(), Position(10));
        for at in 11..=15 {
            assert_eq!(due(&mut book, at), 1);
        }
        // The first is stuck; three later ones are not.
        book.record(attempt(11, 11, 1, Outcome::Failed)).await;
        for at in 12..=14 {
            book.record(attempt(at, at, 1, Outcome::Delivered)).await;
        }
        book.record(attempt(11, 11, 2, Outcome::Failed)).await;
        assert_eq!((book.mark(), book.open_items()), (Position(10), 2));

        // Another process goes on.
        let mut book = shelf.open(10).await;
        assert_eq!(book.mark(), Position(10));
        assert_eq!(book.tries(Position(11), Position(11)), 2);
        assert_eq!((11..=15).map(|at| due(&mut book, at)).sum::<usize>(), 2);
        book.record(attempt(11, 11, 3, Outcome::DeadLettered)).await;
        assert_eq!(book.mark(), Position(14));
        book.record(attempt(15, 15, 1, Outcome::Delivered)).await;
        assert_eq!(book.mark(), Position(15));

        let mut book = shelf.open(10).await;
        assert_eq!(book.mark(), Position(15));
        assert_eq!(due(&mut book, 16), 1);
    }

    #[tokio::test]
    async fn a_demand_to_send_again_is_dealt_with_when_all_of_it_is() {
        let shelf = Shelf::new().await;
        let mut book = shelf.open(0).await;
        let both = vec![Position(3), Position(4)];
        let since = Timestamp::UNIX_EPOCH;
        assert_eq!(book.waiting(), Waiting::default());
        assert_eq!(book.due(Position(9), since, both.clone()).len(), 2);
        let waiting = book.waiting();
        assert_eq!((waiting.events, waiting.oldest), (2, Some(since)));
        book.record(attempt(9, 4, 1, Outcome::Failed)).await;
        assert_eq!(book.waiting().events, 2);
        book.record(attempt(9, 3, 1, Outcome::Delivered)).await;
        assert_eq!((book.mark(), book.waiting().events), (Position(8), 1));
        book.rewind();
        assert_eq!(book.waiting(), Waiting::default());
        assert_eq!(book.due(Position(9), since, both.clone()).len(), 1);
        assert_eq!(book.waiting().events, 1);
        let mut book = shelf.open(0).await;
        assert_eq!(book.due(Position(9), since, both), [Position(4)]);
        book.record(attempt(9, 4, 2, Outcome::Delivered)).await;
        assert_eq!(book.mark(), Position(9));
        assert_eq!(book.waiting(), Waiting::default());
    }

    #[tokio::test]
    async fn lines_that_are_none_and_lines_that_are_lost_cost_repetitions_only() {
        let shelf = Shelf::new().await;
        let mut book = shelf.open(0).await;
        due(&mut book, 1);
        book.record(attempt(1, 1, 1, Outcome::Delivered)).await;
        let masked = NewLine {
            time: Timestamp::now(),
            kind: LineKind::Status,
            cluster: None,
            instance: None,
            text: "***".into(),
        };
        let one = vec![masked.clone()];
        shelf.lines.append(book.source, one).await.unwrap();
        assert_eq!(shelf.open(0).await.mark(), Position(1));
        let many = vec![masked; READ + 200];
        shelf.lines.append(book.source, many).await.unwrap();
        assert_eq!(shelf.open(0).await.mark(), Position(1));
        // Whoever has no lines begins where the ledger says.
        let other = Shelf::new().await;
        assert_eq!(other.open(42).await.mark(), Position(42));
    }

    #[tokio::test]
    async fn who_finds_lines_of_somebody_else_knows_it() {
        let shelf = Shelf::new().await;
        let (mut first, mut second) = (shelf.open(0).await, shelf.open(0).await);
        for book in [&mut first, &mut second] {
            due(book, 1);
            due(book, 2);
        }
        first.record(attempt(1, 1, 1, Outcome::Failed)).await;
        first.record(attempt(1, 1, 2, Outcome::Failed)).await;
        assert!(!first.is_shared());
        second.record(attempt(1, 1, 1, Outcome::Failed)).await;
        assert!(second.is_shared());
        first.record(attempt(2, 2, 1, Outcome::Failed)).await;
        assert!(first.is_shared());
        assert!(!shelf.open(0).await.is_shared());
    }

    #[tokio::test]
    async fn a_long_way_without_a_try_is_noted() {
        let shelf = Shelf::new().await;
        let mut book = shelf.open(0).await;
        let since = Timestamp::UNIX_EPOCH;
        assert!(book.due(Position(100), since, Vec::new()).is_empty());
        book.note(false).await;
        assert_eq!(shelf.open(0).await.mark(), Position(0));
        book.note(true).await;
        assert_eq!(shelf.open(0).await.mark(), Position(100));
        book.due(Position(100 + NOTE_EVERY), since, Vec::new());
        book.note(false).await;
        assert_eq!(shelf.open(0).await.mark(), Position(100 + NOTE_EVERY));
    }
}
