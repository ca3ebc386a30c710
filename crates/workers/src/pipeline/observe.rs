//! Records what a cluster shows: instances coming and going, readiness, problems.
//!
//! Observations are events of their own, apart from intents, and are appended only when they
//! differ from the last one. They carry the GitOps commit that they are about.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use daybook_events::deployment::{
    self, Deployment, DeploymentEvent, ImagePulled, Instance, Problem, Status, WorkloadObserved,
};
use daybook_events::gitops::Gitops;
use daybook_events::{Actor, CommitId, Context, DeploymentId, EventId, ProjectName, Subject};
use daybook_projections::{Change, Feed, QueryError};
use futures_util::StreamExt;
use jiff::Timestamp;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use uuid::Uuid;

use super::traced::About;
use super::trouble::Trouble;
use super::{Bench, Stop};
use crate::target::{AppRef, AppStatus, InstanceStatus, ReleaseStatus, Target};

const ROLE: &str = "observe";

/// When the environments are listed again if that was not possible.
const AGAIN: Duration = Duration::from_millis(500);
/// So many observations are appended at once: they share the log's syncs.
const AT_ONCE: usize = 16;

/// Watches all Applications of one cluster until `cancel`.
pub async fn run(bench: Bench, target: Arc<dyn Target>, cancel: CancellationToken) {
    let tasks = TaskTracker::new();
    let mut watched = BTreeSet::new();
    let mut feed = bench.ledger.projections().feed();
    let mut change = Some(Change::Any);
    while let Some(found) = change {
        match apps(&bench, &found) {
            Ok(apps) => {
                for app in apps {
                    if watched.insert(app.clone()) {
                        let watch = Watch::new(bench.clone(), target.clone(), app);
                        let cancel = cancel.clone();
                        tasks.spawn(async move {
                            tokio::select! {
                                () = watch.run() => {}
                                () = cancel.cancelled() => {}
                            }
                        });
                    }
                }
                change = tokio::select! {
                    () = cancel.cancelled() => None,
                    change = feed.next() => change,
                };
            }
            Err(error) => {
                tracing::warn!(%error, "the environments could not be listed; trying again");
                change = tokio::select! {
                    () = cancel.cancelled() => None,
                    () = tokio::time::sleep(AGAIN) => Some(Change::Any),
                };
            }
        }
    }
    tasks.close();
    tasks.wait().await;
}

/// The Applications that a change may have brought.
fn apps(bench: &Bench, change: &Change) -> Result<Vec<AppRef>, QueryError> {
    let projections = bench.ledger.projections();
    let projects: Vec<ProjectName> = match change {
        Change::Any => projections
            .projects()?
            .into_iter()
            .map(|p| p.name)
            .collect(),
        Change::Of(subjects) => subjects
            .iter()
            .filter_map(|s| match s {
                Subject::Gitops(project) => Some(project.clone()),
                _ => None,
            })
            .collect(),
    };
    let mut all = Vec::new();
    for project in projects {
        let gitops = projections.shared::<Gitops>(&Subject::Gitops(project.clone()))?;
        for environment in gitops.state.iter().flat_map(|g| g.environments.keys()) {
            all.push(AppRef {
                project: project.clone(),
                environment: environment.clone(),
            });
        }
    }
    Ok(all)
}

/// What a release looked like when it was last looked at.
#[derive(PartialEq)]
struct Seen {
    wanted: u32,
    instances: Vec<InstanceStatus>,
    problem: Option<crate::target::Problem>,
    image_pull: Option<Duration>,
}

impl Seen {
    fn is(&self, release: &ReleaseStatus) -> bool {
        self.wanted == release.wanted
            && self.instances == release.instances
            && self.problem == release.problem
            && self.image_pull == release.image_pull
    }
}

