//! What a name resolves to, by the nameservers that were named and no others: no file of hosts, no
//! search domains, nothing remembered from an earlier look.

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use daybook_events::Hostname;
use daybook_events::deployment::{Plane, PlaneSeen, PlaneState};
use hickory_resolver::Resolver;
use hickory_resolver::config::{
    ConnectionConfig, LookupIpStrategy, NameServerConfig, ResolveHosts, ResolverConfig,
};
use hickory_resolver::net::runtime::TokioRuntimeProvider;
use hickory_resolver::net::{DnsError, NetError};
use hickory_resolver::proto::op::ResponseCode;
use hickory_resolver::proto::rr::{Name, RData};

use super::{DnsCheck, failing, listed};

/// What was seen, and the addresses that users are led to.
pub(super) async fn look(
    check: &DnsCheck,
    hostname: &Hostname,
    timeout: Duration,
) -> (PlaneSeen, Vec<IpAddr>) {
    let servers = listed(&check.nameservers);
    // One more than a server is given, and no longer, whatever it does.
    let found = tokio::time::timeout(timeout * 2, resolve(check, hostname, timeout)).await;
    let found = found.unwrap_or(Err(NetError::Timeout));
    let seen = match &found {
        Ok(found) => judge(check, found),
        Err(error) => refusal(&servers, hostname, error),
    };
    let addresses = found.map(|found| found.addresses).unwrap_or_default();
    (
        PlaneSeen {
            expected: expected(check),
            ..seen
        },
        addresses.into_iter().collect(),
    )
}

/// What a name leads to.
struct Found {
    addresses: BTreeSet<IpAddr>,
    aliases: BTreeSet<String>,
}

async fn resolve(
    check: &DnsCheck,
    hostname: &Hostname,
    timeout: Duration,
) -> Result<Found, NetError> {
    let servers = check.nameservers.iter().map(|server| name_server(*server));
    let config = ResolverConfig::from_name_servers(servers.collect());
    let mut builder = Resolver::builder_with_config(config, TokioRuntimeProvider::default());
    let options = builder.options_mut();
    options.timeout = timeout;
    options.attempts = 1;
    options.cache_size = 0;
    options.use_hosts_file = ResolveHosts::Never;
    options.ip_strategy = LookupIpStrategy::Ipv4AndIpv6;
    options.preserve_intermediates = true;
    // With a dot at its end nothing is added to it.
    let mut name = Name::from_ascii(hostname.as_str())?;
    name.set_fqdn(true);
    // A resolver of its own for each look remembers nothing.
    let found = builder.build()?.lookup_ip(name).await?;
    let aliases = found.as_lookup().answers().iter();
    let aliases = aliases.filter_map(|record| match &record.data {
        RData::CNAME(alias) => {
            let alias = alias.0.to_ascii().to_ascii_lowercase();
            Some(alias.trim_end_matches('.').to_owned())
        }
        _ => None,
    });
    Ok(Found {
        aliases: aliases.collect(),
        addresses: found.iter().collect(),
    })
}

fn name_server(at: SocketAddr) -> NameServerConfig {
    let connections = [ConnectionConfig::udp(), ConnectionConfig::tcp()];
    let connections = connections.map(|mut connection| {
        connection.port = at.port();
        connection
    });
    // What one of them denies, another need not: all are asked by users.
    NameServerConfig::new(at.ip(), true, connections.to_vec())
}

fn expected(check: &DnsCheck) -> Option<String> {
    let name = check.cname.iter().map(ToString::to_string);
    let all: Vec<_> = name
        .chain(check.addresses.iter().map(ToString::to_string))
        .collect();
    (!all.is_empty()).then(|| super::cut(&all.join(", ")))
}

fn judge(check: &DnsCheck, found: &Found) -> PlaneSeen {
    if found.addresses.is_empty() {
        return failing(Plane::Dns, "NoAddress", "the name has no address");
    }
    let wrong: Vec<_> = found
        .addresses
        .iter()
        .filter(|address| !check.addresses.is_empty() && !check.addresses.contains(address))
        .collect();
    let named = |name: &Hostname| found.aliases.contains(name.as_str());
    let is_alias = check.cname.as_ref().is_none_or(named);
    let drifted = |reason, message| PlaneSeen {
        message: Some(message),
        ..PlaneSeen::new(Plane::Dns, PlaneState::Drifted, reason)
    };
    let seen = match (wrong.is_empty(), is_alias) {
        (true, true) => PlaneSeen::new(Plane::Dns, PlaneState::Ok, "Resolves"),
        (false, _) => drifted(
            "WrongAddress",
            format!("the name resolves to {}", listed(&found.addresses)),
        ),
        (true, false) if found.aliases.is_empty() => {
            drifted("WrongName", "the name is no alias".to_owned())
        }
        (true, false) => drifted(
            "WrongName",
            format!("the name is an alias of {}", listed(&found.aliases)),
        ),
    };
    let aliases = found.aliases.iter().filter(|_| check.cname.is_some());
    let addresses = found.addresses.iter().map(ToString::to_string);
    let actual: Vec<_> = aliases.cloned().chain(addresses).collect();
    PlaneSeen {
        actual: Some(super::cut(&actual.join(", "))),
        ..seen
    }
}

fn refusal(servers: &str, hostname: &Hostname, error: &NetError) -> PlaneSeen {
    let (reason, message) = match error {
        NetError::Timeout => (
            "Timeout",
            format!("the nameserver {servers} does not answer in time"),
        ),
        NetError::Dns(DnsError::NoRecordsFound(none)) => match none.response_code {
            ResponseCode::NXDomain => (
                "NxDomain",
                format!("there is no {hostname}, says the nameserver {servers}"),
            ),
            _ => ("NoAddress", "the name has no address".to_owned()),
        },
        NetError::Dns(DnsError::ResponseCode(code)) => (
            "ServerFailure",
            format!("the nameserver {servers} answers: {code}"),
        ),
        error => (
            "Unreachable",
            format!("the nameserver {servers} cannot be asked: {error}"),
        ),
    };
    failing(Plane::Dns, reason, message)
}
