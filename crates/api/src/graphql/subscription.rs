//! What can be followed. Each subscription says how far it is, and goes on from there after a cut.

use std::collections::VecDeque;
use std::sync::Arc;

use async_graphql::{Context, ID, Result, Subscription as Subscribe};
use daybook_events::deployment::Deployment;
use daybook_events::feed::FeedChain;
use daybook_events::log::ReadError;
use daybook_events::{CommitId, DeploymentId, Folded, Position};
use daybook_projections::{DeploymentRow, Projections, Reached};
use futures_util::stream::{self, Stream, StreamExt};

use super::asked::{Asked, asked};
use super::deploy_run::{DeployRun, Phase, RolloutHealth, word};
use super::objects::{Event, LogLine, LogPosition};
use super::query::EventsWanted;
use crate::event_filter::EventFilter;
use crate::extract::deployment_id;
use crate::feed::FeedEvent;
use crate::line_filter::{self, LineFilter};
use crate::problem::Problem;
use crate::routes::{events, logs};
use crate::state::AppState;

/// What can be followed.
#[derive(Debug)]
pub(crate) struct Subscription;

/// What can be followed.
#[Subscribe]
impl Subscription {
    /// The output of a deployment, a line each, until it has settled: of its build, of the workers
    /// that carry it out, and of its containers.
    async fn deploy_logs(
        &self,
        ctx: &Context<'_>,
        id: ID,
        after: Option<String>,
    ) -> Result<impl Stream<Item = String>> {
        let lines = lines(asked(ctx), &id, None, after).await?;
        Ok(lines.map(|line| line.text))
    }

    /// The same with all that is known of each line. `after` goes on after the `cursor` of a line;
    /// `type` is `build`, `container`, `status` or `platform`, and with `container` lines come as
    /// long as it runs.
    async fn deploy_log_lines(
        &self,
        ctx: &Context<'_>,
        id: ID,
        after: Option<String>,
        #[graphql(name = "type")] kind: Option<String>,
    ) -> Result<impl Stream<Item = LogLine>> {
        let lines = lines(asked(ctx), &id, kind.as_deref(), after).await?;
        Ok(lines.map(|line| LogLine {
            cursor: line.cursor,
            time: line.time,
            kind: word(line.kind),
            level: line.level.to_owned(),
            cluster: line.cluster.map(|c| c.to_string()),
            instance: line.instance,
            text: line.text,
        }))
    }

    /// A deployment as it is, and then with every change of its phase, its rollout or its error,
    /// until it has settled. With `after`, the `position` of the last message, every change since.
    async fn deploy_status(
        &self,
        ctx: &Context<'_>,
        id: ID,
        after: Option<LogPosition>,
    ) -> Result<impl Stream<Item = Result<DeployRun>>> {
        let asked = asked(ctx);
        let state = &asked.state;
        let row = asked.deployment(deployment_id(&id)?)?;
        let after = after.map(|p| p.0);
        if let Some(after) = after {
            events::reached(state, after).await?;
        }
        Ok(changes(state, row, after))
    }

    /// The events of the ledger after a position, oldest first, and those to come. `chain` is the
    /// value that the last event came with.
    async fn events(
        &self,
        ctx: &Context<'_>,
        #[graphql(default)] filter: EventsWanted,
        after: Option<LogPosition>,
        chain: Option<String>,
    ) -> Result<impl Stream<Item = Result<Event>>> {
        let asked = asked(ctx);
        let state = &asked.state;
        let after = after.map_or(Position::ZERO, |p| p.0);
        let filter = filter.filter(asked)?;
        let chain = chain.as_deref().map(events::chain_value).transpose()?;
        let chain = chain.unwrap_or_else(|| FeedChain::begin(&filter.feed, after));
        events::reached(state, after).await?;
        let batches = state.feed.subscribe(after, filter);
        Ok(one_by_one(batches).scan(chain, |chain, event| {
            let sent = match event {
                Ok(event) => {
                    *chain = chain.then(event.leaf());
                    Ok(Event::of_feed(&event.recorded, chain.to_string()))
                }
                Err(e) => Err(Problem::from(e).into()),
            };
            std::future::ready(Some(sent))
        }))
    }
}

async fn lines(
    asked: &Asked,
    id: &str,
    kind: Option<&str>,
    after: Option<String>,
) -> Result<impl Stream<Item = logs::LogLine> + use<>, Problem> {
    let id = asked.deployment(deployment_id(id)?)?.id;
    let filter = LineFilter::new(line_filter::Asked {
        kind: kind.map(str::to_owned),
        ..line_filter::Asked::default()
    })?;
    let cursor = after.map(|a| a.parse::<logs::GivenCursor>()).transpose()?;
    let cursor = cursor.unwrap_or_default();
    let until = match filter.is_of_containers() {
        true => logs::Until::Ended,
        false => logs::Until::Settled,
    };
    let batches = logs::lines(&asked.state, id, filter, until, cursor).await?;
    Ok(batches.flat_map(stream::iter))
}

