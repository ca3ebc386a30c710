//! What is attested about a deployment that succeeded: an in-toto Statement (v1), and the port to
//! whoever signs it.

use std::fmt;

use serde_json::{Value, json};

use crate::Event;
use crate::deployment::{Deployment, Status, Version};
use crate::log::Position;
use crate::names::DeploymentId;

/// The type of the statement.
pub const STATEMENT: &str = "https://in-toto.io/Statement/v1";
/// The type of what is said in it.
pub const PREDICATE: &str = "https://daybook.dev/attestation/deployment/v1";
/// The media type of a statement in an envelope.
pub const PAYLOAD: &str = "application/vnd.in-toto+json";

/// Signs in the name of the ledger.
pub trait Attestor: fmt::Debug + Send + Sync {
    /// Whose ledger it is.
    fn origin(&self) -> String;

    /// The payload in a signed envelope (DSSE).
    fn seal(&self, payload_type: &str, payload: &[u8]) -> Value;
}

/// The statement about a deployment, given the event with which it succeeded; none if nothing about
/// it has a digest yet. It is made of what does not change any more.
pub fn statement(
    id: DeploymentId,
    state: &Deployment,
    origin: &str,
    (position, event): (Position, &Event),
) -> Option<Value> {
    let request = &state.request;
    let instance = &request.instance;
    let mut subjects = Vec::new();
    if let Some(image) = &state.image {
        subjects.push(json!({
            "name": image.repository.to_string(),
            "digest": { "sha256": image.digest.hex() },
        }));
    }
    if let Some(chart) = &state.chart {
        subjects.push(json!({
            "name": chart.chart.to_string(),
            "digest": { "sha256": chart.digest.hex() },
        }));
    }
    if let Some(commit) = &state.commit {
        subjects.push(json!({
            "name": format!("{}/gitops", instance.project),
            "digest": { "gitCommit": commit },
        }));
    }
    if subjects.is_empty() {
        return None;
    }
    let asked_for = match &request.version {
        Version::Git { url, git_ref, .. } => json!({ "repository": url, "ref": git_ref }),
        other => json!({ "version": other.to_string() }),
    };
    let source = state
        .source
        .as_ref()
        .map(|s| json!({ "uri": s.url, "digest": { "gitCommit": s.commit } }));
    let approval = state.approval.as_ref().map(|a| {
        let by: Vec<_> = a.grants.iter().map(|g| &g.approver).collect();
        json!({ "plan": a.hash, "grantedBy": by, "emergency": a.emergency.is_some() })
    });
    Some(json!({
        "_type": STATEMENT,
        "subject": subjects,
        "predicateType": PREDICATE,
        "predicate": {
            "deployment": id,
            "target": {
                "project": instance.project,
                "environment": instance.environment,
                "service": instance.service,
                "clusters": request.clusters,
            },
            "requested": asked_for,
            "source": source,
            "requestedAt": state.created_at,
            "startedAt": state.milestones.entered.get(&Status::Queued),
            "succeededAt": event.time,
            "approval": approval,
            "ledger": {
                "origin": origin,
                "position": position,
                "event": event.id,
            },
        },
    }))
}
