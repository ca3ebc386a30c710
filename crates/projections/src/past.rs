//! The past: what queries would have answered at a position, or at a time.
//!
//! Nothing is folded from the first event. The projections keep, for each aggregate, snapshots of
//! it and the positions of its events from one to the next; a past state is the newest snapshot
//! before it and the few events in between, read from the log. Which deployments were active is
//! written down from time to time, and those requested since are looked at too.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fmt;
use std::ops::ControlFlow;
use std::str::FromStr;
use std::sync::Arc;

use daybook_events::deployment::Deployment;
use daybook_events::log::ReadError;
use daybook_events::routing::Routing;
use daybook_events::{
    DeploymentId, EnvironmentName, EventLog, Folded, InstanceRef, Position, ProjectName, Recorded,
    Subject, SubjectFilter,
};
use futures_util::{StreamExt, TryStreamExt, stream};
use jiff::Timestamp;
use tokio::task::JoinSet;

use crate::chunk;
use crate::fold::deployment_of;
use crate::history;
use crate::keys::{self, MARK, Scope};
use crate::ledger::Ledger;
use crate::page::{Cursor, Page, PageOf};
use crate::query::{DeploymentFilter, DeploymentRow, listed, overview_of};
use crate::slot::{Kept, Origin, State, is_active};
use crate::state_hash::{Element, StateHash, Sum};
use crate::store::{Projections, QueryError, lock};
use crate::table::{TableError, Way, decode};
use crate::views::{HistoryRow, Overview};

/// How many tasks work a state hash out, and how many aggregates each takes at a time.
const SHARES: usize = 4;
const PIECE: usize = 64;

/// How many events are asked for at once.
const IN_FLIGHT: usize = 128;

/// How many past state hashes are remembered.
const REMEMBERED: usize = 1024;

/// A moment of the ledger's past.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Moment {
    /// After the event at this position, and before the next one.
    At(Position),
    /// Before the first event that was recorded later than this. A moment that has passed never
    /// comes to mean another position.
    Time(Timestamp),
}

/// A text that names no moment.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is neither a position of the ledger nor a time such as 2024-01-15T10:30:00Z")]
pub struct InvalidMoment(String);

impl FromStr for Moment {
    type Err = InvalidMoment;
    fn from_str(s: &str) -> Result<Self, InvalidMoment> {
        let bad = || InvalidMoment(s.chars().take(80).collect());
        if !s.is_empty() && s.bytes().all(|b| b.is_ascii_digit()) {
            return s.parse().map(|p| Self::At(Position(p))).map_err(|_| bad());
        }
        s.parse().map(Self::Time).map_err(|_| bad())
    }
}

impl fmt::Display for Moment {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::At(position) => position.fmt(f),
            Self::Time(time) => time.fmt(f),
        }
    }
}

