//! Webhooks out: whom events are sent to.

use std::collections::BTreeMap;
use std::time::Duration;

use daybook_events::address::is_public;
use daybook_events::secret::SecretRef;
use daybook_events::subscription::{
    self, Command, Created, Endpoint, EndpointUrl, PauseReason, Subscription,
};
use daybook_events::{Decision, Digest, Position, ProjectName, Refusal, Subject, SubscriptionId};
use daybook_secrets::SecretValue;
use jiff::{SignedDuration, Timestamp};
use url::{Host, Url};

use super::{Caller, CommandError, Commands, Done, denied_webhook};
use crate::access::{Over, Verb, authorise};

/// How long the secret before is used beside a new one, if nobody says otherwise.
pub const OVERLAP: Duration = Duration::from_hours(24);
/// The longest that it may be used.
const OVERLAP_MAX: Duration = Duration::from_hours(24 * 7);

/// The entity tag of a webhook's definition: another one for another definition, and for none of what
/// else happens to the webhook.
pub(crate) fn definition_tag(endpoint: &Endpoint) -> String {
    // Texts, numbers and lists can always be written.
    let written = serde_json::to_vec(endpoint).unwrap_or_default();
    let digest = Digest::of(&written);
    format!("\"{}\"", &digest.hex()[..32])
}

/// A decision about a webhook, unless it would change something and the webhook is not defined as
/// one of the expected tags says. What is so already is not refused, as the request may be repeated.
fn as_read<E>(
    decision: Decision<E>,
    expected: Option<&[String]>,
    now: Option<&Subscription>,
) -> Result<Decision<E>, Refusal> {
    let (Decision::Append(_), Some(expected), Some(now)) = (&decision, expected, now) else {
        return Ok(decision);
    };
    if expected.contains(&definition_tag(&now.endpoint)) {
        return Ok(decision);
    }
    Err(match expected.is_empty() {
        true => Refusal::new(
            "webhook_changed",
            "no entity tag was given that could match: weak ones never do",
            "send the member `etag` of the webhook in If-Match, as it is; what stands between you and \
             the server may have made the ETag weak",
        ),
        false => Refusal::new(
            "webhook_changed",
            "the webhook is not defined any more as it was when it was read",
            "read it again, and change what it is now, with its new ETag in If-Match; without \
             If-Match it is changed whatever it is",
        ),
    })
}

/// A webhook whose secret was just made.
pub struct WithSecret {
    /// How it was recorded.
    pub done: Done,
    /// Its id.
    pub id: SubscriptionId,
    /// What its deliveries are signed with. It is shown to whoever asked, and to nobody else.
    pub secret: SecretValue,
}

impl std::fmt::Debug for WithSecret {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("WithSecret")
            .field("done", &self.done)
            .field("id", &self.id)
            .finish_non_exhaustive()
    }
}

impl Commands {
    /// A webhook that was not deleted, with its project.
    pub fn webhook(&self, id: SubscriptionId) -> Result<(ProjectName, Subscription), CommandError> {
        let found = self.ledger.projections().subscription(id)?;
        let found = found.filter(|(_, s)| !s.deleted);
        Ok(found.ok_or_else(subscription::not_found)?)
    }

    /// Sends the events of a project that come after a position to an endpoint. The secret is kept
    /// first and recorded then, as a commitment.
    pub async fn create_webhook(
        &self,
        caller: &Caller,
        project: ProjectName,
        endpoint: Endpoint,
        after: Option<Position>,
    ) -> Result<WithSecret, CommandError> {
        self.admit(caller, Verb::Configure, &project)?;
        let id = SubscriptionId(caller.deployment_id().0);
        let subject = Subject::Subscription(project.clone(), id);
        if let Some((done, _)) = self.earlier(caller).await? {
            return self.with_secret(&project, id, done).await;
        }
        self.project(&project)?;
        self.allowed(&endpoint)?;
        let head = self.ledger.log().head().await?;
        let after = after.unwrap_or(head);
        if after > head {
            return Err(Refusal::new(
                "position_ahead",
                format!("the log ends at {head}, before {after}"),
                "give a position that exists, 0 for all events, or none for those to come",
            )
            .into());
        }
        let secret = self.new_secret(&project, id, 1).await?;
        let created = Box::new(Created {
            id,
            endpoint,
            after,
            secret,
        });
        let done = self
            .run::<Subscription>(caller, &subject, None, |state| {
                subscription::decide(state, Command::Create(created.clone()))
            })
            .await?;
        self.with_secret(&project, id, done).await
    }

