//! Signed statements about deployments that succeeded.

use axum::extract::State;
use axum::http::StatusCode;
use daybook_events::attestation::{PAYLOAD, statement};
use daybook_events::{DeploymentId, Refusal};
use daybook_projections::{AuditFilter, Page};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::answer::Answer;
use crate::extract::{Named, NoParams, Params};
use crate::problem::Problem;
use crate::state::AppState;

/// The event with which a deployment succeeds.
const SUCCEEDED: &str = "deployment.succeeded.v1";

/// An in-toto statement in a signed envelope (DSSE).
#[derive(Debug, Serialize, Deserialize, JsonSchema)]
pub(crate) struct SignedStatement {
    /// The statement in Base64.
    payload: String,
    /// `application/vnd.in-toto+json`
    #[serde(rename = "payloadType")]
    payload_type: String,
    /// The signatures of the ledger.
    signatures: Vec<StatementSignature>,
}

/// A signature of an envelope.
#[derive(Debug, Serialize, Deserialize, JsonSchema)]
pub(crate) struct StatementSignature {
    /// The id of the key, as it stands in its public form: eight hexadecimal digits.
    keyid: String,
    /// The Ed25519 signature in Base64.
    sig: String,
}

/// The in-toto attestation of a deployment that succeeded: an in-toto Statement (v1) about its
/// image and its GitOps commit, in a DSSE envelope that is signed with the keys of the ledger.
#[utoipa::path(get, path = "/api/v1/deployments/{id}/attestation", tag = "deployments",
    params(("id" = String, Path, description = "The deployment.")),
    responses((status = 200, description = "The envelope.", body = SignedStatement)))]
pub(crate) async fn get_attestation(
    State(state): State<AppState>,
    Named(id): Named<DeploymentId>,
    Params(NoParams {}): Params<NoParams>,
) -> Result<Answer<SignedStatement>, Problem> {
    let row = state.projections().deployment(id)?;
    let row = row.ok_or_else(|| {
        Refusal::new(
            "deployment_not_found",
            format!("there is no deployment {id}"),
            "`daybook status` lists them",
        )
    })?;
    let filter = AuditFilter {
        deployment: Some(id),
        kind: Some(SUCCEEDED.into()),
        ..AuditFilter::default()
    };
    let page = Page::new(Some(500), None).map_err(|e| Problem::internal(&e))?;
    let found = state.projections().audit(&filter, page)?;
    // The first time that it did.
    let succeeded = found.items.into_iter().rev().find(|r| r.void.is_none());
    let not_yet = || {
        Problem::new(
            StatusCode::CONFLICT,
            "not_succeeded",
            format!("the deployment {id} has not succeeded"),
            "only what succeeded is attested; `daybook status` says where it is",
        )
    };
    let position = succeeded.ok_or_else(not_yet)?.position;
    let attestor = state.attestor.as_ref().ok_or_else(|| {
        Problem::new(
            StatusCode::SERVICE_UNAVAILABLE,
            "no_ledger_key",
            "this server does not have the keys of the ledger",
            "ask a server that runs the notary, or has its folder of keys in --tlog-keys",
        )
    })?;
    let recorded = state.commands.ledger().log().get(position).await?;
    let event = recorded.and_then(|r| r.event().ok()).ok_or_else(not_yet)?;
    let origin = attestor.origin();
    let said = statement(id, &row.state, &origin, (position, &event)).ok_or_else(not_yet)?;
    let sealed = attestor.seal(PAYLOAD, said.to_string().as_bytes());
    let sealed = serde_json::from_value(sealed).map_err(|e| Problem::internal(&e))?;
    Ok(Answer::ok(sealed))
}
