//! What there is to be done about those that wait. Reads nothing, and does nothing.

use std::collections::{BTreeSet, HashMap};
use std::time::Duration;

use daybook_events::admission::{self, Waiting};
use daybook_events::build::BuildStatus;
use daybook_events::deployment::{Deployment, Status};
use daybook_events::{BuildId, DeploymentId, InstanceRef, Position, Subject};
use jiff::Timestamp;

/// So many builds may wait that nobody has taken on, beside those that follow from how many run.
const AHEAD: usize = 2;

/// Whoever resolves its source for longer than this does not count as one that is about to build.
const RESOLVING: Duration = Duration::from_secs(30);

/// A deployment in the pipeline, as far as admission goes by it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Entry {
    pub(super) subject: Subject,
    pub(super) instance: InstanceRef,
    pub(super) created: Position,
    pub(super) requested: Timestamp,
    /// Whether it goes first.
    pub(super) production: bool,
    /// Whether it needs somebody who builds.
    pub(super) builds: bool,
    pub(super) status: Status,
    pub(super) since: Timestamp,
    /// Whether somebody asked to cancel it.
    pub(super) cancelled: bool,
    /// Whether a freeze of its environment holds it: before its admission, or before its commit.
    pub(super) held: bool,
    pub(super) build: Option<BuildId>,
    pub(super) overtaken: usize,
}

impl Entry {
    /// Takes over what changes in the life of a deployment.
    pub(super) fn update(&mut self, state: &Deployment) {
        self.status = state.status;
        self.since = state.status_since;
        self.cancelled = state.cancel.is_some();
        self.held = state.held().is_some();
        self.build = state.build;
        self.overtaken = state.overtaken.len();
    }

    /// What a freeze holds before its commit waits as what was not admitted yet does.
    fn waits(&self) -> bool {
        (self.status == Status::Requested || self.held) && !self.cancelled
    }

    fn runs(&self) -> bool {
        self.status.holds_instance() && !self.held
    }
}

/// The deployments in the pipeline.
pub(super) type Pipeline = HashMap<DeploymentId, Entry>;

/// What is to be done about one instance.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(super) struct Orders {
    /// To be cancelled, as somebody asked.
    pub(super) cancel: Vec<DeploymentId>,
    /// Superseded by the newest one that waits.
    pub(super) supersede: Vec<DeploymentId>,
    /// The newest one that waits.
    pub(super) newest: Option<DeploymentId>,
    /// Whether the newest one is admitted.
    pub(super) admit: bool,
    /// The one of another instance that it overtakes.
    pub(super) overtakes: Option<DeploymentId>,
}

impl Orders {
    fn is_something(&self) -> bool {
        self.admit || !self.cancel.is_empty() || !self.supersede.is_empty()
    }

    /// The deployments that they are about.
    pub(super) fn about(&self) -> Vec<DeploymentId> {
        let mut about = [&self.cancel[..], &self.supersede[..]].concat();
        about.extend(self.newest);
        about.extend(self.overtakes);
        about
    }
}

/// How many builds are run at once, as far as that is known.
#[derive(Debug, Default)]
pub(super) struct Capacity {
    /// So many are run here, if builds are run here at all.
    least: usize,
    /// The most builds that were seen running at once since builds were last waited for.
    running_max: usize,
}

impl Capacity {
    /// At least so many builds are taken to be run at once.
    pub(super) fn of(least: usize) -> Self {
        Self {
            least,
            running_max: 0,
        }
    }

    /// How many more may be admitted that are going to build. `status` is that of the build of one
    /// whose source is known.
    pub(super) fn free(
        &mut self,
        pipeline: &Pipeline,
        status: impl Fn(&Entry, BuildId) -> BuildStatus,
        now: Timestamp,
    ) -> usize {
        let mut running = BTreeSet::new();
        let mut ahead = BTreeSet::new();
        let mut resolving = 0;
        let mut any = false;
        for entry in pipeline.values().filter(|e| e.builds) {
            any = true;
            match (entry.status, entry.build) {
                (Status::Cloning | Status::Building | Status::Pushing, Some(build)) => {
                    match status(entry, build) {
                        BuildStatus::Requested => {
                            ahead.insert(build);
                        }
                        ended if ended.is_final() => {}
                        _ => {
                            running.insert(build);
                        }
                    }
                }
                (Status::Queued | Status::Cloning, None) => {
                    resolving += usize::from(passed(entry.since, now) <= RESOLVING);
                }
                _ => {}
            }
        }
        if !any {
            // Whoever built then may be gone by the next time.
            self.running_max = 0;
        }
        self.running_max = self.running_max.max(running.len());
        let limit = AHEAD + 2 * self.running_max.max(self.least);
        limit.saturating_sub(running.len() + ahead.len() + resolving)
    }
}

