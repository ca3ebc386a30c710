//! Folding a log anew: to rebuild projections, to compare them, and to look at the past.

use std::sync::Arc;

use daybook_events::log::ReadError;
use daybook_events::{EventLog, Position, SubjectFilter};

use crate::fold::FoldError;
use crate::store::{Projections, QueryError};

/// Events that are read at once.
const READ: usize = 4096;

/// Why a log could not be folded.
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
}

impl From<FoldError> for ReplayError {
    fn from(e: FoldError) -> Self {
        match e {
            FoldError::Table(e) => Self::Store(e.into()),
            FoldError::Gap { expected, found } => Self::Incomplete { expected, found },
        }
    }
}

/// The state of everything at a past position, folded in memory from the first event.
pub async fn state_at(
    log: &Arc<dyn EventLog>,
    position: Position,
) -> Result<Projections, ReplayError> {
    let projections = Projections::in_memory();
    fold_to(&projections, log, position, &mut |_| {}).await?;
    Ok(projections)
}

/// Folds the events up to a position, and tells after each read how far it is.
pub async fn fold_to(
    projections: &Projections,
    log: &Arc<dyn EventLog>,
    to: Position,
    progress: &mut (dyn FnMut(Position) + Send),
) -> Result<(), ReplayError> {
    while projections.position() < to {
        let after = projections.position();
        let left = usize::try_from(to.0 - after.0).unwrap_or(READ).min(READ);
        let events = log.read(after, &SubjectFilter::default(), left).await?;
        if events.is_empty() {
            return Err(ReplayError::Ends {
                head: after,
                wanted: to,
            });
        }
        projections.take(events)?;
        progress(projections.position());
    }
    Ok(())
}