/// Follows one Application on one cluster. Only releases that look different, or whose deployment
/// has changed in the ledger, are looked at.
struct Watch {
    bench: Bench,
    target: Arc<dyn Target>,
    app: AppRef,
    feed: Feed,
    seen: HashMap<DeploymentId, Seen>,
    /// To be looked at next.
    dirty: HashSet<DeploymentId>,
    /// Looked at, but what is seen is ahead of what the ledger has, or the other way round: to be
    /// looked at again when either moves.
    later: HashSet<DeploymentId>,
    /// What keeps observations from being recorded.
    trouble: Trouble,
}

/// What came of looking at a release.
enum Looked {
    Settled,
    Later,
}

impl Watch {
    fn new(bench: Bench, target: Arc<dyn Target>, app: AppRef) -> Self {
        // From here on no change is missed; what was before is looked at when this runs.
        let feed = bench.ledger.projections().feed();
        Self {
            bench,
            target,
            app,
            feed,
            seen: HashMap::new(),
            dirty: HashSet::new(),
            later: HashSet::new(),
            trouble: Trouble::default(),
        }
    }

    /// Watches until the target or the projections are gone.
    async fn run(mut self) {
        let mut status = self.target.watch(&self.app);
        let mut all = true;
        loop {
            let listed = if all { self.mark_all() } else { Ok(()) };
            all = listed.is_err();
            let looks = {
                let now = status.borrow_and_update();
                self.mark_differences(&now);
                self.looks(&now)
            };
            let looked = self.look(looks).await;
            let unlisted = listed.err().map(|error| error.to_string());
            let again = self.tell(unlisted.or(looked));
            tokio::select! {
                changed = status.changed() => {
                    if changed.is_err() {
                        return;
                    }
                    self.dirty.extend(self.later.drain());
                }
                change = self.feed.next() => match change {
                    Some(Change::Of(subjects)) => self.mark_changed(&subjects),
                    Some(Change::Any) => all = true,
                    None => return,
                },
                () = tokio::time::sleep(self.trouble.pause()), if again => {}
            }
            while let Some(change) = self.feed.next_now() {
                match change {
                    Change::Of(subjects) => self.mark_changed(&subjects),
                    Change::Any => all = true,
                }
            }
        }
    }

    /// Marks all deployments that this cluster may show something of.
    fn mark_all(&mut self) -> Result<(), QueryError> {
        let projections = self.bench.ledger.projections();
        let rows =
            projections.active_deployments(Some(&self.app.project), Some(&self.app.environment))?;
        self.dirty.extend(rows.into_iter().map(|row| row.id));
        self.dirty.extend(self.seen.keys());
        Ok(())
    }

    /// Marks what has changed in the ledger.
    fn mark_changed(&mut self, subjects: &[Subject]) {
        for subject in subjects {
            match subject {
                Subject::Deployment(project, environment, id)
                    if *project == self.app.project && *environment == self.app.environment =>
                {
                    self.dirty.insert(*id);
                }
                Subject::Gitops(project) if *project == self.app.project => {
                    self.dirty.extend(self.later.drain());
                }
                _ => {}
            }
        }
    }

    /// Marks what has changed in the cluster.
    fn mark_differences(&mut self, now: &AppStatus) {
        for release in &now.releases {
            let same = self.seen.get(&release.deployment);
            if !same.is_some_and(|seen| seen.is(release)) {
                self.seen.insert(
                    release.deployment,
                    Seen {
                        wanted: release.wanted,
                        instances: release.instances.clone(),
                        problem: release.problem.clone(),
                        image_pull: release.image_pull,
                    },
                );
                self.dirty.insert(release.deployment);
            }
        }
        if self.seen.len() > now.releases.len() {
            let listed: HashSet<_> = now.releases.iter().map(|r| r.deployment).collect();
            let dirty = &mut self.dirty;
            self.seen.retain(|id, _| {
                let kept = listed.contains(id);
                if !kept {
                    dirty.insert(*id);
                }
                kept
            });
        }
    }

