//! `daybook serve`: some roles, against NATS.

use clap::Args;

use super::Outcome;
use super::up::{NodeArgs, announce};
use crate::exit::Code;
use crate::node::{self, Node};
use crate::roles::Role;

/// Run some roles in this process, against NATS.
///
/// Any number of processes may run any role. Those on one machine share a data folder; a cluster
/// of processes is looked after by one of them at a time, and taken over when that one ends.
#[derive(Debug, Args)]
pub struct ServeArgs {
    /// A role of this process; may be given several times.
    #[arg(long = "role", value_enum, required = true, value_delimiter = ',')]
    roles: Vec<Role>,
    /// The NATS server that has the log.
    #[arg(long, env = "DAYBOOK_NATS", hide_env_values = true, value_name = "URL")]
    nats: String,
    /// Where the gateway answers from here, for the `probe` role, if another process runs it.
    #[arg(long, env = "DAYBOOK_GATEWAY_URL", value_name = "URL")]
    gateway_url: Option<String>,
    #[command(flatten)]
    node: NodeArgs,
}

pub async fn run(args: ServeArgs) -> Outcome {
    let mut options = args.node.options()?;
    options.roles = Role::expand(args.roles.iter().copied());
    options.nats = Some(args.nats.clone());
    options.gateway_url = args.gateway_url.clone();
    let node = Node::start(options).await?;
    announce(&node);
    let ended = node::until_signal(&node).await;
    // Another process may take the clusters over, with what runs in them.
    node.shutdown(false).await;
    ended.map(|()| Code::Success)
}
