//! The access aggregate: which API tokens there are, and what each may do. There is one.
//!
//! All tokens are one aggregate, because what must never happen concerns all of them: two first
//! administrators, two tokens with one name, or none that may administer. The last is kept without a
//! clock: one token without an end administers everything, always. The ledger holds the
//! digest of a token's secret only. A plain SHA-256 is enough, as the secret is 256 random bits:
//! there is no dictionary to try, so nothing is won by making each try slow.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use jiff::Timestamp;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::aggregate::{Aggregate, At, Decision, Illegal, Refusal, events};
use crate::envelope::Payload;
use crate::names::{Digest, ProjectName, validated};
use crate::subject::AggregateKind;

/// Most tokens that are not revoked.
pub const TOKENS_MAX: usize = 1000;
/// Most revoked tokens that are kept to be shown; older ones are found in the audit.
pub const REVOKED_MAX: usize = 200;
/// Most grants of a token.
pub const GRANTS_MAX: usize = 20;
/// Most projects that a grant names.
pub const PROJECTS_MAX: usize = 100;

validated! {
    /// The id of a token: twelve hexadecimal digits.
    TokenId, "token id", "invalid_token_id",
    pattern = "^[0-9a-f]{12}$",
    |text| {
        let digits = text.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'));
        if digits && text.len() == 12 { Ok(()) } else { Err("it has twelve digits of 0-9 and a-f") }
    }
}
validated! {
    /// Whose a token is, or what it is called: the name of an account or of a program, and no
    /// personal data.
    AccountName, "account name", "invalid_account_name",
    pattern = "^[A-Za-z0-9._@-]{1,64}$",
    |text| {
        let fits = text.bytes().all(|b| b.is_ascii_alphanumeric() || b"._@-".contains(&b));
        if fits && (1..=64).contains(&text.len()) {
            Ok(())
        } else {
            Err("it has 1 to 64 letters, digits and . _ @ -")
        }
    }
}

/// What somebody may do. No role contains another one, except that `admin` may do everything.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, JsonSchema,
)]
#[serde(rename_all = "snake_case")]
pub enum Role {
    /// Sees what runs, what ran, and its output.
    Viewer,
    /// Deploys, and changes what runs.
    Deployer,
    /// Allows or refuses what is to be deployed.
    Approver,
    /// Sees everything, and what belongs to no project: accesses and the ledger itself.
    Auditor,
    /// Everything, and who may do what.
    Admin,
}

impl Role {
    /// All roles.
    pub const ALL: [Self; 5] = [
        Self::Viewer,
        Self::Deployer,
        Self::Approver,
        Self::Auditor,
        Self::Admin,
    ];

    /// Its name.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Viewer => "viewer",
            Self::Deployer => "deployer",
            Self::Approver => "approver",
            Self::Auditor => "auditor",
            Self::Admin => "admin",
        }
    }
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl std::str::FromStr for Role {
    type Err = Refusal;

    fn from_str(text: &str) -> Result<Self, Refusal> {
        Self::ALL
            .into_iter()
            .find(|role| role.as_str() == text)
            .ok_or_else(|| {
                Refusal::new(
                    "invalid_role",
                    "there is no such role",
                    "use one of: viewer, deployer, approver, auditor, admin",
                )
            })
    }
}

/// Projects that something holds for.
#[derive(Debug, Clone, Default, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Projects {
    /// All of them, those to come too, and what belongs to none.
    #[default]
    All,
    /// These.
    Named(BTreeSet<ProjectName>),
}

impl Projects {
    /// Whether this project is among them.
    pub fn contains(&self, project: &ProjectName) -> bool {
        match self {
            Self::All => true,
            Self::Named(names) => names.contains(project),
        }
    }

    /// Whether what belongs to this project, or to none, is to be seen.
    pub fn sees(&self, project: Option<&ProjectName>) -> bool {
        match (self, project) {
            (Self::All, _) => true,
            (Self::Named(_), None) => false,
            (Self::Named(names), Some(project)) => names.contains(project),
        }
    }

    /// These and those.
    #[must_use]
    pub fn union(self, other: &Self) -> Self {
        match (self, other) {
            (Self::Named(mut ours), Self::Named(theirs)) => {
                ours.extend(theirs.iter().cloned());
                Self::Named(ours)
            }
            _ => Self::All,
        }
    }
}

/// A role in some projects.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Grant {
    /// The role.
    pub role: Role,
    /// Where.
    pub projects: Projects,
}

/// A token was made.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct TokenCreated {
    /// Its id.
    pub token: TokenId,
    /// What it is called.
    pub name: AccountName,
    /// Who acts with it: the actor of the events that follow.
    pub account: AccountName,
    /// SHA-256 of its secret.
    pub digest: Digest,
    /// What it may do.
    pub grants: Vec<Grant>,
    /// When it ends by itself.
    pub expires_at: Option<Timestamp>,
}

