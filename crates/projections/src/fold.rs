//! The fold: one event after the other into decoded aggregates, and from time to time into rows.
//!
//! What is written is a function of the events alone. Rows of a state are made from the state at
//! the end of a batch, so that an aggregate with many events in a batch is written once; all
//! other rows are made from a single event, whatever batch it is in.

use std::collections::{BTreeSet, HashSet};
use std::ops::ControlFlow;
use std::sync::Arc;

use daybook_events::aggregate::{At, Void};
use daybook_events::deployment::Requested;
use daybook_events::envelope::DecodeError;
use daybook_events::gitops::{Change, GitopsEvent};
use daybook_events::routing::RoutingEvent;
use daybook_events::{
    Actor, AnyPayload, DeploymentId, EventId, EventView, InstanceRef, Position, Recorded, Subject,
};
use serde::{Deserialize, Serialize};
use sled::IVec;

use crate::audit::VoidView;
use crate::chunk;
use crate::history;
use crate::keys::{self, BLOCK, CHUNK, LISTED, MARK, Scope};
use crate::query::EventRef;
use crate::reached::Reached;
use crate::sentence::say;
use crate::slot::{DeploymentSlot, Marks, Origin, Shared, Slots, State, is_active};
use crate::state_hash::{StateHash, Sum};
use crate::store::Counters;
use crate::table::{Batch, Table, TableError, Way, Write, decode, encode, encode_json};
use crate::terms;

/// Why an event could not be folded. The fold is to be loaded anew then.
#[derive(Debug, thiserror::Error)]
pub(crate) enum FoldError {
    #[error(transparent)]
    Table(#[from] TableError),
    #[error("event {found} came where {expected} was due")]
    Gap { expected: Position, found: Position },
}

/// How far the rows are.
#[derive(Debug, Clone, Copy, Default, Serialize, Deserialize)]
pub(crate) struct Checkpoint {
    pub(crate) position: Position,
    pub(crate) counters: Counters,
}

/// What a batch of events did to the aggregates that are kept decoded.
#[derive(Default)]
pub(crate) struct Changed {
    /// The ones that changed, as they are now.
    pub(crate) states: Vec<(Subject, Option<Shared>)>,
    /// The ones that are only in rows from here on.
    pub(crate) forgotten: Vec<Subject>,
}

#[derive(Debug, Default)]
pub(crate) struct Fold {
    checkpoint: Checkpoint,
    slots: Slots,
    /// The audit's last chunk, which is not full.
    audit: chunk::Writer,
    /// The terms of the full chunks in the last block, which is not full.
    terms: Vec<u32>,
    /// What an event says, while it is being folded.
    summary: String,
    /// The sum over all states, as they were when it was last brought up to date.
    sum: Sum,
    /// The last position, if the sum is to be kept there: should the rows of the states be written
    /// there too, they are encoded once for both.
    due: Option<Position>,
    /// The active deployments, by the positions of their requests.
    active: BTreeSet<Position>,
    /// The last position at which those were written down.
    listed: Position,
    /// Rows that are finished, but not yet written.
    rows: Batch,
    /// What of those must not be written twice.
    deployments: HashSet<DeploymentId>,
    requests: HashSet<EventId>,
}

/// What an event of one aggregate means for the rows of others.
#[derive(Default)]
struct Effects {
    /// A deployment of this instance was made.
    created: Option<InstanceRef>,
    /// The deployment that was requested at this position became active, or no longer is.
    active: Option<(Position, bool)>,
    /// A GitOps commit introduced a deployment.
    introduced: Option<(Subject, String)>,
    /// Deployments that became the main one, or no longer are.
    main_changed: Vec<Subject>,
}

impl Fold {
    /// The fold that goes on where the rows end.
    pub(crate) fn load(table: &Table) -> Result<Self, TableError> {
        let checkpoint: Checkpoint = match table.get(keys::CHECKPOINT)? {
            Some(row) => decode(&row)?,
            None => Checkpoint::default(),
        };
        let mut fold = Self {
            checkpoint,
            ..Self::default()
        };
        if checkpoint.position > Position::ZERO {
            let last = keys::chunk_of(checkpoint.position);
            for chunk in last / BLOCK * BLOCK..=last {
                let row = table
                    .get(&keys::chunk(chunk))?
                    .ok_or_else(|| TableError::Row(format!("no chunk {chunk} of the audit")))?;
                fold.audit = chunk::Writer::resume(&row, keys::first_of(chunk))?;
                fold.turn();
            }
            let expected = checkpoint.position.0 % CHUNK;
            if fold.audit.rows() as u64 != expected {
                return Err(TableError::Row(format!(
                    "the end of chunk {last} of the audit"
                )));
            }
            let sum = table
                .get(keys::SUM)?
                .ok_or_else(|| TableError::Row("no sum of states".to_owned()))?;
            fold.sum = Sum::from_bytes(&sum)?;
        }
        table.scan::<()>(&Scope::All.active(), None, Way::Up, |key, _| {
            fold.active.extend(keys::position_of(key));
            ControlFlow::Continue(())
        })?;
        let listed = table.scan(b"o", None, Way::Down, |key, _| {
            ControlFlow::Break(keys::position_of(key))
        })?;
        fold.listed = listed.flatten().unwrap_or_default();
        Ok(fold)
    }

