//! Folded aggregates as the fold holds them: decoded, with what else their rows are made of.

use std::any::Any;
use std::sync::Arc;

use daybook_events::access::Access;
use daybook_events::aggregate::At;
use daybook_events::build::Build;
use daybook_events::deployment::{Deployment, SourceCommit, Status};
use daybook_events::domain::Domain;
use daybook_events::environment::Environment;
use daybook_events::gitops::Gitops;
use daybook_events::ledger::LedgerRecord;
use daybook_events::project::Project;
use daybook_events::routing::Routing;
use daybook_events::subscription::Subscription;
use daybook_events::{
    Actor, Aggregate, AggregateKind, BuildId, EventView, Folded, Position, Recorded, Subject,
};
use jiff::Timestamp;
use rustc_hash::FxHashMap;
use serde::{Deserialize, Serialize};
use sled::IVec;

use crate::keys;
use crate::reached::Reached;
use crate::state_hash::{Element, Sum};
use crate::table::{Table, TableError, append, decode_part, through_scratch, through_scratch_to};

/// What is known of a deployment beyond its own events' state.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Origin {
    /// Position of its request.
    pub(crate) created: Position,
    /// Who asked for it.
    pub(crate) actor: Actor,
    /// Message of the GitOps commit that introduced it, with the position of that commit's event.
    pub(crate) message: Option<(Position, String)>,
    /// The commit that its image was made from, if that was made for the deployment that it was
    /// promoted from or repeats.
    pub(crate) source: Option<SourceCommit>,
    /// When it was first seen to get somewhere.
    pub(crate) reached: Reached,
}

/// Which index rows a deployment's state calls for, beside those that every deployment has.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Marks {
    /// It is not removed, and did not end before it was live.
    pub(crate) active: bool,
    /// The build that it waits for.
    pub(crate) waits_for: Option<BuildId>,
    /// The time that it waits for.
    pub(crate) due: Option<Timestamp>,
    /// It waits for people to allow its plan.
    pub(crate) undecided: bool,
}