/// A token has another secret from here on.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct TokenRotated {
    /// Its id.
    pub token: TokenId,
    /// SHA-256 of the new secret.
    pub digest: Digest,
    /// Until when the secret before this one is taken too; not at all if not given.
    pub old_until: Option<Timestamp>,
    /// When it ends by itself.
    pub expires_at: Option<Timestamp>,
}

/// A token is no longer taken.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct TokenRevoked {
    /// Its id.
    pub token: TokenId,
    /// Why.
    pub reason: Option<String>,
}

events! {
    /// The events of access.
    AccessEvent {
        /// A token was made.
        TokenCreated(TokenCreated) = "access.token_created.v1",
        /// A token has another secret.
        TokenRotated(TokenRotated) = "access.token_rotated.v1",
        /// A token is no longer taken.
        TokenRevoked(TokenRevoked) = "access.token_revoked.v1",
    }
}

/// The secret that a token had before.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct OldSecret {
    /// Its SHA-256.
    pub digest: Digest,
    /// Until when it is taken.
    pub until: Timestamp,
}

/// A token as it is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Token {
    /// What it is called.
    pub name: AccountName,
    /// Who acts with it.
    pub account: AccountName,
    /// SHA-256 of its secret.
    pub digest: Digest,
    /// The secret before, for as long as it is taken.
    pub old: Option<OldSecret>,
    /// What it may do.
    pub grants: Vec<Grant>,
    /// When it ends by itself.
    pub expires_at: Option<Timestamp>,
    /// When it was made.
    pub created_at: Timestamp,
    /// When it got its present secret, if that is not its first one.
    pub rotated_at: Option<Timestamp>,
    /// When it was revoked.
    pub revoked_at: Option<Timestamp>,
}

impl Token {
    /// Whether it has ended by itself at this time.
    pub fn is_expired(&self, now: Timestamp) -> bool {
        self.expires_at.is_some_and(|end| end <= now)
    }

    /// Whether it administers everything, until it ends.
    fn administers(&self) -> bool {
        self.revoked_at.is_none()
            && self
                .grants
                .iter()
                .any(|grant| grant.role == Role::Admin && grant.projects == Projects::All)
    }

    /// Whether it administers everything, and ends only if somebody ends it.
    fn administers_for_good(&self) -> bool {
        self.administers() && self.expires_at.is_none()
    }
}

/// All tokens.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Access {
    /// Those that are taken, and the newest of those that were revoked.
    pub tokens: BTreeMap<TokenId, Token>,
}

impl Access {
    fn taken(&mut self, id: &TokenId, kind: &str) -> Result<&mut Token, Illegal> {
        let token = self.tokens.get_mut(id);
        token
            .filter(|t| t.revoked_at.is_none())
            .ok_or_else(|| Illegal::new(kind, format!("no token {id} that is taken")))
    }

    fn forget_oldest_revoked(&mut self) {
        let revoked = |t: &Token| t.revoked_at;
        let count = self.tokens.values().filter_map(revoked).count();
        if count > REVOKED_MAX {
            let oldest = self
                .tokens
                .iter()
                .filter_map(|(id, t)| Some((t.revoked_at?, id.clone())))
                .min();
            if let Some((_, id)) = oldest {
                self.tokens.remove(&id);
            }
        }
    }
}

impl Aggregate for Access {
    type Event = AccessEvent;
    const KIND: AggregateKind = AggregateKind::Access;

    fn first(event: AccessEvent, at: At) -> Result<Self, Illegal> {
        let mut state = Self::default();
        state.apply(event, at)?;
        Ok(state)
    }

    fn apply(&mut self, event: AccessEvent, at: At) -> Result<(), Illegal> {
        let kind = event.kind();
        match event {
            AccessEvent::TokenCreated(e) => {
                if self.tokens.contains_key(&e.token) {
                    return Err(Illegal::new(kind, format!("a token {}", e.token)));
                }
                let token = Token {
                    name: e.name,
                    account: e.account,
                    digest: e.digest,
                    old: None,
                    grants: e.grants,
                    expires_at: e.expires_at,
                    created_at: at.time,
                    rotated_at: None,
                    revoked_at: None,
                };
                self.tokens.insert(e.token, token);
            }
            AccessEvent::TokenRotated(e) => {
                let token = self.taken(&e.token, kind)?;
                let before = std::mem::replace(&mut token.digest, e.digest);
                token.old = e.old_until.map(|until| OldSecret {
                    digest: before,
                    until,
                });
                token.expires_at = e.expires_at;
                token.rotated_at = Some(at.time);
            }
            AccessEvent::TokenRevoked(e) => {
                let token = self.taken(&e.token, kind)?;
                token.revoked_at = Some(at.time);
                token.old = None;
                self.forget_oldest_revoked();
            }
        }
        Ok(())
    }
}

/// How long a token is taken from now on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NewEnd {
    /// Until when it was before.
    AsBefore,
    /// Until somebody ends it.
    Never,
    /// Until then.
    At(Timestamp),
}

