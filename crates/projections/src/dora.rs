//! The four measures of software delivery by DORA (dora.dev), counted from events alone: whoever
//! has the ledger gets the same numbers.
//!
//! What is counted, for each service instance, in a period `[from, to)` of the events' own times:
//!
//! - a *deployment* is a deployment that becomes the main one of its instance for the first time,
//!   by the event that switches the traffic to it: because it is ready, because somebody marks it or
//!   shifts all shares of the traffic to it, or as the heir of one that ends. One that never gets
//!   the traffic is none, and what a rollback goes back to is none;
//! - its *lead time* runs from its commit, as the source repository dates it, to that event. Only
//!   the first deployment of a commit has one: what is deployed again is no new change. An image
//!   that was promoted has the commit of where it was promoted from; one from elsewhere has none;
//! - it is a *failed change* if a rollback takes the traffic from it before the period ends;
//! - the *time to restore* runs from the event that gave the failed change the traffic to the one of
//!   the rollback.
//!
//! A switch that could not be applied and was undone counts for nothing. Deployments that ended
//! before they got the traffic are counted beside this: they hurt nobody.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use daybook_events::access::Projects;
use daybook_events::deployment::Requested;
use daybook_events::routing::{Routing, RoutingEvent, SwitchReason, Switched};
use daybook_events::{
    CommitId, DeploymentId, EnvironmentName, EventId, Folded, InstanceRef, Position, ProjectName,
    Recorded, ServiceName, Subject, SubjectFilter,
};
use jiff::Timestamp;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::audit::AuditFilter;
use crate::ledger::Ledger;
use crate::page::Page;
use crate::past::PastError;
use crate::store::{QueryError, lock};

/// The type of the event that ends what never got the traffic.
const FAILED: &str = "deployment.failed.v1";
/// How often an image may have been promoted or deployed again, for its commit to be found.
pub const MOST_STEPS: usize = 32;

/// An event that was counted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Counted {
    /// Its position in the ledger.
    pub position: Position,
    /// Its id.
    pub event: EventId,
    /// When it happened.
    pub time: Timestamp,
    /// The deployment that it is counted for.
    pub deployment: DeploymentId,
}

/// What a deployment was made from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Change {
    /// The commit of its source.
    pub commit: CommitId,
    /// When that was made.
    pub committed_at: Timestamp,
}

/// The measures of one service instance.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Delivery {
    /// `project.environment.service`.
    pub instance_id: String,
    /// Deployments that got the traffic.
    pub deployments: u64,
    /// The same, for each day of the period.
    pub deployments_per_day: f64,
    /// From the commit to the traffic.
    pub lead_time: Spread,
    /// Deployments of the period from which a rollback took the traffic.
    pub failed_changes: u64,
    /// Their share; none if there was no deployment.
    pub change_failure_rate: Option<f64>,
    /// From when a failed change got the traffic until it was taken from it.
    pub time_to_restore: Spread,
    /// Deployments that ended before they got the traffic.
    pub failed_before: u64,
    /// What all this was counted from.
    pub counted: Evidence,
}

/// How long something took, in milliseconds; each value is one that was measured (nearest rank).
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Spread {
    /// How many were measured.
    pub samples: u64,
    /// The middle one; the lower one of two.
    pub median_ms: Option<i64>,
    /// Nine of ten took no longer.
    pub p90_ms: Option<i64>,
}

/// The events behind the numbers, in the order of the ledger.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Evidence {
    /// The switches that gave a deployment the traffic for the first time.
    pub deployments: Vec<Counted>,
    /// The lead times, by the switch that ends each.
    pub lead_times: Vec<LeadTime>,
    /// The rollbacks in the period.
    pub restores: Vec<Restore>,
    /// The ends of deployments that never got the traffic.
    pub failed_before: Vec<Counted>,
}

