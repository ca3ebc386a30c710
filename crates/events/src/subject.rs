//! Subjects: where an event stands on the log, as one typed codec.
//!
//! `daybook.ev.<project>.<environment|_>.<aggregate>.<id>`. Building and parsing are each other's
//! inverse (a property test holds them to it), and nothing else in Daybook formats a subject.

use std::fmt;
use std::str::FromStr;

use uuid::Uuid;

pub use crate::any::AggregateKind;
use crate::names::{BuildId, DeploymentId, EnvironmentName, Hostname, ProjectName, SubscriptionId};

/// What every event subject starts with.
pub const PREFIX: &str = "daybook.ev";

/// The aggregate that an event belongs to.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Subject {
    /// A project.
    Project(ProjectName),
    /// An environment.
    Environment(ProjectName, EnvironmentName),
    /// A build.
    Build(ProjectName, BuildId),
    /// A deployment.
    Deployment(ProjectName, EnvironmentName, DeploymentId),
    /// A project's GitOps repository.
    Gitops(ProjectName),
    /// A project's route table.
    Routing(ProjectName),
    /// A hostname that its owner brought along, whosoever it is.
    Domain(Hostname),
    /// A webhook that events of a project are sent to.
    Subscription(ProjectName, SubscriptionId),
    /// The ledger itself.
    Ledger,
    /// The tokens, and what each may do.
    Access,
    /// An aggregate that this version does not know, written by a newer one: kept and shown as
    /// it is, skipped by folds. It holds the whole subject text.
    Other(String),
}

impl Subject {
    /// The subject of an event that is in the log. What is no event subject at all, because somebody
    /// else published there, is kept as [`Subject::Other`].
    pub fn of_stored(text: &str) -> Self {
        text.parse()
            .unwrap_or_else(|_| Self::Other(text.to_owned()))
    }

    /// The kind of aggregate, unless a newer version wrote it.
    pub fn kind(&self) -> Option<AggregateKind> {
        Some(match self {
            Self::Project(_) => AggregateKind::Project,
            Self::Environment(..) => AggregateKind::Environment,
            Self::Build(..) => AggregateKind::Build,
            Self::Deployment(..) => AggregateKind::Deployment,
            Self::Gitops(_) => AggregateKind::Gitops,
            Self::Routing(_) => AggregateKind::Routing,
            Self::Domain(_) => AggregateKind::Domain,
            Self::Subscription(..) => AggregateKind::Subscription,
            Self::Ledger => AggregateKind::Ledger,
            Self::Access => AggregateKind::Access,
            Self::Other(_) => return None,
        })
    }

    /// The project; none for hostnames, the ledger itself and access, or if a newer version wrote a subject that this
    /// one cannot read.
    pub fn project(&self) -> Option<&ProjectName> {
        match self {
            Self::Project(p)
            | Self::Environment(p, _)
            | Self::Build(p, _)
            | Self::Deployment(p, _, _)
            | Self::Gitops(p)
            | Self::Routing(p)
            | Self::Subscription(p, _) => Some(p),
            Self::Domain(_) | Self::Ledger | Self::Access | Self::Other(_) => None,
        }
    }

    /// The environment, where the aggregate belongs to one.
    pub fn environment(&self) -> Option<&EnvironmentName> {
        match self {
            Self::Environment(_, e) | Self::Deployment(_, e, _) => Some(e),
            _ => None,
        }
    }
}

impl fmt::Display for Subject {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Project(p) => write!(f, "{PREFIX}.{p}._.project.{p}"),
            Self::Environment(p, e) => write!(f, "{PREFIX}.{p}.{e}.environment.{e}"),
            Self::Build(p, b) => write!(f, "{PREFIX}.{p}._.build.{b}"),
            Self::Deployment(p, e, d) => write!(f, "{PREFIX}.{p}.{e}.deployment.{d}"),
            Self::Gitops(p) => write!(f, "{PREFIX}.{p}._.gitops.{p}"),
            Self::Routing(p) => write!(f, "{PREFIX}.{p}._.routing.{p}"),
            // No hostname has an underscore, so it stands for the dot, which parts tokens.
            Self::Domain(h) => {
                let token = h.as_str().replace('.', "_");
                write!(f, "{PREFIX}._._.domain.{token}")
            }
            Self::Subscription(p, s) => write!(f, "{PREFIX}.{p}._.subscription.{s}"),
            Self::Ledger => write!(f, "{PREFIX}._._.ledger.log"),
            Self::Access => write!(f, "{PREFIX}._._.access.tokens"),
            Self::Other(s) => f.write_str(s),
        }
    }
}

/// A text that is no event subject.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is not an event subject")]
pub struct InvalidSubject(pub String);

impl FromStr for Subject {
    type Err = InvalidSubject;