    /// What is to be looked at, each with what is seen of it: nothing before the cluster has
    /// applied anything.
    fn looks(&mut self, now: &AppStatus) -> Vec<Look> {
        let Some(revision) = &now.revision else {
            self.later.extend(self.dirty.drain());
            return Vec::new();
        };
        let mut listed = HashMap::new();
        for release in &now.releases {
            if self.dirty.contains(&release.deployment) {
                let seen = (observation(&*self.target, release), release.image_pull);
                listed.insert(release.deployment, seen);
            }
        }
        let look = |id| {
            let (observed, image_pull) = listed.remove(&id).unzip();
            Look {
                id,
                revision: revision.clone(),
                observed,
                image_pull: image_pull.flatten(),
            }
        };
        self.dirty.drain().map(look).collect()
    }

    /// Tells people what keeps observations from being recorded, and when nothing does any more.
    /// Says whether anything does.
    fn tell(&mut self, why: Option<String>) -> bool {
        let (cluster, app) = (self.target.cluster(), &self.app);
        match &why {
            Some(why) if self.trouble.met(why) => {
                tracing::warn!(%cluster, project = %app.project, environment = %app.environment, %why,
                    "observations are not recorded yet");
            }
            None if self.trouble.over() => {
                tracing::info!(%cluster, project = %app.project, environment = %app.environment,
                    "observations are recorded again");
            }
            _ => {}
        }
        why.is_some()
    }

    /// Looks at releases, and says why some are to be looked at again.
    async fn look(&mut self, looks: Vec<Look>) -> Option<String> {
        let mut again = None;
        let results: Vec<_> = futures_util::stream::iter(looks)
            .map(|look| {
                let (bench, target, app) = (&self.bench, &*self.target, &self.app);
                async move { (look.id, record(bench, target, app, look).await) }
            })
            .buffer_unordered(AT_ONCE)
            .collect()
            .await;
        for (id, result) in results {
            match result {
                Ok(Looked::Settled) | Err(Stop::Moved(_)) => drop(self.later.remove(&id)),
                Ok(Looked::Later) => drop(self.later.insert(id)),
                Err(stop) => {
                    self.dirty.insert(id);
                    let why = match stop {
                        Stop::Retry(why) => why,
                        other => format!("{other:?}"),
                    };
                    // The same one each time, in whatever order they are looked at.
                    again = again.into_iter().chain([why]).min();
                }
            }
        }
        again
    }
}

/// A deployment, and what a cluster shows of it at a revision: none if it is not listed.
struct Look {
    id: DeploymentId,
    revision: CommitId,
    observed: Option<WorkloadObserved>,
    image_pull: Option<Duration>,
}

/// Records what is new of a deployment. Some can only be recorded later, once the ledger or the
/// cluster has moved on: a release whose deployment is not yet said to be deploying, or one that
/// is gone before the ledger has the commit that removes it.
async fn record(
    bench: &Bench,
    target: &dyn Target,
    app: &AppRef,
    look: Look,
) -> Result<Looked, Stop> {
    let projections = bench.ledger.projections();
    let subject = Subject::Deployment(app.project.clone(), app.environment.clone(), look.id);
    let folded = projections.shared::<Deployment>(&subject)?;
    let Some(state) = &folded.state else {
        return Ok(Looked::Later);
    };
    if !state.is_active() || !state.request.clusters.contains(target.cluster()) {
        return Ok(Looked::Settled);
    }
    let observed = match look.observed {
        Some(observed) => observed,
        None if state.in_repository() => {
            // It is not there yet, or it went although it should be there.
            return Ok(Looked::Later);
        }
        None => {
            let gitops = projections.shared::<Gitops>(&Subject::Gitops(app.project.clone()))?;
            let newest = gitops
                .state
                .as_ref()
                .and_then(|g| g.environments.get(&app.environment));
            if newest != Some(&look.revision) {
                return Ok(Looked::Later);
            }
            WorkloadObserved {
                cluster: target.cluster().clone(),
                revision: look.revision,
                wanted: 0,
                instances: Vec::new(),
                problem: None,
            }
        }
    };
    if state.status < Status::Deploying {
        return Ok(Looked::Later);
    }
    let recorded = async {
        if let Some(took) = look.image_pull {
            pulled(bench, target, &subject, look.id, state, took).await?;
        }
        append(bench, &subject, look.id, state, observed).await
    };
    let about = About::state(look.id, state).in_cluster(target.cluster());
    bench.work(ROLE, about, recorded).await?;
    Ok(Looked::Settled)
}

