//! Tokens: made, given another secret, and taken no longer.

use std::time::Duration;

use daybook_events::access::{
    self, Access, AccountName, Command, Grant, NewEnd, TokenCreated, TokenId,
};
use daybook_events::{Actor, EventId, Refusal, Subject};
use daybook_projections::ExecuteError;
use jiff::Timestamp;
use uuid::Uuid;

use super::{Caller, CommandError, Commands, Done, check};
use crate::access::token::SecretToken;
use crate::access::{Over, Verb, authorise};

/// The longest that the secret before a rotation may go on being taken.
const OVERLAP_MAX: Duration = Duration::from_secs(7 * 24 * 3600);

/// The longest that the first token waits to be folded.
const FIRST_WAIT: Duration = Duration::from_secs(30);

/// What the id of the first token's event is derived from: there is one first token, whoever makes
/// it.
const FIRST: Uuid = Uuid::from_u128(0x3c9b_51d0_7a44_5f6e_8d02_94c1_6ee7_b3a5);

/// What a token is to be.
#[derive(Debug, Clone)]
pub struct TokenWish {
    /// What it is called.
    pub name: AccountName,
    /// Who acts with it; its name, if not given.
    pub account: Option<AccountName>,
    /// What it may do.
    pub grants: Vec<Grant>,
    /// When it ends by itself.
    pub expires_at: Option<Timestamp>,
}

/// A token that has a new secret.
#[derive(Debug)]
pub struct MadeToken {
    /// The token, with its secret, which nobody can show again.
    pub token: SecretToken,
    /// What was recorded.
    pub done: Done,
}

impl TokenWish {
    fn created(self, token: &SecretToken) -> TokenCreated {
        TokenCreated {
            token: token.id().clone(),
            account: self.account.unwrap_or_else(|| self.name.clone()),
            name: self.name,
            digest: token.digest(),
            grants: self.grants,
            expires_at: self.expires_at,
        }
    }
}

impl Commands {
    /// Makes a token. A repetition under the same key makes no other one, and is refused, as the
    /// secret is shown once: whoever lost the answer revokes the token.
    pub async fn create_token(
        &self,
        caller: &Caller,
        wish: TokenWish,
    ) -> Result<MadeToken, CommandError> {
        self.admit_everywhere(caller, Verb::Administer)?;
        self.not_shown_yet(caller).await?;
        in_future(wish.expires_at)?;
        let token = SecretToken::generate()?;
        let created = wish.created(&token);
        let done = self
            .run::<Access>(caller, &Subject::Access, None, |state| {
                access::decide(state, Command::Create(created.clone()))
            })
            .await?;
        made(token, done)
    }

    /// Gives a token another secret. The one before is taken for `overlap` longer.
    pub async fn rotate_token(
        &self,
        caller: &Caller,
        id: TokenId,
        overlap: Duration,
        end: NewEnd,
    ) -> Result<MadeToken, CommandError> {
        self.admit_everywhere(caller, Verb::Administer)?;
        self.not_shown_yet(caller).await?;
        if overlap > OVERLAP_MAX {
            return Err(Refusal::new(
                "overlap_too_long",
                "the old secret would be taken for more than 7 days",
                "give a shorter overlap",
            )
            .into());
        }
        let token = SecretToken::for_id(id.clone())?;
        let digest = token.digest();
        let now = Timestamp::now();
        let old_until = (!overlap.is_zero()).then(|| now + overlap);
        let done = self
            .run::<Access>(caller, &Subject::Access, None, |state| {
                let command = Command::Rotate {
                    token: id.clone(),
                    digest: digest.clone(),
                    old_until,
                    end,
                    now,
                };
                access::decide(state, command)
            })
            .await?;
        made(token, done)
    }

    /// Takes a token no longer. What it has open ends within a second.
    pub async fn revoke_token(
        &self,
        caller: &Caller,
        token: TokenId,
        reason: Option<String>,
    ) -> Result<Done, CommandError> {
        self.admit_everywhere(caller, Verb::Administer)?;
        check::text("reason", reason.as_deref())?;
        self.run::<Access>(caller, &Subject::Access, None, |state| {
            let (token, reason) = (token.clone(), reason.clone());
            access::decide(state, Command::Revoke { token, reason })
        })
        .await
    }

    /// Makes the first token of all, which administers everything; none if there ever was a token.
    /// However many processes ask at once, one of them gets it.
    pub async fn first_token(&self) -> Result<Option<SecretToken>, CommandError> {
        let token = SecretToken::generate()?;
        let name = AccountName::parse("admin")?;
        let wish = TokenWish {
            name,
            account: None,
            grants: vec![Grant {
                role: access::Role::Admin,
                projects: access::Projects::All,
            }],
            expires_at: None,
        };
        let created = wish.created(&token);
        let caller = Caller::new(Actor::system("access"));
        let id = EventId::derived(FIRST, "token");
        let context = caller.context(id, id.0);
        let executed = self
            .ledger
            .execute(&Subject::Access, &context, |state: Option<&Access>| {
                access::decide(state, Command::Begin(created.clone()))
            })
            .await?;
        let projections = self.ledger.projections();
        if let Some(position) = executed.position() {
            let waited = projections.wait_for(position, FIRST_WAIT).await;
            waited.map_err(ExecuteError::Behind)?;
        }
        // Somebody may have been faster; or an answer was lost, and the token is this one all the
        // same. The fold knows.
        let folded = projections.shared::<Access>(&Subject::Access)?;
        let kept = folded.state.as_ref().and_then(|a| a.tokens.get(token.id()));
        Ok(kept
            .is_some_and(|t| t.digest == created.digest)
            .then_some(token))
    }

    /// Refuses to repeat what has shown a secret.
    async fn not_shown_yet(&self, caller: &Caller) -> Result<(), CommandError> {
        match self.earlier(caller).await? {
            Some(_) => Err(shown_once().into()),
            None => Ok(()),
        }
    }

    fn admit_everywhere(&self, caller: &Caller, verb: Verb) -> Result<(), CommandError> {
        Ok(authorise(&caller.principal, verb, Over::Everything)?)
    }
}

fn made(token: SecretToken, done: Done) -> Result<MadeToken, CommandError> {
    match done.replayed {
        true => Err(shown_once().into()),
        false => Ok(MadeToken { token, done }),
    }
}

fn shown_once() -> Refusal {
    Refusal::new(
        "secret_shown_once",
        "the first request with this key has done it, and its answer alone had the secret",
        "if that answer is lost, revoke the token and make another one",
    )
}

fn in_future(end: Option<Timestamp>) -> Result<(), Refusal> {
    match end {
        Some(end) if end <= Timestamp::now() => Err(Refusal::new(
            "expiry_in_past",
            "the token would have ended already",
            "give a time that is still to come",
        )),
        _ => Ok(()),
    }
}
