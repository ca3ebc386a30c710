//! GraphQL at `/graphql`: the same questions and commands as over REST, answered by the same
//! functions, with the same codes for what is refused (in `extensions.code`).
//!
//! Queries and mutations are sent with POST, subscriptions over a WebSocket with the protocol
//! `graphql-transport-ws`. What a request may cost is bounded before anything is done for it
//! ([`limits`]), what the items of lists need is read for all of them at once ([`loads`]), and how long
//! lists are is counted while they are made.

mod asked;
mod deploy_run;
mod governing;
mod http;
mod limits;
mod loads;
mod mutation;
mod objects;
mod project;
mod query;
mod refusal;
mod socket;
mod subscription;

use async_graphql::{MergedObject, SDLExportOptions, Schema};

pub(crate) use http::{get, post};

use subscription::Subscription;

/// What can be asked.
#[derive(Debug, Default, MergedObject)]
pub(crate) struct Query(query::Reading, governing::Overseeing);

/// What can be done.
#[derive(Debug, Default, MergedObject)]
pub(crate) struct Mutation(mutation::Operating, governing::Governing);

/// What can be asked.
pub(crate) type DaybookSchema = Schema<Query, Mutation, Subscription>;

/// The schema. It holds no state: each request brings what it is answered from.
pub(crate) fn schema() -> DaybookSchema {
    Schema::build(Query::default(), Mutation::default(), Subscription)
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
