//! Where a deployment stands that waits to be admitted, and why it waits.

use std::collections::BTreeMap;

use daybook_events::admission::{self, Waiting};
use daybook_events::deployment::{Status, Version};
use daybook_events::environment::Environment;
use daybook_events::{InstanceRef, Subject};
use daybook_projections::{DeploymentRow, Projections, QueryError};
use jiff::Timestamp;
use schemars::JsonSchema;
use serde::Serialize;

use crate::metrics::{Exposition, since};

/// A deployment that waits.
#[derive(Debug, Serialize, JsonSchema)]
pub(crate) struct QueueView {
    /// Its place among those that wait for build capacity, from 1, if nobody else comes; none if
    /// it waits for something else.
    pub(crate) position: Option<usize>,
    /// How many wait for build capacity.
    pub(crate) waiting: usize,
    /// Why it waits.
    pub(crate) reason: String,
}

impl QueueView {
    fn other(reason: impl Into<String>) -> Self {
        Self {
            position: None,
            waiting: 0,
            reason: reason.into(),
        }
    }
}

/// Where a deployment stands; none once it is admitted.
pub(crate) fn of(
    projections: &Projections,
    row: &DeploymentRow,
) -> Result<Option<QueueView>, QueryError> {
    if row.state.status != Status::Requested {
        return Ok(None);
    }
    if row.state.cancel.is_some() {
        return Ok(Some(QueueView::other("it is being cancelled")));
    }
    if let Some(held) = row.state.held() {
        let reason = format!("its environment is frozen by {}", held.freeze);
        return Ok(Some(QueueView::other(reason)));
    }
    let pipeline = projections.pipeline()?;
    if let Some(reason) = behind_its_own(&pipeline, row) {
        return Ok(Some(QueueView::other(reason)));
    }
    let waiting = waiting(projections, &pipeline)?;
    let count = waiting.len();
    let order = admission::order(waiting, Timestamp::now());
    let Some(ahead) = order.iter().position(|w| w.id == row.id) else {
        return Ok(Some(QueueView::other("it is about to be admitted")));
    };
    let later = order.iter().take(ahead).filter(|w| w.created > row.created);
    Ok(Some(QueueView {
        position: Some(ahead + 1),
        waiting: count,
        reason: behind_others(ahead, later.count()),
    }))
}

/// How many deployments wait to be admitted, by what they wait for.
#[derive(Debug, Default)]
pub(crate) struct QueueCount {
    capacity: usize,
    freeze: usize,
    other: usize,
    oldest: Option<Timestamp>,
}

impl QueueCount {
    /// Writes the figures.
    pub(crate) fn write(&self, page: &mut Exposition, now: Timestamp) {
        let name = "daybook_queue_deployments";
        page.head(
            name,
            "gauge",
            "Deployments that wait to be admitted, by what for: build capacity, the end of a \
             freeze, or something else, such as another deployment of their service.",
        );
        let counts = [
            ("capacity", self.capacity),
            ("freeze", self.freeze),
            ("other", self.other),
        ];
        for (reason, count) in counts {
            page.sample(name, &[("reason", reason)], count as f64);
        }
        page.gauge(
            "daybook_queue_oldest_seconds",
            "How long the oldest deployment waits that waits for build capacity; 0 if there is none.",
            self.oldest.map_or(0.0, |at| since(at, now)),
        );
    }
}

/// Counts the deployments that wait to be admitted.
pub(crate) fn count(projections: &Projections) -> Result<QueueCount, QueryError> {
    let mut pipeline = projections.pipeline()?;
    let waiting = waiting(projections, &pipeline)?;
    pipeline.retain(|row| row.state.status == Status::Requested);
    let is_waiting = |row: &DeploymentRow| waiting.iter().any(|w| w.id == row.id);
    let mut counted = QueueCount::default();
    for row in &pipeline {
        if row.state.held().is_some() {
            counted.freeze += 1;
        } else if is_waiting(row) {
            counted.capacity += 1;
            let since = row.state.created_at;
            counted.oldest = Some(counted.oldest.map_or(since, |o| o.min(since)));
        } else {
            counted.other += 1;
        }
    }
    Ok(counted)
}

