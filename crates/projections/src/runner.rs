//! The runner: it keeps the projections up with the log.
//!
//! One task reads, one thread decodes and folds. The thread takes whatever has come since it last looked:
//! thousands of events while it catches up, a single one when it is live.

use std::sync::Arc;
use std::time::Duration;

use daybook_events::log::ReadError;
use daybook_events::{EventLog, Position, Recorded, SubjectFilter};
use futures_util::StreamExt;
use tokio::sync::mpsc::{self, error::TryRecvError};
use tokio_util::sync::CancellationToken;

use crate::fold::FoldError;
use crate::keys::MARK;
use crate::store::{Projections, QueryError};
use crate::table::TableError;

/// When so many events are folded, their rows are written at the next position at which the sum of
/// states is kept: what is encoded for the one serves the other.
const BATCH: usize = 16 << 10;
/// Most events that are read at once.
const READ: usize = 512;
/// How many such reads may wait for the fold.
const AHEAD: usize = 32;

/// A batch of so many events is one of a store that catches up.
const LARGE: usize = 512;
/// How long such a batch waits for more.
const LINGER: Duration = Duration::from_millis(2);

const FIRST_PAUSE: Duration = Duration::from_millis(50);
const LONGEST_PAUSE: Duration = Duration::from_secs(5);

/// How often a log may be found incomplete at the same position before the runner gives up.
const GAPS: u32 = 5;

/// Why the projections can no longer follow the log.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    /// The log cannot be read, and no waiting would mend it.
    #[error("the projections cannot read the log")]
    Read(#[from] ReadError),
    /// The log left an event out.
    #[error(
        "event {found} came where {expected} was due: the log is incomplete; \
         run `daybook replay` to look at it"
    )]
    Incomplete {
        /// The position that was due.
        expected: Position,
        /// The position that came.
        found: Position,
    },
    /// The store failed.
    #[error("the projections cannot be written")]
    Store(#[from] QueryError),
}

pub(crate) enum Trouble {
    Read(ReadError),
    Fold(FoldError),
}

impl From<ReadError> for Trouble {
    fn from(e: ReadError) -> Self {
        Self::Read(e)
    }
}
impl From<FoldError> for Trouble {
    fn from(e: FoldError) -> Self {
        Self::Fold(e)
    }
}
impl From<TableError> for Trouble {
    fn from(e: TableError) -> Self {
        Self::Fold(e.into())
    }
}

/// Folds the log into the projections until it is cancelled: first what there is, then what
/// comes. A log that is away is waited for. A store that belongs to another log, that is ahead
/// of its log, or whose rows are damaged, is emptied and filled anew.
pub async fn run(
    projections: Projections,
    log: Arc<dyn EventLog>,
    cancel: CancellationToken,
) -> Result<(), RunError> {
    let mut pause = FIRST_PAUSE;
    let mut gaps = 0;
    loop {
        let before = projections.position();
        let trouble = match follow(&projections, &log, &cancel).await {
            Ok(()) => return Ok(()),
            Err(trouble) => trouble,
        };
        if projections.position() > before {
            pause = FIRST_PAUSE;
            gaps = 0;
        }
        match trouble {
            Trouble::Read(ReadError::Unavailable(why)) => {
                tracing::warn!(%why, "the log is not available to the projections");
            }
            Trouble::Read(e) => return Err(e.into()),
            Trouble::Fold(FoldError::Gap { expected, found }) => {
                gaps += 1;
                if gaps == GAPS {
                    return Err(RunError::Incomplete { expected, found });
                }
                tracing::warn!(%expected, %found, "an event is missing; reading again");
            }
            Trouble::Fold(FoldError::Table(
                TableError::Row(why) | TableError::Broken(why) | TableError::Stuck(why),
            )) => {
                tracing::warn!(%why, "the projections are damaged, and are built anew");
                projections.restart("").map_err(QueryError::from)?;
            }
            Trouble::Fold(FoldError::Table(e)) => {
                tracing::error!(error = %e, "the projections cannot be written");
            }
        }
        tokio::select! {
            () = cancel.cancelled() => return Ok(()),
            () = tokio::time::sleep(pause) => {}
        }
        pause = (pause * 2).min(LONGEST_PAUSE);
    }
}

