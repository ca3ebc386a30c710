//! Folded aggregates as the fold holds them: decoded, with what else their rows are made of.

use std::any::Any;
use std::sync::Arc;

use daybook_events::build::Build;
use daybook_events::deployment::{Deployment, Status};
use daybook_events::environment::Environment;
use daybook_events::gitops::Gitops;
use daybook_events::ledger::LedgerRecord;
use daybook_events::project::Project;
use daybook_events::routing::Routing;
use daybook_events::{Actor, Aggregate, BuildId, Folded, Position, Subject};
use rustc_hash::FxHashMap;
use serde::{Deserialize, Serialize};
use sled::IVec;

use crate::keys;
use crate::table::{Table, TableError, decode, encode};

/// What is known of a deployment beyond its own events' state.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Origin {
    /// Position of its request.
    pub(crate) created: Position,
    /// Who asked for it.
    pub(crate) actor: Actor,
    /// Message of the GitOps commit that introduced it.
    pub(crate) message: Option<String>,
}

/// Which index rows a deployment's state calls for, beside those that every deployment has.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Marks {
    /// It is not removed, and did not end before it was live.
    pub(crate) active: bool,
    /// The build that it waits for.
    pub(crate) waits_for: Option<BuildId>,
}

impl Marks {
    pub(crate) fn of(state: &Deployment) -> Self {
        Self {
            active: is_active(state.status),
            waits_for: state.build.filter(|_| state.status.in_pipeline()),
        }
    }
}

/// Whether a deployment in this state runs, can run again, or is on its way to run.
pub(crate) fn is_active(status: Status) -> bool {
    !matches!(
        status,
        Status::Terminated | Status::Deleted | Status::Failed | Status::Cancelled
    )
}

#[derive(Debug, Default)]
pub(crate) struct DeploymentSlot {
    pub(crate) folded: Arc<Folded<Deployment>>,
    pub(crate) origin: Option<Origin>,
    /// The marks whose rows are in the table; none if none of its rows is.
    pub(crate) written: Option<Marks>,
}

/// A folded aggregate. Readers share it: it is copied before it changes while somebody has it.
#[derive(Debug)]
pub(crate) enum State {
    Project(Arc<Folded<Project>>),
    Environment(Arc<Folded<Environment>>),
    Build(Arc<Folded<Build>>),
    Deployment(Box<DeploymentSlot>),
    Gitops(Arc<Folded<Gitops>>),
    Routing(Arc<Folded<Routing>>),
    Ledger(Arc<Folded<LedgerRecord>>),
}

/// A folded aggregate as readers get it.
#[derive(Debug, Clone)]
pub(crate) struct Shared {
    /// An `Arc<Folded<A>>` of the subject's aggregate.
    folded: Arc<dyn Any + Send + Sync>,
    /// For a deployment, the position of its request.
    pub(crate) created: Option<Position>,
}

impl Shared {
    /// The aggregate, if it is of this kind.
    pub(crate) fn folded<A: Aggregate>(&self) -> Option<Arc<Folded<A>>> {
        self.folded.clone().downcast().ok()
    }
}

/// An aggregate in the fold's memory.
#[derive(Debug)]
pub(crate) struct Slot {
    pub(crate) subject: Subject,
    pub(crate) state: State,
    /// Its rows have to be written.
    dirty: bool,
    /// The last batch that looked at it.
    touched: u64,
}

/// How many aggregates stay decoded between batches.
const KEPT: usize = 2048;

/// The aggregates that are decoded, by numbers that hold until the end of a batch.
#[derive(Debug, Default)]
pub(crate) struct Slots {
    numbers: FxHashMap<Subject, usize>,
    slots: Vec<Slot>,
    dirty: Vec<usize>,
    batch: u64,
}

impl Slots {
    /// The number of an aggregate, which is read if it was not yet; none for one of a newer
    /// version.
    pub(crate) fn find(
        &mut self,
        table: &Table,
        subject: &Subject,
    ) -> Result<Option<usize>, TableError> {
        if let Some(number) = self.numbers.get(subject) {
            self.slots[*number].touched = self.batch;
            return Ok(Some(*number));
        }
        let Some(state) = State::load(table, subject)? else {
            return Ok(None);
        };
        let number = self.slots.len();
        self.slots.push(Slot {
            subject: subject.clone(),
            state,
            dirty: false,
            touched: self.batch,
        });
        self.numbers.insert(subject.clone(), number);
        Ok(Some(number))
    }

    pub(crate) fn get(&self, number: usize) -> &Slot {
        &self.slots[number]
    }

    /// An aggregate that is about to change.
    pub(crate) fn change(&mut self, number: usize) -> &mut State {
        let slot = &mut self.slots[number];
        if !slot.dirty {
            slot.dirty = true;
            self.dirty.push(number);
        }
        &mut slot.state
    }

    /// An aggregate whose rows are being written.
    pub(crate) fn settle(&mut self, number: usize) -> &mut Slot {
        &mut self.slots[number]
    }