/// One lead time.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct LeadTime {
    /// The deployment.
    pub deployment: DeploymentId,
    /// The commit.
    pub commit: CommitId,
    /// When it was made.
    pub committed_at: Timestamp,
    /// From there to the switch. Nothing is below 0, whatever the clocks say.
    pub ms: i64,
}

/// One way back.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Restore {
    /// The rollback, counted for the deployment that it takes the traffic from.
    pub rollback: Counted,
    /// The switch that gave that deployment the traffic.
    pub failed: Option<Counted>,
    /// From there to the rollback; none if the ledger does not have that switch.
    pub ms: Option<i64>,
}

/// From when, and before when.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Period {
    /// From this time on.
    pub from: Timestamp,
    /// Before this time.
    pub to: Timestamp,
}

impl Period {
    fn has(&self, time: Timestamp) -> bool {
        self.from <= time && time < self.to
    }

    /// Its length in days.
    fn days(&self) -> f64 {
        // A period of some thousand years has fewer milliseconds than an f64 counts exactly.
        #[expect(clippy::cast_precision_loss)]
        let ms = (self.to.as_millisecond() - self.from.as_millisecond()) as f64;
        ms / 86_400_000.0
    }
}

/// Counts, from the events in the order of the ledger.
#[derive(Debug)]
pub struct Counter {
    period: Period,
    instances: BTreeMap<InstanceRef, Instance>,
}

#[derive(Debug, Default)]
struct Instance {
    /// The switches that gave each deployment the traffic, in the order of the ledger.
    given: BTreeMap<DeploymentId, Vec<Given>>,
    changes: BTreeMap<DeploymentId, Change>,
    rollbacks: Vec<Rollback>,
    failed: Vec<Counted>,
}

/// A switch that gave a deployment the traffic.
#[derive(Debug)]
struct Given {
    switch: Counted,
    /// The number of the table that it made.
    table: u32,
    /// Whether it was a rollback, which delivers nothing.
    back: bool,
}

#[derive(Debug)]
struct Rollback {
    restore: Restore,
    /// The number of the table that it made.
    table: u32,
    /// That of the table that had given the traffic to what was rolled back.
    failed: Option<u32>,
}

impl Counter {
    /// For a period.
    pub fn new(period: Period) -> Self {
        Self {
            period,
            instances: BTreeMap::new(),
        }
    }

    /// A switch. `change` says what a deployment was made from, and is asked for those that get the
    /// traffic for the first time.
    pub fn switched(
        &mut self,
        position: Position,
        event: EventId,
        time: Timestamp,
        e: &Switched,
        change: impl FnOnce(DeploymentId) -> Option<Change>,
    ) {
        let instance = self.instances.entry(e.instance.clone()).or_default();
        // Where the traffic had moved on before, the compensation restores hostnames only.
        if e.reason == SwitchReason::Compensation {
            instance.undo(e.undoes);
            return;
        }
        let Some(main) = &e.main else {
            return;
        };
        let at = |deployment| Counted {
            position,
            event,
            time,
            deployment,
        };
        let back = e.reason == SwitchReason::Rollback;
        if let (true, Some(failed)) = (back, main.previous) {
            let given = instance.given.get(&failed).and_then(|all| all.last());
            instance.rollbacks.push(Rollback {
                restore: Restore {
                    rollback: at(failed),
                    failed: given.map(|g| g.switch),
                    ms: given.map(|g| millis(g.switch.time, time)),
                },
                table: e.table,
                failed: given.map(|g| g.table),
            });
        }
        // Whatever led the traffic to it: that it became ready, somebody who marked it or shifted
        // all shares to it, or the end of the one before.
        let Some(next) = main.next else {
            return;
        };
        let all = instance.given.entry(next).or_default();
        let first = !back && all.iter().all(|g| g.back);
        all.push(Given {
            switch: at(next),
            table: e.table,
            back,
        });
        if first && let Some(change) = change(next) {
            instance.changes.insert(next, change);
        }
    }