/// What there is to be done, one item for each instance; nothing about those that are `busy`. So
/// many that are going to build may be admitted.
pub(super) fn plan(
    pipeline: &Pipeline,
    busy: impl Fn(&InstanceRef) -> bool,
    mut free: usize,
    now: Timestamp,
) -> Vec<(InstanceRef, Orders)> {
    let mut instances = HashMap::<&InstanceRef, Vec<(DeploymentId, &Entry)>>::new();
    for (id, entry) in pipeline {
        let of_it = instances.entry(&entry.instance).or_default();
        of_it.push((*id, entry));
    }
    let mut all = HashMap::with_capacity(instances.len());
    let mut waiting = Vec::new();
    for (instance, mut of_it) in instances {
        of_it.sort_by_key(|(_, e)| e.created);
        let ids = |fits: &dyn Fn(&Entry) -> bool| {
            let fitting = of_it.iter().filter(|(_, e)| fits(e));
            fitting.map(|(id, _)| *id).collect::<Vec<_>>()
        };
        let mut orders = Orders {
            cancel: ids(&|e| e.cancelled),
            supersede: ids(&Entry::waits),
            ..Orders::default()
        };
        orders.newest = orders.supersede.pop();
        let runs = of_it.iter().any(|(_, e)| e.runs());
        let newest = orders.newest.and_then(|id| Some((id, pipeline.get(&id)?)));
        if let Some((id, entry)) = newest.filter(|(_, e)| !runs && !e.held) {
            if entry.builds {
                waiting.push(Waiting {
                    id,
                    created: entry.created,
                    since: entry.requested,
                    production: entry.production,
                    overtaken: entry.overtaken,
                });
            } else {
                orders.admit = true;
            }
        }
        all.insert(instance, orders);
    }
    // Those of busy instances take their place in the order, too.
    while free > 0
        && let Some(turn) = admission::take_next(&mut waiting, now)
    {
        free -= 1;
        let instance = pipeline.get(&turn.next.id).map(|e| &e.instance);
        if let Some(orders) = instance.and_then(|i| all.get_mut(i)) {
            orders.admit = true;
            orders.overtakes = turn.overtaken;
        }
    }
    all.into_iter()
        .filter(|(instance, orders)| orders.is_something() && !busy(instance))
        .map(|(instance, orders)| (instance.clone(), orders))
        .collect()
}