    pub(crate) fn checkpoint(&self) -> Checkpoint {
        self.checkpoint
    }

    /// Folds one event. One that was folded before is passed over.
    pub(crate) fn apply(&mut self, table: &Table, recorded: &Recorded) -> Result<(), FoldError> {
        let position = recorded.position;
        if position <= self.checkpoint.position {
            return Ok(());
        }
        let expected = self.checkpoint.position.next();
        if position != expected {
            return Err(FoldError::Gap {
                expected,
                found: position,
            });
        }
        self.keep_sum()?;
        match EventView::from_bytes(&recorded.bytes) {
            Ok(event) => self.take(table, recorded, &event)?,
            Err(error) => self.set_aside(table, recorded, &error)?,
        }
        self.checkpoint.position = position;
        self.checkpoint.counters.events += 1;
        self.end_row(position);
        self.mark(position)?;
        Ok(())
    }

    /// Writes down, from time to time, what past states are found by.
    fn mark(&mut self, position: Position) -> Result<(), TableError> {
        if position.0.is_multiple_of(MARK) {
            self.due = Some(position);
        }
        // The more there are, the less often: what is written for an event stays bounded.
        let often = LISTED.max(8 * self.active.len() as u64);
        if position.0 - self.listed.0 >= often {
            let active: Vec<u64> = self.active.iter().map(|p| p.0).collect();
            put(
                &mut self.rows,
                keys::were_active(position),
                encode(&active)?,
            );
            self.listed = position;
        }
        Ok(())
    }

    /// Keeps the sum over all states, if that is due.
    fn keep_sum(&mut self) -> Result<(), TableError> {
        if let Some(position) = self.due.take() {
            self.slots.add_up(&mut self.sum)?;
            put(&mut self.rows, keys::sum(position), self.sum.to_bytes());
        }
        Ok(())
    }

    /// The state hash at [`Self::checkpoint`], once its rows are taken.
    pub(crate) fn state_hash(&self) -> StateHash {
        self.sum.hash()
    }

    /// Notes that an event was folded into an aggregate.
    fn passed(&mut self, slot: usize, position: Position) -> Result<(), TableError> {
        if let Some((key, snapshot)) = self.slots.passed(slot, position)? {
            put(&mut self.rows, key, snapshot);
        }
        Ok(())
    }

