//! Admission: one running pipeline per service instance, and production first.
//!
//! While one runs, newer requests of its instance wait; of several that wait only the newest is
//! still wanted, and supersedes the others. Cancellations are carried out here too, as the one
//! place that ends a pipeline on purpose. Instances have nothing to do with each other: what is
//! difficult for one, or takes long, does not delay the others.
//!
//! Only build capacity is shared. As long as builds wait that no worker has taken on, few more are
//! added to them: the others wait here, where they can still be put in order
//! ([`daybook_events::admission`]).
//!
//! Every process with this role does all of it. That they do not get in each other's way follows
//! from the ledger. Before one is admitted, every older one that waits is superseded; an admission
//! and a superseding are decided on the same aggregate, and whoever comes second is refused. What a
//! process keeps in memory is a fold of the ledger, and is made anew at its next start.

mod plan;

use std::collections::{HashMap, HashSet};
use std::panic::AssertUnwindSafe;
use std::time::Duration;

use daybook_events::admission;
use daybook_events::aggregate::Refusal;
use daybook_events::build::{Build, BuildStatus};
use daybook_events::deployment::{
    self, Cancelled, Deployment, DeploymentEvent, Overtaken, Queued, Version,
};
use daybook_events::environment::Environment;
use daybook_events::{BuildId, DeploymentId, InstanceRef, Subject};
use daybook_projections::{Change, DeploymentRow};
use futures_util::FutureExt;
use futures_util::future::BoxFuture;
use futures_util::stream::{FuturesUnordered, StreamExt};
use jiff::Timestamp;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use self::plan::{Capacity, Entry, Orders, Pipeline, plan};
use super::traced::About;
use super::trouble::Trouble;
use super::{Bench, Stop, freeze};
use crate::ports::StepError;

const ROLE: &str = "queue";

/// How often those that wait are looked at again although nothing has changed: time alone may have
/// put them in another order.
const LOOK_AGAIN: Duration = Duration::from_secs(5);

/// Admits deployments until `cancel`.
pub async fn run(bench: Bench, cancel: CancellationToken) {
    let mut feed = bench.ledger.projections().feed();
    let mut queue = Queue::new(bench);
    let mut look_at = Instant::now();
    loop {
        // At its own time, however much happens meanwhile.
        if look_at <= Instant::now() {
            look_at = Instant::now() + LOOK_AGAIN;
            queue.changed = true;
        }
        queue.act();
        let wake = queue.read_at.unwrap_or(look_at);
        tokio::select! {
            () = cancel.cancelled() => return,
            Some(done) = queue.under_way.next() => queue.settle(done),
            next = feed.next() => {
                let Some(change) = next else { return };
                queue.take(&change);
                while let Some(change) = feed.next_now() {
                    queue.take(&change);
                }
            }
            () = tokio::time::sleep_until(wake) => {}
        }
    }
}

/// Something that was under way about an instance, and is not any more.
enum Done {
    /// Orders were carried out, or not.
    Orders {
        instance: InstanceRef,
        /// The deployments that they were about, as they were then.
        before: Vec<(DeploymentId, Option<Entry>)>,
        result: Result<(), Stop>,
    },
    /// It was left alone for a while.
    Rested(InstanceRef),
}

struct Queue {
    bench: Bench,
    pipeline: Pipeline,
    capacity: Capacity,
    /// When all is to be read anew, if it is.
    read_at: Option<Instant>,
    /// Why it cannot be read.
    unread: Trouble,
    /// Whether there may be something to do.
    changed: bool,
    /// The instances that something is being done about.
    busy: HashSet<InstanceRef>,
    under_way: FuturesUnordered<BoxFuture<'static, Done>>,
    /// The instances about which it did not work.
    troubles: HashMap<InstanceRef, Trouble>,
}

impl Queue {
    fn new(bench: Bench) -> Self {
        Self {
            capacity: Capacity::of(bench.settings.builds),
            bench,
            pipeline: Pipeline::new(),
            read_at: Some(Instant::now()),
            unread: Trouble::default(),
            changed: true,
            busy: HashSet::new(),
            under_way: FuturesUnordered::new(),
            troubles: HashMap::new(),
        }
    }