type Batch = Result<Vec<Arc<FeedEvent>>, ReadError>;

fn one_by_one(
    batches: impl Stream<Item = Batch> + Send,
) -> impl Stream<Item = Result<Arc<FeedEvent>, ReadError>> + Send {
    batches.flat_map(|batch| {
        let events: Vec<_> = match batch {
            Ok(events) => events.into_iter().map(Ok).collect(),
            Err(e) => vec![Err(e)],
        };
        stream::iter(events)
    })
}

/// What a subscriber of a deployment's status is told of.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Told {
    state: daybook_events::deployment::Status,
    phase: Phase,
    health: Option<RolloutHealth>,
    message: Option<String>,
    error: Option<String>,
}

impl Told {
    fn of(run: &DeployRun) -> Self {
        Self {
            state: run.state.status,
            phase: run.phase_of(),
            health: run.health(),
            message: run.message(),
            error: run.state.failure.as_ref().map(|f| f.message.clone()),
        }
    }
}

/// Folds the events of one deployment, from its first on: what was missed during a cut is told like
/// what is new.
struct Changes<E> {
    id: DeploymentId,
    events: E,
    /// The routes are those of another aggregate: they are looked at when something is told.
    projections: Projections,
    folded: Folded<Deployment>,
    /// Changes after this position are told; and, unless the subscriber has said it itself, how it
    /// is there.
    from: Position,
    say_present: bool,
    /// The last event when this began.
    present: Position,
    /// The commit that its image was made from, if that was made for another one.
    inherited: Option<CommitId>,
    reached: Reached,
    told: Option<Told>,
    waiting: VecDeque<DeployRun>,
    ended: bool,
}

fn changes(
    state: &AppState,
    row: DeploymentRow,
    after: Option<Position>,
) -> impl Stream<Item = Result<DeployRun>> + use<> {
    let id = row.id;
    let filter = EventFilter::exactly(row.subject);
    let events = one_by_one(state.feed.subscribe(Position::ZERO, filter));
    let changes = Changes {
        id,
        events: Box::pin(events),
        projections: state.projections().clone(),
        folded: Folded::default(),
        from: after.unwrap_or(row.position),
        say_present: after.is_none(),
        present: row.position,
        inherited: match &row.state.source {
            Some(_) => None,
            None => row.source.map(|s| s.commit),
        },
        reached: Reached::default(),
        told: None,
        waiting: VecDeque::new(),
        ended: after.is_some_and(|a| a >= row.position) && row.state.status.is_settled(),
    };
    stream::unfold(changes, |mut changes| async move {
        let next = changes.next().await?;
        Some((next.map_err(|e| Problem::from(e).into()), changes))
    })
}

impl<E: Stream<Item = Result<Arc<FeedEvent>, ReadError>> + Unpin> Changes<E> {
    async fn next(&mut self) -> Option<Result<DeployRun, ReadError>> {
        loop {
            if let Some(mut run) = self.waiting.pop_front() {
                run.wholly_main = self.is_wholly_main();
                return Some(Ok(run));
            }
            if self.ended {
                return None;
            }
            match self.events.next().await? {
                Ok(event) => self.take(&event),
                Err(e) => {
                    self.ended = true;
                    return Some(Err(e));
                }
            }
        }
    }

    /// As the routes are now, also where what is told was before. If that cannot be read, one operation
    /// too many is offered, which changes nothing.
    fn is_wholly_main(&self) -> bool {
        let row = self.projections.deployment(self.id).ok().flatten();
        row.is_some_and(|row| row.wholly_main)
    }

    fn take(&mut self, event: &FeedEvent) {
        let position = event.recorded.position;
        if let Some(event) = event.event() {
            // An event that is void changes nothing here either.
            let _ = self.folded.apply(position, event);
            if let Some(state) = &self.folded.state {
                self.reached.note(state, event.time);
            }
        }
        let Some(state) = &self.folded.state else {
            return;
        };
        let run = DeployRun {
            id: self.id,
            state: Arc::new(state.clone()),
            position,
            inherited: self.inherited.clone(),
            reached: self.reached,
            // Not known before it is told.
            wholly_main: false,
        };
        let told = Told::of(&run);
        let changed = self.told.as_ref() != Some(&told);
        let settled = told.state.is_settled();
        let due = match position.cmp(&self.from) {
            std::cmp::Ordering::Less => false,
            std::cmp::Ordering::Equal => self.say_present,
            std::cmp::Ordering::Greater => changed,
        };
        self.told = Some(told);
        if due {
            self.waiting.push_back(run);
        }
        // It had settled when this began, or has now.
        self.ended = settled && position >= self.from.max(self.present);
    }
}
