//! What an event is about beyond its subject: which service, and which run.

use daybook_events::build::Build;
use daybook_events::gitops::{Change, GitopsEvent};
use daybook_events::project::ProjectEvent;
use daybook_events::routing::RoutingEvent;
use daybook_events::subscription::Filter;
use daybook_events::{DeploymentId, Event, ServiceName, Subject};

use crate::store::{Projections, QueryError};

impl Projections {
    /// The service that an event is about, if it is about one. The event must be folded.
    pub fn service_of(
        &self,
        subject: &Subject,
        event: &Event,
    ) -> Result<Option<ServiceName>, QueryError> {
        Ok(match subject {
            Subject::Deployment(_, _, id) => self
                .deployment(*id)?
                .map(|row| row.state.request.instance.service),
            Subject::Build(..) => self
                .folded::<Build>(subject)?
                .state
                .map(|build| build.request.service),
            Subject::Project(_) => match event.payload() {
                Ok(ProjectEvent::ServiceDefined(e)) => Some(e.name),
                _ => None,
            },
            Subject::Routing(_) => match event.payload() {
                Ok(RoutingEvent::Switched(e)) => Some(e.instance.service),
                _ => None,
            },
            Subject::Gitops(_) => match event.payload() {
                Ok(GitopsEvent::Committed(e)) => match e.change {
                    Change::Deploy { service, .. }
                    | Change::Scale { service, .. }
                    | Change::Remove { service, .. } => Some(service),
                    Change::EnvironmentCreated { .. } | Change::EnvironmentDeleted {} => None,
                },
                _ => None,
            },
            Subject::Environment(..)
            | Subject::Domain(_)
            | Subject::Subscription(..)
            | Subject::Ledger
            | Subject::Access
            | Subject::Other(_) => None,
        })
    }

    /// The deployment that an event is about: its own, or the one whose run it belongs to. The
    /// event must be folded.
    pub fn run_of(
        &self,
        subject: &Subject,
        event: &Event,
    ) -> Result<Option<DeploymentId>, QueryError> {
        if let Subject::Deployment(_, _, id) = subject {
            return Ok(Some(*id));
        }
        let id = DeploymentId(event.correlationid);
        Ok(self.deployment(id)?.map(|row| row.id))
    }

    /// Whether a webhook's filter lets an event of its project through. The event must be folded.
    pub fn passes(
        &self,
        filter: &Filter,
        subject: &Subject,
        event: &Event,
    ) -> Result<bool, QueryError> {
        let kind = event.short_kind();
        if !filter.kinds.is_empty() && !filter.kinds.iter().any(|k| k.fits(kind)) {
            return Ok(false);
        }
        if filter.environment.is_some() && filter.environment.as_ref() != subject.environment() {
            return Ok(false);
        }
        if let Some(id) = filter.deployment {
            let own = matches!(subject, Subject::Deployment(_, _, d) if *d == id);
            if !own && event.correlationid != id.0 {
                return Ok(false);
            }
        }
        match &filter.service {
            Some(service) => Ok(self.service_of(subject, event)?.as_ref() == Some(service)),
            None => Ok(true),
        }
    }
}
