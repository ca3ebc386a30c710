//! Where gateways are reached.

use std::fmt;
use std::net::IpAddr;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::names::Hostname;

/// The most addresses of one gateway that are kept; Gateway API allows as many.
pub const ADDRESSES_MAX: usize = 16;

/// Where a gateway is reached, as it says itself.
#[derive(
    Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, JsonSchema,
)]
#[serde(rename_all = "snake_case")]
pub enum GatewayAddress {
    /// An IP address.
    Ip(IpAddr),
    /// A name that leads to it, such as that of a load balancer.
    Hostname(Hostname),
}

impl fmt::Display for GatewayAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Ip(address) => address.fmt(f),
            Self::Hostname(name) => name.fmt(f),
        }
    }
}