/// Why the past could not be told.
#[derive(Debug, thiserror::Error)]
pub enum PastError {
    /// The position has not been reached yet.
    #[error("the ledger is folded up to {reached}, and not to {wanted} yet")]
    NotYet {
        /// What was asked for.
        wanted: Position,
        /// What there is.
        reached: Position,
    },
    /// The projections could not be read.
    #[error("the projections could not be read")]
    Query(#[from] QueryError),
    /// The log could not be read.
    #[error("the log could not be read")]
    Read(#[from] ReadError),
    /// The log does not have an event that was folded.
    #[error("the log has no event {0} any more")]
    Lost(Position),
}

impl From<TableError> for PastError {
    fn from(e: TableError) -> Self {
        Self::Query(e.into())
    }
}

/// What a past state is made of.
struct Plan {
    subject: Subject,
    /// The newest snapshot that is not later, or the present state if that is as old.
    base: Kept,
    /// The events between.
    events: Vec<Position>,
    /// What is known of a deployment beyond its state.
    origin: Option<Origin>,
}

/// How an aggregate went on behind a snapshot.
struct Stretch {
    /// Positions of its events until the next snapshot, or until now.
    events: Vec<Position>,
    /// Position of the next snapshot, if there is one.
    until: Option<Position>,
}

impl Plan {
    /// Plans how to get the state of an aggregate at a position. None for an aggregate of a newer
    /// version. To be called while no rows are written.
    fn new(
        projections: &Projections,
        subject: Subject,
        at: Position,
    ) -> Result<Option<Self>, TableError> {
        let Some(now) = Kept::load(&projections.inner.table, &subject)? else {
            return Ok(None);
        };
        let found = Self::from_now(projections, subject, now, at)?;
        Ok(found.map(|(plan, _)| plan))
    }

    /// As [`Plan::new`], with how the aggregate is now; and with how it went on from the snapshot that
    /// the plan is based on, unless that is how it is now.
    fn from_now(
        projections: &Projections,
        subject: Subject,
        mut now: Kept,
        at: Position,
    ) -> Result<Option<(Self, Option<Stretch>)>, TableError> {
        let table = &projections.inner.table;
        let (Some(empty), Some(prefix)) = (Kept::empty(&subject), keys::snapshots(&subject)) else {
            return Ok(None);
        };
        let origin = match &mut now.state {
            State::Deployment(d) => d.origin.take(),
            _ => None,
        };
        let mut plan = Self {
            subject,
            base: empty,
            events: Vec::new(),
            origin,
        };
        if now.state.position() <= at {
            plan.base = now;
            return Ok(Some((plan, None)));
        }
        let decoded = |row: &[u8]| Kept::decode(&plan.subject, row);
        let lost = || TableError::Row(format!("no snapshot at {}", now.snapshot));
        let key = |position: Position| [prefix.as_slice(), &position.0.to_be_bytes()].concat();
        let stretch = if now.snapshot <= at {
            // It has no snapshot, or the newest is the one.
            if now.snapshot > Position::ZERO {
                let row = table.get(&key(now.snapshot))?;
                if let Some(kept) = decoded(&row.ok_or_else(lost)?)? {
                    plan.base = kept;
                }
            }
            Stretch {
                events: now.trail,
                until: None,
            }
        } else {
            if let Some((_, row)) = table.nearest(&prefix, &key(at.next()), Way::Down)?
                && let Some(kept) = decoded(&row)?
            {
                plan.base = kept;
            }
            let (key, row) = table
                .nearest(&prefix, &key(at), Way::Up)?
                .ok_or_else(lost)?;
            Stretch {
                events: decoded(&row)?.map(|kept| kept.trail).unwrap_or_default(),
                until: keys::position_of(&key),
            }
        };
        let before = stretch.events.iter().copied();
        plan.events = before.take_while(|p| *p <= at).collect();
        Ok(Some((plan, Some(stretch))))
    }

    /// The state, once the events are read.
    fn carry_out(self, events: &Events) -> Result<Past, PastError> {
        let mut state = self.base.state;
        events.replay(&mut state, &self.events)?;
        let is_kept = self.events.is_empty();
        Ok(Past {
            subject: self.subject,
            state,
            origin: self.origin,
            element: self.base.element.filter(|_| is_kept),
        })
    }
}

/// An aggregate as it was.
struct Past {
    subject: Subject,
    state: State,
    origin: Option<Origin>,
    /// What it contributed to the sum of states, where a row says it.
    element: Option<Element>,
}

impl Past {
    /// What it contributed to the sum of states.
    fn element(&self) -> Result<Option<Element>, TableError> {
        if self.state.position() == Position::ZERO {
            return Ok(None);
        }
        if self.element.is_some() {
            return Ok(self.element);
        }
        self.state.element(&self.subject).map(Some)
    }
}

/// A position whose sum over all states is written down.
struct KeptSum {
    position: Position,
    sum: Sum,
}

/// An aggregate at two positions.
struct Change {
    earlier: Plan,
    later: Later,
}

/// How to get from an aggregate at one position to the same at a later one.
enum Later {
    /// By these further events.
    Further(Vec<Position>),
    /// From a snapshot between the two.
    Anew(Box<Plan>),
}

impl Change {
    /// None for an aggregate of a newer version. To be called while no rows are written.
    fn new(
        projections: &Projections,
        subject: Subject,
        earlier: Position,
        later: Position,
    ) -> Result<Option<Self>, TableError> {
        let Some(now) = Kept::load(&projections.inner.table, &subject)? else {
            return Ok(None);
        };
        let before = now.clone();
        let plan = Plan::from_now(projections, subject.clone(), before, earlier)?;
        let Some((earlier, stretch)) = plan else {
            return Ok(None);
        };
        let later = match stretch {
            Some(stretch) if stretch.until.is_none_or(|until| later < until) => {
                let further = stretch.events.into_iter().skip(earlier.events.len());
                Later::Further(further.take_while(|p| *p <= later).collect())
            }
            _ => match Plan::from_now(projections, subject, now, later)? {
                Some((plan, _)) => Later::Anew(Box::new(plan)),
                None => return Ok(None),
            },
        };
        Ok(Some(Self { earlier, later }))
    }

    /// The events that are needed.
    fn events(&self) -> impl Iterator<Item = Position> {
        let further = match &self.later {
            Later::Further(events) => events,
            Later::Anew(plan) => &plan.events,
        };
        self.earlier.events.iter().chain(further).copied()
    }

    /// What the aggregate contributed to the sum at the two positions, once the events are read.
    fn carry_out(self, events: &Events) -> Result<[Option<Element>; 2], PastError> {
        let mut past = self.earlier.carry_out(events)?;
        let earlier = past.element()?;
        match self.later {
            Later::Further(further) => {
                events.replay(&mut past.state, &further)?;
                past.element = past.element.filter(|_| further.is_empty());
            }
            Later::Anew(plan) => past = plan.carry_out(events)?,
        }
        Ok([earlier, past.element()?])
    }
}

/// Events that were read.
#[derive(Default)]
struct Events {
    /// All between two positions, which several share.
    between: Arc<HashMap<Position, Recorded>>,
    /// Others.
    others: HashMap<Position, Recorded>,
}

impl Events {
    fn has(&self, position: Position) -> bool {
        self.between.contains_key(&position) || self.others.contains_key(&position)
    }

    fn replay(&self, state: &mut State, positions: &[Position]) -> Result<(), PastError> {
        for position in positions {
            let event = self.others.get(position);
            let event = event.or_else(|| self.between.get(position));
            state.replay(event.ok_or(PastError::Lost(*position))?);
        }
        Ok(())
    }
}

/// A deployment as it was.
struct PastDeployment {
    row: DeploymentRow,
    origin: Origin,
}

impl Ledger {
    /// The position that a moment means.
    pub fn position_of(&self, moment: Moment) -> Result<Position, PastError> {
        match moment {
            Moment::At(wanted) => {
                let reached = self.projections().position();
                if wanted > reached {
                    return Err(PastError::NotYet { wanted, reached });
                }
                Ok(wanted)
            }
            Moment::Time(time) => Ok(self.projections().position_at(time)?),
        }
    }

    /// What ran where at a position: what [`Projections::overview`] answered then.
    pub async fn overview_at(
        &self,
        at: Position,
        project: Option<&ProjectName>,
        environment: Option<&EnvironmentName>,
    ) -> Result<Overview, PastError> {
        let at = self.position_of(Moment::At(at))?;
        let candidates = self.projections().maybe_active_at(at, |i| {
            project.is_none_or(|p| *p == i.project)
                && environment.is_none_or(|e| *e == i.environment)
        })?;
        let (deployments, routing) = self.deployments_at(candidates, at).await?;
        let rows = deployments
            .into_iter()
            .map(|d| d.row)
            .filter(|row| is_active(row.state.status));
        Ok(overview_of(rows, |p| routing.get(p), at))
    }

    /// The history as it was at a position: what [`Projections::history`] answered then.
    pub async fn history_at(
        &self,
        at: Position,
        filter: &DeploymentFilter,
        page: Page,
    ) -> Result<PageOf<HistoryRow>, PastError> {
        let at = self.position_of(Moment::At(at))?;
        let mut items = Vec::new();
        let mut next = None;
        let mut below = page.after.map_or(at.next(), |after| after.min(at.next()));
        while next.is_none() {
            let listed = self
                .projections()
                .listed_below(below, filter, page.limit() + 1)?;
            let Some((_, _, oldest)) = listed.last() else {
                break;
            };
            below = *oldest;
            let (deployments, routing) = self.deployments_at(listed, at).await?;
            for PastDeployment { row, origin } in deployments {
                let traffic = routing
                    .get(&row.state.request.instance.project)
                    .and_then(|r| r.traffic(&row.state.request.instance));
                let main = traffic.is_some_and(|t| t.main == Some(row.id));
                let row = history::row(row.id, &row.state, &origin, main);
                if !filter.fits_history(&row) {
                    continue;
                }
                if items.len() == page.limit() {
                    next = items.last().map(|r: &HistoryRow| Cursor(r.position));
                    break;
                }
                items.push(row);
            }
        }
        Ok(PageOf {
            items,
            next,
            position: at,
        })
    }

    /// The state hash at a position: the sum that was kept nearest to it, before or behind it, and
    /// what changed between the two.
    pub async fn state_hash_at(&self, at: Position) -> Result<StateHash, PastError> {
        let at = self.position_of(Moment::At(at))?;
        let projections = self.projections();
        if let Some(hash) = projections.recent_state_hash(at) {
            return Ok(hash);
        }
        if let Some(hash) = lock(&projections.inner.past_hashes).get(&at) {
            return Ok(*hash);
        }
        let (kept, subjects) = {
            let _gate = projections.gate();
            let kept = projections.nearest_sum(at)?;
            let (earlier, later) = (kept.position.min(at), kept.position.max(at));
            (kept, projections.subjects_of(earlier, later)?)
        };
        let (earlier, later) = (kept.position.min(at), kept.position.max(at));
        let between = self.events_between(earlier, later).await?;
        let between = Arc::new(between);
        // On all cores, and in pieces: nothing else waits for long.
        let subjects: Vec<Subject> = subjects.into_iter().collect();
        let mut work = JoinSet::new();
        for share in subjects.chunks(subjects.len().div_ceil(SHARES).max(1)) {
            let (ledger, share, between) = (self.clone(), share.to_vec(), Arc::clone(&between));
            work.spawn(async move { ledger.changes(share, earlier, later, between).await });
        }
        let mut sum = kept.sum;
        while let Some(done) = work.join_next().await {
            let changes = done.map_err(|e| QueryError::Store(e.to_string()))?;
            for [earlier, later] in changes? {
                match kept.position < at {
                    true => sum.replace(earlier, later),
                    // A sum loses an element as easily as it gains one.
                    false => sum.replace(later, earlier),
                }
            }
        }
        let hash = sum.hash();
        let mut known = lock(&projections.inner.past_hashes);
        if known.len() >= REMEMBERED {
            known.pop_first();
        }
        known.insert(at, hash);
        Ok(hash)
    }

    /// What aggregates contributed to the sum over all states at two positions. All events between
    /// these are read already.
    async fn changes(
        &self,
        subjects: Vec<Subject>,
        earlier: Position,
        later: Position,
        between: Arc<HashMap<Position, Recorded>>,
    ) -> Result<Vec<[Option<Element>; 2]>, PastError> {
        let mut found = Vec::with_capacity(subjects.len());
        for piece in subjects.chunks(PIECE) {
            let mut changes = Vec::with_capacity(piece.len());
            {
                let projections = self.projections();
                let _gate = projections.gate();
                for subject in piece {
                    changes.extend(Change::new(projections, subject.clone(), earlier, later)?);
                }
            }
            let mut events = Events {
                between: Arc::clone(&between),
                ..Events::default()
            };
            let wanted = changes.iter().flat_map(Change::events);
            let wanted: Vec<Position> = wanted.filter(|p| !events.has(*p)).collect();
            events.others = self.events_of(wanted.into_iter()).await?;
            for change in changes {
                found.push(change.carry_out(&events)?);
            }
            tokio::task::yield_now().await;
        }
        Ok(found)
    }

    /// All events after a position and up to another.
    async fn events_between(
        &self,
        after: Position,
        to: Position,
    ) -> Result<HashMap<Position, Recorded>, PastError> {
        let (mut events, mut after) = (HashMap::new(), after);
        while after < to {
            let rest = usize::try_from(to.0 - after.0).unwrap_or(usize::MAX);
            let read = self
                .log()
                .read(after, &SubjectFilter::default(), rest)
                .await?;
            let Some(last) = read.last().map(|e| e.position) else {
                break;
            };
            events.extend(read.into_iter().map(|e| (e.position, e)));
            after = last;
        }
        Ok(events)
    }

    /// The deployments of a listing as they were, those that were there, and the route tables of
    /// their projects. What the environments were is read for it, too.
    async fn deployments_at(
        &self,
        listed: Vec<(DeploymentId, InstanceRef, Position)>,
        at: Position,
    ) -> Result<(Vec<PastDeployment>, BTreeMap<ProjectName, Routing>), PastError> {
        let (mut deployments, mut tables) = (Vec::new(), Vec::new());
        {
            let projections = self.projections();
            let _gate = projections.gate();
            let (mut projects, mut environments) = (BTreeSet::new(), BTreeSet::new());
            for (id, instance, created) in listed {
                let subject = deployment_of(&instance, id);
                let plan = Plan::new(projections, subject, at)?;
                deployments.extend(plan.map(|plan| (id, created, plan)));
                projects.insert(instance.project.clone());
                environments.insert((instance.project, instance.environment));
            }
            let projects = projects.into_iter().map(Subject::Routing);
            let environments = environments.into_iter();
            let environments = environments.map(|(p, e)| Subject::Environment(p, e));
            for subject in projects.chain(environments) {
                tables.extend(Plan::new(projections, subject, at)?);
            }
        }
        let plans = deployments.iter().map(|(_, _, plan)| plan);
        let events = plans.chain(&tables).flat_map(|plan| plan.events.clone());
        let events = Events {
            others: self.events_of(events).await?,
            ..Events::default()
        };
        let (mut routing, mut live) = (BTreeMap::new(), BTreeSet::new());
        for plan in tables {
            let past = plan.carry_out(&events)?;
            match (past.subject, past.state) {
                (Subject::Routing(project), State::Routing(folded)) => {
                    let state = Arc::unwrap_or_clone(folded).state;
                    routing.extend(state.map(|state| (project, state)));
                }
                (Subject::Environment(project, name), State::Environment(folded))
                    if folded.state.as_ref().is_some_and(|e| e.spec.live) =>
                {
                    live.insert((project, name));
                }
                _ => {}
            }
        }
        let mut found = Vec::with_capacity(deployments.len());
        for (id, created, plan) in deployments {
            let past = plan.carry_out(&events)?;
            let (State::Deployment(slot), Some(mut origin)) = (past.state, past.origin) else {
                continue;
            };
            let Folded {
                state: Some(state),
                revision,
                position,
                ..
            }: Folded<Deployment> = Arc::unwrap_or_clone(slot.folded)
            else {
                continue;
            };
            if origin.message.as_ref().is_some_and(|(p, _)| *p > at) {
                origin.message = None;
            }
            let instance = state.request.instance.clone();
            let table = routing.get(&instance.project);
            let row = DeploymentRow::new(
                id,
                past.subject,
                state,
                (revision, position, created),
                table,
                live.contains(&(instance.project, instance.environment)),
                origin.source.clone(),
            );
            found.push(PastDeployment { row, origin });
        }
        Ok((found, routing))
    }

    /// Reads the events that plans need, many at once.
    async fn events_of(
        &self,
        wanted: impl Iterator<Item = Position>,
    ) -> Result<HashMap<Position, Recorded>, PastError> {
        let wanted: BTreeSet<Position> = wanted.collect();
        let log: &dyn EventLog = &**self.log();
        stream::iter(wanted)
            .map(|position| async move {
                let event = log.get(position).await?;
                Ok((position, event.ok_or(PastError::Lost(position))?))
            })
            .buffer_unordered(IN_FLIGHT)
            .try_collect()
            .await
    }
}

impl Projections {
    /// The last position before the first event that was recorded later than a time.
    pub fn position_at(&self, time: Timestamp) -> Result<Position, QueryError> {
        let _gate = self.gate();
        let head = self.position();
        // Chunks say the newest time up to their end, which never decreases.
        let later = |number: u64| -> Result<bool, TableError> {
            Ok(chunk::Reader::new(&self.chunk(number)?, Position::ZERO)?.newest > time)
        };
        let (mut low, mut high) = (0, head.0.div_ceil(keys::CHUNK));
        while low < high {
            let middle = low + (high - low) / 2;
            if later(middle)? {
                high = middle;
            } else {
                low = middle + 1;
            }
        }
        if low == head.0.div_ceil(keys::CHUNK) {
            return Ok(head);
        }
        let row = self.chunk(low)?;
        let mut reader = chunk::Reader::new(&row, keys::first_of(low))?;
        while let Some(row) = reader.next()? {
            if row.id.is_some() && row.recorded > time {
                return Ok(Position(row.position.0 - 1));
            }
        }
        Err(QueryError::Damaged(format!("chunk {low} of the audit")))
    }

    fn chunk(&self, number: u64) -> Result<sled::IVec, TableError> {
        let row = self.inner.table.get(&keys::chunk(number))?;
        row.ok_or_else(|| TableError::Row(format!("no chunk {number} of the audit")))
    }

    /// The sum over all states that is written down nearest to a position: at a mark before it or
    /// behind it, or at the end of what is folded. To be called while no rows are written.
    fn nearest_sum(&self, at: Position) -> Result<KeptSum, TableError> {
        let table = &self.inner.table;
        let before = Position(at.0 / MARK * MARK);
        let head = self.position();
        let behind = Position(before.0 + MARK).min(head);
        if behind.0.saturating_sub(at.0) < at.0 - before.0 {
            // The sum at a mark is written with the event after it, the one at the end always is.
            let row = match behind == head {
                true => table.get(keys::SUM)?,
                false => table.get(&keys::sum(behind))?,
            };
            if let Some(row) = row {
                let (position, sum) = (behind, Sum::from_bytes(&row)?);
                return Ok(KeptSum { position, sum });
            }
        }
        let sum = match table.get(&keys::sum(before))? {
            Some(row) => Sum::from_bytes(&row)?,
            None if before == Position::ZERO => Sum::default(),
            None => return Err(TableError::Row(format!("no sum at {before}"))),
        };
        let position = before;
        Ok(KeptSum { position, sum })
    }

    /// The aggregates with events after one position and up to another.
    fn subjects_of(&self, after: Position, to: Position) -> Result<BTreeSet<Subject>, TableError> {
        let mut subjects = BTreeSet::new();
        if to <= after {
            return Ok(subjects);
        }
        for number in keys::chunk_of(after.next())..=keys::chunk_of(to) {
            let row = self.chunk(number)?;
            let mut reader = chunk::Reader::new(&row, keys::first_of(number))?;
            while let Some((position, subject)) = reader.next_subject()? {
                if position > after && position <= to {
                    subjects.insert(subject);
                }
            }
        }
        Ok(subjects)
    }

    /// The deployments that may have been active at a position, newest first: all that were, and
    /// some that ended shortly before.
    fn maybe_active_at(
        &self,
        at: Position,
        wanted: impl Fn(&InstanceRef) -> bool,
    ) -> Result<Vec<(DeploymentId, InstanceRef, Position)>, QueryError> {
        let _gate = self.gate();
        let table = &self.inner.table;
        let known = table.scan(
            b"o",
            Some(&keys::were_active(at.next())),
            Way::Down,
            |k, v| ControlFlow::Break((keys::position_of(k), v.clone())),
        )?;
        let (since, mut created): (Position, BTreeSet<Position>) = match known {
            Some((Some(since), row)) => {
                let positions: Vec<u64> = decode(&row)?;
                (since, positions.into_iter().map(Position).collect())
            }
            _ => (Position::ZERO, BTreeSet::new()),
        };
        let from = keys::listed(Scope::All, since);
        table.scan(
            &Scope::All.listed(),
            Some(&from),
            Way::Up,
            |key, _| match keys::position_of(key) {
                Some(position) if position <= at => {
                    created.insert(position);
                    ControlFlow::Continue(())
                }
                _ => ControlFlow::Break(()),
            },
        )?;
        let mut found = Vec::with_capacity(created.len());
        for position in created.into_iter().rev() {
            let Some(row) = table.get(&keys::listed(Scope::All, position))? else {
                return Err(QueryError::Damaged("an index of deployments".to_owned()));
            };
            let (id, instance) = listed(&row)?;
            if wanted(&instance) {
                found.push((id, instance, position));
            }
        }
        Ok(found)
    }
}