    /// Defines a webhook anew. If tags are `expected`, one of them must be the [`definition_tag`] of
    /// what it is: else somebody has defined it meanwhile. What is so already is not refused, as the
    /// request may be repeated.
    pub async fn change_webhook(
        &self,
        caller: &Caller,
        id: SubscriptionId,
        endpoint: Endpoint,
        expected: Option<Vec<String>>,
    ) -> Result<Done, CommandError> {
        self.allowed(&endpoint)?;
        let (project, _) = self.webhook(id)?;
        Self::admit_to_webhook(caller, &project)?;
        let subject = Subject::Subscription(project, id);
        self.run::<Subscription>(caller, &subject, None, |state| {
            let decision = subscription::decide(state, Command::Change(endpoint.clone()))?;
            as_read(decision, expected.as_deref(), state)
        })
        .await
    }

    /// Gives a webhook another secret. For a time, deliveries are signed with both.
    pub async fn rotate_webhook(
        &self,
        caller: &Caller,
        id: SubscriptionId,
        overlap: Duration,
    ) -> Result<WithSecret, CommandError> {
        let (project, before) = self.webhook(id)?;
        Self::admit_to_webhook(caller, &project)?;
        if let Some((done, _)) = self.earlier(caller).await? {
            return self.with_secret(&project, id, done).await;
        }
        if overlap > OVERLAP_MAX {
            return Err(Refusal::new(
                "overlap_too_long",
                "an old secret may be used for at most seven days more",
                "give a shorter time",
            )
            .into());
        }
        let now = Timestamp::now();
        let running = before.previous.as_ref().filter(|p| now < p.until);
        if let (Some(running), false) = (running, overlap.is_zero()) {
            return Err(Refusal::new(
                "overlap_running",
                format!(
                    "receivers were given until {} to take the newest secret over, and at most two are in use",
                    running.until
                ),
                "wait until then, or end all older secrets at once with `--overlap 0`",
            )
            .into());
        }
        let ends_now = overlap.is_zero();
        let overlap = SignedDuration::try_from(overlap).unwrap_or(SignedDuration::ZERO);
        let overlap_until = now.saturating_add(overlap).unwrap_or(Timestamp::MAX);
        let version = before.secret.version.saturating_add(1);
        let secret = self.new_secret(&project, id, version).await?;
        let made = secret.id();
        let command = Command::Rotate {
            secret,
            overlap_until,
        };
        let store = self.secret_store()?;
        let done = match self.webhook_command(caller, id, command).await {
            // It was deleted meanwhile, and nobody else would erase this.
            Err(CommandError::Refused(refusal)) if refusal.code == "webhook_not_found" => {
                store.erase(&project, &made).await?;
                return Err(CommandError::Refused(refusal));
            }
            done => done?,
        };
        // Two secrets are in use at most; the one before those is not needed any more. Without an
        // overlap the one before is not either; else whoever delivers erases it when it ends.
        let unused = ends_now.then_some(before.secret);
        for old in before.previous.map(|p| p.secret).into_iter().chain(unused) {
            store.erase(&project, &old.id()).await?;
        }
        self.with_secret(&project, id, done).await
    }

    /// Sends nothing any more, until it is resumed.
    pub async fn pause_webhook(
        &self,
        caller: &Caller,
        id: SubscriptionId,
    ) -> Result<Done, CommandError> {
        self.webhook_command(caller, id, Command::Pause(PauseReason::Asked))
            .await
    }

    /// Sends again, from where it stopped.
    pub async fn resume_webhook(
        &self,
        caller: &Caller,
        id: SubscriptionId,
    ) -> Result<Done, CommandError> {
        self.webhook_command(caller, id, Command::Resume).await
    }

    /// Sends the event that this makes.
    pub async fn test_webhook(
        &self,
        caller: &Caller,
        id: SubscriptionId,
    ) -> Result<Done, CommandError> {
        self.webhook_command(caller, id, Command::Test).await
    }

    /// Sends again what was set aside: these events, or all.
    pub async fn replay_webhook(
        &self,
        caller: &Caller,
        id: SubscriptionId,
        positions: Option<Vec<Position>>,
    ) -> Result<Done, CommandError> {
        self.webhook_command(caller, id, Command::Replay(positions))
            .await
    }

    /// Never sends what was set aside: these events, or all.
    pub async fn discard_webhook(
        &self,
        caller: &Caller,
        id: SubscriptionId,
        positions: Option<Vec<Position>>,
    ) -> Result<Done, CommandError> {
        self.webhook_command(caller, id, Command::Discard(positions))
            .await
    }

