//! The fold: one event after the other into decoded aggregates, and from time to time into rows.
//!
//! What is written is a function of the events alone. Rows of a state are made from the state at
//! the end of a batch, so that an aggregate with many events in a batch is written once; all
//! other rows are made from a single event, whatever batch it is in.

use std::collections::{HashMap, HashSet};

use daybook_events::aggregate::{At, Void};
use daybook_events::envelope::DecodeError;
use daybook_events::gitops::{Change, GitopsEvent};
use daybook_events::routing::RoutingEvent;
use daybook_events::subject::PREFIX;
use daybook_events::{
    Actor, DeploymentId, EnvironmentName, Event, EventId, InstanceRef, Position, ProjectName,
    Subject,
};
use serde::{Deserialize, Serialize};

use crate::audit::{self, AuditRow, VoidView};
use crate::decode::{Content, Decoded, Payload};
use crate::keys::{self, Scope};
use crate::query::EventRef;
use crate::sentence::{Said, say};
use crate::slot::{Marks, Origin, Slot, State};
use crate::store::Counters;
use crate::table::{Batch, Table, TableError, decode, encode, encode_json};
use crate::{history, keys::BLOCK, keys::CHUNK};

/// How many aggregates stay decoded between batches.
const KEPT: usize = 1024;

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

#[derive(Debug, Default)]
pub(crate) struct Fold {
    checkpoint: Checkpoint,
    slots: HashMap<Subject, Slot>,
    /// Number of the batch, for knowing which aggregates are in use.
    batch: u64,
    /// The audit's last chunk, which is not full.
    tail: Vec<AuditRow>,
    /// How many rows of the tail are in the table.
    tail_written: usize,
    /// The terms of the full chunks in the last block, which is not full.
    terms: Vec<u32>,
    /// Rows that are finished, but not yet written.
    rows: Batch,
    /// What of those must not be written twice.
    deployments: HashSet<DeploymentId>,
    requests: HashSet<EventId>,
}

