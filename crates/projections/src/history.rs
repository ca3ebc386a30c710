//! The history row of a deployment, made from its state.

use daybook_events::DeploymentId;
use daybook_events::deployment::Deployment;

use crate::slot::Origin;
use crate::views::{HistoryRow, version_text};

/// The row of a deployment. `active` says whether traffic goes to it.
pub(crate) fn row(
    id: DeploymentId,
    state: &Deployment,
    origin: &Origin,
    active: bool,
) -> HistoryRow {
    let instance = &state.request.instance;
    let source = state.source.as_ref().or(origin.source.as_ref());
    let (outcome, outcome_code) = match (&state.failure, &state.cancelled) {
        (Some(f), _) => (Some(f.message.clone()), Some(f.code.clone())),
        (None, Some(c)) => (Some(c.message.clone()), Some("cancelled".to_owned())),
        (None, None) => (None, None),
    };
    HistoryRow {
        deployment: id,
        position: origin.created,
        project: instance.project.clone(),
        environment: instance.environment.clone(),
        service: instance.service.clone(),
        image_tag: state.image.as_ref().map(|i| i.tag.clone()),
        digest: state.digest().cloned(),
        active,
        timestamp: state.created_at,
        revision: state.commit.clone(),
        message: origin.message.as_ref().map(|(_, m)| m.clone()),
        version: version_text(state),
        source_commit: source.map(|s| s.commit.clone()),
        source_commit_message: source.map(|s| s.message.clone()),
        source_url: source.map(|s| s.url.clone()),
        status: state.status,
        status_since: state.status_since,
        phase: state.status.phase(),
        actor: origin.actor.clone(),
        reason: state.request.reason.clone(),
        outcome,
        outcome_code,
        redeploy_of: state.request.redeploy_of,
    }
}