    /// Notes an event that cannot be read.
    fn set_aside(
        &mut self,
        table: &Table,
        recorded: &Recorded,
        error: &DecodeError,
    ) -> Result<(), FoldError> {
        if let Some(slot) = self.slots.find(table, &recorded.subject)? {
            self.slots.change(slot).pass(recorded.position);
            self.passed(slot, recorded.position)?;
        }
        self.checkpoint.counters.unreadable += 1;
        let actor = Actor::unauthenticated("unknown");
        self.audit.begin(chunk::Row {
            id: None,
            time: recorded.stored_at,
            recorded: recorded.stored_at,
            actor: (&actor.kind, &actor.id),
            kind: "unreadable",
            subject: &recorded.subject,
            revision: 0,
            environment: None,
            service: None,
            deployment: None,
            summary: "An event that cannot be read was set aside.",
            reason: None,
            cause: None,
            correlation: None,
        });
        self.audit.end(Some(&VoidView::from(error)));
        Ok(())
    }

    fn take(
        &mut self,
        table: &Table,
        recorded: &Recorded,
        event: &EventView<'_>,
    ) -> Result<(), FoldError> {
        let (position, subject) = (recorded.position, &recorded.subject);
        let at = At {
            position,
            id: event.id,
            time: event.time,
            trace: event.trace(),
        };
        let payload = AnyPayload::of(subject.kind(), event);
        let slot = self.slots.find(table, subject)?;
        let before = slot.map(|number| &self.slots.get(number).kept.state);
        let said = say(&mut self.summary, subject, &payload, before);
        self.audit.begin(chunk::Row {
            id: Some(event.id),
            time: event.time,
            recorded: event.recordedtime,
            actor: (&event.authtype, &event.authid),
            kind: event.short_kind(),
            subject,
            revision: event.revision,
            environment: said.environment,
            service: said.service,
            deployment: said.deployment,
            summary: &self.summary,
            reason: said.reason,
            cause: event.causationid,
            correlation: Some(event.correlationid),
        });
        let mut effects = Effects::default();
        let revision = event.revision;
        let folded = match slot.map(|number| (self.slots.change(number), payload)) {
            Some((State::Project(f), AnyPayload::Project(p))) => {
                Arc::make_mut(f).step(at, revision, p)
            }
            Some((State::Environment(f), AnyPayload::Environment(p))) => {
                Arc::make_mut(f).step(at, revision, p)
            }
            Some((State::Build(f), AnyPayload::Build(p))) => Arc::make_mut(f).step(at, revision, p),
            Some((State::Deployment(d), AnyPayload::Deployment(p))) => {
                let active = |d: &DeploymentSlot| {
                    let state = d.folded.state.as_ref();
                    state.is_some_and(|s| is_active(s.status))
                };
                let before = active(d);
                let result = Arc::make_mut(&mut d.folded).step(at, revision, p);
                if let (Some(state), None) = (&d.folded.state, &d.origin) {
                    effects.created = Some(state.request.instance.clone());
                    d.origin = Some(Origin {
                        created: position,
                        actor: event.actor(),
                        message: None,
                        source: None,
                        reached: Reached::default(),
                    });
                }
                if let (Some(state), Some(origin)) = (&d.folded.state, &mut d.origin) {
                    origin.reached.note(state, event.time);
                }
                if let (Some(origin), true) = (&d.origin, active(d) != before) {
                    effects.active = Some((origin.created, !before));
                }
                result
            }
            Some((State::Gitops(f), AnyPayload::Gitops(p))) => {
                effects.introduced = introduced(subject, p.as_ref().ok());
                Arc::make_mut(f).step(at, revision, p)
            }
            Some((State::Routing(f), AnyPayload::Routing(p))) => {
                let instance = switched(p.as_ref().ok());
                let main = |f: &daybook_events::Folded<_>| main_in(f, instance.as_ref());
                let before = main(f);
                let result = Arc::make_mut(f).step(at, revision, p);
                let after = main(f);
                if let (Some(instance), true) = (&instance, before != after) {
                    effects.main_changed = [before, after]
                        .into_iter()
                        .flatten()
                        .map(|d| deployment_of(instance, d))
                        .collect();
                }
                result
            }
            Some((State::Domain(f), AnyPayload::Domain(p))) => {
                Arc::make_mut(f).step(at, revision, p)
            }
            Some((State::Subscription(f), AnyPayload::Subscription(p))) => {
                Arc::make_mut(f).step(at, revision, p)
            }
            Some((State::Ledger(f), AnyPayload::Ledger(p))) => {
                Arc::make_mut(f).step(at, revision, p)
            }
            Some((State::Access(f), AnyPayload::Access(p))) => {
                Arc::make_mut(f).step(at, revision, p)
            }
            // A slot is made for its subject, and so is a payload.
            Some(_) | None => Err(Void::Unknown(event.short_kind().to_owned())),
        };
        match &folded {
            Ok(()) => {
                if let (Subject::Subscription(project, id), 1) = (subject, revision) {
                    let name = project.as_str().as_bytes();
                    put(&mut self.rows, keys::subscription(*id), name);
                }
                if let (Subject::Build(project, id), 1) = (subject, revision) {
                    put(&mut self.rows, keys::build(*id, project), IVec::default());
                }
            }
            Err(Void::Unknown(_)) => self.checkpoint.counters.unknown += 1,
            Err(Void::Unreadable(_)) => self.checkpoint.counters.unreadable += 1,
            Err(_) => self.checkpoint.counters.void += 1,
        }
        self.audit
            .end(folded.as_ref().err().map(VoidView::from).as_ref());
        if let Some(slot) = slot {
            self.passed(slot, position)?;
        }
        match effects.active {
            Some((created, true)) => drop(self.active.insert(created)),
            Some((created, false)) => drop(self.active.remove(&created)),
            None => {}
        }
        if let (Some(instance), Subject::Deployment(_, _, id)) = (&effects.created, subject) {
            self.list(table, instance, *id, position)?;
            self.inherit(table, slot, instance)?;
        }
        if folded.is_ok() {
            self.follow(table, position, effects)?;
        }
        self.note_request(table, position, subject, event)?;
        Ok(())
    }