    /// Takes the numbers of those that changed.
    pub(crate) fn take_dirty(&mut self) -> Vec<usize> {
        for number in &self.dirty {
            self.slots[*number].dirty = false;
        }
        std::mem::take(&mut self.dirty)
    }

    /// Ends a batch whose rows are all taken: if there are too many aggregates, those go that were
    /// not used for longest, which are at least half of them. Returns which.
    pub(crate) fn end_batch(&mut self) -> Vec<Subject> {
        let mut gone = Vec::new();
        if self.slots.len() > KEPT {
            let mut touched: Vec<u64> = self.slots.iter().map(|slot| slot.touched).collect();
            let middle = touched.len() / 2;
            let last_to_go = *touched.select_nth_unstable(middle).1;
            self.numbers.clear();
            for slot in std::mem::take(&mut self.slots) {
                if slot.touched > last_to_go {
                    self.numbers.insert(slot.subject.clone(), self.slots.len());
                    self.slots.push(slot);
                } else {
                    gone.push(slot.subject);
                }
            }
        }
        self.batch += 1;
        gone
    }
}

impl State {
    /// Reads an aggregate, or makes an empty one. None for an aggregate of a newer version.
    pub(crate) fn load(table: &Table, subject: &Subject) -> Result<Option<Self>, TableError> {
        let Some(key) = keys::state(subject) else {
            return Ok(None);
        };
        let row = table.get(&key)?;
        Ok(match subject {
            Subject::Project(_) => Some(Self::Project(read(row.as_deref())?)),
            Subject::Environment(..) => Some(Self::Environment(read(row.as_deref())?)),
            Subject::Build(..) => Some(Self::Build(read(row.as_deref())?)),
            Subject::Gitops(_) => Some(Self::Gitops(read(row.as_deref())?)),
            Subject::Routing(_) => Some(Self::Routing(read(row.as_deref())?)),
            Subject::Ledger => Some(Self::Ledger(read(row.as_deref())?)),
            Subject::Deployment(..) => {
                let slot = match row {
                    None => DeploymentSlot::default(),
                    Some(row) => {
                        let (folded, origin) = deployment(&row)?;
                        let written = folded.state.as_ref().map(Marks::of);
                        DeploymentSlot {
                            folded: Arc::new(folded),
                            origin,
                            written,
                        }
                    }
                };
                Some(Self::Deployment(Box::new(slot)))
            }
            Subject::Other(_) => None,
        })
    }

    /// The row of this aggregate.
    pub(crate) fn encode(&self) -> Result<IVec, TableError> {
        match self {
            Self::Project(f) => encode(&**f),
            Self::Environment(f) => encode(&**f),
            Self::Build(f) => encode(&**f),
            Self::Deployment(d) => encode(&(&*d.folded, &d.origin)),
            Self::Gitops(f) => encode(&**f),
            Self::Routing(f) => encode(&**f),
            Self::Ledger(f) => encode(&**f),
        }
    }

    /// What readers get.
    pub(crate) fn share(&self) -> Shared {
        let mut created = None;
        let folded: Arc<dyn Any + Send + Sync> = match self {
            Self::Project(f) => f.clone(),
            Self::Environment(f) => f.clone(),
            Self::Build(f) => f.clone(),
            Self::Deployment(d) => {
                created = d.origin.as_ref().map(|o| o.created);
                d.folded.clone()
            }
            Self::Gitops(f) => f.clone(),
            Self::Routing(f) => f.clone(),
            Self::Ledger(f) => f.clone(),
        };
        Shared { folded, created }
    }

    /// Position of the aggregate's last event.
    pub(crate) fn position(&self) -> Position {
        match self {
            Self::Project(f) => f.position,
            Self::Environment(f) => f.position,
            Self::Build(f) => f.position,
            Self::Deployment(d) => d.folded.position,
            Self::Gitops(f) => f.position,
            Self::Routing(f) => f.position,
            Self::Ledger(f) => f.position,
        }
    }

    /// Notes an event that could not be read at all: the next append expects its position.
    pub(crate) fn pass(&mut self, position: Position) {
        match self {
            Self::Project(f) => Arc::make_mut(f).position = position,
            Self::Environment(f) => Arc::make_mut(f).position = position,
            Self::Build(f) => Arc::make_mut(f).position = position,
            Self::Deployment(d) => Arc::make_mut(&mut d.folded).position = position,
            Self::Gitops(f) => Arc::make_mut(f).position = position,
            Self::Routing(f) => Arc::make_mut(f).position = position,
            Self::Ledger(f) => Arc::make_mut(f).position = position,
        }
    }
}

fn read<A: Aggregate>(row: Option<&[u8]>) -> Result<Arc<Folded<A>>, TableError> {
    row.map_or_else(|| Ok(Arc::default()), |row| decode(row).map(Arc::new))
}

/// Reads a deployment's row.
pub(crate) fn deployment(row: &[u8]) -> Result<(Folded<Deployment>, Option<Origin>), TableError> {
    decode(row)
}