    /// Parses a subject. A well-formed subject of an unknown aggregate becomes
    /// [`Subject::Other`]; anything outside `daybook.ev.` is refused.
    fn from_str(s: &str) -> Result<Self, InvalidSubject> {
        let bad = || InvalidSubject(s.to_owned());
        let rest = s
            .strip_prefix(PREFIX)
            .and_then(|r| r.strip_prefix('.'))
            .ok_or_else(bad)?;
        let mut tokens = rest.split('.');
        let wild = |b: u8| matches!(b, b'*' | b'>' | b' ');
        let mut token = || {
            tokens
                .next()
                .filter(|t| !t.is_empty() && !t.bytes().any(wild))
        };
        let (Some(project), Some(environment), Some(aggregate), Some(id), None) =
            (token(), token(), token(), token(), tokens.next())
        else {
            return Err(bad());
        };
        let known = || -> Option<Self> {
            if rest == "_._.ledger.log" {
                return Some(Self::Ledger);
            }
            if rest == "_._.access.tokens" {
                return Some(Self::Access);
            }
            if let Some(token) = rest.strip_prefix("_._.domain.") {
                return Hostname::parse(token.replace('_', "."))
                    .ok()
                    .map(Self::Domain);
            }
            let p = ProjectName::parse(project).ok()?;
            let e = match environment {
                "_" => None,
                e => Some(EnvironmentName::parse(e).ok()?),
            };
            Some(match (aggregate.parse().ok()?, e) {
                (AggregateKind::Project, None) if id == project => Self::Project(p),
                (AggregateKind::Environment, Some(e)) if id == environment => {
                    Self::Environment(p, e)
                }
                (AggregateKind::Build, None) => Self::Build(p, BuildId(canonical(id)?)),
                (AggregateKind::Deployment, Some(e)) => {
                    Self::Deployment(p, e, DeploymentId(canonical(id)?))
                }
                (AggregateKind::Subscription, None) => {
                    Self::Subscription(p, SubscriptionId(canonical(id)?))
                }
                (AggregateKind::Gitops, None) if id == project => Self::Gitops(p),
                (AggregateKind::Routing, None) if id == project => Self::Routing(p),
                _ => return None,
            })
        };
        Ok(known().unwrap_or_else(|| Self::Other(s.to_owned())))
    }
}

/// An id in its canonical spelling, which alone names an aggregate.
fn canonical(id: &str) -> Option<Uuid> {
    let uuid = Uuid::try_parse(id).ok()?;
    let mut spelling = Uuid::encode_buffer();
    (*uuid.hyphenated().encode_lower(&mut spelling) == *id).then_some(uuid)
}

/// Which events a reader wants, by subject. `Default` wants all.
#[derive(Debug, Clone, Default, PartialEq, Eq, Hash)]
pub struct SubjectFilter {
    /// Only this project.
    pub project: Option<ProjectName>,
    /// Only this environment. Aggregates that belong to no environment do not match.
    pub environment: Option<EnvironmentName>,
    /// Only this kind of aggregate.
    pub aggregate: Option<AggregateKind>,
    /// Only this one aggregate; the other fields are then not looked at.
    pub subject: Option<Subject>,
}

impl SubjectFilter {
    /// All events of one kind of aggregate.
    pub fn of(kind: AggregateKind) -> Self {
        Self {
            aggregate: Some(kind),
            ..Self::default()
        }
    }

    /// All events of one aggregate.
    pub fn exactly(subject: Subject) -> Self {
        Self {
            subject: Some(subject),
            ..Self::default()
        }
    }

    /// Whether this filter lets everything through.
    pub fn is_all(&self) -> bool {
        *self == Self::default()
    }

    /// Whether an event on this subject is wanted. Agrees with [`Self::to_nats`].
    pub fn matches(&self, subject: &Subject) -> bool {
        if let Some(s) = &self.subject {
            return s == subject;
        }
        if let Subject::Other(text) = subject {
            let mut t = text.split('.').skip(2);
            let (p, e, a) = (t.next(), t.next(), t.next());
            return self.project.as_ref().is_none_or(|x| Some(x.as_str()) == p)
                && self
                    .environment
                    .as_ref()
                    .is_none_or(|x| Some(x.as_str()) == e)
                && self.aggregate.is_none_or(|x| Some(x.as_str()) == a);
        }
        self.project
            .as_ref()
            .is_none_or(|p| subject.project() == Some(p))
            && self
                .environment
                .as_ref()
                .is_none_or(|e| subject.environment() == Some(e))
            && self.aggregate.is_none_or(|a| subject.kind() == Some(a))
    }

    /// The same filter as a NATS subject with wildcards.
    pub fn to_nats(&self) -> String {
        if let Some(s) = &self.subject {
            return s.to_string();
        }
        format!(
            "{PREFIX}.{}.{}.{}.*",
            self.project.as_ref().map_or("*", |p| p.as_str()),
            self.environment.as_ref().map_or("*", |e| e.as_str()),
            self.aggregate.map_or("*", AggregateKind::as_str),
        )
    }
}