    /// Deletes a webhook, and erases its secrets. If tags are expected, only while its definition has
    /// one of them.
    pub async fn delete_webhook(
        &self,
        caller: &Caller,
        id: SubscriptionId,
        expected: Option<Vec<String>>,
    ) -> Result<Done, CommandError> {
        let found = self.ledger.projections().subscription(id)?;
        let (project, _) = found.ok_or_else(subscription::not_found)?;
        Self::admit_to_webhook(caller, &project)?;
        let subject = Subject::Subscription(project.clone(), id);
        let done = self
            .run::<Subscription>(caller, &subject, None, |state| {
                let decision = subscription::decide(state, Command::Delete)?;
                as_read(decision, expected.as_deref(), state)
            })
            .await?;
        // Only now: a rotation may have come between.
        let found = self.ledger.projections().subscription(id)?;
        let (_, state) = found.ok_or_else(subscription::not_found)?;
        let store = self.secret_store()?;
        let previous = state.previous.map(|p| p.secret);
        for secret in std::iter::once(state.secret).chain(previous) {
            store.erase(&project, &secret.id()).await?;
        }
        Ok(done)
    }

    async fn webhook_command(
        &self,
        caller: &Caller,
        id: SubscriptionId,
        command: Command,
    ) -> Result<Done, CommandError> {
        let (project, _) = self.webhook(id)?;
        Self::admit_to_webhook(caller, &project)?;
        let subject = Subject::Subscription(project, id);
        self.run::<Subscription>(caller, &subject, None, |state| {
            subscription::decide(state, command.clone())
        })
        .await
    }

    /// Whether the caller may change a webhook of this project.
    fn admit_to_webhook(caller: &Caller, project: &ProjectName) -> Result<(), CommandError> {
        authorise(&caller.principal, Verb::Configure, Over::Project(project))
            .map_err(denied_webhook)
    }

    /// Makes a secret and keeps it.
    async fn new_secret(
        &self,
        project: &ProjectName,
        id: SubscriptionId,
        version: u32,
    ) -> Result<SecretRef, CommandError> {
        let value = SecretValue::new_key().map_err(|e| {
            Refusal::new(
                "no_random_numbers",
                format!("the system gives no random numbers: {e}"),
                "try again later",
            )
        })?;
        let id = Subscription::secret_id(id, version)?;
        let committed = self.secret_store()?.put(project, &id, &value).await?;
        Ok(SecretRef {
            secret: id.name,
            scope: id.scope,
            version,
            commitment: committed.commitment,
        })
    }

    /// The secret that an event gave to a webhook.
    async fn with_secret(
        &self,
        project: &ProjectName,
        id: SubscriptionId,
        done: Done,
    ) -> Result<WithSecret, CommandError> {
        use daybook_events::subscription::SubscriptionEvent as E;
        let event = self.event(done.event.unwrap_or(done.position)).await?;
        let reference = match event.payload::<E>() {
            Ok(E::Created(e)) => e.secret,
            Ok(E::SecretRotated(e)) => e.secret,
            _ => return Err(subscription::not_found().into()),
        };
        let variable = reference.secret.clone();
        let wanted = BTreeMap::from([(variable.clone(), reference)]);
        let mut found = self.secret_store()?.resolve(project, &wanted).await?;
        let secret = found.remove(&variable).ok_or_else(|| {
            Refusal::new(
                "secret_missing",
                "the secret of the webhook is not in the secret store",
                "make a new one with `daybook webhook rotate`",
            )
        })?;
        Ok(WithSecret { done, id, secret })
    }

    /// Refuses what could never be sent to. What a name stands for is looked at when it is sent.
    fn allowed(&self, endpoint: &Endpoint) -> Result<(), Refusal> {
        if self.settings.allow_private_webhooks {
            return Ok(());
        }
        if !endpoint.url.as_str().starts_with("https://") {
            return Err(Refusal::new(
                "webhook_needs_tls",
                format!("{} is not an https URL", endpoint.url),
                "use https, or start the server with --allow-private-webhooks",
            ));
        }
        if is_elsewhere(&endpoint.url) {
            return Ok(());
        }
        Err(Refusal::new(
            "webhook_address_refused",
            format!("{} is at no public address", endpoint.url),
            "name a receiver on the public internet, or start the server with \
             --allow-private-webhooks",
        ))
    }
}

/// Whether a receiver may be on the public internet, as far as its URL says it.
fn is_elsewhere(url: &EndpointUrl) -> bool {
    let Ok(url) = Url::parse(url.as_str()) else {
        return false;
    };
    match url.host() {
        Some(Host::Ipv4(address)) => is_public(address.into()),
        Some(Host::Ipv6(address)) => is_public(address.into()),
        Some(Host::Domain(name)) => {
            // RFC 6761: this machine, whatever a resolver says.
            let name = name.trim_end_matches('.');
            name != "localhost" && !name.ends_with(".localhost")
        }
        None => false,
    }
}