    /// Marks what an event changes beyond its own aggregate.
    fn follow(
        &mut self,
        table: &Table,
        position: Position,
        effects: Effects,
    ) -> Result<(), TableError> {
        if let Some((subject, message)) = effects.introduced
            && let Some(slot) = self.slots.find(table, &subject)?
            && let State::Deployment(d) = &self.slots.get(slot).kept.state
            && d.origin.as_ref().is_some_and(|o| o.message.is_none())
            && let State::Deployment(d) = self.slots.change(slot)
            && let Some(origin) = &mut d.origin
        {
            origin.message = Some((position, message));
        }
        for subject in effects.main_changed {
            if let Some(slot) = self.slots.find(table, &subject)?
                && self.slots.get(slot).kept.state.position() > Position::ZERO
            {
                self.slots.change(slot);
            }
        }
        Ok(())
    }

    /// Notes what a new deployment was made from, if its image is that of another one.
    fn inherit(
        &mut self,
        table: &Table,
        slot: Option<usize>,
        instance: &InstanceRef,
    ) -> Result<(), TableError> {
        let before = slot.and_then(|slot| match &self.slots.get(slot).kept.state {
            State::Deployment(d) => image_of(&d.folded.state.as_ref()?.request, instance),
            _ => None,
        });
        let (Some(slot), Some(before)) = (slot, before) else {
            return Ok(());
        };
        let source = match self.slots.find(table, &before)? {
            Some(found) => match &self.slots.get(found).kept.state {
                State::Deployment(d) => d.source().cloned(),
                _ => None,
            },
            None => None,
        };
        if source.is_some()
            && let State::Deployment(d) = self.slots.change(slot)
            && let Some(origin) = &mut d.origin
        {
            origin.source = source;
        }
        Ok(())
    }

    /// The index rows of a new deployment.
    fn list(
        &mut self,
        table: &Table,
        instance: &InstanceRef,
        id: DeploymentId,
        created: Position,
    ) -> Result<(), TableError> {
        let value = listed_value(id, instance);
        for scope in scopes(instance) {
            let key = keys::listed(scope, created);
            put(&mut self.rows, key, value.as_slice());
        }
        // Should two projects ever use the same id, it means the first one.
        let key = keys::deployment(id);
        if self.deployments.insert(id) && table.get(&key)?.is_none() {
            let place = (created, instance.to_string());
            put(&mut self.rows, key, encode(&place)?);
        }
        Ok(())
    }