/// What an event of one aggregate means for the rows of others.
#[derive(Default)]
struct Effects {
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
        let mut tail = Vec::new();
        let full = checkpoint.position.0 / CHUNK * CHUNK;
        for position in full + 1..=checkpoint.position.0 {
            let row = table
                .get(&keys::audit(Position(position)))?
                .ok_or_else(|| TableError::Row(format!("no audit of event {position}")))?;
            tail.push(decode(&row)?);
        }
        let mut terms = Vec::new();
        let chunks = full / CHUNK;
        for chunk in chunks / BLOCK * BLOCK..chunks {
            let row = table
                .get(&keys::chunk(chunk))?
                .ok_or_else(|| TableError::Row(format!("no chunk {chunk} of the audit")))?;
            audit::add_terms(&mut terms, &decode::<Vec<AuditRow>>(&row)?);
        }
        Ok(Self {
            checkpoint,
            tail_written: tail.len(),
            tail,
            terms,
            ..Self::default()
        })
    }

    pub(crate) fn checkpoint(&self) -> Checkpoint {
        self.checkpoint
    }

    fn slot(&mut self, table: &Table, subject: &Subject) -> Result<Option<&mut Slot>, TableError> {
        if !self.slots.contains_key(subject) {
            let Some(state) = State::load(table, subject)? else {
                return Ok(None);
            };
            let slot = Slot {
                state,
                dirty: false,
                touched: self.batch,
            };
            self.slots.insert(subject.clone(), slot);
        }
        let mut slot = self.slots.get_mut(subject);
        if let Some(slot) = &mut slot {
            slot.touched = self.batch;
        }
        Ok(slot)
    }

    /// Folds one event. One that was folded before is passed over.
    pub(crate) fn apply(&mut self, table: &Table, event: Decoded) -> Result<(), FoldError> {
        let position = event.position;
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
        let row = match event.content {
            Ok(content) => self.take(table, position, &event.subject, content)?,
            Err(error) => {
                if let Some(slot) = self.slot(table, &event.subject)? {
                    slot.state.pass(position);
                    slot.dirty = true;
                }
                self.checkpoint.counters.unreadable += 1;
                unreadable(position, &event.subject, event.stored_at, &error)
            }
        };
        self.checkpoint.position = position;
        self.checkpoint.counters.events += 1;
        self.audit(row)?;
        Ok(())
    }

    fn take(
        &mut self,
        table: &Table,
        position: Position,
        subject: &Subject,
        content: Content,
    ) -> Result<AuditRow, FoldError> {
        let Content { event, payload } = content;
        let at = At {
            position,
            id: event.id,
            time: event.time,
        };
        let mut effects = Effects::default();
        let mut created = None;
        let slot = self.slot(table, subject)?;
        let said = say(subject, &payload, slot.as_ref().map(|s| &s.state));
        let folded = match slot {
            None => Err(Void::Unknown(event.short_kind().to_owned())),
            Some(slot) => {
                slot.dirty = true;
                let revision = event.revision;
                match (&mut slot.state, payload) {
                    (State::Project(f), Payload::Project(p)) => f.step(at, revision, p),
                    (State::Environment(f), Payload::Environment(p)) => f.step(at, revision, p),
                    (State::Build(f), Payload::Build(p)) => f.step(at, revision, p),
                    (State::Deployment(d), Payload::Deployment(p)) => {
                        let result = d.folded.step(at, revision, p);
                        if let (Some(state), None) = (&d.folded.state, &d.origin) {
                            created = Some(state.request.instance.clone());
                            d.origin = Some(Origin {
                                created: position,
                                actor: event.actor(),
                                message: None,
                            });
                        }
                        result
                    }
                    (State::Gitops(f), Payload::Gitops(p)) => {
                        effects.introduced = introduced(subject, p.as_ref().ok());
                        f.step(at, revision, p)
                    }
                    (State::Routing(f), Payload::Routing(p)) => {
                        let instance = switched(p.as_ref().ok());
                        let main = |f: &daybook_events::Folded<_>| main_in(f, instance.as_ref());
                        let before = main(f);
                        let result = f.step(at, revision, p);
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
                    // A slot is made for its subject, and so is a payload.
                    _ => Err(Void::Unknown(event.short_kind().to_owned())),
                }
            }
        };
        match &folded {
            Ok(()) => {
                if let Subject::Build(project, id) = subject {
                    let key = keys::build(*id, project);
                    if event.revision == 1 {
                        self.rows.push((key, Some(Vec::new())));
                    }
                }
                self.follow(table, effects)?;
            }
            Err(Void::Unknown(_)) => self.checkpoint.counters.unknown += 1,
            Err(Void::Unreadable(_)) => self.checkpoint.counters.unreadable += 1,
            Err(_) => self.checkpoint.counters.void += 1,
        }
        if let (Some(instance), Some(id)) = (created, said.deployment) {
            self.list(table, &instance, id, position)?;
        }
        self.note_request(table, position, subject, &event)?;
        Ok(audited(position, subject, event, said, folded.err()))
    }

    /// Marks what an event changes beyond its own aggregate.
    fn follow(&mut self, table: &Table, effects: Effects) -> Result<(), TableError> {
        if let Some((subject, message)) = effects.introduced
            && let Some(slot) = self.slot(table, &subject)?
            && let State::Deployment(d) = &mut slot.state
            && let Some(origin) = &mut d.origin
        {
            origin.message = Some(message);
            slot.dirty = true;
        }
        for subject in effects.main_changed {
            if let Some(slot) = self.slot(table, &subject)? {
                slot.dirty = slot.state.position() > Position::ZERO;
            }
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
            self.rows.push((key, Some(value.clone())));
        }
        // Should two projects ever use the same id, it means the first one.
        let key = keys::deployment(id);
        if self.deployments.insert(id) && table.get(&key)?.is_none() {
            let place = (created, instance.to_string());
            self.rows.push((key, Some(encode(&place)?)));
        }
        Ok(())
    }

    /// Remembers a request that carried an idempotency key.
    fn note_request(
        &mut self,
        table: &Table,
        position: Position,
        subject: &Subject,
        event: &Event,
    ) -> Result<(), TableError> {
        let Some(digest) = &event.requestdigest else {
            return Ok(());
        };
        let key = keys::request(event.id);
        if self.requests.insert(event.id) && table.get(&key)?.is_none() {
            let row = EventRef::row(position, subject, digest, event.correlationid);
            self.rows.push((key, Some(encode(&row)?)));
        }
        Ok(())
    }

    fn audit(&mut self, row: AuditRow) -> Result<(), TableError> {
        let chunk = keys::chunk_of(row.position);
        self.tail.push(row);
        if self.tail.len() as u64 == CHUNK {
            for row in &self.tail[..self.tail_written] {
                self.rows.push((keys::audit(row.position), None));
            }
            self.rows
                .push((keys::chunk(chunk), Some(encode(&self.tail)?)));
            audit::add_terms(&mut self.terms, &self.tail);
            if (chunk + 1).is_multiple_of(BLOCK) {
                let terms = audit::terms_row(&self.terms);
                self.rows.push((keys::terms(chunk / BLOCK), Some(terms)));
                self.terms.clear();
            }
            self.tail.clear();
            self.tail_written = 0;
        }
        Ok(())
    }

    /// Takes the rows that bring the table to [`Self::checkpoint`].
    pub(crate) fn rows(&mut self, table: &Table) -> Result<Batch, TableError> {
        let dirty: Vec<Subject> = self
            .slots
            .iter()
            .filter(|(_, slot)| slot.dirty)
            .map(|(subject, _)| subject.clone())
            .collect();
        for subject in dirty {
            self.write_state(table, &subject)?;
        }
        for row in &self.tail[self.tail_written..] {
            self.rows
                .push((keys::audit(row.position), Some(encode(row)?)));
        }
        self.tail_written = self.tail.len();
        self.rows
            .push((keys::CHECKPOINT.to_vec(), Some(encode(&self.checkpoint)?)));
        self.deployments.clear();
        self.requests.clear();
        if self.slots.len() > KEPT {
            let batch = self.batch;
            self.slots.retain(|_, slot| slot.touched == batch);
            if self.slots.len() > KEPT {
                self.slots.clear();
            }
        }
        self.batch += 1;
        Ok(std::mem::take(&mut self.rows))
    }

    fn write_state(&mut self, table: &Table, subject: &Subject) -> Result<(), TableError> {
        let main = match self.slots.get(subject).map(|s| &s.state) {
            Some(State::Deployment(d)) => match &d.folded.state {
                Some(state) => {
                    let instance = state.request.instance.clone();
                    self.main_of(table, &instance)?
                }
                None => None,
            },
            _ => None,
        };
        let (Some(slot), Some(key)) = (self.slots.get_mut(subject), keys::state(subject)) else {
            return Ok(());
        };
        slot.dirty = false;
        self.rows.push((key, Some(slot.state.encode()?)));
        if let State::Deployment(d) = &mut slot.state
            && let Subject::Deployment(_, _, id) = subject
            && let (Some(state), Some(origin)) = (&d.folded.state, &d.origin)
        {
            let history = history::row(*id, state, origin, main == Some(*id));
            let json = encode_json(&history)?;
            self.rows.push((keys::history(origin.created), Some(json)));
            let marks = Marks::of(state);
            let before = d.written.replace(marks).unwrap_or_default();
            if marks.active != before.active {
                let instance = &state.request.instance;
                for scope in scopes(instance) {
                    let key = keys::active(scope, origin.created);
                    let value = marks.active.then(|| listed_value(*id, instance));
                    self.rows.push((key, value));
                }
            }
            if marks.waits_for != before.waits_for {
                if let Some(build) = before.waits_for {
                    self.rows.push((keys::waiting(build, *id), None));
                }
                if let Some(build) = marks.waits_for {
                    self.rows
                        .push((keys::waiting(build, *id), Some(Vec::new())));
                }
            }
        }
        Ok(())
    }

    fn main_of(
        &mut self,
        table: &Table,
        instance: &InstanceRef,
    ) -> Result<Option<DeploymentId>, TableError> {
        let routing = Subject::Routing(instance.project.clone());
        Ok(match self.slot(table, &routing)?.map(|s| &s.state) {
            Some(State::Routing(f)) => main_in(f, Some(instance)),
            _ => None,
        })
    }
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

/// Project and environment as the subject names them, of any version.
fn places(subject: &Subject) -> (Option<ProjectName>, Option<EnvironmentName>) {
    match subject {
        Subject::Other(text) => {
            let mut tokens = text.split('.').skip(2);
            let project = tokens.next().and_then(|p| ProjectName::parse(p).ok());
            let environment = tokens.next().and_then(|e| EnvironmentName::parse(e).ok());
            (project, environment)
        }
        known => (known.project().cloned(), known.environment().cloned()),
    }
}

fn subject_text(subject: &Subject) -> String {
    let text = subject.to_string();
    text.strip_prefix(PREFIX)
        .map_or(text.as_str(), |s| s.trim_start_matches('.'))
        .replace('.', "/")
}

fn audited(
    position: Position,
    subject: &Subject,
    event: Event,
    said: Said,
    void: Option<Void>,
) -> AuditRow {
    let (project, environment) = places(subject);
    AuditRow {
        position,
        id: Some(event.id),
        time: event.time,
        recorded: event.recordedtime,
        kind: event.short_kind().to_owned(),
        subject: subject_text(subject),
        revision: event.revision,
        project,
        environment: said.environment.or(environment),
        service: said.service,
        deployment: said.deployment,
        summary: said.summary,
        reason: said.reason,
        cause: event.causationid,
        correlation: Some(event.correlationid),
        void: void.as_ref().map(VoidView::from),
        actor: Actor {
            kind: event.authtype,
            id: event.authid,
        },
    }
}

fn unreadable(
    position: Position,
    subject: &Subject,
    stored_at: jiff::Timestamp,
    error: &DecodeError,
) -> AuditRow {
    let (project, environment) = places(subject);
    let deployment = match subject {
        Subject::Deployment(_, _, id) => Some(*id),
        _ => None,
    };
    AuditRow {
        position,
        id: None,
        time: stored_at,
        recorded: stored_at,
        actor: Actor::unauthenticated("unknown"),
        kind: "unreadable".to_owned(),
        subject: subject_text(subject),
        revision: 0,
        project,
        environment,
        service: None,
        deployment,
        summary: "An event that cannot be read was set aside.".to_owned(),
        reason: None,
        cause: None,
        correlation: None,
        void: Some(VoidView::from(error)),
    }
}