/// Makes sure that the rows were folded from this log.
async fn same_log(projections: &Projections, log: &Arc<dyn EventLog>) -> Result<(), Trouble> {
    let identity = log.info().await?.identity;
    let head = log.head().await?;
    let known = projections.identity()?;
    let ahead = projections.position() > head;
    if known.as_ref() == Some(&identity) && !ahead {
        return Ok(());
    }
    if known.is_none() && projections.position() == Position::ZERO {
        projections.identify(&identity);
        return Ok(());
    }
    if projections.position() > Position::ZERO {
        tracing::warn!(
            position = %projections.position(), %head,
            "the projections were made from another log, and are built anew"
        );
    }
    Ok(projections.restart(&identity)?)
}

async fn follow(
    projections: &Projections,
    log: &Arc<dyn EventLog>,
    cancel: &CancellationToken,
) -> Result<(), Trouble> {
    tokio::select! {
        () = cancel.cancelled() => return Ok(()),
        same = same_log(projections, log) => same?,
    }
    pump(projections, log, None, cancel).await
}

/// Folds the events that follow on the projections' position: up to `until`, or without end.
pub(crate) async fn pump(
    projections: &Projections,
    log: &Arc<dyn EventLog>,
    until: Option<Position>,
    cancel: &CancellationToken,
) -> Result<(), Trouble> {
    let mut reached = projections.position();
    if until.is_some_and(|u| u <= reached) {
        return Ok(());
    }
    let mut events = tokio::select! {
        () = cancel.cancelled() => return Ok(()),
        opened = log.tail(reached, SubjectFilter::default()) => opened?.ready_chunks(READ),
    };
    let (sender, receiver) = mpsc::channel(AHEAD);
    // What was folded is dropped where it was made: memory that goes from thread to thread is dear.
    let (give_back, mut folded) = mpsc::channel(AHEAD);
    let folding = projections.clone();
    let fold = tokio::task::spawn_blocking(move || fold_all(&folding, receiver, &give_back));
    let ended = loop {
        if until.is_some_and(|u| u <= reached) {
            break Ok(());
        }
        let chunk = tokio::select! {
            () = cancel.cancelled() => break Ok(()),
            () = sender.closed() => break Ok(()),
            Some(_) = folded.recv() => continue,
            chunk = events.next() => chunk,
        };
        let Some(chunk) = chunk else {
            break Err(ReadError::Unavailable("the log's tail ended".to_owned()));
        };
        let mut read = Vec::with_capacity(chunk.len());
        let mut failed = None;
        for event in chunk {
            match event {
                Ok(event) if until.is_some_and(|u| event.position > u) => break,
                Ok(event) => {
                    reached = event.position;
                    read.push(event);
                }
                Err(e) => {
                    failed = Some(e);
                    break;
                }
            }
        }
        // The thread went away only if it failed, and then says so below.
        if !read.is_empty() && sender.send(read).await.is_err() {
            break Ok(());
        }
        if let Some(e) = failed {
            break Err(e);
        }
    };
    drop(sender);
    match fold.await {
        Ok(Ok(())) => Ok(ended?),
        Ok(Err(e)) => Err(e.into()),
        Err(e) => Err(FoldError::Table(TableError::Row(format!("the fold failed: {e}"))).into()),
    }
}

/// Folds what comes, and writes rows whenever nothing more is waiting, or a batch is full.
fn fold_all(
    projections: &Projections,
    mut receiver: mpsc::Receiver<Vec<Recorded>>,
    give_back: &mpsc::Sender<Vec<Recorded>>,
) -> Result<(), FoldError> {
    let (mut folded, mut lingered) = (0, false);
    loop {
        let more = match receiver.try_recv() {
            Ok(more) => Some(more),
            Err(TryRecvError::Disconnected) => None,
            Err(TryRecvError::Empty) if folded == 0 => receiver.blocking_recv(),
            // It is catching up, and has been faster than the log: what an event costs is less the
            // more of them are written at once, and the more of them a wait is for.
            Err(TryRecvError::Empty) if folded >= LARGE && !lingered => {
                std::thread::sleep(LINGER);
                lingered = true;
                continue;
            }
            Err(TryRecvError::Empty) => None,
        };
        lingered = false;
        let Some(more) = more else {
            if folded == 0 {
                return Ok(());
            }
            projections.commit()?;
            folded = 0;
            continue;
        };
        let at_mark = |event: &Recorded| event.position.0.is_multiple_of(MARK);
        for events in more.chunk_by(|event, _| !at_mark(event)) {
            projections.fold(events)?;
            folded += events.len();
            if folded >= BATCH && events.last().is_some_and(at_mark) {
                projections.commit()?;
                folded = 0;
            }
        }
        // What nobody takes is dropped here.
        let _ = give_back.try_send(more);
    }
}