/// Records how long a cluster took to fetch the image, once.
async fn pulled(
    bench: &Bench,
    target: &dyn Target,
    subject: &Subject,
    id: DeploymentId,
    state: &Deployment,
    took: Duration,
) -> Result<(), Stop> {
    let cluster = target.cluster().clone();
    if state.image_pulls.get(&cluster).is_some() {
        return Ok(());
    }
    let event_id = EventId::derived(id.0, &format!("image_pulled/{cluster}"));
    let context = context(event_id, id, state);
    let event = DeploymentEvent::ImagePulled(ImagePulled {
        cluster,
        took_ms: u64::try_from(took.as_millis()).unwrap_or(u64::MAX),
    });
    bench
        .append::<Deployment>(subject, &context, |state| {
            deployment::decide(state, event.clone())
        })
        .await
        .map(|_| ())
}

fn observation(target: &dyn Target, release: &ReleaseStatus) -> WorkloadObserved {
    WorkloadObserved {
        cluster: target.cluster().clone(),
        revision: release.revision.clone(),
        wanted: release.wanted,
        instances: release
            .instances
            .iter()
            .map(|i| Instance {
                name: i.name.clone(),
                address: i.address.clone(),
                // What an older revision asked for is no success of this one.
                ready: i.ready && !i.outdated,
                restarts: i.restarts,
            })
            .collect(),
        problem: release.problem.as_ref().map(|p| Problem {
            reason: p.reason.clone(),
            message: p.message.clone(),
            remedy: p.remedy.clone(),
            transient: p.transient,
            likely_causes: p.likely_causes.to_vec(),
            remedies: p.remedies.clone(),
        }),
    }
}

async fn append(
    bench: &Bench,
    subject: &Subject,
    id: DeploymentId,
    state: &Deployment,
    observed: WorkloadObserved,
) -> Result<(), Stop> {
    let event = DeploymentEvent::WorkloadObserved(observed);
    let event = bench.masked(subject, event);
    let DeploymentEvent::WorkloadObserved(observed) = &event else {
        return Ok(());
    };
    let before = state.observed.get(&observed.cluster);
    let unchanged = before.is_some_and(|o| {
        o.wanted == observed.wanted
            && o.instances == observed.instances
            && o.problem == observed.problem
    });
    if unchanged {
        return Ok(());
    }
    let cluster = observed.cluster.clone();
    let text = describe(observed);
    // The same thing may be seen again later, so an observation's id says nothing but that it is
    // this one.
    let context = context(EventId(Uuid::now_v7()), id, state);
    let done = bench
        .append::<Deployment>(subject, &context, |state| {
            deployment::decide(state, event.clone())
        })
        .await?;
    if let Some(position) = done.position() {
        bench.say(id, Some(cluster), text).await;
        // The next look compares with what was recorded.
        bench.folded(position).await?;
    }
    Ok(())
}

fn context(event: EventId, about: DeploymentId, state: &Deployment) -> Context {
    Context {
        id: event,
        time: Timestamp::now(),
        correlation: about.0,
        causation: Some(state.status_event),
        actor: Actor::system("worker/observe"),
        traceparent: None,
        request_digest: None,
    }
}

fn describe(o: &WorkloadObserved) -> String {
    match &o.problem {
        Some(p) => format!("{}: {}", p.reason, p.message),
        None if o.wanted == 0 && o.instances.is_empty() => "stopped".to_owned(),
        // An autoscaler has added some.
        None if o.ready() > o.wanted => {
            format!("{} instances ready, of at least {}", o.ready(), o.wanted)
        }
        None => format!("{} of {} instances ready", o.ready(), o.wanted),
    }
}
