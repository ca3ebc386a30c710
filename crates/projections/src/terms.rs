//! Terms: hashes of what the events of one block of the audit are about.

use std::hash::Hasher;

use daybook_events::access::Projects;

use crate::audit::AuditFilter;

/// What a term says of an event: the letter that goes into its hash before the text.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u8)]
pub(crate) enum Role {
    Project = b'p',
    Environment = b'e',
    Service = b's',
    Actor = b'a',
    /// How the actor was authenticated. Nobody searches for that: it is no term.
    Authentication = b'-',
    Kind = b'k',
    Void = b'v',
    Deployment = b'd',
    Correlation = b'c',
}

/// `deployment` of `deployment.requested.v1`.
pub(crate) fn family(kind: &str) -> &str {
    kind.split('.').next().unwrap_or(kind)
}

/// FNV-1a, which never changes between versions as the standard library's hash may.
struct Fnv(u64);

impl Hasher for Fnv {
    fn finish(&self) -> u64 {
        self.0
    }
    fn write(&mut self, bytes: &[u8]) {
        for b in bytes {
            self.0 = (self.0 ^ u64::from(*b)).wrapping_mul(0x0100_0000_01b3);
        }
    }
}

pub(crate) fn term(role: Role, text: &[u8]) -> u32 {
    let mut hash = Fnv(0xcbf2_9ce4_8422_2325);
    hash.write(&[role as u8]);
    hash.write(text);
    let h = hash.finish();
    (h ^ (h >> 32)) as u32
}

/// The terms that a block must hold to be worth reading for a filter.
#[derive(Debug)]
pub(crate) struct Wanted {
    /// All of these.
    all: Vec<u32>,
    /// And one of these, if whoever asks sees some projects only.
    any: Option<Vec<u32>>,
}

impl Wanted {
    /// Whether every block is worth reading.
    pub(crate) fn is_anything(&self) -> bool {
        self.all.is_empty() && self.any.is_none()
    }

    /// Whether a row of terms holds what is wanted.
    pub(crate) fn is_held_by(&self, terms: &[u8]) -> bool {
        let (terms, _) = terms.as_chunks::<4>();
        let holds = |wanted: &u32| terms.binary_search(&wanted.to_be_bytes()).is_ok();
        self.all.iter().all(holds) && self.any.as_ref().is_none_or(|any| any.iter().any(holds))
    }
}

/// The terms that a block must hold to be worth reading for a filter.
pub(crate) fn wanted(filter: &AuditFilter) -> Wanted {
    let mut terms = Vec::new();
    let mut add = |role: Role, text: Option<&[u8]>| {
        terms.extend(text.map(|text| term(role, text)));
    };
    add(
        Role::Project,
        filter.project.as_ref().map(|p| p.as_str().as_bytes()),
    );
    add(
        Role::Environment,
        filter.environment.as_ref().map(|e| e.as_str().as_bytes()),
    );
    add(
        Role::Service,
        filter.service.as_ref().map(|s| s.as_str().as_bytes()),
    );
    add(Role::Actor, filter.actor.as_deref().map(str::as_bytes));
    add(Role::Kind, filter.kind.as_deref().map(str::as_bytes));
    add(Role::Void, filter.void_only.then_some(b"".as_slice()));
    add(
        Role::Deployment,
        filter
            .deployment
            .as_ref()
            .map(|d| d.0.as_bytes().as_slice()),
    );
    add(
        Role::Correlation,
        filter.correlation.as_ref().map(|c| c.as_bytes().as_slice()),
    );
    let any = match &filter.visible {
        Projects::All => None,
        Projects::Named(names) => {
            let names = names.iter().map(|p| p.as_str().as_bytes());
            Some(names.map(|p| term(Role::Project, p)).collect())
        }
    };
    Wanted { all: terms, any }
}

/// The row of a block's terms; empties them.
pub(crate) fn row(terms: &mut Vec<u32>) -> Vec<u8> {
    terms.sort_unstable();
    terms.dedup();
    terms.drain(..).flat_map(u32::to_be_bytes).collect()
}
