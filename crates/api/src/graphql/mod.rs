//! GraphQL at `/graphql`: the same questions and commands as over REST, answered by the same
//! functions, with the same codes for what is refused (in `extensions.code`).
//!
//! Queries and mutations are sent with POST, subscriptions over a WebSocket with the protocol
//! `graphql-transport-ws`. What a request may cost is bounded before anything is done for it
//! ([`limits`]), and lists bring with them all that they show: no field of a list's items reads
//! the store for itself.

mod asked;
mod deploy_run;
mod http;
mod limits;
mod mutation;
mod objects;
mod project;
mod query;
mod refusal;
mod socket;
mod subscription;

use async_graphql::{SDLExportOptions, Schema};

pub(crate) use http::{get, post};

use mutation::Mutation;
use query::Query;
use subscription::Subscription;

/// What can be asked.
pub(crate) type DaybookSchema = Schema<Query, Mutation, Subscription>;

/// The schema. It holds no state: each request brings what it is answered from.
pub(crate) fn schema() -> DaybookSchema {
    Schema::build(Query, Mutation, Subscription)
        .limit_depth(limits::DEPTH)
        .limit_complexity(limits::COMPLEXITY)
        .limit_directives(limits::DIRECTIVES)
        .finish()
}

/// The schema in the GraphQL schema definition language.
pub fn sdl() -> String {
    schema().sdl_with_options(
        SDLExportOptions::new()
            .sorted_enum_items()
            .prefer_single_line_descriptions(),
    )
}
