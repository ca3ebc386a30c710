//! Folding a log anew: to rebuild projections, to compare them, and to look at the past.

use std::ops::ControlFlow;
use std::path::Path;
use std::sync::Arc;

use daybook_events::log::ReadError;
use daybook_events::{Digest, EventLog, Position};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use tokio_util::sync::CancellationToken;

use crate::fold::FoldError;
use crate::keys;
use crate::runner::{Trouble, pump};
use crate::store::{Counters, OpenError, Projections, QueryError};
use crate::table::{Way, finish};

/// Differences that a comparison names; there may be more.
const NAMED: usize = 100;

/// How often a comparison starts again because events were folded meanwhile.
const TRIES: u32 = 20;

/// Why a log could not be folded anew.
#[derive(Debug, thiserror::Error)]
pub enum ReplayError {
    /// The log could not be read.
    #[error("the log could not be read")]
    Read(#[from] ReadError),
    /// The log leaves an event out.
    #[error("event {found} came where {expected} was due: the log is incomplete")]
    Incomplete {
        /// The position that was due.
        expected: Position,
        /// The position that came.
        found: Position,
    },
    /// The log ends before the position that was asked for.
    #[error("the log ends at {head}, before {wanted}")]
    Ends {
        /// Its last position.
        head: Position,
        /// The position that was asked for.
        wanted: Position,
    },
    /// The store failed.
    #[error("the projections failed")]
    Store(#[from] QueryError),
    /// The store could not be opened.
    #[error("the projections could not be opened")]
    Open(#[from] OpenError),
    /// The new store could not be put in the old one's place.
    #[error("the rebuilt projections could not be put in place")]
    Swap(#[source] std::io::Error),
    /// Events came faster than they could be compared. Trying again when it is quieter helps.
    #[error("the projections never stood still; try again when fewer events arrive")]
    Busy,
}

impl From<Trouble> for ReplayError {
    fn from(trouble: Trouble) -> Self {
        match trouble {
            Trouble::Read(e) => Self::Read(e),
            Trouble::Fold(FoldError::Table(e)) => Self::Store(e.into()),
            Trouble::Fold(FoldError::Gap { expected, found }) => {
                Self::Incomplete { expected, found }
            }
        }
    }
}

/// The state of everything at a past position, folded in memory from the first event.
pub async fn state_at(
    log: &Arc<dyn EventLog>,
    position: Position,
) -> Result<Projections, ReplayError> {
    let projections = Projections::in_memory();
    fold_to(&projections, log, position, |_| {}).await?;
    Ok(projections)
}

/// Folds the events up to a position, and tells from time to time how far it is. Dropping the
/// future stops it.
pub async fn fold_to(
    projections: &Projections,
    log: &Arc<dyn EventLog>,
    to: Position,
    mut progress: impl FnMut(Position) + Send,
) -> Result<(), ReplayError> {
    let head = log.head().await?;
    if to > head {
        return Err(ReplayError::Ends { head, wanted: to });
    }
    let mut changes = projections.changes();
    let never = CancellationToken::new();
    let mut folding = std::pin::pin!(pump(projections, log, Some(to), &never));
    loop {
        tokio::select! {
            done = &mut folding => {
                done?;
                progress(projections.position());
                return Ok(());
            }
            Ok(()) = changes.changed() => progress(*changes.borrow_and_update()),
        }
    }
}

/// What a rebuild came to.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Rebuilt {
    /// The projections are folded up to here.
    pub position: Position,
    /// Digest over all their rows.
    pub digest: Digest,
    /// How many events changed nothing.
    pub counters: Counters,
}

/// Builds the projections of a folder anew from the first event, beside the old ones, and then
/// puts them in their place. Nobody may have them open. Whenever it is interrupted, either the
/// old or the new ones are there, and what is left over is removed by the next rebuild.
pub async fn rebuild(
    dir: &Path,
    log: &Arc<dyn EventLog>,
    progress: impl FnMut(Position) + Send,
) -> Result<Rebuilt, ReplayError> {
    // Opening it shows that nobody else has it open.
    let current = Projections::open(dir)?;
    let projections = Projections::begin(dir)?;
    let info = log.info().await?;
    projections.identify(&info.identity);
    let head = log.head().await?;
    fold_to(&projections, log, head, progress).await?;
    let (position, digest) = projections.digest()?;
    let counters = projections.counters();
    projections.flush()?;
    drop((projections, current));
    finish(dir).map_err(ReplayError::Swap)?;
    Ok(Rebuilt {
        position,
        digest,
        counters,
    })
}

/// How projections compare with a fold of the log from its first event.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Comparison {
    /// Both are folded up to here.
    pub position: Position,
    /// Digest over the rows that follow from the log.
    pub expected: Digest,
    /// Digest over the rows that are there.
    pub found: Digest,
    /// Where they differ: at most a hundred of the places.
    pub differences: Vec<Difference>,
    /// What the log's events came to.
    pub counters: Counters,
}

impl Comparison {
    /// Whether the projections are what the log says.
    pub fn is_equal(&self) -> bool {
        self.expected == self.found
    }
}

/// One row that is not as it should be.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Difference {
    /// What the row is.
    pub row: String,
    /// `missing`, `surplus` or `different`.
    pub kind: String,
}

/// Folds the log from its first event in memory, and compares the outcome with projections row by
/// row. The projections may be live: they are compared where they are, and writing them waits
/// while they are.
pub async fn compare(
    projections: &Projections,
    log: &Arc<dyn EventLog>,
    mut progress: impl FnMut(Position) + Send,
) -> Result<Comparison, ReplayError> {
    let replayed = Projections::in_memory();
    for _ in 0..TRIES {
        fold_to(&replayed, log, projections.position(), &mut progress).await?;
        let (expected, found) = (replayed.clone(), projections.clone());
        let compared = tokio::task::spawn_blocking(move || compare_now(&expected, &found)).await;
        match compared {
            Ok(Ok(Some(comparison))) => return Ok(comparison),
            Ok(Ok(None)) => {}
            Ok(Err(e)) => return Err(e.into()),
            Err(e) => return Err(QueryError::Store(e.to_string()).into()),
        }
    }
    Err(ReplayError::Busy)
}

/// Compares two stores; none if they are not at the same position.
fn compare_now(
    expected: &Projections,
    found: &Projections,
) -> Result<Option<Comparison>, QueryError> {
    let _gate = found.gate();
    let position = found.position();
    if position != expected.position() {
        return Ok(None);
    }
    let mut differences = Vec::new();
    find(expected, found, "missing", &mut differences)?;
    find(found, expected, "surplus", &mut differences)?;
    Ok(Some(Comparison {
        position,
        expected: expected.digest_of_rows()?,
        found: found.digest_of_rows()?,
        differences,
        counters: expected.counters(),
    }))
}

/// Notes the rows of `one` that `other` has not; those that differ are noted once, as long as
/// `absent` says that they are missing.
fn find(
    one: &Projections,
    other: &Projections,
    absent: &str,
    differences: &mut Vec<Difference>,
) -> Result<(), QueryError> {
    let failed = one
        .inner
        .table
        .scan(b"", None, Way::Up, |key, value| {
            if keys::is_local(key) {
                return ControlFlow::Continue(());
            }
            let kind = match other.inner.table.get(key) {
                Err(e) => return ControlFlow::Break(Some(e)),
                Ok(None) => absent,
                Ok(Some(v)) if v != *value && absent == "missing" => "different",
                Ok(Some(_)) => return ControlFlow::Continue(()),
            };
            differences.push(Difference {
                row: keys::describe(key),
                kind: kind.to_owned(),
            });
            if differences.len() >= NAMED {
                ControlFlow::Break(None)
            } else {
                ControlFlow::Continue(())
            }
        })?
        .flatten();
    failed.map_or(Ok(()), |e| Err(e.into()))
}