    /// Remembers a request that carried an idempotency key.
    fn note_request(
        &mut self,
        table: &Table,
        position: Position,
        subject: &Subject,
        event: &EventView<'_>,
    ) -> Result<(), TableError> {
        let Some(digest) = &event.requestdigest else {
            return Ok(());
        };
        let key = keys::request(event.id);
        if self.requests.insert(event.id) && table.get(&key)?.is_none() {
            let row = EventRef::row(position, subject, digest, event.correlationid);
            put(&mut self.rows, key, encode(&row)?);
        }
        Ok(())
    }

    /// Ends the audit's row of an event, and with it perhaps a chunk.
    fn end_row(&mut self, position: Position) {
        if self.audit.rows() as u64 == CHUNK {
            let chunk = keys::chunk_of(position);
            put(&mut self.rows, keys::chunk(chunk), self.audit.bytes());
            self.turn();
            if (chunk + 1).is_multiple_of(BLOCK) {
                let terms = terms::row(&mut self.terms);
                put(&mut self.rows, keys::terms(chunk / BLOCK), terms);
            }
        }
    }

    /// Begins the next chunk if this one is full.
    fn turn(&mut self) {
        if self.audit.rows() as u64 == CHUNK {
            self.audit.turn(&mut self.terms);
        }
    }

    /// Takes the rows that bring the table to [`Self::checkpoint`], and what became of the
    /// aggregates: with their states, if they are to be shared.
    pub(crate) fn finish(
        &mut self,
        table: &Table,
        shared: bool,
    ) -> Result<(Batch, Changed), TableError> {
        let mut changed = Changed::default();
        for number in self.slots.take_dirty() {
            self.write_state(table, number)?;
            let slot = self.slots.get(number);
            let shared = shared.then(|| slot.kept.state.share());
            changed.states.push((slot.subject.clone(), shared));
        }
        if self.audit.rows() > 0 {
            let chunk = keys::chunk_of(self.checkpoint.position);
            put(&mut self.rows, keys::chunk(chunk), self.audit.bytes());
        }
        self.keep_sum()?;
        self.slots.add_up(&mut self.sum)?;
        put(&mut self.rows, keys::SUM, self.sum.to_bytes());
        put(&mut self.rows, keys::CHECKPOINT, encode(&self.checkpoint)?);
        self.deployments.clear();
        self.requests.clear();
        changed.forgotten = self.slots.end_batch();
        Ok((std::mem::take(&mut self.rows), changed))
    }

    fn write_state(&mut self, table: &Table, number: usize) -> Result<(), TableError> {
        let main = match &self.slots.get(number).kept.state {
            State::Deployment(d) => match &d.folded.state {
                Some(state) => {
                    let project = state.request.instance.project.clone();
                    let routing = self.slots.find(table, &Subject::Routing(project))?;
                    self.main_of(routing, number)
                }
                None => None,
            },
            _ => None,
        };
        let slot = self.slots.settle(number);
        let Some(key) = keys::state(&slot.subject) else {
            return Ok(());
        };
        put(&mut self.rows, key, slot.row(&mut self.sum)?);
        if let State::Deployment(d) = &mut slot.kept.state
            && let Subject::Deployment(_, _, id) = &slot.subject
            && let (Some(state), Some(origin)) = (&d.folded.state, &d.origin)
        {
            let history = history::row(*id, state, origin, main == Some(*id));
            let json = encode_json(&history)?;
            put(&mut self.rows, keys::history(origin.created), json);
            let marks = Marks::of(state);
            let before = d.written.replace(marks).unwrap_or_default();
            if marks.active != before.active {
                let instance = &state.request.instance;
                for scope in scopes(instance) {
                    let key = keys::active(scope, origin.created);
                    if marks.active {
                        put(&mut self.rows, key, listed_value(*id, instance));
                    } else {
                        withdraw(&mut self.rows, key);
                    }
                }
            }
            if marks.waits_for != before.waits_for {
                if let Some(build) = before.waits_for {
                    remove(&mut self.rows, keys::waiting(build, *id));
                }
                if let Some(build) = marks.waits_for {
                    put(&mut self.rows, keys::waiting(build, *id), IVec::default());
                }
            }
            if marks.due != before.due {
                if let Some(due) = before.due {
                    remove(&mut self.rows, keys::timer(due, *id));
                }
                if let Some(due) = marks.due {
                    put(&mut self.rows, keys::timer(due, *id), IVec::default());
                }
            }
            if marks.undecided != before.undecided {
                let key = keys::undecided(&state.request.instance.project, *id);
                if marks.undecided {
                    put(&mut self.rows, key, IVec::default());
                } else {
                    remove(&mut self.rows, key);
                }
            }
        }
        Ok(())
    }

