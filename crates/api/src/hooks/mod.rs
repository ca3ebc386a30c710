//! Webhooks of GitHub, GitLab, Gitea and Forgejo: who sent a delivery, and what it says.
//!
//! A delivery is read in this order, each step only if the one before it succeeded: at most
//! [`DELIVERY_MAX`] bytes of body, the signature over exactly these bytes, and then its JSON.
//! Nothing of it is looked at before its signature is verified but the headers.

mod signature;

use axum::http::{HeaderMap, StatusCode};
use daybook_events::hook::Provider;

use crate::problem::Problem;

pub(crate) use signature::{not_signed, verify};

/// Most bytes of a delivery. Those of pull requests have some 50 KiB; a push of very many commits
/// can have more than this, and is then better deployed by hand.
pub(crate) const DELIVERY_MAX: usize = 4 * 1024 * 1024;

/// What the headers of a delivery say of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Envelope {
    /// What happened, in the provider's words.
    pub(crate) event: String,
    /// The provider's id of the delivery: the same for each repetition of it.
    pub(crate) id: Option<String>,
}

impl Envelope {
    /// Reads the headers.
    pub(crate) fn of(provider: Provider, headers: &HeaderMap) -> Result<Self, Problem> {
        let (events, ids): (&[&str], &[&str]) = match provider {
            Provider::Github => (&["x-github-event"], &["x-github-delivery"]),
            Provider::Gitlab => (
                &["x-gitlab-event"],
                &["webhook-id", "idempotency-key", "x-gitlab-event-uuid"],
            ),
            Provider::Gitea => (
                &["x-gitea-event", "x-forgejo-event"],
                &["x-gitea-delivery", "x-forgejo-delivery"],
            ),
        };
        let event = first(headers, events).ok_or_else(|| {
            Problem::new(
                StatusCode::BAD_REQUEST,
                "event_missing",
                format!("the request has no header {}", events[0]),
                format!("send deliveries of {provider} here, or add a webhook for what you use"),
            )
        })?;
        Ok(Self {
            event: event.to_owned(),
            id: first(headers, ids).map(str::to_owned),
        })
    }
}

/// The first of these headers that is there, as text.
fn first<'a>(headers: &'a HeaderMap, names: &[&str]) -> Option<&'a str> {
    let mut values = names.iter().filter_map(|name| headers.get(*name));
    values
        .find_map(|value| value.to_str().ok())
        .filter(|text| (1..=255).contains(&text.len()))
}
