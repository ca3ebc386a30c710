//! What stands between Daybook and a log that is not what it should be: no more appends to one that
//! is broken, and a way past the gaps that are recorded.

use std::sync::Arc;
use std::time::{Duration, Instant};

use async_trait::async_trait;
use daybook_events::Event;
use daybook_events::log::{
    Append, AppendError, Appended, Consumer, ConsumerConfig, EventLog, EventStream, Link, LogInfo,
    Position, ReadError, Recorded,
};
use daybook_events::subject::{Subject, SubjectFilter};
use daybook_events::tree::{PublishedTree, TreeCondition};
use futures_util::{StreamExt, stream};
use jiff::Timestamp;

use super::leaf::{gap_entry, is_gap};
use super::reader::{Published, TreeReader};
use super::repair::address;

/// How long a reader waits before it asks again whether a gap was recorded.
const ASK_AGAIN: Duration = Duration::from_millis(200);
/// How long an append waits for a doubt to go, asked so often. The notary knows two seconds after the
/// log answered; one that does not answer for so long is not available.
const DOUBT_LASTS: Duration = Duration::from_secs(15);
const DOUBT_ASKED: Duration = Duration::from_millis(20);

/// A log as Daybook uses it, with the tree over it.
///
/// From the moment on at which the tree says that the log is broken, appends are answered with
/// [`AppendError::Stopped`]; what is there can still be read. While the log is doubted they wait, so
/// that nothing comes into a log that lost its end. And where the log has nothing at a
/// position, readers get an event of no aggregate in its place once the tree has recorded the gap, as
/// after a repair: positions stay without one. For as long as it has not, they wait.
#[derive(Debug, Clone)]
pub struct GuardedLog {
    log: Arc<dyn EventLog>,
    tree: Arc<dyn PublishedTree>,
    /// Whether a notary may still record a gap that the tree does not have yet.
    is_growing: bool,
}

impl GuardedLog {
    /// Guards a log by the tree over it.
    pub fn new(log: Arc<dyn EventLog>, tree: Arc<dyn PublishedTree>) -> Self {
        Self {
            log,
            tree,
            is_growing: true,
        }
    }

    /// Guards a log while no notary works: for a gap that is not recorded nobody waits, but gets
    /// [`ReadError::Missing`].
    pub fn at_rest(log: Arc<dyn EventLog>, tree: Arc<dyn PublishedTree>) -> Self {
        Self {
            is_growing: false,
            ..Self::new(log, tree)
        }
    }

    /// Whether the tree has a gap at a position; `None` if it does not reach that far.
    async fn is_recorded_gap(&self, position: Position) -> Result<Option<bool>, ReadError> {
        let size = self.tree.head().map_or(0, |signed| signed.head.size);
        if size < position.0 || position == Position::ZERO {
            return Ok(None);
        }
        let published = Published(Arc::clone(&self.tree));
        let entry = TreeReader::new(&published, size)
            .entry(position.0 - 1)
            .await;
        match entry {
            Ok(entry) => Ok(Some(is_gap(position, &entry))),
            Err(error) => Err(ReadError::Unavailable(error.to_string())),
        }
    }

    /// That events may be appended, as far as the tree knows; waits for as long as it doubts.
    async fn may_append(&self) -> Result<(), AppendError> {
        let began = Instant::now();
        loop {
            match self.tree.condition() {
                TreeCondition::Sound | TreeCondition::Unknown(_) => return Ok(()),
                TreeCondition::Broken(breach) => {
                    return Err(AppendError::Stopped(format!(
                        "{} ({}); {}",
                        breach.message, breach.code, breach.remedy
                    )));
                }
                TreeCondition::Doubted(why) if began.elapsed() >= DOUBT_LASTS => {
                    return Err(AppendError::Unavailable(why));
                }
                TreeCondition::Doubted(_) => tokio::time::sleep(DOUBT_ASKED).await,
            }
        }
    }

    /// Whether to go past a position at which the log has nothing. Waits until that is known.
    async fn may_pass(&self, position: Position) -> Result<bool, ReadError> {
        loop {
            if let Some(recorded) = self.is_recorded_gap(position).await? {
                return Ok(recorded);
            }
            if !self.is_growing {
                return Ok(false);
            }
            if let TreeCondition::Broken(_) = self.tree.condition() {
                return Ok(false);
            }
            tokio::time::sleep(ASK_AGAIN).await;
        }
    }
}

/// Where a reader of everything that follows is.
enum Tail {
    /// It reads the log.
    Log(EventStream),
    /// It has passed a gap at this position.
    Past(Position),
}