    /// A deployment ended as failed.
    pub fn failed(
        &mut self,
        position: Position,
        event: EventId,
        time: Timestamp,
        (instance, deployment): (&InstanceRef, DeploymentId),
    ) {
        let counted = Counted {
            position,
            event,
            time,
            deployment,
        };
        let instance = self.instances.entry(instance.clone()).or_default();
        instance.failed.push(counted);
    }

    /// The measures of all instances of which anything was counted in the period.
    pub fn measures(&self) -> Vec<Delivery> {
        let all = self.instances.iter();
        let measured = all.filter_map(|(name, instance)| instance.measure(name, self.period));
        measured.collect()
    }
}

impl Instance {
    /// Forgets what a table did that could not be applied.
    fn undo(&mut self, table: Option<u32>) {
        let Some(table) = table else {
            return;
        };
        self.rollbacks
            .retain(|r| r.table != table && r.failed != Some(table));
        for all in self.given.values_mut() {
            all.retain(|g| g.table != table);
        }
        self.given.retain(|_, all| !all.is_empty());
    }

    /// The switches that gave a deployment the traffic for the first time, in the order of the
    /// ledger.
    fn deliveries(&self) -> Vec<Counted> {
        let first = |all: &Vec<Given>| all.iter().find(|g| !g.back).map(|g| g.switch);
        let mut mains: Vec<Counted> = self.given.values().filter_map(first).collect();
        mains.sort_by_key(|c| c.position);
        mains
    }

    fn measure(&self, name: &InstanceRef, period: Period) -> Option<Delivery> {
        let mut deployments = self.deliveries();
        let mains: BTreeSet<DeploymentId> = deployments.iter().map(|c| c.deployment).collect();
        // The first deployments of their commits.
        let mut commits = BTreeMap::new();
        for c in &deployments {
            if let Some(change) = self.changes.get(&c.deployment) {
                commits.entry(&change.commit).or_insert(c.deployment);
            }
        }
        deployments.retain(|c| period.has(c.time));
        let lead_times: Vec<LeadTime> = deployments
            .iter()
            .filter_map(|c| {
                let change = self.changes.get(&c.deployment)?;
                let first = commits.get(&change.commit) == Some(&c.deployment);
                first.then(|| LeadTime {
                    deployment: c.deployment,
                    commit: change.commit.clone(),
                    committed_at: change.committed_at,
                    ms: millis(change.committed_at, c.time),
                })
            })
            .collect();
        let rollbacks = self.rollbacks.iter().map(|r| &r.restore);
        let restores: Vec<Restore> = rollbacks
            .clone()
            .filter(|r| period.has(r.rollback.time))
            .cloned()
            .collect();
        let failed: BTreeSet<DeploymentId> = rollbacks
            .filter(|r| r.rollback.time < period.to)
            .map(|r| r.rollback.deployment)
            .collect();
        let failed = deployments
            .iter()
            .filter(|c| failed.contains(&c.deployment));
        let failed = failed.count() as u64;
        let mut failed_before = self.failed.clone();
        failed_before.retain(|c| period.has(c.time) && !mains.contains(&c.deployment));
        if deployments.is_empty() && restores.is_empty() && failed_before.is_empty() {
            return None;
        }
        let count = deployments.len() as u64;
        Some(Delivery {
            instance_id: name.to_string(),
            deployments: count,
            deployments_per_day: three_digits(ratio(count, period.days())),
            lead_time: Spread::of(lead_times.iter().map(|l| l.ms)),
            failed_changes: failed,
            change_failure_rate: (count > 0)
                .then(|| three_digits(ratio(failed, 1.0) / ratio(count, 1.0))),
            time_to_restore: Spread::of(restores.iter().filter_map(|r| r.ms)),
            failed_before: failed_before.len() as u64,
            counted: Evidence {
                deployments,
                lead_times,
                restores,
                failed_before,
            },
        })
    }
}