/// Why it waits for another deployment of its service instance, if it does.
fn behind_its_own(pipeline: &[DeploymentRow], row: &DeploymentRow) -> Option<String> {
    let instance = &row.state.request.instance;
    let of_it = || {
        pipeline
            .iter()
            .filter(|r| r.state.request.instance == *instance)
    };
    let newer = of_it().find(|r| r.created > row.created && r.state.cancel.is_none());
    if let Some(newer) = newer {
        let newer = newer.id.short();
        return Some(format!(
            "the newer deployment {newer} of its service takes its place"
        ));
    }
    let running = of_it().find(|r| r.state.status.holds_instance() && r.state.held().is_none())?;
    let (id, status) = (running.id.short(), running.state.status.as_str());
    Some(format!(
        "deployment {id} of its service is {}; it goes next",
        status.replace('_', " ")
    ))
}

/// Why it waits for build capacity, with so many ahead of it, some of which came later.
fn behind_others(ahead: usize, later: usize) -> String {
    let go_first = match ahead {
        0 => return "it is built next, as soon as a build worker is free".to_owned(),
        1 => "another deployment goes first".to_owned(),
        n => format!("{n} other deployments go first"),
    };
    let although = match later {
        0 => String::new(),
        all if all == ahead => ", to production, although asked for later".to_owned(),
        some => format!(", {some} of them to production, although asked for later"),
    };
    format!("all build workers are busy, and {go_first}{although}")
}

/// The deployments that wait for nothing but build capacity.
fn waiting(
    projections: &Projections,
    pipeline: &[DeploymentRow],
) -> Result<Vec<Waiting>, QueryError> {
    // Of each instance the newest that waits; none while one of it runs.
    let mut newest = BTreeMap::<&InstanceRef, Option<&DeploymentRow>>::new();
    for row in pipeline {
        let next = newest.entry(&row.state.request.instance).or_default();
        if row.state.cancel.is_none() && next.is_none_or(|n| n.created < row.created) {
            *next = Some(row);
        }
    }
    let runs = |r: &&DeploymentRow| r.state.status.holds_instance() && r.state.held().is_none();
    for row in pipeline.iter().filter(runs) {
        newest.insert(&row.state.request.instance, None);
    }
    let mut waiting = Vec::new();
    for (instance, row) in newest {
        let Some(row) = row.filter(|r| r.state.held().is_none()) else {
            continue;
        };
        if !matches!(row.state.request.version, Version::Git { .. }) {
            continue;
        }
        let subject = Subject::Environment(instance.project.clone(), instance.environment.clone());
        let environment = projections.shared::<Environment>(&subject)?;
        let live = environment.state.as_ref().is_some_and(|e| e.spec.live);
        waiting.push(Waiting {
            id: row.id,
            created: row.created,
            since: row.state.created_at,
            production: admission::goes_first(&instance.environment, live),
            overtaken: row.state.overtaken.len(),
        });
    }
    Ok(waiting)
}

#[cfg(test)]
mod tests {
    use super::behind_others;

    #[test]
    fn the_reason_says_how_many_go_first_and_how_many_of_them_came_later() {
        let same = [
            (0, 0, "it is built next, as soon as a build worker is free"),
            (
                1,
                0,
                "all build workers are busy, and another deployment goes first",
            ),
            (
                1,
                1,
                "all build workers are busy, and another deployment goes first, to production, \
                 although asked for later",
            ),
            (
                3,
                1,
                "all build workers are busy, and 3 other deployments go first, 1 of them to \
                 production, although asked for later",
            ),
        ];
        for (ahead, later, reason) in same {
            assert_eq!(behind_others(ahead, later), reason);
        }
    }
}