    /// Takes note of a change.
    fn take(&mut self, change: &Change) {
        let subjects = match change {
            Change::Any => return self.read_all_at(Instant::now()),
            Change::Of(subjects) => subjects,
        };
        if self.read_at.is_some() {
            return;
        }
        for subject in subjects.iter() {
            let read = match subject {
                Subject::Deployment(_, _, id) => self.reread(*id, subject).map(|news| {
                    self.changed |= news;
                }),
                Subject::Environment(..) => self.reread_environment(subject),
                Subject::Build(..) => {
                    self.changed = true;
                    Ok(())
                }
                _ => Ok(()),
            };
            if let Err(stop) = read {
                return self.not_read(&stop);
            }
        }
    }

    fn read_all_at(&mut self, at: Instant) {
        self.read_at.get_or_insert(at);
        self.changed = true;
    }

    /// What is known may be wrong: it is read anew, a while later.
    fn not_read(&mut self, stop: &Stop) {
        let why = said(stop);
        if self.unread.met(&why) {
            tracing::warn!(%why, "who waits could not be read; trying again");
        }
        self.read_at = None;
        self.read_all_at(Instant::now() + self.unread.pause());
    }

    fn read_all(&mut self) -> Result<(), Stop> {
        self.pipeline.clear();
        for row in self.bench.ledger.projections().pipeline()? {
            self.note(row)?;
        }
        Ok(())
    }

    /// Takes note of what has become of a deployment. Says whether that is news.
    fn reread(&mut self, id: DeploymentId, subject: &Subject) -> Result<bool, Stop> {
        let projections = self.bench.ledger.projections();
        let folded = projections.shared::<Deployment>(subject)?;
        let state = folded.state.as_ref();
        let Some(state) = state.filter(|s| s.status.in_pipeline()) else {
            return Ok(self.pipeline.remove(&id).is_some());
        };
        if let Some(entry) = self.pipeline.get_mut(&id) {
            let before = entry.clone();
            entry.update(state);
            return Ok(*entry != before);
        }
        if let Some(row) = self.bench.row(id)? {
            self.note(row)?;
        }
        Ok(true)
    }

    fn note(&mut self, row: DeploymentRow) -> Result<(), Stop> {
        let state = &row.state;
        if !state.status.in_pipeline() {
            return Ok(());
        }
        let instance = state.request.instance.clone();
        let environment =
            Subject::Environment(instance.project.clone(), instance.environment.clone());
        let mut entry = Entry {
            subject: row.subject.clone(),
            created: row.created,
            requested: state.created_at,
            production: self.goes_first(&environment)?,
            builds: matches!(state.request.version, Version::Git { .. }),
            status: state.status,
            since: state.status_since,
            cancelled: false,
            held: false,
            build: None,
            overtaken: 0,
            instance,
        };
        entry.update(state);
        self.pipeline.insert(row.id, entry);
        Ok(())
    }

    fn goes_first(&self, environment: &Subject) -> Result<bool, Stop> {
        let Subject::Environment(_, name) = environment else {
            return Ok(false);
        };
        let projections = self.bench.ledger.projections();
        let folded = projections.shared::<Environment>(environment)?;
        let live = folded.state.as_ref().is_some_and(|e| e.spec.live);
        Ok(admission::goes_first(name, live))
    }

    fn reread_environment(&mut self, environment: &Subject) -> Result<(), Stop> {
        let Subject::Environment(project, name) = environment else {
            return Ok(());
        };
        let first = self.goes_first(environment)?;
        for entry in self.pipeline.values_mut() {
            if entry.instance.project == *project && entry.instance.environment == *name {
                self.changed |= entry.production != first;
                entry.production = first;
            }
        }
        Ok(())
    }