    /// The main deployment of a deployment's instance.
    fn main_of(&self, routing: Option<usize>, deployment: usize) -> Option<DeploymentId> {
        let State::Routing(routing) = &self.slots.get(routing?).kept.state else {
            return None;
        };
        let State::Deployment(d) = &self.slots.get(deployment).kept.state else {
            return None;
        };
        main_in(
            routing,
            d.folded.state.as_ref().map(|s| &s.request.instance),
        )
    }
}

fn put(rows: &mut Batch, key: impl Into<IVec>, value: impl Into<IVec>) {
    rows.push((key.into(), Write::Put(value.into())));
}

fn remove(rows: &mut Batch, key: impl Into<IVec>) {
    rows.push((key.into(), Write::Remove));
}

/// Removes a row that was written once.
fn withdraw(rows: &mut Batch, key: impl Into<IVec>) {
    rows.push((key.into(), Write::Withdraw));
}

fn scopes(instance: &InstanceRef) -> [Scope<'_>; 4] {
    [
        Scope::All,
        Scope::Project(&instance.project),
        Scope::Environment(&instance.project, &instance.environment),
        Scope::Instance(instance),
    ]
}

/// The value of an index row: the deployment's id, and its instance as text.
fn listed_value(id: DeploymentId, instance: &InstanceRef) -> Vec<u8> {
    [id.0.as_bytes(), instance.to_string().as_bytes()].concat()
}

/// The subject of a deployment of an instance.
pub(crate) fn deployment_of(instance: &InstanceRef, id: DeploymentId) -> Subject {
    Subject::Deployment(instance.project.clone(), instance.environment.clone(), id)
}

/// The deployment whose image a deployment of this instance has, where it was not built for it.
fn image_of(request: &Requested, instance: &InstanceRef) -> Option<Subject> {
    if let Some(before) = request.redeploy_of {
        return Some(deployment_of(instance, before));
    }
    let from = request.promoted_from.as_ref()?;
    let elsewhere = InstanceRef {
        environment: from.environment.clone(),
        ..instance.clone()
    };
    Some(deployment_of(&elsewhere, from.deployment))
}

fn introduced(subject: &Subject, event: Option<&GitopsEvent>) -> Option<(Subject, String)> {
    let Some(GitopsEvent::Committed(e)) = event else {
        return None;
    };
    let Change::Deploy { deployment, .. } = e.change else {
        return None;
    };
    let project = subject.project()?.clone();
    let subject = Subject::Deployment(project, e.environment.clone(), deployment);
    Some((subject, e.message.clone()))
}

fn switched(event: Option<&RoutingEvent>) -> Option<InstanceRef> {
    match event {
        Some(RoutingEvent::Switched(e)) => Some(e.instance.clone()),
        _ => None,
    }
}

fn main_in(
    folded: &daybook_events::Folded<daybook_events::routing::Routing>,
    instance: Option<&InstanceRef>,
) -> Option<DeploymentId> {
    folded.state.as_ref()?.traffic(instance?)?.main
}
