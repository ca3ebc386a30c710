//! Who sent a delivery.

use axum::http::{HeaderMap, StatusCode};
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use daybook_events::hook::Provider;
use daybook_secrets::SecretValue;

use super::first;
use crate::problem::Problem;

/// How many signatures of one delivery are looked at: while a key is exchanged there are two.
const SIGNATURES_MAX: usize = 4;

/// Checks that a body was sent by somebody who knows the secret. The answer says as much about a
/// signature that is missing as about one that is wrong, or about a webhook that there is none of.
pub(crate) fn verify(
    provider: Provider,
    secret: &SecretValue,
    headers: &HeaderMap,
    body: &[u8],
) -> Result<(), Problem> {
    let verified = match provider {
        Provider::Github => {
            first(headers, &["x-hub-signature-256"]).is_some_and(|text| hex_of(secret, text, body))
        }
        Provider::Gitea => first(
            headers,
            &[
                "x-gitea-signature",
                "x-forgejo-signature",
                "x-hub-signature-256",
            ],
        )
        .is_some_and(|text| hex_of(secret, text, body)),
        // What has a signature is not taken for its token alone.
        Provider::Gitlab => match headers.get("webhook-signature") {
            Some(_) => standard(secret, headers, body),
            None => headers
                .get("x-gitlab-token")
                .is_some_and(|token| secret.is(token.as_bytes())),
        },
    };
    if verified {
        return Ok(());
    }
    Err(not_signed())
}

/// A delivery that nobody is known to have sent. It says nothing of what there is: whoever knows no
/// secret could find out the names of projects.
pub(crate) fn not_signed() -> Problem {
    Problem::new(
        StatusCode::UNAUTHORIZED,
        "invalid_signature",
        "the delivery is not signed with the secret of a webhook at this address",
        "enter the address and the secret that `daybook hook add` printed at the provider, which then \
         sends X-Hub-Signature-256, webhook-signature, X-Gitlab-Token or X-Gitea-Signature; `daybook \
         hook list` shows the webhooks that there are, and `daybook hook rotate` makes a new secret",
    )
}

fn hex_of(secret: &SecretValue, text: &str, body: &[u8]) -> bool {
    let digits = text.strip_prefix("sha256=").unwrap_or(text);
    hex::decode(digits).is_ok_and(|mac| secret.signed(body, &mac))
}

/// The form of the Standard Webhooks specification, which newer versions of GitLab send.
fn standard(secret: &SecretValue, headers: &HeaderMap, body: &[u8]) -> bool {
    let header = |name| headers.get(name).and_then(|v| v.to_str().ok());
    let (Some(id), Some(timestamp), Some(signatures)) = (
        header("webhook-id"),
        header("webhook-timestamp"),
        header("webhook-signature"),
    ) else {
        return false;
    };
    signatures
        .split(' ')
        .filter_map(|s| STANDARD.decode(s.strip_prefix("v1,")?).ok())
        .take(SIGNATURES_MAX)
        .any(|mac| secret.signed_as_standard_webhook(id, timestamp, body, &mac))
}