impl Marks {
    pub(crate) fn of(state: &Deployment) -> Self {
        Self {
            active: is_active(state.status),
            waits_for: state.build.filter(|_| state.status.in_pipeline()),
            due: state.due(),
            undecided: state.status == Status::AwaitingApproval,
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

#[derive(Debug, Default, Clone)]
pub(crate) struct DeploymentSlot {
    pub(crate) folded: Arc<Folded<Deployment>>,
    pub(crate) origin: Option<Origin>,
    /// The marks whose rows are in the table; none if none of its rows is.
    pub(crate) written: Option<Marks>,
}

impl DeploymentSlot {
    /// The commit that it was made from: its own, or that of the deployment whose image it has.
    pub(crate) fn source(&self) -> Option<&SourceCommit> {
        let own = self.folded.state.as_ref().and_then(|s| s.source.as_ref());
        own.or_else(|| self.origin.as_ref()?.source.as_ref())
    }
}

/// A folded aggregate. Readers share it: it is copied before it changes while somebody has it.
#[derive(Debug, Clone)]
pub(crate) enum State {
    Project(Arc<Folded<Project>>),
    Environment(Arc<Folded<Environment>>),
    Build(Arc<Folded<Build>>),
    Deployment(Box<DeploymentSlot>),
    Gitops(Arc<Folded<Gitops>>),
    Routing(Arc<Folded<Routing>>),
    Domain(Arc<Folded<Domain>>),
    Subscription(Arc<Folded<Subscription>>),
    Ledger(Arc<Folded<LedgerRecord>>),
    Access(Arc<Folded<Access>>),
}

/// A folded aggregate as readers get it.
#[derive(Debug, Clone)]
pub(crate) struct Shared {
    /// An `Arc<Folded<A>>` of the subject's aggregate.
    folded: Arc<dyn Any + Send + Sync>,
    /// For a deployment, the position of its request.
    pub(crate) created: Option<Position>,
    /// And the commit that its image was made from, if that was made for another one.
    pub(crate) source: Option<SourceCommit>,
    /// And when it was first seen to get somewhere.
    pub(crate) reached: Reached,
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
    pub(crate) kept: Kept,
    /// Its rows have to be written.
    dirty: bool,
    /// Its element in the sum of states is to be replaced.
    stale: bool,
    /// Its state as it is encoded, if it was since it changed, and its row is still to be written.
    encoded: Vec<u8>,
    /// The last batch that looked at it.
    touched: u64,
}

/// An aggregate as its row holds it.
#[derive(Debug, Clone)]
pub(crate) struct Kept {
    pub(crate) state: State,
    /// Positions of its events since its newest snapshot.
    pub(crate) trail: Vec<Position>,
    /// Position of that snapshot; 0 if there is none. In a snapshot's row, of the one before it.
    pub(crate) snapshot: Position,
    /// What it contributes to the sum of states; none before its first event.
    pub(crate) element: Option<Element>,
}

/// A state that takes no more bytes is kept encoded from the sum of states to its row.
const REMEMBERED: usize = 4 << 10;

/// How many aggregates stay decoded between batches.
const KEPT: usize = 2048;

/// How many events of an aggregate of this kind there are from one snapshot of it to the next. A
/// past state is the snapshot before it and the events in between, each of which is one read of
/// the log; the states of the last two kinds are large.
fn snapshot_every(kind: AggregateKind) -> usize {
    match kind {
        AggregateKind::Project
        | AggregateKind::Environment
        | AggregateKind::Build
        | AggregateKind::Deployment
        | AggregateKind::Domain
        | AggregateKind::Subscription
        | AggregateKind::Ledger
        | AggregateKind::Access => 16,
        AggregateKind::Gitops | AggregateKind::Routing => 32,
    }
}

/// The aggregates that are decoded, by numbers that hold until the end of a batch.
#[derive(Debug, Default)]
pub(crate) struct Slots {
    numbers: FxHashMap<Subject, usize>,
    slots: Vec<Slot>,
    dirty: Vec<usize>,
    stale: Vec<usize>,
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
        let Some(kept) = Kept::load(table, subject)? else {
            return Ok(None);
        };
        let number = self.slots.len();
        self.slots.push(Slot {
            subject: subject.clone(),
            kept,
            dirty: false,
            stale: false,
            encoded: Vec::new(),
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
        slot.encoded.clear();
        if !slot.dirty {
            slot.dirty = true;
            self.dirty.push(number);
        }
        if !slot.stale {
            slot.stale = true;
            self.stale.push(number);
        }
        &mut slot.kept.state
    }

    /// Notes the position of an event that was just folded into an aggregate. Gives a snapshot if
    /// one is due.
    pub(crate) fn passed(
        &mut self,
        number: usize,
        position: Position,
    ) -> Result<Option<(Vec<u8>, IVec)>, TableError> {
        let Slot { subject, kept, .. } = &mut self.slots[number];
        kept.trail.push(position);
        let due = subject.kind().map_or(usize::MAX, snapshot_every);
        if kept.trail.len() < due {
            return Ok(None);
        }
        let Some(key) = keys::snapshot(subject, position) else {
            return Ok(None);
        };
        let row = through_scratch(|scratch| {
            kept.state.encode(scratch)?;
            if let State::Deployment(_) = kept.state {
                append(scratch, &None::<Origin>)?;
            }
            append(scratch, &steps(&kept.trail))?;
            append(scratch, &kept.snapshot)
        })?;
        kept.trail.clear();
        kept.snapshot = position;
        Ok(Some((key, row)))
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

    /// Brings a sum of states up to date with what changed.
    pub(crate) fn add_up(&mut self, sum: &mut Sum) -> Result<(), TableError> {
        for number in self.stale.drain(..) {
            let slot = &mut self.slots[number];
            // Whose row was just written is up to date.
            if !std::mem::take(&mut slot.stale) {
                continue;
            }
            let Slot {
                subject,
                kept,
                dirty,
                encoded,
                ..
            } = slot;
            through_scratch_to(|scratch| {
                kept.state.encode(scratch)?;
                let element = Element::of(subject, scratch);
                sum.replace(kept.element, Some(element));
                kept.element = Some(element);
                if *dirty && scratch.len() <= REMEMBERED {
                    encoded.extend_from_slice(scratch);
                }
                Ok(())
            })?;
        }
        Ok(())
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

impl Slot {
    /// The row of this aggregate, with which its element in a sum of states is brought up to date.
    pub(crate) fn row(&mut self, sum: &mut Sum) -> Result<IVec, TableError> {
        let Self {
            subject,
            kept,
            encoded,
            ..
        } = self;
        let stale = std::mem::take(&mut self.stale);
        through_scratch(|scratch| {
            if encoded.is_empty() {
                kept.state.encode(scratch)?;
            } else {
                scratch.extend_from_slice(&std::mem::take(encoded));
            }
            if stale {
                let element = Element::of(subject, scratch);
                sum.replace(kept.element, Some(element));
                kept.element = Some(element);
            }
            if let State::Deployment(d) = &kept.state {
                append(scratch, &d.origin)?;
            }
            append(scratch, &steps(&kept.trail))?;
            append(scratch, &kept.snapshot)
        })
    }
}

/// Positions as the distances between them, which are short.
fn steps(positions: &[Position]) -> Vec<u64> {
    let before = std::iter::once(0).chain(positions.iter().map(|p| p.0));
    positions.iter().zip(before).map(|(p, b)| p.0 - b).collect()
}

/// Positions from the distances between them.
fn positions(steps: Vec<u64>) -> Vec<Position> {
    let mut at = 0_u64;
    let next = |step| {
        at = at.saturating_add(step);
        Position(at)
    };
    steps.into_iter().map(next).collect()
}

impl Kept {
    /// Reads an aggregate, or makes an empty one. None for an aggregate of a newer version.
    pub(crate) fn load(table: &Table, subject: &Subject) -> Result<Option<Self>, TableError> {
        let Some(key) = keys::state(subject) else {
            return Ok(None);
        };
        match table.get(&key)? {
            Some(row) => Self::decode(subject, &row),
            None => Ok(Self::empty(subject)),
        }
    }

    /// An aggregate before its first event. None for one of a newer version.
    pub(crate) fn empty(subject: &Subject) -> Option<Self> {
        let state = match subject.kind()? {
            AggregateKind::Project => State::Project(Arc::default()),
            AggregateKind::Environment => State::Environment(Arc::default()),
            AggregateKind::Build => State::Build(Arc::default()),
            AggregateKind::Deployment => State::Deployment(Box::default()),
            AggregateKind::Gitops => State::Gitops(Arc::default()),
            AggregateKind::Routing => State::Routing(Arc::default()),
            AggregateKind::Domain => State::Domain(Arc::default()),
            AggregateKind::Subscription => State::Subscription(Arc::default()),
            AggregateKind::Ledger => State::Ledger(Arc::default()),
            AggregateKind::Access => State::Access(Arc::default()),
        };
        Some(Self {
            state,
            trail: Vec::new(),
            snapshot: Position::ZERO,
            element: None,
        })
    }

    /// Reads the row of an aggregate, or a snapshot of it.
    pub(crate) fn decode(subject: &Subject, row: &[u8]) -> Result<Option<Self>, TableError> {
        let Some(kind) = subject.kind() else {
            return Ok(None);
        };
        let mut rest = row;
        let mut state = match kind {
            AggregateKind::Project => State::Project(decode_part(&mut rest)?),
            AggregateKind::Environment => State::Environment(decode_part(&mut rest)?),
            AggregateKind::Build => State::Build(decode_part(&mut rest)?),
            AggregateKind::Gitops => State::Gitops(decode_part(&mut rest)?),
            AggregateKind::Routing => State::Routing(decode_part(&mut rest)?),
            AggregateKind::Domain => State::Domain(decode_part(&mut rest)?),
            AggregateKind::Subscription => State::Subscription(decode_part(&mut rest)?),
            AggregateKind::Ledger => State::Ledger(decode_part(&mut rest)?),
            AggregateKind::Access => State::Access(decode_part(&mut rest)?),
            AggregateKind::Deployment => State::Deployment(Box::new(DeploymentSlot {
                folded: decode_part(&mut rest)?,
                ..DeploymentSlot::default()
            })),
        };
        let folded = &row[..row.len() - rest.len()];
        if let State::Deployment(d) = &mut state {
            d.written = d.folded.state.as_ref().map(Marks::of);
            d.origin = decode_part(&mut rest)?;
        }
        Ok(Some(Self {
            state,
            trail: positions(decode_part(&mut rest)?),
            snapshot: decode_part(&mut rest)?,
            element: Some(Element::of(subject, folded)),
        }))
    }
}

impl State {
    /// What an aggregate in this state contributes to the sum of states.
    pub(crate) fn element(&self, subject: &Subject) -> Result<Element, TableError> {
        through_scratch_to(|scratch| {
            self.encode(scratch)?;
            Ok(Element::of(subject, scratch))
        })
    }

    /// Encodes the folded state.
    fn encode(&self, out: &mut Vec<u8>) -> Result<(), TableError> {
        match self {
            Self::Project(f) => append(out, f),
            Self::Environment(f) => append(out, f),
            Self::Build(f) => append(out, f),
            Self::Deployment(d) => append(out, &d.folded),
            Self::Gitops(f) => append(out, f),
            Self::Routing(f) => append(out, f),
            Self::Domain(f) => append(out, f),
            Self::Subscription(f) => append(out, f),
            Self::Ledger(f) => append(out, f),
            Self::Access(f) => append(out, f),
        }
    }

    /// Folds a stored event, and nothing but it.
    pub(crate) fn replay(&mut self, recorded: &Recorded) {
        let Ok(event) = EventView::from_bytes(&recorded.bytes) else {
            return self.pass(recorded.position);
        };
        let at = At {
            position: recorded.position,
            id: event.id,
            time: event.time,
            trace: event.trace(),
        };
        // An event that is void changes no more than it says itself.
        let _ = match self {
            Self::Project(f) => Arc::make_mut(f).step(at, event.revision, event.payload()),
            Self::Environment(f) => Arc::make_mut(f).step(at, event.revision, event.payload()),
            Self::Build(f) => Arc::make_mut(f).step(at, event.revision, event.payload()),
            Self::Deployment(d) => {
                Arc::make_mut(&mut d.folded).step(at, event.revision, event.payload())
            }
            Self::Gitops(f) => Arc::make_mut(f).step(at, event.revision, event.payload()),
            Self::Routing(f) => Arc::make_mut(f).step(at, event.revision, event.payload()),
            Self::Domain(f) => Arc::make_mut(f).step(at, event.revision, event.payload()),
            Self::Subscription(f) => Arc::make_mut(f).step(at, event.revision, event.payload()),
            Self::Ledger(f) => Arc::make_mut(f).step(at, event.revision, event.payload()),
            Self::Access(f) => Arc::make_mut(f).step(at, event.revision, event.payload()),
        };
    }

    /// What readers get.
    pub(crate) fn share(&self) -> Shared {
        let (mut created, mut source, mut reached) = (None, None, Reached::default());
        let folded: Arc<dyn Any + Send + Sync> = match self {
            Self::Project(f) => f.clone(),
            Self::Environment(f) => f.clone(),
            Self::Build(f) => f.clone(),
            Self::Deployment(d) => {
                if let Some(origin) = &d.origin {
                    created = Some(origin.created);
                    source = origin.source.clone();
                    reached = origin.reached;
                }
                d.folded.clone()
            }
            Self::Gitops(f) => f.clone(),
            Self::Routing(f) => f.clone(),
            Self::Domain(f) => f.clone(),
            Self::Subscription(f) => f.clone(),
            Self::Ledger(f) => f.clone(),
            Self::Access(f) => f.clone(),
        };
        Shared {
            folded,
            created,
            source,
            reached,
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
            Self::Domain(f) => f.position,
            Self::Subscription(f) => f.position,
            Self::Ledger(f) => f.position,
            Self::Access(f) => f.position,
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
            Self::Domain(f) => Arc::make_mut(f).position = position,
            Self::Subscription(f) => Arc::make_mut(f).position = position,
            Self::Ledger(f) => Arc::make_mut(f).position = position,
            Self::Access(f) => Arc::make_mut(f).position = position,
        }
    }
}