fn passed(since: Timestamp, now: Timestamp) -> Duration {
    Duration::try_from(now.duration_since(since)).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use daybook_events::admission::{OVERTAKEN_MAX, WAIT_MAX};
    use uuid::Uuid;

    use super::*;

    /// When all of these tests happen.
    fn now() -> Timestamp {
        "2026-01-01T12:00:00Z".parse().unwrap()
    }

    fn id(number: u64) -> DeploymentId {
        DeploymentId(Uuid::from_u128(number.into()))
    }

    fn entry(
        number: u64,
        environment: &str,
        service: &str,
        status: Status,
    ) -> (DeploymentId, Entry) {
        let instance: InstanceRef = format!("shop.{environment}.{service}").parse().unwrap();
        let entry = Entry {
            subject: Subject::Deployment(
                instance.project.clone(),
                instance.environment.clone(),
                id(number),
            ),
            instance,
            created: Position(number),
            requested: now(),
            production: environment == "production",
            builds: true,
            status,
            since: now(),
            cancelled: false,
            held: false,
            build: None,
            overtaken: 0,
        };
        (id(number), entry)
    }

    fn staging(number: u64) -> (DeploymentId, Entry) {
        entry(number, "staging", &format!("s{number}"), Status::Requested)
    }

    fn production(number: u64) -> (DeploymentId, Entry) {
        entry(
            number,
            "production",
            &format!("s{number}"),
            Status::Requested,
        )
    }

    /// The deployments that are admitted, with whom each overtakes.
    fn admitted(pipeline: &Pipeline, free: usize) -> Vec<(DeploymentId, Option<DeploymentId>)> {
        let orders = plan(pipeline, |_| false, free, now());
        let admit = orders.into_iter().filter(|(_, o)| o.admit);
        let mut all: Vec<_> = admit
            .filter_map(|(_, o)| Some((o.newest?, o.overtakes)))
            .collect();
        all.sort();
        all
    }

    #[test]
    fn one_of_an_instance_runs_and_the_newest_that_waits_supersedes_the_others() {
        let web = |number, status| entry(number, "staging", "web", status);
        let mut pipeline = Pipeline::from([1, 2, 3].map(|n| web(n, Status::Requested)));
        let orders = plan(&pipeline, |_| false, 9, now());
        let [(_, only)] = &orders[..] else {
            panic!("{orders:?}")
        };
        assert_eq!(only.supersede, [id(1), id(2)]);
        assert_eq!((only.newest, only.admit), (Some(id(3)), true));

        // While one runs, none is admitted; the others are superseded all the same.
        pipeline.extend([web(1, Status::Building)]);
        let orders = plan(&pipeline, |_| false, 9, now());
        assert_eq!(orders[0].1.supersede, [id(2)]);
        assert!(!orders[0].1.admit);
        assert!(plan(&pipeline, |_| true, 9, now()).is_empty());
    }

    #[test]
    fn what_is_to_be_cancelled_neither_supersedes_nor_is_admitted() {
        let mut cancelled = entry(2, "staging", "web", Status::Requested);
        cancelled.1.cancelled = true;
        let older = entry(1, "staging", "web", Status::Requested);
        let orders = plan(&Pipeline::from([older, cancelled]), |_| false, 9, now());
        let expected = Orders {
            cancel: vec![id(2)],
            newest: Some(id(1)),
            admit: true,
            ..Orders::default()
        };
        assert_eq!(orders[0].1, expected);
    }

    #[test]
    fn what_a_freeze_holds_gives_way_to_a_newer_one_and_is_not_admitted() {
        let mut held = entry(1, "staging", "web", Status::Packaging);
        held.1.held = true;
        let mut pipeline = Pipeline::from([held]);
        assert!(plan(&pipeline, |_| false, 9, now()).is_empty());

        pipeline.extend([entry(2, "staging", "web", Status::Requested)]);
        let expected = Orders {
            supersede: vec![id(1)],
            newest: Some(id(2)),
            admit: true,
            ..Orders::default()
        };
        assert_eq!(plan(&pipeline, |_| false, 9, now())[0].1, expected);

        // The newer one is held, too: it waits until it is let go.
        pipeline.remove(&id(1));
        pipeline.get_mut(&id(2)).unwrap().held = true;
        assert!(plan(&pipeline, |_| false, 9, now()).is_empty());
    }

    #[test]
    fn production_goes_first_and_the_first_in_line_is_told() {
        let pipeline = Pipeline::from([staging(1), staging(2), production(3), production(4)]);
        assert_eq!(admitted(&pipeline, 1), [(id(3), Some(id(1)))]);
        let first_three = [(id(1), None), (id(3), Some(id(1))), (id(4), Some(id(1)))];
        assert_eq!(admitted(&pipeline, 3), first_three);
        assert_eq!(admitted(&pipeline, 0), []);
    }

    #[test]
    fn whoever_was_overtaken_often_enough_or_waits_too_long_goes_next() {
        let mut often = staging(1);
        often.1.overtaken = OVERTAKEN_MAX;
        let mut pipeline = Pipeline::from([often, production(2)]);
        assert_eq!(admitted(&pipeline, 1), [(id(1), None)]);

        let mut long = staging(1);
        long.1.requested = now() - WAIT_MAX;
        pipeline.extend([long]);
        assert_eq!(admitted(&pipeline, 1), [(id(1), None)]);
    }

    #[test]
    fn what_is_not_built_waits_for_no_capacity_and_takes_none() {
        let mut image = staging(2);
        image.1.builds = false;
        let pipeline = Pipeline::from([staging(1), image]);
        assert_eq!(admitted(&pipeline, 0), [(id(2), None)]);
        assert_eq!(admitted(&pipeline, 1).len(), 2);
    }

    #[test]
    fn a_decision_that_is_being_carried_out_keeps_its_place() {
        let pipeline = Pipeline::from([production(1), staging(2)]);
        let busy = |i: &InstanceRef| i.environment.as_str() == "production";
        assert!(plan(&pipeline, busy, 1, now()).is_empty());
    }

    #[test]
    fn few_are_admitted_before_somebody_builds_and_more_the_more_do() {
        let build = |number: u64| Some(BuildId(Uuid::from_u128(number.into())));
        let mut capacity = Capacity::default();
        let mut free = |pipeline: &Pipeline, status| capacity.free(pipeline, |_, _| status, now());
        let mut pipeline = Pipeline::from([1, 2, 3].map(staging));
        assert_eq!(free(&pipeline, BuildStatus::Requested), AHEAD);
        // One resolves its source, and one waits for somebody who builds.
        for (number, its) in [(1, None), (2, build(2))] {
            let (id, mut entry) = entry(number, "staging", "web", Status::Cloning);
            entry.build = its;
            pipeline.insert(id, entry);
        }
        assert_eq!(free(&pipeline, BuildStatus::Requested), 0);
        // Whoever cannot resolve it for long is not waited for.
        let tired = pipeline.get_mut(&id(1)).unwrap();
        tired.since = now() - RESOLVING - Duration::from_secs(1);
        assert_eq!(free(&pipeline, BuildStatus::Requested), 1);
        // Two that share a build are one.
        pipeline.get_mut(&id(1)).unwrap().build = build(2);
        assert_eq!(free(&pipeline, BuildStatus::Cloning), AHEAD + 2 - 1);
        pipeline.get_mut(&id(1)).unwrap().build = build(1);
        assert_eq!(free(&pipeline, BuildStatus::Building), AHEAD + 4 - 2);
        // That they end gives room at once; how many ran is remembered until nobody waits.
        assert_eq!(free(&pipeline, BuildStatus::Succeeded), AHEAD + 4);
        pipeline.clear();
        assert_eq!(free(&pipeline, BuildStatus::Requested), AHEAD);
        let mut known = Capacity::of(3);
        assert_eq!(
            known.free(&pipeline, |_, _| BuildStatus::Requested, now()),
            AHEAD + 6
        );
    }
}