/// Whose deliveries are counted; all that is given must fit.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Scope {
    /// Only of projects that whoever asks may see: of others nothing is read.
    pub visible: Projects,
    /// Of this project.
    pub project: Option<ProjectName>,
    /// Of this environment.
    pub environment: Option<EnvironmentName>,
    /// Of this service.
    pub service: Option<ServiceName>,
}

impl Scope {
    /// Whether an instance is among them.
    pub fn has(&self, instance: &InstanceRef) -> bool {
        self.visible.contains(&instance.project)
            && self.project.as_ref().is_none_or(|p| *p == instance.project)
            && self
                .environment
                .as_ref()
                .is_none_or(|e| *e == instance.environment)
            && self.service.as_ref().is_none_or(|s| *s == instance.service)
    }
}

/// The route switches of a project that count in the fold, in the order of the ledger.
#[derive(Debug, Clone, Default)]
pub(crate) struct Switches {
    routing: Folded<Routing>,
    counting: Vec<Switch>,
}

#[derive(Debug, Clone)]
struct Switch {
    position: Position,
    event: EventId,
    time: Timestamp,
    /// Without what it changed of the routes.
    switched: Switched,
}

impl Switches {
    fn take(&mut self, recorded: &[Recorded]) {
        for recorded in recorded {
            let Ok(event) = recorded.event() else {
                self.routing.position = recorded.position;
                continue;
            };
            // What does not count in the fold does not count here.
            if self.routing.apply(recorded.position, &event).is_err() {
                self.routing.position = recorded.position;
                continue;
            }
            let Ok(RoutingEvent::Switched(mut switched)) = event.payload() else {
                continue;
            };
            switched.changes = Vec::new();
            self.counting.push(Switch {
                position: recorded.position,
                event: event.id,
                time: event.time,
                switched: *switched,
            });
        }
    }
}

/// How many switches of all projects together are kept at hand.
const KEPT: usize = 50_000;
/// How many events are read at once.
const READ: usize = 500;

impl Ledger {
    /// The measures of delivery, and the position up to which events were counted. Reads the route
    /// switches of each project from the log, and the rest from the projections.
    pub async fn deliveries(
        &self,
        scope: &Scope,
        period: Period,
    ) -> Result<(Vec<Delivery>, Position), PastError> {
        let projections = self.projections();
        let position = projections.position();
        let mut counter = Counter::new(period);
        let projects = match &scope.project {
            Some(project) => vec![project.clone()],
            None => projections
                .projects()?
                .into_iter()
                .map(|p| p.name)
                .collect(),
        };
        for project in projects {
            if !scope.visible.contains(&project) {
                continue;
            }
            let mut failed = None;
            let switches = self.switches(&project).await?;
            for switch in &switches.counting {
                if switch.position > position || !scope.has(&switch.switched.instance) {
                    continue;
                }
                let Switch {
                    position,
                    event,
                    time,
                    switched,
                } = switch;
                counter.switched(*position, *event, *time, switched, |id| {
                    self.change_of(id).unwrap_or_else(|e| {
                        failed = Some(e);
                        None
                    })
                });
            }
            if let Some(error) = failed {
                return Err(error.into());
            }
            self.count_failed(&mut counter, scope, project, position)?;
        }
        Ok((counter.measures(), position))
    }

    /// The route switches of a project. Those that were read before are at hand: what is read is what
    /// was switched since.
    async fn switches(&self, project: &ProjectName) -> Result<Arc<Switches>, PastError> {
        let subject = Subject::Routing(project.clone());
        let last = self.projections().shared::<Routing>(&subject)?.position;
        let known = lock(&self.switches).get(project).cloned();
        let mut switches = match known {
            Some(known) if known.routing.position == last => return Ok(known),
            Some(known) if known.routing.position < last => (*known).clone(),
            // The ledger was set back.
            _ => Switches::default(),
        };
        if switches.routing.position == Position::ZERO {
            let all = self.log().read_aggregate(&subject).await?;
            switches.take(&all);
        } else {
            let filter = SubjectFilter::exactly(subject);
            loop {
                let after = switches.routing.position;
                let more = self.log().read(after, &filter, READ).await?;
                switches.take(&more);
                if more.len() < READ {
                    break;
                }
            }
        }
        let switches = Arc::new(switches);
        let mut kept = lock(&self.switches);
        kept.insert(project.clone(), switches.clone());
        let count = kept.values().map(|s| s.counting.len() + 1).sum::<usize>();
        if count > KEPT {
            kept.clear();
        }
        Ok(switches)
    }

