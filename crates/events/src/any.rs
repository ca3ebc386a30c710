//! The list of all aggregates, and what is made from it: their kinds, and the payload and the
//! folded state of any of them. Besides its own module and its [`Subject`](crate::Subject), a new
//! aggregate is one more row here.

use std::str::FromStr;

use schemars::Schema;
use serde::de::DeserializeSeed;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::access::{Access, AccessEvent};
use crate::aggregate::{At, Folded, Void};
use crate::build::{Build, BuildEvent};
use crate::check;
use crate::deployment::{Deployment, DeploymentEvent};
use crate::domain::{Domain, DomainEvent};
use crate::envelope::{DecodeError, EventView, Payload as _};
use crate::environment::{Environment, EnvironmentEvent};
use crate::gitops::{Gitops, GitopsEvent};
use crate::ledger::{LedgerEvent, LedgerRecord};
use crate::project::{Project, ProjectEvent};
use crate::routing::{Routing, RoutingEvent};
use crate::subject::InvalidSubject;
use crate::subscription::{Subscription, SubscriptionEvent};

macro_rules! aggregates {
    ( $( $(#[$doc:meta])* $kind:ident = $token:literal: $state:ty, $event:ty; )* ) => {
        /// The consistency boundaries of the ledger.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub enum AggregateKind {
            $( $(#[$doc])* $kind, )*
        }

        impl AggregateKind {
            /// All kinds, in the order in which they depend on each other.
            pub const ALL: [Self; [ $( $token ),* ].len()] = [ $( Self::$kind, )* ];

            /// The token of this kind in a subject and in an event type.
            pub fn as_str(self) -> &'static str {
                match self { $( Self::$kind => $token, )* }
            }

            /// Type (without the common prefix) and payload schema of each event of this kind of
            /// aggregate, in the order of declaration.
            pub fn schemas(self) -> Vec<(&'static str, Schema)> {
                match self { $( Self::$kind => <$event>::schemas(), )* }
            }
        }

        impl FromStr for AggregateKind {
            type Err = InvalidSubject;
            fn from_str(s: &str) -> Result<Self, InvalidSubject> {
                match s {
                    $( $token => Ok(Self::$kind), )*
                    _ => Err(InvalidSubject(s.to_owned())),
                }
            }
        }

        /// The payload of an event, or the reason why it could not be read, by the aggregate that
        /// the event's subject names.
        #[derive(Debug)]
        pub enum AnyPayload {
            $( $(#[$doc])* $kind(Result<$event, DecodeError>), )*
            /// The aggregate is of a newer version.
            Other,
        }

        impl AnyPayload {
            /// Reads a payload of a type (without the common prefix) from a text that may be no
            /// JSON, which is an error as any other. Old versions are upcast.
            pub fn decode(aggregate: Option<AggregateKind>, kind: &str, data: &str) -> Self {
                if let Some(payload) = aggregate.and_then(|of| check::read(of, kind, data)) {
                    return payload;
                }
                match aggregate {
                    $( Some(AggregateKind::$kind) => {
                        Self::$kind(<$event>::decode_text(kind, data))
                    } )*
                    None => Self::Other,
                }
            }

            /// Why it could not be read.
            pub fn error(&self) -> Option<&DecodeError> {
                match self {
                    $( Self::$kind(payload) => payload.as_ref().err(), )*
                    Self::Other => None,
                }
            }
        }

        /// The folded state of an aggregate. It is serialised as the [`Folded`] that it holds;
        /// its kind, which says what that is, reads it back as a [`DeserializeSeed`].
        #[derive(Debug, Clone)]
        pub enum AnyFolded {
            $( $(#[$doc])* $kind(Box<Folded<$state>>), )*
        }

        impl AnyFolded {
            /// An aggregate before its first event.
            pub fn new(kind: AggregateKind) -> Self {
                match kind { $( AggregateKind::$kind => Self::$kind(Box::default()), )* }
            }

            /// Its kind.
            pub fn kind(&self) -> AggregateKind {
                match self { $( Self::$kind(_) => AggregateKind::$kind, )* }
            }

            /// Folds one event: see [`Folded::step`]. A payload of another aggregate is void.
            pub fn step(&mut self, at: At, revision: u32, payload: AnyPayload) -> Result<(), Void> {
                match (self, payload) {
                    $( (Self::$kind(folded), AnyPayload::$kind(payload)) => {
                        folded.step(at, revision, payload)
                    } )*
                    (_, payload) => Err(Void::Unknown(payload.aggregate().to_owned())),
                }
            }
        }

        impl AnyPayload {
            fn aggregate(&self) -> &'static str {
                match self {
                    $( Self::$kind(_) => $token, )*
                    Self::Other => "an aggregate of a newer version",
                }
            }
        }

        impl Serialize for AnyFolded {
            fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                match self { $( Self::$kind(folded) => folded.serialize(serializer), )* }
            }
        }

        impl<'de> DeserializeSeed<'de> for AggregateKind {
            type Value = AnyFolded;
            fn deserialize<D: Deserializer<'de>>(self, input: D) -> Result<AnyFolded, D::Error> {
                match self {
                    $( Self::$kind => Deserialize::deserialize(input).map(AnyFolded::$kind), )*
                }
            }
        }
    };
}

aggregates! {
    /// A project with its services.
    Project = "project": Project, ProjectEvent;
    /// An environment of a project.
    Environment = "environment": Environment, EnvironmentEvent;
    /// A build, shared by all deployments of the same commit and configuration.
    Build = "build": Build, BuildEvent;
    /// One release of one service instance.
    Deployment = "deployment": Deployment, DeploymentEvent;
    /// The commits in a project's GitOps repository.
    Gitops = "gitops": Gitops, GitopsEvent;
    /// The route table of a project.
    Routing = "routing": Routing, RoutingEvent;
    /// A hostname that its owner brought along.
    Domain = "domain": Domain, DomainEvent;
    /// A webhook that events of a project are sent to.
    Subscription = "subscription": Subscription, SubscriptionEvent;
    /// The ledger itself.
    Ledger = "ledger": LedgerRecord, LedgerEvent;
    /// The tokens, and what each may do.
    Access = "access": Access, AccessEvent;
}

impl AnyPayload {
    /// Reads the payload of an event on a subject of this kind of aggregate.
    pub fn of(aggregate: Option<AggregateKind>, event: &EventView<'_>) -> Self {
        Self::decode(aggregate, event.short_kind(), event.data().get())
    }
}