    /// Sets about whatever there is to be done, for each instance that nothing is being done about.
    fn act(&mut self) {
        if self.read_at.is_some_and(|at| at <= Instant::now()) {
            match self.read_all() {
                Ok(()) => {
                    self.read_at = None;
                    if self.unread.over() {
                        tracing::info!("who waits can be read again");
                    }
                }
                Err(stop) => self.not_read(&stop),
            }
        }
        if self.read_at.is_some() || !std::mem::take(&mut self.changed) {
            return;
        }
        let now = Timestamp::now();
        let bench = &self.bench;
        let status = |entry: &Entry, build| build_status(bench, entry, build);
        let free = self.capacity.free(&self.pipeline, status, now);
        for (instance, orders) in plan(&self.pipeline, |i| self.busy.contains(i), free, now) {
            self.busy.insert(instance.clone());
            let about = orders.about().into_iter();
            let before = about
                .map(|id| (id, self.pipeline.get(&id).cloned()))
                .collect();
            let bench = self.bench.clone();
            self.under_way.push(Box::pin(async move {
                let result = AssertUnwindSafe(Box::pin(carry_out(&bench, orders)))
                    .catch_unwind()
                    .await
                    .unwrap_or_else(|_| Err(Stop::Retry("admitting panicked".into())));
                Done::Orders {
                    instance,
                    before,
                    result,
                }
            }));
        }
    }

    fn settle(&mut self, done: Done) {
        self.changed = true;
        let (instance, before, result) = match done {
            Done::Orders {
                instance,
                before,
                result,
            } => (instance, before, result),
            Done::Rested(instance) => {
                self.busy.remove(&instance);
                return;
            }
        };
        // What was decided is folded by now, whether or not the feed has told of it.
        let mut progress = false;
        for (id, before) in before {
            let subject = before.as_ref().map(|e| e.subject.clone());
            if let Some(subject) = subject
                && let Err(stop) = self.reread(id, &subject)
            {
                self.not_read(&stop);
            }
            progress |= self.pipeline.get(&id) != before.as_ref();
        }
        // What came to nothing would come to nothing again at once.
        let why = match result {
            Err(stop) => said(&stop),
            Ok(()) if !progress => "it changed nothing".to_owned(),
            Ok(()) => {
                if self.troubles.remove(&instance).is_some() {
                    tracing::info!(%instance, "it is admitted again what is asked for");
                }
                self.busy.remove(&instance);
                return;
            }
        };
        let trouble = self.troubles.entry(instance.clone()).or_default();
        if trouble.met(&why) {
            tracing::warn!(%instance, %why, "nothing is admitted yet; trying again");
        }
        let pause = trouble.pause();
        self.under_way.push(Box::pin(async move {
            tokio::time::sleep(pause).await;
            Done::Rested(instance)
        }));
    }
}

/// How far the build of a deployment is. One that cannot be read is taken for one that waits.
fn build_status(bench: &Bench, entry: &Entry, build: BuildId) -> BuildStatus {
    let subject = Subject::Build(entry.instance.project.clone(), build);
    let folded = bench.ledger.projections().shared::<Build>(&subject).ok();
    let build = folded.as_ref().and_then(|f| f.state.as_ref());
    build.map_or(BuildStatus::Requested, |b| b.status)
}

fn said(stop: &Stop) -> String {
    match stop {
        Stop::Retry(why) => why.clone(),
        Stop::Moved(refusal) => format!("{}: {}", refusal.code, refusal.message),
        Stop::Fail(error) => format!("{}: {}", error.code, error.message),
        Stop::Interrupted => "interrupted".to_owned(),
    }
}

/// Carries out what is to be done about one instance. What has moved on meanwhile is left to the
/// next orders.
async fn carry_out(bench: &Bench, orders: Orders) -> Result<(), Stop> {
    for id in &orders.cancel {
        let Some(row) = bench.row(*id)? else { continue };
        let reason = row.state.cancel.as_ref().and_then(|c| c.reason.clone());
        let message = reason.map_or_else(
            || "cancelled on request".to_owned(),
            |r| format!("cancelled: {r}"),
        );
        let cancelled = cancel(bench, &row, None, message);
        moved_is_fine(bench.work(ROLE, About::of(&row), cancelled).await)?;
    }
    let Some(newest) = orders.newest.map(|id| bench.row(id)).transpose()?.flatten() else {
        return Ok(());
    };
    for id in &orders.supersede {
        let Some(row) = bench.row(*id)? else { continue };
        let message = format!("superseded by the newer deployment {}", newest.id);
        let cancelled = cancel(bench, &row, Some(&newest), message);
        match bench.work(ROLE, About::of(&row), cancelled).await {
            // Somebody has admitted it meanwhile: then the newest one waits for it.
            Err(Stop::Moved(refusal)) if refusal.code == ADMITTED => return Ok(()),
            other => moved_is_fine(other)?,
        }
    }
    if !orders.admit {
        return Ok(());
    }
    let admitted = admit(bench, &newest, orders.overtakes);
    bench
        .work(ROLE, About::of(&newest), Box::pin(admitted))
        .await
}

