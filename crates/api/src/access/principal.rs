//! Who asks, and what they may do.

use std::sync::Arc;

use axum::extract::FromRequestParts;
use axum::http::request::Parts;
use daybook_events::access::{Grant, Projects, Role, TokenId};
use daybook_events::{Actor, Digest, ProjectName};
use jiff::Timestamp;

use super::control::Unauthenticated;
use crate::problem::Problem;

/// Who asks. Cheap to clone.
///
/// Handlers take it as an extractor; the layer around all routes has put it there. Where that
/// layer did not run there is none, and the request is refused.
#[derive(Debug, Clone)]
pub struct Principal(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    /// None where whoever asks may say who they are.
    actor: Option<Actor>,
    grants: Vec<Grant>,
    visible: Projects,
    credential: Credential,
}

/// What a principal was recognised by, and what its streams therefore depend on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Credential {
    /// Nothing that could end.
    None,
    /// A token, with the digest of the secret that was shown.
    Token(TokenId, Digest),
    /// A token of an identity provider, which ends then.
    Vouched(Timestamp),
}

impl Principal {
    /// Somebody with grants that nothing ends: a part of this process, or a test.
    pub fn granted(actor: Actor, grants: Vec<Grant>) -> Self {
        Self::new(Some(actor), grants, Credential::None)
    }

    /// Whoever reaches a server that asks nobody for a name: may do everything.
    pub(super) fn anybody() -> Self {
        Self::new(None, everything(), Credential::None)
    }

    /// Whoever asks for what is public: may do nothing else.
    pub(super) fn nobody() -> Self {
        let actor = Actor::unauthenticated("anonymous");
        Self::new(Some(actor), Vec::new(), Credential::None)
    }

    /// A caller in this process, who may do everything.
    pub(crate) fn in_process(actor: Actor) -> Self {
        Self::new(Some(actor), everything(), Credential::None)
    }

    pub(super) fn new(actor: Option<Actor>, grants: Vec<Grant>, credential: Credential) -> Self {
        let none = Projects::Named(std::collections::BTreeSet::new());
        let visible = grants.iter().fold(none, |all, g| all.union(&g.projects));
        Self(Arc::new(Inner {
            actor,
            grants,
            visible,
            credential,
        }))
    }

    /// Who it is. None where nobody is asked, and the request may say a name.
    pub fn actor(&self) -> Option<&Actor> {
        self.0.actor.as_ref()
    }

    /// What it may do.
    pub fn grants(&self) -> &[Grant] {
        &self.0.grants
    }

    /// The projects that it may see anything of. Whatever is listed, streamed or counted for it
    /// is filtered by this.
    pub fn visible(&self) -> &Projects {
        &self.0.visible
    }

    /// Whether it may know of a project.
    pub fn sees(&self, project: &ProjectName) -> bool {
        self.visible().contains(project)
    }

    /// Whether nobody was recognised: then nothing but what is public may be served.
    pub(crate) fn is_nobody(&self) -> bool {
        self.grants().is_empty()
    }

    /// Whether a credential was shown that says who asks.
    pub(crate) fn has_credential(&self) -> bool {
        *self.credential() != Credential::None
    }

    pub(super) fn credential(&self) -> &Credential {
        &self.0.credential
    }
}

fn everything() -> Vec<Grant> {
    vec![Grant {
        role: Role::Admin,
        projects: Projects::All,
    }]
}

impl<S: Send + Sync> FromRequestParts<S> for Principal {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, Problem> {
        let principal = parts.extensions.get::<Self>().cloned();
        principal.ok_or_else(|| Unauthenticated::Missing.into())
    }
}
