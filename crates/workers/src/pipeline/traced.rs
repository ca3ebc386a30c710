//! Units of work about one deployment, in the trace of what led to its present state: for what is
//! not woken by a single event, and so has no trace to go on with.

use std::future::Future;

use daybook_events::deployment::Deployment;
use daybook_events::{ClusterName, DeploymentId, Event, InstanceRef, TraceParent};
use daybook_projections::DeploymentRow;
use daybook_trace::{KeyValue, Kind, Work, attribute};

use super::{Bench, Stop};

/// What a unit of work is about.
#[derive(Debug, Clone, Copy)]
pub(crate) struct About<'a> {
    id: DeploymentId,
    instance: &'a InstanceRef,
    cluster: Option<&'a ClusterName>,
    trace: Option<TraceParent>,
}

impl<'a> About<'a> {
    /// About a deployment.
    pub(crate) fn of(row: &'a DeploymentRow) -> Self {
        Self::state(row.id, &row.state)
    }

    /// About a deployment with this state. What happens to one that is where somebody wanted it is
    /// no part of how it came there, and begins a trace of its own.
    pub(crate) fn state(id: DeploymentId, state: &'a Deployment) -> Self {
        let trace = state.trace.filter(|_| !state.status.is_settled());
        Self::of_instance(id, &state.request.instance, trace)
    }

    /// About a deployment of an instance, in this trace.
    pub(crate) fn of_instance(
        id: DeploymentId,
        instance: &'a InstanceRef,
        trace: Option<TraceParent>,
    ) -> Self {
        Self {
            id,
            instance,
            cluster: None,
            trace,
        }
    }

    /// In this cluster.
    pub(crate) fn in_cluster(self, cluster: &'a ClusterName) -> Self {
        Self {
            cluster: Some(cluster),
            ..self
        }
    }

    /// In a trace of its own.
    pub(crate) fn apart(self) -> Self {
        Self {
            trace: None,
            ..self
        }
    }

    /// The trace that it is in.
    pub(crate) fn trace(&self) -> Option<TraceParent> {
        self.trace
    }

    /// The attributes of its span.
    pub(crate) fn attributes(&self) -> Vec<KeyValue> {
        let mut all = vec![
            KeyValue::new(attribute::DEPLOYMENT, self.id.to_string()),
            KeyValue::new(attribute::PROJECT, self.instance.project.to_string()),
            KeyValue::new(
                attribute::ENVIRONMENT,
                self.instance.environment.to_string(),
            ),
            KeyValue::new(attribute::SERVICE, self.instance.service.to_string()),
        ];
        if let Some(cluster) = self.cluster {
            all.push(KeyValue::new(attribute::CLUSTER, cluster.to_string()));
        }
        all
    }
}

/// Says of the unit of work that this is a part of in which cluster it is done.
pub(crate) fn in_cluster(cluster: &ClusterName) {
    daybook_trace::say(|| vec![KeyValue::new(attribute::CLUSTER, cluster.to_string())]);
}

impl Bench {
    /// Does a unit of work of a role, with a span of its own unless nothing comes of it.
    pub(crate) async fn work<T>(
        &self,
        role: &'static str,
        about: About<'_>,
        work: impl Future<Output = Result<T, Stop>>,
    ) -> Result<T, Stop> {
        let link = daybook_trace::current();
        let unit = Work::linked(role, Kind::Internal, about.trace, link, || {
            about.attributes()
        });
        let result = unit.run(work).await;
        match &result {
            Err(Stop::Fail(error)) => unit.fail(error.code.clone()),
            Err(Stop::Retry(_)) => unit.fail("retry"),
            Ok(_) | Err(Stop::Moved(_) | Stop::Interrupted) if !unit.is_touched() => {
                unit.leave_out();
            }
            _ => {}
        }
        result
    }

    /// Does what follows for a deployment on something that it shares with others, such as a build
    /// or a table of routes: in the deployment's own trace, linked to that of the event that it
    /// follows on, unless that is about this very deployment.
    pub(crate) async fn in_its_own_trace<T>(
        &self,
        role: &'static str,
        id: DeploymentId,
        event: &Event,
        work: impl Future<Output = T>,
    ) -> T {
        let here = daybook_trace::current().filter(|_| event.correlationid != id.0);
        let Some(here) = here else {
            return work.await;
        };
        let row = self.row(id).ok().flatten();
        let other = row.as_ref().filter(|row| {
            let trace = row.state.trace.map(|t| t.trace());
            trace != Some(here.trace())
        });
        let Some(row) = other else {
            return work.await;
        };
        let state = &row.state;
        let about = About::of_instance(id, &state.request.instance, state.trace);
        let unit = Work::linked(role, Kind::Internal, about.trace, Some(here), || {
            about.attributes()
        });
        let result = unit.run(work).await;
        if !unit.is_touched() {
            unit.leave_out();
        }
        result
    }
}