/// What can be asked of access.
#[derive(Debug, Clone)]
pub enum Command {
    /// Make the first token of all, which administers everything.
    Begin(TokenCreated),
    /// Make a token.
    Create(TokenCreated),
    /// Give a token another secret.
    Rotate {
        /// Its id.
        token: TokenId,
        /// SHA-256 of the new secret.
        digest: Digest,
        /// Until when the secret before is taken too.
        old_until: Option<Timestamp>,
        /// When it ends by itself from now on.
        end: NewEnd,
        /// The time: a token is given no secret that would not be taken any more.
        now: Timestamp,
    },
    /// Take a token no longer.
    Revoke {
        /// Its id.
        token: TokenId,
        /// Why.
        reason: Option<String>,
    },
}

/// Decides on access. The first token is made once, whoever asks how often.
pub fn decide(state: Option<&Access>, command: Command) -> Result<Decision<AccessEvent>, Refusal> {
    let none = Access::default();
    let access = state.unwrap_or(&none);
    match command {
        Command::Begin(_) if state.is_some() => Ok(Decision::Nothing),
        Command::Begin(token) | Command::Create(token) => {
            check_new(access, &token)?;
            Ok(Decision::Append(AccessEvent::TokenCreated(token)))
        }
        Command::Rotate {
            token: id,
            digest,
            old_until,
            end,
            now,
        } => {
            let token = find(access, &id)?;
            let expires_at = match end {
                NewEnd::AsBefore => token.expires_at,
                NewEnd::Never => None,
                NewEnd::At(end) => Some(end),
            };
            if expires_at.is_some_and(|end| end <= now) {
                return Err(Refusal::new(
                    "expiry_in_past",
                    format!("the token {} would have ended already", token.name),
                    "say how long it is to be taken from now on, as with `--expires 90d`",
                ));
            }
            if token.administers_for_good() && expires_at.is_some() {
                another_administers(access, &id)?;
            }
            Ok(Decision::Append(AccessEvent::TokenRotated(TokenRotated {
                token: id,
                digest,
                old_until,
                expires_at,
            })))
        }
        Command::Revoke { token: id, reason } => {
            let kept = access.tokens.get(&id).ok_or_else(|| not_found(&id))?;
            if kept.revoked_at.is_some() {
                return Ok(Decision::Nothing);
            }
            if kept.administers() {
                another_administers(access, &id)?;
            }
            Ok(Decision::Append(AccessEvent::TokenRevoked(TokenRevoked {
                token: id,
                reason,
            })))
        }
    }
}

/// Whether a token beside this one administers everything and has no end. One that has an end is
/// not enough: after it nobody could make another token, although nobody has done anything.
fn another_administers(access: &Access, id: &TokenId) -> Result<(), Refusal> {
    let mut others = access.tokens.iter().filter(|(other, _)| *other != id);
    if others.any(|(_, token)| token.administers_for_good()) {
        return Ok(());
    }
    Err(Refusal::new(
        "last_admin",
        "no other token administers everything without an end: at some time nobody could make \
         another one",
        "create one with `--role admin --expires never` first, or rotate this one and keep its end",
    ))
}

fn check_new(access: &Access, token: &TokenCreated) -> Result<(), Refusal> {
    let mut taken = access.tokens.values().filter(|t| t.revoked_at.is_none());
    if access.tokens.contains_key(&token.token) || taken.clone().any(|t| t.name == token.name) {
        return Err(Refusal::new(
            "token_exists",
            format!("there is a token {} already", token.name),
            "give it another name, or revoke or rotate the one that there is",
        ));
    }
    if taken.by_ref().count() >= TOKENS_MAX {
        return Err(Refusal::new(
            "too_many_tokens",
            format!("there are {TOKENS_MAX} tokens already"),
            "revoke those that nobody uses",
        ));
    }
    if token.grants.is_empty() || token.grants.len() > GRANTS_MAX {
        return Err(Refusal::new(
            "invalid_grants",
            format!("a token has 1 to {GRANTS_MAX} grants"),
            "say with which role, and in which projects",
        ));
    }
    for grant in &token.grants {
        if let Projects::Named(names) = &grant.projects
            && !(1..=PROJECTS_MAX).contains(&names.len())
        {
            return Err(Refusal::new(
                "invalid_grants",
                format!("a grant names 1 to {PROJECTS_MAX} projects, or holds for all"),
                "name the projects, or make a token for each",
            ));
        }
    }
    Ok(())
}

fn not_found(id: &TokenId) -> Refusal {
    Refusal::new(
        "token_not_found",
        format!("there is no token {id}"),
        "`daybook token list` shows the tokens",
    )
}

fn find<'a>(access: &'a Access, id: &TokenId) -> Result<&'a Token, Refusal> {
    let token = access.tokens.get(id).ok_or_else(|| not_found(id))?;
    match token.revoked_at {
        None => Ok(token),
        Some(_) => Err(Refusal::new(
            "token_revoked",
            format!("the token {} is revoked", token.name),
            "create another one",
        )),
    }
}