impl GuardedLog {
    /// The next event of a tail, if that is one that the filter lets through, and how to go on. No
    /// error stands for the end.
    async fn further(
        &self,
        tail: Tail,
        filter: &SubjectFilter,
    ) -> Result<(Option<Recorded>, Tail), Option<ReadError>> {
        let mut events = match tail {
            Tail::Log(events) => events,
            // A log takes its time to say that it has nothing; the tree knows at once.
            Tail::Past(gap) if self.is_recorded_gap(gap.next()).await? == Some(true) => {
                return Ok((wanted(filter, gap.next()), Tail::Past(gap.next())));
            }
            Tail::Past(gap) => self.log.tail(gap, filter.clone()).await?,
        };
        match events.next().await.ok_or(None)? {
            Ok(event) => Ok((Some(event), Tail::Log(events))),
            Err(ReadError::Missing { position }) if self.may_pass(position).await? => {
                Ok((wanted(filter, position), Tail::Past(position)))
            }
            Err(error) => Err(Some(error)),
        }
    }
}

/// What stands for an event that was lost: what `repair` writes in its place, so that a fold comes to
/// the same before and after. Nobody knows when it was stored.
fn in_place_of(position: Position) -> Recorded {
    let entry = gap_entry(position);
    Recorded {
        position,
        subject: address(position, &entry).0,
        stored_at: Timestamp::UNIX_EPOCH,
        bytes: entry,
    }
}

/// The same, if a filter lets it through.
fn wanted(filter: &SubjectFilter, position: Position) -> Option<Recorded> {
    let gap = in_place_of(position);
    filter.matches(&gap.subject).then_some(gap)
}

/// The kind of the event that is appended, as failpoints are told apart by it.
fn kind_of(append: &Append) -> String {
    let event = Event::from_bytes(&append.bytes);
    event.map_or_else(|_| "unreadable".to_owned(), |e| e.short_kind().to_owned())
}

#[async_trait]
impl EventLog for GuardedLog {
    async fn append(&self, append: Append) -> Result<Appended, AppendError> {
        self.may_append().await?;
        let kind = daybook_failpoints::ARMED.then(|| kind_of(&append));
        daybook_failpoints::reached_for("append.before", || kind.clone().unwrap_or_default());
        let appended = self.log.append(append).await;
        daybook_failpoints::reached_for("append.after", || kind.clone().unwrap_or_default());
        appended
    }

    fn may_accept_two(&self) -> bool {
        self.log.may_accept_two()
    }

    fn link(&self) -> Option<Link> {
        self.log.link()
    }

    async fn head(&self) -> Result<Position, ReadError> {
        self.log.head().await
    }

    async fn get(&self, position: Position) -> Result<Option<Recorded>, ReadError> {
        match self.log.get(position).await {
            Err(ReadError::Missing { .. })
                if self.is_recorded_gap(position).await? == Some(true) =>
            {
                Ok(Some(in_place_of(position)))
            }
            other => other,
        }
    }

    async fn read_aggregate(&self, subject: &Subject) -> Result<Vec<Recorded>, ReadError> {
        self.log.read_aggregate(subject).await
    }

    async fn read(
        &self,
        after: Position,
        filter: &SubjectFilter,
        limit: usize,
    ) -> Result<Vec<Recorded>, ReadError> {
        let (mut events, mut after) = (Vec::new(), after);
        loop {
            let rest = limit - events.len();
            match self.log.read(after, filter, rest).await {
                Err(ReadError::Missing { position })
                    if position > after && self.is_recorded_gap(position).await? == Some(true) =>
                {
                    // What stands before the gap, and then what follows it.
                    let before = usize::try_from(position.0 - 1 - after.0).unwrap_or(usize::MAX);
                    let before = before.min(rest);
                    if before > 0 {
                        events.extend(self.log.read(after, filter, before).await?);
                    }
                    if events.len() < limit {
                        events.extend(wanted(filter, position));
                    }
                    after = position;
                    // A log takes its time to say that it has nothing; the tree knows at once.
                    while events.len() < limit
                        && self.is_recorded_gap(after.next()).await? == Some(true)
                    {
                        after = after.next();
                        events.extend(wanted(filter, after));
                    }
                    if events.len() >= limit {
                        return Ok(events);
                    }
                }
                Err(error) => return Err(error),
                Ok(more) if events.is_empty() => return Ok(more),
                Ok(more) => {
                    events.extend(more);
                    return Ok(events);
                }
            }
        }
    }

    async fn tail(&self, after: Position, filter: SubjectFilter) -> Result<EventStream, ReadError> {
        let events = self.log.tail(after, filter.clone()).await?;
        let tail = (self.clone(), filter, Some(Tail::Log(events)));
        Ok(stream::unfold(tail, |(log, filter, tail)| async move {
            let mut tail = tail?;
            loop {
                match log.further(tail, &filter).await {
                    Ok((Some(event), tail)) => return Some((Ok(event), (log, filter, Some(tail)))),
                    Ok((None, further)) => tail = further,
                    Err(Some(error)) => return Some((Err(error), (log, filter, None))),
                    Err(None) => return None,
                }
            }
        })
        .boxed())
    }

    async fn consumer(&self, config: ConsumerConfig) -> Result<Arc<dyn Consumer>, ReadError> {
        self.log.consumer(config).await
    }

    async fn info(&self) -> Result<LogInfo, ReadError> {
        self.log.info().await
    }
}
