//! Which events a reader wants, the same for pages, streams and sockets.

use std::time::Duration;

use daybook_events::access::Projects;
use daybook_events::envelope;
use daybook_events::feed::FeedFilter;
use daybook_events::{
    AggregateKind, EnvironmentName, Event, Position, ProjectName, Refusal, ServiceName, Subject,
    SubjectFilter,
};
use daybook_projections::Projections;

use crate::access::Principal;
use crate::extract::deployment_id;
use crate::problem::Problem;

/// How long a filter waits for the fold to know whose event it sees, before it asks again.
const FOLD_WAIT: Duration = Duration::from_secs(5);

/// What events must be about, as a request says it.
#[derive(Debug, Clone, Default)]
pub(crate) struct WantedEvents {
    pub(crate) project: Option<String>,
    pub(crate) environment: Option<String>,
    pub(crate) service: Option<String>,
    pub(crate) kind: Option<String>,
    pub(crate) deployment: Option<String>,
}

/// What events must be about.
#[derive(Debug, Clone, Default)]
pub(crate) struct EventFilter {
    /// What the reader may see at all.
    visible: Projects,
    /// What the log itself can tell apart.
    pub(crate) subjects: SubjectFilter,
    /// All of it, in the form that the feed's chain begins with.
    pub(crate) feed: FeedFilter,
    /// The exact type, if one is wanted.
    kind: Option<String>,
}

impl EventFilter {
    pub(crate) fn parse(wanted: WantedEvents, principal: &Principal) -> Result<Self, Problem> {
        let (aggregate, kind) = wanted.kind.map_or(Ok((None, None)), kind)?;
        let deployment = wanted.deployment.as_deref().map(deployment_id);
        let feed = FeedFilter {
            project: wanted.project.map(ProjectName::parse).transpose()?,
            environment: wanted.environment.map(EnvironmentName::parse).transpose()?,
            service: wanted.service.map(ServiceName::parse).transpose()?,
            kind: kind
                .clone()
                .or_else(|| aggregate.map(|a| a.as_str().to_owned())),
            deployment: deployment.transpose()?,
        };
        Ok(Self {
            visible: principal.visible().clone(),
            subjects: SubjectFilter {
                project: feed.project.clone(),
                environment: feed.environment.clone(),
                aggregate,
                subject: None,
            },
            feed,
            kind,
        })
    }

    /// All events of one aggregate, which the reader may see.
    pub(crate) fn exactly(subject: Subject) -> Self {
        Self {
            subjects: SubjectFilter::exactly(subject),
            ..Self::default()
        }
    }

    /// Whether an event fits. Whose it is may be known only once it is folded: then this waits.
    pub(crate) async fn wants(
        &self,
        projections: &Projections,
        subject: &Subject,
        position: Position,
        event: Option<&Event>,
    ) -> bool {
        if !self.subjects.matches(subject) || !self.visible.sees(subject.project()) {
            return false;
        }
        let FeedFilter {
            service,
            deployment,
            ..
        } = &self.feed;
        if self.kind.is_none() && service.is_none() && deployment.is_none() {
            return true;
        }
        let Some(event) = event else {
            return false;
        };
        if self
            .kind
            .as_deref()
            .is_some_and(|k| k != event.short_kind())
        {
            return false;
        }
        if let Some(id) = deployment {
            let own = matches!(subject, Subject::Deployment(_, _, d) if d == id);
            if !own && event.correlationid != id.0 {
                return false;
            }
        }
        let Some(service) = service else {
            return true;
        };
        while projections.wait_for(position, FOLD_WAIT).await.is_err() {
            tracing::debug!(%position, "a stream waits for the projections");
        }
        match projections.service_of(subject, event) {
            Ok(found) => found.as_ref() == Some(service),
            Err(e) => {
                tracing::error!(error = %e, "the service of an event could not be found");
                false
            }
        }
    }
}

/// Reads an event type or the name of an aggregate.
fn kind(text: String) -> Result<(Option<AggregateKind>, Option<String>), Problem> {
    let short = text.strip_prefix(envelope::TYPE_PREFIX).unwrap_or(&text);
    let (family, exact) = match short.split_once('.') {
        Some((family, _)) => (family, Some(short.to_owned())),
        None => (short, None),
    };
    match family.parse() {
        Ok(aggregate) => Ok((Some(aggregate), exact)),
        Err(_) => {
            let known: Vec<_> = AggregateKind::ALL.iter().map(|k| k.as_str()).collect();
            Err(Refusal::new(
                "unknown_kind",
                "there is no such kind of event",
                format!(
                    "use an event type such as deployment.requested.v1, or one of: {}",
                    known.join(", ")
                ),
            )
            .into())
        }
    }
}
