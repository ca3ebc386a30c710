//! Folded aggregates as the fold holds them: decoded, with what else their rows are made of.

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
    pub(crate) folded: Folded<Deployment>,
    pub(crate) origin: Option<Origin>,
    /// The marks whose rows are in the table; none if none of its rows is.
    pub(crate) written: Option<Marks>,
}

#[derive(Debug)]
pub(crate) enum State {
    Project(Folded<Project>),
    Environment(Folded<Environment>),
    Build(Box<Folded<Build>>),
    Deployment(Box<DeploymentSlot>),
    Gitops(Folded<Gitops>),
    Routing(Folded<Routing>),
    Ledger(Folded<LedgerRecord>),
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

    /// Ends a batch whose rows are all taken: if there are too many aggregates, only those stay
    /// that it looked at, or none.
    pub(crate) fn end_batch(&mut self) {
        if self.slots.len() > KEPT {
            let batch = self.batch;
            self.slots.retain(|slot| slot.touched == batch);
            if self.slots.len() > KEPT {
                self.slots.clear();
            }
            self.numbers.clear();
            let numbered = self.slots.iter().enumerate();
            self.numbers
                .extend(numbered.map(|(number, slot)| (slot.subject.clone(), number)));
        }
        self.batch += 1;
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
            Subject::Build(..) => Some(Self::Build(Box::new(read(row.as_deref())?))),
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
                            folded,
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
            Self::Project(f) => encode(f),
            Self::Environment(f) => encode(f),
            Self::Build(f) => encode(f),
            Self::Deployment(d) => encode(&(&d.folded, &d.origin)),
            Self::Gitops(f) => encode(f),
            Self::Routing(f) => encode(f),
            Self::Ledger(f) => encode(f),
        }
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
            Self::Project(f) => f.position = position,
            Self::Environment(f) => f.position = position,
            Self::Build(f) => f.position = position,
            Self::Deployment(d) => d.folded.position = position,
            Self::Gitops(f) => f.position = position,
            Self::Routing(f) => f.position = position,
            Self::Ledger(f) => f.position = position,
        }
    }
}

fn read<A: Aggregate>(row: Option<&[u8]>) -> Result<Folded<A>, TableError> {
    row.map_or_else(|| Ok(Folded::default()), decode)
}

/// Reads a deployment's row.
pub(crate) fn deployment(row: &[u8]) -> Result<(Folded<Deployment>, Option<Origin>), TableError> {
    decode(row)
}