    /// What a deployment was made from: its own source, or that of the one whose image it has.
    fn change_of(&self, id: DeploymentId) -> Result<Option<Change>, QueryError> {
        let mut next = Some(id);
        for _ in 0..MOST_STEPS {
            let Some(row) = next
                .map(|id| self.projections().deployment(id))
                .transpose()?
            else {
                return Ok(None);
            };
            let Some(state) = row.map(|row| row.state) else {
                return Ok(None);
            };
            if let Some(source) = state.source {
                return Ok(Some(Change {
                    commit: source.commit,
                    committed_at: source.committed_at,
                }));
            }
            next = before(&state.request);
        }
        Ok(None)
    }

    fn count_failed(
        &self,
        counter: &mut Counter,
        scope: &Scope,
        project: ProjectName,
        until: Position,
    ) -> Result<(), QueryError> {
        let filter = AuditFilter {
            project: Some(project),
            environment: scope.environment.clone(),
            service: scope.service.clone(),
            kind: Some(FAILED.to_owned()),
            from: Some(counter.period.from),
            until: Some(counter.period.to),
            ..AuditFilter::default()
        };
        let mut page = Page::largest();
        let mut found = Vec::new();
        loop {
            let part = self.projections().audit(&filter, page)?;
            found.extend(part.items);
            match part.next {
                Some(cursor) => page = page.starting(cursor),
                None => break,
            }
        }
        // The audit has the newest first.
        for row in found.into_iter().rev() {
            let (Some(event), Some(deployment)) = (row.id, row.deployment) else {
                continue;
            };
            let (Some(project), Some(environment), Some(service)) =
                (row.project, row.environment, row.service)
            else {
                continue;
            };
            if row.void.is_some() || row.position > until {
                continue;
            }
            let instance = InstanceRef {
                project,
                environment,
                service,
            };
            counter.failed(row.position, event, row.time, (&instance, deployment));
        }
        Ok(())
    }
}

/// The deployment whose image a deployment has, where it was not built for it.
pub fn before(request: &Requested) -> Option<DeploymentId> {
    let promoted = request.promoted_from.as_ref().map(|p| p.deployment);
    request.redeploy_of.or(promoted)
}

fn millis(from: Timestamp, to: Timestamp) -> i64 {
    (to.as_millisecond() - from.as_millisecond()).max(0)
}

#[expect(clippy::cast_precision_loss)]
fn ratio(count: u64, of: f64) -> f64 {
    if of > 0.0 { count as f64 / of } else { 0.0 }
}

/// Rounded so that it is written the same everywhere.
fn three_digits(value: f64) -> f64 {
    (value * 1000.0).round() / 1000.0
}

impl Spread {
    fn of(values: impl Iterator<Item = i64>) -> Self {
        let mut sorted: Vec<i64> = values.collect();
        sorted.sort_unstable();
        let rank = |percent: usize| {
            let rank = (sorted.len() * percent).div_ceil(100).max(1);
            sorted.get(rank - 1).copied()
        };
        Self {
            samples: sorted.len() as u64,
            median_ms: rank(50),
            p90_ms: rank(90),
        }
    }
}

#[cfg(test)]
mod tests {
    use daybook_events::routing::MainChange;
    use daybook_events::testing::{samples, time};

    use super::*;

    const HOUR: i64 = 3_600_000;

    fn id(number: u64) -> DeploymentId {
        samples::deployment_id(number)
    }