/// Admits a deployment, unless it is held by a freeze or its environment is gone.
async fn admit(
    bench: &Bench,
    newest: &DeploymentRow,
    overtakes: Option<DeploymentId>,
) -> Result<(), Stop> {
    if let Some(gone) = gone(bench, newest)? {
        return moved_is_fine(bench.fail(ROLE, newest, &gone).await);
    }
    match freeze::lets_through(bench, newest).await {
        Ok(true) => {}
        Ok(false) => return Ok(()),
        Err(stop) => return moved_is_fine::<()>(Err(stop)),
    }
    let overtaken = overtakes.map(|id| bench.row(id)).transpose()?;
    if let Some(overtaken) = overtaken.flatten()
        && !overtake(bench, newest, &overtaken).await?
    {
        return Ok(());
    }
    let event = DeploymentEvent::Queued(Queued {});
    moved_is_fine(bench.advance(ROLE, newest, "queued", event).await)
}

/// Records that one is admitted before another that has waited for longer. Says whether it may be.
async fn overtake(
    bench: &Bench,
    by: &DeploymentRow,
    overtaken: &DeploymentRow,
) -> Result<bool, Stop> {
    let event = DeploymentEvent::Overtaken(Overtaken {
        by: by.id,
        reason: format!("it goes to {}", by.state.request.instance.environment),
    });
    let step = format!("overtaken by {}", by.id);
    match bench.advance(ROLE, overtaken, &step, event).await {
        Err(Stop::Moved(refusal)) if refusal.code == admission::ENOUGH => Ok(false),
        other => moved_is_fine(other).map(|()| true),
    }
}

/// Why it cannot be deployed to its environment any more: somebody deleted that in between.
fn gone(bench: &Bench, row: &DeploymentRow) -> Result<Option<StepError>, Stop> {
    let instance = &row.state.request.instance;
    let projections = bench.ledger.projections();
    let environment = projections.environment(&instance.project, &instance.environment)?;
    let refused = environment.and_then(|e| e.must_be_active().err());
    Ok(refused.map(|r| StepError::fatal(r.code, r.message, r.remedy)))
}

/// The code of a superseding that came too late.
const ADMITTED: &str = "already_admitted";

/// Cancels a deployment, on request in whatever phase it is; or because a newer one waits, and
/// then only while it waits, too.
async fn cancel(
    bench: &Bench,
    row: &DeploymentRow,
    by: Option<&DeploymentRow>,
    message: String,
) -> Result<(), Stop> {
    let event = DeploymentEvent::Cancelled(Cancelled {
        during: row.state.status,
        superseded_by: by.map(|r| r.id),
        message: message.clone(),
    });
    let event = bench.masked(&row.subject, event);
    let context = bench.follow_up(ROLE, row.state.status_event, row.id.0, "cancelled");
    let executed = bench
        .append::<Deployment>(&row.subject, &context, |state| {
            let runs = |s: &Deployment| s.status.holds_instance() && s.held().is_none();
            if by.is_some() && state.is_some_and(runs) {
                return Err(Refusal::new(
                    ADMITTED,
                    "it was admitted meanwhile",
                    "wait until it has ended",
                ));
            }
            deployment::decide(state, event.clone())
        })
        .await?;
    if let Some(position) = executed.position() {
        bench.say(row.id, None, message).await;
        bench.folded(position).await?;
    }
    Ok(())
}

/// Somebody else's deployment having moved on is no reason to stop with this one.
fn moved_is_fine<T>(result: Result<T, Stop>) -> Result<(), Stop> {
    match result {
        Ok(_) | Err(Stop::Moved(_)) => Ok(()),
        Err(other) => Err(other),
    }
}