    /// A counter, and what has happened to it so far.
    struct Story {
        counter: Counter,
        instance: InstanceRef,
        table: u32,
    }

    impl Story {
        /// Of the first hundred hours.
        fn new() -> Self {
            let period = Period {
                from: at(0),
                to: at(100),
            };
            Self {
                counter: Counter::new(period),
                instance: samples::instance("shop.production.web"),
                table: 0,
            }
        }

        /// Traffic goes from one deployment to another. Each has a commit of its own, which was made
        /// an hour before.
        fn switch(&mut self, hour: u64, reason: SwitchReason, from: u64, to: u64) -> u32 {
            self.switch_of(hour, reason, (from, to), to, None)
        }

        fn switch_of(
            &mut self,
            hour: u64,
            reason: SwitchReason,
            (from, to): (u64, u64),
            commit: u64,
            undoes: Option<u32>,
        ) -> u32 {
            let main = MainChange {
                previous: (from > 0).then(|| id(from)),
                next: (to > 0).then(|| id(to)),
            };
            self.happens(hour, reason, Some(main), (to, commit), undoes)
        }

        /// A compensation that leaves the main deployment as it is.
        fn restored(&mut self, hour: u64, undoes: u32) -> u32 {
            let reason = SwitchReason::Compensation;
            self.happens(hour, reason, None, (1, 1), Some(undoes))
        }

        fn happens(
            &mut self,
            hour: u64,
            reason: SwitchReason,
            main: Option<MainChange>,
            (of, commit): (u64, u64),
            undoes: Option<u32>,
        ) -> u32 {
            self.table += 1;
            let e = Switched {
                table: self.table,
                reason,
                instance: self.instance.clone(),
                deployment: id(of),
                changes: Vec::new(),
                main,
                rolled_back: reason == SwitchReason::Rollback,
                was_rolled_back: false,
                undoes,
                note: None,
                policy: None,
                domain: None,
            };
            let position = Position(u64::from(self.table));
            let event = EventId::derived(uuid::Uuid::NAMESPACE_OID, &position.to_string());
            let change = |_| {
                Some(Change {
                    commit: samples::commit(commit),
                    committed_at: at(hour - 1),
                })
            };
            self.counter.switched(position, event, at(hour), &e, change);
            self.table
        }

        fn measured(&self) -> Delivery {
            let mut all = self.counter.measures();
            assert_eq!(all.len(), 1);
            all.remove(0)
        }
    }

    fn at(hour: u64) -> Timestamp {
        time(0) + jiff::SignedDuration::from_hours(i64::try_from(hour).unwrap())
    }

    #[test]
    fn a_rollback_makes_a_failed_change_and_ends_it() {
        let mut story = Story::new();
        story.switch(10, SwitchReason::Deploy, 0, 1);
        story.switch(20, SwitchReason::MarkMain, 1, 2);
        story.switch(25, SwitchReason::Rollback, 2, 1);
        let measured = story.measured();
        assert_eq!((measured.deployments, measured.failed_changes), (2, 1));
        assert_eq!(measured.change_failure_rate, Some(0.5));
        assert_eq!(measured.lead_time.median_ms, Some(HOUR));
        assert_eq!(measured.time_to_restore.median_ms, Some(5 * HOUR));
        assert_eq!(measured.deployments_per_day, 0.48);
        // What is marked again is no further deployment.
        story.switch(30, SwitchReason::MarkMain, 1, 2);
        assert_eq!(story.measured().deployments, 2);
    }

    #[test]
    fn what_could_not_be_applied_counts_for_nothing() {
        let mut story = Story::new();
        story.switch(10, SwitchReason::Deploy, 0, 1);
        let undone = story.switch(20, SwitchReason::Deploy, 1, 2);
        story.switch_of(20, SwitchReason::Compensation, (2, 1), 1, Some(undone));
        let measured = story.measured();
        assert_eq!((measured.deployments, measured.lead_time.samples), (1, 1));
        story.switch(30, SwitchReason::Deploy, 1, 3);
        let undone = story.switch(40, SwitchReason::Rollback, 3, 1);
        story.switch_of(40, SwitchReason::Compensation, (1, 3), 3, Some(undone));
        let measured = story.measured();
        assert_eq!((measured.deployments, measured.failed_changes), (2, 0));
        assert_eq!(measured.time_to_restore.samples, 0);
    }

    #[test]
    fn whatever_leads_the_traffic_to_a_deployment_delivers_it() {
        // A canary: it gets a share first, which makes it no main one, and then all of it.
        let mut story = Story::new();
        story.switch(10, SwitchReason::MarkMain, 0, 1);
        story.switch(20, SwitchReason::Split, 1, 2);
        story.switch(26, SwitchReason::Rollback, 2, 1);
        let measured = story.measured();
        assert_eq!((measured.deployments, measured.failed_changes), (2, 1));
        assert_eq!(measured.lead_time.samples, 2);
        assert_eq!(measured.time_to_restore.median_ms, Some(6 * HOUR));
        let restore = &measured.counted.restores[0];
        assert_eq!(restore.failed.unwrap().deployment, id(2));
        // Marked later, it is no further deployment.
        story.switch(30, SwitchReason::MarkMain, 1, 2);
        assert_eq!(story.measured().deployments, 2);
        // An heir, of one that is removed and of one that is stopped.
        story.switch(40, SwitchReason::Withdraw, 2, 3);
        story.switch(50, SwitchReason::Leave, 3, 4);
        let measured = story.measured();
        assert_eq!((measured.deployments, measured.lead_time.samples), (4, 4));
        // One that ends without an heir delivers nothing.
        story.switch(60, SwitchReason::Withdraw, 4, 0);
        assert_eq!(story.measured().deployments, 4);
    }

    #[test]
    fn what_is_undone_counts_for_nothing_also_if_the_traffic_has_moved_on() {
        let mut story = Story::new();
        story.switch(10, SwitchReason::Deploy, 0, 1);
        let undone = story.switch(20, SwitchReason::Deploy, 1, 2);
        story.switch(21, SwitchReason::Rollback, 2, 1);
        // Only hostnames are left to be restored.
        story.restored(22, undone);
        let measured = story.measured();
        assert_eq!((measured.deployments, measured.failed_changes), (1, 0));
        assert_eq!(measured.lead_time.samples, 1);
        assert_eq!(measured.time_to_restore.samples, 0);
        // Given the traffic again, it is delivered by that.
        story.switch(30, SwitchReason::MarkMain, 1, 2);
        let measured = story.measured();
        assert_eq!((measured.deployments, measured.lead_time.samples), (2, 2));
        assert_eq!(measured.counted.deployments[1].time, at(30));
    }

    #[test]
    fn a_commit_is_delivered_once_and_a_period_has_an_end() {
        let mut story = Story::new();
        story.switch_of(10, SwitchReason::Deploy, (0, 1), 1, None);
        story.switch_of(20, SwitchReason::Deploy, (1, 2), 1, None);
        story.switch(120, SwitchReason::Rollback, 2, 1);
        story.switch(130, SwitchReason::Deploy, 1, 3);
        let measured = story.measured();
        assert_eq!((measured.deployments, measured.lead_time.samples), (2, 1));
        assert_eq!(measured.failed_changes, 0);
    }

    #[test]
    fn ranks_are_values_that_were_measured() {
        let of = |values: &[i64]| {
            let spread = Spread::of(values.iter().copied());
            (spread.median_ms, spread.p90_ms)
        };
        assert_eq!(of(&[]), (None, None));
        assert_eq!(of(&[7]), (Some(7), Some(7)));
        assert_eq!(of(&[4, 1, 3, 2]), (Some(2), Some(4)));
        let ten: Vec<i64> = (1..=10).collect();
        assert_eq!(of(&ten), (Some(5), Some(9)));
    }
}
